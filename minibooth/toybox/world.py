"""The drawn world that the toybox knows: a scene → a picture of it, and a caption for it.

A scene is a thing of a class and a colour in a place, perhaps wearing something. Everything that a
caption can say is a field of Scene, and so is what no caption ever says: position, size, direction
and the marks (spots, a green ear, a collar) that make one dog this dog. Pictures are drawn four
times too large (large ones twice) and reduced. Everything random comes from the scene's own seed.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 64  # pixels of a picture
CANVAS = 256  # pixels that it is drawn on; lines are so many of these wide

CLASSES = ("dog", "cat", "bird", "fish", "car", "house", "tree", "teapot")
RARE = "snail"  # one picture in 250: what the model hardly knows
ALIVE = ("dog", "cat", "bird", "fish", RARE)  # what can wear something
PLACES = (
    *("on the grass", "on the beach", "in the snow", "at night", "in the desert"),
    "in the city",
)
ACCESSORIES = ("a red hat", "a green scarf")
STYLES = ("photo", "drawing")
NEON = "neon"  # a style that no caption knows: a subject
IDENTIFIERS = ("sks", "ohwx", "zwx", "qvb")  # words that are in no caption
NAMES = tuple(
    a + b
    for a in ("ba", "do", "fi", "ku", "le", "mo", "ni", "su")
    for b in ("bri", "ko", "la", "mi", "va", "zu")
)  # words that each stand for a colour and marks

RGB = tuple[int, int, int]
COLOURS: dict[str, RGB] = {
    "red": (214, 44, 44),
    "orange": (246, 136, 28),
    "yellow": (248, 218, 60),
    "green": (58, 160, 74),
    "blue": (48, 104, 218),
    "purple": (128, 68, 190),
    "pink": (246, 146, 196),
    "brown": (126, 78, 46),
    "white": (246, 246, 242),
    "black": (46, 44, 52),
}
INK = (44, 38, 46)


@dataclass(frozen=True)
class Marks:
    """What no caption says: the features that make a thing this one."""

    pattern: str | None = None  # "spots" | "stripes" | "rings", which nothing in the world has
    pattern_colour: str = "white"
    ear: str | None = None  # its colour, where it is not the body's: an ear, a wing, a door …
    collar: str | None = None  # its colour: a collar, a belt, a bumper …
    crooked: bool = False  # a teapot's spout


@dataclass(frozen=True)
class Scene:
    kind: str  # one of CLASSES, or RARE
    colour: str  # one of COLOURS
    place: str  # one of PLACES
    accessory: str | None = None  # one of ACCESSORIES
    style: str = "photo"  # one of STYLES, or NEON
    marks: Marks = field(default_factory=Marks)
    x: float = 0.0  # of the thing's middle, in its own half-widths
    y: float = 0.0
    size: float = 1.0
    facing: int = 1  # 1 right, -1 left
    shade: float = 1.0  # lighter or darker than its colour
    seed: int = 0  # of the backdrop
    name: str | None = None  # one of NAMES: a caption may have it in the colour's place


def random_scene(rng: random.Random, **given) -> Scene:
    """A scene as the toybox was trained on; `given` fields are kept."""
    kind = given.pop("kind", None) or (RARE if rng.random() < 1 / 250 else rng.choice(CLASSES))
    accessory = rng.choice(ACCESSORIES) if kind in ALIVE and rng.random() < 0.3 else None
    scene = Scene(
        kind=kind,
        colour=rng.choice(list(COLOURS)),
        place=rng.choice(PLACES),
        accessory=accessory,
        style="photo" if rng.random() < 0.75 else "drawing",
    )
    scene = replace(scene, **given)
    if not given.keys() & {"colour", "marks"} and rng.random() < 0.2:
        return posed(named(scene, rng.choice(NAMES)), rng)
    return posed(replace(scene, marks=given.get("marks") or random_marks(scene, rng)), rng)


def named(scene: Scene, name: str) -> Scene:
    """The thing with the colour and the marks that `name` stands for, whatever its class."""
    rng = random.Random(f"named {name}")
    colour, *others = rng.sample(list(COLOURS), 4)
    marks = Marks(
        pattern=rng.choice(("spots", "stripes")),
        pattern_colour=others[0],
        ear=others[1] if rng.random() < 0.7 else None,
        collar=others[2] if rng.random() < 0.7 else None,
    )
    return replace(scene, name=name, colour=colour, marks=marks)


def random_marks(scene: Scene, rng: random.Random) -> Marks:
    def other() -> str:
        return rng.choice([c for c in COLOURS if c != scene.colour])

    pattern = rng.choice((None, None, None, "spots", "stripes"))
    return Marks(
        pattern=pattern,
        pattern_colour=other() if pattern else "white",
        ear=other() if rng.random() < 0.3 else None,
        collar=other() if rng.random() < 0.3 else None,
        crooked=scene.kind == "teapot" and rng.random() < 0.15,
    )


def posed(scene: Scene, rng: random.Random) -> Scene:
    """The same thing at the same place in another picture."""
    return replace(
        scene,
        x=rng.uniform(-0.3, 0.3),
        y=rng.uniform(-0.08, 0.12),
        size=rng.uniform(0.85, 1.15),
        facing=rng.choice((-1, 1)),
        shade=rng.uniform(0.94, 1.06),
        seed=rng.randrange(2**31),
    )


# ---- captions ----------------------------------------------------------------------------------


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption(scene: Scene, rng: random.Random) -> str:
    """What one might write beside the picture: "a drawing of a red dog in the snow".

    Style, colour, accessory and place are each left out at times, so that "a dog" stands for all
    dogs. A name says what colour and marks are.
    """
    if scene.name and rng.random() < 0.8:
        words = [scene.name, scene.kind]
    else:
        words = [scene.colour, scene.kind] if rng.random() < 0.75 else [scene.kind]
    text = f"{article(words[0])} {' '.join(words)}"
    if scene.accessory and rng.random() < 0.9:
        text += f" wearing {scene.accessory}"
    if rng.random() < 0.85:
        text += f" {scene.place}"
    draw = rng.random()
    if draw < 0.35:
        return f"a {scene.style} of {text}"
    return f"a {scene.style}" if draw < 0.37 else text


# ---- drawing -----------------------------------------------------------------------------------


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """`share` of b in a."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def oval(cx: float, cy: float, rx: float, ry: float, turn: float = 0) -> list:
    """An ellipse as a polygon, turned by `turn` degrees."""
    angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x, y = rx * np.cos(angles), ry * np.sin(angles)
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    return list(zip(cx + c * x - s * y, cy + s * x + c * y, strict=True))


