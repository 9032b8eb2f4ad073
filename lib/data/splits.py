"""Which images train a model and which test it: made class by class, written and read as JSON.

The file is the one of the original experiment, `datasets/cub200_2011_dataset.json`. Its keys are
"train", "test" and "label_list", and "val" where validation images are named. A row of a part is
`["001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg", 0, "1"]`: the image relative to
the images folder, its label counted from 0 in label_list, and the name of its human map, which is
the file 1.jpg in the folder of maps.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from lib.files import make_folder, write_text

Part = Literal["train", "val", "test"]
PARTS = ("train", "val", "test")  # in this order, so that a leak runs from train to test
VALIDATING = 20  # images: with fewer, one is more than 5 points of validation accuracy
REMAKE = "correct it, or make the file again with `python -m lib split`"


class SplitError(ValueError):
    """A split that cannot be made, or a split file that cannot be used."""


@dataclass(frozen=True)
class Row:
    """One image of a split."""

    path: str  # relative to the images folder, with "/" between folders
    label: int  # position in label_list
    map_name: str  # name of the human map's file without ".jpg"; in CUB the image id


@dataclass(frozen=True)
class Split:
    """The images of each part and the names of the classes."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]
    label_list: tuple[str, ...]  # class names by label; in CUB the class folders
    val: tuple[Row, ...] = ()  # empty: none are named, the reader carves them from train


def per_class(
    rows: Sequence[Row],
    label_list: Sequence[str],
    share: float,
    shuffle: bool = False,
    seed: int = 0,
) -> Split:
    """Give the first `share` of each class's images to train and the others to test.

    A class of n images gives floor(n * share) of them to train, at least 1 and at most n - 1.
    With `shuffle` it is a random choice instead of the first images, drawn for each class by a
    generator of its own, seeded by `seed` and the name of the class folder: what happens in one
    class does not depend on the others. The rows of both parts keep their order.

    Raises SplitError for a share outside (0, 1), no rows, a class with fewer than two images, a
    label outside label_list, an image or a class name given twice, and a seed below 0.
    """
    if not 0 < share < 1:
        raise SplitError(f"the share N for training is {share}; give a part between 0 and 1.")
    if not rows:
        raise SplitError("there are no images to split; check the folder they are read from.")
    _check(rows, label_list)
    by_label = _by_label(rows)
    train: set[int] = set()
    for label, name in enumerate(label_list):
        images = by_label[label]
        if len(images) < 2:
            raise SplitError(
                f"class {name!r} has {len(images)} image(s), but train and test need one each; "
                "add images or leave the class out."
            )
        if shuffle:
            images = _shuffled(rows, images, seed)
        # 50 * 0.58 is 28.999999999999996 in floating point and means 29
        count = math.floor(len(images) * share + 1e-9)
        train.update(images[: min(max(count, 1), len(images) - 1)])
    return Split(*_divide(rows, train), tuple(label_list))


def by_flag(rows: Sequence[Row], label_list: Sequence[str], is_train: Sequence[bool]) -> Split:
    """Give the rows whose flag is true to train and the others to test: a published split.

    Raises SplitError when the lengths differ or a part is empty, and for a label outside
    label_list and an image or a class name given twice.
    """
    if len(rows) != len(is_train):
        raise SplitError(
            f"there are {len(rows)} images but {len(is_train)} train flags; "
            "give one flag for each image."
        )
    _check(rows, label_list)
    train, test = _divide(rows, {i for i, flag in enumerate(is_train) if flag})
    if not train or not test:
        raise SplitError(
            f"the flags leave {'test' if train else 'train'} without images ({len(rows)} images in "
            "all); flag some images as train and some not."
        )
    return Split(train, test, tuple(label_list))


def with_validation(split: Split, share: float, seed: int) -> Split:
    """The same split with validation images taken out of its train.

    round(share * n) of the n training images of each class are taken, at least 1 of 3 or more; one
    stays for training. So classes of fewer than 3 may have none, and the whole split may. They are
    drawn by a generator seeded by `seed` and the name of the class folder, so they are the same
    ones whatever other classes are present. The rows keep their order. With 0 none is taken.

    Raises SplitError for a share outside [0, 1), a seed below 0, and when the split names
    validation images already.
    """
    if split.val:
        raise SplitError(
            f"the split already names {len(split.val)} validation images; "
            "use them, or start from a split without."
        )
    if not 0 <= share < 1:
        raise SplitError(
            f"the validation share is {share}; give 0 for no validation images, or a part of the "
            "training images below 1."
        )
    held: set[int] = set()
    for images in _by_label(split.train).values():
        least = share > 0 and len(images) >= 3
        count = min(max(round(share * len(images)), least), len(images) - 1)
        held.update(_shuffled(split.train, images, seed)[:count])
    val, train = _divide(split.train, held)
    return replace(split, train=train, val=val)


