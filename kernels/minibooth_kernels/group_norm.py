"""GroupNorm with an optional SiLU behind it, forward and backward (Wu & He 2018; SiLU: z·σ(z)).

The statistics are one mean and one variance per sample and group of channels, N × G of each:

    x̂ = (x − mean) · rstd        rstd = 1 / sqrt(var + eps)
    z = γ x̂ + β                  y = z, or z·σ(z)

Two ways, one result. A group that fits in registers takes one program: read once, write once.
A larger one takes three launches: every tile of rows × channels leaves per-channel partial
results, a small kernel combines them per group, and a second pass over x writes y.

x is read as (N, R, C), R the product of the spatial sizes, in either memory layout: C next to
each other (channels_last) or R next to each other (contiguous). Only `_offsets` knows which.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import card

# One program per group: (elements of the tile, warps), the smallest that fits is taken, for
# channels_last (True) or not. The backward holds x, dy and what is between them, so it stops at a
# quarter of the size; contiguous tensors spill a step earlier.
FORWARD_TILES = {True: ((4096, 4), (16384, 8), (32768, 16)), False: ((4096, 4), (16384, 8))}
BACKWARD_TILES = {True: ((4096, 4), (8192, 8)), False: ((4096, 8),)}
COMBINE = {"BLOCK_CHUNKS": 128, "BLOCK_C": 16, "num_warps": 4}
PROGRAMS = 1024  # that leave partial results: some eight per multiprocessor of a large card


def reference(x, num_groups, weight, bias, eps, silu=False):
    """The same in PyTorch, what the kernels are compared with."""
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y) if silu else y


@triton.jit
def _offsets(rows, channels, R, C, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        offsets = rows[:, None] * C + channels[None, :]
    else:
        offsets = rows[:, None] + channels[None, :] * R
    return offsets


@triton.jit
def _affine(x_hat, channels, mask, Weight, Bias):
    weight = tl.load(Weight + channels, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(Bias + channels, mask=mask, other=0.0).to(tl.float32)
    return x_hat * weight[None, :] + bias[None, :], weight


@triton.jit
def _per_channel(Groups, n, channels, C, group_channels):
    """Values of the groups of sample n, spread over their channels."""
    groups = n * (C // group_channels) + channels // group_channels
    return tl.load(Groups + groups, mask=channels < C, other=0.0)


@triton.jit
def _silu_backward(z, dy):
    """d(z·σ(z))/dz = σ(z) (1 + z (1 − σ(z)))."""
    sigma = tl.sigmoid(z)
    return dy * sigma * (1 + z * (1 - sigma))


@triton.jit
def _merge(count, mean, M2, count_b, mean_b, M2_b):
    """Mean and sum of squared deviations of two sets together (Chan, Golub & LeVeque 1979).

    E[x²] − E[x]² would be shorter, and wrong where the mean is large and the variance small.
    """
    total = count + count_b
    delta = mean_b - mean
    share = tl.where(total > 0, count_b / tl.maximum(total, 1.0), 0.0)
    return total, mean + delta * share, M2 + M2_b + delta * delta * count * share


# ---- one program per sample and group -----------------------------------------------------------


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
    Y,  # (N, R, C) out
    Mean,  # (N, G) fp32 out
    Rstd,  # (N, G) fp32 out
    R, C, group_channels, eps,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    g, n, G = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    rows, channels, channel_mask = _group(g, group_channels, UNIT, BLOCK_R, BLOCK_C)
    mask = (rows < R)[:, None] & channel_mask[None, :]
    offsets = _offsets(rows, channels, R, C, CHANNELS_LAST)
    sample = n.to(tl.int64) * R * C
    x = tl.load(X + sample + offsets, mask=mask, other=0.0).to(tl.float32)

    size = R * group_channels
    mean = tl.sum(x) / size
    centered = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered) / size + eps)
    z, _ = _affine(centered * rstd, channels, channel_mask, Weight, Bias)
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(Y + sample + offsets, z, mask=mask)
    tl.store(Mean + n * G + g, mean)
    tl.store(Rstd + n * G + g, rstd)


@triton.jit
def _backward_one_pass(
    dY,  # (N, R, C) in
    X,  # (N, R, C)
    Weight,  # (C,)
    Bias,  # (C,)
    Mean,  # (N, G) fp32
    Rstd,  # (N, G) fp32
    dX,  # (N, R, C) out
    Sums,  # (2, N, C) fp32 out: Σ dz·x̂ and Σ dz over the rows, which sum over n to dγ and dβ
    R, C, group_channels,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    g, n, G = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    rows, channels, channel_mask = _group(g, group_channels, UNIT, BLOCK_R, BLOCK_C)
    mask = (rows < R)[:, None] & channel_mask[None, :]
    offsets = _offsets(rows, channels, R, C, CHANNELS_LAST)
    sample = n.to(tl.int64) * R * C
    mean, rstd = tl.load(Mean + n * G + g), tl.load(Rstd + n * G + g)

    x_hat = (tl.load(X + sample + offsets, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
    dz = tl.load(dY + sample + offsets, mask=mask, other=0.0).to(tl.float32)
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


# ---- large groups: partial results, combination, second pass ------------------------------------


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


# ---- launches -----------------------------------------------------------------------------------


def _dense(x):
    """x itself in either of the two layouts, a copy only of what is in neither."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def _matching(dy, x):
    """dy in x's layout: itself, unless autograd brings another."""
    same = dy.is_contiguous() if x.is_contiguous() else dy.movedim(1, -1).is_contiguous()
    return dy if same else torch.empty_like(x).copy_(dy)


