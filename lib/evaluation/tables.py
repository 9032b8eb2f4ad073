"""From a row an image to the tables of a report, in numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lib.data.dataset import BirdDataset
from lib.evaluation.metrics import ALIGNMENT
from lib.evaluation.per_image import baselines_by_image, human_baselines
from lib.evaluation.statistics import intervals, paired_tests

# What the tables show, in this order, with the words of the reader.
COLUMNS: dict[str, str] = {
    "top1": "accuracy",
    "conflicting": "conflicting-decoy accuracy",
    "nss": "NSS",
    "cc": "CC",
    "class_token": "class-token mass",
    "sigmoid": "mean sigmoid",
}
# Behind the two accuracies in what `in_words` shows of a result.
TOP = {f"top{k}": f"top-{k} accuracy" for k in range(2, 6)}
TOP["p_true"] = "true class's probability, mean"
TOP["p_true_max"] = "true class's probability, maximum"
TOP["p_true_min"] = "true class's probability, minimum"
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

BINS = 15  # of confidence, as Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017)


def report_tables(
    images: pd.DataFrame, datasets: Sequence[BirdDataset], against: str
) -> dict[str, pd.DataFrame]:
    """All tables that are made of the images of an evaluation, by name.

    Args:
        images: a row an image, variant and seed: `per_image` with these two columns.
        datasets: what was measured; maps that no model made are of the other images of the same.
        against: the variant that the others are held against.

    Returns:
        those of `summary_tables`, images, misclassified (of the images), calibration, and of two
        variants or more tests (`paired_tests`).
    """
    values, names = values_by_image(images)
    tested = [n for n in (*COLUMNS, "p_true") if n in names and values[n].notna().any()]
    tests = paired_tests(values, against, tested)
    tables = summary_tables(images, datasets) | {
        "images": images,
        "misclassified": images[~images["top1"].astype(bool)],
        "calibration": calibration(images),
    }
    return tables | {"tests": tests} if len(tests) else tables


def summary_tables(
    images: pd.DataFrame, datasets: Sequence[BirdDataset]
) -> dict[str, pd.DataFrame]:
    """table (`result_table`), seeds (`by_seed`) and baselines (`human_baselines`).

    Arguments as of `report_tables`.
    """
    seeds, spans = by_seed(images), intervals(*values_by_image(images))
    by_image = pd.concat(map(baselines_by_image, datasets))
    baselines = human_baselines(*datasets, by_image=by_image)
    if len(baselines):
        aligned = [name for name in ALIGNMENT if name in by_image]
        spans = pd.concat([spans, intervals(by_image.rename(columns={"map": "variant"}), aligned)])
    table = result_table(seeds, spans, baselines)
    return {"table": table, "seeds": seeds, "baselines": baselines}


def values_by_image(images: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The numbers whose means over images are the summary's, as columns of floats.

    Returns:
        the table, and the names of the numbers. conflicting and agreeing are the accuracy on
        images with such a decoy, and NaN on others.
    """
    values = images.copy()
    names = [f"top{k}" for k in range(1, 6)] + ["p_true", "confidence"]
    names += [p + name for p in ("", "sigmoid_") for name in ALIGNMENT if name in images]
    names += ["class_token", "sigmoid"]
    if "conflicting" in images:
        right, conflicting = images["top1"].astype(float), images["conflicting"].astype(bool)
        values["conflicting"] = right.where(conflicting)
        values["agreeing"] = right.where(~conflicting)
        names += ["conflicting", "agreeing", "on_decoy"]
    values[names] = values[names].astype(float)
    return values, names


def summarise(frame: pd.DataFrame) -> dict[str, float]:
    """Means over the images of `per_image`, p_true_min, p_true_max, and ece.

    ece is the expected calibration error in [0, 1], 0 is best: the mean distance of confidence and
    accuracy over the `BINS`, weighted by their images. Where a decoy is drawn also accuracy on
    conflicting and on agreeing images, and on_decoy.
    """
    values, names = values_by_image(frame)
    summary = values[names].mean().to_dict()
    summary |= {"p_true_min": frame["p_true"].min(), "p_true_max": frame["p_true"].max()}
    return summary | {"ece": expected_calibration_error(frame)}


