"""The Triton kernels' times against PyTorch's, on a GPU.

Every time of a kernel is the median of CUDA-graph replays, so that launches cost what they cost in
training. The inputs of a graph's calls differ and together exceed the L2 cache. The bounds that
figures are compared with, matrix products and copies, are measured in the same run. Rows are
measured in order of interest until --minutes are over; the JSON says what was left out.
"""

import functools
import json
import time
from pathlib import Path
from unittest import mock

import torch
import torch._functorch.config as functorch_config

from .. import ops
from . import chart, check
from .check import (
    ATTENTION,
    BACKENDS,
    NORMS,
    attention_inputs,
    eager_norm,
    fp64_attention,
    norm_inputs,
    relative_error,
    sdpa,
    triton_attention,
    triton_norm,
    with_gradients,
)
from .measure import GRAPH_CALLS, graph_time

BATCH_SIZES = (2, 8, 16)
L2_BYTES = 128 * 2**20  # more than any card's L2: the inputs of a graph's calls exceed it


def calls_of(f, input_sets, direction):
    """The calls of a graph: forward, or backward of a forward already done."""
    repeats = -(-GRAPH_CALLS // len(input_sets))
    if direction == "forward":
        calls = [functools.partial(f, *inputs) for inputs, _ in input_sets]
    else:
        calls = []
        for inputs, upstream in input_sets:
            leaves = [x.detach().requires_grad_() for x in inputs]
            grad = functools.partial(torch.autograd.grad, retain_graph=True)
            calls.append(functools.partial(grad, f(*leaves), leaves, upstream))
    return calls * repeats


def bounds(dtype) -> dict:
    """This card's FLOP/s in a matrix product and bytes/s in a copy (read and written)."""
    a, b = torch.randn(2, 8192, 8192, device=check.DEVICE, dtype=dtype)
    matmul = graph_time(lambda: [lambda: a @ b] * GRAPH_CALLS)
    x = torch.randint(0, 255, (2**30,), device=check.DEVICE, dtype=torch.uint8)
    y = torch.empty_like(x)
    copy = graph_time(lambda: [lambda: y.copy_(x)] * GRAPH_CALLS)
    return {"flops": 2 * 8192**3 / matmul, "bytes": 2 * 2**30 / copy}


def measure(row, implementations, make_inputs, reference, work, bound) -> dict:
    """Times and errors of every implementation that accepts the shape, and what they compare to.

    row: what identifies it; work: {"flops", "bytes" (the fewest), "moved" (by our kernels)}
    """
    first = make_inputs()
    sets = max(1, min(16, L2_BYTES // work["bytes"]))
    input_sets = [first, *(make_inputs() for _ in range(sets - 1))]
    inputs, upstream = first
    one = [x[:1, :2] if x.ndim == 4 and reference is fp64_attention else x for x in inputs]
    one_up = upstream[:1, :2] if reference is fp64_attention else upstream
    backward = row["direction"] == "backward"

    def values(f, inputs, upstream):  # the forward's output, or the backward's gradients
        return with_gradients(f, inputs, upstream)[1:] if backward else [f(*inputs)]

    expected = values(reference, [x.double() for x in one], one_up)
    seconds, errors, refused = {}, {}, {}
    for name, f in implementations.items():
        try:
            seconds[name] = graph_time(functools.partial(calls_of, f, input_sets, row["direction"]))
            outs = values(f, inputs, upstream)
            if reference is fp64_attention:
                outs = [x[:1, :2] for x in outs]
            errors[name] = relative_error(outs, expected)
        except Exception as error:  # most often a backend without this shape
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    others = {name: t for name, t in seconds.items() if name != "triton"}
    floor = max(work["flops"] / bound["flops"], work["bytes"] / bound["bytes"])
    best = min(others, key=others.get) if others else None
    result = {"us": {n: 1e6 * t for n, t in seconds.items()}, "error": errors, "refused": refused}
    if "triton" in seconds:
        t = seconds["triton"]
        result |= {
            "ratio": others[best] / t if best else None,
            "best_other": best,
            "TFLOP/s": work["flops"] / t / 1e12,
            "GB/s moved": work["moved"] / t / 1e9,
            "fraction_of_copy": work["moved"] / t / bound["bytes"],
            "floor_us": 1e6 * floor,
            "fraction_of_floor": floor / t,
        }
    return row | result


def attention_row(name, B, dtype, direction, bound) -> dict:
    H, N_q, N_k, d = ATTENTION[name]
    row = {"kind": "attention", "shape": name, "B": B, "dtype": str(dtype)[6:]}
    size = torch.finfo(dtype).bits // 8
    forward = direction == "forward"
    tensors = (
        (2, 2) if forward else (4, 4)
    )  # of N_q rows (Q, O, dO, dQ), of N_k rows (K, V, dK, dV)
    moved = B * H * d * size * (tensors[0] * N_q + tensors[1] * N_k)
    flops = (4 if forward else 10) * B * H * N_q * N_k * d
    work = {"flops": flops, "bytes": moved, "moved": moved}
    implementations = {"triton": triton_attention} | {n: sdpa(b) for n, b in BACKENDS.items()}
    make = functools.partial(attention_inputs, B, H, N_q, N_k, d, dtype)
    row["direction"] = direction
    return measure(row, implementations, make, fp64_attention, work, bound)


def norm_row(name, B, dtype, direction, bound) -> dict:
    C, size = NORMS[name]
    tensor = B * C * size * size * torch.finfo(dtype).bits // 8
    forward = direction == "forward"
    tiles = ops.group_norm_kernels.FORWARD_TILES if forward else (
        ops.group_norm_kernels.BACKWARD_TILES
    )  # fmt: skip
    one_pass = ops.group_norm_kernels._one_pass(size * size, C // 32, tiles, True)
    fewest, most = (2, 3) if forward else (3, 5)
    moved = tensor * (fewest if one_pass else most)
    work = {"flops": 0, "bytes": tensor * fewest, "moved": moved}
    row = {"kind": "group_norm", "shape": name, "B": B, "dtype": str(dtype)[6:]}
    row |= {"direction": direction, "one_pass": bool(one_pass)}
    torch._dynamo.reset()  # one compilation per shape, as a fixed-size training run has it
    compiled = torch.compile(eager_norm, dynamic=False)
    implementations = {"triton": triton_norm, "eager": eager_norm, "compile": compiled}
    make = functools.partial(norm_inputs, B, C, size, dtype)
    return measure(row, implementations, make, eager_norm, work, bound)


def forward_variants(bound) -> list[dict]:
    """The 4096 · 4096 forward with d = 40 in other configurations than the table's."""
    kernels = ops.attention_kernels
    rows, table = [], kernels.config
    for change in (
        {},
        {"PREFETCH": False},
        {"PREFETCH": False, "D1": 32, "D2": 16},
        {"BLOCK_M": 128, "num_warps": 8},
        {"BLOCK_M": 128, "num_warps": 8, "PREFETCH": False},
    ):
        with mock.patch.object(kernels, "config", lambda *a, c=change: (o := table(*a)) and o | c):
            row = {"change": change, "B": 2, "dtype": "bfloat16", "direction": "forward"}
            make = functools.partial(attention_inputs, 2, 8, 4096, 4096, 40, torch.bfloat16)
            flops = 4 * 2 * 8 * 4096**2 * 40
            work = {"flops": flops, "bytes": 21 * 10**6, "moved": 21 * 10**6}
            one = {"triton": triton_attention}
            rows.append(measure(row, one, make, fp64_attention, work, bound))
    return rows


# ---- the report --------------------------------------------------------------------------------


def line(row) -> str:
    """A row of the table on the screen."""
    head = f"{row['shape']:18} B {row['B']:<2} {row['dtype']:8} {row['direction']:8}"
    times = "  ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
    if "triton" not in row["us"]:
        return f"{head} {times} µs; triton: {row['refused'].get('triton')}"
    ratio = f"{row['ratio']:.2f}× {row['best_other']}" if row["ratio"] else "no other"
    rate = (
        f"{row['TFLOP/s']:.0f} TFLOP/s"
        if row["kind"] == "attention"
        else f"{row['GB/s moved']:.0f} GB/s"
    )
    floor = f"{100 * row['fraction_of_floor']:.0f} % of the floor"
    return f"{head} {ratio:16} {rate:12} {floor:20} {times} µs"


def draw(rows: list[dict], path: Path) -> None:
    """The speed against the best other, smallest batch, bf16."""
    B = BATCH_SIZES[0]
    rows = [r for r in rows if r["B"] == B and r["dtype"] == "bfloat16" and r.get("ratio")]
    colours = {"forward": chart.BLUE, "backward": chart.ORANGE}
    bars = [
        (f"{r['shape']} {r['direction']}", r["ratio"], r["best_other"], colours[r["direction"]])
        for r in rows
    ]
    title = f"Speed against the fastest of PyTorch's, B = {B}, bf16 (1 = equal)"
    chart.bars(bars, title, path)


def benchmark(minutes: float, output: Path, extra: dict) -> None:
    """Measures, prints and writes kernels.json and kernels.png."""
    end = time.monotonic() + 60 * minutes
    functorch_config.donated_buffer = False  # compiled backwards are run more than once
    bf16, fp16 = torch.bfloat16, torch.float16
    bound = {dtype: bounds(dtype) for dtype in (bf16, fp16)}
    plan = [
        (make_row, name, B, dtype, direction)
        for dtype in (bf16, fp16)
        for B in BATCH_SIZES
        for make_row, names in ((attention_row, ATTENTION), (norm_row, NORMS))
        for name in names
        for direction in ("forward", "backward")
        if not (name.startswith("VAE 4096") and direction == "backward")
    ]
    # The smallest batch in bf16 first, and last what costs most: torch.compile for every norm.
    plan.sort(key=lambda p: 2 * (p[2:4] != (BATCH_SIZES[0], bf16)) + (p[0] is norm_row))
    rows, left_out = [], []
    variants = forward_variants(bound[bf16])
    for row in variants:
        print(f"4096 · 4096 · 40 with {row['change']}: {row['us'].get('triton', 0):.1f} µs")
    for make_row, name, B, dtype, direction in plan:
        if time.monotonic() > end:
            left_out.append(f"{name} B {B} {dtype} {direction}")
            continue
        rows.append(make_row(name, B, dtype, direction, bound[dtype]))
        print(line(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    report = {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "triton": ops.attention_kernels.triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "bounds": {str(d)[6:]: b for d, b in bound.items()},
        **extra,
        "variants": variants,
        "rows": rows,
        "left_out": left_out,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (output / "kernels.json").write_text(text + "\n", encoding="utf-8")
    draw(rows, output / "kernels.png")
    print(f"{len(rows)} rows, {len(left_out)} left out for time; {output / 'kernels.json'}")
