"""A folder of photographs → (N, 3, H, W), and back to pictures people look at.

Folders hold what phones, cameras and operating systems leave there: rotated JPEGs, HEIC, cut-out
PNGs with alpha, 16-bit scans, `.DS_Store`. All of it is settled here; what cannot be read is named.
"""

import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

from ..common.errors import UserError, first_line

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".gif", ".mpo", ".avif", ".heic", ".heif"),
)

# What is in them, whatever the file is called: Pillow knows forty more, and has PostScript run.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "HEIF")

# What minibooth draws: class images, grids and charts by their names, other pictures by what they
# all say of themselves in their metadata.
DRAWN = re.compile(
    r"[0-9a-f]{12}-\d{5}\.png|step-\d{5}\.png|(before_after|curve|grid|loss|photographs)\.png"
)
SAID = {"prompt", "seed", "steps", "guidance_scale"}

# Pictures and films that lie among photographs and are not read.
UNREAD = (".jxl", ".jp2", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")
UNREAD += (".psd", ".xcf", ".svg", ".pdf", ".mov", ".mp4")

MOST_PIXELS = 300_000_000  # of a picture; telephones take 200 million. In RGB they are 900 MB

NEARLY_SQUARE = 1.05  # long side / short side up to which one crop is enough

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


@dataclass(frozen=True, eq=False)
class Photos:
    """Square crops of photographs, as the training sees them."""

    pixels: Tensor  # (N, 3, R, R) uint8: a thousand of 512² are .8 GB, as floats 3.1 GB
    photo: Tensor  # (N,) int64: pixels[i] was cut from files[photo[i]]
    files: list[Path]

    def __len__(self) -> int:
        """N, the number of crops; the number of photographs is len(files)."""
        return len(self.pixels)

    @property
    def images(self) -> Tensor:
        """All of them as networks see them: (N, 3, R, R) float32 in [-1, 1]."""
        return as_floats(self.pixels)

    def content_hash(self) -> str:
        """Which pictures these are: equal for equal pixels."""
        digest = hashlib.sha256()
        for picture in self.pixels:
            digest.update(as_floats(picture).numpy())
        return digest.hexdigest()[:16]


def as_floats(pixels: Tensor) -> Tensor:
    """0…255, as files have it, → [-1, 1] in float32, as networks have it: v / 127.5 − 1."""
    return pixels.float().div_(127.5).sub_(1)


def load_photos(
    files_or_folder: str | Path | Iterable[str | Path], resolution: int, center_crop: bool = False
) -> Photos:
    """Photographs of any shape → square crops of `resolution` pixels.

    The shorter side is resized to `resolution` (Lanczos, which antialiases). A photograph whose
    sides differ by more than 5 % then gives three crops, the first, middle and last along its long
    side, so that a head at the edge stays in; any other gives the middle one, and so does every
    photograph with center_crop.

    UserError: see image_files and read_image, or an empty list of files.
    """
    if isinstance(files_or_folder, str | Path):
        files = image_files(files_or_folder)
    else:
        files = [Path(file) for file in files_or_folder]
    if not files:
        raise UserError("the list of photographs is empty: give at least one")

    crops, photo, small = [], [], []
    for index, file in enumerate(files):
        # Twice the resolution leaves Lanczos enough to work on, as in Pillow's own thumbnail().
        image = read_image(file, 2 * resolution)
        if 2 * min(image.size) <= resolution:
            small.append("{} is {}×{}".format(file.name, *image.size))
        for crop in _square_crops(image, resolution, center_crop):
            crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))  # (3, R, R)
            photo.append(index)
    if small:
        warnings.warn(
            f"{len(small)} of {len(files)} photographs are enlarged to twice their size and more, "
            f"and what is learned is as blurred ({small[0]}, wanted are {resolution}²)",
            stacklevel=2,
        )
    return Photos(torch.stack(crops), torch.tensor(photo), files)


