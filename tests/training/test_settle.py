"""What a run will meet, tried in a process of its own and remembered: all without a GPU."""

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap

import pytest
import runs
import torch

from minibooth import ops, train
from minibooth.bench import models
from minibooth.ops import Case
from minibooth.training import settle, verdicts
from minibooth.training.verdicts import Verdict

CPU = torch.device("cpu")
CASES = [Case("attention", (1, 1, n, n, 8), "float16", False) for n in (1, 2, 3)]
CASES += [Case("group_norm", (1, 4, 2, 2), "float16", True, (2, True, True, "float32"))]
FASTER = Verdict(True, {"triton": 1.0, "torch": 3.0})
SLOWER = Verdict(False, {"triton": 2.0, "torch": 1.0})
WRONG = Verdict(False, {"torch": 1.0}, "the output is wrong by nan, allowed is 1.0e-04")
GIVEN = dict(zip(CASES, [FASTER, SLOWER, WRONG, FASTER], strict=True))


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(verdicts, "machine", lambda device: "a card, driver 1")
    yield
    ops.prefer([])


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
    ops.prefer([])
    assert settled(path) == GIVEN and tried.asked == []
    assert [taken(case) for case in CASES] == [True, False, False, True]
    assert capsys.readouterr().out.count("\n") == 1


def test_only_new_cases_are_tried(tmp_path):
    settled(tmp_path / "kernels.json", CASES[:2])
    assert settled(tmp_path / "kernels.json") == GIVEN and tried.asked == [CASES[2:]]
    settled(tmp_path / "kernels.json", CASES[:2])
    assert tried.asked == [] and not taken(CASES[3])  # this run does not meet it


def test_a_case_for_which_there_was_no_memory_is_tried_again(tmp_path, monkeypatch, capsys):
    path, why = tmp_path / "kernels.json", "OutOfMemoryError: CUDA out of memory."
    with monkeypatch.context() as patch:
        patch.setitem(GIVEN, CASES[0], Verdict(False, {}, why))
        settled(path)
    assert why in capsys.readouterr().out and not taken(CASES[0])
    settled(path)
    assert tried.asked == [CASES[:1]] and taken(CASES[0])


def test_another_driver_is_another_machine(tmp_path, monkeypatch):
    path = tmp_path / "kernels.json"
    settled(path)
    monkeypatch.setattr(verdicts, "machine", lambda device: "a card, driver 2")
    settled(path)
    assert tried.asked == [CASES]
    assert set(json.loads(path.read_text())) == {"a card, driver 1", "a card, driver 2"}


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
    device, *mortal = sys.argv[2:] + sys.argv[1:2]
    cases = json.loads(sys.stdin.read())
    print("compiled\\nnoise of a library", flush=True)
    for case in cases:
        n = case[1][2]
        if str(n) in DEADLY:
            END
        verdict = {"triton": True, "us": {"triton": n, "torch": 2 * n}, "why": None}
        print("verdict " + json.dumps(verdict), flush=True)
