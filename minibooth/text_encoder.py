"""CLIP's text transformer (arXiv 2103.00020): 77 token ids → 77 vectors the UNet attends to.

They are D numbers each: 768 in SD 1.x, 1024 in SD 2.x. SDXL has two encoders, and 768 + 1280.
Attribute names are the public checkpoint's keys, so loading is strict and needs no map.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common.trees import each


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, 77, d)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Causal: a token sees itself and those before it. Padding is not masked: SD never did.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, 77, D)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, act: str):
        super().__init__()
        self.act = act
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        # SD 1.x was trained with OpenAI's cheap approximation of GELU, SD 2.x with the exact one.
        h = h * torch.sigmoid(1.702 * h) if self.act == "quick_gelu" else F.gelu(h)
        return self.fc2(h)


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, act: str, eps: float):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.self_attn = SelfAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, hidden, act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """Built from text_encoder/config.json: SD 1.x (CLIP ViT-L/14), SD 2.x (OpenCLIP ViT-H), or one
    of SDXL's two, both of these kinds (ViT-L/14 and OpenCLIP ViT-bigG, which has a projection)."""

    def __init__(self, config: dict):
        super().__init__()
        c, width = config, config["hidden_size"]
        eps, act = c.get("layer_norm_eps", 1e-5), c.get("hidden_act", "quick_gelu")
        hidden, heads = c["intermediate_size"], c["num_attention_heads"]
        self.embeddings = nn.ModuleDict()
        self.embeddings["token_embedding"] = nn.Embedding(c["vocab_size"], width)
        self.embeddings["position_embedding"] = nn.Embedding(c["max_position_embeddings"], width)
        layers = [Layer(width, hidden, heads, act, eps) for _ in range(c["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.final_layer_norm = nn.LayerNorm(width, eps)
        if "CLIPTextModelWithProjection" in (c.get("architectures") or ()):
            self.text_projection = nn.Linear(width, c["projection_dim"], bias=False)
        # Old configs say 2, and mean the last of CLIP's own 49,408 tokens.
        end = c.get("eos_token_id", 2)
        self.end = end if end != 2 else min(c["vocab_size"], 49_408) - 1

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, 77) int64 → (B, 77, D)."""
        return self.final_layer_norm(self.hidden(ids)[1])

    def hidden(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What leaves the last layer but one, and the last: (B, 77, D) each."""
        position = self.embeddings["position_embedding"].weight[: ids.shape[1]]
        x = self.embeddings["token_embedding"](ids) + position  # (B, 77, D)
        for layer in self.encoder["layers"]:
            before, x = x, layer(x)
        return before, x

    def pooled(self, ids: Tensor, last: Tensor) -> Tensor:
        """The prompts as one vector each, (B, P): at their first end token, which has seen all."""
        end = (ids == self.end).int().argmax(dim=1)  # (B,): padding may be end tokens, too
        h = last[torch.arange(len(ids), device=ids.device), end]  # (B, D)
        return self.text_projection(self.final_layer_norm(h))


@dataclass(frozen=True)
class Condition:
    """c, all that a UNet is told beside x_t and t: what B prompts are encoded to.

    SD 1.x and 2.x look at the context alone. SDXL (arXiv 2307.01952, Sec. 2.2) is told as well how
    large a picture was and where it was cut, lest small ones be left out or heads cut off.
    """

    context: Tensor  # (B, 77, D) one vector for each token
    pooled: Tensor | None = None  # (B, P) SDXL: one for the prompt
    sizes: Tensor | None = None  # (B, 6) in pixels: height and width of the picture as it came, top
    # and left of the crop in what it was resized to, height and width of the crop
    level: Tensor | None = None  # (B,) int64, an upscaler: how much noise its small picture has

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, which: slice | Tensor) -> "Condition":
        return each(lambda x: x[which], self)

    def whole(self, height: int, width: int) -> "Condition":
        """With the sizes of pictures that came in this size, of which nothing was cut off."""
        sizes = torch.tensor([height, width, 0, 0, height, width], device=self.context.device)
        return replace(self, sizes=sizes.expand(len(self), -1))


def cat(conditions: list[Tensor | Condition]) -> Tensor | Condition:
    """One behind the other, as torch.cat."""
    return each(lambda *tensors: torch.cat(tensors), *conditions)


def encode(encoders: list[TextEncoder], ids: Tensor) -> Condition:
    """Prompts as each encoder's tokenizer has them, (B, 77); for SDXL's two (B, 2, 77)."""
    ids = ids.to(encoders[0].final_layer_norm.weight.device)
    if len(encoders) == 1:
        return Condition(encoders[0](ids))
    found = [encoder.hidden(i) for encoder, i in zip(encoders, ids.unbind(1), strict=True)]
    context = torch.cat([before for before, _ in found], dim=-1)  # not normalised, as SD 2.x's is
    return Condition(context, encoders[-1].pooled(ids[:, -1], found[-1][1]))
