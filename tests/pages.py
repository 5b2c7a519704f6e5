"""Numbers in the pages that come from a file of this repository are marked, and compared with it.

    .02<!-- = mean("docs/drift.csv", "PRES", arm="λ = 1") -->     the number before it
    <!-- table = mean("docs/drift.csv", column, arm=row) -->      the numbers of the table below

A mark says the file, the column and the row, and how several rows become one number: `cell` (there
is one row), `mean`, `median`, `least` or `most`; `span(mean, …)` is that with the least and the
most, for cells such as 0.89 (0.87–0.90). It rounds to as many digits as are shown. In a table
`column` is a cell's heading and `row` the first cell of its line. A file is a CSV, a JSON (its
"rows", or itself as one row; what is inside has a dotted name, ratio.diffusers, of which a row may
be found by the last part alone) or a page with a table. The tutorial's other numbers, which are
worked out in its session, have the same form of mark.
"""

import ast
import csv
import functools
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean as mean_of
from statistics import median as median_of

ROOT = Path(__file__).parents[1]
POINTER = r"[\w./]+\.py:[\w.]+"
SHOWN = r"[−-]?(?:\d[\d,]*)?\.?\d+(?:e[−-]?\d+)?"
NUMBER = re.compile(
    rf"(?P<shown>{SHOWN})(?P<percent> ?%)?[ *`]*<!-- = (?P<toybox>toybox )?(?P<code>(?s:.+?)) -->"
)
TABLE = re.compile(r"^<!-- table = (?P<code>(?s:.+?)) -->\n+(?P<table>(?:^\|.*\n)+)", re.M)
FENCE = re.compile(r"^ *```(?P<kind>[\w ]*)\n(?P<code>.*?)^ *```$", re.M | re.S)
COMMENT = re.compile(r"<!--.*?-->", re.S)


# ---- files -------------------------------------------------------------------------------------


@functools.cache
def rows(file: str) -> list[dict[str, str | float]]:
    """The lines of a file of the repository, by column."""
    text = (ROOT / file).read_text("utf-8")
    if file.endswith(".csv"):
        return list(csv.DictReader(text.splitlines()))
    if file.endswith(".json"):
        found = json.loads(text)
        return [dict(flat(row)) for row in found.get("rows", [found])]
    return [row for table in tables(text) for row in table]


def flat(value, name: str = "") -> Iterator[tuple[str, str | float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else value


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """The tables of a page; the first column, which may have no heading, is called row as well."""
    for lines in re.findall(r"(?:^\|.*\n)+", FENCE.sub("", text), re.M):
        heads, _, *body = (cells(line) for line in lines.splitlines())
        yield [dict(zip(heads, row, strict=True)) | {"row": row[0]} for row in body]


def cells(line: str) -> list[str]:
    return [plain(cell) for cell in line.strip().strip("|").split("|")]


def plain(cell: str) -> str:
    """What is read of it: without emphasis, code and comments."""
    return re.sub(r"[*`]", "", COMMENT.sub("", cell)).strip()


def values(file: str, column: str, **where: str | float) -> list[float]:
    """The numbers in a column, of the rows that have these values."""

    def fits(row: dict) -> bool:
        known = {key.rpartition(".")[2]: value for key, value in row.items()} | row
        return all(key in known and str(known[key]) == str(want) for key, want in where.items())

    found = [row[column] for row in rows(file) if fits(row) and row.get(column) not in ("", None)]
    assert found, f"{file} has no {column} where {where}"
    return [x if isinstance(x, int | float) else float(x.replace(",", "")) for x in found]


def cell(file: str, column: str, **where: str | float) -> float:
    [only] = values(file, column, **where)
    return only


def mean(file: str, column: str, **where: str | float) -> float:
    return mean_of(values(file, column, **where))


def median(file: str, column: str, **where: str | float) -> float:
    return median_of(values(file, column, **where))


def least(file: str, column: str, **where: str | float) -> float:
    return min(values(file, column, **where))


def most(file: str, column: str, **where: str | float) -> float:
    return max(values(file, column, **where))


def span(middle: Callable, file: str, column: str, **where) -> tuple[float, float, float]:
    return tuple(f(file, column, **where) for f in (middle, least, most))


READERS = {f.__name__: f for f in (cell, mean, median, least, most, span)}
IS_OF_A_FILE = re.compile(rf"(?<![.\w])(?:{'|'.join(READERS)})\(")


# ---- pages -------------------------------------------------------------------------------------


def rounds_to(shown: str, value: float) -> bool:
    """Whether the value, rounded to as many digits, is what is shown."""
    shown = shown.replace("−", "-").replace(",", "")
    digits = len(shown.partition(".")[2])
    return abs(float(shown) - value) <= 0.5 * 10**-digits + 1e-9


def wrong(text: str) -> tuple[int, list[str]]:
    """How many numbers of a page are marked with a file, and which of them are not what it has."""
    count, found = 0, []

    def compare(shown: str, value: float, code: str, where: int) -> None:
        nonlocal count
        count += 1
        if not rounds_to(shown, value):
            line = 1 + text.count("\n", 0, where)
            found.append(f"line {line} says {shown}, but {code} is {value:.6g}")

    for m in NUMBER.finditer(text):
        if IS_OF_A_FILE.search(m["code"]):
            value = eval(f"({m['code']})", dict(READERS)) * (100 if m["percent"] else 1)
            compare(m["shown"], value, m["code"], m.start())
    for m in TABLE.finditer(text):
        heads, _, *body = (cells(line) for line in m["table"].splitlines())
        for row in body:
            for column, shown in zip(heads[1:], row[1:], strict=True):
                numbers = re.findall(rf"(?<![\w.]){SHOWN}", shown)
                if not numbers:
                    continue
                value = eval(f"({m['code']})", {**READERS, "row": row[0], "column": column})
                if value is None:
                    continue  # of another source, the mark says
                value = value if isinstance(value, tuple) else (value,)
                for number, one in zip(numbers, value, strict=False):
                    compare(number, one, f"{row[0]}, {column}", m.start("table"))
    return count, found


# ---- pointers into the code --------------------------------------------------------------------


def source(pointer: str) -> str:
    """The source of path.py:symbol, a dotted symbol being inside a class; or the docstring."""
    path, _, symbol = pointer.partition(":")
    text, node = parsed(path)
    if symbol == "__doc__":
        return ast.get_docstring(node, clean=False)
    for name in symbol.split("."):
        node = next((n for n in node.body if name in names(n)), None)
        assert node is not None, f"{path} has no {symbol}"
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return textwrap.dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno]))


@functools.cache
def parsed(path: str) -> tuple[str, ast.AST]:
    text = (ROOT / path).read_text("utf-8")
    return text, ast.parse(text)


def names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [t.id for t in targets if isinstance(t, ast.Name)]
