"""Configs that lack entries or have them wrong, as diffusers' pipeline reads the same files."""

import copy as copying
import inspect
import json
import warnings

import diffusers
import peers
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from weight_files import copy

import minibooth
from minibooth.formats import configs, public

SCHEDULER, UNET = "scheduler/scheduler_config.json", "unet/config.json"


def edited(tmp_path, part, kind="sd1", remove=(), **changes):
    """A model's folder with one of its configs changed."""
    folder, _ = copy(kind, tmp_path)
    config = json.loads((folder / part).read_text())
    config = {k: v for k, v in config.items() if k not in remove} | changes
    (folder / part).write_text(json.dumps(config))
    return folder


def theirs(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return diffusers.StableDiffusionPipeline.from_pretrained(folder)


# ---- the scheduler -----------------------------------------------------------------------------


def test_latents_are_not_clipped_and_timesteps_begin_at_one(tmp_path):
    folder = edited(tmp_path, SCHEDULER, clip_sample=True, steps_offset=0)
    with pytest.warns(UserWarning) as caught:
        sd = minibooth.load(folder)
    said = "clip_sample True → False, steps_offset 0 → 1"
    assert len(caught) == 1 and said in str(caught[0].message)
    assert (sd.schedule.clip, sd.schedule.steps_offset) == (None, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, want = peers.same_pictures(sd, folder, guidance_scale=2.0)
    torch.testing.assert_close(ours, want, rtol=0, atol=2e-3)


def test_so_it_is_where_a_config_of_2022_does_not_say(tmp_path):
    folder = edited(tmp_path, SCHEDULER, remove=("clip_sample", "steps_offset"))
    with pytest.warns(UserWarning, match="clip_sample True → False, steps_offset 0 → 1"):
        sd = minibooth.load(folder)
    assert (sd.schedule.clip, sd.schedule.steps_offset) == (None, 1)


def test_an_absent_set_alpha_to_one_means_what_the_named_class_does(tmp_path):
    folder = edited(tmp_path, SCHEDULER, remove=("set_alpha_to_one",), _class_name="PNDMScheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    sd, pipe = minibooth.load(folder), theirs(folder)
    assert type(pipe.scheduler).__name__ == "PNDMScheduler"
    assert sd.schedule.final_alpha_bar == pipe.scheduler.final_alpha_cumprod < 1


def test_what_entries_mean_that_are_absent_is_the_default_of_every_class_of_diffusers():
    compared = 0
    for name in [*(k.name for k in KarrasDiffusionSchedulers), *configs.UNSAID_BY]:
        signature = inspect.signature(getattr(diffusers, name).__init__).parameters
        said = {key: p.default for key, p in signature.items() if key in configs.UNSAID}
        meant = {"_class_name": name}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            configs.settle({"scheduler": meant, "unet": {}})
        corrected = {"clip_sample": False, "steps_offset": 1}
        assert {key: meant[key] for key in said} == said | {
            key: value for key, value in corrected.items() if key in said
        }, name
        compared += len(said)
    assert compared > 150


# ---- the size of its pictures ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "size"),
    [("0.8.0.dev0", 32), ("0.6.0", 64), ("0.9.0.dev0", 32), ("0.10.2", 32), (None, 32), ("0.3", 0)],
)
def test_the_size_that_old_configs_have_wrong_is_what_diffusers_makes_of_it(version, size):
    """0.8.0.dev0 and 32 is Nitro-Diffusion's, which was trained on 512² pixels."""
    said = dict(peers.model()[1].unet.config)
    said |= {"sample_size": size, "_diffusers_version": version}
    if version is None:
        del said["_diffusers_version"]
    unet = copying.copy(peers.model()[1].unet)
    unet._internal_dict = FrozenDict(said)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler"))
        parts |= dict.fromkeys(("safety_checker", "feature_extractor"))
        pipe = diffusers.StableDiffusionPipeline(unet=unet, requires_safety_checker=False, **parts)
        ours = dict(said)
        configs.settle({"scheduler": {}, "unet": ours})
    assert ours["sample_size"] == pipe.unet.config.sample_size
    assert (ours["sample_size"] != size) == (version in ("0.8.0.dev0", "0.3"))


def test_a_small_size_of_the_public_network_is_warned_of_with_the_cure():
    def warned(**changes):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            configs.settle(
                {"scheduler": dict(public.SD_SCHEDULER), "unet": public.SD1_UNET | changes}
            )
        return [str(w.message) for w in caught]

    [line] = warned(sample_size=32)
    assert "256² pixels" in line and "--resolution 512" in line
    assert warned() == warned(sample_size=96) == warned(sample_size=None) == []
    assert warned(sample_size=16, block_out_channels=[64, 128, 128]) == []  # the toybox's
    [line] = warned(sample_size=32, _diffusers_version="0.8.0.dev0")
    assert "sample_size 32 → 64" in line


def test_what_is_written_is_what_was_used(tmp_path, no_warnings):
    folder = edited(tmp_path, SCHEDULER, remove=("timestep_spacing",), clip_sample=True)
    with pytest.warns(UserWarning, match="outdated"):
        sd = minibooth.load(folder)
    sd.save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / SCHEDULER).read_text())
    assert (written["clip_sample"], written["timestep_spacing"]) == (False, "leading")
    again = minibooth.load(tmp_path / "out")  # and nothing is said twice
    assert again.configs["scheduler"] == sd.configs["scheduler"] == written
