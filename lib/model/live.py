"""Edits answered in milliseconds: the model is run once a picture, then only what an edit changes.

A person paints on one picture and wants the class scores to follow. `LiveImage` keeps what the
unedited model computed in every block. An edit whose first named block is b then costs:

- blocks before b: nothing, they are never run again;
- block b: softmax, projection and MLP of the rows that the classifier reads (with queries="all" of
  all rows), from the logits and values that were kept;
- block b + 1: keys and values of the changed tokens only, attention and MLP of all tokens;
- later blocks: everything, and of the last one only the rows that the classifier reads.

So an edit of the last block, the common one, is one or two tokens' worth of one block.
`LiveSession` puts a model and a data set together for the editor: NumPy in, NumPy out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp
from torch import Tensor, nn

from lib.edit import (
    EPS,
    AttentionEdit,
    edit_logits,
    resolve_blocks,
    row_offset,
)
from lib.model.vit import SigmoidViT


@dataclass(frozen=True)
class _Found:
    """What one block computed up to its attention, for one picture; R rows the classifier reads."""

    tokens: Tensor  # [1, Q, dim], entering the block; Q = N, in the last block R
    q: Tensor  # [1, heads, Q, d]
    k: Tensor  # [1, heads, N, d]
    v: Tensor  # [1, heads, N, d]
    logits: Tensor  # [1, heads, R, N], of the rows that the classifier reads


class LiveImage:
    """One picture whose edits are answered from what the unedited model computed.

    Args:
        model: in eval mode, on any device. Its weights must not change while the LiveImage lives.
        image: `[3, H, W]`, normalised; brought to the model's device and dtype.

    Attributes:
        scores: `[classes]`, logits of the unedited model. rows: `[depth, heads, N]`, the class
            token's attention logits of every block, before any edit. Both on the CPU.
    """

    @torch.inference_mode()
    def __init__(self, model: SigmoidViT, image: Tensor) -> None:
        self._model = model
        self._grid = tuple(model.vit.patch_embed.dynamic_feat_size(image.shape[-2:]))
        self._layers = [_Layers(block) for block in model.vit.blocks]
        self._classify = _chain(model.vit.norm, model.vit.fc_norm, model.vit.head)
        parameter = next(model.parameters())
        self._device = parameter.device
        tokens = model.embed(image[None].to(parameter))
        self._count = tokens.shape[1]  # N
        self._kept: list[_Found] = []
        self._editable: dict[tuple[int, str], _KeptRows] = {}  # by block and offset, on demand
        for index in range(model.depth):
            found = self._enter(index, tokens)
            self._kept.append(found)
            tokens = self._leave(index, found, self._attend(index, found))
        # On the model's device, where edits add to them; `rows` is the caller's.
        self._rows = torch.cat([found.logits[:, :, 0] for found in self._kept])
        self.scores, self.rows = self._score(tokens), self._rows.cpu()

    @torch.inference_mode()
    def run(self, edit: AttentionEdit | None) -> tuple[Tensor, Tensor]:
        """Class scores and class rows of the edited model.

        Args:
            edit: for one picture; None or an all-False mask gives `scores` and `rows` themselves.

        Returns:
            scores `[classes]`; rows `[depth, heads, N]`, after the edit: edited cells hold the
            logit that was asked for, blocks behind an edited one what they make of it. (The rows
            of SigmoidViT are those before a block's own edit.) On the CPU, in the model's dtype.

        Raises:
            ValueError: the edit names a block or head that is not there, or another grid.
        """
        if edit is None or not edit.mask.any():
            return self.scores, self.rows
        model = self._model
        edited = resolve_blocks(edit.blocks, model.depth)
        mask, values = self._mask_and_values(edit)
        first = edited[0]
        found = self._kept[first]
        if edit.queries == "cls" or first == model.depth - 1:
            logits = self._kept_rows(first, edit.offset).edited(mask, values)
            heads = _weigh(logits, found.v)
        else:
            logits, heads = self._edit(first, found, edit, mask, values)
        rows = [self._rows[:first], logits[:, :, 0]]
        tokens = self._leave(first, found, heads)
        for index in range(first + 1, model.depth):
            found = self._enter(index, tokens)
            if index in edited:
                logits, heads = self._edit(index, found, edit, mask, values)
            else:
                logits, heads = found.logits, self._attend(index, found)
            if heads.shape[2] < self._queries(index):  # the other rows have changed keys to read
                others = self._attend(index, found)[:, :, heads.shape[2] :]
                heads = torch.cat([heads, others], dim=2)
            rows.append(logits[:, :, 0])
            tokens = self._leave(index, found, heads)
        return self._score(tokens), torch.cat(rows).cpu()

    def _mask_and_values(self, edit: AttentionEdit) -> tuple[Tensor, Tensor]:
        """`[1, H, P]` each; H = 1 for the same edit of all heads, which saves a tenth of `run`."""
        patches = self._grid[0] * self._grid[1]
        if edit.heads == "all" and edit.mask.shape in (self._grid, (patches,)):
            mask, values = edit.mask.reshape(1, 1, patches), edit.values.reshape(1, 1, patches)
        else:
            mask, values = edit.per_head(1, self._model.num_heads, self._grid)
        if mask.device != self._device:
            mask, values = mask.to(self._device), values.to(self._device)
        return mask, values

    def _kept_rows(self, index: int, offset: str) -> _KeptRows:
        if (index, offset) not in self._editable:
            logits, prefix = self._kept[index].logits, self._model.num_prefix
            self._editable[index, offset] = _KeptRows(logits, offset, prefix)
        return self._editable[index, offset]

    def _enter(self, index: int, tokens: Tensor) -> _Found:
        """A block up to its attention.

        `tokens` [1, C, dim] are the first C that enter it; the others are the unedited model's.
        """
        layers, queries, changed = self._layers[index], self._queries(index), tokens.shape[1]
        q, k, v = layers.queries_keys_values(tokens, queries)
        tokens = tokens[:, :queries]
        if changed < self._count:
            kept = self._kept[index]
            tokens = torch.cat([tokens, kept.tokens[:, changed:]], dim=1)
            pairs = ((q, kept.q), (k, kept.k), (v, kept.v))
            q, k, v = (torch.cat([new, old[:, :, changed:]], dim=2) for new, old in pairs)
        return _Found(tokens, q, k, v, layers.logits(q[:, :, : self._model.num_read], k))

    def _queries(self, index: int) -> int:
        """How many rows leave a block: of the last one, only those that the classifier reads."""
        return self._model.num_read if index == self._model.depth - 1 else self._count

    def _attend(self, index: int, found: _Found) -> Tensor:
        """Attention without an edit, `[1, heads, Q, d]` of the rows that leave the block."""
        if index == self._model.depth - 1:
            return _weigh(found.logits, found.v)
        return F.scaled_dot_product_attention(found.q, found.k, found.v)

    def _edit(
        self, index: int, found: _Found, edit: AttentionEdit, mask: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits `[1, heads, E, N]` and attention `[1, heads, E, d]` of the E edited rows."""
        logits = found.logits
        if edit.queries == "all" and index < self._model.depth - 1:
            logits = self._layers[index].logits(found.q, found.k)
        logits = edit_logits(logits, mask, values, edit.offset, self._model.num_prefix)
        return logits, _weigh(logits, found.v)

    def _leave(self, index: int, found: _Found, heads: Tensor) -> Tensor:
        """From the attention of the first Q rows to the tokens that leave, `[1, Q, dim]`."""
        layers, joined = self._layers[index], heads.transpose(1, 2).flatten(2)
        tokens = found.tokens[:, : joined.shape[1]] + layers.project(joined)
        return tokens + layers.mlp(tokens)

    def _score(self, tokens: Tensor) -> Tensor:
        if self._model.num_read == 1:
            return self._classify(tokens[:, 0])[0].cpu()
        return self._model.vit.forward_head(self._model.vit.norm(tokens))[0].cpu()


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

    def edited(self, mask: Tensor, values: Tensor) -> Tensor:
        """What `edit_logits` gives: `[1, H, P]` each to `[1, heads, R, N]`."""
        wanted, dtype = values.unsqueeze(2), self._patches.dtype
        if wanted.dtype != self._offsets.dtype:
            wanted = wanted.to(self._offsets.dtype)
        asks = (wanted - self._current).abs_().gt(EPS).logical_and_(mask.unsqueeze(2))
        edited = torch.logit(wanted, EPS) + self._offsets
        if edited.dtype != dtype:
            edited = edited.to(dtype)
        return torch.cat([self._prefix, torch.where(asks, edited, self._patches)], dim=-1)


class _Layers:
    """One block's layers as plain functions, in eval mode.

    For one token, calling nn.Modules would cost a fifth of the time of an edit.
    """

    def __init__(self, block: nn.Module) -> None:
        attn, mlp = block.attn, block.mlp
        self._attn = attn
        self._norm = _chain(block.norm1)
        self.project = _chain(attn.norm, attn.proj, block.ls1)
        inner = (mlp.fc1, mlp.act, mlp.norm, mlp.fc2) if type(mlp) is Mlp else (mlp,)
        self.mlp = _chain(block.norm2, *inner, block.ls2)

    def queries_keys_values(self, x: Tensor, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """`[1, C, dim]` to q of the first `queries` tokens, and k and v of all C."""
        attn, x = self._attn, self._norm(x)
        weight, bias = attn.qkv.weight, attn.qkv.bias
        if queries >= x.shape[1]:
            parts = F.linear(x, weight, bias).chunk(3, dim=-1)
        else:
            width = attn.num_heads * attn.head_dim
            biases = (None, None) if bias is None else (bias[:width], bias[width:])
            q = F.linear(x[:, :queries], weight[:width], biases[0])
            parts = (q, *F.linear(x, weight[width:], biases[1]).chunk(2, dim=-1))
        # [1, C, dim] -> [1, heads, C, d]
        q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
        return attn.q_norm(q), attn.k_norm(k), v

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self._attn.scale) @ k.transpose(-2, -1)


def _weigh(logits: Tensor, v: Tensor) -> Tensor:
    """softmax(logits) v, `[1, H, R, d]`; the softmax in float32, as saturated edits need its range.

    One product a head, without the batch of one: as `@` of four dimensions it takes twice as long.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        shares = torch.softmax(logits[0], dim=-1, dtype=torch.float32).to(v.dtype)
    else:
        shares = torch.softmax(logits[0], dim=-1)
    return torch.bmm(shares, v[0])[None]


def _chain(*modules: nn.Module) -> Callable[[Tensor], Tensor]:
    """Modules one after another, without those that do nothing in eval mode."""
    steps = [_function(m) for m in modules if not isinstance(m, nn.Identity | nn.Dropout)]

    def run(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return run


def _function(module: nn.Module) -> Callable[[Tensor], Tensor]:
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    if type(module) in (nn.LayerNorm, LayerNorm):
        shape, eps = module.normalized_shape, module.eps
        weight, bias = module.weight, module.bias
        return partial(F.layer_norm, normalized_shape=shape, weight=weight, bias=bias, eps=eps)
    if type(module) is nn.GELU:
        return partial(F.gelu, approximate=module.approximate)
    return module
