"""Whether a model's parts fit together, and what is asked of them can be drawn."""

from pathlib import Path

from torch import Tensor

from ..common.errors import UserError
from .checkpoint import Checkpoint
from .configs import check_config

SAMPLERS = ("ddim", "ddpm", "dpm++")
OUTPUTS = ("pil", "pt", "latent")


def check_fit(source: str | Path, found: Checkpoint) -> None:
    """Raise UserError unless the parts speak of the same tokens, text vectors and latents."""
    unet, vae = found.configs["unet"], found.configs["vae"]
    texts = [found.configs[name] for name in found.networks if name.startswith("text_encoder")]
    misfit = f"{source}: its parts do not fit together"
    width = sum(text["hidden_size"] for text in texts)
    if width != unet["cross_attention_dim"]:
        raise UserError(f"{misfit}: text {width}, UNet {unet['cross_attention_dim']}")
    if vae["latent_channels"] != unet["out_channels"]:
        raise UserError(
            f"{misfit}: latents of {vae['latent_channels']} and of {unet['out_channels']} channels"
        )
    token = max([*found.tokenizer.vocab.values(), *found.tokenizer.added.values()])
    if token >= (size := min(text["vocab_size"] for text in texts)):
        raise UserError(f"{misfit}: token {token}, text encoder for {size}")
    if bool(unet.get("addition_embed_type")) != (len(texts) == 2):
        raise UserError(f"{misfit}: {len(texts)} text encoders, and not the UNet for them")
    small, table = found.configs.get("low_res_scheduler"), unet.get("num_class_embeds")
    if small or table or unet["in_channels"] == unet["out_channels"] + 3:
        check_upscaler(misfit, found, small or {}, table or 0)
    if len(texts) == 2:
        if "CLIPTextModelWithProjection" not in (texts[1].get("architectures") or ()):
            raise UserError(f"{misfit}: its text_encoder_2 has no projection, as its config says")
        end = texts[1].get("eos_token_id", 2)
        if type(end) is not int or not 0 <= end < texts[1]["vocab_size"]:
            raise UserError(f"{misfit}: its text_encoder_2 has no token {end!r:.80} to end with")
        sizes = 6 * 2 * (unet["addition_time_embed_dim"] // 2)  # a cosine and a sine each
        told = texts[1]["projection_dim"] + sizes
        if told != unet["projection_class_embeddings_input_dim"]:
            wanted = unet["projection_class_embeddings_input_dim"]
            raise UserError(f"{misfit}: {told} numbers of text and sizes, UNet {wanted}")


def check_upscaler(misfit: str, found: Checkpoint, small: dict, table: int) -> None:
    """The same for one that sees a small picture, whose noise has levels."""
    check_config("low_res_scheduler", small)
    levels, most = found.levels, min(table, small.get("num_train_timesteps", 0))
    seen = found.configs["unet"]["in_channels"] - found.configs["unet"]["out_channels"]
    if seen != 3 or type(levels) is not int or not 0 < levels <= most:
        raise UserError(
            f"{misfit}: an upscaler whose UNet sees {seen} channels beside the latent and knows "
            f"{most} noise levels of its {levels!r:.80}"
        )


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
