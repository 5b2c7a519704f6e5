"""The hub: exact names, its cache, and what can be wrong."""

import json
import os
import shutil
import socket
import time

import huggingface_hub
import peers
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file
from weight_files import (
    TEXT_FILE,
    UNET_FILE,
    VAE_FILE,
    assert_same,
    assert_same_state,
    copy,
    one_line,
    rewrite,
    zipped,
)

import minibooth
from minibooth.common.errors import UserError

CONFIGS = [
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
]
FETCHED = [
    *CONFIGS,
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    UNET_FILE,
    VAE_FILE,
    TEXT_FILE,
    "README.md",
]


ASKED_FOR = ["LICENSE", "LICENSE.md", "LICENSE.txt", "LICENSE-MODEL"]


class FakeHub:
    """hf_hub_download from a local folder; keeps the names it was asked for."""

    def __init__(self, monkeypatch, tmp_path, folder, error=None):
        self.asked, self.folder, self.error = [], folder, error
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "no-cache"))

    def download(self, repo_id, name, revision=None):
        self.asked.append(name)
        if self.error:
            raise self.error
        if not (self.folder / name).is_file():
            raise response_error(hub_errors.EntryNotFoundError, "404")
        return str(self.folder / name)


def response_error(kind, message):
    """These errors want the HTTP response they come from, which no test has."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


def test_a_model_is_downloaded_by_exact_names(tmp_path, monkeypatch):
    folder, pipe = copy("sd1", tmp_path)
    (folder / "README.md").write_text("---\nlicense: openrail\n---\n")
    (folder / "safety_checker").mkdir()
    for name in (UNET_FILE, VAE_FILE, TEXT_FILE):
        shutil.copy(folder / name, folder / name.replace(".safetensors", ".fp16.safetensors"))
        shutil.copy(folder / name, folder / name.replace(".safetensors", ".non_ema.safetensors"))
    fake = FakeHub(monkeypatch, tmp_path, folder)
    sd = minibooth.load("someone/some-model")
    assert_same(sd, pipe)
    assert fake.asked == FETCHED + ASKED_FOR
    assert sd.licence == "openrail"


def test_of_sdxl_both_text_encoders_are_downloaded(tmp_path, monkeypatch):
    fake = FakeHub(monkeypatch, tmp_path, peers.model("sdxl")[0])
    minibooth.load("someone/some-model")
    second = [name for name in fake.asked if "_2/" in name]
    files = ["vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"]
    assert second == [
        "text_encoder_2/config.json",
        *(f"tokenizer_2/{name}" for name in files),
        "text_encoder_2/model.safetensors",
    ]


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "StableDiffusion3Pipeline",
            "is Stable Diffusion 3: only Stable Diffusion 1.x, 2.x and XL can be used here",
        ),
        ("StableDiffusionXLControlNetPipeline", "is a ControlNet: only"),
        ("FluxPipeline", "is Flux: only"),
        ("StableDiffusionLatentUpscalePipeline", "is an upscaler of latents: only"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_its_first_file(name, said, tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    fake = FakeHub(monkeypatch, tmp_path, tmp_path)
    for source in ("someone/some-model", tmp_path):
        with pytest.raises(UserError, match=said) as error:
            minibooth.load(source)
        one_line(error)
    assert fake.asked == ["model_index.json"]


@pytest.mark.parametrize(
    "name, said",
    [
        ("ControlNetModel", "is a ControlNet: only"),
        ("AutoencoderKL", "is a VAE: give it as --vae"),
        ("UNet2DConditionModel", "is a UNet alone: give the folder that it is in"),
        ("FluxTransformer2DModel", "is Flux: only"),
    ],
)
def test_a_part_that_is_given_as_a_model_is_named(name, said, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    FakeHub(monkeypatch, tmp_path, tmp_path)
    for source in ("someone/some-model", tmp_path):
        with pytest.raises(UserError, match=said):
            minibooth.load(source)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_no_weights_are_downloaded_of_a_model_that_a_config_rules_out(part, tmp_path, monkeypatch):
    folder, _ = copy("sd1", tmp_path)
    path = folder / part / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"act_fn": "mish", "hidden_act": "relu"}))
    fake = FakeHub(monkeypatch, tmp_path, folder)
    with pytest.raises(UserError, match=f"the {part}'s config says .* another kind of model"):
        minibooth.load("someone/some-model")
    assert fake.asked == CONFIGS


def test_nor_where_the_vae_that_is_to_replace_its_own_is_missing(tmp_path, monkeypatch):
    folder, _ = copy("sd1", tmp_path)
    fake = FakeHub(monkeypatch, tmp_path, folder)
    with pytest.raises(UserError, match="no such folder or file"):
        minibooth.load("someone/some-model", vae=tmp_path / "none.safetensors")
    assert not set(fake.asked) & {UNET_FILE, VAE_FILE, TEXT_FILE}


def test_older_repositories_with_bin_files_only(tmp_path, monkeypatch):
    folder, pipe = copy("sd1", tmp_path)
    zipped(load_file(folder / TEXT_FILE), folder / "text_encoder/pytorch_model.bin")
    (folder / TEXT_FILE).unlink()
    fake = FakeHub(monkeypatch, tmp_path, folder)
    assert_same(minibooth.load("someone/some-model"), pipe)
    assert [n for n in fake.asked if n.startswith("text_encoder/")][-1].endswith("model.bin")


def test_a_vae_of_its_own_repository_is_downloaded_by_exact_names(tmp_path, monkeypatch, other_vae):
    other_vae.save_pretrained(tmp_path / "vae-repo")
    fake = FakeHub(monkeypatch, tmp_path, tmp_path / "vae-repo")
    sd = minibooth.load(peers.model("sd1")[0], vae="someone/sd-vae")
    assert_same_state(sd.vae.state_dict(), peers.tensors(other_vae))
    names = ["vae/config.json", "config.json", "diffusion_pytorch_model.safetensors"]
    assert fake.asked == names


def test_a_vae_given_instead_is_downloaded_instead(tmp_path, monkeypatch, other_vae):
    folder, _ = copy("sd1", tmp_path)
    other_vae.save_pretrained(tmp_path / "vae")
    fake = FakeHub(monkeypatch, tmp_path, folder)
    sd = minibooth.load("someone/some-model", vae=tmp_path / "vae")
    assert_same_state(sd.vae.state_dict(), peers.tensors(other_vae))
    assert [n for n in fake.asked if n.startswith("vae/")] == ["vae/config.json"]


@pytest.mark.parametrize("name", ["dog.safetensors", "dog.SafeTensors", "dog.sft", "dog.ckpt"])
def test_a_file_that_is_missing_is_not_looked_for_on_the_hub(name):
    """The fixture no_network refuses every download."""
    with pytest.raises(UserError, match="no such folder or file") as error:
        minibooth.load(f"models/{name}")
    one_line(error)


@pytest.mark.parametrize(
    "error, words",
    [
        (hub_errors.RepositoryNotFoundError, "neither a folder here nor a public model"),
        (hub_errors.GatedRepoError, "gated: accept its licence"),
        (hub_errors.RevisionNotFoundError, "no revision 'v9'"),
        (hub_errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (hub_errors.HfHubHTTPError, "cannot download model_index.json of some/model: 500"),
        (OSError, "cannot download model_index.json of some/model: 500"),
        (TimeoutError, "cannot download model_index.json of some/model: 500"),
        (hub_errors.EntryNotFoundError, "no model_index.json"),
    ],
)
def test_what_can_be_wrong_with_a_repository(error, words, tmp_path, monkeypatch):
    FakeHub(monkeypatch, tmp_path, tmp_path, response_error(error, "500\nTraceback …"))
    with pytest.raises(UserError, match=words) as caught:
        minibooth.load("some/model", revision="v9")
    one_line(caught)


def test_a_cached_model_needs_no_network(tmp_path, monkeypatch, no_warnings):
    folder, pipe = peers.model("sd1")
    repo = tmp_path / "cache" / "models--someone--some-model"
    snapshot = repo / "snapshots" / "0123abc"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("0123abc")
    (repo / "refs/old").write_text("9876fed")
    for i, file in enumerate(f for f in folder.rglob("*") if f.is_file()):
        blob, link = repo / "blobs" / f"blob{i}", snapshot / file.relative_to(folder)
        blob.parent.mkdir(exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (snapshot / "README.md").write_text("---\nlicense: openrail\n---\n")

    shutil.copytree(snapshot, repo / "snapshots" / "9876fed")
    bias = torch.arange(4.0)
    rewrite(repo / "snapshots" / "9876fed" / UNET_FILE, lambda t: t | {"conv_out.bias": bias})

    asked = []

    def no_route(*args, **kwargs):
        asked.append(args)
        raise OSError("no network in this test")

    monkeypatch.undo()  # the real hf_hub_download, but no sockets
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, no_route)
    monkeypatch.setattr(socket.socket, "connect", no_route)

    started = time.monotonic()
    sd = minibooth.load("someone/some-model")
    assert_same(sd, pipe)
    assert sd.licence == "openrail"
    old = minibooth.load("someone/some-model", revision="old")
    assert torch.equal(old.unet.conv_out.bias, bias)
    assert_same_state(
        minibooth.load(folder, vae="someone/some-model").vae.state_dict(), peers.tensors(pipe.vae)
    )
    assert asked == [] and time.monotonic() - started < 10
    sd.save(tmp_path / "out")
    assert_same(minibooth.load(tmp_path / "out"), pipe)
