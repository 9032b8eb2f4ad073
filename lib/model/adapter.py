"""timm's ViTs as wholes: what comes before and behind the blocks, and which of them are refused.

With `block`, the only code that knows timm's insides. Models are known by the attributes that are
used, not by their types; and `refuse_unsupported` computes a few tokens both ways: another class
that does the same is welcome, one that does something else is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lib.model.block import Layer, PlainBlock, PoolingBlock, RotaryBlock, bind, chain

Ropes = Sequence[Tensor | None]  # of every block: sines and cosines of the patches' positions

_WINDOWS = "attends within windows, in stages of falling resolution"

# Why a class of timm's is refused, where the attribute that is missing would not tell.
_OTHERWISE = {
    "AttentionPoolPrr": "is no query that pools the tokens, but attention among them",
    "Beit": "adds relative positions to its logits",
    "Cait": "mixes what its heads see, and gives the class token blocks of its own",
    "DiffAttention": "subtracts two softmaxes, so that no row is a distribution",
    "DiffParallelScalingBlock": "subtracts two softmaxes, so that no row is a distribution",
    "EvaBlockPostNorm": "has its norms behind attention and MLP",
    "Hiera": _WINDOWS,
    "HieraDet": _WINDOWS,
    "NaFlexVit": "takes lists of patches in place of pictures of one size",
    "ParallelScalingBlock": "computes attention and MLP beside each other from one projection",
    "ParallelThingsBlock": "has several attentions beside each other",
    "ResPostBlock": "has its norms behind attention and MLP",
    "SwinTransformer": _WINDOWS,
    "SwinTransformerV2": _WINDOWS,
    "SwinTransformerV2Cr": _WINDOWS,
    "VisionTransformerRelPos": "adds relative positions to its logits",
    "VisionTransformerSAM": "attends within windows, and has no class token",
}
_ANOTHER = "use a model of a supported family (python -m lib models lists them)"
_USED = {
    "model": (
        *("patch_embed", "_pos_embed", "norm_pre", "blocks", "norm", "fc_norm", "head_drop"),
        *("head", "forward_head", "global_pool", "num_prefix_tokens", "cls_token", "patch_drop"),
        *("embed_dim", "dynamic_img_size", "grad_checkpointing"),
    ),
    "block": ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"),
    "attention": (
        *("num_heads", "scale", "qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj"),
        "proj_drop",
    ),
    "pooling": (
        *("num_heads", "scale", "latent", "q", "kv", "q_norm", "k_norm", "proj", "proj_drop"),
        *("norm", "mlp", "pos_embed"),
    ),
}


class UnsupportedModelError(ValueError):
    """The model's prediction is not decided by rows that this project can edit."""


def take_apart(
    vit: nn.Module, index: int, rope: Tensor | None = None, bound: bool = False
) -> PlainBlock:
    """The steps of one block of a model that `refuse_unsupported` let pass.

    Args:
        index: 0 to the number of `vit.blocks`, which is the pooling by attention if there is one.
        rope: of this block, see `embed`. bound: see `PlainBlock`.
    """
    if index == len(vit.blocks):
        return PoolingBlock(vit, bound)
    block = vit.blocks[index]
    return RotaryBlock(block, rope, bound) if _is_rotary(block) else PlainBlock(block, bound)


def _is_rotary(block: nn.Module) -> bool:
    return hasattr(block, "gamma_1")


def run_block(vit: nn.Module, index: int, tokens: Tensor, rope: Tensor | None) -> Tensor:
    """One block of `vit.blocks` as timm runs it, `[B, N, dim]` to the same."""
    block = vit.blocks[index]
    return block(tokens) if rope is None else block(tokens, rope=rope)


def embed(vit: nn.Module, images: Tensor) -> tuple[Tensor, Ropes]:
    """Images `[B, 3, H, W]` to the tokens `[B, N, dim]` that enter block 0.

    Returns:
        tokens; the rotary positions of every block, None where a block has none.

    Raises:
        ValueError: the images have another size than the model is made for.
    """
    size, own = tuple(images.shape[-2:]), tuple(vit.patch_embed.img_size)
    if size != own and not vit.dynamic_img_size:
        raise ValueError(
            f"the images have {size[0]} x {size[1]} pixels, but the model is made for {own[0]} x "
            f"{own[1]}; use lib.model.resolution.at_size(model, ({size[0]}, {size[1]})) for them"
        )
    tokens, rope = vit._pos_embed(vit.patch_embed(images)), None
    if isinstance(tokens, tuple):
        tokens, rope = tokens
    return vit.norm_pre(tokens), _of_blocks(vit, rope)


