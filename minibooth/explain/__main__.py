"""python -m minibooth.explain: one training step under the microscope, as an HTML page.

It takes the options of minibooth.train and shows the first step of that run, which is not done.
"""

from dataclasses import replace
from pathlib import Path

from .. import toybox
from ..common import cli
from ..formats import families
from ..training import methods, parameters, prepare, start
from ..training.settings import TrainConfig
from ..training.start import Run
from ..upscaler import require_kind
from . import first_step

CLASS_IMAGES = 8  # drawn unless a number is given; the step takes only train_batch_size of them


def explain(config: TrainConfig) -> Path:
    """Write <output_dir>/explain.html, and class images where they are missing; its path.

    Raises UserError for whatever the user can mend, as train.train does.
    """
    config = replace(config, resume_from_checkpoint=None, num_validation_images=0)
    device = start.check(config, has_model=False)
    sd = start.load(config)
    require_kind(sd, f"--model {config.model}")
    run = Run(config, sd, device)
    batches, loss, _ = prepare.gather(run)
    adam = prepare.make_optimizer(run)
    weights = parameters.that_train(run.trained)
    return first_step.explain(run, batches, loss, weights, adam.scale)


def settings(given: dict) -> dict:
    """What was not given: as in training, but for the folder and the number of class images."""
    few = {"output_dir": "minibooth-explain", "num_class_images": CLASS_IMAGES}
    suitable = methods.defaults(given) | families.train_settings(given)
    return suitable | toybox.train_settings(given) | few


def main() -> None:
    config = cli.parse(
        TrainConfig,
        "minibooth.explain",
        "One training step under the microscope: writes explain.html into --output_dir. Takes the "
        "options of minibooth.train, but --output_dir is minibooth-explain where it is not given, "
        f"and --num_class_images {CLASS_IMAGES}; those of saving and resuming do nothing here. "
        "Without options it shows the toybox.",
        defaults=settings,
    )
    print(f"{explain(config)}: open it in a browser")


if __name__ == "__main__":
    cli.run("minibooth.explain", main)
