"""Modes that save memory: what they take, when they are chosen, and that they train as they say."""

import contextlib
import dataclasses
import functools
import json
import runpy
import sys
import weakref
from pathlib import Path

import eight_bit_stand_in
import pytest
import runs
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minibooth import UserError, hypernetwork, lora, ops, train
from minibooth.bench import models
from minibooth.device import graphs, memory, settle
from minibooth.device.precision import Precision
from minibooth.formats.public import SD1_UNET, SD_VAE
from minibooth.train import TrainConfig
from minibooth.training import fit, parameters, plan, start
from minibooth.training.eight_bit import AdamW8bit, bitsandbytes
from minibooth.training.optimizer import Update
from minibooth.training.resume import State
from minibooth.unet import UNet
from minibooth.vae import VAE

CPU = torch.device("cpu")


# ---- 8-bit AdamW -------------------------------------------------------------------------------


@pytest.fixture(params=["stand-in", "bitsandbytes"])
def eight_bit(request, monkeypatch):
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    else:
        monkeypatch.setitem(sys.modules, "bitsandbytes", eight_bit_stand_in.MODULE)


SHAPES = [(32, 16, 3, 3), (70, 100), (10,)]  # the last has too few weights for 8 bits
RATE = 2**-7


def weights(layout=torch.preserve_format):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, device="cpu") for shape in SHAPES]
    made[0] = made[0].to(memory_format=layout)
    return [torch.nn.Parameter(x.to(torch.get_default_device())) for x in made]


def set_gradients(parameters, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, device="cpu").to(p.device) * scale


def updated(steps, layout=torch.preserve_format, scale=1.0, max_grad_norm=1e9, **changes):
    parameters = weights(layout)
    settings = {"weight_decay": 0.01, "max_grad_norm": max_grad_norm, "scaled": False}
    optimizer = Update([(RATE, parameters)], **{**settings, "use_8bit_adam": True, **changes})
    for step in range(1, steps + 1):
        set_gradients(parameters, step, scale * optimizer.scale)
        optimizer.apply(step, torch.tensor(1.0), 1.0)
    return parameters, optimizer


def adamw(steps):
    parameters = weights()
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    for step in range(1, steps + 1):
        set_gradients(parameters, step)
        optimizer.step()
    return parameters


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("steps, error", [(1, 1e-5), (10, 0.05)])
def test_8bit_adamw_is_adamw_but_for_the_rounding_of_its_averages(eight_bit, layout, steps, error):
    ours, _ = updated(steps, layout)
    for p, exact, before in zip(ours, adamw(steps), weights(), strict=True):
        assert (p - exact).norm() <= error * (exact - before).norm()
    torch.testing.assert_close(ours[2], adamw(steps)[2])  # fp32 averages
    assert ours[0].is_contiguous(memory_format=layout)  # bitsandbytes' own class turns it round


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_8bit_adamw_on_a_gpu_is_adamw_but_for_the_rounding_of_its_averages():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with torch.device("cuda"):
        ours, _ = updated(10, torch.channels_last)
    for p, exact, before in zip(ours, adamw(10), weights(), strict=True):
        assert (p.cpu() - exact).norm() <= 0.05 * (exact - before).norm()


def test_8bit_adamw_is_bitsandbytes_own():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    parameters = weights()
    optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=RATE, weight_decay=2**-7)
    for step in range(1, 9):
        set_gradients(parameters, step)
        optimizer.step()
    for p, q in zip(parameters, updated(8, weight_decay=2**-7)[0], strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_clipped_and_unscaled_before_8bit_adamw_sees_them(eight_bit, scaled):
    parameters = weights()
    set_gradients(parameters, 1)
    norm = torch.cat([p.grad.flatten() for p in parameters]).norm().item()
    changed, optimizer = updated(1, max_grad_norm=norm / 8, scaled=scaled)
    first = optimizer.adam.state[changed[2]]["state1"]
    torch.testing.assert_close(first, 0.1 * parameters[2].grad / 8)


def test_8bit_adamw_leaves_weights_and_averages_where_a_gradient_is_not_finite(eight_bit):
    parameters, optimizer = updated(2, scaled=True)
    before = [p.detach().clone() for p in parameters]
    state = {key: value.clone() for key, value in optimizer.state().items()}
    set_gradients(parameters, 3)
    parameters[1].grad[0, 0] = float("inf")
    optimizer.apply(3, torch.tensor(1.0), 1.0)
    assert optimizer.bad_step == -1 and optimizer.scale == 2**15  # fp16: only this step is skipped
    after = optimizer.state()
    assert all(torch.equal(after[key], state[key]) for key in state if "." in key)
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    parameters, optimizer = updated(2)
    before = [p.detach().clone() for p in parameters]
    for step, value in ((3, float("nan")), (4, 1.0)):
        set_gradients(parameters, step)
        parameters[1].grad[0, 0] = value
        optimizer.apply(step, torch.tensor(1.0), 1.0)
    assert optimizer.bad_step == 3  # else it is the end
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))


