"""What is printed and written: the paper's tables beside its numbers, and what was measured how."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from ..common.files import write_text
from .judges import Judge
from .metrics import METRICS, NEEDS, Mean
from .options import Options

Scores = dict[str, float]  # metric → value
Row = tuple[str, Scores, Scores]  # what it is, measured, published

# Tables 1, 3 and 4 of the paper: 30 subjects, 25 prompts, 4 pictures of each.
REAL = {"DINO": 0.774, "CLIP-I": 0.885}
DREAMBOOTH_SD = {"DINO": 0.668, "CLIP-I": 0.803, "CLIP-T": 0.305}
DREAMBOOTH_IMAGEN = {"DINO": 0.696, "CLIP-I": 0.812, "CLIP-T": 0.306}
TEXTUAL_INVERSION_SD = {"DINO": 0.569, "CLIP-I": 0.780, "CLIP-T": 0.255}
WITH_PRIOR = {"PRES": 0.493, "DIV": 0.391, "DINO": 0.684, "CLIP-I": 0.815, "CLIP-T": 0.308}
WITHOUT_PRIOR = {"PRES": 0.664, "DIV": 0.371, "DINO": 0.712, "CLIP-I": 0.828, "CLIP-T": 0.306}
NOUNS = {
    "correct": {"DINO": 0.744, "CLIP-I": 0.853},
    "none": {"DINO": 0.303, "CLIP-I": 0.607},
    "wrong": {"DINO": 0.454, "CLIP-I": 0.728},
}
METHODS = {  # --method → its row of Table 1, and the paper's numbers
    "dreambooth": ("DreamBooth (paper: SD)", DREAMBOOTH_SD),
    "lora": ("DreamBooth with LoRA", {}),
    "hypernetwork": ("DreamBooth with a hypernetwork", {}),
    "textual_inversion": ("Textual Inversion (paper: SD)", TEXTUAL_INVERSION_SD),
}


def table_1(real: dict[bool, Scores], ours: dict[str, Scores]) -> str:
    """`real` are the rows of the real photographs, with (True) and without (False) self-pairs;
    `ours` those of the methods that were trained, by --method."""
    rows = [(real_name(self_pairs), scores, REAL) for self_pairs, scores in real.items()]
    for method, scores in ours.items():
        name, published = METHODS[method]
        rows.append((name, scores, published))
    rows += [("paper: DreamBooth (Imagen)", {}, DREAMBOOTH_IMAGEN)]
    if "textual_inversion" not in ours:
        rows += [("paper: Textual Inversion (SD)", {}, TEXTUAL_INVERSION_SD)]
    return markdown(("DINO", "CLIP-I", "CLIP-T"), rows)


def table_3(with_prior: Scores, without_prior: Scores) -> str:
    rows = [
        ("with prior preservation (paper: Imagen)", with_prior, WITH_PRIOR),
        ("without (paper: Imagen)", without_prior, WITHOUT_PRIOR),
    ]
    return markdown(("PRES", "DIV", "DINO", "CLIP-I", "CLIP-T"), rows)


def table_4(ours: dict[str, Scores]) -> str:
    """`ours`: "correct", "none" and "wrong" → the scores with that class noun."""
    rows = [(f"class noun: {noun}", ours[noun], published) for noun, published in NOUNS.items()]
    return markdown(("DINO", "CLIP-I"), rows)


def real_name(self_pairs: bool) -> str:
    return f"real photographs, {'with' if self_pairs else 'without'} self-pairs"


def markdown(metrics: tuple[str, ...], rows: list[Row]) -> str:
    """A table that reads as plain text too. What was not measured or published is a dash."""

    def cells(scores: Scores) -> list[str]:
        return [f"{scores[m]:.3f}" if m in scores else "–" for m in metrics]

    lines = [["", *metrics]] + [[name, *cells(measured)] for name, measured, _ in rows]
    if any(published for *_, published in rows):
        lines[0] += [f"paper's {m}" for m in metrics]
        for line, (*_, published) in zip(lines[1:], rows, strict=True):
            line += cells(published)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    aligned = [
        [text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(both)]
        for both in (zip(line, widths, strict=True) for line in lines)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def stated(options: Options, judge: Judge) -> list[str]:
    """How the numbers came about: what the paper leaves open, and what is left out."""
    text = (
        "the prompt as it was drawn"
        if options.identifier_in_text
        else "the prompt without identifier"
    )
    lines = [f"measured with {judge.about}", f"CLIP-T's text is {text} (--identifier_in_text)"]
    for kind, why in judge.missing.items():
        metrics = ", ".join(m for m in METRICS if NEEDS[m] == kind)
        lines.append(f"{metrics} left out: {why}")
    return lines


def drawn_with(options: Options) -> str:
    return (
        f"drawn with {options.steps} DDIM steps, guidance {options.guidance_scale}, seeds from "
        f"{options.seed}; {options.class_images} pictures of the bare class"
    )


def write_csv(path: Path, columns: tuple[str, ...], rows: Iterable[tuple]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def values(scores: dict[str, Mean]) -> tuple:
    """The metrics in the order of METRICS; empty where not measured."""
    return tuple(f"{scores[m].value:.6f}" if m in scores else "" for m in METRICS)
