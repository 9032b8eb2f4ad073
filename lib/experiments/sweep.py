"""Sweeps: many HITL trainings on the same fine-tuned runs, measured into one tidy table.

A cell is one combination of settings, trained and measured in a folder of its own below
`runs/sweep`. Its result.json is written last, in one go: a cell that has one is done, any other is
trained, or resumed where it was killed. So a sweep that was stopped goes on by the same call.
"""

from __future__ import annotations

import itertools
import json
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from lib.config import Config, RunConfig, Sweep
from lib.evaluation.tables import SETTINGS, USUAL, summarise, with_gains
from lib.experiments.cluster import Slurm, on_cluster
from lib.experiments.evaluate import measure
from lib.experiments.jobs import Ended, in_processes, in_turn, shares, watching
from lib.experiments.settings import (
    as_text,
    learning_part,
    refuse_unknown_words,
    supervised_blocks,
    supervised_heads,
)
from lib.files import make_folder, write_text
from lib.losses import SEES_OFFSET
from lib.model.predict import processes
from lib.training.controls import supervised
from lib.training.loop import TrainingDiverged
from lib.training.runs import (
    RunBusy,
    bare_model,
    dataset_for,
    fine_tuning,
    finished_run,
    held,
    human_in_the_loop,
    refuse_conflict,
    refuse_vain_supervision,
    train_run,
)
from lib.training.state import (
    STATE,
    difference,
    keep_what_differs,
    made_of,
    read_made_of,
    to_json,
)

FOLDER = "sweep"  # below the runs folder: one folder a cell
RESULT, FAILED = "result.json", "failed.json"  # in a cell's folder
MEASURED_ON = ("val", "test")
# The table's first columns say which training a row is of; the numbers of `summarise` follow.
KEYS = ("preset", *SETTINGS, "seed", "split")
# What is named in a cell's folder only where it is not the usual.
USUAL_MAPS = {name: USUAL[name] for name in ("maps", "annotated", "noise")}

Known = dict[tuple[Path, int], list[dict[str, Any]]]  # rows of a file as it was at that time


@dataclass(frozen=True)
class Cell:
    """One training of a sweep; or a fine-tuned run, which is measured as it is."""

    name: str  # its folder
    config: RunConfig
    words: dict[str, Any]  # what the table says of it: KEYS but split

    @property
    def run(self) -> str:
        """The run that is measured, below the runs folder."""
        return f"{FOLDER}/{self.name}" if self.config.init else f"ft-s{self.config.train.seed}"

    @property
    def start(self) -> str:
        """The run that has to be there first."""
        return self.config.init or self.run

    @property
    def in_short(self) -> str:
        """Loss, lambda and seed, for a bar."""
        lam = f" {self.words['lam']:g}" if self.words["lam"] else ""
        return f"{self.words['loss']}{lam} s{self.words['seed']}"


# ------------------------------------------------------------------------------- which trainings


