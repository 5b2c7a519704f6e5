"""python exercises/check.py noise: tells which functions of noise.py are right."""

import importlib
import sys
import traceback


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
        except Exception as e:  # of the solution, or of what the check does with its result
            frames = traceback.extract_tb(e.__traceback__)
            line = [f.lineno for f in frames if f.filename == module.__file__][-1]
            verdict = f"wrong: {type(e).__name__} in line {line}: {e}"
        out[name.removeprefix("check_")] = verdict
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("which part? say: python exercises/check.py noise")
    sys.stdout.reconfigure(errors="replace")  # consoles that lack a letter show "?"
    for name, verdict in results(importlib.import_module(sys.argv[1])).items():
        print(f"{name}: {verdict}")
