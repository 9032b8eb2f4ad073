"""Teaching by simulated people: what careful corrections of drawn birds bring, and two controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from lib.data.corrections import Correction
from lib.data.dataset import BirdDataset, conflicting_decoys, decoy_cover
from lib.edit import AttentionEdit
from lib.evaluation.per_image import per_image
from lib.evaluation.tables import summarise
from lib.model.vit import SigmoidViT
from lib.training.taught import own_copy
from lib.training.teach import TeachConfig, Teacher


def simulated_corrections(
    dataset: BirdDataset,
    indices: Sequence[int],
    model: str = "",
    blocks: str | tuple[int, ...] = "all",
    only_low: bool = False,
) -> list[Correction]:
    """SIMULATED corrections: what a careful person might paint on toy birds; nobody painted them.

    Cells of which the decoy covers more than a tenth are painted 0, and the others that people
    looked at (0.3 of the map's maximum) 0.9. All else is left to the model.

    Args:
        dataset: drawn birds. indices: which of them. model: fingerprint to write into them.
        only_low: paint the decoy alone.

    Raises:
        ValueError: the data set has no decoys.
    """
    cover = decoy_cover(dataset)
    if cover is None:
        raise ValueError("the pictures have no decoy to paint away; simulate on the toy birds")
    corrections = []
    for index in map(int, indices):
        low = cover[index] > 0.1
        high = (dataset[index]["human"] >= 0.3) & ~low & (not only_low)
        mask, values = (low | high).reshape(dataset.grid), 0.9 * high.reshape(dataset.grid)
        row = dataset.table.iloc[index]
        edit = AttentionEdit(mask, values, blocks=blocks)
        image_id, class_name = str(row["image_id"]), str(row["class_name"])
        made = Correction.now(image_id, edit, model, "simulated", class_name=class_name)
        corrections.append(made)
    return corrections


def shuffled(corrections: Sequence[Correction]) -> list[Correction]:
    """The same maps on the wrong pictures: each picture gets its neighbour's. A control."""
    pairs = zip(corrections, [*corrections[1:], *corrections[:1]], strict=True)
    return [replace(one, edit=other.edit) for one, other in pairs]


def simulated_teaching(
    model: SigmoidViT,
    train: BirdDataset,
    test: BirdDataset,
    counts: Sequence[int],
    last_blocks: int = 1,
    only_low: bool = False,
) -> pd.DataFrame:
    """What simulated corrections of drawn birds teach, beside two controls.

    Training pictures whose decoy names another class are corrected, the first `counts` of them.
    *control* takes the same steps with the replay set alone; *shuffled* has the same maps on the
    wrong pictures. The model itself stays as it is.

    Args:
        model: to start from. train: its training pictures, not augmented. test: to measure on.
        counts: numbers of corrections, ascending; shuffling takes 2 at least.
        last_blocks: blocks that learn. only_low: see `simulated_corrections`.

    Returns:
        one row a model, in this order: before, control, and for each count corrections and
        shuffled. Columns: model (its name), corrections (their number), seconds (of teaching),
        and those of `lib.evaluation.tables.summarise`.

    Raises:
        ValueError: there are fewer such pictures than the largest count.
    """
    conflicting = np.flatnonzero(conflicting_decoys(train.table))
    if max(counts) > len(conflicting):
        raise ValueError(
            f"{max(counts)} corrections are asked for, but only {len(conflicting)} training "
            "pictures have a decoy that names another class; ask for fewer"
        )
    made = simulated_corrections(train, conflicting[: max(counts)], only_low=only_low)
    config = TeachConfig(last_blocks=last_blocks)
    # One copy of the model each for the control and for all others: tokens are kept, undo is exact.
    control = Teacher(own_copy(model, last_blocks), train, replace(config, lam=0.0))
    teacher = Teacher(own_copy(model, last_blocks), train, config)
    jobs = [("control", control, 0, made[:1])]
    for count in counts:
        jobs.append((f"{count} correction" + "s" * (count > 1), teacher, count, made[:count]))
        if count > 1:
            jobs.append((f"{count} shuffled", teacher, count, shuffled(made[:count])))
    rows = [{"model": "before", "corrections": 0} | summarise(per_image(model, test))]
    for name, one, count, corrections in tqdm(jobs, desc="models", leave=False):
        seconds = one.teach(corrections).seconds
        row = {"model": name, "corrections": count, "seconds": seconds}
        rows.append(row | summarise(per_image(one.model, test)))
        one.undo()
    return pd.DataFrame(rows)