def expected_calibration_error(frame: pd.DataFrame, bins: int = BINS) -> float:
    """ECE of the images of `per_image`, see `summarise`."""
    found = _by_confidence(frame, bins)
    gaps = (found["confidence"] - found["accuracy"]).abs() * found["images"]
    return float(gaps.sum() / len(frame))


def _by_confidence(frame: pd.DataFrame, bins: int) -> pd.DataFrame:
    """A row a bin: low, high, images, confidence, accuracy, see `calibration`."""
    edges = np.linspace(0, 1, bins + 1)
    groups = frame.groupby(np.digitize(frame["confidence"], edges[1:-1]))  # 1 is in the last bin
    table = pd.DataFrame({"low": edges[:-1], "high": edges[1:]})
    table["images"] = groups.size().reindex(table.index, fill_value=0)
    return table.assign(confidence=groups["confidence"].mean(), accuracy=groups["top1"].mean())


def by_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a variant and seed: `summarise` of its images."""
    rows = [
        {"variant": variant, "seed": seed, **summarise(part)}
        for (variant, seed), part in frame.groupby(["variant", "seed"], sort=False)
    ]
    return pd.DataFrame(rows)


def comparison_table(seeds: pd.DataFrame) -> pd.DataFrame:
    """One row a variant, one column a figure: "mean ± standard deviation" over the seeds."""
    # Data without maps or without gaze has no alignment to show.
    columns = {k: words for k, words in COLUMNS.items() if k in seeds and seeds[k].notna().any()}
    means = seeds.groupby("variant", sort=False)[list(columns)]
    texts = means.agg(lambda values: _number(values.mean(), values.std()))
    return texts.rename(columns=columns).rename_axis("model")


def _number(
    mean: float, std: float, low: float = np.nan, high: float = np.nan, sign: str = ""
) -> str:
    """ "mean ± std [low, high]" with what is known of it."""
    text = f"{mean:{sign}.3f}" if pd.notna(mean) else "–"
    text += f" ± {std:.3f}" if pd.notna(std) else ""
    return text + (f" [{low:{sign}.3f}, {high:{sign}.3f}]" if pd.notna(low) else "")


def calibration(images: pd.DataFrame, bins: int = BINS) -> pd.DataFrame:
    """Accuracy by confidence: a row a variant, seed and bin.

    Returns:
        variant, seed; low, high: bounds of the bin, in [0, 1]; images in it; their mean confidence
        and accuracy, NaN for an empty bin.
    """
    keys = ["variant", "seed"]
    parts = images.groupby(keys, sort=False)
    table = pd.concat({key: _by_confidence(part, bins) for key, part in parts}, names=keys)
    return table.reset_index(keys).reset_index(drop=True)


def result_table(seeds: pd.DataFrame, spans: pd.DataFrame, baselines: pd.DataFrame) -> pd.DataFrame:
    """All numbers of all models, and of the maps that no model made, as numbers.

    Args:
        seeds: `by_seed`. spans: `lib.evaluation.statistics.intervals`.
        baselines: `human_baselines`.

    Returns:
        a row a model or map (the column model), a column a number: its mean; with _std behind its
        name the standard deviation over seeds, with _low and _high the interval over images.
    """
    numbers = [name for name in seeds if name not in ("variant", "seed")]
    bounds = spans.set_index(["variant", "metric"])
    rows: dict[str, dict[str, float]] = {}
    for variant, part in seeds.groupby("variant", sort=False):
        rows[variant] = {name: part[name].mean() for name in numbers}
        rows[variant] |= {f"{name}_std": part[name].std() for name in numbers}
    for baseline in baselines.to_dict("records"):
        rows[baseline.pop("map")] = baseline
    for model, row in rows.items():
        for name in [name for name in numbers if (model, name) in bounds.index]:
            span = bounds.loc[(model, name)]
            row |= {f"{name}_low": span["low"], f"{name}_high": span["high"]}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model").reset_index()


def in_words(table: pd.DataFrame) -> pd.DataFrame:
    """`result_table` for readers: "mean ± std [low, high]", a row a number, a column a model."""
    first = {name: COLUMNS[name] for name in ("top1", "conflicting")}
    words = first | TOP | COLUMNS | ALIGNMENT | {"ece": "calibration error"}
    shown = {k: w for k, w in words.items() if k in table and table[k].notna().any()}
    ends = ("", "_std", "_low", "_high")
    columns = {
        row["model"]: {
            words: _number(*(row.get(name + end, np.nan) for end in ends))
            for name, words in shown.items()
        }
        for row in table.to_dict("records")
    }
    return pd.DataFrame(columns).rename_axis(columns="model")


def tests_in_words(tests: pd.DataFrame) -> pd.DataFrame:
    """`lib.evaluation.statistics.paired_tests` for readers: a row a model and metric.

    One p a row, corrected for the number of rows; none where the seeds disagree on the sign, since
    it is about images and knows nothing of that. The table itself has every number.
    """
    words = COLUMNS | {"p_true": "probability of the true class"}
    rows = []
    for row in tests.to_dict("records"):
        told = {"model": row["variant"], "metric": words.get(row["metric"], row["metric"])}
        numbers = (row[name] for name in ("difference", "difference_std", "low", "high"))
        told["difference"] = _number(*numbers, sign="+")
        told["seeds up"] = f"{row['seeds_up']} of {row['seeds']}"
        agree = row["seeds_up"] in (0, row["seeds"])
        told["p (Holm)"] = _p_value(row["p_holm"]) if agree else "seeds disagree"
        told |= dict.fromkeys(("fixed", "broken"), "")
        if pd.notna(row.get("fixed")):
            told |= {"fixed": f"{row['fixed']:.0f}", "broken": f"{row['broken']:.0f}"}
        rows.append(told | {"images": f"{row['images']}"})
    return pd.DataFrame(rows)


def _p_value(p: float) -> str:
    return "–" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def markdown(table: pd.DataFrame) -> str:
    """A table of text as Markdown, without its index."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


