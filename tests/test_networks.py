"""UNet, VAE and text encoder against diffusers and transformers: names, outputs, gradients."""

import re

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from minibooth import unet as unet_module
from minibooth.text_encoder import TextEncoder
from minibooth.unet import UNet
from minibooth.vae import VAE, ResnetBlock

TOLERANCE = 1e-5  # ‖ours − theirs‖ / ‖theirs‖ in fp32


def twins(peer, ours):
    """Ours with the peer's random weights; loading is strict, so the names are equal too."""
    tiny.randomize(peer)
    ours.load_state_dict(tiny.peer_state(peer), strict=True)
    return ours.eval(), peer


def results(network, run, inputs):
    """Outputs, then gradients of a scalar in which every output element counts differently."""
    network.zero_grad()
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = run(network, *inputs)
    sum((y * tiny.randn(*y.shape, seed=i)).sum() for i, y in enumerate(outputs)).backward()
    named = {name.removeprefix("text_model."): p.grad for name, p in network.named_parameters()}
    return outputs, [x.grad for x in inputs if x.requires_grad], named


def assert_twins(ours, peer, run, run_peer, *inputs):
    """In fp32: outputs and the whole gradient. In fp64, where rounding hides nothing: each tensor.

    (A single bias's gradient is a sum in which almost all cancels: fp32 leaves it four digits.)
    """
    a, b = results(ours, run, inputs), results(peer, run_peer, inputs)
    for x, y in zip(a[0] + a[1], b[0] + b[1], strict=True):
        assert tiny.rel(x, y) < TOLERANCE
    assert a[2].keys() == b[2].keys()
    whole = [torch.cat([grads[name].flatten() for name in b[2]]) for grads in (a[2], b[2])]
    assert tiny.rel(*whole) < TOLERANCE

    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    a, b = results(ours.double(), run, inputs), results(peer.double(), run_peer, inputs)
    for x, y in zip(a[0] + a[1], b[0] + b[1], strict=True):
        assert tiny.rel(x, y) < 1e-11
    for name, theirs in b[2].items():
        if re.search(r"(k_proj|to_k)\.bias$", name):
            # Softmax does not see what all keys share: zero but for rounding.
            assert max(theirs.norm(), a[2][name].norm()) < 1e-11 * whole[1].norm(), name
        else:
            assert tiny.rel(a[2][name], theirs) < 1e-11, name


def assert_unets_agree(kind, height, width, batch=2):
    config = tiny.unet_config(kind)
    assert_twins(
        *twins(UNet2DConditionModel.from_config(config), UNet(config)),
        lambda unet, x_t, t, context: [unet(x_t, t, context)],
        lambda unet, x_t, t, context: [unet(x_t, t, context).sample],
        tiny.randn(batch, config["in_channels"], height, width),
        torch.tensor([999, 3][:batch]),
        tiny.randn(batch, 9, config["cross_attention_dim"], seed=1),
    )


@pytest.mark.parametrize(
    "kind",
    ["sd1", "sd2", "inpainting", "three levels of one layer", "two levels of three layers"],
)
def test_unet_equals_diffusers_in_output_and_gradients(kind):
    assert_unets_agree(kind, 16, 16)


@pytest.mark.parametrize(("height", "width"), [(8, 24), (13, 18), (9, 11)])
def test_unet_equals_diffusers_at_sizes_that_are_not_square_or_not_even(height, width):
    assert_unets_agree("sd1", height, width, batch=1)


def test_unet_level_without_attention_never_sees_the_text():
    ours = tiny.randomize(UNet(tiny.unet_config("sd1")))
    attends = [len(level.attentions) for level in (*ours.down_blocks, *ours.up_blocks)]
    assert attends == [2, 2, 2, 0, 0, 3, 3, 3]


