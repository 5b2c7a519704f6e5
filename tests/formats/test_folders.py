"""diffusers' folders, old and new, and that they are mapped and not copied."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import diffusers
import peers
import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_files import (
    KINDS,
    TEXT_FILE,
    UNET_FILE,
    VAE_FILE,
    assert_same,
    copy,
    four_dimensional,
    legacy,
    old_attention,
    rewrite,
    zipped,
)

import minibooth
from minibooth.common.errors import UserError
from minibooth.training import start

# ---- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_loads_with_every_tensor(kind, no_warnings):
    folder, pipe = peers.model(kind)
    sd = minibooth.load(folder)
    assert_same(sd, pipe)
    assert sd.schedule.prediction_type == ("v_prediction" if kind == "sd2" else "epsilon")
    assert torch.equal(sd.schedule.alpha_bar, pipe.scheduler.alphas_cumprod)
    assert not sd.unet.training


VARIANTS = {
    "VAE attention query/key/value/proj_attn": (VAE_FILE, old_attention(lambda t: t)),
    "the same, 4-D": (VAE_FILE, old_attention(four_dimensional)),
    "VAE attention to_q/…, 4-D": (VAE_FILE, four_dimensional),
    "text keys with text_model.": (
        TEXT_FILE,
        lambda t: {"text_model." + k.removeprefix("text_model."): v for k, v in t.items()},
    ),
    "text keys without text_model.": (
        TEXT_FILE,
        lambda t: {k.removeprefix("text_model."): v for k, v in t.items()},
    ),
    "position_ids, int": (
        TEXT_FILE,
        lambda t: t | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
    ),
    "position_ids, float, bare": (
        TEXT_FILE,
        lambda t: t | {"embeddings.position_ids": torch.arange(77.0)[None]},
    ),
    "proj_in linear, proj_out convolution": (
        UNET_FILE,
        lambda t: {
            k: v.flatten(1)
            if k.endswith("proj_in.weight")
            else v.reshape(*v.shape[:2], 1, 1)
            if k.endswith("proj_out.weight")
            else v
            for k, v in t.items()
        },
    ),
    "proj_in convolution, proj_out linear": (
        UNET_FILE,
        lambda t: {
            k: v.flatten(1)
            if k.endswith("proj_out.weight")
            else v.reshape(*v.shape[:2], 1, 1)
            if k.endswith("proj_in.weight")
            else v
            for k, v in t.items()
        },
    ),
}


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_in_a_folder(variant, kind, tmp_path, no_warnings):
    folder, pipe = copy(kind, tmp_path)
    name, change = VARIANTS[variant]
    before = load_file(folder / name)
    rewrite(folder / name, change)
    after = load_file(folder / name)
    assert (
        before.keys() != after.keys()
        or any(before[k].shape != after[k].shape for k in after)
        or variant.startswith("text keys")
    )
    assert_same(minibooth.load(folder), pipe)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_as_asked(dtype, tmp_path):
    folder, pipe = copy("sd1", tmp_path)
    for name in (UNET_FILE, VAE_FILE, TEXT_FILE):
        rewrite(folder / name, lambda t: {k: v.to(dtype) for k, v in t.items()})
    sd = minibooth.load(folder)
    assert sd.unet.conv_in.weight.dtype == torch.float32
    assert_same(sd, pipe, dtype)
    assert minibooth.load(folder, dtype=dtype).unet.conv_in.weight.dtype == dtype


def test_which_of_several_files_is_taken(tmp_path):
    """The plain name first, then fp16, then non_ema; safetensors before pickles."""
    folder, pipe = copy("sd1", tmp_path)
    (folder / UNET_FILE).unlink()
    plain = peers.tensors(pipe.unet)
    order = ["safetensors", "fp16.safetensors", "non_ema.safetensors", "bin", "fp16.bin"]
    order += ["non_ema.bin"]
    for number, ending in reversed(list(enumerate(order))):
        path = folder / "unet" / f"diffusion_pytorch_model.{ending}"
        marked = plain | {"conv_in.bias": torch.full_like(plain["conv_in.bias"], number)}
        save_file(marked, path) if ending.endswith("safetensors") else torch.save(marked, path)
        assert minibooth.load(folder).unet.conv_in.bias.unique().tolist() == [number]


@pytest.mark.parametrize("write", [zipped, legacy])
def test_bin_files_in_a_folder(write, tmp_path, no_warnings):
    folder, pipe = copy("sd1", tmp_path)
    for name in (UNET_FILE, VAE_FILE):
        write(load_file(folder / name), (folder / name).with_suffix(".bin"))
        (folder / name).unlink()
    text = load_file(folder / TEXT_FILE)
    write(text, folder / "text_encoder" / "pytorch_model.fp16.bin")
    (folder / TEXT_FILE).unlink()
    assert_same(minibooth.load(folder), pipe)


def test_weights_in_several_files_with_an_index(tmp_path, no_warnings):
    """As save_pretrained writes what is larger than 10 GB, or than it is told."""
    folder, pipe = copy("sd1", tmp_path)
    (folder / UNET_FILE).unlink()
    pipe.unet.save_pretrained(folder / "unet", max_shard_size="500KB")
    parts = list((folder / "unet").glob("*.safetensors"))
    assert len(parts) > 1 and not (folder / UNET_FILE).exists()
    text = load_file(folder / TEXT_FILE)
    (folder / TEXT_FILE).unlink()
    for name in ("model", "pytorch_model"):  # as transformers calls them, and did
        ending = "safetensors" if name == "model" else "bin"
        keys = sorted(text)
        half = {f"{name}-1-of-2.{ending}": keys[::2], f"{name}-2-of-2.{ending}": keys[1::2]}
        for part, own in half.items():
            write, held = save_file if name == "model" else torch.save, {k: text[k] for k in own}
            write(held, folder / "text_encoder" / part)
        index = folder / "text_encoder" / f"{name}.{ending}.index.json"
        index.write_text(json.dumps({"weight_map": {k: f for f in half for k in half[f]}}))
        assert_same(minibooth.load(folder), pipe)
        index.unlink()
    parts[0].unlink()
    with pytest.raises(UserError, match=f"names {parts[0].name}, which is missing"):
        minibooth.load(folder)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for wrong in ({}, {"weight_map": {"a": "../../secret"}}, {"weight_map": {"a": "/etc/passwd"}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="does not say which files the weights are in"):
            minibooth.load(folder)


def test_a_folder_with_a_single_file_names_it(tmp_path):
    (tmp_path / "dog.ckpt").touch()
    with pytest.raises(UserError, match=f"give a file in it, {tmp_path / 'dog.ckpt'}"):
        minibooth.load(tmp_path)


CLASSES = {5: "StableDiffusionDepth2Img", 8: "StableDiffusionInstructPix2Pix"}


@pytest.mark.parametrize("channels", CLASSES)
def test_a_unet_that_sees_more_is_written_under_its_own_class_and_not_drawn_with(
    channels, tmp_path
):
    folder, _ = copy("sd1", tmp_path)
    config = json.loads((folder / "unet/config.json").read_text()) | {"in_channels": channels}
    (folder / "unet/config.json").write_text(json.dumps(config))
    wide = torch.zeros(32, channels, 3, 3)
    rewrite(folder / UNET_FILE, lambda t: t | {"conv_in.weight": wide})
    sd = minibooth.load(folder)
    with pytest.raises(UserError, match=r"wants more than noise and a prompt, (a depth|the pict)"):
        sd.generate("a dog", steps=1)
    with pytest.raises(UserError, match=r"wants more than .*cannot be trained here"):
        start.check_model(sd, 32, ())
    sd.save(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == f"{CLASSES[channels]}Pipeline"
    assert hasattr(diffusers, index["_class_name"])


def test_a_scheduler_of_flax_is_written_under_torchs_name(tmp_path):
    folder, _ = copy("sd1", tmp_path)
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(path.read_text().replace('"DDIMScheduler"', '"FlaxDDIMScheduler"'))
    minibooth.load(folder).save(tmp_path / "out")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    written = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert written["_class_name"] == "DDIMScheduler" == next(iter(written.values()))


# ---- memory --------------------------------------------------------------------------------------


MEMORY = """
import json, re, sys, torch, minibooth
from pathlib import Path
from minibooth.formats import checkpoint, tensor_files
from minibooth.schedule import Schedule

