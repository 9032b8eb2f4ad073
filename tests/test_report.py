"""The result folder and the gallery page, on tiny runs; and which runs cannot be compared."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lib import config as cfg
from lib import figures
from lib.config import Evaluation
from lib.data.dataset import evenly_spaced
from lib.edit import rollout
from lib.evaluation.tables import (
    calibration,
    expected_calibration_error,
    markdown,
    summarise,
    values_by_image,
)
from lib.experiments import gallery
from lib.experiments.compare import Trial, load_trials, train_comparison, yardstick_variant
from lib.experiments.evaluate import common_dataset, evaluate, measure_runs


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("runs"))
    trials = train_comparison(config, seeds=[0, 1])
    return config, trials, measure_runs(trials)


@pytest.fixture(scope="module")
def written(comparison, tmp_path_factory):
    """The reports of all runs and of one alone, as two calls soon after each other write them."""
    trials = comparison[1]
    one = [t for t in trials if (t.variant, t.seed) == ("control", 0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cfg, "ROOT", tmp_path_factory.mktemp("root"))
        return [
            evaluate(trials, Evaluation(gallery=3), command="as typed"),
            evaluate(one),
        ]


@pytest.fixture
def runs(comparison, tmp_path):
    """A copy of the runs, to be spoilt."""
    return shutil.copytree(comparison[0].runs, tmp_path / "runs")


def change(runs, name, **fields):
    """Writes other values into a run's configuration: data__maps is config["data"]["maps"]."""
    file = runs / name / "config.json"
    config = json.loads(file.read_text())
    for path, value in fields.items():
        *parts, last = path.split("__")
        inner = config
        for part in parts:
            inner = inner[part]
        inner[last] = value
    file.write_text(json.dumps(config))


# ------------------------------------------------------------------------------------- which runs


def test_runs_are_found_by_name_or_path_and_seeds_are_one_variant(comparison):
    config, _, _ = comparison
    names = ["ft-s0", str(config.runs / "ft-s1"), "control-s0"]
    trials = load_trials(names, config.runs)
    assert [(t.variant, t.seed) for t in trials] == [("ft", 0), ("ft", 1), ("control", 0)]
    assert yardstick_variant(trials) == "control"
    assert yardstick_variant(trials[:2]) == "ft"
    assert yardstick_variant(trials, "ft") == "ft"
    with pytest.raises(ValueError, match='--against is "none", but the models are ft, control'):
        yardstick_variant(trials, "none")
    with pytest.raises(ValueError, match=r'"ft" has seeds \[1\] and "control" \[0\]'):
        yardstick_variant(trials[1:])


def test_runs_that_are_not_there_are_named(runs):
    cell = runs / "sweep" / "kl-l1-s0"
    cell.mkdir(parents=True)
    (cell / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no run kl-l1-s0 in .*there: sweep/kl-l1-s0, "):
        load_trials(["kl-l1-s0"], runs)
    with pytest.raises(ValueError, match="no run is named"):
        load_trials([], runs)
    (runs / "ft-s0" / "last.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="ft-s0 has no weights"):
        load_trials(["ft-s0"], runs)
    (runs / "ft-s0" / "result.json").write_text("{}")  # of a sweep
    with pytest.raises(FileNotFoundError, match="--keep-weights"):
        load_trials(["ft-s0"], runs)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"data__seed": 7}, "differ in their data .seed is 0 and 7."),
        ({"data__image_size": [32, 32]}, "differ in their data .image_size"),
        ({"model__overrides__patch_size": 8}, r"differ in the patch grid .\(4, 4\) and \(8, 8\)."),
    ],
)
def test_runs_of_other_items_are_not_compared(fields, says, runs):
    change(runs, "control-s0", **fields)
    with pytest.raises(ValueError, match=says):
        load_trials(["ft-s0", "control-s0"], runs)


def test_runs_of_other_classes_are_not_compared(runs):
    file = runs / "control-s0" / "classes.json"
    classes = json.loads(file.read_text())
    file.write_text(json.dumps(["else", *classes[1:]]))
    with pytest.raises(ValueError, match=f"differ in their classes .{classes[0]} and else"):
        load_trials(["ft-s0", "control-s0"], runs)


