"""Consoles that lack a character, as Windows' are where output goes into a pipe."""

import importlib
import io
import sys

import pytest
import runs

from minibooth import sample, train
from minibooth.bench import __main__ as bench
from minibooth.common import cli
from minibooth.evaluate import __main__ as evaluate

HELP = ["train", "sample", "convert", "explain", "evaluate", "bench"]
HELP += ["evaluate dataset", "evaluate snapshots"]
HELP += [
    f"toybox.{name}" for name in ("drift", "gallery", "judge", "pretrain", "pretrain_upscaler")
]


@pytest.fixture
def printed(monkeypatch):
    """What a program prints on a console of that encoding, as bytes; it must succeed."""

    def run(module, encoding, *given):
        console = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
        with monkeypatch.context() as patch:
            name = module.__name__.removesuffix(".__main__")
            patch.setattr(sys, "argv", [name, *map(str, given)])
            patch.setattr(sys, "stdout", console)
            patch.setattr("warnings.showwarning", None)
            try:
                cli.run(name, module.main)
            except SystemExit as e:
                assert not e.code
        console.flush()
        return console.buffer.getvalue()

    return run


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "ascii"])
def test_help_is_printed_whatever_the_console_lacks(encoding, printed):
    for command in HELP:
        name, *arguments = command.split()
        main = {"bench": bench, "evaluate": evaluate}.get(name)
        module = main or importlib.import_module(f"minibooth.{name}")
        if name == "explain":
            module = importlib.import_module("minibooth.explain.__main__")
        said = printed(module, encoding, *arguments, "--help")
        assert b"--output" in said and b"--help" in said


def test_a_run_whose_names_the_console_lacks_goes_through_to_its_end(printed, tmp_path):
    """The photographs are of 32² pixels, and in folders whose names are in no Latin letters."""
    out = tmp_path / "犬"
    settings = runs.arguments(runs.settings(out, max_train_steps=1))
    said = printed(train, "ascii", *settings).decode("ascii")
    assert "5 crops of 16? pixels" in said and f"done: {tmp_path}/? is the model" in said
    given = ["--model", out, "--prompt", "犬", "--num_images", 1, "--steps", 1, "--device", "cpu"]
    said = printed(sample, "cp1252", *given, "--output_dir", out / "图")
    assert said.decode("cp1252").startswith("1 pictures and grid.png")
    assert (out / "图" / "犬-0.png").exists()
