"""CUDA graphs: a training step or a UNet launched at once and not kernel by kernel."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..unet import UNet

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
