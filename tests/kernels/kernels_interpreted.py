"""The kernels against fp64 PyTorch, in Triton's interpreter: TRITON_INTERPRET=1 pytest <this file>.

test_kernels.py runs it in a process of its own, because Triton reads the variable at import.
fp32 shows that the logic is right, fp16 that the casts are; the interpreter's bf16 is not exact.
"""

import itertools
import json
from unittest import mock

import fast_interpreter  # noqa: F401
import pytest
import torch
from minibooth_kernels import adamw, card, geglu
from minibooth_kernels import attention as at
from minibooth_kernels import group_norm as gn
from minibooth_kernels import layer_norm as ln
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from minibooth import ops
from minibooth.bench import check, kernels, no_card
from minibooth.bench.counter import Counter
from minibooth.device import trial
from minibooth.ops import Case

FP16, FP32 = torch.float16, torch.float32


def relative_error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()


def assert_no_worse(outs, theirs, expected, times, floor):
    """Against fp64: twice PyTorch's error in the same dtype, `times` for gradients, or `floor`."""
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


@pytest.fixture(params=["one pass", "two passes"])
def both_ways(request, monkeypatch):
    if request.param == "two passes":
        monkeypatch.setattr(gn, "FORWARD_TILES", {True: (), False: ()})
        monkeypatch.setattr(gn, "BACKWARD_TILES", {True: (), False: ()})


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
def test_group_norm_matches_fp64(both_ways, shape, groups, dtype, silu, layout):
    inputs, upstream = group_norm_case(shape, dtype, layout)
    check_group_norm(inputs, groups, upstream, silu)


def test_group_norm_is_stable_for_a_large_mean_with_a_small_variance(both_ways):
    """E[x²] − E[x]² gets nothing right here: at 4096 ± 1, x² has no bits left for the variance."""
    inputs, _ = group_norm_case((2, 20, 16, 20), FP32, torch.channels_last, mean=4096.0)
    x, weight, bias = inputs
    expected = gn.reference(x.double(), 2, weight.double(), bias.double(), 1e-5)
    # The mean itself is rounded to fp32: half a unit of 4096's last place, 2.4e-4, of σ = 1.
    assert relative_error(gn.group_norm(*inputs[:1], 2, weight, bias, 1e-5), expected) < 3e-4


def test_group_norm_of_a_constant_is_the_bias(both_ways):
    x = torch.full((2, 8, 12, 12), 3.7)
    y = gn.group_norm(x, 2, torch.ones(8), torch.arange(8.0), 1e-5)
    # The rounding of the mean, some 1e-6, is divided by sqrt(eps).
    assert (y - torch.arange(8.0)[:, None, None]).abs().max() < 5e-3


def test_group_norm_merges_the_partial_results_of_many_programs(monkeypatch):
    """One tile per program; the rows drift, so that every partial mean is another."""
    monkeypatch.setattr(gn.tiles, "PROGRAMS", 10**9)
    inputs, upstream = group_norm_case((1, 32, 40, 41), FP32, torch.channels_last)
    drift = torch.linspace(-50, 50, 40).view(1, 1, 40, 1)
    check_group_norm(((inputs[0] + drift), *inputs[1:]), 2, upstream, silu=True)


def test_group_norm_takes_any_layout_of_input_and_gradient():
    """A transposed sequence, a slice (copied), and a gradient in the other layout."""
    (x, weight, bias), upstream = group_norm_case((2, 12, 6, 10), FP32, torch.channels_last)
    check_group_norm((x.flatten(2), weight, bias), 3, upstream.flatten(2), True)
    check_group_norm((x, weight, bias), 3, upstream.contiguous(), True)
    sliced = torch.cat([x, x], dim=3)[..., 3:13]
    y = gn.group_norm(sliced, 3, weight, bias, 1e-5)
    torch.testing.assert_close(y, gn.reference(sliced, 3, weight, bias, 1e-5))


