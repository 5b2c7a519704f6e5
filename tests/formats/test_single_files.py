"""LDM's single files, as they go round."""

import diffusers
import peers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from weight_files import KINDS, assert_same, assert_same_state, legacy, one_line, single, zipped

import minibooth
from minibooth.common.errors import UserError
from minibooth.formats import single_files, tensor_files


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_loads_with_every_tensor(kind, tmp_path, monkeypatch, no_warnings):
    assert_same(single(tmp_path, monkeypatch, kind), peers.model(kind)[1])


SCHEDULE_BUFFERS = ["betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar"]


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


def test_the_plain_weights_are_taken_as_from_single_file_does_or_the_average_if_asked(
    tmp_path, monkeypatch
):
    with pytest.warns(UserWarning, match="--ema yes takes the EMA") as caught:
        sd = single(tmp_path, monkeypatch, "sd1", with_average())
    assert len(caught) == 1
    assert_same(sd, peers.model("sd1")[1])
    held = load_file(tmp_path / "single.safetensors")
    layers = {"layers_per_block": 2}
    theirs = diffusers.loaders.single_file_utils.convert_ldm_unet_checkpoint(held, layers)
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(sd.unet.state_dict()[key], theirs[key])

    folder, pipe = peers.model("sd1")
    sd = minibooth.load(tmp_path / "single.safetensors", tokenizer=folder, ema=True)
    plain = peers.tensors(pipe.unet)
    assert_same_state(sd.unet.state_dict(), {key: value + 1 for key, value in plain.items()})
    assert_same_state(sd.vae.state_dict(), peers.tensors(pipe.vae))


def test_half_an_average_is_never_mixed_in(tmp_path, no_warnings):
    tensors = with_average(0.5)(peers.ldm(peers.model("sd1")[1]))
    names = [key for key in tensors if key.startswith("model.diffusion_model.")]
    kept = {name: tensors[name] for name in names}
    single_files.choose_average(tmp_path, names, tensors, ema=False)
    assert all(tensors[name] is kept[name] for name in names)
    with pytest.raises(UserError, match=r"has \d+ of \d+ averaged weights"):
        single_files.choose_average(tmp_path, names, tensors, ema=True)


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


