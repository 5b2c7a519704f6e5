"""Training low-rank differences: the same loss and run, and the model's weights stay."""

import math
import re
from pathlib import Path

import diffusers
import peers
import pytest
import runs
import torch
from PIL import Image
from safetensors.torch import load_file

from minibooth import UserError, textual_inversion, train
from minibooth.bench import measure, models
from minibooth.common import cli
from minibooth.explain import microscope
from minibooth.formats import adapters
from minibooth.training import class_images, data, methods, plan, prepare, report, start
from minibooth.training.settings import TrainConfig

LORA = {"method": "lora", "rank": 2, "lora_alpha": 4.0}


def trained(folder, **changes):
    sd = runs.model()
    train.train(runs.config(folder, **LORA, **changes), sd)
    return sd


def files_of(folder):
    """A LoRA's two forms, whatever the run's folder is called."""
    [ours] = [f for f in folder.glob("*.safetensors") if f.name != adapters.DIFFUSERS_LORA]
    return {"ours": load_file(ours), "theirs": load_file(folder / adapters.DIFFUSERS_LORA)}


def same(a, b):
    return all(
        a[name].keys() == b[name].keys()
        and all(torch.equal(a[name][key], b[name][key]) for key in a[name])
        for name in a
    )


@pytest.mark.parametrize("text", [False, True])
def test_weights_stay_and_the_files_draw_what_the_run_drew(text, tmp_path):
    before = {name: runs.flat(net.state_dict()) for name, net in runs.model().networks.items()}
    sd = trained(tmp_path, train_text_encoder=text)
    for name, network in sd.networks.items():
        assert torch.equal(runs.flat(network.state_dict()), before[name])
    draw = {"steps": 2, "seed": 1, "guidance_scale": 2.0, "output": "latent"}
    wanted = sd.generate(["a sks dog"], **draw)
    assert not torch.allclose(wanted, runs.model().generate(["a sks dog"], **draw), atol=1e-4)
    for name in (f"{tmp_path.name}.safetensors", adapters.DIFFUSERS_LORA):
        merged = runs.model()
        adapters.merge_files(merged.networks, [str(tmp_path / name)])
        torch.testing.assert_close(
            merged.generate(["a sks dog"], **draw), wanted, atol=2e-5, rtol=0
        )
    parts = {key.partition(".")[0] for key in load_file(tmp_path / adapters.DIFFUSERS_LORA)}
    assert parts == {"unet", "text_encoder"} if text else parts == {"unet"}


def test_a_run_that_goes_on_ends_with_equal_bits(tmp_path):
    trained(tmp_path / "whole", max_train_steps=6)
    trained(tmp_path / "parts", max_train_steps=3)
    trained(tmp_path / "parts", max_train_steps=6, resume_from_checkpoint="latest")
    assert same(files_of(tmp_path / "whole"), files_of(tmp_path / "parts"))
    with pytest.raises(UserError, match="method was 'lora' and is 'dreambooth'"):
        train.train(
            runs.config(tmp_path / "parts", max_train_steps=9, resume_from_checkpoint="latest")
        )


def test_snapshots_are_loras_too(tmp_path):
    trained(tmp_path, checkpointing_steps=2)
    found = files_of(tmp_path / "checkpoint-2")
    assert {t.dtype for t in found["theirs"].values()} == {torch.float16}
    assert not (tmp_path / "checkpoint-2" / "model_index.json").exists()


def test_frozen_weights_are_in_16_bits_and_adapters_in_32(tmp_path):
    sd = trained(tmp_path, mixed_precision="bf16")
    assert {p.dtype for p in sd.unet.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(tmp_path / adapters.DIFFUSERS_LORA).values()} == {
        torch.float32
    }
    losses = [float(x.split(",")[1]) for x in (tmp_path / "loss.csv").read_text().split()[1:]]
    trained(tmp_path / "plain")
    plain = (tmp_path / "plain" / "loss.csv").read_text().split()[1:]
    assert losses == pytest.approx([float(x.split(",")[1]) for x in plain], rel=0.02)


