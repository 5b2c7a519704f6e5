"""How much a run has to compute, and after two steps how long that takes.

The measure is a pass of one sample through the UNet. Other networks hardly count beside them.
"""

import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..device import ranks
from .settings import TrainConfig

STEPS = 2  # of the first pictures or of training; the second is measured


def drawing(pictures: int, steps: int, guidance_scale: float) -> int:
    """Passes of so many pictures: with guidance two at each step of the sampler."""
    return pictures * steps * (1 + (guidance_scale > 1))


def samples(config: TrainConfig) -> int:
    """That go through the UNet in a batch."""
    return config.train_batch_size * (1 + config.uses_prior)


def back_and_forth(config: TrainConfig) -> int:
    """As how many passes forward one of training counts: its backward pass takes as long as two, or
    three where activations are computed again."""
    return 4 if config.gradient_checkpointing else 3


def of_update(config: TrainConfig) -> int:
    return samples(config) * config.gradient_accumulation_steps * back_and_forth(config)


@dataclass(frozen=True)
class Passes:
    """What is yet to be done in a run, or in a rank's part of it."""

    class_images: int
    training: int
    grids: int

    @property
    def total(self) -> int:
        return self.class_images + self.training + self.grids

    def shares(self, of_pass: float = 1.0) -> list[tuple[float, str]]:
        """What there is of each, times `of_pass`, and what it is for."""
        each = (self.class_images, "class images"), (self.training, "training")
        return [(n * of_pass, what) for n, what in (*each, (self.grids, "grids")) if n]


def to_come(
    config: TrainConfig, class_images: int, done: int = 0, of_grid: int | None = None
) -> Passes:
    """Of a run that lacks so many class images and has so many updates behind it. `of_grid`: the
    pictures of a grid, where an upscaler makes it."""
    guidance = config.class_guidance_scale, config.validation_guidance_scale
    updates = max(0, config.max_train_steps - done)
    between = range(done + 1, config.max_train_steps)
    grids = 2 + sum(step % config.validation_steps == 0 for step in between)
    pictures = 0
    if config.num_validation_images:
        each = config.grid_pictures if of_grid is None else of_grid
        pictures = -(-grids * each // ranks.count())
    return Passes(
        drawing(class_images, config.class_steps, guidance[0]),
        updates * of_update(config),
        drawing(pictures, config.validation_inference_steps, guidance[1]),
    )


class Forecast:
    """Says at once how many passes there are to come, and when `STEPS` steps are done how long they
    take. It waits for the device after these, and never again."""

    def __init__(self, passes: Passes, config: TrainConfig, device: torch.device):
        self.passes, self.device, self.ends = passes, device, []
        shares = ", ".join(f"{n:,.0f} for {what}" for n, what in passes.shares())
        print(
            f"passes of the UNet to come: {shares}, where one forward and back counts as "
            f"{back_and_forth(config)}"
        )

    def __call__(self, passes: int) -> None:
        """A step of so many passes is done."""
        if len(self.ends) == STEPS:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())
        if len(self.ends) == STEPS:
            of_pass = (self.ends[-1] - self.ends[-2]) / passes
            shares = self.passes.shares(of_pass)
            parts = ", ".join(f"{what} {in_words(seconds)}" for seconds, what in shares)
            tqdm.write(
                f"this takes about {in_words(of_pass * self.passes.total)} ({parts}), as the first "
                f"{STEPS} steps say: {of_pass:.2g} s a pass"
            )


def in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} second{'s' * (round(seconds) != 1)}"
    return f"{seconds / 3600:.0f} hours" if seconds >= 5400 else f"{seconds / 60:.0f} minutes"
