"""timm's blocks taken apart: this file and `adapter` alone know what a ViT is made of.

The steps of one block have names here, so that what stands between them (an edit, a row that is
wanted) can be done by whoever runs it. There is a class a kind:

- `PlainBlock`: timm's `Block` with `Attention`;
- `RotaryBlock`: `EvaBlock` with `EvaAttention` or `AttentionRope` (DINOv3, EVA-02, rope ViTs, PE);
- `PoolingBlock`: `AttentionPoolLatent` with the norm before it (SigLIP, PE). Its one query does not
  depend on the picture. It comes after all others and is one more block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, Mlp, apply_rot_embed_cat
from torch import Tensor, nn

# Logit of a token that is not read: its softmax is exactly 0, and gradients stay finite, which they
# do not with -inf.
HIDDEN = -1e4

Layer = Callable[[Tensor], Tensor]
QKV = tuple[Tensor, Tensor, Tensor]


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
        layers = bind if bound else tuple
        split = bound and type(mlp) is Mlp
        parts = (mlp.fc1, mlp.act, mlp.drop1, mlp.norm, mlp.fc2, mlp.drop2) if split else (mlp,)
        scale1, scale2 = self._layer_scales(block)
        self._norm = layers((block.norm1,))
        self._dropout = layers((attn.attn_drop,))
        self._inner_norm = layers((attn.norm,))
        self._project = layers((attn.proj, attn.proj_drop, *scale1, block.drop_path1))
        self._mlp = layers((block.norm2, *parts, *scale2, block.drop_path2))

    @staticmethod
    def _layer_scales(block: nn.Module) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
        return (block.ls1,), (block.ls2,)

    def norm(self, tokens: Tensor) -> Tensor:
        """What attention sees of the tokens `[B, N, dim]` that enter the block."""
        return chain(self._norm, tokens)

    def queries_keys_values(self, normed: Tensor, queries: int | None = None) -> QKV:
        """`[B, N, dim]` to q, k, v, `[B, heads, N, d]` each; q of the first `queries` tokens only.

        q and k are those of the logits: where the model has norms or rotations for them, behind
        these.
        """
        attn = self._attn
        if (queries is None or queries >= normed.shape[1]) and attn.qkv is not None:
            parts = self._fused_projection(normed).chunk(3, dim=-1)
        else:
            weights, biases = self._projections()
            tokens = normed[:, :queries], normed, normed
            parts = tuple(map(F.linear, tokens, weights, biases))
        q, k, v = (self._split_heads(part) for part in parts)
        q = self._rotated(attn.q_norm(q), v.dtype)
        k = self._rotated(attn.k_norm(k), v.dtype)
        return q, self._every_head(k), self._every_head(v)

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
        Where each key is normed or turned by itself, the keys must be there; values need not.

        Returns:
            attention `[B, heads, count, d]`; logits `[B, heads, count, N]` before the change.
        """
        attn, x = self._attn, normed
        weights, biases = self._projections()
        q = self._first_queries(x, count, weights[0], biases[0])
        if self._keys_are_linear:
            logits = self._pulled_logits(q * attn.scale, x, weights[1], biases[1])
        else:
            k = self._split_heads(F.linear(x, weights[1], biases[1]))
            k = self._rotated(attn.k_norm(k), k.dtype)
            logits = self.logits(q, self._every_head(k))
        logits = self._masked(logits)
        shares = self._weights(logits if change is None else change(logits), x.dtype)
        mixed = (shares.flatten(1, 2) @ x).unflatten(1, shares.shape[1:3])
        heads = torch.einsum("bhrc,hdc->bhrd", mixed, self._by_head(weights[2]))
        if biases[2] is not None:  # the sum is 1, but for dropout
            heads = heads + shares.sum(-1, keepdim=True) * self._by_head(biases[2])[:, None]
        return heads, logits

    def leave(self, tokens: Tensor, heads: Tensor) -> Tensor:
        """What leaves the block, `[B, Q, dim]`.

        Args:
            tokens: that entered it. heads: their attention, `[B, heads, Q, d]`.
        """
        attended = chain(self._inner_norm, heads.transpose(1, 2).flatten(2))
        gate = getattr(self._attn, "gate", None)
        if gate is not None:
            attended = attended * gate(self.norm(tokens)).sigmoid()
        tokens = tokens + chain(self._project, attended)
        return tokens + chain(self._mlp, tokens)

    # What the kinds do differently.

    def _fused_projection(self, normed: Tensor) -> Tensor:
        return self._attn.qkv(normed)

    def _projections(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Weights of q, k and v, and their biases or None."""
        return _thirds(self._attn.qkv)

    @property
    def _keys_are_linear(self) -> bool:
        return isinstance(self._attn.k_norm, nn.Identity)

    def _first_queries(self, x: Tensor, count: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._attn.q_norm(self._split_heads(F.linear(x[:, :count], weight, bias)))

    def _rotated(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x

    def _masked(self, logits: Tensor) -> Tensor:
        return logits

    # What they share.

    def _pulled_logits(self, q: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        pulled = torch.einsum("bhrd,hdc->bhrc", q, self._by_head(weight)).flatten(1, 2)
        logits = (pulled @ x.transpose(1, 2)).unflatten(1, q.shape[1:3])
        if bias is not None:  # one number a row, which softmax ignores and the sigmoid does not
            logits = logits + (q * self._by_head(bias)[:, None]).sum(-1, keepdim=True)
        return logits

    def _head_dim(self) -> int:
        return self._attn.proj.in_features // self.num_heads

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self._head_dim())).transpose(1, 2)  # to [B, heads, N, d]

    def _by_head(self, weight: Tensor) -> Tensor:
        """A projection's rows `[heads * d, ...]` as `[heads, d, ...]`."""
        weight = weight.unflatten(0, (-1, self._head_dim()))
        groups = self.num_heads // len(weight)
        return weight if groups == 1 else weight.repeat_interleave(groups, dim=0)

    def _every_head(self, x: Tensor) -> Tensor:
        """Keys or values `[B, heads, N, d]`, of grouped queries as often as they are read."""
        groups = self.num_heads // x.shape[1]
        return x if groups == 1 else x.repeat_interleave(groups, dim=1)

    def _weights(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """softmax(logits); computed in float32, as saturated edits need its range."""
        wide = torch.float32 if logits.dtype in (torch.float16, torch.bfloat16) else None
        weights = chain(self._dropout, torch.softmax(logits, dim=-1, dtype=wide))
        return weights if weights.dtype == dtype else weights.to(dtype)


class RotaryBlock(PlainBlock):
    """The steps of timm's `EvaBlock`, with `EvaAttention` or `AttentionRope`.

    Args:
        rope: sines and cosines of the patches' positions, `[..., P, 2 d]`, None without. The first
            `num_prefix_tokens` tokens are not turned.
    """

    def __init__(self, block: nn.Module, rope: Tensor | None, bound: bool = False) -> None:
        super().__init__(block, bound)
        self._rope = rope

    @staticmethod
    def _layer_scales(block: nn.Module) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
        gammas = block.gamma_1, block.gamma_2
        return tuple(() if gamma is None else (partial(torch.mul, gamma),) for gamma in gammas)

    def _biases(self) -> Tensor | None:
        """Those of q, k and v where they stand beside a `qkv` without; None: there are none."""
        attn = self._attn
        if getattr(attn, "q_bias", None) is None:
            return None
        return torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))

    def _fused_projection(self, normed: Tensor) -> Tensor:
        attn, bias = self._attn, self._biases()
        if bias is None:
            return attn.qkv(normed)
        if getattr(attn, "qkv_bias_separate", False):
            return attn.qkv(normed) + bias
        return F.linear(normed, attn.qkv.weight, bias)

    def _projections(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        attn = self._attn
        if attn.qkv is None:
            layers = attn.q_proj, attn.k_proj, attn.v_proj
            return tuple(one.weight for one in layers), tuple(one.bias for one in layers)
        weights, biases = _thirds(attn.qkv)
        if (bias := self._biases()) is not None:
            biases = bias.chunk(3)
        return weights, biases

    @property
    def _keys_are_linear(self) -> bool:
        return self._rope is None and super()._keys_are_linear

    def _rotated(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        prefix = self._attn.num_prefix_tokens
        patches = x.shape[2] - prefix
        if self._rope is None or patches <= 0:
            return x
        half = getattr(self._attn, "rotate_half", False)
        turned = apply_rot_embed_cat(x[:, :, prefix:], self._rope[..., :patches, :], half=half)
        return torch.cat([x[:, :, :prefix], turned], dim=2).to(dtype)


class PoolingBlock(PlainBlock):
    """The steps of attention pooling, timm's `AttentionPoolLatent`, with the norm before it.

    Its query is learned and the same for every picture; its keys are those of all tokens, so its
    row has N logits as those of the other blocks have. Where timm leaves out the tokens in front
    of the patches, their logits are `HIDDEN`.

    Args:
        vit: whose `attn_pool` it is.
    """

    def __init__(self, vit: nn.Module, bound: bool = False) -> None:
        pool = vit.attn_pool
        layers = bind if bound else tuple
        self._attn = pool
        self.num_heads = pool.num_heads
        # timm's Eva pools every token, its VisionTransformer the patches unless told otherwise.
        everything = getattr(vit, "pool_include_prefix", True)
        self._left_out = 0 if everything else vit.num_prefix_tokens
        self._norm = layers((vit.norm,))
        self._dropout = ()
        self._project = layers((pool.proj, pool.proj_drop))
        self._mlp = () if pool.mlp is None else layers((pool.norm, pool.mlp))

    def queries_keys_values(self, normed: Tensor, queries: int | None = None) -> QKV:
        k, v = (self._split_heads(part) for part in self._attn.kv(normed).chunk(2, dim=-1))
        return self._query(len(normed)), self._attn.k_norm(k), v

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return self._masked(super().logits(q, k))

    def class_row(self, q: Tensor, k: Tensor) -> Tensor:
        return self._masked(super().class_row(q, k))

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = self._left_out
        return F.scaled_dot_product_attention(q, k[:, :, first:], v[:, :, first:])

    def leave(self, tokens: Tensor, heads: Tensor) -> Tensor:
        pooled = chain(self._project, heads.transpose(1, 2).flatten(2))
        return pooled + chain(self._mlp, pooled) if self._mlp else pooled

    def _query(self, batch: int) -> Tensor:
        pool = self._attn
        return pool.q_norm(self._split_heads(pool.q(pool.latent.expand(batch, -1, -1))))

    def _first_queries(self, x: Tensor, count: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._query(len(x))

    def _projections(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        kv = self._attn.kv
        biases = (None, None) if kv.bias is None else kv.bias.chunk(2)
        return (kv.weight, *kv.weight.chunk(2)), (None, *biases)

    def _head_dim(self) -> int:
        return self._attn.kv.out_features // 2 // self.num_heads

    def _masked(self, logits: Tensor) -> Tensor:
        if self._left_out == 0:
            return logits
        hidden = torch.full_like(logits[..., : self._left_out], HIDDEN)
        return torch.cat([hidden, logits[..., self._left_out :]], dim=-1)


def _thirds(layer: nn.Linear) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    biases = (None,) * 3 if layer.bias is None else layer.bias.chunk(3)
    return layer.weight.chunk(3), biases


def chain(layers: Iterable[Layer], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def bind(modules: Iterable[Layer]) -> tuple[Layer, ...]:
    """As functions, without those that do nothing in eval mode."""
    idle = nn.Identity | nn.Dropout | DropPath
    return tuple(_function(module) for module in modules if not isinstance(module, idle))


def _function(module: Layer) -> Layer:
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    if type(module) in (nn.LayerNorm, LayerNorm):
        shape, eps = module.normalized_shape, module.eps
        weight, bias = module.weight, module.bias
        return partial(F.layer_norm, normalized_shape=shape, weight=weight, bias=bias, eps=eps)
    if type(module) is nn.GELU:
        return partial(F.gelu, approximate=module.approximate)
    return module
