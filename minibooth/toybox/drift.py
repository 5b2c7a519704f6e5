"""python -m minibooth.toybox.drift: what prior preservation is for, shown on the toybox.

The paper's claim (section 3.2 and supplement, Tables 3 and 4): fine-tuned on a few pictures alone,
a model forgets what else its class noun means; the second term of Eq. 2 prevents that. The same
subject is learned with and without that term, and the results are measured and drawn.
"""

import copy
import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from .. import dreambooth, pipeline
from ..common import cli, sheets
from ..common.cli import option
from ..common.errors import UserError
from ..common.files import write_json, write_text
from ..formats import hub
from ..pipeline import StableDiffusion
from ..training import class_images, photos, report, resume
from ..training.data import Latents, draw_term, encode
from ..training.optimizer import Update, rate
from ..training.settings import TrainConfig
from ..training.subjects import Subject
from . import judge as judges
from . import score, world
from .score import Kept, Learned, Yardstick

# Fixed before the first run. Distances are counted from the frozen model (0) to the photographs'
# own likeness to each other (1).
BOUND = 0.6  # the subject is learned: fidelity in held-out places is this far from floor to ceiling
KEPT_PRES, LOST_PRES = 0.25, 0.5  # the class is kept up to here, lost from there
KEPT_DIV, LOST_DIV = 0.8, 0.5  # of the frozen model's diversity
KEPT_VALIDITY = 0.05  # below the frozen model's

PER_PLACE, OF_CLASS = 3, 24  # pictures of each run that are measured
SHOWN = 5  # pictures of the class in the figure


@dataclass(frozen=True)
class DriftConfig:
    output_dir: str = option("drift", "where table, figure and results go", place="path")
    subject: str = option("spotted_dog", "what is learned", choices=tuple(world.SUBJECTS))
    seeds: int = option(3, "runs of each arm")
    arms: str | None = option(
        None,
        'only these, each by its λ: "0,1" is the contrast alone [0 and 1, a control of twice the '
        "batch, and two prompts without the right class noun]",
    )
    steps: int = option(200, "updates")
    learning_rate: float = option(7e-4, "of the UNet, falling to 0 along a cosine")
    batch_size: int = option(4, "pictures per update, and as many class images")
    num_class_images: int = option(96, "drawn by the frozen model")
    wrong_noun: str = option("car", "of the class-noun ablation", choices=world.CLASSES)
    device: str = option("auto", "auto, cuda, mps or cpu")

    def check(self) -> None:
        """Raise UserError for settings that cannot work, before anything is loaded."""
        cli.check_choices(self)
        cli.check_at_least_one(self, ("seeds", "steps", "batch_size", "num_class_images"))
        cli.check_folder("--output_dir", self.output_dir)
        _ = self.weights

    @property
    def weights(self) -> list[float] | None:
        """The λ that --arms asks for, if it is given."""
        if self.arms is None:
            return None
        found = cli.numbers("--arms", self.arms, float)
        if not found or not all(0 <= weight < math.inf for weight in found):
            raise UserError(
                f"--arms {self.arms!r}: give numbers from 0 up with commas between, say 0,1"
            )
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Arm:
    """One way to train, or not to."""

    name: str
    prior_loss_weight: float
    batch_size: int
    instance_prompt: str
    trains: bool = True
    seeds: int | None = None  # fewer than the others


@dataclass(frozen=True)
class Result:
    arm: str
    seed: int
    learned: Learned
    kept: Kept


def arms(config: DriftConfig) -> list[Arm]:
    """The frozen model, the two sides of the claim, a control, and the class-noun ablation; or the
    frozen model and the λ that were asked for."""
    subject, b = world.SUBJECTS[config.subject], config.batch_size
    name = subject.instance_prompt
    identifier = name.split()[1]
    frozen = Arm("frozen", 0.0, b, name, trains=False)
    if config.weights is not None:
        return [frozen, *(Arm(f"λ = {weight:g}", weight, b, name) for weight in config.weights)]
    return [
        frozen,
        Arm("λ = 0", 0.0, b, name),
        # The prior doubles the batch; so does this.
        Arm(f"λ = 0, batch {2 * b}", 0.0, 2 * b, name),
        Arm("λ = 1", 1.0, b, name),
        Arm("λ = 0, no noun", 0.0, b, f"a {identifier}", seeds=1),
        Arm("λ = 0, wrong noun", 0.0, b, f"a {identifier} {config.wrong_noun}", seeds=1),
    ]


