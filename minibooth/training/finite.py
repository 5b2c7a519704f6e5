"""Where a loss stopped being finite: the step is done again, with the weights that it had."""

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn

from ..common.cli import is_out_of_memory
from ..device import memory, ranks
from ..dreambooth import Step
from . import snapshots
from .data import Batches
from .loss import Loss
from .start import Run


def explain(
    step: int, run: Run, batches: Batches, loss: Loss, weights: dict[str, nn.Parameter]
) -> str:
    """Which tensor of this step was not finite, and what to do: for a UserError."""
    accumulate = run.config.gradient_accumulation_steps
    shares = [(rank, ranks.count()) for rank in range(ranks.count())]
    ns = range((step - 1) * accumulate, step * accumulate)
    again = (loss(replace(batches, share=share).draw(n)) for n in ns for share in shares)
    try:
        found = f"{first_not_finite(weights, again)} is not finite"
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found = "the loss or its gradient is not finite (no memory was left to look closer)"
    state = f"with the weights of step {step - 1}"
    if run.config.optimizer_in_backward:
        state = "with some of the weights already updated"
    kept = snapshots.found(run.folder)
    return (
        f"step {step}: {found}, so training stopped {state}. Start anew in "
        "another --output_dir with a lower --learning_rate or --mixed_precision no"
        + (f"; {kept[-1]} is the last good model" if kept else "")
    )


def first_not_finite(parameters: dict[str, nn.Parameter], batches: Iterable[Step]) -> str:
    """Of a step's weights, losses and gradients the first that is not finite, by its name.

    `batches` computes the losses of the step's batches again, one by one."""
    for key, p in parameters.items():
        if not p.isfinite().all():
            return key
    bad: set[str] = set()

    def look(name: str, gradient: Tensor) -> None:
        if not gradient.isfinite().all():
            bad.add(name)

    with memory.each_gradient(parameters, look):
        for result in batches:
            for field in ("x_t", "prediction", "per_sample", "loss"):
                if not getattr(result, field).isfinite().all():
                    return field
            result.loss.backward()
    name = next((key for key in parameters if key in bad), "the scaled loss")
    return f"the gradient of {name}"
