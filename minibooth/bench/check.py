"""The Triton kernels against fp64, on a GPU: every benchmarked shape and odd ones."""

import functools
import os
import shutil
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import ops

DEVICE = "cuda"
# name: (heads, N_q, N_k, head dimension), images of 512²
ATTENTION = {
    "SD 1.5 self 4096": (8, 4096, 4096, 40),
    "SD 1.5 self 1024": (8, 1024, 1024, 80),
    "SD 1.5 self 256": (8, 256, 256, 160),
    "SD 1.5 self 64": (8, 64, 64, 160),
    "SD 1.5 cross 4096": (8, 4096, 77, 40),
    "SD 1.5 cross 1024": (8, 1024, 77, 80),
    "SD 1.5 cross 256": (8, 256, 77, 160),
    "SD 1.5 cross 64": (8, 64, 77, 160),
    "SD 2.1 self 4096": (5, 4096, 4096, 64),
    "SD 2.1 self 1024": (10, 1024, 1024, 64),
    "SD 2.1 self 256": (20, 256, 256, 64),
    "SD 2.1 cross 4096": (5, 4096, 77, 64),
    "VAE 4096": (1, 4096, 4096, 512),
}
# name: (channels, height and width); 32 groups, channels_last, SiLU behind
NORMS = {
    f"{net} {size}x{size} C{channels}": (channels, size)
    for net, size, widths in (
        ("UNet", 64, (320, 640, 960)),
        ("UNet", 32, (640, 1280, 1920)),
        ("UNet", 16, (1280, 2560)),
        ("UNet", 8, (1280, 2560)),
        ("VAE", 64, (512,)),
        ("VAE", 256, (256,)),
        ("VAE", 512, (128,)),
    )
    for channels in widths
}
# checked, not timed
ODD_ATTENTION = {"odd": (3, 333, 201, 88), "odd short": (2, 130, 77, 40), "tiny": (1, 5, 3, 8)}
ODD_NORMS = {"odd small": (64, 13), "odd large": (64, 131)}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


# ---- inputs and implementations ----------------------------------------------------------------


def attention_inputs(B, H, N_q, N_k, d, dtype):
    """q, k, v as views of their projections' outputs, and an upstream gradient."""
    q, k, v, do = (
        torch.randn(B, N, H, d, device=DEVICE, dtype=dtype).transpose(1, 2)
        for N in (N_q, N_k, N_k, N_q)
    )
    return (q, k, v), do


def norm_inputs(B, C, size, dtype):
    """x (with a mean), γ, β, and an upstream gradient."""
    x, dy = (
        torch.randn(B, C, size, size, device=DEVICE, dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    weight, bias = torch.randn(2, C, device=DEVICE, dtype=dtype)
    return (x + 1, weight, bias), dy


def triton_attention(q, k, v):
    return ops.attention_kernels.attention(q, k, v)


def sdpa(backend):
    def attention(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attention


def eager_norm(x, weight, bias):
    return F.silu(F.group_norm(x, 32, weight, bias, 1e-5))


def triton_norm(x, weight, bias):
    return ops.group_norm_kernels.group_norm(x, 32, weight, bias, 1e-5, silu=True)


def fp64_attention(q, k, v):
    return ops.attention_kernels.reference(q, k, v)


def with_gradients(f, inputs, upstream):
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def relative_error(outs, expected):
    """The largest of ‖out − expected‖ / ‖expected‖; NaN if any is."""
    errors = [
        ((out.double() - true).norm() / true.norm()).item()
        for out, true in zip(outs, expected, strict=True)
    ]
    return max(errors) if all(e == e for e in errors) else float("nan")


# ---- correctness -------------------------------------------------------------------------------


def check_one(name, ours, theirs, reference, make_inputs, backward) -> list[str]:
    """Ours against fp64, allowed twice PyTorch's error (three times for gradients), and again."""
    inputs, upstream = make_inputs()
    double = [x.double() for x in inputs]
    if backward:
        run = functools.partial(with_gradients, inputs=inputs, upstream=upstream)
        expected = with_gradients(reference, double, upstream)
    else:
        run = lambda f: [f(*inputs)]  # noqa: E731
        expected = [reference(*double)]
    first, second, other = run(ours), run(ours), run(theirs)
    failures = []
    for i, (a, b, c, true) in enumerate(zip(first, second, other, expected, strict=True)):
        what = f"{name} {'output' if i == 0 else f'gradient {i}'}"
        error, allowed = relative_error([a], [true]), relative_error([c], [true])
        allowed = max((3 if i else 2) * allowed, 2e-6)
        if not error <= allowed:
            failures.append(f"{what}: error {error:.2e}, allowed {allowed:.2e}")
        if not torch.equal(a, b):
            failures.append(f"{what}: two runs differ")
    return failures


def check(dtype: torch.dtype) -> list[str]:
    """Odd shapes, and for half precision every benchmarked one; the failures, in lines."""
    half = dtype != torch.float32
    attention = ODD_ATTENTION | (ATTENTION if half else {})
    norms = ODD_NORMS | (NORMS if half else {})
    # torch.empty is filled with NaN under this setting: what no kernel writes shows.
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    failures = []
    try:
        for name, shape in attention.items():
            make = functools.partial(attention_inputs, 2, *shape, dtype)
            reference = fp64_attention
            arguments = (triton_attention, F.scaled_dot_product_attention, reference, make)
            failures += check_one(f"{name} {dtype}", *arguments, backward=shape[3] <= 160)
        for name, shape in norms.items():
            make = functools.partial(norm_inputs, 2, *shape, dtype)
            arguments = (triton_norm, eager_norm, eager_norm, make)
            failures += check_one(f"{name} {dtype}", *arguments, backward=True)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return failures


def smoke() -> None:
    """Each kernel once on a small odd shape, for compute-sanitizer."""
    for N_k in (77, 201):
        inputs, do = attention_inputs(1, 2, 130, N_k, 40, torch.float16)
        with_gradients(triton_attention, inputs, do)
    for shape in ((64, 13), (64, 130)):
        inputs, dy = norm_inputs(1, *shape, torch.float16)
        with_gradients(triton_norm, inputs, dy)
    torch.cuda.synchronize()


def sanitize() -> str:
    """What compute-sanitizer's memcheck says of `smoke`, in one line."""
    if not (tool := shutil.which("compute-sanitizer")):
        return "compute-sanitizer is not installed"
    code = f"from {__name__} import smoke; smoke()"
    command = [tool, "--error-exitcode", "9", sys.executable, "-c", code]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=90, env=environment
        )
    except subprocess.TimeoutExpired:
        return "compute-sanitizer was not done in 90 s"
    lines = (result.stdout + result.stderr).strip().splitlines()
    return f"compute-sanitizer, exit status {result.returncode}: {lines[-1] if lines else ''}"