# ---- training and measuring --------------------------------------------------------------------


def finetune(
    frozen: StableDiffusion,
    arm: Arm,
    instance: Latents,
    prior: Latents,
    class_prompt: str,
    config: DriftConfig,
    seed: int,
    on_step: Callable[[], None],
) -> StableDiffusion:
    """A whole DreamBooth without anything around it; `frozen` stays as it is."""
    unet = copy.deepcopy(frozen.unet).requires_grad_(True)
    groups = [(config.learning_rate, list(unet.parameters()))]
    update = Update(groups, weight_decay=1e-2, max_grad_norm=1.0, scaled=False)
    c, c_prior = frozen.encode_prompt([arm.instance_prompt, class_prompt]).split(1)  # (1, 77, D)
    for n in range(config.steps):
        shared = (frozen.schedule.T, seed)
        terms = [draw_term(instance, c, *shared, "instance", n, arm.batch_size)]
        if arm.prior_loss_weight > 0:
            terms.append(draw_term(prior, c_prior, *shared, "class", n, arm.batch_size))
        prior_term = terms[1] if len(terms) == 2 else None
        result = dreambooth.step(unet, frozen.schedule, terms[0], prior_term, arm.prior_loss_weight)
        result.loss.backward()
        update.apply(n + 1, result.loss.detach(), rate(n + 1, config.steps))
        on_step()
    if update.bad_step >= 0:
        raise UserError(f"{arm.name}: step {int(update.bad_step)} is not finite; lower the rate")
    return StableDiffusion(
        frozen.tokenizer,
        frozen.text_encoder,
        frozen.vae,
        unet.requires_grad_(False),
        frozen.schedule,
        frozen.configs,
    )


class Experiment:
    """Everything the arms share, and their results, each kept in a file as soon as it is there."""

    def __init__(self, config: DriftConfig):
        self.config, self.folder = config, Path(config.output_dir)
        self.subject = world.SUBJECTS[config.subject]
        toybox = hub.toybox()
        self.judge = judges.load(toybox)
        self.frozen = pipeline.load("toybox", device=cli.pick_device(config.device))
        for network in self.frozen.networks.values():
            network.requires_grad_(False)
        resume.remember(self.folder, self.identity())
        pictures = photos.load_photos(toybox / "subjects" / config.subject, world.SIDE)
        self.real = pictures.images
        self.yard = score.yardstick(self.judge, self.real, self.subject.kind)
        drawn = class_images.ensure(self.frozen, self.wanted_images())
        self.instance = encode(self.frozen, pictures, False, "pictures")
        self.prior = encode(
            self.frozen, photos.load_photos(drawn, world.SIDE), False, "class images"
        )

    def wanted_images(self) -> class_images.Images:
        settings = {f"class_{name}": value for name, value in score.SAMPLING.items()}
        settings |= {"num_class_images": self.config.num_class_images}
        run = TrainConfig(output_dir=str(self.folder), sample_batch_size=score.BATCH, **settings)
        subject = Subject(None, None, self.subject.class_prompt)
        return class_images.find(run, subject, world.SIDE, self.frozen.fingerprint())

    def identity(self) -> dict:
        kept = ("subject", "steps", "learning_rate", "batch_size")
        kept += ("num_class_images", "wrong_noun")
        return {key: getattr(self.config, key) for key in kept}

    def file(self, arm: Arm, seed: int) -> Path:
        name = "".join(c if c.isalnum() else "-" for c in arm.name)
        return self.folder / "results" / f"{name}-{seed}.json"

    def result(self, arm: Arm, seed: int, on_step: Callable[[], None]) -> Result:
        """Train and measure, or read what was measured before."""
        file, noun = self.file(arm, seed), self.subject.kind
        if file.exists():
            kept = json.loads(file.read_text())
            return Result(arm.name, seed, Learned(**kept["learned"]), Kept(**kept["kept"]))
        sd, where = self.frozen, score.places(PER_PLACE)
        if arm.trains:
            sd = finetune(
                *(sd, arm, self.instance, self.prior, self.subject.class_prompt, self.config),
                *(seed, on_step),
            )
        prompts = [f"{arm.instance_prompt} {place}" for place in where]
        prompts += [self.subject.class_prompt] * OF_CLASS
        pictures = score.draw(sd, prompts, 10_000 * (seed + 1), on_step)
        subject, others = pictures.split([len(where), OF_CLASS])
        found = Result(
            arm.name,
            seed,
            score.learned(self.judge, subject, where, self.real, noun),
            score.kept(self.judge, others, self.real, noun),
        )
        if seed == 0:
            shown = torch.cat([others[:SHOWN], subject[::PER_PLACE]])
            strip = (torch.cat([*shown], dim=2) * 127.5 + 127.5).clamp(0, 255).round()
            picture = Image.fromarray(strip.permute(1, 2, 0).to(torch.uint8).numpy())
            report.save_image(picture, file.with_suffix(".png"))
        write_json(file, asdict(found))
        return found


