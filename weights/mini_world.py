"""The mini world: a small picture book whose every page can be redrawn with exactly one thing changed.

A :class:`Scene` is a plain record and :func:`render` a pure function of it, so the true result of an edit and the exact
region it may touch are known. Shapes are drawn in image pixels (0 to 128, y downwards) on a canvas three times as
large, which is then box-reduced. Everything depends on numpy and pillow only.
"""

import dataclasses
import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 128
SUPERSAMPLE = 3
ANIMALS = ("cat", "dog", "rabbit", "bear", "horse", "zebra")
FURS = ("black", "white", "grey", "brown", "orange")
PLACES = ("meadow", "beach", "snow", "night", "room", "city")
THINGS = ("none", "tree", "house", "sun", "palm", "ball", "moon", "window", "lamp", "car")
ACCESSORIES = ("none", "glasses", "hat")
STYLES = ("photo", "sketch", "oil pastel")
HATS = ("red", "blue", "yellow", "green")
SPLITS = ("held_out", "tuning")
MENTIONS = ("fur", "accessory", "place", "thing")

THINGS_IN = {
    "meadow": ("none", "tree", "house", "sun", "ball"),
    "beach": ("none", "palm", "sun", "ball"),
    "snow": ("none", "tree", "house", "sun"),
    "night": ("none", "moon", "tree", "house", "lamp"),
    "room": ("none", "window", "lamp", "ball"),
    "city": ("none", "car", "lamp", "tree", "sun"),
}
STYLE_PHRASES = {"photo": "a photo", "sketch": "a sketch", "oil pastel": "an oil pastel"}
ACCESSORY_PHRASES = {"none": "", "glasses": "with glasses", "hat": "with a hat"}
PLACE_PHRASES = {
    "meadow": "in a meadow", "beach": "on the beach", "snow": "in the snow",
    "night": "at night", "room": "in a room", "city": "in the city",
}  # fmt: skip
THING_PHRASES = {
    "none": "", "tree": "near a tree", "house": "near a house", "sun": "under the sun", "palm": "near a palm tree",
    "ball": "near a ball", "moon": "under the moon", "window": "by a window", "lamp": "near a lamp",
    "car": "near a car",
}  # fmt: skip
STYLE_ODDS = (0.6, 0.2, 0.2)
ACCESSORY_ODDS = (0.5, 0.25, 0.25)

# Palette ------------------------------------------------------------------------------------------------------------
WHITE, CREAM, INK, PINK = (255, 255, 255), (255, 247, 228), (46, 38, 58), (244, 150, 152)
SHADOW, BLUSH, TONGUE, COLLAR, GOLD = (42, 36, 78), (255, 120, 130), (240, 112, 122), (222, 64, 72), (252, 202, 84)
FRAME, LENS, MOONLIT = (38, 32, 56), (222, 240, 250), (108, 114, 166)
ROOF, BARK, LEAF, GLOW = (218, 92, 78), (134, 92, 72), (86, 160, 96), (255, 222, 130)
HAT_COLOURS = {"red": (218, 62, 70), "blue": (64, 108, 206), "yellow": (244, 186, 58), "green": (52, 148, 112)}


@dataclasses.dataclass(frozen=True)
class Coat:
    """Tones of one fur colour: base, light (belly, muzzle), shade (dark side), line (outline) and whiskers."""

    base: tuple
    light: tuple
    shade: tuple
    line: tuple
    whisker: tuple


COATS = {
    "black": Coat((66, 62, 80), (124, 116, 136), (50, 46, 64), (26, 22, 38), (240, 236, 244)),
    "white": Coat((252, 248, 242), (255, 255, 252), (226, 220, 230), (150, 140, 164), (86, 74, 100)),
    "grey": Coat((160, 166, 182), (220, 224, 232), (134, 138, 158), (84, 86, 110), (56, 52, 76)),
    "brown": Coat((156, 102, 70), (228, 190, 152), (128, 80, 56), (82, 48, 38), (255, 244, 228)),
    "orange": Coat((244, 158, 72), (255, 222, 172), (222, 128, 54), (154, 80, 38), (112, 52, 32)),
    "zebra": Coat((250, 248, 244), (236, 230, 232), (224, 220, 230), (70, 62, 82), INK),
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """One picture.

    Args:
        animal, fur, place, thing, accessory, style: names from the tuples of this module.
        x, y: where the animal stands, in pixels; its thing stands on the other side of the picture.
        size: scale of the animal, about 0.92 to 1.08.
        facing: 1 right, -1 left.
        head_tilt: degrees, about -9 to 9.
        gaze: where the eyes look, -1 (left) to 1 (right).
        tail, ears: pose of tail and ears, -1 to 1.
        blink: eyes closed.
        hat_colour: one of HATS; drawn only with the hat.
        background_seed: decides everything behind the animal.
        style_seed: picks one of the few stroke sheets of sketches and pastels.

    Raises:
        ValueError: for an unknown name.
    """

    animal: str
    fur: str
    place: str
    thing: str
    accessory: str
    style: str
    x: float
    y: float
    size: float
    facing: int
    head_tilt: float
    gaze: float
    tail: float
    ears: float
    blink: bool
    hat_colour: str
    background_seed: int
    style_seed: int

    def __post_init__(self):
        for field, names in CHOICES.items():
            _check(field, getattr(self, field), names)


CHOICES = {
    "animal": ANIMALS, "fur": FURS, "place": PLACES, "thing": THINGS,
    "accessory": ACCESSORIES, "style": STYLES, "hat_colour": HATS,
}  # fmt: skip


def _check(what, name, names):
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(map(repr, names))}")


def random_scene(rng, **fixed):
    """Draw a scene at random; its thing suits its place unless both are fixed.

    Args:
        rng: numpy.random.Generator.
        **fixed: fields that are given and not drawn.

    Returns:
        Scene.

    Raises:
        ValueError: for an unknown field or name.
    """
    fields = [field.name for field in dataclasses.fields(Scene)]
    for name in fixed:
        _check("field", name, fields)
    places = [place for place in PLACES if fixed.get("thing", "none") in THINGS_IN[place]] or PLACES
    place = fixed.get("place", places[rng.integers(len(places))])
    _check("place", place, PLACES)
    thing = fixed.get("thing", THINGS_IN[place][rng.integers(len(THINGS_IN[place]))])
    u = rng.uniform(-1, 1, 7)
    drawn = {
        "animal": ANIMALS[rng.integers(len(ANIMALS))], "fur": FURS[rng.integers(len(FURS))],
        "place": place, "thing": thing,
        "accessory": ACCESSORIES[rng.choice(3, p=ACCESSORY_ODDS)], "style": STYLES[rng.choice(3, p=STYLE_ODDS)],
        "x": float(64 + (10 * u[0] if thing == "none" else np.copysign(15 + 4 * abs(u[0]), u[0]))),
        "y": float(113 + 4 * u[1]), "size": float(1 + 0.07 * u[2]), "facing": int(rng.integers(2)) * 2 - 1,
        "head_tilt": float(8 * u[3]), "gaze": float(u[4]), "tail": float(u[5]), "ears": float(u[6]),
        "blink": bool(rng.random() < 0.08), "hat_colour": HATS[rng.integers(len(HATS))],
        "background_seed": int(rng.integers(2**31)), "style_seed": int(rng.integers(2)),
    }  # fmt: skip
    return Scene(**(drawn | fixed))


