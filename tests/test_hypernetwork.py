"""Hypernetworks: against diffusers with keys and values from the formula; their files; a run."""

import collections
import contextlib
import copy
import dataclasses
import functools
import re
from unittest import mock

import numpy as np
import peers
import pytest
import runs
import tiny
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image

from minibooth import (
    UserError,
    convert,
    dreambooth,
    hypernetwork,
    load,
    pipeline,
    sample,
    train,
)
from minibooth.bench import models
from minibooth.device import graphs
from minibooth.evaluate import drawing, protocol
from minibooth.evaluate.options import Options
from minibooth.formats import adapters, hypernetworks
from minibooth.formats.tensor_files import read_tensors
from minibooth.hypernetwork import Form
from minibooth.schedule import Schedule
from minibooth.training import data, plan, report
from minibooth.training.settings import TrainConfig
from minibooth.unet import UNet

SCHEDULE = Schedule.from_config(tiny.scheduler_config())
SMALL = tiny.unet_config("three levels of one layer")  # its pixels are 24 and 16 wide, its text 24
WIDTHS = [16, 24, 40]


@functools.cache
def kept(text=40):
    return tiny.randomize(UNet(SMALL | {"cross_attention_dim": text})).requires_grad_(False)


def unet(text=40):
    return copy.deepcopy(kept(text))


def trained(network, form=None, wanted=()):
    """As training leaves it: no weight is zero."""
    made = hypernetwork.create(network, wanted, form)
    for i, p in enumerate(made.parameters()):
        p.data = tiny.randn(*p.shape, seed=i) * (0.5 / p.shape[-1] ** 0.5)
    return made


def inputs(seed=1, text=40):
    x, c = tiny.randn(2, 4, 8, 8, seed=seed), tiny.randn(2, 77, text, seed=seed + 1)
    return x, torch.tensor([3, 700]), c


# ---- against the formula ----------------------------------------------------------------------


class Written:
    """Attention of diffusers with k and v from the formula, written out."""

    def __init__(self, tensors, strength, activation):
        self.tensors, self.strength, self.activation = tensors, strength, activation

    def f(self, c, d, which):
        weights = [p for name, p in self.tensors.items() if name.startswith(f"pairs.{d}.{which}.")]
        y = c
        for i in range(0, len(weights), 2):
            y = torch.einsum("bnc,oc->bno", y, weights[i]) + weights[i + 1]
            y = self.activation(y) if i < len(weights) - 2 else y
        return c + self.strength * y

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        x = hidden_states
        c = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(x), c, c
        if any(name.startswith(f"pairs.{c.shape[-1]}.") for name in self.tensors):
            k, v = (self.f(c, c.shape[-1], which) for which in "kv")
        q, k, v = (
            y.unflatten(-1, (attn.heads, -1)) for y in (q, attn.to_k(k), attn.to_v(v))
        )  # (B, N, heads, d)
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
        y = torch.einsum("bhnm,bmhd->bnhd", weights.softmax(-1), v).flatten(2)
        return attn.to_out[0](y)


@pytest.mark.parametrize(
    "text, form, wanted, activation",
    [
        (24, Form(), (), lambda y: y),  # text and pixels of one width share a pair
        (40, Form((1, 0.5, 2, 1), "swish"), (), lambda y: y * (y + 3).clamp(0, 6) / 6),
        (40, Form(activation="relu"), (40, 16), lambda y: y.clamp(min=0)),  # 24 passes as it is
    ],
)
def test_loss_and_gradients_of_a_step_equal_those_of_diffusers_with_the_formula(
    text, form, wanted, activation
):
    ours = unet(text)
    peer = UNet2DConditionModel.from_config(SMALL | {"cross_attention_dim": text})
    peer.requires_grad_(False).load_state_dict(ours.state_dict())
    made = trained(ours, form, wanted)
    theirs = {k: p.detach().clone().requires_grad_() for k, p in made.named_parameters()}
    peer.set_attn_processor(Written(theirs, 0.7, activation))
    hypernetwork.attach(ours, made, 0.7)
    terms = [
        dreambooth.Term(x, tiny.randn(2, 4, 8, 8, seed=9), t, c)
        for x, t, c in (inputs(10, text), inputs(20, text))
    ]
    step, other = (
        dreambooth.step(network, SCHEDULE, *terms, prior_loss_weight=0.7)
        for network in (ours, lambda x, t, c: peer(x, t, c).sample)
    )
    assert torch.allclose(step.loss, other.loss, rtol=1e-5)
    (step.loss + other.loss).backward()
    for name, p in made.named_parameters():
        if name.endswith("weight") or ".v." in name:  # what is added to all keys alike does nothing
            assert tiny.rel(p.grad, theirs[name].grad) < 1e-4, name
    plain = dreambooth.step(kept(text), SCHEDULE, *terms, prior_loss_weight=0.7)
    assert tiny.rel(step.prediction, plain.prediction) > 0.01


