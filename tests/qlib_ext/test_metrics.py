import numpy as np
import pytest
import torch
from scipy import stats

from qlib_ext import metrics


def _panels(dtype=np.float32, t=12, n=40, decimals=1, seed=0):
    """Two correlated panels with ties, holes, an empty day and a one-stock day."""
    rng = np.random.default_rng(seed)
    score = rng.standard_normal((t, n)).round(decimals).astype(dtype)
    label = (0.3 * score + rng.standard_normal((t, n))).round(decimals).astype(dtype)
    score[rng.random((t, n)) < 0.1] = np.nan
    label[rng.random((t, n)) < 0.1] = np.nan
    score[3] = np.nan
    label[4, 1:] = np.nan
    label[5, 0] = np.inf
    score[6] = 1.0
    return torch.from_numpy(score), torch.from_numpy(label)


def _reference(score, label, correlation, min_count=2):
    out = []
    for s, y in zip(score.double().numpy(), label.double().numpy(), strict=True):
        ok = np.isfinite(s) & np.isfinite(y)
        s, y = s[ok], y[ok]
        if len(s) < min_count or len(set(s)) < 2 or len(set(y)) < 2:
            out.append(np.nan)
        else:
            out.append(correlation(s, y)[0])
    return np.array(out)


class TestReferenceValues:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("decimals", [0, 1, 6])
    def test_cs_rank_equals_scipy_rankdata(self, dtype, decimals):
        x, _ = _panels(dtype, decimals=decimals)
        ranks = metrics.cs_rank(x).numpy()
        for row, got in zip(x.numpy(), ranks, strict=True):
            ok = np.isfinite(row)
            np.testing.assert_array_equal(got[ok], stats.rankdata(row[ok]))
            assert np.isnan(got[~ok]).all()

    def test_cs_rank_keeps_negative_zero_and_zero_tied(self):
        got = metrics.cs_rank(torch.tensor([[0.0, -0.0, -1.0]]))
        assert got.tolist() == [[2.5, 2.5, 1.0]]

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_rank_ic_and_ic_equal_scipy(self, dtype):
        score, label = _panels(dtype)
        np.testing.assert_allclose(
            metrics.rank_ic(score, label),
            _reference(score, label, stats.spearmanr),
            atol=1e-12,
        )
        np.testing.assert_allclose(
            metrics.ic(score, label),
            _reference(score, label, stats.pearsonr),
            atol=1e-12,
        )

    def test_factors_share_one_label(self):
        score, label = _panels()
        both = metrics.rank_ic(torch.stack([score, -score]), label)
        assert both.shape == (2, len(score))
        torch.testing.assert_close(both[0], -both[1], equal_nan=True)


class TestProperties:
    def test_rank_ic_ignores_instrument_order_and_monotone_maps(self):
        score, label = _panels(np.float64, decimals=6)
        order = torch.randperm(score.shape[1], generator=torch.Generator())
        base = metrics.rank_ic(score, label)
        torch.testing.assert_close(
            metrics.rank_ic(score[:, order], label[:, order]), base, equal_nan=True
        )
        torch.testing.assert_close(
            metrics.rank_ic(score.exp() * 3 - 7, label), base, equal_nan=True
        )

    def test_days_do_not_touch_each_other(self, monkeypatch):
        score, label = _panels()
        base = metrics.rank_ic(score, label)
        monkeypatch.setattr(metrics, "_CPU_BLOCK", 1)
        torch.testing.assert_close(
            metrics.rank_ic(score, label), base, equal_nan=True, rtol=0, atol=0
        )

    def test_undefined_days_are_nan(self):
        score, label = _panels()
        got = metrics.rank_ic(score, label)
        assert torch.isnan(got[[3, 4, 6]]).all()
        assert torch.isnan(metrics.ic(score, label)[[3, 4, 6]]).all()
        assert torch.isfinite(got[[0, 1, 2, 5]]).all()

    def test_min_count_masks_small_days(self):
        score, label = _panels()
        pairs = (torch.isfinite(score) & torch.isfinite(label)).sum(1)
        got = metrics.rank_ic(score, label, min_count=35)
        assert torch.isnan(got[pairs < 35]).all()

    def test_empty_panels_give_empty_results(self):
        assert metrics.rank_ic(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)
        assert torch.isnan(metrics.rank_ic(torch.zeros(2, 0), torch.zeros(2, 0))).all()


class TestBadInput:
    def test_min_count_below_two_is_named(self):
        with pytest.raises(ValueError, match="`min_count` must be at least 2, got 1"):
            metrics.rank_ic(torch.zeros(1, 3), torch.zeros(1, 3), min_count=1)

    def test_shapes_that_do_not_fit_are_named(self):
        with pytest.raises(ValueError, match="`score` and `label` must broadcast"):
            metrics.ic(torch.zeros(2, 3), torch.zeros(2, 4))
