"""AdamW in the backward pass: gradients are used and dropped one by one."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .optimizer import Update


class UpdateInBackward(Update):
    """AdamW on each weight as soon as the backward pass has its gradient, which is then dropped.

    So gradients are never all in memory. Nor is their norm known before the first update: nothing
    is clipped. `start` comes before the backward pass. A gradient that is not finite stops this and
    all later updates; weights whose gradients came before it have had theirs. 8-bit AdamW, which
    would have to wait for the device to know, takes it as zero and stops after this step.
    """

    def __init__(
        self,
        groups: Iterable[tuple[float, list[nn.Parameter]]],
        weight_decay: float,
        use_8bit_adam: bool = False,
    ):
        super().__init__(groups, weight_decay, float("inf"), False, use_8bit_adam)
        self.active = False  # gradients that somebody only wants to look at update nothing
        self.skip = torch.zeros_like(self.scale)  # 1: nothing is updated any more
        self.square = torch.zeros_like(self.scale)  # of the gradients' norm so far, or not finite
        # For each weight the groups of an optimizer of this weight alone.
        self.alone = {
            p: [{**group, "params": [p]}]
            for group in self.adam.param_groups
            for p in group["params"]
        }
        self.hooks = [p.register_post_accumulate_grad_hook(self.apply_one) for p in self.parameters]

    def release(self) -> None:
        super().release()
        for hook in self.hooks:
            hook.remove()

    def start(self, loss: Tensor, rate: float | Tensor) -> None:
        self.active = True
        # Zero, or NaN where the loss is not finite or no update may happen any more.
        self.square.copy_(torch.where(self.bad_step >= 0, float("nan"), loss.detach() * 0))
        self.set_skip()
        for group in self.adam.param_groups:
            group["lr"].fill_(group["base_lr"] * rate)
        self.adam.found_inf = self.skip
        if self.eight_bit:
            self.adam.fetch()

    @torch.no_grad()
    def apply_one(self, parameter: nn.Parameter) -> None:
        if not self.active:
            return
        square = parameter.grad.square().sum()
        self.square += square
        self.set_skip()
        if not self.eight_bit:
            every, self.adam.param_groups = self.adam.param_groups, self.alone[parameter]
            self.adam.step()
            self.adam.param_groups = every
        elif parameter in self.adam.numbers:
            parameter.grad.masked_fill_(~square.isfinite(), 0.0)
            self.adam.update(parameter)
        parameter.grad = None

    def set_skip(self) -> None:
        """Skip all updates from now on if the sum of squares is not finite. In two kernels, since
        there are hundreds of weights: x − x is 0 of a number, and NaN of NaN and infinity."""
        torch.ne(self.square - self.square, 0, out=self.skip)

    def apply(self, step: int | Tensor, loss: Tensor, rate: float | Tensor) -> Tensor:
        self.active = False
        bad = (self.skip > 0) & (self.bad_step < 0)
        self.bad_step.copy_(torch.where(bad, step, self.bad_step))
        return self.square.sqrt()
