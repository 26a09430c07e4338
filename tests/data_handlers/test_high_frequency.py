import numpy as np
import pandas as pd
import pytest
from qlib.data import D

from data_handlers.aggregate.build import build
from data_handlers.day import DayHandler
from data_handlers.high_frequency import (
    FACTORS,
    HFFactorHandler,
    IntradayHandler,
    improved_reversal,
)
from data_handlers.loaders import read_daily_parquet
from qlib_ext.market import make_minute, make_ticks

TIMES = dict(
    start_time="2020-02-03",
    end_time="2020-03-31",
    fit_start_time="2020-02-03",
    fit_end_time="2020-02-28",
    styles=[],
)


@pytest.fixture(scope="module")
def times(qlib_market):
    """Dates and a few stocks."""
    names = sorted(D.list_instruments(D.instruments("all"), as_list=True))[:20]
    return {**TIMES, "instruments": names}


@pytest.fixture(scope="module")
def files(qlib_market, times, tmp_path_factory):
    """Folders of `ms`, `bars` and `l2` files of a few stocks and weeks."""
    root = tmp_path_factory.mktemp("frequency")
    minute = make_minute(
        qlib_market, root / "minute", stocks=times["instruments"], start="2020-01-02",
        end="2020-03-31", bar_minutes=15,
    )  # fmt: skip
    make_ticks(
        qlib_market,
        root / "ticks",
        stocks=times["instruments"][:5],
        start="2020-03-02",
        end="2020-03-31",
    )
    for kind in ("ms", "bars"):
        build(kind, minute, root, bar_minutes=15, progress=False)
    build("l2", root / "ticks", root, progress=False)
    return root


def raw(handler):
    return handler.fetch(col_set="feature", data_key="raw")


class TestImprovedReversal:
    def test_by_hand(self):
        returns = np.array([[0.01], [0.02], [-0.03], [0.04]])
        size = np.array([[5.0], [9.0], [7.0], [1.0]])
        got = improved_reversal(returns, size, 4)
        # Days 2 and 3 have the largest trades: -0.01 less 0.05.
        assert got[3, 0] == pytest.approx(-0.06)
        # Of three days one is large, the second: 0.02 - (0.01 - 0.03).
        assert got[2, 0] == pytest.approx(0.04)
        assert np.isnan(got[0, 0])  # one of four days

    def test_days_that_lack_either_take_no_part(self):
        returns = np.array([[0.01], [np.nan], [-0.03], [0.04], [0.5]])
        size = np.array([[5.0], [9.0], [7.0], [np.nan], [1.0]])
        got = improved_reversal(returns, size, 5)
        assert got[4, 0] == pytest.approx(-0.03 - 0.01 - 0.5)


