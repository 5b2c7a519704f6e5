"""LoRA and Textual Inversion files, in and out: diffusers' form, and kohya's for A1111 and ComfyUI.

LoRA: the two matrices of each layer, with the layer's name. kohya's says α beside them. diffusers'
has no place for it that all its versions read: α = r for most, so α/r is multiplied into B there.
Textual Inversion: one tensor, the vectors of one word; SDXL's has one for each text encoder.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import lora
from ..common.errors import UserError
from ..common.files import read_text
from ..unet import UNet
from . import hub, ldm
from .configs import FAMILIES, misfit
from .tensor_files import read_tensors, require_range, write_safetensors

DIFFUSERS_LORA, DIFFUSERS_EMBEDDING = (
    "pytorch_lora_weights.safetensors",
    "learned_embeds.safetensors",
)
# What is looked for in a folder: diffusers' files of today and of before, and peft's own.
LORA_FILES = (DIFFUSERS_LORA, "pytorch_lora_weights.bin", "adapter_model.safetensors")
EMBEDDING_FILES = (DIFFUSERS_EMBEDDING, "learned_embeds.bin")
A_LORA = (
    "is a LoRA: give it as --lora to sample, as --merge_lora to convert, and as --model the model "
    "that it was trained from"
)
A_WORD = (
    "is a word: give it as --embedding to sample, and as --model the model that it was trained with"
)
NO_MODEL = {  # what to say where one of these is given as a model
    **dict.fromkeys(LORA_FILES, A_LORA),
    **dict.fromkeys(EMBEDDING_FILES, A_WORD),
}
ADAPTED = ("unet", "text_encoder", "text_encoder_2")  # of a model's networks
CLIP_L_G = ("clip_l", "clip_g")  # SDXL's text encoders, in a word's file
WORD = "minibooth.word"  # in the header of a file whose tensors are not called so
A1111_EMBEDDING = ("emb_params", "*")  # the tensor's name where the file's name is the word
MOST_RANK = 4096  # of a LoRA; those that are passed on have 4 to 512
MOST_VECTORS = 10**6  # numbers in a word's vectors: a prompt holds 75 of SD 2.x's 1024
PEFT = "base_model.model."  # with which all names in peft's own files begin
SPELLINGS = (  # older and other ones → peft's, which diffusers has today
    (r"^base_model\.model\.", ""),
    (r"\.lora_([AB])\.default\.", r".lora_\1."),
    (r"^(?=(?:down_blocks|mid_block|up_blocks)\.)", "unet."),
    (r"^(?=(?:text_model|encoder\.layers)\.)", "text_encoder."),
    (r"\.processor\.", "."),
    (r"\.self_attn\.to_(q|k|v|out)_lora\.", r".self_attn.\1_proj.lora."),
    (r"\.to_([qkv])_lora\.", r".to_\1.lora."),
    (r"\.to_out_lora\.", ".to_out.0.lora."),
    (r"\.lora(_linear_layer)?[._]down\.", ".lora_A."),
    (r"\.lora(_linear_layer)?[._]up\.", ".lora_B."),
    (r"^(text_encoder|text_encoder_2)\.(?!text_model\.|text_projection\.)", r"\1.text_model."),
)
OTHER_KINDS = (  # of LoRA: what a key of one has
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.(dora_scale|lora_magnitude_vector)", "DoRA"),
    (r"\.lora_mid\.", "LoCon"),
    (r"\.oft_", "OFT"),
    (r"\.diff(_b)?$", "set of whole differences"),
)
OTHER_MODELS = (
    (r"^(lora_te2_|lora_unet_(input|middle|output)_block|text_encoder_2\.)", "SDXL"),
    (r"^transformer\.|_(double|single|joint)_(transformer_)?blocks_", "Flux or SD 3"),
)


# ---- names and families ------------------------------------------------------------------------


def names(networks: dict[str, nn.Module], network: str, layer: str) -> list[str]:
    """What files call a layer: diffusers' name, kohya's, and more that are read.

    kohya's are flat, and have SDXL's UNet as single files do: input_blocks_4_1 for diffusers'
    down_blocks_1_attentions_0, which other tools write in the same form.
    """
    whole = layer if network == "unet" or layer == "text_projection" else f"text_model.{layer}"
    flat, two = whole.replace(".", "_"), "text_encoder_2" in networks
    if network == "unet" and two:
        there = ldm.unet_key(f"{layer}.weight", plan(networks["unet"]))
        there = there.removeprefix(ldm.UNET).removesuffix(".weight").replace(".", "_")
        prefixed = [f"lora_unet_{there}", f"lora_unet_{flat}"]
    elif network == "unet":
        prefixed = [f"lora_unet_{flat}"]
    elif two:
        prefixed = [f"lora_te{1 if network == 'text_encoder' else 2}_{flat}"]
    else:
        prefixed = [f"lora_te_{flat}", f"lora_te1_{flat}"]
    return [f"{network}.{whole}", *prefixed]


def plan(unet: UNet) -> dict:
    """What ldm.unet_modules asks a config for."""
    kinds = ["CrossAttn" if level.attentions else "" for level in unet.up_blocks]
    layers = len(unet.down_blocks[0].resnets)
    return {"block_out_channels": kinds, "layers_per_block": layers, "up_block_types": kinds}


def family_of(unet: UNet) -> str | None:
    """Which models this UNet is of, if it is of the public ones."""
    if unet.add_embedding is not None:
        return "SDXL"
    if unet.class_embedding is not None:
        return "an upscaler"
    return FAMILIES.get(unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.in_features)


def made_for(tensors: dict[str, Tensor]) -> str | None:
    """Which models a LoRA's file is for, if its names or the width of the text show it."""
    for pattern, model in OTHER_MODELS:
        if any(re.search(pattern, key) for key in tensors):
            return model
    of_text = [
        x for key, x in tensors.items() if re.search(r"attn2[._].*to_[kv].*(_A|down)\.", key)
    ]
    return FAMILIES.get(of_text[0].shape[1]) if of_text and of_text[0].ndim > 1 else None


