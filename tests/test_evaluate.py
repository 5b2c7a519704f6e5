"""The metrics against independent computations, and the protocol killed and resumed.

CLIP and DINO here are of the real architecture, small, with random weights; so is the toybox. The
one test that needs the real ones and the whole data set is marked: `pytest -m weights`.
"""

import csv
import functools
import itertools
import json
import os
import re
import shutil
import signal
import sys
import types
from dataclasses import fields
from pathlib import Path

import child
import huggingface_hub
import numpy as np
import peers
import pytest
import runs
import test_weights
import tiny
import torch
import transformers
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from minibooth import UserError, sample, train
from minibooth.evaluate import __main__ as program
from minibooth.evaluate import drawing, judges, metrics, protocol, single, snapshots, subjects
from minibooth.evaluate.metrics import Mean, Picture
from minibooth.evaluate.options import Options
from minibooth.formats import hub
from minibooth.formats.tensor_files import write_safetensors
from minibooth.toybox import judge as toy
from minibooth.toybox import world
from minibooth.training import snapshots as saved

SHARED = Path(__file__).parent.parent.parent / "shared" / "dreambooth"
SIDE = 32  # of what the small CLIP and DINO see
CLIP_ID, DINO_ID = "openai/clip-vit-base-patch32", "facebook/dino-vits16"


# ---- small models and data sets ----------------------------------------------------------------


@functools.cache
def clip_folder():
    folder = Path(peers.KEPT.name) / "clip"
    vocab, _ = peers.vocabulary()
    size = {"hidden_size": 32, "intermediate_size": 64}
    size |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config=size
        | {
            "vocab_size": len(vocab),
            "bos_token_id": vocab["<|startoftext|>"],
            "eos_token_id": vocab["<|endoftext|>"],
        },
        vision_config=size | {"image_size": SIDE, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    tiny.randomize(transformers.CLIPModel(config), seed=1).save_pretrained(folder)
    peers.write_tokenizer(folder)
    return folder


@functools.cache
def dino_folder():
    folder = Path(peers.KEPT.name) / "dino"
    config = transformers.ViTConfig(
        **{"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "image_size": SIDE, "patch_size": 8},
    )
    # With a pooler, as the public file has one; it must not be used.
    tiny.randomize(transformers.ViTModel(config), seed=2).save_pretrained(folder)
    return folder


def options(cls=Options, **changes):
    given = {"clip": str(clip_folder()), "dino": str(dino_folder()), "device": "cpu"}
    return cls(**given | {"steps": 1, "images": 2, "class_images": 2} | changes)


@functools.cache
def public_judge(**changes):
    return judges.load(options(**changes))


def noise(seed, width=48, height=48):
    """A smooth random picture: random pixels, enlarged."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


class Lpips:
    """In the place of lpips.LPIPS: another formula, but of the same shapes and ranges."""

    def __init__(self, net, verbose):
        self.net = net

    def eval(self):
        return self

    def requires_grad_(self, wanted):
        return self

    def to(self, device):
        return self

    def __call__(self, a, b):
        assert a.shape == b.shape and a.ndim == 4 and -1 <= a.min() < 0
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture(autouse=True)
def without_lpips(monkeypatch):
    """As if it were not installed, where a test does not say otherwise."""
    monkeypatch.setitem(sys.modules, "lpips", None)


@pytest.fixture
def with_lpips(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Lpips))
    return judges.load(options())


def make_dataset(folder, classes, photographs, prompts=("a {0} {1} in the snow", "a {0} {1}")):
    """`classes`: subject → noun; `photographs`: subject → how many pictures lie in its folder."""
    lines = [f"'{p}'.format(unique_token, class_token)," for p in prompts]
    text = ["Classes", "", "subject_name,class", *(f"{k},{v}" for k, v in classes.items()), ""]
    for title in ("Object Prompts", "Live Subject Prompts"):
        text += [title, "", "prompt_list = [", *lines, "]", ""]
    folder.mkdir(parents=True)
    (folder / subjects.FILE).write_text("\n".join(text))
    seed = 0
    for name, count in photographs.items():
        (folder / name).mkdir()
        for i in range(count):
            noise(seed).save(folder / name / f"{i:02d}.png")
            seed += 1
    return folder


@pytest.fixture(scope="module")
def toybox_folder(tmp_path_factory):
    """The toybox's folder, with a small random model, a random judge, and the real subjects."""
    folder = tmp_path_factory.mktemp("toybox")
    shutil.copytree(peers.model()[0], folder, dirs_exist_ok=True)
    torch.manual_seed(3)
    judge = tiny.randomize(toy.Judge(), seed=3)
    write_safetensors(folder / "judge" / "model.safetensors", judge.state_dict(), torch.float32)
    world.export(folder / "subjects")
    return folder


@pytest.fixture
def toybox(toybox_folder, monkeypatch):
    monkeypatch.setattr(hub, "toybox", lambda: toybox_folder)
    return toybox_folder


def run(monkeypatch, capsys, *given):
    """The program as a user runs it: exit status, stdout, stderr."""
    return runs.program(monkeypatch, capsys, program, *given)


# ---- the metrics, computed again ---------------------------------------------------------------


def cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a @ b) / np.sqrt((a @ a) * (b @ b))


def peer_pixels(image, mean, std):
    """transformers' own preparation: shorter side 256/224 of what is seen, middle, normalised."""
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": round(256 * SIDE / 224)},
        crop_size={"height": SIDE, "width": SIDE},
        resample=Image.Resampling.BICUBIC,
        image_mean=list(mean),
        image_std=list(std),
    )
    return processor(image, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def peer_features(images, kind):
    """One picture at a time through transformers' public functions."""
    if kind == "clip":
        model = transformers.CLIPModel.from_pretrained(clip_folder()).eval()
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        seen = [model.get_image_features(peer_pixels(i, mean, std)) for i in images]
        return [getattr(s, "pooler_output", s)[0].numpy() for s in seen]
    model = transformers.ViTModel.from_pretrained(dino_folder()).eval()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return [model(peer_pixels(i, mean, std)).last_hidden_state[0, 0].numpy() for i in images]


@torch.no_grad()
def peer_texts(prompts):
    model = transformers.CLIPModel.from_pretrained(clip_folder()).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder())
    read = [model.get_text_features(**tokenizer(p, return_tensors="pt")) for p in prompts]
    return [getattr(r, "pooler_output", r)[0].numpy() for r in read]


