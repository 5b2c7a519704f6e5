"""python docs/memory.py: what a run is expected to need of a GPU, by part and by phase.

Prints docs/memory.md, computed by minibooth/training/plan.py; nothing is measured.
"""

import torch

from minibooth.bench import models
from minibooth.formats import families
from minibooth.pipeline import StableDiffusion
from minibooth.training import fit, plan
from minibooth.training.settings import METHODS, TrainConfig

ABOUT = """# What a run needs of a GPU's memory

*For whoever asks why a run does not fit on a card, or thinks of buying one. The words and the
options are explained in [the manual](guide.md#memory).*

Made by `python docs/memory.py > docs/memory.md`: GB, as a run on a GPU counts them before it
starts. **Counted, not yet measured**; `python -m minibooth.bench memory` measures them.

Stable Diffusion 1.5 at 512², one photograph and one class image per step, all other settings as
they are where nothing is given. Where the networks compute in bf16 or in fp16 the bytes are the
same, but with fp16 there is no `optimizer_in_backward`: gradients that overflow must be thrown away
together. LoRA (of rank 4), Textual Inversion and a hypernetwork have few gradients and averages to
save.

## By part
"""
BETWEEN = """
- **weights**: of what trains in fp32; beside a LoRA or a word those of the networks that it trains
  in, in 16 bits.
- **averages**: AdamW's two.
- **activations**: what the backward pass wants of the forward pass, with the weights' 16-bit
  copies; checkpointed, what is kept and the part that is computed again.
- **step**: gradients and activations are not all there at once, since the backward pass gives back
  the ones while it adds the others.
- **graph**: a CUDA graph of the step keeps that to itself, also while pictures are drawn. With
  8-bit AdamW there is none.
- **pictures**: the sample grids, on the way: the UNet's work or the VAE's, whichever is more.

## By phase

What stays and what is worked in at most, with a tenth of that and 0.5 GB to spare for libraries and
fragments. A run needs the largest. Before training all networks are there: for the class images,
the first grid and the encoding. `--explain` looks at the first step while there are no averages.
"""


SDXL = """
## SDXL

At 1024², with its own settings: a LoRA of rank 16, pictures drawn one at a time.

| of SDXL | options | class images | pictures before | training |
| --- | --- | --- | --- | --- |"""
UPSCALER = """
## The upscaler

stable-diffusion-x4-upscaler on pieces of 512², whose latents are of 128²: one of a photograph and
one of a class image per step, in 16 bits. While the class images begin, Stable Diffusion 1.5 has
the device to itself.

| of the upscaler | options | base model | pictures before | training |
| --- | --- | --- | --- | --- |"""
AFTER = """
Encoding and decoding are counted as if PyTorch kept the scores of the VAE's attention, 16,384
pixels by as many, which its fused kernels do not; for larger pictures attention goes in parts.

On a CPU, with random weights in fp32, one thread, on a machine that had other work: a picture of
64² enlarged in two steps with guidance took 78 s and 4.2 GB at most, a training step of all
weights on a piece of 128², checkpointed and with AdamW, 26 s and 9.7 GB
(`pytest -m slow -s tests/test_upscaler_full_size.py`)."""
LAST = """
Counted, too. Where an option saves memory:

- both text encoders, 3.3 GB, stay on the CPU if they are not trained: they encode a few prompts;
- each of a transformer's blocks is computed again by itself, and not ten as one;
- with `use_8bit_adam`, which goes without a CUDA graph, the UNet waits on the CPU while the VAE,
  which computes in fp32, encodes and decodes: at 1024² that takes 3.2 GB.

So a LoRA trains on a card of 12 GB with `gradient_checkpointing`; on one of 8 GB, of which 7 are
free, with `use_8bit_adam` as well and without class images, `--prior_loss_weight 0`; and all
weights on one of 24 GB with the three options.

On a CPU, with random weights in bf16, one thread and a picture of 256²: a forward pass of the UNet
took 21 s, a step of a LoRA of rank 16 72 s, and 5.9 GB at most, of which 5.1 are the weights
(`pytest -m slow -s tests/test_sdxl_full_size.py`)."""


def table(heads: list[str], rows: list[list[str]]) -> None:
    print("\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)))


def gigabytes(sizes: dict[str, int]) -> list[str]:
    return [f"{size / 1e9:.1f}" for size in sizes.values()]


def latent_pixels(sd: StableDiffusion) -> int:
    return (sd.image_size // sd.vae.factor) ** 2


def sdxl() -> None:
    sd, ours = models.model("SDXL", torch.device("meta")), families.SDXL
    print(SDXL)
    for method, more in (("lora", families.SDXL_LORA), ("dreambooth", {})):
        for prior in (1.0, 0.0):
            for mode in fit.MODES if method == "dreambooth" else fit.MODES[:4]:
                given = ours | more | dict.fromkeys(mode, True)
                config = TrainConfig(method=method, prior_loss_weight=prior, **given)
                phases = plan.phases(sd, config, latent_pixels(sd), half=True).values()
                sizes = [f"{plan.with_spare(*phase) / 1e9:.1f}" for phase in phases]
                names = ", ".join(f"`{name}`" for name in mode) or "none"
                print(f"| {' | '.join([method, names, 'yes' if prior else 'no', *sizes])} |")
    print(LAST)


def upscaler() -> None:
    sd, base = (models.model(size, torch.device("meta")) for size in ("x4", "SD 1.5"))
    print(UPSCALER)
    for method in ("lora", "dreambooth"):
        for mode in fit.MODES if method == "dreambooth" else fit.MODES[:2]:
            config = TrainConfig(method=method, **dict.fromkeys(mode, True))
            phases = plan.phases(sd, config, latent_pixels(sd), half=True, base=base)
            order = ("base model", "pictures before", "training")
            sizes = [f"{plan.with_spare(*phases[name]) / 1e9:.1f}" for name in order]
            names = ", ".join(f"`{name}`" for name in mode) or "none"
            print(f"| {' | '.join([method, names, *sizes])} |")
    print(AFTER)


def main() -> None:
    sd, by_part, by_phase = models.model("SD 1.5", torch.device("meta")), [], []
    pixels = latent_pixels(sd)
    for method in METHODS:
        # Of adapters there is hardly a gradient or an average to save.
        for mode in fit.MODES if method == "dreambooth" else fit.MODES[:2]:
            config = TrainConfig(method=method, explain=True, **dict.fromkeys(mode, True))
            computed = "bf16" if config.optimizer_in_backward else "bf16, fp16"
            head = [method, ", ".join(f"`{name}`" for name in mode) or "none", computed]
            part = plan.parts(sd, config, pixels, half=True)
            by_part.append([*head, *gigabytes(part)])
            phases = plan.phases(sd, config, pixels, half=True)
            most = {name: plan.with_spare(*phase) for name, phase in phases.items()}
            by_phase.append([*head, *gigabytes(most)])
    heads = ["method", "options", "in"]
    print(ABOUT)
    table([*heads, *part], by_part)
    print(BETWEEN)
    table([*heads, *phases], by_phase)
    sdxl()
    upscaler()


if __name__ == "__main__":
    main()
