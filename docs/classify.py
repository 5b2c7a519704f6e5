"""python docs/classify.py: the class noun by the model, with the same noise for each noun or not.

200 pictures of the drawn world, and the toybox's five subjects. Writes docs/classify.csv, which
docs/toybox.md quotes. Takes about ten minutes on one CPU core.
"""

import csv
import random
from pathlib import Path

import torch

from minibooth import classify, load
from minibooth.common.pictures import as_floats
from minibooth.toybox import world
from minibooth.training.data import rng

FILE, COUNT = Path(__file__).with_name("classify.csv"), 200
DRAWS = 9  # for each picture and noun; their timesteps are evenly spaced
TAKEN = {"1": [4], "3": [1, 4, 7], "9": list(range(DRAWS))}  # and so are those of fewer
COLUMNS = ("row", "paired", "unpaired", "found", "next", "difference", "error", "not sure")


def accuracies() -> list[dict]:
    """By number of draws, the share of pictures whose class has the least loss."""
    sd, r = load("toybox"), random.Random("classify")
    scenes = [world.random_scene(r, kind=r.choice(world.CLASSES)) for _ in range(COUNT)]
    pictures = as_floats(torch.from_numpy(world.pixels(scenes)).permute(0, 3, 1, 2))
    with torch.no_grad():
        x = sd.vae.encode(pictures)[0] * sd.vae.scaling_factor  # (200, 4, h, w)
    right = torch.tensor([world.CLASSES.index(scene.kind) for scene in scenes])
    with torch.no_grad():
        texts = sd.encode([classify.prompt_of(noun) for noun in world.CLASSES])
    contexts = [texts[i : i + 1] for i in range(len(texts))]
    found = {}
    for name in ("paired", "unpaired"):
        losses = torch.empty(len(contexts), DRAWS, COUNT)
        for i, c in enumerate(contexts):
            for k in range(DRAWS):
                of_noun = i if name == "unpaired" else 0
                eps = torch.randn(x.shape, generator=rng(0, "docs", of_noun, k))
                t = torch.full((COUNT,), int((k + 0.5) * len(sd.schedule.alpha_bar) / DRAWS))
                losses[i, k] = classify.losses(sd, c, x, eps, t)
        guesses = {n: losses[:, taken].mean(1).argmin(0) for n, taken in TAKEN.items()}
        found[name] = {n: (guess == right).double().mean().item() for n, guess in guesses.items()}
    return [{"row": n, **{name: found[name][n] for name in found}} for n in TAKEN]


def subjects() -> list[dict]:
    """What the program says of each."""
    rows = []
    for name in world.SUBJECTS:
        folder = classify.hub.toybox() / "subjects" / name
        best, runner_up, *_ = classify.classify(classify.ClassifyConfig("toybox", str(folder)))
        known = {"difference": f"{runner_up.difference:.5f}", "error": f"{runner_up.error:.5f}"}
        known |= {"next": runner_up.noun, "not sure": "yes" if runner_up.unsure else "no"}
        rows.append({"row": name.replace("_", " "), "found": best.noun, **known})
    return rows


if __name__ == "__main__":
    lines = [*accuracies(), *subjects()]
    with open(FILE, "w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    print(FILE.read_text())
