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


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    """Run a test with the loops of the CPU, and with what accelerators run."""
    if request.param == "torch":
        monkeypatch.setattr(metrics, "_compiled", lambda x: False)


@pytest.mark.usefixtures("path")
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


@pytest.mark.usefixtures("path")
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
        monkeypatch.setattr(metrics, "_BLOCK", 1)
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
        for function in (metrics.ic, metrics.rank_ic):
            assert torch.isnan(function(torch.zeros(2, 0), torch.zeros(2, 0))).all()


class TestBadInput:
    def test_min_count_below_two_is_named(self):
        with pytest.raises(ValueError, match="`min_count` must be at least 2, got 1"):
            metrics.rank_ic(torch.zeros(1, 3), torch.zeros(1, 3), min_count=1)

    def test_shapes_that_do_not_fit_are_named(self):
        with pytest.raises(ValueError, match="`score` and `label` must broadcast"):
            metrics.ic(torch.zeros(2, 3), torch.zeros(2, 4))


def _naive_newey_west(x, lags):
    n, mean = len(x), x.mean()
    total = 0.0
    for i in range(n):
        for j in range(n):
            if abs(i - j) <= lags:
                weight = 1 - abs(i - j) / (lags + 1)
                total += weight * (x[i] - mean) * (x[j] - mean)
    return np.sqrt(total) / n


