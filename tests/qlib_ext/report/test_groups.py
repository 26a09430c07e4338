"""Group scores against a loop over rows, rotation by hand, and no look ahead."""

import numpy as np
import pandas as pd
import pytest

from qlib_ext.market import make_market
from qlib_ext.report import groups
from qlib_ext.report.group_record import GroupRecord

DAYS = pd.bdate_range("2020-03-02", periods=40)
STOCKS = pd.Index([f"SH60000{i}" for i in range(6)])


def holdings(rows):
    table = pd.DataFrame(
        rows, columns=["fund", "period_end", "announced", "instrument", "weight"]
    )
    for name in ("period_end", "announced"):
        table[name] = pd.to_datetime(table[name])
    return table


TABLE = holdings(
    [
        ("A", "2019-12-31", "2020-01-20", "SH600000", 0.06),
        ("A", "2019-12-31", "2020-01-20", "SH600001", 0.02),
        ("A", "2020-03-31", "2020-04-15", "SH600002", 0.05),
        # A late word on the first quarter before: no news of what is held now.
        ("A", "2019-09-30", "2020-04-20", "SH600005", 0.10),
        ("B", "2019-12-31", "2020-01-20", "SH600003", 0.01),
        ("B", "2019-12-31", "2020-01-20", "SZ999999", 0.03),
    ]
)


class TestLevels:
    def test_against_a_loop_over_rows(self):
        rng = np.random.default_rng(0)
        values = rng.normal(size=(40, 6))
        values[rng.random((40, 6)) < 0.2] = np.nan
        weight = rng.random((40, 6)) * (rng.random((40, 6)) < 0.7)
        level, cover = groups.group_levels(values, weight)
        for t in range(40):
            row = pd.DataFrame({"x": values[t], "w": weight[t]})
            known = row.dropna()
            if not known["w"].sum():
                assert np.isnan(level[t]) and cover[t] == 0
                continue
            mean = (known["x"] * known["w"]).sum() / known["w"].sum()
            assert level[t] == pytest.approx(mean)
            assert cover[t] == pytest.approx(known["w"].sum() / row["w"].sum())

    def test_baskets_count_from_the_day_they_were_public(self):
        made = dict(groups.basket_weights(TABLE, ["A", "B"], DAYS, STOCKS))
        before = DAYS < "2020-04-15"
        assert np.allclose(made["A"][before], [0.75, 0.25, 0, 0, 0, 0])
        assert np.allclose(made["A"][~before], [0, 0, 1, 0, 0, 0])
        # Three quarters of B are not among the stocks: no mean of a quarter of it.
        assert np.allclose(made["B"], [0, 0, 0, 0.25, 0, 0])
        ones = np.ones((40, 6))
        assert groups.group_levels(ones, made["B"], np.ones(40))[1][0] == 0.25

    def test_nothing_of_a_day_depends_on_later_reports(self):
        later = TABLE.copy()
        late = later["announced"] > "2020-04-01"
        later.loc[late, "instrument"] = "SH600004"
        now = DAYS <= "2020-04-01"
        for one, two in zip(
            groups.basket_weights(TABLE, ["A"], DAYS, STOCKS),
            groups.basket_weights(later, ["A"], DAYS, STOCKS),
            strict=True,
        ):
            np.testing.assert_array_equal(one[1][now], two[1][now])
            assert not np.array_equal(one[1], two[1])

    def test_members_by_the_weights_of_the_day_before(self):
        close = np.array([[1.0, 1.0], [2.0, 1.0], [2.0, 1.5], [2.0, np.nan]])
        weight = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
        # Half of +100 %, then the second alone: +50 %, then halted.
        assert groups.member_closes(close, weight) == pytest.approx(
            [1.0, 1.5, 2.25, 2.25]
        )


