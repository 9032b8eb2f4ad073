"""From trained runs to tables: one row an image, and what is made of it.

`per_image` is one row an image; every table is a mean over such rows, so that a reader can ask
their own question of the saved CSV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics.functional.classification import binary_calibration_error
from tqdm.auto import tqdm

from lib import metrics
from lib.attention import resolve_blocks, sigmoid_attention
from lib.config import Config, RunConfig
from lib.data import BirdDataset
from lib.model import SigmoidViT
from lib.runs import Run, fine_tuning, human_in_the_loop, train_run
from lib.tokens import with_cached_tokens
from lib.train import predict, processes

# What the tables show, in this order, with the words of the reader.
COLUMNS: dict[str, str] = {
    "top1": "accuracy",
    "conflicting": "conflicting-decoy accuracy",
    "nss": "NSS",
    "cc": "CC",
    "class_token": "class-token mass",
    "sigmoid": "mean sigmoid",
}

# All that `metrics.alignment` measures, with the words of the reader.
ALIGNMENT: dict[str, str] = {
    "nss": "NSS",
    "cc": "CC",
    "sim": "SIM",
    "kl": "KL",
    "auc": "AUC-Judd",
    "sauc": "shuffled AUC",
    "iou": "IoU",
    "in_box": "energy in box",
    "point_box": "pointing game, box",
    "point_part": "pointing game, parts",
}


# Maps that no model made, see `human_baselines`.
PERFECT = "perfect (estimate)"
BASELINES = ("one reader", "mean map", "another image", "uniform")


@dataclass(frozen=True)
class Targets:
    """What the attention on each image of a data set is held against, `[n, P]` each."""

    human: Tensor  # in [0, 1]
    fixations: Tensor  # counts
    elsewhere: Tensor  # fixation counts of all other images
    box: Tensor | None  # share of each cell that the bounding box covers; None without boxes
    parts: Tensor | None  # 1 where a part of the bird lies in the cell; None without parts

    @classmethod
    def of(cls, dataset: BirdDataset) -> Targets:
        """Those of a data set without augmentation."""
        found = [dataset.annotations(i) for i in range(len(dataset))]
        fixations = torch.stack([item["fixations"] for item in found])
        parts = [dataset.parts(i) for i in range(len(dataset))]
        known = next((part for part in parts if part is not None), None)
        if known is not None:
            parts = [torch.zeros_like(known) if part is None else part for part in parts]
        return cls(
            human=torch.stack([item["human"] for item in found]),
            fixations=fixations,
            elsewhere=fixations.sum(0) - fixations,
            box=_flat(dataset.cover()),
            parts=None if known is None else (torch.stack(parts) > 0).float(),
        )

    def at(self, index: Tensor, like: Tensor) -> dict[str, Tensor | None]:
        """Those of some images, on the device of `like`: arguments of `metrics.alignment`."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: None if v is None else v[index.cpu()].to(like) for name, v in found.items()}


