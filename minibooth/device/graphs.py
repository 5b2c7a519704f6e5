"""CUDA graphs: a training step or a UNet launched at once and not kernel by kernel."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from ..common.cli import is_out_of_memory
from ..common.forwards import replaced
from ..common.trees import each
from ..pipeline import text_projections
from ..text_encoder import Condition
from ..unet import UNet
from . import ranks

Recorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
WARM_UP = 3  # calls before the recording: libraries choose and set up what they will use


def record_graph(
    function: Callable[[], Tensor], stream: torch.cuda.Stream, pool: tuple | None = None
) -> tuple[Tensor, Callable[[], None]]:
    """Record what `function` launches, without running it: where its output will be, and replay.

    Graphs that share a `pool` work in the same memory: only one of them may run at a time.
    """
    graph = torch.cuda.CUDAGraph()
    # The outer context: a recording that fails may not find its way back to the stream before.
    with (
        torch.cuda.stream(torch.cuda.current_stream(stream.device)),
        torch.cuda.graph(graph, stream=stream, pool=pool),
    ):
        output = function()
    return output, graph.replay


class Captured:
    """A function of tensors as one CUDA graph: launched at once and not kernel by kernel.

    The function must take tensors, or batches of them, of the same shapes each time, return one,
    never wait for the device, and do the same whatever the values. A graph reads and writes fixed
    places in memory, so inputs are copied into buffers that stay, and the output is copied out.

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
        self.buffers: tuple = ()
        self.calls, self.replay, self.given_up = 0, None, False

    def __call__(self, *inputs) -> Tensor:
        if self.given_up:
            return self.function(*inputs)
        if not self.buffers:
            self.buffers = tuple(each(Tensor.clone, x) for x in inputs)
        for buffer, x in zip(self.buffers, inputs, strict=True):
            each(Tensor.copy_, buffer, x)
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
        caller = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            output = self.function(*self.buffers)
        caller.wait_stream(self.stream)
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
        self.given_up, self.buffers = True, ()
        self.undo()
        with suppress(RuntimeError):  # PyTorch may still take the recording for unfinished
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
    if not capturable(device):
        return function
    stream = torch.cuda.Stream(device)
    return Captured(function, partial(record_graph, stream=stream), stream, undo)


def capturable(device: torch.device) -> bool:
    """Of a GPU. With several ranks NCCL's own thread asks it about its work in the meantime, which
    a recording does not survive."""
    return device.type == "cuda" and ranks.count() == 1


@contextmanager
def captured_unet(unet: UNet, wanted: bool = True) -> Iterator[None]:
    """Within it, sampling on a GPU replays a CUDA graph of the UNet, if `wanted`. Elsewhere nothing
    changes."""
    device = unet.conv_in.weight.device
    if not wanted or not capturable(device):
        yield
        return
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    record = partial(record_graph, stream=stream, pool=pool)
    with replayed(unet, lambda function: Captured(function, record, stream)):
        yield


@dataclass
class Recording:
    """A UNet for inputs of one shape."""

    call: Callable[[Tensor, Tensor], Tensor]  # of x and t
    place: Condition  # where the graph reads the text
    context: Tensor | Condition | None = None  # which text is there, and in its keys and values
    projected: list[Tensor] = field(default_factory=list)  # these, at fixed places as well


@contextmanager
def replayed(unet: UNet, capture: Callable[[Callable[..., Tensor]], Captured]) -> Iterator[None]:
    """Within it, one recording of the UNet for every shape of its inputs, made by `capture`.

    The text's keys and values are no part of it: they are projected when a tensor is given as the
    text that was not given before, and copied to where the recording reads them; and the text
    itself, which adapters read. So neither text nor weights may be written to in the meantime.
    """
    forward, projections = unet.forward, text_projections(unet)
    project = [p.forward for p in projections]
    recordings: dict[tuple, Recording] = {}
    now: Recording | None = None  # the one that is being called

    def call(x: Tensor, t: Tensor, context: Tensor | Condition) -> Tensor:
        nonlocal now
        c = context if isinstance(context, Condition) else Condition(context)
        shape = x.shape, c.context.shape
        if shape not in recordings:
            place = each(Tensor.clone, c)
            recordings[shape] = Recording(capture(lambda x, t: forward(x, t, place)), place)
        now = recordings[shape]
        if now.context is not context:
            each(Tensor.copy_, now.place, c)
            fresh = [one(c.context) for one in project]
            for kept, values in zip(now.projected or fresh, fresh, strict=True):
                kept.copy_(values)
            now.context, now.projected = context, now.projected or fresh
        return now.call(x, t)

    reading = [lambda context, i=i: now.projected[i] for i in range(len(projections))]
    with replaced(projections, reading), replaced([unet], [call]):
        yield
