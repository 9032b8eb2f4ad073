"""Rotary, pooled and mixed models through everything: trained, taught, measured, erased, shown."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_config
from PIL import Image

from lib.config import Config, Evaluation, ModelConfig, Sweep, preset
from lib.edit import AttentionEdit
from lib.evaluation import erasing, outliers
from lib.evaluation.per_image import per_head
from lib.experiments.evaluate import evaluate
from lib.experiments.simulate import simulated_corrections
from lib.experiments.sweep import cells
from lib.losses import attention_loss
from lib.model.vit import create_model
from lib.training import tokens
from lib.training.learning import trained_modules
from lib.training.runs import (
    Run,
    dataset_for,
    fine_tuning,
    human_in_the_loop,
    starting_point,
    train_run,
)
from lib.training.teach import TeachConfig, Teacher

SIZES = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
KINDS = {
    "DINOv3": ("vit_small_patch16_dinov3", {"global_pool": "token"}),
    "SigLIP": ("vit_base_patch16_siglip_224", {}),
    "PE": ("vit_pe_core_tiny_patch16_384", {"attn_pool_num_heads": 4}),
}
THREE_MATRICES = ("eva02_base_patch16_clip_224", {})  # queries, keys and values apart


@pytest.fixture(scope="module", params=list(KINDS))
def trained(request, tmp_path_factory) -> tuple[Config, Run, Run]:
    """The preset with a model of a kind; a fine-tuned run, and one with people's maps."""
    name, changes = KINDS[request.param]
    config = tiny_config(tmp_path_factory.mktemp("runs"))
    config.model = ModelConfig(name, None, SIZES | changes)
    base = train_run("ft-s0", fine_tuning(config, 0), config.runs)
    stage = human_in_the_loop(config, "ft-s0", 0, blocks="all", loss="kl", heads="mean")
    return config, base, train_run("hitl-s0", stage, config.runs)


def test_training_follows_people_in_every_block_with_a_row(trained):
    config, _, run = trained
    model = run.model()
    assert type(model.vit).__name__ in ("Eva", "VisionTransformer")
    history = pd.read_csv(run.folder / "history.csv")
    assert (history["human_loss"] > 0).all() and np.isfinite(history["val_cc"]).all()
    kept = history["val_class_token"]
    assert (kept == 0).all() if model.num_prefix == 0 else (kept > 0).all()
    # What it learned of the maps differs from what the same steps without them make.
    control = human_in_the_loop(config, "ft-s0", 0, lam=0.0)
    other = train_run("control-s0", control, config.runs).model()
    assert any(not torch.equal(a, b) for a, b in zip(*_states(model, other), strict=True))
    # Written, read again: the same scores, bit for bit.
    again = Run.load(run.folder).model()
    item = run.dataset("test")[0]["image"][None]
    with torch.no_grad():
        assert torch.equal(model(item), again(item))


def _states(*models: torch.nn.Module) -> list[list[torch.Tensor]]:
    return [list(model.state_dict().values()) for model in models]


def test_cached_tokens_change_no_step(trained):
    """With the trunk frozen and no augmentation the tokens may be computed once."""
    config, *_ = trained
    stage = human_in_the_loop(config, "ft-s0", 0, loss="kl", heads="mean")
    cached = replace(stage, train=replace(stage.train, trainable="last_block", cache_tokens=True))
    run = train_run("cached-s0", cached, config.runs)
    model, before = run.model(), Run.load(config.runs / "ft-s0").model()
    changed = {
        name
        for name, value in model.vit.state_dict().items()
        if not torch.equal(value, before.vit.state_dict()[name])
    }
    last = "attn_pool." if model.layout.pooled else "blocks.1."
    assert any(name.startswith(last) for name in changed)
    assert all(name.startswith((last, "norm.", "fc_norm.", "head.")) for name in changed)


def test_everything_is_measured_and_shown(trained, tmp_path):
    config, _, run = trained
    folder = evaluate(
        ["ft-s0", "hitl-s0"],
        Evaluation(out=tmp_path / "result", samples=2, erase=4),
        config.runs,
    )
    table = pd.read_csv(folder / "table.csv")
    assert np.isfinite(table["cc"].iloc[:2]).all() and (folder / "result.txt").is_file()
    samples = [Image.open(file) for file in (folder / "samples").glob("*/*.png")]
    assert len(samples) >= 2 * 5
    model, test = run.model(), run.dataset("test")
    heads = per_head(model, test)
    assert heads["head"].nunique() == model.num_heads == model.layout.heads[-1]
    tokens = outliers.read_patch_tokens(model, test, images=range(4))
    has_row = np.isfinite(tokens.attention).all(axis=(0, 2))
    assert np.flatnonzero(has_row).tolist() == list(model.layout.read)
    assert tokens.norms.shape[1] == model.depth and len(outliers.outliers_by_block(tokens))


