"""The data set of the paper."""

import shutil

import pytest
from small_judges import CLASSES, SHARED, make_dataset

from minibooth import UserError
from minibooth.evaluate import subjects
from minibooth.toybox import world


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
