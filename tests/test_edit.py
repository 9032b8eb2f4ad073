"""The mathematics of an edit, on tensors, and what an edit may be."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.edit import (
    EPS,
    AttentionEdit,
    edit_logits,
    resolve_blocks,
    resolve_heads,
    row_offset,
    sigmoid_attention,
)

MASK = np.array([[True, False, False], [False, False, True]])
VALUES = np.array([[0.25, 0, 0], [0, 0, 1]], np.float32)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OFFSETS = ["none", "centred"]


def random_case(seed: int, scale: float, prefix: int = 1, patches: int = 7):
    """Logits [2, 3, 2, N], mask and values [2, 3, P]."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 2, prefix + patches, generator=g) * scale
    mask = torch.rand(2, 3, patches, generator=g) < 0.5
    return logits, mask, torch.rand(2, 3, patches, generator=g)


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 1.0, 5.0, 40.0]))
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cells_that_nobody_edited_keep_their_bits(dtype, offset, seed, scale):
    logits, mask, values = random_case(seed, scale, prefix=2)
    logits = logits.to(dtype)
    edited = edit_logits(logits, mask, values, offset, num_prefix=2)
    assert edited.dtype == dtype
    kept = torch.cat([torch.ones(2, 3, 2, dtype=torch.bool), ~mask], dim=-1)
    kept = kept[:, :, None].expand_as(logits)
    assert torch.equal(edited[kept], logits[kept])


@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("offset", OFFSETS)
def test_an_edited_cell_reads_what_was_asked(offset, seed):
    logits, mask, values = random_case(seed, scale=3.0)
    c = row_offset(logits, offset, 1)  # the edit is made against the row as it was
    edited = edit_logits(logits, mask, values, offset, num_prefix=1)
    read = torch.sigmoid(edited - c)[..., 1:]
    chosen = mask[:, :, None].expand_as(read)
    wanted = values.clamp(EPS, 1 - EPS)[:, :, None].expand_as(read)
    assert torch.allclose(read[chosen], wanted[chosen], atol=2e-6)


@given(
    level=st.sampled_from([-40.0, 0.0, 40.0]),
    value=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_saturation_gives_no_nan_and_rows_sum_to_one(dtype, offset, level, value, seed):
    logits, mask, _ = random_case(seed, scale=1.0)
    logits = (logits + level * torch.randn(logits.shape).sign()).to(dtype)
    values = torch.full(mask.shape, value)
    edited = edit_logits(logits, mask, values, offset, num_prefix=1)
    assert torch.isfinite(edited).all()
    weights = torch.softmax(edited.float(), dim=-1)
    assert torch.isfinite(weights).all()
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 2), atol=1e-5)


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 3.0, 15.0, 40.0]))
@pytest.mark.parametrize("offset", OFFSETS)
def test_asking_for_the_current_value_changes_nothing(offset, seed, scale):
    logits, mask, _ = random_case(seed, scale)
    logits = logits[:, :, :1]
    current = sigmoid_attention(logits, offset, num_prefix=1)[:, :, 0]
    edited = edit_logits(logits, mask, current, offset, num_prefix=1)
    before, after = (torch.softmax(x, dim=-1) for x in (logits, edited))
    assert (before - after).abs().max() <= 1e-6


@given(seed=st.integers(0, 10**6), shift=st.floats(-20, 20))
def test_centred_reading_ignores_a_row_constant_and_plain_does_not(seed, shift):
    logits = random_case(seed, 1.0)[0].double()
    centred = sigmoid_attention(logits, "centred", 1)
    assert torch.allclose(centred, sigmoid_attention(logits + shift, "centred", 1), atol=1e-9)
    plain = sigmoid_attention(logits, "none", 1)
    assert abs(shift) < 1e-3 or not torch.equal(plain, sigmoid_attention(logits + shift, "none", 1))


@given(level=st.floats(-30, 30), patches=st.integers(1, 300), prefix=st.sampled_from([1, 2, 5]))
def test_centred_puts_a_uniform_row_at_one_half(level, patches, prefix):
    logits = torch.full((1, 1, 1, prefix + patches), level, dtype=torch.float64)
    logits[..., :prefix] = 9.0  # what the class token keeps does not matter
    read = sigmoid_attention(logits, "centred", prefix)
    assert torch.allclose(read, torch.full_like(read, 0.5), atol=1e-9)


