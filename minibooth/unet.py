"""The UNet (arXiv 2112.10752): from a noisy latent, its timestep and a text to the noise in it.

A U of resolutions. On the way down every layer's output is put on a stack; on the way up each
layer takes the top of that stack beside its own input. SD 1.5 at 512², as channels in and out, size
of the feature map, and layers, where "8 heads" is a transformer over its pixels:

    conv_in          4 →  320  64²
    down_blocks.0  320 →  320  64²  2 × (resnet, 8 heads)  then half
    down_blocks.1  320 →  640  32²  2 × (resnet, 8 heads)  then half
    down_blocks.2  640 → 1280  16²  2 × (resnet, 8 heads)  then half
    down_blocks.3 1280 → 1280   8²  2 × (resnet)
    mid_block     1280 → 1280   8²  resnet, 8 heads, resnet
    up_blocks.0   1280 → 1280   8²  3 × (resnet)           then twice
    up_blocks.1   1280 → 1280  16²  3 × (resnet, 8 heads)  then twice
    up_blocks.2   1280 →  640  32²  3 × (resnet, 8 heads)  then twice
    up_blocks.3    640 →  320  64²  3 × (resnet, 8 heads)
    conv_out       320 →    4  64²
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .text_encoder import Condition
from .vae import Downsample, GroupNorm, ResnetBlock, Upsample


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """(B,) → (B, width): cosines and sines of t at `width / 2` frequencies from 1 to 1/10000."""
    k = torch.arange(width // 2, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * k / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Cosines and sines of t, (B, c_in) → what every resnet is told of it, (B, c_out)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Attention(nn.Module):
    """Pixels attend to pixels (context = x) or to the text."""

    def __init__(self, width: int, c_context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(c_context, width, bias=False)
        self.to_v = nn.Linear(c_context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        y = ops.attention(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))  # (B, N, C)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm through ops; and for where something is added to x first."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def of_sum(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """x + h, and its norm."""
        return ops.add_layer_norm(x, h, self.weight, self.bias, self.eps)


class GEGLU(nn.Module):
    """A linear layer, and a second one that says how much of each value passes (2002.05202)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        return ops.geglu(self.proj(x))  # h · GELU(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        # net.1 was a dropout of 0; the public keys still count it.
        self.net = nn.Sequential(
            GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pixels look at each other, then at the text; then each on its own. x: (B, N, C) pixels."""

    def __init__(self, width: int, c_context: int, heads: int):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, c_context, heads)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x, h = self.norm2.of_sum(x, self.attn1(h, h))  # x + attn1, and its norm
        x, h = self.norm3.of_sum(x, self.attn2(h, context))  # the only place where text comes in
        return x + self.ff(h)


class TextBlock(TransformerBlock):
    """An upscaler's: pixels do not look at each other, but twice at the text."""

    def __init__(self, width: int, c_context: int, heads: int):
        super().__init__(width, c_context, heads)
        self.attn1 = Attention(width, c_context, heads)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), context)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Pointwise(nn.Conv2d):
    """A linear layer over the channels that is stored as a 1×1 convolution. x: (B, N, C)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, as a residual. SD has one, SDXL ten."""

    def __init__(self, channels: int, groups: int, linear: bool, blocks: list[TransformerBlock]):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        # The same matrix either way; SD 1.x stores it as a 1×1 convolution, later ones as a linear.
        project = nn.Linear if linear else Pointwise
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = project(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, H·W, C)
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h)
        return x + h.transpose(1, 2).reshape(x.shape)  # (B, C, H, W)


