"""The edit of what the heads see together: one shift of the logits a patch, the same in all heads.

Heads have parts: to set each of them to one map takes these away, and most right predictions with
them. Here the *mean* of the heads' attention is read and edited, and every head keeps its part. It
is the twin of supervising the mean of the heads (`lib.losses.attention_loss`, heads="mean").

Read (offset "centred"): the mean over heads of the softmax, as odds, multiples of the mean patch,
o = P * a / sum(a) over the P patches; s = o / (1 + o). Edited: the shifts d_p, one a patch, for
which the mean reads what was painted, while in every head

- the patches together keep their mass, and so the class token its share, and its logit bit for bit;
- the cells that nobody painted keep their proportions to one another.

With offset "none" the reading is the mean of the sigmoids, each painted cell has a shift of its
own, and all other logits stay bit for bit, as in `lib.edit.edit_logits`.

The edit and its mathematics are ours; people's map as such an edit: docs/evidence.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lib.edit import EPS

FLOOR = 0.02  # of the mean patch: what cells that nobody painted keep, however much is asked for
CLOSE = 1e-6  # of the odds, relative: a hundredth of what a reading to 4 decimals shows
NEAR = 0.1  # as CLOSE; from here on Newton's step needs no watching
STEPS = 40  # at most; most edits take 3 to 6
CAREFUL = 3.0  # logits, the longest of Newton's steps


def read_mean(logits: Tensor, offset: str, num_prefix: int) -> Tensor:
    """What the heads see together: `[..., H, Q, N]` to `[..., Q, P]` in (0, 1), float32 or better.

    offset "centred": odds s / (1 - s) are multiples of the mean patch's attention, and one half is
    as much as it; "none": the mean of the sigmoids.
    """
    read = _read(logits.double(), offset, num_prefix)
    return read.to(torch.promote_types(logits.dtype, torch.float32))


def _read(logits: Tensor, offset: str, num_prefix: int) -> Tensor:
    if offset == "none":
        return torch.sigmoid(logits[..., num_prefix:]).mean(dim=-3)
    log_p, log_part = _parts(logits, num_prefix)
    return torch.sigmoid(torch.logsumexp(log_p + log_part, dim=-3) + math.log(log_p.shape[-1]))


def _parts(logits: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Logs of each head among the patches, `[..., H, Q, P]`, and of its part in the mean."""
    patches = logits[..., num_prefix:]
    whole = torch.logsumexp(patches, dim=-1, keepdim=True)
    mass = whole - torch.logsumexp(logits, dim=-1, keepdim=True)  # of the row that is on patches
    return patches - whole, torch.log_softmax(mass, dim=-3)


def edit_mean(
    logits: Tensor,
    mask: Tensor,
    values: Tensor,
    offset: str,
    num_prefix: int,
    strength: float = 1.0,
) -> Tensor:
    """Logits whose mean over the heads reads what was painted.

    More can be asked for than there is: where the painted cells would take more than all, they
    share, in the proportions that were painted, all but `FLOOR` of the mean patch for each other
    cell. A row in which all painted cells already read what is asked for (within EPS) stays bit for
    bit.

    Args:
        logits: `[B, H, Q, N]`, any floating type.
        mask: `[B, P]`, bool. values: `[B, P]` in [0, 1].
        offset: "none" or "centred", see `read_mean`. num_prefix: N - P.
        strength: share of the shift that is made, in [0, 1].

    Returns:
        `[B, H, Q, N]` in the type of `logits`.
    """
    x = logits.double()
    mask, wanted = mask[:, None], values[:, None].double().clamp(EPS, 1 - EPS)  # [B, 1, P]
    asks = mask & ((wanted - _read(x, offset, num_prefix)).abs() > EPS)  # [B, Q, P]
    prefix, patches = x[..., :num_prefix], x[..., num_prefix:]
    if offset == "none":
        shift = _each_alone(patches, wanted)
        moved = torch.where(asks[:, None], patches + strength * shift[:, None], patches)
    else:
        log_p, log_part = _parts(x, num_prefix)
        shift = strength * _shifts_together(log_p, log_part, mask, torch.logit(wanted))[:, None]
        moved = patches + shift - torch.logsumexp(log_p + shift, dim=-1, keepdim=True)
        moved = torch.where(asks.any(dim=-1)[:, None, :, None], moved, patches)
    return torch.cat([prefix, moved], dim=-1).to(logits.dtype)


