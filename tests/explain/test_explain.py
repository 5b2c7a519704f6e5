"""The microscope: what it shows is what the step computed, and looking changes nothing."""

import base64
import contextlib
import io
import math
import re
import weakref
from html.parser import HTMLParser

import peers
import pytest
import runs
import torch
from PIL import Image

from minibooth import dreambooth, lora, train
from minibooth.device import memory
from minibooth.device.precision import Precision
from minibooth.dreambooth import Term
from minibooth.explain import __main__ as explain
from minibooth.explain import first_step, microscope
from minibooth.pipeline import StableDiffusion
from minibooth.training import parameters, prepare, report
from minibooth.training.data import rng

PROMPT = "a sks dog"


def term(sd, prompt, n, seed):
    g = rng(seed, "test")
    x0, eps = torch.randn(2, n, 4, 16, 16, generator=g)
    t = torch.randint(1000, (n,), generator=g)
    return Term(x0, eps, t, sd.encode_prompt([prompt]).expand(n, -1, -1))


def look(kind="sd1", weighted=False, prior=True, prior_loss_weight=0.5, identifier="sks", **more):
    sd = runs.model(kind).to("cpu")
    instance, second = term(sd, PROMPT, 2, 1), term(sd, "a dog", 3, 2) if prior else None
    t = torch.cat([instance.t, second.t]) if prior else instance.t
    weight = dreambooth.min_snr_weight(sd.schedule, t, 5.0) if weighted else None
    parameters = {f"unet.{k}": p for k, p in sd.unet.named_parameters()}
    given = (instance, second, prior_loss_weight, weight)
    return sd, given, microscope.look(sd, *given, parameters, PROMPT, identifier, **more)


# ---- attention ---------------------------------------------------------------------------------


def test_attention_is_the_softmax_of_each_head_and_explains_the_layer_s_output():
    layer = runs.model().unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    g = rng(0, "attention")
    x, context = torch.randn(2, 9, 32, generator=g), torch.randn(2, 77, 32, generator=g)
    P = microscope.attention_weights(layer, x, context)
    assert P.shape == (2, layer.heads, 9, 77)
    assert torch.allclose(P.sum(dim=-1), torch.ones(2, layer.heads, 9), atol=1e-6)

    d, double = 32 // layer.heads, layer.double().requires_grad_(False)
    x, context = x.double(), context.double()
    parts = []
    for h in range(layer.heads):  # by hand, a head and a row at a time
        rows = slice(h * d, (h + 1) * d)
        q, k = x @ double.to_q.weight[rows].T, context @ double.to_k.weight[rows].T
        for b in range(2):
            for n in range(9):
                scores = [math.exp(float(q[b, n] @ k[b, m]) / math.sqrt(d)) for m in range(77)]
                row = torch.tensor(scores).double() / sum(scores)
                assert torch.allclose(P[b, h, n].double(), row, atol=1e-6)
        v = context @ double.to_v.weight[rows].T
        parts.append(P[:, h].double() @ v)
    out = double.to_out[0](torch.cat(parts, dim=-1))
    assert torch.allclose(out, double(x, context), atol=1e-6)


def test_every_layer_that_reads_the_text_is_seen_and_left_as_it_was():
    sd = runs.model("sd1")
    a = term(sd, PROMPT, 2, 1)
    plain = sd.unet(a.x0, a.t, a.c)
    with microscope.cross_attention(sd.unet) as seen:
        assert torch.equal(sd.unet(a.x0, a.t, a.c), plain)
    layers = [n for n, _ in sd.unet.named_modules() if n.endswith("attn2")]
    assert sorted(seen) == sorted(layers) and len(layers) == 6  # 2 down, 1 mid, 3 up
    for weights in seen.values():
        assert weights.shape[0] == 2 and weights.shape[2] == 77
        assert torch.allclose(weights.sum(dim=-1), torch.ones(weights.shape[:2]), atol=1e-6)
    seen.clear()
    sd.unet(a.x0, a.t, a.c)
    assert not seen


