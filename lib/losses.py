"""Human attention losses: how far a class row is from where people look, or ask it to look.

Every loss takes the class row's logits of all heads and the human map on the patch grid, counts
valid cells only, and returns one number per image and head. `attention_loss` averages them over
heads, and over the whole batch with images without a map counted as 0: such an image contributes
nothing, and the value of a batch does not depend on how its images are spread over processes.

`mse` is the loss of Matsumoto et al. (PRMU2024-9, 2024), `mse_zero` their "denoise" variant.
Beware of `mse` with offset "none": on sparse maps it is won mostly by pushing every sigmoid to 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.edit import resolve_heads, row_offset

# A cell belongs to the human region when its map reaches this share of the map's maximum.
REGION = 0.1
HALF = 0.5  # cells painted below it ask for less attention, the others for more


def attention_loss(
    name: str,
    rows: dict[int, Tensor],
    human: Tensor,
    valid: Tensor,
    offset: str = "none",
    heads: str | tuple[int, ...] = "all",
) -> Tensor:
    """The human attention loss of a batch, averaged over supervised blocks, heads and images.

    Args:
        name: one of `LOSSES`.
        rows: `{block: [B, H, N]}`, class-row logits as `SigmoidViT` returns them.
        human: `[B, P]` in [0, 1], the human map on the patch grid.
        valid: `[B, P]`, bool; False where undecided. An image with no valid cell, or whose valid
            map is 0 everywhere, has no map and contributes 0.
        offset: constant of the sigmoid, see `lib.edit.row_offset`.
        heads: supervised heads, each on its own; the others are left free. "mean" supervises what
            the heads look at together, the mean of their attention, and leaves to each its part.

    Returns:
        A scalar in float32, differentiable with respect to the rows.

    Raises:
        ValueError: for an unknown loss, offset or head, or when no block is supervised.
    """
    if name not in LOSSES:
        raise ValueError(f'loss is "{name}"; use one of {", ".join(LOSSES)}')
    if not rows:
        raise ValueError("no block is supervised; name at least one in rows")
    human, seen = human.float(), valid & (human > 0)
    has_map = seen.any(dim=-1).float()  # [B]
    per_block = []
    for logits in rows.values():
        logits, constant = logits.float(), offset
        if heads == "mean":
            logits, constant = _together(name, logits, offset, logits.shape[-1] - human.shape[-1])
        else:
            logits = logits[:, list(resolve_heads(heads, logits.shape[1]))]
        losses = LOSSES[name](logits, human[:, None], valid[:, None], constant)  # [B, H]
        per_block.append((losses.mean(dim=1) * has_map).mean())
    return torch.stack(per_block).mean()


def _together(name: str, logits: Tensor, offset: str, num_prefix: int) -> tuple[Tensor, str]:
    """Logits `[B, 1, N]` of the heads' mean attention, sigmoid or softmax as the loss sees it.

    Losses take logits. log p is a logit row whose softmax is p; logit(s) one whose sigmoid is s,
    and then there is no constant left to take off: the offset is "none".
    """
    if name in SEES_OFFSET:
        x = logits - row_offset(logits, offset, num_prefix)
        # log s - log(1 - s) of the mean s: not through s itself, which rounds to 1.
        inside, outside = (torch.logsumexp(F.logsigmoid(y), 1, keepdim=True) for y in (x, -x))
        return inside - outside, "none"
    return _mean_attention(logits), offset


def _mean_attention(logits: Tensor) -> Tensor:
    """Log of the heads' mean softmax attention, `[B, H, N]` to `[B, 1, N]`."""
    log_attention = torch.log_softmax(logits, dim=-1)
    return torch.logsumexp(log_attention, dim=1, keepdim=True) - math.log(logits.shape[1])


def _patch_logits(logits: Tensor, human: Tensor, offset: str) -> Tensor:
    """x - c of the patches, `[B, H, P]`."""
    num_prefix = logits.shape[-1] - human.shape[-1]
    return (logits - row_offset(logits, offset, num_prefix))[..., num_prefix:]