def test_frozen_weights_are_rounded_before_pictures_are_drawn_whose_names_stay(
    tmp_path, monkeypatch
):
    ensure, seen = class_images.ensure, {}

    def watched(sd, images, on_passes):
        files = ensure(sd, images, on_passes)
        kinds = [next(sd.networks[name].parameters()).dtype for name in ("unet", "text_encoder")]
        seen[method] = kinds, files
        return files

    monkeypatch.setattr(class_images, "ensure", watched)
    for method in ("dreambooth", "lora"):
        config = runs.config(tmp_path, method=method, mixed_precision="bf16")
        prepare.gather(start.Run(config, runs.model(), torch.device("cpu")))
    (plain, files), (rounded, same_files) = seen.values()
    assert plain == [torch.float32] * 2 and rounded == [torch.bfloat16, torch.float32]
    assert files == same_files


def test_the_first_step_can_be_explained(tmp_path):
    trained(tmp_path, explain=True)
    page = (tmp_path / "explain.html").read_text()
    assert "down_blocks.0" in page
    assert "with r = 2, A\nand B" in page and "its norm is 0)" in page  # ∂L/∂A, since B is zero
    text = " ".join(page.split())
    [values] = re.findall(r"over the largest, are ([^;]*); the next is ([^.]*)\.", text)
    assert values[0].startswith("100.0%, ") and values[0].count("%") == 2


def test_what_sd15_would_train_and_need():
    """797,184 is what diffusers' script prints for rank 4 of SD 1.5's UNet."""
    sd, config = models.model("SD 1.5", torch.device("meta")), TrainConfig(method="lora")
    assert sum(p.numel() for p in plan.trainable(sd, config)) == 797_184
    frozen = sum(p.numel() for p in sd.unet.parameters())
    part = plan.parts(sd, config, 64 * 64, half=True)
    assert part["weights"] == 2 * frozen + 4 * 797_184
    assert part["averages"] == 8 * 797_184 and part["gradients"] == 4 * 797_184
    short = TrainConfig(method="lora", gradient_checkpointing=True)
    assert plan.peak(sd, short, 64 * 64, half=True) < 6e9


def two_steps_of_sd15(folder):
    """In a process of its own, whose peak is this run's alone."""
    torch.manual_seed(0)
    photograph = Path(folder) / "photographs" / "0.png"
    photograph.parent.mkdir()
    Image.effect_noise((512, 512), 60).convert("RGB").save(photograph)
    settings = {"method": "lora", "max_train_steps": 2, "gradient_checkpointing": True}
    settings |= {"instance_data_dir": str(photograph.parent), "output_dir": f"{folder}/out"}
    settings |= {"instance_prompt": "a sks dog", "class_prompt": "a dog", "device": "cpu"}
    settings |= {"num_class_images": 1, "class_steps": 1, "num_validation_images": 0}
    train.train(TrainConfig(**settings), models.model("SD 1.5", torch.device("cpu")))
    return measure.peaks(torch.device("cpu"))


@pytest.mark.slow
def test_a_lora_of_sd15_s_size_trains_on_a_cpu(tmp_path):
    """Random weights, 512², a photograph and a class image per step: fp32 weights are 4.3 GB."""
    peak = measure.alone("test_methods", f"two_steps_of_sd15({str(tmp_path)!r})")["peak_bytes"]
    losses = report.read_losses(tmp_path / "out" / "loss.csv")
    print(f"peak {peak / 1e9:.2f} GB, losses {losses}")
    assert [step for step, *_ in losses] == [1, 2]
    assert all(math.isfinite(x) for row in losses for x in row)
    for file in ("out.safetensors", adapters.DIFFUSERS_LORA):
        path = tmp_path / "out" / file
        found = load_file(path)
        up = [v for k, v in found.items() if "lora_up" in k or "lora_B" in k]
        assert len(up) == 128 and all(v.any() for v in up)
        assert sum(v.numel() for v in found.values() if v.ndim) == 797_184
        assert path.stat().st_size == pytest.approx(4 * 797_184, rel=0.02)  # and the names
        print(f"{file}: {path.stat().st_size:,} bytes")
    assert peak < 7.5e9