class TestGaps:
    def test_a_fund_without_basket_is_an_error_or_a_named_gap(self):
        with pytest.raises(ValueError, match="`groups`: C has no basket up to"):
            list(groups.basket_weights(TABLE, ["C"], DAYS, STOCKS))
        notes = []
        made = groups.basket_weights(
            TABLE, ["A", "C"], DAYS, STOCKS, skip=True, notes=notes
        )
        assert [name for name, _ in made] == ["A"]
        assert notes == [f"C has no basket up to {DAYS[-1]:%Y-%m-%d}."]

    def test_a_basket_that_comes_after_the_first_day(self):
        late = TABLE[TABLE["announced"] > "2020-04-01"]
        with pytest.raises(ValueError, match="A has no basket before 2020-04-15"):
            list(groups.basket_weights(late, ["A"], DAYS, STOCKS))
        notes = []
        ((_, weight),) = groups.basket_weights(
            late, ["A"], DAYS, STOCKS, skip=True, notes=notes
        )
        assert notes == ["A has no basket before 2020-04-15."]
        assert not weight[DAYS < "2020-04-15"].any()

    def test_a_basket_dated_by_its_period_is_refused(self):
        early = TABLE.assign(announced=TABLE["period_end"])
        with pytest.raises(ValueError, match="dated by the end of their period"):
            list(groups.basket_weights(early, ["A"], DAYS, STOCKS))

    def test_rates_need_positive_levels(self):
        levels = pd.DataFrame({"x": [1.0, -1.0]}, DAYS[:2])
        with pytest.raises(ValueError, match="`ranked`: x has levels of 0 or less"):
            groups.weekly_change(levels, rate=True)


class TestRotation:
    def test_by_hand(self):
        # Two weeks; A leads at the end of the first, C at the end of the second.
        days = pd.bdate_range("2020-03-02", periods=13)
        signal = pd.DataFrame(0.0, days, ["A", "B", "C"])
        signal.loc[days[4]] = [3.0, 2.0, 1.0]
        signal.loc[days[9]] = [1.0, 2.0, 3.0]
        closes = pd.DataFrame(1.0, days, ["A", "B", "C"])
        closes.loc[days[6] :, "A"] = 1.1
        closes.loc[days[11] :, "C"] = 1.2
        made = groups.rotate(signal, closes, 1, buy_cost=0.01, sell_cost=0.02)
        best = made.returns["best"]
        # A is bought at Monday's close for 1 %, and gains 10 % on Tuesday.
        assert np.isnan(best.iloc[5])
        assert best.iloc[6] == pytest.approx(1.1 * 0.99 - 1)
        # On the second Monday A is sold (2 %) and C bought (1 %): + 20 % on Tuesday.
        assert best.iloc[11] == pytest.approx(1.2 * 0.97 - 1)
        # All three at equal weight, free: 10 % of a third; then a third of 20 %.
        assert made.returns["all"].iloc[6] == pytest.approx(0.1 / 3)
        assert made.returns["all"].iloc[11] == pytest.approx(0.2 / 3)
        assert made.held.iloc[:, 0].tolist() == ["A", "C"]
        assert made.turnover == pytest.approx(1.0)

    def test_a_later_signal_changes_no_earlier_return(self):
        rng = np.random.default_rng(1)
        signal = pd.DataFrame(rng.normal(size=(40, 5)), DAYS)
        closes = pd.DataFrame(np.exp(rng.normal(size=(40, 5)).cumsum(0) / 50), DAYS)
        other = signal.copy()
        other.iloc[20:] = rng.normal(size=(20, 5))
        one, two = (groups.rotate(x, closes, 2, 0.001, 0.002) for x in (signal, other))
        pd.testing.assert_frame_equal(one.returns[:21], two.returns[:21])

    def test_k_must_leave_something_out(self):
        frame = pd.DataFrame(1.0, DAYS, ["A", "B"])
        with pytest.raises(ValueError, match="`k` must lie between 1 and 1, got 2"):
            groups.rotate(frame, frame, 2, 0.0, 0.0)


