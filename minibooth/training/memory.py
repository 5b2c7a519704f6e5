"""What a run needs of memory, counted before it starts, and the modes that make it fit a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import lora
from ..common.cli import is_out_of_memory
from ..common.errors import UserError
from ..common.files import gigabytes
from ..pipeline import StableDiffusion
from ..unet import Transformer, UNet
from ..vae import ResnetBlock
from .optimizer import AdamW8bit, bitsandbytes

# ---- what is sure ------------------------------------------------------------------------------


def needed(sd: StableDiffusion, config) -> dict[str, int]:
    """Bytes that are sure to be needed: the networks' weights, in fp32; of what trains, the weights
    alone, the gradients and AdamW's two averages."""
    trained = trainable(sd, config)
    weights = sum(size_of(network) for network in sd.networks.values())
    averages = 2 * sum(size(p) for p in trained)
    if config.use_8bit_adam:
        averages = sum(eight_bit(p) for p in trained)
    trained = sum(size(p) for p in trained)
    if config.method != "dreambooth":
        weights += trained  # beside the weights that stay
    gradients = 0 if config.optimizer_in_backward else trained
    return {"weights": weights, "trained": trained, "gradients": gradients, "averages": averages}


def trained_networks(sd: StableDiffusion, config) -> list[nn.Module]:
    """Which train, or through which the gradient of what trains goes."""
    return [sd.unet, sd.text_encoder] if config.text_changes else [sd.unet]


def trainable(sd: StableDiffusion, config) -> list[Tensor]:
    """The weights that train, or for adapters, which are not there yet, their shapes."""
    networks = trained_networks(sd, config)
    if config.trains_word:
        width = sd.text_encoder.final_layer_norm.weight.shape[0]
        return [torch.empty(config.num_vectors, width, device="meta")]
    if config.method == "lora":
        shapes = [s for n in networks for s in lora.shapes(n, config.rank, config.lora_targets)]
        return [torch.empty(shape, device="meta") for shape in shapes]
    return [p for network in networks for p in network.parameters()]


def size(p: Tensor) -> int:
    return 4 * p.numel()


def size_of(network: nn.Module) -> int:
    return sum(size(p) for p in network.parameters())


def eight_bit(p: Tensor) -> int:
    """Bytes of the averages that AdamW8bit keeps of it."""
    state = AdamW8bit.fresh_state(torch.empty_like(p, device="meta"))
    return sum(x.nbytes for name, x in state.items() if name != "step")


def available(device: torch.device) -> int | None:
    """Bytes free on the device; None where that cannot be told."""
    if device.type == "cuda":  # what PyTorch keeps of an earlier run is free, too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "cpu" and Path("/proc/meminfo").exists():
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def room(sd: StableDiffusion, device: torch.device) -> int | None:
    """Bytes on the device that a run can fill: those free, and those of a model that was given
    there, whose place the run takes; None where that cannot be told."""
    free, place = available(device), (device.type, device.index or 0)
    if free is None or device.type == "cpu":  # where the weights as they came are kept
        return free
    parameters = (p for network in sd.networks.values() for p in network.parameters())
    return free + sum(p.nbytes for p in parameters if (p.device.type, p.device.index or 0) == place)


def require(sd: StableDiffusion, config, device: torch.device) -> None:
    """Raise UserError if not even weights, gradients and optimizer fit."""
    need, free = needed(sd, config), room(sd, device)
    total = need["weights"] + need["gradients"] + need["averages"]
    if device.type == "cpu":  # the weights are there, but those that train are copied
        total -= need["weights"] - need["trained"]
    if free is not None and total > free:
        raise UserError(f"{advice(sd, config)}; {gigabytes(free)} are free")


