"""The comparison with diffusers measures the same work on both sides."""

import json
import sys

import pytest
import tiny
import torch
from PIL import Image

from minibooth.bench import models, peers, sides

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch, tiny_networks):
    """Tiny networks, and no memory that is read in a process of its own."""
    monkeypatch.setattr(peers, "peak", lambda *args: 10**9)
    monkeypatch.setattr(peers, "cpu_has_bf16", lambda: False)


ROWS = [
    sides.Row("forward", 2, "no"),
    sides.Row("step", 2, "no"),
    sides.Row("sample", 2, "no", steps=3),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_both_sides_compute_the_same(row, tmp_path):
    names = [sides.OURS, *sides.peers(CPU)]
    calls = {n: sides.implementation(row, "toybox", CPU, tmp_path, n) for n in names}
    for _ in range(3):  # later steps too: the update is compared as well
        ours, theirs = (call() for call in calls.values())
        assert tiny.rel(ours, theirs) < 1e-4


@pytest.mark.parametrize("method, dtype", [("lora", "bfloat16"), ("dreambooth", "float32")])
def test_a_step_is_taken_with_the_weights_where_a_run_has_them(method, dtype, tmp_path):
    sd = models.model("toybox", CPU)
    row = sides.Row("step", 1, "bf16", settings=(("method", method),))
    step = sides.our_step(*sides.training_run(row, sd, tmp_path))
    assert {p.dtype for p in sd.unet.conv_in.parameters()} == {getattr(torch, dtype)}
    assert step().isfinite()


def test_the_benchmark_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    race = peers.race
    monkeypatch.setattr(peers, "race", lambda *args, **_: race(*args[:2], 0, 1))
    peers.benchmark("train", 60, tmp_path)
    peers.benchmark("sample", 60, tmp_path)
    out = capsys.readouterr().out
    for what, kinds in (("train", ["forward", "step"]), ("sample", ["sample"])):
        report = json.loads((tmp_path / f"{what}-cpu.json").read_text())
        assert report["torch"] == torch.__version__ and report["device"] and report["diffusers"]
        assert [r["row"]["what"] for r in report["rows"]] == kinds
        for row in report["rows"]:
            times = {name: t["median"] for name, t in row["seconds"].items()}
            assert row["rounds"] >= 5 and min(times.values()) > 0
            assert row["difference"]["diffusers"] < 1e-4
            assert f"{row['ratio']['diffusers']:.2f}×" in out
            assert ("floor_seconds" in row) == (what == "train")
        assert Image.open(tmp_path / f"{what}-cpu.png").width > 200


def test_without_diffusers_its_columns_are_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    race = peers.race
    monkeypatch.setattr(peers, "race", lambda *args, **_: race(*args[:2], 0, 1))
    peers.benchmark("sample", 60, tmp_path)
    assert "diffusers is not installed" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "sample-cpu.json").read_text())["rows"]
    assert list(row["seconds"]) == ["minibooth"] and row["ratio"] == {}


def test_the_floor_counts_products_and_the_optimizers_traffic():
    rates = {"flops": {"no": 1e9}, "bytes": 1e9}
    forward = peers.floor_seconds(sides.Row("forward", 2, "no"), "toybox", rates)
    step = peers.floor_seconds(sides.Row("step", 1, "no"), "toybox", rates)
    weights = sum(p.numel() for p in models.model("toybox", CPU).unet.parameters())
    assert step == pytest.approx(3 * forward + 28 * weights / 1e9)


def test_a_peak_is_measured_in_a_process_of_its_own(monkeypatch):
    monkeypatch.undo()
    row = sides.Row("forward", 1, "no")
    assert 10**8 < peers.peak(row, "toybox", CPU, sides.OURS) < 10**10
