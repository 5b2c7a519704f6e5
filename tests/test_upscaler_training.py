"""Training an upscaler: small random models against the formula and diffusers' networks."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import peers
import pytest
import runs
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import rel

from minibooth import UserError, load, sample, train
from minibooth.common import cli
from minibooth.common.pictures import as_floats, to_pil
from minibooth.device.precision import Precision
from minibooth.explain import __main__ as microscope
from minibooth.sample import SampleConfig
from minibooth.train import TrainConfig
from minibooth.training import enlarging, grids, photos, prepare, start
from minibooth.training.data import pick, rng
from minibooth.training.start import Run
from minibooth.upscaler import reduced

CPU = torch.device("cpu")
ALPHA_BAR = (1 - torch.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2).cumprod(0)
UNET = "unet/diffusion_pytorch_model.safetensors"


def config(folder, **changes) -> TrainConfig:
    return runs.config(folder, kind="x4", **changes)


@pytest.fixture(scope="module")
def models():
    return {"x4": runs.model("x4"), "sd1": runs.model("sd1")}


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    """A run at its first step: batch 2 with a prior term, λ = 0.7; and its grid then."""
    shown = {"num_validation_images": 1, "validation_prompt": ("a cat",)}
    base = {"class_steps": 3, "class_guidance_scale": 4.0, "class_sampler": "dpm++"}
    how = {"train_batch_size": 2, "prior_loss_weight": 0.7, **shown, **base}
    wanted = config(tmp_path_factory.mktemp("x4"), **how)
    run = Run(wanted, runs.model("x4"), CPU)
    return run, *prepare.gather(run), grids.draw(run)


# ---- values ------------------------------------------------------------------------------------


def mixed(of, a, b):
    share = ALPHA_BAR[of].view(-1, 1, 1, 1)
    return share.sqrt() * a + (1 - share).sqrt() * b


def smaller(images):
    """By Pillow, each channel in floating point: a fourth of each side."""
    height, width = (side // 4 for side in images.shape[2:])
    planes = [Image.fromarray(x.numpy()) for x in images.flatten(0, 1)]
    planes = [np.array(x.resize((width, height), Image.Resampling.BICUBIC)) for x in planes]
    return torch.from_numpy(np.stack(planes)).view(-1, 3, height, width).clamp(-1, 1)


def drawn_images(run) -> torch.Tensor:
    [images] = start.images_of(run)
    pixels = np.stack([np.asarray(Image.open(file)) for file in images.drawn])
    return as_floats(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def test_loss_and_gradients_are_the_formula(gathered):
    """Written anew: pairs by Pillow, VAE, text and UNet by diffusers. Only the draws are asked of
    minibooth, and which crops a batch has."""
    run, batches, loss, *_ = gathered
    pipe, n, found = peers.upscaler(), 3, {}
    pipe.tokenizer = peers.model("x4")[1].tokenizer
    for name, latents, images, prompt in (
        ("instance", batches.instance, run.photos.images, "a sks dog"),
        ("class", batches.prior, drawn_images(run), "a dog"),
    ):
        x = images[pick(latents, 0, name, n, 2)]
        g, of_small = rng(0, name, "noise", n), rng(0, name, "small", n)
        with torch.no_grad():
            z = pipe.vae.encode(x).latent_dist
            z0 = 0.08333 * (z.mean + z.std * torch.randn(z.mean.shape, generator=g))
            c, _ = pipe.encode_prompt([prompt] * 2, CPU, 1, False)
        eps, t = torch.randn(z0.shape, generator=g), torch.randint(1000, (2,), generator=g)
        eta = torch.randn(2, 3, 8, 8, generator=of_small)
        s = torch.randint(0, 20 + 1, (2,), generator=of_small)
        seen = torch.cat([mixed(t, z0, eps), mixed(s, smaller(x), eta)], dim=1)
        answer = pipe.unet(seen, t, c, class_labels=s).sample
        found[name] = F.mse_loss(answer, mixed(t, eps, -z0))  # v
    wanted = found["instance"] + 0.7 * found["class"]
    wanted.backward()
    run.sd.unet.requires_grad_(True)
    result = loss(batches.draw(n))
    result.loss.backward()
    assert rel(result.loss_instance, found["instance"]) < 1e-4
    assert rel(result.loss_prior, found["class"]) < 1e-4
    assert rel(result.loss, wanted) < 1e-4
    peers.same_gradients(run.sd.unet, pipe.unet)


def test_levels_are_uniform_and_the_noises_apart(gathered):
    _, batches, *_ = gathered
    drawn = [batches.draw(n) for n in range(300)]
    for term in ("instance", "prior"):
        of_term = [getattr(batch, term) for batch in drawn]
        s, t = (torch.cat([getattr(x, name) for x in of_term]).double() for name in ("level", "t"))
        counts = torch.bincount(s.long(), minlength=21)
        assert len(counts) == 21 and counts.min() > 0
        assert ((counts - 600 / 21) ** 2 / (600 / 21)).sum() < 45.3  # χ² of 20: one in a thousand
        assert torch.corrcoef(torch.stack([s, t]))[0, 1].abs() < 0.15
        eta = torch.cat([x.eta for x in of_term])
        assert eta.std() == pytest.approx(1, abs=0.02)
        assert (eta * torch.cat([x.eps for x in of_term])[:, :3]).mean().abs() < 0.02
    a, b = drawn[0].instance, drawn[0].prior
    assert not torch.equal(a.eta, b.eta)
    assert torch.equal(batches.draw(0).instance.eta, a.eta)


def test_class_images_are_what_the_base_draws_and_the_upscaler_enlarges(gathered):
    run, up, base = gathered[0], runs.model("x4"), runs.model("half")
    how = {"steps": 3, "guidance_scale": 4.0, "sampler": "dpm++", "seed": 0}
    drawn = base.generate(["a dog"] * 3, **how)
    assert {image.size for image in drawn} == {(16, 16)}
    pieces, corners = [], []
    for i, image in enumerate(drawn):  # somewhere in it, by the seed of the image
        places = {(x, y): image.crop((x, y, x + 8, y + 8)) for x in range(9) for y in range(9)}
        g = rng(i, "class image", "piece")
        corners.append(tuple(int(torch.randint(9, (), generator=g)) for _ in "xy"))
        pieces.append(places[corners[-1]])
    assert len(set(corners)) > 1
    wanted = up.upscale(pieces, ["a dog"] * 3, steps=2, guidance_scale=7.5, noise_level=20)
    [images] = start.images_of(run)
    assert not images.missing and len(images.drawn) == 3
    for file, image in zip(images.drawn, wanted, strict=True):
        with Image.open(file) as there:
            assert there.tobytes() == image.tobytes() and there.size == (32, 32)


def test_a_grid_enlarges_what_photographs_and_drawings_were_reduced_to(gathered):
    run, *_, rows = gathered
    crops = enlarging.large(run)
    how = {"steps": 3, "guidance_scale": 4.0, "sampler": "dpm++", "seed": 0}
    [drawn] = runs.model("half").generate("a cat", output="pt", **how)
    given = torch.cat([reduced(crops) / 2 + 0.5, drawn[None, :, 4:12, 4:12]])
    up, prompts = runs.model("x4"), ["a sks dog"] * 3 + ["a cat"]
    wanted = up.upscale(given, prompts, steps=2, guidance_scale=7.5, noise_level=20, batch_size=8)
    assert enlarging.labels(run) == prompts
    assert [len(row) for row in rows] == [1] * 4
    for [image], other in zip(rows, wanted, strict=True):
        assert np.abs(np.subtract(image, other, dtype=int)).max() <= 1  # drawings are rounded
    table = enlarging.between(run, [row * 2 for row in rows])
    assert [len(row) for row in table] == [4, 4, 4, 3]  # a drawing has no photograph
    assert table[1][-1].tobytes() == to_pil(crops)[1].tobytes()
    assert (
        table[3][0].tobytes()
        == to_pil(2 * drawn[None, :, 4:12, 4:12] - 1)[0]
        .resize((32, 32), Image.Resampling.NEAREST)
        .tobytes()
    )


def test_photographs_are_cut_side_by_side_and_not_enlarged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 75, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).resize((300, 160)).save(tmp_path / "b.png")
    found = photos.load_photos(tmp_path, 32, detail=64)
    corners = [(0, 0), (0, 22), (0, 43), (8, 0), (8, 22), (8, 43)]
    assert [tuple(s[2:4]) for s in found.sizes[:6].tolist()] == corners
    for (top, left), crop in zip(corners, found.pixels, strict=False):
        assert np.array_equal(crop.permute(1, 2, 0), pixels[top : top + 32, left : left + 32])
    assert found.photo.tolist() == [0] * 6 + [1] * 8  # 120 × 64: four by two
    middle = photos.load_photos(tmp_path, 32, center_crop=True, detail=64)
    assert np.array_equal(middle.pixels[0].permute(1, 2, 0), pixels[:32, 17:49])
    assert middle.photo.tolist() == [0] * 4 + [1] * 4
    with pytest.raises(UserError, match=r"1 of 2 pictures are smaller.*\(a.png is 75×40\)"):
        photos.load_photos(tmp_path, 48, detail=64)


# ---- runs --------------------------------------------------------------------------------------


def rows_of(folder: Path) -> list[dict]:
    with open(folder / "loss.csv") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def test_a_run_goes_on_bit_for_bit_and_only_as_it_was(tmp_path, models):
    """From its own config.json, in which levels stand that were not given."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    same = {"max_train_steps": 2, "snr_gamma": 5.0}
    train.train(config(whole, **same))
    train.train(config(out, **same | {"max_train_steps": 1}))
    again = ["--config", str(out / "config.json"), "--output_dir", str(out)]
    again += ["--max_train_steps", "2", "--resume_from_checkpoint", "latest"]
    read = cli.parse(TrainConfig, "train", "", again)
    assert read.noise_level == (0, 20)
    train.train(read)
    assert rows_of(whole) == rows_of(out)
    assert (whole / UNET).read_bytes() == (out / UNET).read_bytes()
    assert load(out).levels == 350
    last = ["--max_train_steps", "3", "--noise_level", "0", "30"]
    for more, said in (
        ([], r"noise_level was \[0, 20\] and is \[0, 30\]"),
        (["--base_model", str(peers.model("sd2")[0])], "the base model changed"),
        (["--validation_inference_steps", "3"], r"class images' enlarging was \[2, 7.5\] and"),
    ):
        with pytest.raises(UserError, match=said):
            Run(cli.parse(TrainConfig, "train", "", [*again, *last, *more]), models["x4"], CPU)