# ---- where it starts, and when it is taken away ------------------------------------------------


def test_training_starts_from_the_model_itself_or_where_a1111_does():
    network = unet()
    want = network(*inputs())
    ours = hypernetwork.create(network, seed=5)
    theirs = hypernetwork.create(network, start="normal", seed=5)
    for made, same in ((ours, True), (theirs, False)):
        hypernetwork.attach(network, made)
        assert torch.equal(network(*inputs()), want) == same
        hypernetwork.detach(network)
        assert torch.equal(network(*inputs()), want)
        assert list(made.pairs) == ["16", "24", "40"]
    for d, pair in ours.pairs.items():
        for f in (pair.k, pair.v):
            first, last = f
            assert not first.bias.any() and not last.weight.any() and not last.bias.any()
            assert 0.9 * int(d) ** -0.5 < first.weight.abs().max() <= int(d) ** -0.5
    weights = [p for p in theirs.parameters() if p.ndim == 2]
    assert torch.cat([p.flatten() for p in weights]).std().item() == pytest.approx(0.01, rel=0.03)
    assert not any(p.any() for p in theirs.parameters() if p.ndim == 1)
    again, other = (hypernetwork.create(network, seed=seed) for seed in (5, 6))
    first, same, another = (x.pairs["16"].k[0].weight for x in (ours, again, other))
    assert torch.equal(first, same) and not torch.equal(first, another)
    assert not torch.equal(first, ours.pairs["16"].v[0].weight)


def test_strength_0_is_the_model_bit_for_bit_and_the_network_is_saved_as_ever():
    network, made = unet(), trained(unet())
    want = network(*inputs())
    hypernetwork.attach(network, made, 0.0)
    assert torch.equal(network(*inputs()), want)
    assert network.state_dict().keys() == kept().state_dict().keys()
    hypernetwork.attach(network, made)
    assert tiny.rel(network(*inputs()), want) > 0.01


def test_numbers_of_the_public_models():
    """As AUTOMATIC1111's files have them."""
    with torch.device("meta"):
        for kind, numbers in (("SD 1.5", 21_939_840), ("SD 2.1", 25_611_392)):
            network = UNet(tiny.unet_config(kind))
            made = hypernetwork.Hypernetwork(Form(), hypernetwork.widths(network))
            assert sum(p.numel() for p in made.parameters()) == numbers
            of_text = made.pairs["768" if kind == "SD 1.5" else "1024"].parameters()
            assert (
                sum(p.numel() for p in of_text) == {"SD 1.5": 4_723_200, "SD 2.1": 8_394_752}[kind]
            )


@torch.no_grad()
def test_where_the_text_is_projected_once_it_is_shifted_once():
    """And the pixels at every step: as without, and as in what a CUDA graph replays."""
    network, made, count = unet(), trained(unet()), collections.Counter()
    hypernetwork.attach(network, made)
    for d, pair in made.pairs.items():
        pair.k.register_forward_hook(lambda *_, d=d: count.update([d]))
    (x, t, c), want = inputs(), None
    for context in (contextlib.nullcontext, pipeline.projected_once, plainly_replayed):
        count.clear()
        with context(network):
            got = [network(x, t - step, c) for step in range(3)]
        if want is None:
            want = got
            assert count == {"16": 3 * 4, "24": 3 * 3, "40": 3 * 7}
        else:
            assert count == {"16": 3 * 4, "24": 3 * 3, "40": 7}
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def plainly_replayed(network):
    return graphs.replayed(network, lambda function: function)