def anonymous():  # MB of memory that is not a mapped file
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3

folder = Path(sys.argv[1])
config = json.loads((folder / "unet/config.json").read_text())
config["block_out_channels"] = [256, 512]
(folder / "unet/config.json").write_text(json.dumps(config))
path = folder / "unet/diffusion_pytorch_model.safetensors"
path.unlink()
path.parent.joinpath("big").unlink(missing_ok=True)
shapes = {k: v.shape for k, v in checkpoint.skeleton("unet", config).state_dict().items()}
noise = torch.rand(max(s.numel() for s in shapes.values()))
tensors = {k: noise[: s.numel()].view(s) for k, s in shapes.items()}
size = sum(s.numel() for s in shapes.values()) * 4 / 1e6
tensor_files.write_safetensors(path, tensors)
minibooth.load(folder)  # whatever is allocated once

def cost(source, **options):
    before = anonymous()
    sd = minibooth.load(source, **options)
    return (anonymous() - before) / size, sd

figures = {"size": size}
figures["folder"], sd = cost(folder)
sd.save_single_file(folder / "single.safetensors", torch.float32)
figures["single"], _ = cost(folder / "single.safetensors", tokenizer=folder)
path.unlink()
torch.save(sd.unet.state_dict(), path.with_suffix(".bin"))
figures["bin"], _ = cost(folder)
del sd
path.with_suffix(".bin").unlink()
tensor_files.write_safetensors(path, tensors, torch.float16)
figures["half"], _ = cost(folder)
print(json.dumps(figures))
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux' /proc")
def test_loading_maps_the_file_instead_of_copying_it(tmp_path):
    """Shares of the model's size in anonymous memory: near 0 if mapped, 1 per copy."""
    folder, _ = copy("sd1", tmp_path)
    script = tmp_path / "memory.py"
    script.write_text(textwrap.dedent(MEMORY))
    root = pathlib.Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels")])
    done = subprocess.run(
        [sys.executable, script, folder],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert 100 < figures["size"] < 800
    assert figures["folder"] < 0.2 and figures["single"] < 0.2 and figures["bin"] < 0.2, figures
    assert 0.9 < figures["half"] < 1.3, (
        figures
    )  # fp16 on disk has to become fp32: one copy, not two
