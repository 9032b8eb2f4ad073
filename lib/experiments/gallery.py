"""The gallery page: pictures whose prediction another training fixed or broke, as plain HTML.

Which pictures are shown is decided by a rule that the page states, and it says how many there are
in all: a few chosen by hand would show whatever one likes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm.auto import tqdm

from lib import figures
from lib.data.dataset import BirdDataset
from lib.evaluation import metrics
from lib.experiments.compare import Trial
from lib.files import make_folder, write_bytes, write_text
from lib.model.vit import SigmoidViT

TEMPLATE = Path(__file__).parent / "gallery.html"
# How pictures are chosen, in the words of the page.
RULES = {
    "order": "in the order of the data set, then of the seeds",
    "change": "those whose probability of the true class changed most",
}
Rule = Literal["order", "change"]


@torch.no_grad()
def attention_maps(
    model: SigmoidViT, dataset: BirdDataset, chosen: Sequence[int], batch_size: int = 16
) -> tuple[list[np.ndarray], list[bool]]:
    """Where a model looks: the last block's class row, mean of heads, for some images.

    Args:
        chosen: positions in the data set.

    Returns:
        for every chosen image its map `[gh, gw]`, non-negative, and whether the prediction is
        right.
    """
    device = next(model.parameters()).device
    maps, right = [], []
    for start in range(0, len(chosen), batch_size):
        items = [dataset[int(i)] for i in chosen[start : start + batch_size]]
        batch = torch.utils.data.default_collate(items)
        scores, rows = model(batch["image"].to(device), rows="last")
        attention = metrics.patch_attention(rows[model.depth - 1], model.num_prefix).cpu()
        maps += list(attention.reshape(-1, *dataset.grid).numpy())  # [B, P] to [B, gh, gw]
        right += (scores.argmax(-1).cpu() == batch["label"]).tolist()
    return maps, right


def changed_predictions(images: pd.DataFrame, against: str) -> pd.DataFrame:
    """Images that a variant predicts right and the `against` model of the same seed does not.

    Args:
        images: a row an image, variant and seed, as `measure_runs` of compare.py gives them:
            every variant and seed has the images in the order of the data set.

    Returns:
        a row a change, in the order of variants, images, seeds: variant, seed, kind ("fixed", or
        "broken" where it is the other way round), position (in the data set), image_id,
        class_name, predicted_before, confidence_before, predicted_after, confidence_after, change
        (of the probability of the true class, in [-1, 1]).
    """
    columns = ["image_id", "class_name", "top1", "predicted", "confidence", "p_true"]
    numbered = images[["variant", "seed", *columns]].copy()
    numbered["position"] = images.groupby(["variant", "seed"], sort=False).cumcount()
    before = numbered[numbered["variant"] == against].drop(columns=["variant", "class_name"])
    after = numbered[numbered["variant"] != against]
    keys = ["seed", "image_id", "position"]
    pairs = after.merge(before, on=keys, suffixes=("_after", "_before"))
    pairs = pairs[pairs["top1_after"] != pairs["top1_before"]]
    order = {name: number for number, name in enumerate(dict.fromkeys(images["variant"]))}
    pairs = pairs.assign(
        kind=np.where(pairs["top1_after"].astype(bool), "fixed", "broken"),
        change=pairs["p_true_after"] - pairs["p_true_before"],
        order=pairs["variant"].map(order),
    ).sort_values(["order", "position", "seed"], ignore_index=True)
    shown = ["variant", "seed", "kind", "position", "image_id", "class_name", "predicted_before"]
    return pairs[[*shown, "confidence_before", "predicted_after", "confidence_after", "change"]]


def choose(changes: pd.DataFrame, count: int, rule: Rule = "order") -> pd.DataFrame:
    """At most `count` changes of each variant and kind, by one of `RULES`."""
    if rule == "change":
        changes = changes.sort_values("change", key=abs, ascending=False, kind="stable")
    return changes.groupby(["variant", "kind"], sort=False).head(count)


def write_gallery(
    folder: Path,
    trials: Sequence[Trial],
    dataset: BirdDataset,
    changes: pd.DataFrame,
    against: str,
    count: int,
    rule: Rule = "order",
    which: Literal["last", "best"] = "last",
    split: str = "test",
) -> Path:
    """Writes `folder/gallery.html` and its pictures below `folder/gallery`.

    Args:
        changes: all of them, from `changed_predictions`. count, rule: see `choose`.
        dataset: the split that was measured, without augmentation.

    Returns:
        the page. Its links are relative: the folder can be moved, or put on a web server.
    """
    chosen = choose(changes, count, rule)
    pictures = folder / "gallery"
    make_folder(pictures)
    human = {}
    for position in tqdm(sorted(set(chosen["position"])), desc="gallery", leave=False):
        item = dataset.annotations(int(position))
        image = dataset.image(int(position))
        _save_picture(pictures / f"{position}-image.png", image)
        human[position] = bool(item["valid"].any())
        if human[position]:
            people = torch.where(item["valid"], item["human"], torch.nan)
            people = people.reshape(dataset.grid).numpy()
            _save_picture(pictures / f"{position}-people.png", image, people)
    names = _save_attention(pictures, trials, dataset, chosen, against, which)
    page = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True).render(
        against=against,
        split=split,
        images=len(dataset),
        rule=RULES[rule],
        sections=_sections(trials, dataset, changes, chosen, against, human, names),
    )
    write_text(folder / "gallery.html", page)
    return folder / "gallery.html"


def _save_attention(
    pictures: Path,
    trials: Sequence[Trial],
    dataset: BirdDataset,
    chosen: pd.DataFrame,
    against: str,
    which: Literal["last", "best"],
) -> dict[tuple[str, int], int]:
    """A picture a model and image that the page shows; each model is loaded once.

    Returns:
        the number that stands for a variant and seed in the names of the pictures: variants can be
        called anything, files cannot.
    """
    names = {(trial.variant, trial.seed): number for number, trial in enumerate(trials)}
    for trial in tqdm(trials, desc="gallery models", leave=False):
        shown = chosen[chosen["seed"] == trial.seed]
        if trial.variant != against:
            shown = shown[shown["variant"] == trial.variant]
        positions = sorted(set(shown["position"]))
        if not positions:
            continue
        maps, _ = attention_maps(trial.run.model(which), dataset, positions)
        number = names[trial.variant, trial.seed]
        for position, attention in zip(positions, maps, strict=True):
            file = pictures / f"{position}-model{number}.png"
            _save_picture(file, dataset.image(int(position)), attention)
    return names


def _sections(
    trials: Sequence[Trial],
    dataset: BirdDataset,
    changes: pd.DataFrame,
    chosen: pd.DataFrame,
    against: str,
    human: dict[int, bool],
    names: dict[tuple[str, int], int],
) -> list[dict[str, object]]:
    """What the template shows: a section a variant, with its fixed and its broken images."""
    sections = []
    for variant in dict.fromkeys(trial.variant for trial in trials if trial.variant != against):
        kinds = []
        for kind in ("fixed", "broken"):
            is_ours = (changes["variant"] == variant) & (changes["kind"] == kind)
            shown = chosen[(chosen["variant"] == variant) & (chosen["kind"] == kind)]
            cards = [
                row
                | {
                    "has_people": human[row["position"]],
                    "name_before": dataset.classes[row["predicted_before"]],
                    "name_after": dataset.classes[row["predicted_after"]],
                    "model_before": names[against, row["seed"]],
                    "model_after": names[variant, row["seed"]],
                }
                for row in shown.to_dict("records")
            ]
            kinds.append({"kind": kind, "cards": cards, "total": int(is_ours.sum())})
        ours = {trial.seed for trial in trials if trial.variant == variant}
        seeds = sorted(seed for seed in ours if (against, seed) in names)
        sections.append({"variant": variant, "seeds": seeds, "kinds": kinds})
    return sections


def _save_picture(path: Path, image: np.ndarray, grid_map: np.ndarray | None = None) -> None:
    content = io.BytesIO()
    Image.fromarray(figures.picture(image, grid_map)).save(content, format="png")
    write_bytes(path, content.getvalue())
