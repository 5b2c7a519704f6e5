"""Training low-rank differences: the same loss and run, and the model's weights stay."""

import pytest
import runs
import torch
from safetensors.torch import load_file

from minibooth import UserError, train
from minibooth.bench import models
from minibooth.formats import adapters
from minibooth.training import memory, methods
from minibooth.training.settings import TrainConfig

LORA = {"method": "lora", "rank": 2, "lora_alpha": 4.0}


def trained(folder, **changes):
    sd = runs.model()
    train.train(runs.config(folder, **LORA, **changes), sd)
    return sd


def files_of(folder):
    return {name: load_file(folder / name) for name in (methods.LORA_FILE, adapters.DIFFUSERS_LORA)}


def same(a, b):
    return all(
        a[name].keys() == b[name].keys()
        and all(torch.equal(a[name][key], b[name][key]) for key in a[name])
        for name in a
    )


@pytest.mark.parametrize("text", [False, True])
def test_weights_stay_and_the_files_draw_what_the_run_drew(text, tmp_path):
    before = {name: runs.flat(net.state_dict()) for name, net in runs.model().networks.items()}
    sd = trained(tmp_path, train_text_encoder=text)
    for name, network in sd.networks.items():
        assert torch.equal(runs.flat(network.state_dict()), before[name])
    draw = {"steps": 2, "seed": 1, "guidance_scale": 2.0, "output": "latent"}
    wanted = sd.generate(["a sks dog"], **draw)
    assert not torch.allclose(wanted, runs.model().generate(["a sks dog"], **draw), atol=1e-4)
    for name in (methods.LORA_FILE, adapters.DIFFUSERS_LORA):
        merged = runs.model()
        adapters.merge_files(merged.networks, [str(tmp_path / name)])
        torch.testing.assert_close(
            merged.generate(["a sks dog"], **draw), wanted, atol=2e-5, rtol=0
        )
    parts = {key.partition(".")[0] for key in load_file(tmp_path / adapters.DIFFUSERS_LORA)}
    assert parts == {"unet", "text_encoder"} if text else parts == {"unet"}


def test_a_run_that_goes_on_ends_with_equal_bits(tmp_path):
    trained(tmp_path / "whole", max_train_steps=6)
    trained(tmp_path / "parts", max_train_steps=3)
    trained(tmp_path / "parts", max_train_steps=6, resume_from_checkpoint="latest")
    assert same(files_of(tmp_path / "whole"), files_of(tmp_path / "parts"))
    with pytest.raises(UserError, match="method was 'lora' and is 'dreambooth'"):
        train.train(
            runs.config(tmp_path / "parts", max_train_steps=9, resume_from_checkpoint="latest")
        )


def test_snapshots_are_loras_too(tmp_path):
    trained(tmp_path, checkpointing_steps=2)
    found = files_of(tmp_path / "checkpoint-2")
    assert {t.dtype for t in found[adapters.DIFFUSERS_LORA].values()} == {torch.float16}
    assert not (tmp_path / "checkpoint-2" / "model_index.json").exists()


def test_frozen_weights_are_in_16_bits_and_adapters_in_32(tmp_path):
    sd = trained(tmp_path, mixed_precision="bf16")
    assert {p.dtype for p in sd.unet.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(tmp_path / adapters.DIFFUSERS_LORA).values()} == {
        torch.float32
    }
    losses = [float(x.split(",")[1]) for x in (tmp_path / "loss.csv").read_text().split()[1:]]
    trained(tmp_path / "plain")
    plain = (tmp_path / "plain" / "loss.csv").read_text().split()[1:]
    assert losses == pytest.approx([float(x.split(",")[1]) for x in plain], rel=0.02)


def test_the_first_step_can_be_explained(tmp_path):
    trained(tmp_path, explain=True)
    assert "down_blocks.0" in (tmp_path / "explain.html").read_text()


def test_what_sd15_would_train_and_need():
    """797,184 is what diffusers' script prints for rank 4 of SD 1.5's UNet."""
    sd, config = models.model("SD 1.5", torch.device("meta")), TrainConfig(method="lora")
    assert sum(p.numel() for p in memory.trainable(sd, config)) == 797_184
    frozen = sum(p.numel() for p in sd.unet.parameters())
    part = memory.parts(sd, config, 64 * 64, half=True)
    assert part["weights"] == 2 * frozen + 4 * 797_184
    assert part["averages"] == 8 * 797_184 and part["gradients"] == 4 * 797_184
    short = TrainConfig(method="lora", gradient_checkpointing=True)
    assert memory.peak(sd, short, 64 * 64, half=True) < 6e9


def test_rates_suit_the_method_where_none_is_given():
    assert methods.defaults({"method": "lora"}) == methods.LORA_RATES
    assert methods.defaults({}) == {}
