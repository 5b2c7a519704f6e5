"""What the user is told where memory is short."""

import functools
import subprocess
import sys

import eight_bit_stand_in
import pytest
import torch

from minibooth.bench import models
from minibooth.device import memory
from minibooth.training import fit, plan
from minibooth.training.settings import TrainConfig

PIXELS = 64 * 64
INSTALL = 'pip install -e ".[low-memory]"'


@functools.cache
def sd15():
    return models.model("SD 1.5", torch.device("meta"))


def said(monkeypatch, free, precision="bf16", **changes):
    monkeypatch.setattr(memory, "available", lambda device: free)
    resumed = changes.pop("resumed", False)
    device = torch.device("cuda")
    return fit.choose(sd15(), TrainConfig(**changes), PIXELS, precision, device, resumed)[1]


def needs(*modes, half=True):
    return plan.peak(sd15(), TrainConfig(**dict.fromkeys(modes, True)), PIXELS, half)


@pytest.fixture
def without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


def test_bitsandbytes_is_named_where_only_it_makes_the_run_fit(without_bitsandbytes, monkeypatch):
    least = needs(*fit.MODES[-1])
    line = said(monkeypatch, least)
    assert f"{INSTALL} would make it fit: --use_8bit_adam saves 5.1" in line
    assert INSTALL not in said(monkeypatch, least - 1)  # nor would that help
    assert INSTALL not in said(monkeypatch, 80e9)  # nothing is wanted
    enough = needs("optimizer_in_backward", "gradient_checkpointing")
    assert INSTALL not in said(monkeypatch, enough)  # something else has helped
    assert INSTALL not in said(monkeypatch, least, resumed=True)  # whose averages are in 32 bits


def test_bitsandbytes_is_not_named_where_it_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", eight_bit_stand_in.MODULE)
    assert INSTALL not in said(monkeypatch, 4e9)


def test_advice_after_running_out_says_how_to_install_it():
    assert INSTALL in fit.advice(sd15(), TrainConfig())
    assert INSTALL not in fit.advice(sd15(), TrainConfig(use_8bit_adam=True))


def test_the_benchmark_imports_where_there_is_no_resource_module():
    """On Windows."""
    code = "import sys; sys.modules['resource'] = None; import minibooth.bench.peers"
    subprocess.run([sys.executable, "-c", code], check=True)
