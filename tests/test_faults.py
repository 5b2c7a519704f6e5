"""Bad input: one line that says what is wrong and what to do, status 2, nothing half-written."""

import dataclasses
import json
import os
import runpy
import shutil
import sys
import typing
import warnings
from collections import namedtuple

import huggingface_hub
import peers
import pytest
import runs
import torch
from huggingface_hub import errors as hub_errors
from PIL import Image
from safetensors.torch import load_file, save_file

from minibooth import UserError, convert, dreambooth, sample, train
from minibooth.common import cli, files
from minibooth.convert import ConvertConfig
from minibooth.device import memory
from minibooth.sample import SampleConfig
from minibooth.train import TrainConfig
from minibooth.training import photos, report, start, subjects


@pytest.fixture
def fails(monkeypatch, capsys, tmp_path):
    """Run train with these changes of good settings: its one line. No output may be left."""

    def line_of(module=train, arguments=None, **changes):
        out = tmp_path / "out"
        if arguments is None:
            arguments = runs.arguments(runs.settings(**{"output_dir": out} | changes))
        status, _, err = runs.program(monkeypatch, capsys, module, *arguments)
        assert status == 2, err
        assert "Traceback" not in err
        line = err.replace("\r", "\n").strip().splitlines()[-1]
        assert line.startswith(f"{module.__name__}: ")
        assert len(line) < 700
        assert not (out.is_dir() and runs.files(out))
        return line

    return line_of


# ---- photographs -------------------------------------------------------------------------------


def test_photographs_that_are_missing_or_unreadable_are_named(fails, tmp_path):
    photos = tmp_path / "photos"
    assert f"{photos} does not exist" in fails(instance_data_dir=photos)
    photos.mkdir()
    assert "holds no image file" in fails(instance_data_dir=photos)
    (photos / "notes.txt").write_text("hello")
    assert "notes.txt" in fails(instance_data_dir=photos)
    shutil.copy(runs.photographs() / "0.png", photos / "good.png")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    assert f"{photos / 'broken.jpg'}" in fails(instance_data_dir=photos)


# ---- models ------------------------------------------------------------------------------------


def copy_of_the_model(tmp_path, kind="sd1"):
    return shutil.copytree(peers.model(kind)[0], tmp_path / "model")


def test_a_model_that_is_none_is_named(fails, tmp_path):
    assert "no such folder or file" in fails(model=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is not a model" in fails(model=tmp_path / "empty")
    assert "is not a model" in fails(model=runs.photographs())
    (tmp_path / "text.safetensors").write_text("this is text, not tensors")
    assert "text.safetensors" in fails(model=tmp_path / "text.safetensors")
    assert "give --model" in fails(model=None)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_weights_are_named(fails, tmp_path, keep):
    model = copy_of_the_model(tmp_path)
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in fails(model=model)


def test_a_damaged_config_or_a_missing_part_is_named(fails, tmp_path):
    model = copy_of_the_model(tmp_path)
    (model / "vae" / "config.json").write_text('{"block_out')
    assert str(model / "vae" / "config.json") in fails(model=model)
    shutil.rmtree(model / "vae")
    assert f"{model}/vae" in fails(model=model)


def test_a_weight_that_is_not_finite_is_named_before_anything_is_drawn(fails, tmp_path):
    model = copy_of_the_model(tmp_path)
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, path)
    line = fails(model=model)
    assert "its vae's decoder.conv_out.weight is not finite" in line


def test_an_inpainting_model_is_refused(fails):
    assert "inpainting" in fails(kind="inpaint")


def test_without_network_a_model_on_the_hub_is_said_to_be_out_of_reach(fails, monkeypatch):
    def unreachable(*args, **kwargs):
        raise hub_errors.LocalEntryNotFoundError("cannot reach")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    line = fails(model="someone/some-model")
    assert "someone/some-model" in line and "cannot be reached" in line


# ---- settings ----------------------------------------------------------------------------------


def numeric_fields(cls):
    for name, hint in typing.get_type_hints(cls).items():
        kinds = {hint, *typing.get_args(hint)}
        if kinds & {int, float} and typing.get_origin(hint) is not tuple:
            yield name, int if int in kinds else float


