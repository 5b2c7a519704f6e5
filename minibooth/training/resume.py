"""The resume state: everything a run needs to go on as if it had never stopped.

It lives in <output_dir>/state/step-N/: one safetensors file and the settings that made it. A state
is written under another name and renamed when whole, then the others are removed; so at any moment,
also in the middle of saving, a whole one is there.
"""

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..common.errors import UserError, first_line
from ..common.files import read_text, write_json
from ..device import ranks
from ..formats.tensor_files import read_tensors, write_safetensors
from ..pipeline import StableDiffusion
from . import plan, report
from .optimizer import Update, fresh_state
from .photos import Photos
from .settings import TrainConfig

# Temporary names: of a snapshot, of a state, and files.atomic's with the number of its process.
LEFTOVER = re.compile(r"\.(checkpoint-\d+|step-\d{8}|.+\.\d+)\.tmp")
# Hashes, and what is long.
UNTOLD = ("model", "base model", "photographs", "class images", "prompts")


@ranks.by_first
def save(run: Path, step: int, tensors: dict[str, Tensor], identity: dict, bits: str) -> None:
    """Write the state after `step` updates and remove all others. `bits` is --save_state. Raises
    UserError if the disk is too full."""
    if bits == "none":
        return
    folder = run / "state" / f"step-{step:08d}"
    part = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        write_safetensors(part / "state.safetensors", tensors, STORED[bits])
        write_json(part / "identity.json", identity)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    keep_only(run, step)


def in_16_bits(x: Tensor) -> torch.dtype:
    """Weights in fp16, as in a snapshot; averages, which are too small for it, in bf16; counts and
    codes as they are."""
    if x.ndim == 0 or not x.is_floating_point():
        return x.dtype
    return torch.float16 if isinstance(x, nn.Parameter) else torch.bfloat16


STORED: dict[str, Callable[[Tensor], torch.dtype]] = {
    "full": lambda x: x.dtype,
    "half": in_16_bits,
}  # --save_state → what a tensor of the state is written as


def size(sd: StableDiffusion, config: TrainConfig) -> int:
    """Bytes of a state's tensors."""
    if config.save_state == "none":
        return 0
    stored, total = STORED[config.save_state], 2 * torch.float32.itemsize  # fp16's scale
    for numbers, times in Counter(p.numel() for p in plan.trainable(sd, config)).items():
        weight = nn.Parameter(torch.empty(numbers, device="meta"))
        tensors = weight, *fresh_state(weight.detach(), config.use_8bit_adam).values()
        total += times * sum(x.numel() * stored(x).itemsize for x in tensors)
    return total


def keep_only(run: Path, step: int) -> None:
    """Remove the states of all other steps: older ones, and newer ones that were damaged."""
    for folder in steps(run):
        if folder.name != f"step-{step:08d}":
            shutil.rmtree(folder)


def steps(run: Path) -> list[Path]:
    """The states of a run, newest first."""
    found = (run / "state").glob("step-*")
    return sorted((f for f in found if re.fullmatch(r"step-\d{8}", f.name)), reverse=True)


class State(NamedTuple):
    """Where a run stopped."""

    step: int  # updates that were done
    tensors: dict[str, Tensor]  # weights and optimizer; read when they are used
    identity: dict  # of the run that wrote it


def load(run: Path) -> State | None:
    """The newest whole state; None if there is none yet. Raises UserError if there are states but
    all are damaged."""
    for folder in steps(run):
        try:
            identity = json.loads(read_text(folder / "identity.json"))
            at_first = {"method": "dreambooth", "lr_scheduler": "constant"}  # there was no other
            identity = at_first | identity
            tensors, _ = read_tensors(folder / "state.safetensors")
            return State(int(folder.name.removeprefix("step-")), tensors, identity)
        except (OSError, ValueError, UserError) as e:
            warnings.warn(f"{folder} is damaged ({first_line(e)})", stacklevel=2)
    if steps(run):
        raise UserError(
            f"no state of {run} is whole, so it cannot go on: start anew with another "
            "--output_dir, or train its newest checkpoint further as --model"
        )
    return None


