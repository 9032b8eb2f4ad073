"""The benchmark compares what it says it compares; its seconds are nobody's test."""

from __future__ import annotations

import numpy as np
import torch
from conftest import VITS, images_for, tiny_vit

from lib import bench
from lib.model import SigmoidViT


@torch.no_grad()
def test_the_explicit_yardstick_is_the_same_model():
    for kind in set(VITS) - {"distilled"}:
        model = SigmoidViT(tiny_vit(kind))
        images = images_for(model)
        scores, row = bench.explicit_scores(model.vit, images)
        ours, rows = model(images, rows="last")
        assert torch.allclose(scores, ours, atol=1e-4)
        assert torch.allclose(row, rows[2], atol=1e-4)


def test_a_ratio_for_every_way_and_round():
    table = bench.training_steps("vit_tiny_patch16_224", 32, batch_size=2, rounds=2)
    assert table.groupby("way").size().tolist() == [2] * 5
    plain = table[table["way"] == "plain timm"]
    assert (plain["ratio"] == 1).all() and (table["seconds"] > 0).all()
    assert bench.medians(table).index[0] == "plain timm"


def test_reading_pictures_is_compared_with_the_cache(cub):
    table, cost = bench.image_loading(cub, (3, 4), images=6, rounds=2)
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