"""


def child(tmp_path, deadly, end):
    script = tmp_path / "child.py"
    text = textwrap.dedent(CHILD).replace("DEADLY", repr(deadly)).replace("END", end)
    script.write_text(text)
    return (sys.executable, str(script))


LENGTHS = [Case("attention", (1, 1, n, 4, 8), "float16", False) for n in range(1, 7)]


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(1)", "1 / 0"])
def test_a_case_that_ends_the_process_goes_to_pytorch_and_the_rest_is_tried(end, tmp_path):
    found = dict(settle.in_a_process(LENGTHS, CPU, child=child(tmp_path, "25", end)))
    assert list(found) == LENGTHS
    assert [v.triton for v in found.values()] == [True, False, True, True, False, True]
    assert found[LENGTHS[1]].why.startswith("the process that tried it ended with status")
    assert found[LENGTHS[2]].us == {"triton": 3, "torch": 6}


def test_a_process_that_keeps_dying_is_given_up(tmp_path):
    end = "os.kill(os.getpid(), signal.SIGKILL)"
    found = dict(settle.in_a_process(LENGTHS, CPU, child=child(tmp_path, "123456", end)))
    assert list(found) == LENGTHS and not any(v.triton for v in found.values())
    assert "not tried, since" in found[LENGTHS[5]].why


def test_a_process_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(settle, "SECONDS", 0.5)
    found = dict(settle.in_a_process(LENGTHS, CPU, child=child(tmp_path, "6", "time.sleep(60)")))
    assert [v.triton for v in found.values()] == [True] * 5 + [False]


def test_the_real_process_answers_for_every_case(tmp_path):
    """Without a GPU it ends at the first: each goes to PyTorch, and nothing is raised."""
    found = dict(settle.in_a_process(CASES[:1], CPU))
    assert list(found) == CASES[:1] and not found[CASES[0]].triton and found[CASES[0]].why


@pytest.mark.skipif(ops.attention_kernels is None, reason="needs Triton")
@pytest.mark.parametrize(
    "case, kernels",
    [
        (
            Case("attention", (1, 2, 64, 77, 40), "bfloat16", True),
            {"_short_forward", "_short_backward"},
        ),
        (
            Case("group_norm", (1, 64, 8, 8), "bfloat16", False, (32, True, True, "float32")),
            {"_forward_one_pass"},
        ),
    ],
    ids=["attention", "norm"],
)
def test_compiling_beforehand_fills_tritons_cache(case, kernels, tmp_path):
    code = "from minibooth.ops import Case; from minibooth.training import settle; "
    code += f"settle.compile_case({case!r}, 90)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert {f.stem for f in tmp_path.rglob("*.cubin")} == kernels


# ---- what a run meets --------------------------------------------------------------------------


def test_a_run_meets_no_case_that_was_not_foreseen(tmp_path):
    """The tiny run's own calls against what passing zeros through its networks said."""
    changes = {"num_class_images": 4, "sample_batch_size": 2, "num_validation_images": 2}
    changes |= {"class_data_dir": str(tmp_path / "class"), "validation_prompt": ("a dog", "a cat")}
    config = runs.config(tmp_path / "out", train_batch_size=2, **changes)
    sd = runs.model()
    foreseen = settle.met(sd, 32, 32, drawing=(2, 4), training=4)
    with ops.observed() as seen:
        train.train(config, sd)
    assert {c for c in seen if c.backward} == {c for c in foreseen if c.backward}
    # But for the VAE's, one head, whose pictures come in other numbers at the end.
    drawn = {c for c in seen if c.op == "attention" and not c.backward and c.shape[1] > 1}
    assert drawn and drawn <= set(foreseen)


def test_the_cases_of_sd_15():
    """Training at 1 + 1 and drawing four at once, on the meta device: 512², no weights."""
    sd = models.model("SD 1.5", torch.device("meta"))
    cases = settle.met(sd, 512, 512, drawing=(4,), training=2)
    attention = [c for c in cases if c.op == "attention"]
    of_step = {c.shape for c in attention if c.backward}
    assert of_step == {
        (2, 8, pixels, keys, d)
        for pixels, d in ((4096, 40), (1024, 80), (256, 160), (64, 160))
        for keys in (pixels, 77)
    }
    assert {c.shape for c in attention if not c.backward} == {
        *((8, *shape[1:]) for shape in of_step),
        (1, 1, 4096, 4096, 512),
    }
    norms = [c for c in cases if c.op == "group_norm" and c.backward]
    widths = {c.shape[1:] for c in norms}
    assert (320, 64, 64) in widths and (2560, 8, 8) in widths and len(norms) == len(set(norms))


def test_on_a_cpu_nothing_is_tried(monkeypatch):
    assert not settle.wanted(CPU)


@pytest.mark.parametrize("mode, wanted", [("auto", True), ("torch", False), ("triton", False)])
def test_it_is_tried_on_a_card_that_the_kernels_know_in_the_mode_auto(mode, wanted, monkeypatch):
    if ops.attention_kernels is None:
        pytest.skip("needs Triton")
    before = ops.mode()
    monkeypatch.setattr(ops.attention_kernels.card, "unsupported", lambda x: None)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    try:
        ops.use(mode)
        assert settle.wanted(torch.device("cuda")) == wanted
    finally:
        ops.use(before)
