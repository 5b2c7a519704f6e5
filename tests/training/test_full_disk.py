"""A disk that is full from some write of a run on: one line, whole files, and the run can go on."""

import builtins
import contextlib
import errno
import io
import os
import random
import shutil
from pathlib import Path

import pytest
import runs
from test_resume import SETTINGS as OF_RESUME
from test_resume import assert_same

from minibooth import train
from minibooth.training import report, resume, snapshots

SETTINGS = OF_RESUME | {"max_train_steps": 2, "checkpointing_steps": 1, "validation_steps": 1}


class Disk:
    """Counts what needs room in a folder, and has room for the first `room` of it: files and
    folders that are made or renamed, and bytes that are written. Python's buffers lie above it, so
    that an error comes where a real one would: with the bytes of a write, or not before closing.
    """

    def __init__(self, folder: Path, room: float = float("inf")):
        self.folder, self.room, self.used = str(folder), room, []

    def take(self, path, what: str) -> None:
        if str(path).startswith(self.folder):
            self.used.append(f"{what} {Path(path).relative_to(self.folder)}")
            if len(self.used) > self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    @contextlib.contextmanager
    def inserted(self):
        disk, plain, mkdir, replace = self, builtins.open, os.mkdir, os.replace

        class File(io.FileIO):
            full = False

            def write(self, data):
                try:
                    disk.take(self.name, "write")
                except OSError:  # as a real disk: what there is room for, then the error
                    if self.full or len(data) < 2:
                        raise
                    self.full, data = True, bytes(data)[: len(data) // 2]
                return super().write(data)

        def limited(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **more):
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return plain(file, mode, buffering, encoding, errors, newline, **more)
            if not os.path.exists(file):
                disk.take(file, "make")
            raw = File(file, mode.replace("b", "").replace("t", ""))
            file = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return file if "b" in mode else io.TextIOWrapper(file, encoding, errors, newline)

        def limited_mkdir(path, *args, **options):
            if not os.path.exists(path):
                disk.take(path, "make")
            mkdir(path, *args, **options)

        def limited_replace(source, target):
            disk.take(target, "name")
            replace(source, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builtins, "open", limited)
            patch.setattr(io, "open", limited)
            patch.setattr(os, "mkdir", limited_mkdir)
            patch.setattr(os, "replace", limited_replace)
            yield self


def run(folder, monkeypatch, capsys):
    return runs.program(
        monkeypatch, capsys, train, *runs.arguments(runs.settings(folder, **SETTINGS))
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with room for everything, and what that was."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    options = SETTINGS | {"validation_prompt": ("sks",)}
    with Disk(folder).inserted() as disk:
        train.train(runs.config(folder, **options))
    return folder, disk.used


def check(room: int, whole: Path, folder: Path, monkeypatch, capsys) -> None:
    with Disk(folder, room).inserted() as disk:
        status, _, err = run(folder, monkeypatch, capsys)
    where = disk.used[room]
    line = err.replace("\r", "\n").strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in err, (where, err)
    assert line.startswith("minibooth.train: ") and "make room on" in line, (where, line)

    written = runs.files(folder) if folder.exists() else set()
    assert not [name for name in written if ".tmp" in name or name == ".lock"], where
    for name in written:
        if name == report.LOSSES:  # which is appended to
            assert (whole / name).read_text().startswith((folder / name).read_text()), where
        elif not name.startswith("state/") and not name.endswith("README.md"):  # written twice
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), (where, name)
    for model in (folder, *snapshots.found(folder)):
        if snapshots.is_model(model):
            of_whole = {
                f.relative_to(whole)
                for f in (whole / model.relative_to(folder)).rglob("*.safetensors")
            }
            assert {f.relative_to(folder) for f in model.rglob("*.safetensors")} == of_whole
    states = resume.steps(folder)
    assert not states or resume.load(folder).step == int(states[0].name.removeprefix("step-"))

    status, _, err = run(folder, monkeypatch, capsys)
    assert status == 0, (where, err)
    assert_same(folder, whole)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 0.99])
def test_a_disk_that_fills_up_costs_nothing_but_the_last_steps(
    share, whole, tmp_path, monkeypatch, capsys
):
    folder, used = whole
    check(int(share * len(used)), folder, tmp_path / "out", monkeypatch, capsys)


@pytest.mark.slow
def test_a_disk_may_fill_up_at_any_write_of_a_run(whole, tmp_path, monkeypatch, capsys):
    """Of the writes of one file, tensor by tensor, the first and the last; of all else, each."""
    folder, used = whole
    first_and_last = {used.index(what) for what in used}
    first_and_last |= {len(used) - 1 - used[::-1].index(what) for what in used}
    rooms = sorted(first_and_last)
    random.Random(0).shuffle(rooms)
    for room in rooms:
        check(room, folder, tmp_path / f"out-{room}", monkeypatch, capsys)
        shutil.rmtree(tmp_path / f"out-{room}")
    with capsys.disabled():
        print(f"\n{len(rooms)} of {len(used)} writes, each of which failed in turn")