def test_the_maps_are_the_identifier_s_part_of_that_attention():
    sd, (instance, prior, *_), seen = look()
    a = seen.attended
    assert a.tokens == ["start", "a", "sks", "dog", "end", "padding"]
    assert a.identifier == [2]
    assert sum(a.share) == pytest.approx(1, abs=1e-5)
    with microscope.cross_attention(sd.unet) as attention, torch.no_grad():
        dreambooth.step(sd.unet, sd.schedule, instance, prior)
    weights = list(attention.values())
    # The tiny model's first half is at 16², its second at 8².
    assert [w.shape[1] for w in weights].count(256) == 5
    expected = sum(w[:2, :, 2] for w in weights if w.shape[1] == 256) / 5
    assert list(a.maps) == [16, 8]
    assert torch.allclose(a.maps[16], expected.reshape(2, 16, 16), atol=1e-6)
    mean = sum(w[:2, :, 2].mean() for w in weights) / 6
    assert a.share[2] == pytest.approx(mean.item(), rel=1e-4)


def test_an_identifier_of_several_tokens_is_found_whole_and_a_missing_one_is_not():
    tokenizer = runs.model().tokenizer
    attention = {"attn2": torch.full((1, 4, 77), 1 / 77)}
    found = microscope.attended(tokenizer, attention, "a zwx dog", "zwx", 1)
    assert [found.tokens[i] for i in found.identifier] == ["z", "w", "x"]
    assert found.maps[2].allclose(torch.tensor(3 / 77))
    for identifier in ("cat", None):
        found = microscope.attended(tokenizer, attention, "a zwx dog", identifier, 1)
        assert found.identifier == []
    assert microscope.find([1, 2], [1, 1, 2, 1, 2]) == [1, 2]


def test_the_identifier_is_the_word_that_names_neither_class_nor_filling():
    assert report.identifiers("a photo of sks dog", "a photo of a dog") == ["sks"]
    assert report.identifiers("a Sks, dog!", "a dog") == ["sks"]
    assert report.identifiers("a dog", "a dog") == []


# ---- the loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_the_losses_are_the_step_s_and_w_t_times_the_error_of_x(kind, weighted):
    sd, (instance, prior, share, weight), seen = look(kind, weighted)
    step = dreambooth.step(sd.unet, sd.schedule, instance, prior, share, weight)
    samples = [*seen.instance, *seen.prior]
    assert [s.loss for s in samples] == pytest.approx(step.per_sample.tolist(), rel=1e-5)
    assert [s.t for s in samples] == [*instance.t.tolist(), *prior.t.tolist()]
    assert seen.step.loss.item() == pytest.approx(step.loss.item(), rel=1e-6)
    for s in samples:
        assert s.w_t * s.x_error == pytest.approx(s.loss, rel=1e-3)
        snr = s.alpha_bar / (1 - s.alpha_bar)
        expected = min(snr, 5.0) if weighted else snr + (kind == "sd2")
        assert s.w_t == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_the_estimate_is_the_prediction_solved_for_x0(kind):
    sd, (instance, *_), seen = look(kind)
    for i, sample in enumerate(seen.instance):
        x, x_t, x0_hat = (latent.double() for latent in sample.latents)
        alpha_bar = sd.schedule.alpha_bar[sample.t].double()
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        assert torch.equal(x, instance.x0[i].double())
        assert torch.allclose(x_t, alpha * x + sigma * instance.eps[i], atol=1e-5)
        says = seen.step.prediction[i].double()
        expected = alpha * x_t - sigma * says if kind == "sd2" else (x_t - sigma * says) / alpha
        assert (x0_hat - expected).norm() < 1e-4 * expected.norm()
        decoded = sd.decode(torch.stack(sample.latents))
        assert torch.allclose(sample.pictures, decoded, atol=1e-5)


def test_the_listed_tensors_are_those_that_their_letters_name():
    _, (instance, prior, *_), seen = look()
    for mark, pr, of, half in (
        ("", "", instance, seen.step.instance),
        ("'", "_pr", prior, seen.step.prior),
    ):
        group = seen.entries[:12] if not mark else seen.entries[12:]
        by = {e.letter: e.tensor for e in group}
        assert torch.equal(by[f"x{pr}"], of.x0) and torch.equal(by[f"c{pr}"], of.c)
        assert torch.equal(by[f"t{mark}"], of.t)
        alpha, sigma = (by[f"{a}_t{mark}"].view(-1, 1, 1, 1) for a in "ασ")
        assert torch.allclose(alpha**2 + sigma**2, torch.ones(()), atol=1e-6)
        mixed = alpha * by[f"x{pr}"] + sigma * of.eps
        x_t = by[f"α_t{mark} x{pr} + σ_t{mark} ε{mark}"]
        assert torch.allclose(x_t, mixed, atol=1e-5) and torch.equal(x_t, half.x_t)
        error = (by["x̂_θ"] - of.x0).square().mean(dim=(1, 2, 3)) * by[f"w_t{mark}"]
        assert torch.allclose(by[f"w_t{mark} ‖x̂_θ − x{pr}‖²"], error, rtol=1e-3)


