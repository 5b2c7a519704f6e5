"""CLIP and DINO of the real architecture, small, with random weights; and small data sets."""

import csv
import functools
from pathlib import Path

import numpy as np
import peers
import runs
import tiny
import torch
import transformers
from PIL import Image

from minibooth.evaluate import __main__ as program
from minibooth.evaluate import subjects
from minibooth.evaluate.options import Options

SHARED = Path(__file__).parents[3] / "shared" / "dreambooth"
SIDE = 32  # of what the small CLIP and DINO see
CLIP_ID, DINO_ID = "openai/clip-vit-base-patch32", "facebook/dino-vits16"


@functools.cache
def clip_folder():
    folder = Path(peers.KEPT.name) / "clip"
    vocab, _ = peers.vocabulary()
    size = {"hidden_size": 32, "intermediate_size": 64}
    size |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config=size
        | {
            "vocab_size": len(vocab),
            "bos_token_id": vocab["<|startoftext|>"],
            "eos_token_id": vocab["<|endoftext|>"],
        },
        vision_config=size | {"image_size": SIDE, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    tiny.randomize(transformers.CLIPModel(config), seed=1).save_pretrained(folder)
    peers.write_tokenizer(folder)
    return folder


@functools.cache
def dino_folder():
    folder = Path(peers.KEPT.name) / "dino"
    config = transformers.ViTConfig(
        **{"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "image_size": SIDE, "patch_size": 8},
    )
    # With a pooler, as the public file has one; it must not be used.
    tiny.randomize(transformers.ViTModel(config), seed=2).save_pretrained(folder)
    return folder


def options(cls=Options, **changes):
    given = {"clip": str(clip_folder()), "dino": str(dino_folder()), "device": "cpu"}
    return cls(**given | {"steps": 1, "images": 2, "class_images": 2} | changes)


def noise(seed, width=48, height=48):
    """A smooth random picture: random pixels, enlarged."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


class Lpips:
    """In the place of lpips.LPIPS: another formula, but of the same shapes and ranges."""

    def __init__(self, net, verbose):
        self.net = net

    def eval(self):
        return self

    def requires_grad_(self, wanted):
        return self

    def to(self, device):
        return self

    def __call__(self, a, b):
        assert a.shape == b.shape and a.ndim == 4 and -1 <= a.min() < 0
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)


def make_dataset(folder, classes, photographs, prompts=("a {0} {1} in the snow", "a {0} {1}")):
    """`classes`: subject → noun; `photographs`: subject → how many pictures lie in its folder."""
    lines = [f"'{p}'.format(unique_token, class_token)," for p in prompts]
    text = ["Classes", "", "subject_name,class", *(f"{k},{v}" for k, v in classes.items()), ""]
    for title in ("Object Prompts", "Live Subject Prompts"):
        text += [title, "", "prompt_list = [", *lines, "]", ""]
    folder.mkdir(parents=True)
    (folder / subjects.FILE).write_text("\n".join(text))
    seed = 0
    for name, count in photographs.items():
        (folder / name).mkdir()
        for i in range(count):
            noise(seed).save(folder / name / f"{i:02d}.png")
            seed += 1
    return folder


def run(monkeypatch, capsys, *given):
    """The program as a user runs it: exit status, stdout, stderr."""
    return runs.program(monkeypatch, capsys, program, *given)


def cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a @ b) / np.sqrt((a @ a) * (b @ b))


def peer_pixels(image, mean, std):
    """transformers' own preparation: shorter side 256/224 of what is seen, middle, normalised."""
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": round(256 * SIDE / 224)},
        crop_size={"height": SIDE, "width": SIDE},
        resample=Image.Resampling.BICUBIC,
        image_mean=list(mean),
        image_std=list(std),
    )
    return processor(image, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def peer_features(images, kind):
    """One picture at a time through transformers' public functions."""
    if kind == "clip":
        model = transformers.CLIPModel.from_pretrained(clip_folder()).eval()
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        seen = [model.get_image_features(peer_pixels(i, mean, std)) for i in images]
        return [getattr(s, "pooler_output", s)[0].numpy() for s in seen]
    model = transformers.ViTModel.from_pretrained(dino_folder()).eval()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return [model(peer_pixels(i, mean, std)).last_hidden_state[0, 0].numpy() for i in images]


@torch.no_grad()
def peer_texts(prompts):
    model = transformers.CLIPModel.from_pretrained(clip_folder()).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder())
    read = [model.get_text_features(**tokenizer(p, return_tensors="pt")) for p in prompts]
    return [getattr(r, "pooler_output", r)[0].numpy() for r in read]


CLASSES = {"dog": "dog", "dog2": "dog", "backpack": "backpack", "backpack_dog": "backpack"}


def read_csv(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))