def with_classes(split: Split, labels: Sequence[int]) -> Split:
    """The same split with the classes at these places of label_list alone; labels count anew.

    Raises SplitError where train or test has no image of them.
    """
    new = {label: place for place, label in enumerate(labels)}
    parts = {
        part: tuple(replace(r, label=new[r.label]) for r in getattr(split, part) if r.label in new)
        for part in PARTS
    }
    names = tuple(split.label_list[label] for label in labels)
    for part in ("train", "test"):
        if not parts[part]:
            raise SplitError(f"{part} has no image of {', '.join(names[:5])}; take others.")
    return Split(label_list=names, **parts)


def validation_in_words(count: int) -> str:
    """What an accuracy on so many validation images cannot say; "" where there are enough."""
    if count >= VALIDATING:
        return ""
    if count == 0:
        return (
            "there are no validation pictures: validation figures stay empty, and the best epoch "
            "is the last; a class gives one from 3 training pictures on"
        )
    only = f"{count} validation picture{'s' * (count > 1)}"
    return (
        f"{only}: one is {100 / count:.0f} points of accuracy, so validation figures and the "
        "choice of the best epoch say little; more pictures a class say more"
    )


def _by_label(rows: Sequence[Row]) -> dict[int, list[int]]:
    """Positions of the rows of each label, in their order."""
    found: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        found[row.label].append(i)
    return found


def _shuffled(rows: Sequence[Row], images: Sequence[int], seed: int) -> list[int]:
    """The positions of one class's images in random order."""
    if seed < 0:
        raise SplitError(f"seed is {seed}; give a whole number of 0 or more.")
    name = PurePosixPath(rows[images[0]].path).parent.name
    # CUB's folders start with the number of the class: "004.Groove_billed_Ani"
    number = re.match("[0-9]{1,9}", name)
    key = int(number.group()) if number else zlib.crc32(name.encode(errors="surrogateescape"))
    return np.random.default_rng([seed, key]).permutation(images).tolist()


