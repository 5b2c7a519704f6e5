"""GroupNorm with an optional SiLU behind it, forward and backward (Wu & He 2018; SiLU: z·σ(z)), of
x or of x plus a number for each sample and channel: a shift, which needs no pass of its own.

The statistics are one mean and one variance per sample and group of channels, N × G of each:

    x̂ = (x − mean) · rstd        rstd = 1 / sqrt(var + eps)
    z = γ x̂ + β                  y = z, or z·σ(z)

Two ways, one result. A group that fits in registers takes one program: read once, write once.
A larger one takes three launches: every tile of rows × channels leaves per-channel partial
results, a small kernel combines them per group and works out what that means for each channel, and
a second pass over x writes y.

x is read as (N, R, C), R the product of the spatial sizes, in either memory layout: C next to
each other (channels_last) or R next to each other (contiguous). Only `_offsets` knows which.

parts.py is what the kernels share; one_pass.py holds both directions of a small group, beside the
formula in PyTorch; large_forward.py and large_backward.py those of a large one; tiles.py says which
it is. Here stand the launches and the operator.
"""

from collections.abc import Sequence

import torch

from .. import card
from .large_backward import _backward_apply, _backward_combine, _backward_partial_sums
from .large_forward import _apply, _combine_statistics, _partial_statistics
from .one_pass import _backward_one_pass, _forward_one_pass, reference
from .tiles import BACKWARD_TILES, COMBINE, FORWARD_TILES, _one_pass, _two_pass


def _dense(x):
    """x itself in either of the two layouts, a copy only of what is in neither."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def _matching(dy, x):
    """dy in x's layout: itself, unless autograd brings another."""
    same = dy.is_contiguous() if x.is_contiguous() else dy.movedim(1, -1).is_contiguous()
    return dy if same else torch.empty_like(x).copy_(dy)


