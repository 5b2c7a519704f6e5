"""Measures the Triton kernels against PyTorch, on a GPU, and all of it against diffusers:

    python -m minibooth.bench train                                peers.py: a training step
    python -m minibooth.bench sample                               peers.py: drawing pictures
    python -m minibooth.bench run                                  peers.py: a whole run by phases
    python -m minibooth.bench memory                               peers.py: ways to save memory
    python -m minibooth.bench kernels --output results             the benchmark
    python -m minibooth.bench kernels --check --output results     correctness first, then the same

Every time of a kernel is the median of CUDA-graph replays, so that launches cost what they cost in
training. The inputs of a graph's calls differ and together exceed the L2 cache. The bounds that
figures are compared with, matrix products and copies, are measured in the same run. Rows are
measured in order of interest until --minutes are over; the JSON says what was left out.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.attention import SDPBackend, sdpa_kernel

from minibooth import ops
from minibooth.bench import peers

DEVICE = "cuda"
# name: (heads, N_q, N_k, head dimension), images of 512²
ATTENTION = {
    "SD 1.5 self 4096": (8, 4096, 4096, 40),
    "SD 1.5 self 1024": (8, 1024, 1024, 80),
    "SD 1.5 self 256": (8, 256, 256, 160),
    "SD 1.5 self 64": (8, 64, 64, 160),
    "SD 1.5 cross 4096": (8, 4096, 77, 40),
    "SD 1.5 cross 1024": (8, 1024, 77, 80),
    "SD 1.5 cross 256": (8, 256, 77, 160),
    "SD 1.5 cross 64": (8, 64, 77, 160),
    "SD 2.1 self 4096": (5, 4096, 4096, 64),
    "SD 2.1 self 1024": (10, 1024, 1024, 64),
    "SD 2.1 self 256": (20, 256, 256, 64),
    "SD 2.1 cross 4096": (5, 4096, 77, 64),
    "VAE 4096": (1, 4096, 4096, 512),
}
# name: (channels, height and width); 32 groups, channels_last, SiLU behind
NORMS = {
    f"{net} {size}x{size} C{channels}": (channels, size)
    for net, size, widths in (
        ("UNet", 64, (320, 640, 960)),
        ("UNet", 32, (640, 1280, 1920)),
        ("UNet", 16, (1280, 2560)),
        ("UNet", 8, (1280, 2560)),
        ("VAE", 64, (512,)),
        ("VAE", 256, (256,)),
        ("VAE", 512, (128,)),
    )
    for channels in widths
}
# checked, not timed
ODD_ATTENTION = {"odd": (3, 333, 201, 88), "odd short": (2, 130, 77, 40), "tiny": (1, 5, 3, 8)}
ODD_NORMS = {"odd small": (64, 13), "odd large": (64, 131)}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
BATCH_SIZES = (2, 8, 16)
L2_BYTES = 128 * 2**20  # more than any card's L2: the inputs of a graph's calls exceed it
GRAPH_CALLS = 10  # at least, per graph


# ---- inputs and implementations -------------------------------------------------------------


def attention_inputs(B, H, N_q, N_k, d, dtype):
    """q, k, v as views of their projections' outputs, and an upstream gradient."""
    q, k, v, do = (
        torch.randn(B, N, H, d, device=DEVICE, dtype=dtype).transpose(1, 2)
        for N in (N_q, N_k, N_k, N_q)
    )
    return (q, k, v), do


