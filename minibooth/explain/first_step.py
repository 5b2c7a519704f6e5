"""The first step of a run, as explain.html."""

from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from ..training import memory, ranks, report
from ..training.data import Batches
from ..training.loss import Loss
from ..training.start import Run
from . import microscope, page


@ranks.by_first
def explain(
    run: Run, batches: Batches, loss: Loss, weights: dict[str, nn.Parameter], scale: Tensor
) -> Path:
    """Write explain.html into the run's folder: batch 0 as the weights are now. Nothing is updated.
    `scale` multiplies the loss for the backward pass."""
    config, sd, autocast = run.config, run.sd, run.precision.autocast
    drawn = batches.draw(0)
    prompt, classes = loss.prompts_of(drawn)[0], [s.class_prompt or "" for s in config.subjects]
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
            on_step=bar.update,
        )
    about = {
        "model": f"{config.model or sd.source}, {run.device}, precision {run.precision.name}",
        "prompts": " and ".join(f"“{prompt}”" for prompt in config.prompts),
        "batch": f"{len(instance.t)} of {len(run.photos)} crops of "
        f"{len(run.photos.files)} photographs, seed {config.seed}",
        "sampling": f"{steps} DDIM steps, guidance {strength:g}",
    }
    path = run.folder / "explain.html"
    page.write(path, seen, strip, about)
    return path
