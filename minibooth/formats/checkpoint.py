"""Every public form of Stable Diffusion's weights in; diffusers folder and single file out."""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.errors import UserError, first_line
from ..common.files import read_text, write_json
from ..text_encoder import TextEncoder
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE
from . import adapters, hub, ldm, vocabulary
from .configs import (
    PIPELINES,
    SD2_V,
    SINGLE_FILE,
    check_config,
    other_class,
    other_file,
    settle,
)
from .tensor_files import json_metadata, read_tensors, require_range, write_safetensors

NETWORKS: dict[str, type[nn.Module]] = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}
DIFFUSERS = "diffusion_pytorch_model"
STEMS = {"unet": (DIFFUSERS,), "vae": (DIFFUSERS,), "text_encoder": ("model", "pytorch_model")}
VARIANTS = ("", ".fp16", ".non_ema")  # in the order of preference; safetensors before pickles
LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENSE-MODEL")


@dataclass
class Checkpoint:
    """What a source holds, under diffusers' names, before any network is built."""

    configs: dict[str, dict]  # of unet, vae, text_encoder and scheduler, as in their files
    tensors: dict[str, dict[str, Tensor]]  # per network; memory-mapped where the file allows
    tokenizer: Tokenizer | None = None
    licence: str | None = None  # its short name, as in the head of a model card
    licence_files: dict[str, str] = field(default_factory=dict)
    needs_probe: bool = False  # nothing says whether the UNet predicts ε or v


# ---- tensors -----------------------------------------------------------------------------------


def legacy_names(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Old and new spellings of diffusers and transformers → the one that the networks use."""
    out = {}
    for key, tensor in tensors.items():
        if name == "text_encoder":
            key = key.removeprefix("text_model.")
        elif name == "vae":
            for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
                key = key.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
            key = key.replace("attentions.0.proj_attn.", "attentions.0.to_out.0.")
        if not key.endswith("position_ids"):
            out[key] = tensor
    return out


def build(
    name: str, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype, device
) -> nn.Module:
    """A network with these weights. It is laid out on the meta device first: no second copy.

    Raises UserError naming a missing or misshapen tensor; warns once of those it has no place for.
    """
    module = skeleton(name, config)
    expected, found = module.state_dict(), {}
    for key, want in expected.items():
        if key not in tensors:
            raise UserError(f"the {name}'s weights lack {key}")
        tensor = tensors[key]
        if tensor.shape != want.shape:
            if trim(tensor.shape) != trim(want.shape):
                raise UserError(
                    f"the {name}'s {key} is {list(tensor.shape)}, its config wants "
                    f"{list(want.shape)}"
                )
            tensor = tensor.reshape(want.shape)  # a linear kept as a 1×1 convolution, or back
        if not tensor.is_floating_point():
            raise UserError(f"the {name}'s {key} holds {tensor.dtype}, not floating-point weights")
        found[key] = tensor.to(device, dtype)
    if unexpected := sorted(tensors.keys() - expected.keys()):
        warn_unexpected(f"the {name}'s weights", unexpected)
    module.load_state_dict(found, assign=True)
    return module.eval()


def skeleton(name: str, config: dict) -> nn.Module:
    """The network on the meta device: shapes, no memory. Raises UserError for a bad config."""
    check_config(name, config)
    try:
        with torch.device("meta"):
            module = NETWORKS[name](config)
        for part in module.modules():
            if hasattr(part, "heads") and (width := len(next(part.parameters()))) % part.heads:
                raise ValueError(f"{part.heads} heads do not divide a width of {width}")
        return module
    except KeyError as e:
        raise UserError(f"the {name}'s config lacks {e}") from None
    except Exception as e:
        raise UserError(f"the {name}'s config does not describe one: {first_line(e)}") from None


def trim(shape: torch.Size) -> list[int]:
    """The shape without the 1s at its end."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return sizes


def warn_unexpected(where: str, keys: list[str]) -> None:
    shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    warnings.warn(f"{where} have tensors that are not used: {shown}", stacklevel=3)


# ---- sources -----------------------------------------------------------------------------------


def read(
    source: str | Path,
    tokenizer: str | Path | Tokenizer | None = None,
    vae: str | Path | None = None,
    revision: str | None = None,
    ema: bool = False,
) -> Checkpoint:
    """A folder in diffusers' layout, a single file, "toybox", or the id of a model on the hub;
    `tokenizer` and `vae` are read instead of its own. `ema`: of a single file that holds both, the
    averaged weights.

    Raises UserError where there is no such model or a part of it is missing or damaged.
    """
    path = Path(source)
    if path.is_file():
        checkpoint = read_single_file(path, tokenizer, ema)
    elif ema:
        raise UserError(f"{source}: only a single file has an EMA beside its weights: no --ema")
    else:
        file = file_getter(source, revision)
        require_kind(file, source)
        checkpoint = read_folder(file, str(source), tokenizer, vae)
        checkpoint.licence = hub.LICENCES.get(str(source), checkpoint.licence)
    if vae is not None and path.is_file():
        config = checkpoint.configs["vae"]
        checkpoint.configs["vae"], checkpoint.tensors["vae"] = read_vae(vae, config)
    for name, what in NOT_IN_IT.items():
        if not checkpoint.tensors[name]:
            raise UserError(f"{source} {what}")
    settle(checkpoint.configs)
    return checkpoint


NOT_IN_IT = {  # single files that are not whole
    "unet": "holds no UNet",
    "vae": "holds no VAE: give one with --vae, such as stabilityai/sd-vae-ft-mse",
    "text_encoder": "holds no text encoder, as files of a UNet alone: get the whole model",
}


def require_kind(file: Callable[..., Path | None], source: str | Path) -> None:
    """Raise UserError for a folder or hub model that is none, or one of another kind."""
    index = file("model_index.json")
    if index is None:
        for name, what in adapters.NO_MODEL.items():
            if file(name):
                raise UserError(f"{source} {what}")
        if Path(source).is_dir() and (held := list(map(str, single_files(Path(source))))):
            raise UserError(f"{source} is no folder of diffusers': give a file in it, {held[0]}")
    told = index or file("config.json")
    name = str(read_config(told, str(source)).get("_class_name", "")) if told else ""
    if kind := other_class(name):
        raise UserError(f"{source} is {kind}{ONLY if ':' not in kind else ''}")
    if index is None:
        raise UserError(f"{source} is not a model: it has no model_index.json")


ONLY = ": only Stable Diffusion 1.x and 2.x can be used here"


def single_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in hub.FILES)


