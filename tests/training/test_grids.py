"""Grids are drawn with no more on the device at once than it takes."""

import types
from functools import partial

import pytest
import runs
import torch

from minibooth.device import graphs, memory
from minibooth.device.precision import Precision
from minibooth.training import grids, prepare, start

CPU = torch.device("cpu")
MODES = ("gradient_checkpointing", "use_8bit_adam", "optimizer_in_backward")
SMALL = {"num_validation_images": 3, "validation_inference_steps": 2}


def run_of(folder, sd, idle=("vae", "text_encoder"), **changes):
    """What grids are drawn of: a run without all that only its training needs."""
    config, idle = runs.config(folder, **SMALL | changes), [sd.networks[name] for name in idle]
    precision, on_passes = Precision("no", CPU), lambda n: None
    named = {"config": config, "sd": sd, "idle": idle, "precision": precision, "device": CPU}
    return types.SimpleNamespace(
        **named, resolution=32, by_turns=False, on_passes=on_passes, second=None
    )


def pixels(rows):
    return [image.tobytes() for row in rows for image in row]


def test_the_text_encoder_is_there_while_the_unet_draws_and_the_vae_after_it(tmp_path, monkeypatch):
    sd, there = runs.model(), set()
    names = {network: name for name, network in sd.networks.items()}
    seen = {}

    class Visiting:
        def __init__(self, networks, device):
            self.networks = networks

        def __enter__(self):
            there.update(names[network] for network in self.networks)

        def __exit__(self, *_):
            there.difference_update(names[network] for network in self.networks)

    def watched(name, call, *inputs):
        seen.setdefault(name, set()).add(frozenset(there))
        return call(*inputs)

    monkeypatch.setattr(memory, "visiting", Visiting)
    for name, method in (("unet", "forward"), ("vae", "decode"), ("text_encoder", "forward")):
        network = sd.networks[name]
        call = partial(watched, name, getattr(network, method))
        monkeypatch.setattr(network, method, call)
    grids.draw(run_of(tmp_path, sd))
    assert seen == {
        "text_encoder": {frozenset({"text_encoder"})},
        "unet": {frozenset({"text_encoder"})},
        "vae": {frozenset({"vae"})},
    }
    seen.clear()
    grids.draw(run_of(tmp_path, sd, ["vae"]))  # the text encoder is trained: it stays
    assert seen["unet"] == {frozenset()} and seen["vae"] == {frozenset({"vae"})}
    assert not there


def test_the_pictures_are_those_of_generate(tmp_path):
    sd = runs.model()
    run = run_of(tmp_path, sd)
    drawn, prompts = grids.draw(run), run.config.grid_prompts
    noises = [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    same = sd.generate(
        [prompt for prompt in prompts for _ in range(3)],
        steps=2,
        latents=torch.stack(noises * len(prompts)),
        batch_size=run.config.grid_batch_size,
    )
    assert [len(row) for row in drawn] == [3] * len(prompts)
    assert pixels(drawn) == [image.tobytes() for image in same]


@pytest.mark.parametrize("network", ["unet", "vae"])
def test_a_grid_of_what_is_not_finite_is_black_and_says_why(network, tmp_path):
    sd = runs.model()
    last = sd.unet.conv_out if network == "unet" else sd.vae.decoder.conv_out
    with torch.no_grad():
        last.bias[0] = torch.inf
    with pytest.warns(UserWarning, match=f"the {network} gives NaN or infinity"):
        drawn = grids.draw(
            run_of(tmp_path, sd, num_validation_images=1, validation_prompt=("sks",))
        )
    assert {pixel for row in pixels(drawn) for pixel in row} == {0}


@pytest.fixture
def wanted(monkeypatch):
    """Whether a CUDA graph was asked for, each time that pictures were drawn."""
    asked, captured_unet = [], graphs.captured_unet

    def watched(unet, wanted=True):
        asked.append(wanted)
        return captured_unet(unet, wanted)

    monkeypatch.setattr(graphs, "captured_unet", watched)
    return asked


def test_where_memory_is_short_no_graph_is_recorded_and_fewer_are_drawn_at_once(tmp_path, wanted):
    sd, at_once = runs.model(), []
    generate = sd.generate
    sd.generate = lambda prompts, **more: at_once.append(len(prompts)) or generate(prompts, **more)
    for mode in MODES:
        grids.draw(run_of(tmp_path, sd, **{mode: True}))
        assert wanted.pop() is False and max(at_once) == 4
    grids.draw(run_of(tmp_path, sd))
    assert wanted.pop() is True and max(at_once) == 8


@pytest.mark.parametrize("short", [True, False])
def test_nor_is_one_for_the_class_images(short, tmp_path, wanted):
    config = runs.config(tmp_path, gradient_checkpointing=short)
    prepare.gather(start.Run(config, runs.model(), CPU))
    assert wanted == [not short]


def test_a_graph_that_is_not_wanted_is_not_made_on_a_gpu_either():
    weight = types.SimpleNamespace(device=torch.device("cuda"))
    with graphs.captured_unet(
        types.SimpleNamespace(conv_in=types.SimpleNamespace(weight=weight)), False
    ):
        pass  # would fail: this UNet has no forward
