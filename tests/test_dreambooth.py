"""The training step against one built from diffusers' parts, and against the paper's Eq. 2."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from transformers import CLIPTextConfig, CLIPTextModel

from minibooth import dreambooth
from minibooth.dreambooth import Term, min_snr_weight
from minibooth.schedule import Schedule
from minibooth.text_encoder import TextEncoder
from minibooth.unet import UNet

PREDICTIONS = ("epsilon", "v_prediction")
KIND = "three levels of one layer"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}


def unet_and_peer():
    config = tiny.unet_config(KIND)
    ours, peer = UNet(config), tiny.randomize(UNet2DConditionModel.from_config(config))
    ours.load_state_dict(tiny.peer_state(peer))
    return ours, peer


def text_encoder_and_peer():
    config = tiny.text_config("sd1")
    ours, peer = TextEncoder(config), tiny.randomize(CLIPTextModel(CLIPTextConfig(**config)))
    ours.load_state_dict(tiny.peer_state(peer))
    return ours, peer


def term(batch, seed, dtype=torch.float32, c=None):
    """One term with latents, noise and timesteps of its own, and a context unless one is given."""
    x0, eps = (tiny.randn(batch, 4, 8, 12, seed=seed + i, dtype=dtype) for i in (0, 1))
    t = torch.randint(1000, (batch,), generator=torch.Generator().manual_seed(seed))
    if c is None:
        c = tiny.randn(batch, 7, 24, seed=seed + 2, dtype=dtype)
    return Term(x0, eps, t, c)


def schedule_of(prediction_type):
    return Schedule.from_config(tiny.scheduler_config(prediction_type=prediction_type))


def linear_unet(calls=None):
    """Cheap, depends on all of its arguments and mixes no samples; it writes down its calls."""

    def unet(x_t, t, context):
        if calls is not None:
            calls.append((x_t, t, context))
        return 0.5 * x_t + (t / 1000).view(-1, 1, 1, 1) + context.mean((1, 2)).view(-1, 1, 1, 1)

    return unet


# ---- against diffusers and transformers --------------------------------------------------------


def reference_loss(unet, scheduler, instance, prior, prior_loss_weight):
    """The loss as diffusers' DreamBooth script writes it: one batch, two halves, two mse_loss."""
    terms = [instance, prior] if prior_loss_weight else [instance]
    latents, noise = torch.cat([p.x0 for p in terms]), torch.cat([p.eps for p in terms])
    timesteps, hidden = torch.cat([p.t for p in terms]), torch.cat([p.c for p in terms])
    noisy = scheduler.add_noise(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, hidden).sample
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = noise
    if not prior_loss_weight:
        return F.mse_loss(prediction, target)
    prediction, prediction_prior = prediction.chunk(2)
    target, target_prior = target.chunk(2)
    prior_loss = F.mse_loss(prediction_prior, target_prior)
    return F.mse_loss(prediction, target) + prior_loss_weight * prior_loss


