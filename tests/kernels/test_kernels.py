"""The Triton kernels as far as a machine without a GPU can test them, and on a GPU where there is
one. Numbers come from the interpreter (kernels_interpreted.py), costs from compiling ahead of time;
each in a process of its own, because both change Triton for a whole process.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minibooth import ops
from minibooth.bench import check
from minibooth.common.errors import UserError

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


def run(*arguments, **environment):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths} | environment
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def default_mode():
    yield
    ops.use("auto")


def interpreted(file, *arguments):
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", Path(__file__).with_name(file))
    result = run(*command, *arguments, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr


def test_numbers_in_the_interpreter():
    interpreted("kernels_interpreted.py")


def test_random_cases_and_orders_in_the_interpreter():
    interpreted("kernels_evidence.py")


@pytest.mark.slow
def test_the_shapes_of_a_training_step_in_the_interpreter():
    interpreted("kernels_evidence.py", "-m", "slow")


# Of a UNet over latents of 1024² at batch 64, and of the VAE's decoder there.
LARGE = [
    ("attention", (64, 8, 1024 * 1024, 1024 * 1024, 40)),
    ("attention", (64, 8, 1024 * 1024, 77, 40)),
    ("group_norm", (64, 960, 1024, 1024)),
    ("group_norm", (64, 2560, 256, 256)),
    ("group_norm", (1, 512, 1024, 1024)),
]


@pytest.mark.parametrize("op, shape", LARGE, ids=str)
def test_no_launch_counts_beyond_32_bits(op, shape, monkeypatch):
    """Every launch argument, the grid, and the largest offset within a sample or head, which is
    what the kernels count in 32 bits; samples and heads they count in 64."""
    from minibooth_kernels import attention, card, group_norm
    from triton.runtime.jit import JITFunction

    launches = []
    monkeypatch.setattr(card, "capability", lambda device: 90)
    monkeypatch.setattr(card, "unsupported", lambda x: None)
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, grid, **o: launches.append((grid, a)))
    half = {"dtype": torch.bfloat16, "device": "meta"}
    if op == "attention":
        B, H, N_q, N_k, d = shape
        packed = torch.empty(B, N_q, 3, H, d, **half)  # rows of one projection for q, k and v
        q = packed[:, :, 0].transpose(1, 2)
        k, v = (packed[:, :N_k, i].transpose(1, 2) for i in (1, 2))
        assert attention.unsupported(q, k, v) is None
        out, L = attention._attention._init_fn(q, k, v, 1.0, ())
        attention._attention_backward._init_fn(out, q, k, v, out, L, 1.0, ())
        offsets = [(x.shape[2] - 1) * x.stride(2) + d for x in (q, k, v, out)] + [L.numel()]
    else:
        x = torch.empty(*shape, **half).to(memory_format=torch.channels_last)
        weight = torch.empty(shape[1], device="meta")
        assert group_norm.unsupported(x, 32, weight, weight) is None
        y, mean, rstd = group_norm._group_norm._init_fn(x, 32, weight, weight, 1e-5, True, None, ())
        arguments = (y, x, 32, weight, weight, mean, rstd, True, ())
        group_norm._group_norm_backward._init_fn(*arguments)
        offsets = [x[0].numel()]
        offsets += [a.numel() for _, arguments in launches for a in arguments
                    if isinstance(a, torch.Tensor) and a.dtype == torch.float32]  # fmt: skip
    assert launches and max(offsets) < 2**31
    for grid, arguments in launches:
        assert grid[0] < 2**31 and all(n <= 65_535 for n in grid[1:])
        assert all(a < 2**31 for a in arguments if isinstance(a, int))


def test_what_would_count_beyond_32_bits_is_refused():
    from minibooth_kernels import attention, card, group_norm

    half = {"dtype": torch.bfloat16, "device": "meta"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "unsupported", lambda x: None)
        long = torch.empty(1, 1, 2**27, 16, **half)
        assert "32 bits" in attention.unsupported(long, long, long)
        many = torch.empty(8192, 8, 2, 16, **half)
        assert "65535 at most" in attention.unsupported(many, many, many)
        weight = torch.empty(512, device="meta")
        large = torch.empty(1, 512, 2048, 2049, **half)
        assert "32 bits" in group_norm.unsupported(large, 32, weight, weight)
        many = torch.empty(65_536, 512, 1, 1, **half)
        assert "65535 at most" in group_norm.unsupported(many, 32, weight, weight)


def compile_ahead(tmp_path, *arguments):
    output = tmp_path / "aot.csv"
    result = run("-m", "minibooth_kernels.report", "--output", output, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    with output.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_representative_of_each_kernel_compiles_without_spills(tmp_path):
    kernels = compile_ahead(tmp_path, "--quick", "--capability", "90", "--dtype", "bf16")
    assert {k["kernel"] for k in kernels} == {
        "forward", "short_forward", "backward_dq", "backward_dkv", "short_backward",
        "forward_one_pass", "backward_one_pass",
        "partial_statistics", "combine_statistics", "apply",
        "backward_partial_sums", "backward_combine", "backward_apply",
        "normalize", "normalize_backward", "gate", "gate_backward",
        "note_gradients", "sum_of_squares", "adamw",
    }  # fmt: skip
    plain, ahead = (k for k in kernels if k["kernel"] == "forward")
    assert int(plain["tensor_core"]) == 11  # 32 + 16 columns: 3 for S, 8 for P V
    assert int(ahead["tensor_core"]) == 12  # 64 columns: S ahead of the loop, S and P V in it
    assert int(ahead["wgmma_waits"]) < 6, "ptxas serialized the products"
    # Once for each score, and the forward's row maximum: 34 for 32 scores a thread.
    once = {k["kernel"]: float(k["exp2_per_score"]) for k in kernels if k["exp2_per_score"]}
    assert once.pop("forward") == pytest.approx(34 / 32, abs=0.01)
    assert set(once) == {"short_forward", "backward_dq", "backward_dkv", "short_backward"}
    assert set(once.values()) == {1.0}
    # With whole blocks no row is masked in the loop: 10.7, and 12.7 with masks.
    dkv = next(k for k in kernels if k["kernel"] == "backward_dkv")
    assert float(dkv["slots_per_score"]) < 11.5


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_configuration_compiles_without_spills(tmp_path, capability):
    compile_ahead(tmp_path, "--capability", capability)


def test_the_gate_sees_spills_repeated_work_missing_tensor_cores_and_too_much_shared_memory():
    from minibooth_kernels import report

    good = {"kernel": "forward", "capability": 86, "dtype": "bf16", "stack": 0, "shared": 101_376,
            "local_memory": 0, "tensor_core": 8, "instructions": 900, "exp2_per_score": 1.06,
            "options": "D1=64 D2=0 BLOCK_M=32"}  # fmt: skip
    assert report.problems(good) == []
    for change in ({"stack": 8}, {"local_memory": 1}, {"shared": 101_377}, {"tensor_core": 0},
                   {"instructions": 16}, {"exp2_per_score": 2.0}):  # fmt: skip
        assert len(report.problems(good | change)) == 1
    for kernel, major, widths in report.REPEATED:  # said to repeat work, with a reason
        named = {"kernel": kernel, "capability": 10 * major, "options": widths + " BLOCK_M=32"}
        assert report.problems(good | named | {"exp2_per_score": 2.0, "shared": 0}) == []
    assert report.problems(good | {"capability": 90, "shared": 200_000}) == []
    assert report.problems(good | {"dtype": "fp32", "tensor_core": 0}) == []


# ---- ops.py ---------------------------------------------------------------------------------


def attention_inputs(**options):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1, 2, n, 16, generator=generator, **options) for n in (9, 7, 7))


def test_ops_on_the_cpu_are_pytorchs():
    q, k, v = attention_inputs(dtype=torch.float64)
    S = 0.3 * q @ k.transpose(-1, -2)
    expected = (S - S.logsumexp(-1, keepdim=True)).exp() @ v
    torch.testing.assert_close(ops.attention(q, k, v, scale=0.3), expected)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight, bias = torch.arange(12.0, dtype=torch.float64).view(2, 6)
    groups = x.view(2, 3, -1)
    centered = groups - groups.mean(-1, keepdim=True)
    x_hat = centered / (centered.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    z = x_hat.view_as(x) * weight.view(6, 1, 1) + bias.view(6, 1, 1)
    torch.testing.assert_close(ops.group_norm(x, 3, weight, bias, 1e-3), z)
    torch.testing.assert_close(ops.group_norm(x, 3, weight, bias, 1e-3, silu=True), z * z.sigmoid())


def test_asking_for_triton_where_it_cannot_run_is_one_clear_line():
    q, k, v = attention_inputs()
    ops.use("triton")
    with pytest.raises(
        UserError, match=r"on CUDA, the tensor is on cpu.*choose auto or torch"
    ) as e:
        ops.attention(q, k, v)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="on CUDA"):
        ops.group_norm(torch.randn(1, 4, 2, 2), 2, torch.ones(4), torch.zeros(4), 1e-5)
    with pytest.raises(UserError, match="auto, triton, torch, not 'cuda'"):
        ops.use("cuda")


@pytest.mark.parametrize(
    "code, output",
    [
        ("ops.attention(*[torch.ones(1, 1, 2, 8)] * 3).sum().item()", "16.0"),
        ("ops.use('triton'); ops.attention(*[torch.ones(1, 1, 2, 8)] * 3)", "is not installed"),
    ],
)
def test_everything_works_without_triton(code, output):
    hide = "import sys; sys.modules['triton'] = None; import torch; from minibooth import ops; "
    *statements, last = code.split("; ")
    result = run("-c", hide + "; ".join([*statements, f"print({last})"]))
    assert output in result.stdout + result.stderr


def test_the_environment_variable_is_the_switch():
    """It is read at the import, which is repeated here in one process."""
    code = """
