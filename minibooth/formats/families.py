"""The settings that suit SDXL where nothing else is said.

The programs' own defaults are those of Stable Diffusion 1.x and 2.x; the toybox's stand in
minibooth/toybox/__init__.py. Settings are there before the model is, so what kind of model it will
be is read from its config or, of a single file, from the names of its tensors.
"""

import json
from pathlib import Path

from ..common.errors import UserError
from ..common.files import read_text
from .folders import file_getter
from .tensor_files import read_tensors

GUIDANCE = 5.0  # diffusers' pipeline's
SDXL = {
    # 200 by DDIM in 50 steps would take four times as long as 500 steps of training
    "num_class_images": 50,
    "class_sampler": "dpm++",
    "class_steps": 20,
    "sample_batch_size": 1,  # with guidance one picture of 1024² is work enough, and least memory
    "class_guidance_scale": GUIDANCE,
    "validation_guidance_scale": GUIDANCE,
}
SDXL_LORA = {"rank": 16, "text_encoder_learning_rate": 5e-6}
TOLD = "SDXL's are " + ", ".join(f"{name} {value}" for name, value in SDXL.items())
TOLD += ", and of a LoRA " + ", ".join(f"{name} {value:g}" for name, value in SDXL_LORA.items())


def is_sdxl(source: str | Path | None, revision: str | None = None) -> bool:
    """Whether a model has a second text encoder. What cannot be read is not: whoever loads it says
    why. Of a model on the hub its first small file is downloaded."""
    try:
        if source is None:
            return False
        if Path(source).is_file():
            return any("conditioner.embedders.1." in key for key in read_tensors(Path(source))[0])
        index = file_getter(source, revision)("model_index.json")
        return bool(index and (json.loads(read_text(index)).get("text_encoder_2") or [None])[0])
    except (UserError, OSError, ValueError, AttributeError):
        return False


def train_settings(given: dict) -> dict:
    """For training, by what was given of its settings."""
    if not is_sdxl(given.get("model"), given.get("revision")):
        return {}
    return SDXL | (SDXL_LORA if given.get("method") == "lora" else {})


def draw_settings(given: dict) -> dict:
    """The same for drawing."""
    sdxl = is_sdxl(given.get("model"), given.get("revision"))
    return {"guidance_scale": GUIDANCE} if sdxl else {}
