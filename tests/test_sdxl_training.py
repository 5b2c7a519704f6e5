"""Training SDXL, against loops written with diffusers, transformers, peft and torch's own AdamW."""

import csv
import functools
import re
import shlex

import diffusers
import peers
import pytest
import runs
import torch
import torch.nn.functional as F
from PIL import Image
from test_lora import assert_same_gradients, peft_twin
from test_lora import trained as adapters_of
from tiny import randn, rel

from minibooth import dreambooth, load, lora, textual_inversion, train
from minibooth.formats import adapters
from minibooth.text_encoder import Condition
from minibooth.training import class_images, photos, prepare, report
from minibooth.training.data import pick, rng
from minibooth.training.start import Run

WHOLE = [32, 32, 0, 0, 32, 32]
# Of runs.photographs(), crop by crop: (height, width) as it came, (top, left) of the crop, its own.
SIZES = [WHOLE, *([32, 52, 0, left, 32, 32] for left in (0, 10, 20)), [48, 48, 0, 0, 32, 32]]
PHOTO = [0, 1, 1, 1, 2]
# What is shown to nobody: of the first text encoder the last layer and the norm behind it.
UNREAD = ("encoder.layers.2.", "final_layer_norm.")


def config(folder, **changes):
    changes = {"max_train_steps": 2, "train_batch_size": 3, "max_grad_norm": 0.3} | changes
    return runs.config(folder, kind="sdxl", num_class_images=2, **changes)


def drawn_images(config):
    sd, [subject] = load(config.model), config.subjects
    return class_images.ensure(sd, class_images.find(config, subject, 32, sd.fingerprint()))


def peer():
    """A pipeline whose networks can be trained."""
    pipe = peers.sdxl()
    pipe.tokenizer, pipe.tokenizer_2 = (
        getattr(peers.model("sdxl")[1], name) for name in ("tokenizer", "tokenizer_2")
    )
    return pipe


def independent_loop(config, pipe, weights):
    """Train `weights`, by rate, in a peer as `config` says. Only the draws are minibooth's. The
    losses of all steps and the last norm of the gradients."""
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    groups = [{"params": of_it, "lr": rate} for rate, of_it in weights]
    adam = torch.optim.AdamW(groups, weight_decay=0.01, foreach=False, fused=False)
    data = {"instance": (config.instance_data_dir, SIZES, PHOTO, config.instance_prompt)}
    data["class"] = drawn_images(config), [WHOLE] * 2, [0, 1], config.class_prompt
    losses = []
    for n in range(config.max_train_steps):
        parts, targets = [], []
        for name, (files, sizes, photo, prompt) in data.items():
            images = photos.load_photos(files, 32).images
            with torch.no_grad():
                found = pipe.vae.encode(images).latent_dist
            of_photo = functools.partial(pick, seed=config.seed, name=name, n=n, batch=3)
            rows = of_photo(type("Latents", (), {"photo": torch.tensor(photo)}))
            g = rng(config.seed, name, "noise", n)
            shape = (3, *found.mean.shape[1:])
            x0 = 0.13025 * (found.mean[rows] + found.std[rows] * torch.randn(shape, generator=g))
            eps = torch.randn(shape, generator=g)
            t = torch.randint(1000, (3,), generator=g)
            context, _, pooled, _ = pipe.encode_prompt(
                [prompt] * 3, do_classifier_free_guidance=False
            )
            told = torch.tensor([sizes[row] for row in rows])
            parts.append((scheduler.add_noise(x0, eps, t), t, context, pooled, told))
            targets.append(eps)
        loss = 0
        for (noisy, t, context, pooled, sizes), eps in zip(parts, targets, strict=True):
            added = {"text_embeds": pooled, "time_ids": sizes}
            loss = loss + F.mse_loss(
                pipe.unet(noisy, t, context, added_cond_kwargs=added).sample, eps
            )
        loss.backward()
        losses.append(loss.item())
        trained = [p for _, of_it in weights for p in of_it]
        norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        adam.step()
        adam.zero_grad()
    return losses, norm.item()


def rows_of(folder):
    with open(folder / "loss.csv") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def assert_same_losses(folder, wanted, losses, norm):
    assert norm > wanted.max_grad_norm  # so that clipping does something
    rows = rows_of(folder)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert rows[-1]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def encoder_weights(pipe):
    return [*pipe.text_encoder.parameters(), *pipe.text_encoder_2.parameters()]


