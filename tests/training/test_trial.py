"""One case tried, with stand-ins for the kernel, the clock and the card."""

import pytest
import torch
import torch.nn.functional as F

from minibooth.ops import Case
from minibooth.training import trial

CPU = torch.device("cpu")
ATTENTION = Case("attention", (2, 2, 400, 20, 8), "float16", False)
NORM = Case("group_norm", (2, 8, 6, 6), "bfloat16", False, (4, True, True, "float32"))


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def right(q, k, v):
    """Another way to the same: rounding differs."""
    S = q.shape[-1] ** -0.5 * q.float() @ k.float().transpose(-1, -2)
    return (torch.softmax(S, dim=-1) @ v.float()).to(q.dtype)


def wrong_in_one_element(q, k, v):
    y = right(q, k, v)
    return y + F.one_hot(torch.tensor(137), y.numel()).view_as(y) * 0.01


def unwritten_in_one_row(q, k, v):
    y = torch.empty_like(q)
    y[:, :, 1:] = right(q, k, v)[:, :, 1:]
    return y


def raising(q, k, v):
    raise RuntimeError("out of resource: shared memory\nsecond line")


class WrongBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        return right(q, k, v)

    @staticmethod
    def backward(ctx, dy):
        return dy, torch.zeros(2, 2, 20, 8), torch.zeros(2, 2, 20, 8)


def examined(monkeypatch, ours, seconds, case=ATTENTION, theirs=sdpa):
    """With the clock saying 2 s of PyTorch's, 3 s of a slow way of PyTorch's, `seconds` of ours."""
    slow = lambda *x: theirs(*x)  # noqa: E731
    functions = {"triton": ours, "torch": theirs, "slow": slow}
    monkeypatch.setattr(trial, "implementations", lambda case: functions)
    clock = {ours: seconds, theirs: 2.0, slow: 3.0}
    return trial.examine(case, CPU, lambda make_calls: clock[make_calls.args[0]])


def test_right_and_faster_is_taken(monkeypatch):
    verdict = examined(monkeypatch, right, 1.0)
    assert verdict.triton and verdict.why is None
    assert verdict.us == {"triton": 1e6, "torch": 2e6, "slow": 3e6}


def test_right_and_slower_than_the_fastest_is_not(monkeypatch):
    verdict = examined(monkeypatch, right, 2.5)
    assert not verdict.triton and verdict.why is None and verdict.us["triton"] == 2.5e6


@pytest.mark.parametrize(
    "ours, said",
    [
        (raising, "RuntimeError: out of resource: shared memory"),
        (wrong_in_one_element, "an element of the output is wrong"),
        (unwritten_in_one_row, "the output is wrong by nan"),
        (lambda q, k, v: right(q, k, v)[:1], "the output has another shape"),
        (lambda q, k, v: right(q, k, v) * 1.01, "the output is wrong by 1.0e-02"),
    ],
)
def test_a_kernel_that_raises_or_is_wrong_is_not_taken_however_fast(monkeypatch, ours, said):
    verdict = examined(monkeypatch, ours, 0.001)
    assert not verdict.triton and verdict.why.startswith(said) and "\n" not in verdict.why
    assert "triton" not in verdict.us and verdict.us["torch"] == 2e6


def test_wrong_gradients_are_found_where_there_is_a_backward_pass(monkeypatch):
    ours = WrongBackwards.apply
    case = ATTENTION._replace(dtype="float32")
    assert examined(monkeypatch, ours, 1.0, case).triton
    verdict = examined(monkeypatch, ours, 1.0, case._replace(backward=True))
    assert not verdict.triton and verdict.why.startswith("gradient 1 is wrong")


def test_a_clock_that_fails_leaves_pytorch(monkeypatch):
    functions = {"triton": right, "torch": sdpa}
    monkeypatch.setattr(trial, "implementations", lambda case: functions)

    def clock(make_calls):
        raise RuntimeError("cannot capture")

    verdict = trial.examine(ATTENTION, CPU, clock)
    assert not verdict.triton and verdict.why == "it could not be timed"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "case", [ATTENTION, NORM, NORM._replace(norm=(2, False, False, "bfloat16"))]
)
def test_pytorch_itself_is_right_in_every_kind_of_case(case, backward, monkeypatch):
    """The tolerance is no trap: what stands for ours is PyTorch in fp32, rounded at the end."""
    case = case._replace(backward=backward)
    theirs = trial.implementations(case)["torch"]
    ours = lambda *x: theirs(*(y.float() for y in x)).to(x[0].dtype)  # noqa: E731
    assert examined(monkeypatch, ours, 1.0, case, theirs).triton


def test_the_inputs_lie_as_a_network_brings_them():
    (q, k, _), upstream = trial.make_inputs(ATTENTION, CPU)
    assert q.transpose(1, 2).is_contiguous() and q.shape == upstream.shape == (2, 2, 400, 8)
    assert k.shape == (2, 2, 20, 8) and q.dtype == torch.float16
    (x, weight, _), _ = trial.make_inputs(NORM, CPU)
    assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert weight.dtype == torch.float32 and x.float().mean() > 0.5


def test_the_calls_of_a_graph_differ_in_their_inputs(monkeypatch):
    monkeypatch.setattr(trial, "L2_BYTES", 3 * 2 * (2 * 2 * 400 * 8 + 2 * 2 * 2 * 20 * 8))
    made = trial.calls(sdpa, ATTENTION, CPU)
    assert len(made) >= trial.GRAPH_CALLS
    assert len({call.args[1][0].data_ptr() for call in made}) == 4
    assert made[0]()[0].shape == (2, 2, 400, 8)
