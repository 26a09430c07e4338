"""Indicators and K-line states against definitions written out in pandas."""

import numpy as np
import pandas as pd
import pytest
import talib

from data_handlers.loaders import ParquetDataLoader
from data_handlers.technical import (
    PATTERNS,
    RECURSIVE,
    TECHNICAL_FEATURES,
    TECHNICAL_NAMES,
    TECHNICAL_STATES,
    WARM_UP,
    TechnicalHandler,
    technical_features,
)
from qlib_ext.ingest.store import read_bars, read_instruments, write_store

DATES = {"start_time": "2018-06-01", "end_time": "2020-12-31"}
PLAIN = {"styles": [], "neutralize": []}  # no styles to compute: they cost most
FIT = {"fit_start_time": "2018-06-01", "fit_end_time": "2019-12-31", **PLAIN}


def random_bars(n, seed=0, tick=1 / 64):
    """Bars on a price grid: equal prices, one-price bars and gaps all occur.

    The grid is binary, so that sums of prices are exact and equal ones are equal.
    """
    rng = np.random.default_rng(seed)
    c = 10 * np.exp(np.cumsum(rng.normal(0, 0.02, n)))
    o = c * np.exp(rng.normal(0, 0.012, n))
    h = np.maximum(o, c) * np.exp(np.abs(rng.normal(0, 0.006, n)))
    low = np.minimum(o, c) * np.exp(-np.abs(rng.normal(0, 0.006, n)))
    bars = {
        k: np.maximum(np.round(x / tick), 1) * tick
        for k, x in dict(open=o, high=h, low=low, close=c).items()
    }
    one = rng.random(n) < 0.03  # one-price days
    for k in ("open", "high", "low"):
        bars[k][one] = bars["close"][one]
    bars["high"] = np.maximum.reduce([bars[k] for k in ("open", "high", "close")])
    bars["low"] = np.minimum.reduce([bars[k] for k in ("open", "low", "close")])
    return {**bars, "volume": np.round(np.exp(rng.normal(10, 1, n)))}


def table(bars):
    return pd.DataFrame(technical_features(bars), columns=TECHNICAL_NAMES)


def wilder(x, n, first):
    """Wilder's average: mean of `n` values from `first` on, then 1/n of the new one."""
    out = np.full(len(x), np.nan)
    value = x[first : first + n].mean()
    out[first + n - 1] = value
    for t in range(first + n, len(x)):
        value += (x[t] - value) / n
        out[t] = value
    return pd.Series(out)


def ema(x, n):
    """Exponential mean that begins with the plain mean of the first n values."""
    x = np.asarray(x, float)
    first = int(np.argmax(np.isfinite(x)))
    out = np.full(len(x), np.nan)
    value = x[first : first + n].mean()
    out[first + n - 1] = value
    for t in range(first + n, len(x)):
        value += 2 / (n + 1) * (x[t] - value)
        out[t] = value
    return pd.Series(out)


