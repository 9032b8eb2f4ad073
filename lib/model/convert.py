"""Checkpoints of other libraries in timm's names; by names alone, so that none of them is needed.

Hugging Face transformers (ViT, DeiT, DINOv2, DINOv3, the image towers of CLIP and SigLIP, names of
its versions 4 and 5), torchvision, and open_clip. What timm converts itself (OpenAI's CLIP, Meta's
DINOv2, DINOv3 and PE, EVA, BEiT-3, RADIO), and every resampling of embeddings, is left to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as eva_filter
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import Tensor, nn

TRANSFORMERS = "Hugging Face transformers"

_RULES = {
    TRANSFORMERS: (
        (r"^embeddings\.(?:cls_token|class_embedding)$", "cls_token"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.position_embeddings?(?:\.weight)?$", "pos_embed"),
        (r"^embeddings\.patch_embeddings?\.(?:projection\.)?", "patch_embed.proj."),
        (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
        (r"(?<=\d\.)(?:layernorm_before|layer_norm1)\.", "norm1."),
        (r"(?<=\d\.)(?:layernorm_after|layer_norm2)\.", "norm2."),
        (r"(?<=\d\.)layer_scale([12])\.lambda1$", r"ls\1.gamma"),
        (r"(?<=\d\.)(?:self_attn|attention\.attention)\.", "attention."),
        (r"(?<=\d\.)attention\.([qkv])(?:_proj|uery|ey|alue)\.", r"attn.\1."),
        (r"(?<=\d\.)attention\.(?:output\.dense|o_proj|out_proj)\.", "attn.proj."),
        (r"(?<=\d\.)(?:intermediate\.dense|mlp\.weights_in)\.", "mlp.fc1."),
        (r"(?<=\d\.)(?:output\.dense|mlp\.weights_out|mlp\.down_proj)\.", "mlp.fc2."),
        (r"(?<=\d\.)mlp\.gate_proj\.", "mlp.fc1_g."),
        (r"(?<=\d\.)mlp\.up_proj\.", "mlp.fc1_x."),
        (r"^(?:post_)?layernorm\.", "norm."),
        (r"^pre_layrnorm\.", "norm_pre."),  # its own spelling
        (r"^head\.probe$", "attn_pool.latent"),
        (r"^head\.attention\.in_proj_", "attn_pool.qkv."),
        (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
        (r"^head\.layernorm\.", "attn_pool.norm."),
        (r"^head\.mlp\.", "attn_pool.mlp."),
    ),
    "torchvision": (
        (r"^class_token$", "cls_token"),
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"(?<=\d\.)ln_([12])\.", r"norm\1."),
        (r"(?<=\d\.)self_attention\.in_proj_", "attn.qkv."),
        (r"(?<=\d\.)self_attention\.out_proj\.", "attn.proj."),
        (r"(?<=\d\.)mlp\.(?:0|linear_1)\.", "mlp.fc1."),
        (r"(?<=\d\.)mlp\.(?:3|linear_2)\.", "mlp.fc2."),
        (r"^encoder\.ln\.", "norm."),
        (r"^heads\.head\.", "head."),
    ),
}

# Heads that stand beside the tower, not in it. CLIP and SigLIP of transformers have a classifier
# of the patches' average, which is not what timm's head reads: it keeps its name and is not used.
_HEADS_BESIDE = {
    "classifier.": "head.",
    "cls_classifier.": "head.",
    "distillation_classifier.": "head_dist.",
    "visual_projection.": "head.",
}

# LayerNorm's epsilon of transformers' families, by a part of a name that the others have not.
_EPSILONS = {
    "layernorm_before.": 1e-12,  # ViT, DeiT
    "pre_layrnorm.": 1e-5,  # CLIP
    "head.probe": 1e-6,  # SigLIP
    "embeddings.position_embeddings": 1e-6,  # DINOv2; after ViT
    "embeddings.register_tokens": 1e-5,  # DINOv3; after DINOv2
}


def _whose(state: Mapping[str, Tensor], around: Mapping[str, Tensor], prefix: str) -> str:
    """Who names tensors so, where that is not timm; "" for what is left to timm."""
    if any(name.startswith("embeddings.patch_embedding") for name in state):
        return TRANSFORMERS
    if "conv_proj.weight" in state:
        return "torchvision"
    towers = ("visual.ln_pre.weight", "visual.class_embedding", "ln_pre.weight")
    if prefix.endswith("visual.trunk.") or any(name in state for name in towers):
        return "open_clip"
    return "open_clip" if prefix.endswith("trunk.") and "head.proj.weight" in around else ""


def in_timms_names(
    state: dict[str, Tensor], tensors: Mapping[str, Tensor], prefix: str, vit: nn.Module
) -> tuple[dict[str, Tensor], str]:
    """The tensors of one tower in names that timm, or its own conversion, knows.

    Args:
        state: the tower's, without the prefix; may be changed. tensors: the whole file's.
        prefix: of the tower in the file; its head may stand beside it. vit: what they are for.

    Returns:
        the tensors; whose names they had, "" for timm's and what is left to timm.
    """
    parent = prefix[: prefix.rstrip(".").rfind(".") + 1]
    around = {k.removeprefix(parent): v for k, v in tensors.items() if k.startswith(parent)}
    whose = _whose(state, around, prefix)
    if whose == "open_clip":
        if "ln_pre.weight" in state:  # the tower alone; timm knows it below `visual.`
            return {f"visual.{name}": value for name, value in state.items()}, whose
        if prefix.endswith("trunk."):  # of timm, with a projection beside it
            heads = [name for name in around if name.startswith("head.")]
            state |= {re.sub(r"^head\.proj\.", "head.", name): around[name] for name in heads}
        return _with_bias_of_head(state, vit), whose
    if not whose:
        return state, whose
    named = {}
    for name, value in state.items():
        for pattern, ours in _RULES[whose]:
            name = re.sub(pattern, ours, name)
        named[name] = value
    if whose == TRANSFORMERS:
        _add_heads(named, around, state)
        _reshape(named, vit)
    return _with_bias_of_head(_like_own_blocks(named, vit.state_dict()), vit), whose


def _add_heads(
    named: dict[str, Tensor], around: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    averaged = any(name.startswith("embeddings.patch_embedding.") for name in state)
    for theirs, ours in _HEADS_BESIDE.items():
        for name in [name for name in around if name.startswith(theirs)]:
            named.pop(name, None)
            kept = theirs == "classifier." and averaged
            named[name if kept else ours + name.removeprefix(theirs)] = around[name]


def _reshape(named: dict[str, Tensor], vit: nn.Module) -> None:
    """Shapes of transformers to timm's, and what timm keeps elsewhere."""
    named.pop("embeddings.mask_token", None)  # of the pretraining
    for name in ("cls_token", "pos_embed"):
        if name in named:
            named[name] = named[name].reshape(1, -1, named[name].shape[-1])
    if "reg_token" in named:
        if not named["reg_token"].numel():
            del named["reg_token"]
        elif {"pos_embed", "cls_token"} <= named.keys() and getattr(vit, "no_embed_class", False):
            # DINOv2: timm's model adds no position to the class token, so it must be in it.
            named["cls_token"] = named["cls_token"] + named["pos_embed"][:, :1]
            named["pos_embed"] = named["pos_embed"][:, 1:]
    kernel = named.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 2:  # SigLIP2 of variable size: pixels, then colours
        side = math.isqrt(kernel.shape[1] // 3)
        kernel = kernel.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2).contiguous()
        named["patch_embed.proj.weight"] = kernel
    for kind in ("weight", "bias"):
        if (whole := named.pop(f"attn_pool.qkv.{kind}", None)) is not None:
            width = len(whole) // 3
            named[f"attn_pool.q.{kind}"] = whole[:width]
            named[f"attn_pool.kv.{kind}"] = whole[width:]


