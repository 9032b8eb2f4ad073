"""Human attention losses: definitions, validity, and what each is blind to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.losses import LOSSES, SEES_OFFSET, attention_loss

NAMES = list(LOSSES)


def case(seed: int, prefix: int = 1, images: int = 3, patches: int = 9):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, 2, prefix + patches, generator=g) * 2
    human = torch.rand(images, patches, generator=g)
    human[human < 0.4] = 0.0
    human[:, 0] = 1.0
    return logits, human, torch.ones(images, patches, dtype=torch.bool)


def value(name, logits, human, valid, **options):
    return attention_loss(name, {0: logits}, human, valid, **options).item()


@given(seed=st.integers(0, 10**6), offset=st.sampled_from(["none", "centred"]))
@pytest.mark.parametrize("name", NAMES)
def test_undecided_cells_count_for_nothing(name, seed, offset):
    logits, human, valid = case(seed)
    valid[:, 4:6] = False
    other, other_human = logits.clone(), human.clone()
    other_human[:, 4:6] = torch.rand(3, 2)
    before = value(name, logits, human, valid, offset=offset)
    assert value(name, logits, other_human, valid, offset=offset) == pytest.approx(before, abs=1e-5)
    if offset == "none":  # the centred constant is a property of the whole row
        other[:, :, 5:7] = 3.0  # columns of patches 4 and 5, after one prefix token
        after = value(name, other, other_human, valid, offset=offset)
        assert after == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_without_a_map_contributes_nothing(name):
    logits, human, valid = case(0)
    both = value(name, logits, human, valid)
    valid[1] = False
    human[2] = 0.0
    logits.requires_grad_()
    loss = attention_loss(name, {0: logits}, human, valid)
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[1:].abs().max() == 0 and logits.grad[0].abs().max() > 0
    alone = value(name, logits[:1].detach(), human[:1], valid[:1])
    assert loss.item() == pytest.approx(alone / 3, rel=1e-5)
    assert loss.item() < both
    valid[:] = False
    assert value(name, logits.detach(), human, valid) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_the_losses_that_see_the_offset_are_named(name):
    found = [value(name, *case(0), offset=offset) for offset in ("none", "centred")]
    assert (found[0] != found[1]) == (name in SEES_OFFSET)


@given(seed=st.integers(0, 10**6), shift=st.floats(-5, 5))
@pytest.mark.parametrize("name", ["kl", "energy"])
def test_softmax_losses_ignore_a_row_constant(name, seed, shift):
    logits, human, valid = case(seed)
    before = value(name, logits, human, valid)
    assert value(name, logits + shift, human, valid) == pytest.approx(before, abs=1e-4)


def test_kl_is_blind_to_the_class_token_and_energy_is_not():
    logits, human, valid = case(1)
    more = logits.clone()
    more[:, :, 0] += 5
    assert value("kl", more, human, valid) == pytest.approx(value("kl", logits, human, valid))
    assert value("energy", more, human, valid) > value("energy", logits, human, valid) + 1


@pytest.mark.parametrize("name", NAMES)
def test_following_the_gradient_reaches_the_goal_of_each_loss(name):
    logits, human, valid = case(2)
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    first = attention_loss(name, {0: logits}, human, valid).item()
    for _ in range(400):
        loss = attention_loss(name, {0: logits}, human, valid)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    attention = torch.softmax(logits.detach(), -1)[..., 1:].mean(1)
    read = torch.sigmoid(logits.detach())[..., 1:].mean(1)
    assert loss.item() < first
    if name in ("mse", "bce", "cosine"):
        assert torch.corrcoef(torch.stack([read.flatten(), human.flatten()]))[0, 1] > 0.9
    elif name == "kl":
        target = human / human.sum(-1, keepdim=True)
        assert torch.allclose(attention / attention.sum(-1, keepdim=True), target, atol=0.03)
    elif name == "energy":
        assert (attention * (human >= 0.1)).sum(-1).min() > 0.95
    else:
        assert read[human == 0].max() < 0.1


@pytest.mark.parametrize("name", ["mse", "bce", "mse_zero"])
def test_definitions_against_loops(name):
    logits, human, valid = case(3)
    valid[0, 2] = False
    total = 0.0
    for image in range(3):
        for head in range(2):
            cells = []
            for patch in range(9):
                s = torch.sigmoid(logits[image, head, 1 + patch]).item()
                h = human[image, patch].item()
                if not valid[image, patch] or (name == "mse_zero" and h != 0):
                    continue
                t = torch.tensor([s, 1 - s]).log()
                cells.append(
                    -(h * t[0] + (1 - h) * t[1]).item() if name == "bce"
                    else s**2 if name == "mse_zero" else (s - h) ** 2
                )  # fmt: skip
            total += sum(cells) / len(cells) / 6
    assert value(name, logits, human, valid) == pytest.approx(total, rel=1e-4)


def test_supervised_heads_and_blocks():
    logits, human, valid = case(4)
    logits.requires_grad_()
    attention_loss("kl", {0: logits}, human, valid, heads=(1,)).backward()
    assert logits.grad[:, 0].abs().max() == 0 and logits.grad[:, 1].abs().max() > 0
    a, b = case(5)[0], case(6)[0]
    both = attention_loss("mse", {0: a, 3: b}, human, valid).item()
    assert both == pytest.approx(
        (value("mse", a, human, valid) + value("mse", b, human, valid)) / 2
    )


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_rows_are_computed_in_float32(name):
    logits, human, valid = case(7)
    loss = attention_loss(name, {0: logits.bfloat16() * 20}, human, valid)
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


def test_bad_input_is_refused_in_words():
    logits, human, valid = case(8)
    with pytest.raises(ValueError, match="l2"):
        value("l2", logits, human, valid)
    with pytest.raises(ValueError, match="no block"):
        attention_loss("mse", {}, human, valid)
    with pytest.raises(ValueError, match="head 2"):
        value("mse", logits, human, valid, heads=(2,))


@pytest.mark.parametrize("offset", ["none", "centred"])
@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_equal_heads_is_each_of_them(name, offset):
    logits, human, valid = case(3)
    logits = logits[:, :1].expand(-1, 4, -1)
    each = value(name, logits, human, valid, offset=offset)
    mean = value(name, logits, human, valid, offset=offset, heads="mean")
    assert mean == pytest.approx(each, rel=1e-4, abs=1e-6)


def test_two_heads_may_share_the_map():
    """Each looks at one half of what people looked at; together they look at all of it."""
    human, valid = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool)
    row = torch.full((1, 2, 5), -20.0)
    row[0, 0, 1] = row[0, 1, 2] = 10.0
    assert value("kl", row, human, valid) > 5
    assert value("kl", row, human, valid, heads="mean") == pytest.approx(0, abs=1e-4)
    assert value("mse", row, human, valid, heads="mean") == pytest.approx(0.125, abs=1e-3)


@given(seed=st.integers(0, 10**6))
def test_the_mean_head_is_the_map_that_is_measured(seed):
    """KL(human || mean of the heads' softmax on the patches), whatever the class token keeps."""
    logits, human, valid = case(seed)
    attention = logits.softmax(-1)[..., 1:].mean(1)
    p, q = human / human.sum(-1, keepdim=True), attention / attention.sum(-1, keepdim=True)
    expected = torch.where(p > 0, p * (p.clamp(min=1e-8) / q).log(), 0.0).sum(-1).mean().item()
    assert value("kl", logits, human, valid, heads="mean") == pytest.approx(expected, abs=1e-5)


def test_saturated_cells_of_the_mean_can_still_learn():
    row = torch.tensor([[[0.0, 15.0, -15.0, 0.0], [0.0, 15.0, -15.0, 0.0]]], requires_grad=True)
    human, valid = torch.tensor([[0.0, 1.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
    attention_loss("bce", {0: row}, human, valid, heads="mean").backward()
    alone = row.grad.clone()
    row.grad = None
    attention_loss("bce", {0: row}, human, valid, heads="all").backward()
    assert torch.allclose(alone, row.grad, atol=1e-4) and row.grad[..., 1:3].abs().min() > 0.1
