"""The row of the real photographs."""

import itertools
import os

import huggingface_hub
import numpy as np
import pytest
import test_weights
from PIL import Image
from small_judges import (
    CLASSES,
    CLIP_ID,
    DINO_ID,
    SHARED,
    clip_folder,
    cosine,
    dino_folder,
    make_dataset,
    peer_features,
    read_csv,
    run,
)

from minibooth.evaluate import judges, metrics, subjects
from minibooth.evaluate.options import Options


def test_the_real_row_averages_subjects_first_and_mixes_no_names(tmp_path, monkeypatch, capsys):
    counts = {"dog": 2, "dog2": 5, "backpack": 3, "backpack_dog": 1}
    data = make_dataset(tmp_path / "data", CLASSES, counts)
    given = ["dataset", "--data", data, "--clip", clip_folder(), "--dino", dino_folder()]
    given += ["--output_dir", tmp_path / "out", "--device", "cpu"]
    status, out, _ = run(monkeypatch, capsys, *given)
    assert status == 0
    rows = read_csv(tmp_path / "out" / "subjects.csv")
    ours = {r["subject"]: r for r in rows if r["row"] == "real photographs, with self-pairs"}
    means = {}
    for name in CLASSES:
        images = [Image.open(f) for f in sorted((data / name).iterdir())]
        assert len(images) == counts[name]
        seen = peer_features(images, "dino")
        means[name] = np.mean([cosine(a, b) for a in seen for b in seen])
        assert float(ours[name]["DINO"]) == pytest.approx(means[name], abs=1e-5)
    mean = np.mean(list(means.values()))
    [line] = [x for x in out.splitlines() if x.startswith("| real photographs, with self-pairs")]
    cells = [c.strip() for c in line.strip("| ").split("|")]
    assert cells[1] == f"{mean:.3f}" and cells[4:6] == ["0.774", "0.885"]
    assert "4 of 4 subjects" in out
    assert "averaged so that every subject counts the same" in out

    # Without self-pairs a single photograph has no pair, so three subjects are left.
    [line] = [x for x in out.splitlines() if x.startswith("| real photographs, without")]
    images = {n: [Image.open(f) for f in sorted((data / n).iterdir())] for n in CLASSES}
    others = [
        np.mean([cosine(a, b) for a, b in itertools.permutations(peer_features(v, "dino"), 2)])
        for v in images.values()
        if len(v) > 1
    ]
    assert line.split("|")[2].strip() == f"{np.mean(others):.3f}"

    status, out, _ = run(monkeypatch, capsys, *given, "--averaging", "pairs", "--self_pairs=with")
    weights = [counts[name] ** 2 for name in CLASSES]
    pooled = np.average(list(means.values()), weights=weights)
    assert f"| {pooled:.3f} |" in out and "without self-pairs" not in out
    assert f"{pooled:.3f}" != f"{mean:.3f}"


@pytest.mark.skipif(not SHARED.exists(), reason=f"the authors' photographs are not in {SHARED}")
def test_the_real_row_runs_on_the_authors_photographs(tmp_path, monkeypatch, capsys):
    given = ["dataset", "--data", SHARED, "--clip", clip_folder(), "--dino", dino_folder()]
    names = [f.name for f in sorted(SHARED.iterdir()) if f.is_dir()]
    given += ["--output_dir", tmp_path, "--device", "cpu", "--subjects", ",".join(names[:4])]
    status, out, err = run(monkeypatch, capsys, *given)
    assert status == 0, err
    assert "4 of 30 subjects" in out
    rows = read_csv(tmp_path / "subjects.csv")
    assert [r["subject"] for r in rows] == 2 * names[:4]
    assert all(0 < float(r["DINO"]) <= 1 and 0 < float(r["CLIP-I"]) <= 1 for r in rows)


@pytest.mark.weights
def test_the_published_real_row():
    """The whole data set (MINIBOOTH_DREAMBOOTH: a checkout of google/dreambooth) with the public
    CLIP and DINO; with self-pairs, which the paper does not state."""
    data = os.environ.get("MINIBOOTH_DREAMBOOTH")
    if not data:
        pytest.skip("MINIBOOTH_DREAMBOOTH names no checkout of google/dreambooth")
    found, absent = subjects.find(data)
    assert not absent and len(found) == 30
    for repo_id in (CLIP_ID, DINO_ID):
        if not isinstance(huggingface_hub.try_to_load_from_cache(repo_id, "config.json"), str):
            pytest.skip(f"{repo_id} is not in the hub's cache")
    judge = judges.load(Options())
    rows = []
    for subject in found:
        files = sorted(subject.folder.iterdir())
        real = [Image.open(f) for f in files if f.suffix in (".jpg", ".png")]
        rows.append(metrics.real_rows(judge, real, [True])[True])
    mean = metrics.average(rows, "subjects")
    measured = [mean["DINO"], mean["CLIP-I"]]
    # Others' reruns differ from the paper by up to .014.
    assert test_weights.judge("real photographs", CLIP_ID, measured, [0.774, 0.885], 0.02)
