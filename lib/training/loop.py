"""Training, both stages: one readable epoch, and `fit`, which keeps what came of it in a folder.

Fine-tuning is cross entropy. Human in the loop (HITL) is the same loop with one more term: the
class rows of the supervised blocks against the human map of the image (lib/losses.py). Accelerate
carries devices, mixed precision, data parallelism and trackers; learning.py beside this file says
what learns and how fast, state.py how a training that was killed goes on, runs.py where runs are
kept.
"""

from __future__ import annotations

import importlib.util
import os
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from lib.config import TrainConfig
from lib.data.splits import validation_in_words
from lib.evaluation import metrics
from lib.files import write_text
from lib.losses import attention_loss
from lib.model.predict import inputs, loader, predict, processes, tf32_products, to_device
from lib.model.vit import SigmoidViT
from lib.model.weights import save_weights
from lib.training.learning import (
    freeze,
    learning_rate_factor,
    make_optimizer,
    precision,
    set_learning_rate,
    set_train_mode,
)
from lib.training.state import Batches, Progress, Training, add_to_log, flat, noise

PROJECT = "sigmoid-attention-vit"  # what trackers call it
MEANS = ("cross_entropy", "human_loss", "train_top1")  # what is averaged over training images
# See `validate`; val_loss is the cross entropy, without label smoothing.
VALIDATED = ("val_top1", "val_nss", "val_cc", "val_class_token", "val_sigmoid", "val_loss")


class TrainingDiverged(FloatingPointError):
    """The loss became infinite or NaN; the best epoch before is in best.safetensors."""


class TrackerMissing(ImportError, ValueError):
    """A tracker is asked for that is not installed."""


def loss_terms(model: nn.Module, batch: dict, config: TrainConfig) -> tuple[Tensor, Tensor, Tensor]:
    """One batch through the model: cross entropy, human attention loss, and the scores.

    Args:
        model: SigmoidViT, bare or wrapped for data parallelism.
        batch: "image" `[B, 3, H, W]` (or what `CachedTokens` has in its place), "label" `[B]`,
            "human" and "valid" `[B, P]`.
        config: `label_smoothing` and `human` are used; lam = 0 asks for no rows.

    Returns:
        two scalars and scores `[B, classes]`.
    """
    human, given = config.human, inputs(batch, torch.float32)
    if human.lam == 0:
        scores = model(**given)
        human_loss = scores.new_zeros(())
    else:
        scores, rows = model(**given, rows=human.blocks)
        human_loss = attention_loss(
            human.loss, rows, batch["human"], batch["valid"], human.offset, human.heads
        )
    cross_entropy = F.cross_entropy(
        scores.float(), batch["label"], label_smoothing=config.label_smoothing
    )
    return cross_entropy, human_loss, scores


def train_one_epoch(
    model: nn.Module,
    loaded: DataLoader,
    batches: Batches,
    training: Training,
    config: TrainConfig,
    after_step: Callable[[bool], None],
) -> None:
    """One pass over the data, or the rest of one; losses are added up in `training.progress`.

    Args:
        model: around the layers of `training.model`, wrapped for mixed precision and for data
            parallelism where there are several processes.
        loaded: over `batches`.
        after_step: called when a step is complete, with whether it has a row in `progress.steps`.

    Raises:
        TrainingDiverged: at the first loss that is not finite, before it reaches the weights; on a
            GPU, which would idle if every loss were waited for, and with several processes, every
            `log_every` steps.
    """
    accelerator, optimizer, progress = training.accelerator, training.optimizer, training.progress
    steps = config.epochs * len(batches)
    progress.sums = progress.sums.to(accelerator.device)
    set_train_mode(training.model, config.trainable)
    for batch in loaded:
        step = progress.epoch * len(batches) + progress.step
        batch = to_device(batch, accelerator.device)
        # Drop path and dropout draw from the step, so that a resumed run draws the same.
        torch.manual_seed(noise(config.seed, step, batches.process))
        when = (step, steps, config.warmup)
        factor = learning_rate_factor(*when, config.schedule, an_epoch=len(batches))
        set_learning_rate(optimizer, factor)
        with accelerator.autocast():
            cross_entropy, human_loss, scores = loss_terms(model, batch, config)
            loss = cross_entropy + config.human.lam * human_loss
        # Sums of this process's images: cross entropy, human attention loss, right answers.
        right = (scores.argmax(-1) == batch["label"]).float().mean()
        means = torch.stack([cross_entropy.detach(), human_loss.detach().float(), right])
        own = batches.own(progress.step)
        progress.sums += means * own
        progress.seen += own
        is_logged = step % config.log_every == 0
        if is_logged:  # the means over the whole batch: all processes must judge alike
            means = accelerator.reduce(means * (own / batches.size(progress.step)), "sum")
        if is_logged or (accelerator.device.type == "cpu" and accelerator.num_processes == 1):
            refuse_divergence(means, config)
        accelerator.backward(loss * batches.share(progress.step))
        if config.clip:
            accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if training.ema:
            training.ema.update(training.model, step)
        if is_logged:
            row = dict(zip(MEANS, means.tolist(), strict=True))
            progress.steps.append({"step": step, "lr": config.lr * factor} | row)
            training.gather_sums()
        progress.step += 1
        after_step(is_logged)


