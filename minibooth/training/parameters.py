"""The weights that train: by name, as they were, with gradients, and how far they moved."""

import math

import torch
from torch import Tensor, nn

from ..pipeline import StableDiffusion


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


def unread(sd: StableDiffusion) -> tuple[str, ...]:
    """How the names of the weights begin that no loss depends on: of SDXL's first text encoder the
    last layer and the norm after it, since the UNet is shown what comes before them. Of the second
    it is shown that, too, and what comes after them as well: the pooled prompt."""
    *first, _ = sd.text_encoders
    depths = [len(sd.text_encoders[name].encoder["layers"]) for name in first]
    last = [f"encoder.layers.{depth - 1}." for depth in depths]
    pairs = zip(first, last, strict=True)
    return tuple(f"{name}.{part}" for name, layer in pairs for part in (layer, "final_layer_norm."))


def make_trainable(
    networks: dict[str, nn.Module], device: torch.device, but: tuple[str, ...] = ()
) -> None:
    """Their weights become fp32 copies on the device that have gradients; but not those whose names
    begin so, which no loss depends on: they stay as they are. Clipping and ranks wait in vain for
    their gradients, and AdamW could only let them decay. A LoRA's file has them all the same, as
    others' files have."""
    for name, p in named_weights(networks).items():
        p.requires_grad_(not name.startswith(but))
        p.data = p.detach().to(device, torch.float32, copy=True)


def that_train(networks: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Those of named_weights that make_trainable gave a gradient."""
    return {name: p for name, p in named_weights(networks).items() if p.requires_grad}


@torch.no_grad()
def moved(name: str, network: nn.Module, originals: dict[str, Tensor]) -> float:
    """‖w − w_original‖ / ‖w_original‖ over a network; `originals` by the names of named_weights."""
    change = norm = 0.0
    for key, p in network.named_parameters():
        original = originals[f"{name}.{key}"].to(p.device, torch.float32)
        change += (p - original).square().sum().item()
        norm += original.square().sum().item()
    return math.sqrt(change / norm)
