"""Who looks at the pictures: CLIP, DINO and LPIPS as in the paper, or the toybox's judge.

transformers and lpips are imported here alone, and only where they are to look: they measure what
the package does, no part of it is made with them.
"""

import warnings
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..common import cli
from ..common.errors import UserError, first_line
from ..formats import hub
from ..toybox import judge as toy
from ..toybox import world
from .options import Options

INSTALL = 'pip install "minibooth[evaluate]"'
CLIP_PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # mean, std
DINO_PIXELS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
BATCH = 32


class Judge(Protocol):
    """What metrics.py asks for. All tensors are on the CPU."""

    about: str  # which models these are, in words
    missing: dict[str, str]  # "clip", "dino", "lpips" → why it is not there, and how to get it

    def image_features(self, images: list[Image.Image], kind: str) -> Tensor:
        """(N, D), each of length 1; kind "clip" or "dino"."""

    def text_features(self, prompts: list[str]) -> Tensor:
        """(N, D), each of length 1, in the space of the "clip" features."""

    def distance(self, a: list[Image.Image], b: list[Image.Image]) -> Tensor:
        """(N,): how different a[i] and b[i] look, 0 for the same."""


def load(options: Options) -> Judge:
    """The judge of these options. Raises UserError if a model is not where it should be, or nothing
    at all can be measured."""
    if options.judge == "toybox":
        return ToyJudge(toy.load(hub.toybox()))
    judge = PublicJudge(options, cli.pick_device(options.device))
    if len(judge.missing) == 3:
        reasons = "; ".join(dict.fromkeys(judge.missing.values()))
        raise UserError(f"neither CLIP and DINO nor LPIPS can be used: {reasons}")
    return judge


def square(image: Image.Image, shorter: int, side: int) -> Image.Image:
    """The middle side² pixels, after the shorter side was resized to `shorter` (bicubic)."""
    width, height = image.size
    longer = shorter * max(width, height) // min(width, height)
    size = (shorter, longer) if width <= height else (longer, shorter)
    image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return image.crop((left, top, left + side, top + side))


def to_tensor(images: list[Image.Image]) -> Tensor:
    """RGB images of one size → (N, 3, H, W) in [0, 1]."""
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


# ---- CLIP, DINO and LPIPS ----------------------------------------------------------------------


class PublicJudge:
    """The paper's models, by way of transformers and lpips."""

    def __init__(self, options: Options, device: torch.device):
        self.device, self.resize, self.missing = device, options.resize, {}
        try:
            import transformers

            CLIPModel, ViTModel = transformers.CLIPModel, transformers.ViTModel
        except ImportError as e:
            self.missing |= dict.fromkeys(("clip", "dino"), how_to_get("transformers", e))
        else:
            transformers.logging.set_verbosity_error()  # what matters is said by the errors below
            transformers.logging.disable_progress_bar()
            self.clip = pretrained(CLIPModel, options.clip, "CLIP").to(device)
            self.tokenizer = read(transformers.CLIPTokenizer, options.clip, "CLIP's tokenizer")
            dino = pretrained(ViTModel, options.dino, "DINO", add_pooling_layer=False)
            self.dino = dino.to(device)
        try:
            self.lpips = load_lpips(options.lpips).to(device)
        except (ImportError, RuntimeError) as e:  # RuntimeError: of a torchvision for another torch
            self.missing["lpips"] = how_to_get("lpips", e)
        except OSError as e:
            self.missing["lpips"] = f"its network cannot be downloaded ({first_line(e)}): connect"
        names = {name: hub.public_name(getattr(options, name)) for name in ("clip", "dino")}
        names["lpips"] = f"LPIPS ({options.lpips})"
        self.about = ", ".join(name for kind, name in names.items() if kind not in self.missing)
        self.about += f"; of each picture the middle 224² after its shorter side is {self.resize}"

    @torch.inference_mode()
    def image_features(self, images: list[Image.Image], kind: str) -> Tensor:
        config = self.clip.config.vision_config if kind == "clip" else self.dino.config
        side = config.image_size  # 224, and `resize` is meant for that
        shorter = round(self.resize * side / 224)
        mean, std = (
            torch.tensor(v, device=self.device)[:, None, None]  # (3, 1, 1)
            for v in (CLIP_PIXELS if kind == "clip" else DINO_PIXELS)
        )
        features = []
        for first in range(0, len(images), BATCH):
            part = [square(image, shorter, side) for image in images[first : first + BATCH]]
            pixels = (to_tensor(part).to(self.device) - mean) / std
            if kind == "clip":
                seen = self.clip.vision_model(pixel_values=pixels).pooler_output
                features.append(self.clip.visual_projection(seen))
            else:
                # [CLS] itself: the pooler of transformers' ViT is none of DINO's.
                features.append(self.dino(pixel_values=pixels).last_hidden_state[:, 0])
        return F.normalize(torch.cat(features).float(), dim=1).cpu()

    @torch.inference_mode()
    def text_features(self, prompts: list[str]) -> Tensor:
        length = self.clip.config.text_config.max_position_embeddings  # 77
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        read = self.clip.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return F.normalize(self.clip.text_projection(read).float(), dim=1).cpu()

    @torch.inference_mode()
    def distance(self, a: list[Image.Image], b: list[Image.Image]) -> Tensor:
        sizes = sorted({image.size for image in (*a, *b)})
        if len(sizes) > 1:
            raise UserError(f"LPIPS compares pictures of one size, and these have several: {sizes}")
        out = []
        for first in range(0, len(a), BATCH):
            part = slice(first, first + BATCH)
            x, y = (2 * to_tensor(images[part]).to(self.device) - 1 for images in (a, b))
            out.append(self.lpips(x, y).flatten())
        return torch.cat(out).float().cpu()


