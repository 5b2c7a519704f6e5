"""What is written can be shown to others: it names no folder of this machine, and no user."""

import json
import re
import shutil
from pathlib import Path

import peers
import pytest
import runs
from PIL import Image

from minibooth import UserError, convert, load, sample, train
from minibooth.common import cli
from minibooth.common.files import SHIPPED, from_portable, portable
from minibooth.explain import __main__ as explain
from minibooth.training import resume
from minibooth.training.settings import TrainConfig


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Hildegard's: a model with the traces that diffusers leaves, photographs, where she works."""
    home = tmp_path / "users" / "hildegard"
    shutil.copytree(peers.model()[0], home / "models" / "base")
    for part in ("unet", "vae", "text_encoder"):
        path = home / "models" / "base" / part / "config.json"
        config = json.loads(path.read_text()) | {"_name_or_path": str(home / "downloads" / part)}
        path.write_text(json.dumps(config))
    shutil.copytree(runs.photographs(), home / "photos" / "my dog")
    (home / "work").mkdir()
    monkeypatch.chdir(home / "work")
    for name, value in {"HOME": home, "USERPROFILE": home}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, "hildegard")
    return home


def told(folder: Path) -> dict[str, str]:
    """Everything in a folder's files that can be read as text, and in their names."""
    texts = {}
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            texts[str(path.relative_to(folder))] = f"{path.name} {data.decode('latin-1')}"
            if path.suffix == ".png":
                with Image.open(path) as image:
                    image.load()
                    texts[str(path.relative_to(folder))] += repr(image.info)
    return texts


def program(monkeypatch, capsys, module, **options) -> None:
    arguments = []
    for name, value in options.items():
        for one in value if isinstance(value, tuple) else (value,):
            arguments += runs.arguments({name: one})
    status, _, err = runs.program(monkeypatch, capsys, module, *arguments)
    assert status == 0, err


def assert_nothing_told(folder: Path, tmp_path: Path) -> None:
    traces = re.compile("hildegard|" + re.escape(str(tmp_path)))
    texts = told(folder)
    assert {name: found[0] for name, text in texts.items() if (found := traces.search(text))} == {}


def test_no_program_writes_where_anything_is_or_whose_it_is(home, tmp_path, monkeypatch, capsys):
    base, folder = home / "models" / "base", Path("out")
    short = {"max_train_steps": 2, "checkpointing_steps": 1, "class_data_dir": None}
    grids = {"num_validation_images": 1, "validation_inference_steps": 1, "validation_steps": 1}
    one = {"num_class_images": 1, "class_steps": 1, "explain": True}
    given = {"model": base, "instance_data_dir": home / "photos" / "my dog", "vae": base}
    settings = runs.settings(folder / "run", **given, **short, **grids, **one)
    drawn = {"prompt": "a sks dog", "num_images": 1, "steps": 1, "device": "cpu"}

    def run(module, **options):
        program(monkeypatch, capsys, module, **options)

    run(train, **settings)
    run(convert, model=folder / "run", output=folder / "one.safetensors")
    run(convert, model=folder / "one.safetensors", output=folder / "again", tokenizer=base)
    run(sample, model=folder / "one.safetensors", output_dir=folder / "samples", **drawn)
    run(train, **settings | {"method": "lora", "output_dir": folder / "lora", "explain": False})
    files = (folder / "lora", f"{home / 'work' / folder / 'lora' / 'lora.safetensors'}:0.5")
    run(sample, model=base, output_dir=folder / "samples-lora", lora=files, **drawn)
    run(convert, model=base, merge_lora=files, output=folder / "merged")
    run(explain, **settings | {"output_dir": folder / "explained"})

    with Image.open(folder / "samples-lora" / "a-sks-dog-0.png") as image:
        assert image.text["model"] == "base"
        assert image.text["lora"] == "lora, lora.safetensors:0.5"
    assert {"run/README.md", "run/explain.html", "one.safetensors"} < runs.files(folder)
    assert_nothing_told(folder, tmp_path)


@pytest.mark.parametrize("out", ["home", "another disk"])
def test_nor_does_a_run_that_writes_elsewhere(out, home, tmp_path, monkeypatch, capsys):
    folder = {"home": home / "out", "another disk": tmp_path / "disk"}[out]
    given = {"model": home / "models" / "base", "instance_data_dir": home / "photos" / "my dog"}
    short = {"max_train_steps": 1, "prior_loss_weight": 0.0, "class_prompt": None}
    settings = runs.settings(folder, **given, **short) | {"class_data_dir": None}
    program(monkeypatch, capsys, train, **settings)
    assert_nothing_told(folder, tmp_path)


