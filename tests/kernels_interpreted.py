"""The kernels against fp64 PyTorch, in Triton's interpreter: TRITON_INTERPRET=1 pytest <this file>.

test_kernels.py runs it in a process of its own, because Triton reads the variable at import.
fp32 shows that the logic is right, fp16 that the casts are; the interpreter's bf16 is not exact.
"""

import pytest
import torch

from minibooth_kernels import attention as at
from minibooth_kernels import group_norm as gn

FP16, FP32 = torch.float16, torch.float32


def relative_error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()


def assert_no_worse(outs, theirs, expected, times, floor):
    """Each error against fp64 is at most `times` PyTorch's own in the same dtype, or under `floor`."""
    for name, out, their, true in zip(("y", "d1", "d2", "d3"), outs, theirs, expected, strict=True):
        error = relative_error(out, true)
        allowed = max(floor, (2 if name == "y" else times) * relative_error(their, true))
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


def value_and_gradients(f, inputs, upstream):
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


# ---- group norm -----------------------------------------------------------------------------


def group_norm_case(shape, dtype, layout, mean=0.0, std=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    x = mean + std * torch.randn(shape, generator=generator)
    x = x.to(dtype).to(memory_format=layout)
    weight, bias = torch.randn(2, shape[1], generator=generator).to(dtype)
    upstream = torch.randn(shape, generator=generator).to(dtype).to(memory_format=layout)
    return (x, weight, bias), upstream


def check_group_norm(inputs, groups, upstream, silu):
    def run(f):
        return lambda x, weight, bias: f(x, groups, weight, bias, 1e-5, silu=silu)

    outs = value_and_gradients(run(gn.group_norm), inputs, upstream)
    theirs = value_and_gradients(run(gn.reference), inputs, upstream)
    expected = value_and_gradients(run(gn.reference), [x.double() for x in inputs], upstream)
    assert outs[0].stride() == inputs[0].stride() == outs[1].stride()
    assert [x.dtype for x in outs] == [x.dtype for x in theirs]
    assert_no_worse(outs, theirs, expected, times=3, floor=2e-6)


@pytest.mark.parametrize("tiles", ["one pass", "two passes"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape, groups, dtype, silu",
    [
        ((2, 40, 8, 8), 4, FP32, True),  # 10 channels per group, as in SD's 320
        ((2, 80, 9, 7), 4, FP16, True),  # 20 channels, odd spatial size
        ((1, 24, 16, 72), 2, FP16, False),  # several tiles and programs per channel block
        ((3, 6, 5, 3), 3, FP32, False),  # far smaller than a tile
    ],
)
def test_group_norm_matches_fp64(monkeypatch, shape, groups, dtype, silu, layout, tiles):
    if tiles == "two passes":
        monkeypatch.setattr(gn, "FORWARD_TILES", ())
        monkeypatch.setattr(gn, "BACKWARD_TILES", ())
    check_group_norm(*group_norm_case(shape, dtype, layout)[:1], groups,
                     group_norm_case(shape, dtype, layout)[1], silu)


# ---- attention ------------------------------------------------------------------------------


def attention_case(B, H, N_q, N_k, d, dtype, gain=1.0):
    """Views as a network makes them: q from its own projection, k and v from a packed one."""
    generator = torch.Generator().manual_seed(N_q + N_k + d)
    q = torch.randn(B, N_q, H * d, generator=generator) * gain
    kv = torch.randn(B, N_k, 2 * H * d, generator=generator)
    upstream = torch.randn(B, H, N_q, d, generator=generator).to(dtype)
    q, k, v = (x.to(dtype).unflatten(-1, (H, d)).transpose(1, 2) for x in (q, *kv.chunk(2, -1)))
    return (q, k, v), upstream


def check_attention(inputs, upstream, scale=None):
    outs = value_and_gradients(lambda *x: at.attention(*x, scale=scale), inputs, upstream)
    theirs = value_and_gradients(lambda *x: at.reference(*x, scale=scale), inputs, upstream)
    double = [x.double() for x in inputs]
    expected = value_and_gradients(lambda *x: at.reference(*x, scale=scale), double, upstream)
    assert [x.dtype for x in outs] == [x.dtype for x in inputs[:1] + inputs]
    assert_no_worse(outs, theirs, expected, times=3, floor=2e-6)


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize(
    "B, H, N_q, N_k, d",
    [
        (1, 2, 70, 150, 40),  # long path, nothing fits a block
        (2, 1, 64, 192, 64),  # long path, everything does
        (1, 1, 33, 131, 80),
        (1, 1, 40, 144, 160),
        (1, 2, 70, 77, 40),  # the prompt's tokens
        (1, 1, 50, 77, 160),
        (2, 1, 64, 64, 80),
        (1, 1, 5, 3, 8),
        (1, 1, 1, 2, 24),
    ],
)
def test_attention_matches_fp64(B, H, N_q, N_k, d, dtype):
    check_attention(*attention_case(B, H, N_q, N_k, d, dtype))
