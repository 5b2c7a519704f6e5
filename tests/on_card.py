"""Calls a function of card_cases.py in a process that has a pretend card."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pretend_card
import pytest

needs_card = pytest.mark.skipif(
    pretend_card.why_not() is not None, reason=f"{pretend_card.why_not()}"
)


@functools.cache
def server(interpreted: bool) -> subprocess.Popen:
    """It forks a process for each call, and ends with this one. Kernels are PyTorch's unless they
    are `interpreted`."""
    pretend_card.library()
    environment = {"MINIBOOTH_KERNELS": "torch", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"TORCHDYNAMO_DISABLE": "1"}  # bitsandbytes compiles
    if interpreted:
        environment |= {"TRITON_INTERPRET": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    command = [sys.executable, "-m", "pretend_card"]
    return subprocess.Popen(command, env=os.environ | environment, **pipes)


def ask(function: str, count: int = 1, interpreted: bool = False, environment=None, **arguments):
    """What the function returns, of JSON, on `count` cards. `environment` is added to its own."""
    of = server(interpreted)
    with tempfile.TemporaryDirectory() as folder:
        asked = {"function": f"card_cases.{function}", "count": count, "arguments": arguments}
        asked |= {"environment": environment or {}, "folder": folder}
        hangs = threading.Timer(300, of.kill)
        hangs.daemon = True  # nobody waits for it where writing fails
        hangs.start()
        of.stdin.write(json.dumps(asked) + "\n")
        status = of.stdout.readline().strip()
        hangs.cancel()
        said = Path(folder, "said")
        assert status == "0", f"{status}: {said.read_text()[-6000:] if said.exists() else ''}"
        return json.loads(Path(folder, "result").read_text())
