"""How sure a difference is: intervals over images, and paired tests of two models.

Images are the unit that is drawn anew everywhere: where a model was trained with several seeds, an
image's values are averaged over the seeds first. Seeds of one image are no independent
observations; counted apart they would make every interval too narrow. What the seeds themselves
vary by is the standard deviation beside the mean.

Resampling and tests are SciPy's (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993;
McNemar, Psychometrika 1947; Holm, Scandinavian Journal of Statistics 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
import pandas as pd
from scipy import stats
from tqdm.auto import tqdm

AT_A_TIME = 200  # resamples: bounds the memory at 200 values an image


@dataclass(frozen=True)
class Interval:
    """A mean over images, and between which bounds it would lie on other images of the kind."""

    mean: float
    low: float
    high: float
    images: int  # that have a value


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of a value an image, with its percentile bootstrap interval.

    Args:
        values: `[n]`, any range; NaN (not defined for that image) is left out.
        confidence: in (0, 1). resamples: 1 or more.

    Returns:
        low <= mean <= high, up to rounding. Where all values are equal the interval has no width:
        resampling cannot show what was never seen, so 100 % of few images says less than it looks
        like. One value has a mean and NaN bounds; none has NaN for all three.

    Raises:
        ValueError: for a confidence or a number of resamples out of range.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"confidence is {confidence:g} and resamples {resamples}; confidence must be between 0 "
            "and 1, resamples 1 or more"
        )
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    count = len(known)
    if count < 2:
        return Interval(float(known[0]) if count else np.nan, np.nan, np.nan, count)
    if np.ptp(known) == 0:
        return Interval(*[float(known[0])] * 3, count)
    found = stats.bootstrap(
        (known,),
        np.mean,
        n_resamples=resamples,
        batch=AT_A_TIME,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(known.mean()), float(found.low), float(found.high), count)


def intervals(images: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """`bootstrap_interval` of every metric of every model, at 95 % confidence.

    Args:
        images: a row an image, variant and seed: columns variant, seed, image_id and `columns`.

    Returns:
        a row a variant and metric: variant, metric, mean, low, high, images. Several seeds are
        averaged per image first, see the top of this file.
    """
    means = images.groupby(["variant", "image_id"], sort=False)[list(columns)].mean()
    rows = [
        {"variant": variant, "metric": column} | asdict(bootstrap_interval(part[column]))
        for variant, part in means.groupby("variant", sort=False)
        for column in columns
    ]
    return pd.DataFrame(rows)


def paired_tests(
    images: pd.DataFrame,
    against: str = "control",
    columns: Sequence[str] = ("top1", "p_true", "nss", "cc"),
    resamples: int = 2000,
    permutations: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Every other model against one, on the same images and with the same training seeds.

    Args:
        images: as for `intervals`. against: the variant that the others are compared with.
        permutations: random sign flips; the smallest p-value there is is about 2 / permutations.

    Returns:
        a row a variant and column:
        variant, against, metric; seeds, how many both have; images, where both have a value
        mean, mean_against, difference: variant minus against, seeds averaged per image
        low, high: bootstrap interval of the difference over images
        p: two-sided sign-flip permutation test over images (could a coin have chosen which of the
            two models an image's value is of?); 1 where no image differs
        p_holm: p corrected for all rows of this table by Holm's step-down method: if no model
            differed, the chance that any row is below 0.05 would be at most 5 %
        difference_std: standard deviation over the seeds of the mean difference, NaN for one seed;
            p and the interval are about other images, for the models as they were trained, and say
            nothing about another training
        seeds_up: in how many seeds the mean difference is above 0
        fixed, broken, p_mcnemar: of columns that are right or wrong (0 or 1). How often the
            variant is right where `against` is wrong, and the other way round, image and seed
            counted apart; and McNemar's exact test, where an image counts once: as fixed when more
            of its seeds were fixed than broken. Not part of the correction: of top1, p and
            p_mcnemar ask the same.

    Raises:
        ValueError: `against` is not there, no seed is shared, or a shared seed has other images.
    """
    models = list(dict.fromkeys(images["variant"]))
    if against not in models:
        raise ValueError(f'no model is called "{against}"; use one of {", ".join(models)}')
    columns, rows = list(columns), []
    pairs = {name: _paired(images, name, against, columns) for name in models if name != against}
    for name, column in tqdm(list(product(pairs, columns)), desc="tests", leave=False):
        ours, theirs = (part[column] for part in pairs[name])
        row = _test(ours, theirs, resamples, permutations, seed)
        rows.append({"variant": name, "against": against, "metric": column} | row)
    table = pd.DataFrame(rows)
    if len(table):
        table.insert(table.columns.get_loc("p") + 1, "p_holm", holm(table["p"]))
    return table


