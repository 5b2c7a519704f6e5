"""The toybox's second stage: large pictures of the world, and the training of its upscaler."""

import random
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

import minibooth
from minibooth.common.pictures import as_floats
from minibooth.toybox import pretrain, pretrain_upscaler, world
from minibooth.upscaler import Upscaler


def test_a_large_picture_is_the_small_one_drawn_finer():
    """Averaged it is nearly that: of lines and shapes, none is thicker or elsewhere; in all styles
    and places."""
    r = random.Random("large")
    for i, place in enumerate(world.PLACES):
        style = (*world.STYLES, world.NEON)[i % 3]
        scene = world.random_scene(r, place=place, style=style)
        large = np.asarray(world.render(scene, 256), float).reshape(64, 4, 64, 4, 3)
        difference = np.abs(large.mean(axis=(1, 3)) - np.asarray(world.render(scene))) / 255
        assert difference.mean() < 0.009 and (difference > 0.3).mean() < 0.003, (place, style)
    assert world.render(scene, 128).size == (128, 128)


def test_rings_are_spots_with_holes_whose_lines_small_pictures_blur():
    """Pixels of the rings' own blue, by counting: a hole is .29 of a spot, its rim is mixed."""
    ringed = world.RINGED.scenes[0]
    spotted = replace(ringed, marks=replace(ringed.marks, pattern="spots"))
    share = {
        (kind, side): (pixels[..., 2] > pixels[..., 0] + 90).mean()
        for kind, scene in (("rings", ringed), ("spots", spotted))
        for side in (64, 256)
        for pixels in [
            np.asarray(world.render(scene, side), int)[128 * side // 256 : 200 * side // 256]
        ]
    }
    assert 0.6 < share["rings", 256] / share["spots", 256] < 0.71
    assert share["rings", 64] < 0.8 * share["rings", 256]
    training = [pretrain.scene(i, 0).marks.pattern for i in range(400)]
    assert "spots" in training and "rings" not in training


def test_crops_are_the_same_squares_of_all():
    pictures = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    g, rows = torch.Generator().manual_seed(0), torch.tensor([1, 0, 1, 1, 0])
    a, b = pretrain.crops([pictures, -pictures], rows, 4, g)
    assert a.shape == (5, 3, 4, 4) and torch.equal(a, -b)
    for crop, row in zip(a, rows, strict=True):
        assert crop[0, 0, 0] // 192 == row  # of its picture, and in one piece
        assert torch.equal(crop - crop[0, 0, 0], pictures[0, :, :4, :4])
    assert len({x[0, 0, 0].item() for x in a}) == 5


def test_a_stopped_training_goes_on_and_what_it_writes_is_an_upscaler(tmp_path, monkeypatch):
    """On four pictures of 64², and two to look at, which alone are rendered the second time."""
    for name, pixels in (("LARGE", 64), ("CROP", 8), ("UNET_CROP", 8)):
        monkeypatch.setattr(pretrain_upscaler, name, pixels)
    held_out = pretrain_upscaler.held_out
    monkeypatch.setattr(pretrain_upscaler, "held_out", lambda side: held_out(side, 2))
    monkeypatch.setattr(pretrain_upscaler, "UPSCALING", {"steps": 1, "guidance_scale": 1.0})
    where = {"output_dir": str(tmp_path / "x4"), "work_dir": str(tmp_path / "work")}
    few = {"pictures": 4, "vae_steps": 1, "steps": 1, "batch_size": 4, "device": "cpu"}
    config = pretrain_upscaler.UpscalerConfig(**where, **few)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain_upscaler, "train_unet", interrupted)
        pretrain_upscaler.pretrain(config)
    kept = torch.load(tmp_path / "work" / "pairs.pt", weights_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(world, "render", render_of_held_out(held_out(64, 2)))
        pretrain_upscaler.pretrain(config)
    up = minibooth.load(tmp_path / "x4")
    assert isinstance(up, Upscaler) and up.levels == 350
    with torch.no_grad():  # latents have a variance of 1 by the factor that diffusers takes
        x = as_floats(torch.from_numpy(np.load(tmp_path / "work" / "pictures.npy")))
        mean, std = (0.08333 * y for y in up.vae.encode(x))
        again = up.vae.decode(mean / 0.08333)
    torch.testing.assert_close(mean, kept["mean"].float(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(std, kept["std"].float(), rtol=0.02, atol=0.02)
    assert (mean.var() + std.square().mean()).item() == pytest.approx(1, abs=0.02)
    assert (again - x).abs().mean() < 0.1
    assert torch.load(tmp_path / "work" / "vae.pt", weights_only=True)["step"] == 1
    ours, theirs = both_enlarge(up, tmp_path / "x4")
    assert np.abs(ours - theirs).max() < 5e-3


def both_enlarge(up, folder):
    """A picture of noise, by us and by diffusers: it takes .08333 for the factor in any case."""
    pipe = diffusers.StableDiffusionUpscalePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(4)
    noise, latents = (torch.randn(1, n, 16, 16, generator=g) for n in (3, 4))
    small = torch.rand(1, 3, 16, 16)
    how = {"noise_level": 20, "guidance_scale": 3.0, "latents": latents}
    ours = up.upscale(small, ["a dog"], steps=2, noise=noise, output="pt", **how)
    how |= {"num_inference_steps": 2, "generator": g.manual_seed(4), "output_type": "np"}
    theirs = pipe(["a dog"], image=2 * small - 1, **how).images
    return ours.permute(0, 2, 3, 1).numpy(), theirs


def interrupted(*_):
    raise KeyboardInterrupt


def render_of_held_out(pictures):
    """Nothing but these is rendered again."""
    shown = iter([*pictures, *pictures])
    return lambda scene, side=64: next(shown)
