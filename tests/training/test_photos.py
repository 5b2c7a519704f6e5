"""Every kind of file against pixels known beforehand, crops against their own formula."""

from pathlib import Path

import numpy as np
import torch
from picture_files import BLUE, GREEN, RED, YELLOW, as_tensor, box_of, error_of, noise
from PIL import Image

from minibooth.common import sheets
from minibooth.common.pictures import read_image
from minibooth.common.sheets import grid
from minibooth.training.photos import Photos, contact_sheet, image_files, load_photos


def test_only_visible_image_files_directly_in_the_folder_are_taken_in_order_of_name(tmp_path):
    wanted = ["B.JPG", "a.jpeg", "b.HeIc", "c.png", "d.webp", "e.tif", "f.avif", "g.mpo", "h.jfif"]
    other = [".DS_Store", "._a.jpeg", ".hidden.png", "notes.txt", "raw.cr2", "jpg", "model.png.zip"]
    for name in reversed(wanted + other):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "inside.jpg").touch()
    assert image_files(str(tmp_path)) == [tmp_path / name for name in wanted]


def test_a_missing_folder_a_file_and_a_folder_without_images_are_named(tmp_path):
    missing = tmp_path / "nowhere"
    assert str(missing) in error_of(image_files, missing)
    assert "does not exist" in error_of(image_files, missing)

    file = tmp_path / "photo.jpg"
    file.touch()
    assert f"{file} is a file" in error_of(image_files, file)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "nothing" in error_of(image_files, empty)

    for name in ("a.txt", "b.txt", "c.txt", "d.txt", "e.txt"):
        (empty / name).touch()
    assert "a.txt, b.txt, c.txt and 2 more" in error_of(load_photos, empty, 16)

    parent = tmp_path / "parent"
    (parent / "dog").mkdir(parents=True)
    assert "dog/" in error_of(image_files, parent)


def test_photographs_far_below_the_resolution_are_warned_of(tmp_path, recwarn):
    for name, side in (("a.png", 40), ("b.png", 33), ("c.png", 32)):
        Image.new("RGB", (side, 50), "red").save(tmp_path / name)
    load_photos(tmp_path, 64)
    said = "1 of 3 photographs are enlarged to twice their size and more"
    assert str(recwarn.pop().message).startswith(said) and not recwarn.list


def test_a_large_jpeg_is_decoded_small_but_not_smaller_than_asked(tmp_path):
    path = tmp_path / "large.jpg"
    y, x = np.mgrid[:600, :800]
    waves = np.stack([np.sin(x / 6), np.sin(y / 6), np.sin((x + y) / 12)], axis=-1)
    Image.fromarray((127.5 + 90 * waves).astype(np.uint8)).save(path, quality=95)
    assert read_image(path).size == (800, 600)
    assert read_image(path, min_side=301).size == (800, 600)
    assert read_image(path, min_side=300).size == (400, 300)
    assert read_image(path, min_side=100).size == (200, 150)

    decoded_small = load_photos([path], 64, center_crop=True).images
    full = np.asarray(read_image(path).resize((85, 64), Image.Resampling.LANCZOS))[:, 10:74]
    error = (decoded_small[0].permute(1, 2, 0) + 1) * 127.5 - full.astype(np.float32)
    assert error.abs().max() <= 4
    assert error.abs().mean() <= 1


def save_png(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path)
    return path


def test_a_square_photograph_at_its_own_size_is_not_resampled(tmp_path):
    array = noise(16, 16)
    array[0, 0], array[0, 1] = 0, 255
    loaded = load_photos([save_png(tmp_path / "square.png", array)], 16)
    assert loaded.images.shape == (1, 3, 16, 16)
    assert loaded.images.dtype == torch.float32
    assert loaded.images.is_contiguous()
    assert torch.equal(loaded.images[0], as_tensor(array))
    assert loaded.images.min() == -1
    assert loaded.images.max() == 1


def test_wide_and_tall_photographs_give_the_first_middle_and_last_square(tmp_path):
    wide = noise(16, 51)  # 35 to spare: offsets 0, 17 and 35
    files = [
        save_png(tmp_path / "wide.png", wide),
        save_png(tmp_path / "tall.png", wide.swapaxes(0, 1).copy()),
    ]
    loaded = load_photos(files, 16)
    expected = [as_tensor(wide[:, x : x + 16]) for x in (0, 17, 35)]
    expected += [crop.transpose(1, 2) for crop in expected]
    assert torch.equal(loaded.images, torch.stack(expected))
    assert loaded.photo.tolist() == [0, 0, 0, 1, 1, 1]

    centre = load_photos(files, 16, center_crop=True)
    assert torch.equal(centre.images, torch.stack([expected[1], expected[4]]))
    assert centre.photo.tolist() == [0, 1]