def restore(saved: State | None, run: Path, weights: dict[str, Tensor], optimizer: Update) -> int:
    """Take over weights, optimizer and loss.csv, if there is a state; the updates already done."""
    if saved is None:
        forget_steps(run, after=0)
        return 0
    with torch.no_grad():
        for key, p in weights.items():
            p.copy_(saved.tensors[key])
    optimizer.load_state(saved.tensors)
    forget_steps(run, after=saved.step)
    print(f"resumed {run} at step {saved.step}")
    return saved.step


@ranks.by_first
def forget_steps(run: Path, after: int) -> None:
    """Remove what an earlier run wrote of steps that come again, and all states but the last."""
    losses = run / report.LOSSES
    if after == 0:
        losses.unlink(missing_ok=True)
    else:
        keep_only(run, after)
        report.truncate_losses(losses, after)


def identify(
    config: TrainConfig,
    fingerprint: str,
    photos: Photos,
    resolution: int,
    precision: str,
    device: torch.device,
) -> dict:
    """What must be the same when a run goes on, but for the class images."""
    names = ("instance_prompt", "class_prompt", "prior_loss_weight", "seed", "learning_rate")
    names += ("lr_scheduler", "lr_warmup_steps", "train_text_encoder", "text_encoder_learning_rate")
    names += ("gradient_accumulation_steps", "adam_weight_decay")
    names += ("use_8bit_adam", "optimizer_in_backward", "max_grad_norm", "snr_gamma")
    names += ("random_flip", "num_class_images", "method")
    if config.method == "lora":
        names += ("rank", "lora_alpha", "lora_targets")
    if config.trains_hypernetwork:
        names += ("hypernetwork_sizes", "layer_structure", "activation_func", "weight_init")
    if config.trains_word:
        names += ("placeholder_token", "initializer_token", "num_vectors", "learnable_property")
    names += ("class_sampler", "class_steps", "class_guidance_scale")
    # 8-bit averages are in blocks of neighbours in memory, and a GPU lays out weights its way.
    place = {"device": device.type} if config.use_8bit_adam else {}
    return {
        "model": fingerprint[:16],
        "photographs": photos.content_hash(),
        "resolution": resolution,
        "mixed_precision": precision,
        "train_batch_size": config.train_batch_size * ranks.count(),  # of all of them together
        **{name: getattr(config, name) for name in names},
        **place,
    }


def check(run: Path, saved: dict, now: dict) -> None:
    """Raise UserError unless the run that wrote `saved` is the one that goes on."""
    if different := changes(saved, now):
        if ranks.count() > 1 and saved["train_batch_size"] != now["train_batch_size"]:
            different += f" over all {ranks.count()} ranks, for each of which it is given"
        raise UserError(
            f"cannot resume {run}: {different}. Give the old settings, "
            "or start anew with another --output_dir"
        )


def remember(folder: Path, settings: dict) -> None:
    """Write settings.json into a folder of results. Raises UserError if it holds others': what is
    found there is not done again, so it must be what would be done now."""
    path = folder / "settings.json"
    settings = {name: without_place(value) for name, value in settings.items()}
    settings = json.loads(json.dumps(settings))  # tuples as the lists that they are in the file
    if not path.exists():
        return write_json(path, settings)
    try:
        before = dict(json.loads(read_text(path)))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}): give another --output_dir") from None
    if different := changes(before, settings):
        raise UserError(
            f"{folder} holds results of other settings: {different}. Give these, or another "
            "--output_dir"
        )


def without_place(value):
    """An absolute path as its last part and a hash of the whole, which tells it from others; other
    settings as they are."""
    if not isinstance(value, str) or not os.path.isabs(value):
        return value
    return f"{Path(value).name} ({hashlib.sha256(value.encode()).hexdigest()[:8]})"


def changes(before: dict, now: dict) -> str:
    """What is another than before, in words; empty if nothing is."""
    return "; ".join(
        f"the {key} changed" if key in UNTOLD else f"{key} was {before.get(key)!r} and is {value!r}"
        for key, value in now.items()
        if before.get(key) != value
    )


def remove_leftovers(run: Path, older: float = 0.0) -> None:
    """Remove what a run that was killed in the middle of saving left half-written, so many seconds
    ago or more: where several programs write, one may be writing now."""
    for path in [*run.glob(".*.tmp"), *run.glob("*/.*.tmp")]:
        if LEFTOVER.fullmatch(path.name):
            with suppress(FileNotFoundError):  # it was finished, or another program removed it
                if time.time() - path.stat().st_mtime >= older:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
