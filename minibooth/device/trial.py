"""One case tried: is the Triton kernel right, and is it faster than whatever PyTorch has?

A case is an operator at one shape, with or without a backward pass (ops.Case). The kernel is
compared with PyTorch's result in fp32, with NaN in whatever memory it does not write, and timed
against the fastest of PyTorch's ways to do the same. It is taken where it is right and not slower.
Times are of CUDA-graph replays: of calls that are launched one by one they say nothing.
settle.py does it for a run; the benchmark of the kernels is made of the same `examine`, so that
what is measured is what decides.
"""

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import ops
from ..common.cli import is_out_of_memory
from ..common.errors import first_line
from ..ops import Case
from .verdicts import NO_MEMORY, Verdict

EPS = 1e-5  # of the norms that are tried; any would do
L2_BYTES = 128 * 2**20  # more than any card's L2: the inputs of a graph's calls exceed it
GRAPH_CALLS = 10  # at least, per graph
PARTS = 16  # in which tensors are compared: fp64 copies of the whole would not fit a small card
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Timer = Callable[[Callable[[], list[Callable]]], float]


# ---- a case ------------------------------------------------------------------------------------


def make_inputs(case: Case, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """What the operator is called with, in the layout in which a network brings it, and an upstream
    gradient. Attention: views of projections' outputs. Norm: x with a mean, γ, β."""
    dtype = getattr(torch, case.dtype)
    if case.op == "attention":
        B, H, N_q, N_k, d = case.shape
        q, k, v, upstream = (
            torch.randn(B, N, H, d, device=device, dtype=dtype).transpose(1, 2)
            for N in (N_q, N_k, N_k, N_q)
        )
        return [q, k, v], upstream
    layout, weights = memory_format(case), getattr(torch, case.norm[3])
    x, upstream = (
        torch.randn(case.shape, device=device, dtype=dtype).contiguous(memory_format=layout)
        for _ in range(2)
    )
    weight, bias = torch.randn(2, case.shape[1], device=device, dtype=weights)
    return [x + 1, weight, bias], upstream


def memory_format(norm: Case) -> torch.memory_format:
    return torch.channels_last if norm.norm[2] else torch.contiguous_format


def with_backend(backend: SDPBackend) -> Callable[..., Tensor]:
    def attention(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attention


def implementations(case: Case) -> dict[str, Callable[..., Tensor]]:
    """By name; "triton" is ours, "torch" what PyTorch does unasked."""
    if case.op == "attention":
        others = {name: with_backend(backend) for name, backend in BACKENDS.items()}
        ours = ops.attention_kernels.attention
        return {"triton": ours, "torch": F.scaled_dot_product_attention, **others}
    groups, silu, *_ = case.norm
    layout = memory_format(case)

    def eager(x, weight, bias):
        wide = x.to(weight.dtype)  # as autocast does, which has PyTorch's norm in fp32
        y = F.group_norm(wide, groups, weight, bias, EPS)
        y = F.silu(y) if silu else y
        # Into what the next convolution reads: PyTorch's norm on CUDA leaves another layout, too.
        return y.to(x.dtype).contiguous(memory_format=layout)

    def ours(x, weight, bias):
        return ops.group_norm_kernels.group_norm(x, groups, weight, bias, EPS, silu)

    return {"triton": ours, "torch": eager}


def results(f: Callable, inputs: list[Tensor], upstream: Tensor, backward: bool) -> list[Tensor]:
    """The output and, if asked, the gradients of all inputs."""
    if not backward:
        with torch.no_grad():
            return [f(*inputs)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within it, torch.empty is filled with NaN: what no kernel writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)


def difference(out: Tensor, expected: Tensor) -> tuple[float, float]:
    """‖out − expected‖ / ‖expected‖, and the largest error of an element by the largest element,
    in fp64."""
    squares, most = torch.zeros(2, 2, dtype=torch.float64, device=out.device)
    longest = max(range(out.ndim), key=lambda dim: out.shape[dim])
    for a, b in zip(out.chunk(PARTS, longest), expected.chunk(PARTS, longest), strict=True):
        for i, x in enumerate((a.double() - b.double(), b.double())):
            squares[i] += x.square().sum()
            most[i] = torch.maximum(most[i], x.abs().max())
    (error, size), (element, largest) = squares.sqrt(), most
    return (error / size).item(), (element / largest).item()


def what_is_wrong(ours, theirs, expected, dtype: str) -> str | None:
    """In words; None if nothing. Allowed is twice PyTorch's own error in the case's dtype, three
    times for gradients; of a single element four times; or fp32's rounding."""
    floor = 1e-5 if dtype == "float32" else 1e-4
    for i, (a, b, true) in enumerate(zip(ours, theirs, expected, strict=True)):
        name = "the output" if i == 0 else f"gradient {i}"
        if a.shape != true.shape:
            return f"{name} has another shape"
        (error, element), (their_error, their_element) = difference(a, true), difference(b, true)
        if not error <= (allowed := max((3 if i else 2) * their_error, floor)):
            return f"{name} is wrong by {error:.1e}, allowed is {allowed:.1e}"
        if not element <= (allowed := max(4 * their_element, 10 * floor)):
            return f"an element of {name} is wrong by {element:.1e}, allowed is {allowed:.1e}"
    return None


def examine(
    case: Case,
    device: torch.device,
    timer: Timer,
    functions: dict[str, Callable[..., Tensor]] | None = None,
) -> Verdict:
    """Try a case, with its `implementations` or those given. Whatever the kernel does wrong, but
    for ending the process, is the verdict's."""
    functions, times, why = functions or implementations(case), {}, None
    inputs, upstream = make_inputs(case, device)
    try:
        full = [x.float() for x in inputs]
        expected = results(functions["torch"], full, upstream.float(), case.backward)
        theirs = results(functions["torch"], inputs, upstream, case.backward)
        with poisoned():
            ours = results(functions["triton"], inputs, upstream, case.backward)
        why = what_is_wrong(ours, theirs, expected, case.dtype)
        del full, expected, theirs, ours
    except Exception as e:
        why = said(e)
    for name, f in functions.items():
        if why == NO_MEMORY or (name == "triton" and why is not None):
            continue
        try:
            times[name] = timer(functools.partial(calls, f, case, device))
        except Exception as e:  # most often a backend without this shape
            why = why or (NO_MEMORY if is_out_of_memory(e) else None)
    if why is None and "triton" not in times:
        why = "it could not be timed"
    others = [t for name, t in times.items() if name != "triton"]
    faster = why is None and (not others or times["triton"] <= min(others))
    return Verdict(faster, {name: 1e6 * t for name, t in times.items()}, why)


def said(error: Exception) -> str:
    if is_out_of_memory(error):
        return NO_MEMORY
    return f"{type(error).__name__}: {first_line(error)}"


def calls(f: Callable, case: Case, device: torch.device) -> list[Callable]:
    """Calls that a graph is made of, of inputs that together exceed the L2 cache."""
    first = make_inputs(case, device)
    size = sum(x.nbytes for x in first[0])
    sets = [first, *(make_inputs(case, device) for _ in range(min(15, L2_BYTES // size)))]
    made = [functools.partial(results, f, *each, case.backward) for each in sets]
    return made * -(-GRAPH_CALLS // len(made))


def graph_time(make_calls: Callable[[], list[Callable]]) -> float:
    """Median seconds of one call under CUDA-graph replay; make_calls() gives a graph's calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = make_calls()
        for call in (*calls, calls[0]):  # compiles, and shows what a backend does not accept
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay():
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    once = min(replay() for _ in range(3)) * len(calls)
    return statistics.median(replay() for _ in range(max(5, min(50, int(0.08 / once)))))
