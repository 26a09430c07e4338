"""The audit's tools: store copies, moved dates, bounds, comparison, shuffled labels."""

import numpy as np
import pandas as pd
import pytest

from qlib_ext.audit.compare import compare_frames, compare_rows, compare_scores
from qlib_ext.audit.config import DateMap, bounded, retarget, store_needs
from qlib_ext.audit.execution import fewer
from qlib_ext.audit.stores import SPIKE, StoreCopies, known_date
from qlib_ext.audit.subject import changed_lag, shuffled
from qlib_ext.dataset import check_purge
from qlib_ext.ingest.store import (
    read_bars,
    read_calendar,
    read_instruments,
    read_table,
)
from qlib_ext.market.calendar import trading_days

DAY = pd.Timestamp("2020-07-01")


class TestCopies:
    @pytest.fixture(scope="class")
    def copies(self, market_small, tmp_path_factory):
        return StoreCopies(market_small, tmp_path_factory.mktemp("copies"), DAY)

    @pytest.fixture(scope="class")
    def bars(self, copies):
        def read(kind):
            codes = [*copies.stocks, *copies.indices]
            keys = ["instrument", "datetime"]
            return read_bars(copies.path(kind), codes).set_index(keys).sort_index()

        return {k: read(k) for k in ("full", "cut", "noise", "members", "spike")}

    def test_all_copies_are_the_same_up_to_the_day(self, bars):
        def early(frame):
            return frame[frame.index.get_level_values("datetime") < DAY]

        for kind, frame in bars.items():
            pd.testing.assert_frame_equal(early(frame), early(bars["full"]), obj=kind)

    def test_cut_ends_on_the_day(self, copies):
        calendar = read_calendar(copies.path("cut"))
        assert calendar[-1] == DAY
        spans = read_instruments(copies.path("cut"), "csi300")
        assert (spans["end"] <= DAY).all() and (spans["start"] <= DAY).all()
        statements = read_table(copies.path("cut"), "statements")
        assert statements["announced"].max() <= DAY
        # A period that ended before the day but was announced later is not there.
        full = read_table(copies.path("full"), "statements")
        late = (full["period_end"] <= DAY) & (full["announced"] > DAY)
        assert late.any() and len(statements) == (full["announced"] <= DAY).sum()

    def test_noise_changes_every_later_number_and_keeps_the_rows(self, bars):
        full, noise = bars["full"], bars["noise"]
        assert noise.index.equals(full.index)
        assert noise.isna().equals(full.isna())
        later = full.index.get_level_values("datetime") > DAY
        prices = noise.loc[later, "close"] / full.loc[later, "close"]
        assert (prices != 1).all() and 0.2 < np.log(prices).std() < 0.4
        prices = noise.loc[later, ["open", "high", "low", "close"]].dropna()
        assert (prices.max(axis=1) == prices["high"]).all()
        assert (prices.min(axis=1) == prices["low"]).all()
        industry = full.loc[later, "industry"].dropna()
        assert set(noise.loc[later, "industry"].dropna()) == set(industry)

    def test_members_leave_and_change_after_the_day_only(self, copies, bars):
        def last(frame):
            return frame.reset_index("datetime")["datetime"].groupby(level=0).max()

        gone = last(bars["members"]) < last(bars["full"])
        assert (last(bars["members"])[gone] == DAY).all() and gone.sum() > 5
        spans = {k: read_instruments(copies.path(k), "csi300") for k in bars}
        past = spans["members"][spans["members"]["start"] <= DAY]
        assert len(past) == (spans["full"]["start"] <= DAY).sum()
        now = spans["members"][spans["members"]["start"] > DAY]
        then = spans["full"][spans["full"]["end"] > DAY]
        assert len(now) > 5 and set(now["instrument"]) != set(then["instrument"])

    def test_spike_raises_prices_of_the_day(self, bars):
        ratio = bars["spike"]["close"] / bars["full"]["close"]
        today = ratio.index.get_level_values("datetime") == DAY
        index = ratio.index.get_level_values("instrument").isin(
            ["SH000300", "SH000905", "SH000852"]
        )
        np.testing.assert_allclose(ratio[today & ~index].dropna(), SPIKE, rtol=1e-6)
        assert (ratio[~today | index].dropna() == 1).all()
        volume = bars["spike"]["volume"].equals(bars["full"]["volume"])
        assert volume

    def test_a_sample_keeps_indices_and_drops_other_stocks(
        self, market_small, tmp_path
    ):
        few = StoreCopies(market_small, tmp_path, DAY).stocks[:5]
        copies = StoreCopies(market_small, tmp_path, DAY, few)
        found = {f.name.upper() for f in (copies.path("full") / "features").iterdir()}
        assert found == {*few, "SH000300", "SH000905", "SH000852"}

    def test_a_row_is_known_when_it_was_announced(self):
        days = pd.to_datetime(["2020-01-01", "2020-02-01"])
        frame = pd.DataFrame({"period_end": days[[0]], "announced": days[[1]]})
        assert known_date(frame)[0] == days[1]
        assert known_date(frame.rename(columns={"announced": "seen"}))[0] == days[1]
        assert known_date(pd.DataFrame({"x": [1]})) is None


