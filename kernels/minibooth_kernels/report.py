"""Compiles the kernels for cards that need not be there, and says what each costs:

    PYTHONPATH=kernels python -m minibooth_kernels.report --output kernels/results/aot.csv

The kernels' own launch code runs, with a stand-in for the CUDA driver that names the card and
compiles instead of launching: what is compiled is what a card of that kind would run, down to the
alignment of each pointer. `problems` is the gate the tests use.
"""

import argparse
import contextlib
import csv
import itertools
import sys
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from . import adamw, attention, card, geglu, group_norm, layer_norm
from .sass import measure

# Shared memory of one block, bytes, by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability", less the 1 KB that the system keeps).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class _Driver:
    """As much of Triton's CUDA driver as compiling asks for; a device is its capability."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def recording(capability: int):
    """Within it, launches on CPU tensors compile for a card of this capability.

    Yields the list that collects them: (kernel's name, its constants and options, the compiled
    kernel), each once.
    """
    launches, seen = [], set()
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        if compiled is not None and id(compiled) not in seen:
            seen.add(id(compiled))
            launches.append((self.fn.__name__, options, compiled))
        return compiled

    triton.runtime.driver.set_active(_Driver(capability))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(card, "capability", lambda device: capability),
        mock.patch.object(card, "unsupported_card", lambda device: None),
    ):
        yield launches


MOST_EXP2 = 1.5  # per score: one, and in the forward one per row in each thread that has of it
# Kernels that may repeat work, because what does not repeat it spills: (kernel, major capability,
# widths of the head dimension).
REPEATED = {
    ("short_backward", 8, "D1=64 D2=0"),  # 32 x 128 with 4 warps: 11 to 12 accesses
    ("short_backward", 12, "D1=64 D2=0"),
}


# Spills 8 bytes all the same, of bf16 with weights in fp32; it has no loop.
SPILLING = {("backward_one_pass", 10, "SHIFTED=True SILU=True")}


def _key(line: dict) -> tuple[str, int, str]:
    return line["kernel"], line["capability"] // 10, " ".join(line["options"].split()[:2])


def problems(line: dict) -> list[str]:
    """What would make a kernel slow or impossible on its card; empty if nothing."""
    found = []
    known = _key(line) in SPILLING and line["stack"] <= 8
    if (line["stack"] or line["local_memory"]) and not known:
        found.append(f"spills: {line['stack']} bytes of stack, {line['local_memory']} accesses")
    if line["shared"] > SHARED_MEMORY[line["capability"]]:
        found.append(f"{line['shared']} bytes of shared memory, more than the card has")
    if line["kernel"] in attention.tiles.AMPERE and line["dtype"] != "fp32":
        if not line["tensor_core"]:
            found.append("no tensor-core instruction")
        if (line["exp2_per_score"] or 0) > MOST_EXP2 and _key(line) not in REPEATED:
            found.append(f"repeated work: {line['exp2_per_score']} exponentials per score")
    if line["instructions"] < 100:  # what ptxas leaves of a kernel that cannot run
        found.append("an empty kernel")
    return found


# One head dimension for each pair of widths; d itself is no constant of the kernels.
DIMS = (16, 32, 48, 64, 80, 96, 128, 160, 512)
LENGTHS = ((64, 77), (256, 256), (200, 200))  # N_q, N_k: short; long, whole blocks; long, a rest
# (C, height and width) for 32 groups: every tile of a small group, and one group too large.
SHAPES = ((640, 32), (320, 32), (960, 32), (640, 16), (1280, 16), (1920, 16), (2560, 16))
SHAPES += ((128, 8), (256, 8), (320, 8), (640, 8), (1280, 8), (2560, 8), (320, 64))
LAYOUTS = (torch.channels_last, torch.contiguous_format)
SHIFTED = ((320, 64), (640, 32), (1280, 16), (1280, 8))  # of a UNet, and channels_last
WIDTHS = (128, 320, 640, 1280)  # of the rows of a transformer
QUICK = {"dims": (40,), "lengths": LENGTHS[:2], "shapes": ((320, 64), (1280, 8)), "silu": (True,)}
QUICK |= {"candidates": 2, "widths": (320,)}
FULL = {"dims": DIMS, "lengths": LENGTHS, "shapes": SHAPES, "silu": (True, False), "candidates": 3}
FULL |= {"widths": WIDTHS}


def launch_attention(dtype: torch.dtype, dims, lengths, candidates) -> None:
    """Calls it, forward and backward, on every combination, with so many of a row's tiles."""
    for choice, d, (N_q, N_k) in itertools.product(range(candidates), dims, lengths):
        q, k, v = (torch.empty(1, 1, N, d, dtype=dtype) for N in (N_q, N_k, N_k))
        counts = attention.candidates(q, N_k, backward=d <= 160)
        choices = [choice if choice < count else 0 for count in counts]
        out, L = attention._attention(q, k, v, 1.0, choices)
        if d <= 160:
            attention._attention_backward(out, q, k, v, out, L, 1.0, choices)


