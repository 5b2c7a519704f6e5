"""Models of the size that is measured, with random weights."""

import torch

from ..formats.checkpoint import memory_format
from ..formats.configs import SD1_TEXT, SD1_UNET, SD_SCHEDULER, SD_VAE
from ..formats.scheduler import read_schedule
from ..pipeline import StableDiffusion
from ..text_encoder import TextEncoder
from ..tokenizer import BOS, EOS, Tokenizer
from ..toybox.pretrain import TEXT_CONFIG, UNET_CONFIG, VAE_CONFIG
from ..unet import UNet
from ..vae import VAE

CONFIGS = {
    "SD 1.5": {"unet": SD1_UNET, "vae": SD_VAE, "text_encoder": SD1_TEXT},
    "toybox": {"unet": UNET_CONFIG, "vae": VAE_CONFIG, "text_encoder": TEXT_CONFIG},
}


def model(size: str, device: torch.device) -> StableDiffusion:
    """Random weights of that size, and a tokenizer that knows bytes only."""
    configs = {**CONFIGS[size], "scheduler": SD_SCHEDULER}
    characters = [chr(i) for i in range(33, 127)]
    tokens = [*characters, *(c + "</w>" for c in characters), BOS, EOS]
    tokenizer = Tokenizer({token: i for i, token in enumerate(tokens)}, [])
    configs["text_encoder"] = {"vocab_size": len(tokens), **configs["text_encoder"]}
    torch.manual_seed(0)
    with torch.device(device):
        networks = {
            "unet": UNet(configs["unet"]),
            "vae": VAE(configs["vae"]),
            "text_encoder": TextEncoder(configs["text_encoder"]),
        }
    for name, network in networks.items():
        network.eval().to(memory_format=memory_format(name, device))
    schedule = read_schedule(SD_SCHEDULER).to(device)
    return StableDiffusion(tokenizer, schedule=schedule, configs=configs, source=size, **networks)
