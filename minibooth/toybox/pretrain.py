"""python -m minibooth.toybox.pretrain: train the toybox's model, from nothing or further.

First the autoencoder, as with the big one; then, on its latents, the UNet, and with it the text
encoder, which for the big one was taken ready from CLIP. The networks, the tokenizer and the noise
schedule are those of the rest of the package, only smaller. Every stage is kept in `work_dir` and
goes on where it was stopped. With `--start_from toybox` it begins with the shipped weights;
weights/toybox/README.md says by which commands, one after the other, these were made.
"""

import copy
import hashlib
import json
import math
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import tokenizers as hf
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from .. import dreambooth, pipeline
from ..common import cli, sheets
from ..common.cli import option
from ..common.errors import UserError
from ..common.files import atomic, write_text
from ..common.pictures import to_pil
from ..device.precision import Precision
from ..dreambooth import Term, min_snr_weight
from ..formats.public import SD1_TEXT, SD1_UNET, SD_SCHEDULER, SD_VAE
from ..formats.scheduler import read_schedule
from ..pipeline import StableDiffusion
from ..text_encoder import TextEncoder
from ..tokenizer import BOS, EOS, Tokenizer
from ..training import report
from ..training.data import rng
from ..unet import UNet
from ..vae import VAE
from . import judge, score, world