@pytest.mark.parametrize(
    "layout, dtype", [(torch.contiguous_format, FP16), (torch.channels_last, FP32)]
)
def test_group_norm_of_what_is_shifted_by_channel_matches_fp64(both_ways, layout, dtype):
    """Shifts that are large beside what they are added to; and their gradients."""
    inputs, upstream = group_norm_case((2, 24, 9, 7), dtype, layout)
    shift = 20 * torch.randn(2, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    inputs = (*inputs, shift)

    def run(f, inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = f(leaves[0], 4, *leaves[1:3], 1e-5, silu=True, shift=leaves[3])
        return [y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]

    outs, theirs = run(gn.group_norm, inputs), run(gn.reference, inputs)
    expected = run(gn.reference, [x.double() for x in inputs])
    for out, their, true in zip(outs[:4], theirs, expected, strict=False):
        assert relative_error(out, true) <= max(2e-6, 3 * relative_error(their, true))
    # A shift of all of a group's channels is none: the gradient is what little is left of the sum.
    assert (outs[4] - expected[4]).abs().max() <= 2 * (theirs[4] - expected[4]).abs().max() + 1e-4


def test_group_norm_takes_half_input_with_fp32_parameters():
    """What autocast hands it: the result and dx in fp16, dγ and dβ in fp32."""
    (x, weight, bias), upstream = group_norm_case((2, 16, 6, 6), FP16, torch.channels_last)
    inputs = (x, weight.float(), bias.float())
    run = lambda f: lambda *args: f(args[0], 4, *args[1:], 1e-5, silu=True)  # noqa: E731
    outs = value_and_gradients(run(gn.group_norm), inputs, upstream)
    expected = value_and_gradients(run(gn.reference), [i.double() for i in inputs], upstream)
    assert [o.dtype for o in outs] == [FP16, FP16, FP32, FP32]
    for out, true in zip(outs, expected, strict=True):
        assert relative_error(out, true) < 1e-3


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


@pytest.fixture
def short_kernels_in_fp32(monkeypatch):
    """On a card fp32 does not use them (no registers for it); their logic is the same."""
    short = {kernel: row for kernel, row in at.tiles.AMPERE.items() if kernel.startswith("short")}
    monkeypatch.setattr(at.tiles, "FLOAT32", at.tiles.FLOAT32 | short)


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize(
    "B, H, N_q, N_k, d",
    [
        (1, 1, 70, 150, 40),  # long, nothing fits a block
        (2, 1, 64, 192, 64),  # long, everything does
        (1, 1, 33, 131, 80),
        (1, 1, 20, 144, 160),
        (1, 1, 20, 77, 160),  # the prompt's tokens, a head too wide for the short kernels
        (1, 2, 70, 77, 40),  # short
        (2, 1, 64, 64, 64),
        (1, 1, 5, 3, 8),
        (1, 1, 3, 6, 24),
    ],
)
def test_attention_matches_fp64(short_kernels_in_fp32, B, H, N_q, N_k, d, dtype):
    check_attention(*attention_case(B, H, N_q, N_k, d, dtype))


def distinct_tiles():
    """(capability, N_k, d, candidate): every tile of the 16-bit tables once."""
    found, seen = [], set()
    every = itertools.product((80, 90, 100, 120), (150, 77), (40, 80, 96, 128, 160), range(3))
    for capability, N_k, d, choice in every:
        q, kernels = torch.empty(1, 1, 70, d, dtype=FP16), at.tiles.AMPERE
        with mock.patch.object(at.card, "capability", lambda device, c=capability: c):
            options = [(kernel, at.config(kernel, q, N_k, choice)) for kernel in kernels]
        new = {(kernel, *row.values()) for kernel, row in options if row} - seen
        seen |= new
        if new and (N_k, d) not in ((77, 96), (77, 128), (77, 160)):
            found.append((capability, N_k, d, choice))
    return found


def use_tiles(monkeypatch, capability, choice):
    monkeypatch.setattr(at.card, "capability", lambda device: capability)
    attention = at._attention

    def chosen(q, k, v, scale, _):
        counts = at.candidates(q, k.shape[2], backward=q.shape[-1] <= 160)
        return attention(q, k, v, scale, [choice if choice < n else 0 for n in counts])

    monkeypatch.setattr(at, "_attention", chosen)


def followed_by_nans(x):
    """x, and behind its last row numbers that nothing may read."""
    return torch.cat([x, torch.full_like(x[:, :, :1], torch.nan).expand_as(x)], 2)[
        :, :, : x.shape[2]
    ]


@pytest.mark.parametrize("capability, N_k, d, choice", distinct_tiles())
def test_attention_matches_fp64_with_every_cards_tiles(monkeypatch, capability, N_k, d, choice):
    use_tiles(monkeypatch, capability, choice)
    inputs, upstream = attention_case(1, 1, 70, N_k, d, FP16)
    check_attention([followed_by_nans(x) for x in inputs], upstream)


@pytest.mark.parametrize("choice", [0, 1], ids=["plain", "S one block ahead"])
def test_attention_of_whole_blocks_reads_no_row_too_many(monkeypatch, choice):
    """Without masks: the last block is the last, also for what is computed ahead of its use."""
    use_tiles(monkeypatch, 90, choice)
    inputs, upstream = attention_case(1, 1, 128, 192, 40, FP16)
    q = inputs[0]
    assert at.config("forward", q, 192)["EVEN"] and at.config("backward_dkv", q, 192)["EVEN"]
    assert at.config("forward", q, 192, choice)["PREFETCH"] == bool(choice)
    check_attention([followed_by_nans(x) for x in inputs], upstream)


@pytest.mark.parametrize("d", [16, 32, 48, 56, 72, 88, 96, 104, 120, 128, 136, 152])
def test_attention_takes_every_multiple_of_8(short_kernels_in_fp32, d):
    N_k = 20 if d <= 80 else 40
    check_attention(*attention_case(1, 1, 10, N_k, d, FP32))


@pytest.mark.parametrize("capability", [80, 90])
def test_attention_of_the_vae_is_forward_only(monkeypatch, capability):
    """A program makes a slice of the columns, each of them from the same scores."""
    monkeypatch.setattr(at.card, "capability", lambda device: capability)
    (q, k, v), _ = attention_case(1, 1, 20, 37, 512, FP16)
    expected = at.reference(q.double(), k.double(), v.double())
    error = relative_error(at.attention(q, k, v), expected)
    assert error <= 2 * relative_error(at.reference(q, k, v), expected)
    with pytest.raises(ValueError, match="no backward for head dimension 512"):
        at.attention(q.requires_grad_(), k, v)


@pytest.mark.parametrize("N_k", [77, 150])
def test_attention_survives_large_logits(N_k):
    """Logits of several hundred, all negative in one row: exp needs the maximum, L its sign."""
    (q, k, v), upstream = attention_case(1, 1, 20, N_k, 40, FP16, gain=30.0)
    q[0, 0, 3] = 20.0
    k = -k.abs()
    check_attention((q, k, v), upstream)


def test_attention_scale_is_the_callers():
    check_attention(*attention_case(1, 1, 20, 30, 16, FP16), scale=0.7)
    inputs, _ = attention_case(1, 1, 20, 30, 16, FP32)
    with pytest.raises(ValueError, match="positive"):
        at.attention(*inputs, scale=-1.0)


def test_attention_reads_views_where_they_lie():
    """q, k, v of one packed projection; a gradient that is expanded; an odd view, copied."""
    packed = torch.randn(2, 30, 3, 2, 40, generator=torch.Generator().manual_seed(0), dtype=FP16)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    assert all(at._aligned(x) is x for x in (q, k, v))
    check_attention((q, k, v), torch.ones((), dtype=FP16).expand(2, 2, 30, 40))
    odd = torch.cat([q, q], dim=-1)[..., 4:44]
    expected = at.reference(odd.double(), k.double(), v.double())
    assert relative_error(at.attention(odd, k, v), expected) < 1e-3
    shifted = torch.randn(1 + 80, dtype=FP16)[1:].view(1, 1, 2, 40)  # contiguous, not at 16 bytes
    assert at._aligned(shifted).data_ptr() % 16 == 0 and torch.equal(at._aligned(shifted), shifted)


def test_attention_output_is_heads_side_by_side():
    inputs, upstream = attention_case(2, 3, 10, 12, 16, FP32)
    out, dq, dk, dv = value_and_gradients(at.attention, inputs, upstream)
    for x in (out, dq, dk, dv):
        assert x.transpose(1, 2).is_contiguous()  # (B, N, H·d) is a free view


# ---- rows: layer norm and GEGLU -------------------------------------------------------------


def rows_case(shape, dtype, mean=0.0):
    """x, h, γ, β, and two upstream gradients."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, h, *upstreams = torch.randn(4, *shape, generator=generator)
    weights = torch.randn(2, shape[-1], generator=generator)
    return [y.to(dtype) for y in (x + mean, h, *weights)], [y.to(dtype) for y in upstreams]


def check_rows(f, reference, inputs, upstreams, dtypes):
    """Against fp64: twice PyTorch's error in the same dtype, three times for gradients."""

    def run(f, inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        outs = f(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        given = [u.to(y.dtype) for u, y in zip(upstreams, outs, strict=True)]
        return [*outs, *torch.autograd.grad(outs, leaves, given)]

    outs, theirs = run(f, inputs), run(reference, inputs)
    expected = run(reference, [x.double() for x in inputs])
    assert [y.dtype for y in outs] == dtypes and all(y.is_contiguous() for y in outs)
    for out, their, true in zip(outs, theirs, expected, strict=True):
        assert relative_error(out, true) <= max(2e-6, 3 * relative_error(their, true))


@pytest.mark.parametrize("dtype, choices", [(FP32, (1, 0)), (FP16, ()), (FP16, (1, 1))])
@pytest.mark.parametrize("shape", [(2, 3, 320), (1, 37, 24), (1, 1, 1)])
def test_layer_norm_matches_fp64_with_and_without_a_sum(shape, dtype, choices):
    (x, h, *weights), upstreams = rows_case(shape, dtype)
    if shape == (1, 1, 1):  # one number is its own mean: y is β
        torch.testing.assert_close(ln.layer_norm(x, *weights, 1e-5), weights[1].expand(shape))
        return

    def norm(f, **options):
        return lambda x, weight, bias, *h: f(x, weight, bias, 1e-5, *h, **options)

    ours, theirs = norm(ln.layer_norm, choices=choices), norm(ln.reference)
    check_rows(ours, theirs, (x, *weights), upstreams[1:], [dtype] * 4)
    check_rows(ours, theirs, (x, *weights, h), upstreams, [dtype] * 6)


def test_layer_norm_adds_up_the_weights_gradients_of_many_programs(monkeypatch):
    """Two rows each of 37, the last of one; a mean that is large beside the variance."""
    monkeypatch.setattr(ln, "LEAST_ROWS", 1)
    monkeypatch.setattr(ln, "FLOAT32_BACKWARD_TILES", ((64, 4),))
    monkeypatch.setattr(ln, "PROGRAMS", 19)
    (x, _, *weights), upstreams = rows_case((1, 37, 24), FP32, mean=300.0)
    y = ln.layer_norm(x, *weights, 1e-5)
    assert relative_error(y, ln.reference(*(z.double() for z in (x, *weights)), 1e-5)) < 3e-5
    run = lambda f: lambda *inputs: f(*inputs, 1e-5)  # noqa: E731
    inputs = (x - 300, *weights)
    check_rows(run(ln.layer_norm), run(ln.reference), inputs, upstreams[1:], [FP32] * 4)


def test_layer_norm_takes_what_autocast_and_autograd_hand_it():
    """Weights in fp32 beside 16 bits; views; an output of which nothing asks a gradient."""
    (x, h, *weights), (upstream, _) = rows_case((2, 5, 32), FP16)
    x, h = x.transpose(0, 1), h.transpose(0, 1)
    leaves = [y.float().requires_grad_() if y.ndim == 1 else y.requires_grad_() for y in
              (x.detach(), h.detach(), *weights)]  # fmt: skip
    s, y = ln.layer_norm(leaves[0], *leaves[2:], 1e-5, leaves[1])
    assert (s.dtype, y.dtype) == (FP16, FP16) and torch.equal(s, x + h)
    expected = ln.reference(leaves[0].float(), *leaves[2:], 1e-5, leaves[1].float())
    torch.testing.assert_close(y.float(), expected[1], atol=4e-3, rtol=2e-3)
    gradients = torch.autograd.grad(y, leaves, upstream.transpose(0, 1), retain_graph=True)
    assert [g.dtype for g in gradients] == [FP16, FP16, FP32, FP32]
    wide = torch.autograd.grad(expected[1], leaves, upstream.transpose(0, 1).float())
    for mine, theirs in zip(gradients, wide, strict=True):
        assert relative_error(mine, theirs.double()) < 2e-3
    of_sum = torch.autograd.grad(s, leaves[:2], upstream.transpose(0, 1))
    assert all(torch.equal(g, upstream.transpose(0, 1)) for g in of_sum)


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("shape", [(2, 5, 520), (1, 9, 6)])
def test_geglu_matches_fp64(shape, dtype):
    (x, *_), (upstream, _) = rows_case(shape, dtype)
    x[0, 0, -3:] = torch.tensor([30.0, -30.0, 0.0])  # far outside erf's bend
    half = upstream[..., : shape[-1] // 2]
    check_rows(geglu.geglu, geglu.reference, [3 * x], [half], [dtype] * 2)


def test_rows_that_the_kernels_cannot_take_are_refused():
    x, weight = torch.zeros(2, 3, 4), torch.ones(4)
    long = torch.zeros(1, 2049)
    for refused, said in (
        (lambda: ln.layer_norm(long, long[0], long[0], 1e-5), "2048 at most"),
        (lambda: ln.layer_norm(x, weight[:3], weight, 1e-5), "one value for each"),
        (lambda: ln.layer_norm(x, weight, weight, 1e-5, x.half()), "must be like x"),
        (lambda: geglu.geglu(torch.zeros(2, 3)), "no half"),
    ):
        with pytest.raises(ValueError, match=said):
            refused()


# ---- all ------------------------------------------------------------------------------------


def operators():
    attention, _ = attention_case(1, 2, 20, 77, 16, FP16)
    norm, _ = group_norm_case((2, 8, 5, 6), FP32, torch.channels_last)
    (x, h, *weights), _ = rows_case((2, 3, 8), FP32)
    shift = norm[0][..., 0, 0].contiguous()
    return [
        (torch.ops.minibooth.layer_norm, (x, None, *weights, 1e-5, ())),
        (torch.ops.minibooth.layer_norm, (x, h, *weights, 1e-5, (1, 0))),
        (torch.ops.minibooth.geglu, (x,)),
        (torch.ops.minibooth.attention, (*attention, 0.25, (0, 0))),
        (torch.ops.minibooth.group_norm, (norm[0], 2, *norm[1:], 1e-5, True, None, ())),
        (torch.ops.minibooth.group_norm, (norm[0], 2, *norm[1:], 1e-5, True, shift, (1,))),
    ]


@pytest.mark.parametrize("operator, arguments", operators())
def test_operator_obeys_torch_library(operator, arguments):
    """Schema, fake tensors (shapes, strides, dtypes) and autograd registration, as torch checks."""
    arguments = [
        x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments
    ]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operator.default, tuple(arguments), test_utils=checks)


def test_equal_bits_in_two_runs():
    rows, (of_rows, _) = rows_case((1, 70, 24), FP16)
    for run, (inputs, upstream) in (
        (at.attention, attention_case(1, 1, 70, 77, 40, FP16)),
        (at.attention, attention_case(1, 1, 70, 150, 40, FP16)),
        (lambda *x: gn.group_norm(x[0], 2, *x[1:], 1e-5, True),
         group_norm_case((2, 8, 12, 12), FP16, torch.channels_last)),
        (lambda *x: ln.layer_norm(*x, 1e-5), (rows[:1] + rows[2:], of_rows)),
    ):  # fmt: skip
        first = value_and_gradients(run, inputs, upstream)
        for a, b in zip(first, value_and_gradients(run, inputs, upstream), strict=True):
            assert torch.equal(a, b)


def test_compiled_without_a_graph_break():
    """torch.compile sees one node per operator, in the forward and in the backward."""

    def layer(x, weight, bias):
        y = ops.group_norm(x, 2, weight, bias, 1e-5, silu=True)
        tokens = y.flatten(2).transpose(1, 2).unflatten(-1, (2, 8)).transpose(1, 2)
        return ops.attention(tokens, tokens, tokens)

    inputs, _ = group_norm_case((1, 16, 4, 5), FP32, torch.channels_last)
    upstream = torch.randn(1, 2, 20, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    ops.use("triton")
    try:
        for out, expected in zip(
            value_and_gradients(compiled, inputs, upstream),
            value_and_gradients(layer, inputs, upstream),
            strict=True,
        ):
            torch.testing.assert_close(out, expected)
    finally:
        ops.use("auto")


def test_ops_choose_the_kernels_when_asked():
    """Under autocast attention gets autocast's dtype, as SDPA does."""
    (q, k, v), _ = attention_case(1, 2, 20, 77, 16, FP32)
    (x, weight, bias), _ = group_norm_case((2, 8, 5, 6), FP32, torch.channels_last)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at, "_attention", lambda *a: calls.append(a[0].dtype) or [a[0]])
        patch.setattr(gn, "_group_norm", lambda *a: calls.append(a[0].dtype) or [a[0]])
        ops.attention(q, k, v)  # auto, on the CPU: PyTorch
        assert calls == []
        ops.use("triton")
        try:
            ops.attention(q, k, v)
            ops.group_norm(x, 2, weight, bias, 1e-5)
            with torch.autocast("cpu", dtype=FP16):
                ops.attention(q, k, v)
        finally:
            ops.use("auto")
    assert calls == [FP32, FP32, FP16]


def test_the_formula_of_the_backward_is_the_derivative_of_the_forwards():
    g = torch.Generator().manual_seed(0)
    q, do = torch.randn(2, 2, 3, 11, 8, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, 7, 8, generator=g, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(at.reference(*inputs, scale=0.3), inputs, do)
    for mine, theirs in zip(at.reference_backward(q, k, v, do, scale=0.3), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_benchmark_rehearsed(monkeypatch, tmp_path, capsys):
    """Everything of the GPU command but the clock: the checks, every row, the JSON, the chart."""
    monkeypatch.setattr(check, "DEVICE", torch.device("cpu"))
    attention = {"SD 1.5 cross": (2, 20, 7, 8), "VAE 4096": (1, 6, 9, 512)}
    monkeypatch.setattr(check, "ATTENTION", attention)
    monkeypatch.setattr(check, "NORMS", {"UNet": (64, 3)})
    monkeypatch.setattr(check, "ODD_ATTENTION", {"tiny": (1, 5, 3, 8)})
    monkeypatch.setattr(check, "ODD_NORMS", {})
    monkeypatch.setattr(kernels, "BATCH_SIZES", (1,))
    monkeypatch.setattr(trial, "L2_BYTES", 2)
    monkeypatch.setattr(at.tiles, "SLICE", 512)  # a quarter of the programs
    monkeypatch.setattr(check, "ROWS", rows := {"UNet rows": (5, 8)})
    of_all = (attention, {"UNet": 0}, rows, rows)
    kinds = [(of, names) for (of, _), names in zip(kernels.KINDS, of_all, strict=True)]
    monkeypatch.setattr(kernels, "KINDS", kinds)
    monkeypatch.setattr(check, "ODD_ROWS", {})
    monkeypatch.setattr(trial, "counts", lambda case, device: ())  # no other tiles
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (0, 0))

    def once(make_calls):
        make_calls()[0]()
        return 1e-3

    monkeypatch.setattr(kernels, "graph_time", once)
    monkeypatch.setattr(kernels, "bounds", lambda dtype: {"flops": 1e12, "bytes": 1e12})
    assert check.check(FP16) == []
    case = Case("attention", (1, 1, 5, 6, 8), "float16", True)
    wrong = {"triton": lambda q, k, v: at.attention(q, k, v) * 1.01, "torch": at.reference}
    assert "allowed" in check.check_one("wrong", case, wrong)[0]

    kernels.benchmark(1.0, tmp_path, {})
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert len(report["rows"]) == 2 * (2 + 1 + 2 + 2 + 2) and report["left_out"] == []
    for row in report["rows"][9:]:  # fp16; the interpreter's bf16 is not exact
        assert row["ratio"] == 1.0 and row["taken"] and row["why"] is None
    out = capsys.readouterr().out
    assert "1.00× " in out and " % of the copy bound" in out
    assert (tmp_path / "kernels.png").stat().st_size > 0
    kernels.one_shape((1, 2, 6, 9, 16))
    assert capsys.readouterr().out.count("1×2×6×9×16") == 4


def test_the_work_of_a_case_is_what_the_formulas_say():
    """Of B·H heads 2·N_q·N_k·d for each product: two forward, five more backward."""
    case = Case("attention", (2, 8, 4096, 77, 40), "bfloat16", False)
    heads, both = 2 * 8 * 40, case._replace(backward=True)
    assert kernels.work(case)["flops"] == 2 * 2 * heads * 4096 * 77
    assert kernels.work(both)["flops"] == 7 * 2 * heads * 4096 * 77
    assert kernels.work(case)["bytes"] == 2 * 2 * heads * (4096 + 77)
    norm = Case(
        "group_norm", (2, 320, 64, 64), "bfloat16", True, (32, True, True, "float32", False)
    )
    tensor = 2 * 2 * 320 * 64 * 64
    assert kernels.work(norm) == {"flops": 0, "bytes": 5 * tensor, "moved": 8 * tensor}
    small = norm._replace(shape=(2, 640, 8, 8))
    assert kernels.work(small)["moved"] == 5 * 2 * 2 * 640 * 64


# ---- AdamW ----------------------------------------------------------------------------------

RATES = (0.01, 0.1)  # of the weights with an even number, and of the others


def weights_and_gradients(half):
    """Weights of several chunks, of few numbers and in channels_last; averages, copies, gradients.
    Without `half` there are no copies, with it not of the second one."""
    draw, shapes = torch.Generator().manual_seed(0), [(50, 100), (5,), (8, 24, 3, 3)]
    w, m, v, g = ([torch.randn(shape, generator=draw) for shape in shapes] for _ in range(4))
    for xs in (w, m, v, g):
        xs[2] = xs[2].contiguous(memory_format=torch.channels_last)
    v = [x.square() for x in v]
    copies = [x.to(half) if half and x.ndim > 1 else None for x in w]
    g = [x if c is None else x.to(half) for x, c in zip(g, copies, strict=True)]
    return w, (m, v), copies, g


@pytest.mark.parametrize("half", [None, FP16])
def test_adamw_matches_fp64(half, monkeypatch):
    monkeypatch.setattr(adamw, "CHUNK", 2048)
    monkeypatch.setattr(adamw, "NOTED", 2)
    w, (m, v), copies, g = weights_and_gradients(half)
    wide = [[x.double() for x in xs] for xs in (w, m, v, g)]
    scale, t, decay = torch.tensor(2.0), torch.tensor(3.0), 0.02
    expected = [
        adamw.reference(*of, scale.double(), RATES[i % 2], decay, 3)
        for i, of in enumerate(zip(*wide, strict=True))
    ]
    table = adamw.Table(w, (m, v), copies, [0, 1, 0])
    norm = torch.cat([x.flatten() for x in wide[3]]).norm()
    assert table.norm(g).item() == pytest.approx(norm.item(), rel=1e-6)
    before = [x.clone() for x in w]
    table.update(torch.tensor(RATES), scale, torch.tensor(1.0), t, decay)  # skipped
    assert all(map(torch.equal, w, before))
    table.norm(g)
    table.update(torch.tensor(RATES), scale, torch.tensor(0.0), t, decay)
    for found, of in zip(zip(w, m, v, strict=True), expected, strict=True):
        for x, y in zip(found, of, strict=True):
            assert relative_error(x, y) < 1e-7
    for x, copy in zip(w, copies, strict=True):
        assert copy is None or torch.equal(copy, x.to(half))


def test_adamw_takes_a_gradient_that_begins_anywhere():
    x = torch.arange(9.0)
    assert adamw.aligned(x[4:]).data_ptr() == x[4:].data_ptr()
    assert adamw.aligned(x[1:]).data_ptr() % 16 == 0 and torch.equal(adamw.aligned(x[1:]), x[1:])


# ---- the choice -----------------------------------------------------------------------------


def test_auto_takes_the_kernels_in_the_cases_that_are_preferred_and_in_no_others():
    (q, k, v), _ = attention_case(1, 2, 20, 77, 16, FP32)
    (x, weight, bias), _ = group_norm_case((2, 8, 5, 6), FP32, torch.channels_last)
    with ops.observed() as seen:
        ops.attention(q, k, v)
        ops.attention(q.clone().requires_grad_(), k, v)
        ops.group_norm(x, 2, weight, bias, 1e-5)
    forward, training, norm = seen
    assert forward == Case("attention", (1, 2, 20, 77, 16), "float32", False)
    assert training == forward._replace(backward=True)
    assert norm == Case(
        "group_norm", (2, 8, 5, 6), "float32", False, (2, False, True, "float32", False)
    )
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at, "_attention", lambda *a: taken.append("attention") or [a[0]])
        patch.setattr(gn, "_group_norm", lambda *a: taken.append("norm") or [a[0]])
        try:
            for preferred, expected in (
                ([], []),
                ([forward], ["attention"]),
                ([training, norm], ["norm"]),
                ([forward, norm], ["attention", "norm"]),
            ):
                taken.clear()
                ops.prefer(dict.fromkeys(preferred, ()))
                ops.attention(q, k, v)
                ops.group_norm(x, 2, weight, bias, 1e-5)
                assert taken == expected
        finally:
            ops.prefer({})


def test_the_smallest_kernel_is_launched():
    card.launch_one(torch.device("cpu"))


@pytest.mark.parametrize(
    "case",
    [
        Case("attention", (2, 2, 20, 77, 40), "float16", True),
        Case("attention", (1, 2, 70, 150, 40), "float16", False),
        Case("group_norm", (2, 32, 12, 12), "float16", True, (4, True, True, "float32", False)),
        Case("adamw", (), "float16", False),
        Case("group_norm", (1, 8, 70, 70), "float16", True, (4, True, False, "float16", False)),
        Case("layer_norm", (2, 9, 40), "float16", True, (True, "float32")),
        Case("layer_norm", (2, 9, 40), "float16", False, (False, "float16")),
        Case("geglu", (2, 9, 40), "float16", True),
    ],
    ids=lambda case: f"{case.op} {case.shape}",
)
def test_the_trial_finds_the_kernels_right(case, monkeypatch):
    monkeypatch.setattr(trial, "UPDATED", (3, 400))
    verdict = trial.examine(case, torch.device("cpu"), lambda make_calls: 1.0)
    assert verdict.why is None and verdict.triton


# ---- how many are launched --------------------------------------------------------------------

LAUNCHES = [  # forward and backward
    ("attention", (1, 1, 16, 40, 40), [1, 1]),  # few keys: kernels of their own
    ("attention", (1, 1, 16, 136, 16), [1, 2]),
    ("group_norm", (1, 8, 8, 8), [1, 1]),  # one pass
    ("group_norm", (1, 64, 24, 24), [3, 3]),
]


@pytest.mark.parametrize("op, shape, expected", LAUNCHES, ids=str)
def test_as_many_kernels_are_counted_as_start(op, shape, expected, monkeypatch):
    call, started = GridExecutor.__call__, []

    def starting(self, *arguments, **options):
        started.append(self.fn.__name__)
        return call(self, *arguments, **options)

    def counted(self, *arguments, **options):  # as a kernel that is no interpreted one
        return JITFunction.run(self, *arguments, grid=self.grid, warmup=False, **options)

    def passes(device):
        if op == "attention":
            B, H, N_q, N_k, d = shape
            shapes = [(B, H, N, d) for N in (N_q, N_k, N_k)]
        else:
            shapes = [shape, shape[1:2], shape[1:2]]
        inputs = [torch.ones(s, dtype=FP16, device=device).requires_grad_() for s in shapes]
        norm = (inputs[0], 1, *inputs[1:], 1e-5, True)
        y = ops.attention(*inputs) if op == "attention" else ops.group_norm(*norm)
        yield
        y.backward(torch.ones_like(y))
        yield

    ops.use("triton")
    monkeypatch.setattr(GridExecutor, "__call__", starting)
    assert [len(started) for _ in passes("cpu")] == [expected[0], sum(expected)]
    monkeypatch.setattr(GridExecutor, "__call__", counted)
    monkeypatch.setattr(no_card, "CAPABILITY", 80)  # as the interpreter
    with no_card.card("triton"), Counter() as counter:
        kind = "attention" if op == "attention" else "norms"
        found = [counter.costs["forward", kind][0] for _ in passes(no_card.CARD)]
    assert found == [expected[0], sum(expected)] and len(started) == sum(expected)
