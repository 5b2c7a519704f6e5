"""LoRA and Textual Inversion files: what diffusers draws with ours, and we with others'."""

import diffusers
import peers
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minibooth import UserError, load, lora
from minibooth.formats import adapters
from minibooth.text_encoder import TextEncoder
from minibooth.textual_inversion import add_word
from minibooth.unet import UNet

SETTINGS = dict(num_inference_steps=3, output_type="latent", guidance_scale=5.0)


def trained(sd, targets="all", rank=3, alpha=5.0):
    found = {}
    for name in ("unet", "text_encoder"):
        found[name] = lora.create(sd.networks[name], rank, alpha, targets)
        for i, a in enumerate(found[name].values()):
            a.B.data = 0.3 * tiny.randn(*a.B.shape, seed=i)
    return found


def theirs(kind):
    folder, pipe = peers.model(kind)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, tokenizer=pipe.tokenizer, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(sd, prompt="a photo of a sks dog"):
    latents = tiny.randn(1, 4, 8, 8)
    return sd.generate(prompt, steps=3, guidance_scale=5.0, latents=latents, output="latent")


def draw_theirs(pipe, prompt="a photo of a sks dog", **options):
    return pipe(prompt, latents=tiny.randn(1, 4, 8, 8), **SETTINGS, **options).images


def merged(kind, found):
    sd = load(peers.model(kind)[0])
    for name, of_it in found.items():
        lora.merge(sd.networks[name], of_it)
    return sd


def write(form, path, sd, found, dtype=torch.float32):
    if form == "diffusers":
        return adapters.write_diffusers_lora(path / "lora", sd.networks, found, dtype)
    adapters.write_kohya_lora(path / "lora.safetensors", sd.networks, found, dtype)
    return path / "lora.safetensors"


# ---- LoRA out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", lora.TARGETS)
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_diffusers_draws_with_our_file_what_we_draw(kind, form, targets, tmp_path):
    """α = 5 at rank 3: neither form may lose it."""
    sd = load(peers.model(kind)[0])
    base, found = draw(sd), trained(sd, targets)
    path = write(form, tmp_path, sd, found)
    pipe = theirs(kind)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    want = draw_theirs(pipe)
    got = draw(merged(kind, found))
    assert tiny.rel(got, want) < 1e-4
    assert tiny.rel(got, base) > 1e-2
    again = adapters.read_lora(path, sd.networks)
    for name, of_it in found.items():
        assert again[name].keys() == of_it.keys()
        for key, a in of_it.items():
            assert torch.allclose(again[name][key].delta(), a.delta(), rtol=1e-5, atol=1e-6)


def test_a_folder_stands_for_the_file_in_it(tmp_path):
    sd = load(peers.model()[0])
    found = {"unet": trained(sd, "attention")["unet"]}
    path = adapters.write_diffusers_lora(tmp_path, sd.networks, found)
    assert path == tmp_path / "pytorch_lora_weights.safetensors"
    assert adapters.read_lora(tmp_path, sd.networks).keys() == {"unet"}


# The modules of a published LoRA for SD 1.5, as kohya's sd-scripts name them: → (c_in, c_out). They
# are written out here from the model's plan, not from the networks.
BLOCKS = {f"down_blocks_{i}_attentions_{j}": 320 * 2**i for i in range(3) for j in range(2)}
BLOCKS |= {"mid_block_attentions_0": 1280}
BLOCKS |= {
    f"up_blocks_{i}_attentions_{j}": 1280 // 2 ** (i - 1) for i in (1, 2, 3) for j in range(3)
}
OF_ATTENTION, OF_THE_REST = {}, {}
for block, c in BLOCKS.items():
    inside = f"lora_unet_{block}_transformer_blocks_0_"
    for attention, d in (("attn1", c), ("attn2", 768)):  # of the picture, of the text
        for name, c_in in (("to_q", c), ("to_k", d), ("to_v", d), ("to_out_0", c)):
            OF_ATTENTION[f"{inside}{attention}_{name}"] = c_in, c
    OF_THE_REST |= {f"{inside}ff_net_0_proj": (c, 8 * c), f"{inside}ff_net_2": (4 * c, c)}
    OF_THE_REST |= {f"lora_unet_{block}_{name}": (c, c) for name in ("proj_in", "proj_out")}
for i in range(12):
    inside = f"lora_te_text_model_encoder_layers_{i}_"
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        OF_ATTENTION[f"{inside}self_attn_{name}"] = 768, 768
    OF_THE_REST |= {f"{inside}mlp_fc1": (768, 3072), f"{inside}mlp_fc2": (3072, 768)}