# ---- gradients ---------------------------------------------------------------------------------


def test_gradients_by_block_are_those_of_each_term_and_add_up_to_the_loss_s():
    sd, (instance, prior, share, _), seen = look(scale=8.0)
    norms = []
    for name in ("loss_instance", "loss_prior", "loss"):
        sd.unet.zero_grad()
        step = dreambooth.step(sd.unet, sd.schedule, instance, prior, share)
        (getattr(step, name) * (share if name == "loss_prior" else 1)).backward()
        grads = {k: p.grad.clone() for k, p in sd.unet.named_parameters()}
        norms.append(grads)
    blocks = [g.block for g in seen.gradients]
    down, up = [f"unet.down_blocks.{i}" for i in range(2)], [f"unet.up_blocks.{i}" for i in (0, 1)]
    expected = ["unet.conv_in", "unet.time_embedding", *down, "unet.mid_block", *up]
    assert sorted(blocks) == sorted([*expected, "unet.conv_norm_out", "unet.conv_out"])
    for g in seen.gradients:
        inside = g.block.removeprefix("unet.") + "."
        a, b, both = (
            torch.cat([v.flatten() for k, v in grads.items() if k.startswith(inside)])
            for grads in norms
        )
        assert g.weights == len(a)
        assert g.instance == pytest.approx(a.norm().item(), rel=1e-4)
        assert g.prior == pytest.approx(b.norm().item(), rel=1e-4)
        assert g.both == pytest.approx(both.norm().item(), rel=1e-4)
        cosine = (a @ b / a.norm() / b.norm()).item()
        assert g.cosine == pytest.approx(cosine, abs=1e-4)
        text = [
            v.flatten()
            for k, v in norms[2].items()
            if k.startswith(inside) and re.search(r"attn2\.to_[kv]", k)
        ]
        expected = torch.cat(text).norm().item() if text else 0.0
        assert g.reads_text == pytest.approx(expected, rel=1e-4)
    assert sum(g.weights for g in seen.gradients) == sum(p.numel() for p in sd.unet.parameters())


@pytest.mark.parametrize("changes", [{"prior": False}, {"prior_loss_weight": 0.0}])
def test_without_a_second_term_there_is_one_term_to_see(changes):
    _, _, seen = look(**changes)
    assert seen.prior == [] and len(seen.entries) == 12
    assert all(g.prior == 0 and g.both == pytest.approx(g.instance) for g in seen.gradients)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_gradients_seen_one_at_a_time_are_those_of_two_full_sets(scale):
    sd, (instance, prior, share, _), seen = look(scale=scale)
    names, weights = zip(*sd.unet.named_parameters(), strict=True)
    step = dreambooth.step(sd.unet, sd.schedule, instance, prior, share)
    first = torch.autograd.grad(step.loss_instance * scale, weights, retain_graph=True)
    second = torch.autograd.grad(share * step.loss_prior * scale, weights)
    for g in seen.gradients:
        own = [i for i, name in enumerate(names) if f"unet.{name}".startswith(g.block + ".")]
        a, b = (torch.cat([f[i].flatten().double() for i in own]) / scale for f in (first, second))
        assert g.instance == pytest.approx(a.norm().item(), rel=1e-5)
        assert g.prior == pytest.approx(b.norm().item(), rel=1e-5)
        assert g.both == pytest.approx((a + b).norm().item(), rel=1e-5)
        assert g.cosine == pytest.approx((a @ b / a.norm() / b.norm()).item(), abs=1e-5)


