"""What a run tells: of its prompts at the start, grids and curves on the way, a card at the end."""

import csv
import io
import json
import os
import re
import warnings
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..common import cli
from ..common.errors import UserError
from ..common.files import atomic, folder_size, gigabytes, named_after, write_text
from ..device import ranks
from ..formats import families, hub, hypernetworks
from ..formats.adapters import CLIP_L_G, DIFFUSERS_EMBEDDING, DIFFUSERS_LORA
from ..formats.configs import is_public_size
from ..pipeline import StableDiffusion
from ..tokenizer import Tokenizer
from ..upscaler import Upscaler
from . import second_stage
from .events import Events
from .settings import TrainConfig
from .subjects import Subject

# Words of a prompt that neither name the subject nor its class.
FILLER = {"a", "an", "the", "photo", "picture", "image", "portrait", "of", "my", "one"}
FILLER |= {"in", "on", "at", "with", "and"}
MOST_NAMES = 3  # words beside the class noun: a prompt that has more of them tells a story
LOSSES = "loss.csv"
COLUMNS = ("step", "loss", "loss_instance", "loss_prior", "lr", "grad_norm")  # of loss.csv


# ---- before the run ----------------------------------------------------------------------------


def words(prompt: str | None) -> list[str]:
    return [w.strip(".,!?\"'").lower() for w in (prompt or "").split()]


def identifiers(instance_prompt: str, class_prompt: str | None) -> list[str]:
    """The words that name the subject: neither the class's nor filling words."""
    common = FILLER | set(words(class_prompt))
    return [w for w in words(instance_prompt) if w and w not in common]


def describe_prompts(tokenizer: Tokenizer, instance_prompt: str, class_prompt: str | None) -> str:
    """How the identifier tokenizes, in one line. Warns where a prompt will not work as hoped, and
    raises UserError where the identifier lies beyond the tokens that count."""
    nouns = set(words(class_prompt)) - FILLER
    if missing := sorted(nouns - set(words(instance_prompt))):
        warnings.warn(
            f"the instance prompt {instance_prompt!r} does not contain {', '.join(missing)} of the "
            f"class prompt {class_prompt!r}: the subject should be named as one of its class",
            stacklevel=2,
        )
    names = list(dict.fromkeys(identifiers(instance_prompt, class_prompt)))
    if not names:
        warnings.warn(
            f"nothing in {instance_prompt!r} names the subject: put a rare word such as sks "
            "before the class noun",
            stacklevel=2,
        )
        return "identifier: none"
    named = naming(tokenizer, names, instance_prompt, nouns)
    kept = tokenizer.within(instance_prompt)
    if not set(named) & set(words(kept)):
        raise UserError(
            f"{named[0]!r}, which names the subject, is beyond the {tokenizer.max_length - 2}th "
            "token of the instance prompt, where nothing has an effect: "
            f"…{instance_prompt[len(kept) :]}"
        )
    others = ""
    if class_prompt and len(names) > MOST_NAMES:  # it describes: one of these words is the name
        others = f"; {len(names) - 1} other words of the prompt are learned with it"
        names = named[:1]
    lines = []
    for name in names if class_prompt else names[:1]:
        pieces = tokenizer.pieces(name)
        ids = [i for _, i in pieces]
        lines.append(f"{name!r} is {len(ids)} token{'s' * (len(ids) > 1)} {ids}")
        if name in tokenizer.added:
            continue
        if len(ids) > 2:
            warnings.warn(
                f"{name!r} is {len(ids)} tokens: a shorter rare word binds better", stacklevel=2
            )
        elif is_common(tokenizer, name):
            warnings.warn(
                f"{name!r} is a common word with a meaning of its own: a rare one such as sks "
                "does not have to be unlearned",
                stacklevel=2,
            )
    return "identifier: " + ", ".join(lines) + others


def is_common(tokenizer: Tokenizer, name: str) -> bool:
    """Merges are listed by frequency in CLIP's training text: a low id is a common word."""
    ids = [id for _, id in tokenizer.pieces(name)]
    return len(ids) == 1 and ids[0] < 0.8 * len(tokenizer.vocab)


