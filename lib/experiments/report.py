"""Tables, tests, figures and gallery of an evaluation, in one result folder."""

from __future__ import annotations

import io
import platform
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pandas as pd
import timm
import torch

from lib import config as cfg
from lib import figures
from lib.data.dataset import BirdDataset
from lib.evaluation import statistics
from lib.evaluation.metrics import ALIGNMENT
from lib.evaluation.per_image import baselines_by_image, human_baselines
from lib.evaluation.tables import (
    COLUMNS,
    by_seed,
    calibration,
    in_words,
    markdown,
    result_table,
    tests_in_words,
    values_by_image,
)
from lib.experiments import questions
from lib.experiments.compare import Split, Trial, Which, common_dataset, run_name, yardstick_variant
from lib.experiments.gallery import Rule, attention_maps, changed_predictions, write_gallery
from lib.experiments.summary import append_summary
from lib.files import make_folder, write_bytes, write_text
from lib.training.runs import Run

CONFIDENCE = 0.95  # of the intervals


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
        images: the trials' rows, of `lib.experiments.compare.measure_runs` or `evaluate_trials`.
        folder: where to write; `result/result%Y%m%d_%H%M` below the repository by default, with
            a number behind it when that is taken.
        against: see `yardstick_variant`.
        split, which: what was measured.
        gallery: pictures a variant and kind (fixed, broken) on the page; 0 makes no page.
        rule: how they are chosen. command: what was called, for result.txt.
        dataset: `common_dataset`, where the caller has it already.
        probed: tables of `lib.experiments.questions.probe`, to be written, drawn and told of.

    Returns:
        the folder:
        result.txt         everything that can be read in a terminal
        table.csv          a row a model, and a map that no model made; see `result_table`
        table.md           the same for readers, a column a model
        seeds.csv          a row a run; images.csv a row a run and image; misclassified.csv of them
        tests.csv, .md     `paired_tests` of lib.evaluation.statistics, of two models or more
        calibration.csv    `calibration`; baselines.csv the maps that no model made
        config/*.json      the configuration of every run
        *.png, *.pdf       comparison, p_true, history, calibration, attention, and where there are
                           human maps: accuracy_cc; of what was probed its tables and figures
        gallery.html       `lib.experiments.gallery.write_gallery`, of two models or more
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
    _save_figures(folder, questions.write(folder, probed or {}))
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
    told = questions.in_words(probed or {})
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
    drawn = {
        "comparison": figures.comparison(seeds, COLUMNS, split),
        "p_true": figures.true_class_density(images, split),
        "history": figures.histories({name: run.history for name, run in first.items()}),
        "calibration": figures.reliability(pooled, errors, split),
        "attention": attention_gallery(first, dataset, range(min(5, len(dataset))), which),
    }
    if seeds["cc"].notna().any():
        lines = baselines.set_index("map")["cc"].dropna().to_dict()
        drawn["accuracy_cc"] = figures.accuracy_and_alignment(seeds, lines, split)
    _save_figures(folder, drawn)


def _save_figures(folder: Path, drawn: dict[str, figures.Figure]) -> None:
    """Each as PNG and as PDF."""
    for name, figure in drawn.items():
        for kind in ("png", "pdf"):
            content = io.BytesIO()
            figure.savefig(content, format=kind, dpi=150, bbox_inches="tight")
            write_bytes(folder / f"{name}.{kind}", content.getvalue())
        figures.plt.close(figure)  # saved, not shown: a notebook would draw it as well


def attention_gallery(
    runs: dict[str, Run],
    dataset: BirdDataset,
    chosen: Sequence[int] = range(5),
    which: Which = "last",
) -> figures.Figure:
    """Rows of images: the picture with people's gaze, then each model's class row on it."""
    columns = {
        name: list(zip(*attention_maps(run.model(which), dataset, chosen), strict=True))
        for name, run in runs.items()
    }
    human = [dataset.annotations(int(i))["human"].reshape(dataset.grid).numpy() for i in chosen]
    return figures.gallery([dataset.image(int(i)) for i in chosen], human, columns)


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
