"""python docs/notebook.py: make docs/tutorial.ipynb of tutorial.md, to be run when that changed.

What runs becomes a cell: Python, with what it prints as its output, and commands, with a !. Where
a command writes explain.html, a cell shows the page; pictures are shown by cells. In the place of a
command that checks exercises stand a cell with their stubs, to be filled in, and one that looks at
them. Quotes of the source stay text. Nothing waits for an answer.
"""

import ast
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat import v4 as new

ROOT = Path(__file__).resolve().parents[1]
TEXT, NOTEBOOK = ROOT / "tutorial.md", ROOT / "docs" / "tutorial.ipynb"
FENCE = re.compile(
    r"(?P<quoted>^<!-- \S+\.py:\S+ -->\n)?^```(?P<kind>\w*)[ \w]*\n(?P<code>.*?)^```\n"
    r"|^!\[(?P<says>[^\]]*)\]\((?P<picture>[^)]+)\)\n",
    re.M | re.S,
)
COMMENT = re.compile(r"<!-- .+? -->", re.S)
LINK = re.compile(r"\]\((?!\w+:|#)([^)]+)\)")
PAGE = re.compile(r"-m minibooth\.explain(?:.* --output_dir (?P<folder>\S+))?")
CHECK = re.compile(r"python exercises/check\.py (?P<part>\w+)")
MINUTES = ("minibooth.toybox.drift", "--method ", "docs/pictures.py")  # is what these take
UNASKED = "# This takes minutes. To run it, take away the #"
STUB = "# Fill in, run this cell, then the next, which looks at it."

ABOUT = "*A notebook of [tutorial.md](../tutorial.md), made by `python docs/notebook.py`.*"
FIRST = """# Installs minibooth where it is not there. Where there is nothing but this notebook,
# as on a hosted service, write the address of minibooth's repository between the quotes.
REPOSITORY = ""

import html
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from IPython.display import HTML, Image

if Path("../tutorial.md").exists():
    os.chdir("..")
if not Path("tutorial.md").exists():
    address = REPOSITORY or os.environ.get("MINIBOOTH")
    if not address:
        raise RuntimeError("give REPOSITORY, above, the address of minibooth's repository")
    subprocess.run(["git", "clone", "--depth", "1", address, "minibooth-repository"], check=True)
    os.chdir("minibooth-repository")
try:
    import minibooth
    import minibooth_kernels
except ImportError:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "."], check=True)
    importlib.invalidate_caches()
# The python of the cells with a ! is the one of this notebook.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def show_page(path):
    page = html.escape(Path(path).read_text("utf-8"))
    return HTML(f'<div><iframe srcdoc="{page}" width="100%" height="700"></iframe></div>')


def look(part):  # what exercises/check.py says of a part's exercises as they stand here
    def load(name):
        spec = importlib.util.spec_from_file_location(name, f"exercises/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    module = load(part)
    asked = [name.removeprefix("check_") for name in vars(module) if name.startswith("check_")]
    for name in (*asked, "CLAIMS"):
        if hasattr(module, name) and name in globals():
            setattr(module, name, globals()[name])
    for name, verdict in load("check").results(module).items():
        print(f"{name}: {verdict}")"""


def pieces(text: str) -> Iterator[tuple[str, str]]:
    """The cells of the text in order, as kind ("text", "python", "output") and source."""
    place, so_far = 0, ""
    for m in FENCE.finditer(text):
        so_far += words(text[place : m.start()])
        place = m.end()
        if m["quoted"] or m["kind"] == "text":
            so_far += m[0].removeprefix(m["quoted"] or "")
            continue
        yield "text", so_far
        so_far = ""
        if m["picture"]:
            yield "python", f'Image("{m["picture"]}")  # {m["says"]}'
        elif m["kind"]:
            yield m["kind"], m["code"]
        else:
            yield from commands(m["code"])
    yield "text", so_far + words(text[place:])


def commands(code: str) -> Iterator[tuple[str, str]]:
    """Of a block of commands a cell for each, and one for the page that it writes."""
    for line in re.sub(r"\s*\\\n\s*", " ", code).splitlines():
        if m := CHECK.fullmatch(line):
            yield "python", stubs((ROOT / "exercises" / f"{m['part']}.py").read_text("utf-8"))
            yield "python", f'look("{m["part"]}")'
            continue
        if any(name in line for name in MINUTES):
            yield "python", f"{UNASKED}\n# !{line}"
            continue
        yield "python", f"!{line}"
        if m := PAGE.search(line):
            yield "python", f'show_page("{m["folder"] or "minibooth-explain"}/explain.html")'


def stubs(source: str) -> str:
    """Of a file of exercises what is to be filled in, with the imports that this needs."""
    asked = source.partition("\n# ---- check")[0]
    lines, nodes = asked.splitlines(), ast.parse(asked).body[1:]  # without the docstring
    imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    body = "\n".join(lines[nodes[len(imports)].lineno - 1 :])
    used = set(re.findall(r"\w+", body))
    needed = [
        "\n".join(lines[n.lineno - 1 : n.end_lineno])
        for n in imports
        if {(alias.asname or alias.name).partition(".")[0] for alias in n.names} & used
    ]
    return "\n".join([STUB, *needed, *[""] * bool(needed), body.strip("\n")])


def words(text: str) -> str:
    """As text of a notebook in docs/: without the tests' remarks, its links from there."""
    return LINK.sub(lambda m: f"]({os.path.relpath(m[1], 'docs')})", COMMENT.sub("", text))


def make(text: str) -> NotebookNode:
    """The notebook of a text, always the same one: a cell's id comes from what is in it."""
    cells, seen = [new.new_markdown_cell(ABOUT), new.new_code_cell(FIRST)], {}
    for kind, source in pieces(text):
        if kind == "output":
            cells[-1]["outputs"] = [new.new_output("stream", name="stdout", text=source)]
        elif kind == "python":
            cells.append(new.new_code_cell(source.strip("\n")))
        elif source := source.strip():
            cells.append(new.new_markdown_cell(source))
    for cell in cells:
        n = seen[cell["source"]] = seen.get(cell["source"], 0) + 1
        cell["id"] = hashlib.sha256(f"{cell['source']}{n}".encode()).hexdigest()[:12]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def written(notebook: NotebookNode) -> str:
    nbformat.validate(notebook)
    return nbformat.writes(notebook, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(written(make(TEXT.read_text("utf-8"))), "utf-8")
    print(NOTEBOOK.relative_to(ROOT))
