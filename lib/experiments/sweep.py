"""Sweeps: many HITL trainings on the same fine-tuned runs, measured into one tidy table.

A cell is one combination of settings, trained and measured in a folder of its own below
`runs/sweep`. Its result.json is written last, in one go: a cell that has one is done, any other is
trained, or resumed where it was killed. So a sweep that was stopped goes on by the same call.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import time
import traceback
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from lib import config as cfg
from lib.config import Config, HumanConfig, RunConfig, Sweep
from lib.edit import resolve_blocks, resolve_heads
from lib.evaluation.tables import summarise
from lib.experiments.evaluate import measure
from lib.experiments.jobs import in_processes
from lib.files import make_folder, write_text
from lib.losses import SEES_OFFSET
from lib.model.predict import processes
from lib.training.controls import supervised
from lib.training.learning import learning_blocks
from lib.training.loop import TrainingDiverged
from lib.training.runs import (
    bare_model,
    dataset_for,
    fine_tuning,
    human_in_the_loop,
    refuse_conflict,
    refuse_vain_supervision,
    train_run,
)
from lib.training.state import STATE, made_of, read_made_of

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

FOLDER = "sweep"  # below the runs folder: one folder a cell
RESULT = "result.json"  # in a cell's folder
MEASURED_ON = ("val", "test")
# The table's first columns say which training a row is of; the numbers of `summarise` follow.
KEYS = ("preset", *SETTINGS, "seed", "split")
# What is named in a cell's folder only where it is not the usual.
USUAL_MAPS = {name: USUAL[name] for name in ("maps", "annotated", "noise")}


@dataclass(frozen=True)
class Cell:
    """One training of a sweep."""

    name: str  # its folder
    config: RunConfig
    words: dict[str, Any]  # what the table says of it: KEYS but split


# ------------------------------------------------------------------------------- which trainings


def cells(config: Config, sweep: Sweep) -> list[Cell]:
    """Every combination of a sweep's settings, each that can differ from the others once.

    lam = 0 is one control a seed and trained part: no map enters it, so loss, blocks, heads,
    offset and what is done to the maps are empty. `kl` and `energy` do not see the offset, theirs
    is "none". Settings that mean the same in this model get one name: in four blocks, last4 is all.

    Raises:
        ValueError: for an unknown setting, or a block or head that the model does not have.
    """
    _refuse_unknown_words(sweep)
    model = bare_model(fine_tuning(config, seed=0), num_classes=0)
    blocks = [_supervised_blocks(word, model.depth) for word in sweep.blocks]
    heads = [_supervised_heads(word, model.num_heads) for word in sweep.heads]
    trainable = sweep.trainable or (config.hitl.trainable,)
    parts = [_learning_part(word, model.depth) for word in trainable]
    found: dict[str, Cell] = {}
    lams, maps = map(float, sweep.lam), (sweep.maps, sweep.annotated, sweep.noise)
    for seed, part, loss, lam, block, (head, head_word), offset, *changed in itertools.product(
        sweep.seeds, parts, sweep.loss, lams, blocks, heads, sweep.offset, *maps
    ):
        if lam == 0:
            human = {"lam": 0.0}
            empty = dict.fromkeys(("blocks", "heads", "offset", *USUAL_MAPS), "")
            words = {"loss": "control", "lam": 0.0} | empty
            name = "control"
        else:
            human = {"loss": loss, "lam": lam, "blocks": block, "heads": head}
            human["offset"] = offset if loss in SEES_OFFSET else "none"
            human |= dict(zip(USUAL_MAPS, changed, strict=True))
            words = human | {"blocks": _text(block), "heads": head_word}
            name = f"{loss}-l{str(lam).removesuffix('.0')}-blocks_{words['blocks']}"
            name += f"-heads_{words['heads']}-offset_{words['offset']}"
            unusual = [key for key, usual in USUAL_MAPS.items() if words[key] != usual]
            name += "".join(f"-{key}_{words[key]}" for key in unusual)
        name += f"-train_{part}-s{seed}"
        settings = human_in_the_loop(config, f"ft-s{seed}", seed, **human)
        # Tokens cannot be cached where the trunk learns.
        cached = settings.train.cache_tokens and part != "all"
        settings.train = replace(settings.train, trainable=part, cache_tokens=cached)
        words = {"preset": config.preset, **words, "trainable": str(part), "seed": seed}
        found.setdefault(name, Cell(name, settings, words))
    return list(found.values())


def _refuse_unknown_words(sweep: Sweep) -> None:
    """ValueError for a setting without a value, an unknown word, or an endless lam."""
    for name, values in asdict(sweep).items():
        if not values and name != "trainable":
            raise ValueError(f"{name} has no value; name at least one")
        for value in values:
            if name in ("loss", "offset", "maps", "noise"):
                HumanConfig(**{name: value})  # which says what is known
            if name == "lam" and not math.isfinite(value):
                raise ValueError(f"lam is {value}; it must be a number, and not below 0")


def _supervised_blocks(word: str, depth: int) -> str | tuple[int, ...]:
    """Supervised blocks as `HumanConfig` has them; a word where one means the same."""
    wanted = resolve_blocks(_as_indices(word), depth)
    words = ("all", "last", "last2", "last4")
    return next((same for same in words if resolve_blocks(same, depth) == wanted), wanted)


def _supervised_heads(word: str, count: int) -> tuple[str | tuple[int, ...], str]:
    """Supervised heads as `HumanConfig` has them ("all" where each is named), and their word."""
    if word == "mean":
        return word, word
    everyone = tuple(range(count))
    words = {"all": everyone, "half": everyone[: max(1, count // 2)], "one": (0,)}
    wanted = words.get(word, _as_indices(word))
    if isinstance(wanted, str):
        raise ValueError(f'heads is "{word}"; use all, half, one, mean, or indices such as 0,2')
    wanted = resolve_heads(wanted, count)
    short = next((w for w, heads in words.items() if heads == wanted), _text(wanted))
    return "all" if wanted == everyone else wanted, short


def _as_indices(word: str) -> str | tuple[int, ...]:
    """ "8,9" as (8, 9); another word as it is."""
    is_list = re.fullmatch(r"-?\d+(,-?\d+)*", word)
    return tuple(int(part) for part in word.split(",")) if is_list else word


def _learning_part(word: str | int, depth: int) -> str | int:
    """The part that learns as `TrainConfig` has it, "last_block" where that is the one block."""
    part = int(word) if str(word).isdecimal() else word
    learning_blocks(part, depth)  # ValueError for an unknown word or number
    return "last_block" if part == 1 else part


def _text(value: str | tuple[int, ...]) -> str:
    """A word as it is, or indices as they are named on the command line."""
    return value if isinstance(value, str) else ",".join(map(str, value))


def refuse_impossible(config: Config, chosen: Sequence[Cell]) -> None:
    """Says what would fail in any cell before the first is trained.

    Raises:
        ValueError: a supervised block is frozen, no image has a human map, the maps cannot be
            changed as asked, or a run of that name was made with another configuration
            (`RunConflict`).
    """
    model = bare_model(chosen[0].config, num_classes=0)
    augment = not chosen[0].config.train.cache_tokens  # as training reads it: it may be cached
    train_set = dataset_for(model, chosen[0].config, "train", augment)
    seen, made = set(), {}
    for cell in chosen:
        seed = cell.config.train.seed
        there = {f"ft-s{seed}": fine_tuning(config, seed), f"{FOLDER}/{cell.name}": cell.config}
        for name, stage in there.items():
            key = (stage.init, stage.train.human.lam > 0)  # the data are read once for each
            made[key] = made.get(key) or made_of(stage, config.runs)
            refuse_conflict(config.runs / name, stage, made[key])
        refuse_vain_supervision(model, train_set, cell.config.train)
        human = cell.config.train.human
        change = (human.maps, human.noise, human.annotated)
        if change not in seen:
            seen.add(change)
            supervised(train_set, human, seed)


# --------------------------------------------------------------------------------------- one cell


def train_cell(runs: Path, cell: Cell, keep_weights: bool = False) -> None:
    """Trains and measures one cell and writes its result; its weights go unless they are kept.

    That the loss is not finite is a result as well, with status "diverged" and without numbers:
    the same settings would end there again.

    Raises:
        TrainingDiverged: when that is written. OSError, ValueError: as `train_run`.
    """
    started = time.monotonic()
    folder = runs / FOLDER / cell.name
    numbers: dict[str, dict[str, float]] = {split: {} for split in MEASURED_ON}
    failure = None
    try:
        # Named from the runs folder, so that cells share the fine-tuned run and cached tokens.
        run = train_run(f"{FOLDER}/{cell.name}", cell.config, runs)
    except TrainingDiverged as error:
        failure = error
    else:
        model = run.model().to(processes().device)
        for split in MEASURED_ON:
            dataset = dataset_for(model, cell.config, split, augment=False)
            if len(dataset):  # of few pictures there are none to validate on
                summary = summarise(measure(model, dataset, cell.config, runs / "tokens"))
                numbers[split] = {name: float(value) for name, value in summary.items()}
    status = "diverged" if failure else "measured"
    common = cell.words | {"status": status, "seconds": round(time.monotonic() - started, 3)}
    rows = [common | {"split": split} | numbers[split] for split in MEASURED_ON]
    result = {"config": asdict(cell.config), "failure": failure and str(failure), "rows": rows}
    write_text(folder / RESULT, json.dumps(result, indent=2, default=str))
    if not keep_weights:
        for name in ("last.safetensors", "best.safetensors", STATE):
            (folder / name).unlink(missing_ok=True)
    if failure:
        raise failure


def attempt(runs: Path, cell: Cell, keep_weights: bool) -> tuple[str | None, bool]:
    """`train_cell` for one of many: what went wrong, in a sentence, and whether to go on here.

    After an error that nobody expected (a GPU out of memory, a bug) the process may be spoilt for
    other cells; its traceback is printed.
    """
    try:
        train_cell(runs, cell, keep_weights)
    except (OSError, ValueError, FloatingPointError) as error:
        return str(error), True
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}", False
    return None, True


# --------------------------------------------------------------------------------------- all cells


def run_sweep(
    config: Config, sweep: Sweep, out: Path, jobs: int = 1, keep_weights: bool = False
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Trains and measures what is not there yet; the table is on disk after every cell.

    Args:
        config: its fine-tuned runs are trained first where they are not there.
        out: a .csv file, see `collect`; written anew with every cell that ends.
        jobs: cells at a time. 1 trains in this process; more start processes of their own that
            share the processor cores (with other numbers of threads, sums may differ in their last
            digits) or the GPU.
        keep_weights: leave last.safetensors and best.safetensors in the folders of the cells that
            are trained now.

    Returns:
        the table, and why cells failed, by name. A cell that failed has not stopped the others;
        it is trained again by the next call, unless it diverged.

    Raises:
        ValueError, OSError: before anything is trained, see `cells` and `refuse_impossible`; or a
            fine-tuned run could not be made.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; use 1 or more")
    if processes().num_processes > 1:
        raise ValueError("a sweep trains a cell a process; start it once, alone, with --jobs")
    chosen = cells(config, sweep)
    refuse_impossible(config, chosen)
    make_folder(out.parent)
    write_table(config, out)  # a folder that cannot be written is found out now
    for seed in sweep.seeds:
        train_run(f"ft-s{seed}", fine_tuning(config, seed), config.runs)
    results = {cell.name: read_result(config.runs, cell) for cell in chosen}
    failed = {name: r["failure"] for name, r in results.items() if r and r["failure"]}
    left = [cell for cell in chosen if results[cell.name] is None]
    tasks = [(config.runs, cell, keep_weights) for cell in left]
    if jobs > 1:
        ended = in_processes(attempt, tasks, jobs, max(1, torch.get_num_threads() // jobs))
    else:
        ended = ((index, attempt(*task)[0]) for index, task in enumerate(tasks))
    done = len(chosen) - len(left)
    bar = tqdm(total=len(chosen), initial=done, desc="sweep", unit="cell")
    with closing(ended), bar:
        for index, failure in ended:
            if failure:
                failed[left[index].name] = failure
                bar.set_postfix(failed=len(failed))
            write_table(config, out)
            bar.update()
    return collect(config), failed


def read_result(runs: Path, cell: Cell) -> dict[str, Any] | None:
    """The result of a cell; None where there is none of this configuration."""
    file = runs / FOLDER / cell.name / RESULT
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    return None if cfg.difference(cell.config, json.dumps(result["config"])) else result


def collect(config: Config) -> pd.DataFrame:
    """The results of all sweeps of a preset: one row a cell and split, sorted.

    Cells of another configuration (other data, model, epochs, ...), or of other pictures than their
    fine-tuned run, are left out: a table compares what differs in its columns alone.

    Returns:
        columns `KEYS`, status ("measured", or "diverged" without numbers), those of `summarise`
        and seconds (of training and measuring, since it was last resumed).
    """
    preset = RunConfig(config.data, config.model, config.hitl)
    ours = json.loads(cfg.to_json(preset))
    rows = []
    for file in sorted((config.runs / FOLDER).glob(f"*/{RESULT}")):
        result = json.loads(file.read_text(encoding="utf-8"))
        then, now = map(read_made_of, (file.parent, config.runs / result["config"]["init"]))
        if then and now and then.get("pictures") != now.get("pictures"):
            continue
        made = result["config"] | {"init": None}
        free = ["seed", "trainable", "human"]
        if made["train"]["trainable"] == "all":
            free.append("cache_tokens")  # see `cells`
        made["train"] |= {name: ours["train"][name] for name in free}
        if cfg.difference(preset, json.dumps(made)) is None:
            for row in result["rows"]:
                # Sweeps of an older version had fewer settings to tell: theirs were the usual.
                older = dict.fromkeys(USUAL_MAPS, "") if row["loss"] == "control" else USUAL_MAPS
                rows.append(older | row)
    if not rows:
        return pd.DataFrame(columns=[*KEYS, "status", "seconds"])
    table = pd.DataFrame(rows).sort_values(list(KEYS), ignore_index=True)
    ends = [*KEYS, "status", "seconds"]
    return table[[*ends[:-1], *table.columns.difference(ends, sort=False), "seconds"]]


def write_table(config: Config, out: Path) -> None:
    """`collect` as a file, which holds the old table or the new one at any time."""
    write_text(out, collect(config).to_csv(index=False))


# ------------------------------------------------------- what a table says: settings, their cost


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
