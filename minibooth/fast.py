"""Speed and memory, around the training step and never inside it."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from .unet import Transformer, UNet
from .vae import ResnetBlock


def checkpoint_gradients(unet: UNet) -> None:
    """Keep only what enters each resnet and transformer; the backward pass computes the rest again.

    Same values, less memory, a third more to compute. In place.
    """
    for module in unet.modules():
        if isinstance(module, ResnetBlock | Transformer):
            # No dropout anywhere, so there is no random state to keep.
            module.forward = partial(
                checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
            )
