"""python -m pretend_card: reads calls, one in a line as JSON, and does each in a fork that has the
card; see tests/on_card.py. What takes seconds to import is imported once."""

import importlib
import json
import os
import sys
from pathlib import Path

import pretend_card

pretend_card.put_in()
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (an optimizer's and a meta tensor's first use imports it)

torch.set_num_threads(1)
if os.environ.get("TRITON_INTERPRET") == "1":
    import fast_interpreter  # noqa: F401

    pretend_card.interpret_kernels()


def call(function: str, count: int, arguments: dict, environment: dict, folder: str) -> None:
    """Leaves what it printed and what it returned, as JSON, in the folder."""
    said = os.open(Path(folder) / "said", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(environment)
    pretend_card.Functions.count = count
    module, name = function.rsplit(".", 1)
    result = getattr(importlib.import_module(module), name)(**arguments)
    (Path(folder) / "result").write_text(json.dumps(result))


importlib.import_module("card_cases")
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            call(**json.loads(line))
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
