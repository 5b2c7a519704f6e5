"""What a model's weights are, before and while a network is built of them."""

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..common.errors import UserError, first_line
from ..text_encoder import TextEncoder
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE
from .configs import check_config

NETWORKS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "vae": VAE,
    "text_encoder": TextEncoder,
    "text_encoder_2": TextEncoder,  # SDXL's
}
DIFFUSERS, TRANSFORMERS = ("diffusion_pytorch_model",), ("model", "pytorch_model")
STEMS = {name: TRANSFORMERS if "text" in name else DIFFUSERS for name in NETWORKS}
LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENSE-MODEL")


@dataclass
class Checkpoint:
    """What a source holds, under diffusers' names, before any network is built."""

    configs: dict[str, dict]  # of each network and the scheduler, as in their files
    tensors: dict[str, dict[str, Tensor]]  # per network; memory-mapped where the file allows
    tokenizer: Tokenizer | None = None
    licence: str | None = None  # its short name, as in the head of a model card
    licence_files: dict[str, str] = field(default_factory=dict)
    needs_probe: bool = False  # nothing says whether the UNet predicts ε or v
    zeros_for_empty: bool = False  # as in formats.parts.Parts
    levels: int | None = None  # the same

    @property
    def networks(self) -> list[str]:
        return networks_of(self.configs)


def networks_of(configs: dict[str, dict]) -> list[str]:
    """The names of those that a model has."""
    return [name for name in NETWORKS if name in configs]


def legacy_names(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Old and new spellings of diffusers and transformers → the one that the networks use."""
    out = {}
    for key, tensor in tensors.items():
        if name.startswith("text_encoder"):
            key = key.removeprefix("text_model.")
        elif name == "vae":
            for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
                key = key.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
            key = key.replace("attentions.0.proj_attn.", "attentions.0.to_out.0.")
        if not key.endswith("position_ids"):
            out[key] = tensor
    return out


def build_all(found: Checkpoint, dtype: torch.dtype, device) -> dict[str, nn.Module]:
    """The networks, by name, with the weights that are taken out of `found`.

    Under fp16 the VAE stays fp32, since some overflow to black pictures: SDXL's does. The one that
    was mended (madebyollin/sdxl-vae-fp16-fix) would not, and says "force_upcast": false in a
    folder; a single file cannot say which it holds. So it costs memory, and no file its pictures.
    """
    dtypes = dict.fromkeys(NETWORKS, dtype)
    if dtype == torch.float16:
        dtypes["vae"] = torch.float32
    return {
        name: build(name, found.configs[name], found.tensors.pop(name), dtypes[name], device)
        for name in found.networks
    }


def build(
    name: str, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype, device
) -> nn.Module:
    """A network with these weights. It is laid out on the meta device first: no second copy.

    Raises UserError naming a missing or misshapen tensor; warns once of those it has no place for.
    """
    module = skeleton(name, config)
    expected, found = module.state_dict(), {}
    for key, want in expected.items():
        if key not in tensors:
            raise UserError(f"the {name}'s weights lack {key}")
        tensor = tensors[key]
        if tensor.shape != want.shape:
            if trim(tensor.shape) != trim(want.shape):
                raise UserError(
                    f"the {name}'s {key} is {list(tensor.shape)}, its config wants "
                    f"{list(want.shape)}"
                )
            tensor = tensor.reshape(want.shape)  # a linear kept as a 1×1 convolution, or back
        if not tensor.is_floating_point():
            raise UserError(f"the {name}'s {key} holds {tensor.dtype}, not floating-point weights")
        found[key] = tensor.to(device, dtype)
    if unexpected := sorted(tensors.keys() - expected.keys()):
        warn_unexpected(f"the {name}'s weights", unexpected)
    module.load_state_dict(found, assign=True)
    return module.eval().to(memory_format=memory_format(name, device))


def memory_format(name: str, device: str | torch.device) -> torch.memory_format:
    """The order of the weights in memory in which convolutions are fastest.

    A GPU wants the channels last, and so does the VAE on a CPU; the UNet is no faster for it there
    and stays in the file that it is mapped from.
    """
    last = name == "vae" or torch.device(device).type == "cuda"
    return torch.channels_last if last else torch.preserve_format


def skeleton(name: str, config: dict) -> nn.Module:
    """The network on the meta device: shapes, no memory. Raises UserError for a bad config."""
    check_config(name, config)
    try:
        with torch.device("meta"):
            module = NETWORKS[name](config)
        for part in module.modules():
            if hasattr(part, "heads") and (width := len(next(part.parameters()))) % part.heads:
                raise ValueError(f"{part.heads} heads do not divide a width of {width}")
        return module
    except KeyError as e:
        raise UserError(f"the {name}'s config lacks {e}") from None
    except Exception as e:
        raise UserError(f"the {name}'s config does not describe one: {first_line(e)}") from None


def trim(shape: torch.Size) -> list[int]:
    """The shape without the 1s at its end."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return sizes


def warn_unexpected(where: str, keys: list[str]) -> None:
    shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    warnings.warn(f"{where} have tensors that are not used: {shown}", stacklevel=3)
