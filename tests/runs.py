"""Short runs on small models: what the tests of training, resume, faults and programs share."""

import functools
import sys
import warnings
from pathlib import Path

import numpy as np
import peers
import torch
from PIL import Image
from torch import Tensor

from minibooth import load
from minibooth.common import cli
from minibooth.pipeline import StableDiffusion
from minibooth.train import TrainConfig


@functools.cache
def photographs(times: int = 1) -> Path:
    """Three pictures, of which one gives three crops: five crops in all. For an upscaler `times` as
    large."""
    folder = Path(peers.KEPT.name) / f"photographs-{times}"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for i, size in enumerate([(32, 32), (32, 52), (48, 48)]):
        pixels = noise.integers(0, 255, (size[0] * times, size[1] * times, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def settings(output_dir: Path, **changes) -> dict:
    """Of a run of 3 steps, a second or so. Class images are drawn once for all tests."""
    model = changes.pop("kind", "half")
    if model == "x4":
        upscaler = {"instance_data_dir": str(photographs(2)), "resolution": 32}
        changes = upscaler | {"base_model": str(peers.model("half")[0])} | changes
    return {
        "model": str(peers.model(model)[0]),
        "instance_data_dir": str(photographs()),
        "instance_prompt": "a sks dog",
        "class_prompt": "a dog",
        "output_dir": str(output_dir),
        "class_data_dir": str(Path(peers.KEPT.name) / "class_images"),
        "num_class_images": 3,
        "class_steps": 2,
        "max_train_steps": 3,
        "learning_rate": 1e-3,
        "text_encoder_learning_rate": 5e-4,
        "num_validation_images": 0,
        "validation_inference_steps": 2,
        "device": "cpu",
    } | changes


def config(output_dir: Path, **changes) -> TrainConfig:
    return TrainConfig(**settings(output_dir, **changes))


def model(kind: str = "half") -> StableDiffusion:
    return load(peers.model(kind)[0])


def flat(state: dict[str, Tensor]) -> Tensor:
    """All weights of a network as one vector, in the order of their names."""
    return torch.cat([state[key].double().flatten() for key in sorted(state)])


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def arguments(options: dict) -> list[str]:
    """The same settings as a command line."""
    out = []
    for name, value in options.items():
        if isinstance(value, bool):
            out.append(f"--{'' if value else 'no_'}{name}")
        elif value is not None:
            out += [f"--{name}", str(value)]
    return out


def program(monkeypatch, capsys, module, *given) -> tuple[int, str, str]:
    """Run a program's main as `python -m` does: exit status, stdout, stderr."""
    capsys.readouterr()
    name = module.__name__.removesuffix(".__main__")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, given)])
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # cli.run replaces it
        try:
            cli.run(name, module.main)
            status = 0
        except SystemExit as e:
            status = e.code
    out, err = capsys.readouterr()
    return status, out, err
