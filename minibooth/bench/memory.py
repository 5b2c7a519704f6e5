"""Whether runs need the memory that they count on: each in its own process, under a hard cap.

A run does everything that takes memory, in little: class images, the first grid, --explain, 20
steps with a grid between them, and a last one whose loss is not finite, which is looked at again.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch

from .. import train
from ..common.errors import UserError
from ..common.files import write_json
from ..explain import first_step
from ..training import finite, fit, plan, prepare
from ..training.data import Batch, Batches
from ..training.settings import METHODS, TrainConfig
from .measure import alone, peaks, prepared
from .models import model
from .peers import begin
from .run import made_up_photographs

CAPS = (6_000_000_000, 8_000_000_000, 12_000_000_000)  # bytes: cards of 6, 8 and 12 GB
STEPS = 20
SMALL = {
    "max_train_steps": STEPS,
    "num_class_images": 4,
    "class_steps": 6,  # more than are drawn before a CUDA graph is recorded
    "validation_inference_steps": 6,
    "validation_steps": STEPS // 2,
    "checkpointing_steps": STEPS,
    "save_state": "none",
    "explain": True,
    "fit_memory": False,
}
WORD = {  # of the bench's tokenizer
    "placeholder_token": "<new>",
    "initializer_token": "x",
    "learnable_property": "prompt",
    "instance_prompt": "a <new>",
}


@dataclass(frozen=True)
class Row:
    """A run: what is trained, which of the memory's modes are on, and in which precision."""

    method: str
    mode: tuple[str, ...]
    precision: str  # "no" (fp32), "bf16" or "fp16"

    def settings(self) -> dict:
        on = {"method": self.method, "mixed_precision": self.precision}
        return SMALL | on | dict.fromkeys(self.mode, True)


def rows(device: torch.device) -> list[Row]:
    """Of all weights in every mode, of less in full and checkpointed: there is nothing to save in
    averages or gradients."""
    found = []
    for precision in ("bf16", "fp16") if device.type == "cuda" else ("no",):
        for method in METHODS:
            modes = fit.MODES if method == "dreambooth" else fit.MODES[:2]
            can = [m for m in modes if fit.possible(m, TrainConfig(), precision, resumed=False)]
            found += [Row(method, mode, precision) for mode in can]
    return found


# ---- what is counted ---------------------------------------------------------------------------


