"""What a model has learned of a subject, and what it has kept of its class, as the judge sees it.

The measures are the paper's (DreamBooth, section 4 and supplement), with the judge in the place of
DINO and CLIP. Similarities are cosines of the judge's embeddings; shares are of pictures drawn.
"""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ..common.files import write_json
from ..device import graphs, ranks
from ..formats import hub
from ..pipeline import StableDiffusion
from ..training import photos
from . import judge as judges
from . import world
from .judge import Judge, diversity, self_similarity, share, similarity

# How scored pictures are drawn: as good as 25 and 50 steps of DDIM (docs/class_images.md).
SAMPLING = {"sampler": "dpm++", "steps": 10, "guidance_scale": 4.0}
BATCH = 32


@dataclass(frozen=True)
class Learned:
    """Of the pictures for "a sks dog <place>"."""

    fidelity_seen: float  # similarity to the photographs, in the places where these were taken
    fidelity_held_out: float  # in places that the subject was never shown in
    prompt_seen: float  # share in which class and place are as asked for
    prompt_held_out: float
    nearest: float  # root mean square distance to the nearest photograph, pixels in [0, 1]


@dataclass(frozen=True)
class Kept:
    """Of the pictures for "a dog"."""

    pres: float  # similarity to the photographs: how far the class has become the subject
    validity: float  # share that shows a dog
    div: float  # 1 − similarity among each other


@dataclass(frozen=True)
class Yardstick:
    ceiling: float  # similarity of the photographs among each other
    floor: float  # of other things of the class, rendered, to the photographs
    div: float  # of these other things


def places(count: int) -> list[str]:
    """Every place `count` times."""
    return [place for place in world.PLACES for _ in range(count)]


def steps_to_draw(count: int) -> int:
    """Sampler steps that `draw` takes for so many pictures, batches counted once."""
    return SAMPLING["steps"] * -(-count // BATCH)


def draw(
    sd: StableDiffusion,
    prompts: list[str],
    seed: int = 10_000,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """(N, 3, 64, 64) in [-1, 1]."""
    settings = SAMPLING | {"batch_size": BATCH, "output": "pt"}
    with graphs.captured_unet(sd.unet):
        drawn = sd.generate(prompts, seed=seed, on_step=on_step, **settings)
    return 2 * drawn.cpu() - 1


def photographs(folder: str | Path) -> Tensor:
    """The subject's pictures, (N, 3, 64, 64) in [-1, 1]."""
    return photos.load_photos(folder, world.SIDE).images


def wanted(noun: str) -> dict[str, str]:
    """What the judge must read where the class is right: a drawing is a style, not a thing."""
    return {"style": noun} if noun in world.STYLES else {"kind": noun}


def learned(judge: Judge, pictures: Tensor, where: list[str], real: Tensor, noun: str) -> Learned:
    """`pictures`, (N, 3, 64, 64), were drawn for the subject at the places `where`; `noun` is its
    true class. `real` are its photographs, (P, 3, 64, 64)."""
    readings, embedded = judge.look(pictures)
    _, truth = judge.look(real)

    def of(seen: bool) -> tuple[float, float]:
        rows = [i for i, place in enumerate(where) if (place in world.SEEN) == seen]
        right = [share([readings[i]], place=where[i], **wanted(noun)) for i in rows]
        return similarity(embedded[rows], truth), sum(right) / len(rows)

    (fidelity_seen, prompt_seen), (fidelity_held_out, prompt_held_out) = of(True), of(False)
    distance = (pictures[:, None] - real[None]).square().mean(dim=(2, 3, 4)).sqrt() / 2  # (N, P)
    nearest = distance.amin(dim=1).mean().item()
    return Learned(fidelity_seen, fidelity_held_out, prompt_seen, prompt_held_out, nearest)


def kept(judge: Judge, pictures: Tensor, real: Tensor, noun: str) -> Kept:
    """`pictures`, (N, 3, 64, 64), were drawn for "a <noun>"."""
    readings, embedded = judge.look(pictures)
    _, truth = judge.look(real)
    return Kept(similarity(embedded, truth), share(readings, **wanted(noun)), diversity(embedded))


def yardstick(judge: Judge, real: Tensor, noun: str, count: int = 64) -> Yardstick:
    """What likeness to the photographs `real`, (P, 3, 64, 64), can be at best, and is by chance."""
    r = random.Random(f"other {noun}")
    scenes = [world.random_scene(r, **wanted(noun)) for _ in range(count)]
    _, others = judge.look(judges.to_tensor([world.render(s) for s in scenes]))
    _, truth = judge.look(real)
    return Yardstick(self_similarity(truth), similarity(others, truth), diversity(others))


@ranks.by_first
def after_run(sd: StableDiffusion, config) -> str:
    """Score a run on the toybox (a TrainConfig): a line each, and all of it in scores.json."""
    judge, real = judges.load(hub.toybox()), photographs(config.instance_data_dir)
    noun, folder, where = config.class_prompt.split()[-1], Path(config.output_dir), places(4)
    prompts = [f"{config.instance_prompt} {place}" for place in where]
    prompts += [config.class_prompt] * len(where)
    with tqdm(total=steps_to_draw(len(prompts)), desc="scoring", unit="step") as bar:
        subject, others = draw(sd, prompts, on_step=bar.update).split(len(where))
    new, after = learned(judge, subject, where, real, noun), kept(judge, others, real, noun)
    yard, before = yardstick(judge, real, noun), None
    if config.uses_prior:  # the class images are what the model drew before
        drawn = photographs(config.class_data_dir or folder / "class_images")
        before = kept(judge, drawn, real, noun)
    found = {"subject": new, "class before": before, "class after": after, "yardstick": yard}
    write_json(folder / "scores.json", {k: v and asdict(v) for k, v in found.items()})

    def was(field: str, form: str) -> str:
        return f" (before: {getattr(before, field):{form}})" if before else ""

    return (
        f'subject fidelity of "{config.instance_prompt}": {new.fidelity_seen:.2f} in the places of '
        f"its pictures, {new.fidelity_held_out:.2f} in places it was never shown in "
        f"(any {noun}: {yard.floor:.2f}, its pictures among themselves: {yard.ceiling:.2f})\n"
        f"prompt fidelity, class and place right: {new.prompt_seen:.0%} in the places of its "
        f"pictures, {new.prompt_held_out:.0%} in the others\n"
        f'class kept: {after.validity:.0%} of "{config.class_prompt}" show one'
        f"{was('validity', '.0%')}, likeness to the subject {after.pres:.2f}{was('pres', '.2f')}\n"
        f'diversity of "{config.class_prompt}": {after.div:.2f}{was("div", ".2f")}'
    )


def applies(config) -> bool:
    """Whether a run is one on the toybox and on a subject of its world."""
    noun = (config.class_prompt or "").removeprefix("a ")
    if config.model != "toybox" or noun not in world.DRAW:
        return False
    return (hub.toybox() / "subjects").resolve() in Path(config.instance_data_dir).resolve().parents
