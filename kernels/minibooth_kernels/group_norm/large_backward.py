"""A group too large for registers, backward: partial sums, their combination, a second pass.

The formula is one_pass._backward_one_pass's. As in the forward, the second pass gets what depends
on the channel alone from the kernel between the two. With x̂ = (x − mean) rstd

    z = γ x̂ + β = p x + t                       p = γ rstd, t = β − mean · p
    dx = rstd (γ dz − a x̂ − b) = p dz + q x + r  q = −a rstd², r = −b rstd − mean · q
"""

import triton
import triton.language as tl

from .parts import _offsets, _silu_backward, _vector


@triton.jit
def _backward_partial_sums(
    dY,  # (N, R, C) in
    X,  # (N, R, C)
    Weight,  # (C,)
    Bias,  # (C,)
    Mean,  # (N, C) fp32: a group's mean, less the channel's shift
    Rstd,  # (N, C) fp32, a group's channels alike
    Partial,  # (2, chunks, N, C) fp32 out: Σ dz·x̂ and Σ dz of each chunk
    R, C, chunk_rows,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk, n = tl.program_id(0), tl.program_id(2)
    X += n.to(tl.int64) * R * C
    dY += n.to(tl.int64) * R * C
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd = _vector(Mean, n, channels, C), _vector(Rstd, n, channels, C)
    weight, bias = _vector(Weight, 0, channels, C), _vector(Bias, 0, channels, C)
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
            dz = _silu_backward(weight[None, :] * x_hat + bias[None, :], dz)
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
    Bias,  # (C,)
    Mean,  # (N, C) fp32
    Rstd,  # (N, C) fp32
    Sums,  # (2, N, C) fp32 out, as in _backward_one_pass
    Coefficients,  # (4, N, C) fp32 out: p, q, r, t
    R, C, group_channels, chunk_rows,
    BLOCK_CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    g, n, N = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    chunks = tl.cdiv(R, chunk_rows)
    a, b = 0.0, 0.0  # the group's means of γ dz x̂ and of γ dz
    for first_channel in range(0, group_channels, BLOCK_C):
        channel = first_channel + tl.arange(0, BLOCK_C)
        channels = g * group_channels + channel
        channel_mask = channel < group_channels
        sum_dz_x = tl.zeros([BLOCK_C], tl.float32)
        sum_dz = tl.zeros([BLOCK_C], tl.float32)
        for first_chunk in range(0, chunks, BLOCK_CHUNKS):
            chunk = first_chunk + tl.arange(0, BLOCK_CHUNKS)
            mask = (chunk < chunks)[:, None] & channel_mask[None, :]
            partial = Partial + (chunk[:, None] * N + n) * C + channels[None, :]
            sum_dz_x += tl.sum(tl.load(partial, mask=mask, other=0.0), axis=0)
            sum_dz += tl.sum(tl.load(partial + chunks * N * C, mask=mask, other=0.0), axis=0)
        tl.store(Sums + n * C + channels, sum_dz_x, mask=channel_mask)
        tl.store(Sums + (N + n) * C + channels, sum_dz, mask=channel_mask)
        weight = tl.load(Weight + channels, mask=channel_mask, other=0.0).to(tl.float32)
        a += tl.sum(weight * sum_dz_x) / (R * group_channels)
        b += tl.sum(weight * sum_dz) / (R * group_channels)

    for first_channel in range(0, group_channels, BLOCK_C):
        channel = first_channel + tl.arange(0, BLOCK_C)
        channels = g * group_channels + channel
        channel_mask = channel < group_channels
        mean = tl.load(Mean + n * C + channels, mask=channel_mask, other=0.0)
        rstd = tl.load(Rstd + n * C + channels, mask=channel_mask, other=0.0)
        p = rstd * tl.load(Weight + channels, mask=channel_mask, other=0.0).to(tl.float32)
        q = -a * rstd * rstd
        r = -b * rstd - mean * q
        t = tl.load(Bias + channels, mask=channel_mask, other=0.0).to(tl.float32) - mean * p
        out, plane = Coefficients + n * C + channels, N * C
        tl.store(out, p, mask=channel_mask)
        tl.store(out + plane, q, mask=channel_mask)
        tl.store(out + 2 * plane, r, mask=channel_mask)
        tl.store(out + 3 * plane, t, mask=channel_mask)


@triton.jit
def _backward_apply(
    dY,  # (N, R, C) in
    X,  # (N, R, C)
    Coefficients,  # (4, N, C) fp32: p, q, r, t
    dX,  # (N, R, C) out
    R, C,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, N = tl.program_id(2), tl.num_programs(2)
    X += n.to(tl.int64) * R * C
    dY += n.to(tl.int64) * R * C
    dX += n.to(tl.int64) * R * C
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p, q = _vector(Coefficients, n, channels, C), _vector(Coefficients, N + n, channels, C)
    r = _vector(Coefficients, 2 * N + n, channels, C)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (rows < R)[:, None] & (channels < C)[None, :]
    offsets = _offsets(rows, channels, R, C, CHANNELS_LAST)
    x = tl.load(X + offsets, mask=mask, other=0.0).to(tl.float32)
    dz = tl.load(dY + offsets, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        t = _vector(Coefficients, 3 * N + n, channels, C)
        dz = _silu_backward(p[None, :] * x + t[None, :], dz)
    tl.store(dX + offsets, p[None, :] * dz + (q[None, :] * x + r[None, :]), mask=mask)
