"""python docs/notebook.py: make docs/tutorial.ipynb of tutorial.md, to be run when that changed.

What runs becomes a cell: Python, with what it prints as its output, and commands, with a !. Where
a command writes explain.html, a cell shows the page; pictures are shown by cells. Quotes of the
source stay text.
"""

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
MINUTES = ("minibooth.toybox.drift", "--method ", "docs/pictures.py")  # is what these take
UNASKED = "# This takes minutes. To run it, take away the #"

ABOUT = "*A notebook of [tutorial.md](../tutorial.md), made by `python docs/notebook.py`.*"
FIRST = """# Installs minibooth where it is not there. Where there is nothing but this notebook,
# as on a hosted service, it asks for the address of the repository: where the notebook is from.
import html
import importlib
import os
import subprocess
import sys
from pathlib import Path

from IPython.display import HTML, Image

if Path("../tutorial.md").exists():
    os.chdir("..")
if not Path("tutorial.md").exists():
    address = os.environ.get("MINIBOOTH") or input("minibooth's git repository: ")
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
    return HTML(f'<div><iframe srcdoc="{page}" width="100%" height="700"></iframe></div>')"""


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
        if any(name in line for name in MINUTES):
            yield "python", f"{UNASKED}\n# !{line}"
            continue
        yield "python", f"!{line}"
        if m := PAGE.search(line):
            yield "python", f'show_page("{m["folder"] or "minibooth-explain"}/explain.html")'


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
