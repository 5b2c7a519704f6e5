"""python -m minibooth.convert: any form of a model → a diffusers folder or one .safetensors.

Also into a LoRA: what training changed, at low rank.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from . import lora, pipeline
from .common import cli
from .common.cli import option
from .common.errors import UserError
from .common.files import gigabytes, require_space
from .formats import adapters, hub
from .pipeline import StableDiffusion


@dataclass(frozen=True)
class ConvertConfig:
    elsewhere = dict.fromkeys(  # no setting: it has no type
        ("hypernetwork", "merge_hypernetwork"),
        "a hypernetwork stands before keys and values and cannot be merged into weights; "
        "minibooth.sample draws with it",
    )

    model: str | None = option(
        None,
        "folder, single file (.safetensors, .ckpt) or hub id",
        aliases=("pretrained_model_name_or_path",),
        place="source",
    )
    output: str | None = option(None, "a folder, or a file ending in .safetensors", place="path")
    dtype: str | None = option(
        None,
        "of the weights written [fp16 for a file, fp32 for a folder]",
        choices=("fp32", "fp16", "bf16"),
    )
    merge_lora: tuple[str, ...] = option(
        (), "LoRA file to add to the weights, or FILE:STRENGTH; several as well [:1]", place="path"
    )
    extract_lora: int | None = option(
        None, "write not the model but, as a LoRA of this rank, how it differs from --base"
    )
    base: str | None = option(None, "the model that --model was trained from", place="source")
    vae: str | None = option(None, "folder, file or hub id of a VAE to put in", place="source")
    tokenizer: str | None = option(
        None, "folder or hub id of a tokenizer to use instead", place="source"
    )
    prediction_type: str | None = option(
        None, "overrides what the model says", choices=("epsilon", "v_prediction")
    )
    revision: str | None = option(None, "branch, tag or commit on the hub")
    ema: str = option(
        "no",
        "yes takes the averaged weights of a single file that has them beside the plain ones",
        choices=("no", "yes"),
    )


def convert(config: ConvertConfig) -> Path:
    """Read `config.model`, write `config.output`. Raises UserError."""
    if config.model is None or config.output is None:
        raise UserError("give --model (what to read) and --output (a folder or x.safetensors)")
    cli.check_choices(config)
    out = Path(config.output)
    single = out.suffix.lower() == ".safetensors"
    if not single and out.suffix.lower() in hub.FILES:
        raise UserError(f"{out}: only .safetensors files are written")
    if single == out.is_dir() and out.exists():
        raise UserError(f"{out} is there already and is not a {'file' if single else 'folder'}")
    if single:
        cli.check_folder("--output", out.parent, out.name)
    else:
        cli.check_folder("--output", out)
    check_lora(config)
    adapters.check_there(config.merge_lora)
    sd = load(config, config.model, ema=config.ema == "yes")
    dtype = cli.DTYPES[config.dtype] if config.dtype else (torch.float16 if single else None)
    if config.extract_lora:
        return extract(config, sd, out, dtype)
    adapters.merge_files(sd.networks, config.merge_lora)
    sd.source = " + ".join([sd.source, *map(adapters.public_name, config.merge_lora)])
    weights = sum(p.numel() for network in sd.networks.values() for p in network.parameters())
    require_space(out, weights * (dtype.itemsize if dtype else 4))
    if single:
        sd.save_single_file(out, dtype)
    else:
        sd.save(out, dtype)
    return out


def load(config: ConvertConfig, source: str, ema: bool = False) -> StableDiffusion:
    return pipeline.load(
        source,
        tokenizer=config.tokenizer,
        vae=config.vae,
        prediction_type=config.prediction_type,
        revision=config.revision,
        ema=ema,
    )


def check_lora(config: ConvertConfig) -> None:
    cli.check_at_least_one(config, ("extract_lora",))
    if (config.extract_lora is None) != (config.base is None):
        raise UserError("give --extract_lora and --base together: a rank, and what to compare with")
    if config.extract_lora and config.merge_lora:
        raise UserError("--merge_lora and --extract_lora exclude each other: merge first")


def extract(
    config: ConvertConfig, tuned: StableDiffusion, out: Path, dtype: torch.dtype | None
) -> Path:
    """Write a LoRA: kohya's form where `out` is a file, diffusers' where it is a folder."""
    base, found, squares = load(config, config.base), {}, []
    families = [adapters.family_of(sd.unet) or "another" for sd in (base, tuned)]
    if base.networks.keys() != tuned.networks.keys():
        raise UserError(f"--base is no base of --model: {families[0]}, and {families[1]}")
    for name in (n for n in adapters.ADAPTED if n in base.networks):
        networks = base.networks[name], tuned.networks[name]
        ours, theirs = ({k: v.shape for k, v in n.state_dict().items()} for n in networks)
        if other := sorted(k for k in ours | theirs if ours.get(k) != theirs.get(k)):
            raise UserError(f"--base is no base of --model: they differ in the {name}'s {other[0]}")
        extracted = lora.extract(*networks, config.extract_lora)
        squares.append(extracted[1:])
        if extracted.adapters:
            found[name] = extracted.adapters
    if not found:
        raise UserError("--model and --base differ in no layer: there is nothing to extract")
    kept, of_layers, of_all = (math.sqrt(sum(of_both)) for of_both in zip(*squares, strict=True))
    print(
        f"rank {config.extract_lora} keeps {kept / of_layers:.1%} of the norm of what changed in "
        f"{sum(map(len, found.values()))} linear layers and 1×1 convolutions, {kept / of_all:.1%} "
        "of all that changed"
    )
    if out.suffix.lower() == ".safetensors":
        adapters.write_kohya_lora(out, base.networks, found, dtype)
        return out
    return adapters.write_diffusers_lora(out, base.networks, found, dtype)


def main() -> None:
    config = cli.parse(
        ConvertConfig,
        "minibooth.convert",
        "Turn a model into a diffusers folder, or into one file for A1111 and ComfyUI.",
    )
    out = convert(config)
    size = sum(f.stat().st_size for f in (out.rglob("*") if out.is_dir() else [out]))
    print(f"{out}: {gigabytes(size)}")


if __name__ == "__main__":
    cli.run("minibooth.convert", main)