def refuse_divergence(means: Tensor, config: TrainConfig) -> None:
    """TrainingDiverged where the cross entropy or the human attention loss is not finite."""
    if not torch.isfinite(means).all():
        raise TrainingDiverged(
            f"the loss is not finite (cross entropy {means[0].item():.4g}, human attention loss "
            f"{means[1].item():.4g}); lower lr ({config.lr:g}) or lam ({config.human.lam:g})"
        )


def fit(
    model: SigmoidViT,
    config: TrainConfig,
    train_set: Dataset,
    val_set: Dataset,
    folder: Path,
    watch: Callable[[Progress], None] | None = None,
) -> None:
    """Trains `model` in place and keeps what came of it; goes on from a checkpoint in `folder`.

    Args:
        model: starts as it is. config: one stage of training.
        train_set, val_set: items as `BirdDataset` makes them, of `(index, seed)` too; the
            validation set without augmentation. The best epoch is chosen on `val_set`, never on
            test images; where it is empty, the last is the best.
        folder: gets history.csv (a row an epoch), steps.csv, last.safetensors and best.safetensors
            (highest validation top-1, the earliest of equals), epoch<number>.safetensors every
            `save_every` epochs, a line an epoch in train.log; state.pt while it is under way.
        watch: called in the main process with every new row of steps or history.

    Raises:
        TrainingDiverged: the loss is not finite.
        StorageError: a file could not be written; the checkpoint before it is intact.
    """
    set_seed(config.seed)
    accelerator = start_accelerator(config, folder)
    device = accelerator.device
    freeze(model, config.trainable)
    model.to(device).vit.set_grad_checkpointing(config.checkpoint_blocks)
    optimizer = make_optimizer(model, config, device)
    own = (accelerator.process_index, accelerator.num_processes)
    batches = Batches(len(train_set), config.batch_size, config.seed, *own)
    how = (config.batch_size, device, config.workers)
    loaded = loader(train_set, *how, batch_sampler=batches)
    # Every process validates on its part of the images.
    validated = loader(Subset(val_set, range(own[0], len(val_set), own[1])), *how)
    ema = ModelEmaV3(model, config.ema, use_warmup=True) if config.ema else None
    # The same layers: what is compiled and computes in mixed precision is not what is measured.
    learner = SigmoidViT(model.vit, model.one_query)
    if config.compile:
        compile_forward(learner, max(1, batches.own(0)))
    wrapped, optimizer = accelerator.prepare(learner, optimizer)
    training = Training(model, optimizer, accelerator, ema)
    training.load(folder)
    progress, is_main = training.progress, accelerator.is_main_process
    if is_main:
        tell_few(len(val_set))
    saved = time.monotonic()
    bar = tqdm(
        total=config.epochs * len(batches),
        initial=progress.epoch * len(batches) + progress.step,
        desc=folder.name,
        unit="step",
        leave=False,
        disable=not is_main or "TQDM_DISABLE" in os.environ,
    )

    def after_step(is_logged: bool) -> None:
        nonlocal saved
        bar.update()
        if is_logged:
            row = progress.steps[-1]
            accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
            if watch and is_main:
                watch(progress)
        # Several processes: only where the main one has the sums of all.
        may_save = is_main and (is_logged or accelerator.num_processes == 1)
        if may_save and time.monotonic() - saved >= 60 * config.checkpoint_minutes:
            refuse_divergence(progress.sums, config)
            training.save(folder)
            saved = time.monotonic()

    try:
        while progress.epoch < config.epochs:
            batches.go_to(progress.epoch, progress.step)
            started = time.monotonic()
            with tf32_products(config.mixed_precision == "tf32"):
                train_one_epoch(wrapped, loaded, batches, training, config, after_step)
            group = training.optimizer.param_groups[0]  # as the last step left it
            rate = config.lr * (group["lr"] / group["peak"])
            row = {"epoch": progress.epoch + 1, "lr": rate}
            training.gather_sums(everywhere=True)
            refuse_divergence(progress.sums, config)
            means = (progress.sums / progress.seen).tolist()
            row |= dict(zip(MEANS, means, strict=True))
            row |= validate(training.result, validated)
            training.end_epoch(row)
            bar.set_postfix(loss=f"{row['cross_entropy']:.3f}", val=f"{row['val_top1']:.3f}")
            done = progress.epoch * len(batches)
            accelerator.log({f"epoch/{k}": v for k, v in row.items()}, step=done - 1)
            if is_main:
                told = ", ".join(f"{name} {value:.6g}" for name, value in row.items())
                add_to_log(folder, f"{told}, {time.monotonic() - started:.1f} s")
                if config.save_every and progress.epoch % config.save_every == 0:
                    save_weights(training.result, folder / f"epoch{progress.epoch}.safetensors")
                for name, rows in (("history", progress.history), ("steps", progress.steps)):
                    write_text(folder / f"{name}.csv", pd.DataFrame(rows).to_csv(index=False))
                if watch:
                    watch(progress)
        if is_main:
            training.finish(folder)
    except TrainingDiverged:
        if is_main:
            training.write_best(folder)
        raise
    finally:
        bar.close()
        for tracker in accelerator.trackers:
            tracker.finish()


