"""Files that are whole or not there: atomic writes, safetensors, free space."""

import errno
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError

DTYPES = {
    torch.float32: ("F32", torch.int32),
    torch.float16: ("F16", torch.int16),
    torch.bfloat16: ("BF16", torch.int16),
    torch.float64: ("F64", torch.int64),
    torch.int64: ("I64", torch.int64),
}


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; on success it becomes `path`, on failure it is removed.

    Whoever looks sees the old file or the new one, also after a crash in between. Raises UserError
    where the disk is full or the place cannot be written to.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        advice = "make room on it" if e.errno == errno.ENOSPC else "choose another place"
        raise UserError(f"cannot write {path}: {e.strerror or e}; {advice}") from e
    finally:
        with suppress(OSError):  # where its folder could not be made there is nothing to remove
            part.unlink()


def write_text(path: str | Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text, "utf-8")


def write_json(path: str | Path, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file, atomically: length of the header, JSON header, raw bytes.

    Floating tensors are cast to `dtype` and moved to the CPU one at a time, so that no second copy
    of a model is ever in memory.
    """
    header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, tensor in tensors.items():
        kept = dtype is None or not tensor.is_floating_point()
        stored = tensor.dtype if kept else dtype
        size = tensor.numel() * stored.itemsize
        span = [end, end + size]
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPES[stored][0], "shape": shape, "data_offsets": span}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned, for those who map the file
    require_space(path, end)
    with atomic(path) as part, open(part, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            kept = dtype is None or not tensor.is_floating_point()
            cast = tensor.detach().to("cpu", tensor.dtype if kept else dtype).contiguous()
            f.write(memoryview(cast.flatten().view(DTYPES[cast.dtype][1]).numpy()))


def require_space(path: str | Path, size: int) -> None:
    """Raise UserError unless the disk that `path` is on has `size` bytes and a little more free."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size + 2**20:
        raise UserError(
            f"not enough disk space for {path}: {gigabytes(size)} needed, {gigabytes(free)} free"
        )


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
