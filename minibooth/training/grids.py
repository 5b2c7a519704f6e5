"""What the model draws for fixed prompts and seeds: before, on the way and after."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from .. import pipeline
from ..device import graphs, memory, ranks
from ..device.precision import Precision
from ..pipeline import NotFinite, StableDiffusion
from . import photos
from .events import Events
from .report import save_image
from .settings import TrainConfig

Rows = list[list[Image.Image]]  # a row of pictures per prompt


@dataclass(frozen=True)
class Grids:
    """The grids of a run, samples/step-N.png, from the same noises each time."""

    folder: Path  # of the run
    prompts: list[str]
    count: int  # pictures per prompt; 0 for no grids
    steps: int  # of the sampler
    guidance_scale: float
    seed: int
    resolution: int  # in pixels
    batch_size: int  # pictures drawn at once
    captured: bool  # by a CUDA graph, which keeps what it works in until all are drawn
    events: Events  # for TensorBoard

    @classmethod
    def of(cls, folder: Path, config: TrainConfig, resolution: int, events: Events) -> "Grids":
        return cls(
            folder,
            config.grid_prompts,
            config.num_validation_images,
            config.validation_inference_steps,
            config.validation_guidance_scale,
            config.seed,
            resolution,
            config.grid_batch_size,
            captured=not config.saves_memory,
            events=events,
        )

    def draw(self, sd: StableDiffusion, idle: list[nn.Module], precision: Precision) -> Rows:
        """`idle` networks, which training does not need, are on the device only while they work:
        the text encoder while the UNet draws, the VAE after it."""
        if self.count == 0:
            return []
        batches = ranks.mine(self.batches(sd))
        bar = tqdm(total=len(batches) * self.steps, desc="samples", unit="step", leave=False)
        text = memory.visiting([net for net in idle if net is not sd.vae], sd.device)
        graph = graphs.captured_unet(sd.unet, wanted=self.captured)
        with bar, text, graph, precision.autocast():
            latents = [self.draw_latents(sd, *batch, bar.update) for batch in batches]
        with memory.visiting([sd.vae], sd.device), torch.no_grad():
            parts = ranks.together([self.draw_pictures(sd, part) for part in latents])
        images = pipeline.to_pil(torch.cat(parts))
        return [images[i : i + self.count] for i in range(0, len(images), self.count)]

    def batches(self, sd: StableDiffusion) -> list[tuple[list[str], Tensor]]:
        """Prompts, and the noises, (B, 4, h, w), that they are drawn from. Those are the same for
        each prompt: what differs is the text."""
        shape = sd.latent_shape(self.count, self.resolution, self.resolution, None)
        noises = [
            torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + i))
            for i in range(self.count)
        ]
        prompts = [prompt for prompt in self.prompts for _ in range(self.count)]
        latents = torch.stack(noises * len(self.prompts)).split(self.batch_size)
        size = self.batch_size
        return [(prompts[i * size : (i + 1) * size], part) for i, part in enumerate(latents)]

    def draw_latents(
        self, sd: StableDiffusion, prompts: list[str], noises: Tensor, on_step: Callable[[], None]
    ) -> Tensor:
        try:
            return sd.generate(
                prompts,
                steps=self.steps,
                guidance_scale=self.guidance_scale,
                seed=self.seed,
                latents=noises,
                batch_size=self.batch_size,
                output="latent",
                on_step=on_step,
            )
        except NotFinite as e:  # training goes on: its own loss may well be finite
            warnings.warn(f"black in a sample grid: {e}", stacklevel=1)
            return torch.full_like(noises, torch.nan, device=sd.device)

    def draw_pictures(self, sd: StableDiffusion, latents: Tensor) -> Tensor:
        """(B, 3, R, R) in [0, 1] on the CPU; black where they are not finite."""
        if latents.isfinite().all():
            try:
                return sd.decode(latents).cpu()
            except NotFinite as e:
                warnings.warn(f"black in a sample grid: {e}", stacklevel=1)
        return torch.zeros(len(latents), 3, self.resolution, self.resolution)

    def file(self, step: int) -> Path:
        return self.folder / "samples" / f"step-{step:05d}.png"

    def has(self, step: int) -> bool:
        return self.file(step).exists()

    @ranks.by_first
    def save(self, step: int, rows: Rows) -> None:
        if rows:
            grid = photos.grid(photos.enlarged(rows), labels=self.prompts)
            save_image(grid, self.file(step))
            self.events.picture(grid, step)

    @ranks.by_first
    def save_before_after(self, before: Rows, after: Rows) -> None:
        if before:
            picture = before_after(self.prompts, before, after)
            save_image(picture, self.folder / "before_after.png")


def before_after(prompts: list[str], before: Rows, after: Rows) -> Image.Image:
    rows = [b + a for b, a in zip(before, after, strict=True)]
    headings = ["before"] * len(before[0]) + ["after"] * len(after[0])
    return photos.grid(photos.enlarged(rows), labels=prompts, headings=headings)
