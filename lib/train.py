"""Training, both stages: one readable epoch, `fit`, and runs that are kept in folders.

Fine-tuning is cross entropy. Human in the loop (HITL) is the same loop with one more term: the
class rows of the supervised blocks against the human map of the image (lib/losses.py). Accelerate
carries devices and mixed precision.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from lib import config as cfg
from lib import metrics
from lib.attention import resolve_blocks
from lib.config import Config, RunConfig, TrainConfig
from lib.data import BirdDataset, make_dataset
from lib.losses import attention_loss
from lib.model import SigmoidViT, create_model, load_weights, save_weights


class TrainingDiverged(FloatingPointError):
    """The loss became infinite or NaN; the last checkpoint is from the epoch before."""


class RunConflict(ValueError):
    """A run of that name exists and was made with another configuration."""


def loss_terms(model: nn.Module, batch: dict, config: TrainConfig) -> tuple[Tensor, Tensor, Tensor]:
    """One batch through the model: cross entropy, human attention loss, and the scores.

    Args:
        model: SigmoidViT, bare or wrapped for data parallelism.
        batch: "image" `[B, 3, H, W]` (or "tokens" `[B, N, dim]` of a frozen trunk), "label" `[B]`,
            "human" and "valid" `[B, P]`.
        config: `label_smoothing` and `human` are used; lam = 0 asks for no rows at all.

    Returns:
        two scalars and scores `[B, classes]`.
    """
    human = config.human
    if human.lam == 0:
        scores = model(**inputs(batch))
        human_loss = scores.new_zeros(())
    else:
        scores, rows = model(**inputs(batch), rows=human.blocks)
        human_loss = attention_loss(
            human.loss, rows, batch["human"], batch["valid"], human.offset, human.heads
        )
    cross_entropy = F.cross_entropy(
        scores.float(), batch["label"], label_smoothing=config.label_smoothing
    )
    return cross_entropy, human_loss, scores


def inputs(batch: dict) -> dict[str, Tensor]:
    """What the model is called with: cached tokens of a frozen trunk, else images."""
    if "tokens" in batch:
        return {"tokens": batch["tokens"].float()}
    return {"images": batch["image"]}


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    accelerator: Accelerator,
    config: TrainConfig,
    bar: tqdm,
) -> dict[str, float]:
    """One pass over the data; returns the means of the losses and of the training accuracy.

    Raises:
        TrainingDiverged: at the first loss that is not finite, before it reaches the weights.
    """
    set_train_mode(accelerator.unwrap_model(model), config.trainable)
    sums = {"cross_entropy": 0.0, "human_loss": 0.0, "train_top1": 0.0}
    seen = 0
    for batch in loader:
        with accelerator.autocast():
            cross_entropy, human_loss, scores = loss_terms(model, batch, config)
            loss = cross_entropy + config.human.lam * human_loss
        if not math.isfinite(loss.item()):
            raise TrainingDiverged(
                f"the loss is {loss.item()} (cross entropy {cross_entropy.item():.4g}, human "
                f"attention loss {human_loss.item():.4g}); lower lr ({config.lr:g}) or lam "
                f"({config.human.lam:g})"
            )
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        size = len(batch["label"])
        seen += size
        sums["cross_entropy"] += cross_entropy.item() * size
        sums["human_loss"] += human_loss.item() * size
        sums["train_top1"] += (scores.argmax(-1) == batch["label"]).sum().item()
        bar.update()
    return {key: value / seen for key, value in sums.items()}


def fit(
    model: SigmoidViT, config: TrainConfig, train_set: Dataset, val_set: Dataset, folder: Path
) -> pd.DataFrame:
    """Trains `model` in place and keeps what came of it.

    Args:
        model: starts as it is. config: one stage of training.
        train_set, val_set: items as `BirdDataset` makes them; the validation set without
            augmentation. The best epoch is chosen on `val_set`, never on test images.
        folder: gets history.csv, last.safetensors and best.safetensors (highest validation top-1,
            the earliest of equals).

    Returns:
        the history, one row an epoch.
    """
    set_seed(config.seed)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    freeze(model, config.trainable)
    refuse_frozen_supervision(model, config)
    workers = 0 if isinstance(train_set, CachedTokens) else config.workers
    order = torch.Generator().manual_seed(config.seed)
    loader = DataLoader(
        train_set,
        batch_size=config.batch_size,
        shuffle=True,
        generator=order,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=accelerator.device.type == "cuda",
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, config))
    steps = config.epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, config.warmup)
    )
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    history: list[dict[str, float]] = []
    best = -1.0
    with tqdm(total=steps, desc=folder.name, unit="step", leave=False) as bar:
        for epoch in range(1, config.epochs + 1):
            row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
            row |= train_one_epoch(wrapped, loader, optimizer, scheduler, accelerator, config, bar)
            row |= validate(model, val_set, config.batch_size, workers)
            history.append(row)
            bar.set_postfix(loss=f"{row['cross_entropy']:.3f}", val=f"{row['val_top1']:.3f}")
            save_weights(model, folder / "last.safetensors")
            if row["val_top1"] > best:
                best = row["val_top1"]
                save_weights(model, folder / "best.safetensors")
            write_text(folder / "history.csv", pd.DataFrame(history).to_csv(index=False))
    return pd.DataFrame(history)


@torch.no_grad()
def validate(
    model: SigmoidViT, dataset: Dataset, batch_size: int, workers: int = 0
) -> dict[str, float]:
    """Accuracy, and the alignment of the last block, on images as they are."""
    parts: dict[str, list[Tensor]] = {}
    for batch, scores, rows in predict(model, dataset, batch_size, workers):
        row = rows[model.depth - 1]
        attention = metrics.patch_attention(row, model.num_prefix)
        found = {
            "val_top1": metrics.top_k(scores, batch["label"], 1).float(),
            "val_nss": metrics.nss(attention, batch["fixations"]),
            "val_cc": metrics.cc(attention, batch["human"]),
            "val_class_token": metrics.class_token_mass(row),
            "val_sigmoid": torch.sigmoid(row[..., model.num_prefix :].float()).mean((1, 2)),
        }
        for key, value in found.items():
            parts.setdefault(key, []).append(value)
    return {key: torch.cat(values).nanmean().item() for key, values in parts.items()}


@torch.no_grad()
def predict(
    model: SigmoidViT,
    dataset: Dataset,
    batch_size: int,
    workers: int = 0,
    rows: str | tuple[int, ...] = "last",
) -> Iterator[tuple[dict, Tensor, dict[int, Tensor]]]:
    """Batches of a data set with the model's scores and class rows, on the model's device."""
    device = next(model.parameters()).device
    model.eval()
    for batch in DataLoader(dataset, batch_size=batch_size, num_workers=workers):
        batch = {key: value.to(device) for key, value in batch.items()}
        scores, found = model(**inputs(batch), rows=rows)
        yield batch, scores.float(), found


# ------------------------------------------------------------------------- what is trained, and how


def trained_modules(model: SigmoidViT, trainable: str) -> list[nn.Module]:
    """The modules that learn: "all", "last_block" (with the final norm and head), or "head"."""
    vit = model.vit
    heads = [vit.head, *([vit.head_dist] if hasattr(vit, "head_dist") else [])]
    if trainable == "all":
        return [vit]
    if trainable == "last_block":
        return [vit.blocks[-1], vit.norm, vit.fc_norm, *heads]
    if trainable == "head":
        return heads
    raise ValueError(f'trainable is "{trainable}"; use "all", "last_block" or "head"')


def freeze(model: SigmoidViT, trainable: str) -> None:
    """Lets only the named part learn; frozen parts store no activations for a backward pass."""
    model.requires_grad_(False)
    for module in trained_modules(model, trainable):
        module.requires_grad_(True)


def refuse_frozen_supervision(model: SigmoidViT, config: TrainConfig) -> None:
    """ValueError when human maps are to move the attention of a block that cannot learn."""
    if config.human.lam == 0:
        return
    for block in resolve_blocks(config.human.blocks, model.depth):
        if not model.vit.blocks[block].attn.qkv.weight.requires_grad:
            raise ValueError(
                f'block {block} is supervised, but trainable="{config.trainable}" freezes it; '
                'supervise blocks="last" with trainable="last_block", or train all'
            )


def refuse_supervision_without_maps(train_set: BirdDataset, config: TrainConfig) -> None:
    """ValueError when human attention is to be learned, but no image has a map: a silent control.

    A single map is enough: the original method corrects a few images only.
    """
    if config.human.lam > 0 and not train_set.table["has_map"].any():
        raise ValueError(
            f"lam is {config.human.lam:g}, but none of the {len(train_set)} training images has a "
            "human map; set MAPS (gaze, boxes, parts, or a folder of map files), or train with "
            "lam=0"
        )


def set_train_mode(model: SigmoidViT, trainable: str) -> None:
    """Training mode for the part that learns; a frozen part is used as in evaluation."""
    model.eval()
    for module in trained_modules(model, trainable):
        module.train()


def parameter_groups(model: SigmoidViT, config: TrainConfig) -> list[dict]:
    """AdamW's groups: head or body, with weight decay (matrices) or without (all else)."""
    undecayed = set(model.vit.no_weight_decay())
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.vit.named_parameters():
        if parameter.requires_grad:
            is_head = name.startswith(("head.", "head_dist."))
            decays = parameter.ndim > 1 and name not in undecayed
            groups.setdefault((is_head, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.lr * (config.head_lr_factor if is_head else 1.0),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (is_head, decays), parameters in groups.items()
    ]


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first share `warmup` of the steps, then a cosine to 0."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


# ----------------------------------------------------------------------------------- runs on disk


@dataclass(frozen=True)
class Run:
    """A trained model in its folder: config.json, classes.json, history.csv, last and best weights.

    `name` is the folder below the runs folder.
    """

    folder: Path
    config: RunConfig

    @classmethod
    def load(cls, folder: Path) -> Run:
        """A finished run.

        Raises:
            FileNotFoundError: names the folder and what is missing.
        """
        folder = Path(folder)
        for name in ("config.json", "classes.json", "history.csv", "last.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is no finished run: it has no {name}; train it")
        run = cls(folder, cfg.from_json(RunConfig, (folder / "config.json").read_text()))
        if len(run.history) < run.config.train.epochs:
            raise FileNotFoundError(
                f"{folder} is no finished run: it stopped after {len(run.history)} of "
                f"{run.config.train.epochs} epochs; train it again"
            )
        return run

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def classes(self) -> list[str]:
        """Class names by label."""
        return json.loads((self.folder / "classes.json").read_text())

    @property
    def history(self) -> pd.DataFrame:
        """One row an epoch."""
        return pd.read_csv(self.folder / "history.csv")

    def model(self, which: Literal["last", "best"] = "last") -> SigmoidViT:
        """The trained model, in evaluation mode."""
        model = bare_model(self.config, len(self.classes))
        load_weights(model, self.folder / f"{which}.safetensors")
        return model.eval()

    def dataset(self, split: str, augment: bool = False) -> BirdDataset:
        """A split of the run's data on the run's grid."""
        return dataset_for(self.model(), self.config, split, augment)


def train_run(name: str, config: RunConfig, runs: Path, overwrite: bool = False) -> Run:
    """The run `runs/name`: loaded when it is there and was made with `config`, else trained.

    Args:
        name: folder of the run below `runs`. config: all that decides the result.
        overwrite: train again even if a run of that name is there.

    Raises:
        RunConflict: a run of that name was made with another configuration; names a difference.
    """
    folder = runs / name
    if (folder / "config.json").is_file() and not overwrite:
        found = cfg.difference(config, (folder / "config.json").read_text())
        if found:
            raise RunConflict(
                f"{folder} was made with another configuration ({found}); choose another name or "
                "runs folder (RUNS_DIR), or delete the folder"
            )
        try:
            return Run.load(folder)
        except FileNotFoundError:
            pass  # stopped half way: it is trained again
    model, train_set = starting_point(config, runs)
    refuse_supervision_without_maps(train_set, config.train)
    val_set = dataset_for(model, config, "val", augment=False)
    classes = train_set.classes
    if config.train.cache_tokens:
        train_set, val_set = (
            with_cached_tokens(model, dataset, config) for dataset in (train_set, val_set)
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.csv").unlink(missing_ok=True)
    write_text(folder / "config.json", cfg.to_json(config))
    write_text(folder / "classes.json", json.dumps(classes))
    fit(model, config.train, train_set, val_set, folder)
    return Run.load(folder)


def starting_point(config: RunConfig, runs: Path) -> tuple[SigmoidViT, BirdDataset]:
    """The model before its first step, and its training images.

    With `config.init` the model is that run's last; else the trunk is read from
    `config.model.weights` and the head is new, drawn by `config.train.seed`.
    """
    if config.init is not None:
        model = Run.load(runs / config.init).model()
        return model, dataset_for(model, config, "train", augment=not config.train.cache_tokens)
    set_seed(config.train.seed)
    model = bare_model(config, num_classes=0)
    if config.model.weights is not None:
        report = load_weights(model, config.model.weights)
        tqdm.write(f"{config.model.weights.name}: {report}; the head is new")
    train_set = dataset_for(model, config, "train", augment=not config.train.cache_tokens)
    set_seed(config.train.seed)  # the new head is the same whatever the trunk drew
    model.vit.reset_classifier(len(train_set.classes))
    return model, train_set


def bare_model(config: RunConfig, num_classes: int) -> SigmoidViT:
    """The architecture of a run, its weights not loaded yet."""
    overrides = config.model.overrides
    return create_model(config.model.name, num_classes, config.data.image_size, **overrides)


def dataset_for(model: SigmoidViT, config: RunConfig, split: str, augment: bool) -> BirdDataset:
    """A split on the model's grid, normalised as its weights expect."""
    return make_dataset(config.data, split, model.grid, *model.normalisation, augment=augment)


class CachedTokens(Dataset):
    """A data set whose images are replaced by the tokens `[N, dim]` that enter the last block.

    `tokens` is `[n, N, dim]` in half precision; labels, maps and fixations stay as they are.
    """

    def __init__(self, tokens: Tensor, items: list[dict]) -> None:
        self.tokens, self.items = tokens, items

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict:
        return {"tokens": self.tokens[index], **self.items[index]}


# Runs of one comparison share their frozen trunk: its tokens are computed once a process.
_CACHE: dict[str, CachedTokens] = {}


@torch.no_grad()
def with_cached_tokens(model: SigmoidViT, dataset: BirdDataset, config: RunConfig) -> CachedTokens:
    """The data set with the trunk's tokens, computed now unless this trunk met it before."""
    digest = hashlib.sha256((cfg.to_json(config.data) + dataset.table.to_csv()).encode())
    for name, value in model.vit.state_dict().items():
        if not name.startswith(("norm.", "fc_norm.", "head", f"blocks.{model.depth - 1}.")):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
    key = digest.hexdigest()
    if key not in _CACHE:
        device = Accelerator().device
        model.to(device).eval()
        tokens, items = [], []
        loader = DataLoader(dataset, batch_size=32, num_workers=config.train.workers)
        for batch in tqdm(loader, desc="tokens of the frozen trunk", leave=False):
            images = batch.pop("image").to(device)
            tokens.append(model.tokens(images, -1).half().cpu())
            size = len(batch["label"])
            items += [{name: value[i] for name, value in batch.items()} for i in range(size)]
        while len(_CACHE) >= 4:  # train, val and test of one data set, and one more
            _CACHE.pop(next(iter(_CACHE)))
        _CACHE[key] = CachedTokens(torch.cat(tokens), items)
    return _CACHE[key]


def fine_tuning(config: Config, seed: int) -> RunConfig:
    """Stage 1 of a preset with a training seed."""
    return RunConfig(config.data, config.model, replace(config.ft, seed=seed))


def human_in_the_loop(config: Config, init: str, seed: int, **human: object) -> RunConfig:
    """Stage 2 on top of the run `init`; `human` changes fields of the preset's `HumanConfig`.

    `lam=0` is the control: the same extra epochs without human maps.
    """
    stage = replace(config.hitl, seed=seed, human=replace(config.hitl.human, **human))
    return RunConfig(config.data, config.model, stage, init)


def write_text(path: Path, text: str) -> None:
    """Writes to a temporary name in the same folder, then renames: never a half-written file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
