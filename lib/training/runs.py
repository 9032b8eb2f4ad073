"""Runs on disk: a trained model in a folder, made once, loaded the next time, resumed when killed.

`train_run` is what notebooks and commands call. Where several processes train together, all call
it and the main one writes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.utils import set_seed
from filelock import FileLock, Timeout

from lib import config as cfg
from lib.config import Config, DataConfig, RunConfig, TrainConfig
from lib.data.classes import other_classes
from lib.data.dataset import DATA_SETS, BirdDataset, make_dataset
from lib.files import StorageError, make_folder, write_text
from lib.model.predict import processes
from lib.model.vit import SigmoidViT, create_model
from lib.model.zero_shot import read_embeddings, zero_shot
from lib.training.controls import supervised
from lib.training.learning import learning_blocks
from lib.training.loop import fit, refuse_missing
from lib.training.state import (
    MADE_OF,
    STATE,
    Progress,
    difference,
    from_json,
    load_kept,
    load_start,
    made_of,
    read_made_of,
    settled,
    start_log,
    to_json,
)
from lib.training.tokens import with_cached_tokens

ANEW = "train again with --overwrite, delete the folder, or choose another runs folder (RUNS_DIR)"


class RunConflict(ValueError):
    """A run of that name exists and was made with another configuration, or of other data."""


class Unfinished(FileNotFoundError):
    """A folder holds no complete run."""


class NoHumanMaps(ValueError):
    """Human attention is to be learned, but no training image has a map."""


class RunBusy(OSError):
    """Another process is training the run at this moment."""


@dataclass(frozen=True)
class Run:
    """A trained model in its folder: config.json, classes.json, history.csv, last and best weights.

    `name` is the folder below the runs folder. Labels of its data sets count in its own classes.
    """

    folder: Path
    config: RunConfig

    @classmethod
    def load(cls, folder: Path, which: str = "last") -> Run:
        """A finished run; `which` weights must be there: last, best, or epoch10 where it kept them.

        Its data are looked for, see `located`.

        Raises:
            Unfinished: a FileNotFoundError, names the folder and what is missing.
        """
        folder = Path(folder)
        for name in ("config.json", "classes.json"):
            if not (folder / name).is_file():
                raise Unfinished(f"{folder} is no finished run: it has no {name}; train it")
        text = (folder / "config.json").read_text(encoding="utf-8")
        config = from_json(RunConfig, text)
        run = cls(folder, replace(config, data=located(config.data)))
        made, wanted = len(run.history), run.config.train.epochs
        if made < wanted:
            raise Unfinished(
                f"{folder} is no finished run: it stopped after {made} of {wanted} epochs; resume "
                "it (`python -m lib train ... --resume`, or the same call again)"
            )
        kept = sorted(file.stem for file in folder.glob("*.safetensors"))
        if which not in kept:
            why = f"{which}: there are {', '.join(kept)}"
            if not kept:
                why = "weights: a sweep keeps none without --keep-weights; train it again"
            raise Unfinished(f"{folder} has no {why}")
        return run

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def classes(self) -> list[str]:
        """Class names by label."""
        return json.loads((self.folder / "classes.json").read_text(encoding="utf-8"))

    @property
    def made_of(self) -> dict[str, Any] | None:
        """What `made_of` said as it was trained; None of a run that is older than this file."""
        return read_made_of(self.folder)

    @property
    def history(self) -> pd.DataFrame:
        """One row an epoch; empty before the first is over."""
        file = self.folder / "history.csv"
        return pd.read_csv(file) if file.is_file() else pd.DataFrame()

    @property
    def progress(self) -> Progress:
        """Where the training stood when it was over, for those who watch."""
        steps = pd.read_csv(self.folder / "steps.csv").to_dict("records")
        return Progress(len(self.history), history=self.history.to_dict("records"), steps=steps)

    def model(self, which: str = "last", device: torch.device | str | None = None) -> SigmoidViT:
        """The trained model, in evaluation mode: on the GPU that is there, or on `device`."""
        model = self._bare()
        load_kept(model, self.folder / f"{which}.safetensors", self.config)
        return model.to(device or processes().device).eval()

    def dataset(self, split: str) -> BirdDataset:
        """A split of the run's data on the run's grid, not augmented.

        OtherClasses (a ValueError) where the data's classes are not those of the run.
        """
        return dataset_for(self._bare(), self.config, split, augment=False)

    def _bare(self) -> SigmoidViT:
        model = bare_model(self.config, len(self.classes))
        model.classes = self.classes
        return model


def train_run(
    name: str,
    config: RunConfig,
    runs: Path,
    overwrite: bool = False,
    watch: Callable[[Progress], None] | None = None,
) -> Run:
    """The run `runs/name`: loaded when it is there, resumed when it was stopped, else trained.

    Args:
        name: folder of the run below `runs`. config: all that decides the result.
        overwrite: train again even if a run of that name is there.
        watch: called with the progress of the training, e.g. `LiveCurves()` of lib/widgets; of a
            run that is there already, once.

    Raises:
        RunConflict: a run of that name was made with another configuration, or of other data;
            names a difference.
        RunBusy: another process trains it. StorageError: the folder cannot be written.
        ValueError: human attention cannot be learned so, fp16 needs a GPU, or a tracker is not
            installed (TrackerMissing); no folder is made then.
    """
    folder = runs / name
    config = settled(config, processes().device, None if overwrite else folder)
    try:
        made = made_of(config, runs)
    except FileNotFoundError:  # a finished run can be used without its data; a training says so
        made = None
    known = None
    if not overwrite:
        refuse_conflict(folder, config, made)
        if (folder / "classes.json").is_file():
            known = Run(folder, config).classes
        run = finished_run(folder)
        if run:
            run = replace(run, config=config)  # as the caller has the data, here and now
            (folder / STATE).unlink(missing_ok=True)  # of a process that was killed as it finished
            if watch and processes().is_main_process:
                watch(run.progress)
            return run
    refuse_missing(config.train)
    model, train_set = starting_point(config, runs, known)
    refuse_vain_supervision(model, train_set, config.train)
    val_set = dataset_for(model, config, "val", augment=False)
    told = {"config.json": to_json(config), "classes.json": json.dumps(train_set.classes)}
    told[MADE_OF] = json.dumps(made)
    if config.train.cache_tokens:
        with processes().main_process_first():  # the others find its tokens on disk
            place = (config, runs / "tokens")
            train_set = with_cached_tokens(model, train_set, *place, config.train.mixed_precision)
            val_set = with_cached_tokens(model, val_set, *place)
    processes().wait_for_everyone()  # all have looked at the folder before it is written to
    with _prepared(folder, told, overwrite):
        if processes().is_main_process:
            start_log(folder, config, model)
        fit(model, config.train, train_set, val_set, folder, watch)
    processes().wait_for_everyone()
    return Run.load(folder)


@contextmanager
def _prepared(folder: Path, told: dict[str, str], overwrite: bool) -> Iterator[None]:
    """The folder of a run, held by this training alone, with the files `told` written."""
    if not processes().is_main_process:
        processes().wait_for_everyone()
        yield
        return
    make_folder(folder)
    with held(folder):
        made = ("history.csv", "steps.csv", STATE)
        for path in folder.iterdir():  # a process that was killed leaves what it was writing
            is_made = path.name in made or path.suffix == ".safetensors"
            if path.suffix == ".tmp" or (overwrite and is_made):
                path.unlink()
        for file, text in told.items():
            write_text(folder / file, text)
        processes().wait_for_everyone()
        yield


@contextmanager
def held(folder: Path, name: str = ".lock") -> Iterator[None]:
    """A folder that is there, held by this process alone; the system lets go of a dead one's.

    Raises:
        RunBusy: another process holds it. StorageError: it cannot be written to.
    """
    lock = FileLock(folder / name)
    try:
        lock.acquire(timeout=0)
    except PermissionError as error:
        raise StorageError(
            f"{folder} cannot be written to ({error.strerror}); name a runs folder that can "
            "(RUNS_DIR)"
        ) from error
    except Timeout as error:
        raise RunBusy(
            f"{folder} is being trained by another process; wait for it, or choose another name"
        ) from error
    try:
        yield
    finally:
        lock.release()


def refuse_conflict(folder: Path, config: RunConfig, made: dict[str, Any] | None = None) -> None:
    """RunConflict when `folder` holds a run of another configuration; names a difference.

    With `made`, what `made_of` says now, also when it was made of other data.
    """
    if not (folder / "config.json").is_file():
        return
    text = (folder / "config.json").read_text(encoding="utf-8")
    found = difference(config, text)
    if found:
        raise RunConflict(
            f"{folder} was made with another configuration ({found}); choose another name or "
            "runs folder (RUNS_DIR), or delete the folder"
        )
    found = made and changes(Run(folder, from_json(RunConfig, text)), config, made)
    if found:
        raise RunConflict(f"{folder} {found}; {ANEW}")


def finished_run(folder: Path) -> Run | None:
    """The run of a folder; None where there is none, or where it is not complete."""
    try:
        return Run.load(folder)
    except Unfinished:
        return None


def changes(run: Run, config: RunConfig, made: dict[str, Any]) -> str | None:
    """What a run was made of that `made_of` tells otherwise now, in words; None: nothing."""
    if "classes" in made and (run.folder / "classes.json").is_file():
        found = other_classes(run.classes, made["classes"])
        if found:
            return found
    then = run.made_of
    if then is None:  # an older run: the names of files and folders are all that it knows
        here, there = config, run.config
        places = [(here.data.root, there.data.root, "pictures")]
        if config.train.human.lam > 0:
            places.append((here.data.maps_dir, there.data.maps_dir, "human maps"))
        if config.init is None:
            places.append((here.model.weights, there.model.weights, "weights"))
        for ours, theirs, what in places[config.data.name == "toy" :]:
            if ours and theirs and ours.name and theirs.name and ours.name != theirs.name:
                return f"was made of the {what} in {theirs}, and here are those in {ours}"
        return None
    for what, name in (("pictures", "training pictures"), ("maps", "human maps")):
        old, new = (Counter(one.get(what, ())) for one in (then, made))
        gone, added = (old - new).total(), (new - old).total()
        both = min(gone, added)
        told = {"changed": both, "gone": gone - both, "new": added - both}
        if gone or added:
            told = ", ".join(f"{count} {word}" for word, count in told.items() if count)
            return f"was made of other {name} (of {old.total()}: {told})"
    if then["start"] and made["start"] not in (None, then["start"]):
        start = config.init or config.model.weights
        return f"started from other weights than those that are now in {start}"
    return None


def located(data: DataConfig) -> DataConfig:
    """A remembered configuration, with the places where its data are now.

    DATA_DIR, MAPS and SPLIT win where they name the same kind; else what is remembered, if it is
    there; else datasets/, if it holds such data. What lay in or beside the data's folder is looked
    for there.
    """
    here = cfg.preset(data.name if data.name in cfg.PRESETS else "folder").data
    is_gone = not data.root.is_dir() and _holds(here.root, data.name)
    root = here.root if is_gone or os.environ.get("DATA_DIR") else data.root

    def moved(path: Path | None) -> Path | None:
        for old, new in ((data.root, root), (data.root.parent, root.parent)):
            if path and path.is_relative_to(old) and (new / path.relative_to(old)).exists():
                return new / path.relative_to(old)
        return path

    maps, split, cache = moved(data.maps_dir), moved(data.split_file), moved(data.cache)
    if os.environ.get("MAPS") and here.maps == data.maps:
        maps = here.maps_dir
    if here.split_md5 and here.split_md5 == data.split_md5:
        split = here.split_file
    if cache and not cache.is_dir():
        cache = here.cache
    return replace(data, root=root, maps_dir=maps, split_file=split, cache=cache)


def _holds(root: Path, name: str) -> bool:
    """Whether a folder holds a data set of that kind."""
    try:
        return name == "toy" or bool(DATA_SETS[name].pictures(root))
    except (OSError, ValueError):
        return False


def starting_point(
    config: RunConfig, runs: Path, classes: list[str] | None = None
) -> tuple[SigmoidViT, BirdDataset]:
    """The model before its first step, on the GPU that is there, and its training images.

    With `config.init` the weights are those of that run, `config.init_which` of them; else the
    trunk is read from `config.model.weights` and the head is new, drawn by `config.train.seed` or
    made of `config.model.zero_shot`, for `classes` in their order, or for those of the data.
    """
    if config.init is not None:
        first = Run.load(runs / config.init, config.init_which)
        model = replace(first, config=config).model(config.init_which)  # drop path is its own
        return model, training_set(model, config)
    set_seed(config.train.seed)
    text = read_embeddings(config.model.zero_shot) if config.model.zero_shot else None
    model = bare_model(config, num_classes=text.width if text else 0)
    load_start(model, config.model)
    model.classes = classes
    train_set = training_set(model, config)
    if len(train_set.classes) < 2:
        raise ValueError(
            f"{config.data.root} has one class alone, {train_set.classes[0]!r}: there is nothing "
            "to tell it from; sort the pictures into folders, one a class, of two classes or more"
        )
    set_seed(config.train.seed)  # the new head is the same whatever the trunk drew
    model.classes = train_set.classes
    if text:
        zero_shot(model, text.of(model.classes))
    else:
        model.vit.reset_classifier(len(model.classes))
    return model.to(processes().device), train_set


def bare_model(config: RunConfig, num_classes: int) -> SigmoidViT:
    """The architecture of a run, its weights not loaded yet."""
    overrides = {"drop_path_rate": config.train.drop_path, **config.model.overrides}
    overrides |= {"norm_eps": config.model.norm_eps, "normalisation": config.data.normalisation}
    return create_model(config.model.name, num_classes, config.data.image_size, **overrides)


def dataset_for(model: SigmoidViT, config: RunConfig, split: str, augment: bool) -> BirdDataset:
    """A split on the model's grid, normalised as its weights expect, with labels by its classes."""
    form = (model.grid, *model.normalisation)
    return make_dataset(config.data, split, *form, augment=augment, classes=model.classes)


