"""A model at another picture size: the same weights, other positions, and timm's own scores."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from conftest import VITS, images_for, tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed

from lib.model.live import LiveImage
from lib.model.resolution import as_size, at_size, cost_at, own_size, size_for
from lib.model.vit import SigmoidViT

PATCHES = st.integers(1, 6)


def resampled(vit: torch.nn.Module, made: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The position embedding as timm resamples it when it loads weights, from a known grid."""
    if vit.pos_embed is None:
        return {}
    grids = made.patch_embed.grid_size, vit.patch_embed.grid_size
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    return {"pos_embed": resample_abs_pos_embed(vit.pos_embed, *grids, prefix)}


@torch.no_grad()
def test_at_its_own_size_it_is_the_very_model(any_model):
    assert at_size(any_model, own_size(any_model)) is any_model


@torch.no_grad()
@pytest.mark.parametrize("kind", list(VITS))
def test_it_is_timms_model_of_that_size_with_these_weights(kind):
    """timm resamples the weights when a model is made for another size, here twice the side."""
    model = SigmoidViT(tiny_vit(kind))
    size = tuple(2 * side for side in own_size(model))
    other = at_size(model, size)
    made = tiny_vit(kind, seed=1, img_size=size)
    made.load_state_dict(model.vit.state_dict() | resampled(model.vit, made))
    images = images_for(other)
    assert torch.equal(other.vit(images), made(images)) and other.layout == model.layout
    scores, rows = other(images, rows="all")
    assert torch.allclose(scores, made(images), atol=1e-5)
    expected = SigmoidViT(made)(images, rows="all")[1]
    assert all(torch.equal(rows[block], expected[block]) for block in expected)
    assert other.grid == tuple(2 * side for side in model.grid)
    assert rows[other.depth - 1].shape[-1] == other.num_prefix + 4 * model.grid[0] * model.grid[1]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "registers", "rotary", "eva", "mixed", "two_kinds"])
def test_a_dynamic_model_gives_the_same_at_that_size(kind):
    model = SigmoidViT(tiny_vit(kind, dynamic_img_size=True))
    grid = model.grid
    size = size_for(model, (5, 7))
    images, other = torch.randn(2, 3, *size), at_size(model, size)
    assert torch.equal(other.vit(images), model.vit(images))
    assert torch.allclose(other(images), model.vit(images), atol=1e-5)
    assert model.grid == grid and other.grid == (5, 7)


def test_a_model_for_one_size_says_how_to_have_it_for_another(model):
    with pytest.raises(ValueError, match=r"made for 64 x 64; use .*at_size\(model, \(96, 128\)\)"):
        model(torch.zeros(1, 3, 96, 128))
    with pytest.raises(ValueError, match="images have 96 x 128 pixels"):
        LiveImage(model, torch.zeros(3, 96, 128))


@torch.no_grad()
def test_the_given_model_stays_as_it_is_and_shares_its_weights(any_model):
    images = images_for(any_model)
    before = any_model(images), copy.deepcopy(any_model.vit.state_dict()), any_model.grid
    any_model.classes = ["a", "b", "c", "d", "e"]
    other = at_size(any_model, tuple(2 * side for side in own_size(any_model)))
    assert other.classes == any_model.classes and other.training == any_model.training
    assert torch.equal(any_model(images), before[0]) and any_model.grid == before[2]
    after = any_model.vit.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before[1].items())
    own = dict(any_model.vit.named_parameters())
    apart = {name for name, value in other.vit.named_parameters() if value is not own[name]}
    assert apart == ({"pos_embed"} if any_model.vit.pos_embed is not None else set())
    large = images_for(other)
    scores = other(large)
    any_model.vit.head.bias += 1  # what one learns, the other knows
    assert (other(large) > scores + 0.4).all()


@given(PATCHES, PATCHES)
def test_any_multiple_of_the_patch_is_a_size(rows, columns):
    model = SigmoidViT(tiny_vit("registers"))  # patches of 14
    size = size_for(model, (rows, columns))
    assert as_size(model, size) == size and as_size(model, list(size)) == size
    assert cost_at(model, size).grid == (rows, columns)
    with torch.no_grad():
        live = LiveImage(at_size(model, size), torch.zeros(3, *size))
    assert live.rows[-1].shape == (4, model.num_prefix + rows * columns)


@given(st.integers(1, 200), st.integers(1, 200))
def test_any_other_size_is_one_sentence_with_one_that_is(height, width):
    model = SigmoidViT(tiny_vit())  # patches of 16
    if height % 16 == 0 == width % 16:
        return
    with pytest.raises(ValueError, match=f"{height} x {width} pixels cannot be cut") as error:
        at_size(model, (height, width))
    near = str(error.value).rpartition("use ")[2].split(" x ")
    assert as_size(model, [int(side) for side in near])
    assert abs(int(near[0]) - height) <= 16 and abs(int(near[1]) - width) <= 16


@pytest.mark.parametrize("size", [0, -16, (16,), (16, 16, 16), 16.0, "large", None, (16, True)])
def test_what_is_no_size_is_refused(model, size):
    with pytest.raises(ValueError, match=r"image_size is .*; give height and width in pixels"):
        at_size(model, size)


def test_the_cost_is_said_before_it_is_paid(model):
    assert cost_at(model, 64).times == 1
    assert as_size(model, 128) == (128, 128)
    costs = [cost_at(model, size) for size in (64, 128, 256, 512)]
    assert [one.grid for one in costs] == [(4, 4), (8, 8), (16, 16), (32, 32)]
    shares = [later.times / before.times for before, later in itertools.pairwise(costs)]
    assert 3 < shares[0] < shares[1] < shares[2] < 16  # more than the cells in the end
    live = LiveImage(at_size(model.eval(), 128), torch.zeros(3, 128, 128))
    kept = (x for one in live._kept for x in (one.tokens, one.q, one.k, one.v))
    measured = sum(x.numel() * x.element_size() for x in kept) / 1e6
    assert measured < cost_at(model, 128).megabytes < 1.5 * measured
