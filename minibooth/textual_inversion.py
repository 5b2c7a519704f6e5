"""Textual Inversion (arXiv 2208.01618): train one word, and no weight of the model. Eq. 2 there:

    v* = argmin_v E[ ‖ε − ε_θ(x_t, t, c_θ(y))‖² ]        v: (n, D), the vectors of S* in a prompt y

It is DreamBooth's first term; the trained set is the n · D numbers that the text encoder looks up
for a word that did not exist before: 768 for one vector in SD 1.5, and 768 + 1280 in SDXL, whose
two text encoders each look it up. The word starts as a copy of one that says roughly what the
subject is. All the model's own weights stay exactly what they are, so no class can drift and there
is no prior term.

The new rows of the embedding are a tensor of their own while they train: an optimizer that had all
rows would change the others too, by weight decay, though their gradients are zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common.errors import UserError
from .formats.configs import family, misfit
from .pipeline import StableDiffusion
from .text_encoder import TextEncoder

OBJECT = """a photo of a {}, a rendering of a {}, a cropped photo of the {}, the photo of a {},
a photo of a clean {}, a photo of a dirty {}, a dark photo of the {}, a photo of my {},
a photo of the cool {}, a close-up photo of a {}, a bright photo of the {}, a cropped photo of a {},
a photo of the {}, a good photo of the {}, a photo of one {}, a close-up photo of the {},
a rendition of the {}, a photo of the clean {}, a rendition of a {}, a photo of a nice {},
a good photo of a {}, a photo of the nice {}, a photo of the small {}, a photo of the weird {},
a photo of the large {}, a photo of a cool {}, a photo of a small {}"""
STYLE = """a painting, a rendering, a cropped painting, the painting, a clean painting,
a dirty painting, a dark painting, a picture, a cool painting, a close-up painting,
a bright painting, a cropped painting, a good painting, a close-up painting, a rendition,
a nice painting, a small painting, a weird painting, a large painting"""
TEMPLATES = {  # the prompts of the paper's code; its list of styles has two of them twice
    "object": tuple(OBJECT.replace("\n", " ").split(", ")),
    "style": tuple(f"{p} in the style of {{}}" for p in STYLE.replace("\n", " ").split(", ")),
}


class Word(nn.Module):
    """The vectors of a new word, the one thing that is trained; fp32."""

    def __init__(self, vectors: Tensor, first: int):
        super().__init__()
        self.vectors = nn.Parameter(vectors)  # (n, D)
        self.first = first  # the id of its first vector: the model's own words are below it

    def look_up(self, embedding: nn.Module, inputs: tuple[Tensor], rows: Tensor) -> Tensor:
        """The embedding's forward hook: where an id is new, its row is ours. (B, 77, D)."""
        [ids] = inputs  # (B, 77)
        ours = F.embedding((ids - self.first).clamp(min=0), self.vectors)
        return torch.where((ids >= self.first)[..., None], ours.to(rows.dtype), rows)


def embedding_of(text_encoder: TextEncoder) -> nn.Embedding:
    return text_encoder.embeddings["token_embedding"]


def add_word(sd: StableDiffusion, word: str, vectors: Tensor | list[Tensor]) -> None:
    """From now on `word` can stand in prompts, for the n vectors, (n, D); `sd.save` keeps it.
    SDXL's words have two such tensors, one for each text encoder.

    Raises UserError where the word exists already or the vectors are for another model.
    """
    vectors = [vectors] if isinstance(vectors, Tensor) else vectors
    old = [embedding_of(encoder).weight for encoder in sd.text_encoders.values()]  # (ids, D)
    given, wanted = ([tensor.shape[1] for tensor in those] for those in (vectors, old))
    if given != wanted:
        other = misfit(family(given), family(wanted))
        given, wanted = (" and ".join(map(str, widths)) for widths in (given, wanted))
        raise UserError(
            f"{word} {other}: its vectors have {given} numbers, this one's words have {wanted}"
        )
    first, last = len(old[0]), len(old[0]) + len(vectors[0])
    sd.tokenizer = sd.tokenizer.with_word(word, list(range(first, last)))
    for name, rows, new in zip(sd.text_encoders, old, vectors, strict=True):
        rows = torch.cat([rows.detach(), new.detach().to(rows)])
        embeddings = sd.networks[name].embeddings
        embeddings["token_embedding"] = nn.Embedding.from_pretrained(rows)
        sd.configs[name] |= {"vocab_size": last}
    if (
        sd.text_encoder_2
    ):  # which pools at the end: unsaid, transformers takes the largest id for it
        sd.configs["text_encoder_2"] |= {"eos_token_id": sd.text_encoder_2.end}


def create(
    sd: StableDiffusion, word: str, initializer_token: str, vectors: int = 1
) -> dict[str, Word]:
    """Add a word that starts as a copy, or several, of another; what is to be trained of it, by
    text encoder.

    Raises UserError unless the initializer is a single token of the model's, or as `add_word`.
    """
    pieces = sd.tokenizer.pieces(initializer_token)
    if len(pieces) != 1:
        shown = ", ".join(token.removesuffix("</w>") for token, _ in pieces) or "none"
        raise UserError(
            f"--initializer_token {initializer_token!r} is {len(pieces)} tokens ({shown}): give a "
            "common word for what is to be learned, which is one"
        )
    if vectors < 1:
        raise UserError(f"{vectors} vectors: give a number from 1")
    [(_, id)] = pieces
    old = [embedding_of(encoder).weight for encoder in sd.text_encoders.values()]
    start = [rows[id].detach().float().repeat(vectors, 1) for rows in old]  # (n, D)
    add_word(sd, word, start)
    words = (Word(rows, first=len(before)) for rows, before in zip(start, old, strict=True))
    return dict(zip(sd.text_encoders, words, strict=True))


def attach(text_encoder: TextEncoder, word: Word) -> None:
    """From now on the text encoder looks the word up in what is being trained."""
    word.handle = embedding_of(text_encoder).register_forward_hook(word.look_up)


def detach(word: Word) -> None:
    """It looks the word up in its own embedding again; `store` first."""
    word.handle.remove()


@torch.no_grad()
def store(sd: StableDiffusion, words: dict[str, Word]) -> None:
    """Write the vectors into the embeddings, so that a model that is saved now knows them."""
    for name, word in words.items():
        rows = embedding_of(sd.networks[name]).weight
        rows[word.first :] = word.vectors.to(rows)