def naming(tokenizer: Tokenizer, names: list[str], prompt: str, nouns: set[str]) -> list[str]:
    """Those of the words that name the subject, and do not describe it: rare ones before a class
    noun, as in "sks dog"; without one the word with the rarest token."""
    pairs = pairwise(words(prompt))
    before = {a for a, b in pairs if b in nouns and not is_common(tokenizer, a)}
    if before & set(names):
        return [name for name in names if name in before]

    def rarity(name: str) -> int:
        return max((id for _, id in tokenizer.pieces(name)), default=-1)

    return [max(names, key=rarity)]


def check_captions(subjects: list[Subject], shown: list[int], captions: list[str | None]) -> None:
    """Warns of captions without a word of their subject's own; `shown` is each photograph's."""
    names = [set(identifiers(s.instance_prompt, s.class_prompt)) for s in subjects]
    bare = [c for c, i in zip(captions, shown, strict=True) if c and not names[i] & set(words(c))]
    if bare:
        warnings.warn(
            f"{len(bare)} captions do not name their subject, as {bare[0]!r}: it is learned under "
            "the rest of their words",
            stacklevel=2,
        )


# ---- on the way --------------------------------------------------------------------------------


class LossLog:
    """loss.csv, its copy for TensorBoard, and the progress bar of training, within a `with`."""

    def __init__(self, run: Path, steps: int, done: int, device: torch.device, events: Events):
        self.events = events
        self.path, self.every = run / LOSSES, steps_between_looks(device)
        self.bar = tqdm(total=steps, initial=done, desc="training", unit="step", smoothing=0.1)
        self.pending: list[tuple[int, float, Tensor]] = []

    def __enter__(self) -> "LossLog":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def add(self, step: int, lr: float, values: Tensor) -> None:
        """`values`: (4,) loss, its two terms and the gradients' norm, on the device."""
        self.pending.append((step, lr, values))
        self.bar.update()

    @property
    def due(self) -> bool:
        return self.pending[-1][0] % self.every == 0

    def write(self, bad_step: Tensor) -> int | None:
        """Write the rows of the last steps. Returns the step from which on nothing was updated,
        since something was not finite; None if all is well."""
        values = torch.stack([v for _, _, v in self.pending]).tolist()
        bad = int(bad_step.item())
        rows = [
            (step, loss, instance, prior, lr, norm)
            for (step, lr, _), (loss, instance, prior, norm) in zip(
                self.pending, values, strict=True
            )
            if bad < 0 or step < bad
        ]
        if ranks.rank() == 0:
            append_losses(self.path, rows)
        self.events.losses(COLUMNS[1:], rows)
        self.pending.clear()
        if bad >= 0:
            return bad
        self.bar.set_postfix(loss=f"{rows[-1][1]:.4f}", refresh=False)
        return None


def steps_between_looks(device: torch.device) -> int:
    """Looking at the losses waits for the device: on a CPU that is free, on a GPU it is not."""
    return 1 if device.type == "cpu" else 10


def append_losses(path: Path, rows: Iterable[tuple]) -> None:
    new = not path.exists()
    try:
        with open(path, "a", newline="") as f:
            writer = csv.writer(f)
            if new:
                writer.writerow(COLUMNS)
            writer.writerows(rows)
    except OSError as e:
        raise UserError(
            f"cannot write {path}: {e.strerror}; make room on the disk, then go on with "
            "--resume_from_checkpoint latest"
        ) from e


def read_losses(path: Path) -> list[tuple[float, ...]]:
    """The whole rows of loss.csv; a last line that a crash cut off is left out."""
    if not path.exists():
        return []
    rows = list(csv.reader(io.StringIO(path.read_text())))[1:]
    out = []
    for row in rows:
        try:
            out.append((int(row[0]), *(float(x) for x in row[1:])))
        except (ValueError, IndexError):
            continue
    return [row for row in out if len(row) == len(COLUMNS)]


