"""Evaluating any runs: their tables, tests, figures and gallery in one result folder.

Runs that differ in their seed alone are one variant. One variant is the one that the others are
held against, the control where there is one.
"""

from __future__ import annotations

import io
import platform
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import timm
import torch
from tqdm.auto import tqdm

from lib import config as cfg
from lib import plots, probes, statistics
from lib.config import RunConfig
from lib.data import BirdDataset
from lib.evaluate import (
    ALIGNMENT,
    COLUMNS,
    Trial,
    baselines_by_image,
    below_one,
    by_seed,
    human_baselines,
    run_name,
    summarise,
)
from lib.files import make_folder, write_bytes, write_text
from lib.gallery import Rule, attention_maps, changed_predictions, write_gallery
from lib.runs import Run, bare_model, dataset_for
from lib.summary import append_summary

Split = Literal["test", "val", "train"]
Which = Literal["last", "best"]

CONFIDENCE = 0.95  # of the intervals
BINS = 15  # of confidence, as Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017)
ECE = {"ece": "calibration error"}
# Fields of DataConfig in which runs of one evaluation may differ: maps of the training (one data
# set, its maps from one run, measures all), and what is done to training pictures alone.
MAPS = ("maps", "maps_dir", "gaze_runs", "sigma", "sigma_unit", "weight")
TRAINING_ONLY = ("crop_scale", "crop_ratio", "flip", "cache")


# ------------------------------------------------------------------------------------- which runs


def load_trials(names: Sequence[str], runs: Path, which: Which = "last") -> list[Trial]:
    """Finished runs that can be compared, found before anything is computed.

    Args:
        names: each a folder below `runs`, such as ft-s0 or sweep/NAME, or the path of a run. What
            stands before -s<seed> is the variant.
        which: weights that will be read.

    Raises:
        FileNotFoundError: a run is missing, unfinished, or has no weights.
        ValueError: runs have other classes, data, patch grid or normalisation, or are one variant
            but differ in more than the seed.
    """
    trials = []
    for name in names:
        run = Run.load(_folder(name, runs), which)
        trials.append(Trial(re.sub(r"-s\d+$", "", run.name), run.config.train.seed, run))
    if not trials:
        raise ValueError("no run is named; name one or more, such as ft-s0")
    refuse_mixture(trials)
    return trials


def _folder(name: str, runs: Path) -> Path:
    for folder in (runs / name, Path(name)):
        if folder.is_dir():
            return folder
    there = sorted(file.parent.name for file in runs.glob("*/config.json"))
    there = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "") or "none"
    raise FileNotFoundError(
        f"no run {name} in {runs} (there: {there}); train it, name another, or set PRESET and "
        "RUNS_DIR"
    )


def refuse_mixture(trials: Sequence[Trial]) -> None:
    """ValueError where the runs of an evaluation cannot stand in one table; names two of them."""
    first = trials[0].run
    ours = _yardstick(first)
    named: dict[tuple[str, int], Run] = {}
    alike: dict[str, Run] = {}
    for trial in tqdm(trials, desc="runs", leave=False, delay=1.0):
        run = trial.run
        theirs = _yardstick(run)
        for what in ours:
            if theirs[what] != ours[what]:
                raise ValueError(
                    f"{first.folder} and {run.folder} differ in {what} "
                    f"({_difference(ours[what], theirs[what])}); evaluate them apart"
                )
        twin = named.setdefault((trial.variant, trial.seed), run)
        if twin is not run:
            raise ValueError(
                f'{twin.folder} and {run.folder} are both "{trial.variant}" of seed {trial.seed}; '
                "leave one out, or rename its folder"
            )
        other = alike.setdefault(trial.variant, run)
        found = cfg.difference(_without_seed(other.config), cfg.to_json(_without_seed(run.config)))
        if found:
            raise ValueError(
                f'{other.folder} and {run.folder} would be one variant, "{trial.variant}", but '
                f"{found}; rename a folder"
            )


