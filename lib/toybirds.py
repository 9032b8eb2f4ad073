"""The embedded data set: little field-guide birds, drawn in code, with human gaze and a decoy.

A species is decided by four small marks at four places (crown, wing, breast, tail). Everything
else, from plumage and pose to habitat and light, is drawn at random and never tells the species.
A small coloured tag near the border, the decoy, agrees with the label in most training images:
a model that looks at the tag is right for the wrong reason, and the test split shows it.

All geometry is in unit coordinates (x to the right, y down, the image is [0, 1] x [0, 1]) and all
chance is spent in `sample_scene`, so one scene can be drawn at any size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "crown": ("plain", "red cap", "crest"),
    "wing": ("plain", "two white bars"),
    "breast": ("plain", "spotted", "banded"),
    "tail": ("short", "long forked"),
}


@dataclass(frozen=True)
class Species:
    """A name and its marks: `attributes[k]` indexes the values of the k-th entry of ATTRIBUTES."""

    name: str
    attributes: tuple[int, ...]


# Found by search: two species differ in one to three marks, every value is shared by at least two
# species, and no two marks together tell all eight apart, so a reader has to look at three places.
SPECIES: tuple[Species, ...] = (
    Species("Freckled Pipling", (0, 0, 1, 0)),
    Species("Sashed Kiteling", (0, 0, 2, 1)),
    Species("Pale Ladderwing", (0, 1, 0, 0)),
    Species("Ember Forktail", (1, 0, 0, 1)),
    Species("Harlequin Thrushlet", (1, 1, 1, 1)),
    Species("Ruby Sashling", (1, 1, 2, 0)),
    Species("Tufted Hazelbird", (2, 0, 1, 0)),
    Species("Crested Larkspur", (2, 1, 1, 1)),
)

# Colour i agrees with species i.
DECOY_COLOURS: dict[str, Colour] = {
    "red": (216, 30, 44),
    "orange": (244, 126, 20),
    "yellow": (255, 234, 60),
    "green": (40, 160, 62),
    "cyan": (50, 205, 215),
    "blue": (36, 72, 214),
    "violet": (142, 52, 190),
    "pink": (250, 120, 190),
}

SPLITS = ("train", "val", "test", "pretrain")

SUPERSAMPLE = 3  # drawn this much larger, then averaged down
BACKDROP = 64  # pixels of the backdrop at every size: enlarged, it is out of focus, as in a photo
MARGIN = 0.035  # the bird keeps this far from the image border
DECOY_SIDE = 0.148  # 9.5 pixels of 64, outline included
DECOY_RIM = 0.014  # width of the light outline
DECOY_GAP = 0.03  # the decoy keeps this far from the bird's outline
LINE = 0.011  # width of the bird's outline

INK: Colour = (52, 44, 46)
WHITE: Colour = (252, 250, 242)
CAP: Colour = (208, 36, 40)
BLUSH: Colour = (240, 140, 112)
BARK: Colour = (112, 86, 66)

# Upper side of the bird. All of middle darkness, so that white bars and red caps stand out on each.
PLUMAGE: tuple[Colour, ...] = (
    (138, 106, 78),  # hazel
    (122, 124, 78),  # olive
    (96, 124, 150),  # slate blue
    (158, 108, 76),  # fawn
    (88, 130, 126),  # teal
    (128, 112, 140),  # heather
    (122, 122, 124),  # ash
    (104, 134, 96),  # moss
)
# Under side. All light, so that dark spots and bands stand out on each.
UNDERSIDE: tuple[Colour, ...] = (
    (248, 238, 214),  # cream
    (250, 226, 160),  # straw
    (246, 212, 184),  # peach
    (232, 236, 238),  # pearl
    (226, 234, 200),  # pale lime
)


# ---------------------------------------------------------------------------------- geometry


def _spline(points: list[tuple[float, float]], steps: int = 6) -> np.ndarray:
    """Closed Catmull-Rom curve through `points`, as a polygon [len(points) * steps, 2]."""
    p = np.asarray(points, dtype=np.float64)
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    basis = np.hstack(
        [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2]
    )
    windows = np.stack([np.roll(p, k, axis=0) for k in (1, 0, -1, -2)], axis=1)  # [n, 4, 2]
    return (0.5 * basis @ windows).reshape(-1, 2)


@lru_cache
def _circle(n: int) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _ellipse(x: float, y: float, rx: float, ry: float, n: int = 16) -> np.ndarray:
    return _circle(n) * (rx, ry) + (x, y)


def _stroke(x0: float, y0: float, x1: float, y1: float, width: float) -> np.ndarray:
    """A straight line as a thin quadrilateral, so that its width scales exactly with the image."""
    half = 0.5 * width / math.hypot(x1 - x0, y1 - y0)
    dx, dy = half * (y0 - y1), half * (x1 - x0)
    return np.array(
        [(x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy), (x0 - dx, y0 - dy)]
    )


# Shapes of the trunk, in body lengths: x along the body axis towards the head, y to the belly.
# fmt: off
_BODY = _spline([
    (-0.56, -0.05), (-0.3, -0.19), (0.04, -0.28), (0.32, -0.24), (0.47, -0.02), (0.37, 0.2),
    (0.06, 0.31), (-0.3, 0.18), (-0.56, 0.06),
])
_UNDER = _spline([
    (0.475, -0.08), (0.465, 0.0), (0.365, 0.195), (0.06, 0.3), (-0.3, 0.17), (-0.5, 0.07),
    (-0.2, 0.1), (0.12, 0.02), (0.25, -0.14),
])
_WING = _spline([
    (0.2, -0.12), (0.02, -0.2), (-0.3, -0.16), (-0.72, 0.02), (-0.4, 0.1), (-0.1, 0.15),
    (0.12, 0.08),
])
_SPOT_AT = [
    (0.375, -0.02), (0.25, 0.075), (0.365, 0.13), (0.22, 0.215), (0.09, 0.14), (0.05, 0.255),
    (-0.08, 0.19),
]
# fmt: on
_GLOSS = _spline([(-0.34, -0.165), (0.04, -0.262), (0.3, -0.23), (0.06, -0.2)])
_BELLY = _spline(
    [(0.3, 0.235), (0.06, 0.305), (-0.3, 0.175), (-0.5, 0.07), (-0.2, 0.14), (0.06, 0.24)]
)
_SHADE = _WING + np.array([0.0, 0.04])
_BAND = np.concatenate(
    [_BODY[23:31], _spline([(0.3, 0.17), (0.2, 0.01), (0.19, -0.12), (0.31, -0.07)])[:18]]
)
_FEATHERS = {
    "feather0": _stroke(0.0, 0.06, -0.44, 0.05, 0.022),
    "feather1": _stroke(-0.02, -0.02, -0.54, 0.01, 0.022),
    "feather2": _stroke(-0.08, -0.1, -0.5, -0.06, 0.022),
}
_BARS = {
    "bar0": np.array([(0.07, -0.19), (0.15, -0.17), (0.1, 0.11), (0.01, 0.14)]),
    "bar1": np.array([(-0.14, -0.185), (-0.06, -0.19), (-0.11, 0.15), (-0.2, 0.135)]),
}
_SPOTS = {f"spot{i}": _ellipse(x, y, 0.062, 0.054, 12) for i, (x, y) in enumerate(_SPOT_AT)}
_TAIL_SHORT = {"tail0": np.array([(-0.46, -0.1), (-0.8, -0.07), (-0.82, 0.07), (-0.46, 0.09)])}
_TAIL_FORKED = {
    "fork0": _spline([(-0.44, -0.12), (-0.76, -0.17), (-1.06, -0.33), (-0.8, 0.0), (-0.46, 0.04)]),
    "fork1": _spline([(-0.44, -0.04), (-0.8, -0.02), (-1.05, 0.25), (-0.74, 0.17), (-0.44, 0.12)]),
    "tip0": _spline([(-0.8, -0.2), (-1.06, -0.33), (-0.88, -0.1)]),
    "tip1": _spline([(-0.88, 0.06), (-1.05, 0.25), (-0.79, 0.19)]),
}

# Shapes of the head, in body lengths, from the middle of the head, looking to the right.
_HEAD_R = 0.235
_HEAD = _ellipse(0, 0, _HEAD_R, _HEAD_R, 24)
_THROAT = _spline([(0.2, 0.05), (0.1, 0.21), (-0.04, 0.26), (0.0, 0.12)])
_CAP = np.concatenate([_ellipse(0, 0, 0.245, 0.25, 24)[12:24], [(0.21, -0.085), (-0.02, -0.07)]])
_CREST = _spline(
    [(0.17, -0.15), (0.05, -0.28), (-0.12, -0.36), (-0.36, -0.42), (-0.28, -0.22), (-0.22, -0.04)]
)
_SHEEN = _ellipse(-0.06, -0.12, 0.1, 0.06)
_BLUSH = _ellipse(0.03, 0.1, 0.065, 0.045)
_EYE = {
    "eye_ring": _ellipse(0.085, -0.015, 0.07, 0.07),
    "eye": _ellipse(0.085, -0.015, 0.05, 0.05),
    "eye_light": _ellipse(0.1, -0.034, 0.017, 0.017, 8),
}
_FOOT_DROP = 0.17  # from the belly to the perch, in body lengths

# Where each deciding mark sits, in the frame (body or head) that carries it.
_MARKS = {"wing": (-0.03, -0.01), "breast": (0.31, 0.08), "tail": (-0.74, 0.0)}
_CROWN = (-0.03, -0.2)
_OUTLINED = ("tail0", "fork0", "fork1", "body", "neck", "head", "crest", "bill")
_OUTERMOST = (*_OUTLINED, "wing", "shade", "leg0", "leg1", "toes0", "toes1")


def _frame(angle: float) -> np.ndarray:
    """Row vectors times this matrix are turned by `angle` radians, head end upwards."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s], [s, c]])


