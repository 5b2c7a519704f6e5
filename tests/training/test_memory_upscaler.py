"""What an upscaler's training takes of memory."""

import functools
from pathlib import Path

import torch

from minibooth import ops
from minibooth.bench import models
from minibooth.training import fit, plan
from minibooth.training.settings import TrainConfig

UNET, VAE, TEXT = 473_398_020, 55_325_927, 340_387_840  # weights
PIXELS = 128 * 128


@functools.cache
def x4():
    """Its tokenizer has few words, so its text encoder is taken without what it says of them."""
    return models.model("x4", torch.device("meta"))


def test_the_vae_is_counted_by_its_size_and_its_attention_in_parts():
    """By hand: a quarter of SD's for each latent pixel; scores and their softmax in fp32, as many
    as ops.attention leaves PyTorch at once."""
    assert plan.coding(x4(), PIXELS) == 2 * 4 * PIXELS**2 == 8 * ops.SCORES
    assert plan.coding(x4(), 4 * PIXELS) == 4 * PIXELS * plan.CODING // 4 > 8 * ops.SCORES
    sd = models.model("SD 1.5", torch.device("meta"))
    assert plan.coding(sd, 64 * 64) == 64 * 64 * plan.CODING
    large = models.model("SDXL", torch.device("meta"))
    assert plan.coding(large, PIXELS) == PIXELS * plan.CODING


def test_a_lora_and_all_weights_are_counted_by_phase():
    """By hand: half precision, a piece of a photograph and one of a class image, of 512²."""
    sd, base = x4(), models.model("SD 1.5", torch.device("meta"))
    text = 4 * sum(p.numel() for p in sd.text_encoder.parameters())
    coding, predicting = 8 * ops.SCORES, PIXELS * plan.WIDE_PREDICTING[True]
    short = TrainConfig(method="lora", gradient_checkpointing=True)
    found = plan.phases(sd, short, PIXELS, half=True, base=base)
    assert found["pictures before"] == (2 * UNET + 4 * VAE + text, max(coding, 8 * predicting))
    weights, draw = sum(map(plan.size_of, base.networks.values())), 8 * 64 * 64
    stays = weights - 2 * 859_520_964
    assert found["base model"] == (stays, max(draw * plan.PREDICTING[True], 64 * 64 * plan.CODING))
    full = TrainConfig(num_validation_images=0)
    found = plan.phases(sd, full, PIXELS, half=True)
    kept = 2 * PIXELS * plan.WIDE_ACTIVATIONS["dreambooth"][True][0]
    assert found["training"] == (12 * UNET, max(kept + 2 * UNET, int(0.33 * kept) + 4 * UNET))
    assert "base model" not in found


def test_the_manual_has_what_is_counted():
    sd, base = x4(), models.model("SD 1.5", torch.device("meta"))

    def gigabytes(**changes):
        need = plan.peak(sd, TrainConfig(**changes), PIXELS, half=True, base=base)
        return f"{need / 1e9:.1f}"

    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text("utf-8")
    guide = " ".join(guide.split())
    lora = [gigabytes(method="lora"), gigabytes(method="lora", gradient_checkpointing=True)]
    assert f"a LoRA {lora[0]} GB, {lora[1]} with `--gradient_checkpointing`" in guide
    whole = [gigabytes(), gigabytes(**dict.fromkeys(fit.MODES[-1], True))]
    assert f"all weights {whole[0]} GB, {whole[1]} with the three options" in guide
