"""What a run needs of memory, counted before it starts, and the modes that make it fit a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import lora
from ..common.cli import is_out_of_memory
from ..common.errors import UserError
from ..common.files import gigabytes
from ..pipeline import StableDiffusion
from ..unet import Transformer, UNet
from ..vae import ResnetBlock
from .optimizer import AdamW8bit, bitsandbytes

# ---- what is sure ------------------------------------------------------------------------------


def needed(sd: StableDiffusion, config, half: bool = False) -> dict[str, int]:
    """Bytes that are sure to be needed while it trains: the weights of the networks at work and of
    what trains in them; of what trains, the weights alone, the gradients and AdamW's two averages.
    `half`: whether the networks compute in 16 bits."""
    trained = trainable(sd, config)
    averages = 2 * sum(size(p) for p in trained)
    if config.use_8bit_adam:
        averages = sum(eight_bit(p) for p in trained)
    trained = sum(size(p) for p in trained)
    weights = trained
    if config.method != "dreambooth":
        weights += sum(placed(sd, config, half)[name] for name in at_work(config))
    gradients = 0 if config.optimizer_in_backward else trained
    return {"weights": weights, "trained": trained, "gradients": gradients, "averages": averages}


def at_work(config) -> tuple[str, ...]:
    """The networks that train, or through which the gradient of what trains goes."""
    return ("unet", "text_encoder") if config.text_changes else ("unet",)


def placed(sd: StableDiffusion, config, half: bool) -> dict[str, int]:
    """Bytes of each network's weights before training: in fp32 but, as methods.place has it, for
    those at work that keep their weights."""
    rounded = at_work(config) if half and config.method != "dreambooth" else ()
    return {
        name: size_of(net) // (2 if name in rounded else 1) for name, net in sd.networks.items()
    }


def trainable(sd: StableDiffusion, config) -> list[Tensor]:
    """The weights that train, or for adapters, which are not there yet, their shapes."""
    networks = [sd.networks[name] for name in at_work(config)]
    if config.trains_word:
        width = sd.text_encoder.final_layer_norm.weight.shape[0]
        return [torch.empty(config.num_vectors, width, device="meta")]
    if config.method == "lora":
        shapes = [s for n in networks for s in lora.shapes(n, config.rank, config.lora_targets)]
        return [torch.empty(shape, device="meta") for shape in shapes]
    return [p for network in networks for p in network.parameters()]


def size(p: Tensor) -> int:
    return 4 * p.numel()


def size_of(network: nn.Module) -> int:
    return sum(size(p) for p in network.parameters())


def eight_bit(p: Tensor) -> int:
    """Bytes of the averages that AdamW8bit keeps of it."""
    state = AdamW8bit.fresh_state(torch.empty_like(p, device="meta"))
    return sum(x.nbytes for name, x in state.items() if name != "step")


def available(device: torch.device) -> int | None:
    """Bytes free on the device; None where that cannot be told."""
    if device.type == "cuda":  # what PyTorch keeps of an earlier run is free, too
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        own = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return min(free, own - held) + held - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and Path("/proc/meminfo").exists():
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def room(sd: StableDiffusion, device: torch.device) -> int | None:
    """Bytes on the device that a run can fill: those free, and those of a model that was given
    there, whose place the run takes; None where that cannot be told."""
    free, place = available(device), (device.type, device.index or 0)
    if free is None or device.type == "cpu":  # where the weights as they came are kept
        return free
    parameters = (p for network in sd.networks.values() for p in network.parameters())
    return free + sum(p.nbytes for p in parameters if (p.device.type, p.device.index or 0) == place)


def require(sd: StableDiffusion, config, device: torch.device, half: bool) -> None:
    """Raise UserError if not even weights, gradients and optimizer fit."""
    need, free = needed(sd, config, half), room(sd, device)
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
    need, helps = needed(sd, config, half), []
    total = need["weights"] + need["gradients"] + need["averages"]
    if config.sample_batch_size > 1:
        helps.append("--sample_batch_size 1 (if it ran out while drawing class images)")
    if config.train_batch_size > 1:
        share = 1 - 1 / config.train_batch_size
        helps.append(f"--train_batch_size 1 (about -{share:.0%} of the activations)")
    # Counted: what the UNet of SD 1.5 keeps for its backward pass at 512² and 256².
    if not config.gradient_checkpointing:
        helps.append("--gradient_checkpointing (about -85 % of the activations)")
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
    return (
        f"out of memory. Weights, gradients and optimizer alone need {gigabytes(total)}; "
        f"what helps: {'; '.join(helps)}"
    )


# ---- what is likely, and what to do about it ---------------------------------------------------

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

# Bytes per latent pixel and sample, counted over SD 1.5's networks at 512²: what a training step
# has at most beside weights, their 16-bit copies and gradients; in full, and checkpointed.
ACTIVATIONS = {  # where the UNet computes in 16 bits, and in fp32
    "dreambooth": {True: (304_000, 62_000), False: (464_000, 87_000)},
    "lora": {True: (261_000, 46_000), False: (382_000, 84_000)},
    "textual_inversion": {True: (234_000, 44_000), False: (353_000, 81_000)},
}
LEFT = 0.33, 0.6  # of these, where the backward pass has most of the gradients
PREDICTING = {True: 17_300, False: 32_000}  # the UNet without a backward pass
CODING = 197_000  # the VAE, which computes in fp32 and takes one picture of this size at once
SPARE = 0.1, 0.5e9  # of what is worked in, and bytes: for libraries and fragments


def parts(sd: StableDiffusion, config, pixels: int, half: bool) -> dict[str, int]:
    """Bytes that training needs on a GPU, about, by what they are for. Not all at a time: see
    `phases`. `pixels` of the latents; whether the networks compute in 16 bits.

    A step takes less than activations and gradients together, since the backward pass gives back
    the ones while it adds the others. Its CUDA graph keeps that to itself.
    """
    need, short = needed(sd, config, half), config.gradient_checkpointing
    samples = config.train_batch_size * (1 + config.uses_prior)
    kept = samples * pixels * ACTIVATIONS[config.method][half][short]
    activations = kept + copies(sd, config, half)
    step = max(activations, int(LEFT[short] * kept) + need["gradients"])
    pictures = 0
    if config.num_validation_images:  # as Grids.draw does it: the UNet, then the VAE
        text = 0 if config.text_changes else size_of(sd.text_encoder)
        predicting = text + drawing(sd, config, pixels, half, config.grid_batch_size)
        pictures = max(predicting, size_of(sd.vae) + pixels * CODING)
    return {
        "weights": need["weights"],
        "gradients": need["gradients"],
        "averages": need["averages"],
        "activations": activations,
        "step": step,
        "graph": 0 if config.use_8bit_adam else step,
        "pictures": pictures,
    }


def copies(sd: StableDiffusion, config, half: bool) -> int:
    """Bytes of the 16-bit copies of weights that train, which a Precision keeps."""
    kept = half and not config.gradient_checkpointing
    return needed(sd, config)["trained"] // 2 if kept else 0


def drawing(sd: StableDiffusion, config, pixels: int, half: bool, pictures: int) -> int:
    """Bytes that the UNet works in while it draws so many at once, with guidance."""
    return copies(sd, config, half) + 2 * pictures * pixels * PREDICTING[half]


def phases(sd: StableDiffusion, config, pixels: int, half: bool) -> dict[str, tuple[int, int]]:
    """By phase of a run on a GPU, bytes that stay through it and bytes that it works in at most."""
    part, coding = parts(sd, config, pixels, half), pixels * CODING
    vae, text = size_of(sd.vae), 0 if config.text_changes else size_of(sd.text_encoder)

    # While a CUDA graph draws, what it works in is kept from the VAE.
    draw = drawing(sd, config, pixels, half, config.sample_batch_size) if config.uses_prior else 0
    first = max(draw, coding) if config.saves_memory else draw + coding
    if config.num_validation_images:
        first = max(first, drawing(sd, config, pixels, half, config.grid_batch_size))
    found = {"pictures before": (sum(placed(sd, config, half).values()), first)}

    if (
        config.explain
    ):  # there are no averages, yet or any more; of a gradient there are six at most
        gradients = 6 * max(size(p) for p in trainable(sd, config))
        looking = vae + max(part["activations"] + gradients, coding)
        film = text + vae + max(drawing(sd, config, pixels, half, 1), coding)
        found["explain"] = part["weights"], max(looking, film)

    work = max(part["step"], part["graph"] + part["pictures"])
    found["training"] = part["weights"] + part["averages"], work
    return found


def with_spare(stays: int, work: int) -> int:
    return int(stays + (1 + SPARE[0]) * work + SPARE[1])


def peak(sd: StableDiffusion, config, pixels: int, half: bool) -> int:
    """Bytes that a run needs at most on a GPU, about; the arguments are those of `parts`."""
    return max(with_spare(*phase) for phase in phases(sd, config, pixels, half).values())


def fit(
    sd: StableDiffusion, config, pixels: int, precision: str, device: torch.device, resumed: bool
) -> tuple:
    """The settings with the first of MODES that fits into the free memory, and a line that says so.

    What is on stays on. A run that is resumed gets nothing that changes its results.
    """
    free, half = room(sd, device), precision != "no"
    for mode in MODES:
        if possible(mode, config, precision, resumed) and installed(mode, device):
            fitted = replace(config, **dict.fromkeys(mode, True))
            need = peak(sd, fitted, pixels, half)
            if need <= free:
                break
    plain = peak(sd, config, pixels, half)
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
            if peak(sd, other, pixels, half) <= free:
                exact = replace(other, use_8bit_adam=False)
                saved = needed(sd, exact)["averages"] - needed(sd, other)["averages"]
                line += f"; {INSTALL} would make it fit: --use_8bit_adam saves {gigabytes(saved)}"
                break
    return fitted, line


def possible(mode: tuple[str, ...], config, precision: str, resumed: bool) -> bool:
    if resumed and any(name in LOSSY for name in mode):
        return False
    once = config.gradient_accumulation_steps == 1 and precision != "fp16"
    return once or "optimizer_in_backward" not in mode


def installed(mode: tuple[str, ...], device: torch.device) -> bool:
    """Whether bitsandbytes is there, for a mode that wants it."""
    if "use_8bit_adam" in mode:
        try:
            bitsandbytes(device)
        except UserError:
            return False
    return True


# ---- what saves it ------------------------------------------------------------------------------


@contextmanager
def checkpoint_gradients(unet: UNet, wanted: bool = True) -> Iterator[None]:
    """Within it, only what enters each resnet and transformer is kept; the backward pass computes
    the rest again. Same values, less memory, a third more to compute."""
    blocks = [m for m in unet.modules() if isinstance(m, ResnetBlock | Transformer)] * wanted
    for block in blocks:
        # No dropout anywhere, so there is no random state to keep.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own shows again


@contextmanager
def visiting(networks: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Networks that training does not need: on the device only while this lasts."""
    for network in networks:
        network.to(device)
    try:
        yield
    finally:
        for network in networks:
            network.to("cpu")


@contextmanager
def each_gradient(
    parameters: dict[str, nn.Parameter], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Within it, a backward pass gives each gradient to `take` and does not keep it."""

    def hook(name: str, p: nn.Parameter):
        @torch.no_grad()
        def call(p: nn.Parameter) -> None:
            gradient, p.grad = p.grad, None
            take(name, gradient)

        return p.register_post_accumulate_grad_hook(call)

    hooks = [hook(name, p) for name, p in parameters.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
