"""Training on drawn birds with a tiny ViT: both stages, determinism, runs on disk."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lib.experiments.compare import Trial, load_trials
from lib.experiments.evaluate import measure_runs
from lib.model import vit
from lib.model.predict import count_workers, loader
from lib.training import loop
from lib.training.loop import TrainingDiverged, loss_terms
from lib.training.runs import (
    Run,
    dataset_for,
    fine_tuning,
    human_in_the_loop,
    starting_point,
    train_run,
)
from lib.training.state import made_of
from lib.training.tokens import CachedTokens


def state(run: Run) -> dict[str, torch.Tensor]:
    return run.model().state_dict()


def test_both_stages_end_to_end(config):
    ft = train_run("ft", fine_tuning(config, 0), config.runs)
    names = sorted(path.name for path in ft.folder.iterdir())
    assert names == [".lock", "best.safetensors", "classes.json", "config.json", "history.csv",
                     "last.safetensors", "made_of.json", "steps.csv", "train.log"]  # fmt: skip
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


def test_what_the_original_kept_is_kept(config):
    """Weights of every k-th epoch, and a log of arguments, model and epochs; HITL from the best."""
    config.ft = replace(config.ft, epochs=4, save_every=2, checkpoint_minutes=0.0)
    config.ft = replace(config.ft, schedule="epoch_cosine", warmup=0.0, log_every=1000)
    ft = train_run("ft", fine_tuning(config, 0), config.runs)
    rates = [0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    told = (ft.history["lr"] / config.ft.lr).tolist()  # of the last step, which has no row
    assert told == pytest.approx(rates)
    kept = {file.stem for file in ft.folder.glob("*.safetensors")}
    assert kept == {"last", "best", "epoch2", "epoch4"}
    last, second = state(ft), ft.model("epoch2").state_dict()
    assert all(torch.equal(last[k], v) for k, v in ft.model("epoch4").state_dict().items())
    assert any(not torch.equal(last[k], v) for k, v in second.items())
    with pytest.raises(FileNotFoundError, match=r"no epoch3: there are best, epoch2, epoch4, last"):
        load_trials(["ft"], config.runs, "epoch3")
    measured = measure_runs(load_trials(["ft"], config.runs, "epoch2"), which="epoch2")
    assert len(measured) == config.data.toy_test

    config.init_which, config.model = "epoch2", replace(config.model, norm_eps=1e-3)
    settings = human_in_the_loop(config, "ft", 0)
    model, _ = starting_point(settings, config.runs)
    assert all(torch.equal(second[k], v) for k, v in model.state_dict().items())
    assert model.vit.norm.eps == 1e-3  # weights are the other run's, what it does with them its own
    made = made_of(settings, config.runs)["start"]
    assert made == hashlib.md5((ft.folder / "epoch2.safetensors").read_bytes()).hexdigest()

    lines = (ft.folder / "train.log").read_text().splitlines()
    assert "train.save_every: 2" in lines and "model.name: vit_tiny_patch16_224" in lines
    head = next(line for line in lines if line.startswith("head "))
    assert f"{8 * model.vit.embed_dim + 8} parameters" in head
    assert [line.split()[3] for line in lines[-4:]] == ["1,", "2,", "3,", "4,"]
    assert all(line.endswith(" s") and "val_loss" in line for line in lines[-4:])
    train_run("ft", fine_tuning(replace(config, model=replace(config.model, norm_eps=None)), 0),
              config.runs, overwrite=True)  # fmt: skip
    assert len((ft.folder / "train.log").read_text().splitlines()) == len(lines)


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


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_validation_is_what_evaluation_measures(config, ema):
    """In float32, whatever the steps compute in, and however the model is wrapped for them."""
    config.ft = replace(config.ft, mixed_precision="bf16", ema=ema)
    run = train_run("ft", fine_tuning(config, 0), config.runs)
    measured = measure_runs([Trial("ft", 0, run)], run.dataset("val"))
    last = run.history.iloc[-1]
    for name in ("top1", "nss", "cc", "class_token", "sigmoid"):
        assert last[f"val_{name}"] == pytest.approx(measured[name].mean(), rel=1e-6), name
    surprise = -measured["p_true"].map(math.log)
    assert last["val_loss"] == pytest.approx(surprise.mean(), rel=1e-4)


def test_blocks_computed_twice_learn_the_same(config, monkeypatch):
    calls, plain = [], vit.checkpoint
    monkeypatch.setattr(vit, "checkpoint", lambda *a, **k: calls.append(1) or plain(*a, **k))
    config.ft = replace(config.ft, drop_path=0.2, epochs=1)
    weights = {}
    for again in (False, True):
        config.ft = replace(config.ft, checkpoint_blocks=again)
        weights[again] = state(train_run(f"{again}", fine_tuning(config, 0), config.runs))
        assert len(calls) == 3 * again  # the first block of two, in 3 steps
    assert all(torch.equal(weights[True][key], weights[False][key]) for key in weights[True])


def test_where_a_gpu_computes_processes_read_ahead(config, monkeypatch):
    """By the cores that this process may use, and shares; none for what lies in memory."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    cores = {"count": 16}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores["count"]), raising=False)
    for cores["count"], processes, batches, workers in (
        (16, 1, 99, 8), (4, 1, 99, 3), (1, 1, 99, 1), (16, 4, 99, 3), (16, 1, 5, 2), (16, 1, 1, 0)
    ):  # fmt: skip
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert count_workers(gpu, batches) == workers and count_workers(cpu, batches) == 0
    settings = fine_tuning(config, 0)
    model, train_set = starting_point(settings, config.runs)
    made = loader(train_set, 4, gpu)
    assert made.num_workers == 5 and made.persistent_workers and made.pin_memory
    assert loader(train_set, 4, gpu, 2).num_workers == 2
    plain = loader(train_set, 4, cpu)
    assert not (plain.num_workers or plain.persistent_workers or plain.pin_memory)
    cached = CachedTokens(model, dataset_for(model, settings, "val", augment=False), 1)
    assert loader(Subset(cached, range(16)), 1, gpu, 2).num_workers == 0


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