def file_getter(source: str | Path, revision: str | None = None) -> Callable[..., Path | None]:
    """`file(*names, optional=…)`: the path of the first that a folder or hub model has, or None."""
    if str(source) == "toybox":  # also where there is a folder of that name: ./toybox is that one
        return partial(local_file, hub.toybox())
    if Path(source).is_dir():
        return partial(local_file, Path(source))
    if hub.is_repo_id(str(source)):
        return hub.Repo(str(source), revision).file
    raise UserError(f"{source}: there is no such folder or file")


def local_file(folder: Path, *names: str, optional: bool = True) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def prefix_of(path: Path, source: str | Path, inner: str) -> str:
    """Where in a source one of its files was found: `inner`, such as "vae/", or "", its top."""
    inside = path.parent.name + "/" == inner and path.parent != Path(source)
    return inner if inside else ""


def read_folder(
    file: Callable[..., Path | None],
    source: str,
    tokenizer: str | Path | Tokenizer | None,
    vae: str | Path | None,
) -> Checkpoint:
    """Weights last: they may have to be downloaded, and what is small can be refused before."""
    checkpoint = Checkpoint({}, {})
    for name in NETWORKS:
        checkpoint.configs[name] = read_config(file(f"{name}/config.json"), f"{source}/{name}")
    scheduler = file("scheduler/scheduler_config.json")
    checkpoint.configs["scheduler"] = read_config(scheduler, f"{source}/scheduler")
    for name, config in checkpoint.configs.items():
        check_config(name, config)
    tokenizer = tokenizer or tokenizer_folder(file, ("tokenizer/",), source)
    checkpoint.tokenizer = read_tokenizer(tokenizer, checkpoint.configs["text_encoder"])
    if vae is not None:
        config = checkpoint.configs["vae"]
        checkpoint.configs["vae"], checkpoint.tensors["vae"] = read_vae(vae, config)
    for name in NETWORKS:
        if name not in checkpoint.tensors:
            checkpoint.tensors[name] = read_weights(file, name, f"{name}/", source)
    if card := file("README.md", optional=True):
        licence = re.search(r"^license: *(\S+)", read_text(card, "replace"), re.MULTILINE)
        checkpoint.licence = licence and licence[1].strip("\"'")
    for name in LICENCE_FILES:
        if path := file(name, optional=True):
            checkpoint.licence_files[name] = read_text(path, "replace")
    return checkpoint


def read_config(path: Path | None, where: str) -> dict:
    if path is None:
        raise UserError(f"{where} has no config file")
    try:
        config = json.loads(read_text(path))
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(f"{path} cannot be read: {first_line(e)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a config: it holds no dictionary")
    config.pop("_name_or_path", None)  # where it once lay on somebody's disk
    return config


