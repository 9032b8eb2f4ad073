"""The command that says which models work, and what decides in each."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from textwrap import fill
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from lib.model.families import Family

# Each command imports what it needs itself: help and downloads do not wait for PyTorch.


def models(pattern: tyro.conf.Positional[str | None] = None) -> None:
    """Which models of timm work, what decides in each, and which are refused and why.

    Families are those of the newest timm; an older one may lack some: `models PATTERN` asks yours.

    Args:
        pattern: of timm names, such as "*dinov3*": each of them; families when left out.
    """
    from lib.model.families import FAMILIES

    if pattern is not None:
        return _one_by_one(pattern)
    print("Works: what decides, tokens before the patches, positions; an example\n")
    for family in FAMILIES:
        if family.decides and family.trained:
            _print_family(family)
    print('\nWorks with global_pool="token"; as timm makes it, it averages the patches\n')
    for family in FAMILIES:
        if family.decides and not family.trained:
            _print_family(family)
    print("\nRefused\n")
    for family in FAMILIES:
        if not family.decides:
            _print_refused(family)
    print('\nOne by one: python -m lib models "*dinov3*"')


def _print_family(family: Family) -> None:
    prefix = " or ".join(map(str, family.prefix))
    print(f"{family.title:27} {family.decides}, {prefix}, {family.positions}; {family.example}")
    for told in filter(None, (family.average, family.note)):
        print(_below(told))


def _print_refused(family: Family) -> None:
    import timm

    from lib.model.families import why_refused

    if family.example not in timm.list_models():  # of another version
        return
    print(fill(f"{family.title}: {', '.join(family.names)}", 100, subsequent_indent=" " * 8))
    reason = why_refused(family.example).partition("; ")[0]  # the way out is this list
    for told in filter(None, (reason, family.note)):
        print(_below(told))


def _below(text: str) -> str:
    return fill(text, 100, initial_indent=" " * 4, subsequent_indent=" " * 4)


def _one_by_one(pattern: str) -> None:
    """Each name as soon as it is known: a large model takes half a second."""
    import timm

    from lib.model.families import advice, family_of, why_refused

    known = [*timm.list_models(), *timm.list_pretrained()] if "." in pattern else timm.list_models()
    names = [name for name in known if fnmatchcase(name, pattern)]
    if not names:
        raise ValueError(
            f"timm {timm.__version__} has no model {pattern}; for a part of a name put stars "
            'around it: "*dinov3*"'
        )
    told: dict[str, str] = {}  # reasons, and who was refused with them first
    counts = Counter()
    for name in names:
        family, reason = family_of(name), why_refused(name)
        if not reason:
            counts["work"] += 1
            print(f"{name}: {family.decides} ({family.title})", flush=True)
        elif family and family.decides:
            counts['work with global_pool="token"'] += 1
            print(f'{name}: {family.decides} with global_pool="token" ({family.title})', flush=True)
        else:
            counts["are refused"] += 1
            reason += advice(name)
            same = told.setdefault(reason, name)
            print(f"{name}: refused{f', as {same}' * (same != name)}", flush=True)
            if same == name:
                print(_below(reason), flush=True)
    print(f"\nof {len(names)}, " + ", ".join(f"{count} {what}" for what, count in counts.items()))
