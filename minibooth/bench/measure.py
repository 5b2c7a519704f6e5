"""Measuring, for every bench: times of calls, in turns; peaks of memory, in a
process of its own; what the machine can do, and which machine it is."""

import contextlib
import json
import math
import os
import platform
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from ..common import cli
from ..device import beside, verdicts

ROOT = Path(__file__).parents[2]

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---- times -------------------------------------------------------------------------------------


def seconds(call: Callable[[], Tensor], device: torch.device, calls: int = 1) -> float:
    """Of one call."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - start) / calls


def race(
    calls: dict[str, Callable[[], Tensor]], device: torch.device, limit: float, warm_up: int
) -> dict[str, list[float]]:
    """Rounds of every implementation's time until `limit` seconds are over: at least 5, odd."""
    for call in calls.values():
        for _ in range(warm_up):
            call()
    times, dice = {name: [] for name in calls}, random.Random(0)
    end = time.monotonic() + limit
    rounds = next(iter(times.values()))
    while len(rounds) < 5 or (time.monotonic() < end and len(rounds) < 101):
        for name in dice.sample(list(calls), len(calls)):
            times[name].append(seconds(calls[name], device))
    return times


def rates(device: torch.device, precisions: Iterable[str]) -> dict[str, dict[str, float]]:
    """What the machine can do: FLOP/s in a matrix product per precision, bytes/s in a copy."""
    n = 8192 if device.type == "cuda" else 1024
    found = {}
    for precision in sorted(precisions):
        a, b = torch.randn(2, n, n, device=device).to(DTYPES[precision])
        best = min(seconds(lambda a=a, b=b: a @ b, device) for _ in range(10))
        found[precision] = 2 * n**3 / best
    x = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    y = torch.empty_like(x)
    copy = min(seconds(lambda: y.copy_(x), device) for _ in range(5))
    return {"flops": found, "bytes": 2 * x.numel() * 4 / copy}


# ---- memory ------------------------------------------------------------------------------------


class Failed(Exception):
    """Why a process of its own has no result, in one line."""


def result(module: str, call: str, seconds: float = math.inf) -> dict:
    """What a call within a module returns in a process of its own, whose stdout is for that alone.
    Raises Failed where it ends otherwise, or not within so many seconds."""
    code = f"import contextlib, json, sys; from {module} import *\n"
    code += f"with contextlib.redirect_stdout(sys.stderr): found = {call}\n"
    command, kernels = [sys.executable, "-c", code + "print(json.dumps(found))"], ROOT / "kernels"
    path = sys.path + [str(kernels)] * (kernels / "minibooth_kernels").exists()  # a bare checkout
    with beside.started(command, PYTHONPATH=os.pathsep.join(path)) as program:
        lines = list(program.lines(seconds))
    if program.given_up:
        raise Failed(f"it did not end within {seconds:.0f} s")
    if program.process.returncode or not lines:
        raise Failed(f"it {program.ending}")
    return json.loads(lines[-1])


def alone(module: str, call: str) -> dict | None:
    """`result`, or None and the reason on stderr."""
    try:
        return result(module, call)
    except Failed as error:
        print(error, file=sys.stderr)
        return None


def prepared(kernels: str = "torch", limit: int | None = None) -> torch.device:
    """The device, in a process of its own; on a GPU with `limit` bytes of memory."""
    device = cli.pick_device("auto")
    cli.keep_freed_memory()
    warnings.filterwarnings("ignore")
    ops.use(kernels)
    if limit and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    return device


def peaks(device: torch.device) -> dict[str, int]:
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved()
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": reserved}
    import resource  # not on Windows

    return {"peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


# ---- the machine -------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "python": platform.python_version()}
    for name in ("minibooth", "triton", "bitsandbytes", "diffusers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine(device: torch.device) -> dict:
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(), "driver": verdicts.driver()}
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    return {"device": name or platform.processor(), "threads": threads, "simd": capability}
