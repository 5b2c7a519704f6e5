"""More evidence in Triton's interpreter: random cases, programs in other orders, real shapes.

    TRITON_INTERPRET=1 pytest -m "slow or not slow" tests/kernels/kernels_evidence.py

test_kernels.py runs it in a process of its own, because Triton reads the variable at import.
"""

import itertools
import random

import pytest
import torch
import triton.runtime.interpreter as interpreter
from kernels_interpreted import (
    FP16,
    FP32,
    attention_case,
    check_attention,
    check_group_norm,
    group_norm_case,
    relative_error,
    value_and_gradients,
)
from minibooth_kernels import attention as at
from minibooth_kernels import group_norm as gn


def seeds(few, many):
    """The first `few` always, all `many` with the slow tests."""
    slow = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(few, many)]
    return [*range(few), *slow]


def shuffle_programs(monkeypatch, seed):
    """From now on programs run in a random order. Nothing may depend on it: a GPU has none.

    Returns the last launch's order, place by place."""
    orders, plain = {}, interpreter.InterpreterBuilder.set_grid_idx
    dice = random.Random(seed)

    def elsewhere(self, x, y, z):
        if (x, y, z) == (0, 0, 0):  # a launch begins
            places = list(itertools.product(*(range(n) for n in self.grid_dim)))
            orders.clear()
            orders.update(zip(places, dice.sample(places, len(places)), strict=True))
        plain(self, *orders[x, y, z])

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", elsewhere)
    return orders


@pytest.mark.parametrize("seed", seeds(1, 2))
@pytest.mark.parametrize("N_k", [77, 150])
def test_attention_gives_the_same_bits_in_every_order_of_its_programs(N_k, seed, monkeypatch):
    inputs, upstream = attention_case(2, 2, 150, N_k, 40, FP16)
    expected = value_and_gradients(at.attention, inputs, upstream)
    orders = shuffle_programs(monkeypatch, seed)
    for a, b in zip(value_and_gradients(at.attention, inputs, upstream), expected, strict=True):
        assert torch.equal(a, b)
    assert list(orders) != list(orders.values())  # it was another order


@pytest.mark.parametrize("seed", seeds(1, 2))
@pytest.mark.parametrize("size, groups", [(8, 16), (40, 2)], ids=["one pass", "large"])
def test_group_norm_gives_the_same_bits_in_every_order_of_its_programs(
    size, groups, seed, monkeypatch
):
    monkeypatch.setattr(gn.tiles, "PROGRAMS", 10**9)  # many partial results
    inputs, upstream = group_norm_case((2, 64, size, size), FP16, torch.channels_last)

    def norm(x, weight, bias):
        return gn.group_norm(x, groups, weight, bias, 1e-5, silu=True)

    expected = value_and_gradients(norm, inputs, upstream)
    orders = shuffle_programs(monkeypatch, seed)
    for a, b in zip(value_and_gradients(norm, inputs, upstream), expected, strict=True):
        assert torch.equal(a, b)
    assert list(orders) != list(orders.values())


# ---- random cases ------------------------------------------------------------------------------


def odd_view(x, dice):
    """The same values elsewhere in memory: off 16 bytes, transposed, or between other numbers."""
    kind = dice.choice(["as it is", "shifted", "transposed", "every second", "contiguous"])
    if kind == "shifted":
        flat = torch.cat([x.new_zeros(1), x.reshape(-1)])
        return flat[1:].view(x.shape)
    if kind == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "every second":
        return x.repeat_interleave(2, dim=2)[:, :, ::2]
    return x.contiguous() if kind == "contiguous" else x


@pytest.mark.parametrize("seed", seeds(8, 24))
def test_attention_of_random_sizes_in_random_places(seed):
    dice = random.Random(seed)
    N_q, N_k = (dice.choice([1, 2, 7, 33, 64, 65, 77, 100]) for _ in range(2))
    d = 8 * dice.randint(1, 12)
    dtype = dice.choice([FP16, FP32])
    (q, k, v), upstream = attention_case(dice.randint(1, 2), dice.randint(1, 3), N_q, N_k, d, dtype)
    q, k, v = (odd_view(x, dice) for x in (q, k, v))
    if dice.random() < 0.2:
        k, v = (x[:1].expand(q.shape[0], -1, -1, -1) for x in (k, v))  # a stride of 0
    if N_k > 1:
        return check_attention((q, k, v), upstream)
    # The one key has all the attention, whatever it is: q and k have no gradient.
    y, dq, dk, dv = value_and_gradients(at.attention, (q, k, v), upstream)
    torch.testing.assert_close(y, v.expand(y.shape))
    assert dq.abs().max() < 1e-2 and dk.abs().max() < 1e-2
    assert relative_error(dv, upstream.double().sum(2, keepdim=True)) < 1e-2


