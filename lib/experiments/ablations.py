"""From the table of a sweep to what its figures show: settings, their cost, the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

# What tells one training from another, but for its seed: the first columns of a sweep's table.
SETTINGS = ("loss", "lam", "blocks", "heads", "offset", "maps", "annotated", "noise", "trainable")
# A sweep's usual; what an ablation does not speak of is held at these.
USUAL = {
    "blocks": "last",
    "heads": "all",
    "offset": "none",
    "maps": "human",
    "annotated": "all",
    "noise": "none",
}
NUMBERS = ("top1", "cc", "nss", "class_token", "sigmoid")


def read_table(path: Path) -> pd.DataFrame:
    """A sweep's table from its file; words stay words, and an empty one stays empty.

    Raises:
        FileNotFoundError, ValueError: no such file, or another one; with the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; make it with `python -m lib sweep`")
    words = [name for name in SETTINGS if name != "lam"]
    table = pd.read_csv(path, dtype=dict.fromkeys(words, str))
    for name in (*SETTINGS, "seed", "split", "status"):
        if name not in table:
            raise ValueError(f"{path} has no column {name}; name a table of `python -m lib sweep`")
    return table.fillna(dict.fromkeys(words, ""))


def by_setting(
    table: pd.DataFrame, split: str = "test", numbers: Sequence[str] = NUMBERS
) -> pd.DataFrame:
    """One row a setting: mean and standard deviation over seeds, and what it gains on the control.

    Args:
        table: of `lib.experiments.sweep.run_sweep` or `read_table`.
        numbers: columns of the table.

    Returns:
        `SETTINGS`, seeds (how many), diverged (how many of them), for each number its mean
        (`cc`), standard deviation (`cc_std`, NaN for one seed), and the mean and standard deviation
        of its difference to the control with the same seed and trained part (`cc_gain`,
        `cc_gain_std`).
    """
    chosen = table[table["split"] == split].copy()
    controls = chosen[chosen["loss"] == "control"].set_index(["trainable", "seed"])
    partner = pd.MultiIndex.from_frame(chosen[["trainable", "seed"]])
    for name in numbers:
        chosen[f"{name}_gain"] = chosen[name] - controls[name].reindex(partner).to_numpy()
    columns = [column for name in numbers for column in (name, f"{name}_gain")]
    groups = chosen.groupby(list(SETTINGS), sort=False, dropna=False)
    found = groups[columns].mean().join(groups[columns].std().add_suffix("_std"))
    found["seeds"] = groups["seed"].nunique()
    found["diverged"] = groups["status"].agg(lambda status: (status == "diverged").sum())
    return found.reset_index()


def held_at(settings: pd.DataFrame, **others: object) -> pd.DataFrame:
    """The rows whose settings are the usual ones, but for those named: a value, or None for any.

    The control belongs to every comparison and is always among them.
    """
    wanted = {name: value for name, value in (USUAL | others).items() if value is not None}
    as_wanted = settings[list(wanted)].eq(pd.Series(wanted)).all(axis=1)
    return settings[as_wanted | (settings["loss"] == "control")]


def on_front(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """Which points (bool `[n]`) no other beats: both higher or equal, and one of them higher.

    A point with NaN is not on the front.
    """
    points = np.column_stack([x, y]).astype(float)
    known = np.isfinite(points).all(axis=1)
    no_worse = (points[:, None] >= points).all(-1)  # [i, j]: i at least as good as j
    better = (points[:, None] > points).any(-1)
    return known & ~(no_worse & better & known[:, None]).any(axis=0)


def best_at_no_cost(settings: pd.DataFrame, tolerance: float = 0.003) -> pd.Series | None:
    """The setting with the highest CC whose accuracy is not below the control's.

    Args:
        tolerance: how far below the control's the mean accuracy may be. A mean over few seeds is
            uncertain, and this takes the best of many: confirm what it finds.

    Returns:
        its row of `by_setting`; None where no setting keeps the accuracy. One of which a seed
        diverged is not considered.
    """
    trained = settings[(settings["loss"] != "control") & (settings["diverged"] == 0)]
    allowed = trained[trained["top1_gain"] >= -tolerance]
    return None if allowed.empty else allowed.loc[allowed["cc"].idxmax()]
