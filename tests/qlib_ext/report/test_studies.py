import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from qlib_ext import metrics
from qlib_ext.report import studies, tables
from qlib_ext.report.factor import factor_page
from qlib_ext.report.tables import Context, Evaluation

DAYS = pd.bdate_range("2019-01-01", periods=80)
N = 60


def _context(horizon=5):
    return Context("all", "label", "2019-01-01", "2019-04-20", horizon, 80, 60.0)


def _panels(seed=0):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(80, N, generator=generator)
    noise = torch.randn(80, N, generator=generator)
    close = 10 * torch.exp(0.02 * noise.cumsum(0))
    label = 0.2 * score + torch.randn(80, N, generator=generator)
    score[torch.rand(80, N, generator=generator) < 0.05] = torch.nan
    return score, label, close


@pytest.fixture()
def evaluation():
    score, label, close = _panels()
    return tables.evaluate(score, label, DAYS, _context(), close=close, n_layers=5)


class TestEvaluate:
    def test_week_ends_are_the_last_trading_days_of_weeks(self):
        days = pd.DatetimeIndex(
            ["2019-01-02", "2019-01-04", "2019-01-07", "2019-01-10", "2019-01-14"]
        )
        assert metrics.week_ends(days).tolist() == [1, 3, 4]

    def test_layer_count_follows_the_pool(self):
        for stocks, expected in ((400, 20), (60, 10), (30, 5), (15, 3), (8, 2)):
            assert tables.fitting_layers(torch.zeros(3, stocks), 20) == expected
        assert tables.fitting_layers(torch.zeros(3, 400), 5) == 5

    def test_headline_is_the_mean_over_all_starts(self, evaluation):
        daily = evaluation.frames["rank_ic"]["rank_ic"]
        starts = [daily.iloc[k::5].mean() for k in range(5)]
        assert evaluation.figures["Rank IC 5d"] == pytest.approx(np.mean(starts))
        total = evaluation.frames["rank_ic_by_year"].loc["total"]
        assert total["rank_ic"] == pytest.approx(np.mean(starts))
        assert total["lowest"] == pytest.approx(min(starts))
        assert evaluation.figures["Rank IC 5d highest start"] == pytest.approx(
            max(starts)
        )
        assert total["dates"] == 16

    def test_weekly_win_rate_counts_weeks_above_the_pool(self, evaluation):
        hedged = evaluation.frames["layer_returns"]["hedged_top"].dropna()
        weeks = (1 + hedged).resample("W").prod() - 1
        assert evaluation.figures["Top hedged weekly win rate"] == (weeks > 0).mean()

    def test_constant_scores_leave_empty_tables_and_are_counted(self):
        score, label, close = _panels()
        score = torch.where(torch.isfinite(score), 1.0, torch.nan)
        context = _context()
        result = tables.evaluate(score, label, DAYS, context, close=close, n_layers=5)
        studies.add_pools(result, score, label, close, DAYS, {}, 5)
        assert result.frames["pools"].empty
        page = factor_page(result, "constant").render("")
        assert "Constant scores on 80 of 80 days, no RankIC" in page

    def test_net_values_start_at_one_on_the_first_fill(self, evaluation):
        returns = evaluation.frames["layer_returns"]
        values = evaluation.frames["layer_values"]
        first = returns["pool"].first_valid_index()
        before = values.index[values.index.get_loc(first) - 1]
        assert values.at[before, "pool"] == 1.0
        assert values["pool"].iloc[-1] == pytest.approx(
            (1 + returns["pool"].dropna()).prod()
        )

    def test_start_dates_span_the_logged_ir(self, evaluation):
        figures = evaluation.figures
        low, high = (figures[f"Rank ICIR 5d {x} start"] for x in ("lowest", "highest"))
        assert low <= figures["Rank ICIR 5d"] <= high

    def test_a_panel_refuses_a_pair_twice_and_a_foreign_index(self):
        index = pd.MultiIndex.from_tuples(
            [(DAYS[0], "a"), (DAYS[0], "a")], names=["datetime", "instrument"]
        )
        with pytest.raises(ValueError, match="two rows for a"):
            tables.panel_of(pd.Series([1.0, 2.0], index), DAYS, pd.Index(["a"]))
        with pytest.raises(ValueError, match="must be indexed by"):
            tables.panel_of(pd.Series([1.0], name="x"), DAYS, pd.Index(["a"]))
        with pytest.raises(ValueError, match="must be numeric"):
            tables.panel_of(pd.Series(["1"], index[:1]), DAYS, pd.Index(["a"]))

    def test_a_panel_takes_levels_in_any_order(self):
        index = pd.MultiIndex.from_tuples(
            [("b", DAYS[1]), ("z", DAYS[1]), ("a", DAYS[0])],
            names=["instrument", "datetime"],
        )
        got = tables.panel_of(
            pd.Series([1.0, 9.0, 2.0], index), DAYS[:2], pd.Index(["a", "b"])
        )
        np.testing.assert_array_equal(got, [[2.0, np.nan], [np.nan, 1.0]])