def test_8bit_averages_take_two_bytes_and_two_scales_per_block():
    conv, linear, small = weights()
    for p, size in ((conv, 2 * 4608 + 8 * 18), (linear, 2 * 7000 + 8 * 28), (small, 8 * 10)):
        state = AdamW8bit.fresh_state(p)
        step = state.pop("step")
        assert step == 0 and sum(x.numel() * x.element_size() for x in state.values()) == size
        assert plan.eight_bit(p.numel()) == size


def trained(folder, **changes):
    sd = runs.model()
    train.train(runs.config(folder, use_8bit_adam=True, **changes), sd)
    return runs.flat(sd.unet.state_dict()), (folder / "loss.csv").read_text()


MODES = [{"train_text_encoder": True}, {"optimizer_in_backward": True, "lr_warmup_steps": 3}]


@pytest.mark.parametrize("changes", MODES)
def test_training_with_8bit_adamw_goes_on_from_its_state(eight_bit, changes, tmp_path):
    whole, losses = trained(tmp_path / "whole", max_train_steps=2, **changes)
    trained(tmp_path / "out", max_train_steps=1, **changes)
    again = {"max_train_steps": 2, "resume_from_checkpoint": "latest", **changes}
    resumed, same = trained(tmp_path / "out", **again)
    assert torch.equal(whole, resumed) and losses == same


def test_8bit_adamw_in_the_backward_pass_is_the_plain_one_without_clipping(eight_bit, tmp_path):
    plain, _ = trained(tmp_path / "plain", max_grad_norm=1e9, max_train_steps=2)
    fused, _ = trained(tmp_path / "fused", optimizer_in_backward=True, max_train_steps=2)
    assert torch.equal(plain, fused)


def test_8bit_adamw_is_never_part_of_a_cuda_graph(eight_bit, tmp_path, monkeypatch):
    """It reads the learning rate on the CPU: a graph would keep the first."""
    monkeypatch.setattr(graphs, "captured", None)  # would fail if it were called
    trained(tmp_path / "out", max_train_steps=1)


def test_a_state_with_8bit_averages_goes_on_only_where_it_comes_from(eight_bit, tmp_path):
    out = tmp_path / "out"
    trained(out, max_train_steps=2)
    file = next(out.glob("state/*/identity.json"))
    identity = json.loads(file.read_text())
    assert identity["device"] == "cpu"
    file.write_text(json.dumps(identity | {"device": "cuda"}))
    again = {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match="device was 'cuda' and is 'cpu'"):
        trained(out, **again)
    file.write_text(json.dumps(identity))
    with pytest.raises(UserError, match="use_8bit_adam was True and is False"):
        train.train(runs.config(out, **again), runs.model())


def test_8bit_adamw_where_it_cannot_run_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    arguments = runs.arguments(runs.settings(tmp_path / "out", use_8bit_adam=True))
    status, _, err = runs.program(monkeypatch, capsys, train, *arguments)
    assert status == 2 and err.count("\n") == 1 and "pip install bitsandbytes" in err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="needs a CUDA device or a CPU"):
        bitsandbytes(torch.device("mps"))


# ---- what is needed ----------------------------------------------------------------------------

UNET_SIZE, VAE_SIZE, TEXT_SIZE = 859_520_964, 83_653_863, 123_060_480  # weights of SD 1.5


@functools.cache
def sd15():
    return models.model("SD 1.5", torch.device("meta"))


def config(**changes):
    return TrainConfig(**changes)


