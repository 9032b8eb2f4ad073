"""Runs that stand side by side: trained as a comparison, or found by name.

Runs that differ in their seed alone are one variant. One variant is the one that the others are
held against, the control where there is one.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from lib.config import Config, RunConfig
from lib.data.dataset import conflicting_decoys, subset
from lib.files import file_name
from lib.model.predict import predict
from lib.training.runs import (
    NoHumanMaps,
    Run,
    bare_model,
    fine_tuning,
    human_in_the_loop,
    train_run,
)
from lib.training.state import (
    HOW,
    MAPS_AND_CROPS,
    PLACES,
    Progress,
    difference,
    flat,
    from_json,
    to_json,
)


@dataclass(frozen=True)
class Trial:
    """One trained model of a comparison."""

    variant: str  # what the tables call it
    seed: int
    run: Run


def train_comparison(
    config: Config,
    seeds: Sequence[int],
    overwrite: bool = False,
    watch: Callable[[Progress], None] | None = None,
    tell: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Fine-tunes, then trains every variant of the preset on top, for every seed.

    Runs that are there already are loaded; see `lib.training.runs.train_run`. Variants that want
    human maps are left out, with a warning, where no training image has one.

    Args:
        watch: called with the progress of the first training.
        tell: called with every model as soon as it is trained.
    """
    trials = []
    for seed in seeds:
        settings = fine_tuning(config, seed)
        first = None if trials else watch
        fine_tuned = train_run(f"ft-s{seed}", settings, config.runs, overwrite, first)
        trials.append(Trial("fine-tuned", seed, fine_tuned))
        tell(trials[-1])
        for variant, human in config.variants.items():
            settings = human_in_the_loop(config, fine_tuned.name, seed, **human)
            try:
                run = train_run(run_name(variant, seed), settings, config.runs, overwrite)
            except NoHumanMaps as error:
                warnings.warn(f'"{variant}" is left out: {error}', stacklevel=2)
            else:
                trials.append(Trial(variant, seed, run))
                tell(trials[-1])
    return trials


def misled(trial: Trial) -> float | None:
    """Accuracy in [0, 1] on test images whose decoy names another class; None without decoys."""
    table = (dataset := trial.run.dataset("test")).table
    if "decoy" not in table or not (is_conflict := conflicting_decoys(table)).any():
        return None
    chosen = subset(dataset, np.flatnonzero(is_conflict))
    batches = predict(trial.run.model(), chosen, 64)
    found = [scores.argmax(-1) == batch["label"] for batch, scores, _ in batches]
    return torch.cat(found).float().mean().item()


def run_name(variant: str, seed: int) -> str:
    """Folder name of a model of the comparison: "HITL last block" to hitl-last-block-s0."""
    return f"{file_name(variant.lower().replace(' ', '-'))}-s{seed}"


def load_trials(names: Sequence[str | Trial], runs: Path, which: str = "last") -> list[Trial]:
    """Finished runs that can be compared, found before anything is computed.

    Args:
        names: each a folder below `runs`, such as ft-s0 or sweep/NAME, or the path of a run. What
            stands before -s<seed> is the variant. Trials stay as they are.
        which: weights that will be read.

    Raises:
        FileNotFoundError: a run is missing, unfinished, or has no weights.
        ValueError: runs have other classes, data, patch grid or normalisation, or are one variant
            but differ in more than the seed.
    """
    trials = []
    for name in names:
        if isinstance(name, Trial):
            trials.append(name)
            continue
        folder = next((path for path in (runs / name, Path(name)) if path.is_dir()), None)
        if folder is None:
            found = [file for one in ("*", "sweep/*") for file in runs.glob(f"{one}/config.json")]
            known = [file.parent.relative_to(runs).as_posix() for file in found]
            close = difflib.get_close_matches(name, known, n=8, cutoff=0)
            more = f", and {len(known) - 8} more" * (len(known) > 8)
            raise FileNotFoundError(
                f"no run {name} in {runs} (there: {', '.join(close) or 'none'}{more}); train it, "
                "name another, or set PRESET and RUNS_DIR"
            )
        run = Run.load(folder, which)
        trials.append(Trial(re.sub(r"-s\d+$", "", run.name), run.config.train.seed, run))
    if not trials:
        raise ValueError("no run is named; name one or more, such as ft-s0")
    _refuse_mixture(trials)
    return trials


