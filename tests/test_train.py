"""What training does, against a loop written with diffusers' modules and torch's own AdamW."""

import csv
import json
import os
import re
import shutil

import diffusers
import peers
import pytest
import runs
import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from PIL import Image

from minibooth import UserError, dreambooth, load, train
from minibooth.device.precision import Precision
from minibooth.training import class_images, data, grids, photos, report
from minibooth.training.data import Latents, draw_term, pick, rng
from minibooth.training.optimizer import Update, rate
from minibooth.training.settings import TrainConfig

# ---- the learning rate -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warm_up", [0, 3])
def test_learning_rates_follow_diffusers_schedules(name, warm_up):
    adam = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    peer = get_scheduler(name, adam, None, warm_up, 10).lr_lambdas[0]
    found = [rate(step, 10, warm_up, name) for step in range(1, 11)]
    assert found[:warm_up] == [step / warm_up for step in range(1, warm_up + 1)]
    assert found[warm_up:] == pytest.approx([peer(done) for done in range(warm_up, 10)])


@pytest.mark.parametrize("warm_up", [10, 12])
def test_a_warm_up_may_last_as_long_as_the_run(warm_up):
    assert [rate(step, 10, warm_up) for step in (1, 10)] == [1 / warm_up, 10 / warm_up]


# ---- the whole loop ----------------------------------------------------------------------------


def independent_loop(config, kind):
    """Train a peer as `config` says. Only the draws are minibooth's: x0's noise, eps, t, order."""
    pipe = peers.pipeline(kind)
    pipe.tokenizer = peers.model(kind)[1].tokenizer
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    unet, text_encoder = pipe.unet.train(), pipe.text_encoder
    side = 2 * unet.config.sample_size
    groups = [{"params": list(unet.parameters()), "lr": config.learning_rate}]
    if config.train_text_encoder:
        slower = config.text_encoder_learning_rate
        groups.append({"params": list(text_encoder.parameters()), "lr": slower})
    for group in groups:
        group["initial"] = group["lr"]
    weights = [p for group in groups for p in group["params"]]
    adam = torch.optim.AdamW(
        groups, weight_decay=config.adam_weight_decay, foreach=False, fused=False
    )

    def latents(files):
        pictures = photos.load_photos(files, side)
        with torch.no_grad():
            found = pipe.vae.encode(pictures.images).latent_dist
        scale = pipe.vae.config.scaling_factor
        return Latents(found.mean * scale, found.std * scale, pictures.photo, pictures.sizes)

    def encoded(prompt):
        ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt")
        return text_encoder(ids.input_ids)[0]

    data = {"instance": (latents(config.instance_data_dir), config.instance_prompt)}
    if config.prior_loss_weight:
        drawn = class_images_of(config, side)
        assert len(drawn) == config.num_class_images
        data["class"] = (latents(drawn), config.class_prompt)
    warm_up, last = config.lr_warmup_steps, config.max_train_steps
    schedule = get_scheduler(config.lr_scheduler, adam, None, warm_up, last)
    for step in range(1, config.max_train_steps + 1):
        for n in range(
            (step - 1) * config.gradient_accumulation_steps,
            step * config.gradient_accumulation_steps,
        ):
            loss = 0
            for name, (pictures, prompt) in data.items():
                batch = config.train_batch_size
                term = draw_term(pictures, encoded(prompt), 1000, config.seed, name, n, batch)
                noisy = scheduler.add_noise(term.x0, term.eps, term.t)
                prediction = unet(noisy, term.t, term.c).sample
                v = scheduler.config.prediction_type == "v_prediction"
                target = scheduler.get_velocity(term.x0, term.eps, term.t) if v else term.eps
                errors = F.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))
                if config.snr_gamma:
                    snr = compute_snr(scheduler, term.t)
                    errors = errors * snr.clamp(max=config.snr_gamma) / (snr + v)
                loss = (
                    loss + (1 if name == "instance" else config.prior_loss_weight) * errors.mean()
                )
            (loss / config.gradient_accumulation_steps).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        for group in adam.param_groups:
            if step <= warm_up:  # diffusers' first update has the rate 0
                group["lr"] = group["initial"] * step / warm_up
            else:
                group["lr"] = group["initial"] * schedule.lr_lambdas[0](step - 1)
        adam.step()
        adam.zero_grad()
    return {"unet": unet, "text_encoder": text_encoder}, norm