def _yardstick(run: Run) -> dict[str, object]:
    """What runs must share to be measured on the same items, by the words of a sentence."""
    data = cfg.flat(run.config.data)
    for name in (*MAPS, *TRAINING_ONLY):
        data = {key: value for key, value in data.items() if key != name}
    model = bare_model(run.config, num_classes=0)
    return {
        "their data": data,
        "their classes": run.classes,
        "the patch grid": model.grid,
        "the normalisation of pictures": model.normalisation,
    }


def _difference(ours: object, theirs: object) -> str:
    """The first difference of two yardsticks, in words."""
    if isinstance(ours, dict):
        key = next(k for k in ours if ours[k] != theirs[k])
        return f"{key} is {ours[key]} and {theirs[key]}"
    if isinstance(ours, list):
        if len(ours) != len(theirs):
            return f"{len(ours)} and {len(theirs)}"
        return "{} and {}".format(*next(p for p in zip(ours, theirs, strict=True) if p[0] != p[1]))
    return f"{ours} and {theirs}"


def _without_seed(config: RunConfig) -> RunConfig:
    """The configuration as it is in all runs of its variant."""
    plain = cfg.from_json(RunConfig, cfg.to_json(config))
    plain.train.seed = 0
    plain.init = plain.init and re.sub(r"-s\d+$", "", plain.init)
    return plain


def yardstick_variant(trials: Sequence[Trial], against: str | None = None) -> str:
    """The variant that the others are held against.

    Without a name the first that is called control, else the first. ValueError for a name that no
    run has, or where another variant shares no seed with it.
    """
    names = list(dict.fromkeys(trial.variant for trial in trials))
    if against is None:
        against = next((name for name in names if name.startswith("control")), names[0])
    if against not in names:
        raise ValueError(
            f'--against is "{against}", but the models are {", ".join(names)}; use one of them'
        )
    seeds = {name: {t.seed for t in trials if t.variant == name} for name in names}
    for name in names:
        if not seeds[name] & seeds[against]:
            raise ValueError(
                f'"{name}" has seeds {sorted(seeds[name])} and "{against}" '
                f"{sorted(seeds[against])}; add runs of a seed that both have, or choose another "
                "--against"
            )
    return against


# ------------------------------------------------------------------------------------ measurements


def common_dataset(trials: Sequence[Trial], split: Split, against: str) -> BirdDataset:
    """The images that all are measured on, with the human maps of one run for all.

    The maps are those of the first run of `against`; where it was trained without any, of the
    first run that has some.
    """
    order = sorted(trials, key=lambda trial: trial.variant != against)
    run = next((t.run for t in order if t.run.config.data.maps != "none"), order[0].run)
    return dataset_for(bare_model(run.config, num_classes=0), run.config, split, augment=False)


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


# ------------------------------------------------------------------------------------------ tables


