"""The same model for pictures of another size: maps finer, or coarser, than its own grid.

A ViT takes any number of patches. What is bound to its size are the positions, and timm resamples
them: learned ones as an image, rotary ones by computing them for the other grid. The scores are
then those of the model at that size. They differ from those at the size that it was trained with,
and more so the further away it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lib.edit import brief, is_index
from lib.model.vit import SigmoidViT


def at_size(model: SigmoidViT, image_size: int | Sequence[int]) -> SigmoidViT:
    """The same model for pictures of `image_size`; the given one stays as it is.

    Both have the very same weights: what one learns, the other knows. The copy's own are the
    position embedding and what the rotation is computed from, a few kilobytes; they are of now.
    So `model` has to be on its device, and in its dtype, before: to move or to convert one of the
    two later takes the common weights of the other along, and leaves the rest of it behind.

    Args:
        image_size: height and width in pixels, or one number for both; multiples of the patch.

    Returns:
        `model` itself at its own size; else another one, in the same mode.

    Raises:
        ValueError: the size is no multiple of the patch; names the nearest that are.
    """
    size = as_size(model, image_size)
    if size == own_size(model):
        return model
    # The copies of modules hold the same parameters, but for what is bound to the size: timm puts
    # another position embedding in the place of the old one, and overwrites buffers.
    shared = {id(parameter): parameter for parameter in model.vit.parameters()}
    with torch.no_grad():
        vit = copy.deepcopy(model.vit, shared)
        vit.set_input_size(img_size=size)
    other = SigmoidViT(vit, model.one_query).train(model.training)
    other.classes = model.classes
    return other


def own_size(model: SigmoidViT) -> tuple[int, int]:
    """Height and width in pixels that the model was made for."""
    return tuple(model.vit.patch_embed.img_size)


def size_for(model: SigmoidViT, grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels of the picture that has `grid` patches."""
    patch = model.vit.patch_embed.patch_size
    return grid[0] * patch[0], grid[1] * patch[1]


def as_size(model: SigmoidViT, image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of pictures that the model can be made for; ValueError for others."""
    size = (image_size, image_size) if is_index(image_size) else image_size
    patch = tuple(model.vit.patch_embed.patch_size)
    try:
        size = tuple(size)
    except TypeError:
        size = ()
    if len(size) != 2 or not all(map(is_index, size)) or min(size) < 1:
        raise ValueError(
            f"image_size is {brief(image_size)}; give height and width in pixels, "
            f"multiples of the model's patches of {patch[0]} x {patch[1]}"
        )
    size = int(size[0]), int(size[1])
    near = tuple(max(1, round(s / p)) * p for s, p in zip(size, patch, strict=True))
    if near != size:
        raise ValueError(
            f"pictures of {size[0]} x {size[1]} pixels cannot be cut into the model's patches of "
            f"{patch[0]} x {patch[1]}; use {near[0]} x {near[1]}"
        )
    return size


@dataclass(frozen=True)
class Cost:
    """What a picture costs at one size, beside the model's own."""

    grid: tuple[int, int]
    times: float  # as long as at the model's own size, computed from the number of operations
    megabytes: float  # that a `LiveImage` keeps


def cost_at(model: SigmoidViT, image_size: int | Sequence[int]) -> Cost:
    """What a picture of `image_size` costs, before anything is computed.

    With n tokens, every weight of the blocks is used n times, and the attention of a block costs
    as much as 3 n * n * width multiplications, of which 2 are made: that is what was measured on a
    CPU (ViT-S/14 from 16 x 16 to 64 x 64 cells: 5, 20 and 55 times as long for 4, 9 and 16 times
    the cells; 6, 19 and 50 are told). In a tiny model, calls take most of the time, and it is less.
    A `LiveImage` keeps the tokens, queries, keys and values of every block.

    Raises:
        ValueError: as `at_size`.
    """
    size, patch = as_size(model, image_size), model.vit.patch_embed.patch_size
    grid = size[0] // patch[0], size[1] // patch[1]
    width, depth = model.vit.embed_dim, len(model.vit.blocks)
    weights = sum(parameter.numel() for parameter in model.vit.blocks.parameters())

    def operations(grid: tuple[int, int]) -> int:
        n = model.num_prefix + grid[0] * grid[1]
        return n * weights + 3 * n * n * width * depth

    kept = 4 * (model.num_prefix + grid[0] * grid[1]) * width * depth
    bytes_each = next(model.parameters()).element_size()
    return Cost(grid, operations(grid) / operations(model.grid), kept * bytes_each / 1e6)
