"""Whether a model's parts fit together, and what is asked of them can be drawn."""

from pathlib import Path

from torch import Tensor

from ..common.errors import UserError
from .checkpoint import Checkpoint

SAMPLERS = ("ddim", "ddpm", "dpm++")
OUTPUTS = ("pil", "pt", "latent")


def check_fit(source: str | Path, found: Checkpoint) -> None:
    """Raise UserError unless the parts speak of the same tokens, text vectors and latents."""
    text, unet, vae = (found.configs[name] for name in ("text_encoder", "unet", "vae"))
    misfit = f"{source}: its parts do not fit together"
    if text["hidden_size"] != unet["cross_attention_dim"]:
        raise UserError(f"{misfit}: text {text['hidden_size']}, UNet {unet['cross_attention_dim']}")
    if vae["latent_channels"] != unet["out_channels"]:
        raise UserError(
            f"{misfit}: latents of {vae['latent_channels']} and of {unet['out_channels']} channels"
        )
    token = max([*found.tokenizer.vocab.values(), *found.tokenizer.added.values()])
    if token >= text["vocab_size"]:
        raise UserError(f"{misfit}: token {token}, text encoder for {text['vocab_size']}")


def check_sampling(
    count: int, sampler: str, output: str, eta: float, seed: int, batch_size: int | None
) -> None:
    """Raise UserError for settings of `generate` that cannot be."""
    if count < 1:
        raise UserError("no prompts: give at least one")
    if sampler not in SAMPLERS:
        raise UserError(f"sampler {sampler!r}: give one of {', '.join(SAMPLERS)}")
    if output not in OUTPUTS:
        raise UserError(f"output {output!r}: give one of {', '.join(OUTPUTS)}")
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta}: give a number from 0 (DDIM) to 1 (as much noise as DDPM)")
    if not 0 <= seed < 2**63 - count:
        raise UserError(f"seed {seed}: give a whole number from 0")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size {batch_size}: give a number from 1")


class NotFinite(UserError):
    """A network gave NaN or infinity, which would be drawn as black."""


def require_finite(x: Tensor, network: str) -> None:
    """Raise NotFinite, naming the network that gave x, unless all of it is finite. Waits for the
    device: once per batch, after its last step."""
    if not x.isfinite().all():
        raise NotFinite(
            f"the {network} gives NaN or infinity, which would be drawn as black: its weights are "
            "damaged, or too large for 16 bits; compute in fp32 (--dtype fp32, and to train "
            "--mixed_precision no) or get the model again"
        )
