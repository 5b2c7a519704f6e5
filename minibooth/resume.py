"""The resume state: everything a run needs to go on as if it had never stopped.

It lives in <output_dir>/state/step-N/: one safetensors file and the settings that made it. A state
is written under another name and renamed when whole, then older ones are removed; so at any moment,
also in the middle of saving, the newest whole one is there.
"""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import UserError
from .files import write_json, write_safetensors


def save(run: Path, step: int, tensors: dict[str, Tensor], identity: dict) -> None:
    """Write the state after `step` updates. Raises UserError if the disk is too full."""
    folder = run / "state" / f"step-{step:08d}"
    part = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        write_safetensors(part / "state.safetensors", tensors)
        write_json(part / "identity.json", identity)
        if not folder.exists():
            os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for older in steps(run):
        if older != folder:
            shutil.rmtree(older)


def steps(run: Path) -> list[Path]:
    """The states of a run, newest first."""
    found = (run / "state").glob("step-*")
    return sorted((f for f in found if re.fullmatch(r"step-\d{8}", f.name)), reverse=True)


def load(run: Path) -> tuple[int, dict[str, Tensor], dict] | None:
    """The newest whole state: (step, tensors, identity); None if there is none yet."""
    for folder in steps(run):
        try:
            identity = json.loads((folder / "identity.json").read_text("utf-8"))
            with safe_open(folder / "state.safetensors", framework="pt") as f:
                tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
            return int(folder.name.removeprefix("step-")), tensors, identity
        except (OSError, ValueError, SafetensorError) as e:
            warnings.warn(f"{folder} is damaged ({e}): trying an older state", stacklevel=2)
    return None


def check(run: Path, saved: dict, now: dict) -> None:
    """Raise UserError unless the run that wrote `saved` is the one that goes on."""
    different = [
        f"{key} was {saved.get(key)!r} and is {now.get(key)!r}"
        for key in now
        if saved.get(key) != now.get(key)
    ]
    if different:
        raise UserError(
            f"cannot resume {run}: {'; '.join(different)}. Give the old settings, "
            "or start anew with another --output_dir"
        )
