"""train, sample and convert with the small files of LoRA and Textual Inversion, as a user does."""

import json
import re

import numpy as np
import peers
import pytest
import runs
import torch
from PIL import Image
from safetensors import safe_open

from minibooth import convert, load, lora, sample, train
from minibooth.formats import adapters

LORA = {"method": "lora", "rank": 2, "learning_rate": 0.05}
WORD = {"method": "textual_inversion", "placeholder_token": "<sks>", "initializer_token": "dog"}
WORD |= {"learnable_property": "prompt", "learning_rate": 0.1}
SHOWN = {"num_validation_images": 1, "checkpointing_steps": 2}
DRAW = {"steps": 2, "seed": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A LoRA of both networks and a word, in their folders, and what the trained models draw."""
    folder, drawn = tmp_path_factory.mktemp("trained"), {}
    for name, changes, prompt in (
        ("lora", LORA | {"train_text_encoder": True}, "a sks dog"),
        ("word", WORD | {"instance_prompt": "a <sks>"}, "a <sks>"),
    ):
        sd = runs.model("sd1")
        train.train(runs.config(folder / name, kind="sd1", **changes, **SHOWN), sd)
        drawn[name] = pixels(sd.generate([prompt], **DRAW)[0])
    return folder, drawn


@pytest.fixture
def program(monkeypatch, capsys):
    """Run one: status, what it printed, what it said was wrong."""
    return lambda *given: runs.program(monkeypatch, capsys, *given)


def pixels(image):
    return np.asarray(image, int)


def draw(program, folder, *more, prompt="a sks dog", model=None):
    """The picture, and what stands in it."""
    given = ["--model", model or peers.model()[0], "--output_dir", folder, "--prompt", prompt]
    given += ["--num_images", 1, "--steps", 2, "--device", "cpu"]
    status, _, err = program(sample, *given, *more)
    assert status == 0, err
    with Image.open(folder / f"{sample.slug(prompt)}-0.png") as image:
        return pixels(image), image.text


def far(a, b):
    return abs(a - b).max()


def test_a_run_leaves_grids_and_both_forms_and_no_model(trained):
    folder, _ = trained
    common = {"config.json", "README.md", "loss.csv", "loss.png", "before_after.png"}
    common |= {f"samples/{name}.png" for name in ("photographs", "step-00000", "step-00003")}
    for name, tag, file, of_diffusers in (
        ("lora", "diffusion, lora]", "lora", adapters.DIFFUSERS_LORA),
        ("word", "diffusion, textual_inversion]", "sks", adapters.DIFFUSERS_EMBEDDING),
    ):
        found = {f for f in runs.files(folder / name) if not f.startswith("state/")}
        snapshot = {f"{file}-2.safetensors", of_diffusers, "README.md"}
        snapshot = {f"checkpoint-2/{f}" for f in snapshot}
        assert found == common | {f"{file}.safetensors", of_diffusers} | snapshot
        first, last = (
            (folder / name / "samples" / f"step-0000{i}.png").read_bytes() for i in (0, 3)
        )
        assert first != last
        card = (folder / name / "README.md").read_text("utf-8")
        assert "![before and after]" in card and tag in card


def test_a_lora_says_what_it_is_where_other_programs_look(trained):
    """A1111 shows its name, its base and its tags; modelspec is Stability's."""
    folder, _ = trained
    for file, step in (("lora.safetensors", 3), ("checkpoint-2/lora-2.safetensors", 2)):
        with safe_open(folder / "lora" / file, "pt") as f:
            about = f.metadata()
        name = (folder / file).stem
        assert about["ss_output_name"] == about["modelspec.title"] == name
        assert about["ss_sd_model_name"] == peers.model()[0].name
        assert json.loads(about["ss_tag_frequency"]) == {"photographs": {"a sks dog": 1}}
        assert about["modelspec.trigger_phrase"] == "a sks dog"
        assert about["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert (about["ss_steps"], about["ss_max_train_steps"]) == (str(step), "3")
        assert about["ss_learning_rate"] == "0.05" and about["modelspec.resolution"] == "32x32"
        assert str(folder) not in str(about)


def test_strengths_go_from_the_base_to_what_was_trained(trained, program, tmp_path):
    folder, drawn = trained
    file = folder / "lora" / "lora.safetensors"
    base, about = draw(program, tmp_path / "base")
    assert "lora" not in about
    none, _ = draw(program, tmp_path / "0", "--lora", f"{file}:0")
    half, about = draw(program, tmp_path / "half", "--lora", f"{file}:.5")
    whole, _ = draw(program, tmp_path / "1", "--lora", file.parent)  # diffusers' form, strength 1
    twice, said = draw(program, tmp_path / "2", "--lora", f"{file}:.5", "--lora", f"{file}:0.5")
    assert about["lora"] == "lora.safetensors:0.5"
    assert said["lora"] == "lora.safetensors:0.5, lora.safetensors:0.5"
    assert far(none, base) == 0
    assert far(whole, drawn["lora"]) <= 1 and far(twice, whole) <= 1
    assert far(base, whole) > 20 and far(half, base) > 5 and far(half, whole) > 5


def test_a_word_is_drawn_with_either_of_its_files(trained, program, tmp_path):
    folder, drawn = trained
    picture, about = draw(program, tmp_path / "a", "--embedding", folder / "word", prompt="a <sks>")
    assert far(picture, drawn["word"]) <= 1 and about["embedding"] == "word"
    # A1111's form: there the file's name is the word.
    (folder / "word/sks.safetensors").rename(tmp_path / "my-dog.safetensors")
    given = ["--embedding", tmp_path / "my-dog.safetensors"]
    same, _ = draw(program, tmp_path / "b", *given, prompt="a my-dog")
    assert far(same, picture) == 0
    (tmp_path / "my-dog.safetensors").rename(tmp_path / "dog.safetensors")  # which CLIP knows
    given = ["--embedding", f"{tmp_path / 'dog.safetensors'}=<my-dog>"]
    same, about = draw(program, tmp_path / "c", *given, prompt="a <my-dog>")
    assert far(same, picture) == 0 and about["embedding"] == "dog.safetensors=<my-dog>"


def test_merged_is_what_it_is_drawn_with(trained, program, tmp_path):
    folder, _ = trained
    base, tokenizer = peers.model()[0], ["--tokenizer", peers.model()[0]]
    given = ["--model", base, "--merge_lora", f"{folder / 'lora'}:0.5", "--output"]
    with_it, _ = draw(program, tmp_path / "with", "--lora", f"{folder / 'lora'}:0.5")
    for out in (tmp_path / "merged", tmp_path / "merged.safetensors"):
        status, _, err = program(convert, *given, out, "--dtype", "fp32")
        assert status == 0, err
        merged, _ = draw(program, tmp_path / f"of-{out.name}", *tokenizer, model=out)
        assert far(merged, with_it) <= 1


def test_what_is_extracted_of_a_tuned_model_is_its_difference(trained, program, tmp_path):
    """Of one whose difference is of rank 2 it is all; and at rank 1 as much as the SVD says."""
    folder, _ = trained
    base, tuned = peers.model()[0], tmp_path / "tuned"
    assert (
        program(convert, "--model", base, "--merge_lora", folder / "lora", "--output", tuned)[0]
        == 0
    )
    wanted, _ = draw(program, tmp_path / "wanted", model=tuned)
    for out, rank in ((tmp_path / "x.safetensors", 2), (tmp_path / "x", 1)):
        given = ["--model", tuned, "--base", base, "--output", out, "--dtype", "fp32"]
        status, said, err = program(convert, *given, "--extract_lora", rank)
        assert status == 0, err
        shares = [float(x) for x in re.findall(r"([\d.]+)%", said)]
        before, after = load(base).networks, load(tuned).networks
        kept = whole = 0.0
        for name in ("unet", "text_encoder"):
            for layer in lora.layers(before[name]):
                a, b = (n[name].get_submodule(layer).weight.flatten(1) for n in (before, after))
                s = torch.linalg.svdvals((b - a).double()).square()
                kept, whole = kept + s[:rank].sum().item(), whole + s.sum().item()
        assert shares == pytest.approx([100 * (kept / whole) ** 0.5] * 2, abs=0.06)
        picture, _ = draw(program, tmp_path / f"with-{rank}", "--lora", out)
        assert (far(picture, wanted) <= 1) == (rank == 2)


@pytest.mark.parametrize(
    "given, said",
    [
        (["--lora", "{lora}/none"], "no such file"),
        (["--lora", "{lora}:much"], "'much' is no strength"),
        (["--lora", "{word}/learned_embeds.safetensors"], "<sks> is of no LoRA"),
        (["--embedding", "{lora}/lora.safetensors"], "does not hold the vectors of one word"),
        (["--lora", "{lora}", "--model", "toybox"], "or 1×1 convolution for unet.down"),
        (["--embedding", "{wide}"], "is for another model: its vectors have 7 numbers"),
        (["--embedding", "{word}", "--embedding", "{word}"], "<sks>"),
        (["--embedding", "{known}"], "knows 'dog' already: give another word, say <dog>, as --emb"),
        (["--embedding", "{word}=my dog"], "such as <sks>, as --embedding FILE=WORD"),
        (["--model", "{lora}"], "is a LoRA: give it as --lora"),
        (["--model", "{lora}/lora.safetensors"], "is a LoRA: give it as --lora"),
        (["--model", "{word}"], "is a word: give it as --embedding"),
    ],
)
def test_what_sample_cannot_use_is_said_in_one_line(given, said, trained, program, tmp_path):
    folder, _ = trained
    adapters.write_embedding(tmp_path / "wide.safetensors", "<w>", torch.ones(1, 7))
    places = {"lora": folder / "lora", "word": folder / "word"}
    places["wide"] = tmp_path / "wide.safetensors"
    places["known"] = tmp_path / "dog.safetensors"  # the file's name is the word
    adapters.write_embedding(places["known"], "emb_params", torch.ones(1, 32))
    given = [g.format(**places) for g in given]
    command = ["--model", peers.model()[0], "--prompt", "x", "--output_dir", tmp_path / "out"]
    status, _, err = program(sample, *command, *given)
    assert status == 2 and err.count("\n") == 1 and said.format(**places) in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given, said",
    [
        (["--extract_lora", 4], "give --extract_lora and --base together"),
        (["--base", "{base}"], "give --extract_lora and --base together"),
        (["--extract_lora", 0, "--base", "{base}"], "--extract_lora must be"),
        (["--extract_lora", 4, "--base", "{base}"], "differ in no layer"),
        (["--extract_lora", 4, "--base", "{sd2}"], "--base is no base of --model"),
        (["--extract_lora", 4, "--base", "{base}", "--merge_lora", "{lora}"], "merge first"),
        (["--merge_lora", "{lora}/none"], "no such file"),
        (["--merge_lora", "{lora}", "--model", "toybox"], "is for another model"),
        (["--merge_lora", "{lora}", "--model", "{lora}"], "is a LoRA"),
    ],
)
def test_what_convert_cannot_do_is_said_in_one_line(given, said, trained, program, tmp_path):
    folder, _ = trained
    places = {"lora": folder / "lora", "base": peers.model()[0], "sd2": peers.model("sd2")[0]}
    given = [str(g).format(**places) for g in given]
    out = tmp_path / "x.safetensors"
    status, _, err = program(convert, "--model", places["base"], "--output", out, *given)
    assert status == 2 and err.count("\n") == 1 and said in err, err
    assert not out.exists()
