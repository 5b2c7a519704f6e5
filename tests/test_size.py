"""The promises about size and shape: a core short enough to read, imports in one direction."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "minibooth", ROOT / "kernels" / "minibooth_kernels"
CORE = ["schedule", "text_encoder", "vae", "unet", "dreambooth"]
# From what stands alone to what uses all of it: a module or room imports only from those above it.
ORDER = [
    "common",
    *("schedule", "tokenizer", "ops", "text_encoder", "vae", "unet"),
    *("lora", "hypernetwork"),
    "formats",
    *("pipeline", "dreambooth", "textual_inversion", "upscaler"),
    *("device", "training", "explain", "toybox"),
    *("train", "sample", "convert", "classify"),
    *("evaluate", "bench", "__init__"),
]
INSIDE = {  # the same within a room
    "common": ["errors", "files", "pictures", "sheets", "cli", "trees", "forwards"],
    "formats": [
        *(
            "tensor_files",
            "public",
            "configs",
            "hub",
            "ldm",
            "vocabulary",
            "adapters",
            "checkpoint",
        ),
        *("hypernetworks", "folders", "single_files", "families", "sources", "scheduler"),
        *("checks", "saving", "parts"),
    ],
    "device": [
        *("no_gpu", "precision", "memory", "ranks", "graphs", "beside", "verdicts", "trial"),
        "settle",
    ],
    "training": [
        *("events", "photos", "subjects", "elsewhere", "settings", "passes", "class_images"),
        *("data", "second_stage"),
        *("eight_bit", "optimizer", "in_backward", "by_kernel", "parameters", "plan", "fit"),
        *("on_cpu", "report", "curve", "methods", "resume", "snapshots", "start", "stop", "loss"),
        *("enlarging", "prepare", "grids", "finite"),
    ],
    "bench": [
        *("measure", "chart", "check", "kernels", "models", "sides", "peers", "run", "memory"),
        *("no_card", "counter", "launches", "parts", "first"),
    ],
    "explain": ["microscope", "page", "first_step"],
}
READ = [
    *CORE,
    "tokenizer",
    "ops",
    "pipeline",
    "lora",
    "textual_inversion",
    "hypernetwork",
    "upscaler",
]  # imports no room but these
ROOMS_READ = {"common", "formats"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def code_lines(source: str) -> int:
    """Lines with code on them: no blank lines, comments or docstrings."""
    lines = set()
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*silent, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def imports(path: Path, root: Path = ROOT) -> set[str]:
    """Absolute names of all that a file imports, at its top or inside a function."""
    package = path.relative_to(root).parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def place(name: str) -> str | None:
    """minibooth.training.data.rng → training; what the package itself defines → __init__."""
    package, _, rest = name.partition(".")
    if package != "minibooth":
        return None
    first = rest.partition(".")[0]
    exists = (PACKAGE / f"{first}.py").exists() or (PACKAGE / first / "__init__.py").exists()
    return first if exists else "__init__"


def place_inside(room: str, name: str) -> str | None:
    """minibooth.training.data.rng → data, in the room training."""
    parts = name.split(".")
    inside = len(parts) > 2 and parts[:2] == ["minibooth", room]
    return parts[2] if inside and (PACKAGE / room / f"{parts[2]}.py").exists() else None


def test_code_lines_are_counted_without_blanks_comments_and_docstrings():
    source = '''"""Module,
