"""The first command on a card: on the pretend one it goes through, and says what is as expected."""

import ast
import json
import os
import time
from pathlib import Path

import on_card
import pytest
import runs

from minibooth.bench import __main__ as bench
from minibooth.bench import first, measure, parts

GB = 10**9
MACHINE = {"said": "a card", "precision": "bf16", "free": 11 * GB, "eight_bit": True}
BEGINNING = ["machine", "training, dreambooth in full", "sampling", "toybox"]


def files(folder):
    return sorted(file.name for file in folder.iterdir())


# ---- on the pretend card -----------------------------------------------------------------------


def contact(folder, **changes):
    """On the card, as someone whose home this folder is: what it found, and the lines by part."""
    output = folder / "someone" / "out"
    environment = {"HOME": str(output.parent), "XDG_CACHE_HOME": str(output.parent / "cache")}
    given = {"modes": 3, "own": None, "room": {}, "eight_bit": False} | changes
    found = on_card.ask("first_contact", folder=str(output), environment=environment, **given)
    lines = {name: part["line"] for name, part in found["report"].items()}
    assert found["said"].splitlines() == list(lines.values())
    assert (output / "first.txt").read_text("utf-8").splitlines() == list(lines.values())
    text = (output / "first.json").read_text("utf-8")
    assert "someone" not in text and str(folder) not in text
    for name in ("kernels checked", "kernels tried"):
        launched = lines.pop(name).removeprefix(f"{name}: differs: kernels: ")
        assert launched.startswith("none can be launched: ")
    assert lines.pop("kernels in training") == "kernels in training: left out: none is taken"
    assert found["status"] == 1
    return found, lines


def check_runs(report):
    for part in (part for part in report.values() if "row" in part):
        ways = ["captured", "not captured"][part["row"]["mode"][:1] == ["use_8bit_adam"] :]
        assert list(part["runs"]) == ways
        losses = [run["losses"] for run in part["runs"].values()]
        assert losses == losses[:1] * len(ways) and len(set(losses[0])) == 4
        assert all(run["seconds"] > 0 < run["peak_bytes"] for run in part["runs"].values())
    assert report["sampling"]["compared"][0]["value"] == 0


@on_card.needs_card
@pytest.mark.slow
def test_every_part_goes_through_and_what_fails_is_a_line(tmp_path):
    found, lines = contact(tmp_path, room={"('gradient_checkpointing',)": 50_000})
    report = found["report"]
    assert list(report)[:5] == [*BEGINNING, "kernels checked"]
    failed = lines.pop("training, dreambooth gradient_checkpointing")
    assert ": failed: it ended with " in failed and "ut of memory" in failed
    assert lines.pop("training, dreambooth use_8bit_adam").endswith(
        ": left out: bitsandbytes is missing, or does not work"
    )
    assert list(lines) == [*BEGINNING, "training, lora in full"]
    assert all(line.startswith(f"{name}: as expected; ") for name, line in lines.items())
    here = report["machine"]["here"]
    assert here["device"] == "Pretend H100" and {"driver", "torch", "triton", "hash"} <= set(here)
    check_runs(report)
    assert (found["captures"], found["replays"]) == (4, 4)  # two trainings and two pictures
    assert set(report["toybox"]["scores"]["class after"]) == {"pres", "validity", "div"}
    assert files(tmp_path / "someone" / "out") == ["first.json", "first.txt"]


@pytest.mark.slow
@on_card.needs_card
def test_every_mode_goes_through_and_photographs_of_ones_own(tmp_path):
    own = runs.settings(tmp_path, kind="half")
    few = {"max_train_steps": 4, "num_class_images": 1, "class_steps": own["class_steps"]}
    few |= {"validation_inference_steps": 1, "num_validation_images": 1}
    own = first.own_run(own["model"], own["instance_data_dir"], "a sks dog") | few
    found, lines = contact(tmp_path, own=own, modes=6, eight_bit=True)
    assert len(lines) == 11
    assert all(line.startswith(f"{name}: as expected; ") for name, line in lines.items())
    check_runs(found["report"])
    made = ["before_after.png", "first.json", "first.txt"]
    assert files(tmp_path / "someone" / "out") == made


# ---- the whole, whatever its parts are ---------------------------------------------------------


@pytest.fixture
def answers(monkeypatch):
    """What parts return, by the beginning of their call; an exception is raised."""
    given = {"look": MACHINE}
    monkeypatch.setattr(first, "SIZE", "toybox")
    monkeypatch.setattr(parts, "step_bytes", lambda row, size: (12 - 2 * len(row.mode)) * GB)

    def result(module, call, seconds):
        found = given.get(call.partition("(")[0], {"said": f"{call} within {seconds:.0f} s"})
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr(first, "result", result)
    return given


def report_of(folder):
    report = json.loads((folder / "first.json").read_text("utf-8"))
    return {name: part["line"] for name, part in report.items()}


