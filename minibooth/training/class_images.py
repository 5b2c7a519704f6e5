"""x_pr of Eq. 2: pictures of the class, drawn by the model before it is trained.

Each is kept as a PNG whose name holds a key of everything that it depends on, and its index. So
only the missing ones are drawn, none is overwritten, and one folder serves many runs.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import PngImagePlugin
from tqdm import tqdm

from ..common import cli
from ..common.errors import UserError
from ..common.files import atomic
from ..device import ranks
from ..pipeline import StableDiffusion
from . import photos
from .passes import drawing
from .settings import TrainConfig
from .subjects import Subject


class Images(NamedTuple):
    """The class images of a subject, there or not."""

    folder: Path
    own: list[Path]  # the user's
    drawn: list[Path]  # with image i from seed + i
    missing: list[int]  # where this rank's batches of these begin that are not all there
    batch_size: int
    settings: dict  # that the drawn ones depend on, and have in them

    def batch(self, first: int) -> list[Path]:
        return self.drawn[first : first + self.batch_size]


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


def find(config: TrainConfig, subject: Subject, resolution: int, fingerprint: str) -> Images:
    """The user's own class images of a subject, all of them, and as many drawn ones as bring the
    number to --num_class_images. `fingerprint`: the model's, before its weights are rounded.

    Runs that draw into one folder at the same time share the work: each begins with another one of
    the missing batches.
    """
    folder, size = subject.class_folder(config.output_dir), config.sample_batch_size
    own = photos.own(folder)
    settings = {
        "model": fingerprint,
        "prompt": subject.class_prompt,
        "sampler": config.class_sampler,
        "steps": config.class_steps,
        "guidance_scale": float(config.class_guidance_scale),  # 7 and 7.0 are one key
        "seed": config.seed,
        "resolution": resolution,
    }
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    count = max(0, config.num_class_images - len(own))
    wanted = [folder / f"{key}-{i:05d}.png" for i in range(count)]
    # Whole batches, always the same ones: their rounding is that of an uninterrupted run.
    starts = ranks.mine(range(0, count, size))
    todo = [i for i in starts if not all(path.exists() for path in wanted[i : i + size])]
    first = zlib.crc32(config.output_dir.encode()) % max(1, len(todo))
    return Images(folder, own, wanted, todo[first:] + todo[:first], size, settings)


def ensure(
    sd: StableDiffusion, images: Images, on_passes: Callable[[int], None] = lambda n: None
) -> list[Path]:
    """Draw those that are missing, image i from seed + i; the files of all.

    Each rank draws its share; raises UserError where it does not see the others'. `on_passes` is
    told after each step of the sampler how many samples went through the UNet.
    """
    folder, own, wanted, todo = images.folder, images.own, images.drawn, images.missing
    settings = images.settings
    if todo:
        cli.check_folder("--class_data_dir", folder)
    if own:
        print(f"class images: {len(own)} of your own in {folder}, {len(wanted)} drawn")
    info = PngImagePlugin.PngInfo()
    for name, value in settings.items():
        info.add_itxt(name, str(value))
    steps, seed, resolution = (settings[name] for name in ("steps", "seed", "resolution"))
    with tqdm(total=len(todo) * steps, desc="class images", unit="step", disable=not todo) as bar:
        for first in todo:
            paths = images.batch(first)
            at_once = drawing(len(paths), 1, settings["guidance_scale"])

            def on_step(at_once=at_once) -> None:
                bar.update()
                on_passes(at_once)

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
                on_step=on_step,
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
