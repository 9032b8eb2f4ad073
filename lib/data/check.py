"""Read a whole data set once and say what is wrong with it, before a night of training does.

`check_data` opens every picture and every human map of every part, in parallel, and looks for what
lies beside them and is not read. What would stop training is told apart from what would only make
it worse; every problem comes with a remedy.
"""

from __future__ import annotations

import os
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from lib.config import DataConfig, file_md5
from lib.data.dataset import DATA_SETS, read_records
from lib.data.maps import Box, human_map
from lib.data.pictures import is_in_colours, read_picture, unusual
from lib.data.sources import Record
from lib.data.splits import PARTS, VALIDATING
from lib.data.unread import UNREAD, left_out

UNUSUAL = {  # by the words of lib.data.pictures.unusual
    "large": "picture: larger than 50 million pixels",
    "transparent": "picture: transparent",
    "deep": "picture: more than 8 bits a channel",
    "frames": "picture: several frames",
}
FEW = 5  # training pictures of a class, below which little is learned of it
FEW_PICTURES = f"class: fewer than {FEW} training pictures"
FEW_TO_VALIDATE = f"validation: fewer than {VALIDATING} pictures"
NO_MAP_THERE = ("map: none", "map: zeros only", "map: unreadable or of another size")
NO_WEIGHTS = "weights: missing"
SAME_MAP = "map: same file as that of another picture"

# Every problem that is looked for, and its remedy: what training stops at, and what it does not.
STOPS = {
    "path: cannot be used": "correct the variable, or unset it",
    "lists: cannot be used": "do what the sentence says",
    "model: cannot be used": "set MODEL to one of those that `python -m lib models` lists",
    "weights: cannot be used": "set WEIGHTS to a file of this MODEL, or MODEL to that of the file",
    "picture: missing": "restore it; or delete what names it, and make the split again "
    "with `python -m lib split`",
    "picture: unreadable": "restore it from where it came from, or delete it",
    "picture: of another size than its gaze": "use the original picture, not a resized one",
    "map: unreadable or of another size": "make it again, in the proportions of its picture",
    "class: it is the only one": "sort the pictures into folders, one a class, of two or more",
    "maps: no training picture has one": "set MAPS to where they are, or to none",
}
WORTH_KNOWING = {
    # No fault of the data, and often the next step.
    NO_WEIGHTS: "`python -m lib weights` fetches timm's; or set WEIGHTS to a file",
    "class: no training picture": "move some there, or leave the class out",
    "class: no test picture": "move some there: nothing can be measured of it",
    FEW_PICTURES: "add some; what is measured of it means little",
    "class: called maps": "nothing, if it is one; human maps lie in class folders, or are named "
    "like one picture each",
    "class: names look the same": "rename one, or join them if they are one class",
    FEW_TO_VALIDATE: "add pictures: which epoch is best, they can hardly say; without any, it is "
    "the last",
    **{f"left out: {why}": remedy for why, remedy in UNREAD.items()},
    "picture: same file with another label": "keep the one whose class is right",
    "picture: same file in train and in another part": "keep one: the test is no test otherwise",
    "picture: same file as another": "keep one of them",
    "map: none": "nothing; these pictures take part with their label alone",
    "map: zeros only": "paint it, or delete it: it counts as none",
    "map: in colours, read as brightness": "save it in grey: a colour scale is no brightness",
    SAME_MAP: "give each picture its own",
    "box: reaches out of the picture": "correct the box; what is outside is cut",
    "gaze: fixations out of the picture": "nothing; they are left out",
    UNUSUAL["transparent"]: "nothing, if white is the right ground; else save it on another",
    UNUSUAL["deep"]: "nothing; 16 bits are divided by 65535",
    UNUSUAL["frames"]: "save the others as files: only the first is read",
    UNUSUAL["large"]: "make it smaller: it is slow to read",
    "picture: smaller than the model's input": "nothing; it is enlarged, and larger ones show more",
}
PROBLEMS = STOPS | WORTH_KNOWING


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    problem: str  # a key of PROBLEMS
    part: str  # train, val, test; "" of all, or of none
    where: str  # a file, a folder or a class
    detail: str = ""
    count: int = 1  # of files, where they are told together


