"""What reading a file costs: given a JSON list of (kind, path), it prints a line of JSON for each.

Each is read in a copy of this process, made when everything is imported: seconds that it computed,
megabytes that its peak of memory rose by, and what was said.
"""

import json
import os
import resource
import sys
import time
import warnings
from pathlib import Path

import torch

import minibooth
from minibooth.common import cli, pictures
from minibooth.common.errors import UserError, first_line
from minibooth.formats import adapters, folders, tensor_files
from minibooth.textual_inversion import add_word
from minibooth.tokenizer import Tokenizer
from minibooth.training import resume
from minibooth.training.settings import TrainConfig


def read_word(path: Path) -> None:
    add_word(minibooth.load("toybox"), *adapters.read_embedding(path))


READERS = {
    "model": lambda path: minibooth.load(path).encode_prompt(["a sks dog, 7"]),
    "tensors": tensor_files.read_tensors,
    "vae": lambda path: folders.read_vae(path, {}),
    "lora": lambda path: adapters.read_lora(path, toybox.networks),
    "word": read_word,
    "tokenizer": Tokenizer.from_folder,
    "photograph": pictures.read_image,
    "settings": lambda path: TrainConfig(**cli.read_config(path, TrainConfig)).check(),
    "run": resume.load,
}


def peak() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1e6 if sys.platform == "darwin" else 1e3)


def cost(kind: str, path: str) -> tuple[float, float, str]:
    """(seconds, MB, the UserError or what it was instead)."""
    before, started = peak(), time.process_time()
    try:
        READERS[kind](Path(path))
        said = "nothing was said"
    except UserError as e:
        said = f"UserError: {e}"
    except BaseException as e:
        said = f"{type(e).__name__}: {first_line(e)}"
    return time.process_time() - started, peak() - before, said


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    toybox = minibooth.load("toybox")
    for kind, path in json.loads(sys.stdin.read()):
        if os.fork() == 0:
            print(json.dumps(cost(kind, path)), flush=True)
            os._exit(0)
        os.wait()
