"""StableDiffusion: the parts together. Load, encode a prompt, draw pictures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from . import schedule
from .common.forwards import replaced
from .common.trees import each
from .formats import checkpoint, hub, sources
from .formats.checks import check_fit, check_sampling, require_finite
from .formats.parts import Parts
from .formats.scheduler import settle
from .text_encoder import Condition, encode
from .tokenizer import Tokenizer
from .unet import TextBlock, TransformerBlock, UNet

VAE_PIXELS = 256 * 256  # that go through the VAE at once: its memory grows with them
BUILT: dict[int, type] = {}  # by a UNet's channels, the class of another model, which enters itself


class StableDiffusion(Parts):
    """A whole model. Data flows tokenizer → text_encoder → unet (steps times, as the schedule says)
    → vae. These are its attributes; formats/parts.py has their types, and how they are saved."""

    def encode(self, prompts: list[str] | Tensor) -> Condition:
        """Prompts, or the tokenizer's ids of them → c without sizes, which belong to a picture."""
        ids = prompts if isinstance(prompts, Tensor) else self.tokenizer(prompts)
        return each(lambda x: x.to(self.device), encode(list(self.text_encoders.values()), ids))

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> Tensor | Condition:
        """What the UNet and Term.c take for prompts: (B, 77, D); SDXL's with the sizes of a whole
        picture."""
        c = self.encode(prompts)
        return c.context if c.pooled is None else c.whole(self.image_size, self.image_size)

    @torch.no_grad()
    def generate(
        self,
        prompts: str | list[str],
        *,
        negative_prompt: str = "",
        steps: int = 50,
        guidance_scale: float = 7.5,
        seed: int = 0,
        sampler: str = "ddim",
        eta: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        batch_size: int | None = None,
        output: str = "pil",
        on_step: Callable[[], None] | None = None,
    ) -> list[Image.Image] | Tensor:
        """Draw one picture per prompt.

        Picture i takes all its noise from a CPU generator seeded with seed + i, so it depends
        neither on the device nor on the batch. `latents`, (B, 4, h, w), replace the first noise and
        set the size. guidance_scale ≤ 1 switches guidance off. height and width are in pixels,
        multiples of the VAE's factor; without them the size is that of the training. `output`:
        "pil"; "pt", (B, 3, H, W) in [0, 1]; "latent", (B, 4, h, w) scaled. `on_step` is called
        after every step. Raises UserError for wrong settings, NotFinite where an output is not.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        shape = self.latent_shape(len(prompts), height, width, latents)  # (4, h, w)
        check_sampling(len(prompts), sampler, output, eta, seed, batch_size)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        finished = []
        for first in range(0, len(prompts), batch_size or 8):
            batch = slice(first, first + (batch_size or 8))

            def noise(batch=batch) -> Tensor:
                drawn = [torch.randn(shape, generator=g) for g in generators[batch]]
                return to_device(torch.stack(drawn), self.device)  # (B, 4, h, w)

            x = noise() if latents is None else latents[batch].to(self.device, torch.float32)
            c = self.encode_guided(prompts[batch], negative_prompt, guidance_scale)
            c = c.whole(*(side * self.vae.factor for side in shape[1:]))
            last = None  # what dpm++ remembers of the step before
            with projected_once(self.unet):
                for t, t_prev in schedule.trajectory(self.schedule, steps, sampler):
                    prediction = self.predict(x, t, c, guidance_scale)
                    if sampler == "ddpm":
                        x = schedule.ddpm_step(x, prediction, t, t_prev, self.schedule, noise())
                    elif sampler == "dpm++":
                        x, last = schedule.dpm_step(x, prediction, t, t_prev, self.schedule, last)
                    else:
                        fresh = noise() if eta > 0 else None
                        x = schedule.ddim_step(x, prediction, t, t_prev, self.schedule, eta, fresh)
                    if on_step:
                        on_step()
            require_finite(c.context, "text encoder")
            require_finite(x, "unet")
            finished.append(x if output == "latent" else self.decode(x))
        result = torch.cat(finished)
        return to_pil(result) if output == "pil" else result

    @torch.no_grad()
    def encode_guided(
        self, prompts: list[str], negative_prompt: str, guidance_scale: float
    ) -> Condition:
        """What `predict` wants but sizes: of 2B, first B times the negative prompt, then the
        prompts; without guidance, guidance_scale ≤ 1, of the prompts alone."""
        if guidance_scale <= 1:
            return self.encode(prompts)
        n = len(prompts)
        c = self.encode([negative_prompt] * n + prompts)
        if not negative_prompt and self.zeros_for_empty:
            c = each(lambda x: torch.cat([torch.zeros_like(x[:n]), x[n:]]), c)
        return c

    def predict(self, x: Tensor, t: int, c: Tensor | Condition, guidance_scale: float) -> Tensor:
        """The UNet's ε̂ or v̂ for x: (B, 4, h, w), with guidance (arXiv 2207.12598 Eq. 6).

        Both prompts go through the UNet in one batch, c as `encode_guided` gives it, and the
        difference that the prompt makes against the negative one is exaggerated.
        """
        times = torch.full((len(c),), t, device=self.device)
        if guidance_scale <= 1:
            return self.unet(x, times, c).float()
        without, towards = self.unet(torch.cat([x, x]), times, c).float().chunk(2)
        return without + guidance_scale * (towards - without)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) → (B, 3, H, W) in [0, 1], a few at a time to save memory;
        raises NotFinite where a picture is not."""
        z = latents / self.vae.scaling_factor
        few = vae_batch(z[0, 0].numel() * self.vae.factor**2)
        with torch.autocast(z.device.type, enabled=False):  # the VAE in its own precision
            pictures = torch.cat([self.vae.decode(part).float() for part in z.split(few)])
        require_finite(pictures, "vae")
        return (pictures / 2 + 0.5).clamp(0, 1)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Without waiting for it: from page-locked memory a GPU fetches by itself."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [0, 1] → N RGB pictures."""
    pixels = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def vae_batch(pixels: int) -> int:
    """How many pictures of so many pixels the VAE takes at once: one at least."""
    return max(1, VAE_PIXELS // pixels)


def text_projections(unet: UNet) -> list[torch.nn.Module]:
    """Every layer of the UNet that makes keys or values of the text."""
    attend = [m.attn2 for m in unet.modules() if isinstance(m, TransformerBlock)]
    attend += [m.attn1 for m in unet.modules() if isinstance(m, TextBlock)]
    return [project for a in attend for project in (a.to_k, a.to_v)]


@contextmanager
def projected_once(unet: UNet) -> Iterator[None]:
    """Within it, the text's keys and values are computed once and not at every step.

    A projection that is given the same tensor again returns what it returned before: neither text
    nor weights may be written to in the meantime.
    """

    def remembering(project: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        last: list[Tensor | None] = [None, None]

        def forward(context: Tensor) -> Tensor:
            if last[0] is not context:
                last[:] = context, project(context)
            return last[1]

        return forward

    projections = text_projections(unet)
    with replaced(projections, [remembering(p.forward) for p in projections]):
        yield


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: str | Path | Tokenizer | None = None,
    vae: str | Path | None = None,
    prediction_type: str | None = None,
    revision: str | None = None,
    ema: bool = False,
) -> StableDiffusion:
    """Load a model: a folder in diffusers' layout, a single file, or an id on the hub.

    `tokenizer` (folder or id) and `vae` (folder, id or file) replace the model's own; `revision` is
    the hub's; `prediction_type` overrides what the model says; `ema` takes a single file's averaged
    weights. Under fp16 the VAE stays fp32, since some overflow to black pictures. Raises UserError
    where the source is no model of these, damaged or hostile, or its parts do not fit together.
    """
    found = sources.read(source, tokenizer, vae, revision, ema)
    networks = checkpoint.build_all(found, dtype, device)
    check_fit(source, found)
    return BUILT.get(found.configs["unet"]["in_channels"], StableDiffusion)(
        tokenizer=found.tokenizer,
        schedule=settle(found, networks["unet"], prediction_type).to(device),
        configs=found.configs,
        source=hub.public_name(source),
        licence=found.licence,
        licence_files=found.licence_files,
        zeros_for_empty=found.zeros_for_empty,
        levels=found.levels,
        **networks,
    )
