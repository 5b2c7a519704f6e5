"""Small Stable Diffusion models with random weights, made by diffusers and transformers."""

import atexit
import functools
import json
import tempfile
from pathlib import Path

import diffusers
import tiny
import torch
import transformers
from torch import Tensor, nn

torch.set_num_threads(1)  # models this small only lose by sharing their work

WORDS = ["a", "sks", "dog", "cat", "in", "the", "snow", "photo", "of"]


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """A made-up CLIP vocabulary: all bytes, and merges that make WORDS single tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (pair := f"{parts[0]} {parts[1]}") not in merges:
                merges.append(pair)
            parts[:2] = [parts[0] + parts[1]]
    tokens = symbols + [s + "</w>" for s in symbols] + [m.replace(" ", "") for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def write_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> None:
    vocab, merges = vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"unk_token": "<|endoftext|>", "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def text_config(act: str, layers: int, width: int = 32) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=len(vocabulary()[0]),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_act=act,
        projection_dim=24,  # which SDXL's second reads
        bos_token_id=0,
        eos_token_id=2,
    )


def pipeline(
    kind: str = "sd1", seed: int = 0, text_layers: int = 2
) -> diffusers.StableDiffusionPipeline:
    """ "sd1", "sd2" (linear projections, heads per level, v, OpenCLIP's shape), "inpaint", or
    "half": sd1 of half the layers, for pictures of half the side."""
    torch.manual_seed(seed)
    sd2, layers = kind == "sd2", 1 if kind == "half" else 2
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=layers,
        in_channels=9 if kind == "inpaint" else 4,
        cross_attention_dim=32,
        attention_head_dim=[2, 4] if sd2 else 4,
        use_linear_projection=sd2,
        norm_num_groups=8,
        sample_size=8 * layers,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        layers_per_block=layers,
    )
    text = text_config("gelu" if sd2 else "quick_gelu", text_layers * layers // 2)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if sd2 else "epsilon",
    )
    cls = (
        diffusers.StableDiffusionInpaintPipeline
        if kind == "inpaint"
        else diffusers.StableDiffusionPipeline
    )
    pipe = cls(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SDXL = {  # of the public UNet's shape: the first level does not attend, the last is deepest
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 8],
}


def sdxl(seed: int = 0, layers: int = 1, **unet) -> diffusers.StableDiffusionXLPipeline:
    """A small SDXL; `layers` of the VAE and at each level, `unet` changes SDXL."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        **SDXL | unet,
        layers_per_block=layers,
        cross_attention_dim=32 + 48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=24 + 6 * 16,
        norm_num_groups=8,
        sample_size=16,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        layers_per_block=layers,
        scaling_factor=0.13025,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        timestep_spacing="leading",
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text_config("quick_gelu", 3)).eval(),
        text_encoder_2=transformers.CLIPTextModelWithProjection(text_config("gelu", 2, 48)).eval(),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


X4_BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "scaled_linear"}


def upscaler(seed: int = 0, **changes) -> diffusers.StableDiffusionUpscalePipeline:
    """Of the public model's shape: its first level does not attend, the next looks at text only."""
    torch.manual_seed(seed)
    shape = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "only_cross_attention": [True, True, False],
    }
    unet = diffusers.UNet2DConditionModel(
        **shape | changes,
        layers_per_block=1,
        in_channels=7,
        out_channels=4,
        cross_attention_dim=32,
        attention_head_dim=4,
        use_linear_projection=True,
        num_class_embeds=1000,
        norm_num_groups=8,
        sample_size=16,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        layers_per_block=1,
        scaling_factor=0.08333,
    )
    text = text_config("gelu", 2)
    main = diffusers.DDIMScheduler(
        **X4_BETAS,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = diffusers.StableDiffusionUpscalePipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=None,
        unet=unet,
        low_res_scheduler=diffusers.DDPMScheduler(**X4_BETAS, clip_sample=True),
        scheduler=main,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(folder: Path, kind: str = "sd1", seed: int = 0) -> diffusers.StableDiffusionPipeline:
    """Write such a model into a folder in the public layout, with its tokenizer; give it back."""
    made = {"sdxl": sdxl, "x4": upscaler}.get(kind)
    pipe = made(seed) if made else pipeline(kind, seed)
    write(folder, pipe, "!" if kind in ("sd2", "x4") else "<|endoftext|>")
    return pipe


def write(folder: Path, pipe: diffusers.DiffusionPipeline, pad: str = "<|endoftext|>", **how):
    """A pipeline that has no tokenizer yet, with one; `how` of save_pretrained."""
    pipe.save_pretrained(folder, **how)
    index = json.loads((folder / "model_index.json").read_text())
    pads = {"tokenizer": pad} | ({"tokenizer_2": "!"} if "tokenizer_2" in index else {})
    for name, pad in pads.items():
        write_tokenizer(folder / name, pad)
        setattr(pipe, name, transformers.CLIPTokenizer.from_pretrained(folder / name))
        index[name] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))


