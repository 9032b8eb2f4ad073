"""What two caches save, measured as in bench.py: tokens of the trunk, and decoded pictures."""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from lib.config import Config, DataConfig, RunConfig
from lib.data.dataset import BirdDataset, read_records
from lib.experiments.bench import DEVICE, in_turns, mean_seconds
from lib.training.loop import fit
from lib.training.runs import dataset_for, starting_point
from lib.training.tokens import forget_tokens, with_cached_tokens


def cached_epochs(config: Config, epochs: int = 10, all_epochs: bool = False) -> pd.DataFrame:
    """Seconds of training the last block with the trunk run at every step, and on cached tokens.

    Both train the preset's HITL stage from its pretrained weights, validation after every epoch
    included; the cached way without crops and flips, which is what it costs beside the time.

    Args:
        config: a preset. epochs: of the training.
        all_epochs: run all of them with the whole model, too. Otherwise one is run and counted
            `epochs` times: every epoch does the same.

    Returns:
        one row a way ("whole model", "cached tokens"): caching (seconds, once for all runs on this
        trunk), epoch (seconds of one), measured (how many epochs were run), total (seconds).
    """
    rows = {}
    for way, cached in (("whole model", False), ("cached tokens", True)):
        measured = epochs if cached or all_epochs else 1
        stage = replace(
            config.hitl, trainable="last_block", cache_tokens=cached, epochs=measured, trackers=()
        )
        run = RunConfig(config.data, config.model, stage)
        with tempfile.TemporaryDirectory() as name:
            folder, caching = Path(name), 0.0
            model, train_set = starting_point(run, folder)
            sets = (train_set, dataset_for(model, run, "val", augment=False))
            if cached:
                model.to(DEVICE)
                forget_tokens()
                start = time.perf_counter()
                precisions = (stage.mixed_precision, "no")
                sets = [
                    with_cached_tokens(model, part, run, folder, asked)
                    for part, asked in zip(sets, precisions, strict=True)
                ]
                caching = time.perf_counter() - start
            epoch = mean_seconds(partial(fit, model, stage, *sets, folder)) / measured
            forget_tokens()
        rows[way] = {"caching": caching, "epoch": epoch, "measured": measured}
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.assign(total=table["caching"] + epochs * table["epoch"])


def image_loading(
    config: DataConfig, grid: tuple[int, int], images: int = 256, rounds: int = 5
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Seconds to read the same training pictures decoded every time, and from the decoded cache.

    One process reads, as one worker of a DataLoader does: crop, flip and map included. The cache
    is built in a temporary folder and lies in the system's file cache when it is read, as it does
    from the second epoch on where memory allows.

    Args:
        config: a data set of pictures. grid: of the model. images: how many are read.

    Returns:
        a table of turns, ratios to decoding; and the cost: pictures, seconds to build, bytes a
        picture on disk and as JPEG.
    """
    records, classes = read_records(config, "train")
    order = np.random.default_rng(0).permutation(len(records))
    chosen = [records[i] for i in order[:images]]

    def reading(cache: Path | None) -> Callable[[], float]:
        data = replace(config, cache=cache)
        dataset = BirdDataset(chosen, classes, data, grid, (0.5,) * 3, (0.5,) * 3, augment=True)
        items = range(len(dataset))
        return partial(mean_seconds, lambda: deque(map(dataset.__getitem__, items), maxlen=0))

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cached = reading(Path(folder))
        built = time.perf_counter() - start
        table = in_turns({"decoding": reading(None), "decoded cache": cached}, rounds)
        on_disk = sum(path.stat().st_size for path in Path(folder).iterdir())
    cost = {
        "pictures": len(chosen),
        "seconds to build": built,
        "bytes a picture, cache": on_disk / len(chosen),
        "bytes a picture, JPEG": float(np.mean([r.image.stat().st_size for r in chosen])),
    }
    return table, cost
