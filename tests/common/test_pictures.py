"""Reading picture files as phones, cameras and scanners write them, and pictures as tensors."""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_files import BLUE, GREEN, RED, YELLOW, as_tensor, error_of, noise
from PIL import Image, ImageCms

from minibooth.common.pictures import read_image, to_pil


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
