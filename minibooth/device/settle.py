"""Which kernels a run takes: what it will meet is tried once on each machine, and remembered.

Only what is replayed from a CUDA graph is tried: the UNet where it draws and where it trains, on a
single GPU. Calls that are launched one by one wait for Python more than for the GPU, and an own
operator keeps Python busier than PyTorch's; there PyTorch's are taken (ops.prefer). So with several
ranks and in the VAE, in training with 8-bit AdamW or with a watcher of its steps, and in drawing
where memory is short.

Kernels are tried with all the tiles that their tables have for the card, so long as CHOOSING says,
and then with the first of each. Which one is taken is a part of the verdict, so that two runs on
one machine add up in the same order.

An illegal access ruins a process's whole GPU context, so cases are tried (trial.py) in a process of
its own: when that dies, the case it died of goes to PyTorch, and another process does the rest.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .. import ops
from ..ops import Case
from ..pipeline import StableDiffusion
from ..text_encoder import Condition
from . import beside, graphs, verdicts
from .trial import counts, examine, graph_time, make_inputs, ours, results
from .verdicts import NO_MEMORY, Verdict

MOST_DEATHS = 3  # of the process that tries
SILENCE = 120.0  # seconds in which it must say something: it imports PyTorch, and compiles
CHOOSING = 90.0  # seconds in which other tiles than the first of each kernel are tried


# ---- in a process of its own -------------------------------------------------------------------

COMPILED, BEGIN = "compiled", "begin"  # lines for the parent: one more kernel; a case comes now
VERDICT, CANNOT = "verdict ", "cannot "  # what others begin with: how it went; why none is tried


class NotTried(Exception):
    """Why cases are left that were not tried, of which nothing is known and nothing remembered."""


def compile_case(case: Case, choices: tuple[int, ...], capability: int) -> None:
    """Compile its kernels into Triton's cache, without a GPU: for a process beside others."""
    from minibooth_kernels import report

    inputs, upstream = make_inputs(case, torch.device("meta"))
    *inputs, upstream = (
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in (*inputs, upstream)
    )
    # What does not compile is found out, and said, when it is tried.
    with contextlib.suppress(Exception), report.recording(capability):
        results(ours(case, choices), inputs, upstream, case.backward)


def to_compile(cases: list[Case], device: torch.device) -> tuple[list[tuple], list[tuple]]:
    """Cases with choices, of which each is compiled once: the first choice of every case, and the
    others that may be tried. Kernels do not know how large a batch is; and those of the forward
    pass are the same whether there is a backward pass or not."""
    backward: dict[Case, bool] = {}
    for case in cases:
        alike = case._replace(shape=(2, *case.shape[1:]), backward=False)
        backward[alike] = backward.get(alike, False) or case.backward
    first, others = [], []
    for case in (alike._replace(backward=both) for alike, both in backward.items()):
        of_each = counts(case, device)
        none = (0,) * len(of_each)
        first.append((case, none))
        others += [
            (case, (*none[:place], choice, *none[place + 1 :]))
            for place, count in enumerate(of_each)
            for choice in range(1, count)
        ]
    return first, others


def compile_all(
    cases: list[Case], device: torch.device, say: Callable[[str], object], until: float
) -> None:
    """Side by side, which is only to save time: what is missing is compiled when it is tried. The
    other choices than the first only until then. Says COMPILED as often as there are cases."""
    capability = ops.attention_kernels.card.capability(device)
    first, others = to_compile(cases, device)
    todo, said = first + others, 0
    workers = min(8, os.cpu_count() or 1, len(todo))
    with (
        contextlib.suppress(BrokenProcessPool),
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
    ):
        compiled = pool.map(compile_case, *zip(*todo, strict=True), [capability] * len(todo))
        for done, _ in enumerate(compiled, 1):
            while said < done * len(cases) // len(todo):
                say(COMPILED)
                said += 1
            if done >= len(first) and time.monotonic() > until:
                pool.shutdown(cancel_futures=True)
                return


def try_all(
    cases: list[Case], device: torch.device, say: Callable[[str], object], seconds: float
) -> None:
    """The child's work: see that kernels can be launched at all, compile, try one by one; for so
    many seconds with all tiles, then with the first of each kernel."""
    until = time.monotonic() + seconds
    card = ops.attention_kernels.card
    try:
        torch.cuda.set_device(device)  # Triton launches, and graphs record, on the current one
        card.launch_one(device)
    except Exception as error:
        say(CANNOT + card.why_no_launch(error))
        return
    compile_all(cases, device, say, until)
    for case in cases:
        say(BEGIN)
        verdict = examine(case, device, graph_time, until=until)
        torch.cuda.synchronize(device)  # ends this process where the case ruined its context
        say(VERDICT + json.dumps(asdict(verdict)))
        torch.cuda.empty_cache()


