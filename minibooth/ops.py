"""Attention, norms, GEGLU, AdamW: PyTorch's own, or the Triton kernels. The choice is made here.

The switch is the environment variable MINIBOOTH_KERNELS, or `use`, which the programs' --kernels
flag calls:

    auto     the default: on CUDA the kernels for the cases in which they were right and faster on
             this card (`prefer`, which device/settle.py calls for what is replayed from a CUDA
             graph, and for nothing else), PyTorch for all others
    triton   the kernels, or an error that says why they cannot run
    torch    PyTorch

Both give the same model to rounding. The kernels are deterministic, forward and backward.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .common.errors import UserError

try:
    from minibooth_kernels import adamw as adamw_kernels
    from minibooth_kernels import attention as attention_kernels
    from minibooth_kernels import geglu as geglu_kernels
    from minibooth_kernels import group_norm as group_norm_kernels
    from minibooth_kernels import layer_norm as layer_norm_kernels
except ImportError:  # no Triton, as on macOS
    adamw_kernels = attention_kernels = geglu_kernels = None
    group_norm_kernels = layer_norm_kernels = None

MODES = ("auto", "triton", "torch")
SCORES = 2**28  # of a head that PyTorch may keep, 1 GiB in fp32: as many as 16,384 pixels have
_mode = os.environ.get("MINIBOOTH_KERNELS", "auto")
_preferred: dict["Case", Sequence[int]] = {}
_seen: dict["Case", None] | None = None


class Case(NamedTuple):
    """What the choice is made for: an operator, its sizes, and all else that its speed hangs on."""

    op: str  # "attention" | "group_norm" | "layer_norm" | "geglu" | "adamw"
    # (B, H, N_q, N_k, d) | of x: (N, C, *spatial) | (B, N, C) | nothing: of all weights that train
    shape: tuple[int, ...]
    dtype: str  # "bfloat16", …
    backward: bool  # whether there is a backward pass to come, which is chosen with the forward
    # Of a norm: groups, SiLU, channels_last, weights' dtype, shifted | of a sum, weights' dtype.
    norm: tuple[int, bool, bool, str, bool] | tuple[bool, str] | None = None


def mode() -> str:
    """What is chosen: "auto", "triton" or "torch"."""
    return _mode


def prefer(cases: Mapping[Case, Sequence[int]]) -> None:
    """From now on "auto" takes the kernels for these cases, and for no others; and each kernel of
    a case that one of its candidates, by their order in the kernels' own tables."""
    global _preferred
    _preferred = dict(cases)


@contextmanager
def observed() -> Iterator[dict[Case, None]]:
    """Within it, the cases of all calls are collected, in the order of their first call."""
    global _seen
    _seen = {}
    try:
        yield _seen
    finally:
        _seen = None


def use(mode: str) -> None:
    """Choose "auto", "triton" or "torch" for every later call. Raises UserError for another."""
    global _mode
    if mode not in MODES:
        raise UserError(f"kernels are one of {', '.join(MODES)}, not {mode!r}")
    _mode = mode


