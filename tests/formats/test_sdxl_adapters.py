"""LoRA and words of SDXL: what diffusers draws with ours, published names, and the wrong family."""

import copy
import json
from types import SimpleNamespace

import diffusers
import peers
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from weight_files import full_sdxl

import minibooth
from minibooth import UserError, convert, hypernetwork, lora
from minibooth.formats import adapters, checkpoint, configs, hypernetworks
from minibooth.textual_inversion import add_word

PROMPT = "a photo of a <toy> dog"


@pytest.fixture(scope="module")
def sd():
    """Only read by the tests."""
    return minibooth.load(peers.model("sdxl")[0])


@pytest.fixture(scope="module")
def pipe():
    folder = peers.model("sdxl")[0]
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(sd):
    settings = {"guidance_scale": 5.0, "latents": tiny.randn(1, 4, 16, 16), "output": "latent"}
    return sd.generate(PROMPT, steps=2, **settings)


def draw_theirs(pipe):
    settings = {"guidance_scale": 5.0, "latents": tiny.randn(1, 4, 16, 16), "height": 32}
    return pipe(PROMPT, num_inference_steps=2, width=32, output_type="latent", **settings).images


def trained(sd, targets):
    found = {}
    for name in adapters.ADAPTED:
        found[name] = lora.create(sd.networks[name], 3, 5.0, targets)
        for i, a in enumerate(found[name].values()):
            a.B.data = 0.3 * tiny.randn(*a.B.shape, seed=i)
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, of_it in wanted.items():
        assert found[name].keys() == of_it.keys()
        for key, a in of_it.items():
            assert torch.allclose(found[name][key].delta(), a.delta(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form, targets", [("diffusers", "attention"), ("kohya", "transformers")])
def test_diffusers_draws_with_our_lora_what_we_draw(form, targets, sd, pipe, tmp_path):
    found = trained(sd, targets)
    if form == "kohya":
        path = tmp_path / "lora.safetensors"
        adapters.write_kohya_lora(path, sd.networks, found, torch.float32)
    else:
        path = adapters.write_diffusers_lora(tmp_path, sd.networks, found)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    want = draw_theirs(pipe)
    pipe.unload_lora_weights()
    again = adapters.read_lora(path, sd.networks)
    assert_same(again, found)
    base = draw(sd)
    for name, of_it in again.items():
        lora.attach(sd.networks[name], of_it)
    ours = draw(sd)
    for of_it in again.values():
        lora.detach(of_it)
    assert tiny.rel(ours, want) < 1e-4 and tiny.rel(ours, base) > 1e-2


def test_other_spellings_are_read(sd, tmp_path):
    """diffusers' blocks in kohya's form, and its training script's .lora.down; of all layers."""
    found = trained(sd, "all")
    adapters.write_kohya_lora(tmp_path / "k.safetensors", sd.networks, found, torch.float32)
    path = adapters.write_diffusers_lora(tmp_path, sd.networks, found)
    tensors = load_file(path)
    script = {
        key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): value
        for key, value in tensors.items()
    }
    save_file(script, tmp_path / "script.safetensors")
    flat = {}
    for key, value in tensors.items():
        network, layer = key.split(".", 1)
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
        layer, which = layer.rsplit(".lora_", 1)
        end = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[which]
        flat[f"{prefix[network]}{layer.replace('.', '_')}.{end}"] = value
    assert any(key.startswith("lora_unet_down_blocks_1_attentions_0_") for key in flat)
    save_file(flat, tmp_path / "flat.safetensors")
    for name in ("k", "script", "flat"):
        assert_same(adapters.read_lora(tmp_path / f"{name}.safetensors", sd.networks), found)


# The modules of a LoRA of SDXL as kohya's sd-scripts name them: → (c_in, c_out), written out from
# the published plan. A level's blocks and how many transformers each has:
PLAN = {"input_blocks_4": (640, 2), "input_blocks_5": (640, 2), "input_blocks_7": (1280, 10)}
PLAN |= {"input_blocks_8": (1280, 10), "middle_block": (1280, 10)}
PLAN |= {f"output_blocks_{i}": (1280, 10) for i in range(3)}
PLAN |= {f"output_blocks_{i}": (640, 2) for i in range(3, 6)}
PUBLISHED = {}
for block, (c, depth) in PLAN.items():
    PUBLISHED |= {f"lora_unet_{block}_1_{name}": (c, c) for name in ("proj_in", "proj_out")}
    for i in range(depth):
        inside = f"lora_unet_{block}_1_transformer_blocks_{i}_"
        for attention, d in (("attn1", c), ("attn2", 2048)):  # of the picture, of the text
            for name, c_in in (("to_q", c), ("to_k", d), ("to_v", d), ("to_out_0", c)):
                PUBLISHED[f"{inside}{attention}_{name}"] = c_in, c
        PUBLISHED |= {f"{inside}ff_net_0_proj": (c, 8 * c), f"{inside}ff_net_2": (4 * c, c)}
for te, c, layers in (("te1", 768, 12), ("te2", 1280, 32)):
    for i in range(layers):
        inside = f"lora_{te}_text_model_encoder_layers_{i}_"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            PUBLISHED[f"{inside}self_attn_{name}"] = c, c
        PUBLISHED |= {f"{inside}mlp_fc1": (c, 4 * c), f"{inside}mlp_fc2": (4 * c, c)}


@pytest.fixture(scope="module")
def full():
    return {name: full_sdxl()[name] for name in adapters.ADAPTED}


def test_kohyas_keys_and_shapes_at_full_size(full, tmp_path):
    found = {
        name: lora.collect(
            [
                lora.Adapter(layer, torch.zeros(1, c_in), torch.zeros(c_out, 1), 1.0)
                for layer, module in lora.layers(network, "transformers").items()
                for c_out, c_in in [lora.matrix(module).shape]
            ]
        )
        for name, network in full.items()
    }
    assert [len(of_it) for of_it in found.values()] == [722, 72, 192]
    path = tmp_path / "x.safetensors"
    adapters.write_kohya_lora(path, full, found)
    with safe_open(path, "pt") as f:
        shapes = {key: f.get_slice(key).get_shape() for key in f.keys()}  # noqa: SIM118
        about = f.metadata()
    wanted = {}
    for name, (c_in, c_out) in PUBLISHED.items():
        wanted |= {f"{name}.lora_down.weight": [1, c_in], f"{name}.lora_up.weight": [c_out, 1]}
        wanted[f"{name}.alpha"] = []
    assert shapes == wanted
    assert about["ss_base_model_version"] == "sdxl_base_v1-0" and about["ss_v2"] == "False"
    assert about["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    again = adapters.read_lora(path, full)
    assert {name: of_it.keys() for name, of_it in again.items()} == {
        name: of_it.keys() for name, of_it in found.items()
    }
    counts = [len(lora.layers(full["unet"], targets)) for targets in ("attention", "all")]
    assert counts == [560, 754]


# ---- words ---------------------------------------------------------------------------------------

VECTORS = [0.5 * tiny.randn(2, 32, seed=1), 0.5 * tiny.randn(2, 48, seed=2)]


def test_diffusers_draws_with_our_word_what_we_draw(sd, pipe, tmp_path):
    path = tmp_path / "learned_embeds.safetensors"
    adapters.write_embedding(path, "<toy>", VECTORS)
    tensors, names = load_file(path), ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipe = type(pipe)(**pipe.components | {n: copy.deepcopy(getattr(pipe, n)) for n in names})
    pipe.set_progress_bar_config(disable=True)
    assert (tensors["clip_l"].shape, tensors["clip_g"].shape) == ((2, 32), (2, 48))
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        parts = {n: getattr(pipe, n + number) for n in ("text_encoder", "tokenizer")}
        pipe.load_textual_inversion(tensors[key], token="<toy>", **parts)
    # Left at its old 2, transformers pools at the largest id: at the word, which no training did.
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer.eos_token_id
    ours = minibooth.load(peers.model("sdxl")[0])
    word, vectors = adapters.read_embedding(tmp_path)
    add_word(ours, word, vectors)
    got = draw(ours)
    assert tiny.rel(got, draw_theirs(pipe)) < 1e-4 and tiny.rel(got, draw(sd)) > 1e-3
    ours.save(tmp_path / "model")
    assert torch.equal(draw(minibooth.load(tmp_path / "model")), got)
    told = json.loads((tmp_path / "model/text_encoder_2/config.json").read_text())
    assert told["eos_token_id"] == pipe.tokenizer.eos_token_id
    with pytest.warns(UserWarning, match="no place for added words"):
        ours.save_single_file(tmp_path / "x.safetensors", torch.float32)
    rows = [x for k, x in load_file(tmp_path / "x.safetensors").items() if "token_embedding" in k]
    assert [len(x) for x in rows] == [len(pipe.tokenizer) - 2] * 2


def test_the_file_is_the_word_where_nothing_says_another(tmp_path):
    adapters.write_embedding(tmp_path / "sks.safetensors", "emb_params", VECTORS)
    adapters.write_embedding(tmp_path / "x.safetensors", "<toy>", VECTORS)
    for given, word in (("sks", "sks"), ("x", "<toy>"), ("x", "<cat>")):
        chosen = "=<cat>" if word == "<cat>" else ""
        said, vectors = adapters.read_embedding(f"{tmp_path}/{given}.safetensors{chosen}")
        assert said == word and all(map(torch.equal, vectors, VECTORS))
    save_file({"clip_l": VECTORS[0], "clip_g": VECTORS[1][:1]}, tmp_path / "uneven.safetensors")
    save_file({"clip_l": VECTORS[0]}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="does not hold the vectors of one word"):
        adapters.read_embedding(tmp_path / "uneven.safetensors")


# ---- what is for another family ------------------------------------------------------------------


def kohya(name, c_in, c_out):
    down, up = torch.ones(1, c_in), torch.ones(c_out, 1)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}


SD1, SD2 = "Stable Diffusion 1.x", "Stable Diffusion 2.x"
Q = "transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    "tensors, made",
    [
        (kohya(f"lora_unet_down_blocks_0_attentions_0_{Q}", 768, 320), SD1),
        (kohya(f"lora_unet_down_blocks_1_attentions_0_{Q}", 768, 640), SD1),
        (kohya(f"lora_unet_down_blocks_1_attentions_0_{Q}", 1024, 640), SD2),
    ],
)
def test_a_lora_of_sd_on_sdxl_names_both(tensors, made, full, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"x.safetensors is for {made}, and this model is SDXL: "):
        adapters.read_lora(tmp_path / "x.safetensors", full)


