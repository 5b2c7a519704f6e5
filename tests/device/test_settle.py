"""What a run will meet, tried in a process of its own and remembered: all without a GPU."""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import textwrap
import types
from dataclasses import asdict

import pytest
import runs
import torch

from minibooth import ops, sample, train
from minibooth.bench import models
from minibooth.device import ranks, settle, verdicts
from minibooth.device.verdicts import Verdict
from minibooth.ops import Case
from minibooth.training import prepare, start

CPU = torch.device("cpu")
CASES = [Case("attention", (1, 1, n, n, 8), "float16", False) for n in (1, 2, 3)]
CASES += [Case("group_norm", (1, 4, 2, 2), "float16", True, (2, True, True, "float32", False))]
FASTER = Verdict(True, {"triton": 1.0, "torch": 3.0})
SLOWER = Verdict(False, {"triton": 2.0, "torch": 1.0})
WRONG = Verdict(False, {"torch": 1.0}, "the output is wrong by nan, allowed is 1.0e-04")
GIVEN = dict(zip(CASES, [FASTER, SLOWER, WRONG, FASTER], strict=True))


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(verdicts, "machine", lambda device: "a card, driver 1")
    monkeypatch.setattr(ops, "_mode", "auto")  # whatever a bench's test has left behind
    yield
    ops.prefer({})


def tried(todo, device, on_compiled):
    tried.asked.append(list(todo))
    return ((case, GIVEN[case]) for case in todo)


def settled(path, cases=CASES):
    tried.asked = []
    return settle.settle(cases, CPU, path=path, tried=tried)


def taken(case):
    return case in ops._preferred


def test_a_first_run_tries_and_a_second_remembers(tmp_path, capsys):
    path = tmp_path / "cache" / "kernels.json"
    assert settled(path) == GIVEN and tried.asked == [CASES]
    out = capsys.readouterr().out
    assert [taken(case) for case in CASES] == [True, False, False, True]
    assert out.splitlines() == [
        "kernels: attention 1×1×3×3×8 float16: the output is wrong by nan, allowed is 1.0e-04; "
        "PyTorch's is taken",
        "kernels: 1 of 3 attention shapes and 1 of 1 norms by Triton, 3.00× PyTorch's speed for "
        "them",
    ]
    ops.prefer({})
    assert settled(path) == GIVEN and tried.asked == []
    assert [taken(case) for case in CASES] == [True, False, False, True]
    assert capsys.readouterr().out.count("\n") == 1


def test_an_update_is_a_case_of_no_shape():
    case = ops.adamw_case(torch.bfloat16)
    assert settle.describe(case) == "adamw bfloat16"
    said = settle.summary({case: Verdict(True, {"triton": 1.0, "torch": 1.5})})
    assert said == "kernels: 1 of 1 updates by Triton, 1.50× PyTorch's speed for them"


def test_only_new_cases_are_tried(tmp_path):
    settled(tmp_path / "kernels.json", CASES[:2])
    assert settled(tmp_path / "kernels.json") == GIVEN and tried.asked == [CASES[2:]]
    settled(tmp_path / "kernels.json", CASES[:2])
    assert tried.asked == [] and not taken(CASES[3])  # this run does not meet it


def test_cases_for_which_there_was_no_memory_are_one_line_and_are_tried_again(
    tmp_path, monkeypatch, capsys
):
    path, full = tmp_path / "kernels.json", Verdict(False, {}, verdicts.NO_MEMORY)
    with monkeypatch.context() as patch:
        for case in (CASES[0], CASES[3]):
            patch.setitem(GIVEN, case, full)
        settled(path)
    said = capsys.readouterr().out
    assert said.count("\n") == 3 and not taken(CASES[0])  # this, the wrong one, and the sum
    assert (
        "kernels: no memory to try 2 of 4 cases: PyTorch's are taken there; another run tries again"
    ) in said.splitlines()
    settled(path)
    assert tried.asked == [[CASES[0], CASES[3]]] and taken(CASES[0])


def stopping(*done, error=None):
    """Gives verdicts for these cases, and then up."""

    def tried(todo, device, on_compiled):
        for case in done:
            yield case, GIVEN[case]
        raise error or settle.NotTried("no card")

    return tried