def published(targets, rank):
    """Its keys → their shapes."""
    found = {}
    for name, (c_in, c_out) in (
        OF_ATTENTION | (OF_THE_REST if targets == "transformers" else {})
    ).items():
        ones = [1, 1] if name.endswith(("_proj_in", "_proj_out")) else []  # 1×1 convolutions
        found[f"{name}.lora_down.weight"] = [rank, c_in, *ones]
        found[f"{name}.lora_up.weight"] = [c_out, rank, *ones]
        found[f"{name}.alpha"] = []
    return found


@pytest.mark.parametrize("targets, modules", [("transformers", 192 + 72), ("attention", 128 + 48)])
def test_kohyas_keys_and_shapes_at_full_size(targets, modules, tmp_path):
    with torch.device("meta"):
        unet, text = UNet(tiny.unet_config("SD 1.5")), TextEncoder(tiny.text_config("SD 1.5"))
    networks, found = {"unet": unet, "text_encoder": text}, {}
    for name, network in networks.items():
        found[name] = lora.collect(
            [
                lora.Adapter(n, torch.zeros(4, c_in), torch.zeros(c_out, 4), 1.0)
                for n, layer in lora.layers(network, targets).items()
                for c_out, c_in in [lora.matrix(layer).shape]
            ]
        )
    adapters.write_kohya_lora(tmp_path / "x.safetensors", networks, found)
    written = load_file(tmp_path / "x.safetensors")
    assert len(written) == 3 * modules
    assert {key: list(x.shape) for key, x in written.items()} == published(targets, rank=4)
    assert all(v.dtype == torch.float16 for v in written.values())
    assert adapters.read_lora(tmp_path / "x.safetensors", networks).keys() == networks.keys()
    with safe_open(tmp_path / "x.safetensors", "pt") as f:
        about = f.metadata()
    assert (about["ss_network_dim"], about["ss_network_alpha"]) == ("4", "1.0")
    assert about["ss_network_module"] == "networks.lora" and about["ss_v2"] == "False"


# ---- LoRA in -----------------------------------------------------------------------------------


def peft_pipeline(**config):
    """diffusers' model as its training script makes it, with adapters that do something."""
    pipe = theirs("sd1")
    names = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "out_proj"]}
    for name, targets in names.items():
        network = getattr(pipe, name)
        network.add_adapter(LoraConfig(r=3, target_modules=targets, **config))
        for i, (key, p) in enumerate(network.named_parameters()):
            if "lora_B" in key:
                p.data = 0.3 * tiny.randn(*p.shape, seed=i)
    return pipe


@pytest.mark.parametrize("spelling", ["peft", "diffusers"])
@pytest.mark.parametrize("alpha", [3, 6])
def test_what_diffusers_saves_we_draw_with(spelling, alpha, tmp_path):
    pipe = peft_pipeline(lora_alpha=alpha)
    layers = {n: get_peft_model_state_dict(getattr(pipe, n)) for n in ("unet", "text_encoder")}
    if spelling == "diffusers":
        convert = diffusers.utils.convert_state_dict_to_diffusers
        layers = {name: convert(state) for name, state in layers.items()}
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["default"].to_dict(),
    )
    sd = load(peers.model()[0])
    adapters.merge_files(sd.networks, [str(tmp_path)])
    assert tiny.rel(draw(sd), draw_theirs(pipe)) < 1e-4


