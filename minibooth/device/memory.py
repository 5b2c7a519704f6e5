"""How much memory a device has free, and what saves some of it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..pipeline import StableDiffusion
from ..unet import Transformer, UNet
from ..vae import ResnetBlock

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


# ---- what saves it ------------------------------------------------------------------------------


@contextmanager
def checkpoint_gradients(unet: UNet, wanted: bool = True) -> Iterator[None]:
    """Within it, only what enters each resnet and transformer is kept; the backward pass computes
    the rest again. Same values, less memory, a third more to compute."""
    blocks = [part for m in unet.modules() for part in computed_again(m)] * wanted
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


def computed_again(module: nn.Module) -> list[nn.Module]:
    """The parts of a UNet's module that are each computed again as one: of a transformer of many
    blocks each block, lest all be there at once, and the norm, whose input is there already."""
    if isinstance(module, Transformer) and len(module.transformer_blocks) > 1:
        return [module.norm, *module.transformer_blocks]
    return [module] if isinstance(module, ResnetBlock | Transformer) else []


@contextmanager
def visiting(networks: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Within it the networks are on the device; afterwards on the CPU."""
    for network in networks:
        network.to(device)
    try:
        yield
    finally:
        for network in networks:
            network.to("cpu")


@contextmanager
def away(network: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within it the network is on the CPU; afterwards where it was."""
    device = next(network.parameters()).device
    network.to("cpu" if wanted else device)
    try:
        yield
    finally:
        network.to(device)


@contextmanager
def by_turns(sd: StableDiffusion, wanted: bool) -> Iterator[None]:
    """Within it, the UNet is away whenever latents are decoded."""
    decode = sd.decode

    def alone(latents: Tensor) -> Tensor:
        with away(sd.unet):
            return decode(latents)

    if wanted:
        sd.decode = alone
    try:
        yield
    finally:
        vars(sd).pop("decode", None)  # the class's own shows again


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
