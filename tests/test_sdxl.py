"""SDXL's networks and pictures against diffusers and transformers, on small random models."""

from types import SimpleNamespace

import peers
import pytest
import torch
from tiny import rel

from minibooth import load
from minibooth.text_encoder import Condition
from minibooth.unet import UNet

PROMPTS = ["a sks dog!", "a cat in the snow"]


@pytest.fixture(scope="module")
def both():
    folder, pipe = peers.model("sdxl")
    return load(folder), pipe


def test_a_prompt_is_encoded_as_diffusers_does(both):
    sd, pipe = both
    context, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    found = sd.encode_prompt(PROMPTS)
    assert rel(found.context, context) < 1e-5 and rel(found.pooled, pooled) < 1e-5
    assert found.sizes.tolist() == [[32, 32, 0, 0, 32, 32]] * 2


OTHER_DEPTHS = {  # every level attends, the first one deepest
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "transformer_layers_per_block": [3, 1, 2],
}


@pytest.mark.parametrize("changes", [{}, OTHER_DEPTHS], ids=["as the public one", "other depths"])
def test_unet_and_gradients(both, changes):
    sd, pipe = both
    if changes:
        pipe = peers.sdxl(layers=2, **changes)
        sd = SimpleNamespace(unet=UNet(dict(pipe.unet.config)))
        sd.unet.load_state_dict(pipe.unet.state_dict())
    g = torch.Generator().manual_seed(1)
    x, context, pooled = (
        torch.randn(s, generator=g) for s in ((3, 4, 16, 16), (3, 77, 80), (3, 24))
    )
    sizes = torch.tensor([[480, 640, 0, 16, 32, 32], [32, 32, 0, 0, 32, 32], [99, 5, 7, 0, 32, 32]])
    t = torch.tensor([3, 500, 999])
    ours = sd.unet(x, t, Condition(context, pooled, sizes))
    theirs = pipe.unet(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes})
    assert rel(ours, theirs.sample) < 1e-5
    ours.square().mean().backward()
    theirs.sample.square().mean().backward()
    peers.same_gradients(sd.unet, pipe.unet)


@pytest.mark.parametrize("negative", ["", "a cat"])
def test_pictures_are_those_of_diffusers_pipeline(both, negative):
    sd, pipe = both
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    ours = sd.generate(
        PROMPTS, steps=8, negative_prompt=negative, guidance_scale=5, latents=latents, output="pt"
    )
    theirs = pipe(
        PROMPTS,
        num_inference_steps=8,
        negative_prompt=[negative] * 2 if negative else None,
        guidance_scale=5,
        latents=latents,
        output_type="pt",
        height=32,
        width=32,
    ).images
    assert (ours - theirs).abs().max() < 2e-2