def loss_and_gradients(loss_of, unet, text_encoder, train_text_encoder, ids, dtype):
    trained = [unet, text_encoder] if train_text_encoder else [unet]
    for network in (unet, text_encoder):
        network.zero_grad()
        network.to(dtype).requires_grad_(network in trained)
    n = len(ids) // 2
    contexts = text_encoder(ids)
    contexts = getattr(contexts, "last_hidden_state", contexts)
    loss = loss_of(unet, term(n, 10, dtype, contexts[:n]), term(n, 20, dtype, contexts[n:]))
    loss.backward()
    gradients = [
        {name.removeprefix("text_model."): p.grad for name, p in network.named_parameters()}
        for network in trained
    ]
    return loss, gradients


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("train_text_encoder", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("prior_loss_weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_loss_and_all_gradients_equal_diffusers(
    prediction_type, prior_loss_weight, batch, train_text_encoder, dtype
):
    """In fp32 the loss and each network's whole gradient; in fp64 every parameter's by itself."""
    config = tiny.scheduler_config(prediction_type=prediction_type)
    scheduler, schedule = DDPMScheduler.from_config(config), Schedule.from_config(config)
    if dtype == torch.float64:  # the same fp32 table, so that only the arithmetic is compared
        schedule = Schedule(schedule.alpha_bar.double(), prediction_type)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    (unet, peer), (text_encoder, text_peer) = unet_and_peer(), text_encoder_and_peer()
    ids = torch.arange(2 * batch * 7).mul(37).remainder(100).view(2 * batch, 7)

    loss, gradients = loss_and_gradients(
        lambda unet, a, b: dreambooth.step(unet, schedule, a, b, prior_loss_weight).loss,
        *(unet, text_encoder, train_text_encoder, ids, dtype),
    )
    expected, expected_gradients = loss_and_gradients(
        lambda unet, a, b: reference_loss(unet, scheduler, a, b, prior_loss_weight),
        *(peer, text_peer, train_text_encoder, ids, dtype),
    )
    assert tiny.rel(loss, expected) < TOLERANCE[dtype]
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert ours.keys() == theirs.keys()
        whole = [torch.cat([grads[name].flatten() for name in theirs]) for grads in (ours, theirs)]
        assert tiny.rel(*whole) < TOLERANCE[dtype]
        if dtype == torch.float64:
            for name in theirs:
                if name.endswith("k_proj.bias"):  # softmax does not see it: zero but for rounding
                    assert ours[name].norm() < TOLERANCE[dtype] * whole[1].norm(), name
                else:
                    assert tiny.rel(ours[name], theirs[name]) < TOLERANCE[dtype], name


# ---- against the paper -------------------------------------------------------------------------


BETA = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHA_BAR = torch.cumprod(1 - BETA, 0)  # of Stable Diffusion, from the definition, in fp64


def alpha_sigma(t):
    """The paper's α_t and σ_t, each (B, 1, 1, 1)."""
    alpha_bar = ALPHA_BAR[t].view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def x_form(unet, prediction_type, term, w=None):
    """E[w_t ‖x̂(α_t x + σ_t ε, c) − x‖²], one term of Eq. 2; by default the plain loss's w_t."""
    alpha, sigma = alpha_sigma(term.t)
    x_t = alpha * term.x0 + sigma * term.eps
    output = unet(x_t, term.t, term.c)
    if prediction_type == "epsilon":
        x_hat = (x_t - sigma * output) / alpha
        plain = alpha**2 / sigma**2
    else:
        x_hat = alpha * x_t - sigma * output
        plain = 1 / sigma**2
    return ((plain if w is None else w) * (x_hat - term.x0) ** 2).mean()


@pytest.mark.parametrize("prior_loss_weight", [0.5, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_eq_2_as_x_prediction_is_the_same_loss_with_the_same_gradient(
    prediction_type, prior_loss_weight
):
    unet = unet_and_peer()[0].double()
    instance, prior = term(2, 10, torch.float64), term(2, 20, torch.float64)
    schedule = Schedule(ALPHA_BAR, prediction_type)

    step = dreambooth.step(unet, schedule, instance, prior, prior_loss_weight)
    gradient = torch.autograd.grad(step.loss, list(unet.parameters()))

    first, second = (x_form(unet, prediction_type, p) for p in (instance, prior))
    eq_2 = first + prior_loss_weight * second
    expected = torch.autograd.grad(eq_2, list(unet.parameters()))

    for ours, theirs in ((step.loss_instance, first), (step.loss_prior, second), (step.loss, eq_2)):
        assert tiny.rel(ours, theirs) < 1e-11
    assert max(map(tiny.rel, gradient, expected)) < 1e-9


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_min_snr_weight_makes_w_t_of_eq_2_the_smaller_of_snr_and_gamma(prediction_type, gamma):
    unet = linear_unet()
    instance, prior = term(3, 10, torch.float64), term(5, 20, torch.float64)
    t = torch.cat([instance.t, prior.t])
    schedule = Schedule(ALPHA_BAR, prediction_type)
    weight = min_snr_weight(schedule, t, gamma)
    step = dreambooth.step(unet, schedule, instance, prior, 0.5, weight)

    first, second = (
        x_form(unet, prediction_type, p, w=((alpha / sigma) ** 2).clamp(max=gamma))
        for p in (instance, prior)
        for alpha, sigma in [alpha_sigma(p.t)]
    )
    assert tiny.rel(step.loss_instance, first) < 1e-11
    assert tiny.rel(step.loss_prior, second) < 1e-11
    assert tiny.rel(step.loss, first + 0.5 * second) < 1e-11


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_min_snr_weight_equals_diffusers_formula_at_every_timestep(prediction_type):
    t = torch.arange(1000)
    snr = compute_snr(DDPMScheduler.from_config(tiny.scheduler_config()), t)
    smaller = torch.minimum(snr, torch.full_like(snr, 5.0))
    expected = smaller / snr if prediction_type == "epsilon" else smaller / (snr + 1)
    weight = min_snr_weight(schedule_of(prediction_type), t, 5.0)
    assert ((weight - expected).abs() < 1e-5 * expected).all()


# ---- what the step returns ---------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_returned_tensors_are_the_ones_in_the_loss(prediction_type, weighted):
    instance, prior = term(1, 10), term(3, 20)
    weight = torch.tensor([2.0, 0.5, 0.0, 3.0]) if weighted else None
    calls = []
    s = dreambooth.step(
        linear_unet(calls), schedule_of(prediction_type), instance, prior, 0.7, weight
    )
    ((x_t, t, context),) = calls
    assert torch.equal(s.x_t, x_t)
    assert torch.equal(t, torch.cat([instance.t, prior.t]))
    assert torch.equal(context, torch.cat([instance.c, prior.c]))
    assert torch.equal(s.prediction, linear_unet()(x_t, t, context))

    # The error of each sample, weighted before the means, each half by its own count.
    errors = [F.mse_loss(p, q) for p, q in zip(s.prediction, s.target, strict=True)]
    per_sample = torch.stack(errors) * (1 if weight is None else weight)
    assert torch.allclose(s.per_sample, per_sample, rtol=1e-6)
    assert s.loss_instance.item() == pytest.approx(per_sample[0].item())
    assert s.loss_prior.item() == pytest.approx(per_sample[1:].sum().item() / 3)
    assert s.loss.item() == pytest.approx(s.loss_instance.item() + 0.7 * s.loss_prior.item())


def test_the_halves_are_slices_of_the_step_instance_first():
    s = dreambooth.step(linear_unet(), schedule_of("epsilon"), term(1, 10), term(3, 20))
    assert s.n_instance == 1
    assert s.x_t.shape == s.prediction.shape == s.target.shape == (4, 4, 8, 12)
    assert s.per_sample.shape == (4,)
    assert s.loss.shape == s.loss_instance.shape == s.loss_prior.shape == ()
    for name in ("x_t", "prediction", "target", "per_sample"):
        whole, first, second = (getattr(part, name) for part in (s, s.instance, s.prior))
        assert torch.equal(first, whole[:1])
        assert torch.equal(second, whole[1:])
    assert torch.equal(s.instance.target, term(1, 10).eps)
    assert torch.equal(s.prior.target, term(3, 20).eps)


@pytest.mark.parametrize("prior_loss_weight", [0.5, 1.0])
def test_both_halves_go_through_the_unet_in_one_pass(prior_loss_weight):
    calls = []
    unet = linear_unet(calls)
    dreambooth.step(unet, schedule_of("epsilon"), term(2, 10), term(3, 20), prior_loss_weight)
    assert [len(x_t) for x_t, _, _ in calls] == [5]


def test_without_lambda_or_prior_the_class_half_is_not_computed():
    instance, prior, schedule = term(2, 10), term(3, 20), schedule_of("epsilon")
    calls = []
    unet = linear_unet(calls)
    zero = dreambooth.step(unet, schedule, instance, prior, prior_loss_weight=0.0)
    none = dreambooth.step(unet, schedule, instance, None)
    assert [len(x_t) for x_t, _, _ in calls] == [2, 2]
    assert len(zero.prior.x_t) == 0
    assert zero.loss == none.loss == zero.loss_instance
    assert zero.loss_prior == 0


def test_a_sample_s_loss_does_not_depend_on_the_rest_of_the_batch():
    """Each half keeps its own timestep, noise and prompt."""
    schedule, unet = schedule_of("v_prediction"), unet_and_peer()[0]
    instance, prior = term(1, 10), term(1, 20)
    with torch.no_grad():
        together = dreambooth.step(unet, schedule, instance, prior)
        alone = [dreambooth.step(unet, schedule, p, None).loss for p in (instance, prior)]
    assert together.loss_instance.item() == pytest.approx(alone[0].item(), rel=1e-5)
    assert together.loss_prior.item() == pytest.approx(alone[1].item(), rel=1e-5)


def test_a_half_precision_unet_and_latents_still_make_an_fp32_loss():
    unet = unet_and_peer()[0].bfloat16()
    half = Term(*(x.bfloat16() if x.is_floating_point() else x for x in vars(term(2, 10)).values()))
    s = dreambooth.step(unet, schedule_of("epsilon"), half, half)
    assert all(x.dtype == torch.float32 for x in (s.x_t, s.prediction, s.target, s.per_sample))
    assert s.loss.dtype == torch.float32
    assert unet.conv_in.weight.dtype == torch.bfloat16
