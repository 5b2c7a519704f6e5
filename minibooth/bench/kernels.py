"""The Triton kernels' times against PyTorch's, on a GPU: the trial of device/trial.py, for the
shapes of Stable Diffusion and in order of interest until --minutes are over; the JSON says what was
left out. Or for one shape of one's own.

Every time is the median of CUDA-graph replays, so that launches cost what they cost in training;
the inputs of a graph's calls differ and together exceed the L2 cache. The bounds that figures are
compared with, the rates of a matrix product and of a copy, are measured in the same run.
"""

import json
import time
from pathlib import Path

import torch
import torch._functorch.config as functorch_config

from .. import ops
from ..device.trial import GRAPH_CALLS, examine, graph_time, implementations
from ..ops import Case
from . import chart, check
from .check import ATTENTION, NORMS, ROWS

KINDS = ((check.attention, ATTENTION), (check.norm, NORMS))
KINDS += ((check.layer_norm, ROWS), (check.gate, ROWS))
BATCH_SIZES = (2, 8, 16)
FORWARD, BOTH = "forward", "with backward"


def bounds(dtype: torch.dtype) -> dict:
    """This card's FLOP/s in a matrix product and bytes/s in a copy (read and written)."""
    a, b = torch.randn(2, 8192, 8192, device=check.DEVICE, dtype=dtype)
    matmul = graph_time(lambda: [lambda: a @ b] * GRAPH_CALLS)
    x = torch.randint(0, 255, (2**30,), device=check.DEVICE, dtype=torch.uint8)
    y = torch.empty_like(x)
    copy = graph_time(lambda: [lambda: y.copy_(x)] * GRAPH_CALLS)
    return {"flops": 2 * 8192**3 / matmul, "bytes": 2 * 2**30 / copy}


def work(case: Case) -> dict[str, float]:
    """Floating-point operations, the fewest bytes there are to move, and those our kernels move."""
    size = getattr(torch, case.dtype).itemsize
    if case.op == "attention":
        B, H, N_q, N_k, d = case.shape
        # Q, O and K, V; the backward: Q, O, dO, dQ and K, V, dK, dV.
        tensors = 2 + 4 * case.backward
        moved = B * H * d * size * tensors * (N_q + N_k)
        return {"flops": (14 if case.backward else 4) * B * H * N_q * N_k * d} | dict.fromkeys(
            ("bytes", "moved"), moved
        )
    tensor, moved = size * torch.Size(case.shape).numel(), 0
    if case.op != "group_norm":
        # x and y, halves of one another; x, dy and dx. Or x, h, their sum and y; dy, the sum's
        # gradient, the sum and dx.
        passes = 1.5 + 2.5 * case.backward if case.op == "geglu" else 4 + 4 * case.backward
        return {"flops": 0} | dict.fromkeys(("bytes", "moved"), int(tensor * passes))
    kernels, channels = ops.group_norm_kernels, case.shape[1] // case.norm[0]
    pixels = torch.Size(case.shape[2:]).numel()
    passes = [(kernels.FORWARD_TILES, 2, 3)] + [(kernels.BACKWARD_TILES, 3, 5)] * case.backward
    for tiles, fewest, most in passes:
        moved += fewest if kernels._one_pass(pixels, channels, tiles, case.norm[2]) else most
    return {"flops": 0, "bytes": tensor * sum(p[1] for p in passes), "moved": tensor * moved}


def row(name: str, case: Case, bound: dict, functions: dict | None = None) -> dict:
    """What the trial says of a case, and how far that is from what the card can do."""
    verdict = examine(case, check.DEVICE, graph_time, functions)
    found = {"kind": case.op, "shape": name, "B": case.shape[0], "dtype": case.dtype}
    found |= {"direction": BOTH if case.backward else FORWARD, "us": verdict.us}
    found |= {"taken": verdict.triton, "why": verdict.why}
    found |= {"choices": verdict.choices, "other choices": verdict.others}
    others = {name: us for name, us in verdict.us.items() if name != "triton"}
    best = min(others, key=others.get) if others else None
    if "triton" in verdict.us:
        t, amount = verdict.us["triton"] / 1e6, work(case)
        matrix, copy = amount["flops"] / bound["flops"], amount["bytes"] / bound["bytes"]
        found |= {
            "ratio": others[best] / verdict.us["triton"] if best else None,
            "best_other": best,
            "TFLOP/s": amount["flops"] / t / 1e12,
            "GB/s moved": amount["moved"] / t / 1e9,
            "fraction_of_copy": amount["moved"] / t / bound["bytes"],
            "bound": "matrix" if matrix > copy else "copy",
            "floor_us": 1e6 * max(matrix, copy),
            "fraction_of_floor": max(matrix, copy) / t,
        }
    return found