def test_all_weights_of_unet_and_both_encoders_equal_an_independent_loop(tmp_path):
    """At batch 3 with prior preservation: each sample has its own text, sizes and picture."""
    wanted = config(tmp_path, train_text_encoder=True)
    sd, pipe = runs.model("sdxl"), peer()
    names = ("unet", "text_encoder", "text_encoder_2")
    start = {name: runs.flat(sd.networks[name].state_dict()) for name in names}
    last = {k: v.clone() for k, v in sd.text_encoder.state_dict().items() if k.startswith(UNREAD)}
    train.train(wanted, sd)
    groups = [(1e-3, list(pipe.unet.parameters())), (5e-4, encoder_weights(pipe))]
    assert_same_losses(tmp_path, wanted, *independent_loop(wanted, pipe, groups))
    for name in names:
        moved = runs.flat(sd.networks[name].state_dict()) - start[name]
        expected = runs.flat(peers.tensors(getattr(pipe, name))) - start[name]
        assert (moved - expected).norm() / expected.norm() < 3e-4, name
    assert len(last) == 18
    for key, before in last.items():
        assert torch.equal(sd.text_encoder.state_dict()[key], before), key


def test_a_lora_of_all_three_networks_equals_pefts(tmp_path, monkeypatch):
    changes = {"method": "lora", "rank": 3, "lora_alpha": 5.0, "max_grad_norm": 0.03}
    changes |= {"max_train_steps": 1}
    wanted = config(tmp_path, train_text_encoder=True, **changes)
    sd, pipe, kept = runs.model("sdxl"), peer(), {}
    write = train.methods.write
    monkeypatch.setattr(train.methods, "write", lambda *a: kept.update(a[2]) or write(*a))
    fresh = {
        name: lora.create(sd.networks[name], 3, 5.0, seed=wanted.seed)
        for name in ("unet", "text_encoder", "text_encoder_2")
    }
    groups = []
    for name, of_it in fresh.items():
        module = getattr(pipe, name)
        twin = peft_twin(getattr(module, "text_model", module), sd.networks[name], of_it, None)
        rate = 1e-3 if name == "unet" else 5e-4
        groups.append((rate, [p for p in twin.parameters() if p.requires_grad]))
    train.train(wanted, sd)
    assert_same_losses(tmp_path, wanted, *independent_loop(wanted, pipe, groups))
    for name, of_it in kept.items():
        module = getattr(pipe, name)
        for a in of_it.values():
            theirs = getattr(module, "text_model", module).get_submodule(a.layer)
            for ours, half in ((a.A, "lora_A"), (a.B, "lora_B")):
                weight = getattr(theirs, half)["default"].weight
                torch.testing.assert_close(ours, weight, rtol=2e-3, atol=2e-5)
            unread = name == "text_encoder" and a.layer.startswith(UNREAD)
            assert a.B.any() != unread  # in the file it is all the same, as in others'


def test_losses_and_gradients_of_a_lora_step_equal_diffusers_with_peft():
    folder, _ = peers.model("sdxl")
    ours, theirs = load(folder).unet.requires_grad_(False), peers.sdxl().unet
    adapters = adapters_of(ours, "transformers")
    peft_twin(theirs, ours, adapters, "transformers")
    lora.attach(ours, adapters)
    terms = [
        dreambooth.Term(
            randn(2, 4, 16, 16, seed=seed),
            randn(2, 4, 16, 16, seed=seed + 1),
            torch.tensor([seed, 900 - seed]),
            Condition(
                randn(2, 77, 80, seed=seed + 2),
                randn(2, 24, seed=seed + 3),
                torch.tensor([[480, 640, 0, seed, 32, 32], WHOLE]),
            ),
        )
        for seed in (10, 20)
    ]
    schedule = load(folder).schedule

    def diffusers_unet(x, t, c):
        added = {"text_embeds": c.pooled, "time_ids": c.sizes}
        return theirs(x, t, c.context, added_cond_kwargs=added).sample

    step, peer_step = (
        dreambooth.step(unet, schedule, *terms, prior_loss_weight=0.7)
        for unet in (ours, diffusers_unet)
    )
    for name in ("loss", "loss_instance", "loss_prior"):
        assert rel(getattr(step, name), getattr(peer_step, name)) < 1e-5
    step.loss.backward()
    peer_step.loss.backward()
    assert_same_gradients(adapters, theirs)


# ---- text, sizes and picture together ----------------------------------------------------------