class Level(nn.Module):
    """One resolution of the U: resnets, a transformer after each where it attends, a resampler."""

    def __init__(self, resnets, attentions=(), downsamplers=(), upsamplers=()):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList(downsamplers)
        self.upsamplers = nn.ModuleList(upsamplers)

    def layer(self, i: int, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[i](x, temb)
        return self.attentions[i](x, context) if i < len(self.attentions) else x


class UNet(nn.Module):
    """Built from unet/config.json."""

    def __init__(self, config: dict):
        super().__init__()
        c, widths, layers = config, config["block_out_channels"], config["layers_per_block"]
        n, groups, eps = len(widths), c.get("norm_num_groups", 32), c.get("norm_eps", 1e-5)
        # In the public configs "attention_head_dim" is the number of heads; newer ones say so.
        heads = c.get("num_attention_heads") or c.get("attention_head_dim", 8)
        heads = [heads] * n if isinstance(heads, int) else heads
        depths = c.get("transformer_layers_per_block", 1)
        depths = [depths] * n if isinstance(depths, int) else depths
        only_text = c.get("only_cross_attention") or [False] * n
        c_temb = 4 * widths[0]

        def resnet(c_in: int, c_out: int) -> ResnetBlock:
            return ResnetBlock(c_in, c_out, groups, eps, c_temb)

        def transformers(count: int, i: int, kind: str) -> list[Transformer]:
            if "CrossAttn" not in kind:
                return []
            block = TextBlock if only_text[i] else TransformerBlock
            args = widths[i], c["cross_attention_dim"], heads[i]
            blocks = [[block(*args) for _ in range(depths[i])] for _ in range(count)]
            linear = c.get("use_linear_projection", False)
            return [Transformer(widths[i], groups, linear, some) for some in blocks]

        self.conv_in = nn.Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], c_temb)
        self.add_embedding = None  # of what SDXL is told beside the time
        if c.get("addition_embed_type"):
            self.c_size = c["addition_time_embed_dim"]  # numbers for each of a condition's sizes
            self.add_embedding = TimeEmbedding(c["projection_class_embeddings_input_dim"], c_temb)
        self.class_embedding = None  # of how much noise an upscaler's small picture has
        if c.get("num_class_embeds"):
            self.class_embedding = nn.Embedding(c["num_class_embeds"], c_temb)

        self.down_blocks = nn.ModuleList()
        channels, skips = widths[0], [widths[0]]  # the skips' channels, a stack as in forward
        for i, (width, kind) in enumerate(zip(widths, c["down_block_types"], strict=True)):
            resnets = [resnet(channels, width)] + [resnet(width, width) for _ in range(layers - 1)]
            down = [Downsample(width, padding=1)] if i < n - 1 else []
            self.down_blocks.append(Level(resnets, transformers(layers, i, kind), down))
            skips += [width] * (layers + len(down))
            channels = width

        middle = [resnet(channels, channels), resnet(channels, channels)]
        self.mid_block = Level(middle, transformers(1, n - 1, "CrossAttn"))

        self.up_blocks = nn.ModuleList()
        for i, kind in zip(reversed(range(n)), c["up_block_types"], strict=True):
            resnets = []
            for _ in range(layers + 1):
                resnets.append(resnet(channels + skips.pop(), widths[i]))
                channels = widths[i]
            up = [Upsample(channels)] if i > 0 else []
            level = Level(resnets, transformers(layers + 1, i, kind), upsamplers=up)
            self.up_blocks.append(level)

        self.conv_norm_out = GroupNorm(groups, channels, eps)
        self.conv_out = nn.Conv2d(channels, c["out_channels"], 3, padding=1)

    def told(self, c: Condition) -> Tensor:
        """The prompt as one vector and, as the time is, six sizes: (B, P + 6 · 256)."""
        sizes = timestep_embedding(c.sizes.flatten(), self.c_size)  # (6 B, 256)
        return torch.cat([c.pooled, sizes.view(len(c), -1)], dim=-1)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor | Condition) -> Tensor:
        """x_t: (B, 4, h, w), t: (B,), context: (B, 77, D) or what has it → ε̂ or v̂: (B, 4, h, w)."""
        dtype = self.conv_in.weight.dtype
        c = context if isinstance(context, Condition) else Condition(context)
        x, context = x_t.to(dtype), c.context.to(dtype)
        temb = timestep_embedding(t, self.conv_in.out_channels).to(dtype)
        temb = self.time_embedding(temb)  # (B, 4 · width)
        if self.add_embedding is not None:
            temb = temb + self.add_embedding(self.told(c).to(dtype))
        if self.class_embedding is not None:
            temb = temb + self.class_embedding(c.level)

        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = level.layer(i, x, temb, context)
                skips.append(x)
            for downsample in level.downsamplers:
                x = downsample(x)
                skips.append(x)

        x = self.mid_block.layer(0, x, temb, context)
        x = self.mid_block.layer(1, x, temb, context)

        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = level.layer(i, torch.cat([x, skips.pop()], dim=1), temb, context)
            for upsample in level.upsamplers:
                x = upsample(x, size=skips[-1].shape[-2:])  # odd sizes come back as they went

        return self.conv_out(self.conv_norm_out(x, silu=True))