def run(config: DriftConfig) -> str:
    """Run what is not there yet, write table and figure, and say what happened."""
    config.check()
    experiment, chosen = Experiment(config), arms(config)
    todo = [
        (arm, seed)
        for arm in chosen
        for seed in range(arm.seeds or config.seeds)
        if not experiment.file(arm, seed).exists()
    ]
    drawing = score.steps_to_draw(PER_PLACE * len(world.PLACES) + OF_CLASS)
    total = sum(drawing + config.steps * arm.trains for arm, _ in todo)
    with tqdm(total=total, desc="drift", unit="step") as bar:
        results = {
            arm.name: [
                experiment.result(arm, seed, bar.update)
                for seed in range(arm.seeds or config.seeds)
            ]
            for arm in chosen
        }
    words = verdict(results, experiment.yard)
    write_text(experiment.folder / "drift.csv", table_csv(results))
    write_text(experiment.folder / "drift.md", table_markdown(results, experiment.yard, words))
    strips = [Image.open(experiment.file(arm, 0).with_suffix(".png")) for arm in chosen]
    report.save_image(figure(strips, results, experiment), experiment.folder / "drift.png")
    return words


# ---- what happened -----------------------------------------------------------------------------


def verdict(results: dict[str, list[Result]], yard: Yardstick) -> str:
    """Whether the claim holds, seed by seed, against the margins above; of arms that are not there
    nothing is said."""
    frozen = results["frozen"]

    def learned(r: Result) -> bool:
        return r.learned.fidelity_held_out >= yard.floor + BOUND * (yard.ceiling - yard.floor)

    def pres(r: Result) -> float:
        """0: as the frozen model with this seed; 1: as the photographs among themselves."""
        start = frozen[r.seed].kept.pres
        return (r.kept.pres - start) / (yard.ceiling - start)

    def keeps(r: Result) -> bool:
        before = frozen[r.seed].kept
        return (
            pres(r) <= KEPT_PRES
            and r.kept.div >= KEPT_DIV * before.div
            and r.kept.validity >= before.validity - KEPT_VALIDITY
        )

    def loses(r: Result) -> bool:
        return pres(r) >= LOST_PRES or r.kept.div <= LOST_DIV * frozen[r.seed].kept.div

    lines = []
    for name, runs in results.items():
        if name == "frozen":
            continue
        n = len(runs)
        lines.append(
            f"{name}: the subject is learned in {sum(map(learned, runs))} of {n} runs; the class "
            f"is kept in {sum(map(keeps, runs))} and lost in {sum(map(loses, runs))} of {n}"
        )
    if not {"λ = 0", "λ = 1"} <= results.keys():
        return "\n".join(lines)
    control = any(name.startswith("λ = 0, batch") for name in results)
    without = [r for runs in results.values() for r in runs if r.arm == "λ = 0" or "batch" in r.arm]
    holds = all(learned(r) and keeps(r) for r in results["λ = 1"])
    holds = holds and all(learned(r) and loses(r) for r in without)
    lines.append(
        "The claim holds: with λ = 1 the class is kept on every seed, with λ = 0 it is lost on "
        f"every seed,{' also at the same total batch,' if control else ''} and both learn the "
        "subject."
        if holds
        else "The claim does not hold on every seed by the margins fixed beforehand."
    )
    return "\n".join(lines)