def _refuse_mixture(trials: Sequence[Trial]) -> None:
    """ValueError where runs cannot stand in one table; names two of them."""
    first = trials[0].run
    ours, named, alike = _measured_on(first), {}, {}
    for trial in tqdm(trials, desc="runs", leave=False, delay=1.0):
        run = trial.run
        theirs = _measured_on(run)
        for what in ours:
            if theirs[what] != ours[what]:
                raise ValueError(
                    f"{first.folder} and {run.folder} differ in {what} "
                    f"({_difference(ours[what], theirs[what])}); evaluate them apart"
                )
        if not _of_one_data_set(first, run):
            roots = f"{first.config.data.root} and {run.config.data.root}"
            raise ValueError(
                f"{first.folder} and {run.folder} differ in their pictures (those of {roots}); "
                "evaluate them apart, or set DATA_DIR to what both are to be measured on"
            )
        twin = named.setdefault((trial.variant, trial.seed), run)
        if twin is not run:
            raise ValueError(
                f'{twin.folder} and {run.folder} are both "{trial.variant}" of seed {trial.seed}; '
                "leave one out, or rename its folder"
            )
        other = alike.setdefault(trial.variant, run)
        # Seeds may be trained on several devices: seeds.csv says in which precision.
        asked = (_without_seed(other.config), to_json(_without_seed(run.config)))
        found = difference(*asked, (*HOW, "train.mixed_precision"))
        if found:
            raise ValueError(
                f'{other.folder} and {run.folder} would be one variant, "{trial.variant}", but '
                f"{found}; rename a folder"
            )


def _measured_on(run: Run) -> dict[str, object]:
    """What runs must share to be measured on the same items, by the words of a sentence.

    One data set, its maps from one run, measures all: they may differ in maps and crops.
    """
    told, left_out = flat(run.config), PLACES + MAPS_AND_CROPS
    data = [k for k in told if k.startswith("data.") and k not in left_out]
    model = bare_model(run.config, num_classes=0)
    return {
        "their data": {k.removeprefix("data."): told[k] for k in data},
        "their classes": run.classes,
        "the patch grid": model.grid,
        "the normalisation of pictures": model.normalisation,
    }


def _of_one_data_set(one: Run, other: Run) -> bool:
    """Whether pictures of two runs are the same; of older runs only the folder's name is known."""
    roots = [run.config.data.root for run in (one, other)]
    if roots[0] == roots[1] or one.config.data.name == "toy":
        return True
    if one.made_of and other.made_of:
        return one.made_of["pictures"] == other.made_of["pictures"]
    return roots[0].name == roots[1].name


def _difference(ours: object, theirs: object) -> str:
    """The first difference of two values of `_measured_on`, in words."""
    if isinstance(ours, dict):
        key = next(k for k in ours if ours[k] != theirs[k])
        return f"{key} is {ours[key]} and {theirs[key]}"
    if isinstance(ours, list):
        pairs = [(len(ours), len(theirs)), *zip(ours, theirs, strict=False)]
        ours, theirs = next(pair for pair in pairs if pair[0] != pair[1])
    return f"{ours} and {theirs}"


def _without_seed(config: RunConfig) -> RunConfig:
    """The configuration as it is in all runs of its variant."""
    plain = from_json(RunConfig, to_json(config))
    plain.train.seed = 0
    plain.init = plain.init and re.sub(r"-s\d+$", "", plain.init)
    return plain


def labelled_as(trials: Sequence[Trial], labels: Sequence[str]) -> dict[str, str]:
    """The name of every variant for readers, in the order in which the variants first come.

    Raises:
        ValueError: not as many labels as variants, or one twice.
    """
    names = list(seeds_by_variant(trials))
    labels = list(labels) or names
    if len(labels) != len(names) or len(set(labels)) < len(labels):
        raise ValueError(
            f"label names {', '.join(labels)}; give {len(names)} names that differ, for "
            f"{', '.join(names)}"
        )
    return dict(zip(names, labels, strict=True))


def seeds_by_variant(trials: Sequence[Trial]) -> dict[str, set[int]]:
    """The seeds of every variant, in the order of the trials."""
    found: dict[str, set[int]] = {}
    for trial in trials:
        found.setdefault(trial.variant, set()).add(trial.seed)
    return found


def first_trials(trials: Sequence[Trial]) -> dict[str, Trial]:
    """Of every variant its first trial, in the order of the trials."""
    found: dict[str, Trial] = {}
    for trial in trials:
        found.setdefault(trial.variant, trial)
    return found


def yardstick_variant(trials: Sequence[Trial], against: str | None = None) -> str:
    """The variant that the others are held against.

    Without a name the first that is called control, else the first. ValueError for a name that no
    run has, or where another variant shares no seed with it.
    """
    seeds = seeds_by_variant(trials)
    names = list(seeds)
    if against is None:
        against = next((name for name in names if name.startswith("control")), names[0])
    if against not in names:
        raise ValueError(
            f'--against is "{against}", but the models are {", ".join(names)}; use one of them'
        )
    for name in names:
        if not seeds[name] & seeds[against]:
            raise ValueError(
                f'"{name}" has seeds {sorted(seeds[name])} and "{against}" '
                f"{sorted(seeds[against])}; add runs of a seed that both have, or choose another "
                "--against"
            )
    return against
