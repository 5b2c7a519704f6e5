"""The first step of a run, as explain.html: before training and, in the end, beside what it was."""

import io
import pickle
import warnings
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..common.errors import first_line
from ..common.files import atomic
from ..device import memory, ranks
from ..dreambooth import Step
from ..training import report
from ..training.data import Batches
from ..training.loss import Loss
from ..training.start import Run
from . import microscope, page
from .page import View

KEPT = "state/explain.pt"  # the view from before training, in the run's folder
IN_IT = [View, Step, microscope.Look, microscope.Entry, microscope.Sample, microscope.Gradient]
IN_IT += [microscope.LowRank, microscope.Attended, microscope.Frame]  # and tensors, nothing else


@ranks.by_first
def explain(
    run: Run,
    batches: Batches,
    loss: Loss,
    weights: dict[str, nn.Parameter],
    scale: Tensor,
    step: int | None = None,
) -> Path:
    """Write explain.html into the run's folder: batch 0 as the weights are now. Nothing is updated.

    `scale` multiplies the loss for the backward pass. In training `step` are the updates done: what
    is seen at 0 is kept, and stands beside what is seen later.
    """
    config = run.config
    view = View("", *look(run, batches, loss, weights, scale))
    views, kept = [view], run.folder / KEPT
    if step == 0:
        keep(kept, view)
    elif step is not None and (before := fetch(kept)):
        views = [before._replace(when="before"), view._replace(when=f"after {step} steps")]
    about = {
        "model": f"{run.sd.source}, {run.device}, precision {run.precision.name}",
        "prompts": " and ".join(f"“{prompt}”" for prompt in config.prompts),
        "batch": f"{len(view.seen.instance)} of {len(run.photos)} crops of "
        f"{len(run.photos.files)} photographs, seed {config.seed}",
        "sampling": f"{config.validation_inference_steps} DDIM steps, "
        f"guidance {config.validation_guidance_scale:g}",
    }
    path = run.folder / "explain.html"
    page.write(path, views, about)
    return path


def look(
    run: Run, batches: Batches, loss: Loss, weights: dict[str, nn.Parameter], scale: Tensor
) -> tuple[microscope.Look, list[microscope.Frame]]:
    """Batch 0, and a sampling, as the weights are now."""
    config, sd, autocast = run.config, run.sd, run.precision.autocast
    classes = [s.class_prompt or "" for s in config.subjects]
    drawn = batches.draw(0)
    prompts = loss.prompts_of(drawn)
    prompt, alike = prompts[0], len(list(takewhile(prompts[0].__eq__, prompts)))
    names = report.identifiers(prompt, " ".join(classes))
    adapters = {name: m for name, m in run.trained.items() if isinstance(m, nn.ModuleDict)}
    with autocast():
        instance, prior, weight = loss.terms(drawn)
    with loss.checkpointing(), memory.visiting([sd.vae], run.device):
        seen = microscope.look(
            sd,
            instance,
            prior,
            loss.prior_loss_weight,
            weight,
            weights,
            prompt=prompt,
            identifier=names[0] if names else None,
            autocast=autocast,
            scale=scale,
            adapters=adapters,
            alike=alike,
        )
    steps, strength = config.validation_inference_steps, config.validation_guidance_scale
    bar = tqdm(total=steps, desc="from noise to a picture", unit="step", leave=False)
    with bar, memory.visiting(run.idle, run.device), autocast():
        strip = microscope.film(
            sd,
            prompt,
            steps=steps,
            guidance_scale=strength,
            seed=config.seed,
            resolution=run.resolution,
            captured=not config.saves_memory,
            on_step=bar.update,
        )
    return seen, strip


def keep(path: Path, view: View) -> None:
    written = io.BytesIO()  # PyTorch's own writing says nothing of a disk that is full
    torch.save(view, written)
    with atomic(path) as part:
        part.write_bytes(written.getvalue())


def fetch(path: Path) -> View | None:
    """What was kept; None, with a warning, where it is damaged or was never kept."""
    try:
        with torch.serialization.safe_globals(IN_IT):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as e:
        problem = f"there is no whole {path} ({first_line(e)})"
        warnings.warn(f"{problem}: explain.html shows the last step alone", stacklevel=2)
        return None