# Pen ----------------------------------------------------------------------------------------------------------------
@functools.cache
def _spline(count, closed, samples=7):
    """Index table and weights of a Catmull-Rom curve through `count` points."""
    index = np.arange(count if closed else count - 1)[:, None] + np.arange(-1, 3)
    index = index % count if closed else index.clip(0, count - 1)
    t = np.arange(samples)[:, None] / samples
    weights = np.hstack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2]) / 2
    return index, weights


@functools.cache
def _circle(count=44):
    angle = np.arange(count) * (2 * np.pi / count)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def curve(points, closed=False):
    """Smooth curve through control points [n, 2]; returns [m, 2]."""
    points = np.asarray(points, float)
    index, weights = _spline(len(points), closed)
    smooth = (weights @ points[index]).reshape(-1, 2)
    return smooth if closed else np.vstack([smooth, points[-1:]])


def mirrored(half):
    """Closed outline from its right half [n, 2], given from top to bottom."""
    half = np.asarray(half, float)
    return np.vstack([half, half[half[:, 0] > 0][::-1] * (-1, 1)])


def mix(a, b, t):
    """Colour between a (t = 0) and b (t = 1)."""
    return tuple(round(p + (q - p) * t) for p, q in zip(a, b, strict=True))


class Pen:
    """Fills smooth shapes, given in a frame of its own, on a supersampled canvas; a flat pen paints all in white."""

    def __init__(self, image, flat=False, frame=None):
        self.image, self.flat = image, flat
        self.opaque, self.clear = ImageDraw.Draw(image), ImageDraw.Draw(image, None if flat else "RGBA")
        self.matrix, self.offset = frame or (np.eye(2) * SUPERSAMPLE, np.zeros(2))

    def at(self, x, y, scale=1.0, degrees=0.0, widen=1.0):
        """A pen for a frame moved to (x, y), scaled, turned and stretched sideways (widen = -1 mirrors it)."""
        c, s = np.cos(np.radians(degrees)) * scale, np.sin(np.radians(degrees)) * scale
        frame = (self.matrix @ np.array([[c * widen, -s], [s * widen, c]]), self.matrix @ (x, y) + self.offset)
        return Pen(self.image, self.flat, frame)

    def polygon(self, points, colour, line=None, alpha=255, width=1.0):
        """Fill a polygon [n, 2]; `line` outlines it in that colour."""
        flat = (np.asarray(points) @ self.matrix.T + self.offset).ravel().tolist()
        if alpha < 255:
            self.clear.polygon(flat, fill=255 if self.flat else (*colour, alpha))
        else:
            self.opaque.polygon(flat, fill=255 if self.flat else colour)
        if line:
            self.opaque.line(flat + flat[:4], fill=255 if self.flat else line, width=round(SUPERSAMPLE * width))

    def blob(self, points, colour, line=None, alpha=255):
        """Fill the smooth closed curve through control points [n, 2]."""
        self.polygon(curve(points, closed=True), colour, line, alpha)

    def ellipse(self, x, y, rx, ry, colour, line=None, alpha=255):
        """Fill an ellipse."""
        self.polygon(_circle() * (rx, ry) + (x, y), colour, line, alpha)

    def ball(self, x, y, rx, ry, coat):
        """An outlined ellipse in two tones, lit from one side."""
        self.ellipse(x, y, rx, ry, coat.shade, coat.line)
        self.ellipse(x - 0.07 * rx, y - 0.08 * ry, 0.9 * rx, 0.89 * ry, coat.base)

    def lit(self, outline, coat):
        """An outlined blob in two tones, lit from one side."""
        self.blob(outline, coat.shade, coat.line)
        self.blob(outline * (0.92, 0.905) - 0.9, coat.base)

    def box(self, x0, y0, x1, y1, colour, line=None, alpha=255):
        """Fill an axis-parallel rectangle."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, line, alpha)

    def stroke(self, points, width, colour, line=None, taper=1.0, alpha=255):
        """A round-ended thick line through control points; its width ends at `taper` times its start."""
        path = curve(points)
        ahead = np.gradient(path, axis=0)
        ahead /= np.hypot(ahead[:, :1], ahead[:, 1:]) + 1e-9
        half = np.linspace(width, width * taper, len(path))[:, None] / 2
        side, ahead = np.stack([-ahead[:, 1], ahead[:, 0]], 1) * half, ahead * half
        across, along = np.split(_circle(12)[1:6], 2, axis=1)
        end = path[-1] + across * side[-1] + along * ahead[-1]
        start = path[0] - across * side[0] - along * ahead[0]
        self.polygon(np.vstack([path + side, end, (path - side)[::-1], start]), colour, line, alpha)


# Places -------------------------------------------------------------------------------------------------------------
def _gradient(*stops):
    """Canvas with a vertical gradient through (y, colour) stops."""
    rows = np.arange(SIZE * SUPERSAMPLE) / SUPERSAMPLE
    heights = [y for y, _ in stops]
    column = np.stack([np.interp(rows, heights, [c[i] for _, c in stops]) for i in range(3)], 1).round()
    wide = np.repeat(column[:, None].astype(np.uint8), SIZE * SUPERSAMPLE, 1)
    return Image.fromarray(wide)


def _hill(pen, y, height, phase, waves, colour):
    x = np.linspace(-2, 130, 34)
    crest = y - height * np.sin(x / 128 * waves * 2 * np.pi + phase)
    pen.polygon(np.vstack([np.stack([x, crest], 1), [(130, 130), (-2, 130)]]), colour)


def _cloud(pen, x, y, scale, colour=WHITE, alpha=225):
    puffs = [(-15, 3), (-13, -3), (-7, -4), (-3, -9), (4, -9), (7, -4), (13, -4), (16, 3)]
    pen.at(x, y, scale).blob(puffs, colour, alpha=alpha)


def _meadow(rng):
    u = rng.random(12)
    image = _gradient((0, (126, 200, 240)), (70, (220, 240, 240)))
    pen = Pen(image)
    _cloud(pen, 14 + 34 * u[0], 16 + 8 * u[1], 0.8 + 0.3 * u[2])
    _cloud(pen, 74 + 40 * u[3], 24 + 10 * u[4], 0.7 + 0.3 * u[5])
    _hill(pen, 72, 7, 6.3 * u[6], 1.1, (164, 208, 178))
    _hill(pen, 82, 6, 6.3 * u[7], 0.9, (140, 200, 128))
    _hill(pen, 94, 4, 6.3 * u[8], 0.7, (122, 188, 104))
    _hill(pen, 112, 4, 6.3 * u[9], 0.8, (108, 176, 94))
    for i, colour in enumerate((WHITE, (255, 222, 110), (250, 150, 160))):
        x, y = (10 + 42 * i + 60 * u[10]) % 118 + 5, 118 + 4 * ((0.4 * i + u[11]) % 1)
        for dx, dy in ((-2, 0), (2, 0), (0, -2), (0, 2)):
            pen.ellipse(x + dx, y + dy, 1.9, 1.9, colour)
        pen.ellipse(x, y, 1.4, 1.4, (240, 150, 60))
    return image


def _beach(rng):
    u = rng.random(8)
    sky, sea = ((0, (118, 204, 236)), (62, (255, 228, 198))), ((62.3, (64, 176, 200)), (90, (120, 218, 216)))
    image = _gradient(*sky, *sea)
    pen = Pen(image)
    _cloud(pen, 20 + 84 * u[0], 22 + 12 * u[1], 0.8 + 0.3 * u[2])
    for i in range(2):
        x = 16 + 60 * i + 40 * u[3 + i]
        pen.stroke([(x, 70 + 6 * i), (x + 9, 69 + 6 * i), (x + 18, 70 + 6 * i)], 2, (176, 232, 232))
    _hill(pen, 86, 2, 6.3 * u[5], 1.3, (236, 250, 246))
    _hill(pen, 89.5, 2, 6.3 * u[5], 1.3, (246, 218, 160))
    _hill(pen, 110, 3, 6.3 * u[6], 0.8, (238, 204, 142))
    star = pen.at(12 + 104 * u[7], 122, 1, 20)
    spikes = [(r * np.sin(a), -r * np.cos(a)) for a, r in zip(np.arange(10) * np.pi / 5, (5, 2.4) * 5, strict=True)]
    star.blob(spikes, (240, 128, 100))
    return image


def _snow(rng):
    u = rng.random(24)
    image = _gradient((0, (170, 196, 232)), (80, (236, 236, 248)))
    pen = Pen(image)
    for i in range(3):
        x, y, w = -4 + 48 * i + 30 * u[i], 40 + 12 * u[3 + i], 36 + 10 * u[6 + i]
        pen.polygon([(x, y), (x + w, 94), (x - w, 94)], (150, 172, 212))
        tip = (0, y), (0.3 * w, y + 15), (5, y + 12), (0, y + 18), (-5, y + 12), (-0.3 * w, y + 15)
        pen.at(x, 0).polygon(tip, WHITE)
    _hill(pen, 84, 4, 6.3 * u[9], 0.9, (214, 228, 246))
    _hill(pen, 98, 4, 6.3 * u[10], 0.7, (230, 239, 250))
    _hill(pen, 116, 3, 6.3 * u[11], 0.8, (242, 247, 253))
    for i in range(6):
        pen.ellipse((10 + 21 * i + 14 * u[12 + i]) % 128, 8 + 62 * u[18 + i], 1.7, 1.7, WHITE)
    return image


def _night(rng):
    u = rng.random(18)
    image = _gradient((0, (28, 32, 82)), (60, (70, 66, 136)), (86, (116, 92, 160)))
    pen = Pen(image)
    for i in range(6):
        star = pen.at(8 + 20 * i + 12 * u[i], 6 + 44 * u[6 + i])
        star.polygon(mirrored([(0, -3), (0.9, -0.9), (2.8, 0), (0.9, 0.9), (0, 3)]), (255, 240, 190))
    _hill(pen, 76, 7, 6.3 * u[12], 1.1, (64, 70, 132))
    _hill(pen, 88, 5, 6.3 * u[13], 0.9, (52, 70, 116))
    _hill(pen, 100, 4, 6.3 * u[14], 0.7, (46, 72, 104))
    _hill(pen, 116, 3, 6.3 * u[15], 0.8, (38, 62, 92))
    return image


ROOMS = (((250, 214, 190), (244, 198, 172)), ((204, 222, 200), (188, 210, 188)), ((222, 208, 234), (208, 192, 222)))
RUGS = ((204, 92, 92), (86, 140, 168), (226, 160, 84))


def _room(rng):
    u = rng.random(4)
    wall, stripe = ROOMS[int(3 * u[0])]
    rug = RUGS[int(3 * u[1])]
    floor = 88 + 4 * u[2]
    image = _gradient((0, wall), (floor, mix(wall, WHITE, 0.25)), (floor + 0.3, (214, 164, 120)), (128, (190, 136, 96)))
    pen = Pen(image)
    for x in np.arange(-20, 128, 24) + 24 * u[3]:
        pen.box(x, 0, x + 11, floor, stripe, alpha=150)
    pen.box(-2, floor - 6, 130, floor, CREAM)
    pen.box(-2, floor - 0.8, 130, floor + 0.8, (164, 112, 82))
    pen.box(-2, floor + 13, 130, floor + 14, (176, 124, 90))
    pen.ellipse(64, 114, 58, 12, rug)
    pen.ellipse(64, 114, 53, 10, mix(rug, CREAM, 0.55))
    pen.ellipse(64, 114, 50, 8.8, rug)
    return image


HOUSE_FRONTS = ((232, 140, 116), (242, 196, 120), (128, 176, 184), (190, 150, 190))


def _city(rng):
    u = rng.random(12)
    image = _gradient((0, (158, 202, 234)), (80, (252, 230, 208)))
    pen = Pen(image)
    for i in range(6):
        x = -8 + 24 * i + 6 * u[i]
        pen.box(x, 26 + 26 * ((u[0] + 0.37 * i) % 1), x + 19, 96, (186, 198, 222))
    for i in range(4):
        x, y = -6 + 36 * i + 8 * u[6] - 4, 46 + 14 * ((u[7] + 0.41 * i) % 1)
        front = HOUSE_FRONTS[(i + int(4 * u[8])) % 4]
        pen.box(x, y, x + 30, 98, front)
        pen.box(x - 1, y - 2, x + 31, y + 2, mix(front, INK, 0.25))
        for row in range(2):
            for column in range(2):
                pen.box(x + 5 + 12 * column, y + 7 + 14 * row, x + 13 + 12 * column, y + 16 + 14 * row, (255, 240, 196))
    pen.box(-2, 95, 130, 104, (206, 200, 206))
    pen.box(-2, 103, 130, 130, (150, 148, 164))
    pen.box(-2, 103, 130, 104.5, (126, 122, 142))
    for x in np.arange(-30, 128, 38) + 38 * u[9]:
        pen.box(x, 120, x + 18, 122.5, (244, 236, 214))
    return image


PLACE_DRAWINGS = {"meadow": _meadow, "beach": _beach, "snow": _snow, "night": _night, "room": _room, "city": _city}


# Things: each is drawn around x = 0, in pixels, on its own side of the picture --------------------------------------
def _tree(pen):
    pen.ellipse(0, 99, 15, 3, SHADOW, alpha=60)
    pen.stroke([(0, 99), (0.5, 84), (0, 68)], 7, BARK, mix(BARK, INK, 0.4), taper=0.7)
    crown = mirrored([(0, 34), (10, 39), (15, 50), (19, 61), (15, 72), (5, 76)])
    pen.blob(crown, mix(LEAF, INK, 0.12), mix(LEAF, INK, 0.45))
    pen.ellipse(-3, 57, 13, 14, LEAF)
    pen.ellipse(-6, 50, 6.5, 7, mix(LEAF, (240, 240, 120), 0.28))


def _house(pen):
    wall, line = (255, 236, 204), (150, 104, 92)
    pen.ellipse(0, 99, 23, 3, SHADOW, alpha=60)
    pen.box(7, 50, 13, 64, ROOF, mix(ROOF, INK, 0.4))
    pen.box(-16, 68, 16, 99, wall, line)
    pen.box(9, 69, 15.4, 98.5, mix(wall, ROOF, 0.18))
    pen.polygon([(-21, 71), (-1, 46), (1, 46), (21, 71)], ROOF, mix(ROOF, INK, 0.4))
    pen.box(-12, 80, -2, 98.5, (122, 152, 182), line)
    pen.box(3, 79, 12, 89, GLOW, line)
    pen.ellipse(-4, 90, 0.9, 0.9, GOLD)


def _sun(pen):
    pen.ellipse(0, 24, 19, 19, (255, 236, 150), alpha=70)
    for angle in np.arange(8) * np.pi / 4 + 0.2:
        c, s = np.cos(angle), np.sin(angle)
        ray = (12 * c - 3 * s, 12 * s + 3 * c), (19 * c, 19 * s), (12 * c + 3 * s, 12 * s - 3 * c)
        pen.at(0, 24).polygon(ray, (255, 190, 66))
    pen.ellipse(0, 24, 12, 12, (255, 206, 72), (238, 158, 52))
    pen.ellipse(-2, 22, 8, 8, (255, 224, 112))


def _palm(pen):
    pen.ellipse(2, 99, 13, 2.6, SHADOW, alpha=60)
    pen.stroke([(5, 99), (3, 80), (-1, 62), (0, 46)], 7, (180, 130, 86), (118, 78, 56), taper=0.62)
    for y, x in ((90, 4.2), (80, 3), (70, 0.8), (60, -0.8)):
        pen.stroke([(x - 2.4, y), (x, y + 1), (x + 2.4, y)], 1.2, (140, 96, 64))
    for dx, dy in ((-20, 8), (-18, -6), (-6, -14), (8, -14), (19, -5), (20, 9)):
        leaf = [(0, 45), (dx * 0.45 - 1, 45 + dy * 0.6 - 6), (dx, 45 + dy), (dx * 0.55, 45 + dy * 0.55 + 1.5)]
        pen.blob(leaf, (72, 158, 104), (38, 104, 82))
    pen.ellipse(-2, 47, 2.8, 2.8, (146, 92, 60))
    pen.ellipse(3, 47.5, 2.8, 2.8, (128, 78, 52))


def _ball(pen):
    pen.ellipse(1, 112, 12, 3, SHADOW, alpha=70)
    pen = pen.at(0, 101, degrees=-20)
    pen.ellipse(0, 0, 11.5, 11.5, CREAM, (110, 70, 96))
    for side, colour in ((-1, (232, 76, 80)), (1, (70, 140, 206))):
        outer = [(11 * np.sin(a) * side, -11 * np.cos(a)) for a in np.linspace(0, np.pi, 15)]
        inner = [(4 * np.sin(a) * side, 11 * np.cos(a)) for a in np.linspace(0, np.pi, 9)]
        pen.polygon(outer + inner, colour)
    pen.ellipse(-4, -5, 2.6, 3.4, WHITE, alpha=190)


def _moon(pen):
    pen.ellipse(0, 25, 21, 21, (190, 190, 240), alpha=26)
    pen.ellipse(0, 25, 17, 17, (190, 190, 240), alpha=30)
    outer = [(14 * np.cos(a), 25 + 14 * np.sin(a)) for a in np.linspace(-2.2, 2.2, 26) + 2.7]
    inner = [(6 + 11.6 * np.cos(a), 22 + 11.6 * np.sin(a)) for a in np.linspace(1.75, -1.75, 22) + 2.7]
    pen.polygon(outer + inner, (255, 232, 150), (232, 190, 106))


def _window(pen):
    frame = (255, 250, 240)
    pen.box(-17, 16, 17, 60, frame, (176, 140, 124))
    for x in (-14, 1.2):
        pen.box(x, 19, x + 12.8, 37, (142, 206, 240))
        pen.box(x, 39.5, x + 12.8, 57, (172, 222, 244))
    pen.ellipse(7.6, 30, 4.5, 2.6, WHITE)
    for side in (-1, 1):
        curtain = (21, 15), (9, 15), (13, 34), (18, 61), (22, 61)
        pen.at(0, 0, widen=side).polygon(curtain, (236, 120, 110), (172, 76, 80))
    pen.stroke([(-23, 14), (0, 14), (23, 14)], 3, (150, 98, 76))
    pen.box(-20, 58, 20, 62, frame, (176, 140, 124))


def _lamp(pen):
    pole = (78, 70, 98)
    pen.ellipse(0, 50, 21, 19, GLOW, alpha=36)
    pen.ellipse(0, 50, 16, 15, GLOW, alpha=50)
    pen.ellipse(0, 102, 12, 2.6, SHADOW, alpha=60)
    pen.stroke([(0, 100), (0, 80), (0, 58)], 3.2, pole)
    pen.ellipse(0, 100, 8.5, 3, pole, mix(pole, INK, 0.5))
    pen.polygon([(-7, 38), (7, 38), (13, 59), (-13, 59)], GLOW, (190, 120, 60))
    pen.polygon([(-4, 39), (2, 39), (3, 58), (-8, 58)], (255, 242, 190))


def _car(pen):
    body, line = (226, 84, 80), (126, 40, 56)
    pen.ellipse(0, 105, 23, 3, SHADOW, alpha=80)
    cabin = [(-13, 88), (-10, 77), (-3, 74), (6, 75), (12, 80), (15, 88)]
    pen.blob(cabin, body, line)
    pen.polygon([(-10.5, 88), (-8, 79), (-1, 77.5), (-1, 88)], (196, 230, 244), line)
    pen.polygon([(2, 88), (2, 77.5), (6, 78.5), (11, 88)], (196, 230, 244), line)
    hull = [(-21, 90), (-12, 87), (0, 87), (14, 87), (21, 91), (21, 99), (12, 101), (-12, 101), (-21, 99)]
    pen.blob(hull, body, line)
    pen.box(-19, 94, 20, 95.4, mix(body, WHITE, 0.45))
    pen.ellipse(20, 92.5, 1.8, 2, GLOW)
    for x in (-11.5, 12):
        pen.ellipse(x, 101, 5.4, 5.4, (60, 54, 72), INK)
        pen.ellipse(x, 101, 2.3, 2.3, (214, 214, 224))


def _nothing(pen):
    pass


def _snowy_tree(pen):
    _tree(pen)
    cap = mirrored([(0, 33), (10, 38), (15, 47), (17, 55), (12, 51), (8, 56), (4, 49), (0, 52)])
    pen.blob(cap, WHITE, (170, 186, 216))


def _snowy_house(pen):
    _house(pen)
    cap = mirrored([(0, 44), (10, 55), (22, 70), (17, 72), (12, 65), (7, 66), (3, 59), (0, 61)])
    pen.blob(cap, WHITE, (170, 186, 216))


THING_DRAWINGS = {
    "none": _nothing, "tree": _tree, "house": _house, "sun": _sun, "palm": _palm, "ball": _ball,
    "moon": _moon, "window": _window, "lamp": _lamp, "car": _car,
}  # fmt: skip
SNOWY_DRAWINGS = {"tree": _snowy_tree, "house": _snowy_house}


# Faces and accessories ----------------------------------------------------------------------------------------------
def _is_dark(coat):
    return sum(coat.base) < 240


def _eye(pen, x, y, iris, scene, coat):
    """An eye that looks where the scene says, or its closed lid."""
    pen = pen.at(x, y)
    if scene.blink:
        lid = coat.light if _is_dark(coat) and scene.accessory != "glasses" else INK
        pen.stroke([(-4, -0.5), (0, 2.4), (4, -0.5)], 1.8, lid)
        return
    look = 0.9 * scene.gaze * scene.facing
    pen.ellipse(0, 0, 4.7, 5.3, (255, 253, 248), INK)
    pen.ellipse(look, 0.3, 3.7, 4.3, iris)
    pen.ellipse(look, 0.4, 2.6, 3.3, INK)
    pen.ellipse(look - 1.2, -1.5, 1.5, 1.6, WHITE)


def _lens(pen, x, y, coat, radius=8.0):
    """One round of a pair of glasses, to be drawn below the eye; on dark fur it has a bright rim."""
    pen.ellipse(x, y, radius, radius, FRAME, mix(FRAME, WHITE, 0.85) if _is_dark(coat) else None)
    pen.ellipse(x, y, radius - 2, radius - 2, mix(LENS, coat.base, 0.12))


def _glasses(pen, x, y, coat):
    """Glasses before eyes at (-x, y) and (x, y)."""
    for side in (-1, 1):
        arm = pen.at(side * (x + 7), y, widen=side)
        arm.stroke([(0, -1), (2.5, -1.5), (5.5, -2.5)], 1.8, FRAME)
        _lens(pen, side * x, y, coat)
    pen.stroke([(-x + 7, y - 1), (0, y - 2.4), (x - 7, y - 1)], 2, FRAME)


def _hat(pen, x, y, colour, scale=1.0, degrees=0.0):
    """A round hat with a band, its brim centred on (x, y)."""
    pen, line = pen.at(x, y, scale, degrees), mix(colour, INK, 0.5)
    pen.blob([(-10, 0), (-9, -8), (-5, -13), (0, -12.5), (5, -13), (9, -8), (10, 0), (0, 2)], colour, line)
    pen.blob([(-8, -6), (-6, -10), (-3, -11), (-4, -6)], mix(colour, WHITE, 0.35))
    pen.polygon(curve([(-10, 0.5), (0, 2), (10, 0.5), (9.8, -4), (0, -2.6), (-9.8, -4)]), CREAM)
    pen.ellipse(0, 1, 16, 3.4, colour, line)
    pen.ellipse(-2, 0.3, 12, 1.5, mix(colour, WHITE, 0.18))


def _face(pen, scene, coat, iris, eye_x, eye_y, hat_y):
    """Eyes and accessory of a sitting animal, over the rest of its face."""
    if scene.accessory == "glasses":
        _glasses(pen, eye_x, eye_y, coat)
    for x in (-eye_x, eye_x):
        _eye(pen, x, eye_y, iris, scene, coat)
    if scene.accessory == "hat":
        _hat(pen, 0, hat_y, HAT_COLOURS[scene.hat_colour])


def _cheeks(pen, x, y):
    for side in (-1, 1):
        pen.ellipse(side * x, y, 3.6, 2.4, BLUSH, alpha=90)


def _mouth(pen, y, width=4.0, colour=INK):
    for side in (-1, 1):
        pen.stroke([(0, y - 2), (0.8 * side, y + 0.8), (side * width * 0.6, y + 1.6), (side * width, y)], 1.3, colour)


# Animals: origin on the ground between the feet, drawn as if facing right -------------------------------------------
def _sitting_body(pen, coat, width=1.0, collar=None):
    """The body that cat, dog, rabbit and bear share."""
    pen = pen.at(0, 0, widen=width)
    for side in (-1, 1):
        pen.ellipse(side * 16, -3.2, 8.5, 4, coat.base, coat.line)
    pen.lit(mirrored([(0, -42), (10, -36), (15, -24), (20, -13), (17, -2), (0, -0.5)]), coat)
    pen.ellipse(-0.5, -21, 8.5, 12, coat.light)
    for side in (-1, 1):
        pen.stroke([(side * 6, -18), (side * 6.2, -10), (side * 6, -4)], 8, coat.base, coat.line)
        pen.ellipse(side * 6, -15, 3.4, 6, coat.base)
        pen.ellipse(side * 6.4, -2.8, 5.8, 3.6, coat.base, coat.line)
    if collar:
        pen.stroke([(-11.5, -31), (0, -26.5), (11.5, -31)], 3.6, COLLAR, mix(COLLAR, INK, 0.5))
        pen.ellipse(0, -24.5, 3, 3, GOLD, (150, 96, 40))


def _cat(pen, scene, coat):
    tip = 3 * scene.tail
    tail = [(14, -5), (27, -6), (32, -15), (28 + tip, -25), (32 + tip, -33)]
    pen.stroke(tail, 7.5, coat.base, coat.line, taper=0.75)
    _sitting_body(pen, coat, 0.93)
    head = pen.at(1, -46, 1, scene.head_tilt)
    for side in (-1, 1):
        lean = side * (1.5 + scene.ears)
        ear = head.at(lean, 0, widen=side)
        ear.blob([(19, -4), (18.6, -16), (17, -25), (11, -20), (4, -13), (10, -3)], coat.base, coat.line)
        ear.polygon([(15.6, -10), (15.6, -20), (9, -13.5)], mix(PINK, coat.light, 0.25))
    head.lit(mirrored([(0, -17), (11, -15.5), (18.5, -8), (20.5, 2), (21, 9), (13, 14), (0, 16)]), coat)
    for x in (-4.5, 0, 4.5):
        head.stroke([(x, -15), (x * 0.8, -12), (x * 0.7, -9.5)], 1.9, mix(coat.shade, coat.line, 0.35), taper=0.7)
    head.ellipse(-3.6, 8.5, 5.2, 4.2, coat.light)
    head.ellipse(3.6, 8.5, 5.2, 4.2, coat.light)
    _cheeks(head, 14.5, 7)
    _mouth(head, 9.2, colour=mix(coat.line, INK, 0.6))
    head.blob([(-2.8, 4.6), (0, 4.2), (2.8, 4.6), (0, 7.6)], (236, 110, 122), (150, 60, 80))
    for side in (-1, 1):
        for start, middle, end in ((7.5, 5.6, 4.5), (9.6, 9.7, 10.5)):
            head.stroke([(side * 8.5, start), (side * 18, middle), (side * 28, end)], 1.4, coat.whisker)
    _face(head, scene, coat, (130, 200, 112), 8.6, -1.5, -14.5)


def _dog(pen, scene, coat):
    tip = 3 * scene.tail
    pen.stroke([(14, -6), (24, -10), (28 + tip, -18), (30 + tip, -26)], 8, coat.base, coat.line, taper=0.6)
    _sitting_body(pen, coat, 1.0, collar=True)
    head = pen.at(1, -46, 1, scene.head_tilt)
    head.lit(mirrored([(0, -18), (11, -16.5), (18, -9), (18.6, 2), (16, 11), (9, 16.5), (0, 18)]), coat)
    for side in (-1, 1):
        ear = head.at(side * 11, -15, 1, 5 * scene.ears, widen=side)
        flap = [(-2, -1.5), (5, -2), (11, 7), (14, 21), (10, 28), (6, 24), (5, 13), (2, 6)]
        ear.blob(flap, mix(coat.shade, INK, 0.22), coat.line)
    head.ellipse(8, -2.5, 7, 8, mix(coat.base, INK, 0.25))
    head.blob(mirrored([(0, -1), (6, 2), (10.5, 8), (8, 15), (0, 17)]), coat.light)
    head.blob([(-3, 12), (0, 12.5), (3, 12), (3.2, 17), (0, 20), (-3.2, 17)], TONGUE, (170, 60, 80))
    _mouth(head, 11.2, 6)
    head.blob([(-5, 3.6), (0, 2.4), (5, 3.6), (3.4, 8), (0, 9.6), (-3.4, 8)], (52, 44, 60), INK)
    head.ellipse(-1.6, 4.8, 1.6, 1, (170, 166, 184))
    _face(head, scene, coat, (120, 76, 50), 8.4, -3.5, -15.5)


def _rabbit(pen, scene, coat):
    pen.ball(19 + scene.tail, -8, 7, 7, dataclasses.replace(coat, base=coat.light))
    _sitting_body(pen.at(0, 0, 0.94), coat, 1.0)
    head = pen.at(1, -41, 1, scene.head_tilt)
    for side in (-1, 1):
        ear = head.at(side * 7.5, -11, 1, side * (9 + 5 * scene.ears))
        ear.ellipse(0, -13, 5.8, 17, coat.base, coat.line)
        ear.ellipse(0, -12, 3.1, 12.5, mix(PINK, coat.light, 0.2))
    head.lit(mirrored([(0, -15.5), (10, -14), (16, -7), (18.5, 3), (16.5, 11), (8, 15.5), (0, 16)]), coat)
    head.ellipse(-3.8, 9, 5, 4.4, coat.light)
    head.ellipse(3.8, 9, 5, 4.4, coat.light)
    _cheeks(head, 13.5, 6.5)
    head.box(-2.4, 10, 2.4, 15, WHITE, (150, 140, 160))
    _mouth(head, 9.4, 4.4, mix(coat.line, INK, 0.6))
    head.blob([(-2.8, 4.6), (0, 4), (2.8, 4.6), (0, 7.8)], (240, 120, 140), (160, 70, 96))
    _face(head, scene, coat, (150, 90, 110), 8.2, -2, -12.5)


def _bear(pen, scene, coat):
    pen.ball(20, -9, 5 + scene.tail, 5, coat)
    _sitting_body(pen, coat, 1.2)
    pen.ellipse(-0.5, -19, 13, 14, coat.light)
    for side in (-1, 1):
        pen.stroke([(side * 17, -31), (side * 18, -22), (side * 13, -14)], 10, coat.base, coat.line)
        pen.ellipse(side * 15.5, -3.6, 7, 5, mix(coat.light, PINK, 0.25), coat.line)
    head = pen.at(1, -46, 1, scene.head_tilt)
    for side in (-1, 1):
        head.ball(side * 15.5, -13 + scene.ears, 7.6, 7.6, coat)
        head.ellipse(side * 15.5, -12.6 + scene.ears, 4.2, 4.2, coat.light)
    head.lit(mirrored([(0, -18), (12, -16), (19.5, -8), (21.5, 3), (18, 12), (9, 16.5), (0, 17)]), coat)
    _cheeks(head, 15, 6)
    head.ellipse(0, 8, 10, 7.6, coat.light)
    _mouth(head, 11, 4)
    head.ellipse(0, 4.6, 4.4, 3, (58, 46, 58), INK)
    head.ellipse(-1.2, 3.8, 1.5, 0.8, (176, 166, 180))
    _face(head, scene, coat, (96, 64, 50), 8.6, -3.6, -15.5)


def _bands(pen, upper, lower, cuts, colour, depth=1.0):
    """Stripes of a surface ruled between two curves [n, 2], at (from, to) fractions along it, pointed at `depth`."""
    steps = np.linspace(0, 1, len(upper))

    def along(side, t):
        return np.array([np.interp(t, steps, side[:, 0]), np.interp(t, steps, side[:, 1])])

    for start, stop in cuts:
        a, b = along(upper, start), along(upper, stop)
        end = along(lower, (start + stop) / 2) * depth + along(upper, (start + stop) / 2) * (1 - depth)
        bulge = 0.08 * (b - a)
        sides = b * 0.45 + end * 0.55 - bulge, end, a * 0.45 + end * 0.55 + bulge
        pen.blob([a + bulge, (a + b) / 2, b - bulge, *sides], colour)


BACK = curve([(-31, -30), (-28, -42), (-20, -46), (-8, -44), (4, -44), (13, -46)])
BELLY = curve([(-30, -28), (-27, -22), (-16, -19), (-4, -19), (8, -20), (19, -28)])
CREST = curve([(4, -44), (11, -52), (14, -61), (17, -68)])
THROAT = curve([(20, -28), (23, -37), (25, -44), (28, -50)])
BROW = curve([(-9, -8), (0, -10), (9, -7), (20, -3)])
JAW = curve([(-7, 7), (1, 10), (10, 7), (20, 8)])


def _equine(pen, scene, coat, stripes, mane, tail):
    """Horse or zebra; `stripes` is None or the stripe colour, `mane` and `tail` draw their own hair."""
    tail(pen, 3 * scene.tail)
    far = dataclasses.replace(coat, base=coat.shade)
    for x, fur in ((-14.5, far), (16, far), (-24, coat), (6, coat)):
        _leg(pen, x, fur, stripes)
    pen.polygon(np.vstack([CREST, THROAT[::-1]]), coat.base, coat.line)
    pen.polygon(np.vstack([BACK, BELLY[::-1]]), coat.base, coat.line)
    pen.polygon(np.vstack([np.add(CREST[3:], 1), np.subtract(THROAT[::-1], (1, 0))]), coat.base)
    pen.blob([(-26, -25), (-10, -21), (8, -22), (16, -28), (6, -25), (-8, -24), (-20, -25)], coat.shade)
    if stripes:
        _bands(pen, BACK, BELLY, [(t, t + 0.085) for t in (0.12, 0.29, 0.46, 0.63, 0.8)], stripes, 0.8)
        _bands(pen, CREST, THROAT, [(t, t + 0.15) for t in (0.12, 0.42, 0.72)], stripes, 0.75)
    head = pen.at(23, -61, 1, 26 + scene.head_tilt)
    head.blob([(-7, -7), (-9, -15), (-6, -19), (-2, -14), (-1, -7)], coat.shade, coat.line)
    mane(pen, head)
    skull = [(-10, -2), (-6, -9), (3, -10), (12, -6.5), (20, -5), (23, 1), (20, 8), (11, 8), (2, 10), (-7, 8)]
    head.blob(skull, coat.base, coat.line)
    nose = mix(coat.light, INK, 0.55) if stripes else coat.light
    head.blob([(15, -4.6), (20, -4), (22.2, 1), (19.6, 7), (14, 7), (12.5, 1)], nose)
    if stripes:
        _bands(head, BROW, JAW, [(0.36, 0.46), (0.56, 0.66)], stripes, 0.4)
        _bands(head, JAW, BROW, [(0.05, 0.2), (0.34, 0.48)], stripes, 0.35)
    head.blob([(-4, -8), (-7, -16), (-4, -21), (1, -15), (2, -8)], coat.base, coat.line)
    head.blob([(-2.6, -10), (-4.4, -15), (-3.4, -18), (-0.6, -14), (0, -10)], mix(PINK, coat.light, 0.25))
    head.ellipse(19.4, -0.6, 1.2, 1.5, INK)
    head.stroke([(13, 5), (16, 5.8), (20, 4)], 1.3, INK)
    _cheeks(head.at(9, 4), 0, 0)
    if scene.accessory == "glasses":
        head.stroke([(-3, -2), (-6, -3.5), (-8, -4)], 2, FRAME)
        head.stroke([(10, -2), (13, -6), (15, -6)], 2.2, FRAME)
        _lens(head, 4, -1.5, coat, 8.4)
    _eye(head, 4, -1.5, (110, 70, 50), scene, coat)
    if scene.accessory == "hat":
        _hat(head, 1, -10, HAT_COLOURS[scene.hat_colour], 0.85, -12)


def _leg(pen, x, coat, stripes):
    pen.stroke([(x, -26), (x + 0.6, -14), (x, -4)], 8.2, coat.base, coat.line, taper=0.85)
    pen.ellipse(x, -22, 3.8, 6, coat.base)
    for y in (-16, -10.5) if stripes else ():
        pen.polygon([(x - 3.4, y), (x + 3.8, y + 0.6), (x + 3.8, y + 3.2), (x - 3.4, y + 2.8)], stripes)
    pen.polygon([(x - 3.6, -5), (x + 3.6, -5), (x + 5.2, 0), (x - 4.4, 0)], (74, 60, 70), INK)


def _horse(pen, scene, coat):
    hair = mix(coat.line, INK, 0.25) if scene.fur != "white" else (214, 190, 160)
    line = mix(hair, INK, 0.4)

    def tail(pen, tip):
        pen.stroke([(-28, -40), (-36, -36), (-38 + tip, -24), (-36 + tip, -12)], 9, hair, line, taper=0.5)

    def mane(pen, head):
        back, locks = [(20, -66), (16, -70), (9, -66), (6, -57), (0, -49), (-5, -43)], [(2, -38), (6, -42), (9, -38)]
        pen.blob(back + locks + [(12, -46), (15, -44), (17, -54), (20, -58)], hair, line)
        head.blob([(-9, -8), (-3, -12), (4, -10), (7, -6), (0, -6.5), (-5, -2)], hair, line)

    _equine(pen, scene, coat, None, mane, tail)


def _zebra(pen, scene, coat):
    coat = COATS["zebra"]

    def tail(pen, tip):
        pen.stroke([(-29, -38), (-35, -34), (-37 + tip, -24)], 4, coat.base, coat.line, taper=0.8)
        pen.stroke([(-37 + tip, -25), (-37.5 + tip, -18), (-36 + tip, -13)], 7, INK, taper=0.7)

    def mane(pen, head):
        pen.blob([(18, -74), (11, -72), (7, -64), (3, -54), (-2, -46), (4, -43), (10, -50), (14, -60), (19, -68)], INK)
        for x, y in ((9.5, -64), (5.5, -55)):
            pen.stroke([(x - 2, y - 1.5), (x + 2, y + 1), (x + 4, y + 2)], 2.6, coat.base)

    _equine(pen, scene, coat, INK, mane, tail)


ANIMAL_DRAWINGS = {"cat": _cat, "dog": _dog, "rabbit": _rabbit, "bear": _bear, "horse": _horse, "zebra": _zebra}
SHADOW_WIDTHS = {"cat": 26, "dog": 26, "rabbit": 24, "bear": 30, "horse": 36, "zebra": 36}
REACH = {"horse": 0.8, "zebra": 0.8}  # the long ones stand closer to the middle
SCALES = {"horse": 0.95, "zebra": 0.95}


def _draw_subject(pen, scene):
    """The animal with its accessory and its shadow on the ground."""
    coat = COATS[scene.fur]
    if scene.place == "night" and scene.fur == "black":
        coat = dataclasses.replace(coat, line=MOONLIT)
    x = SIZE / 2 + (scene.x - SIZE / 2) * REACH.get(scene.animal, 1.0)
    pen = pen.at(x, scene.y, scene.size * SCALES.get(scene.animal, 1.0), widen=scene.facing)
    pen.ellipse(0, -0.5, SHADOW_WIDTHS[scene.animal], 4.5, SHADOW, alpha=80)
    ANIMAL_DRAWINGS[scene.animal](pen, scene, coat)


# Styles -------------------------------------------------------------------------------------------------------------
PAPER = np.array((250, 245, 234), np.float32)
PENCIL = np.array((66, 60, 78), np.float32)
WAX = np.array((0.1, 0.085, 0.06), np.float32)


STROKE_ANGLES = (38, -38)


@functools.cache
def _strokes(sheet):
    """Fixed stroke sheet: relief [128, 128] in -1 to 1 of slanted strokes about 6 pixels wide."""
    noise = np.random.default_rng(7 + sheet).normal(128, 50, (64, 64)).clip(0, 255).astype(np.uint8)
    wide = Image.fromarray(noise).resize((64 * 18, 64 * 6), Image.BICUBIC).rotate(STROKE_ANGLES[sheet], Image.BICUBIC)
    left, top = (wide.width - SIZE) // 2, (wide.height - SIZE) // 2
    relief = np.asarray(wide.crop((left, top, left + SIZE, top + SIZE)), np.float32)
    return np.tanh(1.3 * (relief - relief.mean()) / relief.std())


@functools.cache
def _smear(sheet):
    """How strokes drag colours along: for each pixel the flat index of a source pixel and two blend weights [n, 1]."""
    drag, angle = 1.1 * _strokes(sheet), np.radians(STROKE_ANGLES[sheet])
    rows, columns = np.mgrid[:SIZE, :SIZE]
    rows = (rows + drag * np.sin(angle)).clip(0, SIZE - 1.01)
    columns = (columns - drag * np.cos(angle)).clip(0, SIZE - 1.01)
    top, left = rows.astype(int), columns.astype(int)
    weights = [(part % 1).reshape(-1, 1).astype(np.float32) for part in (rows, columns)]
    return (top * SIZE + left).ravel(), *weights


@functools.cache
def _margin(width):
    """Ragged frame of bare paper: coverage [128, 128, 1], 0 at the border and 1 inside."""
    rng = np.random.default_rng(3)
    edge = Image.fromarray(rng.normal(0, 1, (24, 24)).astype(np.float32)).resize((SIZE, SIZE), Image.BICUBIC)
    near = np.minimum(np.arange(SIZE), np.arange(SIZE)[::-1]) + 0.5
    inside = np.minimum(near[:, None], near[None]) - width - 1.2 * np.asarray(edge)
    return inside.clip(0, 1).astype(np.float32)[..., None]


@functools.cache
def _wash(sheet):
    """How much of its colour a sketch keeps, about 0.35 inside the margin; [128, 128, 1]."""
    return (0.35 + 0.03 * _strokes(sheet)[..., None]) * _margin(5.0)


def _brightest(pixels):
    return np.maximum(np.maximum(pixels[..., :1], pixels[..., 1:2]), pixels[..., 2:])


def _photo(image, sheet):
    return np.array(image)


def _sketch(image, sheet):
    """Pencil on lines, edges and the darkest spots, over a hatched faint wash of the colours on paper."""
    pixels = np.asarray(image, np.float32)
    smooth = np.asarray(image.filter(ImageFilter.BoxBlur(2)), np.float32)
    lines = (_brightest(smooth - pixels) / 36 - 0.15).clip(0, 0.8)
    dark = ((90 - _brightest(pixels)) / 45).clip(0, 0.7)
    wash = PAPER + (pixels - PAPER) * _wash(sheet)
    return (wash + (PENCIL - wash) * np.maximum(lines, dark)).round().astype(np.uint8)


def _oil_pastel(image, sheet):
    """Saturated colours, dragged and tinted by broad strokes, inside a ragged frame of paper."""
    pixels = np.asarray(image, np.float32).reshape(-1, 3)
    corner, down, right = _smear(sheet)
    top = pixels[corner] * (1 - right) + pixels[corner + 1] * right
    bottom = pixels[corner + SIZE] * (1 - right) + pixels[corner + SIZE + 1] * right
    pixels = (top * (1 - down) + bottom * down).reshape(SIZE, SIZE, 3)
    grey = (pixels[..., :1] + pixels[..., 1:2] + pixels[..., 2:]) / 3
    pixels = (grey + (pixels - grey) * 1.4) * (1 + _strokes(sheet)[..., None] * WAX)
    return (PAPER + (pixels - PAPER) * _margin(3.5)).clip(0, 255).round().astype(np.uint8)


STYLE_FILTERS = {"photo": _photo, "sketch": _sketch, "oil pastel": _oil_pastel}


def render(scene):
    """Draw a scene.

    Args:
        scene: Scene.

    Returns:
        uint8 [128, 128, 3], the same bytes for the same scene.
    """
    image = PLACE_DRAWINGS[scene.place](np.random.default_rng(scene.background_seed))
    side = 106 if scene.x < SIZE / 2 else 22
    drawings = THING_DRAWINGS | SNOWY_DRAWINGS if scene.place == "snow" else THING_DRAWINGS
    drawings[scene.thing](Pen(image).at(side, 0))
    _draw_subject(Pen(image), scene)
    return STYLE_FILTERS[scene.style](image.reduce(SUPERSAMPLE), scene.style_seed % len(STROKE_ANGLES))


def subject_mask(scene):
    """Exact region of a photo that shows the animal, its accessory or its shadow; bool [128, 128]."""
    image = Image.new("L", (SIZE * SUPERSAMPLE,) * 2)
    _draw_subject(Pen(image, flat=True), scene)
    return np.asarray(image).reshape(SIZE, SUPERSAMPLE, SIZE, SUPERSAMPLE).any((1, 3))


def edit_mask(source, target):
    """Region that an edit between two scenes may touch: both subjects; bool [128, 128]."""
    return subject_mask(source) | subject_mask(target)


# Captions -----------------------------------------------------------------------------------------------------------
def caption(scene, mention=MENTIONS):
    """Describe a scene, for example "a photo of a grey cat with glasses in the snow near a tree".

    Args:
        scene: Scene.
        mention: which of "fur", "accessory", "place", "thing" to speak of, where there is something to say.

    Returns:
        str.

    Raises:
        ValueError: for an unknown mention.
    """
    for name in mention:
        _check("mention", name, MENTIONS)
    noun = f"{scene.fur} {scene.animal}" if "fur" in mention and scene.animal != "zebra" else scene.animal
    parts = [STYLE_PHRASES[scene.style], "of", "an" if noun[0] in "aeiou" else "a", noun]
    if "accessory" in mention:
        parts.append(ACCESSORY_PHRASES[scene.accessory])
    if "place" in mention:
        parts.append(PLACE_PHRASES[scene.place])
    if "thing" in mention:
        parts.append(THING_PHRASES[scene.thing])
    return " ".join(filter(None, parts))


def random_caption(scene, rng):
    """Caption that always tells style, animal and accessory, and fur, place and thing with probability 0.6 each."""
    told = rng.random(3) < 0.6
    return caption(scene, ["accessory", *np.array(["fur", "place", "thing"])[told].tolist()])


def _vocabulary():
    phrases = (STYLE_PHRASES, ACCESSORY_PHRASES, PLACE_PHRASES, THING_PHRASES)
    words = {word for table in phrases for phrase in table.values() for word in phrase.split()}
    return tuple(sorted(words | {"a", "an", "of"} | set(ANIMALS) | set(FURS)))


VOCABULARY = _vocabulary()


# Held-out combinations and tasks ------------------------------------------------------------------------------------
def is_held_out(scene):
    """Whether a scene's combination is kept out of training: fur and place, or for the zebra place and thing."""
    place = PLACES.index(scene.place)
    if scene.animal == "zebra":
        things = THINGS_IN[scene.place][1:]
        return scene.thing == things[place % len(things)]
    return (FURS.index(scene.fur) + place) % 5 == 0


