"""Words of a sweep's settings, and what they mean in a model of so many blocks and heads."""

from __future__ import annotations

import math
import re
from dataclasses import asdict

from lib.config import HumanConfig, Sweep
from lib.edit import Layout, resolve_heads
from lib.training.learning import learning_blocks


def refuse_unknown_words(sweep: Sweep) -> None:
    """ValueError for a setting without a value, an unknown word, or an endless lam."""
    for name, values in asdict(sweep).items():
        if not values and name != "trainable":
            raise ValueError(f"{name} has no value; name at least one")
        for value in values:
            if name in ("loss", "offset", "maps", "noise"):
                HumanConfig(**{name: value})  # which says what is known
            if name == "lam" and not math.isfinite(value):
                raise ValueError(f"lam is {value}; it must be a number, and not below 0")


def supervised_blocks(word: str, layout: Layout) -> str | tuple[int, ...]:
    """Supervised blocks as `HumanConfig` has them; a word where one means the same."""
    wanted = layout.resolve(_as_indices(word))
    words = ("last", "all", "last2", "last4")
    return next((same for same in words if layout.resolve(same) == wanted), wanted)


def supervised_heads(word: str, count: int) -> tuple[str | tuple[int, ...], str]:
    """Supervised heads as `HumanConfig` has them ("all" where each is named), and their word."""
    if word == "mean":
        return word, word
    everyone = tuple(range(count))
    words = {"all": everyone, "half": everyone[: max(1, count // 2)], "one": (0,)}
    wanted = words.get(word, _as_indices(word))
    if isinstance(wanted, str):
        raise ValueError(f'heads is "{word}"; use all, half, one, mean, or indices such as 0,2')
    wanted = resolve_heads(wanted, count)
    short = next((w for w, heads in words.items() if heads == wanted), as_text(wanted))
    return "all" if wanted == everyone else wanted, short


def _as_indices(word: str) -> str | tuple[int, ...]:
    """ "8,9" as (8, 9); another word as it is."""
    is_list = re.fullmatch(r"-?\d+(,-?\d+)*", word)
    return tuple(int(part) for part in word.split(",")) if is_list else word


def learning_part(word: str | int, depth: int) -> str | int:
    """The part that learns as `TrainConfig` has it, "last_block" where that is the one block."""
    part = int(word) if str(word).isdecimal() else word
    learning_blocks(part, depth)  # ValueError for an unknown word or number
    return "last_block" if part == 1 else part


def as_text(value: str | tuple[int, ...]) -> str:
    """A word as it is, or indices as they are named on the command line."""
    return value if isinstance(value, str) else ",".join(map(str, value))
