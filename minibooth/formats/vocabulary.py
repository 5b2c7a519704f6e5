"""The tokenizer of a single file, whose layout has no place for one.

All public ones use CLIP's vocabulary, which is shipped (clip/, with its licence). A model with
another, such as the toybox, keeps its own in the file's metadata.
"""

import functools
import gzip
import json
from pathlib import Path

from ..common.errors import UserError, first_line
from ..tokenizer import BOS, EOS, PairedTokenizer, Tokenizer
from .tensor_files import json_metadata

KEY = "minibooth.tokenizer"
MERGES = Path(__file__).parent / "clip" / "bpe_simple_vocab_16e6.txt.gz"
MERGED = slice(1, 48_895)  # its lines that CLIP uses, of 262,145


@functools.cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """49,408 tokens with their ids, and the merges: as in the hub's vocab.json and merges.txt."""
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").split("\n")[MERGED]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable]  # a letter for each byte, those that cannot be seen last
    letters += [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += [line.replace(" ", "") for line in lines] + [BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, [tuple(line.split()) for line in lines]


def kind(configs: dict[str, dict]) -> type[Tokenizer]:
    """Of a model of these: for one text encoder, or for two."""
    return PairedTokenizer if "text_encoder_2" in configs else Tokenizer


def clip_tokenizer(configs: dict[str, dict]) -> Tokenizer:
    """CLIP's, padding as the public models do: SD 2.x, known by its exact GELU, with "!"."""
    text = configs["text_encoder"]
    pad = "!" if text.get("hidden_act") == "gelu" else EOS
    return kind(configs)(*clip_vocabulary(), text.get("max_position_embeddings", 77), pad)


def to_metadata(tokenizer: Tokenizer, configs: dict[str, dict]) -> dict[str, str]:
    """What a single file must say of its tokenizer: nothing if it is CLIP's."""
    usual = clip_tokenizer(configs)
    if (tokenizer.vocab, tokenizer.merges, tokenizer.pad) == (*clip_vocabulary(), usual.pad):
        return {}
    own = {"vocab": tokenizer.vocab, "merges": tokenizer.merges, "pad": tokenizer.pad}
    return {KEY: json.dumps(own, ensure_ascii=False)}


def from_metadata(path: Path, metadata: dict[str, str], configs: dict[str, dict]) -> Tokenizer:
    """The tokenizer of a single file. Raises UserError where its own is damaged, and where it has
    none and cannot use CLIP's."""
    text = configs["text_encoder"]
    if KEY not in metadata:
        if text["vocab_size"] < len(clip_vocabulary()[0]):
            raise UserError(
                f"{path} holds no vocabulary, and its {text['vocab_size']} tokens are not "
                "CLIP's: give --tokenizer with the folder of one, to train it to minibooth.convert"
            )
        return clip_tokenizer(configs)
    own = json_metadata(path, metadata, KEY)
    try:
        merges = [tuple(merge) for merge in own["merges"]]
        length = text.get("max_position_embeddings", 77)
        return kind(configs)(own["vocab"], merges, length, own["pad"])
    except Exception as e:  # whatever tokenizers says of a damaged vocabulary
        raise UserError(
            f"{path} has a damaged tokenizer in its metadata: {first_line(e)}"
        ) from None
