"""Part 1 of tutorial.md. Fill in, then: python exercises/check.py noise"""

import torch
from torch import Tensor

from minibooth.formats.public import SD_SCHEDULER
from minibooth.formats.scheduler import read_schedule


def crossing(alpha_bar: Tensor) -> int:
    """The last timestep at which x_t holds at least as much picture as noise (in variance)."""
    raise NotImplementedError


def one_step(x: Tensor, eps: Tensor, beta: float) -> Tensor:
    """One step of the chain, from x_{t−1} to x_t, that keeps the variance at 1 (DDPM Eq. 2)."""
    raise NotImplementedError


# ---- checks: no need to read on ----------------------------------------------------------------


def check_crossing():
    alpha_bar = read_schedule(SD_SCHEDULER).alpha_bar
    t = crossing(alpha_bar)
    assert alpha_bar[t] >= 0.5, f"at t = {t} there is less picture than noise"
    assert alpha_bar[t + 1] < 0.5, f"at t = {t + 1} there still is enough"


def check_one_step():
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(100_000, generator=g)
    alpha_bar = read_schedule(SD_SCHEDULER).alpha_bar
    x, before = x0, 1.0
    for a in alpha_bar[:300].tolist():
        x, before = one_step(x, torch.randn(x.shape, generator=g), 1 - a / before), a
    kept = (x @ x0 / (x0 @ x0)).item()
    assert abs(x.var().item() - 1) < 0.02, f"after 300 steps the variance is {x.var():.2f}"
    want = alpha_bar[299].sqrt().item()
    assert abs(kept - want) < 0.02, f"{kept:.2f} of x0 is left after 300 steps, not {want:.2f}"
