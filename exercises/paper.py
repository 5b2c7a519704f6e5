"""Part 8 of tutorial.md: what popular summaries of the paper get wrong.

Each of these can be found in print. Look it up in the paper (arXiv 2208.12242 v2), write True or
False behind it, then: python exercises/check.py paper
"""

CLAIMS: dict[str, bool | None] = {
    "The prior term is a KL divergence between the old and the new model.": None,
    "The prior term is the training loss again, on samples that the model drew before.": None,
    "The class images are photographs of other members of the class.": None,
    "Each term of Eq. 2 has a timestep and a noise of its own.": None,
    "DreamBooth on Stable Diffusion reaches a DINO score of .696.": None,
    "DreamBooth on Stable Diffusion reaches a DINO score of .668.": None,
    "Prior preservation raises the subject's DINO score.": None,
    "Prior preservation raises DIV, the diversity of the pictures.": None,
    "The learning rate for Stable Diffusion is 1e-5.": None,
    "The paper trains with AdamW, batch size 1 and guidance 7.5.": None,
    "The paper's range of rare token ids also holds for CLIP's tokenizer.": None,
    "The text encoder has to be trained.": None,
}


# ---- check: no need to read on -----------------------------------------------------------------

ANSWERS = 0b000010101010  # from the last claim to the first, so that one does not read it here


def check_claims():
    if None in CLAIMS.values():
        raise NotImplementedError
    for i, (claim, said) in enumerate(CLAIMS.items()):
        assert said == bool(ANSWERS >> i & 1), f"look again at: {claim}"