@pytest.fixture
def captioned(tmp_path):
    """Photographs that have a caption each and are of one brightness each."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i, (size, text) in enumerate([((40, 32), "a"), ((32, 60), "the"), ((32, 32), "in")]):
        Image.new("RGB", size, (80 * i, 80 * i, 80 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{text} sks dog")
    return folder


def test_each_sample_of_a_batch_has_its_own_text_sizes_and_picture(
    captioned, tmp_path, monkeypatch
):
    """At batch 3 with prior preservation, where the usual script gives the second photograph the
    class's text, and class images the sizes of a photograph."""
    changes = {"instance_data_dir": str(captioned), "caption_extension": ".txt"}
    sd = runs.model("sdxl")
    encode = sd.vae.encode
    monkeypatch.setattr(sd.vae, "encode", lambda x: (encode(x)[0], torch.zeros_like(encode(x)[1])))
    run = Run(config(tmp_path / "out", **changes, random_flip=True), sd, torch.device("cpu"))
    batches, loss, _ = prepare.gather(run)
    texts = [f"{word} sks dog" for word in ("a", "the", "in")]
    text, of_class = sd.encode(texts), sd.encode(["a dog"])
    files = [captioned / f"{i}.png" for i in range(3)]
    gray = [sd.vae.encode(photos.load_photos([f], 32).images)[0][0] * 0.13025 for f in files]
    corners = [{(0, 0), (0, 4), (0, 8)}, {(0, 0), (14, 0), (28, 0)}, {(0, 0)}]
    met = [set(), set(), set()]
    for instance, prior, _ in (loss.terms(batches.draw(n)) for n in range(4)):
        for x0, context, pooled, sizes in zip(
            instance.x0, instance.c.context, instance.c.pooled, instance.c.sizes, strict=True
        ):
            height, width, top, left, *crop = sizes.tolist()
            which = [(32, 40), (60, 32), (32, 32)].index((height, width))
            assert rel(x0, gray[which]) < 1e-4
            assert rel(context, text.context[which]) < 1e-5
            assert rel(pooled, text.pooled[which]) < 1e-5 and crop == [32, 32]
            met[which].add((top, left))
        assert prior.c.sizes.tolist() == [WHOLE] * 3
        assert rel(prior.c.context, of_class.context.expand(3, -1, -1)) < 1e-5
        assert rel(prior.c.pooled, of_class.pooled.expand(3, -1)) < 1e-5
    assert all(found <= wanted for found, wanted in zip(met, corners, strict=True))
    assert len(met[0] | met[1]) > 2


# ---- a word for both encoders ------------------------------------------------------------------


WORD = {
    "method": "textual_inversion",
    "placeholder_token": "<sks>",
    "initializer_token": "dog",
    "instance_prompt": "a <sks>",
    "num_vectors": 2,
}


def test_a_word_has_vectors_for_both_encoders_and_nothing_else_changes(tmp_path):
    sd = runs.model("sdxl")
    before = {n: {k: v.clone() for k, v in s.items()} for n, s in sd.tensors().items()}
    train.train(config(tmp_path, **WORD), sd)
    first = len(peers.vocabulary()[0])
    ids = sd.tokenizer(["a <sks>!"])
    assert ids.shape == (1, 2, 77)
    assert ids[0, :, 2:4].tolist() == [[first, first + 1]] * 2
    assert ids[0, 0, 4] != ids[0, 1, 4] == sd.tokenizer.vocab["!"]
    key = "embeddings.token_embedding.weight"
    for name, tensors in sd.tensors().items():
        for k, now in tensors.items():
            same = now[:first] if k == key else now
            assert torch.equal(same, before[name][k]), (name, k)
    learned = [encoder.state_dict()[key][first:] for encoder in sd.text_encoders.values()]
    assert [list(x.shape) for x in learned] == [[2, 32], [2, 48]]
    dog = sd.tokenizer.vocab["dog</w>"]
    for name, rows in zip(sd.text_encoders, learned, strict=True):
        moved = (rows - before[name][key][dog]).abs().max()
        assert 1e-3 < moved < 2.1e-3  # AdamW's two steps
    again = runs.model("sdxl")
    textual_inversion.add_word(again, *adapters.read_embedding(tmp_path))
    c, other = (model.encode(["a <sks> dog"]) for model in (sd, again))
    torch.testing.assert_close(c.context, other.context)
    torch.testing.assert_close(c.pooled, other.pooled)


