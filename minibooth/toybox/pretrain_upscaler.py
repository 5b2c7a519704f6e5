"""python -m minibooth.toybox.pretrain_upscaler: train the toybox's upscaler, from 64² to 256².

The world can be rendered at any size, so that there are true large pictures. First the toybox's
autoencoder, which knows none of 256², learns them; then a UNet as the public upscaler's, but small,
is trained on its latents beside the reduced pictures. The text encoder is the toybox's as it is.
Every stage is kept in `work_dir` and goes on where it was stopped.
"""

import copy
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import dreambooth, pipeline
from ..common import cli, sheets
from ..common.cli import option
from ..common.files import atomic
from ..common.pictures import as_floats, to_pil
from ..dreambooth import Term
from ..formats.public import X4_SCHEDULER, X4_SMALL, X4_UNET, X4_VAE
from ..formats.scheduler import read_schedule
from ..pipeline import StableDiffusion
from ..training import report
from ..training.data import rng
from ..unet import UNet
from ..upscaler import SCALE, Upscaler, reduced, seeing
from ..vae import VAE
from . import UPSCALING, world
from .pretrain import UNCONDITIONAL, check_start, crops, fit, scene, vae_loss

LARGE = SCALE * world.SIDE  # pixels
LEVELS = 350  # of the noise on the small picture, as the public upscaler has
UNET_CONFIG = X4_UNET | {
    "attention_head_dim": 4,
    "block_out_channels": [32, 64, 96],
    "cross_attention_dim": 96,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,  # of 2 channels each, 16 would take away how bright a picture is
    "num_class_embeds": LEVELS,
    "only_cross_attention": False,
    "sample_size": world.SIDE,
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
}
# "trailing": few steps begin at almost pure noise. With "leading" they begin where a model expects
# to see the colours of the picture in x_t already.
SCHEDULER = X4_SCHEDULER | {"timestep_spacing": "trailing"}

# The public VAE's. Diffusers' pipeline of upscalers takes it whatever a config says.
FACTOR = X4_VAE["scaling_factor"]

CROP = 16  # latents: the side of what the autoencoder sees of a picture at first
UNET_CROP = 32  # the same for the UNet
WHOLE = 0.2  # of each network's training, at the end: on whole pictures
# Of the mean over latent values, beside the mean error over pixel values.
KL_WEIGHT = 2e-3
# Of the error of a square of 8² latents' mean, beside that of every one: a colour that is a little
# wrong everywhere is seen at once, and is next to nothing beside what edges may do to each latent.
COLOURS = 4.0
SOFT = 0.5  # of the small pictures have been through the first stage's autoencoder, as drawn ones


@dataclass(frozen=True)
class UpscalerConfig:
    output_dir: str = option("toybox-x4", "where the model goes", place="path")
    start_from: str = option("toybox", "whose words and autoencoder it begins with", place="source")
    work_dir: str = option("toybox-x4-work", "where pictures and stages are kept", place="path")
    pictures: int = option(2500, "rendered pictures to train on")
    vae_steps: int = option(500, "updates of the autoencoder")
    vae_learning_rate: float = option(5e-4, "in these, falling to 0 along a cosine")
    steps: int = option(12_000, "updates of the UNet")
    learning_rate: float = option(1e-3, "in these, falling likewise")
    batch_size: int = option(8, "crops per update; whole pictures: a quarter as many")
    mixed_precision: str = option("no", "what the networks compute in", choices=("no", "bf16"))
    seed: int = option(0, "of scenes, weights, noises and orders")
    device: str = option("auto", "auto, cuda, mps or cpu")


# ---- the pictures ------------------------------------------------------------------------------


def render_all(config: UpscalerConfig) -> Tensor:
    """(N, 3, 256, 256) uint8 of the toybox's own scenes, rendered once and kept."""
    path = Path(config.work_dir) / "pictures.npy"
    if not path.exists():
        bar = tqdm(range(config.pictures), desc="rendering", unit="picture")
        pictures = [np.asarray(world.render(scene(i, config.seed), LARGE)) for i in bar]
        with atomic(path) as part, open(part, "wb") as f:
            np.save(f, np.stack(pictures).transpose(0, 3, 1, 2))
    return torch.from_numpy(np.load(path))


def held_out(side: int, count: int = 8) -> np.ndarray:
    """(N, side, side, 3) uint8 of scenes that are in no training set, the first in neon."""
    scenes = [world.random_scene(random.Random(f"held out {i}")) for i in range(count)]
    scenes[0] = replace(scenes[0], style=world.NEON)
    return np.stack([np.asarray(world.render(one, side)) for one in scenes])


# ---- the autoencoder ---------------------------------------------------------------------------


