"""What a run has on the disk: as much as it says beforehand, and what of it can be left out."""

import contextlib
import dataclasses
import os
import sys
from pathlib import Path

import eight_bit_stand_in
import pytest
import runs
import torch

from minibooth import UserError, train
from minibooth.bench import models
from minibooth.formats.tensor_files import read_tensors
from minibooth.training import start
from minibooth.training.settings import TrainConfig


@pytest.fixture(autouse=True)
def eight_bit(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", eight_bit_stand_in.MODULE)


def tensor_bytes(folder):
    """Of its weight files, also of those that have a temporary name still."""
    total = 0
    for path in folder.rglob("*.safetensors*"):
        with open(path, "rb") as f:
            header = int.from_bytes(f.read(8), "little")
        total += path.stat().st_size - 8 - header
    return total


@contextlib.contextmanager
def watched(folder):
    """The bytes there whenever a file or a folder is about to get its name: before it replaces
    another, and before older ones go."""
    sizes, replace = [0], os.replace

    def measured(*arguments):
        sizes.append(tensor_bytes(folder))
        replace(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", measured)
        yield sizes


RUNS = {
    "one state": {},
    "two states and a snapshot": {"checkpointing_steps": 2},
    "all snapshots": {"checkpointing_steps": 1, "max_train_steps": 4},
    "the newest snapshot": {
        "checkpointing_steps": 1,
        "max_train_steps": 4,
        "checkpoints_total_limit": 1,
    },
    "the text encoder, too": {"checkpointing_steps": 2, "train_text_encoder": True},
    "averages in 8 bits": {"checkpointing_steps": 2, "use_8bit_adam": True},
}


@pytest.mark.parametrize("bits", ["full", "half", "none"])
@pytest.mark.parametrize("name", RUNS)
def test_what_is_reserved_is_what_there_is_at_most(name, bits, tmp_path):
    config = runs.config(tmp_path / "out", save_state=bits, **RUNS[name])
    with watched(tmp_path / "out") as sizes:
        train.train(config, runs.model())
    assert start.disk_needed(runs.model(), config) == max(sizes)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("bits", ["full", "half"])
def test_a_run_that_goes_on_counts_what_is_there_already(finished, bits, tmp_path):
    out = tmp_path / "out"
    train.train(runs.config(out, max_train_steps=1, save_state=bits), runs.model())
    if not finished:
        for path in (out / "model_index.json", *out.glob("*/*model.safetensors")):
            path.unlink()
    again = {"max_train_steps": 2, "save_state": bits, "resume_from_checkpoint": "latest"}
    config = runs.config(out, **again)
    with watched(out) as sizes:
        train.train(config, runs.model())
    needed = start.disk_needed(runs.model(), config, resumed=True, finished=finished)
    assert needed == max(sizes)


def test_what_is_there_is_not_reserved_again_but_class_images_count_for_nothing(
    tmp_path, monkeypatch
):
    out, reserved = tmp_path / "out", []
    config = runs.config(out, max_train_steps=1)
    train.train(config, runs.model())
    (out / "class_images").mkdir()
    (out / "class_images" / "large.png").write_bytes(bytes(10**6))
    weights = sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    monkeypatch.setattr(start, "require_space", lambda folder, size: reserved.append(size))
    again = dataclasses.replace(config, max_train_steps=2, resume_from_checkpoint="latest")
    train.train(again, runs.model())
    assert reserved == [start.disk_needed(runs.model(), again, True, True) - weights]


def test_what_sd_15_reserves():
    """Three snapshots, a state and the next one or, where that is larger, the model."""
    sd = models.model("SD 1.5", torch.device("meta"))
    model, unet = (4 * n for n in (1_066_235_307, 859_520_964))
    scalars = 4 * (len(list(sd.unet.parameters())) + 2)
    assert start.disk_needed(sd, TrainConfig()) == 3 * model // 2 + 2 * (3 * unet + scalars)
    half = start.disk_needed(sd, TrainConfig(save_state="half"))
    assert half == 3 * model // 2 + 2 * (3 * unet // 2 + scalars)
    assert start.disk_needed(sd, TrainConfig(save_state="none")) == 3 * model // 2 + model
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text("utf-8")
    sizes = [start.disk_needed(sd, TrainConfig(save_state=x)) for x in ("full", "half", "none")]
    full, halved, none = (f"{x / 1e9:.0f} GB" for x in sizes)
    assert f"wants {full} of disk, {halved} with `--save_state half`" in guide
    assert f"and {none} with `none`" in guide
    once = start.disk_needed(sd, TrainConfig(checkpointing_steps=800))
    assert once == 3 * unet + scalars + model


# ---- states in 16 bits, and none ---------------------------------------------------------------


@pytest.mark.parametrize("eight_bit_adam", [False, True])
def test_a_state_in_16_bits_goes_on_but_for_rounding(eight_bit_adam, tmp_path):
    options = {"use_8bit_adam": eight_bit_adam, "max_train_steps": 4}
    begun = runs.flat(runs.model().unet.state_dict())
    whole = runs.flat(train.train(runs.config(tmp_path / "whole", **options)).unet.state_dict())
    out, half = tmp_path / "out", options | {"save_state": "half"}
    train.train(runs.config(out, **half | {"max_train_steps": 2}))
    tensors, _ = read_tensors(out / "state" / "step-00000002" / "state.safetensors")
    kinds = {key.split(".")[0]: set() for key in tensors}
    for key, x in tensors.items():
        kinds[key.split(".")[0]].add(x.dtype)
    averages = {"exp_avg": {torch.bfloat16}, "exp_avg_sq": {torch.bfloat16}}
    if eight_bit_adam:
        averages = {f"state{i}": {torch.uint8, torch.bfloat16} for i in (1, 2)}
        averages |= {f"absmax{i}": {torch.bfloat16} for i in (1, 2)}
    counts = {key: {torch.float32} for key in ("step", "scale", "good_steps")}
    assert kinds == {"unet": {torch.float16}, **averages, **counts}

    resumed = train.train(runs.config(out, **half, resume_from_checkpoint="latest"))
    resumed = runs.flat(resumed.unet.state_dict())
    assert not torch.equal(resumed, whole)
    assert (resumed - whole).norm() < 0.02 * (whole - begun).norm()


def test_the_kind_of_state_may_change_when_a_run_goes_on(tmp_path):
    out = tmp_path / "out"
    train.train(runs.config(out, max_train_steps=1, save_state="half"))
    again = {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    train.train(runs.config(out, **again))
    tensors, _ = read_tensors(out / "state" / "step-00000002" / "state.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.float32}


def test_a_run_without_a_state_says_that_it_cannot_go_on(tmp_path, capsys):
    out = tmp_path / "out"
    sd = train.train(runs.config(out, save_state="none", checkpointing_steps=2))
    assert not (out / "state").exists() and "more steps" not in capsys.readouterr().out
    whole = train.train(runs.config(tmp_path / "whole", checkpointing_steps=2))
    assert f"{tmp_path / 'whole' / 'state'} (" in capsys.readouterr().out
    assert torch.equal(*(runs.flat(x.unet.state_dict()) for x in (sd, whole)))
    assert runs.files(tmp_path / "whole") - runs.files(out) == {
        "state/step-00000003/state.safetensors",
        "state/step-00000003/identity.json",
    }
    again = {"max_train_steps": 5, "save_state": "none", "resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match="no state to resume from") as error:
        train.train(runs.config(out, **again))
    said = str(error.value)
    assert "--save_state none" in said and f"--model {out}" in said and "\n" not in said
