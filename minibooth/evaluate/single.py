"""python -m minibooth.evaluate: the metrics of one subject, from pictures or a model of it."""

from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from ..common import cli
from ..common.cli import option
from ..common.errors import UserError
from ..common.files import write_json
from ..common.pictures import read_image
from ..training import photos, report, resume, snapshots
from . import drawing, judges, tables
from .metrics import METRICS, Mean, Picture, real_rows, score
from .options import Options

OVERVIEW = "grid.png"  # minibooth.sample's, beside the pictures that it shows


@dataclass(frozen=True)
class SingleConfig(Options):
    real: str | None = option(
        None,
        "folder with the photographs of the subject",
        place="path",
        topic="what is evaluated",
    )
    generated: str | None = option(
        None,
        "folder of pictures, as minibooth.sample draws them; or a model to draw them with",
        place="source",
    )
    prompt: tuple[str, ...] = option(
        (),
        "what to draw, several times for several; or what a folder's pictures were drawn for, "
        "where they do not say it themselves",
        empty=True,
    )
    class_prompt: str | None = option(None, 'the bare class, "a dog", for PRES')
    output_dir: str = option(
        "evaluation", "where scores.json and a model's pictures go", place="path"
    )


def evaluate(config: SingleConfig) -> dict[str, Mean]:
    """Measure, print and write the metrics of one subject. Raises UserError."""
    config.check()
    if config.real is None or config.generated is None:
        raise UserError(
            "give --real (the photographs) and --generated (pictures or a model), or one of the "
            "commands dataset and snapshots"
        )
    cli.check_folder("--output_dir", config.output_dir)
    out, files = Path(config.output_dir), photos.image_files(config.real)
    is_folder_of_pictures = Path(config.generated).is_dir() and not snapshots.is_model(
        Path(config.generated)
    )
    judge = judges.load(config)
    real = [read_image(file) for file in files]
    find = found if is_folder_of_pictures else drawn
    pictures, bare = find(config, out)
    scores = score(judge, real, pictures, bare)
    rows = real_rows(judge, real, config.self_pair_choices)
    write_json(
        out / "scores.json",
        {
            "scores": {metric: asdict(mean) for metric, mean in scores.items()},
            "real": {
                tables.real_name(k): {m: asdict(mean) for m, mean in row.items()}
                for k, row in rows.items()
            },
            "stated": tables.stated(config, judge),
        },
    )
    print(f"{len(real)} photographs, {len(pictures)} pictures, {len(bare)} of the bare class")
    for metric in METRICS:
        if metric in scores:
            mean = scores[metric]
            print(f"{metric:6} {mean.value:.3f}  (mean of {mean.pairs})")
    for self_pairs, row in rows.items():
        among = ", ".join(f"{metric} {mean.value:.3f}" for metric, mean in row.items())
        print(f"{tables.real_name(self_pairs)}: {among or 'none'}")
    print("\n".join(tables.stated(config, judge)))
    if not is_folder_of_pictures:
        print(tables.drawn_with(config))
    if "PRES" not in scores and "dino" not in judge.missing:
        print('PRES left out: no picture of the bare class; give --class_prompt "a dog"')
    if "CLIP-T" not in scores and "clip" not in judge.missing:
        print("CLIP-T left out: the pictures do not say what they were drawn for; give --prompt")
    if "DIV" not in scores and "lpips" not in judge.missing:
        print("DIV left out: no two pictures of one prompt")
    return scores


def found(config: SingleConfig, out: Path) -> tuple[list[Picture], list[Image.Image]]:
    """The pictures in the folder, and those of the bare class among them.

    A picture says in its metadata what it was drawn for, as minibooth.sample writes it.
    """
    if len(config.prompt) > 1:
        raise UserError(
            "--generated is a folder of pictures: they are of one --prompt, or each says its own"
        )
    pictures, bare = [], []
    for file in photos.image_files(config.generated):
        if file.name == OVERVIEW:
            continue
        with Image.open(file) as image:
            says = {"prompt", "seed"} <= image.info.keys()  # others keep a workflow under "prompt"
            known = config.prompt[0] if config.prompt else None
            prompt = image.info["prompt"] if says else known
        if prompt is not None and prompt == config.class_prompt:
            bare.append(read_image(file))
        else:
            text = prompt and text_of(prompt, config)
            pictures.append(Picture(read_image(file), prompt, text))
    if not pictures:
        raise UserError(f"{config.generated} holds pictures of the bare class only")
    return pictures, bare


def drawn(config: SingleConfig, out: Path) -> tuple[list[Picture], list[Image.Image]]:
    """The pictures of the model, which are drawn if they are not there, and their grid.png."""
    if not config.prompt:
        raise UserError('--generated is a model: give --prompt, say "a sks dog in the snow"')
    prompts = {prompt: text_of(prompt, config) for prompt in config.prompt}
    wanted = drawing.jobs(out / "pictures", prompts, config.images, config.seed)
    of_class = {config.class_prompt: None} if config.class_prompt else {}
    bare = drawing.jobs(out / "class", of_class, config.class_images, config.seed)
    sd = drawing.load_model(config.generated, config)
    drawn_with = {name: getattr(config, name) for name in ("steps", "guidance_scale", "seed")}
    resume.remember(out, {"model": sd.fingerprint()[:16], **drawn_with})
    drawing.draw(sd, wanted + bare, config, "drawing")
    pictures = drawing.pictures(wanted)
    rows = {prompt: [p.image for p in pictures if p.prompt == prompt] for prompt in config.prompt}
    real = [read_image(file) for file in photos.image_files(config.real)]
    report.save_image(drawing.grid(real, rows, config.generated), out / "grid.png")
    return pictures, [p.image for p in drawing.pictures(bare)]


def text_of(prompt: str, config: Options) -> str:
    """What CLIP-T compares a picture of this prompt with."""
    return prompt if config.identifier_in_text else drawing.without(config.identifier, prompt)
