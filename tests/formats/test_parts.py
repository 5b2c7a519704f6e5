"""Another VAE, and parts that do not fit together."""

import json

import diffusers
import peers
import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_files import (
    TEXT_FILE,
    UNET_FILE,
    VAE_FILE,
    assert_same,
    assert_same_state,
    copy,
    four_dimensional,
    old_attention,
    rewrite,
    single,
)

import minibooth
from minibooth.common.errors import UserError

# ---- another VAE ---------------------------------------------------------------------------------


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


# ---- what does not fit ---------------------------------------------------------------------------


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
