"""What looks at the pictures: CLIP, DINO, LPIPS, and what can be missing."""

import json
import re
import shutil
import sys
import types

import huggingface_hub
import pytest
import tiny
from safetensors.torch import load_file, save_file
from small_judges import CLIP_ID, Lpips, clip_folder, cosine, dino_folder, noise, options, run

from minibooth import UserError
from minibooth.evaluate import judges, subjects
from minibooth.toybox import judge as toy
from minibooth.toybox import world


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


@pytest.mark.parametrize("cached", [True, False])
def test_the_hub_is_asked_for_what_is_not_in_its_cache_alone(cached, monkeypatch):
    asked = []

    class Model:
        @staticmethod
        def from_pretrained(source, local_files_only):
            asked.append(local_files_only)
            if local_files_only and not cached:
                raise OSError("a file is not in the cache")
            return "it"

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: "/x/config.json")
    assert judges.read(Model, CLIP_ID, "CLIP") == "it"
    assert asked == ([True] if cached else [True, False])


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