class TestSeries:
    def test_summary_of_hand_worked_numbers(self):
        got = metrics.summarise(torch.tensor([0.1, 0.3, float("nan"), -0.1]))
        assert got.count == 3
        assert got.mean == pytest.approx(0.1)
        assert got.std == pytest.approx(0.2)
        assert got.ir == pytest.approx(0.5)
        assert got.positive == pytest.approx(2 / 3)

    def test_summary_of_nothing_is_nan_and_one_day_has_no_ir(self):
        assert np.isnan(metrics.summarise(torch.tensor([])).mean)
        one = metrics.summarise(torch.tensor([0.2, float("nan")]))
        assert one.count == 1 and np.isnan(one.ir)

    @pytest.mark.parametrize("lags", [0, 1, 9, 60])
    def test_newey_west_equals_a_double_loop(self, lags):
        x = np.convolve(np.random.default_rng(1).standard_normal(60), np.ones(5))
        expected = _naive_newey_west(x, min(lags, len(x) - 1) if lags < 60 else lags)
        got = metrics.newey_west_se(torch.from_numpy(x), lags)
        assert got == pytest.approx(expected, rel=1e-10)

    def test_newey_west_equals_statsmodels(self):
        sm = pytest.importorskip("statsmodels.api")
        x = np.convolve(np.random.default_rng(2).standard_normal(200), np.ones(10))
        fit = sm.OLS(x, np.ones(len(x))).fit(
            cov_type="HAC", cov_kwds={"maxlags": 9, "use_correction": False}
        )
        assert metrics.newey_west_se(torch.from_numpy(x), 9) == pytest.approx(
            float(fit.bse[0]), rel=1e-10
        )

    def test_newey_west_covers_overlapping_returns(self):
        # 10-day sums of independent draws: the true error of their mean is known to be
        # near 10 / sqrt(t) of one draw's, about three times what independence gives.
        rng = np.random.default_rng(3)
        x = np.convolve(rng.standard_normal(4000), np.ones(10), "valid")
        error = metrics.newey_west_se(torch.from_numpy(x), 9)
        naive = metrics.newey_west_se(torch.from_numpy(x), 0)
        assert 0.7 * 10 / np.sqrt(4000) < error < 1.1 * 10 / np.sqrt(4000)
        assert error > 2 * naive

    def test_non_overlapping_starts_at_the_first_known_day(self):
        series = torch.full((12,), 0.1)
        series[:2] = torch.nan
        series[11] = torch.nan
        assert metrics.non_overlapping(series, 4).tolist() == [2, 6, 10]
        assert metrics.non_overlapping(series, 4, 1).tolist() == [3, 7]
        assert metrics.non_overlapping(series * torch.nan, 4).tolist() == []

    def test_lagged_rank_ic_delays_the_score(self):
        score, label = _panels(np.float64, decimals=6)
        got = metrics.lagged_rank_ic(score, label, (0, 2, 50))
        torch.testing.assert_close(
            got[0], metrics.rank_ic(score, label), equal_nan=True
        )
        assert torch.isnan(got[1, :2]).all() and torch.isnan(got[2]).all()
        expected = stats.spearmanr(score[7], label[9], nan_policy="omit")[0]
        assert float(got[1, 9]) == pytest.approx(expected)

    def test_delay_uses_no_later_score(self):
        score, label = _panels()
        changed = score.clone()
        changed[8:] = -changed[8:]
        a, b = (metrics.lagged_rank_ic(s, label, (5,))[0] for s in (score, changed))
        torch.testing.assert_close(a[:13], b[:13], equal_nan=True)

    def test_cs_correlation_equals_pandas_day_by_day(self):
        import pandas as pd

        x = torch.randn(3, 4, 25, generator=torch.Generator().manual_seed(0))
        x[1] += x[0]
        x[0, 1, 3] = torch.nan
        for ranked, method in ((False, "pearson"), (True, "spearman")):
            mean, mean_abs = metrics.cs_correlation(x, ranked)
            daily = [
                pd.DataFrame(x[:, day].T.numpy()).dropna().astype(float).corr(method)
                for day in range(4)
            ]
            np.testing.assert_allclose(mean, sum(daily) / 4, atol=1e-6)
            np.testing.assert_allclose(
                mean_abs, sum(d.abs() for d in daily) / 4, atol=1e-6
            )

    def test_performance_of_hand_worked_returns(self):
        returns = torch.tensor([torch.nan, 0.10, -0.20, 0.25])
        got = metrics.performance(returns)
        assert got.days == 3
        # 1.10 x 0.80 x 1.25 = 1.10 in three days.
        assert got.annual_return == pytest.approx(1.10 ** (252 / 3) - 1, rel=1e-5)
        assert got.annual_mean == pytest.approx(0.05 * 252)
        assert got.annual_volatility == pytest.approx(
            np.std([0.1, -0.2, 0.25], ddof=1) * np.sqrt(252)
        )
        assert got.sharpe == pytest.approx(got.annual_mean / got.annual_volatility)
        assert got.max_drawdown == pytest.approx(0.20)

    def test_drawdown_counts_a_fall_on_the_first_day(self):
        assert metrics.max_drawdown(torch.tensor([-0.1, 0.05])) == pytest.approx(0.1)

    def test_monotonicity_is_one_only_for_ordered_groups(self):
        assert metrics.monotonicity(torch.tensor([-0.1, 0.0, 0.2])) == pytest.approx(1)
        assert metrics.monotonicity(torch.tensor([0.2, 0.0, -0.1])) == pytest.approx(-1)
        assert np.isnan(metrics.monotonicity(torch.tensor([0.2])))


def _market(t=60, n=23, seed=0):
    """Scores and closes with suspensions, a new listing and a delisting."""
    rng = np.random.default_rng(seed)
    score = rng.standard_normal((t, n)).round(1)
    close = 10 * np.exp(np.cumsum(0.03 * rng.standard_normal((t, n)), 0))
    close[rng.random((t, n)) < 0.08] = np.nan
    close[:20, 0] = np.nan
    close[35:, 1] = np.nan
    score[:, 2] = np.nan
    return score, close


