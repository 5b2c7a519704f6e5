"""Names in the original single files (LDM layout) ↔ names in diffusers folders, which are ours.

A bijection: one table of modules per network, one table of names inside a module. The tables are
made from the configs, for any number of levels and layers.
"""

import re

import torch
from torch import Tensor

from ..common.errors import UserError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
EMBEDDERS = {"text_encoder": "cond_stage_model.", "text_encoder_2": "conditioner.embedders.1."}
FIRST_OF_TWO = "conditioner.embedders.0."  # SDXL's first encoder, which SD has at cond_stage_model.
CLIP, OPEN_CLIP = "transformer.text_model.", "model."  # in it: OpenAI's code, or OpenCLIP's

UNET_INNER = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_INNER = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP_NAMES = [
    (r"embeddings\.token_embedding\.", "token_embedding."),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"final_layer_norm\.", "ln_final."),
    (r"encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"transformer.resblocks.\1.ln_\2."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"transformer.resblocks.\1.attn.out_proj."),
    (r"text_projection\.weight", "text_projection"),  # transposed: x P there, x Pᵀ in a layer
]
STACKED = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
LOGIT_SCALE = 4.6052  # ln 100, CLIP's last temperature: readers count on the key, no picture on it

# Beside the networks, single files carry the noise schedule, training state and unused parts.
IGNORED = re.compile(
    r"\w+|(model_ema|loss|denoiser|low_scale_model)\..*|.*\.position_ids|cond_stage_model\.logit_scale|"
    r"(cond_stage_model|conditioner\.embedders\.1)\.model\.(text_projection|logit_scale|attn_mask|"
    r"transformer\.resblocks\.(23\..*|\d+\.attn\.in_proj_\w+))"
)


