"""python -m minibooth.evaluate [dataset | snapshots]"""

import sys

from ..common import cli
from . import protocol, single, snapshots
from .options import suitable_settings

COMMANDS = {
    "": (
        single.SingleConfig,
        single.evaluate,
        "The paper's metrics for one subject. `minibooth.evaluate dataset` runs its whole "
        "protocol, `minibooth.evaluate snapshots` compares the snapshots of a run.",
    ),
    "dataset": (
        protocol.DatasetConfig,
        protocol.evaluate,
        "The paper's protocol: train on every subject, draw its prompts, score, make the tables.",
    ),
    "snapshots": (
        snapshots.SnapshotsConfig,
        snapshots.evaluate,
        "When to stop: the metrics of every snapshot of a run, as a curve.",
    ),
}


def main() -> None:
    given = sys.argv[1:]
    name = given.pop(0) if given and given[0] in COMMANDS else ""
    config, command, about = COMMANDS[name]
    prog = f"minibooth.evaluate {name}".strip()
    command(cli.parse(config, prog, about, given, defaults=suitable_settings))


if __name__ == "__main__":
    cli.run("minibooth.evaluate", main, stopped="stopped: the same command goes on")