def truncate_losses(path: Path, step: int) -> None:
    """Drop the rows of steps that a resumed run will do again."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(COLUMNS)
    writer.writerows(row for row in read_losses(path) if row[0] <= step)
    write_text(path, buffer.getvalue())


def save_image(image: Image.Image, path: Path) -> None:
    with atomic(path) as part:
        image.save(part, "PNG")


# ---- after the run -----------------------------------------------------------------------------


def small_file(config: TrainConfig, step: int) -> str:
    """What A1111's and ComfyUI's form of a LoRA, word or hypernetwork is called after `step`
    updates: all of them go into one folder there. It is named after the run's folder; of a word the
    file's name is what stands in prompts, <my-dog> as my-dog. Those of snapshots also have their
    step."""
    name = named_after(config.output_dir)
    if config.trains_word:
        name = re.sub(r"[^\w-]", "", config.placeholder_token) or "word"
    if f"{name}.safetensors" in (DIFFUSERS_LORA, DIFFUSERS_EMBEDDING):
        name += "-a1111"
    ending = hypernetworks.ENDING if config.trains_hypernetwork else ".safetensors"
    return f"{name}{f'-{step}' if step < config.max_train_steps else ''}{ending}"


# Where each kind of file goes in other programs.
COMFYUI = {
    "dreambooth": "checkpoints",
    "lora": "loras",
    "textual_inversion": "embeddings",
    "hypernetwork": "hypernetworks",
}
A1111 = {
    "dreambooth": "models/Stable-diffusion",
    "lora": "models/Lora",
    "textual_inversion": "embeddings",
    "hypernetwork": "models/hypernetworks",
}


def what_next(run: Path, config: TrainConfig, sd: StableDiffusion | None = None) -> str:
    """The last lines of a run, each to be pasted into a shell; where `sd` is a model that other
    programs take, what brings the result there, too."""
    file = os.path.join(os.path.dirname(run), f"{named_after(run)}.safetensors")
    result, prompt = str(run), config.subjects[0].instance_prompt
    base = ["--model", config.model] + ["--ema", "yes"] * (config.ema == "yes")
    what, draw, merged = "the model", ["--model", result], ["--model", result]
    if config.method == "lora":
        what, draw, merged = "a LoRA", [*base, "--lora", result], [*base, "--merge_lora", result]
    if config.trains_word:
        what, draw = "a word", [*base, "--embedding", result]
    if config.trains_hypernetwork:
        what, draw = "a hypernetwork", [*base, "--hypernetwork", result]
    draw += ["--prompt", f"{prompt} in the snow"]
    if enlarges := isinstance(sd, Upscaler):
        draw = enlarging(run, config)
    two = sd is not None and len(sd.text_encoders) == 2
    usual = families.GUIDANCE if two else TrainConfig.validation_guidance_scale
    if config.validation_guidance_scale != usual and not enlarges:
        draw += ["--guidance_scale", f"{config.validation_guidance_scale:g}"]
    lines = {"draw": command("minibooth.sample", *draw)}
    if config.method in ("dreambooth", "lora"):  # what can be merged
        lines["one file"] = command("minibooth.convert", *merged, "--output", file)
    if sd and is_public_size(sd.configs) and not enlarges:  # theirs enlarge in other ways
        if config.method != "dreambooth":
            file = os.path.join(run, small_file(config, config.max_train_steps))
        lines["ComfyUI"] = cli.copying(file, f"ComfyUI/models/{COMFYUI[config.method]}")
        webui = f"stable-diffusion-webui/{A1111[config.method]}"
        lines["A1111"] = cli.copying(file, webui)
        if not config.trains_hypernetwork:  # which diffusers does not know
            lines["diffusers"] = f"python -c {cli.pasted(for_diffusers(run, config, two))}"
    said = [f"done: {run} is {what}"]
    said += [f"  {name + ':':10} {line}" for name, line in lines.items()]
    if (state := run / "state").exists():
        said.append(f"  {state} ({gigabytes(folder_size(state))}) is only needed for more steps")
    return "\n".join(said)


def enlarging(run: Path, config: TrainConfig) -> list[str]:
    """What minibooth.sample is given to draw and enlarge with the upscaler of a run; without a base
    model to enlarge pictures that there are."""
    subject, given = config.subjects[0], ["--upscaler", str(run)]
    if config.method == "lora":
        given = ["--upscaler", str(config.model), "--upscaler_lora", str(run)]
    if (level := second_stage.level(second_stage.levels(config))) != second_stage.LEVEL:
        given += ["--noise_level", str(level)]
    if config.base_model:
        return ["--model", config.base_model, *given, "--prompt", subject.instance_prompt]
    return ["--images", "PICTURES", *given, "--prompt", subject.instance_prompt]


def command(program: str, *given: str) -> str:
    return f"python -m {program} {' '.join(map(cli.pasted, map(str, given)))}"


def for_diffusers(run: Path, config: TrainConfig, two: bool) -> str:
    """Python in one line that draws with the result; `two`: for SDXL's two text encoders."""
    base, small, folder = str(config.model), "", str(run)
    if config.method == "dreambooth":
        base = folder
    elif config.method == "lora":
        small = f"p.load_lora_weights({folder!r}); "
    elif two:
        token, file = config.placeholder_token, os.path.join(folder, DIFFUSERS_EMBEDDING)
        small = f"from safetensors.torch import load_file; w = load_file({file!r}); "
        for key, n in zip(CLIP_L_G, ("", "_2"), strict=True):
            parts = f"text_encoder=p.text_encoder{n}, tokenizer=p.tokenizer{n}"
            small += f"p.load_textual_inversion(w[{key!r}], token={token!r}, {parts}); "
    else:
        small = f"p.load_textual_inversion({folder!r}); "
    load = "from_single_file" if Path(base).is_file() else "from_pretrained"
    return (
        f"from diffusers import StableDiffusion{'XL' * two}Pipeline as S; p = S.{load}({base!r}); "
        f"{small}p({config.subjects[0].instance_prompt!r}).images[0].save('drawn.png')"
    )