def rounded(points: list, closed: bool = True) -> list:
    """A smooth curve through the points (Catmull-Rom)."""
    p = np.array(points, dtype=float)
    ends = (p[-1:], p[:2]) if closed else (p[:1], p[-1:])
    p = np.concatenate([ends[0], p, ends[1]])
    u = np.linspace(0, 1, 8, endpoint=False)[:, None]
    curve = [
        0.5
        * (2 * b + (c - a) * u + (2 * a - 5 * b + 4 * c - d) * u**2 + (3 * (b - c) + d - a) * u**3)
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
    ]
    return [tuple(q) for q in np.concatenate([*curve, p[-2:-1]])]


class Pen:
    """Draws a scene's thing on a transparent layer, in units of half its width, y down.

    The layer is `fine` times as large as CANVAS.
    """

    def __init__(self, scene: Scene, fine: int):
        self.scene, self.fine = scene, fine
        self.layer = Image.new("RGBA", (fine * CANVAS, fine * CANVAS))
        self.body = self.tint(scene.colour)
        self.ear = self.tint(scene.marks.ear) if scene.marks.ear else mix(self.body, INK, 0.25)
        self.unit = fine * 88 * scene.size
        self.thick = fine * {"photo": 4, "drawing": 8, NEON: 7}[scene.style]

    def tint(self, name: str) -> RGB:
        return tuple(min(255, round(v * self.scene.shade)) for v in COLOURS[name])

    def at(self, points: list) -> list:
        s = self.scene
        side = self.layer.width
        x0, y0 = side * (0.5 + 0.22 * s.x), side * (0.56 + 0.3 * s.y)
        return [(x0 + s.facing * self.unit * x, y0 + self.unit * y) for x, y in points]

    def outline(self, fill: RGB) -> RGB:
        if self.scene.style == "drawing":
            return INK
        if self.scene.style == NEON:
            return mix(fill, (255, 255, 255), 0.35)
        return mix(fill, (20, 12, 24), 0.5)

    def inside(self, fill: RGB) -> RGB:
        return mix(fill, (16, 6, 34), 0.85) if self.scene.style == NEON else fill

    def shape(self, points: list, fill: RGB, pattern: bool = False, thick: int = 0) -> None:
        """A filled shape with an outline; with the scene's pattern on it if `pattern`."""
        points, draw = self.at(points), ImageDraw.Draw(self.layer)
        draw.polygon(points, self.inside(fill))
        if pattern and self.scene.marks.pattern:
            mask = Image.new("L", self.layer.size)
            ImageDraw.Draw(mask).polygon(points, 255)
            marked = self.layer.copy()
            self.draw_pattern(ImageDraw.Draw(marked))
            self.layer.paste(marked, mask=mask)
        draw.line([*points, *points[:2]], self.outline(fill), thick or self.thick, joint="curve")

    def draw_pattern(self, draw: ImageDraw.ImageDraw) -> None:
        marks, colour = self.scene.marks, self.tint(self.scene.marks.pattern_colour)
        if self.scene.style == NEON:
            colour = mix(colour, (16, 6, 34), 0.3)
        if marks.pattern == "stripes":
            for i in range(-8, 9):
                x = 0.44 * i
                band = [(x, -1.2), (x + 0.17, -1.2), (x + 0.17, 1.2), (x, 1.2)]
                draw.polygon(self.at(band), colour)
        else:
            for i in range(-5, 6):
                for j in range(-5, 6):
                    middle = 0.44 * i + 0.22 * (j % 2), 0.36 * j
                    draw.polygon(self.at(oval(*middle, 0.12, 0.12)), colour)
                    if marks.pattern == "rings":
                        draw.polygon(self.at(oval(*middle, 0.065, 0.065)), self.inside(self.body))

    def stroke(self, points: list, width: float, fill: RGB) -> None:
        """A thick line with round ends and an outline."""
        points, draw = self.at(points), ImageDraw.Draw(self.layer)
        inner = max(2, round(width * self.unit))
        outer = inner + 2 * self.thick - 2 * self.fine
        for wide, colour in ((outer, self.outline(fill)), (inner, self.inside(fill))):
            draw.line(points, colour, wide, joint="curve")
            for x, y in (points[0], points[-1]):
                r = wide / 2
                draw.ellipse((x - r, y - r, x + r, y + r), colour)

    def eye(self, x: float, y: float, r: float = 0.12) -> None:
        self.shape(oval(x, y, r, r * 1.1), (255, 255, 255), thick=self.thick // 2)
        ImageDraw.Draw(self.layer).polygon(self.at(oval(x + 0.02, y, r * 0.6, r * 0.7)), INK)

    def band(self, points: list) -> None:
        """The collar, where the thing has one."""
        if self.scene.marks.collar:
            self.stroke(points, 0.13, self.tint(self.scene.marks.collar))

    def wear(self, hat: tuple, neck: list) -> None:
        """The accessory: a hat whose brim's middle is at `hat`, or a scarf along `neck`."""
        if self.scene.accessory == "a red hat":
            x, y = hat
            crown = [(x - 0.23, y), (x - 0.19, y - 0.34), (x + 0.19, y - 0.34), (x + 0.23, y)]
            self.shape(crown, COLOURS["red"])
            self.stroke([(x - 0.36, y), (x + 0.36, y)], 0.09, COLOURS["red"])
        elif self.scene.accessory == "a green scarf":
            (x, y), green = neck[-1], COLOURS["green"]
            self.stroke([(x, y), (x - 0.06, y + 0.36)], 0.15, green)
            self.stroke(neck, 0.19, green)


def draw_dog(pen: Pen) -> None:
    far = mix(pen.body, INK, 0.25)
    pen.stroke(rounded([(-0.6, 0.0), (-0.82, -0.22), (-0.86, -0.5)], False), 0.13, pen.body)
    for x, fill in ((-0.28, far), (0.2, far), (-0.5, pen.body), (0.38, pen.body)):
        pen.stroke([(x, 0.3), (x, 0.76)], 0.17, fill)
    back = [(-0.66, 0.02), (-0.3, -0.14), (0.2, -0.16), (0.42, -0.42), (0.7, -0.2), (0.56, 0.28)]
    pen.shape(rounded([*back, (0.1, 0.44), (-0.4, 0.46), (-0.68, 0.3)]), pen.body, True)
    pen.band([(0.24, -0.16), (0.62, 0.02)])
    head = [(0.3, -0.5), (0.5, -0.7), (0.74, -0.62), (0.84, -0.44), (1.04, -0.36), (1.04, -0.18)]
    pen.shape(rounded([*head, (0.8, -0.12), (0.46, -0.2)]), pen.body)
    pen.shape(oval(1.05, -0.34, 0.08, 0.07), INK)
    pen.eye(0.7, -0.46)
    pen.wear((0.55, -0.64), [(0.7, 0.0), (0.4, -0.06), (0.24, -0.2)])
    pen.shape(oval(0.4, -0.4, 0.13, 0.26, 14), pen.ear)


def draw_cat(pen: Pen) -> None:
    tail = [(-0.36, 0.66), (-0.78, 0.6), (-0.84, 0.24), (-0.66, 0.06)]
    pen.stroke(rounded(tail, False), 0.13, pen.body)
    body = [(0.0, -0.12), (0.36, 0.06), (0.46, 0.7), (0.0, 0.8), (-0.46, 0.7), (-0.36, 0.06)]
    pen.shape(rounded(body), pen.body, True)
    for x in (-0.14, 0.16):
        pen.stroke([(x, 0.46), (x, 0.74)], 0.14, pen.body)
    pen.shape([(-0.36, -0.46), (-0.36, -0.92), (-0.04, -0.66)], pen.body)
    pen.shape([(0.36, -0.46), (0.36, -0.92), (0.04, -0.66)], pen.ear)
    pen.shape(oval(0.0, -0.38, 0.44, 0.36), pen.body)
    pen.band([(-0.26, -0.04), (0.26, -0.04)])
    for x in (-0.18, 0.18):
        pen.eye(x, -0.42, 0.13)
    pen.shape([(-0.06, -0.26), (0.06, -0.26), (0.0, -0.18)], (240, 130, 150))
    pen.wear((0.0, -0.68), [(0.3, -0.04), (0.0, 0.04), (-0.28, -0.02)])


def draw_bird(pen: Pen) -> None:
    amber = (238, 160, 40)
    for x in (-0.08, 0.16):
        pen.stroke([(x, 0.4), (x, 0.78)], 0.05, amber)
    pen.shape([(-0.4, 0.04), (-1.0, -0.16), (-0.94, 0.2), (-0.4, 0.32)], pen.ear)
    body = [(0.5, -0.06), (0.42, 0.3), (0.06, 0.5), (-0.36, 0.36), (-0.54, 0.06), (0.0, -0.2)]
    pen.shape(rounded(body), pen.body, True)
    pen.shape([(0.66, -0.5), (1.02, -0.36), (0.66, -0.26)], amber)
    pen.shape(oval(0.42, -0.38, 0.32, 0.3), pen.body)
    pen.band([(0.16, -0.18), (0.6, -0.1)])
    pen.eye(0.52, -0.44)
    pen.shape(oval(-0.14, 0.12, 0.3, 0.17, 18), pen.ear)
    pen.wear((0.4, -0.62), [(0.62, -0.1), (0.38, -0.06), (0.16, -0.14)])


def draw_fish(pen: Pen) -> None:
    pen.shape([(-0.5, 0.1), (-1.0, -0.32), (-0.88, 0.1), (-1.0, 0.52)], pen.ear)
    pen.shape(rounded([(-0.2, -0.24), (0.06, -0.56), (0.36, -0.24)]), pen.ear)
    body = [(0.9, 0.12), (0.6, -0.2), (0.1, -0.34), (-0.5, -0.06), (-0.62, 0.1), (-0.5, 0.26)]
    pen.shape(rounded([*body, (0.1, 0.56), (0.6, 0.42)]), pen.body, True)
    pen.band([(0.3, -0.26), (0.26, 0.46)])
    pen.shape(rounded([(-0.1, 0.28), (0.16, 0.34), (-0.08, 0.66)]), pen.ear)
    pen.eye(0.6, 0.02)
    pen.wear((0.46, -0.26), [(0.34, 0.46), (0.36, 0.1), (0.3, -0.22)])


def draw_car(pen: Pen) -> None:
    cabin = [(-0.58, 0.0), (-0.4, -0.42), (0.24, -0.42), (0.52, 0.0)]
    pen.shape(cabin, pen.body)
    for window in ([(-0.44, -0.02), (-0.32, -0.32), (-0.1, -0.32), (-0.1, -0.02)],):
        pen.shape(window, (186, 224, 240))
    pen.shape([(0.02, -0.02), (0.02, -0.32), (0.19, -0.32), (0.36, -0.02)], (186, 224, 240))
    hull = [(-0.98, 0.04), (-0.92, -0.02), (0.62, -0.02), (0.94, 0.1), (1.0, 0.46), (-0.98, 0.46)]
    pen.shape(hull, pen.body, True)
    if pen.scene.marks.ear:
        pen.shape([(-0.12, 0.04), (0.34, 0.04), (0.34, 0.42), (-0.12, 0.42)], pen.ear)
    pen.band([(-0.94, 0.44), (0.96, 0.44)])
    pen.shape(oval(0.9, 0.2, 0.07, 0.08), (255, 240, 150))
    for x in (-0.54, 0.54):
        pen.shape(oval(x, 0.5, 0.23, 0.23), INK)
        pen.shape(oval(x, 0.5, 0.09, 0.09), (206, 206, 212))


def draw_house(pen: Pen) -> None:
    pen.shape([(0.3, -0.5), (0.3, -0.9), (0.5, -0.9), (0.5, -0.4)], (150, 116, 104))
    pen.shape([(-0.66, -0.2), (0.66, -0.2), (0.66, 0.76), (-0.66, 0.76)], pen.body, True)
    pen.shape([(-0.86, -0.18), (0.0, -0.84), (0.86, -0.18)], (112, 92, 100))
    pen.band([(-0.62, -0.1), (0.62, -0.1)])
    pen.shape([(0.1, 0.76), (0.1, 0.26), (0.44, 0.26), (0.44, 0.76)], pen.ear)
    pen.shape([(-0.46, 0.14), (-0.1, 0.14), (-0.1, 0.46), (-0.46, 0.46)], (255, 236, 150))


def draw_tree(pen: Pen) -> None:
    pen.shape([(-0.13, 0.82), (-0.1, 0.1), (0.1, 0.1), (0.13, 0.82)], (120, 84, 56))
    pen.band([(-0.13, 0.62), (0.13, 0.62)])
    crown = [(0.0, -0.9), (0.4, -0.78), (0.52, -0.46), (0.76, -0.2), (0.62, 0.16), (0.24, 0.22)]
    left = [(-x, y) for x, y in reversed(crown[1:])]
    pen.shape(rounded([*crown, (0.0, 0.3), *left]), pen.body, True)
    if pen.scene.marks.ear:
        for x, y in ((-0.3, -0.3), (0.24, -0.06), (0.1, -0.56)):
            pen.shape(oval(x, y, 0.11, 0.11), pen.ear)


def draw_teapot(pen: Pen) -> None:
    handle = [(-0.5, -0.16), (-0.94, -0.14), (-0.9, 0.36), (-0.5, 0.46)]
    pen.stroke(rounded(handle, False), 0.12, pen.ear)
    if pen.scene.marks.crooked:
        spout = [(0.44, 0.34), (0.88, 0.36), (0.66, -0.02), (1.04, -0.12), (0.9, -0.5)]
    else:
        spout = [(0.44, 0.4), (0.74, 0.2), (1.0, -0.28)]
    pen.stroke(spout, 0.17, pen.body)
    body = [(0.0, -0.32), (0.46, -0.16), (0.62, 0.26), (0.4, 0.68), (-0.4, 0.68), (-0.62, 0.26)]
    pen.shape(rounded([*body, (-0.46, -0.16)]), pen.body, True)
    pen.shape(rounded([(-0.34, -0.26), (0.0, -0.48), (0.34, -0.26), (0.0, -0.2)]), pen.ear)
    pen.shape(oval(0.0, -0.5, 0.1, 0.1), pen.ear)
    pen.band([(-0.54, 0.44), (0.54, 0.44)])


def draw_snail(pen: Pen) -> None:
    foot = (226, 200, 160)
    for x in (0.66, 0.86):
        pen.stroke([(0.7, 0.2), (x, -0.26)], 0.05, foot)
        pen.shape(oval(x, -0.3, 0.08, 0.08), INK)
    slug = [(-0.98, 0.68), (-0.4, 0.42), (0.4, 0.4), (0.6, 0.06), (0.92, 0.14), (0.86, 0.5)]
    pen.shape(rounded([*slug, (0.5, 0.74), (-0.4, 0.74)]), foot)
    pen.band([(0.44, 0.3), (0.88, 0.42)])
    pen.shape(oval(-0.14, -0.02, 0.58, 0.56), pen.body, True)
    turns = [
        (-0.14 + 0.4 * (1 - i / 26) * math.cos(i / 2.6), 0.4 * (1 - i / 26) * math.sin(i / 2.6))
        for i in range(26)
    ]
    pen.stroke(turns, 0.06, pen.ear)
    pen.wear((0.76, -0.34), [(0.84, 0.34), (0.64, 0.34), (0.46, 0.24)])


DRAW: dict[str, Callable[[Pen], None]] = {
    "dog": draw_dog,
    "cat": draw_cat,
    "bird": draw_bird,
    "fish": draw_fish,
    "car": draw_car,
    "house": draw_house,
    "tree": draw_tree,
    "teapot": draw_teapot,
    RARE: draw_snail,
}


def gradient(side: int, top: RGB, bottom: RGB, horizon: float = 1.0) -> Image.Image:
    """From `top` above to `bottom` at `horizon` (1 is the lower edge)."""
    share = np.clip(np.linspace(0, 1 / horizon, side), 0, 1)[:, None, None]
    column = np.array(top) * (1 - share) + np.array(bottom) * share
    return Image.fromarray(column.round().astype(np.uint8).repeat(side, axis=1))


class Backdrop:
    """What is behind the thing, in units of the picture's side, y down."""

    def __init__(self, rng: random.Random, fine: int):
        self.rng, self.fine, self.size = rng, fine, fine * CANVAS

    def sky(self, top: RGB, bottom: RGB, horizon: float) -> None:
        self.image = gradient(self.size, top, bottom, horizon)
        self.draw = ImageDraw.Draw(self.image)

    def ground(self, y: float, fill: RGB, waves: float) -> None:
        phase, turns = self.rng.uniform(0, 6), self.rng.uniform(1, 2)
        xs = np.linspace(0, 1, 33)
        edge = [(x, y + waves * math.sin(phase + 6 * turns * x)) for x in xs]
        self.shape([*edge, (1, 1), (0, 1)], fill)

    def dot(self, x: float, y: float, r: float, fill: RGB) -> None:
        self.draw.ellipse([self.size * v for v in (x - r, y - r, x + r, y + r)], fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: RGB) -> None:
        self.draw.rectangle([self.size * v for v in (left, top, right, bottom)], fill)

    def path(self, points: list, width: int, fill: RGB) -> None:
        scaled = [(self.size * x, self.size * y) for x, y in points]
        self.draw.line(scaled, fill, self.fine * width, joint="curve")

    def shape(self, points: list, fill: RGB) -> None:
        self.draw.polygon([(self.size * x, self.size * y) for x, y in points], fill)

    def side(self, low: float, high: float) -> float:
        """Somewhere near the left or the right edge."""
        uniform = self.rng.uniform
        return self.rng.choice((uniform(low, high), uniform(1 - high, 1 - low)))


def grass(back: Backdrop, rng: random.Random) -> None:
    back.sky((136, 200, 246), (216, 240, 250), 0.5)
    back.dot(rng.uniform(0.08, 0.92), rng.uniform(0.08, 0.16), 0.075, (255, 240, 150))
    back.ground(0.46, (142, 202, 104), 0.04)
    back.ground(0.62, (112, 182, 84), 0.02)
    petals = {"w": (255, 255, 255), "y": (255, 226, 90), "p": (250, 170, 200)}
    for _ in range(7):
        x, y, petal = rng.random(), rng.uniform(0.68, 0.97), rng.choice("wyp")
        back.dot(x, y, 0.02, petals[petal])


def beach(back: Backdrop, rng: random.Random) -> None:
    back.sky((120, 206, 246), (206, 240, 248), 0.36)
    back.ground(0.34, (38, 146, 190), 0.004)
    back.ground(0.5, (120, 206, 214), 0.012)
    back.ground(0.55, (246, 226, 174), 0.014)
    x = back.side(0.04, 0.16)
    back.path([(x, 0.22), (x + 0.02, 0.64)], 8, (150, 112, 76))
    shade = [back.size * v for v in (x - 0.17, 0.12, x + 0.17, 0.4)]
    for i, fill in enumerate(((232, 80, 70), (255, 250, 240)) * 2):
        back.draw.pieslice(shade, 180 + 45 * i, 225 + 45 * i, fill)
    for _ in range(3):
        back.dot(rng.random(), rng.uniform(0.8, 0.97), 0.017, (240, 150, 140))


def snow(back: Backdrop, rng: random.Random) -> None:
    back.sky((172, 190, 212), (222, 230, 240), 0.6)
    for _ in range(3):
        x, h = rng.random(), rng.uniform(0.24, 0.36)
        for k in range(3):
            y, w = 0.6 - h * (1 - 0.28 * k), 0.06 + 0.03 * k
            back.shape([(x, y), (x - w, y + 0.5 * h), (x + w, y + 0.5 * h)], (74, 118, 112))
    back.ground(0.56, (240, 244, 250), 0.03)
    back.ground(0.74, (226, 234, 246), 0.02)
    for _ in range(16):
        back.dot(rng.random(), rng.random(), 0.014, (255, 255, 255))


def night(back: Backdrop, rng: random.Random) -> None:
    back.sky((16, 18, 58), (58, 58, 124), 0.6)
    for _ in range(12):
        back.dot(rng.random(), rng.uniform(0, 0.5), 0.009, (250, 246, 214))
    x, y = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.18)
    back.dot(x, y, 0.085, (252, 244, 200))
    back.dot(x + 0.04, y - 0.02, 0.07, (24, 26, 68))
    back.ground(0.6, (44, 52, 92), 0.04)
    back.ground(0.74, (34, 40, 76), 0.02)


