"""Part 6 of tutorial.md. Fill in, then: python exercises/check.py low_rank"""

import torch
from torch import Tensor, nn

from minibooth import lora


def adapted(x: Tensor, W: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """What the layer W computes for x, (N, c_in), with its LoRA: (N, c_out).

    W: (c_out, c_in), A: (r, c_in), B: (c_out, r). Without a product as large as W.
    """
    raise NotImplementedError


def merged(W: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """The one matrix, (c_out, c_in), that computes the same."""
    raise NotImplementedError


def trained_numbers(shapes: list[tuple[int, int]], rank: int) -> int:
    """How many numbers LoRA trains for layers of these (c_out, c_in)."""
    raise NotImplementedError


# ---- checks: no need to read on ----------------------------------------------------------------


def layer() -> tuple[nn.Sequential, lora.Adapter, Tensor]:
    """A network of one layer with an adapter attached, and an x for it."""
    g = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5, bias=False))
    network[0].weight.data = torch.randn(5, 6, generator=g)
    a = lora.Adapter("0", torch.randn(2, 6, generator=g), torch.randn(5, 2, generator=g), 3.0)
    lora.attach(network, lora.collect([a]))
    return network, a, torch.randn(4, 6, generator=g)


def check_adapted():
    with torch.no_grad():
        network, a, x = layer()
        found, want = adapted(x, network[0].weight, a.A, a.B, 3.0), network(x)
        assert found.shape == want.shape, f"{tuple(found.shape)}, not {tuple(want.shape)}"
        off = (found - want).abs().max()
        assert off < 1e-4, f"up to {off:.2f} from what minibooth's layer computes"
        zero = adapted(x, network[0].weight, a.A, torch.zeros_like(a.B), 3.0)
        assert torch.allclose(zero, x @ network[0].weight.T, atol=1e-5), "B = 0 is not W alone"


def check_merged():
    with torch.no_grad():
        network, a, x = layer()
        off = (x @ merged(network[0].weight, a.A, a.B, 3.0).T - network(x)).abs().max()
        assert off < 1e-4, f"up to {off:.2f} from what the layer with its LoRA computes"


def check_trained_numbers():
    network = nn.Sequential(nn.Linear(320, 320), nn.Linear(320, 1280), nn.Linear(768, 320))
    shapes = [tuple(layer.weight.shape) for layer in network]
    for rank in (1, 4):
        adapters = lora.create(network, rank, 1.0, targets="all")
        want, found = sum(p.numel() for p in adapters.parameters()), trained_numbers(shapes, rank)
        assert found == want, f"{found:,} at rank {rank}, not {want:,}"
