"""Files of tensors: safetensors in and out, pickles in without running what is in them."""

import json
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from ..common.errors import UserError, first_line
from ..common.files import atomic, gigabytes, require_space

DTYPES = {
    torch.float32: ("F32", torch.int32),
    torch.float16: ("F16", torch.int16),
    torch.bfloat16: ("BF16", torch.int16),
    torch.float64: ("F64", torch.int64),
    torch.int64: ("I64", torch.int64),
    torch.uint8: ("U8", torch.uint8),
}


SAFETENSORS = (".safetensors", ".sft")  # endings, in any case


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


def require_range(
    where: str | Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> None:
    """Raise UserError, naming the tensor, where one is not finite, or would not be in `dtype`."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        ends = torch.stack(tensor.detach().aminmax())  # NaN if any of it is
        if not ends.isfinite().all():
            raise UserError(f"{where} is not written: {name} is not finite")
        if dtype is not None and not ends.to(dtype).isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{where} is not written: {name} has values beyond the range of {kind}, which "
                "would become infinite; write it as fp32 or bf16 (--dtype)"
            )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a weight file, memory-mapped, and a safetensors file's metadata.

    What kind it is says its content: files go round under every ending. Pickles (.ckpt, .bin, .pt)
    are read by torch's restricted unpickler: no code in them runs. Raises UserError for a file that
    is damaged, wants to run code, is GGUF or a hypernetwork.
    """
    with explained(path):
        with open(path, "rb") as f:
            head = f.read(9)
        if head.startswith(b"GGUF"):
            raise UserError(
                f"{path} is GGUF, rounded weights for drawing alone: get the model as .safetensors"
            )
        named = path.suffix.lower() in SAFETENSORS and not head.startswith((b"PK", b"\x80"))
        if named or head[8:] == b"{":  # the header, after its length in 8 bytes
            return read_safetensors(path)
        return read_pickle(path), {}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Within it, what a damaged or hostile file does to its reader is a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # it has many names
        if foreign := re.search(r"GLOBAL ([\w.]+)", str(e)):
            raise wants_to_run_code(path, [foreign[1]]) from None
        # torch's first line advises to let the code in it run; what is wrong stands further below.
        why = re.search(r"WeightsUnpickler error: (.{,200})", str(e))
        raise UserError(
            f"{path} is damaged or not a weight file: download it again "
            f"({(why[1] or 'it is cut short') if why else first_line(e)})"
        ) from None


# A model has 2,000 tensors, full checkpoints 6,000. What describes them is small: a header of
# 300 kB, a pickle of 250 kB. A file that says more is made to cost memory or time.
MOST_TENSORS = 20_000
MOST_HEADER = 5 * 10**6  # bytes; its metadata may hold a vocabulary
MOST_PICKLED = 10**6  # bytes without the weights; each can become an object of 200


def oversized(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged or hostile: {what} is larger than any model's")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
    if MOST_HEADER < length < path.stat().st_size:
        raise oversized(path, f"its header of {gigabytes(length)}")
    with safe_open(path, framework="pt") as f:
        keys = f.keys()
        if len(keys) > MOST_TENSORS:
            raise oversized(path, f"its table of {len(keys)} tensors")
        return {key: f.get_tensor(key) for key in keys}, f.metadata() or {}


def json_metadata(path: Path, metadata: dict[str, str], key: str) -> dict:
    """A dictionary that was left as JSON in a file's metadata. Raises UserError if it is none."""
    try:
        return dict(json.loads(metadata.get(key, "{}")))
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path} has damaged metadata ({key}: {first_line(e)})") from None


# Checkpoints of Lightning carry objects of these beside the weights. They become empty shells.
INERT = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|typing|collections|numpy)\..*"
    r"|(__builtin__|builtins)\.(int|float|str|bool|dict|list|set|tuple|object)"
)
NESTED = ("state_dict", "string_to_param")  # the latter in A1111's embeddings
MOST_NESTED = 10  # state_dict within state_dict; a pickle can also hold itself, without end