def test_of_several_the_first_one_given_comes_first(tmp_path):
    network, first, second = unet(), trained(unet()), trained(unet(), Form(activation="tanh"))
    hypernetworks.write(tmp_path / "a.pt", first)
    hypernetworks.write(tmp_path / "b.pt", second)
    hypernetworks.attach_files(network, [str(tmp_path / "a.pt"), f"{tmp_path / 'b.pt'}:0.5"])
    layer = network.mid_block.attentions[0].transformer_blocks[0].attn2
    c = tiny.randn(1, 77, 40)
    for project, which in ((layer.to_k, "k"), (layer.to_v, "v")):
        f, g = (getattr(x.pairs["40"], which) for x in (first, second))
        y = c + f(c)
        want = F.linear(y + 0.5 * g(y), project.weight)
        assert tiny.rel(project(c), want) < 1e-6


# ---- files -------------------------------------------------------------------------------------


def test_a_file_is_as_a1111_writes_it(tmp_path):
    made = trained(unet(), Form(activation="relu"))
    hypernetworks.write(tmp_path / "my-dog.pt", made, torch.float16, {"step": 7})
    held = torch.load(tmp_path / "my-dog.pt", weights_only=True)
    assert [key for key in held if isinstance(key, int)] == WIDTHS
    words = {key: x for key, x in held.items() if isinstance(key, str)}
    assert words == {
        "step": 7,
        "name": "my-dog",
        "layer_structure": [1, 2, 1],
        "activation_func": "relu",
        "is_layer_norm": False,
        "weight_initialization": "Normal",
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "activate_output": False,
        "use_dropout": False,
        "dropout_structure": [0, 0, 0],
        "last_layer_dropout": False,
        "optional_info": None,
    }
    for d in WIDTHS:
        assert type(held[d]) is tuple and len(held[d]) == 2
        for state, f in zip(held[d], (made.pairs[str(d)].k, made.pairs[str(d)].v), strict=True):
            shapes = {"linear.0.weight": (2 * d, d), "linear.0.bias": (2 * d,)}
            shapes |= {"linear.2.weight": (d, 2 * d), "linear.2.bias": (d,)}
            assert {key: tuple(x.shape) for key, x in state.items()} == shapes
            assert torch.equal(state["linear.2.weight"], f[2].weight.half())
    linear = trained(unet())
    hypernetworks.write(tmp_path / "linear.pt", linear)
    [k, _] = torch.load(tmp_path / "linear.pt", weights_only=True)[24]
    assert list(k) == [f"linear.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")]
    again = hypernetworks.read(tmp_path / "linear.pt", unet())
    for a, b in zip(again.parameters(), linear.parameters(), strict=True):
        assert torch.equal(a, b)


def stored(d, sizes, seed=0, first=0, stride=1, norm=False):
    """The weights of f as a file of others has them."""
    out = {}
    for i in range(len(sizes) - 1):
        number = first + stride * i
        out[f"linear.{number}.weight"] = tiny.randn(sizes[i + 1], sizes[i], seed=seed + i) / 4
        out[f"linear.{number}.bias"] = tiny.randn(sizes[i + 1], seed=seed + 50 + i)
        if norm:
            out[f"linear.{number + 1}.weight"] = tiny.randn(sizes[i + 1], seed=seed + 70 + i)
            out[f"linear.{number + 1}.bias"] = tiny.randn(sizes[i + 1], seed=seed + 90 + i)
    return out


