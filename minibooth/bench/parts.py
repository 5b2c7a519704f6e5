"""The parts of bench/first.py: each is called in a process of its own, on a card.

What a part returns: what there is to say ("said"); values that were "compared" with what they are
expected to be; in lines what else "differs"; or why it is "left out". The rest are its numbers.
"""

import contextlib
import gc
import io
import json
import math
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from .. import ops, toybox, train
from ..common.files import gigabytes
from ..device import graphs, settle, verdicts
from ..device.precision import Precision
from ..ops import Case
from ..training import fit, plan, report
from ..training.settings import TrainConfig
from . import check, sides
from .measure import machine, peaks, prepared, versions
from .memory import Row, counted
from .models import model

STEPS = 10  # of training and of the sampler; a CUDA graph is recorded at the fourth
EPS = {"bf16": 2**-7, "fp16": 2**-10}  # between 1 and the next number
SCORES = {  # of the toybox's default run: bounds, and docs/toybox.md's of three seeds on CPUs
    ("subject", "fidelity_seen"): (0.89, 1, "docs/toybox.md: .92 to .95"),
    ("subject", "fidelity_held_out"): (0.82, 1, "docs/toybox.md: .86 to .90"),
    ("class after", "pres"): (-1, 0.08, "docs/toybox.md: −.05 to .01"),
    ("class after", "div"): (0.8, 1, "docs/toybox.md: .84 to .85"),
}
Found = dict  # of a part: "said", what was "compared", what "differs" or why it is "left out", …


def compared(what: str, value: float, low: float, high: float, source: str) -> Found:
    """A value, expected from `low` to `high`, as `source` has it."""
    return {"what": what, "value": value, "low": low, "high": high, "source": source}


def finite(losses: list[float], count: int) -> Found:
    return compared("finite losses", sum(map(math.isfinite, losses)), count, count, "one a step")


def apart(a: Tensor, b: Tensor, precision: str) -> Found:
    """Two ways to do the same differ by rounding, if at all."""
    difference = ((a - b).norm() / b.norm()).item()
    return compared("relative difference", difference, 0, EPS[precision], f"eps of {precision}")


# ---- the machine, training and drawing ---------------------------------------------------------


def look() -> Found:
    """At the machine."""
    device = prepared()
    free, total = torch.cuda.mem_get_info(device)
    here = machine(device) | versions() | {"hash": verdicts.hash_of(Path(__file__).parents[1])}
    here["capability"] = torch.cuda.get_device_capability(device)
    said = ", ".join(f"{name} {value}" for name, value in here.items())
    said += f"; {gigabytes(free)} of {gigabytes(total)} are free"
    eight_bit = fit.installed(("use_8bit_adam",), device)
    found = {"said": said, "here": here, "free": free, "total": total, "eight_bit": eight_bit}
    return found | {"precision": Precision("auto", device).name}


