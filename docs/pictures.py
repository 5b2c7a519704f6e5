"""python docs/pictures.py: draw the pictures of tutorial.md again, from the toybox."""

from pathlib import Path

import torch
from PIL import Image

import minibooth
from minibooth import schedule
from minibooth.common import sheets
from minibooth.common.pictures import to_pil
from minibooth.formats import hub
from minibooth.training import photos, report

TIMESTEPS = (0, 100, 250, 500, 750, 999)
SCALES = (1.0, 2.0, 4.0, 10.0, 30.0)


@torch.no_grad()
def noise(sd: minibooth.StableDiffusion) -> Image.Image:
    """A photograph at several t, and what the network takes the clean picture to be."""
    photo = photos.load_photos(hub.toybox() / "subjects" / "spotted_dog", sd.image_size).images[:1]
    x0 = sd.vae.encode(photo)[0] * sd.vae.scaling_factor
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(TIMESTEPS)
    alpha_bar_t = sd.schedule.alpha_bar[t]
    x_t = schedule.q_sample(x0, eps, alpha_bar_t)  # (6, 4, 16, 16)
    prediction = sd.unet(x_t, t, sd.encode_prompt(["a dog"] * len(t)))
    x0_hat, _ = schedule.split(x_t, prediction, alpha_bar_t, sd.schedule.prediction_type)
    rows = [to_pil(2 * sd.decode(latents) - 1) for latents in (x_t, x0_hat)]
    headings = [f"t = {t}" for t in TIMESTEPS]
    return sheets.grid(sheets.enlarged(rows), ["x_t, decoded", "x0 as estimated"], headings)


def guidance(sd: minibooth.StableDiffusion) -> Image.Image:
    """One prompt, five noises, several guidance scales."""
    prompts = ["a dog in the snow"] * 5
    rows = [sd.generate(prompts, steps=25, guidance_scale=scale) for scale in SCALES]
    return sheets.grid(sheets.enlarged(rows), [f"guidance {scale:g}" for scale in SCALES])


if __name__ == "__main__":
    sd, here = minibooth.load("toybox"), Path(__file__).parent
    report.save_image(noise(sd), here / "noise.png")
    report.save_image(guidance(sd), here / "guidance.png")
