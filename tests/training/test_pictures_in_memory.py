"""Pictures stay bytes until they are encoded, and what was made of them before stays the same."""

import hashlib

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from minibooth.pipeline import vae_batch
from minibooth.training import data, photos

SIDE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, noise = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(vae_batch(SIDE * SIDE) + 3):  # more than the VAE takes at once
        pixels = noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def floats(folder):
    """All of them at once, as a formula."""
    pixels = [np.asarray(Image.open(file)) for file in sorted(folder.iterdir())]
    return torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1


class Largest(TorchDispatchMode):
    """The most pictures that were floats in one tensor."""

    count = 0

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        x = function(*arguments, **(options or {}))
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.shape[1:] == (3, SIDE, SIDE):
            self.count = max(self.count, len(x))
        return x


@pytest.mark.parametrize("flip", [False, True])
def test_no_more_pictures_are_floats_than_the_vae_takes_at_once(folder, flip):
    sd = runs.model()
    with Largest() as largest:
        pictures = photos.load_photos(folder, SIDE)
        latents = data.encode(sd, pictures, flip, "photographs")
        pictures.content_hash()
    assert largest.count == vae_batch(SIDE * SIDE) < len(pictures)
    assert len(latents.mean) == (1 + flip) * len(pictures)
    assert pictures.pixels.dtype == torch.uint8 and pictures.pixels.is_contiguous()


@pytest.mark.parametrize("flip", [False, True])
def test_the_latents_are_those_of_floats_bit_for_bit(folder, flip):
    sd, images = runs.model(), floats(folder)
    if flip:
        images = torch.cat([images, images.flip(-1)])
    with torch.no_grad():
        parts = [sd.vae.encode(part) for part in images.split(vae_batch(SIDE * SIDE))]
    latents = data.encode(sd, photos.load_photos(folder, SIDE), flip, "photographs")
    for ours, theirs in zip((latents.mean, latents.std), zip(*parts, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(theirs) * sd.vae.scaling_factor)


def test_the_hash_is_that_of_the_floats_which_states_on_disk_remember(folder):
    pictures = photos.load_photos(folder, SIDE)
    assert torch.equal(pictures.images, floats(folder))
    assert pictures.content_hash() == hashlib.sha256(floats(folder).numpy()).hexdigest()[:16]
