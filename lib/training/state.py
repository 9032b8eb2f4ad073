"""Where a training stands, on disk: written whole or not at all, and read back bit for bit.

Beside it stands what it is made of: data and weights that may have changed when it is met again.

What is random is a function of the seed and of the step (`noise`, `Batches`), never of what was
drawn before. So a checkpoint holds weights, optimiser, scaler and counters, but no generator.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.data import Sampler
from tqdm.auto import tqdm

from lib.config import DataConfig, ModelConfig, RunConfig, T, TrainConfig
from lib.data.dataset import read_records
from lib.data.maps import HumanSource
from lib.data.sources import Record
from lib.files import one_form, write_bytes, write_text
from lib.model.predict import processes
from lib.model.vit import SigmoidViT
from lib.model.weights import load_weights, save_weights, write_state
from lib.training.learning import model_summary, precision, trained_state

STATE = "state.pt"  # in a run's folder while it is being trained
MADE_OF = "made_of.json"  # in a run's folder, see `made_of`
LOG = "train.log"  # in a run's folder, see `start_log`
RESTS_ON = "rests_on"  # in the metadata of weights, see `keep_what_differs`

# Fields of a RunConfig that say how a run is made, and nothing about what comes out.
HOW = ("train.workers", "train.log_every", "train.checkpoint_minutes", "train.trackers")
HOW += ("train.checkpoint_blocks", "train.save_every", "data.cache")

# Fields of a RunConfig that say where files lie, which decides nothing: what is in them does, which
# a run keeps beside its configuration. Only that there is one, or none, is part of a run.
PLACES = ("data.root", "data.maps_dir", "data.split_file", "model.weights", "model.zero_shot")

# Fields that say where human maps come from: of no weight for a model that learns without them.
MAPS = ("maps", "maps_dir", "gaze_runs", "sigma", "sigma_unit", "weight")
MAPS = tuple(f"data.{name}" for name in MAPS)

# Fields of DataConfig that say nothing about whole pictures, whose tokens may so be shared, and
# which runs of one evaluation may differ in: the maps, and what is done in training alone.
MAPS_AND_CROPS = (*MAPS, "data.crop_scale", "data.crop_ratio", "data.flip", "data.cache")


def noise(*key: int) -> int:
    """A seed for torch from whole numbers, such as (seed, step): all different, and repeatable."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


