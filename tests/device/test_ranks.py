"""n ranks are one rank with n times the batch: same draws, pictures and files, and same weights."""

import random
import re
import signal
import time
from dataclasses import replace

import child
import pytest
import runs
import torch
from safetensors.torch import load_file

from minibooth import UserError, train
from minibooth.bench import models
from minibooth.common.trees import each
from minibooth.device import ranks
from minibooth.training import data, fit, plan, report
from minibooth.training.loss import Loss
from minibooth.training.settings import TrainConfig

# ---- several processes --------------------------------------------------------------------------


def start(arguments, log, count=2, moments=(None, None)):
    """The training program on several ranks, as torchrun starts it: the store where they meet, and
    their processes."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port)}
    place |= {"WORLD_SIZE": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return store, [
        child.start(
            arguments,
            moments[i],
            log.with_name(f"{log.name}.{i}"),
            environment=place | {"RANK": str(i), "LOCAL_RANK": str(i)},
        )
        for i in range(count)
    ]


def settings(folder, **changes):
    """Of a run of 20 steps on latents of 8²."""
    small = {"resolution": 16, "max_train_steps": 20, "num_class_images": 5}
    small |= {"sample_batch_size": 2, "class_data_dir": str(folder / "class_images")}
    return runs.settings(folder, **small | changes)


def on_two(folder, moments=(None, None), **changes):
    """A run on two ranks: exit statuses, and what each of them said."""
    log = folder.with_name(f"{folder.name}.log")
    _, processes = start(runs.arguments(settings(folder, **changes)), log, moments=moments)
    for process in processes:
        process.join(120)
    said = [log.with_name(f"{log.name}.{i}").read_text() for i in range(2)]
    # Latents of 8² are smaller than the model's, of which rank 0 warns before any mistake is found.
    said = [re.sub(r"(?m)^.*warning: --resolution .*\n", "", text) for text in said]
    return [process.exitcode for process in processes], said


def on_one(folder, **changes):
    train.train(train.TrainConfig(**settings(folder, **changes)))


NETWORKS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def assert_equal_training(one, two, trained=("unet",), bits=1e-3, kind="half"):
    """Weights moved alike, up to that share of the way."""
    for name, file in NETWORKS.items():
        before = load_file(runs.Path(settings(one, kind=kind)["model"]) / file)
        a, b = (runs.flat(load_file(folder / file)) for folder in (one, two))
        moved, start = a - runs.flat(before), runs.flat(before)
        if name in trained:
            assert moved.norm() > 1e-3 * start.norm()
            assert (a - b).norm() < bits * moved.norm(), (a - b).norm() / moved.norm()
        else:
            assert torch.equal(a, b) and not moved.any()
    losses = [report.read_losses(folder / "loss.csv") for folder in (one, two)]
    for a, b in zip(*losses, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)


CASES = {
    "λ = 1, text encoder": {"train_text_encoder": True},
    "λ = 0, accumulation": {
        "prior_loss_weight": 0.0,
        "gradient_accumulation_steps": 2,
        "num_validation_images": 3,
        "explain": True,
    },
}


def add_halves(monkeypatch):
    """From now on one rank adds as two do: a batch's losses are the means of its halves'."""
    loss_of = Loss.__call__

    def mean(self, drawn):
        a, b = (loss_of(self, each(lambda x, i=i: x.chunk(2)[i], drawn)) for i in (0, 1))
        names = ("loss", "loss_instance", "loss_prior")
        return replace(a, **{name: (getattr(a, name) + getattr(b, name)) / 2 for name in names})

    monkeypatch.setattr(Loss, "__call__", mean)


def same_files(one, two, pattern):
    found = [sorted(folder.glob(pattern)) for folder in (one, two)]
    assert found[0] and [f.name for f in found[0]] == [f.name for f in found[1]]
    return all(a.read_bytes() == b.read_bytes() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_with_twice_the_batch(case, tmp_path, monkeypatch):
    """Exactly, where that one adds in the same order. In another, AdamW makes fp32's rounding
    larger: of a small gradient it takes the sign."""
    one, two, halved = tmp_path / "one", tmp_path / "two", tmp_path / "halved"
    changes = CASES[case]
    status, said = on_two(two, **changes)
    assert status == [0, 0], said
    assert said[1] == "" and "2 ranks: 2 × 1 photographs" in said[0]
    on_one(one, train_batch_size=2, **changes)
    trained = ("unet", "text_encoder") if "train_text_encoder" in changes else ("unet",)
    assert_equal_training(one, two, trained)
    assert runs.files(one) == runs.files(two)
    # Three batches of class images; nine pictures, in a batch of eight and one of one.
    assert same_files(one, two, "class_images/*.png" if trained[1:] else "samples/step-00000.png")
    add_halves(monkeypatch)
    on_one(halved, train_batch_size=2, **changes | {"explain": False, "num_validation_images": 0})
    assert_equal_training(halved, two, trained, bits=1e-5)


def test_a_run_goes_on_with_any_number_of_ranks(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "out"
    on_one(whole, max_train_steps=6, train_batch_size=2)
    again = {"resume_from_checkpoint": "latest"}
    on_one(folder, max_train_steps=2, train_batch_size=2)
    status, said = on_two(folder, max_train_steps=4, **again)
    assert status == [0, 0] and "resumed" in said[0], said
    with pytest.raises(UserError, match="train_batch_size was 2 and is 1"):
        on_one(folder, max_train_steps=6, train_batch_size=1, **again)
    status, said = on_two(folder, max_train_steps=6, train_batch_size=2, **again)
    assert status == [2, 2] and min(said) == ""
    assert "train_batch_size was 2 and is 4 over all 2 ranks" in max(said)
    on_one(folder, max_train_steps=6, train_batch_size=2, **again)
    assert_equal_training(whole, folder)


METHODS = {
    "lora": (
        {"method": "lora", "rank": 2, "train_text_encoder": True},
        "pytorch_lora_weights.safetensors",
    ),
    "textual_inversion": (
        {
            "method": "textual_inversion",
            "placeholder_token": "<sks>",
            "initializer_token": "dog",
            "instance_prompt": "a <sks>",
        },
        "learned_embeds.safetensors",
    ),
}


def test_an_upscaler_is_trained_alike(tmp_path):
    """Its class images, and what its base model draws for the grid, are drawn by both."""
    changes = {"kind": "x4", "resolution": 32, "max_train_steps": 3, "num_validation_images": 1}
    one, two = tmp_path / "one", tmp_path / "two"
    status, said = on_two(two, **changes)
    assert status == [0, 0], said
    on_one(one, train_batch_size=2, **changes)
    assert_equal_training(one, two, kind="x4")
    assert same_files(one, two, "class_images/*.png")
    assert same_files(one, two, "samples/step-00000.png")


@pytest.mark.parametrize("method", METHODS)
def test_adapters_and_words_are_trained_alike(method, tmp_path):
    changes, file = METHODS[method]
    changes |= {"max_train_steps": 5, "snr_gamma": 5.0}
    status, said = on_two(tmp_path / "two", **changes)
    assert status == [0, 0], said
    on_one(tmp_path / "one", train_batch_size=2, **changes)
    on_one(tmp_path / "start", train_batch_size=2, **changes | {"learning_rate": 1e-30})
    a, b, start = (runs.flat(load_file(tmp_path / x / file)) for x in ("one", "two", "start"))
    assert (a - b).norm() < 1e-3 * (a - start).norm()


# ---- draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
def test_ranks_draw_the_parts_of_one_batch(count):
    g = torch.Generator().manual_seed(0)
    moments = torch.randn(2, 7, 4, 8, 8, generator=g)
    photo, sizes = torch.tensor([0, 0, 0, 1, 2, 2, 3]), torch.arange(42).view(7, 6)
    small = torch.randn(7, 3, 8, 8, generator=g)
    latents = data.Latents(moments[0], moments[1].abs(), photo, sizes, small)
    prompts = (torch.arange(12).view(4, 3), torch.arange(4)[:, None])
    device, shown = torch.device("cpu"), torch.tensor([0, 1, 0, 1])
    whole = data.Batches(latents, latents, 1000, 3, 4, device, prompts, (shown, shown))
    whole = replace(whole, levels=(0, 20))
    parts = [replace(whole, share=(i, count)) for i in range(count)]
    for n in range(5):
        drawn, of_ranks = whole.draw(n), [part.draw(n) for part in parts]
        for i, term in enumerate(drawn.terms):
            for name, x in vars(term).items():
                parts_of_it = [getattr(of_rank.terms[i], name) for of_rank in of_ranks]
                assert torch.equal(torch.cat(parts_of_it), x)


# ---- what goes wrong ----------------------------------------------------------------------------


def last_line(said):
    return said.replace("\r", "\n").strip().splitlines()[-1]


def test_a_mistake_is_said_once(tmp_path):
    status, said = on_two(tmp_path / "out", instance_data_dir=str(tmp_path / "none"))
    assert status == [2, 2] and min(said) == ""
    assert re.fullmatch(r"minibooth.train: \S+ does not exist: .*", max(said).strip())
    status, said = on_two(tmp_path / "out", optimizer_in_backward=True)
    assert status == [2, 2] and min(said) == ""
    assert "--optimizer_in_backward updates a weight before" in max(said)


def test_too_little_memory_on_one_rank_is_said_by_that_one(tmp_path):
    status, said = on_two(tmp_path / "out", moments=(None, "full 3"), max_train_steps=4)
    assert status == [2, 2]
    assert "out of memory. Weights" in said[1] and said[1].count("\n") == 1
    assert "memory" not in last_line(said[0]) and "rank" not in last_line(said[0])


def test_a_rank_that_is_asked_to_stop_stops_all_after_the_same_step(tmp_path):
    changes = {"max_train_steps": 4, "prior_loss_weight": 0.0}
    status, said = on_two(tmp_path / "out", moments=(None, "SIGTERM step 2"), **changes)
    assert status == [143, 143]
    [line] = [line for one in said for line in one.splitlines() if "keeps the state" in line]
    assert "after step 2: the same command with --resume_from_checkpoint latest" in line
    assert (tmp_path / "out" / "state" / "step-00000002").is_dir()


def test_a_rank_that_dies_ends_the_run_and_what_is_saved_is_whole(tmp_path):
    changes = {"max_train_steps": 6, "checkpointing_steps": 2, "prior_loss_weight": 0.0}
    changes["resume_from_checkpoint"] = "latest"
    for dies, step in ((1, 3), (0, 5)):
        moments = [None, None]
        moments[dies] = f"step {step}"
        status, said = on_two(tmp_path / "out", moments=moments, **changes)
        assert status[dies] == -signal.SIGKILL and status[1 - dies] == 2
        assert "another rank of this run is gone" in last_line(said[1 - dies])
        assert (tmp_path / "out" / "state" / f"step-{step - 1:08d}").is_dir()
    status, said = on_two(tmp_path / "out", **changes)
    assert status == [0, 0] and "at step 4" in said[0], said
    on_two(tmp_path / "whole", **changes)
    name = NETWORKS["unet"]
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_either_rank_killed_at_random_moments_leaves_whole_files_and_equal_weights(tmp_path):
    """Twenty times, in runs that go on until they are done."""
    changes = {"max_train_steps": 12, "checkpointing_steps": 2, "num_validation_images": 1}
    changes |= {"train_text_encoder": True, "resume_from_checkpoint": "latest"}
    dice, kills, runs_done, stages = random.Random(0), [0, 0], 0, set()
    child.start(["--help"], None, tmp_path / "help").join()  # starting the server takes longest
    began = time.monotonic()
    status, said = on_two(tmp_path / "whole", **changes)
    duration = time.monotonic() - began
    assert status == [0, 0], said
    whole = files_of(tmp_path / "whole")
    while sum(kills) < 20:
        folder = tmp_path / f"killed-{runs_done}"
        arguments = runs.arguments(settings(folder, **changes))
        while True:
            store, processes = start(arguments, tmp_path / "log")
            which = dice.randrange(2)
            processes[which].join(dice.uniform(0.1, 0.9) * duration)
            if processes[which].exitcode is None:
                processes[which].kill()
                kills[which] += 1
                processes[1 - which].join(5)
                processes[1 - which].kill()  # as torchrun does: it may still wait for the other
            for process in processes:
                process.join(120)
            codes = [process.exitcode for process in processes]
            if codes == [0, 0]:
                break
            assert codes[which] == -signal.SIGKILL, codes
            assert codes[1 - which] in (0, 2, -signal.SIGKILL), codes
            if codes[1 - which] == 2:
                said = (tmp_path / f"log.{1 - which}").read_text()
                assert "another rank of this run is gone" in last_line(said), said
            stages.add(len(list(folder.glob("checkpoint-*"))))
            del store
        assert files_of(folder) == whole
        runs_done += 1
    print(f"{kills} kills in {runs_done} runs, after {sorted(stages)} snapshots")
    assert min(kills) > 0


def files_of(folder):
    """All files of a run and their bytes, but for where it was."""
    name = str(folder).encode()
    found = {f: (folder / f).read_bytes().replace(name, b"") for f in runs.files(folder)}
    text = found.pop("config.json")
    return found | {"config.json": text.replace(b"/class_images", b"")}


def test_several_ranks_keep_gradients_all_the_time_and_no_graph(monkeypatch):
    sd, config = models.model("SD 1.5", torch.device("meta")), TrainConfig()
    one = plan.parts(sd, config, 64 * 64, half=True)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    two = plan.parts(sd, config, 64 * 64, half=True)
    assert two["step"] == two["activations"] + two["gradients"] > one["step"]
    assert two["graph"] == two["gradients"] < one["graph"]
    assert plan.phases(sd, config, 64 * 64, half=True)["training"][1] == max(
        two["step"], two["gradients"] + two["pictures"]
    )
    assert not fit.possible(fit.MODES[-1], config, "bf16", resumed=False)
