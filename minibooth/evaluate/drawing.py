"""The pictures that are scored: drawn once, kept as PNG files, only the missing ones drawn."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

from .. import pipeline, textual_inversion
from ..common import cli, sheets
from ..common.errors import UserError
from ..common.files import atomic
from ..common.pictures import read_image
from ..device import graphs
from ..formats import adapters, hypernetworks
from ..pipeline import StableDiffusion
from ..sample import slug
from ..training import snapshots
from ..upscaler import require_kind
from .metrics import Picture
from .options import Options, read_run

CELL = 160  # pixels of a picture in a grid


@dataclass(frozen=True)
class Job:
    """A picture to draw. Its noise comes from `seed`, as minibooth.sample's does."""

    file: Path
    prompt: str
    seed: int
    text: str | None = None  # what CLIP-T compares it with


def jobs(folder: Path, prompts: dict[str, str | None], count: int, seed: int) -> list[Job]:
    """`count` pictures for each prompt; prompts maps each to its text for CLIP-T.

    UserError: two prompts that would have files of the same name.
    """
    names: dict[str, str] = {}
    for prompt in prompts:
        other = names.setdefault(slug(prompt), prompt)
        if other != prompt:
            raise UserError(f"{prompt!r} and {other!r} are too alike to name files after them")
    return [
        Job(folder / f"{name}-{seed + i}.png", prompt, seed + i, prompts[prompt])
        for name, prompt in names.items()
        for i in range(count)
    ]


def load_model(source: str | Path, options: Options, base: str | None = None) -> StableDiffusion:
    """A model; or where `source` is a folder with a LoRA, a word or a hypernetwork, the model
    `base` with it, which is the one that the run in that folder trained if none is given. Raises
    UserError."""
    device, folder = cli.pick_device(options.device), Path(source)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    if (folder / "model_index.json").exists() or not snapshots.is_model(folder):
        sd = pipeline.load(source, device=device, dtype=dtype)
        require_kind(sd, str(source))
        return sd
    of_run = {}
    if base is None:
        run = read_run(folder)
        base, of_run = run.model, {"vae": run.vae, "prediction_type": run.prediction_type}
        of_run |= {"revision": run.revision, "ema": run.ema == "yes"}
    sd = pipeline.load(base, device=device, dtype=dtype, **of_run)
    require_kind(sd, str(base))
    if (folder / adapters.DIFFUSERS_LORA).exists():
        adapters.merge_files(sd.networks, [str(folder)])
    elif (folder / adapters.DIFFUSERS_EMBEDDING).exists():
        textual_inversion.add_word(sd, *adapters.read_embedding(folder))
    else:
        hypernetworks.attach_files(sd.unet, [str(folder)])
    return sd


def missing(wanted: list[Job]) -> bool:
    return not all(job.file.exists() for job in wanted)


def draw(sd: StableDiffusion, wanted: list[Job], options: Options, what: str) -> None:
    """Draw what is not there yet. Raises UserError for settings that the model cannot do."""
    size = options.batch_size
    # Whole batches, always the same ones: their rounding is that of an uninterrupted run.
    batches = [wanted[i : i + size] for i in range(0, len(wanted), size)]
    todo = [batch for batch in batches if missing(batch)]
    bar = tqdm(total=len(todo) * options.steps, desc=what, unit="step", disable=not todo)
    with bar, graphs.captured_unet(sd.unet):
        for batch in todo:
            shape = sd.latent_shape(len(batch), None, None, None)
            noises = [
                torch.randn(shape, generator=torch.Generator().manual_seed(job.seed))
                for job in batch
            ]
            images = sd.generate(
                [job.prompt for job in batch],
                steps=options.steps,
                guidance_scale=options.guidance_scale,
                latents=torch.stack(noises),
                batch_size=size,
                on_step=bar.update,
            )
            for job, image in zip(batch, images, strict=True):
                if not job.file.exists():
                    save(image, job, options)


def save(image: Image.Image, job: Job, options: Options) -> None:
    info = PngImagePlugin.PngInfo()
    about = {"prompt": job.prompt, "seed": job.seed, "steps": options.steps}
    for key, value in (about | {"guidance_scale": options.guidance_scale}).items():
        info.add_itxt(key, str(value))
    with atomic(job.file) as part:
        image.save(part, "PNG", pnginfo=info)


def pictures(drawn: list[Job]) -> list[Picture]:
    return [Picture(read_image(job.file), job.prompt, job.text) for job in drawn]


def without(identifier: str, prompt: str) -> str:
    """The prompt without that word: "a sks dog" → "a dog"."""
    return " ".join(re.sub(rf"(?<!\S){re.escape(identifier)}(?!\S)", "", prompt).split())


def grid(real: list[Image.Image], rows: dict[str, list[Image.Image]], title: str) -> Image.Image:
    """The photographs above, then a row of pictures per prompt."""
    cells = [
        [ImageOps.fit(image, (CELL, CELL)) for image in images] for images in (real, *rows.values())
    ]
    return sheets.grid(cells, labels=["photographs", *rows], title=title)