@pytest.mark.parametrize("prior", [True, False])
def test_there_is_one_gradient_at_a_time_and_the_others_wait_elsewhere(prior, monkeypatch):
    """As on a GPU, where what goes to the CPU is a copy."""
    sd, given, _ = look(prior=prior)
    step, weights = dreambooth.step(sd.unet, sd.schedule, *given), dict(sd.unet.named_parameters())
    made, alive = [], []

    def count(p):
        made.append(weakref.ref(p.grad.untyped_storage()))
        alive.append(sum(storage() is not None for storage in made))

    for p in weights.values():
        p.register_post_accumulate_grad_hook(count)
    monkeypatch.setattr(microscope, "put_aside", torch.Tensor.clone)
    microscope.gradients(step, 0.5, {f"unet.{name}": p for name, p in weights.items()})
    assert alive == [1] * (1 + prior) * len(weights)
    assert all(p.grad is None for p in weights.values())


def test_the_vae_that_draws_the_step_is_on_the_device_then(tmp_path, monkeypatch):
    """Training keeps it on the CPU."""
    there, visiting, decode = [], memory.visiting, StableDiffusion.decode

    @contextlib.contextmanager
    def visit(networks, device):
        with visiting(networks, device):
            there.extend(networks)
            yield
            del there[-len(networks) :]

    def drawn(sd, latents):
        assert sd.vae in there
        return decode(sd, latents)

    monkeypatch.setattr(memory, "visiting", visit)
    monkeypatch.setattr(StableDiffusion, "decode", drawn)
    explain.explain(runs.config(tmp_path, prior_loss_weight=0.0))  # no class images to draw
    assert there == []


def test_half_precision_is_looked_at_in_half_precision():
    exact, rounded = look()[2], look(autocast=Precision("bf16", torch.device("cpu")).autocast)[2]
    assert exact.step.loss != rounded.step.loss
    assert exact.step.loss.item() == pytest.approx(rounded.step.loss.item(), rel=2e-2)
    for a, b in zip(exact.gradients, rounded.gradients, strict=True):
        assert a.both == pytest.approx(b.both, rel=5e-2)


@pytest.mark.parametrize("fresh", [True, False])
def test_the_low_rank_update_is_what_gradient_descent_would_do(fresh):
    """To first order, so a short step does it; of rank r as long as B is zero."""
    sd = runs.model()
    sd.unet.requires_grad_(False)
    adapters = {"unet": lora.create(sd.unet, rank=2, alpha=6.0, seed=1)}
    lora.attach(sd.unet, adapters["unet"])
    if not fresh:
        for i, a in enumerate(adapters["unet"].values()):
            a.B.data = 0.1 * torch.randn(a.B.shape, generator=torch.Generator().manual_seed(i))
    named = parameters.named_weights(adapters)
    instance, prior = term(sd, PROMPT, 2, 1), term(sd, "a dog", 3, 2)
    given = (sd, instance, prior, 0.5, None, named, PROMPT, "sks")
    seen = microscope.look(*given, scale=8.0, adapters=adapters).low_rank

    step = dreambooth.step(sd.unet, sd.schedule, instance, prior, 0.5)
    step.loss.backward()
    [a] = [a for a in adapters["unet"].values() if f"unet.{a.layer}" == seen.layer]
    assert a.B.grad.norm() == max(b.B.grad.norm() for b in adapters["unet"].values())
    assert torch.allclose(seen.dA, a.A.grad, atol=1e-6) and bool(a.A.grad.any()) != fresh
    before, rate = a.delta().double(), 1e-3 / a.B.grad.norm().item()
    moved = {name: getattr(a, name).double() - rate * getattr(a, name).grad for name in "AB"}
    change = (a.scale * moved["B"] @ moved["A"] - before) / rate
    assert (change - seen.update).norm() < 0.01 * change.norm()
    assert torch.linalg.matrix_rank(seen.update, rtol=1e-4) == (2 if fresh else 4)
    assert len(seen.spectrum) == min(seen.update.shape) and seen.layers == len(adapters["unet"])