def launch_norms(dtype: torch.dtype, weights: torch.dtype, shapes, silu) -> None:
    for (C, size), layout, silu_, shifted in itertools.product(
        shapes, LAYOUTS, silu, (False, True)
    ):
        if shifted and not (silu_ and layout is LAYOUTS[0] and (C, size) in SHIFTED):
            continue
        x = torch.empty(1, C, size, size, dtype=dtype).to(memory_format=layout)
        weight = torch.empty(C, dtype=weights)
        shift = x[..., 0, 0].contiguous() if shifted else None
        y, mean, rstd = group_norm._group_norm(x, 32, weight, weight, 1e-5, silu_, shift, ())
        kept = (mean, rstd, silu_, shifted, ())
        group_norm._group_norm_backward(y, x, 32, weight, weight, *kept)


def launch_rows(dtype: torch.dtype, weights: torch.dtype, widths, candidates) -> None:
    """The norms of a transformer's rows, and its gates."""
    for choice, C, add in itertools.product(range(candidates), widths, (False, True)):
        x, weight = torch.empty(1, 64, C, dtype=dtype), torch.empty(C, dtype=weights)
        choices = [choice if choice < count else 0 for count in layer_norm.candidates(dtype, True)]
        h = x if add else None
        _, y, statistics = layer_norm._layer_norm(x, h, weight, weight, 1e-5, choices)
        layer_norm._layer_norm_backward(y, h, x, weight, statistics, choices)
    for C in widths:
        x = torch.empty(1, 64, 8 * C, dtype=dtype)
        geglu._geglu_backward(geglu._geglu(x), x)


def launch_adamw(dtype: torch.dtype) -> None:
    """As many weights as one launch notes, with copies in this dtype where it has 16 bits."""
    weights = [torch.empty(1) for _ in range(adamw.NOTED)]
    copies = [None if dtype == torch.float32 else w.to(dtype) for w in weights]
    table = adamw.Table(weights, (weights, weights), copies, [0] * len(weights))
    table.norm([w.to(dtype) for w in weights])
    number = weights[0]
    table.update(number, number, number, number, 0.01)


def report(capability: int, dtype: str, cases: dict) -> list[dict]:
    """The measurements of every kernel that the cases launch on such a card."""
    lines, half = [], DTYPES[dtype]
    with recording(capability) as launches:
        launch_attention(half, cases["dims"], cases["lengths"], cases["candidates"])
        for weights in dict.fromkeys([dtype, "fp32"]):  # under autocast the norms' stay in fp32
            launch_norms(half, DTYPES[weights], cases["shapes"], cases["silu"])
            launch_rows(half, DTYPES[weights], cases["widths"], cases["candidates"])
            if weights == dtype:
                launch_adamw(half)
            head = {"capability": capability, "dtype": dtype, "weights": weights}
            lines += [head | measure(*launch) for launch in launches[len(lines) :]]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel for cards not at hand.")
    parser.add_argument("--capability", type=int, nargs="+", default=list(SHARED_MEMORY))
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="one representative of each kernel")
    parser.add_argument("--output", type=Path, help="a CSV file")
    args = parser.parse_args()
    if args.output:
        args.output.touch()  # what cannot be written is to fail now
    lines, bad = [], 0
    for capability, dtype in itertools.product(args.capability, args.dtype):
        for line in report(capability, dtype, QUICK if args.quick else FULL):
            lines.append(line)
            found = "; ".join(problems(line))
            bad += bool(found)
            print(*line.values(), found, flush=True)
    if args.output:
        with args.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, lines[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    print(f"Triton {triton.__version__}: {len(lines)} kernels compiled, {bad} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
