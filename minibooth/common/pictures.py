"""A picture in a file → an upright 8-bit RGB one; pictures as tensors, and back.

Files are what phones, cameras and scanners leave: rotated JPEGs, HEIC, cut-out PNGs with alpha,
16-bit scans, colour profiles. All of it is settled here; what cannot be read is named.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from .errors import UserError, first_line

# What is in them, whatever the file is called: Pillow knows forty more, and has PostScript run.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "HEIF")

MOST_PIXELS = 300_000_000  # of a picture; telephones take 200 million. In RGB they are 900 MB

# What undoes each EXIF orientation (1 is upright). ImageOps.exif_transpose does the same, but also
# writes the other EXIF tags back, and fails on photographs where one of those is malformed.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str | Path, min_side: int | None = None) -> Image.Image:
    """One upright 8-bit RGB image from a file of FORMATS, the first frame if it has several.

    EXIF rotation and colour profile are applied (one that cannot be is warned of), transparency is
    laid on white, and 16-bit, 32-bit and float greyscale is scaled to 8 bits. HEIC needs
    pillow-heif. With min_side a JPEG may come out at 1/2, 1/4 or 1/8 of its size, its shorter side
    still at least min_side pixels: at 1/8 a 100-megapixel photograph decodes to 5 MB, not 300.

    UserError: missing, truncated, corrupt, no image, too large, or HEIC without pillow-heif.
    """
    return read_with_size(path, min_side)[0]


def read_with_size(
    path: str | Path, min_side: int | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """As read_image, and the upright image's height and width in the file."""
    image, size = _decode(Path(path), min_side)
    return _to_rgb(image, path), size


def _decode(path: Path, min_side: int | None) -> tuple[Image.Image, tuple[int, int]]:
    try:
        if _is_heif(path):
            _register_heif(path)
        Image.init()
        with _without_pillows_limit(), Image.open(path, formats=_formats()) as image:
            if math.prod(image.size) > MOST_PIXELS:
                raise UserError(f"{path} has too many pixels to be opened: scale it down")
            width, height = image.size
            if min_side is not None:
                image.draft(None, (min_side, min_side))  # does something for JPEG only
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{path} does not hold an image: remove or export it again") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, …
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"{path} cannot be read ({reason}): remove or export it again") from error
    if orientation not in UPRIGHT:
        return image, (height, width)
    lies_on_its_side = orientation >= 5
    size = (width, height) if lies_on_its_side else (height, width)
    return image.transpose(UPRIGHT[orientation]), size


def _formats() -> list[str]:
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Pillow takes 90 million pixels for an attack and says so; here there is MOST_PIXELS."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _is_heif(path: Path) -> bool:
    # By content too: phones and chat programs hand out HEIC under the name of .jpg.
    with path.open("rb") as file:
        header = file.read(12)
    brands = b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"
    return path.suffix.lower() in (".heic", ".heif") or (
        header[4:8] == b"ftyp" and header[8:] in brands
    )


def _register_heif(path: Path) -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise UserError(f"{path} is a HEIC image: to read it, pip install pillow-heif") from error
    register_heif_opener()


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if profile:
            alpha = rgba.getchannel("A")
            rgba = _to_srgb(rgba.convert("RGB"), image.mode, profile, path)
            rgba.putalpha(alpha)
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return _to_srgb(image, image.mode, profile, path) if profile else image.convert("RGB")


# What a colour profile describes → the mode of the pixels it is about, and the modes of images that
# can have it. A grey image under one of RGB is taken for R = G = B.
SPACES = {
    "RGB": ("RGB", ("RGB", "RGBA", "RGBX", "P", "PA", "L", "LA", "1")),
    "GRAY": ("L", ("L", "LA", "1")),
    "CMYK": ("CMYK", ("CMYK",)),
    "Lab": ("LAB", ("LAB",)),
}


def _to_srgb(colours: Image.Image, mode: str, profile: bytes, path: Path) -> Image.Image:
    """By the profile that the file carries: iPhones have Display P3, scanners and studios others.
    A profile that makes no difference, as cameras' sRGB has it, leaves every pixel what it is."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        pixels, modes = SPACES.get(source.profile.xcolor_space.strip(), ("", ()))
        if mode not in modes:
            raise ValueError(f"it is for {source.profile.xcolor_space.strip()}, not for {mode}")
        srgb = ImageCms.createProfile("sRGB")
        convert = ImageCms.buildTransform(source, srgb, pixels, "RGB")
        if pixels in ("RGB", "L") and _changes_nothing(convert, pixels):
            return colours.convert("RGB")
        if colours.mode == "P":
            colours = colours.convert("RGB")
        return ImageCms.applyTransform(colours.convert(pixels), convert)
    except Exception as error:  # whatever littleCMS says of a damaged profile
        warnings.warn(
            f"{path}: its colour profile is not usable, its colours are taken as sRGB "
            f"({first_line(error)})",
            stacklevel=1,
        )
        return colours.convert("RGB")


def _changes_nothing(convert: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether it leaves a cube of colours what they are, but for rounding."""
    steps = np.arange(0, 256, 15, dtype=np.uint8)  # 0, 15 … 255
    cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    image = Image.fromarray(cube if mode == "RGB" else cube[..., 0])
    before = np.asarray(image.convert("RGB")).astype(int)
    return np.abs(np.asarray(ImageCms.applyTransform(image, convert)) - before).max() <= 2


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Modes I;16, I and F, which Pillow's own convert() would clip at 255."""
    values = np.asarray(image).astype(np.float64)  # (H, W)
    values = np.where(np.isfinite(values), values, 0)
    # White is 1 for floats and 65535 for integers, or what is brightest if that is beyond it; 255
    # in 32 bits that hold no more, as programs for measuring write them.
    white = max(values.max(), 1 if image.mode == "F" else 65535)
    if image.mode == "I" and values.max() <= 255:
        white = 255
    return Image.fromarray((values / white * 255).round().clip(0, 255).astype(np.uint8))


def as_floats(pixels: Tensor) -> Tensor:
    """0…255, as files have it, → [-1, 1] in float32, as networks have it: v / 127.5 − 1."""
    return pixels.float().div_(127.5).sub_(1)


def to_pil(images: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [-1, 1], any dtype and device → N RGB images; values outside are clamped."""
    pixels = ((images.detach().float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]
