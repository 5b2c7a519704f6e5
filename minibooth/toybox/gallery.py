"""python -m minibooth.toybox.gallery: what a subject can be put to, as in the paper's figures.

The toybox's dog after the default run: in new places, as a drawing, in other colours, wearing
something, from the other side. Last comes what fails, two things in one picture. Nothing is picked
out: the seeds are consecutive, every picture is shown, and the judge says what is in it.

No caption says which way a thing faces, so no prompt can ask for the other side. It is in the first
noise: mirrored, it should give the dog mirrored, as the photographs show it both ways. The judge
does not read that, but the pixels tell. A third side there is not: the world is flat.
"""

import csv
import hashlib
import io
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from .. import pipeline
from ..common import cli, sheets
from ..common.cli import option
from ..common.errors import UserError
from ..common.files import write_text
from ..common.pictures import to_pil
from ..formats import hub
from ..pipeline import StableDiffusion
from ..training import report
from . import default_run, score, world
from . import judge as judges
from .judge import Judge, self_similarity, similarity

HELD_OUT = [place for place in world.PLACES if place not in world.SEEN]
COLOURS = ("red", "purple")
OTHERS = 5  # other things of the class that a picture's likeness is compared with


@dataclass(frozen=True)
class GalleryConfig:
    model: str = option(
        "", "the folder of a default run; without one, that run is done first", place="path"
    )
    work_dir: str = option(
        "gallery-work", "where that run is kept, for the next time", place="path"
    )
    output_dir: str = option("docs", "where gallery.png and gallery.csv go", place="path")
    device: str = option("auto", "auto, cuda, mps or cpu")

    def check(self) -> None:
        """Raise UserError for settings that cannot work, before anything is loaded."""
        cli.check_folder("--work_dir", self.work_dir)
        cli.check_folder("--output_dir", self.output_dir)


@dataclass(frozen=True)
class Asked:
    """One picture."""

    prompt: str
    wanted: dict[str, str] = field(default_factory=dict)  # of Scene's fields; {}: not judged
    mirrored: bool = False  # its noise is that of the picture before, mirrored


@dataclass(frozen=True)
class Row:
    """Pictures of one kind, as the judge sees them."""

    name: str
    asked: list[Asked]
    pictures: Tensor  # (N, 3, 64, 64) in [-1, 1]
    instead: list[list[str]]  # of each what it shows instead of what was wanted
    classes: str  # that are read, each with the number of pictures
    likeness: float  # to the subject, as the world draws it with what was wanted
    others: float  # of other things of the class, drawn likewise

    @property
    def judged(self) -> int:
        return sum(bool(one.wanted) for one in self.asked)

    @property
    def as_asked(self) -> int:
        return self.judged - sum(map(bool, self.instead))


