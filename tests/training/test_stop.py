"""Ctrl-C and SIGTERM: the step is finished, its state is kept, one line says how to go on. And a
folder that is one run's alone."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import runs
from test_resume import assert_same, kill_or_finish, uninterrupted

from minibooth import UserError, train
from minibooth.common import files
from minibooth.training import resume, stop

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp("whole") / "out")


def last_line(said: str) -> str:
    return said.replace("\r", "\n").strip().splitlines()[-1]


# ---- signals -----------------------------------------------------------------------------------


def test_a_run_that_is_stopped_keeps_its_step_and_goes_on_with_equal_bits(tmp_path, whole):
    """After each of its steps: those that write a grid, or a state and a snapshot, and others."""
    folder = tmp_path / "out"
    for step, name, status in [(1, "SIGINT", 130), (2, "SIGTERM", 143), (3, "SIGTERM", 143)]:
        code, said = kill_or_finish(folder, f"{name} step {step}")
        assert code == status, said
        assert "Traceback" not in said and "stopping after this step; once more stops" in said
        assert last_line(said) == (
            f"minibooth.train: stopped; {folder} keeps the state after step {step}: the same "
            "command with --resume_from_checkpoint latest goes on from there"
        )
        assert [f.name for f in resume.steps(folder)] == [f"step-{step:08d}"]
    code, said = kill_or_finish(folder)
    assert code == 0, said
    assert_same(folder, whole)


def test_stopped_in_its_last_step_a_run_only_lacks_its_result(tmp_path, whole):
    folder = tmp_path / "out"
    code, said = kill_or_finish(folder, "SIGTERM step 5")
    assert code == 143 and "after step 5" in last_line(said)
    assert not (folder / "model_index.json").exists()
    kill_or_finish(folder)
    assert_same(folder, whole)


def test_stopped_twice_it_stops_at_once(tmp_path):
    folder = tmp_path / "out"
    code, said = kill_or_finish(folder, "SIGINT,SIGINT step 4")
    assert code == 130 and "after step 2: the same command" in last_line(said)
    assert [f.name for f in resume.steps(folder)] == ["step-00000002"]


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_before_the_first_step_it_stops_at_once(name, status, tmp_path):
    code, said = kill_or_finish(tmp_path / "out", f"{name} encode 1")
    assert code == status and "Traceback" not in said
    assert last_line(said).endswith("anything to go on from: the same command starts again")


def test_without_states_the_snapshots_are_named(tmp_path):
    folder = tmp_path / "out"
    code, said = kill_or_finish(folder, "SIGINT step 3", save_state="none")
    assert code == 130 and f"give --model {folder / 'checkpoint-2'}" in last_line(said)


def test_signals_that_were_ignored_still_are_and_handlers_come_back():
    """As nohup's children, or those a shell starts with &, ignore Ctrl-C."""
    ignored, mine = signal.SIG_IGN, lambda *_: None
    before = signal.signal(signal.SIGINT, ignored), signal.signal(signal.SIGTERM, mine)
    try:
        with pytest.raises(stop.Stopped) as error, stop.between_steps() as asked:
            signal.raise_signal(signal.SIGINT)
            assert not asked.asked
            signal.raise_signal(signal.SIGTERM)
            assert asked.asked
        assert error.value.status == 143
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_outside_the_main_thread_a_run_goes_without_signals():
    def wait():
        with stop.between_steps() as asked:
            seen.append(asked.asked)

    seen = []
    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    assert seen == [False]


# ---- one run in a folder -----------------------------------------------------------------------

HOLD = """
import sys, time
from minibooth.common.files import alone_in
with alone_in(sys.argv[1]):
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_ends_or_is_killed(tmp_path):
    folder = tmp_path / "out"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as first:
        try:
            assert first.stdout.readline() == b"in\n"
            with pytest.raises(UserError, match=r"another run is at work in .*out: wait"):
                train.train(runs.config(folder), runs.model())
            assert runs.files(folder) == {".lock"}
        finally:
            first.kill()
    assert (folder / ".lock").exists()
    train.train(runs.config(folder, max_train_steps=1), runs.model())
    assert ".lock" not in runs.files(folder)


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with files.alone_in(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with files.alone_in(tmp_path / "mine" / "a"):
        (tmp_path / "mine" / "a" / "x").write_text("x")
    with files.alone_in(tmp_path / "mine"):
        pass
    assert runs.files(tmp_path) == {"mine/a/x"}


def test_a_lock_that_was_removed_while_it_was_opened_is_none(tmp_path):
    path = tmp_path / ".lock"
    with open(path, "a") as late:
        path.unlink()
        assert not files.lock(late, path)
        path.write_text("")  # another's
        assert not files.lock(late, path)
