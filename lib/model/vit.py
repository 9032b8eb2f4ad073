"""SigmoidViT: a timm VisionTransformer whose class row can be read, supervised and edited.

Nothing of the model is copied or changed: `SigmoidViT(vit)` holds the very timm module and runs
its parts. Without an edit the scores are those of timm. Two things make it cheaper than timm's
own forward pass in spite of the rows that it returns:

- only the rows that the classifier reads (the class token, for distilled models the distillation
  token too) leave the last block, so that block computes one or two queries, not N;
- supervision needs class rows only, so no N x N matrix is ever built for it, and every other
  attention stays on PyTorch's fused scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Attention,
    Block,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib.edit import AttentionEdit, edit_logits, resolve_blocks


class UnsupportedModelError(ValueError):
    """The model's prediction is not decided by class rows that this project can edit."""


class SigmoidViT(nn.Module):
    """A timm ViT with class rows on request and attention edits.

    Args:
        vit: `VisionTransformer` or `VisionTransformerDistilled` of timm whose head reads the class
            token (`global_pool="token"`); register tokens, layer scale, qk-norm, any patch size,
            non-square and dynamic image sizes are fine.
        one_query: False runs the last block for all N queries as timm does: slower, and bit for
            bit the plain model in every dtype. For checks and side-by-side timings.

    Raises:
        UnsupportedModelError: names what the model has that decides its prediction otherwise.
    """

    def __init__(self, vit: nn.Module, one_query: bool = True) -> None:
        super().__init__()
        _refuse_unsupported(vit)
        self.vit = vit
        self.one_query = one_query
        self.depth = len(vit.blocks)
        self.num_heads = vit.blocks[0].attn.num_heads
        self.num_prefix = vit.num_prefix_tokens
        # Rows that forward_head reads: the distilled model averages a second head's opinion.
        self.num_read = 2 if isinstance(vit, VisionTransformerDistilled) else 1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the model's own image size."""
        return tuple(self.vit.patch_embed.grid_size)

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
            rows: blocks whose class-row logits are wanted (see `resolve_blocks`).

        Returns:
            scores `[B, classes]`; with `rows` also `{block: [B, heads, N]}`, the class token's
            logits (before any edit, scaled by 1/sqrt(head dim)), with gradient.
        """
        if tokens is not None:
            return self.forward_tokens(tokens, self.depth - blocks, edit, rows)
        grid = tuple(self.vit.patch_embed.dynamic_feat_size(images.shape[-2:]))
        return self.forward_tokens(self.embed(images), 0, edit, rows, grid)

    def embed(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to the tokens that enter block 0, `[B, N, dim]`."""
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))
        return self.vit.norm_pre(tokens)

    def tokens(self, images: Tensor, block: int) -> Tensor:
        """The tokens `[B, N, dim]` that enter `block`: what a frozen trunk computes once."""
        tokens = self.embed(images)
        for index in range(resolve_blocks((block,), self.depth)[0]):
            tokens = self.vit.blocks[index](tokens)
        return tokens

    def attention_matrices(self, images: Tensor) -> list[Tensor]:
        """Softmax attention of every block, `[B, heads, N, N]` each: for figures, not training."""
        tokens, found = self.embed(images), []
        for block in self.vit.blocks:
            q, k, _ = _queries_keys_values(block.attn, block.norm1(tokens))
            found.append(torch.softmax(_logits(block.attn, q, k), dim=-1))
            tokens = block(tokens)
        return found

    def block_by_block(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Every block in order: the tokens `[B, N, dim]` that leave it, and its class row.

        The row is `[B, heads, N]`, logits as `forward` returns them; no N x N matrix is built. The
        last block runs for all tokens here, though no patch that leaves it reaches the head.
        """
        tokens = self.embed(images)
        for index in range(self.depth):
            tokens, row = self._block(index, tokens, True, None, one_query=False)
            yield tokens, row

    def forward_tokens(
        self,
        tokens: Tensor,
        start: int,
        edit: AttentionEdit | None = None,
        rows: str | Sequence[int] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """`forward` from the tokens `[B, N, dim]` that enter block `start` on."""
        wanted = () if rows is None else resolve_blocks(_as_blocks(rows), self.depth)
        edited = self._edited_blocks(edit)
        for block in (*wanted, *edited):
            if block < start:
                raise ValueError(f"block {block} is asked for, but the tokens enter block {start}")
        if edited:
            mask, values = edit.per_head(len(tokens), self.num_heads, grid or self.grid)
            mask, values = mask.to(tokens.device), values.to(tokens.device)
        found: dict[int, Tensor] = {}
        for index in range(start, self.depth):
            row_edit = (edit, mask, values) if index in edited else None
            tokens, row = self._block(index, tokens, index in wanted, row_edit, self.one_query)
            if row is not None:
                found[index] = row
        scores = self.vit.forward_head(self.vit.norm(tokens))
        return scores if rows is None else (scores, found)

    def _edited_blocks(self, edit: AttentionEdit | None) -> tuple[int, ...]:
        if edit is None or not bool(edit.mask.any()):
            return ()
        return resolve_blocks(edit.blocks, self.depth)

    def _block(
        self,
        index: int,
        tokens: Tensor,
        want_row: bool,
        row_edit: tuple | None,
        one_query: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """One block; its tokens, and its class row `[B, heads, N]` if wanted."""
        block = self.vit.blocks[index]
        read_only = one_query and index == self.depth - 1
        if not (read_only or want_row or row_edit):
            if self.vit.grad_checkpointing and torch.is_grad_enabled():
                return checkpoint(block, tokens, use_reentrant=False), None
            return block(tokens), None
        normed = block.norm1(tokens)
        if read_only:
            tokens = tokens[:, : self.num_read]
            attended, row = self._attend_read(block.attn, normed, want_row, row_edit)
        else:
            attended, row = self._attend_all(block.attn, normed, want_row, row_edit)
        tokens = tokens + block.drop_path1(block.ls1(attended))
        tokens = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
        return tokens, row

    def _attend_read(
        self, attn: nn.Module, x: Tensor, want_row: bool, row_edit: tuple | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the rows that the head reads: `[B, N, dim]` to `[B, num_read, dim]`.

        Few queries need no key and no value of any token: q (W_k x) = (W_k^T q) x, and
        sum_n a_n (W_v x_n) = W_v (sum_n a_n x_n), so both matrices meet num_read vectors, not N.
        """
        width = attn.num_heads * attn.head_dim
        parts = (width, width, width)
        query_weight, *others = attn.qkv.weight.split(parts)
        query_bias, *biases = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.split(parts)
        q = F.linear(x[:, : self.num_read], query_weight, query_bias)
        q = attn.q_norm(_split_heads(q, attn.num_heads))  # [B, heads, num_read, d]
        key_weight, value_weight = (w.unflatten(0, (attn.num_heads, -1)) for w in others)
        key_bias, value_bias = (
            None if b is None else b.unflatten(0, (attn.num_heads, 1, -1)) for b in biases
        )
        if isinstance(attn.k_norm, nn.Identity):
            q = q * attn.scale
            pulled = torch.einsum("bhrd,hdc->bhrc", q, key_weight).flatten(1, 2)
            logits = (pulled @ x.transpose(1, 2)).unflatten(1, q.shape[1:3])
            if key_bias is not None:  # one number a row, which softmax ignores and the sigmoid not
                logits = logits + (q * key_bias).sum(-1, keepdim=True)
        else:  # each key is normed by itself, so each must be there
            k = F.linear(x, others[0], biases[0])
            logits = _logits(attn, q, attn.k_norm(_split_heads(k, attn.num_heads)))
        row = logits[:, :, 0] if want_row else None  # of [B, heads, num_read, N]
        if row_edit is not None:
            edit, mask, values = row_edit
            logits = edit_logits(logits, mask, values, edit.offset, self.num_prefix)
        weights = _weights(attn, logits, x.dtype)
        mixed = (weights.flatten(1, 2) @ x).unflatten(1, weights.shape[1:3])
        heads = torch.einsum("bhrc,hdc->bhrd", mixed, value_weight)
        if value_bias is not None:
            heads = heads + weights.sum(-1, keepdim=True) * value_bias  # 1, but for dropout
        return _project(attn, heads), row

    def _attend_all(
        self, attn: nn.Module, x: Tensor, want_row: bool, row_edit: tuple | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of all tokens, `[B, N, dim]` to the same; fused but for the edited rows."""
        q, k, v = _queries_keys_values(attn, x)
        # Not `_logits`: its matrix product would copy k and keep the copy for the backward pass.
        row = (q[:, :, :1] * attn.scale * k).sum(dim=-1) if want_row else None
        if row_edit is None:
            return _project(attn, self._fused(attn, q, k, v)), row
        edit, mask, values = row_edit
        touched = mask.any(dim=-1)[:, :, None, None]
        queries = q.shape[2] if edit.queries == "all" else self.num_read
        logits = _logits(attn, q[:, :, :queries], k)
        logits = edit_logits(logits, mask, values, edit.offset, self.num_prefix)
        heads = _weigh(attn, logits, v)
        if queries < q.shape[2] or not bool(touched.all()):
            # Images and heads that nobody edited keep the fused kernel's bits.
            plain = self._fused(attn, q, k, v)
            edited = torch.where(touched, heads, plain[:, :, :queries])
            heads = torch.cat([edited, plain[:, :, queries:]], dim=2)
        return _project(attn, heads), row

    def _fused(self, attn: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """PyTorch's own attention of all tokens, `[B, heads, N, d]`."""
        dropout = attn.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def _as_blocks(rows: str | Sequence[int]) -> str | tuple[int, ...]:
    return rows if isinstance(rows, str) else tuple(rows)


def _queries_keys_values(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, N, dim]` to q, k, v of all tokens, `[B, heads, N, d]` each."""
    q, k, v = (_split_heads(part, attn.num_heads) for part in attn.qkv(x).chunk(3, dim=-1))
    return attn.q_norm(q), attn.k_norm(k), v


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, N, dim] -> [B, heads, N, d]


def _logits(attn: nn.Module, q: Tensor, k: Tensor) -> Tensor:
    return (q * attn.scale) @ k.transpose(-2, -1)


def _weights(attn: nn.Module, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax(logits); computed in float32, as saturated edits need its range."""
    weights = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return attn.attn_drop(weights).to(dtype)


def _weigh(attn: nn.Module, logits: Tensor, v: Tensor) -> Tensor:
    """softmax(logits) v."""
    return _weights(attn, logits, v.dtype) @ v


def _project(attn: nn.Module, heads: Tensor) -> Tensor:
    joined = heads.transpose(1, 2).flatten(2)  # [B, heads, Q, d] -> [B, Q, dim]
    return attn.proj_drop(attn.proj(attn.norm(joined)))


def _refuse_unsupported(vit: nn.Module) -> None:
    name = type(vit).__name__
    if type(vit) not in (VisionTransformer, VisionTransformerDistilled):
        raise UnsupportedModelError(
            f"{name} is not a plain timm VisionTransformer; its prediction is not decided by a "
            "class row that can be edited. Use a vit_*, deit_* or *dino* model of timm"
        )
    if vit.global_pool != "token":
        raise UnsupportedModelError(
            f'this {name} pools its tokens with global_pool="{vit.global_pool}", so no class row '
            'decides; create it with global_pool="token" and a class token'
        )
    if not isinstance(vit.patch_drop, nn.Identity):
        raise UnsupportedModelError(
            f"this {name} drops patches (patch_drop_rate > 0), so a row no longer matches the "
            "patch grid; create it with patch_drop_rate=0"
        )
    for block in vit.blocks:
        if type(block) is not Block or type(block.attn) is not Attention:
            raise UnsupportedModelError(
                f"this {name} is built of {type(block).__name__} with "
                f"{type(getattr(block, 'attn', block)).__name__}; only timm's Block with Attention "
                "is supported"
            )
        if getattr(block.attn, "gate", None) is not None:
            raise UnsupportedModelError(f"this {name} gates its attention; that is not supported")


def create_model(
    name: str, num_classes: int, image_size: tuple[int, int], **overrides: object
) -> SigmoidViT:
    """A SigmoidViT around `timm.create_model(name)` with random weights.

    Args:
        name: timm model name. num_classes: size of the head.
        image_size: height and width in pixels; a multiple of the patch size.
        overrides: passed to timm, e.g. `embed_dim`, `depth`, `drop_path_rate`.
    """
    try:
        vit = timm.create_model(name, num_classes=num_classes, img_size=image_size, **overrides)
    except TypeError as error:  # not a ViT: its constructor knows no img_size
        raise UnsupportedModelError(f"{name} is no timm VisionTransformer: {error}") from error
    return SigmoidViT(vit)
