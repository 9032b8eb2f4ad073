"""Training on drawn birds with a tiny ViT: both stages, determinism, runs on disk."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from lib.training import loop
from lib.training.loop import TrainingDiverged, loss_terms
from lib.training.runs import Run, fine_tuning, human_in_the_loop, starting_point, train_run


def state(run: Run) -> dict[str, torch.Tensor]:
    return run.model().state_dict()


def test_both_stages_end_to_end(config):
    ft = train_run("ft", fine_tuning(config, 0), config.runs)
    names = sorted(path.name for path in ft.folder.iterdir())
    assert names == [".lock", "best.safetensors", "classes.json", "config.json", "history.csv",
                     "last.safetensors", "made_of.json", "steps.csv"]  # fmt: skip
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


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best_epoch(config, monkeypatch):
    calls = []
    plain = loss_terms

    def poisoned(model, batch, settings):
        calls.append(1)
        cross_entropy, human_loss, scores = plain(model, batch, settings)
        return cross_entropy * (float("nan") if len(calls) > 4 else 1.0), human_loss, scores

    monkeypatch.setattr(loop, "loss_terms", poisoned)
    with pytest.raises(TrainingDiverged, match="lower lr"):
        train_run("ft", fine_tuning(config, 0), config.runs)
    assert (config.runs / "ft" / "best.safetensors").is_file()  # of epoch 1: 3 steps of 16 images
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
            left[lam] = loss_terms(run.model(), batch, config.hitl)[1].item()
    assert left[10.0] < 0.95 * left[0.0]


def test_compiled_training_is_one_graph_with_the_same_losses(config, monkeypatch):
    """Compiled once for two epochs of 16, 16 and 8 images, and for 16 to validate on.

    Whatever Accelerate wraps around the model; without the minutes that a real backend takes.
    """
    graphs = []

    def counting(graph, given):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    config.ft = replace(config.ft, mixed_precision="bf16", log_every=1)
    config.ft.human = replace(config.hitl.human, blocks="all")
    losses = {}
    for compiled in (False, True):
        config.ft = replace(config.ft, compile=compiled)
        run = train_run(f"compiled {compiled}", fine_tuning(config, 0), config.runs)
        losses[compiled] = pd.read_csv(run.folder / "steps.csv")
    assert losses[True].equals(losses[False])
    assert len(graphs) == 1
