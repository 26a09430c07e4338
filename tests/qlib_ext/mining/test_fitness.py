import numpy as np
import pytest
import torch
from scipy import stats

from qlib_ext.metrics import rank_ic
from qlib_ext.mining.fitness import (
    Score,
    deflated_ratio,
    expected_best,
    p_value,
    rank_vectors,
    score_values,
    sidak,
)


def test_sidak_is_the_chance_of_the_best_of_many():
    assert sidak(0.05, 1) == pytest.approx(0.05)
    assert sidak(0.01, 48) == pytest.approx(1 - 0.99**48)
    assert sidak(1e-18, 10) == pytest.approx(1e-17)
    assert sidak(1.0, 5) == 1.0
    with pytest.raises(ValueError, match="`tests`"):
        sidak(0.1, 0)


def test_p_value_is_scipys_one_sided_test():
    x = np.random.default_rng(0).normal(0.05, 0.1, 24)
    for sign, side in ((1.0, "greater"), (-1.0, "less")):
        ours = p_value(x.mean(), x.std(ddof=1), len(x), sign)
        assert ours == pytest.approx(stats.ttest_1samp(x, 0, alternative=side).pvalue)
    assert np.isnan(p_value(0.1, 0.0, 24, 1.0))


@pytest.mark.parametrize("tries", [50, 2000])
def test_expected_best_is_what_simulation_gives(tries):
    draws = np.random.default_rng(1).normal(0, 0.15, (1000, tries))
    assert expected_best(tries, 0.15**2) == pytest.approx(
        np.abs(draws).max(1).mean(), rel=0.02
    )
    assert expected_best(1, 0.15**2) == 0.0


def test_deflated_ratio_by_hand():
    # One try: IR0 = 0. Normal RankIC: z = 0.3 sqrt(99) / sqrt(1 + 0.5 x 0.09).
    one = Score(0.03, 0.3, 100, 1.0, 0.0, 3.0)
    z = 0.3 * 99**0.5 / 1.045**0.5
    assert deflated_ratio(one, 1, 0.01) == pytest.approx(stats.norm.cdf(z))
    assert deflated_ratio(one, 10_000, 0.01) < 0.5
    mirrored = Score(-0.03, -0.3, 100, 1.0, -0.4, 3.5)
    twin = Score(0.03, 0.3, 100, 1.0, 0.4, 3.5)
    assert deflated_ratio(mirrored, 50, 0.01) == deflated_ratio(twin, 50, 0.01)
    assert np.isnan(deflated_ratio(Score(0.0, np.nan, 100, 1.0, 0.0, 3.0), 5, 0.1))


def test_best_of_many_random_series_is_not_beyond_luck():
    rng = np.random.default_rng(2)
    x = rng.normal(0, 0.1, (3000, 120))
    ratio = x.mean(1) / x.std(1, ddof=1)
    best = int(np.abs(ratio).argmax())
    score = Score(
        x[best].mean(),
        ratio[best],
        120,
        1.0,
        stats.skew(x[best]),
        stats.kurtosis(x[best], fisher=False),
    )
    assert stats.ttest_1samp(x[best], 0).pvalue < 0.001
    assert deflated_ratio(score, 6000, ratio.var()) < 0.95


def test_scores_are_those_of_the_metrics():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(3, 12, 30)).astype(np.float32)
    label = torch.from_numpy(rng.normal(size=(12, 30)).astype(np.float32))
    member = np.ones((12, 30), bool)
    member[:, 25:] = False
    label[:, 25:] = np.nan
    values[1, :, :10] = np.nan
    values[2] = 1.0
    scores, series = score_values(values, label, member)
    expected = rank_ic(torch.from_numpy(values[0]), label, 10)
    assert torch.equal(series[0], expected)
    assert scores[0].rank_ic == pytest.approx(float(expected.mean()))
    assert scores[0].ic_ir == pytest.approx(float(expected.mean() / expected.std()))
    assert [s.coverage for s in scores] == [1.0, 15 / 25, 1.0]
    assert scores[2].dates == 0 and np.isnan(scores[2].ic_ir)


def test_rank_vectors_give_mean_rank_correlation():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(4, 20, 50)).astype(np.float32)
    x[1] = np.exp(x[0])
    x[2] = -(x[0] ** 3)
    member = np.ones((20, 50), bool)
    v = rank_vectors(x, member)
    alike = v @ v.T
    assert alike[0, 1] == pytest.approx(1.0, abs=1e-5)
    assert alike[0, 2] == pytest.approx(-1.0, abs=1e-5)
    by_day = [stats.spearmanr(a, b)[0] for a, b in zip(x[0], x[3], strict=True)]
    assert alike[0, 3] == pytest.approx(np.mean(by_day), abs=1e-5)
    assert not rank_vectors(np.ones((1, 20, 50), np.float32), member).any()
