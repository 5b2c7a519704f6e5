"""Drawing and enlarging in one go, and what is refused."""

import peers
import pytest
import runs
import torch
from PIL import Image

from minibooth import classify, convert, load, lora, sample
from minibooth.common.errors import UserError
from minibooth.formats import adapters
from minibooth.sample import SampleConfig

QUICK = {
    "steps": 2,
    "upscaler_steps": 2,
    "num_images": 1,
    "device": "cpu",
    "height": 8,
    "width": 16,
}


def settings(tmp_path, **changes) -> dict:
    models = {"model": str(peers.model()[0]), "upscaler": str(peers.model("x4")[0])}
    return models | QUICK | {"prompt": ("a sks dog",), "output_dir": str(tmp_path)} | changes


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory):
    """A LoRA of the upscaler that changes its pictures."""
    up = load(peers.model("x4")[0])
    made = lora.create(up.unet, rank=2, alpha=2.0)
    for a in made.values():
        torch.nn.init.normal_(a.B, generator=torch.Generator().manual_seed(1))
    return adapters.write_diffusers_lora(
        tmp_path_factory.mktemp("lora"), up.networks, {"unet": made}
    )


def test_both_pictures_are_kept_and_the_large_one_is_of_the_small_one(tmp_path, lora_file):
    small, large = sample.sample(SampleConfig(**settings(tmp_path, seed=3, noise_level=7)))
    assert [small.name, large.name] == ["a-sks-dog-3.png", "a-sks-dog-3-x4.png"]
    with Image.open(small) as a, Image.open(large) as b:
        assert (a.size, b.size) == ((16, 8), (64, 32))
        assert b.info["noise_level"] == "7" and b.info["prompt"] == "a sks dog"
        up = load(peers.model("x4")[0])
        [wanted] = up.upscale([a], ["a sks dog"], noise_level=7, steps=2, seed=3)
        assert wanted.tobytes() == b.tobytes()
    tuned = settings(tmp_path, seed=3, noise_level=7, upscaler_lora=(str(lora_file),))
    _, other = sample.sample(SampleConfig(**tuned))
    assert other.name == "a-sks-dog-3-x4-2.png"  # another picture, which overwrites none


def test_pictures_that_exist_are_enlarged(tmp_path):
    (tmp_path / "in").mkdir()
    for name, size in (("a.png", (8, 8)), ("b.jpg", (8, 8)), ("b.png", (12, 8))):
        Image.new("RGB", size, (200, 10, 30)).save(tmp_path / "in" / name)
    given = settings(tmp_path / "out", model=None, prompt=(), images=str(tmp_path / "in"))
    written = sample.sample(SampleConfig(**given))
    assert [f.name for f in written] == ["a-x4.png", "b.jpg-x4.png", "b.png-x4.png"]
    assert [Image.open(f).size for f in written] == [(32, 32), (32, 32), (48, 32)]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"upscaler": str(peers.model()[0])}, "is no upscaler"),
        ({"model": str(peers.model("x4")[0])}, "is an upscaler, which draws nothing by itself"),
        ({"noise_level": 350}, "give one from 0 to 349"),
        ({"height": 10, "width": 12}, "multiples of 4"),
        ({"height": 2048, "width": 2048}, "would become one of 8192×8192"),
        ({"upscaler": None, "upscaler_lora": ("x.safetensors",)}, "goes with --upscaler"),
        ({"upscaler_lora": ("x.safetensors",)}, "there is no such file"),
        ({"images": "x"}, "no --model beside it"),
        ({"images": "x", "model": None, "prompt": ("a", "b")}, "under one --prompt"),
        ({"upscaler_steps": 0}, "must be at least 1"),
        ({"upscaler_steps": 1001}, "give a number from 1 to 1000"),
    ],
)
def test_what_is_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said) as e:
        sample.sample(SampleConfig(**settings(tmp_path / "out", **changes)))
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_a_picture_that_is_no_multiple_is_named(tmp_path):
    Image.new("RGB", (10, 8)).save(tmp_path / "odd.png")
    given = settings(tmp_path / "out", model=None, images=str(tmp_path))
    with pytest.raises(UserError, match=r"odd: a picture of 10×8 pixels: .* multiples of 4"):
        sample.sample(SampleConfig(**given))


def test_a_lora_of_the_base_is_not_the_upscalers(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "FAMILIES", {32: "Stable Diffusion 2.x"})
    base = load(peers.model("sd2")[0])
    made = {"unet": lora.create(base.unet, rank=2, alpha=2.0)}
    file = adapters.write_diffusers_lora(tmp_path / "lora", base.networks, made)
    with pytest.raises(
        UserError, match=r"is for Stable Diffusion 2.x, and this model is an upscaler"
    ):
        sample.sample(SampleConfig(**settings(tmp_path / "out", upscaler_lora=(str(file),))))


def test_programs_of_the_base_refuse_an_upscaler(tmp_path):
    x4 = str(peers.model("x4")[0])
    with pytest.raises(UserError, match="an upscaler"):
        photos = str(runs.photographs())
        classify.classify(classify.ClassifyConfig(model=x4, photos=photos, device="cpu"))
    base = str(peers.model("sd2")[0])
    given = {
        "model": x4,
        "base": base,
        "extract_lora": 1,
        "output": str(tmp_path / "x.safetensors"),
    }
    with pytest.raises(UserError, match="--base is no base of --model"):
        convert.convert(convert.ConvertConfig(**given))


def test_convert_takes_an_upscaler(tmp_path):
    x4, file = str(peers.model("x4")[0]), str(tmp_path / "x4.safetensors")
    convert.convert(convert.ConvertConfig(model=x4, output=file, dtype="fp32"))
    convert.convert(convert.ConvertConfig(model=file, output=str(tmp_path / "folder")))
    ours, theirs = load(x4).tensors(), load(tmp_path / "folder").tensors()
    assert all(torch.equal(x, theirs[n][k]) for n, of_it in ours.items() for k, x in of_it.items())
