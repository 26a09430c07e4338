"""The 22 minute features against a plain reference, properties, bad input."""

import datetime as dt
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from data_handlers.aggregate.minute import (
    LOST,
    MINUTE_FEATURES,
    MINUTE_NAMES,
    reduce_minutes,
)
from data_handlers.aggregate.schema import A_SHARE, US_REGULAR

A_CLOCK = [*range(570, 690), *range(780, 900)]
US_CLOCK = list(range(570, 960))


def _median(values):
    values = sorted(values)
    n = len(values)
    return values[n // 2] if n % 2 else 0.5 * (values[n // 2 - 1] + values[n // 2])


def _corr(x, y):
    if len(set(x)) == 1 or len(set(y)) == 1:
        return math.nan
    mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
    cov = math.fsum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    vx = math.fsum((a - mx) ** 2 for a in x)
    vy = math.fsum((b - my) ** 2 for b in y)
    return cov / math.sqrt(vx * vy)


def plain_day(rows, clock, bar=1, end_stamped=False, n_bars=None, has_amount=True):
    """Features of one stock-day, written from the definitions, one bar at a time.

    rows: (minute of the day, open, high, low, close, volume, amount) in time order;
    clock: minutes of the session. Auction minutes before the session join the first.
    """
    n = n_bars or len(clock) // bar
    price, volume, amount = [None] * n, [0.0] * n, [0.0] * n
    day_open = high = low = None
    for minute, o, h, lo, c, v, a in rows:
        m = minute - 1 if end_stamped else minute
        if clock is A_CLOCK and 555 <= minute < 571:
            m = max(m, 570)
        if end_stamped and clock is A_CLOCK and minute == 780:
            m = 780
        if not end_stamped and clock is A_CLOCK and minute in (690, 900):
            m = minute - 1
        if m not in clock or v == 0:
            continue
        slot = min(clock.index(m) // bar, n - 1)
        if day_open is None:
            day_open, high, low = o, h, lo
        high, low = max(high, h), min(low, lo)
        price[slot] = c
        volume[slot] += v
        amount[slot] += a
    if day_open is None:
        return None
    last = day_open
    for k in range(n):
        if price[k] is None:
            price[k] = last
        last = price[k]
    before = [day_open, *price[:-1]]
    r = [math.log(p / q) for p, q in zip(price, before, strict=True)]
    s2 = math.fsum(x**2 for x in r)
    s3 = math.fsum(x**3 for x in r)
    s4 = math.fsum(x**4 for x in r)
    total_v, total_a = math.fsum(volume), math.fsum(amount)
    half = 30 // bar
    med = _median(r)
    bound = 3 * 1.4826 * _median([abs(x - med) for x in r])
    jump = math.fsum(x for x in r if abs(x) > bound)
    absr = [abs(x) for x in r]
    mean_p = math.fsum(price) / n
    mean_v = total_v / n
    var_v = math.fsum((x - mean_v) ** 2 for x in volume) / n
    some = [(abs(x), a) for x, a in zip(r, amount, strict=True) if a > 0]
    drawdown = max(1 - price[j] / max(price[: j + 1]) for j in range(n))
    nan = math.nan
    return {
        "ms_rv": math.sqrt(s2),
        "ms_skew": math.sqrt(n) * s3 / s2**1.5 if s2 else nan,
        "ms_kurt": n * s4 / s2**2 if s2 else nan,
        "ms_down_ratio": math.fsum(x**2 for x in r if x < 0) / s2 if s2 else nan,
        "ms_jump": jump,
        "moderate": math.fsum(x for x in r if abs(x) <= bound),
        "ms_ret_open30": math.fsum(r[:half]),
        "ms_ret_mid": math.fsum(r[half : n - half]) if n > 2 * half else nan,
        "ms_ret_last30": math.fsum(r[n - half :]),
        "ms_vol_open30": math.fsum(volume[:half]) / total_v,
        "ms_vol_last30": math.fsum(volume[n - half :]) / total_v,
        "ms_vhhi": math.fsum((x / total_v) ** 2 for x in volume),
        "ms_vvol": math.sqrt(var_v) / mean_v,
        "ms_apb": math.log(mean_p / (total_a / total_v)) if has_amount else nan,
        "ms_arpp": (mean_p - low) / (high - low) if high > low else nan,
        "ms_corr_pv": _corr(price, volume),
        "ms_corr_rv": _corr(absr, volume),
        "ms_corr_lag": _corr(r[1:], volume[:-1]),
        "ms_illiq": (
            math.fsum(x / a for x, a in some) / len(some) if has_amount else nan
        ),
        "ms_trend": (
            abs(math.log(price[-1] / day_open)) / math.fsum(absr) if s2 else nan
        ),
        "ms_mdd": drawdown,
        "open": day_open,
        "close": price[-1],
    }


def plain(bars, clock, bar=1, end_stamped=False, has_amount=True, n_bars=None):
    """Reference for a whole frame; `n_bars` gives {date: bars} of short days."""
    out, last = {}, {}
    times = pd.DatetimeIndex(bars["datetime"])
    minute = times.hour * 60 + times.minute
    amount = bars["amount"] if has_amount else bars["volume"] * np.nan
    factor = bars["factor"] if "factor" in bars else bars["volume"] * 0 + 1.0
    table = pd.DataFrame(
        {
            "instrument": bars["instrument"].to_numpy(),
            "date": times.normalize(),
            "row": list(
                zip(
                    minute,
                    bars["open"],
                    bars["high"],
                    bars["low"],
                    bars["close"],
                    bars["volume"],
                    amount,
                    strict=True,
                )
            ),
            "factor": factor.to_numpy(),
        }
    )
    for (code, date), group in table.groupby(["instrument", "date"], sort=True):
        n = (n_bars or {}).get(date)
        day = plain_day(group["row"], clock, bar, end_stamped, n, has_amount)
        if day is None:
            continue
        f = group["factor"].iloc[0]
        gap = math.nan
        if code in last:
            gap = math.log(day["open"] * f / last[code])
        last[code] = day["close"] * f
        day["ms_overnight"] = gap
        day["ms_mom"] = gap + day["moderate"]
        out[(date, code)] = day
    frame = pd.DataFrame.from_dict(out, orient="index")
    frame.index = pd.MultiIndex.from_tuples(out, names=["datetime", "instrument"])
    return frame.sort_index()[MINUTE_NAMES]


def assert_same(got, want, tol=1e-6):
    """Both NaN, or within 1e-6 of the value (of 1 where the value is small)."""
    assert list(got.index) == list(want.index)
    for name in want.columns:
        a, b = got[name].to_numpy(), want[name].to_numpy(dtype=float)
        assert np.array_equal(np.isnan(a), np.isnan(b)), name
        # ms_illiq is 1e-9 or so: relative error only.
        scale = np.maximum(np.abs(b), 1e-15 if name == "ms_illiq" else 1e-3)
        off = np.nanmax(np.abs(a - b) / scale, initial=0)
        assert off < tol, f"{name}: {off}"


def make_bars(seed, days=3, stocks=4, clock=A_CLOCK, shift=0, gaps=0.2, bar=1):
    """Random bars with missing minutes, empty bars, no-move days and thin days."""
    rng = np.random.default_rng(seed)
    rows = []
    for s in range(stocks):
        p = 10.0
        for d in range(days):
            date = pd.Timestamp("2024-03-01") + pd.Timedelta(days=d)
            thin = rng.random() < 0.2
            for k in range(0, len(clock), bar):
                if rng.random() < (0.97 if thin else gaps):
                    continue
                q = round(p * math.exp(rng.normal(0, 0.002)), 2)
                v = float(rng.integers(0, 50) * 100)
                h, lo = max(p, q) + 0.01, min(p, q) - 0.01
                minute = clock[k] + shift
                rows.append(
                    (
                        f"SH60000{s}",
                        date + pd.Timedelta(minutes=minute),
                        p,
                        h,
                        lo,
                        q,
                        v,
                        v * (p + q) / 2,
                        1.0 + 0.5 * (d > 1),
                    )
                )
                p = q
    return pd.DataFrame(
        rows,
        columns=[
            *("instrument", "datetime", "open", "high", "low", "close"),
            *("volume", "amount", "factor"),
        ],
    )


class TestReference:
    def test_minute_hand_worked_day(self, minute_features):
        # Four trades on an otherwise silent day: 10 → 11 → 10 → 10 (auction at 9.9).
        at = [(555 + 10, 9.9, 9.9, 100.0), (570, 11.0, 11.0, 100.0)]
        at += [(600, 10.0, 10.0, 200.0), (899, 10.0, 10.0, 100.0)]
        rows = [
            (
                "SH600000",
                pd.Timestamp("2024-03-01") + pd.Timedelta(minutes=m),
                *(o, max(o, c), min(o, c), c, v, c * v),
            )
            for m, o, c, v in at
        ]
        cols = ["instrument", "datetime", "open", "high", "low", "close"]
        bars = pd.DataFrame(rows, columns=[*cols, "volume", "amount"])
        row = minute_features(bars).iloc[0]
        up, down = math.log(11 / 9.9), math.log(10 / 11)
        assert row["ms_rv"] == pytest.approx(math.sqrt(up**2 + down**2))
        assert row["ms_down_ratio"] == pytest.approx(down**2 / (up**2 + down**2))
        assert row["ms_ret_open30"] == pytest.approx(up)
        assert row["ms_ret_mid"] == pytest.approx(down)
        assert row["ms_ret_last30"] == 0
        assert row["ms_vol_open30"] == pytest.approx(200 / 500)
        assert row["ms_vol_last30"] == pytest.approx(100 / 500)
        assert row["ms_vhhi"] == pytest.approx((4 + 4 + 1) / 25)
        assert row["ms_mdd"] == pytest.approx(1 / 11)
        mean_p = (30 * 11 + 210 * 10) / 240
        vwap = (990 + 1100 + 2000 + 1000) / 500
        assert row["ms_apb"] == pytest.approx(math.log(mean_p / vwap))
        assert row["ms_arpp"] == pytest.approx((mean_p - 9.9) / 1.1)
        assert row["ms_trend"] == pytest.approx(abs(math.log(10 / 9.9)) / (up - down))
        # Most minutes do not move, so every move is extreme.
        assert row["ms_jump"] == pytest.approx(up + down)
        assert np.isnan(row["ms_overnight"]) and np.isnan(row["ms_mom"])
        bars_with = {2: 2, 3: 1}
        illiq = (up / (990 + 1100) + -down / 2000 + 0 / 1000) / (1 + len(bars_with))
        assert row["ms_illiq"] == pytest.approx(illiq)

    @pytest.mark.parametrize("bar", [1, 5, 15])
    @pytest.mark.parametrize("stamp", ["start", "end"])
    def test_minute_features_equal_the_plain_reference_on_random_bars(
        self, bar, stamp, minute_features
    ):
        for seed in range(3):
            bars = make_bars(seed, shift=int(stamp == "end"))
            got = minute_features(bars, bar_minutes=bar, stamp=stamp)
            want = plain(bars, A_CLOCK, bar, stamp == "end")
            assert_same(got, want)

    @pytest.mark.parametrize(("bar", "stamp"), [(1, "start"), (5, "end")])
    def test_minute_whole_days_equal_the_plain_reference(
        self, bar, stamp, minute_features
    ):
        # Whole days take a short way; silent bars, jumps and days that differ mix in.
        rng = np.random.default_rng(5)
        shift = bar if stamp == "end" else 0
        bars = make_bars(5, days=8, shift=shift, gaps=-1, bar=bar)
        bars["volume"] = rng.integers(1, 50, len(bars)) * 100.0
        bars["amount"] = bars["volume"] * bars["close"]
        day = bars["datetime"].dt.day
        thin = (day == 2) & (rng.random(len(bars)) < 0.3)
        bars.loc[thin, ["volume", "amount"]] = 0.0
        bars.loc[thin, ["open", "high", "low", "close"]] = np.nan
        first = bars["datetime"].dt.hour * 60 + bars["datetime"].dt.minute < 600
        bars.loc[(day == 3) & first, ["volume", "amount"]] = 0.0
        bars.loc[(day == 4) & (bars["instrument"] == "SH600001"), "volume"] = 0.0
        jump = (day == 5) & (rng.random(len(bars)) < 0.02)
        prices = ["open", "high", "low", "close"]
        bars.loc[jump, prices] = bars.loc[jump, prices].mul([0.9, 1.0, 0.9, 0.9])
        flat = (day == 6) & (bars["instrument"] == "SH600002")
        bars.loc[flat, ["open", "high", "low", "close"]] = 10.0
        bars = bars[~((day == 7) & (rng.random(len(bars)) < 0.05))]
        got = minute_features(bars, bar_minutes=bar, stamp=stamp)
        assert_same(got, plain(bars, A_CLOCK, bar, stamp == "end"))
        rows = reduce_minutes(bars, bar_minutes=bar, stamp=stamp)
        assert rows.rows_used + rows.no_trade == rows.rows_in == len(bars)
        assert rows.no_trade == (bars["volume"] == 0).sum()
        assert rows.notes["stock-days without a trade (no row)"] == 1

    def test_minute_one_bad_row_of_a_whole_day_is_rejected_alone(self, day_frame):
        bars = make_bars(6, days=6, stocks=2, gaps=-1)
        bars["volume"] = 100.0
        bars["amount"] = bars["volume"] * bars["close"]
        bad = {700: ("high", 1.0), 900: ("close", -1.0), 1100: ("volume", np.nan)}
        bad |= {1300: ("amount", -5.0), 1500: ("low", np.inf), 1700: ("high", np.inf)}
        for row, (column, value) in bad.items():
            bars.loc[row, column] = value
        rows = reduce_minutes(bars)
        assert sum(rows.rejected.values()) == len(bad)
        good = reduce_minutes(bars.drop(index=list(bad)))
        pd.testing.assert_frame_equal(day_frame(rows), day_frame(good))

    def test_minute_features_equal_the_plain_reference_on_real_shanghai_bars(
        self, minute_features, real_file
    ):
        bars = pd.read_parquet(real_file("minute15_cn_sh.parquet"))
        codes = bars["instrument"].unique()[::75]
        halted = bars[bars["volume"] == 0]["instrument"].unique()[:2]
        bars = bars[bars["instrument"].isin([*codes, *halted])]
        bars = bars[bars["datetime"] < "2025-04-01"]
        got = minute_features(bars, bar_minutes=15, stamp="end")
        want = plain(bars, A_CLOCK, 15, end_stamped=True)
        assert len(want) > 500
        assert_same(got, want)

    def test_minute_features_equal_the_plain_reference_on_real_us_bars(
        self, minute_features, real_file
    ):
        bars = pd.read_parquet(real_file("minute1_us_2025.parquet"))
        local = bars["time_utc"].dt.tz_localize("UTC").dt.tz_convert("America/New_York")
        bars["datetime"] = local.dt.tz_localize(None)
        bars = bars[bars["instrument"].isin(bars["instrument"].unique()[::9])]
        # The source's last date holds pre-market rows only.
        rows = reduce_minutes(bars, session="us_regular")
        got = minute_features(bars, session="us_regular")
        want = plain(bars, US_CLOCK, has_amount=False)
        assert len(want) > 100
        assert_same(got, want)
        assert rows.rejected["outside the session"] > 0

    @pytest.mark.slow  # 146,000 stock-days by the plain reference: three minutes
    def test_minute_features_equal_the_plain_reference_on_all_real_bars(
        self, minute_features, real_file
    ):
        bars = pd.read_parquet(real_file("minute15_cn_sh.parquet"))
        got = minute_features(bars, bar_minutes=15, stamp="end")
        assert_same(got, plain(bars, A_CLOCK, 15, end_stamped=True))
        assert len(got) > 140_000
        bars = pd.read_parquet(real_file("minute1_us_2025.parquet"))
        local = bars["time_utc"].dt.tz_localize("UTC").dt.tz_convert("America/New_York")
        bars["datetime"] = local.dt.tz_localize(None)
        got = minute_features(bars, session="us_regular")
        assert_same(got, plain(bars, US_CLOCK, has_amount=False))
        assert len(got) > 1_500

    def test_minute_daily_facts_agree_with_an_independent_daily_source(
        self, day_frame, real_file
    ):
        bars = pd.read_parquet(real_file("minute15_cn_sh.parquet"))
        bars = bars[bars["instrument"].isin(bars["instrument"].unique()[:40])]
        rows = reduce_minutes(bars, bar_minutes=15, stamp="end")
        days = day_frame(rows).set_index(["datetime", "instrument"])
        daily = pd.read_parquet(real_file("daily_cn_sh.parquet"))
        date = "datetime" if "datetime" in daily else "date"
        daily = daily.assign(datetime=pd.to_datetime(daily[date]))
        daily = daily.set_index(["datetime", "instrument"]).reindex(days.index)
        have = daily["open"].notna()
        assert have.mean() > 0.99
        days, daily = days[have], daily[have]
        # As far as the source itself is exact: its bars come from sampled ticks.
        assert (np.abs(days["open"] - daily["open"]) < 0.0051).mean() > 0.99
        ratio = days["amount"] / daily["amount"]
        assert ratio.quantile([0.01, 0.99]).between(0.96, 1.02).all()
        assert (days["high"] <= daily["high"] + 0.005).mean() > 0.99
        assert (days["low"] >= daily["low"] - 0.005).mean() > 0.99
        gap = np.abs(days["close"] / daily["close"] - 1)
        assert gap.quantile(0.99) < 0.02


class TestProperties:
    def test_minute_features_do_not_change_when_the_future_changes(
        self, minute_features
    ):
        bars = make_bars(5, days=4)
        full = minute_features(bars)
        for day in range(1, 4):
            cut = pd.Timestamp("2024-03-01") + pd.Timedelta(days=day)
            part = minute_features(bars[bars["datetime"] < cut])
            pd.testing.assert_frame_equal(part, full.loc[: cut - pd.Timedelta("1s")])
            changed = bars.copy()
            late = changed["datetime"] >= cut
            changed.loc[late, ["open", "high", "low", "close"]] *= 1.3
            again = minute_features(changed).loc[: cut - pd.Timedelta("1s")]
            pd.testing.assert_frame_equal(again, part)

    def test_minute_filling_style_of_the_vendor_does_not_matter(self, minute_features):
        bars = make_bars(6, gaps=0.4)
        bars = bars[bars["volume"] > 0]
        filled = []
        for (code, date), g in bars.groupby(["instrument", bars["datetime"].dt.date]):
            index = [pd.Timestamp(date) + pd.Timedelta(minutes=m) for m in A_CLOCK]
            g = g.set_index("datetime").reindex(index)
            g["volume"], g["amount"] = g["volume"].fillna(0), g["amount"].fillna(0)
            g["close"] = g["close"].ffill()
            for c in ("open", "high", "low"):
                g[c] = g[c].fillna(g["close"])
            g["instrument"] = code
            g["factor"] = g["factor"].ffill().bfill()
            filled.append(g.rename_axis("datetime").reset_index())
        a, b = minute_features(bars), minute_features(pd.concat(filled))
        pd.testing.assert_frame_equal(a, b)

    def test_minute_row_order_does_not_matter_and_is_counted(self, day_frame):
        bars = make_bars(7)
        rows = reduce_minutes(bars.sample(frac=1, random_state=0))
        pd.testing.assert_frame_equal(day_frame(rows), day_frame(reduce_minutes(bars)))
        assert rows.notes["rows out of time order (sorted)"] > 0

    def test_minute_values_lie_in_their_documented_range(self, minute_features):
        frame = minute_features(make_bars(8, days=6, stocks=8))
        for f in MINUTE_FEATURES:
            x = frame[f.name].dropna()
            assert (x >= f.low - 1e-9).all() and (x <= f.high + 1e-9).all(), f.name
            assert f.formula and f.unit and f.nan and f.known

    def test_minute_degenerate_days_give_nan_not_zero_or_inf(self, minute_features):
        day = pd.Timestamp("2024-03-01 10:00")
        one = pd.DataFrame(
            {
                "instrument": ["SH600000", "SH600001", "SH600002"],
                "datetime": day,
                "open": 10.0,
                "high": 10.0,
                "low": 10.0,
                "close": 10.0,
                "volume": [100.0, 0.0, 100.0],
                "amount": [1000.0, 0.0, 0.0],
            }
        )
        frame = minute_features(one)
        assert list(frame.index.get_level_values(1)) == ["SH600000", "SH600002"]
        row = frame.iloc[0]
        for name in ("skew", "kurt", "down_ratio", "arpp", "corr_pv", "trend"):
            assert np.isnan(row[f"ms_{name}"]), name
        assert row["ms_rv"] == 0 and row["ms_vhhi"] == 1 and row["ms_mdd"] == 0
        assert np.isnan(frame.iloc[1]["ms_illiq"])
        assert np.isnan(frame.iloc[1]["ms_apb"])
        assert not np.isinf(frame.to_numpy()).any()

    def test_minute_overnight_uses_factors_and_the_last_traded_day(
        self, minute_features
    ):
        bars = make_bars(9, days=5, stocks=1, gaps=0.0).drop(columns="factor")
        days = [pd.Timestamp("2024-03-01") + pd.Timedelta(days=d) for d in range(5)]
        bars = bars[bars["datetime"].dt.normalize() != days[2]]  # suspended
        factors = pd.Series(
            [1.0, 1.0, 2.0, 2.0],
            index=pd.MultiIndex.from_tuples(
                [(d, "SH600000") for k, d in enumerate(days) if k != 2]
            ),
        )
        got = minute_features(bars, factors)["ms_overnight"]
        raw = minute_features(bars)["ms_overnight"]
        assert np.isnan(got.iloc[0])
        assert got.iloc[1] == pytest.approx(raw.iloc[1])
        assert got.iloc[2] == pytest.approx(raw.iloc[2] + math.log(2))
        assert got.iloc[3] == pytest.approx(raw.iloc[3])

    def test_minute_early_close_is_found_or_given(self, minute_features):
        bars = make_bars(10, days=2, stocks=6, clock=US_CLOCK, gaps=0.05)
        short = (bars["datetime"].dt.day == 1) & (bars["datetime"].dt.hour >= 13)
        bars = bars[~short]
        rows = reduce_minutes(bars, session="us_regular")
        assert rows.notes["days that end early"] == ["2024-03-01"]
        want = plain(bars, US_CLOCK, n_bars={pd.Timestamp("2024-03-01"): 210})
        got = minute_features(bars, session="us_regular")
        assert_same(got, want)
        given = replace(US_REGULAR, early_close={dt.date(2024, 3, 1): dt.time(13, 0)})
        one = bars[bars["instrument"] == "SH600000"]
        a = minute_features(one, session=given)
        pd.testing.assert_frame_equal(a, got.loc[a.index])
        # A single stock that stops trading was halted; its day stays full.
        alone = reduce_minutes(one, session="us_regular")
        assert "days that end early" not in alone.notes

    def test_minute_threads_do_not_change_the_result(self, day_frame):
        bars = make_bars(11, days=5, stocks=20)
        a = day_frame(reduce_minutes(bars, threads=1))
        b = day_frame(reduce_minutes(bars, threads=3))
        pd.testing.assert_frame_equal(a, b)


class TestBadInput:
    def test_minute_bad_rows_are_rejected_and_counted(self, day_frame):
        good = make_bars(12, days=1, stocks=1, gaps=0.0)
        good = good[good["volume"] > 0].reset_index(drop=True)
        bad = good.copy()
        bad.loc[10, "close"] = -1.0
        bad.loc[20, "high"] = bad.loc[20, "low"] - 0.5
        bad.loc[30, "volume"] = -5.0
        bad.loc[40, "amount"] = np.nan
        bad.loc[50, "datetime"] = pd.NaT
        extra = good.loc[[60]].assign(close=5.0, low=4.5)  # a second row of a minute
        late = good.loc[[70]].assign(datetime=pd.Timestamp("2024-03-01 20:00"))
        rows = reduce_minutes(pd.concat([bad, extra, late]))
        assert rows.rejected == {
            "price not positive": 1,
            "open, close, high and low disagree": 1,
            "volume or amount negative or unknown": 2,
            "no time": 1,
            "duplicate (instrument, datetime)": 1,
            "outside the session": 1,
        }
        clean = reduce_minutes(good.drop(index=[10, 20, 30, 40, 50]))
        pd.testing.assert_frame_equal(day_frame(rows), day_frame(clean))
        assert rows.rows_in == len(bad) + 2

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda b: b.drop(columns="high"), "no column 'high'"),
            (lambda b: b.assign(close="x"), "'close' must hold numbers"),
            (
                lambda b: b.assign(datetime=b["datetime"].dt.tz_localize("UTC")),
                "time zone",
            ),
            (
                lambda b: b.assign(datetime=b["datetime"] + pd.Timedelta("9h")),
                "another time zone",
            ),
            (lambda b: b.assign(datetime=b["datetime"].astype(str)), "timestamp"),
            (lambda b: b.assign(instrument=1), "'instrument' must hold text"),
        ],
    )
    def test_minute_bad_tables_name_the_column(self, change, match):
        with pytest.raises(ValueError, match=match):
            reduce_minutes(change(make_bars(13, days=1)))

    def test_minute_bad_options_are_named(self):
        bars = make_bars(14, days=1)
        with pytest.raises(ValueError, match="`bar_minutes`"):
            reduce_minutes(bars, bar_minutes=2)
        with pytest.raises(ValueError, match="`stamp`"):
            reduce_minutes(bars, stamp="middle")
        with pytest.raises(ValueError, match="`session`"):
            reduce_minutes(bars, session="moon")
        with pytest.raises(ValueError, match="`amount`"):
            reduce_minutes(bars, amount="guess")
        coarse = make_bars(15, days=1, gaps=0.0, bar=5)
        with pytest.raises(ValueError, match="5 minutes apart"):
            reduce_minutes(coarse, bar_minutes=1)

    @pytest.mark.parametrize("clock", [A_CLOCK, US_CLOCK])
    @pytest.mark.parametrize("bar", [1, 5, 15])
    @pytest.mark.parametrize("stamp", ["start", "end"])
    def test_minute_stamps_that_contradict_the_option_are_refused(
        self, clock, bar, stamp
    ):
        session = "a_share" if clock is A_CLOCK else "us_regular"
        shift = bar if stamp == "end" else 0
        bars = make_bars(3, days=3, stocks=2, clock=clock, shift=shift, bar=bar, gaps=0)
        options = {"session": session, "bar_minutes": bar}
        assert len(reduce_minutes(bars, stamp=stamp, **options).day)
        wrong = "start" if stamp == "end" else "end"
        with pytest.raises(ValueError, match=f"Set `--stamp {stamp}`"):
            reduce_minutes(bars, stamp=wrong, **options)

    def test_minute_a_tiny_volume_is_no_trade(self, day_frame):
        bars = make_bars(3, days=2, stocks=2, gaps=0.3)
        bars.loc[bars["volume"] == 0, "amount"] = 0.0
        tiny = bars.assign(volume=bars["volume"].where(bars["volume"] > 0, 5.9e-39))
        assert (tiny["volume"] < 1).any()
        want, got = reduce_minutes(bars), reduce_minutes(tiny)
        assert got.no_trade == want.no_trade > 0
        pd.testing.assert_frame_equal(day_frame(got), day_frame(want))

    def test_minute_an_open_of_zero_is_named(self):
        bars = make_bars(3, days=1, stocks=1, gaps=0)
        bars = bars[bars["volume"] > 0].reset_index(drop=True)
        bars.loc[0, "open"] = bars.loc[0, "low"] = 0.0
        rows = reduce_minutes(bars)
        assert rows.rejected == {"open 0 or empty in a bar with a volume": 1}

    @pytest.mark.parametrize("days, lost", [(2, 2), (5, 2)])
    def test_minute_days_lost_to_rejected_bars_are_counted_or_refused(self, days, lost):
        bars = make_bars(3, days=days, stocks=1, gaps=0)
        bars = bars[bars["volume"] > 0]
        first = bars["datetime"].dt.normalize().unique()[:lost]
        bars.loc[bars["datetime"].dt.normalize().isin(first), "open"] = 0.0
        if lost < days - lost:
            rows = reduce_minutes(bars)
            assert len(rows.day) == days - lost
            assert rows.notes[LOST] == lost
            return
        reason = r"2 of 2 stock-days .* that can be used; rejected: \d+ x open 0"
        with pytest.raises(ValueError, match=reason):
            reduce_minutes(bars)

    def test_minute_a_stock_or_a_day_with_a_clock_of_its_own_is_refused(self):
        bars = make_bars(3, days=4, stocks=4, gaps=0)
        bars = bars[bars["volume"] > 0]
        for own in (
            bars["instrument"] == "SH600002",
            bars["datetime"].dt.normalize() == bars["datetime"].max().normalize(),
        ):
            ends = bars["datetime"] + pd.to_timedelta(own.astype(int), "min")
            with pytest.raises(ValueError, match=r"the bars of (SH600002|20)"):
                reduce_minutes(bars.assign(datetime=ends))
        zone = bars["instrument"].eq("SH600001").astype(int) * 8
        with pytest.raises(ValueError, match="rows of SH600001 lie outside"):
            late = bars["datetime"] + pd.to_timedelta(zone, "h")
            reduce_minutes(bars.assign(datetime=late))

    @pytest.mark.parametrize("count", [1, 60])
    def test_minute_bars_in_another_unit_are_rejected(self, count):
        bars = make_bars(3, days=2, stocks=2, gaps=0).reset_index(drop=True)
        bars = bars[bars["volume"] > 0].reset_index(drop=True)
        rows = bars.index[3 : 3 + count]  # the first day has three bars
        money = bars.copy()
        money.loc[rows, "amount"] *= 1e4
        fen = bars.copy()
        names = ["open", "high", "low", "close", "amount"]
        fen.loc[rows, names] *= 100
        for odd in (money, fen):
            got = reduce_minutes(odd)
            why = "of another level or unit than the rest of the day"
            assert got.rejected == {why: len(rows)}
            assert got.lacking.sum() == (count > 24)

    def test_minute_volumes_of_the_day_so_far_are_refused(self):
        bars = make_bars(3, days=2, stocks=2, gaps=0.3).sort_values("datetime")
        of = [bars["instrument"], bars["datetime"].dt.normalize()]
        bars["volume"] = bars.groupby(of)["volume"].cumsum()
        with pytest.raises(ValueError, match="rises from row to row all day in 2 of 2"):
            reduce_minutes(bars.drop(columns="amount"))

    def test_session_table_covers_the_session_once(self):
        for session, minutes in ((A_SHARE, 240), (US_REGULAR, 390)):
            for end in (False, True):
                table = session.minute_of_session(end)
                inside = table[table >= 0]
                assert session.minutes == minutes
                assert set(inside) == set(range(minutes))


