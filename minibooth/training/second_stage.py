"""Training an upscaler: what it asks of the settings, and the class images that two models make.

An upscaler draws nothing from words. What x_pr is to it, its own picture of the class, begins with
a base model: that draws, and the upscaler, untrained as yet, enlarges a piece of what was drawn.

It is trained on pieces, too. A base model's picture of 512² becomes one of 2048², but a step takes
512² of that: so crops are cut out of photographs that are as large as a whole picture will be, and
show the subject as large as it will be met. Resized to 512² as a whole, they would not.
"""

from dataclasses import dataclass, field, replace

import torch
from PIL import Image

from .. import pipeline
from ..common.errors import UserError
from ..pipeline import StableDiffusion
from ..upscaler import SCALE, Upscaler, require_kind
from . import photos
from .data import rng
from .settings import TrainConfig

LEVELS = 0, 20  # s in training: our reading of the paper, see upscaler.py
# s of class images and grids: sample's default. What prior preservation is to keep is what the
# model does at the levels where training moves it, and where pictures will be made.
LEVEL = 20
PHOTOGRAPHS = 4  # that grids show at most


def levels(config: TrainConfig) -> tuple[int, int]:
    """The lowest and the highest s of training."""
    return tuple(config.noise_level or LEVELS)


def level(trained: tuple[int, int]) -> int:
    """s at which a run enlarges pictures: LEVEL, or the nearest that is trained."""
    lowest, highest = trained
    return min(max(LEVEL, lowest), highest)


@dataclass
class SecondStage:
    """What a run that trains an upscaler has beside others."""

    levels: tuple[int, int]  # the lowest and the highest s of training
    base: StableDiffusion | None  # --base_model, until it has drawn
    base_fingerprint: str | None
    detail: int  # shorter side in pixels of a whole large picture, and of photographs
    photographs: int  # how many grids show
    prompts: list[str] = field(default_factory=list)  # of what the base model draws for them
    drawings: list[Image.Image] = field(default_factory=list)  # what it drew: pieces

    def settled(self, config: TrainConfig) -> TrainConfig:
        """With what was not given. Without a base model class images are those that are there."""
        drawn = config.num_class_images if self.base else 0
        return replace(config, noise_level=self.levels, num_class_images=drawn)

    def identity(self, config: TrainConfig) -> dict:
        """What must be the same when a run goes on."""
        found = {"noise_level": list(self.levels), "base model": self.base_fingerprint}
        if self.base_fingerprint and config.uses_prior:
            how = [config.validation_inference_steps, config.validation_guidance_scale]
            found["class images' enlarging"] = how
        return found

    @property
    def level(self) -> int:
        """s at which class images and grids are enlarged."""
        return level(self.levels)

    def enlarging(self, config: TrainConfig) -> TrainConfig:
        """By which the upscaler makes class images of what the base model drew: as those of grids.
        `config`'s own settings of class images are the base model's."""
        steps, guidance_scale = config.validation_inference_steps, config.validation_guidance_scale
        return replace(config, class_steps=steps, class_guidance_scale=guidance_scale)

    def drawn_by(self, config: TrainConfig) -> str:
        """On what class images depend beside the upscaler and its settings."""
        how = f"{config.class_sampler} {config.class_steps} {config.class_guidance_scale:g}"
        return f"{self.base_fingerprint} {how}, noise level {self.level}"

    @property
    def pictures(self) -> int:
        """Of a grid."""
        return self.photographs + len(self.prompts)


def of_run(
    sd: StableDiffusion, config: TrainConfig, resolution: int, photographs: int
) -> SecondStage | None:
    """Of a run on so many photographs; None for a model that draws. Raises UserError where the
    settings are not for this model."""
    if not isinstance(sd, Upscaler):
        for name in ("noise_level", "base_model"):
            if getattr(config, name) is not None:
                raise UserError(f"--{name} is for training an upscaler, and --model is none")
        return None
    check(sd, config, resolution)
    trained, shown = levels(config), min(PHOTOGRAPHS, photographs)
    if config.base_model is None:
        return SecondStage(trained, None, None, SCALE * resolution, shown)
    base = pipeline.load(config.base_model)
    require_kind(base, f"--base_model {config.base_model}")
    base.latent_shape(1, None, None, None)  # refuses one that cannot draw by itself
    side, least = base.image_size, resolution // SCALE
    if side < least:
        raise UserError(
            f"--base_model {config.base_model} draws {side}², which is smaller than what becomes "
            f"--resolution {resolution}, {least}²"
        )
    prompts = config.grid_prompts if config.num_validation_images else []
    return SecondStage(trained, base, base.fingerprint(), SCALE * side, shown, prompts)


def check(up: Upscaler, config: TrainConfig, resolution: int) -> None:
    """Raise UserError unless an upscaler can be trained so."""
    highest, of_small = levels(config)[1], resolution // SCALE
    if highest >= up.levels:
        raise UserError(f"--noise_level: this upscaler knows 0 to {up.levels - 1}, not {highest}")
    if resolution % SCALE or of_small % 4:
        raise UserError(f"--resolution must be a multiple of {4 * SCALE} for an upscaler")
    up.check_size(of_small, of_small)
    check_method(config)
    if config.explain:
        raise UserError("--explain shows a model that draws: an upscaler is trained without it")
    for subject in config.subjects * config.uses_prior:
        folder = subject.class_folder(config.output_dir)
        if own := photos.own(folder):  # refuses those that are too small
            photos.load_photos(own, resolution, detail=resolution)
        elif config.base_model is None:
            raise UserError(
                f"an upscaler cannot draw class images from words, and {folder} holds none: "
                "give --base_model, which draws them, or --class_data_dir with pictures of the "
                "class, or --prior_loss_weight 0"
            )


def check_method(config: TrainConfig) -> None:
    if config.method not in ("dreambooth", "lora"):
        raise UserError(
            f"--method {config.method}: an upscaler is trained whole or by --method lora; words "
            "and hypernetworks are for models that draw"
        )


# ---- what two models draw ----------------------------------------------------------------------


def piece(image: Image.Image, side: int, seed: int | None = None) -> Image.Image:
    """A square of this side: its place depends on the seed, or is the middle without one."""
    slack = [n - side for n in image.size]
    if seed is None:
        left, top = (n // 2 for n in slack)
    else:
        g = rng(seed, "class image", "piece")
        left, top = (int(torch.randint(n + 1, (), generator=g)) for n in slack)
    return image.crop((left, top, left + side, top + side))


@dataclass
class Cascade:
    """A base model that has drawn, and an upscaler: together they draw x_pr."""

    up: Upscaler
    level: int
    drawn: dict[tuple[str, int], list[Image.Image]]  # by prompt and seed: pieces, to be enlarged

    def generate(
        self, prompts: list[str], *, seed: int, sampler: str, height: int, width: int, **how
    ) -> list[Image.Image]:
        """As StableDiffusion.generate, of what was drawn for it. An upscaler's sampler is DDIM."""
        small = self.drawn[prompts[0], seed]
        return self.up.upscale(small, prompts, seed=seed, noise_level=self.level, **how)
