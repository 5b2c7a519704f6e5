"""Every kind of file against pixels known beforehand, crops against their own formula."""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from minibooth.common.errors import UserError
from minibooth.training import photos
from minibooth.training.photos import (
    Photos,
    contact_sheet,
    grid,
    image_files,
    load_photos,
    read_image,
    to_pil,
)

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)


def four_corners() -> np.ndarray:
    """(32, 48, 3): red and green above blue and yellow."""
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :24], image[:16, 24:] = RED, GREEN
    image[16:, :24], image[16:, 24:] = BLUE, YELLOW
    return image


def assert_four_corners(image: Image.Image, tolerance: int = 8) -> None:
    assert (image.mode, image.size) == ("RGB", (48, 32))
    for xy, colour in {(4, 4): RED, (43, 4): GREEN, (4, 27): BLUE, (43, 27): YELLOW}.items():
        np.testing.assert_allclose(image.getpixel(xy), colour, atol=tolerance)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def error_of(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ── image_files ──────────────────────────────────────────────────────────────────────────────────


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


# ── read_image: what cameras and programs write ──────────────────────────────────────────────────


# The EXIF standard says which edge of the upright picture the first stored row and column show.
STORED_AS = {
    1: lambda upright: upright,  # row 0 is the top, column 0 the left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright.swapaxes(0, 1)[::-1],  # right, top
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_exif_orientation_is_undone(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    stored = np.ascontiguousarray(STORED_AS[orientation](four_corners()))
    Image.fromarray(stored).save(path, exif=exif, quality=95)
    assert_four_corners(read_image(path))


def test_a_malformed_exif_tag_does_not_stop_the_rotation(tmp_path):
    # Orientation 6, and a resolution (tag 0x011A) that is text instead of a fraction.
    tags = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x011A, 2, 4, b"dcba")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + tags + bytes(4)
    path = tmp_path / "photo.jpg"
    Image.fromarray(STORED_AS[6](four_corners()).copy()).save(path, exif=exif, quality=95)
    assert_four_corners(read_image(path))


def test_alpha_is_laid_on_white(tmp_path):
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [0, 0, 0, 51]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    # 51/255 = 0.2 of black over white leaves 0.8 · 255 = 204.
    expected = [[[200, 100, 50], [255, 255, 255], [204, 204, 204]]]
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), expected)

    Image.fromarray(np.array([[[90, 255], [90, 0]]], np.uint8)).save(tmp_path / "la.png")
    expected = [[[90, 90, 90], [255, 255, 255]]]
    np.testing.assert_array_equal(read_image(tmp_path / "la.png"), expected)


def test_transparent_palette_entries_and_colours_become_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    for name in ("index.png", "index.gif"):
        palette.save(tmp_path / name, transparency=0)
        np.testing.assert_array_equal(read_image(tmp_path / name), [[[255, 255, 255], BLUE]])
    palette.convert("RGB").save(tmp_path / "colour.png", transparency=RED)
    np.testing.assert_array_equal(read_image(tmp_path / "colour.png"), [[[255, 255, 255], BLUE]])


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_greyscale_is_scaled_not_clipped(tmp_path, suffix):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    path = tmp_path / f"scan.{suffix}"
    Image.fromarray(levels * 257).save(path)  # 65535 / 255 = 257
    assert Image.open(path).mode == "I;16"
    image = read_image(path)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.repeat(levels[..., None], 3, axis=2))


def test_32_bit_and_float_greyscale_are_scaled(tmp_path):
    def read(values, dtype):
        Image.fromarray(np.array([values], dtype)).save(tmp_path / "scan.tiff")
        return np.asarray(read_image(tmp_path / "scan.tiff"))[0, :, 0].tolist()

    assert read([0, 257, 32896, 65535], np.int32) == [0, 1, 128, 255]
    assert read([0, 200 * 257], np.int32) == [0, 200]  # white stays 65535 in a dark picture
    assert read([0, 100, 255], np.int32) == [0, 100, 255]  # 8 bits in 32
    assert read([-5, 0, 500_000, 1_000_000], np.int32) == [0, 0, 128, 255]  # 127.5, half to even
    assert read([0, 0.2, 1], np.float32) == [0, 51, 255]
    assert read([-1, 0, 0.5], np.float32) == [0, 0, 128]  # and 1 for floats
    assert read([0, 1, 5], np.float32) == [0, 51, 255]
    assert read([np.nan, np.inf, 1], np.float32) == [0, 0, 255]


