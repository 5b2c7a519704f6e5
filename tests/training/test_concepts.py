"""Several subjects in one run, and photographs with captions of their own."""

import json
import shutil

import pytest
import runs
import torch

from minibooth import UserError, dreambooth, train
from minibooth.common import cli
from minibooth.training import data, report, subjects
from minibooth.training.settings import TrainConfig

# ---- what is read -------------------------------------------------------------------------------

DOG = {"instance_data_dir": "d", "instance_prompt": "a sks dog", "class_prompt": "a dog"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is no JSON file"),
        ("{}", "is no list of subjects"),
        ("[]", "is no list of subjects"),
        ('["dog"]', "list.json, 1: 'dog' is no subject"),
        (json.dumps([DOG, {"instance_prompt": "a cat"}]), "list.json, 2 lacks instance_data_dir"),
        (json.dumps([DOG | {"instance_prompt": None}]), "1 lacks instance_prompt"),
        (json.dumps([DOG | {"class_prompt": 3}]), "class_prompt = 3 is no text"),
        (json.dumps([DOG | {"prompt": "x"}]), "a subject has no 'prompt', but instance_data_dir"),
        (json.dumps([DOG, {k: DOG[k] for k in list(DOG)[:2]}]), "'a sks dog' lacks class_prompt"),
    ],
)
def test_a_bad_list_is_refused_in_one_line(text, message, tmp_path):
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        TrainConfig(concepts_list=str(path)).check()
    assert "\n" not in str(error.value)


def test_a_list_stands_in_the_place_of_one_subject(tmp_path):
    path = tmp_path / "list.json"
    cat = {"instance_data_dir": "c", "instance_prompt": "a ohwx cat", "class_prompt": "a cat"}
    path.write_text(json.dumps([DOG, cat | {"class_data_dir": "cats"}]))
    config = TrainConfig(concepts_list=str(path))
    config.check()
    assert [s.class_data_dir for s in config.subjects] == [None, "cats"]
    assert config.prompts == ["a sks dog", "a ohwx cat", "a dog", "a cat"]
    assert config.grid_prompts == ["a dog", "a cat", "a sks dog", "a ohwx cat"]
    with pytest.raises(UserError, match="--class_prompt is of one subject"):
        TrainConfig(concepts_list=str(path), class_prompt="a dog").check()
    with pytest.raises(UserError, match="No such file"):
        TrainConfig(concepts_list=str(tmp_path / "none.json")).check()