def _like_own_blocks(named: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer scale, gated MLPs and attention of every block in the form that the model has."""
    places = {name.removeprefix("blocks.0.") for name in own if name.startswith("blocks.0.")}
    whole: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, value in named.items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            blocks.setdefault(number, {})[rest] = value
        else:
            whole[name] = value
    for number, block in blocks.items():
        if "gamma_1" in places:
            block = {re.sub(r"^ls([12])\.gamma$", r"gamma_\1", k): v for k, v in block.items()}
        for kind in ("weight", "bias"):
            # Without a gate there is the second alone.
            names = [one for one in (f"mlp.fc1_g.{kind}", f"mlp.fc1_x.{kind}") if one in block]
            if names and f"mlp.fc1.{kind}" in places:
                block[f"mlp.fc1.{kind}"] = torch.cat([block.pop(one) for one in names])
        if all(f"attn.{one}.weight" in block for one in "qkv"):
            block = _like_own_attention(block, places)
        whole |= {f"blocks.{number}.{rest}": value for rest, value in block.items()}
    return whole


def _like_own_attention(block: dict[str, Tensor], places: set[str]) -> dict[str, Tensor]:
    """Queries, keys and values, which are apart in `block`, in the form that the model has.

    A bias for which the model has no place is left out where it is zero, as timm does with those of
    DINOv3. Else it gets a name that the model has not, and is refused.
    """
    weights = [block.pop(f"attn.{one}.weight") for one in "qkv"]
    biases = [block.pop(f"attn.{one}.bias", None) for one in "qkv"]
    form = "attn.{}_bias"
    if "attn.q_proj.weight" in places:
        form = "attn.{}_proj.bias"
        block |= {f"attn.{one}_proj.weight": w for one, w in zip("qkv", weights, strict=True)}
    else:
        block["attn.qkv.weight"] = torch.cat(weights)
    if "attn.qkv.bias" in places:
        pairs = zip(biases, weights, strict=True)
        block["attn.qkv.bias"] = torch.cat(
            [weight.new_zeros(len(weight)) if bias is None else bias for bias, weight in pairs]
        )
        return block
    for one, bias in zip("qkv", biases, strict=True):
        if bias is not None and (form.format(one) in places or bias.any()):
            block[form.format(one)] = bias
    return block


def _with_bias_of_head(named: dict[str, Tensor], vit: nn.Module) -> dict[str, Tensor]:
    """A projection to the space of texts has no bias; timm's head may have one."""
    weight = named.get("head.weight")
    if weight is not None and "head.bias" not in named and "head.bias" in vit.state_dict():
        named["head.bias"] = weight.new_zeros(len(weight))
    return named


def differences_told(state: Mapping[str, Tensor], vit: nn.Module) -> list[str]:
    """What transformers computes otherwise than this model, though the weights are the same.

    Args:
        state: in the names of transformers.
    """
    told, eps = [], getattr(vit.norm, "eps", None)
    theirs = [e for part, e in _EPSILONS.items() if any(part in name for name in state)]
    if theirs and eps is not None and not math.isclose(eps, theirs[0], rel_tol=1e-3):
        told.append(
            f"the usual epsilon of such weights is {theirs[0]:g} (layer_norm_eps in their "
            f"config.json), this model's is {eps:g}: norm_eps={theirs[0]:g} makes the scores equal"
        )
    names = {"gelu_tanh": "head.probe" in state, "quick_gelu": "pre_layrnorm.weight" in state}
    exact = any(  # PyTorch's, or timm's class of that name
        type(one).__name__ == "GELU" and getattr(one, "approximate", "none") == "none"
        for one in vit.modules()
    )
    for name in [name for name, is_theirs in names.items() if is_theirs and exact]:
        told.append(
            f"the usual activation of such weights is {name} (hidden_act in their config.json), "
            f'this model\'s is GELU: act_layer="{name}" makes the scores equal'
        )
    return told


def fit_embeddings(
    state: Mapping[str, Tensor], grid: tuple[int, int] | None, vit: nn.Module
) -> dict[str, Tensor]:
    """The state in timm's names, its embeddings resampled from `grid` to the model's grid."""
    # As timm itself does: these two families were trained on embeddings resized in this way.
    name = getattr(vit, "pretrained_cfg", {}).get("architecture") or ""
    coarse = "flexi" in name or "radio" in name
    how = {"interpolation": "bilinear", "antialias": False} if coarse else {}
    state = dict(state)  # timm's conversions take entries out
    # Where the grid is known, timm must not guess: it takes 7 x 28 patches for 14 x 14.
    position = state.pop("pos_embed", None) if grid else None
    if isinstance(vit, Eva):
        fitted = _by_eva(state, vit, **how)
    else:  # adapt_layer_scale: DeiT III files have another name for layer scale
        fitted = vit_filter(state, vit, adapt_layer_scale=True, **how)
    if position is None:
        return fitted
    if grid != vit.patch_embed.grid_size:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        position = resample_abs_pos_embed(position, vit.patch_embed.grid_size, grid, prefix, **how)
    return {**fitted, "pos_embed": position}


def _by_eva(state: dict[str, Tensor], vit: nn.Module, **how: object) -> dict[str, Tensor]:
    """timm's conversion for its class Eva, without two things that it does.

    With a mask token it takes the last norm for one of the patches' average. Biases of DINOv3 for
    which the model has no place it drops, whatever they are: here only zero ones.
    """
    for name in ("mask_token", "lm_head.weight", "lm_head.bias"):
        state.pop(name, None)
    left = {}
    if "storage_tokens" in state and "blocks.0.attn.q_bias" not in vit.state_dict():
        for name in [name for name in state if name.endswith("attn.qkv.bias")]:
            bias = state.pop(name)
            queries, _, values = bias.chunk(3)  # that of the keys is masked
            if queries.any() or values.any():
                left[name] = bias
    return {**eva_filter(state, vit, **how), **left}
