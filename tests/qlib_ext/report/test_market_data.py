import numpy as np
import pandas as pd
import pytest
import torch

from qlib_ext.report import market_data
from qlib_ext.report.market_data import Bars


def _bars(t=90, n=12, seed=0):
    rng = np.random.default_rng(seed)
    close = 10 * np.exp(np.cumsum(0.02 * rng.standard_normal((t, n)), 0))
    volume = np.exp(rng.standard_normal((t, n)) + 10)
    vwap = close * np.exp(0.003 * rng.standard_normal((t, n)))
    turnover = 0.01 * np.exp(rng.standard_normal((t, n)))
    gone = rng.random((t, n)) < 0.05
    gone[-1] = False
    gone[20:85, 3] = True
    gone[:, 4] = True
    fields = {
        "close": close,
        "vwap": vwap,
        "volume": volume,
        "amount": vwap * volume,
        "turnover": turnover,
    }
    return Bars(
        calendar=pd.bdate_range("2020-01-01", periods=t),
        scored=slice(61, t),
        instruments=pd.Index([f"S{i:02d}" for i in range(n)]),
        fields={
            k: torch.from_numpy(np.where(gone, np.nan, v)) for k, v in fields.items()
        },
    )


def _naive_classics(bars, day):
    frames = {
        k: pd.DataFrame(v.numpy(), bars.calendar, bars.instruments)
        for k, v in bars.fields.items()
    }
    close = frames["close"]
    returns = close / close.ffill().shift() - 1
    market = returns.mean(axis=1)
    span = slice(day - 59, day + 1)
    out = {}
    for name in bars.instruments:
        r = returns[name].iloc[span]
        m = market.iloc[span][r.notna()]
        known = r.dropna()
        if len(known) < 40 or np.isnan(close[name].iloc[day]):
            out[name] = {}
            continue
        slope, level = np.polyfit(m, known, 1)
        rest = known - level - slope * m
        amount = frames["amount"][name].iloc[span]
        few = slice(day - 4, day + 1)
        vwap, volume = frames["vwap"][name].iloc[few], frames["volume"][name].iloc[few]
        out[name] = {
            "ret": close[name].iloc[day] / close[name].ffill().iloc[day - 60] - 1,
            "vol": known.std(),
            "ivol": np.sqrt((rest**2).sum() / (len(rest) - 2)),
            "ivr": (rest**2).sum() / ((known - known.mean()) ** 2).sum(),
            "lnto": np.log(frames["turnover"][name].iloc[span].mean()),
            "lnamihud": np.log((r.abs() / amount).mean()),
            "apb_5d": np.log(
                vwap.mean() / ((vwap * volume).sum() / volume[vwap.notna()].sum())
            ),
        }
    return pd.DataFrame(out).T


class TestClassicFactors:
    def test_values_equal_pandas_stock_by_stock(self):
        bars = _bars()
        days = torch.tensor([65, 89])
        got = market_data.classic_factors(bars, days)
        for row, day in enumerate(days.tolist()):
            expected = _naive_classics(bars, day)
            assert list(got) == [
                "ret",
                "vol",
                "ivol",
                "ivr",
                "lnto",
                "lnamihud",
                "apb_5d",
            ]
            for name, values in got.items():
                np.testing.assert_allclose(
                    values[row], expected[name].astype(float), rtol=1e-8
                )

    def test_stocks_with_few_days_are_nan(self):
        got = market_data.classic_factors(_bars(), torch.tensor([89]))
        assert all(torch.isnan(v[0, [3, 4]]).all() for v in got.values())

    def test_future_prices_change_nothing(self):
        bars = _bars()
        base = market_data.classic_factors(bars, torch.tensor([70]))
        for values in bars.fields.values():
            values[71:] *= 3
        other = market_data.classic_factors(bars, torch.tensor([70]))
        for name in base:
            torch.testing.assert_close(
                base[name], other[name], equal_nan=True, rtol=0, atol=0
            )

    def test_missing_fields_leave_their_factors_out(self):
        bars = _bars()
        for name in ("vwap", "turnover", "amount", "volume"):
            del bars.fields[name]
        got = market_data.classic_factors(bars, torch.tensor([89]))
        assert list(got) == ["ret", "vol", "ivol", "ivr"]


class TestIntradayFactors:
    def test_equal_twenty_day_windows_of_the_minute_features(
        self, qlib_market, monkeypatch, tmp_path
    ):
        score = pd.Series(
            1.0,
            pd.MultiIndex.from_product(
                [
                    pd.DatetimeIndex(["2019-06-03", "2019-06-04"]),
                    ["SH600000", "SH600001"],
                ],
                names=["datetime", "instrument"],
            ),
        )
        from qlib.config import C
        from qlib.data import D

        days = pd.DatetimeIndex(D.calendar(end_time="2019-06-04"))[-40:]
        names = D.list_instruments(D.instruments("all"), as_list=True)[:2]
        score.index = score.index.set_levels(sorted(names), level=1)
        index = pd.MultiIndex.from_product(
            [days, sorted(names)], names=["datetime", "instrument"]
        )
        rng = np.random.default_rng(0)
        columns = ["skew", "kurt", "jump", "mom", "apb", "arpp", "vhhi", "vvol"]
        frame = pd.DataFrame(
            rng.standard_normal((80, 8)), index, [f"ms_{c}" for c in columns]
        )
        (tmp_path / "ms").mkdir()
        frame.reset_index().to_parquet(tmp_path / "ms" / "2019.parquet")
        bars = market_data.load_bars(score)
        assert market_data.intraday_factors(bars) == {}
        monkeypatch.setattr(type(C.dpm), "get_data_uri", lambda *_: str(tmp_path))
        found = market_data.intraday_factors(bars)
        assert set(found) == {*columns[:6], "sdvhhi", "sdvvol"}
        one = frame.xs(sorted(names)[0], level="instrument")
        assert found["skew"][1, 0] == pytest.approx(one["ms_skew"].iloc[-20:].mean())
        assert found["sdvvol"][0, 0] == pytest.approx(one["ms_vvol"].iloc[-21:-1].std())