def _each_alone(patches: Tensor, wanted: Tensor) -> Tensor:
    """Shifts `[B, Q, P]` with which the mean of the sigmoids is `wanted`, by bisection."""
    middle = torch.logit(wanted)
    low, high = middle - patches.amax(dim=1), middle - patches.amin(dim=1)
    for _ in range(50):  # halvings: a range of 100 to 1e-13
        shift = (low + high) / 2
        above = torch.sigmoid(patches + shift[:, None]).mean(dim=1) > wanted
        low, high = torch.where(above, low, shift), torch.where(above, shift, high)
    return (low + high) / 2


def _shifts_together(log_p: Tensor, log_part: Tensor, mask: Tensor, log_odds: Tensor) -> Tensor:
    """Shifts `[B, Q, P]` with which the mean over heads of softmax(log_p + shift) is the target.

    They maximise sum(target * shift) - sum_h part_h logsumexp(log_p_h + shift), which is concave,
    and whose gradient is target minus mean. Cells that nobody painted move together, as one.
    Newton's step is cheap, as the Hessian is a diagonal and one product of H columns; where it is
    too bold, the step of iterative proportional fitting, shift + log(target / mean), never is.
    """
    free, count = ~mask, log_p.shape[-1]
    is_any_free = free.any(dim=-1, keepdim=True)
    rest = torch.logsumexp(log_p.masked_fill(mask[:, None], -torch.inf), dim=-1, keepdim=True)
    cells = torch.cat([log_p.masked_fill(free[:, None], -torch.inf), rest], dim=-1)
    is_there = torch.cat([mask, is_any_free], dim=-1).expand_as(cells[:, 0])  # [B, Q, P + 1]

    asked = log_odds.masked_fill(free, -torch.inf) - math.log(count)
    total = torch.logsumexp(asked, dim=-1, keepdim=True)
    left = torch.log1p(-total.exp().clamp(max=1))
    now = torch.logsumexp(rest + log_part, dim=1)
    least = torch.minimum(now, (FLOOR / count * free.sum(dim=-1, keepdim=True)).log())
    left, is_too_much = torch.maximum(left, least), (left < least) | ~is_any_free
    left = left.masked_fill(~is_any_free, -torch.inf)
    asked = asked + torch.where(is_too_much, torch.log1p(-left.exp()) - total, 0.0)
    target = torch.cat([asked.expand_as(log_p[:, 0]), left], dim=-1)

    mean = _mean_of(cells, log_part)[1]
    shift = torch.where(is_there, target - mean, 0.0)  # the answer, if there were one head
    for _ in range(STEPS):
        log_q, mean = _mean_of(cells + shift[:, None], log_part)
        miss = torch.where(is_there, target - mean, 0.0)
        worst = float(miss.abs().max())
        if worst < CLOSE:
            break
        bold, safe = shift + _newton(log_q, mean, miss, log_part), shift + miss
        if worst > NEAR:
            gained = _height(cells, log_part, bold, target) >= _height(
                cells, log_part, safe, target
            )
            bold = torch.where(gained, bold, safe)
        shift = bold
    return torch.where(mask, shift[..., :-1], shift[..., -1:])


def _mean_of(cells: Tensor, log_part: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of each head over the cells, `[B, H, Q, G]`, and of their mean, both as logs."""
    log_q = torch.log_softmax(cells, dim=-1)
    return log_q, torch.logsumexp(log_q + log_part, dim=1)


def _height(cells: Tensor, log_part: Tensor, shift: Tensor, target: Tensor) -> Tensor:
    """What the shifts maximise, `[B, Q, 1]`."""
    norms = torch.logsumexp(cells + shift[:, None], dim=-1, keepdim=True)
    return (target.exp() * shift).sum(dim=-1, keepdim=True) - (log_part.exp() * norms).sum(dim=1)


def _newton(log_q: Tensor, mean: Tensor, miss: Tensor, log_part: Tensor) -> Tensor:
    """Newton's step `[B, Q, G]`: (diag(mean) - U U^T) step = target - mean, U = sqrt(part) * q.

    By the identity of Woodbury: one system of H x H. It is singular along the shift of all cells,
    which changes nothing; the last product lets the step be 0 along it.
    """
    root = (log_part / 2).exp()  # [B, H, Q, 1]
    share = torch.nan_to_num((log_q - mean[:, None]).exp())  # NaN where no cell is
    u, over = ((root * one).transpose(1, 2) for one in (log_q.exp(), share))  # [B, Q, H, G]
    root, lack = root.transpose(1, 2), torch.expm1(miss.clamp(max=CAREFUL))  # target / mean - 1
    inner = (1 + EPS**2) * torch.eye(u.shape[2]).to(u) - over @ u.mT + root @ root.mT
    solved = torch.linalg.solve_ex(inner, u @ lack[..., None])[0]
    step = lack + (over.mT @ solved)[..., 0]
    return step * (CAREFUL / step.abs().amax(dim=-1, keepdim=True).clamp(min=CAREFUL))
