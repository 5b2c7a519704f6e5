"""Part 4 of tutorial.md. Fill in, then: python exercises/check.py unet"""

import torch

from minibooth.formats.public import SD1_UNET
from minibooth.unet import UNet


def up_channels(widths: list[int], layers: int) -> list[list[int]]:
    """How many channels enter each resnet on the way up, a list per level.

    Before each resnet the top of the stack is put beside what comes from below. On the way down the
    stack got conv_in's output, then that of every layer and every downsampler.
    """
    raise NotImplementedError


# ---- checks: no need to read on ----------------------------------------------------------------


def check_up_channels():
    for widths, layers in (([320, 640, 1280, 1280], 2), ([32, 64, 96], 1)):
        config = SD1_UNET | {"block_out_channels": widths, "layers_per_block": layers}
        for kind in ("down", "up"):
            config[f"{kind}_block_types"] = config[f"{kind}_block_types"][: len(widths)]
        with torch.device("meta"):
            unet = UNet(config)
        want = [[r.conv1.in_channels for r in level.resnets] for level in unet.up_blocks]
        found = up_channels(widths, layers)
        assert found == want, f"for widths {widths}, {layers} layers: {found}, not {want}"
