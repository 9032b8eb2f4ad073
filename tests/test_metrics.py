"""Metrics against independent implementations, and their degenerate cases."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib import metrics


def pair(seed: int, images: int = 4, patches: int = 25):
    g = torch.Generator().manual_seed(seed)
    attention, human = (torch.rand(images, patches, generator=g).double() for _ in range(2))
    return attention, human, torch.randint(0, 3, (images, patches), generator=g).double()


@given(seed=st.integers(0, 10**6))
def test_cc_sim_kl_nss_against_scipy(seed):
    attention, human, fixations = pair(seed)
    for i in range(len(attention)):
        a, h, f = attention[i].numpy(), human[i].numpy(), fixations[i].numpy()
        p, q = h / h.sum(), a / a.sum()
        assert metrics.cc(attention, human)[i] == pytest.approx(scipy.stats.pearsonr(a, h)[0])
        assert metrics.sim(attention, human)[i] == pytest.approx(np.minimum(p, q).sum())
        assert metrics.kl(attention, human)[i] == pytest.approx(scipy.stats.entropy(p, q), abs=1e-9)
        points = np.repeat(scipy.stats.zscore(a), f.astype(int))
        assert metrics.nss(attention, fixations)[i] == pytest.approx(points.mean())


@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100))
def test_alignment_ignores_the_scale_of_the_map(seed, scale):
    attention, human, fixations = pair(seed)
    for metric, other in ((metrics.cc, human), (metrics.sim, human), (metrics.nss, fixations)):
        assert torch.allclose(metric(attention, other), metric(attention * scale, other))


@given(seed=st.integers(0, 10**6))
def test_a_map_agrees_best_with_itself(seed):
    attention, human, _ = pair(seed)
    assert torch.allclose(metrics.cc(human, human), torch.ones(4).double())
    assert torch.allclose(metrics.sim(human, human), torch.ones(4).double())
    assert metrics.kl(human, human).abs().max() < 1e-9
    assert (metrics.kl(attention, human) > 0).all()
    assert (metrics.sim(attention, human) < 1).all()


def test_undefined_is_nan_and_leaves_the_other_images_alone():
    attention, human, fixations = pair(0)
    fixations[0] = 0
    assert metrics.nss(attention, fixations).isnan().tolist() == [True, False, False, False]
    attention[1] = 0.3  # constant: neither a z-score nor a correlation
    assert metrics.nss(attention, fixations).isnan().tolist() == [True, True, False, False]
    assert metrics.cc(attention, human).isnan().tolist() == [False, True, False, False]
    human[2] = 0.0  # no map
    assert metrics.kl(attention, human).isnan().tolist() == [False, False, True, False]
    assert metrics.sim(attention, human).isnan().tolist() == [False, False, True, False]


def test_a_softmax_that_is_uniform_up_to_rounding_counts_as_constant():
    uniform = torch.softmax(torch.zeros(1, 197) + 1e-9 * torch.randn(1, 197), -1)
    assert metrics.cc(uniform, torch.rand(1, 197)).isnan().all()


def test_class_token_mass_and_patch_attention_share_the_row():
    rows = torch.randn(2, 3, 5 + 9)
    patches = metrics.patch_attention(rows, num_prefix=1).sum(-1)
    assert torch.allclose(metrics.class_token_mass(rows) + patches, torch.ones(2), atol=1e-6)
    expected = scipy.special.softmax(rows.numpy(), -1)[..., 0].mean(1)
    assert torch.allclose(metrics.class_token_mass(rows), torch.from_numpy(expected))


def test_top_k():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5]])
    labels = torch.tensor([2, 1])
    assert metrics.top_k(scores, labels, 1).tolist() == [False, False]
    assert metrics.top_k(scores, labels, 2).tolist() == [True, False]
    assert metrics.top_k(scores, labels, 9).tolist() == [True, True]


def test_energy_inside():
    attention = torch.tensor([[1.0, 1.0, 2.0, 0.0]])
    assert metrics.energy_inside(attention, torch.tensor([[0.0, 0.0, 0.5, 1.0]])).item() == 0.25
