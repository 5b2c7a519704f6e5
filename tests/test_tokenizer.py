"""The tokenizer against published ids and against transformers' on made-up vocabularies."""

import gzip
import json
import warnings

import peers
import pytest
import torch
import transformers

from minibooth.common.errors import UserError
from minibooth.formats import vocabulary
from minibooth.tokenizer import Tokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
pytestmark = pytest.mark.filterwarnings("ignore:only the first 75 tokens")


# ---- the public vocabulary ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    """CLIP's own vocabulary, put together as the original code does it."""
    merges = gzip.decompress(vocabulary.MERGES.read_bytes()).decode("utf-8").split("\n")[1:48895]
    vocab, _ = peers.vocabulary()
    symbols = list(vocab)[:256]
    tokens = symbols + [s + "</w>" for s in symbols]
    tokens += [m.replace(" ", "") for m in merges] + [BOS, EOS]
    ids = {token: i for i, token in enumerate(tokens)}
    assert len(ids) == len(tokens) == 49408 and ids[BOS] == 49406 and ids["!"] == 0
    return ids, [tuple(m.split(" ")) for m in merges]


GOLDEN = {
    "a photograph of an astronaut riding a horse": "320 8853 539 550 18376 6765 320 4558",
    "": "",
    "don't you're I'LL we'VE": "847 713 592 982 328 1342 649 1200",
    "😀 smile 👩‍👩‍👧": "7334 3490 26304 26304 964 356",
    "café naïve coöperate": "15304 1097 35689 563 622 7255 703 671",
    "wow!!! ... ,,, (((masterpiece:1.2)))": "2781 995 678 14811 33287 12066 281 272 269 273 18305",
    "a photo of sks dog": "320 1125 539 48136 1929",
}


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(text, clip):
    ids = [49406, *map(int, GOLDEN[text].split()), 49407]
    row = Tokenizer(*clip)([text])
    assert row.dtype == torch.int64
    assert row.tolist() == [ids + [49407] * (77 - len(ids))]


def test_golden_ids_of_the_end_of_text_inside_a_stable_diffusion_2_prompt(clip):
    row = Tokenizer(*clip, pad="!")(["wow! a cat!!"])[0].tolist()
    assert row == [49406, 2781, 0, 320, 2368, 0, 0, 49407] + [0] * 69


# ---- transformers on made-up vocabularies ------------------------------------------------------

TEXTS = [
    "",
    " ",
    "a sks dog",
    "A SKS DOG IN THE SNOW",
    "  leading, trailing \t and\n\nmany   blanks  ",
    "no-break\u00a0space, thin\u2009space, ideographic\u3000space, next\u0085line, zero\u200bwidth",
    "don't you're I'LL we'VE he'd 'twas rock'n'roll dogs' 's 't ' '' '''s",
    "café naïve coöperate",
    "cafe\u0301 nai\u0308ve",  # decomposed: NFC joins them
    "Å ﬁ ½ ² Ⅷ ß ẞ İ ı Σς ΑΣ Ǆ",
    "привет мир שלום مرحبا नमस्ते สวัสดี 你好世界 こんにちは 한국어",
    "😀 smile 👩‍👩‍👧 🏳️‍🌈 ❤️ a😀b",
    "1234 3.14 1,000 x2 2x 4k 8K ٣ 五",
    "wow!!! ... ,,, (((masterpiece:1.2))) [a|b] {c} <d> a_b__c",
    "!",
    "a! b!! c !!! d",
    '#$%&*+-=@\\^`~ "quoted" «and» „so“ — – … ‽',
    "<|endoftext|>",
    "a <|endoftext|> dog",
    "a<|startoftext|>dog<|endoftext|>",
    "<|STARTOFTEXT|> a <|EndOfText|>",
    "<|endoftext| > <|end",
    "\x00 \x01\x1f \x7f \ufeff \ufffd \ue000",
    "snowsnow dogcat thethethe photoof",
    "photo of a sks dog in the snow, " * 3,
    "x" * 74,
    "a " * 75,
]
LONG = ["a " * 76, "dog " * 200, "!" * 300, "x" * 1000, "a <|endoftext|> " * 60]