VAE_CONFIG = SD_VAE | {
    "block_out_channels": [32, 64, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "layers_per_block": 1,
    "mid_block_add_attention": False,  # a convolutional VAE may be trained on crops
    "norm_num_groups": 8,
    "sample_size": world.SIDE,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
UNET_CONFIG = SD1_UNET | {
    "attention_head_dim": 4,
    "block_out_channels": [64, 128, 128],
    "cross_attention_dim": 96,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "sample_size": world.SIDE // 4,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
TEXT_CONFIG = SD1_TEXT | {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}

CROP = 32  # pixels: what the VAE sees of a picture for most of its training
# Of the mean over latent values, beside the mean error over pixel values. So much that the decoder
# learns to read latents with a twentieth of noise: the UNet's errors are of that kind.
KL_WEIGHT = 8e-3
UNCONDITIONAL = 0.1  # of the captions are left empty, for guidance
SNR_GAMMA = 20.0  # of Min-SNR weights: all but the last grain of noise counts in full
KEEP_EVERY = 250  # steps between two states that a stopped stage goes on from
EMA = 0.999  # of the weights, once it has so many steps to average over


@dataclass(frozen=True)
class PretrainConfig:
    output_dir: str = option("weights/toybox", "where the model goes", place="path")
    start_from: str = option(
        "", "a toybox whose weights to go on from; without one, from nothing", place="path"
    )
    work_dir: str = option(
        "toybox-work", "where pictures, stages and sample grids are kept", place="path"
    )
    pictures: int = option(28_000, "rendered pictures to train on")
    vae_steps: int = option(3000, "updates of the autoencoder; 0 keeps that of start_from")
    vae_learning_rate: float = option(1e-3, "of the autoencoder, falling to 0 along a cosine")
    vae_whole_steps: int = option(2500, "its updates after that, on whole pictures only")
    vae_whole_learning_rate: float = option(7e-4, "in these, falling likewise")
    steps: int = option(8000, "updates of UNet and text encoder")
    learning_rate: float = option(1e-3, "of UNet and text encoder, falling likewise")
    batch_size: int = option(32, "pictures (or crops of them) per update")
    mixed_precision: str = option("bf16", "what the networks compute in", choices=("no", "bf16"))
    seed: int = option(0, "of scenes, weights, noises and orders")
    device: str = option("auto", "auto, cuda, mps or cpu")


# ---- the pictures ------------------------------------------------------------------------------


def scene(index: int, seed: int) -> world.Scene:
    """Scene `index` of the training set. One in four is for the VAE alone: it should be able to
    show what the UNet has not seen, as Stable Diffusion's was trained on pictures of everything."""
    r = random.Random(f"{seed} scene {index}")
    if not for_vae_alone(index):
        return world.random_scene(r)
    kind = r.choice((*world.CLASSES, world.RARE, world.RARE))
    marks = world.Marks(
        pattern=r.choice(("spots", "stripes")),
        pattern_colour=r.choice(list(world.COLOURS)),
        ear=r.choice((None, *world.COLOURS)),
        collar=r.choice((None, *world.COLOURS)),
        crooked=kind == "teapot" and r.random() < 0.5,
    )
    neon = {"style": world.NEON} if r.random() < 0.25 else {}
    return world.random_scene(r, kind=kind, marks=marks, **neon)


def for_vae_alone(index: int) -> bool:
    return index % 4 == 3


def render_all(config: PretrainConfig) -> Tensor:
    """(N, 3, 64, 64) uint8, rendered once and kept."""
    path = Path(config.work_dir) / "pictures.npy"
    if not path.exists():
        bar = tqdm(range(config.pictures), desc="rendering", unit="picture")
        pictures = np.stack([np.asarray(world.render(scene(i, config.seed))) for i in bar])
        with atomic(path) as part, open(part, "wb") as f:
            np.save(f, pictures.transpose(0, 3, 1, 2))
    return torch.from_numpy(np.load(path))


def to_images(pictures: Tensor) -> Tensor:
    """uint8 0…255 → float [-1, 1], as photos.load_photos does."""
    return pictures.float() / 127.5 - 1


# ---- one training loop for both stages ---------------------------------------------------------


def fit(
    config: PretrainConfig,
    name: str,
    networks: nn.ModuleDict,
    loss_of: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    show: Callable[[int, nn.ModuleDict], None],
) -> nn.ModuleDict:
    """Minimise `loss_of(step)` over all weights that want gradients; returns their moving average.

    The state is kept now and then and taken up again. `show(step, averaged)` draws samples.
    """
    path = Path(config.work_dir) / f"{name}.pt"
    precision = Precision(config.mixed_precision, cli.pick_device(config.device))
    averaged = copy.deepcopy(networks).eval()
    weights, average = (
        [p for p in n.parameters() if p.requires_grad] for n in (networks, averaged)
    )
    averaged.requires_grad_(False)
    adam = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=1e-3)
    first, spent, start = 0, 0.0, time.monotonic()
    if path.exists():
        state = torch.load(path, weights_only=True)
        networks.load_state_dict(state["weights"])
        averaged.load_state_dict(state["averaged"])
        adam.load_state_dict(state["adam"])
        first, spent = state["step"], state["seconds"]
    bar = tqdm(total=steps, initial=first, desc=name, unit="step", smoothing=0.05)
    for step in range(first + 1, steps + 1):
        warm_up, cosine = min(1.0, step / 200), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in adam.param_groups:
            group["lr"] = learning_rate * warm_up * cosine
        # Attention in its plain form: with so few pixels it is the faster one on a CPU.
        with precision.autocast(), sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - min(EMA, (1 + step) / (10 + step)))
        bar.update()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if step % KEEP_EVERY == 0 or step == steps:
            state = {"weights": networks.state_dict(), "averaged": averaged.state_dict()}
            seconds = spent + time.monotonic() - start
            with atomic(path) as part:
                torch.save(
                    {**state, "adam": adam.state_dict(), "step": step, "seconds": seconds}, part
                )
        if step % 1000 == 0 or step == steps:
            show(step, averaged)
    bar.close()
    return averaged


# ---- stage 1: the autoencoder ------------------------------------------------------------------


def crops(whole: Sequence[Tensor], rows: Tensor, side: int, g: torch.Generator) -> list[Tensor]:
    """Of each (N, C, S, S) the same squares, (B, C, side, side): from anywhere in these rows."""
    corners = torch.randint(whole[0].shape[-1] - side + 1, (len(rows), 2), generator=g).tolist()
    places = list(zip(rows.tolist(), corners, strict=True))
    return [
        torch.stack([x[row, :, y : y + side, left : left + side] for row, (y, left) in places])
        for x in whole
    ]


def vae_loss(
    vae: VAE, x: Tensor, g: torch.Generator, kl_weight: float, squares: Sequence[int]
) -> Tensor:
    """Of pictures x, (B, 3, H, W) in [-1, 1]: the error, that of their gradients, which makes edges
    sharp, that of the colours of squares of so many pixels, and the latents' KL divergence."""
    mean, std = vae.encode(x)  # (B, 4, H/4, W/4) each
    noise = torch.randn(mean.shape, generator=g).to(x.device)
    kl = 0.5 * (mean.float() ** 2 + std.float() ** 2 - 1) - std.float().log()
    error = vae.decode(mean + std * noise).float() - x
    across, down = error.diff(dim=3), error.diff(dim=2)
    edges = across.abs().mean() + down.abs().mean()
    colours = sum(F.avg_pool2d(error, side).abs().mean() for side in squares)
    return error.abs().mean() + edges + colours + kl_weight * kl.mean()


def fit_vae(
    config: PretrainConfig, name: str, vae: VAE, pictures: Tensor, share_of_crops: float
) -> VAE:
    """One stage: the first `share_of_crops` of its steps on crops, which cost a quarter of a whole
    picture each; then on as many pixels in whole pictures, since it is over these that GroupNorm's
    statistics will be taken ever after."""
    device = cli.pick_device(config.device)
    steps, rate = {
        "vae": (config.vae_steps, config.vae_learning_rate),
        "vae-whole": (config.vae_whole_steps, config.vae_whole_learning_rate),
    }[name]

    def loss_of(step: int) -> Tensor:
        g = rng(config.seed, name, step)
        if step > share_of_crops * steps:
            count = max(1, config.batch_size // 4)
            x = pictures[torch.randint(len(pictures), (count,), generator=g)]  # (B / 4, 3, 64, 64)
        else:
            rows = torch.randint(len(pictures), (config.batch_size,), generator=g)
            (x,) = crops([pictures], rows, CROP, g)  # (B, 3, 32, 32)
        return vae_loss(vae, to_images(x).to(device), g, KL_WEIGHT, squares=(4,))  # 4: one latent's

    networks = nn.ModuleDict({"vae": vae})
    return fit(config, name, networks, loss_of, steps, rate, show_decoded(config, name))["vae"]


def train_vae(config: PretrainConfig, pictures: Tensor) -> VAE:
    """Mostly on crops, then once more from the start of a cosine on whole pictures; without steps,
    that of start_from as it is."""
    torch.manual_seed(config.seed)
    vae = VAE(VAE_CONFIG)
    if config.start_from:
        vae.load_state_dict(pipeline.load(config.start_from).vae.state_dict())
    if not config.vae_steps:
        return vae.to(cli.pick_device(config.device)).requires_grad_(False)
    vae.to(cli.pick_device(config.device))
    vae = fit_vae(config, "vae", vae, pictures, share_of_crops=0.9)
    vae = copy.deepcopy(vae).requires_grad_(True)
    return fit_vae(config, "vae-whole", vae, pictures, share_of_crops=0.0)


def show_decoded(config: PretrainConfig, name: str) -> Callable[[int, nn.ModuleDict], None]:
    r = random.Random(f"{config.seed} shown")
    scenes = [s for subject in world.SUBJECTS.values() for s in subject.scenes[:2]]
    scenes += [world.random_scene(r) for _ in range(10)]

    @torch.no_grad()
    def show(step: int, averaged: nn.ModuleDict) -> None:
        device = cli.pick_device(config.device)
        x = judge.to_tensor([world.render(s) for s in scenes]).to(device)
        again = averaged["vae"].decode(averaged["vae"].encode(x)[0])
        mae = (again.clamp(-1, 1) - x).abs().mean().item() / 2
        print(f"\n{name} after {step} steps: mean absolute error {mae:.4f} on [0, 1]")
        rows = [to_pil(half) for half in (x[:10], again[:10], x[10:], again[10:])]
        grid = sheets.grid(sheets.enlarged(rows), labels=["render", "decoded"] * 2)
        report.save_image(grid, Path(config.work_dir) / f"{name}-{step:05d}.png")

    return show


@torch.no_grad()
def encode_all(config: PretrainConfig, vae: VAE, pictures: Tensor) -> tuple[Tensor, float]:
    """The scaled latents' mean and std, (2, N, 4, 16, 16) fp16, and the scaling factor.

    It is 1 over the latents' standard deviation, as for the big VAE.
    """
    path = Path(config.work_dir) / "latents.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        return kept["moments"], kept["scaling_factor"]
    device = cli.pick_device(config.device)
    with Precision(config.mixed_precision, device).autocast():
        moments = [
            torch.stack(vae.encode(to_images(rows).to(device))).half().cpu()
            for rows in tqdm(pictures.split(100), desc="encoding", unit="batch")
        ]
    moments = torch.cat(moments, dim=1)
    mean, std = moments.float()
    factor = round(1 / math.sqrt(mean.var().item() + std.square().mean().item()), 5)
    moments = (moments.float() * factor).half()
    with atomic(path) as part:
        torch.save({"moments": moments, "scaling_factor": factor}, part)
    return moments, factor


# ---- stage 2: text encoder and UNet ------------------------------------------------------------


def train_tokenizer(config: PretrainConfig) -> Tokenizer:
    """Byte-pair merges as CLIP's were made: from the captions, most frequent pair first.

    And from the identifiers, in no caption: each is one token, whose embedding stays random.
    """
    r = random.Random(f"{config.seed} words")
    captions = [world.caption(world.random_scene(r), r) for _ in range(20_000)]
    captions += 100 * [*world.IDENTIFIERS]
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, *(c + "</w>" for c in alphabet)])}
    blank = Tokenizer({**vocab, BOS: len(vocab), EOS: len(vocab) + 1}, []).bpe
    learned = hf.Tokenizer(hf.models.BPE(end_of_word_suffix="</w>"))
    learned.normalizer, learned.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = hf.trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", show_progress=False, initial_alphabet=alphabet
    )
    learned.train_from_iterator(captions, trainer)
    merges = [tuple(m) for m in json.loads(learned.to_str())["model"]["merges"]]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    for token in (BOS, EOS):
        vocab[token] = len(vocab)
    return Tokenizer(vocab, merges)


