"""Is the attention used? What a prediction loses when the patches it looks at are taken away.

Two tests. The edit ladder erases patches from the attention itself (their sigmoid attention is set
to 0), ever wider in the model: the information is there, but cannot be read. Deletion and insertion
erase them from the picture (Petsiuk, Das and Saenko, "RISE", BMVC 2018). Attention that explains a
prediction must matter more than random patches of the same number, and than random patches of the
same attention mass; one map can be erased without any effect where earlier blocks have already
copied the answer into the class token ("Attention is not Explanation", Jain and Wallace, NAACL
2019), which is why the ladder has rungs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from scipy.integrate import trapezoid
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms
from tqdm.auto import tqdm

from lib.data.dataset import BirdDataset, subset
from lib.edit import LADDER, AttentionEdit
from lib.evaluation import metrics
from lib.losses import REGION
from lib.model.predict import loader, tf32_products, to_device
from lib.model.vit import SigmoidViT

SHARE = 0.1  # of the patches: how many "most attended" are unless k says otherwise
MOST, REGION_NAME = "most attended", "people's region"
# Controls of the two: random patches outside of what they are held against.
SAME_NUMBER, SAME_MASS = "random, same number", "random, same mass"
AS_REGION = "random, as many as the region"

# --------------------------------------------------------------------------------- the edit ladder


@torch.no_grad()
@tf32_products(False)
def edit_ladder(
    model: SigmoidViT,
    dataset: BirdDataset,
    masks: Tensor | Callable[[dict, Tensor], Mapping[str, Tensor]],
    images: Sequence[int] | None = None,
    rungs: Sequence[str] | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """What erasing the same patches does, made ever wider in the model.

    The rungs within the last two blocks run those blocks only: the trunk before them runs once an
    image, whatever is edited. Every rung with all blocks costs a forward pass.

    Args:
        dataset: without augmentation.
        masks: bool `[n, P]`, the cells of each image of the data set whose sigmoid attention is
            set to 0; or a function that gets a batch and its attention `[B, P]` (of the class row
            of the last block, softmax, mean of heads) and returns `{what: bool [B, P]}`.
        images: which images of the data set; None is all.
        rungs: of `LADDER`; None is those of the model, see `Layout.ladder`.

    Returns:
        one row an image, what and rung ("no edit" and `rungs`): index, what, rung, predicted,
        top1 (bool), p_true, patches (how many are edited), mass (their share of the class row's
        softmax in the last block, unedited, in [0, 1]); and against the unedited prediction:
        flipped (another class), fixed (wrong, now right), broken (right, now wrong), all bool, and
        p_true_change in [-1, 1].

    Raises:
        ValueError: a rung or an image that does not exist; masks of another shape.
    """
    rungs = tuple(model.layout.ladder) if rungs is None else rungs
    for rung in rungs:
        if rung not in LADDER:
            raise ValueError(f'rung "{rung}" is unknown; use some of {", ".join(LADDER)}')
    if not callable(masks):
        _refuse_misfit(masks, dataset)
    model.eval()
    start = max(model.depth - 2, 0)  # the first block of the rung "last two"
    found = []
    chosen = subset(dataset, images)
    bar = tqdm(total=len(chosen), desc="erasing", unit="image", leave=False)
    for batch in loader(chosen, batch_size, model.device):
        first_image = bar.n
        pictures = batch["image"].to(model.device, non_blocking=True)
        entering = {0: model.embed(pictures), start: model.tokens(pictures, start)}
        before, rows = model.forward_tokens(entering[start], start, rows="last", grid=dataset.grid)
        before = before.float().cpu()
        attention = metrics.patch_attention(rows[model.depth - 1], model.num_prefix).cpu()
        given = None if callable(masks) else {"given cells": masks[batch["index"]]}
        cells, passes = given or masks(batch, attention), 0
        for what, mask in cells.items():
            erased = {"patches": mask.sum(-1), "mass": (attention * mask).sum(-1)}
            some = mask.any(-1).nonzero()[:, 0]  # places in the batch, known without the GPU
            none = {name: torch.zeros_like(number) for name, number in erased.items()}
            found.append(_outcomes(batch, before, before, none).assign(what=what, rung="no edit"))
            for rung in rungs:
                first = 0 if LADDER[rung]["blocks"] == "all" else start
                scores = before.clone()
                if len(some):
                    edit = AttentionEdit(mask[some], 0.0, **LADDER[rung])
                    tokens = entering[first][some.to(model.device)]
                    edited = model.forward_tokens(tokens, first, edit, grid=dataset.grid)
                    scores[some] = edited.float().cpu()
                found.append(_outcomes(batch, scores, before, erased).assign(what=what, rung=rung))
                passes += 1  # a batch has many, and takes long: an image is done with its share
                part = len(pictures) * passes // (len(cells) * len(rungs))
                bar.update(first_image + part - bar.n)
    bar.close()
    table = pd.concat(found, ignore_index=True)
    return table[["index", "what", "rung", *table.columns.drop(["index", "what", "rung"])]]


def _refuse_misfit(masks: Tensor, dataset: BirdDataset) -> Tensor:
    wanted = (len(dataset), dataset.grid[0] * dataset.grid[1])
    if tuple(masks.shape) != wanted:
        raise ValueError(
            f"masks or map is {list(masks.shape)}; the data set has {wanted[0]} images of "
            f"{wanted[1]} patches: give {list(wanted)}"
        )
    return masks


def _outcomes(batch: dict, scores: Tensor, before: Tensor, erased: dict) -> pd.DataFrame:
    """One row an image: the prediction of `scores` `[B, classes]`, and against that `before`."""
    labels = batch["label"]
    right, was_right = (s.argmax(-1) == labels for s in (scores, before))
    p_true, p_before = (s.softmax(-1).gather(1, labels[:, None])[:, 0] for s in (scores, before))
    columns = {
        "index": batch["index"],
        "predicted": scores.argmax(-1),
        "top1": right,
        "p_true": p_true,
        **erased,
        "flipped": scores.argmax(-1) != before.argmax(-1),
        "fixed": right & ~was_right,
        "broken": was_right & ~right,
        "p_true_change": p_true - p_before,
    }
    return pd.DataFrame({name: value.numpy() for name, value in columns.items()})


def erase(
    model: SigmoidViT,
    dataset: BirdDataset,
    k: int | None = None,
    seed: int = 0,
    images: Sequence[int] | None = None,
    rungs: Sequence[str] | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """`edit_ladder` for every choice of `cells_to_erase`: what the patches looked at are worth.

    Returns:
        the rows of `edit_ladder` in which something was erased: none of "no edit", and none of
        people's region, or of as many patches, for an image without a human map.
    """
    cells = partial(cells_to_erase, k=k, seed=seed)
    table = edit_ladder(model, dataset, cells, images, rungs, batch_size)
    return table[table["patches"] > 0].reset_index(drop=True)


def cells_to_erase(
    batch: dict, attention: Tensor, k: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Which patches of a batch `erase` takes away.

    Args:
        batch: human and valid `[B, P]`, index `[B]`.
        attention: `[B, P]`, non-negative.
        k: how many patches "most attended" are; a tenth by default.
        seed: of the random choices, which depend on it and on an image's index alone, and are
            nested: they are taken from the front of one random order.

    Returns:
        bool `[B, P]` each. "most attended": the k with most attention. "random, same number": k of
        the others. "random, same mass": as many of the others as it takes to reach the mass of the
        most attended, or all of them where they hold less. "people's region": where the human map
        is at least `REGION` of its maximum; empty without a map. "random, as many as the region":
        of the patches outside of it.

    Raises:
        ValueError: k below 1, or more than there are patches.
    """
    patches = attention.shape[-1]
    k = max(1, round(SHARE * patches)) if k is None else k
    if not 1 <= k <= patches:
        raise ValueError(f"k is {k}, but a picture has {patches} patches; use 1 to {patches}")
    most = torch.zeros_like(attention, dtype=torch.bool)
    most.scatter_(1, attention.topk(k).indices, True)
    human = torch.where(batch["valid"], batch["human"], 0.0)
    region = (human > 0) & (human >= REGION * human.amax(-1, keepdim=True))
    choices = (MOST, SAME_NUMBER, SAME_MASS, REGION_NAME, AS_REGION)
    found = {what: torch.zeros_like(most) for what in choices} | {MOST: most, REGION_NAME: region}
    for row, index in enumerate(batch["index"].tolist()):
        order = torch.from_numpy(np.random.default_rng((seed, index)).permutation(patches))
        others = order[~most[row, order]]
        found[SAME_NUMBER][row, others[:k]] = True
        wanted = attention[row, most[row]].double().sum()
        short = attention[row, others].double().cumsum(0) < wanted
        found[SAME_MASS][row, others[: int(short.sum()) + 1]] = True
        found[AS_REGION][row, order[~region[row, order]][: int(region[row].sum())]] = True
    return found


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means of an `erase` or `edit_ladder` table by what x rung, and by variant where there is one.

    Returns:
        columns images (how many), patches, mass, top1, p_true, flipped, fixed, broken,
        p_true_change.
    """
    keys = [key for key in ("variant", "what", "rung") if key in table]
    names = ["patches", "mass", "top1", "p_true", "flipped", "fixed", "broken", "p_true_change"]
    grouped = table.groupby(keys, sort=False)
    means = grouped[names].mean()
    means.insert(0, "images", grouped["index"].nunique())
    return means


def sentence(table: pd.DataFrame) -> str:
    """What an `erase` table of one model shows, in words: its first and last rung, and a verdict.

    The verdict compares, image by image, what the most attended patches and random patches of the
    same mass cost the true class. A mean difference within two standard errors (the number after
    the sign ±) of 0 is called not measurable: of few images, that says little. Mind how many the
    random ones are, and their mass: taking most of a picture away hurts wherever they lie.

    Raises:
        ValueError: several models, or an order of erasing that is missing.
    """
    if "variant" in table and table["variant"].nunique() > 1:
        raise ValueError(
            f"the table has {table['variant'].nunique()} models; give the rows of one variant"
        )
    missing = {MOST, SAME_MASS} - set(table["what"])
    if missing:
        raise ValueError(f'the table has no rows of "{missing.pop()}"; make it with erase()')
    means = summary(table.drop(columns="variant", errors="ignore"))
    rungs = list(dict.fromkeys(table["rung"]))
    rungs = rungs[:1] + rungs[1:][-1:]  # the first, and the last if it is another
    most, random = ([means.loc[(what, rung)] for rung in rungs] for what in (MOST, SAME_MASS))
    between = " of the predictions and the true class's probability by "
    text = f"Erasing the {most[0]['patches']:.0f} most attended patches in {_PLACES[rungs[0]]} "
    text += f"changes {_effect(most[0], between)}; "
    if len(rungs) > 1:
        text += f"in {_PLACES[rungs[-1]]} {_effect(most[-1])}; "
    text += f"{random[-1]['patches']:.0f} other patches, random ones up to the same attention mass "
    text += f"({random[0]['mass']:.2f} against {most[0]['mass']:.2f}): {_effect(random[-1])}. "
    verdicts = [f"{_verdict(table, rung)} in {_PLACES[rung]}" for rung in rungs]
    images = int(means.loc[(MOST, rungs[0]), "images"])
    text += f"Where the model looks matters {', and '.join(verdicts)}"
    return f"{text}, in probability, on {images} image{'s' * (images != 1)}."


def _verdict(table: pd.DataFrame, rung: str) -> str:
    """How the most attended patches compare with random ones of the same mass on one rung."""
    change = table[table["rung"] == rung].pivot(index="index", columns="what")["p_true_change"]
    more = change[SAME_MASS] - change[MOST]  # above 0 where the most attended cost more
    error = 2 * more.std() / np.sqrt(len(more)) if len(more) > 1 else np.inf
    word = "not measurably more or less"
    if abs(more.mean()) > error:
        word = "more" if more.mean() > 0 else "less"
    return f"{word} than such random patches ({more.mean():+.3f} ± {error:.3f})"


_PLACES = {
    "last block": "the last block",
    "last two": "the last two blocks",
    "all blocks": "all blocks",
    "all blocks, all rows": "all blocks and rows",
}


def _effect(means: pd.Series, between: str = " and ") -> str:
    return f"{means['flipped']:.0%}{between}{means['p_true_change']:+.2f}".replace("%", " %")


# -------------------------------------------------------------------------- deletion and insertion


@torch.no_grad()
@tf32_products(False)
def deletion_insertion(
    model: SigmoidViT,
    dataset: BirdDataset,
    order: Tensor | str = "attention",
    steps: int = 10,
    images: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> pd.DataFrame:
    """The probability of the true class as patches leave the picture, and as they come into it.

    Petsiuk et al. (RISE, BMVC 2018), patch by patch: deletion puts the mean colour (0 in normalised
    units) in place of the first patches of an order, a good order loses the class early and has a
    small area; insertion puts the first patches into a blurred picture, a good order has a large
    area. The blur is a Gaussian of one patch's side (theirs: 5 pixels of 224), so that no patch
    keeps its own detail. Both leave the data that the model was trained on: compare orders, and
    models, with a random order beside them.

    Args:
        dataset: without augmentation.
        order: "attention" (class row of the last block, softmax, mean of heads), "random", or a
            map `[n, P]` of the data set's images, high values first. Equal values come in a random
            order, so an image whose map is 0 everywhere has a random one.
        steps: how many times patches are taken, 1 to P; each costs two forward passes.
        images: which images of the data set; None is all. seed: of random orders, with the index.

    Returns:
        one row an image, curve ("deletion", "insertion") and step: index, curve, fraction (of the
        patches that are gone, or in, from 0 to 1), p_true.

    Raises:
        ValueError: an unknown order, a map of another shape or with NaN, steps out of range.
    """
    patches = dataset.grid[0] * dataset.grid[1]
    if not 1 <= steps <= patches:
        raise ValueError(f"steps is {steps}, but a picture has {patches} patches; use 1 to that")
    if isinstance(order, str) and order not in ("attention", "random"):
        raise ValueError(f'order is "{order}"; use "attention", "random" or a map [n, P]')
    if not isinstance(order, str) and _refuse_misfit(order, dataset).isnan().any():
        raise ValueError("the map that gives the order has NaN; give every patch a number")
    model.eval()
    counts = [round(step * patches / steps) for step in range(steps + 1)]
    found = []
    chosen = subset(dataset, images)
    bar = tqdm(total=len(chosen), desc="deletion and insertion", unit="image", leave=False)
    for batch in loader(chosen, batch_size, model.device):
        first_image = bar.n
        there = to_device(batch, model.device)
        pictures, labels = there["image"], there["label"]
        if not isinstance(order, str):
            values = order[batch["index"]]
        elif order == "random":
            values = torch.zeros(len(pictures), patches)
        else:
            _, rows = model(pictures, rows="last")
            values = metrics.patch_attention(rows[model.depth - 1], model.num_prefix).cpu()
        rank = _ranks(values, batch["index"], seed).to(model.device)
        blurred = blur(pictures, model.vit.patch_embed.patch_size)
        for step, count in enumerate(counts, start=1):
            first = patch_pixels(rank < count, dataset.grid, pictures.shape[-2:])
            deleted = pictures.masked_fill(first, 0)
            inserted = torch.where(first, pictures, blurred)
            for curve, seen in (("deletion", deleted), ("insertion", inserted)):
                p_true = model(seen).float().softmax(-1).gather(1, labels[:, None])[:, 0].cpu()
                part = pd.DataFrame({"index": batch["index"], "curve": curve, "p_true": p_true})
                found.append(part.assign(fraction=count / patches))
            bar.update(first_image + len(pictures) * step // len(counts) - bar.n)
    bar.close()
    return pd.concat(found, ignore_index=True)


def _ranks(values: Tensor, indices: Tensor, seed: int) -> Tensor:
    """Place of every patch in the order, highest value first: `[B, P]` to int `[B, P]`."""
    ranks = []
    for row, index in zip(values, indices.tolist(), strict=True):
        mixed = torch.from_numpy(np.random.default_rng((seed, index)).permutation(len(row)))
        ranks.append(mixed[row[mixed].argsort(descending=True, stable=True)].argsort())
    return torch.stack(ranks)


def patch_pixels(cells: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The pixels of patches: bool `[B, P]` to bool `[B, 1, H, W]`, P = gh * gw, `size` (H, W)."""
    sides = [-(-pixels // count) for pixels, count in zip(size, grid, strict=True)]
    pixels = cells.unflatten(1, grid).repeat_interleave(sides[0], 1).repeat_interleave(sides[1], 2)
    return pixels[:, None, : size[0], : size[1]]


def blur(pictures: Tensor, patch: tuple[int, int]) -> Tensor:
    """Pictures `[B, 3, H, W]` blurred by a Gaussian with the patch's sides as its deviations."""
    # The kernel reaches two deviations, and no further than the mirrored picture.
    reach = [min(2 * p, side - 1) for p, side in zip(patch, pictures.shape[-2:], strict=True)]
    kernel = [2 * reach[1] + 1, 2 * reach[0] + 1]  # x, y
    return transforms.gaussian_blur(pictures, kernel, [float(patch[1]), float(patch[0])])


def areas(table: pd.DataFrame) -> pd.DataFrame:
    """Area under each curve of `deletion_insertion`, by the trapezoid rule, in [0, 1].

    Returns:
        one row an image and curve (and variant or order, where the table has these columns), with
        a column area.
    """
    keys = [key for key in ("variant", "order", "index", "curve") if key in table]
    curves = table.sort_values("fraction").groupby(keys, sort=False)[["p_true", "fraction"]]
    area = curves.apply(lambda curve: trapezoid(curve["p_true"], curve["fraction"]))
    return area.to_frame("area").reset_index()
