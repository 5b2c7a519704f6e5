"""Where --device auto ends on the CPU: how long a run takes there, before it is begun."""

import time

import torch

from ..common.errors import UserError
from ..device import no_gpu
from ..device.memory import checkpoint_gradients
from ..device.settle import blank
from ..formats.configs import is_public_size
from ..pipeline import StableDiffusion
from . import passes

STEPS = 2  # that are measured; the first one also reads the weights from the disk


def refuse(sd: StableDiffusion, config, resolution: int, device: torch.device) -> None:
    """Raise UserError where a model of public size would train on a CPU that nobody asked for: that
    takes a day, and few of those who begin it mean to. Small models go on."""
    if config.device != "auto" or device.type != "cpu" or not is_public_size(sd.configs):
        return
    print(f"no GPU can be used: {no_gpu.why()}. Measuring {STEPS} steps on the CPU …", flush=True)
    step = seconds_per_step(sd, config, resolution)
    of_pass = step / passes.samples(config) / passes.back_and_forth(config)
    run = of_pass * passes.to_come(config, config.num_class_images * config.uses_prior).total
    raise UserError(
        f"no GPU can be used: {no_gpu.why()}. On the CPU this run takes about "
        f"{passes.in_words(run)} ({step:.2g} s a step, as measured): --device cpu goes "
        "on with it all the same"
    )


def seconds_per_step(sd: StableDiffusion, config, resolution: int) -> float:
    """Of the UNet in a training step, forward and backward, on zeros; the last of STEPS."""
    batch, side, unet = passes.samples(config), resolution // sd.vae.factor, sd.configs["unet"]
    whole = config.method == "dreambooth"  # else the gradients only pass through
    sd.unet.requires_grad_(whole)
    x = torch.zeros(batch, unet["in_channels"], side, side, requires_grad=not whole)
    t, c = torch.full((batch,), sd.schedule.T // 2), blank(unet, batch, sd.device)
    for _ in range(STEPS):
        begin = time.perf_counter()
        with checkpoint_gradients(sd.unet, config.gradient_checkpointing):
            sd.unet(x, t, c).square().mean().backward()
        seconds = time.perf_counter() - begin
        sd.unet.zero_grad()
    sd.unet.requires_grad_(True)
    return seconds
