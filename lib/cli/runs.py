"""Commands that train and measure models: one, the whole experiment, a sweep."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lib.config import (
    RECIPES,
    Config,
    DataConfig,
    Evaluation,
    ModelConfig,
    RunConfig,
    Sweep,
    T,
    TrainConfig,
    file_md5,
    preset,
)
from lib.experiments.cluster import Slurm
from lib.files import write_text

# Each command imports what it needs itself: help and downloads do not wait for PyTorch.

Flat = Annotated[T, tyro.conf.arg(name="")]  # the fields of a dataclass as options without a prefix


@dataclass
class RunOptions:
    """Options of both steps of `train`, beside the fields of TrainConfig."""

    data: DataConfig
    model: ModelConfig
    name: str | None = None  # of the run; ft-s<seed> or hitl-<loss>-s<seed> when left out
    # where the values below come from; "original" is that of the first experiment
    recipe: Literal[tuple(RECIPES)] = "tuned"
    resume: bool = False  # go on where a run of that name was stopped; options must be as they were
    overwrite: bool = False  # train again in the place of a run of that name


def demo(
    seeds: int = 1, epochs: int | None = None, overwrite: bool = False, out: Path | None = None
) -> None:
    """The whole experiment: fine-tune, train with human attention, evaluate, compare.

    Args:
        seeds: number of training seeds; the table gives mean and standard deviation.
        epochs: of each stage; those of the preset by default.
        overwrite: train again even where a finished run is there.
        out: folder of the result; result/result%Y%m%d_%H%M below the project by default.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; train with 1 or more")
    config = preset()
    if epochs is not None:
        config.ft, config.hitl = (replace(part, epochs=epochs) for part in (config.ft, config.hitl))
    names = ", ".join(["fine-tuned", *config.variants])
    if os.environ.get("RANK", "0") == "0":
        print(f"preset {config.preset}, {config.ft.epochs} epochs each: {names}", flush=True)

    import pandas as pd
    from tqdm.auto import tqdm

    from lib.evaluation.tables import comparison_table
    from lib.experiments.compare import Trial, misled, train_comparison
    from lib.experiments.evaluate import evaluate
    from lib.model.predict import processes
    from lib.training.state import Progress

    def watch(progress: Progress) -> None:
        """An epoch of the first training, as soon as it is measured; the last is `tell`'s."""
        if progress.step == 0 and progress.epoch < config.ft.epochs:
            told = accuracy_in_words(progress.history[-1])
            tqdm.write(f"  fine-tuning, epoch {progress.epoch}: {told}")

    def tell(trial: Trial) -> None:
        if not processes().is_main_process:
            return
        told = accuracy_in_words(trial.run.history.iloc[-1])
        if trial.variant == "fine-tuned" and (found := misled(trial)) is not None:
            told += f", but {found:.3f} on test images whose decoy names another class"
        tqdm.write(f"{trial.variant}, seed {trial.seed}: {told}")

    trials = train_comparison(config, range(seeds), overwrite, watch, tell)
    folder = evaluate(trials, Evaluation(out=out), config.runs, called())
    if not processes().is_main_process:
        return
    table = comparison_table(pd.read_csv(folder / "seeds.csv"))
    print(f"\npreset {config.preset}, {seeds} seed{'s' * (seeds > 1)}, test images\n")
    print(table.to_string())
    print(f"\nfigures and tables: {folder}")


def train(arguments: list[str]) -> None:
    """Train one model: `train ft` from pretrained weights, `train hitl` from a run.

    Args:
        arguments: "ft" or "hitl" and its options; every field of the configuration is one.
    """
    # The recipe changes what the other options start from, so it is read first.
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe", default=os.environ.get("RECIPE") or "tuned")
    recipe = first.parse_known_args(arguments)[0].recipe
    config = preset(recipe=recipe)
    given = RunOptions(config.data, config.model, recipe=recipe)
    second = replace(given, data=replace(config.data, **config.hitl_data))

    def fine_tune(run: Flat[RunOptions] = given, train: Flat[TrainConfig] = config.ft) -> None:
        """Step 1: cross entropy only, from pretrained weights and a new head."""
        _train_one(config, run.name or f"ft-s{train.seed}", run, train)

    def hitl(
        init: str,
        run: Flat[RunOptions] = second,
        train: Flat[TrainConfig] = config.hitl,
        init_which: str = config.init_which,
    ) -> None:
        """Step 2: with human attention as one more term of the loss, from a trained run.

        Args:
            init: name of the run to start from.
            init_which: which of its weights: last, best, or e.g. epoch10.
        """
        name = run.name or f"hitl-{train.human.loss}-s{train.seed}"
        _train_one(config, name, run, train, init, init_which)

    tyro.extras.subcommand_cli_from_dict(
        {"ft": fine_tune, "hitl": hitl},
        prog="python -m lib train",
        description="Train one model; PRESET chooses data and model (see lib/config.py).",
        args=arguments,
    )