def test_a_run_runs_again_by_its_settings_from_any_folder(home, monkeypatch, capsys):
    given = {"model": "../models/base", "instance_data_dir": home / "photos" / "my dog"}
    short = {"max_train_steps": 1, "prior_loss_weight": 0.0, "class_prompt": None}
    settings = runs.settings("out", **given, **short) | {"class_data_dir": "classes"}
    program(monkeypatch, capsys, train, **settings)
    monkeypatch.chdir(home / "models")
    config = home / "work" / "out" / "config.json"
    program(monkeypatch, capsys, train, config=config, output_dir="again")
    first, again = (runs.flat(load(f).unet.state_dict()) for f in (config.parent, "again"))
    assert (first == again).all()
    read = cli.read_config(config, TrainConfig)
    assert (read["model"], read["class_data_dir"]) == ("base", str(home / "work" / "classes"))
    status, _, err = runs.program(monkeypatch, capsys, train, "--config", config)
    assert status == 2 and f"{config.parent} already holds a run" in err


@pytest.mark.parametrize(
    "path, folder, written",
    [
        ("/h/me/photos", "/h/me/out", "../photos"),
        ("/h/me/out/classes", "/h/me/out", "./classes"),
        ("/h/me/out", "/h/me/out", "./."),
        ("/h/me/out/..x", "/h/me/out", "./..x"),
        ("/h/me", "/h/me/out", ".."),
        ("/h/me/photos", "/disk/out", "~/photos"),
        ("/disk/models/base", "/disk/out", "../models/base"),
        ("/disk/models/base", "/h/me/out", "../../../disk/models/base"),
    ],
)
def test_paths_are_written_as_seen_from_the_file_and_read_back(path, folder, written, monkeypatch):
    monkeypatch.setenv("HOME", "/h/me")
    assert portable(path, Path(folder)) == written
    assert from_portable(written, Path(folder)) == path


@pytest.mark.parametrize("name", ["toybox", "someone/some-model", "photos/my dog", "/a/b", ".x"])
def test_names_and_paths_that_one_writes_by_hand_are_taken_as_they_are(name):
    assert from_portable(name, Path("/disk/out")) == name


def test_results_remember_their_settings_without_naming_places(home):
    settings = {"model": str(home / "models" / "base"), "prompt": "a dog", "steps": 3}
    resume.remember(home / "work" / "results", settings)
    text = (home / "work" / "results" / "settings.json").read_text()
    assert re.fullmatch(r"base \([0-9a-f]{8}\)", json.loads(text)["model"])
    assert json.loads(text) | {"model": ""} == {"model": "", "prompt": "a dog", "steps": 3}
    shutil.move(home / "work" / "results", home / "moved")
    resume.remember(home / "moved", settings)  # the same
    with pytest.raises(UserError, match="the model changed"):
        resume.remember(home / "moved", settings | {"model": str(home / "photos" / "base")})


def test_the_repository_names_no_folder_of_who_wrote_it():
    root = Path(__file__).parents[1]
    folders = [root / name for name in ("minibooth", "kernels", "docs", "bench", "weights")]
    files = [*root.glob("*.md"), *(f for folder in folders for f in folder.rglob("*"))]
    texts = [f for f in files if f.suffix in (".md", ".py", ".json", ".csv", ".html", ".ipynb")]
    assert len(texts) > 100
    places = re.compile(rf"{re.escape(str(root))}|/(root|home/\w+|Users/\w+)/")
    named = {f: m[0] for f in texts if (m := places.search(f.read_text("utf-8")))}
    assert named == {}


def test_the_toybox_is_the_shipped_one_also_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    for name in SHIPPED:
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert load("toybox").configs["unet"]["cross_attention_dim"] == 96
    with pytest.raises(UserError, match=r"\./toybox is not a model"):
        load("./toybox")
    for name in SHIPPED:
        cli.write_config(tmp_path / "config.json", TrainConfig(model=name))
        assert cli.read_config(tmp_path / "config.json", TrainConfig)["model"] == name
