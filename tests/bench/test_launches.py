"""Launches, bytes and FLOP that are counted without a card, against counts by hand, PyTorch's own
FLOP counter. (kernels_interpreted.py has the kernels that start.)"""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minibooth import ops
from minibooth.bench import counter, launches, models
from minibooth.bench.counter import Counter
from minibooth.bench.no_card import CARD, card, walk_backward
from minibooth.bench.sides import OURS, Row
from minibooth.device.memory import checkpoint_gradients
from minibooth.formats.public import SD1_UNET
from minibooth.unet import UNet

CONFIG = SD1_UNET | dict(
    sample_size=16,
    block_out_channels=[32, 64],
    layers_per_block=1,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    cross_attention_dim=24,
    attention_head_dim=4,  # which means the number of heads
    norm_num_groups=8,
)
LAST, FP16 = torch.channels_last, torch.float16


def on_card(*shape, dtype=FP16, last=False, grad=False):
    x = torch.empty(shape, dtype=dtype, device=CARD)
    return x.to(memory_format=LAST if last else torch.preserve_format).requires_grad_(grad)


def all_of(found: Counter) -> dict[str, list[int]]:
    """Launches, bytes and FLOP by kind, whatever the phase."""
    kinds = {}
    for (_, kind), cost in found.costs.items():
        before = kinds.get(kind, [0, 0, 0])
        kinds[kind] = [a + b for a, b in zip(before, cost, strict=True)]
    return kinds


# ---- operators, by hand ------------------------------------------------------------------------


@pytest.mark.parametrize("last", [True, False])
def test_a_convolution_its_bias_and_the_copy_of_pixels_in_the_other_layout(last):
    with card(), Counter() as found:
        x, weight = on_card(2, 8, 16, 16, last=last), on_card(16, 8, 3, 3, last=True)
        found.costs.clear()  # what made them
        y = nn.functional.conv2d(x, weight, on_card(16), padding=1)
        assert y.is_contiguous(memory_format=LAST)
    x, weight, y, bias = 2 * 2 * 8 * 256, 2 * 16 * 8 * 9, 2 * 2 * 16 * 256, 2 * 16
    flops = 2 * (2 * 16 * 256) * (8 * 9)
    expected = {"convolutions": [2, (x + weight + y) + (2 * y + bias), flops]}
    assert all_of(found) == expected | ({} if last else {"copies": [1, 2 * x, 0]})


def test_a_convolution_s_three_gradients():
    with card():
        x, weight = on_card(2, 8, 16, 16, last=True, grad=True), on_card(16, 8, 3, 3, last=True)
        y = nn.functional.conv2d(x, weight.requires_grad_(), on_card(16, grad=True), padding=1)
        dy = on_card(*y.shape, last=True)
        with Counter() as found:
            y.backward(dy)
        assert x.grad.stride() == x.stride() and weight.grad.stride() == weight.stride()
    x, weight, y, bias = 2 * 2 * 8 * 256, 2 * 16 * 8 * 9, 2 * 2 * 16 * 256, 2 * 16
    flops = 2 * 2 * (2 * 16 * 256) * (8 * 9)
    assert all_of(found) == {"convolutions": [3, 2 * (x + weight + y) + (y + bias), flops]}


def test_group_norm_is_three_kernels_in_nchw_and_its_backward_five():
    with card():
        x = on_card(2, 32, 16, 16, last=True, grad=True)
        gamma, beta = on_card(32, grad=True), on_card(32, grad=True)
        dy = on_card(2, 32, 16, 16, last=True)
        with Counter() as found:
            y = nn.functional.group_norm(x, 8, gamma, beta)
        forward = all_of(found)
        assert y.is_contiguous()
        with Counter() as found:
            y.backward(dy)
    size, weights, moments = 2 * 2 * 32 * 256, 2 * 2 * 32, 2 * 2 * 2 * 8
    assert forward == {"copies": [1, 2 * size, 0], "norms": [3, 3 * size + weights + moments, 0]}
    # dy is copied, and dx, for x lies otherwise; gamma is read, two gradients of weights written.
    moved = 5 * size + weights // 2 + weights + moments
    assert all_of(found) == {"copies": [2, 4 * size, 0], "norms": [5, moved, 0]}


def test_silu_s_backward_is_one_kernel():
    with card():
        x = on_card(4, 100, grad=True)
        y, dy = nn.functional.silu(x), on_card(4, 100)
        with Counter() as found:
            y.backward(dy)
    assert all_of(found) == {"others": [1, 3 * 800, 0]}


def test_what_is_made_up_of_other_tensors_memory_is_not_moved_twice():
    with card(), Counter() as found:
        x = on_card(4, 100)
        x[:, :50].t().detach().reshape(-1)  # views, but for the last
    assert all_of(found) == {"copies": [1, 2 * 400, 0]}
    with card(), Counter() as found:
        on_card(4, 100) + on_card(1, 100).expand(4, -1)
    assert all_of(found) == {"others": [1, 800 + 200 + 800, 0]}


