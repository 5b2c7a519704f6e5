"""How much memory there is, the modes that make a run fit it, and what they do."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..common.cli import is_out_of_memory
from ..common.errors import UserError
from ..common.files import gigabytes
from ..pipeline import StableDiffusion
from ..unet import Transformer, UNet
from ..vae import ResnetBlock
from . import ranks
from .optimizer import bitsandbytes
from .plan import ACTIVATIONS, needed, peak

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


# ---- what there is -----------------------------------------------------------------------------


def available(device: torch.device) -> int | None:
    """Bytes free on the device; None where that cannot be told."""
    if device.type == "cuda":  # what PyTorch keeps of an earlier run is free, too
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        own = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return min(free, own - held) + held - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and Path("/proc/meminfo").exists():
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def keep_to_what_is_free(device: torch.device) -> None:
    """On Windows, have this process run out of the card's memory where that ends.

    The driver there goes on in the host's memory, at a hundredth of the speed and without a word,
    so that neither the plan is kept nor the advice given. Does nothing elsewhere.
    """
    if sys.platform == "win32" and device.type == "cuda":
        # A device without an index is the current one; set_per_process_memory_fraction wants it.
        index = torch.cuda.current_device() if device.index is None else device.index
        free, total = torch.cuda.mem_get_info(index)
        share = (free + torch.cuda.memory_reserved(index)) / total
        set_before = torch.cuda.get_per_process_memory_fraction(index)
        torch.cuda.set_per_process_memory_fraction(min(share, set_before), index)


def room(sd: StableDiffusion, device: torch.device) -> int | None:
    """Bytes on the device that a run can fill: those free, and those of a model that was given
    there, whose place the run takes; None where that cannot be told."""
    free, place = available(device), (device.type, device.index or 0)
    if free is None or device.type == "cpu":  # where the weights as they came are kept
        return free
    parameters = (p for network in sd.networks.values() for p in network.parameters())
    return free + sum(p.nbytes for p in parameters if (p.device.type, p.device.index or 0) == place)


def require(sd: StableDiffusion, config, device: torch.device, half: bool) -> None:
    """Raise UserError if not even weights, gradients and optimizer fit."""
    need, free = needed(sd, config, half), room(sd, device)
    # On a CPU the weights are there, but those that train are copied.
    weights = need["trained" if device.type == "cpu" else "weights"]
    if free is not None and weights + need["gradients"] + need["averages"] > free:
        raise UserError(f"{advice(sd, config, half)}; {gigabytes(free)} are free")


@contextmanager
def advised(sd: StableDiffusion, config, half: bool = False) -> Iterator[None]:
    """Within it, running out of memory is a UserError that says which settings help."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError(advice(sd, config, half)) from error
        raise


def advice(sd: StableDiffusion, config, half: bool = False) -> str:
    """Which settings lower the memory that is needed, and by about how much."""
    need, helps = needed(sd, config, half), []
    total = need["weights"] + need["gradients"] + need["averages"]
    if config.sample_batch_size > 1:
        helps.append("--sample_batch_size 1 (if it ran out while drawing class images)")
    if config.train_batch_size > 1:
        share = 1 - 1 / config.train_batch_size
        helps.append(f"--train_batch_size 1 (about -{share:.0%} of the activations)")
    if not config.gradient_checkpointing:
        full, short = ACTIVATIONS[config.method][half]
        share = 1 - short / full
        helps.append(f"--gradient_checkpointing (about -{share:.0%} of the activations)")
    saved = need["averages"] - needed(sd, replace(config, use_8bit_adam=True))["averages"]
    if saved > total / 100:  # of adapters there is hardly anything to save
        helps.append(f"--use_8bit_adam (-{gigabytes(saved)}; wants bitsandbytes: {INSTALL})")
    if need["gradients"] > total / 100:
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


# ---- what is chosen ----------------------------------------------------------------------------


def fit(
    sd: StableDiffusion, config, pixels: int, precision: str, device: torch.device, resumed: bool
) -> tuple:
    """The settings with the first of MODES that fits into the free memory, and a line that says so.

    What is on stays on. A run that is resumed gets nothing that changes its results.
    """
    free, half = min(ranks.together([room(sd, device)])), precision != "no"
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
    once = config.gradient_accumulation_steps == ranks.count() == 1 and precision != "fp16"
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
