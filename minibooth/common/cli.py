"""What the programs share: a command line made from a dataclass, and one line for every mistake."""

import argparse
import ctypes
import dataclasses
import difflib
import errno
import io
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from .errors import Stopped, UserError, first_line
from .files import SHIPPED, from_portable, portable, read_text, write_json

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def option(
    default,
    help: str,
    choices: tuple | None = None,
    aliases: tuple[str, ...] = (),
    place: str | None = None,
    empty: bool = False,
    topic: str | None = None,
):
    """A dataclass field that is also a flag; the help gives its unit and what absent means. A
    `place` is a "path", or, where it can also be a name on the hub, a "source". `empty` is whether
    an empty text can be meant, as it can where it is the default. Where a field has a `topic`, that
    is the help's heading for it and for those after it, up to the next one."""
    extra = {"help": help, "choices": choices, "aliases": aliases, "place": place}
    extra |= {"empty": empty or default == "", "topic": topic}
    return dataclasses.field(default=default, metadata=extra)


class Parser(argparse.ArgumentParser):
    elsewhere: Mapping[str, str] = types.MappingProxyType({})  # others' flags → what to do here

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: --(\w+)", message)
        if unknown and (instead := self.instead_of(unknown[1])):
            message = f"there is no --{unknown[1]}: {instead}"
        raise UserError(f"{message} (--help lists the options)")

    def instead_of(self, name: str) -> str | None:
        """What to give in place of a flag that there is not."""
        flags = [flag.removeprefix("--") for flag in self._option_string_actions]
        near = difflib.get_close_matches(name, flags, n=1)
        return self.elsewhere.get(name) or (f"perhaps --{near[0]} is meant" if near else None)


def parse(
    cls,
    prog: str,
    description: str,
    argv: list[str] | None = None,
    defaults: Callable[[dict], dict] = lambda given: {},
):
    """Fill the dataclass `cls` from the command line: underscores or hyphens, as one likes.

    If `cls` has a field `config`, that JSON file is read first and the flags override it.
    `defaults(given)`, told what was given, returns the defaults that are to replace those of `cls`.
    """
    parser = group = Parser(
        prog=prog,
        usage=f"python -m {prog} --option value …",
        description=f"{description} Options take underscores or hyphens, and a "
        "switch --x has a --no_x.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.elsewhere = getattr(cls, "elsewhere", {}) | getattr(cls, "removed", {})
    hints = typing.get_type_hints(cls)
    # What is a program's own comes before what it shares with others.
    for field in sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__):
        if topic := field.metadata["topic"]:
            group = parser.add_argument_group(topic)
        flags = [f"--{name}" for name in (field.name, *field.metadata["aliases"])]
        help = field.metadata["help"].replace("%", "%%")
        if not isinstance(field.default, bool) and field.default not in (None, (), ""):
            help += f" [{field.default}]"
        kind, common = hints[field.name], {"dest": field.name, "default": argparse.SUPPRESS}
        if kind is bool:
            off = [flag.replace("--", "--no_", 1) for flag in flags]
            help += f"; {off[0]} switches it off" * field.default
            group.add_argument(*flags, action="store_true", help=help, **common)
            group.add_argument(*off, action="store_false", help=argparse.SUPPRESS, **common)
            continue
        kind = given_kind(kind)
        of = typing.get_args(kind)  # of a tuple, given at once; or one by one, if any number can be
        single = of[0] if of else kind
        group.add_argument(
            *flags,
            type=single,
            action="append" if Ellipsis in of else "store",
            nargs=len(of) if of and Ellipsis not in of else None,
            choices=field.metadata["choices"],
            metavar=None if field.metadata["choices"] else single.__name__.upper(),
            help=help,
            **common,
        )
    group.add_argument("-h", "--help", action="help", help="these lines")
    argv = sys.argv[1:] if argv is None else argv
    if odd := [a for a in argv if re.search("[\ud800-\udfff]", a)]:  # bytes that are no letters
        raise UserError(
            f"{odd[0]!a} is not text in this terminal's encoding: set PYTHONUTF8=1 if it is "
            "UTF-8, or give the file another name"
        )
    given = vars(parser.parse_args([underscored(a) for a in argv]))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    given = {name: at_home(cls, name, value) for name, value in given.items()}
    check_filled(cls, given)
    if "config" in given:
        given = {**read_config(Path(given["config"]), cls), **given}
    return cls(**{**defaults(given), **given})


