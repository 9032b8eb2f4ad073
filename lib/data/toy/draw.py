"""Toy birds, second part: a scene becomes a picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from lib.data.toy.scene import (
    DECOY_COLOURS,
    OUTLINED,
    PLUMAGE,
    UNDERSIDE,
    Colour,
    Scene,
    ellipse,
    spline,
    stroke,
)

SUPERSAMPLE = 3  # drawn this much larger, then averaged down
BACKDROP = 64  # pixels of the backdrop at every size: enlarged, it is out of focus, as in a photo
DECOY_RIM = 0.014  # width of the light outline
LINE = 0.011  # width of the bird's outline

INK: Colour = (52, 44, 46)
WHITE: Colour = (252, 250, 242)
CAP: Colour = (208, 36, 40)
BLUSH: Colour = (240, 140, 112)
BARK: Colour = (112, 86, 66)


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


class _Canvas:
    """Draws unit-coordinate polygons on a square image, in the light of the scene."""

    def __init__(self, image: Image.Image, light: Colour) -> None:
        self.image = image
        self.pen = ImageDraw.Draw(image)
        self.veil = ImageDraw.Draw(image, "RGBA")  # blends translucent colours, but is slower
        self.size = image.width
        self.light = light

    def lit(self, colour: Colour) -> Colour:
        (r, g, b), (red, green, blue) = colour, self.light
        return (min(255, r * red // 100), min(255, g * green // 100), min(255, b * blue // 100))

    def sky(self, *stops: Colour) -> None:
        """A gradient from the top through evenly spaced colours, over the whole image."""
        table = np.asarray(stops, dtype=np.float64) * (np.asarray(self.light) / 100)
        at = np.linspace(0, len(stops) - 1, self.size)
        column = np.stack([np.interp(at, range(len(stops)), shade) for shade in table.T], axis=1)
        column = column.clip(0, 255).astype(np.uint8)[:, None]  # [size, 1, 3]
        self.image.paste(Image.fromarray(column.repeat(self.size, axis=1)))

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
        self.polygon(ellipse(x, y, r, r * flat), colour, alpha)


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
    canvas.sky((190, 222, 238), (236, 242, 222), (190, 214, 150))
    _hill(canvas, z[0:2], 0.6, (176, 204, 140))
    _hill(canvas, z[2:4], 0.74, (150, 190, 116))
    _bokeh(canvas, z[4:22], ((252, 236, 170), (246, 206, 216), (220, 232, 170)), 0.62)


def _meadow_near(canvas: _Canvas, z: np.ndarray) -> None:
    _blades(canvas, z[22:52], ((118, 164, 88), (142, 182, 102), (98, 146, 82)), 0.26)
    for x, y, r in z[52:64].reshape(-1, 3):
        canvas.disc(x, 0.84 + 0.12 * y, 0.012 + 0.008 * r, (252, 248, 236))
        canvas.disc(x, 0.84 + 0.12 * y, 0.006, (240, 200, 90))


def _reeds(canvas: _Canvas, z: np.ndarray) -> None:
    canvas.sky((214, 228, 230), (238, 232, 204), (214, 206, 160))
    _hill(canvas, z[0:2], 0.66, (196, 200, 158))
    _blades(canvas, z[2:38], ((202, 192, 138), (184, 186, 132), (214, 204, 156)), 1.0)


def _reeds_near(canvas: _Canvas, z: np.ndarray) -> None:
    for x, y, lean in z[38:50].reshape(-1, 3):
        top, lean = 0.12 + 0.4 * y, 0.1 * (lean - 0.5)
        canvas.polygon(stroke(x, 1.02, x + lean, top, 0.012), (168, 162, 104))
        canvas.polygon(ellipse(x + lean, top, 0.017, 0.06), (142, 108, 78))


def _snow(canvas: _Canvas, z: np.ndarray) -> None:
    canvas.sky((190, 208, 226), (222, 232, 240))
    for x, h, w in z[0:15].reshape(-1, 3):
        fir = [(x - 0.06 - 0.05 * w, 0.8), (x, 0.36 + 0.2 * h), (x + 0.06 + 0.05 * w, 0.8)]
        canvas.polygon(fir, (168, 188, 200))
    _hill(canvas, z[15:17], 0.72, (232, 240, 246))
    _hill(canvas, z[17:19], 0.86, (246, 249, 252))


def _snow_near(canvas: _Canvas, z: np.ndarray) -> None:
    for x, y, r in z[19:64].reshape(-1, 3):
        canvas.disc(x, y, 0.006 + 0.008 * r, (255, 255, 255), alpha=220)


def _sunset(canvas: _Canvas, z: np.ndarray) -> None:
    canvas.sky((134, 136, 178), (226, 170, 172), (252, 206, 160))
    x, y = 0.15 + 0.7 * z[0], 0.42 + 0.2 * z[1]
    for r, alpha in ((0.2, 50), (0.15, 70), (0.1, 255)):
        canvas.disc(x, y, r, (255, 236, 190), alpha)
    for x, y, w in z[2:14].reshape(-1, 3):
        canvas.disc(x, 0.06 + 0.4 * y, 0.1 + 0.1 * w, (255, 214, 196), alpha=90, flat=0.16)
    _hill(canvas, z[14:16], 0.7, (196, 136, 142))
    _hill(canvas, z[16:18], 0.82, (150, 108, 130))


def _forest(canvas: _Canvas, z: np.ndarray) -> None:
    canvas.sky((184, 204, 156), (158, 188, 140), (138, 166, 118))
    for x, w, lean in z[0:12].reshape(-1, 3):
        trunk = stroke(x, 1.05, x + 0.12 * (lean - 0.5), -0.05, 0.04 + 0.05 * w)
        canvas.polygon(trunk, (124, 136, 108))
    _hill(canvas, z[12:14], 0.84, (128, 158, 112))
    _bokeh(canvas, z[14:56], ((216, 228, 160), (150, 186, 130), (238, 236, 184)), 0.0)


def _pond(canvas: _Canvas, z: np.ndarray) -> None:
    canvas.sky((206, 228, 238), (226, 238, 232))
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
# What lies out of focus, what is sharp, and what the bird stands on; every one of HABITATS.
_PAINTED: dict[str, tuple[_Painter, _Painter, str]] = {
    "meadow": (_meadow, _meadow_near, "post"),
    "reeds": (_reeds, _reeds_near, "stem"),
    "snow": (_snow, _snow_near, "snowy branch"),
    "sunset": (_sunset, _nothing, "branch"),
    "forest": (_forest, _nothing, "leafy branch"),
    "pond": (_pond, _pond_near, "stone"),
}

# fmt: off
_STONE = spline([
    (-0.98, 0.75), (-0.86, -0.2), (-0.4, -0.88), (0.2, -0.98), (0.72, -0.6), (1.0, 0.6), (0.3, 1.0),
])
# fmt: on


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
        canvas.polygon(ellipse(x, y + 0.006, 0.1, 0.018), (170, 142, 112))
        for k in (0, 1):
            at = x - 0.06 + 0.1 * k + 0.02 * z[k]
            canvas.polygon(stroke(at, y + 0.05, at, 1.02, 0.008), (90, 68, 54))
        return
    slope = 0.16 * (z[0] - 0.5)
    thick = 0.022 if kind == "stem" else 0.036
    snowy = kind == "snowy branch"
    left, right = y - slope * x + thick / 2, y + slope * (1 - x) + thick / 2
    colour = (150, 146, 92) if kind == "stem" else BARK
    canvas.polygon(stroke(-0.02, left, 1.02, right, thick), colour)
    rise = 0.25 * thick
    ridge = stroke(-0.02, left - rise, 1.02, right - rise, (0.55 if snowy else 0.3) * thick)
    canvas.polygon(ridge, _mix(colour, WHITE, 0.95 if snowy else 0.25))
    if kind == "leafy branch":
        leaf = np.array([(0, 0), (0.03, 0.034), (0.085, 0.03), (0.045, 0.004)])
        for k in range(1, 5):
            at = 0.06 + 0.88 * z[k]
            place = (at, left + (right - left) * at)
            colour = ((104, 146, 82), (132, 168, 96))[k % 2]
            canvas.polygon(leaf * (1, (-1) ** k) + place, colour)


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
    for name in OUTLINED:
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
    far, near, perch = _PAINTED[scene.habitat]
    noise = np.asarray(scene.noise)

    backdrop = Image.new("RGB", (3 * BACKDROP, 3 * BACKDROP))
    far(_Canvas(backdrop, scene.light), noise)
    large = size * SUPERSAMPLE
    blurred = backdrop.reduce(3).filter(ImageFilter.BoxBlur(1))
    image = blurred.resize((large, large), Image.Resampling.BICUBIC)

    canvas = _Canvas(image, scene.light)
    near(canvas, noise)
    if scene.other is not None:
        _perch(canvas, scene.other, perch)
        _draw_bird(canvas, scene.other)
    _perch(canvas, scene, perch)
    on_photo = _Canvas(image, (100, 100, 100))  # the decoy is stuck on: its own light
    if scene.decoy >= 0 and scene.decoy_behind:
        _draw_decoy(on_photo, scene)
    _draw_bird(canvas, scene)
    if scene.decoy >= 0 and not scene.decoy_behind:
        _draw_decoy(on_photo, scene)
    return image.reduce(SUPERSAMPLE)
