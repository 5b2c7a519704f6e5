"""What a run on a GPU needs of its memory, about, counted before it starts."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import hypernetwork, lora, ops
from ..device import ranks
from ..hypernetwork import Hypernetwork
from ..pipeline import StableDiffusion
from . import by_kernel
from .eight_bit import AdamW8bit

# ---- what is sure ------------------------------------------------------------------------------


def needed(sd: StableDiffusion, config, half: bool = False) -> dict[str, int]:
    """Bytes that are sure to be needed while it trains: the weights of the networks at work and of
    what trains in them; of what trains, the weights alone, the gradients and AdamW's two averages.
    `half`: whether the networks compute in 16 bits."""
    trained = trainable(sd, config)
    averages = 2 * sum(size(p) for p in trained)
    if config.use_8bit_adam:
        averages = sum(eight_bit(p.numel()) for p in trained)
    trained = sum(size(p) for p in trained)
    weights = trained
    if config.method != "dreambooth":
        weights += sum(placed(sd, config, half)[name] for name in at_work(sd, config))
    gradients = 0 if config.optimizer_in_backward else trained
    return {"weights": weights, "trained": trained, "gradients": gradients, "averages": averages}


def at_work(sd: StableDiffusion, config) -> tuple[str, ...]:
    """The networks that train, or through which the gradient of what trains goes."""
    return ("unet", *sd.text_encoders) if config.text_changes else ("unet",)


def placed(sd: StableDiffusion, config, half: bool) -> dict[str, int]:
    """Bytes of each network's weights before training: in fp32 but, as methods.place has it, for
    those at work that keep their weights."""
    rounded = at_work(sd, config) if half and config.method != "dreambooth" else ()
    placed = sd.networks.keys() - resting(sd, config)
    return {name: size_of(sd.networks[name]) // (2 if name in rounded else 1) for name in placed}


def trainable(sd: StableDiffusion, config) -> list[Tensor]:
    """The weights that train, or for adapters, which are not there yet, their shapes."""
    networks = [sd.networks[name] for name in at_work(sd, config)]
    if config.trains_word:
        widths = [len(encoder.final_layer_norm.weight) for encoder in sd.text_encoders.values()]
        return [torch.empty(config.num_vectors, width, device="meta") for width in widths]
    if config.trains_hypernetwork:
        widths = config.hypernetwork_widths or hypernetwork.widths(sd.unet)
        with torch.device("meta"):
            return list(Hypernetwork(config.hypernetwork_form, widths).parameters())
    if config.method == "lora":
        shapes = [s for n in networks for s in lora.shapes(n, config.rank, config.lora_targets)]
        return [torch.empty(shape, device="meta") for shape in shapes]
    return [p for network in networks for p in network.parameters()]


def resting(sd: StableDiffusion, config) -> tuple[str, ...]:
    """The text encoders, where memory is short, they are large and only encode a few prompts: which
    they do on the CPU, without ever being on the device."""
    large = sum(map(size_of, sd.text_encoders.values())) > LARGE
    short = config.saves_memory and not config.text_changes
    return tuple(sd.text_encoders) if large and short else ()


def by_turns(sd: StableDiffusion, config, pixels: int) -> bool:
    """Whether the UNet waits on the CPU while the VAE works on so many latent pixels: where memory
    is short, that is much, and no CUDA graph of the step wants the weights to keep their place."""
    return config.use_8bit_adam and coding(sd, pixels) > LARGE


def size(p: Tensor) -> int:
    return 4 * p.numel()


def size_of(network: nn.Module) -> int:
    return sum(size(p) for p in network.parameters())


@functools.cache
def eight_bit(numbers: int) -> int:
    """Bytes of the averages that AdamW8bit keeps of a weight of so many numbers."""
    state = AdamW8bit.fresh_state(torch.empty(numbers, device="meta"))
    return sum(x.nbytes for name, x in state.items() if name != "step")


# ---- what is likely ----------------------------------------------------------------------------

# Bytes per latent pixel and sample, counted over SD 1.5's networks at 512² and SDXL's at 1024²:
# what a training step has at most beside weights, their 16-bit copies and gradients; in full, and
# checkpointed.
ACTIVATIONS = {  # where the UNet computes in 16 bits, and in fp32
    "dreambooth": {True: (304_000, 62_000), False: (464_000, 87_000)},
    "lora": {True: (261_000, 46_000), False: (382_000, 84_000)},
    "textual_inversion": {True: (234_000, 44_000), False: (353_000, 81_000)},
    "hypernetwork": {True: (273_000, 50_000), False: (419_000, 88_000)},
}
DEEP_ACTIVATIONS = {  # SDXL's, whose transformers have up to ten blocks
    "dreambooth": {True: (532_000, 53_500), False: (800_000, 86_800)},
    "lora": {True: (443_000, 40_300), False: (683_000, 65_300)},
    "textual_inversion": {True: (390_000, 40_300), False: (628_000, 65_300)},
    "hypernetwork": {True: (477_000, 45_200), False: (770_000, 73_200)},
}
WIDE_ACTIVATIONS = {  # an upscaler's, whose latents are as large as SDXL's, its first levels narrow
    "dreambooth": {True: (131_000, 17_000), False: (184_000, 31_000)},
    "lora": {True: (104_500, 21_400), False: (142_300, 30_500)},
}
LEFT = 0.33, 0.6  # of these, where the backward pass has most of the gradients
DEEP_LEFT = 0.25, 0.41
WIDE_LEFT = 0.33, 0.95  # nearly all are there when the first level, the largest, is computed again
PREDICTING = {True: 17_300, False: 32_000}  # the UNet without a backward pass
DEEP_PREDICTING = {True: 12_200, False: 19_600}
WIDE_PREDICTING = {True: 9_730, False: 14_600}
CODING = 197_000  # the VAE, which computes in fp32 and takes one picture of this size at once; of
# the 64 pixels of the picture that a latent's is of Stable Diffusion
LARGE = 2e9  # bytes of what makes room, or of what room is made for, where memory is short
SPARE = 0.1, 0.5e9  # of what is worked in, and bytes: for libraries and fragments


def parts(sd: StableDiffusion, config, pixels: int, half: bool) -> dict[str, int]:
    """Bytes that training needs on a GPU, about, by what they are for. Not all at a time: see
    `phases`. `pixels` of the latents; whether the networks compute in 16 bits.

    A step takes less than activations and gradients together, since the backward pass gives back
    the ones while it adds the others. Its CUDA graph keeps that to itself. Where AdamW is the
    kernel's the sums are the same: its copies stay, and gradients are half as large.
    """
    need, short = needed(sd, config, half), config.gradient_checkpointing
    of_kind = counted(sd)
    samples = config.train_batch_size * (1 + config.uses_prior)
    kept = samples * pixels * of_kind.activations[config.method][half][short]
    worked, copied = kept + copies(sd, config, half), 0
    if half and config.method == "dreambooth" and by_kernel.possible(config):
        copied = need["trained"] // 2  # also where a Precision keeps none
    at_end = int(of_kind.left[short] * kept) + need["gradients"]
    step = max(worked, kept + copied, at_end)
    stays = 0 if config.use_8bit_adam else step
    if ranks.count() > 1:  # no graph, but gradients are always there, in the buckets they travel in
        step, stays = worked + need["gradients"], need["gradients"]
    pictures = 0
    if config.num_validation_images:  # as grids.draw does it: the UNet, then the VAE
        predicting = drawing(sd, config, pixels, half, config.grid_batch_size)
        room = need["weights"] if by_turns(sd, config, pixels) else 0
        decoding = size_of(sd.vae) + coding(sd, pixels) - room
        pictures = max(visiting(sd, config) + predicting, decoding)
    return {
        "weights": need["weights"],
        "gradients": need["gradients"],
        "averages": need["averages"],
        "activations": worked,
        "step": step,
        "graph": stays,
        "pictures": pictures,
    }


class Counted(NamedTuple):
    """What was counted of a kind of UNet."""

    activations: dict[str, dict[bool, tuple[int, int]]]
    left: tuple[float, float]
    predicting: dict[bool, int]


def counted(sd: StableDiffusion) -> Counted:
    unet = sd.configs["unet"]
    if unet.get("num_class_embeds"):
        return Counted(WIDE_ACTIVATIONS, WIDE_LEFT, WIDE_PREDICTING)
    if unet.get("transformer_layers_per_block", 1) != 1:
        return Counted(DEEP_ACTIVATIONS, DEEP_LEFT, DEEP_PREDICTING)
    return Counted(ACTIVATIONS, LEFT, PREDICTING)


def coding(sd: StableDiffusion, pixels: int) -> int:
    """Bytes that the VAE works in for so many latent pixels: most for the picture itself or, where
    they are as many as the picture's have been, for attention's scores and what softmax makes of
    them, if PyTorch keeps those, which ops.attention has limits for."""
    scores = 2 * 4 * min(pixels**2, ops.SCORES)
    return max(pixels * CODING * sd.vae.factor**2 // 64, scores)


def visiting(sd: StableDiffusion, config) -> int:
    """Bytes of the text encoders that are on the device while it draws, and only then."""
    if config.text_changes or resting(sd, config):
        return 0
    return sum(map(size_of, sd.text_encoders.values()))


def copies(sd: StableDiffusion, config, half: bool) -> int:
    """Bytes of the 16-bit copies of weights that train, which a Precision keeps."""
    kept = half and not config.gradient_checkpointing
    return needed(sd, config)["trained"] // 2 if kept else 0


def drawing(sd: StableDiffusion, config, pixels: int, half: bool, pictures: int) -> int:
    """Bytes that the UNet works in while it draws so many at once, with guidance."""
    each = counted(sd).predicting[half]
    return copies(sd, config, half) + 2 * pictures * pixels * each


def base_alone(base: StableDiffusion, config, half: bool) -> tuple[int, int]:
    """The same while an upscaler's base model draws, before anything else is on the device."""
    pixels = (base.image_size // base.vae.factor) ** 2
    weights = sum(map(size_of, base.networks.values())) - half * size_of(base.unet) // 2
    draw = 2 * config.sample_batch_size * pixels * counted(base).predicting[half]
    of_vae = coding(base, pixels)
    return weights, max(draw, of_vae) if config.saves_memory else draw + of_vae


def phases(
    sd: StableDiffusion, config, pixels: int, half: bool, base: StableDiffusion | None = None
) -> dict[str, tuple[int, int]]:
    """By phase of a run on a GPU, bytes that stay through it and bytes that it works in at most.
    `base`: an upscaler's."""
    part, of_vae = parts(sd, config, pixels, half), coding(sd, pixels)
    vae, text, there = size_of(sd.vae), visiting(sd, config), placed(sd, config, half)
    room = there["unet"] if by_turns(sd, config, pixels) else 0

    # While a CUDA graph draws, what it works in is kept from the VAE.
    draw = drawing(sd, config, pixels, half, config.sample_batch_size) if config.uses_prior else 0
    first = max(draw, of_vae - room) if config.saves_memory else draw + of_vae
    if config.num_validation_images:
        first = max(first, drawing(sd, config, pixels, half, config.grid_batch_size))
    found = {"pictures before": (sum(there.values()), first)}

    if config.explain:  # without averages, yet or any more; of a gradient there are six at most
        gradients = 6 * max(size(p) for p in trainable(sd, config))
        looking = vae + max(part["activations"] + gradients, of_vae)
        film = text + vae + max(drawing(sd, config, pixels, half, 1), of_vae)
        found["explain"] = part["weights"], max(looking, film)

    work = max(part["step"], part["graph"] + part["pictures"])
    found["training"] = part["weights"] + part["averages"], work
    if base is not None:
        found["base model"] = base_alone(base, config, half)
    return found


def with_spare(stays: int, work: int) -> int:
    return int(stays + (1 + SPARE[0]) * work + SPARE[1])


def peak(
    sd: StableDiffusion, config, pixels: int, half: bool, base: StableDiffusion | None = None
) -> int:
    """Bytes that a run needs at most on a GPU, about; the arguments are those of `phases`."""
    return max(with_spare(*phase) for phase in phases(sd, config, pixels, half, base).values())