def _naive_layers(score, close, signals, groups, can_buy, can_sell, costs=(0.0, 0.0)):
    """Stock by stock and day by day, holding shares rather than weights."""
    t, n = close.shape
    out = np.full((t, groups + 1), np.nan)
    turnover = []
    for g in range(groups + 1):
        shares, cash, last_price = np.zeros(n), 1.0, np.full(n, np.nan)
        value_before, started, turns = None, False, []
        fee_factor = 1.0
        for day in range(t):
            for i in range(n):
                if np.isfinite(close[day, i]):
                    last_price[i] = close[day, i]
            price = np.where(np.isfinite(last_price), last_price, 0.0)
            value = float(shares @ price) + cash
            if started:
                out[day, g] = value / value_before * fee_factor - 1
                fee_factor = 1.0
            value_before = value
            if day - 1 in signals:
                s = score[day - 1]
                ok = np.isfinite(s)
                rank = np.full(n, np.nan)
                rank[ok] = stats.rankdata(s[ok])
                member = np.zeros(n, bool)
                for i in range(n):
                    if ok[i]:
                        layer = int((rank[i] - 1) * groups // ok.sum())
                        member[i] = g == groups or layer == g
                weight = shares * price / value
                wish = member / max(member.sum(), 1)
                new = np.zeros(n)
                free = []
                for i in range(n):
                    gone = not np.isfinite(close[day:, i]).any()
                    if wish[i] > weight[i] and not can_buy[day, i]:
                        new[i] = weight[i]
                    elif wish[i] < weight[i] and not (can_sell[day, i] or gone):
                        new[i] = weight[i]
                    elif member[i]:
                        free.append(i)
                left = max(1 - new.sum(), 0)
                for i in free:
                    new[i] = left / len(free)
                if started:
                    turns.append(np.abs(new - weight).sum() / 2)
                fee_factor = 1 - (
                    costs[0] * np.maximum(new - weight, 0).sum()
                    + costs[1] * np.maximum(weight - new, 0).sum()
                )
                shares = np.divide(new * value, price, out=np.zeros(n), where=price > 0)
                cash = value - float(shares @ price)
                started = True
        turnover.append(turns)
    return out, np.array(turnover).T


class TestLayers:
    def test_layers_of_hand_worked_scores(self):
        score = torch.tensor([[0.5, 0.1, torch.nan, 0.4, 0.2, 0.3]])
        # Five stocks in two groups: ranks 1, 2, 3 below, 4 and 5 above.
        assert metrics.assign_layers(score, 2).tolist() == [[1, 0, -1, 1, 0, 0]]

    def test_layers_differ_by_one_member_and_follow_the_score(self):
        score = torch.randn(5, 103, generator=torch.Generator().manual_seed(0))
        layers = metrics.assign_layers(score, 20)
        for s, g in zip(score, layers, strict=True):
            sizes = torch.bincount(g, minlength=20)
            assert sizes.max() - sizes.min() <= 1
            assert (g[s.argsort()].diff() >= 0).all()

    def test_layers_keep_ties_together(self):
        layers = metrics.assign_layers(torch.tensor([[1.0, 1.0, 1.0, 2.0]]), 4)
        assert len(set(layers[0, :3].tolist())) == 1

    def test_a_group_of_no_stock_has_no_return(self):
        close = torch.tensor(
            [[1.0, 1.0], [1.0, 2.0], [2.0, 2.0], [2.0, 4.0], [2.0, 4.0]]
        )
        score = torch.tensor(
            [[1.0, 2.0], [1.0, 2.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
        )
        test = metrics.layer_backtest(score, close, torch.tensor([0, 2]), 2)
        nan = torch.nan
        # on the third day both are equal: from its fill on the upper group is none
        expected = torch.tensor([nan, nan, 0.0, 1.0, nan], dtype=torch.float64)
        torch.testing.assert_close(test.returns[:, 1], expected, equal_nan=True)
        assert torch.isnan(test.turnover[1, 1])

    def test_fewer_stocks_than_layers_leave_groups_empty(self):
        layers = metrics.assign_layers(torch.tensor([[1.0]]), 5)
        assert layers.tolist() == [[0]]

    @pytest.mark.parametrize("limits", [False, True])
    def test_backtest_equals_a_naive_loop(self, limits):
        score, close = _market()
        traded = np.isfinite(close)
        rng = np.random.default_rng(5)
        can_buy = traded & ((rng.random(close.shape) > 0.2) | (not limits))
        can_sell = traded & ((rng.random(close.shape) > 0.2) | (not limits))
        signals = list(range(3, 60, 5))
        costs = (0.001, 0.002) if limits else (0.0, 0.0)
        expected, turns = _naive_layers(
            score, close, signals, 4, can_buy, can_sell, costs
        )
        got = metrics.layer_backtest(
            torch.from_numpy(score),
            torch.from_numpy(close),
            torch.tensor(signals),
            4,
            buyable=torch.from_numpy(can_buy),
            sellable=torch.from_numpy(can_sell),
            buy_cost=costs[0],
            sell_cost=costs[1],
        )
        np.testing.assert_allclose(got.returns, expected, atol=1e-10)
        np.testing.assert_allclose(got.turnover[1:], turns, atol=1e-10)
        assert torch.isnan(got.turnover[0]).all()

    def test_backtest_of_hand_worked_prices(self):
        # Two stocks, two layers. Signal on day 0, bought at the close of day 1; on day
        # 3 the scores have swapped and day 4 swaps the holdings.
        score = torch.tensor([[1.0, 2.0]]).repeat(6, 1)
        score[3] = torch.tensor([2.0, 1.0])
        close = torch.tensor(
            [[10, 10], [10, 20], [11, 20], [11, 22], [11, 22], [22, 11]]
        ).double()
        got = metrics.layer_backtest(score, close, torch.tensor([0, 3]), 2)
        np.testing.assert_allclose(
            got.returns[2:],
            [[0.1, 0, 0.05], [0, 0.1, 0.1 / 2.1], [0, 0, 0], [-0.5, 1.0, 0.25]],
            atol=1e-12,
        )
        assert torch.isnan(got.returns[:2]).all()
        # Both layers sell all they hold; the pool is back at equal weights already.
        np.testing.assert_allclose(got.turnover[1], [1.0, 1.0, 0.0], atol=1e-12)

    def test_suspended_stock_is_held_at_its_last_price(self):
        score = torch.tensor([[1.0, 2.0]]).repeat(5, 1)
        score[1:] = score[1:].flip(1)
        close = torch.tensor([[10.0, 10], [10, 10], [10, 10], [10, 10], [10, 15]])
        close[2:4, 1] = torch.nan
        got = metrics.layer_backtest(score, close, torch.tensor([0, 1, 3]), 2)
        # Stock 1 tops on day 0 and is bought on day 1; suspended on day 2, it cannot be
        # sold, and its 50 % jump on day 4 is earned.
        np.testing.assert_allclose(got.returns[2:, 1], [0, 0, 0.5], atol=1e-12)
        assert float(got.blocked[1, 1]) == pytest.approx(1.0)

    def test_future_scores_and_prices_change_nothing_before(self):
        score, close = (torch.from_numpy(x) for x in _market())
        signals = torch.arange(3, 60, 5)
        base = metrics.layer_backtest(score, close, signals, 4)
        score2, close2 = score.clone(), close.clone()
        score2[40:] = -score2[40:]
        # Prices change; whether a stock trades at all may be known from the span.
        close2[40:] *= torch.rand(close2[40:].shape, dtype=torch.float64) + 0.5
        other = metrics.layer_backtest(score2, close2, signals, 4)
        torch.testing.assert_close(
            base.returns[:40], other.returns[:40], equal_nan=True, rtol=0, atol=1e-12
        )

    def test_same_close_fill_is_refused(self):
        x = torch.zeros(3, 2)
        with pytest.raises(ValueError, match="`fill_lag` must be at least 1"):
            metrics.layer_backtest(x, x, torch.tensor([0]), 2, fill_lag=0)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"n_layers": 0}, "`n_layers` must be a whole number"),
            ({"n_layers": 2, "buy_cost": 1.0}, "`buy_cost` must be a fraction"),
            ({"n_layers": 2, "sell_cost": -0.1}, "`sell_cost` must be a fraction"),
        ],
    )
    def test_bad_arguments_are_named(self, kwargs, message):
        x = torch.zeros(3, 2)
        with pytest.raises(ValueError, match=message):
            metrics.layer_backtest(x, x, torch.tensor([0]), **kwargs)