class TestFactors:
    def test_means_of_daily_values_with_their_signs(self, times, files):
        handler = HFFactorHandler(
            ms_path=str(files / "ms"), l2_path=str(files / "l2"), window=5, **times
        )
        got = raw(handler)
        assert list(got) == list(FACTORS)
        ms = read_daily_parquet(files / "ms", end_time="2020-03-31")
        l2 = read_daily_parquet(files / "l2")
        days = pd.DatetimeIndex(D.calendar(end_time="2020-03-31"))

        def mean(column):
            wide = column.unstack("instrument").reindex(days)
            return wide.rolling(5, min_periods=3).mean().stack(future_stack=True)

        for name, value in {
            "hf_down_vol": -np.sqrt(ms["ms_down_ratio"]),
            "hf_tail": -ms["ms_vol_last30"],
            "hf_open_big_share": l2["l2_open_big_net_ratio"],
            "hf_big_push": -l2["l2_big_push"],
        }.items():
            want = mean(value).reindex(got.index)
            np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-6)
            assert got[name].notna().sum() > 20

    def test_skewness_is_about_the_mean(self, times, files):
        handler = HFFactorHandler(
            ms_path=str(files / "ms"), l2_path=None, window=1, **times
        )
        got = raw(handler)["hf_skew"]
        assert list(raw(handler)) == ["hf_skew", "hf_down_vol", "hf_tail"]
        bars = read_daily_parquet(files / "bars")
        r = bars[[c for c in bars if c.endswith("_return")]].reindex(got.index)
        about = r.sub(r.mean(axis=1), axis=0)
        want = -(about**3).mean(axis=1) / (about**2).mean(axis=1) ** 1.5
        both = got.notna() & want.notna()
        assert both.sum() > 500
        np.testing.assert_allclose(got[both], want[both], rtol=1e-3, atol=1e-3)

    def test_are_net_of_industry_and_size_and_look_at_no_later_day(self, times, files):
        options = dict(ms_path=str(files / "ms"), l2_path=None)
        infer = HFFactorHandler(**options, **times)
        data = infer.fetch(col_set=["feature", "risk"], data_key="infer")
        value, risk = data["feature"]["hf_tail"], data["risk"]
        day = value.index.get_level_values("datetime")
        assert value.groupby([day, risk["industry"]]).mean().abs().max() < 1e-3
        np.testing.assert_allclose(
            value.groupby(day).std(ddof=0).dropna().clip(0, 1.01), 1.0, atol=1e-2
        )
        early = HFFactorHandler(**options, **{**times, "end_time": "2020-03-02"})
        pd.testing.assert_frame_equal(
            raw(infer).loc[:"2020-03-02"], raw(early), check_exact=False, rtol=1e-6
        )

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"columns": ["hf_skw"]}, "`columns` names 'hf_skw', which is no factor"),
            ({"columns": ["hf_outflow"]}, "names 'hf_outflow', which needs `l2`"),
            ({"ms_path": None}, "both left out"),
            ({"window": 0}, "`window` must be a whole number of at least 1"),
        ],
    )
    def test_bad_input_is_named(self, times, files, kwargs, message):
        given = {"ms_path": str(files / "ms"), "l2_path": None, **kwargs}
        with pytest.raises(ValueError, match=message):
            HFFactorHandler(**given, **times)

    def test_a_set_that_the_store_lacks_is_left_out(
        self, times, files, qlib_market, use_store, tmp_path, capsys
    ):
        store = tmp_path / "store"
        store.mkdir()
        for name in ("calendars", "features", "instruments"):
            (store / name).symlink_to(qlib_market / name)
        use_store(store)
        with pytest.raises(ValueError, match=r"No Parquet file at .*ms"):
            HFFactorHandler(**times)
        (store / "ms").symlink_to(files / "ms")
        names = [n for n, (_, kind, _) in FACTORS.items() if kind == "ms"]
        assert list(raw(HFFactorHandler(**times))) == names
        assert "left out, no files: ['hf_open_buy_share'" in capsys.readouterr().err
        with pytest.raises(ValueError, match=r"No Parquet file at .*l2"):
            HFFactorHandler(l2_path=str(store / "l2"), **times)


class TestPartsOfTheDay:
    def test_merge_the_bars_of_the_same_day(self, times, files):
        handler = IntradayHandler(path=str(files / "bars"), parts=8, **times)
        got = raw(handler)
        assert list(got)[:2] == ["return_0", "return_1"] and got.shape[1] == 24
        bars = read_daily_parquet(files / "bars").reindex(got.index)
        want = bars["bar_02_return"] + bars["bar_03_return"]
        np.testing.assert_allclose(got["return_1"], want, atol=1e-6)
        want = bars[["bar_14_range", "bar_15_range"]].max(axis=1)
        np.testing.assert_allclose(got["range_7"], want, atol=1e-6)
        want = bars[["bar_00_volume", "bar_01_volume"]].mean(axis=1)
        np.testing.assert_allclose(got["volume_0"], want, rtol=1e-5)

    def test_parts_must_divide_the_bars(self, times, files):
        with pytest.raises(ValueError, match="`parts` must divide the 16 bars a day"):
            IntradayHandler(path=str(files / "bars"), parts=5, **times)
        with pytest.raises(ValueError, match="No Parquet file at"):
            IntradayHandler(path=str(files / "none"), **times)


def test_a_week_is_the_five_days_up_to_t(times):
    handler = DayHandler(bar_days=5, **times)
    got = raw(handler)
    names = ["$open", "$high", "$low", "$close", "$vwap", "$turnover"]
    bars = D.features(times["instruments"], names, "2019-10-08", times["end_time"])
    wide = {n: bars[n].unstack("instrument").astype(float) for n in names}
    close = wide["$close"]
    base = close.ffill().shift(5)
    volume = wide["$turnover"]
    want = {
        "open": wide["$open"].shift(4) / base - 1,
        "high": wide["$high"].rolling(5, min_periods=1).max() / base - 1,
        "low": wide["$low"].rolling(5, min_periods=1).min() / base - 1,
        "close": close / base - 1,
        "vwap": (wide["$vwap"] * volume).rolling(5, min_periods=1).sum()
        / volume.rolling(5, min_periods=1).sum()
        / base
        - 1,
        "volume": volume.rolling(5, min_periods=1).mean(),
    }
    for name, value in want.items():
        value = value.where(close.notna()).stack(future_stack=True).reindex(got.index)
        np.testing.assert_allclose(got[name], value, atol=2e-5, equal_nan=True)
    early = raw(DayHandler(bar_days=5, **{**times, "end_time": "2020-03-02"}))
    pd.testing.assert_frame_equal(got.loc[:"2020-03-02"], early)
