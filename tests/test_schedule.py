"""The noise schedule and the samplers, against diffusers' schedulers and published numbers."""

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from minibooth import schedule as S
from minibooth.common.errors import UserError

LINEAR = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=True)
PREDICTIONS = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")

N = 768
SAMPLE = (torch.arange(N).reshape(3, 8, 8, 4) / N).permute(3, 0, 1, 2)
NOISE = (torch.arange(N).flip(-1).reshape(3, 8, 8, 4) / N).permute(3, 0, 1, 2)


def model(x, t):
    return x * t / (t + 1)


def ddim_loop(schedule, x, pairs, eta=0.0, generator=None):
    for t, t_prev in pairs:
        noise = torch.randn(x.shape, generator=generator) if eta > 0 else None
        x = S.ddim_step(x, model(x, t), t, t_prev, schedule, eta, noise)
    return x


def ddpm_loop(schedule, x, pairs, generator):
    for t, t_prev in pairs:
        noise = torch.randn(x.shape, generator=generator)
        x = S.ddpm_step(x, model(x, t), t, t_prev, schedule, noise)
    return x


def peer_loop(peer, x, steps, **options):
    peer.set_timesteps(steps)
    for t in peer.timesteps:
        x = peer.step(model(x, t), t, x, **options).prev_sample
    return x


def assert_sums(x, total, mean):
    assert x.abs().sum().item() == pytest.approx(total, abs=1e-2)
    assert x.abs().mean().item() == pytest.approx(mean, abs=1e-3)


# ---- published numbers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "total", "mean"),
    [
        (dict(), 172.0067, 0.223967),
        (dict(prediction_type="v_prediction"), 52.5302, 0.0684),
        (dict(set_alpha_to_one=True, beta_start=0.01), 149.8295, 0.1951),
        (dict(set_alpha_to_one=False, beta_start=0.01), 149.0784, 0.1941),
    ],
)
def test_ddim_reproduces_the_published_sums(changes, total, mean):
    schedule = S.Schedule.from_config(LINEAR | changes)
    assert_sums(ddim_loop(schedule, SAMPLE, S.trajectory(schedule, 10, "ddim")), total, mean)


def test_ddim_from_a_noised_sample_reproduces_the_published_sum():
    schedule = S.Schedule.from_config(LINEAR)
    pairs = S.trajectory(schedule, 10, "ddim")[8:]
    assert pairs == [(100, 0), (0, -100)]
    x = S.q_sample(SAMPLE, NOISE, schedule.alpha_bar[torch.tensor([100])])
    assert_sums(ddim_loop(schedule, x, pairs), 354.5418, 0.4616)


@pytest.mark.parametrize(
    ("prediction_type", "total", "mean"),
    [("epsilon", 258.9606, 0.3372), ("v_prediction", 202.0296, 0.2631)],
)
def test_ddpm_over_all_timesteps_reproduces_the_published_sums(prediction_type, total, mean):
    schedule = S.Schedule.from_config(LINEAR | dict(prediction_type=prediction_type))
    x, generator = SAMPLE, torch.Generator().manual_seed(0)
    for t in reversed(range(1000)):
        noise = torch.randn(x.shape, generator=generator) if t > 0 else torch.zeros_like(x)
        x = S.ddpm_step(x, model(x, t), t, t - 1, schedule, noise)
    assert_sums(x, total, mean)


@pytest.mark.parametrize(
    ("t", "t_prev", "expected"),
    [
        (0, 0, 0.0),
        (420, 400, 0.14771),
        (980, 960, 0.32460),
        (487, 486, 0.00979),
        (999, 998, 0.02),
    ],
)
def test_variance_has_the_published_values(t, t_prev, expected):
    alpha_bar = S.Schedule.from_config(LINEAR).alpha_bar
    variance = S.variance(alpha_bar[t], alpha_bar[t_prev])
    assert variance.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("t", "expected"), [(0, 0.0), (487, 0.00979), (999, 0.02)])
def test_ddpm_noise_has_the_published_variance(t, expected):
    schedule = S.Schedule.from_config(LINEAR)
    quiet, loud = (S.ddpm_step(SAMPLE, SAMPLE, t, t - 1, schedule, n) for n in (0 * NOISE, NOISE))
    variance = ((loud - quiet).square().sum() / NOISE.square().sum()).item()
    assert variance == pytest.approx(expected, abs=1e-5)


