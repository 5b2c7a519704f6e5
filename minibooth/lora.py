"""LoRA (arXiv 2106.09685): train the low-rank difference of a layer, not the layer. Eq. 3 there:

    h = W x + ΔW x = W x + (α/r) B A x        A: (r, c_in), B: (c_out, r)

W stays as it is. A and B are all that is trained: with r = 4 and c_in = c_out = 320, 2,560 numbers
in place of 102,400. DreamBooth's loss does not change, only the set of trained tensors does.

B starts at zero, so ΔW is zero and training starts from the pretrained model itself; A starts
random, or nothing would ever move: B's gradient is proportional to A x, and A's to B. α/r keeps ΔW
at one size when r is changed, so that a learning rate found for one rank suits another.

An adapter is a forward hook: PyTorch calls it with what goes into its layer and what comes out, and
what it returns takes that output's place. So the network knows nothing of it and is saved as ever.
W + ΔW is never made while training: in 16 bits a small ΔW would be rounded away.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common.errors import UserError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
MLPS = ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")
TARGETS = {  # how the names of the adapted layers end; in SD 1.5's UNet and text encoder these are
    "attention": ATTENTION,  # 128 + 48: diffusers' choice
    "transformers": ATTENTION + MLPS,  # 192 + 72: kohya's
    "all": ("",),  # 230 + 72: every linear layer and 1×1 convolution
}


class Adapter(nn.Module):
    """(α/r) B A of one layer."""

    def __init__(self, layer: str, A: Tensor, B: Tensor, alpha: float):
        super().__init__()
        self.layer = layer  # its name in the network
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)  # (r, c_in), (c_out, r): fp32
        self.alpha = alpha
        self.strength = 1.0  # once attached: 0 is the layer without it

    @property
    def scale(self) -> float:
        return self.alpha / len(self.A)

    def delta(self) -> Tensor:
        """ΔW = (α/r) B A: (c_out, c_in)."""
        return self.scale * (self.B @ self.A)

    def add(self, layer: nn.Module, inputs: tuple[Tensor], h: Tensor) -> Tensor:
        """The hook: W x → W x + strength · (α/r) B A x, in the precision of x."""
        x = inputs[0]
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        if x.ndim == 4:  # (B, C, H, W): the layer is a 1×1 convolution
            low_rank = F.conv2d(F.conv2d(x, A[..., None, None]), B[..., None, None])
        else:
            low_rank = F.linear(F.linear(x, A), B)
        return h + self.strength * self.scale * low_rank


def layers(network: nn.Module, targets: str = "all") -> dict[str, nn.Module]:
    """The linear layers and 1×1 convolutions of a network that `targets`, of TARGETS, names."""
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) or getattr(layer, "kernel_size", None) == (1, 1)
        if name.endswith(TARGETS[targets])
    }


def matrix(layer: nn.Module) -> Tensor:
    """W: (c_out, c_in), also of a convolution."""
    return layer.weight.flatten(1)


def shapes(network: nn.Module, rank: int, targets: str) -> list[tuple[int, int]]:
    """Of all that `create` would make to train: A: (r, c_in) and B: (c_out, r) of each layer."""
    out = []
    for layer in layers(network, targets).values():
        c_out, c_in = matrix(layer).shape
        out += [(rank, c_in), (c_out, rank)]
    return out


def collect(adapters: list[Adapter]) -> nn.ModuleDict:
    """Adapters as one module; its keys are the layers' names, in which it allows no dots."""
    return nn.ModuleDict({a.layer.replace(".", "_"): a for a in adapters})


def create(
    network: nn.Module, rank: int, alpha: float, targets: str = "attention", seed: int = 0
) -> nn.ModuleDict:
    """Fresh adapters for a network, on its device: one Adapter per layer, not attached yet.

    A is uniform in ±1/√c_in, as in the paper's code and peft, from a CPU generator; B is zero.
    Raises UserError for a rank below 1.
    """
    if rank < 1:
        raise UserError(f"rank {rank}: give a whole number from 1")
    generator, adapters = torch.Generator().manual_seed(seed), []
    for name, layer in layers(network, targets).items():
        c_out, c_in = matrix(layer).shape
        A = (2 * torch.rand(rank, c_in, generator=generator) - 1) / c_in**0.5
        adapters.append(Adapter(name, A, torch.zeros(c_out, rank), alpha))
    return collect(adapters).to(next(network.parameters()).device)


def attach(network: nn.Module, adapters: nn.ModuleDict, strength: float = 1.0) -> None:
    """From now on the network computes with them: W x + strength · ΔW x."""
    for a in adapters.values():
        a.strength = strength
        a.handle = network.get_submodule(a.layer).register_forward_hook(a.add)


def detach(adapters: nn.ModuleDict) -> None:
    """The network is what it was before `attach`."""
    for a in adapters.values():
        a.handle.remove()


@torch.no_grad()
def merge(network: nn.Module, adapters: nn.ModuleDict, strength: float = 1.0) -> None:
    """W ← W + strength · ΔW, once and for all: the adapters need not be attached any more."""
    for a in adapters.values():
        layer = network.get_submodule(a.layer)
        W = matrix(layer).float() + strength * a.delta().to(layer.weight.device)
        layer.weight.data = W.view_as(layer.weight).to(layer.weight.dtype)


class Extracted(NamedTuple):
    adapters: nn.ModuleDict
    kept: float  # ‖ΔW‖² of the adapters, together
    of_layers: float  # ‖W_tuned − W_base‖² of the layers that `targets` names
    of_all: float  # the same of all weights of the network


@torch.no_grad()
def extract(base: nn.Module, tuned: nn.Module, rank: int, targets: str = "all") -> Extracted:
    """The adapters of that rank that come nearest to what training has changed.

    Nearest are the largest `rank` singular values (Eckart and Young 1936) of each difference
    W_tuned − W_base = U S V: B = U √S, A = √S V, α = r. A layer that did not change gets none. Both
    networks must be of one kind.
    """
    adapters, kept, of_layers, of_all = [], 0.0, 0.0, 0.0
    for p, q in zip(base.parameters(), tuned.parameters(), strict=True):
        of_all += (q.double() - p.double()).square().sum().item()
    for name, layer in layers(base, targets).items():
        difference = matrix(tuned.get_submodule(name)).float() - matrix(layer).float()
        if not difference.any():
            continue
        U, S, V = torch.linalg.svd(difference, full_matrices=False)
        of_layers += S.double().square().sum().item()
        U, S, V = U[:, :rank], S[:rank], V[:rank]
        kept += S.double().square().sum().item()
        missing = rank - len(S)  # in a layer that is too small: readers expect one rank for all
        A = F.pad(S.sqrt()[:, None] * V, (0, 0, 0, missing))  # (r, c_in)
        B = F.pad(U * S.sqrt(), (0, missing))  # (c_out, r)
        adapters.append(Adapter(name, A, B, alpha=rank))
    return Extracted(collect(adapters), kept, of_layers, of_all)
