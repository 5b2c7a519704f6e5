"""The two operations worth a kernel of their own."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v. q: (B, H, N, d), k and v: (B, H, M, d); scale defaults to 1/√d."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False
) -> Tensor:
    """GroupNorm (arXiv 1803.08494), then SiLU if asked. x: (B, C, H, W); weight, bias: (C,)."""
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y) if silu else y