def _attention_case(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Case:
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    B, H, N_q, d = q.shape
    return Case("attention", (B, H, N_q, k.shape[2], d), str(q.dtype)[6:], backward)


def _norm_case(x: torch.Tensor, groups: int, weight: torch.Tensor, silu: bool, shift) -> Case:
    backward = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    norm = (groups, silu, not x.is_contiguous(), str(weight.dtype)[6:], shift is not None)
    return Case("group_norm", tuple(x.shape), str(x.dtype)[6:], backward, norm)


def _layer_norm_case(x: torch.Tensor, weight: torch.Tensor, added: bool) -> Case:
    backward = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    norm = (added, str(weight.dtype)[6:])
    return Case("layer_norm", tuple(x.shape), str(x.dtype)[6:], backward, norm)


def _choose_triton(kernels, case: Case, x: torch.Tensor, *arguments) -> Sequence[int] | None:
    """None for PyTorch's; for Triton's, which candidate each kernel takes."""
    if _seen is not None:
        _seen[case] = None
    if _mode not in MODES:
        raise UserError(f"MINIBOOTH_KERNELS is one of {', '.join(MODES)}, not {_mode!r}")
    if _mode == "torch" or (_mode == "auto" and case not in _preferred):
        return None
    if kernels is None:
        reason = "Triton is not installed"
    else:
        reason = kernels.unsupported(x, *arguments)
    if reason and _mode == "triton":
        raise UserError(f"--kernels triton cannot run here: {reason}; choose auto or torch")
    return _preferred.get(case, ()) if reason is None else None


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
    choices = _choose_triton(attention_kernels, _attention_case(q, k, v), q, k, v, scale)
    if choices is not None:
        return attention_kernels.attention(q, k, v, scale, choices)
    few = q.shape[-2] * k.shape[-2] <= 256 * 256
    if device == "cpu" and q.requires_grad and q.dtype != torch.float32 and few:
        # A CPU's fused backward is slow in bf16: with few pixels the plain formula wins.
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if q.shape[-2] * k.shape[-2] <= SCORES:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    # A picture of 2048² has 262,144 pixels in the VAE of an upscaler, and 256 GiB of scores.
    parts = q.split(max(1, SCORES // k.shape[-2]), dim=-2)
    done = [F.scaled_dot_product_attention(part, k, v, scale=scale) for part in parts]
    return torch.cat(done, dim=-2)


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool = False,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """GroupNorm over (N, C, *spatial), then SiLU if asked; weight and bias (C,). Of x, or of
    x + shift, the same for all pixels: (N, C).

    Returns y of x's shape. The kernels keep x's dtype and memory layout and compute in fp32;
    PyTorch under autocast returns fp32, which the next convolution rounds to the same values.
    Raises UserError if the kernels were asked for and cannot run.
    """
    case = _norm_case(x, num_groups, weight, silu, shift)
    choices = _choose_triton(group_norm_kernels, case, x, num_groups, weight, bias, shift)
    if choices is not None:
        return group_norm_kernels.group_norm(x, num_groups, weight, bias, eps, silu, shift, choices)
    if shift is not None:
        x = x + shift[:, :, None, None]
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y, inplace=not y.requires_grad) if silu else y


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float):
    """LayerNorm over the last dimension of x: (…, C); weight and bias (C,).

    Returns y of x's shape. The kernels keep x's dtype and compute in fp32; PyTorch under autocast
    returns fp32, which the next layer rounds to the same values. Raises UserError if the kernels
    were asked for and cannot run.
    """
    case = _layer_norm_case(x, weight, False)
    choices = _choose_triton(layer_norm_kernels, case, x, weight, bias)
    if choices is not None:
        return layer_norm_kernels.layer_norm(x, weight, bias, eps, choices=choices)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + h, and its `layer_norm`. x, h: (…, C) → two of the same shape."""
    case = _layer_norm_case(x, weight, True)
    choices = _choose_triton(layer_norm_kernels, case, x, weight, bias, h)
    if choices is not None:
        return layer_norm_kernels.layer_norm(x, weight, bias, eps, h, choices)
    x = x + h
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """h · GELU(gate) of x = (h, gate), side by side (2002.05202). x: (…, 2C) → (…, C).

    Raises UserError if the kernels were asked for and cannot run.
    """
    backward = torch.is_grad_enabled() and x.requires_grad
    case = Case("geglu", tuple(x.shape), str(x.dtype)[6:], backward)
    if _choose_triton(geglu_kernels, case, x) is not None:
        return geglu_kernels.geglu(x)
    h, gate = x.chunk(2, dim=-1)
    return h * F.gelu(gate)


def adamw_case(dtype: torch.dtype) -> Case:
    """Of AdamW over the weights of networks that compute in `dtype`."""
    return Case("adamw", (), str(dtype)[6:], False)


def adamw_by_kernel(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether it is the kernel's (training/by_kernel.py); `weight` is the largest of them. Raises
    UserError if the kernel was asked for and cannot run."""
    return _choose_triton(adamw_kernels, adamw_case(dtype), weight) is not None