def test_what_was_not_tried_is_one_line_and_is_tried_again(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    assert settle.settle(CASES, CPU, path=path, tried=stopping()) == {}
    assert capsys.readouterr().out.splitlines() == [
        "kernels: 4 of 4 cases were not tried: no card; PyTorch's are taken there; another run "
        "tries again"
    ]
    assert not any(map(taken, CASES))
    found = settle.settle(CASES, CPU, path=path, tried=stopping(CASES[0]))
    assert found == {CASES[0]: FASTER} and taken(CASES[0])
    assert "3 of 4 cases were not tried" in capsys.readouterr().out
    assert settled(path) == GIVEN and tried.asked == [CASES[1:]]


def test_what_is_known_is_kept_where_the_trial_is_stopped(tmp_path):
    path = tmp_path / "kernels.json"
    with pytest.raises(KeyboardInterrupt):
        settle.settle(CASES, CPU, path=path, tried=stopping(*CASES[:2], error=KeyboardInterrupt()))
    settled(path)
    assert tried.asked == [CASES[2:]]


def test_a_trial_that_is_left_is_closed_at_once(tmp_path):
    closed = []

    def tried(todo, device, on_compiled):
        try:
            yield todo[0], None  # no verdict: writing it raises
        finally:
            closed.append(True)

    error = None
    try:
        settle.settle(CASES, CPU, path=tmp_path / "kernels.json", tried=tried)
    except AttributeError as e:
        error = e  # and with it, what it was raised in
    assert error is not None and closed


def test_a_run_without_cases_takes_no_kernel_of_the_run_before(tmp_path, capsys):
    settled(tmp_path / "kernels.json")
    capsys.readouterr()
    assert settle.settle([], CPU) == {} and not any(map(taken, CASES))
    assert capsys.readouterr().out == ""


def test_another_driver_is_another_machine(tmp_path, monkeypatch):
    path = tmp_path / "kernels.json"
    settled(path)
    monkeypatch.setattr(verdicts, "machine", lambda device: "a card, driver 2")
    settled(path)
    assert tried.asked == [CASES]
    assert set(json.loads(path.read_text())) == {"a card, driver 1", "a card, driver 2"}


def test_a_file_that_knows_of_no_tiles_is_made_anew(tmp_path):
    """As those before them were; what it holds of other machines stays."""
    path, old = tmp_path / "kernels.json", {"triton": True, "us": {"triton": 1.0}, "why": None}
    before = {verdicts.key(case): old for case in CASES}
    path.write_text(json.dumps({"a card, driver 1": before, "another": before}))
    assert settled(path) == GIVEN and tried.asked == [CASES]
    found = json.loads(path.read_text())
    assert found["another"] == before and len(found["a card, driver 1"]) == len(CASES)


def test_a_second_run_takes_the_same_tiles_and_the_file_says_which(tmp_path, monkeypatch):
    path = tmp_path / "kernels.json"
    chosen = Verdict(True, {"triton": 1.0}, None, (2, 0, 1), {"0-0-0": 2.0, "1-0-0": "wrong"})
    monkeypatch.setitem(GIVEN, CASES[0], chosen)
    assert settled(path)[CASES[0]] == chosen and ops._preferred[CASES[0]] == (2, 0, 1)
    ops.prefer({})
    assert settled(path)[CASES[0]] == chosen and ops._preferred[CASES[0]] == (2, 0, 1)
    assert tried.asked == [] and ops._preferred[CASES[3]] == ()
    kept = json.loads(path.read_text())["a card, driver 1"][verdicts.key(CASES[0])]
    assert kept["choices"] == [2, 0, 1] and kept["others"]["1-0-0"] == "wrong"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"a card, driver 1": 3}', '{"a card, driver 1": {"x": {"triton": 1}}}', "\0"],
)
def test_a_damaged_cache_is_made_anew(text, tmp_path):
    path = tmp_path / "kernels.json"
    path.write_text(text)
    assert settled(path) == GIVEN and tried.asked == [CASES]
    settled(path)
    assert tried.asked == []


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="the kernels' trial is not remembered: cannot write"):
        settled(tmp_path / "file" / "kernels.json")
    assert taken(CASES[0])


