"""Calls a function of card_cases.py in a process that has a pretend card."""

import json
import os
import subprocess
import sys

import pretend_card
import pytest

needs_card = pytest.mark.skipif(
    pretend_card.why_not() is not None, reason=f"{pretend_card.why_not()}"
)


def start(function: str, card: str = "H100", count: int = 1, **arguments) -> subprocess.Popen:
    """`finish` has what it returns. Kernels are PyTorch's unless the environment says otherwise."""
    pretend_card.library()
    environment = {
        "MINIBOOTH_KERNELS": "torch",
        "TORCHDYNAMO_DISABLE": "1",
    }  # bitsandbytes compiles
    environment |= arguments.pop("environment", {})
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "pretend_card", card, str(count), f"card_cases.{function}"]
    return subprocess.Popen(
        [*command, json.dumps(arguments)],
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out[-2000:] + err[-4000:]
    return json.loads(out.splitlines()[-1])


def ask(function: str, **arguments):
    return finish(start(function, **arguments))
