"""SDXL's defaults, where nothing else is said, and nobody else's."""

import json

import peers
import pytest
import runs
import torch
from safetensors.torch import save_file

from minibooth import sample, train
from minibooth.common import cli
from minibooth.evaluate.options import suitable_settings
from minibooth.formats import families
from minibooth.sample import SampleConfig
from minibooth.training.settings import TrainConfig

OF_ALL = {
    "num_class_images": 50,
    "class_sampler": "dpm++",
    "class_steps": 20,
    "sample_batch_size": 1,
    "class_guidance_scale": 5.0,
    "validation_guidance_scale": 5.0,
}


def trained_with(*given):
    return cli.parse(TrainConfig, "x", "", list(given), defaults=train.defaults)


def differences(config, but=()):
    """From a TrainConfig's own defaults."""
    changed = {k: v for k, v in vars(config).items() if v != getattr(TrainConfig, k)}
    return {k: v for k, v in changed.items() if k not in but}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """SDXL as a folder, as a file, and others."""
    folder = tmp_path_factory.mktemp("files")
    key = "conditioner.embedders.1.model.logit_scale"
    save_file({key: torch.ones(1)}, folder / "xl.safetensors")
    torch.save({"state_dict": {key: torch.ones(1)}}, folder / "xl.ckpt")
    save_file({"conditioner.embedders.0.model.x": torch.ones(1)}, folder / "turbo.safetensors")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "model_index.json").write_text("{")
    return folder


@pytest.mark.parametrize("file", ["xl.safetensors", "xl.ckpt", None])
def test_sdxl_has_defaults_of_its_own(sources, file):
    model = str(sources / file) if file else str(peers.model("sdxl")[0])
    assert differences(trained_with("--model", model), but=["model"]) == OF_ALL
    lora = trained_with("--model", model, "--method", "lora", "--class_steps", "30")
    assert differences(lora, but=["model", "method"]) == OF_ALL | {
        "class_steps": 30,  # was given
        "rank": 16,
        "learning_rate": 1e-4,
        "text_encoder_learning_rate": 5e-6,
    }
    drawn = cli.parse(SampleConfig, "x", "", ["--model", model], defaults=families.draw_settings)
    assert drawn.guidance_scale == 5.0
    assert suitable_settings({"model": model}) == {"guidance_scale": 5.0}


@pytest.mark.parametrize("name", ["sd1", "turbo.safetensors", "damaged", "missing", "a/b c", None])
def test_others_keep_the_programs_own(sources, name):
    model = str(peers.model()[0] if name == "sd1" else sources / str(name)) if name else None
    given = ["--model", model] if name else ["--instance_data_dir", "x"]
    assert not differences(trained_with(*given), but=["model", "instance_data_dir"])
    assert families.draw_settings({"model": model}) == {}


def test_on_the_hub_a_small_file_says_it(monkeypatch):
    asked = []
    index = peers.model("sdxl")[0] / "model_index.json"

    def file_getter(source, revision):
        return lambda name: asked.append((source, revision, name)) or index

    monkeypatch.setattr(families, "file_getter", file_getter)
    found = families.train_settings({"model": "some/one", "revision": "v2", "method": "lora"})
    assert found["rank"] == 16 and asked == [("some/one", "v2", "model_index.json")]


def test_the_help_tells_them(monkeypatch, capsys):
    for module in (train, sample):
        status, out, _ = runs.program(monkeypatch, capsys, module, "--help")
        assert status == 0 and "SDXL's" in out
    told = " ".join(families.TOLD.split())
    assert all(f"{name} {value}" in told for name, value in OF_ALL.items())
    assert "rank 16, text_encoder_learning_rate 5e-06" in told


def test_a_config_keeps_what_it_says(tmp_path):
    """Of another run of SDXL, and one written by hand."""
    model = str(peers.model("sdxl")[0])
    path = tmp_path / "config.json"
    cli.write_config(path, TrainConfig(model=model, num_class_images=7))
    again = trained_with("--config", str(path))
    assert (again.num_class_images, again.class_steps) == (7, 50)
    path.write_text(json.dumps({"model": model, "num_class_images": 7}))
    again = trained_with("--config", str(path))
    assert (again.num_class_images, again.class_steps) == (7, 20)


@pytest.mark.parametrize("side, warned", [(16, True), (24, False), (64, False)])
def test_half_of_the_models_size_is_warned_of(side, warned, recwarn):
    """SDXL's is 1024²; that of the test's model is 32²."""
    train.start.check_model(runs.model("sdxl"), side, (2,))
    said = [str(w.message) for w in recwarn if "--resolution" in str(w.message)]
    assert len(said) == warned
    if warned:
        assert said[0].startswith("--resolution 16: this model draws pictures of 32²")
