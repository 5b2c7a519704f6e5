"""python -m minibooth.evaluate snapshots: when to stop.

With more steps the subject gets more like itself, and in the end every dog does. The metrics of
every snapshot of a run, as a curve, show where the one still pays for the other.
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ..common import cli
from ..common.cli import option
from ..common.errors import UserError
from ..common.pictures import read_image
from ..training import photos, report, resume, snapshots
from ..training.settings import TrainConfig
from . import drawing, judges, tables
from .metrics import METRICS, Mean, real_rows, score
from .options import Options, read_run
from .single import text_of

WHERE = ("", " in the snow", " on the beach", " at night")
COLOURS = {
    "DINO": (204, 85, 0),
    "CLIP-I": (220, 160, 60),
    "CLIP-T": (0, 130, 100),
    "PRES": (0, 90, 181),
    "DIV": (130, 60, 160),
}


@dataclass(frozen=True)
class SnapshotsConfig(Options):
    run: str | None = option(
        None,
        "the folder of a run: output_dir of minibooth.train",
        place="path",
        topic="what is evaluated",
    )
    prompt: tuple[str, ...] = option(
        (),
        "what to draw, several times for several [the subject, alone and in three places]",
        empty=True,
    )
    output_dir: str | None = option(
        None, "where pictures and curve go [<run>/evaluation]", place="path"
    )


def evaluate(config: SnapshotsConfig) -> dict[int, dict[str, Mean]]:
    """Score the model before the run, every snapshot and the result; step → metrics.

    Writes curve.png and curve.csv. Pictures that are there are not drawn again. Raises UserError.
    """
    config.check()
    if config.run is None:
        raise UserError("give --run: the folder of a run, with config.json and checkpoint-…/")
    run, training = Path(config.run), read_run(Path(config.run))
    if training.concepts_list:
        raise UserError(f"{run} has several subjects: measure each by minibooth.evaluate --model")
    out = Path(config.output_dir) if config.output_dir else run / "evaluation"
    cli.check_folder("--output_dir", out)
    prompts = config.prompt or tuple(training.instance_prompt + where for where in WHERE)
    real = [read_image(f) for f in photos.image_files(training.instance_data_dir)]
    models = stages(run, training)
    judge = judges.load(config)
    drawn_with = {name: getattr(config, name) for name in ("steps", "guidance_scale", "seed")}
    names = ("model", "instance_prompt", "class_prompt", "learning_rate", "prior_loss_weight")
    resume.remember(out, drawn_with | {name: getattr(training, name) for name in names})
    texts = {prompt: text_of(prompt, config) for prompt in prompts}
    of_class = {training.class_prompt: None} if training.class_prompt else {}
    scores = {}
    for step, source in tqdm(models.items(), desc="snapshots", unit="snapshot"):
        folder = out / f"step-{step:05d}"
        wanted = drawing.jobs(folder / "pictures", texts, config.images, config.seed)
        bare = drawing.jobs(folder / "class", of_class, config.class_images, config.seed)
        if drawing.missing(wanted + bare):
            sd = drawing.load_model(source, config, training.model)
            drawing.draw(sd, wanted + bare, config, f"drawing step {step}")
        of_class_images = [p.image for p in drawing.pictures(bare)]
        scores[step] = score(judge, real, drawing.pictures(wanted), of_class_images)
    ceiling = real_rows(judge, real, [False])[False]
    columns = ("step", *METRICS)
    tables.write_csv(
        out / "curve.csv", columns, [(step, *tables.values(s)) for step, s in scores.items()]
    )
    report.save_image(curve(scores, ceiling), out / "curve.png")
    rows = [
        (f"step {step}", {metric: mean.value for metric, mean in s.items()}, {})
        for step, s in scores.items()
    ]
    print(tables.markdown(METRICS, rows))
    print("\n".join([*tables.stated(config, judge), tables.drawn_with(config)]))
    print(
        f"{out / 'curve.png'}: stop where DINO (the subject) no longer rises much and PRES (the "
        "class becoming the subject) has not risen far above step 0"
    )
    return scores


def stages(run: Path, training: TrainConfig) -> dict[int, Path | str]:
    """Step → model: the base model, the snapshots, the result. Raises UserError without any."""
    found = {int(f.name.removeprefix("checkpoint-")): f for f in snapshots.found(run)}
    if snapshots.is_model(run):
        found[training.max_train_steps] = run
    if not found:
        raise UserError(f"{run} holds neither a snapshot (checkpoint-…/) nor a finished model")
    base = {0: training.model} if training.model else {}  # a run from Python may name none
    return base | found


def curve(scores: dict[int, dict[str, Mean]], ceiling: dict[str, Mean]) -> Image.Image:
    """All metrics over the steps, on an axis from 0 to 1; dashed, DINO among the photographs."""
    width, height, left, right, top, bottom = 960, 480, 60, 100, 30, 50
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    last = max(*scores, 1)

    def at(step: float, value: float) -> tuple[float, float]:
        x = left + step / last * (width - left - right)
        return x, height - bottom - min(max(value, 0.0), 1.0) * (height - top - bottom)

    for i in range(6):
        (x0, y), (x1, _) = at(0, i / 5), at(last, i / 5)
        draw.line([(x0, y), (x1, y)], fill=(225, 225, 225))
        draw.text((left - 8, y), f"{i / 5:.1f}", "black", font, anchor="rm")
    for step in scores:
        draw.text((at(step, 0)[0], height - bottom + 8), str(step), "black", font, anchor="ma")
    draw.text((width - right, height - 20), "step", "black", font, anchor="ra")
    if "DINO" in ceiling:
        x0, y = at(0, ceiling["DINO"].value)
        for x in range(int(x0), width - right, 12):
            draw.line([(x, y), (x + 6, y)], fill=COLOURS["DINO"])
        text = "DINO of the photographs among themselves"
        draw.text((x0 + 8, y - 4), text, COLOURS["DINO"], font, anchor="ls")
    names = []
    for metric in METRICS:
        points = [at(step, s[metric].value) for step, s in scores.items() if metric in s]
        if points:
            draw.line(points, fill=COLOURS[metric], width=3)
            for x, y in points:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), COLOURS[metric])
            names.append((points[-1][1], metric))
    below = 0.0
    for y, metric in sorted(names):  # beside the ends of the curves, one below the other
        below = max(y, below + 18)
        draw.text((width - right + 12, below), metric, COLOURS[metric], font, anchor="lm")
    return image
