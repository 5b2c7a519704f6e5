"""A whole model in one file, .safetensors or .ckpt, in the layout of the original code (LDM)."""

import re
import warnings
from pathlib import Path

from torch import Tensor

from ..common.errors import UserError
from ..common.files import read_text
from ..tokenizer import Tokenizer
from . import adapters, ldm, vocabulary
from .checkpoint import (
    LICENCE_FILES,
    NETWORKS,
    Checkpoint,
    networks_of,
    skeleton,
    warn_unexpected,
)
from .configs import DISTILLED, ONLY, REFINER, other_file
from .folders import read_tokenizer
from .public import SD2_V, SINGLE_FILE, X4, X4_LEVELS
from .tensor_files import json_metadata, read_tensors

# Where the tools that write single files say what the UNet predicts: the specification, ComfyUI,
# others; and kohya's trainers whether it is v.
PREDICTION = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
PREDICTIONS = {"v": "v_prediction", "e": "epsilon"}  # by the first letter of what they write
TRUE = ("true", "1")
ZEROS = "minibooth.zeros_for_empty"  # only where it is not so, though it is SDXL
LEVELS = "minibooth.levels"  # of an upscaler
PARTS = {*NETWORKS, "scheduler", "low_res_scheduler"}
OF_SOME = {"text_encoder_2", "low_res_scheduler"}
# The layers that see the text first, and SDXL's that sees the sizes.
TEXT_KEYS = re.compile(
    re.escape(ldm.UNET) + r"input_blocks\.\d\.1\.transformer_blocks\.0\.attn2\.to_k\.weight"
)
LABELS = ldm.UNET + "label_emb.0.0.weight"
LEVEL_TABLE = ldm.UNET + "label_emb.weight"  # an upscaler's


def read_single_file(
    path: Path, tokenizer: str | Path | Tokenizer | None, ema: bool = False
) -> Checkpoint:
    """A .safetensors or .ckpt file in the layout of the original code (LDM)."""
    raw, metadata = read_tensors(path)
    tensors = {}
    first = ldm.EMBEDDERS["text_encoder"]
    for key, tensor in raw.items():
        key = key.replace(ldm.FIRST_OF_TWO, first)
        key = re.sub(r"^cond_stage_model\.transformer\.(?!text_model\.)", first + ldm.CLIP, key)
        tensors[key] = tensor
    if "minibooth.configs" in metadata:
        written = json_metadata(path, metadata, "minibooth.configs")
        configs, known = {name: written[name] for name in written if name in PARTS}, True
        complete = configs.keys() >= PARTS - OF_SOME
        if not complete or not all(isinstance(config, dict) for config in configs.values()):
            raise UserError(f"{path} has damaged metadata (minibooth.configs)")
    else:
        configs, known = guess_configs(path, tensors, stated_prediction(path, tensors, metadata))
        if zero_terminal_snr(tensors, metadata):
            configs["scheduler"]["rescale_betas_zero_snr"] = True  # as a folder says it
    keys = {name: list(skeleton(name, configs[name]).state_dict()) for name in networks_of(configs)}
    names = [ldm.unet_key(key, configs["unet"]) for key in keys["unet"]]
    if LABELS in tensors and any("attn2.to_k." in n for n in {*names} - tensors.keys()):
        raise UserError(f"{path} is {DISTILLED}")
    choose_average(path, names, tensors, ema)
    found = ldm.from_ldm(configs, keys, tensors)
    if unexpected := sorted(k for k in tensors if not ldm.IGNORED.fullmatch(k)):
        warn_unexpected(str(path), unexpected)
    if tokenizer is None:
        tokenizer = vocabulary.from_metadata(path, metadata, configs)
    levels = metadata.get(LEVELS, str(X4_LEVELS)) if "low_res_scheduler" in configs else None
    licences = json_metadata(path, metadata, "minibooth.licence_files")
    return Checkpoint(
        configs,
        found,
        read_tokenizer(tokenizer, configs),
        licence=metadata.get("modelspec.license"),
        licence_files={n: str(licences[n]) for n in LICENCE_FILES if n in licences},
        needs_probe=not known,
        zeros_for_empty="text_encoder_2" in configs and metadata.get(ZEROS, TRUE[0]) in TRUE,
        levels=int(levels) if levels and levels.isdigit() else None,
    )


