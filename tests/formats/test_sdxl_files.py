"""SDXL as folders and single files, in and out, against diffusers and the published counts."""

import inspect
import json
import re
import shutil

import diffusers
import peers
import pytest
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from weight_files import assert_same_state, full_sdxl, legacy, one_line, rewrite

import minibooth
from minibooth.common.errors import UserError
from minibooth.formats import (
    checks,
    configs,
    folders,
    ldm,
    public,
    single_files,
    sources,
    vocabulary,
)
from minibooth.tokenizer import Tokenizer

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
TEXT_2 = "text_encoder_2/model.safetensors"


@pytest.fixture(scope="module")
def sd():
    """Only read by the tests."""
    return minibooth.load(peers.model("sdxl")[0])


def copy(tmp_path):
    folder, pipe = peers.model("sdxl")
    shutil.copytree(folder, tmp_path / "sdxl")
    return tmp_path / "sdxl", pipe


def edit(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(sd, pipe):
    assert list(sd.networks) == list(NETWORKS)
    for name in NETWORKS:
        assert_same_state(sd.networks[name].state_dict(), peers.tensors(getattr(pipe, name)))


def drawn(sd, pipe, steps=2, scale=5.0, like_ours=1.0):
    """What both draw from the same latents; diffusers multiplies its own by its first sigma."""
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    how = {"guidance_scale": scale, "negative_prompt": "a cat"}
    ours = sd.generate("a sks dog!", steps=steps, latents=latents, output="pt", **how)
    size = {"height": 32, "width": 32, "output_type": "pt"}
    theirs = pipe(
        "a sks dog!", num_inference_steps=steps, latents=latents * like_ours, **how, **size
    )
    return ours, theirs.images


# ---- folders -------------------------------------------------------------------------------------


def test_a_folder_out_loads_in_diffusers_without_a_word_and_draws_the_same(sd, tmp_path, capfd):
    assert_same(sd, peers.model("sdxl")[1])
    sd.save(tmp_path)
    capfd.readouterr()
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path)
    said = capfd.readouterr().err
    assert "expected" not in said and "arning" not in said, said
    theirs.set_progress_bar_config(disable=True)
    ours, want = drawn(sd, theirs)
    assert (ours - want).abs().max() < 2e-2
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is True and "safety_checker" not in index
    assert index["image_encoder"] == index["feature_extractor"] == [None, None]
    assert type(theirs.scheduler) is diffusers.EulerDiscreteScheduler
    keys = load_file(tmp_path / TEXT_2).keys()
    assert "text_projection.weight" in keys and "text_model.final_layer_norm.bias" in keys