def test_what_is_sdxls_on_an_sd_1_model_names_both(full, tmp_path):
    sd1 = configs.SINGLE_FILE[768]
    networks = {name: checkpoint.skeleton(name, sd1[name]) for name in ("unet", "text_encoder")}
    both = f"is for SDXL, and this model is {SD1}"
    te1, te2 = (f"lora_te{i}_text_model_encoder_layers_0_mlp_fc1" for i in (1, 2))
    for tensors in (
        kohya(f"lora_unet_input_blocks_4_1_{Q}", 2048, 640),
        kohya(f"lora_unet_down_blocks_1_attentions_0_{Q}", 2048, 640),
        kohya(te1, 768, 3072) | kohya(te2, 1280, 5120),
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=both) as error:
            adapters.read_lora(tmp_path / "x.safetensors", networks)
        assert "\n" not in str(error.value)
    save_file(kohya(te1, 768, 3072), tmp_path / "x.safetensors")  # as some name SD 1.x's one
    assert adapters.read_lora(tmp_path / "x.safetensors", networks).keys() == {"text_encoder"}
    made = hypernetwork.Hypernetwork(hypernetwork.Form(), [2048])
    hypernetworks.write(tmp_path / "x.pt", made)
    with pytest.raises(UserError, match=f"reads 2048 numbers, .*; it {both}"):
        hypernetworks.read(tmp_path / "x.pt", networks["unet"])