@dataclass(frozen=True)
class Report:
    """What `check_data` found."""

    findings: tuple[Finding, ...]
    # a row a part: pictures, with a map, classes, pictures a class
    balance: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def stops_training(self) -> bool:
        return any(finding.problem in STOPS for finding in self.findings)

    @property
    def verdict(self) -> str:
        stopped = {finding.part for finding in self.findings if finding.problem in STOPS}
        if not stopped:
            later = any(finding.problem == NO_WEIGHTS for finding in self.findings)
            return f"training can start{', once the weights are there' * later}"
        return "evaluation would fail" if stopped == {"test"} else "training would fail"

    def details(self) -> pd.DataFrame:
        """One row a finding: problem, part, where, detail, count."""
        columns = ["problem", "part", "where", "detail", "count"]
        return pd.DataFrame(list(self.findings), columns=columns)

    def problems(self) -> list[dict[str, Any]]:
        """What was found, in the order of PROBLEMS, each as plain values for JSON.

        problem, stops_training, count, by_part (parts in which it was found), examples (up to 5),
        remedy.
        """
        of: dict[str, list[Finding]] = defaultdict(list)
        for finding in self.findings:
            of[finding.problem].append(finding)
        found = []
        for problem in filter(of.get, PROBLEMS):
            by_part: Counter[str] = Counter()
            for one in of[problem]:
                by_part[one.part] += one.count
            words = [": ".join(filter(None, (one.where, one.detail))) for one in of[problem]]
            row = {"problem": problem, "stops_training": problem in STOPS}
            row |= {"count": by_part.total()}
            row |= {"by_part": {part: by_part[part] for part in PARTS if by_part[part]}}
            found.append(row | {"examples": words[:5], "remedy": PROBLEMS[problem]})
        return found

    def to_plain(self) -> dict[str, Any]:
        """The report for scripts: can_train, problems, and a row a part in balance."""
        rows = self.balance.reset_index().to_dict("records") if len(self.balance) else []
        balance = [{key.replace(" ", "_"): value for key, value in row.items()} for row in rows]
        problems = self.problems()
        return {"can_train": not self.stops_training, "problems": problems, "balance": balance}

    def in_words(self, root: Path) -> str:
        """The report for people, in lines of up to 96 characters; paths start below `root`."""
        problems = self.problems()
        lines = []
        titles = {True: "stops training (in test: its evaluation)", False: "worth knowing"}
        for stop, title in titles.items():
            some = [row for row in problems if row["stops_training"] == stop]
            lines += [title, *(_in_lines(row, root) for row in some), ""] if some else []
        absent: dict[str, list[str]] = defaultdict(list)
        found = {row["problem"] for row in problems}
        for kind, _, name in (problem.partition(": ") for problem in PROBLEMS):
            if f"{kind}: {name}" not in found and kind != "left out":
                absent[kind].append(name)
        names = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in absent.items())
        lines += [_wrapped(f"looked for and not found: {names}", "", "  "), ""]
        return "\n".join([*lines, self.balance.to_string() if len(self.balance) else "no pictures"])


def _in_lines(row: dict[str, Any], root: Path) -> str:
    """A problem: how often and where, two examples, what to do."""
    parts = ", ".join(f"{part} {count}" for part, count in row["by_part"].items())
    first = f"{row['count']:>6}  {row['problem']}{f' ({parts})' * bool(parts)}"
    examples = [words.replace(f"{root}{os.sep}", "") for words in row["examples"][:2]]
    more = [*filter(None, examples), f"to do: {row['remedy']}"]
    return "\n".join([first, *(_wrapped(words, " " * 8, " " * 10) for words in more)])


def _wrapped(text: str, first: str, later: str) -> str:
    whole = {"break_long_words": False, "break_on_hyphens": False}
    return fill(text, 96, initial_indent=first, subsequent_indent=later, **whole)


def check_data(config: DataConfig, grid: tuple[int, int]) -> Report:
    """Read every picture and every map of a data set.

    `grid` is the model's; maps are put on it as in training. Never raises for what is wrong with
    the data: that is in the report.
    """
    with warnings.catch_warnings():  # of libraries about single files; the report tells what counts
        warnings.simplefilter("ignore")
        return _checked(config, grid)


def _checked(config: DataConfig, grid: tuple[int, int]) -> Report:
    parts: dict[str, list[Record]] = {}
    names: list[str] = []
    failed: dict[str, list[str]] = defaultdict(list)
    for part in PARTS:
        try:
            parts[part], names = read_records(config, part)
        except Exception as error:  # whatever a damaged file makes its reader raise
            failed[str(error) or type(error).__name__].append(part)
    findings = [
        Finding("lists: cannot be used", of[0] if len(of) == 1 else "", "", text)
        for text, of in failed.items()
    ]
    everything = [(part, record) for part, records in parts.items() for record in records]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda pair: _examine(*pair, config, grid), everything)
        examined = list(tqdm(found, "checking", len(everything), unit="picture", leave=False))
    for some, _, _ in examined:
        findings += some
    findings += _same_files(everything, [digest for _, digest, _ in examined])
    findings += _same_maps(everything, [digest for _, _, digest in examined])
    findings += _about_classes(parts, names)
    without = {(f.part, f.where) for f in findings if f.problem in NO_MAP_THERE}
    mapped = {
        part: sum((part, _name(record)) not in without for record in records)
        for part, records in parts.items()
    }
    if config.maps == "none":
        mapped = dict.fromkeys(parts, 0)
    elif parts.get("train") and not mapped["train"]:
        maps = str(config.maps_dir or config.maps)
        findings.append(Finding("maps: no training picture has one", "train", maps))
    return Report((*findings, *_left_out(config)), _balance(parts, mapped, names))