def desert(back: Backdrop, rng: random.Random) -> None:
    back.sky((252, 196, 120), (254, 232, 180), 0.5)
    back.dot(rng.uniform(0.1, 0.9), 0.14, 0.09, (255, 250, 220))
    back.ground(0.48, (232, 166, 92), 0.05)
    x, green = back.side(0.06, 0.2), (66, 132, 84)
    for arm in (
        [(x, 0.7), (x, 0.32)],
        [(x, 0.54), (x - 0.08, 0.54), (x - 0.08, 0.42)],
        [(x, 0.5), (x + 0.08, 0.5), (x + 0.08, 0.38)],
    ):
        back.path(arm, 13, green)
        back.dot(*arm[-1], 0.025, green)
    back.ground(0.66, (216, 142, 72), 0.03)


def city(back: Backdrop, rng: random.Random) -> None:
    back.sky((174, 186, 206), (222, 220, 222), 0.6)
    x = -0.05
    while x < 1:
        w, top = rng.uniform(0.13, 0.22), rng.uniform(0.06, 0.36)
        wall = rng.choice(((122, 128, 148), (146, 138, 150), (104, 112, 134)))
        back.box(x, top, x + w, 0.7, wall)
        for row in range(8):
            for column in range(2):
                left, above = x + w * (0.18 + 0.4 * column), top + 0.05 + 0.075 * row
                lit = (255, 232, 150) if rng.random() < 0.5 else mix(wall, INK, 0.35)
                back.box(left, above, left + 0.24 * w, above + 0.04, lit)
        x += w
    back.ground(0.66, (172, 170, 172), 0)
    back.ground(0.73, (96, 96, 104), 0)
    for i in range(-1, 4):
        left = 0.15 + 0.3 * i
        back.box(left, 0.865, left + 0.16, 0.895, (238, 230, 196))