def rotary_positions(vit: nn.Module, grid: tuple[int, int]) -> Ropes:
    """Those that `embed` gives for images of so many patches."""
    rope = getattr(vit, "rope", None)
    if rope is None:
        return _of_blocks(vit, None)
    is_kept = hasattr(rope, "feat_shape") and not vit.dynamic_img_size
    return _of_blocks(vit, rope.get_embed() if is_kept else rope.get_embed(shape=list(grid)))


def _of_blocks(vit: nn.Module, rope: Tensor | None) -> Ropes:
    if rope is not None and getattr(vit, "rope_mixed", False):
        return [*rope, None]  # one a block; None for the pooling
    return [rope] * len(vit.blocks) + [None]


def is_pooled(vit: nn.Module) -> bool:
    """Whether the tokens are pooled by attention: one more block, the last."""
    return getattr(vit, "attn_pool", None) is not None


def count_read(vit: nn.Module) -> int:
    """How many tokens, from the first on, can be read as class rows: 0 without a class token.

    The head of the distilled model averages a second one's opinion.
    """
    return 2 if hasattr(vit, "head_dist") else int(vit.cls_token is not None)


def learned_parts(vit: nn.Module, blocks: int) -> list[nn.Module]:
    """The last `blocks` blocks, the pooling counted, with the norms behind them and the heads."""
    heads = [vit.head, *([vit.head_dist] if hasattr(vit, "head_dist") else [])]
    if blocks == 0:
        return heads
    pool = [vit.attn_pool] if is_pooled(vit) else []
    trunk = len(vit.blocks) - (blocks - len(pool))
    return [*vit.blocks[trunk:], vit.norm, *pool, vit.fc_norm, *heads]


def learned_rotations(vit: nn.Module) -> list[nn.Parameter]:
    """Frequencies of rotary positions that are learned (RoPE-mixed): of all blocks in one."""
    rope = getattr(vit, "rope", None)
    return [] if rope is None else list(rope.parameters())


def classify(vit: nn.Module, tokens: Tensor) -> Tensor:
    """From the tokens that leave the last block, the first ones at least, to class scores."""
    if is_pooled(vit):
        return vit.head(vit.head_drop(vit.fc_norm(tokens[:, 0])))
    return vit.forward_head(vit.norm(tokens))


def bound_classify(vit: nn.Module) -> Layer:
    """`classify` with the weights of now, for a model in eval mode."""
    if count_read(vit) > 1:
        return partial(classify, vit)
    norm = () if is_pooled(vit) else (vit.norm,)
    layers = bind((*norm, vit.fc_norm, vit.head_drop, vit.head))
    return lambda tokens: chain(layers, tokens[:, 0])


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Modes and `requires_grad` flags are afterwards what they are now."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def refuse_unsupported(vit: nn.Module) -> None:
    """Raises UnsupportedModelError, which names what decides the model's prediction otherwise."""
    name = type(vit).__name__
    _refuse_known(vit, f"this {name}")
    _refuse_without(vit, "model", f"this {name}")
    for block in vit.blocks:
        _refuse_block(block, name)
    pool = getattr(vit, "attn_pool", None)
    _refuse_known(pool, f"{type(pool).__name__} of this {name}")
    if vit.global_pool not in ("token", "map"):
        raise UnsupportedModelError(_pools_otherwise(vit))
    if not isinstance(vit.patch_drop, nn.Identity | None):
        raise UnsupportedModelError(
            f"this {name} drops patches (patch_drop_rate > 0), so a row no longer matches the "
            "patch grid; create it with patch_drop_rate=0"
        )
    if is_pooled(vit):
        _refuse_without(pool, "pooling", f"{type(pool).__name__} of this {name}")
        if pool.latent.shape[1] != 1 or pool.pos_embed is not None:
            raise UnsupportedModelError(
                f"{type(pool).__name__} of this {name} has {pool.latent.shape[1]} queries or "
                f"positions of its own, so no single row decides; {_ANOTHER}"
            )
    _refuse_other_results(vit)