def test_two_that_write_at_once_leave_a_whole_file(tmp_path):
    path = tmp_path / "kernels.json"

    def write(name):
        for i in range(30):
            verdicts.write(path, name, {f"{name} {i}": FASTER})

    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write, args=(f"card {n}",)) for n in range(2)]
    [writer.start() for writer in writers]
    [writer.join() for writer in writers]
    assert [writer.exitcode for writer in writers] == [0, 0]
    found = json.loads(path.read_text())
    assert found and all(verdicts.read(path, name) for name in found)
    assert [f.name for f in tmp_path.iterdir()] == ["kernels.json"]


def test_the_cache_lies_where_the_system_keeps_such(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts.file() == tmp_path / "minibooth" / "kernels.json"


def test_other_kernels_are_not_told_old_verdicts(monkeypatch, tmp_path):
    before = verdicts.kernels_hash()
    monkeypatch.setattr(ops.attention_kernels, "__file__", str(tmp_path / "attention" / "x.py"))
    (tmp_path / "attention").mkdir()
    (tmp_path / "attention" / "x.py").write_text("changed")
    assert verdicts.kernels_hash() != before


# ---- the process -------------------------------------------------------------------------------

CHILD = """
    import json, os, signal, sys, time
    device, cases = sys.argv[1], json.load(sys.stdin)
    FIRST
    print("compiled\\nnoise of a library", flush=True)
    for case in cases:
        n = case[1][2]
        print("begin", flush=True)
        if str(n) in DEADLY:
            END
        verdict = {"triton": True, "us": {"triton": n, "torch": 2 * n}, "why": None}
        verdict |= {"choices": [1, 0], "others": {"0-0": 3 * n, "0-1": "wrong"}}
        print("verdict " + json.dumps(verdict), flush=True)
"""
KILL, HANG = "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(60)"


@pytest.fixture
def child(tmp_path):
    """A stand-in for the program that tries: its command. It ends as `end` says at the cases of
    these lengths, or before the first."""

    def write(deadly="", end="pass", first="pass"):
        script, text = tmp_path / "child.py", textwrap.dedent(CHILD)
        text = text.replace("DEADLY", repr(deadly)).replace("END", end).replace("FIRST", first)
        script.write_text(text)
        return (sys.executable, "-S", str(script))

    return write


LENGTHS = [Case("attention", (1, 1, n, 4, 8), "float16", False) for n in range(1, 7)]


@pytest.mark.parametrize(
    "end, said",
    [
        (KILL, "ended with status -9"),
        ("sys.exit(1)", "ended with status 1"),
        ("1 / 0", "ended with status 1 (ZeroDivisionError: division by zero)"),
    ],
)
def test_a_case_that_ends_the_process_goes_to_pytorch_and_the_rest_is_tried(end, said, child):
    compiled = []
    found = dict(settle.in_a_process(LENGTHS, CPU, lambda: compiled.append(1), child("25", end)))
    assert list(found) == LENGTHS and compiled == [1]
    assert [v.triton for v in found.values()] == [True, False, True, True, False, True]
    assert found[LENGTHS[1]].why == f"the process that tries them {said}"
    assert found[LENGTHS[2]].us == {"triton": 3, "torch": 6}


def test_a_process_that_keeps_dying_is_given_up(child, tmp_path, capsys):
    """Three cases are blamed; the others were not tried, and are at the next start."""

    def settled(end):
        tried = functools.partial(settle.in_a_process, child=child("123456", end))
        return settle.settle(LENGTHS, CPU, path=tmp_path / "kernels.json", tried=tried)

    found = settled(KILL)
    assert list(found) == LENGTHS[:3] and not any(v.triton for v in found.values())
    *blamed, left, _ = capsys.readouterr().out.splitlines()
    assert len(blamed) == 3
    assert left.startswith(
        "kernels: 3 of 6 cases were not tried: the process that tries them ended with status -9, "
        "as 2 before it; "
    )
    found = settled("pass")
    assert [v.triton for v in found.values()] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    "first, said",
    [
        ("sys.exit(1)", "the process that tries them ended with status 1"),
        ("import no_such_module", "(ModuleNotFoundError: No module named 'no_such_module')"),
        (KILL, "ended with status -9"),
        ("print('cannot install gcc', flush=True)", "install gcc"),
    ],
)
def test_an_end_before_the_first_case_is_no_cases_fault(first, said, child):
    with pytest.raises(settle.NotTried, match=re.escape(said)):
        list(settle.in_a_process(LENGTHS, CPU, child=child("1", HANG, first)))


