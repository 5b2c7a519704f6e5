"""x_pr of Eq. 2: pictures of the class, drawn by the model before it is trained.

Each is kept as a PNG whose name holds a key of everything that it depends on, and its index. So
only the missing ones are drawn, none is overwritten, and one folder serves many runs.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from ..common import cli
from ..common.errors import UserError
from ..common.files import atomic
from ..device import ranks
from ..pipeline import StableDiffusion
from . import photos
from .settings import TrainConfig
from .subjects import Subject


class Images(NamedTuple):
    """The class images of some settings, there or not."""

    own: list[Path]  # the user's
    drawn: list[Path]  # with image i from seed + i
    missing: list[int]  # where this rank's batches of these begin that are not all there
    batch_size: int
    settings: dict  # that the drawn ones depend on, and have in them

    def batch(self, first: int) -> list[Path]:
        return self.drawn[first : first + self.batch_size]


def of_run(
    sd: StableDiffusion, config: TrainConfig, resolution: int, fingerprint: str
) -> tuple[list[Path], Tensor]:
    """As `ensure`, of all subjects of a run; and which subject's each class image is: (M,)."""
    found = [
        (i, file)
        for i, subject in enumerate(config.subjects)
        for file in ensure(
            sd,
            **settings_of(config, subject, resolution, fingerprint),
            begin=zlib.crc32(config.output_dir.encode()),
        )
    ]
    return [file for _, file in found], torch.tensor([i for i, _ in found])


def missing_of_run(
    sd: StableDiffusion, config: TrainConfig, resolution: int, fingerprint: str
) -> list[int]:
    """How many pictures are in each batch that `of_run` is going to draw."""
    subjects = (settings_of(config, s, resolution, fingerprint) for s in config.subjects)
    found = [find(sd, **settings) for settings in subjects]
    return [len(images.batch(first)) for images in found for first in images.missing]


def there(folder: str | Path) -> list[Path]:
    """The pictures in it; none where it is not there yet."""
    try:
        return photos.image_files(folder)
    except UserError:
        return []


def check_folder(folder: str | Path, count: int) -> None:
    """Raise UserError where class images are to be drawn into a folder that cannot hold them."""
    if len(there(folder)) < count:
        cli.check_folder("--class_data_dir", folder)


def settings_of(config: TrainConfig, subject: Subject, resolution: int, fingerprint: str) -> dict:
    """What `find` and `ensure` are asked for."""
    return {
        "folder": subject.class_folder(config.output_dir),
        "count": config.num_class_images,
        "prompt": subject.class_prompt,
        "sampler": config.class_sampler,
        "steps": config.class_steps,
        "guidance_scale": config.class_guidance_scale,
        "seed": config.seed,
        "resolution": resolution,
        "batch_size": config.sample_batch_size,
        "fingerprint": fingerprint,
    }


def find(
    sd: StableDiffusion,
    folder: Path,
    *,
    count: int,
    prompt: str,
    sampler: str,
    steps: int,
    guidance_scale: float,
    seed: int,
    resolution: int,
    batch_size: int,
    fingerprint: str | None = None,
) -> Images:
    """The user's own class images in `folder`, all of them, and as many drawn ones as bring the
    number to `count`. `fingerprint`: the model's, where its weights have been rounded since."""
    own = photos.own(folder)
    settings = {
        "model": fingerprint or sd.fingerprint(),
        "prompt": prompt,
        "sampler": sampler,
        "steps": steps,
        "guidance_scale": float(guidance_scale),  # 7 and 7.0 are one key
        "seed": seed,
        "resolution": resolution,
    }
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    wanted = [folder / f"{key}-{i:05d}.png" for i in range(max(0, count - len(own)))]
    # Whole batches, always the same ones: their rounding is that of an uninterrupted run.
    starts = ranks.mine(range(0, len(wanted), batch_size))
    todo = [i for i in starts if not all(path.exists() for path in wanted[i : i + batch_size])]
    return Images(own, wanted, todo, batch_size, settings)


def ensure(sd: StableDiffusion, folder: Path, *, begin: int = 0, **settings) -> list[Path]:
    """The class images that `find` finds with these settings, which are drawn where they are
    missing. Image i is drawn from seed + i.

    Each rank draws its share; raises UserError where it does not see the others'. Runs that draw
    into one folder at the same time, and `begin` with another one of the missing batches, share the
    work.
    """
    images = find(sd, folder, **settings)
    own, wanted, todo = images.own, images.drawn, images.missing
    first = begin % max(1, len(todo))
    todo = todo[first:] + todo[:first]
    if todo:
        cli.check_folder("--class_data_dir", folder)
    if own:
        print(f"class images: {len(own)} of your own in {folder}, {len(wanted)} drawn")
    info = PngImagePlugin.PngInfo()
    for name, value in images.settings.items():
        info.add_itxt(name, str(value))
    steps, seed, resolution = (settings[name] for name in ("steps", "seed", "resolution"))
    with tqdm(total=len(todo) * steps, desc="class images", unit="step", disable=not todo) as bar:
        for first in todo:
            paths = images.batch(first)
            if all(path.exists() for path in paths):  # by now
                bar.update(steps)
                continue
            pictures = sd.generate(
                [settings["prompt"]] * len(paths),
                steps=steps,
                sampler=settings["sampler"],
                guidance_scale=settings["guidance_scale"],
                seed=seed + first,
                height=resolution,
                width=resolution,
                batch_size=images.batch_size,
                on_step=bar.update,
            )
            for path, image in zip(paths, pictures, strict=True):
                if not path.exists():
                    with atomic(path) as part:
                        image.save(part, "PNG", pnginfo=info)
    ranks.wait()
    if absent := [path for path in wanted if not path.exists()]:
        raise UserError(f"{absent[0]} was drawn elsewhere: all ranks must share this folder")
    if not own and not wanted:
        raise UserError("no class images: give --num_class_images or put some into the folder")
    return own + wanted
