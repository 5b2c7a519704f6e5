"""Hypernetworks, as NovelAI and AUTOMATIC1111 call them: train what keys and values are made of.

    k = W_k (c + f_k(c))     v = W_v (c + f_v(c))     f(c) = W_2 a(W_1 c + b_1) + b_2

c is what a layer of attention reads: the text or, where pixels attend to pixels, those. Each width
d of c has one pair f_k, f_v, shared by all layers that read something so wide: in SD 1.5 the text
has 768 and the pixels have 320, 640 and 1280. W_1: (2d, d), W_2: (d, 2d); a is an activation, or
none. That is 8d² + 6d numbers a pair, 21,939,840 for the four. W_k, W_v and all the rest stay as
they are. (Elsewhere a hypernetwork is one that makes another's weights, arXiv 1609.09106.)

W_2 and b_2 start at zero, so f is zero and training starts from the model itself, as with LoRA. In
AUTOMATIC1111 all W start small and random: there it starts from a model with noise in its keys.

The network knows nothing of it and is saved as ever: f stands before W_k in its `forward`, not in a
hook, since what stands there is computed once for a text and not at every step of a sampling.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .common.errors import UserError
from .unet import Attention, UNet

OFFERED = {  # activations
    "linear": nn.Identity,  # none
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,
    "elu": nn.ELU,
    "swish": nn.Hardswish,  # as the files mean it
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
OTHERS = """CELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LogSigmoid Mish ReLU6 SELU SiLU
Softplus Softshrink Softsign Tanhshrink"""
# Those that files may have.
ACTIVATIONS = OFFERED | {name.lower(): getattr(nn, name) for name in OTHERS.split()}
STARTS = ("zero", "normal")


@dataclass(frozen=True)
class Form:
    """How f is built, for every width d."""

    structure: tuple[float, ...] = (1, 2, 1)  # widths from c to f(c), times d
    activation: str = "linear"  # of ACTIVATIONS, between the layers
    activate_output: bool = False  # after the last one, too
    layer_norm: bool = False  # after each

    def __post_init__(self):
        first, *inner, last = self.structure if len(self.structure) > 1 else (0, 0)
        if not first == last == 1 or len(inner) > 16 or not all(0 < share <= 64 for share in inner):
            given = ",".join(f"{x:g}" for x in self.structure)
            raise UserError(
                f"layer structure {given}: give numbers that begin and end with 1, at most 16 "
                "between them, each from 0 to 64"
            )
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation {self.activation!r} is none of {', '.join(ACTIVATIONS)}")

    def network(self, d: int) -> nn.Sequential:
        """f: (…, d) → (…, d)."""
        layers, sizes = [], [max(1, int(d * share)) for share in self.structure]
        for i in range(1, len(sizes)):
            layers.append(nn.Linear(sizes[i - 1], sizes[i]))
            if self.activation != "linear" and (self.activate_output or i < len(sizes) - 1):
                layers.append(ACTIVATIONS[self.activation]())
            if self.layer_norm:
                layers.append(nn.LayerNorm(sizes[i]))
        return nn.Sequential(*layers)


class Pair(nn.Module):
    """f_k and f_v of one width."""

    def __init__(self, form: Form, d: int):
        super().__init__()
        self.k, self.v = form.network(d), form.network(d)


class Hypernetwork(nn.Module):
    """The pairs of all its widths; fp32, not attached yet."""

    def __init__(self, form: Form, widths: Iterable[int]):
        super().__init__()
        self.form = form
        self.pairs = nn.ModuleDict({str(d): Pair(form, d) for d in widths})


def attentions(unet: UNet) -> list[Attention]:
    return [layer for layer in unet.modules() if isinstance(layer, Attention)]


def widths(unet: UNet) -> list[int]:
    """Of all that its attention reads, the smallest first."""
    return sorted({layer.to_k.in_features for layer in attentions(unet)})


def require_widths(unet: UNet, wanted: Iterable[int]) -> None:
    """Raise UserError naming the first width that no attention of the UNet reads."""
    there = widths(unet)
    for d in wanted:
        if d not in there:
            known = ", ".join(map(str, there))
            raise UserError(f"no layer of this model's attention reads {d} numbers, but {known}")


def create(
    unet: UNet, wanted: Iterable[int] = (), form: Form | None = None, start="zero", seed: int = 0
) -> Hypernetwork:
    """A fresh one, of these widths or of all, on the UNet's device.

    "zero": W_2 is, and what stands before it is uniform in ±1/√c_in as LoRA's A is, from a CPU
    generator. "normal": all W are N(0, .01²), as in AUTOMATIC1111. Biases are zero. Raises
    UserError for a width that the model has not.
    """
    wanted = tuple(wanted) or widths(unet)
    require_widths(unet, wanted)
    made, generator = Hypernetwork(form or Form(), wanted), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for f in (f for pair in made.pairs.values() for f in (pair.k, pair.v)):
            *inner, last = [layer for layer in f if isinstance(layer, nn.Linear)]
            for layer in (*inner, last):
                bound = 0.0 if layer is last else layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                if start == "normal":
                    layer.weight.normal_(0, 0.01, generator=generator)
                layer.bias.zero_()
    return made.to(next(unet.parameters()).device)


def projections(unet: UNet, made: Hypernetwork) -> list[tuple[nn.Linear, nn.Sequential]]:
    """Every W_k and W_v that it stands before, and its f."""
    found = []
    for layer in attentions(unet):
        if (d := str(layer.to_k.in_features)) in made.pairs:
            found += [(layer.to_k, made.pairs[d].k), (layer.to_v, made.pairs[d].v)]
    return found


def shifted(project, f: nn.Module, strength: float, c: Tensor) -> Tensor:
    """W (c + strength · f(c))."""
    return project(c + strength * f(c))


def attach(unet: UNet, made: Hypernetwork, strength: float = 1.0) -> None:
    """From now on the UNet computes with it; of several, the last one's f comes first."""
    for layer, f in projections(unet, made):
        layer.forward = partial(shifted, layer.forward, f, strength)


def detach(unet: UNet) -> None:
    """The UNet is what it was before any `attach`."""
    for layer in attentions(unet):
        for project in (layer.to_k, layer.to_v):
            vars(project).pop("forward", None)
