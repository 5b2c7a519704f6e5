"""This project and diffusers side by side: the same weights, data and settings, in one run.

On a GPU the networks have SD 1.5's size, on a CPU the toybox's; their weights are random. All
implementations are warmed up first and then take turns, in an order that changes from round to
round, so that whatever else the machine does hits all alike. A ratio is the median over the rounds
of diffusers' time by ours. Without diffusers only this project is measured.
"""

import gc
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from .. import ops
from ..common import cli
from ..common.files import write_json
from ..unet import UNet
from . import chart
from .measure import alone, machine, peaks, prepared, race, rates, versions
from .models import CONFIGS
from .sides import OURS, PRECISION, Row, cpu_has_bf16, implementation, peers, rivals

ADAM_BYTES = 28  # of traffic per weight: weight, gradient and two averages read, three written


def measure(row: Row, size: str, device: torch.device, limit: float, floor: dict) -> dict:
    """Times, ratios and how far the results are apart, for the JSON."""
    names = [OURS, *rivals(row, device)]
    ops.use(row.kernels)
    with tempfile.TemporaryDirectory() as folder:
        parts = (row, size, device, Path(folder))
        calls = {name: implementation(*parts, name) for name in names}
        first = {name: call().double() for name, call in calls.items()}
        # Beside the first call: as many as a CUDA graph needs before it is replayed.
        times = race(calls, device, limit, warm_up=2 if device.type == "cpu" else 5)
    ops.use("torch")
    work = {"forward": 1, "step": 3}.get(row.what)
    bound = floor_seconds(row, size, floor) if work else None
    found = {"row": row.__dict__, "rounds": len(times[OURS]), "seconds": {}, "ratio": {}}
    found["difference"] = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found["seconds"][name] = {"median": middle, "quartiles": [low, high]}
        if name != OURS:
            ratios = [a / b for a, b in zip(values, times[OURS], strict=True)]
            found["ratio"][name] = statistics.median(ratios)
            apart = (first[OURS] - first[name]).norm() / first[name].norm()
            found["difference"][name] = apart.item()
    if bound:
        found["floor_seconds"] = bound
        found["fraction_of_floor"] = bound / found["seconds"][OURS]["median"]
    found["peak_bytes"] = {name: peak(row, size, device, name) for name in names}
    del calls, first
    gc.collect()
    return found


def floor_seconds(row: Row, size: str, rates: dict) -> float:
    """Below which no implementation can go: its products at the rate of a large one, and for a step
    the optimizer's traffic at the rate of a copy."""
    config = CONFIGS[size]["unet"]
    with torch.device("meta"):
        unet, side = UNet(config), config["sample_size"]
        samples = 2 * row.batch if row.what == "step" else row.batch
        x = torch.empty(samples, 4, side, side)
        inputs = (x, torch.zeros(samples), torch.empty(samples, 77, config["cross_attention_dim"]))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(*inputs)
    products = counter.get_total_flops() / rates["flops"][row.precision]
    if row.what == "forward":
        return products
    traffic = ADAM_BYTES * sum(p.numel() for p in unet.parameters()) / rates["bytes"]
    return 3 * products + traffic


def peak(row: Row, size: str, device: torch.device, name: str) -> int | None:
    """Bytes at most, in a process of its own: allocated on the GPU, or resident on a CPU."""
    if "compiled" in name:  # compiling again would cost minutes
        return None
    found = alone(__name__, f"steady({row!r}, {size!r}, {name!r})")
    return found and found["peak_bytes"]


def steady(row: Row, size: str, name: str) -> dict[str, int]:
    """The peak of a few calls."""
    device = prepared(row.kernels)
    with tempfile.TemporaryDirectory() as folder:
        call = implementation(row, size, device, Path(folder), name)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(6 if device.type == "cuda" else 2):
            call()
    return peaks(device)


# ---- the report --------------------------------------------------------------------------------


