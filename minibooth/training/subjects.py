"""Whom a run is taught: its subjects, by name, photographs and class, and their captions.

Several subjects stand in a JSON list, as --concepts_list of other trainers has them:

    [{"instance_prompt": "a sks dog", "class_prompt": "a dog", "instance_data_dir": "photos/dog"},
     {"instance_prompt": "a ohwx cat", "class_prompt": "a cat", "instance_data_dir": "photos/cat"}]
"""

import json
import os
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path

from ..common.errors import UserError, first_line
from ..common.files import read_text
from . import photos


@dataclass(frozen=True)
class Subject:
    """The settings of TrainConfig that are a subject's own."""

    instance_data_dir: str | None
    instance_prompt: str | None
    class_prompt: str | None = None
    class_data_dir: str | None = None

    def class_folder(self, output_dir: str) -> Path:
        return Path(self.class_data_dir or Path(output_dir) / "class_images")


KEYS = [field.name for field in fields(Subject)]
TABLE = "metadata.jsonl"  # of a folder of pictures, as Hugging Face's data sets have it


def read_list(path: str | Path) -> list[Subject]:
    """The subjects of a JSON list. Raises UserError for a file that is none."""
    try:
        entries = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"--concepts_list {path} is no JSON file: {first_line(e)}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"--concepts_list {path} is no list of subjects: [{{…}}, {{…}}]")
    return [read_entry(entry, f"--concepts_list {path}, {i}") for i, entry in enumerate(entries, 1)]


def read_entry(entry: dict, where: str) -> Subject:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {entry!r:.50} is no subject: {{{', '.join(KEYS)}}}")
    for key, value in entry.items():
        if key not in KEYS:
            raise UserError(f"{where}: a subject has no {key!r:.50}, but {', '.join(KEYS)}")
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise UserError(f"{where}: {key} = {value!r:.50} is no text")
    for key in ("instance_data_dir", "instance_prompt"):
        if entry.get(key) is None:
            raise UserError(f"{where} lacks {key}")
    places = ("instance_data_dir", "class_data_dir")
    return Subject(**entry | {k: os.path.expanduser(entry[k]) for k in places if entry.get(k)})


def check_folders(subjects: list[Subject], output_dir: str) -> None:
    """Raise UserError where two folders of a run are one, by whatever names and links: what is
    drawn would be the next run's photographs, and photographs class images. Subjects can share a
    folder of class images, but not those that the user put there for another class."""
    places, classes = [("--output_dir", output_dir)], {}
    for subject in subjects:
        places.append(("--instance_data_dir", subject.instance_data_dir))
        folder = os.path.realpath(subject.class_folder(output_dir))
        prompt = classes.setdefault(folder, subject.class_prompt)
        if prompt != subject.class_prompt and photos.own(folder):
            raise UserError(
                f"--class_data_dir {folder} holds class images of your own, which cannot be of "
                f"both {prompt!r} and {subject.class_prompt!r}: give each class its folder"
            )
    places += [("--class_data_dir", folder) for folder in classes]
    for (flag, folder), (other, there) in combinations(places, 2):
        if same_folder(folder, there):
            raise UserError(f"{other} {there} is {flag} {folder}: give each a folder of its own")


def same_folder(a: str, b: str) -> bool:
    return os.path.realpath(a) == os.path.realpath(b) or (
        os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)
    )


def captions(
    files: list[Path], extension: str | None, column: str | None = None
) -> list[str | None]:
    """Of each photograph what the text file beside it says, named alike but for `extension`: its
    first line; or what `column` says in its line of the folder's metadata.jsonl. None without one.
    Raises UserError for a caption that is empty or no text."""
    if column is not None:
        folders = {file.parent for file in files}
        tables = {folder: read_table(folder / TABLE, column) for folder in folders}
        return [tables[file.parent].get(file.name) for file in files]
    if extension is None:
        return [None] * len(files)
    return [caption(sidecar(file, extension)) for file in files]


def read_table(path: Path, column: str) -> dict[str, str]:
    """The captions of a metadata.jsonl by file name; a line is {"file_name": "1.jpg", …}. Raises
    UserError for a file that is none."""
    try:
        rows = [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"--caption_column: {path} cannot be read: {first_line(e)}") from None
    for i, row in enumerate(rows, 1):
        for key in ("file_name", column):
            text = row.get(key) if isinstance(row, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"--caption_column: {path}, entry {i} has no text as {key!r:.50}")
    return {row["file_name"]: row[column].strip() for row in rows}


def sidecar(file: Path, extension: str) -> Path:
    return file.with_suffix("." + extension.removeprefix("."))


def caption(path: Path) -> str | None:
    try:
        lines = read_text(path).strip().splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is no text in UTF-8: {first_line(e)}") from None
    if not lines:
        raise UserError(f"{path} is empty: write the caption of its photograph, or remove it")
    return lines[0].strip()


def about_captions(files: list[Path], found: list[str | None], asked: bool) -> str | None:
    """A line on where the photographs' prompts come from; None where there is nothing to say.
    `asked`: whether captions were to be read."""
    if not asked:
        beside = sum(sidecar(file, ".txt").exists() for file in files)
        if not beside:
            return None
        return (
            f"{beside} of {len(files)} photographs have a .txt beside them, which is not read: "
            "--caption_extension .txt takes it as the prompt of its photograph"
        )
    count = len(files) - found.count(None)
    return f"{count} of {len(files)} photographs have a caption, the others the instance prompt"


def require_word(files: list[Path], found: list[str | None], word: str) -> None:
    """Raise UserError where a caption does not have the word that is trained."""
    for file, text in zip(files, found, strict=True):
        if text and word.lower() not in text.lower():
            raise UserError(f"the caption of {file} does not have the word that is trained, {word}")


def identity(subjects: list[Subject], of_photo: list[int], found: list[str | None]) -> list | None:
    """What a run that goes on must have as before; None where other settings say it already.
    `of_photo` is the subject of each photograph, `found` its caption."""
    if len(subjects) == 1 and not any(found):
        return None
    return [[[s.instance_prompt, s.class_prompt] for s in subjects], of_photo, found]
