"""Recording, without a GPU, by a recorder that runs what it recorded; with one: test_card.py."""

import pytest
import runs
import tiny
import torch

from minibooth.device import graphs
from minibooth.device.graphs import Captured
from minibooth.training.in_backward import UpdateInBackward
from minibooth.training.optimizer import Update

CUDA = torch.device("cuda")


class Recorder:
    """Runs nothing while it records; every replay runs all, into one and the same place."""

    def __init__(self):
        self.count = 0

    def __call__(self, function):
        self.count += 1
        with torch.no_grad():
            output = torch.full_like(function(), float("nan"))
        return output, lambda: output.copy_(function())


# ---- out of memory -----------------------------------------------------------------------------


OUT = "CUDA out of memory. Tried to allocate 2.00 GiB"
ENDED = "CUDA error: operation failed due to a previous error during capture"


def out_of_memory(function):
    """A recorder, as all three of them."""
    with torch.no_grad():
        function()
    raise torch.OutOfMemoryError(OUT)


def out_of_memory_and_no_end(function):
    try:
        out_of_memory(function)
    finally:
        raise RuntimeError(ENDED)


def no_end(function):
    raise RuntimeError(ENDED)


@pytest.mark.parametrize("record", [out_of_memory, out_of_memory_and_no_end])
def test_what_cannot_be_recorded_for_want_of_memory_runs_as_it_is(record, capsys):
    undone = []
    call = Captured(lambda x: 2 * x, record, undo=lambda: undone.append(1))
    given = [torch.tensor([float(i)]) for i in range(8)]
    assert [call(x).item() for x in given] == [2.0 * i for i in range(8)]
    assert len(undone) == 1 and call.replay is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no memory left to record a CUDA graph" in said


def test_another_error_while_recording_is_one():
    call = Captured(lambda x: 2 * x, no_end)
    with pytest.raises(RuntimeError, match="previous error"):
        for _ in range(graphs.WARM_UP + 1):
            call(torch.ones(1))


def test_out_of_memory_before_the_recording_is_one():
    def function(x):
        raise torch.OutOfMemoryError(OUT)

    with pytest.raises(torch.OutOfMemoryError):
        Captured(function, Recorder())(torch.ones(1))


# ---- the optimizer's state ---------------------------------------------------------------------


def weights():
    layouts = (torch.channels_last, torch.contiguous_format)
    shapes = ((8, 4, 3, 3), (4, 4, 1, 1))
    made = [
        tiny.randn(*shape, seed=i).to(memory_format=layout)
        for i, (shape, layout) in enumerate(zip(shapes, layouts, strict=True))
    ]
    return [torch.nn.Parameter(x) for x in [*made, tiny.randn(5)]]


@pytest.mark.parametrize("in_backward", [False, True])
def test_averages_that_are_allocated_up_front_are_those_that_the_first_update_makes(in_backward):
    def trained(allocate):
        parameters = weights()
        groups = [(1e-2, parameters)]
        update = UpdateInBackward(groups, 0.01) if in_backward else Update(groups, 0.01, 1.0, False)
        if allocate:
            update.allocate()
            places = {key: value.data_ptr() for key, value in update.state().items()}
        for step in range(1, 4):
            update.start(torch.tensor(1.0), 1.0)
            sum((p * p).sum() for p in parameters).backward()
            update.apply(step, torch.tensor(1.0), 1.0)
        if allocate:  # it is these that were updated
            assert places == {key: value.data_ptr() for key, value in update.state().items()}
        return parameters, update.state()

    (lazy, state), (early, same) = trained(False), trained(True)
    assert all(torch.equal(p, q) for p, q in zip(lazy, early, strict=True))
    assert state.keys() == same.keys()
    for key, value in state.items():
        assert torch.equal(value, same[key]) and value.stride() == same[key].stride()
        assert value.dtype == same[key].dtype


def test_allocating_again_keeps_what_is_there():
    parameters = weights()
    update = Update([(1e-2, parameters)], 0.01, 1.0, False)
    sum((p * p).sum() for p in parameters).backward()
    update.apply(1, torch.tensor(1.0), 1.0)
    before = {key: value.clone() for key, value in update.state().items()}
    update.allocate()
    assert all(torch.equal(value, before[key]) for key, value in update.state().items())


def test_a_step_that_could_not_be_recorded_leaves_no_gradient_for_the_next_one(monkeypatch):
    """As in training: while it was recorded, the backward pass left gradients in Python."""

    def trained(capture):
        parameters = weights()
        adam = Update([(1e-2, parameters)], 0.01, 1e9, False)

        def step(x):
            loss = sum((p * x).square().sum() for p in parameters)
            loss.backward()
            return adam.apply(x, loss.detach(), 1.0)

        def record(function):
            loss = sum(p.square().sum() for p in parameters)
            loss.backward()
            raise torch.OutOfMemoryError(OUT)

        call = Captured(step, record, undo=adam.forget) if capture else step
        for i in range(1, 7):
            call(torch.tensor(float(i)))
        return parameters

    for p, q in zip(trained(False), trained(True), strict=True):
        assert torch.equal(p, q)


# ---- the UNet ----------------------------------------------------------------------------------

SETTINGS = {"steps": 5, "height": 32, "width": 32, "output": "latent"}


def replaying(sd):
    recorder, made = Recorder(), []

    def capture(function):
        made.append(Captured(function, recorder))
        return made[-1]

    return graphs.replayed(sd.unet, capture), recorder, made


def test_a_graph_of_the_unet_is_recorded_once_for_every_shape():
    sd = runs.model()
    texts = [["a dog"] * 2, ["a cat"] * 2, ["sks", "the snow"], ["a dog"]]
    eager = [sd.generate(text, seed=i, **SETTINGS) for i, text in enumerate(texts)]
    context, recorder, made = replaying(sd)
    with context:
        for _ in range(2):
            drawn = [sd.generate(text, seed=i, **SETTINGS) for i, text in enumerate(texts)]
            assert all(torch.equal(a, b) for a, b in zip(drawn, eager, strict=True))
    assert recorder.count == len(made) == 2  # two pictures at once, and one
    assert all(call.replay is not None for call in made)
    assert not any("forward" in vars(module) for module in sd.unet.modules())
    assert torch.equal(sd.generate(texts[0], **SETTINGS), eager[0])


def test_the_text_is_projected_once_for_every_text_although_it_is_replayed():
    sd, calls = runs.model(), []
    to_k = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k

    class Counting(type(to_k)):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    to_k.__class__ = Counting
    context, *_ = replaying(sd)
    with context:
        for text in ("a dog", "a cat", "sks"):
            sd.generate(text, **SETTINGS)
    assert len(calls) == 3


def test_a_unet_without_memory_for_a_graph_draws_the_same():
    sd = runs.model()
    eager = [sd.generate(text, **SETTINGS) for text in ("a dog", "a cat")]
    with graphs.replayed(sd.unet, lambda function: Captured(function, out_of_memory)):
        drawn = [sd.generate(text, **SETTINGS) for text in ("a dog", "a cat")]
    assert all(torch.equal(a, b) for a, b in zip(drawn, eager, strict=True))
