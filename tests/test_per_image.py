"""Tables, the ladder and the result folder, on tiny runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib.config import DataConfig
from lib.data.dataset import BirdDataset, decoy_cover, read_records
from lib.evaluation import metrics
from lib.evaluation.per_image import (
    baselines_by_image,
    human_baselines,
    per_head,
    perfect_cc,
    targets_of,
)
from lib.evaluation.tables import COLUMNS, by_seed, comparison_table, summarise
from lib.experiments.compare import train_comparison
from lib.experiments.evaluate import measure_runs
from lib.training.runs import dataset_for


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("runs"))
    trials = train_comparison(config, seeds=[0, 1])
    return config, trials, measure_runs(trials)


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
    seeds = by_seed(images)
    row = seeds[(seeds["variant"] == "control") & (seeds["seed"] == 1)].iloc[0]
    part = images[(images["variant"] == "control") & (images["seed"] == 1)]
    assert row["top1"] == part["top1"].mean()
    assert row["conflicting"] == part[part["conflicting"]]["top1"].mean()
    table = comparison_table(seeds)
    control = seeds[seeds["variant"] == "control"]["nss"]
    assert table.loc["control", "NSS"] == f"{control.mean():.3f} ± {control.std():.3f}"
    assert list(table.columns) == list(COLUMNS.values())


def test_decoy_cover_is_where_the_decoy_is(comparison):
    _, trials, _ = comparison
    test = dataset_for(trials[0].run.model(), trials[0].run.config, "test", augment=False)
    cover = decoy_cover(test)
    boxes = test.table[["dx0", "dy0", "dx1", "dy1"]].to_numpy()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert np.allclose(cover.sum(1) * 16 * 16, area, rtol=1e-3)  # patches of 16 x 16 pixels


def test_human_baselines_are_ordered(comparison):
    _, trials, _ = comparison
    test = dataset_for(trials[0].run.model(), trials[0].run.config, "test", augment=False)
    cc = human_baselines(test).set_index("map")["cc"]
    assert cc["one reader"] > cc["mean map"] > cc["another image"]
    assert cc["one reader"] < perfect_cc(test) < 1


def test_no_reader_and_no_image_is_held_against_itself(comparison):
    """The same by hand, for three images; every map is on another side of the line."""
    _, trials, _ = comparison
    config = trials[0].run.config
    config = replace(config, data=replace(config.data, toy_test=3))
    test = dataset_for(trials[0].run.model(), config, "test", augment=False)
    items = [test.annotations(i) for i in range(3)]
    table = human_baselines(test).set_index("map")
    single, mean, other, elsewhere = [], [], [], []
    for i, item in enumerate(items):
        maps, counts = test.readers(i)
        rest = range(len(maps))
        single.append(
            np.mean([
                metrics.cc(maps[r], sum(maps[j] for j in rest if j != r)).item() for r in rest
            ])
        )  # fmt: skip
        others = [items[j] for j in range(3) if j != i]
        mean.append(metrics.cc(sum(o["human"] for o in others), item["human"]).item())
        other.append(metrics.cc(items[(i + 1) % 3]["human"], item["human"]).item())
        negatives = sum(o["fixations"] for o in others)
        by_mean = sum(o["human"] for o in others)
        elsewhere.append(metrics.auc_shuffled(by_mean, item["fixations"], negatives).item())
        assert torch.equal(counts.sum(0), item["fixations"])
    assert table.loc["one reader", "cc"] == pytest.approx(np.mean(single), abs=1e-5)
    assert table.loc["mean map", "cc"] == pytest.approx(np.mean(mean), abs=1e-5)
    assert table.loc["another image", "cc"] == pytest.approx(np.mean(other), abs=1e-5)
    assert table.loc["mean map", "sauc"] == pytest.approx(np.mean(elsewhere), abs=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=8))
@example([1, 0, 1, 1])  # two cells tie for the highest
def test_baselines_of_a_set_are_those_of_its_images_one_by_one(readers):
    """Whoever looked at them: nobody, one person (who has no others), or several."""
    records, classes = read_records(DataConfig(name="toy", toy_test=len(readers)), "test")
    records = [
        replace(one, human=one.human[:count] or None)
        for one, count in zip(records, readers, strict=True)
    ]
    config = DataConfig(name="toy", maps="none")
    dataset = BirdDataset(records, classes, config, (14, 14), (0.5,) * 3, (0.5,) * 3)
    chosen, whole = np.flatnonzero(dataset.has_map), targets_of(dataset)
    found = baselines_by_image(dataset)
    if len(chosen) < 2:
        assert found.empty
        return
    rows = found.set_index(["image_id", "map"])
    several = [i for i in chosen if readers[i] > 1]
    assert len(rows) == 3 * len(chosen) + len(several)
    for place, i in enumerate(chosen):
        held = {name: values[i] for name, values in whole.items()}
        maps = {
            "mean map": sum(whole["human"][j].double() for j in chosen if j != i),
            "another image": whole["human"][chosen[(place + len(chosen) // 2) % len(chosen)]],
            "uniform": torch.ones(14 * 14),
        }
        expected = {name: metrics.alignment(one, **held) for name, one in maps.items()}
        if i in several:
            own, counts = dataset.readers(i)
            others = {"human": own.double().sum(0) - own, "fixations": counts.sum(0) - counts}
            held |= {name: values[None] for name, values in held.items()} | others
            each = metrics.alignment(own, **held)
            expected["one reader"] = {name: values.nanmean() for name, values in each.items()}
        for name, values in expected.items():
            row = rows.loc[dataset.table["image_id"][i], name].to_dict()
            values = {key: value.item() for key, value in values.items()}
            assert row == pytest.approx(values, rel=1e-4, abs=1e-5, nan_ok=True)


def test_heads_one_by_one_are_the_class_row_of_each(comparison):
    _, trials, images = comparison
    run = trials[0].run
    test = run.dataset("test")
    heads = per_head(run.model(), test, batch_size=5)
    assert len(heads) == 2 * len(test) * run.model().num_heads
    with torch.no_grad():
        _, rows = run.model()(test[7]["image"][None], rows="last")
    row, counts = rows[run.model().depth - 1][0, 1], test[7]["fixations"]
    chosen = heads[(heads["image_id"] == test.table.loc[7, "image_id"]) & (heads["head"] == 1)]
    for name, map_ in (("softmax", row.softmax(-1)[1:]), ("sigmoid", row[1:].sigmoid())):
        found = chosen[chosen["map"] == name].iloc[0]
        assert found["nss"] == pytest.approx(metrics.nss(map_, counts).item(), abs=1e-4)
        assert found["cc"] == pytest.approx(metrics.cc(map_, test[7]["human"]).item(), abs=1e-4)
        assert found["class_token"] == pytest.approx(row.softmax(-1)[0].item(), abs=1e-5)
    assert {"sigmoid_cc", "point_box", "point_part", "sauc", "ece"} <= {*images, "ece"}
    assert 0 <= summarise(images)["ece"] <= 1
