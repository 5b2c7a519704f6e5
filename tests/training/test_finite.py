"""The look for what was not finite: one gradient at a time; short of memory, the cause is said."""

import pytest
import runs
import torch

from minibooth import UserError, dreambooth, train
from minibooth.dreambooth import Term
from minibooth.training import finite

OUT = "CUDA out of memory. Tried to allocate 2.00 GiB."
MODES = [{}, {"optimizer_in_backward": True}, {"gradient_accumulation_steps": 2}]


def stopped(monkeypatch, folder, error, **changes):
    """The message of a run whose loss is nan in step 2, and which meets `error` when that is done
    again."""
    step, calls = dreambooth.step, []
    accumulate = changes.get("gradient_accumulation_steps", 1)

    def failing(*arguments):
        calls.append(1)
        if len(calls) > 2 * accumulate:
            raise error
        result = step(*arguments)
        if len(calls) == 2 * accumulate:
            vars(result)["loss"] = result.loss * float("nan")
        return result

    monkeypatch.setattr(dreambooth, "step", failing)
    with pytest.raises(UserError) as stop:
        train.train(runs.config(folder, **changes), runs.model())
    return str(stop.value)


@pytest.mark.parametrize("changes", MODES)
def test_a_loss_that_cannot_be_looked_at_is_not_reported_as_out_of_memory(
    changes, monkeypatch, tmp_path
):
    message = stopped(monkeypatch, tmp_path / "out", torch.OutOfMemoryError(OUT), **changes)
    assert message.startswith("step 2: the loss or its gradient is not finite (no memory was left")
    assert "--learning_rate" in message and "\n" not in message
    assert "out of memory" not in message and "what helps" not in message


def test_an_error_of_the_second_look_itself_is_not_hidden(monkeypatch, tmp_path):
    with pytest.raises(ZeroDivisionError):
        stopped(monkeypatch, tmp_path / "out", ZeroDivisionError())


def computed(sd, seed):
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 1, 4, 8, 8, generator=generator)
    term = Term(x0, eps, torch.tensor([500]), sd.encode_prompt(["a sks dog"]))
    return dreambooth.step(sd.unet, sd.schedule, term, None)


def test_there_is_one_gradient_at_a_time_and_none_afterwards():
    sd, alive = runs.model(), []
    weights = dict(sd.unet.named_parameters())

    def count(_):
        alive.append(sum(p.grad is not None for p in weights.values()))

    for p in weights.values():
        p.register_post_accumulate_grad_hook(count)
    name = finite.first_not_finite(weights, (computed(sd, seed) for seed in range(2)))
    assert name == "the gradient of the scaled loss"
    assert alive == [1] * 2 * len(weights)
    assert all(p.grad is None for p in weights.values())
    computed(sd, 0).loss.backward()
    assert all(p.grad is not None for p in weights.values())  # nothing looks on any more


def test_of_several_bad_gradients_the_first_weight_s_is_named():
    sd = runs.model()
    weights = dict(sd.unet.named_parameters())
    names = list(weights)
    for name in (names[40], names[7]):  # the backward pass comes to the later one first
        weights[name].register_hook(lambda g: g * float("inf"))
    assert finite.first_not_finite(weights, [computed(sd, 0)]) == f"the gradient of {names[7]}"


def test_where_the_weights_or_the_loss_are_bad_no_gradient_is_computed():
    sd = runs.model()
    weights = dict(sd.unet.named_parameters())
    result = computed(sd, 0)
    vars(result)["loss"] = torch.tensor(float("nan"))  # without a graph: backward would fail
    assert finite.first_not_finite(weights, [result]) == "loss"
    weights["conv_in.bias"].data[0] = float("nan")
    assert finite.first_not_finite(weights, []) == "conv_in.bias"
