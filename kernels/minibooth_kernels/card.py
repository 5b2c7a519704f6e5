"""What the kernels ask about the card they run on."""

import functools
import subprocess
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run as NumPy, on the CPU

# Shared memory of a block that the tables of tiles are made for, bytes, by major capability.
SHARED_MEMORY = {8: 101_376, 9: 232_448, 10: 232_448, 12: 101_376}


def capability(device: torch.device) -> int:
    """Compute capability as one number: 80 A100, 86 RTX 30, 89 RTX 40, 90 H100, 100 B200, 120.

    The interpreter has no card; it takes the A100's configurations.
    """
    if device.type != "cuda":
        return 80
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor


def shared_memory(device: torch.device) -> float:
    """Bytes that one block may have; the interpreter has no limit."""
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def unsupported_card(device: torch.device) -> str | None:
    """Why no kernel here can run on that device; None if one can."""
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"the kernels run on CUDA, the tensor is on {device.type}"
    if (major := capability(device) // 10) not in SHARED_MEMORY:
        return f"the kernels are compiled for compute capability 8, 9, 10 and 12, this is {major}"
    if shared_memory(device) < SHARED_MEMORY[major]:
        return f"the kernels want {SHARED_MEMORY[major]} bytes of shared memory for a block"
    return None


def unsupported(x: torch.Tensor) -> str | None:
    """Why no kernel here can run on x, whatever its shape; None if one can."""
    if reason := unsupported_card(x.device):
        return reason
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take float16, bfloat16 and float32, not {x.dtype}"
    if x.numel() == 0:
        return "an empty tensor has nothing to compute"
    return None


def chosen(choices: Sequence[int], kernel: int) -> int:
    """Which candidate of its tiles an operator's so-manieth kernel takes: the first, if none is
    named."""
    return choices[kernel] if kernel < len(choices) else 0


@triton.jit
def _write_one(x):
    """x: (1,)."""
    tl.store(x, 1.0)


def launch_one(device: torch.device) -> None:
    """Launch the smallest kernel there is, and wait for it. Raises what Triton or CUDA raise where
    no kernel at all can be launched: see `why_no_launch`."""
    x = torch.zeros(1, device=device)
    with torch.cuda.device_of(x):
        _write_one[(1,)](x)
    if x.item() != 1:
        raise RuntimeError("a kernel that writes a 1 has not written it")


def why_no_launch(error: Exception) -> str:
    """What `launch_one` raised, in one line that says what to install, if anything.

    Triton compiles a small C file before its first launch (triton/runtime/build.py).
    """
    if isinstance(error, subprocess.CalledProcessError):
        compiler = error.cmd[0] if isinstance(error.cmd, list) else error.cmd
        return (
            f"{compiler} cannot compile what Triton launches kernels with: install Python's "
            "headers (python3-dev)"
        )
    if "C compiler" in str(error):
        return "Triton finds no C compiler to launch kernels with: install gcc"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def launched_where_its_input_is(operator):
    """Triton launches on the current device; this makes it that of the first tensor."""

    @functools.wraps(operator)
    def on_device(x, *arguments):
        with torch.cuda.device_of(x):
            return operator(x, *arguments)

    return on_device