def given_kind(kind):
    """The type of what is given for a field that may also be None."""
    return typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind


def at_home(cls, name: str, value):
    """A place with the home folder for ~, which a shell leaves there in --name=~/x."""
    if cls.__dataclass_fields__[name].metadata["place"] is None:
        return value
    several = tuple(map(os.path.expanduser, value)) if isinstance(value, tuple) else value
    return os.path.expanduser(value) if isinstance(value, str) else several


def underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def read_config(path: Path, cls) -> dict:
    """The settings in a config.json that a run wrote, checked against the fields of `cls`.

    One that was removed from `cls` may be there with the value that holds now: what `cls` has by
    its name, or None. That is said in a line, once however often a program reads the file.
    """
    try:
        settings = dict(json.loads(read_text(path)))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is not a config file: {first_line(e)}") from None
    hints = typing.get_type_hints(cls)
    places = {field.name for field in dataclasses.fields(cls) if field.metadata["place"]}
    removed = {key: settings.pop(key) for key in getattr(cls, "removed", {}) if key in settings}
    for key, value in removed.items():
        if value != getattr(cls, key, None):
            raise UserError(
                f"{path} has {key} = {value!r:.80}, and there is no --{key} any more: "
                f"{cls.removed[key]}"
            )
    if removed:
        names = " and no ".join(f"--{key}" for key in removed)
        text = f"{path}: there is no {names} any more; every run is as it says"
        warnings.warn(text, stacklevel=1)
    for key, value in settings.items():
        if key not in hints:
            raise UserError(f"{path} has a setting that does not exist: {key:.80}")
        if isinstance(value, list):
            settings[key] = value = tuple(value)
        kind = hints[key]
        allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        allowed = tuple(typing.get_origin(k) or k for k in allowed)
        if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
            continue
        of = typing.get_args(given_kind(kind))
        wrong = isinstance(value, tuple) and not all(type(v) in of for v in value)
        wrong |= not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)
        if wrong:
            raise UserError(f"{path}: {key} = {value!r:.80} has the wrong type")
        if key in places and value is not None:
            settings[key] = from_portable(value, path.parent)
    return settings


def write_config(path: Path, config) -> None:
    """Its settings, for --config, in a JSON file whose folder can be shown to others."""
    settings = dataclasses.asdict(config)
    for field in dataclasses.fields(config):
        value, place = settings[field.name], field.metadata["place"]
        # A source that is no file is an id on the hub, or a model that is shipped.
        found = place == "source" and value not in (None, *SHIPPED) and Path(value).exists()
        if found or (place == "path" and value is not None):
            settings[field.name] = portable(value, path.parent)
    settings.pop("config", None)
    write_json(path, settings)