CHILD = (sys.executable, "-m", "minibooth.device.settle")


def in_a_process(
    cases: list[Case],
    device: torch.device,
    on_compiled: Callable[[], object] = lambda: None,
    child: tuple[str, ...] = CHILD,
) -> Iterator[tuple[Case, Verdict]]:
    """`examine` of every case, in order, each as soon as it is known. A case that was begun is
    blamed for the process's end; raises NotTried at an end for which none can be."""
    todo, path = list(cases), os.pathsep.join(sys.path)
    until = time.monotonic() + CHOOSING
    for death in range(MOST_DEATHS):
        begun = False
        command = [*child, str(device), str(until - time.monotonic())]
        with beside.started(command, json.dumps(todo), PYTHONPATH=path) as process:
            for line in process.lines(SILENCE):
                if line == COMPILED and death == 0:
                    on_compiled()
                elif line == BEGIN:
                    begun = True
                elif line.startswith(VERDICT):
                    begun = False
                    found = verdicts.verdict(json.loads(line.removeprefix(VERDICT)))
                    yield todo.pop(0), found
                elif line.startswith(CANNOT):
                    raise NotTried(line.removeprefix(CANNOT))
        if not todo:
            return
        why = f"the process that tries them {process.ending}"
        if not begun:
            raise NotTried(why)
        yield todo.pop(0), Verdict(False, {}, why)
    if todo:
        raise NotTried(f"{why}, as {MOST_DEATHS - 1} before it")


# ---- for a run ---------------------------------------------------------------------------------


def batches(pictures: int, at_once: int, guidance_scale: float) -> list[int]:
    """The sizes of the UNet's batches when so many pictures are drawn: of whole ones and the rest.
    With guidance both prompts of a picture are in it."""
    sizes = {min(pictures, at_once), pictures % at_once} - {0}
    return [size * (2 if guidance_scale > 1 else 1) for size in sorted(sizes)]


def blank(unet: dict, batch: int, device: torch.device) -> Condition:
    """Zeros in the place of encoded prompts, for a UNet whose config says so."""
    c = Condition(torch.zeros(batch, 77, unet["cross_attention_dim"], device=device))
    if told := unet.get("projection_class_embeddings_input_dim"):  # the prompts', and six sizes'
        pooled = told - 6 * unet["addition_time_embed_dim"]
        c = replace(c.whole(0, 0), pooled=torch.zeros(batch, pooled, device=device))
    if unet.get("num_class_embeds"):  # an upscaler's levels
        c = replace(c, level=torch.zeros(batch, dtype=torch.int64, device=device))
    return c


