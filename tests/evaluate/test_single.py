"""One subject measured."""

import json
import re
from dataclasses import fields

import peers
import pytest
import runs
from PIL import Image, PngImagePlugin
from small_judges import clip_folder, dino_folder, noise, options, run

from minibooth import sample
from minibooth.evaluate import __main__ as program
from minibooth.evaluate import metrics, single
from minibooth.evaluate.metrics import Picture


def test_pictures_of_minibooth_sample_say_what_they_were_drawn_for(
    tmp_path, monkeypatch, capsys, with_lpips
):
    prompts = ("a sks dog in the snow", "a sks dog", "a dog")
    settings = {"steps": 1, "num_images": 2, "device": "cpu", "output_dir": str(tmp_path / "s")}
    model = str(peers.model()[0])
    written = sample.sample(sample.SampleConfig(model=model, prompt=prompts, **settings))
    config = options(
        single.SingleConfig,
        real=str(runs.photographs()),
        generated=str(tmp_path / "s"),
        class_prompt="a dog",
        output_dir=str(tmp_path / "out"),
    )
    scores = single.evaluate(config)
    real = [Image.open(f) for f in sorted(runs.photographs().iterdir())]
    images = [Image.open(f) for f in written]
    texts = ["a dog in the snow"] * 2 + ["a dog"] * 2
    pictures = [Picture(*row) for row in zip(images[:4], "aabb", texts, strict=True)]
    want = metrics.score(with_lpips, real, pictures, images[4:])
    assert scores.keys() == want.keys() == set(metrics.METRICS)
    for metric, mean in want.items():
        assert scores[metric].value == pytest.approx(mean.value, abs=1e-6)
        assert scores[metric].pairs == mean.pairs
    assert "3 photographs, 4 pictures, 2 of the bare class" in capsys.readouterr().out

    # The same from the model itself: the same pictures, so the same numbers.
    given = ["--real", runs.photographs(), "--generated", model, "--class_prompt", "a dog"]
    given += ["--prompt", prompts[0], "--prompt", prompts[1], "--images", 2, "--class_images", 2]
    given += ["--clip", clip_folder(), "--dino", dino_folder(), "--steps", 1, "--device", "cpu"]
    given += ["--output_dir", tmp_path / "drawn"]
    status, out, err = run(monkeypatch, capsys, *given)
    assert status == 0, err
    again = json.loads((tmp_path / "drawn" / "scores.json").read_text())["scores"]
    for metric, mean in scores.items():
        assert again[metric]["value"] == pytest.approx(mean.value, abs=1e-3)
        assert re.search(rf"^{metric} +{again[metric]['value']:.3f} ", out, re.M)
    assert (tmp_path / "drawn" / "grid.png").exists()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "drawn").rglob("*-*.png")}
    assert len(before) == 6
    assert run(monkeypatch, capsys, *given)[0] == 0
    assert before == {f: f.stat().st_mtime_ns for f in before}
    status, _, err = run(monkeypatch, capsys, *given, "--guidance_scale", 3)
    assert status == 2 and "guidance_scale was 7.5 and is 3.0" in err and err.count("\n") == 1


def test_a_workflow_of_another_program_is_no_prompt(tmp_path, capsys):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("prompt", '{"3": {"class_type": "KSampler"}}')
    for i in range(2):
        noise(i).save(tmp_path / f"{i}.png", pnginfo=info)
    given = {"real": str(tmp_path), "generated": str(tmp_path)}
    config = options(single.SingleConfig, **given, output_dir=str(tmp_path / "out"))
    assert "CLIP-T" not in single.evaluate(config)
    out = capsys.readouterr().out
    assert "CLIP-T left out: the pictures do not say" in out
    assert "PRES left out: no picture of the bare class" in out


@pytest.mark.parametrize(
    "given, said",
    [
        (["--real", "x"], "give --real"),
        (["--real", "nowhere", "--generated", "x"], "nowhere does not exist"),
        (["--images", 0], "--images must be at least 1"),
        (["--resize", 100], "--resize must be"),
        (["--identifier", "s ks"], "--identifier must be one word"),
        (["dataset"], "give --data"),
        (["dataset", "--data", "nowhere"], "nowhere holds no prompts_and_classes.txt"),
        (["dataset", "--data", "x", "--tables", "1,2"], "--tables '2': give some of 1, 3, 4"),
        (["dataset", "--data", "x", "--prompts", 0], "--prompts must be at least 1"),
        (["snapshots"], "give --run"),
        (["snapshots", "--run", "nowhere"], "nowhere is not the folder of a run"),
        (["datasets"], "unrecognized arguments: datasets"),
    ],
)
def test_mistakes_are_one_line(given, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(monkeypatch, capsys, *given)
    assert status == 2 and said in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize("name", program.COMMANDS)
def test_help_names_every_setting(name, monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, *([name] if name else []), "--help")
    assert status == 0
    assert out.startswith(f"usage: python -m minibooth.evaluate {name}".rstrip())
    for field in fields(program.COMMANDS[name][0]):
        assert re.search(rf"^  --{field.name}\b", out, re.MULTILINE)
