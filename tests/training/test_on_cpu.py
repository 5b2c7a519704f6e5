"""--device auto that ends on the CPU: the time it takes, and no run that nobody asked for."""

import pytest
import runs
import torch

from minibooth import UserError, sample, train
from minibooth.device import no_gpu
from minibooth.sample import SampleConfig
from minibooth.training import on_cpu


@pytest.fixture
def of_public_size(monkeypatch):
    """The small models of the tests are taken for large ones, and there is no GPU."""
    for module in (on_cpu, sample):
        monkeypatch.setattr(module, "is_public_size", lambda configs: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_a_run_of_public_size_says_how_long_it_takes_and_does_not_begin(
    of_public_size, tmp_path, monkeypatch, capsys
):
    ticks = iter(2 * [0.0, 100.0, 100.0, 190.0])  # two steps, of which the second takes 90 s
    monkeypatch.setattr(on_cpu.time, "perf_counter", lambda: next(ticks))
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
        on_cpu.refuse(runs.model(), config, 32, torch.device("cpu"))


def test_what_was_asked_for_or_is_small_runs(of_public_size, tmp_path, monkeypatch):
    monkeypatch.setattr(no_gpu, "why", lambda: pytest.fail("asked"))
    sd, cpu = runs.model(), torch.device("cpu")
    on_cpu.refuse(sd, runs.config(tmp_path, device="cpu"), 32, cpu)
    monkeypatch.setattr(on_cpu, "is_public_size", lambda configs: False)
    on_cpu.refuse(sd, runs.config(tmp_path, device="auto"), 32, cpu)


def test_pictures_of_public_size_are_drawn_with_a_word_of_warning(of_public_size, tmp_path):
    model = runs.settings(tmp_path)["model"]
    settings = {"model": model, "prompt": ("a dog",), "output_dir": str(tmp_path)}
    with pytest.warns(UserWarning, match="this takes long, as no GPU can be used"):
        sample.sample(SampleConfig(**settings, num_images=1, steps=1))
