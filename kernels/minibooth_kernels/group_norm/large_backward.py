"""A group too large for registers, backward: partial sums, their combination, a second pass.

The formula is one_pass._backward_one_pass's.
"""

import triton
import triton.language as tl

from .parts import _affine, _offsets, _per_channel, _silu_backward


@triton.jit
def _backward_partial_sums(
    dY,  # (N, R, C) in
    X,  # (N, R, C)
    Weight,  # (C,)
    Bias,  # (C,)
    Mean,  # (N, G) fp32
    Rstd,  # (N, G) fp32
    Partial,  # (2, chunks, N, C) fp32 out: Σ dz·x̂ and Σ dz of each chunk
    R, C, group_channels, chunk_rows,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk, n = tl.program_id(0), tl.program_id(2)
    X += n.to(tl.int64) * R * C
    dY += n.to(tl.int64) * R * C
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = _per_channel(Mean, n, channels, C, group_channels)
    rstd = _per_channel(Rstd, n, channels, C, group_channels)
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, R)
    sum_dz_x = tl.zeros([BLOCK_C], tl.float32)
    sum_dz = tl.zeros([BLOCK_C], tl.float32)
    for row in range(first, last, BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        mask = (rows < last)[:, None] & (channels < C)[None, :]
        offsets = _offsets(rows, channels, R, C, CHANNELS_LAST)
        x = tl.load(X + offsets, mask=mask, other=0.0).to(tl.float32)
        dz = tl.load(dY + offsets, mask=mask, other=0.0).to(tl.float32)
        x_hat = (x - mean[None, :]) * rstd[None, :]
        if SILU:
            z, _ = _affine(x_hat, channels, channels < C, Weight, Bias)
            dz = _silu_backward(z, dz)
        sum_dz_x += tl.sum(dz * x_hat, axis=0)
        sum_dz += tl.sum(dz, axis=0)

    Partial += (chunk * tl.num_programs(2) + n) * C + channels
    tl.store(Partial, sum_dz_x, mask=channels < C)
    plane = tl.num_programs(0) * tl.num_programs(2) * C
    tl.store(Partial + plane, sum_dz, mask=channels < C)


@triton.jit
def _backward_combine(
    Partial,  # (2, chunks, N, C) fp32 in
    Weight,  # (C,)
    Sums,  # (2, N, C) fp32 out, as in _backward_one_pass
    Terms,  # (2, N, G) fp32 out: the group's means of γ·dz·x̂ and of γ·dz
    R, C, group_channels, chunk_rows,
    BLOCK_CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    g, n, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G, N = tl.num_programs(0), tl.num_programs(1)
    chunks = tl.cdiv(R, chunk_rows)
    Partial += which * chunks * N * C
    term = 0.0
    for first_channel in range(0, group_channels, BLOCK_C):
        channel = first_channel + tl.arange(0, BLOCK_C)
        channels = g * group_channels + channel
        channel_mask = channel < group_channels
        total = tl.zeros([BLOCK_C], tl.float32)
        for first_chunk in range(0, chunks, BLOCK_CHUNKS):
            chunk = first_chunk + tl.arange(0, BLOCK_CHUNKS)
            mask = (chunk < chunks)[:, None] & channel_mask[None, :]
            partial = Partial + (chunk[:, None] * N + n) * C + channels[None, :]
            total += tl.sum(tl.load(partial, mask=mask, other=0.0), axis=0)
        tl.store(Sums + (which * N + n) * C + channels, total, mask=channel_mask)
        weight = tl.load(Weight + channels, mask=channel_mask, other=0.0).to(tl.float32)
        term += tl.sum(weight * total)
    tl.store(Terms + (which * N + n) * G + g, term / (R * group_channels))


@triton.jit
def _backward_apply(
    dY,  # (N, R, C) in
    X,  # (N, R, C)
    Weight,  # (C,)
    Bias,  # (C,)
    Mean,  # (N, G) fp32
    Rstd,  # (N, G) fp32
    Terms,  # (2, N, G) fp32
    dX,  # (N, R, C) out
    R, C, group_channels,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, N = tl.program_id(2), tl.num_programs(2)
    X += n.to(tl.int64) * R * C
    dY += n.to(tl.int64) * R * C
    dX += n.to(tl.int64) * R * C
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = _per_channel(Mean, n, channels, C, group_channels)
    rstd = _per_channel(Rstd, n, channels, C, group_channels)
    a = _per_channel(Terms, n, channels, C, group_channels)
    b = _per_channel(Terms, N + n, channels, C, group_channels)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (rows < R)[:, None] & (channels < C)[None, :]
    offsets = _offsets(rows, channels, R, C, CHANNELS_LAST)
    x = tl.load(X + offsets, mask=mask, other=0.0).to(tl.float32)
    dz = tl.load(dY + offsets, mask=mask, other=0.0).to(tl.float32)
    x_hat = (x - mean[None, :]) * rstd[None, :]
    z, weight = _affine(x_hat, channels, channels < C, Weight, Bias)
    if SILU:
        dz = _silu_backward(z, dz)
    dx = rstd[None, :] * (weight[None, :] * dz - a[None, :] * x_hat - b[None, :])
    tl.store(dX + offsets, dx, mask=mask)
