"""What a run says of its length before it draws anything, and after two steps."""

import pytest
import runs
import torch

from minibooth import train
from minibooth.training import passes
from minibooth.training.settings import TrainConfig

CPU = torch.device("cpu")


def test_passes_of_a_run_are_counted():
    config = TrainConfig(
        instance_prompt="a sks dog",
        class_prompt="a dog",
        max_train_steps=500,
        train_batch_size=2,
        gradient_accumulation_steps=3,
        class_steps=20,
        validation_steps=200,
    )
    found = passes.to_come(config, class_images=50)
    # With guidance: 2 · 50 · 20. Of both terms 2 · 2 · 3 a step, forward and back. Grids at 0, 200,
    # 400 and 500, of 2 pictures for 3 prompts.
    assert found == passes.Passes(2000, 500 * 12 * 3, 4 * 6 * 25 * 2)
    # A run that goes on draws a grid where it begins.
    assert passes.to_come(config, 0, done=300) == passes.Passes(0, 200 * 36, 3 * 300)
    plain = TrainConfig(
        prior_loss_weight=0.0,
        num_validation_images=0,
        gradient_checkpointing=True,
        class_guidance_scale=1.0,
    )
    assert passes.to_come(plain, 7) == passes.Passes(7 * 50, 800 * 4, 0)


def test_a_forecast_is_told_at_once_and_after_two_steps(monkeypatch, capsys):
    ticks = iter([10.0, 13.0])
    monkeypatch.setattr(passes.time, "perf_counter", lambda: next(ticks))
    on_passes = passes.Forecast(passes.Passes(2000, 4800, 0), TrainConfig(), CPU)
    assert capsys.readouterr().out == (
        "passes of the UNet to come: 2,000 for class images, 4,800 for training, where one forward "
        "and back counts as 3\n"
    )
    on_passes(8)
    assert not capsys.readouterr().out
    on_passes(6)  # in 3 seconds
    for _ in range(5):
        on_passes(6)
    assert capsys.readouterr().out == (
        "this takes about 57 minutes (class images 17 minutes, training 40 minutes), as the first "
        "2 steps say: 0.5 s a pass\n"
    )


@pytest.mark.parametrize(
    "seconds, words", [(0.6, "1 second"), (89, "89 seconds"), (5400, "2 hours")]
)
def test_seconds_in_words(seconds, words):
    assert passes.in_words(seconds) == words


def test_a_run_tells_both_before_its_first_picture_and_once(tmp_path, monkeypatch, capsys):
    told = []
    generate = runs.StableDiffusion.generate
    monkeypatch.setattr(
        runs.StableDiffusion,
        "generate",
        lambda *a, **k: told.append(capsys.readouterr().out) or generate(*a, **k),
    )
    changes = {"class_data_dir": None, "sample_batch_size": 2, "num_validation_images": 1}
    train.train(runs.config(tmp_path, **changes))
    # 3 class images in 2 steps and 3 steps of both terms; two grids of 3 pictures
    assert "to come: 12 for class images, 18 for training, 24 for grids" in told[0]
    assert "this takes about" in told[1] and len(told) == 4
    assert "this takes about" not in "".join(told[2:]) + capsys.readouterr().out
