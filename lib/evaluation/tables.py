"""From a row an image to the tables of a report, in numbers and in words."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torchmetrics.functional.classification import binary_calibration_error

from lib.evaluation.metrics import ALIGNMENT

# What the tables show, in this order, with the words of the reader.
COLUMNS: dict[str, str] = {
    "top1": "accuracy",
    "conflicting": "conflicting-decoy accuracy",
    "nss": "NSS",
    "cc": "CC",
    "class_token": "class-token mass",
    "sigmoid": "mean sigmoid",
}


def summarise(frame: pd.DataFrame) -> dict[str, float]:
    """Means over the images of `per_image`, p_true_min, p_true_max, and ece.

    Where a decoy is drawn also accuracy on conflicting and on agreeing images, and on_decoy.
    """
    numbers = [f"top{k}" for k in range(1, 6)] + ["p_true", "confidence"]
    numbers += [p + name for p in ("", "sigmoid_") for name in ALIGNMENT if name in frame]
    numbers += ["class_token", "sigmoid"]
    summary = {name: float(frame[name].mean()) for name in numbers}
    summary |= {"p_true_min": frame["p_true"].min(), "p_true_max": frame["p_true"].max()}
    summary["ece"] = expected_calibration_error(frame)
    if "conflicting" in frame:
        summary["conflicting"] = float(frame.loc[frame["conflicting"], "top1"].mean())
        summary["agreeing"] = float(frame.loc[~frame["conflicting"], "top1"].mean())
        summary["on_decoy"] = float(frame["on_decoy"].mean())
    return summary


def expected_calibration_error(frame: pd.DataFrame, bins: int = 15) -> float:
    """ECE of the images of `per_image` (Guo et al., ICML 2017), in [0, 1]; 0 is best.

    The mean distance of confidence and accuracy over `bins` equal bins of confidence, weighted by
    their images. TorchMetrics' error of two classes is that of any number of classes when it is
    given confidence, and right or wrong.
    """
    confidence = torch.from_numpy(below_one(frame["confidence"]))
    right = torch.from_numpy(frame["top1"].to_numpy(np.int64))
    return binary_calibration_error(confidence, right, n_bins=bins, norm="l1").item()


def below_one(confidence: pd.Series) -> np.ndarray:
    """Confidences in [0, 1): one of exactly 1 would get a bin of its own."""
    return np.minimum(confidence.to_numpy(np.float32), np.nextafter(np.float32(1), np.float32(0)))


def by_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a variant and seed: the summaries of `evaluate_trials`' images."""
    rows = [
        {"variant": variant, "seed": seed, **summarise(part)}
        for (variant, seed), part in frame.groupby(["variant", "seed"], sort=False)
    ]
    return pd.DataFrame(rows)


def comparison_table(seeds: pd.DataFrame) -> pd.DataFrame:
    """One row a variant, one column a figure: "mean ± standard deviation" over the seeds."""
    # Data without maps or without gaze has no alignment to show.
    columns = {k: words for k, words in COLUMNS.items() if k in seeds and seeds[k].notna().any()}
    rows = {}
    for variant, part in seeds.groupby("variant", sort=False):
        rows[variant] = {words: _mean_and_std(part[key]) for key, words in columns.items()}
    return pd.DataFrame(rows).T.rename_axis("model")


def _mean_and_std(values: pd.Series) -> str:
    spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"


BINS = 15  # of confidence, as Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017)
ECE = {"ece": "calibration error"}


def values_by_image(images: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The numbers whose means over images are the summary's, as columns of floats.

    Returns:
        the table, and the names of the numbers. conflicting and agreeing are the accuracy on
        images with such a decoy, and NaN on others.
    """
    values = images.copy()
    if "conflicting" in images:
        right, conflicting = images["top1"].astype(float), images["conflicting"].astype(bool)
        values["conflicting"] = right.where(conflicting)
        values["agreeing"] = right.where(~conflicting)
    names = [name for name in summarise(images) if name in values]
    values[names] = values[names].astype(float)
    return values, names


def calibration(images: pd.DataFrame, bins: int = BINS) -> pd.DataFrame:
    """Accuracy by confidence: a row a variant, seed and bin.

    Returns:
        variant, seed; low, high: bounds of the bin, in [0, 1]; images in it; their mean confidence
        and accuracy, NaN for an empty bin.
    """
    edges = np.linspace(0, 1, bins + 1)
    rows = []
    for (variant, seed), part in images.groupby(["variant", "seed"], sort=False):
        place = np.digitize(below_one(part["confidence"]), edges) - 1
        for index in range(bins):
            inside = part[place == index]
            row = {"variant": variant, "seed": seed, "low": edges[index], "high": edges[index + 1]}
            row |= {"images": len(inside), "confidence": inside["confidence"].mean()}
            rows.append(row | {"accuracy": inside["top1"].mean()})
    return pd.DataFrame(rows)


def result_table(seeds: pd.DataFrame, spans: pd.DataFrame, baselines: pd.DataFrame) -> pd.DataFrame:
    """All numbers of all models, and of the maps that no model made, as numbers.

    Args:
        seeds: `by_seed`. spans: `lib.evaluation.statistics.intervals`.
        baselines: `human_baselines`.

    Returns:
        a row a model or map, a column a number: its mean; with _std behind its name the standard
        deviation over seeds, with _low and _high the interval over images.
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
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def in_words(table: pd.DataFrame) -> pd.DataFrame:
    """`result_table` for readers: "mean ± std [low, high]" of the columns that are shown."""
    words = COLUMNS | ALIGNMENT | ECE
    shown = {k: w for k, w in words.items() if k in table and table[k].notna().any()}

    def cell(row: pd.Series, name: str) -> str:
        text = f"{row[name]:.3f}" if pd.notna(row[name]) else "–"
        if pd.notna(row.get(f"{name}_std")):
            text += f" ± {row[f'{name}_std']:.3f}"
        if pd.notna(row.get(f"{name}_low")):
            text += f" [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"
        return text

    rows = {model: {w: cell(row, k) for k, w in shown.items()} for model, row in table.iterrows()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def tests_in_words(tests: pd.DataFrame) -> pd.DataFrame:
    """`lib.evaluation.statistics.paired_tests` for readers: a row a model and metric."""
    words = COLUMNS | {"p_true": "probability of the true class"}
    rows = []
    for row in tests.to_dict("records"):
        told = {"model": row["variant"], "metric": words.get(row["metric"], row["metric"])}
        spread = f" ± {row['difference_std']:.3f}" if pd.notna(row["difference_std"]) else ""
        told["difference"] = (
            f"{row['difference']:+.3f}{spread} [{row['low']:+.3f}, {row['high']:+.3f}]"
        )
        told["seeds up"] = f"{row['seeds_up']} of {row['seeds']}"
        told |= {"p": _p_value(row["p"]), "p (Holm)": _p_value(row["p_holm"])}
        told |= dict.fromkeys(("fixed", "broken", "p (McNemar)"), "")
        if pd.notna(row.get("fixed")):
            told |= {"fixed": f"{row['fixed']:.0f}", "broken": f"{row['broken']:.0f}"}
            told["p (McNemar)"] = _p_value(row["p_mcnemar"])
        rows.append(told | {"images": f"{row['images']}"})
    return pd.DataFrame(rows)


def _p_value(p: float) -> str:
    return "–" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def markdown(table: pd.DataFrame) -> str:
    """A table of text as Markdown, without its index."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
