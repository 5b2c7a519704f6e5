"""train, sample and convert as a user runs them."""

import dataclasses
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import peers
import pytest
import runs
import torch
from PIL import Image
from safetensors import safe_open

import minibooth
from minibooth import UserError, classify, convert, load, ops, sample, train
from minibooth.classify import ClassifyConfig
from minibooth.common import cli, files
from minibooth.convert import ConvertConfig
from minibooth.evaluate.protocol import DatasetConfig
from minibooth.evaluate.single import SingleConfig
from minibooth.evaluate.snapshots import SnapshotsConfig
from minibooth.explain import __main__ as explain
from minibooth.sample import SampleConfig
from minibooth.toybox.drift import DriftConfig
from minibooth.toybox.gallery import GalleryConfig
from minibooth.toybox.judge import JudgeConfig
from minibooth.toybox.pretrain import PretrainConfig
from minibooth.train import TrainConfig
from minibooth.training import report, settings
from minibooth.training.settings import METHODS

PROGRAMS = {
    train: TrainConfig,
    sample: SampleConfig,
    convert: ConvertConfig,
    classify: ClassifyConfig,
    explain: TrainConfig,
}


@pytest.fixture
def program(monkeypatch, capsys):
    """Run one that must succeed; what it printed."""

    def run(module, *arguments):
        status, out, err = runs.program(monkeypatch, capsys, module, *arguments)
        assert status == 0, err
        return out

    return run


