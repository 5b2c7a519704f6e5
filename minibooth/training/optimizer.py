"""The optimizer's side of a training step: loss scale, clipping, AdamW, the non-finite guard.

Nothing here waits for the device, but 8-bit AdamW: whether an update may happen is decided on it.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .eight_bit import AdamW8bit

GROWTH_INTERVAL = 2000  # good steps after which fp16's loss scale doubles


def rate(step: int, last: int, warm_up: int = 0, schedule: str = "cosine") -> float:
    """What the learning rates are multiplied by in update `step`, of 1 … `last`.

    It rises to 1 over the first `warm_up` updates. From there it is constant, or falls to 0 along a
    line ("linear") or half a cosine: diffusers' schedules of these names.
    """
    if step <= warm_up:
        return step / warm_up
    done = (step - 1 - warm_up) / (last - warm_up)
    falling = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return falling[schedule]


def fresh_state(p: Tensor, eight_bit: bool) -> dict[str, Tensor]:
    """What an Update keeps of a weight, before the first step."""
    if eight_bit:
        return AdamW8bit.fresh_state(p)
    averages = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=p.device), **averages}


class Update:
    """AdamW over {learning rate: parameters}. `apply` turns gradients into new weights.

    If a loss or gradient is not finite, the weights stay as they are from then on and `bad_step`
    tells, whenever somebody looks, which step it was. With fp16 a gradient that overflows only
    skips its step and halves the loss scale.

    All that changes from step to step is in tensors that are written in place, the learning rates
    too: if `capturable`, a CUDA graph of `apply` does the same as `apply`.
    """

    def __init__(
        self,
        groups: Iterable[tuple[float, list[nn.Parameter]]],
        weight_decay: float,
        max_grad_norm: float,
        scaled: bool,
        use_8bit_adam: bool = False,
    ):
        groups = [{"params": params, "base_lr": lr} for lr, params in groups]
        self.parameters = [p for group in groups for p in group["params"]]
        device = self.parameters[0].device
        for group in groups:
            group["lr"] = torch.tensor(group["base_lr"], device=device)
        if use_8bit_adam:
            self.adam = AdamW8bit(groups, weight_decay)
        else:
            self.adam = torch.optim.AdamW(
                groups, weight_decay=weight_decay, fused=True, capturable=device.type == "cuda"
            )
        self.eight_bit, self.capturable = use_8bit_adam, not use_8bit_adam
        self.max_grad_norm, self.scaled = max_grad_norm, scaled
        self.scale = torch.tensor(2.0**16 if scaled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.bad_step = torch.tensor(-1.0, device=device)

    def allocate(self) -> None:
        """Create the averages now, where the first update would: all zeros.

        Whoever captures calls this first. What is created on a CUDA graph's stream shares its
        memory with what that stream works in, and keeps it from others when that is long gone.
        """
        for p in self.parameters:
            if not self.adam.state[p]:
                self.adam.state[p] = self.fresh_state(p)

    def forget(self) -> None:
        """Drop the gradients, without an update: those of a recording that was given up are no
        numbers yet."""
        self.adam.zero_grad()

    def copies_in_place(self) -> AbstractContextManager:
        """Around a step's passes: for those who have networks compute with copies of weights."""
        return nullcontext()

    def start(self, loss: Tensor, rate: float | Tensor) -> None:
        """Before the backward pass: for those who update in it."""

    def release(self) -> None:
        """No more updates: drop gradients and averages, and leave later gradients alone."""
        self.forget()
        self.adam.state.clear()

    def apply(self, step: int | Tensor, loss: Tensor, rate: float | Tensor) -> Tensor:
        """Update the weights from the gradients of `scale · loss`; the gradients' norm before
        clipping, (). `rate` multiplies the learning rates."""
        norm = self.norm_of_gradients() / self.scale
        clip = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1)  # what gradients are divided by
        overflow = ~norm.isfinite()
        bad = ~loss.isfinite() | (overflow & (self.scale <= 1))  # without a scale to blame
        self.bad_step.copy_(torch.where(bad & (self.bad_step < 0), step, self.bad_step))
        skip = overflow | (self.bad_step >= 0)

        self.move(rate, self.scale * clip, skip.float())
        self.forget()

        if self.scaled:
            self.good_steps.copy_(torch.where(overflow, 0.0, self.good_steps + 1))
            grow = self.good_steps == GROWTH_INTERVAL
            self.good_steps.masked_fill_(grow, 0.0)
            self.scale.mul_(torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0)))
        return norm

    def norm_of_gradients(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters])

    def move(self, rate: float | Tensor, divisor: Tensor, skip: Tensor) -> None:
        """AdamW by the gradients divided by `divisor`, but where `skip` is 1: both are ()."""
        for group in self.adam.param_groups:
            group["lr"].fill_(group["base_lr"] * rate)
        # The fused kernel divides by grad_scale, and does nothing where found_inf is 1.
        self.adam.grad_scale, self.adam.found_inf = divisor, skip
        self.adam.step()

    def state(self) -> dict[str, Tensor]:
        """Everything that the next `apply` depends on beside the weights."""
        out = {"scale": self.scale, "good_steps": self.good_steps}
        for i, parameter in enumerate(self.parameters):
            for key, value in self.adam.state[parameter].items():
                out[f"{key}.{i}"] = value
        return out

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.scale.copy_(state["scale"])
        self.good_steps.copy_(state["good_steps"])
        self.allocate()  # in the weights' memory format
        for i, parameter in enumerate(self.parameters):
            for key, value in self.adam.state[parameter].items():
                value.copy_(state[f"{key}.{i}"])

    def fresh_state(self, p: Tensor) -> dict[str, Tensor]:
        return fresh_state(p, self.eight_bit)