PROMPTS = ["a sks dog in the snow", "a sks dog of a cat"]
TEXTS = ["a dog in the snow", "a dog of a cat"]


def test_the_five_metrics_are_those_of_an_independent_computation(with_lpips):
    real = [noise(i, 60, 44) for i in range(4)]
    images = [noise(10 + i, 44, 52) for i in range(6)]
    bare = [noise(20 + i) for i in range(3)]
    pictures = [Picture(im, PROMPTS[i // 3], TEXTS[i // 3]) for i, im in enumerate(images)]
    scores = metrics.score(with_lpips, real, pictures, bare)

    def mean(values):
        values = list(values)
        return sum(values) / len(values), len(values)

    def among(a, b, kind):
        a, b = peer_features(a, kind), peer_features(b, kind)
        return mean(cosine(x, y) for x in a for y in b)

    texts = peer_texts(TEXTS)
    seen = peer_features(images, "clip")
    by_eye = [np.asarray(image, np.float64) / 127.5 - 1 for image in images]
    pairs = [(i, j) for i, j in itertools.combinations(range(6), 2) if i // 3 == j // 3]
    want = {
        "DINO": among(images, real, "dino"),
        "CLIP-I": among(images, real, "clip"),
        "CLIP-T": mean(cosine(seen[i], texts[i // 3]) for i in range(6)),
        "PRES": among(bare, real, "dino"),
        "DIV": mean(np.abs(by_eye[i] - by_eye[j]).mean() for i, j in pairs),
    }
    assert list(scores) == list(want) == list(metrics.METRICS)
    for metric, (value, count) in want.items():
        assert scores[metric].value == pytest.approx(value, abs=1e-5), metric
        assert scores[metric].pairs == count
    assert len({round(m.value, 4) for m in scores.values()}) == 5


def test_real_photographs_among_themselves_with_and_without_self_pairs():
    real = [noise(i, 40, 40 + 4 * i) for i in range(3)]
    rows = metrics.real_rows(public_judge(), real, [True, False])
    for metric, kind in (("DINO", "dino"), ("CLIP-I", "clip")):
        seen = peer_features(real, kind)
        all_pairs = [cosine(a, b) for a in seen for b in seen]
        others = [cosine(seen[i], seen[j]) for i in range(3) for j in range(3) if i != j]
        assert rows[True][metric].value == pytest.approx(np.mean(all_pairs), abs=1e-5)
        assert rows[False][metric].value == pytest.approx(np.mean(others), abs=1e-5)
        assert (rows[True][metric].pairs, rows[False][metric].pairs) == (9, 6)
    assert metrics.real_rows(public_judge(), real[:1], [True, False])[False] == {}


def test_subjects_count_the_same_however_many_photographs_they_have():
    scores = [{"DINO": Mean(0.9, 1)}, {"DINO": Mean(0.3, 2), "DIV": Mean(0.5, 7)}]
    assert metrics.average(scores, "subjects") == pytest.approx({"DINO": 0.6, "DIV": 0.5})
    assert metrics.average(scores, "pairs") == pytest.approx({"DINO": 0.5, "DIV": 0.5})


def test_what_is_seen_is_the_middle_of_the_picture():
    white = Image.new("RGB", (90, 30), "white")
    white.paste((255, 0, 0), (30, 0, 60, 30))
    for image in (white, white.transpose(Image.Transpose.ROTATE_90)):
        seen = np.asarray(judges.square(image, 60, 40))
        assert seen.shape == (40, 40, 3) and (seen == (255, 0, 0)).all()


def test_text_and_resize_are_options(monkeypatch):
    image = noise(5, 80, 50)
    near, wide = public_judge(resize=512), public_judge()
    a, b = (j.image_features([image], "dino") for j in (near, wide))
    assert tiny.rel(a, b) > 0.01
    assert drawing.without("sks", "a sks dog, sksy sks") == "a dog, sksy"
    assert single.text_of("a sks dog", options()) == "a dog"
    assert single.text_of("a sks dog", options(identifier_in_text=True)) == "a sks dog"
    long = public_judge().text_features(["a dog " * 60])  # cut to 77 tokens, not refused
    assert long.norm().item() == pytest.approx(1, abs=1e-5)


# ---- the judges --------------------------------------------------------------------------------


def test_a_metric_without_its_library_is_left_out_and_says_how_to_get_it(
    tmp_path, monkeypatch, capsys
):
    for i in range(2):
        noise(i).save(tmp_path / f"{i}.png")
    given = ["--real", tmp_path, "--generated", tmp_path, "--prompt", "a dog", "--device", "cpu"]
    given += ["--clip", clip_folder(), "--dino", dino_folder(), "--output_dir", tmp_path / "out"]
    status, out, _ = run(monkeypatch, capsys, *given)
    assert status == 0
    assert 'DIV left out: pip install "minibooth[evaluate]"' in out
    assert re.search(r"^DINO +\d\.\d{3}  \(mean of 4\)", out, re.M)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert scores.keys() == {"DINO", "CLIP-I", "CLIP-T"}

    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, err = run(monkeypatch, capsys, *given)
    assert status == 2 and 'pip install "minibooth[evaluate]"' in err and err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Lpips))
    status, out, _ = run(monkeypatch, capsys, *given)
    assert status == 0 and re.search(r"^DIV ", out, re.M)
    for names in ("CLIP-I, CLIP-T", "DINO, PRES"):
        assert f'{names} left out: pip install "minibooth[evaluate]"' in out


def test_lpips_without_its_network_is_left_out(monkeypatch):
    def away(net, verbose):
        raise OSError("<urlopen error: no route>")

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=away))
    assert "no route" in judges.load(options()).missing["lpips"]


def test_a_library_that_cannot_be_imported_says_why(monkeypatch, tmp_path):
    (tmp_path / "lpips.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    found = judges.load(options()).missing["lpips"]
    assert found.startswith("lpips cannot be imported (operator nms does not exist): pip install")


def test_lpips_wants_pictures_of_one_size(with_lpips):
    with pytest.raises(UserError, match="one size"):
        with_lpips.distance([noise(0)], [noise(1, 40, 40)])


def test_models_that_are_missing_or_of_another_kind_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="nowhere/at/all is not there"):
        judges.load(options(clip="nowhere/at/all"))
    with pytest.raises(UserError, match=r"dino is not CLIP: .* of the kind vit"):
        judges.load(options(clip=str(dino_folder())))
    with pytest.raises(UserError, match=r"clip is not DINO: .* of the kind clip"):
        judges.load(options(dino=str(clip_folder())))
    partly = shutil.copytree(dino_folder(), tmp_path / "partly")
    weights = load_file(partly / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, partly / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"partly lacks weights of DINO: layernorm.bias"):
        judges.load(options(dino=str(partly)))
    (partly / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as DINO"):
        judges.load(options(dino=str(partly)))

    def no_network(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no route to host")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    with pytest.raises(UserError, match=f"{CLIP_ID} .*the hub cannot be reached"):
        judges.load(options(clip=CLIP_ID))


def test_the_toyboxs_judge_fills_the_same_interface(toybox):
    judge = judges.load(options(judge="toybox"))
    assert judge.missing == {} and "not the paper's" in judge.about
    things = [s for subject in world.SUBJECTS.values() for s in subject.scenes[:2]]
    images = [world.render(scene) for scene in things]
    network = toy.load(toybox)
    readings, embedded = network.look(toy.to_tensor(images))
    assert tiny.rel(judge.image_features(images, "dino"), embedded) < 1e-5
    read = judge.image_features(images, "clip")
    assert read.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)
    place = slice(len(toy.READS["kind"]) + len(toy.READS["colour"]), None)
    best = read[:, place][:, : len(world.PLACES)].argmax(dim=1).tolist()
    assert [world.PLACES[i] for i in best] == [r["place"] for r in readings]
    distance = judge.distance(images[:3], images[3:6])
    want = [1 - cosine(embedded[i], embedded[i + 3]) for i in range(3)]
    assert distance.tolist() == pytest.approx(want, abs=1e-5)


def test_the_toyboxs_judge_understands_every_prompt_of_its_file(toybox):
    assert judges.says("a drawing of a red dog wearing a red hat at night") == {
        **{"kind": "dog", "colour": "red", "accessory": "a red hat"},
        **{"place": "at night", "style": "drawing"},
    }
    assert judges.says("a sks cat wearing a red hat") == {"kind": "cat", "accessory": "a red hat"}
    judge = judges.load(options(judge="toybox"))
    found, _ = subjects.find(toybox / "subjects")
    for subject in found:
        prompts = [subjects.fill(p, "", subject.noun) for p in subject.prompts]
        texts = judge.text_features(prompts)
        assert all(len(judges.says(prompt)) == 2 for prompt in prompts), prompts
        assert len({tuple(row.tolist()) for row in texts}) == len(prompts)


# ---- the data set ------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason=f"the authors' photographs are not in {SHARED}")
def test_the_data_sets_own_file_is_read():
    catalogue = subjects.read_catalogue(SHARED / subjects.FILE)
    assert len(catalogue.nouns) == 30
    live = [name for name, noun in catalogue.nouns.items() if noun in subjects.LIVE]
    assert len(live) == 9
    assert catalogue.nouns["grey_sloth_plushie"] == "stuffed animal"
    assert len(catalogue.object_prompts) == len(catalogue.live_prompts) == 25
    assert set(catalogue.prompts("dog")) - set(catalogue.prompts("toy"))
    assert (
        subjects.fill(catalogue.live_prompts[11], "sks", "dog") == "a sks dog wearing a santa hat"
    )
    assert subjects.fill(catalogue.object_prompts[0], "sks", "") == "a sks in the jungle"
    found, absent = subjects.find(SHARED)
    assert len(found) + len(absent) == 30


def test_the_toyboxs_file_is_read_by_the_same_reader(toybox):
    found, absent = subjects.find(toybox / "subjects")
    assert absent == []
    assert {s.name: s.noun for s in found} == {k: s.kind for k, s in world.SUBJECTS.items()}
    dog = next(s for s in found if s.name == "spotted_dog")
    assert "a {0} {1} wearing a red hat" in dog.prompts and dog.class_prompt == "a dog"
    assert len(set(dog.prompts)) == len(dog.prompts)


CLASSES = {"dog": "dog", "dog2": "dog", "backpack": "backpack", "backpack_dog": "backpack"}


@pytest.mark.parametrize("inner", ["", "dataset"])
def test_a_folder_is_a_subjects_only_under_its_exact_name(tmp_path, inner):
    counts = {"dog": 1, "dog2": 2, "backpack": 3, "backpack_dog": 4}
    data = make_dataset(tmp_path / "checkout" / inner, CLASSES, counts)
    found, absent = subjects.find(tmp_path / "checkout")
    assert [(s.name, s.folder) for s in found] == [(name, data / name) for name in CLASSES]
    assert not absent
    shutil.rmtree(data / "dog")
    shutil.rmtree(data / "backpack")
    found, absent = subjects.find(tmp_path / "checkout")
    assert [s.name for s in found] == ["dog2", "backpack_dog"] and absent == ["dog", "backpack"]
    [one], _ = subjects.find(tmp_path / "checkout", "dog2")
    assert one.folder == data / "dog2"


def test_wrong_folders_and_names_are_explained(tmp_path):
    with pytest.raises(UserError, match=r"nowhere holds no prompts_and_classes\.txt"):
        subjects.find(tmp_path / "nowhere")
    data = make_dataset(tmp_path / "data", CLASSES, {"dog": 1, "dog-2": 1})
    with pytest.raises(UserError, match=r"no folder dog2 with its photographs: is it dog-2\?"):
        subjects.find(data)
    with pytest.raises(UserError, match=r"'dog3' is no subject .* did you mean dog or dog2\?"):
        subjects.find(data, "dog,dog3")
    with pytest.raises(UserError, match="no folder backpack with"):
        subjects.find(data, "dog, backpack")
    (data / "dog").rename(data / "DOG")
    with pytest.raises(
        UserError, match=r"no folder dog with its photographs: is it DOG or dog-2\?"
    ):
        subjects.find(data, "dog")
    (data / "DOG").rename(data / "dog")
    (data / "dog" / "00.png").unlink()
    (data / "dog-2").rename(data / "other")
    with pytest.raises(UserError, match="dog holds no image file"):
        subjects.find(data)
    shutil.rmtree(data / "dog")
    with pytest.raises(UserError, match=r"no folder of any subject \(its folders: other\)"):
        subjects.find(data)
    (data / subjects.FILE).write_text("Classes\n\nsubject_name,class\ndog,dog\n")
    with pytest.raises(UserError, match="is damaged"):
        subjects.find(data)


def test_a_wrong_noun_is_of_another_class_and_stays(tmp_path):
    for name in CLASSES:
        noun = CLASSES[name]
        subject = subjects.Subject(name, noun, tmp_path, ())
        wrong = subjects.wrong_noun(subject, CLASSES)
        assert wrong in CLASSES.values() and wrong != noun
        assert wrong == subjects.wrong_noun(subject, CLASSES)


# ---- the row of the real photographs -----------------------------------------------------------


def read_csv(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_the_real_row_averages_subjects_first_and_mixes_no_names(tmp_path, monkeypatch, capsys):
    counts = {"dog": 2, "dog2": 5, "backpack": 3, "backpack_dog": 1}
    data = make_dataset(tmp_path / "data", CLASSES, counts)
    given = ["dataset", "--data", data, "--clip", clip_folder(), "--dino", dino_folder()]
    given += ["--output_dir", tmp_path / "out", "--device", "cpu"]
    status, out, _ = run(monkeypatch, capsys, *given)
    assert status == 0
    rows = read_csv(tmp_path / "out" / "subjects.csv")
    ours = {r["subject"]: r for r in rows if r["row"] == "real photographs, with self-pairs"}
    means = {}
    for name in CLASSES:
        images = [Image.open(f) for f in sorted((data / name).iterdir())]
        assert len(images) == counts[name]
        seen = peer_features(images, "dino")
        means[name] = np.mean([cosine(a, b) for a in seen for b in seen])
        assert float(ours[name]["DINO"]) == pytest.approx(means[name], abs=1e-5)
    mean = np.mean(list(means.values()))
    [line] = [x for x in out.splitlines() if x.startswith("| real photographs, with self-pairs")]
    cells = [c.strip() for c in line.strip("| ").split("|")]
    assert cells[1] == f"{mean:.3f}" and cells[4:6] == ["0.774", "0.885"]
    assert "4 of 4 subjects" in out
    assert "averaged so that every subject counts the same" in out

    # Without self-pairs a single photograph has no pair, so three subjects are left.
    [line] = [x for x in out.splitlines() if x.startswith("| real photographs, without")]
    images = {n: [Image.open(f) for f in sorted((data / n).iterdir())] for n in CLASSES}
    others = [
        np.mean([cosine(a, b) for a, b in itertools.permutations(peer_features(v, "dino"), 2)])
        for v in images.values()
        if len(v) > 1
    ]
    assert line.split("|")[2].strip() == f"{np.mean(others):.3f}"

    status, out, _ = run(monkeypatch, capsys, *given, "--averaging", "pairs", "--self_pairs=with")
    weights = [counts[name] ** 2 for name in CLASSES]
    pooled = np.average(list(means.values()), weights=weights)
    assert f"| {pooled:.3f} |" in out and "without self-pairs" not in out
    assert f"{pooled:.3f}" != f"{mean:.3f}"


@pytest.mark.skipif(not SHARED.exists(), reason=f"the authors' photographs are not in {SHARED}")
def test_the_real_row_runs_on_the_authors_photographs(tmp_path, monkeypatch, capsys):
    given = ["dataset", "--data", SHARED, "--clip", clip_folder(), "--dino", dino_folder()]
    names = [f.name for f in sorted(SHARED.iterdir()) if f.is_dir()]
    given += ["--output_dir", tmp_path, "--device", "cpu", "--subjects", ",".join(names[:4])]
    status, out, err = run(monkeypatch, capsys, *given)
    assert status == 0, err
    assert "4 of 30 subjects" in out
    rows = read_csv(tmp_path / "subjects.csv")
    assert [r["subject"] for r in rows] == 2 * names[:4]
    assert all(0 < float(r["DINO"]) <= 1 and 0 < float(r["CLIP-I"]) <= 1 for r in rows)


@pytest.mark.weights
def test_the_published_real_row():
    """The whole data set (MINIBOOTH_DREAMBOOTH: a checkout of google/dreambooth) with the public
    CLIP and DINO; with self-pairs, which the paper does not state."""
    data = os.environ.get("MINIBOOTH_DREAMBOOTH")
    if not data:
        pytest.skip("MINIBOOTH_DREAMBOOTH names no checkout of google/dreambooth")
    found, absent = subjects.find(data)
    assert not absent and len(found) == 30
    for repo_id in (CLIP_ID, DINO_ID):
        if not isinstance(huggingface_hub.try_to_load_from_cache(repo_id, "config.json"), str):
            pytest.skip(f"{repo_id} is not in the hub's cache")
    judge = judges.load(Options())
    rows = []
    for subject in found:
        files = sorted(subject.folder.iterdir())
        real = [Image.open(f) for f in files if f.suffix in (".jpg", ".png")]
        rows.append(metrics.real_rows(judge, real, [True])[True])
    mean = metrics.average(rows, "subjects")
    measured = [mean["DINO"], mean["CLIP-I"]]
    # Others' reruns differ from the paper by up to .014.
    assert test_weights.judge("real photographs", CLIP_ID, measured, [0.774, 0.885], 0.02)


# ---- one subject -------------------------------------------------------------------------------


def test_pictures_of_minibooth_sample_say_what_they_were_drawn_for(
    tmp_path, monkeypatch, capsys, with_lpips
):
    prompts = ("a sks dog in the snow", "a sks dog", "a dog")
    settings = {"steps": 1, "num_images": 2, "device": "cpu", "output_dir": str(tmp_path / "s")}
    model = str(peers.model()[0])
    written = sample.sample(sample.SampleConfig(model=model, prompt=prompts, **settings))
    config = options(
        single.SingleConfig,
        real=str(runs.photographs()),
        generated=str(tmp_path / "s"),
        class_prompt="a dog",
        output_dir=str(tmp_path / "out"),
    )
    scores = single.evaluate(config)
    real = [Image.open(f) for f in sorted(runs.photographs().iterdir())]
    images = [Image.open(f) for f in written]
    texts = ["a dog in the snow"] * 2 + ["a dog"] * 2
    pictures = [Picture(*row) for row in zip(images[:4], "aabb", texts, strict=True)]
    want = metrics.score(with_lpips, real, pictures, images[4:])
    assert scores.keys() == want.keys() == set(metrics.METRICS)
    for metric, mean in want.items():
        assert scores[metric].value == pytest.approx(mean.value, abs=1e-6)
        assert scores[metric].pairs == mean.pairs
    assert "3 photographs, 4 pictures, 2 of the bare class" in capsys.readouterr().out

    # The same from the model itself: the same pictures, so the same numbers.
    given = ["--real", runs.photographs(), "--generated", model, "--class_prompt", "a dog"]
    given += ["--prompt", prompts[0], "--prompt", prompts[1], "--images", 2, "--class_images", 2]
    given += ["--clip", clip_folder(), "--dino", dino_folder(), "--steps", 1, "--device", "cpu"]
    given += ["--output_dir", tmp_path / "drawn"]
    status, out, err = run(monkeypatch, capsys, *given)
    assert status == 0, err
    again = json.loads((tmp_path / "drawn" / "scores.json").read_text())["scores"]
    for metric, mean in scores.items():
        assert again[metric]["value"] == pytest.approx(mean.value, abs=1e-3)
        assert re.search(rf"^{metric} +{again[metric]['value']:.3f} ", out, re.M)
    assert (tmp_path / "drawn" / "grid.png").exists()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "drawn").rglob("*-*.png")}
    assert len(before) == 6
    assert run(monkeypatch, capsys, *given)[0] == 0
    assert before == {f: f.stat().st_mtime_ns for f in before}
    status, _, err = run(monkeypatch, capsys, *given, "--guidance_scale", 3)
    assert status == 2 and "guidance_scale was 7.5 and is 3.0" in err and err.count("\n") == 1


def test_a_workflow_of_another_program_is_no_prompt(tmp_path, capsys):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("prompt", '{"3": {"class_type": "KSampler"}}')
    for i in range(2):
        noise(i).save(tmp_path / f"{i}.png", pnginfo=info)
    given = {"real": str(tmp_path), "generated": str(tmp_path)}
    config = options(single.SingleConfig, **given, output_dir=str(tmp_path / "out"))
    assert "CLIP-T" not in single.evaluate(config)
    out = capsys.readouterr().out
    assert "CLIP-T left out: the pictures do not say" in out
    assert "PRES left out: no picture of the bare class" in out


@pytest.mark.parametrize(
    "given, said",
    [
        (["--real", "x"], "give --real"),
        (["--real", "nowhere", "--generated", "x"], "nowhere does not exist"),
        (["--images", 0], "--images must be at least 1"),
        (["--resize", 100], "--resize must be"),
        (["--identifier", "s ks"], "--identifier must be one word"),
        (["dataset"], "give --data"),
        (["dataset", "--data", "nowhere"], "nowhere holds no prompts_and_classes.txt"),
        (["dataset", "--data", "x", "--tables", "1,2"], "--tables '2': give some of 1, 3, 4"),
        (["dataset", "--data", "x", "--prompts", 0], "--prompts must be at least 1"),
        (["snapshots"], "give --run"),
        (["snapshots", "--run", "nowhere"], "nowhere is not the folder of a run"),
        (["datasets"], "unrecognized arguments: datasets"),
    ],
)
def test_mistakes_are_one_line(given, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(monkeypatch, capsys, *given)
    assert status == 2 and said in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize("name", program.COMMANDS)
def test_help_names_every_setting(name, monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, *([name] if name else []), "--help")
    assert status == 0
    assert out.startswith(f"usage: python -m minibooth.evaluate {name}".rstrip())
    for field in fields(program.COMMANDS[name][0]):
        assert re.search(rf"^  --{field.name}\b", out, re.MULTILINE)


# ---- the protocol on a toybox with random weights ----------------------------------------------

CHOSEN = "spotted_dog,snail"
ARMS = ("with_prior", "without_prior", "no_noun", "wrong_noun")


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Settings of a run of two steps, for --train_config."""
    path = tmp_path_factory.mktemp("training") / "config.json"
    settings = {"max_train_steps": 2, "checkpointing_steps": 1, "learning_rate": 1e-3}
    settings |= {"num_class_images": 2, "class_steps": 1, "sample_batch_size": 2}
    path.write_text(json.dumps(settings | {"train_batch_size": 1}))
    return path


def command(training, out, *more):
    given = ["dataset", "--model", "toybox", "--subjects", CHOSEN, "--prompts", 2, "--images", 2]
    given += ["--class_images", 2, "--steps", 1, "--device", "cpu", "--train_config", training]
    return [str(x) for x in (*given, "--output_dir", out, *more)]


@pytest.fixture(scope="module")
def whole(toybox_folder, training, tmp_path_factory):
    """The protocol in one go, and the training of each subject as it was asked for."""
    folder, asked = tmp_path_factory.mktemp("whole"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "toybox", lambda: toybox_folder)
        patch.setattr(sys, "argv", ["minibooth.evaluate", *command(training, folder)])
        patch.setattr(protocol, "train", lambda c: asked.append(c) or train.train(c))
        program.main()
    return folder, asked


def test_the_protocol_trains_every_subject_in_every_way(whole, toybox_folder):
    folder, asked = whole
    assert len(asked) == 8
    by_arm = {arm: asked[2 * i : 2 * i + 2] for i, arm in enumerate(ARMS)}
    for arm in ARMS:
        dog, snail = by_arm[arm]
        assert Path(dog.instance_data_dir) == toybox_folder / "subjects" / "spotted_dog"
        assert Path(snail.instance_data_dir) == toybox_folder / "subjects" / "snail"
        assert dog.uses_prior == (arm == "with_prior") and dog.max_train_steps == 2
    assert by_arm["with_prior"][0].instance_prompt == "a sks dog"
    assert by_arm["with_prior"][0].class_prompt == "a dog"
    assert by_arm["no_noun"][1].instance_prompt == "a sks"
    nouns = {s.kind for s in world.SUBJECTS.values()}
    wrong = by_arm["wrong_noun"][0].instance_prompt.removeprefix("a sks ")
    assert wrong in nouns - {"dog"}
    names = {f.name for f in (folder / "wrong_noun" / "spotted_dog" / "pictures").iterdir()}
    assert f"a-sks-{wrong}-on-the-grass-0.png" in names
    assert not list(folder.rglob("model"))  # a trained model is not kept


def test_the_protocol_writes_scores_tables_and_grids(whole, toybox):
    folder, _ = whole
    judge = judges.load(options(judge="toybox"))
    rows = read_csv(folder / "subjects.csv")
    assert len(rows) == 2 * (2 + len(ARMS))
    table = (folder / "tables.md").read_text()
    for arm in ARMS:
        dino = []
        for name in CHOSEN.split(","):
            place = folder / arm / name
            pictures = sorted((place / "pictures").iterdir())
            assert len(pictures) == 4 and len(list((place / "class").iterdir())) == 2
            seen = judge.image_features([Image.open(f) for f in pictures], "dino")
            real = sorted((toybox / "subjects" / name).iterdir())
            truth = judge.image_features([Image.open(f) for f in real], "dino")
            dino.append(np.mean([cosine(a, b) for a in seen for b in truth]))
            [row] = [r for r in rows if (r["row"], r["subject"]) == (arm, name)]
            assert float(row["DINO"]) == pytest.approx(dino[-1], abs=1e-5)
            assert all(row[metric] for metric in metrics.METRICS)
            with Image.open(place / "grid.png") as grid:
                assert grid.size[0] > 5 * drawing.CELL and grid.size[1] > 3 * drawing.CELL
        assert f"| {np.mean(dino):.3f} |" in table
    for line in (
        "## Table 1: fidelity (2 of 5 subjects, 2 prompts, 2 pictures of each)",
        "DreamBooth (paper: SD)",
        "## Table 3",
        "0.493 |",
        "## Table 4",
        "class noun: wrong",
        "not the paper's numbers",
    ):
        assert line in table
    assert re.search(r"0\.668 \| +0\.803 \| +0\.305 \|\n", table)


MOMENTS = [
    "step 2",  # in the training of the first subject
    "before a-sks-dog-on-the-beach-1.png",
    "remove .model.tmp",
    "before scores.json",
    "after grid.png",
    "before tables.md",
]


def kill(folder, moment, given, toybox):
    """Start the program and let it kill itself; what it said."""
    log = folder.parent / f"{folder.name}.log"
    process = child.start(given, moment, log, "minibooth.evaluate", toybox)
    process.join()
    assert process.exitcode == -signal.SIGKILL, (moment, log.read_text())
    return log.read_text()


def test_killed_at_any_moment_it_goes_on_and_does_nothing_twice(
    whole, toybox, training, tmp_path, monkeypatch, capsys
):
    folder, kept, said = tmp_path / "killed", {}, []
    given = command(training, folder, "--tables", "1")
    for moment in MOMENTS:
        said.append(kill(folder, moment, given, toybox))
        now = {f: f.stat().st_mtime_ns for f in folder.rglob("[a-z]*-*.png")}
        assert all(now[f] == kept[f] for f in kept), moment
        kept = now
    assert re.search(r"training: +50%", said[1])  # it went on where it was killed
    assert re.search(r"training: +0%", said[0]) and not re.search(r"training: +0%", said[1])
    assert not any("training:" in log for log in said[2:5])  # and was not done again

    def never(*args, **kwargs):
        raise AssertionError("this was done already")

    monkeypatch.setattr(protocol, "train", never)
    monkeypatch.setattr(protocol, "score", never)
    monkeypatch.setattr(drawing, "draw", never)
    assert run(monkeypatch, capsys, *given)[0] == 0
    of_table_1 = ("with_prior", "class_images", "settings.json")
    expected = {f for f in runs.files(whole[0]) if f.startswith(of_table_1)}
    assert runs.files(folder) == expected | {"subjects.csv", "tables.md"}
    for name in sorted(expected):
        assert (folder / name).read_bytes() == (whole[0] / name).read_bytes(), name
    rows = read_csv(whole[0] / "subjects.csv")
    rows = [r for r in rows if r["row"].startswith(("real", "with_prior"))]
    assert read_csv(folder / "subjects.csv") == rows


def test_more_pictures_need_a_model_again_and_other_settings_another_folder(
    whole, toybox, training, tmp_path, monkeypatch, capsys
):
    folder, asked = tmp_path / "out", []
    shutil.copytree(whole[0], folder)
    old = {f: f.stat().st_mtime_ns for f in folder.rglob("[a-z]*-*.png")}
    monkeypatch.setattr(protocol, "train", lambda c: asked.append(c) or train.train(c))
    more = ["--subjects", "snail", "--tables", "1", "--images", 3]
    status, out, err = run(monkeypatch, capsys, *command(training, folder, *more))
    assert status == 0, err
    assert len(asked) == 1 and "1 of 5 subjects, 2 prompts, 3 pictures" in out
    assert "Table 3" not in out
    assert all(f.stat().st_mtime_ns == time for f, time in old.items())
    assert len(list((folder / "with_prior" / "snail" / "pictures").iterdir())) == 6

    slower = tmp_path / "slower.json"
    slower.write_text(training.read_text().replace("0.001", "0.0001"))
    for change, said in (
        (["--steps", 2], "steps was 1 and is 2"),
        (["--identifier", "zwx"], "identifier was 'sks' and is 'zwx'"),
        (["--train_config", slower], "training's learning_rate was 0.001 and is 0.0001"),
    ):
        status, _, err = run(monkeypatch, capsys, *command(training, folder, *change))
        assert status == 2 and said in err and err.count("\n") == 1
    (folder / "with_prior" / "snail" / "scores.json").write_text("{")
    status, _, err = run(monkeypatch, capsys, *command(training, folder, *more))
    assert status == 0 and len(asked) == 1, err  # measured again, not trained again


def test_another_judge_measures_the_pictures_that_are_there(
    whole, toybox, training, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "out"
    shutil.copytree(whole[0], folder)
    monkeypatch.setattr(protocol, "train", lambda c: pytest.fail("nothing is to be trained"))
    public = ["--judge", "public", "--clip", clip_folder(), "--dino", dino_folder()]
    public += ["--tables", "1"]
    status, _, err = run(monkeypatch, capsys, *command(training, folder, *public))
    assert status == 0, err
    rows = read_csv(folder / "subjects.csv")
    [row] = [r for r in rows if (r["row"], r["subject"]) == ("with_prior", "snail")]
    real = sorted((toybox / "subjects" / "snail").iterdir())
    drawn = sorted((folder / "with_prior" / "snail" / "pictures").iterdir())
    seen, truth = (peer_features([Image.open(f) for f in x], "clip") for x in (drawn, real))
    want = np.mean([cosine(a, b) for a in seen for b in truth])
    assert float(row["CLIP-I"]) == pytest.approx(want, abs=1e-5)
    texts = peer_texts(["a snail on the grass"] * 2 + ["a snail on the beach"] * 2)
    order = sorted(range(4), key=lambda i: "beach" in drawn[i].name)
    want = np.mean([cosine(seen[i], text) for i, text in zip(order, texts, strict=True)])
    assert float(row["CLIP-T"]) == pytest.approx(want, abs=1e-5)


def test_the_settings_of_the_toybox_are_its_own(toybox, monkeypatch, capsys, training, tmp_path):
    given = {"model": "toybox"}
    assert program.toybox_settings(given) == {
        **{"judge": "toybox", "steps": 25, "guidance_scale": 4.0, "batch_size": 16},
        "data": str(toybox / "subjects"),
    }
    assert program.toybox_settings({"model": "x"}) == {}
    assert "data" not in program.toybox_settings({"generated": "toybox"})
    config = protocol.DatasetConfig(model="toybox", data=str(toybox / "subjects"))
    settings = protocol.training_settings(config)
    assert settings["max_train_steps"] == 200 and settings["train_batch_size"] == 4
    assert settings["model"] == str(toybox) and settings["num_validation_images"] == 0
    (tmp_path / "c.json").write_text('{"prior_loss_weight": 0.0}')
    changed = [*command(training, tmp_path / "x"), "--train_config", str(tmp_path / "c.json")]
    status, _, err = run(monkeypatch, capsys, *changed)
    assert status == 2 and "prior_loss_weight must be above 0" in err


# ---- when to stop ------------------------------------------------------------------------------


def test_every_snapshot_of_a_run_is_a_point_of_the_curve(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    train.train(runs.config(out, max_train_steps=3, checkpointing_steps=1))
    given = ["snapshots", "--run", out, "--steps", 1, "--images", 2, "--class_images", 2]
    given += ["--clip", clip_folder(), "--dino", dino_folder(), "--device", "cpu"]
    status, said, err = run(monkeypatch, capsys, *given)
    assert status == 0, err
    rows = read_csv(out / "evaluation" / "curve.csv")
    assert [r["step"] for r in rows] == ["0", "1", "2", "3"]
    real = [Image.open(f) for f in sorted(runs.photographs().iterdir())]
    truth = peer_features(real, "dino")
    for row in rows:
        folder = out / "evaluation" / f"step-{int(row['step']):05d}"
        for metric, part, count in (("DINO", "pictures", 8), ("PRES", "class", 2)):
            drawn = sorted((folder / part).iterdir())
            assert len(drawn) == count
            seen = peer_features([Image.open(f) for f in drawn], "dino")
            want = np.mean([cosine(a, b) for a in seen for b in truth])
            assert float(row[metric]) == pytest.approx(want, abs=1e-5)
    assert len({r["DINO"] for r in rows}) == 4
    with Image.open(out / "evaluation" / "curve.png") as image:
        colours = {c for _, c in image.getcolors(2**20)}
    assert {snapshots.COLOURS[m] for m in ("DINO", "CLIP-I", "CLIP-T", "PRES")} <= colours
    assert snapshots.COLOURS["DIV"] not in colours  # no lpips here
    assert "stop where DINO" in said and "paper's" not in said

    before = {f: f.stat().st_mtime_ns for f in out.rglob("*-*.png")}
    monkeypatch.setattr(drawing, "load_model", lambda *_: pytest.fail("all is drawn"))
    assert run(monkeypatch, capsys, *given)[0] == 0
    assert before == {f: f.stat().st_mtime_ns for f in before}


def test_a_run_without_models_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"model": "x", "instance_prompt": "a sks dog"}')
    with pytest.raises(UserError, match="neither a snapshot"):
        snapshots.stages(tmp_path, train.TrainConfig())
    assert saved.found(tmp_path) == []