def per_image(
    model: SigmoidViT,
    dataset: BirdDataset,
    items: Dataset | None = None,
    block: int = -1,
    batch_size: int = 64,
    workers: int = 0,
    offset: str = "none",
) -> pd.DataFrame:
    """Prediction and alignment of every image of a data set.

    Args:
        model: any SigmoidViT on the data set's grid.
        dataset: without augmentation.
        items: the same images with cached tokens, where the model's trunk has been run already.
        block: whose class row is compared with people's gaze; the last by default.
        offset: constant of the sigmoid map, see `lib.attention.row_offset`.

    Returns:
        the data set's own table plus: predicted (label), top1 to top5 (bool), p_true and confidence
        (probability of the true and of the predicted class), the columns of `metrics.alignment` of
        the softmax attention, mean of heads, and of the mean sigmoid map ("sigmoid_cc", ...),
        class_token (softmax mass the class token keeps), sigmoid (mean raw sigmoid attention), and
        where a decoy is drawn: conflicting (bool, the decoy is another class's) and on_decoy (share
        of the patches' attention on it).
    """
    index = resolve_blocks((block,), model.depth)[0]
    decoys, targets = decoy_cover(dataset), Targets.of(dataset)
    found: list[pd.DataFrame] = []
    batches = predict(model, items or dataset, batch_size, workers, rows=(index,))
    total = -(-len(dataset) // batch_size)
    for batch, scores, rows in tqdm(batches, total=total, desc="evaluating", leave=False):
        row = rows[index].float()
        attention = metrics.patch_attention(row, model.num_prefix)
        sigmoid = sigmoid_attention(row, offset, model.num_prefix).mean(1)
        labels, probabilities = batch["label"], scores.softmax(-1)
        held = targets.at(batch["index"], attention)
        on_sigmoid = metrics.alignment(sigmoid, **held)
        columns = {
            "predicted": scores.argmax(-1),
            **{f"top{k}": metrics.top_k(scores, labels, k) for k in range(1, 6)},
            "p_true": probabilities.gather(1, labels[:, None])[:, 0],
            "confidence": probabilities.amax(-1),
            **metrics.alignment(attention, **held),
            **{f"sigmoid_{name}": value for name, value in on_sigmoid.items()},
            "class_token": metrics.class_token_mass(row),
            "sigmoid": torch.sigmoid(row[..., model.num_prefix :]).mean((1, 2)),
        }
        if decoys is not None:
            cover = decoys[batch["index"].cpu()].to(attention)
            columns["on_decoy"] = metrics.energy_inside(attention, cover)
        found.append(pd.DataFrame({key: value.cpu().numpy() for key, value in columns.items()}))
    frame = pd.concat(
        [dataset.table.reset_index(drop=True), pd.concat(found, ignore_index=True)], axis=1
    )
    if decoys is not None:
        frame["conflicting"] = conflicting_decoys(frame)
    return frame


def per_head(
    model: SigmoidViT,
    dataset: BirdDataset,
    items: Dataset | None = None,
    block: int = -1,
    offset: str = "none",
    batch_size: int = 64,
) -> pd.DataFrame:
    """Alignment of each head of a block by itself, arguments as `per_image`.

    Returns:
        one row an image, head and map ("softmax" or "sigmoid"): image_id, head, map, the columns of
        `metrics.alignment`, and class_token (softmax mass that the head leaves on it).
    """
    index = resolve_blocks((block,), model.depth)[0]
    targets, found = Targets.of(dataset), []
    batches = predict(model, items or dataset, batch_size, rows=(index,))
    total = -(-len(dataset) // batch_size)
    for batch, _, rows in tqdm(batches, total=total, desc="heads", leave=False):
        row = rows[index].float()
        softmax = row.softmax(-1)
        held = targets.at(batch["index"], row)
        held = {name: None if v is None else v[:, None] for name, v in held.items()}  # [B, 1, P]
        images, heads = np.indices(row.shape[:2])
        places = dataset.table["image_id"].to_numpy()[batch["index"].cpu().numpy()]
        for name, maps in (
            ("softmax", softmax[..., model.num_prefix :]),
            ("sigmoid", sigmoid_attention(row, offset, model.num_prefix)),
        ):
            values = metrics.alignment(maps, **held) | {"class_token": softmax[..., 0]}
            columns = {"image_id": places[images].ravel(), "head": heads.ravel(), "map": name}
            columns |= {key: value.cpu().numpy().ravel() for key, value in values.items()}
            found.append(pd.DataFrame(columns))
    return pd.concat(found, ignore_index=True)


def measure(
    model: SigmoidViT, dataset: BirdDataset, config: RunConfig, tokens: Path
) -> pd.DataFrame:
    """`per_image` of a run's model; where it was trained on cached tokens, on those in `tokens`.

    The sigmoid map is that without an offset, whatever the run was trained with: in one table, one
    definition.
    """
    if config.train.cache_tokens:
        return per_image(model, dataset, with_cached_tokens(model, dataset, config, tokens))
    return per_image(model, dataset, workers=config.train.workers)


def conflicting_decoys(table: pd.DataFrame) -> pd.Series:
    """Whether a picture's decoy names another class; bool, False where there is no decoy."""
    return (table["decoy"] != table["label"]) & (table["decoy"] >= 0)


def decoy_cover(dataset: BirdDataset) -> Tensor | None:
    """Share of every cell that the decoy covers, `[n, P]` in [0, 1]; None without decoys."""
    return _flat(dataset.cover("d"))


def _flat(cover: Tensor | None) -> Tensor | None:
    return None if cover is None else cover.flatten(1)


def summarise(frame: pd.DataFrame) -> dict[str, float]:
    """Means over the images of `per_image`, p_true_min, p_true_max, and ece.

    Where a decoy is drawn also accuracy on conflicting and on agreeing images, and on_decoy.
    """
    numbers = [f"top{k}" for k in range(1, 6)] + ["p_true", "confidence"]
    numbers += [p + name for p in ("", "sigmoid_") for name in ALIGNMENT if name in frame]
    numbers += ["class_token", "sigmoid"]
    summary = {name: float(frame[name].mean()) for name in numbers}
    summary |= {"p_true_min": frame["p_true"].min(), "p_true_max": frame["p_true"].max()}
    summary["ece"] = expected_calibration_error(frame)
    if "conflicting" in frame:
        summary["conflicting"] = float(frame.loc[frame["conflicting"], "top1"].mean())
        summary["agreeing"] = float(frame.loc[~frame["conflicting"], "top1"].mean())
        summary["on_decoy"] = float(frame["on_decoy"].mean())
    return summary


def expected_calibration_error(frame: pd.DataFrame, bins: int = 15) -> float:
    """ECE of the images of `per_image` (Guo et al., ICML 2017), in [0, 1]; 0 is best.

    The mean distance of confidence and accuracy over `bins` equal bins of confidence, weighted by
    their images. TorchMetrics' error of two classes is that of any number of classes when it is
    given confidence, and right or wrong.
    """
    confidence = torch.from_numpy(below_one(frame["confidence"]))
    right = torch.from_numpy(frame["top1"].to_numpy(np.int64))
    return binary_calibration_error(confidence, right, n_bins=bins, norm="l1").item()


def below_one(confidence: pd.Series) -> np.ndarray:
    """Confidences in [0, 1): one of exactly 1 would get a bin of its own."""
    return np.minimum(confidence.to_numpy(np.float32), np.nextafter(np.float32(1), np.float32(0)))


def baselines_by_image(dataset: BirdDataset) -> pd.DataFrame:
    """The metrics of maps that no model made, on every image that has a human map.

    "one reader" is each reader against the *others*, whose gaze is pooled: how well a single person
    predicts people, which a model may do better. Every other map is held against the pooled gaze of
    all readers, as models are, and is made of other images only.

    Returns:
        one row an image and map: image_id, map, columns of `metrics.alignment`. Maps: one reader
        (the mean over readers; not where a map has no readers), mean map (of all other images),
        another image (its map, from the other half of the set), uniform.
    """
    whole = Targets.of(dataset)
    chosen = np.flatnonzero(dataset.has_map)
    if len(chosen) < 2:
        return pd.DataFrame(columns=["image_id", "map", *ALIGNMENT])
    total = whole.human[chosen].sum(0)
    rows = []
    for place, i in enumerate(chosen.tolist()):
        held = whole.at(torch.tensor([i]), whole.human)  # [1, P]
        other = chosen[(place + len(chosen) // 2) % len(chosen)]
        found = {}
        maps, counts = dataset.readers(i)  # [R, P]
        if len(maps) > 1:
            others = {"human": maps.sum(0) - maps, "fixations": counts.sum(0) - counts}
            found["one reader"] = metrics.alignment(maps, **(held | others))
        candidates = {
            "mean map": (total - whole.human[i])[None],
            "another image": whole.human[other][None],
            "uniform": torch.ones_like(whole.human[:1]),
        }
        found |= {name: metrics.alignment(one, **held) for name, one in candidates.items()}
        for name, values in found.items():
            row = {"image_id": dataset.table["image_id"].iat[i], "map": name}
            rows.append(row | {key: value.nanmean().item() for key, value in values.items()})
    return pd.DataFrame(rows)


def human_baselines(dataset: BirdDataset, by_image: pd.DataFrame | None = None) -> pd.DataFrame:
    """What a model's metrics are to be held against: means of `baselines_by_image`.

    Args:
        by_image: that table, where the caller has it already.

    Returns:
        one row a map: perfect (CC alone, see `perfect_cc`; where images have several readers),
        then those of `baselines_by_image`. NaN where a metric is not defined: the CC of a constant
        map, NSS of maps without fixations. KL punishes the map of a single reader for its zeros,
        see `metrics.kl`.
    """
    images = baselines_by_image(dataset) if by_image is None else by_image
    images = images.drop(columns="image_id")
    if images.empty:
        return images
    table = images.groupby("map").mean()
    table = table.reindex([name for name in BASELINES if name in table.index])
    if "one reader" in table.index:
        perfect = pd.DataFrame({"cc": perfect_cc(dataset)}, index=[PERFECT], columns=table.columns)
        table = pd.concat([perfect.astype(float), table])
    return table.rename_axis("map").reset_index()


def perfect_cc(dataset: BirdDataset) -> float:
    """An estimate of the CC of a model that knew all that readers share, in [0, 1].

    sqrt(R r / (1 + (R - 1) r)), the reliability of a mean of R readers (Spearman and Brown, 1910),
    with r the mean correlation of two readers of an image. NaN where no image has two.
    """
    found = []
    for i in range(len(dataset)):
        maps = dataset.readers(i)[0]
        if len(maps) > 1:
            each = metrics.cc(maps[:, None], maps)  # [R, R]
            pairs = each[~torch.eye(len(maps), dtype=torch.bool)]
            found.append((len(maps), pairs.nanmean().item()))
    if not found:
        return float("nan")
    readers, r = (float(np.nanmean(values)) for values in zip(*found, strict=True))
    return float(np.sqrt(readers * r / (1 + (readers - 1) * r)))


# ------------------------------------------------------------------------------------ a comparison


@dataclass(frozen=True)
class Trial:
    """One trained model of a comparison."""

    variant: str  # what the tables call it
    seed: int
    run: Run


def train_comparison(config: Config, seeds: Sequence[int], overwrite: bool = False) -> list[Trial]:
    """Fine-tunes, then trains every variant of the preset on top, for every seed.

    Runs that are there already are loaded; see `lib.runs.train_run`.
    """
    trials = []
    for seed in seeds:
        fine_tuned = train_run(f"ft-s{seed}", fine_tuning(config, seed), config.runs, overwrite)
        trials.append(Trial("fine-tuned", seed, fine_tuned))
        for variant, human in config.variants.items():
            settings = human_in_the_loop(config, fine_tuned.name, seed, **human)
            run = train_run(run_name(variant, seed), settings, config.runs, overwrite)
            trials.append(Trial(variant, seed, run))
    return trials


def run_name(variant: str, seed: int) -> str:
    """Folder name of a model of the comparison: "HITL last block" to hitl-last-block-s0."""
    return f"{variant.lower().replace(' ', '-')}-s{seed}"


def measure_runs(
    trials: Sequence[Trial],
    dataset: BirdDataset,
    tokens: Path,
    which: Literal["last", "best"] = "last",
) -> pd.DataFrame:
    """`per_image` of every run, with columns variant and seed.

    Args:
        tokens: folder of cached tokens, for runs that were trained on some.
    """
    frames = []
    for trial in tqdm(trials, desc="evaluating runs", leave=False):
        model = trial.run.model(which).to(processes().device)
        frame = measure(model, dataset, trial.run.config, tokens)
        frames.append(frame.assign(variant=trial.variant, seed=trial.seed))
    return pd.concat(frames, ignore_index=True)


def evaluate_trials(trials: Sequence[Trial], split: str = "test") -> pd.DataFrame:
    """`measure_runs` on a split of the first run's data."""
    run = trials[0].run
    return measure_runs(trials, run.dataset(split), run.folder.parent / "tokens")


def by_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a variant and seed: the summaries of `evaluate_trials`' images."""
    rows = [
        {"variant": variant, "seed": seed, **summarise(part)}
        for (variant, seed), part in frame.groupby(["variant", "seed"], sort=False)
    ]
    return pd.DataFrame(rows)


def comparison_table(seeds: pd.DataFrame) -> pd.DataFrame:
    """One row a variant, one column a figure: "mean ± standard deviation" over the seeds."""
    # Data without maps or without gaze has no alignment to show.
    columns = {k: words for k, words in COLUMNS.items() if k in seeds and seeds[k].notna().any()}
    rows = {}
    for variant, part in seeds.groupby("variant", sort=False):
        rows[variant] = {words: _mean_and_std(part[key]) for key, words in columns.items()}
    return pd.DataFrame(rows).T.rename_axis("model")


def _mean_and_std(values: pd.Series) -> str:
    spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"