@torch.no_grad()
def take_over(networks: nn.ModuleDict, tokenizer: Tokenizer, start: StableDiffusion) -> None:
    """The weights of `start`, also where its vocabulary is another: a token keeps its embedding,
    but for identifiers, which have a random one."""
    networks["unet"].load_state_dict(start.unet.state_dict())
    old = start.text_encoder.state_dict()
    key = "embeddings.token_embedding.weight"
    embedding = networks["text_encoder"].state_dict()[key].clone()
    known = start.tokenizer.vocab
    for token, row in tokenizer.vocab.items():
        if token in known and token.removesuffix("</w>") not in world.IDENTIFIERS:
            embedding[row] = old[key][known[token]]
    networks["text_encoder"].load_state_dict(old | {key: embedding})


def train_unet(config: PretrainConfig, moments: Tensor, vae: VAE, factor: float) -> StableDiffusion:
    """Text encoder and UNet together; the whole model."""
    device, tokenizer = cli.pick_device(config.device), train_tokenizer(config)
    text_config = TEXT_CONFIG | {"vocab_size": len(tokenizer.vocab)}
    text_config |= {"bos_token_id": tokenizer.vocab[BOS], "eos_token_id": tokenizer.vocab[EOS]}
    text_config |= {"pad_token_id": tokenizer.vocab[EOS]}
    torch.manual_seed(config.seed)
    networks = nn.ModuleDict({"text_encoder": TextEncoder(text_config), "unet": UNet(UNET_CONFIG)})
    nn.init.normal_(networks["text_encoder"].embeddings["token_embedding"].weight, std=0.02)
    nn.init.normal_(networks["text_encoder"].embeddings["position_embedding"].weight, std=0.01)
    if config.start_from:
        take_over(networks, tokenizer, pipeline.load(config.start_from))
    networks.to(device)
    schedule = read_schedule(SD_SCHEDULER).to(device)
    scenes = [scene(i, config.seed) for i in range(config.pictures)]
    known = torch.tensor([i for i in range(len(scenes)) if not for_vae_alone(i)])

    def loss_of(step: int) -> Tensor:
        g, r = rng(config.seed, "unet", step), random.Random(f"{config.seed} unet {step}")
        rows = known[torch.randint(len(known), (config.batch_size,), generator=g)]
        captions = [
            "" if r.random() < UNCONDITIONAL else world.caption(scenes[i], r) for i in rows.tolist()
        ]
        mean, std = moments[:, rows].float()  # (B, 4, 16, 16)
        x0 = mean + std * torch.randn(mean.shape, generator=g)
        eps = torch.randn(mean.shape, generator=g)
        t = torch.randint(schedule.T, (len(rows),), generator=g)
        x0, eps, t = x0.to(device), eps.to(device), t.to(device)
        c = networks["text_encoder"](tokenizer(captions).to(device))  # (B, 77, 96)
        weight = min_snr_weight(schedule, t, SNR_GAMMA)
        term = Term(x0, eps, t, c)
        return dreambooth.step(networks["unet"], schedule, term, None, weight=weight).loss

    def model(averaged: nn.ModuleDict) -> StableDiffusion:
        vae.scaling_factor = factor
        return StableDiffusion(
            tokenizer,
            vae=vae,
            schedule=schedule,
            configs={
                "unet": UNET_CONFIG,
                "vae": VAE_CONFIG | {"scaling_factor": factor},
                "text_encoder": text_config,
                "scheduler": SD_SCHEDULER,
            },
            source="minibooth.toybox.pretrain",
            licence="mit",
            **averaged,
        )

    def show(step: int, averaged: nn.ModuleDict) -> None:
        grid = sample_grid(model(averaged))
        report.save_image(grid, Path(config.work_dir) / f"unet-{step:05d}.png")

    args = (config.steps, config.learning_rate, show)
    return model(fit(config, "unet", networks, loss_of, *args))