def computed(state, c, activation, last, norm=False):
    """f(c) of `stored`, layer by layer as AUTOMATIC1111 puts them together."""
    tensors, y = list(state.values()), c
    step = 4 if norm else 2
    for i in range(0, len(tensors), step):
        y = y @ tensors[i].T + tensors[i + 1]
        y = activation(y) if last or i < len(tensors) - step else y
        if norm:
            y = (y - y.mean(-1, keepdim=True)) / (
                y.var(-1, correction=0, keepdim=True) + 1e-5
            ).sqrt()
            y = y * tensors[i + 2] + tensors[i + 3]
    return y


def elu(y):
    return torch.where(y > 0, y, y.exp() - 1)


@pytest.mark.parametrize(
    "words, given, activation, last",
    [
        # Files that lack the key have the activation after the last layer, too.
        ({"activation_func": "elu"}, {"stride": 2}, elu, True),
        ({"activation_func": "elu", "activate_output": False}, {"stride": 2}, elu, False),
        ({"layer_structure": [1, 2, 0.5, 1]}, {"sizes": (24, 48, 12, 24)}, lambda y: y, False),
        (
            {"activation_func": "tanh", "is_layer_norm": True, "activate_output": False},
            {"stride": 3, "norm": True},
            torch.tanh,
            False,
        ),
        # Dropout counts as a layer: Linear, activation, Dropout.
        (
            {"activation_func": "relu", "activate_output": False, "use_dropout": True}
            | {"dropout_structure": [0, 0.3, 0], "layer_structure": [1, 2, 1]},
            {"stride": 3},
            torch.relu,
            False,
        ),
    ],
)
def test_files_of_others_mean_what_they_do_there(words, given, activation, last, tmp_path):
    given = {"sizes": (24, 48, 24)} | given
    pair = tuple(stored(24, seed=seed, **given) for seed in (0, 7))
    torch.save({24: pair, "step": 3, "name": "x", **words}, tmp_path / "x.pt")
    made = hypernetworks.read(tmp_path / "x.pt", unet())
    c, norm = tiny.randn(2, 5, 24), given.get("norm", False)
    for f, state in zip((made.pairs["24"].k, made.pairs["24"].v), pair, strict=True):
        assert tiny.rel(f(c), computed(state, c, activation, last, norm)) < 1e-6


def test_novelais_first_files_are_read(tmp_path):
    """Only whole numbers as keys, the pairs as lists; in 16 bits, as they go round."""
    pair = [stored(24, (24, 48, 24), seed=seed, first=1) for seed in (0, 7)]
    old = [{k.replace("linear.", "linear"): x.half() for k, x in s.items()} for s in pair]
    torch.save({24: old}, tmp_path / "anime.pt", _use_new_zipfile_serialization=False)
    made = hypernetworks.read(tmp_path / "anime.pt", unet())
    c = tiny.randn(2, 5, 24)
    for f, state in zip((made.pairs["24"].k, made.pairs["24"].v), pair, strict=True):
        assert f[0].weight.dtype == torch.float32
        assert tiny.rel(f(c), computed(state, c, lambda y: y, False)) < 1e-3


class Evil:
    def __reduce__(self):
        return print, ("pwned",)


GOOD = stored(24, (24, 48, 24))


@pytest.mark.parametrize(
    "held, said",
    [
        ({768: (GOOD, GOOD)}, "attention reads 768 numbers, but 16, 24, 40"),
        ({24: (GOOD, GOOD), 1024: (GOOD, GOOD)}, "reads 1024 numbers"),
        ({"a": torch.zeros(1)}, "is no hypernetwork"),
        ([1, 2], "is no hypernetwork"),
        ({24: (GOOD, stored(24, (24, 40, 24)))}, "damaged: its layers for 24"),
        ({24: (GOOD, GOOD), "layer_structure": [1, 2, 2, 1]}, "damaged: its layers for 24"),
        ({24: (GOOD, GOOD), "layer_structure": [2, 1]}, "layer structure 2,1: give numbers"),
        ({24: (GOOD, GOOD), "layer_structure": [1, "x", 1]}, "is damaged"),
        ({24: (GOOD, GOOD), "activation_func": "prelu"}, "activation 'prelu' is none of linear"),
        ({24: (GOOD,)}, "is damaged"),
        ({24: (GOOD, {"x": torch.zeros(1)})}, "is damaged"),
        ({24: (GOOD, GOOD), "optional_info": Evil()}, "wants to run code"),
    ],
)
def test_what_does_not_fit_is_refused(held, said, tmp_path, capsys):
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "x.pt"))) as error:
        hypernetworks.read(tmp_path / "x.pt", unet())
    assert said in str(error.value) and "pwned" not in capsys.readouterr().out


