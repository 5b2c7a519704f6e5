"""Networks that a bench is through with in a moment."""

import pytest
import tiny

from minibooth.bench import models
from minibooth.formats.public import SD1_UNET, SD_VAE
from minibooth.toybox.pretrain import TEXT_CONFIG


@pytest.fixture
def tiny_networks(monkeypatch):
    """In place of those of the toybox's size."""
    unet = SD1_UNET | tiny.UNET["three levels of one layer"] | {"sample_size": 8}
    configs = {
        "unet": unet,
        "vae": SD_VAE | tiny.VAE_SD | {"sample_size": 64, "layers_per_block": 1},
        "text_encoder": TEXT_CONFIG | {"hidden_size": 24, "intermediate_size": 48},
    }
    monkeypatch.setitem(models.CONFIGS, "toybox", configs)
