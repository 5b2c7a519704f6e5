"""AdamW by an own kernel, which also keeps 16-bit copies of the weights for the networks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import ops
from ..device import ranks
from .optimizer import Update


class UpdateByKernel(Update):
    """The same as Update to fp32's rounding, in 30 bytes of traffic a weight where that takes 48.

    The networks compute with copies of their linear and convolution weights in `dtype`, which stay
    from step to step, and gradients come in `dtype`: autocast casts neither. Each of these weights
    is used once in a step, so its fp32 gradient would be the same number, cast. Several batches for
    one update would be added up in 16 bits: they are left to Update. A weight of another kind has
    no copy, as autocast casts none; nor has the UNet's conv_in, whose dtype says what the UNet's
    inputs are cast to: the gradients of a text that trains are added up in fp32.

    The fp32 weights are where they always were, but within `copies_in_place`.
    """

    def __init__(
        self, networks: Iterable[nn.Module], dtype: torch.dtype | None, *of_update, **more
    ):
        """networks: whose weights they are. The rest as Update's, whose AdamW is in full."""
        super().__init__(*of_update, **more)
        self.dtype = dtype
        trained, kinds = set(self.parameters), nn.Linear | nn.Conv2d
        self.places = [  # of the weights that have copies
            (module._parameters, name, p)
            for network in networks
            for module in network.modules()
            if isinstance(module, kinds) and module is not getattr(network, "conv_in", None)
            for name, p in module._parameters.items()
            if dtype is not None and p in trained
        ]
        self.copies: dict[nn.Parameter, nn.Parameter] = {}
        self.table = None
        rates = [group["base_lr"] for group in self.adam.param_groups]
        self.base_rates = torch.tensor(rates, device=self.scale.device)  # (groups,)
        self.count = torch.zeros_like(self.scale)  # of updates

    def allocate(self) -> None:
        if self.table is not None:
            return
        super().allocate()
        self.copies = {p: nn.Parameter(p.detach().to(self.dtype)) for _, _, p in self.places}
        states = [self.adam.state[p] for p in self.parameters]
        for state in states:
            state["step"] = self.count  # which is the same for all
        averages = [[state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")]
        weights = [p.detach() for p in self.parameters]
        copies = [self.copies.get(p) for p in self.parameters]
        copies = [copy if copy is None else copy.detach() for copy in copies]
        groups = [i for i, group in enumerate(self.adam.param_groups) for _ in group["params"]]
        self.table = ops.adamw_kernels.Table(weights, averages, copies, groups)

    @contextmanager
    def copies_in_place(self) -> Iterator[None]:
        self.allocate()
        for parameters, name, p in self.places:
            parameters[name] = self.copies[p]
        try:
            yield
        finally:
            for parameters, name, p in self.places:
                parameters[name] = p

    def forget(self) -> None:
        super().forget()
        for copy in self.copies.values():
            copy.grad = None

    def release(self) -> None:
        super().release()
        self.places, self.copies, self.table = [], {}, None

    def norm_of_gradients(self) -> Tensor:
        return self.table.norm([self.copies.get(p, p).grad for p in self.parameters])

    def move(self, rate: float | Tensor, divisor: Tensor, skip: Tensor) -> None:
        self.count.add_(1 - skip)
        rates = self.base_rates * rate
        self.table.update(rates, divisor, skip, self.count, self.adam.defaults["weight_decay"])

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        with torch.no_grad():
            for p, copy in self.copies.items():
                copy.copy_(p)


def possible(config) -> bool:
    """Whether the kernel can do the updates: each of one batch, and after the backward pass."""
    other = config.use_8bit_adam or config.optimizer_in_backward
    return not other and config.gradient_accumulation_steps == ranks.count() == 1


def wanted(groups: list[tuple[float, list[nn.Parameter]]], dtype: torch.dtype | None) -> bool:
    """Whether the kernel is to update these weights of networks that compute in `dtype`."""
    largest = max((p for _, weights in groups for p in weights), key=lambda p: p.numel())
    return ops.adamw_by_kernel(largest, dtype or torch.float32)
