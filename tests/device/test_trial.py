"""One case tried, with stand-ins for the kernel, the clock and the card."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minibooth.device import trial
from minibooth.device.verdicts import NO_MEMORY
from minibooth.ops import Case

CPU = torch.device("cpu")
ATTENTION = Case("attention", (2, 2, 400, 20, 8), "float16", False)
NORM = Case("group_norm", (2, 8, 6, 6), "bfloat16", False, (4, True, True, "float32", False))


@pytest.fixture(autouse=True)
def no_other_tiles(monkeypatch):
    monkeypatch.setattr(trial, "counts", lambda case, device: ())


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


# ---- tiles --------------------------------------------------------------------------------------

SECONDS = {(0, 0): 3.0, (1, 0): 2.0, (0, 1): 4.0, (0, 2): 1.5, (1, 1): 2.5, (1, 2): 1.0}


@pytest.fixture
def two_kernels(monkeypatch):
    """Tries a case of two kernels with two and with three candidates, for each choice of which
    there is a stand-in, `right` where no other is given, and what the clock says of it."""

    def examined(others=(), until=math.inf):
        made = {choices: functools.partial(right) for choices in SECONDS}
        made |= {choices: functools.partial(f) for choices, f in dict(others).items()}
        clock = {f: SECONDS[choices] for choices, f in made.items()} | {sdpa: 5.0}
        monkeypatch.setattr(trial, "counts", lambda case, device: (2, 3))
        monkeypatch.setattr(trial, "ours", lambda case, choices: made[choices])
        functions = {"triton": made[0, 0], "torch": sdpa}
        timer = lambda make_calls: clock[make_calls.args[0]]  # noqa: E731
        return trial.examine(ATTENTION, CPU, timer, functions, until)

    return examined


def test_the_fastest_right_candidate_of_each_kernel_is_taken(two_kernels):
    verdict = two_kernels()
    assert verdict.triton and verdict.choices == (1, 2)
    assert verdict.us == {"triton": 1e6, "torch": 5e6}
    assert verdict.others == {"0-0": 3e6, "1-0": 2e6, "1-1": 2.5e6}


def test_a_wrong_candidate_is_not_taken_however_fast(two_kernels):
    verdict = two_kernels({(1, 2): wrong_in_one_element})
    assert verdict.triton and verdict.choices == (1, 0) and verdict.us["triton"] == 2e6
    assert verdict.others["1-2"].startswith("an element of the output is wrong")
    verdict = two_kernels({(1, 0): raising})
    assert verdict.choices == (0, 2) and verdict.us["triton"] == 1.5e6
    assert verdict.others["1-0"] == "RuntimeError: out of resource: shared memory"


def test_a_right_candidate_stands_in_for_a_first_one_that_is_wrong(two_kernels):
    verdict = two_kernels({(0, 0): wrong_in_one_element, (1, 2): raising})
    assert verdict.triton and verdict.why is None and verdict.choices == (1, 0)
    verdict = two_kernels(dict.fromkeys(SECONDS, raising))
    assert not verdict.triton and verdict.choices == (0, 0)
    assert verdict.why == "RuntimeError: out of resource: shared memory"


def test_when_time_is_up_the_best_so_far_stands(two_kernels, monkeypatch):
    assert two_kernels(until=-math.inf).choices == (0, 0)
    looks = iter(range(10))
    monkeypatch.setattr(trial.time, "monotonic", lambda: next(looks))
    verdict = two_kernels(until=1)  # it looks before every candidate
    assert verdict.triton and verdict.choices == (1, 0) and set(verdict.others) == {"0-0", "1-1"}


def test_without_memory_no_other_tiles_are_tried(two_kernels):
    verdict = two_kernels({(0, 0): out_of_memory})
    assert verdict.why == NO_MEMORY and verdict.us == verdict.others == {}


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_no_memory_is_said_alike_wherever_it_is_missing():
    """In the kernel, in PyTorch's, and while either is timed: no verdict of the kernel."""
    for functions, clock in (
        ({"triton": out_of_memory, "torch": sdpa}, lambda make_calls: 1.0),
        ({"triton": right, "torch": out_of_memory}, lambda make_calls: 1.0),
        ({"triton": right, "torch": sdpa}, out_of_memory),
    ):
        verdict = trial.examine(ATTENTION, CPU, clock, functions)
        assert not verdict.triton and verdict.why == NO_MEMORY


def test_a_clock_that_fails_leaves_pytorch(monkeypatch):
    functions = {"triton": right, "torch": sdpa}
    monkeypatch.setattr(trial, "implementations", lambda case: functions)

    def clock(make_calls):
        raise RuntimeError("cannot capture")

    verdict = trial.examine(ATTENTION, CPU, clock)
    assert not verdict.triton and verdict.why == "RuntimeError: cannot capture"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "case", [ATTENTION, NORM, NORM._replace(norm=(2, False, False, "bfloat16", False))]
)
def test_pytorch_itself_is_right_in_every_kind_of_case(case, backward, monkeypatch):
    """The tolerance is no trap: what stands for ours is PyTorch in fp32, rounded at the end."""
    case = case._replace(backward=backward)
    theirs = trial.implementations(case)["torch"]
    ours = lambda *x: theirs(*(y.float() for y in x)).to(x[0].dtype)  # noqa: E731
    assert examined(monkeypatch, ours, 1.0, case, theirs).triton


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_pytorchs_norm_is_timed_up_to_what_the_next_layer_reads(channels_last, weights):
    """In x's dtype and layout, as ours leaves it; and back from a gradient that is so."""
    case = NORM._replace(norm=(4, True, channels_last, weights, False), backward=True)
    inputs, upstream = trial.make_inputs(case, CPU)
    y, dx, *_ = trial.results(trial.implementations(case)["torch"], inputs, upstream, True)
    for tensor in (y, dx):
        assert tensor.dtype == torch.bfloat16 and tensor.stride() == inputs[0].stride()


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made within it."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and not x._is_view()]
        self.bytes = max([self.bytes, *(x.nbytes for x in made)])
        return out


@pytest.mark.parametrize("shape", [(1, 256, 20, 30), (2, 8, 999, 40), (3, 5, 7, 2), (17,), (1, 1)])
def test_differences_are_found_without_whole_copies_in_fp64(shape):
    a, b = torch.randn(2, *shape)
    if len(shape) == 4:
        b = b.contiguous(memory_format=torch.channels_last)
    a.view(-1)[a.numel() // 2] += 3.0
    half = a.half()
    with Largest() as made:
        found = trial.difference(half, b)
    error, size = half.double() - b.double(), b.double()
    exact = error.norm() / size.norm(), error.abs().max() / size.abs().max()
    assert found == pytest.approx([x.item() for x in exact], rel=1e-12)
    if a.numel() > 1000:
        assert made.bytes <= size.nbytes / 15
    a.view(-1)[-1] = torch.nan
    assert all(x != x for x in trial.difference(a, b))


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
