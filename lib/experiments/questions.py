"""The slow questions to trained models: is their attention causal, and what does it look at?

Each costs several forward passes an image, so each is asked on a number of images of its own,
spread evenly over the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from lib import figures
from lib.data.dataset import BirdDataset
from lib.evaluation import erasing, outliers
from lib.experiments.compare import Trial
from lib.files import write_text
from lib.model.predict import processes
from lib.model.vit import SigmoidViT

ORDERS = ("attention", "random")  # of the patches of deletion and insertion; people's are added


def spread(dataset: BirdDataset, count: int) -> list[int]:
    """`count` images at even distances; all where there are no more."""
    return np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist()


def probe(
    trials: Sequence[Trial],
    dataset: BirdDataset,
    erase: int = 0,
    curves: int = 0,
    tokens: int = 0,
    which: str = "last",
) -> dict[str, pd.DataFrame]:
    """Asks every model; each argument is a number of images, 0 does not ask.

    Args:
        erase: `lib.evaluation.erasing.erase`, about 12 forward passes an image.
        curves: `lib.evaluation.erasing.deletion_insertion` in the order of the model's own
            attention, of people's map, of the mean map and at random, about 80 forward passes an
            image.
        tokens: `lib.evaluation.outliers.per_block`, about one.

    Returns:
        tables by name, with columns variant and seed: erasing (a row an image), curves (a row an
        image, order and fraction) and areas, tokens (a row an image and block); those not asked are
        not there.

    Raises:
        ValueError: a number below 0.
    """
    for name, count in (("erase", erase), ("curves", curves), ("tokens", tokens)):
        if count < 0:
            raise ValueError(f"{name} is {count}; use a number of images, or 0 to leave it out")
    if not erase and not curves and not tokens:
        return {}
    found: dict[str, list[pd.DataFrame]] = {}
    for trial in tqdm(trials, desc="probing runs", leave=False):
        model = trial.run.model(which).to(processes().device)
        for name, table in _ask(model, dataset, erase, curves, tokens).items():
            found.setdefault(name, []).append(table.assign(variant=trial.variant, seed=trial.seed))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}


def _ask(
    model: SigmoidViT, dataset: BirdDataset, erase: int, curves: int, tokens: int
) -> dict[str, pd.DataFrame]:
    found = {}
    if erase:
        found["erasing"] = erasing.erase(model, dataset, images=spread(dataset, erase))
    if curves:
        orders = dict(zip(ORDERS, ORDERS, strict=True))
        if dataset.has_map.any():
            people = dataset.maps[0].flatten(1)
            # The mean map knows the middle of a picture and nothing of the picture.
            orders |= {"people": people, "mean map": people.mean(0).expand_as(people)}
        found["curves"] = pd.concat(
            erasing.deletion_insertion(
                model, dataset, order, images=spread(dataset, curves)
            ).assign(order=name)
            for name, order in orders.items()
        )
        found["areas"] = erasing.areas(found["curves"])
    if tokens:
        read = outliers.read_tokens(model, dataset, spread(dataset, tokens))
        found["tokens"] = outliers.per_block(read)
    return found


def in_words(tables: dict[str, pd.DataFrame]) -> str:
    """What was found, to be read in a terminal; empty where nothing was asked."""
    parts = []
    if "erasing" in tables:
        for variant, part in tables["erasing"].groupby("variant", sort=False):
            parts.append(f"{variant}: {erasing.sentence(over_seeds(part))}")
    if "areas" in tables:
        wide = tables["areas"].pivot_table(
            index="variant", columns=["curve", "order"], values="area", sort=False
        )
        parts.append(f"Area under the curves of deletion and insertion\n\n{wide.round(3)}")
    if "tokens" in tables:
        names = ["outliers", "outliers_mass", "background", "background_mass", "flat", "flat_mass"]
        blocks = outliers.by_block(tables["tokens"].drop(columns="seed"))
        last = blocks.xs(blocks.index.get_level_values("block").max(), level="block")
        parts.append(
            "Last block: share of the patches, and of the attention on patches (_mass), on tokens "
            "of outlying norm, on background, on flat background\n\n"
            f"{last[[*names, 'sinks', 'sinks_mass']].round(4).T.to_string()}"
        )
    return "\n\n".join(parts)


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """One row where there was one a seed: the means. Images, not seeds, are drawn anew."""
    numbers = table.drop(columns="seed").select_dtypes(["number", "bool"]).columns
    keys = [name for name in ("variant", "what", "rung", "order", "curve") if name in table]
    keys += [name for name in ("index", "block", "fraction") if name in table]
    values = [name for name in numbers if name not in keys]
    return table.groupby(keys, sort=False)[values].mean().reset_index()


def write(folder: Path, tables: dict[str, pd.DataFrame]) -> dict[str, figures.Figure]:
    """Writes the tables as CSV and gives their figures by name."""
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
    drawn = {}
    if "erasing" in tables:
        drawn["erasing"] = figures.erasing(over_seeds(tables["erasing"]))
    if "curves" in tables:
        drawn["curves"] = figures.curves(over_seeds(tables["curves"]), hue="order")
    if "tokens" in tables:
        drawn["tokens"] = figures.artefacts(over_seeds(tables["tokens"]))
    return drawn