class TestDates:
    segments = {  # noqa: RUF012
        "train": ("2012-01-01", "2016-12-14"),
        "valid": ("2017-01-01", "2017-12-14"),
        "test": ("2018-01-01", "2020-12-31"),
    }

    def moved(self, **segments):
        old, new = trading_days(30), trading_days(3)
        dates = DateMap({**self.segments, **segments}, old, new)
        return {
            k: (dates.start(a), dates.end(b))
            for k, (a, b) in {**self.segments, **segments}.items()
        }, dates

    def test_a_purged_split_stays_purged_and_a_hole_stays_a_hole(self):
        for change, borders in (
            ({}, []),
            ({"train": ("2012-01-01", "2016-12-20")}, [("train", "valid")]),
        ):
            found, _ = self.moved(**change)
            short = check_purge(found, trading_days(3), 11)
            assert [s[:2] for s in short] == borders
            original = check_purge({**self.segments, **change}, trading_days(30), 11)
            assert [s[2] for s in short] == [s[2] for s in original]

    def test_order_and_relation_to_segments_stay(self):
        found, dates = self.moved()
        assert found["train"][0] == "2018-01-02"
        assert "2020-12-28" <= found["test"][1] <= "2020-12-31"
        # A fit window that reaches into validation still does.
        assert found["valid"][0] < dates.end("2017-06-30") < found["valid"][1]
        assert dates.end("2016-12-14") == found["train"][1]
        long = [pd.bdate_range(*span).size for span in found.values()]
        assert min(long) > 100

    def test_segments_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match="too short"):
            DateMap(self.segments, trading_days(30), trading_days(1)[:100])

    def test_task_moves_every_date_and_unknown_markets(self):
        _, dates = self.moved()
        task = {
            "a": {"fit_end_time": "2016-12-14", "instruments": "csi100", "n": 20161214},
            "b": [["2018-01-01", "2020-12-31"], "text"],
        }
        found, notes = retarget(task, dates, {"all", "csi300"})
        assert found["a"]["instruments"] == "all" and "csi100" in notes[0]
        assert found["a"]["fit_end_time"] == dates.end("2016-12-14")
        assert found["a"]["n"] == 20161214  # a number is no date
        assert found["b"][0] == [dates.start("2018-01-01"), dates.end("2020-12-31")]


def test_bounds_reach_nested_models_and_leave_what_a_model_does_not_have():
    rnn = {
        "class": "MultiFactorRNN",
        "module_path": "qlib_ext.models",
        "kwargs": {"n_epochs": 200, "checkpoint_dir": "here"},
    }
    task = {
        "model": {
            "class": "ScoreAverage",
            "module_path": "qlib_ext.models",
            "kwargs": {"sources": {"day": {"model": rnn}}},
        },
        "dataset": {"kwargs": {}},
    }
    found = bounded(task, 2, {"hidden_size": 4})["model"]["kwargs"]
    inner = found["sources"]["day"]["model"]["kwargs"]
    assert inner["n_epochs"] == inner["early_stop"] == 2
    assert inner["hidden_size"] == 4 and inner["checkpoint_dir"] is None
    assert "n_epochs" not in found and rnn["kwargs"]["n_epochs"] == 200
    linear = {"class": "LinearModel", "module_path": "qlib.contrib.model.linear"}
    assert bounded({"model": linear, "dataset": {}}, 1, {})["model"]["kwargs"] == {}


def test_feature_folders_are_found_in_defaults():
    node = {"class": "MsHandler", "module_path": "data_handlers.ms", "kwargs": {}}
    assert store_needs({"handler": node}) == {"ms"}
    node = {"class": "HFHandler", "module_path": "data_handlers.aggregates"}
    assert store_needs({"handler": node}) == {"ms", "l2"}
    node = {"class": "FlowHandler", "module_path": "data_handlers.flow"}
    assert "flow" in store_needs({"handler": node})


