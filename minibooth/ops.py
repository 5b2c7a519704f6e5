"""Attention and group norm: PyTorch's own, or the Triton kernels. The choice is made here only.

The switch is the environment variable MINIBOOTH_KERNELS, or `use`, which the programs' --kernels
flag calls:

    auto     the kernels on CUDA where card and shape allow, PyTorch elsewhere
    triton   the kernels, or an error that says why they cannot run
    torch    PyTorch; the default, for as long as kernels/README.md has no measured figures

Both give the same model to rounding. The kernels are deterministic, forward and backward.
"""

import os

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .common.errors import UserError

try:
    from minibooth_kernels import attention as attention_kernels
    from minibooth_kernels import group_norm as group_norm_kernels
except ImportError:  # no Triton, as on macOS
    attention_kernels = group_norm_kernels = None

MODES = ("auto", "triton", "torch")
_mode = os.environ.get("MINIBOOTH_KERNELS", "torch")


def use(mode: str) -> None:
    """Choose "auto", "triton" or "torch" for every later call. Raises UserError for another."""
    global _mode
    if mode not in MODES:
        raise UserError(f"kernels are one of {', '.join(MODES)}, not {mode!r}")
    _mode = mode


def _choose_triton(kernels, x: torch.Tensor, *arguments) -> bool:
    if _mode not in MODES:
        raise UserError(f"MINIBOOTH_KERNELS is one of {', '.join(MODES)}, not {_mode!r}")
    if _mode == "torch" or (_mode == "auto" and x.device.type != "cuda"):
        return False
    if kernels is None:
        reason = "Triton is not installed"
    else:
        reason = kernels.unsupported(x, *arguments)
    if reason and _mode == "triton":
        raise UserError(f"--kernels triton cannot run here: {reason}; choose auto or torch")
    return reason is None


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v, without a mask.

    q: (B, H, N_q, d); k, v: (B, H, N_k, d), any strides, of H heads; scale: 1/sqrt(d) by default
    Returns (B, H, N_q, d), under autocast in its dtype. Raises UserError if the kernels were asked
    for and cannot run.
    """
    device = q.device.type
    # Autocast knows PyTorch's operators, not the kernels; and it knows only some devices.
    if device in ("cuda", "cpu") and torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    if _choose_triton(attention_kernels, q, k, v, scale):
        return attention_kernels.attention(q, k, v, scale)
    few = q.shape[-2] * k.shape[-2] <= 256 * 256
    if device == "cpu" and q.requires_grad and q.dtype != torch.float32 and few:
        # A CPU's fused backward is slow in bf16: with few pixels the plain formula wins.
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool = False,
) -> torch.Tensor:
    """GroupNorm over (N, C, *spatial), then SiLU if asked; weight and bias (C,).

    Returns y of x's shape. The kernels keep x's dtype and memory layout and compute in fp32;
    PyTorch under autocast returns fp32, which the next convolution rounds to the same values.
    Raises UserError if the kernels were asked for and cannot run.
    """
    if _choose_triton(group_norm_kernels, x, num_groups, weight, bias):
        return group_norm_kernels.group_norm(x, num_groups, weight, bias, eps, silu)
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y, inplace=not y.requires_grad) if silu else y
