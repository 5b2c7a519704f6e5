"""x_pr of Eq. 2: pictures of the class, drawn by the model before it is trained.

Each is kept as a PNG whose name holds a key of everything that it depends on, and its index. So
only the missing ones are drawn, none is overwritten, and one folder serves many runs.
"""

import hashlib
import json
import re
from pathlib import Path

from PIL import PngImagePlugin
from tqdm import tqdm

from ..common.errors import UserError
from ..common.files import atomic
from ..pipeline import StableDiffusion
from . import photos

GENERATED = re.compile(r"[0-9a-f]{12}-\d{5}\.png")


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
) -> list[Path]:
    """The class images of these settings: the user's own in `folder`, all of them, and as many
    drawn ones as bring the number to `count`. Image i is drawn from seed + i. `fingerprint`: the
    model's, where its weights have been rounded since.
    """
    try:
        own = [f for f in photos.image_files(folder) if not GENERATED.fullmatch(f.name)]
    except UserError:  # not there yet, or nothing in it
        own = []
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
    starts = range(0, len(wanted), batch_size)
    todo = [i for i in starts if not all(path.exists() for path in wanted[i : i + batch_size])]
    if own:
        print(f"class images: {len(own)} of your own in {folder}, {len(wanted)} drawn")
    info = PngImagePlugin.PngInfo()
    for name, value in settings.items():
        info.add_itxt(name, str(value))
    with tqdm(total=len(todo) * steps, desc="class images", unit="step", disable=not todo) as bar:
        for first in todo:
            paths = wanted[first : first + batch_size]
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
    if not own and not wanted:
        raise UserError("no class images: give --num_class_images or put some into the folder")
    return own + wanted
