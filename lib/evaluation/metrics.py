"""Metrics: of the classification, and of how well attention agrees with people.

Alignment metrics compare a non-negative map with human gaze on the same patch grid, `[..., P]`
each, over any leading dimensions that broadcast: images, or images and heads (`[B, H, P]` against
`[B, 1, P]`). Definitions follow Bylinskii et al., "What do different evaluation metrics tell us
about saliency models?" (TPAMI 2019), and agree with the package pysaliency (a test holds this).

Where a metric has no answer it is NaN, and means are taken with `nanmean`:

| input | answer |
| --- | --- |
| constant map | NSS, CC: NaN (pysaliency: 0); AUCs: 0.5; pointing game: the target's mean share |
| map that is 0 everywhere | SIM, KL, energy inside, IoU: NaN as well |
| no fixation, a fixation on every patch (AUC-Judd), or a human map that is 0 everywhere | NaN |
| empty region (no bounding box, no part) | NaN |
| a single fixation | an answer like any other; AUC-Judd is the rank of that patch |
| NaN anywhere in a map | NaN for that map, whatever the metric; other maps are as they were |
"""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the quotient and the logarithm of KL, as the MIT/Tuebingen saliency benchmark does.
KL_TINY = 2.2204e-16


def nss(attention: Tensor, fixations: Tensor) -> Tensor:
    """Normalised scanpath saliency: the mean z-score of the map at the fixated patches.

    Args:
        attention: `[..., P]`, any non-negative scale. fixations: `[..., P]`, counts.

    Returns:
        `[...]`; 0 is chance, higher is better. NaN without fixations or for a constant map.
    """
    z = (attention - attention.mean(-1, keepdim=True)) / _std(attention)[..., None]
    return (z * fixations).sum(-1) / _nan_where_zero(fixations.sum(-1))


def cc(attention: Tensor, human: Tensor) -> Tensor:
    """Pearson's correlation of two maps `[..., P]`: `[...]` in [-1, 1]; NaN if one is constant."""
    a = attention - attention.mean(-1, keepdim=True)
    b = human - human.mean(-1, keepdim=True)
    return (a * b).mean(-1) / (_std(attention) * _std(human))


def sim(attention: Tensor, human: Tensor) -> Tensor:
    """Similarity: the shared mass of two maps made to sum to 1, `[...]` in [0, 1]; 1 is best."""
    return torch.minimum(_distribution(attention), _distribution(human)).sum(-1)


def kl_divergence(attention: Tensor, human: Tensor) -> Tensor:
    """KL(human || attention) in nats, both made to sum to 1: `[...]`, 0 is best.

    Mass of people where the attention is exactly 0 counts 36 nats: a map that was cut off (that of
    a reader, rendered to three standard deviations) is punished for its cut; softmax never has one.
    """
    p, q = _distribution(human), _distribution(attention)
    return (p * torch.log(p / (q + KL_TINY) + KL_TINY)).sum(-1)