class TestLimits:
    def test_a_close_at_its_limit_cannot_trade_that_way(self):
        close = torch.tensor([[11.0, 9.0, 10.0, torch.nan]])
        up = torch.tensor([[11.0, 11.0, 11.0, 11.0]])
        down = torch.tensor([[9.0, 9.0, torch.nan, 9.0]])
        bars = Bars(
            pd.DatetimeIndex(["2020-01-01"]),
            slice(0, 1),
            pd.Index(list("abcd")),
            {"close": close, "limit_up": up, "limit_down": down},
        )
        limits = market_data.price_limits(bars)
        assert limits is not None
        buyable, sellable = limits
        assert buyable[0, :3].tolist() == [False, True, True]
        assert sellable[0, :3].tolist() == [True, False, True]

    def test_without_limit_prices_the_boards_rules_stand_in(self):
        # Main board; ChiNext before and after its reform of 2020-08-24; STAR.
        days = pd.DatetimeIndex(["2020-08-20", "2020-08-21", "2020-08-24"])
        names = ["SH600000", "SZ300001", "SZ000001", "SH688001"]
        change = torch.tensor([[0.1, 0.0999, -0.1, 0.1], [0.2, 0.2, 0.095, -0.2]])
        close = torch.cat([torch.ones(1, 4), 1 + change]).double()
        close[2] *= close[1]
        bars = Bars(days, slice(1, 3), pd.Index(names), {"close": close})
        limits = market_data.price_limits(bars)
        assert limits is not None
        buyable, sellable = limits
        # 20 % on the main board is a listing or a correction: no limit that day.
        assert buyable.tolist() == [
            [False, False, True, True],
            [True, False, True, True],
        ]
        assert sellable.tolist() == [
            [True, True, False, True],
            [True, True, True, False],
        ]

    @pytest.mark.parametrize("factor", [1.0, 2.5])
    def test_limits_are_rounded_to_the_fen_where_the_factor_is_known(self, factor):
        # 10 % of 2.04 is 2.244, so the limit is 2.24, a move of 9.80 %; 2.23 is below.
        raw = torch.tensor([[2.04, 2.04, 2.04, 2.04], [2.24, 2.23, 1.84, 1.83]])
        bars = Bars(
            pd.DatetimeIndex(["2019-08-20", "2019-08-21"]),
            slice(1, 2),
            pd.Index(["SH600000", "SH600001", "SH600002", "SH600003"]),
            {"close": raw * factor, "factor": torch.full_like(raw, factor)},
        )
        limits = market_data.price_limits(bars)
        assert limits is not None
        assert limits[0][0].tolist() == [False, True, True, True]
        # The lower limit is 1.836, so 1.84; below it there was none that day.
        assert limits[1][0].tolist() == [True, True, False, True]
        adjusted = {**bars.fields, "factor": torch.ones_like(raw) * 0.9731}
        free = market_data.price_limits(
            Bars(bars.calendar, bars.scored, bars.instruments, adjusted)
        )
        # Prices that are no whole fen: 9.8 % is not within 0.15 % of 10 %.
        assert free is not None and free[0].all()

    def test_a_store_without_limits_says_so(self):
        assert market_data.price_limits(_bars()) is None


class TestStore:
    def test_membership_equals_the_market_file(self, qlib_market):
        days = pd.DatetimeIndex(["2018-06-08", "2018-06-11", "2020-12-31"])
        file = qlib_market / "instruments" / "csi300.txt"
        spans = pd.read_csv(file, sep="\t", header=None, names=["code", "start", "end"])
        names = pd.Index(sorted(set(spans["code"])))
        mask = market_data.membership("csi300", days, names)
        for i, day in enumerate(days):
            inside = (pd.to_datetime(spans["start"]) <= day) & (
                pd.to_datetime(spans["end"]) >= day
            )
            assert set(names[mask[i].numpy()]) == set(spans["code"][inside])

    def test_market_names_leave_all_out(self, qlib_market):
        assert market_data.market_names() == ["csi1000", "csi300", "csi500"]

    def test_bars_reach_before_the_first_scored_day(self, qlib_market):
        from qlib.data import D

        days = pd.DatetimeIndex(D.calendar())[100:110]
        names = D.list_instruments(D.instruments("csi300"), as_list=True)[:3]
        index = pd.MultiIndex.from_product(
            [days, names], names=["datetime", "instrument"]
        )
        bars = market_data.load_bars(pd.Series(1.0, index))
        assert list(bars.days) == list(days)
        assert bars.scored.start == market_data.CLASSIC_WINDOW + 1
        assert "close" in bars.fields and "limit_up" in bars.fields

    def test_days_off_the_calendar_are_named(self, qlib_market):
        index = pd.MultiIndex.from_tuples(
            [(pd.Timestamp("2018-01-06"), "SH600000")], names=["datetime", "instrument"]
        )
        with pytest.raises(ValueError, match="first 2018-01-06"):
            market_data.load_bars(pd.Series(1.0, index))
