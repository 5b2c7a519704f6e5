"""2,000 damaged files of every kind that is read: each is read or refused in one line, and soon."""

import json
import random
import shutil
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import peers
import pytest
import runs
import torch
from cost import READERS, peak
from PIL import Image
from weight_files import legacy, zipped

import minibooth
from minibooth import UserError, lora
from minibooth.formats import adapters
from minibooth.training import resume
from minibooth.training.settings import TrainConfig

COUNT, SECONDS, MEGABYTES = 2000, 5, 500  # each may take so long; all may take so much together
NUMBERS = (0, 1, 127, 128, 255)
VALUES = (None, True, -1, 0, 2, 1e308, float("nan"), 2**31, 2**63, 10**30, "", "x", "\x00", [], {})
VALUES += ([[]], {"a": {}}, ["a"] * 50, [1, 2, 3, 4, 5, 6, 7, 8, 9], "../../etc/passwd", "9" * 5000)


def seeds(folder: Path) -> list[tuple[str, Path, list[str]]]:
    """(how it is read, what is read, the files of it to damage) of whole ones in `folder`."""
    model, _ = peers.model("sd1")
    shutil.copytree(model, folder / "model")
    sd = minibooth.load(model)
    sd.save_single_file(folder / "single.safetensors")
    state = {k: v.clone() for k, v in sd.unet.state_dict().items()}
    zipped({"state_dict": state, "epoch": 3}, folder / "zipped.ckpt")
    legacy({"state_dict": state, "epoch": 3}, folder / "legacy.ckpt")
    toybox = minibooth.load("toybox")
    of_unet = {"unet": lora.create(toybox.unet, 2, 2, "attention", seed=0)}
    adapters.write_kohya_lora(folder / "lora.safetensors", toybox.networks, of_unet)
    width = toybox.configs["text_encoder"]["hidden_size"]
    adapters.write_embedding(folder / "word.safetensors", "<w>", torch.randn(2, width))
    (folder / "settings.json").write_text(
        json.dumps(vars(TrainConfig(**runs.settings("out"))), indent=1)
    )
    resume.save(folder / "run", 3, {"a": torch.randn(3, 3)}, {"seed": 1, "method": "lora"}, "full")
    pixels = np.random.default_rng(0).integers(0, 255, (24, 36, 3), dtype=np.uint8)
    for kind in ("png", "jpg", "webp", "gif", "tiff", "bmp"):
        Image.fromarray(pixels).save(folder / f"photograph.{kind}")
    Image.fromarray(pixels.astype(np.uint16)[..., 0] * 200).save(folder / "deep.png")
    parts = [f"{part}/config.json" for part in ("unet", "vae", "text_encoder")]
    parts += ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"]
    parts += [f"tokenizer/{n}" for n in ("merges.txt", "special_tokens_map.json")]
    parts += ["tokenizer/tokenizer_config.json", "unet/diffusion_pytorch_model.safetensors"]
    inside = "state/step-00000003"
    return [
        *[("model", folder / "model", [f"model/{name}"]) for name in parts],
        ("model", folder / "single.safetensors", ["single.safetensors"]),
        ("tensors", folder / "zipped.ckpt", ["zipped.ckpt"]),
        ("tensors", folder / "legacy.ckpt", ["legacy.ckpt"]),
        ("lora", folder / "lora.safetensors", ["lora.safetensors"]),
        ("word", folder / "word.safetensors", ["word.safetensors"]),
        ("settings", folder / "settings.json", ["settings.json"]),
        (
            "run",
            folder / "run",
            [f"run/{inside}/{n}" for n in ("identity.json", "state.safetensors")],
        ),
        *[("photograph", f, [f.name]) for f in sorted(folder.glob("*.*")) if f.suffix in PICTURES],
    ]


PICTURES = (".png", ".jpg", ".webp", ".gif", ".tiff", ".bmp")