@pytest.mark.parametrize("cls", [TrainConfig, SampleConfig])
def test_every_number_that_makes_no_sense_is_refused_by_its_name(cls):
    base = {TrainConfig: runs.settings("out"), SampleConfig: {"model": "m", "prompt": "p"}}[cls]
    fields = dict(numeric_fields(cls))
    assert len(fields) > 5
    for name, kind in fields.items():
        values = ["-1", "abc", ""] + (["1.5"] if kind is int else ["nan", "inf", "-inf"])
        for value in values:
            with pytest.raises(UserError, match=name):
                cli.parse(cls, "x", "", [*runs.arguments(base), f"--{name}={value}"]).check()


AT_LEAST_ONE = ["max_train_steps", "resolution", "train_batch_size", "sample_batch_size"]
AT_LEAST_ONE += ["gradient_accumulation_steps", "class_steps", "validation_steps"]
AT_LEAST_ONE += ["checkpointing_steps", "checkpoints_total_limit", "validation_inference_steps"]
AT_LEAST_ONE += ["learning_rate", "max_grad_norm", "snr_gamma"]


@pytest.mark.parametrize("name", AT_LEAST_ONE)
def test_zero_is_refused_where_it_means_nothing(name):
    with pytest.raises(UserError, match=name):
        TrainConfig(**runs.settings("out", **{name: 0})).check()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"resolution": 33}, "--resolution must be a multiple of 2"),
        ({"class_steps": 1001}, "from 1 to 1000"),
        ({"validation_inference_steps": 2000}, "from 1 to 1000"),
        ({"class_prompt": None}, "--class_prompt"),
        ({"instance_prompt": None}, "--instance_prompt"),
        ({"class_sampler": "euler"}, "--class_sampler"),
        ({"mixed_precision": "fp8"}, "--mixed_precision"),
        ({"resume_from_checkpoint": "checkpoint-4"}, "--resume_from_checkpoint"),
        ({"device": "tpu9"}, "give auto, cuda, mps or cpu"),
        ({"device": "meta"}, "give auto, cuda, mps or cpu"),
        ({"device": "cpu:3"}, "no device cpu:3"),
        ({"seed": 2**63}, "--seed"),
        ({"unknown_setting": 3}, "unknown_setting"),
        ({"config": "nowhere.json"}, "nowhere.json is not a config file"),
    ],
)
def test_settings_that_cannot_work_are_refused(fails, changes, said):
    assert said in fails(**changes)


@pytest.mark.parametrize(
    "settings, said",
    [
        ("[1, 2]", "not a config file"),
        ("{", "not a config file"),
        ({"leraning_rate": 1}, "leraning_rate"),
        ({"learning_rate": "fast"}, "learning_rate = 'fast' has the wrong type"),
        ({"max_train_steps": True}, "max_train_steps = True has the wrong type"),
        ({"center_crop": 1}, "center_crop = 1 has the wrong type"),
        ({"validation_prompt": [1]}, "validation_prompt = (1,) has the wrong type"),
        ({"mixed_precision": "half"}, "--mixed_precision 'half': give one of auto"),
        ({"class_sampler": "euler"}, "--class_sampler 'euler': give one of ddim, ddpm"),
    ],
)
def test_a_config_file_that_cannot_work_is_refused(fails, tmp_path, settings, said):
    path = tmp_path / "config.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    assert said in fails(config=path)