def test_one_variant_is_one_configuration_and_each_seed_once(runs):
    with pytest.raises(ValueError, match='are both "ft" of seed 0'):
        load_trials(["ft-s0", "ft-s0"], runs)
    change(runs, "ft-s1", train__lr=1.0)
    with pytest.raises(ValueError, match=r'one variant, "ft", but train.lr is 1.0'):
        load_trials(["ft-s0", "ft-s1"], runs)


def test_one_set_of_human_maps_measures_all(runs):
    change(runs, "control-s0", data__maps="none", data__flip=0.0)
    trials = load_trials(["control-s0", "ft-s0"], runs)
    dataset = common_dataset(trials, "test", "control")
    assert dataset.config.maps == "gaze" and dataset.table["has_map"].any()
    images = measure_runs(trials, dataset, runs / "tokens")
    assert images["cc"].notna().mean() > 0.9


# ------------------------------------------------------------------------------------ measurements


def test_runs_measure_as_trials_do(comparison):
    config, _, images = comparison
    trials = load_trials(["control-s1"], config.runs, "best")
    dataset = common_dataset(trials, "test", "control")
    found = measure_runs(trials, dataset, config.runs / "tokens")
    part = images[(images["variant"] == "control") & (images["seed"] == 1)].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, part)
    val = common_dataset(trials, "val", "control")
    assert len(measure_runs(trials, val, config.runs / "tokens", "best")) == len(val) == 16


def test_values_by_image_average_to_the_summary(comparison):
    _, _, images = comparison
    part = images[(images["variant"] == "control") & (images["seed"] == 0)]
    values, names = values_by_image(part)
    summary = summarise(part)
    assert {"top1", "cc", "conflicting", "agreeing", "on_decoy", "sigmoid"} <= set(names)
    for name in names:
        assert values[name].mean() == pytest.approx(summary[name], nan_ok=True), name


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60))
def test_the_calibration_error_is_that_of_its_definition(pairs):
    """Guo et al. (ICML 2017), image by image; one that is as sure as can be is in the last bin."""
    pairs = [(1.0, True), *pairs]
    confidence, right = (np.array(part, float) for part in zip(*pairs, strict=True))
    images = pd.DataFrame({"confidence": confidence, "top1": right.astype(bool)})
    expected = 0.0
    for k in range(10):
        inside = [min(sum(c >= j / 10 for j in range(1, 10)), 9) == k for c in confidence]
        if any(inside):
            gap = abs(confidence[inside].mean() - right[inside].mean())
            expected += gap * np.mean(inside)
    assert expected_calibration_error(images, bins=10) == pytest.approx(expected, abs=1e-6)
    bins = calibration(images.assign(variant="a", seed=0), bins=10)
    gaps = (bins["confidence"] - bins["accuracy"]).abs() * bins["images"] / len(images)
    assert len(bins) == 10 and bins["images"].sum() == len(images)
    assert gaps.sum() == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------------ report


def test_the_report_holds_everything_and_never_overwrites(comparison, written):
    _, trials, images = comparison
    first, second = written
    assert first != second and first.parent == second.parent and first.parent.name == "result"
    names = {path.name for path in first.iterdir()}
    figures = {
        f"{name}.{kind}"
        for name in ("comparison", "p_true", "history", "calibration", "attention", "accuracy_cc")
        for kind in ("png", "pdf")
    }
    tables = {"table", "seeds", "images", "baselines", "misclassified", "calibration", "tests"}
    tables = {f"{name}.csv" for name in tables} | {"table.md", "tests.md"}
    assert names == figures | tables | {
        *("result.txt", "config", "gallery.html", "gallery", "samples")
    }
    of_two = {"gallery.html", "gallery", "tests.csv", "tests.md"}  # one model has no other
    assert {path.name for path in second.iterdir()} == names - of_two
    assert len(list((first / "config").glob("*.json"))) == len(trials)
    assert len(pd.read_csv(first / "images.csv")) == len(images)
    wrong = pd.read_csv(first / "misclassified.csv")
    assert len(wrong) == (~images["top1"]).sum() and not wrong["top1"].any()
    text = (first / "result.txt").read_text()
    for words in (
        "as typed",
        torch.__version__,
        "HITL all blocks",
        "one reader",
        'minus "contr',
    ):
        assert words in text