def expected(bars):
    """Every number, by its definition, with pandas and loops."""
    o, h, low, c, v = (
        pd.Series(bars[k]) for k in ("open", "high", "low", "close", "volume")
    )
    p = c.shift()
    out = {
        "g_body": (c - o) / p,
        "g_upper": (h - np.maximum(o, c)) / p,
        "g_lower": (np.minimum(o, c) - low) / p,
        "g_gap": o / p - 1,
        "g_place": (c - low) / (h - low).where(h > low),
    }
    for n in (5, 10, 20, 60):
        out[f"g_bias_{n}"] = c / c.rolling(n).mean() - 1
    # the fast mean begins where the slow one does, as in the reference
    fast = ema(c.where(c.index >= 26 - 12), 12)
    dif = fast - ema(c, 26)
    dea = ema(dif, 9)
    out["g_macd"], out["g_macd_hist"] = dif / c, (dif - dea) / c
    x = np.arange(20) - 9.5
    out["g_slope_20"] = c.rolling(20).apply(lambda y: x @ y / (x @ x)) / c
    triple = ema(ema(ema(c, 12), 12), 12)
    out["g_trix_12"] = triple / triple.shift() - 1
    tr = np.maximum(h, p) - np.minimum(low, p)
    up, down = h.diff(), -low.diff()
    plus = up.where((up > down) & (up > 0), 0.0)
    minus = down.where((down > up) & (down > 0), 0.0)

    def total(z):  # Wilder's running sum: 13 values first, then 13/14 of it and the new
        s = np.full(len(z), np.nan)
        value = z[1:14].sum()
        for t in range(14, len(z)):
            value += z[t] - value / 14
            s[t] = value
        return pd.Series(s)

    di_plus, di_minus = total(plus) / total(tr), total(minus) / total(tr)
    out["g_di_14"] = di_plus - di_minus
    dx = ((di_plus - di_minus).abs() / (di_plus + di_minus)).to_numpy()
    out["g_adx_14"] = wilder(dx, 14, 14)
    out["g_natr_14"] = wilder(tr.to_numpy(), 14, 1) / c
    seen = h.rolling(26)
    last_high = seen.apply(lambda y: np.flatnonzero(y == y.max())[-1], raw=True)
    seen = low.rolling(26)
    last_low = seen.apply(lambda y: np.flatnonzero(y == y.min())[-1], raw=True)
    out["g_aroon_25"] = (last_high - last_low) / 25
    out["g_psy_12"] = (c > p).where(p.notna()).astype(float).rolling(12).mean()
    for n in (6, 14):
        gain = wilder(c.diff().clip(lower=0).to_numpy(), n, 1)
        loss = wilder((-c.diff()).clip(lower=0).to_numpy(), n, 1)
        out[f"g_rsi_{n}"] = gain / (gain + loss)
    span = h.rolling(9).max() - low.rolling(9).min()
    fast_k = (c - low.rolling(9).min()) / span.where(span > 0)
    out["g_stoch_k"] = fast_k.rolling(3).mean()
    out["g_stoch_d"] = out["g_stoch_k"].rolling(3).mean()
    out["g_stoch_k"] = out["g_stoch_k"].where(c.index >= 12)  # comes with g_stoch_d
    span = h.rolling(14).max() - low.rolling(14).min()
    out["g_willr_14"] = (c - h.rolling(14).max()) / span.where(span > 0)
    y = (h + low + c) / 3
    spread = y.rolling(14).apply(lambda z: np.abs(z - z.mean()).mean())
    out["g_cci_14"] = (y - y.rolling(14).mean()) / (1.5 * spread)
    pressure = c - np.minimum(low, p)
    parts = {n: pressure.rolling(n).sum() / tr.rolling(n).sum() for n in (7, 14, 28)}
    out["g_ultosc"] = (4 * parts[7] + 2 * parts[14] + parts[28]) / 7
    out["g_roc_10"], out["g_roc_20"] = c.pct_change(10), c.pct_change(20)
    std = c.rolling(20).std(ddof=0)
    out["g_boll_place"] = (c - c.rolling(20).mean()) / (2 * std)
    out["g_boll_width"] = 4 * std / c.rolling(20).mean()
    out["g_volume"] = np.log(v.rolling(5).mean() / v.rolling(20).mean())
    out["g_obv_20"] = (np.sign(c - p) * v).rolling(20).sum() / v.rolling(20).sum()
    place = ((2 * c - h - low) / (h - low).where(h > low)).fillna(0.0)
    flow = (place * v).where(p.notna()).rolling(20).sum()
    out["g_cmf_20"] = flow / v.rolling(20).sum()
    money = y * v
    rose = money.where(y > y.shift(), 0.0).where(p.notna()).rolling(14).sum()
    fell = money.where(y < y.shift(), 0.0).where(p.notna()).rolling(14).sum()
    out["g_mfi_14"] = rose / (rose + fell)
    # ---- states
    body = (c - o).abs()
    usual = body.shift().rolling(10).mean()
    code = pd.Series(np.where(c > o, 4, 2) + np.sign(c - o) * (body > usual))
    doji = body <= (h - low).shift().rolling(10).mean() / 10
    out["g_s_body"] = code.where(~doji, 3).where(usual.notna())
    upper, lower = h - np.maximum(o, c) > body, np.minimum(o, c) - low > body
    out["g_s_shadow"] = 1 + upper * 1 + lower * 2
    gap = pd.Series(np.select([low > h.shift(), h < low.shift()], [2, 3], 1))
    out["g_s_gap"] = gap.where(p.notna())
    m = {n: c.rolling(n).mean().round(9) for n in (5, 20, 60)}
    trend = 1 + 4 * (m[5] > m[20]) + 2 * (m[20] > m[60]) + (c > m[5])
    out["g_s_trend"] = trend.where(m[60].notna())
    out["g_s_macd"] = (1 + 2 * (dif > 0) + (dif > dea)).where(dea.notna())
    usual = v.shift().rolling(5).mean()
    out["g_s_volume"] = (1 + 2 * (c > p) + (v > usual)).where(usual.notna())
    top, bottom = c.shift().rolling(20).max(), c.shift().rolling(20).min()
    out["g_s_break"] = pd.Series(np.select([c > top, c < bottom], [2, 3], 1)).where(
        top.notna()
    )
    for name in RECURSIVE:
        out[name] = out[name].where(out[name].index >= WARM_UP)
    return pd.DataFrame(out)


# ---------------------------------------------------------------- reference values
class TestReference:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("tick", [1 / 64, 1 / 16])
    def test_every_indicator_equals_its_definition(self, seed, tick):
        bars = random_bars(400, seed, tick)
        got, want = table(bars), expected(bars)
        patterns = {f"g_s_pattern_{n}" for n in PATTERNS}
        assert set(TECHNICAL_NAMES) == set(want) | patterns
        for name in want:
            np.testing.assert_allclose(
                got[name], want[name].astype(float), rtol=1e-7, atol=1e-9, err_msg=name
            )

    def test_values_worked_by_hand(self):
        n = 30
        c = 10.0 + np.arange(n)  # up by one each bar
        bars = {
            "open": c - 0.5,
            "high": c + 0.5,
            "low": c - 1,
            "close": c,
            "volume": np.full(n, 100.0),
        }
        row = table(bars).iloc[-1]
        assert row["g_body"] == pytest.approx(0.5 / 38)
        assert row["g_upper"] == row["g_lower"] == pytest.approx(0.5 / 38)
        assert row["g_gap"] == pytest.approx(0.5 / 38)
        assert row["g_place"] == pytest.approx(1 / 1.5)
        assert row["g_bias_5"] == pytest.approx(39 / 37 - 1)
        assert row["g_slope_20"] == pytest.approx(1 / 39)
        assert row["g_psy_12"] == row["g_obv_20"] == row["g_aroon_25"] == 1
        assert row["g_mfi_14"] == 1
        assert row["g_willr_14"] == pytest.approx(-0.5 / 14.5)
        assert row["g_cmf_20"] == pytest.approx(1 / 3)
        assert row["g_volume"] == 0
        assert row["g_s_break"] == 2 and row["g_s_gap"] == 1
        assert row["g_s_shadow"] == 1  # the shadows equal the body, not more

    @pytest.mark.parametrize(
        "days, name, last, sign",
        [
            # open, high, low, close of the last bars
            (2, "CDLENGULFING", [(10, 10.1, 9.4, 9.5), (9.4, 10.3, 9.3, 10.2)], 1),
            (2, "CDLENGULFING", [(9.5, 10.1, 9.4, 10), (10.1, 10.2, 9.2, 9.3)], -1),
            (2, "CDLHARAMI", [(10, 10.1, 8.9, 9), (9.4, 9.65, 9.3, 9.6)], 1),
            (2, "CDLDARKCLOUDCOVER", [(9, 10.1, 8.9, 10), (10.3, 10.4, 9.2, 9.3)], -1),
            (1, "CDLMARUBOZU", [(10, 11, 10, 11)], 1),
            (1, "CDLGRAVESTONEDOJI", [(10, 10.8, 10, 10)], 1),
            (
                3,
                "CDLMORNINGSTAR",
                [(10, 10.05, 8.95, 9), (8.8, 8.9, 8.7, 8.85), (9, 10, 8.95, 9.9)],
                1,
            ),
            (
                3,
                "CDL3OUTSIDE",
                [(10, 10.1, 9.4, 9.5), (9.4, 10.3, 9.3, 10.2), (10.2, 10.9, 10, 10.8)],
                1,
            ),
        ],
    )
    def test_candlestick_patterns_drawn_by_hand(self, days, name, last, sign):
        rng = np.random.default_rng(0)
        quiet = 10 + 0.1 * rng.standard_normal(40)
        o, c = quiet, quiet + 0.3 * np.sign(rng.standard_normal(40))
        rows = np.stack([o, np.maximum(o, c) + 0.05, np.minimum(o, c) - 0.05, c], 1)
        rows = np.vstack([rows, last])
        bars = dict(zip(("open", "high", "low", "close"), rows.T.copy(), strict=True))
        bars["volume"] = np.full(len(rows), 1e4)
        code = int(table(bars)[f"g_s_pattern_{days}"].iloc[-1])
        signs = [(n, s) for n, both in PATTERNS[days] for s in both]
        assert signs[code - 2] == (name, sign)

    def test_pattern_code_is_the_first_of_those_that_are_there(self):
        bars = random_bars(600, 5)
        prices = [bars[k] for k in ("open", "high", "low", "close")]
        for days, patterns in PATTERNS.items():
            got = table(bars)[f"g_s_pattern_{days}"]
            found = {n: getattr(talib, n)(*prices) for n, _ in patterns}
            for t in range(15, 600):
                want, code = 1, 2
                for n, signs in patterns:
                    for sign in signs:
                        if want == 1 and found[n][t] * sign > 0:
                            want = code
                        code += 1
                assert got[t] == want


