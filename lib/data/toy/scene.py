"""Toy birds, first part: all that chance decides about one picture, and the shapes of the bird.

All geometry is in unit coordinates (x to the right, y down, the image is [0, 1] x [0, 1]) and all
chance is spent in `sample_scene`, so one scene can be drawn at any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

Colour = tuple[int, int, int]

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "crown": ("plain", "red cap", "crest"),
    "wing": ("plain", "two white bars"),
    "breast": ("plain", "spotted", "banded"),
    "tail": ("short", "long forked"),
}


# The marks of each species: for every entry of ATTRIBUTES the index of its value.
# Found by search: two species differ in one to three marks, every value is shared by at least two
# species, and no two marks together tell all eight apart, so a reader has to look at three places.
SPECIES: dict[str, tuple[int, ...]] = {
    "Freckled Pipling": (0, 0, 1, 0),
    "Sashed Kiteling": (0, 0, 2, 1),
    "Pale Ladderwing": (0, 1, 0, 0),
    "Ember Forktail": (1, 0, 0, 1),
    "Harlequin Thrushlet": (1, 1, 1, 1),
    "Ruby Sashling": (1, 1, 2, 0),
    "Tufted Hazelbird": (2, 0, 1, 0),
    "Crested Larkspur": (2, 1, 1, 1),
}

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
HABITATS = ("meadow", "reeds", "snow", "sunset", "forest", "pond")

# Where birds and decoys are, from easy to hard: see `sample_scene`.
LEVELS = ("border", "anywhere", "flock")

MARGIN = 0.035  # the bird keeps this far from the image border
DECOY_SIDE = 0.148  # 9.5 pixels of 64, outline included
DECOY_GAP = 0.03  # the decoy keeps this far from the bird's outline, or from its marks
SCALES = {"border": (0.45, 0.53), "anywhere": (0.26, 0.44), "flock": (0.26, 0.4)}  # body lengths
OTHER = 0.7  # length of the second bird, which is further away, as a share of the first's

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


def spline(points: list[tuple[float, float]], steps: int = 6) -> np.ndarray:
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


def ellipse(x: float, y: float, rx: float, ry: float, n: int = 16) -> np.ndarray:
    return _circle(n) * (rx, ry) + (x, y)


def stroke(x0: float, y0: float, x1: float, y1: float, width: float) -> np.ndarray:
    """A straight line as a thin quadrilateral, so that its width scales exactly with the image."""
    half = 0.5 * width / math.hypot(x1 - x0, y1 - y0)
    dx, dy = half * (y0 - y1), half * (x1 - x0)
    return np.array(
        [(x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy), (x0 - dx, y0 - dy)]
    )


# Shapes of the trunk, in body lengths: x along the body axis towards the head, y to the belly.
# fmt: off
_BODY = spline([
    (-0.56, -0.05), (-0.3, -0.19), (0.04, -0.28), (0.32, -0.24), (0.47, -0.02), (0.37, 0.2),
    (0.06, 0.31), (-0.3, 0.18), (-0.56, 0.06),
])
_UNDER = spline([
    (0.475, -0.08), (0.465, 0.0), (0.365, 0.195), (0.06, 0.3), (-0.3, 0.17), (-0.5, 0.07),
    (-0.2, 0.1), (0.12, 0.02), (0.25, -0.14),
])
_WING = spline([
    (0.2, -0.12), (0.02, -0.2), (-0.3, -0.16), (-0.72, 0.02), (-0.4, 0.1), (-0.1, 0.15),
    (0.12, 0.08),
])
_SPOT_AT = [
    (0.375, -0.02), (0.25, 0.075), (0.365, 0.13), (0.22, 0.215), (0.09, 0.14), (0.05, 0.255),
    (-0.08, 0.19),
]
# fmt: on
_GLOSS = spline([(-0.34, -0.165), (0.04, -0.262), (0.3, -0.23), (0.06, -0.2)])
_BELLY = spline(
    [(0.3, 0.235), (0.06, 0.305), (-0.3, 0.175), (-0.5, 0.07), (-0.2, 0.14), (0.06, 0.24)]
)
_SHADE = _WING + np.array([0.0, 0.04])
_BAND = np.concatenate(
    [_BODY[23:31], spline([(0.3, 0.17), (0.2, 0.01), (0.19, -0.12), (0.31, -0.07)])[:18]]
)
_FEATHERS = {
    "feather0": stroke(0.0, 0.06, -0.44, 0.05, 0.022),
    "feather1": stroke(-0.02, -0.02, -0.54, 0.01, 0.022),
    "feather2": stroke(-0.08, -0.1, -0.5, -0.06, 0.022),
}
_BARS = {
    "bar0": np.array([(0.07, -0.19), (0.15, -0.17), (0.1, 0.11), (0.01, 0.14)]),
    "bar1": np.array([(-0.14, -0.185), (-0.06, -0.19), (-0.11, 0.15), (-0.2, 0.135)]),
}
_SPOTS = {f"spot{i}": ellipse(x, y, 0.062, 0.054, 12) for i, (x, y) in enumerate(_SPOT_AT)}
_TAIL_SHORT = {"tail0": np.array([(-0.46, -0.1), (-0.8, -0.07), (-0.82, 0.07), (-0.46, 0.09)])}
_TAIL_FORKED = {
    "fork0": spline([(-0.44, -0.12), (-0.76, -0.17), (-1.06, -0.33), (-0.8, 0.0), (-0.46, 0.04)]),
    "fork1": spline([(-0.44, -0.04), (-0.8, -0.02), (-1.05, 0.25), (-0.74, 0.17), (-0.44, 0.12)]),
    "tip0": spline([(-0.8, -0.2), (-1.06, -0.33), (-0.88, -0.1)]),
    "tip1": spline([(-0.88, 0.06), (-1.05, 0.25), (-0.79, 0.19)]),
}

# Shapes of the head, in body lengths, from the middle of the head, looking to the right.
_HEAD = ellipse(0, 0, 0.235, 0.235, 24)
_THROAT = spline([(0.2, 0.05), (0.1, 0.21), (-0.04, 0.26), (0.0, 0.12)])
_CAP = np.concatenate([ellipse(0, 0, 0.245, 0.25, 24)[12:24], [(0.21, -0.085), (-0.02, -0.07)]])
_CREST = spline(
    [(0.17, -0.15), (0.05, -0.28), (-0.12, -0.36), (-0.36, -0.42), (-0.28, -0.22), (-0.22, -0.04)]
)
_SHEEN = ellipse(-0.06, -0.12, 0.1, 0.06)
_BLUSH = ellipse(0.03, 0.1, 0.065, 0.045)
_EYE = {
    "eye_ring": ellipse(0.085, -0.015, 0.07, 0.07),
    "eye": ellipse(0.085, -0.015, 0.05, 0.05),
    "eye_light": ellipse(0.1, -0.034, 0.017, 0.017, 8),
}

# Where the deciding marks of the trunk sit.
_MARKS = {"wing": (-0.03, -0.01), "breast": (0.31, 0.08), "tail": (-0.74, 0.0)}
OUTLINED = ("tail0", "fork0", "fork1", "body", "neck", "head", "crest", "bill")
_OUTERMOST = (*OUTLINED, "wing", "shade", "leg0", "leg1", "toes0", "toes1")


def _rotation(angle: float) -> np.ndarray:
    """Row vectors times this matrix are turned by `angle` radians, head end upwards."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s], [s, c]])


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
    decoy_behind: bool = False  # the bird is in front of the decoy, where they meet
    other: Scene | None = None  # a second bird, further away, at which nobody looks

    @property
    def _local(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        pose = (self.tilt, self.head_raise, self.head_pitch, self.bill, self.facing)
        return _bird_shapes(self.attributes, *pose)

    @cached_property
    def shapes(self) -> dict[str, np.ndarray]:
        """Polygons [k, 2] of the bird in drawing order, name -> points."""
        return {name: p * self.scale + self.centre for name, p in self._local[0].items()}

    @cached_property
    def parts(self) -> dict[str, tuple[float, float]]:
        """Where each deciding mark sits: name in ATTRIBUTES -> (x, y)."""
        at = {name: self._local[1][name][0] * self.scale + self.centre for name in ATTRIBUTES}
        return {name: tuple(place.tolist()) for name, place in at.items()}

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
    attributes: tuple[int, ...], tilt: float, rise: float, pitch: float, bill: float, facing: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Polygons and marks around the middle of the body, in body lengths."""
    crown, wing, breast, tail = attributes
    turn, nod = _rotation(tilt), _rotation(pitch)
    neck_at = np.array([(0.37, -0.31)]) @ turn + (0.03, -rise)

    body = {**(_TAIL_FORKED if tail else _TAIL_SHORT), "body": _BODY}
    detail = {"gloss0": _GLOSS, "under": _UNDER, "belly": _BELLY}
    if breast == 1:
        detail |= _SPOTS
    elif breast == 2:
        detail["band"] = _BAND
    detail |= {"shade": _SHADE, "wing": _WING} | _FEATHERS | (_BARS if wing else {})

    head: dict[str, np.ndarray] = {"crest": _CREST} if crown == 2 else {}
    head["bill"] = np.array([(0.18, -0.075), (0.2 + bill, 0.035), (0.18, 0.085)])
    head |= {"head": _HEAD, "throat": _THROAT} | ({"cap": _CAP} if crown == 1 else {})
    head |= {"gloss1": _SHEEN, "blush": _BLUSH} | _EYE

    body = {name: points @ turn for name, points in body.items()}
    detail = {name: points @ turn for name, points in detail.items()}
    head = {name: points @ nod + neck_at for name, points in head.items()}
    # nape and throat to back and breast: points of the two outlines, by their index
    neck = {"neck": np.concatenate([head["head"][[11, 3]], body["body"][[25, 10]]])}
    local = _legs(turn) | body | neck | detail | head

    marks = {name: np.array([at]) @ turn for name, at in _MARKS.items()}
    marks["crown"] = np.array([(-0.03, -0.2)]) @ nod + neck_at
    mirror = np.array([facing, 1.0])
    return tuple({name: p * mirror for name, p in shapes.items()} for shapes in (local, marks))


def _legs(turn: np.ndarray) -> dict[str, np.ndarray]:
    (xa, ya), (xb, yb) = np.array([(-0.1, 0.24), (0.08, 0.27)]) @ turn
    ground = max(ya, yb) + 0.17
    legs = {"leg0": stroke(xa, ya, xa + 0.05, ground, 0.045)}
    legs["leg1"] = stroke(xb, yb, xb + 0.05, ground, 0.045)
    for i, x in enumerate((xa, xb)):
        legs[f"toes{i}"] = stroke(x - 0.01, ground, x + 0.14, ground, 0.045)
    return legs


def sample_scene(
    rng: np.random.Generator,
    attributes: tuple[int, ...],
    label: int,
    decoy: int,
    level: str = "border",
) -> Scene:
    """Draw pose, plumage, habitat, light and positions at random for a bird with given marks.

    Levels: "border", the bird fills the picture and the decoy keeps to the border; "anywhere", the
    bird is smaller and both are anywhere, the decoy also partly on the bird or behind it, but off
    its marks; "flock", and a smaller bird of any marks is further away.

    `attributes` holds one value index for each entry of ATTRIBUTES, `label` is in [-1, 8) and
    `decoy` in [-1, 8), -1 for none. Raises ValueError for anything else.
    """
    sizes = [len(values) for values in ATTRIBUTES.values()]
    known = [0 <= a < n for a, n in zip(attributes, sizes, strict=False)]
    if len(attributes) != len(sizes) or not all(known):
        raise ValueError(
            f"attributes is {attributes}; give one index for each of {list(ATTRIBUTES)}, "
            f"below {sizes}."
        )
    if not -1 <= label < len(SPECIES):
        raise ValueError(f"label is {label}; give -1 (no species) to {len(SPECIES) - 1}.")
    if not -1 <= decoy < len(DECOY_COLOURS):
        raise ValueError(f"decoy is {decoy}; give -1 (no decoy) to {len(DECOY_COLOURS) - 1}.")
    scene = _placed(rng, _pose(rng, attributes, label, decoy), SCALES[level])
    if level == "border":
        return replace(scene, decoy_centre=_sample_border(rng, scene))
    if level == "flock":
        scene = _with_other(rng, scene)
    scene = replace(scene, decoy_behind=bool(rng.random() < 0.5))
    return replace(scene, decoy_centre=_sample_anywhere(rng, scene))


def _pose(rng: np.random.Generator, attributes: tuple[int, ...], label: int, decoy: int) -> Scene:
    return Scene(
        label=label,
        attributes=attributes,
        decoy=decoy,
        facing=int(rng.choice((-1, 1))),
        tilt=float(np.radians(rng.uniform(14, 36))),
        head_raise=float(rng.uniform(0.0, 0.1)),
        head_pitch=float(np.radians(rng.uniform(-12, 16))),
        scale=1.0,
        centre=(0.0, 0.0),
        bill=float(rng.uniform(0.13, 0.24)),
        plumage=int(rng.integers(len(PLUMAGE))),
        underside=int(rng.integers(len(UNDERSIDE))),
        habitat=str(rng.choice(HABITATS)),
        light=_sample_light(rng),
        decoy_centre=(0.0, 0.0),
        noise=tuple(rng.random(96).tolist()),
    )


def _placed(rng: np.random.Generator, scene: Scene, scales: tuple[float, float]) -> Scene:
    """The bird at a size of a range, anywhere inside the picture; its scale is 1 before."""
    scale, centre = _size_and_place(rng, scene.box, scales)
    return replace(scene, scale=scale, centre=centre)


def _size_and_place(
    rng: np.random.Generator, box: tuple[float, ...], scales: tuple[float, float]
) -> tuple[float, tuple[float, float]]:
    """Scale and centre for what has such a box at scale 1, in body lengths, around the origin."""
    x0, y0, x1, y1 = box
    scale = min(rng.uniform(*scales), (1 - 2 * MARGIN) / max(x1 - x0, y1 - y0))
    centre = (
        _place(rng, scale * x0 - MARGIN, scale * x1 + MARGIN),
        _place(rng, scale * y0 - MARGIN, scale * y1 + MARGIN),
    )
    return float(scale), centre


def _with_other(rng: np.random.Generator, scene: Scene) -> Scene:
    """A second bird of any marks, clear of the first one's; none where there is no room."""
    marks = tuple(int(rng.integers(len(values))) for values in ATTRIBUTES.values())
    size = OTHER * scene.scale
    other = _pose(rng, marks, -1, -1)
    ours, box = np.array(scene.box), other.box  # its shapes are made once, not for every try
    for _ in range(20):
        scale, centre = _size_and_place(rng, box, (size, size))
        theirs = scale * np.array(box) + np.tile(centre, 2)
        meet = np.minimum(ours[2:], theirs[2:]) - np.maximum(ours[:2], theirs[:2])
        if (meet < 0).any():
            look = {"habitat": scene.habitat, "light": scene.light}
            return replace(scene, other=replace(other, scale=scale, centre=centre, **look))
    return scene


def _place(rng: np.random.Generator, low: float, high: float) -> float:
    """An origin that keeps what reaches from `low` to `high` inside [0, 1]."""
    return float(-low + rng.random() * (1 - high + low))


def _sample_light(rng: np.random.Generator) -> Colour:
    bright, warm = rng.uniform(92, 108), rng.uniform(-5, 5)
    return (round(bright + warm), round(bright), round(bright - warm))


# Places around the unit square, [80, 2], for the decoy to sit at.
_ALONG = np.linspace(0, 1, 20)
_SIDES = [np.stack([_ALONG, np.full(20, k)], axis=1) for k in (0, 1)]  # top, bottom
_BORDER = np.concatenate([side[:, flip] for side in _SIDES for flip in ([0, 1], [1, 0])])


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


def _sample_anywhere(rng: np.random.Generator, scene: Scene) -> tuple[float, float]:
    """A random place for the decoy, off the bird's marks, and to be seen where it is behind."""
    half, parts = DECOY_SIDE / 2, np.array(list(scene.parts.values()))
    for _ in range(60):
        place = rng.uniform(half + 0.015, 1 - half - 0.015, 2)
        away = np.abs(parts - place).max(axis=1).min()  # the decoy is an upright square
        if away > half + DECOY_GAP and _share_shown(scene, place) > 0.6:
            return tuple(place.tolist())
    return _sample_border(rng, scene)


def _share_shown(scene: Scene, place: np.ndarray) -> float:
    """Share of a decoy at a place that the bird does not hide."""
    steps = (np.arange(5) - 2) * DECOY_SIDE / 5
    points = place + np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)  # [25, 2]
    hidden = np.zeros(len(points), dtype=bool)
    for name in OUTLINED:
        if name in scene.shapes:
            hidden |= _inside(points, scene.shapes[name])
    return 1 - hidden.mean()


def _inside(points: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Which points lie inside a polygon (even-odd rule): [n, 2], [k, 2] to bool [n]."""
    x, y = points[:, :1], points[:, 1:]  # [n, 1]
    (ax, ay), (bx, by) = polygon.T, np.roll(polygon, -1, axis=0).T  # [k]
    crosses = (ay > y) != (by > y)  # [n, k]
    with np.errstate(divide="ignore", invalid="ignore"):
        right = x < (bx - ax) * (y - ay) / (by - ay) + ax
    return (crosses & right).sum(axis=1) % 2 == 1