def test_captions_are_the_first_lines_of_texts_named_alike(tmp_path):
    files = [tmp_path / name for name in ("1.jpg", "2.PNG", "3.tar.jpg")]
    (tmp_path / "1.txt").write_text("\n a sks dog, asleep \nby me\n", encoding="utf-8")
    (tmp_path / "3.tar.txt").write_text("sks – awake", encoding="utf-8")
    for extension in (".txt", "txt"):
        assert subjects.captions(files, extension) == ["a sks dog, asleep", None, "sks – awake"]
    assert subjects.captions(files, None) == [None] * 3
    assert "2 of 3 photographs have a .txt" in subjects.about_captions(files, [None] * 3, False)
    (tmp_path / "2.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"2.txt is empty: write"):
        subjects.captions(files, ".txt")
    (tmp_path / "2.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"2.txt is no text in UTF-8"):
        subjects.captions(files, ".txt")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_text_in_utf_16_is_named_as_such(encoding, tmp_path):
    (tmp_path / "1.txt").write_text("a sks dog", encoding)
    (tmp_path / "list.json").write_text(json.dumps([DOG]), encoding)
    with pytest.raises(UserError, match=r"1.txt is no text in UTF-8: .*it is UTF-16, save it"):
        subjects.captions([tmp_path / "1.jpg"], ".txt")
    with pytest.raises(UserError, match=r"list.json is no JSON file: .*it is UTF-16, save it"):
        subjects.read_list(tmp_path / "list.json")


def test_the_byte_order_mark_of_windows_is_no_part_of_a_text(tmp_path):
    """U+FEFF at the front of a caption is three tokens of CLIP's."""
    (tmp_path / "1.txt").write_text("a sks dog", "utf-8-sig")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.jpg", "text": "x"}', "utf-8-sig")
    (tmp_path / "list.json").write_text(json.dumps([DOG]), "utf-8-sig")
    (tmp_path / "config.json").write_text('{"seed": 3}', "utf-8-sig")
    assert subjects.captions([tmp_path / "1.jpg"], ".txt") == ["a sks dog"]
    assert subjects.captions([tmp_path / "1.jpg"], None, "text") == ["x"]
    assert subjects.read_list(tmp_path / "list.json")[0].instance_prompt == "a sks dog"
    assert cli.read_config(tmp_path / "config.json", TrainConfig) == {"seed": 3}


def test_captions_are_a_column_of_the_folder_s_table(tmp_path):
    files = [tmp_path / name for name in ("1.jpg", "2.png", "3.jpg")]
    rows = [{"file_name": "3.jpg", "text": " sks,\u2028awake ", "x": 1}]
    rows += [{"file_name": "1.jpg", "text": "a sks dog"}, {"file_name": "9.jpg", "text": "gone"}]
    table = tmp_path / "metadata.jsonl"
    table.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    found = subjects.captions(files, None, "text")
    assert found == ["a sks dog", None, "sks,\u2028awake"]
    assert "2 of 3 photographs have a caption" in subjects.about_captions(files, found, True)
    for text, said in [
        ("{", "metadata.jsonl cannot be read: Expecting"),
        ("\n[1]\n", "metadata.jsonl, entry 1 has no text as 'file_name'"),
        ('{"file_name": "1.jpg", "text": null}', "entry 1 has no text as 'text'"),
        ('{"file_name": "1.jpg", "text": " "}', "entry 1 has no text as 'text'"),
    ]:
        table.write_text(text)
        with pytest.raises(UserError, match=said) as error:
            subjects.captions(files, None, "text")
        assert "\n" not in str(error.value)
    table.unlink()
    with pytest.raises(UserError, match=r"--caption_column: .* cannot be read: .*No such file"):
        subjects.captions(files, None, "text")
    with pytest.raises(UserError, match="exclude each other"):
        TrainConfig(**DOG, caption_extension=".txt", caption_column="text").check()


# ---- what is drawn ------------------------------------------------------------------------------


def latents(photo):
    zeros = torch.zeros(len(photo), 1, 1, 1)
    return data.Latents(zeros, zeros, torch.tensor(photo), torch.zeros(len(photo), 6))


def batches(shown, size=3, photo=(0, 1, 1, 1, 2, 3), images=7):
    where = 9, 0, size, torch.device("cpu"), (), shown
    return data.Batches(latents(photo), latents(range(images)), *where)


def test_class_images_are_those_of_the_photograph_s_subject_each_once_before_any_again():
    of_photo, of_class = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1, 1, 1])
    some, seen = batches((of_photo, of_class)), {0: [], 1: []}
    for n in range(70):
        photo = some.instance.photo[some.rows(some.instance, "instance", n)]
        images = some.rows(some.prior, "class", n)
        assert torch.equal(of_photo[photo], of_class[images])
        for image in images.tolist():
            seen[int(of_class[image])].append(image)
    for subject, images in seen.items():
        own = (of_class == subject).nonzero().flatten().tolist()
        epochs = [images[i : i + len(own)] for i in range(0, 100, len(own))]
        assert all(sorted(epoch) == own for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1


def test_one_subject_is_drawn_as_ever():
    plain = batches(())
    one = batches((torch.zeros(4, dtype=torch.int64), torch.zeros(7, dtype=torch.int64)))
    for n in range(20):
        assert torch.equal(one.rows(one.prior, "class", n), plain.rows(plain.prior, "class", n))


# ---- whole runs ---------------------------------------------------------------------------------


def test_captions_that_do_not_name_the_subject_are_warned_of():
    one = [subjects.Subject("d", "a sks dog", "a dog"), subjects.Subject("c", "a zwx cat", "a cat")]
    said = ["A SKS dog, asleep", None, "a zwx cat.", "my dog", "a sks cat"]
    with pytest.warns(UserWarning, match="2 captions do not name their subject, as 'my dog'"):
        report.check_captions(one, [0, 0, 1, 0, 1], said)


@pytest.fixture
def two(tmp_path):
    """A list of two subjects, and captions of two of the first one's photographs."""
    shutil.copytree(runs.photographs(), tmp_path / "dog")
    (tmp_path / "cat").mkdir()
    shutil.copy(runs.photographs() / "2.png", tmp_path / "cat")
    (tmp_path / "dog" / "0.txt").write_text("a sks dog in the snow")
    (tmp_path / "dog" / "1.txt").write_text("photo of sks dog")
    cat = {"instance_prompt": "a sks cat", "class_prompt": "a cat"}
    dog = DOG | {"instance_data_dir": str(tmp_path / "dog")}
    path = tmp_path / "list.json"
    path.write_text(json.dumps([dog, cat | {"instance_data_dir": str(tmp_path / "cat")}]))
    one = ("instance_data_dir", "instance_prompt", "class_prompt", "class_data_dir")
    return dict.fromkeys(one) | {"concepts_list": str(path), "caption_extension": ".txt"}


SAID = {  # by photograph, in the order of the list
    "photographs": ["a sks dog in the snow", "photo of sks dog", "a sks dog", "a sks cat"],
    "classes": ["a dog", "a dog", "a dog", "a cat"],
}


@pytest.mark.parametrize("text", [False, True])
def test_each_photograph_comes_under_its_own_words(text, two, tmp_path, monkeypatch, capsys):
    seen, step = [], dreambooth.step
    monkeypatch.setattr(
        dreambooth, "step", lambda *args: seen.append((args[2], args[3])) or step(*args)
    )
    few = {"train_batch_size": 2, "max_train_steps": 3, "num_class_images": 2, "resolution": 16}
    few |= {"train_text_encoder": text, "text_encoder_learning_rate": 1e-30}
    out = tmp_path / "out"
    sd = train.train(runs.config(out, **two | few))
    said = capsys.readouterr().out
    assert "2 of 4 photographs have a caption, the others the instance prompt" in said
    encode, drawn = runs.model().encode_prompt, set()
    picked = latents((0, 1, 1, 1, 2, 3))  # the crops of runs.photographs, and of one of them again
    for n, (instance, prior) in enumerate(seen):
        photo = picked.photo[data.pick(picked, 0, "instance", n, 2)]
        for term, words in ((instance, SAID["photographs"]), (prior, SAID["classes"])):
            prompts = [words[i] for i in photo.tolist()]
            torch.testing.assert_close(term.c.context, encode(prompts), atol=1e-5, rtol=1e-5)
            drawn.update(prompts)
    assert len(drawn) == 6  # all there are
    assert len(list((out / "class_images").iterdir())) == 4
    assert "# a sks dog, a sks cat" in (out / "README.md").read_text()
    assert sd.generate(["a sks cat"], steps=1, output="latent").isfinite().all()

    again = {"resume_from_checkpoint": "latest", "max_train_steps": 4}
    (tmp_path / "dog" / "1.txt").write_text("photo of sks dog in the snow")
    with pytest.raises(UserError, match=r"cannot resume .*: the prompts changed"):
        train.train(runs.config(out, **two | few | again))


def test_a_word_is_trained_under_captions_that_have_it(two, tmp_path):
    word = {"method": "textual_inversion", "placeholder_token": "<dog>"}
    word |= {"initializer_token": "dog", "instance_prompt": "a <dog>", "class_prompt": None}
    word |= {"instance_data_dir": str(tmp_path / "dog"), "caption_extension": ".txt"}
    with pytest.raises(UserError, match=r"0.png does not have the word that is trained, <dog>"):
        train.train(runs.config(tmp_path / "out", **word))
    for name in ("0", "1"):
        (tmp_path / "dog" / f"{name}.txt").write_text(f"a <dog> {name}")
    train.train(runs.config(tmp_path / "out", max_train_steps=2, resolution=16, **word))
    with pytest.raises(UserError, match="learns one word: no --concepts_list"):
        train.train(
            runs.config(
                tmp_path / "out2",
                **two
                | {"method": "textual_inversion"}
                | {"placeholder_token": "<dog>", "initializer_token": "dog"},
            )
        )