def embeddings(width):
    return {"token_embedding": torch.nn.Embedding(5, width)}


def test_a_word_of_another_family_names_both():
    sizes = {"<one>": [768], "<two>": [1024], "<xl>": [768, 1280]}
    made = dict(zip(sizes, (SD1, SD2, "SDXL"), strict=True))
    for own, widths in sizes.items():
        encoders = {n: SimpleNamespace(embeddings=embeddings(d)) for n, d in enumerate(widths)}
        model = SimpleNamespace(text_encoders=encoders)
        for word in sizes.keys() - {own}:
            said = f"{word} is for {made[word]}, and this model is {made[own]}: its vectors have"
            with pytest.raises(UserError, match=said):
                add_word(model, word, [torch.ones(1, n) for n in sizes[word]])


# ---- convert -------------------------------------------------------------------------------------


def test_a_lora_is_extracted_and_merged_again(sd, tmp_path, capsys):
    found = {
        name: lora.collect([*of_it.values()][:3]) for name, of_it in trained(sd, "all").items()
    }
    lora_file = tmp_path / "lora.safetensors"
    adapters.write_kohya_lora(lora_file, sd.networks, found, torch.float32)
    base = str(peers.model("sdxl")[0])

    def run(name, **settings):
        settings |= {"output": str(tmp_path / name), "dtype": "fp32"}
        return convert.convert(convert.ConvertConfig(**settings))

    tuned = run("tuned.safetensors", model=base, merge_lora=(str(lora_file),))
    out = run("out.safetensors", model=str(tuned), base=base, extract_lora=3)
    assert "keeps 100.0%" in capsys.readouterr().out
    again = adapters.read_lora(out, sd.networks)
    for name, of_it in found.items():
        for key, a in of_it.items():
            assert tiny.rel(again[name][key].delta(), a.delta()) < 1e-3, (name, key)
    other = str(peers.model("sd1")[0])
    with pytest.raises(UserError, match="--base is no base of --model: another, and SDXL"):
        run("no.safetensors", model=base, base=other, extract_lora=3)
