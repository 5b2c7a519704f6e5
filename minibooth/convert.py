"""python -m minibooth.convert: any form of a model → a diffusers folder or one .safetensors."""

from dataclasses import dataclass
from pathlib import Path

import torch

from . import pipeline
from .common import cli
from .common.cli import option
from .common.errors import UserError
from .common.files import gigabytes, require_space


@dataclass(frozen=True)
class ConvertConfig:
    model: str | None = option(
        None,
        "folder, single file (.safetensors, .ckpt) or hub id",
        aliases=("pretrained_model_name_or_path",),
    )
    output: str | None = option(None, "a folder, or a file ending in .safetensors")
    dtype: str | None = option(
        None,
        "of the weights written [fp16 for a file, fp32 for a folder]",
        choices=("fp32", "fp16", "bf16"),
    )
    vae: str | None = option(None, "folder, file or hub id of a VAE to put in")
    tokenizer: str | None = option(None, "folder or hub id of a tokenizer to use instead")
    prediction_type: str | None = option(
        None, "overrides what the model says", choices=("epsilon", "v_prediction")
    )
    revision: str | None = option(None, "branch, tag or commit on the hub")


def convert(config: ConvertConfig) -> Path:
    """Read `config.model`, write `config.output`. Raises UserError."""
    if config.model is None or config.output is None:
        raise UserError("give --model (what to read) and --output (a folder or x.safetensors)")
    cli.check_choices(config)
    out = Path(config.output)
    single = out.suffix == ".safetensors"
    if not single and out.suffix in (".ckpt", ".bin", ".pt"):
        raise UserError(f"{out}: only .safetensors files are written")
    if single == out.is_dir() and out.exists():
        raise UserError(f"{out} is there already and is not a {'file' if single else 'folder'}")
    cli.check_folder("--output", out.parent if single else out)
    sd = pipeline.load(
        config.model,
        tokenizer=config.tokenizer,
        vae=config.vae,
        prediction_type=config.prediction_type,
        revision=config.revision,
    )
    dtype = cli.DTYPES[config.dtype] if config.dtype else (torch.float16 if single else None)
    weights = sum(p.numel() for network in sd.networks.values() for p in network.parameters())
    require_space(out, weights * (dtype.itemsize if dtype else 4))
    if single:
        sd.save_single_file(out, dtype)
    else:
        sd.save(out, dtype)
    return out


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
