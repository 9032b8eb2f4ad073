"""Commands that measure trained models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from lib.cli.train import called
from lib.config import (
    ROOT,
    preset,
)

# Each command imports what it needs itself: help and downloads do not wait for PyTorch.


def evaluate_runs(
    runs: tyro.conf.Positional[tuple[str, ...]],
    against: str | None = None,
    split: Literal["test", "val", "train"] = "test",
    which: Literal["last", "best"] = "last",
    out: Path | None = None,
    gallery: int = 12,
    gallery_rule: Literal["order", "change"] = "order",
    erase: int = 0,
    curves: int = 0,
    tokens: int = 0,
) -> None:
    """Measure trained models side by side: tables, paired tests, figures, a gallery page.

    Args:
        runs: names below the PRESET's runs folder, such as ft-s0 or sweep/NAME, or paths of runs.
            Those that differ in their -s<seed> alone are one model of the tables.
        against: the model that the others are compared with; the control where there is one, else
            the first.
        split: images to measure on.
        which: weights of the last epoch, or of the one that was best on the validation images.
        out: folder of the result; result/result%Y%m%d_%H%M below the repository by default. A row
            a run is added to summary.csv beside it.
        gallery: pictures whose prediction was fixed, and as many that were broken, for each model
            on the gallery page; 0 makes no page.
        gallery_rule: the first in the order of the data set, or the largest changes.
        erase: is the attention causal? Erase what a model looks at, on so many images, about 12
            forward passes each; 0 does not ask.
        curves: deletion and insertion curves of so many images, about 80 forward passes each.
        tokens: outlying tokens and attention on background of so many images.
    """
    from lib.experiments import questions
    from lib.experiments.compare import (
        common_dataset,
        load_trials,
        measure_runs,
        yardstick_variant,
    )
    from lib.experiments.report import write_report
    from lib.experiments.summary import read_summary
    from lib.files import make_folder

    config = preset()
    trials = load_trials(runs, config.runs, which)
    against = yardstick_variant(trials, against)
    parent = ROOT / "result" if out is None else out.resolve().parent
    make_folder(out or parent)  # what cannot be written is found out now, not after measuring
    read_summary(parent / "summary.csv")
    if gallery < 0:
        raise ValueError(f"gallery is {gallery}; use 0 for no gallery, or a number of pictures")
    dataset = common_dataset(trials, split, against)
    probed = questions.probe(trials, dataset, erase, curves, tokens, which)
    images = measure_runs(trials, dataset, config.runs / "tokens", which)
    folder = write_report(
        trials, images, out, against, split, which, gallery, gallery_rule, called(), dataset,
        probed,
    )  # fmt: skip
    print((folder / "result.txt").read_text(encoding="utf-8"))
    print(f"figures and tables: {folder}")


def teaching(
    seeds: int = 3, counts: tuple[int, ...] = (5, 16, 28), only_tags: bool = False
) -> None:
    """What SIMULATED corrections of drawn birds teach, beside a control and shuffled corrections.

    Accuracy on test images whose tag names another class; mean and standard deviation over seeds.

    Args:
        seeds: number of fine-tuned models to teach; they are trained where they are not there.
        counts: numbers of corrections.
        only_tags: paint the tag to 0 and nothing else.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    from lib.evaluation.tables import comparison_table
    from lib.experiments.simulate import simulated_teaching
    from lib.training.runs import fine_tuning, train_run

    if seeds < 1 or not counts or min(counts) < 1:
        raise ValueError(f"seeds is {seeds} and counts {counts}; give 1 or more of each")
    config, counts = preset("toy"), sorted(counts)
    found = []
    for seed in tqdm(range(seeds), desc="seeds"):
        run = train_run(f"ft-s{seed}", fine_tuning(config, seed), config.runs)
        model, train, test = run.model(), run.dataset("train"), run.dataset("test")
        for name, last_blocks in (("last block", 1), ("all blocks", model.depth)):
            table = simulated_teaching(model, train, test, counts, last_blocks, only_tags)
            found.append(table.assign(variant=table["model"], learns=name, seed=seed))
    table = pd.concat(found, ignore_index=True)
    for name, part in table.groupby("learns", sort=False):
        taught = part.loc[part["corrections"] > 0, "seconds"]
        print(f"\n{name}: seconds of one teaching, median {taught.median():.1f}\n")
        print(comparison_table(part).to_string())
