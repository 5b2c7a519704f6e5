"""What a run trains: all weights of a network, low-rank differences of some, or one new word.

One loss and one run for all three: what the optimizer is given for each network differs.
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import lora, textual_inversion
from ..common.files import write_text
from ..formats import adapters
from ..pipeline import StableDiffusion
from . import optimizer, report
from .settings import TrainConfig

LORA_FILE = "lora.safetensors"  # kohya's form, for A1111 and ComfyUI
# What is usual for LoRA: B starts at zero, and steps that suit whole weights would hardly move it.
LORA_RATES = {"learning_rate": 1e-4, "text_encoder_learning_rate": 5e-5}
# As diffusers' script has them; no network trains.
WORD = {"learning_rate": 5e-4, "max_train_steps": 3000, "train_text_encoder": False}


def defaults(given: dict) -> dict:
    """The settings that suit the method, where nothing else is said."""
    method = None if "config" in given else given.get("method")
    if method == "textual_inversion":
        return WORD | {"instance_prompt": f"a {given.get('placeholder_token')}"}
    return LORA_RATES if method == "lora" else {}


def to_train(sd: StableDiffusion, config: TrainConfig) -> dict[str, nn.Module]:
    """What is trained, by the name of its network: itself, adapters of it, or a word for it, which
    is added to the model."""
    if config.method == "textual_inversion":
        word = (config.placeholder_token, config.initializer_token, config.num_vectors)
        return {"text_encoder": textual_inversion.create(sd, *word)}
    names = ["unet", "text_encoder"] if config.train_text_encoder else ["unet"]
    if config.method == "dreambooth":
        return {name: sd.networks[name] for name in names}
    alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    return {
        name: lora.create(sd.networks[name], config.rank, alpha, config.lora_targets, config.seed)
        for name in names
    }


def rates(config: TrainConfig) -> dict[str, float]:
    """Learning rates, by what `to_train` gives."""
    of_text = config.learning_rate if config.trains_word else config.text_encoder_learning_rate
    return {"unet": config.learning_rate, "text_encoder": of_text}


def prompts_of(
    config: TrainConfig, captions: list[str | None], shown: tuple[Tensor, ...]
) -> tuple[list[str], tuple[Tensor, ...]]:
    """All prompts of a run, and Batches.prompts. `captions` are the photographs', `shown` is
    Batches.shown. A photograph comes under its caption, else its subject's prompt or, of Textual
    Inversion, one of many; a class image under its subject's class prompt."""
    subjects, common = config.subjects, config.prompts
    if not any(captions) and len(subjects) == 1 and (not config.trains_word or len(common) == 1):
        return common, ()  # one for each term
    templates = [common] if config.trains_word else [[s.instance_prompt] for s in subjects]
    own = [[c] if c else templates[s] for c, s in zip(captions, shown[0].tolist(), strict=True)]
    terms = [own, *([[subjects[s].class_prompt] for s in of.tolist()] for of in shown[1:])]
    prompts = list(dict.fromkeys(prompt for term in terms for of in term for prompt in of))
    number, longest = {p: i for i, p in enumerate(prompts)}, max(map(len, own))
    rows = [[[number[p] for p in of * (longest // len(of))] for of in term] for term in terms]
    return prompts, tuple(map(torch.tensor, rows))


def place(
    sd: StableDiffusion,
    trained: dict[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """The networks go to the device as they came, but those that keep their weights while something
    is trained in them go in `dtype`, where the run computes in 16 bits."""
    for name, network in sd.networks.items():
        trains = trained.get(name) is network
        network.requires_grad_(trains)
        if name in {"unet", *trained} and not trains:
            network.to(device, dtype)
    sd.to(device)


def attach(sd: StableDiffusion, trained: dict[str, nn.Module]) -> None:
    """From now on the networks compute with what is trained beside their own weights."""
    for name, of_it in trained.items():
        if isinstance(of_it, textual_inversion.Word):
            textual_inversion.attach(sd, of_it)
        elif of_it is not sd.networks[name]:
            lora.attach(sd.networks[name], of_it)


def write(
    sd: StableDiffusion,
    config: TrainConfig,
    trained: dict[str, nn.Module],
    step: int,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """The result after `step` updates, or a snapshot, and its card: the model as a diffusers
    folder, or both forms of a LoRA's or a word's file."""
    if config.method == "dreambooth":
        sd.save(folder, dtype)
    elif config.method == "textual_inversion":
        [word], token = trained.values(), config.placeholder_token
        textual_inversion.store(sd, word)
        adapters.write_embedding(folder / adapters.DIFFUSERS_EMBEDDING, token, word.vectors)
        adapters.write_embedding(folder / a1111_name(token), "emb_params", word.vectors)
    else:
        adapters.write_kohya_lora(folder / LORA_FILE, sd.networks, trained, dtype)
        adapters.write_diffusers_lora(folder, sd.networks, trained, dtype)
    write_text(folder / "README.md", report.model_card(sd, config, step))


def a1111_name(token: str) -> str:
    """The file whose name is the word in A1111 and ComfyUI: <my-dog> is my-dog there."""
    return (re.sub(r"[^\w-]", "", token) or "word") + ".safetensors"


@torch.no_grad()
def moved(
    sd: StableDiffusion, trained: dict[str, nn.Module], originals: dict[str, Tensor]
) -> dict[str, float]:
    """‖w − w_original‖ / ‖w_original‖ by what moved; with adapters ‖ΔW‖ / ‖W‖ over their layers."""
    shares = {}
    for name, module in trained.items():
        network, what = sd.networks[name], f"the {name}'s weights"
        if isinstance(module, textual_inversion.Word):
            what = "the word's vectors"
        if not isinstance(module, nn.ModuleDict):
            shares[what] = optimizer.moved(name, module, originals)
            continue
        change = norm = 0.0
        for a in module.values():
            change += a.delta().square().sum().item()
            norm += network.get_submodule(a.layer).weight.float().square().sum().item()
        shares[what] = math.sqrt(change / norm)
    return shares