def unet_modules(config: dict) -> dict[str, str]:
    """Our module → its name in the file, where the levels are not nested but counted through."""
    n, layers = len(config["block_out_channels"]), config["layers_per_block"]
    per = layers + 1  # entries per level, both ways: the down path has a resampler, up a layer more
    names = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_embedding": "label_emb",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for b in range(n):
        for j in range(layers):
            names[f"down_blocks.{b}.resnets.{j}"] = f"input_blocks.{1 + b * per + j}.0"
            names[f"down_blocks.{b}.attentions.{j}"] = f"input_blocks.{1 + b * per + j}.1"
        names[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{(b + 1) * per}.0.op"
        for j in range(per):
            names[f"up_blocks.{b}.resnets.{j}"] = f"output_blocks.{b * per + j}.0"
            names[f"up_blocks.{b}.attentions.{j}"] = f"output_blocks.{b * per + j}.1"
        slot = 2 if "CrossAttn" in config["up_block_types"][b] else 1
        last = f"output_blocks.{b * per + layers}"
        names[f"up_blocks.{b}.upsamplers.0.conv"] = f"{last}.{slot}.conv"
    return names


def vae_modules(config: dict) -> dict[str, str]:
    """Our module → its name in the file."""
    n, layers = len(config["block_out_channels"]), config.get("layers_per_block", 1)
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        names[f"{side}.conv_in"] = f"{side}.conv_in"
        names[f"{side}.mid_block.resnets.0"] = f"{side}.mid.block_1"
        names[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        names[f"{side}.mid_block.resnets.1"] = f"{side}.mid.block_2"
        names[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        names[f"{side}.conv_out"] = f"{side}.conv_out"
    for i in range(n):
        for j in range(layers):
            names[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
        names[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        up = n - 1 - i  # LDM counts the decoder's levels from the other end
        for j in range(layers + 1):
            names[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{up}.block.{j}"
        names[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{up}.upsample.conv"
    return names


def rename(key: str, modules: dict[str, str], inner: dict[str, str]) -> str:
    """`modules` by the longest matching prefix, then `inner` for what stands inside that module."""
    parts = key.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        if module in modules:
            rest, leaf = ".".join(parts[cut:-1]), parts[-1]
            return ".".join(filter(None, [modules[module], inner.get(rest, rest), leaf]))
    raise KeyError(key)


def unet_key(key: str, config: dict) -> str:
    return UNET + rename(key, unet_modules(config), UNET_INNER)


def averaged_key(name: str) -> str:
    """Where checkpoints keep the moving average (EMA) of a UNet's tensor of that name."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def vae_key(key: str, config: dict) -> str:
    return VAE + rename(key, vae_modules(config), VAE_INNER)


def text_key(key: str, name: str, config: dict) -> str:
    """Of the text encoder `name`. With the exact GELU it is OpenCLIP's: SD 2.x's, SDXL's second."""
    if config.get("hidden_act") != "gelu":
        return EMBEDDERS[name] + CLIP + key
    for pattern, replacement in OPEN_CLIP_NAMES:
        renamed, hit = re.subn("^" + pattern, replacement, key)
        if hit:
            return EMBEDDERS[name] + OPEN_CLIP + renamed
    raise KeyError(key)


def stacked_key(key: str, name: str, config: dict) -> tuple[str, int] | None:
    """Where OpenCLIP has q, k and v of a layer as one tensor, and which of them this is."""
    part = STACKED.fullmatch(key)
    if config.get("hidden_act") != "gelu" or part is None:
        return None
    i, which, kind = part.groups()
    stacked = f"transformer.resblocks.{i}.attn.in_proj_{kind}"
    return EMBEDDERS[name] + OPEN_CLIP + stacked, "qkv".index(which)


def text_to_ldm(name: str, config: dict, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for key, tensor in tensors.items():
        if stacked := stacked_key(key, name, config):
            if stacked[1] == 0:
                qkv = [tensors[key.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
                out[stacked[0]] = torch.cat(qkv)
        else:
            out[text_key(key, name, config)] = tensor.T if "text_projection" in key else tensor
    return out


def to_ldm(configs: dict[str, dict], tensors: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all networks under their single-file names and shapes."""
    out = {unet_key(k, configs["unet"]): v for k, v in tensors["unet"].items()}
    for key, tensor in tensors["vae"].items():
        name = vae_key(key, configs["vae"])
        matrix = tensor.ndim == 2  # attention, which LDM stores as 1×1 convolutions
        out[name] = tensor[:, :, None, None] if matrix else tensor
    for name in (n for n in EMBEDDERS if n in configs):
        out |= text_to_ldm(name, configs[name], tensors[name])
    if "text_encoder_2" not in configs:
        return out
    first, second = (EMBEDDERS[name] for name in ("text_encoder", "text_encoder_2"))
    length = configs["text_encoder"].get("max_position_embeddings", 77)
    out[first + CLIP + "embeddings.position_ids"] = torch.arange(length)[None]  # (1, 77)
    out[second + OPEN_CLIP + "logit_scale"] = torch.tensor(LOGIT_SCALE)
    return {key.replace(first, FIRST_OF_TWO): tensor for key, tensor in out.items()}


def from_ldm(
    configs: dict[str, dict], keys: dict[str, list[str]], tensors: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The other way: for each component's expected keys, the tensors found under the LDM names,
    where SDXL's first text encoder is called as SD's is.

    Takes what it uses out of `tensors`; what is not found is simply absent from the result.
    """
    out: dict[str, dict[str, Tensor]] = {name: {} for name in keys}
    for key in keys["unet"]:
        out["unet"][key] = tensors.pop(unet_key(key, configs["unet"]), None)
    for key in keys["vae"]:
        out["vae"][key] = tensors.pop(vae_key(key, configs["vae"]), None)
    for name in (n for n in EMBEDDERS if n in keys):
        config = configs[name]
        for key in keys[name]:
            if stacked := stacked_key(key, name, config):
                out[name][key] = unstacked(tensors, *stacked, config["hidden_size"])
            else:
                found = tensors.pop(text_key(key, name, config), None)
                turned = found is not None and found.ndim == 2 and "text_projection" in key
                out[name][key] = found.T if turned else found
    return {c: {k: v for k, v in found.items() if v is not None} for c, found in out.items()}


def unstacked(tensors: dict[str, Tensor], name: str, which: int, width: int) -> Tensor | None:
    stacked = tensors.get(name)
    if stacked is None:
        return None
    if stacked.shape[:1] != (3 * width,):
        raise UserError(f"{name} is {list(stacked.shape)}: not q, k and v of {width} each")
    return stacked.chunk(3)[which]
