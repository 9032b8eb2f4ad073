"""Tables, the ladder and the result folder, on tiny runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_config

from lib import evaluate
from lib.runs import dataset_for


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("runs"))
    trials = evaluate.train_comparison(config, seeds=[0, 1])
    return config, trials, evaluate.evaluate_trials(trials)


def test_one_row_an_image_a_model_and_a_seed(comparison):
    config, trials, images = comparison
    assert len(trials) == 8 and len(images) == 8 * 24
    assert [t.variant for t in trials[:4]] == ["fine-tuned", *config.variants]
    model = trials[2].run.model()
    test = dataset_for(model, trials[2].run.config, "test", augment=False)
    frame = images[(images["variant"] == trials[2].variant) & (images["seed"] == 0)]
    frame = frame.reset_index(drop=True)
    with torch.no_grad():
        one = model(test[5]["image"][None])[0]
    assert frame["predicted"][5] == one.argmax().item()
    assert frame["p_true"][5] == pytest.approx(one.softmax(0)[test[5]["label"]].item(), abs=1e-5)
    assert frame["confidence"][5] == pytest.approx(one.softmax(0).max().item(), abs=1e-5)
    assert (frame["confidence"] >= frame["p_true"]).all()
    assert (frame["confidence"] == frame["p_true"])[frame["top1"]].all()
    assert (frame["top5"] >= frame["top1"]).all()
    assert ((frame["decoy"] != frame["label"]) == frame["conflicting"]).all()
    assert frame["on_decoy"].between(0, 1).all()


def test_summaries_are_means_of_the_rows(comparison):
    _, _, images = comparison
    seeds = evaluate.by_seed(images)
    row = seeds[(seeds["variant"] == "control") & (seeds["seed"] == 1)].iloc[0]
    part = images[(images["variant"] == "control") & (images["seed"] == 1)]
    assert row["top1"] == part["top1"].mean()
    assert row["conflicting"] == part[part["conflicting"]]["top1"].mean()
    table = evaluate.comparison_table(seeds)
    control = seeds[seeds["variant"] == "control"]["nss"]
    assert table.loc["control", "NSS"] == f"{control.mean():.3f} ± {control.std():.3f}"
    assert list(table.columns) == list(evaluate.COLUMNS.values())


def test_decoy_cover_is_where_the_decoy_is(comparison):
    _, trials, _ = comparison
    test = dataset_for(trials[0].run.model(), trials[0].run.config, "test", augment=False)
    cover = evaluate.decoy_cover(test)
    boxes = test.table[["dx0", "dy0", "dx1", "dy1"]].to_numpy()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert np.allclose(cover.sum(1) * 16 * 16, area, rtol=1e-3)  # patches of 16 x 16 pixels


def test_human_baselines_are_ordered(comparison):
    _, trials, _ = comparison
    test = dataset_for(trials[0].run.model(), trials[0].run.config, "test", augment=False)
    table = evaluate.human_baselines(test).set_index("map")
    assert table.loc["human", "cc"] > table.loc["mean map", "cc"] > table.loc["another image", "cc"]