def test_crops_of_a_resized_gradient_lie_where_they_should(tmp_path):
    # Value x at pixel x. Halved, pixel j covers 2j and 2j + 1, so it must hold about 2j + 0.5.
    gradient = np.repeat(np.arange(240, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    loaded = load_photos([save_png(tmp_path / "wide.png", gradient)], 32)
    levels = (loaded.images + 1) * 127.5  # (3, 3, 32, 32)
    for crop, offset in zip(levels, (0, 44, 88), strict=True):  # 120 wide, 88 to spare
        expected = (2 * torch.arange(offset, offset + 32) + 0.5).expand(3, 32, 32)
        torch.testing.assert_close(crop, expected, atol=1.01, rtol=0)


def test_resizing_averages_fine_stripes(tmp_path):
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    loaded = load_photos([save_png(tmp_path / "stripes.png", stripes)], 32)
    assert loaded.images[..., 2:-2].abs().max() < 0.05  # grey, where picking pixels gives ±1


def test_a_nearly_square_photograph_gives_only_its_middle(tmp_path):
    nearly, wider = noise(100, 105), noise(100, 106)
    loaded = load_photos([save_png(tmp_path / "a.png", nearly)], 100)
    assert torch.equal(loaded.images, as_tensor(nearly[:, 2:102])[None])
    assert len(load_photos([save_png(tmp_path / "b.png", wider)], 100)) == 3


def test_each_crop_has_the_size_of_its_photograph_and_its_own_corner(tmp_path):
    """SDXL is told them: height, width, as one looks at it; top, left of the crop in what it was
    resized to; and of a mirrored photograph, where what was left of the crop is right of it."""
    Image.new("RGB", (90, 40)).save(tmp_path / "a wide.png")
    Image.new("RGB", (30, 33)).save(tmp_path / "b tall.png")
    Image.new("RGB", (400, 1001)).save(tmp_path / "c large.jpg")  # decoded at an eighth of its size
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°: 80 high and 33 wide
    Image.new("RGB", (80, 33)).save(tmp_path / "d turned.jpg", exif=exif)
    photos = load_photos(tmp_path, 20)
    assert photos.photo.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert photos.sizes.tolist() == [
        # 90×40 becomes 45×20; 30×33, 20×22; 400×1001, 20×50; 33×80, 20×48
        *([40, 90, 0, left, 20, 20] for left in (0, 12, 25)),
        *([33, 30, top, 0, 20, 20] for top in (0, 1, 2)),
        *([1001, 400, top, 0, 20, 20] for top in (0, 15, 30)),
        *([80, 33, top, 0, 20, 20] for top in (0, 14, 28)),
    ]
    mirrored = photos.sizes.clone()
    mirrored[:3, 3] = torch.tensor([25, 13, 0])
    assert torch.equal(photos.mirrored_sizes, mirrored)
    [middle] = load_photos([tmp_path / "a wide.png"], 20, center_crop=True).sizes.tolist()
    assert middle == [40, 90, 0, 12, 20, 20]


def test_a_folder_loads_in_order_of_name_with_the_index_of_each_photograph(tmp_path):
    save_png(tmp_path / "b.png", noise(16, 32, seed=1))
    save_png(tmp_path / "a.png", noise(16, 16, seed=2))
    save_png(tmp_path / "c.png", noise(64, 64, seed=3))
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "notes.txt").write_text("a sks dog")
    (tmp_path / "more").mkdir()
    loaded = load_photos(str(tmp_path), 16)
    assert isinstance(loaded, Photos)
    assert [file.name for file in loaded.files] == ["a.png", "b.png", "c.png"]
    assert loaded.photo.dtype == torch.int64
    assert loaded.photo.tolist() == [0, 1, 1, 1, 2]
    assert len(loaded) == 5
    assert torch.equal(loaded.images, load_photos(str(tmp_path), 16).images)


def test_an_upscaled_photograph_and_an_empty_list(tmp_path):
    flat = np.full((7, 9, 3), 51, np.uint8)
    loaded = load_photos([save_png(tmp_path / "tiny.png", flat)], 33)
    assert loaded.images.shape == (3, 3, 33, 33)
    torch.testing.assert_close(loaded.images, torch.full((3, 3, 33, 33), 51 / 127.5 - 1))
    assert "empty" in error_of(load_photos, [], 16)


def sheet_arguments(loaded: Photos, monkeypatch) -> tuple:
    """What contact_sheet hands to grid, and the sheet."""
    seen = {}

    def spy(rows, labels, title):
        seen.update(rows=rows, labels=labels, title=title)
        return grid(rows, labels, title=title)

    monkeypatch.setattr(sheets, "grid", spy)
    sheet = contact_sheet(loaded)
    return seen["rows"], seen["labels"], seen["title"], sheet


def test_contact_sheet_shows_each_crop_beside_the_name_of_its_photograph(tmp_path, monkeypatch):
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, :16], wide[:, 16:32], wide[:, 32:] = RED, GREEN, BLUE
    save_png(tmp_path / "wide.png", wide)
    save_png(tmp_path / "square.png", np.full((16, 16, 3), YELLOW, np.uint8))
    rows, labels, title, sheet = sheet_arguments(load_photos(tmp_path, 16), monkeypatch)
    assert labels == ["square.png", "wide.png"]
    assert [[cell.getpixel((8, 8)) for cell in row] for row in rows] == [
        [YELLOW],
        [RED, GREEN, BLUE],
    ]
    assert title == "photographs: 2, crops: 4 of 16 px"
    assert box_of(sheet, GREEN)[2:] == (16, 16)


NO_SIZES = (None, None)  # which a sheet does not look at


def test_contact_sheet_scales_large_crops_down(monkeypatch):
    loaded = Photos(torch.zeros(1, 3, 512, 512), torch.tensor([0]), [Path("a.jpg")], *NO_SIZES)
    rows, _, title, _ = sheet_arguments(loaded, monkeypatch)
    assert rows[0][0].size == (192, 192)
    assert "512 px" in title


def test_contact_sheet_of_300_photographs_stays_small_and_says_how_many_more(monkeypatch):
    count = 300
    files = [Path(f"{i:03}.jpg") for i in range(count)]
    loaded = Photos(torch.zeros(count, 3, 256, 256), torch.arange(count), files, *NO_SIZES)
    rows, labels, title, sheet = sheet_arguments(loaded, monkeypatch)
    assert len(rows) == len(labels) == 20
    assert title == "photographs: 300 (20 shown, 280 more), crops: 300 of 256 px"
    assert sheet.height < 2200
