"""Hostile and damaged files: one line, and nothing is run."""

import builtins
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import types

import peers
import pytest
import torch
from safetensors.torch import save_file
from weight_files import TEXT_FILE, UNET_FILE, VAE_FILE, copy, legacy, one_line, zipped

import minibooth
from minibooth.common.errors import UserError
from minibooth.formats import ldm, tensor_files


class Reduced:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile_calls(victim):
    """What to call, and by which name a reader should report it."""
    from numpy.testing._private.utils import runstring  # what a too generous allowlist would run

    write = f"open({str(victim)!r}, 'w').close()"
    return {
        "system": (Reduced(os.system, f"touch {victim}"), "system"),
        "eval": (Reduced(builtins.eval, write), "eval"),
        "exec": (Reduced(builtins.exec, write), "exec"),
        "Popen": (Reduced(subprocess.Popen, ["touch", str(victim)]), "Popen"),
        "open": (Reduced(builtins.open, str(victim), "w"), "open"),
        "getattr": (Reduced(pathlib.Path.touch, pathlib.PurePosixPath(victim)), "getattr"),
        "runstring": (Reduced(runstring, write, {}), "runstring"),
    }


@pytest.mark.parametrize("write", [zipped, legacy])
@pytest.mark.parametrize("name", hostile_calls("x"))
def test_a_pickle_that_wants_to_run_code_is_named_and_not_run(name, write, tmp_path):
    victim, path = tmp_path / "created", tmp_path / "model.ckpt"
    call, reported = hostile_calls(victim)[name]
    write({"state_dict": {"a": torch.zeros(2)}, "extra": call}, path)
    if name == "runstring" and write is zipped:  # numpy's names get an empty shell instead
        assert tensor_files.read_tensors(path)[0].keys() == {"a"}
    else:
        with pytest.raises(UserError, match=rf"wants to run code \([\w., ]*{reported}\b") as error:
            tensor_files.read_tensors(path)
        one_line(error)
    assert not victim.exists()


def test_pickles_of_lightning_name_classes_that_are_not_here(tmp_path, monkeypatch):
    """Callback classes as keys, configs built by __reduce__, __setstate__ and __new__."""
    path, weights = tmp_path / "model.ckpt", {"a.weight": torch.rand(3, 2)}
    with monkeypatch.context() as here:
        classes = {}
        for name in (
            "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
            "omegaconf.listconfig.ListConfig",
        ):
            parts = name.split(".")
            for i in range(1, len(parts)):
                module = types.ModuleType(".".join(parts[:i]))
                here.setitem(sys.modules, module.__name__, module)
            classes[parts[-1]] = type(parts[-1], (), {"__module__": ".".join(parts[:-1])})
            setattr(sys.modules[".".join(parts[:-1])], parts[-1], classes[parts[-1]])
        config = classes["ListConfig"]()
        config.__dict__.update(content=[1, 2], parent=None)
        best = {"best_model_score": torch.tensor(0.5), "monitor": "val/loss"}
        callbacks = {classes["ModelCheckpoint"]: best}
        zipped({"callbacks": callbacks, "hyper": config, "state_dict": weights}, path)
    with pytest.raises(ImportError):
        import pytorch_lightning  # noqa: F401
    found, _ = tensor_files.read_tensors(path)
    assert found.keys() == weights.keys() and torch.equal(found["a.weight"], weights["a.weight"])
    assert "pytorch_lightning" not in sys.modules


def test_a_pickle_that_holds_itself_ends(tmp_path):
    value = {}
    value["state_dict"] = value
    zipped(value, tmp_path / "model.ckpt")
    assert tensor_files.read_tensors(tmp_path / "model.ckpt")[0] == {}


@pytest.mark.parametrize("value", [3, [torch.zeros(2)], torch.zeros(2), None])
def test_a_pickle_of_something_else(value, tmp_path):
    zipped(value, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="no dictionary"):
        tensor_files.read_tensors(tmp_path / "model.ckpt")


def test_numbers_of_every_width_lie_aligned_and_come_back(tmp_path):
    path, kinds = tmp_path / "x.safetensors", tensor_files.DTYPES
    tensors = {str(kind): torch.arange(3).to(kind) for kind in reversed(kinds)}
    tensor_files.write_safetensors(path, tensors)
    found, _ = tensor_files.read_tensors(path)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)
        assert found[key].data_ptr() % tensor.itemsize == 0