def test_leading_timesteps_with_an_offset_are_the_published_ones():
    schedule = S.Schedule.from_config(LINEAR | dict(steps_offset=1))
    assert S.timesteps(schedule, 5).tolist() == [801, 601, 401, 201, 1]


def test_stable_diffusion_keeps_half_a_percent_of_the_signal_at_the_last_timestep():
    schedule = S.Schedule.from_config(tiny.scheduler_config())
    last = schedule.alpha_bar[999].item()
    assert last == pytest.approx(0.00466, abs=5e-6)
    assert last**0.5 == pytest.approx(0.068, abs=5e-4)
    assert schedule.final_alpha_bar == pytest.approx(1 - 0.00085, abs=1e-7)
    t = S.timesteps(schedule, 50)
    assert (t[0], t[-1], len(t), t.dtype) == (981, 1, 50, torch.int64)


def test_a_config_that_says_little_means_stable_diffusion():
    said, unsaid = S.Schedule.from_config(tiny.scheduler_config()), S.Schedule.from_config({})
    assert torch.equal(unsaid.alpha_bar, said.alpha_bar)
    assert (unsaid.prediction_type, unsaid.spacing, unsaid.clip) == ("epsilon", "leading", None)


# ---- against diffusers -------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1000, 37])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_alpha_bar_equals_diffusers(kind, T):
    config = tiny.scheduler_config(beta_schedule=kind, num_train_timesteps=T)
    ours, peer = S.Schedule.from_config(config), DDPMScheduler.from_config(config)
    assert ours.T == T
    assert torch.equal(ours.alpha_bar, peer.alphas_cumprod)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_diffusers_for_every_number_of_steps(spacing, offset):
    config = tiny.scheduler_config(timestep_spacing=spacing, steps_offset=offset)
    ours, peer = S.Schedule.from_config(config), DDIMScheduler.from_config(config)
    for steps in range(1, 1001 - offset):
        peer.set_timesteps(steps)
        theirs = peer.timesteps[peer.timesteps >= 0]  # rounding gives "trailing" a -1 too many
        assert S.timesteps(ours, steps).tolist() == theirs.tolist(), steps


def test_timesteps_stay_in_range_when_every_one_is_visited():
    schedule = S.Schedule.from_config(tiny.scheduler_config(steps_offset=1))
    assert S.timesteps(schedule, 1000).tolist() == list(range(999, -1, -1))
    assert S.timesteps(schedule, 999).tolist() == list(range(999, 0, -1))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddim_loop_equals_diffusers(prediction_type, eta, clip_sample, to_one, spacing):
    config = tiny.scheduler_config(
        prediction_type=prediction_type,
        clip_sample=clip_sample,
        clip_sample_range=0.7,
        set_alpha_to_one=to_one,
        timestep_spacing=spacing,
    )
    schedule, peer = S.Schedule.from_config(config), DDIMScheduler.from_config(config)
    assert schedule.final_alpha_bar == peer.final_alpha_cumprod
    x, (a, b) = tiny.randn(2, 4, 5, 6), (torch.Generator().manual_seed(1) for _ in "ab")
    for steps in (1, 7, 50):
        ours = ddim_loop(schedule, x, S.trajectory(schedule, steps, "ddim"), eta, a)
        theirs = peer_loop(peer, x, steps, eta=eta, generator=b)
        assert tiny.rel(ours, theirs) < 1e-5, steps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddpm_loop_equals_diffusers(prediction_type, clip_sample, spacing):
    config = tiny.scheduler_config(
        prediction_type=prediction_type,
        clip_sample=clip_sample,
        clip_sample_range=0.7,
        timestep_spacing=spacing,
    )
    schedule, peer = S.Schedule.from_config(config), DDPMScheduler.from_config(config)
    x = tiny.randn(2, 4, 5, 6)
    for steps in (1, 7, 50):
        a, b = (torch.Generator().manual_seed(1) for _ in "ab")
        ours = ddpm_loop(schedule, x, S.trajectory(schedule, steps, "ddpm"), a)
        theirs = peer_loop(peer, x, steps, generator=b)
        assert tiny.rel(ours, theirs) < 1e-5, steps