def test_old_spellings_are_read(tmp_path):
    """The UNet's attention processors of 2023, the text encoder's layers, kohya's lora_te1."""
    sd = load(peers.model()[0])
    found = trained(sd, "attention")
    path = write("diffusers", tmp_path, sd, found)
    old = {}
    for key, value in load_file(path).items():
        key = key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
        if key.startswith("unet."):
            for new in ("to_q", "to_k", "to_v", "to_out.0"):
                key = key.replace(f".{new}.lora.", f".processor.{new.removesuffix('.0')}_lora.")
        else:
            key = key.replace(".lora.", ".lora_linear_layer.").replace("text_model.", "")
        old[key] = value
    save_file(old, tmp_path / "old.safetensors")
    bare = {k.removeprefix("unet.").removeprefix("text_encoder."): v for k, v in old.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    (tmp_path / "folder").mkdir()
    torch.save(old, tmp_path / "folder" / "pytorch_lora_weights.bin")
    kohya = load_file(write("kohya", tmp_path, sd, found))
    save_file({k.replace("lora_te_", "lora_te1_"): v for k, v in kohya.items()}, tmp_path / "k.bin")
    (tmp_path / "k.bin").rename(tmp_path / "te1.safetensors")
    for name in ("old.safetensors", "te1.safetensors", "bare.safetensors", "folder"):
        again = adapters.read_lora(tmp_path / name, sd.networks)
        for network, of_it in found.items():
            assert again[network].keys() == of_it.keys()
            for key, a in of_it.items():
                assert torch.allclose(again[network][key].delta(), a.delta(), atol=1e-5)


def test_what_peft_saves_by_itself_we_draw_with(tmp_path):
    """A folder for each network; α stands in adapter_config.json alone."""
    pipe = theirs("sd1")
    targets = {"unet": ["to_q", "to_out.0"], "text_encoder": ["q_proj", "out_proj"]}
    for name, layers in targets.items():
        config = LoraConfig(r=3, lora_alpha=6, target_modules=layers)
        network = get_peft_model(getattr(pipe, name), config)
        for i, (key, p) in enumerate(network.named_parameters()):
            if "lora_B" in key:
                p.data = 0.3 * tiny.randn(*p.shape, seed=i)
        network.save_pretrained(tmp_path / name)
    sd = load(peers.model()[0])
    adapters.merge_files(sd.networks, [str(tmp_path / name) for name in targets])
    assert tiny.rel(draw(sd), draw_theirs(pipe)) < 1e-4
    config = tmp_path / "unet" / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_rslora": false', '"use_rslora": true'))
    with pytest.raises(UserError, match="use_rslora"):
        adapters.read_lora(tmp_path / "unet", sd.networks)
    config.unlink()
    with pytest.raises(UserError, match=r"adapter_config.json, .* put that beside it"):
        adapters.read_lora(tmp_path / "unet", sd.networks)


def test_without_alpha_it_is_the_rank(tmp_path):
    sd = load(peers.model()[0])
    tensors = load_file(write("kohya", tmp_path, sd, trained(sd, rank=3, alpha=5)))
    save_file({k: v for k, v in tensors.items() if "alpha" not in k}, tmp_path / "x.safetensors")
    for of_it in adapters.read_lora(tmp_path / "x.safetensors", sd.networks).values():
        assert {a.scale for a in of_it.values()} == {1.0}


def test_strengths_stand_behind_a_colon(tmp_path):
    split = adapters.file_and_strength
    assert split("a.safetensors") == ("a.safetensors", 1)
    assert split("a.safetensors:0.5") == ("a.safetensors", 0.5)
    assert split("C:\\a.safetensors:-1") == ("C:\\a.safetensors", -1)
    (tmp_path / "a:1").touch()
    assert split(f"{tmp_path}/a:1") == (f"{tmp_path}/a:1", 1)
    for wrong in ("a:b", "a:", "a:nan", "a:inf"):
        with pytest.raises(UserError, match="no strength"):
            split(wrong)


def broken(tmp_path, change):
    """Our file of the kohya form with something done to it, and the networks."""
    sd = load(peers.model()[0])
    tensors = change(load_file(write("kohya", tmp_path, sd, trained(sd, "attention"))))
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors", sd.networks


def conv(name, channels):
    """Of a 3×3 convolution, as LoCon has them."""
    down, up = torch.ones(2, channels, 3, 3), torch.ones(64, 2, 1, 1)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: {}, "holds no LoRA"),
        (lambda t: {"conv_in.weight": t[f"{Q}.alpha"]}, "conv_in.weight is of no LoRA"),
        (lambda t: {f"{Q}.hada_w1_a": t[f"{Q}.alpha"]}, "is a LoHa, .* not read here .*hada_w1_a"),
        (lambda t: {f"{Q}.lokr_w1": t[f"{Q}.alpha"]}, "is a LoKr, a kind that is not read here"),
        (lambda t: t | {f"{Q}.dora_scale": torch.ones(2)}, "is a DoRA, a kind that is not read"),
        (lambda t: t | {f"{Q}.lora_mid.weight": torch.ones(2)}, "is a LoCon, a kind that is not"),
        (lambda t: t | conv("lora_unet_mid_block_resnets_0_conv1", 64), "is a LoCon, .*not read"),
        (lambda t: t | conv("lora_unet_conv_in", 4), "is a LoCon, a kind that is not read here"),
        (lambda t: {k.replace("lora_te_", "lora_te2_"): v for k, v in t.items()}, "for SDXL"),
        (lambda t: {k.replace("down_blocks_0", "input_blocks_4"): v for k, v in t.items()}, "SDXL"),
        (
            lambda t: {f"transformer.{k}": v for k, v in t.items()},
            "is for Flux or SD 3, not for this model",
        ),
        (lambda t: {k.replace("blocks_0", "blocks_7"): v for k, v in t.items()}, "another model"),
        (lambda t: {k.replace("to_q", "norm"): v for k, v in t.items()}, "linear layer"),
        (lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_up.weight"}, "lacks one"),
        (
            lambda t: {k: v[:, :-1] if "lora_down" in k else v for k, v in t.items()},
            r"layer is \d+ →",
        ),
        (lambda t: {k: v[:-1] if "lora_up" in k else v for k, v in t.items()}, "another model"),
        (lambda t: {k: v[:0] if "lora_down" in k else v for k, v in t.items()}, "another model"),
        (lambda t: t | {f"{Q}.alpha": torch.ones(2)}, "alpha of .* is not one number"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_in_one_line(change, said, tmp_path):
    path, networks = broken(tmp_path, change)
    with pytest.raises(UserError, match=said) as e:
        adapters.read_lora(path, networks)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_files_that_are_missing_damaged_or_of_other_methods_are_refused(tmp_path):
    sd = load(peers.model()[0])
    with pytest.raises(UserError, match="no such file"):
        adapters.read_lora(tmp_path / "none.safetensors", sd.networks)
    with pytest.raises(UserError, match=r"pytorch_lora_weights.safetensors: there is no such file"):
        adapters.read_lora(tmp_path, sd.networks)
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="damaged"):
        adapters.read_lora(tmp_path / "x.safetensors", sd.networks)
    tensors = load_file(write("diffusers", tmp_path, sd, trained(sd)))
    for stated, said in (
        ('{"unet.use_dora": true}', "use_dora"),
        ('{"unet.lora_alpha": "x"}', "damaged metadata"),
        ("[]", "damaged metadata"),
        ("{", "damaged metadata"),
    ):
        save_file(tensors, tmp_path / "y.safetensors", {"lora_adapter_metadata": stated})
        with pytest.raises(UserError, match=said):
            adapters.read_lora(tmp_path / "y.safetensors", sd.networks)


# ---- Textual Inversion -------------------------------------------------------------------------

VECTORS = {n: 0.5 * tiny.randn(n, 32, seed=n) for n in (1, 3)}


def with_word(vectors, word="<toy>", kind="sd1"):
    sd = load(peers.model(kind)[0])
    add_word(sd, word, vectors)
    return sd


@pytest.mark.parametrize("n", VECTORS)
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_diffusers_draws_with_our_word_what_we_draw(kind, n, tmp_path):
    file = tmp_path / "learned_embeds.safetensors"
    adapters.write_embedding(file, "<toy>", VECTORS[n])
    assert load_file(file)["<toy>"].shape == (n, 32)
    pipe = theirs(kind)
    pipe.tokenizer = type(pipe.tokenizer).from_pretrained(peers.model(kind)[0] / "tokenizer")
    pipe.load_textual_inversion(tmp_path)
    sd = with_word(VECTORS[n], kind=kind)
    prompt = "a photo of <toy> in the snow, dog"
    assert tiny.rel(draw(sd, prompt), draw_theirs(pipe, prompt)) < 1e-4
    assert tiny.rel(draw(sd, prompt), draw(sd, "a photo of dog in the snow, dog")) > 1e-3


@pytest.mark.parametrize("n", VECTORS)
def test_every_form_of_an_embedding_is_read(n, tmp_path):
    v = VECTORS[n]
    adapters.write_embedding(tmp_path / "learned_embeds.safetensors", "<toy>", v)
    adapters.write_embedding(tmp_path / "toy.safetensors", "emb_params", v)
    torch.save({"<toy>": v[0] if n == 1 else v}, tmp_path / "learned_embeds.bin")
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": v}, "name": "x", "step": 9}
    torch.save(a1111 | {"sd_checkpoint": None}, tmp_path / "old.pt")
    early = {"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(v)})}
    torch.save(early, tmp_path / "early.pt")
    (tmp_path / "folder").mkdir()
    torch.save({"<toy>": v}, tmp_path / "folder" / "learned_embeds.bin")
    for name, word in {
        "learned_embeds.safetensors": "<toy>",
        "": "<toy>",  # the folder: the first of these in it
        "toy.safetensors": "toy",
        "learned_embeds.bin": "<toy>",
        "old.pt": "old",
        "early.pt": "early",
        "early.pt=<cat>": "<cat>",
        "folder": "<toy>",
    }.items():
        said, vectors = adapters.read_embedding(tmp_path / name)
        assert said == word and torch.equal(vectors[0], v), name
        assert not vectors[0].requires_grad
    assert adapters.public_word(f"{tmp_path}/early.pt=<cat>") == "early.pt=<cat>"
    (tmp_path / "a=b.pt").write_bytes((tmp_path / "early.pt").read_bytes())
    assert adapters.read_embedding(tmp_path / "a=b.pt")[0] == "a=b"


@pytest.mark.parametrize(
    "tensors",
    [{}, {"a": torch.ones(1, 8), "b": torch.ones(1, 8)}, {"a": torch.ones(1, 2, 8)}],
    ids=["none", "two", "of three dimensions"],
)
def test_what_is_not_one_words_vectors_is_refused(tensors, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x.safetensors does not hold the vectors of one word"):
        adapters.read_embedding(tmp_path / "x.safetensors")


def test_a_missing_embedding_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        adapters.read_embedding(tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"learned_embeds.safetensors: there is no such file"):
        adapters.read_embedding(tmp_path)
