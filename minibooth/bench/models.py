"""Models of the size that is measured, with random weights."""

import torch

from ..formats.checkpoint import NETWORKS, memory_format, networks_of
from ..formats.public import SD_SCHEDULER, SINGLE_FILE, X4, X4_LEVELS
from ..formats.scheduler import read_schedule
from ..pipeline import StableDiffusion
from ..tokenizer import BOS, EOS, PairedTokenizer, Tokenizer
from ..toybox.pretrain import TEXT_CONFIG, UNET_CONFIG, VAE_CONFIG
from ..upscaler import Upscaler

CONFIGS = {
    "SD 1.5": SINGLE_FILE[768],
    "SDXL": SINGLE_FILE[2048],
    "x4": X4,
    "toybox": {"unet": UNET_CONFIG, "vae": VAE_CONFIG, "text_encoder": TEXT_CONFIG},
}


def model(size: str, device: torch.device) -> StableDiffusion:
    """Random weights of that size, and a tokenizer that knows bytes only."""
    configs = {"scheduler": SD_SCHEDULER, **CONFIGS[size]}
    characters = [chr(i) for i in range(33, 127)]
    tokens = [*characters, *(c + "</w>" for c in characters), BOS, EOS]
    kind = PairedTokenizer if "text_encoder_2" in configs else Tokenizer
    tokenizer = kind({token: i for i, token in enumerate(tokens)}, [])
    configs["text_encoder"] = {"vocab_size": len(tokens), **configs["text_encoder"]}
    torch.manual_seed(0)
    with torch.device(device):
        networks = {name: NETWORKS[name](configs[name]) for name in networks_of(configs)}
    for name, network in networks.items():
        network.eval().to(memory_format=memory_format(name, device))
    schedule = read_schedule(configs["scheduler"]).to(device)
    how = {"schedule": schedule, "configs": configs, "source": size, **networks}
    if "low_res_scheduler" in configs:
        return Upscaler(tokenizer, levels=X4_LEVELS, **how)
    return StableDiffusion(tokenizer, **how)
