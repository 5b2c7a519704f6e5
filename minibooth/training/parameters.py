"""The weights that train: by name, as they were, with gradients, and how far they moved."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


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


@torch.no_grad()
def moved(name: str, network: nn.Module, originals: dict[str, Tensor]) -> float:
    """‖w − w_original‖ / ‖w_original‖ over a network; `originals` by the names of named_weights."""
    change = norm = 0.0
    for key, p in network.named_parameters():
        original = originals[f"{name}.{key}"].to(p.device, torch.float32)
        change += (p - original).square().sum().item()
        norm += original.square().sum().item()
    return math.sqrt(change / norm)