# ---------------------------------------------------------------------- properties
class TestProperties:
    def test_values_keep_to_range_and_begin_where_the_definition_says(self):
        x = table(random_bars(800, 1))
        for f in TECHNICAL_FEATURES:
            known = x[f.name].dropna()
            assert known.between(f.low - 1e-9, f.high + 1e-9).all(), f.name
            first = 0 if not f.nan.startswith("first") else int(f.nan.split()[1])
            assert x[f.name].first_valid_index() in (first, first + 1), f.name
        for name, count in TECHNICAL_STATES.items():
            assert set(x[name].dropna()) <= set(range(1, count + 1))

    @pytest.mark.parametrize("length", [0, 1, 2, 14, 15, 60])
    def test_short_histories_are_rows_of_nan(self, length):
        bars = random_bars(200)
        x = technical_features({k: v[:length] for k, v in bars.items()})
        assert x.shape == (length, len(TECHNICAL_NAMES))
        np.testing.assert_array_equal(x, technical_features(bars)[:length])

    def test_the_future_does_not_move_the_past(self):
        bars = random_bars(300, 2)
        other = {k: x.copy() for k, x in bars.items()}
        for k in other:
            other[k][200:] *= 3.0
        full = technical_features(bars)[:200]
        np.testing.assert_array_equal(technical_features(other)[:200], full)
        cut = technical_features({k: x[:200] for k, x in bars.items()})
        np.testing.assert_array_equal(cut, full)

    def test_what_lies_before_the_warm_up_has_no_weight(self):
        bars = random_bars(900, 3)
        x = table(bars)
        spread = x.std()
        for start in (100, 333, 512):
            y = table({k: v[start:] for k, v in bars.items()})
            late = y.iloc[WARM_UP:].set_axis(range(start + WARM_UP, 900))
            gap = (late - x.loc[start + WARM_UP :]).abs().max() / spread
            assert gap[list(RECURSIVE)].max() < 0.01
            rest = gap.drop(list(RECURSIVE))
            assert rest.max() < 1e-8
            known = x.loc[start + WARM_UP :].notna()
            assert (late.notna() == known).all().all()

    def test_scale_of_prices_and_of_volume_does_not_matter(self):
        bars = random_bars(400, 4)
        scaled = {k: x * (1e5 if k == "volume" else 8.0) for k, x in bars.items()}
        np.testing.assert_allclose(
            technical_features(scaled), technical_features(bars), rtol=1e-7, atol=1e-9
        )

    def test_a_stock_that_never_moves_has_no_ratios(self):
        n = 200
        bars = {k: np.full(n, 5.0) for k in ("open", "high", "low", "close")}
        row = table({**bars, "volume": np.full(n, 100.0)}).iloc[-1]
        for f in TECHNICAL_FEATURES:
            if "no price moved" in f.nan or f.nan == "h = l":
                assert np.isnan(row[f.name]), f.name
        assert row["g_bias_20"] == row["g_natr_14"] == row["g_boll_width"] == 0