def compile_forward(model: SigmoidViT, batch_size: int) -> None:
    """Compiles the forward pass for batches of one size: others, the last of an epoch, run as ever.

    A graph for each would take a minute more, and one for any size computes more slowly.
    """
    torch.compiler.reset()  # models of earlier trainings count against its limit
    plain, compiled = model.forward, torch.compile(model.forward, dynamic=False)

    def forward(**given: Any) -> Any:
        first = given["images"] if "images" in given else given["tokens"]
        return (compiled if len(first) == batch_size else plain)(**given)

    model.forward = forward


@cache
def tell_few(count: int) -> None:
    """Warns of a validation on few images, once a process: runs of a comparison share them."""
    words = validation_in_words(count)
    if words:
        warnings.warn(words, stacklevel=3)


def refuse_missing(config: TrainConfig) -> None:
    """TrackerMissing where a tracker is not installed; ValueError for fp16 without a GPU."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise TrackerMissing(
                f"{name} is not installed; pip install {name}, or drop the tracker"
            )
    if config.mixed_precision == "fp16" and processes().device.type == "cpu":
        raise ValueError('mixed_precision is "fp16", which needs a GPU; use "bf16" or "no"')


def start_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """Accelerate for one training, with its trackers; wandb works offline unless told otherwise."""
    # Accelerate keeps one precision a process; a later training may want another.
    AcceleratorState._reset_state()
    device = processes().device
    chosen = precision(config.mixed_precision, device)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no" if chosen == "tf32" else chosen,
        log_with=list(config.trackers) or None,
        project_dir=folder,
    )
    if config.trackers:
        values = {k: v if isinstance(v, int | float) else str(v) for k, v in flat(config).items()}
        mode = os.environ.get("WANDB_MODE", "offline")  # and its key, if any, from WANDB_API_KEY
        wandb = {"name": folder.name, "dir": str(folder), "mode": mode}
        accelerator.init_trackers(PROJECT, values, init_kwargs={"wandb": wandb})
    return accelerator


@torch.no_grad()
def validate(model: SigmoidViT, own: DataLoader) -> dict[str, float]:
    """Accuracy, and the alignment of the last block, on images as they are.

    Every process looks at its `own` part of the images; all get the means over every image, each
    counted once however unevenly they are spread. NaN where there are no images.
    """
    parts: list[dict[str, Tensor]] = []  # one a batch; none where a process has no image at all
    for batch, scores, rows in predict(model, own):
        row = rows[model.depth - 1]
        attention = metrics.patch_attention(row, model.num_prefix)
        found = (
            metrics.top_k(scores, batch["label"], 1).float(),
            metrics.nss(attention, batch["fixations"]),
            metrics.cc(attention, batch["human"]),
            metrics.class_token_mass(row, model.num_prefix),
            torch.sigmoid(row[..., model.num_prefix :].float()).mean((1, 2)),
            F.cross_entropy(scores.float(), batch["label"], reduction="none"),
        )
        named = {"index": batch["index"], **dict(zip(VALIDATED, found, strict=True))}
        parts.append(named)
    # From a GPU all at once: each copy waits for it.
    own_part = [{name: values.cpu() for name, values in _joined(parts).items()}] if parts else []
    parts = gather_object(own_part)
    if not parts:
        return dict.fromkeys(VALIDATED, float("nan"))
    whole = _joined(parts)
    order = whole.pop("index").argsort()  # the order of a sum is part of its last digits
    return {key: values[order].nanmean().item() for key, values in whole.items()}


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
