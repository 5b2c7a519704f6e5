"""Where a step's time goes, counted: kernels launched, bytes moved and FLOP of the UNet and of a
training step, on an H100 that is not there. No GPU and no weights are wanted; nothing is measured.
"""

import importlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn

from .. import ops
from ..common.files import write_json, write_text
from ..device.precision import Precision
from ..formats.checkpoint import memory_format
from ..formats.public import SD_SCHEDULER
from ..formats.scheduler import read_schedule
from ..pipeline import StableDiffusion
from ..schedule import Schedule
from ..text_encoder import Condition
from ..train import one_update
from ..training import prepare
from ..training.data import Batch, Drawn
from ..training.loss import Loss
from ..training.settings import TrainConfig
from ..unet import UNet
from .counter import KINDS, Counter
from .measure import versions
from .models import CONFIGS
from .no_card import CARD, card
from .sides import OURS, Row, peers, their_step

RATES = {"bytes": 3.35e12, "flops": 989e12}  # per second, by an H100 SXM's data sheet
ABOUT = (
    "Counted, not measured: what SD 1.5's UNet launches, moves and computes at 512², by PyTorch's "
    "operators, and the least time that the data sheet of an H100 gives for it (3.35 TB/s; 989 "
    "TFLOP/s in 16 bits). No card was asked. A step is of one photograph and one class image."
)

# ---- what is counted ---------------------------------------------------------------------------


def unet(who: str, config: dict, dtype: torch.dtype) -> nn.Module:
    """On the card, each in the layout in which its side has it."""
    order = torch.preserve_format
    with CARD:
        if who == OURS:
            network, order = UNet(config), memory_format("unet", CARD)
        else:
            peer = importlib.import_module("diffusers").UNet2DConditionModel
            network = peer.from_config(config)
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                like = order if p.ndim == 4 else torch.preserve_format
                module._parameters[name] = nn.Parameter(p.detach().to(dtype, memory_format=like))
    return network