def test_greyscale_bilevel_and_cmyk_become_rgb(tmp_path):
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").getpixel((3, 3)) == (77, 77, 77)
    Image.new("1", (8, 8), 1).save(tmp_path / "bilevel.png")
    assert read_image(tmp_path / "bilevel.png").getpixel((3, 3)) == (255, 255, 255)

    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # magenta and yellow ink: red
    for name in ("print.jpg", "print.tiff"):
        cmyk.save(tmp_path / name)
        assert read_image(tmp_path / name).mode == "RGB"
        np.testing.assert_allclose(read_image(tmp_path / name).getpixel((3, 3)), RED, atol=2)
    assert b"Adobe" in (tmp_path / "print.jpg").read_bytes()  # an inverted one, as Photoshop's are


# ── colour profiles ──────────────────────────────────────────────────────────────────────────────

P3_YELLOW, YELLOW_OF_SRGB = (219, 185, 71), (226, 183, 35)  # one colour, as an iPhone writes it


def display_p3() -> bytes:
    """littleCMS's sRGB profile with the primaries of Display P3, adapted to D50 as ICC wants it."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for i in range(int.from_bytes(profile[128:132], "big")):
        name, at, _ = struct.unpack_from(">4sII", profile, 132 + 12 * i)
        if name in primaries:
            numbers = [round(x * 2**16) for x in primaries.pop(name)]
            struct.pack_into(">3i", profile, at + 8, *numbers)
    assert not primaries
    return bytes(profile)


def from_p3(colours: np.ndarray) -> np.ndarray:
    """By the standards' matrices, which share D65 and the curve: P3 → XYZ → sRGB, 0…255."""
    p3 = np.array([[0.4866, 0.2657, 0.1982], [0.2290, 0.6917, 0.0793], [0, 0.0451, 1.0439]])
    srgb = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    v = colours / 255
    linear = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    linear = (linear @ (np.linalg.inv(srgb) @ p3).T).clip(0, 1)
    v = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255 * v


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "avif", "heic"])
def test_colours_of_display_p3_are_read_as_srgb_has_them(tmp_path, suffix):
    if suffix == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    path = tmp_path / f"phone.{suffix}"
    options = {"quality": 100} if suffix in ("jpg", "avif", "heic") else {}
    Image.new("RGB", (48, 32), P3_YELLOW).save(path, icc_profile=display_p3(), **options)
    image = read_image(path)
    assert image.mode == "RGB"
    np.testing.assert_allclose(image.getpixel((20, 20)), YELLOW_OF_SRGB, atol=6)
    assert np.abs(np.array(image.getpixel((20, 20))) - P3_YELLOW).max() > 30


def test_every_colour_of_display_p3_is_the_standards_one(tmp_path):
    colours = noise(32, 32)
    Image.fromarray(colours).save(tmp_path / "p3.png", icc_profile=display_p3())
    np.testing.assert_allclose(read_image(tmp_path / "p3.png"), from_p3(colours), atol=2)
    np.testing.assert_allclose(from_p3(np.array(P3_YELLOW)), YELLOW_OF_SRGB, atol=0.5)


def test_a_profile_that_changes_nothing_leaves_every_pixel_what_it_is(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(noise(32, 32)).save(tmp_path / "srgb.png", icc_profile=srgb)
    np.testing.assert_array_equal(read_image(tmp_path / "srgb.png"), noise(32, 32))


def test_a_profile_goes_with_grey_palettes_and_transparency(tmp_path):
    image = Image.new("RGBA", (4, 4), (*P3_YELLOW, 255))
    image.putpixel((0, 0), (*P3_YELLOW, 0))
    for name, changed in (("rgba", image), ("palette", image.quantize(4))):
        changed.save(tmp_path / f"{name}.png", icc_profile=display_p3())
        read = read_image(tmp_path / f"{name}.png")
        assert read.getpixel((0, 0)) == (255, 255, 255)
        np.testing.assert_allclose(read.getpixel((2, 2)), YELLOW_OF_SRGB, atol=4)
    for mode, grey in (("L", 100), ("LA", (100, 255)), ("I;16", 100 * 257)):
        Image.new(mode, (4, 4), grey).save(tmp_path / "grey.png", icc_profile=display_p3())
        np.testing.assert_allclose(read_image(tmp_path / "grey.png").getpixel((2, 2)), 100, atol=1)


def test_a_profile_that_cannot_be_used_is_warned_of_by_the_file_s_name(tmp_path):
    for profile in (b"junk", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()):
        Image.fromarray(noise(32, 32)).save(tmp_path / "odd.png", icc_profile=profile)
        with pytest.warns(UserWarning, match=r"odd\.png: its colour profile") as caught:
            image = read_image(tmp_path / "odd.png")
        assert len(caught) == 1
        np.testing.assert_array_equal(image, noise(32, 32))


@pytest.mark.parametrize("suffix", ["mpo", "gif", "webp", "png", "tiff"])
def test_of_several_frames_the_first_is_taken(tmp_path, suffix):
    path = tmp_path / f"frames.{suffix}"
    first, second = Image.fromarray(four_corners()), Image.new("RGB", (48, 32), "black")
    first.save(path, save_all=True, append_images=[second], quality=95)
    assert Image.open(path).n_frames == 2
    assert_four_corners(read_image(path))


# ── read_image: HEIC ─────────────────────────────────────────────────────────────────────────────


def save_heic(path: Path, array: np.ndarray, orientation: int = 1) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(array))
    pillow_heif.from_pillow(image).save(path, exif=exif.tobytes(), quality=95)


