"""When to stop: the curve over a run's snapshots."""

from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from small_judges import clip_folder, cosine, dino_folder, options, peer_features, read_csv, run

from minibooth import UserError, train
from minibooth.evaluate import drawing, snapshots
from minibooth.training import snapshots as saved


def test_every_snapshot_of_a_run_is_a_point_of_the_curve(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    train.train(runs.config(out, max_train_steps=3, checkpointing_steps=1))
    given = ["snapshots", "--run", out, "--steps", 1, "--images", 2, "--class_images", 2]
    given += ["--clip", clip_folder(), "--dino", dino_folder(), "--device", "cpu"]
    status, said, err = run(monkeypatch, capsys, *given)
    assert status == 0, err
    rows = read_csv(out / "evaluation" / "curve.csv")
    assert [r["step"] for r in rows] == ["0", "1", "2", "3"]
    real = [Image.open(f) for f in sorted(runs.photographs().iterdir())]
    truth = peer_features(real, "dino")
    for row in rows:
        folder = out / "evaluation" / f"step-{int(row['step']):05d}"
        for metric, part, count in (("DINO", "pictures", 8), ("PRES", "class", 2)):
            drawn = sorted((folder / part).iterdir())
            assert len(drawn) == count
            seen = peer_features([Image.open(f) for f in drawn], "dino")
            want = np.mean([cosine(a, b) for a in seen for b in truth])
            assert float(row[metric]) == pytest.approx(want, abs=1e-5)
    assert len({r["DINO"] for r in rows}) == 4
    with Image.open(out / "evaluation" / "curve.png") as image:
        colours = {c for _, c in image.getcolors(2**20)}
    assert {snapshots.COLOURS[m] for m in ("DINO", "CLIP-I", "CLIP-T", "PRES")} <= colours
    assert snapshots.COLOURS["DIV"] not in colours  # no lpips here
    assert "stop where DINO" in said and "paper's" not in said

    before = {f: f.stat().st_mtime_ns for f in out.rglob("*-*.png")}
    monkeypatch.setattr(drawing, "load_model", lambda *_: pytest.fail("all is drawn"))
    assert run(monkeypatch, capsys, *given)[0] == 0
    assert before == {f: f.stat().st_mtime_ns for f in before}


@pytest.mark.parametrize(
    "method",
    [
        {"method": "lora", "rank": 2},
        {
            "method": "textual_inversion",
            "placeholder_token": "<sks>",
            "initializer_token": "dog",
            "instance_prompt": "a <sks>",
        },
    ],
    ids=lambda m: m["method"],
)
def test_a_lora_or_a_word_is_drawn_with_the_model_that_it_is_for(method, tmp_path):
    sd, wide = runs.model(), {"learning_rate": 0.05}
    train.train(runs.config(tmp_path, checkpointing_steps=2, **wide, **method), sd)
    draw = {"steps": 2, "seed": 1, "guidance_scale": 2.0, "output": "latent"}
    name = method.get("instance_prompt", "a sks dog")
    wanted = sd.generate([name], **draw)
    found = drawing.load_model(tmp_path, options(device="cpu"))  # its config.json names the model
    torch.testing.assert_close(found.generate([name], **draw), wanted, atol=2e-5, rtol=0)
    stages = snapshots.stages(tmp_path, runs.config(tmp_path, **method))
    assert [Path(s).name for s in stages.values()][1:] == ["checkpoint-2", tmp_path.name]
    earlier = drawing.load_model(stages[2], options(device="cpu"), stages[0])
    assert not torch.allclose(earlier.generate([name], **draw), wanted, atol=1e-3)


def test_a_run_without_models_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"model": "x", "instance_prompt": "a sks dog"}')
    with pytest.raises(UserError, match="neither a snapshot"):
        snapshots.stages(tmp_path, train.TrainConfig())
    assert saved.found(tmp_path) == []
