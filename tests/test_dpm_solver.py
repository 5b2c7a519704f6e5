"""DPM-Solver++(2M) against diffusers' multistep solver."""

from itertools import pairwise

import peers
import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from minibooth import load
from minibooth import schedule as S
from minibooth.common.errors import UserError

PREDICTIONS = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")


def both(**changes):
    config = tiny.scheduler_config(**changes)
    return S.Schedule.from_config(config), DPMSolverMultistepScheduler.from_config(config)


def model(x, t):
    """Bends with x and t, so that a step of second order differs from one of first."""
    return torch.sin(x + t / 300) + 0.3 * x


def loop(schedule, x, steps):
    last = None
    for t, t_prev in S.trajectory(schedule, steps, "dpm++"):
        x, last = S.dpm_step(x, model(x, t), t, t_prev, schedule, last)
    return x


def peer_loop(peer, x, steps):
    peer.set_timesteps(steps)
    for t in peer.timesteps:
        x = peer.step(model(x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_timesteps_equal_diffusers_for_every_number_of_steps(spacing, offset):
    ours, peer = both(timestep_spacing=spacing, steps_offset=offset)
    for steps in range(1, 1000 - offset):
        peer.set_timesteps(steps)
        theirs = peer.timesteps[peer.timesteps >= 0]  # rounding gives "trailing" a -1 too many
        pairs = S.trajectory(ours, steps, "dpm++")
        assert [t for t, _ in pairs] == theirs.tolist(), steps
        assert [t for _, t in pairs] == [*theirs.tolist()[1:], -1], steps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_run_equals_diffusers(prediction_type, steps, spacing):
    ours, peer = both(prediction_type=prediction_type, timestep_spacing=spacing)
    x = tiny.randn(2, 4, 5, 6)
    want = peer_loop(peer, x, steps)
    assert tiny.rel(loop(ours, x, steps), want) < 1e-5
    assert tiny.rel(want, x) > 0.1


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_first_step_is_ddims_and_the_last_one_ends_on_x0(prediction_type):
    schedule, _ = both(prediction_type=prediction_type)
    x, prediction, other = (tiny.randn(2, 4, 5, 6, seed=seed) for seed in range(3))
    first, (t, x0) = S.dpm_step(x, prediction, 901, 801, schedule, None)
    assert tiny.rel(first, S.ddim_step(x, prediction, 901, 801, schedule)) < 1e-6
    assert t == 901
    end, (_, x0) = S.dpm_step(x, prediction, 101, -1, schedule, (201, other))
    assert torch.equal(end, x0)


def test_the_error_falls_with_the_square_of_the_step():
    """Over a stretch that does not reach the last step, which is of first order."""

    def end(steps):
        t = [round(900 - 800 * i / steps) for i in range(steps + 1)]
        x, last = start, None
        for now, then in pairwise(t):
            x, last = S.dpm_step(x, model(x, now), now, then, schedule, last)
        return x

    schedule, _ = both()
    schedule = S.replace(schedule, alpha_bar=schedule.alpha_bar.double())
    start = tiny.randn(2, 4, 5, 6, dtype=torch.float64)
    exact = end(800)
    coarse, fine = (tiny.rel(end(steps), exact) for steps in (20, 40))
    assert 3 < coarse / fine < 6


def test_a_range_of_x0_is_kept_to():
    schedule, _ = both(clip_sample=True, clip_sample_range=0.7)
    x, prediction = tiny.randn(2, 4, 5, 6), tiny.randn(2, 4, 5, 6, seed=1)
    _, (_, x0) = S.dpm_step(x, prediction, 501, 401, schedule, None)
    assert x0.abs().max() == pytest.approx(0.7)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_as_many_steps_as_there_are_timesteps_are_refused_where_two_would_fall_together(spacing):
    schedule, _ = both(timestep_spacing=spacing)
    if spacing == "trailing":
        assert len(S.trajectory(schedule, 1000, "dpm++")) == 1000
    else:
        with pytest.raises(UserError, match=r"^1000 sampling steps: dpm\+\+ takes at most 999"):
            S.trajectory(schedule, 1000, "dpm++")
    assert len(S.trajectory(schedule, 999, "dpm++")) == 999


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_generate_equals_diffusers_pipeline(kind):
    folder, shared = peers.model(kind)
    scheduler = DPMSolverMultistepScheduler.from_config(
        shared.scheduler.config,
        timestep_spacing="leading",  # else diffusers takes this class's own
    )
    theirs = StableDiffusionPipeline(
        **shared.components | {"scheduler": scheduler}, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    latents, prompts = tiny.randn(2, 4, 8, 8), ["a sks dog", "a cat in the snow"]
    want = theirs(
        prompts,
        num_inference_steps=10,
        guidance_scale=4.0,
        latents=latents,
        height=64,
        width=64,
        output_type="latent",
    ).images
    got = load(folder).generate(
        prompts,
        steps=10,
        guidance_scale=4.0,
        latents=latents,
        sampler="dpm++",
        output="latent",
        batch_size=1,
    )
    assert tiny.rel(got, want) < 1e-4
