"""--device auto that ends on the CPU: the reason, the time, and no run that nobody asked for."""

import stat

import pytest
import runs
import torch

from minibooth import UserError, sample, train
from minibooth.sample import SampleConfig
from minibooth.training import no_gpu


@pytest.fixture
def of_public_size(monkeypatch):
    """The small models of the tests are taken for large ones, and there is no GPU."""
    for module in (no_gpu, sample):
        monkeypatch.setattr(module, "is_public_size", lambda configs: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_a_run_of_public_size_says_how_long_it_takes_and_does_not_begin(
    of_public_size, tmp_path, monkeypatch, capsys
):
    ticks = iter(2 * [0.0, 100.0, 100.0, 190.0])  # two steps, of which the second takes 90 s
    monkeypatch.setattr(no_gpu.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(no_gpu, "visible_card", lambda: None)
    settings = {"device": "auto", "max_train_steps": 800}
    settings |= {"num_class_images": 200, "class_steps": 50}
    with pytest.raises(UserError) as error:
        train.train(runs.config(tmp_path / "out", **settings))
    # 800 · 90 s, and 200 · 50 · 2 forward passes of 15 s: 103.3 hours
    said = "no GPU can be used: the system shows no NVIDIA card"
    assert capsys.readouterr().out.startswith(said) and str(error.value).startswith(said)
    took = "takes about 103 hours (90 s a step, as measured): --device cpu goes on"
    assert took in str(error.value)
    assert not (tmp_path / "out").exists()
    config = runs.config(tmp_path / "out", **settings, method="lora")
    with pytest.raises(UserError, match="takes about 103 hours"):
        no_gpu.refuse(runs.model(), config, 32, torch.device("cpu"))


def test_what_was_asked_for_or_is_small_runs(of_public_size, tmp_path, monkeypatch):
    monkeypatch.setattr(no_gpu, "why", lambda: pytest.fail("asked"))
    sd, cpu = runs.model(), torch.device("cpu")
    no_gpu.refuse(sd, runs.config(tmp_path, device="cpu"), 32, cpu)
    monkeypatch.setattr(no_gpu, "is_public_size", lambda configs: False)
    no_gpu.refuse(sd, runs.config(tmp_path, device="auto"), 32, cpu)


def test_pictures_of_public_size_are_drawn_with_a_word_of_warning(of_public_size, tmp_path):
    model = runs.settings(tmp_path)["model"]
    settings = {"model": model, "prompt": ("a dog",), "output_dir": str(tmp_path)}
    with pytest.warns(UserWarning, match="this takes long, as no GPU can be used"):
        sample.sample(SampleConfig(**settings, num_images=1, steps=1))


def test_the_reason_is_what_the_system_shows(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if not no_gpu.visible_card():  # as /proc has it
        assert no_gpu.why().startswith("the system shows no NVIDIA card")
    tool.write_text("#!/bin/sh\necho NVIDIA GeForce RTX 4070\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    for cuda, said in ((None, "is built without CUDA: get the one"), ("12.8", "driver is too old")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert no_gpu.why().startswith("there is NVIDIA GeForce RTX 4070, but ")
        assert said in no_gpu.why()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is '': unset it" in no_gpu.why()
