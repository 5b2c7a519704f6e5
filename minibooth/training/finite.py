"""Where a loss stopped being finite: the step is done again, with the weights that it had."""

from collections.abc import Iterable

from torch import Tensor

from ..dreambooth import Step
from . import snapshots
from .data import Batches
from .loss import Loss
from .start import Run


def explain(step: int, run: Run, batches: Batches, loss: Loss, weights: dict[str, Tensor]) -> str:
    """Which tensor of this step was not finite, and what to do: for a UserError."""
    accumulate = run.config.gradient_accumulation_steps
    again = (loss(batches.draw(n)) for n in range((step - 1) * accumulate, step * accumulate))
    name = first_not_finite(weights, again)
    state = f"with the weights of step {step - 1}"
    if run.config.optimizer_in_backward:
        state = "with some of the weights already updated"
    kept = snapshots.found(run.folder)
    return (
        f"step {step}: {name} is not finite, so training stopped {state}. Start anew in "
        "another --output_dir with a lower --learning_rate or --mixed_precision no"
        + (f"; {kept[-1]} is the last good model" if kept else "")
    )


def first_not_finite(parameters: dict[str, Tensor], batches: Iterable[Step]) -> str:
    """Of a step's weights, losses and gradients the first that is not finite, by its name.

    `batches` computes the losses of the step's batches again, one by one."""
    name = next((key for key, p in parameters.items() if not p.isfinite().all()), None)
    for result in batches:
        for field in ("x_t", "prediction", "per_sample", "loss"):
            if name is None and not getattr(result, field).isfinite().all():
                name = field
        result.loss.backward()
    if name is None:
        bad = (key for key, p in parameters.items() if not p.grad.isfinite().all())
        name = f"the gradient of {next(bad, 'the scaled loss')}"
    return name
