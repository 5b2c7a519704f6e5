"""Exact softmax attention, forward and backward, without the N_q × N_k matrix in memory.

    S = scale · Q Kᵀ        P = softmax(S)        O = P V

for each of B samples and H heads: N_q queries, N_k keys and values, all of head dimension d.

The FlashAttention recurrences (Dao et al. 2022, algorithm 1; Dao 2023, algorithms 1 and 2):
a program owns a block of queries, walks over the keys and keeps the running maximum m and sum l
of each row. The backward recomputes P from L = m + log l, the log of the softmax's denominator:

    dP = dO Vᵀ     delta = rowsum(dO ∘ O)     dS = P ∘ (dP − delta)
    dV = Pᵀ dO     dQ = scale · dS K          dK = scale · dSᵀ Q

Every gradient has one program that adds it up in a fixed order: no atomics, equal bits every run.

- Exponentials are base 2 (the hardware's): S is scaled by scale · log2 e, and L is in base 2 too.
- Up to 128 keys (the 77 of a prompt) take kernels of their own.

blocks.py is what the kernels share; then forward.py, backward.py and short_keys.py, each readable
alone; tiles.py is the table of tiles. Here stand the launches and the operator.
"""

import math
from collections.abc import Sequence

import torch
import triton

from .. import card
from .backward import _backward_dkv, _backward_dq, reference_backward
from .forward import _forward, reference
from .short_keys import _short_backward, _short_forward
from .tiles import config, tiles_of

