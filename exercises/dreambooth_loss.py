"""Part 6 of tutorial.md. Fill in, then: python exercises/check.py dreambooth_loss"""

import torch
from torch import Tensor

from minibooth import dreambooth
from minibooth.dreambooth import Term
from minibooth.formats.public import SD_SCHEDULER
from minibooth.formats.scheduler import read_schedule


def eq2(
    x_hat: Tensor, x: Tensor, w: Tensor, x_hat_pr: Tensor, x_pr: Tensor, w_pr: Tensor, lam: float
) -> Tensor:
    """DreamBooth's Eq. 2 as it is written, in x: a number. Latents (B, 4, h, w), weights (B,).

    The norms are means over a latent's values, and the expectation is the mean over the samples.
    """
    raise NotImplementedError


def min_snr(alpha_bar_t: Tensor, gamma: float) -> Tensor:
    """What to multiply each sample's ε-error with, so that the w_t of Eq. 2 is min(SNR, γ)."""
    raise NotImplementedError


def decayed(weight: float, learning_rate: float, weight_decay: float, steps: int) -> float:
    """What AdamW's decay alone makes of a weight."""
    raise NotImplementedError


# ---- checks: no need to read on ----------------------------------------------------------------


def check_eq2():
    built, g = read_schedule(SD_SCHEDULER), torch.Generator().manual_seed(0)

    def term() -> Term:
        x0, eps = torch.randn(2, 3, 4, 8, 8, generator=g)
        return Term(x0, eps, torch.randint(100, 900, (3,), generator=g), torch.zeros(3, 77, 1))

    instance, prior = term(), term()
    step = dreambooth.step(lambda x_t, t, c: 0.9 * x_t, built, instance, prior, 0.5)
    arguments = []
    for part, half in ((instance, step.instance), (prior, step.prior)):
        a = built.alpha_bar[part.t].view(-1, 1, 1, 1)
        x_hat = (half.x_t - (1 - a).sqrt() * half.prediction) / a.sqrt()
        arguments += [x_hat, part.x0, (a / (1 - a)).flatten()]
    found = eq2(*arguments, 0.5)
    assert torch.allclose(found, step.loss, rtol=1e-4), f"{found:.4f}, not {step.loss:.4f}"


def check_min_snr():
    built, t = read_schedule(SD_SCHEDULER), torch.tensor([0, 300, 999])
    found, want = min_snr(built.alpha_bar[t], 5.0), dreambooth.min_snr_weight(built, t, 5.0)
    assert torch.allclose(found, want, rtol=1e-4), f"at t = 0, 300, 999: {found}, not {want}"


def check_decayed():
    weight = torch.nn.Parameter(torch.ones(()))
    adam = torch.optim.AdamW([weight], lr=1e-2, weight_decay=1e-1)
    for _ in range(100):
        weight.grad = torch.zeros(())
        adam.step()
    found = decayed(1.0, 1e-2, 1e-1, 100)
    assert abs(found - weight.item()) < 1e-4, f"{found}, and AdamW says {weight.item():.4f}"