# ---- sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, steps", [("sd1", 12), ("sd2", 12), ("sd1", 1)])
def test_the_film_ends_with_the_picture_that_the_model_draws(kind, steps):
    sd = runs.model(kind)
    settings = {"steps": steps, "guidance_scale": 3.0, "seed": 7}
    ticks = []
    frames = microscope.film(sd, PROMPT, resolution=32, on_step=lambda: ticks.append(1), **settings)
    drawn = sd.generate([PROMPT], output="pt", **settings)[0]
    assert torch.allclose(frames[-1].x_t, drawn, atol=1e-5)
    assert frames[-1].t is None and frames[-1].x0 is None
    assert len(ticks) == steps
    visited = [f.t for f in frames[:-1]]
    assert visited == sorted(visited, reverse=True)
    assert len(frames) == min(microscope.FRAMES, steps + 1)
    noise = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(7))
    assert torch.allclose(frames[0].x_t, sd.decode(noise[None])[0], atol=1e-5)


# ---- the page ----------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags are closed in order and keeps what a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loaded, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.loaded += [v for k, v in attributes if k in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    html = path.read_text("utf-8")
    page = Page(html)
    assert "url(" not in html and "@import" not in html and "<script" not in html
    for source in page.loaded:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert max(image.size) <= 256
    return " ".join("".join(page.text).split()), len(page.loaded)


def test_the_program_writes_one_whole_page_of_the_first_step(tmp_path, monkeypatch, capsys):
    changes = {"class_data_dir": None, "train_batch_size": 5, "validation_inference_steps": 9}
    settings = runs.settings(tmp_path / "out", **changes)
    status, out, err = runs.program(monkeypatch, capsys, explain, *runs.arguments(settings))
    assert status == 0, err
    assert out.strip().endswith("explain.html: open it in a browser")
    found = runs.files(tmp_path / "out")
    assert {f for f in found if not f.startswith("class_images/")} == {"explain.html"}
    assert len(found) == 4
    text, pictures = read(tmp_path / "out" / "explain.html")
    # Four of five samples of each term: six pictures, and two levels of attention with their mean.
    assert pictures == 2 * 4 * 6 + 4 * 3 + 2 * 8 + 1
    assert text.count("… and 1 more.") == 2

    results = []
    config = runs.config(tmp_path / "run", **{**changes, "max_train_steps": 1})
    train.train(config, on_step=lambda step, result: results.append(result))
    [first] = results
    assert (
        f"loss: {first.loss:.4f} = {first.loss_instance:.4f} + 1 · {first.loss_prior:.4f}" in text
    )
    for loss in first.per_sample[:4]:
        assert f"Loss {loss:.4f}" in text


def test_training_explains_both_its_ends_and_is_not_changed_by_it(tmp_path):
    more = {"train_text_encoder": True, "snr_gamma": 5.0, "gradient_checkpointing": True}
    plain = train.train(runs.config(tmp_path / "plain", **more))
    looked = train.train(runs.config(tmp_path / "looked", explain=True, **more))
    for name, network in plain.networks.items():
        after = runs.flat(looked.networks[name].state_dict())
        assert torch.equal(runs.flat(network.state_dict()), after)
    only = runs.files(tmp_path / "looked") - runs.files(tmp_path / "plain")
    assert only == {"explain.html", "state/explain.pt"}
    text, _ = read(tmp_path / "looked" / "explain.html")
    assert "text_encoder.encoder.layers.0" in text
    assert "own weight" in text and "after 3 steps" in text


def losses(text: str) -> list[tuple[str, ...]]:
    """The page's sums, in its order: loss, instance, prior."""
    return re.findall(r"loss[ \w]*: (\d\.\d{4}) = (\d\.\d{4}) \+ 1 · (\d\.\d{4})", text)


