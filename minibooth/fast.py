"""Speed and memory, around the training step and never inside it."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .unet import Transformer, UNet
from .vae import ResnetBlock


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


def keep_freed_memory() -> None:
    """Have the C library keep memory that is freed, for the next step's tensors.

    glibc returns large blocks to the system at once, and the next step pays for every page of them
    anew. Blocks of up to 32 MB, the most that can be asked for, now stay, 256 MB of them at most.
    Does nothing where there is no glibc.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 256 * 2**20)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself. Where it does not, bf16 is slower than fp32."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


# ---- CUDA graphs -------------------------------------------------------------------------------

Recorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
WARM_UP = 3  # calls before the recording: libraries choose and set up what they will use


def record_graph(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Record what `function` launches, without running it: where its output will be, and replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return output, graph.replay


class Captured:
    """A function of tensors as one CUDA graph: launched at once and not kernel by kernel.

    The function must take tensors of the same shapes each time, return one, never wait for the
    device, and do the same whatever the values. A graph reads and writes fixed places in memory,
    so inputs are copied into buffers that stay, and the output is copied out.

    The first calls run the function as it is, on a stream of their own as CUDA asks for. They are
    calls like the others: no training step is done twice. Then it is recorded, then replayed.
    """

    def __init__(self, function: Callable[..., Tensor], record: Recorder = record_graph):
        self.function, self.record = function, record
        self.buffers: list[Tensor] = []
        self.calls, self.replay = 0, None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not self.buffers:
            self.buffers = [x.clone() for x in inputs]
        for buffer, x in zip(self.buffers, inputs, strict=True):
            buffer.copy_(x)
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.on_another_stream()
        if self.replay is None:
            self.output, self.replay = self.record(lambda: self.function(*self.buffers))
        self.replay()
        return self.output.clone()

    def on_another_stream(self) -> Tensor:
        if self.buffers[0].device.type != "cuda":
            return self.function(*self.buffers)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = self.function(*self.buffers)
        torch.cuda.current_stream().wait_stream(stream)
        return output


def captured(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """The function as a CUDA graph; on another device itself."""
    return Captured(function) if device.type == "cuda" else function


@contextmanager
def captured_unet(unet: UNet) -> Iterator[None]:
    """Within it, sampling on a GPU replays a CUDA graph of the UNet, one for each text.

    The text is part of the graph: its keys and values are projected once, before the recording.
    On another device nothing changes.
    """
    if unet.conv_in.weight.device.type != "cuda":
        yield
        return
    forward, last = unet.forward, [None, None, None]

    def replayed(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        if last[0] is not context or last[1] != x.shape:
            last[:] = context, x.shape, Captured(lambda x, t: forward(x, t, context))
        return last[2](x, t)

    unet.forward = replayed
    try:
        yield
    finally:
        del unet.forward


# ---- memory ------------------------------------------------------------------------------------


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
