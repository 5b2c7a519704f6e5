"""Where the time of a whole run goes, from class images to saving."""

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

from .. import toybox, train
from ..common.files import write_json
from ..training import class_images, grids, resume
from ..training.settings import TrainConfig
from .models import model
from .peers import begin

PHASES = [  # what is called in a run, and the phase that its time belongs to
    (class_images, "ensure", "class images"),
    (grids, "draw", "sample grids"),
    (resume, "save", "saving"),
    (train, "save_snapshot", "saving"),
    (train, "finish", "saving"),
]


def made_up_photographs(folder: Path, side: int) -> str:
    """A folder in `folder` with six squares of noise."""
    photographs = folder / "photographs"
    photographs.mkdir()
    for i in range(6):
        noise = torch.rand(side // 8, side // 8, 3).mul(255).byte()
        image = Image.fromarray(noise.numpy()).resize((side, side))
        image.save(photographs / f"{i}.png")
    return str(photographs)


def whole_run(size: str, device: torch.device, **changes) -> dict[str, float]:
    """Seconds of a run of the training program, by phase. On a GPU 200 class images of 50 steps and
    1,000 steps of training at 512²; on a CPU the toybox's default run, without its scores."""
    spent = dict.fromkeys([*(phase for *_, phase in PHASES), "encoding and training"], 0.0)
    settings = {"num_class_images": 200, "class_steps": 50, "sample_batch_size": 16}
    settings |= {"max_train_steps": 1000, "num_validation_images": 0, "checkpointing_steps": 1000}
    if size == "toybox":
        settings = toybox.train_settings({}) | {"model": None}
    inside = []

    def timed(function: Callable, phase: str) -> Callable:
        def call(*args, **options):
            inside.append(phase)
            start, before = time.perf_counter(), sum(spent.values())
            result = function(*args, **options)
            inner = sum(spent.values()) - before  # "finish" draws pictures, too
            spent[inside.pop()] += time.perf_counter() - start - inner
            return result

        return call

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for where, name, phase in PHASES:
            function = timed(getattr(where, name), phase)
            stack.enter_context(mock.patch.object(where, name, function))
        sd = model(size, torch.device("cpu"))
        settings["instance_data_dir"] = made_up_photographs(Path(folder), sd.image_size)
        settings |= {"instance_prompt": "a sks dog", "class_prompt": "a dog"}
        settings |= {"output_dir": f"{folder}/out"}
        start = time.perf_counter()
        train.train(TrainConfig(**settings | changes), sd)
        total = time.perf_counter() - start
    spent["encoding and training"] = total - sum(spent.values())
    return {**spent, "total": total}


def benchmark(what: str, minutes: float, output: Path) -> None:
    """Measures, prints and writes run-<cpu or cuda>.json. However long it takes: it is one run."""
    device, size, report, name = begin(what, output)
    report["seconds"] = whole_run(size, device)
    write_json(name.with_suffix(".json"), report)
    print(", ".join(f"{phase} {spent:.1f} s" for phase, spent in report["seconds"].items()))