def test_a_lora_is_trained_saved_and_enlarged_with(tmp_path, capsys):
    """On pictures of the user's own for the class, without a base model."""
    own = tmp_path / "own"
    own.mkdir()
    for i, file in enumerate(sorted(runs.photographs(2).iterdir())):
        (own / f"dog-{i}.png").write_bytes(file.read_bytes())
    changes = {"method": "lora", "base_model": None, "class_data_dir": str(own)}
    changes |= {"num_validation_images": 1, "train_text_encoder": True, "noise_level": (5, 9)}
    train.train(config(tmp_path / "out", learning_rate=0.1, max_train_steps=1, **changes))
    said = capsys.readouterr().out
    assert "class images: 3 of your own" in said and "--upscaler_lora" in said
    assert "--noise_level 9" in said and "num_class_images 0" in said
    assert "tags: [image-to-image" in (tmp_path / "out" / "README.md").read_text()
    with Image.open(tmp_path / "out" / "before_after.png") as table:
        assert table.width > 4 * 128
    Image.new("RGB", (8, 8), (200, 10, 30)).save(tmp_path / "small.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "small.png").rename(tmp_path / "in" / "small.png")
    with_it = {"upscaler": str(peers.model("x4")[0]), "images": str(tmp_path / "in")}
    with_it |= {"upscaler_steps": 2, "device": "cpu"}
    plain, tuned = (
        sample.sample(SampleConfig(**with_it, output_dir=str(tmp_path / name), upscaler_lora=lora))
        for name, lora in (("plain", ()), ("tuned", (str(tmp_path / "out"),)))
    )
    assert plain[0].read_bytes() != tuned[0].read_bytes()


def test_what_saves_memory_and_time_changes_the_loss_by_rounding_alone(gathered):
    _, batches, loss, *_ = gathered
    for changes, rounding in (
        ({"gradient_checkpointing": True}, 1e-6),
        ({"precision": Precision("bf16", CPU)}, 0.03),
    ):
        other = replace(loss, **changes)(batches.draw(5))
        assert rel(other.per_sample, loss(batches.draw(5)).per_sample) < rounding


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"noise_level": (20, 0)}, "--noise_level 20 0: give the lowest, from 0 up, then"),
        ({"noise_level": (-1, 3)}, "--noise_level -1 3: give the lowest"),
        ({"noise_level": (1, 2, 3)}, "--noise_level 1 2 3: give the lowest"),
        ({"noise_level": (0, 350)}, "this upscaler knows 0 to 349, not 350"),
        ({"base_model": str(peers.model("x4")[0])}, "is an upscaler, which draws nothing"),
        ({"model": "sd1"}, "--base_model is for training an upscaler, and --model is none"),
        (
            {"model": "sd1", "base_model": None, "noise_level": (0, 9)},
            "--noise_level is for training an upscaler, and --model is none",
        ),
        ({"resolution": 40}, "--resolution must be a multiple of 16 for an upscaler"),
        ({"resolution": 128}, "draws 16², which is smaller than what becomes --resolution 128"),
        ({"resolution": 64, "instance_data_dir": str(runs.photographs())}, "smaller than 64²"),
        ({"resolution": 64, "class_data_dir": str(runs.photographs())}, "3 of 3 .* than 64²"),
        ({"base_model": None}, "cannot draw class images from words, and .* holds none: give --ba"),
        ({"explain": True}, "--explain shows a model that draws"),
        ({"method": "hypernetwork"}, "--method hypernetwork: an upscaler is trained whole or by"),
        (
            {
                "method": "textual_inversion",
                "placeholder_token": "<x>",
                "initializer_token": "dog",
                "instance_prompt": "a <x>",
            },
            "--method textual_inversion: an upscaler is trained whole or by --method lora",
        ),
    ],
)
def test_what_is_refused_in_one_line(tmp_path, models, monkeypatch, changes, said):
    """And before the base model draws."""
    monkeypatch.setattr(enlarging, "base_draws", lambda *_: pytest.fail("drawn before"))
    given = {"class_data_dir": str(tmp_path / "class")} | changes
    with pytest.raises(UserError, match=said) as e:
        train.train(config(tmp_path / "out", **given), models[given.get("model", "x4")])
    assert "\n" not in str(e.value) and not (tmp_path / "out" / "loss.csv").exists()


def test_the_command_line_takes_two_levels_and_the_microscope_no_upscaler(tmp_path):
    assert cli.parse(TrainConfig, "train", "", ["--noise-level", "3", "9"]).noise_level == (3, 9)
    for wrong in (["3"], ["3", "x"], ["3", "9", "12"]):
        with pytest.raises(UserError):
            cli.parse(TrainConfig, "train", "", ["--noise_level", *wrong])
    with pytest.raises(UserError, match="is an upscaler, which draws nothing by itself"):
        microscope.explain(config(tmp_path / "out"))
