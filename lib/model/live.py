"""Edits answered in milliseconds: the model is run once a picture, then only what an edit changes.

A person paints on one picture and wants the class scores to follow. `LiveImage` keeps what the
unedited model computed in every block. An edit whose first named block is b then costs:

- blocks before b: nothing, they are never run again;
- block b: softmax, projection and MLP of the rows that the classifier reads (with queries="all" of
  all rows), from the logits and values that were kept;
- block b + 1: keys and values of the changed tokens only, attention and MLP of all tokens;
- later blocks: everything, and of the last one only the rows that the classifier reads.

So an edit of the last block, the common one, is one or two tokens' worth of one block. On a GPU
an edit is one tensor up and one back: what it asks for, and what it leads to. (That of the mean of
the heads waits for the device once more in each edited block: the search is done on the CPU.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.edit import EPS, AttentionEdit, edit_logits, row_offset
from lib.model.adapter import bound_classify, embed, take_apart
from lib.model.mean_edit import edit_mean
from lib.model.predict import tf32_products
from lib.model.vit import SigmoidViT


@dataclass(frozen=True)
class _Found:
    """What one block computed up to its attention, for one picture; R rows that are read out."""

    tokens: Tensor  # [1, Q, dim], entering the block; Q = N, in the last block R
    q: Tensor  # [1, heads, Q, d]
    k: Tensor  # [1, heads, N, d]
    v: Tensor  # [1, heads, N, d]
    logits: Tensor  # [1, heads, R, N]; R = 0 where there is no class token


class LiveImage:
    """One picture whose edits are answered from what the unedited model computed.

    Args:
        model: in eval mode, on any device. Its weights must not change while the LiveImage lives.
        image: `[3, H, W]`, normalised; brought to the model's device and dtype.

    Attributes:
        scores: `[classes]`, logits of the unedited model. rows: of every block `[heads, N]`, the
            attention logits of the class token, or of the pooling, before any edit; `[0, N]` of a
            block that has no such row. Both on the CPU.
    """

    @torch.inference_mode()
    @tf32_products(False)
    def __init__(self, model: SigmoidViT, image: Tensor) -> None:
        self._model = model
        self._grid = model.grid_of(image)
        self._classify = bound_classify(model.vit)
        parameter = next(model.parameters())
        tokens, ropes = embed(model.vit, image[None].to(parameter))
        self._blocks = [
            take_apart(model.vit, index, ropes[index], bound=True) for index in range(model.depth)
        ]
        self._count = tokens.shape[1]  # N
        self._kept: list[_Found] = []
        self._editable: dict[tuple[int, str], _KeptRows] = {}  # by block and offset, on demand
        for index in range(model.depth):
            found = self._enter(index, tokens)
            self._kept.append(found)
            tokens = self._leave(index, found, self._attend(index, found))
        rows = [self._row(index, found.logits) for index, found in enumerate(self._kept)]
        self.scores, self.rows = self._read_back(tokens, rows)

    @torch.inference_mode()
    def run(self, edit: AttentionEdit | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Class scores and class rows of the edited model.

        Args:
            edit: for one picture; None or an all-False mask gives `scores` and `rows` themselves.

        Returns:
            scores `[classes]`; rows as in `rows`, after the edit: edited cells hold the logit that
            was asked for, blocks behind an edited one what they make of it, and blocks before it
            have the very tensors of `rows`. (The rows of SigmoidViT are those before a block's own
            edit.) On the CPU, in the model's dtype.

        Raises:
            ValueError: the edit names a block or head that is not there, or another grid.
        """
        if edit is None or edit.is_empty:
            return self.scores, self.rows
        model = self._model
        edited = model.layout.resolve(edit.blocks, edit.queries)
        wanted = {heads: self._wanted(edit, heads) for heads in set(self._heads(edited))}
        first = edited[0]
        found = self._kept[first]
        if edit.heads != "mean" and (edit.queries == "cls" or first == model.depth - 1):
            asked = wanted[model.layout.heads[first]]
            logits = self._kept_rows(first, edit.offset).edited(asked, edit.strength)
            heads = self._blocks[first].weigh(logits, found.v)
        else:
            logits, heads = self._edit(first, found, edit, wanted)
        rows = [self._row(first, logits)]
        tokens = self._leave(first, found, heads)
        for index in range(first + 1, model.depth):
            found = self._enter(index, tokens)
            if index in edited:
                logits, heads = self._edit(index, found, edit, wanted)
            else:
                logits, heads = found.logits, self._attend(index, found)
            if heads.shape[2] < self._queries(index):  # the other rows have changed keys to read
                others = self._attend(index, found)[:, :, heads.shape[2] :]
                heads = torch.cat([heads, others], dim=2)
            rows.append(self._row(index, logits))
            tokens = self._leave(index, found, heads)
        scores, changed = self._read_back(tokens, rows)
        return scores, self.rows[:first] + changed

    def _heads(self, blocks: Sequence[int]) -> list[int]:
        return [self._model.layout.heads[index] for index in blocks]

    def _row(self, index: int, logits: Tensor) -> Tensor:
        """The first row, `[heads, N]`; of a block without one `[0, N]`."""
        if index in self._model.layout.read:
            return logits[0, :, 0]
        return logits.new_empty(0, self._count)

    def _wanted(self, edit: AttentionEdit, heads: int) -> Tensor:
        """Values `[1, H, P]`, NaN where nothing is edited, on the model's device.

        H = 1 for the same edit of all heads, which saves a tenth of `run`.
        """
        patches = self._grid[0] * self._grid[1]
        if edit.heads in ("all", "mean") and edit.mask.shape in (self._grid, (patches,)):
            mask, values = edit.mask.reshape(1, 1, patches), edit.values.reshape(1, 1, patches)
        else:
            mask, values = edit.per_head(1, heads, self._grid)
        return torch.where(mask, values, torch.nan).to(self._model.device)

    def _kept_rows(self, index: int, offset: str) -> _KeptRows:
        if (index, offset) not in self._editable:
            logits, prefix = self._kept[index].logits, self._model.num_prefix
            self._editable[index, offset] = _KeptRows(logits, offset, prefix)
        return self._editable[index, offset]

    def _enter(self, index: int, tokens: Tensor) -> _Found:
        """A block up to its attention.

        `tokens` [1, C, dim] are the first C that enter it; the others are the unedited model's.
        """
        block, queries, changed = self._blocks[index], self._queries(index), tokens.shape[1]
        q, k, v = block.queries_keys_values(block.norm(tokens), queries)
        tokens = tokens[:, :queries]
        if changed < self._count:
            kept = self._kept[index]
            tokens = torch.cat([tokens, kept.tokens[:, changed:]], dim=1)
            pairs = ((q, kept.q), (k, kept.k), (v, kept.v))
            q, k, v = (torch.cat([new, old[:, :, changed:]], dim=2) for new, old in pairs)
        is_last = index == self._model.depth - 1
        read = self._model.num_read if is_last else self._model.num_class_rows
        return _Found(tokens, q, k, v, block.logits(q[:, :, :read], k))

    def _queries(self, index: int) -> int:
        """How many rows leave a block: of the last one, only those that the classifier reads."""
        return self._model.num_read if index == self._model.depth - 1 else self._count

    def _attend(self, index: int, found: _Found) -> Tensor:
        """Attention without an edit, `[1, heads, Q, d]` of the rows that leave the block."""
        if index == self._model.depth - 1:
            return self._blocks[index].weigh(found.logits, found.v)
        return self._blocks[index].fused(found.q, found.k, found.v)

    def _edit(
        self, index: int, found: _Found, edit: AttentionEdit, wanted: dict[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits `[1, heads, E, N]` and attention `[1, heads, E, d]` of the E edited rows."""
        logits = found.logits
        if edit.queries == "all" and index < self._model.depth - 1:
            logits = self._blocks[index].logits(found.q, found.k)
        asked = wanted[self._model.layout.heads[index]]
        mask, more = ~asked.isnan(), (edit.offset, self._model.num_prefix, edit.strength)
        if edit.heads == "mean":
            logits = edit_mean(logits, mask[:, 0], asked[:, 0], *more)
        else:
            logits = edit_logits(logits, mask, asked, *more)
        return logits, self._blocks[index].weigh(logits, found.v)

    def _leave(self, index: int, found: _Found, heads: Tensor) -> Tensor:
        """From the attention of the first Q rows to the tokens that leave, `[1, Q, dim]`."""
        return self._blocks[index].leave(found.tokens[:, : heads.shape[2]], heads)

    def _read_back(
        self, tokens: Tensor, rows: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Scores, from the tokens that leave the last block, and rows, on the CPU."""
        parts = [self._classify(tokens)[0], *rows]
        whole = torch.cat([part.flatten() for part in parts]).cpu()
        split = whole.split([part.numel() for part in parts])
        scores, *rows = (one.view(part.shape) for one, part in zip(split, parts, strict=True))
        return scores, tuple(rows)


class _KeptRows:
    """`edit_logits` for the unedited rows of one block: what no edit changes is computed once.

    Most edits start here, and half of the operations of `edit_logits` are the same each time. Each
    of the others costs more to call than to compute, so there is none too many: no conversion that
    changes nothing, no copy where a temporary can be overwritten.
    """

    def __init__(self, logits: Tensor, offset: str, num_prefix: int) -> None:
        self._prefix, self._patches = logits[..., :num_prefix], logits[..., num_prefix:]
        self._offsets = row_offset(logits, offset, num_prefix)
        self._current = torch.sigmoid(self._patches - self._offsets)

    def edited(self, wanted: Tensor, strength: float) -> Tensor:
        """What `edit_logits` gives: values `[1, H, P]`, NaN where unedited, to `[1, heads, R, N]`.

        NaN is far from no value: it compares False, and the logit stays.
        """
        wanted, dtype = wanted.unsqueeze(2), self._patches.dtype
        if wanted.dtype != self._offsets.dtype:
            wanted = wanted.to(self._offsets.dtype)
        asks = (wanted - self._current).abs_().gt(EPS)
        edited = torch.logit(wanted, EPS) + self._offsets
        if strength < 1:
            edited = torch.lerp(self._patches.to(edited), edited, strength)
        if edited.dtype != dtype:
            edited = edited.to(dtype)
        return torch.cat([self._prefix, torch.where(asks, edited, self._patches)], dim=-1)
