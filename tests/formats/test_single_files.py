"""LDM's single files, as they go round."""

import diffusers
import peers
import pytest
import torch
from safetensors.torch import load_file
from weight_files import KINDS, assert_same, assert_same_state, legacy, single, zipped

import minibooth
from minibooth.common.errors import UserError


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


def with_average(share=1):
    """Other weights as their EMA, as tools leave it that merge models; or a part of it."""

    def change(tensors):
        averages = {
            "model_ema." + key.removeprefix("model.").replace(".", ""): value + 1
            for key, value in tensors.items()
            if key.startswith("model.diffusion_model.")
        }
        assert (
            "model_ema.diffusion_modelinput_blocks11transformer_blocks0attn2to_kweight" in averages
        )
        kept = list(averages)[: int(share * len(averages))]
        return with_training_state(tensors | {key: averages[key] for key in kept})

    return change


def test_the_plain_weights_are_taken_as_from_single_file_takes_them(tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="--ema yes takes the EMA") as caught:
        sd = single(tmp_path, monkeypatch, "sd1", with_average())
    assert len(caught) == 1
    assert_same(sd, peers.model("sd1")[1])
    held = load_file(tmp_path / "single.safetensors")
    layers = {"layers_per_block": 2}
    theirs = diffusers.loaders.single_file_utils.convert_ldm_unet_checkpoint(held, layers)
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(sd.unet.state_dict()[key], theirs[key])


def test_a_whole_average_is_taken_where_it_is_asked_for(tmp_path, monkeypatch, no_warnings):
    sd, (_, pipe) = single(tmp_path, monkeypatch, "sd1", with_average(), ema=True), peers.model()
    plain = peers.tensors(pipe.unet)
    assert_same_state(sd.unet.state_dict(), {key: value + 1 for key, value in plain.items()})
    assert_same_state(sd.vae.state_dict(), peers.tensors(pipe.vae))


def test_half_an_average_is_never_mixed_in(tmp_path, monkeypatch, no_warnings):
    assert_same(single(tmp_path, monkeypatch, "sd1", with_average(0.5)), peers.model("sd1")[1])
    with pytest.raises(UserError, match=r"has \d+ of \d+ averaged weights"):
        minibooth.load(tmp_path / "single.safetensors", tokenizer=peers.model()[0], ema=True)


def test_a_folder_has_no_average(no_warnings):
    with pytest.raises(UserError, match="--ema"):
        minibooth.load(peers.model("sd1")[0], ema=True)


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
