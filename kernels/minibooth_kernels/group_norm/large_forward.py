"""A group too large for registers, forward: partial statistics, their combination, a second pass.

The formula is one_pass.reference.
"""

import triton
import triton.language as tl

from .parts import _affine, _offsets, _per_channel


@triton.jit
def _merge(count, mean, M2, count_b, mean_b, M2_b):
    """Mean and sum of squared deviations of two sets together (Chan, Golub & LeVeque 1979).

    E[x²] − E[x]² would be shorter, and wrong where the mean is large and the variance small.
    """
    total = count + count_b
    delta = mean_b - mean
    share = tl.where(total > 0, count_b / tl.maximum(total, 1.0), 0.0)
    return total, mean + delta * share, M2 + M2_b + delta * delta * count * share


@triton.jit
def _partial_statistics(
    X,  # (N, R, C) in
    Partial,  # (2, chunks, N, C) fp32 out: mean and sum of squared deviations of each chunk
    R, C, chunk_rows,
    CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk, n = tl.program_id(0), tl.program_id(2)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    X += n.to(tl.int64) * R * C
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, R)

    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    M2 = tl.zeros([BLOCK_C], tl.float32)
    for row in range(first, last, BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        mask = (rows < last)[:, None] & (channels < C)[None, :]
        x = tl.load(X + _offsets(rows, channels, R, C, CHANNELS_LAST), mask=mask, other=0.0)
        x = x.to(tl.float32)
        count_b = tl.minimum(last - row, BLOCK_R).to(tl.float32)
        mean_b = tl.sum(x, axis=0) / count_b
        centered = tl.where(mask, x - mean_b[None, :], 0.0)
        M2_b = tl.sum(centered * centered, axis=0)
        count, mean, M2 = _merge(count, mean, M2, count_b, mean_b, M2_b)

    Partial += (chunk * tl.num_programs(2) + n) * C + channels
    tl.store(Partial, mean, mask=channels < C)
    plane = tl.num_programs(0) * tl.num_programs(2) * C
    tl.store(Partial + plane, M2, mask=channels < C)


@triton.jit
def _combine_statistics(
    Partial,  # (2, chunks, N, C) fp32 in
    Mean,  # (N, G) fp32 out
    Rstd,  # (N, G) fp32 out
    R, C, group_channels, chunk_rows, eps,
    BLOCK_CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    g, n = tl.program_id(0), tl.program_id(1)
    G, N = tl.num_programs(0), tl.num_programs(1)
    chunks = tl.cdiv(R, chunk_rows)
    count, mean, M2 = 0.0, 0.0, 0.0
    for first_chunk in range(0, chunks, BLOCK_CHUNKS):
        for first_channel in range(0, group_channels, BLOCK_C):
            chunk = first_chunk + tl.arange(0, BLOCK_CHUNKS)
            channel = first_channel + tl.arange(0, BLOCK_C)
            mask = (chunk < chunks)[:, None] & (channel < group_channels)[None, :]
            channels = g * group_channels + channel[None, :]
            partial = Partial + (chunk[:, None] * N + n) * C + channels
            mean_i = tl.load(partial, mask=mask, other=0.0)
            M2_i = tl.load(partial + chunks * N * C, mask=mask, other=0.0)
            rows = tl.minimum(R - chunk * chunk_rows, chunk_rows).to(tl.float32)  # the last: fewer
            count_i = tl.where(mask, rows[:, None], 0.0)
            # Many sets at once: M2 = Σ M2_i + Σ count_i (mean_i − mean)², then Chan as above.
            count_b = tl.sum(count_i)
            mean_b = tl.sum(count_i * mean_i) / count_b
            deviation = mean_i - mean_b
            M2_b = tl.sum(M2_i + count_i * deviation * deviation)
            count, mean, M2 = _merge(count, mean, M2, count_b, mean_b, M2_b)
    tl.store(Mean + n * G + g, mean)
    tl.store(Rstd + n * G + g, tl.rsqrt(M2 / count + eps))


@triton.jit
def _apply(
    X,  # (N, R, C) in
    Weight,  # (C,)
    Bias,  # (C,)
    Mean,  # (N, G) fp32
    Rstd,  # (N, G) fp32
    Y,  # (N, R, C) out
    R, C, group_channels,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2)
    X += n.to(tl.int64) * R * C
    Y += n.to(tl.int64) * R * C
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = _per_channel(Mean, n, channels, C, group_channels)
    rstd = _per_channel(Rstd, n, channels, C, group_channels)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (rows < R)[:, None] & (channels < C)[None, :]
    offsets = _offsets(rows, channels, R, C, CHANNELS_LAST)
    x = tl.load(X + offsets, mask=mask, other=0.0).to(tl.float32)
    x_hat = (x - mean[None, :]) * rstd[None, :]
    z, _ = _affine(x_hat, channels, channels < C, Weight, Bias)
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(Y + offsets, z, mask=mask)
