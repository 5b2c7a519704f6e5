"""The upscaler that is shipped: its pictures beside the world's own, and the default run's."""

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import minibooth
from minibooth import toybox
from minibooth.common.pictures import to_pil
from minibooth.formats import hub
from minibooth.toybox import enlarged, pretrain_upscaler, world
from minibooth.training.settings import TrainConfig
from minibooth.upscaler import Upscaler, reduced


@pytest.fixture(scope="module")
def up():
    return minibooth.load("toybox-x4")


@pytest.fixture(scope="module")
def large():
    """(4, 3, 256, 256) in [0, 1] of scenes that are in no training set."""
    pictures = torch.from_numpy(pretrain_upscaler.held_out(256, 4))
    return pictures.permute(0, 3, 1, 2).float() / 255


def test_it_loads_by_its_name_and_is_small(up):
    assert isinstance(up, Upscaler) and up.schedule.prediction_type == "v_prediction"
    files = [f for f in (hub.toybox() / "x4").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 9.2e6


def test_edges_are_as_in_the_truth_and_colours_too(up, large):
    small = reduced(2 * large - 1) / 2 + 0.5
    made = up.upscale(small, [""] * len(small), noise_level=0, output="pt", **toybox.UPSCALING)
    bicubic = F.interpolate(small, 256, mode="bicubic").clamp(0, 1)

    def errors(x):
        edges = [(x - large).diff(dim=dim).abs().mean() for dim in (2, 3)]
        return sum(edges), F.avg_pool2d(x - large, 16).abs().mean()

    (edges, colours), (bicubic_edges, _) = errors(made), errors(bicubic)
    assert edges < 0.8 * bicubic_edges and colours < 0.01
    assert (made - large).abs().mean() < (bicubic - large).abs().mean()


def test_diffusers_enlarges_the_same_picture_with_it(up):
    pipe = diffusers.StableDiffusionUpscalePipeline.from_pretrained(hub.toybox() / "x4")
    pipe.set_progress_bar_config(disable=True)
    small = torch.from_numpy(np.asarray(world.render(world.RINGED.scenes[1])).copy())
    small = small.permute(2, 0, 1)[None, :, 16:48, 16:48] / 255
    g = torch.Generator().manual_seed(4)
    noise, latents = (torch.randn(1, n, 32, 32, generator=g) for n in (3, 4))
    how = {"noise_level": 20, "guidance_scale": 3.0, "latents": latents}
    ours = up.upscale(small, ["a dog"], steps=2, noise=noise, output="pt", **how)
    how |= {"num_inference_steps": 2, "generator": g.manual_seed(4), "output_type": "np"}
    theirs = pipe(["a dog"], image=2 * small - 1, **how).images
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() - theirs).max() < 5e-3


def test_the_default_runs_picture_has_every_prompt_before_and_after(large):
    """Four prompts, so two sheets: of each prompt the first picture, and below it the later one."""
    pictures = to_pil(F.avg_pool2d(2 * torch.cat([large, large.flip(3)]) - 1, 8))  # 8 of 32²
    config = SimpleNamespace(grid_prompts=["one", "two", "three", "four"], seed=0)
    run = SimpleNamespace(config=config, device=torch.device("cpu"))
    black = Image.new("RGB", (32, 32))
    before, after = ([[p, black] for p in half] for half in (pictures[:4], pictures[4:]))
    sheet = enlarged.before_after(run, before, after)
    assert 3 * 128 < sheet.width < 4 * 128 < sheet.height < 5.2 * 128
    at = [where(sheet, picture) for picture in pictures]
    rows = [[y for _, y in part] for part in (at[:3], at[3:4], at[4:7], at[7:])]
    assert all(max(ys) - min(ys) < 8 for ys in rows)
    (first, second), (third, fourth) = ((rows[i][0], rows[i + 2][0]) for i in (0, 1))
    assert first < second - 120 < third - 240 < fourth - 360
    assert [x for x, _ in at[:3]] == sorted(x for x, _ in at[:3])


def where(sheet, small):
    """(x, y) at which the sheet, seen coarsely, is most like this picture of 32²."""
    whole = torch.from_numpy(np.asarray(sheet.reduce(8), np.float32)).permute(2, 0, 1)[None]
    part = torch.from_numpy(np.asarray(small.reduce(2), np.float32)).permute(2, 0, 1)[None]
    squares = F.conv2d(whole**2, torch.ones_like(part)) - 2 * F.conv2d(whole, part)
    y, x = divmod(squares.argmin().item(), squares.shape[-1])
    return 8 * x, 8 * y


def test_training_it_takes_what_suits_it_unless_a_config_says():
    found = toybox.train_settings({"model": "toybox-x4", "instance_data_dir": "dog"})
    config = TrainConfig(model="toybox-x4", **found)
    assert config.base_model == "toybox" and config.max_train_steps == 200
    assert toybox.train_settings({"model": "toybox-x4", "config": "config.json"}) == {}