# ---- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize("module", PROGRAMS, ids=lambda m: m.__name__)
def test_help_names_every_setting(module, program, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out = program(module, "--help")
    assert out.startswith(f"usage: python -m {module.__name__.removesuffix('.__main__')} ")
    for field in dataclasses.fields(PROGRAMS[module]):
        [about] = re.findall(rf"^  --{field.name}\b.*?(?=^  -|\Z)", out, re.MULTILINE | re.DOTALL)
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"[{field.default}]" in " ".join(about.split())
        for choice in field.metadata["choices"] or ():
            assert choice in out


def test_the_modules_run_as_programs(tmp_path, monkeypatch, capsys):
    """One in a process of its own, from any folder. Without a model they say what to give."""
    root = Path(minibooth.__file__).parent.parent
    command = [sys.executable, "-m", "minibooth.train", "--instance-data-dir", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}  # of other libraries
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("minibooth.train: give --model")
    assert done.stderr.count("\n") == 1
    for name in ("sample", "convert"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
            patch.setattr(sys, "argv", [name])
            patch.setattr(warnings, "showwarning", warnings.showwarning)
            patch.delitem(sys.modules, f"minibooth.{name}")
            runpy.run_module(f"minibooth.{name}", run_name="__main__")
        assert capsys.readouterr().err.startswith(f"minibooth.{name}: give --model")


def topics(cls, monkeypatch, capsys):
    """The help of the settings `cls` at 80 columns: the options under each heading."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        cli.parse(cls, "x", "About it.", ["--help"])
    help = capsys.readouterr().out
    assert max(map(len, help.splitlines())) <= 80
    parts = re.split(r"^(\S.*):\n(?=  -)", help, flags=re.MULTILINE)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return {name: re.findall(r"^  (?:-h, )?--(\w+)", text, re.MULTILINE) for name, text in pairs}


TRAIN_TOPICS = {  # and one setting of each, which a person would look for there
    "what most runs need": "instance_prompt",
    "photographs (captions, subjects, crops)": "concepts_list",
    "method (LoRA, word, hypernetwork)": "rank",
    "class images": "num_class_images",
    "training": "train_text_encoder",
    "memory": "use_8bit_adam",
    "pictures and snapshots": "checkpointing_steps",
    "second stage": "base_model",
    "model": "vae",
    "device": "mixed_precision",
}


def test_the_help_of_training_goes_from_what_most_runs_need_to_what_few_do(monkeypatch, capsys):
    found = topics(TrainConfig, monkeypatch, capsys)
    assert list(found) == list(TRAIN_TOPICS)
    assert all(name in found[topic] for topic, name in TRAIN_TOPICS.items())
    first = found["what most runs need"]
    assert len(first) <= 10 and first[0] == "model"
    assert {"instance_data_dir", "class_prompt", "output_dir", "max_train_steps"} <= set(first)


SETTINGS = [TrainConfig, SampleConfig, ConvertConfig, DatasetConfig, SingleConfig, SnapshotsConfig]
SETTINGS += [ClassifyConfig, DriftConfig, GalleryConfig, JudgeConfig, PretrainConfig]


@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
def test_every_option_stands_under_one_heading(cls, monkeypatch, capsys):
    found, names = topics(cls, monkeypatch, capsys), [f.name for f in dataclasses.fields(cls)]
    assert sorted(name for under in found.values() for name in under) == sorted([*names, "help"])
    assert len(names) <= 15 or len(found) > 2
    if cls.__base__ is not object:  # its own first, what it shares with others below
        assert next(iter(found.values()))[0] in cls.__annotations__


def parse(*argv):
    return cli.parse(TrainConfig, "x", "", list(argv))


def test_flags_take_underscores_hyphens_and_diffusers_names():
    assert parse() == TrainConfig()
    expected = TrainConfig(model="a-b_c", instance_prompt="a sks-dog --x", seed=3)
    prompt = ("--instance_prompt", "a sks-dog --x")
    assert parse("--model", "a-b_c", *prompt, "--seed", "3") == expected
    assert parse("--model=a-b_c", "--instance-prompt=a sks-dog --x", "--seed=3") == expected
    assert parse("--pretrained-model-name-or-path", "a-b_c", *prompt, "--seed", "3") == expected
    assert parse("--pretrained_model_name_or_path=a-b_c", *prompt, "--seed", "3") == expected
    sampled = cli.parse(SampleConfig, "x", "", ["--num_inference_steps", "7", "--prompt", "b"])
    assert (sampled.steps, sampled.prompt) == (7, ("b",))


def test_switches_can_be_switched_on_and_off(tmp_path):
    assert parse("--center-crop").center_crop is True
    assert parse("--center_crop", "--no_center_crop").center_crop is False
    path = tmp_path / "config.json"
    path.write_text('{"center_crop": true, "seed": 4, "learning_rate": 1}')
    assert parse("--config", str(path)) == TrainConfig(
        center_crop=True, seed=4, learning_rate=1, config=str(path)
    )
    assert parse("--no-center-crop", "--config", str(path), "--seed=0") == TrainConfig(
        learning_rate=1, config=str(path)
    )


def test_flags_that_are_unknown_shortened_or_empty_are_refused():
    for argv in (["--instance_data", "x"], ["--model"], ["stray"], ["--seed", "x"]):
        with pytest.raises(minibooth.UserError, match="--help lists the options"):
            parse(*argv)


def test_what_is_not_text_in_the_terminals_encoding_is_said():
    with pytest.raises(minibooth.UserError, match=r"udcfc.* is not text .* PYTHONUTF8=1"):
        parse("--instance_prompt", b"s\xfc\xdf".decode("ascii", "surrogateescape"))


ODD = [
    "my models/base",
    'a "sks" dog',
    "it's $HOME `x` \\ !",
    "犬.png",
    "~/x",
    "a;b",
    "plain-1.2/x",
]


def test_what_is_to_be_pasted_is_one_word_of_the_shell(monkeypatch):
    done = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {' '.join(map(cli.pasted, ODD))}"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ODD
    assert cli.pasted("a sks dog") == '"a sks dog"' and cli.pasted("x/y") == "x/y"
    monkeypatch.setattr(sys, "platform", "win32")  # PowerShell: nothing is special in '…' but '
    assert cli.pasted("C:\\x\\y.safetensors") == "C:\\x\\y.safetensors"
    assert cli.pasted("C:\\my x") == '"C:\\my x"'
    assert cli.pasted('it\'s $5 "a"') == "'it''s $5 \"a\"'"


@pytest.mark.parametrize("method", METHODS)
def test_the_commands_that_come_next_can_be_pasted(method, tmp_path, monkeypatch):
    """Into a shell; with a model of public size also those for other programs."""
    run = tmp_path / "my dog"
    given = {"model": "my models/base", "method": method, "output_dir": str(run)}
    given |= {"placeholder_token": "<my-dog>", "instance_prompt": 'a $5 "sks" dog'}
    config = TrainConfig(**given)
    said = report.what_next(run, config)
    assert "ComfyUI" not in said
    monkeypatch.setattr(report, "is_public_size", lambda configs: True)
    lines = report.what_next(run, config, runs.model()).splitlines()[1:]
    lines = dict(re.fullmatch(r"  (.*?): +(.*)", line).groups() for line in lines)
    words = {name: shlex.split(line) for name, line in lines.items()}
    parsed = cli.parse(SampleConfig, "x", "", words["draw"][3:])
    assert parsed.prompt == ('a $5 "sks" dog in the snow',)
    base, result = "my models/base", str(run)
    small = {"lora": run / "my dog.safetensors", "textual_inversion": run / "my-dog.safetensors"}
    small["hypernetwork"] = run / "my dog.pt"
    file = str(small.get(method, tmp_path / "my dog.safetensors"))
    places = {
        "dreambooth": ("models/checkpoints", "models/Stable-diffusion"),
        "lora": ("models/loras", "models/Lora"),
        "textual_inversion": ("models/embeddings", "embeddings"),
        "hypernetwork": ("models/hypernetworks", "models/hypernetworks"),
    }[method]
    assert words["ComfyUI"] == ["cp", file, f"ComfyUI/{places[0]}"]
    assert words["A1111"] == ["cp", file, f"stable-diffusion-webui/{places[1]}"]
    if method == "hypernetwork":  # diffusers does not know it, and nothing can be merged
        assert parsed.hypernetwork == (result,) and parsed.model == base
        assert set(words) == {"draw", "ComfyUI", "A1111"}
        return
    assert words["diffusers"][:2] == ["python", "-c"]
    compile(words["diffusers"][2], "", "exec")
    for name, method_ in (("lora", "load_lora_weights"), ("embedding", "load_textual_inversion")):
        if given := getattr(parsed, name):
            assert given == (result,) and parsed.model == base
            assert f"from_pretrained({base!r}); p.{method_}({result!r})" in words["diffusers"][2]
    if method == "dreambooth":
        assert parsed.model == result and f"from_pretrained({result!r})" in words["diffusers"][2]
    if method != "textual_inversion":
        made = cli.parse(ConvertConfig, "x", "", words["one file"][3:])
        assert made.output == str(tmp_path / "my dog.safetensors")
        assert made.merge_lora == ((result,) if method == "lora" else ())


def test_a_file_is_named_after_its_folder_also_where_that_is_a_dot(tmp_path, monkeypatch):
    (tmp_path / "my-dog" / "below").mkdir(parents=True)
    for where, run in (("my-dog", "."), ("my-dog/below", "..")):
        monkeypatch.chdir(tmp_path / where)
        said = report.what_next(Path(run), TrainConfig(model="m", instance_prompt="a sks dog"))
        assert "--output my-dog.safetensors" in said
        config = TrainConfig(output_dir=run, method="lora", max_train_steps=9)
        assert report.small_file(config, 9) == "my-dog.safetensors"
        assert report.small_file(config, 4) == "my-dog-4.safetensors"
    config = TrainConfig(output_dir="狗" * 85, max_train_steps=9)
    assert len(report.small_file(config, 4).encode()) < 255


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--with_prior_preservation", "the prior term is on with a --class_prompt"),
        ("--lora-rank", "give --method lora and --rank"),
        ("--train_steps", "perhaps --max_train_steps is meant"),
        ("--instance_dir", "perhaps --instance_data_dir is meant"),
        ("--output_name", "files are named after --output_dir"),
        ("--qqqq", "unrecognized arguments: --qqqq"),
    ],
)
def test_of_a_flag_that_is_another_programs_it_is_said_what_replaces_it(flag, said):
    with pytest.raises(minibooth.UserError, match=re.escape(said)) as error:
        parse(flag, "3")
    assert flag.replace("-", "_").lstrip("_") in str(error.value)
    for name in settings.ELSEWHERE:
        assert f"--{name}" not in {f"--{field.name}" for field in dataclasses.fields(TrainConfig)}
    given = set(re.findall(r"--(\w+)", " ".join(settings.ELSEWHERE.values())))
    assert given <= TrainConfig.__dataclass_fields__.keys()


def test_a_setting_that_was_removed_is_said_where_it_stands(tmp_path, monkeypatch, capsys):
    """An old config file with what holds now runs on, with one line; another value is refused, as
    the flag is."""
    assert not settings.REMOVED.keys() & TrainConfig.__dataclass_fields__.keys()
    path = tmp_path / "config.json"
    old = {"seed": 3, "adam_weight_decay": 0.01, "tokenizer": None}
    path.write_text(json.dumps(old))
    with pytest.warns(UserWarning, match="no --adam_weight_decay and no --tokenizer any more"):
        assert cli.read_config(path, TrainConfig) == {"seed": 3}
    given = ["--config", path, "--method", "lora", "--device", "cpu"]  # read twice: said once
    given += ["--instance_data_dir", tmp_path]
    status, _, err = runs.program(monkeypatch, capsys, train, *given)
    assert status == 2 and err.count("any more") == 1 and err.count("\n") == 2, err
    for name, value, said in [
        ("adam_weight_decay", 0.02, "has adam_weight_decay = 0.02, .* it is 0.01 in every run"),
        ("tokenizer", "clip", "has tokenizer = 'clip', .* minibooth.convert .* --tokenizer"),
    ]:
        path.write_text(json.dumps(old | {name: value}))
        with pytest.raises(minibooth.UserError, match=said):
            cli.read_config(path, TrainConfig)
        with pytest.raises(minibooth.UserError, match=f"^there is no --{name}: "):
            parse(f"--{name.replace('_', '-')}", str(value))
        instead = settings.REMOVED[name]
        assert set(re.findall(r"--(\w+)", instead)) <= ConvertConfig.__dataclass_fields__.keys()


def test_a_prompt_given_several_times_is_several_prompts(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"validation_prompt": ["a", "b"]}')
    assert parse("--config", str(path)).validation_prompt == ("a", "b")
    flags = ("--validation_prompt", "c", "--validation-prompt=d")
    assert parse(*flags, "--config", str(path)).validation_prompt == ("c", "d")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA card")
def test_the_device_is_what_is_there(monkeypatch):
    """Those of CUDA: tests/test_card.py."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert cli.pick_device("auto") == torch.device("cpu")
    with pytest.raises(minibooth.UserError, match="no device cuda"):
        cli.pick_device("cuda")


# ---- train -------------------------------------------------------------------------------------


def unet(source):
    return runs.flat(load(source).unet.state_dict())


def test_a_config_that_a_run_wrote_runs_again_and_flags_override_it(program, tmp_path):
    first = tmp_path / "first"
    changes = {"train_batch_size": 2, "max_train_steps": 2, "lr_warmup_steps": 2, "seed": 3}
    settings = runs.settings(first, **changes)
    program(train, *runs.arguments(settings))
    config = ["--config", first / "config.json"]
    program(train, *config, "--output_dir", tmp_path / "again")
    program(train, *config, "--output_dir", tmp_path / "other", "--seed", 4)
    assert torch.equal(unet(first), unet(tmp_path / "again"))
    assert not torch.equal(unet(first), unet(tmp_path / "other"))
    written = {
        f: json.loads((tmp_path / f / "config.json").read_text()) for f in ("again", "other")
    }
    assert written["again"] | {"seed": 4} == written["other"]


def test_the_program_says_what_it_does_and_what_comes_next(program, tmp_path):
    out = tmp_path / "out"
    said = program(train, *runs.arguments(runs.settings(out, max_train_steps=1)))
    assert "identifier: 'sks' is 1 token" in said
    assert "3 photographs, 5 crops of 16² pixels; device cpu, precision no" in said
    settings = " ".join(said.split())
    for field in dataclasses.fields(TrainConfig):
        value = getattr(runs.config(out, max_train_steps=1), field.name)
        assert value in (None, ()) or f"{field.name} {value}" in settings
    commands = [
        line.split("python -m minibooth.")[1] for line in said.splitlines() if "-m " in line
    ]
    assert [c.split()[0] for c in commands] == ["sample", "convert"]


# ---- sample ------------------------------------------------------------------------------------


def draw(program, folder, *more, model=None):
    model = model or peers.model()[0]
    given = ["--model", model, "--output_dir", folder, "--steps", 2, "--device", "cpu"]
    return program(sample, *given, *more)


def test_sample_names_its_pictures_and_writes_into_them_how_to_draw_them(program, tmp_path):
    prompts = ["--prompt", "A sks dog, in the snow!", "--prompt", "a cat"]
    said = draw(program, tmp_path, *prompts, "--num_images", 2, "--seed", 5)
    names = {"a-sks-dog-in-the-snow-5.png", "a-sks-dog-in-the-snow-6.png"}
    names |= {"a-cat-5.png", "a-cat-6.png", "grid.png"}
    assert runs.files(tmp_path) == names
    assert said.strip() == f"4 pictures and grid.png in {tmp_path}"
    sd = runs.model("sd1")
    for name, prompt, seed in [
        ("a-sks-dog-in-the-snow-6.png", "A sks dog, in the snow!", 6),
        ("a-cat-5.png", "a cat", 5),
    ]:
        with Image.open(tmp_path / name) as image:
            assert image.text["prompt"] == prompt and image.text["seed"] == str(seed)
            assert image.text["model"] == peers.model()[0].name
            assert image.text["steps"] == "2" and image.text["sampler"] == "ddim"
            [again] = sd.generate([prompt], steps=2, seed=seed)
            # Drawn alone instead of beside another: the same up to rounding.
            difference = np.asarray(image, int) - np.asarray(again, int)
            assert abs(difference).max() <= 1
    with Image.open(tmp_path / "grid.png") as grid:
        assert min(grid.size) > 2 * 128


def test_sample_passes_every_setting_on(program, tmp_path):
    settings = ["--sampler", "ddpm", "--guidance_scale", 3, "--negative_prompt", "snow"]
    settings += ["--height", 16, "--width", 24, "--num_images", 3, "--batch_size", 2]
    draw(program, tmp_path, "--prompt", "a dog", *settings)
    drawn = runs.model("sd1").generate(
        ["a dog"] * 3,
        **{"sampler": "ddpm", "guidance_scale": 3, "negative_prompt": "snow", "steps": 2},
        **{"height": 16, "width": 24, "batch_size": 2},
    )
    for i, image in enumerate(drawn):
        assert Image.open(tmp_path / f"a-dog-{i}.png").tobytes() == image.tobytes()


def test_sample_never_overwrites_a_different_picture(program, tmp_path):
    one = ["--prompt", "a dog", "--num_images", 1]
    draw(program, tmp_path, *one)
    first = (tmp_path / "a-dog-0.png").read_bytes()
    draw(program, tmp_path, *one)
    assert runs.files(tmp_path) == {"a-dog-0.png", "grid.png"}
    draw(program, tmp_path, *one, "--steps", 3)
    draw(program, tmp_path, *one, "--steps", 4)
    assert runs.files(tmp_path) == {"a-dog-0.png", "a-dog-0-2.png", "a-dog-0-3.png", "grid.png"}
    assert (tmp_path / "a-dog-0.png").read_bytes() == first
    assert len({Image.open(f).tobytes() for f in tmp_path.glob("a-dog-*.png")}) == 3


def test_names_of_odd_prompts_are_names_of_files():
    assert sample.slug("../../etc/passwd") == "etc-passwd"
    assert sample.slug("Ein süßer Hund") == "ein-süßer-hund"
    assert sample.slug("") == sample.slug("???") == "empty"
    assert sample.slug("dog " * 100) == ("dog-" * 20)
    assert sample.slug("狗" * 78) == "狗" * 26  # file systems count bytes: 3 each


def test_a_long_prompt_of_other_letters_and_a_long_name_of_a_file_are_written(program, tmp_path):
    """File systems hold names of 255 bytes, the temporary ones included."""
    draw(program, tmp_path, "--prompt", "狗" * 78, "--num_images", 1)
    assert runs.files(tmp_path) == {f"{'狗' * 26}-0.png", "grid.png"}
    name = "犬" * 81 + ".safetensors"  # 255 bytes
    files.write_text(tmp_path / name, "whole")
    assert (tmp_path / name).read_text() == "whole"
    assert runs.files(tmp_path) == {f"{'狗' * 26}-0.png", "grid.png", name}


# ---- convert -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A trained model and, in one place, all that convert makes of it."""
    folder = tmp_path_factory.mktemp("convert")
    train.train(runs.config(folder / "out", kind="sd1", max_train_steps=1, train_text_encoder=True))
    return folder


def state(source):
    sd = load(source, tokenizer=peers.model()[0] / "tokenizer")
    return {f"{n}.{k}": v for n, net in sd.networks.items() for k, v in net.state_dict().items()}


def test_folder_and_file_convert_into_each_other_without_loss(program, model):
    tokenizer = ["--tokenizer", peers.model()[0]]
    file, folder = model / "fp32.safetensors", model / "back"
    said = program(convert, "--model", model / "out", "--output", file, "--dtype", "fp32")
    assert said.startswith(f"{file}: ") and said.strip().endswith("B")
    program(convert, "--model", file, "--output", folder, *tokenizer)
    program(convert, "--model", folder, "--output", model / "twice.safetensors", "--dtype=fp32")
    original, back = state(model / "out"), state(folder)
    assert original.keys() == back.keys()
    assert all(torch.equal(original[k], back[k]) for k in original)
    twice = state(model / "twice.safetensors")
    assert all(torch.equal(original[k], twice[k]) for k in original)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert torch.equal(runs.flat(peers.tensors(pipe.unet)), unet(model / "out"))


@pytest.mark.parametrize("dtype, stored", [(None, "F16"), ("bf16", "BF16"), ("fp32", "F32")])
def test_a_file_holds_what_was_asked_for_fp16_unless_said(program, model, dtype, stored):
    file = model / f"{stored}.safetensors"
    program(
        convert, "--model", model / "out", "--output", file, *(["--dtype", dtype] * bool(dtype))
    )
    with safe_open(file, "pt") as f:
        assert {f.get_slice(k).get_dtype() for k in f.keys()} == {stored}  # noqa: SIM118
    original, cast = state(model / "out"), state(file)
    kind = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[stored]
    assert all(torch.equal(original[k].to(kind).float(), cast[k]) for k in original)


def test_an_ending_in_capitals_is_a_file_as_well(program, model):
    file = model / "X.SAFETENSORS"
    program(convert, "--model", model / "out", "--output", file)
    assert file.is_file() and unet(file).shape == unet(model / "out").shape


def test_folder_and_file_draw_the_same_picture(program, model, tmp_path):
    """Both in fp16, as checkpoint-N and the file for other programs are."""
    program(convert, "--model", model / "out", "--output", tmp_path / "half", "--dtype", "fp16")
    program(convert, "--model", model / "out", "--output", tmp_path / "half.safetensors")
    prompt = ["--prompt", "a sks dog", "--num_images", 2]
    draw(program, tmp_path / "a", *prompt, model=tmp_path / "half")
    tokenizer = ["--tokenizer", peers.model()[0]]
    draw(program, tmp_path / "b", *prompt, *tokenizer, model=tmp_path / "half.safetensors")
    for name in ("a-sks-dog-0.png", "a-sks-dog-1.png"):
        a, b = (Image.open(tmp_path / x / name) for x in ("a", "b"))
        assert a.tobytes() == b.tobytes()
    assert len({Image.open(f).tobytes() for f in (tmp_path / "a").glob("a-*.png")}) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a card, triton can run")
def test_kernels_are_pytorchs_unless_asked_for_and_asking_in_vain_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "_mode", ops._mode)  # put back afterwards
    assert SampleConfig().kernels is None and TrainConfig().kernels is None
    folder, _ = peers.model("sd1")
    settings = {"model": str(folder), "prompt": ("a dog",), "output_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match="--kernels triton cannot run here"):
        sample.sample(SampleConfig(**settings, num_images=1, steps=1, kernels="triton"))
    assert len(sample.sample(SampleConfig(**settings, num_images=1, steps=1, kernels="auto"))) == 1
