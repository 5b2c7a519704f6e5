"""python docs/methods.py: what is trained, compared: all weights, LoRA, one word, SVD of all.

The toybox's dog, in each way for three seeds. Writes docs/methods.png, whose pictures are of the
first seed, and prints the table of docs/methods.md. Takes a quarter of an hour; what is in the work
folder already is not done again.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

from minibooth import StableDiffusion, load, lora, textual_inversion
from minibooth.common import cli
from minibooth.formats import adapters
from minibooth.formats.tensor_files import read_tensors
from minibooth.toybox import score
from minibooth.training import photos, report
from minibooth.training.settings import TrainConfig

WORK = Path("methods-work")
SEEDS = (0, 1, 2)
ALL, WORD = "all weights", "Textual Inversion"
TRAINED = {
    ALL: [],
    "LoRA, rank 4": ["--method", "lora", "--rank", "4"],
    "LoRA, rank 16": ["--method", "lora", "--rank", "16"],
    WORD: ["--method", "textual_inversion"],
}
EXTRACTED = {"SVD of all, rank 4": 4, "SVD of all, rank 16": 16}
MARGIN = 0.05  # by which all weights must be above the word in fidelity: fixed beforehand
SHOWN = ("", " in the snow", " at night", " wearing a red hat")
FILES = (adapters.DIFFUSERS_LORA, adapters.DIFFUSERS_EMBEDDING)


def folder_of(name: str, seed: int) -> Path:
    return WORK / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{seed}"


def train(name: str, seed: int) -> None:
    """A run, as its command does it. cost.json has its CPU time, all cores together, which other
    programs do not change much; the seconds that went by; and the memory it had at most."""
    folder = folder_of(name, seed)
    if (folder / "cost.json").exists():
        return
    command = [sys.executable, "-m", "minibooth.train", *TRAINED[name], "--seed", str(seed)]
    command += ["--output_dir", str(folder), "--num_validation_images", "0"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    cost = {"seconds": time.perf_counter() - start, "bytes": 1024 * usage.ru_maxrss}
    cost["cpu_seconds"] = usage.ru_utime + usage.ru_stime
    (folder / "cost.json").write_text(json.dumps(cost))


def extract(name: str, seed: int) -> None:
    """A LoRA of what the run with all weights has changed, scored as a run is."""
    folder, tuned = folder_of(name, seed), folder_of(ALL, seed)
    if (folder / "scores.json").exists():
        return
    base, other = load("toybox"), load(tuned)
    found = {
        network: lora.extract(base.networks[network], other.networks[network], EXTRACTED[name])
        for network in ("unet", "text_encoder")
    }
    of_network = {network: e.adapters for network, e in found.items()}
    adapters.write_diffusers_lora(folder, base.networks, of_network)
    config = TrainConfig(**cli.read_config(tuned / "config.json", TrainConfig))
    config = replace(config, class_data_dir=str(tuned / "class_images"))
    score.after_run(model(name, seed), replace(config, output_dir=str(folder)))


def model(name: str, seed: int) -> StableDiffusion:
    folder = folder_of(name, seed)
    if name == ALL:
        return load(folder)
    sd = load("toybox")
    if name == WORD:
        textual_inversion.add_word(sd, *adapters.read_embedding(folder))
    else:
        adapters.merge_files(sd.networks, [str(folder)])
    return sd


def row(name: str) -> list[str]:
    """Its line of the table: medians over the seeds, and from where to where."""
    folders = [folder_of(name, seed) for seed in SEEDS]
    scores = [json.loads((folder / "scores.json").read_text()) for folder in folders]

    def spread(part: str, field: str, form: str = ".2f") -> str:
        values = sorted(s[part][field] for s in scores)
        return f"{values[1]:{form}} ({values[0]:{form}}–{values[-1]:{form}})"

    cells = [name, *(spread("subject", f) for f in ("fidelity_seen", "fidelity_held_out"))]
    cells += [spread("subject", "prompt_held_out", ".0%")]
    cells += [spread("class after", field) for field in ("pres", "div")]
    written = [folders[0] / file for file in FILES if (folders[0] / file).exists()]
    # The networks that were trained, where it is no small file.
    written = written or [*folders[0].glob("unet/*.safetensors")]
    written += [*folders[0].glob("text_encoder/*.safetensors")] if name == ALL else []
    numbers = sum(t.numel() for file in written for t in read_tensors(file)[0].values())
    cells += [f"{numbers:,}", f"{sum(f.stat().st_size for f in written) / 1e6:.2f}"]
    if name in EXTRACTED:
        return [*cells, "–", "–"]
    costs = [json.loads((folder / "cost.json").read_text()) for folder in folders]
    cells += [f"{statistics.median(c['cpu_seconds'] for c in costs):.0f}"]
    return [*cells, f"{statistics.median(c['bytes'] for c in costs) / 1e9:.2f}"]


def picture() -> None:
    """Of every way the same prompts from the same noises, three pictures of each."""
    rows, names = [], [*TRAINED, *EXTRACTED]
    for name in names:
        word = "a <sks>" if name == WORD else "a sks dog"
        prompts = [word + where for where in SHOWN for _ in range(3)]
        drawn = model(name, 0).generate(
            prompts, steps=score.STEPS, guidance_scale=score.GUIDANCE, seed=0, batch_size=3
        )
        rows.append(drawn)
    headings = [f"…{where}" if i == 1 else "" for where in SHOWN for i in range(3)]
    grid = photos.grid(photos.enlarged(rows), labels=names, headings=headings)
    report.save_image(grid, Path(__file__).parent / "methods.png")


def main() -> None:
    for seed, name in product(SEEDS, TRAINED):  # first: a child's peak begins with its parent's
        train(name, seed)
    for seed, name in product(SEEDS, EXTRACTED):
        extract(name, seed)
    heads = ["trained", "fidelity", "held-out fidelity", "held-out prompts", "PRES", "DIV"]
    heads += ["numbers", "MB", "CPU seconds", "GB"]
    lines = [heads, ["---"] * len(heads), *(row(name) for name in (*TRAINED, *EXTRACTED))]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    wins = [
        json.loads((folder_of(ALL, seed) / "scores.json").read_text())["subject"][key]
        - json.loads((folder_of(WORD, seed) / "scores.json").read_text())["subject"][key]
        for seed in SEEDS
        for key in ("fidelity_seen", "fidelity_held_out")
    ]
    print(f"\nall weights above one word by at least {min(wins):.2f}; margin {MARGIN}")
    picture()
    if min(wins) < MARGIN:
        sys.exit("the order of the paper's Table 1 was not found")


if __name__ == "__main__":
    main()