EMPTY = torch.empty(0)
SAYS = [
    ({"v_pred": EMPTY}, {}, "v_prediction"),  # A1111, ComfyUI
    ({"v_pred": EMPTY}, {"modelspec.prediction_type": "epsilon"}, "v_prediction"),
    ({}, {"modelspec.prediction_type": "v"}, "v_prediction"),  # the specification
    ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ({}, {"modelspec.predict_key": "v"}, "v_prediction"),  # ComfyUI
    ({}, {"modelspec.predict_key": "epsilon"}, "epsilon"),
    ({}, {"prediction_type": "V_prediction"}, "v_prediction"),
    ({}, {"ss_v_parameterization": "True"}, "v_prediction"),  # kohya
    ({}, {"ss_v_parameterization": "False"}, None),
    ({}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
    ({}, {"modelspec.architecture": "stable-diffusion-v1"}, None),
    ({}, {"title": "v"}, None),
]


@pytest.mark.parametrize(("tensors", "header", "said"), SAYS)
def test_what_a_single_file_says_that_it_predicts(tensors, header, said, tmp_path):
    path = tmp_path / "single.safetensors"
    assert single_files.stated_prediction(path, tensors, header) == said


@pytest.mark.parametrize(("letter", "said"), [("v", "v_prediction"), ("eps", "epsilon")])
def test_a_yaml_beside_it_says_it_too(letter, said, tmp_path):
    config = f"model:\n  params:\n    parameterization: '{letter}'  # as A1111 reads it\n"
    (tmp_path / "single.yaml").write_text(config)
    assert single_files.stated_prediction(tmp_path / "single.safetensors", {}, {}) == said


def test_an_sd1_file_that_says_v_is_read_so_and_says_it_again(tmp_path, monkeypatch, no_warnings):
    sd = single(tmp_path, monkeypatch, "sd1", lambda t: t | {"v_pred": EMPTY})
    assert sd.schedule.prediction_type == "v_prediction"
    sd.save_single_file(tmp_path / "again.safetensors")
    with safe_open(tmp_path / "again.safetensors", "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "v"
        assert file.get_tensor("v_pred").shape == (0,)
    again = minibooth.load(tmp_path / "again.safetensors")
    assert again.schedule.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("tensors", "header", "zero"),
    [
        ({"ztsnr": EMPTY}, {}, True),
        ({}, {"ss_zero_terminal_snr": "True"}, True),
        ({"alphas_cumprod": torch.linspace(1, 0, 1000)}, {}, True),
        ({"alphas_cumprod": torch.linspace(0.999, 0.00466, 1000)}, {}, False),
        ({"v_pred": EMPTY}, {"ss_zero_terminal_snr": "False"}, False),
    ],
)
def test_what_a_single_file_says_of_its_last_timestep(tensors, header, zero):
    assert single_files.zero_terminal_snr(tensors, header) == zero


def test_zero_terminal_snr_is_refused_as_in_a_folder(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="zero terminal SNR"):
        single(tmp_path, monkeypatch, "sd1", lambda t: t | {"ztsnr": EMPTY})


def test_prediction_type_overrides_what_a_folder_says():
    folder, _ = peers.model("sd1")
    sd = minibooth.load(folder, prediction_type="v_prediction")
    assert sd.schedule.prediction_type == "v_prediction"
    with pytest.raises(UserError, match="sample"):
        minibooth.load(folder, prediction_type="sample")


# ---- what else goes round ------------------------------------------------------------------------


WRITERS = {"safetensors": save_file, "zipped": zipped, "legacy": legacy}


@pytest.mark.parametrize("form", WRITERS)
def test_files_are_known_by_their_content(form, tmp_path):
    tensors = {"a.weight": torch.rand(3, 2), "b": torch.arange(4.0)}
    for name in ("X.SAFETENSORS", "x.safetensors", "x.sft", "x.ckpt", "x.pt", "x"):
        WRITERS[form](tensors, tmp_path / name)
        found, _ = tensor_files.read_tensors(tmp_path / name)
        assert found.keys() == tensors.keys(), name
        assert all(torch.equal(found[key], tensors[key]) for key in tensors), name


ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
CONV = "model.diffusion_model.input_blocks.0.0.weight"
# A few of the keys, and their shapes, of what is published.
KINDS_OF_FILES = {
    "is Stable Diffusion 3: only": {
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (9, 3)
    },
    "is Flux: only": {"double_blocks.0.img_attn.qkv.weight": (9, 3)},
    "is a ControlNet: only": {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "is a VAE: give it as --vae": {"first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3)},
    "is a UNet alone: get the whole": {"down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)},
    "is a word: give it as --embedding": {"emb_params": (2, 8)},
    "holds no UNet of Stable Diffusion": {"a": (2, 8)},
}


@pytest.mark.parametrize("said", KINDS_OF_FILES)
def test_single_files_of_other_kinds_are_named(said, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({k: torch.zeros(shape) for k, shape in KINDS_OF_FILES[said].items()}, path)
    with pytest.raises(UserError, match=said) as error:
        minibooth.load(path)
    one_line(error)


def test_gguf_is_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(UserError, match=r"is GGUF, .* get the model as .safetensors"):
        minibooth.load(tmp_path / "x.gguf")


def test_a_single_file_without_a_vae_or_text_encoder_says_how_to_go_on(
    tmp_path, monkeypatch, other_vae
):
    def without(prefix):
        return lambda t: {k: v for k, v in t.items() if not k.startswith(prefix)}

    with pytest.raises(UserError, match="holds no VAE: give one with --vae"):
        single(tmp_path, monkeypatch, "sd1", without("first_stage_model."))
    with pytest.raises(UserError, match=r"holds no text encoder, .* get the whole model"):
        single(tmp_path, monkeypatch, "sd1", without("cond_stage_model."))
    other_vae.save_pretrained(tmp_path / "vae")
    given = {"vae": tmp_path / "vae"}
    sd = single(tmp_path, monkeypatch, "sd1", without("first_stage_model."), **given)
    assert_same_state(sd.vae.state_dict(), peers.tensors(other_vae))
