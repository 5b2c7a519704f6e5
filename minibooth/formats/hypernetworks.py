"""Hypernetworks' files, in and out: .pt as AUTOMATIC1111 and ComfyUI have them, and NovelAI's.

A pickled dictionary: for each width d, under the whole number d, the weights of f_k and of f_v;
under words, how they are built. NovelAI's first files have no words.
"""

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import hypernetwork
from ..common.errors import UserError
from ..common.files import atomic, require_space
from ..hypernetwork import Form, Hypernetwork
from ..unet import UNet
from .adapters import family_of, file_and_strength
from .configs import FAMILIES, misfit
from .tensor_files import explained, require_range, unpickled

ENDING = ".pt"
KEY = re.compile(r"linear\.?(\d+)\.(weight|bias)")  # linear.0.weight; NovelAI's linear1.weight


def held_by(folder: Path) -> list[Path]:
    """The files in a folder that can be hypernetworks."""
    return sorted(folder.glob(f"*{ENDING}"))


def find(path: str | Path) -> Path:
    """The file itself, or the one in a folder. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        found = held_by(path)
        if len(found) != 1:
            raise UserError(f"{path} has {len(found)} files {ENDING}: give one")
        [path] = found
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    return path


def check_there(given: Iterable[str]) -> None:
    """Raise UserError unless these are, each FILE or FILE:STRENGTH."""
    for file, _ in map(file_and_strength, given):
        find(file)


# ---- in ----------------------------------------------------------------------------------------


def read(path: str | Path, unet: UNet) -> Hypernetwork:
    """The hypernetwork of a file, or of a folder with one: fp32, not attached.

    Raises UserError where it is none, damaged or hostile, or has a width that no attention of this
    UNet reads.
    """
    path = find(path)
    with explained(path):
        held = unpickled(path)
    held = held if isinstance(held, dict) else {}
    pairs = {d: of_it for d, of_it in held.items() if type(d) is int}
    if not pairs:
        raise UserError(f"{path} is no hypernetwork: no width has networks in it")
    try:
        hypernetwork.require_widths(unet, pairs)
        with explained(path):
            form = form_of(held)
    except UserError as e:
        made, this = next((FAMILIES[d] for d in pairs if d in FAMILIES), None), family_of(unet)
        other = "" if made in (None, this) else f"; it {misfit(made, this)}"
        raise UserError(f"{path} does not fit: {e}{other}") from None
    with torch.device("meta"):  # of whatever size it says; the tensors in it come instead
        made = Hypernetwork(form, pairs)
    for d, of_it in pairs.items():
        with explained(path):
            k, v = of_it
            pair = made.pairs[str(d)]
            fits = fill(pair.k, k) and fill(pair.v, v)
        if not fits:
            raise UserError(
                f"{path} is damaged: its layers for {d} are not those of {form.structure}"
            )
    return made


def form_of(held: Mapping) -> Form:
    """How the networks of a file are built. Those without a word for it have an activation after
    the last layer, if they have any."""
    return Form(
        tuple(held.get("layer_structure") or (1, 2, 1)),
        held.get("activation_func") or "linear",
        bool(held.get("activate_output", True)),
        bool(held.get("is_layer_norm", False)),
    )


def fill(f: nn.Sequential, stored: Mapping[str, Tensor]) -> bool:
    """Give f the stored tensors, if they are for its layers. Their numbers only give the order: in
    them files count activations, and dropout, which does nothing where nothing is trained."""
    layers = [layer for layer in f if list(layer.parameters())]
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        part = KEY.fullmatch(key)
        found.setdefault(int(part[1]), {})[part[2]] = tensor.float()
    states = [found[number] for number in sorted(found)]
    shapes = [{key: x.shape for key, x in state.items()} for state in states]
    if shapes != [{key: p.shape for key, p in layer.named_parameters()} for layer in layers]:
        return False
    for layer, state in zip(layers, states, strict=True):
        layer.load_state_dict(state, assign=True)
    return True


def attach_files(unet: UNet, given: Iterable[str]) -> None:
    """Attach hypernetworks' files, each FILE or FILE:STRENGTH; the first is applied first. Raises
    UserError."""
    weight = unet.conv_in.weight
    for file, strength in reversed([file_and_strength(x) for x in given]):
        made = read(file, unet).to(weight.device, weight.dtype)
        hypernetwork.attach(unet, made, strength)


# ---- out ---------------------------------------------------------------------------------------


def write(
    path: str | Path,
    made: Hypernetwork,
    dtype: torch.dtype | None = None,
    about: Mapping[str, object] | None = None,
) -> None:
    """Write a .pt. `about` goes before what is said otherwise: "step", "sd_checkpoint_name" …"""
    path, form, held = Path(path), made.form, {}
    for d, pair in made.pairs.items():
        of_both = [{f"linear.{k}": x for k, x in f.state_dict().items()} for f in (pair.k, pair.v)]
        for which, tensors in zip("kv", of_both, strict=True):
            require_range(f"{path} ({d}, {which})", tensors, dtype)
        held[int(d)] = tuple({k: x.to("cpu", dtype) for k, x in f.items()} for f in of_both)
    held |= {
        "step": 0,
        "name": path.stem,
        "layer_structure": [int(x) if x == int(x) else x for x in form.structure],
        "activation_func": form.activation,
        "is_layer_norm": form.layer_norm,
        "weight_initialization": "Normal",
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "activate_output": form.activate_output,
        "use_dropout": False,
        "dropout_structure": [0] * len(form.structure),
        "last_layer_dropout": False,
        "optional_info": None,
        **(about or {}),
    }
    written = io.BytesIO()  # PyTorch's own writing says nothing of a disk that is full
    torch.save(held, written)
    require_space(path, written.tell())
    with atomic(path) as part:
        part.write_bytes(written.getbuffer())
