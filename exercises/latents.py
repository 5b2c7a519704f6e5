"""Part 2 of tutorial.md. Fill in, then: python exercises/check.py latents"""

import torch
from torch import Tensor


def latent_shape(height: int, width: int, factor: int = 8) -> tuple[int, int, int]:
    """Channels, height and width of the latent of a picture."""
    raise NotImplementedError


def sample_latent(mean: Tensor, std: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """x0 as the UNet wants it, from what vae.encode returns: of about unit variance."""
    raise NotImplementedError


# ---- checks: no need to read on ----------------------------------------------------------------


def check_latent_shape():
    assert latent_shape(512, 768) == (4, 64, 96), f"of 512 × 768 it is {latent_shape(512, 768)}"
    assert latent_shape(64, 64, factor=4) == (4, 16, 16), "the toybox's factor is 4"


def check_sample_latent():
    mean, std, noise = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0]), torch.tensor([1.0, 2.0])
    x0 = sample_latent(mean, std, noise, 0.2)
    assert torch.allclose(x0, torch.tensor([0.7, 0.6])), f"3 + 0.5 and −1 + 4, times .2: {x0}"
