"""The second stage: a small picture made four times as large, by a diffusion of its own.

DreamBooth's paper (supplement, "Personalized Instance-Specific Super-Resolution and Low-level Noise
Augmentation for Imagen") draws at 64² and has a super-resolution network make 256² of it. Not
fine-tuned, that network invents patterns on the subject, since it has never seen it. Fine-tuned on
the same photographs it keeps the subject's detail, if the noise that is put on the small picture is
lowered: with Imagen's own level, 1e-3, fine patterns blur, with 1e-5 they stay. The paper does not
say learning rate, steps, prompts, whether there is a prior term, nor in what units 1e-3 is.

The public network of this kind for Stable Diffusion is stable-diffusion-x4-upscaler: the same UNet,
given beside the latent z_t of the large picture the small one itself, three channels more. That has
noise of its own, c = √ᾱ_s x + √(1−ᾱ_s) η at a level s, which the UNet is told; it predicts v. Our
reading of the paper is that fine-tuning takes low levels s, 0 … 20, where the model was trained
with 0 … 349, and that pictures are enlarged at a level that was trained.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .common.errors import UserError
from .common.forwards import replaced
from .formats.checks import check_sampling, require_finite
from .formats.scheduler import read_schedule
from .pipeline import BUILT, StableDiffusion, projected_once, to_device, to_pil
from .schedule import ddim_step, q_sample, trajectory
from .text_encoder import Condition

SCALE = 4  # sides of the large picture, in sides of the small one
MOST = 1024 * 1024  # pixels of a small picture: decoding one of 4096² works in 64 GiB


def reduced(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1], (B, 3, 4h, 4w) → the small ones that they are to be made from again:
    (B, 3, h, w), by a bicubic filter as wide as four of the large ones' pixels, so without alias.

    What made the small pictures of the public model's own training has not been published.
    """
    size = [side // SCALE for side in pictures.shape[2:]]
    small = F.interpolate(pictures, size, mode="bicubic", antialias=True)
    return small.clamp(-1, 1)  # it overshoots at edges


def seeing(unet: Callable, small: Tensor) -> Callable[..., Tensor]:
    """The UNet of an upscaler, which has the small pictures already: a UNet as `dreambooth.step`
    and guidance know it, of (x_t, t, c), where c.level is s of each.

    small: (B, 3, h, w) as it is given, noise included. Where x_t has more samples, as with
    guidance, they are of these pictures by turns.
    """

    def of_latents(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        beside = small.repeat(len(x_t) // len(small), 1, 1, 1).to(x_t.dtype)
        return unet(torch.cat([x_t, beside], dim=1), t, c)  # (B, 4 + 3, h, w)

    return of_latents


@dataclass
class Upscaler(StableDiffusion):
    """A model of the second stage. It has the parts of a Stable Diffusion, and a second schedule:
    of the noise on the small picture, ᾱ_s. Sizes are its pictures', so the latent z of a large
    picture is as large as the small picture."""

    def __post_init__(self):
        config = self.configs["low_res_scheduler"]
        self.small_schedule = read_schedule(config).to(self.device)

    def to(self, device, **how) -> Self:
        self.small_schedule = self.small_schedule.to(device)
        return super().to(device, **how)

    def noised(self, small: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """c = √ᾱ_s x + √(1−ᾱ_s) η of small pictures x in [-1, 1]: (B, 3, h, w); level: (B,)."""
        return q_sample(small, noise, self.small_schedule.alpha_bar[level])

    @staticmethod
    def check_size(height: int, width: int) -> None:
        """Raise UserError unless a small picture can be of this size."""
        given = f"a picture of {width}×{height} pixels"
        if height % 4 or width % 4:
            raise UserError(f"{given}: what is enlarged has sides that are multiples of 4")
        if height * width > MOST:
            large = f"{SCALE * width}×{SCALE * height}"
            raise UserError(
                f"{given} would become one of {large}: give one of {MOST:,} pixels at most"
            )

    def require(
        self,
        pictures: list[Image.Image] | Tensor,
        prompts: list[str],
        noise_level: int,
        latents: Tensor | None,
        noise: Tensor | None,
    ) -> Tensor:
        """The pictures in [-1, 1]: (B, 3, h, w). Raises UserError unless all fits together."""
        if not isinstance(pictures, Tensor):
            if len({picture.size for picture in pictures}) != 1:
                raise UserError("pictures of several sizes, or none: give those of one at a time")
            rows = [np.asarray(picture.convert("RGB")) for picture in pictures]
            pictures = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 255
        B, channels, h, w = pictures.shape
        if channels != 3:
            raise UserError(f"pictures of {channels} channels: give RGB")
        self.check_size(h, w)
        if not 0 <= noise_level < self.levels:
            raise UserError(f"noise level {noise_level}: give one from 0 to {self.levels - 1}")
        if len(prompts) != B:
            raise UserError(f"{len(prompts)} prompts for {B} pictures: give one for each")
        for name, given, want in (("latents", latents, 4), ("noise", noise, 3)):
            if given is not None and given.shape != (B, want, h, w):
                raise UserError(f"{name} are {list(given.shape)}, wanted are {[B, want, h, w]}")
        return 2 * pictures.float() - 1

    @torch.no_grad()
    def upscale(
        self,
        pictures: list[Image.Image] | Tensor,
        prompts: list[str],
        *,
        noise_level: int = 20,
        steps: int = 75,
        guidance_scale: float = 9.0,
        seed: int = 0,
        negative_prompt: str = "",
        latents: Tensor | None = None,
        noise: Tensor | None = None,
        batch_size: int = 1,
        output: str = "pil",
        on_step: Callable[[], None] | None = None,
    ) -> list[Image.Image] | Tensor:
        """Enlarge each picture, under its prompt, to four times its sides, by DDIM.

        pictures: PIL, or (B, 3, h, w) in [0, 1], whose sides are multiples of 4. `noise_level` is
        s: what is lost under noise of that level is drawn anew. Picture i takes its noise from a
        CPU generator seeded with seed + i; `noise`, (B, 3, h, w), and `latents`, (B, 4, h, w),
        replace η and the first z. `output`: "pil"; "pt", (B, 3, 4h, 4w) in [0, 1]; "latent".
        Raises UserError for wrong settings, NotFinite where a network's output is not.
        """
        check_sampling(len(prompts), "ddim", output, 0.0, seed, batch_size)
        small = self.require(pictures, prompts, noise_level, latents, noise)  # (B, 3, h, w)
        finished = []
        for first in range(0, len(small), batch_size):
            batch = slice(first, first + batch_size)
            x = small[batch]
            generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(x))]

            def drawn(channels: int, given: Tensor | None, x=x, batch=batch, g=generators):
                shape = (channels, *x.shape[2:])
                if given is None:
                    given = torch.stack([torch.randn(shape, generator=own) for own in g])
                    return to_device(given, self.device)
                return given[batch].to(self.device, torch.float32)

            eta, z = drawn(3, noise), drawn(4, latents)
            c = self.encode_guided(prompts[batch], negative_prompt, guidance_scale)
            c = replace(c, level=torch.full((len(c),), noise_level, device=self.device))
            low = self.noised(to_device(x, self.device), c.level[: len(x)], eta)
            unet = seeing(self.unet.forward, low)
            with replaced([self.unet], [unet]), projected_once(self.unet):
                for t, t_prev in trajectory(self.schedule, steps, "ddim"):
                    prediction = self.predict(z, t, c, guidance_scale)
                    z = ddim_step(z, prediction, t, t_prev, self.schedule)
                    if on_step:
                        on_step()
            require_finite(c.context, "text encoder")
            require_finite(z, "unet")
            finished.append(z if output == "latent" else self.decode(z))
        result = torch.cat(finished)
        return to_pil(result) if output == "pil" else result


def require_kind(sd: StableDiffusion, given: str, upscaler: bool = False) -> None:
    """Raise UserError where a model that was `given` is an upscaler and none is wanted, or the
    reverse."""
    if upscaler and not isinstance(sd, Upscaler):
        raise UserError(f"{given} is no upscaler: give one such as the x4 upscaler's folder")
    if isinstance(sd, Upscaler) and not upscaler:
        raise UserError(
            f"{given} is an upscaler, which draws nothing by itself: give a model that draws; "
            "minibooth.sample takes this one as --upscaler, minibooth.train as --model"
        )


BUILT[4 + 3] = Upscaler  # channels of the latent and of the small picture