def measured(
    row: sides.Row, size: str, device: torch.device, way: str, calls: int
) -> tuple[Tensor, Found]:
    """What our side of `row` gives, call by call; median seconds, and peaks of memory."""
    results, spent, how = [], [], contextlib.nullcontext()
    if way == "not captured":
        how = mock.patch.object(graphs, "capturable", lambda device: False)
    with tempfile.TemporaryDirectory() as folder, how:
        call = sides.implementation(row, size, device, Path(folder), sides.OURS)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(calls):
            start = time.perf_counter()
            results.append(call().double().cpu())  # waits for the device
            spent.append(time.perf_counter() - start)
    found = {"seconds": statistics.median(spent[calls // 2 :])} | peaks(device)
    del call
    gc.collect()
    torch.cuda.empty_cache()
    return torch.stack(results), found


def times(runs: dict[str, Found]) -> str:
    return ", ".join(f"{way} {run['seconds']:.4g} s" for way, run in runs.items())


def training(row: Row, size: str, kernels: str = "torch") -> Found:
    """Steps captured and not; with kernels "auto" captured, without and with what was taken."""
    device, ways = prepared(), {"captured": "torch", "not captured": "torch"}
    if kernels == "auto":
        known = settle.settle(met(size, row.precision, device), device, tried=not_now)
        if not any(verdict.triton for verdict in known.values()):
            return {"left out": "none is taken"}
        ways = {"captured": "torch", "with kernels": "auto"}
    elif "use_8bit_adam" in row.mode:
        del ways["captured"]
    settings = {"method": row.method} | dict.fromkeys(row.mode, True)
    step, losses, runs = sides.Row("step", 1, row.precision, settings=(*settings.items(),)), [], {}
    for way, chosen in ways.items():
        ops.use(chosen)
        values, runs[way] = measured(step, size, device, way, STEPS)
        losses.append(values)
        runs[way]["losses"] = values.tolist()
    found = [finite(torch.cat(losses).tolist(), STEPS * len(losses))]
    if len(losses) == 2:
        found.append(apart(*losses, row.precision))
    peak = max(run["peak_bytes"] for run in runs.values()) / 1e9
    found.append(compared("GB at most", peak, 0, step_bytes(row, size) / 1e9, "as counted"))
    said = f"a step {times(runs)}; {peak:.2f} GB at most"
    return {"said": said, "compared": found, "runs": runs, "row": asdict(row)}


def step_bytes(row: Row, size: str) -> int:
    """What is counted for training without grids of pictures."""
    return plan.with_spare(*counted(row, size, num_validation_images=0)["training"])


def sampling(precision: str, size: str) -> Found:
    """A picture with guidance, captured and not."""
    device, row = prepared(), sides.Row("sample", 1, precision, steps=STEPS)
    pictures, runs = [], {}
    for way in ("captured", "not captured"):
        drawn, runs[way] = measured(row, size, device, way, 2)
        pictures.append(drawn)
    said = f"a picture {times(runs)}"
    return {"said": said, "compared": [apart(*pictures, precision)], "runs": runs}


def program(changes: dict) -> Found:
    """The training program, with PyTorch's kernels."""
    prepared()
    config, start = TrainConfig(**changes, save_state="none", kernels="torch"), time.perf_counter()
    train.train(config)
    spent = time.perf_counter() - start
    losses = [row[1] for row in report.read_losses(Path(config.output_dir) / "loss.csv")]
    found = [finite(losses, config.max_train_steps)]
    return {"said": f"{spent:.0f} s", "compared": found, "seconds": spent, "losses": losses}


def scores(folder: str) -> Found:
    """The toybox's default run, in fp32, as its scores are known."""
    found = program(toybox.default_run() | {"mixed_precision": "no", "output_dir": folder})
    made = json.loads((Path(folder) / "scores.json").read_text("utf-8"))
    for (of, name), bounds in SCORES.items():
        found["compared"].append(compared(f"{name} of {of}", made[of][name], *bounds))
    return found | {"scores": made}


# ---- the kernels -------------------------------------------------------------------------------


def not_launched(device: torch.device) -> Found | None:
    """Why no kernel is, where none can be."""
    if ops.attention_kernels is None:
        return {"left out": "Triton is not installed"}
    if why := ops.attention_kernels.card.unsupported_card(device):
        return {"left out": why}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        can = settle.wanted(device)
    return None if can else {"differs": [said.getvalue().strip()]}


def right() -> Found:
    """A selection against fp64."""
    if why := not_launched(prepared("auto")):
        return why
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    failures = [line for dtype in dtypes for line in check.check(dtype, check.QUICK)]
    return {"said": f"{len(check.QUICK)} shapes against fp64", "differs": failures}


def met(size: str, precision: str, device: torch.device) -> list[Case]:
    """The cases of a training step and of drawing a picture."""
    sd, autocast = model(size, device), Precision(precision, device).autocast
    side = sd.image_size
    return settle.met(sd, side, side, drawing=[2], training=2, autocast=autocast)


def not_now(*_):
    raise settle.NotTried("trying is another part")


def tried(precision: str, size: str, end: float) -> Found:
    """As each run does it, but until `end` at the latest. What was found out before is not tried
    again."""
    device = prepared("auto")
    if why := not_launched(device):
        return why

    def until_end(*arguments):
        for found in settle.in_a_process(*arguments):
            yield found
            if time.time() > end:
                raise settle.NotTried("no time was left")

    cases = met(size, precision, device)
    known = settle.settle(cases, device, tried=until_end)
    off = [f"{settle.describe(case)}: {v.why}" for case, v in known.items() if v.why]
    if left := len(cases) - len(known):
        off.append(f"{left} of {len(cases)} cases were not tried")
    found = {verdicts.key(case): asdict(verdict) for case, verdict in known.items()}
    return {"said": settle.summary(known), "differs": off, "verdicts": found}