class Batches(Sampler):
    """The batches of one epoch for one process, as lists of `(index, seed of its augmentation)`.

    A function of seed and epoch alone: the same whatever the number of processes and of loading
    workers, and from whatever step an epoch goes on. Every image is met once an epoch. Accelerate's
    own sharding repeats images to fill the last batch; here a process whose part of it is empty
    gets one image to keep step with the others, and `share` says that it does not count.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, process: int = 0, processes: int = 1
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.process, self.processes = process, processes
        self.epoch, self.step = 0, 0

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def go_to(self, epoch: int, step: int) -> None:
        """The next iteration is over `epoch` (from 0) and begins at its batch `step`."""
        self.epoch, self.step = epoch, step

    def size(self, step: int) -> int:
        """Images in batch `step`, of all processes together."""
        return min(self.batch_size, self.count - step * self.batch_size)

    def own(self, step: int) -> int:
        """Images of this process in batch `step` that count."""
        return len(range(self.process, self.size(step), self.processes))

    def share(self, step: int) -> float:
        """Weight of this process's mean loss, so that the mean over processes is that of all."""
        return self.own(step) * self.processes / self.size(step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(noise(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        seeds = torch.randint(2**62, (self.count,), generator=generator).tolist()
        items = list(zip(order, seeds, strict=True))
        for step in range(self.step, len(self)):
            batch = items[step * self.batch_size : (step + 1) * self.batch_size]
            yield batch[self.process :: self.processes] or batch[:1]


@dataclass
class Progress:
    """Where a training stands, beside weights and optimiser.

    `history` has one row a finished epoch, `steps` one every few steps.
    """

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the epoch under way
    # Of the epoch under way: sums of `train_one_epoch`, over so many images. Of this process alone,
    # or, since they were last gathered, of all in the main one.
    sums: Tensor = field(default_factory=lambda: torch.zeros(3))
    seen: float = 0
    best: float = -1.0  # highest validation accuracy
    history: list[dict[str, float]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Training:
    """The moving parts of one training, and their way to disk and back.

    Attributes:
        model, ema: the model, and the average of its weights if there is one.
        optimizer: as Accelerate prepared it.
        best: the parameters that learn, of the best epoch so far; None before the first.
    """

    model: SigmoidViT
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    ema: ModelEmaV3 | None = None
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] | None = None

    @property
    def result(self) -> SigmoidViT:
        """The model that is measured and kept: the average of the weights where there is one."""
        return self.ema.module if self.ema else self.model

    def gather_sums(self, everywhere: bool = False) -> None:
        """The sums of all processes go to the main one, and to the others only if `everywhere`."""
        if self.accelerator.num_processes > 1:
            progress = self.progress
            seen = torch.tensor([float(progress.seen)], device=progress.sums.device)
            whole = self.accelerator.reduce(torch.cat([progress.sums, seen]), "sum")
            if not (everywhere or self.accelerator.is_main_process):
                whole = torch.zeros_like(whole)
            progress.sums, progress.seen = whole[:-1], whole[-1].item()

    def end_epoch(self, row: dict[str, float]) -> None:
        """Adds the epoch's row to the history, and keeps the weights if no epoch was better."""
        progress = self.progress
        progress.history.append(row)
        progress.epoch, progress.step, progress.seen = progress.epoch + 1, 0, 0
        progress.sums = torch.zeros_like(progress.sums)
        # Of equals the earliest stays; without validation (NaN) every epoch is the best so far.
        if not row["val_top1"] <= progress.best:
            progress.best = row["val_top1"]
            state = self.result.vit.state_dict()
            learned = trained_state(self.model)
            self.best = {name: state[name].to("cpu", copy=True) for name in learned}

    def save(self, folder: Path) -> None:
        """Writes the checkpoint; StorageError leaves the one before as it was."""
        scaler, learned = self.accelerator.scaler, trained_state(self.model)
        average = self.ema and self.ema.module.vit.state_dict()
        state = {
            "model": learned,
            "ema": average and {name: average[name] for name in learned},
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler and scaler.state_dict(),
            "progress": asdict(self.progress),
        }
        buffer = io.BytesIO()  # torch.save tells of a full disk in words of its own
        torch.save(state, buffer)
        write_bytes(folder / STATE, buffer.getbuffer())

    def finish(self, folder: Path) -> None:
        """Writes last.safetensors and best.safetensors in the place of the checkpoint."""
        self.write_best(folder)
        save_weights(self.result, folder / "last.safetensors")
        (folder / STATE).unlink(missing_ok=True)

    def write_best(self, folder: Path) -> None:
        """Writes best.safetensors, if an epoch is finished."""
        if self.best:
            state = {**self.model.vit.state_dict(), **self.best}
            write_state(state, folder / "best.safetensors", self.model.grid)

    def load(self, folder: Path) -> None:
        """Goes on from the checkpoint of `folder`, if there is one."""
        if not (folder / STATE).is_file():
            return
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        self.model.vit.load_state_dict(state["model"], strict=False)
        if self.ema:
            self.ema.module.vit.load_state_dict(state["ema"], strict=False)
        self.best = state["best"]
        for group in state["optimizer"]["param_groups"]:  # it may have been on another device
            group["fused"] = self.accelerator.device.type == "cuda"
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        if not self.accelerator.is_main_process:  # see `gather_sums`
            self.progress.sums, self.progress.seen = torch.zeros(3), 0


def keep_what_differs(folder: Path, start: Path) -> None:
    """Leaves in a run's weights what is not, bit for bit, in those that it started from.

    Where a trunk was frozen that is a small part. `load_kept` puts them together again.

    Raises:
        StorageError: they cannot be written; the whole ones are still there.
    """
    first = safetensors.torch.load_file(start)
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as content:
            told = content.metadata() or {}
            own = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        left = {k: v for k, v in own.items() if k not in first or not torch.equal(v, first[k])}
        if len(left) < len(own):
            write_bytes(file, safetensors.torch.save(left, told | {RESTS_ON: _md5_of(start)}))


def load_kept(model: SigmoidViT, file: Path, config: RunConfig) -> None:
    """Weights of a run, whole or what `keep_what_differs` left of them, into `model`.

    Raises:
        FileNotFoundError, WeightsError: as `load_weights`; or what they rest on is gone.
    """
    rests_on = None
    unreadable = (OSError, safetensors.SafetensorError)  # `load_weights` says what is wrong
    with suppress(*unreadable), safetensors.safe_open(file, "pt") as content:
        rests_on = (content.metadata() or {}).get(RESTS_ON)
    if rests_on is None:
        load_weights(model, file)
        return
    name = f"{config.init}/{config.init_which}.safetensors"
    starts = [folder / name for folder in file.parents[1:3]]  # a sweep's lie one deeper
    start = next((one for one in starts if one.is_file() and _md5_of(one) == rests_on), None)
    if start is None:
        raise FileNotFoundError(
            f"{file} has only what differs from the {name} that it was trained from, which is gone "
            "or another one; train it again"
        )
    load_weights(model, start)
    model.vit.load_state_dict(safetensors.torch.load_file(file), strict=False)


def load_start(model: SigmoidViT, config: ModelConfig) -> None:
    """The weights that the first stage starts from, if any are named, and a line about them."""
    if config.weights is None:
        return
    report, head = load_weights(model, config.weights), "is new"
    if config.zero_shot:
        head = f"is made of {config.zero_shot.name}"
        if "head.weight" in report.new:  # SigLIP has nothing between the tower and the texts
            model.vit.reset_classifier(0)
    if processes().is_main_process:
        tqdm.write(f"{config.weights.name}: {report}; the head {head}")


def start_log(folder: Path, config: RunConfig, model: SigmoidViT) -> None:
    """train.log of a run: what was asked for and what learns. One that goes on adds to its own."""
    if (folder / STATE).is_file() and (folder / LOG).is_file():
        add_to_log(folder, "goes on")
        return
    asked = (f"{name}: {value}" for name, value in flat(config).items())
    text = "\n".join([*asked, "", model_summary(model, config.train.trainable), ""])
    write_text(folder / LOG, text)


def add_to_log(folder: Path, line: str) -> None:
    """A line more, with the time of day."""
    file = folder / LOG
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    write_text(file, f"{before}{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")


def settled(config: RunConfig, device: torch.device, folder: Path | None = None) -> RunConfig:
    """A configuration whose precision is named: what "auto" is on the device.

    A run that is in `folder`, finished or stopped half way on whatever device, keeps its own.
    """
    asked = config.train.mixed_precision
    if asked == "auto" and folder is not None:
        # No run yet, no folder that one could be in, or a run of before there was a choice.
        with suppress(FileNotFoundError, NotADirectoryError, KeyError):
            told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            asked = told["train"]["mixed_precision"]
    found = precision(asked, device)
    return replace(config, train=replace(config.train, mixed_precision=found))


def made_of(config: RunConfig, runs: Path) -> dict[str, Any]:
    """What a run is made of beside its configuration, wherever it lies and whenever it was copied.

    Returns:
        start: the md5 of the weights that it starts from, and of a zero-shot head's embeddings;
        None for random ones. Of data on disk also classes: names by label; pictures: a checksum of
        class, name and byte size of each training picture; maps: a checksum of what people gave for
        each, if it is to be learned.
    """
    start = [config.model.weights, config.model.zero_shot]
    if config.init:
        start = [runs / config.init / f"{config.init_which}.safetensors"]
    known = [_md5_of(file) for file in start if file is not None and file.is_file()]
    found: dict[str, Any] = {"start": "+".join(known) or None}
    if config.data.name == "toy" and config.data.maps != "corrections":
        return found  # all of it is drawn from the configuration
    data = config.data
    if config.train.human.lam == 0:
        data = replace(data, maps="none", maps_dir=None)
    records, found["classes"] = read_records(data, "train")
    found["pictures"] = picture_checksums(records, found["classes"])
    if config.train.human.lam > 0:
        said = [(_picture_name(r, found["classes"]), _said(r.human)) for r in records if r.human]
        found["maps"] = sorted(_checksum(*one) for one in said)
    return found


def read_made_of(folder: Path) -> dict[str, Any] | None:
    """What `made_of` said as the run of a folder was trained; None of an older one."""
    file = folder / MADE_OF
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def picture_checksums(records: Sequence[Record], classes: Sequence[str]) -> list[str]:
    """8 hex digits of class, file name and byte size of each picture on disk."""
    files = [record for record in records if isinstance(record.image, Path)]
    sizes = [one.image.stat().st_size if one.image.is_file() else None for one in files]
    names = [_picture_name(record, classes) for record in files]
    return sorted(map(_checksum, names, sizes))


def _picture_name(record: Record, classes: Sequence[str]) -> str:
    """Of a picture, whatever number its class folder has."""
    is_file = isinstance(record.image, Path)
    return f"{classes[record.label]}/{record.image.name if is_file else record.image_id}"


def _md5_of(path: Path) -> str:
    return _md5(path, path.stat().st_size, path.stat().st_mtime_ns)


@lru_cache(maxsize=20_000)  # people's maps are small, and each run of a comparison asks
def _md5(path: Path, size: int, changed: int) -> str:
    """Of a file's content; its size and time make a changed file another one."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _checksum(name: str, content: object) -> str:
    text = one_form(f"{name}\0{content}")  # copied from a Mac, or not
    return f"{zlib.crc32(text.encode(errors='surrogateescape')):08x}"


def _said(human: HumanSource) -> str:
    if isinstance(human, Path):
        return _md5_of(human)
    looks = human if isinstance(human, tuple) else (human,)
    return json.dumps([asdict(look) for look in looks], default=lambda array: array.tolist())


def to_json(config: Any) -> str:
    """A dataclass as JSON, paths as text: what stands beside a trained model."""
    return json.dumps(asdict(config), indent=2, default=str)


def from_json(kind: type[T], text: str) -> T:
    """The dataclass `kind` from JSON made by `to_json`."""
    return _from_plain(kind, json.loads(text))


def _from_plain(kind: Any, value: Any) -> Any:
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _from_plain(hints[name], part) for name, part in value.items()})
    if Path in (kind, *get_args(kind)) and value is not None:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def difference(config: RunConfig, text: str, but: tuple[str, ...] = HOW) -> str | None:
    """The first field not in `but` that differs from JSON made by `to_json`, in words."""
    # A field that is younger than the text had the value that it now has by default.
    young = flat(RunConfig(DataConfig(), ModelConfig(), TrainConfig()))
    ours, theirs = flat(config), young | _flatten(json.loads(text))
    if ours["train.human.lam"] == theirs["train.human.lam"] == 0:
        but += MAPS
    for key in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(key), theirs.get(key)
        if key in PLACES:
            here, there = here is None, there is None
        if key == "train.mixed_precision" and "auto" in (here, there):
            continue  # whatever the device chose, or will choose
        if here != there and key not in but:
            return f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
    return None


def flat(config: Any) -> dict[str, Any]:
    """A dataclass as one level of plain values, "train.human.lam": 1.0, as trackers want it."""
    return _flatten(json.loads(to_json(config)))


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
