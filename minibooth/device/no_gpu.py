"""Where no GPU can be used: why, as far as the system shows it."""

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import torch


def why() -> str:
    """Why PyTorch has no GPU here and what to install, as far as the system shows it."""
    card = visible_card()
    if card is None:
        return "the system shows no NVIDIA card (nvidia-smi lists them)"
    if torch.version.cuda is None:
        return (
            f"there is {card}, but this PyTorch, {torch.__version__}, is built without CUDA: get "
            "the one that https://pytorch.org/get-started/locally/ gives for CUDA"
        )
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"there is {card}, but CUDA_VISIBLE_DEVICES is {hidden!r}: unset it"
    return (
        f"there is {card}, but its driver is too old for this PyTorch's CUDA {torch.version.cuda}: "
        "update it"
    )


def visible_card() -> str | None:
    """The name of an NVIDIA card that the driver knows, whatever PyTorch is built for."""
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=name", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            names = subprocess.check_output(query, text=True, stderr=subprocess.DEVNULL, timeout=30)
            if names.strip():
                return names.splitlines()[0].strip()
    for file in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        for line in file.read_text().splitlines():
            if line.startswith("Model:"):
                return line.removeprefix("Model:").strip()
    return None