def test_a_folder_to_write_into_that_cannot_be_one_is_refused(fails, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in fails(output_dir=tmp_path / "file")
    assert "is a file" in fails(output_dir=tmp_path / "file" / "below")
    assert "--class_data_dir" in fails(class_data_dir=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert "cannot be written to (File name too long)" in fails(output_dir=tmp_path / ("狗" * 86))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="no folder here that root cannot use")
def test_folders_that_cannot_be_written_to_are_refused_before_anything_is_loaded(
    fails, monkeypatch, tmp_path
):
    """The system's own; to ask for permission is not enough, as the permissions there are given."""
    for program in (start.pipeline, sample.pipeline, convert.pipeline):
        monkeypatch.setattr(program, "load", lambda *given, **more: pytest.fail("loaded"))
    said = "/proc cannot be written to"
    assert f"--output_dir /proc/x: {said}" in fails(output_dir="/proc/x")
    assert f"--class_data_dir /proc/x: {said}" in fails(class_data_dir="/proc/x")
    given = {"model": "m", "prompt": "a dog", "output_dir": "/proc/x"}
    assert f"--output_dir /proc/x: {said}" in fails(sample, runs.arguments(given))
    for out in ("/proc/x", "/proc/x.safetensors"):
        given = {"model": "m", "output": out}
        assert said in fails(convert, runs.arguments(given))
    given = {"model": "m", "output": tmp_path / f"{'x' * 256}.safetensors"}
    assert "File name too long" in fails(convert, runs.arguments(given))


@pytest.mark.parametrize(
    "module, given, said",
    [
        (sample, {"prompt": "x", "lora": "none.safetensors:0.5"}, "none.safetensors: there is no"),
        (sample, {"prompt": "x", "embedding": "none.pt"}, "none.pt: there is no such file"),
        (convert, {"output": "x", "merge_lora": "none.safetensors"}, "there is no such file"),
    ],
)
def test_small_files_that_are_missing_are_said_before_a_model_is_loaded(
    module, given, said, fails, monkeypatch
):
    monkeypatch.setattr(module.pipeline, "load", lambda *given, **more: pytest.fail("loaded"))
    assert said in fails(module, runs.arguments({"model": "m"} | given))


def test_two_folders_that_are_one_are_refused_by_whatever_names(fails, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(runs.photographs(), photos)
    (tmp_path / "link").symlink_to(photos)
    of_subject = {"instance_data_dir": photos}
    for other in (photos, tmp_path / "link", tmp_path / "x" / ".." / "photos"):
        line = fails(**of_subject, class_data_dir=other)
        assert f"--class_data_dir {photos} is --instance_data_dir" in line
    assert "is --output_dir" in fails(**of_subject, class_data_dir=out)
    list_of = tmp_path / "list.json"
    alone = dict.fromkeys(("instance_data_dir", "instance_prompt", "class_prompt"))
    alone |= {"class_data_dir": None, "concepts_list": list_of}
    dog = {
        "instance_data_dir": str(photos),
        "instance_prompt": "a sks dog",
        "class_prompt": "a dog",
    }
    list_of.write_text(json.dumps([dog, dog | {"instance_prompt": "a sks cat"}]))
    assert "is --instance_data_dir" in fails(**alone)
    shutil.copytree(photos, out)
    before = runs.files(out)
    with pytest.raises(UserError, match="is --output_dir"):
        start.check(runs.config(out, instance_data_dir=str(out)), has_model=False)
    assert runs.files(out) == before


def test_own_class_images_are_not_of_two_classes(tmp_path):
    for name in ("dog", "cat", "both"):
        shutil.copytree(runs.photographs(), tmp_path / name)
    dog = subjects.Subject(str(tmp_path / "dog"), "a sks dog", "a dog", str(tmp_path / "both"))
    cat = dataclasses.replace(
        dog, instance_data_dir=str(tmp_path / "cat"), instance_prompt="a ohwx dog"
    )
    out = str(tmp_path / "out")
    subjects.check_folders([dog, cat], out)
    cat = dataclasses.replace(cat, class_prompt="a cat")
    with pytest.raises(UserError, match="both 'a dog' and 'a cat'"):
        subjects.check_folders([dog, cat], out)
    for i, file in enumerate(photos.image_files(tmp_path / "both")):  # drawn ones are told apart
        file.rename(file.with_name(f"{i:012x}-00000.png"))
    subjects.check_folders([dog, cat], out)


def test_what_minibooth_drew_is_no_photograph(tmp_path):
    """By its name, or, renamed, by what the programs write into their pictures."""
    for file in photos.image_files(runs.photographs()):
        shutil.copy(file, tmp_path)
    mine = photos.image_files(tmp_path)
    picture = Image.new("RGB", (8, 8))
    names = ["0123456789ab-00000", "step-00200", "before_after", "loss", "grid", "photographs"]
    for name in names:
        picture.save(tmp_path / f"{name}.png")
    about = sample.settings(SampleConfig(), "toybox", "a dog", 3)
    sample.save_png(picture, tmp_path, "renamed", about)
    with pytest.warns(UserWarning, match=r"0123456789ab-00000.png and 6 more left out"):
        assert photos.photographs(tmp_path) == mine
    assert photos.own(tmp_path) == sorted([*mine, tmp_path / "renamed.png"])
    for file in mine:
        file.unlink()
    with pytest.raises(UserError, match="minibooth drew all its pictures"):
        photos.photographs(tmp_path)


@pytest.mark.parametrize(
    "name", ["model", "instance_data_dir", "output_dir", "class_prompt", "class_data_dir", "config"]
)
@pytest.mark.parametrize("unset", ["", " "])
def test_an_empty_value_as_of_an_unset_variable_is_refused(name, unset, fails, tmp_path):
    assert f"--{name} is empty" in fails(**{name: unset})


def test_an_empty_value_is_refused_of_every_program_s_and_in_a_config(fails, tmp_path):
    model = {"model": peers.model()[0]}
    for module, settings in (
        (sample, model | {"prompt": "sks", "output_dir": ""}),
        (sample, model | {"prompt": "sks", "output_dir": tmp_path, "lora": ""}),
        (convert, {"model": "", "output": tmp_path / "out"}),
        (convert, model | {"output": ""}),
    ):
        assert "is empty" in fails(module, runs.arguments(settings))
    (tmp_path / "config.json").write_text(json.dumps({"instance_data_dir": ""}))
    assert "--instance_data_dir is empty" in fails(
        config=tmp_path / "config.json", instance_data_dir=None
    )
    SampleConfig(model="toybox", prompt=("",), negative_prompt="").check()  # these can be meant


def test_the_home_folder_is_meant_by_its_sign_everywhere(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    home = f"{tmp_path}{os.sep}"
    read = cli.parse(TrainConfig, "train", "", ["--output_dir=~/x", "--model=~/m", "--vae=a/b"])
    assert (read.output_dir, read.model, read.vae) == (home + "x", home + "m", "a/b")
    read = cli.parse(SampleConfig, "sample", "", ["--lora=~/a", "--lora=~/b:0.5", "--prompt=~/x"])
    assert (read.lora, read.prompt) == ((home + "a", home + "b:0.5"), ("~/x",))
    read = cli.parse(ConvertConfig, "convert", "", ["--output=~/x.safetensors"])
    assert read.output == home + "x.safetensors"
    (tmp_path / "config.json").write_text(json.dumps({"class_data_dir": "~/c"}))
    read = cli.parse(TrainConfig, "train", "", ["--config=~/config.json"])
    assert read.class_data_dir == home + "c"
    entry = {"instance_data_dir": "~/d", "instance_prompt": "a sks dog", "class_data_dir": "~/c"}
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    [subject] = subjects.read_list(tmp_path / "list.json")
    assert (subject.instance_data_dir, subject.class_data_dir) == (home + "d", home + "c")


# ---- disk and memory ---------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_a_disk_too_full_is_noticed_before_the_run(fails, monkeypatch, tmp_path):
    """A tiny model, one snapshot, and a second state beside the first."""
    needed = start.disk_needed(
        runs.model(), runs.config(tmp_path, checkpointing_steps=2, max_train_steps=3)
    )

    def with_room_for(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, size + 2**20))
        return {"checkpointing_steps": 2, "max_train_steps": 3}

    line = fails(**with_room_for(needed - 1))
    assert "not enough disk space" in line and files.gigabytes(needed) in line
    train.train(runs.config(tmp_path / "out", **with_room_for(needed)))


def test_too_little_memory_is_said_before_the_run_with_what_helps(fails, monkeypatch):
    sd = runs.model()
    unet, text = (sum(p.numel() for p in n.parameters()) for n in (sd.unet, sd.text_encoder))
    monkeypatch.setattr(memory, "available", lambda device: 15 * unet)
    line = fails(train_batch_size=4)
    assert "--gradient_checkpointing" in line and "--train_batch_size 1 (about -75%" in line
    assert "--resolution" in line and "--train_text_encoder" not in line
    assert f"alone need {files.gigabytes(16 * unet)};" in line
    assert line.endswith(f"{files.gigabytes(15 * unet)} are free")
    monkeypatch.setattr(memory, "available", lambda device: 16 * (unet + text) - 1)
    line = fails(train_text_encoder=True, gradient_checkpointing=True)
    assert f"no --train_text_encoder (-{files.gigabytes(12 * text)})" in line
    assert "--gradient_checkpointing" not in line


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: str(e)[:12] or "MemoryError")
def test_running_out_of_memory_says_which_settings_help(monkeypatch, capsys, tmp_path, error):
    def full(*args):
        raise error

    monkeypatch.setattr(dreambooth, "step", full)
    arguments = runs.arguments(runs.settings(tmp_path / "out", train_batch_size=2))
    status, _, err = runs.program(monkeypatch, capsys, train, *arguments)
    line = err.replace("\r", "\n").strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in err
    assert "out of memory" in line and "--train_batch_size 1 (about -50%" in line


def test_an_error_of_the_program_itself_is_not_hidden(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(dreambooth, "step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runs.program(monkeypatch, capsys, train, *runs.arguments(runs.settings(tmp_path / "out")))


def test_programs_that_are_interrupted_say_so_in_one_line(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", interrupt)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    for name, said in [("sample", "stopped"), ("evaluate", "stopped: the same command goes on")]:
        monkeypatch.setattr(sys, "argv", [name])
        monkeypatch.delitem(sys.modules, f"minibooth.{name}.__main__", raising=False)
        monkeypatch.delitem(sys.modules, f"minibooth.{name}", raising=name == "sample")
        with pytest.raises(SystemExit, match="130"):
            runpy.run_module(f"minibooth.{name}", run_name="__main__")
        assert capsys.readouterr().err == f"minibooth.{name}: {said}\n"


def test_numbers_that_are_not_finite_end_the_program_with_status_2(monkeypatch, capsys, tmp_path):
    settings = runs.settings(tmp_path / "out", learning_rate=1e38)
    status, _, err = runs.program(monkeypatch, capsys, train, *runs.arguments(settings))
    assert status == 2 and "Traceback" not in err
    assert "is not finite" in err.replace("\r", "\n").strip().splitlines()[-1]
    assert not (tmp_path / "out" / "model_index.json").exists()


# ---- prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "instance_prompt, class_prompt, said",
    [
        ("a a dog", "a dog", "names the subject"),
        ("a zyxwvut dog", "a dog", "'zyxwvut' is 7 tokens"),
        ("a sks", "a dog", "does not contain dog"),
        ("a dog", "a dog", "names the subject"),
        ("a x dog", "a dog", "'x' is a common word"),
    ],
)
def test_prompts_that_will_not_work_as_hoped_are_warned_of(instance_prompt, class_prompt, said):
    with pytest.warns(UserWarning) as warned:
        report.describe_prompts(runs.model().tokenizer, instance_prompt, class_prompt)
    assert any(said in str(w.message) for w in warned)


@pytest.mark.parametrize("prompts", [("a sks dog", "a dog"), ("a photo of sks dog", "a dog")])
def test_good_prompts_give_no_warning(prompts, recwarn):
    tokenizer = runs.model().tokenizer
    said = report.describe_prompts(tokenizer, *prompts)
    assert said == f"identifier: 'sks' is 1 token [{tokenizer.vocab['sks</w>']}]"
    assert not recwarn.list


STORY = " ".join(["the old brown one in rain"] * 14)  # 84 words


def test_a_subject_that_is_cut_off_is_refused_before_anything_is_drawn(fails, monkeypatch):
    said = fails(instance_prompt=f"a photo of {STORY} sks dog")
    assert "'sks', which names the subject, is beyond the 75th token" in said
    assert said.endswith("sks dog")


def test_a_prompt_that_tells_a_story_is_one_line(monkeypatch):
    """As many warnings as it has ordinary words help nobody."""
    tokenizer = runs.model().tokenizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = report.describe_prompts(tokenizer, f"a sks dog, {STORY}", "a dog")
    assert said == (
        f"identifier: 'sks' is 1 token [{tokenizer.vocab['sks</w>']}]; 3 other words of the "
        "prompt are learned with it"
    )


def test_warnings_of_a_program_are_one_line_each(monkeypatch, capsys, tmp_path):
    settings = runs.settings(tmp_path / "out", instance_prompt="a sks", max_train_steps=1)
    status, _, err = runs.program(monkeypatch, capsys, train, *runs.arguments(settings))
    assert status == 0
    warned = [line for line in err.replace("\r", "\n").splitlines() if "warning" in line.lower()]
    assert len(warned) == 1
    assert warned[0].startswith("minibooth.train: warning: the instance prompt 'a sks' does not")


def test_a_warm_up_that_is_longer_than_the_run_is_warned_of(monkeypatch, capsys, tmp_path):
    """And what lies among the photographs without being one is said, in a line with the count."""
    folder = shutil.copytree(runs.photographs(), tmp_path / "photos")
    for name in ("x.jxl", "y.DNG", "1.txt", ".hidden.jxl"):
        (folder / name).touch()
    (folder / "more").mkdir()
    (folder / "z.jpg").symlink_to("nowhere")
    settings = runs.settings(tmp_path / "out", lr_warmup_steps=4, max_train_steps=1)
    given = runs.arguments(settings | {"instance_data_dir": folder})
    status, out, err = runs.program(monkeypatch, capsys, train, *given)
    assert status == 0 and "is longer than the run: the learning rate ends at 25% of what" in err
    assert (
        f"{folder}: 4 left out, which are no photographs here (more/, x.jxl, y.DNG, z.jpg)" in out
    )


# ---- sample and convert ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model": None}, "give --model"),
        ({"prompt": None}, "give --prompt"),
        ({"model": "/nowhere/at-all"}, "no such folder or file"),
        ({"num_images": 0}, "--num_images"),
        ({"height": 0}, "--height"),
        ({"height": 33}, "multiples of 2"),
        ({"steps": 1001}, "from 1 to 1000"),
        ({"eta": 1.5}, "--eta"),
        ({"sampler": "euler"}, "--sampler"),
        ({"dtype": "int8"}, "--dtype"),
    ],
)
def test_sample_refuses_what_cannot_work(fails, tmp_path, changes, said):
    settings = {"model": peers.model()[0], "prompt": "sks", "output_dir": tmp_path / "out"}
    assert said in fails(sample, runs.arguments(settings | {"device": "cpu"} | changes))


def test_sample_refuses_an_output_that_is_a_file(fails, tmp_path):
    (tmp_path / "file").write_text("mine")
    settings = {"model": peers.model()[0], "prompt": "sks", "output_dir": tmp_path / "file"}
    assert "is a file" in fails(sample, runs.arguments(settings))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model": None}, "give --model"),
        ({"output": None}, "--output"),
        ({"model": "/nowhere/at-all"}, "no such folder or file"),
        ({"output": "x.ckpt"}, "only .safetensors"),
        ({"output": "x.GGUF"}, "only .safetensors"),
        ({"dtype": "int8"}, "--dtype"),
    ],
)
def test_convert_refuses_what_cannot_work(fails, tmp_path, changes, said):
    settings = {"model": peers.model()[0], "output": tmp_path / "out"} | changes
    assert said in fails(convert, runs.arguments(settings))


def test_convert_refuses_to_put_a_file_on_a_folder_and_the_reverse(fails, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("mine")
    for name, said in (("folder.safetensors", "not a file"), ("file", "not a folder")):
        settings = {"model": peers.model()[0], "output": tmp_path / name}
        assert said in fails(convert, runs.arguments(settings))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_convert_leaves_nothing_where_the_disk_is_too_full(fails, tmp_path, monkeypatch, name):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 3 * 2**20))
    settings = {"model": peers.model()[0], "output": tmp_path / name}
    assert "not enough disk space" in fails(convert, runs.arguments(settings))
    assert list(tmp_path.iterdir()) == []


def test_every_setting_has_help_and_a_default():
    for cls in (TrainConfig, SampleConfig, ConvertConfig):
        assert dataclasses.asdict(cls()).keys() == cls.__dataclass_fields__.keys()
        for field in dataclasses.fields(cls):
            assert len(field.metadata["help"]) > 5, field.name
