"""Cached answers against the real model, and how little is run for them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from conftest import VITS, images_for, tiny_vit
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers import SwiGLU
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib.edit import AttentionEdit, edit_logits
from lib.model.live import LiveImage
from lib.model.mean_edit import edit_mean
from lib.model.vit import SigmoidViT

# Layers that VITS does not have; the head reads the class token through a norm of its own.
RARE = {
    "plain": {},
    "rare": {"scale_attn_norm": True, "scale_mlp_norm": True, "fc_norm": True},
    "swiglu": {"mlp_layer": SwiGLU, "act_layer": torch.nn.SiLU},
    "no_head": {"num_classes": 0},
}


@lru_cache
def live(kind: str) -> tuple[SigmoidViT, torch.Tensor, LiveImage]:
    """A model, a picture [1, 3, H, W], and its LiveImage, which all examples of a kind share."""
    if kind in VITS:
        model = SigmoidViT(tiny_vit(kind))
    else:
        model = SigmoidViT(tiny_vit("plain", **RARE[kind]))
    image = images_for(model, 1)
    return model, image, LiveImage(model, image[0])


SCOPES = st.fixed_dictionaries(
    {
        "blocks": st.sampled_from(["last", "last2", "all", (0,), (1,), (0, 2), (-1, 0), (0, 1)]),
        "heads": st.sampled_from(["all", "mean", (0,), (1, 3), (-1,)]),
        "queries": st.sampled_from(["cls", "all"]),
        "offset": st.sampled_from(["none", "centred"]),
        "strength": st.sampled_from([1.0, 1.0, 0.5]),
    }
)


def misfit(model: SigmoidViT, edit: AttentionEdit) -> str:
    """What an edit names that the model does not have, as a model of other heads or rows has not.

    A pattern of the sentence; "" where there is nothing.
    """
    layout, named = model.layout, edit.blocks if isinstance(edit.blocks, tuple) else ()
    if edit.queries == "cls" and not {one % layout.depth for one in named} <= {*layout.read}:
        return "without a class token it has no single row"
    found = set()
    for index in layout.resolve(edit.blocks, edit.queries):
        heads = layout.heads[index]
        if edit.mask.ndim == 3 and edit.mask.shape[1] not in (1, heads):
            found.add("mask is")
        if isinstance(edit.heads, tuple) and max(edit.heads) >= heads:
            found.add("is named, but the model has")
    return "|".join(found)  # whichever is seen first


VALUES = st.sampled_from([0.0, 1e-9, 0.02, 0.5, 0.9, 1 - 1e-9, 1.0, "random"])


def random_edit(
    model: SigmoidViT, value: float | str, seed: int, form: str = "grid", **scope: object
) -> AttentionEdit:
    generator = torch.Generator().manual_seed(seed)
    (gh, gw), heads = model.grid, model.num_heads
    shapes = {"grid": (gh, gw), "flat": (gh * gw,), "image": (1, gh * gw)}
    if scope.get("heads") != "mean":  # which has no cells for each head
        shapes["head"] = (1, heads, gh * gw)
    shape = shapes.get(form, (gh, gw))
    mask = torch.rand(shape, generator=generator) < 0.4
    values = torch.rand(shape, generator=generator) if value == "random" else value
    return AttentionEdit(mask, values, **scope)


def rows_after(
    model: SigmoidViT, rows: dict[int, torch.Tensor] | list[torch.Tensor], edit: AttentionEdit
) -> list[torch.Tensor]:
    """What SigmoidViT gives, rows before a block's own edit, brought behind it: [H, N] each."""
    for index in model.layout.resolve(edit.blocks, edit.queries):
        mask, values = edit.per_head(1, model.layout.heads[index], model.grid)
        if index not in model.layout.read:
            continue
        row, more = rows[index][:, :, None], (edit.offset, model.num_prefix, edit.strength)
        if edit.heads == "mean":
            rows[index] = edit_mean(row, mask[:, 0], values[:, 0], *more)[:, :, 0]
        else:
            rows[index] = edit_logits(row, mask, values, *more)[:, :, 0]
    return [rows[index][0] for index in model.layout.read]


