"""Small Stable Diffusion models with random weights, made and saved by diffusers and transformers."""

import json
from pathlib import Path

import diffusers
import torch
import transformers

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


def pipeline(kind: str = "sd1", seed: int = 0) -> diffusers.StableDiffusionPipeline:
    """"sd1", "sd2" (linear projections, heads per level, v, OpenCLIP's shape) or "inpaint"."""
    torch.manual_seed(seed)
    sd2 = kind == "sd2"
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        in_channels=9 if kind == "inpaint" else 4,
        cross_attention_dim=32,
        attention_head_dim=[2, 4] if sd2 else 4,
        use_linear_projection=sd2,
        norm_num_groups=8,
        sample_size=16,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        layers_per_block=2,
    )
    vocab, _ = vocabulary()
    text = transformers.CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="gelu" if sd2 else "quick_gelu",
        bos_token_id=0,
        eos_token_id=2,
    )
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


def save(folder: Path, kind: str = "sd1", seed: int = 0) -> diffusers.StableDiffusionPipeline:
    """Write such a model into a folder in the public layout, with its tokenizer; give it back."""
    pipe = pipeline(kind, seed)
    pipe.save_pretrained(folder)
    write_tokenizer(folder / "tokenizer", pad="!" if kind == "sd2" else "<|endoftext|>")
    pipe.tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return pipe
