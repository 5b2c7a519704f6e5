"""What SDXL takes of memory, and how its networks make room for each other."""

import functools
import sys

import eight_bit_stand_in
import pytest
import runs
import torch

from minibooth import UserError
from minibooth.bench import models
from minibooth.device import memory, settle
from minibooth.formats import families, folders
from minibooth.training import plan, start
from minibooth.training.settings import TrainConfig

UNET, VAE, TEXT = 2_567_463_684, 83_653_863, 123_060_480 + 694_659_840  # weights
PIXELS = 128 * 128


@functools.cache
def sdxl():
    return models.model("SDXL", torch.device("meta"))


def phases(**changes):
    settings = {"method": "lora"} | families.SDXL | families.SDXL_LORA | changes
    return plan.phases(sdxl(), TrainConfig(**settings), PIXELS, half=True)


def needed(**changes):
    return max(plan.with_spare(*phase) for phase in phases(**changes).values())


def test_a_lora_is_counted_by_phase():
    """By hand: rank 16, half-precision weights, a photograph and a class image of 1024²."""
    trained = 4 * 16 * sum(sum(p.shape) for p in attention_weights())
    kept, predicting = (
        2 * PIXELS * plan.DEEP_ACTIVATIONS["lora"][True][1],
        2 * PIXELS * plan.DEEP_PREDICTING[True],
    )
    coding = PIXELS * plan.CODING
    checkpointed = phases(gradient_checkpointing=True)
    assert checkpointed["pictures before"] == (2 * UNET + 4 * VAE, coding)
    step = max(kept, int(0.41 * kept) + trained)
    work = step + 4 * VAE + coding
    assert checkpointed["training"] == (2 * UNET + 3 * trained, work)
    by_turns = phases(gradient_checkpointing=True, use_8bit_adam=True)
    assert by_turns["pictures before"] == (2 * UNET + 4 * VAE, predicting)
    assert by_turns["training"][1] == step  # the UNet's weights make room for the VAE's work
    in_full = phases()
    assert in_full["pictures before"][0] == 2 * UNET + 4 * (VAE + TEXT)


def attention_weights():
    names = ("to_q", "to_k", "to_v", "to_out.0")
    layers = [m for name, m in sdxl().unet.named_modules() if name.endswith(names)]
    assert len(layers) == 560
    return [layer.weight for layer in layers]


def test_what_fits_which_card():
    short, turns = {"gradient_checkpointing": True}, {"use_8bit_adam": True}
    assert needed(**short) < 11.5e9  # a card of 12 GB
    assert needed(**short, prior_loss_weight=0.0) < 10.7e9
    assert needed(**short, **turns, prior_loss_weight=0.0) < 7e9  # of one of 8 GB
    every = short | turns | {"optimizer_in_backward": True, "method": "dreambooth"}
    assert needed(**every) < 24e9


def test_what_cannot_fit_is_refused_before_it_is_downloaded(monkeypatch):
    """By configs alone: 8 GB of which 7 are free hold a LoRA, and 4 hold none."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", eight_bit_stand_in.MODULE)
    read, configs = [], models.CONFIGS["SDXL"]

    def file(name, **_):
        read.append(name)
        return name

    def config(path, where):
        return configs[path.removesuffix("/config.json")]

    monkeypatch.setattr(folders, "file_getter", lambda source, revision: file)
    monkeypatch.setattr(folders, "require_kind", lambda file, source: dict.fromkeys(configs))
    monkeypatch.setattr(folders, "read_config", config)
    ours = families.SDXL | families.SDXL_LORA
    given = TrainConfig(model="some/sdxl", method="lora", mixed_precision="bf16", **ours)
    cuda = torch.device("cuda")
    for free in (7.0e9, 80e9):
        monkeypatch.setattr(memory, "available", lambda device, free=free: int(free))
        start.look_ahead(given, cuda)
    monkeypatch.setattr(memory, "available", lambda device: int(4e9))
    with pytest.raises(UserError) as refused:
        start.look_ahead(given, cuda)
    said = str(refused.value)
    assert said.startswith("some/sdxl is not downloaded: 4.00 GB of memory are free, and even with")
    assert "--prior_loss_weight 0" in said and "\n" not in said
    assert all(name.endswith("config.json") for name in read)
    start.look_ahead(given, torch.device("cpu"))


def test_what_rests_is_not_moved():
    """meta stands for a GPU."""
    sd = runs.model("sdxl")
    sd.to("meta", but=("text_encoder", "text_encoder_2"))
    places = {name: next(net.parameters()).device.type for name, net in sd.networks.items()}
    assert places == {
        **dict.fromkeys(("unet", "vae"), "meta"),
        **dict.fromkeys(("text_encoder", "text_encoder_2"), "cpu"),
    }
    assert sd.encode(["a dog"]).context.device.type == "meta"


def test_the_cases_of_sdxl():
    """Training at 1 + 1, on the meta device: 1024², no weights."""
    cases = settle.met(sdxl(), 1024, 1024, training=2)
    attention = {case.shape for case in cases if case.op == "attention"}
    shapes = ((10, 4096), (20, 1024))
    assert attention == {(2, h, n, keys, 64) for h, n in shapes for keys in (n, 77)}
    norms = {case.shape[1:3] for case in cases if case.op == "group_norm"}
    widths = {128: (320, 640, 960), 64: (320, 640, 960, 1280, 1920), 32: (640, 1280, 1920, 2560)}
    assert norms == {(c, side) for side, wide in widths.items() for c in wide}


def test_a_deep_transformers_blocks_are_computed_again_one_by_one():
    unet = runs.model("sdxl").unet
    parts = [part for m in unet.modules() for part in memory.computed_again(m)]
    kinds = [type(part).__name__ for part in parts]
    deep = [m for m in unet.modules() if len(getattr(m, "transformer_blocks", ())) > 1]
    assert kinds.count("TransformerBlock") == sum(len(m.transformer_blocks) for m in deep) > 0
    assert kinds.count("GroupNorm") == len(deep)
    assert not any(part in deep for part in parts)