def _mean(cells: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the chosen cells, `[B, H, P]` to `[B, H]`; 0 where none is chosen."""
    return (cells * chosen).sum(-1) / chosen.sum(-1).clamp(min=1)


def mse(logits: Tensor, human: Tensor, valid: Tensor, offset: str) -> Tensor:
    """Mean squared difference between sigmoid attention and the human map."""
    return _mean((torch.sigmoid(_patch_logits(logits, human, offset)) - human) ** 2, valid)


def mse_zero(logits: Tensor, human: Tensor, valid: Tensor, offset: str) -> Tensor:
    """Mean squared sigmoid attention where the human map is 0; elsewhere the row is free."""
    attention = torch.sigmoid(_patch_logits(logits, human, offset))
    return _mean(attention**2, valid & (human == 0))


def bce(logits: Tensor, human: Tensor, valid: Tensor, offset: str) -> Tensor:
    """Binary cross entropy of every cell, the human map as its target probability."""
    x = _patch_logits(logits, human, offset)
    return _mean(F.binary_cross_entropy_with_logits(x, human.expand_as(x), reduction="none"), valid)


def kl(logits: Tensor, human: Tensor, valid: Tensor, offset: str) -> Tensor:
    """KL(human || softmax) over the valid patches, both made to sum to 1 there.

    The shape of the attention among the patches alone: blind to what the class token keeps for
    itself and to `offset`.
    """
    log_attention = torch.log_softmax(_hide(_patch_logits(logits, human, "none"), ~valid), dim=-1)
    target = human * valid
    target = (target / target.sum(-1, keepdim=True).clamp(min=1e-8)).expand_as(log_attention)
    return F.kl_div(log_attention, target, reduction="none").sum(-1)


def cosine(logits: Tensor, human: Tensor, valid: Tensor, offset: str) -> Tensor:
    """1 - cosine similarity of the sigmoid attention and the human map over valid cells."""
    attention = torch.sigmoid(_patch_logits(logits, human, offset)) * valid
    return 1 - F.cosine_similarity(attention, (human * valid).expand_as(attention), dim=-1)


def energy(logits: Tensor, human: Tensor, valid: Tensor, offset: str) -> Tensor:
    """-log of the softmax mass inside the human region (cells of at least REGION of the maximum).

    The whole row counts as outside but for undecided cells, class token included: mass that the
    class token keeps for itself is not on the region either. Independent of `offset`.
    """
    num_prefix = logits.shape[-1] - human.shape[-1]
    peak = (human * valid).amax(-1, keepdim=True)
    region = valid & (human >= REGION * peak) & (human > 0)
    row = torch.cat([logits[..., :num_prefix], _hide(logits[..., num_prefix:], ~valid)], dim=-1)
    inside = torch.logsumexp(_hide(logits[..., num_prefix:], ~region), dim=-1)
    return torch.logsumexp(row, dim=-1) - inside


def mass(logits: Tensor, wanted: Tensor, painted: Tensor, offset: str) -> Tensor:
    """-log of the softmax mass off the cells painted low, plus -log of that on those painted high.

    Shares of the whole row, class token included. Unlike `energy` it makes sense when a person
    painted only where not to look, or only where to look. How far below or above `HALF` a cell is
    painted does not matter, and `offset` neither.

    Args:
        logits: `[B, H, N]`. wanted, painted: `[B, 1, P]`, values in [0, 1] and bool.

    Returns:
        `[B, H]`; 0 is best.
    """
    patches = wanted.shape[-1]
    prefix, cells = logits.split([logits.shape[-1] - patches, patches], dim=-1)
    low, high = painted & (wanted < HALF), painted & (wanted >= HALF)
    whole = torch.logsumexp(logits, dim=-1)
    off_low = torch.logsumexp(torch.cat([prefix, _hide(cells, low)], -1), dim=-1)
    on_high = torch.logsumexp(_hide(cells, ~high), dim=-1)
    return whole - off_low + torch.where(high.any(-1), whole - on_high, 0.0)


def _hide(logits: Tensor, hidden: Tensor) -> Tensor:
    # Finite, so that an image or row without any cell left has a gradient of 0 and not NaN.
    return logits.masked_fill(hidden, -1e4)


# The losses of a whole map, by name.
LOSSES = {loss.__name__: loss for loss in (mse, mse_zero, bce, kl, cosine, energy)}

# The losses that make sense for a map of which only some cells are known, high or low ones alone.
CORRECTION_LOSSES = {"mass": mass, "mse": mse, "bce": bce}

# Losses of the sigmoid attention; the others are of the softmax, which `offset` does not change.
SEES_OFFSET = ("mse", "mse_zero", "bce", "cosine")


def correction_loss(name: str, rows: dict[int, Tensor], asked: dict[str, Tensor]) -> Tensor:
    """The attention loss of corrected pictures: painted cells only, a mean over the pictures.

    Args:
        name: one of CORRECTION_LOSSES.
        rows: `{block: [C, heads of the block, N]}`, class-row logits of all learning blocks.
        asked: what `lib.training.teach.targets` gives.
    """
    per_block = []
    for logits, share in zip(rows.values(), asked["share"].unbind(1), strict=True):
        parts = (logits.float(), asked)
        plain, centred = (_asked_of(name, *parts, offset) for offset in ("none", "centred"))
        losses = torch.where(asked["centred"][:, None], centred, plain)  # [C, H]
        per_block.append((losses * share[:, : losses.shape[1]]).sum(dim=1).mean())
    return sum(per_block)


def _asked_of(name: str, logits: Tensor, asked: dict[str, Tensor], offset: str) -> Tensor:
    """The loss by head `[C, H]`; where the edit is of the heads' mean, that of the mean instead.

    Centred, the mean reads as the editor reads it: odds of the mean softmax, see
    `lib.model.mean_edit`.
    """
    cells = asked["wanted"][:, None], asked["painted"][:, None]
    if offset == "centred":
        mean = _mean_attention(logits)
    else:
        mean, _ = _together(name, logits, offset, logits.shape[-1] - cells[0].shape[-1])
    apart, joint = (CORRECTION_LOSSES[name](each, *cells, offset) for each in (logits, mean))
    return torch.where(asked["mean"][:, None], joint, apart)