@torch.library.custom_op("minibooth::group_norm", mutates_args=())
@card.launched_where_its_input_is
def _group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
    shift: torch.Tensor | None,
    choices: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = _dense(x)
    N, C = x.shape[:2]
    R, G = x.numel() // (N * C), num_groups
    sizes = (R, C, C // G)
    channels_last = not x.is_contiguous()
    layout = {"CHANNELS_LAST": channels_last}
    y = torch.empty_like(x)
    shifted = shift is not None
    shift = shift.contiguous() if shifted else None
    mean = x.new_empty(N, C, dtype=torch.float32)  # a group's, less each channel's shift
    rstd = torch.empty_like(mean)

    tile = _one_pass(R, C // G, FORWARD_TILES, channels_last)
    if tile and card.chosen(choices, 0) == 0:
        arguments = (x, weight, bias, shift, y, mean, rstd, *sizes, eps)
        _forward_one_pass[(G, N)](*arguments, SILU=silu, SHIFTED=shifted, **layout, **tile)
    else:
        tiles, chunks, chunk_rows, tile = _two_pass(N, R, C, channels_last)
        partial = x.new_empty(2, chunks[0], N, C, dtype=torch.float32)
        _partial_statistics[chunks](x, partial, R, C, chunk_rows, **layout, **tile)
        affine = x.new_empty(2, N, C, dtype=torch.float32)
        arguments = (partial, weight, bias, shift, mean, rstd, affine, *sizes, chunk_rows, eps)
        _combine_statistics[(G, N)](*arguments, SHIFTED=shifted, **COMBINE)
        _apply[tiles](x, affine, y, R, C, SILU=silu, **layout, **tile)
    return y, mean, rstd


@_group_norm.register_fake
def _(x, num_groups, weight, bias, eps, silu, shift, choices):
    statistics = x.new_empty(x.shape[:2], dtype=torch.float32)
    return torch.empty_like(_dense(x)), statistics, torch.empty_like(statistics)


@torch.library.custom_op("minibooth::group_norm_backward", mutates_args=())
@card.launched_where_its_input_is
def _group_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    silu: bool,
    choices: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    x = _dense(x)
    dy = _matching(dy, x)
    N, C = x.shape[:2]
    R, G = x.numel() // (N * C), num_groups
    sizes = (R, C, C // G)
    channels_last = not x.is_contiguous()
    layout = {"SILU": silu, "CHANNELS_LAST": channels_last}
    inputs = (dy, x, weight, bias, mean, rstd)
    dx = torch.empty_like(x)
    sums = x.new_empty(2, N, C, dtype=torch.float32)

    tile = _one_pass(R, C // G, BACKWARD_TILES, channels_last)
    if tile and card.chosen(choices, 1) == 0:
        _backward_one_pass[(G, N)](*inputs, dx, sums, *sizes, **layout, **tile)
    else:
        tiles, chunks, chunk_rows, tile = _two_pass(N, R, C, channels_last)
        partial = x.new_empty(2, chunks[0], N, C, dtype=torch.float32)
        coefficients = x.new_empty(4, N, C, dtype=torch.float32)
        _backward_partial_sums[chunks](*inputs, partial, R, C, chunk_rows, **layout, **tile)
        arguments = (partial, *inputs[2:], sums, coefficients, *sizes, chunk_rows)
        _backward_combine[(G, N)](*arguments, **COMBINE)
        _backward_apply[tiles](dy, x, coefficients, dx, R, C, **layout, **tile)
    return dx, sums.sum(1).to(weight.dtype)  # dγ and dβ in one tensor (2, C)


@_group_norm_backward.register_fake
def _(dy, x, num_groups, weight, bias, mean, rstd, silu, choices):
    return torch.empty_like(_dense(x)), weight.new_empty(2, x.shape[1])


def _setup_context(ctx, inputs, output):
    x, ctx.num_groups, weight, bias, _, ctx.silu, shift, ctx.choices = inputs
    ctx.shifted = shift is not None
    ctx.set_materialize_grads(False)  # no zeros for mean and rstd, which have no gradient
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _autograd_backward(ctx, dy, *_):
    x, weight, bias, mean, rstd = ctx.saved_tensors
    arguments = (dy, x, ctx.num_groups, weight, bias, mean, rstd, ctx.silu, ctx.choices)
    dx, (dweight, dbias) = _group_norm_backward(*arguments)
    dshift = dx.sum(tuple(range(2, dx.ndim))) if ctx.shifted else None
    return dx, None, dweight, dbias, None, None, dshift, None


_group_norm.register_autograd(_autograd_backward, setup_context=_setup_context)


def candidates(x: torch.Tensor, num_groups: int, backward: bool) -> tuple[int, ...]:
    """How many ways there are to choose from, forward and backward: a group that one program can
    hold may also go the way of the large ones."""
    R, channels_last = x[0, 0].numel(), not _dense(x).is_contiguous()
    tables = (FORWARD_TILES, BACKWARD_TILES)[: 1 + backward]
    group = x.shape[1] // num_groups
    return tuple(1 + bool(_one_pass(R, group, tiles, channels_last)) for tiles in tables)


def unsupported(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
) -> str | None:
    """Why the kernel cannot take these arguments, in one line; None if it can."""
    if reason := card.unsupported(x):
        return reason
    if x.ndim < 2 or x.shape[1] % num_groups:
        return f"{num_groups} groups do not divide a tensor of shape {tuple(x.shape)}"
    if x[0].numel() >= 2**31:
        return "the kernel counts a sample's elements in 32 bits"
    if x.shape[0] > 65_535:
        return f"CUDA has no grid of {x.shape[0]} samples: 65535 at most"
    if any(p is None or p.shape != x.shape[1:2] or not p.is_contiguous() for p in (weight, bias)):
        return "weight and bias must be contiguous, one value per channel"
    if shift is not None and (shift.shape != x.shape[:2] or shift.dtype != x.dtype):
        return "the shift must be one value of x's dtype per sample and channel"
    return None


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool = False,
    shift: torch.Tensor | None = None,
    choices: Sequence[int] = (),
) -> torch.Tensor:
    """GroupNorm, then SiLU if asked: one differentiable operator.

    x: (N, C, *spatial), fp16, bf16 or fp32, channels_last or contiguous (neither is copied)
    weight, bias: (C,), of x's dtype or another
    shift: (N, C), of x's dtype, what is added to x first
    choices: which of its `candidates` the forward takes, and which the backward
    Returns y of x's shape, dtype and layout. Statistics are fp32; two runs give equal bits,
    gradients included. Raises ValueError for what the kernel cannot take.
    """
    if reason := unsupported(x, num_groups, weight, bias, shift):
        raise ValueError(reason)
    return _group_norm(x, num_groups, weight, bias, eps, silu, shift, choices)[0]
