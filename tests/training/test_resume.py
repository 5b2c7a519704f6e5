"""A run that was killed at any moment and resumed ends as if nothing had happened."""

import json
import random
import shutil
import signal
import time

import child
import pytest
import runs
import torch

from minibooth import UserError, train
from minibooth.training import class_images, resume

SETTINGS = {
    "max_train_steps": 5,
    "checkpointing_steps": 2,
    "validation_steps": 3,
    "num_validation_images": 1,
    "validation_prompt": "sks",
    "validation_inference_steps": 1,
    "class_data_dir": None,
    "class_steps": 1,
    "sample_batch_size": 2,
    "resume_from_checkpoint": "latest",
}
VARIANTS = {
    "text encoder frozen": {},
    "text encoder trained": {
        "train_text_encoder": True,
        "gradient_accumulation_steps": 2,
        "lr_warmup_steps": 2,
        "lr_scheduler": "cosine",
    },
}


def uninterrupted(folder, **changes):
    options = SETTINGS | changes
    options["validation_prompt"] = ("sks",)
    train.train(runs.config(folder, **options))
    return folder


def kill_or_finish(folder, moment=None, **changes):
    """Start the program, with the same command each time; its exit code and what it said."""
    arguments = runs.arguments(runs.settings(folder, **SETTINGS | changes))
    log = folder.parent / f"{folder.name}.log"
    process = child.start(arguments, moment, log)
    process.join()
    return process.exitcode, log.read_text()


def assert_same(resumed, whole):
    """The same files, with the same bytes but for the name of the folder."""
    assert runs.files(resumed) == runs.files(whole)
    for name in sorted(runs.files(whole)):
        ours = (resumed / name).read_bytes().replace(str(resumed).encode(), b"")
        assert ours == (whole / name).read_bytes().replace(str(whole).encode(), b""), name


MOMENTS = [
    "before config.json",
    "before 00001.png",  # the second class image
    "encode 1",
    "before step-00000.png",
    "step 1",
    "before state.safetensors",
    "after step-00000002",  # the state is there, its snapshot is not
    "before checkpoint-2.tmp/vae/config.json",
    "step 4",
    "remove step-00000002",  # two states, the older half removed
    "after step-00000005",
    "before before_after.png",
    "before text_encoder/model.safetensors",
    "before model_index.json",
    "before README.md",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_at_every_kind_of_moment_ends_bit_identical(variant, tmp_path):
    whole = uninterrupted(tmp_path / "whole", **VARIANTS[variant])
    folder = tmp_path / "killed"
    moments = MOMENTS if variant == "text encoder frozen" else MOMENTS[5:10:2]
    for moment in moments:
        code, said = kill_or_finish(folder, moment, **VARIANTS[variant])
        assert code == -signal.SIGKILL, f"{moment}: {said}"
    code, said = kill_or_finish(folder, **VARIANTS[variant])
    assert code == 0, said
    assert_same(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_at_random_ends_bit_identical(variant, seed, tmp_path):
    options = VARIANTS[variant] | {"max_train_steps": 12}
    child.start(["--help"], None, tmp_path / "help.log").join()  # starting the server takes longest
    started = time.monotonic()
    code, said = kill_or_finish(tmp_path / "whole", **options)
    duration = time.monotonic() - started
    assert code == 0, said
    dice, folder, kills = random.Random(seed), tmp_path / "killed", 0
    arguments = runs.arguments(runs.settings(folder, **SETTINGS | options))
    for _ in range(100):
        process = child.start(arguments, None, tmp_path / "killed.log")
        process.join(dice.uniform(0.2, 0.9) * duration)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        elif process.exitcode == 0:
            break
    assert process.exitcode == 0, (tmp_path / "killed.log").read_text()
    assert kills
    assert_same(folder, tmp_path / "whole")


# ---- what may change on resume -----------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A finished run of 3 steps with a state, to be copied."""
    folder = tmp_path_factory.mktemp("stopped") / "out"
    train.train(runs.config(folder, checkpointing_steps=2, num_class_images=2))
    return folder


@pytest.fixture
def again(stopped, tmp_path):
    """Resume a copy of it with other settings."""
    folder = tmp_path / "out"
    shutil.copytree(stopped, folder)

    def resumed(**changes):
        options = {"checkpointing_steps": 2, "resume_from_checkpoint": "latest"}
        options |= {"num_class_images": 2}
        config = runs.config(folder, **options | changes)
        return folder, lambda: train.train(config)

    return resumed


def weights(sd):
    return runs.flat(sd.unet.state_dict())


def test_more_steps_with_other_samples_and_saves_equal_a_longer_run(again, tmp_path):
    folder, run = again(
        max_train_steps=5,
        checkpointing_steps=4,
        num_validation_images=1,
        validation_steps=1,
        validation_prompt=("dog",),
        gradient_checkpointing=True,
        sample_batch_size=1,
    )
    longer = train.train(runs.config(tmp_path / "longer", max_train_steps=5, num_class_images=2))
    assert torch.equal(weights(run()), weights(longer))
    assert (folder / "loss.csv").read_text() == (tmp_path / "longer" / "loss.csv").read_text()
    assert {f.name for f in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert [f.name for f in (folder / "state").iterdir()] == ["step-00000005"]


def test_resuming_a_finished_run_writes_the_same_model_again(again, stopped):
    folder, run = again()
    run()
    for name in ("unet/diffusion_pytorch_model.safetensors", "loss.csv", "README.md"):
        assert (folder / name).read_bytes() == (stopped / name).read_bytes()


def damage(path):
    path.write_bytes(path.read_bytes()[:-100])


def refused(folder, run):
    """The message of a run that must not start; nothing of the folder may change."""
    before = {name: (folder / name).read_bytes() for name in runs.files(folder)}
    with pytest.raises(UserError) as error:
        run()
    assert {name: (folder / name).read_bytes() for name in runs.files(folder)} == before
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"kind": "sd2"}, "the model changed"),
        ({"instance_prompt": "a sks cat"}, "instance_prompt was 'a sks dog' and is 'a sks cat'"),
        ({"class_prompt": "a cat"}, "class_prompt was 'a dog' and is 'a cat'"),
        ({"resolution": 32}, "resolution was 16 and is 32"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"prior_loss_weight": 0.5}, "prior_loss_weight was 1.0 and is 0.5"),
        ({"prior_loss_weight": 0.0}, "prior_loss_weight was 1.0 and is 0.0"),
        ({"num_class_images": 3}, "num_class_images was 2 and is 3"),
        ({"class_steps": 1}, "class_steps was 2 and is 1"),
        ({"center_crop": True}, "the photographs changed"),
        ({"learning_rate": 1e-4}, "learning_rate was 0.001 and is 0.0001"),
        ({"train_text_encoder": True}, "train_text_encoder was False and is True"),
        ({"train_batch_size": 2}, "train_batch_size was 1 and is 2"),
        ({"mixed_precision": "bf16"}, "mixed_precision was 'no' and is 'bf16'"),
        ({"max_train_steps": 2}, "already at step 3"),
        ({"resume_from_checkpoint": None}, "already holds a run"),
    ],
)
def test_another_run_is_refused_before_anything_is_touched(again, changes, named, monkeypatch):
    monkeypatch.setattr(class_images, "ensure", None)  # nothing is drawn for it either
    assert named in refused(*again(**changes))