def test_rates_suit_the_method_where_none_is_given():
    assert methods.defaults({"method": "lora"}) == methods.LORA_RATES
    assert methods.defaults({}) == {}


WORD = {"method": "textual_inversion", "placeholder_token": "<sks>", "initializer_token": "dog"}
WORD |= {"instance_prompt": "a <sks>"}


def inverted(folder, **changes):
    sd = runs.model()
    train.train(runs.config(folder, **WORD | changes), sd)
    return sd


def test_the_prompt_that_is_explained_is_the_one_that_was_drawn(tmp_path, monkeypatch):
    look, seen = microscope.look, []

    def looked(sd, instance, *given, prompt, alike, **more):
        for c in instance.c.context[:alike]:
            assert torch.allclose(c, sd.encode_prompt([prompt])[0], atol=1e-5)
        seen.append((prompt, alike))
        return look(sd, instance, *given, prompt=prompt, alike=alike, **more)

    monkeypatch.setattr(microscope, "look", looked)
    inverted(tmp_path, explain=True, learnable_property="object", train_batch_size=3)
    [first, last] = seen
    assert first == last and first[0] != "a <sks>" and 1 <= first[1] <= 3


def vectors_of(folder):
    found = load_file(folder / adapters.DIFFUSERS_EMBEDDING)
    assert set(found) == {"<sks>"}
    return found["<sks>"]


@pytest.mark.parametrize("vectors", [1, 2])
def test_a_word_is_trained_and_no_weight(vectors, tmp_path, capsys):
    before = {name: net.state_dict() for name, net in runs.model().networks.items()}
    sd = inverted(tmp_path, num_vectors=vectors, prior_loss_weight=1.0, class_prompt="a dog")
    assert "there is no prior term" in capsys.readouterr().out
    assert all(prior == 0 for _, _, _, prior, *_ in report.read_losses(tmp_path / "loss.csv"))
    for name, network in sd.networks.items():
        for key, now in network.state_dict().items():
            old = before[name][key]
            assert torch.equal(now[: len(old)] if old.ndim else now, old), key
    base = runs.model()
    start = before["text_encoder"]["embeddings.token_embedding.weight"]
    [(_, dog)] = base.tokenizer.pieces("dog")
    learned = vectors_of(tmp_path)
    assert learned.shape == (vectors, start.shape[1]) and learned.dtype == torch.float32
    # AdamW's first step is as long as the learning rate in every number, the others no longer.
    change = (learned - start[dog]).abs()
    assert 1e-3 < change.max() < 3.1e-3

    word, read = adapters.read_embedding(tmp_path / "sks.safetensors")
    assert word == "sks" and torch.equal(read[0], learned)
    textual_inversion.add_word(base, "<sks>", learned)
    draw = {"steps": 2, "seed": 1, "guidance_scale": 2.0, "output": "latent"}
    wanted = sd.generate(["a <sks>"], **draw)
    torch.testing.assert_close(base.generate(["a <sks>"], **draw), wanted, atol=1e-6, rtol=0)


def test_a_word_typed_with_capitals_is_the_same_in_diffusers(tmp_path, capsys):
    """Its tokenizer lowers the prompt: of a word written as it was typed it found one vector."""
    word = {"placeholder_token": "<My-Dog>", "instance_prompt": "photo of <My-Dog>"}
    sd = inverted(tmp_path, num_vectors=2, max_train_steps=1, **word)
    said = capsys.readouterr().out
    assert "<My-Dog> is written <my-dog>" in said
    [prompt] = re.findall(r'--prompt "(.*)"', said)
    assert set(load_file(tmp_path / adapters.DIFFUSERS_EMBEDDING)) == {"<my-dog>"}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(peers.model("half")[0])
    pipe.load_textual_inversion(tmp_path)
    converted = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)
    theirs = pipe.tokenizer(converted, padding="max_length", max_length=77).input_ids
    assert theirs == sd.tokenizer([prompt])[0].tolist()
    first = len(peers.vocabulary()[0])
    assert {first, first + 1} <= set(theirs)


