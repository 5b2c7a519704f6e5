"""Pictures in a run that trains an upscaler: its class images begin with what its base model draws,
and its grids show photographs that were reduced, and drawings of the base model, enlarged again."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..common.pictures import as_floats, to_pil
from ..device import graphs, ranks
from ..upscaler import SCALE, reduced
from . import methods
from .class_images import Images
from .second_stage import Cascade, piece
from .start import Run

# ---- what the base model draws -----------------------------------------------------------------


def base_draws(run: Run, found: list[Images]) -> Cascade:
    """Have the base model draw for the grids, and what is missing of the class images; what makes
    these of it. It has the device to itself meanwhile, and is let go afterwards."""
    second, config, side = run.second, run.config, run.resolution // SCALE
    base, second.base, drawn = second.base, None, {}
    batches = [(images, first) for images in found for first in images.missing]
    how = {"steps": config.class_steps, "guidance_scale": config.class_guidance_scale}
    how["sampler"] = config.class_sampler
    if base is None or not (batches or second.prompts):
        return Cascade(run.sd, second.level, drawn)
    methods.place(base, {}, run.device, run.precision.dtype)
    graph = graphs.captured_unet(base.unet, wanted=not config.saves_memory)
    with graph, run.precision.autocast():
        for images, first in tqdm(batches, desc="for class images", disable=not batches):
            prompt, seed = images.settings["prompt"], config.seed + first
            pictures = base.generate(
                [prompt] * len(images.batch(first)),
                seed=seed,
                batch_size=config.sample_batch_size,
                **how,
            )
            drawn[prompt, seed] = [piece(p, side, seed + i) for i, p in enumerate(pictures)]
        prompts = ranks.mine(second.prompts)
        pictures = [base.generate(prompt, seed=config.seed, **how)[0] for prompt in prompts]
    second.drawings = [piece(picture, side) for picture in ranks.together(pictures)]
    return Cascade(run.sd, second.level, drawn)


# ---- grids -------------------------------------------------------------------------------------


def batches(run: Run) -> list[dict]:
    """What `Upscaler.upscale` is asked for a grid, a picture in each row. Each has a noise of its
    own, which is the same in all grids."""
    pictures, prompts, size = small(run) / 2 + 0.5, labels(run), run.config.grid_batch_size
    how = {"noise_level": run.second.level}
    rows = [slice(i, i + size) for i in range(0, len(prompts), size)]
    return [
        {"pictures": pictures[i], "prompts": prompts[i], "seed": run.config.seed + i.start, **how}
        for i in rows
    ]


def labels(run: Run) -> list[str]:
    """The prompts of a grid's pictures: first of the photographs, then of the drawings."""
    shown = zip(run.captions, run.shown.tolist(), strict=True)
    own = [caption or run.config.subjects[i].instance_prompt for caption, i in shown]
    return own[: run.second.photographs] + run.second.prompts


def large(run: Run) -> Tensor:
    """Of each photograph that is shown the crop nearest to its middle: (P, 3, R, R) in [-1, 1]."""
    photos, rows = run.photos, []
    for i in range(run.second.photographs):
        own = (photos.photo == i).nonzero().flatten()
        corners = photos.sizes[own, 2:4].float()
        rows.append(own[(corners - corners.mean(dim=0)).norm(dim=1).argmin()])
    return as_floats(photos.pixels[torch.stack(rows)])


def small(run: Run) -> Tensor:
    """What a grid's pictures are made from: (N, 3, R/4, R/4) in [-1, 1]."""
    drawings = [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in run.second.drawings]
    return torch.cat([reduced(large(run)), *(as_floats(x)[None] for x in drawings)])


def between(run: Run, rows: list[list[Image.Image]]) -> list[list[Image.Image]]:
    """Rows of a grid between what was given and, of photographs, what is to come of it."""
    side, photographs = (run.resolution,) * 2, to_pil(large(run))
    given = [x.resize(side, Image.Resampling.NEAREST) for x in to_pil(small(run))]
    ends = [[photograph] for photograph in photographs] + [[]] * len(run.second.drawings)
    return [[first, *row, *end] for first, row, end in zip(given, rows, ends, strict=True)]
