"""The default run's picture: what was drawn before and after, enlarged by the toybox's second
stage, which has never seen the subject."""

from PIL import Image
from tqdm import tqdm

from .. import pipeline
from ..common import sheets
from ..device import graphs
from ..training.grids import Rows
from ..training.start import Run

SAMPLING = {"steps": 5, "guidance_scale": 1.0, "noise_level": 20}
PROMPTS = 6  # of which the first pictures are shown: each is 256² before and after
AT_ONCE = 4


def before_after(run: Run, before: Rows, after: Rows) -> Image.Image:
    """Two rows, before and after, of the first picture for each prompt."""
    prompts = run.config.grid_prompts[:PROMPTS]
    small = [row[0] for row in (*before[:PROMPTS], *after[:PROMPTS])]
    up = pipeline.load("toybox-x4", device=run.device)
    how = SAMPLING | {"seed": run.config.seed, "batch_size": AT_ONCE}
    batches = -(-len(small) // AT_ONCE)
    bar = tqdm(total=SAMPLING["steps"] * batches, desc="enlarging", unit="step", leave=False)
    with bar, graphs.captured_unet(up.unet):
        large = up.upscale(small, prompts * 2, on_step=bar.update, **how)
    rows = [large[: len(prompts)], large[len(prompts) :]]
    return sheets.grid(rows, labels=["before", "after"], headings=prompts)
