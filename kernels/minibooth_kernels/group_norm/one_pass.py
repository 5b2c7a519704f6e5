"""A group that fits in registers: one program per sample and group, read once, write once."""

import torch.nn.functional as F
import triton
import triton.language as tl

from .parts import _affine, _offsets, _silu_backward


def reference(x, num_groups, weight, bias, eps, silu=False, shift=None):
    """The same in PyTorch, what the kernels are compared with."""
    if shift is not None:
        x = x + shift.reshape(*shift.shape, *[1] * (x.ndim - 2))
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y) if silu else y


@triton.jit
def _group(g, group_channels, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and channels of a group's tile. Groups start at multiples of UNIT: wider loads."""
    first = tl.multiple_of(g * group_channels, UNIT)
    last = tl.multiple_of((g + 1) * group_channels, UNIT)
    channels = first + tl.arange(0, BLOCK_C)
    return tl.arange(0, BLOCK_R), channels, channels < last


@triton.jit
def _forward_one_pass(
    X,  # (N, R, C) in
    Weight,  # (C,) γ
    Bias,  # (C,) β
    Shift,  # (N, C), if SHIFTED; else None
    Y,  # (N, R, C) out
    Mean,  # (N, C) fp32 out: a group's mean, less the channel's shift
    Rstd,  # (N, C) fp32 out, a group's channels alike
    R, C, group_channels, eps,
    SILU: tl.constexpr, SHIFTED: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    g, n = tl.program_id(0), tl.program_id(1)
    rows, channels, channel_mask = _group(g, group_channels, UNIT, BLOCK_R, BLOCK_C)
    mask = (rows < R)[:, None] & channel_mask[None, :]
    offsets = _offsets(rows, channels, R, C, CHANNELS_LAST)
    sample = n.to(tl.int64) * R * C
    x = tl.load(X + sample + offsets, mask=mask, other=0.0).to(tl.float32)
    shift = tl.zeros([BLOCK_C], tl.float32)
    if SHIFTED:
        shift += tl.load(Shift + n * C + channels, mask=channel_mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x + shift[None, :], 0.0)

    size = R * group_channels
    mean = tl.sum(x) / size
    centered = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered) / size + eps)
    z, _ = _affine(centered * rstd, channels, channel_mask, Weight, Bias)
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(Y + sample + offsets, z, mask=mask)
    tl.store(Mean + n * C + channels, mean - shift, mask=channel_mask)
    tl.store(Rstd + n * C + channels, tl.zeros_like(shift) + rstd, mask=channel_mask)


@triton.jit
def _backward_one_pass(
    dY,  # (N, R, C) in
    X,  # (N, R, C)
    Weight,  # (C,)
    Bias,  # (C,)
    Mean,  # (N, C) fp32: a group's mean, less the channel's shift
    Rstd,  # (N, C) fp32, a group's channels alike
    dX,  # (N, R, C) out
    Sums,  # (2, N, C) fp32 out: Σ dz·x̂ and Σ dz over the rows, which sum over n to dγ and dβ
    R, C, group_channels,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    g, n = tl.program_id(0), tl.program_id(1)
    rows, channels, channel_mask = _group(g, group_channels, UNIT, BLOCK_R, BLOCK_C)
    mask = (rows < R)[:, None] & channel_mask[None, :]
    offsets = _offsets(rows, channels, R, C, CHANNELS_LAST)
    sample = n.to(tl.int64) * R * C
    x = tl.load(X + sample + offsets, mask=mask, other=0.0).to(tl.float32)
    dz = tl.load(dY + sample + offsets, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(Mean + n * C + channels, mask=channel_mask, other=0.0)
    rstd = tl.load(Rstd + n * C + g * group_channels)

    x_hat = (x - mean[None, :]) * rstd
    z, weight = _affine(x_hat, channels, channel_mask, Weight, Bias)
    if SILU:
        dz = _silu_backward(z, dz)
    sum_dz_x = tl.sum(dz * x_hat, axis=0)
    sum_dz = tl.sum(dz, axis=0)
    tl.store(Sums + n * C + channels, sum_dz_x, mask=channel_mask)
    tl.store(Sums + (tl.num_programs(1) + n) * C + channels, sum_dz, mask=channel_mask)

    size = R * group_channels
    # dx = rstd (γ dz − a x̂ − b), a and b the group's means of γ dz x̂ and of γ dz.
    a = tl.sum(weight * sum_dz_x) / size
    b = tl.sum(weight * sum_dz) / size
    dx = rstd * (weight[None, :] * dz - a * x_hat - b)
    tl.store(dX + sample + offsets, dx, mask=mask)
