"""One row an image: what a model predicts and where it looks, and what to hold that against.

Every table is a mean over such rows, so that a reader can ask their own question of the saved CSV.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lib.data.classes import refuse_other_labels
from lib.data.dataset import BirdDataset, conflicting_decoys, decoy_cover
from lib.evaluation import metrics
from lib.evaluation.metrics import ALIGNMENT
from lib.model.predict import predict
from lib.model.vit import SigmoidViT

# Maps that no model made, see `human_baselines`.
BASELINES = ("perfect (estimate)", "one reader", "mean map", "another image", "uniform")


def targets_of(dataset: BirdDataset) -> dict[str, Tensor]:
    """What the attention on each image of a data set (without augmentation) is held against.

    Returns:
        `[n, P]` each, by the arguments of `metrics.alignment`: human in [0, 1], fixations (counts),
        elsewhere (fixation counts of all other images); box, where images have boxes, and parts (1
        where one lies in the cell), where they have parts.
    """
    items = [dataset.annotations(i) for i in range(len(dataset))]
    found = {name: torch.stack([item[name] for item in items]) for name in ("human", "fixations")}
    found["elsewhere"] = found["fixations"].sum(0) - found["fixations"]
    box = dataset.cover()
    parts = [dataset.parts(i) for i in range(len(dataset))]
    known = next((part for part in parts if part is not None), None)
    if box is not None:
        found["box"] = box
    if known is not None:
        parts = [torch.zeros_like(known) if part is None else part for part in parts]
        found["parts"] = (torch.stack(parts) > 0).float()
    return found


def per_image(
    model: SigmoidViT,
    dataset: BirdDataset,
    items: Dataset | None = None,
    batch_size: int = 64,
    workers: int | Literal["auto"] = "auto",
) -> pd.DataFrame:
    """Prediction of every image of a data set, and how the last block's class row agrees.

    Args:
        model: any SigmoidViT on the data set's grid.
        dataset: without augmentation.
        items: the same images with cached tokens, where the model's trunk has been run already.

    Returns:
        the data set's own table plus: predicted (label), top1 to top5 (bool), p_true and confidence
        (probability of the true and of the predicted class), the columns of `metrics.alignment` of
        the softmax attention, mean of heads, and of the mean sigmoid map without an offset, so that
        one table has one definition ("sigmoid_cc", ...), class_token (softmax mass the class token
        keeps), sigmoid (mean raw sigmoid attention), and where a decoy is drawn: conflicting (bool,
        the decoy is another class's) and on_decoy (share of the patches' attention on it).

    Raises:
        OtherClasses: a ValueError, the classes are not the model's, or in another order.
    """
    refuse_other_labels(model.classes, dataset.classes)
    decoys, targets = decoy_cover(dataset), _on(model.device, targets_of(dataset))
    cover = None if decoys is None else decoys.to(model.device)
    found: list[dict[str, Tensor]] = []
    batches = predict(model, items or dataset, batch_size, workers)
    total = -(-len(dataset) // batch_size)
    for batch, scores, rows in tqdm(batches, total=total, desc="evaluating", leave=False):
        row = rows[model.depth - 1].float()
        attention = metrics.patch_attention(row, model.num_prefix)
        sigmoid = torch.sigmoid(row[..., model.num_prefix :]).mean(1)
        labels, probabilities = batch["label"], scores.softmax(-1)
        index = batch["index"].to(model.device, non_blocking=True)
        held = {name: values[index].to(attention) for name, values in targets.items()}
        on_sigmoid = metrics.alignment(sigmoid, **held)
        columns = {
            "predicted": scores.argmax(-1),
            **{f"top{k}": metrics.top_k(scores, labels, k) for k in range(1, 6)},
            "p_true": probabilities.gather(1, labels[:, None])[:, 0],
            "confidence": probabilities.amax(-1),
            **metrics.alignment(attention, **held),
            **{f"sigmoid_{name}": value for name, value in on_sigmoid.items()},
            "class_token": metrics.class_token_mass(row, model.num_prefix),
            "sigmoid": sigmoid.mean(1),
        }
        if decoys is not None:
            columns["on_decoy"] = metrics.energy_inside(attention, cover[index].to(attention))
        found.append(columns)
    # Read once, in the end: a GPU would be waited for every time.
    whole = {name: torch.cat([part[name] for part in found]).cpu().numpy() for name in found[0]}
    frame = dataset.table.reset_index(drop=True).join(pd.DataFrame(whole))
    if decoys is not None:
        frame["conflicting"] = conflicting_decoys(frame)
    return frame


def per_head(model: SigmoidViT, dataset: BirdDataset, batch_size: int = 64) -> pd.DataFrame:
    """Alignment of each head of the last block by itself, arguments as `per_image`.

    Returns:
        one row an image, head and map ("softmax" or "sigmoid"): image_id, head, map, the columns of
        `metrics.alignment`, and class_token (softmax mass that the head leaves on it).
    """
    targets, found = _on(model.device, targets_of(dataset)), []
    batches = predict(model, dataset, batch_size)
    total = -(-len(dataset) // batch_size)
    for batch, _, rows in tqdm(batches, total=total, desc="heads", leave=False):
        row = rows[model.depth - 1].float()
        softmax = row.softmax(-1)
        index = batch["index"].to(model.device, non_blocking=True)
        held = {name: v[index, None].to(row) for name, v in targets.items()}  # [B, 1, P]
        kept = metrics.class_token_mass(row.flatten(0, 1)[:, None], model.num_prefix)
        images, heads = np.indices(row.shape[:2])
        places = dataset.table["image_id"].to_numpy()[batch["index"].numpy()]
        for name, maps in (
            ("softmax", softmax[..., model.num_prefix :]),
            ("sigmoid", torch.sigmoid(row[..., model.num_prefix :])),
        ):
            values = metrics.alignment(maps, **held) | {"class_token": kept}
            columns = {"image_id": places[images].ravel(), "head": heads.ravel(), "map": name}
            columns |= {key: value.cpu().numpy().ravel() for key, value in values.items()}
            found.append(pd.DataFrame(columns))
    return pd.concat(found, ignore_index=True)


def _on(device: torch.device, targets: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.to(device) for name, values in targets.items()}


def middle(grid: tuple[int, int]) -> Tensor:
    """The middle of a picture, half of its height and width: bool `[P]`, row-major.

    It stands in for people in what is shown of pictures that nobody looked at.
    """
    inside = torch.zeros(grid, dtype=torch.bool)
    (top, bottom), (left, right) = ((side // 4, side - side // 4) for side in grid)
    inside[top:bottom, left:right] = True
    return inside.flatten()


def unwatched(dataset: BirdDataset) -> Tensor:
    """Patches that a person might paint out: bool `[n, P]`.

    They are those that people hardly looked at, below a tenth of a map's maximum; all but the
    middle of an image that has none of them, or no map.
    """
    human, known = (part.flatten(1) for part in dataset.maps)
    away = known & (human < 0.1)
    away[~away.any(1)] = ~middle(dataset.grid)
    return away


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
    whole = targets_of(dataset)
    chosen = np.flatnonzero(dataset.has_map)
    if len(chosen) < 2:
        return pd.DataFrame(columns=["image_id", "map", *ALIGNMENT])
    # In double precision a sum less one of its parts is exact, so that cells which tie still do.
    human = whole["human"][chosen].double()  # [n, P]
    candidates = {
        "mean map": human.sum(0) - human,
        "another image": human.roll(-(len(chosen) // 2), 0),
        "uniform": torch.ones_like(human),
    }
    found = {name: _aligned(maps, whole, chosen) for name, maps in candidates.items()}
    read = {i: dataset.readers(i) for i in chosen.tolist()}  # [R, P], maps and counts
    read = {i: both for i, both in read.items() if len(both[0]) > 1}
    if read:
        places = np.repeat(list(read), [len(maps) for maps, _ in read.values()])
        maps = torch.cat([maps for maps, _ in read.values()])
        others = {
            "human": torch.cat([m.double().sum(0) - m for m, _ in read.values()]),
            "fixations": torch.cat([counts.sum(0) - counts for _, counts in read.values()]),
        }
        found["one reader"] = _aligned(maps, whole, places, others)
    table = pd.concat(found, names=["map", "image_id"]).swaplevel().reset_index()
    table["image_id"] = dataset.table["image_id"].to_numpy()[table["image_id"]]
    return table


def _aligned(
    maps: Tensor, targets: dict[str, Tensor], places: np.ndarray, others: Mapping[str, Tensor] = {}
) -> pd.DataFrame:
    """`metrics.alignment` of maps `[n, P]`: a row a place in `targets`, the mean of its maps.

    `others` are targets by map, in the place of those by place.
    """
    parts = []
    for part in torch.arange(len(maps)).split(1024):  # bounds the memory
        held = {name: values[places[part.numpy()]] for name, values in targets.items()}
        held |= {name: values[part] for name, values in others.items()}
        found = metrics.alignment(maps[part], **held)
        parts.append(pd.DataFrame({name: value.numpy() for name, value in found.items()}))
    return pd.concat(parts).groupby(places).mean().astype(float)


def human_baselines(*datasets: BirdDataset, by_image: pd.DataFrame | None = None) -> pd.DataFrame:
    """What a model's metrics are to be held against: means of `baselines_by_image`.

    Args:
        datasets: of several, the mean is over the images of all.
        by_image: that table, where the caller has it already.

    Returns:
        one row a map: perfect (CC alone, see `perfect_cc`; where images have several readers),
        then those of `baselines_by_image`. NaN where a metric is not defined: the CC of a constant
        map, NSS of maps without fixations. KL punishes the map of a single reader for its zeros,
        see `metrics.kl_divergence`.
    """
    images = pd.concat(map(baselines_by_image, datasets)) if by_image is None else by_image
    images = images.drop(columns="image_id")
    if images.empty:
        return images
    table = images.groupby("map").mean()
    if "one reader" in table.index:
        table.loc[BASELINES[0], "cc"] = perfect_cc(*datasets)
    return table.reindex([name for name in BASELINES if name in table.index]).reset_index()


def perfect_cc(*datasets: BirdDataset) -> float:
    """An estimate of the CC of a model that knew all that readers share, in [0, 1].

    sqrt(R r / (1 + (R - 1) r)), the reliability of a mean of R readers (Spearman and Brown, 1910),
    with r the mean correlation of two readers of an image. NaN where no image has two.
    """
    found = []
    for one, i in [(each, i) for each in datasets for i in range(len(each))]:
        maps = one.readers(i)[0]
        if len(maps) > 1:
            each = metrics.cc(maps[:, None], maps)  # [R, R]
            pairs = each[~torch.eye(len(maps), dtype=torch.bool)]
            found.append((len(maps), pairs.nanmean().item()))
    if not found:
        return float("nan")
    readers, r = (float(np.nanmean(values)) for values in zip(*found, strict=True))
    return float(np.sqrt(readers * r / (1 + (readers - 1) * r)))
