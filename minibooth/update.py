"""The optimizer's side of a training step: mixed precision, clipping, AdamW, the non-finite guard.

Nothing here waits for the device: whether an update may happen is decided on it.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

GROWTH_INTERVAL = 2000  # good steps after which fp16's loss scale doubles


class Precision:
    """The one rule: weights, gradients and optimizer in fp32; the networks compute in `name`.

    "auto" is bf16 on a GPU that has it, fp16 on an older one, "no" (fp32) elsewhere. fp16 needs its
    loss scaled up, or small gradients vanish. Noise mixing and loss are fp32 always.
    """

    def __init__(self, name: str, device: torch.device):
        if name == "auto":
            name = "no"
            if device.type == "cuda":
                has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
                name = "bf16" if has_bf16 else "fp16"
        self.name, self.device_type = name, device.type
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[name]

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None)


class Update:
    """AdamW over {learning rate: parameters}. `apply` turns gradients into new weights.

    If a loss or gradient is not finite, the weights stay as they are from then on and `bad_step`
    tells, whenever somebody looks, which step it was. With fp16 a gradient that overflows only
    skips its step and halves the loss scale.

    All that changes from step to step is in tensors that are written in place, the learning rates
    too: a CUDA graph of `apply` does the same as `apply`.
    """

    def __init__(
        self,
        groups: Iterable[tuple[float, list[nn.Parameter]]],
        weight_decay: float,
        max_grad_norm: float,
        scaled: bool,
    ):
        groups = [{"params": params, "base_lr": lr} for lr, params in groups]
        self.parameters = [p for group in groups for p in group["params"]]
        device = self.parameters[0].device
        for group in groups:
            group["lr"] = torch.tensor(group["base_lr"], device=device)
        on_gpu = device.type == "cuda"
        self.adam = torch.optim.AdamW(
            groups, weight_decay=weight_decay, fused=True, capturable=on_gpu
        )
        self.max_grad_norm, self.scaled = max_grad_norm, scaled
        self.scale = torch.tensor(2.0**16 if scaled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.bad_step = torch.tensor(-1.0, device=device)

    def start(self, loss: Tensor, warm_up: float | Tensor) -> None:
        """Before the backward pass: for those who update in it."""

    def release(self) -> None:
        """No more updates: drop the gradients, and leave later ones alone."""
        self.adam.zero_grad()

    def apply(self, step: int | Tensor, loss: Tensor, warm_up: float | Tensor) -> Tensor:
        """Update the weights from the gradients of `scale · loss`; the gradients' norm before
        clipping, (). `warm_up` multiplies the learning rates."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters]) / self.scale
        clip = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1)  # what gradients are divided by
        overflow = ~norm.isfinite()
        bad = ~loss.isfinite() | (overflow & (self.scale <= 1))  # without a scale to blame
        self.bad_step.copy_(torch.where(bad & (self.bad_step < 0), step, self.bad_step))
        skip = overflow | (self.bad_step >= 0)

        for group in self.adam.param_groups:
            group["lr"].fill_(group["base_lr"] * warm_up)
        # The fused kernel divides by grad_scale, and does nothing where found_inf is 1.
        self.adam.grad_scale, self.adam.found_inf = self.scale * clip, skip.float()
        self.adam.step()
        self.adam.zero_grad()

        if self.scaled:
            self.good_steps.copy_(torch.where(overflow, 0.0, self.good_steps + 1))
            grow = self.good_steps == GROWTH_INTERVAL
            self.good_steps.masked_fill_(grow, 0.0)
            self.scale.mul_(torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0)))
        return norm

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
        for i, parameter in enumerate(self.parameters):
            averages = {
                key: torch.empty_like(parameter).copy_(state[f"{key}.{i}"])  # in its memory format
                for key in ("exp_avg", "exp_avg_sq")
            }
            self.adam.state[parameter] = {
                "step": state[f"step.{i}"].to(parameter.device, copy=True),
                **averages,
            }


class UpdateInBackward(Update):
    """AdamW on each weight as soon as the backward pass has its gradient, which is then dropped.

    So gradients are never all in memory. Nor is their norm known before the first update: nothing
    is clipped. `start` comes before the backward pass. A gradient that is not finite stops this and
    all later updates; weights whose gradients came before it have had theirs.
    """

    def __init__(self, groups: Iterable[tuple[float, list[nn.Parameter]]], weight_decay: float):
        super().__init__(groups, weight_decay, max_grad_norm=float("inf"), scaled=False)
        self.active = False  # gradients that somebody only wants to look at update nothing
        self.skip = torch.zeros_like(self.scale)
        self.square = torch.zeros_like(self.scale)  # of the gradients' norm so far
        self.hooks = [p.register_post_accumulate_grad_hook(self.apply_one) for p in self.parameters]

    def release(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def start(self, loss: Tensor, warm_up: float | Tensor) -> None:
        self.active = True
        self.skip.copy_(~loss.isfinite() | (self.bad_step >= 0))
        self.square.zero_()
        for group in self.adam.param_groups:
            group["lr"].fill_(group["base_lr"] * warm_up)

    @torch.no_grad()
    def apply_one(self, parameter: nn.Parameter) -> None:
        if not self.active:
            return
        square = parameter.grad.square().sum()
        self.square += square
        self.skip.copy_(torch.maximum(self.skip, (~square.isfinite()).float()))
        self.adam.found_inf = self.skip
        self.adam.step()  # it passes over all weights that have no gradient: all others
        parameter.grad = None

    def apply(self, step: int | Tensor, loss: Tensor, warm_up: float | Tensor) -> Tensor:
        self.active = False
        bad = (self.skip > 0) & (self.bad_step < 0)
        self.bad_step.copy_(torch.where(bad, step, self.bad_step))
        return self.square.sqrt()