def how_to_get(name: str, error: Exception) -> str:
    """What to do where a library cannot be imported: it, or something it stands on."""
    if isinstance(error, ModuleNotFoundError) and error.name == name:
        return INSTALL
    return f"{name} cannot be imported ({first_line(error)}): {INSTALL} in a fresh environment"


def pretrained(cls, source: str, what: str, **settings):
    """A model of transformers, whole. Raises UserError if it is missing, cannot be read, or is of
    another kind: transformers itself would fill what it does not find with random weights."""
    from transformers import AutoConfig

    kind = read(AutoConfig, source, what).model_type
    if kind != cls.config_class.model_type:
        raise UserError(f"{source} is not {what}: it is a model of the kind {kind}")
    model, info = read(cls, source, what, output_loading_info=True, **settings)
    if info["missing_keys"]:
        raise UserError(f"{source} lacks weights of {what}: {min(info['missing_keys'])}")
    return model.eval().requires_grad_(False)


def read(cls, source: str, what: str, **settings):
    """cls.from_pretrained(source), with every failure as a UserError. What is in the hub's cache is
    used as it is, without asking the hub."""
    if not Path(source).is_dir():
        if not hub.is_repo_id(source):
            raise UserError(f"{source} is not there: give a folder with {what}, or a hub id")
        hub.Repo(source).file("config.json")  # says what is wrong in one line, if something is
    for local in (True, False):
        try:
            return cls.from_pretrained(source, local_files_only=local, **settings)
        except Exception as e:  # what can be wrong with a folder has many names
            if not local or Path(source).is_dir():
                why = first_line(e)
                raise UserError(f"{source} cannot be read as {what}: {why}") from None


def load_lpips(network: str):
    """Raises ImportError or RuntimeError if lpips cannot be imported, OSError if its network has to
    be downloaded and cannot."""
    import lpips

    with warnings.catch_warnings(action="ignore"):  # it asks torchvision in an old way
        return lpips.LPIPS(net=network, verbose=False).eval().requires_grad_(False)


# ---- the toybox's ------------------------------------------------------------------------------


class ToyJudge:
    """The judge of the drawn world in their places.

    For DINO its embedding, in which one and the same thing is near to itself; for CLIP what it
    reads in a picture (class, colour, place …) against what a prompt says; for LPIPS the distance
    of embeddings.
    """

    about = "the toybox's judge, in the places of CLIP, DINO and LPIPS: not the paper's numbers"

    def __init__(self, judge: toy.Judge):
        self.judge, self.missing = judge, {}

    @torch.inference_mode()
    def image_features(self, images: list[Image.Image], kind: str) -> Tensor:
        x = toy.to_tensor([square(image, world.SIDE, world.SIDE) for image in images])
        seen = [self.judge(part) for part in x.split(BATCH)]
        if kind == "dino":
            return torch.cat([s["embedding"] for s in seen])  # (N, 64)
        read = [torch.cat([s[field].softmax(dim=1) for field in toy.READS], dim=1) for s in seen]
        return F.normalize(torch.cat(read), dim=1)  # (N, 33)

    def text_features(self, prompts: list[str]) -> Tensor:
        rows = []
        for prompt in prompts:
            said = says(prompt)
            rows.append(
                [
                    float(field in said and said[field] == value)
                    for field, values in toy.READS.items()
                    for value in values
                ]
            )
        return F.normalize(torch.tensor(rows), dim=1)  # (N, 33); what is not said is 0

    def distance(self, a: list[Image.Image], b: list[Image.Image]) -> Tensor:
        x, y = (self.image_features(images, "dino") for images in (a, b))
        return 1 - (x * y).sum(dim=1)


def says(prompt: str) -> dict[str, str]:
    """What a prompt says of a scene, by field: "a red dog at night" → kind, colour and place."""
    said = {}
    for field in ("accessory", "place"):  # first, for their words: a red hat is no red dog
        for value in toy.READS[field]:
            if value and value in prompt:
                said[field], prompt = value, prompt.replace(value, "")
    for field in ("kind", "colour", "style"):
        for value in toy.READS[field]:
            if value in prompt.split():
                said[field] = value
    return said
