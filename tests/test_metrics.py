"""Metrics against independent implementations, and their degenerate cases."""

from __future__ import annotations

import os

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config import DataConfig
from lib.data.dataset import make_dataset
from lib.evaluation import metrics


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
        assert metrics.kl_divergence(attention, human)[i] == pytest.approx(
            scipy.stats.entropy(p, q), abs=1e-9
        )
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
    assert metrics.kl_divergence(human, human).abs().max() < 1e-9
    assert (metrics.kl_divergence(attention, human) > 0).all()
    assert (metrics.sim(attention, human) < 1).all()


def test_undefined_is_nan_and_leaves_the_other_images_alone():
    attention, human, fixations = pair(0)
    fixations[0] = 0
    assert metrics.nss(attention, fixations).isnan().tolist() == [True, False, False, False]
    attention[1] = 0.3  # constant: neither a z-score nor a correlation
    assert metrics.nss(attention, fixations).isnan().tolist() == [True, True, False, False]
    assert metrics.cc(attention, human).isnan().tolist() == [False, True, False, False]
    human[2] = 0.0  # no map
    assert metrics.kl_divergence(attention, human).isnan().tolist() == [False, False, True, False]
    assert metrics.sim(attention, human).isnan().tolist() == [False, False, True, False]


def test_a_softmax_that_is_uniform_up_to_rounding_counts_as_constant():
    uniform = torch.softmax(torch.zeros(1, 197) + 1e-9 * torch.randn(1, 197), -1)
    assert metrics.cc(uniform, torch.rand(1, 197)).isnan().all()


def test_class_token_mass_and_patch_attention_share_the_row():
    rows = torch.randn(2, 3, 5 + 9)
    patches = metrics.patch_attention(rows, num_prefix=1).sum(-1)
    assert torch.allclose(metrics.class_token_mass(rows, 1) + patches, torch.ones(2), atol=1e-6)
    expected = scipy.special.softmax(rows.numpy(), -1)[..., 0].mean(1)
    assert torch.allclose(metrics.class_token_mass(rows, 1), torch.from_numpy(expected))
    assert metrics.class_token_mass(rows, 0).tolist() == [0, 0]  # the first is a patch then


def test_top_k():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5]])
    labels = torch.tensor([2, 1])
    assert metrics.top_k(scores, labels, 1).tolist() == [False, False]
    assert metrics.top_k(scores, labels, 2).tolist() == [True, False]
    assert metrics.top_k(scores, labels, 9).tolist() == [True, True]


def test_energy_inside():
    attention = torch.tensor([[1.0, 1.0, 2.0, 0.0]])
    assert metrics.energy_inside(attention, torch.tensor([[0.0, 0.0, 0.5, 1.0]])).item() == 0.25


# ---------------------------------------------------------------------- against pysaliency itself


@pytest.fixture(scope="module")
def pysaliency():
    """The package of Kümmerer et al.; it is built by a C compiler, so `make test` may lack it."""
    if os.environ.get("REQUIRE_PYSALIENCY"):
        import pysaliency
    else:
        reason = "pysaliency is not installed: pip install -e '.[pysaliency]', with a C compiler"
        pysaliency = pytest.importorskip("pysaliency", reason=reason)
    return pysaliency


def theirs(pysaliency, maps, human, counts) -> dict[str, np.ndarray]:
    """pysaliency's answers for maps `[n, gh, gw]`, human maps and fixation counts of that shape."""
    from pysaliency import metrics as one

    index, ys, xs = (np.repeat(axis, counts[counts > 0].astype(int)) for axis in np.nonzero(counts))
    stimuli = pysaliency.Stimuli(
        [np.full((*maps[0].shape, 3), i, np.uint8) for i in range(len(maps))]
    )
    fixations = pysaliency.Fixations.create_without_history(
        x=xs.astype(float), y=ys.astype(float), n=index
    )

    class Model(pysaliency.SaliencyMapModel):
        def _saliency_map(self, stimulus):
            return maps[int(stimulus[0, 0, 0])]

    def per_image(values):
        return np.array([values[index == i].mean() for i in range(len(maps))])

    model = Model(caching=False)
    pairs = list(zip(maps, human, strict=True))
    return {
        "nss": per_image(model.NSSs(stimuli, fixations)),
        "auc": per_image(model.AUCs(stimuli, fixations, nonfixations="unfixated")),
        "sauc": per_image(model.AUCs(stimuli, fixations, nonfixations="shuffled")),
        "cc": np.array([one.CC(a, h) for a, h in pairs]),
        "sim": np.array([one.SIM(a, h) for a, h in pairs]),
        "kl": np.array([one.MIT_KLDiv(a, h) for a, h in pairs]),
    }


