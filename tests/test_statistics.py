"""Intervals and paired tests: their properties, and their answers where those are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lib.evaluation import statistics
from lib.evaluation.statistics import Interval, bootstrap_interval, paired_tests, sign_flip_test

NUMBERS = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=30)


def frame(variants: dict[str, np.ndarray], column: str = "cc") -> pd.DataFrame:
    """`[seeds, images]` a variant as a table: one row an image, variant and seed."""
    rows = [
        {"variant": name, "seed": seed, "image_id": 10 + image, column: value}
        for name, values in variants.items()
        for seed, line in enumerate(np.atleast_2d(values))
        for image, value in enumerate(line)
    ]
    return pd.DataFrame(rows)


@given(NUMBERS)
def test_an_interval_holds_its_mean_and_stays_within_the_values(values):
    found = bootstrap_interval(values, resamples=200)
    slack = 1e-9 * max(map(abs, values))
    assert min(values) - slack <= found.low <= found.mean + slack
    assert found.mean - slack <= found.high <= max(values) + slack
    assert found.mean == pytest.approx(np.mean(values)) and found.images == len(values)


def test_degenerate_values_have_the_documented_answers():
    assert bootstrap_interval([0.3] * 5) == Interval(0.3, 0.3, 0.3, 5)
    one, none = bootstrap_interval([2.0, np.nan]), bootstrap_interval([np.nan])
    assert (one.mean, one.images) == (2.0, 1) and np.isnan([one.low, one.high]).all()
    assert none.images == 0 and np.isnan([none.mean, none.low, none.high]).all()
    with_gaps = bootstrap_interval([1.0, np.nan, 2.0, 5.0, np.nan])
    assert with_gaps == bootstrap_interval([1.0, 2.0, 5.0]) and with_gaps.images == 3


@pytest.mark.parametrize("wrong", [{"confidence": 1.0}, {"confidence": 0}, {"resamples": 0}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match="confidence must be between 0 and 1"):
        bootstrap_interval([1, 2], **wrong)


def test_95_percent_intervals_hold_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    held = [
        found.low <= 0.3 <= found.high
        for found in (
            bootstrap_interval(rng.random(80) < 0.3, resamples=400, seed=seed)
            for seed in range(200)
        )
    ]
    assert 0.90 <= np.mean(held) <= 0.99


def test_seeds_of_an_image_are_averaged_before_images_are_drawn():
    rng = np.random.default_rng(1)
    once = rng.random(40)
    copied = frame({"a": np.stack([once] * 3)})  # three seeds that say the same: no more is known
    found = statistics.intervals(copied, ["cc"]).iloc[0]
    expected = bootstrap_interval(once)
    assert [found["low"], found["high"]] == pytest.approx([expected.low, expected.high])
    assert found["images"] == 40 and found["metric"] == "cc"


@settings(max_examples=15)
@given(NUMBERS, st.integers(0, 3))
def test_identical_models_do_not_differ(values, seed):
    images = frame({"control": values, "same": values})
    row = paired_tests(images, columns=["cc"], resamples=50, permutations=99, seed=seed).iloc[0]
    assert row["difference"] == row["low"] == row["high"] == 0
    assert row["p"] == row["p_holm"] == 1


@settings(max_examples=15)
@given(NUMBERS, st.randoms(use_true_random=False))
def test_swapping_the_models_turns_the_difference_around(values, random):
    other = values.copy()
    random.shuffle(other)
    images = frame({"a": values, "b": other})
    numbers = {"columns": ["cc"], "resamples": 99, "permutations": 199}
    there = paired_tests(images, "a", **numbers).iloc[0]
    back = paired_tests(images, "b", **numbers).iloc[0]
    assert there["difference"] == pytest.approx(-back["difference"], abs=1e-9)
    assert [there["low"], there["high"]] == pytest.approx([-back["high"], -back["low"]], abs=1e-9)
    assert there["p"] == pytest.approx(back["p"])
    assert there["mean"] == pytest.approx(back["mean_against"])


def test_sign_flips_agree_with_all_permutations_of_scipy():
    differences = np.random.default_rng(3).normal(0.4, 1, 12)
    exact = stats.permutation_test((differences,), np.mean, permutation_type="samples")
    assert exact.pvalue == pytest.approx(sign_flip_test(differences), abs=0.015)
    with_zeros = np.concatenate([differences, np.zeros(50)])
    assert sign_flip_test(with_zeros) == sign_flip_test(differences)
    assert sign_flip_test([]) != sign_flip_test([])  # NaN: no image, no answer


def test_p_values_of_models_that_do_not_differ_are_spread_evenly():
    rng = np.random.default_rng(4)
    p_values = [sign_flip_test(rng.normal(size=30), 199, seed) for seed in range(300)]
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.085
    assert 0.43 <= np.mean(p_values) <= 0.57


def test_right_and_wrong_are_counted_and_tested_exactly():
    control = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    better = np.array([0, 1, 1, 1, 1, 1, 1, 1, 1, 0])  # 1 broken, 6 fixed
    row = paired_tests(frame({"control": control, "better": better}), columns=["cc"]).iloc[0]
    assert (row["fixed"], row["broken"]) == (6, 1)
    assert row["p_mcnemar"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert row["difference"] == pytest.approx(0.5) and row["p"] == pytest.approx(0.125, abs=0.02)
    graded = frame({"control": control, "better": better * 0.5})
    assert "fixed" not in paired_tests(graded, columns=["cc"])


def test_an_image_counts_once_in_mcnemars_test_whatever_the_seeds():
    control, better = np.zeros((3, 6)), np.ones((3, 6))
    better[2, 0] = 0
    row = paired_tests(frame({"control": control, "better": better}), columns=["cc"]).iloc[0]
    assert (row["fixed"], row["broken"], row["seeds"], row["images"]) == (17, 0, 3, 6)
    assert row["p_mcnemar"] == pytest.approx(2 / 2**6)


def test_images_without_a_value_are_left_out_of_the_pair():
    images = frame({"control": [1.0, np.nan, 3.0, 4.0], "other": [2.0, 3.0, np.nan, 6.0]})
    row = paired_tests(images, columns=["cc"]).iloc[0]
    assert row["images"] == 2 and row["difference"] == 1.5 and row["mean_against"] == 2.5


def test_only_seeds_that_both_have_are_compared():
    images = frame({"control": np.zeros((1, 4)), "other": [[1.0] * 4, [9.0] * 4]})
    row = paired_tests(images, columns=["cc"]).iloc[0]
    assert row["difference"] == 1 and row["seeds"] == 1


def test_pairs_that_are_none_are_refused():
    images = frame({"control": np.zeros(4), "other": np.ones(4)})
    with pytest.raises(ValueError, match='no model is called "absent"; use one of control, other'):
        paired_tests(images, "absent")
    with pytest.raises(ValueError, match='"other" has 3 rows'):
        paired_tests(images.iloc[:-1], columns=["cc"])
    with pytest.raises(ValueError, match="not the same images"):
        paired_tests(images.assign(image_id=range(8)), columns=["cc"])
    apart = images.assign(seed=(images["variant"] == "other").astype(int))
    with pytest.raises(ValueError, match='"other" has seeds 1 and "control" 0'):
        paired_tests(apart, columns=["cc"])


def test_holm_multiplies_by_how_many_tests_are_left():
    corrected = statistics.holm([0.04, 0.01, np.nan, 0.03, 0.9])
    assert corrected == pytest.approx([0.09, 0.04, np.nan, 0.09, 0.9], nan_ok=True)
    images = frame({"control": np.zeros(9), "a": np.ones(9), "b": np.ones(9)})
    table = paired_tests(images, columns=["cc"])
    assert (table["p_holm"] == 2 * table["p"]).all() and len(table) == 2