def class_images_of(config, side):
    sd, [subject] = load(config.model), config.subjects
    return class_images.ensure(sd, class_images.find(config, subject, side, sd.fingerprint()))


CASES = {
    "prior preservation": {"max_train_steps": 3},
    "plain fine-tuning without clipping": {
        "prior_loss_weight": 0.0,
        "class_prompt": None,
        "max_grad_norm": 1e9,
    },
    "λ and batch": {"prior_loss_weight": 0.3, "train_batch_size": 2, "seed": 5},
    "text encoder": {"train_text_encoder": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "warm-up and weight decay": {"lr_warmup_steps": 3, "decay": 20.0},
    "falling rate": {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "max_train_steps": 3},
    "min-SNR": {"snr_gamma": 5.0, "train_batch_size": 2},
    "v, trained text": {"kind": "sd2", "train_text_encoder": True},
    "v, min-SNR": {"kind": "sd2", "snr_gamma": 5.0},
}


@pytest.mark.parametrize("case", CASES)
def test_the_weights_after_some_steps_equal_an_independent_loop(case, tmp_path, monkeypatch):
    changes = {"kind": "sd1", "max_grad_norm": 0.3, "max_train_steps": 2} | CASES[case]
    monkeypatch.setattr(train.TrainConfig, "adam_weight_decay", changes.pop("decay", 0.01))
    kind, config = changes["kind"], runs.config(tmp_path / "out", **changes)
    sd = runs.model(kind)
    start = {name: runs.flat(network.state_dict()) for name, network in sd.networks.items()}
    train.train(config, sd)
    expected, norm = independent_loop(config, kind)
    assert norm > 0.3  # so that clipping at 0.3 does something
    assert read_losses(tmp_path / "out")[-1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for name, peer in expected.items():
        moved = runs.flat(sd.networks[name].state_dict()) - start[name]
        if name == "text_encoder" and not config.train_text_encoder:
            assert not moved.any()
            continue
        wanted = runs.flat(peers.tensors(peer)) - start[name]
        assert (moved - wanted).norm() / wanted.norm() < 3e-4
    assert not (runs.flat(sd.vae.state_dict()) - start["vae"]).any()


def trained(folder, on_step=None, kind="half", **changes):
    """The weights of everything after a run, and every (step, result) on the way."""
    sd, results = runs.model(kind), []
    config = runs.config(folder, kind=kind, **changes)

    def keep(step, result):
        results.append((step, result))
        if on_step:
            on_step(step, result, sd)

    train.train(config, sd, keep)
    return {name: runs.flat(network.state_dict()) for name, network in sd.networks.items()}, results


def test_gradient_checkpointing_saves_memory_not_bits(tmp_path, monkeypatch):
    plain, _ = trained(tmp_path / "plain")
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "minibooth.device.memory.checkpoint",
        lambda *a, **k: calls.append(a) or checkpoint(*a, **k),
    )
    checkpointed, _ = trained(tmp_path / "checkpointed", gradient_checkpointing=True)
    assert torch.equal(plain["unet"], checkpointed["unet"])
    assert len(calls) == 3 * 12  # steps × (8 resnets and 4 transformers)


def test_the_seed_alone_decides_and_0_is_one(tmp_path):
    torch.manual_seed(123)
    first, _ = trained(tmp_path / "a", seed=0, max_train_steps=1)
    torch.randn(7)
    again, _ = trained(tmp_path / "b", seed=0, max_train_steps=1)
    other, _ = trained(tmp_path / "c", seed=1, max_train_steps=1)
    assert torch.equal(first["unet"], again["unet"])
    assert not torch.equal(first["unet"], other["unet"])


def test_without_prior_nothing_of_the_class_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(class_images, "ensure", None)  # would fail if it were called
    out = tmp_path / "out"
    changes = {"prior_loss_weight": 0.0, "class_prompt": None, "class_data_dir": None}
    _, results = trained(out, train_batch_size=2, **changes)
    assert [len(result.x_t) for _, result in results] == [2, 2, 2]
    assert all(result.loss_prior == 0 for _, result in results)
    assert not (out / "class_images").exists()


@pytest.mark.filterwarnings("ignore:the instance prompt .* does not contain snow")
def test_each_term_has_its_own_prompt_padded_to_77(tmp_path, monkeypatch):
    """Also where the class prompt is the longer of the two."""
    seen = []
    step = dreambooth.step
    monkeypatch.setattr(
        dreambooth, "step", lambda *args: seen.append((args[2], args[3])) or step(*args)
    )
    encode = runs.model().encode_prompt
    for i, class_prompt in enumerate(["a photo of a dog in the snow", "a dog"]):
        trained(tmp_path / str(i), class_prompt=class_prompt, train_batch_size=2, max_train_steps=1)
        instance, prior = seen.pop()
        assert instance.c.context.shape == prior.c.context.shape == (2, 77, 32)
        assert torch.equal(instance.c.context, encode(["a sks dog"] * 2))
        assert torch.equal(prior.c.context, encode([class_prompt] * 2))


# ---- the draws ---------------------------------------------------------------------------------


def some_latents(photo, std=0.0):
    """Crop i is i everywhere, give or take std."""
    mean = torch.arange(float(len(photo))).view(-1, 1, 1, 1).expand(-1, 4, 8, 8)
    sizes = torch.arange(len(photo))[:, None].expand(-1, 6)
    return Latents(mean, torch.full_like(mean, std), torch.tensor(photo), sizes)


def draws(name, seed=0, count=200, batch=2, photo=(0, 1, 2), std=0.0):
    c = torch.zeros(1, 77, 4)
    latents = some_latents(photo, std)
    return [draw_term(latents, c, 1000, seed, name, n, batch) for n in range(count)]


def correlation(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return torch.corrcoef(torch.stack([a, b]))[0, 1].abs()


def test_a_draw_depends_on_its_seed_name_and_number_alone():
    forwards = draws("instance", count=4, std=1.0)
    torch.manual_seed(5)
    backwards = [
        draw_term(some_latents((0, 1, 2), 1.0), torch.zeros(1, 77, 4), 1000, 0, "instance", n, 2)
        for n in reversed(range(4))
    ][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert all(torch.equal(getattr(a, x), getattr(b, x)) for x in ("x0", "eps", "t"))
    for other in (draws("instance", seed=1, count=4), draws("class", count=4), forwards[1:]):
        for a, b in zip(forwards, other, strict=False):
            assert not torch.equal(a.eps, b.eps)
            assert correlation(a.eps, b.eps) < 0.2  # over 512 values; σ is 0.04


def test_instance_and_class_are_drawn_independently():
    instance, prior = draws("instance"), draws("class")
    t, t_prior = (torch.cat([term.t for term in terms]) for terms in (instance, prior))
    assert (t != t_prior).any() and correlation(t, t_prior) < 0.2  # 400 values; σ is 0.05
    eps, eps_prior = (torch.stack([term.eps for term in terms]) for terms in (instance, prior))
    assert correlation(eps, eps_prior) < 0.02  # 100,000 values; σ is 0.003
    assert correlation(eps[:-1], eps[1:]) < 0.02 and correlation(t[:-1], t[1:]) < 0.2
    assert correlation(eps[:, 0], eps[:, 1]) < 0.02


def test_timesteps_are_uniform_over_the_whole_schedule_and_noise_is_unit():
    terms = draws("instance", count=2000)
    t = torch.cat([term.t for term in terms])
    assert t.min() < 5 and t.max() > 994 and t.dtype == torch.int64
    counts = torch.histc(t.float(), 10, 0, 1000)
    assert ((counts - 400).abs() < 100).all()  # σ is 19
    eps = torch.cat([term.eps for term in terms])
    assert abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01


def test_class_images_are_not_always_paired_with_the_same_photographs():
    """diffusers pairs class image j with photograph j mod n for ever."""
    pairs = {
        (pick(some_latents((0, 1, 2)), 0, "instance", n, 1).item(), class_image.item())
        for n in range(200)
        for class_image in pick(some_latents(range(6)), 0, "class", n, 1)
    }
    assert len(pairs) == 3 * 6


@pytest.mark.parametrize("batch", [1, 2])
def test_every_photograph_comes_once_an_epoch_and_its_crops_share_its_turn(batch):
    photo = (0, 0, 0, 1, 2, 2, 2, 3)  # two of four photographs give three crops
    rows = [pick(some_latents(photo), 7, "instance", n, batch) for n in range(120 // batch)]
    turns = torch.tensor(photo)[torch.cat(rows)].view(-1, 4).tolist()
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in turns)
    assert len({tuple(epoch) for epoch in turns}) > 10
    assert {row.item() for row in torch.cat(rows)} == set(range(8))


def test_latents_are_sampled_anew_from_mean_and_std_each_step():
    mean, std = torch.full((1, 4, 8, 8), 3.0), torch.full((1, 4, 8, 8), 0.5)
    latents = Latents(mean, std, torch.zeros(1), torch.zeros(1, 6))
    x0 = [
        draw_term(latents, torch.zeros(1, 77, 4), 1000, 0, "instance", n, 1).x0 for n in range(200)
    ]
    assert not torch.equal(x0[0], x0[1])
    x0 = torch.cat(x0)
    assert abs(x0.mean() - 3) < 0.02 and abs(x0.std() - 0.5) < 0.02


def test_flipping_adds_the_mirrored_crops_to_the_turn_of_their_photograph():
    sd, pictures = runs.model(), photos.load_photos(runs.photographs(), 32)
    latents = data.encode(sd, pictures, True, "photographs")
    assert latents.photo.tolist() == pictures.photo.tolist() * 2
    mean, _ = sd.vae.encode(pictures.images.flip(-1))
    torch.testing.assert_close(latents.mean[5:], mean.detach() * 0.18215, rtol=1e-4, atol=1e-5)


def test_generators_of_near_seeds_and_names_have_nothing_in_common():
    states = [rng(*a).initial_seed() for a in [(0, "a", 1), (0, "a", 11), (1, "a", 1), (0, "b", 1)]]
    assert len(set(states)) == 4


# ---- class images ------------------------------------------------------------------------------


def ensure(folder, **changes):
    sd, side = changes.pop("sd", None) or runs.model(), changes.pop("resolution", 16)
    settings = {"class_prompt": "a dog", "num_class_images": 3, "class_steps": 2}
    settings |= {"class_data_dir": str(folder), "sample_batch_size": 2}
    config = TrainConfig(**settings | changes)
    [subject] = config.subjects
    return class_images.ensure(sd, class_images.find(config, subject, side, sd.fingerprint()))


def test_only_missing_class_images_are_drawn_and_none_is_overwritten(tmp_path):
    files = ensure(tmp_path)
    assert len(files) == 3 == len(list(tmp_path.iterdir()))
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in files}
    files[1].unlink()
    assert ensure(tmp_path) == files
    for f, (content, time) in before.items():
        assert f.read_bytes() == content
        assert (f.stat().st_mtime_ns == time) == (f != files[1])
    assert files == ensure(tmp_path, num_class_images=5)[:3]
    assert ensure(tmp_path, num_class_images=2) == files[:2]


def test_class_images_are_keyed_by_everything_they_depend_on(tmp_path):
    """All in one folder, none taken for another's."""
    plain = ensure(tmp_path)
    changes = [{"class_prompt": "a cat"}, {"seed": 9}, {"class_steps": 3}]
    changes += [{"class_sampler": "ddpm"}, {"class_guidance_scale": 1.0}, {"resolution": 8}]
    changed = runs.model()
    with torch.no_grad():
        changed.unet.conv_out.weight.mul_(2)
    changes += [{"sd": changed}]
    drawn = [ensure(tmp_path, **change) for change in changes]
    assert ensure(tmp_path, class_guidance_scale=1) == drawn[4]
    everything = [f for group in [plain, *drawn] for f in group]
    assert len(set(everything)) == len(everything) == 3 * 8
    assert len({f.read_bytes() for f in everything}) == len(everything)
    assert Image.open(drawn[5][0]).size == (8, 8)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_class_images_are_what_the_model_draws_by_itself(tmp_path, sampler):
    files = ensure(tmp_path, class_sampler=sampler, seed=4)
    drawn = runs.model().generate(["a dog"] * 3, steps=2, sampler=sampler, seed=4, batch_size=2)
    for file, image in zip(files, drawn, strict=True):
        assert Image.open(file).tobytes() == image.tobytes()


def test_class_images_of_the_user_count_and_are_used(tmp_path, capsys):
    for name in ("mine.jpg", "other.png"):
        Image.new("RGB", (40, 32), "red").save(tmp_path / name)
    files = ensure(tmp_path, num_class_images=3)
    assert [f.name for f in files[:2]] == ["mine.jpg", "other.png"] and len(files) == 3
    assert "2 of your own" in capsys.readouterr().out
    assert ensure(tmp_path, num_class_images=0) == files[:2]
    with pytest.raises(UserError, match="no class images"):
        ensure(tmp_path / "empty", num_class_images=0)


# ---- precision ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_fp32(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp32") / "out"
    return trained(folder, max_train_steps=2, learning_rate=1e-4)[1]


@pytest.mark.parametrize("name, tolerance", [("bf16", 2e-2), ("fp16", 2e-3)])
def test_half_precision_computes_about_the_same_with_fp32_weights(
    tmp_path, in_fp32, name, tolerance
):
    dtypes = []

    def look(step, result, sd):
        dtypes.extend([result.x_t.dtype, result.loss.dtype, result.per_sample.dtype])
        dtypes.extend(p.dtype for p in sd.unet.parameters())
        dtypes.extend(p.grad.dtype for p in sd.unet.parameters())

    changes = {"max_train_steps": 2, "learning_rate": 1e-4, "mixed_precision": name}
    _, half = trained(tmp_path / "half", look, **changes)
    assert set(dtypes) == {torch.float32}
    for (_, a), (_, b) in zip(in_fp32, half, strict=True):
        assert a.loss != b.loss
        assert abs(a.loss - b.loss) < tolerance * a.loss
        assert (a.prediction - b.prediction).norm() < tolerance * a.prediction.norm()


def test_fp16_gradients_are_scaled_up_and_the_log_is_not(tmp_path):
    norms = []

    def look(step, result, sd):
        grads = [p.grad for p in sd.unet.parameters()]
        norms.append(torch.nn.utils.get_total_norm(grads).item())

    changes = {"max_train_steps": 1, "mixed_precision": "fp16"}
    trained(tmp_path / "out", look, **changes)
    trained(tmp_path / "fp32", look, max_train_steps=1)
    scaled, plain = norms
    assert scaled / plain == pytest.approx(2**16, rel=0.02)
    assert read_losses(tmp_path / "out")[0]["grad_norm"] == pytest.approx(plain, rel=0.02)


def test_precision_is_one_rule():
    assert Precision("auto", torch.device("cpu")).name == "no"
    with Precision("bf16", torch.device("cpu")).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with Precision("no", torch.device("cpu")).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def one_weight(scaled, **changes):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    settings = {"weight_decay": 0.0, "max_grad_norm": 10.0} | changes
    return weight, Update([(0.1, [weight])], scaled=scaled, **settings)


def apply(weight, optimizer, step, gradient, loss=1.0):
    weight.grad = torch.tensor(gradient) * optimizer.scale
    return optimizer.apply(step, torch.tensor(loss), 1.0)


def test_an_fp16_overflow_skips_its_step_halves_the_scale_and_is_no_error():
    weight, optimizer = one_weight(scaled=True)
    twin, plain = one_weight(scaled=False)
    apply(weight, optimizer, 1, [1.0, 2.0])
    apply(twin, plain, 1, [1.0, 2.0])
    assert torch.equal(weight, twin) and optimizer.scale == 2**16
    before = weight.detach().clone()
    apply(weight, optimizer, 2, [float("inf"), 1.0])
    assert torch.equal(weight, before)
    assert optimizer.scale == 2**15 and optimizer.bad_step == -1
    apply(weight, optimizer, 3, [3.0, -1.0])
    apply(twin, plain, 3, [3.0, -1.0])
    torch.testing.assert_close(weight, twin)  # the skipped step left no trace in Adam's averages


def test_the_fp16_scale_grows_after_many_good_steps(monkeypatch):
    monkeypatch.setattr("minibooth.training.optimizer.GROWTH_INTERVAL", 3)
    weight, optimizer = one_weight(scaled=True)
    scales = []
    for step, gradient in enumerate([1.0, 1.0, float("nan"), 1.0, 1.0, 1.0, 1.0]):
        apply(weight, optimizer, step, [gradient, 0.0])
        scales.append(optimizer.scale.item() / 2**16)
    assert scales == [1, 1, 0.5, 0.5, 0.5, 1, 1]


def test_the_fp16_scale_and_adam_go_on_from_their_state(monkeypatch):
    monkeypatch.setattr("minibooth.training.optimizer.GROWTH_INTERVAL", 3)
    weight, optimizer = one_weight(scaled=True)
    for step, gradient in enumerate([float("inf"), 1.0, 2.0]):
        apply(weight, optimizer, step, [gradient, -1.0])
    state = {key: value.clone() for key, value in optimizer.state().items()}
    twin, resumed = one_weight(scaled=True)
    twin.data.copy_(weight)
    resumed.load_state(state)
    for step, gradient in enumerate([3.0, float("nan"), 1.0]):  # the first makes the scale grow
        apply(weight, optimizer, step, [gradient, 0.5])
        apply(twin, resumed, step, [gradient, 0.5])
        assert torch.equal(weight, twin) and resumed.scale == optimizer.scale
    assert resumed.scale == 2**15


def test_fp16_that_overflows_without_any_scale_is_an_error():
    weight, optimizer = one_weight(scaled=True)
    for step in range(20):
        apply(weight, optimizer, step, [float("inf"), 1.0])
    assert optimizer.bad_step == 16  # 2¹⁶ halved 16 times is 1: the gradient itself is infinite


def test_clipping_limits_the_norm_and_reports_the_one_before():
    """With β1 = β2 = 0 in mind: Adam's first average is 0.1 of the clipped gradient."""
    for scaled in (False, True):
        weight, optimizer = one_weight(scaled, max_grad_norm=0.5)
        norm = apply(weight, optimizer, 1, [3.0, 4.0])
        assert norm == pytest.approx(5.0)
        average = optimizer.state()["exp_avg.0"]
        torch.testing.assert_close(average, 0.1 * torch.tensor([0.3, 0.4]), rtol=1e-5, atol=0)


# ---- numbers that are not finite ---------------------------------------------------------------


def failing(tmp_path, monkeypatch, looks, changes, on_step=None):
    """The message of a run that stops, the weights after each step, and its folder's losses."""
    monkeypatch.setattr(report, "steps_between_looks", lambda device: looks)
    sd, weights = runs.model(), []
    apply = Update.apply

    def watched(self, *args):
        norm = apply(self, *args)
        weights.append(runs.flat(sd.unet.state_dict()))
        return norm

    monkeypatch.setattr(Update, "apply", watched)
    config = runs.config(tmp_path / "out", max_train_steps=6, **changes)
    with pytest.raises(UserError) as error:
        train.train(config, sd, on_step and (lambda step, result: on_step(step, result, sd)))
    assert torch.equal(weights[-1], runs.flat(sd.unet.state_dict()))
    return str(error.value), weights, read_losses(tmp_path / "out")


@pytest.mark.parametrize("looks", [1, 4])
def test_a_loss_that_is_not_finite_stops_at_its_step_with_the_weights_before(
    tmp_path, monkeypatch, looks
):
    draw = data.draw_batch

    def poisoned(latents, rows, T, seed, name, n, *rest):
        drawn = draw(latents, rows, T, seed, name, n, *rest)
        if (name, n) == ("class", 2):  # the third step's class half
            drawn.x0[0, 0, 0, 0] = float("inf")
        return drawn

    monkeypatch.setattr(data, "draw_batch", poisoned)
    message, weights, losses = failing(tmp_path, monkeypatch, looks, {})
    assert "step 3: x_t is not finite" in message and "\n" not in message
    assert "step 2" in message and "--learning_rate" in message and "--mixed_precision" in message
    assert len(weights) == (3 if looks == 1 else 4)
    assert not torch.equal(weights[0], weights[1])
    assert all(torch.equal(weights[1], later) for later in weights[2:])
    assert weights[-1].isfinite().all()
    assert [row["step"] for row in losses] == [1, 2]


@pytest.mark.parametrize("looks", [1, 4])
def test_a_gradient_that_is_not_finite_is_named(tmp_path, monkeypatch, looks):
    def hook(step, result, sd):
        if step == 1:  # from the second step on, also when it is done again to find the tensor
            sd.unet.mid_block.resnets[0].conv1.weight.register_hook(lambda g: g * float("nan"))

    message, weights, losses = failing(tmp_path, monkeypatch, looks, {}, hook)
    name = "the gradient of unet.mid_block.resnets.0.conv1.weight is not finite"
    assert f"step 2: {name}" in message
    assert all(torch.equal(weights[0], later) for later in weights[1:])
    assert [row["step"] for row in losses] == [1]


def test_weights_that_a_learning_rate_blew_up_are_named(tmp_path, monkeypatch):
    changes = {"learning_rate": 1e38, "checkpointing_steps": 1}
    message, _, _ = failing(tmp_path, monkeypatch, 1, changes)
    assert re.search(r"unet is not written: \S+ is not finite", message)
    assert not list(tmp_path.glob("out/checkpoint-*"))  # a snapshot of them would be none
    message, _, _ = failing(tmp_path / "without", monkeypatch, 1, {"learning_rate": 1e38})
    assert re.match(r"step [23]: \S+ is not finite", message)


# ---- what a run writes -------------------------------------------------------------------------


def read_losses(folder):
    with open(folder / "loss.csv") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


MODEL = {
    "model_index.json",
    "README.md",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with everything on: its folder, results and model."""
    folder, results = tmp_path_factory.mktemp("run") / "out", []
    config = runs.config(
        folder,
        **{"max_train_steps": 5, "checkpointing_steps": 1, "checkpoints_total_limit": 2},
        **{"validation_steps": 2, "num_validation_images": 2, "gradient_accumulation_steps": 2},
        **{"lr_warmup_steps": 4, "prior_loss_weight": 0.5, "class_data_dir": None},
    )
    sd = train.train(config, on_step=lambda step, result: results.append((step, result)))
    return folder, results, sd


def test_a_run_writes_what_it_should_and_nothing_else(run):
    folder, _, _ = run
    expected = MODEL | {"config.json", "loss.csv", "loss.png", "before_after.png"}
    expected |= {f"checkpoint-{n}/{f}" for n in (3, 4) for f in MODEL}
    expected |= {f"samples/step-0000{n}.png" for n in (0, 2, 4, 5)} | {"samples/photographs.png"}
    expected |= {"state/step-00000005/state.safetensors", "state/step-00000005/identity.json"}
    found = runs.files(folder)
    drawn = {f for f in found if re.fullmatch(r"class_images/[0-9a-f]{12}-0000[012]\.png", f)}
    assert len(drawn) == 3
    assert found - drawn == expected


def test_the_result_and_its_snapshots_load_in_diffusers(run):
    folder, _, sd = run
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    for name, network in sd.networks.items():
        assert torch.equal(
            runs.flat(peers.tensors(getattr(pipe, name))), runs.flat(network.state_dict())
        )
    base = peers.model("half")[1]
    for name in ("vae", "text_encoder"):
        assert torch.equal(
            runs.flat(peers.tensors(getattr(pipe, name))),
            runs.flat(peers.tensors(getattr(base, name))),
        )
    snapshot = folder / "checkpoint-4"
    half = diffusers.StableDiffusionPipeline.from_pretrained(snapshot, torch_dtype=torch.float16)
    stored = half.unet.state_dict()
    assert {v.dtype for v in stored.values()} == {torch.float16}
    size = (snapshot / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 0.51 * (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    # One step of at most 1e-3 a weight lies between the two.
    assert 0 < (runs.flat(stored) - runs.flat(sd.unet.state_dict())).abs().max() < 2e-3
    for model in (snapshot, folder):  # fp16, fp32
        ours, theirs = peers.same_pictures(load(model), model)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_the_losses_in_the_file_are_those_of_the_steps(run):
    folder, results, _ = run
    assert (folder / "loss.csv").read_text().splitlines()[0] == (
        "step,loss,loss_instance,loss_prior,lr,grad_norm"
    )
    rows = read_losses(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["lr"] for row in rows] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert len(results) == 10
    for i, row in enumerate(rows):
        for name in ("loss", "loss_instance", "loss_prior"):
            two = [getattr(result, name).item() for step, result in results if step == i + 1]
            assert row[name] == pytest.approx(sum(two) / 2, rel=1e-6)
        assert row["loss"] == pytest.approx(row["loss_instance"] + 0.5 * row["loss_prior"])
        assert row["grad_norm"] > 0


def test_the_pictures_of_a_run_are_whole_and_show_what_they_say(run):
    folder, _, sd = run
    for name in ("before_after.png", "loss.png", *(f"samples/step-0000{n}.png" for n in (0, 5))):
        with Image.open(folder / name) as image:
            image.load()
            assert min(image.size) > 200, name
    # Three prompts in rows of two; the last grid holds what the trained model draws.
    drawn = sd.generate(["a sks dog"] * 2, steps=2)
    rows = {n: Image.open(folder / f"samples/step-0000{n}.png").tobytes() for n in (0, 2, 5)}
    assert len(set(rows.values())) == 3
    big = [image.resize((128, 128), Image.Resampling.NEAREST) for image in drawn]
    assert all(contains(folder / "samples/step-00005.png", image) for image in big)
    assert all(contains(folder / "before_after.png", image) for image in big)
    before = runs.model().generate("a sks dog", steps=2)[0].resize((128, 128), 0)
    assert contains(folder / "before_after.png", before)
    assert contains(folder / "samples/step-00000.png", before)
    assert not contains(folder / "samples/step-00005.png", before)


def contains(path, picture):
    """Whether a picture lies somewhere in another, by its rows of bytes."""
    image = Image.open(path).convert("RGB")
    width, height = picture.size
    first = picture.crop((0, 0, width, 1)).tobytes()
    for y in range(image.height - height + 1):
        x = image.crop((0, y, image.width, y + 1)).tobytes().find(first)
        if x >= 0 and image.crop((x // 3, y, x // 3 + width, y + height)).tobytes() == (
            picture.tobytes()
        ):
            return True
    return False


def test_the_card_and_the_settings_tell_where_the_result_comes_from(run):
    folder, _, _ = run
    base = peers.model("half")[0]
    for card, steps in ((folder, 5), (folder / "checkpoint-4", 4)):
        text = (card / "README.md").read_text()
        head, body = text.split("---\n")[1:]
        assert "license: unknown" in head and "base_model" not in head  # which the hub would refuse
        assert 'instance_prompt: "a sks dog"' in head
        assert f"\n`{base.name}` fine-tuned" in body
        assert "`a dog`" in body and "0.5" in body and f"{steps} steps" in body
        assert ("before_after.png" in body) == (card == folder)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["model"] == os.path.relpath(base, folder)
    assert settings["prior_loss_weight"] == 0.5
    fields = set(train.TrainConfig.__dataclass_fields__) - {"config"}
    assert set(settings) == fields


def test_the_card_links_to_a_base_model_on_the_hub(tmp_path):
    sd = runs.model()
    sd.source = "someone/some-model"
    train.train(runs.config(tmp_path / "out", max_train_steps=1), sd)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "\nbase_model: someone/some-model\n" in text and "\n`someone/some-model` fine-" in text


def test_the_licence_of_the_base_model_goes_with_the_result(tmp_path):
    sd = runs.model()
    sd.licence, sd.licence_files = "creativeml-openrail-m", {"LICENSE": "Section I: PREAMBLE"}
    train.train(runs.config(tmp_path / "out", max_train_steps=1), sd)
    assert "license: creativeml-openrail-m" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "LICENSE").read_text() == "Section I: PREAMBLE"
    assert load(tmp_path / "out").licence == "creativeml-openrail-m"


def test_photographs_that_change_on_disk_during_a_run_change_nothing(tmp_path):
    """One is replaced, one cut off, one removed: the run has read them all."""
    folder, own = tmp_path / "photographs", tmp_path / "own"
    shutil.copytree(runs.photographs(), folder)
    shutil.copytree(runs.photographs(), own)
    settings = {"instance_data_dir": str(folder), "class_data_dir": str(own), "max_train_steps": 2}
    whole = train.train(runs.config(tmp_path / "a", **settings), runs.model())

    def change(step, _):
        for place in (folder, own):
            shutil.copy(place / "1.png", place / "0.png")
            (place / "1.png").write_bytes((place / "1.png").read_bytes()[:50])
            (place / "2.png").unlink(missing_ok=True)

    changed = train.train(runs.config(tmp_path / "b", **settings), runs.model(), on_step=change)
    states = (runs.flat(sd.unet.state_dict()) for sd in (whole, changed))
    assert torch.equal(*states)
    again = runs.config(tmp_path / "b", **settings | {"resume_from_checkpoint": "latest"})
    with pytest.raises(UserError, match=r"0\.png cannot be read"):
        train.train(again, runs.model())


def test_without_sample_grids_no_picture_is_drawn(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    monkeypatch.setattr(grids, "draw_latents", None)  # would fail if it were called
    trained(folder, num_validation_images=0, validation_steps=1, max_train_steps=2)
    assert not (folder / "before_after.png").exists()
    assert "before_after" not in (folder / "README.md").read_text()
    assert [f.name for f in (folder / "samples").iterdir()] == ["photographs.png"]


def test_the_end_report_says_how_far_the_weights_moved(tmp_path, capsys):
    before = runs.flat(runs.model().unet.state_dict())
    after, _ = trained(tmp_path / "out", train_text_encoder=True)
    out = capsys.readouterr().out
    share = (after["unet"] - before).norm() / before.norm()
    assert f"the unet's weights moved by {share:.3%} of their norm" in out
    assert "the text_encoder's weights moved by 0." in out