# ---- LoRA in -----------------------------------------------------------------------------------


def read_lora(path: str | Path, networks: dict[str, nn.Module]) -> dict[str, nn.ModuleDict]:
    """The adapters that a file, or a folder with one of diffusers' name, has for each network.

    They are fp32, not attached. Raises UserError naming the first key or shape that does not fit.
    """
    path = inside(path, *LORA_FILES)
    tensors, metadata = read_tensors(path)
    other = misfit(made_for(tensors), family_of(networks["unet"]))
    known = {}  # a layer's name in either form → its network and its own name
    for network in (n for n in ADAPTED if n in networks):
        for layer in lora.layers(networks[network]):
            known |= dict.fromkeys(names(networks, network, layer), (network, layer))
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        spelled = key
        for pattern, replacement in SPELLINGS:
            spelled = re.sub(pattern, replacement, spelled)
        part = re.fullmatch(r"(.+)\.(?:(lora_[AB])\.weight|(alpha))", spelled)
        if part is None or part[1] not in known:
            raise UserError(f"{path} {why_not(key, part and part[1], networks, other)}")
        found.setdefault(known[part[1]], {})[part[2] or part[3]] = tensor
    if not found:
        raise UserError(f"{path} holds no LoRA")
    stated = stated_alphas(path, metadata, of_peft=any(key.startswith(PEFT) for key in tensors))
    adapters: dict[str, list[lora.Adapter]] = {}
    for (network, layer), parts in found.items():
        A, B = check_parts(path, layer, parts, networks[network].get_submodule(layer), other)
        alpha = parts.get("alpha", stated.get(network, torch.tensor(len(A))))
        adapters.setdefault(network, []).append(lora.Adapter(layer, A, B, float(alpha)))
    return {network: lora.collect(of_it) for network, of_it in adapters.items()}


def why_not(key: str, layer: str | None, networks: dict[str, nn.Module], other: str) -> str:
    """What is wrong with a file that has this key; of the `layer`, if it names one. `other`: that
    it is for another model."""
    convolutions = {
        spelled
        for name, module in networks["unet"].named_modules()
        if isinstance(module, nn.Conv2d)
        for spelled in names(networks, "unet", name)
    }
    kinds = [kind for pattern, kind in OTHER_KINDS if re.search(pattern, key)]
    kinds += ["LoCon"] * (layer in convolutions)  # of 3×3 ones: the others are read
    if kinds:
        return f"is a {kinds[0]}, a kind that is not read here ({key}): get a plain LoRA"
    if layer is None and other == misfit(None, None):
        return f"is none that is read here: {key} is of no LoRA"
    return f"{other}: this one has no linear layer or 1×1 convolution for {key}"


