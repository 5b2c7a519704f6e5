"""The comparison with diffusers measures the same work on both sides."""

import json
import sys

import eight_bit_stand_in
import pytest
import tiny
import torch
from PIL import Image

from minibooth.bench import memory as bench_memory
from minibooth.bench import models, peers, sides
from minibooth.formats.configs import SD1_UNET, SD_VAE
from minibooth.toybox.pretrain import TEXT_CONFIG
from minibooth.training import memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Networks of a second, and memory read in this process."""
    unet = SD1_UNET | tiny.UNET_SD1 | {"sample_size": 8}
    configs = {
        "unet": unet,
        "vae": SD_VAE | tiny.VAE_SD | {"sample_size": 64},
        "text_encoder": TEXT_CONFIG | {"hidden_size": 24, "intermediate_size": 48},
    }
    monkeypatch.setitem(models.CONFIGS, "toybox", configs)
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


def test_the_memory_bench_measures_every_mode(tmp_path, capsys, monkeypatch):
    """Here in this process, and with two of the modes; one of them cannot run with the text."""

    def alone(module, call):
        if "use_8bit_adam" in call and "train_text_encoder" in call:
            return None
        return eval(call, vars(sys.modules[module]))

    monkeypatch.setitem(sys.modules, "bitsandbytes", eight_bit_stand_in.MODULE)
    monkeypatch.setattr(memory, "MODES", [(), memory.MODES[-1]])
    monkeypatch.setattr(bench_memory, "alone", alone)
    for module in (peers, bench_memory):
        monkeypatch.setattr(module, "prepared", lambda *_, **__: CPU)
    bench_memory.benchmark("memory", 60, tmp_path)
    report = json.loads((tmp_path / "memory-cpu.json").read_text())
    out = capsys.readouterr().out
    assert len(report["modes"]) == 4
    for found in report["modes"][:3]:
        names = [name for name, _ in found["row"]["settings"]]
        head = f"{' '.join(names) or 'full speed'}: peak {found['peak_bytes'] / 1e9:.2f} GB, "
        assert head + f"{1e3 * found['seconds']:.1f} ms" in out
    assert "gradient_checkpointing: cannot run here" in out
    assert report["whole run, saving most"]["peak_bytes"] > 10**8


def test_a_limited_mode_is_told_from_one_that_does_not_fit():
    found = {"row": {"settings": ()}, "peak_bytes": 6 * 10**9, "seconds": 0.5}
    found["counted_bytes"] = bench_memory.counted(sides.Row("step", 1, "bf16"), "SD 1.5")
    assert found["counted_bytes"] == pytest.approx(15.4e9, rel=0.01)
    assert bench_memory.describe_mode(found | {"limited": {"peak_bytes": 1}}).endswith(
        "GB, within 7.5 GB: yes, 500.0 ms"
    )
    assert "within 7.5 GB: no" in bench_memory.describe_mode(found | {"limited": None})