def _pools_otherwise(vit: nn.Module) -> str:
    said = f'this {type(vit).__name__} pools its tokens with global_pool="{vit.global_pool}", so '
    said += "no single row decides; "
    if vit.cls_token is None:
        return f"{said}it has no class token, so {_ANOTHER}"
    return (
        f"{said}where its weights were trained with the class token, create it with "
        'global_pool="token" (python -m lib models says for which that holds)'
    )


def _refuse_block(block: nn.Module, name: str) -> None:
    kind = f"{type(block).__name__} of this {name}"
    inside = f"{type(getattr(block, 'attn', block)).__name__} in {kind}"
    _refuse_known(block, kind)
    _refuse_known(getattr(block, "attn", None), inside)
    _refuse_without(block, "block", kind)
    scales = ("gamma_1", "gamma_2") if _is_rotary(block) else ("ls1", "ls2")
    _refuse_without(block, scales, kind)
    _refuse_without(block.attn, "attention", inside)
    if _is_rotary(block):
        _refuse_without(block.attn, ("num_prefix_tokens",), inside)
    if block.attn.qkv is None:
        _refuse_without(block.attn, ("q_proj", "k_proj", "v_proj"), inside)


def _refuse_known(module: nn.Module | None, what: str) -> None:
    if why := _OTHERWISE.get(type(module).__name__):
        raise UnsupportedModelError(f"{what} {why}, which is not supported; {_ANOTHER}")


def _refuse_without(module: nn.Module, used: str | Sequence[str], what: str) -> None:
    for attribute in _USED[used] if isinstance(used, str) else used:
        if not hasattr(module, attribute):
            raise UnsupportedModelError(
                f"{what} has no attribute {attribute}, which is needed to take it apart: it is "
                "another kind of model, or this version of timm names it otherwise; "
                f"{_ANOTHER}, or install a timm that this project was tested with"
            )


@torch.no_grad()
def _refuse_other_results(vit: nn.Module) -> None:
    """Computes a few tokens with the first block of each kind, and the pooling, both ways.

    A class that has the attributes and does something else with them is found here. It takes some
    ten milliseconds.
    """
    own = next(vit.blocks.parameters())
    if own.is_meta or own.dtype not in (torch.float32, torch.float64):
        return  # no numbers, or none that are exact enough
    few = vit.num_prefix_tokens + min(4, vit.patch_embed.num_patches)
    tokens = torch.arange(few * vit.embed_dim, device=own.device, dtype=own.dtype)
    # Small: what a block adds is seen beside them, where layer scale is still 1e-5.
    tokens = 0.02 * tokens.sin().view(1, few, vit.embed_dim)
    with restoring(vit):
        vit.eval()
        ropes = rotary_positions(vit, tuple(vit.patch_embed.grid_size))
        first_of_kind = {_code_of(block): i for i, block in reversed([*enumerate(vit.blocks)])}
        for index in first_of_kind.values():
            _refuse_unequal(vit, index, tokens, ropes[index])
        if is_pooled(vit):
            _refuse_unequal(vit, len(vit.blocks), tokens, None)


def _code_of(block: nn.Module) -> tuple[object, ...]:
    """What is the same in blocks that compute the same way."""
    attn = block.attn
    return type(block), type(attn), type(block.mlp), getattr(attn, "num_kv_heads", None)


def _refuse_unequal(vit: nn.Module, index: int, tokens: Tensor, rope: Tensor | None) -> None:
    rope = None if rope is None else rope[..., : tokens.shape[1] - vit.num_prefix_tokens, :]
    parts = take_apart(vit, index, rope)
    normed = parts.norm(tokens)
    ours = [parts.leave(tokens, parts.fused(*parts.queries_keys_values(normed)))]
    if index == len(vit.blocks):
        module, theirs, entered = vit.attn_pool, vit.pool(vit.norm(tokens))[:, None], 0
    else:
        module, theirs, entered = vit.blocks[index], run_block(vit, index, tokens, rope), tokens
    if index == len(vit.blocks) or vit.num_prefix_tokens:
        ours.append(parts.leave(tokens[:, :1], parts.read(normed, 1)[0]))
    added = (theirs - entered).norm()
    for result in ours:
        if (result - theirs[:, : result.shape[1]]).norm() > 0.01 * added:
            raise UnsupportedModelError(
                f"{type(module).__name__} of this {type(vit).__name__} computes something else "
                f"than the attention that this project knows; {_ANOTHER}"
            )
