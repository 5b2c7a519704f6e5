"""Which modes make a run fit a device's memory, and what to do where none does."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..common.cli import is_out_of_memory
from ..common.errors import UserError
from ..common.files import gigabytes
from ..device import memory, ranks
from ..pipeline import StableDiffusion
from .eight_bit import bitsandbytes
from .plan import counted, needed, peak, phases

# What can be switched on, in the order in which it is tried: what changes no weight comes first.
MODES = (
    (),
    ("gradient_checkpointing",),
    ("use_8bit_adam",),
    ("use_8bit_adam", "gradient_checkpointing"),
    ("optimizer_in_backward", "gradient_checkpointing"),
    ("use_8bit_adam", "optimizer_in_backward", "gradient_checkpointing"),
)
INSTALL = 'pip install -e ".[low-memory]"'
LOSSY = ("use_8bit_adam", "optimizer_in_backward")  # rounded averages; gradients are not clipped


def require(sd: StableDiffusion, config, device: torch.device, half: bool) -> None:
    """Raise UserError if not even weights, gradients and optimizer fit."""
    need, free = needed(sd, config, half), memory.room(sd, device)
    # On a CPU the weights are there, but those that train are copied.
    weights = need["trained" if device.type == "cpu" else "weights"]
    if free is not None and weights + need["gradients"] + need["averages"] > free:
        raise UserError(f"{advice(sd, config, half)}; {gigabytes(free)} are free")


@contextmanager
def advised(sd: StableDiffusion, config, half: bool = False) -> Iterator[None]:
    """Within it, running out of memory is a UserError that says which settings help."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError(advice(sd, config, half)) from error
        raise


def advice(sd: StableDiffusion, config, half: bool = False) -> str:
    """Which settings lower the memory that is needed, and by about how much."""
    need = needed(sd, config, half)
    total = need["weights"] + need["gradients"] + need["averages"]
    return (
        f"out of memory. Weights, gradients and optimizer alone need {gigabytes(total)}; "
        f"what helps: {helping(sd, config, half)}"
    )


def helping(sd: StableDiffusion, config, half: bool) -> str:
    need, helps = needed(sd, config, half), []
    total = need["weights"] + need["gradients"] + need["averages"]
    if config.sample_batch_size > 1:
        helps.append("--sample_batch_size 1 (if it ran out while drawing class images)")
    if config.train_batch_size > 1:
        share = 1 - 1 / config.train_batch_size
        helps.append(f"--train_batch_size 1 (about -{share:.0%} of the activations)")
    if config.uses_prior:
        helps.append("--prior_loss_weight 0 (no class images: about -50% of the activations)")
    if not config.gradient_checkpointing:
        full, short = counted(sd).activations[config.method][half]
        share = 1 - short / full
        helps.append(f"--gradient_checkpointing (about -{share:.0%} of the activations)")
    saved = need["averages"] - needed(sd, replace(config, use_8bit_adam=True))["averages"]
    if saved > total / 100:  # of adapters there is hardly anything to save
        helps.append(f"--use_8bit_adam (-{gigabytes(saved)}; wants bitsandbytes: {INSTALL})")
    if need["gradients"] > total / 100:
        helps.append(f"--optimizer_in_backward (-{gigabytes(need['gradients'])}, no clipping)")
    helps.append("a smaller --resolution (half of it: about -75 % of the activations)")
    if config.train_text_encoder:
        alone = needed(sd, replace(config, train_text_encoder=False))
        saved = sum(need[key] - alone[key] for key in ("gradients", "averages"))
        helps.append(f"no --train_text_encoder (-{gigabytes(saved)})")
    return "; ".join(helps)


# ---- what is chosen ----------------------------------------------------------------------------


def choose(
    sd: StableDiffusion,
    config,
    pixels: int,
    precision: str,
    device: torch.device,
    resumed: bool,
    base: StableDiffusion | None = None,
) -> tuple:
    """The settings with the first of MODES that fits into the free memory, and a line that says so.

    What is on stays on. A run that is resumed gets nothing that changes its results. `base`: an
    upscaler's, which draws before it.
    """
    free, half = min(ranks.together([memory.room(sd, device)])), precision != "no"
    for mode in MODES:
        if possible(mode, config, precision, resumed) and installed(mode, device):
            fitted = replace(config, **dict.fromkeys(mode, True))
            need = peak(sd, fitted, pixels, half, base)
            if need <= free:
                break
    plain = peak(sd, config, pixels, half, base)
    line = f"memory: {gigabytes(free)} are free, about {gigabytes(plain)} needed"
    added = [f"--{name}" for name in MODES[-1] if getattr(fitted, name) > getattr(config, name)]
    if added:
        line += f"; switched on {' '.join(added)}, which needs about {gigabytes(need)}"
    if need <= free:
        return fitted, line
    line += ": this may not be enough"
    if precision == "fp16" and config.method == "dreambooth":  # its gradients cannot be dropped
        line += "; what such a card can train is --method lora"
    for mode in MODES:
        if possible(mode, config, precision, resumed) and not installed(mode, device):
            other = replace(config, **dict.fromkeys(mode, True))
            if peak(sd, other, pixels, half, base) <= free:
                exact = replace(other, use_8bit_adam=False)
                saved = needed(sd, exact)["averages"] - needed(sd, other)["averages"]
                line += f"; {INSTALL} would make it fit: --use_8bit_adam saves {gigabytes(saved)}"
                break
    return fitted, line


def refuse(sd: StableDiffusion, config, pixels: int, precision: str, device: torch.device) -> None:
    """Raise UserError where no mode makes a run fit, even without anything to spare. `sd` is an
    outline of a model that is still to be downloaded, on the meta device."""
    fitted, _ = choose(sd, config, pixels, precision, device, resumed=False)
    half, free = precision != "no", memory.room(sd, device)
    least = max(map(sum, phases(sd, fitted, pixels, half).values()))
    if least > free:
        on = " ".join(f"--{name}" for name in MODES[-1] if getattr(fitted, name))
        raise UserError(
            f"{config.model} is not downloaded: {gigabytes(free)} of memory are free, and even "
            f"with {on} its run takes {gigabytes(least)}; what helps: {helping(sd, fitted, half)}"
        )


def possible(mode: tuple[str, ...], config, precision: str, resumed: bool) -> bool:
    if resumed and any(name in LOSSY for name in mode):
        return False
    once = config.gradient_accumulation_steps == ranks.count() == 1 and precision != "fp16"
    return once or "optimizer_in_backward" not in mode


def installed(mode: tuple[str, ...], device: torch.device) -> bool:
    """Whether bitsandbytes is there, for a mode that wants it."""
    if "use_8bit_adam" in mode:
        try:
            bitsandbytes(device)
        except UserError:
            return False
    return True
