"""Measuring, for every bench: times of calls, in turns; peaks of memory, in a
process of its own; what the machine can do, and which machine it is."""

import contextlib
import importlib
import json
import os
import platform
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
from ..common import cli
from ..training import verdicts

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


def rates(device: torch.device) -> dict[str, dict[str, float]]:
    """What the machine can do: FLOP/s in a matrix product per precision, bytes/s in a copy."""
    n = 8192 if device.type == "cuda" else 1024
    found = {}
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        best = min(seconds(lambda a=a, b=b: a @ b, device) for _ in range(10))
        found[precision] = 2 * n**3 / best
    x = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    y = torch.empty_like(x)
    copy = min(seconds(lambda: y.copy_(x), device) for _ in range(5))
    return {"flops": found, "bytes": 2 * x.numel() * 4 / copy}


# ---- memory ------------------------------------------------------------------------------------


def alone(module: str, call: str) -> dict | None:
    """What a call within a module returns in a process of its own; None where it failed."""
    code = f"import json; from {module} import *; print(json.dumps({call}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


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
    with contextlib.suppress(ImportError):
        found["diffusers"] = importlib.import_module("diffusers").__version__
    return found


def machine(device: torch.device) -> dict:
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(), "driver": verdicts.driver()}
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    return {"device": name or platform.processor(), "threads": threads, "simd": capability}