def _left_out(config: DataConfig) -> Iterator[Finding]:
    listing = None
    if config.name in DATA_SETS:
        try:
            listing = DATA_SETS[config.name].pictures(config.root)
        except Exception:  # told by the lists
            listing = None
    for one in left_out(config, listing):
        yield Finding(f"left out: {one.problem}", "", str(one.path), one.detail, one.count)


def _name(record: Record) -> str:
    return str(record.image) if isinstance(record.image, Path) else f"picture {record.image_id}"


def _examine(
    part: str, record: Record, config: DataConfig, grid: tuple[int, int]
) -> tuple[list[Finding], str, str]:
    """What is wrong with one picture and its map, and digests of both files; "" where none is."""
    say = partial(Finding, part=part, where=_name(record))
    digest = of_map = ""
    found: list[Finding] = []
    if isinstance(record.image, Path):
        try:
            picture = read_picture(record.image)
            digest = file_md5(record.image)
            found += [
                say(UNUSUAL[what], detail=words) for what, words in unusual(record.image).items()
            ]
        except FileNotFoundError:
            return [say("picture: missing")], "", ""
        except Exception as error:  # whatever it is, the others are read
            words = str(error).removeprefix(f"{record.image} ") or type(error).__name__
            return [say("picture: unreadable", detail=words)], "", ""
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
        about = list(_about_map(say, record, config, grid))
        found += about
        if isinstance(record.human, Path) and not {one.problem for one in about} & {*NO_MAP_THERE}:
            of_map = file_md5(record.human)
    return found, digest, of_map


def _about_map(
    say: Callable[..., Finding], record: Record, config: DataConfig, grid: tuple[int, int]
) -> Iterator[Finding]:
    source = record.human
    if not source:
        yield say("map: none")
        return
    style = (config.sigma, config.sigma_unit, config.weight)
    is_picture = isinstance(source, Path) and source.suffix.lower() != ".npy"
    try:
        _, known = human_map(source, record.size, grid, *style, shown=tuple(config.image_size))
        in_colours = is_picture and is_in_colours(source)
    except Exception as error:
        words = str(error) or type(error).__name__
        yield say("map: unreadable or of another size", detail=words)
        return
    if not known.any():
        yield say("map: zeros only")
    if in_colours:
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


def _same_maps(
    everything: Sequence[tuple[str, Record]], digests: Sequence[str]
) -> Iterator[Finding]:
    """Map files that are byte for byte that of another picture."""
    first: dict[str, Record] = {}
    for (part, record), digest in zip(everything, digests, strict=True):
        other = first.setdefault(digest, record)
        if digest and other is not record:
            yield Finding(SAME_MAP, part, _name(record), f"as {_name(other)}")


def _about_classes(parts: dict[str, list[Record]], names: Sequence[str]) -> Iterator[Finding]:
    """Classes and a validation part of few pictures or none; names that cannot be told apart."""
    for part, word in (("train", "training"), ("test", "test")):
        counts = Counter(record.label for record in parts.get(part, ()))
        for label, name in enumerate(names if counts else ()):
            if not counts[label]:
                yield Finding(f"class: no {word} picture", part, name)
            elif part == "train" and counts[label] < FEW:
                yield Finding(FEW_PICTURES, part, name, f"{counts[label]} of them")
    if "val" in parts and len(parts["val"]) < VALIDATING:
        yield Finding(FEW_TO_VALIDATE, "val", "", f"{len(parts['val'])} of them")
    if len(names) == 1:
        yield Finding("class: it is the only one", "", names[0])
    first: dict[str, str] = {}
    for name in names:
        if name.lower() == "maps":
            yield Finding("class: called maps", "", name)
        seen = re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name)).casefold()
        other = first.setdefault(seen, name)
        if other != name:
            yield Finding("class: names look the same", "", name, f"as {other}")


def _balance(
    parts: dict[str, list[Record]], mapped: dict[str, int], names: Sequence[str]
) -> pd.DataFrame:
    rows = {}
    for part, records in parts.items():
        counts = np.bincount([record.label for record in records], minlength=max(len(names), 1))
        rows[part] = {
            "pictures": len(records),
            "with a map": mapped[part],
            "classes": int((counts > 0).sum()),
            "fewest a class": int(counts.min()),
            "median": float(np.median(counts)),
            "most a class": int(counts.max()),
        }
    return pd.DataFrame(list(rows.values()), index=pd.Index(rows, name="part"))