def cells(config: Config, sweep: Sweep) -> list[Cell]:
    """Every combination of a sweep's settings, each that can differ from the others once.

    And, one a seed, the fine-tuned run that they start from: loss "fine-tuned".
    lam = 0 is one control a seed and trained part: no map enters it, so loss, blocks, heads,
    offset and what is done to the maps are empty. `kl` and `energy` do not see the offset, theirs
    is "none". Settings that mean the same in this model get one name: in four blocks, last4 is all.

    Raises:
        ValueError: for an unknown setting, or a block or head that the model does not have.
    """
    refuse_unknown_words(sweep)
    model = bare_model(fine_tuning(config, seed=0), num_classes=0)
    blocks = [supervised_blocks(word, model.layout) for word in sweep.blocks]
    heads = [supervised_heads(word, model.num_heads) for word in sweep.heads]
    trainable = sweep.trainable or (config.hitl.trainable,)
    parts = [learning_part(word, model.depth) for word in trainable]
    found: dict[str, Cell] = {}
    nothing = dict.fromkeys(("blocks", "heads", "offset", *USUAL_MAPS), "")
    lams, maps = map(float, sweep.lam), (sweep.maps, sweep.annotated, sweep.noise)
    for seed, part, loss, lam, block, (head, head_word), offset, *changed in itertools.product(
        sweep.seeds, parts, sweep.loss, lams, blocks, heads, sweep.offset, *maps
    ):
        if lam == 0:
            human = {"lam": 0.0}
            words = {"loss": "control", "lam": 0.0} | nothing
            name = "control"
        else:
            human = {"loss": loss, "lam": lam, "blocks": block, "heads": head}
            human["offset"] = offset if loss in SEES_OFFSET else "none"
            human |= dict(zip(USUAL_MAPS, changed, strict=True))
            words = human | {"blocks": as_text(block), "heads": head_word}
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
    for seed in sweep.seeds:
        first = fine_tuning(config, seed)
        words = {"preset": config.preset, "loss": "fine-tuned", "lam": 0.0, **nothing}
        words |= {"trainable": str(first.train.trainable), "seed": seed}
        found[f"fine-tuned-s{seed}"] = Cell(f"fine-tuned-s{seed}", first, words)
    return list(found.values())


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
        there = {f"ft-s{seed}": fine_tuning(config, seed), cell.run: cell.config}
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

    What has a result is left as it is. That the loss is not finite is a result as well, with status
    "diverged" and without numbers: the same settings would end there again.

    Raises:
        TrainingDiverged: when that is written. RunBusy: another process trains or measures it.
        OSError, ValueError: as `train_run`.
    """
    started = time.monotonic()
    folder = runs / FOLDER / cell.name
    make_folder(folder)
    with held(folder, ".cell"):  # until it is measured; `train_run` holds it while it trains
        result = read_result(runs, cell)
        if result is None:
            result = _result(runs, cell, started)
            write_text(folder / RESULT, json.dumps(result, indent=2, default=str))
            (folder / FAILED).unlink(missing_ok=True)
            if keep_weights and cell.config.init and result["failure"] is None:
                start = runs / cell.config.init / f"{cell.config.init_which}.safetensors"
                keep_what_differs(folder, start)
            if not keep_weights:
                for file in (folder / STATE, *folder.glob("*.safetensors")):
                    file.unlink(missing_ok=True)
    if result["failure"]:
        raise TrainingDiverged(result["failure"])


def _result(runs: Path, cell: Cell, started: float) -> dict[str, Any]:
    """What training and measuring a cell gives, as RESULT has it."""
    numbers: dict[str, dict[str, float]] = {split: {} for split in MEASURED_ON}
    failure = None
    try:
        # Named from the runs folder, so that cells share the fine-tuned run and cached tokens.
        run = train_run(cell.run, cell.config, runs)
    except TrainingDiverged as error:
        failure = str(error)
    else:
        model = run.model()
        for split in MEASURED_ON:
            dataset = dataset_for(model, cell.config, split, augment=False)
            if len(dataset):  # of few pictures there are none to validate on
                summary = summarise(measure(model, dataset, cell.config, runs / "tokens"))
                numbers[split] = {name: float(value) for name, value in summary.items()}
    status = "diverged" if failure else "measured"
    seconds = round(time.monotonic() - started, 3)
    rows = [
        cell.words | {"status": status, "seconds": seconds, "split": split} | numbers[split]
        for split in MEASURED_ON
    ]
    return {"config": asdict(cell.config), "failure": failure, "rows": rows}


def write_failure(runs: Path, cell: Cell, failure: str) -> None:
    """That a cell failed, for the table: no result, so that the next call tries it again."""
    rows = [cell.words | {"status": "failed", "split": split} for split in MEASURED_ON]
    result = {"config": asdict(cell.config), "failure": failure, "rows": rows}
    make_folder(runs / FOLDER / cell.name)
    write_text(runs / FOLDER / cell.name / FAILED, json.dumps(result, indent=2, default=str))


def attempt(train: Callable, *given: Any) -> Ended:
    """`train(*given)` for one of many: how it ended.

    After an error that nobody expected (a GPU out of memory, a bug) the process may be spoilt for
    others; its traceback is printed.
    """
    try:
        train(*given)
    except RunBusy as error:
        return Ended(str(error), is_busy=True)
    except (OSError, ValueError, FloatingPointError) as error:
        return Ended(str(error))
    except Exception as error:
        traceback.print_exc()
        return Ended(f"{type(error).__name__}: {error}", is_fit=False)
    return Ended()


# --------------------------------------------------------------------------------------- all cells


def run_sweep(
    config: Config,
    sweep: Sweep,
    out: Path,
    jobs: int = 1,
    keep_weights: bool = False,
    cluster: str | None = None,
    slurm: Slurm = Slurm(),  # noqa: B008
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Trains and measures what is not there yet; the table is on disk after every cell.

    Args:
        config: its fine-tuned runs are trained first where they are not there.
        out: a .csv file, see `collect`; written anew with every cell that ends.
        jobs: trainings at a time. 1 trains in this process; more start processes of their own that
            share the processor cores (with other numbers of threads, sums may differ in their last
            digits) and the GPUs, see `shares`.
        keep_weights: leave last.safetensors and best.safetensors in the folders of the cells that
            are trained now.
        cluster: address of a Dask scheduler whose workers train, one training each, or "slurm",
            see docs/cluster.md; `jobs` says nothing then.
        slurm: what SLURM is asked for.

    Returns:
        the table, and why cells failed, by name. A cell that failed has not stopped the others;
        it is trained again by the next call, unless it diverged.

    Raises:
        ValueError, OSError: before anything is trained, see `cells` and `refuse_impossible`.
        ClusterError: an OSError: no cluster, or one that does not see what this process sees.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; use 1 or more")
    if processes().num_processes > 1:
        raise ValueError("a sweep trains a cell a process; start it once, alone, with --jobs")
    chosen = cells(config, sweep)
    refuse_impossible(config, chosen)
    make_folder(out.parent)
    known: Known = {}
    write_table(config, out, known)  # a folder that cannot be written is found out now
    results = {cell.name: read_result(config.runs, cell) for cell in chosen}
    failed = {name: r["failure"] for name, r in results.items() if r and r["failure"]}
    left = [cell for cell in chosen if results[cell.name] is None]
    starts = dict.fromkeys(cell.start for cell in left)
    starts = [name for name in starts if finished_run(config.runs / name) is None]
    tasks = [(train_run, name, fine_tuning(config, int(name[4:])), config.runs) for name in starts]
    needs = {
        index: starts.index(cell.start)
        for index, cell in enumerate(left, start=len(starts))
        if cell.start in starts
    }
    tasks += [(train_cell, config.runs, cell, keep_weights) for cell in left]
    done = len(chosen) - len(left)
    bar = tqdm(total=len(chosen), initial=done, desc="sweep", unit="cell")
    shown: dict[str, object] = {}
    began = time.time()

    def show(**news: object) -> None:
        if news.items() - shown.items():  # else a log would get a line with every look
            shown.update(news)
            bar.set_postfix(shown)

    if cluster:
        ended = on_cluster(attempt, tasks, needs, cluster, slurm, config, lambda n: show(workers=n))
    elif jobs > 1:
        ended = in_processes(attempt, tasks, needs, shares(jobs))
    else:
        ended = in_turn(attempt, tasks, needs)
    told = [(name, config.runs / name) for name in starts]
    told += [(cell.in_short, config.runs / cell.run) for cell in left if cell.config.init]
    look = lambda: show(training=under_way(told, began))  # noqa: E731
    with closing(ended), bar, watching(look) if cluster or jobs > 1 else nullcontext():
        for index, failure in ended:
            if index < len(starts):
                known.clear()  # what is left out depends on its pictures
                continue
            cell = left[index - len(starts)]
            if failure is None and not appears(config.runs / FOLDER / cell.name / RESULT):
                failure = "its result does not appear here; are all runs folders the same one?"
            if failure:
                failed[cell.name] = failure
                show(failed=len(failed))
                if read_result(config.runs, cell) is None:
                    write_failure(config.runs, cell, failure)
            write_table(config, out, known)
            bar.update()
    return collect(config, known), failed


def read_result(runs: Path, cell: Cell) -> dict[str, Any] | None:
    """The result of a cell; None where there is none of this configuration."""
    file = runs / FOLDER / cell.name / RESULT
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    return None if difference(cell.config, json.dumps(result["config"])) else result


def under_way(folders: Sequence[tuple[str, Path]], since: float) -> str:
    """Trainings of which something was written since a time, and their epochs, by name."""
    found = []
    for name, folder in folders:
        told = folder / "config.json"
        if not told.is_file() or told.stat().st_mtime < since or (folder / RESULT).is_file():
            continue
        history = folder / "history.csv"
        done = len(history.read_text(encoding="utf-8").splitlines()) - 1 if history.is_file() else 0
        epochs = json.loads(told.read_text(encoding="utf-8"))["train"]["epochs"]
        if done < epochs or folder.parent.name == FOLDER:  # else it is being measured
            found.append(f"{name} {done}/{epochs}")
    return ", ".join(found) or "none"


def appears(file: Path, seconds: float = 90.0) -> bool:
    """Whether a file is there: one that another host wrote may be seen late on NFS."""
    end = time.monotonic() + seconds
    while not file.is_file() and time.monotonic() < end:
        time.sleep(1.0)
    return file.is_file()


def collect(config: Config, known: Known | None = None) -> pd.DataFrame:
    """The results of all sweeps of a preset: one row a cell and split, sorted.

    Cells of another configuration (other data, model, epochs, ...), or of other pictures than their
    fine-tuned run, are left out: a table compares what differs in its columns alone.

    Args:
        known: rows of files that were read before, and now of all: each is read and compared once.

    Returns:
        columns `KEYS`, status ("measured", or "diverged" or "failed" without numbers), those of
        `summarise`, their gains on the control (`with_gains`), seconds (of training and measuring,
        since it was last resumed) and failure (what went wrong, empty where nothing did).
    """
    folder, known = config.runs / FOLDER, {} if known is None else known
    found = {file.parent: file for name in (FAILED, RESULT) for file in folder.glob(f"*/{name}")}
    rows = []
    for _, file in sorted(found.items()):  # a result, where a cell has both
        key = (file, file.stat().st_mtime_ns)
        if key not in known:
            known[key] = _rows_of_result(config, file)
        rows += known[key]
    first, last = [*KEYS, "status"], ["seconds", "failure"]
    if not rows:
        return pd.DataFrame(columns=[*first, *last])
    table = with_gains(pd.DataFrame(rows).sort_values(list(KEYS), ignore_index=True))
    numbers = table.columns.difference([*first, *last], sort=False)
    return table.reindex(columns=[*first, *numbers, *last])  # what failed has no seconds


def _rows_of_result(config: Config, file: Path) -> list[dict[str, Any]]:
    """The rows of one result; none where it does not belong to this table, see `collect`."""
    result = json.loads(file.read_text(encoding="utf-8"))
    made, free = result["config"] | {"init": None}, ["seed", "trainable", "human"]
    if result["config"]["init"]:
        then, now = map(read_made_of, (file.parent, config.runs / result["config"]["init"]))
        if then and now and then.get("pictures") != now.get("pictures"):
            return []
        preset = replace(human_in_the_loop(config, "", config.hitl.seed), init=None)
    else:
        preset, free = fine_tuning(config, config.ft.seed), ["seed"]
    ours = json.loads(to_json(preset))
    if made["train"]["trainable"] == "all":
        free.append("cache_tokens")  # see `cells`
    made["train"] |= {name: ours["train"][name] for name in free}
    if difference(preset, json.dumps(made)) is not None:
        return []
    # Sweeps of an older version had fewer settings to tell: theirs were the usual.
    is_mapless = result["rows"][0]["lam"] == 0  # all rows are of one training
    older = dict.fromkeys(USUAL_MAPS, "") if is_mapless else USUAL_MAPS
    return [older | row | {"failure": result["failure"] or ""} for row in result["rows"]]


def write_table(config: Config, out: Path, known: Known) -> None:
    """`collect` as a file, which holds the old table or the new one at any time."""
    write_text(out, collect(config, known).to_csv(index=False))
