"""What a model's config says of the noise schedule; where none says it, what its UNet predicts."""

import torch

from .. import schedule
from ..common.errors import UserError, first_line
from ..schedule import Schedule
from ..unet import UNet
from .checkpoint import Checkpoint
from .configs import check_config
from .public import SD2_V


def settle(found: Checkpoint, unet: UNet, prediction_type: str | None) -> Schedule:
    """The schedule for what the UNet predicts: `prediction_type`, or what the model says, or, where
    that says nothing, what a probe shows. The configs then say it, too."""
    config = found.configs["scheduler"]
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    elif found.needs_probe and predicts_v(unet):
        config["prediction_type"] = "v_prediction"
    if found.needs_probe and config["prediction_type"] == "v_prediction":
        found.configs["unet"] |= SD2_V
    return read_schedule(config)


def read_schedule(config: dict) -> Schedule:
    check_config("scheduler", config)
    try:
        built = Schedule.from_config(config)
        schedule.timesteps(built, 1)  # a step would also stumble over an offset that is no number
        return built
    except (TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"the scheduler's config is damaged: {first_line(e)}") from None


@torch.no_grad()
def predicts_v(unet: UNet) -> bool:
    """Whether an SD 2.x UNet predicts v: given almost pure noise, ε is its input and v is not.

    The test is AUTOMATIC1111's: a constant input at the last timestep, mean(output − input) < −1.
    """
    weight = unet.conv_in.weight
    x = torch.full((1, weight.shape[1], 8, 8), 0.5, device=weight.device)
    width = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.in_features
    context = torch.full((1, 2, width), 0.5, device=weight.device)
    t = torch.tensor([999], device=weight.device)
    prediction = unet(x, t, context).float()
    return (prediction - x[:, : prediction.shape[1]]).mean().item() < -1