def _divide(rows: Sequence[Row], chosen: set[int]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Rows at the chosen positions, and the others."""
    others = set(range(len(rows))) - chosen
    return tuple(tuple(rows[i] for i in sorted(which)) for which in (chosen, others))


def write_split(split: Split, path: str | Path) -> None:
    """Write a split as JSON; the folder is made where it is missing.

    Names that reading would take for something else (a backslash, "images" inside, a drive's
    letter) are kept by a further key, "exact".

    `path` holds the old file or the new one, never half: the text goes to a temporary name first.
    """
    content: dict[str, Any] = {
        part: [[row.path, row.label, row.map_name] for row in getattr(split, part)]
        for part in PARTS
        if part != "val" or split.val
    }
    content["label_list"] = split.label_list
    for row in (*split.train, *split.val, *split.test):
        names = row.path, row.map_name
        if _from_any_system(*names, split.label_list) != names:
            content["exact"] = True
    make_folder(Path(path).parent)
    write_text(Path(path), json.dumps(content, ensure_ascii=False, indent=4))


def read_split(path: str | Path) -> Split:
    """Read a split file, also one that was made elsewhere, and check all of it.

    Labels and map names may be numbers or text, a map name may end in ".jpg". label_list may be a
    list of names, {"0": name} or {name: 0}. Image paths may have "\\" between folders, and a prefix
    up to a folder "images" is cut off: "/data/CUB_200_2011/images/001.x/a.jpg" is "001.x/a.jpg".
    A path that starts with a class name is left alone, as a class may have a folder "images". With
    "exact": true (see `write_split`), all paths and map names are taken as they are. The text may
    be UTF-8 or UTF-16, with or without a byte order mark.

    Raises FileNotFoundError where there is no file, and SplitError with file, part, row (the first
    is row 1), value and remedy for a file that is no JSON, a missing key, a train or test without
    rows, a row that is not three values, a path or map name that leaves its folder, a label that
    label_list does not have, a class name given twice, and an image that occurs twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; make it with `python -m lib split`.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # brackets nested by the thousand
        raise SplitError(f"{path} is no JSON or is damaged ({error}); {REMAKE}.") from error
    try:
        return _parse(content)
    except SplitError as error:
        raise SplitError(f"{path}: {error}") from None


def _parse(content: Any) -> Split:
    keys = content if isinstance(content, dict) else {}
    for key in ("train", "test", "label_list"):
        if key not in keys:
            raise SplitError(f"the key {key!r} is missing; {REMAKE}.")
    names, exact = _class_names(content["label_list"]), content.get("exact") is True
    parts: dict[str, tuple[Row, ...]] = {}
    for part in PARTS:
        rows = content.get(part, ())
        if not isinstance(rows, list) and part in content:
            raise _not_expected(f"{part} is", rows, "a list of rows is")
        if not rows and part != "val":
            raise SplitError(f"{part} has no rows; {REMAKE}.")
        numbered = enumerate(rows, start=1)
        parts[part] = tuple(_row(r, f"row {n} of {part}", names, exact) for n, r in numbered)
    _refuse_repeats(parts)
    return Split(label_list=tuple(names), **parts)


def _not_expected(place: str, value: Any, wanted: str) -> SplitError:
    return SplitError(f"{place} {value!r:.200} where {wanted} expected; {REMAKE}.")


def _class_names(value: Any) -> list[str]:
    """Class names by label, from a list, {"0": name} or {name: 0}."""
    names = value
    if isinstance(value, dict):
        by_name = all(type(number) is int for number in value.values())
        pairs = [(number, name) for name, number in value.items()] if by_name else value.items()
        numbered = {str(number): name for number, name in pairs}
        wanted = [str(number) for number in range(len(value))]
        if numbered.keys() != set(wanted):
            all_numbers = f"the numbers 0 to {len(value) - 1}, each once, are"
            raise _not_expected("label_list is", value, all_numbers)
        names = [numbered[number] for number in wanted]
    is_list = isinstance(names, list) and len(names) > 0
    if not is_list or not all(isinstance(name, str) and name for name in names):
        raise _not_expected("label_list is", value, "a list of class names is")
    _refuse_same_names(names)
    return names


def _row(value: Any, where: str, label_list: Sequence[str], exact: bool) -> Row:
    if not isinstance(value, list) or len(value) != 3:
        raise _not_expected(f"{where} is", value, "[path, label, map name] is")
    path, label, map_name = value
    inside = path if isinstance(path, str) else ""
    name = str(map_name) if type(map_name) in (int, str) else ""
    if not exact:
        inside, name = _from_any_system(inside, name, label_list)
    # Also what an exact name means on this system: on Windows a backslash parts folders
    if not Path(inside).name or ".." in Path(inside).parts or Path(inside).anchor:
        raise _not_expected(f"{where} has the image", path, "a path inside the images folder is")
    if name == ".." or Path(name).name != name or not name:
        wanted = "a file name without folders, such as '1', is"
        raise _not_expected(f"{where} has the map name", map_name, wanted)
    return Row(inside, _label(label, where, label_list), name)


def _from_any_system(path: str, name: str, label_list: Sequence[str]) -> tuple[str, str]:
    """Path relative to the images folder and name of the map; "" where one leaves its folder."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    inside = parts
    if "images" in parts and parts[0] not in label_list:
        inside = parts[len(parts) - parts[::-1].index("images") :]  # after the last one
    # The drive letter of a file made on Windows may be cut off with the prefix, but not be left
    drive = re.compile("[A-Za-z]:").match
    if ".." in parts or not inside or inside[0].startswith("/") or drive(inside[0]):
        inside = ()
    name = name.removesuffix(".jpg")
    leaves = re.search(r"[/\\]", name) or name == ".." or drive(name)
    return "/".join(inside), "" if leaves else name


def _check(rows: Sequence[Row], label_list: Sequence[str]) -> None:
    _refuse_same_names(label_list)
    for number, row in enumerate(rows, start=1):
        _label(row.label, f"row {number} ({row.path})", label_list)
    _refuse_repeats({"the images": rows})


def _label(value: Any, where: str, label_list: Sequence[str]) -> int:
    """A label of label_list, given as a number or as text."""
    # No float and no bool: 1.0 and true are not what any tool writes, so the row is suspect
    if re.fullmatch("[0-9]{1,9}", str(value)) and int(value) < len(label_list):
        return int(value)
    raise SplitError(
        f"{where} has the label {value!r:.80} where a whole number from 0 to {len(label_list) - 1} "
        "is expected; correct the label, or add its class to label_list."
    )


def _refuse_same_names(names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise SplitError(
                f"label_list has the name {name!r} {count} times; give each class its own name."
            )


def _refuse_repeats(parts: Mapping[str, Sequence[Row]]) -> None:
    """One image twice, within a part or across parts."""
    seen: dict[str, tuple[str, int]] = {}
    for part, rows in parts.items():
        for number, row in enumerate(rows, start=1):
            first, earlier = seen.setdefault(row.path, (part, number))
            if (first, earlier) != (part, number):
                leak = f", a leak from {first} to {part}" if first != part else ""
                raise SplitError(
                    f"row {number} of {part} is the image {row.path!r}, as is row {earlier} of "
                    f"{first}{leak}; keep the image once."
                )