def pick_device(name: str) -> torch.device:
    """Auto is CUDA, else Apple's MPS, else the CPU. Raises UserError for one that is not there.

    A GPU has its number, which some of PyTorch's functions want, and is the current one from now
    on: streams and graphs belong to the current device, whatever tensors they are for.
    """
    count = {
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if name == "auto":
        name = next(kind for kind in count if count[kind])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in count:
        raise UserError(f"device {name!r}: give auto, cuda, mps or cpu")
    if (device.index or 0) >= count[device.type]:
        raise UserError(f"there is no device {name} here: leave --device out")
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_filled(cls, settings: dict) -> None:
    """Raise UserError for a text that is empty and cannot be meant to be: an unset "$VARIABLE"
    would name the current folder."""
    for name, value in settings.items():
        texts = value if isinstance(value, tuple) else (value,)
        blank = any(isinstance(text, str) and not text.strip() for text in texts)
        if blank and not cls.__dataclass_fields__[name].metadata["empty"]:
            raise UserError(
                f"--{name} is empty: is a variable unset? Leave it out, or give a value"
            )


def check_choices(config) -> None:
    """Raise UserError for a field with choices that holds something else: a config file can; and
    for an empty one."""
    check_filled(type(config), vars(config))
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise UserError(f"--{field.name} {value!r}: give one of {', '.join(choices)}")


def check_at_least_one(config, names: Iterable[str]) -> None:
    """Raise UserError for a field that is smaller than 1; None is left alone."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1")


def numbers(flag: str, given: str, kind: type) -> tuple:
    """ "1,2,1" as numbers; none if it is empty. Raises UserError."""
    try:
        return tuple(map(kind, given.split(","))) if given else ()
    except ValueError:
        raise UserError(f"{flag} {given!r}: give numbers with commas between") from None


def check_folder(flag: str, folder: str | Path, file: str = "file") -> None:
    """Raise UserError unless `folder` can be made and `file` written into it. It is not made yet:
    what is missing is tried in a folder beside it, which is removed again."""
    path, missing = os.path.abspath(folder), []
    while not os.path.exists(path) and path != os.path.dirname(path):
        path, name = os.path.split(path)
        missing.insert(0, name)
    if not os.path.isdir(path):
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise UserError(f"{flag} {folder}: {path} {what}, give a folder")
    try:
        with tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=path) as trial:
            tried = Path(trial, *missing)
            tried.mkdir(parents=True, exist_ok=True)
            (tried / file).touch()
    except OSError as e:
        raise UserError(
            f"{flag} {folder}: {path} cannot be written to ({e.strerror}), give another folder"
        ) from None


def pasted(text: str | Path) -> str:
    """It as one word of a line to be pasted into this system's shell: on Windows PowerShell."""
    text, windows = str(text), sys.platform == "win32"
    if re.fullmatch(r"[\w@%+=:,./\\-]+" if windows else r"[\w@%+=:,./-]+", text):
        return text
    if not re.search(r'["$`“”„]' if windows else r'["$`\\!]', text):
        return f'"{text}"'
    return "'" + text.replace("'", "''") + "'" if windows else shlex.quote(text)


def copying(file: str | Path, folder: str) -> str:
    """A line for this system's shell that copies a file into a folder, wherever it is pasted."""
    windows = sys.platform == "win32"
    folder = folder.replace("/", "\\") if windows else folder
    return f"{'copy' if windows else 'cp'} {pasted(os.path.abspath(file))} {folder}"


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(sign in str(error) for sign in ("allocate memory", "out of memory", "ALLOC_FAILED"))
    )


def keep_freed_memory() -> None:
    """Have the C library keep memory that is freed, for the next step's tensors.

    glibc returns large blocks to the system at once, and the next step pays for every page of them
    anew. Blocks of up to 32 MB, the most that can be asked for, now stay, 256 MB of them at most.
    Does nothing where there is no glibc.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 256 * 2**20)


def replace_what_cannot_be_shown() -> None:
    """A letter that the console's encoding lacks is printed as "?", as stderr has its own way to: a
    run must not end in the middle for it. Windows has 256 letters where stdout is a pipe."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def run(prog: str, main: Callable[[], None], stopped: str | None = None) -> None:
    """Call `main`; a mistake that the user can mend becomes one line and exit status 2, Ctrl-C and
    SIGTERM one line and 130 or 143: `stopped`, or what the exception says."""

    def warn(message, *_):
        tqdm.write(f"{prog}: warning: {message}", file=sys.stderr)

    def terminate(number: int, _):
        raise Stopped(status=128 + number)

    warnings.showwarning = warn
    signal.signal(signal.SIGTERM, terminate)
    keep_freed_memory()
    replace_what_cannot_be_shown()
    try:
        main()
        return
    except KeyboardInterrupt as e:
        line, status = stopped or str(e) or "stopped", getattr(e, "status", 130)
    except UserError as e:
        line, status = str(e), 2
    except Exception as e:
        if is_out_of_memory(e):
            line = "out of memory: draw fewer or smaller pictures at once, or use a smaller model"
        elif isinstance(e, OSError) and e.errno == errno.ENOSPC:
            line = "the disk is full: make room on it"
        elif isinstance(e, OSError) and e.filename:
            line = f"{e.filename}: {e.strerror}"
        else:
            raise
        status = 2
    print(f"{prog}: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(status)
