"""Cached tokens: equal to the whole model, found again, and not where they are not the same."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lib.config import DataConfig
from lib.experiments.compare import Trial
from lib.experiments.evaluate import measure_runs
from lib.model.predict import loader
from lib.training import tokens
from lib.training.loop import loss_terms
from lib.training.runs import dataset_for, fine_tuning, starting_point, train_run


def test_cached_tokens_train_and_measure_as_the_whole_model_does(config, tmp_path):
    """Same losses to 1e-3 without augmentation; the trunk of a comparison is run once."""
    config.ft = replace(config.ft, trainable="last_block")
    config.data = replace(config.data, crop_scale=(1.0, 1.0), flip=0.0)
    settings = fine_tuning(config, 0)
    model, _ = starting_point(settings, config.runs)
    dataset = dataset_for(model, settings, "train", augment=False)
    cached = tokens.with_cached_tokens(model, dataset, settings, tmp_path)
    again = tokens.with_cached_tokens(model, dataset, settings, tmp_path)
    assert again.tokens is cached.tokens
    stage = replace(config.hitl, human=replace(config.hitl.human, loss="kl"))
    loaded = (loader(part, 16, torch.device("cpu")) for part in (dataset, cached))
    for parts in zip(*loaded, strict=True):
        plain, quick = (loss_terms(model, part, stage)[:2] for part in parts)
        assert torch.allclose(torch.stack(plain), torch.stack(quick), atol=1e-3)
    run = train_run(
        "c", replace(settings, train=replace(config.ft, cache_tokens=True)), config.runs
    )
    assert run.history["val_top1"].between(0, 1).all()
    with torch.no_grad():
        model.vit.blocks[0].mlp.fc1.weight.add_(1.0)
    again = tokens.with_cached_tokens(model, dataset, settings, tmp_path)
    assert not torch.equal(again.tokens, cached.tokens)


def test_tokens_are_copied_some_batches_at_a_time(config, monkeypatch):
    """Each image its own, the last few as well; an item is a row of a batch."""
    settings = fine_tuning(config, 0)
    model, _ = starting_point(settings, config.runs)
    dataset = dataset_for(model, settings, "train", augment=False)
    whole = tokens.CachedTokens(model, dataset, 1)
    whole.keep(range(40))
    monkeypatch.setattr(tokens, "TRUNK_BATCH", 3)
    monkeypatch.setattr(tokens, "FETCHED", 4)
    some = tokens.CachedTokens(model, dataset, 1)
    some.keep([7, 3])
    some.keep(range(39, -1, -1))
    assert torch.allclose(some.tokens.float(), whole.tokens.float(), atol=1e-2)
    batch, item = some.batch([5, (7, 123)]), some[7]
    assert batch["index"].tolist() == [5, 7]
    assert batch.keys() == item.keys()
    assert all(torch.equal(batch[name][1], item[name]) for name in item)


def test_the_trunk_computes_as_the_steps_do(config, tmp_path):
    """For training images; what is measured has tokens of its own, in float32."""
    config.ft = replace(config.ft, trainable="last_block", cache_tokens=True)
    settings = fine_tuning(config, 0)
    model, dataset = starting_point(settings, config.runs)
    asked = (model, dataset, settings, tmp_path)
    plain, mixed = (tokens.with_cached_tokens(*asked, word).tokens for word in ("no", "bf16"))
    assert not torch.equal(plain, mixed) and torch.allclose(plain, mixed, atol=0.1)
    assert tokens.with_cached_tokens(*asked).tokens is plain
    settings.train = replace(settings.train, mixed_precision="bf16")
    run = train_run("mixed", settings, config.runs)
    assert len(list((config.runs / "tokens").glob("*.safetensors"))) == 2
    measured = measure_runs([Trial("mixed", 0, run)], run.dataset("val"))
    last = run.history.iloc[-1]
    assert last["val_class_token"] == pytest.approx(measured["class_token"].mean(), rel=1e-6)
    assert len(list((config.runs / "tokens").glob("*.safetensors"))) == 2


def test_cached_tokens_need_a_frozen_trunk(config):
    with pytest.raises(ValueError, match="cache_tokens"):
        replace(config.ft, cache_tokens=True)


@pytest.mark.parametrize(("trainable", "blocks"), [("head", 1), ("last_block", 1), (2, 2)])
def test_tokens_before_the_blocks_that_learn(config, tmp_path, monkeypatch, trainable, blocks):
    """The same losses as the whole model, whatever part learns; the second time from disk."""
    tokens.forget_tokens()
    config.model.overrides["depth"] = 3
    config.ft = replace(config.ft, trainable=trainable)
    config.data = replace(config.data, crop_scale=(1.0, 1.0), flip=0.0)
    settings = fine_tuning(config, 0)
    model, _ = starting_point(settings, config.runs)
    dataset = dataset_for(model, settings, "train", augment=False)
    cached = tokens.with_cached_tokens(model, dataset, settings, tmp_path)
    assert cached.blocks == blocks and cached.tokens.dtype == torch.float16
    plain, quick = (next(iter(loader(part, 16, torch.device("cpu")))) for part in (dataset, cached))
    stage = replace(settings.train, human=replace(config.hitl.human, loss="kl"))
    with torch.no_grad():
        losses = [torch.stack(loss_terms(model, b, stage)[:2]) for b in (plain, quick)]
    assert torch.allclose(*losses, atol=1e-3)
    monkeypatch.setattr(tokens, "_run_trunk", None)  # nothing is computed any more
    tokens.forget_tokens()
    again = tokens.with_cached_tokens(model, dataset, settings, tmp_path)
    assert torch.equal(again.tokens, cached.tokens)


def test_maps_are_read_anew_and_another_architecture_is_another_trunk(config, tmp_path):
    """A correction that was painted since is seen; the trunk is not run for it again."""
    config.ft = replace(config.ft, trainable="last_block")
    settings = fine_tuning(config, 0)
    model, _ = starting_point(settings, config.runs)
    dataset = dataset_for(model, settings, "train", augment=False)
    first = tokens.with_cached_tokens(model, dataset, settings, tmp_path)
    wider = replace(settings, data=replace(config.data, sigma=3.0))
    second = tokens.with_cached_tokens(
        model, dataset_for(model, wider, "train", augment=False), wider, tmp_path
    )
    assert second.tokens is first.tokens
    assert not torch.equal(second[0]["human"], first[0]["human"])
    config.model.overrides["num_heads"] = 4  # the same weights, read as other heads
    other, _ = starting_point(fine_tuning(config, 0), config.runs)
    other.load_state_dict(model.state_dict())
    third = tokens.with_cached_tokens(other, dataset, fine_tuning(config, 0), tmp_path)
    assert not torch.equal(third.tokens, first.tokens)


def test_tokens_are_those_of_the_pictures_on_disk(config, tmp_path):
    """Found again where the folder moved; new where a picture was mended under the same name."""
    root = tmp_path / "photos"
    for k, name in enumerate(("ant", "bee")):
        (root / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (40, 40), (40 * i, 100 * k, 9)).save(root / name / f"{i}.png")
    config.data = DataConfig("folder", root, (64, 64), maps="none")
    config.ft = replace(config.ft, trainable="last_block")
    settings = fine_tuning(config, 0)
    model, _ = starting_point(settings, config.runs)

    def kept():
        dataset = dataset_for(model, settings, "train", augment=False)
        return tokens.with_cached_tokens(model, dataset, settings, tmp_path / "tokens").tokens

    first = kept()
    assert kept() is first
    settings.data.root = shutil.move(root, tmp_path / "elsewhere")
    assert kept() is first
    picture = next(p for p in dataset_for(model, settings, "train", False).table["path"])
    before = os.stat(picture)
    Image.new("RGB", (40, 40), (255, 255, 0)).save(picture)
    assert not torch.equal(kept()[0], first[0])
    os.utime(picture, ns=(0, before.st_mtime_ns + 1))
    third = kept()
    assert len(list((tmp_path / "tokens").glob("*.safetensors"))) == 3
    tokens.forget_tokens()
    assert torch.equal(kept(), third)