def assert_close(ours: torch.Tensor, real: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == real.shape and ours.dtype == real.dtype
    assert (ours - real).abs().max() <= tolerance * real.abs().max().clamp(min=1)


def assert_kept(
    model: SigmoidViT, cached: LiveImage, edit: AttentionEdit, rows: Sequence[torch.Tensor]
) -> None:
    """The first edited row is that of `edit_logits`; what nobody changed keeps its bits."""
    first = model.layout.resolve(edit.blocks, edit.queries)[0]
    place = model.layout.read.index(first)
    expected = rows_after(model, [row[None] for row in cached.rows], edit)[place]
    # logit(v) + c near 0 is a difference of numbers of order 1: held to a bit of those, or what a
    # search for the mean ends with.
    assert torch.allclose(rows[first], expected, rtol=1e-6, atol=4e-6)
    kept = expected == cached.rows[first]
    assert torch.equal(rows[first][kept], expected[kept]) and kept[:, : model.num_prefix].all()


@settings(max_examples=30)
@given(
    scope=SCOPES,
    value=VALUES,
    seed=st.integers(0, 1000),
    form=st.sampled_from(["grid", "flat", "image", "head"]),
)
@pytest.mark.parametrize("kind", [*VITS, "rare", "swiglu"])
@torch.no_grad()
def test_any_edit_equals_the_real_model(kind, scope, value, seed, form):
    model, image, cached = live(kind)
    edit = random_edit(model, value, seed, form, **scope)
    assume(not edit.is_empty)  # which asks nothing of any block; there is a test of that
    if problem := misfit(model, edit):
        for run in (cached.run, lambda edit: model(image, edit=edit)):
            with pytest.raises(ValueError, match=problem):
                run(edit)
        return
    scores, rows = cached.run(edit)
    expected, before = model(image, edit=edit, rows="all")
    assert_close(scores, expected[0])
    after = rows_after(model, before, edit)
    assert [len(row) > 0 for row in rows] == [i in before for i in range(model.depth)]
    for ours, real in zip((rows[index] for index in before), after, strict=True):
        assert_close(ours, real)
        assert_close(ours.softmax(-1), real.softmax(-1))
    if edit.queries == "cls":
        assert_kept(model, cached, edit, rows)


@pytest.mark.parametrize("kind", [*VITS, *RARE])
@torch.no_grad()
def test_no_edit_is_the_unedited_model(kind):
    model, image, cached = live(kind)
    expected, rows = model(image, rows="all")
    assert_close(cached.scores, expected[0])
    for index, row in rows.items():
        assert_close(cached.rows[index], row[0])
    nothing = torch.zeros(model.grid, dtype=torch.bool)
    for edit in (None, AttentionEdit(nothing, 0.0), AttentionEdit(nothing, 0.0, blocks="all")):
        # An edit in between must leave nothing behind.
        cached.run(random_edit(model, 0.0, 1, blocks="all", queries="all"))
        scores, found = cached.run(edit)
        assert torch.equal(scores, cached.scores) and all(map(torch.equal, found, cached.rows))


@torch.no_grad()
def test_an_edit_is_in_the_rows_and_in_the_scores():
    """By hand: the last row of the answer, weighed and classified, is the answer's scores."""
    model, image, cached = live("plain")
    edit = random_edit(model, 0.7, 3, heads=(1,))
    scores, rows = cached.run(edit)
    changed = edit.mask.flatten()
    assert torch.allclose(rows[2][1, 1:][changed].sigmoid(), torch.tensor(0.7), atol=1e-6)
    kept = ~torch.stack([changed & (head == 1) for head in range(4)])
    assert torch.equal(rows[2][:, 1:][kept], cached.rows[2][:, 1:][kept])
    assert all(map(torch.equal, rows[:2], cached.rows[:2]))

    tokens, block = model.tokens(image, 2), model.vit.blocks[2]
    values = block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)[2][0]  # [N, dim]
    heads = values.unflatten(-1, (4, -1)).transpose(0, 1)  # [heads, N, d]
    mixed = (rows[2].softmax(-1)[:, None] @ heads).flatten()
    token = tokens[0, 0] + block.attn.proj(mixed)
    token = token + block.mlp(block.norm2(token))
    assert_close(scores, model.vit.head(model.vit.norm(token)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "distilled"])