def result_table(seeds: pd.DataFrame, spans: pd.DataFrame, baselines: pd.DataFrame) -> pd.DataFrame:
    """All numbers of all models, and of the maps that no model made, as numbers.

    Args:
        seeds: `by_seed`. spans: `lib.statistics.intervals`. baselines: `human_baselines`.

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
    """`lib.statistics.paired_tests` for readers: a row a model and metric."""
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


# ---------------------------------------------------------------------------------------- a report


def write_report(
    trials: Sequence[Trial],
    images: pd.DataFrame,
    folder: Path | None = None,
    against: str | None = None,
    split: Split = "test",
    which: Which = "last",
    gallery: int = 12,
    rule: Rule = "order",
    command: str = "",
    dataset: BirdDataset | None = None,
    probed: dict[str, pd.DataFrame] | None = None,
) -> Path:
    """Tables, tests, figures, gallery and configurations of an evaluation in one folder.

    Args:
        images: the trials' rows, of `lib.evaluate.measure_runs` or `evaluate_trials`.
        folder: where to write; `result/result%Y%m%d_%H%M` below the repository by default, with
            a number behind it when that is taken.
        against: see `yardstick_variant`.
        split, which: what was measured.
        gallery: pictures a variant and kind (fixed, broken) on the page; 0 makes no page.
        rule: how they are chosen. command: what was called, for result.txt.
        dataset: `common_dataset`, where the caller has it already.
        probed: tables of `lib.probes.probe`, to be written, drawn and told of as well.

    Returns:
        the folder:
        result.txt         everything that can be read in a terminal
        table.csv          a row a model, and a map that no model made; see `result_table`
        table.md           the same for readers, a column a model
        seeds.csv          a row a run; images.csv a row a run and image; misclassified.csv of them
        tests.csv, .md     `lib.statistics.paired_tests`, where there are two models or more
        calibration.csv    `calibration`; baselines.csv the maps that no model made
        config/*.json      the configuration of every run
        *.png, *.pdf       comparison, p_true, history, calibration, attention, and where there are
                           human maps: accuracy_cc; of what was probed its tables and figures
        gallery.html       `lib.gallery.write_gallery`, where there are two models or more
        A row a run is added to summary.csv beside the folder.
    """
    if gallery < 0:
        raise ValueError(f"gallery is {gallery}; use 0 for no gallery, or a number of pictures")
    against = yardstick_variant(trials, against)
    dataset = dataset or common_dataset(trials, split, against)
    folder = folder or _new_folder(cfg.ROOT / "result")
    make_folder(folder / "config")
    values, names = values_by_image(images)
    seeds = by_seed(images)
    spans = statistics.intervals(values, names, CONFIDENCE)
    by_image = baselines_by_image(dataset)
    baselines = human_baselines(dataset, by_image)
    if len(baselines):
        by_image = by_image.rename(columns={"map": "variant"})
        aligned = [name for name in ALIGNMENT if name in by_image]
        spans = pd.concat([spans, statistics.intervals(by_image, aligned, CONFIDENCE)])
    table = result_table(seeds, spans, baselines)
    tested = [n for n in (*COLUMNS, "p_true") if n in names and values[n].notna().any()]
    tests = statistics.paired_tests(values, against, tested, CONFIDENCE)
    tables = {
        "table": table.reset_index(),
        "seeds": seeds,
        "images": images,
        "baselines": baselines,
        "misclassified": images[~images["top1"].astype(bool)],
        "calibration": calibration(images),
    }
    write_text(folder / "table.md", markdown(in_words(table).T.rename_axis("").reset_index()))
    if len(tests):
        tables["tests"] = tests
        write_text(folder / "tests.md", markdown(tests_in_words(tests)))
    for name, part in tables.items():
        write_text(folder / f"{name}.csv", part.to_csv(index=False))
    for trial in trials:
        file = folder / "config" / f"{run_name(trial.variant, trial.seed)}.json"
        write_text(file, cfg.to_json(trial.run.config))
    _write_figures(folder, trials, dataset, images, seeds, baselines, split, which)
    _save_figures(folder, probes.write(folder, probed or {}))
    changes = changed_predictions(images, against)
    if gallery and len(tests):
        write_gallery(folder, trials, dataset, changes, against, gallery, rule, which, split)
    head = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "command": command,
        "data": dataset.config.name,
        "split": f"{split}, {len(dataset)} images, {len(dataset.classes)} classes",
        "human maps": dataset.config.maps,
        "weights": which,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    text = _result_text(head, table, tests, against)
    told = probes.in_words(probed or {})
    write_text(folder / "result.txt", f"{text}\n{told}\n" if told else text)
    append_summary(
        folder.parent / "summary.csv",
        _summary_rows(folder, trials, seeds, dataset, split, which, head["date"]),
    )
    return folder


def _write_figures(
    folder: Path,
    trials: Sequence[Trial],
    dataset: BirdDataset,
    images: pd.DataFrame,
    seeds: pd.DataFrame,
    baselines: pd.DataFrame,
    split: Split,
    which: Which,
) -> None:
    first = {t.variant: t.run for t in reversed(trials)}  # of every variant its first run
    first = {name: first[name] for name in dict.fromkeys(t.variant for t in trials)}
    pooled = calibration(images.assign(seed="all"))  # a line a model, not a line a run
    errors = seeds.groupby("variant", sort=False)["ece"].mean().to_dict()
    figures = {
        "comparison": plots.comparison(seeds, COLUMNS, split),
        "p_true": plots.true_class_density(images, split),
        "history": plots.histories({name: run.history for name, run in first.items()}),
        "calibration": plots.reliability(pooled, errors, split),
        "attention": attention_gallery(first, dataset, range(min(5, len(dataset))), which),
    }
    if seeds["cc"].notna().any():
        lines = baselines.set_index("map")["cc"].dropna().to_dict()
        figures["accuracy_cc"] = plots.accuracy_and_alignment(seeds, lines, split)
    _save_figures(folder, figures)


def _save_figures(folder: Path, figures: dict[str, plots.Figure]) -> None:
    """Each as PNG and as PDF."""
    for name, figure in figures.items():
        for kind in ("png", "pdf"):
            content = io.BytesIO()
            figure.savefig(content, format=kind, dpi=150, bbox_inches="tight")
            write_bytes(folder / f"{name}.{kind}", content.getvalue())
        plots.plt.close(figure)  # saved, not shown: a notebook would draw it as well


def attention_gallery(
    runs: dict[str, Run],
    dataset: BirdDataset,
    chosen: Sequence[int] = range(5),
    which: Which = "last",
) -> plots.Figure:
    """Rows of images: the picture with people's gaze, then each model's class row on it."""
    columns = {
        name: list(zip(*attention_maps(run.model(which), dataset, chosen), strict=True))
        for name, run in runs.items()
    }
    human = [dataset.annotations(int(i))["human"].reshape(dataset.grid).numpy() for i in chosen]
    return plots.gallery([dataset.image(int(i)) for i in chosen], human, columns)


def _result_text(
    head: dict[str, str], table: pd.DataFrame, tests: pd.DataFrame, against: str
) -> str:
    parts = ["\n".join(f"{name + ':':<12}{value}" for name, value in head.items() if value)]
    # A table is wide, a terminal is not: a line a number, a column a model.
    parts.append(
        "Mean over images and seeds ± standard deviation over seeds [95 % interval over images]\n\n"
        + in_words(table).T.to_string()
    )
    if len(tests):
        parts.append(
            f'Each model minus "{against}" on the same images and seeds ± standard deviation over '
            "seeds [95 % interval over images]\np: sign-flip permutation test over images, for the "
            "models as they were trained: what another seed would change is the ±\nHolm: corrected "
            f"for the {len(tests)} rows\n\n{tests_in_words(tests).to_string(index=False)}"
        )
    return "\n\n".join(parts) + "\n"


def _summary_rows(
    folder: Path,
    trials: Sequence[Trial],
    seeds: pd.DataFrame,
    dataset: BirdDataset,
    split: Split,
    which: Which,
    date: str,
) -> list[dict[str, object]]:
    """A row a run for summary.csv: which, of what, with what, and all its numbers."""
    numbers = seeds.set_index(["variant", "seed"])
    return [
        {"date": date, "result": folder.name, "run": trial.run.name}
        | {"variant": trial.variant, "seed": trial.seed, "data": dataset.config.name}
        | {"split": split, "which": which, "images": len(dataset)}
        | {"torch": torch.__version__, "timm": timm.__version__}
        | numbers.loc[(trial.variant, trial.seed)].to_dict()
        for trial in trials
    ]


def _new_folder(parent: Path) -> Path:
    """result%Y%m%d_%H%M, with _2, _3, ... behind it when that minute has one already."""
    stem = datetime.now().strftime("result%Y%m%d_%H%M")
    for number in range(1, 1000):
        folder = parent / (stem if number == 1 else f"{stem}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent} has a thousand results of this minute; move some away")
