"""Low-rank adapters: against peft, on values; merging; what a tuned model's difference holds."""

import copy

import peers
import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig, CLIPTextModel

from minibooth import UserError, dreambooth, load, lora
from minibooth.schedule import Schedule
from minibooth.text_encoder import TextEncoder
from minibooth.unet import UNet

SCHEDULE = Schedule.from_config(tiny.scheduler_config())


def trained(network, targets="attention", rank=3, alpha=5.0, seed=1):
    """Adapters as training leaves them: B is not zero any more."""
    adapters = lora.create(network, rank, alpha, targets, seed)
    for i, a in enumerate(adapters.values()):
        a.B.data = 0.3 * tiny.randn(*a.B.shape, seed=100 + i)
    return adapters


def unet(kind="sd1"):
    network = tiny.randomize(UNet(tiny.unet_config(kind)))
    return network.requires_grad_(False)


def inputs(network, batch=2):
    width = network.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.in_features
    return (
        tiny.randn(batch, 4, 8, 8, seed=1),
        torch.tensor([3, 700, 41, 999][:batch]),
        tiny.randn(batch, 77, width, seed=2),
    )


def terms(network):
    """The two halves of a DreamBooth step."""
    width = inputs(network)[2].shape[-1]
    return [
        dreambooth.Term(
            tiny.randn(2, 4, 8, 8, seed=seed),
            tiny.randn(2, 4, 8, 8, seed=seed + 1),
            torch.tensor([seed, 900 - seed]),
            tiny.randn(2, 77, width, seed=seed + 2),
        )
        for seed in (10, 20)
    ]


# ---- against peft ------------------------------------------------------------------------------


def peft_twin(peer, ours, adapters, targets):
    """The peer with our weights and adapters."""
    names = [a.layer for a in adapters.values()]
    first = next(iter(adapters.values()))
    config = LoraConfig(r=len(first.A), lora_alpha=first.alpha, target_modules=names)
    inject_adapter_in_model(config, peer.requires_grad_(False))
    for a in adapters.values():
        layer = peer.get_submodule(a.layer)
        for half, value in (("lora_A", a.A), ("lora_B", a.B)):
            weight = getattr(layer, half)["default"].weight
            weight.data = value.detach().clone().view_as(weight)
    return peer


def assert_same_gradients(adapters, peer, tolerance=1e-5):
    ours, theirs = [], []
    for a in adapters.values():
        layer = peer.get_submodule(a.layer)
        ours += [a.A.grad.flatten(), a.B.grad.flatten()]
        theirs += [getattr(layer, n)["default"].weight.grad.flatten() for n in ("lora_A", "lora_B")]
    assert tiny.rel(torch.cat(ours), torch.cat(theirs)) < tolerance
    whole = torch.cat(theirs).norm()
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() < tolerance * whole


@pytest.mark.parametrize("targets", lora.TARGETS)
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_loss_and_gradients_of_a_step_equal_those_of_diffusers_with_peft(kind, targets):
    peer = tiny.randomize(UNet2DConditionModel.from_config(tiny.unet_config(kind)))
    ours = UNet(tiny.unet_config(kind)).requires_grad_(False)
    ours.load_state_dict(peer.state_dict())
    adapters = trained(ours, targets)
    peft_twin(peer, ours, adapters, targets)
    lora.attach(ours, adapters)
    instance, prior = terms(ours)
    step = dreambooth.step(ours, SCHEDULE, instance, prior, prior_loss_weight=0.7)
    theirs = dreambooth.step(
        lambda x, t, c: peer(x, t, c).sample, SCHEDULE, instance, prior, prior_loss_weight=0.7
    )
    assert torch.allclose(step.loss, theirs.loss, rtol=1e-5)
    step.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(adapters, peer)
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_the_text_encoders_adapters_equal_pefts(targets):
    config = tiny.text_config("sd1")
    peer = tiny.randomize(CLIPTextModel(CLIPTextConfig(**config)))
    ours = TextEncoder(config).requires_grad_(False)
    ours.load_state_dict(tiny.peer_state(peer))
    adapters = trained(ours, targets)
    peft_twin(getattr(peer, "text_model", peer), ours, adapters, targets)
    lora.attach(ours, adapters)
    ids = torch.randint(100, (2, 77), generator=torch.Generator().manual_seed(0))
    a, b = ours(ids), peer(ids).last_hidden_state
    assert tiny.rel(a, b) < 1e-5
    weights = tiny.randn(*a.shape)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    assert_same_gradients(adapters, getattr(peer, "text_model", peer))