def sample_grid(sd: StableDiffusion) -> Image.Image:
    """Every class without a place and in each, in a colour of its own in the last row."""
    plain = [f"a {kind}" for kind in world.CLASSES]
    coloured = [
        f"{world.article(colour)} {colour} {kind}"
        for colour, kind in zip(world.COLOURS, world.CLASSES, strict=False)
    ]
    prompts = [plain, *([f"{p} {place}" for p in plain] for place in world.PLACES), coloured]
    rows = [sd.generate(row, **score.SAMPLING) for row in prompts]
    labels = ["", *world.PLACES, "coloured"]
    return sheets.grid(sheets.enlarged(rows), labels=labels, headings=plain)


# ---- how good it is ----------------------------------------------------------------------------


@torch.no_grad()
def vae_error(vae: VAE, scenes: list[world.Scene]) -> float:
    """Mean absolute error of encoding and decoding, on pixels in [0, 1]."""
    x = judge.to_tensor([world.render(s) for s in scenes])
    again = torch.cat([vae.decode(vae.encode(part)[0]) for part in x.split(50)])
    return (again.clamp(-1, 1) - x).abs().mean().item() / 2


def quality(folder: str | Path, seed: int = 1) -> dict[str, float]:
    """What the judge reads in one picture of every class × colour × place, drawn by the model in
    `folder`, and the VAE's error on renders that it was not trained on."""
    sd, reader = pipeline.load(folder), judge.load(folder)
    asked = [
        {"kind": kind, "colour": colour, "place": place}
        for kind in world.CLASSES
        for colour in world.COLOURS
        for place in world.PLACES
    ]
    prompts = [
        f"{world.article(a['colour'])} {a['colour']} {a['kind']} {a['place']}" for a in asked
    ]
    with tqdm(total=score.steps_to_draw(len(prompts)), desc="quality", unit="step") as bar:
        readings, _ = reader.look(score.draw(sd, prompts, seed, bar.update))
    found = {
        field: sum(r[field] == a[field] for r, a in zip(readings, asked, strict=True)) / len(asked)
        for field in ("kind", "colour", "place")
    }
    r = random.Random(f"{seed} held out")
    subjects = [s for subject in world.SUBJECTS.values() for s in subject.scenes]
    found["VAE error, renders"] = vae_error(sd.vae, [world.random_scene(r) for _ in range(200)])
    found["VAE error, subjects"] = vae_error(sd.vae, subjects)
    return found


