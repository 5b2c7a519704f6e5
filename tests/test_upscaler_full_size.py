"""The upscaler at its full size with random weights on a CPU, which takes minutes and 10 GB."""

import resource
import time

import pytest
import torch

from minibooth import train
from minibooth.bench import models
from minibooth.device.precision import Precision
from minibooth.training.data import Batch, Drawn
from minibooth.training.loss import Loss
from minibooth.training.optimizer import Update

CPU = torch.device("cpu")


def gigabytes() -> float:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


@pytest.mark.slow
def test_a_picture_is_enlarged_and_a_step_trains_on_a_cpu():
    """64² to 256² in two steps with guidance; then a training step of all weights in fp32, AdamW
    and all, at 128². Prints the seconds of both and the process's peak after each."""
    up = models.model("x4", CPU)
    start = time.perf_counter()
    [large] = up.upscale(torch.rand(1, 3, 64, 64), ["a sks dog"], steps=2, output="pt")
    spent = time.perf_counter() - start
    print(f"\n64² enlarged in 2 steps: {spent:.1f} s, {gigabytes():.2f} GB at most")
    assert large.shape == (3, 256, 256) and large.std() > 0.01

    ids, g = up.tokenizer(["a sks dog"]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        loss = Loss(up, ids, up.encode(ids), 1.0, None, Precision("no", CPU), True)
    x0, eps = torch.randn(2, 1, 4, 32, 32, generator=g)
    small, eta = torch.randn(2, 1, 3, 32, 32, generator=g)
    of_batch = {"small": small.clamp(-1, 1), "level": torch.tensor([7]), "eta": eta}
    sizes = torch.zeros(1, 6, dtype=torch.int64)
    batch = Batch(Drawn(x0, eps, torch.tensor([500]), sizes, **of_batch), None)
    before = up.unet.conv_in.weight.clone()
    adam = Update([(1e-4, list(up.unet.parameters()))], 1e-2, 1.0, scaled=False)
    start = time.perf_counter()
    values = train.one_update(loss, adam)(torch.tensor(1.0), torch.tensor(1.0), batch)
    spent = time.perf_counter() - start
    print(f"a training step at 128²: {spent:.1f} s, {gigabytes():.2f} GB at most")
    assert values.isfinite().all() and values[0] > 0 and adam.bad_step < 0
    change = (up.unet.conv_in.weight - before).abs()
    assert change.max() <= 1.1e-4 and change.mean() > 1e-6
    assert gigabytes() < 12
