"""The noise schedule: how much of the picture is left at time t, and how to step back.

The letters, here and everywhere in minibooth:

    x0         a clean latent                           (B, 4, h, w)
    eps        Gaussian noise of the same shape
    x_t        the two mixed: √ᾱ_t · x0 + √(1 − ᾱ_t) · eps
    t          the timestep, 0 (almost clean) … T − 1 (almost pure noise)
    alpha_bar  ᾱ, the share of the signal's variance that is left at t
    prediction what the UNet says about x_t: eps, or the velocity v = √ᾱ_t · eps − √(1 − ᾱ_t) · x0

The papers' α_t and σ_t (DreamBooth Eq. 2) are √ᾱ_t and √(1 − ᾱ_t). Everything here is a pure
function: noise comes in as an argument, so that any step can be repeated and tested.

Sources: DDPM, arXiv 2006.11239. DDIM, arXiv 2010.02502. v: arXiv 2202.00512. DPM-Solver++, arXiv
2211.01095.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .common.errors import UserError


@dataclass(frozen=True, eq=False)
class Schedule:
    """What a checkpoint's scheduler_config.json says about noise."""

    alpha_bar: Tensor  # (T,) fp32, falling
    prediction_type: str = "epsilon"  # what the UNet predicts: "epsilon" or "v_prediction"
    spacing: str = "leading"  # which timesteps a sampler visits: "leading", "trailing", "linspace"
    steps_offset: int = 0  # added to the timesteps of "leading"
    final_alpha_bar: float = 1.0  # ᾱ after DDIM's last step: 1, or ᾱ[0] for Stable Diffusion
    clip: float | None = None  # the estimate of x0 is clamped to ± this; None for latents

    @classmethod
    def from_config(cls, config: dict) -> "Schedule":
        """Build from a scheduler_config.json in which formats.configs.settle has put what is meant.

        Raises UserError for a kind of schedule that is not implemented.
        """
        T = config.get("num_train_timesteps", 1000)
        kind = config.get("beta_schedule", "scaled_linear")
        first, last = config.get("beta_start", 0.00085), config.get("beta_end", 0.012)
        if config.get("rescale_betas_zero_snr") or config.get("trained_betas") is not None:
            kind = "rescaled (zero terminal SNR) or trained"
        if kind == "linear":
            beta = torch.linspace(first, last, T)
        elif kind == "scaled_linear":
            beta = torch.linspace(first**0.5, last**0.5, T) ** 2
        else:
            raise UserError(f"a {kind} beta_schedule is not supported (linear, scaled_linear)")
        alpha_bar = (1 - beta).cumprod(0)
        schedule = cls(
            alpha_bar,
            prediction_type=config.get("prediction_type", "epsilon"),
            spacing=config.get("timestep_spacing", "leading"),
            steps_offset=config.get("steps_offset", 0),
            final_alpha_bar=1.0 if config.get("set_alpha_to_one", True) else alpha_bar[0].item(),
            clip=config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None,
        )
        if schedule.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"prediction_type {schedule.prediction_type!r} is not supported")
        if schedule.spacing not in ("leading", "trailing", "linspace"):
            raise UserError(f"timestep_spacing {schedule.spacing!r} is not supported")
        return schedule

    @property
    def T(self) -> int:
        """How many timesteps there are: 1000 in every public model."""
        return len(self.alpha_bar)

    def to(self, device) -> "Schedule":
        return replace(self, alpha_bar=self.alpha_bar.to(device))


# ---- forward: from a picture to noise ----------------------------------------------------------


def per_sample(a: Tensor) -> Tensor:
    """(B,) → (B, 1, 1, 1), to multiply latents. Being fp32 it also lifts bf16 latents to fp32."""
    return a.view(-1, 1, 1, 1)


