"""Files of tensors: safetensors in and out, pickles in without running what is in them."""

import json
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..common.errors import UserError, first_line
from ..common.files import atomic, require_space

DTYPES = {
    torch.float32: ("F32", torch.int32),
    torch.float16: ("F16", torch.int16),
    torch.bfloat16: ("BF16", torch.int16),
    torch.float64: ("F64", torch.int64),
    torch.int64: ("I64", torch.int64),
    torch.uint8: ("U8", torch.uint8),
}


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | Callable[[Tensor], torch.dtype] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file, atomically: length of the header, JSON header, raw bytes.

    Floating tensors are cast to `dtype`, or each tensor to what that says of it, and moved to the
    CPU one at a time, so that no second copy of a model is ever in memory.
    """

    def stored(x: Tensor) -> torch.dtype:
        if callable(dtype):
            return dtype(x)
        return x.dtype if dtype is None or not x.is_floating_point() else dtype

    # The widest numbers first: so all are aligned, for those who map the file.
    tensors = dict(sorted(tensors.items(), key=lambda item: -stored(item[1]).itemsize))
    header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * stored(tensor).itemsize
        span = [end, end + size]
        kind = DTYPES[stored(tensor)][0]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": span}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    require_space(path, end)
    with atomic(path) as part, open(part, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            cast = tensor.detach().to("cpu", stored(tensor)).contiguous()
            f.write(memoryview(cast.flatten().view(DTYPES[cast.dtype][1]).numpy()))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a weight file, memory-mapped, and a safetensors file's metadata.

    Pickles (.ckpt, .bin, .pt) are read by torch's restricted unpickler: no code in them runs.
    Raises UserError for a file that is damaged or wants to run code.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as f:
                tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
                return tensors, f.metadata() or {}
        return read_pickle(path), {}
    except UserError:
        raise
    except Exception as e:  # what a damaged file does to its reader has many names
        if foreign := re.search(r"GLOBAL ([\w.]+)", str(e)):
            raise wants_to_run_code(path, [foreign[1]]) from None
        raise UserError(
            f"{path} is damaged or not a weight file: download it again ({first_line(e)})"
        ) from None


# Checkpoints of Lightning carry objects of these beside the weights. They become empty shells.
INERT = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|typing|collections|numpy)\..*"
    r"|(__builtin__|builtins)\.(int|float|str|bool|dict|list|set|tuple|object)"
)
MOST_NESTED = 10  # state_dict within state_dict; a pickle can also hold itself, without end


def read_pickle(path: Path) -> dict[str, Tensor]:
    zipped, shells = zipfile.is_zipfile(path), []
    if zipped:
        foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        if refused := [name for name in foreign if not INERT.fullmatch(name)]:
            raise wants_to_run_code(path, refused)
        shells = [(type(name.rpartition(".")[2], (Shell,), {}), name) for name in foreign]
    with torch.serialization.safe_globals(shells):
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    for _ in range(MOST_NESTED):
        if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
            value = value["state_dict"]
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no dictionary of weights")
    return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}


def wants_to_run_code(path: Path, names: list[str]) -> UserError:
    shown = ", ".join(names[:5])
    return UserError(f"{path} wants to run code ({shown:.200}): not loaded; use safetensors")


class Shell:
    """Stands for a foreign class in a pickle: takes everything, does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass
