"""A CUDA card that is not there, for PyTorch's CPU build: what a run does on a GPU, seen without.

    import pretend_card
    pretend_card.put_in(pretend_card.H100)      # before torch is imported
    import torch                                # torch.cuda.is_available() is True from now on

Tensors of device cuda:0 and cuda:1 are real ones: PyTorch's own Python, dispatcher, autograd with
its threads, autocast and optimizers handle them. card.cpp keeps their memory on the host and gives
each operator that a CUDA build brings a kernel for the CPU's. This file gives `torch._C` the
functions that a CUDA build has there, below `torch.cuda`: its argument checks run as they do on a
card, which a test that replaces a function of `torch.cuda` itself would leave out.

The card is strict where CUDA is: tensors of several devices in one operator, waiting for the
device in a capture, more memory than it has, graphs whose memory was given back. `WAITS` counts
where the host waited. Times mean nothing on it, and neither do cuBLAS and cuDNN: it shows that a
run goes through, what it waits for, and that replaying graphs changes no bit.

Only one card can be put in, once, in a process of its own: see tests/on_card.py.
"""

import collections
import ctypes
import functools
import hashlib
import importlib.abc
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass, replace
from pathlib import Path

SOURCE = Path(__file__).with_name("card.cpp")
GB = 2**30


@dataclass(frozen=True)
class Model:
    """What a card says of itself."""

    name: str
    major: int  # compute capability
    minor: int
    total_memory: int  # bytes
    shared_memory_per_block_optin: int  # bytes
    multi_processor_count: int


H100 = Model("Pretend H100", 9, 0, 80 * GB, 232_448, 132)
RTX_3060 = Model("Pretend RTX 3060", 8, 6, 12 * GB, 101_376, 28)
RTX_3070 = Model("Pretend RTX 3070", 8, 6, 8 * GB, 101_376, 46)
T4 = Model("Pretend T4", 7, 5, 15 * GB, 65_536, 40)  # fp16 alone, as on hosted notebooks

# (what was waited for, where: functions of this project, the innermost first) → how often
WAITS: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()

# By device: bytes that other processes have, and the share of all that this one may have.
TAKEN: collections.Counter[int] = collections.Counter()
FRACTIONS: dict[int, float] = {}


# ---- the library -------------------------------------------------------------------------------


def torch_home() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent


def why_not() -> str | None:
    """Why there can be no pretend card here, in words; None if there can."""
    version = (torch_home() / "version.py").read_text()
    if re.search(r"^cuda[^=]*= *['\"]", version, re.MULTILINE):
        return "this PyTorch is a CUDA build: the pretend card wants the one for CPUs"
    if sys.platform != "linux":
        return "the pretend card is for Linux"
    if compiler() is None:
        return "the pretend card wants a C++ compiler"
    return None


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++"))), None)


def library() -> Path:
    """card.cpp, compiled for this PyTorch: once, about ten seconds."""
    import fcntl  # not there on Windows, where the tests are only collected

    home, source = torch_home(), SOURCE.read_bytes()
    key = hashlib.sha256(source + (home / "version.py").read_bytes() + str(home).encode())
    built = Path(tempfile.gettempdir()) / f"pretend-card-{os.getuid()}-{key.hexdigest()[:12]}.so"
    with open(built.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several that come at once one compiles
        if built.exists():
            return built
        includes = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
        links = [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}"]
        part = built.with_suffix(f".{os.getpid()}")
        command = [compiler(), "-std=c++20", "-O0", "-w", "-shared", "-fPIC", *includes]
        subprocess.run([*command, str(SOURCE), "-o", str(part), *links], check=True)
        part.replace(built)
    return built


# ---- what torch._C of a CUDA build has ---------------------------------------------------------


def put_in(model: Model = H100, count: int = 1) -> None:
    """From now on this process has `count` such cards, 1 or 2. torch must not be imported yet."""
    assert "torch" not in sys.modules, "put the card in before torch is imported"
    Functions.model, Functions.count = model, count
    ctypes.CDLL(str(library()))  # before torch, which asks once what there is
    sys.meta_path.insert(0, BeforeTorchCuda())
    # bitsandbytes: without kernels of its own for CUDA the CPU's are taken, as of all libraries.
    name = "bitsandbytes.backends.cuda.ops"
    sys.modules[name] = types.ModuleType(name)


class BeforeTorchCuda(importlib.abc.MetaPathFinder):
    """Fills torch._C just before torch.cuda is imported, which looks there for what it can do."""

    def find_spec(self, name, path=None, target=None):
        if name == "torch.cuda":
            C = sys.modules["torch._C"]
            for key, value in vars(Functions).items():
                if key.startswith("_") and not key.startswith("__"):
                    setattr(C, key, value.__func__ if isinstance(value, staticmethod) else value)
            C._has_cuda = True
            C._CudaStreamBase, C._CudaEventBase = stream_and_event(C)
        return None  # found as ever


def card():
    """The library's operators."""
    return sys.modules["torch"].ops.pretend_card


class Functions:
    """By their names in torch._C, as torch.cuda calls them: arguments have been checked by then."""

    model, count = H100, 1

    @staticmethod
    def _cuda_init():
        torch = sys.modules["torch"]
        for device in range(Functions.count):
            limit(device)
        card().call_on_wait(ctypes.cast(noted, ctypes.c_void_p).value)
        torch.cuda.default_generators = tuple(torch.Generator() for _ in range(Functions.count))
        torch.cuda._get_device_properties = lambda device: Functions.model

    @staticmethod
    def _cuda_getDeviceCount():
        return Functions.count

    # -- devices and streams

    @staticmethod
    def _cuda_getDevice():
        return card().device()

    @staticmethod
    def _cuda_setDevice(device):
        if device >= Functions.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        card().set_device(device)

    @staticmethod
    def _cuda_exchangeDevice(device):
        before = card().device()
        if device >= 0:
            card().set_device(device)
        return before

    _cuda_maybeExchangeDevice = _cuda_exchangeDevice

    @staticmethod
    def _cuda_getCurrentStream(device):
        return card().stream(device), device, 1  # the number of DeviceType.CUDA

    @staticmethod
    def _cuda_getCurrentRawStream(device):
        return card().stream(device)

    @staticmethod
    def _cuda_getDefaultStream(device):
        return 0, device, 1

    @staticmethod
    def _cuda_setStream(stream_id, device_index, device_type):
        card().set_stream(stream_id, device_index)

    @staticmethod
    def _cuda_synchronize():
        card().synchronize()

    # -- memory

    class _cudart:
        @staticmethod
        def cudaMemGetInfo(device):
            return tuple(card().memory_stats(device)[4:])

    @staticmethod
    def _cuda_memoryStats(device):
        allocated, peak, reserved, peak_reserved, *_ = card().memory_stats(device)
        return {
            "allocated_bytes": {"all": {"current": allocated, "peak": peak}},
            "reserved_bytes": {"all": {"current": reserved, "peak": peak_reserved}},
        }

    @staticmethod
    def _cuda_resetPeakMemoryStats(device):
        card().empty_cache(True)

    @staticmethod
    def _cuda_emptyCache():
        if Graph.stuck:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        card().empty_cache(False)

    @staticmethod
    def _host_emptyCache():
        pass

    @staticmethod
    def _cuda_getMemoryFraction(device):
        return FRACTIONS.get(device, 1.0)

    @staticmethod
    def _cuda_setMemoryFraction(fraction, device):
        FRACTIONS[device] = fraction
        limit(device)

    # -- graphs

    @staticmethod
    def _graph_pool_handle():
        Graph.pools += 1
        return 1, Graph.pools

    @staticmethod
    def _cuda_isCurrentStreamCapturing():
        return card().is_capturing()


class Graph:
    """torch._C._CUDAGraph."""

    pools = 0
    ends = True  # whether a capture that ran out of memory can be ended
    stuck = False  # older PyTorch after a capture that could not be

    def __new__(cls, keep_graph=False):
        self = super().__new__(cls)
        self.number = None
        return self

    def capture_begin(self, pool=None, capture_error_mode="global"):
        self.at = pool or Functions._graph_pool_handle()
        self.number = card().capture_begin(self.at[1])

    def capture_end(self):
        card().capture_end(self.number)
        if not Graph.ends and sys.exc_info()[0] is not None:
            Graph.stuck = True
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )

    def replay(self):
        card().replay(self.number)

    def pool(self):
        return self.at

    def reset(self):
        if self.number is not None and "torch" in sys.modules:
            card().forget(self.number)
            self.number = None

    __del__ = reset


Functions._CUDAGraph = Graph


def stream_and_event(C: types.ModuleType) -> tuple[type, type]:
    """PyTorch's own for any device, which ask card.cpp's guard."""

    class StreamBase(C.Stream):
        def __new__(cls, priority=0, stream_id=None, device_index=0, device_type=1, stream_ptr=0):
            if stream_id is None:
                return super().__new__(cls, device=f"cuda:{card().device()}")
            return super().__new__(
                cls, stream_id=stream_id, device_index=device_index, device_type=device_type
            )

        @property
        def cuda_stream(self):
            return self.stream_id

    class EventBase(C.Event):
        def __new__(cls, enable_timing=False, blocking=False, interprocess=False, external=False):
            return super().__new__(cls, device="cuda", enable_timing=enable_timing)

        def record(self, stream):
            super().record(stream)
            self.seconds = time.perf_counter()

        def elapsed_time(self, end):
            return 1e3 * (end.seconds - self.seconds)

    return StreamBase, EventBase


# ---- memory and waiting ------------------------------------------------------------------------


def exchange(model: Model) -> None:
    """Another card in the place of this one."""
    Functions.model = model
    for device in range(Functions.count):
        limit(device)


def limit(device: int, total: int | None = None, taken: int | None = None) -> None:
    """How much memory the device has, and how much of it other processes have: bytes."""
    if total is not None:
        Functions.model = replace(Functions.model, total_memory=total)
    if taken is not None:
        TAKEN[device] = taken
    fraction = FRACTIONS.get(device, 1.0)
    card().set_memory(device, Functions.model.total_memory, TAKEN[device], fraction)


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def noted(what: bytes) -> None:
    """Called by card.cpp where the host waits."""
    frame, where = sys._getframe(), []
    while frame is not None:
        if name := function_of(frame.f_code):
            where.append(name)
        frame = frame.f_back
    WAITS[what.decode(), tuple(where)] += 1


@functools.cache
def function_of(code: types.CodeType) -> str | None:
    """Its name, with its module's, if it is this project's and no test."""
    file, name = code.co_filename, code.co_qualname
    if "/minibooth" in file and "/tests/" not in file:  # a clone has that name, too
        return f"{Path(file).stem}.{name.replace('<locals>.', '')}"
    return None


def counts() -> tuple[int, int]:
    """How many graphs were captured, and how often one was replayed."""
    captures, replays = card().counts()
    return captures, replays


# ---- Triton's kernels --------------------------------------------------------------------------


def interpret_kernels() -> None:
    """With TRITON_INTERPRET=1: a launch of the interpreter is a kernel of the card, captured and
    replayed as others are. Without this the interpreter copies all tensors to the host and back."""
    import torch
    from torch.utils._pytree import tree_flatten, tree_unflatten
    from triton.runtime import interpreter

    call, kernels = interpreter.GridExecutor.__call__, {}

    def run(number: int, tensors: list) -> None:
        kernels[number](tensors)

    def launch(self, *arguments, **options):
        leaves, tree = tree_flatten(arguments)  # a tuple of tensors is an argument, too
        places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]

        def kernel(tensors):
            filled = list(leaves)
            for i, x in zip(places, tensors, strict=True):
                filled[i] = x
            call(self, *tree_unflatten(filled, tree), **options)

        for i in places:
            if leaves[i].dtype == torch.int64 and leaves[i].ndim == 2:  # a table of addresses
                card().note_addresses(leaves[i])
        number = len(kernels)
        kernels[number] = kernel
        card().launch(number, [leaves[i] for i in places])

    library = torch.library.Library("pretend_card", "IMPL")
    library.impl("launch", run, "CPU")
    kernels["library"] = library  # which must live
    interpreter.GridExecutor.__call__ = launch
