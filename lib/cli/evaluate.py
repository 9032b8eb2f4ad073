"""Commands that measure trained models."""

from __future__ import annotations

import tyro

from lib.cli.train import Flat, called
from lib.config import Evaluation, preset

# Each command imports what it needs itself: help and downloads do not wait for PyTorch.


def evaluate_runs(
    runs: tyro.conf.Positional[tuple[str, ...]],
    options: Flat[Evaluation] = Evaluation(),  # noqa: B008
) -> None:
    """Measure trained models side by side: tables, paired tests, figures, a gallery page.

    Args:
        runs: names below the PRESET's runs folder, such as ft-s0 or sweep/NAME, or paths of runs.
            Those that differ in their -s<seed> alone are one model of the tables.
        options: how they are measured.
    """
    from lib.experiments.evaluate import evaluate

    folder = evaluate(runs, options, command=called())
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
