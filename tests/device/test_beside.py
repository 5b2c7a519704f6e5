"""Real processes that die, hang, say nothing or leave others behind: none of them is waited for in
vain, and none is left."""

import multiprocessing
import os
import select
import signal
import sys
import textwrap
import threading
import time

import pytest

from minibooth.common import cli
from minibooth.device import beside, verdicts

SOON = 3.0  # seconds: of a sleep of 60 nothing is waited for
START = """
    import os, signal, subprocess, sys, time
    alive = os.open(LIFE, os.O_WRONLY)

    def helper(**options):
        "A process that has stdout open, too."
        return subprocess.Popen(["sleep", "60"], stderr=alive, **options)
"""


class Life:
    """A FIFO that a program and all processes that it starts keep open: it tells when the program
    is ready, and when the last of them is gone."""

    def __init__(self, path):
        os.mkfifo(path)
        self.path, self.end = path, os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def read(self):
        assert select.select([self.end], [], [], SOON)[0], "nothing was heard"
        return os.read(self.end, 10)

    def wait_for_start(self):
        while not self.read():
            time.sleep(0.01)  # it has not been opened yet

    def has_ended(self):
        return self.read() == b""


@pytest.fixture
def life(tmp_path):
    life = Life(tmp_path / "life")
    yield life
    os.close(life.end)


@pytest.fixture
def program(tmp_path, life):
    """A program of these lines, which can call `helper`: its command."""

    def write(text):
        script, start = tmp_path / "program.py", START.replace("LIFE", repr(str(life.path)))
        script.write_text(textwrap.dedent(start) + textwrap.dedent(text))
        return [sys.executable, "-S", str(script)]

    return write


@pytest.fixture(autouse=True)
def no_time_is_lost():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < SOON
    assert all(
        thread.daemon or thread is threading.main_thread() for thread in threading.enumerate()
    )


HANGS = """
    os.write(alive, b"1")
    print("begin", flush=True)
    helper()
    time.sleep(60)
"""


def test_what_is_given_arrives_and_what_is_said_is_heard_to_the_end(program):
    """More than a pipe holds, in both directions."""
    command = program(
        "given = sys.stdin.read(); print(len(given)); print('line\\n' * 30000, end='')"
    )
    with beside.started(command, "x" * 200_000) as child:
        assert list(child.lines(SOON)) == ["200000", *["line"] * 30_000]
    assert child.ending == "ended with status 0"


def test_its_last_words_are_kept(program):
    with beside.started(program("1 / 0")) as child:
        assert list(child.lines(SOON)) == []
    assert child.ending == "ended with status 1 (ZeroDivisionError: division by zero)"


def test_silence_is_timed_and_not_the_whole(program, life):
    command = program("for i in range(6): print(i, flush=True); time.sleep(0.2)\ntime.sleep(60)")
    start = time.monotonic()
    with beside.started(command) as child:
        assert list(child.lines(0.9)) == [str(i) for i in range(6)]
    assert time.monotonic() - start > 1.5 and child.ending == "said nothing for 0.9 s"
    assert life.has_ended()


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(3)"])
def test_who_is_left_behind_with_the_pipe_is_ended_too(end, program, life):
    with beside.started(program(f"helper(); helper(); print('begin', flush=True); {end}")) as child:
        assert list(child.lines(60)) == ["begin"]
    assert child.process.returncode in (-signal.SIGKILL, 3) and life.has_ended()


def test_who_has_left_the_group_with_the_pipe_is_not_waited_for(program):
    command = program("print(helper(start_new_session=True).pid, flush=True)")
    with beside.started(command) as child:
        [pid] = child.lines(60)
    os.kill(int(pid), signal.SIGKILL)


def test_it_ends_with_whoever_reads(program, life):
    """One that breaks off, and one that fails."""
    with beside.started(program(HANGS)) as child:
        assert next(child.lines(60)) == "begin"
    assert life.read() == b"1" and life.has_ended()
    with pytest.raises(ZeroDivisionError), beside.started(program(HANGS)) as child:
        for _ in child.lines(60):
            raise ZeroDivisionError
    assert life.read() == b"1" and life.has_ended()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_both_at_once(number, status, program, life):
    def main():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with beside.started(program(HANGS)) as child:
            list(child.lines(60))

    parent = multiprocessing.get_context("fork").Process(target=cli.run, args=("program", main))
    parent.start()
    life.wait_for_start()
    os.kill(parent.pid, number)
    parent.join(SOON)
    assert parent.exitcode == status and life.has_ended()


def test_where_there_are_no_process_groups_the_process_alone_is_ended(program, life, monkeypatch):
    monkeypatch.delattr(os, "killpg")  # as on Windows
    with beside.started(program("print('begin', flush=True); time.sleep(60)")) as child:
        assert list(child.lines(0.5)) == ["begin"]
    assert child.process.returncode == -signal.SIGKILL and life.has_ended()


def test_a_program_that_is_not_there_is_an_error():
    with pytest.raises(OSError), beside.started(["/no/such/program"]):
        pass


# ---- nvidia-smi --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "does, said",
    [
        ("echo 555.42.06; echo 555.42.06", "555.42.06"),
        ("echo NVIDIA-SMI has failed; exit 9", "unknown"),
        ("sleep 60", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_driver_is_asked_for_and_not_waited_for(does, said, tmp_path, monkeypatch):
    if does:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{does}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(verdicts, "SILENCE", 0.3)
    assert verdicts.driver() == said