# ---------------------------------------------------------------------------------- one scene


@dataclass(frozen=True)
class Scene:
    """All that chance decides about one image, in unit coordinates; `draw` adds nothing to it.

    `dataclasses.replace(scene, decoy=-1)` is the same picture without its decoy.
    """

    label: int  # index into SPECIES, -1 where the marks match no species
    attributes: tuple[int, ...]  # one value index for each entry of ATTRIBUTES
    decoy: int  # index into DECOY_COLOURS, -1 for none
    facing: int  # 1: looks to the right, -1: to the left
    tilt: float  # radians that the body axis rises towards the head
    head_raise: float  # stretches the neck, in body lengths
    head_pitch: float  # radians that the bill points up
    scale: float  # body length
    centre: tuple[float, float]  # middle of the body
    bill: float  # length of the bill, in body lengths
    plumage: int  # index into PLUMAGE
    underside: int  # index into UNDERSIDE
    habitat: str  # name in HABITATS
    light: Colour  # per cent of red, green, blue
    decoy_centre: tuple[float, float]  # kept even without a decoy
    noise: tuple[float, ...]  # uniform numbers in [0, 1) that the habitat is painted with

    @property
    def _local(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        return _bird_shapes(
            self.attributes, self.tilt, self.head_raise, self.head_pitch, self.bill, self.facing
        )

    @cached_property
    def shapes(self) -> dict[str, np.ndarray]:
        """Polygons [k, 2] of the bird in drawing order, name -> points."""
        return {name: p * self.scale + self.centre for name, p in self._local[0].items()}

    @cached_property
    def parts(self) -> dict[str, tuple[float, float]]:
        """Where each deciding mark sits: name in ATTRIBUTES -> (x, y)."""
        (cx, cy), marks = self.centre, self._local[1]
        at = {name: marks[name][0].tolist() for name in ATTRIBUTES}
        return {name: (x * self.scale + cx, y * self.scale + cy) for name, (x, y) in at.items()}

    @cached_property
    def box(self) -> tuple[float, float, float, float]:
        """Bounding box of the bird, feet included: x0, y0, x1, y1 in [0, 1]."""
        points = np.concatenate(list(self.shapes.values()))
        return tuple(float(v) for v in (*points.min(axis=0), *points.max(axis=0)))

    @property
    def decoy_box(self) -> tuple[float, float, float, float] | None:
        """The decoy with its outline: x0, y0, x1, y1 in [0, 1]; None without a decoy."""
        if self.decoy < 0:
            return None
        (x, y), half = self.decoy_centre, DECOY_SIDE / 2
        return (x - half, y - half, x + half, y + half)


@lru_cache(maxsize=256)
def _bird_shapes(
    attributes: tuple[int, ...],
    tilt: float,
    head_raise: float,
    head_pitch: float,
    bill: float,
    facing: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Polygons and marks around the middle of the body, in body lengths."""
    crown, wing, breast, tail = attributes
    turn, nod = _frame(tilt), _frame(head_pitch)
    neck_at = np.array([(0.37, -0.31)]) @ turn + (0.03, -head_raise)

    body = {**(_TAIL_FORKED if tail else _TAIL_SHORT), "body": _BODY}
    detail = {"gloss0": _GLOSS, "under": _UNDER, "belly": _BELLY}
    if breast == 1:
        detail |= _SPOTS
    elif breast == 2:
        detail["band"] = _BAND
    detail |= {"shade": _SHADE, "wing": _WING} | _FEATHERS | (_BARS if wing else {})

    head: dict[str, np.ndarray] = {"crest": _CREST} if crown == 2 else {}
    tip = 0.2 + bill
    head["bill"] = np.array([(0.18, -0.075), (tip, 0.035), (0.18, 0.085)])
    head |= {"head": _HEAD, "throat": _THROAT} | ({"cap": _CAP} if crown == 1 else {})
    head |= {"gloss1": _SHEEN, "blush": _BLUSH} | _EYE

    body = {name: points @ turn for name, points in body.items()}
    detail = {name: points @ turn for name, points in detail.items()}
    head = {name: points @ nod + neck_at for name, points in head.items()}
    # nape and throat to back and breast: points of the two outlines, by their index
    neck = {"neck": np.concatenate([head["head"][[11, 3]], body["body"][[25, 10]]])}
    local = _legs(turn) | body | neck | detail | head

    marks = {name: np.array([at]) @ turn for name, at in _MARKS.items()}
    marks["crown"] = np.array([_CROWN]) @ nod + neck_at
    mirror = np.array([facing, 1.0])
    return tuple({name: p * mirror for name, p in shapes.items()} for shapes in (local, marks))


def _legs(turn: np.ndarray) -> dict[str, np.ndarray]:
    (xa, ya), (xb, yb) = np.array([(-0.1, 0.24), (0.08, 0.27)]) @ turn
    ground = max(ya, yb) + _FOOT_DROP
    legs = {"leg0": _stroke(xa, ya, xa + 0.05, ground, 0.045)}
    legs["leg1"] = _stroke(xb, yb, xb + 0.05, ground, 0.045)
    for i, x in enumerate((xa, xb)):
        legs[f"toes{i}"] = _stroke(x - 0.01, ground, x + 0.14, ground, 0.045)
    return legs


def _check_choice(attributes: tuple[int, ...], label: int, decoy: int) -> None:
    sizes = [len(values) for values in ATTRIBUTES.values()]
    if len(attributes) != len(sizes) or any(
        not 0 <= a < n for a, n in zip(attributes, sizes, strict=True)
    ):
        raise ValueError(
            f"attributes is {attributes}; give one index for each of {list(ATTRIBUTES)}, "
            f"below {sizes}."
        )
    if not -1 <= label < len(SPECIES):
        raise ValueError(f"label is {label}; give -1 (no species) to {len(SPECIES) - 1}.")
    if not -1 <= decoy < len(DECOY_COLOURS):
        raise ValueError(f"decoy is {decoy}; give -1 (no decoy) to {len(DECOY_COLOURS) - 1}.")


def sample_scene(
    rng: np.random.Generator, attributes: tuple[int, ...], label: int, decoy: int
) -> Scene:
    """Draw pose, plumage, habitat, light and positions at random for a bird with given marks.

    `attributes` holds one value index for each entry of ATTRIBUTES, `label` is in [-1, 8) and
    `decoy` in [-1, 8), -1 for none. Raises ValueError for anything else.
    """
    attributes = tuple(int(a) for a in attributes)
    _check_choice(attributes, label, decoy)
    scene = Scene(
        label=int(label),
        attributes=attributes,
        decoy=int(decoy),
        facing=int(rng.choice((-1, 1))),
        tilt=float(np.radians(rng.uniform(14, 36))),
        head_raise=float(rng.uniform(0.0, 0.1)),
        head_pitch=float(np.radians(rng.uniform(-12, 16))),
        scale=1.0,
        centre=(0.0, 0.0),
        bill=float(rng.uniform(0.13, 0.24)),
        plumage=int(rng.integers(len(PLUMAGE))),
        underside=int(rng.integers(len(UNDERSIDE))),
        habitat=str(rng.choice(list(HABITATS))),
        light=_sample_light(rng),
        decoy_centre=(0.0, 0.0),
        noise=tuple(rng.random(96).tolist()),
    )
    x0, y0, x1, y1 = scene.box  # in body lengths, because the scale is still 1
    scale = min(rng.uniform(0.45, 0.53), (1 - 2 * MARGIN) / max(x1 - x0, y1 - y0))
    centre = (
        _place(rng, scale * x0 - MARGIN, scale * x1 + MARGIN),
        _place(rng, scale * y0 - MARGIN, scale * y1 + MARGIN),
    )
    scene = dataclasses.replace(scene, scale=float(scale), centre=centre)
    return dataclasses.replace(scene, decoy_centre=_sample_border(rng, scene))


def _place(rng: np.random.Generator, low: float, high: float) -> float:
    """An origin that keeps what reaches from `low` to `high` inside [0, 1]."""
    return float(-low + rng.random() * (1 - high + low))


def _sample_light(rng: np.random.Generator) -> Colour:
    bright, warm = rng.uniform(92, 108), rng.uniform(-5, 5)
    return (round(bright + warm), round(bright), round(bright - warm))


# Places around the unit square, [80, 2], for the decoy to sit at.
_ALONG = np.linspace(0, 1, 20)
_BORDER = np.concatenate(
    [
        np.stack([_ALONG, 0 * _ALONG + k], axis=1)[:, flip]
        for k in (0, 1)
        for flip in ([0, 1], [1, 0])
    ]
)


def _sample_border(rng: np.random.Generator, scene: Scene) -> tuple[float, float]:
    """A random place along the border where the decoy keeps clear of the whole bird."""
    inset = DECOY_SIDE / 2 + rng.uniform(0.015, 0.045)
    places = inset + (1 - 2 * inset) * _BORDER  # [80, 2]
    bird = np.concatenate([scene.shapes[n] for n in _OUTERMOST if n in scene.shapes])  # [k, 2]
    # Chebyshev distance: the decoy is an upright square
    dx, dy = np.abs(places.T[:, :, None] - bird.T[:, None, :])  # [80, k] each
    distance = np.maximum(dx, dy).min(axis=1)  # [80]
    clear = np.flatnonzero(distance > DECOY_SIDE / 2 + DECOY_GAP)
    choice = rng.choice(clear) if len(clear) else distance.argmax()
    return tuple(places[choice].tolist())


# ---------------------------------------------------------------------------------- painting


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


class _Canvas:
    """Draws unit-coordinate polygons on a square image, in the light of the scene."""

    def __init__(self, image: Image.Image, light: Colour) -> None:
        self.pen = ImageDraw.Draw(image)
        self.veil = ImageDraw.Draw(image, "RGBA")  # blends translucent colours, but is slower
        self.size = image.width
        self.light = light

    def lit(self, colour: Colour) -> Colour:
        (r, g, b), (red, green, blue) = colour, self.light
        return (min(255, r * red // 100), min(255, g * green // 100), min(255, b * blue // 100))

    def polygon(self, points: np.ndarray, colour: Colour, alpha: int = 255) -> None:
        flat = (np.asarray(points) * self.size).ravel().tolist()
        if alpha == 255:
            self.pen.polygon(flat, fill=self.lit(colour))
        else:
            self.veil.polygon(flat, fill=(*self.lit(colour), alpha))

    def contour(self, points: np.ndarray, colour: Colour, width: float) -> None:
        flat = (np.concatenate([points, points[:2]]) * self.size).ravel().tolist()
        pixels = max(1, round(width * self.size))
        # Gaps between the pieces of a line only show where it is wide, and closing them takes time.
        joint = "curve" if pixels > 4 else None
        self.pen.line(flat, fill=self.lit(colour), width=pixels, joint=joint)

    def disc(
        self, x: float, y: float, r: float, colour: Colour, alpha: int = 255, flat: float = 1.0
    ) -> None:
        self.polygon(_ellipse(x, y, r, r * flat), colour, alpha)


def _sky(image: Image.Image, stops: tuple[Colour, ...], light: Colour) -> None:
    """Fill `image` with a gradient from the top through evenly spaced colours."""
    at = np.linspace(0, len(stops) - 1, image.height)
    gains = np.asarray(light) / 100
    table = np.asarray(stops, dtype=np.float64) * gains
    column = np.stack([np.interp(at, range(len(stops)), table[:, k]) for k in range(3)], axis=1)
    column = np.clip(column, 0, 255).astype(np.uint8)[:, None]  # [height, 1, 3]
    image.paste(Image.fromarray(column).resize(image.size, Image.Resampling.NEAREST))


def _hill(canvas: _Canvas, z: np.ndarray, y: float, colour: Colour) -> None:
    xs = np.linspace(-0.05, 1.05, 9)
    ys = y + 0.04 * np.sin(5 * xs + 6.3 * z[0]) + 0.03 * np.sin(9 * xs + 6.3 * z[1])
    ridge = np.stack([xs, ys], axis=1)
    canvas.polygon(np.concatenate([ridge, [(1.05, 1.05), (-0.05, 1.05)]]), colour)


def _bokeh(canvas: _Canvas, z: np.ndarray, colours: tuple[Colour, ...], top: float) -> None:
    for i, (x, y, r) in enumerate(z.reshape(-1, 3)):
        r, y = 0.035 + 0.07 * r, top + (1 - top) * y
        canvas.disc(x, y, r, colours[i % len(colours)], alpha=64)


def _blades(canvas: _Canvas, z: np.ndarray, colours: tuple[Colour, ...], height: float) -> None:
    for i, (x, h, lean) in enumerate(z.reshape(-1, 3)):
        tip = (x + 0.22 * (lean - 0.5), 1 - height * (0.4 + 0.6 * h))
        canvas.polygon([(x - 0.014, 1.02), tip, (x + 0.014, 1.02)], colours[i % len(colours)])


def _meadow(canvas: _Canvas, z: np.ndarray) -> None:
    _hill(canvas, z[0:2], 0.6, (176, 204, 140))
    _hill(canvas, z[2:4], 0.74, (150, 190, 116))
    _bokeh(canvas, z[4:22], ((252, 236, 170), (246, 206, 216), (220, 232, 170)), 0.62)


def _meadow_near(canvas: _Canvas, z: np.ndarray) -> None:
    _blades(canvas, z[22:52], ((118, 164, 88), (142, 182, 102), (98, 146, 82)), 0.26)
    for x, y, r in z[52:64].reshape(-1, 3):
        canvas.disc(x, 0.84 + 0.12 * y, 0.012 + 0.008 * r, (252, 248, 236))
        canvas.disc(x, 0.84 + 0.12 * y, 0.006, (240, 200, 90))


def _reeds(canvas: _Canvas, z: np.ndarray) -> None:
    _hill(canvas, z[0:2], 0.66, (196, 200, 158))
    _blades(canvas, z[2:38], ((202, 192, 138), (184, 186, 132), (214, 204, 156)), 1.0)


def _reeds_near(canvas: _Canvas, z: np.ndarray) -> None:
    for x, y, lean in z[38:50].reshape(-1, 3):
        top, lean = 0.12 + 0.4 * y, 0.1 * (lean - 0.5)
        canvas.polygon(_stroke(x, 1.02, x + lean, top, 0.012), (168, 162, 104))
        canvas.polygon(_ellipse(x + lean, top, 0.017, 0.06), (142, 108, 78))


def _snow(canvas: _Canvas, z: np.ndarray) -> None:
    for x, h, w in z[0:15].reshape(-1, 3):
        fir = [(x - 0.06 - 0.05 * w, 0.8), (x, 0.36 + 0.2 * h), (x + 0.06 + 0.05 * w, 0.8)]
        canvas.polygon(fir, (168, 188, 200))
    _hill(canvas, z[15:17], 0.72, (232, 240, 246))
    _hill(canvas, z[17:19], 0.86, (246, 249, 252))


def _snow_near(canvas: _Canvas, z: np.ndarray) -> None:
    for x, y, r in z[19:64].reshape(-1, 3):
        canvas.disc(x, y, 0.006 + 0.008 * r, (255, 255, 255), alpha=220)


def _sunset(canvas: _Canvas, z: np.ndarray) -> None:
    x, y = 0.15 + 0.7 * z[0], 0.42 + 0.2 * z[1]
    for r, alpha in ((0.2, 50), (0.15, 70), (0.1, 255)):
        canvas.disc(x, y, r, (255, 236, 190), alpha)
    for x, y, w in z[2:14].reshape(-1, 3):
        canvas.disc(x, 0.06 + 0.4 * y, 0.1 + 0.1 * w, (255, 214, 196), alpha=90, flat=0.16)
    _hill(canvas, z[14:16], 0.7, (196, 136, 142))
    _hill(canvas, z[16:18], 0.82, (150, 108, 130))


def _forest(canvas: _Canvas, z: np.ndarray) -> None:
    for x, w, lean in z[0:12].reshape(-1, 3):
        trunk = _stroke(x, 1.05, x + 0.12 * (lean - 0.5), -0.05, 0.04 + 0.05 * w)
        canvas.polygon(trunk, (124, 136, 108))
    _hill(canvas, z[12:14], 0.84, (128, 158, 112))
    _bokeh(canvas, z[14:56], ((216, 228, 160), (150, 186, 130), (238, 236, 184)), 0.0)


def _pond(canvas: _Canvas, z: np.ndarray) -> None:
    _hill(canvas, z[0:2], 0.34, (170, 198, 160))
    canvas.polygon([(0, 0.5), (1, 0.5), (1, 1), (0, 1)], (150, 196, 208))
    canvas.polygon([(0, 0.76), (1, 0.76), (1, 1), (0, 1)], (130, 180, 198))


def _pond_near(canvas: _Canvas, z: np.ndarray) -> None:
    for x, y, w in z[2:32].reshape(-1, 3):
        canvas.disc(x, 0.54 + 0.44 * y, 0.05 + 0.06 * w, (214, 234, 236), alpha=150, flat=0.07)
    for x, y, r in z[32:41].reshape(-1, 3):
        canvas.disc(x, 0.78 + 0.16 * y, 0.05 + 0.03 * r, (122, 166, 112), flat=0.36)


def _nothing(canvas: _Canvas, z: np.ndarray) -> None:
    """A habitat with nothing sharp in it."""


_Painter = Callable[[_Canvas, np.ndarray], None]


@dataclass(frozen=True)
class _Habitat:
    sky: tuple[Colour, ...]  # colours from top to bottom
    far: _Painter  # what lies out of focus
    near: _Painter  # what is sharp, still behind the bird
    perch: str  # what the bird stands on


HABITATS: dict[str, _Habitat] = {
    "meadow": _Habitat(
        ((190, 222, 238), (236, 242, 222), (190, 214, 150)), _meadow, _meadow_near, "post"
    ),
    "reeds": _Habitat(
        ((214, 228, 230), (238, 232, 204), (214, 206, 160)), _reeds, _reeds_near, "stem"
    ),
    "snow": _Habitat(((190, 208, 226), (222, 232, 240)), _snow, _snow_near, "snowy branch"),
    "sunset": _Habitat(
        ((134, 136, 178), (226, 170, 172), (252, 206, 160)), _sunset, _nothing, "branch"
    ),
    "forest": _Habitat(
        ((184, 204, 156), (158, 188, 140), (138, 166, 118)), _forest, _nothing, "leafy branch"
    ),
    "pond": _Habitat(((206, 228, 238), (226, 238, 232)), _pond, _pond_near, "stone"),
}


_STONE = _spline(
    [
        (-0.98, 0.75),
        (-0.86, -0.2),
        (-0.4, -0.88),
        (0.2, -0.98),
        (0.72, -0.6),
        (1.0, 0.6),
        (0.3, 1.0),
    ]
)


def _perch(canvas: _Canvas, scene: Scene, kind: str) -> None:
    """What the bird stands on, right under its feet."""
    feet = np.concatenate([scene.shapes["toes0"], scene.shapes["toes1"]])
    x, y = feet[:, 0].mean(), feet[:, 1].max()
    z = scene.noise[-8:]
    if kind == "stone":
        stone = np.array([0.25 + 0.06 * z[0], 0.1])
        canvas.polygon(_STONE * stone + (x, y + 0.09), (126, 128, 132))
        canvas.polygon(_STONE * stone * (0.74, 0.5) + (x - 0.02, y + 0.052), (160, 162, 164))
        return
    if kind == "post":
        canvas.polygon([(x - 0.1, y), (x + 0.1, y), (x + 0.1, 1.02), (x - 0.1, 1.02)], BARK)
        canvas.polygon(_ellipse(x, y + 0.006, 0.1, 0.018), (170, 142, 112))
        for k in (0, 1):
            at = x - 0.06 + 0.1 * k + 0.02 * z[k]
            canvas.polygon(_stroke(at, y + 0.05, at, 1.02, 0.008), (90, 68, 54))
        return
    slope = 0.16 * (z[0] - 0.5)
    thick = 0.022 if kind == "stem" else 0.036
    snowy = kind == "snowy branch"
    left, right = y - slope * x + thick / 2, y + slope * (1 - x) + thick / 2
    colour = (150, 146, 92) if kind == "stem" else BARK
    canvas.polygon(_stroke(-0.02, left, 1.02, right, thick), colour)
    rise = 0.25 * thick
    ridge = _stroke(-0.02, left - rise, 1.02, right - rise, (0.55 if snowy else 0.3) * thick)
    canvas.polygon(ridge, _mix(colour, WHITE, 0.95 if snowy else 0.25))
    if kind == "leafy branch":
        _leaves(canvas, z, lambda at: left + (right - left) * at)


def _leaves(canvas: _Canvas, z: tuple[float, ...], height: Callable[[float], float]) -> None:
    for k in range(1, 5):
        at, side = 0.06 + 0.88 * z[k], (-1) ** k
        leaf = np.array([(0, 0), (0.03, 0.034 * side), (0.085, 0.03 * side), (0.045, 0.004 * side)])
        canvas.polygon(leaf + np.array([at, height(at)]), ((104, 146, 82), (132, 168, 96))[k % 2])


def _bird_colours(scene: Scene) -> dict[str, tuple[Colour, int]]:
    """Colour and opacity of each shape, by its name without the trailing number."""
    upper, under = PLUMAGE[scene.plumage], UNDERSIDE[scene.underside]
    solid = {
        "leg": (112, 82, 66),
        "toes": (112, 82, 66),
        "tail": _mix(upper, INK, 0.5),
        "fork": _mix(upper, INK, 0.85),
        "tip": WHITE,
        "body": upper,
        "neck": upper,
        "under": under,
        "spot": (64, 46, 44),
        "band": (58, 46, 50),
        "wing": _mix(upper, INK, 0.3),
        "feather": _mix(upper, INK, 0.62),
        "bar": WHITE,
        "crest": _mix(upper, INK, 0.85),
        "bill": (226, 162, 74),
        "head": upper,
        "throat": under,
        "cap": CAP,
        "eye_ring": _mix(upper, WHITE, 0.7),
        "eye": (28, 24, 28),
        "eye_light": WHITE,
    }
    veils = {"shade": (INK, 70), "belly": (INK, 26), "gloss": (WHITE, 42), "blush": (BLUSH, 90)}
    return {name: (colour, 255) for name, colour in solid.items()} | veils


def _draw_bird(canvas: _Canvas, scene: Scene) -> None:
    colours = _bird_colours(scene)
    edge = _mix(PLUMAGE[scene.plumage], INK, 0.75)
    # All contours before all fills: what is left of them is the outline of the whole bird.
    for name in _OUTLINED:
        if name in scene.shapes:
            canvas.contour(scene.shapes[name], edge, 2 * LINE)
    for name, points in scene.shapes.items():
        canvas.polygon(points, *colours[name.rstrip("0123456789")])


def _draw_decoy(canvas: _Canvas, scene: Scene) -> None:
    x0, y0, x1, y1 = scene.decoy_box
    for rim, colour in ((0.0, WHITE), (DECOY_RIM, list(DECOY_COLOURS.values())[scene.decoy])):
        left, top, right, bottom = x0 + rim, y0 + rim, x1 - rim, y1 - rim
        canvas.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)


def draw(scene: Scene, size: int = 64) -> Image.Image:
    """The scene as an RGB image of `size` x `size` pixels; the same picture at every size.

    Raises ValueError for a size below 16, where no mark would be left to see.
    """
    if size < 16:
        raise ValueError(f"size is {size}; draw at 16 pixels or more.")
    habitat = HABITATS[scene.habitat]
    noise = np.asarray(scene.noise)

    backdrop = Image.new("RGB", (3 * BACKDROP, 3 * BACKDROP))
    _sky(backdrop, habitat.sky, scene.light)
    habitat.far(_Canvas(backdrop, scene.light), noise)
    large = size * SUPERSAMPLE
    image = (
        backdrop.reduce(3)
        .filter(ImageFilter.BoxBlur(1))
        .resize((large, large), Image.Resampling.BICUBIC)
    )

    canvas = _Canvas(image, scene.light)
    habitat.near(canvas, noise)
    _perch(canvas, scene, habitat.perch)
    _draw_bird(canvas, scene)
    if scene.decoy >= 0:
        _draw_decoy(_Canvas(image, (100, 100, 100)), scene)  # a tag on the photo: its own light
    return image.reduce(SUPERSAMPLE)


# ---------------------------------------------------------------------------------- human gaze

# How readily a reader looks at each mark: the head draws nearly every eye, the tail the fewest.
_APPEAL = {"crown": 0.97, "wing": 0.78, "breast": 0.85, "tail": 0.65}
_ELSEWHERE = 0.1  # share of fixations that land anywhere on the bird
_JITTER = 0.02  # standard deviation of a fixation around its mark, in image widths


def simulate_gaze(
    scene: Scene, rng: np.random.Generator, readers: int = 5, size: int = 64
) -> list[np.ndarray]:
    """Fixations of people who tell the species: one float32 array [F, 3] for each reader.

    Columns: x and y in pixels of a `size` x `size` image, inside [0, size), and the duration in
    milliseconds, in [150, 900]. Each reader visits two to four of the deciding parts, nearly
    always the head, and sometimes another place on the bird; nobody looks for the decoy.
    Raises ValueError for fewer than one reader.
    """
    if readers < 1:
        raise ValueError(f"readers is {readers}; simulate at least one reader.")
    return [_read(scene, rng, size) for _ in range(readers)]


def _read(scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
    places = np.array([scene.parts[name] for name in _visited(rng)])  # [V, 2]
    places = places.repeat(rng.integers(2, 4, size=len(places)), axis=0)  # [F, 2], 2 or 3 each
    astray = np.flatnonzero(rng.random(len(places)) < _ELSEWHERE)
    trunk = scene.shapes["body"]
    middle = trunk.mean(axis=0)
    edge = trunk[rng.integers(len(trunk), size=len(astray))]
    places[astray] = middle + (edge - middle) * rng.uniform(0, 1, (len(astray), 1))
    places += rng.normal(0, _JITTER, places.shape)
    places = (places * size).clip(0, size - 0.01)
    duration = rng.gamma(5, 70, len(places)).clip(150, 900)
    return np.column_stack([places, duration]).astype(np.float32)


def _visited(rng: np.random.Generator) -> list[str]:
    """Two to four parts in a random order."""
    seen = [name for name, appeal in _APPEAL.items() if rng.random() < appeal]
    if len(seen) < 2:
        seen = ["crown", "breast"]
    return [seen[i] for i in rng.permutation(len(seen))]


# ---------------------------------------------------------------------------------- the data set


@dataclass
class ToyBirds:
    """A drawn split: n images with A = len(ATTRIBUTES) marks each; boxes and points in pixels."""

    images: np.ndarray  # uint8 [n, size, size, 3], RGB
    labels: np.ndarray  # int64 [n], index into SPECIES, -1 where the marks match no species
    attributes: np.ndarray  # int64 [n, A], value index for each entry of ATTRIBUTES
    decoys: np.ndarray  # int64 [n], index into DECOY_COLOURS
    decoy_boxes: np.ndarray  # float32 [n, 4], x0, y0, x1, y1; NaN where there is no decoy
    boxes: np.ndarray  # float32 [n, 4], bounding box of the bird
    gaze: list[list[np.ndarray]]  # n lists of readers, each float32 [F, 3]: x, y, milliseconds
    parts: np.ndarray  # float32 [n, A, 2], x and y of each deciding part
    scenes: list[Scene]  # to draw an image again, larger or without its decoy

    def __len__(self) -> int:
        return len(self.labels)


def make(split: str, n: int, seed: int = 0, size: int = 64, agreement: float = 0.95) -> ToyBirds:
    """Draw `n` birds of a split; the same arguments always give the same birds.

    "train" and "val": the decoy's colour agrees with the label with probability `agreement`,
    otherwise it is one of the seven others. "test": the colour is uniform and tells nothing.
    "pretrain": marks are uniform and independent, the colour too, and the label is -1 unless the
    marks happen to be those of a species. Labels are balanced to within one, in random order; the
    first images of a longer split are those of a shorter one.

    Raises ValueError for an unknown split, n below 1, a negative seed, a size below 16 or an
    agreement outside [0, 1].
    """
    _check_request(split, n, seed, agreement)
    scenes, gaze, images = [], [], []
    for i in range(n):
        rng = _generator(seed, split, 1, i)
        scenes.append(sample_scene(rng, *_choose(rng, split, seed, i, agreement)))
        images.append(np.asarray(draw(scenes[-1], size)))
        gaze.append(simulate_gaze(scenes[-1], rng, size=size))

    no_box = (np.nan,) * 4
    return ToyBirds(
        images=np.stack(images),
        labels=np.array([s.label for s in scenes], dtype=np.int64),
        attributes=np.array([s.attributes for s in scenes], dtype=np.int64),
        decoys=np.array([s.decoy for s in scenes], dtype=np.int64),
        decoy_boxes=size * np.array([s.decoy_box or no_box for s in scenes], dtype=np.float32),
        boxes=size * np.array([s.box for s in scenes], dtype=np.float32),
        gaze=gaze,
        parts=size * np.array([list(s.parts.values()) for s in scenes], dtype=np.float32),
        scenes=scenes,
    )


def _check_request(split: str, n: int, seed: int, agreement: float) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}.")
    if n < 1:
        raise ValueError(f"n is {n}; ask for at least one image.")
    if seed < 0:
        raise ValueError(f"seed is {seed}; give zero or a positive whole number.")
    if not 0 <= agreement <= 1:
        raise ValueError(f"agreement is {agreement}; give a probability from 0 to 1.")


def _generator(seed: int, split: str, *key: int) -> np.random.Generator:
    """A stream of its own for every split and image, whatever else was drawn before."""
    return np.random.default_rng(
        np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), *key))
    )


def _choose(
    rng: np.random.Generator, split: str, seed: int, i: int, agreement: float
) -> tuple[tuple[int, ...], int, int]:
    """Attributes, label and decoy of image `i`."""
    colours = len(DECOY_COLOURS)
    if split == "pretrain":
        attributes = tuple(int(rng.integers(len(v))) for v in ATTRIBUTES.values())
        known = [species.attributes for species in SPECIES]
        label = known.index(attributes) if attributes in known else -1
        return attributes, label, int(rng.integers(colours))

    # Each run of eight images holds every species once: balanced for every n, stable as n grows.
    order = _generator(seed, split, 0, i // len(SPECIES)).permutation(len(SPECIES))
    label = int(order[i % len(SPECIES)])
    if split == "test":
        decoy = int(rng.integers(colours))
    elif rng.random() < agreement:
        decoy = label
    else:
        decoy = (label + int(rng.integers(1, colours))) % colours
    return SPECIES[label].attributes, label, decoy