def test_the_process_is_told_how_long_tiles_may_be_chosen_also_after_a_death(child, monkeypatch):
    """The second has what the first has left of it."""
    monkeypatch.setattr(settle, "CHOOSING", 50.0)
    first = "assert float(sys.argv[2]) <= 50 - 0.3 * ('1' not in str(cases)), sys.argv"
    found = dict(
        settle.in_a_process(LENGTHS[:2], CPU, child=child("1", f"time.sleep(0.3); {KILL}", first))
    )
    assert [v.triton for v in found.values()] == [False, True]


def test_a_process_that_hangs_is_ended(child, monkeypatch):
    monkeypatch.setattr(settle, "SILENCE", 0.5)
    found = dict(settle.in_a_process(LENGTHS, CPU, child=child("6", HANG)))
    assert [v.triton for v in found.values()] == [True] * 5 + [False]
    assert found[LENGTHS[5]].why == "the process that tries them said nothing for 0.5 s"


def test_the_real_process_says_why_there_is_nothing_to_try_with(tmp_path, capsys):
    """Without a GPU it cannot launch anything: one line, and nothing is remembered."""
    path, card = tmp_path / "kernels.json", torch.device("cuda", 0)
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA card")
    assert settle.settle(CASES, card, path=path) == {}
    [line] = capsys.readouterr().out.splitlines()
    assert re.match(r"kernels: 4 of 4 cases were not tried: \w+Error: .*cuda", line, re.I)
    assert verdicts.read(path, verdicts.machine(card)) == {}


@pytest.fixture
def two_cards(monkeypatch):
    """What PyTorch's Python asks its C++ for, as with two H100 of which the first is current."""
    current, waited, freed = [0], [], []

    def exchange(index):
        before = current[0]
        if index >= 0:
            current[0] = index
        return before

    properties = types.SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, shared_memory_per_block_optin=232_448
    )
    for name, function in {
        "_cuda_setDevice": exchange,
        "_cuda_getDevice": lambda: current[0],
        "_cuda_getDeviceCount": lambda: 2,
        "_cuda_synchronize": lambda: waited.append(current[0]),
        "_cuda_emptyCache": lambda: freed.append(current[0]),
    }.items():
        monkeypatch.setattr(torch._C, name, function, raising=False)
    # What the module has bound at its import; without a card there is nothing behind it.
    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_get_device_properties", lambda i: properties, raising=False)
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    monkeypatch.setattr(torch.cuda, "_cached_device_count", 2)
    return types.SimpleNamespace(current=current, waited=waited, freed=freed, properties=properties)


needs_triton = pytest.mark.skipif(ops.attention_kernels is None, reason="needs Triton")
SECOND = torch.device("cuda", 1)


@needs_triton
def test_the_process_works_and_waits_on_the_device_that_it_is_given(two_cards, monkeypatch):
    said, launched = [], []
    card = ops.attention_kernels.card
    monkeypatch.setattr(card, "launch_one", lambda device: launched.append(two_cards.current[0]))
    compiling = lambda cases, device, say, until: say(card.capability(device))  # noqa: E731
    monkeypatch.setattr(settle, "compile_all", compiling)
    monkeypatch.setattr(settle, "examine", lambda case, device, timer, until: GIVEN[case])
    settle.try_all(CASES[:2], SECOND, said.append, 9.0)
    assert launched == [1] and two_cards.waited == [1, 1]
    verdict = [settle.VERDICT + json.dumps(asdict(GIVEN[case])) for case in CASES[:2]]
    assert said == [90, settle.BEGIN, verdict[0], settle.BEGIN, verdict[1]]


@pytest.fixture
def no_gcc(monkeypatch):
    """Launching raises what Triton raises without a compiler: its own code, an empty PATH."""
    from triton.runtime import build

    def launch(device):
        build._build("name", "name.c", ".", [], [], [], [])

    monkeypatch.setattr(ops.attention_kernels.card, "launch_one", launch)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)