def test_the_last_step_stands_beside_the_first_also_where_the_run_was_resumed(
    tmp_path, monkeypatch
):
    """Neither averages and gradients nor a step's CUDA graph are there while it is looked at."""
    seen, made, there, updates = [], [], [], []
    look, make_optimizer, one_update = microscope.look, prepare.make_optimizer, train.one_update

    def make(*given):
        made.append(make_optimizer(*given))
        return made[-1]

    def update_of(*given):
        update = one_update(*given)
        updates.append(weakref.ref(update))
        return update

    def looked(sd, *given, **more):
        gradients = [p.grad for p in sd.unet.parameters() if p.grad is not None]
        alive = [update for update in updates if update() is not None]
        there.append((len(made[-1].adam.state), len(gradients), len(alive)))
        return look(sd, *given, **more)

    monkeypatch.setattr(prepare, "make_optimizer", make)
    monkeypatch.setattr(train, "one_update", update_of)
    monkeypatch.setattr(microscope, "look", looked)
    run, more = tmp_path / "run", {"explain": True, "train_batch_size": 2}
    train.train(runs.config(run, **more), on_step=lambda _, result: seen.append(result))
    text, pictures = read(run / "explain.html")
    first, last = losses(text)
    assert first == tuple(
        f"{getattr(seen[0], k):.4f}" for k in ("loss", "loss_instance", "loss_prior")
    )
    # Of four samples eight pictures each; two rows of maps; two films.
    assert pictures == 4 * 8 + 2 * 2 * 3 + 2 * (2 * 2 + 1)

    trained = explain.explain(runs.config(tmp_path / "alone", model=str(run), **more))
    assert losses(read(trained)[0]) == [last] != [first]

    more |= {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    train.train(runs.config(run, **more))
    text, _ = read(run / "explain.html")
    assert "after 4 steps" in text and losses(text)[0] == first and losses(text)[1] != last
    assert there == [(0, 0, 0)] * 4 and len(updates) == 2


def test_a_kept_view_that_is_damaged_is_done_without(tmp_path):
    (tmp_path / "explain.pt").write_bytes(b"no longer whole")
    for name in ("explain.pt", "never kept"):
        with pytest.warns(UserWarning, match="shows the last step alone"):
            assert first_step.fetch(tmp_path / name) is None


def test_the_norms_of_all_blocks_together_are_those_of_all_weights():
    sd, (instance, prior, share, _), seen = look()
    flat = []
    for name in ("loss_instance", "loss_prior"):
        sd.unet.zero_grad()
        step = dreambooth.step(sd.unet, sd.schedule, instance, prior, share)
        (getattr(step, name) * (share if name == "loss_prior" else 1)).backward()
        flat.append(torch.cat([p.grad.flatten() for p in sd.unet.parameters()]))
    a, b = flat
    together = microscope.of_all(seen.gradients)
    assert together.instance == pytest.approx(a.norm().item(), rel=1e-4)
    assert together.prior == pytest.approx(b.norm().item(), rel=1e-4)
    assert together.both == pytest.approx((a + b).norm().item(), rel=1e-4)
    assert together.cosine == pytest.approx((a @ b / a.norm() / b.norm()).item(), abs=1e-4)


def test_pictures_are_reduced_to_what_the_page_shows():
    assert microscope.reduced(torch.full((2, 3, 512, 384), 0.5)).shape == (2, 3, 256, 192)
    small = torch.rand(1, 3, 64, 64)
    assert torch.equal(microscope.reduced(small), small)


def test_a_run_can_be_explained_afterwards_without_touching_it(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train.train(runs.config(run, prior_loss_weight=0.0, class_prompt=None))
    before = {f: (run / f).read_bytes() for f in runs.files(run)}
    given = ["--config", run / "config.json", "--seed", 5]
    status, _, err = runs.program(monkeypatch, capsys, explain, *given)
    assert status == 0, err
    assert runs.files(run) == {*before, "explain.html"}
    assert all((run / f).read_bytes() == data for f, data in before.items())
    text, _ = read(run / "explain.html")
    assert "seed 5" in text and "λ second" not in text


def test_a_prompt_that_names_nothing_is_explained_without_maps(tmp_path):
    path = explain.explain(runs.config(tmp_path, instance_prompt="a dog"))
    assert "No word of the prompt names the subject" in read(path)[0]


def test_what_is_wrong_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    settings = runs.settings(tmp_path / "out", instance_data_dir=tmp_path / "none")
    status, _, err = runs.program(monkeypatch, capsys, explain, *runs.arguments(settings))
    assert status == 2
    assert err.strip() == f"minibooth.explain: {tmp_path / 'none'} does not exist: " + (
        "give the folder that holds the photographs"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_without_a_model_or_photographs_it_says_what_to_give(model, monkeypatch, capsys):
    folder = peers.model(model)[0]
    status, _, err = runs.program(monkeypatch, capsys, explain, "--model", folder)
    assert status == 2
    assert "give --instance_data_dir" in err