def damaged_json(value, dice: random.Random):
    """With one value in it replaced, removed or given another name."""
    places = []

    def visit(of):
        keys = of if isinstance(of, dict) else range(len(of))
        for key in list(keys)[:2000]:
            places.append((of, key))
            if isinstance(of[key], dict | list):
                visit(of[key])

    if isinstance(value, dict | list):
        visit(value)
    if not places:
        return dice.choice(VALUES)
    of, key = dice.choice(places)
    way = dice.randrange(4)
    if way == 0 and isinstance(of, dict):
        del of[key]
    elif way == 1 and isinstance(of, dict):
        of[dice.choice(("", "x", key + " ", key.upper()))] = of.pop(key)
    else:
        of[key] = dice.choice(VALUES)
    return value


def damaged(data: bytes, dice: random.Random, others: list[bytes]) -> bytes:
    """Bytes changed in one to four places, mostly near the start, where headers are."""
    data = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4))):
        reach = dice.choice((16, 200, 4000, len(data) + 1))
        at = dice.randrange(min(reach, len(data) + 1))
        length = dice.choice((1, 2, 4, 8, 100, 5000))
        way = dice.randrange(7)
        if way == 0:
            del data[at:]
        elif way == 1:
            del data[at : at + length]
        elif way == 2:
            data[at:at] = data[at : at + length]
        elif way == 3:
            data[at : at + length] = dice.randbytes(length)
        elif way == 4:
            other = dice.choice(others)
            data[at : at + length] = other[at : at + length]
        elif way == 5:
            data[at : at + min(length, 8)] = bytes([dice.choice(NUMBERS)]) * min(length, 8)
        elif at < len(data):
            data[at] ^= 1 << dice.randrange(8)
    return bytes(data)


def header_damaged(data: bytes, dice: random.Random) -> bytes:
    """A safetensors file whose header is whole JSON, with another value in it."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for key, value in header.get("__metadata__", {}).items():
        if value.startswith("{") and dice.random() < 0.5:
            header["__metadata__"][key] = json.dumps(damaged_json(json.loads(value), dice))
            break
    else:
        header = damaged_json(header, dice)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.slow
def test_damaged_files_of_every_kind_are_read_or_refused_in_one_line(tmp_path, monkeypatch, capsys):
    warnings.simplefilter("ignore")
    import cost

    monkeypatch.setattr(cost, "toybox", minibooth.load("toybox"), raising=False)
    kinds = seeds(tmp_path)
    for kind, source, _ in kinds:
        READERS[kind](source)  # whole, they are read
    wholes = [(tmp_path / name).read_bytes() for _, _, names in kinds for name in names]
    said, slowest, before = Counter(), 0.0, peak()
    for i in range(COUNT):
        dice = random.Random(i)
        kind, source, names = kinds[i % len(kinds)]
        path = tmp_path / dice.choice(names)
        whole = path.read_bytes()
        if path.suffix == ".json" and dice.random() < 0.7:
            path.write_text(json.dumps(damaged_json(json.loads(whole), dice)))
        elif path.suffix == ".safetensors" and dice.random() < 0.5:
            path.write_bytes(header_damaged(whole, dice))
        else:
            path.write_bytes(damaged(whole, dice, wholes))
        started = time.process_time()
        try:
            READERS[kind](source)
            said["read"] += 1
        except UserError as e:
            assert "\n" not in str(e) and len(str(e)) < 700, (i, path.name, str(e))
            said["refused"] += 1
        except Exception as e:
            raise AssertionError(f"{i}: {path.name} ends in {type(e).__name__}: {e}") from e
        slowest = max(slowest, time.process_time() - started)
        assert slowest < SECONDS, (i, path.name)
        path.write_bytes(whole)
    assert peak() - before < MEGABYTES
    assert min(said["read"], said["refused"]) > COUNT // 10
    with capsys.disabled():
        print(f"\n{dict(said)}, the slowest {slowest:.2f} s, {peak() - before:.0f} MB")