def test_whoever_wants_other_weights_is_told_what_it_is(tmp_path):
    hypernetworks.write(tmp_path / "x.pt", trained(unet()))
    for given in (
        lambda: read_tensors(tmp_path / "x.pt"),
        lambda: load(tmp_path / "x.pt"),
        lambda: load(tmp_path),
        lambda: adapters.read_embedding(tmp_path / "x.pt"),
    ):
        with pytest.raises(UserError, match=r"is a hypernetwork.*cannot be merged.*--hyper"):
            given()
    for place, said in ((tmp_path / "none", "no such file"), (tmp_path.parent, "0 files .pt")):
        with pytest.raises(UserError, match=said):
            hypernetworks.find(place)


def test_a_width_or_structure_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="attention reads 768 numbers, but 16, 24, 40"):
        hypernetwork.create(unet(), [16, 768])
    for structure in ((), (1,), (1, 2), (2, 1), (1, 0, 1), (1, -1, 1), (1, float("nan"), 1)):
        with pytest.raises(UserError, match="begin and end with 1"):
            Form(structure)


# ---- a run -------------------------------------------------------------------------------------

RUN = {"method": "hypernetwork", "learning_rate": 0.02, "activation_func": "relu", "kind": "half"}


def run(folder, **changes):
    sd = runs.model("half")
    train.train(runs.config(folder, **RUN | changes), sd)
    return sd


def of_run(folder):
    [file] = folder.glob("*.pt")
    return torch.load(file, weights_only=True)