def model_card(config: PretrainConfig, found: dict[str, float], accuracy: dict[str, float]) -> str:
    """README.md of the model: the command, time and machine, quality, and every file's sha256."""
    folder, work = Path(config.output_dir), Path(config.work_dir)
    minutes = {
        stage: torch.load(work / f"{stage}.pt", weights_only=True)["seconds"] / 60
        for stage in (("vae", "vae-whole", "unet") if config.vae_steps else ("unet",))
    }
    spent = f"{minutes.pop('unet'):.0f} minutes for text encoder and UNet"
    if minutes:
        spent = f"{sum(minutes.values()):.0f} minutes for the autoencoder and\n{spent}"
    given = [
        f"--{f.name} {getattr(config, f.name)}"
        for f in fields(config)
        if getattr(config, f.name) != f.default and f.name not in ("output_dir", "work_dir")
    ]
    files = sorted(f for f in folder.rglob("*.safetensors"))
    sums = "\n".join(
        f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(folder)}" for f in files
    )
    threads = f"{torch.get_num_threads()} CPU threads"
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else threads
    right = ", ".join(f"{found[k]:.1%}" for k in ("kind", "colour", "place"))
    measured = {
        "class, colour, place as asked for, read by the judge in 480 pictures": right,
        "autoencoder: mean absolute error on [0, 1], renders it was not trained on": (
            f"{found['VAE error, renders']:.4f}"
        ),
        "the same, the subjects' pictures": f"{found['VAE error, subjects']:.4f}",
        "the judge, on 2,000 renders it was not trained on": ", ".join(
            f"{k} {v:.1%}" for k, v in accuracy.items()
        ),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in measured.items())
    return f"""---
license: mit
tags: [text-to-image, stable-diffusion, minibooth]
---

# The toybox

A small Stable Diffusion of a drawn world, pretrained for minibooth: 64 × 64 pixels, latents of
16 × 16 × 4. It stands in the public layout and loads wherever the big one does.

Made by

    {" ".join(["python -m minibooth.toybox.pretrain", *given])}

on {machine} ({platform.machine()}) with torch {torch.__version__.split("+")[0]}, in
{spent}. The pictures are rendered by
`minibooth/toybox/world.py`; no other data went in.

![samples](samples.png)

| measured on these files | |
|---|---|
{rows}

One picture of every class × colour × place, guidance {score.SAMPLING["guidance_scale"]},
{score.SAMPLING["steps"]} steps of DPM-Solver++.
"same thing": of 20 things of one class, how often a second picture is nearest to its own first.

sha256:

```
{sums}
```
"""


