"""Models as weight files, and what is the same when they are read back."""

import functools
import json
import shutil

import peers
import torch
from safetensors.torch import load_file, save_file

import minibooth
from minibooth.formats import checkpoint, configs, single_files

KINDS = ("sd1", "sd2", "inpaint")
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"
TEXT_CONFIG = "text_encoder/config.json"


def assert_same(sd, pipe, dtype=None):
    """Every tensor of the three networks equals the peer's, and none is missing."""
    for ours, theirs in ((sd.unet, pipe.unet), (sd.vae, pipe.vae)):
        assert_same_state(ours.state_dict(), peers.tensors(theirs), dtype)
    assert_same_state(sd.text_encoder.state_dict(), peers.tensors(pipe.text_encoder), dtype)


def assert_same_state(ours, theirs, dtype=None):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        value = value if dtype is None else value.to(dtype).float()
        assert ours[key].shape == value.shape, key
        assert torch.equal(ours[key], value), key


def copy(kind, tmp_path):
    folder, pipe = peers.model(kind)
    shutil.copytree(folder, tmp_path / kind)
    return tmp_path / kind, pipe


def rewrite(path, change):
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path)


def single(tmp_path, monkeypatch, kind="sd1", change=lambda t: t, pipe=None, **loading):
    """Write a single file as the original code would, load it as if of the public sizes."""
    folder, cached = peers.model(kind)
    pipe = pipe or cached
    configs = {
        name: json.loads((folder / name / "config.json").read_text())
        for name in ("unet", "vae", "text_encoder")
    }
    configs["text_encoder"]["num_hidden_layers"] = pipe.text_encoder.config.num_hidden_layers
    configs["unet"]["in_channels"] = 4  # inpainting models have to be told apart by their weights
    scheduler = dict(pipe.scheduler.config, prediction_type="epsilon")
    monkeypatch.setattr(single_files, "SINGLE_FILE", {32: {**configs, "scheduler": scheduler}})
    path = tmp_path / "single.safetensors"
    save_file({k: v.contiguous() for k, v in change(peers.ldm(pipe)).items()}, path)
    return minibooth.load(path, tokenizer=folder / "tokenizer", **loading)


def old_attention(matrix):
    def change(tensors):
        out = {}
        for key, value in tensors.items():
            for new, old in (
                ("to_q", "query"),
                ("to_k", "key"),
                ("to_v", "value"),
                ("to_out.0", "proj_attn"),
            ):
                key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
            out[key] = value
        assert sum(".proj_attn." in k for k in out) == 4
        return matrix(out)

    return change


def four_dimensional(tensors):
    return {k: v[:, :, None, None] if v.ndim == 2 else v for k, v in tensors.items()}


def zipped(value, path):
    torch.save(value, path)


def legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 700
    return text


@functools.cache
def full_sdxl():
    """The public SDXL's networks, without weights; only looked at."""
    public = configs.SINGLE_FILE[2048]
    return {n: checkpoint.skeleton(n, public[n]) for n in checkpoint.networks_of(public)}