OLD, NEW = ((110, 64, 48, 36, 30), 320, 400), ((770, 448, 336, 252, 210), 2240, 3200)


@pytest.mark.parametrize(
    "sizes, lists, old, new",
    [
        ([10] * 36, 4, 1, 1),
        ([10] * 37, 4, 2, 1),
        ([10] * 253, 4, 8, 2),
        ([10] * 111, 1, 2, 1),
        ([320 * 65536], 4, 1, 1),
        ([320 * 65536 + 1], 4, 2, 1),
        ([1000 * 65536 - 7], 1, 4, 1),
        # The second is cut by the first launch's last chunk, and is the first of 36 in the next.
        ([300 * 65536, 100 * 65536] + [1] * 35, 4, 2, 1),
        ([300 * 65536, 100 * 65536] + [1] * 36, 4, 3, 1),
        ([], 1, 0, 0),
        ([0, 0], 1, 0, 0),
    ],
)
def test_an_operator_on_lists_is_launched_by_tensors_and_chunks(
    sizes, lists, old, new, monkeypatch
):
    tensors = [torch.empty(n, device="meta") for n in sizes]
    for limits, launched in ((OLD, old), (NEW, new)):
        monkeypatch.setattr(counter, "LIST_TENSORS", limits[0])
        monkeypatch.setattr(counter, "LIST_CHUNKS", limits[1])
        assert counter.list_launches(tensors, lists) == launched


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_and_fused_adamw_over_150_weights(scaled, monkeypatch):
    for name, limit in zip(("LIST_TENSORS", "LIST_CHUNKS", "NORM_TENSORS"), OLD, strict=True):
        monkeypatch.setattr(counter, name, limit)
    with card():
        weights = [nn.Parameter(on_card(10, dtype=torch.float32)) for _ in range(150)]
        adam = torch.optim.AdamW(weights, fused=True)
        for _ in range(2):  # the first makes the averages
            for p in weights:
                p.grad = torch.empty_like(p)
            if scaled:
                adam.grad_scale = adam.found_inf = torch.ones((), device=CARD)
            with Counter() as found:
                adam.step()
        size, steps = 150 * 40, 150 * 4
        launched = 2 + 5  # steps: 110 at a time; weights, gradients and averages: 36
        moved = 2 * steps + (8 if scaled else 7) * size + steps
        if scaled:  # the steps are taken back where there was an overflow: 64 pairs at a time
            launched, moved = launched + 3, moved + 3 * steps + 4 + 4
        assert all_of(found) == {"AdamW": [launched, moved, 0]}

        with Counter() as found:
            nn.utils.clip_grad_norm_(weights, 1.0)
        # Norms: two lists of zeros, 110 at a time, sums of 400 at a time; then they are multiplied.
        launched, moved = (2 + 2 + 1) + 2, (size + 150 * 4) + (2 * size + 4)
        assert all_of(found)["AdamW"] == [launched, moved, 0]
        # The norms are put together by 128, and the norm of them is taken; + ε, a division, a clamp
        assert all_of(found)["others"][0] == 2 + 1 + 4


def test_a_net_of_two_layers_by_hand():
    n = 4
    with card():
        net = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 8))
        x = on_card(n, 16)
        for module in (net[0], net[2]):
            module.weight = nn.Parameter(on_card(*module.weight.shape))
            module.bias = nn.Parameter(on_card(*module.bias.shape))
        with Counter() as found, launches.by_phase(found):
            net(x).sum().backward()
    A, B, X, H, Y = (2 * k for k in (24 * 16, 8 * 24, n * 16, n * 24, n * 8))
    assert dict(found.costs) == {
        # x aᵀ and h bᵀ, with their biases
        ("forward", "products"): [2, (X + A + 48 + H) + (H + B + 16 + Y), 2 * n * (384 + 192)],
        # silu, the sum, the gradient 1
        ("forward", "others"): [3, 2 * H + (Y + 2) + 2 * 2, 0],
        # dy b and dyᵀ h, where dy is one number in all places; dhᵀ x
        ("backward", "products"): [3, 2 * (2 + B + H) + (H + X + A), 2 * n * (2 * 192 + 384)],
        # silu's; the sums of dy and dh over the batch
        ("backward", "others"): [3, 3 * H + (2 + 16) + (H + 48), 0],
    }


# ---- the kernels -------------------------------------------------------------------------------


def test_the_kernels_move_their_arguments():
    pytest.importorskip("triton")
    with card("triton"):
        q, k, v = (on_card(2, N, 8, 40, grad=True).transpose(1, 2) for N in (4096, 77, 77))
        with Counter() as count:
            ops.attention(q, k, v)
        x, weight = on_card(2, 320, 64, 64, last=True), on_card(320, dtype=torch.float32)
        with Counter() as norm:
            ops.group_norm(x, 32, weight, weight, 1e-5)
    q, k, L = 2 * 2 * 4096 * 320, 2 * 2 * 77 * 320, 4 * 2 * 8 * 4096
    assert all_of(count) == {"attention": [1, 2 * q + 2 * k + L, 4 * 2 * 8 * 4096 * 77 * 40]}
    (launched, moved, _), size = all_of(norm)["norms"], 2 * 2 * 320 * 4096
    assert launched == 3 and 3 * size < moved < 3.2 * size  # x twice and y; statistics