@torch.no_grad()
def test_saturated_models_and_half_precision(kind, dtype):
    model = SigmoidViT(tiny_vit(kind))
    for block in model.vit.blocks:
        block.attn.scale = 20.0  # logits of plus or minus 40 and more
    model, image = model.to(dtype), images_for(model, 1)
    cached = LiveImage(model, image[0])  # float32: the picture follows the model
    assert torch.stack(cached.rows).abs().max() > 20 and cached.rows[0].dtype == dtype
    for seed, value in enumerate([0.0, 1e-9, 0.5, 1 - 1e-9, 1.0]):
        for blocks, queries in itertools.product(["last", "last2", "all"], ["cls", "all"]):
            edit = random_edit(model, value, seed, blocks=blocks, queries=queries)
            scores, rows = cached.run(edit)
            assert (
                torch.isfinite(scores).all() and torch.isfinite(torch.stack(rows).softmax(-1)).all()
            )
            if queries == "cls":
                assert_kept(model, cached, edit, rows)
            expected = model(image.to(dtype), edit=edit)[0]
            # Such a model takes the difference of two kernels far: not 1e-5 of float32.
            assert_close(scores, expected, max(1e-4, 20 * torch.finfo(dtype).eps))


@torch.no_grad()
def test_the_grid_is_that_of_the_picture():
    model = SigmoidViT(tiny_vit(dynamic_img_size=True))
    image = torch.randn(1, 3, 32, 80, generator=torch.Generator().manual_seed(0))
    cached = LiveImage(model, image[0])
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    edit = AttentionEdit(mask, 0.0, blocks="last2")
    assert [tuple(row.shape) for row in cached.rows] == 3 * [(4, 11)]
    assert_close(cached.run(edit)[0], model(image, edit=edit)[0])
    with pytest.raises(ValueError, match=r"mask is \[5, 2\]; the model has a grid of 2 x 5"):
        cached.run(AttentionEdit(mask.T, 0.0))
    with pytest.raises(ValueError, match="block 3 is named, but the model has 3 blocks"):
        cached.run(replace(edit, blocks=(3,)))
    with pytest.raises(ValueError, match="head 4 is named"):
        cached.run(replace(edit, heads=(4,)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_answers_of_a_gpu_come_back_to_the_cpu():
    model = SigmoidViT(tiny_vit()).cuda()
    image = images_for(model, 1)
    cached = LiveImage(model, image[0])
    for blocks, queries in itertools.product(["last", "last2", "all"], ["cls", "all"]):
        edit = random_edit(model, "random", 0, blocks=blocks, queries=queries)
        scores, rows = cached.run(edit)
        assert scores.device.type == rows[0].device.type == "cpu"
        assert_close(scores, model(image.cuda(), edit=edit)[0].cpu(), 1e-4)
        assert_close(cached.scores, model(image.cuda())[0].cpu(), 1e-4)


# ---------------------------------------------------------------------------------- what it costs

N, DIM, CLASSES = 17, 32, 5  # tokens, width and classes of the plain tiny model
TOKEN = 2 * 8 * DIM * DIM  # operations of a token in the MLP, ...
PROJECT = 2 * DIM * DIM  # ... in the projection, and in each of q, k and v
ROW = 2 * N * DIM  # of a row: its logits, or its attention to the values
HEAD = 2 * DIM * CLASSES
# The last block behind an edit: q, k, v of `changed` tokens, then one row through all of it.
FINISH = {changed: PROJECT * (2 * changed + 2) + TOKEN + 2 * ROW + HEAD for changed in (1, N)}
FULL_BLOCK = N * (4 * PROJECT + TOKEN + 2 * ROW) + ROW  # and the logits of the class row


@pytest.mark.parametrize(
    ("scope", "operations"),
    [
        ({"blocks": "last"}, ROW + PROJECT + TOKEN + HEAD),
        ({"blocks": "last", "queries": "all"}, ROW + PROJECT + TOKEN + HEAD),
        ({"blocks": (1,)}, ROW + PROJECT + TOKEN + FINISH[1]),
        # The last block is edited as well: its unedited row is not weighed.
        ({"blocks": "last2"}, ROW + PROJECT + TOKEN + FINISH[1]),
        # Block 1 computes q, k and v of one token, the rest of it for all.
        (
            {"blocks": (0,)},
            ROW + PROJECT + TOKEN + FULL_BLOCK - 3 * (N - 1) * PROJECT + FINISH[N],
        ),
        # q, k, v of block 1 are there; the logits of all rows take the place of fused attention.
        ({"blocks": (1,), "queries": "all"}, N * (2 * ROW + PROJECT + TOKEN) + FINISH[N]),
    ],
)
def test_only_what_an_edit_changes_is_computed(scope, operations):
    model, _, cached = live("plain")
    edit = random_edit(model, 0.3, 0, **scope)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # fused attention is not counted on a CPU
        cached.run(edit)
    assert counter.get_total_flops() == operations