def norm_inputs(B, C, size, dtype):
    """x (with a mean), γ, β, and an upstream gradient."""
    x, dy = (
        torch.randn(B, C, size, size, device=DEVICE, dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    weight, bias = torch.randn(2, C, device=DEVICE, dtype=dtype)
    return (x + 1, weight, bias), dy


def triton_attention(q, k, v):
    return ops.attention_kernels.attention(q, k, v)


def sdpa(backend):
    def attention(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attention


def eager_norm(x, weight, bias):
    return F.silu(F.group_norm(x, 32, weight, bias, 1e-5))


def triton_norm(x, weight, bias):
    return ops.group_norm_kernels.group_norm(x, 32, weight, bias, 1e-5, silu=True)


def fp64_attention(q, k, v):
    return ops.attention_kernels.reference(q, k, v)


def with_gradients(f, inputs, upstream):
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def relative_error(outs, expected):
    """The largest of ‖out − expected‖ / ‖expected‖; NaN if any is."""
    errors = [
        ((out.double() - true).norm() / true.norm()).item()
        for out, true in zip(outs, expected, strict=True)
    ]
    return max(errors) if all(e == e for e in errors) else float("nan")


# ---- correctness ----------------------------------------------------------------------------


def check_one(name, ours, theirs, reference, make_inputs, backward) -> list[str]:
    """Ours against fp64, allowed twice PyTorch's error (three times for gradients), and again."""
    inputs, upstream = make_inputs()
    double = [x.double() for x in inputs]
    if backward:
        run = functools.partial(with_gradients, inputs=inputs, upstream=upstream)
        expected = with_gradients(reference, double, upstream)
    else:
        run = lambda f: [f(*inputs)]  # noqa: E731
        expected = [reference(*double)]
    first, second, other = run(ours), run(ours), run(theirs)
    failures = []
    for i, (a, b, c, true) in enumerate(zip(first, second, other, expected, strict=True)):
        what = f"{name} {'output' if i == 0 else f'gradient {i}'}"
        error, allowed = relative_error([a], [true]), relative_error([c], [true])
        allowed = max((3 if i else 2) * allowed, 2e-6)
        if not error <= allowed:
            failures.append(f"{what}: error {error:.2e}, allowed {allowed:.2e}")
        if not torch.equal(a, b):
            failures.append(f"{what}: two runs differ")
    return failures


def check(dtype: torch.dtype) -> list[str]:
    """Odd shapes, and for half precision every benchmarked one; the failures, in lines."""
    half = dtype != torch.float32
    attention = ODD_ATTENTION | (ATTENTION if half else {})
    norms = ODD_NORMS | (NORMS if half else {})
    # torch.empty is filled with NaN under this setting: what no kernel writes shows.
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    failures = []
    try:
        for name, shape in attention.items():
            make = functools.partial(attention_inputs, 2, *shape, dtype)
            reference = fp64_attention
            arguments = (triton_attention, F.scaled_dot_product_attention, reference, make)
            failures += check_one(f"{name} {dtype}", *arguments, backward=shape[3] <= 160)
        for name, shape in norms.items():
            make = functools.partial(norm_inputs, 2, *shape, dtype)
            arguments = (triton_norm, eager_norm, eager_norm, make)
            failures += check_one(f"{name} {dtype}", *arguments, backward=True)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return failures


def smoke() -> None:
    """Each kernel once on a small odd shape, for compute-sanitizer."""
    for N_k in (77, 201):
        inputs, do = attention_inputs(1, 2, 130, N_k, 40, torch.float16)
        with_gradients(triton_attention, inputs, do)
    for shape in ((64, 13), (64, 130)):
        inputs, dy = norm_inputs(1, *shape, torch.float16)
        with_gradients(triton_norm, inputs, dy)
    torch.cuda.synchronize()


def sanitize() -> str:
    """What compute-sanitizer's memcheck says of `smoke`, in one line."""
    if not (tool := shutil.which("compute-sanitizer")):
        return "compute-sanitizer is not installed"
    code = "from minibooth import bench; bench.smoke()"
    command = [tool, "--error-exitcode", "9", sys.executable, "-c", code]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=90, env=environment
        )
    except subprocess.TimeoutExpired:
        return "compute-sanitizer was not done in 90 s"
    lines = (result.stdout + result.stderr).strip().splitlines()
    return f"compute-sanitizer, exit status {result.returncode}: {lines[-1] if lines else ''}"


# ---- timing ---------------------------------------------------------------------------------


def graph_time(make_calls) -> float:
    """Median seconds of one call under CUDA-graph replay; make_calls() gives a graph's calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = make_calls()
        for call in (*calls, calls[0]):  # compiles, and shows what a backend does not accept
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay():
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    once = min(replay() for _ in range(3)) * len(calls)
    return statistics.median(replay() for _ in range(max(5, min(50, int(0.08 / once)))))


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
    a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=dtype)
    matmul = graph_time(lambda: [lambda: a @ b] * GRAPH_CALLS)
    x = torch.randint(0, 255, (2**30,), device=DEVICE, dtype=torch.uint8)
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


# ---- the report -----------------------------------------------------------------------------


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


def chart(rows: list[dict], path: Path) -> None:
    """Bars of the speed against the best other, smallest batch, bf16; 1 is a line."""
    B = BATCH_SIZES[0]
    rows = [r for r in rows if r["B"] == B and r["dtype"] == "bfloat16" and r.get("ratio")]
    left, scale, height = 230, 110, 18
    limit = max([1.0, *(r["ratio"] for r in rows)])
    size = (left + int(scale * limit) + 150, height * (len(rows) + 2))
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 4), f"Speed against the fastest of PyTorch's, B = {B}, bf16 (1 = equal)", "black")
    for i, row in enumerate(rows, start=1):
        top, end = height * i + 6, left + int(scale * row["ratio"])
        colour = "#3b6ea5" if row["direction"] == "forward" else "#d08c3a"
        draw.text((8, top), f"{row['shape']} {row['direction']}", "black")
        draw.rectangle((left, top, end, top + height - 6), colour)
        draw.text((end + 6, top), f"{row['ratio']:.2f}  ({row['best_other']})", "black")
    draw.line((left + scale, height, left + scale, size[1] - height // 2), "black")
    image.save(path)


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
    chart(rows, output / "kernels.png")
    print(f"{len(rows)} rows, {len(left_out)} left out for time; {output / 'kernels.json'}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minibooth.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["kernels", "train", "sample", "run", "memory"])
    parser.add_argument("--output", type=Path, default=Path("bench-out"), help="a folder")
    parser.add_argument("--minutes", type=float, default=4.5, help="for the benchmark")
    parser.add_argument("--check", action="store_true", help="correctness first")
    args = parser.parse_args(argv)
    if args.what != "kernels":
        peers.benchmark(args.what, args.minutes, args.output)
        return 0
    if not torch.cuda.is_available() or ops.attention_kernels is None:
        missing = "Triton" if torch.cuda.is_available() else "a CUDA card"
        print(f"the benchmark of the kernels needs {missing}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")  # SDPA explains every backend that refuses a shape
    extra = {}
    if args.check:
        dtypes = (torch.float32, torch.float16, torch.bfloat16)
        failures = [failure for dtype in dtypes for failure in check(dtype)]
        print("\n".join(failures) or "all correct", flush=True)
        extra = {"check": failures, "sanitizer": sanitize()}
        print(extra["sanitizer"], flush=True)
    benchmark(args.minutes, args.output, extra)
    return 1 if extra.get("check") else 0
