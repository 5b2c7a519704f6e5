"""A hostile file costs neither memory nor time: refused in under a second with less than 200 MB."""

import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import peers
import pytest
import torch
from test_damaged import entry, safetensors_bytes
from weight_files import legacy, zipped

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="memory is measured in forks")
ROOT = Path(__file__).parents[2]
GB, TB = 10**9, 10**12


def sparse(path: Path, size: int, head: bytes = b"") -> Path:
    """`head`, then nothing up to `size`: it takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        f.write(head)
        f.truncate(size)
    return path


def tensors(path: Path, **shapes) -> Path:
    """A whole safetensors file, all zeros, of tensors with these shapes in 16 bits."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name.replace("__", ".")] = entry(end, end + size, shape, "F16")
        end += size
    head = safetensors_bytes(header, b"")
    return sparse(path, len(head) + end, head)


def archive(path: Path, **members) -> Path:
    """A zip as torch.save makes it, with members of so many zeros, squeezed or not, or of bytes."""
    zipped({"a": torch.zeros(2)}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        for name, content in members.items():
            with z.open(f"model/{name}", "w", force_zip64=True) as f:
                for _ in range(content // 10**6):
                    f.write(bytes(10**6))
    return path


def png(path: Path, width: int, height: int, kind: bytes = b"IHDR") -> Path:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    about = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10**6))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", about) + chunk(b"IDAT", pixels))
    return path


def many_tensors() -> bytes:
    return safetensors_bytes({f"t{i}": entry(0, 0, (0,)) for i in range(60_000)}, b"")


def lying_zip(path: Path) -> Path:
    """Its directory says of the pickle that it unpacks to 4 GB."""
    zipped({"a": torch.zeros(2)}, path)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    data[at + 20 : at + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    path.write_bytes(data)
    return path


def with_config(folder: Path, name: str, size: int) -> Path:
    """A small model's folder, of which one file is that large."""
    model, _ = peers.model("sd1")
    for file in model.rglob("*"):
        if file.is_file():
            link = folder / file.relative_to(model)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    (folder / name).unlink(missing_ok=True)
    sparse(folder / name, size, b'{"a": "')
    return folder


def pickled(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def old_storage(path: Path) -> Path:
    """The format before zips, with a storage that says it has a billion numbers of 32 bits."""
    legacy({"a": torch.zeros(3)}, path)
    data = path.read_bytes()
    short, long = b"K\x03N", b"J" + GB.to_bytes(4, "little") + b"N"
    assert data.count(short) == 1
    return pickled(path, data.replace(short, long))


UNET, LAYER = "model__diffusion_model__input_blocks__", "unet__mid_block__attentions__0__"
TEXT = f"{UNET}1__1__transformer_blocks__0__attn2__to_k__weight"
A, B = (f"{LAYER}transformer_blocks__0__attn1__to_q__lora_{x}__weight" for x in "AB")
LARGE = 4 * GB  # numbers of 16 bits


def large(kind: str, **shapes) -> tuple:
    """Whole, and for nothing that is here."""
    return kind, lambda folder: tensors(folder / "x.safetensors", **shapes)


def huge(kind: str, name: str, head: bytes) -> tuple:
    """4 GB, of which only the first bytes are not 0."""
    return kind, lambda folder: sparse(folder / name, 4 * GB, head)


def written(kind: str, name: str, data: bytes) -> tuple:
    return kind, lambda folder: pickled(folder / name, data)


TERABYTE = TB.to_bytes(6, "little")
HOSTILE = {
    "header of 2^62 bytes": written("model", "x.safetensors", b"\xff" * 7 + b"\x3f{}"),
    "header of 3 GB": huge("model", "x.safetensors", (3 * GB).to_bytes(8, "little")),
    "60,000 tensors": written("model", "x.safetensors", many_tensors()),
    "a large UNet": large(
        "model", **{f"{UNET}0__0__weight": (320, 4, 3, 3), TEXT: (LARGE // 768, 768)}
    ),
    "a large VAE": large("vae", decoder__conv_in__weight=(LARGE,)),
    "a LoRA for large layers": large("lora", **{A: (4, LARGE // 4), B: (128, 4)}),
    "a LoRA of large rank": large("lora", **{A: (LARGE // 256, 128), B: (128, LARGE // 256)}),
    "a word of many vectors": large("word", word=(LARGE // 128, 128)),
    "a word of many numbers": large("word", word=(1, LARGE)),
    "a zip that unpacks to much": ("model", lambda p: archive(p / "x.ckpt", more=GB // 2)),
    "weights that unpack to much": (
        "tensors",
        lambda p: archive(p / "x.ckpt", **{"data/7": GB // 2}),
    ),
    "a zip that says 4 GB": ("model", lambda p: lying_zip(p / "x.ckpt")),
    "a pickle of 4 GB": huge("model", "x.ckpt", b"\x80\x02]q\x00("),
    "a pickle of a text of 4 GB": huge(
        "tensors", "x.ckpt", b"\x80\x04\x8d" + (4 * GB - 100).to_bytes(8, "little")
    ),
    "a pickle that makes a terabyte": written(
        "model", "x.ckpt", b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + TERABYTE + b"\x85R."
    ),
    "a pickle of a storage of 4 GB": ("tensors", lambda p: old_storage(p / "x.ckpt")),
    "2^31 pixels": ("photograph", lambda p: png(p / "x.png", 2**16, 2**15)),
    "2^62 pixels": ("photograph", lambda p: png(p / "x.png", 2**31 - 1, 2**31 - 1)),
    "a photograph of 4 GB of nothing": huge("photograph", "x.jpg", b""),
    "a photograph that is a program for a printer": written(
        "photograph", "x.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    ),
    "settings of 4 GB": huge("settings", "x.json", b'{"a": "'),
    **{
        f"{name} of 4 GB": ("model", lambda p, name=name: with_config(p / "x", name, 4 * GB))
        for name in (
            "model_index.json",
            "unet/config.json",
            "scheduler/scheduler_config.json",
            "tokenizer/vocab.json",
            "tokenizer/merges.txt",
            "tokenizer/special_tokens_map.json",
            "tokenizer/tokenizer_config.json",
            "tokenizer/added_tokens.json",
            "README.md",
            "LICENSE",
        )
    },
    "a run's identity of 4 GB": (
        "run",
        lambda p: sparse(p / "x/state/step-00000001/identity.json", 4 * GB).parents[2],
    ),
}


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    """What each of them costs, by its name."""
    cases = [
        (kind, str(make(tmp_path_factory.mktemp("hostile")))) for kind, make in HOSTILE.values()
    ]
    command = [sys.executable, str(Path(__file__).with_name("cost.py"))]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, env=env)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(HOSTILE, lines, strict=True))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_before_it_costs_anything(name, costs):
    seconds, megabytes, said = costs[name]
    assert said.startswith("UserError: ") and "\n" not in said, said
    assert seconds < 1 and megabytes < 200, said
