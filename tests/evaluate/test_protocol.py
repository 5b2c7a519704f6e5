"""The whole protocol on a toybox with random weights, killed and resumed."""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import child
import numpy as np
import pytest
import runs
from PIL import Image
from small_judges import (
    clip_folder,
    cosine,
    dino_folder,
    options,
    peer_features,
    peer_texts,
    read_csv,
    run,
)

from minibooth import UserError, train
from minibooth.common import files
from minibooth.evaluate import __main__ as program
from minibooth.evaluate import drawing, judges, metrics, protocol
from minibooth.formats import hub
from minibooth.toybox import world

CHOSEN = "spotted_dog,snail"
ARMS = ("with_prior", "without_prior", "no_noun", "wrong_noun")


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Settings of a run of two steps, for --train_config."""
    path = tmp_path_factory.mktemp("training") / "config.json"
    settings = {"max_train_steps": 2, "checkpointing_steps": 1, "learning_rate": 1e-3}
    settings |= {"num_class_images": 2, "class_steps": 1, "sample_batch_size": 2}
    path.write_text(json.dumps(settings | {"train_batch_size": 1}))
    return path


def command(training, out, *more):
    given = ["dataset", "--model", "toybox", "--subjects", CHOSEN, "--prompts", 2, "--images", 2]
    given += ["--class_images", 2, "--steps", 1, "--device", "cpu", "--train_config", training]
    return [str(x) for x in (*given, "--output_dir", out, *more)]


@pytest.fixture(scope="module")
def whole(toybox_folder, training, tmp_path_factory):
    """The protocol in one go, and the training of each subject as it was asked for."""
    folder, asked = tmp_path_factory.mktemp("whole"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "toybox", lambda: toybox_folder)
        patch.setattr(sys, "argv", ["minibooth.evaluate", *command(training, folder)])
        patch.setattr(protocol, "train", lambda c: asked.append(c) or train.train(c))
        program.main()
    return folder, asked


def test_the_protocol_trains_every_subject_in_every_way(whole, toybox_folder):
    folder, asked = whole
    assert len(asked) == 8
    by_arm = {arm: asked[2 * i : 2 * i + 2] for i, arm in enumerate(ARMS)}
    for arm in ARMS:
        dog, snail = by_arm[arm]
        assert Path(dog.instance_data_dir) == toybox_folder / "subjects" / "spotted_dog"
        assert Path(snail.instance_data_dir) == toybox_folder / "subjects" / "snail"
        assert dog.uses_prior == (arm == "with_prior") and dog.max_train_steps == 2
    assert by_arm["with_prior"][0].instance_prompt == "a sks dog"
    assert by_arm["with_prior"][0].class_prompt == "a dog"
    assert by_arm["no_noun"][1].instance_prompt == "a sks"
    nouns = {s.kind for s in world.SUBJECTS.values()}
    wrong = by_arm["wrong_noun"][0].instance_prompt.removeprefix("a sks ")
    assert wrong in nouns - {"dog"}
    names = {f.name for f in (folder / "wrong_noun" / "spotted_dog" / "pictures").iterdir()}
    assert f"a-sks-{wrong}-on-the-grass-0.png" in names
    assert not list(folder.rglob("model"))  # a trained model is not kept


def test_other_methods_have_rows_of_their_own(toybox_folder, training, tmp_path, monkeypatch):
    asked = []

    def short(config):
        asked.append(config)
        train.train(dataclasses.replace(config, max_train_steps=2))

    monkeypatch.setattr(hub, "toybox", lambda: toybox_folder)
    monkeypatch.setattr(protocol, "train", short)
    more = ["--tables", 1, "--methods", "lora,textual_inversion", "--subjects", "spotted_dog"]
    more += ["--prompts", 1, "--images", 1]
    given = command(training, tmp_path, *more)
    monkeypatch.setattr(sys, "argv", ["minibooth.evaluate", *given])
    program.main()
    small, word = asked
    assert (small.method, small.instance_prompt, small.uses_prior) == ("lora", "a sks dog", True)
    assert small.rank == 16 and small.learning_rate == 4e-3  # the toybox's, not the file's
    assert (small.max_train_steps, small.num_class_images, small.class_steps) == (2, 2, 1)
    assert (word.method, word.instance_prompt, word.uses_prior) == (
        "textual_inversion",
        "a <sks>",
        False,
    )
    assert (word.placeholder_token, word.initializer_token) == ("<sks>", "dog")
    assert (word.max_train_steps, word.num_vectors, word.train_text_encoder) == (600, 4, False)
    [drawn] = (tmp_path / "textual_inversion" / "spotted_dog" / "pictures").iterdir()
    assert drawn.name.startswith("a-sks-")
    rows = {r["row"]: r for r in read_csv(tmp_path / "subjects.csv")}
    table = (tmp_path / "tables.md").read_text()
    for name, row in (("DreamBooth with LoRA", "lora"), ("Textual Inversion", "textual_inversion")):
        [line] = [line for line in table.splitlines() if line.startswith(f"| {name}")]
        assert f"| {float(rows[row]['DINO']):.3f} |" in line
    assert "| DreamBooth (paper: SD)" not in table
    with pytest.raises(UserError, match="--methods 'dreams': give some of dreambooth, lora"):
        protocol.DatasetConfig(data=".", methods="lora,dreams").check()


@pytest.mark.parametrize(
    ("model", "of_file", "expected"),
    [
        ("x", {}, {"lora": (1e-4, 800, 4), "dreambooth": (5e-6, 800, 4)}),
        (
            "x",
            {"learning_rate": 1e-6, "max_train_steps": 9, "rank": 8, "train_text_encoder": True},
            {
                "dreambooth": (1e-6, 9, 8),
                "lora": (1e-4, 9, 8),
                "textual_inversion": (5e-4, 3000, 8),
            },
        ),
        (
            "x",
            {"method": "lora", "learning_rate": 3e-4, "max_train_steps": 9},
            {"lora": (3e-4, 9, 4), "dreambooth": (5e-6, 9, 4)},
        ),
        (
            "toybox",
            {"method": "textual_inversion", "learning_rate": 1.0, "max_train_steps": 9},
            {
                "textual_inversion": (1.0, 9, 4),
                "lora": (4e-3, 240, 16),
                "dreambooth": (7e-4, 240, 4),
            },
        ),
    ],
)
def test_a_file_s_rates_and_steps_are_for_the_method_it_names(model, of_file, expected, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(of_file))
    config = protocol.DatasetConfig(model=model, train_config=str(tmp_path / "c.json"))
    for method, wanted in expected.items():
        found = protocol.training_settings(config, method)
        assert found["method"] == method
        assert (found["learning_rate"], found["max_train_steps"], found["rank"]) == wanted


def test_the_protocol_writes_scores_tables_and_grids(whole, toybox):
    folder, _ = whole
    judge = judges.load(options(judge="toybox"))
    rows = read_csv(folder / "subjects.csv")
    assert len(rows) == 2 * (2 + len(ARMS))
    table = (folder / "tables.md").read_text()
    for arm in ARMS:
        dino = []
        for name in CHOSEN.split(","):
            place = folder / arm / name
            pictures = sorted((place / "pictures").iterdir())
            assert len(pictures) == 4 and len(list((place / "class").iterdir())) == 2
            seen = judge.image_features([Image.open(f) for f in pictures], "dino")
            real = sorted((toybox / "subjects" / name).iterdir())
            truth = judge.image_features([Image.open(f) for f in real], "dino")
            dino.append(np.mean([cosine(a, b) for a in seen for b in truth]))
            [row] = [r for r in rows if (r["row"], r["subject"]) == (arm, name)]
            assert float(row["DINO"]) == pytest.approx(dino[-1], abs=1e-5)
            assert all(row[metric] for metric in metrics.METRICS)
            with Image.open(place / "grid.png") as grid:
                assert grid.size[0] > 5 * drawing.CELL and grid.size[1] > 3 * drawing.CELL
        assert f"| {np.mean(dino):.3f} |" in table
    for line in (
        "## Table 1: fidelity (2 of 5 subjects, 2 prompts, 2 pictures of each)",
        "DreamBooth (paper: SD)",
        "## Table 3",
        "0.493 |",
        "## Table 4",
        "class noun: wrong",
        "not the paper's numbers",
    ):
        assert line in table
    assert re.search(r"0\.668 \| +0\.803 \| +0\.305 \|\n", table)


MOMENTS = [
    "step 2",  # in the training of the first subject
    "before a-sks-dog-on-the-beach-1.png",
    "remove .model.tmp",
    "before scores.json",
    "after grid.png",
    "before tables.md",
]


def kill(folder, moment, given, toybox):
    """Start the program and let it kill itself; what it said."""
    log = folder.parent / f"{folder.name}.log"
    process = child.start(given, moment, log, "minibooth.evaluate", toybox)
    process.join()
    assert process.exitcode == -signal.SIGKILL, (moment, log.read_text())
    return log.read_text()


def test_killed_at_any_moment_it_goes_on_and_does_nothing_twice(
    whole, toybox, training, tmp_path, monkeypatch, capsys
):
    folder, kept, said = tmp_path / "killed", {}, []
    given = command(training, folder, "--tables", "1")
    for moment in MOMENTS:
        for leftover in folder.glob(".*.tmp"):
            os.utime(leftover, (0, 0))  # from long ago
        said.append(kill(folder, moment, given, toybox))
        now = {f: f.stat().st_mtime_ns for f in folder.rglob("[a-z]*-*.png")}
        assert all(now[f] == kept[f] for f in kept), moment
        kept = now
    assert re.search(r"training: +50%", said[1])  # it went on where it was killed
    assert re.search(r"training: +0%", said[0]) and not re.search(r"training: +0%", said[1])
    assert not any("training:" in log for log in said[2:5])  # and was not done again

    def never(*args, **kwargs):
        raise AssertionError("this was done already")

    monkeypatch.setattr(protocol, "train", never)
    monkeypatch.setattr(protocol, "score", never)
    monkeypatch.setattr(drawing, "draw", never)
    for leftover in folder.glob(".*.tmp"):
        os.utime(leftover, (0, 0))
    assert run(monkeypatch, capsys, *given)[0] == 0
    of_table_1 = ("with_prior", "class_images", "settings.json")
    expected = {f for f in runs.files(whole[0]) if f.startswith(of_table_1)}
    assert runs.files(folder) == expected | {"subjects.csv", "tables.md"}
    for name in sorted(expected):
        assert (folder / name).read_bytes() == (whole[0] / name).read_bytes(), name
    rows = read_csv(whole[0] / "subjects.csv")
    rows = [r for r in rows if r["row"].startswith(("real", "with_prior"))]
    assert read_csv(folder / "subjects.csv") == rows


def test_shares_of_the_trainings_make_up_the_whole(
    whole, toybox, training, tmp_path, monkeypatch, capsys
):
    folder, asked = tmp_path / "shared", []
    monkeypatch.setattr(protocol, "train", lambda c: asked.append(c) or train.train(c))
    given = command(training, folder, "--tables", "3")
    status, out, err = run(monkeypatch, capsys, *given, "--shard", "2/3")
    assert status == 0, err
    names = [Path(c.output_dir).parent.relative_to(folder).as_posix() for c in asked]
    assert names == ["with_prior/snail"]
    assert (
        "1 of 4 trainings are finished; a row is the mean over the subjects it has: with_prior 1"
        in out
    )
    rows = {(r["row"], r["subject"]): r for r in read_csv(folder / "subjects.csv")}
    table = (folder / "tables.md").read_text()
    [line] = [line for line in table.splitlines() if line.startswith("| with prior")]
    assert f"| {float(rows['with_prior', 'snail']['PRES']):.3f} |" in line
    [line] = [line for line in table.splitlines() if line.startswith("| without (paper")]
    assert line.split("|")[2].strip() == "–"

    with files.claimed(folder / "without_prior" / "snail") as ours:  # as a process elsewhere
        assert ours
        status, out, err = run(monkeypatch, capsys, *given)
    assert status == 0 and "snail (snail), without_prior: another process is at it" in out + err
    assert len(asked) == 3 and "3 of 4 trainings" in out
    status, out, err = run(monkeypatch, capsys, *given, "--shard", "1/1")
    assert status == 0 and len(asked) == 4 and "are finished" not in out
    expected = {f for f in runs.files(whole[0]) if "noun/" not in f}
    assert runs.files(folder) == expected
    for name in sorted(expected - {"tables.md", "subjects.csv"}):
        assert (folder / name).read_bytes() == (whole[0] / name).read_bytes(), name
    for shard in ("3", "0/8", "9/8", "a/b", "1/"):
        with pytest.raises(UserError, match="give one of 1/8, 2/8"):
            protocol.DatasetConfig(data=".", shard=shard).check()


def test_more_pictures_need_a_model_again_and_other_settings_another_folder(
    whole, toybox, training, tmp_path, monkeypatch, capsys
):
    folder, asked = tmp_path / "out", []
    shutil.copytree(whole[0], folder)
    old = {f: f.stat().st_mtime_ns for f in folder.rglob("[a-z]*-*.png")}
    monkeypatch.setattr(protocol, "train", lambda c: asked.append(c) or train.train(c))
    more = ["--subjects", "snail", "--tables", "1", "--images", 3]
    status, out, err = run(monkeypatch, capsys, *command(training, folder, *more))
    assert status == 0, err
    assert len(asked) == 1 and "1 of 5 subjects, 2 prompts, 3 pictures" in out
    assert "Table 3" not in out
    assert all(f.stat().st_mtime_ns == time for f, time in old.items())
    assert len(list((folder / "with_prior" / "snail" / "pictures").iterdir())) == 6

    slower = tmp_path / "slower.json"
    slower.write_text(training.read_text().replace("0.001", "0.0001"))
    for change, said in (
        (["--steps", 2], "steps was 1 and is 2"),
        (["--identifier", "zwx"], "identifier was 'sks' and is 'zwx'"),
        (["--train_config", slower], "training's learning_rate was 0.001 and is 0.0001"),
    ):
        status, _, err = run(monkeypatch, capsys, *command(training, folder, *change))
        assert status == 2 and said in err and err.count("\n") == 1
    (folder / "with_prior" / "snail" / "scores.json").write_text("{")
    status, _, err = run(monkeypatch, capsys, *command(training, folder, *more))
    assert status == 0 and len(asked) == 1, err  # measured again, not trained again


def test_another_judge_measures_the_pictures_that_are_there(
    whole, toybox, training, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "out"
    shutil.copytree(whole[0], folder)
    monkeypatch.setattr(protocol, "train", lambda c: pytest.fail("nothing is to be trained"))
    public = ["--judge", "public", "--clip", clip_folder(), "--dino", dino_folder()]
    public += ["--tables", "1"]
    status, _, err = run(monkeypatch, capsys, *command(training, folder, *public))
    assert status == 0, err
    rows = read_csv(folder / "subjects.csv")
    [row] = [r for r in rows if (r["row"], r["subject"]) == ("with_prior", "snail")]
    real = sorted((toybox / "subjects" / "snail").iterdir())
    drawn = sorted((folder / "with_prior" / "snail" / "pictures").iterdir())
    seen, truth = (peer_features([Image.open(f) for f in x], "clip") for x in (drawn, real))
    want = np.mean([cosine(a, b) for a in seen for b in truth])
    assert float(row["CLIP-I"]) == pytest.approx(want, abs=1e-5)
    texts = peer_texts(["a snail on the grass"] * 2 + ["a snail on the beach"] * 2)
    order = sorted(range(4), key=lambda i: "beach" in drawn[i].name)
    want = np.mean([cosine(seen[i], text) for i, text in zip(order, texts, strict=True)])
    assert float(row["CLIP-T"]) == pytest.approx(want, abs=1e-5)


def test_the_settings_of_the_toybox_are_its_own(toybox, monkeypatch, capsys, training, tmp_path):
    given = {"model": "toybox"}
    assert program.suitable_settings(given) == {
        **{"judge": "toybox", "steps": 25, "guidance_scale": 4.0, "batch_size": 32},
        "data": str(toybox / "subjects"),
    }
    assert program.suitable_settings({"model": "x"}) == {}
    assert "data" not in program.suitable_settings({"generated": "toybox"})
    config = protocol.DatasetConfig(model="toybox", data=str(toybox / "subjects"))
    settings = protocol.training_settings(config, "dreambooth")
    assert settings["max_train_steps"] == 240 and settings["train_batch_size"] == 4
    assert settings["model"] == str(toybox) and settings["num_validation_images"] == 0
    (tmp_path / "c.json").write_text('{"prior_loss_weight": 0.0}')
    changed = [*command(training, tmp_path / "x"), "--train_config", str(tmp_path / "c.json")]
    status, _, err = run(monkeypatch, capsys, *changed)
    assert status == 2 and "prior_loss_weight must be above 0" in err