# ---- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_the_unet_s_flop_are_those_of_pytorch_s_own_counter(kernels):
    if kernels == "triton":
        pytest.importorskip("triton")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as flops:
        x, context = torch.empty(2, 4, 16, 16), torch.empty(2, 77, 24)
        UNet(CONFIG)(x, torch.zeros(2), context)
    found = launches.forward(Row("forward", 2, "fp16", kernels=kernels), OURS, CONFIG)
    assert sum(cost[2] for cost in found.costs.values()) == flops.get_total_flops() > 10**7


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_backward_pass_that_is_walked_gives_the_engine_s_gradients(checkpointing, monkeypatch):
    unet = tiny.randomize(UNet(CONFIG))
    x, context = tiny.randn(2, 4, 16, 16), tiny.randn(2, 77, 24, seed=1).requires_grad_()
    hooked = []
    unet.conv_in.bias.register_post_accumulate_grad_hook(hooked.append)

    def gradients():
        with checkpoint_gradients(unet, checkpointing):
            y = unet(x, torch.tensor([3, 700]), context)
            (y.square().sum() + y.mean() * tiny.randn(4, 1)).sum().backward()
        found = [p.grad for p in (*unet.parameters(), context)]
        unet.zero_grad()
        context.grad = None
        return found

    expected = gradients()
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", walk_backward)
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 0)
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert ours.stride() == theirs.stride() and tiny.rel(ours, theirs) < 1e-5
    assert [p is unet.conv_in.bias for p in hooked] == [True, True]


def test_the_bench_writes_its_rows_and_says_that_nothing_was_measured(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(models.CONFIGS, "SD 1.5", {"unet": CONFIG})
    wanted = [(OURS, Row("step", 1, "bf16"))]
    assert set(wanted) < set(launches.rows())
    monkeypatch.setattr(launches, "rows", lambda: wanted)
    before = torch.nn.functional.scaled_dot_product_attention, ops.mode()
    launches.benchmark("launches", 0, tmp_path)
    assert before == (torch.nn.functional.scaled_dot_product_attention, ops.mode())
    text = (tmp_path / "launches.md").read_text()
    assert text in capsys.readouterr().out and text.startswith("Counted, not measured")
    report = json.loads((tmp_path / "launches.json").read_text())
    assert report["about"] in text and report["per_second"]["bytes"] == 3.35e12
    for found in report["rows"]:
        for key in ("launches", "bytes", "flops"):
            sums = [sum(part[key] for part in found[of].values()) for of in ("phases", "kinds")]
            assert sums == [found[key]] * 2
        assert found["least_seconds"]["bytes"] == found["bytes"] / 3.35e12
        assert f"| {found['launches']} | {found['bytes'] / 1e9:.2f} |" in text
    (plain,) = report["rows"]
    assert list(plain["phases"]) == ["forward", "backward", "update"]


def test_the_results_tables_are_those_of_their_json_and_the_page_has_every_row():
    root = Path(__file__).parents[2]
    results = root / "bench" / "results"
    rows = json.loads((results / "launches.json").read_text("utf-8"))["rows"]
    text = (results / "launches.md").read_text("utf-8")
    assert text == launches.table(rows)
    page = (root / "docs" / "speed.md").read_text("utf-8")
    quoted = re.findall(r"^\| `(.+: \w+)` \|", page, re.M)
    assert sorted(quoted) == sorted(map(launches.label, rows))


@pytest.mark.slow
def test_diffusers_step_computes_as_much():
    row = Row("step", 1, "bf16")
    ours, theirs = (
        launches.found_by(who, row, launches.step(row, who, CONFIG)) for who in (OURS, "diffusers")
    )
    assert theirs["flops"] == ours["flops"]
    # The same weights go through AdamW; ours scales the gradients within it, theirs before.
    weights = 4 * sum(p.numel() for p in UNet(CONFIG).parameters())
    moved = [found["kinds"]["AdamW"]["bytes"] / weights for found in (ours, theirs)]
    assert moved == pytest.approx([1 + 8, 1 + 2 + 7], rel=0.02)


@pytest.mark.slow
def test_the_modes_that_save_memory_launch_and_compute_more():
    weights, found = len(list(UNet(CONFIG).parameters())), {}
    for mode in ((), ("gradient_checkpointing",), ("optimizer_in_backward",)):
        row = Row("step", 1, "bf16", settings=tuple((name, True) for name in mode))
        found[mode] = launches.found_by(OURS, row, launches.step(row, OURS, CONFIG))
    plain, checkpointed, in_backward = found.values()
    forward = plain["phases"]["forward"]["flops"]
    assert 0.5 * forward < checkpointed["flops"] - plain["flops"] < forward
    assert in_backward["flops"] == plain["flops"]
    assert in_backward["launches"] > plain["launches"] + 5 * weights
