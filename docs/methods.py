"""python docs/methods.py: what is trained, compared: all weights, LoRA, one word, networks before
keys and values, SVD of all.

The toybox's dog, in each way for three seeds. Writes docs/methods.csv, and docs/methods.png, whose
pictures are of the first seed, and prints the table of docs/methods.md. Takes half an hour on
one CPU core; what is in the work folder already is not done again.
"""

import csv
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

from minibooth import StableDiffusion, load, lora, textual_inversion
from minibooth.common import cli, sheets
from minibooth.formats import adapters, hypernetworks
from minibooth.formats.tensor_files import read_tensors
from minibooth.toybox import score
from minibooth.training import report
from minibooth.training.settings import TrainConfig

HERE, WORK = Path(__file__).parent, Path("methods-work")
SEEDS = (0, 1, 2)
ALL, WORD, HYPERNETWORK = "all weights", "Textual Inversion", "hypernetwork"
TRAINED = {
    ALL: [],
    "LoRA, rank 4": ["--method", "lora", "--rank", "4"],
    "LoRA, rank 16": ["--method", "lora", "--rank", "16"],
    WORD: ["--method", "textual_inversion"],
    HYPERNETWORK: ["--method", "hypernetwork"],
}
EXTRACTED = {"SVD of all, rank 4": 4, "SVD of all, rank 16": 16}
MARGIN = 0.05  # by which all weights must be above the word in fidelity: fixed beforehand
SHOWN = ("", " in the snow", " at night", " wearing a red hat")
SCORES = ("fidelity", "held-out fidelity", "held-out prompts", "PRES", "DIV")
COLUMNS = ("trained", "seed", *SCORES, "numbers", "kB", "CPU seconds", "GB")
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
    found = lora.extract(base.unet, other.unet, EXTRACTED[name])
    adapters.write_diffusers_lora(folder, base.networks, {"unet": found.adapters})
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
    elif name == HYPERNETWORK:
        hypernetworks.attach_files(sd.unet, [str(folder)])
    else:
        adapters.merge_files(sd.networks, [str(folder)])
    return sd


def numbers_in(file: Path) -> int:
    if file.suffix == hypernetworks.ENDING:
        return sum(p.numel() for p in hypernetworks.read(file, load("toybox").unet).parameters())
    return sum(t.numel() for t in read_tensors(file)[0].values())


def measured(name: str, seed: int) -> dict[str, float | str]:
    """Its line of methods.csv."""
    folder = folder_of(name, seed)
    scores = json.loads((folder / "scores.json").read_text())
    subject, of_class = scores["subject"], scores["class after"]
    written = [folder / file for file in FILES if (folder / file).exists()]
    written += hypernetworks.held_by(folder)
    if name == ALL:  # no small file, but the network that was trained
        written = [*folder.glob("unet/*.safetensors")]
    numbers = sum(map(numbers_in, written))
    cost = {} if name in EXTRACTED else json.loads((folder / "cost.json").read_text())
    found = {
        "trained": name,
        "seed": seed,
        "fidelity": subject["fidelity_seen"],
        "held-out fidelity": subject["fidelity_held_out"],
        "held-out prompts": subject["prompt_held_out"],
        "PRES": of_class["pres"],
        "DIV": of_class["div"],
        "numbers": numbers,
        "kB": sum(file.stat().st_size for file in written) / 1e3,
        "CPU seconds": cost.get("cpu_seconds", ""),
        "GB": cost.get("bytes", 0) / 1e9 or "",
    }
    return {key: round(x, 4) if isinstance(x, float) else x for key, x in found.items()}


def row(of_seeds: list[dict]) -> list[str]:
    """Its line of the table: medians over the seeds, of scores also from where to where."""
    cells = [of_seeds[0]["trained"]]
    for column in COLUMNS[2:]:
        values = sorted(found[column] for found in of_seeds)
        middle = values[len(values) // 2]
        if column in SCORES:
            cells.append(f"{middle:.2f} ({values[0]:.2f}–{values[-1]:.2f})")
        else:
            form = ".2f" if column == "GB" else ",.0f"
            cells.append(f"{middle:{form}}" if middle != "" else "–")
    return cells


def picture() -> None:
    """Of every way the same prompts from the same noises, three pictures of each."""
    rows, names = [], [*TRAINED, *EXTRACTED]
    for name in names:
        word = "a <sks>" if name == WORD else "a sks dog"
        prompts = [word + where for where in SHOWN for _ in range(3)]
        drawn = model(name, 0).generate(prompts, seed=0, batch_size=3, **score.SAMPLING)
        rows.append(drawn)
    headings = [f"…{where}" if i == 1 else "" for where in SHOWN for i in range(3)]
    grid = sheets.grid(sheets.enlarged(rows), labels=names, headings=headings)
    report.save_image(grid, HERE / "methods.png")


def main() -> None:
    for seed, name in product(SEEDS, TRAINED):  # first: a child's peak begins with its parent's
        train(name, seed)
    for seed, name in product(SEEDS, EXTRACTED):
        extract(name, seed)
    found = [[measured(name, seed) for seed in SEEDS] for name in (*TRAINED, *EXTRACTED)]
    with open(HERE / "methods.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(line for of_seeds in found for line in of_seeds)
    heads = [COLUMNS[0], *COLUMNS[2:]]
    lines = [heads, ["---"] * len(heads), *map(row, found)]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    of_all, of_word = (found[list(TRAINED).index(name)] for name in (ALL, WORD))
    wins = [
        a[column] - b[column]
        for a, b in zip(of_all, of_word, strict=True)
        for column in ("fidelity", "held-out fidelity")
    ]
    print(f"\nall weights above one word by at least {min(wins):.2f}; margin {MARGIN}")
    picture()
    if min(wins) < MARGIN:
        sys.exit("the order of the paper's Table 1 was not found")


if __name__ == "__main__":
    main()
