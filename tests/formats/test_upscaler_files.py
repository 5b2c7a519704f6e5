"""An upscaler's files: diffusers' folder and LDM's single file, in and out; what cannot be one."""

import json
import shutil

import diffusers
import numpy as np
import peers
import pytest
import torch
from tiny import randn

import minibooth
from minibooth.common.errors import UserError
from minibooth.formats import ldm, single_files
from minibooth.formats.checkpoint import skeleton
from minibooth.formats.public import X4
from minibooth.formats.tensor_files import read_tensors, write_safetensors
from minibooth.upscaler import Upscaler


@pytest.fixture(scope="module")
def folder():
    return peers.model("x4")[0]


def changed(folder, out, file, **entries):
    """A copy of the folder in which a JSON file says something else; None removes an entry."""
    shutil.copytree(folder, out)
    config = json.loads((out / file).read_text()) | entries
    (out / file).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return out


def same_weights(a, b) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return all(torch.equal(x, theirs[n][k]) for n, of_it in ours.items() for k, x in of_it.items())


def test_the_public_models_keys_and_sizes():
    unet, vae, text = (skeleton(name, X4[name]) for name in ("unet", "vae", "text_encoder"))
    counts = [sum(p.numel() for p in net.parameters()) for net in (unet, vae, text)]
    assert counts == [473_398_020, 55_325_927, 340_387_840]
    assert [len(net.state_dict()) for net in (unet, vae, text)] == [687, 204, 372]
    theirs = {
        ldm.unet_key(key, X4["unet"]).removeprefix(ldm.UNET): x
        for key, x in unet.state_dict().items()
    }
    assert theirs["label_emb.weight"].shape == (1000, 1024)
    assert theirs["input_blocks.0.0.weight"].shape == (256, 7, 3, 3)
    assert theirs["input_blocks.4.1.transformer_blocks.0.attn1.to_k.weight"].shape == (512, 1024)
    assert theirs["middle_block.1.transformer_blocks.0.attn1.to_k.weight"].shape == (1024, 1024)
    assert (
        "output_blocks.8.2.conv.weight" in theirs and "input_blocks.1.1.norm.weight" not in theirs
    )
    assert "output_blocks.11.2.conv.weight" not in theirs


def test_a_folder_out_is_diffusers_and_draws_the_same(folder, tmp_path):
    up = minibooth.load(folder)
    up.save(tmp_path / "out")
    again = minibooth.load(tmp_path / "out")
    assert type(up) is type(again) is Upscaler and same_weights(up, again)
    assert up.levels == again.levels == 350
    assert up.small_schedule.alpha_bar[20] == pytest.approx(1 - 0.0519**2, abs=1e-5)
    pipe = diffusers.StableDiffusionUpscalePipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.max_noise_level == 350
    picture, g = randn(1, 3, 8, 8).sigmoid(), torch.Generator().manual_seed(4)
    noise, latents = (torch.randn(1, n, 8, 8, generator=g) for n in (3, 4))
    how = {"noise_level": 20, "guidance_scale": 3.0, "latents": latents}
    ours = again.upscale(picture, ["a sks dog"], steps=3, noise=noise, output="pt", **how)
    g = torch.Generator().manual_seed(4)
    how |= {"num_inference_steps": 3, "generator": g, "output_type": "np"}
    theirs = pipe(["a sks dog"], image=2 * picture - 1, **how).images
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() - theirs).max() < 2e-2


def test_a_single_file_out_and_in(folder, tmp_path):
    up = minibooth.load(folder)
    up.levels = 300
    up.save_single_file(tmp_path / "x4.safetensors", torch.float32)
    again = minibooth.load(tmp_path / "x4.safetensors")
    assert type(again) is Upscaler and same_weights(up, again) and again.levels == 300
    assert again.configs == up.configs
    assert torch.equal(again.small_schedule.alpha_bar, up.small_schedule.alpha_bar)


def test_a_single_file_of_another_program(folder, tmp_path, monkeypatch, recwarn):
    """It has the original's keys and nothing that says what it is; small here, so the sizes that
    are known by heart are made small, too."""
    up = minibooth.load(folder)
    up.save_single_file(tmp_path / "ours.safetensors", torch.float32)
    tensors, _ = read_tensors(tmp_path / "ours.safetensors")
    tensors = {key: x.clone() for key, x in tensors.items()}
    for key in ("betas", "alphas_cumprod"):
        tensors[f"low_scale_model.{key}"] = torch.zeros(3)
    tensors["cond_stage_model.model.transformer.resblocks.23.ln_1.weight"] = torch.zeros(3)
    write_safetensors(tmp_path / "theirs.safetensors", tensors, None)
    monkeypatch.setattr(single_files, "X4", up.configs)
    again = minibooth.load(tmp_path / "theirs.safetensors", tokenizer=folder / "tokenizer")
    assert type(again) is Upscaler and same_weights(up, again) and again.levels == 350
    assert again.schedule.prediction_type == "v_prediction" and not recwarn.list


def test_an_old_copys_vae_says_nothing_of_its_factor(folder, tmp_path):
    old = changed(folder, tmp_path / "old", "vae/config.json", scaling_factor=None)
    assert minibooth.load(old).vae.scaling_factor == 0.08333
    old = changed(folder, tmp_path / "older", "vae/config.json", scaling_factor=0.18215)
    with pytest.warns(UserWarning, match="scaling_factor 0.18215 → 0.08333"):
        assert minibooth.load(old).vae.scaling_factor == 0.08333
    own = changed(folder, tmp_path / "own", "vae/config.json", scaling_factor=0.5)
    assert minibooth.load(own).vae.scaling_factor == 0.5


@pytest.mark.parametrize(
    "file, entries, said",
    [
        ("unet/config.json", {"num_class_embeds": 100}, "class_embedding.weight is"),
        ("unet/config.json", {"num_class_embeds": None}, "knows 0 noise levels"),
        ("unet/config.json", {"only_cross_attention": [True] * 3}, "which cannot be"),
        ("unet/config.json", {"only_cross_attention": True}, "which cannot be"),
        ("unet/config.json", {"num_class_embeds": "many"}, "which cannot be"),
        ("model_index.json", {"low_res_scheduler": None}, "knows 0 noise levels"),
        ("model_index.json", {"max_noise_level": "x"}, "levels of its 'x'"),
        ("model_index.json", {"max_noise_level": 2000}, "knows 1000 noise levels of its 2000"),
        ("model_index.json", {"_class_name": "StableDiffusionLatentUpscalePipeline"}, "of latents"),
        ("low_res_scheduler/scheduler_config.json", {"num_train_timesteps": "x"}, "cannot be"),
        ("low_res_scheduler/scheduler_config.json", {"beta_schedule": "x"}, "not supported"),
    ],
)
def test_what_cannot_be_an_upscaler(folder, tmp_path, file, entries, said):
    bad = changed(folder, tmp_path / "bad", file, **entries)
    with pytest.raises(UserError, match=said) as e:
        minibooth.load(bad)
    assert "\n" not in str(e.value)