# ---- modes, precision, going on ----------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer_in_backward": True, "gradient_checkpointing": True},
        {"method": "lora", "explain": True},
        {"method": "hypernetwork", "train_text_encoder": False, "prior_loss_weight": 0.0},
    ],
)
def test_every_mode_takes_that_some_weights_get_no_gradient(changes, tmp_path):
    changes = {"train_text_encoder": True, "max_train_steps": 1, "train_batch_size": 1} | changes
    sd = runs.model("sdxl")
    last = {k: v.clone() for k, v in sd.text_encoder.state_dict().items() if k.startswith(UNREAD)}
    train.train(config(tmp_path, **changes), sd)
    assert all(torch.equal(sd.text_encoder.state_dict()[k], v) for k, v in last.items())
    if changes.get("explain"):
        page = (tmp_path / "explain.html").read_text()
        assert "text_encoder_2.encoder.layers.1" in page
        assert ("text_encoder.encoder.layers.1" in page) > ("coder.encoder.layers.2" in page)
        for part in ("instance.c.context", "instance.c.pooled", "instance.c.sizes"):
            assert part in page


def test_a_run_that_goes_on_ends_bit_for_bit_as_one_that_was_not_stopped(tmp_path):
    changes = {"method": "lora", "train_text_encoder": True, "max_train_steps": 2}
    changes |= {"train_batch_size": 1, "prior_loss_weight": 0.0}
    train.train(config(tmp_path / "whole", **changes))
    train.train(config(tmp_path / "parts", **changes | {"max_train_steps": 1}))
    train.train(config(tmp_path / "parts", **changes, resume_from_checkpoint="latest"))
    for file in (adapters.DIFFUSERS_LORA, "loss.csv", "state/step-00000002/state.safetensors"):
        whole, parts = ((tmp_path / name / file).read_bytes() for name in ("whole", "parts"))
        assert whole == parts, file


def test_the_vae_never_computes_in_fp16(tmp_path, monkeypatch):
    """SDXL's own overflows there: photographs, class images, grids, and pictures of a loaded model
    in fp16, whose VAE stays in fp32."""
    sd, seen = runs.model("sdxl"), []

    def watched(call):
        def inner(x):
            autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
            seen.append((x.dtype, autocast or None))
            return call(x)

        return inner

    for name in ("encode", "decode"):
        monkeypatch.setattr(sd.vae, name, watched(getattr(sd.vae, name)))
    changes = {"mixed_precision": "bf16", "num_validation_images": 1, "max_train_steps": 1}
    changes |= {"class_data_dir": None, "train_batch_size": 1, "validation_prompt": ("a dog",)}
    changes |= {"class_steps": 1, "validation_inference_steps": 1}
    train.train(config(tmp_path, **changes), sd)
    assert len(seen) >= 5 and set(seen) == {(torch.float32, None)}
    half = load(peers.model("sdxl")[0], dtype=torch.float16)
    assert half.unet.conv_in.weight.dtype == torch.float16
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}


# ---- what comes next ---------------------------------------------------------------------------


def test_the_line_for_diffusers_draws_with_the_word(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "is_public_size", lambda configs: True)
    wanted = config(tmp_path / "out", **WORD | {"max_train_steps": 1, "train_batch_size": 1})
    sd = train.train(wanted)
    said = report.what_next(tmp_path / "out", wanted, sd)
    [line] = re.findall(r"diffusers: (.*)", said)
    before, drawing = shlex.split(line)[2].rsplit("; ", 1)
    assert drawing == "p('a <sks>').images[0].save('drawn.png')"
    found = {}
    exec(before, found)
    context, *_ = found["p"].encode_prompt(["a <sks> dog"], do_classifier_free_guidance=False)
    assert type(found["p"]) is diffusers.StableDiffusionXLPipeline
    # Not the pooled prompt: transformers looks for its end at the largest id, an added word's.
    assert rel(sd.encode(["a <sks> dog"]).context, context) < 1e-5


def test_guidance_is_only_named_where_it_is_not_sdxls_own(tmp_path):
    sd = runs.model("sdxl")
    for guidance, named in ((5.0, False), (7.5, True)):
        changes = {"method": "lora", "validation_guidance_scale": guidance}
        said = report.what_next(tmp_path, config(tmp_path, **changes), sd)
        assert ("--guidance_scale" in said) == named
    card = report.model_card(sd, config(tmp_path, method="lora", train_text_encoder=True), 2)
    assert "tags: [text-to-image, stable-diffusion-xl, lora]" in card
    assert "text encoders\ntrained" in card
