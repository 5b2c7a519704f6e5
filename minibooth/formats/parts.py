"""The parts of a model together: which they are, where they are, and how they are written."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from warnings import warn

import torch
from torch import Tensor

from ..common.errors import UserError
from ..common.files import write_text
from ..schedule import Schedule
from ..text_encoder import TextEncoder
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE
from . import saving
from .checkpoint import memory_format
from .configs import what_else_it_sees
from .single_files import LEVELS, ZEROS


@dataclass
class Parts:
    """What a model consists of."""

    tokenizer: Tokenizer  # SDXL: of both text encoders
    text_encoder: TextEncoder
    vae: VAE
    unet: UNet
    schedule: Schedule
    configs: dict[str, dict]  # of each network and the scheduler: written back on save
    source: str = ""  # what it was loaded from: hub id, toybox, or a folder's or file's name
    licence: str | None = None  # of the weights, by its short name
    licence_files: dict[str, str] = field(default_factory=dict)
    text_encoder_2: TextEncoder | None = None  # SDXL
    zeros_for_empty: bool = False  # SDXL: no negative prompt is no encoded text, but zeros
    levels: int | None = None  # an upscaler: of noise on the small picture, each below this

    @property
    def text_encoders(self) -> dict[str, TextEncoder]:
        second = {"text_encoder_2": self.text_encoder_2} if self.text_encoder_2 else {}
        return {"text_encoder": self.text_encoder} | second

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        return {"unet": self.unet, "vae": self.vae, **self.text_encoders}

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def image_size(self) -> int:
        """The side in pixels of the square pictures it was trained on."""
        return (self.configs["unet"].get("sample_size") or 64) * self.vae.factor

    def to(self, device, but: Collection[str] = ()) -> Self:
        """All networks go there `but` those of these names."""
        for name, network in self.networks.items():
            if name not in but:
                network.to(device, memory_format=memory_format(name, device))
        self.schedule = self.schedule.to(device)
        return self

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
        parts = self.configs, self.tensors(), self.tokenizer
        saving.write_folder(folder, *parts, dtype, self.zeros_for_empty, self.levels)
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
            for name in self.text_encoders:
                configs = configs | {name: configs[name] | {"vocab_size": known}}
                tensors[name][key] = tensors[name][key][:known]
            words = ", ".join(self.tokenizer.added)
            warn(f"{words}: a single file has no place for added words", stacklevel=2)
        about = {
            "modelspec.license": self.licence or "unknown",
            "minibooth.licence_files": json.dumps(self.licence_files),
            **(metadata or {}),
        }
        if self.text_encoder_2 and not self.zeros_for_empty:
            about[ZEROS] = "false"
        if self.levels is not None:
            about[LEVELS] = str(self.levels)
        saving.write_single_file(path, configs, tensors, self.tokenizer, dtype, about)