def rows(what: str, device: torch.device) -> list[Row]:
    if device.type == "cpu":
        both = ("no", "bf16") if cpu_has_bf16() else ("no",)
        if what == "train":
            return [Row(w, b, p) for p in both for w, b in (("forward", 8), ("step", 4))]
        return [Row("sample", 8, precision, steps=5) for precision in both]
    if what == "sample":
        plain = [Row("sample", batch, "bf16", steps=50) for batch in (1, 4, 16)]
        return [*plain, replace(plain[0], kernels="triton")]
    plain = [Row("forward", 2, "bf16")] + [Row("step", batch, "bf16") for batch in (1, 2, 4)]
    modes = [("gradient_checkpointing",), ("optimizer_in_backward",)]
    modes += [("gradient_checkpointing", "optimizer_in_backward")]
    modes = [replace(plain[1], settings=tuple((name, True) for name in mode)) for mode in modes]
    return [*plain, replace(plain[1], kernels="triton"), *modes]


def describe(found: dict) -> str:
    """A row of the table on the screen."""
    row, mine = found["row"], found["seconds"][OURS]
    modes = " ".join(name for name, _ in row["settings"])
    kernels = "" if row["kernels"] == "torch" else f"kernels {row['kernels']}"
    precision = PRECISION[row["precision"]]
    head = f"{row['what']:8} B {row['batch']:<3} {precision} {kernels} {modes}".rstrip()
    parts = [f"{OURS} {1e3 * mine['median']:.1f} ms"]
    low, high = mine["quartiles"]
    parts[0] += f" ({1e3 * low:.1f} … {1e3 * high:.1f})"
    for name, ratio in found["ratio"].items():
        parts.append(f"{name} {1e3 * found['seconds'][name]['median']:.1f} ms: {ratio:.2f}×")
    if "fraction_of_floor" in found:
        parts.append(f"{100 * found['fraction_of_floor']:.0f} % of the floor")
    sizes = [f"{size / 1e9:.2f}" for size in found["peak_bytes"].values() if size]
    parts.append(f"peak {' / '.join(sizes)} GB")
    return f"{head}: {', '.join(parts)}"


def draw(results: list[dict], title: str, path: Path) -> None:
    """diffusers' time by ours."""
    bars = []
    for r in results:
        row = r["row"]
        label = f"{row['what']} B {row['batch']} {PRECISION[row['precision']]}"
        bars += [(label, ratio, name, chart.BLUE) for name, ratio in r["ratio"].items()]
    chart.bars(bars, title, path)


def begin(what: str, output: Path) -> tuple[torch.device, str, dict, Path]:
    """The device, the networks' size, the report's head, and its file's name without ending."""
    device = cli.pick_device("auto")
    cli.keep_freed_memory()
    size = "SD 1.5" if device.type == "cuda" else "toybox"
    warnings.filterwarnings("ignore")  # the photographs and prompts here are made up
    output.mkdir(parents=True, exist_ok=True)
    report = {**machine(device), **versions(), "networks": size}
    return device, size, report, output / f"{what}-{device.type}"


def benchmark(what: str, minutes: float, output: Path) -> None:
    """Measures, prints and writes <what>-<cpu or cuda>.json and .png; what: train or sample."""
    device, size, report, name = begin(what, output)
    if not peers(device):
        print("diffusers is not installed: its columns are left out")
    todo, results = rows(what, device), []
    floor = rates(device, {row.precision for row in todo})
    end, left_out = time.monotonic() + 60 * minutes, []
    for i, row in enumerate(todo):
        left = end - time.monotonic()
        if left < 0:
            left_out.append(repr(row))
            continue
        # Half of a row's share is for rounds: building, compiling and warming up take the rest.
        results.append(measure(row, size, device, 0.5 * left / (len(todo) - i), floor))
        print(describe(results[-1]), flush=True)
    write_json(
        name.with_suffix(".json"),
        {**report, "rates": floor, "rows": results, "left_out": left_out},
    )
    title = f"diffusers' time divided by {OURS}'s, {size} size, {report['device']}"
    draw(results, title, name.with_suffix(".png"))
    print(f"{len(results)} rows, {len(left_out)} left out for time; {name}.json")