def numbers(held):
    return torch.cat(
        [x.flatten() for d in held if type(d) is int for f in held[d] for x in f.values()]
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "my-dog"
    return folder, run(folder, max_train_steps=4, checkpointing_steps=2, explain=True)


def test_weights_stay_and_the_file_draws_what_the_run_drew(whole, monkeypatch, capsys, tmp_path):
    folder, sd = whole
    base = runs.model("half")
    for name, network in sd.networks.items():
        assert torch.equal(
            runs.flat(network.state_dict()), runs.flat(base.networks[name].state_dict())
        )
    held = of_run(folder)
    assert (held["name"], held["step"], held["activation_func"]) == ("my-dog", 4, "relu")
    assert held["sd_checkpoint_name"] == peers.model("half")[0].name
    assert held["weight_initialization"] == "zero" and numbers(held).dtype == torch.float32
    snapshot = torch.load(folder / "checkpoint-2" / "my-dog-2.pt", weights_only=True)
    assert snapshot["step"] == 2 and numbers(snapshot).dtype == torch.float16
    assert "pairs.64" in (folder / "explain.html").read_text("utf-8")
    given = ["--model", peers.model("half")[0], "--prompt", "a sks dog", "--num_images", 1]
    given += ["--steps", 2, "--device", "cpu", "--output_dir"]
    drawn = []
    for name in (f"{folder}:0", folder / "my-dog.pt"):
        out = tmp_path / str(len(drawn))
        status, _, err = runs.program(
            monkeypatch, capsys, sample, *given, out, "--hypernetwork", name
        )
        assert status == 0, err
        with Image.open(out / "a-sks-dog-0.png") as image:
            drawn.append((np.asarray(image, int), image.text["hypernetwork"]))
    (none, name), (all_of_it, of_file) = drawn
    assert (name, of_file) == ("my-dog:0", "my-dog.pt")
    plain, wanted = (np.asarray(x.generate(["a sks dog"], steps=2)[0], int) for x in (base, sd))
    assert (none == plain).all() and abs(all_of_it - wanted).max() <= 1
    assert abs(plain - all_of_it).max() > 10


def test_a_run_that_goes_on_ends_with_equal_bits(whole, tmp_path):
    folder, _ = whole
    run(tmp_path / "my-dog", max_train_steps=2)
    run(tmp_path / "my-dog", max_train_steps=4, resume_from_checkpoint="latest")
    assert torch.equal(numbers(of_run(tmp_path / "my-dog")), numbers(of_run(folder)))
    with pytest.raises(UserError, match="activation_func was 'relu' and is 'linear'"):
        more = {"max_train_steps": 9, "resume_from_checkpoint": "latest"}
        run(tmp_path / "my-dog", activation_func="linear", **more)


def test_the_loss_falls_also_checkpointed_and_is_the_same_in_16_bits(tmp_path):
    """Of one batch that comes again and again, which is little to learn."""
    draw, found = data.Batches.draw, []
    with mock.patch.object(data.Batches, "draw", lambda self, n: draw(self, 0)):
        for changes in ({"max_train_steps": 8}, {"max_train_steps": 1, "mixed_precision": "bf16"}):
            folder = tmp_path / str(len(found))
            run(folder, prior_loss_weight=0.0, gradient_checkpointing=True, **changes)
            found.append([row[1] for row in report.read_losses(folder / "loss.csv")])
    assert found[0][-1] < 0.9 * found[0][0]
    assert found[1][0] == pytest.approx(found[0][0], rel=0.02)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"hypernetwork_sizes": "a"}, "--hypernetwork_sizes 'a': give numbers"),
        ({"layer_structure": "1,2"}, "layer structure 1,2: give numbers that begin and end with 1"),
        ({"activation_func": "prelu"}, "--activation_func 'prelu': give one of linear"),
        ({"train_text_encoder": True}, "no --train_text_encoder"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)):
        runs.config(tmp_path / "out", **RUN | changes).check()


def test_a_width_that_the_model_has_not_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="attention reads 768 numbers, but 32, 64"):
        run(tmp_path / "out", hypernetwork_sizes="64,768")
    assert not (tmp_path / "out").exists()


def test_a_run_s_folder_is_no_model_and_cannot_be_merged(whole, monkeypatch, capsys, tmp_path):
    folder, _ = whole
    out = ["--output", tmp_path / "x.safetensors"]
    base = ["--model", peers.model("half")[0], *out]
    for given in (
        ["--model", folder, *out],
        [*base, "--merge_lora", folder],
        [*base, "--merge_lora", folder / "my-dog.pt"],
        [*base, "--hypernetwork", folder],
    ):
        status, _, err = runs.program(monkeypatch, capsys, convert, *given)
        assert status == 2 and "cannot be merged into weights" in err, err


def test_what_is_evaluated_is_the_model_with_it(whole):
    folder, sd = whole
    options = Options(device="cpu")
    found = drawing.load_model(folder, options, str(peers.model("half")[0]))
    draw = {"steps": 2, "output": "latent"}
    want = sd.generate(["a sks dog"], **draw)
    torch.testing.assert_close(found.generate(["a sks dog"], **draw), want)
    assert protocol.BY_METHOD["hypernetwork"].prior


def test_the_plan_counts_what_trains():
    sd = models.model("SD 1.5", torch.device("meta"))
    config = TrainConfig(method="hypernetwork")
    part = plan.parts(sd, config, 64 * 64, half=True)
    frozen = sum(p.numel() for p in sd.unet.parameters())
    assert part["weights"] == 2 * frozen + 4 * 21_939_840
    assert part["averages"] == 8 * 21_939_840 and part["gradients"] == 4 * 21_939_840
    short = dataclasses.replace(config, hypernetwork_sizes="768,320")
    assert sum(p.numel() for p in plan.trainable(sd, short)) == 4_723_200 + 821_120
