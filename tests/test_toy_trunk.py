"""The toy trunk: it can be made again, and the one in the repository fits the preset."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch

from lib.config import preset
from lib.data.toy.birds import make
from lib.data.toy.scene import ATTRIBUTES
from lib.model.vit import create_model
from lib.model.weights import load_weights

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "make_toy_trunk.py"))
attribute_targets, target_sizes = TOOL["attribute_targets"], TOOL["target_sizes"]
naming_loss, pretrain = TOOL["naming_loss"], TOOL["pretrain"]


def test_pretraining_makes_a_trunk_without_a_head(tmp_path):
    config = preset("toy")
    config.model = replace(config.model, overrides={**config.model.overrides, "depth": 1})
    path = tmp_path / "trunk.safetensors"
    accuracy = pretrain(config, path, images=128, epochs=1, held_out=32)
    assert set(accuracy) == {*ATTRIBUTES, "decoy"}
    assert all(0 <= value <= 1 for value in accuracy.values())
    state = safetensors.torch.load_file(path)
    assert not [name for name in state if name.startswith("head")]
    assert {value.dtype for value in state.values()} == {torch.float16}


def test_the_trunk_in_the_repository_fits_the_preset():
    config = preset("toy")
    model = create_model(config.model.name, 8, config.data.image_size, **config.model.overrides)
    report = load_weights(model, config.model.weights)
    assert report.new == ("head.weight", "head.bias") and not report.unused


def test_targets_name_every_attribute_and_the_decoy():
    birds = make("pretrain", 16)
    targets, sizes = attribute_targets(birds), target_sizes()
    assert targets.shape == (16, len(sizes))
    assert (targets < torch.tensor(sizes)).all() and (targets >= 0).all()
    scores = torch.zeros(16, sum(sizes))
    for row, target in zip(scores, targets, strict=True):
        for part, value in zip(row.split(sizes), target, strict=True):
            part[value] = 50.0
    assert naming_loss(scores, targets, sizes) < 1e-6
