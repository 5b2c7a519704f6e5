"""Part 5 of tutorial.md. Fill in, then: python exercises/check.py sampling"""

import torch
from torch import Tensor

from minibooth import schedule
from minibooth.formats.public import SD_SCHEDULER
from minibooth.formats.scheduler import read_schedule


def guide(without: Tensor, towards: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of two predictions: for the empty prompt and for the prompt."""
    raise NotImplementedError


def ddim(x_t: Tensor, eps_hat: Tensor, alpha_bar_t: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """x_t → x_prev by DDIM with η = 0: estimate x0, then mix the same noise in again, but less."""
    raise NotImplementedError


# ---- checks: no need to read on ----------------------------------------------------------------


def check_guide():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    assert torch.allclose(guide(a, b, 0.0), a), "scale 0 is the empty prompt alone"
    assert torch.allclose(guide(a, b, 1.0), b), "scale 1 is the prompt alone"
    assert torch.allclose(guide(a, b, 3.0), torch.tensor([4.0, -4.0])), "scale 3 goes on beyond it"


def check_ddim():
    built = read_schedule(SD_SCHEDULER)
    x, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t, t_prev in ((981, 961), (21, 1)):
        found = ddim(x, eps, built.alpha_bar[t], built.alpha_bar[t_prev])
        want = schedule.ddim_step(x, eps, t, t_prev, built)
        assert torch.allclose(found, want, atol=1e-4), f"from {t} to {t_prev} it differs"
