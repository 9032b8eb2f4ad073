"""Cached answers against the real model, how little is run for them, and the editor's session."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from conftest import CUB_UNSEEN, VITS, images_for, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import SwiGLU
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib.config import DataConfig
from lib.data.corrections import Edit
from lib.data.dataset import BirdDataset, make_dataset
from lib.data.sources import Record
from lib.edit import AttentionEdit, edit_logits, resolve_blocks, sigmoid_attention
from lib.model.live import LiveImage
from lib.model.vit import SigmoidViT
from lib.widgets.session import KEPT_IMAGES, LiveSession

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

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
        "heads": st.sampled_from(["all", (0,), (1, 3), (-1,)]),
        "queries": st.sampled_from(["cls", "all"]),
        "offset": st.sampled_from(["none", "centred"]),
    }
)
VALUES = st.sampled_from([0.0, 1e-9, 0.02, 0.5, 0.9, 1 - 1e-9, 1.0, "random"])


def random_edit(
    model: SigmoidViT, value: float | str, seed: int, form: str = "grid", **scope: object
) -> AttentionEdit:
    generator = torch.Generator().manual_seed(seed)
    (gh, gw), heads = model.grid, model.num_heads
    shapes = {"grid": (gh, gw), "flat": (gh * gw,), "image": (1, gh * gw)}
    shape = {**shapes, "head": (1, heads, gh * gw)}[form]
    mask = torch.rand(shape, generator=generator) < 0.4
    values = torch.rand(shape, generator=generator) if value == "random" else value
    return AttentionEdit(mask, values, **scope)


def rows_after(
    model: SigmoidViT, rows: dict[int, torch.Tensor] | list[torch.Tensor], edit: AttentionEdit
) -> torch.Tensor:
    """What SigmoidViT gives, rows before a block's own edit, brought behind it: [depth, H, N]."""
    mask, values = edit.per_head(1, model.num_heads, model.grid)
    for index in resolve_blocks(edit.blocks, model.depth):
        row = rows[index][:, :, None]
        rows[index] = edit_logits(row, mask, values, edit.offset, model.num_prefix)[:, :, 0]
    return torch.cat([rows[index] for index in range(model.depth)])