def test_the_prompts_of_a_word_are_those_of_the_papers_code():
    found = textual_inversion.TEMPLATES
    assert {name: (len(x), len(set(x))) for name, x in found.items()} == {
        "object": (27, 27),
        "style": (19, 17),
    }
    assert all(prompt.count("{}") == 1 for prompts in found.values() for prompt in prompts)
    assert found["object"][4:6] == ("a photo of a clean {}", "a photo of a dirty {}")
    assert found["style"][-1] == "a large painting in the style of {}"
    prompts = TrainConfig(**WORD, learnable_property="style").prompts
    assert prompts == [prompt.format("<sks>") for prompt in found["style"]]


def test_the_gradient_is_the_new_rows_of_the_whole_embedding_s(tmp_path, monkeypatch):
    """The same loss with the whole table of words as what is trained, as diffusers' script has
    it: the gradient of its last row."""
    sd, seen = runs.model(), {}

    def keep(step, result):
        seen.setdefault("x_t", result.x_t.detach())
        seen.setdefault("target", result.target)

    monkeypatch.setattr(TrainConfig, "adam_weight_decay", 0.0)
    train.train(runs.config(tmp_path, **WORD, max_train_steps=1), sd, keep)
    moved = vectors_of(tmp_path)

    other = runs.model()
    config = runs.config(tmp_path / "other", **WORD)
    rows = textual_inversion.embedding_of(other.text_encoder).weight
    start = rows[other.tokenizer.pieces("dog")[0][1]]
    textual_inversion.add_word(other, "<sks>", start.detach()[None])
    table = textual_inversion.embedding_of(other.text_encoder).weight.requires_grad_(True)
    [prompt] = {config.prompts[i] for i in drawn_prompt(config)}
    context = other.text_encoder(other.tokenizer([prompt]))
    t = data.rng(config.seed, "instance", "noise", 0)
    shape = (1, *seen["x_t"].shape[1:])
    for _ in range(2):
        torch.randn(shape, generator=t)
    t = torch.randint(1000, (1,), generator=t)
    loss = (other.unet(seen["x_t"], t, context) - seen["target"]).square().mean()
    loss.backward()
    # The first step of AdamW from zero averages: g / (|g| + ε), times the learning rate.
    g = table.grad[-1]
    clip = max(1.0, g.norm().item())
    wanted = start - 1e-3 * (g / clip) / ((g / clip).abs() + 1e-8)
    torch.testing.assert_close(moved[0], wanted.detach(), atol=2e-6, rtol=0)


def of_three():
    zeros = torch.zeros(3, 1, 1, 1)
    return data.Latents(zeros, zeros, torch.arange(3), torch.zeros(3, 6))


def drawn_prompt(config):
    choices = torch.arange(len(config.prompts)).expand(3, -1)
    latents = of_three()
    batches = data.Batches(
        latents, None, 1000, config.seed, config.train_batch_size, torch.device("cpu"), (choices,)
    )
    return batches.draw(0).instance.prompt.tolist()


def test_all_prompts_are_drawn_and_each_photograph_only_under_its_own():
    latents = of_three()
    own = torch.tensor([[0, 3], [1, 4], [2, 5]])
    batches = data.Batches(latents, latents, 9, 0, 2, torch.device("cpu"), (own, own + 6))
    count = torch.zeros(12)
    for n in range(300):
        which = torch.cat([term.prompt for term in batches.draw(n).terms])
        photo = [latents.photo[data.pick(latents, 0, name, n, 2)] for name in ("instance", "class")]
        assert torch.equal(which % 3, torch.cat(photo))
        count += torch.bincount(which, minlength=12)
    assert count[:6].sum() == count[6:].sum() == 600
    assert (count - 100).abs().max() < 4 * (600 * (1 / 6) * (5 / 6)) ** 0.5  # four deviations