docstring."""

import os  # one


# no
class A:  # two
    """No."""

    x = """three

    five"""

    def f(self):  # six
        """No."""
        return (
            # no
            self
        )  # seven, eight, nine
'''
    assert code_lines(source) == 9


def test_the_readable_core_has_at_most_620_code_lines():
    """With the module that it is read with, of common."""
    files = [*CORE, "common/trees"]
    counts = {name: code_lines((PACKAGE / f"{name}.py").read_text()) for name in files}
    assert sum(counts.values()) <= 620, counts


@pytest.mark.parametrize("name, most", [("pipeline", 220), ("train", 250)])
def test_what_is_drawn_and_what_a_run_does_stand_on_a_few_screens(name, most):
    assert len((PACKAGE / f"{name}.py").read_text().splitlines()) <= most


def test_no_file_is_longer_than_one_takes_in():
    lines = {path.relative_to(PACKAGE): len(path.read_text().splitlines()) for path in MODULES}
    most = dict.fromkeys(("common", "formats", "device", "training"), 400)
    assert not {path: n for path, n in lines.items() if n > most.get(path.parts[0], 700)}


def test_imports_are_read_through_dots_and_inside_functions(tmp_path):
    file = tmp_path / "minibooth" / "toybox" / "world.py"
    file.parent.mkdir(parents=True)
    file.write_text("import torch.nn as nn\ndef f():\n    from .. import ops\n    from .x import y")
    assert imports(file, tmp_path) == {"torch.nn", "minibooth.ops", "minibooth.toybox.x.y"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_places_above_its_own(path):
    here, *inside = path.relative_to(PACKAGE).with_suffix("").parts
    assert here in ORDER, f"{here} has no place in the order yet"
    if inside == ["__main__"]:  # a room's program may import the programs
        above = ORDER[: ORDER.index("__init__")]
    else:
        above = ORDER[: ORDER.index(here) + bool(inside)]
    below = {name for name in imports(path) if place(name) not in (None, *above)}
    assert not below


def test_every_file_of_a_room_has_its_place_inside():
    found = {room: {f.stem for f in (PACKAGE / room).glob("[!_]*.py")} for room in INSIDE}
    assert found == {room: set(order) for room, order in INSIDE.items()}


@pytest.mark.parametrize("room", INSIDE)
def test_within_a_room_arrows_go_one_way(room):
    order = INSIDE[room]
    for i, name in enumerate(order):
        used = {place_inside(room, n) for n in imports(PACKAGE / room / f"{name}.py")} - {None}
        assert used <= set(order[:i]), f"{room}/{name}.py"


@pytest.mark.parametrize("name", READ)
def test_what_one_reads_imports_no_room_but_common_and_formats(name):
    used = {place(n) for n in imports(PACKAGE / f"{name}.py")}
    rooms = {n for n in used if n and (PACKAGE / n).is_dir()}
    assert rooms <= ROOMS_READ


def test_what_a_device_needs_knows_no_settings():
    """Nor photographs or losses, which stand in rooms that it may not import."""
    for path in sorted((PACKAGE / "device").glob("*.py")):
        assert {place(n) for n in imports(path)} <= {"common", "device", *READ, None}, path.name
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {n.arg for n in nodes if isinstance(n, ast.arg)}
        names |= {n.id for n in nodes if isinstance(n, ast.Name)}
        names |= {n.attr for n in nodes if isinstance(n, ast.Attribute)}
        assert not names & {"config", "TrainConfig", "settings"}, path.name


def test_the_microscope_imports_no_program():
    """Nor does its own: train calls it, and what both need of a run stands below them."""
    for path in sorted((PACKAGE / "explain").glob("*.py")):
        assert not {place(n) for n in imports(path)} & {"train", "sample", "convert", "classify"}, (
            path.name
        )


def test_nothing_stands_in_the_hall_but_what_one_reads_and_the_programs():
    assert {f.stem for f in PACKAGE.glob("*.py")} == {
        *READ,
        "train",
        "sample",
        "convert",
        "classify",
        "__init__",
    }


def test_every_room_says_what_it_is_for_and_what_it_may_import():
    for room in (f for f in PACKAGE.iterdir() if (f / "__init__.py").exists()):
        said = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
        assert said and "import" in said.lower(), room.name


def test_kernels_import_nothing_of_minibooth():
    files = sorted(KERNELS.rglob("*.py"))
    assert files
    assert not {n for path in files for n in imports(path) if n.split(".")[0] == "minibooth"}


def test_neither_package_imports_what_it_replaces():
    """But to measure: CLIP and DINO, which look at the pictures, are transformers'."""
    files = [*MODULES, *sorted(KERNELS.rglob("*.py"))]
    measuring = PACKAGE / "evaluate" / "judges.py"
    roots = {path: {name.split(".")[0] for name in imports(path)} for path in files}
    assert all("torch" in roots[PACKAGE / f"{name}.py"] for name in CORE)
    users = {path for path in files if roots[path] & {"diffusers", "transformers"}}
    assert users == {measuring} and "diffusers" not in roots[measuring]