@pytest.mark.parametrize("name", ["phone.HEIC", "phone.heif", "heic-renamed.jpg"])
def test_heic_is_read_and_rotated_once(tmp_path, name):
    save_heic(tmp_path / name, STORED_AS[6](four_corners()), orientation=6)
    assert_four_corners(read_image(tmp_path / name), tolerance=16)


@pytest.mark.parametrize("name", ["phone.heic", "heic-renamed.jpg"])
def test_heic_without_pillow_heif_says_what_to_install(tmp_path, name, monkeypatch):
    save_heic(tmp_path / name, four_corners())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # makes its import fail
    message = error_of(read_image, tmp_path / name)
    assert str(tmp_path / name) in message
    assert "pip install pillow-heif" in message


# ── read_image: what cannot be read ──────────────────────────────────────────────────────────────


def test_an_unreadable_file_is_named_in_one_line(tmp_path):
    Image.fromarray(noise(64, 64)).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    Image.fromarray(noise(64, 64)).save(tmp_path / "whole.avif")
    contents = {
        "half.jpg": whole[: len(whole) // 2],
        "almost.jpg": whole[:-100],
        "truncated.avif": (tmp_path / "whole.avif").read_bytes()[:-8],
        "text.jpg": b"this is not a photograph",
        "page.png": b"<!DOCTYPE html><title>404</title>",
        "empty.jpg": b"",
        "text.heic": b"neither is this one",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in [*contents, "missing.jpg"]:
        assert str(tmp_path / name) in error_of(read_image, tmp_path / name)
    assert "does not hold an image" in error_of(read_image, tmp_path / "text.jpg")
    assert "truncated" in error_of(read_image, tmp_path / "half.jpg")
    assert "No such file" in error_of(read_image, tmp_path / "missing.jpg")


def test_photographs_of_more_pixels_than_pillow_trusts_are_read_without_its_warning(
    tmp_path, monkeypatch, recwarn
):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "large.png")
    for limit in (1000, 100):  # above it Pillow warns of attacks, above twice as much it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert read_image(tmp_path / "large.png").size == (40, 30)
        assert limit == Image.MAX_IMAGE_PIXELS
    assert not recwarn.list


def test_photographs_far_below_the_resolution_are_warned_of(tmp_path, recwarn):
    for name, side in (("a.png", 40), ("b.png", 33), ("c.png", 32)):
        Image.new("RGB", (side, 50), "red").save(tmp_path / name)
    load_photos(tmp_path, 64)
    said = "1 of 3 photographs are enlarged to twice their size and more"
    assert str(recwarn.pop().message).startswith(said) and not recwarn.list


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)  # 20,000 × 20,000 RGB
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
    (tmp_path / "bomb.png").write_bytes(png + chunk(b"IEND", b""))
    message = error_of(read_image, tmp_path / "bomb.png")
    assert str(tmp_path / "bomb.png") in message
    assert "too many pixels" in message


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


# ── load_photos ──────────────────────────────────────────────────────────────────────────────────


