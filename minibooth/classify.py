"""python -m minibooth.classify: which class noun do photographs go by? The model itself is asked.

DreamBooth's class noun "can be provided by the user or obtained using a classifier" (2208.12242,
section 3.2). The model is one (2303.16203): under the right noun it predicts the noise best.

    ĉ = argmin_c E_{t,ε} ‖ε − ε_θ(√ᾱ_t x + √(1−ᾱ_t) ε, c)‖²

That is the first term of the loss that is then trained. It depends on the noise as much as on the
noun, and on the timestep far more. So each noun is given the same ones, and what counts is how the
losses differ, draw by draw. Most nouns are far off, and drop out after the first draws.
"""

import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from . import pipeline
from .common import cli
from .common.cli import option
from .common.errors import UserError
from .common.trees import each
from .device import no_gpu
from .dreambooth import Term, step
from .formats import checks, hub
from .formats.configs import is_public_size
from .pipeline import StableDiffusion, projected_once
from .text_encoder import Condition
from .toybox import world
from .training import photos, report
from .training.data import encode, rng

# DreamBooth's own nouns (its data set), then what else people have photographs of.
NOUNS = (
    *("backpack", "stuffed animal", "bowl", "can", "candle", "cat", "clock", "sneaker", "dog"),
    *("toy", "boot", "glasses", "cartoon", "teapot", "vase"),
    *("person", "man", "woman", "child", "baby", "horse", "cow", "sheep", "pig", "rabbit"),
    *("hamster", "bird", "chicken", "duck", "fish", "turtle", "lizard", "snake", "butterfly"),
    *("car", "truck", "bus", "bicycle", "motorcycle", "boat", "airplane", "train", "house"),
    *("church", "bridge", "tree", "flower", "mushroom", "fruit", "cake", "cup", "bottle", "chair"),
    *("table", "sofa", "lamp", "bed", "book", "phone", "camera", "guitar", "bag", "hat", "shirt"),
    *("dress", "watch", "umbrella", "statue", "robot", "painting", "drawing"),
)
TOYBOX_NOUNS = (*world.CLASSES, world.RARE, "drawing")
FEW_WORDS = 10_000  # a vocabulary of fewer is the toybox's, or of what was trained from it

STAGES = ((16, 0.25), (32, 0.25), (96, 1.0))  # draws for each noun that is left; who then stays
BATCH = 8  # draws that go through the UNet at once
SURE = 2  # standard errors by which the best noun must be ahead


@dataclass(frozen=True)
class ClassifyConfig:
    model: str | None = option(
        None, "folder, single file (.safetensors, .ckpt), hub id, or toybox", place="source"
    )
    photos: str | None = option(None, "folder with the photographs of the subject", place="path")
    nouns: str | None = option(
        None,
        "to choose from, with commas between [the paper's and everyday ones, or the toybox's]",
    )
    seed: int = option(0, "of the noises")
    device: str = option("auto", "auto, cuda, mps or cpu")


@dataclass(frozen=True)
class Rank:
    """A noun, and by how much it does worse than the best one on the same draws."""

    noun: str
    difference: float  # mean of loss − the best noun's loss; 0 for the best
    error: float  # its standard error
    draws: int  # that it stayed for
    unsure: bool  # it stayed to the end, and the difference is no more than SURE errors


def prompt_of(noun: str) -> str:
    return f"{world.article(noun)} {noun}"


