"""Presets, and configurations to JSON and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lib import config as cfg
from lib.config import HumanConfig, RunConfig, TrainConfig, preset
from lib.training.runs import fine_tuning, human_in_the_loop


def test_one_variable_flips_the_preset(monkeypatch):
    monkeypatch.delenv("PRESET", raising=False)
    assert preset().preset == "toy" and preset().data.name == "toy"
    monkeypatch.setenv("PRESET", "cub2011")
    monkeypatch.setenv("DATA_DIR", "/elsewhere")
    monkeypatch.setenv("MODEL", "vit_small_patch14_dinov2")
    config = preset()
    assert config.data.name == "cub2011" and config.data.root == Path("/elsewhere")
    assert config.model.name == "vit_small_patch14_dinov2"
    assert config.model.weights.name == "vit_small_patch14_dinov2.pt"
    monkeypatch.setenv("WEIGHTS", "/w.safetensors")
    monkeypatch.setenv("RUNS_DIR", "/kept")
    assert preset().model.weights == Path("/w.safetensors")
    assert preset().runs == Path("/kept/cub2011")
    monkeypatch.setenv("PRESET", "cub")
    with pytest.raises(ValueError, match="cub2011"):
        preset()


@pytest.mark.parametrize("name", cfg.PRESETS)
def test_every_comparison_has_a_control(name, monkeypatch, tmp_path):
    monkeypatch.setenv("MAPS", str(tmp_path))
    config = preset(name)
    assert config.variants["control"]["lam"] == 0
    assert len(config.variants) >= 3


def test_the_environment_says_where_maps_split_and_cache_are(monkeypatch, tmp_path):
    for name in ("MAPS", "SPLIT", "CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert [preset(n).data.maps for n in cfg.PRESETS] == ["gaze", "gaze", "none", "none"]
    assert [*preset("folder").variants] == ["control"] and preset("folder").data.cache is None
    (tmp_path / "maps").mkdir()
    assert preset("folder").data.maps_dir == tmp_path / "maps" and preset("folder").variants
    (tmp_path / "maps" / "1.json").write_text("{}")
    monkeypatch.setenv("MAPS", str(tmp_path / "maps"))
    assert preset("toy").data.maps == "corrections"
    monkeypatch.setenv("MAPS", "boxes")
    monkeypatch.setenv("CACHE", "1")
    data = preset("cub2011").data
    assert (data.maps, data.maps_dir, data.cache) == ("boxes", None, tmp_path / "decoded")
    monkeypatch.setenv("CACHE", str(tmp_path / "elsewhere"))
    assert preset("cub2011").data.cache == tmp_path / "elsewhere"
    split = tmp_path / "split.json"
    monkeypatch.setenv("SPLIT", str(split))
    with pytest.raises(FileNotFoundError, match=r"split.json is missing; make it with"):
        preset("cub2011")
    split.write_text("{}")
    assert preset("cub2011").data.split_md5 == "99914b932bd37a50b983c5e7c90ae93b"


@pytest.mark.parametrize("name", cfg.PRESETS)
def test_json_there_and_back(name):
    config = preset(name)
    for run in (fine_tuning(config, 1), human_in_the_loop(config, "ft-s1", 1, blocks=(1, 2))):
        text = cfg.to_json(run)
        assert cfg.from_json(RunConfig, text) == run
        assert cfg.difference(run, text) is None
        other = replace(run, train=replace(run.train, lr=0.5))
        assert "train.lr" in cfg.difference(other, text)


def test_human_changes_only_what_is_named():
    run = human_in_the_loop(preset("toy"), "ft-s0", 3, lam=0.0)
    assert run.train.seed == 3 and run.train.human == HumanConfig(lam=0.0) and run.init == "ft-s0"


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"epochs": 0}, "epochs is 0"), ({"batch_size": 0}, "batch_size"), ({"lr": 0.0}, "lr is 0"),
     ({"human": HumanConfig(lam=-1)}, "lam -1")],
)  # fmt: skip
def test_impossible_training_is_refused_in_words(changes, says):
    with pytest.raises(ValueError, match=says):
        TrainConfig(**changes)


def test_recipes_change_the_training_and_nothing_else():
    first, tuned = preset("toy", recipe="original"), preset("toy")
    assert (first.ft.optimizer, first.ft.lr, first.ft.batch_size) == ("adam", 1e-5, 128)
    assert first.ft.warmup == 0 and first.ft.schedule == "constant"
    assert (first.data.crop_scale[0] ** 0.5) == pytest.approx(179 / 224, abs=1e-3)
    assert first.data.crop_ratio is None and first.hitl.human == tuned.hitl.human
    assert (first.ft.epochs, first.model, first.variants) == (
        tuned.ft.epochs,
        tuned.model,
        tuned.variants,
    )
    with pytest.raises(ValueError, match='recipe is "best"; use one of tuned, original'):
        preset("toy", recipe="best")


def test_what_learns_comes_from_the_environment(monkeypatch):
    for word, cached in (("last_block", True), ("3", True), ("all", False)):
        monkeypatch.setenv("TRAINABLE", word)
        stage = preset("cub2011").ft
        assert str(stage.trainable) == word and stage.cache_tokens == cached
        assert not preset("cub2011", "original").ft.cache_tokens  # its crops need pictures


@pytest.mark.parametrize(
    ("field", "value"),
    [("warmup", 1.0), ("ema", 1.0), ("drop_path", -0.1), ("layer_decay", 0.0), ("log_every", 0)],
)
def test_values_outside_their_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{field: value})


def test_a_field_that_an_older_run_did_not_have_was_the_default():
    config = human_in_the_loop(preset("toy"), "ft-s0", 0)
    older = json.loads(cfg.to_json(config))
    del older["train"]["human"]["noise"]
    assert cfg.difference(config, json.dumps(older)) is None
    config.train.human = replace(config.train.human, noise="blurred")
    found = cfg.difference(config, json.dumps(older))
    assert found == "train.human.noise is 'none' there and 'blurred' here"