def inputs(batch: int, config: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and texts."""
    side, width = config["sample_size"], config["cross_attention_dim"]
    x = torch.empty(batch, config["in_channels"], side, side, device=CARD)
    t = torch.zeros(batch, dtype=torch.int64, device=CARD)
    return x, t, torch.empty(batch, 77, width, device=CARD)


def forward(row: Row, who: str, config: dict) -> Counter:
    """The UNet, without gradients: in fp16; or, as class images are drawn, under bf16 autocast with
    weights in fp32, whose 16-bit copies were made by the call before."""
    fp16 = row.precision == "fp16"
    with card(row.kernels), torch.no_grad():
        network = unet(who, config, torch.float16 if fp16 else torch.float32)
        x, t, context = inputs(row.batch, config)
        if fp16:
            x, context = x.half(), context.half()
        with Precision("no" if fp16 else row.precision, CARD).autocast():
            for _ in range(1 if fp16 else 2):
                with Counter() as counter:
                    network(x, t, context)
    return counter


def our_step(
    row: Row, network: nn.Module, schedule: Schedule, batch: Batch, contexts: Condition
) -> Callable[[], Tensor]:
    """The training program's own update."""
    config = TrainConfig(mixed_precision=row.precision, **dict(row.settings))
    schedule = replace(schedule, alpha_bar=torch.empty(schedule.T, device=CARD))
    sd = StableDiffusion(None, None, None, network, schedule, {})
    precision = Precision(row.precision, CARD)
    how = precision, config.gradient_checkpointing
    loss = Loss(sd, None, contexts, config.prior_loss_weight, None, *how)
    groups = [(config.learning_rate, list(network.parameters()))]
    adam = prepare.update_of(config, precision, groups, [network], captured=True)
    update = one_update(loss, adam)
    number, rate = torch.ones(2, device=CARD).unbind()
    return lambda: update(number, rate, batch)


def step(row: Row, who: str, config: dict) -> Counter:
    """A training step with as many class images as photographs. The first, which makes AdamW's
    averages, is not the one that is counted."""
    schedule = read_schedule(SD_SCHEDULER)  # with values
    with card(row.kernels):
        network = unet(who, config, torch.float32)
        x, t, _ = inputs(row.batch, config)
        sizes = torch.zeros(row.batch, 6, dtype=torch.int64, device=CARD)
        term, contexts = Drawn(x, torch.empty_like(x), t, sizes), Condition(inputs(2, config)[2])
        batch = Batch(term, term)
        if who == OURS:
            call = our_step(row, network, schedule, batch, contexts)
        else:
            theirs = importlib.import_module("diffusers").DDPMScheduler.from_config(SD_SCHEDULER)
            pipe = SimpleNamespace(unet=network)
            peer = SimpleNamespace(unet=network, pipe=pipe, add_noise=theirs.add_noise)
            batches = SimpleNamespace(draw=lambda n: batch)
            call = their_step(row, peer, TrainConfig(), batches, contexts)
        for _ in range(2):
            with Counter() as counter, by_phase(counter):
                call()
    return counter


def by_phase(counter: Counter):
    """Within it a step's costs are noted as those of its forward pass, its backward pass and its
    update; of an optimizer that works in the backward pass, there."""
    engine = torch.autograd._engine_run_backward

    def backward(*arguments, **options) -> None:
        counter.phase = "backward"
        engine(*arguments, **options)
        counter.phase = "update"

    return mock.patch("torch.autograd._engine_run_backward", backward)


def rows() -> list[tuple[str, Row]]:
    """Whose, and what: ours with PyTorch's operators and with the Triton kernels, diffusers'."""
    plain = [Row("forward", 2, "fp16"), Row("forward", 8, "fp16"), Row("forward", 2, "bf16")]
    plain.append(Row("step", 1, "bf16"))
    modes = [("gradient_checkpointing", True)], [("optimizer_in_backward", True)]
    ours = [*plain, *(replace(plain[-1], settings=tuple(mode)) for mode in modes)]
    found = [(OURS, row) for row in ours]
    if ops.attention_kernels:
        found += [(OURS, replace(row, kernels="triton")) for row in ours]
    return found + [("diffusers", row) for row in plain if peers(torch.device("cpu"))]


# ---- the report --------------------------------------------------------------------------------


def summed(costs: list[list[int]]) -> dict:
    """In all, and the least seconds that the card's data sheet gives for it."""
    launches, moved, flops = map(sum, zip(*costs, strict=True))
    least = {"bytes": moved / RATES["bytes"], "flops": flops / RATES["flops"]}
    return {"launches": launches, "bytes": moved, "flops": flops, "least_seconds": least}


def found_by(who: str, row: Row, counter: Counter) -> dict:
    """A row for the JSON: in all, by phase and by kind."""
    found = {"whose": who, "row": asdict(row), **summed(list(counter.costs.values()))}
    for place, of in enumerate(("phases", "kinds")):
        names = dict.fromkeys(key[place] for key in counter.costs)
        parts = {n: [c for key, c in counter.costs.items() if key[place] == n] for n in names}
        found[of] = {name: summed(costs) for name, costs in parts.items()}
    return found


def label(found: dict) -> str:
    row = found["row"]
    side = row["kernels"] if found["whose"] == OURS else found["whose"]
    modes = "".join(f", {name}" for name, _ in row["settings"])
    return f"{row['what']}, batch {row['batch']}, {row['precision']}{modes}: {side}"


def table(results: list[dict]) -> str:
    """As Markdown: rows and their phases; then launches and GB by kind."""
    kinds = list(dict.fromkeys(KINDS.values()))
    heads = ["launches", "GB", "TFLOP", "ms for the bytes", "ms for the FLOP"], kinds
    first, second = (
        [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"] for head in heads
    )
    for found in results:
        phases = found["phases"] if len(found["phases"]) > 1 else {}
        for name, sums in {label(found): found, **phases}.items():
            least = [f"{1e3 * sums['least_seconds'][of]:.2f}" for of in ("bytes", "flops")]
            cells = f"{sums['launches']} | {sums['bytes'] / 1e9:.2f} | {sums['flops'] / 1e12:.2f}"
            first.append(f"| {name} | {cells} | {' | '.join(least)} |")
        sums = [found["kinds"].get(kind, summed([[0, 0, 0]])) for kind in kinds]
        cells = " | ".join(f"{s['launches']}, {s['bytes'] / 1e9:.2f}" for s in sums)
        second.append(f"| {label(found)} | {cells} |")
    return "\n".join([ABOUT, "", *first, "", *second, ""])


def benchmark(what: str, minutes: float, output: Path) -> None:
    """Counts, prints and writes launches.json and .md. However long it takes: three minutes."""
    if not peers(torch.device("cpu")):
        print("diffusers is not installed: its rows are left out")
    output.mkdir(parents=True, exist_ok=True)
    count, config, results = {"forward": forward, "step": step}, CONFIGS["SD 1.5"]["unet"], []
    for who, row in rows():
        results.append(found_by(who, row, count[row.what](row, who, config)))
    report = {**versions(), "about": ABOUT, "per_second": RATES, "rows": results}
    write_json(output / f"{what}.json", report)
    write_text(output / f"{what}.md", table(results))
    print(table(results))
