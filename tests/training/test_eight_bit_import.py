"""bitsandbytes is imported without what it says, or fetches, for 4-bit weights."""

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from minibooth import UserError
from minibooth.training.eight_bit import bitsandbytes

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
OPS = """
import logging
logger = logging.getLogger(__name__)
try:
    from kernels import get_kernel
    get_kernel("kernels-community/quantization-bitsandbytes")
except Exception as e:
    logger.warning("Failed to load from kernels-community: %s", e)
logger.warning("the library is older than the card")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A package that imports as bitsandbytes does, first on the path."""
    for name, text in {
        "__init__.py": "from .backends.cpu import ops",
        "functional.py": "here = True",
        "backends/__init__.py": "",
        "backends/cpu/__init__.py": "",
        "backends/cpu/ops.py": OPS,
    }.items():
        path = tmp_path / "bitsandbytes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    for name in [n for n in sys.modules if n.partition(".")[0] in ("bitsandbytes", "kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [n for n in sys.modules if n.partition(".")[0] in ("bitsandbytes", "kernels")]:
        del sys.modules[name]


@pytest.mark.parametrize("there", ["nothing", "a folder", "Hugging Face's"])
def test_whatever_is_named_kernels_nothing_is_asked_of_it_or_said(place, there, caplog):
    if there != "nothing":
        (place / "kernels").mkdir()
    if there == "Hugging Face's":
        fetch = "def get_kernel(name):\n    raise SystemExit('asked the hub')"
        (place / "kernels" / "__init__.py").write_text(fetch)
    assert bitsandbytes(CPU).here
    assert [record.getMessage() for record in caplog.records] == [
        "the library is older than the card"
    ]
    assert "kernels" not in sys.modules


def test_one_that_is_imported_already_stays(place, monkeypatch):
    mine = object()
    monkeypatch.setitem(sys.modules, "kernels", mine)
    assert bitsandbytes(CPU).here and sys.modules["kernels"] is mine


def test_errors_of_its_own_are_said(place):
    (place / "bitsandbytes" / "functional.py").write_text(
        "raise ImportError('libcudart is missing')"
    )
    with pytest.raises(UserError, match="libcudart is missing"):
        bitsandbytes(CPU)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
def test_the_real_one_says_nothing_from_a_folder_that_has_kernels():
    code = "import torch; from minibooth.training.eight_bit import bitsandbytes\n"
    code += "assert bitsandbytes(torch.device('cpu')).optimizer_update_8bit_blockwise"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
