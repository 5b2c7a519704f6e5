"""CUDA graphs: a training step or a UNet launched at once and not kernel by kernel."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from ..common.cli import is_out_of_memory
from ..unet import UNet

Recorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
WARM_UP = 3  # calls before the recording: libraries choose and set up what they will use


def record_graph(
    function: Callable[[], Tensor], stream: torch.cuda.Stream
) -> tuple[Tensor, Callable[[], None]]:
    """Record what `function` launches, without running it: where its output will be, and replay."""
    graph = torch.cuda.CUDAGraph()
    # The outer context: a recording that fails may not find its way back to the stream before.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, stream=stream),
    ):
        output = function()
    return output, graph.replay


class Captured:
    """A function of tensors as one CUDA graph: launched at once and not kernel by kernel.

    The function must take tensors of the same shapes each time, return one, never wait for the
    device, and do the same whatever the values. A graph reads and writes fixed places in memory,
    so inputs are copied into buffers that stay, and the output is copied out.

    The first calls run the function as it is, on the stream that will record, as CUDA asks for.
    They are calls like the others: no training step is done twice. Then it is recorded, then
    replayed. A graph keeps the memory it works in to itself. Where that does not fit, the function
    runs as it is from then on, after `undo` has dropped what the recording left behind in Python.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        record: Recorder,
        stream: torch.cuda.Stream | None = None,
        undo: Callable[[], None] = lambda: None,
    ):
        self.function, self.record, self.stream, self.undo = function, record, stream, undo
        self.buffers: list[Tensor] = []
        self.calls, self.replay, self.given_up = 0, None, False

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.given_up:
            return self.function(*inputs)
        if not self.buffers:
            self.buffers = [x.clone() for x in inputs]
        for buffer, x in zip(self.buffers, inputs, strict=True):
            buffer.copy_(x)
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.warm_up()
        if self.replay is None:
            self.try_to_record()
        if self.given_up:
            return self.function(*inputs)
        self.replay()
        return self.output.clone()

    def warm_up(self) -> Tensor:
        if self.stream is None:
            return self.function(*self.buffers)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.function(*self.buffers)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output

    def try_to_record(self) -> None:
        try:
            self.output, self.replay = self.record(lambda: self.function(*self.buffers))
            return
        except Exception as error:
            # Ending a recording that ran out of memory fails, too, and with another message.
            if not any(is_out_of_memory(e) for e in causes(error)):
                raise
        # Only now, without the error, is nothing left that holds on to the recording's tensors.
        self.given_up, self.buffers = True, []
        self.undo()
        torch.cuda.empty_cache()
        tqdm.write("no memory left to record a CUDA graph: going on without, a little slower")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what was being handled when it was raised, and so on."""
    while error is not None:
        yield error
        error = error.__context__


def captured(
    function: Callable[..., Tensor], device: torch.device, undo: Callable[[], None] = lambda: None
) -> Callable[..., Tensor]:
    """The function as a CUDA graph; on another device itself. `undo`: see Captured."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream()
    return Captured(function, partial(record_graph, stream=stream), stream, undo)


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
            call = captured(lambda x, t: forward(x, t, context), x.device)
            last[:] = context, x.shape, call
        return last[2](x, t)

    unet.forward = replayed
    try:
        yield
    finally:
        del unet.forward