def test_what_does_not_fit_is_left_out_and_what_does_comes_by_importance(answers, tmp_path):
    assert first.benchmark(9.5, tmp_path, None) == 0
    lines = report_of(tmp_path)
    names = list(lines)
    assert names[:2] == ["machine", "training, dreambooth gradient_checkpointing"]
    kernels = ["kernels checked", "kernels tried", "kernels in training"]
    assert names[2:7] == ["sampling", "toybox", *kernels]
    assert names[-2:] == ["training, dreambooth in full", "training, lora in full"]
    assert len(names) == 13
    assert lines[names[-1]] == f"{names[-1]}: left out: 12.00 GB counted, 11.00 GB are free"
    assert "within 90 s" in lines["sampling"] and "within 150 s" in lines["toybox"]

    answers["look"] = MACHINE | {"eight_bit": False, "precision": "fp16"}
    first.benchmark(9.5, tmp_path, None)
    lines = report_of(tmp_path)
    assert "optimizer_in_backward" not in str(lines)  # which cannot go with fp16
    assert lines["training, dreambooth use_8bit_adam"].endswith(
        "left out: bitsandbytes is missing, or does not work"
    )


def test_a_part_that_fails_or_differs_is_a_line_and_the_rest_goes_on(
    answers, tmp_path, capsys, monkeypatch
):
    home = os.path.expanduser("~")
    monkeypatch.setattr(first.platform, "node", lambda: "quietbox")
    answers["look"] = measure.Failed("it did not end within 90 s")
    answers["scores"] = measure.Failed(f"it ended (no '{home}/x/y' or /srv/a on quietbox)")
    value = parts.compared("diversity", float("nan"), 0.8, 1, "README: .84 to .85")
    answers["sampling"] = {"said": "1 s", "compared": [value], "differs": ["it is blue"]}
    assert first.benchmark(9.5, tmp_path, None) == 1
    lines = report_of(tmp_path)
    assert len(lines) == 13 and capsys.readouterr().out.splitlines() == list(lines.values())
    assert lines["machine"] == "machine: failed: it did not end within 90 s"
    assert lines["sampling"] == (
        "sampling: differs: it is blue; diversity nan, expected 0.8 to 1 (README: .84 to .85); 1 s"
    )
    assert lines["toybox"] == "toybox: failed: it ended (no '…' or … on …)"


def test_the_time_is_kept_and_ctrl_c_keeps_what_is_there(answers, tmp_path):
    assert first.benchmark(0, tmp_path, None) == 0
    lines = report_of(tmp_path)
    assert set(lines.values()) >= {"machine: left out: no time was left"}
    answers["scores"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        first.benchmark(9.5, tmp_path, None)
    assert len(report_of(tmp_path)) == 3
    assert files(tmp_path) == ["first.json", "first.txt"]


def test_the_picture_of_ones_own_run_is_kept_and_nothing_else_of_it(answers, tmp_path, monkeypatch):
    answer = first.result

    def result(module, call, seconds):
        if call.startswith("program("):
            folder = Path(ast.literal_eval(call.removeprefix("program(")[:-1])["output_dir"])
            folder.mkdir()
            (folder / "before_after.png").write_bytes(b"a picture")
            raise measure.Failed("it did not end within 240 s")
        return answer(module, call, seconds)

    monkeypatch.setattr(first, "result", result)
    own = first.own_run("some/model", str(runs.photographs()), "a sks dog")
    assert first.benchmark(9.5, tmp_path, own) == 1
    assert files(tmp_path) == ["before_after.png", "first.json", "first.txt"]
    assert list(report_of(tmp_path))[3:5] == ["toybox", "your photographs"]


def test_a_part_is_a_process_of_its_own_with_a_limit_and_a_reason():
    assert measure.result("math", "[print('a'), sqrt(4)]") == [None, 2]
    with pytest.raises(measure.Failed, match=r"^it ended with status 1 \(ValueError: .*\)$"):
        measure.result("math", "sqrt(-1)")
    with pytest.raises(measure.Failed, match=r"^it ended with status -9$"):
        measure.result("os", "kill(getpid(), 9)")
    begun = time.monotonic()
    with pytest.raises(measure.Failed, match=r"^it did not end within 1 s$"):
        measure.result("time", "sleep(60)", 1)
    assert time.monotonic() - begun < 20


def test_what_it_is_told_is_checked_first(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    status, out, err = runs.program(monkeypatch, capsys, bench, "first")
    assert (status, out, err) == (2, "", "minibooth.bench: first needs a CUDA card\n")
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    for given, why in (
        (["--model", "m"], "--model and --photos go together"),
        (["--model", "m", "--photos", str(tmp_path)], "holds no image file"),
    ):
        status, _, err = runs.program(monkeypatch, capsys, bench, "first", *given)
        assert status == 2 and why in err


def test_the_class_is_what_the_prompt_names_beside_the_identifier(tmp_path):
    with_class = first.own_run("m", str(runs.photographs()), "a sks dog")
    assert (with_class["class_prompt"], with_class["prior_loss_weight"]) == ("a dog", 1)
    assert first.own_run("m", str(runs.photographs()), "a dog of mine")["prior_loss_weight"] == 0
