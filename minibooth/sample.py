"""python -m minibooth.sample: draw pictures from a model."""

import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from . import ops, pipeline, schedule, textual_inversion
from .common import cli, sheets
from .common.cli import option
from .common.errors import UserError
from .common.files import atomic, shortened
from .common.pictures import read_image
from .device import graphs, no_gpu, settle
from .formats import adapters, checks, families, hypernetworks
from .formats.configs import is_public_size
from .tokenizer import WordError
from .training import photos
from .upscaler import SCALE, Upscaler, require_kind


@dataclass(frozen=True)
class SampleConfig:
    model: str | None = option(
        None,
        "folder, single file (.safetensors, .ckpt) or hub id",
        aliases=("pretrained_model_name_or_path",),
        place="source",
        topic="what is drawn",
    )
    prompt: tuple[str, ...] = option(
        (), "what to draw; give it several times for several prompts", empty=True
    )
    negative_prompt: str = option("", "what to keep away from [nothing]")
    num_images: int = option(4, "pictures per prompt")
    seed: int = option(0, "of each prompt's first picture; the next ones count up")
    output_dir: str = option("samples", "where <prompt>-<seed>.png and grid.png go", place="path")

    steps: int = option(
        50, "sampler steps", aliases=("num_inference_steps",), topic="how it is drawn"
    )
    guidance_scale: float = option(
        7.5,
        "how strongly to follow the prompt; 1 switches it off, SDXL's default is "
        f"{families.GUIDANCE:g}",
    )
    sampler: str = option("ddim", "how to step from noise to picture", choices=checks.SAMPLERS)
    eta: float = option(0.0, "DDIM's share of fresh noise per step, 0 to 1")
    height: int | None = option(None, "pixels [the model's own]; SDXL is told it, and width, too")
    width: int | None = option(None, "pixels [the model's own]")

    lora: tuple[str, ...] = option(
        (),
        "LoRA file, or FILE:STRENGTH; give it several times for several [:1]",
        place="path",
        topic="model",
    )
    embedding: tuple[str, ...] = option(
        (),
        "Textual Inversion file, whose word prompts can then use, or FILE=WORD for another word; "
        "several as well",
        place="path",
    )
    hypernetwork: tuple[str, ...] = option(
        (), "hypernetwork's file, or FILE:STRENGTH; several as well [:1]", place="path"
    )
    upscaler: str | None = option(
        None,
        "folder, single file or hub id of an upscaler, which makes what is drawn four times as "
        "large; both pictures are kept",
        place="source",
        topic="second stage",
    )
    upscaler_lora: tuple[str, ...] = option(
        (), "LoRA file of the upscaler, or FILE:STRENGTH; several as well [:1]", place="path"
    )
    noise_level: int = option(
        20, "of the small picture: what is lost under it is drawn anew; take one that was trained"
    )
    upscaler_steps: int = option(75, "its sampler steps")
    images: str | None = option(
        None,
        "folder of pictures to enlarge, and nothing is drawn; the prompt says what they show",
        place="path",
    )

    vae: str | None = option(None, "folder, file or hub id of a VAE to use instead", place="source")
    tokenizer: str | None = option(
        None, "folder or hub id of a tokenizer to use instead", place="source"
    )
    prediction_type: str | None = option(
        None, "overrides what the model says", choices=("epsilon", "v_prediction")
    )
    revision: str | None = option(None, "branch, tag or commit on the hub")
    ema: str = option(
        "no",
        "yes takes the averaged weights of a single file that has them beside the plain ones",
        choices=("no", "yes"),
    )

    device: str = option("auto", "auto, cuda, mps or cpu", topic="device")
    batch_size: int = option(4, "pictures drawn at once; less needs less memory")
    dtype: str | None = option(
        None, "of the weights [fp16 on a GPU, else fp32]", choices=("fp32", "fp16", "bf16")
    )
    kernels: str | None = option(
        None,
        "for attention and group norm [MINIBOOTH_KERNELS, or auto: what is right and faster here]",
        choices=ops.MODES,
    )

    def check(self) -> None:
        if self.images or self.upscaler_lora:
            self.check_second_stage()
        if self.model is None and not self.images:
            raise UserError("give --model: a folder, a single file or a hub id")
        if not self.prompt and not self.images:
            raise UserError('give --prompt, say --prompt "a sks dog in the snow"')
        cli.check_choices(self)
        names = ("num_images", "steps", "batch_size", "height", "width", "upscaler_steps")
        cli.check_at_least_one(self, names)
        if not 0 <= self.seed < 2**63:
            raise UserError("--seed must be a number from 0 up")
        if self.noise_level < 0:  # how high it may be, the upscaler says
            raise UserError("--noise_level must be a number from 0 up")
        if not 0 <= self.eta <= 1:
            raise UserError("--eta must be a number from 0 to 1")
        if not 0 <= self.guidance_scale < math.inf:
            raise UserError("--guidance_scale must be a number from 0 up")

    def check_second_stage(self) -> None:
        if self.upscaler is None:
            given = "--images" if self.images else "--upscaler_lora"
            raise UserError(f"{given} goes with --upscaler, the model that enlarges")
        if self.images and self.model:
            raise UserError("--images are enlarged and nothing is drawn: no --model beside it")
        if self.images and len(self.prompt) > 1:
            raise UserError("--images come under one --prompt, which says what they show")


