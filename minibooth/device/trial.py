"""One case tried: is the Triton kernel right, and is it faster than whatever PyTorch has?

A case is an operator at one shape, with or without a backward pass (ops.Case). The kernel is
compared with PyTorch's result in fp32, with NaN in whatever memory it does not write, and timed,
with each of the tiles that its tables have for the card. The fastest that is right is compared with
the fastest of PyTorch's ways to do the same, and taken where it is not slower.
Times are of CUDA-graph replays: of calls that are launched one by one they say nothing.
settle.py does it for a run; the benchmark of the kernels is made of the same `examine`, so that
what is measured is what decides.
"""

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

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
UPDATED = 256, 2**16  # weights that AdamW is tried on, and numbers in each: more than any L2
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
    gradient. Attention: views of projections' outputs. Norm: x with a mean, γ, β; then what is
    added to x, if anything. GEGLU: x. AdamW: weights, both averages and gradients."""
    dtype = getattr(torch, case.dtype)
    if case.op == "adamw":
        weights, first, second, gradients = torch.randn(4, math.prod(UPDATED), device=device)
        return [weights, first, second.square(), gradients.to(dtype)], gradients
    if case.op == "attention":
        B, H, N_q, N_k, d = case.shape
        q, k, v, upstream = (
            torch.randn(B, N, H, d, device=device, dtype=dtype).transpose(1, 2)
            for N in (N_q, N_k, N_k, N_q)
        )
        return [q, k, v], upstream
    x, upstream = (
        torch.randn(case.shape, device=device, dtype=dtype).contiguous(
            memory_format=memory_format(case)
        )
        for _ in range(2)
    )
    if case.op == "geglu":
        return [x], upstream[..., : case.shape[-1] // 2].contiguous()
    width = case.shape[1 if case.op == "group_norm" else -1]
    of_weights = case.norm[3 if case.op == "group_norm" else 1]
    weights = torch.randn(2, width, device=device, dtype=getattr(torch, of_weights))
    added = []
    if case.op == "layer_norm" and case.norm[0]:
        added = [torch.randn_like(x)]
    elif case.op == "group_norm" and case.norm[4]:
        added = [torch.randn(case.shape[:2], device=device, dtype=dtype)]
    return [x + 1, *weights, *added], upstream


def memory_format(case: Case) -> torch.memory_format:
    last = case.op == "group_norm" and case.norm[2]
    return torch.channels_last if last else torch.contiguous_format


def with_backend(backend: SDPBackend) -> Callable[..., Tensor]:
    def attention(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attention


def ours(case: Case, choices: Sequence[int] = ()) -> Callable[..., Tensor]:
    """The kernels, each with the candidate of its tiles that is named; the first where none is."""
    if case.op == "attention":
        return lambda q, k, v: ops.attention_kernels.attention(q, k, v, choices=choices)
    if case.op == "geglu":
        return ops.geglu_kernels.geglu
    if case.op == "adamw":
        return UpdatesByKernel()
    if case.op == "layer_norm":
        layer_norm = ops.layer_norm_kernels.layer_norm
        return lambda x, w, b, h=None: layer_norm(x, w, b, EPS, h, choices)
    groups, silu, *_ = case.norm
    group_norm = ops.group_norm_kernels.group_norm
    return lambda x, w, b, shift=None: group_norm(x, groups, w, b, EPS, silu, shift, choices)


def counts(case: Case, device: torch.device) -> tuple[int, ...]:
    """How many candidates each of its kernels has on that card."""
    if case.op == "attention":
        _, _, N_q, N_k, d = case.shape
        q = torch.empty(1, 1, N_q, d, dtype=getattr(torch, case.dtype), device=device)
        return ops.attention_kernels.candidates(q, N_k, case.backward)
    if case.op in ("geglu", "adamw"):
        return ()
    if case.op == "layer_norm":
        return ops.layer_norm_kernels.candidates(getattr(torch, case.dtype), case.backward)
    x = make_inputs(case, torch.device("meta"))[0][0]
    return ops.group_norm_kernels.candidates(x, case.norm[0], case.backward)


def implementations(case: Case) -> dict[str, Callable[..., Tensor]]:
    """By name; "triton" is ours, "torch" what PyTorch does unasked."""
    if case.op == "attention":
        others = {name: with_backend(backend) for name, backend in BACKENDS.items()}
        return {"triton": ours(case), "torch": F.scaled_dot_product_attention, **others}
    if case.op == "geglu":
        return {"triton": ours(case), "torch": ops.geglu_kernels.reference}
    if case.op == "adamw":
        return {"triton": ours(case), "torch": update}

    def eager_group_norm(x, weight, bias, *shift):
        groups, silu, *_ = case.norm
        x = x + shift[0][:, :, None, None] if shift else x
        wide = x.to(weight.dtype)  # as autocast does, which has PyTorch's norm in fp32
        y = F.group_norm(wide, groups, weight, bias, EPS)
        y = F.silu(y) if silu else y
        # Into what the next convolution reads: PyTorch's norm on CUDA leaves another layout, too.
        return y.to(x.dtype).contiguous(memory_format=memory_format(case))

    def eager_layer_norm(x, weight, bias, *h):
        s = x + h[0] if h else x
        y = F.layer_norm(s.to(weight.dtype), s.shape[-1:], weight, bias, EPS).to(x.dtype)
        return (s, y) if h else y

    eager = eager_group_norm if case.op == "group_norm" else eager_layer_norm
    return {"triton": ours(case), "torch": eager}


STEP = {"lr": 1e-2, "weight_decay": 1e-2, "t": 10.0, "scale": 2.0}  # an update that is tried


def parts(x: Tensor) -> list[Tensor]:
    """Of a tensor, what are the weights of a network."""
    return [*x.view(UPDATED).unbind()]


def update(w: Tensor, m: Tensor, v: Tensor, gradients: Tensor) -> tuple[Tensor, ...]:
    """AdamW in PyTorch, with all that is beside it in a step: gradients cast to fp32, their norm,
    and weights cast for the next forward pass. What is given stays; after it, and the norm."""
    w, m, v, copy = w.clone(), m.clone(), v.clone(), torch.empty_like(gradients)
    g = [g.float() for g in parts(gradients)]
    norm = torch.nn.utils.get_total_norm(g)
    t, scale, skip = (w.new_full((), x) for x in (STEP["t"], STEP["scale"], 0.0))
    lists = parts(w), g, parts(m), parts(v), [], [t] * len(g)
    how = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False, "maximize": False}
    how |= {"lr": STEP["lr"], "weight_decay": STEP["weight_decay"]}
    torch._fused_adamw_(*lists, **how, grad_scale=scale, found_inf=skip)
    for x, y in zip(parts(copy), parts(w), strict=True):
        x.copy_(y)
    return w, m, v, copy, norm[None]


class UpdatesByKernel:
    """The same by the kernels. What they write to must stay where it is: it is kept by what was
    given, which is copied there in each call, as `update` copies it."""

    def __init__(self):
        self.kept: dict[int, tuple] = {}

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        *state, gradients = given
        key = gradients.data_ptr()
        if key not in self.kept:
            self.kept[key] = self.allocated(state, gradients.dtype)
        table, *written, numbers = self.kept[key]
        for x, y in zip(written, state, strict=False):
            x.copy_(y)
        norm = table.norm(parts(gradients))
        table.update(*numbers, STEP["weight_decay"])
        return *written, norm[None]

    def allocated(self, state: list[Tensor], dtype: torch.dtype) -> tuple:
        w, m, v = (x.clone() for x in state)
        copy, in_16_bits = w.to(dtype, copy=True), dtype != torch.float32
        copies, groups = parts(copy) if in_16_bits else [None] * UPDATED[0], [0] * UPDATED[0]
        table = ops.adamw_kernels.Table(parts(w), (parts(m), parts(v)), copies, groups)
        rates, scale, skip, t = w.new_tensor([STEP["lr"], STEP["scale"], 0.0, STEP["t"]]).split(1)
        return table, w, m, v, copy if in_16_bits else w, (rates, scale, skip, t)


def results(f: Callable, inputs: list[Tensor], upstream: Tensor, backward: bool) -> list[Tensor]:
    """The output, or both of a sum and its norm; and, if asked, the gradients of all inputs."""
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    with torch.set_grad_enabled(backward):
        out = f(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    if not backward:
        return [*outs]
    upstreams = [upstream.to(y.dtype) for y in outs]
    return [*(y.detach() for y in outs), *torch.autograd.grad(outs, leaves, upstreams)]


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


def what_is_wrong(ours, theirs, expected, dtype: str, outputs: int = 1) -> str | None:
    """In words; None if nothing. Allowed is twice PyTorch's own error in the case's dtype, three
    times for gradients, which come after so many outputs; of a single element four times; or fp32's
    rounding."""
    floor = 1e-5 if dtype == "float32" else 1e-4
    for i, (a, b, true) in enumerate(zip(ours, theirs, expected, strict=True)):
        name = "the output" if i < outputs else f"gradient {i - outputs + 1}"
        if a.shape != true.shape:
            return f"{name} has another shape"
        (error, element), (their_error, their_element) = difference(a, true), difference(b, true)
        if not error <= (allowed := max((2 if i < outputs else 3) * their_error, floor)):
            return f"{name} is wrong by {error:.1e}, allowed is {allowed:.1e}"
        if not element <= (allowed := max(4 * their_element, 10 * floor)):
            return f"an element of {name} is wrong by {element:.1e}, allowed is {allowed:.1e}"
    return None


def fault(f: Callable, reference: Callable, case: Case, inputs: list, upstream: Tensor):
    """What is wrong with f, in words; None if nothing."""
    full = [x.float() for x in inputs]
    expected = results(reference, full, upstream.float(), case.backward)
    del full
    theirs = results(reference, inputs, upstream, case.backward)
    with poisoned():
        ours = results(f, inputs, upstream, case.backward)
    outputs = len(expected) - len(inputs) * case.backward
    return what_is_wrong(ours, theirs, expected, case.dtype, outputs)


Outcome = float | str  # seconds of a call, or what is wrong


def search(
    attempt: Callable[[tuple[int, ...]], Outcome], counts: Sequence[int], until: float
) -> tuple[tuple[int, ...], dict[tuple[int, ...], Outcome]]:
    """The choice of tiles that is right and fastest, and what came of each that was tried. Each
    kernel's candidates are tried beside what is best of the others, so long as there is time; the
    first of all is what stands without."""
    best = (0,) * len(counts)
    found = {best: attempt(best)}
    for place, count in enumerate(counts):
        for choice in range(1, count):
            if time.monotonic() > until or found[best] == NO_MEMORY:
                return best, found
            other = (*best[:place], choice, *best[place + 1 :])
            found[other] = attempt(other)
            right = not isinstance(found[other], str)
            if right and (isinstance(found[best], str) or found[other] < found[best]):
                best = other
    return best, found


def examine(
    case: Case,
    device: torch.device,
    timer: Timer,
    functions: dict[str, Callable[..., Tensor]] | None = None,
    until: float = math.inf,
) -> Verdict:
    """Try a case, with its `implementations` or those given, and until then (of the monotonic
    clock) with other tiles than the first. Whatever the kernel does wrong, but for ending the
    process, is the verdict's."""
    functions = functions or implementations(case)
    inputs, upstream = make_inputs(case, device)

    def attempt(choices: tuple[int, ...]) -> Outcome:
        f = ours(case, choices) if any(choices) else functions["triton"]
        try:
            wrong = fault(f, functions["torch"], case, inputs, upstream)
            return wrong or timer(functools.partial(calls, f, case, device))
        except Exception as e:
            return said(e)

    best, found = search(attempt, counts(case, device), until)
    times, why = {}, found[best] if isinstance(found[best], str) else None
    if why is None:
        times["triton"] = found[best]
    for name, f in functions.items():
        if name == "triton" or why == NO_MEMORY:
            continue
        try:
            times[name] = timer(functools.partial(calls, f, case, device))
        except Exception as e:  # most often a backend without this shape
            why = why or (NO_MEMORY if is_out_of_memory(e) else None)
    others = [t for name, t in times.items() if name != "triton"]
    faster = why is None and (not others or times["triton"] <= min(others))
    us = {name: 1e6 * t for name, t in times.items()}
    rest = {c: t if isinstance(t, str) else 1e6 * t for c, t in found.items() if c != best}
    return Verdict(faster, us, why, best, {"-".join(map(str, c)): t for c, t in rest.items()})


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