def test_what_is_sure_to_be_needed_for_sd_15():
    sd = sd15()
    plain = {"weights": 4 * UNET_SIZE, "trained": 4 * UNET_SIZE}
    assert plan.needed(sd, config()) == {
        **plain,
        "gradients": 4 * UNET_SIZE,
        "averages": 8 * UNET_SIZE,
    }
    both = plan.needed(sd, config(train_text_encoder=True))
    assert both["weights"] * 2 == both["averages"] == 8 * (UNET_SIZE + TEXT_SIZE)
    least = plan.needed(sd, config(use_8bit_adam=True, optimizer_in_backward=True))
    assert least["gradients"] == 0
    small = sum(p.numel() for p in sd.unet.parameters() if p.numel() < 4096)
    blocks = sum(-(-p.numel() // 256) for p in sd.unet.parameters() if p.numel() >= 4096)
    assert least["averages"] == 2 * (UNET_SIZE - small) + 8 * blocks + 8 * small
    assert least["averages"] == pytest.approx(UNET_SIZE * (2 + 8 / 256), rel=0.01)


def test_adapters_keep_the_network_beside_them_in_16_bits_where_it_computes_in_them():
    sd, lora, word = sd15(), config(method="lora"), config(method="textual_inversion")
    for given, at_work, trained in (
        (lora, UNET_SIZE, 797_184),
        (dataclasses.replace(lora, train_text_encoder=True), UNET_SIZE + TEXT_SIZE, None),
        (word, UNET_SIZE + TEXT_SIZE, 768),
    ):
        half, full = (plan.needed(sd, given, half) for half in (True, False))
        if trained:
            assert half["trained"] == full["trained"] == 4 * trained
            assert half["averages"] == 8 * trained and half["gradients"] == 4 * trained
        assert half["weights"] == 2 * at_work + half["trained"]
        assert full["weights"] == 4 * at_work + half["trained"]
        rest = 4 * (UNET_SIZE + TEXT_SIZE + VAE_SIZE - at_work)
        assert sum(plan.placed(sd, given, True).values()) == 2 * at_work + rest
        assert sum(plan.placed(sd, given, False).values()) == 4 * at_work + rest
    for half in (True, False):  # what trains is there in fp32
        assert sum(plan.placed(sd, config(), half).values()) == 4 * (
            UNET_SIZE + TEXT_SIZE + VAE_SIZE
        )


def test_what_is_likely_to_be_needed_for_sd_15():
    """By hand: one photograph and one class image at 512², bf16, pictures on the way."""
    sd, pixels = sd15(), 64 * 64
    state, gradients, copies = 12 * UNET_SIZE, 4 * UNET_SIZE, 2 * UNET_SIZE
    kept, kept_short = (pixels * size for size in plan.ACTIVATIONS["dreambooth"][True])
    left, left_short = plan.LEFT
    predicting = pixels * plan.PREDICTING[True]
    drawing = 4 * TEXT_SIZE + copies + 16 * predicting  # eight pictures, with guidance
    decoding = 4 * VAE_SIZE + pixels * plan.CODING
    assert 4 * TEXT_SIZE + 8 * predicting < decoding < drawing

    def peak(**changes):
        return plan.peak(sd, config(**changes), pixels, half=True)

    def about(state, work):
        return pytest.approx(state + 1.1 * work + 0.5e9, rel=1e-6)

    step = left * 2 * kept + gradients
    assert step > 2 * kept + copies
    assert peak() == about(state, step + drawing)
    assert peak(num_validation_images=0) == about(state, step)
    short = {"gradient_checkpointing": True}
    assert peak(**short) == about(state, left_short * 2 * kept_short + gradients + decoding)
    least = short | {"use_8bit_adam": True, "optimizer_in_backward": True}
    averages = plan.needed(sd, config(**least))["averages"]
    assert 2 * kept_short < decoding
    assert peak(**least) == about(4 * UNET_SIZE + averages, decoding)
    many = {"train_batch_size": 8, "prior_loss_weight": 0.0, "num_validation_images": 0}
    assert peak(**many) == about(state, 8 * kept + copies)
    # Checkpointed, only AdamW's kernel keeps copies, where it does one batch's update.
    many |= short | {"train_batch_size": 64}
    assert peak(**many) == about(state, 64 * kept_short + copies)
    assert peak(**many, gradient_accumulation_steps=2) == about(state, 64 * kept_short)


def test_the_pictures_before_training_are_counted():
    """By hand: all networks are there then."""
    sd, pixels = sd15(), 64 * 64
    all_fp32, copies = 4 * (UNET_SIZE + VAE_SIZE + TEXT_SIZE), 2 * UNET_SIZE
    predicting, coding = pixels * plan.PREDICTING[True], pixels * plan.CODING

    def before(**changes):
        return plan.phases(sd, config(**changes), pixels, half=True)["pictures before"]

    # Four class images at once by a CUDA graph, which keeps what it works in from the VAE.
    assert before() == (all_fp32, copies + 8 * predicting + coding)
    grids = {"sample_batch_size": 1}  # but eight pictures of the grids
    assert before(**grids) == (all_fp32, copies + 16 * predicting)
    many = {"sample_batch_size": 32, "num_validation_images": 0}
    assert before(**many) == (all_fp32, copies + 64 * predicting + coding)
    assert before(**many, gradient_checkpointing=True) == (all_fp32, 64 * predicting)
    only_encoding = {"prior_loss_weight": 0.0, "num_validation_images": 0}
    assert before(**only_encoding) == (all_fp32, coding)
    lora = {"method": "lora", "gradient_checkpointing": True}
    assert before(**lora) == (all_fp32 - copies, coding)
    most = 2 * (UNET_SIZE + TEXT_SIZE) + 4 * VAE_SIZE, 16 * predicting + 2 * 768
    assert before(method="textual_inversion") == most
    # It is what a run of many class images needs at most.
    larger = config(sample_batch_size=64, **lora)
    peak = plan.peak(sd, larger, pixels, half=True)
    assert peak == pytest.approx(all_fp32 - copies + 1.1 * 128 * predicting + 0.5e9)


@pytest.mark.parametrize("half", [True, False])
def test_explaining_the_first_step_is_counted(half):
    """By hand, without the averages, which are not there yet."""
    sd, pixels = sd15(), 64 * 64
    largest = 4 * 2560 * 1280 * 9  # the gradient of one weight; sums of two take six of them
    assert max(p.numel() for p in sd.unet.parameters()) * 4 == largest
    coding, predicting = pixels * plan.CODING, 2 * pixels * plan.PREDICTING[half]
    frozen = 2 if half else 4

    def explaining(**changes):
        return plan.phases(sd, config(explain=True, **changes), pixels, half)["explain"]

    for short in (True, False):
        mode = {"gradient_checkpointing": short}
        copies = 2 * UNET_SIZE * (half and not short)
        kept = 2 * pixels * plan.ACTIVATIONS["dreambooth"][half][short]
        looking = 4 * VAE_SIZE + kept + copies + 6 * largest
        film = 4 * (TEXT_SIZE + VAE_SIZE) + max(copies + predicting, coding)
        assert explaining(**mode) == (4 * UNET_SIZE, max(looking, film))
    film = 4 * (TEXT_SIZE + VAE_SIZE) + coding
    lora = explaining(method="lora", gradient_checkpointing=True)
    assert lora == (frozen * UNET_SIZE + 4 * 797_184, film)
    word = explaining(method="textual_inversion", gradient_checkpointing=True)
    assert word == (frozen * (UNET_SIZE + TEXT_SIZE) + 4 * 768, 4 * VAE_SIZE + coding)
    assert "explain" not in plan.phases(sd, config(), pixels, half)


def test_with_all_modes_a_card_of_8_gb_has_room_to_spare_and_with_lora_one_of_6():
    sd, least = sd15(), dict.fromkeys(fit.MODES[-1], True)
    for explain in (True, False):
        assert plan.peak(sd, config(**least, explain=explain), 64 * 64, half=True) < 7.0e9
        for method in ("lora", "textual_inversion"):
            given = config(method=method, gradient_checkpointing=True, explain=explain)
            assert plan.peak(sd, given, 64 * 64, half=True) < 4.1e9


def test_the_tables_are_what_is_counted(monkeypatch, capsys):
    """docs/memory.md is what its program prints, and the manual's tables are its columns."""
    root = Path(__file__).parents[2]
    runpy.run_path(str(root / "docs" / "memory.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert (root / "docs" / "memory.md").read_text("utf-8") == printed
    guide, sd = (root / "docs" / "guide.md").read_text("utf-8"), sd15()
    methods = ("dreambooth", "lora", "textual_inversion")

    def rows(head):
        lines = guide.split(head)[1].split("\n\n")[0].splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    def peaks(mode):
        given = [config(method=method, **dict.fromkeys(mode, True)) for method in methods]
        return [f"{plan.peak(sd, one, 64 * 64, half=True) / 1e9:.1f}" for one in given]

    for (name, *shown, graph), mode in zip(rows("| GB at most |")[2:], fit.MODES, strict=True):
        assert name == (", ".join(f"`{option}`" for option in mode) or "none of them")
        assert shown == peaks(mode)
        kept = plan.parts(sd, config(**dict.fromkeys(mode, True)), 64 * 64, half=True)["graph"]
        assert graph == ("yes" if kept else "no")
    assert f"All three options together need {shown[0]} GB" in guide
    assert f"stops at {peaks(fit.MODES[3])[0]} GB" in guide
    _, _, numbers, _, most = rows("| | all weights |")
    assert most[1:] == [f"{x} GB" for x in peaks(())]
    for shown, method in zip(numbers[1:], methods, strict=True):
        count = sum(p.numel() for p in plan.trainable(sd, config(method=method)))
        assert shown.removesuffix(" for each vector") == f"{count:,}"


def test_every_mode_needs_less_than_the_one_before_where_gradients_weigh_most():
    sd = sd15()
    sizes = [
        plan.peak(sd, config(**dict.fromkeys(mode, True)), 64 * 64, half=True)
        for mode in fit.MODES
        if mode != ("optimizer_in_backward", "gradient_checkpointing")  # for want of bitsandbytes
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_a_model_that_is_on_the_gpu_is_not_kept_there_twice():
    """On tensors without content; meta stands for the GPU."""
    with FakeTensorMode():
        networks = {"unet": torch.nn.Linear(20, 30, device="meta")}
        given = [weakref.ref(p.untyped_storage()) for p in networks["unet"].parameters()]
        originals = parameters.originals(networks)
        assert {p.device.type for p in originals.values()} == {"cpu"}
        parameters.make_trainable(networks, torch.device("meta"))
        assert {p.device.type for p in networks["unet"].parameters()} == {"meta"}
        assert [storage() for storage in given] == [None, None]


@pytest.mark.parametrize("place, index", [("cuda", 1), ("cuda:0", 0)])
def test_on_windows_a_process_keeps_to_what_was_free(place, index, monkeypatch):
    """Of 10 GB 4 are free and 1 is its own: half of the card, and less where less was set."""
    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (4, 10) if i == index else 1 / 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda i: 1)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, i: asked.append((share, i))
    )
    for before in (1.0, 0.2):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda i: before)  # noqa: B023
        for system in ("linux", "win32"):
            monkeypatch.setattr(sys, "platform", system)
            memory.keep_to_what_is_free(torch.device(place))
            memory.keep_to_what_is_free(torch.device("cpu"))
    assert asked == [(0.5, index), (0.2, index)]


def test_the_originals_of_a_model_on_the_cpu_are_what_was_given(monkeypatch, tmp_path):
    sd, kept = runs.model(), []
    given = [p.data_ptr() for p in sd.unet.parameters()]
    values = runs.flat(sd.unet.state_dict()).clone()
    finish = train.finish
    monkeypatch.setattr(train, "finish", lambda *a: kept.append(a[-1]) or finish(*a))
    train.train(runs.config(tmp_path / "out"), sd)
    [originals] = kept
    assert [p.data_ptr() for p in originals.values()] == given
    state = {key.removeprefix("unet."): p for key, p in originals.items()}
    assert torch.equal(runs.flat(state), values)


def test_where_a_given_model_lies_is_room_for_its_run(monkeypatch):
    sd, meta = sd15(), torch.device("meta")  # stands for a GPU
    whole = 4 * (UNET_SIZE + VAE_SIZE + TEXT_SIZE)
    monkeypatch.setattr(memory, "available", lambda device: 10)
    assert memory.room(sd, meta) == whole + 10
    assert memory.room(sd, torch.device("cuda")) == memory.room(sd, CPU) == 10
    assert memory.room(runs.model(), CPU) == 10  # on a CPU the weights as they came stay
    monkeypatch.setattr(memory, "available", lambda device: None)
    assert memory.room(sd, meta) is None


def test_a_model_that_is_there_is_not_counted_as_still_to_come(monkeypatch):
    sd, meta = sd15(), torch.device("meta")
    need = plan.peak(sd, config(), 64 * 64, half=True)
    there = 4 * (UNET_SIZE + VAE_SIZE + TEXT_SIZE)
    monkeypatch.setattr(memory, "available", lambda device: need - there)
    plain, line = fit.choose(sd, config(), 64 * 64, "bf16", meta, resumed=False)
    assert plain == config() and "switched on" not in line
    assert fit.choose(sd, config(), 64 * 64, "bf16", torch.device("cuda"), False)[0] != config()

    sure = 16 * UNET_SIZE - there
    monkeypatch.setattr(memory, "available", lambda device: sure)
    fit.require(sd, config(), meta, half=True)
    with pytest.raises(UserError, match="out of memory"):
        fit.require(sd, config(), torch.device("cuda"), half=True)
    monkeypatch.setattr(memory, "available", lambda device: sure - 1)
    with pytest.raises(UserError, match="out of memory"):
        fit.require(sd, config(), meta, half=True)


# ---- what is chosen ----------------------------------------------------------------------------


def chosen_for(monkeypatch, free, given=None, precision="bf16", resumed=False):
    monkeypatch.setattr(memory, "available", lambda device: free)
    given = given or config()
    chosen, line = fit.choose(sd15(), given, 64 * 64, precision, CPU, resumed)
    names = {name for name in fit.MODES[-1] if getattr(chosen, name)}
    unchanged = {name: getattr(given, name) for name in names}
    assert dataclasses.replace(chosen, **unchanged) == given
    return names, line


def test_the_first_mode_that_fits_is_chosen_and_said(eight_bit, monkeypatch):
    sd = sd15()
    for mode in fit.MODES:
        need = plan.peak(sd, config(**dict.fromkeys(mode, True)), 64 * 64, half=True)
        names, line = chosen_for(monkeypatch, need)
        fitting = [
            m
            for m in fit.MODES
            if plan.peak(sd, config(**dict.fromkeys(m, True)), 64 * 64, half=True) <= need
        ]
        assert names == set(fitting[0])
        assert f"{need / 1e9:.2f} GB are free" in line and "not be enough" not in line
        assert all(f"--{name}" in line for name in names)
    assert chosen_for(monkeypatch, 80e9)[0] == set()
    names, line = chosen_for(monkeypatch, 4e9)
    assert names == set(fit.MODES[-1]) and "may not be enough" in line


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lora_and_a_word_fit_a_card_of_6_gb_by_themselves(monkeypatch, precision):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    lora, word = config(method="lora"), config(method="textual_inversion")
    names, line = chosen_for(monkeypatch, 5.5e9, lora, precision)
    assert names == {"gradient_checkpointing"} and "not be enough" not in line
    assert chosen_for(monkeypatch, 5.5e9, word, precision)[0] == set()
    for given in (lora, word):
        names, line = chosen_for(monkeypatch, 4.0e9, given, precision)
        assert names == {"gradient_checkpointing"} and "not be enough" not in line
        assert chosen_for(monkeypatch, 7.5e9, given, precision)[0] == set()


def test_what_is_given_stays(eight_bit, monkeypatch):
    given = config(optimizer_in_backward=True)
    assert chosen_for(monkeypatch, 80e9, given)[0] == {"optimizer_in_backward"}
    assert chosen_for(monkeypatch, 4e9, given)[0] == set(fit.MODES[-1])


def test_what_cannot_be_is_not_chosen(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    without = {"gradient_checkpointing", "optimizer_in_backward"}
    assert chosen_for(monkeypatch, 4e9)[0] == without
    assert chosen_for(monkeypatch, 4e9, config(gradient_accumulation_steps=2))[0] == {
        "gradient_checkpointing"
    }
    names, line = chosen_for(monkeypatch, 4e9, precision="fp16")
    assert names == {"gradient_checkpointing"} and line.endswith("card can train is --method lora")
    assert "lora" not in chosen_for(monkeypatch, 4e9)[1]
    lora = config(method="lora")
    assert "lora" not in chosen_for(monkeypatch, 4e8, lora, precision="fp16")[1]


def test_a_run_that_goes_on_keeps_what_changes_its_results(eight_bit, monkeypatch, tmp_path):
    assert chosen_for(monkeypatch, 4e9, resumed=True)[0] == {"gradient_checkpointing"}
    given = runs.config(tmp_path / "out")
    before = State(3, {}, {"use_8bit_adam": True, "optimizer_in_backward": False})
    for free in (10**12, 1):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        fitted = start.fitted(given, runs.model(), 32, CPU, before)
        assert fitted.use_8bit_adam and not fitted.optimizer_in_backward
        assert fitted.gradient_checkpointing == (free == 1)


def test_on_a_cpu_nothing_is_chosen(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fit, "choose", None)  # would fail if it were called
    train.train(runs.config(tmp_path / "out"), runs.model())
    assert "memory:" not in capsys.readouterr().out


def test_the_modes_that_were_chosen_are_those_of_the_run(eight_bit, monkeypatch, tmp_path):
    """As on a GPU, with a device that only says that it is one."""

    def fitted(given, *_):
        return dataclasses.replace(given, use_8bit_adam=True, gradient_checkpointing=True)

    monkeypatch.setattr(start, "fitted", fitted)
    monkeypatch.setattr(memory, "available", lambda device: None)
    given = runs.config(tmp_path, mixed_precision="no")
    run = start.Run(given, runs.model(), torch.device("cuda"))
    assert run.config.use_8bit_adam and run.identity["use_8bit_adam"]
    assert not run.precision.keep_copies
    unfitted = dataclasses.replace(given, fit_memory=False)
    run = start.Run(unfitted, runs.model(), torch.device("cuda"))
    assert run.config == unfitted


# ---- what is counted ---------------------------------------------------------------------------


def test_with_checkpointing_no_16_bit_copies_of_the_weights_stay(tmp_path):
    layer = torch.nn.Linear(2, 2)
    for keep in (True, False):
        with Precision("bf16", CPU, keep_copies=keep).autocast():
            assert layer(torch.ones(2)).dtype == torch.bfloat16
            assert torch.is_autocast_cache_enabled() == keep
    for wanted in (True, False):
        settings = runs.config(tmp_path, gradient_checkpointing=wanted)
        assert start.Run(settings, runs.model(), CPU).precision.keep_copies != wanted


class Live(TorchDispatchMode):
    """Bytes of all tensors that are alive, and the most there have been."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = set()

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.seen:
                storage = x.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return result

    def free(self, key, size):
        self.now -= size
        self.seen.discard(key)


def counted(prepare):
    """The most bytes that are alive in a call on tensors without content, beside those before."""
    with FakeTensorMode(), Live() as live:
        call = prepare()
        before = live.most = live.now
        call()
        return live.most - before


def as_on_a_gpu(monkeypatch):
    """CUDA's autocast computes norms in fp32, a CPU's does not; and attention is always fused."""
    for name in ("group_norm", "layer_norm"):
        norm = getattr(F, name)
        monkeypatch.setattr(F, name, lambda x, *rest, norm=norm: norm(x.float(), *rest))
    monkeypatch.setattr(ops, "sdpa_kernel", lambda *backends: contextlib.nullcontext())


def step_at_most(given, samples, side, half, of_unet=SD1_UNET):
    """Bytes of a step's forward and backward pass through the UNet, beside its weights."""
    short = given.gradient_checkpointing
    with FakeTensorMode(), Live() as live:
        frozen = half and given.method != "dreambooth"
        torch.set_default_dtype(torch.bfloat16 if frozen else torch.float32)
        unet = UNet(of_unet).requires_grad_(given.method == "dreambooth")
        torch.set_default_dtype(torch.float32)
        trained = dict(unet.named_parameters())
        if given.method == "lora":
            adapters = lora.create(unet, given.rank, given.rank, given.lora_targets)
            lora.attach(unet, adapters)
        if given.method == "hypernetwork":
            made = hypernetwork.create(unet)
            hypernetwork.attach(unet, made)
        word = given.method == "textual_inversion"
        c = settle.blank(of_unet, samples, CPU)
        c.context.requires_grad_(word)
        x = torch.empty(samples, of_unet["in_channels"], side, side)
        inputs = x, torch.zeros(samples), c
        used = contextlib.nullcontext()
        if given.optimizer_in_backward:
            used = memory.each_gradient(trained, lambda name, gradient: None)
        live.most = before = live.now
        precision = Precision("bf16" if half else "no", CPU, keep_copies=not short)
        with used:
            with precision.autocast(), memory.checkpoint_gradients(unet, short):
                loss = unet(*inputs).float().square().mean()
            loss.backward()
        return live.most - before


STEPS = [
    *((method, 2, 64, {}) for method in plan.ACTIVATIONS),
    *(("dreambooth", samples, 64, {}) for samples in (1, 8)),
    ("dreambooth", 2, 96, {}),
    ("lora", 8, 64, {}),
    ("dreambooth", 2, 64, {"optimizer_in_backward": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("method, samples, side, modes", STEPS)
def test_the_plan_says_what_a_step_of_sd_15_takes(
    method, samples, side, modes, short, half, monkeypatch
):
    as_on_a_gpu(monkeypatch)
    for kind in (torch.nn.ModuleDict, hypernetwork.Hypernetwork):
        monkeypatch.setattr(kind, "to", lambda self, device: self)
    settings = {"prior_loss_weight": 0.0, "train_batch_size": samples, **modes}
    given = config(method=method, gradient_checkpointing=short, **settings)
    part = plan.parts(sd15(), given, side * side, half)
    assert step_at_most(given, samples, side, half) == pytest.approx(part["step"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("method", plan.DEEP_ACTIVATIONS)
def test_the_plan_says_what_a_step_of_sdxl_takes(method, short, half, monkeypatch):
    as_on_a_gpu(monkeypatch)
    for kind in (torch.nn.ModuleDict, hypernetwork.Hypernetwork):
        monkeypatch.setattr(kind, "to", lambda self, device: self)
    given = config(method=method, gradient_checkpointing=short, prior_loss_weight=0.0, rank=16)
    sdxl = models.model("SDXL", torch.device("meta"))
    part = plan.parts(sdxl, given, 128 * 128, half)
    found = step_at_most(given, 1, 128, half, sdxl.configs["unet"])
    assert found == pytest.approx(part["step"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("method", plan.WIDE_ACTIVATIONS)
def test_the_plan_says_what_a_step_of_the_upscaler_takes(method, samples, short, half, monkeypatch):
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(torch.nn.ModuleDict, "to", lambda self, device: self)
    settings = {"prior_loss_weight": 0.0, "train_batch_size": samples}
    given = config(method=method, gradient_checkpointing=short, **settings)
    x4 = models.model("x4", torch.device("meta"))
    part = plan.parts(x4, given, 128 * 128, half)
    found = step_at_most(given, samples, 128, half, x4.configs["unet"])
    assert found == pytest.approx(part["step"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
def test_the_table_says_what_drawing_takes(half, monkeypatch):
    as_on_a_gpu(monkeypatch)

    def decode():
        vae, z = VAE(SD_VAE).requires_grad_(False), torch.empty(1, 4, 64, 64)
        return lambda: vae.decode(z)

    def predict(samples):
        unet = UNet(SD1_UNET)
        inputs = (torch.empty(samples, 4, 64, 64), torch.zeros(samples))
        inputs += (torch.empty(samples, 77, 768),)

        @torch.no_grad()
        def forward():
            with Precision("bf16" if half else "no", CPU, keep_copies=False).autocast():
                return unet(*inputs)

        return forward

    def encode():
        vae, x = VAE(SD_VAE).requires_grad_(False), torch.empty(1, 3, 512, 512)
        return lambda: vae.encode(x)

    assert counted(decode) == pytest.approx(64 * 64 * plan.CODING, rel=0.02)
    assert counted(encode) < 64 * 64 * plan.CODING
    for samples in (8, 16):
        expected = samples * 64 * 64 * plan.PREDICTING[half]
        assert counted(functools.partial(predict, samples)) == pytest.approx(expected, rel=0.02)