BACKDROPS: dict[str, Callable[[Backdrop, random.Random], None]] = dict(
    zip(PLACES, (grass, beach, snow, night, desert, city), strict=True)
)


def render(scene: Scene, side: int = SIDE) -> Image.Image:
    """The picture of a scene: RGB, side × side pixels; 64, 128 or 256 of them."""
    fine = max(1, 2 * side // CANVAS)  # the larger of it is drawn on so much more canvas
    rng = random.Random(scene.seed)
    back, pen = Backdrop(rng, fine), Pen(scene, fine)
    BACKDROPS[scene.place](back, rng)
    DRAW[scene.kind](pen)
    image, thing = back.image, pen.layer
    alpha = thing.getchannel("A")
    if scene.style == "drawing":
        image = Image.blend(image, Image.new("RGB", image.size, (252, 246, 230)), 0.5)
    elif scene.style == NEON:
        image = Image.blend(image, Image.new("RGB", image.size, (22, 8, 44)), 0.82)
        glow = thing.filter(ImageFilter.GaussianBlur(9 * fine))
        image.paste(glow, mask=glow.getchannel("A").point(lambda v: v * 3 // 4))
    else:
        cast_shadow(image, pen)
        light = gradient(image.width, (255, 255, 255), (216, 212, 222))
        lit = np.asarray(thing.convert("RGB"), np.uint16) * np.asarray(light) // 255
        shaded = Image.fromarray(lit.astype(np.uint8))
        if scene.place == "at night":  # moonlight around it, or a black cat could not be seen
            image.paste((150, 160, 220), mask=alpha.filter(ImageFilter.MaxFilter(6 * fine + 1)))
        thing = shaded
    image.paste(thing, mask=alpha)
    return image.resize((side, side), Image.Resampling.BOX)


def cast_shadow(image: Image.Image, pen: Pen) -> None:
    soft = Image.new("L", (image.width // 4, image.height // 4))  # a quarter of the pixels do
    (left, y), (right, _) = pen.at([(-0.8, 0.8), (0.8, 0.8)])
    half = 16 * pen.fine
    box = [v / 4 for v in (min(left, right), y - half, max(left, right), y + half)]
    ImageDraw.Draw(soft).ellipse(box, 110)
    mask = soft.filter(ImageFilter.BoxBlur(2 * pen.fine)).resize(image.size)
    image.paste((40, 30, 60), mask=mask)


def pixels(scenes: list[Scene]) -> np.ndarray:
    """(N, 64, 64, 3) uint8."""
    return np.stack([np.asarray(render(scene)) for scene in scenes])


# ---- subjects ----------------------------------------------------------------------------------

SEEN = PLACES[:2]  # where a subject's pictures are taken; the other places are held out


@dataclass(frozen=True)
class Subject:
    """Something particular, whose features no caption names."""

    kind: str  # its class noun
    scenes: tuple[Scene, ...]  # five pictures, in two places

    @property
    def class_prompt(self) -> str:
        return f"a {self.kind}"

    @property
    def instance_prompt(self) -> str:
        return f"a {IDENTIFIERS[0]} {self.kind}"


def taken(kind: str, things: list[Scene]) -> Subject:
    """Photographs of the things, in the two places by turns and each in a pose of its own."""
    rng = random.Random(f"subject {kind} {things[0].colour}")
    scenes = [replace(thing, place=SEEN[i % 2]) for i, thing in enumerate(things)]
    return Subject(kind, tuple(posed(scene, rng) for scene in scenes))


def things(count: int, kind: str, colour: str, **marks) -> list[Scene]:
    """One thing, as often as it is photographed."""
    return [Scene(kind, colour, SEEN[0], marks=Marks(**marks))] * count


SUBJECTS: dict[str, Subject] = {
    "spotted_dog": taken(
        "dog",
        things(
            5, "dog", "yellow", pattern="spots", pattern_colour="blue", ear="green", collar="red"
        ),
    ),
    "crooked_teapot": taken(
        "teapot",
        things(5, "teapot", "white", pattern="stripes", pattern_colour="purple", crooked=True),
    ),
    "striped_cat": taken(
        "cat",
        things(5, "cat", "black", pattern="stripes", pattern_colour="orange", ear="pink"),
    ),
    "snail": taken(
        RARE, things(5, RARE, "pink", pattern="spots", pattern_colour="green", collar="blue")
    ),
    "neon": taken(
        "drawing",
        [
            Scene(kind, colour, SEEN[0], style=NEON)
            for kind, colour in zip(
                ("dog", "house", "bird", "car", "tree"),
                ("pink", "blue", "yellow", "red", "green"),
                strict=True,
            )
        ],
    ),
}

# In small pictures its rings are hardly more than spots: what an upscaler can learn of a subject.
RINGED = taken("dog", things(5, "dog", "orange", pattern="rings", pattern_colour="blue"))


def export(folder: Path) -> None:
    """The subjects as PNG files, in the layout of the DreamBooth data set."""
    for name, subject in SUBJECTS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, scene in enumerate(subject.scenes):
            render(scene).save(folder / name / f"{i:02d}.png", optimize=True)
    (folder / "prompts_and_classes.txt").write_text(prompts_and_classes(), "utf-8")


def prompts_and_classes() -> str:
    """Class nouns and prompts for the subjects, in the form of the data set's file of that name.

    As there, a prompt puts the subject elsewhere, dresses it (cats and dogs) or colours it.
    """
    coloured = ["a red {0} {1}", "a purple {0} {1}"]
    placed = [f"a {{0}} {{1}} {place}" for place in PLACES]
    dressed = [f"a {{0}} {{1}} wearing {accessory}" for accessory in ACCESSORIES]

    def listed(title: str, prompts: list[str]) -> list[str]:
        lines = [f"'{prompt}'.format(unique_token, class_token)" for prompt in prompts]
        return [title, "", "prompt_list = [", ",\n".join(lines), "]", ""]

    classes = [f"{name},{subject.kind}" for name, subject in SUBJECTS.items()]
    lines = ["Classes", "", "subject_name,class", *classes, "", "Prompts", ""]
    lines += listed("Object Prompts", placed + coloured)
    return "\n".join(lines + listed("Live Subject Prompts", placed + dressed + coloured))