def draw(x: Tensor, T: int, seed: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws `first` to `first + count`, for latents x of the photographs, (P, 4, h, w): these by
    turns, noises, both (count, 4, h, w), and evenly spaced timesteps, (count,)."""
    numbers = range(first, first + count)
    noises = [torch.randn(x.shape[1:], generator=rng(seed, "classify", k)) for k in numbers]
    t = (torch.arange(count) + 0.5) * T / count
    return x[[k % len(x) for k in numbers]], torch.stack(noises), t.long()


@torch.no_grad()
def losses(sd: StableDiffusion, c: Condition, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Eq. 2's first term for every draw, (n,), under one text c. Raises NotFinite."""
    found, texts = [], {}
    with projected_once(sd.unet):
        for drawn in zip(*(x.to(sd.device).split(BATCH) for x in (x0, eps, t)), strict=True):
            # `step` puts its terms' texts together anew: keys and values are kept for this tensor.
            n = len(drawn[0])
            text = texts.setdefault(n, each(lambda x, n=n: x.expand(n, *x.shape[1:]), c))
            term = Term(*drawn, text)
            done = step(lambda x_t, t, _, c=text: sd.unet(x_t, t, c), sd.schedule, term, None)
            found.append(done.per_sample)
    every = torch.cat(found).float().cpu()  # only here the host waits for the device
    checks.require_finite(every, "unet")
    return every


def who_stay(nouns: int, share: float) -> int:
    return max(2, math.ceil(share * nouns))


def passes(nouns: int) -> int:
    """Draws of all nouns in all stages: passes of the UNet, of one sample each."""
    total = 0
    for count, share in STAGES:
        total, nouns = total + count * nouns, who_stay(nouns, share)
    return total


def rank(
    sd: StableDiffusion,
    x: Tensor,
    nouns: list[str],
    seed: int = 0,
    on_passes: Callable[[int], None] = lambda n: None,
) -> list[Rank]:
    """The nouns, best first; those that dropped out early come last. `x`: (P, 4, h, w), scaled
    latents of the photographs; `on_passes` is told of every few passes. Raises NotFinite."""
    with torch.no_grad():
        texts = sd.encode([prompt_of(noun) for noun in nouns]).whole(sd.image_size, sd.image_size)
    c = {noun: texts[i : i + 1] for i, noun in enumerate(nouns)}
    found = {noun: torch.zeros(0) for noun in nouns}  # the loss of each draw that it stayed for
    left, out, first = list(nouns), [], 0
    for count, share in STAGES:
        drawn = draw(x, len(sd.schedule.alpha_bar), seed, first, count)
        for noun in left:
            found[noun] = torch.cat([found[noun], losses(sd, c[noun], *drawn)])
            on_passes(count)
        left.sort(key=lambda noun: found[noun].mean().item())
        keep, first = who_stay(len(left), share), first + count
        left, out = left[:keep], left[keep:] + out
    ranks = []
    for noun in left + out:
        n = len(found[noun])
        differences = (found[noun] - found[left[0]][:n]).double()
        mean, error = differences.mean().item(), differences.std().item() / math.sqrt(n)
        ranks.append(Rank(noun, mean, error, n, noun in left[1:] and mean <= SURE * error))
    return ranks


def listed(nouns: str) -> list[str]:
    """Without repetitions, which the tokenizer's small letters make of capitals, too. Raises
    UserError where there is nothing to choose from."""
    found = list(dict.fromkeys(" ".join(n.lower().split()) for n in nouns.split(",") if n.strip()))
    if len(found) < 2:
        raise UserError(f'--nouns "{nouns}": give two at least, say "dog,cat"')
    return found


def classify(config: ClassifyConfig) -> list[Rank]:
    """Load the model and the photographs, and rank the nouns. Raises UserError."""
    if config.model is None or config.photos is None:
        raise UserError("give --model (a folder, single file or hub id) and --photos (a folder)")
    cli.check_choices(config)
    nouns = listed(config.nouns) if config.nouns is not None else None
    files = photos.photographs(config.photos)
    device = cli.pick_device(config.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    sd = pipeline.load(config.model, device=device, dtype=dtype)
    sd.latent_shape(1, None, None, None)  # refuses a UNet that sees more than noise and a prompt
    if config.device == "auto" and device.type == "cpu" and is_public_size(sd.configs):
        warnings.warn(f"this takes long, as no GPU can be used: {no_gpu.why()}", stacklevel=2)
    pictures = photos.load_photos(files, sd.image_size, center_crop=True)
    x = encode(sd, pictures, flip=False, what="photographs").mean
    nouns = nouns or list(TOYBOX_NOUNS if len(sd.tokenizer.vocab) < FEW_WORDS else NOUNS)
    total = passes(len(nouns))
    print(f"{len(nouns)} nouns, {total} passes of the UNet", file=sys.stderr)
    with tqdm(total=total, desc="nouns", unit="pass") as bar:
        return rank(sd, x, nouns, config.seed, bar.update)


def told(ranks: list[Rank]) -> str:
    """What is printed: the best noun alone in its line, so that a script can use it."""
    lines = [ranks[0].noun]
    if close := [r.noun for r in ranks if r.unsure]:
        lines.append(f"not sure: it could be {' or '.join(close)}, within {SURE} standard errors")
    width = max(len(r.noun) for r in ranks)
    lines.append(f"{'':{width}}  difference  its error  draws")
    rows = (f"{r.noun:{width}} {r.difference:11.6f} {r.error:10.6f} {r.draws:6}" for r in ranks)
    return "\n".join([*lines, *rows])


def toybox_s_own(given: dict) -> dict:
    """As in training: the toybox, and its dog, where no photographs are given."""
    if given.get("model", None if "photos" in given else "toybox") != "toybox":
        return {}
    return {"model": "toybox", "photos": str(hub.toybox() / "subjects" / "spotted_dog")}


def main() -> None:
    config = cli.parse(
        ClassifyConfig,
        "minibooth.classify",
        "Find the class noun of photographs: the one under which the model's loss is least.",
        defaults=toybox_s_own,
    )
    ranks = classify(config)
    print(told(ranks))
    noun = ranks[0].noun
    prompts = "--instance_prompt", f"a sks {noun}", "--class_prompt", prompt_of(noun)
    where = "--model", config.model, "--instance_data_dir", config.photos
    print(f"to go on: {report.command('minibooth.train', *where, *prompts)}", file=sys.stderr)


if __name__ == "__main__":
    cli.run("minibooth.classify", main)
