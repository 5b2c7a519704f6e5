"""The data set: its folder of photographs per subject, and its file of prompts and class nouns.

google/dreambooth keeps both under dataset/; a folder that holds them directly is as good, and the
toybox's subjects lie in the same layout.
"""

import difflib
import random
import re
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import UserError
from ..training import photos

FILE = "prompts_and_classes.txt"
LIVE = ("cat", "dog")  # the file has two lists of prompts and does not say whose is which
TEMPLATE = re.compile(r"'([^'\n]*)'\.format\(unique_token, class_token\)")


@dataclass(frozen=True)
class Catalogue:
    """What the file says. A template holds {0} for the identifier and {1} for the class noun."""

    nouns: dict[str, str]  # subject → class noun
    object_prompts: tuple[str, ...]
    live_prompts: tuple[str, ...]

    def prompts(self, noun: str) -> tuple[str, ...]:
        return self.live_prompts if noun in LIVE else self.object_prompts


@dataclass(frozen=True)
class Subject:
    name: str
    noun: str
    folder: Path  # its photographs
    prompts: tuple[str, ...]  # templates

    @property
    def class_prompt(self) -> str:
        return fill("a {0} {1}", "", self.noun)


def fill(template: str, identifier: str, noun: str) -> str:
    """The prompt; without identifier or noun where these are empty."""
    return " ".join(template.format(identifier, noun).split())


def dataset_folder(data: str | Path) -> Path:
    """Where the file and the subjects' folders lie. Raises UserError if the file is not there."""
    data = Path(data)
    for folder in (data / "dataset", data):
        if (folder / FILE).is_file():
            return folder
    raise UserError(
        f"{data} holds no {FILE}, nor does its dataset/: give a checkout of google/dreambooth"
    )


def read_catalogue(path: Path) -> Catalogue:
    """Raises UserError if the file is not like the data set's own."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read: {e}") from None
    parts = re.split(r"^(Classes|Object Prompts|Live Subject Prompts)\s*$", text, flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    lines = re.findall(r"^([\w-]+),(.+?)\s*$", sections.get("Classes", ""), re.M)
    nouns = {name: noun for name, noun in lines if name != "subject_name"}
    prompts = [
        tuple(TEMPLATE.findall(sections.get(title, "")))
        for title in ("Object Prompts", "Live Subject Prompts")
    ]
    if not nouns or not all(prompts):
        raise UserError(
            f'{path} is damaged: it should list "Classes", "Object Prompts" and '
            '"Live Subject Prompts"'
        )
    return Catalogue(nouns, *prompts)


def find(data: str | Path, names: str | None = None) -> tuple[list[Subject], list[str]]:
    """The subjects to evaluate, and the names of those that the file has and `data` has not.

    `names` chooses some, with commas between; else all that are there are taken. A folder is a
    subject's if it has exactly its name. Raises UserError for a name that is no subject, a folder
    that is missing or seems misspelled, and a folder without photographs.
    """
    folder = dataset_folder(data)
    catalogue = read_catalogue(folder / FILE)
    there = {f.name for f in folder.iterdir() if f.is_dir()}
    chosen = [name.strip() for name in names.split(",")] if names else catalogue.nouns
    wanted = list(dict.fromkeys(chosen))
    for name in wanted:
        if name not in catalogue.nouns:
            hint = did_you_mean(name, catalogue.nouns)
            raise UserError(f"{name!r} is no subject of {folder / FILE}{hint}")
    absent = [name for name in wanted if name not in there]
    strays = there - catalogue.nouns.keys()
    for name in absent:
        if names or did_you_mean(name, strays):
            hint = did_you_mean(name, strays, "is it")
            raise UserError(f"{folder} has no folder {name} with its photographs{hint}")
    found = []
    for name in wanted:
        if name in there:
            photos.image_files(folder / name)
            noun = catalogue.nouns[name]
            found.append(Subject(name, noun, folder / name, catalogue.prompts(noun)))
    if not found:
        held = ", ".join(sorted(there)[:3]) or "none"
        raise UserError(f"{folder} has no folder of any subject (its folders: {held})")
    return found, absent


def did_you_mean(name: str, names, question: str = "did you mean") -> str:
    lower = {n.lower(): n for n in sorted(names)}
    near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.75)
    return f": {question} {' or '.join(lower[n] for n in near)}?" if near else ""


def wrong_noun(subject: Subject, nouns: dict[str, str]) -> str:
    """A class noun of another class (Table 4), always the same for a subject."""
    others = sorted(set(nouns.values()) - {subject.noun})
    return random.Random(f"wrong noun of {subject.name}").choice(others)