class TestUnits:
    def test_unit_figures_of_planted_units(self):
        generator = torch.Generator().manual_seed(0)
        label = torch.randn(40, 200, generator=generator)
        good = label + 3 * torch.randn(40, 200, generator=generator)
        twin = good + 0.001 * torch.randn(40, 200, generator=generator)
        empty = torch.randn(40, 200, generator=generator)
        table, correlation, figures = tables.unit_table(
            {"good": good, "twin": twin, "empty": empty}.items(), label
        )
        assert figures["Units"] == 3
        assert figures["Units with Rank IC above 5 percent"] == 2
        assert abs(table.at["empty", "rank_ic"]) < 0.03
        assert correlation.at["good", "twin"] > 0.99
        # One pair of twins and two unrelated pairs.
        assert figures["Unit mean abs correlation"] == pytest.approx(1 / 3, abs=0.06)

    def test_a_few_units_show_both_correlations_beside_the_score(self):
        generator = torch.Generator().manual_seed(1)
        label = torch.randn(5, 60, generator=generator)
        one = label + torch.randn(5, 60, generator=generator)
        two = (label + torch.randn(5, 60, generator=generator)).exp()
        two[:, 50:] = torch.nan  # a source of fewer stocks
        units = {"one": one, "two": two}
        _, shown, _ = tables.unit_table(units.items(), label, one + two.nan_to_num())
        assert list(shown) == list(shown.index) == ["score", "one", "two"]
        a, b = one[:, :50].numpy(), two[:, :50].numpy()
        pairs = list(zip(a, b, strict=True))
        pearson = np.mean([stats.pearsonr(*x)[0] for x in pairs])
        spearman = np.mean([stats.spearmanr(*x)[0] for x in pairs])
        assert shown.at["one", "two"] == pytest.approx(pearson, abs=1e-5)
        assert shown.at["two", "one"] == pytest.approx(spearman, abs=1e-5)
        assert spearman > pearson + 0.01


class TestPools:
    def test_rank_ic_within_a_pool_uses_only_its_members(self, evaluation):
        score, label, close = _panels()
        pool = torch.zeros(80, N, dtype=torch.bool)
        pool[:40, :30] = True
        pool[40:, 20:50] = True
        studies.add_pools(
            evaluation, score, label, close, DAYS, {"small": pool}, n_layers=5
        )
        expected = []
        for day in range(80):
            use = (pool[day] & torch.isfinite(score[day])).numpy()
            expected.append(
                stats.spearmanr(score[day].numpy()[use], label[day].numpy()[use])[0]
            )
        table = evaluation.frames["pools"]
        assert table.at["small", "rank_ic"] == pytest.approx(
            np.mean([np.mean(expected[k::5]) for k in range(5)])
        )
        assert table.at["all", "rank_ic"] == pytest.approx(
            evaluation.figures["Rank IC 5d"]
        )
        assert table.at["small", "groups"] <= 5

    def test_outsiders_do_not_touch_a_pool(self, evaluation):
        score, label, close = _panels()
        pool = torch.zeros(80, N, dtype=torch.bool)
        pool[:, :30] = True
        args = (label, close, DAYS, {"small": pool}, 5)
        studies.add_pools(evaluation, score, *args)
        base = evaluation.frames["pools"].loc["small"]
        score[:, 30:] = -7 * score[:, 30:]
        studies.add_pools(evaluation, score, *args)
        pd.testing.assert_series_equal(base, evaluation.frames["pools"].loc["small"])

    def test_an_empty_pool_is_left_out(self, evaluation):
        score, label, close = _panels()
        nobody = torch.zeros(80, N, dtype=torch.bool)
        studies.add_pools(evaluation, score, label, close, DAYS, {"none": nobody}, 5)
        assert list(evaluation.frames["pools"].index) == ["all"]


