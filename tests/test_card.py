"""Runs on a pretend CUDA card: they end, capture, never wait within a step, and change no bit."""

import itertools
import sys
from pathlib import Path

import numpy as np
import on_card
import peers
import pytest
import runs
from PIL import Image

pytestmark = on_card.needs_card

WORD = {"method": "textual_inversion", "placeholder_token": "<x>", "initializer_token": "dog"}
WORD |= {"instance_prompt": "a <x>", "class_prompt": None, "learnable_property": "prompt"}
METHODS = {"dreambooth": {}, "lora": {"method": "lora"}, "word": WORD}
MODES = {
    "in full": {},
    "checkpointed": {"gradient_checkpointing": True},
    "in the backward": {"optimizer_in_backward": True, "gradient_checkpointing": True},
    "8-bit": {"use_8bit_adam": True},
}
# Every pair of method, precision and mode of the memory meets; fp16 cannot update in the backward.
MATRIX = [
    ("dreambooth", "bf16", "in full"),
    ("dreambooth", "fp16", "checkpointed"),
    ("dreambooth", "no", "in the backward"),
    ("dreambooth", "no", "8-bit"),
    ("lora", "fp16", "in full"),
    ("lora", "no", "checkpointed"),
    ("lora", "bf16", "in the backward"),
    ("lora", "bf16", "8-bit"),
    ("word", "no", "in full"),
    ("word", "bf16", "checkpointed"),
    ("word", "no", "in the backward"),
    ("word", "fp16", "8-bit"),
]
# One run of each: the first trains as a LoRA does, the second has text encoders by the pair, of
# whose weights some get no gradient, and the third has small pictures in its batches.
OTHERS = [(other, "bf16", "in full") for other in ("hypernetwork", "SDXL", "upscaler")]
STEPS = 5  # three as they are, then the recording is replayed twice


def settings(folder, **changes):
    quiet = {"kind": "half", "save_state": "none", "fit_memory": False, "device": "cuda"}
    quiet |= {"max_train_steps": STEPS, "learning_rate": 1e-4, "class_data_dir": f"{folder}-class"}
    return runs.settings(folder, **quiet | changes)


def of_matrix(folder, method, precision, mode):
    """Beside what the table asks for, each run has an option of its own."""
    own = {
        ("dreambooth", "bf16"): {"train_text_encoder": True, "save_state": "full"},
        ("dreambooth", "fp16"): {"lr_warmup_steps": 3},
        ("lora", "no"): {"snr_gamma": 5.0, "gradient_accumulation_steps": 2},
        ("SDXL", "bf16"): {"method": "lora", "train_text_encoder": True},
        ("upscaler", "bf16"): {"num_validation_images": 1, "validation_prompt": ("a dog",)},
        ("lora", "fp16"): {"train_text_encoder": True, "lora_targets": "all"},
    }
    kinds = {"SDXL": "sdxl", "upscaler": "x4"}
    other = {"kind": kinds[method]} if method in kinds else {"method": method}
    trained = METHODS.get(method, other)
    changes = trained | MODES[mode] | own.get((method, precision), {})
    return settings(
        folder / "-".join((method, precision, mode)), mixed_precision=precision, **changes
    )


def within_steps(waits):
    """Where the host waited in an update or a sampler's step, but for recording it."""
    steps = {"train.one_update.update", "graphs.Captured.__call__"}
    steps.add("pipeline.StableDiffusion.predict")
    return [
        where[0]
        for _, where, _ in waits
        if where[0] != "graphs.record_graph" and steps & set(where)
    ]


def test_every_pair_of_settings_meets():
    names = METHODS, ("no", "bf16", "fp16"), MODES
    for a, b in itertools.combinations(range(3), 2):
        wanted = set(itertools.product(names[a], names[b])) - {("fp16", "in the backward")}
        assert {(row[a], row[b]) for row in MATRIX} == wanted


@pytest.mark.parametrize("half", [0, 1])
def test_captured_and_eager_training_are_the_same(half, tmp_path):
    """The captured ones keep 16-bit copies of weights, and have gradients in 16 bits."""
    rows = MATRIX[half::2] + OTHERS * half
    pairs = on_card.ask("both", runs=[of_matrix(tmp_path, *row) for row in rows])
    for row, (captured, eager) in zip(rows, pairs, strict=True):
        assert "error" not in captured, (row, captured)
        assert len(captured["losses"]) == STEPS
        assert captured["files"] == eager["files"], row
        graphs = 0 if "8-bit" in row else 1
        assert (captured["captures"], captured["replays"]) == (graphs, graphs * (STEPS - 3)), row
        assert (eager["captures"], eager["replays"]) == (0, 0)
        for found in (captured, eager):
            told = ["eight_bit.AdamW8bit.fetch"] * ("8-bit" in row)
            assert within_steps(found["waits"]) == told, row