def test_a_word_s_run_goes_on_with_equal_bits(tmp_path):
    inverted(tmp_path / "whole", max_train_steps=6)
    inverted(tmp_path / "parts", max_train_steps=3, checkpointing_steps=2)
    assert vectors_of(tmp_path / "parts" / "checkpoint-2").shape[0] == 1
    inverted(tmp_path / "parts", max_train_steps=6, resume_from_checkpoint="latest")
    assert torch.equal(vectors_of(tmp_path / "whole"), vectors_of(tmp_path / "parts"))


def test_a_word_in_16_bits_and_with_little_memory(tmp_path):
    inverted(tmp_path / "plain")
    inverted(tmp_path / "short", gradient_checkpointing=True)
    torch.testing.assert_close(
        vectors_of(tmp_path / "short"), vectors_of(tmp_path / "plain"), atol=1e-5, rtol=0
    )
    sd = inverted(tmp_path / "bf16", mixed_precision="bf16", explain=True)
    assert {p.dtype for p in sd.unet.parameters()} == {torch.bfloat16}
    assert "text_encoder" in (tmp_path / "bf16" / "explain.html").read_text()


def test_what_a_word_of_sd15_would_need():
    sd = models.model("SD 1.5", torch.device("meta"))
    config = TrainConfig(method="textual_inversion", gradient_checkpointing=True)
    assert sum(p.numel() for p in plan.trainable(sd, config)) == 768
    part = plan.parts(sd, config, 64 * 64, half=True)
    frozen = sum(p.numel() for n in (sd.unet, sd.text_encoder) for p in n.parameters())
    assert part["weights"] == 2 * frozen + 4 * 768


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initializer_token": None}, "initializer_token .the word that it starts as"),
        ({"initializer_token": "stuffed animal"}, r"is \d+ tokens"),
        ({"placeholder_token": "dog"}, "does not have the word that is trained, dog"),
        ({"placeholder_token": "dog", "instance_prompt": "a dog"}, "knows 'dog' already"),
        ({"train_text_encoder": True}, "trains no network"),
        ({"num_vectors": 0}, "num_vectors must be"),
    ],
)
def test_what_is_no_word(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        inverted(tmp_path, **changes)


def test_a_config_that_names_no_learning_rate_gets_its_methods(tmp_path, recwarn):
    path = tmp_path / "config.json"
    path.write_text('{"model": "m", "method": "lora"}')
    for given, rates in ([], (1e-4, 5e-5)), (["--method", "dreambooth"], (5e-6, 2e-6)):
        given = ["--config", str(path), *given]
        config = cli.parse(TrainConfig, "x", "", given, defaults=methods.defaults)
        assert (config.learning_rate, config.text_encoder_learning_rate) == rates
    assert not recwarn.list


def test_a_learning_rate_of_another_methods_config_is_said(tmp_path, recwarn):
    path = tmp_path / "config.json"
    path.write_text('{"model": "m", "learning_rate": 5e-6}')
    config = cli.parse(
        TrainConfig, "x", "", ["--config", str(path), "--method", "lora"], defaults=methods.defaults
    )
    assert config.learning_rate == 5e-6
    said = "the learning rate 5e-06 is that of a config for --method dreambooth: for --method lora"
    assert str(recwarn.pop().message).startswith(said) and not recwarn.list
    for more in (["--learning_rate", "1e-4"], ["--method", "dreambooth"]):
        given = ["--config", str(path), "--method", "lora", *more]
        cli.parse(TrainConfig, "x", "", given, defaults=methods.defaults)
    assert not recwarn.list
