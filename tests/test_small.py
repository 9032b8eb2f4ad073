"""A few pictures of a few classes, with human maps or without: everything runs, or says why not."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from IPython.display import display
from PIL import Image
from safetensors.torch import load_file

from lib import config as cfg
from lib.config import Config, Evaluation, ModelConfig, Sweep, preset
from lib.data.dataset import make_dataset, read_records
from lib.data.sources import as_listing, choose_split
from lib.data.splits import Row, validation_in_words
from lib.evaluation.per_image import middle, unwatched
from lib.experiments import evaluate as evaluation
from lib.experiments.compare import train_comparison
from lib.experiments.evaluate import evaluate
from lib.experiments.sweep import run_sweep
from lib.training.loop import tell_few
from lib.training.runs import Run, fine_tuning, train_run

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CLASSES = ("red", "green", "blue")


def draw(home: Path, counts: tuple[int, ...], maps: tuple[str, ...] = ()) -> Path:
    """Noise with a patch of the class's colour; a map of that patch for the pictures named."""
    rng = np.random.default_rng(0)
    for label, count in enumerate(counts):
        for j in range(count):
            name, (y, x) = f"{CLASSES[label]}/{j}", rng.integers(5, 35, 2)
            pixels = rng.integers(0, 200, (60, 60, 3), dtype=np.uint8)
            pixels[y : y + 20, x : x + 20, label] = 255
            human = np.zeros((60, 60), np.uint8)
            human[y : y + 20, x : x + 20] = 255
            pictures = {home / f"{name}.png": pixels}
            pictures |= {home / "maps" / f"{name}.png": human} if name in maps else {}
            for file, values in pictures.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(file)
    return home