def test_a_resumed_run_a_bad_loss_and_explain(tmp_path):
    same = {"mixed_precision": "bf16", "save_state": "full"}
    halves = settings(tmp_path / "halves", **same, class_data_dir=str(tmp_path / "class"))
    whole = halves | {"output_dir": str(tmp_path / "whole")}
    again = halves | {"resume_from_checkpoint": "latest"}
    bad = settings(tmp_path / "bad", mixed_precision="no", learning_rate=1e30)
    looked = settings(
        tmp_path / "explained", method="lora", explain=True, validation_inference_steps=5
    )
    calls = [whole, halves | {"max_train_steps": 3}, again, bad, looked]
    whole, _, again, bad, looked = on_card.ask("run_each", runs=calls)
    assert whole["losses"] == again["losses"] and len(whole["losses"]) == STEPS
    weights = [name for name in whole["files"] if name.endswith(".safetensors")]
    assert weights and all(whole["files"][name] == again["files"][name] for name in weights)
    assert bad["error"].startswith("step 2: ") and "is not finite" in bad["error"]
    assert len(bad["losses"]) == 1
    assert "error" not in looked and "explain.html" in looked["files"]
    assert looked["captures"] == 3  # the film before, the step, the film after
    assert not within_steps(looked["waits"])


def test_what_makes_room_for_sdxl_changes_nothing_but_rounding(tmp_path):
    """Text encoders that encode on the CPU, where attention is another kernel, and a UNet that
    waits there for the VAE."""
    changes = METHODS["lora"] | MODES["8-bit"] | {"kind": "sdxl", "num_validation_images": 1}
    changes |= {"mixed_precision": "no", "max_train_steps": 1}
    folders = [tmp_path / name / "out" for name in ("plain", "short")]
    plain, short = on_card.ask(
        "where_room_is_short", runs=[settings(folder, **changes) for folder in folders]
    )
    assert "error" not in plain and "error" not in short, (plain, short)
    losses = [[float(x) for x in found["losses"][0].split(",")] for found in (plain, short)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    shown = [np.asarray(Image.open(f / "samples" / "step-00001.png"), int) for f in folders]
    assert np.abs(shown[0] - shown[1]).max() <= 1
    # For class images, for encoding, for the grids before and after.
    assert (plain["away"], short["away"]) == (0, 4)


def test_samplers_adapters_streams_and_memory():
    found = on_card.ask("several", model=str(peers.model("half")[0]))
    for name, sampler in found["samplers"].items():
        assert sampler["same"] and sampler["captures"] == 1, name
        assert sampler["waits"][0] == sampler["waits"][1], name  # none within a step
    # Every picture of a LoRA in training has its own text.
    adapters = found["adapters"]
    assert adapters["same"] == [True] * 3
    assert (adapters["captures"], adapters["replays"]) == (1, 15)
    # A captured function runs on one side stream; its graphs' results are given away.
    streams = found["streams"]
    assert streams["results"] == [float(i + 1) for i in range(8)]
    side, *others = streams["streams"]
    assert len(others) == 3 and set(others) == {side} and side != 0 == streams["after"]
    # The graphs of a UNet share a pool and a stream.
    assert len(streams["pools"]) == 2 and len({tuple(made) for made in streams["pools"]}) == 1
    # torch's advice on capturable does not reach the user.
    first, told = found["advice"]
    assert first == [] and "you should set capturable=False" in told[0]
    # What is free: all; but 4,000; with what PyTorch keeps of it; with 9,000 of another process;
    # half of 20,000.
    assert found["memory"] == [20_000, 16_000, 20_000, 11_000, 10_000]
    share, refusal = found["cap"]
    assert share == 0.1 and refusal.startswith("CUDA out of memory.")


def test_the_second_card_trains_as_the_first(tmp_path):
    pictures = {"num_validation_images": 1, "validation_inference_steps": 5}
    first = settings(tmp_path / "first", mixed_precision="bf16", **pictures)
    second = first | {"output_dir": str(tmp_path / "second"), "device": "cuda:1"}
    found = on_card.ask("on_two_cards", count=2, runs=[first, second])
    devices, (first, second) = found["devices"], found["runs"]
    assert devices["cuda:1"] == ["cuda:1", 1]
    assert devices["cuda"] == devices["auto"] == ["cuda:1", 1]  # the current one
    assert devices["cuda:0"] == ["cuda:0", 0] and devices["cpu"][0] == "cpu"
    assert devices["cuda:2"] == "there is no device cuda:2 here: leave --device out"
    assert devices["rank 0"] == ["cuda:0", 0] and devices["rank 1"] == ["cuda:1", 1]
    assert devices["rank 2"].startswith("GPUs here: 2, for one rank each")
    assert devices["ranks on one"].startswith("several ranks want --device cuda")
    assert devices["ranks on the CPU"] == "cpu"
    assert first["files"] == second["files"] and len(set(second["losses"])) == STEPS
    assert second["captures"] == 3 and "device cuda:1" in second["said"]


def test_a_step_that_cannot_be_recorded_for_want_of_memory_runs_as_it_is(tmp_path):
    found = on_card.ask("too_little_memory", settings=settings(tmp_path / "out", max_train_steps=4))
    for name in ("ended", "not ended"):
        assert found[name]["said"].count("no memory left to record a CUDA graph") == 1
        assert found[name]["files"] == found["eager"]["files"]
        assert found[name]["replays"] == 0
    assert found["none"]["error"].startswith("out of memory. Weights, gradients and optimizer")


def test_each_card_trains_in_what_it_can_and_holds():
    found = on_card.ask("fitted")
    precisions = {name: precision for name, (precision, *_) in found.items()}
    assert precisions == {
        "Pretend H100": "bf16",
        "Pretend T4": "fp16",
        "Pretend RTX 3060": "bf16",
        "Pretend RTX 3070": "bf16",
    }
    eight_bit, short = ["use_8bit_adam"], ["gradient_checkpointing"]
    modes = {name: set(on) for name, (_, on, _) in found.items()}
    assert modes["Pretend H100"] == set()
    assert modes["Pretend T4"] == modes["Pretend RTX 3060"] == {*eight_bit}, found
    assert modes["Pretend RTX 3070"] == {*eight_bit, *short, "optimizer_in_backward"}


def test_triton_s_kernels_within_a_captured_step():
    """In the interpreter: the same bits as launched one by one, and PyTorch's to rounding."""
    found = on_card.ask("kernels", interpreted=True)
    assert found["replayed"] == found["eager"]
    assert (found["replayed launches"], found["torch launches"]) == (0, 0)  # Python launches none
    assert found["eager launches"] == 18
    for row, theirs in zip(found["eager"], found["torch"], strict=True):
        assert row == pytest.approx(theirs, rel=0.01)


def test_adamw_s_kernels_within_a_captured_step_and_from_a_state_on():
    """In the interpreter: the same bits in all three ways, and PyTorch's to rounding."""
    found = on_card.ask("updates", interpreted=True)
    replayed, theirs = found["replayed"], found["torch"]
    assert found["eager"]["losses"] == replayed["losses"][:7]
    assert found["resumed"]["losses"] == replayed["losses"][15:]
    assert found["resumed"]["weights"] == replayed["weights"] != theirs["weights"]
    for row, expected in zip(replayed["losses"], theirs["losses"], strict=True):
        assert row == pytest.approx(expected, rel=2**-11)  # fp16's rounding
    assert replayed["weights"] == pytest.approx(theirs["weights"], rel=1e-4, abs=1e-6)


def test_programs_draw_and_measure_with_graphs(tmp_path):
    model, photographs = str(peers.model("half")[0]), str(runs.photographs())
    sys.path.append(str(Path(__file__).parent / "evaluate"))
    from small_judges import clip_folder, dino_folder

    judges = ["--clip", str(clip_folder()), "--dino", str(dino_folder())]
    evaluated = ["--real", photographs, "--generated", model, "--prompt", "a sks dog", *judges]
    evaluated += ["--class_prompt", "a dog", "--images", "2", "--class_images", "1"]
    toybox = ["--max_train_steps", str(STEPS), "--num_class_images", "4"]
    calls = [
        ["minibooth.sample", "--model", model, "--prompt", "a dog", "--num_images", "1"],
        ["minibooth.evaluate", *evaluated],
        ["minibooth.train", *toybox, "--num_validation_images", "0"],
    ]
    places = [["--output_dir", str(tmp_path / call[0])] for call in calls]
    steps = [["--steps", "5"], ["--steps", "5"], ["--class_steps", "5"]]
    calls = [call + place + step for call, place, step in zip(calls, places, steps, strict=True)]
    drawn, measured, trained = on_card.ask("programs", calls=calls)
    for found in (drawn, measured, trained):
        assert found["status"] == 0 and not within_steps(found["waits"]), found["last error"]
    assert (drawn["captures"], measured["captures"]) == (1, 1)
    assert trained["captures"] == 3  # class images, the step, scores
    assert "subject fidelity" in trained["said"]


# ---- slow: all of it ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_every_mode_captured_and_eager(method, precision, tmp_path):
    modes = [mode for mode in MODES if (precision, mode) != ("fp16", "in the backward")]
    for mode in modes:
        same = METHODS[method] | MODES[mode] | {"mixed_precision": precision, "explain": True}
        one = settings(tmp_path / mode, **same, num_validation_images=2, validation_steps=3)
        [(captured, eager)] = on_card.ask("both", runs=[one])
        assert captured["files"] == eager["files"] and len(captured["losses"]) == STEPS
        told = ["eight_bit.AdamW8bit.fetch"] * (mode == "8-bit")
        assert within_steps(captured["waits"]) == told