def choose_average(path: Path, names: list[str], tensors: dict[str, Tensor], ema: bool) -> None:
    """The UNet's plain weights stay, or with `ema` its averaged ones come under their names.

    Tools that merge models keep the average of one of them beside the merge, or a part of it: so
    none is taken unless it is asked for, and only a whole one.
    """
    averaged = {name: ldm.averaged_key(name) for name in names}
    there = sum(key in tensors for key in averaged.values())
    if ema:
        if there < len(names):
            raise UserError(f"{path} has {there} of {len(names)} averaged weights (EMA): no --ema")
        tensors |= {name: tensors.pop(key) for name, key in averaged.items()}
    elif there == len(names):
        warnings.warn(
            f"{path} has an EMA of the UNet beside its weights: these are taken; --ema yes takes "
            "the EMA",
            stacklevel=5,
        )


def guess_configs(
    path: Path, tensors: dict[str, Tensor], stated: str | None
) -> tuple[dict[str, dict], bool]:
    """The configs that a foreign single file must have, and whether what it predicts is known."""
    text = next((tensors[key] for key in sorted(tensors) if TEXT_KEYS.fullmatch(key)), None)
    conv_in = tensors.get(ldm.UNET + "input_blocks.0.0.weight")
    if text is None or text.ndim != 2 or conv_in is None or conv_in.ndim != 4:
        if any("lora" in key for key in tensors):
            raise UserError(f"{path} {adapters.NO_MODEL[adapters.DIFFUSERS_LORA]}")
        if kind := other_file(tensors):
            raise UserError(f"{path} is {kind}{ONLY if ':' not in kind else ''}")
        raise UserError(f"{path} holds no UNet of Stable Diffusion ({ldm.UNET}…)")
    if conv_in.shape[1] == X4["unet"]["in_channels"] and LEVEL_TABLE in tensors:
        return {name: dict(config) for name, config in X4.items()}, True
    if text.shape[1] not in SINGLE_FILE or conv_in.shape[1] == 7:
        if LABELS in tensors:
            raise UserError(f"{path} is {REFINER}")
        if kind := other_file(tensors):
            raise UserError(f"{path} is {kind}{ONLY}")
        raise UserError(
            f"{path} is not Stable Diffusion 1.x, 2.x or XL: its text conditioning is "
            f"{text.shape[1]} wide"
        )
    configs = {name: dict(config) for name, config in SINGLE_FILE[text.shape[1]].items()}
    configs["unet"]["in_channels"] = conv_in.shape[1]
    open_clip = configs["text_encoder"]["hidden_act"] == "gelu"
    if stated == "v_prediction":
        configs["scheduler"]["prediction_type"] = "v_prediction"
        configs["unet"] |= SD2_V if open_clip else {}
    return configs, stated is not None or not open_clip


def stated_prediction(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> str | None:
    """What a single file says that its UNet predicts: by the empty tensor v_pred, as A1111 and
    ComfyUI read it, in its header, or, for A1111, in a .yaml beside it. None if nothing says so."""
    if "v_pred" in tensors or metadata.get("ss_v_parameterization", "").lower() in TRUE:
        return PREDICTIONS["v"]
    for key in PREDICTION:
        if stated := PREDICTIONS.get(metadata.get(key, "")[:1].lower()):
            return stated
    if metadata.get("modelspec.architecture", "").endswith("-v"):
        return PREDICTIONS["v"]
    try:
        beside = read_text(path.with_suffix(".yaml"), "replace")
    except OSError:
        return None
    parameterization = re.search(r"^\s*parameterization:\s*[\"']?([ve])", beside, re.MULTILINE)
    return PREDICTIONS[parameterization[1]] if parameterization else None


def zero_terminal_snr(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bool:
    """Whether a single file says that its last timestep is pure noise: by the empty tensor ztsnr,
    in kohya's header, or in the noise schedule that it carries."""
    alpha_bar = tensors.get("alphas_cumprod")
    return (
        "ztsnr" in tensors
        or metadata.get("ss_zero_terminal_snr", "").lower() in TRUE
        or (alpha_bar is not None and alpha_bar.numel() > 1 and alpha_bar.flatten()[-1] < 1e-6)
    )
