"""Grids are drawn with no more on the device at once than it takes."""

import types
from functools import partial

import pytest
import runs
import torch

from minibooth import train
from minibooth.device import graphs, memory
from minibooth.device.precision import Precision
from minibooth.training import start
from minibooth.training.events import Events
from minibooth.training.grids import Grids

CPU = torch.device("cpu")
MODES = ("gradient_checkpointing", "use_8bit_adam", "optimizer_in_backward")
SMALL = {"num_validation_images": 3, "validation_inference_steps": 2}


def grids(folder, **changes):
    events = Events(folder, wanted=False, done=0)
    return Grids.of(folder, runs.config(folder, **SMALL | changes), 32, events)


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
    precision = Precision("no", CPU)
    grids(tmp_path).draw(sd, [sd.vae, sd.text_encoder], precision)
    assert seen == {
        "text_encoder": {frozenset({"text_encoder"})},
        "unet": {frozenset({"text_encoder"})},
        "vae": {frozenset({"vae"})},
    }
    seen.clear()
    grids(tmp_path).draw(sd, [sd.vae], precision)  # the text encoder is trained: it stays
    assert seen["unet"] == {frozenset()} and seen["vae"] == {frozenset({"vae"})}
    assert not there


def test_the_pictures_are_those_of_generate(tmp_path):
    sd, grid = runs.model(), grids(tmp_path)
    drawn = grid.draw(sd, [sd.vae, sd.text_encoder], Precision("no", CPU))
    noises = [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    same = sd.generate(
        [prompt for prompt in grid.prompts for _ in range(3)],
        steps=2,
        latents=torch.stack(noises * len(grid.prompts)),
        batch_size=grid.batch_size,
    )
    assert [len(row) for row in drawn] == [3] * len(grid.prompts)
    assert pixels(drawn) == [image.tobytes() for image in same]


@pytest.mark.parametrize("network", ["unet", "vae"])
def test_a_grid_of_what_is_not_finite_is_black_and_says_why(network, tmp_path):
    sd = runs.model()
    last = sd.unet.conv_out if network == "unet" else sd.vae.decoder.conv_out
    with torch.no_grad():
        last.bias[0] = torch.inf
    with pytest.warns(UserWarning, match=f"the {network} gives NaN or infinity"):
        grid = grids(tmp_path, num_validation_images=1, validation_prompt=("sks",))
        drawn = grid.draw(sd, [sd.vae, sd.text_encoder], Precision("no", CPU))
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
    sd = runs.model()
    for mode in MODES:
        grid = grids(tmp_path, **{mode: True})
        grid.draw(sd, [sd.vae, sd.text_encoder], Precision("no", CPU))
        assert wanted.pop() is False and grid.batch_size == 4
    grid = grids(tmp_path)
    grid.draw(sd, [sd.vae, sd.text_encoder], Precision("no", CPU))
    assert wanted.pop() is True and grid.batch_size == 8


@pytest.mark.parametrize("short", [True, False])
def test_nor_is_one_for_the_class_images(short, tmp_path, wanted):
    config = runs.config(tmp_path, gradient_checkpointing=short)
    train.gather(start.set_up(config, runs.model(), CPU))
    assert wanted == [not short]


def test_a_graph_that_is_not_wanted_is_not_made_on_a_gpu_either():
    weight = types.SimpleNamespace(device=torch.device("cuda"))
    with graphs.captured_unet(
        types.SimpleNamespace(conv_in=types.SimpleNamespace(weight=weight)), False
    ):
        pass  # would fail: this UNet has no forward