def train_vae(config: UpscalerConfig, start: StableDiffusion, pictures: Tensor) -> VAE:
    """The toybox's, taught large pictures: on crops, then on whole ones."""
    device = cli.pick_device(config.device)
    vae = copy.deepcopy(start.vae).float().to(device).requires_grad_(True)
    on_crops = (1 - WHOLE) * config.vae_steps

    def loss_of(step: int) -> Tensor:
        g = rng(config.seed, "vae", step)
        if step > on_crops:
            x = pictures[torch.randint(len(pictures), (1,), generator=g)]  # (1, 3, 256, 256)
        else:
            rows = torch.randint(len(pictures), (config.batch_size,), generator=g)
            (x,) = crops([pictures], rows, SCALE * CROP, g)  # (B, 3, 64, 64)
        return vae_loss(vae, as_floats(x).to(device), g, KL_WEIGHT, squares=(4, 16))

    def show(step: int, averaged: nn.ModuleDict) -> None:
        x = as_floats(torch.from_numpy(held_out(LARGE)).permute(0, 3, 1, 2)).to(device)
        error = (decoded(averaged["vae"], x) - x) / 2
        means = F.avg_pool2d(error, SCALE).abs().mean()
        print(f"\nvae after {step} steps: mean absolute error {error.abs().mean():.4f} on [0, 1],")
        print(f"of 4² pixels' means {means:.4f}")

    networks = nn.ModuleDict({"vae": vae})
    args = config.vae_steps, config.vae_learning_rate, show
    return fit(config, "vae", networks, loss_of, *args)["vae"]


@torch.no_grad()
def decoded(vae: VAE, x: Tensor) -> Tensor:
    """Pictures in [-1, 1] that have been through the autoencoder, two at a time."""
    return torch.cat([vae.decode(vae.encode(part)[0]).clamp(-1, 1) for part in x.split(2)])


@dataclass(frozen=True)
class Pairs:
    """What the UNet is trained on, in fp16."""

    mean: Tensor  # (N, 4, 64, 64) of the latents, scaled
    std: Tensor
    sharp: Tensor  # (N, 3, 64, 64) in [-1, 1]: the pictures, reduced
    soft: Tensor  # the same through the first stage's autoencoder
    scaling_factor: float


@torch.no_grad()
def encode_all(config: UpscalerConfig, start: StableDiffusion, vae: VAE, pictures: Tensor) -> Pairs:
    path = Path(config.work_dir) / "pairs.pt"
    if not path.exists():
        device = cli.pick_device(config.device)
        first = start.vae.to(device)
        found = []
        for part in tqdm(pictures.split(4), desc="encoding", unit="batch"):
            x = as_floats(part).to(device)
            small = reduced(x)
            soft = first.decode(first.encode(small)[0]).clamp(-1, 1)
            found.append([y.half().cpu() for y in (*vae.encode(x), small, soft)])
        mean, std, sharp, soft = (torch.cat(column) for column in zip(*found, strict=True))
        variance = mean.float().var().item() + std.float().square().mean().item()
        factor = round(1 / math.sqrt(variance), 5)
        mean, std = (mean.float() * factor).half(), (std.float() * factor).half()
        kept = {"mean": mean, "std": std, "sharp": sharp, "soft": soft, "scaling_factor": factor}
        with atomic(path) as part:
            torch.save(kept, part)
    return Pairs(**torch.load(path, weights_only=True))


# ---- the UNet ----------------------------------------------------------------------------------


@torch.no_grad()
def scaled(vae: VAE, k: float) -> VAE:
    """One whose latents are k times as large, and with FACTOR have a variance of 1."""
    vae = copy.deepcopy(vae)
    means, log_variances = vae.quant_conv.bias.chunk(2)
    vae.quant_conv.weight[: len(means)] *= k
    means *= k
    log_variances += 2 * math.log(k)
    vae.post_quant_conv.weight /= k
    vae.scaling_factor = FACTOR
    return vae


def model(start: StableDiffusion, vae: VAE, unet: UNet, factor: float) -> Upscaler:
    """The whole of it, on the UNet's device: its words are the first stage's. `factor` is this
    autoencoder's own."""
    vae = scaled(vae, factor / FACTOR)
    config = start.configs["vae"] | {"sample_size": LARGE, "scaling_factor": FACTOR}
    return Upscaler(
        start.tokenizer,
        start.text_encoder,
        vae,
        unet,
        read_schedule(SCHEDULER),
        {
            "unet": UNET_CONFIG,
            "vae": config,
            "text_encoder": start.configs["text_encoder"],
            "scheduler": SCHEDULER,
            "low_res_scheduler": X4_SMALL,
        },
        source="minibooth.toybox.pretrain_upscaler",
        licence="mit",
        levels=LEVELS,
    ).to(unet.conv_in.weight.device)


