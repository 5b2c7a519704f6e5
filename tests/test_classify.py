"""The class noun by the model: the loss of each noun, the same draws for all, and who drops out."""

import functools
from types import SimpleNamespace

import peers
import pytest
import runs
import torch
from pages import ROOT
from safetensors.torch import save_file
from tiny import randn, rel

from minibooth import UserError, classify, load
from minibooth.classify import draw, losses, passes, rank
from minibooth.formats import hub
from minibooth.text_encoder import Condition

LATENTS = randn(3, 4, 8, 8, seed=1)  # of three photographs


def test_the_loss_is_the_equation_s(monkeypatch):
    """Against diffusers' UNet and betas, draw by draw: also in a batch that is not full."""
    monkeypatch.setattr(classify, "BATCH", 2)
    _, pipe = peers.model("half")
    sd, n = runs.model(), 3
    x0, eps, t = draw(LATENTS, 1000, 0, 0, n)
    c = sd.encode_prompt(["a dog"])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = []
    for x, e, k in zip(x0, eps, t, strict=True):
        alpha_bar = (1 - betas)[: k + 1].prod().float()
        x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * e
        with torch.no_grad():
            answer = pipe.unet(x_t[None], k, encoder_hidden_states=c).sample[0]
        expected.append(((answer - e) ** 2).mean())
    found = losses(sd, c, x0, eps, t)
    assert found.shape == (n,) and rel(found, torch.stack(expected)) < 1e-5
    assert not torch.equal(found, losses(sd, sd.encode(["a cat"]), x0, eps, t))


def test_photographs_come_by_turns_and_timesteps_are_evenly_spaced():
    x0, eps, t = draw(LATENTS, 1000, 7, 4, 5)
    assert [[torch.equal(x, y) for y in LATENTS].index(True) for x in x0] == [1, 2, 0, 1, 2]
    assert t.tolist() == [100, 300, 500, 700, 900] and t.dtype == torch.int64
    assert 0.9 < eps.std() < 1.1 and len({e.sum().item() for e in eps}) == 5
    _, later, _ = draw(LATENTS, 1000, 7, 6, 2)
    assert torch.equal(later, eps[2:4])  # a draw is a function of the seed and its number
    assert not torch.equal(draw(LATENTS, 1000, 8, 4, 5)[1], eps)


OFFSETS = {n: 0.01 * i for i, n in enumerate(("cat", "dog", "car", "tree", "bird", "fish", "hat"))}


@pytest.fixture
def known(monkeypatch):
    """A model whose loss is a noise's own, a hundred times any noun's, and the noun's offset."""
    seen = {}

    def encode(prompts):
        return Condition(torch.tensor([[[OFFSETS[p.split()[-1]]]] for p in prompts]))

    def known_losses(sd, c, x0, eps, t):
        c = c.context
        seen.setdefault(round(c.item(), 6), []).append((x0, eps, t))
        return eps[:, 0, 0, 0] + c.flatten() * (1 + eps[:, 0, 0, 1])

    schedule = SimpleNamespace(alpha_bar=torch.ones(1000))
    sd = SimpleNamespace(encode=encode, image_size=64, schedule=schedule)
    monkeypatch.setattr(classify, "losses", known_losses)
    monkeypatch.setattr(classify, "STAGES", ((40, 0.5), (60, 0.5), (100, 1.0)))
    return sd, seen


def test_every_noun_is_given_the_same_draws_and_the_worst_drop_out(known):
    sd, seen = known
    counted = []
    ranks = rank(sd, LATENTS, list(OFFSETS)[::-1], 0, counted.append)
    assert [r.noun for r in ranks] == list(OFFSETS)
    assert [r.draws for r in ranks] == [200, 200, 100, 100, 40, 40, 40]  # 7, then 4, then 2 nouns
    assert sum(counted) == passes(7) == 7 * 40 + 4 * 60 + 2 * 100
    for of_noun in seen.values():
        for mine, best in zip(of_noun, seen[0.0], strict=False):
            assert all(torch.equal(a, b) for a, b in zip(mine, best, strict=True))
    assert not torch.equal(seen[0.0][0][1], seen[0.0][1][1][:40])  # a stage's noises are new