def _one_pass(R, group_channels, tiles, channels_last):
    """Constants and warps for one program per group, or None if the group is too large."""
    block_c = max(16, triton.next_power_of_2(group_channels))
    for elements, warps in tiles[channels_last]:
        if block_c <= 128 and R * block_c <= elements:
            tile = {"BLOCK_R": elements // block_c, "BLOCK_C": block_c, "num_warps": warps}
            return {"UNIT": math.gcd(group_channels, 8) if channels_last else 1, **tile}
    return None


def _two_pass(N, R, C, channels_last):
    """Grid of tiles; grid and rows of partial results; the tile, 32 elements a thread."""
    block_r, block_c = (64, 64) if channels_last else (1024, 4)
    tiles = (triton.cdiv(R, block_r), triton.cdiv(C, block_c), N)
    chunk_rows = max(1, math.prod(tiles) // PROGRAMS) * block_r
    partial = (triton.cdiv(R, chunk_rows), *tiles[1:])
    return tiles, partial, chunk_rows, {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": 4}


@torch.library.custom_op("minibooth::group_norm", mutates_args=())
@card.launched_where_its_input_is
def _group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = _dense(x)
    N, C = x.shape[:2]
    R, G = x.numel() // (N * C), num_groups
    sizes = (R, C, C // G)
    channels_last = not x.is_contiguous()
    layout = {"CHANNELS_LAST": channels_last}
    y = torch.empty_like(x)
    mean = x.new_empty(N, G, dtype=torch.float32)
    rstd = torch.empty_like(mean)

    if tile := _one_pass(R, C // G, FORWARD_TILES, channels_last):
        arguments = (x, weight, bias, y, mean, rstd, *sizes, eps)
        _forward_one_pass[(G, N)](*arguments, SILU=silu, **layout, **tile)
    else:
        tiles, chunks, chunk_rows, tile = _two_pass(N, R, C, channels_last)
        partial = x.new_empty(2, chunks[0], N, C, dtype=torch.float32)
        _partial_statistics[chunks](x, partial, R, C, chunk_rows, **layout, **tile)
        _combine_statistics[(G, N)](partial, mean, rstd, *sizes, chunk_rows, eps, **COMBINE)
        arguments = (x, weight, bias, mean, rstd, y, *sizes)
        _apply[tiles](*arguments, SILU=silu, **layout, **tile)
    return y, mean, rstd


@_group_norm.register_fake
def _(x, num_groups, weight, bias, eps, silu):
    statistics = x.new_empty(x.shape[0], num_groups, dtype=torch.float32)
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

    if tile := _one_pass(R, C // G, BACKWARD_TILES, channels_last):
        _backward_one_pass[(G, N)](*inputs, dx, sums, *sizes, **layout, **tile)
    else:
        tiles, chunks, chunk_rows, tile = _two_pass(N, R, C, channels_last)
        partial = x.new_empty(2, chunks[0], N, C, dtype=torch.float32)
        terms = x.new_empty(2, N, G, dtype=torch.float32)
        _backward_partial_sums[chunks](*inputs, partial, *sizes, chunk_rows, **layout, **tile)
        _backward_combine[(G, N, 2)](partial, weight, sums, terms, *sizes, chunk_rows, **COMBINE)
        _backward_apply[tiles](*inputs, terms, dx, *sizes, **layout, **tile)
    return dx, sums.sum(1).to(weight.dtype)  # dγ and dβ in one tensor (2, C)


@_group_norm_backward.register_fake
def _(dy, x, num_groups, weight, bias, mean, rstd, silu):
    return torch.empty_like(_dense(x)), weight.new_empty(2, x.shape[1])


def _setup_context(ctx, inputs, output):
    x, ctx.num_groups, weight, bias, _, ctx.silu = inputs
    ctx.set_materialize_grads(False)  # no zeros for mean and rstd, which have no gradient
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _autograd_backward(ctx, dy, *_):
    x, weight, bias, mean, rstd = ctx.saved_tensors
    arguments = (dy, x, ctx.num_groups, weight, bias, mean, rstd, ctx.silu)
    dx, (dweight, dbias) = _group_norm_backward(*arguments)
    return dx, None, dweight, dbias, None, None


_group_norm.register_autograd(_autograd_backward, setup_context=_setup_context)


def unsupported(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor
) -> str | None:
    """Why the kernel cannot take these arguments, in one line; None if it can."""
    if reason := card.unsupported(x):
        return reason
    if x.ndim < 2 or x.shape[1] % num_groups:
        return f"{num_groups} groups do not divide a tensor of shape {tuple(x.shape)}"
    if x[0].numel() >= 2**31:
        return "the kernel counts a sample's elements in 32 bits"
    if any(p is None or p.shape != x.shape[1:2] or not p.is_contiguous() for p in (weight, bias)):
        return "weight and bias must be contiguous, one value per channel"
    return None


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool = False,
) -> torch.Tensor:
    """GroupNorm, then SiLU if asked: one differentiable operator.

    x: (N, C, *spatial), fp16, bf16 or fp32, channels_last or contiguous (neither is copied)
    weight, bias: (C,), of x's dtype or another
    Returns y of x's shape, dtype and layout. Statistics are fp32; two runs give equal bits,
    gradients included. Raises ValueError for what the kernel cannot take.
    """
    if reason := unsupported(x, num_groups, weight, bias):
        raise ValueError(reason)
    return _group_norm(x, num_groups, weight, bias, eps, silu)[0]
