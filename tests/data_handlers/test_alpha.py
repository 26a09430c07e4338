"""Fast handlers: Qlib's names and values, on a planted market and on real stocks."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from qlib.contrib.data.handler import Alpha158, Alpha360
from qlib.data import D
from qlib.data.dataset import DatasetH

from data_handlers.alpha import (
    ExpressionHandler,
    ExpressionLoader,
    FastAlpha158,
    FastAlpha360,
)
from data_handlers.catalogue import LISTS, alpha101, expressions_of
from data_handlers.expression import ExpressionError, parse


def assert_like_qlib(ours, theirs, rtol=2e-6):
    """Same rows and columns, NaN in the same places, values to float32 rounding."""
    assert list(ours.columns) == list(theirs.columns)
    assert ours.index.tolist() == theirs.index.tolist()
    for name in theirs.columns:
        a, b = ours[name].to_numpy(float), theirs[name].to_numpy(float)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b), str(name))
        spread = np.nanstd(b[np.isfinite(b)])
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6 * spread, err_msg=name[1])


CASES = [(FastAlpha158, Alpha158), (FastAlpha360, Alpha360)]


@pytest.mark.parametrize(("fast", "slow"), CASES)
def test_handler_equals_qlibs(qlib_market, fast, slow):
    codes = D.list_instruments(D.instruments("all"), as_list=True)[:5]
    given = dict(
        instruments=codes,
        start_time="2018-01-02",
        end_time="2018-06-29",
        fit_start_time="2018-01-02",
        fit_end_time="2018-03-30",
        learn_processors=[],
        infer_processors=[],
    )
    ours, theirs = fast(**given), slow(**given)
    assert isinstance(ours.data_loader, ExpressionLoader)
    assert_like_qlib(ours.fetch(), theirs.fetch())


def test_real_stocks_with_suspensions_and_listings_equal_qlibs(
    real_data, tmp_path, use_store
):
    from qlib_ext.ingest.run import ingest

    bars = pd.read_parquet(real_data / "daily_cn_sh.parquet")
    bars["date"] = pd.to_datetime(bars["date"])
    first = bars.groupby("instrument")["date"].agg(["min", "size"])
    # The latest listings, those with the fewest days, and a few ordinary stocks.
    codes = [*first["min"].nlargest(6).index, *first["size"].nsmallest(6).index]
    codes = [*dict.fromkeys([*codes, *first.index[::80]])]
    part = bars[bars["instrument"].isin(codes) & (bars["date"] >= "2022-06-01")]
    file = tmp_path / "daily_cn_sh.parquet"
    part.to_parquet(file)
    preset = Path(__file__).parents[2] / "benchmarks" / "presets" / "daily_cn_sh.yaml"
    ingest(tmp_path / "store", preset, data=real_data, files={"daily": [str(file)]})
    use_store(tmp_path / "store")
    pair = Alpha158.get_feature_config(None)
    slow = D.features(D.instruments("all"), pair[0], "2023-01-01", "2023-12-31")
    ours = ExpressionLoader({"feature": pair}).load("all", "2023-01-01", "2023-12-31")
    slow = slow.swaplevel().sort_index()
    slow.columns = ours.columns
    assert_like_qlib(ours, slow)


CORNERS = [
    *("Mean($close,60)", "Std($close,60)", "Max($high,60)", "Rank($close,60)"),
    *("IdxMax($close,10)", "IdxMin($close,10)", "Rank($close,10)"),
    *("Quantile($close,10,0.8)", "Med($close,60)", "Std($close,5)"),
    *("Corr($close,Log($volume+1),10)", "Mean($volume,5)/($volume+1e-12)"),
    *("Slope($close,60)", "Rsquare($close,5)", "Resi($close,10)"),
    *("Sum($close>Ref($close,1),5)", "$close/$volume", "Ref($close,60)"),
]


def test_corners_equal_qlibs(tmp_path, use_store):
    """Windows longer than history, ties, constant windows, no volume, a hole."""
    from qlib_ext.ingest.store import write_store

    rng, n = np.random.default_rng(3), 35
    days = pd.bdate_range("2020-01-01", periods=n)
    parts = []
    for k in range(5):
        close = np.round(10 + rng.normal(size=n).cumsum() / 5, 1)  # ties
        volume = np.exp(rng.normal(size=n))
        if k == 1:
            close[:] = 12.3
        if k == 2:
            volume[5:20] = 0.0
        if k == 3:
            close[10:18] = np.nan
        late = slice(20 if k == 4 else 0, None)
        bars = pd.DataFrame({"datetime": days, "instrument": f"SH60000{k}"})
        values = {c: close for c in ("open", "high", "low", "close")}
        parts.append(bars.assign(**values, volume=volume, factor=1.0)[late])
    write_store(tmp_path / "store", pd.concat(parts))
    use_store(tmp_path / "store")
    ours = ExpressionLoader({"feature": (CORNERS, CORNERS)}).load("all")
    slow = D.features(D.instruments("all"), CORNERS).swaplevel().sort_index()
    slow.columns = ours.columns
    # One known value: 0 / 0, but in Qlib what is left over in running sums, over 0.
    for name in ("Slope($close,60)", "Resi($close,10)"):
        alone = np.isnan(ours["feature", name]) & ~np.isnan(slow["feature", name])
        assert alone.mean() < 0.05
        slow.loc[alone, ("feature", name)] = np.nan
    assert_like_qlib(ours, slow)


class TestDays:
    EXPRESSIONS = (
        Alpha158.get_feature_config(None)[0][9::6],
        Alpha158.get_feature_config(None)[1][9::6],
    )

    def load(self, start, end, pair=EXPRESSIONS):
        return ExpressionLoader({"feature": pair}).load("csi300", start, end)

    def test_a_day_by_itself_equals_the_batch_bit_for_bit(self, qlib_market):
        texts, names = alpha101()
        few = [k for k, t in enumerate(texts) if parse(t).look_back < 120]
        pair = (
            [*self.EXPRESSIONS[0], *(texts[k] for k in few)],
            [*self.EXPRESSIONS[1], *(names[k] for k in few)],
        )
        batch = self.load("2019-01-02", "2019-12-31", pair)
        for day in batch.index.unique(0)[[0, 100, -1]]:
            pd.testing.assert_frame_equal(
                self.load(day, day, pair), batch.loc[[day]], check_exact=True
            )

    def test_the_future_changes_nothing(self, market, tmp_path, use_store):
        """Cut the store, and turn later values upside down: the past stays."""
        from qlib_ext.ingest.store import read_bars, read_instruments, write_store

        codes = read_instruments(market)["instrument"].tolist()[:30]
        bars = read_bars(market, codes)
        bars = bars[bars["datetime"] < "2019-07-01"].copy()
        pair = (
            ["CSRank(Mean($close,5)/$close)", "Rank($close,20)", "Std($volume,10)"],
            ["a", "b", "c"],
        )
        found = []
        for name in ("whole", "cut", "shaken"):
            part = bars.copy()
            late = part["datetime"] > "2019-03-29"
            if name == "cut":
                part = part[~late]
            if name == "shaken":
                part.loc[late, ["close", "volume"]] *= 7.0
            write_store(tmp_path / name, part)
            use_store(tmp_path / name)
            frame = ExpressionLoader({"feature": pair}).load(
                "all", "2018-06-01", "2019-03-29"
            )
            found.append(frame)
        for other in found[1:]:
            pd.testing.assert_frame_equal(found[0], other, check_exact=True)


class TestCrossSection:
    def test_operators_by_hand(self, qlib_market):
        pair = (
            [
                "CSRank($close)",
                "CSZScore($close)",
                "CSDemean($close,$industry)",
                "CSScale($close-$open)",
                "$close",
                "$open",
                "$industry",
            ],
            ["rank", "z", "within", "scale", "close", "open", "industry"],
        )
        frame = (
            ExpressionLoader({"feature": pair})
            .load("csi300", "2019-03-01", "2019-03-29")["feature"]
            .astype(float)
        )
        by_day = frame.groupby("datetime")
        change = frame["close"] - frame["open"]
        expected = {
            "rank": by_day["close"].rank(pct=True),
            "z": (frame["close"] - by_day["close"].transform("mean"))
            / by_day["close"].transform("std"),
            "within": frame["close"]
            - frame.groupby(["datetime", "industry"])["close"].transform("mean"),
            "scale": change / change.abs().groupby("datetime").transform("sum"),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(
                frame[name], values, rtol=1e-5, atol=1e-5, err_msg=name
            )

    def test_only_members_are_compared(self, qlib_market):
        pair = ["CSRank($close)"], ["rank"]
        frame = ExpressionLoader({"feature": pair}).load(
            "csi300", "2019-03-01", "2019-03-29"
        )
        counts = frame.groupby("datetime").size()
        top = frame["feature", "rank"].groupby("datetime").max()
        np.testing.assert_allclose(top, 1.0)
        assert counts.max() < len(
            D.list_instruments(D.instruments("all"), as_list=True)
        )


class TestBadInput:
    def load(self, text):
        return ExpressionLoader({"feature": ([text, "$close"], ["x", "y"])}).load(
            "all", "2019-03-01", "2019-03-05"
        )

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("Mean($close, 5", "position"),
            ("close + 1", r"write \$close"),
            ("__import__('os').system('true')", "position 0"),
            ("Meen($close, 5)", "'Meen' is no operator at position 0"),
            ("$close and $open", "write & and"),
            ("Mean($close, -5)", "must not be negative"),
            ("-$close", "a sign before"),
            ("5", "is a number"),
        ],
    )
    def test_place_of_an_error_is_named(self, qlib_market, text, match):
        with pytest.raises(ExpressionError, match=match):
            self.load(text)

    def test_a_field_that_lacks_names_its_expressions(self, qlib_market):
        with pytest.raises(ValueError, match=r"no value of \$nothing.*Mean\(\$nothing"):
            self.load("Mean($nothing, 5)")

    def test_operators_that_we_lack_are_qlibs(self, qlib_market, monkeypatch):
        from data_handlers.expression import loading

        said = []
        monkeypatch.setattr(loading.logger, "info", said.append)
        frame = self.load("EMA($close, 5)")
        assert any("EMA" in s and "Qlib's own engine" in s for s in said)
        theirs = D.features(
            D.instruments("all"), ["EMA($close, 5)"], "2019-03-01", "2019-03-05"
        )
        theirs = theirs.swaplevel().sort_index().iloc[:, 0]
        np.testing.assert_array_equal(frame["feature", "x"], theirs)
        assert frame["feature", "y"].notna().any()

    def test_lists(self):
        assert {k: len(f()[0]) for k, f in LISTS.items()} == {
            "alpha158": 158,
            "alpha360": 360,
            "alpha101": 101,
        }
        with pytest.raises(ValueError, match="no list is called 'alpha1'"):
            expressions_of("alpha1")
        with pytest.raises(ValueError, match="empty"):
            expressions_of([])


def test_expression_handler_in_a_workflow(qlib_market):
    handler = ExpressionHandler(
        {"a": "CSRank($close/Ref($close,5))", "b": "$volume/Mean($volume,20)"},
        instruments="csi300",
        start_time="2019-01-02",
        end_time="2019-03-29",
    )
    frame = handler.fetch(col_set="feature")
    assert list(frame.columns) == ["a", "b"]
    assert frame["a"].between(0, 1).mean() > 0.9


def test_unknown_arguments_and_days_beyond_the_data_are_named(qlib_market):
    asked = dict(instruments="csi300", start_time="2019-01-02", end_time="2019-02-28")
    with pytest.raises(ValueError, match="ExpressionHandler has no parameter 'fields'"):
        ExpressionHandler(fields=["$close"], **asked)
    with pytest.raises(ValueError, match="FastAlpha158 has no parameter 'horizon'"):
        FastAlpha158(horizon=3, **asked)
    handler = ExpressionHandler({"a": "$close"}, **asked)
    dataset = DatasetH(handler, {"test": ["2021-01-04", "2021-03-01"]})
    with pytest.raises(ValueError, match=r"segments.test.*2021-01-04.*holds no"):
        dataset.prepare("test", col_set="feature")
    assert handler.fetch(slice("2010-01-01", "2010-02-01")).empty  # may be warm-up