def _train_one(
    config: Config,
    name: str,
    given: RunOptions,
    train: TrainConfig,
    init: str | None = None,
    init_which: str = "last",
) -> None:
    """`train_run`, for a person who may not know that the run is there."""
    from lib.model.predict import processes
    from lib.training.learning import PRECISIONS
    from lib.training.runs import finished_run, train_run

    folder, resume, overwrite = config.runs / name, given.resume, given.overwrite
    is_there = (folder / "config.json").is_file()
    if resume and overwrite:
        raise ValueError("--resume and --overwrite are given; the one keeps what the other drops")
    if is_there and not (resume or overwrite):
        stands = "is finished" if finished_run(folder) else "was stopped half way"
        raise FileExistsError(
            f"{folder} exists and {stands}; go on with --resume, train again with --overwrite, or "
            "choose another --name"
        )
    if resume and not is_there:
        raise FileNotFoundError(f"{folder} is no run that could be resumed; leave out --resume")
    data = given.data
    if data.split_file is not None:
        data = replace(data, split_md5=file_md5(data.split_file))
    run = RunConfig(data, given.model, train, init, init_which)
    found = train_run(name, run, config.runs, overwrite)
    if processes().is_main_process:
        last = found.history.iloc[-1]
        words = PRECISIONS[found.config.train.mixed_precision]
        print(f"{folder}: {last['epoch']:.0f} epochs in {words}, {accuracy_in_words(last)}")


def accuracy_in_words(row: Mapping[str, float]) -> str:
    """Of a row of a history: on validation images, or on training images where there are none."""
    is_nan = row["val_top1"] != row["val_top1"]
    part, name = ("training", "train_top1") if is_nan else ("validation", "val_top1")
    return f"{part} accuracy {row[name]:.3f}"


def sweep(
    axes: Flat[Sweep] = Sweep(),  # noqa: B008
    jobs: int = 1,
    keep_weights: bool = False,
    out: Path | None = None,
    cluster: str | None = None,
    slurm: Slurm = Slurm(),  # noqa: B008
) -> int:
    """Train and measure every combination of settings; exit code 1 if one of them failed.

    The same command again goes on where it was stopped. What is measured is kept in
    runs/<preset>/sweep and never trained again.

    Args:
        axes: what is combined.
        jobs: trainings at a time on this machine. They share its processor cores; of several GPUs
            each gets one.
        keep_weights: keep the weights of every training; else they go when it is measured.
        out: the table, a row a training and split (val, test) of all sweeps of this preset;
            sweep.csv in the runs folder of the preset by default.
        cluster: tcp://HOST:8786 of a `dask scheduler`, whose workers train; or slurm, which starts
            them (docs/cluster.md).
        slurm: what SLURM is asked for.
    """
    from lib.experiments.sweep import run_sweep

    config = preset()
    out = out or config.runs / "sweep.csv"
    try:
        table, failed = run_sweep(config, axes, out, jobs, keep_weights, cluster, slurm)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on. What is measured: {out}", file=sys.stderr)
        return 130
    alike: dict[str, list[str]] = {}
    for name, failure in failed.items():
        alike.setdefault(failure, []).append(name)
    for failure, (name, *others) in alike.items():
        also = f" and {len(others)} more" * bool(others)
        print(f"{name}{also} failed: {failure}", file=sys.stderr)
    print(f"{len(failed)} trainings failed; {len(table)} rows: {out}")
    return int(bool(failed))


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
    from lib.model.predict import processes

    folder = evaluate(runs, options, command=called())
    if processes().is_main_process:
        print((folder / "result.txt").read_text(encoding="utf-8"))
        print(f"figures and tables: {folder}")