def check_parts(
    path: Path, layer: str, parts: dict[str, Tensor], module: nn.Module, other: str
) -> tuple[Tensor, Tensor]:
    """A: (r, c_in) and B: (c_out, r) for that layer, if they are."""
    if not {"lora_A", "lora_B"} <= parts.keys():
        raise UserError(f"{path} is damaged: it lacks one of the two matrices for {layer}")
    A, B = parts["lora_A"], parts["lora_B"]
    c_out, c_in = lora.matrix(module).shape
    r = len(A) if A.ndim else 0
    shapes = [list(x.shape) + [1] * (4 - x.ndim) for x in (A, B)]
    if shapes != [[r, c_in, 1, 1], [c_out, r, 1, 1]] or not 1 <= r <= MOST_RANK:
        raise UserError(
            f"{path} {other}: its matrices for {layer} are {list(A.shape)} and {list(B.shape)}, "
            f"the layer is {c_in} → {c_out}"
        )
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise UserError(f"{path} is damaged: alpha of {layer} is not one number")
    return A.reshape(r, c_in).float(), B.reshape(c_out, r).float()


def stated_alphas(path: Path, metadata: dict[str, str], of_peft: bool) -> dict[str, float]:
    """α per network, from the peft settings that diffusers since 0.35 puts into the metadata, and
    peft into a file beside its own. Raises UserError for settings that are not followed here."""
    beside = path.with_name("adapter_config.json")
    try:
        stated = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        if of_peft:
            of_all = json.loads(read_text(beside))
            stated = {f"{n}.{setting}": of_all[setting] for n in ADAPTED for setting in of_all}
        for network in ADAPTED:
            for setting in ("alpha_pattern", "use_rslora", "use_dora"):
                if stated.get(f"{network}.{setting}"):
                    raise UserError(f"{path} was made with peft's {setting}: that is not read here")
        return {n: float(stated[f"{n}.lora_alpha"]) for n in ADAPTED if f"{n}.lora_alpha" in stated}
    except OSError:
        raise UserError(
            f"{path} is peft's, which keeps α in {beside.name}, and that is not there: put that "
            "beside it"
        ) from None
    except (ValueError, TypeError, AttributeError):
        where = beside.name if of_peft else "lora_adapter_metadata"
        raise UserError(f"{path} has damaged metadata ({where})") from None


def inside(path: str | Path, *names: str) -> Path:
    """The file itself, or the first of these names if `path` is a folder. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        found = found or sorted(path.glob("*.pt"))  # a hypernetwork, whose reader says so
        path = (found or [path / names[0]])[0]
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    return path


def check_there(loras: Iterable[str], embeddings: Iterable[str] = ()) -> None:
    """Raise UserError unless these files are there, as a model may have to be downloaded first.
    LoRAs are FILE or FILE:STRENGTH, words FILE or FILE=WORD."""
    for file, _ in map(file_and_strength, loras):
        inside(file, *LORA_FILES)
    for file, _ in map(file_and_word, embeddings):
        inside(file, *EMBEDDING_FILES)


def file_and_strength(given: str) -> tuple[str, float]:
    """ "x.safetensors:0.5" → its two parts; without a colon the strength is 1. Raises UserError."""
    file, colon, strength = given.rpartition(":")
    if not colon or Path(given).exists():
        return given, 1.0
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{given}: {strength!r} is no strength; give FILE or FILE:NUMBER")
    return file, value


def public_name(given: str) -> str:
    """FILE or FILE:STRENGTH without the folder that the file is in."""
    file, strength = file_and_strength(given)
    return hub.public_name(file) + (f":{strength:g}" if strength != 1 else "")


def file_and_word(given: str) -> tuple[str, str | None]:
    """ "x.pt=<dog>" → its two parts; without an equals sign the word is the file's own."""
    file, equals, word = given.rpartition("=")
    return (given, None) if not equals or Path(given).exists() else (file, word)


def public_word(given: str) -> str:
    """FILE or FILE=WORD without the folder that the file is in."""
    file, word = file_and_word(given)
    return hub.public_name(file) + (f"={word}" if word else "")


def merge_files(networks: dict[str, nn.Module], given: Iterable[str]) -> None:
    """Merge LoRA files, each FILE or FILE:STRENGTH, into the networks. Raises UserError."""
    for file, strength in map(file_and_strength, given):
        for network, adapters in read_lora(file, networks).items():
            lora.merge(networks[network], adapters, strength)


# ---- LoRA out ----------------------------------------------------------------------------------


