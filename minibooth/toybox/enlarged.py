"""The default run's picture: what was drawn before and after, enlarged by the toybox's upscaler,
which has never seen the subject."""

from PIL import Image
from tqdm import tqdm

from .. import pipeline
from ..common import sheets
from ..device import graphs
from ..training.grids import Rows
from ..training.start import Run
from . import UPSCALING

PROMPTS = 6  # of which the first pictures are shown: each is 256² before and after
COLUMNS = 3
AT_ONCE = 4  # pictures enlarged together


def before_after(run: Run, before: Rows, after: Rows) -> Image.Image:
    """Of each prompt the first picture before and, below it, after."""
    prompts = run.config.grid_prompts[:PROMPTS]
    small = [row[0] for row in (*before[:PROMPTS], *after[:PROMPTS])]
    up = pipeline.load("toybox-x4", device=run.device)
    how = UPSCALING | {"seed": run.config.seed, "batch_size": AT_ONCE}
    batches = -(-len(small) // AT_ONCE)
    bar = tqdm(total=how["steps"] * batches, desc="enlarging", unit="step", leave=False)
    with bar, graphs.captured_unet(up.unet):
        large = up.upscale(small, prompts * 2, on_step=bar.update, **how)
    was, now = large[: len(prompts)], large[len(prompts) :]
    some = [slice(i, i + COLUMNS) for i in range(0, len(prompts), COLUMNS)]
    labels = ["before", "after"]
    return sheets.stacked([sheets.grid([was[s], now[s]], labels, prompts[s]) for s in some])
