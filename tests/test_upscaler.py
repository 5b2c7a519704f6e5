"""The second stage against diffusers, on small random models."""

import numpy as np
import peers
import pytest
import torch
import torch.nn.functional as F
from tiny import rel

import minibooth
from minibooth import ops
from minibooth.dreambooth import Term, step
from minibooth.text_encoder import Condition
from minibooth.upscaler import seeing


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    pipe, folder = peers.upscaler(), tmp_path_factory.mktemp("x4")
    peers.write(folder, pipe, "!")
    return minibooth.load(folder), pipe


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_unet_and_gradients(both):
    up, pipe = both
    x, context = drawn(3, 7, 16, 12), drawn(3, 77, 32, seed=1)
    t, level = torch.tensor([3, 500, 999]), torch.tensor([0, 20, 349])
    ours = up.unet(x, t, Condition(context, level=level))
    theirs = pipe.unet(x, t, context, class_labels=level).sample
    assert rel(ours, theirs) < 1e-5
    ours.square().mean().backward()
    theirs.square().mean().backward()
    peers.same_gradients(up.unet, pipe.unet)


def test_one_training_step_is_the_equation(both):
    """Loss and gradients against the formula, written anew: v of z, the small picture beside it."""
    up, pipe = both
    z, eps, eta, x = (drawn(3, 4, 16, 16, seed=i) for i in range(4))
    small, eta = x[:, :3].clamp(-1, 1), eta[:, :3]
    t, s, c = torch.tensor([9, 400, 990]), torch.tensor([0, 7, 20]), drawn(3, 77, 32, seed=9)
    alpha_bar = (1 - torch.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2).cumprod(0)

    def of(times):
        share = alpha_bar[times].view(-1, 1, 1, 1)
        return share.sqrt(), (1 - share).sqrt()

    (a, b), (a_s, b_s) = of(t), of(s)
    seen = torch.cat([a * z + b * eps, a_s * small + b_s * eta], dim=1)
    answer = pipe.unet(seen, t, c, class_labels=s).sample
    wanted = F.mse_loss(answer, a * eps - b * z)
    pipe.unet.zero_grad(), up.unet.zero_grad()
    wanted.backward()
    unet = seeing(up.unet, up.noised(small, s, eta))
    result = step(unet, up.schedule, Term(z, eps, t, Condition(c, level=s)), None)
    result.loss.backward()
    assert rel(result.loss, wanted) < 1e-5
    peers.same_gradients(up.unet, pipe.unet)


@pytest.mark.parametrize("negative", ["", "a cat"])
def test_pictures_are_those_of_diffusers_pipeline(both, negative):
    """From the same noises, which its pipeline draws itself: the small picture's first."""
    up, pipe = both
    pictures = drawn(2, 3, 8, 16, seed=5).sigmoid()
    g = torch.Generator().manual_seed(4)
    noise, latents = (torch.randn(2, n, 8, 16, generator=g) for n in (3, 4))
    prompts = ["a sks dog", "a cat in the snow"]
    ours = up.upscale(
        pictures,
        prompts,
        steps=6,
        noise_level=20,
        negative_prompt=negative,
        latents=latents,
        noise=noise,
        output="pt",
    )
    theirs = pipe(
        prompts,
        image=2 * pictures - 1,
        num_inference_steps=6,
        noise_level=20,
        negative_prompt=[negative] * 2,
        guidance_scale=9.0,
        latents=latents,
        generator=torch.Generator().manual_seed(4),
        output_type="np",
    ).images
    assert ours.shape == (2, 3, 32, 64)
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() - theirs).max() < 2e-2


@pytest.mark.parametrize("limit", [1, 100, 48 * 7, 48 * 48 - 1])
def test_attention_in_parts_is_attention(limit, monkeypatch):
    """Of 48 queries; with gradients, which training beside a large picture would want."""
    q, k, v = (drawn(2, 3, 48, 8, seed=i).requires_grad_() for i in range(3))
    whole = ops.attention(q, k, v)
    wanted = torch.autograd.grad(whole.square().sum(), (q, k, v))
    monkeypatch.setattr(ops, "SCORES", limit)
    calls = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape) or sdpa(*a, **k)
    )
    parts = ops.attention(q, k, v)
    assert len(calls) > 1 and max(n for *_, n, _ in calls) * 48 <= max(limit, 48)
    assert rel(parts, whole) < 1e-6
    for ours, theirs in zip(
        torch.autograd.grad(parts.square().sum(), (q, k, v)), wanted, strict=True
    ):
        assert rel(ours, theirs) < 1e-5


def test_attention_is_whole_where_its_scores_fit(monkeypatch):
    """As many pixels as an upscaler's training and Stable Diffusion at 1024² have in the VAE: not
    even a view is made, whose gradient would be copied."""
    q, calls = torch.empty(1, 1, 16_384, 512, device="meta"), []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **_: calls.append(a) or a[0])
    assert ops.attention(q, q, q) is q
    assert calls == [(q, q, q)]
