"""The command that says which models work, and what decides in each."""

from __future__ import annotations

from fnmatch import fnmatchcase
from textwrap import fill
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from lib.model.families import Family

# Each command imports what it needs itself: help and downloads do not wait for PyTorch.


def models(pattern: tyro.conf.Positional[str | None] = None) -> None:
    """Which models of timm work, what decides in each, and which are refused and why.

    Args:
        pattern: of timm names, such as "*dinov3*": each of them; families when left out.
    """
    from lib.model.families import FAMILIES

    if pattern is not None:
        return _one_by_one(pattern)
    at_once = [one for one in FAMILIES if one.decides and one.trained]
    on_demand = [one for one in FAMILIES if one.decides and not one.trained]
    print("What decides, tokens before the patches, positions; an example:\n")
    for family in at_once:
        _print_family(family)
    print('\nAveraged by timm; the class row decides with overrides {"global_pool": "token"}:\n')
    for family in on_demand:
        _print_family(family)
    print("\nRefused, as no row decides alone or none can be edited:\n")
    for family in FAMILIES:
        if not family.decides:
            _print_refused(family)
    print('\nOne by one: python -m lib models "*dinov3*"')


def _print_family(family: Family) -> None:
    prefix = " or ".join(map(str, family.prefix))
    print(f"{family.title:32} {family.decides}, {prefix}, {family.positions}; {family.example}")
    for told in filter(None, (family.average, family.note)):
        print(_below(told))


def _print_refused(family: Family) -> None:
    from lib.model.families import why_refused

    print(f"{family.title}: {', '.join(family.names)}")
    # The way out is the same for all, and stands in the headline of the page.
    print(_below(why_refused(family.example).partition("; use a model of")[0]))
    if family.note:
        print(_below(family.note))


def _below(text: str) -> str:
    return fill(text, 100, initial_indent=" " * 4, subsequent_indent=" " * 4)


def _one_by_one(pattern: str) -> None:
    """Each name as soon as it is known: a large model takes half a second."""
    import timm

    from lib.model.families import family_of, why_refused

    names = [*timm.list_models(), *timm.list_pretrained()] if "." in pattern else timm.list_models()
    names = [name for name in names if fnmatchcase(name, pattern)]
    if not names:
        raise ValueError(
            f'timm {timm.__version__} has no model {pattern}; for a part of a name put stars around '
            f'it, as in "*dinov3*"'
        )
    works = 0
    for name in names:
        family, reason = family_of(name), why_refused(name)
        works += not reason
        if not reason:
            print(f"{name}: {family.decides} ({family.title})", flush=True)
        else:
            print(f"{name}: refused\n{_below(reason)}", flush=True)
    print(f"\n{works} of {len(names)} work")
