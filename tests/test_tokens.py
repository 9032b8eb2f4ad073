"""Cached tokens: equal to the whole model, found again, and not where they are not the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from lib import tokens, train
from lib.runs import dataset_for, fine_tuning, starting_point, train_run


def test_cached_tokens_train_and_measure_as_the_whole_model_does(config, tmp_path):
    """Same losses to 1e-3 without augmentation; the trunk of a comparison is run once."""
    config.ft = replace(config.ft, trainable="last_block")
    config.data = replace(config.data, crop_scale=(1.0, 1.0), flip=0.0)
    settings = fine_tuning(config, 0)
    model, _ = starting_point(settings, config.runs)
    dataset = dataset_for(model, settings, "train", augment=False)
    cached = tokens.with_cached_tokens(model, dataset, settings, tmp_path)
    assert tokens.with_cached_tokens(model, dataset, settings, tmp_path) is cached
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
    assert tokens.with_cached_tokens(model, dataset, settings, tmp_path) is not cached


def test_cached_tokens_need_a_frozen_trunk(config):
    with pytest.raises(ValueError, match="cache_tokens"):
        replace(config.ft, cache_tokens=True)
