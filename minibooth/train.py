"""python -m minibooth.train: DreamBooth on a folder of photographs.

photographs → latents (mean and std, cached) → noisy latents → UNet → loss → update → pictures.

`train` is the whole run, `learn` its loop, `one_update` a training step. What the names called
there stand for is in minibooth/training; the loss itself is dreambooth.step.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import toybox
from .common import cli
from .common.errors import UserError
from .device import graphs, ranks
from .dreambooth import Step
from .explain import first_step
from .formats import families
from .pipeline import StableDiffusion, to_device
from .toybox import enlarged, score
from .training import (
    curve,
    finite,
    fit,
    grids,
    methods,
    optimizer,
    parameters,
    passes,
    prepare,
    report,
    resume,
    snapshots,
    start,
    stop,
)
from .training.data import Batch, Batches
from .training.loss import Loss
from .training.optimizer import Update
from .training.settings import TrainConfig
from .training.start import Run

Watcher = Callable[[int, Step], None]


def train(
    config: TrainConfig, sd: StableDiffusion | None = None, on_step: Watcher | None = None
) -> StableDiffusion:
    """Run DreamBooth as `config` says and write the result into config.output_dir.

    `sd` is trained in place if given, else config.model is loaded. `on_step(step, result)` is
    called after the backward pass of every batch, before the update. Returns the trained model.
    Raises UserError for whatever the user can mend.
    """
    device = start.check(config, has_model=sd is not None)
    with start.folder_of(config):
        if sd is None:
            start.look_ahead(config, device)
            sd = start.load(config)
        with fit.advised(sd, config):
            run = Run(config, sd, device)
        with fit.advised(sd, run.config, run.precision.dtype is not None):
            start.announce(run)
            originals = parameters.originals(run.trained)
            # Who looks on wants what a step leaves behind; 8-bit AdamW waits for the device.
            captured = not (on_step or run.config.use_8bit_adam)
            batches, loss, identity = prepare.gather(run, captured)
            before = grids.draw(run)
            grids.save(run, 0, before)
            adam = prepare.make_optimizer(run, captured)
            learn(run, batches, loss, adam, identity, captured, on_step)
            finish(run, before, originals)
            if score.applies(run.config):
                print(score.after_run(sd, run.config))
    return sd


def one_update(
    loss_of: Loss, adam: Update, on_step: Watcher | None = None
) -> Callable[..., Tensor]:
    """A training step: a function of its number, what multiplies the learning rates, and the
    batches drawn for it. It returns (4,): the loss, its two terms, the norm of the
    gradients.

    Tensors in, tensor out, and nothing waits for the device, so that it can be captured.
    """

    def update(step: Tensor, rate: Tensor, *batches: Batch) -> Tensor:
        losses = []
        for batch in ranks.each(loss_of, batches):
            with adam.copies_in_place():
                result = loss_of(batch)
                loss = result.loss
                adam.start(loss, rate)
                (loss * adam.scale / len(batches)).backward()
            losses.append(torch.stack([loss, result.loss_instance, result.loss_prior]).detach())
            if on_step:
                on_step(int(step), result)
        means = ranks.mean(torch.stack(losses).mean(dim=0))  # (3,)
        norm = adam.apply(step, means[0], rate)
        return torch.cat([means, norm[None]])

    return update


def learn(
    run: Run,
    batches: Batches,
    loss: Loss,
    adam: Update,
    identity: dict,
    captured: bool,
    on_step: Watcher | None,
) -> None:
    """All updates, and what is written on the way. `captured`: by a CUDA graph, on a GPU."""
    config, folder = run.config, run.folder
    weights = parameters.that_train(run.trained)
    done = resume.restore(run.saved, folder, weights, adam)
    ranks.require_same({**identity, "step": done})
    if 0 < done < config.max_train_steps:  # it was stopped after its state, before these
        if done % config.checkpointing_steps == 0:
            save_snapshot(run, done)
        if done % config.validation_steps == 0 and not grids.there(run, done):
            grids.save(run, done, grids.draw(run))
    if config.explain and done == 0:
        first_step.explain(run, batches, loss, weights, adam.scale, done)

    accumulate = config.gradient_accumulation_steps
    update = one_update(ranks.averaged(loss, run.trained), adam, on_step)
    if captured:
        adam.allocate()
        update = graphs.captured(update, run.device, undo=adam.forget)
    schedule = config.max_train_steps, config.lr_warmup_steps, config.lr_scheduler
    log = report.LossLog(folder, config.max_train_steps, done, run.device, run.events)
    with log, stop.between_steps() as stopping:
        for step in range(done + 1, config.max_train_steps + 1):
            rate = optimizer.rate(step, *schedule)
            numbers = (to_device(torch.tensor(float(x)), run.device) for x in (step, rate))
            ns = range((step - 1) * accumulate, step * accumulate)
            losses = update(*numbers, *map(batches.draw, ns))
            run.on_passes(passes.of_update(config))
            log.add(step, config.learning_rate * rate, losses)

            last = step == config.max_train_steps or stopping.heard()
            save = step % config.checkpointing_steps == 0
            show = step % config.validation_steps == 0
            if log.due or save or show or last:
                bad_step = log.write(adam.bad_step)
                if bad_step is not None:
                    adam.release()
                    del update  # and the memory that a CUDA graph keeps
                    raise UserError(finite.explain(bad_step, run, batches, loss, weights))
            if show and not last:
                grids.save(run, step, grids.draw(run))
            if save or last:
                resume.save(folder, step, {**weights, **adam.state()}, identity, config.save_state)
            if save and not last:
                save_snapshot(run, step)
            if last:
                break
    adam.release()
    del update  # and the memory that a CUDA graph keeps
    if config.explain:
        first_step.explain(run, batches, loss, weights, adam.scale, config.max_train_steps)


def save_snapshot(run: Run, step: int) -> None:
    write = partial(methods.write, run.sd, run.config, run.trained, step)
    snapshots.save(run.folder, step, write, keep=run.config.checkpoints_total_limit)


def finish(run: Run, before: list[list], originals: dict[str, Tensor]) -> None:
    """The last pictures, and the model, on the device at the end."""
    after = grids.draw(run)
    grids.save(run, run.config.max_train_steps, after)
    compose = enlarged.before_after if score.applies(run.config) else grids.before_after
    grids.save_before_after(run, before, after, compose)
    write_result(run, originals)
    run.sd.to(run.device, but=run.resting)


@ranks.by_first
def write_result(run: Run, originals: dict[str, Tensor]) -> None:
    """Write the model and its card; say what can be done with it."""
    config, sd, folder = run.config, run.sd, run.folder
    curve.save(folder)
    # An older model, of a run with fewer steps, must not be half of this one.
    (folder / "model_index.json").unlink(missing_ok=True)
    methods.write(sd, config, run.trained, config.max_train_steps, folder)
    for name, share in methods.moved(sd, run.trained, originals).items():
        print(f"{name} moved by {share:.3%} of their norm")
    print(report.what_next(folder, config, sd))


def defaults(given: dict) -> dict:
    """Of what was not given."""
    return methods.defaults(given) | families.train_settings(given) | toybox.train_settings(given)


@ranks.joined()
def main() -> None:
    train(
        cli.parse(
            TrainConfig,
            "minibooth.train",
            "DreamBooth: teach Stable Diffusion a subject from a few photographs of it. Without "
            "options it trains the toybox, a small model that is shipped, in a minute or two. The "
            "defaults below are those of Stable Diffusion 1.x and 2.x; the toybox's are in "
            f"minibooth/toybox/__init__.py. {families.TOLD}.",
            defaults=defaults,
        )
    )


if __name__ == "__main__":
    cli.run("minibooth.train", main)
