"""The edit of what the heads see together: what it reads, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from conftest import images_for, tiny_vit
from hypothesis import given
from hypothesis import strategies as st

from lib.edit import AttentionEdit, edit_logits
from lib.model import mean_edit
from lib.model.mean_edit import FLOOR, edit_mean, read_mean
from lib.model.vit import SigmoidViT

P, PREFIX = 12, 2
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OFFSETS = ["none", "centred"]
seeds, scales = st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 4.0, 12.0])


def random_case(seed, scale, share=0.5, dtype=torch.float32, heads=4):
    """Logits [2, heads, 3, N], mask and values [2, P]; what is painted adds up to `share`."""
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, heads, 3, PREFIX + P, generator=g)
    mask = torch.rand(2, P, generator=g) < 0.5
    weight = torch.rand(2, P, generator=g) + 0.01
    odds = P * share * weight / (weight * mask).sum(-1, keepdim=True).clamp(min=1e-9)
    return logits.to(dtype), mask, odds / (1 + odds)


def attention(logits):
    return torch.softmax(logits.double(), dim=-1)


def painted(tensor, mask):
    return tensor[mask[:, None].expand_as(tensor)]


@given(seeds, scales, st.sampled_from([0.01, 0.3, 0.9]))
@pytest.mark.parametrize("offset", OFFSETS)
def test_the_mean_of_the_heads_reads_what_was_painted(offset, seed, scale, share):
    logits, mask, values = random_case(seed, scale, share)
    read = read_mean(edit_mean(logits, mask, values, offset, PREFIX), offset, PREFIX)
    wanted = values[:, None].expand_as(read)
    assert (painted(read, mask) - painted(wanted, mask)).abs().max() < 1e-4 or not mask.any()


@given(seeds, scales, st.sampled_from([0.1, 0.9, 5.0]), st.sampled_from([0.3, 1.0]))
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_keep_their_mass_their_parts_and_what_nobody_painted(
    dtype, seed, scale, share, strength
):
    logits, mask, values = random_case(seed, scale, share, dtype)
    edited = edit_mean(logits, mask, values, "centred", PREFIX, strength)
    assert edited.dtype == dtype and edited.isfinite().all()
    assert torch.equal(edited[..., :PREFIX], logits[..., :PREFIX])
    bits = torch.finfo(dtype).eps * max(1.0, edited.abs().max().item())
    before, after = attention(logits), attention(edited)
    rough = 4 * bits + 1e-6
    torch.testing.assert_close(after[..., 0], before[..., 0], atol=rough, rtol=rough)
    # One shift a patch: how a head differs from another at a patch, but for one constant a head.
    shift = (edited.double() - logits.double())[..., PREFIX:]
    relative = shift - shift[..., :1]
    assert (relative - relative[:, :1]).abs().max() <= 8 * bits + 1e-6
    free = ~mask[:, None, None].expand_as(shift)
    spread = shift.masked_fill(~free, -torch.inf).amax(-1) - shift.masked_fill(
        ~free, torch.inf
    ).amin(-1)
    assert spread[free.any(-1)].max() <= 4 * bits + 1e-6 if free.any() else True


@given(seeds, scales)
@pytest.mark.parametrize("offset", OFFSETS)
def test_painting_what_is_already_there_changes_nothing(offset, seed, scale):
    logits, mask, _ = random_case(seed, scale)
    logits = logits[:, :, :1].double()
    values = read_mean(logits, offset, PREFIX)[:, 0]
    assert torch.equal(edit_mean(logits, mask, values, offset, PREFIX), logits)
    none = torch.zeros_like(mask)
    assert torch.equal(edit_mean(logits, none, values, offset, PREFIX), logits)


@given(seeds, scales)
def test_offset_none_leaves_other_cells_bit_for_bit(seed, scale):
    logits, mask, values = random_case(seed, scale)
    edited = edit_mean(logits, mask, values, "none", PREFIX)
    kept = ~torch.cat([torch.zeros(2, PREFIX, dtype=torch.bool), mask], dim=-1)
    kept = kept[:, None, None].expand_as(logits)
    assert torch.equal(edited[kept], logits[kept])


@given(seeds, scales, st.sampled_from([1.5, 8.0, 1000.0]))
def test_more_than_all_is_shared_in_the_painted_proportions(seed, scale, share):
    logits, mask, values = random_case(seed, scale, share)
    values = values.clamp(max=0.99)
    before = attention(logits)[..., PREFIX:].mean(1)
    after = attention(edit_mean(logits, mask, values, "centred", PREFIX))[..., PREFIX:].mean(1)
    for image in range(2):
        chosen = mask[image]
        if not chosen.any() or (values / (1 - values))[image, chosen].sum() < P:
            continue
        got = after[image][:, chosen] / after[image][:, chosen].sum(-1, keepdim=True)
        odds = (values / (1 - values))[image, chosen].double()
        torch.testing.assert_close(got, (odds / odds.sum()).expand_as(got), atol=1e-4, rtol=1e-3)
        whole = after[image].sum(-1)
        floor = torch.minimum(
            FLOOR / P * whole * (~chosen).sum(), before[image][:, ~chosen].sum(-1)
        )
        torch.testing.assert_close(after[image][:, ~chosen].sum(-1), floor, atol=1e-5, rtol=1e-2)


@given(seeds, scales)
def test_one_head_is_a_plain_edit_of_the_distribution(seed, scale):
    """With one head: the logits of what is asked for, whatever they were."""
    logits, _, values = random_case(seed, scale, heads=1)
    mask = torch.ones(2, P, dtype=torch.bool)
    after = attention(edit_mean(logits, mask, values, "centred", PREFIX))[:, 0, :, PREFIX:]
    odds = (values / (1 - values)).double()
    expected = (odds / odds.sum(-1, keepdim=True))[:, None].expand_as(after)
    torch.testing.assert_close(after / after.sum(-1, keepdim=True), expected, atol=1e-5, rtol=1e-4)


@given(seeds, st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_strength_is_a_share_of_the_shift(seed, strength):
    logits, mask, values = random_case(seed, 2.0)
    for whole, part in (
        (edit_mean(logits, mask, values, "none", PREFIX),
         edit_mean(logits, mask, values, "none", PREFIX, strength)),
        (edit_logits(logits, mask[:, None], values[:, None], "centred", PREFIX),
         edit_logits(logits, mask[:, None], values[:, None], "centred", PREFIX, strength)),
    ):  # fmt: skip
        torch.testing.assert_close(part, torch.lerp(logits, whole, strength), atol=1e-5, rtol=1e-5)
    shift = edit_mean(logits, mask, values, "centred", PREFIX) - logits
    part = edit_mean(logits, mask, values, "centred", PREFIX, strength) - logits
    relative = (shift - shift[..., PREFIX:].mean(-1, keepdim=True))[..., PREFIX:]
    small = (part - part[..., PREFIX:].mean(-1, keepdim=True))[..., PREFIX:]
    torch.testing.assert_close(small, strength * relative, atol=1e-4, rtol=1e-4)


def test_heads_that_look_elsewhere_are_still_brought_together():
    """Each head all but sees one patch of its own, and the mean is asked to see a third."""
    logits = 40 * torch.eye(4)[None, :, None]  # [1, 4, 1, 4], no prefix
    mask, odds = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[0.4, 0.4, 1.6, 1.6]])
    edited = edit_mean(logits, mask, odds / (1 + odds), "centred", 0)
    torch.testing.assert_close(
        attention(edited).mean(1)[0, 0] * 4, odds[0].double(), atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_the_model_under_an_edit_of_the_mean():
    model = SigmoidViT(tiny_vit("plain"))
    images = images_for(model, 2)
    mask = torch.zeros(2, *model.grid, dtype=torch.bool)
    mask[:, 1, :2] = True
    edit = AttentionEdit(mask, 0.8, blocks=(0,), heads="mean", offset="centred")
    _, rows = model(images, rows=(0,))
    row = edit_mean(rows[0][:, :, None], mask.flatten(1), edit.values.flatten(1), "centred", 1)
    odds = attention(row)[..., 0, 1:].mean(1)
    odds = odds / odds.mean(-1, keepdim=True)
    assert torch.allclose(odds[mask.flatten(1)], torch.tensor(4.0, dtype=torch.double), rtol=1e-4)
    assert not torch.equal(model(images, edit=edit), model(images))
    each = AttentionEdit(mask, 0.8, blocks=(0,), heads="all", offset="centred")
    assert not torch.equal(model(images, edit=edit), model(images, edit=each))
    with pytest.raises(ValueError, match="use"):
        whole = torch.ones(2, model.num_heads, mask[0].numel(), dtype=torch.bool)
        model(images, edit=AttentionEdit(whole, 0.5, heads="mean"))
    for wrong in (-0.1, 1.5, float("nan"), True, "half"):
        with pytest.raises(ValueError, match="strength"):
            AttentionEdit(mask, 0.5, strength=wrong)
    assert AttentionEdit(mask, 0.5, strength=0.0).is_empty


def test_many_rows_are_edited_in_parts(monkeypatch):
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 3, 7, 9), torch.rand(2, 8) < 0.5
    asked = logits, mask, torch.rand(2, 8), "centred", 1, 0.7
    whole = edit_mean(*asked)
    assert not torch.equal(whole, logits)
    for rows in (1, 2, 3):  # the last part is a shorter one
        monkeypatch.setattr(mean_edit, "AT_ONCE", rows * 2 * 3 * 9)
        assert torch.allclose(edit_mean(*asked), whole, atol=1e-6)
