"""python -m pretend_card CARD COUNT MODULE.FUNCTION JSON: the function, called with the arguments
that the JSON names, in a process with that card. What it returns is the last line, as JSON."""

import importlib
import json
import os
import sys

import pretend_card

if __name__ == "__main__":
    model, count, name, arguments = sys.argv[1:]
    pretend_card.put_in(getattr(pretend_card, model), int(count))
    import torch

    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        pretend_card.interpret_kernels()
    module, function = name.rsplit(".", 1)
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print("\n" + json.dumps(result))
