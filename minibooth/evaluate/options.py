"""What the three commands share: who looks, what the paper leaves open, how pictures are drawn."""

import math
from dataclasses import dataclass
from pathlib import Path

from .. import toybox
from ..common import cli
from ..common.cli import option
from ..common.errors import UserError
from ..formats import families, hub
from ..toybox import score
from ..training.settings import TrainConfig


@dataclass(frozen=True)
class Options:
    judge: str = option(
        "public",
        "who looks at the pictures: public (CLIP, DINO and LPIPS), or the toybox's judge, which "
        "goes with the toybox where nothing else is said",
        choices=("public", "toybox"),
        topic="who looks",
    )
    clip: str = option(
        "openai/clip-vit-base-patch32",
        "folder or hub id; the paper does not say which CLIP it is, ViT-B/32 fits its numbers best",
        place="source",
    )
    dino: str = option("facebook/dino-vits16", "folder or hub id: DINO ViT-S/16", place="source")
    lpips: str = option(
        "alex",
        "network under LPIPS; the paper does not say which",
        choices=("alex", "vgg", "squeeze"),
    )
    resize: int = option(
        256,
        "shorter side in pixels before CLIP and DINO are shown the middle 224²; "
        "224 is CLIP's own way",
    )

    identifier: str = option(
        "sks",
        "the rare word that names the subject in the prompts",
        topic="what the paper leaves open",
    )
    identifier_in_text: bool = option(
        False, "CLIP-T compares with the prompt as it was drawn; else the identifier is left out"
    )
    self_pairs: str = option(
        "both",
        "whether real photographs among themselves include each one with itself (cosine 1)",
        choices=("both", "with", "without"),
    )

    images: int = option(4, "pictures per prompt", topic="how pictures are drawn")
    class_images: int = option(
        16, "pictures of the bare class prompt, for PRES; the paper does not say how many"
    )
    steps: int = option(50, "DDIM steps of every picture", aliases=("num_inference_steps",))
    guidance_scale: float = option(
        7.5,
        "how strongly to follow the prompt; 1 switches it off, SDXL's default is "
        f"{families.GUIDANCE:g}",
    )
    seed: int = option(0, "of each prompt's first picture; the next ones count up")
    batch_size: int = option(4, "pictures drawn at once; less needs less memory")
    device: str = option("auto", "auto, cuda, mps or cpu")

    def check(self) -> None:
        """Raise UserError for settings that cannot work, before anything is loaded."""
        cli.check_choices(self)
        cli.check_at_least_one(self, ("images", "class_images", "steps", "batch_size"))
        if not 224 <= self.resize <= 4096:
            raise UserError("--resize must be a number from 224 to 4096")
        if not 0 <= self.guidance_scale < math.inf:
            raise UserError("--guidance_scale must be a number from 0 up")
        if not 0 <= self.seed < 2**62:
            raise UserError("--seed must be a number from 0 up")
        if len(self.identifier.split()) != 1:
            raise UserError("--identifier must be one word")

    @property
    def self_pair_choices(self) -> list[bool]:
        """Which rows of the real photographs are wanted: with self-pairs, without, or both."""
        return {"both": [True, False], "with": [True], "without": [False]}[self.self_pairs]


def suitable_settings(given: dict) -> dict:
    """What suits the model: SDXL, or the toybox, where it is that or its judge is to look."""
    models = [given.get("model"), given.get("generated"), given.get("judge")]
    model, revision = given.get("model"), given.get("revision")
    if "run" in given:
        run = read_run(Path(given["run"]))
        model, revision = run.model, run.revision
        models.append(model)
    if "toybox" not in models:
        return families.draw_settings({"model": model, "revision": revision})
    run = toybox.default_run()
    settings = {
        "judge": "toybox",
        "steps": 25,  # of DDIM, the only sampler of this program
        "guidance_scale": score.SAMPLING["guidance_scale"],
        "batch_size": run["sample_batch_size"],
    }
    return settings | ({"data": str(hub.toybox() / "subjects")} if "model" in given else {})


def read_run(run: Path) -> TrainConfig:
    """The settings of a run of minibooth.train. Raises UserError if `run` is no such folder."""
    path = run / "config.json"
    if not path.exists():
        raise UserError(f"{run} is not the folder of a run: it holds no config.json")
    return TrainConfig(**cli.read_config(path, TrainConfig))
