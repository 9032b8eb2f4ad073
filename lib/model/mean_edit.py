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

import numpy as np
import torch
from torch import Tensor

from lib.edit import EPS

FLOOR = 0.02  # of the mean patch: what cells that nobody painted keep, however much is asked for
CLOSE = 1e-6  # of the odds, relative: a hundredth of what a reading to 4 decimals shows
NEAR = 0.3  # as CLOSE; from here on Newton's step needs no watching
SAFE_STEPS = 6  # safe steps in a row
STEPS = 60  # at most; most edits take 4 to 8
CAREFUL = 3.0  # logits, the longest of Newton's steps
FAR = 600.0  # logits, the largest shift: e to its power is a number
AT_ONCE = 2**23  # numbers of one array; the search keeps ten such, of all rows gigabytes
TINY = 1e-290  # share of a head, below which nothing is told apart


def read_mean(logits: Tensor, offset: str, num_prefix: int) -> Tensor:
    """What the heads see together: `[..., H, Q, N]` to `[..., Q, P]` in (0, 1), float32 or better.

    offset "centred": odds s / (1 - s) are multiples of the mean patch's attention, and one half is
    as much as it; "none": the mean of the sigmoids.
    """
    x, dtype = logits.double(), torch.promote_types(logits.dtype, torch.float32)
    patches = x[..., num_prefix:]
    if offset == "none":
        return torch.sigmoid(patches).mean(dim=-3).to(dtype)
    seen = torch.softmax(x, dim=-1)[..., num_prefix:].mean(dim=-3)
    odds = seen / seen.mean(dim=-1, keepdim=True)
    return (odds / (1 + odds)).to(dtype)


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
        mask: `[B, P]`, bool. values: `[B, P]` in [0, 1]; where mask is False, anything.
        offset: "none" or "centred", see `read_mean`. num_prefix: N - P.
        strength: share of the shift that is made, in [0, 1].

    Returns:
        `[B, H, Q, N]` in the type of `logits`.
    """
    rows = max(1, AT_ONCE // (logits[:, :, 0].numel() or 1))
    if logits.shape[2] > rows:  # each row is searched for by itself
        parts = logits.split(rows, dim=2)
        more = mask, values, offset, num_prefix, strength
        return torch.cat([edit_mean(part, *more) for part in parts], dim=2)
    # The search is done by NumPy: on so few numbers it is five times faster than PyTorch, and a GPU
    # is waited for once. No gradient is asked for.
    x = logits.detach().double().cpu().numpy()
    mask, values = (one[:, None].cpu().numpy() for one in (mask, values))  # [B, 1, P]
    wanted = np.where(mask, values, 0.5).astype(np.float64).clip(EPS, 1 - EPS)
    patches = x[..., num_prefix:]
    if offset == "none":
        asks = mask & (np.abs(wanted - _sigmoid_of(patches).mean(axis=1)) > EPS)
        if not asks.any():
            return logits
        shift = _each_alone(patches, wanted)[:, None]
        moved = np.where(asks[:, None], patches + strength * shift, patches)
    else:
        p, part = _parts(x, num_prefix)
        odds = (p * part).sum(axis=1) * p.shape[-1]
        asks = mask & (np.abs(wanted - odds / (1 + odds)) > EPS)  # [B, Q, P]
        if not asks.any():
            return logits
        shift = strength * _shifts_together(p, part, mask, wanted / (1 - wanted))[:, None]
        kept = np.log((p * np.exp(shift)).sum(axis=-1, keepdims=True))
        moved = np.where(asks.any(axis=-1)[:, None, :, None], patches + shift - kept, patches)
    moved = torch.from_numpy(moved).to(logits)
    return torch.cat([logits[..., :num_prefix], moved], dim=-1)


def _sigmoid_of(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(logits, -FAR, FAR)))


def _parts(x: np.ndarray, num_prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """Each head among the patches, `[B, H, Q, P]`, and its part in the mean, `[B, H, Q, 1]`."""
    row = np.exp(x - x.max(axis=-1, keepdims=True))
    patches = x[..., num_prefix:]
    p = np.exp(patches - patches.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    mass = row[..., num_prefix:].sum(axis=-1, keepdims=True) / row.sum(axis=-1, keepdims=True)
    mass = mass.clip(TINY)
    return p, mass / mass.sum(axis=1, keepdims=True)


def _each_alone(patches: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Shifts `[B, Q, P]` with which the mean of the sigmoids is `wanted`, by bisection."""
    middle = np.log(wanted / (1 - wanted))
    low, high = middle - patches.max(axis=1), middle - patches.min(axis=1)
    for _ in range(50):  # halvings: a range of 100 to 1e-13
        shift = (low + high) / 2
        above = _sigmoid_of(patches + shift[:, None]).mean(axis=1) > wanted
        low, high = np.where(above, low, shift), np.where(above, shift, high)
    return (low + high) / 2


