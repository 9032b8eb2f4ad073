"""The benchmark compares what it says it compares; its seconds are nobody's test."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
from conftest import VITS, images_for, tiny_vit

from lib.experiments import bench, bench_caches
from lib.model.vit import SigmoidViT, create_model


@torch.no_grad()
def test_the_explicit_yardstick_is_the_same_model():
    for kind in set(VITS) - {"distilled"}:
        model = SigmoidViT(tiny_vit(kind))
        images = images_for(model)
        scores, row = bench.explicit_scores(model.vit, images)
        ours, rows = model(images, rows="last")
        assert torch.allclose(scores, ours, atol=1e-4)
        assert torch.allclose(row, rows[model.depth - 1], atol=1e-4)


def test_a_ratio_for_every_way_and_round():
    table = bench.training_steps("vit_tiny_patch16_224", 32, batch_size=2, rounds=2)
    assert table.groupby("way").size().tolist() == [2] * 5
    plain = table[table["way"] == "plain timm"]
    assert (plain["ratio"] == 1).all() and (table["seconds"] > 0).all()
    assert bench.medians(table).index[0] == "plain timm"
    assert "loaded images/s" not in bench.step_summary(table)


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_with_loading_stand_beside_those_without(tmp_path, workers):
    pictures = bench.draw_pictures(tmp_path, 4, 32)
    table = bench.training_steps(
        "vit_tiny_patch16_224", 32, batch_size=2, rounds=2, pictures=pictures, workers=workers
    )
    assert table.groupby(["way", "loading"]).size().tolist() == [2] * 10
    assert (table.loc[table["way"] == bench.PLAIN, "ratio"] == 1).all()
    summary = bench.step_summary(table)
    explicit = summary.loc[("float32", bench.EXPLICIT)]
    assert explicit["x explicit"] == explicit["loaded x explicit"] == 1
    assert np.allclose(summary["busy"], summary["seconds"] / summary["loaded seconds"])
    middle = table.groupby(["loading", "way"])["seconds"].median()
    assert summary.loc[("float32", bench.ALL), "seconds"] == middle[False, bench.ALL]


def test_compiled_ways_stand_beside_the_others(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append(how))
    table = bench.training_steps("vit_tiny_patch16_224", 32, 2, rounds=1, compile=True)
    ways = table["way"].tolist()
    assert len(ways) == 9 and f"{bench.ALL}, compiled" in ways
    assert f"{bench.EXPLICIT}, compiled" not in ways  # as the original does it
    assert compiled == [{"dynamic": False}] * 4
    assert table.set_index("way").loc[bench.PLAIN, "ratio"] == 1


def test_too_few_pictures_for_a_batch_are_refused(tmp_path):
    pictures = bench.draw_pictures(tmp_path, 2, 32)
    with pytest.raises(ValueError, match="training pictures are no batch of 16"):
        bench.training_steps("vit_tiny_patch16_224", 32, 16, rounds=1, pictures=pictures)


def test_every_way_trains_a_copy_of_its_own():
    base = create_model("vit_tiny_patch16_224", 200, (32, 32), depth=2).train()
    before = {name: value.clone() for name, value in base.vit.state_dict().items()}
    batch = bench._random_batch(base, 2, 32)
    for way in bench.WAYS:
        bench._training_step(way, base)(batch)
    assert all(torch.equal(before[name], value) for name, value in base.vit.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is told by /proc")
def test_peak_memory_is_that_of_each_way_alone():
    table = bench.peak_memory("vit_tiny_patch16_224", 224, batch_size=2)
    assert table["way"].tolist() == [bench.PLAIN, bench.EXPLICIT, bench.ALL]
    sizes = table.set_index("way")["bytes"]
    # parameters, gradients and two moments of 5.5 million float32 weights at the least
    assert (sizes > 4 * 4 * 5.5e6).all() and table["ratio"][0] == 1
    assert sizes[bench.ALL] < sizes[bench.EXPLICIT]
    assert "MALLOC_ARENA_MAX" not in os.environ


def test_cached_tokens_are_compared_with_the_whole_model(config):
    table = bench_caches.cached_epochs(config, epochs=2)
    assert table.index.tolist() == ["whole model", "cached tokens"]
    assert table["measured"].tolist() == [1, 2] and table["caching"].tolist()[0] == 0
    assert table["caching"].tolist()[1] > 0
    assert np.allclose(table["total"], table["caching"] + 2 * table["epoch"])
    whole = bench_caches.cached_epochs(config, epochs=2, all_epochs=True)
    assert whole["measured"].tolist() == [2, 2]
    assert not config.runs.exists()


def test_what_was_not_measured_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    whole = "no CUDA device here: not measured: bf16, torch.compile, the fused optimiser and how"
    assert whole in bench.conditions()
    assert bench.conditions(["the time"]).endswith("not measured: the time")


def test_reading_pictures_is_compared_with_the_cache(cub):
    table, cost = bench_caches.image_loading(cub, (3, 4), images=6, rounds=2)
    assert table.groupby("way").size().to_dict() == {"decoded cache": 2, "decoding": 2}
    assert (table.query("way == 'decoding'")["ratio"] == 1).all() and (table["seconds"] > 0).all()
    # 60 x 80 pixels are smaller than what a crop needs: kept as they are, 3 bytes a pixel
    assert cost["pictures"] == 6 and cost["bytes a picture, cache"] == 60 * 80 * 3 + 8 + 4 / 6
    assert not list(cub.root.glob("decoded*"))


def test_live_edits_are_compared_with_a_full_forward_pass():
    table = bench.live_edits("vit_tiny_patch16_224", 32, rounds=2)
    ways = ["timm, no edit", "full forward", "last block", "last two", "all blocks"]
    ways.append("all blocks, all rows")
    assert bench.medians(table).index.tolist() == ways
    assert table.groupby("way").size().tolist() == [2] * 6 and (table["seconds"] > 0).all()
    full = table[table["way"] == "full forward"].set_index("round")["seconds"]
    expected = table["round"].map(full) / table["seconds"]
    assert np.allclose(table["ratio"], expected)