class TestRecord:
    @pytest.fixture(scope="class")
    def store(self, made_once):
        options = dict(stocks=60, years=1, seed=4, trades=20, etfs=8)
        return made_once("groups", lambda out: make_market(out, **options))

    @pytest.fixture
    def run(self, store, use_store):
        use_store(store)
        oracle = pd.read_parquet(f"{store}.oracle.parquet")
        score = oracle.set_index(["datetime", "instrument"])["total"]

        def run(sets, name="groups", **kwargs):
            from qlib.workflow import R

            with R.start(experiment_name=name):
                recorder = R.get_recorder()
                frame = score.to_frame("score")
                recorder.save_objects(**{"pred.pkl": frame, "label.pkl": frame})
                record = GroupRecord(recorder, sets, **kwargs)
                record.generate()
                record.check(include_self=True)

            def parquet(file):
                return pd.read_parquet(
                    recorder.client.download_artifacts(recorder.id, f"groups/{file}")
                )

            return recorder, score, parquet

        return run

    def test_industries_indices_and_etfs(self, run):
        sets = {
            "industry": {"of": "industry"},
            "index": {"of": "market", "groups": ["csi300", "csi500"], "k": 1},
            "etf": {
                "of": "holdings",
                "path": "{store}/tables/etf_holdings.parquet",
                "gaps": "name",
            },
        }
        recorder, score, parquet = run(sets)
        from qlib.data import D

        # One day of one index, by pandas: ranks of the day, weights of the store.
        day = pd.Timestamp("2020-06-30")
        ranks = score.xs(day, level="datetime").rank()
        ranks = (ranks - 0.5) / len(ranks) - 0.5
        weights = D.features(D.instruments("csi500"), ["$weight_csi500"], day, day)
        weights = weights.iloc[:, 0].droplevel("datetime").dropna()
        known = weights.index.intersection(ranks.index)
        mean = (ranks[known] * weights[known]).sum() / weights[known].sum()
        levels = parquet("index_levels.parquet")
        assert levels.loc[day, "csi500"] == pytest.approx(mean, abs=1e-6)
        changes = parquet("index_changes.parquet")
        assert changes.loc[day, "csi500"] == pytest.approx(
            levels["csi500"].loc[:day].iloc[-1] - levels["csi500"].loc[:day].iloc[-6]
        )
        assert {"level/best", "change/excess"} <= set(parquet("etf_returns.parquet"))
        logged = recorder.list_metrics()
        assert "rotation industry level excess annual return" in logged
        path = recorder.client.download_artifacts(recorder.id, "groups/report.html")
        page = open(path, encoding="utf-8").read()
        assert "Held last" in page and "On 2020-12-31" in page

    def test_attention_is_averaged_as_it_is(self, run):
        sets = {"industry": {"of": "industry", "k": 2}}
        _, _, parquet = run(sets, field="$turnover", ranked=False)
        levels = parquet("industry_levels.parquet")
        assert (levels.stack() > 0).all()
        changes = parquet("industry_changes.parquet").iloc[-1]
        rate = levels.iloc[-1] / levels.iloc[-6] - 1
        pd.testing.assert_series_equal(changes, rate, check_names=False)

    @pytest.mark.slow
    def test_an_industry_stands_for_the_basket_of_a_theme(self, run):
        from data_handlers.holdings import read_holdings

        path = "{store}/tables/etf_holdings.parquet"
        funds = sorted(read_holdings(path)["fund"].unique())[:3]
        industries = {"of": "industry", "weight": "market_cap"}
        _, _, parquet = run({"industry": industries})
        levels = parquet("industry_levels.parquet")
        name, other = levels.columns[:2]
        themes = {
            "of": "themes",
            "weight": "market_cap",
            "k": 1,
            "funds": {funds[0]: name, funds[1]: [other], funds[2]: [name, other]},
        }
        recorder, _, parquet = run({"etf": themes})
        found = parquet("etf_levels.parquet")
        assert list(found) == funds
        np.testing.assert_allclose(found[funds[0]], levels[name])
        both = found[funds[2]]
        assert (both <= levels[[name, other]].max(axis=1) + 1e-9).all()
        path = recorder.client.download_artifacts(recorder.id, "groups/summary.json")
        assert "not the funds' own" in open(path).read()
        themes["funds"] = {funds[0]: "sorcery"}
        with pytest.raises(ValueError, match="the industry 'sorcery', which no scored"):
            run({"etf": themes})

    def test_a_fund_without_bars_or_basket_is_named(self, run):
        path = "{store}/tables/etf_holdings.parquet"
        sets = {"etf": {"of": "holdings", "path": path, "groups": ["SH510999"]}}
        with pytest.raises(ValueError, match="SH510999 has no basket"):
            run(sets)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (None, "`sets` must name groups"),
        ({"a": {"of": "theme"}}, "`sets.a` must have `of`"),
        ({"a": {"of": "themes"}}, "`sets.a.funds` must map ETFs to industries"),
        ({"a": {"of": "industry", "groups": []}}, "`sets.a` of industry takes"),
        ({"a": {"of": "market"}}, "`sets.a.groups` must list markets"),
        ({"a": {"of": "industry", "k": 0}}, "`sets.a.k` must be"),
        ({"a": {"of": "holdings", "gaps": "x"}}, "`sets.a.gaps` must be"),
        ({"../a": {"of": "industry"}}, "part of file names"),
        ({"a": {"of": "market", "groups": ["x", "x"]}}, "each once"),
        ({"a": {"of": "industry", "weight": 3}}, "`sets.a.weight` must name"),
    ],
)
def test_bad_sets_are_named(sets, message):
    with pytest.raises(ValueError, match=message):
        GroupRecord(None, sets)
