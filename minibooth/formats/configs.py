"""What checkpoints say of themselves: what their configs mean, and what is accepted."""

import re
import warnings
from collections.abc import Iterable

from ..common.errors import UserError
from .public import SD1_UNET, SD_VAE, SINGLE_FILE, X4, X4_VAE

# By how many numbers their UNets are told of each token.
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}


def family(widths: list[int]) -> str | None:
    """Of a model whose text encoders make so many numbers of each token."""
    return "SDXL" if len(widths) == 2 else FAMILIES.get(sum(widths))


def misfit(made: str | None, this: str | None) -> str:
    """What to say of what was made for one family and is given to another; None is unknown."""
    if made in (None, this):
        return "is for another model"
    return f"is for {made}, " + (f"and this model is {this}" if this else "not for this model")


# What an entry means that a scheduler's config lacks, as those of 2022 do: the default of the class
# in diffusers that it names.
UNSAID = {
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
}
NO_CLIP, SD_BETAS = {"clip_sample": False}, {"beta_end": 0.012, "beta_start": 0.00085}
LIKE_EULER = NO_CLIP | {"timestep_spacing": "linspace"}  # and most of the other classes
LIKE_HEUN = LIKE_EULER | SD_BETAS
LIKE_LCM = NO_CLIP | SD_BETAS | {"beta_schedule": "scaled_linear"}
UNSAID_BY = {
    "DDIMScheduler": {},
    "DDIMParallelScheduler": {},
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "PNDMScheduler": NO_CLIP | {"set_alpha_to_one": False},
    "HeunDiscreteScheduler": LIKE_HEUN,
    "KDPM2DiscreteScheduler": LIKE_HEUN,
    "KDPM2AncestralDiscreteScheduler": LIKE_HEUN,
    "LCMScheduler": LIKE_LCM,
    "TCDScheduler": LIKE_LCM,
}
READ_FINAL = ("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler", "LCMScheduler")
READ_FINAL += ("TCDScheduler",)  # the classes that look at set_alpha_to_one: the others end at 1


def is_public_size(configs: dict[str, dict]) -> bool:
    """Whether a model has the sizes of a public one, so that other programs take it."""
    public, name = SINGLE_FILE.get(configs["unet"]["cross_attention_dim"]), "block_out_channels"
    public = X4 if "low_res_scheduler" in configs else public
    return public is not None and list(configs["unet"][name]) == public["unet"][name]


# By the channels that its UNet is given: diffusers' class for a model, and what is in the channels
# beside the 4 of the latents that it cleans.
PIPELINES = {
    4: ("StableDiffusionPipeline", "nothing else"),
    5: ("StableDiffusionDepth2ImgPipeline", "a depth map"),
    7: ("StableDiffusionUpscalePipeline", "the small picture that it enlarges (an upscaler)"),
    8: ("StableDiffusionInstructPix2PixPipeline", "the picture that it edits (InstructPix2Pix)"),
    9: ("StableDiffusionInpaintPipeline", "a picture and a mask (inpainting)"),
}
# Other models, in plain words: by diffusers' name for them, and by a key in their files.
A_VAE = "a VAE: give it as --vae, and as --model the model to draw with it"
OTHER_CLASSES = (
    (r"StableDiffusion3|SD3Transformer", "Stable Diffusion 3"),
    (r"^Flux", "Flux"),
    (r"^ControlNet|XLControlNet|XLAdapter", "a ControlNet"),
    (r"^Autoencoder", A_VAE),
    (r"LatentUpscale", "an upscaler of latents"),
    (r"^UNet2DConditionModel", "a UNet alone: give the folder that it is in"),
    (r"Transformer2D|Transformer3D", "a network of another kind"),
)
OTHER_FILES = (
    (r"(^|\.)joint_blocks\.", "Stable Diffusion 3"),
    (r"(^|\.)double_blocks\.", "Flux"),
    (r"^(control_model|input_hint_block|controlnet_cond_embedding)\.", "a ControlNet"),
    (r"^(first_stage_model\.)?(encoder|decoder)\.conv_in\.", A_VAE),
    (
        r"^(input_blocks|down_blocks|time_embed|time_embedding)\.",
        "a UNet alone: get the whole model",
    ),
    (r"^(emb_params|\*)$", "a word: give it as --embedding to sample"),
)
ONLY = ": only Stable Diffusion 1.x, 2.x and XL can be used here"
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
REFINER = f"SDXL's refiner, which only goes over what the base has drawn: take {SDXL_BASE}"
DISTILLED = (
    "a distilled SDXL, as SSD-1B and Segmind's, whose UNet has blocks left out: take the model "
    f"that it was made from, such as {SDXL_BASE}"
)


