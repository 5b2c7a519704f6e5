"""docs/tutorial.ipynb is tutorial.md, and runs."""

import importlib.util
import os
import re
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
import solutions
from test_tutorial import TEXT, same_text

nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).parents[1]


def program():
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "docs" / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebook = program()


def test_the_notebook_is_made_of_the_tutorial_as_it_is_now():
    made = notebook.written(notebook.make(TEXT))
    assert made == notebook.NOTEBOOK.read_text("utf-8"), "run python docs/notebook.py"


SMALL = """Some [link](docs/drift.md), [far](https://a.b) and .5<!-- = 1 / 2 -->.

<!-- minibooth/x.py:f -->
```python
f[0](x)
```
*From `minibooth/x.py:f`.*

```python
print(1)
```
```output toybox
1
```

```
python -m minibooth.explain --seed 1 \\
    --output_dir after
python -m minibooth.sample --method lora
```
![a picture](docs/noise.png)
"""


def test_each_kind_of_block_has_its_kind_of_cell():
    made = notebook.make(SMALL).cells[2:]  # the first two are the notebook's own
    quote = "```python\nf[0](x)\n```\n*From `minibooth/x.py:f`.*"
    assert [(c.cell_type, c.source) for c in made] == [
        ("markdown", f"Some [link](drift.md), [far](https://a.b) and .5.\n\n{quote}"),
        ("code", "print(1)"),
        ("code", "!python -m minibooth.explain --seed 1 --output_dir after"),
        ("code", 'show_page("after/explain.html")'),
        ("code", f"{notebook.UNASKED}\n# !python -m minibooth.sample --method lora"),
        ("code", 'Image("docs/noise.png")  # a picture'),
    ]
    assert made[1].outputs[0].text == "1\n"
    assert len({c.id for c in notebook.make(SMALL + SMALL).cells}) == 2 * len(made) + 2


EXERCISES = sorted(f.stem for f in (ROOT / "exercises").glob("*.py") if f.stem != "check")


@pytest.fixture
def begun(monkeypatch):
    """What the notebook's first cell leaves, in the repository."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    space = {"__name__": "notebook"}
    exec(notebook.FIRST, space)
    return space


@pytest.mark.parametrize("part", EXERCISES)
def test_the_exercises_are_cells_that_can_be_filled_in(part, begun, capsys):
    code = [c.source for c in notebook.make(TEXT).cells if c.cell_type == "code"]
    at = code.index(f'look("{part}")')
    assert code[at - 1].startswith(notebook.STUB) and "check_" not in code[at - 1]
    exec(code[at - 1], begun)
    exec(code[at], begun)
    asked = capsys.readouterr().out.splitlines()
    assert asked and all(line.endswith(": not yet") for line in asked)
    begun.update({f.__name__: f for f in solutions.SOLUTIONS.get(part, [])})
    if part == "paper":
        begun["CLAIMS"].update(zip(begun["CLAIMS"], solutions.CLAIMS, strict=True))
    exec(code[at], begun)
    assert capsys.readouterr().out == "".join(asked).replace("not yet", "right\n")


def test_the_notebook_never_waits_for_an_answer(tmp_path, monkeypatch):
    assert not any("input(" in cell.source for cell in notebook.make(TEXT).cells)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINIBOOTH", raising=False)
    with pytest.raises(RuntimeError, match="the address of minibooth's repository"):
        exec(notebook.FIRST, {"__name__": "notebook"})


def test_every_python_of_the_tutorial_is_a_cell():
    code = [c.source for c in notebook.make(TEXT).cells if c.cell_type == "code"]
    blocks = re.findall(r"(?<!-->\n)^```python\n(.*?)^```$", TEXT, re.M | re.S)
    assert len(blocks) > 20 and all(block.strip("\n") in code for block in blocks)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_in_five_minutes(tmp_path, monkeypatch):
    """In a folder of its own, as if it had just been cloned; every command ends with status 0."""
    client = pytest.importorskip("nbclient")
    for folder in ("docs", "exercises"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "tutorial.md", tmp_path)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("JUPYTER_PATH", str(Path(sys.prefix) / "share" / "jupyter"))
    made = nbformat.read(tmp_path / "docs" / "tutorial.ipynb", 4)
    shown = [[o.text for o in c.get("outputs", [])] for c in made.cells]
    for cell in made.cells:
        if cell.source.startswith("!"):
            cell.source += "\nassert _exit_code == 0, _exit_code"
    start = time.monotonic()
    where = {"metadata": {"path": str(tmp_path / "docs")}}
    client.NotebookClient(made, timeout=None, resources=where).execute()
    seconds = time.monotonic() - start
    used = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    print(f"the notebook took {seconds:.0f} s, and {used:.0f} s of CPU time")
    for cell, texts in zip(made.cells, shown, strict=True):
        printed = "".join(o.text for o in cell.get("outputs", []) if o.get("name") == "stdout")
        assert not texts or same_text(texts[0], printed), (cell.source, printed)
    pages = [c for c in made.cells if c.source.startswith("show_page")]
    assert len(pages) == 2
    for cell in pages:
        [shown] = [o.data["text/html"] for o in cell.outputs if "data" in o]
        assert "<iframe srcdoc=" in shown and "One training step under the microscope" in shown
    assert seconds < 300
