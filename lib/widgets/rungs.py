"""In which blocks of the model an edit is made: the ladder, a hint, and a choice to begin with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lib.edit import LOW, Layout
from lib.widgets.controller import EditorController
from lib.widgets.history import Work
from lib.widgets.session import blocks_in_words

RUNGS = ("last", "last2", "all")  # blocks that are offered, and tried for a hint
# With more cells, all rows are not tried unasked: each of them is edited, which takes as many
# searches as there are tokens. (ViT-S/14, 32 x 32 cells, a CPU: 17 s.)
MOST_ROWS = 1000
WORTH = 0.1  # change of a probability from which on another part of the model is worth a word
PROBED = 0.1  # of the cells, those that are looked at most: painted low to try a part of the model


def blocks_apart(layout: Layout, queries: str) -> list[str]:
    """Those of `RUNGS` that are different blocks in a model; without a class token, few are."""
    # Of several words for the same blocks "last" is the one, then "all".
    found = {layout.resolve(name, queries): name for name in ("last2", "all", "last")}
    return [name for name in RUNGS if name in found.values()]


def climb(controller: EditorController) -> list[dict[str, Any]]:
    """The same edit in more and more of the model, whatever its own scope is, a row a rung.

    The last rung, all rows, is left out on more than `MOST_ROWS` cells.

    Each row: rung (no edit at first), prediction (class name), probability (of the prediction),
    p_true (of the true class).
    """
    work, session, rows = controller.work, controller.session, []
    works = {"no edit": replace(work, strength=0.0)}
    works |= {
        rung: replace(work, scope=work.scope | scope)
        for rung, scope in session.layout.ladder.items()
        if scope["queries"] == "cls" or controller.own.size <= MOST_ROWS
    }
    if session.layout.pooled:
        works = {"pooling" if rung == "last block" else rung: one for rung, one in works.items()}
    for rung, one in works.items():
        found = controller.outcome_of(one).probabilities
        best, true = int(found.argmax()), float(found[controller.shown.label])
        row = {"rung": rung, "prediction": session.classes[best]}
        rows.append(row | {"probability": float(found[best]), "p_true": true})
    return rows


def blocks_to_begin_with(controller: EditorController) -> str:
    """The last block, or all where painting does more there.

    Tried by painting low what the model looks at most. An edit of the last block changes little
    where the blocks before have copied the answer into the class token.
    """
    if len(blocks_apart(controller.session.layout, controller.scope["queries"])) == 1:
        return "last"
    own = controller.own
    most = own >= np.quantile(own, 1 - PROBED)
    tried = replace(controller.work, painted=np.where(most, LOW, np.nan))
    last, everywhere = (_change(controller, in_blocks(tried, name)) for name in ("last", "all"))
    return "last" if last >= min(WORTH, everywhere / 2) else "all"


def wider(controller: EditorController) -> tuple[str, str]:
    """Blocks in which the same edit would do more, and a sentence; both "" where there are none.

    To do more is to move some probability by `WORTH` more.
    """
    here, layout = controller.scope["blocks"], controller.session.layout
    rungs = blocks_apart(layout, controller.scope["queries"])
    if here == "last2" and here not in rungs:
        here = "all"
    if controller.edit().is_empty or here not in rungs or len(rungs) == 1:
        return "", ""
    works = {blocks: in_blocks(controller.work, blocks) for blocks in rungs}
    done = {blocks: _change(controller, work) for blocks, work in works.items()}
    best = max(done, key=done.get)
    if done[best] < done[here] + WORTH:
        return "", ""
    there, now = (
        float(controller.outcome_of(works[blocks]).probabilities[controller.shown.label])
        for blocks in (best, here)
    )
    return best, (
        f"In {blocks_in_words(layout, best)} the same edit does more: the true class gets "
        f"{there:.2f} there, "
        f"{now:.2f} here."
    )


def in_blocks(work: Work, blocks: str) -> Work:
    """The same work in other blocks."""
    return replace(work, scope=work.scope | {"blocks": blocks})


def _change(controller: EditorController, work: Work) -> float:
    """How far an edit moves the probability that it moves most."""
    before, after = controller.outcome()[0], controller.outcome_of(work)
    return float(np.abs(after.probabilities - before.probabilities).max())
