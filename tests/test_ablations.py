"""What is made of a sweep's table: settings against their control, and the Pareto front."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.evaluation import tables


def row(loss, lam, seed, top1, cc, **changes):
    words = {"blocks": "last", "heads": "all", "offset": "none", "maps": "human"}
    words |= {"annotated": "all", "noise": "none"}
    if loss == "control":
        words = dict.fromkeys(words, "")
    numbers = {"top1": top1, "cc": cc, "nss": 1.0, "class_token": 0.1, "sigmoid": 0.9}
    ends = {"trainable": "last_block", "seed": seed, "split": "test", "status": "measured"}
    return {"preset": "toy", "loss": loss, "lam": lam} | words | ends | numbers | changes


@pytest.fixture
def table():
    rows = [
        row("control", 0.0, 0, 0.70, 0.50),
        row("control", 0.0, 1, 0.80, 0.54),
        row("kl", 0.1, 0, 0.71, 0.70),
        row("kl", 0.1, 1, 0.79, 0.72),
        row("kl", 1.0, 0, 0.60, 0.80),
        row("kl", 1.0, 1, np.nan, np.nan, status="diverged"),
        row("kl", 0.1, 0, 0.72, 0.60, heads="mean"),
        row("kl", 0.1, 0, 0.10, 0.10, split="val"),
        row("kl", 0.1, 0, 0.69, 0.52, maps="shuffled"),
    ]
    return pd.DataFrame(rows)


def test_settings_are_held_against_the_control_of_their_seed(table):
    found = tables.by_setting(table)
    assert len(found) == 5 and found["seeds"].tolist() == [2, 2, 2, 1, 1]
    kl = found.iloc[1]
    assert kl["top1"] == pytest.approx(0.75) and kl["cc"] == pytest.approx(0.71)
    assert kl["top1_gain"] == pytest.approx(0.0)  # +.01 and -.01
    assert kl["top1_gain_std"] == pytest.approx(np.std([0.01, -0.01], ddof=1))
    assert found.iloc[0][["top1_gain", "cc_gain"]].tolist() == [0, 0]
    half = found.iloc[2]  # a seed that diverged is counted, and is in no mean
    assert half["diverged"] == 1 and half["cc"] == pytest.approx(0.80)
    assert tables.by_setting(table, "val")["top1_gain"].isna().all()  # no control there


def test_a_comparison_holds_everything_else_and_keeps_the_control(table):
    settings = tables.by_setting(table)
    assert tables.held_at(settings)["loss"].tolist() == ["control", "kl", "kl"]
    assert len(tables.held_at(settings, heads=None)) == 4
    assert len(tables.held_at(settings, lam=0.1)) == 2
    shuffled = tables.held_at(settings, maps="shuffled")
    assert shuffled["maps"].tolist() == ["", "shuffled"]


def test_the_best_without_a_loss_of_accuracy(table):
    settings = tables.by_setting(table)
    best = tables.best_at_no_cost(settings)
    assert (best["lam"], best["heads"], best["cc"]) == (0.1, "all", pytest.approx(0.71))
    assert tables.best_at_no_cost(settings, tolerance=0.2)["lam"] == 0.1  # 1.0 diverged once
    sound = settings.assign(diverged=0)
    assert tables.best_at_no_cost(sound, tolerance=0.2)["lam"] == 1.0
    assert tables.best_at_no_cost(settings, tolerance=-0.2) is None


@given(
    points=st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, float("nan")])] * 2), max_size=12)
)
def test_the_front_is_what_nothing_beats(points):
    x, y = [p[0] for p in points], [p[1] for p in points]
    found = tables.on_front(x, y)
    for i, here in enumerate(points):
        beaten = any(
            a >= here[0] and b >= here[1] and (a > here[0] or b > here[1]) for a, b in points
        )
        assert found[i] == (not beaten and not np.isnan(here).any())


def test_a_table_comes_back_from_its_file(table, tmp_path):
    table.to_csv(tmp_path / "sweep.csv", index=False)
    found = tables.read_table(tmp_path / "sweep.csv")
    pd.testing.assert_frame_equal(found, table)
    with pytest.raises(FileNotFoundError, match=r"none\.csv is missing; make it with"):
        tables.read_table(tmp_path / "none.csv")
    table.drop(columns="maps").to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(ValueError, match=r"other\.csv has no column maps"):
        tables.read_table(tmp_path / "other.csv")