def auc(attention: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Area under the ROC curve: how often the map is higher at a positive than at a negative patch.

    Args:
        positives, negatives: `[..., P]`, how often each patch was drawn, float32 or better (half
            precision cannot count them). Ties count one half.

    Returns:
        `[...]` in [0, 1]; 0.5 is chance.
    """
    broadcast = torch.broadcast_tensors(attention, positives, negatives)
    value, positive, negative = (part.contiguous() for part in broadcast)
    ordered, order = value.sort(dim=-1)
    counts = negative.gather(-1, order).cumsum(-1)
    sums = torch.nn.functional.pad(counts, (1, 0))  # [..., P + 1]
    below = sums.gather(-1, torch.searchsorted(ordered, value))
    not_above = sums.gather(-1, torch.searchsorted(ordered, value, right=True))
    wins = ((below + not_above) / 2 * positive).sum(-1)
    area = wins / _nan_where_zero(positive.sum(-1)) / _nan_where_zero(negative.sum(-1))
    return area.where(~value.isnan().any(-1), torch.nan)


def auc_judd(attention: Tensor, fixations: Tensor) -> Tensor:
    """AUC of fixated patches (by their counts) against unfixated ones; Judd et al., ICCV 2009.

    All values of the map are thresholds and ties count one half, so no noise is needed.
    """
    return auc(attention, fixations, (fixations == 0).to(fixations))


def auc_shuffled(attention: Tensor, fixations: Tensor, elsewhere: Tensor) -> Tensor:
    """Shuffled AUC: fixated patches against where people looked in *other* images.

    It gives nothing for knowing that people look at the middle (Tatler et al. 2005).

    Args:
        elsewhere: `[..., P]`, fixation counts of all other images.
    """
    return auc(attention, fixations, elsewhere)


def pointing_game(attention: Tensor, target: Tensor) -> Tensor:
    """Whether the highest patch lies on a target (Zhang et al., ECCV 2016).

    Args:
        target: `[..., P]` in [0, 1], the share of each patch that the target covers.

    Returns:
        `[...]` in [0, 1]: that share at the highest patch, averaged over patches that tie.
    """
    peak = (attention == attention.amax(-1, keepdim=True)).to(target)
    hit = (peak * target).sum(-1) / _nan_where_zero(peak.sum(-1))  # NaN equals nothing
    return hit.where(target.sum(-1) > 0, torch.nan)


def energy_inside(attention: Tensor, region: Tensor) -> Tensor:
    """Share of the map's mass inside a region `[..., P]` in [0, 1]: `[...]` in [0, 1].

    The energy-based pointing game of Wang et al., "Score-CAM" (CVPR workshops 2020).
    """
    inside = (_distribution(attention) * region).sum(-1)
    return inside.where(region.sum(-1) > 0, torch.nan)


def iou(attention: Tensor, human: Tensor, threshold: float = 0.5) -> Tensor:
    """Intersection over union of the patches that reach `threshold` of their map's maximum.

    Returns:
        `[...]` in [0, 1].
    """
    peaks = [value.amax(-1, keepdim=True) for value in (attention, human)]
    ours, theirs = attention >= threshold * peaks[0], human >= threshold * peaks[1]
    found = (ours & theirs).sum(-1) / (ours | theirs).sum(-1)
    return found.where(torch.minimum(*peaks)[..., 0] > 0, torch.nan)


def alignment(
    attention: Tensor,
    human: Tensor,
    fixations: Tensor,
    elsewhere: Tensor,
    box: Tensor | None = None,
    parts: Tensor | None = None,
) -> dict[str, Tensor]:
    """All alignment metrics of maps, by the names that tables use.

    Args:
        attention, human, fixations, elsewhere: `[..., P]`, see the metrics.
        box: share of each patch that the bird's bounding box covers. parts: 1 where a part of the
            bird lies in the patch, else 0.

    Returns:
        `[...]` each: nss, cc, sim, kl, auc, sauc, iou; in_box and point_box with a box, point_part
        with parts.
    """
    found = {
        "nss": nss(attention, fixations),
        "cc": cc(attention, human),
        "sim": sim(attention, human),
        "kl": kl_divergence(attention, human),
        "auc": auc_judd(attention, fixations),
        "sauc": auc_shuffled(attention, fixations, elsewhere),
        "iou": iou(attention, human),
    }
    if box is not None:
        found["in_box"] = energy_inside(attention, box)
        found["point_box"] = pointing_game(attention, box)
    if parts is not None:
        found["point_part"] = pointing_game(attention, parts)
    return found


def class_token_mass(rows: Tensor, num_prefix: int) -> Tensor:
    """Softmax mass on the class token: logits `[B, H, N]` to `[B]`.

    Mean of heads; 0 in a model without a class token (`num_prefix` is 0).
    """
    return torch.softmax(rows.float(), dim=-1)[..., : min(num_prefix, 1)].sum(-1).mean(dim=1)


def patch_attention(rows: Tensor, num_prefix: int) -> Tensor:
    """Softmax attention of the class row on the patches, mean of heads: `[B, H, N]`, `[B, P]`."""
    return torch.softmax(rows.float(), dim=-1)[..., num_prefix:].mean(dim=1)


def top_k(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label is among the k highest scores: `[B, C]`, `[B]` to bool `[B]`."""
    best = scores.topk(min(k, scores.shape[-1]), dim=-1).indices
    return (best == labels[:, None]).any(dim=-1)


def _nan_where_zero(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, torch.nan)


def _std(value: Tensor) -> Tensor:
    """Standard deviation over the patches; NaN where the map is constant up to rounding."""
    std = value.std(dim=-1, correction=0)
    noise = torch.finfo(value.dtype).eps * 8 * value.abs().amax(dim=-1)
    return torch.where(std > noise, std, torch.nan)


def _distribution(value: Tensor) -> Tensor:
    return value / _nan_where_zero(value.sum(-1))[..., None]


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