def test_the_text_has_top_1_to_5_and_the_true_class_of_every_model(written):
    text, table = (written[0] / "result.txt").read_text(), pd.read_csv(written[0] / "table.csv")
    images = pd.read_csv(written[0] / "images.csv").query("variant == 'control'")
    lines = dict(re.findall(r"^(\S.*?)  +(.*)$", text, flags=re.MULTILINE))
    for k in range(1, 6):
        name = f"top-{k} accuracy" if k > 1 else "accuracy"
        assert f"{images[f'top{k}'].mean():.3f} ± " in lines[name]
    assert f"{images['p_true'].mean():.3f} ± " in lines["true class's probability, mean"]
    for name in ("min", "max"):
        found = images.groupby("seed")["p_true"].agg(name).mean()
        words = f"true class's probability, {name}imum"
        assert f"{found:.3f} ± " in lines[words]
        assert lines[words].count(" ± ") == 4 < len(table)  # models; maps predict nothing


def test_all_images_are_the_splits_together_and_each_by_itself(comparison, tmp_path):
    _, trials, images = comparison
    chosen = [t for t in trials if t.variant in ("control", "fine-tuned") and t.seed == 0]
    evaluate(chosen, Evaluation(split="all", out=tmp_path, gallery=2, samples=1))
    found = pd.read_csv(tmp_path / "images.csv")
    assert found.groupby(["variant", "split"]).size().unstack().to_dict("list") == {
        "train": [40, 40], "val": [16, 16], "test": [24, 24],
    }  # fmt: skip
    whole = pd.read_csv(tmp_path / "table.csv").set_index("model")
    mine = found[found["variant"] == "control"]
    for name in ("top1", "cc", "sauc", "p_true"):
        assert whole.loc["control", name] == pytest.approx(mine[name].mean())
    # A split's numbers are those of an evaluation of that split: whose gaze is "elsewhere", too.
    apart = images.query("variant == 'control' and seed == 0").set_index("image_id")
    test = mine[mine["split"] == "test"].set_index("image_id")
    pd.testing.assert_series_equal(test["sauc"], apart["sauc"], check_dtype=False)
    splits = pd.read_csv(tmp_path / "splits.csv").set_index(["split", "model"])
    assert splits.loc[("test", "control"), "cc"] == pytest.approx(apart["cc"].mean())
    mean_map = [splits.loc[(part, "mean map"), "cc"] for part in ("train", "val", "test")]
    assert whole.loc["mean map", "cc"] == pytest.approx(np.average(mean_map, weights=[40, 16, 24]))
    seeds = pd.read_csv(tmp_path / "seeds.csv")
    assert dict(zip(seeds["split"], seeds["images"], strict=True)) == {
        "all": 80, "train": 40, "val": 16, "test": 24,
    }  # fmt: skip
    text = (tmp_path / "result.txt").read_text()
    assert "all, 80 images (40 train, 16 val, 24 test), 8 classes" in text
    assert all(f"Of the {n} {part} images" in text for part, n in (("train", 40), ("test", 24)))
    page = Page((tmp_path / "gallery.html").read_text()).text
    assert "on 24 test images" in page


def test_samples_are_seen_through_their_maps(comparison, written):
    """Alpha is the value: a picture that somebody lays over the sample loses nothing."""
    _, trials, _ = comparison
    folder = written[0] / "samples"
    dataset = trials[0].run.dataset("test")
    model, chosen = trials[1].run.model(), evenly_spaced(dataset, 2)
    ids = [str(dataset.records[position].image_id) for position in chosen]
    assert {path.name for path in folder.iterdir()} == {*ids, *(f"{one}.png" for one in ids)}
    name = f"{trials[1].variant}-s0"
    assert (name, trials[1].seed) == ("control-s0", 0)
    for one, position in zip(ids, chosen, strict=True):
        assert len(list((folder / one).iterdir())) == 1 + 4 * (2 + model.num_heads)
        whole = np.array(Image.open(folder / one / "picture.png"))
        np.testing.assert_array_equal(whole, dataset.image(position))
        assert np.array(Image.open(folder / f"{one}.png")).std() > 10
        image = dataset[position]["image"][None]
        with torch.no_grad():
            row = model(image, rows="last")[1][model.depth - 1][0, :, model.num_prefix :]
            rolled = rollout(model.attention_matrices(image))[0, 0, model.num_prefix :]
        heads = torch.sigmoid(row)
        wanted = {"mean": heads.mean(0), "rollout": rolled / rolled.max()}
        wanted |= {f"head{k}": head for k, head in enumerate(heads, start=1)}
        for kind, values in wanted.items():
            found = np.array(Image.open(folder / one / f"{name}-{kind}.png"))
            assert found.shape == (64, 64, 4)
            cells = found[8::16, 8::16, 3] / 255  # middles of the patches
            np.testing.assert_allclose(cells, values.reshape(model.grid), atol=0.51 / 255)