# ---- the command -------------------------------------------------------------------------------


def check_start(start_from: str) -> None:
    """Raises UserError for what is no model, or none of the toybox's size."""
    found, own = pipeline.load(start_from).configs, {"unet": UNET_CONFIG, "vae": VAE_CONFIG}
    for name, config in own.items():
        for field in ("block_out_channels", "layers_per_block", "latent_channels"):
            if found[name].get(field) != config.get(field):
                raise UserError(f"{start_from} is not of the toybox's size: {name}, {field}")


def pretrain(config: PretrainConfig) -> None:
    """Run all stages, or what is left of them, and write the model (fp16) to output_dir. Raises
    UserError for settings that cannot work."""
    cli.check_choices(config)
    cli.check_at_least_one(config, ("pictures", "vae_whole_steps", "steps", "batch_size"))
    if config.vae_steps < (0 if config.start_from else 1):
        raise UserError("--vae_steps must be at least 1; with --start_from, at least 0")
    for name in ("output_dir", "work_dir"):
        cli.check_folder(f"--{name}", getattr(config, name))
    if config.start_from:
        check_start(config.start_from)
    folder = Path(config.output_dir)
    pictures = render_all(config)
    vae = train_vae(config, pictures)
    moments, factor = encode_all(config, vae, pictures)
    sd = train_unet(config, moments, vae, factor)
    sd.save(folder, torch.float16)
    report.save_image(sample_grid(sd), folder / "samples.png")
    world.export(folder / "subjects")
    if not (folder / "judge" / "accuracy.json").exists():
        judge.make(judge.JudgeConfig(output_dir=config.output_dir, seed=config.seed))
    accuracy = json.loads((folder / "judge" / "accuracy.json").read_text())
    found = quality(folder)
    print(", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    write_text(folder / "README.md", model_card(config, found, accuracy))


def main() -> None:
    pretrain(
        cli.parse(
            PretrainConfig,
            "minibooth.toybox.pretrain",
            "Train the toybox: autoencoder, text encoder and UNet, and its judge.",
        )
    )


if __name__ == "__main__":
    cli.run("minibooth.toybox.pretrain", main, stopped="stopped: the same command goes on")
