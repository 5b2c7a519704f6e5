"""What docs/scale.md shows: two ranks against one on the toybox, in turns, and what a step sends.

    OMP_NUM_THREADS=1 python docs/scale.py [rounds]

A round is torchrun with one process and with two, a thread each. Steps are of 4 photographs and 4
class images: shared by the ranks, or on each; with DistributedDataParallel, and with FSDP2.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

from minibooth import toybox, train
from minibooth.bench import models
from minibooth.device import ranks
from minibooth.pipeline import to_device
from minibooth.text_encoder import Layer
from minibooth.training import prepare, start
from minibooth.training.settings import TrainConfig
from minibooth.unet import Transformer
from minibooth.vae import ResnetBlock

STEPS, WARM_UP, IMAGES = 12, 3, 32
BLOCKS = ResnetBlock, Transformer, Layer  # what FSDP2 gathers at a time


def run_of(folder: str, batch: int) -> start.Run:
    settings = toybox.default_run() | {"output_dir": folder, "num_class_images": IMAGES}
    settings |= {"sample_batch_size": 8, "train_batch_size": batch, "device": "cpu"}
    config = TrainConfig(**settings)
    return start.Run(config, start.load(config), torch.device("cpu"))


def now() -> tuple[float, float]:
    """Seconds by the clock, and of the CPU's work for this process, which others that share the
    cores do not lengthen as much."""
    return time.perf_counter(), time.process_time()


def since(begin: tuple[float, float], count: int) -> list[float]:
    return [(b - a) / count for a, b in zip(begin, now(), strict=True)]


def seconds(step, count: int) -> list[float]:
    """Of one of `count` steps, after some that are not counted; on the slowest rank."""
    for n in range(WARM_UP):
        step(n)
    ranks.wait()
    begin = now()
    for n in range(WARM_UP, WARM_UP + count):
        step(n)
    ranks.wait()
    return since(begin, count)


def training_step(folder: str, batch: int):
    run = run_of(folder, batch)
    batches, loss, _ = prepare.gather(run)
    adam = prepare.make_optimizer(run)
    update = train.one_update(ranks.averaged(loss, run.trained), adam, accumulate=1)

    def step(n: int) -> None:
        numbers = (to_device(torch.tensor(x), run.device) for x in (float(n + 1), 1.0))
        update(*numbers, *batches.draw(n))

    return step


def sharded_step(folder: str, batch: int):
    """The same loss, with weights, gradients and AdamW's averages divided by FSDP2."""
    run = run_of(folder, batch)
    batches, loss, _ = prepare.gather(run)
    networks = list(run.trained.values())
    for network in networks:
        network.requires_grad_(True)
        for block in [m for m in network.modules() if isinstance(m, BLOCKS)]:
            fully_shard(block)
        fully_shard(network)
    weights = [p for network in networks for p in network.parameters()]
    adam = torch.optim.AdamW(weights, lr=1e-4, foreach=True)

    def step(n: int) -> None:
        loss(batches.draw(n)).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        adam.zero_grad()

    return step


@ranks.joined()
def worker(out: str, folder: str) -> None:
    run = run_of(folder, 4)
    begin = now()
    prepare.gather(run)  # draws the class images
    found = {"images": since(begin, IMAGES)}
    found["shared"] = seconds(training_step(folder, 4 // ranks.count()), STEPS)
    found["each"] = seconds(training_step(folder, 4), STEPS)
    if ranks.count() > 1:
        found["each, FSDP2"] = seconds(sharded_step(folder, 4), STEPS)
    if ranks.rank() == 0:
        Path(out).write_text(json.dumps(found))


def measure(count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/found.json"
        given = ["--nproc_per_node", str(count), "--master_port", str(29500 + os.getpid() % 1000)]
        program = [sys.executable, "-m", "torch.distributed.run", *given, __file__, "worker"]
        subprocess.run([*program, out, f"{folder}/run"], check=True, capture_output=True)
        return json.loads(Path(out).read_text())


def compare(rounds: int) -> None:
    found = {1: [], 2: []}
    for _ in range(rounds):
        for count in found:
            found[count].append(measure(count))
            print(count, found[count][-1], f"load {os.getloadavg()[0]:.1f}", flush=True)
    for i, kind in enumerate(("clock", "CPU")):
        for what in found[1][0]:
            one, two = ([x[what][i] for x in found[n]] for n in found)
            ratio(f"{kind}: {what}, one rank over two", one, two)
        sharded, averaged = ([x[what][i] for x in found[2]] for what in ("each, FSDP2", "each"))
        ratio(f"{kind}: two ranks, FSDP2 over DDP", sharded, averaged)


def ratio(what: str, above: list[float], below: list[float]) -> None:
    """Of times in seconds, round by round: the median, and the least and greatest."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    seconds = f"{statistics.median(above):.2f} s and {statistics.median(below):.2f} s"
    print(f"{what}: {seconds}, ratio {middle:.2f} ({low:.2f} to {high:.2f})")


# ---- on paper -----------------------------------------------------------------------------------

# What a card does of the operations that the step is made of, TFLOP/s, and GB/s of its memory.
CARDS = {"a card of 50 TFLOP/s": (50, 900), "a card of 150 TFLOP/s": (150, 1500)}
LINKS = (10, 25, 200)  # GB/s out of a rank, and as many into it
ADAMW = 28  # bytes: weight, gradient and two averages are read, all but the gradient written


def paper() -> None:
    """Of SD 1.5's UNet at 512², batches of `batch` photographs and as many class images: how many
    times one card's samples n cards do, if the backward pass hides what is sent or waits for it."""
    unet = models.model("SD 1.5", torch.device("meta")).unet
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x = torch.empty(1, 4, 64, 64, device="meta")
        unet(x, torch.empty(1, device="meta"), torch.empty(1, 77, 768, device="meta"))
    forward, weights = counter.get_total_flops(), sum(p.numel() for p in unet.parameters())
    print(f"gradients {4 * weights / 1e9:.2f} GB, forward {forward / 1e12:.2f} TFLOP a sample")
    for card, (speed, memory) in CARDS.items():
        for batch in (1, 4):
            predict = 2 * batch * forward / (speed * 1e12)  # s
            backward, update = 2 * predict, ADAMW * weights / (memory * 1e9)
            alone = predict + backward + update
            print(f"{card}, batch {batch}: forward {predict:.3f} s, update {update:.3f} s")
            for n in (2, 4, 8):
                sent = 2 * (n - 1) / n * 4 * weights / 1e9  # GB, of a ring
                row = f"  {n} cards: {sent:.2f} GB, hidden from {sent / backward:.0f} GB/s;"
                for link in LINKS:
                    step = predict + max(backward, sent / link) + update
                    row += f" {link} GB/s: {n * alone / step:.1f}"
                print(row)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        paper()
        compare(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
