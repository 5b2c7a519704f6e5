"""CLIP's text transformer (arXiv 2103.00020): 77 token ids → 77 vectors the UNet attends to.

They are D numbers each: 768 in SD 1.x, 1024 in SD 2.x.
Attribute names are the public checkpoint's keys, so loading is strict and needs no map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """Built from text_encoder/config.json: SD 1.x (CLIP ViT-L/14) or SD 2.x (OpenCLIP ViT-H)."""

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

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, 77) int64 → (B, 77, D)."""
        position = self.embeddings["position_embedding"].weight[: ids.shape[1]]
        x = self.embeddings["token_embedding"](ids) + position  # (B, 77, D)
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.final_layer_norm(x)
