"""A single file opens without a network: with CLIP's vocabulary, which is shipped, or its own."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import peers
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from weight_files import one_line

import minibooth
from minibooth.common.errors import UserError
from minibooth.formats import vocabulary
from minibooth.formats.public import SD1_TEXT, SD2_TEXT
from minibooth.tokenizer import EOS

ROOT = Path(__file__).parents[2]
TEXTS = [
    "a photo of a sks dog in the snow",
    "don't you're I'LL we'VE wow!!! ... (((masterpiece:1.2))) !",
    "café naïve coöperate 😀 👩‍👩‍👧 привет 你好世界 ½ ² İ ß",
    "<|endoftext|> a<|startoftext|>b <|END",
    "\x00\x7f\u00a0 \u200b\ufeff 1234 x2 4k",
    "a " * 100,
]


def public_files(folder: Path, pad: str) -> Path:
    """The hub's four files, from the vocabulary that the package ships."""
    vocab, merges = vocabulary.clip_vocabulary()
    peers.write_tokenizer(folder, pad)
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


# ---- CLIP's ------------------------------------------------------------------------------------


def test_the_shipped_vocabulary_is_the_public_one():
    vocab, merges = vocabulary.clip_vocabulary()
    assert len(vocab) == 49408 and sorted(vocab.values()) == list(range(49408))
    assert len(merges) == len(set(merges)) == 48894
    known = {"!": 0, "a</w>": 320, "photo</w>": 1125, "dog</w>": 1929, "sks</w>": 48136}
    known |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {token: vocab[token] for token in known} == known
    assert "MIT License" in (vocabulary.MERGES.parent / "LICENSE").read_text()


@pytest.mark.filterwarnings("ignore:only the first 75 tokens")
@pytest.mark.parametrize("config, pad", [(SD1_TEXT, EOS), (SD2_TEXT, "!")])
def test_it_equals_transformers_from_the_hubs_files(config, pad, tmp_path):
    theirs = transformers.CLIPTokenizer.from_pretrained(public_files(tmp_path, pad))
    assert theirs.get_vocab() == vocabulary.clip_vocabulary()[0]
    want = theirs(TEXTS, padding="max_length", max_length=77, truncation=True).input_ids
    assert vocabulary.clip_tokenizer({"text_encoder": config})(TEXTS).tolist() == want


def test_stable_diffusion_2_pads_with_token_0():
    both = ({"text_encoder": config} for config in (SD1_TEXT, SD2_TEXT))
    sd1, sd2 = (vocabulary.clip_tokenizer(configs)(["a dog"])[0].tolist() for configs in both)
    assert sd1 == [49406, 320, 1929] + [49407] * 74
    assert sd2 == [49406, 320, 1929, 49407] + [0] * 73


# ---- single files ------------------------------------------------------------------------------


def with_clips_vocabulary(kind: str) -> minibooth.StableDiffusion:
    """A small model whose text encoder knows CLIP's tokens."""
    sd = minibooth.load(peers.model(kind)[0])
    config = sd.configs["text_encoder"]
    embedding = sd.text_encoder.embeddings.token_embedding
    embedding.weight = torch.nn.Parameter(torch.randn(49408, config["hidden_size"]))
    config["vocab_size"] = 49408
    sd.tokenizer = vocabulary.clip_tokenizer(sd.configs)
    return sd