@contextmanager
def advised(sd: StableDiffusion, config) -> Iterator[None]:
    """Within it, running out of memory is a UserError that says which settings help."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError(advice(sd, config)) from error
        raise


def advice(sd: StableDiffusion, config) -> str:
    """Which settings lower the memory that is needed, and by about how much."""
    need, helps = needed(sd, config), []
    total = need["weights"] + need["gradients"] + need["averages"]
    if config.sample_batch_size > 1:
        helps.append("--sample_batch_size 1 (if it ran out while drawing class images)")
    if config.train_batch_size > 1:
        share = 1 - 1 / config.train_batch_size
        helps.append(f"--train_batch_size 1 (about -{share:.0%} of the activations)")
    # Counted: what the UNet of SD 1.5 keeps for its backward pass at 512² and 256².
    if not config.gradient_checkpointing:
        helps.append("--gradient_checkpointing (about -85 % of the activations)")
    if not config.use_8bit_adam:
        saved = need["averages"] - needed(sd, replace(config, use_8bit_adam=True))["averages"]
        helps.append(f"--use_8bit_adam (-{gigabytes(saved)}; wants bitsandbytes: {INSTALL})")
    if not config.optimizer_in_backward:
        helps.append(f"--optimizer_in_backward (-{gigabytes(need['gradients'])}, no clipping)")
    helps.append("a smaller --resolution (half of it: about -75 % of the activations)")
    if config.train_text_encoder:
        alone = needed(sd, replace(config, train_text_encoder=False))
        saved = sum(need[key] - alone[key] for key in ("gradients", "averages"))
        helps.append(f"no --train_text_encoder (-{gigabytes(saved)})")
    return (
        f"out of memory. Weights, gradients and optimizer alone need {gigabytes(total)}; "
        f"what helps: {'; '.join(helps)}"
    )


# ---- what is likely, and what to do about it ---------------------------------------------------

# What can be switched on, in the order in which it is tried: what changes no weight comes first.
MODES = (
    (),
    ("gradient_checkpointing",),
    ("use_8bit_adam",),
    ("use_8bit_adam", "gradient_checkpointing"),
    ("optimizer_in_backward", "gradient_checkpointing"),
    ("use_8bit_adam", "optimizer_in_backward", "gradient_checkpointing"),
)
INSTALL = 'pip install -e ".[low-memory]"'
LOSSY = ("use_8bit_adam", "optimizer_in_backward")  # rounded averages; gradients are not clipped

# Bytes per latent pixel, counted over SD 1.5's networks at 512². The UNet's are for one sample,
# where it computes in 16 bits and in fp32.
KEPT = {True: (299_000, 35_000), False: (457_000, 41_000)}  # for backward: in full, checkpointed
PREDICTING = {True: 17_300, False: 32_000}  # without a backward pass
DECODING = 197_000  # in the VAE, which computes in fp32 and takes one picture of this size at once
SPARE = 0.1, 0.5e9  # of what is worked in, and bytes: for libraries and fragments


def parts(sd: StableDiffusion, config, pixels: int, half: bool) -> dict[str, int]:
    """Bytes that training needs on a GPU, about, by what they are for. Not all at a time: see peak.
    `pixels` of the latents; whether the networks compute in 16 bits."""
    need, samples = needed(sd, config), config.train_batch_size * (1 + config.uses_prior)
    short = config.gradient_checkpointing
    copies, frozen = need["trained"] // 2 * (half and not short), 0
    if config.method != "dreambooth":
        frozen = sum(size_of(n) for n in trained_networks(sd, config)) // (2 if half else 1)
    drawing = 0
    if config.num_validation_images:  # as Grids.draw does it: the UNet, then the VAE
        text = 0 if config.text_changes else size_of(sd.text_encoder)
        guided = 2 * config.grid_batch_size
        predicting = text + copies + guided * pixels * PREDICTING[half]
        drawing = max(predicting, size_of(sd.vae) + pixels * DECODING)
    return {
        "weights": need["trained"] + frozen,
        "gradients": need["gradients"],
        "averages": need["averages"],
        "activations": samples * pixels * KEPT[half][short] + copies,
        "pictures": drawing,
    }


def peak(sd: StableDiffusion, config, pixels: int, half: bool) -> int:
    """Bytes that training needs at most on a GPU, about; the arguments are those of `parts`.
    --explain, which looks before there are averages and when they are gone, needs less."""
    part = parts(sd, config, pixels, half)
    # While the backward pass adds gradients, it gives back what was kept for them.
    step, drawing = max(part["activations"], part["gradients"]), part["pictures"]
    # What a CUDA graph of the step works in is its own, also while pictures are drawn. Without one
    # they take turns.
    work = max(step, drawing) if config.use_8bit_adam else step + drawing
    return int(part["weights"] + part["averages"] + (1 + SPARE[0]) * work + SPARE[1])


def fit(
    sd: StableDiffusion, config, pixels: int, precision: str, device: torch.device, resumed: bool
) -> tuple:
    """The settings with the first of MODES that fits into the free memory, and a line that says so.

    What is on stays on. A run that is resumed gets nothing that changes its results.
    """
    free, half = room(sd, device), precision != "no"
    for mode in MODES:
        if possible(mode, config, precision, resumed) and installed(mode, device):
            fitted = replace(config, **dict.fromkeys(mode, True))
            need = peak(sd, fitted, pixels, half)
            if need <= free:
                break
    plain = peak(sd, config, pixels, half)
    line = f"memory: {gigabytes(free)} are free, about {gigabytes(plain)} needed"
    added = [f"--{name}" for name in MODES[-1] if getattr(fitted, name) > getattr(config, name)]
    if added:
        line += f"; switched on {' '.join(added)}, which needs about {gigabytes(need)}"
    if need <= free:
        return fitted, line
    line += ": this may not be enough"
    if precision == "fp16" and config.method == "dreambooth":  # its gradients cannot be dropped
        line += "; what such a card can train is --method lora"
    for mode in MODES:
        if possible(mode, config, precision, resumed) and not installed(mode, device):
            other = replace(config, **dict.fromkeys(mode, True))
            if peak(sd, other, pixels, half) <= free:
                exact = replace(other, use_8bit_adam=False)
                saved = needed(sd, exact)["averages"] - needed(sd, other)["averages"]
                line += f"; {INSTALL} would make it fit: --use_8bit_adam saves {gigabytes(saved)}"
                break
    return fitted, line


def possible(mode: tuple[str, ...], config, precision: str, resumed: bool) -> bool:
    if resumed and any(name in LOSSY for name in mode):
        return False
    once = config.gradient_accumulation_steps == 1 and precision != "fp16"
    return once or "optimizer_in_backward" not in mode


def installed(mode: tuple[str, ...], device: torch.device) -> bool:
    """Whether bitsandbytes is there, for a mode that wants it."""
    if "use_8bit_adam" in mode:
        try:
            bitsandbytes(device)
        except UserError:
            return False
    return True


# ---- what saves it ------------------------------------------------------------------------------


@contextmanager
def checkpoint_gradients(unet: UNet, wanted: bool = True) -> Iterator[None]:
    """Within it, only what enters each resnet and transformer is kept; the backward pass computes
    the rest again. Same values, less memory, a third more to compute."""
    blocks = [m for m in unet.modules() if isinstance(m, ResnetBlock | Transformer)] * wanted
    for block in blocks:
        # No dropout anywhere, so there is no random state to keep.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own shows again


@contextmanager
def visiting(networks: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Networks that training does not need: on the device only while this lasts."""
    for network in networks:
        network.to(device)
    try:
        yield
    finally:
        for network in networks:
            network.to("cpu")


@contextmanager
def each_gradient(
    parameters: dict[str, nn.Parameter], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Within it, a backward pass gives each gradient to `take` and does not keep it."""

    def hook(name: str, p: nn.Parameter):
        @torch.no_grad()
        def call(p: nn.Parameter) -> None:
            gradient, p.grad = p.grad, None
            take(name, gradient)

        return p.register_post_accumulate_grad_hook(call)

    hooks = [hook(name, p) for name, p in parameters.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