KEPT = tempfile.TemporaryDirectory()  # until the tests end
atexit.register(KEPT.cleanup)


@functools.cache
def model(kind: str = "sd1") -> tuple[Path, diffusers.StableDiffusionPipeline]:
    """A saved model that tests only read: its folder, and the pipeline it came from."""
    folder = Path(KEPT.name) / kind
    return folder, save(folder, kind)


def same_pictures(
    sd, folder: Path, prompts: tuple[str, ...] = ("a sks dog", "a cat"), **settings
) -> tuple[Tensor, Tensor]:
    """What `sd`, and diffusers with the model in `folder` and no dtype named, draw for the prompts
    from the same latents: each (N, 3, H, W) in [0, 1]."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(len(prompts), 4, side, side, generator=generator)
    settings = {"guidance_scale": 4.0, "latents": latents, **settings}
    ours = sd.generate(list(prompts), steps=3, output="pt", **settings)
    theirs = pipe(list(prompts), num_inference_steps=3, output_type="pt", **settings).images
    return ours, theirs


def same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    """Whether all weights of both have the same."""
    wanted = dict(theirs.named_parameters())
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert tiny.rel(p.grad, wanted[name].grad) < 1e-4, name


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Its weights; of transformers' spellings of text keys, the one without `text_model.`."""
    return {
        key.removeprefix("text_model."): value
        for key, value in module.state_dict().items()
        if not key.endswith("position_ids")
    }


# The modules of the models above in a single file of the original code, written out by hand.
LDM_UNET = """
conv_in                         input_blocks.0.0
time_embedding.linear_1         time_embed.0
time_embedding.linear_2         time_embed.2
down_blocks.0.resnets.0         input_blocks.1.0
down_blocks.0.attentions.0      input_blocks.1.1
down_blocks.0.resnets.1         input_blocks.2.0
down_blocks.0.attentions.1      input_blocks.2.1
down_blocks.0.downsamplers.0.conv  input_blocks.3.0.op
down_blocks.1.resnets.0         input_blocks.4.0
down_blocks.1.resnets.1         input_blocks.5.0
mid_block.resnets.0             middle_block.0
mid_block.attentions.0          middle_block.1
mid_block.resnets.1             middle_block.2
up_blocks.0.resnets.0           output_blocks.0.0
up_blocks.0.resnets.1           output_blocks.1.0
up_blocks.0.resnets.2           output_blocks.2.0
up_blocks.0.upsamplers.0.conv   output_blocks.2.1.conv
up_blocks.1.resnets.0           output_blocks.3.0
up_blocks.1.attentions.0        output_blocks.3.1
up_blocks.1.resnets.1           output_blocks.4.0
up_blocks.1.attentions.1        output_blocks.4.1
up_blocks.1.resnets.2           output_blocks.5.0
up_blocks.1.attentions.2        output_blocks.5.1
conv_norm_out                   out.0
conv_out                        out.2
"""
LDM_VAE = """
quant_conv                          quant_conv
post_quant_conv                     post_quant_conv
encoder.conv_in                     encoder.conv_in
encoder.down_blocks.0.resnets.0     encoder.down.0.block.0
encoder.down_blocks.0.resnets.1     encoder.down.0.block.1
encoder.down_blocks.0.downsamplers.0.conv  encoder.down.0.downsample.conv
encoder.down_blocks.1.resnets.0     encoder.down.1.block.0
encoder.down_blocks.1.resnets.1     encoder.down.1.block.1
encoder.mid_block.resnets.0         encoder.mid.block_1
encoder.mid_block.attentions.0      encoder.mid.attn_1
encoder.mid_block.resnets.1         encoder.mid.block_2
encoder.conv_norm_out               encoder.norm_out
encoder.conv_out                    encoder.conv_out
decoder.conv_in                     decoder.conv_in
decoder.mid_block.resnets.0         decoder.mid.block_1
decoder.mid_block.attentions.0      decoder.mid.attn_1
decoder.mid_block.resnets.1         decoder.mid.block_2
decoder.up_blocks.0.resnets.0       decoder.up.1.block.0
decoder.up_blocks.0.resnets.1       decoder.up.1.block.1
decoder.up_blocks.0.resnets.2       decoder.up.1.block.2
decoder.up_blocks.0.upsamplers.0.conv  decoder.up.1.upsample.conv
decoder.up_blocks.1.resnets.0       decoder.up.0.block.0
decoder.up_blocks.1.resnets.1       decoder.up.0.block.1
decoder.up_blocks.1.resnets.2       decoder.up.0.block.2
decoder.conv_norm_out               decoder.norm_out
decoder.conv_out                    decoder.conv_out
"""
UNET_RESNET = """
norm1 in_layers.0
conv1 in_layers.2
time_emb_proj emb_layers.1
norm2 out_layers.0
conv2 out_layers.3
conv_shortcut skip_connection
"""
VAE_INNER = """
group_norm norm
to_q q
to_k k
to_v v
to_out.0 proj_out
conv_shortcut nin_shortcut
"""
OPEN_CLIP_LAYER = """
layer_norm1 ln_1
layer_norm2 ln_2
mlp.fc1 mlp.c_fc
mlp.fc2 mlp.c_proj
self_attn.out_proj attn.out_proj
"""


