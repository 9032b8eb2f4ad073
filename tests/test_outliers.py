"""Outlier tokens: norms and class rows of every block, outliers, background, sinks."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import images_for
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lib import figures
from lib.evaluation import outliers


@pytest.fixture(scope="module")
def read(toy):
    return outliers.read_patch_tokens(*toy, images=[9, 3, 17], batch_size=2)


def made_up(n: int = 20, blocks: int = 2, patches: int = 16) -> outliers.PatchTokens:
    """Gaussian norms and uniform attention; the upper half of each picture is background."""
    rng = np.random.default_rng(0)
    norms = rng.normal(50, 2, (n, blocks, patches)).astype(np.float32)
    background = np.zeros((n, patches), bool)
    background[:, : patches // 2] = True
    contrast = np.tile(np.arange(patches, dtype=np.float32), (n, 1))
    attention = np.full((n, blocks, patches), 1 / patches, np.float32)
    return outliers.PatchTokens(
        np.arange(n), norms, attention, contrast, background, np.ones(n, bool)
    )


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_block_by_block_is_the_plain_model_with_its_class_rows(any_model):
    images = images_for(any_model)
    caught = []
    hooks = [b.register_forward_hook(lambda *a: caught.append(a[2])) for b in any_model.vit.blocks]
    with torch.no_grad():
        any_model.vit(images)
        for hook in hooks:
            hook.remove()
        _, rows = any_model(images, rows="all")
        steps = list(any_model.block_by_block(images))
    assert len(steps) == any_model.depth
    any_model.requires_grad_(False).one_query = False  # all tokens of the last block, as here
    assert flops(lambda: list(any_model.block_by_block(images))) <= flops(
        lambda: any_model(images, rows="all")
    )
    for index, (tokens, row) in enumerate(steps):
        leaving = caught[min(index, len(caught) - 1)]  # those that a pooling pools
        assert torch.allclose(tokens, leaving, atol=1e-4)
        if index in any_model.layout.read:
            assert torch.allclose(row, rows[index], atol=1e-4)
        else:
            assert row is None


def test_tokens_are_those_of_each_picture(toy, read):
    model, test = toy
    assert read.index.tolist() == [9, 3, 17]
    assert read.norms.shape == read.attention.shape == (3, 3, 16)
    picture = test[3]["image"]
    with torch.no_grad():
        last = model.vit.forward_features(picture[None])  # after the final norm
        tokens = model.tokens(picture[None], -1)
        tokens = model.vit.blocks[-1](tokens)
        matrix = model.attention_matrices(picture[None])[1]
    assert torch.allclose(model.vit.norm(tokens), last, atol=1e-4)
    assert np.allclose(read.norms[1, 2], tokens[0, 1:].norm(dim=-1), atol=1e-3)
    row = matrix[0, :, 0, 1:].mean(0)
    assert np.allclose(read.attention[1, 1], row / row.sum(), atol=1e-5)
    assert read.contrast[1, 6] == pytest.approx(
        picture[:, 16:32, 32:48].flatten(1).std(1, correction=0).mean().item(), abs=1e-5
    )


def test_background_is_what_no_part_of_the_box_covers(toy, monkeypatch):
    model, test = toy
    table = test.table.copy()
    table.loc[2, ["x0", "y0", "x1", "y1"]] = 12, 20, 33, 32  # 4 and 1 pixels into two cells
    monkeypatch.setattr(test, "table", table)
    background = outliers.read_patch_tokens(model, test, [2]).background[0].reshape(4, 4)
    assert np.argwhere(~background).tolist() == [[1, 0], [1, 1], [1, 2]]


def test_a_picture_without_a_box_has_no_background_and_says_so(toy, monkeypatch):
    model, test = toy
    table = test.table.copy()
    table.loc[5, ["x0", "y0", "x1", "y1"]] = np.nan
    monkeypatch.setattr(test, "table", table)
    tokens = outliers.read_patch_tokens(model, test, [5, 6])
    assert tokens.has_box.tolist() == [False, True] and not tokens.background[0].any()
    rows = outliers.outliers_by_block(tokens).set_index("index")
    of_the_box = ["background", "background_mass", "flat", "flat_mass", "sinks", "sinks_mass"]
    assert rows.loc[5, [*of_the_box, "outliers_outside"]].isna().all(axis=None)
    assert rows.loc[6, of_the_box].notna().all(axis=None)
    assert rows.loc[5, ["outliers", "outliers_mass"]].notna().all(axis=None)
    means = outliers.mean_by_block(rows.reset_index())
    assert means["background"].to_numpy() == pytest.approx(rows.loc[6, "background"].to_numpy())


def test_outliers_are_found_where_they_were_put_and_nowhere_else():
    tokens = made_up()
    assert outliers.outliers_by_block(tokens)["outliers"].max() == 0
    tokens.norms[4, 1, [2, 3]] = 150  # background
    tokens.norms[5, 1, [1, 10]] = 150  # one on the bird
    tokens.attention[4, 1] = 0
    tokens.attention[4, 1, [2, 9]] = 0.75, 0.25
    tokens.attention[7, 1] = np.eye(16)[12]  # all of it on one patch of the bird: no sink
    rows = outliers.outliers_by_block(tokens).set_index(["index", "block"])
    assert rows["outliers"].to_numpy().nonzero()[0].tolist() == [9, 11]
    row = rows.loc[(4, 1)]
    assert row["outliers"] == 2 / 16 and row["outliers_mass"] == 0.75
    assert row["outliers_enrichment"] == 6.0 and row["outliers_outside"] == 1.0
    assert row["background_mass"] == 0.75 and row["background"] == 0.5
    assert row["flat"] == 0.25 and row["flat_mass"] == 0.75 and row["flat_enrichment"] == 3.0
    assert row["sinks"] == 1 / 16 and row["sinks_mass"] == 0.75  # 12 times the uniform share
    assert row["norm_max"] == 150 and 45 < row["norm"] < 55
    assert rows.loc[(7, 1), "sinks"] == 0
    assert rows.loc[(5, 1), "outliers_outside"] == 0.5
    assert np.isnan(rows.loc[(6, 1), "outliers_enrichment"])
    assert rows.loc[(6, 1), "background_enrichment"] == pytest.approx(1)
    means = outliers.mean_by_block(rows.reset_index())
    assert means.loc[1, "outliers"] == pytest.approx(4 / 320)
    assert means.loc[1, "outliers_outside"] == pytest.approx(0.75)  # 3 of the 4
    assert means.loc[1, "outliers_enrichment"] == pytest.approx((0.75 + 2 / 16) / (4 / 16))


@given(st.floats(0.01, 100), st.floats(0.5, 8), st.integers(0, 30))
def test_cutoffs_follow_the_unit_and_not_a_few_outliers(scale, k, wild):
    norms = made_up().norms
    cutoffs = outliers.outlier_cutoffs(norms, k)
    assert np.allclose(outliers.outlier_cutoffs(norms * np.float32(scale), k), cutoffs * scale)
    spread = (cutoffs - np.median(norms, axis=(0, 2))) / k
    assert np.allclose(spread, 2, rtol=0.2)  # the deviation that they were drawn with
    norms = norms.copy()
    norms[0, :, :].ravel()[:wild] = 1e6
    assert (outliers.outlier_cutoffs(norms, k) < cutoffs + (k + 1)).all()


def test_low_information_is_flat_and_background():
    tokens = made_up()
    flat = outliers.low_information(tokens)
    assert flat[0].nonzero()[0].tolist() == [0, 1, 2, 3]
    tokens.background[0, 1] = False
    assert outliers.low_information(tokens)[0].nonzero()[0].tolist() == [0, 2, 3]


def test_order_and_company_do_not_matter(toy, read):
    other = outliers.read_patch_tokens(*toy, images=[17, 9, 3], batch_size=3)
    for name in ("norms", "attention", "contrast", "background"):
        assert np.allclose(getattr(read, name), getattr(other, name)[[1, 2, 0]], atol=1e-4)


def test_the_figure_shows_models_and_images(toy, read):
    models = ["before", "after"]
    table = outliers.outliers_by_block(read)
    figure = figures.outliers(pd.concat([table.assign(variant=name) for name in models]))
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == models
    assert "3 images" in figure.get_suptitle()
    plt.close("all")


def test_bad_questions_are_refused_by_name(toy, read):
    with pytest.raises(ValueError, match="k is 0"):
        outliers.outlier_cutoffs(read.norms, 0)
    with pytest.raises(ValueError, match="image 99 is asked for"):
        outliers.read_patch_tokens(*toy, images=[99])