@given(seed=st.integers(0, 10**6))
def test_centred_odds_are_multiples_of_the_mean_patch(seed):
    logits = random_case(seed, 2.0)[0].double()
    read = sigmoid_attention(logits, "centred", 1)
    attention = torch.softmax(logits, -1)[..., 1:]
    multiple = attention / attention.mean(-1, keepdim=True)
    assert torch.allclose(read / (1 - read), multiple, rtol=1e-6)


def test_softmax_of_a_logit_follows_the_odds_not_the_value():
    weights = torch.softmax(torch.logit(torch.tensor([0.5, 0.9, 0.999])), dim=0)
    odds = torch.tensor([1.0, 9.0, 999.0])
    assert torch.allclose(weights, odds / odds.sum(), atol=1e-5)


def test_edit_shapes_reach_the_heads_that_are_named():
    mask = torch.zeros(2, 2, dtype=torch.bool)
    mask[0, 1] = True
    edit = AttentionEdit(mask, 0.25, heads=(0, -1))
    full, values = edit.per_head(batch=3, heads=4, grid=(2, 2))
    assert full.shape == values.shape == (3, 4, 4)
    assert full.sum(-1).tolist() == [[1, 0, 0, 1]] * 3
    per_image = AttentionEdit(torch.eye(3, 4).bool(), 0.5).per_head(3, 4, (2, 2))[0]
    assert torch.equal(per_image[:, 2], torch.eye(3, 4).bool())
    per_head = torch.rand(3, 4, 4) < 0.5
    assert torch.equal(AttentionEdit(per_head, 0.5).per_head(3, 4, (2, 2))[0], per_head)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda m: AttentionEdit(m.float(), 0.0), TypeError, "bool"),
        (lambda m: AttentionEdit(m, 1.5), ValueError, "1.5"),
        (lambda m: AttentionEdit(m, float("nan")), ValueError, "nan"),
        (lambda m: AttentionEdit(m, 0.0, queries="rows"), ValueError, "rows"),
        (lambda m: AttentionEdit(m, 0.0, offset="mean"), ValueError, "mean"),
        (lambda m: AttentionEdit(m, 0.0).per_head(1, 2, (3, 3)), ValueError, "3 x 3"),
        (lambda m: AttentionEdit(m, 0.0, heads=(4,)).per_head(1, 4, (2, 2)), ValueError, "head 4"),
        (lambda m: resolve_heads((), 4), ValueError, "no head"),
        (lambda m: resolve_blocks("first", 4), ValueError, "first"),
        (lambda m: resolve_blocks((4,), 4), ValueError, "block 4"),
        (lambda m: resolve_heads("some", 4), ValueError, "some"),
        (lambda m: row_offset(torch.zeros(2), "x", 1), ValueError, '"x"'),
    ],
)
def test_bad_edits_are_refused_in_words(make, error, says):
    with pytest.raises(error, match=says):
        make(torch.ones(4, dtype=torch.bool))


def test_values_outside_the_mask_may_be_anything():
    values = torch.tensor([0.5, float("nan"), 7.0, -1.0])
    mask = torch.tensor([True, False, False, False])
    logits = torch.zeros(1, 1, 1, 5)
    full, wanted = AttentionEdit(mask, values).per_head(1, 1, (2, 2))
    assert torch.isfinite(edit_logits(logits, full, wanted, "none", 1)).all()


def test_blocks_by_name_and_from_the_end():
    assert resolve_blocks("last", 4) == (3,)
    assert resolve_blocks("last2", 4) == (2, 3)
    assert resolve_blocks("last2", 1) == (0,)
    assert resolve_blocks("all", 3) == (0, 1, 2)
    assert resolve_blocks((-1, 0, 3), 4) == (0, 3)


# --------------------------------------------------------------------------------- what it may be


def edit(**fields) -> AttentionEdit:
    return AttentionEdit(**{"mask": MASK, "values": VALUES, **fields})