# ------------------------------------------------------------------------- handler
@pytest.fixture(scope="module")
def codes(market):
    return sorted(set(read_instruments(market)["instrument"]))[:30]


@pytest.fixture(scope="module")
def handler(qlib_market, codes):
    return TechnicalHandler(codes, **DATES, **FIT)


class TestHandler:
    def test_features_are_those_of_the_stock_alone(self, handler, qlib_market):
        raw = handler.fetch(data_key="raw", col_set="feature")
        assert list(raw.columns) == TECHNICAL_NAMES
        code = raw.index.get_level_values("instrument")[-1]
        bars = read_bars(qlib_market, [code]).set_index("datetime").sort_index()
        fields = ["open", "high", "low", "close", "volume"]
        bars = bars[fields].astype(float).dropna()
        own = raw.xs(code, level="instrument")
        want = table({k: bars[k].to_numpy() for k in fields}).set_index(bars.index)
        np.testing.assert_allclose(
            own, want.loc[own.index].astype(np.float32), rtol=1e-5, atol=1e-6
        )
        traded = bars.loc[DATES["start_time"] :].index
        assert own.index.equals(traded)  # a suspended day has no row

    def test_codes_are_left_alone_and_numbers_standardised(self, handler):
        raw = handler.fetch(data_key="raw", col_set="feature")
        seen = handler.fetch(data_key="infer", col_set="feature")
        for name in TECHNICAL_STATES:
            want = raw[name].fillna(0.0)
            assert np.array_equal(seen[name], want.loc[seen.index])
        numbers = [n for n in TECHNICAL_NAMES if n not in TECHNICAL_STATES]
        fit = seen.loc[FIT["fit_start_time"] : FIT["fit_end_time"], numbers]
        assert abs(fit.mean()).max() < 0.1 and np.isfinite(seen.to_numpy()).all()

    def test_start_of_the_range_changes_nothing(self, handler, codes):
        late = TechnicalHandler(
            codes,
            start_time="2019-12-02",
            end_time="2020-12-31",
            fit_start_time="2019-12-02",
            fit_end_time="2020-03-31",
            columns=["g_macd", "g_rsi_14", "g_s_trend"],
            **PLAIN,
        )
        got = late.fetch(data_key="raw", col_set="feature")
        want = handler.fetch(data_key="raw", col_set="feature")[list(got.columns)]
        pd.testing.assert_frame_equal(got, want.loc["2019-12-02":])

    def test_handler_ignores_the_future(
        self, handler, codes, market, tmp_path, use_store
    ):
        every = {f.name.upper() for f in (market / "features").iterdir()}
        indices = every - set(read_instruments(market)["instrument"])
        bars = read_bars(market, [*codes, *sorted(indices)])
        later = (bars["datetime"] > "2020-06-30").to_numpy()
        for field in ("open", "high", "low", "close", "volume"):
            bars.loc[later, field] *= np.float32(1.7)
        write_store(tmp_path / "store", bars, index_codes=sorted(indices))
        use_store(tmp_path / "store")
        other = TechnicalHandler(codes, **DATES, **FIT)
        for key in ("raw", "infer"):
            want = handler.fetch(slice(None, "2020-06-30"), "datetime", "feature", key)
            got = other.fetch(slice(None, "2020-06-30"), "datetime", "feature", key)
            pd.testing.assert_frame_equal(got, want, rtol=1e-6)

    def test_membership_spans_are_kept(self, qlib_market):
        from qlib.data import D

        handler = TechnicalHandler(
            instruments="csi300", **DATES, **FIT, columns=["g_body"]
        )
        spans = D.list_instruments(D.instruments("csi300"))
        index = handler.fetch(data_key="raw", col_set="feature").index
        assert len(index) > 1000
        for day, code in index[:: max(len(index) // 200, 1)]:
            assert any(a <= day <= b for a, b in spans[code]), (day, code)

    def test_bad_columns_and_a_store_without_volume(
        self, qlib_market, market, tmp_path, use_store
    ):
        with pytest.raises(ValueError, match="must name some of"):
            TechnicalHandler(columns=["g_nothing"], **DATES, **FIT)
        code = read_instruments(market)["instrument"][0]
        bars = read_bars(market, [code], ["open", "high", "low", "close"])
        write_store(tmp_path / "store", bars)
        use_store(tmp_path / "store")
        with pytest.raises(ValueError, match=r"no values of `\$volume`"):
            TechnicalHandler(**DATES, **FIT)


class TestOddStocks:
    """A suspension, a new listing, a stock without volume, and one stock alone."""

    FIELDS = ("open", "high", "low", "close", "volume")

    @pytest.fixture
    def store(self, tmp_path, use_store):
        days = pd.bdate_range("2019-01-01", periods=300, name="datetime")
        frames = []
        for k, code in enumerate(("SH600001", "SH600002", "SH600003")):
            frame = pd.DataFrame(random_bars(300, k), index=days)
            frame["market_cap"] = 1e9 * (k + 1)
            frames.append(frame.assign(instrument=code).reset_index())
        a, b, c = frames
        a.loc[150:189, [*self.FIELDS, "market_cap"]] = np.nan  # suspended
        b = b.iloc[200:]  # listed late
        c["volume"] = np.nan
        write_store(tmp_path / "odd", pd.concat([a, b, c]), calendar=days)
        use_store(tmp_path / "odd")
        return days

    def loader(self, **more):
        source = {
            "bars": list(self.FIELDS),
            "function": "data_handlers.technical.technical_features",
            "names": TECHNICAL_NAMES,
            **more,
        }
        return ParquetDataLoader({"feature": source})

    def test_rows_are_traded_days_and_a_suspension_is_passed_over(self, store):
        got = self.loader().load("all", store[0], store[-1])["feature"]
        a = got.xs("SH600001", level="instrument")
        assert a.index.equals(store.delete(range(150, 190)))
        # As if the forty days had never been.
        bars = random_bars(300, 0)
        kept = {k: np.delete(v, range(150, 190)) for k, v in bars.items()}
        want = technical_features({k: v.astype("f4") for k, v in kept.items()})
        np.testing.assert_allclose(a, want, rtol=1e-4, atol=1e-5)
        b = got.xs("SH600002", level="instrument")
        assert b.index.equals(store[200:])
        assert b["g_bias_60"].first_valid_index() == store[259]
        assert b[list(RECURSIVE)].isna().all().all()  # listed for 100 bars only
        assert "SH600003" not in got.index.get_level_values("instrument")

    def test_one_stock_alone_and_none_at_all(self, store):
        one = self.loader(columns=["g_body"]).load(["SH600002"], store[0], store[-1])
        assert one.shape == (100, 1)
        none = self.loader().load(["SH600003"], store[0], store[-1])
        assert none.shape == (0, len(TECHNICAL_NAMES))

    def test_handler_of_one_stock(self, store):
        handler = TechnicalHandler(
            instruments=["SH600001"],
            start_time=store[130],
            end_time=store[-1],
            fit_start_time=store[130],
            fit_end_time=store[-1],
            columns=["g_body", "g_rsi_14", "g_s_trend"],
            **PLAIN,
        )
        seen = handler.fetch(col_set="feature", data_key="infer")
        assert len(seen) == 300 - 130 - 40 and np.isfinite(seen.to_numpy()).all()

    @pytest.mark.parametrize(
        "more, message",
        [
            ({"function": "technical_features"}, "`function` must be 'module.name'"),
            ({"bars": []}, "needs the list `bars`"),
            ({"columns": ["g_nothing"]}, "`columns` has 'g_nothing'"),
            ({"paths": 1}, "unknown key 'paths'"),
        ],
    )
    def test_bad_sources_are_named(self, more, message):
        with pytest.raises(ValueError, match=message):
            self.loader(**more)

    def test_function_of_another_shape_is_refused(self, store):
        with pytest.raises(ValueError, match="gave the shape"):
            self.loader(names=["a", "b"]).load("all", store[0], store[-1])
