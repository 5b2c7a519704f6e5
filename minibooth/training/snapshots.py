"""checkpoint-N: what was trained alone after N steps, in fp16, whole or not there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from ..device import ranks
from ..formats import hypernetworks
from ..formats.adapters import DIFFUSERS_EMBEDDING, DIFFUSERS_LORA


def is_model(folder: Path) -> bool:
    names = ("model_index.json", DIFFUSERS_LORA, DIFFUSERS_EMBEDDING)
    return any((folder / name).exists() for name in names) or bool(hypernetworks.held_by(folder))


def found(run: Path) -> list[Path]:
    """The folders checkpoint-N of a run, the newest last."""
    folders = [f for f in run.glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=lambda f: int(f.name.removeprefix("checkpoint-")))


@ranks.by_first
def save(
    run: Path, step: int, write: Callable[[Path, torch.dtype], None], keep: int | None
) -> None:
    """Let `write` fill checkpoint-`step`, unless it is there; then remove all but the newest
    `keep`."""
    final = run / f"checkpoint-{step}"
    part = final.with_name(f".{final.name}.tmp")
    if final.exists():
        return
    shutil.rmtree(part, ignore_errors=True)
    try:
        write(part, torch.float16)
        os.replace(part, final)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if keep is not None:
        remove_old(run, keep)


def remove_old(run: Path, keep: int) -> None:
    for folder in found(run)[:-keep]:
        # Under another name first: a snapshot that is half removed must not look like a whole one.
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.tmp")))