def train_unet(config: UpscalerConfig, start: StableDiffusion, vae: VAE, pairs: Pairs) -> Upscaler:
    device = cli.pick_device(config.device)
    torch.manual_seed(config.seed)
    unet = UNet(UNET_CONFIG).to(device)
    up = model(start, vae, unet, pairs.scaling_factor)
    scenes = [scene(i, config.seed) for i in range(len(pairs.mean))]
    on_crops = (1 - WHOLE) * config.steps

    def loss_of(step: int) -> Tensor:
        g, r = rng(config.seed, "unet", step), random.Random(f"{config.seed} unet {step}")
        whole = step > on_crops
        count = max(1, config.batch_size // 4) if whole else config.batch_size
        rows = torch.randint(len(scenes), (count,), generator=g)
        small = pairs.soft if r.random() < SOFT else pairs.sharp
        side = small.shape[-1] if whole else UNET_CROP
        cut = crops([pairs.mean, pairs.std, small], rows, side, g)
        mean, std, small = (x.float() for x in cut)
        words = [
            "" if r.random() < UNCONDITIONAL else world.caption(scenes[i], r) for i in rows.tolist()
        ]
        x0 = mean + std * torch.randn(mean.shape, generator=g)
        eps, eta = torch.randn(mean.shape, generator=g), torch.randn(small.shape, generator=g)
        # Mostly high t, where a sampler of few steps works, and low levels, at which it is used.
        t = (up.schedule.T * torch.rand(count, generator=g) ** 0.25).long()
        level = (LEVELS * torch.rand(count, generator=g) ** 3).long()
        x0, eps, eta, small, t, level = (v.to(device) for v in (x0, eps, eta, small, t, level))
        with torch.no_grad():
            c = replace(up.encode(words), level=level)
        seen = seeing(unet, up.noised(small, level, eta))
        step = dreambooth.step(seen, up.schedule, Term(x0, eps, t, c), None)
        error = F.avg_pool2d(step.prediction - step.target, 8)
        return step.loss + COLOURS * error.square().mean()

    def show(step: int, averaged: nn.ModuleDict) -> None:
        found = model(start, vae, averaged["unet"], pairs.scaling_factor)
        print(f"\nunet after {step} steps: {look(found, Path(config.work_dir), step)}")

    networks = nn.ModuleDict({"unet": unet})
    args = config.steps, config.learning_rate, show
    averaged = fit(config, "unet", networks, loss_of, *args)
    return model(start, vae, averaged["unet"], pairs.scaling_factor)


# ---- how good it is ----------------------------------------------------------------------------


def look(up: Upscaler, folder: Path, step: int) -> dict[str, float]:
    """Held-out pictures, enlarged from true small ones: mean absolute errors on [0, 1], and of 4²
    pixels' means; and a picture of them."""
    large = torch.from_numpy(held_out(LARGE)).permute(0, 3, 1, 2).float() / 255
    small = reduced(2 * large - 1) / 2 + 0.5
    made = up.upscale(small, [""] * len(small), noise_level=0, output="pt", **UPSCALING).cpu()
    bicubic = F.interpolate(small, (LARGE, LARGE), mode="bicubic").clamp(0, 1)
    through = decoded(up.vae, (2 * large - 1).to(up.device)).cpu() / 2 + 0.5
    found = {}
    for name, x in (("bicubic", bicubic), ("autoencoder", through), ("enlarged", made)):
        error = x - large
        found[name] = round(error.abs().mean().item(), 5)
        found[f"{name}, means"] = round(F.avg_pool2d(error, SCALE).abs().mean().item(), 5)
    rows = [to_pil(2 * x - 1) for x in (bicubic, made, large)]
    grid = sheets.grid(rows, labels=["bicubic", "enlarged", "render"])
    report.save_image(grid, folder / f"unet-{step:05d}.png")
    return found


# ---- the command -------------------------------------------------------------------------------


def pretrain(config: UpscalerConfig) -> None:
    """Run all stages, or what is left of them, and write the model (fp16) to output_dir. Raises
    UserError for settings that cannot work."""
    cli.check_choices(config)
    cli.check_at_least_one(config, ("pictures", "vae_steps", "steps", "batch_size"))
    for name in ("output_dir", "work_dir"):
        cli.check_folder(f"--{name}", getattr(config, name))
    check_start(config.start_from)
    start = pipeline.load(config.start_from)
    pictures = render_all(config)
    vae = train_vae(config, start, pictures)
    pairs = encode_all(config, start, vae, pictures)
    train_unet(config, start, vae, pairs).save(Path(config.output_dir), torch.float16)


def main() -> None:
    pretrain(
        cli.parse(
            UpscalerConfig,
            "minibooth.toybox.pretrain_upscaler",
            "Train the toybox's upscaler: an autoencoder of 256² and a UNet.",
        )
    )


if __name__ == "__main__":
    cli.run("minibooth.toybox.pretrain_upscaler", main, stopped="stopped: the same command goes on")
