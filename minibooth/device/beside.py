"""A program beside this one, which is never waited for in vain and never left behind."""

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import IO

TICK = 0.02  # seconds between two looks whether it still runs
PATIENCE = 10.0  # seconds that a process may take to die: a driver can hold it for ever


@contextmanager
def started(command: Sequence[str], given: str = "", **environment: str) -> Iterator["Program"]:
    """Within it the program runs, with `given` on its stdin. At the end, whatever that is (an
    error, Ctrl-C and SIGTERM, too), it is killed with all processes that it has started, if it has
    not ended. Raises OSError where there is no such program."""
    # Files in the place of two pipes: a program that does not read or write holds nobody up.
    with tempfile.TemporaryFile("w+") as stdin, tempfile.TemporaryFile("w+b") as stderr:
        stdin.write(given)
        stdin.seek(0)
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
            env=os.environ | environment,
            start_new_session=True,  # a process group of its own; Windows has none
        )
        program = Program(process)
        try:
            yield program
        finally:
            kill(process)
            program.last_words = last_line(stderr)


def kill(process: subprocess.Popen) -> None:
    """With its process group where there are such, and wait until it is gone."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # all of it has ended, or only zombies
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)


def last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


class Program:
    """One that was `started`."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.last_words, self.given_up = process, "", ""

    def lines(self, silence: float) -> Iterator[str]:
        """What it writes to stdout, line by line, until it ends, or has written nothing for
        `silence` seconds, which ends it."""
        said: SimpleQueue[str] = SimpleQueue()

        def listen() -> None:
            with self.process.stdout as stdout:
                for line in stdout:
                    said.put(line.rstrip("\n"))

        # A daemon: where a process that has left the group keeps stdout open, it listens for ever.
        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        heard = time.monotonic()
        while self.process.poll() is None and not self.given_up:
            with suppress(Empty):
                yield said.get(timeout=TICK)
                heard = time.monotonic()
            if time.monotonic() - heard > silence:
                self.given_up = f"said nothing for {silence:g} s"
        kill(self.process)
        listener.join(1)
        while not said.empty():
            yield said.get()

    @property
    def ending(self) -> str:
        """How it ended, once it has, and its last words on stderr: "ended with status 1 (…)"."""
        words = f" ({self.last_words})" if self.last_words else ""
        return self.given_up or f"ended with status {self.process.returncode}{words}"