def test_a_probability_that_is_not_among_the_first_five_is_told():
    image, names = np.full((40, 60, 3), 200, np.uint8), [f"class ${k}" for k in range(9)]
    models = {"a$b": (np.arange(9) / 36, {"rollout": np.ones((2, 3)), "mean": np.eye(2, 3)})}
    sheet = figures.sample_sheet(image, 1, names, models)
    told = [text.get_text() for text in sheet.axes[0].texts]
    assert {"wrong", "true class 0.028", "mean, 0.00 to 1.00"} <= set(told)
    assert sum("class" in words for words in told) == 5 + 2
    figures.plt.close(sheet)


def test_the_seeds_of_many_results_are_one_table(comparison, written):
    """What once was a file of its own, appended to by every evaluation."""
    _, trials, images = comparison
    first, second = written
    rows = pd.concat(map(pd.read_csv, sorted(first.parent.glob("*/seeds.csv"))))
    assert list(rows["result"]) == [first.name] * len(trials) + [second.name]
    assert list(rows["run"][:8]) == [trial.run.name for trial in trials]
    assert set(rows["data"]) == {"toy"} and set(rows["split"]) == {"test"}
    assert set(rows["which"]) == {"last"} and set(rows["images"]) == {24}
    assert set(rows["torch"]) == {torch.__version__} and rows["date"].str.match(r"\d{4}-").all()
    assert rows["timm"].notna().all()
    means = images.groupby(["variant", "seed"], sort=False)["cc"].mean()
    assert list(rows["cc"][:8]) == pytest.approx(list(means))


def test_the_table_has_means_spread_and_interval_and_the_maps_of_no_model(written, comparison):
    table = pd.read_csv(written[0] / "table.csv").set_index("model")
    assert list(table.index[-5:]) == [
        "perfect (estimate)",
        "one reader",
        "mean map",
        "another image",
        "uniform",
    ]
    control = pd.read_csv(written[0] / "seeds.csv").query("variant == 'control'")
    row = table.loc["control"]
    assert row["cc"] == pytest.approx(control["cc"].mean())
    assert row["cc_std"] == pytest.approx(control["cc"].std())
    assert row["cc_low"] < row["cc"] < row["cc_high"]
    assert row["ece"] == pytest.approx(control["ece"].mean()) and "ece_low" not in table
    mean_map = table.loc["mean map"]
    assert mean_map["cc_low"] < mean_map["cc"] < mean_map["cc_high"] and np.isnan(
        mean_map["cc_std"]
    )
    words = (written[0] / "table.md").read_text()
    assert f"{row['cc']:.3f} ± {row['cc_std']:.3f} [{row['cc_low']:.3f}, {row['cc_high']:.3f}]" in (
        words
    )
    lines = words.splitlines()
    assert {line.count(" | ") for line in lines} == {len(table)}  # a column a model or map
    assert [line.split(" | ")[0] for line in lines[2:4]] == [
        "| accuracy",
        "| conflicting-decoy accuracy",
    ]
    assert any(line.startswith("| shuffled AUC") for line in lines)


def test_a_pipe_in_a_name_does_not_end_a_markdown_cell():
    assert markdown(pd.DataFrame({"a|b": ["c|d"]})) == "| a\\|b |\n| --- |\n| c\\|d |\n"