def sample(config: SampleConfig) -> list[Path]:
    """Draw and write the pictures; the paths of the single ones. Raises UserError."""
    config.check()
    cli.check_folder("--output_dir", config.output_dir)
    adapters.check_there(config.lora, config.embedding)
    hypernetworks.check_there(config.hypernetwork)
    device = cli.pick_device(config.device)
    if config.kernels:
        ops.use(config.kernels)
    pictures = read(config.images) if config.images else {}
    dtype = cli.DTYPES[config.dtype or ("fp16" if device.type == "cuda" else "fp32")]
    up = load_upscaler(config, device, dtype) if config.upscaler else None
    if config.images:
        prompt = config.prompt[0] if config.prompt else ""
        about = {"prompt": prompt, "seed": str(config.seed)}
        return enlarge(
            config, up, [(stem, image, prompt, about) for stem, image in pictures.items()]
        )
    sd = pipeline.load(
        config.model,
        device=device,
        dtype=dtype,
        tokenizer=config.tokenizer,
        vae=config.vae,
        prediction_type=config.prediction_type,
        revision=config.revision,
        ema=config.ema == "yes",
    )
    require_kind(sd, f"--model {config.model}")
    size = (config.height or sd.image_size, config.width or sd.image_size)
    if up:
        up.check_size(*size)
    if config.device == "auto" and device.type == "cpu" and is_public_size(sd.configs):
        warnings.warn(f"this takes long, as no GPU can be used: {no_gpu.why()}", stacklevel=2)
    adapters.merge_files(sd.networks, config.lora)
    hypernetworks.attach_files(sd.unet, config.hypernetwork)
    for file in config.embedding:
        word, vectors = adapters.read_embedding(file)
        try:
            textual_inversion.add_word(sd, word, vectors)
        except WordError as e:
            raise UserError(f"{e}, as --embedding FILE=WORD") from None
        print(f"{file}: {sd.tokenizer.spelled(word)} in a prompt is now {len(vectors[0])} vectors")
    sizes = settle.batches(config.num_images, config.batch_size, config.guidance_scale)
    met = settle.met(sd, *size, drawing=sizes if settle.wanted(device) else ())
    settle.settle(met, device)
    out, written, rows, drawn = Path(config.output_dir), [], [], []
    batches = -(-config.num_images // config.batch_size)
    bar = tqdm(total=len(config.prompt) * batches * config.steps, unit="step")
    with bar, graphs.captured_unet(sd.unet):
        for prompt in config.prompt:
            bar.set_description(prompt[:40])
            images = sd.generate(
                [prompt] * config.num_images,
                negative_prompt=config.negative_prompt,
                steps=config.steps,
                guidance_scale=config.guidance_scale,
                seed=config.seed,
                sampler=config.sampler,
                eta=config.eta,
                height=config.height,
                width=config.width,
                batch_size=config.batch_size,
                on_step=bar.update,
            )
            rows.append(images)
            for i, image in enumerate(images):
                about = settings(config, sd.source, prompt, config.seed + i)
                name = f"{slug(prompt)}-{config.seed + i}"
                written.append(save_png(image, out, name, about))
                drawn.append((name, image, prompt, about))
    with atomic(out / "grid.png") as part:
        sheets.grid(sheets.enlarged(rows), labels=list(config.prompt)).save(part, "PNG")
    return written + (enlarge(config, up, drawn) if up else [])


# ---- the second stage --------------------------------------------------------------------------


def read(folder: str) -> dict[str, Image.Image]:
    """The pictures in it, by their names; without an ending where that tells them apart. Raises
    UserError for one that cannot be enlarged."""
    files = photos.image_files(folder)
    stems = [file.stem for file in files]
    names = [file.stem if stems.count(file.stem) == 1 else file.name for file in files]
    found = {name: read_image(file) for name, file in zip(names, files, strict=True)}
    for name, image in found.items():
        try:
            Upscaler.check_size(image.height, image.width)
        except UserError as e:
            raise UserError(f"{Path(folder) / name}: {e}") from None
    return found


def load_upscaler(config: SampleConfig, device: torch.device, dtype: torch.dtype) -> Upscaler:
    adapters.check_there(config.upscaler_lora)
    up = pipeline.load(config.upscaler, device=device, dtype=dtype)
    require_kind(up, f"--upscaler {config.upscaler}", upscaler=True)
    if not 0 <= config.noise_level < up.levels:
        raise UserError(f"--noise_level {config.noise_level}: give one from 0 to {up.levels - 1}")
    schedule.timesteps(up.schedule, config.upscaler_steps)  # refuses what the model cannot do
    adapters.merge_files(up.networks, config.upscaler_lora)
    return up


def enlarge(
    config: SampleConfig, up: Upscaler, drawn: list[tuple[str, Image.Image, str, dict]]
) -> list[Path]:
    """Write name-x4.png for each name, picture, prompt and settings: its noise is of its seed."""
    written, bar = [], tqdm(total=len(drawn) * config.upscaler_steps, unit="step")
    with bar, graphs.captured_unet(up.unet):
        for name, image, prompt, about in drawn:
            bar.set_description(f"enlarging {name[:40]}")
            [large] = up.upscale(
                [image],
                [prompt],
                noise_level=config.noise_level,
                steps=config.upscaler_steps,
                seed=int(about["seed"]),
                negative_prompt=config.negative_prompt,
                on_step=bar.update,
            )
            about = about | {"upscaler": up.source, "noise_level": str(config.noise_level)}
            about["upscaler_steps"] = str(config.upscaler_steps)
            if config.upscaler_lora:
                about["upscaler_lora"] = ", ".join(map(adapters.public_name, config.upscaler_lora))
            written.append(save_png(large, Path(config.output_dir), f"{name}-x{SCALE}", about))
    return written


def settings(config: SampleConfig, model: str, prompt: str, seed: int) -> dict[str, str]:
    """What it takes to draw a picture again, for its metadata. Files are named, not their place."""
    names = ("negative_prompt", "steps", "guidance_scale", "sampler", "eta")
    settings = {"prompt": prompt, "seed": str(seed), "model": model}
    settings |= {n: str(getattr(config, n)) for n in names}
    if config.ema == "yes":
        settings["ema"] = "yes"
    if config.lora:
        settings["lora"] = ", ".join(map(adapters.public_name, config.lora))
    if config.hypernetwork:
        settings["hypernetwork"] = ", ".join(map(adapters.public_name, config.hypernetwork))
    if config.embedding:
        settings["embedding"] = ", ".join(map(adapters.public_word, config.embedding))
    return settings


def slug(prompt: str) -> str:
    return shortened(re.sub(r"\W+", "-", prompt.lower()).strip("-"), 80) or "empty"


def save_png(image: Image.Image, folder: Path, name: str, about: dict[str, str]) -> Path:
    """Write name.png, with `about` in its metadata. A different picture there is not overwritten:
    the new one is numbered."""
    info = PngImagePlugin.PngInfo()
    for key, value in about.items():
        info.add_itxt(key, value)
    path, n = folder / f"{name}.png", 2
    while path.exists() and not same_picture(path, image):
        path, n = folder / f"{name}-{n}.png", n + 1
    with atomic(path) as part:
        image.save(part, "PNG", pnginfo=info)
    return path


def same_picture(path: Path, image: Image.Image) -> bool:
    try:
        with Image.open(path) as there:
            return there.size == image.size and there.tobytes() == image.tobytes()
    except OSError:
        return False


def main() -> None:
    config = cli.parse(
        SampleConfig,
        "minibooth.sample",
        "Draw pictures from a Stable Diffusion model.",
        defaults=families.draw_settings,
    )
    written = sample(config)
    grid = "" if config.images else " and grid.png"
    print(f"{len(written)} pictures{grid} in {config.output_dir}")


if __name__ == "__main__":
    cli.run("minibooth.sample", main)
