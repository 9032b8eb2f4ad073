"""Presets, and configurations to JSON and back."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from lib import config as cfg
from lib import files
from lib.config import HumanConfig, RunConfig, TrainConfig, preset
from lib.training.runs import fine_tuning, human_in_the_loop


def test_one_variable_flips_the_preset(monkeypatch, tmp_path):
    monkeypatch.delenv("PRESET", raising=False)
    assert preset().preset == "toy" and preset().data.name == "toy"
    monkeypatch.setenv("PRESET", "cub2011")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setenv("MODEL", "vit_small_patch14_dinov2")
    config = preset()
    assert config.data.name == "cub2011" and config.data.root == tmp_path
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
    for name in ("birds/a.png", "maps/birds/a.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert preset("folder").data.maps_dir == tmp_path / "maps" and preset("folder").variants
    (tmp_path / "maps" / "1.json").write_text('{"schema": 1, "image_id": "1"}')
    monkeypatch.setenv("MAPS", str(tmp_path / "maps"))
    assert preset("toy").data.maps == "corrections"
    monkeypatch.setenv("MAPS", "boxes")
    monkeypatch.setenv("CACHE", "1")
    data = preset("cub2011").data
    assert (data.maps, data.maps_dir, data.cache) == ("boxes", None, tmp_path / "decoded")
    monkeypatch.setenv("MAPS", "box")  # one word for the data's own maps and for the control
    monkeypatch.setenv("CLASSES", "21-40")
    assert data.classes is None and preset("cub2011").data == replace(data, classes="21-40")
    assert cfg.HumanConfig(maps="boxes") == cfg.HumanConfig(maps="box")
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


def test_what_the_device_chose_is_no_other_configuration():
    """A preset does not say in which precision a run was made; two that say so differ."""
    run = fine_tuning(preset("toy"), 0)
    said = {
        word: replace(run, train=replace(run.train, mixed_precision=word))
        for word in ("auto", "no", "bf16")
    }
    for one, other in itertools.product(said, said):
        found = cfg.difference(said[one], cfg.to_json(said[other]))
        assert (found is None) == (one == other or "auto" in (one, other)), (one, other)


def test_human_changes_only_what_is_named():
    run = human_in_the_loop(preset("toy"), "ft-s0", 3, lam=0.0)
    assert run.train.seed == 3 and run.train.human == HumanConfig(lam=0.0) and run.init == "ft-s0"


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"epochs": 0}, "epochs is 0"), ({"batch_size": 0}, "batch_size"), ({"lr": 0.0}, "lr is 0"),
     ({"human": HumanConfig(lam=-1)}, "lam -1"), ({"workers": -1}, "workers is -1")],
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


@pytest.fixture
def project(monkeypatch, tmp_path):
    """A project of which people stand in the folder, in notebooks/, or elsewhere."""
    for name in (
        *files.INPUTS,
        "PRESET",
        "RUNS_DIR",
        "CACHE",
        "MODEL",
        "TRAINABLE",
        "RECIPE",
        "PWD",
    ):
        monkeypatch.delenv(name, raising=False)
    for module in (cfg, files):
        monkeypatch.setattr(module, "ROOT", tmp_path / "project")
    for folder in ("project/notebooks/mine", "project/my photos/maps", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("split.json", "vit.pt", "my photos/maps/1.png"):
        (cfg.ROOT / file).write_text("{}")
    return cfg.ROOT


@pytest.mark.parametrize("stand", [".", "notebooks", "notebooks/mine"])
@pytest.mark.parametrize("write", ["{}", "{}/", '"{}"', " {} ", "./{}"])
def test_a_relative_path_means_the_same_in_commands_and_notebooks(
    stand, write, project, monkeypatch
):
    monkeypatch.chdir(project / stand)
    asked = {"DATA_DIR": "my photos", "MAPS": "my photos/maps", "SPLIT": "split.json"}
    asked |= {"WEIGHTS": "vit.pt", "RUNS_DIR": "trained", "CACHE": "decoded"}
    for name, text in asked.items():
        monkeypatch.setenv(name, write.format(text))
    config = preset("folder")
    data, photos = config.data, project / "my photos"
    assert (data.root, data.maps_dir, data.maps) == (photos, photos / "maps", "files")
    assert (data.split_file, data.cache) == (project / "split.json", project / "decoded")
    assert config.model.weights == project / "vit.pt"
    assert config.runs == project / "trained" / "folder"


def test_elsewhere_a_relative_path_starts_where_one_stands(project, monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_DIR", "my photos")
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "my photos").mkdir()
    assert preset("folder").data.root == tmp_path / "elsewhere" / "my photos"
    assert cfg.DataConfig(root="a", cache="~/b").root == tmp_path / "elsewhere" / "a"
    assert cfg.DataConfig(cache=Path("~/b")).cache == Path.home() / "b"
    assert cfg.ModelConfig(weights=Path("w.pt")).weights == tmp_path / "elsewhere" / "w.pt"
    assert cfg.ModelConfig().weights is None


def test_what_is_not_there_is_looked_for_in_every_place_that_could_be_meant(
    project, monkeypatch, tmp_path
):
    """JupyterLab started elsewhere: its kernels know the shell's folder as PWD."""
    notebooks, elsewhere = project / "notebooks", tmp_path / "elsewhere"
    monkeypatch.chdir(notebooks)
    monkeypatch.setenv("PWD", str(elsewhere))
    monkeypatch.setenv("DATA_DIR", "birds")
    with pytest.raises(FileNotFoundError) as caught:
        preset("folder")
    assert str(caught.value) == (
        f"{project / 'birds'} is missing, and so is {notebooks / 'birds'}, and so is "
        f'{elsewhere / "birds"} (DATA_DIR is "birds"); set DATA_DIR to the folder that holds the '
        "data."
    )
    for folder in (elsewhere, notebooks, project):  # the last one that is made is meant first
        (folder / "birds").mkdir()
        assert preset("folder").data.root == folder / "birds"
    monkeypatch.setenv("MAPS", "boxs")
    with pytest.raises(FileNotFoundError, match=r"boxs is missing.*set MAPS to gaze, boxes"):
        preset("folder")
    monkeypatch.setenv("MAPS", "none")
    monkeypatch.setenv("WEIGHTS", "absent.pt")  # told by whoever loads them
    assert preset("folder").model.weights == project / "absent.pt"


def test_an_empty_variable_is_not_set(project, monkeypatch):
    unset = cfg.to_json(preset("folder"))
    for name in (*files.INPUTS, "RUNS_DIR", "CACHE", "MODEL", "TRAINABLE", "RECIPE"):
        monkeypatch.setenv(name, " ")
    assert cfg.to_json(preset("folder")) == unset
