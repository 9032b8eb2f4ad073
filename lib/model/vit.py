"""SigmoidViT: a timm ViT whose deciding rows can be read, supervised and edited.

Nothing of the model is copied or changed: `SigmoidViT(vit)` holds the very timm module and runs
its parts. Without an edit the scores are those of timm. Two things make it cheaper than timm's
own forward pass in spite of the rows that it returns:

- only the rows that the classifier reads (the class token, for distilled models the distillation
  token too, for models pooled by attention the pooling's) leave the last block, so that block
  computes one or two queries, not N;
- supervision needs class rows only, so no N x N matrix is ever built for it, and every other
  attention stays on PyTorch's fused scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib.edit import AttentionEdit, Layout, edit_logits
from lib.model.adapter import (
    Ropes,
    UnsupportedModelError,
    classify,
    count_read,
    embed,
    is_pooled,
    refuse_unsupported,
    rotary_positions,
    run_block,
    take_apart,
)
from lib.model.block import PlainBlock
from lib.model.families import LIST, advice, default_pool
from lib.model.mean_edit import edit_mean


class _RowEdit(NamedTuple):
    """What an AttentionEdit asks of the logits of one batch."""

    mask: Tensor  # [B, heads, P]
    values: Tensor  # [B, heads, P]
    asked: AttentionEdit
    num_prefix: int
    everywhere: bool  # in every image and head

    @property
    def every_query(self) -> bool:
        return self.asked.queries == "all"

    def __call__(self, logits: Tensor) -> Tensor:
        more = self.asked.offset, self.num_prefix, self.asked.strength
        if self.asked.heads == "mean":
            return edit_mean(logits, self.mask[:, 0], self.values[:, 0], *more)
        return edit_logits(logits, self.mask, self.values, *more)


class SigmoidViT(nn.Module):
    """A timm ViT with class rows on request and attention edits.

    Args:
        vit: of timm, whose head reads a class token (`global_pool="token"`) or a pooling by
            attention (`"map"`): `VisionTransformer` and `Eva` with the blocks that `block` knows.
            Register tokens, layer scale, qk-norm, rotary positions, any patch size, non-square and
            dynamic image sizes are fine. `python -m lib models` lists the families.
        one_query: False runs the last block for all N queries as timm does: slower, and bit for
            bit the plain model in every dtype. For checks and side-by-side timings.

    Attributes:
        classes: names of the scores, where they are known: a run's model knows them.
        layout: its blocks, a pooling counted as the last one, "pool". depth: how many.
        num_heads: of the last block, which decides. num_prefix: tokens in front of the patches.

    Raises:
        UnsupportedModelError: names what the model has that decides its prediction otherwise.
    """

    def __init__(self, vit: nn.Module, one_query: bool = True) -> None:
        super().__init__()
        refuse_unsupported(vit)
        self.vit = vit
        self.one_query = one_query
        self.classes: list[str] | None = None
        pooled, num_blocks = is_pooled(vit), len(vit.blocks)
        self.num_class_rows = count_read(vit)  # that can be read in a block before the last
        self.depth = num_blocks + pooled
        self.layout = Layout(
            heads=tuple(take_apart(vit, index).num_heads for index in range(self.depth)),
            read=tuple(range(0 if self.num_class_rows else num_blocks, self.depth)),
            pooled=pooled,
        )
        self.num_heads = self.layout.heads[-1]
        self.num_prefix = vit.num_prefix_tokens
        self.num_read = 1 if pooled else self.num_class_rows  # by the head, of the last block

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where images must be."""
        return next(self.parameters()).device

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the model's own image size."""
        return tuple(self.vit.patch_embed.grid_size)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images `[..., H, W]`."""
        return tuple(self.vit.patch_embed.dynamic_feat_size(images.shape[-2:]))

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the channels that the weights were trained with."""
        data = resolve_model_data_config(self.vit)
        return tuple(data["mean"]), tuple(data["std"])

    def forward(
        self,
        images: Tensor | None = None,
        edit: AttentionEdit | None = None,
        rows: str | Sequence[int] | None = None,
        tokens: Tensor | None = None,
        blocks: int = 1,
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Class scores, and the class rows of chosen blocks.

        Args:
            images: `[B, 3, H, W]`, normalised.
            tokens: in place of images, what `tokens(images, -blocks)` gave: only the last `blocks`
                blocks run.
            edit: what a person changed; None or an all-False mask runs the plain model.
            rows: blocks whose class-row logits are wanted (see `Layout.resolve`).

        Returns:
            scores `[B, classes]`; with `rows` also `{block: [B, heads, N]}`, the logits of the
            class token, or of the pooling's query (before any edit, scaled by 1/sqrt(head dim)),
            with gradient. Where a pooling leaves out the tokens before the patches, theirs are
            `HIDDEN`.
        """
        if tokens is not None:
            return self.forward_tokens(tokens, self.depth - blocks, edit, rows)
        tokens, ropes = embed(self.vit, images)
        return self._forward(tokens, ropes, 0, edit, rows, self.grid_of(images))

    def embed(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to the tokens that enter block 0, `[B, N, dim]`."""
        return embed(self.vit, images)[0]

    def tokens(self, images: Tensor, block: int) -> Tensor:
        """The tokens `[B, N, dim]` that enter `block`: what a frozen trunk computes once."""
        tokens, ropes = embed(self.vit, images)
        for index in range(self.layout.resolve((block,), "all")[0]):
            tokens = run_block(self.vit, index, tokens, ropes[index])
        return tokens

    def attention_matrices(self, images: Tensor) -> list[Tensor]:
        """Softmax attention of every block: for figures, not training.

        `[B, heads, N, N]` each; of a pooling, the last, `[B, heads, 1, N]`.
        """
        steps = self._step_by_step(images)
        return [torch.softmax(parts.logits(q, k), dim=-1) for parts, q, k, _ in steps]

    def block_by_block(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Every block in order: the tokens `[B, N, dim]` that leave it, and its class row.

        The row is `[B, heads, N]`, logits as `forward` returns them, None of a block that has none
        to read; no N x N matrix is built. The last block runs for all tokens here, though no patch
        that leaves it reaches the head. Of a pooling, the tokens are those that it pools.
        """
        for index, (parts, q, k, tokens) in enumerate(self._step_by_step(images)):
            yield tokens, parts.class_row(q, k) if index in self.layout.read else None

    def _step_by_step(self, images: Tensor) -> Iterator[tuple[PlainBlock, Tensor, Tensor, Tensor]]:
        """Every block in order: its steps, q, k, and the tokens that leave it (see above)."""
        tokens, ropes = embed(self.vit, images)
        for index in range(self.depth):
            parts = take_apart(self.vit, index, ropes[index])
            q, k, v = parts.queries_keys_values(parts.norm(tokens))
            if index < len(self.vit.blocks):
                tokens = parts.leave(tokens, parts.fused(q, k, v))
            yield parts, q, k, tokens

    def forward_tokens(
        self,
        tokens: Tensor,
        start: int,
        edit: AttentionEdit | None = None,
        rows: str | Sequence[int] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """`forward` from the tokens `[B, N, dim]` that enter block `start` on.

        Args:
            grid: rows and columns of patches; None is the model's own.
        """
        grid = grid or self.grid
        return self._forward(tokens, rotary_positions(self.vit, grid), start, edit, rows, grid)

    def _forward(
        self,
        tokens: Tensor,
        ropes: Ropes,
        start: int,
        edit: AttentionEdit | None,
        rows: str | Sequence[int] | None,
        grid: tuple[int, int],
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        names = rows if rows is None or isinstance(rows, str) else tuple(rows)
        wanted = () if names is None else self.layout.resolve(names)
        edited = ()
        if edit and not edit.is_empty:
            edited = self.layout.resolve(edit.blocks, edit.queries)
        for index in (*wanted, *edited):
            if index < start:
                raise ValueError(f"block {index} is asked for, but the tokens enter block {start}")
        changes = {}  # by number of heads: the pooling may have another one
        for heads in {self.layout.heads[index] for index in edited}:
            mask, values = edit.per_head(len(tokens), heads, grid)
            # Asked of the mask where it is made: on a GPU the answer would have to be waited for.
            everywhere = bool(mask.any(dim=-1).all())
            mask, values = mask.to(tokens.device), values.to(tokens.device)
            changes[heads] = _RowEdit(mask, values, edit, self.num_prefix, everywhere)
        found: dict[int, Tensor] = {}
        for index in range(start, self.depth):
            change = changes[self.layout.heads[index]] if index in edited else None
            tokens, row = self._block(index, tokens, ropes[index], index in wanted, change)
            if row is not None:
                found[index] = row
        scores = classify(self.vit, tokens)
        return scores if rows is None else (scores, found)

    def _block(
        self,
        index: int,
        tokens: Tensor,
        rope: Tensor | None,
        want_row: bool,
        change: _RowEdit | None,
    ) -> tuple[Tensor, Tensor | None]:
        """One block; its tokens, and its class row `[B, heads, N]` if wanted."""
        read_only = self.one_query and index == self.depth - 1
        is_pool = index == len(self.vit.blocks)
        if not (read_only or is_pool or want_row or change is not None):
            if self.vit.grad_checkpointing and torch.is_grad_enabled():
                run = partial(run_block, self.vit, index)
                return checkpoint(run, tokens, rope, use_reentrant=False), None
            return run_block(self.vit, index, tokens, rope), None
        parts = take_apart(self.vit, index, rope)
        normed = parts.norm(tokens)
        if read_only:
            heads, logits = parts.read(normed, self.num_read, change)
            row = logits[:, :, 0] if want_row else None  # of [B, heads, num_read, N]
            return parts.leave(tokens[:, : self.num_read], heads), row
        q, k, v = parts.queries_keys_values(normed)
        row = parts.class_row(q, k) if want_row else None
        heads = parts.fused(q, k, v) if change is None else self._edited(parts, (q, k, v), change)
        return parts.leave(tokens, heads), row

    def _edited(
        self, parts: PlainBlock, qkv: tuple[Tensor, Tensor, Tensor], change: _RowEdit
    ) -> Tensor:
        """Attention of all tokens, `[B, heads, N, d]`; fused but for the edited rows."""
        q, k, v = qkv
        touched = change.mask.any(dim=-1)[:, :, None, None]
        queries = q.shape[2] if change.every_query else self.num_class_rows or 1
        heads = parts.weigh(change(parts.logits(q[:, :, :queries], k)), v)
        if queries < q.shape[2] or not change.everywhere:
            # Images and heads that nobody edited keep the fused kernel's bits.
            plain = parts.fused(q, k, v)
            edited = torch.where(touched, heads, plain[:, :, :queries])
            heads = torch.cat([edited, plain[:, :, queries:]], dim=2)
        return heads


def create_model(
    name: str,
    num_classes: int,
    image_size: tuple[int, int],
    norm_eps: float | None = None,
    normalisation: Sequence[float] | None = None,
    **overrides: object,
) -> SigmoidViT:
    """A SigmoidViT around `timm.create_model(name)` with random weights.

    Args:
        name: timm model name. num_classes: size of the head.
        image_size: height and width in pixels; a multiple of the patch size.
        norm_eps: epsilon of every LayerNorm. normalisation: mean, then standard deviation, of the
            three channels. None is timm's, of either.
        overrides: passed to timm, e.g. `embed_dim`, `depth`, `drop_path_rate`. Left out,
            `global_pool` is timm's, but "token" where the weights that timm averages were trained
            with a class token (see `lib.model.families`).
    """
    overrides = default_pool(name) | overrides
    if normalisation is not None:
        numbers = {"mean": tuple(normalisation[:3]), "std": tuple(normalisation[3:])}
        overrides["pretrained_cfg_overlay"] = numbers
    try:
        vit = timm.create_model(name, num_classes=num_classes, img_size=image_size, **overrides)
    except TypeError as error:  # not a ViT: its constructor knows no img_size
        raise UnsupportedModelError(
            f"{name} is no Vision Transformer of timm ({error}); {LIST}"
        ) from error
    except RuntimeError as error:  # timm does not know the name, or its weights' tag
        raise UnsupportedModelError(
            f"timm has no model {name!r} ({error}); set MODEL to another, such as "
            f"vit_small_patch16_224; {LIST}"
        ) from error
    for module in vit.modules():
        if norm_eps is not None and isinstance(module, nn.LayerNorm):
            module.eps = norm_eps
    try:
        return SigmoidViT(vit)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error}{advice(name)}") from error