def made_up(seed):
    """Another vocabulary: random merges over letters, punctuation and bytes of other scripts."""
    generator = torch.Generator().manual_seed(seed)
    symbols = list(peers.vocabulary()[0])[:256]
    tokens = symbols + [s + "</w>" for s in symbols]
    usual = [symbols.index(c) for c in "abcdefghijklmnopqrstuvwxyz!'.Ãģ©" if c in symbols]
    middle, last = [symbols[i] for i in usual], [symbols[i] + "</w>" for i in usual]
    merges = []
    while len(merges) < 300:
        pool = middle if torch.rand((), generator=generator) < 0.5 else last
        a, b = (p[torch.randint(len(p), (), generator=generator)] for p in (middle, pool))
        if a + b not in tokens:
            tokens.append(a + b)
            merges.append((a, b))
            (last if b.endswith("</w>") else middle).append(a + b)
    return {t: i for i, t in enumerate([*tokens, BOS, EOS])}, merges


def write(folder, vocab, merges, pad):
    peers.write_tokenizer(folder, pad)
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    text = "\n".join(["#version: 0.2", *(" ".join(m) for m in merges)])
    (folder / "merges.txt").write_text(text + "\n", "utf-8")


def reference(folder, texts):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    options = dict(padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return tokenizer(texts, **options).input_ids


@pytest.mark.parametrize("pad", [EOS, "!"])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_equal_to_transformers_on_odd_texts(seed, pad, tmp_path):
    if seed is None:
        peers.write_tokenizer(tmp_path, pad)
    else:
        write(tmp_path, *made_up(seed), pad)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.pad == pad
    ours = tokenizer(TEXTS + LONG)
    theirs = reference(tmp_path, TEXTS + LONG)
    for text, a, b in zip(TEXTS + LONG, ours.tolist(), theirs.tolist(), strict=True):
        assert a == b, text
    assert len(set(map(tuple, ours.tolist()))) > 20  # the texts are told apart


def test_equal_to_transformers_on_the_public_vocabulary(clip, tmp_path):
    vocab, merges = clip
    for pad in (EOS, "!"):
        write(tmp_path / pad[0], vocab, merges, pad)
        ours = Tokenizer.from_folder(tmp_path / pad[0])(TEXTS + LONG)
        assert torch.equal(ours, reference(tmp_path / pad[0], TEXTS + LONG))


@pytest.mark.parametrize("pad", [EOS, "!"])
def test_folders_that_hold_only_tokenizer_json(pad, tmp_path):
    """As transformers 5 writes them."""
    write(tmp_path / "old", *made_up(3), pad)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "old")
    theirs.save_pretrained(tmp_path / "new")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "new" / name).unlink(missing_ok=True)
    assert (tmp_path / "new" / "tokenizer.json").exists()
    ours = Tokenizer.from_folder(tmp_path / "new")
    assert ours.pad == pad
    assert torch.equal(ours(TEXTS), reference(tmp_path / "old", TEXTS))


@pytest.mark.parametrize("pad", [EOS, "!"])
def test_what_save_writes_loads_in_transformers_and_here(pad, tmp_path):
    ours = Tokenizer(*made_up(4), pad=pad)
    ours.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
    }
    assert torch.equal(ours(TEXTS), reference(tmp_path, TEXTS))
    assert torch.equal(ours(TEXTS), Tokenizer.from_folder(tmp_path)(TEXTS))
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 77 and theirs.pad_token == pad


def test_pad_tokens_may_be_written_out_and_the_map_wins(tmp_path):
    peers.write_tokenizer(tmp_path, EOS)
    spelled = {"content": "!", "lstrip": False, "normalized": False, "single_word": False}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": spelled}))
    assert Tokenizer.from_folder(tmp_path).pad == "!"
    (tmp_path / "special_tokens_map.json").unlink()
    assert Tokenizer.from_folder(tmp_path).pad == EOS
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).pad == EOS


