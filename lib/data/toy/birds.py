"""The embedded data set: little field-guide birds, drawn in code, with human gaze and a decoy.

A species is decided by four small marks at four places (crown, wing, breast, tail). Everything
else, from plumage and pose to habitat and light, is drawn at random and never tells the species.
A small coloured square, the decoy, agrees with the label in most training images:
a model that looks at it is right for the wrong reason, and the test split shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lib.config import DataConfig
from lib.data.maps import Box, Recording
from lib.data.sources import Record, painted_maps
from lib.data.splits import Part
from lib.data.toy.draw import draw
from lib.data.toy.scene import ATTRIBUTES, DECOY_COLOURS, LEVELS, SPECIES, Scene, sample_scene

TOY_SPLITS = ("train", "val", "test", "pretrain")

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
    return [_one_reader(scene, rng, size) for _ in range(readers)]


def _one_reader(scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
    seen = [name for name, appeal in _APPEAL.items() if rng.random() < appeal]
    if len(seen) < 2:
        seen = ["crown", "breast"]
    places = np.array([scene.parts[name] for name in seen])[rng.permutation(len(seen))]  # [V, 2]
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


def make(
    split: str,
    n: int,
    seed: int = 0,
    size: int = 64,
    agreement: float = 0.95,
    level: str = "border",
) -> ToyBirds:
    """Draw `n` birds of a split; the same arguments always give the same birds.

    "train" and "val": the decoy's colour agrees with the label with probability `agreement`,
    otherwise it is one of the seven others. "test": the colour is uniform and tells nothing.
    "pretrain": marks are uniform and independent, the colour too, and the label is -1 unless the
    marks happen to be those of a species. Labels are balanced to within one, in random order; the
    first images of a longer split are those of a shorter one. Levels: `lib.data.toy.scene`.

    Raises ValueError for an unknown split or level, n below 1, a negative seed, a size below 16 or
    an agreement outside [0, 1].
    """
    if split not in TOY_SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(TOY_SPLITS)}.")
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; choose one of {', '.join(LEVELS)}.")
    if n < 1:
        raise ValueError(f"n is {n}; ask for at least one image.")
    if seed < 0:
        raise ValueError(f"seed is {seed}; give zero or a positive whole number.")
    if not 0 <= agreement <= 1:
        raise ValueError(f"agreement is {agreement}; give a probability from 0 to 1.")
    scenes, gaze, images = [], [], []
    for i in range(n):
        rng = _generator(seed, split, 1, i)
        scenes.append(sample_scene(rng, *_choose(rng, split, seed, i, agreement), level))
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


def _generator(seed: int, split: str, *key: int) -> np.random.Generator:
    """A stream of its own for every split and image, whatever else was drawn before."""
    stream = (TOY_SPLITS.index(split), *key)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


def _choose(
    rng: np.random.Generator, split: str, seed: int, i: int, agreement: float
) -> tuple[tuple[int, ...], int, int]:
    """Attributes, label and decoy of image `i`."""
    colours, known = len(DECOY_COLOURS), list(SPECIES.values())
    if split == "pretrain":
        attributes = tuple(int(rng.integers(len(v))) for v in ATTRIBUTES.values())
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
    return known[label], label, decoy


TOY_FIRST_ID = {"train": 0, "val": 100_000, "test": 200_000}  # an id names one drawn bird only

# Drawn once a process: a comparison reads the same split for every run. Not to be changed.
_drawn = lru_cache(maxsize=8)(make)


def toy_records(config: DataConfig, part: Part) -> tuple[list[Record], list[str]]:
    """As `lib.data.dataset.read_records`; the table gets the colour of each bird's decoy."""
    height, width = config.image_size
    if height != width:
        raise ValueError(
            f"image_size is {height} x {width}, but toy birds are drawn on a square; "
            "give both sides the same length."
        )
    count = getattr(config, f"toy_{part}")
    birds = _drawn(part, count, config.seed, height, config.agreement, config.toy_level)
    painted = painted_maps(config.maps_dir) if config.maps == "corrections" else {}
    records = []
    for i, image_id in enumerate(range(TOY_FIRST_ID[part], TOY_FIRST_ID[part] + count)):
        box = tuple(birds.boxes[i])
        places = np.pad(birds.parts[i], [(0, 0), (0, 1)], constant_values=1)  # [A, 3]
        sources = {
            "gaze": tuple(Recording(image_id, width, height, looks) for looks in birds.gaze[i]),
            "boxes": Box(box, width, height),
            "parts": (Recording(image_id, width, height, places),),
            "corrections": painted.get(image_id),
            "none": None,
        }
        if config.maps not in sources:
            raise ValueError(
                f"toy birds come without {config.maps}; set MAPS to gaze, boxes, parts, none, or "
                "to a folder of corrections."
            )
        records.append(
            Record(
                image_id=image_id,
                label=int(birds.labels[i]),
                image=birds.images[i],
                human=sources[config.maps],
                boxes={"": box, "d": tuple(birds.decoy_boxes[i])},
                size=(height, width),
                columns={"decoy": int(birds.decoys[i])},
                parts=places,
            )
        )
    return records, list(SPECIES)