def functions_of(case: Case) -> dict:
    """The trial's, and for norms what torch.compile makes of PyTorch's."""
    functions = implementations(case)
    if case.op == "group_norm":
        torch._dynamo.reset()  # one compilation per shape, as a fixed-size training run has it
        functions["compile"] = torch.compile(functions["torch"], dynamic=False)
    return functions


# ---- the report --------------------------------------------------------------------------------


def line(row: dict) -> str:
    """A row of the table on the screen."""
    head = f"{row['shape']:18} B {row['B']:<2} {row['dtype']:8} {row['direction']:13}"
    times = "  ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
    if "triton" not in row["us"]:
        return f"{head} {times} µs; triton: {row['why']}"
    ratio = f"{row['ratio']:.2f}× {row['best_other']}" if row["ratio"] else "no other"
    attends = row["kind"] == "attention"
    rate = f"{row['TFLOP/s']:.0f} TFLOP/s" if attends else f"{row['GB/s moved']:.0f} GB/s"
    floor = f"{100 * row['fraction_of_floor']:.0f} % of the {row['bound']} bound"
    return f"{head} {ratio:16} {rate:12} {floor:25} {times} µs"


def draw(rows: list[dict], path: Path) -> None:
    """The speed against the best other, smallest batch, bf16."""
    B = BATCH_SIZES[0]
    rows = [r for r in rows if r["B"] == B and r["dtype"] == "bfloat16" and r.get("ratio")]
    colours = {FORWARD: chart.BLUE, BOTH: chart.ORANGE}
    bars = [
        (f"{r['shape']} {r['direction']}", r["ratio"], r["best_other"], colours[r["direction"]])
        for r in rows
    ]
    title = f"Speed against the fastest of PyTorch's, B = {B}, bf16 (1 = equal)"
    chart.bars(bars, title, path)


def one_shape(shape: tuple[int, ...]) -> None:
    """Attention of one's own B, H, N_q, N_k, d: a line for each dtype and direction."""
    for dtype in (torch.bfloat16, torch.float16):
        bound = bounds(dtype)
        for backward in (False, True):
            case = Case("attention", shape, str(dtype)[6:], backward)
            print(line(row("×".join(map(str, shape)), case, bound)), flush=True)


def benchmark(minutes: float, output: Path, extra: dict) -> None:
    """Measures, prints and writes kernels.json and kernels.png."""
    end = time.monotonic() + 60 * minutes
    functorch_config.donated_buffer = False  # compiled backwards are run more than once
    bf16, fp16 = torch.bfloat16, torch.float16
    bound = {dtype: bounds(dtype) for dtype in (bf16, fp16)}
    plan = [
        (name, make_case(B, name, dtype, backward), dtype)
        for dtype in (bf16, fp16)
        for B in BATCH_SIZES
        for make_case, names in KINDS
        for name in names
        for backward in (False, True)
        if not (name.startswith("VAE 4096") and backward)
    ]
    # The smallest batch in bf16 first, and last what costs most: torch.compile for every norm.
    first = (BATCH_SIZES[0], bf16)
    plan.sort(key=lambda p: 2 * ((p[1].shape[0], p[2]) != first) + (p[1].op == "group_norm"))
    rows, left_out = [], []
    for name, case, dtype in plan:
        if time.monotonic() > end:
            left_out.append(
                f"{name} B {case.shape[0]} {dtype} {BOTH if case.backward else FORWARD}"
            )
            continue
        rows.append(row(name, case, bound[dtype], functions_of(case)))
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
        "rows": rows,
        "left_out": left_out,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (output / "kernels.json").write_text(text + "\n", encoding="utf-8")
    draw(rows, output / "kernels.png")
    print(f"{len(rows)} rows, {len(left_out)} left out for time; {output / 'kernels.json'}")