def training_set(model: SigmoidViT, config: RunConfig) -> BirdDataset:
    """The training images as a run trains on them: crops, and the maps of `config.train.human`.

    Without human attention in its loss a run has no maps: drawing and cropping them takes a third
    of the time that a small picture takes.
    """
    human = config.train.human
    if human.lam == 0:
        config = replace(config, data=replace(config.data, maps="none", maps_dir=None))
    dataset = dataset_for(model, config, "train", augment=not config.train.cache_tokens)
    return dataset if human.lam == 0 else supervised(dataset, human, config.train.seed)


def refuse_vain_supervision(model: SigmoidViT, train_set: BirdDataset, config: TrainConfig) -> None:
    """ValueError when human attention is to be learned, but cannot be: a silent control.

    A supervised block is frozen, or no image has a map (`NoHumanMaps`). A single map is enough: the
    original method corrects a few images only.
    """
    human = config.human
    if human.lam == 0:
        return
    first = model.depth - learning_blocks(config.trainable, model.depth)
    for block in model.layout.resolve(human.blocks):
        if block < first:
            raise ValueError(
                f'block {block} is supervised, but trainable="{config.trainable}" freezes it; '
                'supervise blocks="last" with trainable="last_block", or train all'
            )
    if not train_set.has_map.any():
        name = train_set.config.name
        known = ["gaze"] if name == "toy" else DATA_SETS[name].maps
        known = " or ".join([*known, "a folder of map files"])
        raise NoHumanMaps(
            f"lam is {human.lam:g}, but none of the {len(train_set)} training images has a human "
            f"map; set MAPS to {known}, or train with lam=0"
        )


def fine_tuning(config: Config, seed: int) -> RunConfig:
    """Stage 1 of a preset with a training seed."""
    return RunConfig(config.data, config.model, replace(config.ft, seed=seed))


def human_in_the_loop(config: Config, init: str, seed: int, **human: object) -> RunConfig:
    """Stage 2 on top of the run `init`; `human` changes fields of the preset's `HumanConfig`.

    `lam=0` is the control: the same extra epochs without human maps.
    """
    stage = replace(config.hitl, seed=seed, human=replace(config.hitl.human, **human))
    data = replace(config.data, **config.hitl_data)
    return RunConfig(data, config.model, stage, init, config.init_which)