import importlib, os, torch
from minibooth import ops
for mode in ("triton", "fast", "torch"):
    os.environ["MINIBOOTH_KERNELS"] = mode
    importlib.reload(ops)
    try:
        print(mode, ops.attention(*[torch.ones(1, 1, 2, 8)] * 3).sum().item())
    except ops.UserError as e:
        print(mode, e)
"""
    triton, fast, torch_ = run("-c", code).stdout.splitlines()
    assert triton.startswith("triton ") and "on CUDA, the tensor is on cpu" in triton
    assert fast.startswith("fast ") and "auto, triton, torch, not 'fast'" in fast
    assert torch_ == "torch 16.0"


def test_the_tables_of_a_generation_fit_all_its_cards():
    from minibooth_kernels import card, report

    for capability, bytes_of_a_block in report.SHARED_MEMORY.items():
        assert card.SHARED_MEMORY[capability // 10] <= bytes_of_a_block


def test_what_a_card_cannot_run_has_a_reason():
    """Stand-ins for tensors on cards that are not here."""
    from minibooth_kernels import attention, card

    class OnCard:
        device = torch.device("cuda", 0)
        dtype = torch.bfloat16
        numel = staticmethod(lambda: 1)

    with pytest.MonkeyPatch.context() as patch:
        cards = [(75, 65_536, "this is 7"), (86, 101_376, None), (90, 232_448, None)]
        cards += [(121, 101_376, None), (90, 166_912, "232448 bytes of shared memory")]
        for capability, shared, reason in cards:
            patch.setattr(card, "capability", lambda device, c=capability: c)
            patch.setattr(card, "shared_memory", lambda device, s=shared: s)
            found = card.unsupported(OnCard())
            assert (reason is None) == (found is None) and (reason or "") in (found or "")
        patch.setattr(card, "unsupported", lambda x: None)
        q = torch.empty(2, 3, 5, 40)
        for shape, reason in (((2, 3, 7, 48), "do not fit"), ((2, 3, 0, 40), "do not fit")):
            assert reason in attention.unsupported(q, torch.empty(shape), torch.empty(shape))
        for d, reason in ((36, "multiple of 8"), (168, "multiple of 8"), (256, "multiple of 8")):
            x = torch.empty(1, 1, 2, d)
            assert reason in attention.unsupported(x, x, x)
        assert "one dtype" in attention.unsupported(q, q.half(), q.half())


# ---- the benchmark --------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA card")
def test_the_benchmark_without_a_gpu_is_one_line_and_status_2():
    result = run("-m", "minibooth.bench", "kernels")
    assert (result.returncode, result.stdout) == (2, "")
    assert "needs a CUDA card" in result.stderr and len(result.stderr.splitlines()) == 1


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_on_the_gpu(dtype):
    failures = check.check(dtype)
    assert not failures, "\n".join(failures)
