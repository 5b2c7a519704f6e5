"""LayerNorm over the last dimension, of x, or of a sum x + h that comes out beside it.

    s = x + h        ŝ = (s − mean) · rstd        y = γ ŝ + β

mean and variance are those of one row, so a program owns whole rows: it reads them once and writes
once, without the copies in fp32 that autocast makes around PyTorch's. Backward, with dy:

    ds = rstd (γ dy − a ŝ − b), a and b the row's means of γ dy ŝ and of γ dy
    dγ = Σ dy ŝ, dβ = Σ dy over all rows

A program of the backward walks over rows and leaves its part of dγ and dβ; `sum` adds the parts up
in a fixed order. The sum's own gradient, which comes beside dy, is added to ds on the way.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import card

MOST = 2048  # numbers in a row: a program holds it in registers
# (elements, warps): candidates, the first is the default.
FORWARD_TILES, BACKWARD_TILES = ((2048, 4), (2048, 8)), ((2048, 8), (1024, 4))
FLOAT32_BACKWARD_TILES = ((2048, 16),)  # with fewer warps it spills on 8.0 or on 12.0
PROGRAMS, LEAST_ROWS = 264, 4  # of the backward: two per multiprocessor of Hopper; rows of each


def reference(x, weight, bias, eps, h=None):
    """The same in PyTorch, what the kernels are compared with: y, or (s, y)."""
    s = x if h is None else x + h
    y = F.layer_norm(s, s.shape[-1:], weight, bias, eps)
    return y if h is None else (s, y)


@triton.jit
def _normalize(
    X,  # (rows, C) in
    H,  # (rows, C) in, if ADD; else None
    Weight,  # (C,) γ
    Bias,  # (C,) β
    S,  # (rows, C) out, if ADD: x + h; else None
    Y,  # (rows, C) out
    Statistics,  # (2, rows) fp32 out: mean and rstd
    rows, C, eps,
    ADD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_R
    base = first.to(tl.int64) * C
    row, column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    inside = column < C
    mask = (first + row < rows)[:, None] & inside[None, :]
    offsets = row[:, None] * C + column[None, :]
    s = tl.load(X + base + offsets, mask=mask, other=0.0)
    if ADD:
        h = tl.load(H + base + offsets, mask=mask, other=0.0)
        s = (s.to(tl.float32) + h.to(tl.float32)).to(s.dtype)  # rounded, as it is written
        tl.store(S + base + offsets, s, mask=mask)
    s = s.to(tl.float32)
    mean = tl.sum(s, axis=1) / C
    centered = tl.where(mask, s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / C + eps)
    weight = tl.load(Weight + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(Bias + column, mask=inside, other=0.0).to(tl.float32)
    y = centered * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(Y + base + offsets, y, mask=mask)
    tl.store(Statistics + first + row, mean, mask=first + row < rows)
    tl.store(Statistics + rows + first + row, rstd, mask=first + row < rows)


@triton.jit
def _normalize_backward(
    dY,  # (rows, C) in
    dS,  # (rows, C) in, if ADD: the sum's own; else None
    S,  # (rows, C)
    Weight,  # (C,)
    Statistics,  # (2, rows) fp32: mean and rstd
    dX,  # (rows, C) out
    Partial,  # (2, programs, C) fp32 out: dγ and dβ of each program's rows
    rows, C, chunk_rows,
    ADD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    first = program * chunk_rows
    last = tl.minimum(first + chunk_rows, rows)
    column = tl.arange(0, BLOCK_C)
    inside = column < C
    weight = tl.load(Weight + column, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    d_bias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    offsets = tl.arange(0, BLOCK_R)[:, None] * C + column[None, :]
    base = first.to(tl.int64) * C
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < last)[:, None] & inside[None, :]
        mean = tl.load(Statistics + row, mask=row < last, other=0.0)
        rstd = tl.load(Statistics + rows + row, mask=row < last, other=0.0)
        s = tl.load(S + base + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dY + base + offsets, mask=mask, other=0.0).to(tl.float32)
        s_hat = tl.where(mask, (s - mean[:, None]) * rstd[:, None], 0.0)
        d_weight += dy * s_hat
        d_bias += dy
        dy = dy * weight[None, :]
        a, b = tl.sum(dy * s_hat, axis=1) / C, tl.sum(dy, axis=1) / C
        dx = rstd[:, None] * (dy - a[:, None] * s_hat - b[:, None])
        if ADD:
            dx += tl.load(dS + base + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dX + base + offsets, dx, mask=mask)
        base += BLOCK_R * C
    Partial += program * C + column
    tl.store(Partial, tl.sum(d_weight, axis=0), mask=inside)
    tl.store(Partial + programs.to(tl.int64) * C, tl.sum(d_bias, axis=0), mask=inside)


def _tile(C: int, elements: int, warps: int) -> dict:
    """Whole rows, as many as fit the tile: one at least."""
    block_c = triton.next_power_of_2(C)
    return {"BLOCK_R": max(1, elements // block_c), "BLOCK_C": block_c, "num_warps": warps}


def _backward_tiles(dtype: torch.dtype) -> tuple[tuple[int, int], ...]:
    return FLOAT32_BACKWARD_TILES if dtype == torch.float32 else BACKWARD_TILES


def candidates(dtype: torch.dtype, backward: bool) -> tuple[int, ...]:
    """How many tiles there are to choose from, for each kernel."""
    return tuple(len(t) for t in (FORWARD_TILES, _backward_tiles(dtype))[: 1 + backward])


@torch.library.custom_op("minibooth::layer_norm", mutates_args=())
@card.launched_where_its_input_is
def _layer_norm(
    x: torch.Tensor,
    h: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    choices: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    add, C = h is not None, x.shape[-1]
    x, rows = x.contiguous(), x.numel() // C
    h, s = (h.contiguous(), torch.empty_like(x)) if add else (None, None)
    y, statistics = torch.empty_like(x), x.new_empty(2, rows, dtype=torch.float32)
    tile = _tile(C, *FORWARD_TILES[card.chosen(choices, 0)])
    grid = (triton.cdiv(rows, tile["BLOCK_R"]),)
    _normalize[grid](x, h, weight, bias, s, y, statistics, rows, C, eps, ADD=add, **tile)
    return s if add else x.new_empty(0), y, statistics


@_layer_norm.register_fake
def _(x, h, weight, bias, eps, choices):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    statistics = x.new_empty(2, x.numel() // x.shape[-1], dtype=torch.float32)
    return x.new_empty(0) if h is None else torch.empty_like(y), y, statistics


@torch.library.custom_op("minibooth::layer_norm_backward", mutates_args=())
@card.launched_where_its_input_is
def _layer_norm_backward(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor,
    statistics: torch.Tensor,
    choices: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    add, C = ds is not None, s.shape[-1]
    s, dy, rows = s.contiguous(), dy.contiguous(), s.numel() // C
    ds, dx = ds.contiguous() if add else None, torch.empty_like(s)
    tile = _tile(C, *_backward_tiles(s.dtype)[card.chosen(choices, 1)])
    least = max(LEAST_ROWS, triton.cdiv(rows, PROGRAMS))
    chunk_rows = triton.cdiv(least, tile["BLOCK_R"]) * tile["BLOCK_R"]
    programs = triton.cdiv(rows, chunk_rows)
    partial = s.new_empty(2, programs, C, dtype=torch.float32)
    arguments = (dy, ds, s, weight, statistics, dx, partial, rows, C, chunk_rows)
    _normalize_backward[(programs,)](*arguments, ADD=add, **tile)
    return dx, partial.sum(1).to(weight.dtype)  # dγ and dβ in one tensor (2, C)


@_layer_norm_backward.register_fake
def _(dy, ds, s, weight, statistics, choices):
    dx = torch.empty_like(s, memory_format=torch.contiguous_format)
    return dx, weight.new_empty(2, s.shape[-1])


def _setup_context(ctx, inputs, output):
    x, h, weight, _, _, ctx.choices = inputs
    s, _, statistics = output
    ctx.add = h is not None
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.save_for_backward(s if ctx.add else x, weight, statistics)


def _autograd_backward(ctx, ds, dy, _):
    ds = ds if ctx.add else None
    if dy is None:  # the norm was not used
        return ds, ds, None, None, None, None
    dx, (dweight, dbias) = _layer_norm_backward(dy, ds, *ctx.saved_tensors, ctx.choices)
    return dx, dx if ctx.add else None, dweight, dbias, None, None


_layer_norm.register_autograd(_autograd_backward, setup_context=_setup_context)


def unsupported(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, h: torch.Tensor | None = None
) -> str | None:
    """Why the kernel cannot take these arguments, in one line; None if it can."""
    if reason := card.unsupported(x):
        return reason
    C = x.shape[-1]
    if C > MOST:
        return f"a row of {C} numbers is too long: {MOST} at most"
    if x.numel() // C >= 2**31 - MOST:
        return "the kernel counts rows in 32 bits"
    if any(p is None or p.shape != (C,) or not p.is_contiguous() for p in (weight, bias)):
        return "weight and bias must be contiguous, one value for each number of a row"
    if h is not None and (h.shape, h.dtype, h.device) != (x.shape, x.dtype, x.device):
        return "what is added must be like x"
    return None


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    h: torch.Tensor | None = None,
    choices: Sequence[int] = (),
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm over the last dimension: one differentiable operator.

    x, h: (…, C), fp16, bf16 or fp32, C up to 2048; weight, bias: (C,), of x's dtype or another
    choices: which candidate of the tiles the forward takes, and which the backward
    Returns y of x's shape and dtype; with h (x + h, y), y of the rounded sum. Statistics are fp32;
    two runs give equal bits, gradients included. Raises ValueError for what the kernel cannot take.
    """
    if reason := unsupported(x, weight, bias, h):
        raise ValueError(reason)
    s, y, _ = _layer_norm(x, h, weight, bias, eps, choices)
    return y if h is None else (s, y)