def assert_close(ours: torch.Tensor, real: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == real.shape and ours.dtype == real.dtype
    assert (ours - real).abs().max() <= tolerance * real.abs().max().clamp(min=1)


def assert_kept(model: SigmoidViT, cached: LiveImage, edit: AttentionEdit, rows: torch.Tensor):
    """The first edited row is that of `edit_logits`; what nobody changed keeps its bits."""
    first = resolve_blocks(edit.blocks, model.depth)[0]
    expected = rows_after(model, list(cached.rows[:, None]), edit)[first]
    # logit(v) + c near 0 is a difference of numbers of order 1: a bit of those, not of what is left.
    assert torch.allclose(rows[first], expected, rtol=1e-6, atol=1e-6)
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
    scores, rows = cached.run(edit)
    expected, before = model(image, edit=edit, rows="all")
    assert_close(scores, expected[0])
    after = rows_after(model, before, edit)
    assert_close(rows, after)
    assert_close(rows.softmax(-1), after.softmax(-1))
    if edit.queries == "cls":
        assert_kept(model, cached, edit, rows)


@pytest.mark.parametrize("kind", [*VITS, *RARE])
@torch.no_grad()
def test_no_edit_is_the_unedited_model(kind):
    model, image, cached = live(kind)
    expected, rows = model(image, rows="all")
    assert_close(cached.scores, expected[0])
    assert_close(cached.rows, torch.cat(list(rows.values())))
    nothing = torch.zeros(model.grid, dtype=torch.bool)
    for edit in (None, AttentionEdit(nothing, 0.0), AttentionEdit(nothing, 0.0, blocks="all")):
        # An edit in between must leave nothing behind.
        cached.run(random_edit(model, 0.0, 1, blocks="all", queries="all"))
        scores, found = cached.run(edit)
        assert torch.equal(scores, cached.scores) and torch.equal(found, cached.rows)


@torch.no_grad()
def test_an_edit_is_in_the_rows_and_in_the_scores():
    """By hand: the last row of the answer, weighed and classified, is the answer's scores."""
    model, image, cached = live("plain")
    edit = random_edit(model, 0.7, 3, heads=(1,))
    scores, rows = cached.run(edit)
    changed = edit.mask.flatten()
    assert torch.allclose(rows[2, 1, 1:][changed].sigmoid(), torch.tensor(0.7), atol=1e-6)
    kept = ~torch.stack([changed & (head == 1) for head in range(4)])
    assert torch.equal(rows[2, :, 1:][kept], cached.rows[2, :, 1:][kept])
    assert torch.equal(rows[:2], cached.rows[:2])

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
    assert cached.rows.abs().max() > 20 and cached.rows.dtype == dtype
    for seed, value in enumerate([0.0, 1e-9, 0.5, 1 - 1e-9, 1.0]):
        for blocks, queries in itertools.product(["last", "last2", "all"], ["cls", "all"]):
            edit = random_edit(model, value, seed, blocks=blocks, queries=queries)
            scores, rows = cached.run(edit)
            assert torch.isfinite(scores).all() and torch.isfinite(rows.softmax(-1)).all()
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
    assert cached.rows.shape == (3, 4, 11)
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
        assert scores.device.type == rows.device.type == "cpu"
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


# ------------------------------------------------------------------------------------- the session


@pytest.fixture(scope="module")
def birds() -> BirdDataset:
    return make_dataset(DataConfig(toy_test=12), "test", (4, 4), MEAN, STD)


@pytest.fixture
def bird_model() -> SigmoidViT:
    return SigmoidViT(tiny_vit(classes=8)).train()


@pytest.fixture
def session(bird_model, birds) -> LiveSession:
    return LiveSession(bird_model, birds)


def painted(seed: int = 0, **scope) -> Edit:
    rng = np.random.default_rng(seed)
    return Edit(rng.random((4, 4)) < 0.5, rng.random((4, 4)), **scope)


def test_what_a_session_says_of_its_model(session, bird_model, birds):
    assert len(session) == 12 and session.classes == birds.classes
    assert (session.grid, session.depth, session.num_heads) == ((4, 4), 3, 4)
    assert session.num_prefix == 1
    assert not bird_model.training


def test_open_shows_the_picture_and_its_people(session, birds):
    shown = session.open(3)
    assert shown.index == 3 and shown.image_id == str(birds.table["image_id"][3])
    assert np.array_equal(shown.image, birds.image(3)) and shown.image.dtype == np.uint8
    assert shown.class_name == birds.classes[shown.label] == birds.table["class_name"][3]
    assert np.array_equal(shown.human, birds[3]["human"].view(4, 4)) and shown.human.max() == 1
    corners = birds.table[["x0", "y0", "x1", "y1"]].iloc[3]
    area = (corners["x1"] - corners["x0"]) * (corners["y1"] - corners["y0"])
    assert shown.box.shape == (4, 4) and shown.box.sum() * 16 * 16 == pytest.approx(area, rel=1e-5)


def test_open_says_what_is_not_known(cub, tmp_path):
    model = SigmoidViT(tiny_vit(img_size=(48, 64), classes=2))
    dataset = make_dataset(cub, "train", model.grid, MEAN, STD)
    session = LiveSession(model, dataset)
    opened = {one.image_id: one for one in map(session.open, range(len(dataset)))}
    missing = opened.pop(str(CUB_UNSEEN))
    assert missing.human is None and missing.box.sum() > 0
    assert opened and all(one.human.max() == 1 for one in opened.values())

    half = np.full((48, 64), 0.5, np.float32)
    half[:, :32] = np.nan
    np.save(tmp_path / "half.npy", half)
    pixels = np.zeros((48, 64, 3), np.uint8)
    record = Record(7, 0, pixels, tmp_path / "half.npy", {"": (np.nan,) * 4}, size=(48, 64))
    for one in (record, replace(record, boxes={})):
        data = BirdDataset([one], ["a", "b"], cub, model.grid, MEAN, STD)
        shown = LiveSession(model, data).open(0)
        assert shown.box is None
        assert np.isnan(shown.human[:, :2]).all() and (shown.human[:, 2:] == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("offset", ["none", "centred"])
def test_sigmoid_is_that_of_the_unedited_model(session, bird_model, birds, offset):
    _, rows = bird_model(birds[2]["image"][None], rows="all")
    expected = sigmoid_attention(rows[1][0], offset, 1).view(4, 4, 4)
    heads = session.sigmoid_heads(2, 1, offset)
    assert np.allclose(heads, expected, atol=1e-6) and heads.dtype == np.float32
    session.outcome(2, painted(blocks="all"))  # an edit does not reach it
    assert np.array_equal(session.sigmoid_heads(2, -2, offset), heads)
    assert np.allclose(session.sigmoid(2, 1, "all", offset), expected.mean(0), atol=1e-6)
    assert np.allclose(session.sigmoid(2, 1, (0, 3), offset), expected[[0, 3]].mean(0), atol=1e-6)


@torch.no_grad()
def test_outcome_is_that_of_the_real_model(session, bird_model, birds):
    edit = painted(blocks="all", heads=(1, 2), offset="centred")
    asked = AttentionEdit(
        torch.tensor(edit.mask), torch.tensor(edit.values), "all", (1, 2), "cls", "centred"
    )
    empty = replace(edit, mask=np.zeros((4, 4), bool))
    for wanted, real in ((edit, asked), (empty, None), (None, None)):
        scores, rows = bird_model(birds[1]["image"][None], edit=real, rows="all")
        after = rows_after(bird_model, rows, real) if real else torch.cat(list(rows.values()))
        mass = after.softmax(-1).mean(1)
        outcome = session.outcome(1, wanted)
        assert np.allclose(outcome.probabilities, scores[0].softmax(-1), atol=1e-5)
        assert np.allclose(outcome.attention, mass[:, 1:].view(3, 4, 4), atol=1e-5)
        assert np.allclose(outcome.class_token, mass[:, 0], atol=1e-5)
        assert outcome.probabilities.dtype == outcome.attention.dtype == np.float32


def test_the_ladder_climbs_through_the_model(session, birds):
    edit = painted(blocks=(0,), heads=(1,))
    steps = session.ladder(5, edit)
    names = ["no edit", "last block", "last two", "all blocks", "all blocks, all rows"]
    assert [step["rung"] for step in steps] == names
    label = birds.table["label"][5]
    last_two, all_rows = {"blocks": "last2"}, {"blocks": "all", "queries": "all"}
    for number, scope in ((0, None), (2, last_two), (4, all_rows)):
        outcome, step = session.outcome(5, scope and replace(edit, **scope)), steps[number]
        best = outcome.probabilities.argmax()
        assert step["prediction"] == session.classes[best]
        assert step["probability"] == outcome.probabilities[best]
        assert step["p_true"] == outcome.probabilities[label]
    assert len({step["p_true"] for step in steps}) == 5


def test_the_pictures_used_last_are_kept(session, monkeypatch):
    computed = []
    counted = lambda *args: computed.append(1) or LiveImage(*args)  # noqa: E731
    monkeypatch.setattr("lib.widgets.session.LiveImage", counted)
    for index in range(KEPT_IMAGES):
        session.outcome(index)
        session.outcome(np.int64(index), painted())
    assert len(computed) == KEPT_IMAGES
    session.sigmoid(0, 0)  # still there, and now the one used last
    session.outcome(KEPT_IMAGES)  # drops picture 1
    session.outcome(0)
    assert len(computed) == KEPT_IMAGES + 1
    session.outcome(1)
    assert len(computed) == KEPT_IMAGES + 2


def test_another_model_and_changed_weights_are_noticed(session):
    first, before = session.fingerprint, session.outcome(0).probabilities
    other = SigmoidViT(tiny_vit(classes=8, seed=1, depth=2))
    session.replace_model(other)
    assert session.fingerprint != first and session.depth == 2
    assert session.outcome(0).attention.shape == (2, 4, 4)
    same = SigmoidViT(tiny_vit(classes=8))
    session.replace_model(same)
    assert session.fingerprint == first
    assert np.array_equal(session.outcome(0).probabilities, before)
    with torch.no_grad():
        same.vit.head.bias[0] += 1
    session.replace_model(same)
    assert session.fingerprint != first
    assert session.outcome(0).probabilities[0] > before[0]


def test_fingerprints_name_the_weights():
    model = SigmoidViT(tiny_vit())
    seen = [LiveSession(model, no_pictures()).fingerprint]
    assert len(seen[0]) == 16 and int(seen[0], 16) >= 0
    for change in (torch.bfloat16, torch.float16, torch.float32):
        seen.append(LiveSession(model.to(change), no_pictures()).fingerprint)
    assert len(set(seen)) == 4  # the way through float16 rounds


def no_pictures() -> BirdDataset:
    pixels = np.zeros((64, 64, 3), np.uint8)
    config = DataConfig(name="folder", maps="none")
    return BirdDataset([Record(1, 0, pixels)], list("abcde"), config, (4, 4), MEAN, STD)


@pytest.mark.parametrize("index", [-1, 12])
def test_a_picture_that_is_not_there(session, index):
    for ask in (session.open, session.outcome, lambda i: session.sigmoid(i, 0)):
        with pytest.raises(IndexError, match=rf"image {index} is asked for; .* has 0 to 11"):
            ask(index)


def test_what_does_not_fit_is_refused_in_words(session, bird_model):
    small = Edit(np.ones((2, 3), bool), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"edit is on 2 x 3 patches, but the model has 4 x 4"):
        session.outcome(0, small)
    with pytest.raises(ValueError, match="block 3 is named"):
        session.sigmoid(0, 3)
    with pytest.raises(ValueError, match="head 9 is named"):
        session.outcome(0, painted(heads=(9,)))
    augmented = make_dataset(DataConfig(toy_train=4), "train", (4, 4), MEAN, STD, augment=True)
    with pytest.raises(ValueError, match=r"augmented, .* make it with augment=False"):
        LiveSession(bird_model, augmented)
    before = session.fingerprint, session.outcome(0).probabilities
    with pytest.raises(ValueError, match="the model has 5 classes, but the data set 8"):
        session.replace_model(SigmoidViT(tiny_vit()))
    with pytest.raises(ValueError, match="has 2 x 2 patches, but the data set 4 x 4"):
        session.replace_model(SigmoidViT(tiny_vit(img_size=32, classes=8)))
    assert session.fingerprint == before[0]  # the old model stays
    assert np.array_equal(session.outcome(0).probabilities, before[1])
