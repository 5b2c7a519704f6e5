"""This project and diffusers side by side: the same weights, data and settings, in one run.

    python -m minibooth.bench train --output bench/results
    python -m minibooth.bench sample --output bench/results

and where the time of a whole run goes, from class images to saving:

    python -m minibooth.bench run --output bench/results

and what the ways to save memory save and cost, and which of them fit a card of 8 GB:

    python -m minibooth.bench memory --output bench/results

On a GPU the networks have SD 1.5's size, on a CPU the toybox's; their weights are random. All
implementations are warmed up first and then take turns, in an order that changes from round to
round, so that whatever else the machine does hits all alike. A ratio is the median over the rounds
of diffusers' time by ours. Without diffusers only this project is measured.
"""

import contextlib
import gc
import importlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .. import ops, toybox
from .. import train as program
from ..common import cli
from ..common.files import write_json
from ..formats.configs import SD1_TEXT, SD1_UNET, SD_SCHEDULER, SD_VAE
from ..pipeline import StableDiffusion, memory_format, read_schedule
from ..text_encoder import TextEncoder
from ..tokenizer import BOS, EOS, Tokenizer
from ..toybox.pretrain import TEXT_CONFIG, UNET_CONFIG, VAE_CONFIG
from ..train import make_optimizer, one_update, train
from ..training import class_images, graphs, memory, resume, start
from ..training.data import Batches, Latents, to_device
from ..training.grids import Grids
from ..training.loss import Loss
from ..training.settings import TrainConfig
from ..training.start import Run
from ..unet import UNet
from ..vae import VAE

OURS = "minibooth"
CONFIGS = {
    "SD 1.5": {"unet": SD1_UNET, "vae": SD_VAE, "text_encoder": SD1_TEXT},
    "toybox": {"unet": UNET_CONFIG, "vae": VAE_CONFIG, "text_encoder": TEXT_CONFIG},
}
PRECISION = {"no": "fp32", "bf16": "bf16"}
ADAM_BYTES = 28  # of traffic per weight: weight, gradient and two averages read, three written


@dataclass(frozen=True)
class Row:
    """One comparison: what is done, how much at once, and in which precision."""

    what: str  # "forward", "step" or "sample"
    batch: int  # forward: samples; step: photographs, and as many class images; sample: pictures
    precision: str  # "no" (fp32) or "bf16"
    steps: int = 1  # of the sampler
    kernels: str = "torch"
    settings: tuple[tuple[str, bool], ...] = ()  # of TrainConfig


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself. Where it does not, bf16 is slower than fp32."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


# ---- models ------------------------------------------------------------------------------------


def model(size: str, device: torch.device) -> StableDiffusion:
    """Random weights of that size, and a tokenizer that knows bytes only."""
    configs = {**CONFIGS[size], "scheduler": SD_SCHEDULER}
    characters = [chr(i) for i in range(33, 127)]
    tokens = [*characters, *(c + "</w>" for c in characters), BOS, EOS]
    tokenizer = Tokenizer({token: i for i, token in enumerate(tokens)}, [])
    configs["text_encoder"] = {"vocab_size": len(tokens), **configs["text_encoder"]}
    torch.manual_seed(0)
    with torch.device(device):
        networks = {
            "unet": UNet(configs["unet"]),
            "vae": VAE(configs["vae"]),
            "text_encoder": TextEncoder(configs["text_encoder"]),
        }
    for name, network in networks.items():
        network.eval().to(memory_format=memory_format(name, device))
    schedule = read_schedule(SD_SCHEDULER).to(device)
    return StableDiffusion(tokenizer, schedule=schedule, configs=configs, source=size, **networks)