def small(home: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The preset of anybody's pictures, with a model of a few parameters."""
    for name in ("MAPS", "SPLIT", "CACHE", "TRAINABLE", "MODEL", "WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATA_DIR", str(home))
    config = preset("folder")
    config.data = replace(config.data, image_size=(64, 64))
    sizes = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config.model = ModelConfig("vit_tiny_patch16_224", None, sizes)
    config.ft, config.hitl = (
        replace(part, epochs=2, workers=0) for part in (config.ft, config.hitl)
    )
    config.runs = home.parent / "runs"
    return config


EVERY = tuple(f"{name}/{j}" for name in CLASSES for j in range(4))


@pytest.mark.parametrize(("counts", "maps"), [((2, 3, 4), EVERY[::3]), ((2, 2), ())])
def test_few_pictures_run_from_end_to_end(tmp_path, monkeypatch, counts, maps):
    config = small(draw(tmp_path / "data", counts, maps), monkeypatch)
    # Drawn they are; to render them twice each takes longer than all the rest.
    monkeypatch.setattr(evaluation, "_save_figures", lambda folder, drawn: plt.close("all"))
    trials = train_comparison(config, [0])
    names = [trial.variant for trial in trials]
    assert (
        names
        == ["fine-tuned", "control", "HITL mse", "HITL kl", "HITL kl mean"][: 5 if maps else 2]
    )
    asked = {"erase": 3, "curves": 2, "tokens": 3}
    folder = evaluate(trials, Evaluation(out=tmp_path / "result", **asked))
    written = {path.name for path in folder.iterdir()}
    assert {"result.txt", "table.csv", "tests.csv", "gallery.html", "erasing.csv"} <= written
    # Of every class one picture is for testing; of one with three others, one for validation.
    validated = sum(count > 3 for count in counts)
    assert len(pd.read_csv(folder / "images.csv")) == len(trials) * len(counts)
    axes = Sweep(loss=("kl",), lam=(0.0, 1.0) if maps else (0.0,))
    table, failed = run_sweep(config, axes, tmp_path / "sweep.csv")
    assert not failed and set(table["status"]) == {"measured"}
    assert table.loc[table["split"] == "test", "top1"].notna().all()
    assert table.loc[table["split"] == "val", "top1"].notna().all() == (validated > 0)


def test_without_validation_the_last_epoch_is_the_best(tmp_path, monkeypatch):
    config = small(draw(tmp_path / "data", (2, 2)), monkeypatch)
    tell_few.cache_clear()
    with pytest.warns(UserWarning, match="no validation pictures: .* the best epoch is the last"):
        run = train_run("ft-s0", fine_tuning(config, 0), config.runs)
    assert run.history["val_top1"].isna().all() and run.history["train_top1"].notna().all()
    last, best = (load_file(run.folder / f"{which}.safetensors") for which in ("last", "best"))
    assert all(torch.equal(last[name], best[name]) for name in last)
    Run.load(run.folder, "best").model("best")
    with pytest.raises(ValueError, match="there are no val images to measure on; use another"):
        evaluate(["ft-s0"], Evaluation(split="val", out=tmp_path / "result"), config.runs)


def test_how_little_a_validation_means_is_said_once(tmp_path, monkeypatch):
    config = small(draw(tmp_path / "data", (4, 4, 4)), monkeypatch)
    tell_few.cache_clear()
    with pytest.warns(UserWarning, match="3 validation pictures: one is 33 points of accuracy"):
        train_run("ft-s0", fine_tuning(config, 0), config.runs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_run("ft-s1", fine_tuning(config, 1), config.runs)
    assert validation_in_words(1).startswith("1 validation picture: one is 100 points")
    assert validation_in_words(20) == ""


def test_maps_of_other_pictures_than_those_for_training_teach_nothing(tmp_path, monkeypatch):
    """Variants that want maps are left out, and it is said; the maps are measured with."""
    home = draw(tmp_path / "data", (4, 4, 4))
    held_out = [record.image for record in read_records(small(home, monkeypatch).data, "test")[0]]
    draw(home, (4, 4, 4), tuple(f"{path.parent.name}/{path.stem}" for path in held_out))
    config = small(home, monkeypatch)
    with pytest.warns(UserWarning, match='"HITL kl" is left out: lam is 0.1, but none of the 6'):
        trials = train_comparison(config, [0])
    assert [trial.variant for trial in trials] == ["fine-tuned", "control"]
    folder = evaluate(trials, Evaluation(out=tmp_path / "result", gallery=0))
    assert pd.read_csv(folder / "images.csv")["cc"].notna().all()


def test_one_class_is_refused_in_one_sentence(tmp_path, monkeypatch):
    config = small(draw(tmp_path / "data", (8,)), monkeypatch)
    with pytest.raises(
        ValueError, match=r"data has one class alone, 'red': .* two classes or more"
    ):
        train_run("ft-s0", fine_tuning(config, 0), config.runs)


@given(counts=st.lists(st.integers(2, 30), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_every_class_trains_and_tests_and_one_of_three_validates(counts, seed):
    rows = [Row(f"c{k}/{j}.png", k, f"{j}") for k, n in enumerate(counts) for j in range(n)]
    names = tuple(f"c{k}" for k in range(len(counts)))
    listing = as_listing(Path("."), Path("."), rows, names, None)
    split = choose_split(cfg.DataConfig("folder", maps="none", seed=seed), listing)
    assert {*split.train, *split.val, *split.test} == {*rows}
    for label, count in enumerate(counts):
        train, val, test = (
            sum(row.label == label for row in part) for part in (split.train, split.val, split.test)
        )
        assert train >= 1 and test >= 1 and train + val + test == count
        assert val >= 1 if train + val >= 3 else val == 0


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 4), (14, 14)])
def test_what_nobody_looked_at_is_all_but_the_middle(tmp_path, monkeypatch, grid):
    inside = middle(grid)
    assert inside.any() and inside.flip(0).equal(inside) and len(inside) == grid[0] * grid[1]
    config = small(draw(tmp_path / "data", (4, 4, 4), EVERY[::2]), monkeypatch)
    dataset = make_dataset(config.data, "train", grid, (0.5,) * 3, (0.5,) * 3)
    away, human = unwatched(dataset), dataset.maps[0].flatten(1)
    assert 0 < dataset.has_map.sum() < len(dataset)
    for i, has_map in enumerate(dataset.has_map):
        is_watched = human[i] >= 0.1 if has_map and (human[i] < 0.1).any() else inside
        assert away[i].equal(~is_watched)


# Those that are about human maps; `tools/execute_notebooks.py --check` runs all of them so.
@pytest.mark.parametrize("number", ["04", "05", "07"])
def test_notebooks_run_without_human_maps(tmp_path, monkeypatch, number):
    """The code of their cells, with a small model, as a kernel would run it."""
    home, weights = draw(tmp_path / "data", (4, 4, 4)), tmp_path / "test_vit.pt"
    torch.save(timm.create_model("test_vit").state_dict(), weights)
    root = tmp_path / "project"  # the folder of the result goes there
    root.mkdir()
    (root / "docs").symlink_to(cfg.ROOT / "docs")
    monkeypatch.setattr(cfg, "ROOT", root)
    for name in ("MAPS", "SPLIT", "CACHE", "TRAINABLE", "RECIPE"):
        monkeypatch.delenv(name, raising=False)
    places = {"DATA_DIR": home, "WEIGHTS": weights, "RUNS_DIR": tmp_path / "runs"}
    for name, value in (places | {"PRESET": "folder", "MODEL": "test_vit"}).items():
        monkeypatch.setenv(name, str(value))
    file = next(NOTEBOOKS.glob(f"{number}_*.ipynb"))
    space = {"display": display}
    for place, cell in enumerate(json.loads(file.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{file.name}, cell {place}", "exec"), space)
            plt.close("all")