def table(text: str) -> dict[str, str]:
    return dict(line.split() for line in text.strip().splitlines())


def renamed(state: dict[str, Tensor], modules: str, inner: str) -> dict[str, Tensor]:
    out = {}
    for key, value in state.items():
        ours, theirs = next(
            (ours, theirs) for ours, theirs in table(modules).items() if key.startswith(ours + ".")
        )
        rest = key.removeprefix(ours + ".")
        for a, b in table(inner).items():
            if rest.startswith(a + "."):
                rest = b + rest.removeprefix(a)
                break
        out[f"{theirs}.{rest}"] = value
    assert len(out) == len(state)
    return out


def ldm_vae(vae: nn.Module) -> dict[str, Tensor]:
    """A VAE under its bare names in the original code; attention as 1×1 convolutions."""
    out = renamed(tensors(vae), LDM_VAE, VAE_INNER)
    return {k: v[:, :, None, None] if v.ndim == 2 else v for k, v in out.items()}


def ldm(pipe: diffusers.StableDiffusionPipeline) -> dict[str, Tensor]:
    """The whole model as the original code keeps it, without training state."""
    unet = renamed(tensors(pipe.unet), LDM_UNET, UNET_RESNET)
    out = {f"model.diffusion_model.{k}": v for k, v in unet.items()}
    out |= {f"first_stage_model.{k}": v for k, v in ldm_vae(pipe.vae).items()}
    text = tensors(pipe.text_encoder)
    if pipe.text_encoder.config.hidden_act == "quick_gelu":
        return out | {f"cond_stage_model.transformer.text_model.{k}": v for k, v in text.items()}
    prefix = "cond_stage_model.model."
    out[prefix + "token_embedding.weight"] = text["embeddings.token_embedding.weight"]
    out[prefix + "positional_embedding"] = text["embeddings.position_embedding.weight"]
    for kind in ("weight", "bias"):
        out[f"{prefix}ln_final.{kind}"] = text[f"final_layer_norm.{kind}"]
        for i in range(pipe.text_encoder.config.num_hidden_layers):
            ours, theirs = f"encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
            qkv = [text[f"{ours}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            out[f"{theirs}attn.in_proj_{kind}"] = torch.cat(qkv)
            for a, b in table(OPEN_CLIP_LAYER).items():
                out[f"{theirs}{b}.{kind}"] = text[f"{ours}{a}.{kind}"]
    return out
