"""Predictions of a whole data set, by one process among several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lib.model.vit import SigmoidViT


def processes() -> PartialState:
    """This process among those that train together: its device, and how to wait for the others."""
    # Accelerate joins processes on CPUs (torchrun, gloo) only when told that a CPU is wanted.
    several = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
    on_cpu = several or parse_flag_from_env("ACCELERATE_USE_CPU")
    # Patience: the others wait while the main process runs the trunk over all images.
    return PartialState(cpu=on_cpu, timeout=timedelta(hours=6))


def inputs(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor | int]:
    """What a model of `dtype` is called with: images, or cached tokens of its last blocks."""
    if "tokens" in batch:
        return {"tokens": batch["tokens"].to(dtype), "blocks": int(batch["blocks"][0])}
    return {"images": batch["image"].to(dtype)}


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on a device, but for the number of "blocks": reading it there would wait for it."""
    return {
        name: value if name == "blocks" else value.to(device, non_blocking=True)
        for name, value in batch.items()
    }


@torch.no_grad()
def predict(
    model: SigmoidViT,
    dataset: Dataset,
    batch_size: int,
    workers: int = 0,
    rows: str | tuple[int, ...] = "last",
) -> Iterator[tuple[dict, Tensor, dict[int, Tensor]]]:
    """Batches of a data set with the model's scores and class rows, on the model's device."""
    like = next(model.parameters())
    model.eval()
    # A generator of its own: the caller's random numbers stay as if nothing had been.
    own = {"num_workers": workers, "generator": torch.Generator()}
    for batch in DataLoader(dataset, batch_size=batch_size, **own):
        batch = to_device(batch, like.device)
        scores, found = model(**inputs(batch, like.dtype), rows=rows)
        yield batch, scores.float(), found