def _shifts_together(
    p: np.ndarray, part: np.ndarray, mask: np.ndarray, odds: np.ndarray
) -> np.ndarray:
    """Shifts d `[B, Q, P]` with which the heads' mean of p * exp(d), made to sum to 1, is as asked.

    They maximise sum(target * d) - sum_h part_h log(sum(p_h * exp(d))), which is concave, and whose
    gradient is target minus mean. Cells that nobody painted move together, as one. The step of
    iterative proportional fitting, d + log(target / mean), is safe and cheap; near the end Newton's
    takes over, which is cheap too, as the Hessian is a diagonal and one product of H columns.
    """
    count, free = p.shape[-1], ~mask
    is_any_free = free.any(axis=-1, keepdims=True)
    is_there = np.concatenate([mask, is_any_free], axis=-1)  # [B, 1, P + 1]
    rest = (p * free[:, None]).sum(axis=-1, keepdims=True)
    cells = np.concatenate([p * mask[:, None], rest], axis=-1).clip(TINY) * is_there[:, None]

    asked = odds * mask / count
    total = asked.sum(axis=-1, keepdims=True)
    least = FLOOR / count * free.sum(axis=-1, keepdims=True)
    least = np.minimum((rest * part).sum(axis=1), least)
    left = np.maximum(1 - total, least) * is_any_free
    is_too_much = (1 - total < least) | ~is_any_free
    scale = np.where(is_too_much, (1 - left) / total.clip(TINY), 1)
    target = np.concatenate([asked * scale, left], axis=-1).clip(TINY)  # [B, Q, P + 1]

    shift = np.zeros_like(target)
    for step in range(STEPS):
        q = _heads(cells, shift)
        mean = (q * part).sum(axis=1)
        mean += ~is_there  # log 1: nothing is missing there
        miss = np.log(target / mean) * is_there
        worst = np.abs(miss).max()
        if worst < CLOSE:
            break
        if worst < NEAR:
            shift = shift + _newton(q, mean, miss, part)
        elif step < SAFE_STEPS:
            shift = shift + miss
        else:  # heads that hardly overlap: far away, Newton's step is taken where it leads up
            bold, safe = shift + _newton(q, mean, miss, part), shift + miss
            rises = _height(cells, part, bold, target) >= _height(cells, part, safe, target)
            shift = np.where(rises, bold, safe)
        shift = shift.clip(-FAR, FAR)
    return np.where(mask, shift[..., :-1], shift[..., -1:])


def _heads(cells: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Each head over the cells after the shift, `[B, H, Q, G]`, sums 1."""
    moved = cells * np.exp(shift)[:, None]
    return moved / moved.sum(axis=-1, keepdims=True)


def _height(
    cells: np.ndarray, part: np.ndarray, shift: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """What the shifts maximise, `[B, Q, 1]`."""
    norms = np.log((cells * np.exp(shift)[:, None]).sum(axis=-1, keepdims=True))
    return (target * shift).sum(axis=-1, keepdims=True) - (part * norms).sum(axis=1)


def _newton(q: np.ndarray, mean: np.ndarray, miss: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Newton's step `[B, Q, G]`: (diag(mean) - U U^T) step = target - mean, U = sqrt(part) * q.

    By the identity of Woodbury: one system of H x H. It is singular along the shift of all cells,
    which changes nothing; the last product lets the step be 0 along it.
    """
    root = np.sqrt(part)
    u = (root * q).swapaxes(1, 2)  # [B, Q, H, G]
    over, root = u / mean[:, :, None], root.swapaxes(1, 2)
    lack = np.expm1(miss.clip(max=CAREFUL))  # target / mean - 1
    inner = (1 + 1e-12) * np.eye(u.shape[2]) - over @ u.swapaxes(2, 3) + root @ root.swapaxes(2, 3)
    step = lack + (over.swapaxes(2, 3) @ np.linalg.solve(inner, u @ lack[..., None]))[..., 0]
    return step * (CAREFUL / np.abs(step).max(axis=-1, keepdims=True).clip(CAREFUL))
