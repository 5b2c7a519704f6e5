"""The memory bench: whole runs, measured by phase, beside what they were counted to need."""

import json
import sys

import eight_bit_stand_in
import pytest
import torch

from minibooth.bench import memory as bench
from minibooth.bench.memory import Row
from minibooth.device import memory
from minibooth.training import finite, fit

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHORT = ("gradient_checkpointing",)


@pytest.fixture
def small(monkeypatch, tiny_networks):
    """Tiny networks, in this process."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", eight_bit_stand_in.MODULE)
    few = {"class_steps": 1, "validation_inference_steps": 1, "num_validation_images": 1}
    few |= {"max_train_steps": 6, "validation_steps": 3, "checkpointing_steps": 6}
    monkeypatch.setattr(bench, "STEPS", 6)
    monkeypatch.setattr(bench, "SMALL", bench.SMALL | few)
    monkeypatch.setattr(bench, "prepared", lambda limit: CPU)
    monkeypatch.setattr(bench, "alone", lambda _, call: eval(call, vars(bench)))


def test_each_row_is_a_whole_run_measured_by_phase(small, tmp_path, capsys, monkeypatch):
    rows = [Row("dreambooth", fit.MODES[-1], "no"), Row("textual_inversion", (), "no")]
    monkeypatch.setattr(bench, "rows", lambda device: rows)
    looked, first_not_finite = [], finite.first_not_finite

    def look(parameters, batches):
        looked.append(first_not_finite(parameters, batches))
        return looked[-1]

    monkeypatch.setattr(finite, "first_not_finite", look)
    bench.benchmark("memory", 60, tmp_path)
    report = json.loads((tmp_path / "memory-cpu.json").read_text())
    out = capsys.readouterr().out
    assert [(f["row"]["method"], tuple(f["row"]["mode"])) for f in report["rows"]] == [
        (row.method, row.mode) for row in rows
    ]
    for found in report["rows"]:
        assert set(found["phases"]) == {"pictures before", "explain", "training", "second look"}
        assert all(phase["peak_bytes"] > 10**8 for phase in found["phases"].values())
        # The second look finds all finite: it has been through forward and backward pass.
        assert found["ended"].startswith("step 6: the gradient of the scaled loss is not finite")
        assert f"{1e3 * found['seconds']:.0f} ms a step" in out and found["seconds"] > 0
    assert len(looked) == 2 and "2 of 2 rows" in out

    bench.benchmark("memory", 60, tmp_path)  # nothing is left to do
    assert json.loads((tmp_path / "memory-cpu.json").read_text()) == report and len(looked) == 2
    monkeypatch.setattr(bench, "rows", lambda device: [*rows, Row("lora", (), "no")])
    bench.benchmark("memory", 0, tmp_path)  # no time
    assert "2 of 3 rows" in capsys.readouterr().out


def test_a_run_that_ends_otherwise_did_not_fit(small, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(memory, "checkpoint_gradients", full)
    with pytest.raises(SystemExit, match="out of memory"):
        bench.measure(Row("lora", SHORT, "no"), "toybox", None)


def test_the_rows_are_what_can_be_done_in_each_precision():
    rows = bench.rows(CUDA)
    assert len(rows) == len(set(rows)) == 6 + 2 + 2 + 2 + 4 + 2 + 2 + 2
    fp16 = [row for row in rows if row.precision == "fp16"]
    assert not any("optimizer_in_backward" in row.mode for row in fp16)
    assert {row.precision for row in bench.rows(CPU)} == {"no"}


@pytest.mark.parametrize(
    "method, mode, size",
    [
        ("lora", SHORT, 6e9),
        ("lora", (), 8e9),
        ("dreambooth", fit.MODES[-1], 8e9),
        ("dreambooth", fit.MODES[3], 12e9),
    ],
)
def test_a_run_goes_under_the_smallest_cap_that_it_is_counted_to_fit(method, mode, size):
    phases = bench.counted(Row(method, mode, "bf16"), "SD 1.5")
    assert list(phases) == ["pictures before", "explain", "training"]
    assert bench.cap(phases) == size


def test_beyond_all_caps_it_is_what_is_counted():
    phases = {"training": (10**10, 10**10), "explain": (0, 0)}
    assert bench.cap(phases) == 10**10 + 1.1 * 10**10 + 0.5e9


def test_what_was_measured_is_compared_with_the_plan_without_its_margin(monkeypatch):
    row = Row("lora", SHORT, "fp16")
    phases = bench.counted(row, "SD 1.5")
    sizes = {name: sum(phase) for name, phase in phases.items()}
    most = max(sizes.values())
    measured = {name: {"peak_bytes": size / 1.02} for name, size in sizes.items()}
    measured["second look"] = {"peak_bytes": 1.25 * most}
    asked = []

    def alone(module, call):
        asked.append(call)
        return {"phases": measured, "seconds": 0.25, "ended": "step 6: … (no memory was left …)"}

    monkeypatch.setattr(bench, "alone", alone)
    found = bench.compare(row, "SD 1.5", CUDA)
    assert asked == [f"measure({row!r}, 'SD 1.5', 6000000000)"]
    assert found["errors"] == pytest.approx(dict.fromkeys(phases, 0.02))
    assert found["error"] == pytest.approx(1 / 1.25 - 1)
    line = bench.describe(found)
    assert line.startswith("lora fp16 gradient_checkpointing, counted 4.0")
    for part in ("6.0 GB was held", "-20.0%", "250 ms", "no second look"):
        assert part in line

    monkeypatch.setattr(bench, "alone", lambda module, call: None)
    assert "6.0 GB was NOT held" in bench.describe(bench.compare(row, "SD 1.5", CUDA))
