"""Every public form of Stable Diffusion's weights in."""

from pathlib import Path

from ..common.errors import UserError
from ..tokenizer import Tokenizer
from . import hub
from .checkpoint import Checkpoint
from .configs import settle
from .folders import file_getter, read_folder, read_vae, require_kind
from .single_files import read_single_file

NOT_IN_IT = {  # single files that are not whole
    "unet": "holds no UNet",
    "vae": "holds no VAE: give one with --vae, such as stabilityai/sd-vae-ft-mse",
    "text_encoder": "holds no text encoder, as files of a UNet alone: get the whole model",
    "text_encoder_2": "holds one of SDXL's two text encoders: get the whole model",
}


def read(
    source: str | Path,
    tokenizer: str | Path | Tokenizer | None = None,
    vae: str | Path | None = None,
    revision: str | None = None,
    ema: bool = False,
) -> Checkpoint:
    """A folder in diffusers' layout, a single file, "toybox" or "toybox-x4", or the id of a model
    on the hub; `tokenizer` and `vae` are read instead of its own. `ema`: of a single file that
    holds both, the averaged weights.

    Raises UserError where there is no such model or a part of it is missing or damaged.
    """
    path = Path(source)
    if path.is_file():
        checkpoint = read_single_file(path, tokenizer, ema)
    elif ema:
        raise UserError(f"{source}: only a single file has an EMA beside its weights: no --ema")
    else:
        file = file_getter(source, revision)
        index = require_kind(file, source)
        checkpoint = read_folder(file, str(source), index, tokenizer, vae)
        checkpoint.licence = hub.LICENCES.get(str(source), checkpoint.licence)
    if vae is not None and path.is_file():
        config = checkpoint.configs["vae"]
        checkpoint.configs["vae"], checkpoint.tensors["vae"] = read_vae(vae, config)
    for name, what in NOT_IN_IT.items():
        if name in checkpoint.tensors and not checkpoint.tensors[name]:
            raise UserError(f"{source} {what}")
    settle(checkpoint.configs)
    return checkpoint