@needs_triton
def test_where_no_kernel_can_be_launched_none_is_compiled_or_tried(two_cards, no_gcc):
    said = []
    settle.try_all(CASES, SECOND, said.append, 9.0)
    assert said == ["cannot Triton finds no C compiler to launch kernels with: install gcc"]


@needs_triton
@pytest.mark.skipif(not shutil.which("gcc"), reason="needs a compiler")
def test_missing_headers_are_told_from_a_missing_compiler(tmp_path):
    from triton.runtime import build

    (tmp_path / "name.c").write_text("#include <Python/is/not/here.h>")
    with pytest.raises(subprocess.CalledProcessError) as e:
        build._build("name", str(tmp_path / "name.c"), str(tmp_path), [], [], [], [])
    said = ops.attention_kernels.card.why_no_launch(e.value)
    assert "gcc cannot compile" in said and said.endswith("install Python's headers (python3-dev)")


def test_memory_is_given_back_before_another_process_wants_it(two_cards, tmp_path):
    def tried(todo, device, on_compiled):
        assert two_cards.freed
        yield todo[0], FASTER

    settle.settle(CASES[:1], CPU, path=tmp_path / "kernels.json", tried=tried)
    assert two_cards.freed == [0]
    settle.settle(CASES[:1], CPU, path=tmp_path / "kernels.json", tried=tried)
    assert two_cards.freed == [0]  # for a process that is not started none is given back


@needs_triton
def test_each_kernel_is_compiled_once_and_every_candidate_that_may_be_tried(monkeypatch):
    monkeypatch.setattr(ops.attention_kernels.card, "capability", lambda device: 90)
    long = Case("attention", (2, 8, 4096, 4096, 40), "bfloat16", True)
    text = Case("attention", (2, 8, 4096, 77, 40), "bfloat16", True)
    small = Case(
        "group_norm", (2, 320, 8, 8), "bfloat16", False, (32, True, True, "float32", False)
    )
    rows = Case("layer_norm", (2, 64, 320), "bfloat16", True, (True, "float32"))
    gate = Case("geglu", (2, 64, 320), "bfloat16", True)
    drawn = [c._replace(backward=False, shape=(12, *c.shape[1:])) for c in (long, text, rows, gate)]
    first, others = settle.to_compile([*drawn, long, text, small, rows, gate, small], CPU)
    none = {long: (0, 0, 0), text: (0, 0), small: (0,), rows: (0, 0), gate: ()}
    assert dict(first) == none and len(first) == len(none)
    assert others == [
        (long, (1, 0, 0)), (long, (2, 0, 0)), (long, (0, 1, 0)), (long, (0, 0, 1)),
        (long, (0, 0, 2)), (rows, (1, 0)), (rows, (0, 1)), (small, (1,)),
    ]  # fmt: skip


class InLine:
    """A pool of processes that are none: one thing after the other, as results are asked for."""

    def __init__(self, workers, mp_context):
        self.open = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def map(self, function, *arguments):
        return (function(*each) for each in zip(*arguments, strict=True) if self.open)

    def shutdown(self, cancel_futures):
        self.open = not cancel_futures


