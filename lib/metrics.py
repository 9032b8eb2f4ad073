"""Metrics: of the classification, and of how well attention agrees with people.

Alignment metrics are batched over images and compare a non-negative attention map with human gaze
on the same patch grid. An image for which a metric is undefined (no gaze, a constant map) gets
NaN; means are taken with `nanmean`. Definitions follow Bylinskii et al., "What do different
evaluation metrics tell us about saliency models?" (TPAMI 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Similarity: the shared mass of two maps `[..., P]` that sum to 1, `[...]` in [0, 1]."""
    return torch.minimum(_distribution(attention), _distribution(human)).sum(-1)


def kl(attention: Tensor, human: Tensor) -> Tensor:
    """KL(human || attention) in nats, both made to sum to 1: `[...]`, 0 is best."""
    p, q = _distribution(human), _distribution(attention)
    tiny = torch.finfo(q.dtype).eps  # the usual regularisation, MIT saliency benchmark
    return (p * torch.log(p / (q + tiny) + tiny)).sum(-1)


def energy_inside(attention: Tensor, region: Tensor) -> Tensor:
    """Share of the map's mass inside a region: both `[..., P]`, region in [0, 1]; `[...]`."""
    return (_distribution(attention) * region).sum(-1)


def class_token_mass(rows: Tensor) -> Tensor:
    """Softmax mass that the class token keeps for itself: logits `[B, H, N]` to `[B]`."""
    return torch.softmax(rows.float(), dim=-1)[..., 0].mean(dim=1)


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
