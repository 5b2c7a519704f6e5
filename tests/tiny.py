"""What the parity tests share: small configs in the public format, seeded weights, a measure."""

import copy
from math import prod

import torch
from torch import Tensor, nn

DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
UNET_SD1 = dict(
    in_channels=4,
    out_channels=4,
    block_out_channels=[16, 32, 48, 48],
    layers_per_block=2,
    down_block_types=DOWN,
    up_block_types=UP,
    cross_attention_dim=24,
    attention_head_dim=4,  # which means the number of heads
    norm_num_groups=8,
)
UNET_SD2 = UNET_SD1 | dict(
    attention_head_dim=[2, 4, 6, 6],
    use_linear_projection=True,
    upcast_attention=True,
    cross_attention_dim=32,
)
FULL = dict(block_out_channels=[320, 640, 1280, 1280], norm_num_groups=32)
UNET = {
    "sd1": UNET_SD1,
    "sd2": UNET_SD2,
    "inpainting": UNET_SD1 | dict(in_channels=9),
    "three levels of one layer": UNET_SD1
    | dict(
        block_out_channels=[8, 24, 16],
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        attention_head_dim=2,
        norm_num_groups=4,
        norm_eps=1e-3,
    ),
    "two levels of three layers": UNET_SD1
    | dict(
        block_out_channels=[16, 32],
        layers_per_block=3,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    ),
    "SD 1.5": UNET_SD1 | FULL | dict(cross_attention_dim=768, attention_head_dim=8),
    "SD 2.1": UNET_SD2 | FULL | dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20]),
}

VAE_SD = dict(
    in_channels=3,
    out_channels=3,
    block_out_channels=[8, 16, 24, 24],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=4,
)
VAE = {
    "sd": VAE_SD,
    "without attention": VAE_SD | dict(mid_block_add_attention=False),
    "three levels of one layer": VAE_SD
    | dict(
        block_out_channels=[8, 8, 16],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        latent_channels=8,
    ),
    "SD": VAE_SD | dict(block_out_channels=[128, 256, 512, 512], norm_num_groups=32),
}

TEXT_SD1 = dict(
    vocab_size=100,
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
TEXT_SD2 = TEXT_SD1 | dict(hidden_size=32, num_hidden_layers=3, hidden_act="gelu")
TEXT = {
    "sd1": TEXT_SD1,
    "sd2": TEXT_SD2,
    "SD 1.5": TEXT_SD1
    | dict(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    ),
    "SD 2.1": TEXT_SD2
    | dict(
        vocab_size=49408,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
    ),
}

SCHEDULER = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    num_train_timesteps=1000,
    steps_offset=1,
    set_alpha_to_one=False,
    clip_sample=False,
)


def unet_config(kind: str) -> dict:
    return copy.deepcopy(UNET[kind])


def vae_config(kind: str) -> dict:
    return copy.deepcopy(VAE[kind])


def text_config(kind: str) -> dict:
    return copy.deepcopy(TEXT[kind])


def scheduler_config(**changes) -> dict:
    return SCHEDULER | changes


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights under which every part of the network has a say in the output; no bias is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / prod(p.shape[1:]) ** 0.5)
            else:
                p.add_(noise, alpha=0.1)
    return module.eval()


def peer_state(peer: nn.Module) -> dict[str, Tensor]:
    """Its state dict under minibooth's names: only transformers ever adds to them, at the front."""
    state = {name.removeprefix("text_model."): value for name, value in peer.state_dict().items()}
    state.pop("embeddings.position_ids", None)
    return state


def randn(*shape: int, seed: int = 0, **options) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **options)


def rel(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖. Infinite, never nan, where b is zero or a has another shape."""
    if a.shape != b.shape or not b.any():
        return float("inf")
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