COLUMNS = {  # heading → the number of a result
    "subject fidelity, seen places": lambda r: r.learned.fidelity_seen,
    "subject fidelity, held out": lambda r: r.learned.fidelity_held_out,
    "prompt fidelity, seen places": lambda r: r.learned.prompt_seen,
    "prompt fidelity, held out": lambda r: r.learned.prompt_held_out,
    "PRES": lambda r: r.kept.pres,
    "class validity": lambda r: r.kept.validity,
    "DIV": lambda r: r.kept.div,
    "nearest picture": lambda r: r.learned.nearest,
}


def table_csv(results: dict[str, list[Result]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["arm", "seed", *COLUMNS])
    for runs in results.values():
        for r in runs:
            writer.writerow([r.arm, r.seed, *(f"{number(r):.4f}" for number in COLUMNS.values())])
    return buffer.getvalue()


def table_markdown(results: dict[str, list[Result]], yard: Yardstick, words: str) -> str:
    """Means over the seeds, with the smallest and largest."""
    rows = [["", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for name, runs in results.items():
        cells = []
        for number in COLUMNS.values():
            values = sorted(number(r) for r in runs)
            spread = f" ({values[0]:.2f}–{values[-1]:.2f})" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}")
        rows.append([name, *cells])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"{table}\n\nOther things of the class, rendered, against the photographs (floor): "
        f"{yard.floor:.2f}; the photographs among themselves (ceiling): {yard.ceiling:.2f}; DIV of "
        f"rendered things: {yard.div:.2f}.\n\n" + words.replace("\n", "\n\n") + "\n"
    )


def figure(
    strips: list[Image.Image], results: dict[str, list[Result]], experiment: Experiment
) -> Image.Image:
    """A row per arm: pictures of its first seed, and every seed's numbers as dots."""
    side, subject = world.SIDE, experiment.subject
    rows = [
        [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)]
        for strip in strips
    ]
    places = [place.split()[-1] for place in world.PLACES]
    headings = [subject.class_prompt] * SHOWN + [f"the subject: {p}" for p in places]
    names = [name.replace("λ", "lambda") for name in results]  # Pillow's font has no Greek
    pictures = sheets.grid(sheets.enlarged(rows), labels=names, headings=headings)
    measures = {k: COLUMNS[k] for k in ("subject fidelity, held out", "PRES", "DIV")}
    width, line, top = pictures.width, 22, 34
    panel = Image.new("RGB", (width, top + line * len(results) + 30), "white")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(13)
    left, each = 170, (width - 190) // len(measures)
    for column, (title, number) in enumerate(measures.items()):
        x0, span = left + column * each, each - 50
        values = [number(r) for runs in results.values() for r in runs] + [0.0, 1.0]
        low, high = min(values), max(values)
        draw.text((x0, 8), title, "#333333", font)
        for row, (name, runs) in enumerate(zip(names, results.values(), strict=True)):
            y = top + line * (row + 0.5)
            draw.line((x0, y, x0 + span, y), "#dddddd")
            if column == 0:
                draw.text((left - 12, y), name, "#333333", font, "rm")
            for r in runs:
                x = x0 + span * (number(r) - low) / (high - low)
                colour = "#0059b5" if "1" in name else "#777777" if name == "frozen" else "#cc5500"
                draw.ellipse((x - 5, y - 5, x + 5, y + 5), colour)
        for value in (0.0, 0.5, 1.0):
            x = x0 + span * (value - low) / (high - low)
            draw.text((x, panel.height - 14), f"{value:g}", "#777777", font, "mm")
    sheet = Image.new("RGB", (width, pictures.height + panel.height), "white")
    sheet.paste(pictures, (0, 0))
    sheet.paste(panel, (0, pictures.height))
    return sheet


def main() -> None:
    config = cli.parse(
        DriftConfig,
        "minibooth.toybox.drift",
        "What prior preservation is for: the same subject learned with and without it.",
    )
    print(run(config))
    print(f"done: {config.output_dir}/drift.png, drift.md, drift.csv")


if __name__ == "__main__":
    cli.run("minibooth.toybox.drift", main)
