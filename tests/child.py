"""A program in a process of its own that kills or stops itself at a chosen moment.

Kept apart from the tests: it imports nothing heavy beside minibooth, so a forked copy starts fast.
"""

import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo  # a second's import that the first optimizer of a process does

from minibooth import train
from minibooth.common import cli
from minibooth.evaluate import __main__ as evaluate
from minibooth.formats import hub
from minibooth.training import data

PROGRAMS = {"minibooth.train": train.main, "minibooth.evaluate": evaluate.main}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(names: list[str]) -> None:
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))


def arm(moment: str) -> None:
    """moment: "before NAME" or "after NAME", around the renaming that gives a file or folder that
    name (before it, the half-written part is cut in two); "remove NAME", half through removing a
    folder; "encode N", at the N-th batch of pictures; "step N", in the update of a step; "full N",
    out of memory there. It dies as of kill -9, or, with "SIGINT step N", "SIGINT,SIGINT step N", …,
    sends itself these signals."""
    *signals, kind, name = moment.split()
    replace, rmtree = os.replace, shutil.rmtree

    def dying_replace(source, target):
        if kind == "before" and str(target).endswith(name):
            if Path(source).is_file():
                os.truncate(source, os.path.getsize(source) // 2)
            die()
        replace(source, target)
        if kind == "after" and str(target).endswith(name):
            die()

    def dying_rmtree(folder, **options):
        if kind == "remove" and name in str(folder) and os.path.exists(folder):
            next(f for f in Path(folder).rglob("*") if f.is_file()).unlink()
            die()
        rmtree(folder, **options)

    os.replace, shutil.rmtree = dying_replace, dying_rmtree
    if kind == "encode":
        last = (lambda: stop(signals[0].split(","))) if signals else die
        data.tqdm = lambda rows, **_: (
            row if i + 1 < int(name) else last() for i, row in enumerate(rows)
        )
    if kind in ("step", "full"):
        apply = train.Update.apply

        def dying_apply(self, step, *rest):
            if step == int(name):
                if kind == "full":
                    raise MemoryError
                stop(signals[0].split(",")) if signals else die()
            return apply(self, step, *rest)

        train.Update.apply = dying_apply


def main(
    arguments: list[str],
    moment: str | None,
    log: str,
    program: str,
    toybox: Path | None,
    environment: dict[str, str],
) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = [program, *arguments]
    if toybox:
        hub.toybox = lambda: toybox
    if moment:
        arm(moment)
    cli.run(program, PROGRAMS[program])


def start(
    arguments: list[str],
    moment: str | None,
    log: Path,
    program: str = "minibooth.train",
    toybox: Path | None = None,
    environment: dict[str, str] | None = None,
) -> multiprocessing.Process:
    """`python -m` with arguments, forked from a server that has imported it; `toybox` is the folder
    that it takes for the toybox, `environment` is added to its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "child"])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # Python 3.11 gives the server no other
    given = (arguments, moment, str(log), program, toybox, environment or {})
    process = context.Process(target=main, args=given)
    process.start()
    if path is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = path
    return process