# -------------------------------------------------- a sweep's table: settings, and what they cost


def read_table(path: Path) -> pd.DataFrame:
    """A sweep's table from its file; words stay words, and an empty one stays empty.

    Raises:
        FileNotFoundError, ValueError: no such file, or another one; with the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; make it with `python -m lib sweep`")
    words = [*(name for name in SETTINGS if name != "lam"), "failure"]
    table = pd.read_csv(path, dtype=dict.fromkeys(words, str))
    for name in (*SETTINGS, "seed", "split", "status"):
        if name not in table:
            raise ValueError(f"{path} has no column {name}; name a table of `python -m lib sweep`")
    return table.fillna(dict.fromkeys(words, ""))


def with_gains(
    table: pd.DataFrame, numbers: Sequence[str] = (*NUMBERS, "conflicting")
) -> pd.DataFrame:
    """A sweep's rows, and of numbers the difference to the control: of split, seed, trained part.

    Columns `top1_gain`, ...; NaN where there is no such control.
    """
    keys = ["split", "trainable", "seed"]
    controls = table[table["loss"] == "control"].set_index(keys)
    partner = pd.MultiIndex.from_frame(table[keys])
    shown = [name for name in numbers if name in table]
    gains = {f"{n}_gain": table[n] - controls[n].reindex(partner).to_numpy() for n in shown}
    return table.assign(**gains)


def by_setting(
    table: pd.DataFrame, split: str = "test", numbers: Sequence[str] = NUMBERS
) -> pd.DataFrame:
    """One row a setting: mean and standard deviation over seeds, and what it gains on the control.

    Args:
        table: of `lib.experiments.sweep.run_sweep` or `read_table`. A row that failed says
            nothing: it is left out, as if it had not been trained yet.
        numbers: columns of the table.

    Returns:
        `SETTINGS`, seeds (how many), diverged (how many of them), for each number its mean
        (`cc`), standard deviation (`cc_std`, NaN for one seed), and the mean and standard deviation
        of its difference to the control with the same seed and trained part (`cc_gain`,
        `cc_gain_std`).
    """
    chosen = table[(table["split"] == split) & (table["status"] != "failed")]
    chosen = with_gains(chosen, numbers)
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