def _paired(
    images: pd.DataFrame, name: str, against: str, columns: list[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of two models with the seeds that both have, in the same order."""
    parts = [images[images["variant"] == one] for one in (name, against)]
    shared = set(parts[0]["seed"]) & set(parts[1]["seed"])
    if not shared:
        seeds = [", ".join(map(str, sorted(set(part["seed"])))) for part in parts]
        raise ValueError(
            f'"{name}" has seeds {seeds[0]} and "{against}" {seeds[1]}; pairs need a seed that '
            "both have"
        )
    keys = ["image_id", "seed"]
    ours, theirs = (
        part[part["seed"].isin(shared)].set_index(keys)[columns].astype(float).sort_index()
        for part in parts
    )
    if not ours.index.is_unique or not ours.index.equals(theirs.index):
        raise ValueError(
            f'"{name}" has {len(ours)} rows (image and seed) and "{against}" {len(theirs)}, and '
            "they are not the same images once each; measure both on one split"
        )
    return ours, theirs


def _test(
    ours: pd.Series, theirs: pd.Series, resamples: int, permutations: int, seed: int
) -> dict[str, float]:
    """One row of `paired_tests`: two columns with the same index (image_id, seed)."""
    both = ours.notna() & theirs.notna()
    ours, theirs = ours[both], theirs[both]
    by_image = (ours - theirs).groupby("image_id").mean()
    by_seed = (ours - theirs).groupby("seed").mean()
    found = bootstrap_interval(by_image, resamples=resamples, seed=seed)
    row = {
        "seeds": len(both.index.unique("seed")),
        "images": found.images,
        "mean": ours.groupby("image_id").mean().mean(),
        "mean_against": theirs.groupby("image_id").mean().mean(),
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "p": sign_flip_test(by_image, permutations, seed),
        "difference_std": by_seed.std(),
        "seeds_up": int((by_seed > 0).sum()),
    }
    if ours.isin([0, 1]).all() and theirs.isin([0, 1]).all() and len(ours):
        better, worse = int((by_image > 0).sum()), int((by_image < 0).sum())
        row |= {"fixed": int((ours > theirs).sum()), "broken": int((ours < theirs).sum())}
        changed = better + worse
        row["p_mcnemar"] = float(stats.binomtest(better, changed).pvalue) if changed else 1.0
    return row


def sign_flip_test(differences: pd.Series, permutations: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference: how often random signs give one as large.

    SciPy's `permutation_test(..., permutation_type="samples")` asks the same of one sample, but
    sorts random numbers for every image and takes half a minute for 5,794 images; drawn as a
    Monte Carlo test of random signs it takes a second.

    Args:
        differences: `[n]`, without NaN; 0 says nothing, whatever its sign, and is left out.

    Returns:
        in (0, 1]; 1 when no image differs, NaN without images.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not len(values):
        return np.nan
    values = values[values != 0]
    if not len(values):
        return 1.0
    rng = np.random.default_rng(seed)
    found = stats.monte_carlo_test(
        np.ones(len(values)),  # the signs as they are
        rvs=lambda size: rng.integers(0, 2, size, dtype=np.int8) * 2.0 - 1.0,
        statistic=lambda signs, axis: np.asarray(signs) @ values,
        vectorized=True,
        n_resamples=permutations,
        batch=AT_A_TIME,
    )
    return min(1.0, float(found.pvalue))


def holm(p_values: Sequence[float] | pd.Series) -> np.ndarray:
    """Holm's correction for the number of tests: `[n]` in [0, 1]; NaN is no test and stays.

    The smallest p-value is multiplied by n, the next by n - 1, and so on; none ends below one
    that was smaller before.
    """
    values = np.asarray(p_values, dtype=np.float64)
    corrected = np.full(len(values), np.nan)
    order = np.argsort(values)[: np.count_nonzero(~np.isnan(values))]  # NaN is sorted to the end
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    return corrected
