"""Teaching by corrections on drawn birds with a tiny ViT: what learns, what stays, what is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CUB_CLASSES, images_for
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config import DataConfig, preset
from lib.data.corrections import load_corrections, save_correction
from lib.data.dataset import BirdDataset, decoy_cover, make_dataset
from lib.edit import AttentionEdit
from lib.evaluation.per_image import per_image
from lib.experiments.simulate import shuffled, simulated_corrections, simulated_teaching
from lib.losses import CORRECTION_LOSSES, HALF, LOSSES, correction_loss, mass
from lib.model.vit import SigmoidViT, create_model
from lib.training.loop import TrainingDiverged
from lib.training.teach import (
    NothingToTeach,
    TeachConfig,
    Teacher,
    spread_over_classes,
    targets,
    teach_terms,
)
from lib.training.tokens import CachedTokens

QUICK = TeachConfig(steps=4, batch_size=8, replay=24)


def tiny_model(seed: int = 0, **changes) -> SigmoidViT:
    """3 blocks of 2 heads on 8 x 8 patches, with weights lively enough to look somewhere."""
    torch.manual_seed(seed)
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, **changes}
    model = create_model("vit_tiny_patch16_224", 8, (64, 64), **sizes).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def toy(split: str, count: int, **changes) -> BirdDataset:
    model = tiny_model()
    config = replace(preset("toy").data, toy_train=count, toy_test=count, **changes)
    return make_dataset(config, split, model.grid, *model.normalisation)


@pytest.fixture(scope="module")
def birds() -> BirdDataset:
    return toy("train", 40)


@pytest.fixture(scope="module")
def held_out() -> BirdDataset:
    return toy("test", 24)


@pytest.fixture
def model() -> SigmoidViT:
    return tiny_model()


def state(model: SigmoidViT) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: SigmoidViT) -> set[str]:
    """Names of the parameters that are not bit for bit what they were."""
    now = model.state_dict()
    return {key for key, value in before.items() if not torch.equal(value, now[key])}


# ------------------------------------------------------------------------ the model, there and back


def test_undo_brings_back_every_level_bit_for_bit(model, birds):
    teacher = Teacher(model, birds, replace(QUICK, last_blocks=2))
    levels = []
    for count in (2, 3, 1):
        levels.append(state(model))
        teacher.teach(simulated_corrections(birds, range(count)))
    assert teacher.levels == 3
    for before in reversed(levels):
        assert changed(before, model)
        assert not changed(before, teacher.before())
        teacher.undo()
        assert not changed(before, model)
    assert teacher.levels == 0
    for nothing in (teacher.undo, teacher.before):
        with pytest.raises(IndexError, match="nothing to undo"):
            nothing()


class Stopped(Exception):
    pass


@pytest.mark.parametrize("how", ["cancel", "error", "trunk"])
def test_cancel_and_errors_leave_the_model_as_it_was(model, birds, how):
    model.vit.head.requires_grad_(False)
    model.vit.blocks[0].train()
    before = state(model)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    seen = []

    def progress(step, steps, losses):
        seen.append(step)
        if how == "error" and step == 2:
            assert changed(before, model)
            raise Stopped

    cancelled = {
        "cancel": lambda: seen[-1:] == [2],
        "error": lambda: False,
        "trunk": lambda: True,
    }[how]
    teacher = Teacher(model, birds, QUICK)
    if how == "error":
        with pytest.raises(Stopped):
            teacher.teach(simulated_corrections(birds, [0, 1]), progress, cancelled)
    else:
        report = teacher.teach(simulated_corrections(birds, [0, 1]), progress, cancelled)
        assert report.cancelled
        assert len(report.history) == {"cancel": 2, "trunk": 0}[how]
    assert not changed(before, model) and teacher.levels == 0
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


@pytest.mark.parametrize("last_blocks", [1, 2, 3])
def test_only_the_last_blocks_norm_and_head_learn(model, birds, last_blocks):
    before = state(model)
    Teacher(model, birds, replace(QUICK, last_blocks=last_blocks)).teach(
        simulated_corrections(birds, [0, 1, 2])
    )
    blocks = [f"vit.blocks.{index}." for index in range(3 - last_blocks, 3)]
    learning = (*blocks, "vit.norm.", "vit.head.")
    moved = changed(before, model)
    assert moved and all(key.startswith(learning) for key in moved)
    assert {start for start in learning if any(key.startswith(start) for key in moved)} == {
        *learning
    }


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(model, birds):
    before = state(model)
    teacher = Teacher(model, birds, replace(QUICK, lam=float("inf")))
    with pytest.raises(TrainingDiverged, match="lower lr"):
        teacher.teach(simulated_corrections(birds, [0]))
    assert not changed(before, model)


def test_the_seed_decides_and_the_callers_random_numbers_do_not(birds):
    results = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        model = tiny_model(drop_path_rate=0.2, proj_drop_rate=0.1)
        torch.manual_seed(noise)
        expected = torch.rand(1, generator=torch.Generator().manual_seed(noise))
        report = Teacher(model, birds, replace(QUICK, seed=seed, last_blocks=3)).teach(
            simulated_corrections(birds, range(12))
        )
        assert torch.rand(1) == expected  # as if nobody had taught in between
        results.append((state(model), report.history))
    (first, again, other) = results
    assert all(torch.equal(first[0][key], again[0][key]) for key in first[0])
    assert first[1].equals(again[1])
    assert any(not torch.equal(first[0][key], other[0][key]) for key in first[0])


# -------------------------------------------------------------------------------------- the lesson


def test_attention_leaves_the_cells_painted_low(birds, held_out):
    """Against the control, which replays the same pictures and does not know the corrections."""
    left = {}
    for lam in (0.0, 3.0):
        config = replace(QUICK, lam=lam, steps=25, lr=2e-3, last_blocks=3)
        teacher = Teacher(tiny_model(), birds, config)
        report = teacher.teach(simulated_corrections(birds, range(6)))
        row = teacher.before_after(held_out).loc["corrected"]
        left[lam] = row["attention on cells painted low after"]
        assert row["attention on cells painted low before"] > 0.04
        if lam:
            losses = report.history["attention_loss"]
            assert losses.iloc[-1] < 0.5 * losses.iloc[0]
        else:
            assert (report.history["attention_loss"] == 0).all()
    assert left[3.0] < 0.3 * left[0.0]


def test_cached_tokens_give_the_losses_of_the_pictures(model, birds):
    corrections = simulated_corrections(birds, [5, 9])
    asked = targets([correction.edit for correction in corrections], model, 1)
    cached = CachedTokens(model, birds, 2)
    replayed, corrected = cached.batch(range(8)), cached.batch([5, 9])
    assert corrected["tokens"].dtype == torch.float16
    quick = teach_terms(
        model,
        {**replayed, "tokens": replayed["tokens"].float()},
        {**asked, "tokens": corrected["tokens"].float()},
        replace(QUICK, last_blocks=2),
    )
    images = torch.stack([birds[index]["image"] for index in range(8)])
    labels = torch.tensor([birds[index]["label"] for index in range(8)])
    _, rows = model(torch.stack([birds[5]["image"], birds[9]["image"]]), rows=(1, 2))
    expected = F.cross_entropy(model(images), labels), correction_loss("mass", rows, asked)
    torch.testing.assert_close(quick, expected, atol=1e-3, rtol=1e-3)
    batch = torch.stack([birds[index]["human"] for index in range(8)])
    assert torch.equal(replayed["human"], batch) and torch.equal(replayed["label"], labels)


def test_every_architecture_can_be_taught(any_model):
    """Prefix tokens, distillation, other grids: the terms are those of the whole model."""
    images = images_for(any_model, 3)
    cells = np.zeros(any_model.grid, bool)
    cells.flat[:3] = True
    edit = AttentionEdit(
        cells, np.where(cells, [0.0] * (cells.shape[1] - 1) + [0.9], 0), blocks="all"
    )
    start = any_model.depth - 2
    asked = targets([edit], any_model, start)
    tokens, labels = any_model.tokens(images, start), torch.tensor([1, 4])
    found = teach_terms(
        any_model,
        {"tokens": tokens[:2], "label": labels},
        {"tokens": tokens[2:], **asked},
        replace(QUICK, last_blocks=2),
    )
    scores, rows = any_model(images, rows=any_model.layout.read_from(start))
    expected = (
        F.cross_entropy(scores[:2], labels),
        correction_loss("mass", {block: row[2:] for block, row in rows.items()}, asked),
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    found[1].backward()
    learned = any_model.vit.blocks[-1].norm1.weight.grad  # of a pooled model: its keys' way back
    assert learned.abs().sum() > 0


# ---------------------------------------------------------------------------------------- the loss


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["low", "high", "both"]),
    st.integers(1, 5),
    st.floats(0.1, 8),
)
def test_mass_is_the_share_off_the_low_cells_and_on_the_high_ones(seed, kind, prefix, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, 3, prefix + 12, generator=generator, dtype=torch.float64)
    logits.requires_grad_(True)
    wanted = torch.rand(2, 12, generator=generator)
    painted = torch.rand(2, 12, generator=generator) < 0.5
    painted[:, :2] = True
    wanted[:, :2] = torch.tensor([0.1, 0.9])
    if kind != "both":
        painted &= (wanted < HALF) == (kind == "low")
    row = logits.softmax(-1)[..., prefix:]
    low = (row * (painted & (wanted < HALF))[:, None]).sum(-1)
    high = (row * (painted & (wanted >= HALF))[:, None]).sum(-1)
    expected = -torch.log1p(-low) - (0 if kind == "low" else high.log())
    found = mass(logits, wanted[:, None], painted[:, None], "none")
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-6)
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", CORRECTION_LOSSES)
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_cells_that_nobody_painted_say_nothing(name, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 2, 3, 13, generator=generator).unbind(0)
    asked = {
        "painted": torch.rand(2, 12, generator=generator) < 0.4,
        "centred": torch.tensor([False, False]),
        "mean": torch.tensor([seed % 2 == 0, False]),
        "share": torch.full((2, 4, 3), 1 / 12),
    }
    asked["painted"][:, 3] = True
    wanted = torch.rand(2, 12, generator=generator)
    other = torch.where(asked["painted"], wanted, torch.rand(2, 12, generator=generator))
    rows = {block: row.requires_grad_(True) for block, row in enumerate(logits)}
    loss = correction_loss(name, rows, {**asked, "wanted": wanted})
    assert loss == correction_loss(name, rows, {**asked, "wanted": other})
    if name != "mass":  # the share of a cell depends on all others, its sigmoid does not
        loss.backward()
        beside = torch.cat([torch.ones(2, 1, dtype=bool), ~asked["painted"]], dim=1)
        for row in rows.values():
            assert (row.grad.transpose(0, 1)[:, beside] == 0).all()
            assert (row.grad.transpose(0, 1)[:, ~beside] != 0).all()


@pytest.mark.parametrize("name", CORRECTION_LOSSES)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["none", "centred"]))
@settings(max_examples=20)
def test_a_correction_of_the_mean_is_the_loss_of_what_the_heads_see_together(name, seed, offset):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 3, 14, generator=generator)  # two prefix tokens
    painted = torch.rand(2, 12, generator=generator) < 0.5
    painted[:, 0] = True
    asked = {
        "wanted": torch.rand(2, 12, generator=generator),
        "painted": painted,
        "centred": torch.tensor([offset == "centred"] * 2),
        "mean": torch.tensor([True, False]),
        "share": torch.full((2, 1, 3), 1 / 3),
    }
    each = {name: value[1:] for name, value in asked.items()}
    alone = correction_loss(name, {0: logits[1:]}, each)
    cells = asked["wanted"][1:, None], painted[1:, None]
    # that of each head, as it was before there was a mean to correct
    assert (
        alone == (CORRECTION_LOSSES[name](logits[1:], *cells, offset) * each["share"][:, 0]).sum()
    )

    mean = logits[:1].double().softmax(-1).mean(1, keepdim=True)
    cells = asked["wanted"][:1, None].double(), painted[:1, None]
    if name == "mass":
        expected = mass(mean.log(), *cells, offset)
    else:
        odds = 12 * mean[..., 2:] / mean[..., 2:].sum(-1, keepdim=True)
        read = odds / (1 + odds)
        if offset == "none":
            read = logits[:1, :, 2:].double().sigmoid().mean(1, keepdim=True)
        prefix = torch.zeros(1, 1, 2, dtype=torch.float64)
        expected = CORRECTION_LOSSES[name](torch.cat([prefix, read.logit()], -1), *cells, "none")
    both = correction_loss(name, {0: logits}, asked)
    torch.testing.assert_close(both, ((expected[0, 0] + alone) / 2).float(), rtol=1e-4, atol=1e-5)
    # One head alone is its own mean.
    single = {name: value[:1] for name, value in asked.items()} | {"share": torch.ones(1, 1, 1)}
    found = [
        correction_loss(name, {0: logits[:1, :1]}, single | {"mean": torch.tensor([word])})
        for word in (True, False)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_blocks_heads_and_offset_of_an_edit_are_kept(model):
    mask = np.zeros((8, 8), bool)
    mask[2, 3] = True
    edits = [
        AttentionEdit(mask, 0.2 * mask, blocks=(0, 2), heads=(1,)),
        AttentionEdit(~mask, 0.7 * ~mask, blocks="all", offset="centred"),
    ]
    asked = targets(edits, model, start=1)
    assert asked["share"].tolist() == [[[0, 0], [0, 1]], [[0.25, 0.25], [0.25, 0.25]]]
    assert asked["centred"].tolist() == [False, True]
    assert asked["painted"][0].nonzero().tolist() == [[19]]  # row 2, column 3 of 8
    generator = torch.Generator().manual_seed(0)
    rows = {block: torch.randn(2, 2, 65, generator=generator) for block in (1, 2)}
    for row in rows.values():
        row.requires_grad_(True)
    loss = correction_loss("mse", rows, asked)
    plain, centred = LOSSES["mse"], []
    first = plain(rows[2][:1], asked["wanted"][:1, None], asked["painted"][:1, None], "none")
    for row in rows.values():
        cells = asked["wanted"][1:, None], asked["painted"][1:, None]
        centred.append(plain(row[1:], *cells, "centred").mean())
    torch.testing.assert_close(loss, (first[0, 1] + (centred[0] + centred[1]) / 2) / 2)
    loss.backward()
    assert not rows[1].grad[0].any() and not rows[2].grad[0, 0].any()
    assert rows[2].grad[0, 1].any() and rows[1].grad[1].any()


# --------------------------------------------------------------------------- what is told, and when


def test_progress_is_told_of_the_trunk_once_and_of_every_step(model, birds):
    teacher = Teacher(model, birds, QUICK)
    told = []
    corrections = simulated_corrections(birds, [0, 1, 2])
    report = teacher.teach(corrections, lambda *said: told.append(said))
    assert [said[:2] for said in told if said[0]] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert told[0] == (0, 4, {"pictures": 24})
    kept = [(step, *losses.values()) for step, _, losses in told if step]
    assert kept == [tuple(row) for row in report.history.itertuples(index=False)]
    assert list(report.history) == ["step", "cross_entropy", "attention_loss"]
    assert report.used == tuple(corrections) and not report.skipped and not report.cancelled
    assert report.seconds > 0
    told.clear()
    teacher.teach(corrections, lambda *said: told.append(said))
    assert [said[0] for said in told] == [1, 2, 3, 4]  # all tokens are kept


def test_corrections_that_cannot_be_taught_are_named_with_the_reason(model, birds):
    good, other, *_ = simulated_corrections(birds, range(2))
    mask = np.ones((8, 8), bool)
    wrong = {
        "nowhere": (mask, {}, 'image_id is "nowhere", which is not in the data set'),
        "grid": (mask[:7], {}, "grid is 7 x 8, but the model has 8 x 8 patches"),
        "empty": (~mask, {}, "no cell is painted"),
        "deep": (mask, {"blocks": (5,)}, "block 5 is named, but the model has 3 blocks"),
        "frozen": (mask, {"blocks": (0, 1)}, "only blocks from 2 on learn"),
        "heads": (mask, {"heads": (2,)}, "head 2 is named, but the model has 2 heads"),
    }
    bad = []
    for name, (cells, scope, _) in wrong.items():
        image_id = name if name == "nowhere" else other.image_id
        bad.append(
            replace(other, image_id=image_id, edit=AttentionEdit(cells, 0.5 * cells, **scope))
        )
    before = state(model)
    teacher = Teacher(model, birds, QUICK)
    with pytest.raises(NothingToTeach, match=r"none of the 6 corrections .*nowhere.*paint"):
        teacher.teach(bad)
    with pytest.raises(ValueError, match="none of the 0 corrections can be taught; paint"):
        teacher.teach([])
    assert not changed(before, model)
    report = teacher.teach([*bad[:3], good, *bad[3:]])
    assert report.used == (good,)
    ids = ["nowhere", *[other.image_id] * 5]
    for skipped, image_id, (_, _, reason) in zip(report.skipped, ids, wrong.values(), strict=True):
        assert skipped[0] == image_id and reason in skipped[1]


def test_corrections_may_speak_of_another_data_set(model, birds, held_out):
    corrections = simulated_corrections(held_out, [3, 4])
    with pytest.raises(NothingToTeach, match="not in the data set"):
        Teacher(model, birds, QUICK).teach(corrections)
    teacher = Teacher(model, birds, QUICK, pictures=held_out)
    assert len(teacher.teach(corrections).used) == 2
    table = teacher.before_after(held_out)
    assert table.loc["corrected", "pictures"] == 2
    assert table.filter(like="held out", axis=0)["pictures"].sum() == 24 - 2


def test_bad_settings_are_refused(model, birds):
    for settings_, message in (
        ({"loss": "energy"}, 'loss is "energy"; use one of mass, mse, bce'),
        ({"steps": 0}, "steps is 0; it must be 1 or more"),
        ({"lam": -1.0}, "lam is -1"),
        ({"lr": 0.0}, "lr 0"),
    ):
        with pytest.raises(ValueError, match=message):
            TeachConfig(**settings_)
    with pytest.raises(ValueError, match="last_blocks is 4, but the model has 3"):
        Teacher(model, birds, TeachConfig(last_blocks=4))
    augmented = BirdDataset(
        birds.records, birds.classes, birds.config, birds.grid, *model.normalisation, augment=True
    )
    with pytest.raises(ValueError, match="augment=False"):
        Teacher(model, augmented)


# ------------------------------------------------------------------------------------ before, after


def test_before_and_after_are_measured_as_the_evaluation_does(model, birds, held_out):
    old = per_image(model, held_out)
    teacher = Teacher(model, birds, replace(QUICK, steps=10, lr=3e-3, last_blocks=3))
    chosen = [0, 1, 2]
    teacher.teach(simulated_corrections(birds, chosen))
    table = teacher.before_after(held_out, most=100)
    assert list(table.index) == [
        "corrected",
        "held out, same classes",
        "held out, other classes",
        "replayed",
    ]
    same = held_out.table["label"].isin(birds.table["label"][chosen])
    assert list(table["pictures"][:3]) == [3, same.sum(), (~same).sum()]
    assert 24 - 3 <= table.loc["replayed", "pictures"] <= 24
    for when, frame in (("before", old), ("after", per_image(model, held_out))):
        for group, part in (("same", frame[same]), ("other", frame[~same])):
            row = table.loc[f"held out, {group} classes"]
            assert row[f"accuracy {when}"] == pytest.approx(part["top1"].mean())
            conflicting = part[part["conflicting"]]["top1"].mean()
            assert row[f"conflicting-decoy accuracy {when}"] == pytest.approx(conflicting)
            assert row[f"NSS {when}"] == pytest.approx(part["nss"].mean(), abs=5e-3)
    low = table["attention on cells painted low before"]
    assert low.notna().tolist() == [True, False, False, False]
    decoy = decoy_cover(birds)[chosen] > 0.1
    _, rows = teacher.before()(torch.stack([birds[i]["image"] for i in chosen]), rows="last")
    attention = rows[2].softmax(-1).mean(1)[:, 1:]
    share = (attention * decoy).sum(1) / attention.sum(1)
    assert low.iloc[0] == pytest.approx(share.mean().item(), abs=1e-3)
    few = teacher.before_after(held_out, most=5)
    assert list(few["pictures"])[1:] == [5, 5, 5] and few.loc["corrected", "pictures"] == 3


def test_examples_are_pictures_of_the_two_groups_before_and_after(model, birds, held_out):
    teacher = Teacher(model, birds, QUICK)
    with pytest.raises(IndexError, match="nothing to undo"):
        teacher.examples(held_out)
    made = simulated_corrections(birds, range(5))
    teacher.teach(made)
    shown = teacher.examples(held_out, most=3)
    corrected = [one for one in shown if one.group == "corrected"]
    assert [one.image_id for one in corrected] == [one.image_id for one in made[-3:]]
    assert [one.edit for one in corrected] == [one.edit for one in made[-3:]]
    others = [one for one in shown if one.group == "held out, same classes"]
    assert others and all(one.edit is None for one in others)
    assert {one.class_name for one in others} <= {one.class_name for one in made}
    for one in shown:
        dataset = birds if one.group == "corrected" else held_out
        index = dataset.table["image_id"].astype(str).tolist().index(one.image_id)
        with torch.no_grad():
            scores, rows = model(dataset[index]["image"][None], rows="last")
        assert one.predicted["after"] == dataset.classes[int(scores.argmax())]
        attention = rows[2].softmax(-1)[0, :, 1:].mean(0).reshape(model.grid)
        # the tokens before the learning block are kept in half precision
        np.testing.assert_allclose(one.attention["after"], attention, atol=2e-3)
        assert not np.array_equal(one.attention["before"], one.attention["after"])


def test_pictures_without_decoys_or_fixations_are_compared_by_cc(cub):
    sizes = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = create_model("vit_tiny_patch16_224", len(CUB_CLASSES), cub.image_size, **sizes)
    config = DataConfig(**{**vars(cub), "maps": "boxes"})
    train, test = (
        make_dataset(config, split, model.grid, *model.normalisation) for split in ("train", "test")
    )
    with pytest.raises(ValueError, match="no decoy"):
        simulated_corrections(train, [0])
    teacher = Teacher(model, train, QUICK)
    mask = np.zeros(model.grid, bool)
    mask[0] = True
    birds = simulated_corrections(toy("train", 1), [0])
    edit, known = AttentionEdit(mask, 0.9 * mask), train.table.iloc[0].astype(str)
    correction = replace(birds[0], image_id=known["image_id"], edit=edit)
    with pytest.raises(NothingToTeach, match=r"of the class .* but that picture of Black footed"):
        teacher.teach([correction])  # ids were counted anew when pictures were added
    file = Path(known["path"]).name
    fitting = replace(correction, class_name=known["class_name"], file=file)
    moved = replace(fitting, image_id=str(train.table["image_id"].iloc[1]))
    assert teacher.teach([moved, fitting]).used == (fitting,)  # found by its file, taught once
    teacher.undo()
    with pytest.raises(NothingToTeach, match=r"its picture, gone.jpg, is not in the data set"):
        teacher.teach([replace(fitting, file="gone.jpg")])
    teacher.teach([fitting])
    table = teacher.before_after(test)
    assert "CC after" in table and not [name for name in table if name.startswith("NSS")]
    assert not [name for name in table if name.startswith("conflicting")]
    assert table["attention on cells painted low after"].isna().all()  # only high ones


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 70), st.integers(0, 9))
def test_replayed_pictures_are_spread_over_the_classes(labels, count, seed):
    labels = np.array(labels)
    chosen = spread_over_classes(labels, count, seed)
    assert len(set(chosen)) == len(chosen) == min(count, len(labels))
    total, taken = np.bincount(labels), np.bincount(labels[chosen], minlength=labels.max() + 1)
    left_out = taken < total  # classes that have more pictures to give
    if left_out.any():
        assert taken[left_out].min() >= taken.max() - 1


def test_simulated_corrections_paint_decoy_and_bird_and_can_be_saved(birds, tmp_path):
    corrections = simulated_corrections(birds, [7, 3], model="abcd", blocks="last")
    for index, correction in zip([7, 3], corrections, strict=True):
        edit = correction.edit
        assert correction.author == "simulated" and correction.model == "abcd"
        assert correction.image_id == str(birds.table["image_id"][index])
        decoy = (decoy_cover(birds)[index] > 0.1).reshape(8, 8)
        human = birds[index]["human"].reshape(8, 8)
        assert decoy.any() and (edit.values[decoy] == 0).all() and edit.mask[decoy].all()
        assert torch.equal(edit.mask, decoy | (human >= 0.3))
        assert (edit.values[edit.mask & ~decoy] == np.float32(0.9)).all()
        save_correction(correction, tmp_path)
    loaded, skipped = load_corrections(tmp_path, grid=birds.grid)
    assert not skipped and {one.image_id for one in loaded} == {c.image_id for c in corrections}
    assert {one.image_id: one.edit for one in loaded} == {c.image_id: c.edit for c in corrections}


def test_shuffled_corrections_are_the_same_maps_on_the_wrong_pictures(birds):
    made = simulated_corrections(birds, range(4), only_low=True)
    mixed = shuffled(made)
    assert [one.image_id for one in mixed] == [one.image_id for one in made]
    assert [one.edit for one in mixed] == [one.edit for one in made[1:] + made[:1]]
    assert all((one.edit.values == 0).all() for one in made)


def test_simulated_teaching_measures_every_model_and_leaves_the_first_alone(model, birds, held_out):
    # Decoys of test images say nothing, so most of them name another class: enough to correct.
    table, before = held_out.table, state(model)
    conflicting = np.flatnonzero((table["decoy"] >= 0) & (table["decoy"] != table["label"]))
    found = simulated_teaching(model, held_out, birds, [1, 5]).set_index("model")
    names = ["before", "control", "1 correction", "5 corrections", "5 shuffled"]
    assert found.index.tolist() == names and not changed(before, model)
    assert found["corrections"].tolist() == [0, 0, 1, 5, 5] and found["nss"].nunique() == 5
    assert found.loc["before", "nss"] == pytest.approx(per_image(model, birds)["nss"].mean())
    # Each starts from the same model: taught alone, it becomes what it is in a row of others.
    alone = Teacher(model, held_out)
    alone.teach(simulated_corrections(held_out, conflicting[:5]))
    assert found.loc["5 corrections", "nss"] == per_image(model, birds)["nss"].astype(float).mean()
    most = len(conflicting)
    with pytest.raises(ValueError, match=f"{most + 1} corrections are asked for, but only {most}"):
        simulated_teaching(model, held_out, birds, [most + 1])