def other_class(name: str) -> str | None:
    """What a model is that diffusers calls so; None where it can be Stable Diffusion."""
    return next((words for pattern, words in OTHER_CLASSES if re.search(pattern, name)), None)


def is_distilled(unet: dict) -> bool:
    """Whether a UNet's config is of an SDXL with blocks left out, which the networks cannot be."""
    depths = unet.get("transformer_layers_per_block")
    nested = isinstance(depths, list) and any(isinstance(depth, list) for depth in depths)
    whole = "UNetMidBlock2DCrossAttn"
    less = nested or unet.get("mid_block_type", whole) != whole
    return less and unet.get("addition_embed_type") == "text_time"


def other_file(keys: Iterable[str]) -> str | None:
    """What a single file with these keys is; None where nothing tells."""
    keys = list(keys)
    found = (what for pattern, what in OTHER_FILES if any(re.search(pattern, k) for k in keys))
    return next(found, None)


def what_else_it_sees(unet: dict) -> str:
    """Of a UNet that is given more than the latents that it cleans, in words."""
    channels = unet["in_channels"]
    what = PIPELINES.get(channels, ("", f"{channels} channels"))[1]
    return f"this model's UNet wants more than noise and a prompt, {what}"


# What the networks do is written in their code; a config that wants something else is refused.
ACCEPTED: dict[str, dict[str, tuple]] = {
    "unet": {
        "act_fn": ("silu", "swish"),
        "addition_embed_type": (None, "text_time"),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "mid_block_only_cross_attention": (None, False),
        "only_cross_attention": (None, False, True),
        "resnet_time_scale_shift": ("default",),
        "reverse_transformer_layers_per_block": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_type": ("positional",),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "vae": {
        "act_fn": ("silu", "swish"),
        "down_block_types": ("DownEncoderBlock2D",),
        "in_channels": (3,),
        "latents_mean": (None,),
        "out_channels": (3,),
        "shift_factor": (None,),
        "up_block_types": ("UpDecoderBlock2D",),
        "use_post_quant_conv": (True,),
        "use_quant_conv": (True,),
    },
    "text_encoder": {"hidden_act": ("quick_gelu", "gelu")},
    "text_encoder_2": {"hidden_act": ("quick_gelu", "gelu")},
    "scheduler": {},
    "low_res_scheduler": {},
}
# Whole numbers and the largest that makes sense: each costs modules or memory.
LARGEST = {
    "addition_time_embed_dim": 10_000,
    "attention_head_dim": 1000,
    "block_out_channels": 100_000,
    "cross_attention_dim": 100_000,
    "hidden_size": 100_000,
    "in_channels": 1000,
    "intermediate_size": 1_000_000,
    "latent_channels": 1000,
    "layers_per_block": 10,
    "max_position_embeddings": 10_000,
    "norm_num_groups": 100_000,
    "num_class_embeds": 100_000,
    "num_attention_heads": 1000,
    "num_hidden_layers": 100,
    "num_train_timesteps": 100_000,
    "out_channels": 1000,
    "projection_class_embeddings_input_dim": 100_000,
    "projection_dim": 100_000,
    "sample_size": 100_000,
    "transformer_layers_per_block": 100,
    "vocab_size": 10_000_000,
}
PER_LEVEL = ("block_out_channels", "attention_head_dim", "num_attention_heads")  # may be lists
PER_LEVEL += ("transformer_layers_per_block",)
POSITIVE = ("norm_eps", "layer_norm_eps", "scaling_factor", "beta_start", "beta_end")