def met(
    sd: StableDiffusion,
    height: int,
    width: int,
    *,
    drawing: Iterable[int] = (),
    training: int = 0,
    adapted: Iterable[nn.Parameter] = (),
    text_changes: bool = False,
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> list[Case]:
    """The cases that a run's UNet will meet for pictures of so many pixels, found by passing zeros
    through it where it is: in `drawing`, batches of these sizes; in `training` of this one, 0 for
    none. `adapted` are the frozen weights beside which something trains, `text_changes` whether
    the text's encoding has a gradient."""
    h, w = height // sd.vae.factor, width // sd.vae.factor

    def unet(batch: int) -> None:
        x = torch.zeros(batch, sd.configs["unet"]["in_channels"], h, w, device=sd.device)
        t = torch.zeros(batch, dtype=torch.int64, device=sd.device)
        c = blank(sd.configs["unet"], batch, sd.device)
        c.context.requires_grad_(text_changes)
        with autocast():
            sd.unet(x, t, c)

    with ops.observed() as seen:
        with torch.no_grad():
            for size in dict.fromkeys(drawing):
                unet(size)
        if training:
            with with_gradients(adapted), nothing_saved():
                unet(training)
    return list(seen)


@contextlib.contextmanager
def with_gradients(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it, frozen weights have gradients: their layers' outputs do, as with adapters."""
    frozen = [p for p in weights if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def nothing_saved() -> AbstractContextManager:
    """Within it, nothing is kept for a backward pass, which cannot come then."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda _: None)


def settle(
    cases: Iterable[Case],
    device: torch.device,
    *,
    path: Path | None = None,
    tried: Callable[..., Iterator[tuple[Case, Verdict]]] = in_a_process,
) -> dict[Case, Verdict]:
    """Find out, or remember, in which of `cases` the kernels are right and faster on this device,
    have ops take them there and nowhere else, and say so: a line, one for each case that went
    wrong, and one for what could not be tried. Returns what is known."""
    cases = list(dict.fromkeys(cases))
    if not cases:
        ops.prefer({})
        return {}
    path, here = path or verdicts.file(), verdicts.machine(device)
    remembered = verdicts.read(path, here)
    known = {case: remembered.get(verdicts.key(case)) for case in cases}
    todo = [case for case in cases if known[case] is None]
    if todo:
        torch.cuda.empty_cache()  # the process that tries wants room beside this one
        found, why = {}, None
        bar = tqdm(total=2 * len(todo), desc="trying kernels", unit="", leave=False)
        try:
            with bar, contextlib.closing(tried(todo, device, bar.update)) as results:
                for case, verdict in results:
                    found[case] = verdict
                    bar.n, _ = len(todo) + len(found), bar.refresh()
        except NotTried as e:
            why = str(e)
        finally:
            lasting = {verdicts.key(c): v for c, v in found.items() if v.why != NO_MEMORY}
            verdicts.write(path, here, lasting)
        known |= found
        for line in problems(todo, found, why):
            print(line)
    chosen = {case: verdict for case, verdict in known.items() if verdict is not None}
    ops.prefer({case: verdict.choices for case, verdict in chosen.items() if verdict.triton})
    if chosen:
        print(summary(chosen))
    return chosen


def problems(todo: list[Case], found: dict[Case, Verdict], why: str | None) -> Iterator[str]:
    """A line for each kernel that is not taken for a fault of its own, and one for all that
    another run may find out. `why` not all were tried."""
    for case, verdict in found.items():
        if verdict.why and verdict.why != NO_MEMORY:
            yield f"kernels: {describe(case)}: {verdict.why}; PyTorch's is taken"
    another = "PyTorch's are taken there; another run tries again"
    if large := [case for case, verdict in found.items() if verdict.why == NO_MEMORY]:
        yield f"kernels: no memory to try {len(large)} of {len(todo)} cases: {another}"
    if left := len(todo) - len(found):
        yield f"kernels: {left} of {len(todo)} cases were not tried: {why}; {another}"


def describe(case: Case) -> str:
    sizes = ["×".join(map(str, case.shape))] if case.shape else []
    return " ".join([case.op, *sizes, case.dtype, *["with gradients"] * case.backward])


def summary(chosen: dict[Case, Verdict]) -> str:
    """kernels: 14 of 18 attention shapes, 22 of 25 norms and 4 of 4 gates by Triton, 1.31× …"""
    counted = []
    names = {"attention": "attention shapes", "norm": "norms", "geglu": "gates", "adamw": "updates"}
    for of, name in names.items():
        if taken := [verdict.triton for case, verdict in chosen.items() if of in case.op]:
            counted.append(f"{sum(taken)} of {len(taken)} {name}")
    *before, last = counted
    said = f"{', '.join(before)} and {last}" if before else last
    taken = [verdict.us for verdict in chosen.values() if verdict.triton]
    theirs = [min((t for n, t in us.items() if n != "triton"), default=0.0) for us in taken]
    ours = sum(us["triton"] for us in taken)
    speed = f", {sum(theirs) / ours:.2f}× PyTorch's speed for them" if ours else ""
    return f"kernels: {said} by Triton{speed}"


def wanted(device: torch.device) -> bool:
    """Whether kernels can be taken here: CUDA graphs, a card that they know, and the mode auto.
    Where no kernel at all can be launched, a line says what to install."""
    if not graphs.capturable(device) or ops.mode() != "auto" or ops.attention_kernels is None:
        return False
    card = ops.attention_kernels.card
    if card.unsupported_card(device) is not None:
        return False
    try:
        card.launch_one(device)
        return True
    except Exception as error:
        why = card.why_no_launch(error)
        print(f"kernels: none can be launched: {why}; PyTorch's are taken")
        return False


def main() -> None:
    # The pipe for this process alone: what it starts, and what libraries print, goes to stderr.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    given = [Case(*c) for c in json.loads(sys.stdin.read())]
    given = [c._replace(shape=tuple(c.shape), norm=c.norm and tuple(c.norm)) for c in given]
    device, seconds = torch.device(sys.argv[1]), float(sys.argv[2])
    try_all(given, device, lambda line: print(line, file=lines), seconds)


if __name__ == "__main__":
    main()
