"""Sheets of pictures that people look at: rows with labels and headings."""

import math

from PIL import Image, ImageDraw, ImageFont


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


def stacked(sheets: list[Image.Image]) -> Image.Image:
    """One below the other, on white."""
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    for i, sheet in enumerate(sheets):
        whole.paste(sheet, (0, sum(s.height for s in sheets[:i])))
    return whole


def enlarged(rows: list[list[Image.Image]], side: int = 128) -> list[list[Image.Image]]:
    """Pictures of fewer than `side` pixels a side, times a whole number: to be seen in a grid."""
    width, height = rows[0][0].size
    n = max(1, -(-side // min(width, height)))
    size = (n * width, n * height)
    return [[image.resize(size, Image.Resampling.NEAREST) for image in row] for row in rows]
