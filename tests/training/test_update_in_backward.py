"""8-bit AdamW with the optimizer in the backward pass: one weight at a time, one wait per step."""

import sys

import eight_bit_stand_in
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minibooth.training.eight_bit import AdamW8bit
from minibooth.training.in_backward import UpdateInBackward

SHAPES = [(32, 16, 3, 3), (70, 100), (10,), (64, 64)]
RATES = (2**-7, 2**-9)  # of the first two weights and of the others
ONE = torch.tensor(1.0)


@pytest.fixture(params=["stand-in", "bitsandbytes"])
def functional(request, monkeypatch):
    if request.param == "bitsandbytes":
        return pytest.importorskip(
            "bitsandbytes", reason="bitsandbytes is not installed"
        ).functional
    monkeypatch.setitem(sys.modules, "bitsandbytes", eight_bit_stand_in.MODULE)
    return eight_bit_stand_in.Functional


def randn(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights():
    return [torch.nn.Parameter(randn(shape, i)) for i, shape in enumerate(SHAPES)]


def groups(parameters):
    return [(RATES[0], parameters[:2]), (RATES[1], parameters[2:])]


def backward(parameters, step):
    gradients = [randn(p.shape, 100 * step + i) for i, p in enumerate(parameters)]
    sum((p * g).sum() for p, g in zip(parameters, gradients, strict=True)).backward()


def trained(steps, spoil=()):
    """`spoil`: gradients, as (step, weight), that are not finite."""
    parameters = weights()
    update = UpdateInBackward(groups(parameters), 0.01, use_8bit_adam=True)
    for step in range(1, steps + 1):
        update.start(ONE, step / steps)
        hooks = [
            parameters[i].register_hook(lambda g: g * float("nan")) for n, i in spoil if n == step
        ]
        backward(parameters, step)
        for hook in hooks:
            hook.remove()
        update.apply(step, ONE, step / steps)
    return parameters, update


def one_pass_per_gradient(steps):
    """The same with a step over all weights whenever one has its gradient."""
    parameters = weights()
    settings = [{"params": part, "lr": torch.tensor(0.0)} for _, part in groups(parameters)]
    adam = AdamW8bit(settings, 0.01)
    for p in parameters:

        def apply(p):
            adam.step()
            p.grad = None

        p.register_post_accumulate_grad_hook(apply)
    for step in range(1, steps + 1):
        for group, rate in zip(adam.param_groups, RATES, strict=True):
            group["lr"].fill_(rate * (step / steps))
        backward(parameters, step)
    return parameters, adam


def test_the_bits_are_those_of_a_pass_over_all_weights_for_each_gradient(functional):
    (ours, update), (theirs, adam) = trained(4), one_pass_per_gradient(4)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        for key, value in adam.state[q].items():
            assert torch.equal(update.adam.state[p][key], value)


class Reads(TorchDispatchMode):
    """Scalars that are read from tensors."""

    count = 0

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


def test_each_weight_is_updated_by_itself_and_the_scalars_are_read_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", eight_bit_stand_in.MODULE)
    fetched, updated = [], []
    tolist, update_one = torch.Tensor.tolist, AdamW8bit.update
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: fetched.append(1) or tolist(x))
    monkeypatch.setattr(
        AdamW8bit, "update", lambda self, p, *_: updated.append(p.shape) or update_one(self, p, *_)
    )
    parameters = weights()
    update = UpdateInBackward(groups(parameters), 0.01, use_8bit_adam=True)
    with Reads() as reads:
        for step in (1, 2):
            update.start(ONE, 1.0)
            backward(parameters, step)
            update.apply(step, ONE, 1.0)
    assert sorted(updated) == sorted(2 * [torch.Size(shape) for shape in SHAPES])
    assert reads.count <= len(updated)  # the number of its updates, which stands on the CPU
    assert len(fetched) == 2  # once per step


def test_a_gradient_that_is_not_finite_spoils_no_weight_and_ends_the_updates(functional):
    parameters, update = trained(2, spoil=[(2, 1)])
    assert update.bad_step == 2
    assert all(p.isfinite().all() for p in parameters)
    before = [p.detach().clone() for p in parameters]
    update.start(ONE, 1.0)
    backward(parameters, 3)
    update.apply(3, ONE, 1.0)
    assert update.bad_step == 2
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    assert all(p.grad is None for p in parameters)


def test_a_loss_that_is_not_finite_updates_nothing(functional):
    parameters, update = trained(1)
    before = [p.detach().clone() for p in parameters]
    update.start(torch.tensor(float("nan")), 1.0)
    backward(parameters, 2)
    update.apply(2, ONE, 1.0)
    assert update.bad_step == 2
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
