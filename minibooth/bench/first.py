"""The first thing to run on a card: whether all of it works there, and one file to send back.

Each part (parts.py) ends in a line: as expected, or what differs. What is expected of a value are
bounds, and where they are from; of times nothing is, they are numbers. A part that fails, or runs
out of memory or time, is a line as well, and the rest goes on. What matters most comes first, and
after --minutes all is over.
"""

import math
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..common.files import gigabytes, write_json, write_text
from ..training import fit, photos
from ..training.settings import TrainConfig
from . import parts
from .measure import Failed, result
from .memory import Row
from .parts import Found

SIZE = "SD 1.5"  # of the networks with random weights
LIMITS = {"kernels tried": 150, "toybox": 150, "your photographs": 240}  # seconds of a part
LIMIT = 90  # of the others
REPORTING = 15  # seconds from a trial's last verdict to its end


def own_run(model: str, photographs: str, prompt: str) -> dict:
    """Settings of a short run on someone's own model and photographs. The class prompt is what is
    left of `prompt` without sks; where that is not in it, there is no prior term. Raises UserError
    where there are no photographs."""
    photos.image_files(photographs)
    noun = " ".join(word for word in prompt.split() if word != "sks")
    model = os.path.abspath(model) if os.path.exists(model) else model
    found = {"model": model, "instance_data_dir": os.path.abspath(photographs)}
    found |= {"max_train_steps": 100, "num_class_images": 8, "checkpointing_steps": 100}
    found |= {"instance_prompt": prompt, "prior_loss_weight": float(noun != prompt)}
    return found | {"class_prompt": noun}


def all_parts(done: dict[str, Found], end: float, own: dict | None, folder: str) -> Iterator[tuple]:
    """(name, call) of each, what matters most first, and what is left out: (name, None, why)."""
    yield "machine", "look()"
    precision = done["machine"].get("precision", "bf16")
    free = done["machine"].get("free", math.inf)
    rows = [Row("dreambooth", mode, precision) for mode in fit.MODES]
    rows = [r for r in rows if fit.possible(r.mode, TrainConfig(), precision, resumed=False)]
    can, cannot = [], []
    for row in (*rows, Row("lora", (), precision)):
        name = f"training, {row.method} {' '.join(row.mode) or 'in full'}"
        need = parts.step_bytes(row, SIZE)
        if need > free:
            cannot.append((name, None, f"{gigabytes(need)} counted, {gigabytes(free)} are free"))
        elif "use_8bit_adam" in row.mode and not done["machine"].get("eight_bit", True):
            cannot.append((name, None, "bitsandbytes is missing, or does not work"))
        else:
            can.append((name, f"training({row!r}, {SIZE!r})"))
    first, *others = can or [None]
    yield from can[:1]
    yield "sampling", f"sampling({precision!r}, {SIZE!r})"
    yield "toybox", f"scores({folder + '/toybox'!r})"
    if own:
        own = own | {"output_dir": folder + "/own"}
        yield "your photographs", f"program({own!r})"
    yield "kernels checked", "right()"
    until = min(end, time.time() + LIMITS["kernels tried"]) - REPORTING
    yield "kernels tried", f"tried({precision!r}, {SIZE!r}, {until!r})"
    if first:
        yield "kernels in training", first[1].removesuffix(")") + ", 'auto')"
    yield from (*others, *cannot)


def line(name: str, found: Found) -> str:
    for what in ("failed", "left out"):
        if what in found:
            return f"{name}: {what}: {found[what]}"
    off = list(found.get("differs", ()))
    for c in found.get("compared", ()):
        if not c["low"] <= c["value"] <= c["high"]:
            bounds = f"{c['low']:.4g} to {c['high']:.4g} ({c['source']})"
            off.append(f"{c['what']} {c['value']:.4g}, expected {bounds}")
    said = [f"differs: {'; '.join(off)}" if off else "as expected", found.get("said", "")]
    return f"{name}: {'; '.join(filter(None, said))}"


def without_names(x, places: tuple[str, ...]):
    """Texts without paths, and without the names of this machine and its user."""
    if isinstance(x, dict):
        return {key: without_names(value, places) for key, value in x.items()}
    if isinstance(x, list):
        return [without_names(value, places) for value in x]
    if not isinstance(x, str):
        return x
    home = os.path.expanduser("~")
    for place in filter(lambda place: len(place) > 1, (*places, os.getcwd(), home)):
        x = x.replace(place, "~")
    x = re.sub(r"(?<![\w.])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\":;,()]+)+", "…", x)
    for name in filter(None, (platform.node(), os.path.basename(home))):
        x = re.sub(rf"\b{re.escape(name)}\b", "…", x)
    return x


def benchmark(minutes: float, output: Path, own: dict | None) -> int:
    """Does, prints and writes all parts, with a run of `own` settings if there are any. first.json
    and first.txt are whole after every part. Returns 1 where anything differs or failed, else 0."""
    output.mkdir(parents=True, exist_ok=True)
    end, done, lines = time.time() + 60 * minutes, {}, []
    places = tuple(str(x) for x in (own or {}).values() if os.path.isabs(str(x)))
    with tempfile.TemporaryDirectory(dir=output) as folder:
        for name, call, *why in all_parts(done, end, own, os.path.abspath(folder)):
            left = min(LIMITS.get(name, LIMIT), end - time.time())
            try:
                if call is None or left < 1:
                    found = {"left out": (*why, "no time was left")[0]}
                else:
                    found = result(parts.__name__, call, left)
            except Failed as error:
                found = {"failed": str(error)}
            found = without_names(found, places)
            done[name] = {"line": line(name, found), **found}
            lines.append(done[name]["line"])
            print(lines[-1], flush=True)
            write_json(output / "first.json", done)
            write_text(output / "first.txt", "\n".join(lines) + "\n")
            picture = Path(folder, "own", "before_after.png")
            if picture.exists():
                picture.replace(output / picture.name)
    return int(any(": differs: " in line or ": failed: " in line for line in lines))