def test_the_tests_are_of_the_others_against_the_control(written):
    tests = pd.read_csv(written[0] / "tests.csv")
    assert set(tests["variant"]) == {"fine-tuned", "HITL last block", "HITL all blocks"}
    assert set(tests["against"]) == {"control"} and (tests["seeds"] == 2).all()
    assert (tests["p_holm"] >= tests["p"]).all()
    seeds = pd.read_csv(written[0] / "seeds.csv").groupby("variant")["top1"].mean()
    top1 = tests[tests["metric"] == "top1"].set_index("variant")
    for name in top1.index:
        assert top1.loc[name, "difference"] == pytest.approx(seeds[name] - seeds["control"])
        fixed, broken = top1.loc[name, ["fixed", "broken"]]
        assert (fixed - broken) / (24 * 2) == pytest.approx(top1.loc[name, "difference"])


# ----------------------------------------------------------------------------------------- gallery


class Page(HTMLParser):
    """Links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name == "src"]

    def handle_data(self, data):
        self.text += data


def small_images():
    """Four images, two variants and seeds; control is right on the first two."""
    rows = []
    for variant, right in (("control", "1100"), ("better", "0111")):
        for seed in (0, 1):
            for image, is_right in enumerate(right):
                one = {"variant": variant, "seed": seed, "image_id": 50 + image, "predicted": image}
                one |= {"class_name": "c", "top1": is_right == "1", "confidence": 0.5}
                rows.append(one | {"p_true": 0.1 * image * (variant == "better") + 0.1 * seed})
    return pd.DataFrame(rows)


def test_changes_are_told_image_by_image_and_seed_by_seed():
    changes = gallery.changed_predictions(small_images(), "control")
    found = list(zip(changes["kind"], changes["image_id"], changes["seed"], strict=True))
    broken, fixed = [("broken", 50, s) for s in (0, 1)], [("fixed", i, s) for i in (52, 53)
                                                          for s in (0, 1)]  # fmt: skip
    assert found == broken + fixed
    assert list(changes["position"]) == [0, 0, 2, 2, 3, 3]
    assert changes["change"].to_list() == pytest.approx([0, 0, 0.2, 0.2, 0.3, 0.3])
    assert gallery.changed_predictions(small_images(), "better")["kind"].to_list() == (
        ["fixed", "fixed", "broken", "broken", "broken", "broken"]
    )


def test_the_rules_choose_what_they_say():
    changes = gallery.changed_predictions(small_images(), "control")
    first = gallery.choose(changes, 1)
    assert list(first["image_id"]) == [50, 52] and (first["seed"] == 0).all()
    assert sorted(gallery.choose(changes, 1, "change")["image_id"]) == [50, 53]
    assert len(gallery.choose(changes, 9)) == len(changes)


def test_the_page_shows_what_it_counts_and_its_pictures_are_there(written, comparison):
    _, _, images = comparison
    page = Page((written[0] / "gallery.html").read_text())
    changes = gallery.changed_predictions(images, "control")
    counts = changes.groupby(["variant", "kind"]).size()
    for (variant, kind), count in counts.items():
        assert re.search(rf"{variant}:[^()]*\b{count} {kind}", page.text)
        assert f"{kind.capitalize()} {min(3, count)} of {count} shown" in page.text
    cards = counts.clip(upper=3).sum()
    assert page.tags.count("article") == cards > 3
    assert page.tags.count("img") == 4 * cards
    for source in page.sources:  # relative: the folder can be moved
        picture = np.array(Image.open(written[0] / source).convert("RGB"))
        assert picture.shape == (280, 280, 3) and picture.std() > 1
    on_disk = {f"gallery/{path.name}" for path in (written[0] / "gallery").iterdir()}
    assert on_disk == set(page.sources)


def test_names_are_escaped_and_an_image_without_a_map_says_so(comparison, tmp_path):
    _, trials, images = comparison
    evil = "<script>alert(1)</script> & |"
    dataset = common_dataset(trials, "test", "control")
    dataset.classes = [evil] * len(dataset.classes)
    dataset._valid[:] = False
    renamed = {"HITL last block": evil}
    part = images.replace({"variant": renamed}).assign(class_name=evil)
    others = [Trial(renamed.get(t.variant, t.variant), t.seed, t.run) for t in trials]
    changes = gallery.changed_predictions(part, "control")
    options = Evaluation(against="control", gallery=1)
    text = gallery.write_gallery(tmp_path, others, dataset, changes, options).read_text()
    page = Page(text)
    assert "<script" not in text and "script" not in page.tags
    assert evil in page.text and "no map" in page.text
    assert page.tags.count("img") == 3 * page.tags.count("article")