class Peer:
    """diffusers' modules with the weights of `sd`."""

    def __init__(self, sd: StableDiffusion, layout: torch.memory_format, compiled: bool):
        diffusers = importlib.import_module("diffusers")
        scheduler = sd.configs["scheduler"]
        self.unet = diffusers.UNet2DConditionModel.from_config(sd.configs["unet"])
        self.vae = diffusers.AutoencoderKL.from_config(sd.configs["vae"])
        for ours, theirs in ((sd.unet, self.unet), (sd.vae, self.vae)):
            theirs.load_state_dict(ours.state_dict())
            theirs.eval().to(sd.device, memory_format=layout)
        self.add_noise = diffusers.DDPMScheduler.from_config(scheduler).add_noise
        self.pipe = diffusers.StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=None,
            tokenizer=None,
            unet=torch.compile(self.unet) if compiled else self.unet,
            scheduler=diffusers.DDIMScheduler.from_config(scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self.pipe.set_progress_bar_config(disable=True)


def peers(device: torch.device) -> dict[str, tuple[torch.memory_format, bool]]:
    """diffusers' variants: memory format and whether compiled. The last is its documented recipe
    for speed (docs, "Accelerate inference"); compiling for a CPU wants a C++ compiler."""
    try:
        importlib.import_module("diffusers")
    except ImportError:
        return {}
    found = {"diffusers": (torch.preserve_format, False)}
    if device.type == "cuda":
        found["diffusers compiled"] = (torch.channels_last, True)
    return found


def rivals(row: Row, device: torch.device) -> list[str]:
    """Whom a row is compared with. Nobody for this project's own modes; and compiling, which takes
    minutes, is done for single pictures only."""
    if row.settings or row.kernels != "torch":
        return []
    return [name for name, (_, compiled) in peers(device).items() if row.batch == 1 or not compiled]


# ---- what is timed -----------------------------------------------------------------------------


def our_forward(row: Row, sd: StableDiffusion, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with torch.no_grad(), autocast(row, sd.device):
            return sd.unet(*inputs)

    return forward


def their_forward(row: Row, peer: Peer, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    unet = peer.pipe.unet

    def forward() -> Tensor:
        with torch.no_grad(), autocast(row, inputs[0].device):
            return unet(*inputs).sample

    return forward


def our_step(run: Run, batches: Batches, loss: Loss) -> Callable[[], Tensor]:
    """The training program's own update, captured where it captures it."""
    adam = make_optimizer(run)
    update = one_update(loss, adam, accumulate=1)
    if adam.capturable:
        update = graphs.captured(update, run.device)
    count = iter(range(10**9))

    def step() -> Tensor:
        n = next(count)
        numbers = (to_device(torch.tensor(x), run.device) for x in (float(n + 1), 1.0))
        return update(*numbers, *batches.draw(n))[0]

    return step


def training_run(row: Row, sd: StableDiffusion, folder: Path) -> tuple[Run, Batches, Loss]:
    """The training program with random latents; what it trains is not set up yet."""
    photograph = Image.new("RGB", (sd.image_size, sd.image_size), "red")
    photograph.save(folder / "photograph.png")  # it wants one; the latents are random below
    config = TrainConfig(
        instance_data_dir=str(folder),
        instance_prompt="a sks dog",
        class_prompt="a dog",
        output_dir=str(folder / "out"),
        max_train_steps=1,
        train_batch_size=row.batch,
        mixed_precision=row.precision,
        fit_memory=False,
        **dict(row.settings),
    )
    run = start.set_up(config, sd, sd.device)
    side = sd.image_size // sd.vae.factor
    moments = torch.randn(2, 8, 4, side, side)
    latents = Latents(moments[0], moments[1].abs(), torch.arange(8))
    batches = Batches(latents, latents, sd.schedule.T, config.seed, row.batch, sd.device)
    ids = sd.tokenizer(config.prompts).to(sd.device)
    with torch.no_grad():
        contexts = None if config.train_text_encoder else sd.text_encoder(ids)
    settings = (1.0, None, run.precision, config.gradient_checkpointing)
    return run, batches, Loss(sd, ids, contexts, *settings)


def their_step(
    row: Row, peer: Peer, config: TrainConfig, batches: Batches, contexts: Tensor
) -> Callable[[], Tensor]:
    """What train_dreambooth.py does in a step, on the same draws, with the same fused AdamW."""
    unet = peer.pipe.unet
    weights = [p.requires_grad_() for p in peer.unet.parameters()]
    decay = config.adam_weight_decay
    adam = torch.optim.AdamW(weights, config.learning_rate, weight_decay=decay, fused=True)
    context = contexts.repeat_interleave(row.batch, dim=0)
    count = iter(range(10**9))

    def step() -> Tensor:
        drawn = batches.draw(next(count))
        x0, eps, t = (torch.cat([drawn[i], drawn[i + 3]]) for i in range(3))
        noisy = peer.add_noise(x0, eps, t)
        with autocast(row, noisy.device):
            prediction = unet(noisy, t, context).sample
        halves = zip(prediction.float().chunk(2), eps.chunk(2), strict=True)
        loss, loss_prior = (F.mse_loss(*half) for half in halves)
        loss = loss + config.prior_loss_weight * loss_prior
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        adam.step()
        adam.zero_grad()
        return loss.detach()

    return step


PROMPT, NEGATIVE, GUIDANCE = "a dog", "", 7.5


def our_sample(row: Row, sd: StableDiffusion, latents: Tensor) -> Callable[[], Tensor]:
    def sample() -> Tensor:
        with autocast(row, sd.device), graphs.captured_unet(sd.unet):
            return sd.generate(
                [PROMPT] * row.batch,
                negative_prompt=NEGATIVE,
                steps=row.steps,
                guidance_scale=GUIDANCE,
                latents=latents,
                batch_size=row.batch,
                output="pt",
            )

    return sample


def their_sample(
    row: Row, peer: Peer, sd: StableDiffusion, latents: Tensor
) -> Callable[[], Tensor]:
    texts = [sd.encode_prompt([text] * row.batch) for text in (PROMPT, NEGATIVE)]

    def sample() -> Tensor:
        with autocast(row, latents.device):
            z = peer.pipe(
                prompt_embeds=texts[0],
                negative_prompt_embeds=texts[1],
                num_inference_steps=row.steps,
                guidance_scale=GUIDANCE,
                latents=latents,
                output_type="latent",
            ).images
        with torch.no_grad():  # the VAE in its own precision, as ours
            pictures = peer.vae.decode(z / peer.vae.config.scaling_factor).sample
        return (pictures / 2 + 0.5).clamp(0, 1)

    return sample


def autocast(row: Row, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=row.precision == "bf16")


def implementation(
    row: Row, size: str, device: torch.device, folder: Path, name: str
) -> Callable[[], Tensor]:
    """What is timed for a row. Each has weights of its own, since training changes them."""
    sd = model(size, device)
    side = sd.image_size // sd.vae.factor
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(row.batch, 4, side, side, generator=g).to(device)
    t = torch.randint(1000, (row.batch,), generator=g).to(device)
    width = sd.configs["unet"]["cross_attention_dim"]
    inputs = (latents, t, torch.randn(row.batch, 77, width, generator=g).to(device))
    training = training_run(row, sd, folder) if row.what == "step" else None
    if name == OURS:
        if training:
            return our_step(*training)
        if row.what == "forward":
            return our_forward(row, sd, inputs)
        return our_sample(row, sd, latents)
    peer = Peer(sd, *peers(device)[name])
    if training:
        run, batches, loss = training
        call = their_step(row, peer, run.config, batches, loss.contexts)
        peer.vae = peer.pipe.vae = None
    elif row.what == "forward":
        call = their_forward(row, peer, inputs)
    else:
        call = their_sample(row, peer, sd, latents)
    for network in sd.networks.values():  # their own weights are enough
        network.to("meta")
    return call


# ---- timing ------------------------------------------------------------------------------------


def seconds(call: Callable[[], Tensor], device: torch.device, calls: int = 1) -> float:
    """Of one call."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - start) / calls


def race(
    calls: dict[str, Callable[[], Tensor]], device: torch.device, limit: float, warm_up: int
) -> dict[str, list[float]]:
    """Rounds of every implementation's time until `limit` seconds are over: at least 5, odd."""
    for call in calls.values():
        for _ in range(warm_up):
            call()
    times, dice = {name: [] for name in calls}, random.Random(0)
    end = time.monotonic() + limit
    while len(times[OURS]) < 5 or (time.monotonic() < end and len(times[OURS]) < 101):
        for name in dice.sample(list(calls), len(calls)):
            times[name].append(seconds(calls[name], device))
    return times


def measure(row: Row, size: str, device: torch.device, limit: float, floor: dict) -> dict:
    """Times, ratios and how far the results are apart, for the JSON."""
    names = [OURS, *rivals(row, device)]
    ops.use(row.kernels)
    with tempfile.TemporaryDirectory() as folder:
        parts = (row, size, device, Path(folder))
        calls = {name: implementation(*parts, name) for name in names}
        first = {name: call().double() for name, call in calls.items()}
        # Beside the first call: as many as a CUDA graph needs before it is replayed.
        times = race(calls, device, limit, warm_up=2 if device.type == "cpu" else 5)
    ops.use("torch")
    work = {"forward": 1, "step": 3}.get(row.what)
    bound = floor_seconds(row, size, floor) if work else None
    found = {"row": row.__dict__, "rounds": len(times[OURS]), "seconds": {}, "ratio": {}}
    found["difference"] = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found["seconds"][name] = {"median": middle, "quartiles": [low, high]}
        if name != OURS:
            ratios = [a / b for a, b in zip(values, times[OURS], strict=True)]
            found["ratio"][name] = statistics.median(ratios)
            apart = (first[OURS] - first[name]).norm() / first[name].norm()
            found["difference"][name] = apart.item()
    if bound:
        found["floor_seconds"] = bound
        found["fraction_of_floor"] = bound / found["seconds"][OURS]["median"]
    found["peak_bytes"] = {name: peak(row, size, device, name) for name in names}
    del calls, first
    gc.collect()
    return found


def rates(device: torch.device) -> dict[str, dict[str, float]]:
    """What the machine can do: FLOP/s in a matrix product per precision, bytes/s in a copy."""
    n = 8192 if device.type == "cuda" else 1024
    found = {}
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        best = min(seconds(lambda a=a, b=b: a @ b, device) for _ in range(10))
        found[precision] = 2 * n**3 / best
    x = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    y = torch.empty_like(x)
    copy = min(seconds(lambda: y.copy_(x), device) for _ in range(5))
    return {"flops": found, "bytes": 2 * x.numel() * 4 / copy}


def floor_seconds(row: Row, size: str, rates: dict) -> float:
    """Below which no implementation can go: its products at the rate of a large one, and for a step
    the optimizer's traffic at the rate of a copy."""
    config = CONFIGS[size]["unet"]
    with torch.device("meta"):
        unet, side = UNet(config), config["sample_size"]
        samples = 2 * row.batch if row.what == "step" else row.batch
        x = torch.empty(samples, 4, side, side)
        inputs = (x, torch.zeros(samples), torch.empty(samples, 77, config["cross_attention_dim"]))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(*inputs)
    products = counter.get_total_flops() / rates["flops"][row.precision]
    if row.what == "forward":
        return products
    traffic = ADAM_BYTES * sum(p.numel() for p in unet.parameters()) / rates["bytes"]
    return 3 * products + traffic


def peak(row: Row, size: str, device: torch.device, name: str) -> int | None:
    """Bytes at most, in a process of its own: allocated on the GPU, or resident on a CPU."""
    if "compiled" in name:  # compiling again would cost minutes
        return None
    found = alone(f"steady({row!r}, {size!r}, {name!r})")
    return found and found["peak_bytes"]


def alone(call: str) -> dict | None:
    """What a function of this module returns in a process of its own; None where it failed."""
    code = f"import json; from {__name__} import *; print(json.dumps({call}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def steady(row: Row, size: str, name: str, timed: int = 0, limit: int | None = None) -> dict:
    """The peak of a few calls, and the median of the seconds that `timed` more take."""
    device = prepared(row.kernels, limit)
    with tempfile.TemporaryDirectory() as folder:
        call = implementation(row, size, device, Path(folder), name)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(6 if device.type == "cuda" else 2):
            call()
        times = [seconds(call, device) for _ in range(timed)]
    return {**peaks(device), "seconds": statistics.median(times) if times else None}


def prepared(kernels: str = "torch", limit: int | None = None) -> torch.device:
    """The device, in a process of its own; on a GPU with `limit` bytes of memory."""
    device = cli.pick_device("auto")
    cli.keep_freed_memory()
    warnings.filterwarnings("ignore")
    ops.use(kernels)
    if limit and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    return device


def peaks(device: torch.device) -> dict[str, int]:
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved()
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": reserved}
    import resource  # which Windows has not

    return {"peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


# ---- a whole run -------------------------------------------------------------------------------

PHASES = [  # what is called in a run, and the phase that its time belongs to
    (class_images, "ensure", "class images"),
    (Grids, "draw", "sample grids"),
    (resume, "save", "saving"),
    (program, "save_snapshot", "saving"),
    (program, "finish", "saving"),
]


def whole_run(size: str, device: torch.device, **changes) -> dict[str, float]:
    """Seconds of a run of the training program, by phase. On a GPU 200 class images of 50 steps and
    1,000 steps of training at 512²; on a CPU the toybox's default run, without its scores."""
    spent = dict.fromkeys([*(phase for *_, phase in PHASES), "encoding and training"], 0.0)
    settings = {"num_class_images": 200, "class_steps": 50, "sample_batch_size": 16}
    settings |= {"max_train_steps": 1000, "num_validation_images": 0, "checkpointing_steps": 1000}
    if size == "toybox":
        settings = toybox.train_settings({}) | {"model": None}
    inside = []

    def timed(function: Callable, phase: str) -> Callable:
        def call(*args, **options):
            inside.append(phase)
            start, before = time.perf_counter(), sum(spent.values())
            result = function(*args, **options)
            inner = sum(spent.values()) - before  # "finish" draws pictures, too
            spent[inside.pop()] += time.perf_counter() - start - inner
            return result

        return call

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for where, name, phase in PHASES:
            function = timed(getattr(where, name), phase)
            stack.enter_context(mock.patch.object(where, name, function))
        photographs = Path(folder) / "photographs"
        photographs.mkdir()
        side = model(size, torch.device("cpu")).image_size
        for i in range(6):
            noise = torch.rand(side // 8, side // 8, 3).mul(255).byte()
            image = Image.fromarray(noise.numpy()).resize((side, side))
            image.save(photographs / f"{i}.png")
        settings |= {"instance_data_dir": str(photographs), "instance_prompt": "a sks dog"}
        settings |= {"class_prompt": "a dog", "output_dir": f"{folder}/out"}
        sd = model(size, torch.device("cpu"))
        start = time.perf_counter()
        train(TrainConfig(**settings | changes), sd)
        total = time.perf_counter() - start
    spent["encoding and training"] = total - sum(spent.values())
    return {**spent, "total": total}


# ---- memory ------------------------------------------------------------------------------------

LIMIT = 7_500_000_000  # bytes that are free on a card of 8 GB


def memory_modes(size: str, device: torch.device) -> list[dict]:
    """Every way to save memory, for the UNet alone and with the text encoder: peak and time of a
    step; on a GPU also what was counted beforehand, and whether it can be done within LIMIT."""
    found, on_gpu = [], device.type == "cuda"
    for text in ((), ("train_text_encoder",)):
        for mode in memory.MODES:
            settings = tuple((name, True) for name in (*text, *mode))
            row = Row("step", 1, "bf16" if on_gpu else "no", settings=settings)
            arguments = f"{row!r}, {size!r}, {OURS!r}"
            result = {"row": row.__dict__, **(alone(f"steady({arguments}, timed=5)") or {})}
            if on_gpu:
                result["counted_bytes"] = counted(row, size)
                if result.get("peak_bytes", LIMIT) < LIMIT:
                    result["limited"] = alone(f"steady({arguments}, limit={LIMIT})")
            found.append(result)
            print(describe_mode(result), flush=True)
    return found


def counted(row: Row, size: str) -> int:
    """What `memory.peak` says for a row, without pictures on the way."""
    batch = {"train_batch_size": row.batch, "num_validation_images": 0}
    sd = model(size, torch.device("meta"))
    pixels = (sd.image_size // sd.vae.factor) ** 2
    return memory.peak(sd, TrainConfig(**batch, **dict(row.settings)), pixels, half=True)


def small_run(size: str, limit: int) -> dict:
    """A whole run within `limit` bytes, with everything that a run does, but little of it."""
    device = prepared(limit=limit)
    settings = {"num_class_images": 4, "class_steps": 2, "sample_batch_size": 4}
    settings |= {"max_train_steps": 4, "checkpointing_steps": 2, "num_validation_images": 2}
    settings |= {"validation_steps": 2, "validation_inference_steps": 2}
    whole_run(size, device, **settings, **dict.fromkeys(memory.MODES[-1], True))
    return peaks(device)


def describe_mode(found: dict) -> str:
    """A row of the table on the screen."""
    parts = [" ".join(name for name, _ in found["row"]["settings"]) or "full speed"]
    if "peak_bytes" not in found:
        return f"{parts[0]}: cannot run here"
    parts[0] += f": peak {found['peak_bytes'] / 1e9:.2f} GB"
    if "counted_bytes" in found:
        parts.append(f"counted with a margin {found['counted_bytes'] / 1e9:.2f} GB")
        parts.append(f"within {LIMIT / 1e9} GB: {'yes' if found.get('limited') else 'no'}")
    parts.append(f"{1e3 * found['seconds']:.1f} ms")
    return ", ".join(parts)


# ---- the report --------------------------------------------------------------------------------


def rows(what: str, device: torch.device) -> list[Row]:
    if device.type == "cpu":
        both = ("no", "bf16") if cpu_has_bf16() else ("no",)
        if what == "train":
            return [Row(w, b, p) for p in both for w, b in (("forward", 8), ("step", 4))]
        return [Row("sample", 8, precision, steps=5) for precision in both]
    if what == "sample":
        plain = [Row("sample", batch, "bf16", steps=50) for batch in (1, 4, 16)]
        return [*plain, replace(plain[0], kernels="auto")]
    plain = [Row("forward", 2, "bf16")] + [Row("step", batch, "bf16") for batch in (1, 2, 4)]
    modes = [("gradient_checkpointing",), ("optimizer_in_backward",)]
    modes += [("gradient_checkpointing", "optimizer_in_backward")]
    modes = [replace(plain[1], settings=tuple((name, True) for name in mode)) for mode in modes]
    return [*plain, replace(plain[1], kernels="auto"), *modes]


def describe(found: dict) -> str:
    """A row of the table on the screen."""
    row, mine = found["row"], found["seconds"][OURS]
    modes = " ".join(name for name, _ in row["settings"])
    kernels = "" if row["kernels"] == "torch" else f"kernels {row['kernels']}"
    precision = PRECISION[row["precision"]]
    head = f"{row['what']:8} B {row['batch']:<3} {precision} {kernels} {modes}".rstrip()
    parts = [f"{OURS} {1e3 * mine['median']:.1f} ms"]
    low, high = mine["quartiles"]
    parts[0] += f" ({1e3 * low:.1f} … {1e3 * high:.1f})"
    for name, ratio in found["ratio"].items():
        parts.append(f"{name} {1e3 * found['seconds'][name]['median']:.1f} ms: {ratio:.2f}×")
    if "fraction_of_floor" in found:
        parts.append(f"{100 * found['fraction_of_floor']:.0f} % of the floor")
    sizes = [f"{size / 1e9:.2f}" for size in found["peak_bytes"].values() if size]
    parts.append(f"peak {' / '.join(sizes)} GB")
    return f"{head}: {', '.join(parts)}"


def chart(results: list[dict], title: str, path: Path) -> None:
    """Bars of diffusers' time by ours; 1 is a line."""
    bars = [
        (
            f"{r['row']['what']} B {r['row']['batch']} {PRECISION[r['row']['precision']]}",
            name,
            ratio,
        )
        for r in results
        for name, ratio in r["ratio"].items()
    ]
    left, scale, height = 170, 160, 22
    width = left + int(scale * max([1.0, *(ratio for *_, ratio in bars)])) + 200
    image = Image.new("RGB", (width, height * (len(bars) + 2)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 4), title, "black")
    for i, (label, name, ratio) in enumerate(bars, start=1):
        top, end = height * i + 6, left + int(scale * ratio)
        draw.text((8, top), label, "black")
        draw.rectangle((left, top, end, top + height - 8), "#3b6ea5")
        draw.text((end + 6, top), f"{ratio:.2f}  ({name})", "black")
    draw.line((left + scale, height, left + scale, image.height - height // 2), "black")
    image.save(path)


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "python": platform.python_version()}
    with contextlib.suppress(ImportError):
        found["diffusers"] = importlib.import_module("diffusers").__version__
    return found


def machine(device: torch.device) -> dict:
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        return {"device": torch.cuda.get_device_name(), "driver": driver}
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    return {"device": name or platform.processor(), "threads": threads, "simd": capability}


def benchmark(what: str, minutes: float, output: Path) -> None:
    """Measures, prints and writes <what>-<cpu or cuda>.json and, of a comparison, .png."""
    device = cli.pick_device("auto")
    cli.keep_freed_memory()
    size = "SD 1.5" if device.type == "cuda" else "toybox"
    warnings.filterwarnings("ignore")  # the photographs and prompts here are made up
    output.mkdir(parents=True, exist_ok=True)
    name = output / f"{what}-{device.type}"
    report = {**machine(device), **versions(), "networks": size}
    if what == "run":
        report["seconds"] = whole_run(size, device)
        write_json(name.with_suffix(".json"), report)
        print(", ".join(f"{phase} {spent:.1f} s" for phase, spent in report["seconds"].items()))
        return
    if what == "memory":
        report["modes"] = memory_modes(size, device)
        report["whole run, saving most"] = alone(f"small_run({size!r}, {LIMIT})")
        write_json(name.with_suffix(".json"), report)
        done = report["whole run, saving most"]
        size = f"peak {done['peak_bytes'] / 1e9:.2f} GB" if done else "it cannot run here"
        print(f"a whole run in the last mode, within {LIMIT / 1e9} GB on a GPU: {size}")
        return
    if not peers(device):
        print("diffusers is not installed: its columns are left out")
    todo, results, floor = rows(what, device), [], rates(device)
    end, left_out = time.monotonic() + 60 * minutes, []
    for i, row in enumerate(todo):
        left = end - time.monotonic()
        if left < 0:
            left_out.append(repr(row))
            continue
        # Half of a row's share is for rounds: building, compiling and warming up take the rest.
        results.append(measure(row, size, device, 0.5 * left / (len(todo) - i), floor))
        print(describe(results[-1]), flush=True)
    write_json(
        name.with_suffix(".json"),
        {**report, "rates": floor, "rows": results, "left_out": left_out},
    )
    title = f"diffusers' time divided by {OURS}'s, {size} size, {report['device']}"
    chart(results, title, name.with_suffix(".png"))
    print(f"{len(results)} rows, {len(left_out)} left out for time; {name}.json")
