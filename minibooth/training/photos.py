"""A folder of photographs → (N, 3, R, R), and a sheet of them that people look at.

Folders hold what cameras, operating systems and minibooth itself leave there: `.DS_Store`, films,
pictures that were drawn. How a file is read is in common/pictures.py.
"""

import hashlib
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..common import sheets
from ..common.errors import UserError
from ..common.pictures import as_floats, read_with_size, to_pil

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".gif", ".mpo", ".avif", ".heic", ".heif"),
)


# What minibooth draws: class images, grids and charts by their names, other pictures by what they
# all say of themselves in their metadata.
DRAWN = re.compile(
    r"[0-9a-f]{12}-\d{5}\.png|step-\d{5}\.png|(before_after|curve|grid|loss|photographs)\.png"
)
SAID = {"prompt", "seed", "steps", "guidance_scale"}

# Pictures and films that lie among photographs and are not read.
UNREAD = (".jxl", ".jp2", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")
UNREAD += (".psd", ".xcf", ".svg", ".pdf", ".mov", ".mp4")


NEARLY_SQUARE = 1.05  # long side / short side up to which one crop is enough


@dataclass(frozen=True, eq=False)
class Photos:
    """Square crops of photographs, as the training sees them."""

    pixels: Tensor  # (N, 3, R, R) uint8: a thousand of 512² are .8 GB, as floats 3.1 GB
    photo: Tensor  # (N,) int64: pixels[i] was cut from files[photo[i]]
    files: list[Path]
    sizes: Tensor  # (N, 6) int64 of each crop, as in text_encoder.Condition
    mirrored_sizes: Tensor  # (N, 6) of mirrored photographs: what was left of a crop is right of it

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


def load_photos(
    files_or_folder: str | Path | Iterable[str | Path],
    resolution: int,
    center_crop: bool = False,
    detail: int | None = None,
) -> Photos:
    """Photographs of any shape → square crops of `resolution` pixels.

    The shorter side is resized to `resolution` (Lanczos, which antialiases). A photograph whose
    sides differ by more than 5 % then gives three crops, the first, middle and last along its long
    side, so that a head at the edge stays in; any other gives the middle one, and so does every
    photograph with center_crop.

    With `detail` a crop is a part of what is in the photograph and not smaller than there: its
    shorter side becomes `detail` pixels, where it is longer, and crops lie side by side over all of
    it, or with center_crop over the middle square.

    UserError: see image_files and read_image; an empty list of files; with `detail`, photographs
    that would have to be enlarged.
    """
    if isinstance(files_or_folder, str | Path):
        files = image_files(files_or_folder)
    else:
        files = [Path(file) for file in files_or_folder]
    if not files:
        raise UserError("the list of photographs is empty: give at least one")

    crops, photo, sizes, mirrored, small = [], [], [], [], []
    for index, file in enumerate(files):
        # Twice the resolution leaves Lanczos enough to work on, as in Pillow's own thumbnail().
        image, size = read_with_size(file, 2 * (detail or resolution))
        if detail is None:
            found = _square_crops(image, resolution, center_crop)
            is_small = 2 * min(image.size) <= resolution
        else:
            found = _tiles(image, resolution, center_crop, detail)
            is_small = min(image.size) < resolution
        if is_small:
            small.append("{} is {}×{}".format(file.name, *image.size))
        for left, top, right, crop in found:
            crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))  # (3, R, R)
            photo.append(index)
            sizes.append([*size, top, left, resolution, resolution])
            mirrored.append([*size, top, right, resolution, resolution])
    if small and detail:
        raise UserError(
            f"{len(small)} of {len(files)} pictures are smaller than {resolution}², so there is no "
            f"detail in them to learn ({', '.join(small[:5])}{', …' * (len(small) > 5)}): leave "
            "them out, or give a smaller --resolution"
        )
    if small:
        warnings.warn(
            f"{len(small)} of {len(files)} photographs are enlarged to twice their size and more, "
            f"and what is learned is as blurred ({small[0]}, wanted are {resolution}²)",
            stacklevel=2,
        )
    sizes, mirrored = torch.tensor(sizes), torch.tensor(mirrored)
    return Photos(torch.stack(crops), torch.tensor(photo), files, sizes, mirrored)


def _square_crops(
    image: Image.Image, resolution: int, center_crop: bool
) -> list[tuple[int, int, int, Image.Image]]:
    """What the resized image has left of each crop, above it and right of it, and the crop."""
    scale = resolution / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)

    slack = max(width, height) - resolution
    if center_crop or resolution + slack <= NEARLY_SQUARE * resolution:
        offsets = [slack // 2]
    else:
        offsets = sorted({0, slack // 2, slack})
    corners = [(offset, 0) if width > height else (0, offset) for offset in offsets]
    return [
        (x, y, width - resolution - x, image.crop((x, y, x + resolution, y + resolution)))
        for x, y in corners
    ]


def _tiles(
    image: Image.Image, resolution: int, center_crop: bool, detail: int
) -> list[tuple[int, int, int, Image.Image]]:
    """The same of crops side by side, of which neighbours overlap where they do not fit exactly."""
    if center_crop:
        side, (width, height) = min(image.size), image.size
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    scale = min(1.0, max(detail, resolution) / min(image.size))
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)

    def offsets(side: int) -> list[int]:
        count = -(-side // resolution)
        return [round(i * (side - resolution) / max(1, count - 1)) for i in range(count)]

    return [
        (x, y, width - resolution - x, image.crop((x, y, x + resolution, y + resolution)))
        for y in offsets(height)
        for x in offsets(width)
    ]


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


def contact_sheet(photos: Photos, max_rows: int = 20) -> Image.Image:
    """All crops that are trained on, a row per photograph, to look over before a long run.

    At most max_rows photographs are shown; the title says how many more there are. Cells are at
    most 192 pixels wide, and smaller where the sheet would be higher than about 2,000 or, of an
    upscaler's many crops, wider than 4,000.
    """
    count, resolution = len(photos.files), photos.pixels.shape[-1]
    shown = min(count, max_rows)
    most = max(3, int(photos.photo.bincount().max()))  # crops of a photograph
    cell = min(192, 1920 // shown, 3840 // most, resolution)
    rows = [
        [
            crop.resize((cell, cell), Image.Resampling.LANCZOS)
            for crop in to_pil(as_floats(photos.pixels[photos.photo == index]))
        ]
        for index in range(shown)
    ]
    hidden = f" ({shown} shown, {count - shown} more)" if count > shown else ""
    title = f"photographs: {count}{hidden}, crops: {len(photos)} of {resolution} px"
    return sheets.grid(rows, [file.name for file in photos.files[:shown]], title=title)
