"""What learns and how fast: frozen parts, groups, the learning rate of a step."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pandas as pd
import pytest
import torch

from lib.config import TrainConfig
from lib.model.vit import create_model
from lib.training import learning, loop, state
from lib.training.runs import (
    Run,
    RunConflict,
    fine_tuning,
    human_in_the_loop,
    starting_point,
    train_run,
)


def test_weight_decay_and_head_rate_go_where_they_should(config):
    model, _ = starting_point(fine_tuning(config, 0), config.runs)
    settings = replace(config.ft, head_lr_factor=10.0, lr=1e-3)
    of = {}
    for group in learning.parameter_groups(model, settings):
        for parameter in group["params"]:
            of[id(parameter)] = (group["lr"], group["weight_decay"])
    vit = model.vit
    assert of[id(vit.head.weight)] == (1e-2, 0.05) and of[id(vit.head.bias)] == (1e-2, 0.0)
    assert of[id(vit.blocks[0].mlp.fc1.weight)] == (1e-3, 0.05)
    assert of[id(vit.blocks[0].norm1.weight)] == (1e-3, 0.0)
    assert of[id(vit.pos_embed)] == (1e-3, 0.0) and of[id(vit.cls_token)] == (1e-3, 0.0)
    assert len(of) == len(list(model.parameters()))


def test_learning_rate_rises_then_falls_to_zero():
    factors = [learning.learning_rate_factor(step, 100, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == 1.0 == factors[9]
    assert factors[100] == pytest.approx(0.0, abs=1e-9)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_a_rate_that_changes_between_epochs_and_sgd_are_those_of_pytorch(config):
    """As the original code has them: CosineAnnealingLR over the epochs, SGD without momentum."""
    model, _ = starting_point(fine_tuning(config, 0), config.runs)
    for momentum in (0.0, 0.9):
        settings = replace(config.ft, optimizer="sgd", momentum=momentum, weight_decay=0.0)
        optimizer = learning.make_optimizer(model, settings, torch.device("cpu"))
        assert type(optimizer) is torch.optim.SGD
        ours = torch.nn.Parameter(torch.ones(1))
        theirs = torch.optim.SGD([ours], lr=settings.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 5)
        weight = model.vit.head.bias
        for step in range(15):
            factor = learning.learning_rate_factor(step, 15, 0.0, "epoch_cosine", an_epoch=3)
            rate = schedule.get_last_lr()[0]
            assert factor * settings.lr == pytest.approx(rate, rel=1e-9)
            learning.set_learning_rate(optimizer, factor)
            weight.grad, before = torch.ones_like(weight), weight.detach().clone()
            optimizer.step()
            if step < 3 and momentum == 0:
                torch.testing.assert_close(before - weight, torch.full_like(weight, rate))
            if step == 1 and momentum:
                moved = torch.full_like(weight, 1.9 * rate)
                torch.testing.assert_close(before - weight, moved)
            if step % 3 == 2:
                theirs.step()
                schedule.step()


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


def test_layer_decay_slows_what_is_far_from_the_head(config):
    model, _ = starting_point(fine_tuning(config, 0), config.runs)
    settings = replace(config.ft, layer_decay=0.5, head_lr_factor=3.0, lr=1.0)
    of = {id(p): g["lr"] for g in learning.parameter_groups(model, settings) for p in g["params"]}
    vit = model.vit
    assert of[id(vit.head.weight)] == 3.0
    assert of[id(vit.blocks[1].mlp.fc1.weight)] == of[id(vit.norm.weight)] == 0.5
    assert of[id(vit.blocks[0].mlp.fc1.weight)] == 0.25
    assert of[id(vit.patch_embed.proj.weight)] == of[id(vit.pos_embed)] == 0.125


def test_layer_decay_slows_learned_rotations_as_positions():
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 4}
    model = create_model("vit_small_patch16_rope_mixed_ape_224", 3, (32, 32), **sizes)
    settings = TrainConfig(layer_decay=0.5, head_lr_factor=3.0, lr=1.0)
    groups = learning.parameter_groups(model, settings)
    of = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(of) == len([*model.parameters()]) == sum(len(g["params"]) for g in groups)
    (frequencies,) = [p for name, p in model.vit.named_parameters() if "freqs" in name]
    assert of[id(frequencies)] == of[id(model.vit.pos_embed)] == (0.125, 0.0)
    assert of[id(model.vit.head.weight)][0] == 3.0


def test_auto_is_what_a_card_computes_in(monkeypatch):
    cards = {"T4": (7, 5), "A100": (8, 0), "H100": (9, 0)}
    found = {}
    for card, capability in cards.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        found[card] = learning.precision("auto", torch.device("cuda"))
    assert found == {"T4": "no", "A100": "bf16", "H100": "bf16"}
    assert learning.precision("auto", torch.device("cpu")) == "no"
    assert learning.precision("fp16", torch.device("cuda")) == "fp16"


def test_a_run_keeps_the_precision_that_it_began_in(config, monkeypatch):
    """Made on a GPU, it loads on a laptop, and goes on there as it began; config.json says how."""
    ft = fine_tuning(config, 0)
    assert train_run("laptop", ft, config.runs).config.train.mixed_precision == "no"
    monkeypatch.setattr(state, "precision", lambda asked, _: "bf16" if asked == "auto" else asked)
    made = train_run("gpu", ft, config.runs)
    monkeypatch.undo()
    assert Run.load(made.folder).config.train.mixed_precision == "bf16"
    assert train_run("gpu", ft, config.runs).config == made.config
    (made.folder / "last.safetensors").unlink()  # it was stopped
    history = pd.read_csv(made.folder / "history.csv").iloc[:1]
    history.to_csv(made.folder / "history.csv", index=False)
    again = train_run("gpu", ft, config.runs)
    assert again.config.train.mixed_precision == "bf16"
    assert not again.history.equals(train_run("laptop", ft, config.runs).history)
    named = replace(ft, train=replace(ft.train, mixed_precision="no"))
    with pytest.raises(RunConflict, match="mixed_precision is 'bf16' there and 'no' here"):
        train_run("gpu", named, config.runs)


def test_tf32_is_for_those_who_name_it(config, monkeypatch):
    """Whatever is set outside, which is afterwards as it was."""
    seen, plain = [], loop.loss_terms

    def watched(*given):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return plain(*given)

    monkeypatch.setattr(loop, "loss_terms", watched)
    torch.set_float32_matmul_precision("medium")
    ft = fine_tuning(config, 0)
    try:
        for word in ("tf32", "no"):
            asked = replace(ft, train=replace(ft.train, mixed_precision=word, epochs=1))
            train_run(word, asked, config.runs)
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("high", True)] * 3 + [("highest", False)] * 3


def test_a_constant_rate_and_no_warm_up():
    assert {learning.learning_rate_factor(step, 9, 0.0, "constant") for step in range(9)} == {1.0}
    assert learning.learning_rate_factor(0, 9, 0.0) == 1.0


@pytest.mark.parametrize(("word", "blocks"), [("all", 4), ("last_block", 1), ("head", 0), (3, 3)])
def test_how_many_blocks_learn(word, blocks):
    assert learning.learning_blocks(word, 4) == blocks


@pytest.mark.parametrize("word", ["last2", 0, 5])
def test_a_part_that_is_not_there_is_refused(word):
    with pytest.raises(ValueError, match="how many of the 4 blocks learn"):
        learning.learning_blocks(word, 4)
