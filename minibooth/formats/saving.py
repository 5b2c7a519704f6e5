"""A model out: diffusers' folder, and LDM's single file."""

import json
from pathlib import Path

import torch
from torch import Tensor

from ..common.files import write_json
from ..tokenizer import Tokenizer
from . import ldm, vocabulary
from .checkpoint import STEMS, networks_of
from .configs import PIPELINES
from .tensor_files import require_range, write_safetensors

SDXL_INDEX = {
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}


def with_text_model(key: str) -> str:
    """As transformers 4 spells a text encoder's keys; 5 reads both."""
    return key if key.startswith("text_projection.") else f"text_model.{key}"


def write_folder(
    folder: Path,
    configs: dict[str, dict],
    tensors: dict[str, dict[str, Tensor]],
    tokenizer: Tokenizer,
    dtype: torch.dtype | None,
    zeros_for_empty: bool = False,
    levels: int | None = None,
) -> None:
    """diffusers' layout. Each file is replaced atomically, model_index.json last.

    Raises UserError, before the first, where a weight is not finite or would not be in `dtype`.
    """
    names = networks_of(configs)
    for name in names:
        require_range(folder / name, tensors[name], dtype)
    # A model that was made for Flax has its name for the scheduler, which torch has not.
    scheduler = configs["scheduler"].get("_class_name", "DDIMScheduler").removeprefix("Flax")
    pipeline, _ = PIPELINES.get(configs["unet"]["in_channels"], PIPELINES[4])
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if "text_encoder_2" in names:
        pipeline = pipeline.replace("StableDiffusion", "StableDiffusionXL")
        index |= SDXL_INDEX | {"_class_name": pipeline}
        index["force_zeros_for_empty_prompt"] = zeros_for_empty
        del index["requires_safety_checker"], index["safety_checker"]  # its pipeline knows none
    if "low_res_scheduler" in configs:
        small = configs["low_res_scheduler"]
        index["low_res_scheduler"] = ["diffusers", small["_class_name"]]
        index["max_noise_level"] = levels
        del index["image_encoder"], index["requires_safety_checker"]
        write_json(folder / "low_res_scheduler" / "scheduler_config.json", small)
    for name in names:
        weights, config = tensors[name], configs[name]
        if name.startswith("text_encoder"):
            weights = {with_text_model(k): v for k, v in weights.items()}
            # Where no dtype is named, diffusers computes in fp32 whatever the files hold,
            # transformers 5 in what the config says. This is the name that every version reads.
            config = {key: value for key, value in config.items() if key != "dtype"}
            config |= {"torch_dtype": "float32"}
        write_safetensors(folder / name / f"{STEMS[name][0]}.safetensors", weights, dtype)
        write_json(folder / name / "config.json", config)
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": None} | configs["scheduler"] | {"_class_name": scheduler},
    )
    tokenizer.save(folder / "tokenizer")
    if "text_encoder_2" in names:
        tokenizer.second.save(folder / "tokenizer_2")
    write_json(folder / "model_index.json", index)


def write_single_file(
    path: Path,
    configs: dict[str, dict],
    tensors: dict[str, dict[str, Tensor]],
    tokenizer: Tokenizer,
    dtype: torch.dtype | None,
    metadata: dict[str, str],
) -> None:
    """LDM layout, one safetensors file, for A1111, ComfyUI and from_single_file.

    Raises UserError where a weight is not finite or would not be in `dtype`."""
    v = configs["scheduler"].get("prediction_type") == "v_prediction"
    version = "v2" if configs["text_encoder"].get("hidden_act") == "gelu" else "v1"
    if version == "v2":
        version = "v2-768-v" if v else "v2-512"
    if "text_encoder_2" in configs:
        version = "xl-v1-base"
    if "low_res_scheduler" in configs:
        version = "x4-upscaler"
    inpainting = "-inpainting" if configs["unet"]["in_channels"] == 9 else ""
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-{version}{inpainting}",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": path.stem,
        "modelspec.prediction_type": "v" if v else "epsilon",
        "minibooth.configs": json.dumps(configs),
        **vocabulary.to_metadata(tokenizer, configs),
    } | metadata
    stored = ldm.to_ldm(configs, tensors)
    if v and not version.startswith(("v2", "x4")):  # which nobody expects of it
        stored["v_pred"] = torch.empty(0)
    require_range(path, stored, dtype)
    write_safetensors(path, stored, dtype, metadata)