def safetensors_bytes(header, data=b"\0" * 64, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, end, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


HOSTILE_HEADERS = {
    "empty": b"",
    "header of 2^63 bytes": safetensors_bytes({}, length=2**63),
    "header of 90 GB": safetensors_bytes({}, length=90 * 10**9),
    "header longer than the file": safetensors_bytes({"a": entry(0, 16)}, length=5000),
    "not JSON": safetensors_bytes(b"\x80\x02}q\x00. not json"),
    "JSON, no dictionary": safetensors_bytes(b"[1, 2, 3]"),
    "deep JSON": safetensors_bytes(b'{"a":' * 50_000),
    "overlapping": safetensors_bytes({"a": entry(0, 16), "b": entry(8, 24)}, b"\0" * 24),
    "beyond the end": safetensors_bytes({"a": entry(0, 1 << 40, (1 << 38,))}),
    "backwards": safetensors_bytes({"a": entry(16, 0)}, b"\0" * 16),
    "negative": safetensors_bytes({"a": entry(-16, 0)}, b"\0" * 16),
    "shape against length": safetensors_bytes({"a": entry(0, 16, (400,))}, b"\0" * 16),
    "shape that overflows": safetensors_bytes({"a": entry(0, 16, (2**40, 2**40))}, b"\0" * 16),
    "unknown dtype": safetensors_bytes({"a": entry(0, 16, dtype="X7")}, b"\0" * 16),
    "a hole": safetensors_bytes({"a": entry(0, 16), "b": entry(32, 48)}, b"\0" * 48),
    "bytes after the end": safetensors_bytes({"a": entry(0, 16)}, b"\0" * 80),
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_hostile_safetensors_headers(case, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE_HEADERS[case])
    with pytest.raises(UserError, match="damaged") as error:
        minibooth.load(path)
    one_line(error)


def test_headers_need_not_be_aligned(tmp_path):
    """Old files were written without padding; their tensors start at odd addresses."""
    want = {"a": torch.rand(5), "b": torch.arange(4)}
    header = {"a": entry(0, 20, (5,)), "b": entry(20, 52, (4,), "I64")}
    data = want["a"].numpy().tobytes() + want["b"].numpy().tobytes()
    for pad in range(8):
        text = json.dumps(header).encode() + b" " * pad
        (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(text, data))
        found, _ = tensor_files.read_tensors(tmp_path / "x.safetensors")
        assert all(torch.equal(found[k], want[k]) for k in want)


def cuts(length, count=24):
    """Where to cut a file: densely at its head and tail, evenly between."""
    return sorted(
        {
            0,
            1,
            7,
            8,
            9,
            20,
            *(length * i // count for i in range(count)),
            *(length - i for i in (1, 2, 22, 100)),
        }
        & set(range(length))
    )


@pytest.mark.parametrize("form", ["safetensors", "zipped", "legacy"])
def test_truncated_weights_at_many_points(form, tmp_path):
    tensors = {f"layer.{i}.weight": torch.rand(7, 5) for i in range(9)}
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.ckpt")
    write = {"safetensors": save_file, "zipped": zipped, "legacy": legacy}[form]
    write(tensors, path)
    whole = path.read_bytes()
    assert tensor_files.read_tensors(path)[0].keys() == tensors.keys()
    for cut in cuts(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError) as error:
            tensor_files.read_tensors(path)
        assert "download it again" in one_line(error), cut
        assert "weights_only" not in str(error.value)  # torch's advice: let it run what is in there


@pytest.mark.parametrize("form", ["safetensors", "zipped", "legacy"])
def test_flipped_bytes_never_end_in_a_traceback(form, tmp_path):
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.ckpt")
    write = {"safetensors": save_file, "zipped": zipped, "legacy": legacy}[form]
    write({f"layer.{i}.weight": torch.rand(3, 2) for i in range(3)}, path)
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for _ in range(150):
        at, value = (torch.randint(n, (), generator=generator).item() for n in (len(whole), 256))
        path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        try:
            tensor_files.read_tensors(path)
        except UserError as e:
            assert "\n" not in str(e)


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/special_tokens_map.json",
    ],
)
def test_truncated_json_at_many_points(name, tmp_path):
    folder, _ = copy("sd1", tmp_path)
    whole = (folder / name).read_bytes().rstrip()
    for cut in cuts(len(whole), 4):
        (folder / name).write_bytes(whole[:cut])
        with pytest.raises(UserError) as error:
            minibooth.load(folder)
        one_line(error)


def test_a_folder_cut_short_names_what_is_missing(tmp_path):
    for name in (
        "model_index.json",
        UNET_FILE,
        VAE_FILE,
        TEXT_FILE,
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
    ):
        folder, _ = copy("sd1", tmp_path)
        (folder / name).unlink()
        with pytest.raises(UserError, match=name.split("/")[0].removesuffix(".json")) as error:
            minibooth.load(folder)
        one_line(error)
        shutil.rmtree(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="model_index"):
        minibooth.load(tmp_path / "empty")
    with pytest.raises(UserError, match="no such folder or file"):
        minibooth.load(tmp_path / "nothing" / "at" / "all")


DROP = object()
HOSTILE_CONFIGS = [
    ("unet", "layers_per_block", 10**9),
    ("unet", "layers_per_block", -1),
    ("unet", "layers_per_block", "2"),
    ("unet", "layers_per_block", True),
    ("unet", "layers_per_block", None),
    ("unet", "layers_per_block", [1] * 4),
    ("unet", "block_out_channels", [10**12, 64]),
    ("unet", "block_out_channels", [32] * 100_000),
    ("unet", "block_out_channels", [32.0, 64.0]),
    ("unet", "block_out_channels", [32, -64]),
    ("unet", "block_out_channels", "32, 64"),
    ("unet", "block_out_channels", []),
    ("unet", "block_out_channels", [32, 64, 64]),
    ("unet", "block_out_channels", DROP),
    ("unet", "cross_attention_dim", DROP),
    ("unet", "cross_attention_dim", {"a": 1}),
    ("unet", "attention_head_dim", 0),
    ("unet", "attention_head_dim", 5),
    ("unet", "attention_head_dim", [4]),
    ("unet", "norm_num_groups", 7),
    ("unet", "norm_num_groups", 0),
    ("unet", "norm_eps", "tiny"),
    ("unet", "norm_eps", float("nan")),
    ("unet", "sample_size", "large"),
    ("unet", "sample_size", 10**9),
    ("unet", "down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
    ("unet", "down_block_types", "DownBlock2D"),
    ("unet", "down_block_types", 7),
    ("unet", "up_block_types", DROP),
    ("unet", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    ("unet", "addition_embed_type", "text_time"),  # SDXL
    ("unet", "transformer_layers_per_block", [1, 2, 10]),  # SDXL
    ("unet", "class_embed_type", "timestep"),
    ("vae", "block_out_channels", [16, 10**15]),
    ("vae", "latent_channels", 10**9),
    ("vae", "latent_channels", DROP),
    ("vae", "layers_per_block", 10**6),
    ("vae", "scaling_factor", "0.18215"),
    ("vae", "scaling_factor", 0),
    ("vae", "scaling_factor", None),
    ("vae", "down_block_types", ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
    ("vae", "use_quant_conv", False),
    ("text_encoder", "num_hidden_layers", 10**9),
    ("text_encoder", "num_hidden_layers", 0),
    ("text_encoder", "num_hidden_layers", "2"),
    ("text_encoder", "num_attention_heads", 5),
    ("text_encoder", "vocab_size", 10**15),
    ("text_encoder", "vocab_size", 5),
    ("text_encoder", "hidden_size", DROP),
    ("text_encoder", "hidden_act", "relu"),
    ("text_encoder", "max_position_embeddings", 10**12),
    ("scheduler", "num_train_timesteps", 10**13),
    ("scheduler", "num_train_timesteps", None),
    ("scheduler", "beta_start", "low"),
    ("scheduler", "beta_end", None),
    ("scheduler", "beta_schedule", "squaredcos_cap_v2"),
    ("scheduler", "prediction_type", "sample"),
    ("scheduler", "timestep_spacing", ["leading"]),
    ("scheduler", "steps_offset", "1"),
]


@pytest.mark.parametrize("part, key, value", HOSTILE_CONFIGS)
def test_hostile_configs_are_refused_quickly(part, key, value, tmp_path):
    folder, _ = peers.model("sd1")
    for file in folder.rglob("*"):  # links: only one small file differs
        if file.is_file():
            (tmp_path / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file.relative_to(folder)).symlink_to(file)
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    config = json.loads((folder / part / name).read_text())
    config.pop(key) if value is DROP else config.update({key: value})
    (tmp_path / part / name).unlink()
    (tmp_path / part / name).write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        minibooth.load(tmp_path)
    text = one_line(error)
    assert key in text or part in text


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{" * 100_000, '{"a":' * 100_000])
def test_a_config_that_is_no_dictionary(text, tmp_path):
    folder, _ = copy("sd1", tmp_path)
    (folder / "vae/config.json").write_text(text)
    with pytest.raises(UserError, match=r"vae/config\.json") as error:
        minibooth.load(folder)
    one_line(error)


def test_single_files_of_other_models_are_refused(tmp_path, monkeypatch):
    path, key = (
        tmp_path / "x.safetensors",
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    )
    conv = {ldm.UNET + "input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}
    for tensors, words in (
        ({"something.weight": torch.zeros(1)}, "no UNet of Stable Diffusion"),
        ({"lora_unet_a.alpha": torch.zeros(1)}, "is a LoRA: give it as --lora"),
        (conv | {ldm.UNET + key: torch.zeros(8)}, "no UNet of Stable Diffusion"),
        (conv | {ldm.UNET + key: torch.zeros(8, 1536)}, "1536 wide"),
        ({ldm.UNET + key: torch.zeros(8, 768)}, "no UNet of Stable Diffusion"),
    ):
        save_file(tensors, path)
        with pytest.raises(UserError, match=words) as error:
            minibooth.load(path)
        one_line(error)


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "[]",
        "{",
        '{"unet": 3}',
        '{"unet": {}, "vae": {}, "text_encoder": {}, "scheduler": {}}',
        "[" * 100_000,
    ],
)
def test_damaged_metadata_of_our_own_files(metadata, tmp_path):
    folder, pipe = peers.model("sd1")
    path = tmp_path / "x.safetensors"
    save_file(peers.ldm(pipe), path, {"minibooth.configs": metadata})
    with pytest.raises(UserError) as error:
        minibooth.load(path, tokenizer=folder)
    one_line(error)
