"""One rule for many pictures: it counts what single edits do, and its controls are controls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_vit

from lib.config import DataConfig
from lib.data.dataset import make_dataset
from lib.edit import LOW, AttentionEdit
from lib.evaluation.many import (
    CONTROLS,
    Rule,
    Wanted,
    count_changes,
    edit_many,
    make_rules,
)
from lib.model.vit import SigmoidViT

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCOPES = {
    "last block": {"blocks": "last", "heads": "mean", "offset": "centred", "strength": 0.5},
    "all blocks": {"blocks": "all", "heads": "all", "offset": "none"},
}


@pytest.fixture(scope="module")
def toy_model():
    return SigmoidViT(tiny_vit(classes=8)).eval()


@pytest.fixture(scope="module")
def birds(toy_model):
    return make_dataset(DataConfig(toy_test=12), "test", toy_model.grid, MEAN, STD)


def test_each_row_is_a_single_edit(toy_model, birds):
    rules = make_rules(birds)
    assert list(rules) == ["border to 0", "decoy to 0", "outside the box low", "people's map"]
    decoy = rules.pop("decoy to 0").wanted(3)
    assert 0 < decoy.mask.sum() < 6 and not decoy.values.any()
    chosen = [3, 0, 5]
    frame = edit_many(toy_model, birds, list(rules.values()), chosen, SCOPES)
    asked = [rule.wanted(index) for rule in rules.values() for index in chosen]
    can = np.array([one is not None for one in asked]).reshape(3, 3).sum(axis=1)
    assert can[1] == 1  # of one picture nobody else is left
    assert len(frame) == 2 * (can @ [2, 2, 4]) and can[2] == 3
    assert set(frame["control"]) == {"own", *CONTROLS}
    own = frame[frame["control"] == "own"]
    for row in own.itertuples():
        wanted = rules[row.rule].wanted(row.index)
        edit = AttentionEdit(wanted.mask, wanted.values, **SCOPES[row.scope])
        with torch.no_grad():
            item = birds[row.index]
            now = toy_model.eval()(item["image"][None], edit=edit).softmax(-1)[0]
            was = toy_model(item["image"][None]).softmax(-1)[0]
        assert (row.label, row.predicted) == (item["label"], int(now.argmax()))
        assert row.p_true == pytest.approx(float(now[row.label]), abs=1e-4)
        assert row.p_before == pytest.approx(float(was[row.label]), abs=1e-4)
    # A control asks for as many cells: of somebody else's picture, or elsewhere.
    others = frame[frame["control"] == CONTROLS[0]].set_index(["rule", "scope", "index"])
    mine = own.set_index(["rule", "scope", "index"]).loc[others.index]
    assert (others["p_true"] != mine["p_true"]).loc["people's map"].any()
    assert "border to 0" not in others.index  # which is the same everywhere


def test_rules_ask_for_what_they_say(birds):
    rules = make_rules(birds, AttentionEdit(np.eye(4, dtype=bool), 0.7))
    gh, gw = birds.grid
    border = rules["border to 0"].wanted(0)
    assert border.mask.sum() == 2 * (gh + gw) - 4 and not border.values.any()
    outside = rules["outside the box low"].wanted(2)
    cover = birds.cover()[2].numpy()
    assert (outside.mask == (cover == 0)).all() and (
        outside.values[outside.mask] == np.float32(LOW)
    ).all()
    people = rules["people's map"].wanted(1)
    odds = people.values[people.mask] / (1 - people.values[people.mask])
    assert odds.mean() == pytest.approx(1, abs=0.05)
    same = rules["this edit"].wanted(0)
    assert same is rules["this edit"].wanted(1) and same.mask.sum() == 4


def test_counting_by_hand_and_stopping(toy_model, birds):
    nothing = Wanted(np.zeros(16, dtype=bool), np.zeros(16, dtype=np.float32))
    rule = Rule("none", lambda index: nothing if index else None)
    frame = edit_many(toy_model, birds, [rule], range(4))
    assert set(frame["index"]) == {1, 2, 3}  # nothing can be asked of the first
    table = count_changes(frame)
    assert list(table["control"]) == ["own", CONTROLS[1]]
    assert not table[["right_to_wrong", "wrong_to_right", "changed"]].to_numpy().any()
    assert (table["pictures"] == 3).all() and table["p_change"].abs().max() < 1e-6
    frame.loc[frame.index[:3], ["label", "predicted_before", "predicted"]] = [
        [1, 1, 2],
        [1, 0, 1],
        [1, 2, 0],
    ]
    first = count_changes(frame).iloc[0]
    assert first[["right", "right_to_wrong", "wrong_to_right", "changed"]].tolist() == [1, 1, 1, 3]
    seen = []
    stopped = apply_stopped(toy_model, birds, replace(rule), seen)
    assert len(stopped) == 0 and seen == [(0, 4)]
    assert len(count_changes(edit_many(toy_model, birds, [rule], range(2)))) == 2


def apply_stopped(model, birds, rule, seen):
    return edit_many(
        model, birds, [rule], range(4), progress=lambda *told: bool(seen.append(told)) or True
    )
