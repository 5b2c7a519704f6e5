"""What the tests of this folder share."""

import shutil
import sys
import types

import peers
import pytest
import tiny
import torch
from small_judges import Lpips, options

from minibooth.evaluate import judges
from minibooth.formats import hub
from minibooth.formats.tensor_files import write_safetensors
from minibooth.toybox import judge as toy
from minibooth.toybox import world


@pytest.fixture(autouse=True)
def without_lpips(monkeypatch):
    """As if it were not installed, where a test does not say otherwise."""
    monkeypatch.setitem(sys.modules, "lpips", None)


@pytest.fixture
def with_lpips(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Lpips))
    return judges.load(options())


@pytest.fixture(scope="module")
def toybox_folder(tmp_path_factory):
    """The toybox's folder, with a small random model, a random judge, and the real subjects."""
    folder = tmp_path_factory.mktemp("toybox")
    shutil.copytree(peers.model()[0], folder, dirs_exist_ok=True)
    torch.manual_seed(3)
    judge = tiny.randomize(toy.Judge(), seed=3)
    write_safetensors(folder / "judge" / "model.safetensors", judge.state_dict(), torch.float32)
    world.export(folder / "subjects")
    return folder


@pytest.fixture
def toybox(toybox_folder, monkeypatch):
    monkeypatch.setattr(hub, "toybox", lambda: toybox_folder)
    return toybox_folder
