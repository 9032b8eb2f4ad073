"""An attention edit and its mathematics: arrays in, tensors inside, no model.

A query row of attention logits `x` (scaled by 1/sqrt(head dim)) is read by a person through a
sigmoid, s = sigmoid(x - c) in (0, 1), edited there, and carried back through the inverse sigmoid,
x' = logit(s') + c; softmax(x') is what the block then uses. The idea of reading and editing the
class row through a sigmoid is that of Matsumoto, Ozawa, Okuno and Miura, PRMU2024-9 (2024);
the constant c (`offset`) and the rule that an unedited cell keeps its own logit are ours.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

# An edit of exactly 0 or 1 has an infinite logit; it is clamped to EPS and 1 - EPS, which is
# -13.8 and +13.8 and representable in float32 on both sides.
EPS = 1e-6

LOW = 0.02  # "do not look here": a fiftieth of the average patch, without the extreme logit of 0

_brief = reprlib.Repr()
_brief.maxstring = 80
brief = _brief.repr  # quotes what somebody gave without repeating megabytes of it

# The same edit, wider rung by rung: where it is made. The one row that decides at first.
LADDER: dict[str, dict[str, str]] = {
    "last block": {"blocks": "last", "queries": "cls"},
    "last two": {"blocks": "last2", "queries": "cls"},
    "all blocks": {"blocks": "all", "queries": "cls"},
    "all blocks, all rows": {"blocks": "all", "queries": "all"},
}


@dataclass(frozen=True)
class Layout:
    """The blocks of a model, the pooling by attention counted, and which have a row to read.

    A row can be read where a class token is, and in the pooling, whose one query is learned.
    """

    heads: tuple[int, ...]  # of every block
    read: tuple[int, ...]  # blocks with such a row; the last is always one
    pooled: bool = False  # the last block is the pooling, which is named "pool" then

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.heads)

    @property
    def names(self) -> tuple[str, ...]:
        """Of every block, for people."""
        count = self.depth - self.pooled
        return (*map(str, range(count)), *["pool"] * self.pooled)

    def resolve(
        self, blocks: str | Sequence[int], queries: Literal["cls", "all"] = "cls"
    ) -> tuple[int, ...]:
        """Block names to indices: those of `resolve_blocks`, and "pool".

        Args:
            queries: with "cls", words mean only blocks with a row to read.

        Raises:
            ValueError: as `resolve_blocks`; "pool" in a model without; with "cls", an index of a
                block that has no such row.
        """
        if blocks == "pool":
            if not self.pooled:
                raise ValueError(
                    'blocks is "pool", but this model does not pool by attention; use "last"'
                )
            return (self.depth - 1,)
        wanted = resolve_blocks(blocks, self.depth)
        if queries == "all" or set(wanted) <= set(self.read):
            return wanted
        if not isinstance(blocks, str):
            block = next(one for one in wanted if one not in self.read)
            raise ValueError(
                f"block {block} is named, but without a class token it has no single row; use "
                f'"pool", the row that decides, or edit all rows of block {block} (queries="all")'
            )
        return tuple(block for block in wanted if block in self.read)

    def read_from(self, start: int) -> list[int]:
        """The blocks from `start` on that have a row to read."""
        return [block for block in self.read if block >= start]

    @property
    def ladder(self) -> dict[str, dict[str, str]]:
        """`LADDER` without rungs that are the same as the one before."""
        rungs, last = {}, None
        for name, rung in LADDER.items():
            blocks = self.resolve(**rung)
            # Of the last block, only the row that is read out leaves.
            where = blocks, rung["queries"] if blocks[0] < self.depth - 1 else "cls"
            if where != last:
                rungs[name], last = rung, where
        return rungs


def row_offset(logits: Tensor, offset: str, num_prefix: int) -> Tensor:
    """The constant c of each row.

    Args:
        logits: `[..., N]`, N = `num_prefix` + patches.
        offset: "none" gives 0, the paper's definition. "centred" gives the log of the mean of
            exp(x) over the patches, so that a patch that gets exactly the mean patch's attention
            reads one half, and s / (1 - s) is its attention as a multiple of that mean.
        num_prefix: class, distillation and register tokens in front of the patches; left out of
            the mean, so that a class token that looks at itself does not darken the whole map.

    Returns:
        c, `[..., 1]`, float32 at least.

    Raises:
        ValueError: for any other `offset`.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if offset == "none":
        return torch.zeros_like(logits[..., :1])
    if offset == "centred":
        patches = logits[..., num_prefix:]
        count = logits.new_full((), float(patches.shape[-1]))
        return torch.logsumexp(patches, dim=-1, keepdim=True) - count.log()
    raise ValueError(f'offset is "{offset}"; use "none" or "centred"')


