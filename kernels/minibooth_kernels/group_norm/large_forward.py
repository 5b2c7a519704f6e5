"""A group too large for registers, forward: partial statistics, their combination, a second pass.

The formula is one_pass.reference. What the second pass multiplies and adds depends on the channel
alone, so the kernel between the two, which is small, works it out once:

    y = γ (x − mean) rstd + β = scale · x + offset       scale = γ rstd, offset = β − mean · scale

So does what is added to a channel before the norm: it moves the channel's mean and nothing else.
"""

import triton
import triton.language as tl

from .parts import _offsets, _vector


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
    Weight,  # (C,)
    Bias,  # (C,)
    Shift,  # (N, C), if SHIFTED; else None
    Mean,  # (N, C) fp32 out: a group's mean, less the channel's shift
    Rstd,  # (N, C) fp32 out, a group's channels alike
    Affine,  # (2, N, C) fp32 out: scale and offset
    R, C, group_channels, chunk_rows, eps,
    SHIFTED: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    g, n = tl.program_id(0), tl.program_id(1)
    N = tl.num_programs(1)
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
            if SHIFTED:
                shift = tl.load(Shift + n * C + channels, mask=mask, other=0.0)
                mean_i += shift.to(tl.float32)
            M2_i = tl.load(partial + chunks * N * C, mask=mask, other=0.0)
            rows = tl.minimum(R - chunk * chunk_rows, chunk_rows).to(tl.float32)  # the last: fewer
            count_i = tl.where(mask, rows[:, None], 0.0)
            # Many sets at once: M2 = Σ M2_i + Σ count_i (mean_i − mean)², then Chan as above.
            count_b = tl.sum(count_i)
            mean_b = tl.sum(count_i * mean_i) / count_b
            deviation = mean_i - mean_b
            M2_b = tl.sum(M2_i + count_i * deviation * deviation)
            count, mean, M2 = _merge(count, mean, M2, count_b, mean_b, M2_b)
    rstd = tl.rsqrt(M2 / count + eps)
    for first_channel in range(0, group_channels, BLOCK_C):
        channel = first_channel + tl.arange(0, BLOCK_C)
        mask = channel < group_channels
        channels = g * group_channels + channel
        scale = rstd * tl.load(Weight + channels, mask=mask, other=0.0).to(tl.float32)
        bias = tl.load(Bias + channels, mask=mask, other=0.0).to(tl.float32)
        mean_c = tl.zeros_like(scale) + mean
        if SHIFTED:
            mean_c -= tl.load(Shift + n * C + channels, mask=mask, other=0.0).to(tl.float32)
        tl.store(Mean + n * C + channels, mean_c, mask=mask)
        tl.store(Rstd + n * C + channels, tl.zeros_like(scale) + rstd, mask=mask)
        tl.store(Affine + n * C + channels, scale, mask=mask)
        tl.store(Affine + (N + n) * C + channels, bias - mean_c * scale, mask=mask)


@triton.jit
def _apply(
    X,  # (N, R, C) in
    Affine,  # (2, N, C) fp32: scale and offset
    Y,  # (N, R, C) out
    R, C,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, N = tl.program_id(2), tl.num_programs(2)
    X += n.to(tl.int64) * R * C
    Y += n.to(tl.int64) * R * C
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale, offset = _vector(Affine, n, channels, C), _vector(Affine, N + n, channels, C)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (rows < R)[:, None] & (channels < C)[None, :]
    offsets = _offsets(rows, channels, R, C, CHANNELS_LAST)
    x = tl.load(X + offsets, mask=mask, other=0.0).to(tl.float32)
    z = scale[None, :] * x + offset[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(Y + offsets, z, mask=mask)