def settle(configs: dict[str, dict]) -> None:
    """Have the configs of a model say what is meant, as diffusers' StableDiffusionPipeline reads
    them: what they leave out, and what files of 2022 have wrong. Warns of the latter.

    Latents are not clipped, SD's "leading" timesteps begin at 1, and no Stable Diffusion of before
    diffusers 0.9 was trained on less than 512² pixels: 64² latents.
    """
    scheduler, unet = configs["scheduler"], configs["unet"]
    kind = say_all(scheduler)
    if kind not in READ_FINAL and "text_encoder_2" in configs:  # SD's are read as ever
        scheduler["set_alpha_to_one"] = True  # SDXL's own says false beside EulerDiscreteScheduler
    outdated = []

    def correct(config: dict, key: str, value) -> None:
        outdated.append(f"{key} {config[key]} → {value}")
        config[key] = value

    if "low_res_scheduler" in configs:
        say_all(configs["low_res_scheduler"])
        configs["vae"].setdefault("scaling_factor", X4_VAE["scaling_factor"])
        if configs["vae"]["scaling_factor"] == SD_VAE["scaling_factor"]:  # of nothing said, once
            correct(configs["vae"], "scaling_factor", X4_VAE["scaling_factor"])
    if scheduler["clip_sample"] is True:
        correct(scheduler, "clip_sample", False)
    offset = scheduler["steps_offset"]
    if type(offset) is int and offset != 1 and "text_encoder_2" not in configs:
        correct(scheduler, "steps_offset", 1)
    version = re.match(r"(\d+)\.(\d+)", str(unet.get("_diffusers_version")))
    size = unet.get("sample_size")
    if version and (int(version[1]), int(version[2])) < (0, 9) and type(size) is int and size < 64:
        correct(unet, "sample_size", 64)
    if outdated:
        warnings.warn(
            "the model's configs are outdated, and read as diffusers' pipeline does: "
            + ", ".join(outdated),
            stacklevel=4,
        )
    size = unet.get("sample_size")
    of_sd = unet.get("block_out_channels") == SD1_UNET["block_out_channels"]
    if of_sd and type(size) is int and size < 64:
        warnings.warn(
            f"the unet's config says sample_size {size}, so pictures are {8 * size}² pixels: if "
            "the model was trained on 512² as Stable Diffusion was, give --resolution 512 to "
            "train it, --height 512 --width 512 to draw",
            stacklevel=4,
        )


def say_all(scheduler: dict) -> str:
    """Have a scheduler's config say what its class takes where it says nothing; that class."""
    kind = str(scheduler.get("_class_name", "DDIMScheduler")).removeprefix("Flax")
    for key, value in (UNSAID | UNSAID_BY.get(kind, LIKE_EULER)).items():
        scheduler.setdefault(key, value)
    return kind


def check_config(name: str, config: dict) -> None:
    """Raise UserError unless what the config says is what the code does, and of a sane size."""
    for key, value in config.items():
        values = value if isinstance(value, list | tuple) else [value]
        accepted, largest = ACCEPTED[name].get(key), LARGEST.get(key)
        if accepted and any(v not in accepted for v in values):
            raise UserError(
                f"the {name}'s config says {key} = {value!r:.80}, which Stable Diffusion 1.x, 2.x "
                "and XL do not have: another kind of model"
            )
        if largest and value is not None:
            few = len(values) <= 8 if key in PER_LEVEL else values == [value]
            sane = few and all(type(v) is int and 0 < v <= largest for v in values)
        else:
            sane = key != "only_cross_attention" or not values[-1]  # as the middle, which is last
            sane &= key not in POSITIVE or (isinstance(value, int | float) and 0 < value < 1e6)
        if not sane:
            raise UserError(f"the {name}'s config says {key} = {value!r:.80}, which cannot be")
