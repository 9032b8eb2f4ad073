"""timm's ViT taken apart: the only file that knows what its blocks and heads are made of.

`take_apart(block)` gives the steps of one block by name, so that what stands between them (an
edit, a row that is wanted) can be done by whoever runs it. Today there is one kind, timm's `Block`
with `Attention`: `PlainBlock`. Another kind is another class with the same methods, chosen in
`take_apart` and no longer refused by `refuse_unsupported`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]


class UnsupportedModelError(ValueError):
    """The model's prediction is not decided by class rows that this project can edit."""


class PlainBlock:
    """The steps of timm's `Block` with `Attention`.

    It only points at the block's layers and costs nothing to make: made where it is used, it needs
    no thought when a model is copied, moved or compiled.

    Args:
        block: of a timm VisionTransformer.
        bound: the layers as plain functions with the weights of now, without those that do nothing
            in eval mode: for one token, calling nn.Modules would cost a fifth of the time.
    """

    def __init__(self, block: nn.Module, bound: bool = False) -> None:
        attn, mlp = block.attn, block.mlp
        self._attn = attn
        self.num_heads = attn.num_heads
        layers = _bound if bound else tuple
        split = bound and type(mlp) is Mlp
        parts = (mlp.fc1, mlp.act, mlp.drop1, mlp.norm, mlp.fc2, mlp.drop2) if split else (mlp,)
        self._norm = layers((block.norm1,))
        self._dropout = layers((attn.attn_drop,))
        self._project = layers((attn.norm, attn.proj, attn.proj_drop, block.ls1, block.drop_path1))
        self._mlp = layers((block.norm2, *parts, block.ls2, block.drop_path2))

    def norm(self, tokens: Tensor) -> Tensor:
        """What attention sees of the tokens `[B, N, dim]` that enter the block."""
        return _in_turn(self._norm, tokens)

    def queries_keys_values(
        self, normed: Tensor, queries: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, N, dim]` to q, k, v, `[B, heads, N, d]` each; q of the first `queries` tokens only.

        q and k are those of the logits: where the model has norms for them, behind these.
        """
        qkv = self._attn.qkv
        if queries is None or queries >= normed.shape[1]:
            parts = qkv(normed).chunk(3, dim=-1)
        else:
            weight, bias, width = qkv.weight, qkv.bias, len(qkv.weight) // 3
            biases = (None, None) if bias is None else (bias[:width], bias[width:])
            q = F.linear(normed[:, :queries], weight[:width], biases[0])
            parts = (q, *F.linear(normed, weight[width:], biases[1]).chunk(2, dim=-1))
        q, k, v = (self._split_heads(part) for part in parts)
        return self._attn.q_norm(q), self._attn.k_norm(k), v

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """What softmax sees, scaled: `[B, heads, Q, N]`."""
        return (q * self._attn.scale) @ k.transpose(-2, -1)

    def class_row(self, q: Tensor, k: Tensor) -> Tensor:
        """Logits of the first token's row, `[B, heads, N]`; no copy of k for the backward pass.

        The matrix product of `logits` would copy k and keep the copy.
        """
        return (q[:, :, :1] * self._attn.scale * k).sum(dim=-1)

    def weigh(self, logits: Tensor, v: Tensor) -> Tensor:
        """softmax(logits) v, `[B, heads, Q, d]`."""
        if len(v) > 1:
            return self._weights(logits, v.dtype) @ v
        # The row of a live edit: as `@` of four dimensions it takes longer.
        return torch.bmm(self._weights(logits[0], v.dtype), v[0])[None]

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """PyTorch's own attention, `[B, heads, Q, d]`; no N x N matrix is built."""
        dropout = self._attn.attn_drop.p if self._attn.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)

    def read(
        self, normed: Tensor, count: int, change: Layer | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of the first `count` tokens alone, with `change` made to their logits.

        Few queries need no key and no value of any token: q (W_k x) = (W_k^T q) x, and
        sum_n a_n (W_v x_n) = W_v (sum_n a_n x_n), so both matrices meet `count` vectors, not N.

        Returns:
            attention `[B, heads, count, d]`; logits `[B, heads, count, N]` before the change.
        """
        attn, x = self._attn, normed
        query_weight, *others = attn.qkv.weight.chunk(3)
        query_bias, *biases = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
        q = attn.q_norm(self._split_heads(F.linear(x[:, :count], query_weight, query_bias)))
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
            k = self._split_heads(F.linear(x, others[0], biases[0]))
            logits = self.logits(q, attn.k_norm(k))
        weights = self._weights(logits if change is None else change(logits), x.dtype)
        mixed = (weights.flatten(1, 2) @ x).unflatten(1, weights.shape[1:3])
        heads = torch.einsum("bhrc,hdc->bhrd", mixed, value_weight)
        if value_bias is not None:
            heads = heads + weights.sum(-1, keepdim=True) * value_bias  # 1, but for dropout
        return heads, logits

    def leave(self, tokens: Tensor, heads: Tensor) -> Tensor:
        """What leaves the block, `[B, Q, dim]`.

        Args:
            tokens: that entered it. heads: their attention, `[B, heads, Q, d]`.
        """
        tokens = tokens + _in_turn(self._project, heads.transpose(1, 2).flatten(2))
        return tokens + _in_turn(self._mlp, tokens)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # to [B, heads, N, d]

    def _weights(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """softmax(logits); computed in float32, as saturated edits need its range."""
        wide = torch.float32 if logits.dtype in (torch.float16, torch.bfloat16) else None
        weights = _in_turn(self._dropout, torch.softmax(logits, dim=-1, dtype=wide))
        return weights if weights.dtype == dtype else weights.to(dtype)


def take_apart(block: nn.Module, bound: bool = False) -> PlainBlock:
    """The steps of one block of a model that `refuse_unsupported` let pass; see `PlainBlock`."""
    return PlainBlock(block, bound)


def embed(vit: nn.Module, images: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` to the tokens that enter block 0, `[B, N, dim]`."""
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))


def count_read(vit: nn.Module) -> int:
    """How many tokens, from the first on, the head reads.

    The distilled model averages a second head's opinion.
    """
    return 2 if isinstance(vit, VisionTransformerDistilled) else 1


def classify(vit: nn.Module, tokens: Tensor) -> Tensor:
    """From the tokens that leave the last block, the first ones at least, to class scores."""
    return vit.forward_head(vit.norm(tokens))


def bound_classify(vit: nn.Module) -> Layer:
    """`classify` with the weights of now, for a model in eval mode."""
    if count_read(vit) > 1:
        return partial(classify, vit)
    layers = _bound((vit.norm, vit.fc_norm, vit.head_drop, vit.head))
    return lambda tokens: _in_turn(layers, tokens[:, 0])


def _in_turn(layers: Iterable[Layer], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _bound(modules: Iterable[nn.Module]) -> tuple[Layer, ...]:
    """As functions, without those that do nothing in eval mode."""
    idle = nn.Identity | nn.Dropout | DropPath
    return tuple(_function(module) for module in modules if not isinstance(module, idle))


def _function(module: nn.Module) -> Layer:
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    if type(module) in (nn.LayerNorm, LayerNorm):
        shape, eps = module.normalized_shape, module.eps
        weight, bias = module.weight, module.bias
        return partial(F.layer_norm, normalized_shape=shape, weight=weight, bias=bias, eps=eps)
    if type(module) is nn.GELU:
        return partial(F.gelu, approximate=module.approximate)
    return module


def refuse_unsupported(vit: nn.Module) -> None:
    """Raises UnsupportedModelError, which names what decides the model's prediction otherwise."""
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
