"""Sampling, against diffusers' pipeline and loops built from its schedulers."""

import dataclasses

import numpy as np
import peers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

import minibooth
from minibooth.common.errors import UserError
from minibooth.formats.checks import NotFinite

PROMPTS = ["a sks dog in the snow", "photo of a cat"]


def rel(a, b):
    assert a.shape == b.shape
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models():
    """Ours and diffusers' of the same weights: ε (SD 1.x) and v (SD 2.x)."""
    return {
        kind: (minibooth.load(peers.model(kind)[0]), peers.model(kind)[1])
        for kind in ("sd1", "sd2")
    }


@pytest.fixture(scope="module")
def sd(models):
    return models["sd1"][0]


# ---- diffusers' pipeline -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize(
    "steps, guidance, negative, size",
    [
        (20, 7.5, "", (8, 8)),
        (7, 7.5, "snow, cat!", (8, 12)),
        (3, 7.5, "the dog", (7, 5)),  # odd: not divisible by the UNet's downsampling
        (7, 1.0, "", (12, 8)),
        (3, 3.0, "", (8, 8)),
        (3, 0.5, "", (8, 8)),  # not above 1: no guidance
    ],
)
def test_equal_to_diffusers_pipeline(kind, steps, guidance, negative, size, models):
    ours, theirs = models[kind]
    prompts = PROMPTS[:1] if steps == 20 else PROMPTS
    latents = randn(len(prompts), 4, *size)
    settings = dict(negative_prompt=negative, guidance_scale=guidance, latents=latents)
    want = theirs(
        prompts,
        **settings | {"negative_prompt": [negative] * len(prompts)},
        num_inference_steps=steps,
        height=64,  # latents set the size; diffusers only wants multiples of 8 here
        width=64,
        output_type="latent",
    ).images
    got = ours.generate(prompts, **settings, steps=steps, output="latent")
    assert rel(got, want) < 1e-4
    assert rel(got, latents) > 0.05  # something was done

    if steps == 20:
        return  # the pictures are looked at after fewer steps
    pictures = ours.generate(prompts, **settings, steps=steps, output="pt")
    want = (theirs.vae.decode(want / theirs.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert rel(pictures, want.detach()) < 1e-4


def test_the_settings_matter(sd):
    """Each one that the test above sets changes the picture: it could fail."""
    base = dict(steps=3, latents=randn(1, 4, 8, 8), output="latent")
    first = sd.generate(PROMPTS[:1], **base)
    for change in (
        {"guidance_scale": 1.0},
        {"negative_prompt": "snow"},
        {"steps": 4},
        {"sampler": "ddpm"},
        {"eta": 0.5},
    ):
        assert rel(sd.generate(PROMPTS[:1], **base | change), first) > 1e-4, change
    assert rel(sd.generate(PROMPTS[1:], **base), first) > 1e-4


@pytest.mark.parametrize(
    ("network", "output"), [("unet", "latent"), ("vae", "pil"), ("text encoder", "pt")]
)
def test_what_is_not_finite_is_not_drawn_as_black(network, output):
    sd = minibooth.load(peers.model()[0])
    weight = {
        "unet": sd.unet.conv_out.bias,
        "vae": sd.vae.decoder.conv_out.bias,
        "text encoder": sd.text_encoder.final_layer_norm.bias,
    }[network]
    with torch.no_grad():
        weight[0] = torch.inf
    with pytest.raises(NotFinite, match=f"^the {network} gives NaN or infinity"):
        sd.generate("sks", steps=1, output=output)


# ---- noise on the way --------------------------------------------------------------------------


def loop(pipe, scheduler, prompt, seed, steps, guidance, size, eta=None):
    """One picture, step by step with diffusers' scheduler, all noise from one seeded generator."""
    generator = torch.Generator().manual_seed(seed)
    context, negative = pipe.encode_prompt(prompt, "cpu", 1, True, "cat")
    x = torch.randn((1, 4, *size), generator=generator)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        with torch.no_grad():
            towards = pipe.unet(x, t, context).sample
            without = pipe.unet(x, t, negative).sample
        prediction = without + guidance * (towards - without)
        if eta is None:
            x = scheduler.step(prediction, t, x, generator=generator).prev_sample
        else:
            noise = torch.randn((1, 4, *size), generator=generator)
            x = scheduler.step(prediction, t, x, eta=eta, variance_noise=noise).prev_sample
    return x


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise_equals_an_independent_loop(kind, eta, models):
    ours, theirs = models[kind]
    scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    want = [loop(theirs, scheduler, p, 11 + i, 6, 4.0, (8, 6), eta) for i, p in enumerate(PROMPTS)]
    got = ours.generate(
        PROMPTS,
        negative_prompt="cat",
        steps=6,
        guidance_scale=4.0,
        seed=11,
        eta=eta,
        height=16,
        width=12,
        output="latent",
    )
    assert rel(got, torch.cat(want)) < 1e-4


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("steps", [5, 10])
def test_ddpm_equals_an_independent_loop(kind, steps, models):
    ours, theirs = models[kind]
    scheduler = DDPMScheduler.from_config(theirs.scheduler.config)
    want = [loop(theirs, scheduler, p, 5 + i, steps, 2.0, (8, 6)) for i, p in enumerate(PROMPTS)]
    got = ours.generate(
        PROMPTS,
        negative_prompt="cat",
        steps=steps,
        guidance_scale=2.0,
        seed=5,
        sampler="ddpm",
        height=16,
        width=12,
        output="latent",
    )
    assert rel(got, torch.cat(want)) < 1e-4


# ---- seeds and batches -------------------------------------------------------------------------

FIVE = ["a dog", "a cat", "the snow", "sks", "photo of a dog"]


@pytest.mark.parametrize("settings", [{}, {"eta": 0.7}, {"sampler": "ddpm"}], ids=str)
def test_pictures_do_not_depend_on_the_batch(settings, sd):
    settings = settings | dict(steps=3, output="latent", height=16, width=16)
    together = sd.generate(FIVE, seed=40, **settings)
    for batch_size in (1, 2, 5):
        assert rel(sd.generate(FIVE, seed=40, batch_size=batch_size, **settings), together) < 1e-5
    for i, prompt in enumerate(FIVE):  # picture i alone, by its own seed
        assert rel(sd.generate(prompt, seed=40 + i, **settings), together[i : i + 1]) < 1e-5
    assert rel(sd.generate(FIVE, seed=41, **settings), together) > 0.1


def test_the_same_seed_draws_the_same_picture(sd):
    settings = dict(steps=2, output="pt", sampler="ddpm")
    for seed in (0, 1, 2**40):
        assert torch.equal(*(sd.generate("a dog", seed=seed, **settings) for _ in range(2)))
    torch.manual_seed(123)  # nothing draws from the global generator
    first = torch.rand(1)
    torch.manual_seed(123)
    sd.generate("a dog", steps=2, output="latent", eta=1.0)
    assert torch.equal(torch.rand(1), first)


def test_the_first_noise_is_that_of_a_cpu_generator(sd):
    settings = dict(steps=2, output="latent", guidance_scale=1.0)
    latents = torch.cat([randn(1, 4, 16, 16, seed=7), randn(1, 4, 16, 16, seed=8)])
    given = sd.generate(PROMPTS, latents=latents, **settings)
    assert torch.equal(sd.generate(PROMPTS, seed=7, **settings), given)


# ---- outputs -----------------------------------------------------------------------------------


def test_outputs_agree(sd):
    settings = dict(steps=2, height=16, width=24)
    latent, pt, pil = (sd.generate(PROMPTS, output=o, **settings) for o in ("latent", "pt", "pil"))
    assert latent.shape == (2, 4, 8, 12) and pt.shape == (2, 3, 16, 24)
    assert torch.equal(sd.decode(latent), pt)
    assert pt.min() >= 0 and pt.max() <= 1 and pt.dtype == torch.float32
    for picture, tensor in zip(pil, pt, strict=True):
        assert picture.mode == "RGB" and picture.size == (24, 16)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        assert (pixels - tensor).abs().max() <= 0.5 / 255 + 1e-6


def test_sizes(sd):
    assert sd.image_size == 32  # the peer's sample_size 16, two pixels per latent

    def drawn(**settings):
        return sd.generate("a dog", steps=1, output="pt", **settings).shape[-2:]

    assert drawn() == (32, 32)
    assert drawn(height=16) == (16, 32)
    assert drawn(latents=randn(1, 4, 6, 10)) == (12, 20)
    assert drawn(latents=randn(1, 4, 6, 10), height=12, width=20) == (12, 20)


def test_on_step_is_called_after_every_step_of_every_batch(sd):
    calls = []
    sd.generate(FIVE, steps=3, batch_size=2, output="latent", on_step=lambda: calls.append(1))
    assert len(calls) == 9


def test_what_is_drawn_can_be_trained_on(sd):
    """Tensors of inference mode could not: the class images' latents are such a case."""
    x = sd.generate("a dog", steps=1, output="latent")
    weight = torch.ones(1, requires_grad=True)
    (weight * x).sum().backward()
    assert weight.grad.item() == pytest.approx(x.sum().item(), rel=1e-3, abs=1e-3)


def test_encode_prompt_is_the_tokenizer_and_the_text_encoder(models):
    for ours, theirs in models.values():
        context, negative = theirs.encode_prompt(PROMPTS, "cpu", 1, True, ["", ""])
        assert rel(ours.encode_prompt(PROMPTS), context) < 1e-5
        assert rel(ours.encode_prompt([""]), negative[:1]) < 1e-5
        assert not ours.encode_prompt(PROMPTS).requires_grad


# ---- wrong settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"prompts": []}, "no prompts"),
        ({"steps": 0}, "from 1 to 1000"),
        ({"steps": 1001}, "from 1 to 1000"),
        ({"sampler": "euler"}, "ddim, ddpm"),
        ({"output": "np"}, "pil, pt, latent"),
        ({"height": 15}, "multiples of 2"),
        ({"width": -16}, "multiples of 2"),
        ({"eta": -0.1}, "from 0"),
        ({"eta": 1.5}, "to 1"),
        ({"eta": float("nan")}, "eta"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**64}, "seed"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "1 prompts"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"\[1, 3, 8, 8\]"),
        ({"latents": torch.zeros(1, 4, 8, 8), "height": 32}, r"\[1, 4, 16, 8\]"),
        ({"latents": torch.zeros(4, 8, 8)}, r"\[4, 8, 8\]"),
    ],
    ids=str,
)
def test_wrong_settings(settings, words, sd):
    with pytest.raises(UserError, match=words) as error:
        sd.generate(**{"prompts": ["a dog"], "steps": 2, "output": "latent"} | settings)
    assert "\n" not in str(error.value)


