"""What a teaching changed: pictures that it saw, and others, before and after."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Subset

from lib.data.dataset import conflicting_decoys
from lib.edit import AttentionEdit
from lib.evaluation import metrics
from lib.model.adapter import restoring
from lib.model.predict import predict
from lib.model.vit import SigmoidViT
from lib.training.learning import trained_modules
from lib.training.tokens import TRUNK_BATCH, CachedTokens, Tick


@dataclass(frozen=True)
class Group:
    """Some pictures of a data set, the trunk's tokens at hand."""

    pictures: CachedTokens
    indices: np.ndarray
    low: Tensor | None = None  # bool [n, P]: cells painted low; None where nobody painted


@dataclass(frozen=True)
class Example:
    """One picture before and after the last `Teacher.teach`; the dicts have these two words."""

    group: str  # of `groups`
    image_id: str
    image: np.ndarray  # uint8 [H, W, 3]
    class_name: str
    edit: AttentionEdit | None  # what was asked of a corrected picture
    predicted: dict[str, str]  # class names
    attention: dict[str, np.ndarray]  # float32 [gh, gw], last block's softmax, mean of heads


def own_copy(model: SigmoidViT, last_blocks: int) -> SigmoidViT:
    """A copy for teaching the last blocks: what does not learn is the model's own, not copied."""
    learns = {id(p) for part in trained_modules(model, last_blocks) for p in part.parameters()}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in learns})


def groups(
    corrected: Group, replayed: Group, held_out: CachedTokens, most: int, seed: int
) -> dict[str, Group]:
    """The pictures to compare, by what they are; a corrected one is in no other group.

    Args:
        most: pictures a group at most, drawn by `seed`; the corrected ones are all there.
    """
    rng = np.random.default_rng(seed)
    taught = corrected.pictures.dataset.table.iloc[corrected.indices]
    ids = taught["image_id"].astype(str)

    def some(pictures: CachedTokens, chosen: np.ndarray) -> Group:
        known = pictures.dataset.table["image_id"].astype(str).isin(ids).to_numpy()
        order = rng.permutation(chosen)
        return Group(pictures, order[~known[order]][:most])

    same = held_out.dataset.table["class_name"].isin(taught["class_name"]).to_numpy()
    return {
        "corrected": corrected,
        "held out, same classes": some(held_out, np.flatnonzero(same)),
        "held out, other classes": some(held_out, np.flatnonzero(~same)),
        "replayed": some(replayed.pictures, replayed.indices),
    }


def compare(
    models: dict[str, SigmoidViT], found: dict[str, Group], tick: Tick | None = None
) -> pd.DataFrame:
    """The table of `Teacher.before_after`; `models` are named before and after."""
    rows = {}
    for name, group in found.items():
        if not len(group.indices):
            continue
        group.pictures.keep(group.indices, tick)
        rows[name] = {"pictures": len(group.indices)}
        looks = {when: _look(model, group) for when, model in models.items()}
        for column in looks["before"]:
            rows[name] |= {f"{column} {when}": look[column].mean() for when, look in looks.items()}
    return pd.DataFrame(rows).T.rename_axis("group").astype({"pictures": int})


def _look(model: SigmoidViT, group: Group) -> pd.DataFrame:
    """One row a picture: the columns of `Teacher.before_after`."""
    seen = _seen(model, group)
    columns = {
        "accuracy": metrics.top_k(seen["scores"], seen["label"], 1).float(),
        "NSS": metrics.nss(seen["attention"], seen["fixations"]),
        "CC": metrics.cc(seen["attention"], seen["human"]),
    }
    if group.low is not None:
        share = metrics.energy_inside(seen["attention"], group.low.float())
        columns["attention on cells painted low"] = share.where(group.low.any(1), torch.nan)
    frame = pd.DataFrame(columns)
    table = group.pictures.dataset.table.iloc[group.indices].reset_index(drop=True)
    if "decoy" in table:
        only = frame["accuracy"].where(conflicting_decoys(table))
        frame.insert(1, "conflicting-decoy accuracy", only)
    return frame.drop(columns="CC" if frame["NSS"].notna().any() else "NSS")


def _seen(model: SigmoidViT, group: Group) -> dict[str, Tensor]:
    """What `predict` gives of every picture: "scores", "attention" `[n, P]`, and what is known.

    The attention is the last block's softmax, mean of heads.
    """
    group.pictures.keep(group.indices)
    parts = []
    pictures = Subset(group.pictures, group.indices)
    with restoring(model):
        for batch, scores, rows in predict(model, pictures, TRUNK_BATCH):
            attention = metrics.patch_attention(rows[model.depth - 1], model.num_prefix)
            part = {name: batch[name] for name in ("label", "human", "fixations")}
            parts.append({**part, "scores": scores, "attention": attention})
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def examples(
    models: dict[str, SigmoidViT],
    found: dict[str, Group],
    edits: dict[str, AttentionEdit],
    most: int,
) -> list[Example]:
    """The last `most` pictures of the first two groups; `edits` are those taught, by image id."""
    shown = []
    for name, group in list(found.items())[:2]:
        chosen, dataset = group.indices[-most:], group.pictures.dataset
        if not len(chosen):
            continue
        seen = {when: _seen(m, Group(group.pictures, chosen)) for when, m in models.items()}
        for k, index in enumerate(map(int, chosen)):
            row = dataset.table.iloc[index]
            image_id, class_name = str(row["image_id"]), str(row["class_name"])
            edit = edits[image_id] if name == "corrected" else None
            predicted = {w: dataset.classes[s["scores"][k].argmax()] for w, s in seen.items()}
            maps = {w: s["attention"][k].view(dataset.grid).numpy() for w, s in seen.items()}
            picture = dataset.image(index)
            shown.append(Example(name, image_id, picture, class_name, edit, predicted, maps))
    return shown