@pytest.mark.parametrize("seed", seeds(8, 24))
def test_group_norm_of_random_sizes_in_both_layouts(seed):
    dice = random.Random(seed)
    groups = dice.choice([1, 2, 3, 8])
    shape = (dice.randint(1, 3), groups * dice.choice([1, 2, 5, 10]))
    shape += (dice.randint(1, 40), dice.randint(1, 40))
    if shape[1] // groups * shape[2] * shape[3] == 1:
        pytest.skip("a group of one number has no variance")
    layout = dice.choice([torch.channels_last, torch.contiguous_format])
    inputs, upstream = group_norm_case(shape, dice.choice([FP16, FP32]), layout)
    x = inputs[0]
    if dice.random() < 0.3:  # not at 16 bytes
        x = torch.cat([x.new_zeros(1), x.contiguous().flatten()])[1:].view(x.shape)
    if dice.random() < 0.2:  # in neither layout: copied
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    outs = value_and_gradients(
        lambda *a: gn.group_norm(a[0], groups, *a[1:], 1e-5, silu=True),
        [x, *inputs[1:]],
        upstream,
    )
    expected = value_and_gradients(
        lambda *a: gn.reference(a[0], groups, *a[1:], 1e-5, silu=True),
        [y.double() for y in (x, *inputs[1:])],
        upstream,
    )
    for out, true in zip(outs, expected, strict=True):
        assert relative_error(out, true) < (2e-3 if x.dtype == FP16 else 2e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("N_k", [77, 150])
def test_what_is_not_finite_in_a_query_stays_in_its_row(bad, N_k):
    (q, k, v), upstream = attention_case(1, 2, 40, N_k, 40, FP16)
    clean = at.attention(q, k, v)
    q = q.clone()
    q[0, 1, 3, 5] = bad
    y, dq, _, _ = value_and_gradients(at.attention, (q, k, v), upstream)
    others = torch.ones(1, 2, 40, dtype=torch.bool)
    others[0, 1, 3] = False
    assert torch.equal(y[others], clean[others]) and not y[0, 1, 3].isfinite().any()
    assert dq[others].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [6, 40], ids=["one pass", "large"])
def test_what_is_not_finite_in_a_group_stays_in_it(bad, size):
    (x, weight, bias), upstream = group_norm_case((2, 64, size, size), FP32, torch.channels_last)

    def norm(x, weight, bias):
        return gn.group_norm(x, 4, weight, bias, 1e-5, silu=True)

    clean, dx_clean, *_ = value_and_gradients(norm, (x, weight, bias), upstream)
    x = x.clone(memory_format=torch.preserve_format)
    x[1, 17, 2, 3] = bad  # in the second of four groups
    y, dx, *_ = value_and_gradients(norm, (x, weight, bias), upstream)
    others = torch.ones(2, 64, dtype=torch.bool)
    others[1, 16:32] = False
    assert torch.equal(y[others], clean[others]) and torch.equal(dx[others], dx_clean[others])
    assert y[1, 16:32].isnan().any()


# ---- the shapes of Stable Diffusion ------------------------------------------------------------

SHAPES = {  # (N, d) of self-attention, SD 1.5 and 2.1 at 512² and 768², SDXL at 1024²
    (4096, 40), (1024, 80), (256, 160), (64, 160),
    (4096, 64), (1024, 64), (256, 64), (64, 64), (9216, 64), (2304, 64), (576, 64), (144, 64),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("N_k", [None, 77], ids=["self", "cross"])
@pytest.mark.parametrize("N, d", sorted(SHAPES))
def test_attention_at_the_shapes_of_a_training_step(N, d, N_k):
    """One sample, one head; against fp64."""
    check_attention(*attention_case(1, 1, N, N_k or N, d, FP16))


@pytest.mark.slow
@pytest.mark.parametrize(
    "channels, side",
    [
        *((c, 64) for c in (320, 640, 960)),
        *((c, 32) for c in (320, 640, 960, 1280, 1920)),
        *((c, 16) for c in (640, 1280, 1920, 2560)),
        *((c, 8) for c in (1280, 2560)),
        *((c, 96) for c in (320, 640, 960)),
        *((c, 48) for c in (320, 640, 960, 1280, 1920)),
        *((c, 128) for c in (320, 640, 960)),  # SDXL's at 1024², and below
        *((1280, 64), (1920, 64), (2560, 32)),
    ],
)
def test_group_norm_at_the_shapes_of_a_training_step(channels, side):
    """One sample, 32 groups; against fp64."""
    inputs, upstream = group_norm_case((1, channels, side, side), FP16, torch.channels_last)
    check_group_norm(inputs, 32, upstream, silu=True)