def test_fresh_adapters_are_as_pefts():
    """A is uniform in ±1/√c_in: standard deviation 1/√(3 c_in); B is zero."""
    network = unet()
    adapters = lora.create(network, 64, alpha=64, seed=5)
    for a in adapters.values():
        c_in = a.A.shape[1]
        assert a.A.abs().max() <= c_in**-0.5 and not a.B.any()
        assert a.A.std().item() == pytest.approx((3 * c_in) ** -0.5, rel=0.1)
    again = lora.create(network, 64, alpha=64, seed=5)
    other = lora.create(network, 64, alpha=64, seed=6)
    assert all(
        torch.equal(a.A, b.A) for a, b in zip(adapters.values(), again.values(), strict=True)
    )
    assert not any(
        torch.equal(a.A, b.A) for a, b in zip(adapters.values(), other.values(), strict=True)
    )
    with pytest.raises(UserError, match="rank 0"):
        lora.create(network, 0, alpha=1)


# ---- what is adapted ---------------------------------------------------------------------------


def full_size(kind):
    with torch.device("meta"):
        return UNet(tiny.unet_config(kind)), TextEncoder(tiny.text_config(kind))


@pytest.mark.parametrize(
    "kind, targets, layers, numbers",
    [
        ("SD 1.5", "attention", (128, 48), (797_184, 294_912)),
        ("SD 1.5", "transformers", (192, 72), (1_695_744, 663_552)),
        ("SD 1.5", "all", (230, 72), (2_043_904, 663_552)),
        ("SD 2.1", "transformers", (192, 138), (1_695_744 + 4 * 32 * 256, 4 * 138 * 3072)),
    ],
)
def test_layers_and_trained_numbers_of_the_public_models(kind, targets, layers, numbers):
    """At rank 4. diffusers trains 797,184 numbers of SD 1.5's UNet; kohya has 192 and 72 modules,
    whose files of rank 128 in fp16 are known by their 144 MiB."""
    networks = full_size(kind)
    found = [lora.layers(n, targets).values() for n in networks]
    assert tuple(map(len, found)) == layers
    assert tuple(sum(4 * sum(lora.matrix(x).shape) for x in f) for f in found) == numbers
    if (kind, targets) == ("SD 1.5", "transformers"):
        assert 128 // 4 * sum(numbers) * 2 == 144 * 2**20


# ---- attached and merged -----------------------------------------------------------------------


def test_training_starts_from_the_model_itself_and_leaves_its_weights_alone():
    network = unet()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    want = network(*inputs(network))
    adapters = lora.create(network, 4, alpha=4)
    lora.attach(network, adapters)
    assert torch.equal(network(*inputs(network)), want)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.1)
    for _ in range(2):
        dreambooth.step(network, SCHEDULE, *terms(network)).loss.backward()
        optimizer.step()
    assert tiny.rel(network(*inputs(network)), want) > 0.1
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    lora.detach(adapters)
    assert torch.equal(network(*inputs(network)), want)


@pytest.mark.parametrize("targets", lora.TARGETS)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_merged_equals_attached(targets, strength):
    network = unet()
    base = network(*inputs(network))
    adapters = trained(network, targets)
    lora.attach(network, adapters, strength)
    attached = network(*inputs(network))
    lora.detach(adapters)
    lora.merge(network, adapters, strength)
    merged = network(*inputs(network))
    assert tiny.rel(attached, merged) < 1e-5
    assert torch.equal(merged, base) if strength == 0 else tiny.rel(merged, base) > 1e-2


def test_alpha_over_rank_scales_the_update():
    network = unet()
    [a, *_] = trained(network, rank=3, alpha=5.0).values()
    assert torch.allclose(a.delta(), 5 / 3 * a.B @ a.A)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_adapters_are_fp32_over_16_bit_layers(autocast):
    """Of layers on their own: a random UNet would make anything of bf16's rounding."""
    network = unet()
    adapters = trained(network, "all")
    for name, layer in lora.layers(network).items():
        a = adapters[name.replace(".", "_")]
        convolution = name.endswith("conv_shortcut")
        x = tiny.randn(2, layer.in_channels, 3, 3) if convolution else tiny.randn(2, a.A.shape[1])
        want = a.add(layer, (x,), layer(x))
        layer = layer if autocast else copy.deepcopy(layer).bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            x = x if autocast else x.bfloat16()
            got = a.add(layer, (x,), layer(x))
        assert got.dtype == torch.bfloat16
        assert tiny.rel(got.float(), want) < 0.02
        got.sum().backward()
        assert a.A.dtype == a.A.grad.dtype == a.B.grad.dtype == torch.float32
        assert a.A.grad.any() and a.B.grad.any()