class TestWhatIsOddAboutAll:
    lost = "stock-days none of which has a bar at 10:15: rows lost?"

    def test_a_minute_that_all_stock_days_lack_is_told(self):
        bars = make_bars(0, days=30, stocks=4, gaps=0.4)
        clock = bars["datetime"].dt.strftime("%H:%M")
        assert reduce_minutes(bars).notes == {}
        assert reduce_minutes(bars[clock != "10:15"]).notes == {self.lost: 120}
        ended = bars.assign(datetime=bars["datetime"] + pd.Timedelta(minutes=1))
        told = reduce_minutes(ended[clock != "10:15"], stamp="end").notes
        assert list(told) == [self.lost.replace("10:15", "10:16")]
        # half of the days have it, lunch, and what vendors leave out before the close
        kept = bars[(clock != "10:15") | (bars["datetime"].dt.day % 2 > 0)]
        assert reduce_minutes(kept).notes == {}
        assert reduce_minutes(bars[~clock.isin(["14:57", "14:58"])]).notes == {}

    def test_half_days_and_few_days_are_nothing_odd(self):
        bars = make_bars(0, days=30, stocks=4)
        clock = bars["datetime"].dt.strftime("%H:%M")
        assert reduce_minutes(bars[clock < "11:30"]).notes == {}
        few = bars[bars["datetime"] < bars["datetime"].min() + pd.Timedelta(days=14)]
        assert reduce_minutes(few[clock[few.index] != "10:15"]).notes == {}

    def test_bars_of_closes_alone_are_told(self):
        bars = make_bars(0, days=30, stocks=4)
        for name in ("open", "high", "low"):
            bars[name] = bars["close"]
        (told,) = reduce_minutes(bars).notes
        assert told.endswith("closes alone?")
        bars.loc[bars.index % 20 == 0, "high"] *= 1.01
        assert reduce_minutes(bars).notes == {}


def test_a_file_of_extended_hours_alone_is_told():
    evening = make_bars(0, clock=range(1140, 1199))
    with pytest.raises(ValueError, match="leave out a file that has only extended"):
        reduce_minutes(evening, US_REGULAR)
    with pytest.raises(ValueError, match=r"set `tz` or `session`\.$"):
        reduce_minutes(evening, A_SHARE)
