"""The two sides of a comparison, ours and diffusers', with the same weights, data and settings."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..device import graphs
from ..device.precision import Precision
from ..pipeline import StableDiffusion, to_device
from ..text_encoder import Condition
from ..train import one_update
from ..training import methods, prepare
from ..training.data import Batches, Latents
from ..training.loss import Loss
from ..training.settings import TrainConfig
from ..training.start import Run
from .models import model

OURS = "minibooth"
PRECISION = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Row:
    """One comparison: what is done, how much at once, and in which precision."""

    what: str  # "forward", "step" or "sample"
    batch: int  # forward: samples; step: photographs, and as many class images; sample: pictures
    precision: str  # "no" (fp32), "bf16" or "fp16"
    steps: int = 1  # of the sampler
    kernels: str = "torch"
    settings: tuple[tuple[str, bool | str], ...] = ()  # of TrainConfig


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself. Where it does not, bf16 is slower than fp32."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


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
    adam = prepare.make_optimizer(run, captured=True)
    update = one_update(loss, adam)
    if adam.capturable:
        adam.allocate()
        update = graphs.captured(update, run.device, undo=adam.forget)
    count = iter(range(10**9))

    def step() -> Tensor:
        n = next(count)
        numbers = (to_device(torch.tensor(x), run.device) for x in (float(n + 1), 1.0))
        return update(*numbers, batches.draw(n))[0]

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
    run = Run(config, sd, sd.device)
    methods.place(sd, run.trained, run.device, run.precision.dtype)
    side = sd.image_size // sd.vae.factor
    moments = torch.randn(2, 8, 4, side, side)
    sizes = torch.tensor([sd.image_size] * 2 + [0, 0] + [sd.image_size] * 2).expand(8, -1)
    latents = Latents(moments[0], moments[1].abs(), torch.arange(8), sizes)
    batches = Batches(latents, latents, sd.schedule.T, config.seed, row.batch, sd.device)
    ids = sd.tokenizer(config.prompts).to(sd.device)
    with torch.no_grad():
        contexts = None if config.train_text_encoder else sd.encode(ids)
    settings = (1.0, None, run.precision, config.gradient_checkpointing)
    return run, batches, Loss(sd, ids, contexts, *settings)


def their_step(
    row: Row, peer: Peer, config: TrainConfig, batches: Batches, contexts: Condition
) -> Callable[[], Tensor]:
    """What train_dreambooth.py does in a step, on the same draws, with the same fused AdamW."""
    unet = peer.pipe.unet
    weights = [p.requires_grad_() for p in peer.unet.parameters()]
    decay = config.adam_weight_decay
    adam = torch.optim.AdamW(weights, config.learning_rate, weight_decay=decay, fused=True)
    context = contexts.context.repeat_interleave(row.batch, dim=0)
    count = iter(range(10**9))

    def step() -> Tensor:
        terms = batches.draw(next(count)).terms
        x0, eps, t = (torch.cat([getattr(x, of) for x in terms]) for of in ("x0", "eps", "t"))
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
    return Precision(row.precision, device).autocast()


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