def save_png(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path)
    return path


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """(H, W, 3) in 0…255 → (3, H, W) in [-1, 1]."""
    return torch.tensor(array.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1


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


# ── to_pil ───────────────────────────────────────────────────────────────────────────────────────


def test_to_pil_is_the_inverse_of_loading_and_rounds_and_clamps():
    array = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    [image] = to_pil(as_tensor(array)[None])
    np.testing.assert_array_equal(image, array)

    levels = torch.tensor([-1.7, -1, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1, 1, 3])
    first, second = to_pil(torch.stack([levels, levels.flip(0)])[:, None, None].expand(2, 3, 1, 6))
    assert np.asarray(first)[0, :, 1].tolist() == [0, 0, 100, 101, 255, 255]
    assert np.asarray(second)[0, :, 1].tolist() == [255, 255, 101, 100, 0, 0]


def test_to_pil_keeps_the_channels_and_takes_half_precision_with_gradients():
    x = torch.tensor([1.0, -1.0, 0.0], dtype=torch.bfloat16).view(1, 3, 1, 1).requires_grad_()
    [image] = to_pil(x.expand(1, 3, 4, 6))
    assert image.size == (6, 4)
    assert image.getpixel((5, 3)) == (255, 0, 128)  # 127.5 rounds to even


# ── grid and contact_sheet ───────────────────────────────────────────────────────────────────────


def box_of(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of all that has exactly this colour."""
    ys, xs = np.nonzero((np.asarray(sheet) == colour).all(axis=-1))
    return xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1


def flat_cells(size: int) -> list[list[Image.Image]]:
    return [
        [Image.new("RGB", (size, size), colour) for colour in row]
        for row in ((RED, GREEN), (BLUE, YELLOW))
    ]


@pytest.mark.parametrize("texts", [{}, {"labels": ["one", "two"], "headings": ["before", "after"]}])
def test_grid_places_whole_cells_in_rows_and_columns(texts):
    sheet = grid(flat_cells(64), **texts, title="a title" if texts else None)
    red, green, blue, yellow = (box_of(sheet, colour) for colour in (RED, GREEN, BLUE, YELLOW))
    assert all(box[2:] == (64, 64) for box in (red, green, blue, yellow))
    assert red[0] == blue[0] < red[0] + 64 < green[0] == yellow[0]
    assert red[1] == green[1] < red[1] + 64 < blue[1] == yellow[1]


def test_grid_writes_labels_left_of_rows_headings_above_columns_and_the_title_above_all():
    def ink(**texts):
        sheet = grid(flat_cells(64), **texts)
        left, top, _, _ = box_of(sheet, RED)
        dark = np.asarray(sheet.convert("L")) < 128
        colours = np.ptp(np.asarray(sheet).astype(int), axis=-1) > 60  # the cells are no ink
        ys, xs = np.nonzero(dark & ~colours)
        return ys - top, xs - left

    assert len(ink()[0]) == 0
    ys, xs = ink(labels=["one", "two"])
    assert xs.max() < -8
    assert {0, 1} == {int(y > 64) for y in ys}
    ys, xs = ink(labels=["one", ""])
    assert 0 < ys.min() <= ys.max() < 64
    ys, xs = ink(headings=["", "after"])
    assert ys.max() < 0
    assert xs.min() > 64
    ys, xs = ink(title="what this shows")
    assert ys.max() < 0


def test_long_texts_are_wrapped_and_cut_without_moving_the_rows():
    prompt = "a photo of a sks dog in the snow " * 300
    sheet = grid(flat_cells(64), ["x", prompt], ["name" * 500, prompt], prompt)
    assert sheet.height < 64 * 2 + 6 * 13 * 1.4 + 64
    assert sheet.width < 64 * 2 + 160 + 64
    assert (np.asarray(sheet)[:, :8] > 200).all(), "text runs over the margin"
    assert (np.asarray(sheet)[:, -8:] > 200).all(), "text runs over the margin"
    assert box_of(sheet, BLUE)[1] - box_of(sheet, RED)[1] == 64 + 4
    for start in range(16):  # 160 for labels, 2 · 64 + 4 for cells, 3 margins of 12
        assert grid(flat_cells(64), ["x", prompt[start:]]).width <= 160 + 132 + 36


def test_rows_of_different_length_leave_gaps_and_odd_sizes_are_refused():
    (red, green), (blue, _) = flat_cells(32)
    sheet = grid([[red], [blue, green]])
    assert box_of(sheet, GREEN)[0] > box_of(sheet, BLUE)[0] == box_of(sheet, RED)[0]
    with pytest.raises(ValueError, match="one size"):
        grid([[red, Image.new("RGB", (33, 32))]])
    with pytest.raises(ValueError, match="one size"):
        grid([])
    with pytest.raises(ValueError):
        grid([[red], [blue]], labels=["only one"])


def sheet_arguments(loaded: Photos, monkeypatch) -> tuple:
    """What contact_sheet hands to grid, and the sheet."""
    seen = {}

    def spy(rows, labels, title):
        seen.update(rows=rows, labels=labels, title=title)
        return grid(rows, labels, title=title)

    monkeypatch.setattr(photos, "grid", spy)
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


def test_contact_sheet_scales_large_crops_down(monkeypatch):
    loaded = Photos(torch.zeros(1, 3, 512, 512), torch.tensor([0]), [Path("a.jpg")])
    rows, _, title, _ = sheet_arguments(loaded, monkeypatch)
    assert rows[0][0].size == (192, 192)
    assert "512 px" in title


def test_contact_sheet_of_300_photographs_stays_small_and_says_how_many_more(monkeypatch):
    count = 300
    files = [Path(f"{i:03}.jpg") for i in range(count)]
    loaded = Photos(torch.zeros(count, 3, 256, 256), torch.arange(count), files)
    rows, labels, title, sheet = sheet_arguments(loaded, monkeypatch)
    assert len(rows) == len(labels) == 20
    assert title == "photographs: 300 (20 shown, 280 more), crops: 300 of 256 px"
    assert sheet.height < 2200
