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

    "auto" is bf16 on a GPU or CPU that has it, fp16 on an older GPU, "no" (fp32) elsewhere. fp16
    needs its loss scaled up, or small gradients vanish. Noise mixing and loss are fp32 always.
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
    """

    def __init__(
        self,
        groups: Iterable[tuple[float, list[nn.Parameter]]],
        weight_decay: float,
        max_grad_norm: float,
        scaled: bool,
    ):
        groups = [{"params": params, "lr": lr, "base_lr": lr} for lr, params in groups]
        self.parameters = [p for group in groups for p in group["params"]]
        self.adam = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
        self.max_grad_norm, self.scaled = max_grad_norm, scaled
        device = self.parameters[0].device
        self.scale = torch.tensor(2.0**16 if scaled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.bad_step = torch.tensor(-1.0, device=device)

    def apply(self, step: int, loss: Tensor, warm_up: float) -> Tensor:
        """Update the weights from the gradients of `scale · loss`; the gradients' norm before
        clipping, (). `warm_up` multiplies the learning rates."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters]) / self.scale
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        overflow = ~norm.isfinite()
        bad = ~loss.isfinite() | (overflow & (self.scale <= 1))  # without a scale to blame
        self.bad_step = torch.where(bad & (self.bad_step < 0), float(step), self.bad_step)
        skip = overflow | (self.bad_step >= 0)

        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * warm_up
        # The fused kernel divides by grad_scale, and does nothing where found_inf is 1.
        self.adam.grad_scale, self.adam.found_inf = self.scale, skip.float()
        self.adam.step()
        self.adam.zero_grad()

        if self.scaled:
            self.good_steps = torch.where(overflow, 0.0, self.good_steps + 1)
            grow = self.good_steps == GROWTH_INTERVAL
            self.good_steps = torch.where(grow, 0.0, self.good_steps)
            factor = torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0))
            self.scale = self.scale * factor
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything that the next `apply` depends on beside the weights."""
        out = {"scale": self.scale, "good_steps": self.good_steps}
        for i, parameter in enumerate(self.parameters):
            for key, value in self.adam.state[parameter].items():
                out[f"{key}.{i}"] = value
        return out

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.scale = state["scale"].to(self.scale.device)
        self.good_steps = state["good_steps"].to(self.scale.device)
        for i, parameter in enumerate(self.parameters):
            self.adam.state[parameter] = {
                key: state[f"{key}.{i}"].to(parameter.device, copy=True)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
