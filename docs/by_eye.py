"""python docs/by_eye.py: does the judge read generated pictures as a person does?

The judge was trained on renders, and what the model draws is not a render. Draws the 100 pictures
whose labels stand in weights/toybox/judge/by_eye.csv, onto four sheets without their prompts, and
compares the labels with what the judge reads. A "?" is a colour that the person could not name.
"""

import csv
import random
from pathlib import Path

from minibooth import load
from minibooth.common import sheets
from minibooth.common.pictures import to_pil
from minibooth.formats import hub
from minibooth.toybox import judge, score, world
from minibooth.training import report

FILE = hub.toybox() / "judge" / "by_eye.csv"
FIELDS = {"class": "kind", "colour": "colour", "place": "place"}


def prompts(count: int = 100) -> list[str]:
    r, out = random.Random("by eye"), []
    for _ in range(count):
        kind, colour = r.choice(world.CLASSES), r.choice([*world.COLOURS])
        place = r.choice(world.PLACES)
        if r.random() < 0.6:
            out.append(f"{world.article(colour)} {colour} {kind} {place}")
        else:
            out.append(f"a {kind} {place}" if r.random() < 0.5 else f"a {kind}")
    return out


if __name__ == "__main__":
    pictures = score.draw(load("toybox"), prompts(), seed=4242)
    for first in range(0, 100, 25):
        rows = [to_pil(pictures[i : i + 5]) for i in range(first, first + 25, 5)]
        labels = [f"{i} to {i + 4}" for i in range(first, first + 25, 5)]
        sheet = sheets.grid(sheets.enlarged(rows), labels)
        report.save_image(sheet, Path(f"by_eye_{first // 25}.png"))
    readings, _ = judge.load(hub.toybox()).look(pictures)
    seen = list(csv.DictReader(FILE.read_text().splitlines()))
    for label, field in FIELDS.items():
        pairs = [
            (i, row[label], reading[field])
            for i, (row, reading) in enumerate(zip(seen, readings, strict=True))
            if row[label] != "?"
        ]
        for i, eye, read in pairs:
            if eye != read:
                print(f"{label} of {i}: {eye} by eye, {read} by the judge")
        agree = sum(eye == read for _, eye, read in pairs)
        print(f"{label}: the same in {agree} of {len(pairs)}")
