"""loss.png: the losses of a run as a picture."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .report import LOSSES, read_losses, save_image


def save(run: Path) -> None:
    if rows := read_losses(run / LOSSES):
        save_image(loss_chart(rows), run / "loss.png")


def loss_chart(rows: list[tuple[float, ...]]) -> Image.Image:
    """Both terms of the loss over the steps: every value faint, a running mean bold."""
    width, height, left, right, top, bottom = 960, 480, 70, 20, 46, 50
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default(15)
    curves = {"instance": ([r[2] for r in rows], (204, 85, 0))}
    if any(r[3] for r in rows):
        curves["prior"] = ([r[3] for r in rows], (0, 90, 181))
    values = sorted(v for series, _ in curves.values() for v in series if v == v)
    ceiling = 1.1 * values[int(0.98 * (len(values) - 1))] or 1.0
    last = max(rows[-1][0], 2)

    def at(step: float, value: float) -> tuple[float, float]:
        x = left + (step - 1) / (last - 1) * (width - left - right)
        return x, height - bottom - min(value / ceiling, 1.0) * (height - top - bottom)

    ticks = (m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5))
    tick = next((tick for tick in ticks if ceiling / tick < 6), ceiling)
    for i in range(int(ceiling / tick) + 1):
        y = at(1, tick * i)[1]
        draw.line([(left, y), (width - right, y)], fill=(225, 225, 225))
        draw.text((left - 8, y), f"{tick * i:.3g}", "black", font, anchor="rm")
    for i in range(6):
        step = round(1 + (last - 1) * i / 5)
        draw.text((at(step, 0)[0], height - bottom + 8), str(step), "black", font, anchor="ma")
    draw.text((width - right, height - 20), "step", "black", font, anchor="ra")
    for n, (name, (series, colour)) in enumerate(curves.items()):
        points = [at(r[0], v) for r, v in zip(rows, series, strict=True)]
        draw.line(points, fill=(*colour, 60), width=1)
        mean, smooth, keep = series[0], [], 1 - 1 / min(50, max(2, len(series) // 5))
        for r, v in zip(rows, series, strict=True):
            mean = keep * mean + (1 - keep) * v
            smooth.append(at(r[0], mean))
        draw.line(smooth, fill=colour, width=3)
        draw.text((left + 8 + 200 * n, 14), f"loss_{name}", colour, font)
    return image
