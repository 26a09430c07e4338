"""How good an expression is, how new it is, and how much of it may be luck.

Performance is the RankIC of `qlib_ext.metrics` on dates whose returns do not overlap.
Glossary: k expressions; m dates; n stocks.

**Luck.** The best of many tries looks good on the training years whether or not there
is anything to find. Two figures take that into account:

- *Deflated ratio* (training). Among N tries without skill, whose information ratios
  have the variance V, the largest is expected at
  ``IR0 = sqrt(V) ((1 - γ) Φ⁻¹(1 - 1/N) + γ Φ⁻¹(1 - 1/(N e)))``, γ = 0.5772 Euler's
  constant. The probability that the true ratio of an expression exceeds IR0 is
  ``Φ((IR - IR0) sqrt(m - 1) / sqrt(1 - g3 IR + (g4 - 1)/4 IR²))`` with skewness g3 and
  kurtosis g4 of its RankIC. N is the number of all tries, V the variance over the
  random expressions that the search began with: what tries look like before selection.
- *Šidák's correction* (holdout). ``p' = 1 - (1 - p)^K`` with p the one-sided t-test of
  the holdout RankIC, in the direction that training gave, and K the number of
  expressions that were tested on it. It holds for independent tests, and for positively
  dependent ones it is on the safe side.

References
----------
Bailey & López de Prado (2014), The deflated Sharpe ratio, Journal of Portfolio
Management 40(5), equations 1 and 2; here the information ratio of RankIC takes the
Sharpe ratio's place. Šidák (1967), Rectangular confidence regions for the means of
multivariate normal distributions, JASA 62.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from qlib_ext.metrics import cs_rank, rank_ic, summarise

__all__ = [
    "Score",
    "deflated_ratio",
    "expected_best",
    "p_value",
    "rank_vectors",
    "score_values",
    "sidak",
]

_EULER = 0.5772156649015329
#: Dates of the similarity between expressions.
_SIMILAR_DATES = 48


@dataclass(frozen=True)
class Score:
    """Figures of one expression.

    Attributes
    ----------
    rank_ic, ic_ir : float
        Mean RankIC, and mean over standard deviation, not annualised; with sign.
    dates : int
        Dates with a RankIC.
    coverage : float
        Share of traded members of the universe that have a finite value.
    skew, kurtosis : float
        Of the RankIC; a normal one has 0 and 3.
    """

    rank_ic: float
    ic_ir: float
    dates: int
    coverage: float
    skew: float
    kurtosis: float


def score_values(
    values: np.ndarray, label: Tensor, member: np.ndarray, min_count: int = 10
) -> tuple[list[Score], Tensor]:
    """Score expressions on the dates of a panel.

    Parameters
    ----------
    values : float32 array [k, m, n]
    label : Tensor [m, n]
    member : bool array [m, n]
        Where a value is expected.
    min_count : int
        Fewest stocks of a date.

    Returns
    -------
    (list of Score [k], Tensor [k, m])
        And the RankIC of each date.
    """
    series = rank_ic(torch.from_numpy(values), label, min_count)
    expected = max(1, int(member.sum()))
    out = []
    for value, one in zip(values, series, strict=True):
        figures = summarise(one)
        x = one[torch.isfinite(one)].numpy()
        spread = len(x) > 3 and x.std() > 0
        out.append(
            Score(
                rank_ic=figures.mean,
                ic_ir=figures.ir,
                dates=figures.count,
                coverage=float((np.isfinite(value) & member).sum()) / expected,
                skew=float(stats.skew(x)) if spread else 0.0,
                kurtosis=float(stats.kurtosis(x, fisher=False)) if spread else 3.0,
            )
        )
    return out, series


def rank_vectors(values: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Make unit vectors whose inner product is the mean rank correlation.

    Ranks of each date are centred, missing values count as the middle, and the dates
    are joined. At most 48 dates, evenly spread, are used.

    Parameters
    ----------
    values : float32 array [k, m, n]
    member : bool array [m, n]

    Returns
    -------
    float32 array [k, d]
        Zero for an expression without variation.
    """
    dates = np.unique(
        np.linspace(0, values.shape[1] - 1, _SIMILAR_DATES).round().astype(int)
    )
    part = np.where(member[dates], values[:, dates], np.nan)
    ranks = cs_rank(torch.from_numpy(part))
    ranks = torch.nan_to_num(ranks - ranks.nanmean(-1, keepdim=True))
    ranks = ranks / ranks.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    flat = ranks.flatten(1)
    return (flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)).numpy()


def p_value(mean: float, std: float, count: int, direction: float) -> float:
    """One-sided t-test that the mean has the sign of `direction`; NaN if undefined."""
    if count < 3 or not std > 0:
        return float("nan")
    t = math.copysign(1.0, direction) * mean / std * math.sqrt(count)
    return float(stats.t.sf(t, count - 1))


def sidak(p: float, tests: int) -> float:
    """Probability that the best of `tests` independent tests is as small as `p`.

    Examples
    --------
    >>> round(sidak(0.01, 10), 4)
    0.0956
    """
    if tests < 1:
        raise ValueError(f"`tests` must be at least 1, got {tests}.")
    if not p < 1:
        return p
    return -math.expm1(tests * math.log1p(-p))


def expected_best(tries: int, variance: float) -> float:
    """Largest size of a ratio to expect of `tries` without skill.

    Of either sign: a factor is turned round where its ratio is negative, so `tries`
    ratios of this variance are as many chances on either side.

    Examples
    --------
    >>> round(expected_best(1000, 0.01), 3)
    0.345
    """
    if tries < 2:
        return 0.0
    z = (1 - _EULER) * stats.norm.ppf(1 - 1 / (2 * tries))
    z += _EULER * stats.norm.ppf(1 - 1 / (2 * tries * math.e))
    return float(math.sqrt(variance) * z)


def deflated_ratio(score: Score, tries: int, variance: float) -> float:
    """Probability that the ratio's size exceeds the best of `tries` without skill.

    NaN where the score has no ratio.
    """
    if not math.isfinite(score.ic_ir) or score.dates < 3:
        return float("nan")
    ratio = abs(score.ic_ir)
    skew = math.copysign(1.0, score.ic_ir) * score.skew
    spread = 1 - skew * ratio + (score.kurtosis - 1) / 4 * ratio**2
    excess = ratio - expected_best(tries, variance)
    z = excess * math.sqrt(score.dates - 1) / math.sqrt(max(spread, 1e-12))
    return float(stats.norm.cdf(z))