def test_edits_and_the_ladder(trained):
    _, _, run = trained
    model, test = run.model(), run.dataset("test")
    table = erasing.erase(model, test, images=range(4))
    by_rung = table.groupby("rung", sort=False)["p_true"].apply(tuple)
    assert list(by_rung.index) == [*model.layout.ladder]
    assert by_rung.nunique() == len(by_rung)  # each does something else
    curves = erasing.deletion_insertion(model, test, "attention", 2, images=range(2))
    assert np.isfinite(curves["p_true"]).all()
    for scope in ({}, {"blocks": "all", "queries": "all", "heads": "all"}):
        mask = torch.zeros(model.grid, dtype=torch.bool)
        mask[:2] = True
        edit = AttentionEdit(mask, 0.0, **{"heads": "mean", "offset": "centred"} | scope)
        picture = test[0]["image"][None]
        with torch.no_grad():
            assert not torch.equal(model(picture), model(picture, edit=edit))


def test_a_person_can_teach_it(trained):
    _, base, _ = trained
    model, train = base.model(), base.dataset("train")
    before = [value.clone() for value in model.state_dict().values()]
    teacher = Teacher(model, train, TeachConfig(steps=3, batch_size=8, replay=16, last_blocks=2))
    teacher.teach(simulated_corrections(train, range(2)))
    after = list(model.state_dict().values())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(math.isfinite(value.float().sum()) for value in after)
    teacher.undo()
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


def test_a_sweep_names_blocks_that_have_a_row(trained):
    config, *_ = trained
    sweep = replace(Sweep(), blocks=("last", "last2", "all", "pool"), seeds=(0,))
    pooled = config.model.name != KINDS["DINOv3"][0]
    if not pooled:
        with pytest.raises(ValueError, match='blocks is "pool", but this model does not pool'):
            cells(config, sweep)
        return
    words = {cell.words["blocks"] for cell in cells(config, sweep)} - {""}
    siglip = config.model.name == KINDS["SigLIP"][0]
    assert words == ({"last"} if siglip else {"last", "last2", "all"})


@pytest.mark.parametrize(("name", "changes"), KINDS.values(), ids=str)
def test_activations_computed_again_change_no_gradient(name, changes):
    """Gradient checkpointing: rotary positions are part of what is computed again."""
    model = create_model(name, 3, (48, 64), **SIZES | changes | {"depth": 3}).eval()
    images, found = torch.randn(2, 3, 48, 64), []
    for enable in (False, True):
        model.vit.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_pooling_that_learned_stands_on_the_same_cached_tokens(tmp_path):
    """The second stage starts from the first one's pooling and norm, and from its very trunk."""
    config = tiny_config(tmp_path)
    config.model = ModelConfig(*KINDS["SigLIP"][:1], None, SIZES)
    config.ft = replace(config.ft, trainable="last_block")
    settings = fine_tuning(config, 0)
    model, _ = starting_point(settings, config.runs)
    dataset = dataset_for(model, settings, "val", augment=False)
    first = tokens.with_cached_tokens(model, dataset, settings, tmp_path / "tokens")
    with torch.no_grad():
        for part in trained_modules(model, "last_block"):
            [parameter.add_(1) for parameter in part.parameters()]
    again = tokens.with_cached_tokens(model, dataset, settings, tmp_path / "tokens")
    assert again.tokens is first.tokens
    with torch.no_grad():
        model.vit.blocks[-1].mlp.fc1.weight.add_(1)  # this one is frozen
    other = tokens.with_cached_tokens(model, dataset, settings, tmp_path / "tokens")
    assert not torch.equal(other.tokens, first.tokens)


NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.mark.parametrize(("name", "changes"), [*KINDS.values(), THREE_MATRICES], ids=str)
def test_notebooks_look_into_every_kind_of_model(name, changes):
    """Gradients of notebook 04, the ladder of notebook 02: with MODEL they are of any kind."""
    model = create_model(name, 3, (48, 48), **SIZES | changes)
    batch = {"human": torch.eye(9)[:3], "valid": torch.ones(3, 9, dtype=torch.bool)}
    row = model(torch.randn(3, 3, 48, 48), rows="last")[1]
    here = {"model": model, "last": row, "batch": batch, "attention_loss": attention_loss}
    exec(_cell("04_hitl_training", "cell-11"), here)
    rungs = dict.fromkeys(model.layout.ladder, 0.8)
    here = {"ladder": pd.Series({"no edit": 0.3, **rungs}), "config": preset("toy")}
    exec(_cell("02_sigmoid_attention", "cell-39"), here)


def _cell(notebook: str, name: str) -> str:
    content = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))
    return "".join(next(one["source"] for one in content["cells"] if one["id"] == name))