def prompts(subject: world.Subject) -> dict[str, list[Asked]]:
    """What is asked for: by row, eight pictures each."""
    name, bare = subject.instance_prompt, subject.instance_prompt.removeprefix("a ")

    def row(wanted: dict[str, dict[str, str]]) -> list[Asked]:
        one_each = [Asked(prompt, {"kind": subject.kind} | w) for prompt, w in wanted.items()]
        return [one for one in one_each for _ in range(8 // len(one_each))]

    placed = {f"{name} {p}": {"place": p} for p in HELD_OUT}
    drawn = {f"a drawing of {prompt}": w | {"style": "drawing"} for prompt, w in placed.items()}
    side = row(placed)
    side[::2] = [Asked(one.prompt) for one in side[::2]]
    side[1::2] = [replace(one, mirrored=True) for one in side[1::2]]
    return {
        "new places": row(placed),
        "another style": row(drawn),
        "another colour": row({f"a {c} {bare}": {"colour": c} for c in COLOURS}),
        "accessories": row({f"{name} wearing {a}": {"accessory": a} for a in world.ACCESSORIES}),
        "the other side": side,
        "two things": [Asked(f"{name} and a cat")] * 8,  # of which the judge can name but one
    }


# ---- drawing and measuring ---------------------------------------------------------------------


def default_model(config: GalleryConfig) -> Path:
    """The default run's result, trained if it is not there yet; one that was stopped goes on.

    Trained by its own command: a room imports no program. Raises UserError if that fails.
    """
    known = pipeline.load("toybox").fingerprint() + repr(default_run())
    folder = Path(config.work_dir) / f"run-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
    if (folder / "model_index.json").exists():
        return folder
    command = [sys.executable, "-m", "minibooth.train", "--output_dir", str(folder)]
    command += ["--device", config.device, "--resume_from_checkpoint", "latest"]
    # In a session of its own Ctrl-C comes to it from here alone. Twice would be too much: the
    # second one is obeyed before the state is saved.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if status:
        raise UserError(f"the default run ended with exit status {status}: it says above why")
    return folder


def noises(sd: StableDiffusion, asked: list[Asked]) -> Tensor:
    """Where the pictures begin: (N, 4, h, w), number i from the seed i."""
    shape, out = sd.latent_shape(1, None, None, None), []
    for i, one in enumerate(asked):
        g = torch.Generator().manual_seed(i)
        out.append(out[-1].flip(-1) if one.mirrored else torch.randn(shape, generator=g))
    return torch.stack(out)


def draw(sd: StableDiffusion, asked: list[Asked]) -> Tensor:
    """(N, 3, 64, 64) in [-1, 1]."""
    words = [one.prompt for one in asked]
    settings = score.SAMPLING | {"batch_size": score.BATCH, "output": "pt"}
    with tqdm(total=score.steps_to_draw(len(asked)), desc="gallery", unit="step") as bar:
        drawn = sd.generate(words, latents=noises(sd, asked), on_step=bar.update, **settings)
    return 2 * drawn.cpu() - 1


def is_mirrored(picture: Tensor, before: Tensor) -> bool:
    """Whether a picture is nearer to the other's mirror image than to the other; (3, H, W) each."""
    return bool((picture - before.flip(-1)).square().mean() < (picture - before).square().mean())


def measure(
    judge: Judge, name: str, asked: list[Asked], pictures: Tensor, subject: world.Subject
) -> Row:
    """`pictures`, (N, 3, 64, 64) in [-1, 1], were drawn for `asked`."""
    readings, drawn = judge.look(pictures)
    r, instead, own, others = random.Random("others"), [], [], []
    for i, (one, reading) in enumerate(zip(asked, readings, strict=True)):
        wrong = [key for key, value in one.wanted.items() if reading[key] != value]
        instead.append([str(reading[key] or "nothing worn") for key in wrong])
        if one.mirrored and not is_mirrored(pictures[i], pictures[i - 1]):
            instead[-1].append("facing as before")
        scenes = [replace(scene, **one.wanted) for scene in subject.scenes]
        given = {"kind": subject.kind} | one.wanted
        scenes += [world.random_scene(r, **given) for _ in range(OTHERS)]
        _, e = judge.look(judges.to_tensor([world.render(scene) for scene in scenes]))
        truth, other = e.split([len(subject.scenes), OTHERS])
        own.append(similarity(drawn[i : i + 1], truth))
        others.append(similarity(other, truth))
    classes = Counter(reading["kind"] for reading in readings).most_common()
    read = ", ".join(f"{count} {kind}" for kind, count in classes)
    return Row(name, asked, pictures, instead, read, mean(own), mean(others))


def run(config: GalleryConfig) -> str:
    """Draw and measure every row, write gallery.png and gallery.csv; returns the table."""
    config.check()
    device, folder = cli.pick_device(config.device), Path(config.output_dir)
    sd = pipeline.load(config.model or default_model(config), device=device)
    if sd.image_size != world.SIDE:
        raise UserError(f"{config.model} is no toybox: it draws {sd.image_size} pixels a side")
    shown = Path(default_run()["instance_data_dir"])
    subject, judge = world.SUBJECTS[shown.name], judges.load(hub.toybox())
    wanted = prompts(subject)
    drawn = draw(sd, [one for asked in wanted.values() for one in asked])
    parts = drawn.split([len(asked) for asked in wanted.values()])
    rows = [
        measure(judge, name, asked, part, subject)
        for (name, asked), part in zip(wanted.items(), parts, strict=True)
    ]
    sheet = figure(rows, score.photographs(shown), judge, subject.kind)
    report.save_image(sheet, folder / "gallery.png")
    lines, buffer = table(rows), io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    write_text(folder / "gallery.csv", buffer.getvalue())
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- what is shown -----------------------------------------------------------------------------

COLUMNS = ("row", "pictures", "judged", "as asked", "classes read", "likeness", "of others")


def table(rows: list[Row]) -> list[list[str]]:
    lines = [list(COLUMNS)]
    for row in rows:
        counts = [len(row.asked), row.judged, row.as_asked if row.judged else ""]
        numbers = [f"{row.likeness:.2f}", f"{row.others:.2f}"]
        lines.append([row.name, *map(str, counts), row.classes, *numbers])
    return lines


def figure(rows: list[Row], real: Tensor, judge: Judge, noun: str) -> Image.Image:
    """The photographs, `real` (P, 3, 64, 64), then a strip a row; a red frame is a miss."""
    alike = self_similarity(judge.look(real)[1])
    title = (
        f"The photographs. Likeness to each other {alike:.2f}. Below is every picture that was "
        "drawn, framed where it is not as asked for, with what the judge reads instead."
    )
    strips = [strip(real, title, [""] * len(real), [[]] * len(real))]
    for row in rows:
        said = f"{row.as_asked} of {row.judged} are as asked for"
        if not row.judged:
            said = f"no picture of this world has two. The judge names one, and reads {row.classes}"
        title = f"{row.name.capitalize()}: {said}. Likeness to the subject {row.likeness:.2f}"
        title += f" (of any {noun} {row.others:.2f})."
        headings = ["its noise mirrored" if one.mirrored else one.prompt for one in row.asked]
        strips.append(strip(row.pictures, title, headings, row.instead))
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    y = 0
    for part in strips:
        sheet.paste(part, (0, y))
        y += part.height
    return sheet


def strip(
    pictures: Tensor, title: str, headings: list[str], instead: list[list[str]]
) -> Image.Image:
    """(N, 3, 64, 64) in a line, what was asked for above each, and what is there instead."""
    [shown] = sheets.enlarged([to_pil(pictures)])
    for image, wrong in zip(shown, instead, strict=True):
        if wrong:
            box = (0, 0, image.width - 1, image.height - 1)
            ImageDraw.Draw(image).rectangle(box, outline="#dd0000", width=5)
    said = [", but ".join([h, *wrong]) for h, wrong in zip(headings, instead, strict=True)]
    return sheets.grid([shown], headings=said, title=title)


def main() -> None:
    config = cli.parse(
        GalleryConfig,
        "minibooth.toybox.gallery",
        "The toybox's dog as in the paper's figures: new places, style, colour, accessories.",
    )
    print(run(config))
    print(f"done: {config.output_dir}/gallery.png, gallery.csv")


if __name__ == "__main__":
    stopped = "stopped: the same command goes on from there"
    cli.run("minibooth.toybox.gallery", main, stopped)