def ours(maps, human, counts, dtype=torch.float64) -> dict[str, np.ndarray]:
    maps, human, counts = (
        torch.from_numpy(part).flatten(1).to(dtype) for part in (maps, human, counts)
    )
    found = metrics.alignment(maps, human, counts, counts.sum(0) - counts)
    return {name: value.numpy() for name, value in found.items()}


def assert_the_same(pysaliency, maps, human, counts):
    expected, found = theirs(pysaliency, maps, human, counts), ours(maps, human, counts)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-6, err_msg=name)
    single = ours(maps, human, counts, torch.float32)  # what evaluation computes in
    for name, values in expected.items():
        np.testing.assert_allclose(single[name], values, rtol=2e-4, atol=2e-4, err_msg=name)


def drawn_maps(seed: int, sharp: float, tied: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random maps, human maps with zeros, and counts, `[5, 6, 7]`; `tied` has equal values."""
    rng = np.random.default_rng(seed)
    maps = rng.random((5, 6, 7)) ** sharp
    maps = np.round(maps * 4 + 0.1) if tied else maps
    maps[:, 0, 0], maps[:, 0, 1] = 0.5, 0.7  # never constant
    human = rng.random((5, 6, 7)) * (rng.random((5, 6, 7)) < 0.5)
    human[:, 2, 2] = 1
    counts = rng.poisson(0.4, (5, 6, 7)).astype(float)
    counts[:, 1, 1] += 1
    return maps, human, counts


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), sharp=st.sampled_from([1.0, 8.0]), tied=st.booleans())
def test_random_maps_agree_with_pysaliency(pysaliency, seed, sharp, tied):
    assert_the_same(pysaliency, *drawn_maps(seed, sharp, tied))


def test_real_maps_agree_with_pysaliency(pysaliency, shared):
    data = DataConfig(name="cub2011", root=shared / "data", image_size=(224, 224))
    birds = make_dataset(data, "test", (14, 14), (0.5,) * 3, (0.5,) * 3)
    items = [birds.annotations(i) for i in range(40)]
    human, counts = (
        torch.stack([item[name] for item in items]).double().reshape(-1, 14, 14).numpy()
        for name in ("human", "fixations")
    )
    readers = np.stack([birds.readers(i)[0][0].reshape(14, 14).double().numpy() for i in range(40)])
    for maps in (readers, np.roll(human, 7, axis=0)):  # one reader's map; another image's
        assert_the_same(pysaliency, maps, human, counts)


# ------------------------------------------------------------------------------- what they promise


@given(seed=st.integers(0, 10**6))
def test_the_auc_is_how_often_a_fixated_patch_wins(seed):
    rng = np.random.default_rng(seed)
    value = torch.from_numpy(rng.integers(0, 4, 9)).double()
    positive, negative = (torch.from_numpy(rng.integers(0, 3, 9)).double() for _ in range(2))
    positive[0] = negative[1] = 1
    wins = (value[:, None] > value) + 0.5 * (value[:, None] == value)
    pairs = positive[:, None] * negative
    expected = (wins * pairs).sum() / pairs.sum()
    assert torch.allclose(metrics.auc(value, positive, negative), expected)
    swapped = metrics.auc(value, negative, positive)
    assert torch.allclose(swapped, 1 - expected)


@given(seed=st.integers(0, 10**6), power=st.floats(0.2, 5))
def test_aucs_ask_for_the_order_of_patches_only(seed, power):
    attention, _, fixations = pair(seed)
    fixations[:, 0] += 1
    elsewhere = fixations.sum(0) - fixations
    bent = attention**power
    same = torch.allclose(metrics.auc_judd(attention, fixations), metrics.auc_judd(bent, fixations))
    assert same
    shuffled = metrics.auc_shuffled(attention, fixations, elsewhere)
    assert torch.allclose(shuffled, metrics.auc_shuffled(bent, fixations, elsewhere))


def test_knowing_the_middle_gives_a_judd_auc_and_no_shuffled_one():
    """People look at the middle, and a little elsewhere: the middle map knows nothing more."""
    middle = torch.tensor([0.1, 1.0, 0.2, 0.0])
    fixations = torch.tensor([[1.0, 3, 0, 0], [0, 3, 1, 0], [0, 3, 0, 1], [1, 3, 0, 0]])
    elsewhere = fixations.sum(0) - fixations
    assert metrics.auc_judd(middle.expand(4, 4), fixations).mean() > 0.8
    found = metrics.auc_shuffled(middle.expand(4, 4), fixations, elsewhere)
    assert found.tolist() == pytest.approx([0.5, 0.53125, 0.46875, 0.5])
    knows = metrics.auc_shuffled(fixations, fixations, elsewhere)
    assert (knows >= found).all() and knows.mean() > found.mean() + 0.02


def test_heads_are_measured_as_if_each_were_alone():
    rows = torch.rand(3, 4, 12).double()
    human, fixations = torch.rand(3, 12).double(), torch.randint(0, 3, (3, 12)).double()
    box, parts = torch.rand(3, 12).double(), torch.randint(0, 2, (3, 12)).double()
    held = (human, fixations, fixations.sum(0) - fixations, box, parts)
    together = metrics.alignment(rows, *(part[:, None] for part in held))
    assert len(together) == 10
    for head in range(4):
        for name, value in metrics.alignment(rows[:, head], *held).items():
            assert torch.allclose(together[name][:, head], value, equal_nan=True), name


def test_the_pointing_game_looks_at_the_peak():
    target = torch.tensor([0.0, 1.0, 0.25, 0.0])
    maps = torch.tensor([[0.1, 0.9, 0.2, 0], [0.9, 0.1, 0, 0], [0, 0, 1, 0], [0, 3, 3, 0]])
    assert metrics.pointing_game(maps, target).tolist() == [1.0, 0.0, 0.25, 0.625]


def test_iou_of_what_reaches_half_of_the_maximum():
    attention = torch.tensor([[4.0, 2.0, 1.0, 0.0]])
    human = torch.tensor([[0.0, 0.5, 1.0, 0.1]])
    assert metrics.iou(attention, human).item() == pytest.approx(1 / 3)
    assert metrics.iou(attention, human, threshold=0.25).item() == pytest.approx(2 / 3)


# Degenerate inputs and their documented answers: metric by metric.
DEGENERATE = {
    "constant": (
        torch.full((6,), 0.3),
        torch.tensor([0, 1, 0.5, 0, 0, 0]),
        {"nss": None, "cc": None, "auc": 0.5, "sauc": 0.5, "point_box": 0.5, "in_box": 0.5},
    ),
    "zero": (
        torch.zeros(6),
        torch.tensor([0, 1, 0.5, 0, 0, 0]),
        dict.fromkeys(("nss", "cc", "sim", "kl", "iou", "in_box")) | {"auc": 0.5},
    ),
    "no gaze": (
        torch.arange(6.0),
        torch.zeros(6),
        dict.fromkeys(("nss", "cc", "sim", "kl", "auc", "sauc", "iou")),
    ),
    "NaN": (
        torch.tensor([0.1, torch.nan, 0.3, 0.2, 0.1, 0.1]),
        torch.tensor([0, 1, 0.5, 0, 0, 0]),
        dict.fromkeys(
            ("nss", "cc", "sim", "kl", "auc", "sauc", "iou", "in_box", "point_box", "point_part")
        ),
    ),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_input_has_the_documented_answer(case):
    attention, human, expected = DEGENERATE[case]
    box, parts = torch.tensor([1.0, 1, 1, 0, 0, 0]), torch.tensor([0.0, 1, 0, 0, 0, 0])
    good = torch.rand(6)
    maps = torch.stack([good, attention, good])
    seen = torch.tensor([0.4, 0, 0.7, 0, 0, 0.2])
    human = torch.stack([seen, human, seen])
    fixations = (human > 0).float()
    elsewhere = torch.ones(3, 6)
    found = metrics.alignment(maps, human, fixations, elsewhere, box, parts)
    for name, value in expected.items():
        if value is None:
            assert found[name][1].isnan(), name
        else:
            assert found[name][1].item() == pytest.approx(value), name
    for name, values in found.items():  # the images beside it are as they were
        assert values[[0, 2]].isfinite().all(), name


def test_one_fixation_is_the_rank_of_its_patch():
    attention = torch.tensor([0.1, 0.5, 0.3, 0.2])
    one = torch.tensor([0.0, 0, 1, 0])
    assert metrics.auc_judd(attention, one).item() == pytest.approx(2 / 3)
    z = (0.3 - attention.mean()) / attention.std(correction=0)
    assert metrics.nss(attention, one).item() == pytest.approx(z.item(), abs=1e-6)


def test_an_empty_region_has_no_answer():
    attention, nothing = torch.rand(2, 4), torch.zeros(2, 4)
    assert metrics.energy_inside(attention, nothing).isnan().all()
    assert metrics.pointing_game(attention, nothing).isnan().all()
