"""Grids are drawn with no more on the device at once than it takes."""

from functools import partial

import runs
import torch

from minibooth.training import graphs, memory
from minibooth.training.events import Events
from minibooth.training.grids import Grids
from minibooth.training.optimizer import Precision

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


def test_where_memory_is_short_no_graph_is_recorded_and_fewer_are_drawn_at_once(
    tmp_path, monkeypatch
):
    entered = []
    captured_unet = graphs.captured_unet
    monkeypatch.setattr(
        graphs, "captured_unet", lambda unet: entered.append(1) or captured_unet(unet)
    )
    sd = runs.model()
    for mode in MODES:
        grid = grids(tmp_path, **{mode: True})
        grid.draw(sd, [sd.vae, sd.text_encoder], Precision("no", CPU))
        assert not entered and grid.batch_size == 4
    grid = grids(tmp_path)
    grid.draw(sd, [sd.vae, sd.text_encoder], Precision("no", CPU))
    assert entered and grid.batch_size == 8