class TestTradability:
    def test_costs_take_turnover_times_their_rate(self, evaluation):
        score, _, close = _panels()
        everyone = torch.ones(80, N, dtype=torch.bool)
        studies.add_tradability(evaluation, score, close, DAYS, 5, (everyone, everyone))
        table = evaluation.frames["tradability"]
        free, costed = table.loc["idealised, suspensions only"], table.loc["costs"]
        # 52 weeks of buying and selling the turnover, at 0.1 % and 0.2 %.
        drag = 252 / 5 * free["turnover"] * 0.003
        growth = np.log1p(free["annual_return"]) - np.log1p(costed["annual_return"])
        assert growth == pytest.approx(drag, rel=0.1)
        # Without a stock at its limit nothing else changes.
        pd.testing.assert_series_equal(
            table.loc["price limits"], free, check_names=False
        )

    def test_limits_block_weight(self, evaluation):
        score, _, close = _panels()
        generator = torch.Generator().manual_seed(1)
        half = torch.rand(80, N, generator=generator) > 0.5
        studies.add_tradability(evaluation, score, close, DAYS, 5, (half, half))
        table = evaluation.frames["tradability"]
        assert table.at["price limits", "blocked"] > 0.1
        assert table.at["idealised, suspensions only", "blocked"] == pytest.approx(0)

    def test_the_layers_of_the_report_are_not_computed_again(
        self, evaluation, monkeypatch
    ):
        score, _, close = _panels()
        groups, real = [], metrics.layer_backtest

        def counted(score, close, when, n, **kwargs):
            assert kwargs, "the idealised case is in the frames"
            groups.append(n)
            return real(score, close, when, n, **kwargs)

        free = real(score, close, metrics.week_ends(DAYS), 5)
        monkeypatch.setattr(metrics, "layer_backtest", counted)
        studies.add_tradability(evaluation, score, close, DAYS, 5, None)
        assert groups == [5]
        row = evaluation.frames["tradability"].loc["idealised, suspensions only"]
        hedged = pd.DataFrame({"x": (free.returns[:, 4] - free.returns[:, -1]).numpy()})
        expected = tables.performance_table(hedged.set_index(DAYS)).loc["x"]
        assert row["hedged_top"] == pytest.approx(expected["annual_return"])
        assert row["turnover"] == pytest.approx(float(free.turnover[:, 4].nanmean()))

    def test_a_store_without_limits_has_two_cases(self, evaluation):
        score, _, close = _panels()
        studies.add_tradability(evaluation, score, close, DAYS, 5, None)
        assert list(evaluation.frames["tradability"].index) == [
            "idealised, suspensions only",
            "costs",
        ]


class TestFactorRelations:
    def test_incremental_rank_ic_equals_a_daily_least_squares(self, evaluation):
        score, label, _ = _panels()
        factor = torch.randn(80, N, generator=torch.Generator().manual_seed(2))
        factor += score.nan_to_num(0.0)
        factor[:, :4] = torch.nan
        studies.add_factor_relations(evaluation, score, label, {"known": factor})
        expected = []
        for day in range(80):
            use = torch.isfinite(score[day]).numpy()
            y = stats.rankdata(score[day].numpy()[use])
            z = factor[day].numpy()
            gap = ~np.isfinite(z)[use]
            # Ranked among all stocks that have the factor, as the score is.
            rank = np.full(N, np.nan)
            rank[np.isfinite(z)] = stats.rankdata(z[np.isfinite(z)])
            x = np.column_stack(
                [np.ones(use.sum()), np.nan_to_num(rank[use]), gap.astype(float)]
            )
            rest = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
            expected.append(stats.spearmanr(rest, label[day].numpy()[use])[0])
        table = evaluation.frames["incremental"]
        assert table.at["over known", "rank_ic"] == pytest.approx(
            np.mean(expected), abs=1e-6
        )

    def test_a_score_that_is_the_factor_adds_nothing(self, evaluation):
        score, label, _ = _panels()
        factor = 3 * score + 1
        studies.add_factor_relations(evaluation, score, label, {"same": factor})
        table = evaluation.frames["incremental"]
        assert table.at["alone", "rank_ic"] > 0.1
        assert not abs(table.at["over same", "rank_ic"]) > 1e-9
        correlation = evaluation.frames["factor_correlation"]
        assert correlation.at["score", "same"] == pytest.approx(1, abs=1e-6)

    def test_table_has_spearman_below_and_pearson_above(self, evaluation):
        score, label, _ = _panels()
        factor = (2 * score).exp()
        studies.add_factor_relations(evaluation, score, label, {"exp": factor})
        table = evaluation.frames["factor_correlation"]
        assert table.at["exp", "score"] == pytest.approx(1, abs=1e-6)
        assert table.at["score", "exp"] < 0.9

    def test_no_factors_no_frames(self, evaluation):
        score, label, _ = _panels()
        studies.add_factor_relations(evaluation, score, label, {})
        assert "incremental" not in evaluation.frames


