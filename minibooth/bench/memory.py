"""What the ways to save memory save and cost, and which of them fit a card of 8 GB."""

from pathlib import Path

import torch

from ..common.files import write_json
from ..training import memory
from ..training.settings import TrainConfig
from . import peers
from .measure import alone, peaks, prepared
from .models import model
from .peers import OURS, Row, begin
from .run import whole_run

LIMIT = 7_500_000_000  # bytes that are free on a card of 8 GB


def memory_modes(size: str, device: torch.device) -> list[dict]:
    """Every way to save memory, for the UNet alone and with the text encoder: peak and time of a
    step; on a GPU also what was counted beforehand, and whether it can be done within LIMIT."""
    found, on_gpu = [], device.type == "cuda"
    for text in ((), ("train_text_encoder",)):
        for mode in memory.MODES:
            settings = tuple((name, True) for name in (*text, *mode))
            row = Row("step", 1, "bf16" if on_gpu else "no", settings=settings)
            arguments = f"{row!r}, {size!r}, {OURS!r}"
            measured = alone(peers.__name__, f"steady({arguments}, timed=5)")
            result = {"row": row.__dict__, **(measured or {})}
            if on_gpu:
                result["counted_bytes"] = counted(row, size)
                if result.get("peak_bytes", LIMIT) < LIMIT:
                    result["limited"] = alone(peers.__name__, f"steady({arguments}, limit={LIMIT})")
            found.append(result)
            print(describe_mode(result), flush=True)
    return found


def counted(row: Row, size: str) -> int:
    """What `memory.peak` says for a row, without pictures on the way."""
    batch = {"train_batch_size": row.batch, "num_validation_images": 0}
    sd = model(size, torch.device("meta"))
    pixels = (sd.image_size // sd.vae.factor) ** 2
    return memory.peak(sd, TrainConfig(**batch, **dict(row.settings)), pixels, half=True)


def small_run(size: str, limit: int) -> dict:
    """A whole run within `limit` bytes, with everything that a run does, but little of it."""
    device = prepared(limit=limit)
    settings = {"num_class_images": 4, "class_steps": 2, "sample_batch_size": 4}
    settings |= {"max_train_steps": 4, "checkpointing_steps": 2, "num_validation_images": 2}
    settings |= {"validation_steps": 2, "validation_inference_steps": 2}
    whole_run(size, device, **settings, **dict.fromkeys(memory.MODES[-1], True))
    return peaks(device)


def describe_mode(found: dict) -> str:
    """A row of the table on the screen."""
    parts = [" ".join(name for name, _ in found["row"]["settings"]) or "full speed"]
    if "peak_bytes" not in found:
        return f"{parts[0]}: cannot run here"
    parts[0] += f": peak {found['peak_bytes'] / 1e9:.2f} GB"
    if "counted_bytes" in found:
        parts.append(f"counted with a margin {found['counted_bytes'] / 1e9:.2f} GB")
        parts.append(f"within {LIMIT / 1e9} GB: {'yes' if found.get('limited') else 'no'}")
    parts.append(f"{1e3 * found['seconds']:.1f} ms")
    return ", ".join(parts)


def benchmark(what: str, minutes: float, output: Path) -> None:
    """Measures, prints and writes memory-<cpu or cuda>.json: all modes, however long they take."""
    device, size, report, name = begin(what, output)
    report["modes"] = memory_modes(size, device)
    done = alone(__name__, f"small_run({size!r}, {LIMIT})")
    report["whole run, saving most"] = done
    write_json(name.with_suffix(".json"), report)
    said = f"peak {done['peak_bytes'] / 1e9:.2f} GB" if done else "it cannot run here"
    print(f"a whole run in the last mode, within {LIMIT / 1e9} GB on a GPU: {said}")
