"""The optimizer's side of a training step: loss scale, clipping, AdamW, the non-finite guard.

Nothing here waits for the device, but 8-bit AdamW: whether an update may happen is decided on it.
"""

import logging
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..common.errors import UserError, first_line
from .settings import TrainConfig

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


def bitsandbytes(device: torch.device):
    """Its functions. Raises UserError where they are missing or do not work."""
    if device.type not in ("cuda", "cpu"):
        raise UserError("--use_8bit_adam needs a CUDA device or a CPU: leave it out")
    try:
        with hub_kernels_left_out():
            from bitsandbytes import functional
    except ImportError as e:
        raise UserError(
            f"--use_8bit_adam needs bitsandbytes ({first_line(e)}): pip install bitsandbytes"
        ) from None
    return functional


@contextmanager
def hub_kernels_left_out() -> Iterator[None]:
    """Within it bitsandbytes imports without Hugging Face's package `kernels`, and says nothing of
    that, for a folder of this name or for none.

    It would have it download code for 4-bit weights, which are not used here. What else it says
    when it is imported is heard.
    """
    said = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = {name: sys.modules[name] for name in ("kernels",) if name in sys.modules}
    sys.modules["kernels"] = None  # importing it is an ImportError

    def heard(record: logging.LogRecord) -> bool:
        return "kernels-community" not in record.getMessage()

    said.addFilter(heard)
    try:
        yield
    finally:
        said.removeFilter(heard)
        del sys.modules["kernels"]
        sys.modules.update(before)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with its averages in 8 bits (arXiv 2110.02861) by bitsandbytes, for an Update.

    Each 256 neighbours in memory share a scale; a tensor with less than 4096 weights has averages
    in fp32. bitsandbytes wants the learning rate and the number of the step from the CPU and
    launches on the default stream: an update waits for the device and cannot be captured.
    """

    SMALL, BLOCK = 4096, 256
    BETAS, EPS = (0.9, 0.999), 1e-8  # torch.optim.AdamW's

    def __init__(self, groups: list[dict], weight_decay: float):
        super().__init__(groups, {"weight_decay": weight_decay})
        device = self.param_groups[0]["params"][0].device
        self.functional = bitsandbytes(device)
        # What the 256 codes stand for, between -1 and 1; the second average is never negative.
        create = self.functional.create_dynamic_map
        self.codes = [create(signed=signed).to(device) for signed in (True, False)]
        self.grad_scale = torch.ones((), device=device)
        self.found_inf = torch.zeros((), device=device)

    @classmethod
    def fresh_state(cls, p: Tensor) -> dict[str, Tensor]:
        """Before the first step."""
        small, blocks = p.numel() < cls.SMALL, -(-p.numel() // cls.BLOCK)
        dtype = torch.float32 if small else torch.uint8
        state = {"step": torch.zeros(())}  # on the CPU
        state |= {key: torch.zeros_like(p, dtype=dtype) for key in ("state1", "state2")}
        if not small:
            state |= {key: p.new_zeros(blocks) for key in ("absmax1", "absmax2")}
        return state

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights that have a gradient, divided by grad_scale; none if found_inf."""
        self.fetch()
        for p in self.numbers:
            if p.grad is not None:
                self.update(p)

    def fetch(self) -> None:
        """Wait once for the device: what `update` must know of each weight on the CPU. Of none if
        found_inf."""
        rates = [group["lr"] for group in self.param_groups]
        scalars = torch.stack([self.found_inf, self.grad_scale, *rates])
        found_inf, scale, *rates = scalars.tolist()
        self.numbers = {}
        for group, lr in zip(self.param_groups, rates, strict=True):
            numbers = lr, group["weight_decay"], 1 / scale
            if not found_inf:
                self.numbers |= dict.fromkeys(group["params"], numbers)

    def update(self, p: nn.Parameter) -> None:
        """One weight, with the numbers that were fetched."""
        lr, decay, factor = self.numbers[p]
        state = self.state[p]
        if not state:
            state.update(self.fresh_state(p))
        count = int(state["step"].add_(1))
        gradient = p.grad if p.grad.stride() == p.stride() else torch.empty_like(p).copy_(p.grad)
        weight, gradient, m, v = map(flat, (p, gradient, state["state1"], state["state2"]))
        (beta1, beta2), eps, bnb = self.BETAS, self.EPS, self.functional
        if "absmax1" not in state:
            bnb.optimizer_update_32bit(
                *("adam", gradient, weight, m, beta1, eps, count, lr, v, beta2),
                weight_decay=decay,
                gnorm_scale=factor,
            )
            return
        bnb.optimizer_update_8bit_blockwise(
            *("adam", gradient, weight, m, v, beta1, beta2, 0.0, 0.0, eps, count, lr),
            *(*self.codes, state["absmax1"], state["absmax2"]),
            weight_decay=decay,
            gnorm_scale=factor,
        )


