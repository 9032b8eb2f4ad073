"""One rule for many pictures: how many predictions an edit breaks or mends, beside its controls.

What an edit does to one picture proves little. Here the same rule edits a set of pictures, and so
do controls of the same size: another picture's cells and values, the same ones at random places,
and, for a map of people, the mean of all maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from lib.data.dataset import BirdDataset, decoy_cover
from lib.edit import LOW, AttentionEdit, as_odds
from lib.model.predict import tf32_products
from lib.model.vit import SigmoidViT

CONTROLS = ("another image's", "random cells", "mean map")
DEFAULT_SCOPE = {"blocks": "last", "heads": "mean", "offset": "centred", "strength": 1.0}
PER_BATCH = 16  # pictures, after which progress is told
DECOY = 0.1  # share of a cell that the decoy covers, from which on it is painted


class Wanted(NamedTuple):
    """What a rule asks of one picture."""

    mask: np.ndarray  # bool [P]
    values: np.ndarray  # float32 [P] in [0, 1]


@dataclass(frozen=True)
class Rule:
    """What is asked of any picture of a data set."""

    name: str
    wanted: Callable[[int], Wanted | None]  # of a picture, by number; None: nothing can be asked
    mean: Wanted | None = None  # where it is people's map: their mean map as the same edit


def make_rules(dataset: BirdDataset, edit: AttentionEdit | None = None) -> dict[str, Rule]:
    """The rules that make sense on a data set, by name.

    "border to 0": the outermost ring of cells. "decoy to 0": of drawn birds. "outside the box low":
    `LOW` where no part of the box is. "people's map": their distribution (`lib.edit.as_odds`).
    "this edit": the cells and values of `edit`, on `[gh, gw]`.
    """
    rows, columns = dataset.grid
    ring = np.zeros(dataset.grid, dtype=bool)
    ring[[0, -1]] = ring[:, [0, -1]] = True
    border = Wanted(ring.ravel(), np.zeros(ring.size, dtype=np.float32))
    found = [Rule("border to 0", lambda _: border)]
    decoys, cover = decoy_cover(dataset), dataset.cover()
    if decoys is not None:
        on_decoy = [Wanted(one.numpy() > DECOY, np.zeros(len(one), np.float32)) for one in decoys]
        found.append(Rule("decoy to 0", lambda k: on_decoy[k] if on_decoy[k].mask.any() else None))
    if cover is not None:
        outside = cover.numpy() == 0
        low = np.full(rows * columns, LOW, dtype=np.float32)
        found.append(
            Rule(
                "outside the box low",
                lambda k: Wanted(outside[k], low) if outside[k].any() else None,
            )
        )
    human, valid = (one.flatten(1) for one in dataset.maps)
    weights = torch.where(valid, human.float(), torch.nan).numpy()
    maps = [one if np.nansum(one) > 0 else None for one in weights]
    known = [one for one in maps if one is not None]
    if known:
        found.append(people_rule("people's map", maps, np.nanmean(known, axis=0), as_odds))
    if edit is not None:
        same = Wanted(edit.mask.numpy().ravel(), edit.values.float().numpy().ravel())
        found.append(Rule("this edit", lambda _: same))
    return {rule.name: rule for rule in found}


def people_rule(
    name: str,
    maps: Sequence[np.ndarray | None],
    mean: np.ndarray,
    as_values: Callable[[np.ndarray], np.ndarray],
) -> Rule:
    """A rule that asks for maps of people, `[P]` each, turned into values by `as_values`."""

    def wanted(weights: np.ndarray | None) -> Wanted | None:
        if weights is None:
            return None
        known = ~np.isnan(weights)
        return Wanted(known, np.where(known, as_values(weights), 0).astype(np.float32))

    return Rule(name, lambda index: wanted(maps[index]), wanted(mean))


def edit_many(
    model: SigmoidViT,
    dataset: BirdDataset,
    rules: Sequence[Rule],
    indices: Sequence[int] | None = None,
    scopes: Mapping[str, Mapping[str, object]] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], bool | None] = lambda done, of: None,
) -> pd.DataFrame:
    """What each rule and its controls make of each picture.

    Args:
        model: on the data set's grid. dataset: without augmentation.
        indices: which pictures; all by default.
        scopes: by name, what an `AttentionEdit` takes beside its cells; `DEFAULT_SCOPE` by default.
        seed: of the random cells, and of who gets whose.
        progress: called with the pictures that are done and all; to return True ends it there.

    Returns:
        one row a picture, rule, control ("own" is the rule itself) and scope: index, rule, control,
        scope, predicted_before, predicted, label, p_before and p_true (of the true class).
        A picture for which a rule can ask nothing has no row.
    """
    indices = list(range(len(dataset)) if indices is None else map(int, indices))
    scopes = {"last block": DEFAULT_SCOPE} if scopes is None else scopes
    rng = np.random.default_rng(seed)
    asked = {rule.name: [rule.wanted(index) for index in indices] for rule in rules}
    order = {name: _somebody_elses(wanted, rng) for name, wanted in asked.items()}
    found = []
    with torch.inference_mode(), tf32_products(False):
        for start in range(0, len(indices), PER_BATCH):
            if progress(start, len(indices)):
                break
            places = range(start, min(start + PER_BATCH, len(indices)))
            some = _Batch(model, dataset, [indices[place] for place in places])
            for rule in rules:
                own = [asked[rule.name][place] for place in places]
                others = [asked[rule.name][order[rule.name][place]] for place in places]
                jobs = {"own": own}
                if any(other is not mine for other, mine in zip(others, own, strict=True)):
                    jobs[CONTROLS[0]] = others  # else the rule asks the same of every picture
                jobs[CONTROLS[1]] = [_scattered(wanted, rng) for wanted in own]
                if rule.mean is not None:
                    jobs[CONTROLS[2]] = [w and rule.mean for w in own]
                for scope, fields in scopes.items():
                    for control, wanted in jobs.items():
                        rows = some.edited(wanted, fields)
                        found.append(rows.assign(rule=rule.name, control=control, scope=scope))
        else:
            progress(len(indices), len(indices))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def count_changes(frame: pd.DataFrame) -> pd.DataFrame:
    """`edit_many` in one row a rule, control and scope, in their order.

    Columns: pictures, right (before), right_to_wrong, wrong_to_right, changed (predictions), and
    p_change (mean change of the true class's probability).
    """
    was, now = (frame[name] == frame["label"] for name in ("predicted_before", "predicted"))
    frame = frame.assign(
        right=was,
        right_to_wrong=was & ~now,
        wrong_to_right=~was & now,
        changed=frame["predicted_before"] != frame["predicted"],
        p_change=frame["p_true"] - frame["p_before"],
    )
    grouped = frame.groupby(["rule", "control", "scope"], sort=False)
    counts = grouped[["right", "right_to_wrong", "wrong_to_right", "changed"]].sum()
    counts.insert(0, "pictures", grouped.size())
    return counts.assign(p_change=grouped["p_change"].mean()).reset_index()


class _Batch:
    """Some pictures; the tokens that enter a block are computed once for all edits of it."""

    def __init__(self, model: SigmoidViT, dataset: BirdDataset, indices: list[int]) -> None:
        self._model = model.eval()
        items = [dataset[index] for index in indices]
        self._images = torch.stack([item["image"] for item in items]).to(next(model.parameters()))
        self._labels = np.array([item["label"] for item in items])
        self._indices = np.array(indices)
        self._tokens: dict[int, torch.Tensor] = {}
        self._before = self._probabilities(model.depth - 1, None)

    def edited(self, wanted: list[Wanted | None], scope: Mapping[str, object]) -> pd.DataFrame:
        patches = self._model.grid[0] * self._model.grid[1]
        nothing = Wanted(np.zeros(patches, dtype=bool), np.zeros(patches, dtype=np.float32))
        masks, values = zip(*(one or nothing for one in wanted), strict=True)
        edit = AttentionEdit(np.stack(masks), np.stack(values), **scope)
        after = self._probabilities(self._model.layout.resolve(edit.blocks, edit.queries)[0], edit)
        there = np.array([one is not None for one in wanted])
        places = np.arange(len(there)), self._labels
        columns = {
            "index": self._indices,
            "label": self._labels,
            "predicted_before": self._before.argmax(-1),
            "predicted": after.argmax(-1),
            "p_before": self._before[places],
            "p_true": after[places],
        }
        return pd.DataFrame(columns)[there]

    def _probabilities(self, first: int, edit: AttentionEdit | None) -> np.ndarray:
        if first not in self._tokens:
            self._tokens[first] = self._model.tokens(self._images, first)
        blocks = self._model.depth - first
        scores = self._model(tokens=self._tokens[first], blocks=blocks, edit=edit)
        return scores.float().softmax(-1).cpu().numpy()


def _somebody_elses(wanted: list[Wanted | None], rng: np.random.Generator) -> list[int]:
    """For each picture the place of another one for which something is asked; round a circle."""
    there = [place for place, one in enumerate(wanted) if one is not None]
    rng.shuffle(there)
    following = dict(zip(there, [*there[1:], *there[:1]], strict=True))
    return [following.get(place, place) for place in range(len(wanted))]


def _scattered(wanted: Wanted | None, rng: np.random.Generator) -> Wanted | None:
    """The same cells and values at random places."""
    if wanted is None:
        return None
    places = rng.permutation(len(wanted.mask))
    return Wanted(wanted.mask[places], wanted.values[places])