class TestAlphalens:
    """Against alphalens-reloaded, an independent and well-used implementation."""

    def test_information_coefficient_and_quantiles_agree(self):
        import warnings

        import pandas as pd

        alphalens = pytest.importorskip("alphalens")
        rng = np.random.default_rng(0)
        days = pd.bdate_range("2020-01-01", periods=30)
        names = [f"S{i:02d}" for i in range(30)]
        close = 10 * np.exp(np.cumsum(0.02 * rng.standard_normal((30, 30)), 0))
        score = rng.standard_normal((30, 30))
        factor = pd.DataFrame(score, days, names).stack()
        factor.index.names = ["date", "asset"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = alphalens.utils.get_clean_factor_and_forward_returns(
                factor,
                pd.DataFrame(close, days, names),
                quantiles=5,
                periods=(5,),
                max_loss=0.5,
            )
            theirs = alphalens.performance.factor_information_coefficient(data)
            turnover = alphalens.performance.quantile_turnover(
                data["factor_quantile"], 5, 1
            )
        label = torch.full((30, 30), torch.nan, dtype=torch.float64)
        label[:-5] = torch.from_numpy(close[5:] / close[:-5] - 1)
        ours = metrics.rank_ic(torch.from_numpy(score), label)
        np.testing.assert_allclose(ours[:25], theirs["5D"], atol=1e-9)

        layers = metrics.assign_layers(torch.from_numpy(score), 5)
        quantile = data["factor_quantile"].unstack().to_numpy()
        np.testing.assert_array_equal(layers[:25] + 1, quantile)
        # Names that left the top group, as alphalens counts turnover.
        top = (layers == 4).numpy()
        left = (top[1:25] & ~top[:24]).sum(1) / top[1:25].sum(1)
        np.testing.assert_allclose(left, turnover.to_numpy()[1:], atol=1e-12)


def test_rank_mae_by_hand_and_at_known_correlations():
    x = torch.tensor([[1.0, 2.0, 3.0, torch.nan]])
    y = torch.tensor([[10.0, 30.0, 20.0, 5.0]])
    # Ranks 1 2 3 and 1 3 2 in units of sqrt(2/3): differences 0, 1, 1.
    expected = np.exp(-2 / 3 / np.sqrt(2 / 3))
    assert metrics.rank_mae(x, y).item() == pytest.approx(expected)
    assert metrics.rank_mae(x, x).item() == pytest.approx(1.0)
    assert torch.isnan(metrics.rank_mae(torch.ones(1, 4), y)).all()
    assert torch.isnan(metrics.rank_mae(x, y, min_count=4)).all()
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 20, 20_000, generator=generator)
    for correlation, value in ((0.0, 0.315), (0.08, 0.333)):
        # Pearson of normals whose Spearman correlation is this.
        r = 2 * np.sin(np.pi * correlation / 6)
        mixed = r * a + np.sqrt(1 - r**2) * b
        assert metrics.rank_mae(a, mixed).mean().item() == pytest.approx(
            value, abs=1e-3
        )


def test_over_starts_is_the_mean_of_each_start():
    series = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0])
    starts = [metrics.non_overlapping(series, 2, k) for k in range(2)]
    mean, each = metrics.over_starts(series, starts)
    assert [x.mean for x in each] == [4.0, 3.0]  # 1, 3, 8 and 2, 4
    assert mean.mean == 3.5 and mean.count == 2
    assert metrics.over_starts(series * torch.nan, starts)[0].count == 0
