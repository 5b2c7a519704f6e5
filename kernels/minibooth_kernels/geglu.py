"""GEGLU (Shazeer 2020): the first half of each row, gated by the second.

    x = (h, g)        y = h · GELU(g)        GELU(g) = g Φ(g), Φ(g) = (1 + erf(g / √2)) / 2

Backward, with φ the density of the unit Gaussian:

    dh = dy · GELU(g)        dg = dy · h · (Φ(g) + g φ(g))

PyTorch writes GELU(g) and reads it again; and, backward, three tensors more and how they stand side
by side. Nothing but x is kept for the backward.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import card

TILE = {"BLOCK_R": 8, "BLOCK_C": 256, "num_warps": 4}


def reference(x):
    """The same in PyTorch, what the kernels are compared with."""
    h, gate = x.chunk(2, dim=-1)
    return h * F.gelu(gate)


@triton.jit
def _share(g):
    """Φ: the share of a unit Gaussian that is below g."""
    return 0.5 * (1 + tl.math.erf(g * 0.7071067811865476))


@triton.jit
def _places(rows, hidden, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of a tile: its first row, its rows and columns, and which of them are there."""
    first = tl.program_id(0) * BLOCK_R
    row = tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (first + row < rows)[:, None] & (column < hidden)[None, :]
    return first.to(tl.int64), row[:, None], column[None, :], mask


@triton.jit
def _gate(
    X,  # (rows, 2 · hidden) in
    Y,  # (rows, hidden) out
    rows, hidden,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first, row, column, mask = _places(rows, hidden, BLOCK_R, BLOCK_C)
    X += first * 2 * hidden + row * 2 * hidden + column
    h = tl.load(X, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(X + hidden, mask=mask, other=0.0).to(tl.float32)
    tl.store(Y + first * hidden + row * hidden + column, h * g * _share(g), mask=mask)


@triton.jit
def _gate_backward(
    dY,  # (rows, hidden) in
    X,  # (rows, 2 · hidden)
    dX,  # (rows, 2 · hidden) out
    rows, hidden,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first, row, column, mask = _places(rows, hidden, BLOCK_R, BLOCK_C)
    offsets = first * 2 * hidden + row * 2 * hidden + column
    h = tl.load(X + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(X + offsets + hidden, mask=mask, other=0.0).to(tl.float32)
    dY += first * hidden + row * hidden + column
    dy = tl.load(dY, mask=mask, other=0.0).to(tl.float32)
    share = _share(g)
    density = 0.3989422804014327 * tl.exp(-0.5 * g * g)
    tl.store(dX + offsets, dy * g * share, mask=mask)
    tl.store(dX + offsets + hidden, dy * h * (share + g * density), mask=mask)


def _launch(kernel, *arguments: torch.Tensor, hidden: int) -> None:
    rows = arguments[0].numel() // arguments[0].shape[-1]
    grid = (triton.cdiv(rows, TILE["BLOCK_R"]), triton.cdiv(hidden, TILE["BLOCK_C"]))
    kernel[grid](*arguments, rows, hidden, **TILE)


@torch.library.custom_op("minibooth::geglu", mutates_args=())
@card.launched_where_its_input_is
def _geglu(x: torch.Tensor) -> torch.Tensor:
    hidden = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], hidden)
    _launch(_gate, x.contiguous(), y, hidden=hidden)
    return y


@_geglu.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("minibooth::geglu_backward", mutates_args=())
@card.launched_where_its_input_is
def _geglu_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    dx = torch.empty_like(x)
    _launch(_gate_backward, dy.contiguous(), x, dx, hidden=dy.shape[-1])
    return dx


@_geglu_backward.register_fake
def _(dy, x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd_backward(ctx, dy):
    return _geglu_backward(dy, *ctx.saved_tensors)


_geglu.register_autograd(_autograd_backward, setup_context=_setup_context)


def unsupported(x: torch.Tensor) -> str | None:
    """Why the kernel cannot take x, in one line; None if it can."""
    if reason := card.unsupported(x):
        return reason
    if x.shape[-1] % 2:
        return f"{x.shape[-1]} numbers have no half"
    if x.shape[-1] // 2 > 65_535 * TILE["BLOCK_C"] or x.numel() // x.shape[-1] >= 2**31 - 8:
        return f"CUDA has no grid for a tensor of shape {tuple(x.shape)}"
    return None


def geglu(x: torch.Tensor) -> torch.Tensor:
    """h · GELU(g) of x = (h, g): (…, 2 · hidden) → (…, hidden), fp16, bf16 or fp32.

    One differentiable operator. Two runs give equal bits, gradients included. Raises ValueError for
    what the kernel cannot take.
    """
    if reason := unsupported(x):
        raise ValueError(reason)
    return _geglu(x)
