"""Configs that lack entries or have them wrong, as diffusers' pipeline reads the same files."""

import inspect
import json
import warnings

import diffusers
import peers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from weight_files import copy

import minibooth
from minibooth.formats import configs

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


@pytest.mark.parametrize("kind", ["PNDMScheduler", "DDIMScheduler"])
def test_an_absent_set_alpha_to_one_means_what_the_named_class_does(kind, tmp_path):
    folder = edited(tmp_path, SCHEDULER, remove=("set_alpha_to_one",), _class_name=kind)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", kind]
    (folder / "model_index.json").write_text(json.dumps(index))
    sd, pipe = minibooth.load(folder), theirs(folder)
    assert type(pipe.scheduler).__name__ == kind
    assert sd.schedule.final_alpha_bar == pipe.scheduler.final_alpha_cumprod
    assert (sd.schedule.final_alpha_bar == 1) == (kind == "DDIMScheduler")


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


def test_what_is_written_is_what_was_used(tmp_path, no_warnings):
    folder = edited(tmp_path, SCHEDULER, remove=("timestep_spacing",), clip_sample=True)
    with pytest.warns(UserWarning, match="outdated"):
        sd = minibooth.load(folder)
    sd.save(tmp_path / "out")
    sd.save_single_file(tmp_path / "out.safetensors")
    written = json.loads((tmp_path / "out" / SCHEDULER).read_text())
    assert (written["clip_sample"], written["timestep_spacing"]) == (False, "leading")
    for again in (tmp_path / "out", tmp_path / "out.safetensors"):  # and no one is told twice
        assert minibooth.load(again).configs["scheduler"] == sd.configs["scheduler"]
