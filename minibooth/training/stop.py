"""Ctrl-C and SIGTERM between two steps, where a run can be saved, instead of within one."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..common.errors import Stopped
from ..device import ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)
HEARD = b"\nstopping after this step; once more stops at once, without saving it\n"


@dataclass
class Stop:
    """Whether the run was asked to stop."""

    signal: int | None = None

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def heard(self) -> bool:
        """Whether it was, all ranks of it together: one that was asked stops all."""
        if ranks.any_of(self.asked) and not self.asked:
            self.signal = signal.SIGTERM
        return self.asked


@contextmanager
def between_steps() -> Iterator[Stop]:
    """Within it the first Ctrl-C or SIGTERM is kept in what it gives, for the loop to look at after
    each step, and a second one is obeyed at once. Raises Stopped at its end if there was one.
    """
    stop = Stop()

    def hear(number: int, _) -> None:
        if stop.asked:
            raise Stopped(status=128 + number)
        stop.signal = number
        if ranks.rank() == 0:
            os.write(2, HEARD)  # print() may be what was interrupted

    before = {}
    if threading.current_thread() is threading.main_thread():  # others get no signals
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {n: h for n, h in before.items() if h not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, hear)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.asked:
        raise Stopped(status=128 + stop.signal)