def test_differences_and_their_errors_are_of_the_paired_draws(known):
    sd, seen = known
    ranks = {r.noun: r for r in rank(sd, LATENTS, list(OFFSETS))}
    noise = torch.cat([eps for _, eps, _ in seen[0.0]])[:, 0, 0, 1].double()
    for noun, r in ranks.items():
        mine = noise[: r.draws]
        assert abs(r.difference - OFFSETS[noun] * (1 + mine.mean().item())) < 1e-6
        deviation = ((mine - mine.mean()) ** 2).sum() / (r.draws - 1)
        assert abs(r.error - OFFSETS[noun] * (deviation / r.draws).sqrt().item()) < 1e-6
        assert not r.unsure  # although one draw's noise is a hundred times a noun's offset


def test_it_is_not_sure_where_two_standard_errors_reach_the_best(known, monkeypatch):
    sd, _ = known
    monkeypatch.setattr(classify, "STAGES", ((4, 1.0),))
    deviations = torch.tensor([-1.0, -1.0, 1.0, 1.0])  # the standard error: √(4/3) / 2 = .577
    for ahead, best, other in ((0.0, *"cd"), (1.15, *"cd"), (1.16, *"cd"), (-1.15, *"dc")):
        of = {0.0: torch.zeros(4), 0.01: deviations + ahead}  # cat's, and dog's
        monkeypatch.setattr(
            classify, "losses", lambda sd, c, *_, of=of: of[round(c.context.item(), 2)]
        )
        ranks = rank(sd, LATENTS, ["cat", "dog"])
        assert [r.noun[0] for r in ranks] == [best, other] and not ranks[0].unsure
        assert ranks[1].unsure is (ahead < 1.155)
        second = classify.told(ranks).split("\n")[1]
        assert second.startswith(f"not sure: it could be {ranks[1].noun},") is ranks[1].unsure


@pytest.fixture(scope="module")
def loaded():
    return functools.cache(lambda source, **_: load(source))


@pytest.fixture
def toybox(monkeypatch, loaded):
    """Read once for all programs here."""
    monkeypatch.setattr(classify.pipeline, "load", loaded)
    return loaded


def test_the_program_s_first_line_is_the_noun_alone(monkeypatch, capsys, toybox):
    """Of the toybox and its dog, by a few draws."""
    monkeypatch.setattr(classify, "STAGES", ((2, 0.25), (2, 1.0)))
    status, out, err = runs.program(monkeypatch, capsys, classify, "--device", "cpu")
    lines = out.splitlines()
    assert status == 0 and lines[0] == "dog" and len(lines) in (12, 13)
    assert "10 nouns, 26 passes of the UNet\n" in err
    assert '--instance_prompt "a sks dog" --class_prompt "a dog"' in err.splitlines()[-1]


def test_what_it_takes_for_all_nouns_is_what_the_manual_says():
    text = (ROOT / "docs" / "guide.md").read_text("utf-8")
    assert f"in {passes(len(classify.NOUNS)):,} passes of the UNet" in text
    assert len(set(classify.NOUNS)) == len(classify.NOUNS)


def test_nouns_of_many_pieces_are_nouns(monkeypatch, capsys, toybox):
    monkeypatch.setattr(classify, "STAGES", ((2, 1.0),))
    given = ["--device", "cpu", "--nouns", "ichthyosauriforme, red  fish,Red Fish,"]
    status, out, err = runs.program(monkeypatch, capsys, classify, *given)
    assert len(toybox("toybox").tokenizer.pieces("ichthyosauriforme")) >= 10
    assert status == 0 and "2 nouns, 4 passes" in err
    prompt = {"ichthyosauriforme": '"an ichthyosauriforme"', "red fish": '"a red fish"'}
    assert err.rstrip().endswith(f"--class_prompt {prompt[out.splitlines()[0]]}")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"photos": "empty"}, "holds no image file"),
        ({"nouns": "dog, Dog"}, '--nouns "dog, Dog": give two at least'),
        ({"nouns": ""}, "--nouns is empty"),
        ({"model": "lora.safetensors"}, "is a LoRA"),
        ({"model": None}, "give --model"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(tmp_path, monkeypatch, capsys, options, said):
    (tmp_path / "empty").mkdir()
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 8)}, tmp_path / "lora.safetensors")
    monkeypatch.chdir(tmp_path)
    given = {"model": "toybox", "photos": hub.toybox() / "subjects" / "spotted_dog"} | options
    arguments = runs.arguments(given)
    status, out, err = runs.program(monkeypatch, capsys, classify, *arguments)
    assert status == 2 and out == "" and err.count("\n") == 1 and said in err


def test_training_without_a_class_prompt_says_who_finds_it(tmp_path):
    with pytest.raises(UserError, match=r'give --class_prompt \("a dog"; minibooth\.classify'):
        runs.config(tmp_path / "out", class_prompt=None).check()
