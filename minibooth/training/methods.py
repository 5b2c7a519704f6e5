"""What a run trains: all weights of a network, or low-rank differences of some. One loss for both.

The names of the networks are the same for both; what the optimizer is given for each is not.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import lora
from ..common.files import write_text
from ..formats import adapters
from ..pipeline import StableDiffusion
from . import optimizer, report
from .settings import TrainConfig

LORA_FILE = "lora.safetensors"  # kohya's form, for A1111 and ComfyUI
# What is usual for LoRA: B starts at zero, and steps that suit whole weights would hardly move it.
LORA_RATES = {"learning_rate": 1e-4, "text_encoder_learning_rate": 5e-5}


def defaults(given: dict) -> dict:
    """The settings that suit the method, where nothing else is said."""
    return LORA_RATES if given.get("method") == "lora" and "config" not in given else {}


def to_train(sd: StableDiffusion, config: TrainConfig) -> dict[str, nn.Module]:
    """What is trained, by the name of its network: the network itself, or adapters of it."""
    names = ["unet", "text_encoder"] if config.train_text_encoder else ["unet"]
    if config.method == "dreambooth":
        return {name: sd.networks[name] for name in names}
    alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    return {
        name: lora.create(sd.networks[name], config.rank, alpha, config.lora_targets, config.seed)
        for name in names
    }


def freeze(sd: StableDiffusion, trained: dict[str, nn.Module], dtype: torch.dtype | None) -> None:
    """Networks with adapters keep their weights, in `dtype` where the run computes in 16 bits, and
    compute with the adapters from now on."""
    for name, of_it in trained.items():
        network = sd.networks[name]
        if of_it is not network:
            network.requires_grad_(False).to(dtype)
            lora.attach(network, of_it)


def write(
    sd: StableDiffusion,
    config: TrainConfig,
    trained: dict[str, nn.Module],
    step: int,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """The result after `step` updates, or a snapshot, and its card: the model as a diffusers
    folder, or both forms of a LoRA file."""
    if config.method == "dreambooth":
        sd.save(folder, dtype)
    else:
        adapters.write_kohya_lora(folder / LORA_FILE, sd.networks, trained, dtype)
        adapters.write_diffusers_lora(folder, sd.networks, trained, dtype)
    write_text(folder / "README.md", report.model_card(sd, config, step))


@torch.no_grad()
def moved(
    sd: StableDiffusion, trained: dict[str, nn.Module], originals: dict[str, Tensor]
) -> dict[str, float]:
    """By network ‖w − w_original‖ / ‖w_original‖; with adapters ‖ΔW‖ / ‖W‖ over their layers."""
    shares = {}
    for name, module in trained.items():
        network = sd.networks[name]
        if module is network:
            shares[name] = optimizer.moved(name, network, originals)
            continue
        change = norm = 0.0
        for a in module.values():
            change += a.delta().square().sum().item()
            norm += network.get_submodule(a.layer).weight.float().square().sum().item()
        shares[name] = math.sqrt(change / norm)
    return shares