@pytest.mark.parametrize("kind, pad", [("sd1", EOS), ("sd2", "!")])
def test_a_file_with_clips_vocabulary_opens_with_it_and_says_nothing_of_it(kind, pad, tmp_path):
    sd, path = with_clips_vocabulary(kind), tmp_path / "x.safetensors"
    sd.save_single_file(path)
    with safe_open(path, "pt") as f:
        assert vocabulary.KEY not in f.metadata()
    again = minibooth.load(path)
    assert again.tokenizer.pad == pad
    assert torch.equal(again.tokenizer(["a sks dog!"]), sd.tokenizer(["a sks dog!"]))


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_file_with_another_vocabulary_brings_it_along(kind, tmp_path, no_warnings):
    folder, pipe = peers.model(kind)
    minibooth.load(folder).save_single_file(tmp_path / "x.safetensors")
    again = minibooth.load(tmp_path / "x.safetensors").tokenizer
    want = pipe.tokenizer(["a sks dog!", "xyz"], padding="max_length", max_length=77).input_ids
    assert again(["a sks dog!", "xyz"]).tolist() == want
    assert (again.vocab, again.pad) == (pipe.tokenizer.get_vocab(), pipe.tokenizer.pad_token)


def test_clips_vocabulary_with_another_padding_is_another(tmp_path):
    sd, path = with_clips_vocabulary("sd1"), tmp_path / "x.safetensors"
    sd.tokenizer = vocabulary.clip_tokenizer({"text_encoder": SD2_TEXT})
    sd.save_single_file(path)
    assert minibooth.load(path).tokenizer.pad == "!"


def test_the_toybox_as_a_single_file_is_whole(tmp_path):
    toy = minibooth.load("toybox")
    toy.save_single_file(tmp_path / "toy.safetensors", torch.float32)
    again = minibooth.load(tmp_path / "toy.safetensors")
    a, b = (sd.generate("a red dog", steps=2, output="pt") for sd in (toy, again))
    assert torch.equal(a, b)


def test_a_tokenizer_that_is_given_wins(tmp_path):
    path = tmp_path / "x.safetensors"
    with_clips_vocabulary("sd1").save_single_file(path)
    peers.write_tokenizer(tmp_path / "other")
    other = minibooth.load(path, tokenizer=tmp_path / "other").tokenizer
    assert len(other.vocab) == len(peers.vocabulary()[0])


def changed_metadata(path: Path, **changes) -> None:
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    for key, value in changes.items():
        metadata.pop(f"minibooth.{key}")
        if value is not None:
            metadata[f"minibooth.{key}"] = value
    save_file(load_file(path), path, metadata)


@pytest.mark.parametrize(
    "written, words",
    [
        (None, "tokens are not CLIP's: give --tokenizer"),
        ("[]", "damaged tokenizer"),
        ("{", "damaged metadata"),
        ("[" * 100_000, "damaged metadata"),
        ('{"vocab": 3, "merges": [], "pad": "!"}', "damaged tokenizer"),
        ('{"vocab": {"a": 0}, "merges": [], "pad": "!"}', "damaged tokenizer"),
        ('{"vocab": {"a": -1}, "merges": [["a"]], "pad": []}', "damaged tokenizer"),
    ],
)
def test_a_vocabulary_that_is_missing_or_damaged_is_said_in_one_line(written, words, tmp_path):
    path = tmp_path / "x.safetensors"
    minibooth.load(peers.model("sd1")[0]).save_single_file(path)
    changed_metadata(path, tokenizer=written)
    with pytest.raises(UserError, match=words) as error:
        minibooth.load(path)
    one_line(error)


def test_without_sockets_a_single_file_opens_and_nothing_is_tried(tmp_path):
    """In a process of its own, with an empty cache and no library told to stay offline."""
    with_clips_vocabulary("sd2").save_single_file(tmp_path / "x.safetensors")
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): sys.exit('the network was asked for')\n"
        "socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse\n"
        "import minibooth\n"
        "print(minibooth.load(sys.argv[1]).tokenizer.pad)\n"
    )
    env = {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "none"), "PATH": ""}
    command = [sys.executable, "-c", code, str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("!\n", 0), done.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_vocabulary_and_its_licence(tmp_path):
    """Needs hatchling from an index, as any build does."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*command, str(ROOT)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("LICENSE", "bpe_simple_vocab_16e6.txt.gz"):
        assert f"minibooth/formats/clip/{name}" in names
