"""Names of classes: how they are shown, and whether those of data are those of a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from lib.files import one_form


class OtherClasses(ValueError):
    """The classes of a data set are not those that a model tells apart."""


def shown_names(folders: Sequence[str]) -> list[str]:
    """The names of classes as people read them: 001.Groove_billed_Ani is "Groove billed Ani".

    Folders that would share a name keep their own.
    """
    shown = [re.sub(r"^\d+\.(?=\D)", "", one_form(name)).replace("_", " ") for name in folders]
    while len(set(shown)) < len(shown):
        twice = {name for name, count in Counter(shown).items() if count > 1}
        shown = [own if name in twice else name for own, name in zip(folders, shown, strict=True)]
    return shown


def chosen_classes(folders: Sequence[str], asked: str) -> list[int]:
    """Labels of the classes that `asked` names, such as "21-40" or "1-20,35", in ascending order.

    The number of a class is the one that its folder's name begins with, where all have one of their
    own, as in CUB ("021.Eastern_Towhee", and so in its classes.txt); else its place, from 1.

    Raises:
        ValueError: neither numbers nor ranges, or a class that is not there.
    """
    found = [re.match(r"(\d+)\.", name) for name in folders]
    numbers = [int(one[1]) for one in found if one]
    if len({*numbers}) < len(folders):
        numbers = list(range(1, len(folders) + 1))
    wanted: set[int] = set()
    for part in asked.replace(" ", "").split(","):
        ends = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if not ends or int(ends[2] or ends[1]) < int(ends[1]):
            raise ValueError(
                f"classes is {asked!r}; give numbers and ranges, such as 21-40 or 1-20,35"
            )
        wanted.update(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    if missing := sorted(wanted - {*numbers}):
        raise ValueError(
            f"classes is {asked!r}, but there is no class {missing[0]}; the data has "
            f"{len(folders)} of the numbers {min(numbers)} to {max(numbers)}"
        )
    return [label for label, number in enumerate(numbers) if number in wanted]


def labels_among(known: Sequence[str], classes: Sequence[str]) -> list[int]:
    """For every label that counts in `classes` the one that counts in `known`, by name.

    OtherClasses where the names are not the same.
    """
    found = other_classes(known, classes)
    if found:
        raise OtherClasses(
            f"the model {found}; use the data that it was trained on, or train again (--overwrite, "
            "or another RUNS_DIR)"
        )
    place = {one_form(name): label for label, name in enumerate(known)}
    return [place[one_form(name)] for name in classes]


def other_classes(known: Sequence[str], classes: Sequence[str]) -> str | None:
    """How the classes of a data set differ from those of a model, in words; None: in order only."""
    ours, theirs = (Counter(map(one_form, names)) for names in (known, classes))
    differing = {"new": [*(theirs - ours)], "gone": [*(ours - theirs)]}
    told = "; ".join(
        f"{what}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
        for what, names in differing.items()
        if names
    )
    if not told:
        return None
    return f"was trained for {len(known)} classes and the data has {len(classes)} ({told})"


def refuse_other_labels(known: Sequence[str] | None, classes: Sequence[str]) -> None:
    """OtherClasses unless the labels of a data set count in `known`, the classes of a model."""
    if known is None or [*map(one_form, known)] == [*map(one_form, classes)]:
        return
    found = other_classes(known, classes) or "has its classes in another order"
    raise OtherClasses(
        f"the model {found}; make the data set with `run.dataset(...)` of the model's run, which "
        "goes by the names"
    )
