"""What a run trains: all weights of a network, low-rank differences of some, one new word, or
networks before keys and values.

One loss and one run for all four: what the optimizer is given for each network differs.
"""

import json
import math
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import hypernetwork, lora, textual_inversion
from ..common import cli
from ..common.files import named_after, write_text
from ..device import ranks
from ..formats import adapters, hypernetworks
from ..hypernetwork import Hypernetwork
from ..pipeline import StableDiffusion
from ..tokenizer import Tokenizer
from . import parameters, report
from .settings import TrainConfig

# What is usual for LoRA: B starts at zero, and steps that suit whole weights would hardly move it.
LORA_RATES = {"learning_rate": 1e-4, "text_encoder_learning_rate": 5e-5}
# As diffusers' script has them; no network trains.
WORD = {"learning_rate": 5e-4, "max_train_steps": 3000, "train_text_encoder": False}
# The rate that AUTOMATIC1111 begins with, and the steps that its guides name for it.
HYPERNETWORK = {"learning_rate": 1e-5, "max_train_steps": 10_000}
USUAL = {  # learning rates on public models
    "dreambooth": TrainConfig.learning_rate,
    "lora": LORA_RATES["learning_rate"],
    "textual_inversion": WORD["learning_rate"],
    "hypernetwork": HYPERNETWORK["learning_rate"],
}


def defaults(given: dict) -> dict:
    """The settings that suit the method, where nothing else is said. Warns of a config's learning
    rate that is another method's."""
    if "config" in given:
        warn_of_other_method(given)
    method = given.get("method")
    if method == "textual_inversion":
        return WORD | {"instance_prompt": f"a {given.get('placeholder_token')}"}
    return {"lora": LORA_RATES, "hypernetwork": HYPERNETWORK}.get(method, {})


def warn_of_other_method(given: dict) -> None:
    """`given` are the settings of a config file and the flags that replace some of them."""
    in_config = vars(TrainConfig()) | cli.read_config(Path(given["config"]), TrainConfig)
    before, now, rate = in_config["method"], given.get("method"), given.get("learning_rate")
    if now in USUAL and now != before and rate == in_config["learning_rate"]:
        usual = "" if given.get("model") == "toybox" else f" ({USUAL[now]:g} is usual)"
        warnings.warn(
            f"the learning rate {rate:g} is that of a config for --method {before}: for --method "
            f"{now} give a --learning_rate{usual}",
            stacklevel=2,
        )


def to_train(sd: StableDiffusion, config: TrainConfig) -> dict[str, nn.Module]:
    """What is trained, by the name of its network: itself, adapters of it, a hypernetwork before
    it, or a word for it, which is added to the model."""
    if config.method == "textual_inversion":
        word = (config.placeholder_token, config.initializer_token, config.num_vectors)
        return textual_inversion.create(sd, *word)
    if config.trains_hypernetwork:
        how = config.hypernetwork_widths, config.hypernetwork_form, config.weight_init
        return {"unet": hypernetwork.create(sd.unet, *how, config.seed)}
    names = ["unet", *sd.text_encoders] if config.train_text_encoder else ["unet"]
    if config.method == "dreambooth":
        return {name: sd.networks[name] for name in names}
    alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    return {
        name: lora.create(sd.networks[name], config.rank, alpha, config.lora_targets, config.seed)
        for name in names
    }


def spelled(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """With the word spelled as tokenizers do it, in all that is written and printed."""
    typed = config.placeholder_token
    word = tokenizer.spelled(typed)
    if word != typed:
        print(f"{typed} is written {word}: other programs find it only so in a prompt")
    return replace(
        config,
        placeholder_token=word,
        instance_prompt=config.instance_prompt.replace(typed, word),
        validation_prompt=tuple(p.replace(typed, word) for p in config.validation_prompt),
    )


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
    resting: Collection[str] = (),
) -> None:
    """The networks go to the device as they came, but those that keep their weights while something
    is trained in them go in `dtype`, where the run computes in 16 bits; and the `resting` ones to
    the CPU."""
    for name, network in sd.networks.items():
        trains = trained.get(name) is network
        network.requires_grad_(trains)
        if name in {"unet", *trained} and not trains:
            network.to(device, dtype)
    for name in resting:
        sd.networks[name].to("cpu")
    sd.to(device, but=resting)