def test_fp16_variants_bin_files_and_shards(tmp_path, no_warnings):
    folder, pipe = copy(tmp_path)
    unet = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    halves = {f"{i}.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for name, keys in halves.items():
        save_file({k: tensors[k] for k in keys}, folder / "unet" / name)
    index = {"weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    unet.unlink()
    legacy(load_file(folder / TEXT_2), folder / "text_encoder_2/pytorch_model.bin")
    (folder / TEXT_2).unlink()
    vae = folder / "vae/diffusion_pytorch_model.safetensors"
    rewrite(vae, lambda t: {k: v.half() for k, v in t.items()})
    vae.rename(folder / "vae/diffusion_pytorch_model.fp16.safetensors")
    edit(folder, "model_index.json", force_zeros_for_empty_prompt=False)
    sd = minibooth.load(folder, dtype=torch.float16)
    assert {p.dtype for p in sd.vae.parameters()} == {torch.float32}  # or it would give NaN
    assert not sd.zeros_for_empty
    for name in ("unet", "text_encoder_2"):
        state = peers.tensors(getattr(pipe, name))
        assert_same_state(sd.networks[name].state_dict(), {k: v.half() for k, v in state.items()})


def test_turbo_draws_in_one_step_what_diffusers_does(tmp_path):
    folder, _ = copy(tmp_path)
    kind = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    edit(folder, "scheduler/scheduler_config.json", **kind)
    edit(folder, "model_index.json", scheduler=["diffusers", kind["_class_name"]])
    sd, pipe = minibooth.load(folder), diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    of_noise = 1 / (1 - sd.schedule.alpha_bar[-1]).sqrt()  # σ² + 1 = σ² / (1 − ᾱ)
    ours, want = drawn(sd, pipe, steps=1, scale=0.0, like_ours=of_noise)
    assert (ours - want).abs().max() < 2e-2


def test_a_tokenizer_for_the_second_encoder_must_be_the_firsts(sd, tmp_path, no_warnings):
    folder, _ = copy(tmp_path)
    ids = sd.tokenizer(["a sks dog!"])
    vocab = json.loads((folder / "tokenizer_2/vocab.json").read_text())
    vocab["a</w>"], vocab["b</w>"] = vocab["b</w>"], vocab["a</w>"]
    (folder / "tokenizer_2/vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(UserError, match=r"tokenizer_2 has other vocab than .* --tokenizer"):
        minibooth.load(folder)
    plain = Tokenizer.from_folder(folder / "tokenizer")
    for given in (folder / "tokenizer", folder, plain):
        assert torch.equal(folders.read_tokenizer(given, sd.configs)(["a sks dog!"]), ids)
    shutil.rmtree(folder / "tokenizer_2")
    assert torch.equal(minibooth.load(folder).tokenizer(["a sks dog!"]), ids)


DISTILLED = {"transformer_layers_per_block": [1, [2, 2], [4, 4]]}
DISTILLED |= {"reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1]}
OTHER = {  # the file, what stands in it, what is said of it
    "refiner": ("model_index.json", {"requires_aesthetics_score": True}, "refiner, .* take stabil"),
    "SSD-1B": ("unet/config.json", DISTILLED, "is a distilled SDXL, .* take the model"),
    "no middle": ("unet/config.json", {"mid_block_type": "UNetMidBlock2D"}, "is a distilled SDXL"),
    "LCM": ("unet/config.json", {"time_cond_proj_dim": 256}, "1.x, 2.x and XL do not have"),
    "Playground": ("vae/config.json", {"latents_mean": [0.0] * 4}, "1.x, 2.x and XL do not have"),
    "no projection": ("text_encoder_2/config.json", {"architectures": None}, "has no projection"),
    "end": ("text_encoder_2/config.json", {"eos_token_id": "x"}, "has no token 'x' to end with"),
    "sizes": ("unet/config.json", {"addition_time_embed_dim": 14}, "numbers of text and sizes"),
    "one encoder": ("model_index.json", {"text_encoder_2": [None, None]}, "text 32, UNet 80"),
    "wide": ("unet/config.json", {"addition_time_embed_dim": 10**9}, "which cannot be"),
    "deep": ("unet/config.json", {"transformer_layers_per_block": [1, 1, 10**6]}, "cannot be"),
    "type": ("unet/config.json", {"addition_embed_type": "image"}, "1.x, 2.x and XL do not have"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_what_is_no_such_model_is_refused_in_one_line(kind, tmp_path):
    """Before any network is built."""
    name, changes, said = OTHER[kind]
    folder, _ = copy(tmp_path)
    edit(folder, name, **changes)
    with pytest.raises(UserError, match=said) as error:
        checks.check_fit(folder, sources.read(folder))
    one_line(error)


def test_an_sdxl_that_sees_more_is_named_and_not_drawn_with(tmp_path):
    folder, _ = copy(tmp_path)
    edit(folder, "unet/config.json", in_channels=9)
    wide = {"conv_in.weight": torch.zeros(32, 9, 3, 3)}
    rewrite(folder / "unet/diffusion_pytorch_model.safetensors", lambda t: t | wide)
    sd = minibooth.load(folder)
    with pytest.raises(UserError, match=r"wants more than noise and a prompt, .*inpainting"):
        sd.generate("a dog", steps=1)
    sd.save(tmp_path / "out")
    name = json.loads((tmp_path / "out/model_index.json").read_text())["_class_name"]
    assert name == "StableDiffusionXLInpaintPipeline" and hasattr(diffusers, name)
    assert hasattr(diffusers, "StableDiffusionXLInstructPix2PixPipeline")


# ---- the scheduler -------------------------------------------------------------------------------


def test_alpha_bar_ends_at_one_where_the_schedulers_class_does_not_look_at_the_entry():
    """SDXL's own says set_alpha_to_one false beside EulerDiscreteScheduler, which has no such
    setting. So do models of SD 1.x, which are read as ever."""
    looking = {
        kind.name
        for kind in KarrasDiffusionSchedulers
        if "set_alpha_to_one" in inspect.signature(getattr(diffusers, kind.name)).parameters
    }
    assert looking == looking & {*configs.READ_FINAL} and len(looking) >= 2

    def settled(kind, **networks):
        scheduler = {"_class_name": kind, "set_alpha_to_one": False, "steps_offset": 1}
        scheduler["clip_sample"] = False
        configs.settle({"scheduler": scheduler, "unet": {}} | networks)
        return scheduler["set_alpha_to_one"]

    for kind in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler"):
        assert settled(kind, text_encoder_2={}) is True and settled(kind) is False
    for kind in configs.READ_FINAL:
        assert hasattr(diffusers, kind) and settled(kind, text_encoder_2={}) is False


# ---- single files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(sd, tmp_path_factory):
    """A small SDXL as one file of ours, in fp32."""
    path = tmp_path_factory.mktemp("single") / "x.safetensors"
    sd.save_single_file(path, torch.float32)
    return path


def foreign(tmp_path, monkeypatch, single, change=lambda tensors: tensors):
    """The same with nothing in its header, read as if the public sizes were its own."""
    folder, _ = peers.model("sdxl")
    sizes = {name: json.loads((folder / name / "config.json").read_text()) for name in NETWORKS} | {
        "scheduler": public.SDXL_SCHEDULER
    }
    monkeypatch.setattr(single_files, "SINGLE_FILE", {80: sizes})
    path = tmp_path / "foreign.safetensors"
    save_file(change(load_file(single)), path)
    return minibooth.load(path, tokenizer=folder / "tokenizer")


def test_diffusers_reads_our_single_file(single):
    folder, pipe = peers.model("sdxl")
    theirs = diffusers.StableDiffusionXLPipeline.from_single_file(
        str(single), config=str(folder), local_files_only=True
    )
    for name in NETWORKS:
        assert_same_state(peers.tensors(getattr(theirs, name)), peers.tensors(getattr(pipe, name)))


def test_a_single_file_comes_back(sd, single, tmp_path, no_warnings):
    again = minibooth.load(single)
    assert_same(again, peers.model("sdxl")[1])
    assert again.configs == sd.configs and again.zeros_for_empty
    assert torch.equal(again.tokenizer(["a sks dog!"]), sd.tokenizer(["a sks dog!"]))
    with safe_open(single, "pt") as f:
        assert f.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    again.zeros_for_empty = False
    again.configs["scheduler"]["prediction_type"] = "v_prediction"
    again.save_single_file(tmp_path / "y.safetensors")
    tensors = load_file(tmp_path / "y.safetensors")
    assert "v_pred" in tensors and sum(v.dtype == torch.int64 for v in tensors.values()) == 1
    assert tensors[SECOND + "logit_scale"].dtype == torch.float16
    assert not single_files.read_single_file(tmp_path / "y.safetensors", None).zeros_for_empty


def test_a_foreign_single_file_is_read(single, tmp_path, monkeypatch, no_warnings):
    sd = foreign(tmp_path, monkeypatch, single, lambda t: t | {"denoiser.sigmas": torch.ones(9)})
    assert_same(sd, peers.model("sdxl")[1])
    assert sd.zeros_for_empty and sd.schedule.final_alpha_bar == 1
    assert sd.schedule.prediction_type == "epsilon"


WITHOUT = {  # what is left out, and what is said
    r"middle_block\.1\.": "is a distilled SDXL",
    r"conditioner\.embedders\.1\.": "holds one of SDXL's two text encoders",
    r"conditioner\.": "holds no text encoder",
    r"first_stage_model\.": "holds no VAE",
}


@pytest.mark.parametrize("left_out", WITHOUT)
def test_a_single_file_that_is_not_whole_says_so(left_out, single, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=WITHOUT[left_out]) as error:
        foreign(
            tmp_path,
            monkeypatch,
            single,
            lambda t: {k: v for k, v in t.items() if not re.search(left_out, k)},
        )
    one_line(error)


def test_the_refiner_is_named_by_its_file(tmp_path):
    tensors = {
        ldm.UNET + "label_emb.0.0.weight": torch.zeros(8, 2560),
        ldm.UNET + "input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3),
        ldm.UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, 1280),
        "conditioner.embedders.0.model.ln_final.weight": torch.zeros(1280),
    }
    save_file(tensors, tmp_path / "refiner.safetensors")
    with pytest.raises(UserError, match=r"is SDXL's refiner, .* take stabilityai/"):
        minibooth.load(tmp_path / "refiner.safetensors")


# Rows of the public file, and how many of its keys and numbers are whose.
COUNTS = {
    "unet": (1680, 2_567_463_684),
    "vae": (248, 83_653_863),
    "text_encoder": (196, 123_060_480),
    "text_encoder_2": (517, 694_659_840),
}
FIRST, SECOND = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
ROWS = {
    "model.diffusion_model.label_emb.0.0.weight": [1280, 2816],
    "model.diffusion_model.label_emb.0.2.bias": [1280],
    "model.diffusion_model.input_blocks.2.0.out_layers.3.weight": [320, 320, 3, 3],
    "model.diffusion_model.input_blocks.3.0.op.weight": [320, 320, 3, 3],
    "model.diffusion_model.input_blocks.4.1.proj_in.weight": [640, 640],
    "model.diffusion_model.input_blocks.5.1.transformer_blocks.1.attn2.to_k.weight": [640, 2048],
    "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.norm3.weight": [1280],
    "model.diffusion_model.middle_block.1.transformer_blocks.9.attn1.to_q.weight": [1280, 1280],
    "model.diffusion_model.output_blocks.0.1.transformer_blocks.9.ff.net.2.weight": [1280, 5120],
    "model.diffusion_model.output_blocks.2.2.conv.weight": [1280, 1280, 3, 3],
    "model.diffusion_model.output_blocks.5.2.conv.bias": [640],
    "model.diffusion_model.output_blocks.8.0.skip_connection.weight": [320, 640, 1, 1],
    "first_stage_model.decoder.mid.attn_1.q.weight": [512, 512, 1, 1],
    FIRST + "embeddings.position_ids": [1, 77],
    FIRST + "encoder.layers.11.mlp.fc1.weight": [3072, 768],
    SECOND + "token_embedding.weight": [49408, 1280],
    SECOND + "positional_embedding": [77, 1280],
    SECOND + "transformer.resblocks.31.attn.in_proj_weight": [3840, 1280],
    SECOND + "transformer.resblocks.31.mlp.c_proj.weight": [1280, 5120],
    SECOND + "text_projection": [1280, 1280],
    SECOND + "logit_scale": [],
}


def test_full_size_keys_and_shapes():
    public = configs.SINGLE_FILE[2048]
    assert configs.is_public_size(public)
    tensors = {name: network.state_dict() for name, network in full_sdxl().items()}
    found = {n: (len(t), sum(x.numel() for x in t.values())) for n, t in tensors.items()}
    assert found == COUNTS
    out = ldm.to_ldm(public, tensors)
    assert len(out) == 2515 == 1680 + 248 + 197 + 390
    assert {key: list(out[key].shape) for key in ROWS} == ROWS
    assert sum(key.startswith(FIRST) for key in out) == 197
    assert sum(key.startswith(SECOND) for key in out) == 390
    tokenizer = vocabulary.clip_tokenizer(public)
    assert tokenizer(["a dog!"])[0, :, -1].tolist() == [49407, 0]
