"""What loss.csv and samples/ hold, as TensorBoard's event files: --report_to tensorboard."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..common.errors import UserError

FOLDER = "logs"  # in the run's


def require(report_to: str | None) -> None:
    """Raise UserError where the library that writes them is missing."""
    if report_to and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            f"--report_to {report_to} needs its library: pip install tensorboard, or leave it out"
        )


class Events:
    """Writes them for a run, once there is something to write; nothing where it is not `wanted`.

    In a run that goes on after `done` updates, what was written of later steps no longer counts.
    """

    def __init__(self, run: Path, wanted: bool, done: int):
        self.folder, self.wanted, self.done = run / FOLDER, wanted, done
        self.writer = None

    def losses(self, names: Sequence[str], rows: list[tuple[float, ...]]) -> None:
        """Rows of loss.csv, the step first; `names` are those of its other columns."""

        def add(writer) -> None:
            for step, *values in rows:
                for name, value in zip(names, values, strict=True):
                    writer.add_scalar(name, value, step)

        self.write(add)

    def picture(self, image: Image.Image, step: int) -> None:
        if step or not self.done:  # a run that goes on has the first one
            self.write(lambda w: w.add_image("samples", np.asarray(image), step, dataformats="HWC"))

    def write(self, add: Callable) -> None:
        """Raises UserError where the disk is full."""
        if not self.wanted:
            return
        try:
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                again = self.done + 1 if self.done else 0
                self.writer = SummaryWriter(str(self.folder), purge_step=again)
            add(self.writer)
            self.writer.flush()
        except OSError as e:
            raise UserError(
                f"cannot write into {self.folder}: {e.strerror or e}; make room on the disk, then "
                "go on with --resume_from_checkpoint latest"
            ) from e
