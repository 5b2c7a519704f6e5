"""python exercises/check.py noise: tells which functions of noise.py are right."""

import importlib
import sys


def results(module) -> dict[str, str]:
    """What each check_… of a module says of its function: "right", "not yet" or what is wrong."""
    out = {}
    for name, check in vars(module).items():
        if not name.startswith("check_"):
            continue
        try:
            check()
            verdict = "right"
        except NotImplementedError:
            verdict = "not yet"
        except AssertionError as e:
            verdict = f"wrong: {e}"
        out[name.removeprefix("check_")] = verdict
    return out


if __name__ == "__main__":
    for name, verdict in results(importlib.import_module(sys.argv[1])).items():
        print(f"{name}: {verdict}")
