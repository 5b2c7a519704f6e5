"""Files that are whole or not there: atomic writes, folders for one program alone, free space."""

import codecs
import errno
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from .errors import UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


# Names of the models that are shipped → where in the toybox's folder they stand.
SHIPPED = {"toybox": "", "toybox-x4": "x4"}

LONGEST_NAME = 255  # bytes of UTF-8 in the name of a file or folder


def shortened(name: str, most: int) -> str:
    """The first letters of a name, as many as fit into so many bytes of UTF-8."""
    return name.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")


def named_after(folder: str | Path) -> str:
    """What a file is called that is a folder's result and may go elsewhere: by the folder's name,
    with room for an ending."""
    return shortened(os.path.basename(os.path.abspath(folder)), LONGEST_NAME - 55) or "model"


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; on success it becomes `path`, on failure it is removed.

    Whoever looks sees the old file or the new one, also after a crash in between. Raises UserError
    where the disk is full or the place cannot be written to.
    """
    path = Path(path)
    # In containers that share a folder, processes can have one number.
    own = f".{os.getpid()}{secrets.randbelow(10**6):06}.tmp"
    part = path.with_name(f".{shortened(path.name, LONGEST_NAME - 1 - len(own))}{own}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        advice = "make room on it" if e.errno == errno.ENOSPC else "choose another place"
        raise UserError(f"cannot write {path}: {e.strerror or e}; {advice}") from e
    finally:
        with suppress(OSError):  # where its folder could not be made there is nothing to remove
            part.unlink()


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """As `claimed`, but raises UserError where another process is in the folder."""
    with claimed(folder) as ours:
        if not ours:
            raise UserError(
                f"another run is at work in {folder}: wait for it, or give another --output_dir"
            )
        yield


@contextmanager
def claimed(folder: str | Path) -> Iterator[bool]:
    """Within it `folder` is there and, if what this gives is true, no other process is in here
    with it.

    Its file .lock is locked, which the system undoes however the process ends: a crash leaves an
    empty file that hinders nobody. If the folder was made for this and is empty after it, it is
    removed.
    """
    folder = Path(folder)
    made = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    try:
        with open(path, "a") as file:
            ours = lock(file, path)
            try:
                yield ours
            finally:
                if ours:
                    with suppress(OSError):  # Windows keeps files that are open
                        path.unlink()
    finally:
        with suppress(OSError):
            for empty in made:
                empty.rmdir()


def lock(file: TextIO, path: Path) -> bool:
    """Whether `file`, opened at `path`, is now this process's alone."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (BlockingIOError, PermissionError, FileNotFoundError):  # or it was just removed
        return False
    except OSError:  # a file system that has no locks: there is no telling
        return True


LARGEST_TEXT = 5 * 10**6  # bytes; the largest that is read is CLIP's vocabulary, 2 to 4 MB


def read_text(path: str | Path, errors: str = "strict") -> str:
    """A text in UTF-8, without the byte order mark that Windows puts before it. Raises UserError,
    after its first MB, where it is larger than any that belongs to a model or a run; OSError and,
    with the reason where it is UTF-16, UnicodeDecodeError."""
    with open(path, encoding="utf-8-sig", errors=errors) as f:
        try:
            text = f.read(LARGEST_TEXT + 1)
        except UnicodeDecodeError:
            if starts_as_utf16(path):
                raise is_utf16() from None
            raise
    if errors == "strict" and "\0" in text:  # UTF-16 without its mark: every other byte is 0
        raise is_utf16()
    if len(text) > LARGEST_TEXT:
        raise UserError(f"{path} is larger than {gigabytes(LARGEST_TEXT)}: not what it should be")
    return text


def starts_as_utf16(path: str | Path) -> bool:
    with open(path, "rb") as f:
        return f.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def is_utf16() -> UnicodeDecodeError:
    return UnicodeDecodeError("utf-8", b"\0\0", 0, 2, "it is UTF-16, save it as UTF-8")


def write_text(path: str | Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text, "utf-8")


def write_json(path: str | Path, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def portable(path: str | Path, folder: Path) -> str:
    """A path without the names of this machine and its user, as a file in `folder` can name it:
    ./… or ../… from there; ~/… where that would lead into the home folder from outside."""
    path, folder = (Path(os.path.abspath(p)) for p in (path, folder))
    home = Path(os.path.expanduser("~"))
    if path.is_relative_to(home) and not folder.is_relative_to(home):
        return f"~/{path.relative_to(home).as_posix()}"
    try:
        relative = Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive of Windows
        return str(path)
    return relative if relative.startswith("../") or relative == ".." else f"./{relative}"


def from_portable(path: str, folder: Path) -> str:
    """What `portable` was given, as seen from the current folder; another path or name as it is."""
    if path.startswith("~"):
        return os.path.expanduser(path)
    if not path.startswith(("./", "../")) and path != "..":
        return path
    whole, here = Path(os.path.normpath(os.path.abspath(folder / path))), Path.cwd()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else whole)


def require_space(path: str | Path, size: int) -> None:
    """Raise UserError unless the disk that `path` is on has `size` bytes and a little more free."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size + 2**20:
        raise UserError(
            f"not enough disk space for {path}: {gigabytes(size)} needed, {gigabytes(free)} free"
        )


def folder_size(folder: Path, pattern: str = "*") -> int:
    """Bytes of the files in it, at any depth."""
    return sum(f.stat().st_size for f in folder.rglob(pattern) if f.is_file())


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
