"""samples/step-N.png, the grids of a run: what the model draws before, on the way and after, for
fixed prompts, from the same noises each time."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .. import pipeline
from ..common import sheets
from ..device import graphs, memory, ranks
from ..formats.checks import NotFinite
from . import enlarging, passes
from .report import save_image
from .start import Run

Rows = list[list[Image.Image]]  # a row of pictures per prompt


def draw(run: Run) -> Rows:
    """Idle networks, which training does not need, are on the device only while they work: the
    text encoder while the UNet draws, the VAE after it, from which the UNet may have to be away.
    SDXL is told that these are whole pictures, of the training's size."""
    config, sd, idle = run.config, run.sd, run.idle
    count = 1 if run.second else config.num_validation_images
    if config.num_validation_images == 0:
        return []
    batches = ranks.mine(enlarging.batches(run) if run.second else to_draw(run))
    at_once = len(batches[0]["prompts"]) if batches else 0
    steps = len(batches) * config.validation_inference_steps
    bar = tqdm(total=steps, desc="samples", unit="step", leave=False)
    text = memory.visiting([net for net in idle if net is not sd.vae], sd.device)

    def on_step() -> None:
        bar.update()
        run.on_passes(passes.drawing(at_once, 1, config.validation_guidance_scale))

    # A CUDA graph keeps what it works in until all are drawn.
    graph = graphs.captured_unet(sd.unet, wanted=not config.saves_memory)
    with bar, text, graph, run.precision.autocast():
        latents = [draw_latents(run, batch, on_step) for batch in batches]
    with (
        memory.away(sd.unet, run.by_turns),
        memory.visiting([sd.vae], run.device),
        torch.no_grad(),
    ):
        parts = ranks.together([draw_pictures(run, part) for part in latents])
    images = pipeline.to_pil(torch.cat(parts))
    return [images[i : i + count] for i in range(0, len(images), count)]


def to_draw(run: Run) -> list[dict]:
    """What `StableDiffusion.generate` is asked for a grid, in batches."""
    config, size = run.config, run.config.grid_batch_size
    prompts = [p for p in config.grid_prompts for _ in range(config.num_validation_images)]
    latents = torch.cat([noises(run)] * len(config.grid_prompts)).split(size)  # (size, 4, h, w)
    return [
        {"prompts": prompts[i * size : (i + 1) * size], "latents": x, "seed": config.seed}
        for i, x in enumerate(latents)
    ]


def noises(run: Run) -> Tensor:
    """(count, 4, h, w): those that a prompt's pictures are drawn from. They are the same for each
    prompt: what differs is the text."""
    count, seed = run.config.num_validation_images, run.config.seed
    shape = run.sd.latent_shape(count, run.resolution, run.resolution, None)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def draw_latents(run: Run, batch: dict, on_step: Callable[[], None]) -> Tensor:
    config, side = run.config, run.resolution // run.sd.vae.factor
    draw = run.sd.upscale if run.second else run.sd.generate
    try:
        return draw(
            **batch,
            steps=config.validation_inference_steps,
            guidance_scale=config.validation_guidance_scale,
            batch_size=config.grid_batch_size,
            output="latent",
            on_step=on_step,
        )
    except NotFinite as e:  # training goes on: its own loss may well be finite
        warnings.warn(f"black in a sample grid: {e}", stacklevel=1)
        return torch.full((len(batch["prompts"]), 4, side, side), torch.nan, device=run.sd.device)


def draw_pictures(run: Run, latents: Tensor) -> Tensor:
    """(B, 3, R, R) in [0, 1] on the CPU; black where they are not finite."""
    if latents.isfinite().all():
        try:
            return run.sd.decode(latents).cpu()
        except NotFinite as e:
            warnings.warn(f"black in a sample grid: {e}", stacklevel=1)
    return torch.zeros(len(latents), 3, run.resolution, run.resolution)


def file(run: Run, step: int) -> Path:
    return run.folder / "samples" / f"step-{step:05d}.png"


def there(run: Run, step: int) -> bool:
    return file(run, step).exists()


def labels(run: Run) -> list[str]:
    return enlarging.labels(run) if run.second else run.config.grid_prompts


@ranks.by_first
def save(run: Run, step: int, rows: Rows) -> None:
    if rows:
        grid = sheets.grid(sheets.enlarged(rows), labels=labels(run))
        save_image(grid, file(run, step))
        run.events.picture(grid, step)


def before_after(run: Run, before: Rows, after: Rows) -> Image.Image:
    """A row per prompt: what was drawn before, then what was drawn after."""
    rows = [b + a for b, a in zip(before, after, strict=True)]
    headings = ["before"] * len(before[0]) + ["after"] * len(after[0])
    if run.second:
        rows = enlarging.between(run, rows)
        headings = ["given", *headings, "photograph"]
    return sheets.grid(sheets.enlarged(rows), labels=labels(run), headings=headings)


@ranks.by_first
def save_before_after(
    run: Run,
    before: Rows,
    after: Rows,
    compose: Callable[[Run, Rows, Rows], Image.Image],
) -> None:
    if before:
        save_image(compose(run, before, after), run.folder / "before_after.png")