def sigmoid_attention(logits: Tensor, offset: str, num_prefix: int) -> Tensor:
    """What a person reads and edits: s = sigmoid(x - c) of the patches, `[..., P]` in (0, 1)."""
    centred = logits - row_offset(logits, offset, num_prefix)
    return torch.sigmoid(centred[..., num_prefix:])


def as_odds(weights: np.ndarray, now: float = 1.0) -> np.ndarray:
    """Values that ask for attention in proportion to weights, float32 `[...]`, NaN where those are.

    A map of people is no sigmoid attention: as values, its maximum of 1 would take the whole
    softmax. As odds, its cells share what they have now; with the centred offset that is
    P * h / sum(h) of the P patches. No cell gets less than `LOW` of their average.

    Args:
        weights: from 0, NaN where not known. now: the average odds of the known cells; of a whole
            map with the centred offset 1.

    Raises:
        ValueError: a weight is negative, or all are 0 or unknown.
    """
    known = ~np.isnan(weights)
    if (weights[known] < 0).any() or not weights[known].any():
        raise ValueError("a map of weights needs numbers from 0, and one above 0 at least")
    odds = now * np.maximum(weights / weights[known].mean(dtype=np.float64), LOW)
    return (odds / (1 + odds)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class AttentionEdit:
    """What a person asks of the attention: where, which values, and in which part of the model.

    `mask` and `values` speak of patches, row by row from the top left, and are one of

    - `[P]` or `[gh, gw]`: the same edit for every image of the batch,
    - `[B, P]` or `[B, gh, gw]`: one edit an image,
    - `[B, H, P]`: one edit an image and head, H = all heads of the model.

    Both may be NumPy arrays, and are tensors afterwards: copies on the mask's device. Indices of
    blocks and heads are sorted, so that two edits that ask for the same compare equal.

    Raises:
        TypeError, ValueError: names the field, what it holds, and what it may hold.
    """

    mask: Tensor | np.ndarray  # bool; True where the cell is edited
    # Wanted sigmoid attention in [0, 1], shaped like mask, or one number; kept in float32 (tensors
    # of float64 as they are), 0 where nothing is edited.
    values: Tensor | np.ndarray | float
    # "last", "last2", "all", "pool", or indices (-1: the last); see `Layout`.
    blocks: str | Sequence[int] = "last"
    # "mean": what the heads see together, see lib.model.mean_edit; "all": each of them; or indices
    # (-1: the last).
    heads: str | Sequence[int] = "all"
    queries: Literal["cls", "all"] = "cls"  # rows that are read out, or the rows of all tokens
    offset: Literal["none", "centred"] = "none"  # see `row_offset`
    strength: float = 1.0  # in [0, 1]: share of the shift of the logits that is made

    def __post_init__(self) -> None:
        mask, values = _mask(self.mask), self.values
        if not isinstance(values, Tensor):
            try:
                values = torch.from_numpy(np.array(values, dtype=np.float32))
            except (TypeError, ValueError) as error:
                raise ValueError(f"values is {brief(values)}; give numbers, one a cell") from error
        elif values.dtype != torch.float64:
            values = values.float()
        if values.ndim and values.shape != mask.shape:
            raise ValueError(
                f"values is {list(values.shape)}, but mask is {list(mask.shape)}; "
                "give one value a cell"
            )
        values = torch.where(mask, values.to(mask.device), 0.0)
        low, high = (end.item() for end in values.aminmax())
        if not (low >= 0 and high <= 1):  # NaN is outside too
            worst = values[~((values >= 0) & (values <= 1))][0].item()
            raise ValueError(f"values holds {worst:g} on an edited cell; give 0 to 1")
        for name, words in (("queries", ("cls", "all")), ("offset", ("none", "centred"))):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is {brief(getattr(self, name))}; use {_either(words)}")
        if not is_share(self.strength):
            raise ValueError(f"strength is {brief(self.strength)}; give 0 to 1")
        vars(self).update(  # frozen for everybody else
            mask=mask,
            values=values,
            blocks=_scope("blocks", self.blocks, ("last", "last2", "all", "pool")),
            heads=_scope("heads", self.heads, ("all", "mean")),
            strength=float(self.strength),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttentionEdit):
            return NotImplemented
        return (
            torch.equal(self.mask.cpu(), other.mask.cpu())
            and torch.equal(self.values.cpu().double(), other.values.cpu().double())
            and self.scope == other.scope
        )

    @property
    def scope(self) -> dict[str, object]:
        """What it takes beside cells and values: where it is made, how read, how much of it."""
        names = ("blocks", "heads", "queries", "offset", "strength")
        return {name: getattr(self, name) for name in names}

    @property
    def grid(self) -> tuple[int, int]:
        """(gh, gw) of an edit on `[gh, gw]`: the patches of the model."""
        return tuple(self.mask.shape)

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing: no cell is edited, or none of the shift is made."""
        return not (self.strength and self.mask.any())

    def per_head(self, batch: int, heads: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Mask and values for one forward pass.

        Args:
            batch: number of images B.
            heads: number of heads H of the model.
            grid: rows and columns of patches.

        Returns:
            mask (bool) and values (float), each `[B, H, P]`; heads not named are all False.

        Raises:
            ValueError: when the mask fits neither the grid nor the batch, or a head is not there,
                or each head has cells of its own where their mean is to be edited.
        """
        patches = grid[0] * grid[1]
        shape = tuple(self.mask.shape)
        if shape in ((patches,), grid):
            view = (1, 1, patches)
        elif shape in ((batch, patches), (batch, *grid)):
            view = (batch, 1, patches)
        elif shape == (batch, heads, patches) and self.heads != "mean":
            view = shape
        else:
            raise ValueError(
                f"mask is {list(shape)}; the model has a grid of {grid[0]} x {grid[1]} patches, "
                f"{heads} heads and the batch {batch} images: use [P], [B, P] or [B, H, P]"
            )
        named = resolve_heads(self.heads, heads)
        chosen = torch.zeros(heads, dtype=torch.bool, device=self.mask.device)
        chosen[list(named)] = True
        mask = self.mask.reshape(view) & chosen[None, :, None]
        values = self.values.reshape(view)
        return mask.expand(batch, heads, patches), values.expand(batch, heads, patches)


def _mask(mask: Tensor | np.ndarray) -> Tensor:
    mask = mask.clone() if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
    if mask.dtype != torch.bool or 0 in mask.shape:
        kind, shape = str(mask.dtype).removeprefix("torch."), list(mask.shape)
        said = f"mask is {kind} {shape}; give bool [gh, gw] or [B, gh, gw], True where edited"
        raise ValueError(said) if kind == "bool" else TypeError(said)
    return mask


def _scope(name: str, wanted: object, words: tuple[str, ...]) -> str | tuple[int, ...]:
    """A word as it is, or indices as a sorted tuple of int."""
    if isinstance(wanted, str) and wanted in words:
        return wanted
    if isinstance(wanted, Sequence | np.ndarray) and len(wanted) and all(map(is_index, wanted)):
        indices = tuple(sorted(int(index) for index in wanted))
        if len(set(indices)) == len(indices):
            return indices
    raise ValueError(f"{name} is {brief(wanted)}; use {_either(words)} or different indices")


def is_index(value: object) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_share(value: object) -> bool:
    """Whether a value is a number from 0 to 1; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _either(words: Iterable[str]) -> str:
    return " or ".join(f'"{word}"' for word in words)


def resolve_blocks(blocks: str | tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Block names to indices: "last", "last2", "last4", "all", or indices (negative from the end).

    Raises:
        ValueError: for an unknown word or an index outside the model.
    """
    counts = {"last": 1, "last2": 2, "last4": 4, "all": depth}
    words = {word: tuple(range(max(depth - n, 0), depth)) for word, n in counts.items()}
    return _in_model("block", blocks, words, depth)


def resolve_heads(heads: str | tuple[int, ...], count: int) -> tuple[int, ...]:
    """Head names to indices: "all" or "mean", or indices (negative ones from the end).

    Raises:
        ValueError: for an unknown word or an index outside the model.
    """
    return _in_model("head", heads, dict.fromkeys(("all", "mean"), tuple(range(count))), count)


def _in_model(
    what: str, wanted: str | tuple[int, ...], words: dict[str, tuple[int, ...]], count: int
) -> tuple[int, ...]:
    if isinstance(wanted, str):
        if wanted not in words:
            raise ValueError(f'{what}s is "{wanted}"; use {_either(words)} or indices')
        return words[wanted]
    for index in wanted:
        if not -count <= index < count:
            raise ValueError(f"{what} {index} is named, but the model has {count} {what}s")
    if not wanted:
        raise ValueError(f"no {what} is named; name at least one of {count}")
    return tuple(sorted({index % count for index in wanted}))


def edit_logits(
    logits: Tensor,
    mask: Tensor,
    values: Tensor,
    offset: str,
    num_prefix: int,
    strength: float = 1.0,
) -> Tensor:
    """x' = where(M, logit(clamp(V, EPS, 1 - EPS)) + c, x), computed in float32 or better.

    With `strength` 1; with less, that share of the way from x to x'.

    A cell outside the mask keeps its logit bit for bit, and so does a cell that is asked for the
    value it already has (within EPS): a saturated cell that reads 1.0 and is asked for 1.0 stays.
    Going through sigmoid and logit with every cell would not do: the sigmoid rounds to 1 from
    x = 16.6 in float32, 8.3 in float16 and 6.2 in bfloat16, and the row turns to NaN.

    Args:
        logits: `[B, H, Q, N]`, any floating type.
        mask: `[B, H, P]`, bool. values: `[B, H, P]` in [0, 1].
        offset: "none" or "centred", see `row_offset`.
        num_prefix: N - P.

    Returns:
        `[B, H, Q, N]` in the type of `logits`.
    """
    offsets = row_offset(logits, offset, num_prefix)  # [B, H, Q, 1]
    patches = logits[..., num_prefix:]  # [B, H, Q, P]
    wanted = values[:, :, None, :].to(offsets)  # float32, or float64 where the logits are
    current = torch.sigmoid(patches - offsets)
    asks = mask[:, :, None, :] & ((wanted - current).abs() > EPS)
    edited = torch.logit(wanted.clamp(EPS, 1 - EPS)) + offsets
    if strength < 1:
        edited = torch.lerp(patches.to(edited), edited, strength)
    edited = edited.to(logits.dtype)
    return torch.cat([logits[..., :num_prefix], torch.where(asks, edited, patches)], dim=-1)


def rollout(matrices: Sequence[Tensor]) -> Tensor:
    """Attention rollout of Abnar and Zuidema ("Quantifying Attention Flow", ACL 2020).

    Args:
        matrices: softmax attention of every block in order, each `[B, H, N, N]`; that of a
            pooling by attention, the last, `[B, H, 1, N]`.

    Returns:
        `[B, N, N]`, with a pooling `[B, 1, N]`, rows sum to 1: the product over blocks of (mean
        over heads + identity) / 2, the identity standing for the residual path. A pooling has none.
    """
    rolled = None
    for matrix in matrices:
        mixed = matrix.float().mean(dim=1)
        if mixed.shape[-2] == mixed.shape[-1]:
            mixed = (mixed + torch.eye(mixed.shape[-1], device=mixed.device)) / 2
        rolled = mixed if rolled is None else mixed @ rolled
    return rolled
