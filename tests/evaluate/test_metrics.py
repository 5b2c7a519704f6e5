"""The metrics against independent computations."""

import functools
import itertools

import numpy as np
import pytest
import tiny
from PIL import Image
from small_judges import cosine, noise, options, peer_features, peer_texts

from minibooth.evaluate import drawing, judges, metrics, single
from minibooth.evaluate.metrics import Mean, Picture

# ---- small models and data sets ------------------------------------------------------------------


@functools.cache
def public_judge(**changes):
    return judges.load(options(**changes))


# ---- the metrics, computed again -----------------------------------------------------------------


PROMPTS = ["a sks dog in the snow", "a sks dog of a cat"]
TEXTS = ["a dog in the snow", "a dog of a cat"]


def test_the_five_metrics_are_those_of_an_independent_computation(with_lpips):
    real = [noise(i, 60, 44) for i in range(4)]
    images = [noise(10 + i, 44, 52) for i in range(6)]
    bare = [noise(20 + i) for i in range(3)]
    pictures = [Picture(im, PROMPTS[i // 3], TEXTS[i // 3]) for i, im in enumerate(images)]
    scores = metrics.score(with_lpips, real, pictures, bare)

    def mean(values):
        values = list(values)
        return sum(values) / len(values), len(values)

    def among(a, b, kind):
        a, b = peer_features(a, kind), peer_features(b, kind)
        return mean(cosine(x, y) for x in a for y in b)

    texts = peer_texts(TEXTS)
    seen = peer_features(images, "clip")
    by_eye = [np.asarray(image, np.float64) / 127.5 - 1 for image in images]
    pairs = [(i, j) for i, j in itertools.combinations(range(6), 2) if i // 3 == j // 3]
    want = {
        "DINO": among(images, real, "dino"),
        "CLIP-I": among(images, real, "clip"),
        "CLIP-T": mean(cosine(seen[i], texts[i // 3]) for i in range(6)),
        "PRES": among(bare, real, "dino"),
        "DIV": mean(np.abs(by_eye[i] - by_eye[j]).mean() for i, j in pairs),
    }
    assert list(scores) == list(want) == list(metrics.METRICS)
    for metric, (value, count) in want.items():
        assert scores[metric].value == pytest.approx(value, abs=1e-5), metric
        assert scores[metric].pairs == count
    assert len({round(m.value, 4) for m in scores.values()}) == 5


def test_real_photographs_among_themselves_with_and_without_self_pairs():
    real = [noise(i, 40, 40 + 4 * i) for i in range(3)]
    rows = metrics.real_rows(public_judge(), real, [True, False])
    for metric, kind in (("DINO", "dino"), ("CLIP-I", "clip")):
        seen = peer_features(real, kind)
        all_pairs = [cosine(a, b) for a in seen for b in seen]
        others = [cosine(seen[i], seen[j]) for i in range(3) for j in range(3) if i != j]
        assert rows[True][metric].value == pytest.approx(np.mean(all_pairs), abs=1e-5)
        assert rows[False][metric].value == pytest.approx(np.mean(others), abs=1e-5)
        assert (rows[True][metric].pairs, rows[False][metric].pairs) == (9, 6)
    assert metrics.real_rows(public_judge(), real[:1], [True, False])[False] == {}


def test_subjects_count_the_same_however_many_photographs_they_have():
    scores = [{"DINO": Mean(0.9, 1)}, {"DINO": Mean(0.3, 2), "DIV": Mean(0.5, 7)}]
    assert metrics.average(scores, "subjects") == pytest.approx({"DINO": 0.6, "DIV": 0.5})
    assert metrics.average(scores, "pairs") == pytest.approx({"DINO": 0.5, "DIV": 0.5})


def test_what_is_seen_is_the_middle_of_the_picture():
    white = Image.new("RGB", (90, 30), "white")
    white.paste((255, 0, 0), (30, 0, 60, 30))
    for image in (white, white.transpose(Image.Transpose.ROTATE_90)):
        seen = np.asarray(judges.square(image, 60, 40))
        assert seen.shape == (40, 40, 3) and (seen == (255, 0, 0)).all()


def test_text_and_resize_are_options(monkeypatch):
    image = noise(5, 80, 50)
    near, wide = public_judge(resize=512), public_judge()
    a, b = (j.image_features([image], "dino") for j in (near, wide))
    assert tiny.rel(a, b) > 0.01
    assert drawing.without("sks", "a sks dog, sksy sks") == "a dog, sksy"
    assert single.text_of("a sks dog", options()) == "a dog"
    assert single.text_of("a sks dog", options(identifier_in_text=True)) == "a sks dog"
    long = public_judge().text_features(["a dog " * 60])  # cut to 77 tokens, not refused
    assert long.norm().item() == pytest.approx(1, abs=1e-5)