# What torch's unpickler lets pass and no checkpoint uses: bytearray(10**12) is a terabyte of zeros,
# and these two ways to encode a text take the square of its length.
GREEDY = re.compile(rb"\nbytearray\n|(?i:[XU]\x08(?:\0\0\0)?punycode|[XU]\x04(?:\0\0\0)?idna)")


A_HYPERNETWORK = (
    "is a hypernetwork, which stands before keys and values and cannot be merged into weights: "
    "give it as --hypernetwork to sample, and as --model the model that it was trained with"
)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A dictionary of tensors, those in a zip memory-mapped, from either format of torch.save."""
    value = unpickled(path)
    for key in NESTED * MOST_NESTED:
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no dictionary of weights")
    if any(type(key) is int and isinstance(x, tuple | list) for key, x in value.items()):
        raise UserError(f"{path} {A_HYPERNETWORK}")
    return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}


def unpickled(path: Path):
    """What is in a pickle, read without running what is in it."""
    with open(path, "rb") as f:
        if f.read(4) == b"PK\3\4":  # as torch tells them apart
            return read_zip(path, f)
        f.seek(0)
        check_pickled(path, f.read(MOST_PICKLED))
        f.seek(0)
        return torch.load(Frugal(path, f), map_location="cpu", weights_only=True)


def read_zip(path: Path, file: BinaryIO):
    """What was pickled. torch reads all but the weights into memory, however large they say that
    they unpack; its own files are not compressed."""
    with zipfile.ZipFile(Frugal(path, file)) as directory:
        for member in directory.infolist():
            weights = re.search(r"/data/\w+$", member.filename)
            if member.compress_type != zipfile.ZIP_STORED:
                raise oversized(path, f"{member.filename:.80}, compressed,")
            if member.file_size > (path.stat().st_size if weights else MOST_PICKLED):
                raise oversized(path, f"{member.filename:.80}")
            if not weights:
                file.seek(member.header_offset + 26)  # zipfile's read() wants a checksum: optional
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                file.seek(name_length + extra_length, os.SEEK_CUR)
                check_pickled(path, file.read(member.file_size))
    foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if refused := [n for n in foreign if n != PARAMETERS and not INERT.fullmatch(n)]:
        raise wants_to_run_code(path, refused)
    shells = {name: type(name.rpartition(".")[2], (Shell,), {}) for name in foreign}
    shells[PARAMETERS] = Parameters
    with torch.serialization.safe_globals([(shell, name) for name, shell in shells.items()]):
        if path.suffix == ".safetensors":  # torch goes by the name: this one it must not see
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_pickled(path: Path, pickled: bytes) -> None:
    if found := GREEDY.search(pickled):
        raise wants_to_run_code(path, [re.search(rb"[a-z]{4,}", found[0], re.I)[0].decode()])


class Frugal:
    """A file of which no more than MOST_PICKLED bytes can be read, but for weights: those are read
    into memory that is there for them."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.left = path, file, MOST_PICKLED
        self.seek, self.tell, self.readinto = file.seek, file.tell, file.readinto

    def read(self, size: int = -1) -> bytes:
        return self.spent(self.file.read(self.left + 1 if size < 0 else min(size, self.left + 1)))

    def readline(self) -> bytes:
        return self.spent(self.file.readline(self.left + 1))

    def spent(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left < 0:
            raise oversized(self.path, "what it holds beside weights")
        return data


def wants_to_run_code(path: Path, names: list[str]) -> UserError:
    shown = ", ".join(names[:5])
    return UserError(f"{path} wants to run code ({shown:.200}): not loaded; use safetensors")


PARAMETERS = "torch.nn.modules.container.ParameterDict"  # in A1111's first embeddings


class Parameters(dict):
    """Stands for torch's own container: the tensors in it, by name."""

    def __setstate__(self, state):
        self.update(state["_parameters"])


class Shell:
    """Stands for a foreign class in a pickle: takes everything, does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass
