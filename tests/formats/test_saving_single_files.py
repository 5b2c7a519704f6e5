"""Single files written: the public keys, shapes and dtypes."""

import diffusers
import peers
import pytest
import torch
from safetensors.torch import load_file
from weight_files import KINDS, assert_same, assert_same_state

import minibooth
from minibooth.common import files
from minibooth.formats import checkpoint, ldm, tensor_files
from minibooth.formats.public import SINGLE_FILE
from minibooth.schedule import Schedule
from minibooth.tokenizer import Tokenizer

# ---- saving single files -------------------------------------------------------------------------


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
    tensors = {
        n: checkpoint.skeleton(n, configs[n]).state_dict() for n in checkpoint.networks_of(configs)
    }
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


# ---- full size -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("width, keys, gigabytes", [(768, 1130, 2.13), (1024, 1214, 2.58)])
def test_full_size_single_files(width, keys, gigabytes, tmp_path):
    """Random fp16 weights of the public sizes: out, into diffusers, back, and as a foreign file."""
    noise = torch.randn(52_000_000, generator=torch.Generator().manual_seed(0)).half()
    configs = {name: dict(config) for name, config in SINGLE_FILE[width].items()}
    networks, offset = {}, 0
    for name in checkpoint.networks_of(configs):
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
        tokenizer=Tokenizer.from_folder(tmp_path / "tokenizer"),
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

    for name in (*checkpoint.networks_of(configs), "scheduler"):
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
