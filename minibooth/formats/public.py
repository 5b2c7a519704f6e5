"""The public models' configs.

Networks are built from a checkpoint's own config files. A single file in LDM layout has none, so
they are written down here.
"""

SD1_UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD_VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD1_TEXT = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
}
SD_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
SD2_UNET = SD1_UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD2_TEXT = SD1_TEXT | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,  # of OpenCLIP's 24: SD 2.x was trained on the last but one
}
SD2_V = {"sample_size": 96, "upcast_attention": True}  # SD 2.x with v was trained at 768²
SDXL_UNET = SD1_UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "use_linear_projection": True,
}
SDXL_VAE = SD_VAE | {"force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025}
SDXL_TEXT_2 = SD1_TEXT | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
SDXL_SCHEDULER = SD_SCHEDULER | {
    "_class_name": "EulerDiscreteScheduler",
    "set_alpha_to_one": True,
}
X4_UNET = SD2_UNET | {
    "attention_head_dim": 8,
    "block_out_channels": [256, 512, 512, 1024],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
    "in_channels": 7,
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "sample_size": 128,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
}
X4_VAE = SD_VAE | {
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "sample_size": 256,
    "scaling_factor": 0.08333,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
X4_BETAS = {"beta_end": 0.02, "beta_start": 0.0001}
X4_SCHEDULER = SD_SCHEDULER | X4_BETAS | {"prediction_type": "v_prediction"}
X4_SMALL = SD_SCHEDULER | X4_BETAS | {"_class_name": "DDPMScheduler", "clip_sample": True}
X4_LEVELS = 350
# stable-diffusion-x4-upscaler.
X4 = {
    "unet": X4_UNET,
    "vae": X4_VAE,
    "text_encoder": SD2_TEXT,
    "scheduler": X4_SCHEDULER,
    "low_res_scheduler": X4_SMALL,
}
# A single file says nothing of its sizes; the width of its text conditioning tells them apart.
SINGLE_FILE = {
    768: {"unet": SD1_UNET, "vae": SD_VAE, "text_encoder": SD1_TEXT, "scheduler": SD_SCHEDULER},
    1024: {"unet": SD2_UNET, "vae": SD_VAE, "text_encoder": SD2_TEXT, "scheduler": SD_SCHEDULER},
    2048: {
        "unet": SDXL_UNET,
        "vae": SDXL_VAE,
        "text_encoder": SD1_TEXT,
        "text_encoder_2": SDXL_TEXT_2,
        "scheduler": SDXL_SCHEDULER,
    },
}
