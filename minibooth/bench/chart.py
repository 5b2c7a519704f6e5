"""Bars beside a line at 1, for every bench."""

from pathlib import Path

from PIL import Image, ImageDraw

BLUE, ORANGE = "#3b6ea5", "#d08c3a"


def bars(rows: list[tuple[str, float, str, str]], title: str, path: Path) -> None:
    """Rows of (label, value, what stands behind it, colour); 1 is a line."""
    left, scale, height = 230, 130, 20
    width = left + int(scale * max([1.0, *(value for _, value, *_ in rows)])) + 200
    image = Image.new("RGB", (width, height * (len(rows) + 2)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 4), title, "black")
    for i, (label, value, note, colour) in enumerate(rows, start=1):
        top, end = height * i + 6, left + int(scale * value)
        draw.text((8, top), label, "black")
        draw.rectangle((left, top, end, top + height - 7), colour)
        draw.text((end + 6, top), f"{value:.2f}  ({note})", "black")
    draw.line((left + scale, height, left + scale, image.height - height // 2), "black")
    image.save(path)
