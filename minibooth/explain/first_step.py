"""The first step of a run, as explain.html."""

from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from ..training import memory, report
from ..training.data import Batches
from ..training.loss import Loss
from ..training.start import Run
from . import microscope, page


def explain(
    run: Run, batches: Batches, loss: Loss, weights: dict[str, nn.Parameter], scale: Tensor
) -> Path:
    """Write explain.html into the run's folder: batch 0 as the weights are now. Nothing is updated.
    `scale` multiplies the loss for the backward pass."""
    config, sd, autocast = run.config, run.sd, run.precision.autocast
    names = report.identifiers(config.instance_prompt, config.class_prompt)
    with autocast():
        instance, prior, weight = loss.terms(batches.draw(0))
    with loss.checkpointing(), memory.visiting([sd.vae], run.device):
        seen = microscope.look(
            sd,
            instance,
            prior,
            loss.prior_loss_weight,
            weight,
            weights,
            prompt=config.instance_prompt,
            identifier=names[0] if names else None,
            autocast=autocast,
            scale=scale,
        )
    steps, strength = config.validation_inference_steps, config.validation_guidance_scale
    bar = tqdm(total=steps, desc="from noise to a picture", unit="step", leave=False)
    with bar, memory.visiting(run.idle, run.device), autocast():
        strip = microscope.film(
            sd,
            config.instance_prompt,
            steps=steps,
            guidance_scale=strength,
            seed=config.seed,
            resolution=run.resolution,
            on_step=bar.update,
        )
    about = {
        "model": f"{sd.source}, {run.device}, precision {run.precision.name}",
        "prompts": " and ".join(f"“{prompt}”" for prompt in config.prompts),
        "batch": f"{len(instance.t)} of {len(run.photos)} crops of "
        f"{len(run.photos.files)} photographs, seed {config.seed}",
        "sampling": f"{steps} DDIM steps, guidance {strength:g}",
    }
    path = run.folder / "explain.html"
    page.write(path, seen, strip, about)
    return path