def test_other_photographs_are_refused(again, tmp_path):
    shutil.copytree(runs.photographs(), tmp_path / "photographs")
    (tmp_path / "photographs" / "2.png").unlink()
    assert "the photographs changed" in refused(
        *again(instance_data_dir=str(tmp_path / "photographs"))
    )


def test_other_class_images_are_refused(again, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(runs.photographs() / "0.png", own)
    folder, run = again(class_data_dir=str(own))
    with pytest.raises(UserError, match="the class images changed"):
        run()
    assert [f.name for f in (folder / "state").iterdir()] == ["step-00000003"]


def test_a_finished_run_without_its_state_is_refused(again):
    folder, run = again()
    shutil.rmtree(folder / "state")
    assert "no state to resume from" in refused(folder, run)
    (folder / "model_index.json").unlink()  # not finished, but its snapshot is worth keeping
    message = refused(folder, run)
    assert "no state to resume from" in message and "checkpoint-2" in message
    _, fresh = again(resume_from_checkpoint=None)
    assert "already holds a run" in refused(folder, fresh)


# ---- damaged states ----------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["state.safetensors", "identity.json", "missing"])
def test_of_a_damaged_state_the_older_is_taken_and_the_damaged_replaced(again, file, tmp_path):
    """Two states are there when a run was killed between writing one and removing the other."""
    longer = train.train(runs.config(tmp_path / "longer", max_train_steps=4, num_class_images=2))
    folder, run = again(max_train_steps=4)
    broken = folder / "state" / "step-00000004"
    shutil.copytree(folder / "state" / "step-00000003", broken)
    if file == "missing":
        (broken / "state.safetensors").unlink()
    else:
        damage(broken / file)
    with pytest.warns(UserWarning, match="step-00000004 is damaged"):
        sd = run()
    assert torch.equal(weights(sd), weights(longer))
    assert [f.name for f in (folder / "state").iterdir()] == ["step-00000004"]
    assert resume.load(folder)[0] == 4


def test_where_every_state_is_damaged_the_run_says_so(again):
    folder, run = again(max_train_steps=5)
    damage(folder / "state" / "step-00000003" / "state.safetensors")
    with pytest.warns(UserWarning, match="is damaged"):
        message = refused(folder, run)
    assert "no state of" in message and "--output_dir" in message


def test_resuming_where_nothing_was_saved_yet_starts_at_the_first_step_and_says_so(
    tmp_path, capsys
):
    a = train.train(runs.config(tmp_path / "a", resume_from_checkpoint="latest"))
    assert "no state in" in capsys.readouterr().out
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "loss.csv").write_text("step,loss,loss_instance,loss_prior,lr,grad_norm\n1,2")
    b = train.train(runs.config(tmp_path / "b"))
    assert torch.equal(weights(a), weights(b))
    assert (tmp_path / "a" / "loss.csv").read_text() == (tmp_path / "b" / "loss.csv").read_text()


def test_leftovers_of_a_killed_save_are_removed_and_nothing_else(again):
    folder, run = again()
    ours = ["state/.step-00000004.tmp/state.safetensors", ".checkpoint-2.tmp/unet/config.json"]
    ours += ["unet/.diffusion_pytorch_model.safetensors.123.tmp", ".loss.png.77.tmp"]
    theirs = [".mine.tmp", "unet/.mine.tmp", "notes.tmp"]
    for name in ours + theirs:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"half")
    run()
    assert [name for name in ours if (folder / name).exists()] == []
    assert all((folder / name).exists() for name in theirs)
    assert not (folder / ".checkpoint-2.tmp").exists()


def test_a_state_holds_what_goes_on_and_no_more(stopped):
    step, tensors, identity = resume.load(stopped)
    unet = runs.model().unet.state_dict()
    assert step == 3 and len(tensors) == 4 * len(unet) + 2
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert json.loads(json.dumps(identity)) == identity