def q_sample(x0: Tensor, eps: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """x_t ~ q(x_t | x0), DDPM Eq. 4. x0, eps: (B, C, h, w); alpha_bar_t: (B,). Never below fp32."""
    a = per_sample(alpha_bar_t)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def velocity(x0: Tensor, eps: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """v = √ᾱ·eps − √(1−ᾱ)·x0 (arXiv 2202.00512, App. D). Shapes as in q_sample."""
    a = per_sample(alpha_bar_t)
    return a.sqrt() * eps - (1 - a).sqrt() * x0


def split(
    x_t: Tensor, prediction: Tensor, alpha_bar_t: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """The (x0, eps) that a prediction at x_t stands for: q_sample and velocity solved backwards."""
    a = per_sample(alpha_bar_t)
    if prediction_type == "v_prediction":
        x0 = a.sqrt() * x_t - (1 - a).sqrt() * prediction
        eps = a.sqrt() * prediction + (1 - a).sqrt() * x_t
        return x0, eps
    return (x_t - (1 - a).sqrt() * prediction) / a.sqrt(), prediction


# ---- backward: from noise to a picture ---------------------------------------------------------


def timesteps(schedule: Schedule, steps: int) -> Tensor:
    """The timesteps a sampler of that many steps visits, descending: (steps,) int64.

    The three spacings are Table 2 of arXiv 2305.08891. Raises UserError unless 1 ≤ steps ≤ T.
    """
    T = schedule.T
    if not 1 <= steps <= T:
        raise UserError(f"{steps} sampling steps: give a number from 1 to {T}")
    if schedule.spacing == "leading":
        t = torch.arange(steps) * (T // steps)
        # The offset gives way where it would run past the last timestep (steps = T).
        return (t + min(schedule.steps_offset, T - 1 - t[-1].item())).flip(0)
    if schedule.spacing == "trailing":
        # numpy's rounding, as in the reference: torch's differs by one at some exact halves.
        return torch.from_numpy(np.arange(T, 0, -T / steps)[:steps].round()).long() - 1
    return torch.from_numpy(np.linspace(0, T - 1, steps).round()).long().flip(0)


def trajectory(schedule: Schedule, steps: int, sampler: str) -> list[tuple[int, int]]:
    """The pairs (t, t_prev) of a run: DDIM goes down T // steps, the others to the next visited t.

    DPM-Solver++ steps from its last t to the clean latent, so it spreads its steps as if there was
    one more and leaves out that one, the noise next to nothing; "trailing" does so by itself.
    """
    spare = sampler == "dpm++" and schedule.spacing != "trailing"
    if spare and steps == schedule.T:
        raise UserError(f"{steps} sampling steps: dpm++ takes at most {steps - 1}")
    t = timesteps(schedule, steps + spare).tolist()[:steps]
    if sampler == "ddim":
        return [(now, now - schedule.T // steps) for now in t]
    return list(zip(t, [*t[1:], -1], strict=True))


def variance(alpha_bar_t: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """Variance of q(x_prev | x_t, x0): β̃ of DDPM Eq. 7, σ² of DDIM Eq. 16 with η = 1."""
    return (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)


def ddim_step(
    x_t: Tensor,
    prediction: Tensor,
    t: int,
    t_prev: int,
    schedule: Schedule,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """x_t → x_{t_prev}, DDIM Eq. 12; t_prev < 0 is the last step.

    x_t, prediction, noise: (B, 4, h, w), all at the same t. `eta` is the share of fresh noise, from
    0 (none, and no `noise` is needed) to 1 (as much as DDPM adds).
    """
    a_t = schedule.alpha_bar[t]
    final = schedule.final_alpha_bar
    a_prev = schedule.alpha_bar[t_prev] if t_prev >= 0 else torch.full_like(a_t, final)
    x0, eps = split(x_t, prediction, a_t, schedule.prediction_type)
    if schedule.clip is not None:
        x0 = x0.clamp(-schedule.clip, schedule.clip)
    if eta == 0:
        return a_prev.sqrt() * x0 + (1 - a_prev).sqrt() * eps
    sigma = eta * variance(a_t, a_prev).sqrt()
    return a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).sqrt() * eps + sigma * noise


def ddpm_step(
    x_t: Tensor, prediction: Tensor, t: int, t_prev: int, schedule: Schedule, noise: Tensor
) -> Tensor:
    """x_t → x_{t_prev}, the ancestral step, DDPM Eq. 7; t_prev < 0 is the last, without noise.

    x_t, prediction, noise: (B, 4, h, w), all at the same t.
    """
    a_t = schedule.alpha_bar[t]
    a_prev = schedule.alpha_bar[t_prev] if t_prev >= 0 else torch.ones_like(a_t)
    x0, _ = split(x_t, prediction, a_t, schedule.prediction_type)
    if schedule.clip is not None:
        x0 = x0.clamp(-schedule.clip, schedule.clip)
    alpha = a_t / a_prev  # 1 − β of this step
    mean = (a_prev.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - a_prev) * x_t) / (1 - a_t)
    return mean + variance(a_t, a_prev).sqrt() * noise


def half_log_snr(alpha_bar_t: Tensor) -> Tensor:
    """λ = log(√ᾱ / √(1−ᾱ)): the time in which DPM-Solver++ takes its steps."""
    return torch.logit(alpha_bar_t) / 2


def dpm_step(
    x_t: Tensor,
    prediction: Tensor,
    t: int,
    t_prev: int,
    schedule: Schedule,
    last: tuple[int, Tensor] | None,
) -> tuple[Tensor, tuple[int, Tensor]]:
    """x_t → x_{t_prev} by DPM-Solver++(2M), arXiv 2211.01095 Algorithm 2, and the next step's
    `last`: its t and x0. The first step has none; t_prev < 0 is the last step.

    It is DDIM's step, but x0 is not taken as constant over it: D is x0 half a step ahead, on the
    line through this estimate and the one before. x_t, prediction: (B, 4, h, w).
    """
    a_t = schedule.alpha_bar[t]
    a_prev = schedule.alpha_bar[t_prev] if t_prev >= 0 else torch.ones_like(a_t)
    x0, _ = split(x_t, prediction, a_t, schedule.prediction_type)
    if schedule.clip is not None:
        x0 = x0.clamp(-schedule.clip, schedule.clip)
    D = x0
    if last is not None and t_prev >= 0:  # the last step is of first order: there h is infinite
        t_before, x0_before = last
        now = half_log_snr(a_t)
        h = half_log_snr(a_prev) - now
        r = (now - half_log_snr(schedule.alpha_bar[t_before])) / h
        D = x0 + (x0 - x0_before) / (2 * r)
    eps = (x_t - a_t.sqrt() * D) / (1 - a_t).sqrt()
    return a_prev.sqrt() * D + (1 - a_prev).sqrt() * eps, (t, x0)