def teaching(
    seeds: int = 3, counts: tuple[int, ...] = (1, 5, 16), only_decoys: bool = False
) -> None:
    """What SIMULATED corrections of drawn birds teach, beside a control and shuffled corrections.

    Accuracy on test images whose decoy names another class; mean and deviation over seeds.

    Args:
        seeds: number of fine-tuned models to teach; they are trained where they are not there.
        counts: numbers of corrections.
        only_decoys: paint the decoy to 0 and nothing else.
    """
    from functools import partial

    import pandas as pd
    from tqdm.auto import tqdm

    from lib.evaluation.tables import comparison_table
    from lib.experiments.simulate import simulated_teaching
    from lib.model.predict import in_main_process, processes
    from lib.training.runs import fine_tuning, train_run

    if seeds < 1 or not counts or min(counts) < 1:
        raise ValueError(f"seeds is {seeds} and counts {counts}; give 1 or more of each")
    config, counts = preset("toy"), sorted(counts)
    found = []
    for seed in tqdm(range(seeds), desc="seeds"):
        run = train_run(f"ft-s{seed}", fine_tuning(config, seed), config.runs)
        model, train, test = run.model(), run.dataset("train"), run.dataset("test")
        for name, last_blocks in (("last block", 1), ("all blocks", model.depth)):
            asked = (model, train, test, counts, last_blocks, only_decoys)
            table = in_main_process(partial(simulated_teaching, *asked))
            found.append(table.assign(variant=table["model"], learns=name, seed=seed))
    if not processes().is_main_process:
        return
    table = pd.concat(found, ignore_index=True)
    for name, part in table.groupby("learns", sort=False):
        taught = part.loc[part["corrections"] > 0, "seconds"]
        print(f"\n{name}: seconds of one teaching, median {taught.median():.1f}\n")
        print(comparison_table(part).to_string())


def edit_pictures(
    runs: tyro.conf.Positional[tuple[str, ...]],
    pictures: int = 200,
    split: Literal["test", "val", "train"] = "test",
    strength: tuple[float, ...] = (0.5, 1.0),
    blocks: tuple[Literal["last", "last2", "all"], ...] = ("last",),
    heads: Literal["mean", "all"] = "mean",
    out: Path | None = None,
) -> None:
    """What one edit rule after the other does to many pictures: right to wrong, wrong to right.

    Rules: the border to 0, low outside the box, people's map; each beside as many random cells, and
    another image's. Counts are means over the seeds of a model, of runs that differ in -s<seed>.

    Args:
        runs: names, as for evaluate.
        pictures: how many, at even distances.
        strength: shares of the edit that are made, in (0, 1].
        blocks: in which it is made; all of them takes a full forward pass an edit.
        heads: the mean of the heads is edited, or each head is.
        out: a CSV file with a row a run, picture, rule and control.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    from lib.data.dataset import evenly_spaced
    from lib.evaluation import many
    from lib.experiments.compare import load_trials

    if pictures < 1 or not strength or not all(0 < share <= 1 for share in strength):
        raise ValueError(f"pictures is {pictures} and strength {strength}; give 1 or more, (0, 1]")
    trials, found = load_trials(runs, preset().runs), []
    scopes = {
        f"{place}, {share:g}": many.DEFAULT_SCOPE
        | {"blocks": place, "strength": share, "heads": heads}
        for place in blocks
        for share in strength
    }
    for trial in trials:
        dataset = trial.run.dataset(split)
        chosen = evenly_spaced(dataset, pictures)
        rules = list(many.make_rules(dataset).values())
        with tqdm(
            total=len(chosen), desc=f"{trial.variant}, seed {trial.seed}", unit="image"
        ) as bar:
            frame = many.edit_many(
                *(trial.run.model(), dataset, rules, chosen, scopes, trial.seed),
                progress=lambda done, _, bar=bar: bar.update(done - bar.n) and None,
            )
        found.append(frame.assign(model=trial.variant, seed=trial.seed))
    table = pd.concat(found, ignore_index=True)
    if out is not None:
        write_text(out, table.to_csv(index=False))
    counts = [
        many.count_changes(part).assign(model=model)
        for (model, _), part in table.groupby(["model", "seed"], sort=False)
    ]
    keys = ["model", "rule", "scope", "control"]
    mean = pd.concat(counts).groupby(keys, sort=False).mean(numeric_only=True)
    print(f"{split} images; scope: blocks, strength; means over seeds\n")
    print(mean.round(3).to_string())


def called() -> str:
    """The command line as it could be typed again."""
    chosen = f"PRESET={os.environ['PRESET']} " if os.environ.get("PRESET") else ""
    return f"{chosen}python -m lib {shlex.join(sys.argv[1:])}"