@pytest.mark.parametrize("given", [np.asarray, torch.tensor])
def test_an_edit_copies_its_arrays_and_clears_what_is_not_masked(given):
    mask, values = given(MASK.copy()), given(np.full((2, 3), 0.5, np.float32))
    values[0, 1] = np.nan  # not masked: nobody asks for it
    found = AttentionEdit(mask, values)
    mask[:], values[:] = True, 0.9
    assert found.mask.tolist() == MASK.tolist()
    assert found.values.tolist() == [[0.5, 0, 0], [0, 0, 0.5]]
    assert found.mask.dtype == torch.bool and found.values.dtype == torch.float32
    assert found.grid == (2, 3)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (VALUES.astype(float), torch.float32),
        (torch.tensor(VALUES).half(), torch.float32),
        (torch.tensor(VALUES).double(), torch.float64),
        (0.5, torch.float32),
    ],
)
def test_values_are_kept_in_float32_unless_a_tensor_asks_for_more(values, dtype):
    assert edit(values=values).values.dtype == dtype


def test_an_edit_is_empty_where_no_cell_is_masked():
    assert edit(mask=np.zeros((2, 3), bool)).is_empty
    assert not edit().is_empty


def test_equal_edits_compare_equal_and_others_do_not():
    assert edit() == edit() == copy.deepcopy(edit())
    assert edit(heads=[2, 0], blocks=np.array([3, -1]).tolist()) == edit(
        heads=(0, np.int64(2)), blocks=(-1, 3)
    )
    other_mask = MASK.copy()
    other_mask[0, 1] = True  # its value is 0, so only the mask differs
    for fields in (
        {"mask": other_mask},
        {"values": VALUES / 2},
        {"mask": MASK.T, "values": VALUES.T},
        {"blocks": "all"},
        {"heads": (1,)},
        {"queries": "all"},
        {"offset": "centred"},
    ):
        assert edit(**fields) != edit()
    assert edit() != "an edit"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": MASK.astype(int)}, "mask is int64 [2, 3]; give bool [gh, gw]"),
        ({"mask": torch.tensor(MASK).int()}, "mask is int32 [2, 3]; give bool [gh, gw]"),
        ({"mask": np.zeros((0, 3), bool)}, "mask is bool [0, 3]"),
        ({"values": VALUES.T}, "values is [3, 2], but mask is [2, 3]; give one value a cell"),
        ({"values": VALUES.ravel()}, "values is [6], but mask is [2, 3]"),
        ({"values": "half"}, "values is 'half'; give numbers"),
        ({"values": VALUES + 0.5}, "values holds 1.5 on an edited cell; give 0 to 1"),
        ({"values": VALUES - 0.5}, "values holds -0.25 on an edited cell"),
        ({"values": np.full((2, 3), np.nan)}, "values holds nan on an edited cell"),
        ({"values": np.full((2, 3), np.inf)}, "values holds inf on an edited cell"),
        (
            {"blocks": "first"},
            'blocks is \'first\'; use "last" or "last2" or "all" or "pool" or different',
        ),
        ({"blocks": ()}, "blocks is ()"),
        ({"blocks": (1, 1)}, "blocks is (1, 1)"),
        ({"blocks": 3}, "blocks is 3"),
        ({"blocks": (True,)}, "blocks is (True,)"),
        ({"heads": (0.0,)}, "heads is (0.0,)"),
        ({"heads": ()}, 'heads is (); use "all" or "mean" or different indices'),
        ({"heads": (0, 0)}, "heads is (0, 0)"),
        ({"heads": "last"}, "heads is 'last'"),
        ({"queries": "patches"}, 'queries is \'patches\'; use "cls" or "all"'),
        ({"offset": None}, 'offset is None; use "none" or "centred"'),
    ],
)
def test_an_edit_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        edit(**fields)


@pytest.mark.parametrize("wanted", [range(2), np.arange(2), [1, 0], (0, 1)])
def test_indices_come_in_any_sequence(wanted):
    mask = torch.ones(2, 2, dtype=torch.bool)
    edit = AttentionEdit(mask, 0.5, blocks=wanted, heads=wanted)
    assert edit.blocks == edit.heads == (0, 1)