def _square_crops(image: Image.Image, resolution: int, center_crop: bool) -> list[Image.Image]:
    scale = resolution / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)

    slack = max(width, height) - resolution
    if center_crop or resolution + slack <= NEARLY_SQUARE * resolution:
        offsets = [slack // 2]
    else:
        offsets = sorted({0, slack // 2, slack})
    corners = [(offset, 0) if width > height else (0, offset) for offset in offsets]
    return [image.crop((x, y, x + resolution, y + resolution)) for x, y in corners]


def image_files(folder: str | Path) -> list[Path]:
    """The image files directly in a folder, by extension, sorted by name; hidden files are not.

    UserError: the folder does not exist, is not a folder, or holds no image file.
    """
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"{folder} does not exist: give the folder that holds the photographs")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give the folder that holds the photographs")
    entries = sorted(folder.iterdir(), key=lambda path: path.name)
    files = [
        path
        for path in entries
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()
    ]
    if not files:
        held = ", ".join(path.name + "/" * path.is_dir() for path in entries[:3]) or "nothing"
        held += f" and {len(entries) - 3} more" if len(entries) > 3 else ""
        raise UserError(f"{folder} holds no image file but {held}: put the photographs right in it")
    return files


def photographs(folder: str | Path) -> list[Path]:
    """The image files in a folder but those that minibooth drew; warns of these.

    UserError: as image_files, or nothing is left.
    """
    files = image_files(folder)
    drawn = [file for file in files if DRAWN.fullmatch(file.name) or says_drawn(file)]
    if len(drawn) == len(files):
        raise UserError(f"{folder} holds no photograph: minibooth drew all its pictures")
    if drawn:
        count = f"{drawn[0].name} and {len(drawn) - 1} more" if drawn[1:] else drawn[0].name
        warnings.warn(f"{folder}: {count} left out, which minibooth drew", stacklevel=1)
    return [file for file in files if file not in drawn]


def own(folder: str | Path) -> list[Path]:
    """The user's own class images in a folder: minibooth's class images, grids and charts are not,
    pictures that minibooth.sample drew are. None where there is no folder yet, or nothing in it."""
    try:
        return [file for file in image_files(folder) if not DRAWN.fullmatch(file.name)]
    except UserError:
        return []


def says_drawn(file: Path) -> bool:
    try:
        with Image.open(file, formats=["PNG"]) as image:
            return image.info.keys() >= SAID
    except Exception:  # not a PNG, or damaged: read_image says so
        return False


def left_out(folder: str | Path) -> str | None:
    """A line on what lies among the photographs and is none that is read: folders, kinds of picture
    that are not known, links that lead nowhere. None where there is nothing."""
    names = [
        path.name + "/" * path.is_dir()
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name)
        if not path.name.startswith(".")
        if path.is_dir() or not path.exists() or path.suffix.lower() in UNREAD
    ]
    if not names:
        return None
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"{folder}: {len(names)} left out, which are no photographs here ({shown})"


def read_image(path: str | Path, min_side: int | None = None) -> Image.Image:
    """One upright 8-bit RGB image from a file of FORMATS, the first frame if it has several.

    EXIF rotation and colour profile are applied (one that cannot be is warned of), transparency is
    laid on white, and 16-bit, 32-bit and float greyscale is scaled to 8 bits. HEIC needs
    pillow-heif. With min_side a JPEG may come out at 1/2, 1/4 or 1/8 of its size, its shorter side
    still at least min_side pixels: at 1/8 a 100-megapixel photograph decodes to 5 MB, not 300.

    UserError: missing, truncated, corrupt, no image, too large, or HEIC without pillow-heif.
    """
    return _to_rgb(_decode(Path(path), min_side), path)


def _decode(path: Path, min_side: int | None) -> Image.Image:
    try:
        if _is_heif(path):
            _register_heif(path)
        Image.init()
        with _without_pillows_limit(), Image.open(path, formats=_formats()) as image:
            if math.prod(image.size) > MOST_PIXELS:
                raise UserError(f"{path} has too many pixels to be opened: scale it down")
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
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


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


def to_pil(images: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [-1, 1], any dtype and device → N RGB images; values outside are clamped."""
    pixels = ((images.detach().float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def grid(
    rows: list[list[Image.Image]],
    labels: list[str] | None = None,
    headings: list[str] | None = None,
    title: str | None = None,
) -> Image.Image:
    """Images of one size in rows: a label left of each row, a heading above each column.

    Text is wrapped to its place and, where that does not hold it, cut with an ellipsis. Rows may
    be of different length.

    ValueError: no image, images of different sizes, or not one label a row and heading a column.
    """
    sizes = {image.size for row in rows for image in row}
    if len(sizes) != 1:
        raise ValueError(f"a grid needs images of one size, not {sorted(sizes)}")
    [(width, height)] = sizes
    columns = max(len(row) for row in rows)
    font_size = min(max(height // 14, 13), 32)  # pixels, like all lengths here
    font = ImageFont.load_default(font_size)
    line = round(font_size * 1.3)
    gap = max(4, width // 40)
    margin = max(12, 2 * gap)

    def text_width(lines: list[str]) -> int:
        return math.ceil(max(map(font.getlength, lines), default=0))

    label_texts = [
        _wrap(label, font, max(160, width // 2), max_lines=max(1, height // line))
        for label in labels or [""] * len(rows)
    ]
    left = margin + (max(map(text_width, label_texts)) + margin if labels else 0)
    right = left + columns * (width + gap) - gap
    heading_texts = [_wrap(text, font, width, max_lines=3) for text in headings or [""] * columns]
    heading_lines = max(len(lines) for lines in heading_texts)
    title_lines = _wrap(title or "", font, max(right - margin, 320), max_lines=3)

    title_bottom = margin + (line * len(title_lines) + gap if title else 0)
    top = title_bottom + (line * heading_lines + gap if headings else 0)
    bottom = top + len(rows) * (height + gap) - gap
    right = max(right, margin + text_width(title_lines))
    sheet = Image.new("RGB", (right + margin, bottom + margin), "white")
    draw = ImageDraw.Draw(sheet)

    def write(lines: list[str], x: float, y: float, anchor: str) -> None:
        for i, text in enumerate(lines):
            draw.text((x, y + (i + 0.5) * line), text, "#333333", font, anchor)

    write(title_lines, margin, margin, "lm")
    for column, lines in zip(range(columns), heading_texts, strict=True):
        middle = left + column * (width + gap) + width / 2
        write(lines, middle, title_bottom + line * (heading_lines - len(lines)), "mm")
    for row, (images, lines) in enumerate(zip(rows, label_texts, strict=True)):
        y = top + row * (height + gap)
        write(lines, left - margin, y + (height - line * len(lines)) / 2, "rm")
        for column, image in enumerate(images):
            sheet.paste(image, (left + column * (width + gap), y))
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int) -> list[str]:
    rest = " ".join(text.split())
    lines = []
    while rest and len(lines) < max_lines:
        end = 1
        while end < len(rest) and font.getlength(rest[: end + 1]) <= width:
            end += 1
        if end < len(rest):  # break at a space; a word longer than the line, anywhere
            space = rest.rfind(" ", 0, end + 1)
            end = space if space > 0 else end
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + "…"
    return lines


def enlarged(rows: list[list[Image.Image]], side: int = 128) -> list[list[Image.Image]]:
    """Pictures of fewer than `side` pixels a side, times a whole number: to be seen in a grid."""
    width, height = rows[0][0].size
    n = max(1, -(-side // min(width, height)))
    size = (n * width, n * height)
    return [[image.resize(size, Image.Resampling.NEAREST) for image in row] for row in rows]


def contact_sheet(photos: Photos, max_rows: int = 20) -> Image.Image:
    """All crops that are trained on, a row per photograph, to look over before a long run.

    At most max_rows photographs are shown; the title says how many more there are. Cells are at
    most 192 pixels wide, and smaller where the sheet would be higher than about 2,000.
    """
    count, resolution = len(photos.files), photos.pixels.shape[-1]
    shown = min(count, max_rows)
    cell = min(192, 1920 // shown, resolution)
    rows = [
        [
            crop.resize((cell, cell), Image.Resampling.LANCZOS)
            for crop in to_pil(as_floats(photos.pixels[photos.photo == index]))
        ]
        for index in range(shown)
    ]
    hidden = f" ({shown} shown, {count - shown} more)" if count > shown else ""
    title = f"photographs: {count}{hidden}, crops: {len(photos)} of {resolution} px"
    return grid(rows, [file.name for file in photos.files[:shown]], title=title)