def counted(row: Row, size: str, **changes) -> dict[str, tuple[int, int]]:
    """plan.phases of a row; `changes` of its settings."""
    sd = model(size, torch.device("meta"))
    pixels = (sd.image_size // sd.vae.factor) ** 2
    config = TrainConfig(**row.settings() | changes)
    return plan.phases(sd, config, pixels, row.precision != "no")


def cap(phases: dict[str, tuple[int, int]]) -> int:
    """The smallest card on which a run is counted to fit; beyond all of them, what is counted."""
    need = max(plan.with_spare(*phase) for phase in phases.values())
    return min((size for size in CAPS if size >= need), default=need)


# ---- what is measured --------------------------------------------------------------------------


class Meter:
    """Peaks of the memory by phase of a run; on a CPU, which does not begin anew, all so far."""

    def __init__(self, device: torch.device):
        self.device, self.phase, self.found = device, "pictures before", {}

    def enter(self, phase: str) -> None:
        """The phase before ends, and this one begins."""
        before = self.found.setdefault(self.phase, {})
        for name, size in peaks(self.device).items():
            before[name] = max(size, before.get(name, 0))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.phase = phase

    def watched(self, function: Callable, phase: str, then: str = "training") -> Callable:
        def call(*arguments, **options):
            self.enter(phase)
            try:
                return function(*arguments, **options)
            finally:
                self.enter(then)

        return call


class LastIsBad:
    """In the place of Batches.draw: the last step's latents are not finite the first time, so that
    training stops there and all is looked at again. Notes when each batch was drawn."""

    def __init__(self, draw: Callable[[Batches, int], Batch], device: torch.device):
        self.draw, self.device, self.times = draw, device, {}

    def __call__(self, batches: Batches, n: int) -> Batch:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        again = n in self.times
        self.times[n] = time.perf_counter()
        batch, spoilt = self.draw(batches, n), n == STEPS - 1 and not again
        x0 = batch.instance.x0 * (float("nan") if spoilt else 1)
        return replace(batch, instance=replace(batch.instance, x0=x0))

    def seconds(self) -> float:
        """Of a step, the median of those after the grid, when a CUDA graph is there."""
        ends = range(STEPS // 2 + 1, STEPS - 1)
        return statistics.median(self.times[n + 1] - self.times[n] for n in ends)


@contextmanager
def watched(device: torch.device) -> Iterator[tuple[Meter, LastIsBad]]:
    """Within it runs are measured, and end in a loss that is not finite."""
    meter, last = Meter(device), LastIsBad(Batches.draw, device)
    optimizer = meter.watched(prepare.make_optimizer, "training")
    look = meter.watched(first_step.explain, "explain")
    again = meter.watched(finite.explain, "second look")
    with (
        mock.patch.object(prepare, "make_optimizer", optimizer),
        mock.patch.object(first_step, "explain", look),
        mock.patch.object(finite, "explain", again),
        mock.patch.object(Batches, "draw", lambda batches, n: last(batches, n)),
    ):
        yield meter, last


def measure(row: Row, size: str, limit: int | None) -> dict:
    """A row's peaks by phase, its seconds per step, and how it ended; on a GPU within `limit`."""
    device = prepared(limit=limit)
    with tempfile.TemporaryDirectory() as folder, watched(device) as (meter, last):
        sd = model(size, torch.device("cpu"))
        settings = {"instance_prompt": "a sks dog", "class_prompt": "a dog"}
        settings |= WORD if row.method == "textual_inversion" else {}
        settings["instance_data_dir"] = made_up_photographs(Path(folder), sd.image_size)
        try:
            train.train(TrainConfig(**row.settings(), **settings, output_dir=f"{folder}/out"), sd)
        except UserError as error:
            ended = str(error)
        if f"step {STEPS}: " not in ended:
            raise SystemExit(ended)  # out of memory, say
        return {"phases": meter.found, "seconds": last.seconds(), "ended": ended}


def compare(row: Row, size: str, device: torch.device) -> dict:
    """What was counted and what was measured of a row; without the latter where it did not fit."""
    found, on_gpu = {"row": asdict(row)}, device.type == "cuda"
    if on_gpu:
        phases = counted(row, size)
        found |= {"plan": phases, "cap": cap(phases)}
        found["counted_bytes"] = max(plan.with_spare(*phase) for phase in phases.values())
    measured = alone(__name__, f"measure({row!r}, {size!r}, {found.get('cap')})")
    found |= measured or {}
    if on_gpu and measured:
        taken = {name: phase["peak_bytes"] for name, phase in measured["phases"].items()}
        found["errors"] = {name: sum(phase) / taken[name] - 1 for name, phase in phases.items()}
        found["error"] = max(map(sum, phases.values())) / max(taken.values()) - 1
    return found


def describe(found: dict) -> str:
    """A row of the table on the screen."""
    row = found["row"]
    parts = [f"{row['method']} {row['precision']} {' '.join(row['mode']) or 'in full'}"]
    if "cap" in found:
        parts[0] += f", counted {found['counted_bytes'] / 1e9:.2f} GB"
        held = "held" if "phases" in found else "NOT held"
        parts.append(f"a cap of {found['cap'] / 1e9:.1f} GB was {held}")
    if "phases" not in found:
        return ": ".join([*parts, "it cannot run here"])
    sizes = {name: phase["peak_bytes"] / 1e9 for name, phase in found["phases"].items()}
    by_phase = ", ".join(f"{name} {size:.2f}" for name, size in sizes.items())
    parts.append(f"at most {max(sizes.values()):.2f} GB ({by_phase})")
    if "error" in found:
        parts.append(f"the plan without its margin is off by {found['error']:+.1%}")
    parts.append(f"{1e3 * found['seconds']:.0f} ms a step")
    if "no memory was left" in found["ended"]:
        parts.append("no second look at the bad loss")
    return "; ".join(parts)


def benchmark(what: str, minutes: float, output: Path) -> None:
    """Measures, prints and writes memory-<cpu or cuda>.json: a row at a time until the minutes are
    over. The same command goes on with those that are missing there."""
    device, size, report, name = begin(what, output)
    path, end = name.with_suffix(".json"), time.monotonic() + 60 * minutes
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    same = {key: before.get(key) for key in report} == report
    known = {str(found["row"]): found for found in before.get("rows", ())} if same else {}
    todo, results = rows(device), []
    for row in todo:
        key = str(json.loads(json.dumps(asdict(row))))
        if key not in known and time.monotonic() < end:
            known[key] = compare(row, size, device)
            print(describe(known[key]), flush=True)
        results += [known[key]] if key in known else []
        write_json(path, {**report, "rows": results})
    print(f"{len(results)} of {len(todo)} rows; {path}")
