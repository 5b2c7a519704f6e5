"""What was found out about the kernels on this machine, kept in the user's cache folder."""

import hashlib
import json
import os
import sys
import warnings
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from .. import ops
from ..common.errors import UserError
from ..common.files import read_text, write_json
from ..ops import Case
from . import beside

NO_MEMORY = "out of memory"  # a verdict's why that another run, with more room, may do without
SILENCE = 20.0  # seconds that nvidia-smi may take: where a card hangs it does, too


@dataclass(frozen=True)
class Verdict:
    """How the kernels did in one case."""

    triton: bool  # right, and at least as fast as the fastest of PyTorch's
    us: dict[str, float]  # microseconds of a call, by implementation
    why: str | None = None  # why they are not taken although they might be fast: wrong, raises, …
    choices: tuple[int, ...] = ()  # which candidate of its tiles each kernel has, in order
    others: dict[str, float | str] = field(default_factory=dict)  # choices, and µs or a fault


def file() -> Path:
    """kernels.json in the cache folder that the system's customs name."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "minibooth" / "kernels.json"


def machine(device: torch.device) -> str:
    """What a verdict holds for: the card, its driver, torch, Triton and these very kernels."""
    triton = ops.attention_kernels.triton.__version__
    versions = f"torch {torch.__version__}, triton {triton}, minibooth {metadata_version()}"
    name = torch.cuda.get_device_name(device)
    return f"{name}, driver {driver()}, {versions}, kernels {kernels_hash()}"


def driver() -> str:
    """NVIDIA's version of it; "unknown" where nvidia-smi is missing, or does not answer."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        with beside.started(query) as program:
            lines = list(program.lines(SILENCE))
    except OSError:
        return "unknown"
    return lines[0].strip() if lines and program.process.returncode == 0 else "unknown"


def metadata_version() -> str:
    try:
        return metadata.version("minibooth")
    except metadata.PackageNotFoundError:  # a bare checkout
        return "unknown"


def kernels_hash() -> str:
    """Of the kernels' sources: whoever changes one is not told yesterday's verdict."""
    return hash_of(Path(ops.attention_kernels.__file__).parents[1])


def hash_of(folder: Path) -> str:
    """Of all Python in it."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def key(case: Case) -> str:
    return json.dumps(case)


def verdict(read: dict) -> Verdict:
    """Of what was read of JSON. Raises KeyError, TypeError or ValueError for what is none."""
    choices, others = tuple(map(int, read["choices"])), dict(read["others"])
    return Verdict(bool(read["triton"]), dict(read["us"]), read["why"], choices, others)


def read(path: Path, machine: str) -> dict[str, Verdict]:
    """What is remembered for this machine, by `key`; nothing where the file is damaged or old."""
    try:
        found = json.loads(read_text(path))[machine]
        return {k: verdict(v) for k, v in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return {}


def write(path: Path, machine: str, found: dict[str, Verdict]) -> None:
    """Add to what is there. Where the folder cannot be written to, a warning: nothing depends on
    it. Of two that write at once one may be lost, and is found out again; the file is whole."""
    try:
        everything = json.loads(read_text(path))
        everything = everything if isinstance(everything, dict) else {}
    except (OSError, ValueError, UserError):
        everything = {}
    before = read(path, machine)
    everything[machine] = {k: asdict(v) for k, v in {**before, **found}.items()}
    try:
        write_json(path, everything)
    except UserError as e:
        warnings.warn(f"the kernels' trial is not remembered: {e}", stacklevel=2)