def model_card(sd: StableDiffusion, config, steps: int) -> str:
    """README.md of a result or, after fewer steps, a snapshot: base model, licence, settings."""
    prior = "no prior preservation"
    if config.uses_prior:
        classes = ", ".join(f"`{s.class_prompt}`" for s in config.subjects)
        prior = f"prior preservation of {classes} (λ = {config.prior_loss_weight})"
    names = ", ".join(s.instance_prompt for s in config.subjects)
    task = "image-to-image" if isinstance(sd, Upscaler) else "text-to-image"
    picture, two = "\n![before and after](before_after.png)\n", len(sd.text_encoders) == 2
    if config.num_validation_images == 0 or steps < config.max_train_steps:
        picture = ""
    known = hub.is_repo_id(sd.source)  # the head of a card can name what is on the hub alone
    base = f"\nbase_model: {sd.source}" if known else ""
    how = {
        "dreambooth": "DreamBooth",
        "lora": f"LoRA of rank {config.rank}",
        "textual_inversion": f"Textual Inversion of the word `{config.placeholder_token}`",
        "hypernetwork": f"a hypernetwork of layer structure {config.layer_structure}",
    }[config.method]
    return f"""---
license: {sd.licence or "unknown"}{base}
instance_prompt: {json.dumps(names, ensure_ascii=False)}
tags: [{task}, stable-diffusion{"-xl" * two}, {config.method}]
---

# {names}

`{sd.source or "unknown"}` fine-tuned with {how} by minibooth on photographs of
`{names}`, with {prior}. {steps} steps, learning rate
{config.learning_rate}, batch {config.train_batch_size * ranks.count()}, text encoder{"s" * two}
{"trained" if config.train_text_encoder else "frozen"}. Every setting is in the run's `config.json`.

The licence of the base model ({sd.licence or "see there"}) applies to these weights.
{picture}"""
