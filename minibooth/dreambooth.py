"""DreamBooth's training step: Eq. 2 of arXiv 2208.12242, every tensor in the loss named.

    E[ w_t ‖x̂(x_t, c) − x‖²  +  λ w_t' ‖x̂(x_t', c_pr) − x_pr‖² ]

The first term shows the model the subject under its own prompt ("a sks dog"). The second, prior
preservation, shows it pictures that it drew itself before training for the class ("a dog"), so
that the class stays what it was. Each term has a timestep and a noise of its own.

The equation is written for a model that predicts x. Stable Diffusion predicts ε or v, and the mean
squared error of that prediction is the same expression with a particular w_t: ᾱ/(1 − ᾱ) for ε,
1/(1 − ᾱ) for v.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .schedule import Schedule, q_sample, velocity
from .text_encoder import Condition, cat


@dataclass(frozen=True)
class Term:
    """What one term of Eq. 2 is computed from, for B samples."""

    x0: Tensor  # (B, 4, h, w) x or x_pr: scaled latents
    eps: Tensor  # (B, 4, h, w) ε or ε': unit Gaussian noise
    t: Tensor  # (B,) t or t': int64, 0 … T − 1
    c: Tensor | Condition  # c or c_pr: the encoded prompt, (B, 77, D), or what has it


class Half(NamedTuple):
    """The samples of one term, sliced out of a Step."""

    x_t: Tensor
    prediction: Tensor
    target: Tensor
    per_sample: Tensor


@dataclass(frozen=True)
class Step:
    """Every tensor in the loss: first the `n_instance` samples of the subject, then the class."""

    x_t: Tensor  # (B, 4, h, w) √ᾱ_t x0 + √(1−ᾱ_t) ε
    prediction: Tensor  # (B, 4, h, w) the UNet's ε̂ or v̂
    target: Tensor  # (B, 4, h, w) what it should have said: ε or v
    per_sample: Tensor  # (B,) mean squared error of each sample, times its weight
    loss_instance: Tensor  # () the first term of Eq. 2
    loss_prior: Tensor  # () the second, before λ
    loss: Tensor  # () loss_instance + λ loss_prior
    n_instance: int

    def half(self, samples: slice) -> Half:
        tensors = (self.x_t, self.prediction, self.target, self.per_sample)
        return Half(*(x[samples] for x in tensors))

    @property
    def instance(self) -> Half:
        return self.half(slice(None, self.n_instance))

    @property
    def prior(self) -> Half:
        return self.half(slice(self.n_instance, None))


def step(
    unet: Callable[[Tensor, Tensor, Tensor | Condition], Tensor],
    schedule: Schedule,
    instance: Term,
    prior: Term | None,
    prior_loss_weight: float = 1.0,
    weight: Tensor | None = None,
) -> Step:
    """The loss of one training step (DreamBooth Eq. 2), in one pass of the UNet over both terms.

    `prior_loss_weight` is λ; with λ = 0 or no prior this is plain fine-tuning and the class half is
    not computed. `weight`, (B,) in the order instance then prior, multiplies each sample's error.
    """
    terms = [instance] if prior is None or prior_loss_weight == 0 else [instance, prior]
    x0 = torch.cat([term.x0 for term in terms])  # (B, 4, h, w)
    eps = torch.cat([term.eps for term in terms])
    t = torch.cat([term.t for term in terms])  # (B,)
    c = cat([term.c for term in terms])  # (B, 77, D)

    alpha_bar_t = schedule.alpha_bar[t]  # (B,)
    x_t = q_sample(x0, eps, alpha_bar_t)
    prediction = unet(x_t, t, c).to(x_t.dtype)  # the loss is never below fp32
    v_prediction = schedule.prediction_type == "v_prediction"
    target = velocity(x0, eps, alpha_bar_t) if v_prediction else eps.to(x_t.dtype)

    per_sample = (prediction - target).square().mean(dim=(1, 2, 3))  # (B,)
    if weight is not None:
        per_sample = per_sample * weight

    n = len(instance.x0)
    loss_instance = per_sample[:n].mean()
    loss_prior = per_sample[n:].mean() if len(terms) == 2 else torch.zeros_like(loss_instance)
    loss = loss_instance + prior_loss_weight * loss_prior
    return Step(x_t, prediction, target, per_sample, loss_instance, loss_prior, loss, n)


def snr(schedule: Schedule, t: Tensor) -> Tensor:
    """Signal to noise α_t²/σ_t² = ᾱ/(1 − ᾱ) at the timesteps t, (B,) → (B,)."""
    return schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t])


def plain_weight(schedule: Schedule, t: Tensor) -> Tensor:
    """The w_t of Eq. 2 that the plain loss has: SNR for ε, SNR + 1 for v. (B,) → (B,).

    Because x̂ − x is −(σ_t/α_t) (ε̂ − ε), or −σ_t (v̂ − v).
    """
    extra = 1 if schedule.prediction_type == "v_prediction" else 0
    return snr(schedule, t) + extra


def min_snr_weight(schedule: Schedule, t: Tensor, gamma: float) -> Tensor:
    """A `weight` for `step` that turns its loss into Min-SNR-γ (arXiv 2303.09556). (B,) → (B,).

    The wanted w_t is min(SNR, γ); the one that the plain loss already has is divided out.
    """
    return snr(schedule, t).clamp(max=gamma) / plain_weight(schedule, t)
