"""What the group norm kernels share: where a tile lies, and the affine map behind the norm."""

import triton
import triton.language as tl


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
def _vector(X, n, channels, C):
    """Row n of a (…, C) matrix in fp32: neighbours in memory, so 16 bytes at a time."""
    return tl.load(X + n * C + channels, mask=channels < C, other=0.0).to(tl.float32)


@triton.jit
def _silu_backward(z, dy):
    """d(z·σ(z))/dz = σ(z) (1 + z (1 − σ(z)))."""
    sigma = tl.sigmoid(z)
    return dy * sigma * (1 + z * (1 - sigma))