@pytest.mark.parametrize("t", [961, 481, 21, 1])  # four of fifty steps; 1 is the last
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddim_step_equals_diffusers(prediction_type, eta, clip_sample, to_one, t):
    config = tiny.scheduler_config(
        prediction_type=prediction_type, clip_sample=clip_sample, set_alpha_to_one=to_one
    )
    schedule, peer = S.Schedule.from_config(config), DDIMScheduler.from_config(config)
    peer.set_timesteps(50)
    x, prediction, noise = (tiny.randn(2, 4, 5, 6, seed=seed) for seed in range(3))
    ours = S.ddim_step(x, prediction, t, t - 20, schedule, eta, noise)
    theirs = peer.step(prediction, t, x, eta=eta, variance_noise=noise).prev_sample
    assert tiny.rel(ours, theirs) < 1e-6


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddpm_ends_on_its_estimate_of_x0_whatever_ddim_ends_on(prediction_type, to_one):
    """At ᾱ = 1 nothing but x0 is left: no noise is added and set_alpha_to_one has no say."""
    config = tiny.scheduler_config(prediction_type=prediction_type, set_alpha_to_one=to_one)
    schedule, peer = S.Schedule.from_config(config), DDPMScheduler.from_config(config)
    peer.set_timesteps(50)
    x, prediction, noise = (tiny.randn(2, 4, 5, 6, seed=seed) for seed in range(3))
    ours = S.ddpm_step(x, prediction, 1, -1, schedule, noise)
    x0 = peer.step(prediction, 1, x).pred_original_sample
    assert tiny.rel(ours, x0) < 1e-6


def test_q_sample_and_velocity_equal_diffusers():
    config = tiny.scheduler_config()
    schedule, peer = S.Schedule.from_config(config), DDPMScheduler.from_config(config)
    x0, eps = tiny.randn(4, 4, 5, 6), tiny.randn(4, 4, 5, 6, seed=1)
    t = torch.tensor([0, 1, 500, 999])
    alpha_bar_t = schedule.alpha_bar[t]
    x_t, v = S.q_sample(x0, eps, alpha_bar_t), S.velocity(x0, eps, alpha_bar_t)
    for ours, theirs in (
        (x_t, peer.add_noise(x0, eps, t)),
        (v, peer.get_velocity(x0, eps, t)),
    ):
        assert max(tiny.rel(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-6


# ---- equations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_split_gives_back_what_was_mixed(prediction_type):
    x0, eps = (tiny.randn(3, 4, 5, 6, seed=seed, dtype=torch.float64) for seed in (0, 1))
    a = torch.tensor([0.999, 0.5, 0.00466], dtype=torch.float64)
    prediction = eps if prediction_type == "epsilon" else S.velocity(x0, eps, a)
    back = S.split(S.q_sample(x0, eps, a), prediction, a, prediction_type)
    assert tiny.rel(back[0], x0) < 1e-13
    assert tiny.rel(back[1], eps) < 1e-13


@pytest.mark.parametrize("mix", [S.q_sample, S.velocity])
def test_half_precision_latents_are_mixed_in_fp32(mix):
    x0, eps = (tiny.randn(2, 4, 5, 6, seed=seed).bfloat16() for seed in (0, 1))
    alpha_bar_t = torch.tensor([0.9, 0.00466])
    mixed = mix(x0, eps, alpha_bar_t)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, mix(x0.float(), eps.float(), alpha_bar_t))


def test_a_schedule_moves_to_another_device_whole():
    schedule = S.Schedule.from_config(tiny.scheduler_config(prediction_type="v_prediction"))
    moved = schedule.to("meta")
    assert moved.alpha_bar.device.type == "meta"
    assert (moved.prediction_type, moved.steps_offset) == ("v_prediction", 1)
    assert moved.final_alpha_bar == schedule.final_alpha_bar


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(beta_schedule="squaredcos_cap_v2"), "squaredcos_cap_v2"),
        (dict(rescale_betas_zero_snr=True), "rescaled"),
        (dict(trained_betas=[0.1, 0.2]), "trained"),
        (dict(prediction_type="sample"), "sample"),
        (dict(timestep_spacing="karras"), "karras"),
    ],
)
def test_a_schedule_that_is_not_implemented_is_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named):
        S.Schedule.from_config(tiny.scheduler_config(**changes))


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_an_impossible_number_of_steps_is_refused(steps):
    with pytest.raises(UserError, match=f"^{steps} .*1 to 1000"):
        S.timesteps(S.Schedule.from_config({}), steps)
