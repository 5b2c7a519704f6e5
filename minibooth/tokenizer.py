"""CLIP's byte-pair tokenizer: a prompt → 77 ids. "a sks dog" → bos, a, sks, dog, eos, padding.

The merging itself is the `tokenizers` library's; what makes it CLIP's is set out here.
"""

import json
import warnings
from pathlib import Path

import tokenizers as hf
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from .common.errors import UserError, first_line
from .common.files import read_text, write_text

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# Special tokens, English contractions, runs of letters, single digits, runs of anything else.
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class WordError(UserError):
    """A word that cannot be added, where another one can."""


class Tokenizer:
    """vocab: token → id; merges: pairs by rank; pad: the token that fills up to max_length.

    SD 1.x pads with the end token. SD 2.x pads with "!" (id 0), and since that makes "!" a special
    token, every "!" in an SD 2.x prompt becomes id 0 as well, as in the reference.

    added: words of Textual Inversion → id. Where there are also "<dog>_1", "<dog>_2" … the word
    has several vectors: "<dog>" in a prompt becomes the ids of all, as in diffusers.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        max_length: int = 77,
        pad: str = EOS,
        added: dict[str, int] | None = None,
    ):
        for token in (BOS, EOS, pad):
            if token not in vocab:
                raise UserError(f"the tokenizer's vocabulary has no {token!r}")
        self.vocab, self.merges, self.max_length, self.pad = vocab, merges, max_length, pad
        self.added = added or {}
        self.runs = {id: self.ids_of(word) for word, id in self.added.items()}
        bpe = hf.Tokenizer(
            models.BPE(
                vocab | self.added,
                merges,
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                fuse_unk=False,
                unk_token=EOS,
            )
        )
        bpe.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Replace(Regex(r"\s+"), " "),
                normalizers.Lowercase(),
            ]
        )
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        bpe.add_special_tokens(list(dict.fromkeys([BOS, EOS, pad])))
        # A bare word, as A1111 has them, must not be found inside another one.
        bpe.add_tokens([hf.AddedToken(w, single_word=w.isalnum()) for w in self.added])
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A {EOS}", special_tokens=[(BOS, vocab[BOS]), (EOS, vocab[EOS])]
        )
        self.bpe = bpe

    @classmethod
    def from_folder(cls, folder: str | Path, max_length: int = 77) -> "Tokenizer":
        """Read vocab.json and merges.txt, or the tokenizer.json that newer tools write instead.

        Raises UserError if the folder holds neither, or files that are not a CLIP vocabulary.
        """
        folder = Path(folder)
        try:
            if (folder / "vocab.json").exists():
                vocab = json.loads(read_text(folder / "vocab.json"))
                lines = read_text(folder / "merges.txt").split("\n")
                lines = [line for line in lines if line and not line.startswith("#version")]
            else:
                model = json.loads(read_text(folder / "tokenizer.json"))["model"]
                vocab, lines = model["vocab"], model["merges"]
            merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in lines]
            added = {w: i for w, i in added_words(folder).items() if w not in vocab}
            return cls(vocab, merges, max_length, pad_token(folder), added)
        except FileNotFoundError as e:
            raise UserError(
                f"{folder} is not a tokenizer: {Path(e.filename).name} is missing"
            ) from None
        except UserError as e:
            raise UserError(f"{folder} is not a CLIP tokenizer: {e}") from None
        except Exception as e:  # whatever json and tokenizers say of a damaged file
            raise UserError(f"{folder} cannot be read as a tokenizer: {first_line(e)}") from None

    def with_word(self, word: str, ids: list[int]) -> "Tokenizer":
        """A tokenizer that knows one word more, with an id for each of its vectors.

        Raises WordError for a word that is known already, or cannot be found in a prompt.
        """
        word = self.spelled(word)
        if not word or " " in word:
            raise WordError(f"{word!r} is not one word: give one such as <sks>")
        if {word, word + "</w>"} & {*self.vocab, *self.added}:
            raise WordError(
                f"the tokenizer knows {word!r} already: give another word, say <{word}>"
            )
        names = [word, *(f"{word}_{i}" for i in range(1, len(ids)))]
        added = self.added | dict(zip(names, ids, strict=True))
        return type(self)(self.vocab, self.merges, self.max_length, self.pad, added)

    def spelled(self, word: str) -> str:
        """A word as prompts are read: in small letters. diffusers looks for it in a prompt as it is
        typed, and for one that was written with capitals finds one of its vectors alone."""
        return self.bpe.normalizer.normalize_str(word)

    def ids_of(self, word: str) -> list[int]:
        """Of an added word: one id for each of its vectors."""
        ids = [self.added[word]]
        while (more := f"{word}_{len(ids)}") in self.added:
            ids.append(self.added[more])
        return ids

    def save(self, folder: str | Path) -> None:
        """Write the files that every reader of Stable Diffusion folders knows."""
        special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": self.pad}
        config = {
            **special,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": self.max_length,
            "tokenizer_class": "CLIPTokenizer",
        }
        merges = "\n".join(["#version: 0.2", *(" ".join(m) for m in self.merges)])
        texts = {
            "vocab.json": json.dumps(self.vocab, ensure_ascii=False),
            "merges.txt": merges + "\n",
            "special_tokens_map.json": json.dumps(special, indent=2),
            "tokenizer_config.json": json.dumps(config, indent=2),
        }
        if self.added:
            texts["added_tokens.json"] = json.dumps(self.added, indent=2, ensure_ascii=False)
        for name, text in texts.items():
            write_text(Path(folder) / name, text)

    def pieces(self, text: str) -> list[tuple[str, int]]:
        """The tokens of a text with their ids, without bos, eos and padding."""
        encoding = self.bpe.encode(text, add_special_tokens=False)
        pairs = zip(encoding.tokens, encoding.ids, strict=True)
        return [(token, i) for token, id in pairs for i in self.runs.get(id, [id])]

    def __call__(self, texts: list[str]) -> Tensor:
        """Texts → (B, 77) int64: bos, at most 75 tokens, eos, padding. Warns, in one line, of what
        it cuts off."""
        rows, cut = [], {}
        for text in texts:
            ids = [i for id in self.bpe.encode(text).ids for i in self.runs.get(id, [id])]
            if len(ids) > self.max_length:
                cut[text] = text[len(self.within(text)) :].strip()
                ids = [*ids[: self.max_length - 1], self.vocab[EOS]]
            rows.append(ids + [self.vocab[self.pad]] * (self.max_length - len(ids)))
        if cut:
            text, rest = next(iter(cut.items()))
            shown = text if len(text) <= 60 else text[:57] + "…"
            more = f" (as of {len(cut) - 1} more prompts)" if len(cut) > 1 else ""
            warnings.warn(
                f"only the first {self.max_length - 2} tokens count of the prompt {shown!r}{more}: "
                f"what has no effect is {rest if len(rest) <= 200 else rest[:197] + '…'!r}",
                stacklevel=1,  # one place, so that Python tells it once
            )
        return torch.tensor(rows, dtype=torch.int64)

    def within(self, text: str) -> str:
        """The part of a text that counts: up to the first word that is cut off, even in part."""
        encoding, used = self.bpe.encode(text, add_special_tokens=False), 0
        for i, id in enumerate(encoding.ids):
            used += len(self.runs.get(id, [id]))
            if used > self.max_length - 2:
                word = encoding.word_ids[i]
                first = i if word is None else encoding.word_ids.index(word)
                return text[: encoding.offsets[first][0]]
        return text


class PairedTokenizer(Tokenizer):
    """SDXL's, for two text encoders: one vocabulary, for the second padded with "!"."""

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.second = Tokenizer(self.vocab, self.merges, self.max_length, "!", self.added)

    def __call__(self, texts: list[str]) -> Tensor:
        """Texts → (B, 2, 77) int64."""
        return torch.stack([super().__call__(texts), self.second(texts)], dim=1)


def pad_token(folder: Path) -> str:
    """special_tokens_map.json wins over tokenizer_config.json, as in the reference."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            pad = json.loads(read_text(folder / name)).get("pad_token")
            if pad:
                return pad["content"] if isinstance(pad, dict) else pad
    return EOS


def added_words(folder: Path) -> dict[str, int]:
    """From whichever file they stand in: tools have changed their minds about it."""
    found = {}
    for name in ("added_tokens.json", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            content = json.loads(read_text(folder / name))
            if name == "added_tokens.json":
                found |= content
            for token in content.get("added_tokens", []):
                found[token["content"]] = token["id"]
            for id, token in content.get("added_tokens_decoder", {}).items():
                found[token["content"]] = int(id)
    return found