@needs_triton
@pytest.mark.parametrize("seconds, expected", [(math.inf, 5), (-math.inf, 2)])
def test_the_first_tiles_are_compiled_whatever_the_time_and_the_others_while_there_is(
    seconds, expected, monkeypatch
):
    monkeypatch.setattr(settle, "ProcessPoolExecutor", InLine)
    compiled, said, none = [], [], (0, 0)
    monkeypatch.setattr(settle, "compile_case", lambda case, choices, _: compiled.append(choices))
    more = [(case, (1, i)) for i, case in enumerate(CASES[:3])]
    first = [(case, none) for case in CASES[:2]]
    monkeypatch.setattr(settle, "to_compile", lambda cases, device: (first, more))
    settle.compile_all(CASES, CPU, said.append, seconds)
    assert compiled == [none, none, (1, 0), (1, 1), (1, 2)][:expected]
    assert said == [settle.COMPILED] * (len(CASES) * expected // 5)  # 4 are all of the bar


@needs_triton
def test_compiling_beforehand_fills_tritons_cache(tmp_path):
    """Of a process of its own: Triton's driver is set for the whole of it."""
    attention = Case("attention", (1, 2, 64, 77, 40), "bfloat16", True)
    norm = Case("group_norm", (1, 64, 8, 8), "bfloat16", False, (32, True, True, "float32", False))

    def compile_both():
        os.environ["TRITON_CACHE_DIR"] = str(tmp_path)
        for case in (attention, norm):
            settle.compile_case(case, (), 90)

    process = multiprocessing.get_context("fork").Process(target=compile_both)
    process.start()
    process.join()
    kernels = {"_short_forward", "_short_backward", "_forward_one_pass"}
    assert {f.stem for f in tmp_path.rglob("*.cubin")} == kernels


# ---- what a run meets --------------------------------------------------------------------------


@pytest.fixture
def compared(monkeypatch):
    """Runs something as if there were CUDA graphs: the cases that were to be tried, and those that
    its UNet then met."""

    def compare(sd, function):
        foreseen, met, open_now = [], set(), []

        def begin(*_):
            open_now.append(contextlib.ExitStack())
            open_now.append(open_now[0].enter_context(ops.observed()))

        def end(*_):
            met.update(open_now.pop())
            open_now.pop().close()

        def take(cases, device):
            foreseen.extend(cases)
            sd.unet.register_forward_pre_hook(begin)
            sd.unet.register_forward_hook(end)

        monkeypatch.setattr(settle, "wanted", lambda device: True)
        monkeypatch.setattr(settle, "settle", take)
        function()
        assert len(foreseen) == len(set(foreseen))
        return set(foreseen), met

    return compare


def sizes(cases):
    """Batch sizes, without and with a backward pass."""
    return [{case.shape[0] for case in cases if case.backward == b} for b in (False, True)]


WORD = {"method": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "dog"}
WORD |= {"instance_prompt": "a <x>", "mixed_precision": "bf16"}  # bf16 is slow on a CPU
RUNS = {  # settings, and the UNet's batches where it draws and where it trains
    "grid of 3 × 2": ({"train_batch_size": 2}, {12, 4, 2}, {4}),
    "no guidance": (
        {
            "validation_guidance_scale": 1.0,
            "num_validation_images": 3,  # of three prompts: 8 and 1
            "class_guidance_scale": 0.0,
            "num_class_images": 5,
            "sample_batch_size": 4,
        },
        {8, 4, 1},
        {2},
    ),
    "LoRA": (
        {"method": "lora", "prior_loss_weight": 0.0},
        {12, 1},  # three prompts without a class; before the first adapter nothing has a gradient
        {1},
    ),
    "a hypernetwork": ({"method": "hypernetwork", "prior_loss_weight": 0.0}, {12, 1}, {1}),
    "a word": (WORD | {"num_validation_images": 1, "validation_prompt": ("a <x>",)}, {2, 1}, {1}),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_tried_is_what_a_run_meets(name, compared, tmp_path):
    """Every case of it, and no other."""
    changes, drawn, trained = RUNS[name]
    few = {"num_validation_images": 2, "validation_inference_steps": 1, "class_steps": 1}
    few |= {"max_train_steps": 1, "sample_batch_size": 2, "class_data_dir": str(tmp_path / "class")}
    config, sd = runs.config(tmp_path / "out", **few | changes), runs.model()
    foreseen, met = compared(sd, lambda: train.train(config, sd))
    assert foreseen == met and sizes(met) == [drawn, trained]


def test_class_images_that_are_there_are_not_foreseen(compared, tmp_path):
    """Of six in batches of two the second is not whole."""
    folder = tmp_path / "class"
    settings = {"num_class_images": 5, "sample_batch_size": 2, "class_data_dir": str(folder)}
    config = runs.config(tmp_path / "out", class_steps=1, **settings)
    prepare.gather(start.Run(config, runs.model(), CPU))
    sorted(folder.glob("*.png"))[4].unlink()  # the last batch's only one
    run = start.Run(config, runs.model(), CPU)
    foreseen, met = compared(run.sd, lambda: prepare.gather(run))
    assert foreseen == met and sizes(met) == [{2}, set()]


@pytest.mark.parametrize("guidance, batches", [(7.5, {4, 2}), (1.0, {2, 1})])
def test_what_is_tried_is_what_sampling_meets(guidance, batches, compared, tmp_path, monkeypatch):
    sd = runs.model()
    monkeypatch.setattr(sample.pipeline, "load", lambda *_, **__: sd)
    config = sample.SampleConfig(
        model="given",
        prompt=("a dog", "a cat"),
        num_images=3,
        batch_size=2,
        steps=1,
        guidance_scale=guidance,
        height=16,
        width=32,
        output_dir=str(tmp_path),
        device="cpu",
    )
    foreseen, met = compared(sd, lambda: sample.sample(config))
    assert foreseen == met and sizes(met) == [batches, set()]


class Enough(Exception):
    pass


@pytest.mark.parametrize(
    "changes, on_step, drawn, trained",
    [
        ({}, None, {12, 4, 2}, {2}),
        ({}, lambda step, result: None, {12, 4, 2}, set()),
        ({"use_8bit_adam": True}, None, set(), set()),
        ({"gradient_checkpointing": True}, None, set(), {2}),
    ],
)
def test_only_what_is_replayed_from_a_graph_is_tried(
    changes, on_step, drawn, trained, tmp_path, monkeypatch
):
    """No steps that are watched or that wait for the device; no drawing where memory is short."""

    def take(cases, device):
        assert sizes(cases) == [drawn, trained]
        raise Enough

    monkeypatch.setattr(settle, "wanted", lambda device: True)
    monkeypatch.setattr(settle, "settle", take)
    few = {"num_validation_images": 2, "sample_batch_size": 2}
    config = runs.config(tmp_path / "out", class_data_dir=str(tmp_path), **few, **changes)
    with pytest.raises(Enough):
        train.train(config, runs.model(), on_step)


def test_the_cases_of_sd_15():
    """Training at 1 + 1 and drawing four at once, on the meta device: 512², no weights."""
    sd = models.model("SD 1.5", torch.device("meta"))
    cases = settle.met(sd, 512, 512, drawing=(8,), training=2)
    attention = [c for c in cases if c.op == "attention"]
    of_step = {c.shape for c in attention if c.backward}
    assert of_step == {
        (2, 8, pixels, keys, d)
        for pixels, d in ((4096, 40), (1024, 80), (256, 160), (64, 160))
        for keys in (pixels, 77)
    }
    assert {c.shape for c in attention if not c.backward} == {(8, *shape[1:]) for shape in of_step}
    norms = [c for c in cases if c.op == "group_norm" and c.backward]
    widths = {c.shape[1:] for c in norms}
    assert (320, 64, 64) in widths and (2560, 8, 8) in widths and len(norms) == len(set(norms))


def test_on_a_cpu_nothing_is_tried():
    assert not settle.wanted(CPU)


@needs_triton
def test_it_is_tried_on_a_card_that_the_kernels_know_in_the_mode_auto(two_cards, monkeypatch):
    monkeypatch.setattr(ops.attention_kernels.card, "launch_one", lambda device: None)
    before = ops.mode()
    try:
        for mode, wanted in (("torch", False), ("triton", False), ("auto", True)):
            ops.use(mode)
            assert settle.wanted(SECOND) == settle.wanted(torch.device("cuda")) == wanted
    finally:
        ops.use(before)
    monkeypatch.setattr(ranks, "count", lambda: 2)  # no CUDA graphs
    assert not settle.wanted(SECOND)


@needs_triton
@pytest.mark.parametrize(
    "capability, shared, wanted", [((7, 5), 65_536, False), ((8, 6), 101_376, True)]
)
def test_it_is_tried_on_no_card_that_they_do_not_know(
    capability, shared, wanted, two_cards, monkeypatch
):
    monkeypatch.setattr(ops.attention_kernels.card, "launch_one", lambda device: None)
    two_cards.properties.major, two_cards.properties.minor = capability
    two_cards.properties.shared_memory_per_block_optin = shared
    assert settle.wanted(SECOND) == wanted


@needs_triton
def test_verdicts_of_a_machine_with_a_compiler_are_of_no_use_without(two_cards, no_gcc, capsys):
    """A folder of verdicts can be shared: one line, and PyTorch's, in the place of an error."""
    assert not settle.wanted(SECOND)
    assert capsys.readouterr().out.splitlines() == [
        "kernels: none can be launched: Triton finds no C compiler to launch kernels with: "
        "install gcc; PyTorch's are taken"
    ]
