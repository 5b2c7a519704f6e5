"""Measures the Triton kernels against PyTorch, on a GPU, and all of it against diffusers:

python -m minibooth.bench first                                on a new card: does it all work
python -m minibooth.bench first --model M --photos DIR         and a short run of your own
python -m minibooth.bench train                                a training step
python -m minibooth.bench sample                               drawing pictures
python -m minibooth.bench run                                  a whole run by phases
python -m minibooth.bench memory                               what runs need, within 6, 8 and 12 GB
python -m minibooth.bench launches --output results            counts of a step, without a GPU
python -m minibooth.bench kernels --output results             the benchmark
python -m minibooth.bench kernels --check --output results     correctness first, then the same
python -m minibooth.bench kernels --shape 2,8,4096,4096,40     attention of B, H, N_q, N_k, d
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch

from .. import ops
from ..common import cli
from ..common.errors import UserError
from . import check, first, kernels, launches, memory, peers, run

BENCHES = {
    "train": peers.benchmark,
    "sample": peers.benchmark,
    "run": run.benchmark,
    "memory": memory.benchmark,
    "launches": launches.benchmark,
}


def sizes(text: str) -> tuple[int, ...]:
    """ "2,8,4096,4096,40" as numbers; argparse says what is wrong with another."""
    found = tuple(int(part) for part in text.split(","))
    if len(found) != 5 or min(found) < 1:
        raise ValueError(text)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minibooth.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["first", "kernels", *BENCHES])
    parser.add_argument("--output", type=Path, default=Path("bench-out"), help="a folder")
    parser.add_argument("--minutes", type=float, help="for all of it [first: 9.5, others: 4.5]")
    parser.add_argument("--check", action="store_true", help="correctness first")
    parser.add_argument("--shape", type=sizes, help="of one attention: B,H,N_q,N_k,d")
    parser.add_argument("--model", help="of first: to train, a folder, file or hub id")
    parser.add_argument("--photos", help="of first: a folder of photographs to train it on")
    parser.add_argument("--prompt", default="a sks dog", help="that names what they show")
    args = parser.parse_args(argv)
    minutes = {"first": 9.5}.get(args.what, 4.5) if args.minutes is None else args.minutes
    if args.what in BENCHES:
        BENCHES[args.what](args.what, minutes, args.output)
        return 0
    if not torch.cuda.is_available():
        raise UserError(f"{args.what} needs a CUDA card")
    if args.what == "first":
        if bool(args.model) != bool(args.photos):
            raise UserError("--model and --photos go together")
        own = first.own_run(args.model, args.photos, args.prompt) if args.model else None
        return first.benchmark(minutes, args.output, own)
    if ops.attention_kernels is None:
        raise UserError("the benchmark of the kernels needs Triton")
    if args.shape:
        kernels.one_shape(args.shape)
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")  # SDPA explains every backend that refuses a shape
    extra = {}
    if args.check:
        dtypes = (torch.float32, torch.float16, torch.bfloat16)
        failures = [failure for dtype in dtypes for failure in check.check(dtype)]
        print("\n".join(failures) or "all correct", flush=True)
        extra = {"check": failures, "sanitizer": check.sanitize()}
        print(extra["sanitizer"], flush=True)
    kernels.benchmark(minutes, args.output, extra)
    return 1 if extra.get("check") else 0


if __name__ == "__main__":
    cli.run("minibooth.bench", lambda: sys.exit(main()))