def read_weights(file, name: str, prefix: str, source: str) -> dict[str, Tensor]:
    stems = STEMS[name]
    names = [f"{stems[0]}{variant}.safetensors" for variant in VARIANTS]
    names += [f"{stems[-1]}{variant}.bin" for variant in VARIANTS]
    indices = [f"{stem}.index.json" for stem in (names[0], names[-len(VARIANTS)])]
    path = file(*(prefix + n for n in names + indices))
    if path is None:
        raise UserError(f"{source} has no weights for the {name} ({prefix}{names[0]})")
    if path.suffix == ".json":
        return legacy_names(name, read_parts(file, path, prefix))
    return legacy_names(name, read_tensors(path)[0])


def read_parts(file, index: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of several files, which an index names. Raises UserError where one is missing."""
    named, tensors = read_config(index, str(index)).get("weight_map"), {}
    parts = sorted(map(str, named.values())) if isinstance(named, dict) else []
    if not parts or not all(re.fullmatch(r"\w[\w.-]*", part) for part in parts):
        raise UserError(f"{index} is damaged: it does not say which files the weights are in")
    for part in dict.fromkeys(parts):
        if (path := file(prefix + part)) is None:
            raise UserError(f"{index} names {part}, which is missing: download it again")
        tensors |= read_tensors(path)[0]
    return tensors


def tokenizer_folder(
    file: Callable[..., Path | None], prefixes: tuple[str, ...], source: str | Path
) -> Path:
    """Fetch the tokenizer's files; the folder they are in."""
    names = [p + name for name in ("vocab.json", "tokenizer.json") for p in prefixes]
    vocabulary = file(*names)
    if vocabulary is None:
        raise UserError(f"{source} has no tokenizer ({names[0]})")
    prefix = prefix_of(vocabulary, source, "tokenizer/")
    if vocabulary.name == "vocab.json":
        file(f"{prefix}merges.txt")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file(f"{prefix}{name}", optional=True)
    return vocabulary.parent


def read_tokenizer(source: str | Path | Tokenizer, text_config: dict) -> Tokenizer:
    """A tokenizer folder, a model's folder, or the id of either on the hub."""
    if isinstance(source, Tokenizer):
        return source
    file = file_getter(source)
    folder = tokenizer_folder(file, ("", "tokenizer/"), source)
    return Tokenizer.from_folder(folder, text_config.get("max_position_embeddings", 77))


# Beside the networks, single files carry the noise schedule, training state and unused parts.
IGNORED = re.compile(
    r"\w+|model_ema\..*|loss\..*|.*\.position_ids|cond_stage_model\.logit_scale|"
    r"cond_stage_model\.model\.(text_projection|logit_scale|attn_mask|"
    r"transformer\.resblocks\.(23\..*|\d+\.attn\.in_proj_\w+))"
)


def read_single_file(
    path: Path, tokenizer: str | Path | Tokenizer | None, ema: bool = False
) -> Checkpoint:
    """A .safetensors or .ckpt file in the layout of the original code (LDM)."""
    raw, metadata = read_tensors(path)
    tensors = {}
    for key, tensor in raw.items():
        key = key.replace("conditioner.embedders.0.", "cond_stage_model.")
        key = re.sub(r"^cond_stage_model\.transformer\.(?!text_model\.)", ldm.CLIP, key)
        tensors[key] = tensor
    if "minibooth.configs" in metadata:
        written = json_metadata(path, metadata, "minibooth.configs")
        configs, known = {name: written.get(name) for name in (*NETWORKS, "scheduler")}, True
        if not all(isinstance(config, dict) for config in configs.values()):
            raise UserError(f"{path} has damaged metadata (minibooth.configs)")
    else:
        configs, known = guess_configs(path, tensors, stated_prediction(path, tensors, metadata))
        if zero_terminal_snr(tensors, metadata):
            configs["scheduler"]["rescale_betas_zero_snr"] = True  # as a folder says it
    keys = {name: list(skeleton(name, configs[name]).state_dict()) for name in NETWORKS}
    choose_average(path, [ldm.unet_key(key, configs["unet"]) for key in keys["unet"]], tensors, ema)
    found = ldm.from_ldm(configs, keys, tensors)
    if unexpected := sorted(k for k in tensors if not IGNORED.fullmatch(k)):
        warn_unexpected(str(path), unexpected)
    text_config = configs["text_encoder"]
    if tokenizer is None:
        tokenizer = vocabulary.from_metadata(path, metadata, text_config)
    licences = json_metadata(path, metadata, "minibooth.licence_files")
    return Checkpoint(
        configs,
        found,
        read_tokenizer(tokenizer, text_config),
        licence=metadata.get("modelspec.license"),
        licence_files={n: str(licences[n]) for n in LICENCE_FILES if n in licences},
        needs_probe=not known,
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
    text = tensors.get(ldm.UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    conv_in = tensors.get(ldm.UNET + "input_blocks.0.0.weight")
    if text is None or text.ndim != 2 or conv_in is None or conv_in.ndim != 4:
        if any("lora" in key for key in tensors):
            raise UserError(f"{path} {adapters.NO_MODEL[adapters.DIFFUSERS_LORA]}")
        if kind := other_file(tensors):
            raise UserError(f"{path} is {kind}{ONLY if ':' not in kind else ''}")
        raise UserError(f"{path} holds no UNet of Stable Diffusion 1.x or 2.x ({ldm.UNET}…)")
    if text.shape[1] not in SINGLE_FILE or conv_in.shape[1] == 7:
        if kind := other_file(tensors):
            raise UserError(f"{path} is {kind}{ONLY}")
        raise UserError(
            f"{path} is not Stable Diffusion 1.x or 2.x: its text conditioning is "
            f"{text.shape[1]} wide"
        )
    configs = {name: dict(config) for name, config in SINGLE_FILE[text.shape[1]].items()}
    configs["unet"]["in_channels"] = conv_in.shape[1]
    open_clip = configs["text_encoder"]["hidden_act"] == "gelu"
    if stated == "v_prediction":
        configs["scheduler"]["prediction_type"] = "v_prediction"
        configs["unet"] |= SD2_V if open_clip else {}
    return configs, stated is not None or not open_clip


# Where the tools that write single files say what the UNet predicts: the specification, ComfyUI,
# others; and kohya's trainers whether it is v.
PREDICTION = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
PREDICTIONS = {"v": "v_prediction", "e": "epsilon"}  # by the first letter of what they write
TRUE = ("true", "1")


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


def read_vae(source: str | Path, config: dict) -> tuple[dict, dict[str, Tensor]]:
    """A VAE alone: a folder or hub id (its own or a whole model's), or a file. Config and tensors.

    A file holds no config: it must have the shapes of `config`.
    """
    path = Path(source)
    if path.is_file():
        tensors = {k: v for k, v in read_tensors(path)[0].items() if not IGNORED.fullmatch(k)}
        for prefix in (ldm.VAE, "vae."):
            if any(k.startswith(prefix) for k in tensors):
                tensors = {
                    k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
                }
        if any(".down_blocks." in k for k in tensors):
            return config, legacy_names("vae", tensors)
        names = {key: ldm.vae_key(key, config) for key in skeleton("vae", config).state_dict()}
        bare = {key: name.removeprefix(ldm.VAE) for key, name in names.items()}
        return config, {key: tensors[name] for key, name in bare.items() if name in tensors}
    file = file_getter(source)
    found = file("vae/config.json", "config.json")
    config = read_config(found, str(source))
    check_config("vae", config)
    return config, read_weights(file, "vae", prefix_of(found, source, "vae/"), str(source))


# ---- writing -----------------------------------------------------------------------------------


def write_folder(
    folder: Path,
    configs: dict[str, dict],
    tensors: dict[str, dict[str, Tensor]],
    tokenizer: Tokenizer,
    dtype: torch.dtype | None,
) -> None:
    """diffusers' layout. Each file is replaced atomically, model_index.json last.

    Raises UserError, before the first, where a weight is not finite or would not be in `dtype`.
    """
    for name in NETWORKS:
        require_range(folder / name, tensors[name], dtype)
    # A model that was made for Flax has its name for the scheduler, which torch has not.
    scheduler = configs["scheduler"].get("_class_name", "DDIMScheduler").removeprefix("Flax")
    index = {
        "_class_name": PIPELINES.get(configs["unet"]["in_channels"], PIPELINES[4])[0],
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
    # Where no dtype is named, diffusers computes in fp32 whatever the files hold, transformers 5 in
    # what the text encoder's config says. This is the name for it that every version reads.
    text = {key: value for key, value in configs["text_encoder"].items() if key != "dtype"}
    configs = configs | {"text_encoder": text | {"torch_dtype": "float32"}}
    for name in NETWORKS:
        weights = tensors[name]
        if name == "text_encoder":  # transformers 4 reads only this spelling, 5 reads both
            weights = {f"text_model.{k}": v for k, v in weights.items()}
        write_safetensors(folder / name / f"{STEMS[name][0]}.safetensors", weights, dtype)
        write_json(folder / name / "config.json", configs[name])
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": None} | configs["scheduler"] | {"_class_name": scheduler},
    )
    tokenizer.save(folder / "tokenizer")
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
    inpainting = "-inpainting" if configs["unet"]["in_channels"] == 9 else ""
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-{version}{inpainting}",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": path.stem,
        "modelspec.prediction_type": "v" if v else "epsilon",
        "minibooth.configs": json.dumps(configs),
        **vocabulary.to_metadata(tokenizer, configs["text_encoder"]),
    } | metadata
    stored = ldm.to_ldm(configs, tensors)
    if v and version == "v1":  # which nobody expects of it
        stored["v_pred"] = torch.empty(0)
    require_range(path, stored, dtype)
    write_safetensors(path, stored, dtype, metadata)
