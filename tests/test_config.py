"""Presets, and configurations to JSON and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lib import config as cfg
from lib.config import HumanConfig, RunConfig, TrainConfig, preset
from lib.train import fine_tuning, human_in_the_loop


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
def test_every_comparison_has_a_control(name):
    config = preset(name)
    assert config.variants["control"]["lam"] == 0
    assert len(config.variants) >= 3


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
