"""Part 3 of tutorial.md. Fill in, then: python exercises/check.py text"""

from minibooth.tokenizer import BOS, EOS, Tokenizer


def rare_words(tokenizer: Tokenizer, count: int) -> list[str]:
    """The rarest words of three letters or fewer that are one token each, the rarest first.

    `tokenizer.vocab` maps a token to its id. A token that ends a word ends in "</w>". Merges are
    numbered by how often they were met: a high id is a rare word. The special tokens come last.
    """
    raise NotImplementedError


# ---- checks: no need to read on ----------------------------------------------------------------


def check_rare_words():
    merges = [("s", "k"), ("d", "o"), ("do", "g</w>"), ("sk", "s</w>"), ("o", "x</w>"), ("l", "o")]
    merges += [("lo", "n"), ("lon", "g</w>"), ("z", "z")]
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), BOS, EOS]
    tokenizer = Tokenizer({token: i for i, token in enumerate(tokens)}, merges)
    found = rare_words(tokenizer, 3)
    assert "zz" not in found, "zz is the beginning of a word, not one"
    assert "long" not in found, "long has four letters"
    assert not any("<" in word for word in found), "words, without </w>, and no special tokens"
    assert found == ["ox", "sks", "dog"], f"ox, sks and dog were wanted, not {found}"
