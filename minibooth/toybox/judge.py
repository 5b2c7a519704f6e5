"""The judge: a small classifier that looks at toy pictures, as CLIP and DINO look at photographs.

It reads what a caption can say (class, colour, place, accessory, style), and gives an embedding in
which pictures of one and the same thing are near each other and other things of its class are
not. It was trained on rendered pictures only: `python -m minibooth.toybox.judge`.
"""

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..common import cli
from ..common.cli import option
from ..common.errors import UserError
from ..common.files import write_json
from ..formats.tensor_files import read_tensors, write_safetensors
from ..training.data import rng
from ..vae import GroupNorm, ResnetBlock
from . import world

READS: dict[str, tuple] = {
    "kind": (*world.CLASSES, world.RARE),
    "colour": tuple(world.COLOURS),
    "place": world.PLACES,
    "accessory": (None, *world.ACCESSORIES),
    "style": (*world.STYLES, world.NEON),
}
WIDTHS = (32, 64, 96, 128)  # at 32², 16², 8² and 4²
GROUPS, EPS = 8, 1e-5
EMBEDDING = 64


class Judge(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] → features, one classifier per field, and an embedding."""

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 5, stride=2, padding=2)]
        for c_in, c_out in pairwise(WIDTHS):
            layers += [GroupNorm(GROUPS, c_in, EPS), nn.SiLU()]
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)]
            layers += [ResnetBlock(c_out, c_out, GROUPS, EPS)]
        self.trunk = nn.Sequential(*layers, GroupNorm(GROUPS, WIDTHS[-1], EPS), nn.SiLU())
        pooled = 2 * WIDTHS[-1]
        self.heads = nn.ModuleDict({name: nn.Linear(pooled, len(v)) for name, v in READS.items()})
        self.embed = nn.Sequential(nn.Linear(pooled, 128), nn.SiLU(), nn.Linear(128, EMBEDDING))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits by field, each (B, values); "embedding", (B, 64) of length 1."""
        h = self.trunk(images)  # (B, 128, 4, 4)
        h = torch.cat([h.mean(dim=(2, 3)), h.amax(dim=(2, 3))], dim=1)  # (B, 256)
        out = {name: head(h) for name, head in self.heads.items()}
        return {**out, "embedding": F.normalize(self.embed(h), dim=1)}

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[list[dict], Tensor]:
        """What it reads in each picture, by field, and the embeddings (B, 64)."""
        out = [self(part) for part in images.split(256)]
        found = {name: torch.cat([o[name] for o in out]) for name in out[0]}
        best = {name: found[name].argmax(dim=1).tolist() for name in READS}
        readings = [
            {name: READS[name][best[name][i]] for name in READS} for i in range(len(images))
        ]
        return readings, found["embedding"]


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """PIL pictures → (N, 3, 64, 64) in [-1, 1]."""
    stacked = np.stack([np.asarray(p.convert("RGB")) for p in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def load(folder: str | Path) -> Judge:
    """The judge in a toybox folder. Raises UserError if it is missing or damaged."""
    path = Path(folder) / "judge" / "model.safetensors"
    if not path.exists():
        raise UserError(f"{path} is missing: python -m minibooth.toybox.judge makes it")
    judge = Judge()
    judge.load_state_dict({key: t.float() for key, t in read_tensors(path)[0].items()})
    return judge.eval().requires_grad_(False)


# ---- what is measured --------------------------------------------------------------------------


def similarity(a: Tensor, b: Tensor) -> float:
    """Mean cosine between every row of a and every row of b: the paper's DINO, and PRES."""
    return (a @ b.T).mean().item()


def self_similarity(a: Tensor) -> float:
    """The same among the rows of a, without the pairs of a row with itself."""
    n = len(a)
    return ((a @ a.T).sum().item() - n) / (n * (n - 1))


def diversity(a: Tensor) -> float:
    """Mean distance (1 − cosine) between different pictures of one prompt: the paper's DIV."""
    return 1 - self_similarity(a)


def share(readings: list[dict], **wanted) -> float:
    """The share of pictures in which all the wanted fields are read."""
    return sum(all(r[k] == v for k, v in wanted.items()) for r in readings) / len(readings)


# ---- training ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgeConfig:
    output_dir: str = option("weights/toybox", "the toybox that it is put into", place="path")
    families: int = option(800, "of four things that differ in one mark; four pictures of each")
    steps: int = option(2400, "updates")
    learning_rate: float = option(2e-3, "falling to 0 along a line")
    seed: int = option(0, "of scenes, weights and orders")


MEMBERS, VIEWS = 4, 4
TEMPERATURE = 0.1


def family(seed: int, index: int) -> list[world.Scene]:
    """Four things of one class that differ from the first in one mark or colour each."""
    r = random.Random(f"{seed} family {index}")
    kind = (*world.CLASSES, world.RARE)[index % 9]
    first = world.random_scene(r, kind=kind)
    members = [first]
    while len(members) < MEMBERS:
        fresh = world.random_scene(r, kind=kind)
        what = r.choice(("colour", "pattern", "pattern", "ear", "collar", "crooked"))
        if what == "colour":
            other = replace(first, colour=fresh.colour)
        elif what == "pattern":
            marks = replace(
                first.marks,
                pattern=fresh.marks.pattern,
                pattern_colour=fresh.marks.pattern_colour,
            )
            other = replace(first, marks=marks)
        else:
            marks = replace(first.marks, **{what: getattr(fresh.marks, what)})
            other = replace(first, marks=marks)
        if other not in members:
            members.append(other)
    return members


def views(thing: world.Scene, r: random.Random) -> list[world.Scene]:
    """The same thing in other places, poses, accessories and styles."""
    out = []
    for _ in range(VIEWS):
        at = world.random_scene(r, kind=thing.kind, colour=thing.colour, marks=thing.marks)
        neon = r.random() < 0.06
        out.append(replace(at, style=world.NEON) if neon else at)
    return out


def dataset(config: JudgeConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures (families, 4, 4, 3, 64, 64) uint8 and their labels by field (families, 4, 4)."""
    pictures, labels = [], {name: [] for name in READS}
    for index in tqdm(range(config.families), desc="rendering", unit="family"):
        r = random.Random(f"{config.seed} views {index}")
        scenes = [s for thing in family(config.seed, index) for s in views(thing, r)]
        pictures.append(world.pixels(scenes))
        for name, values in READS.items():
            labels[name].append([values.index(getattr(s, name)) for s in scenes])
    shape = (config.families, MEMBERS, VIEWS)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 1, 4, 2, 3)
    images = images.reshape(*shape, 3, world.SIDE, world.SIDE)
    return images, {name: torch.tensor(v).reshape(shape) for name, v in labels.items()}


def disturbed(images: Tensor, g: torch.Generator) -> Tensor:
    """Generated pictures are not renders: a little blur, noise, and other brightness."""
    n = len(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = 0.8 * torch.rand(n, 1, 1, 1, generator=g) * (torch.rand(n, 1, 1, 1, generator=g) < 0.5)
    images = images + share * (blurred - images)
    gain = 1 + 0.06 * torch.randn(n, 3, 1, 1, generator=g)
    noise = 0.04 * torch.rand(n, 1, 1, 1, generator=g) * torch.randn(images.shape, generator=g)
    return images * gain + noise + 0.04 * torch.randn(n, 3, 1, 1, generator=g)


def contrastive(embedding: Tensor) -> Tensor:
    """Rows 2i and 2i + 1 are one thing; each must find the other among all (InfoNCE)."""
    logits = embedding @ embedding.T / TEMPERATURE
    logits.fill_diagonal_(-1e4)
    return F.cross_entropy(logits, torch.arange(len(logits)) ^ 1)


def train(config: JudgeConfig) -> Judge:
    images, labels = dataset(config)
    torch.manual_seed(config.seed)
    judge = Judge()
    adam = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    for step in tqdm(range(config.steps), desc="judge", unit="step"):
        for group in adam.param_groups:
            group["lr"] = config.learning_rate * min(1, step / 100) * (1 - step / config.steps)
        g = rng(config.seed, "judge", step)
        rows = torch.randint(config.families, (8,), generator=g)
        pair = torch.randperm(VIEWS, generator=g)[:2]
        x = images[rows][:, :, pair].flatten(0, 2)  # (64, 3, 64, 64): pairs are neighbours
        out = judge(disturbed(x.float() / 127.5 - 1, g))
        loss = contrastive(out["embedding"])
        for name in READS:
            loss = loss + F.cross_entropy(out[name], labels[name][rows][:, :, pair].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
    return judge.eval().requires_grad_(False)


def accuracy(judge: Judge, count: int, seed: int = 10**6) -> dict[str, float]:
    """By field, over `count` renders that it was not trained on.

    "same thing": how often, among 20 things of a class, a second picture of one is nearest to the
    first of it.
    """
    r = random.Random(f"{seed} held out")
    scenes = [world.random_scene(r) for _ in range(count)]
    readings, _ = judge.look(to_tensor([world.render(s) for s in scenes]))
    out = {
        name: sum(a[name] == getattr(s, name) for a, s in zip(readings, scenes, strict=True))
        / count
        for name in READS
    }
    hits, things = 0, 20
    for kind in world.CLASSES:
        drawn = [world.random_scene(r, kind=kind) for _ in range(things)]
        pairs = [views(thing, r)[:2] for thing in drawn]
        _, e = judge.look(to_tensor([world.render(s) for pair in pairs for s in pair]))
        hits += ((e[0::2] @ e[1::2].T).argmax(dim=1) == torch.arange(things)).sum().item()
    return {**out, "same thing": hits / (things * len(world.CLASSES))}


def make(config: JudgeConfig) -> dict[str, float]:
    """Train it, put it into the toybox (fp16), and measure what was put there."""
    cli.check_at_least_one(config, ("families", "steps"))
    cli.check_folder("--output_dir", config.output_dir)
    folder = Path(config.output_dir) / "judge"
    write_safetensors(folder / "model.safetensors", train(config).state_dict(), torch.float16)
    measured = accuracy(load(config.output_dir), 2000)
    write_json(folder / "accuracy.json", measured)
    return measured


def main() -> None:
    measured = make(
        cli.parse(
            JudgeConfig,
            "minibooth.toybox.judge",
            "Train the judge of toy pictures on rendered ones.",
        )
    )
    print(", ".join(f"{name} {value:.1%}" for name, value in measured.items()))


if __name__ == "__main__":
    cli.run("minibooth.toybox.judge", main)