class TestComparison:
    @pytest.fixture
    def frame(self):
        days = pd.bdate_range("2020-01-01", periods=6)
        index = pd.MultiIndex.from_product(
            [days, list("abc")], names=["datetime", "instrument"]
        )
        columns = pd.MultiIndex.from_tuples([("feature", "x"), ("label", "y")])
        values = np.random.default_rng(0).normal(size=(18, 2))
        values[0, 0] = np.nan
        return pd.DataFrame(values, index, columns)

    def test_equal_frames_are_equal_bit_for_bit(self, frame):
        day = pd.Timestamp("2020-01-06")
        found = compare_frames({"raw": frame}, {"raw": frame.copy()}, day, day)
        assert [d.what for d in found] == ["raw feature", "raw label"]
        assert not any(d.leaks or d.differing for d in found)
        assert found[0].values == 12 and "bit for bit" in found[0].text()

    def test_rounding_is_told_apart_from_a_leak(self, frame):
        day = frame.index[-1][0]
        for size, leaks in ((1e-8, False), (1e-2, True)):
            other = frame.copy()
            other.iloc[4, 0] += size
            (feature, _) = compare_frames({"raw": frame}, {"raw": other}, day, day)
            assert feature.differing == 1 and feature.leaks is leaks
        assert feature.columns == ("x",) and feature.first == frame.index[4][0]

    def test_labels_are_compared_up_to_their_reach_only(self, frame):
        other = frame.copy()
        other.iloc[-3:, 1] = np.nan
        before, after = frame.index[10][0], frame.index[-1][0]
        for until, leaks in ((before, False), (after, True)):
            found = compare_frames({"raw": frame}, {"raw": other}, after, until)
            assert [d.leaks for d in found] == [False, leaks]

    def test_a_value_that_appears_is_a_leak(self, frame):
        other = frame.fillna(0.0)
        (feature, _) = compare_frames(
            {"raw": frame}, {"raw": other}, frame.index[-1][0], frame.index[-1][0]
        )
        assert feature.leaks and feature.beyond == 1

    def test_only_rows_that_hold_something_can_be_gone(self, frame):
        day = frame.index[-1][0]
        for value, leaks in ((np.nan, False), (1.0, True)):
            frame.iloc[-1] = value
            found = compare_frames({"raw": frame}, {"raw": frame[:-1]}, day, day)
            assert [d.leaks for d in found] == [leaks, leaks]

    def test_rows_and_scores(self, frame):
        day = frame.index[-1][0]
        rows = compare_rows("r", frame.index, frame.index[1:], day)
        assert (rows.lost, rows.added) == (1, 0) and rows.leaks
        score = frame.iloc[:, 1]
        assert not compare_scores("s", score, score * (1 + 1e-6), day).leaks
        assert compare_scores("s", score, score * 1.1, day).leaks


class TestLabels:
    def frame(self, days=30, stocks=15):
        index = pd.MultiIndex.from_product(
            [
                pd.bdate_range("2020-01-01", periods=days),
                [f"S{i}" for i in range(stocks)],
            ],
            names=["datetime", "instrument"],
        )
        values = np.arange(2.0 * len(index)).reshape(-1, 2)
        columns = pd.MultiIndex.from_tuples([("feature", "x"), ("label", "y")])
        return pd.DataFrame(values, index, columns)

    def test_each_stock_gets_another_stocks_label_of_the_same_day(self):
        frame = self.frame()
        frame.iloc[3, 1] = np.nan
        found = shuffled(frame, seed=1)
        assert found["feature"].equals(frame["feature"])
        y, z = frame["label"]["y"], found["label"]["y"]
        assert z.isna().equals(y.isna())
        assert (y[y.notna()] != z[y.notna()]).all()
        for day in y.index.unique("datetime"):
            assert sorted(y[day].dropna()) == sorted(z[day].dropna())

    def test_orders_of_two_days_have_nothing_in_common(self):
        found = shuffled(self.frame(days=200), seed=1)["label"]["y"].unstack()
        place = found.rank(axis=1)
        assert (
            abs(place.corr().to_numpy()[np.triu_indices(15, 1)].mean() + 1 / 14) < 0.02
        )
        again = shuffled(self.frame(days=200), seed=2)["label"]["y"].unstack()
        assert (again != found).to_numpy().mean() > 0.8

    def test_reach_is_measured_from_what_changed(self):
        days = pd.bdate_range("2020-01-01", periods=30)
        frame = self.frame()["label"]
        other = frame.copy()
        # The label of t uses t+1 to t+5; days after number 20 are other.
        other.iloc[(20 - 4) * 15 :] += 1
        assert changed_lag(frame, other, days, days[20]) == 5
        assert changed_lag(frame, frame, days, days[20]) == 0


class TestBackTest:
    @pytest.mark.parametrize(("topk", "kept", "dropped"), [(50, 8, 8), (8, 8, 10)])
    def test_a_third_is_held_where_all_would_be(self, topk, kept, dropped):
        kwargs, notes = {"topk": topk, "n_drop": 10}, []
        fewer({"strategy": {"kwargs": kwargs}}, 24, notes)
        assert kwargs == {"topk": kept, "n_drop": dropped}
        assert len(notes) == (topk == 50)
