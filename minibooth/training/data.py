"""What the steps read: photographs as latents, and the batches drawn from them.

Everything random is a function of (seed, name of the term, n), not of a generator that moves on.
So batch n is the same whoever asks for it and whenever: a run that was interrupted, a step that is
done again, a test.
"""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from ..common.pictures import as_floats
from ..common.trees import each
from ..device import ranks
from ..dreambooth import Term
from ..pipeline import StableDiffusion, to_device, vae_batch
from ..upscaler import Upscaler, reduced
from .photos import Photos

SMALL_AT_ONCE = 16  # pictures that are reduced at once, in fp32


@dataclass(frozen=True)
class Latents:
    """The encoded pictures of one term: N crops of P photographs."""

    mean: Tensor  # (N, 4, h, w) scaled: mean and std of z times the VAE's scaling_factor
    std: Tensor  # (N, 4, h, w)
    photo: Tensor  # (N,) which photograph a crop is from: 0 … P − 1
    sizes: Tensor  # (N, 6) of the photographs and their crops, as in Condition
    small: Tensor | None = None  # (N, 3, h, w) an upscaler: the crops, reduced, in [-1, 1]


@dataclass(frozen=True)
class Drawn:
    """The B samples that a batch has for one term of Eq. 2, before their prompts are encoded."""

    x0: Tensor  # (B, 4, h, w)
    eps: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,)
    sizes: Tensor  # (B, 6)
    prompt: Tensor | None = None  # (B,) the prompts' numbers; None where the term has but one
    # What an upscaler sees beside x_t is √ᾱ_s x + √(1−ᾱ_s) η:
    small: Tensor | None = None  # (B, 3, h, w) x: the crops, reduced
    level: Tensor | None = None  # (B,) s: int64
    eta: Tensor | None = None  # (B, 3, h, w) η: unit Gaussian noise


@dataclass(frozen=True)
class Batch:
    """What one step is given: `common.trees.each` takes it as one thing."""

    instance: Drawn  # of the photographs
    prior: Drawn | None  # as many of the class images; None without prior preservation

    @property
    def terms(self) -> list[Drawn]:
        return [term for term in (self.instance, self.prior) if term is not None]


@torch.no_grad()
def encode(sd: StableDiffusion, pictures: Photos, flip: bool, what: str) -> Latents:
    """Encode every crop once. The latent's distribution is kept, so each step samples it anew.

    With `flip` every crop is there twice, once mirrored. `what` stands at the progress bar.
    """
    pixels, photo, sizes = pictures.pixels, pictures.photo, pictures.sizes
    if flip:
        pixels, photo = torch.cat([pixels, pixels.flip(-1)]), torch.cat([photo, photo])
        sizes = torch.cat([sizes, pictures.mirrored_sizes])
    parts = ranks.mine(pixels.split(vae_batch(pixels[0, 0].numel())))
    rows = tqdm(parts, desc=f"encoding {what}", unit="batch")
    images = (as_floats(part).to(sd.vae.quant_conv.weight.device) for part in rows)
    moments = [torch.stack(sd.vae.encode(part)).float().cpu() for part in images]
    # (N, 4, h, w) each
    mean, std = torch.cat(ranks.together(moments), dim=1) * sd.vae.scaling_factor
    small = None
    if isinstance(sd, Upscaler):
        small = torch.cat([reduced(as_floats(part)) for part in pixels.split(SMALL_AT_ONCE)])
    return Latents(mean, std, photo, sizes, small)


def rng(seed: int, *what: str | int) -> torch.Generator:
    """A generator that depends on nothing but its arguments."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


ALL = slice(None)


def in_order(seed: int, name: str, epoch: int, count: int) -> Tensor:
    """The order in which an epoch takes `count` photographs."""
    return torch.randperm(count, generator=rng(seed, name, "order", epoch))


def crop_of(latents: Latents, photo: Tensor, seed: int, name: str, k: int) -> Tensor:
    """One of the photograph's crops at random, for draw k: ()."""
    crops = (latents.photo == photo).nonzero().flatten()
    return crops[torch.randint(len(crops), (), generator=rng(seed, name, "crop", k))]