@pytest.mark.parametrize("width", [16, 320])
def test_timestep_embedding_equals_diffusers(width):
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0, 1, 500, 999])
    theirs = get_timestep_embedding(t, width, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert tiny.rel(unet_module.timestep_embedding(t, width), theirs) < 1e-6


def run_vae(vae, images, z):
    return [*vae.encode(images), vae.decode(z)]


def run_vae_peer(vae, images, z):
    posterior = vae.encode(images).latent_dist
    return [posterior.mean, posterior.std, vae.decode(z).sample]


@pytest.mark.parametrize(
    ("kind", "height", "width"),
    [
        ("sd", 32, 32),
        ("sd", 24, 40),
        ("sd", 29, 42),  # no multiple of 8: the encoder drops the remainder
        ("without attention", 16, 16),
        ("three levels of one layer", 20, 28),
    ],
)
def test_vae_equals_diffusers_in_output_and_gradients(kind, height, width):
    config = tiny.vae_config(kind)
    ours, peer = twins(AutoencoderKL.from_config(config), VAE(config))
    images = tiny.randn(2, 3, height, width)
    shape = (2, config["latent_channels"], height // ours.factor, width // ours.factor)
    assert ours.encode(images)[0].shape == shape
    assert_twins(ours, peer, run_vae, run_vae_peer, images, tiny.randn(*shape, seed=1))


def test_vae_std_stays_finite_where_the_variance_is_extreme():
    """As in the reference the log-variance is clamped to −30 … 20."""
    ours = VAE(tiny.vae_config("sd"))
    torch.nn.init.zeros_(ours.quant_conv.weight)
    for bias, std in ((1e4, torch.tensor(10.0).exp()), (-1e4, torch.tensor(-15.0).exp())):
        torch.nn.init.constant_(ours.quant_conv.bias, bias)
        assert torch.allclose(ours.encode(torch.zeros(1, 3, 8, 8))[1], std)


@pytest.mark.parametrize(
    ("changes", "factor", "scaling"),
    [
        (dict(), 8, 0.18215),
        (dict(scaling_factor=0.5), 8, 0.5),
        (dict(block_out_channels=[8, 8, 16]), 4, 0.18215),
    ],
)
def test_vae_reads_its_factors_from_the_config(changes, factor, scaling):
    with torch.device("meta"):
        vae = VAE(tiny.vae_config("sd") | changes)
    assert (vae.factor, vae.scaling_factor) == (factor, scaling)


@pytest.mark.parametrize("length", [77, 5])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_text_encoder_equals_transformers_in_output_and_gradients(kind, length):
    config = tiny.text_config(kind)
    assert_twins(
        *twins(CLIPTextModel(CLIPTextConfig(**config)), TextEncoder(config)),
        lambda encoder, ids: [encoder(ids)],
        lambda encoder, ids: [encoder(ids).last_hidden_state],
        torch.arange(3 * length).mul(37).remainder(config["vocab_size"]).view(3, length),
    )


# ---- full size ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "config", "keys", "parameters"),
    [
        (UNet, tiny.unet_config("SD 1.5"), 686, 859_520_964),
        (UNet, tiny.unet_config("SD 2.1"), 686, 865_910_724),
        (VAE, tiny.vae_config("SD"), 248, 83_653_863),
        (TextEncoder, tiny.text_config("SD 1.5"), 196, 123_060_480),
        (TextEncoder, tiny.text_config("SD 2.1"), 372, 340_387_840),
    ],
)
def test_full_size_has_the_published_number_of_keys_and_parameters(
    network, config, keys, parameters
):
    with torch.device("meta"):
        state = network(config).state_dict()
    assert len(state) == keys
    assert sum(p.numel() for p in state.values()) == parameters


def unet_table(unet):
    """The table in unet.py's docstring, drawn from a module and a pass through it at 64²."""
    shapes = {}  # (channels, size) of what each part's layers put out, in the order of the pass

    def note(name):
        part = name.split(".resnets")[0]
        return lambda module, args, y: shapes.setdefault(part, set()).add(y.shape[1:3])

    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock) or name in ("conv_in", "conv_out"):
            module.register_forward_hook(note(name))
    unet(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768))

    channels = 4
    for name, outputs in shapes.items():
        ((c_out, size),) = outputs  # the same for all layers of a level
        part, words = unet.get_submodule(name), ""
        if "block" in name:
            heads = {t.transformer_blocks[0].attn1.heads for t in part.attentions}
            layer = "resnet" + "".join(f", {h} heads" for h in heads)
            n = len(part.resnets)
            assert len(part.attentions) in ((1,) if name == "mid_block" else (0, n))
            words = f"{layer}, resnet" if name == "mid_block" else f"{n} × ({layer})"
            words += " then half" * len(part.downsamplers) + " then twice" * len(part.upsamplers)
        yield f"{name} {channels} → {c_out} {size}² {words}".split()
        channels = c_out


def test_unet_docstring_shows_sd_1_5_as_it_is():
    with torch.device("meta"):
        rows = list(unet_table(UNet(tiny.unet_config("SD 1.5"))))
    lines = [line.split() for line in unet_module.__doc__.splitlines() if "→" in line]
    assert lines == rows


@pytest.mark.slow
@pytest.mark.parametrize("model", ["SD 1.5", "SD 2.1"])
def test_full_size_unet_equals_diffusers(model):
    config = tiny.unet_config(model)
    peer = UNet2DConditionModel.from_config(config).eval()
    ours = share_weights(UNet, config, peer)
    x_t, t = tiny.randn(1, 4, 32, 32), torch.tensor([500])
    context = tiny.randn(1, 77, config["cross_attention_dim"], seed=1)
    with torch.no_grad():
        assert tiny.rel(ours(x_t, t, context), peer(x_t, t, context).sample) < TOLERANCE


@pytest.mark.slow
def test_full_size_vae_equals_diffusers():
    config = tiny.vae_config("SD")
    peer = AutoencoderKL.from_config(config).eval()
    ours = share_weights(VAE, config, peer)
    images, z = tiny.randn(1, 3, 256, 256), tiny.randn(1, 4, 32, 32, seed=1)
    with torch.no_grad():
        for a, b in zip(run_vae(ours, images, z), run_vae_peer(peer, images, z), strict=True):
            assert tiny.rel(a, b) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("model", ["SD 1.5", "SD 2.1"])
def test_full_size_text_encoder_equals_transformers(model):
    config = tiny.text_config(model)
    peer = CLIPTextModel(CLIPTextConfig(**config)).eval()
    ours = share_weights(TextEncoder, config, peer)
    ids = torch.randint(49408, (2, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert tiny.rel(ours(ids), peer(ids).last_hidden_state) < TOLERANCE


def share_weights(network, config, peer):
    """Ours on the peer's own tensors: full-size weights are in memory once."""
    with torch.device("meta"):
        ours = network(config)
    ours.load_state_dict(tiny.peer_state(peer), strict=True, assign=True)
    return ours.eval()