def flat(x: Tensor) -> Tensor:
    """Its elements in the order in which they lie in memory."""
    return x.as_strided((x.numel(),), (1,))


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

    def start(self, loss: Tensor, rate: float | Tensor) -> None:
        """Before the backward pass: for those who update in it."""

    def release(self) -> None:
        """No more updates: drop gradients and averages, and leave later gradients alone."""
        self.forget()
        self.adam.state.clear()

    def apply(self, step: int | Tensor, loss: Tensor, rate: float | Tensor) -> Tensor:
        """Update the weights from the gradients of `scale · loss`; the gradients' norm before
        clipping, (). `rate` multiplies the learning rates."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters]) / self.scale
        clip = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1)  # what gradients are divided by
        overflow = ~norm.isfinite()
        bad = ~loss.isfinite() | (overflow & (self.scale <= 1))  # without a scale to blame
        self.bad_step.copy_(torch.where(bad & (self.bad_step < 0), step, self.bad_step))
        skip = overflow | (self.bad_step >= 0)

        for group in self.adam.param_groups:
            group["lr"].fill_(group["base_lr"] * rate)
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
            fresh = self.fresh_state(parameter)  # in the weight's memory format
            for key, value in fresh.items():
                value.copy_(state[f"{key}.{i}"])
            self.adam.state[parameter] = fresh

    def fresh_state(self, p: Tensor) -> dict[str, Tensor]:
        return fresh_state(p, self.eight_bit)


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


# ---- what is trained ---------------------------------------------------------------------------


def named_weights(networks: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Their weights as "unet.conv_in.weight" and so on; those of adapters with a layer's name."""
    named = {}
    for name, network in networks.items():
        if isinstance(network, nn.ModuleDict):
            for a in network.values():
                named |= {f"{name}.{a.layer}.{key}": p for key, p in a.named_parameters()}
        else:
            named |= {f"{name}.{key}": p for key, p in network.named_parameters()}
    return named


def originals(networks: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The weights as they are now, by the names of named_weights: on the CPU, where those that are
    there already, perhaps in a mapped file, are not copied."""
    return {key: p.detach().cpu() for key, p in named_weights(networks).items()}


def make_trainable(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Their weights become fp32 copies on the device that have gradients."""
    for network in networks:
        network.requires_grad_(True)
        for p in network.parameters():
            p.data = p.detach().to(device, torch.float32, copy=True)


def adamw(
    groups: Iterable[tuple[float, list[nn.Parameter]]], config: TrainConfig, scaled: bool
) -> Update:
    """The optimizer over groups of (learning rate, weights), with the settings of a run. `scaled`:
    fp16 wants its loss scaled."""
    decay, eight_bit = config.adam_weight_decay, config.use_8bit_adam
    if config.optimizer_in_backward:
        print("the optimizer runs in the backward pass: gradients are not clipped")
        return UpdateInBackward(groups, decay, eight_bit)
    return Update(groups, decay, config.max_grad_norm, scaled, eight_bit)


@torch.no_grad()
def moved(name: str, network: nn.Module, originals: dict[str, Tensor]) -> float:
    """‖w − w_original‖ / ‖w_original‖ over a network; `originals` by the names of named_weights."""
    change = norm = 0.0
    for key, p in network.named_parameters():
        original = originals[f"{name}.{key}"].to(p.device, torch.float32)
        change += (p - original).square().sum().item()
        norm += original.square().sum().item()
    return math.sqrt(change / norm)
