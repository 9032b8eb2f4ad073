"""Training on drawn birds with a tiny ViT: both stages, determinism, runs on disk."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lib import train
from lib.config import Config, ModelConfig, preset
from lib.train import (
    Run,
    RunConflict,
    TrainingDiverged,
    fine_tuning,
    human_in_the_loop,
    starting_point,
    train_run,
)


def tiny_config(runs: Path) -> Config:
    """The toy preset, but a few images, a few steps and a few parameters."""
    config = preset("toy")
    config.data = replace(config.data, toy_train=40, toy_val=16, toy_test=24)
    sizes = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config.model = ModelConfig("vit_tiny_patch16_224", None, sizes)
    config.ft = replace(config.ft, epochs=2, batch_size=16)
    config.hitl = replace(config.hitl, epochs=2, batch_size=16)
    config.runs = runs
    return config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(tmp_path / "runs")


def state(run: Run) -> dict[str, torch.Tensor]:
    return run.model().state_dict()


def test_both_stages_end_to_end(config):
    ft = train_run("ft", fine_tuning(config, 0), config.runs)
    names = sorted(path.name for path in ft.folder.iterdir())
    assert names == ["best.safetensors", "classes.json", "config.json", "history.csv",
                     "last.safetensors"]  # fmt: skip
    assert len(ft.classes) == 8 and len(ft.history) == 2
    assert (ft.history["human_loss"] == 0).all()
    settings = human_in_the_loop(config, "ft", 0, blocks="all")
    hitl = train_run("hitl", settings, config.runs)
    assert (hitl.history["human_loss"] > 0).all()
    model, _ = starting_point(settings, config.runs)
    before = state(ft)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert any(not torch.equal(before[key], value) for key, value in state(hitl).items())
    for which in ("last", "best"):
        assert torch.isfinite(hitl.model(which)(torch.zeros(1, 3, 64, 64))).all()


def test_same_seed_same_weights_and_another_seed_others(config):
    runs = [
        train_run(name, fine_tuning(config, seed), config.runs)
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    a, b, c = map(state, runs)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_a_run_is_loaded_when_it_is_there_and_refused_when_it_differs(config):
    first = train_run("ft", fine_tuning(config, 0), config.runs)
    stamp = (first.folder / "last.safetensors").stat().st_mtime_ns
    again = train_run("ft", fine_tuning(config, 0), config.runs)
    assert again == first and (first.folder / "last.safetensors").stat().st_mtime_ns == stamp
    other = fine_tuning(config, 1)
    with pytest.raises(RunConflict, match=r"train\.seed is 0 there and 1 here"):
        train_run("ft", other, config.runs)
    assert train_run("ft", other, config.runs, overwrite=True).config.train.seed == 1


def test_a_run_that_stopped_half_way_is_trained_again(config):
    run = train_run("ft", fine_tuning(config, 0), config.runs)
    history = run.history
    train.write_text(run.folder / "history.csv", history.head(1).to_csv(index=False))
    with pytest.raises(FileNotFoundError, match="1 of 2 epochs"):
        Run.load(run.folder)
    assert len(train_run("ft", fine_tuning(config, 0), config.runs).history) == 2
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Run.load(config.runs / "nothing")


@pytest.mark.parametrize(
    ("trainable", "moving"),
    [("head", {"head"}), ("last_block", {"head", "norm", "blocks.1"})],
)
def test_frozen_parts_stay(config, trainable, moving):
    config.ft = replace(config.ft, trainable=trainable)
    settings = fine_tuning(config, 0)
    start = starting_point(settings, config.runs)[0].vit.state_dict()
    start = {key: value.clone() for key, value in start.items()}
    end = train_run("ft", settings, config.runs).model().vit.state_dict()
    changed = {key for key in start if not torch.equal(start[key], end[key])}
    assert changed and all(key.startswith(tuple(moving)) for key in changed)
    assert {part for part in moving if any(key.startswith(part) for key in changed)} == moving


def test_supervising_a_frozen_block_is_refused(config):
    config.hitl = replace(config.hitl, trainable="last_block")
    train_run("ft", fine_tuning(config, 0), config.runs)
    with pytest.raises(ValueError, match="block 0 is supervised"):
        train_run("x", human_in_the_loop(config, "ft", 0, blocks="all"), config.runs)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(config, monkeypatch):
    calls = []
    plain = train.loss_terms

    def poisoned(model, batch, settings):
        calls.append(1)
        cross_entropy, human_loss, scores = plain(model, batch, settings)
        return cross_entropy * (float("nan") if len(calls) > 4 else 1.0), human_loss, scores

    monkeypatch.setattr(train, "loss_terms", poisoned)
    with pytest.raises(TrainingDiverged, match="lower lr"):
        train_run("ft", fine_tuning(config, 0), config.runs)
    assert (config.runs / "ft" / "last.safetensors").is_file()  # of epoch 1: 3 steps of 16 images
    with pytest.raises(FileNotFoundError, match="1 of 2 epochs"):
        Run.load(config.runs / "ft")


def test_the_human_term_reaches_the_weights(config):
    """The maps of the training images are met better than by the control."""
    config.hitl = replace(config.hitl, epochs=6, lr=3e-3)
    train_run("ft", fine_tuning(config, 0), config.runs)
    left = {}
    for lam in (0.0, 10.0):
        run = train_run(f"l{lam}", human_in_the_loop(config, "ft", 0, lam=lam), config.runs)
        batch = next(iter(DataLoader(run.dataset("train"), batch_size=40)))
        with torch.no_grad():
            left[lam] = train.loss_terms(run.model(), batch, config.hitl)[1].item()
    assert left[10.0] < 0.95 * left[0.0]


def test_weight_decay_and_head_rate_go_where_they_should(config):
    model, _ = starting_point(fine_tuning(config, 0), config.runs)
    settings = replace(config.ft, head_lr_factor=10.0, lr=1e-3)
    of = {}
    for group in train.parameter_groups(model, settings):
        for parameter in group["params"]:
            of[id(parameter)] = (group["lr"], group["weight_decay"])
    vit = model.vit
    assert of[id(vit.head.weight)] == (1e-2, 0.05) and of[id(vit.head.bias)] == (1e-2, 0.0)
    assert of[id(vit.blocks[0].mlp.fc1.weight)] == (1e-3, 0.05)
    assert of[id(vit.blocks[0].norm1.weight)] == (1e-3, 0.0)
    assert of[id(vit.pos_embed)] == (1e-3, 0.0) and of[id(vit.cls_token)] == (1e-3, 0.0)
    assert len(of) == len(list(model.parameters()))


def test_learning_rate_rises_then_falls_to_zero():
    factors = [train.learning_rate_factor(step, 100, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == 1.0 == factors[9]
    assert factors[100] == pytest.approx(0.0, abs=1e-9)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_cached_tokens_train_and_measure_as_the_whole_model_does(config):
    """Same losses to 1e-3 without augmentation; the trunk of a comparison is run once."""
    config.ft = replace(config.ft, trainable="last_block")
    config.data = replace(config.data, crop_scale=(1.0, 1.0), flip=0.0)
    settings = fine_tuning(config, 0)
    model, _ = starting_point(settings, config.runs)
    dataset = train.dataset_for(model, settings, "train", augment=False)
    cached = train.with_cached_tokens(model, dataset, settings)
    assert train.with_cached_tokens(model, dataset, settings) is cached
    stage = replace(config.hitl, human=replace(config.hitl.human, loss="kl"))
    for parts in zip(
        DataLoader(dataset, batch_size=16), DataLoader(cached, batch_size=16), strict=True
    ):
        plain, quick = (train.loss_terms(model, part, stage)[:2] for part in parts)
        assert torch.allclose(torch.stack(plain), torch.stack(quick), atol=1e-3)
    run = train_run(
        "c", replace(settings, train=replace(config.ft, cache_tokens=True)), config.runs
    )
    assert run.history["val_top1"].between(0, 1).all()
    with torch.no_grad():
        model.vit.blocks[0].mlp.fc1.weight.add_(1.0)
    assert train.with_cached_tokens(model, dataset, settings) is not cached


def test_cached_tokens_need_a_frozen_trunk(config):
    with pytest.raises(ValueError, match="cache_tokens"):
        replace(config.ft, cache_tokens=True)