def test_gradient_checkpointing_gives_the_same_gradients():
    network = unet()
    adapters = trained(network)
    lora.attach(network, adapters)
    network(*inputs(network)).square().sum().backward()
    want = [p.grad.clone() for p in adapters.parameters()]
    adapters.zero_grad()
    checkpoint(network, *inputs(network), use_reentrant=False).square().sum().backward()
    for p, gradient in zip(adapters.parameters(), want, strict=True):
        assert tiny.rel(p.grad, gradient) < 1e-5


def test_drawing_with_attached_adapters_equals_drawing_with_merged_ones():
    """Also where keys and values of the text are projected only once."""
    sd = load(peers.model()[0])
    adapters = {name: trained(sd.networks[name]) for name in ("unet", "text_encoder")}
    settings = dict(steps=3, output="latent", latents=tiny.randn(1, 4, 8, 8))
    base = sd.generate("a sks dog", **settings)
    for name, of_it in adapters.items():
        lora.attach(sd.networks[name], of_it)
    attached = sd.generate("a sks dog", **settings)
    assert tiny.rel(attached, base) > 1e-2
    for name, of_it in adapters.items():
        lora.detach(of_it)
        lora.merge(sd.networks[name], of_it)
    assert tiny.rel(sd.generate("a sks dog", **settings), attached) < 1e-5


# ---- extraction --------------------------------------------------------------------------------


def tuned_from(base, size=0.1):
    tuned = copy.deepcopy(base)
    for i, layer in enumerate(lora.layers(tuned).values()):
        layer.weight.data += size * tiny.randn(*layer.weight.shape, seed=i)
    return tuned


def test_extraction_at_full_rank_gives_the_difference_back():
    base = unet()
    tuned = tuned_from(base)
    found = lora.extract(base, tuned, rank=64)
    assert found.kept == pytest.approx(found.of_layers, rel=1e-6)
    assert found.of_layers == pytest.approx(found.of_all, rel=1e-6)
    lora.merge(base, found.adapters)
    for p, want in zip(base.parameters(), tuned.parameters(), strict=True):
        assert torch.allclose(p, want, atol=1e-5)


def test_extraction_keeps_the_largest_singular_values():
    base = unet()
    tuned = tuned_from(base)
    tuned.conv_in.weight.data += 1  # a 3×3 convolution: a change that no adapter holds
    found = lora.extract(base, tuned, rank=2, targets="attention")
    kept = of_layers = 0.0
    for name, layer in lora.layers(base, "attention").items():
        difference = (tuned.get_submodule(name).weight - layer.weight).double()
        s = torch.linalg.svdvals(difference).square()
        kept, of_layers = kept + s[:2].sum().item(), of_layers + s.sum().item()
        a = found.adapters[name.replace(".", "_")]
        assert len(a.A) == 2 and torch.linalg.matrix_rank(a.delta()) == 2
        error = (a.delta() - difference).square().sum().item()
        assert error == pytest.approx(s[2:].sum().item(), rel=1e-4)
    assert found.kept == pytest.approx(kept, rel=1e-5)
    assert found.of_layers == pytest.approx(of_layers, rel=1e-5)
    assert found.of_all > found.of_layers + base.conv_in.weight.numel() * 0.99


def test_layers_that_did_not_change_are_left_out():
    base = unet()
    tuned = copy.deepcopy(base)
    layer = tuned.mid_block.attentions[0].proj_in
    layer.weight.data += 0.1
    found = lora.extract(base, tuned, rank=4)
    [adapter] = found.adapters.values()
    assert adapter.layer == "mid_block.attentions.0.proj_in"
    lora.merge(base, found.adapters)
    assert torch.allclose(base.mid_block.attentions[0].proj_in.weight, layer.weight, atol=1e-6)
