"""The five metrics of the paper (section 4.1 and supplement), for one subject and over subjects.

DINO and CLIP-I: how much the pictures look like the subject. CLIP-T: how well they follow the
prompt. PRES: how far the bare class has become the subject. DIV: how different pictures of one
prompt are. All come from a judge's unit vectors and distances (judges.py).
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations

from PIL import Image

from ..toybox.judge import self_similarity, similarity
from .judges import Judge

NEEDS = {"DINO": "dino", "CLIP-I": "clip", "CLIP-T": "clip", "PRES": "dino", "DIV": "lpips"}
METRICS = tuple(NEEDS)
AVERAGINGS = ("subjects", "pairs")


@dataclass(frozen=True)
class Mean:
    """A metric of one subject, and of how many pairs it is the mean."""

    value: float
    pairs: int


@dataclass(frozen=True)
class Picture:
    """One that was drawn for the subject."""

    image: Image.Image
    prompt: str | None  # what it was drawn for; those of one prompt are compared for DIV
    text: str | None  # what CLIP-T compares it with


def real_rows(
    judge: Judge, real: list[Image.Image], choices: list[bool]
) -> dict[bool, dict[str, Mean]]:
    """DINO and CLIP-I of a subject's photographs among each other: what perfect pictures reach.

    For every choice: with self-pairs (True) each is also compared with itself, which gives 1 and
    lifts the mean; without (False) one photograph alone has none.
    """
    rows, n = {choice: {} for choice in choices}, len(real)
    for metric in ("DINO", "CLIP-I"):
        if NEEDS[metric] in judge.missing:
            continue
        seen = judge.image_features(real, NEEDS[metric])  # (n, D)
        for self_pairs, row in rows.items():
            if self_pairs:
                row[metric] = Mean(similarity(seen, seen), n * n)
            elif n > 1:
                row[metric] = Mean(self_similarity(seen), n * (n - 1))
    return rows


def score(
    judge: Judge, real: list[Image.Image], pictures: list[Picture], bare: list[Image.Image]
) -> dict[str, Mean]:
    """Every metric of one subject that can be measured.

    `real` are its photographs, `bare` was drawn for the bare class prompt. Left out is what the
    judge has no model for, CLIP-T where no text is known, PRES without `bare`, and DIV without two
    pictures of one prompt.
    """
    scores, images = {}, [p.image for p in pictures]
    if "dino" not in judge.missing:
        truth, seen = judge.image_features(real, "dino"), judge.image_features(images, "dino")
        scores["DINO"] = Mean(similarity(seen, truth), len(seen) * len(truth))
        if bare:
            seen = judge.image_features(bare, "dino")
            scores["PRES"] = Mean(similarity(seen, truth), len(seen) * len(truth))
    if "clip" not in judge.missing:
        truth, seen = judge.image_features(real, "clip"), judge.image_features(images, "clip")
        scores["CLIP-I"] = Mean(similarity(seen, truth), len(seen) * len(truth))
        told = [i for i, p in enumerate(pictures) if p.text is not None]
        if told:
            texts = judge.text_features([pictures[i].text for i in told])  # (N, D)
            cosines = (seen[told] * texts).sum(dim=1)
            scores["CLIP-T"] = Mean(cosines.mean().item(), len(told))
    pairs = same_prompt_pairs(pictures)
    if "lpips" not in judge.missing and pairs:
        a, b = zip(*pairs, strict=True)
        scores["DIV"] = Mean(judge.distance(list(a), list(b)).mean().item(), len(pairs))
    return {metric: scores[metric] for metric in METRICS if metric in scores}


def same_prompt_pairs(pictures: list[Picture]) -> list[tuple[Image.Image, Image.Image]]:
    """Every two different pictures that were drawn for one prompt."""
    groups = defaultdict(list)
    for p in pictures:
        groups[p.prompt].append(p.image)
    return [pair for group in groups.values() for pair in combinations(group, 2)]


def average(subjects: list[dict[str, Mean]], averaging: str) -> dict[str, float]:
    """One number per metric, over the subjects that have it.

    "subjects": every subject counts the same; "pairs": every pair does, so that a subject with
    more photographs weighs more.
    """
    out = {}
    for metric in METRICS:
        means = [scores[metric] for scores in subjects if metric in scores]
        weights = [m.pairs if averaging == "pairs" else 1 for m in means]
        if means:
            total = sum(w * m.value for w, m in zip(weights, means, strict=True))
            out[metric] = total / sum(weights)
    return out
