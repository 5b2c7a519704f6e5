"""StableDiffusion: the parts together. Load, encode a prompt, draw pictures, save."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from warnings import warn

import torch
from PIL import Image
from torch import Tensor

from . import schedule
from .common.errors import UserError, first_line
from .common.files import write_text
from .formats import checkpoint, hub
from .formats.configs import SD2_V, check_config, what_else_it_sees
from .schedule import Schedule
from .text_encoder import TextEncoder
from .tokenizer import Tokenizer
from .unet import TransformerBlock, UNet
from .vae import VAE

SAMPLERS = ("ddim", "ddpm", "dpm++")
OUTPUTS = ("pil", "pt", "latent")
VAE_PIXELS = 256 * 256  # that go through the VAE at once: its memory grows with them


@dataclass
class StableDiffusion:
    """A whole model. Data flows tokenizer → text_encoder → unet (steps times) → vae."""

    tokenizer: Tokenizer
    text_encoder: TextEncoder
    vae: VAE
    unet: UNet
    schedule: Schedule
    configs: dict[str, dict]  # of unet, vae, text_encoder, scheduler: written back on save
    source: str = ""  # what it was loaded from: hub id, toybox, or a folder's or file's name
    licence: str | None = None  # of the weights, by its short name
    licence_files: dict[str, str] = field(default_factory=dict)

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def image_size(self) -> int:
        """The side in pixels of the square pictures it was trained on."""
        return (self.configs["unet"].get("sample_size") or 64) * self.vae.factor

    def to(self, device) -> "StableDiffusion":
        for name, network in self.networks.items():
            network.to(device, memory_format=memory_format(name, device))
        self.schedule = self.schedule.to(device)
        return self

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> Tensor:
        """Prompts → c: (B, 77, D)."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    @torch.no_grad()
    def generate(
        self,
        prompts: str | list[str],
        *,
        negative_prompt: str = "",
        steps: int = 50,
        guidance_scale: float = 7.5,
        seed: int = 0,
        sampler: str = "ddim",
        eta: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        batch_size: int | None = None,
        output: str = "pil",
        on_step: Callable[[], None] | None = None,
    ) -> list[Image.Image] | Tensor:
        """Draw one picture per prompt.

        Picture i takes all its noise from a CPU generator seeded with seed + i, so it depends
        neither on the device nor on the batch. `latents`, (B, 4, h, w), replace the first noise and
        set the size. guidance_scale ≤ 1 switches guidance off. height and width are in pixels,
        multiples of the VAE's factor; without them the size is that of the training.
        `output`: "pil"; "pt", (B, 3, H, W) in [0, 1]; "latent", (B, 4, h, w) scaled.
        `on_step` is called after every step of every batch. Raises UserError for wrong settings,
        NotFinite where a network's output is not.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        shape = self.latent_shape(len(prompts), height, width, latents)  # (4, h, w)
        check_sampling(len(prompts), sampler, output, eta, seed, batch_size)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        finished = []
        for first in range(0, len(prompts), batch_size or 8):
            batch = slice(first, first + (batch_size or 8))

            def noise(batch=batch) -> Tensor:
                drawn = [torch.randn(shape, generator=g) for g in generators[batch]]
                return to_device(torch.stack(drawn), self.device)  # (B, 4, h, w)

            x = noise() if latents is None else latents[batch].to(self.device, torch.float32)
            context = self.encode_guided(prompts[batch], negative_prompt, guidance_scale)
            last = None  # what dpm++ remembers of the step before
            with projected_once(self.unet):
                for t, t_prev in schedule.trajectory(self.schedule, steps, sampler):
                    prediction = self.predict(x, t, context, guidance_scale)
                    if sampler == "ddpm":
                        x = schedule.ddpm_step(x, prediction, t, t_prev, self.schedule, noise())
                    elif sampler == "dpm++":
                        x, last = schedule.dpm_step(x, prediction, t, t_prev, self.schedule, last)
                    else:
                        fresh = noise() if eta > 0 else None
                        x = schedule.ddim_step(x, prediction, t, t_prev, self.schedule, eta, fresh)
                    if on_step:
                        on_step()
            require_finite(context, "text encoder")
            require_finite(x, "unet")
            finished.append(x if output == "latent" else self.decode(x))
        result = torch.cat(finished)
        return to_pil(result) if output == "pil" else result

    def encode_guided(
        self, prompts: list[str], negative_prompt: str, guidance_scale: float
    ) -> Tensor:
        """What `predict` wants: (2B, 77, D), first B times the negative prompt, then the prompts;
        without guidance, guidance_scale ≤ 1, the prompts alone."""
        if guidance_scale <= 1:
            return self.encode_prompt(prompts)
        return self.encode_prompt([negative_prompt] * len(prompts) + prompts)

    def predict(self, x: Tensor, t: int, context: Tensor, guidance_scale: float) -> Tensor:
        """The UNet's ε̂ or v̂ for x: (B, 4, h, w), with guidance (arXiv 2207.12598 Eq. 6).

        Both prompts go through the UNet in one batch, context as `encode_guided` gives it, and the
        difference that the prompt makes against the negative one is exaggerated.
        """
        times = torch.full((len(context),), t, device=self.device)
        if guidance_scale <= 1:
            return self.unet(x, times, context).float()
        without, towards = self.unet(torch.cat([x, x]), times, context).float().chunk(2)
        return without + guidance_scale * (towards - without)

    def latent_shape(
        self, count: int, height: int | None, width: int | None, latents: Tensor | None
    ) -> tuple[int, int, int]:
        """(4, h, w) for pictures of that size. Raises UserError for one that cannot be."""
        factor, channels = self.vae.factor, self.configs["unet"]["out_channels"]
        if self.configs["unet"]["in_channels"] != channels:
            raise UserError(f"{what_else_it_sees(self.configs['unet'])}: it cannot draw here")
        given = latents is not None and latents.ndim == 4
        default = [n * factor for n in latents.shape[2:]] if given else [self.image_size] * 2
        height = default[0] if height is None else height
        width = default[1] if width is None else width
        shape = (channels, height // factor, width // factor)
        if height % factor or width % factor or min(shape) < 1:
            raise UserError(f"{width}×{height} pixels: give multiples of {factor}")
        if latents is not None and latents.shape != (count, *shape):
            raise UserError(
                f"latents are {list(latents.shape)}, wanted are {[count, *shape]} for "
                f"{count} prompts and {width}×{height} pixels"
            )
        return shape

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) → (B, 3, H, W) in [0, 1], a few at a time to save memory.

        Raises NotFinite where a picture is not.
        """
        z = latents / self.vae.scaling_factor
        few = vae_batch(z.shape[2] * z.shape[3] * self.vae.factor**2)
        with torch.autocast(z.device.type, enabled=False):  # the VAE in its own precision
            pictures = torch.cat([self.vae.decode(part).float() for part in z.split(few)])
        require_finite(pictures, "vae")
        return (pictures / 2 + 0.5).clamp(0, 1)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {name: network.state_dict() for name, network in self.networks.items()}

    def fingerprint(self) -> str:
        """A hash of the configs and of a sample of every tensor: which model this is."""
        digest = hashlib.sha256()
        for name, tensors in self.tensors().items():
            for key, tensor in tensors.items():
                flat = tensor.detach().flatten()
                sample = flat[:: max(1, len(flat) // 64)].half().cpu()
                digest.update(f"{name}.{key}{list(tensor.shape)}".encode())
                digest.update(sample.numpy().tobytes())
        digest.update(repr((self.schedule.prediction_type, self.vae.scaling_factor)).encode())
        return digest.hexdigest()

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write diffusers' layout; loads in diffusers, transformers and here.

        Floating weights are cast to `dtype` on the way, None keeps them. Raises UserError if the
        disk is too full.
        """
        folder = Path(folder)
        checkpoint.write_folder(folder, self.configs, self.tensors(), self.tokenizer, dtype)
        for name, text in self.licence_files.items():
            write_text(folder / name, text)
        card = f"---\nlicense: {self.licence or 'unknown'}\n---\nWeights from {self.source}.\n"
        write_text(folder / "README.md", card)

    def save_single_file(
        self,
        path: str | Path,
        dtype: torch.dtype | None = torch.float16,
        metadata: dict[str, str] | None = None,
    ) -> None:
        """Write one .safetensors in LDM layout, for A1111, ComfyUI and from_single_file.

        `metadata` goes into its header as well. Words that were added stay out: the
        readers of single files know CLIP's alone. Raises UserError if the disk is too full.
        """
        path = Path(path)
        if path.suffix.lower() != ".safetensors":
            raise UserError(f"{path}: a single file is named .safetensors")
        configs, tensors = self.configs, self.tensors()
        if self.tokenizer.added:
            known, key = min(self.tokenizer.added.values()), "embeddings.token_embedding.weight"
            text = configs["text_encoder"] | {"vocab_size": known}
            configs = configs | {"text_encoder": text}
            tensors["text_encoder"][key] = tensors["text_encoder"][key][:known]
            words = ", ".join(self.tokenizer.added)
            warn(f"{words}: a single file has no place for added words", stacklevel=2)
        about = {
            "modelspec.license": self.licence or "unknown",
            "minibooth.licence_files": json.dumps(self.licence_files),
            **(metadata or {}),
        }
        checkpoint.write_single_file(path, configs, tensors, self.tokenizer, dtype, about)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Without waiting for it: from page-locked memory a GPU fetches by itself."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


class NotFinite(UserError):
    """A network gave NaN or infinity, which would be drawn as black."""


def require_finite(x: Tensor, network: str) -> None:
    """Raise NotFinite, naming the network that gave x, unless all of it is finite. Waits for the
    device: once per batch, after its last step."""
    if not x.isfinite().all():
        raise NotFinite(
            f"the {network} gives NaN or infinity, which would be drawn as black: its weights are "
            "damaged, or too large for 16 bits; compute in fp32 (--dtype fp32, and to train "
            "--mixed_precision no) or get the model again"
        )


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [0, 1] → N RGB pictures."""
    pixels = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def text_projections(unet: UNet) -> list[torch.nn.Module]:
    """Every layer of the UNet that makes keys or values of the text."""
    blocks = [m for m in unet.modules() if isinstance(m, TransformerBlock)]
    return [p for block in blocks for p in (block.attn2.to_k, block.attn2.to_v)]


@contextmanager
def projected_once(unet: UNet) -> Iterator[None]:
    """Within it, the text's keys and values are computed once and not at every step.

    They depend on nothing but the text: a projection that is given the same tensor again returns
    what it returned before. So neither text nor weights may be written to in the meantime.
    """

    def remembering(project: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        last: list[Tensor | None] = [None, None]

        def forward(context: Tensor) -> Tensor:
            if last[0] is not context:
                last[:] = context, project(context)
            return last[1]

        return forward

    projections = text_projections(unet)
    with replaced(projections, [remembering(p.forward) for p in projections]):
        yield


@contextmanager
def replaced(modules: list[torch.nn.Module], forwards: list[Callable]) -> Iterator[None]:
    """Within it, each module computes what its `forwards` does; then what it did before."""
    before = [vars(module).get("forward") for module in modules]
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward  # the class's own shows again
            else:
                module.forward = forward


def check_sampling(
    count: int, sampler: str, output: str, eta: float, seed: int, batch_size: int | None
) -> None:
    """Raise UserError for settings of `generate` that cannot be."""
    if count < 1:
        raise UserError("no prompts: give at least one")
    if sampler not in SAMPLERS:
        raise UserError(f"sampler {sampler!r}: give one of {', '.join(SAMPLERS)}")
    if output not in OUTPUTS:
        raise UserError(f"output {output!r}: give one of {', '.join(OUTPUTS)}")
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta}: give a number from 0 (DDIM) to 1 (as much noise as DDPM)")
    if not 0 <= seed < 2**63 - count:
        raise UserError(f"seed {seed}: give a whole number from 0")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size {batch_size}: give a number from 1")


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: str | Path | Tokenizer | None = None,
    vae: str | Path | None = None,
    prediction_type: str | None = None,
    revision: str | None = None,
    ema: bool = False,
) -> StableDiffusion:
    """Load a model: a folder in diffusers' layout, a single file, or an id on the hub.

    `tokenizer` (a folder or id) and `vae` (folder, id or file) replace the model's own; a single
    file that holds no vocabulary has CLIP's. `prediction_type` overrides what the model says,
    "epsilon" or "v_prediction"; `revision` is a branch, tag or commit on the hub; `ema` takes the
    averaged weights of a single file that has them beside the plain ones. With dtype fp16 the VAE
    stays fp32, since some overflow to black pictures. Raises UserError where the source is
    no model, damaged, hostile, of another kind or incomplete, or its parts do not fit together.
    """
    found = checkpoint.read(source, tokenizer, vae, revision, ema)
    scheduler = found.configs["scheduler"]
    if prediction_type is not None:
        scheduler["prediction_type"] = prediction_type
    networks = {}
    for name in checkpoint.NETWORKS:
        wide = name == "vae" and dtype == torch.float16
        weights = found.tensors.pop(name)
        networks[name] = checkpoint.build(
            name, found.configs[name], weights, torch.float32 if wide else dtype, device
        ).to(memory_format=memory_format(name, device))
    check_fit(source, found)
    if found.needs_probe and prediction_type is None and predicts_v(networks["unet"]):
        scheduler["prediction_type"] = "v_prediction"
    if found.needs_probe and scheduler["prediction_type"] == "v_prediction":
        found.configs["unet"] |= SD2_V
    return StableDiffusion(
        tokenizer=found.tokenizer,
        schedule=read_schedule(scheduler).to(device),
        configs=found.configs,
        source=hub.public_name(source),
        licence=found.licence,
        licence_files=found.licence_files,
        **networks,
    )


def vae_batch(pixels: int) -> int:
    """How many pictures of so many pixels the VAE takes at once: one at least."""
    return max(1, VAE_PIXELS // pixels)


def memory_format(name: str, device: str | torch.device) -> torch.memory_format:
    """The order of the weights in memory in which convolutions are fastest.

    A GPU wants the channels last, and so does the VAE on a CPU; the UNet is no faster for it there
    and stays in the file that it is mapped from.
    """
    last = name == "vae" or torch.device(device).type == "cuda"
    return torch.channels_last if last else torch.preserve_format


def check_fit(source: str | Path, found: checkpoint.Checkpoint) -> None:
    """Raise UserError unless the parts speak of the same tokens, text vectors and latents."""
    text, unet, vae = (found.configs[name] for name in ("text_encoder", "unet", "vae"))
    misfit = f"{source}: its parts do not fit together"
    if text["hidden_size"] != unet["cross_attention_dim"]:
        raise UserError(f"{misfit}: text {text['hidden_size']}, UNet {unet['cross_attention_dim']}")
    if vae["latent_channels"] != unet["out_channels"]:
        raise UserError(
            f"{misfit}: latents of {vae['latent_channels']} and of {unet['out_channels']} channels"
        )
    token = max([*found.tokenizer.vocab.values(), *found.tokenizer.added.values()])
    if token >= text["vocab_size"]:
        raise UserError(f"{misfit}: token {token}, text encoder for {text['vocab_size']}")


def read_schedule(config: dict) -> Schedule:
    check_config("scheduler", config)
    try:
        built = Schedule.from_config(config)
        schedule.timesteps(built, 1)  # a step would also stumble over an offset that is no number
        return built
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"the scheduler's config is damaged: {first_line(e)}") from None


@torch.no_grad()
def predicts_v(unet: UNet) -> bool:
    """Whether an SD 2.x UNet predicts v: given almost pure noise, ε is its input and v is not.

    The test is AUTOMATIC1111's: a constant input at the last timestep, mean(output − input) < −1.
    """
    weight = unet.conv_in.weight
    x = torch.full((1, weight.shape[1], 8, 8), 0.5, device=weight.device)
    width = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.in_features
    context = torch.full((1, 2, width), 0.5, device=weight.device)
    t = torch.tensor([999], device=weight.device)
    prediction = unet(x, t, context).float()
    return (prediction - x[:, : prediction.shape[1]]).mean().item() < -1
