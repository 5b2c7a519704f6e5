"""SDXL at its full size: counted on the meta device, and with random weights on a CPU, which takes
minutes and 6 GB."""

import resource
import time
from dataclasses import replace

import pytest
import torch

from minibooth import lora
from minibooth.bench import models
from minibooth.device import memory, settle
from minibooth.dreambooth import Term, step
from minibooth.formats.scheduler import read_schedule
from minibooth.unet import UNet


def test_sdxl_is_as_large_as_the_public_files():
    """As the headers of the files on the hub have it."""
    sd = models.model("SDXL", torch.device("meta"))
    found = {
        name: (sum(p.numel() for p in net.parameters()), len(net.state_dict()))
        for name, net in sd.networks.items()
    }
    assert found == {
        "unet": (2_567_463_684, 1680),
        "vae": (83_653_863, 248),
        "text_encoder": (123_060_480, 196),
        "text_encoder_2": (694_659_840, 517),
    }


@pytest.mark.slow
def test_a_lora_step_at_256_runs_on_a_cpu():
    """As a run with half-precision weights has it: the UNet in bf16, the LoRA of rank 16 in fp32.
    Prints the seconds of a forward pass and of a step, and the process's peak so far."""
    config = models.CONFIGS["SDXL"]["unet"]
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet(config).to(torch.bfloat16).requires_grad_(False)
    unet.to_empty(device="cpu")
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.02 if p.ndim > 1 else 0.1)
    x, eps = torch.randn(2, 1, 4, 32, 32)
    t, cpu = torch.tensor([500]), torch.device("cpu")
    c = replace(settle.blank(config, 1, cpu).whole(256, 256), context=torch.randn(1, 77, 2048))

    def gigabytes():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9

    with torch.autocast("cpu", torch.bfloat16):
        start = time.perf_counter()
        with torch.no_grad():
            out = unet(x, t, c)
        spent = time.perf_counter() - start
        print(f"\nforward at 256²: {spent:.1f} s, {gigabytes():.2f} GB at most")
        assert out.isfinite().all() and out.shape == x.shape

        adapters = lora.create(unet, 16, 16, "attention")
        lora.attach(unet, adapters)
        schedule, start = read_schedule(models.CONFIGS["SDXL"]["scheduler"]), time.perf_counter()
        with memory.checkpoint_gradients(unet):
            loss = step(unet, schedule, Term(x, eps, t, c), None).loss
    loss.backward()
    spent = time.perf_counter() - start
    print(f"a LoRA step at 256²: {spent:.1f} s, {gigabytes():.2f} GB at most")
    gradients = [p.grad for name, p in adapters.named_parameters() if name.endswith("B")]
    assert len(gradients) == 560 and all(g.isfinite().all() and g.any() for g in gradients)
    assert gigabytes() < 7  # of which the UNet's weights are 5.13
