"""Which kernels a run takes: what it will meet is tried once on each machine, and remembered.

An illegal access ruins a process's whole GPU context, so cases are tried (trial.py) in a process of
its own: when that dies, the case it died of goes to PyTorch, and another process does the rest.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from .. import ops
from ..ops import Case
from ..pipeline import StableDiffusion, vae_batch
from . import verdicts
from .trial import EPS, examine, graph_time, make_inputs
from .verdicts import Verdict

MOST_DEATHS, SECONDS = 3, 120.0  # of the process that tries; how long one may take


# ---- in a process of its own -------------------------------------------------------------------

MARK = "verdict "  # before the lines that are meant for the parent


def compile_case(case: Case, capability: int) -> None:
    """Compile its kernels into Triton's cache, without a GPU: for a process beside others."""
    from minibooth_kernels import attention, group_norm, report

    inputs, _ = make_inputs(case, torch.device("meta"))
    a, b, c = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in inputs)
    # What does not compile is found out, and said, when it is tried.
    with contextlib.suppress(Exception), report.recording(capability):
        if case.op == "attention":
            out, L = attention._attention(a, b, c, 1.0)
            if case.backward:
                attention._attention_backward(out, a, b, c, out, L, 1.0)
        else:
            groups, silu, *_ = case.norm
            y, mean, rstd = group_norm._group_norm(a, groups, b, c, EPS, silu)
            if case.backward:
                group_norm._group_norm_backward(y, a, groups, b, c, mean, rstd, silu)


def try_all(cases: list[Case], device: torch.device) -> None:
    """The child's work: compile side by side, then try one by one; a line for each on stdout."""
    capability = ops.attention_kernels.card.capability(device)
    workers = min(8, os.cpu_count() or 1, len(cases))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(compile_case, cases, [capability] * len(cases)):
            print("compiled", flush=True)
    for case in cases:
        verdict = examine(case, device, graph_time)
        torch.cuda.synchronize()  # ends this process where the case ruined its context
        print(MARK + json.dumps(asdict(verdict)), flush=True)
        torch.cuda.empty_cache()


CHILD = (sys.executable, "-m", "minibooth.training.settle")


def in_a_process(
    cases: list[Case],
    device: torch.device,
    on_compiled: Callable[[], object] = lambda: None,
    child: tuple[str, ...] = CHILD,
) -> Iterator[tuple[Case, Verdict]]:
    """`examine` of every case, in order, each as soon as it is known."""
    todo, deaths, why = list(cases), 0, ""
    command = [*child, str(device)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    while todo and deaths < MOST_DEATHS:
        with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
            alarm = threading.Timer(SECONDS, process.kill)
            alarm.start()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(todo))
                process.stdin.close()
            for line in process.stdout:
                if line.startswith(MARK):
                    yield todo.pop(0), Verdict(**json.loads(line.removeprefix(MARK)))
                elif deaths == 0:
                    on_compiled()
            alarm.cancel()
        if todo:
            deaths += 1
            why = f"the process that tried it ended with status {process.returncode}"
            yield todo.pop(0), Verdict(False, {}, why)
    for case in todo:
        yield case, Verdict(False, {}, f"not tried, since {why} {deaths} times")


# ---- for a run ---------------------------------------------------------------------------------


def met(
    sd: StableDiffusion,
    height: int,
    width: int,
    *,
    drawing: Iterable[int],
    training: int = 0,
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> list[Case]:
    """The cases that a run will meet, found by passing zeros through its networks where they are:
    pictures of so many pixels, `drawing` at once (with guidance, each in two halves); `training`
    samples in a step, 0 for none."""
    h, w = height // sd.vae.factor, width // sd.vae.factor
    text = sd.configs["unet"]["cross_attention_dim"]

    def unet(batch: int) -> None:
        x = torch.zeros(batch, sd.configs["unet"]["in_channels"], h, w, device=sd.device)
        t = torch.zeros(batch, dtype=torch.int64, device=sd.device)
        with autocast():
            sd.unet(x, t, torch.zeros(batch, 77, text, device=sd.device))

    with torch.no_grad():
        with ops.observed() as seen:
            few = vae_batch(height * width)
            for count in dict.fromkeys(drawing):
                unet(2 * count)
                z = torch.zeros(min(few, count), sd.configs["unet"]["out_channels"], h, w)
                sd.vae.decode(z.to(sd.device))
            if training:
                sd.vae.encode(torch.zeros(few, 3, height, width, device=sd.device))
        cases = list(seen)
        if training:
            with ops.observed() as seen:
                unet(training)
            cases += [case._replace(backward=True) for case in seen]
    return cases


def settle(
    cases: Iterable[Case],
    device: torch.device,
    *,
    path: Path | None = None,
    tried: Callable[..., Iterator[tuple[Case, Verdict]]] = in_a_process,
) -> dict[Case, Verdict]:
    """Find out, or remember, in which of `cases` the kernels are right and faster on this device,
    have ops take them there, and say so in one line (and one for each case that went wrong)."""
    cases, path = list(dict.fromkeys(cases)), path or verdicts.file()
    here = verdicts.machine(device)
    known = verdicts.read(path, here)
    todo = [case for case in cases if verdicts.key(case) not in known]
    if todo:
        found = {}
        with tqdm(total=2 * len(todo), desc="trying kernels", unit="", leave=False) as bar:
            for case, verdict in tried(todo, device, bar.update):
                found[verdicts.key(case)] = verdict
                bar.n, _ = len(todo) + len(found), bar.refresh()
        # Another time the card may have room.
        lasting = {k: v for k, v in found.items() if "OutOfMemoryError" not in (v.why or "")}
        verdicts.write(path, here, lasting)
        known |= found
        for case in todo:
            if why := found[verdicts.key(case)].why:
                print(f"kernels: {describe(case)}: {why}; PyTorch's is taken")
    chosen = {case: known[verdicts.key(case)] for case in cases}
    ops.prefer(case for case, verdict in chosen.items() if verdict.triton)
    print(summary(chosen))
    return chosen


def describe(case: Case) -> str:
    sizes = "×".join(map(str, case.shape))
    return f"{case.op} {sizes} {case.dtype}{' with gradients' if case.backward else ''}"


def summary(chosen: dict[Case, Verdict]) -> str:
    """kernels: 14 of 18 attention shapes and 22 of 25 norms by Triton, 1.31× PyTorch's speed …"""
    counts = []
    for op, name in (("attention", "attention shapes"), ("group_norm", "norms")):
        of_op = [verdict.triton for case, verdict in chosen.items() if case.op == op]
        counts.append(f"{sum(of_op)} of {len(of_op)} {name}")
    taken = [verdict.us for verdict in chosen.values() if verdict.triton]
    theirs = [min((t for n, t in us.items() if n != "triton"), default=0.0) for us in taken]
    ours = sum(us["triton"] for us in taken)
    speed = f", {sum(theirs) / ours:.2f}× PyTorch's speed for them" if ours else ""
    return f"kernels: {' and '.join(counts)} by Triton{speed}"


def wanted(device: torch.device) -> bool:
    """Whether there is anything to try: a CUDA card that the kernels know, and the mode auto."""
    if device.type != "cuda" or ops.mode() != "auto" or ops.attention_kernels is None:
        return False
    return ops.attention_kernels.card.unsupported(torch.empty(1, device=device)) is None


if __name__ == "__main__":
    given = [Case(*c) for c in json.loads(sys.stdin.read())]
    given = [c._replace(shape=tuple(c.shape), norm=c.norm and tuple(c.norm)) for c in given]
    try_all(given, torch.device(sys.argv[1]))
