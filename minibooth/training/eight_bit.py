"""AdamW with its averages in 8 bits, by bitsandbytes. Unlike the rest of a step it waits for the
device."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..common.errors import UserError, first_line


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