def test_merges_of_a_windows_checkout(tmp_path):
    peers.write_tokenizer(tmp_path)
    want = Tokenizer.from_folder(tmp_path)(TEXTS)
    text = (tmp_path / "merges.txt").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "merges.txt").write_bytes(text)
    assert torch.equal(Tokenizer.from_folder(tmp_path)(TEXTS), want)


# ---- long prompts, pieces, errors --------------------------------------------------------------


def test_long_prompts_keep_75_tokens_and_the_end_and_warn():
    tokenizer = Tokenizer(*made_up(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["x " * 75])  # just fits
    with pytest.warns(UserWarning, match="only the first 75 tokens count") as caught:
        rows = tokenizer(["x " * 76, "y"])
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert str(caught[0].message).endswith("what has no effect is 'x'")
    x = tokenizer.vocab["x</w>"]
    assert rows[0].tolist() == [tokenizer.vocab[BOS], *[x] * 75, tokenizer.vocab[EOS]]
    assert rows.shape == (2, 77)


def test_the_part_of_a_prompt_that_counts_ends_before_the_first_word_that_is_cut():
    vocab, merges = peers.vocabulary()
    tokenizer = Tokenizer(
        vocab, [tuple(m.split()) for m in merges], added={"<s>": 400, "<s>_1": 401}
    )
    x = "a " * 72
    for text, counts in {
        f"{x}a sks dog": f"{x}a sks dog",
        f"{x} A  É  dog in": f"{x} A  É  ",  # É is two tokens: 73 to 75
        f"{x}a xyz": f"{x}a ",  # y and z are beyond
        f"{x}a sks <s>": f"{x}a sks ",  # its second vector is beyond
        "a" * 76: "",
    }.items():
        assert tokenizer.within(text) == counts
        with warnings.catch_warnings(record=True):
            [row] = tokenizer([text])
        [kept] = tokenizer([counts])
        n = int((kept != tokenizer.vocab[EOS]).sum())
        assert torch.equal(row[:n], kept[:n])


def test_pieces_show_how_an_identifier_falls_apart():
    vocab, merges = peers.vocabulary()
    tokenizer = Tokenizer(vocab, [tuple(m.split()) for m in merges])
    assert [p for p, _ in tokenizer.pieces("a sks dog")] == ["a</w>", "sks</w>", "dog</w>"]
    assert [p for p, _ in tokenizer.pieces("xyz")] == ["x", "y", "z</w>"]
    assert tokenizer.pieces("sks") == [("sks</w>", vocab["sks</w>"])]
    assert tokenizer.pieces("") == []


def test_max_length_is_the_text_encoder_s():
    assert Tokenizer(*made_up(0), max_length=9)(["a", "b c"]).shape == (2, 9)
    assert Tokenizer(*made_up(0))([]).dtype == torch.int64


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("vocab.json", None, "tokenizer.json is missing"),
        ("merges.txt", None, "merges.txt is missing"),
        ("vocab.json", "{", "cannot be read"),
        ("vocab.json", "[]", "CLIP tokenizer|cannot be read"),
        ("vocab.json", '{"a": "b"}', "CLIP tokenizer|cannot be read"),
        ("vocab.json", '{"a": 0}', "has no '<.startoftext.>'"),
        ("vocab.json", "[" * 100_000, "cannot be read"),
        ("merges.txt", "#version: 0.2\nonlyone\n", "cannot be read"),
        ("merges.txt", "#version: 0.2\nq zz\n", "cannot be read"),
        ("merges.txt", "\udcff\udcfe", "cannot be read"),
        ("special_tokens_map.json", "{", "cannot be read"),
        ("special_tokens_map.json", "[]", "cannot be read"),
        ("special_tokens_map.json", '{"pad_token": "<pad>"}', "has no '<pad>'"),
        ("special_tokens_map.json", '{"pad_token": {"a": 1}}', "cannot be read"),
    ],
)
def test_damaged_folders(name, text, words, tmp_path):
    peers.write_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(UserError, match=words) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