@dataclasses.dataclass(frozen=True)
class Task:
    """An edit: fields that every source scene has, and the fields that change."""

    source: dict
    change: dict


TASKS = {
    "cat->dog": Task({"animal": "cat", "accessory": "none", "style": "photo"}, {"animal": "dog"}),
    "horse->zebra": Task({"animal": "horse", "accessory": "none", "style": "photo"}, {"animal": "zebra"}),
    "cat->cat with glasses": Task({"animal": "cat", "accessory": "none", "style": "photo"}, {"accessory": "glasses"}),
    "sketch->oil pastel": Task({"style": "sketch"}, {"style": "oil pastel"}),
}


def task_pair(task, index, split="held_out"):
    """Evaluation pair number `index` of a task; both scenes are held out of training.

    Args:
        task: name from TASKS.
        index: 0 or more.
        split: "held_out" for results, "tuning" for choosing settings.

    Returns:
        (source, target), two scenes; target is source with the task's change.

    Raises:
        ValueError: for an unknown task or split.
    """
    _check("task", task, TASKS)
    _check("split", split, SPLITS)
    rng = np.random.default_rng((list(TASKS).index(task), SPLITS.index(split), index))
    while True:
        source = random_scene(rng, **TASKS[task].source)
        target = dataclasses.replace(source, **TASKS[task].change)
        if is_held_out(source) and is_held_out(target):
            return source, target
