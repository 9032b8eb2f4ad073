"""Read a whole data set once and say what is wrong with it, before a night of training does.

`check_data` opens every picture and every human map of every part, in parallel. What would stop
training is told apart from what would only make it worse.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from lib.config import DataConfig
from lib.data.dataset import read_records
from lib.data.maps import Box, human_map
from lib.data.pictures import is_in_colours, read_picture
from lib.data.sources import Record
from lib.data.splits import PARTS

# Every problem that is looked for, and whether training stops at it.
PROBLEMS: dict[str, bool] = {
    "lists: cannot be used": True,
    "picture: missing": True,
    "picture: unreadable": True,
    "picture: of another size than its gaze": True,
    "picture: smaller than the model's input": False,
    "picture: same file as another": False,
    "picture: same file in train and in another part": False,
    "picture: same file with another label": False,
    "box: reaches out of the picture": False,
    "gaze: fixations out of the picture": False,
    "map: none": False,
    "map: unreadable or of another size": True,
    "map: zeros only": False,
    "map: in colours, read as brightness": False,
    "maps: no training picture has one": True,
    "class: no training picture": False,
    "class: no test picture": False,
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    problem: str  # a key of PROBLEMS
    part: str  # train, val, test
    where: str  # a file, or a class
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """What `check_data` found."""

    findings: tuple[Finding, ...]
    balance: pd.DataFrame  # a row a part: pictures, with a map, classes, pictures a class

    @property
    def stops_training(self) -> bool:
        return any(PROBLEMS[finding.problem] for finding in self.findings)

    def details(self) -> pd.DataFrame:
        """One row a finding: problem, part, where, detail."""
        return pd.DataFrame(list(self.findings), columns=["problem", "part", "where", "detail"])

    def table(self) -> pd.DataFrame:
        """One row a problem that was looked for: how often it was found, by part."""
        found = Counter((finding.problem, finding.part) for finding in self.findings)
        rows = {problem: [found[problem, part] for part in PARTS] for problem in PROBLEMS}
        table = pd.DataFrame.from_dict(rows, "index", columns=PARTS).rename_axis("problem")
        stop = table.any(axis=1) & pd.Series(PROBLEMS)
        return table.assign(**{"stops training": np.where(stop, "yes", "")})

    def examples(self) -> list[str]:
        """The first case of every problem that was found, in words."""
        first = {finding.problem: finding for finding in reversed(self.findings)}
        found = [first[problem] for problem in PROBLEMS if problem in first]
        words = [(f"{one.problem}:", one.where, one.detail) for one in found]
        return [" ".join(filter(None, of_one)) for of_one in words]


def check_data(config: DataConfig, grid: tuple[int, int]) -> Report:
    """Read every picture and every map of a data set.

    `grid` is the model's; maps are put on it as in training. Never raises for what is wrong with
    the data: that is in the report.
    """
    findings: list[Finding] = []
    parts: dict[str, list[Record]] = {}
    names: list[str] = []
    for part in PARTS:
        try:
            parts[part], names = read_records(config, part)
        except (OSError, ValueError) as error:
            findings.append(Finding("lists: cannot be used", part, "", str(error)))
    everything = [(part, record) for part, records in parts.items() for record in records]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda pair: _examine(*pair, config, grid), everything)
        examined = list(tqdm(found, "checking", len(everything), unit="picture", leave=False))
    findings += [finding for some, _ in examined for finding in some]
    findings += _same_files(everything, [digest for _, digest in examined])
    findings += _empty_classes(parts, names)
    without = {(f.part, f.where) for f in findings if f.problem.startswith("map: ")}
    mapped = {
        part: sum((part, _name(record)) not in without for record in records)
        for part, records in parts.items()
    }
    if config.maps == "none":
        mapped = dict.fromkeys(parts, 0)
    elif parts.get("train") and not mapped["train"]:
        findings.append(Finding("maps: no training picture has one", "train", config.maps))
    return Report(tuple(findings), _balance(parts, mapped, names))


def _name(record: Record) -> str:
    return str(record.image) if isinstance(record.image, Path) else f"picture {record.image_id}"


def _examine(
    part: str, record: Record, config: DataConfig, grid: tuple[int, int]
) -> tuple[list[Finding], str]:
    """What is wrong with one picture and its map, and a digest of its file."""
    say = partial(Finding, part=part, where=_name(record))
    digest = ""
    found: list[Finding] = []
    if isinstance(record.image, Path):
        try:
            picture = read_picture(record.image)
            digest = hashlib.md5(record.image.read_bytes()).hexdigest()
        except FileNotFoundError:
            return [say("picture: missing")], ""
        except OSError:
            return [say("picture: unreadable")], ""
        words = f"{picture.width} x {picture.height} pixels"
        if record.gaze and (picture.height, picture.width) != record.gaze[0].size:
            detail = f"{words}, its gaze {record.gaze[0].width} x {record.gaze[0].height}"
            found.append(say("picture: of another size than its gaze", detail=detail))
        if picture.height < config.image_size[0] and picture.width < config.image_size[1]:
            found.append(say("picture: smaller than the model's input", detail=words))
    height, width = record.size or (np.inf, np.inf)
    box = record.boxes.get("") or (record.human.corners if isinstance(record.human, Box) else None)
    # A pixel of rounding is allowed.
    if box and (min(box[:2]) < 0 or box[2] > width + 1 or box[3] > height + 1):
        detail = "{:g}, {:g} to {:g}, {:g}".format(*box) + f" in {width} x {height}"
        found.append(say("box: reaches out of the picture", detail=detail))
    outside = 0
    for look in record.gaze:
        x, y, _ = look.fixations.T
        outside += int(((x < 0) | (y < 0) | (x >= look.width) | (y >= look.height)).sum())
    if outside:
        found.append(say("gaze: fixations out of the picture", detail=str(outside)))
    if config.maps != "none":
        found += _about_map(say, record, config, grid)
    return found, digest


def _about_map(
    say: Callable[..., Finding], record: Record, config: DataConfig, grid: tuple[int, int]
) -> Iterator[Finding]:
    source = record.human
    if not source:
        yield say("map: none")
        return
    style = (config.sigma, config.sigma_unit, config.weight)
    try:
        _, known = human_map(source, record.size, grid, *style, shown=tuple(config.image_size))
    except (OSError, ValueError) as error:
        yield say("map: unreadable or of another size", detail=str(error))
        return
    if not known.any():
        yield say("map: zeros only")
    is_picture = isinstance(source, Path) and source.suffix.lower() != ".npy"
    if is_picture and is_in_colours(source):
        yield say("map: in colours, read as brightness", where=str(source))


def _same_files(
    everything: Sequence[tuple[str, Record]], digests: Sequence[str]
) -> Iterator[Finding]:
    """Pictures that are byte for byte another one, told by the worst that this means."""
    first: dict[str, tuple[str, Record]] = {}
    for (part, record), digest in zip(everything, digests, strict=True):
        other_part, other = first.setdefault(digest, (part, record))
        if not digest or other is record:
            continue
        detail = f"same as {_name(other)} in {other_part}"
        if other.label != record.label:
            problem = "picture: same file with another label"
        elif part != other_part and other_part == "train":
            problem = "picture: same file in train and in another part"
        else:
            problem = "picture: same file as another"
        yield Finding(problem, part, _name(record), detail)


def _empty_classes(parts: dict[str, list[Record]], names: Sequence[str]) -> Iterator[Finding]:
    for part in ("train", "test"):
        present = {record.label for record in parts.get(part, ())}
        problem = f"class: no {'training' if part == 'train' else 'test'} picture"
        for label, name in enumerate(names if present else ()):
            if label not in present:
                yield Finding(problem, part, name)


def _balance(
    parts: dict[str, list[Record]], mapped: dict[str, int], names: Sequence[str]
) -> pd.DataFrame:
    rows = {}
    for part, records in parts.items():
        counts = np.bincount([record.label for record in records], minlength=len(names))
        rows[part] = {
            "pictures": len(records),
            "with a map": mapped[part],
            "classes": int((counts > 0).sum()),
            "fewest a class": int(counts.min()),
            "median": float(np.median(counts)),
            "most a class": int(counts.max()),
        }
    return pd.DataFrame(list(rows.values()), index=pd.Index(rows, name="part"))