class TestExposures:
    def test_exposures_of_hand_worked_groups(self):
        # Ten stocks, two layers; the style is the stock's number, industries are odd
        # and even but for stock 9, whose industry is unknown.
        score = torch.arange(10.0).repeat(3, 1)
        style = torch.arange(10.0).repeat(3, 1)
        industry = (torch.arange(10) % 2).double().repeat(3, 1)
        industry[:, 9] = torch.nan
        result = Evaluation(_context())
        studies.add_exposures(
            result, score, score, industry, {"size": style}, {"0": "Even"}, 2
        )
        size = result.frames["style_exposure"].loc["size"]
        # Pool mean 4.5; top 5..9 has 7, bottom 0..4 has 2.
        assert size["top"] == pytest.approx(2.5)
        assert size["bottom"] == pytest.approx(-2.5)
        assert size["correlation"] == pytest.approx(1.0)
        table = result.frames["industry_exposure"]
        # Even: 5 of 10 in the pool, 6 and 8 in the top five, 0, 2, 4 in the bottom.
        assert table.loc["Even"].tolist() == pytest.approx([0.5, -0.1, 0.1])
        assert table.loc["industry 1"].tolist() == pytest.approx([0.4, 0.0, 0.0])
        assert table.loc["unknown"].tolist() == pytest.approx([0.1, 0.1, -0.1])

    def test_a_score_made_of_styles_is_gone_when_neutral(self):
        generator = torch.Generator().manual_seed(0)
        style = torch.randn(30, 100, generator=generator)
        industry = torch.randint(5, (30, 100), generator=generator).double()
        rank = metrics.cs_rank(style)
        label = style + 0.1 * torch.randn(30, 100, generator=generator)
        result = Evaluation(_context())
        # The rank itself is the style, so that a linear regression takes all of it.
        studies.add_exposures(result, rank, label, industry, {"rank": rank}, {}, 5)
        table = result.frames["neutral"]
        assert table.at["score", "rank_ic"] > 0.9
        assert not abs(table.at["less industries and all styles", "rank_ic"]) > 1e-6


class TestPeriods:
    def test_week_month_and_year_run_to_the_last_day(self):
        # Thursday to Tuesday over a turn of month: the last week holds two days.
        days = pd.DatetimeIndex(
            ["2019-12-30", "2020-01-30", "2020-01-31", "2020-02-03", "2020-02-04"]
        )
        daily = pd.DataFrame({"x": [0.5, 0.1, -0.1, 0.02, 0.03]}, days)
        table = tables.period_returns(daily)
        assert table["days"].tolist() == [2, 2, 4, 1, 4]
        assert list(table.index[:3]) == ["last week", "last month", "year to date"]
        assert list(table.index[3:]) == ["2019", "2020"]
        week = 1.02 * 1.03 - 1  # 0.0506
        year = 1.1 * 0.9 * 1.02 * 1.03 - 1
        assert table["x"].tolist() == pytest.approx([week, week, year, 0.5, year])

    def test_every_report_has_the_periods_of_its_layers(self, evaluation):
        periods = evaluation.frames["periods"]
        returns = evaluation.frames["layer_returns"]["hedged_top"]
        daily = evaluation.frames["rank_ic"]
        assert periods.loc["2019", "hedged_top"] == pytest.approx(
            (1 + returns).prod() - 1
        )
        assert periods.loc["2019", "closeness"] == pytest.approx(
            daily["closeness"].mean()
        )
        assert "Periods" in factor_page(evaluation, "x").render()

    def test_monthly_tenths_against_a_loop(self, evaluation):
        score, _, close = _panels()
        industry = (torch.arange(N) % 3).double().expand(80, N)
        half = torch.zeros(80, N, dtype=torch.bool)
        half[:, : N // 2] = True
        studies.add_monthly_tenths(
            evaluation, score, close, DAYS, {"half": half}, industry
        )
        table = evaluation.frames["monthly"]
        assert table["groups"].tolist() == [10] * 3 + [5] * 3
        # Net of industry means, the best tenth of each month's last day, by a loop.
        prices = close.double().numpy()
        codes = np.arange(N) % 3
        expected = np.full(80, np.nan)
        held = {}
        for day in range(80):
            now = {
                name: shares @ prices[day] / (shares @ prices[day - 1]) - 1
                for name, shares in held.items()
            }
            if held:
                expected[day] = now["top"] - now["pool"]
            if day and DAYS[day].month != DAYS[day - 1].month:
                row = pd.Series(score[day - 1].double().numpy())
                rank = (row - row.groupby(codes).transform("mean")).rank()
                best = np.floor((rank - 1) * 10 / rank.count()) == 9
                held = {
                    "top": np.where(best, 1 / prices[day], 0),
                    "pool": np.where(rank.notna(), 1 / prices[day], 0),
                }
        found = evaluation.frames["monthly_returns"]["all/hedged_top"]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert table.at["all: hedged top", "last month"] == pytest.approx(
            (1 + found[DAYS.month == 4]).prod() - 1
        )
