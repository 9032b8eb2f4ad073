"""Predictions of a whole data set, by one process among several."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from lib.config import T
from lib.model.vit import SigmoidViT


def processes() -> PartialState:
    """This process among those that train together: its device, and how to wait for the others."""
    # Accelerate joins processes on CPUs (torchrun, gloo) only when told that a CPU is wanted.
    several = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
    on_cpu = several or parse_flag_from_env("ACCELERATE_USE_CPU")
    # Patience: the others wait while the main process runs the trunk over all images.
    return PartialState(cpu=on_cpu, timeout=timedelta(hours=6))


def in_main_process(work: Callable[[], T]) -> T:
    """What `work` returns in the main process; the others wait for it, and get it as well.

    Raises:
        ValueError: in the others, where the work failed: else they would wait for ever. In the main
            process its own error.
    """
    this = processes()
    if this.num_processes == 1:
        return work()
    told: list[Any] = [None, None]  # what it returned, what went wrong
    failure = None
    if this.is_main_process:
        try:
            told[0] = work()
        except Exception as error:
            told[1], failure = f"the main process stopped: {error or type(error).__name__}", error
    broadcast_object_list(told)
    if told[1]:
        raise failure or ValueError(told[1])
    return told[0]


def inputs(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor | int]:
    """What a model of `dtype` is called with: images, or cached tokens of its last blocks."""
    if "tokens" in batch:
        return {"tokens": batch["tokens"].to(dtype), "blocks": int(batch["blocks"][0])}
    return {"images": batch["image"].to(dtype)}


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on a device, but for "index" and "blocks": reading them there would wait for it."""
    return {
        name: value if name in ("index", "blocks") else value.to(device, non_blocking=True)
        for name, value in batch.items()
    }


def loader(
    dataset: Dataset,
    batch_size: int,
    device: torch.device,
    workers: int | Literal["auto"] = "auto",
    **more: Any,
) -> DataLoader:
    """Batches of a data set for a model on `device`, in order unless `more` says otherwise.

    Where the device is a GPU, processes read ahead (see `count_workers`) into pinned memory, from
    which `to_device` copies while the GPU computes. The caller's random numbers stay as if nothing
    had been.

    Args:
        dataset: one that is `in_memory` is read in this process, whatever `workers` says; one with
            `__getitems__` may give a whole batch, stacked.
        batch_size: of a batch; with a `batch_sampler` in `more`, of its largest.
        workers: processes that load; 0 loads in this one.
        more: passed to DataLoader.
    """
    source = dataset
    while isinstance(source, Subset):
        source = source.dataset
    if getattr(source, "in_memory", False):
        workers = 0
    elif workers == "auto":
        workers = count_workers(device, -(-len(dataset) // batch_size))
    return DataLoader(
        dataset,
        **({} if "batch_sampler" in more else {"batch_size": batch_size}),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        collate_fn=_stacked,
        generator=torch.Generator(),
        **more,
    )


def count_workers(device: torch.device, batches: int) -> int:
    """How many processes load `batches` batches: none on a CPU, where the model wants the cores.

    Else one a core but one, of those that this process may use and shares with the others of its
    machine that train together, 8 at most. A process that starts takes as long as a few batches.
    """
    if device.type == "cpu" or multiprocessing.current_process().daemon:  # which may start none
        return 0
    has_affinity = hasattr(os, "sched_getaffinity")  # not on a Mac, nor on Windows
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, max(1, cores - 1), batches // 2)


def _stacked(items: list | dict) -> dict[str, Tensor]:
    """A batch of items, unless the data set gave it whole."""
    return items if isinstance(items, dict) else default_collate(items)


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """TF32 in float32 products on a GPU, or none whatever is set outside; afterwards as it was.

    PyTorch allows it by itself for convolutions, which cuts a picture into patches.
    """
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = convolutions


@torch.no_grad()
def predict(
    model: SigmoidViT,
    dataset: Dataset | DataLoader,
    batch_size: int = 64,
    workers: int | Literal["auto"] = "auto",
    rows: str | tuple[int, ...] = "last",
) -> Iterator[tuple[dict, Tensor, dict[int, Tensor]]]:
    """Batches of a data set with the model's scores and class rows, on the model's device.

    A `loader` that is kept is passed in place of the data set: its processes start only once.
    "index" and "blocks" of a batch stay where they were loaded. Nothing here waits for a GPU: who
    keeps results there until the last batch is asked for, and copies them then, does not either.
    """
    like = next(model.parameters())
    model.eval()
    is_kept = isinstance(dataset, DataLoader)
    for batch in dataset if is_kept else loader(dataset, batch_size, like.device, workers):
        batch = to_device(batch, like.device)
        with tf32_products(False):
            scores, found = model(**inputs(batch, like.dtype), rows=rows)
        yield batch, scores.float(), found