def test_an_inpainting_model_says_that_it_cannot_draw():
    with pytest.raises(UserError, match="inpainting"):
        minibooth.load(peers.model("inpaint")[0]).generate("a dog", steps=1)


# ---- precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_vae_stays_fp32_under_fp16(dtype, sd):
    half = minibooth.load(peers.model("sd1")[0], dtype=dtype)
    assert {p.dtype for p in half.unet.parameters()} == {dtype}
    assert {p.dtype for p in half.text_encoder.parameters()} == {dtype}
    want = torch.float32 if dtype == torch.float16 else torch.bfloat16
    assert {p.dtype for p in half.vae.parameters()} == {want}
    settings = dict(steps=3, output="latent", latents=randn(1, 4, 8, 8), guidance_scale=2.0)
    full = sd.generate("a dog", **settings)
    drawn = half.generate("a dog", **settings)
    assert drawn.dtype == torch.float32  # the trajectory itself is never rounded
    assert rel(drawn, full) < 0.05


def test_fingerprints_tell_models_apart(models, sd):
    prints = {kind: ours.fingerprint() for kind, (ours, _) in models.items()}
    assert len(set(prints.values())) == 2
    assert minibooth.load(peers.model("sd1")[0]).fingerprint() == prints["sd1"]
    changed = minibooth.load(peers.model("sd1")[0])
    with torch.no_grad():
        changed.unet.conv_out.bias += 1
    assert changed.fingerprint() != prints["sd1"]
    other = dataclasses.replace(
        sd, schedule=dataclasses.replace(sd.schedule, prediction_type="v_prediction")
    )
    assert other.fingerprint() != prints["sd1"]
