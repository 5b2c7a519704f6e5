"""A model's folder in diffusers' layout, on the disk or the hub, and parts of one."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from ..common.errors import UserError, first_line
from ..common.files import SHIPPED, read_text
from ..tokenizer import PairedTokenizer, Tokenizer
from . import adapters, hub, ldm, vocabulary
from .checkpoint import LICENCE_FILES, NETWORKS, STEMS, Checkpoint, legacy_names, skeleton
from .configs import DISTILLED, ONLY, REFINER, check_config, is_distilled, other_class
from .public import X4_LEVELS
from .tensor_files import read_tensors

VARIANTS = ("", ".fp16", ".non_ema")  # in the order of preference; safetensors before pickles


def require_kind(file: Callable[..., Path | None], source: str | Path) -> dict:
    """model_index.json. Raises UserError for a folder or hub model that is none, or one of another
    kind."""
    index = file("model_index.json")
    if index is None:
        for name, what in adapters.NO_MODEL.items():
            if file(name):
                raise UserError(f"{source} {what}")
        if Path(source).is_dir() and (held := single_files(Path(source))):
            if held[0].suffix == ".pt":
                read_tensors(held[0])  # which says of a hypernetwork that it is one
            raise UserError(f"{source} is no folder of diffusers': give a file in it, {held[0]}")
    told = index or file("config.json")
    told = read_config(told, str(source)) if told else {}
    name = str(told.get("_class_name", ""))
    if kind := other_class(name):
        raise UserError(f"{source} is {kind}{ONLY if ':' not in kind else ''}")
    if index is None:
        raise UserError(f"{source} is not a model: it has no model_index.json")
    if told.get("requires_aesthetics_score"):
        raise UserError(f"{source} is {REFINER}")
    return told


def single_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in hub.FILES)


def file_getter(source: str | Path, revision: str | None = None) -> Callable[..., Path | None]:
    """`file(*names, optional=…)`: the path of the first that a folder or hub model has, or None."""
    if str(source) in SHIPPED:  # also beside a folder of that name: ./toybox is that one
        return partial(local_file, hub.toybox() / SHIPPED[str(source)])
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
    index: dict,
    tokenizer: str | Path | Tokenizer | None,
    vae: str | Path | None,
) -> Checkpoint:
    """Weights last: they may have to be downloaded, and what is small can be refused before."""
    names = list(NETWORKS)
    if index.get("text_encoder_2") in (None, [None, None]):
        names.remove("text_encoder_2")
    checkpoint = Checkpoint({}, {})
    checkpoint.zeros_for_empty = bool(index.get("force_zeros_for_empty_prompt", False))
    for name in names:
        checkpoint.configs[name] = read_config(file(f"{name}/config.json"), f"{source}/{name}")
    scheduler = file("scheduler/scheduler_config.json")
    checkpoint.configs["scheduler"] = read_config(scheduler, f"{source}/scheduler")
    if index.get("low_res_scheduler") not in (None, [None, None]):
        small = file("low_res_scheduler/scheduler_config.json")
        checkpoint.configs["low_res_scheduler"] = read_config(small, f"{source}/low_res_scheduler")
        checkpoint.levels = index.get("max_noise_level", X4_LEVELS)
    if is_distilled(checkpoint.configs["unet"]):
        raise UserError(f"{source} is {DISTILLED}")
    for name, config in checkpoint.configs.items():
        check_config(name, config)
    own = tokenizer is None
    tokenizer = tokenizer or tokenizer_folder(file, ("tokenizer/",), source)
    checkpoint.tokenizer = read_tokenizer(tokenizer, checkpoint.configs)
    if own and "text_encoder_2" in names:
        require_same_tokenizer(file, source, checkpoint.tokenizer)
    if vae is not None:
        config = checkpoint.configs["vae"]
        checkpoint.configs["vae"], checkpoint.tensors["vae"] = read_vae(vae, config)
    for name in names:
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


def read_tokenizer(source: str | Path | Tokenizer, configs: dict[str, dict]) -> Tokenizer:
    """A tokenizer folder, a model's folder, or the id of either on the hub; for a model of these
    configs."""
    kind = vocabulary.kind(configs)
    if isinstance(source, Tokenizer):
        plain = source.vocab, source.merges, source.max_length, source.pad, source.added
        return source if isinstance(source, kind) else kind(*plain)
    file = file_getter(source)
    folder = tokenizer_folder(file, ("", "tokenizer/"), source)
    length = configs["text_encoder"].get("max_position_embeddings", 77)
    return kind.from_folder(folder, length)


def require_same_tokenizer(file, source: str, tokenizer: PairedTokenizer) -> None:
    """Raise UserError where a model's second tokenizer, if it has one, does not do what the second
    of `tokenizer` does."""
    path = file("tokenizer_2/vocab.json", "tokenizer_2/tokenizer.json", optional=True)
    if path is None:
        return
    for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        file(f"tokenizer_2/{name}", optional=True)
    theirs, ours = Tokenizer.from_folder(path.parent, tokenizer.max_length), tokenizer.second
    for what in ("vocab", "merges", "pad"):
        if getattr(theirs, what) != getattr(ours, what):
            raise UserError(
                f"{source}: its tokenizer_2 has other {what} than its tokenizer, which serve both "
                "text encoders here: give the one to use as --tokenizer"
            )


def read_vae(source: str | Path, config: dict) -> tuple[dict, dict[str, Tensor]]:
    """A VAE alone: a folder or hub id (its own or a whole model's), or a file. Config and tensors.

    A file holds no config: it must have the shapes of `config`.
    """
    path = Path(source)
    if path.is_file():
        tensors = {k: v for k, v in read_tensors(path)[0].items() if not ldm.IGNORED.fullmatch(k)}
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
