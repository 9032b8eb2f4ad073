"""Outliers: patches whose token, or whose attention, is out of proportion.

Darcet, Oquab, Mairal and Bojanowski ("Vision Transformers Need Registers", ICLR 2024) found that
large ViTs turn some patches of low-information background into scratch memory: their tokens have
outlying norms and draw attention that has nothing to do with what is seen there. Here the norms
and class rows of every block are read, and attention is added up on outliers, on background, on
low-information background, and on sinks, before and after a model was taught where to look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lib.data.dataset import BirdDataset, subset
from lib.evaluation import metrics
from lib.model.predict import loader, tf32_products
from lib.model.vit import SigmoidViT

# A token is an outlier when its norm exceeds the median by so many robust standard deviations.
OUTLIER = 6.0
# A patch of the background is a sink when it gets more than so many times the uniform share.
SINK = 10.0
FLAT = 0.25  # quantile of the patches' pixel deviation up to which a patch has low information


@dataclass(frozen=True)
class PatchTokens:
    """What `read_patch_tokens` found: n images, D blocks, P patches row by row."""

    index: np.ndarray  # int [n]; of each image in the data set
    norms: np.ndarray  # float32 [n, D, P]; L2 norm of the patch's token as it leaves the block
    attention: np.ndarray  # float32 [n, D, P]; class row's softmax, mean of heads, sums to 1
    contrast: np.ndarray  # float32 [n, P]; deviation of the patch's pixels, in normalised units
    background: np.ndarray  # bool [n, P]; wholly outside the bird's box; all False without a box
    has_box: np.ndarray  # bool [n]


@torch.no_grad()
@tf32_products(False)
def read_patch_tokens(
    model: SigmoidViT,
    dataset: BirdDataset,
    images: Sequence[int] | None = None,
    batch_size: int = 32,
) -> PatchTokens:
    """Norms and class rows of every block for the images of a data set (None is all of them).

    Attention is the softmax on patches, divided by its mass there: what the class token and the
    registers keep is left out. It is NaN in a block without a row to read. Of a pooling by
    attention, the last block, norms are those of the tokens that it pools. `contrast` is the
    standard deviation of the patch's pixels, mean of the three channels. About 8 bytes an image,
    block and patch are held in memory.

    Raises:
        ValueError: an image that the data set does not have.
    """
    model.eval()
    found: dict[str, list[Tensor]] = {"index": [], "norms": [], "attention": [], "contrast": []}
    chosen = subset(dataset, images)
    bar = tqdm(total=len(chosen), desc="tokens of every block", unit="image", leave=False)
    for batch in loader(chosen, batch_size, model.device):
        pictures, norms, attention = batch["image"].to(model.device, non_blocking=True), [], []
        for tokens, row in model.block_by_block(pictures):
            norms.append(tokens[:, model.num_prefix :].float().norm(dim=-1))
            if row is None:  # no class token, so that nothing in this block decides
                attention.append(torch.full_like(norms[-1], torch.nan))
                continue
            on_patches = metrics.patch_attention(row, model.num_prefix)
            attention.append(on_patches / on_patches.sum(-1, keepdim=True))
        found["index"].append(batch["index"])
        found["norms"].append(torch.stack(norms, dim=1).cpu())
        found["attention"].append(torch.stack(attention, dim=1).cpu())
        found["contrast"].append(_contrast(pictures, dataset.grid).cpu())
        bar.update(len(pictures))
    bar.close()
    arrays = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    has_box = np.isfinite(dataset.corners()[arrays["index"]]).all(axis=1)
    cover = dataset.cover()
    free = has_box[:, None] if cover is None else (cover == 0).numpy()[arrays["index"]]
    return PatchTokens(**arrays, background=free & has_box[:, None], has_box=has_box)


def _contrast(pictures: Tensor, grid: tuple[int, int]) -> Tensor:
    """`PatchTokens.contrast`: `[B, 3, H, W]` to `[B, P]`."""
    height, width = (side // cells for side, cells in zip(pictures.shape[-2:], grid, strict=True))
    patches = pictures.unfold(2, height, height).unfold(3, width, width)  # [B, 3, gh, gw, h, w]
    return patches.flatten(4).std(dim=-1, correction=0).mean(dim=1).flatten(1)


def outlier_cutoffs(norms: np.ndarray, k: float = OUTLIER) -> np.ndarray:
    """The norm above which a patch of a block is an outlier: `[n, D, P]` to `[D]`.

    median + k * 1.4826 * MAD over all patches of all images, block by block. The paper cuts at a
    norm of 150, picked by hand from the histogram of DINOv2 ViT-g's output, which has two humps.
    Norms of other models, and of other blocks, have another scale, so such a number cannot be
    carried over. Median and MAD follow the bulk of the patches, whatever a few outliers do, and
    change with the unit as the norms do. Of Gaussian norms k = 6 leaves 1 patch in a thousand
    million above (k = 4 would leave 3 in 100,000), but norms of real tokens have longer tails: look
    at a histogram for whether what is above the cutoff is a second hump, which the paper calls
    artefacts, or the end of a tail.

    Raises:
        ValueError: k is not above 0.
    """
    if k <= 0:
        raise ValueError(f"k is {k:g}; use a number above 0, in robust standard deviations")
    norms = norms.astype(np.float64)
    median = np.median(norms, axis=(0, 2), keepdims=True)
    deviation = 1.4826 * np.median(np.abs(norms - median), axis=(0, 2))  # a Gaussian's standard one
    return median[0, :, 0] + k * deviation


def low_information(tokens: PatchTokens) -> np.ndarray:
    """Background whose pixels vary least: bool `[n, P]`.

    Patches outside the bird's box whose contrast is in the lowest quarter of all patches read.
    """
    return tokens.background & (tokens.contrast <= np.quantile(tokens.contrast, FLAT))


def outliers_by_block(tokens: PatchTokens) -> pd.DataFrame:
    """Where norms are outliers and where attention goes, one row an image and block.

    Returns:
        index, block (from 0), norm (median over patches), norm_max, then for each set of patches
        its share of all patches, the attention on it (`_mass`) and their ratio (`_enrichment`, 1
        where attention is uniform, NaN where the set is empty): outliers (`outlier_cutoffs`, on the
        norms that leave the block), background, flat (`low_information`), sinks (background with
        more than `SINK` times the uniform share). outliers_outside is the share of the outliers on
        background: above the column background they gather there. Without a box, what depends on
        it is NaN.
    """
    cutoffs = outlier_cutoffs(tokens.norms)
    blocks, patches = tokens.norms.shape[1:]
    outliers = tokens.norms > cutoffs[:, None]  # [n, D, P]
    background = np.broadcast_to(tokens.background[:, None], outliers.shape)
    sets = {
        "outliers": outliers,
        "background": background,
        "flat": np.broadcast_to(low_information(tokens)[:, None], outliers.shape),
        "sinks": background & (tokens.attention > SINK / patches),
    }
    boxed = np.where(tokens.has_box, 1.0, np.nan)[:, None]  # [n, 1]
    columns = {
        "index": np.repeat(tokens.index, blocks).reshape(-1, blocks),
        "block": np.broadcast_to(np.arange(blocks), outliers.shape[:2]),
        "norm": np.median(tokens.norms, axis=-1),
        "norm_max": tokens.norms.max(axis=-1),
    }
    for name, cells in sets.items():
        known = 1.0 if name == "outliers" else boxed
        share = cells.mean(axis=-1) * known  # [n, D]
        mass = (tokens.attention * cells).sum(axis=-1) * known
        columns |= {name: share, f"{name}_mass": mass, f"{name}_enrichment": _ratio(mass, share)}
    outside = (outliers & background).mean(axis=-1) * boxed
    columns["outliers_outside"] = _ratio(outside, columns["outliers"])
    return pd.DataFrame({name: values.ravel() for name, values in columns.items()})


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def mean_by_block(table: pd.DataFrame) -> pd.DataFrame:
    """Means of `outliers_by_block` over images, by block, and by variant where there is one.

    Enrichments, and outliers_outside, are ratios of the means, so that an image with a single
    outlier does not weigh as much as one with fifty.
    """
    keys = [key for key in ("variant", "block") if key in table]
    boxed = table["outliers"].where(table["background"].notna())
    outside = (table["outliers_outside"].fillna(0) * boxed).to_numpy()
    table = table.assign(boxed=boxed, outside=outside)
    means = table.drop(columns="index").groupby(keys, sort=False).mean()
    for name in ("outliers", "background", "flat", "sinks"):
        means[f"{name}_enrichment"] = means[f"{name}_mass"] / means[name].where(means[name] > 0)
    means["outliers_outside"] = means["outside"] / means["boxed"].where(means["boxed"] > 0)
    return means.drop(columns=["boxed", "outside"])