def attach(sd: StableDiffusion, trained: dict[str, nn.Module]) -> None:
    """From now on the networks compute with what is trained beside their own weights."""
    for name, of_it in trained.items():
        if isinstance(of_it, textual_inversion.Word):
            textual_inversion.attach(sd.networks[name], of_it)
        elif isinstance(of_it, Hypernetwork):
            hypernetwork.attach(sd.unet, of_it)
        elif of_it is not sd.networks[name]:
            lora.attach(sd.networks[name], of_it)


def frozen_beside(sd: StableDiffusion, trained: dict[str, nn.Module]) -> list[nn.Parameter]:
    """The UNet's weights that stay while something trains beside or before them."""
    of_unet = trained.get("unet")
    if isinstance(of_unet, Hypernetwork):
        return [layer.weight for layer, _ in hypernetwork.projections(sd.unet, of_unet)]
    adapted = of_unet.values() if isinstance(of_unet, nn.ModuleDict) else ()
    return [sd.unet.get_submodule(a.layer).weight for a in adapted]


def write(
    sd: StableDiffusion,
    config: TrainConfig,
    trained: dict[str, nn.Module],
    step: int,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """The result after `step` updates, or a snapshot, and its card: the model as a diffusers
    folder, both forms of a LoRA's or a word's file, or a hypernetwork's."""
    if config.method == "dreambooth":
        sd.save(folder, dtype)
    elif config.method == "textual_inversion":
        textual_inversion.store(sd, trained)
        vectors, token = [word.vectors for word in trained.values()], config.placeholder_token
        adapters.write_embedding(folder / adapters.DIFFUSERS_EMBEDDING, token, vectors)
        file = folder / report.small_file(config, step)
        adapters.write_embedding(file, "emb_params", vectors)
    elif config.method == "hypernetwork":
        about = {"step": step, "name": named_after(config.output_dir)}
        about |= {"sd_checkpoint_name": sd.source, "weight_initialization": config.weight_init}
        file = folder / report.small_file(config, step)
        hypernetworks.write(file, trained["unet"], dtype, about)
    else:
        file, about = folder / report.small_file(config, step), header(sd, config, step)
        adapters.write_kohya_lora(file, sd.networks, trained, dtype, about)
        adapters.write_diffusers_lora(folder, sd.networks, trained, dtype)
    write_text(folder / "README.md", report.model_card(sd, config, step))


def header(sd: StableDiffusion, config: TrainConfig, step: int) -> dict[str, str]:
    """What A1111 and ComfyUI show of a LoRA: what it was trained from, on and with."""
    prompts = dict.fromkeys(subject.instance_prompt for subject in config.subjects)
    side, alpha = config.resolution or sd.image_size, config.lora_alpha or config.rank
    v = sd.schedule.prediction_type == "v_prediction"
    return {
        "ss_sd_model_name": sd.source,
        "ss_tag_frequency": json.dumps({"photographs": {p: 1 for p in prompts}}),
        "ss_learning_rate": str(config.learning_rate),
        "ss_unet_lr": str(config.learning_rate),
        "ss_text_encoder_lr": str(config.text_encoder_learning_rate)
        if config.train_text_encoder
        else "None",
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_steps": str(step),
        "ss_max_train_steps": str(config.max_train_steps),
        "ss_total_batch_size": str(config.train_batch_size * ranks.count()),
        "ss_prior_loss_weight": str(config.prior_loss_weight if config.uses_prior else 0.0),
        "ss_resolution": f"({side}, {side})",
        "ss_seed": str(config.seed),
        "ss_training_comment": f"minibooth: {config.lora_targets}, rank {config.rank}, α {alpha:g}",
        "modelspec.trigger_phrase": ", ".join(prompts),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if v else "epsilon",
        "modelspec.license": sd.licence or "unknown",
    }


@torch.no_grad()
def moved(
    sd: StableDiffusion, trained: dict[str, nn.Module], originals: dict[str, Tensor]
) -> dict[str, float]:
    """‖w − w_original‖ / ‖w_original‖ by what moved; with adapters ‖ΔW‖ / ‖W‖ over their layers."""
    shares = {}
    for name, module in trained.items():
        network, what = sd.networks[name], f"the {name}'s weights"
        if isinstance(module, textual_inversion.Word):
            what = "the word's vectors" + f" for the {name}" * (len(trained) > 1)
        if isinstance(module, Hypernetwork):
            what = "the hypernetwork's weights"
        if not isinstance(module, nn.ModuleDict):
            shares[what] = parameters.moved(name, module, originals)
            continue
        change = norm = 0.0
        for a in module.values():
            change += a.delta().square().sum().item()
            norm += network.get_submodule(a.layer).weight.float().square().sum().item()
        shares[what] = math.sqrt(change / norm)
    return shares
