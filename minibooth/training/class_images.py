"""x_pr of Eq. 2: pictures of the class, drawn by the model before it is trained.

Each is kept as a PNG whose name holds a key of everything that it depends on, and its index. So
only the missing ones are drawn, none is overwritten, and one folder serves many runs.
"""

import hashlib
import json
import re
import zlib
from pathlib import Path

import torch
from PIL import PngImagePlugin
from torch import Tensor
from tqdm import tqdm

from ..common import cli
from ..common.errors import UserError
from ..common.files import atomic
from ..pipeline import StableDiffusion
from . import photos, ranks
from .settings import TrainConfig
from .subjects import Subject

GENERATED = re.compile(r"[0-9a-f]{12}-\d{5}\.png")


def of_run(
    sd: StableDiffusion, config: TrainConfig, resolution: int, fingerprint: str
) -> tuple[list[Path], Tensor]:
    """As `ensure`, of all subjects of a run; and which subject's each class image is: (M,)."""
    found = [
        (i, file)
        for i, subject in enumerate(config.subjects)
        for file in of_subject(sd, config, subject, resolution, fingerprint)
    ]
    return [file for _, file in found], torch.tensor([i for i, _ in found])


def of_subject(
    sd: StableDiffusion,
    config: TrainConfig,
    subject: Subject,
    resolution: int,
    fingerprint: str,
) -> list[Path]:
    return ensure(
        sd,
        Path(subject.class_data_dir or Path(config.output_dir) / "class_images"),
        count=config.num_class_images,
        prompt=subject.class_prompt,
        sampler=config.class_sampler,
        steps=config.class_steps,
        guidance_scale=config.class_guidance_scale,
        seed=config.seed,
        resolution=resolution,
        batch_size=config.sample_batch_size,
        fingerprint=fingerprint,
        begin=zlib.crc32(config.output_dir.encode()),
    )


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


def ensure(
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
    begin: int = 0,
) -> list[Path]:
    """The class images of these settings: the user's own in `folder`, all of them, and as many
    drawn ones as bring the number to `count`. Image i is drawn from seed + i. `fingerprint`: the
    model's, where its weights have been rounded since.

    Each rank draws its share; raises UserError where it does not see the others'. Runs that draw
    into one folder at the same time, and `begin` with another one of the missing batches, share the
    work.
    """
    own = [f for f in there(folder) if not GENERATED.fullmatch(f.name)]
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
    first = begin % max(1, len(todo))
    todo = todo[first:] + todo[:first]
    if todo:
        cli.check_folder("--class_data_dir", folder)
    if own:
        print(f"class images: {len(own)} of your own in {folder}, {len(wanted)} drawn")
    info = PngImagePlugin.PngInfo()
    for name, value in settings.items():
        info.add_itxt(name, str(value))
    with tqdm(total=len(todo) * steps, desc="class images", unit="step", disable=not todo) as bar:
        for first in todo:
            paths = wanted[first : first + batch_size]
            if all(path.exists() for path in paths):  # by now
                bar.update(steps)
                continue
            images = sd.generate(
                [prompt] * len(paths),
                steps=steps,
                sampler=sampler,
                guidance_scale=guidance_scale,
                seed=seed + first,
                height=resolution,
                width=resolution,
                batch_size=batch_size,
                on_step=bar.update,
            )
            for path, image in zip(paths, images, strict=True):
                if not path.exists():
                    with atomic(path) as part:
                        image.save(part, "PNG", pnginfo=info)
    ranks.wait()
    if absent := [path for path in wanted if not path.exists()]:
        raise UserError(f"{absent[0]} was drawn elsewhere: all ranks must share this folder")
    if not own and not wanted:
        raise UserError("no class images: give --num_class_images or put some into the folder")
    return own + wanted