def pick(latents: Latents, seed: int, name: str, n: int, batch: int, part: slice = ALL) -> Tensor:
    """The crops of batch n, (B,), or of a part of it. Each epoch takes every photograph once, in an
    order of its own, and of each one crop at random."""
    rows, count = [], int(latents.photo.max()) + 1
    for k in range(n * batch, (n + 1) * batch)[part]:
        photo = in_order(seed, name, k // count, count)[k % count]
        rows.append(crop_of(latents, photo, seed, name, k))
    return torch.stack(rows)


def draw_term(
    latents: Latents, c: Tensor, T: int, seed: int, name: str, n: int, batch: int
) -> Term:
    """Batch n of one term of Eq. 2, with the text c: (1, 77, D)."""
    rows = pick(latents, seed, name, n, batch)
    drawn = draw_batch(latents, rows, T, seed, name, n, batch, c.device)
    return Term(drawn.x0, drawn.eps, drawn.t, c.expand(batch, -1, -1))


def draw_batch(
    latents: Latents,
    rows: Tensor,
    T: int,
    seed: int,
    name: str,
    n: int,
    batch: int,
    device: torch.device,
    part: slice = ALL,
) -> Drawn:
    """Batch n of one term, of the crops `rows`: latents sampled from the VAE's Gaussian, noise and
    timesteps; or that part of it."""
    g = rng(seed, name, "noise", n)
    shape = (batch, *latents.mean.shape[1:])
    x0 = latents.mean[rows] + latents.std[rows] * torch.randn(shape, generator=g)[part]
    eps = torch.randn(shape, generator=g)[part]
    t = torch.randint(T, (batch,), generator=g)[part]
    return each(lambda x: to_device(x, device), Drawn(x0, eps, t, latents.sizes[rows]))


@dataclass(frozen=True)
class Batches:
    """All that batches are drawn from."""

    instance: Latents  # of the photographs
    prior: Latents | None  # of the class images; None without prior preservation
    T: int  # timesteps of the schedule
    seed: int
    size: int  # photographs in a batch, and as many class images; of all ranks together
    device: torch.device
    # For each term (P, k): by photograph, the numbers of the prompts it can come under. Empty where
    # each term has one prompt.
    prompts: tuple[Tensor, ...] = ()
    # For each term (P,): by photograph, which subject it shows. Empty where there is one subject.
    shown: tuple[Tensor, ...] = ()
    share: tuple[int, int] = (0, 1)  # (i, n): of n equal parts of a batch the one drawn here
    levels: tuple[int, int] = (0, 0)  # an upscaler: the lowest s, and the highest

    def draw(self, n: int) -> Batch:
        """Batch n, or this part of it."""
        of_instance, *of_prior = self.prompts or (None, None)
        instance = self.draw_term(self.instance, "instance", of_instance, n)
        prior = self.prior and self.draw_term(self.prior, "class", *of_prior, n)
        return Batch(instance, prior)

    @property
    def part(self) -> slice:
        i, n = self.share
        return slice(i * self.size // n, (i + 1) * self.size // n)

    def rows(self, latents: Latents, name: str, n: int) -> Tensor:
        """The crops of batch n: (B,), or this part of it."""
        if name == "class" and self.shown:
            return torch.stack([self.partner(k) for k in self.numbers(n)])
        return pick(latents, self.seed, name, n, self.size, self.part)

    def partner(self, k: int) -> Tensor:
        """The class image beside photograph k: of the same subject, whose own class images each
        come once before one of them comes again."""
        of_photo, of_class = self.shown
        epoch, i = divmod(k, len(of_photo))
        order = of_photo[in_order(self.seed, "instance", epoch, len(of_photo))]  # (P,)
        subject = order[i]
        before = epoch * (order == subject).sum() + (order[:i] == subject).sum()
        own = (of_class == subject).nonzero().flatten()
        epoch, i = divmod(int(before), len(own))
        photo = own[in_order(self.seed, "class", epoch, len(own))[i]]
        return crop_of(self.prior, photo, self.seed, "class", k)

    def numbers(self, n: int) -> range:
        return range(n * self.size, (n + 1) * self.size)[self.part]

    def draw_prompts(
        self, latents: Latents, rows: Tensor, prompts: Tensor, name: str, n: int
    ) -> Tensor:
        """(B,): for each picture of the batch one at random of its photograph's prompts."""
        choice = prompts[latents.photo[rows]]  # (B, k)
        g = rng(self.seed, name, "prompt", n)
        which = torch.randint(choice.shape[1], (self.size, 1), generator=g)[self.part]
        return choice.gather(1, which)[:, 0]

    def draw_small(self, small: Tensor, rows: Tensor, name: str, n: int) -> dict[str, Tensor]:
        """What an upscaler sees of these crops: x, s and η, by generators of their own."""
        g, (lowest, highest) = rng(self.seed, name, "small", n), self.levels
        eta = torch.randn((self.size, *small.shape[1:]), generator=g)[self.part]
        level = torch.randint(lowest, highest + 1, (self.size,), generator=g)[self.part]
        drawn = {"small": small[rows], "level": level, "eta": eta}
        return {key: to_device(x, self.device) for key, x in drawn.items()}

    def draw_term(self, latents: Latents, name: str, prompts: Tensor | None, n: int) -> Drawn:
        rows, where = self.rows(latents, name, n), (self.device, self.part)
        drawn = draw_batch(latents, rows, self.T, self.seed, name, n, self.size, *where)
        if latents.small is not None:
            drawn = replace(drawn, **self.draw_small(latents.small, rows, name, n))
        if prompts is None:
            return drawn
        numbers = self.draw_prompts(latents, rows, prompts, name, n)
        return replace(drawn, prompt=to_device(numbers, self.device))