# Programs of the short kernels, chunks of queries × heads: as many as Hopper's 132 multiprocessors
# run at once, by their registers two or three each forward, one backward.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 264, 128


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x itself if its rows start at multiples of 16 bytes, as every projection's output does."""
    regular = x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:-1])
    if regular and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _arguments(q, k, v):
    """What every kernel gets: the strides, then the sizes."""
    strides = [s // 8 for x in (q, k, v) for s in x.stride()[:3]]
    return *strides, q.shape[1], q.shape[2], k.shape[2], q.shape[3] // 8


def _chunk(N_q, heads, block, programs):
    """Queries per program, whole blocks, so that there are about so many programs."""
    return max(1, triton.cdiv(N_q, block) * heads // programs) * block


@torch.library.custom_op("minibooth::attention", mutates_args=())
@card.launched_where_its_input_is
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, choices: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (_aligned(x) for x in (q, k, v))
    B, H, N_q, d = q.shape
    N_k = k.shape[2]
    out = q.new_empty(B, N_q, H, d)
    L = q.new_empty(B, H, N_q, dtype=torch.float32)
    arguments = (q, k, v, out, L, *_arguments(q, k, v), scale * math.log2(math.e))
    choice = card.chosen(choices, 0)
    if options := config("short_forward", q, N_k, choice):
        chunk = _chunk(N_q, B * H, options["BLOCK_M"], FORWARD_PROGRAMS)
        _short_forward[(triton.cdiv(N_q, chunk), B * H)](*arguments, chunk, **options)
    else:
        options = config("forward", q, N_k, choice)
        grid = (triton.cdiv(N_q, options["BLOCK_M"]), B * H, options["D1"] // options["DV"])
        _forward[grid](*arguments, **options)
    return out.transpose(1, 2), L


@_attention.register_fake
def _(q, k, v, scale, choices):
    B, H, N_q, d = q.shape
    return q.new_empty(B, N_q, H, d).transpose(1, 2), q.new_empty(B, H, N_q, dtype=torch.float32)


@torch.library.custom_op("minibooth::attention_backward", mutates_args=())
@card.launched_where_its_input_is
def _attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    L: torch.Tensor,
    scale: float,
    choices: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (_aligned(x) for x in (q, k, v))
    o, do = o.transpose(1, 2), do.transpose(1, 2).contiguous()
    B, H, N_q, d = q.shape
    N_k = k.shape[2]
    dq = torch.empty_like(o)
    common = (*_arguments(q, k, v), scale, scale * math.log2(math.e))
    if options := config("short_backward", q, N_k, card.chosen(choices, 1)):
        chunk = _chunk(N_q, B * H, options["BLOCK_M"], BACKWARD_PROGRAMS)
        grid = (triton.cdiv(N_q, chunk), B * H)
        partial = q.new_empty(grid[0], 2, B, N_k, H, d, dtype=torch.float32)
        _short_backward[grid](q, k, v, o, do, L, dq, partial, *common, chunk, **options)
        dkv = partial.sum(0).to(k.dtype)
    else:
        dkv = k.new_empty(2, B, N_k, H, d)
        delta = torch.empty_like(L)
        options = config("backward_dq", q, N_k, card.chosen(choices, 1))
        grid = (triton.cdiv(N_q, options["BLOCK_M"]), B * H)
        _backward_dq[grid](q, k, v, o, do, L, dq, delta, *common, **options)
        options = config("backward_dkv", q, N_k, card.chosen(choices, 2))
        grid = (triton.cdiv(N_k, options["BLOCK_N"]), B * H)
        _backward_dkv[grid](q, k, v, do, L, delta, *dkv, *common, **options)
    return dq.transpose(1, 2), dkv.transpose(2, 3)  # dK and dV in one tensor (2, B, H, N_k, d)


@_attention_backward.register_fake
def _(do, q, k, v, o, L, scale, choices):
    B, H, N_q, d = q.shape
    dkv = k.new_empty(2, B, k.shape[2], H, d)
    return q.new_empty(B, N_q, H, d).transpose(1, 2), dkv.transpose(2, 3)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.choices = inputs
    ctx.set_materialize_grads(False)  # no zeros for L, which has no gradient
    ctx.save_for_backward(q, k, v, *output)


def _autograd_backward(ctx, do, _):
    q, k, v, o, L = ctx.saved_tensors
    if q.shape[-1] > 160:
        raise NotImplementedError("the attention kernel's backward takes head dimensions up to 160")
    dq, (dk, dv) = _attention_backward(do, q, k, v, o, L, ctx.scale, ctx.choices)
    return dq, dk, dv, None, None


_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


def candidates(q: torch.Tensor, N_k: int, backward: bool) -> tuple[int, ...]:
    """How many tiles there are to choose from, for each kernel in the order of their launches."""
    kernels = ["short_forward" if tiles_of("short_forward", q, N_k) else "forward"]
    if backward and tiles_of("short_backward", q, N_k):
        kernels.append("short_backward")
    elif backward:
        kernels += "backward_dq", "backward_dkv"
    return tuple(len(tiles_of(kernel, q, N_k)) for kernel in kernels)


def unsupported(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> str | None:
    """Why the kernels cannot take these arguments, in one line; None if they can."""
    if reason := card.unsupported(q):
        return reason
    if any(x.ndim != 4 or x.dtype != q.dtype or x.device != q.device for x in (q, k, v)):
        return "q, k, v must be (B, H, N, d), of one dtype, on one device"
    B, H, _, d = q.shape
    if k.shape != v.shape or (k.shape[:2], k.shape[3]) != ((B, H), d) or k.numel() == 0:
        return f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}"
    if B * H > 65_535:
        return f"CUDA has no grid of {B} × {H} heads: 65535 at most"
    if any((x.shape[2] - 1) * x.stride(2) + d >= 2**31 for x in (q, k, v)):
        return "the kernels count the elements of a head in 32 bits"
    if d % 8 or (d > 160 and d != 512):
        return f"the head dimension is a multiple of 8 up to 160, or 512, not {d}"
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if d > 160 and gradients:
        return f"there is no backward for head dimension {d}, only for up to 160"
    if scale is not None and scale <= 0:
        return f"the scale must be positive, not {scale}"  # the kernels scale the row maximum
    return None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    choices: Sequence[int] = (),
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v, one differentiable operator.

    q: (B, H, N_q, d); k, v: (B, H, N_k, d), fp16, bf16 or fp32. d is a multiple of 8 up to 160, or
    512 without gradients. Any strides: a view of a projection's output is read where it lies.
    scale: positive, 1/sqrt(d) by default. choices: which of its `candidates` each kernel takes.
    Returns (B, H, N_q, d), a view of (B, N_q, H, d). Two runs give equal bits, gradients included.
    Raises ValueError for what the kernels cannot take.
    """
    if reason := unsupported(q, k, v, scale):
        raise ValueError(reason)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _attention(q, k, v, scale, choices)[0]
