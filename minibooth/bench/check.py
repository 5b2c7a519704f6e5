"""The Triton kernels against fp64, on a GPU: every benchmarked shape and odd ones."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from ..device.trial import implementations, make_inputs, poisoned, results
from ..ops import Case

DEVICE = torch.device("cuda")
# name: (heads, N_q, N_k, head dimension), images of 512², SDXL's of 1024²
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
    "SDXL self 4096": (10, 4096, 4096, 64),
    "SDXL self 1024": (20, 1024, 1024, 64),
    "SDXL cross 4096": (10, 4096, 77, 64),
    "SDXL cross 1024": (20, 1024, 77, 64),
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
        ("SDXL", 128, (320, 640, 960)),
        ("SDXL", 64, (1280, 1920)),  # and 320, 640 and 960, as above
        ("SDXL", 32, (2560,)),  # and 640, 1280 and 1920
        ("VAE", 64, (512,)),
        ("VAE", 256, (256,)),
        ("VAE", 512, (128,)),
    )
    for channels in widths
}
# name: (rows, channels) of a transformer's norms, and of what its gates make
ROWS = {
    f"UNet rows {rows} C{channels}": (rows, channels)
    for rows, channels in ((4096, 320), (1024, 640), (256, 1280), (64, 1280))
}
# checked, not timed
ODD_ATTENTION = {"odd": (3, 333, 201, 88), "odd short": (2, 130, 77, 40), "tiny": (1, 5, 3, 8)}
ODD_NORMS = {"odd small": (64, 13), "odd large": (64, 131)}
ODD_ROWS = {"odd rows": (77, 100)}
QUICK = (  # of both, a selection
    *(*ODD_ATTENTION, "SD 1.5 self 4096", "SD 1.5 cross 4096", "SD 1.5 self 64"),
    *(*ODD_NORMS, "UNet 64x64 C320", "UNet 8x8 C1280"),
    *(*ODD_ROWS, "UNet rows 4096 C320"),
)
HEADS_AT_ONCE = 2  # in fp64: one head's 4096 × 4096 scores are 134 MB, several times over


def attention(B: int, name: str, dtype: torch.dtype, backward: bool) -> Case:
    return Case("attention", (B, *(ATTENTION | ODD_ATTENTION)[name]), str(dtype)[6:], backward)


def norm(B: int, name: str, dtype: torch.dtype, backward: bool) -> Case:
    channels, side = (NORMS | ODD_NORMS)[name]
    dtype = str(dtype)[6:]
    shape = (B, channels, side, side)
    return Case("group_norm", shape, dtype, backward, (32, True, True, dtype, True))


def layer_norm(B: int, name: str, dtype: torch.dtype, backward: bool) -> Case:
    dtype, shape = str(dtype)[6:], (B, *(ROWS | ODD_ROWS)[name])
    return Case("layer_norm", shape, dtype, backward, (True, dtype))


def gate(B: int, name: str, dtype: torch.dtype, backward: bool) -> Case:
    rows, channels = (ROWS | ODD_ROWS)[name]
    return Case("geglu", (B, rows, 8 * channels), str(dtype)[6:], backward)


def in_fp64(f: Callable, inputs: list[Tensor], upstream: Tensor, case: Case) -> list[Tensor]:
    """The exact results; of attention a few heads at a time, which do not know of each other."""
    if case.op != "attention":
        return results(f, [x.double() for x in inputs], upstream.double(), case.backward)
    parts = [
        results(f, [x.double() for x in part[:3]], part[3].double(), case.backward)
        for part in zip(*(x.split(HEADS_AT_ONCE, dim=1) for x in (*inputs, upstream)), strict=True)
    ]
    return [torch.cat(outs, dim=1) for outs in zip(*parts, strict=True)]


def relative_error(out: Tensor, true: Tensor) -> float:
    return ((out.double() - true).norm() / true.norm()).item()


def check_one(name: str, case: Case, functions: dict[str, Callable]) -> list[str]:
    """Ours against fp64, allowed twice PyTorch's error (three times for gradients), and again."""
    inputs, upstream = make_inputs(case, DEVICE)
    ours, theirs = functions["triton"], functions["torch"]
    expected = in_fp64(theirs, inputs, upstream, case)
    first, second, other = (
        results(f, inputs, upstream, case.backward) for f in (ours, ours, theirs)
    )
    failures, outputs = [], len(expected) - len(inputs) * case.backward
    for i, (a, b, c, true) in enumerate(zip(first, second, other, expected, strict=True)):
        what = f"{name} {'output' if i < outputs else f'gradient {i - outputs + 1}'}"
        error = relative_error(a, true)
        allowed = max((2 if i < outputs else 3) * relative_error(c, true), 2e-6)
        if not error <= allowed:
            failures.append(f"{what}: error {error:.2e}, allowed {allowed:.2e}")
        if not torch.equal(a, b):
            failures.append(f"{what}: two runs differ")
    return failures


def check(dtype: torch.dtype, names: Collection[str] | None = None) -> list[str]:
    """Odd shapes, and for half precision every benchmarked one, or those of these names; the
    failures, in lines."""
    half = dtype != torch.float32
    cases = [
        (name, attention(2, name, dtype, backward=shape[3] <= 160))
        for name, shape in (ODD_ATTENTION | (ATTENTION if half else {})).items()
    ]
    cases += [(name, norm(2, name, dtype, True)) for name in ODD_NORMS | (NORMS if half else {})]
    rows = ODD_ROWS | (ROWS if half else {})
    cases += [(name, of(2, name, dtype, True)) for name in rows for of in (layer_norm, gate)]
    failures = []
    with poisoned():
        for name, case in cases:
            if names is None or name in names:
                failures += check_one(f"{name} {dtype}", case, implementations(case))
    return failures


def smoke() -> None:
    """Each kernel once on a small odd shape, for compute-sanitizer."""
    cases = [Case("attention", (1, 2, 130, N_k, 40), "float16", True) for N_k in (77, 201)]
    for side in (13, 130):
        norm = (32, True, True, "float16", True)
        cases.append(Case("group_norm", (1, 64, side, side), "float16", True, norm))
    cases.append(Case("layer_norm", (1, 77, 100), "float16", True, (True, "float16")))
    cases.append(Case("geglu", (1, 77, 100), "float16", True))
    for case in cases:
        results(implementations(case)["triton"], *make_inputs(case, DEVICE), case.backward)
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
