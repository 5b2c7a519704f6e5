"""The autoencoder (arXiv 2112.10752): a 512² picture ↔ a 64² latent with four channels.

Diffusion happens in the latent; this network only translates, and DreamBooth never trains it.
The building blocks that the UNet shares (ResnetBlock, Downsample, Upsample) stand here.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from . import ops

EPS = 1e-6  # of every GroupNorm in the VAE; the UNet's is 1e-5


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm through ops, with the SiLU that follows most of them; of x + shift where there
    is a shift, (B, C)."""

    def forward(self, x: Tensor, silu: bool = False, shift: Tensor | None = None) -> Tensor:
        return ops.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu, shift)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time embedding))).

    x: (B, c_in, H, W); temb: (B, c_temb), in the UNet only → (B, c_out, H, W).
    """

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float, c_temb: int | None = None):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_temb, c_out) if c_temb else None
        self.norm2 = GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(self.norm1(x, silu=True))
        shift = None if temb is None else self.time_emb_proj(F.silu(temb))  # (B, c_out)
        h = self.conv2(self.norm2(h, silu=True, shift=shift))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Half the size. The UNet pads all around, the VAE (padding=0) right and below only."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the size, or `size` where an odd one was halved before."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        h, w = x.shape[-2:]
        return self.conv(F.interpolate(x, size=size or (2 * h, 2 * w), mode="nearest"))


class Attention(nn.Module):
    """One head over all pixels, at the lowest resolution only."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H·W, C)
        q, k, v = (f(tokens).unsqueeze(1) for f in (self.to_q, self.to_k, self.to_v))
        y = self.to_out[0](ops.attention(q, k, v).squeeze(1))  # (B, H·W, C)
        return x + y.transpose(1, 2).reshape(x.shape)


class Level(nn.Module):
    """One resolution: resnets, then (except at the last level) a change of size."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups, EPS) for i in range(layers)
        )
        self.downsamplers = nn.ModuleList([Downsample(c_out, padding=0)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """The lowest resolution once more: resnet, attention, resnet."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """SD: 3 × 512² → 128 × 512² → 128 × 256² → 256 × 128² → 512 × 64² → 8 × 64²."""

    def __init__(self, widths: list[int], layers: int, latent: int, groups: int, attention: bool):
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, layers, groups, down=i < last)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, 8, H/f, W/f), which quant_conv makes mean and log variance of."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x), silu=True))


class Decoder(nn.Module):
    """The encoder backwards, with one resnet more per level."""

    def __init__(self, widths: list[int], layers: int, latent: int, groups: int, attention: bool):
        super().__init__()
        widths, last = widths[::-1], len(widths) - 1
        self.conv_in = nn.Conv2d(latent, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, attention)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, layers + 1, groups, up=i < last)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, 4, h, w) → (B, 3, f·h, f·w)."""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class VAE(nn.Module):
    """Built from vae/config.json."""

    def __init__(self, config: dict):
        super().__init__()
        c, latent = config, config["latent_channels"]
        shape = (
            list(c["block_out_channels"]),
            c.get("layers_per_block", 1),
            latent,
            c.get("norm_num_groups", 32),
            c.get("mid_block_add_attention", True),
        )
        self.scaling_factor = c.get("scaling_factor", 0.18215)  # z × this has unit variance
        self.factor = 2 ** (len(c["block_out_channels"]) - 1)  # pixels per latent, each way
        self.encoder = Encoder(*shape)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        self.decoder = Decoder(*shape)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: (B, 3, H, W) in [-1, 1] → mean and std of z, each (B, 4, H/f, W/f), unscaled."""
        images = images.to(self.quant_conv.weight.dtype)
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, (0.5 * log_variance.clamp(-30, 20)).exp()

    def decode(self, z: Tensor) -> Tensor:
        """z: (B, 4, h, w), unscaled → images (B, 3, f·h, f·w), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z.to(self.quant_conv.weight.dtype)))
