"""What TensorBoard reads of a run is what loss.csv and samples/ hold."""

import io
import sys

import numpy as np
import pytest
import runs
from PIL import Image

from minibooth import train
from minibooth.common.errors import UserError
from minibooth.training import events, report

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
SHOWN = {"num_validation_images": 1, "validation_prompt": ("a sks dog",), "validation_steps": 1}


def read(run):
    """TensorBoard's own reader, of all its files."""
    everything = {kind: 0 for kind in event_accumulator.DEFAULT_SIZE_GUIDANCE}
    found = event_accumulator.EventAccumulator(str(run / events.FOLDER), everything)
    return found.Reload()


def agrees(run, steps):
    found, rows = read(run), report.read_losses(run / report.LOSSES)
    assert [row[0] for row in rows] == steps
    assert set(found.Tags()["scalars"]) == set(report.COLUMNS[1:])
    for i, name in enumerate(report.COLUMNS[1:], 1):
        there = [(e.step, e.value) for e in found.Scalars(name)]
        assert there == [(row[0], np.float32(row[i])) for row in rows]  # as they are stored
    pictures = found.Images("samples")
    assert [e.step for e in pictures] == [0, *steps]
    for e in pictures:
        with Image.open(run / "samples" / f"step-{e.step:05d}.png") as grid:
            seen = Image.open(io.BytesIO(e.encoded_image_string))
            assert np.array_equal(np.asarray(seen), np.asarray(grid.convert("RGB")))


def test_losses_and_grids_are_those_of_the_run_also_where_it_was_resumed(tmp_path):
    """It is killed two steps after its last state: those steps are done again, and stand once."""
    settings = {"report_to": "tensorboard", "max_train_steps": 5, "checkpointing_steps": 2, **SHOWN}

    def kill(step, _):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(runs.config(tmp_path, **settings), on_step=kill)
    train.train(runs.config(tmp_path, **settings, resume_from_checkpoint="latest"))
    agrees(tmp_path, [1, 2, 3, 4, 5])


def test_a_run_that_begins_anew_in_its_folder_counts_alone(tmp_path):
    def rows(first):
        return [(step, first + step, 0.0, 0.0, 0.1, 2.0) for step in (1, 2)]

    for first in (10.0, 20.0):  # the first was stopped before it had a state
        log = events.Events(tmp_path, wanted=True, done=0)
        log.picture(Image.new("RGB", (4, 4)), 0)
        log.losses(report.COLUMNS[1:], rows(first))
    assert [e.value for e in read(tmp_path).Scalars("loss")] == [21.0, 22.0]
    assert len(read(tmp_path).Images("samples")) == 1


def test_without_the_flag_there_are_none(tmp_path):
    log = events.Events(tmp_path, wanted=False, done=0)
    log.losses(report.COLUMNS[1:], [(1, 1.0, 1.0, 0.0, 0.1, 2.0)])
    assert runs.files(tmp_path) == set()


def test_a_missing_library_is_said_before_anything_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    given = runs.arguments(runs.settings(tmp_path / "out", report_to="tensorboard"))
    status, _, err = runs.program(monkeypatch, capsys, train, *given)
    assert status == 2 and err.count("\n") == 1 and "pip install tensorboard" in err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_is_one_line(tmp_path, monkeypatch):
    log = events.Events(tmp_path, wanted=True, done=0)
    log.losses(report.COLUMNS[1:], [(1, 1.0, 1.0, 0.0, 0.1, 2.0)])

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log.writer, "flush", full)
    with pytest.raises(UserError, match="No space left on device"):
        log.losses(report.COLUMNS[1:], [(2, 1.0, 1.0, 0.0, 0.1, 2.0)])
