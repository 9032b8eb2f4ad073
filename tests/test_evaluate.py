"""The slow questions: which images are asked, what comes back, what is written."""

from __future__ import annotations

import pandas as pd
import pytest
from conftest import tiny_config

from lib import figures
from lib.__main__ import main
from lib.config import Evaluation
from lib.data.dataset import conflicting_decoys, evenly_spaced
from lib.evaluation.per_image import per_image
from lib.experiments import evaluate
from lib.experiments.compare import misled, train_comparison


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("runs"))
    told, watched = [], []
    options = {"watch": lambda progress: watched.append(len(progress.history)), "tell": told.append}
    trained = train_comparison(config, [0, 1], **options)
    assert told == trained and max(watched) == config.ft.epochs
    conflict = conflicting_decoys((test := trained[0].run.dataset("test")).table).to_numpy()
    right = per_image(trained[0].run.model(), test)["top1"].to_numpy()
    assert misled(trained[0]) == pytest.approx(right[conflict].mean())
    trials = [t for t in trained if t.variant != "fine-tuned"][:4]
    dataset = evaluate.common_dataset(trials, "test", "control")
    tables = evaluate.ask(trials, dataset, Evaluation(erase=6, curves=3, tokens=5))
    return trials, dataset, tables


def test_every_model_is_asked_on_the_same_images_spread_over_the_split(asked):
    trials, dataset, tables = asked
    for name, count in (("erasing", 6), ("curves", 3), ("tokens", 5)):
        expected = evenly_spaced(dataset, count)
        assert len(expected) == count and expected[0] == 0 and expected[-1] == len(dataset) - 1
        groups = tables[name].groupby(["variant", "seed"])
        assert len(groups) == len(trials)
        for _, part in groups:
            assert sorted(part["index"].unique()) == expected
    assert set(tables["areas"]["order"]) == {"attention", "random", "people", "mean map"}
    assert evenly_spaced(dataset, 1000) == list(range(len(dataset)))


def test_what_is_not_asked_is_not_there(asked):
    trials, dataset, _ = asked
    assert evaluate.ask(trials, dataset, Evaluation()) == {}
    assert list(evaluate.ask(trials[:1], dataset, Evaluation(tokens=2))) == ["tokens"]
    with pytest.raises(ValueError, match="curves is -1; use a number of images"):
        evaluate.ask(trials, dataset, Evaluation(curves=-1))


def test_seeds_are_averaged_and_images_are_not(asked):
    table = asked[2]["erasing"]
    found = evaluate.over_seeds(table)
    assert "seed" not in found
    keys = ["variant", "what", "rung", "index"]
    assert len(found) == len(table[keys].drop_duplicates()) < len(table)
    first = found.iloc[0]
    same = (table[keys] == first[keys]).all(axis=1)
    assert same.sum() == 2 and first["variant"] == "control"  # which alone has two seeds here
    assert first["p_true_change"] == pytest.approx(table[same]["p_true_change"].mean())


def test_words_and_figures_of_all_that_was_asked(asked):
    words = "\n\n".join(evaluate.answers_in_words(asked[2]))
    assert words.count("most attended patches") >= 2 and "deletion" in words and "flat" in words
    drawn = evaluate.draw_answers(asked[2])
    assert set(drawn) == {"erasing", "curves", "tokens"}
    assert len(drawn["curves"].axes) == 2 * asked[2]["curves"]["variant"].nunique()
    figures.plt.close("all")


def test_the_command_asks_and_tells(asked, monkeypatch, tmp_path, capsys):
    trials, dataset, _ = asked
    run = trials[0].run
    monkeypatch.setenv("RUNS_DIR", str(run.folder.parents[1]))
    out = tmp_path / "out"
    command = ["evaluate", str(run.folder), "--out", str(out), "--gallery", "0", "--erase"]
    assert main([*command, "3"]) == 0
    assert "most attended patches" in capsys.readouterr().out
    assert {"erasing.csv", "erasing.png", "erasing.pdf"} <= {path.name for path in out.iterdir()}
    expected = evaluate.ask(trials[:1], dataset, Evaluation(erase=3))["erasing"]
    assert len(pd.read_csv(out / "erasing.csv")) == len(expected)
    assert main([*command, "-3"]) == 2