def stored(
    networks: dict[str, nn.Module], adapters: dict[str, nn.ModuleDict]
) -> Iterator[tuple[str, lora.Adapter, Tensor, Tensor]]:
    """(network, adapter, A, B): the matrices 4-D where their layer is a convolution."""
    for network, of_it in adapters.items():
        for a in of_it.values():
            ones = (1,) * (networks[network].get_submodule(a.layer).weight.ndim - 2)
            yield network, a, a.A.view(*a.A.shape, *ones), a.B.view(*a.B.shape, *ones)


def write_diffusers_lora(
    folder: str | Path,
    networks: dict[str, nn.Module],
    adapters: dict[str, nn.ModuleDict],
    dtype: torch.dtype | None = None,
) -> Path:
    """Write <folder>/pytorch_lora_weights.safetensors, for load_lora_weights; its path."""
    tensors, path = {}, Path(folder) / DIFFUSERS_LORA
    for network, a, A, B in stored(networks, adapters):
        name = names(networks, network, a.layer)[0]
        tensors[f"{name}.lora_A.weight"] = A
        tensors[f"{name}.lora_B.weight"] = a.scale * B
    require_range(path, tensors, dtype)
    write_safetensors(path, tensors, dtype)
    return path


def write_kohya_lora(
    path: str | Path,
    networks: dict[str, nn.Module],
    adapters: dict[str, nn.ModuleDict],
    dtype: torch.dtype | None = torch.float16,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write one .safetensors as kohya's sd-scripts do, for A1111, ComfyUI and diffusers."""
    tensors = {}
    for network, a, A, B in stored(networks, adapters):
        name = names(networks, network, a.layer)[1]
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = A, B
        tensors[f"{name}.alpha"] = torch.tensor(float(a.alpha))
    sd2 = networks["text_encoder"].final_layer_norm.weight.shape == (1024,)
    base, architecture = ("sd_v2", "v2-512") if sd2 else ("sd_v1", "v1")
    if "text_encoder_2" in networks:
        base, architecture = "sdxl_base_v1-0", "xl-v1-base"
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(len(a.A)),
        "ss_network_alpha": str(a.alpha),
        "ss_v2": str(sd2),
        "ss_base_model_version": base,
        "ss_output_name": Path(path).stem,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-{architecture}/lora",
        "modelspec.implementation": "https://github.com/kohya-ss/sd-scripts",
        "modelspec.title": Path(path).stem,
    }
    require_range(path, tensors, dtype)
    write_safetensors(path, tensors, dtype, about | (metadata or {}))


# ---- Textual Inversion -------------------------------------------------------------------------


def read_embedding(given: str | Path) -> tuple[str, list[Tensor]]:
    """A word and its vectors, (n, D) fp32 for each text encoder: of a file in diffusers' form or
    A1111's, of which the file's name is the word, or of a folder with learned_embeds.safetensors;
    FILE=WORD chooses another word. Raises UserError."""
    file, chosen = file_and_word(str(given))
    path = inside(file, *EMBEDDING_FILES)
    tensors, metadata = read_tensors(path)
    wanted = CLIP_L_G if tensors.keys() == set(CLIP_L_G) else [*tensors][:1]
    vectors = [torch.atleast_2d(tensors[name]).detach() for name in wanted]
    count = {len(x) for x in vectors}  # of vectors, the same for both encoders
    few = all(x.ndim == 2 and 1 <= x.numel() <= MOST_VECTORS for x in vectors)
    if len(tensors) != len(vectors) or len(count) != 1 or not few:
        raise UserError(f"{path} does not hold the vectors of one word, and nothing else")
    named_by_file = wanted[0] in (*A1111_EMBEDDING, *CLIP_L_G)
    word = metadata.get(WORD, path.stem) if named_by_file else wanted[0]
    return chosen or word, [x.float() for x in vectors]  # only now: they could have been many


def write_embedding(path: str | Path, word: str, vectors: Tensor | list[Tensor]) -> None:
    """Write the vectors, (n, D) for each text encoder, of a word: diffusers' form. With
    "emb_params" in the word's place it is A1111's and ComfyUI's, for which the file's name is the
    word; so it is in both for SDXL, whose file then has the word in its header."""
    vectors = [vectors] if isinstance(vectors, Tensor) else vectors
    if len(vectors) == 1:
        write_safetensors(path, {word: vectors[0]})
    else:
        about = {} if word in A1111_EMBEDDING else {WORD: word}
        write_safetensors(path, dict(zip(CLIP_L_G, vectors, strict=True)), metadata=about)
