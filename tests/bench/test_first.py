"""The first command on a card: on the pretend one it goes through, and says what is as expected."""

import json
import os
import time

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


@on_card.needs_card
def test_every_part_goes_through_and_what_fails_is_a_line(tmp_path):
    home = tmp_path / "someone"
    home.mkdir()
    environment = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    own = runs.settings(home, kind="half", device="cuda", num_validation_images=1)
    own = first.own_run(own["model"], own["instance_data_dir"], "a sks dog") | {
        name: own[name] for name in ("class_steps", "num_validation_images", "device")
    }
    own |= {"max_train_steps": 2, "num_class_images": 1, "validation_inference_steps": 1}
    room = {"('gradient_checkpointing',)": 1_500_000}
    output = home / "out"
    found = on_card.ask(
        "first_contact", folder=str(output), own=own, room=room, environment=environment
    )
    report, lines = found["report"], found["said"].splitlines()
    assert list(report)[:5] == [*BEGINNING, "your photographs"]
    assert lines == [part["line"] for part in report.values()]
    assert lines == (output / "first.txt").read_text("utf-8").splitlines()
    told = {name: line.removeprefix(f"{name}: ") for name, line in zip(report, lines, strict=True)}
    for name in ("kernels checked", "kernels tried"):
        assert told.pop(name).startswith("differs: kernels: none can be launched: RuntimeError: 0 ")
    assert told.pop("kernels in training") == "left out: none is taken"
    full = told.pop("training, dreambooth gradient_checkpointing")
    assert full.startswith("failed: it ended with ") and "ut of memory" in full
    assert len(told) == 10 and all(line.startswith("as expected; ") for line in told.values())
    assert found["status"] == 1

    here = report["machine"]["here"]
    assert here["device"] == "Pretend H100" and {"driver", "torch", "triton", "hash"} <= set(here)
    for name, part in report.items():
        if name.startswith("training") and "row" in part:
            ways = ["not captured"] if "8bit" in name else ["captured", "not captured"]
            assert list(part["runs"]) == ways
            losses = [run["losses"] for run in part["runs"].values()]
            assert losses == losses[:1] * len(ways) and len(set(losses[0])) == parts.STEPS
            assert all(run["seconds"] > 0 < run["peak_bytes"] for run in part["runs"].values())
    assert report["sampling"]["compared"][0]["value"] == 0
    assert found["captures"] > 8 and found["replays"] > 40
    assert set(report["toybox"]["scores"]["class after"]) == {"pres", "validity", "div"}

    assert files(output) == ["before_after.png", "first.json", "first.txt"]
    text = (output / "first.json").read_text("utf-8") + (output / "first.txt").read_text("utf-8")
    assert "someone" not in text and str(tmp_path) not in text


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
