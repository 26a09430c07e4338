"""Factors, derived fields, industries and members against numbers worked by hand."""

import numpy as np
import pandas as pd
import pytest

from data_handlers.vendor.mapping import parse_mapping
from qlib_ext.ingest.convert import (
    index_bars,
    industry_of,
    member_spans,
    stock_bars,
)


def plan(prices="raw", factor="preclose", **more):
    columns = {k: k for k in ("instrument", "date", "open", "high", "low", "close")}
    return parse_mapping(
        {
            "prices": prices,
            "factor": factor,
            **more,
            "sources": {"daily": {"kind": "bars", "columns": columns}},
        },
        "toy",
    )


def rows(close, preclose=None, factor=None, volume=None, amount=None, turnover=None,
         code="SH600000", start="2020-01-01"):  # fmt: skip
    n = len(close)
    frame = pd.DataFrame(
        {"instrument": code, "date": pd.bdate_range(start, periods=n), "close": close}
    )
    for name in ("open", "high", "low"):
        frame[name] = frame["close"]
    given = dict(
        preclose=preclose, factor=factor, volume=volume, amount=amount,
        turnover=turnover,
    )  # fmt: skip
    for name, values in given.items():
        if values is not None:
            frame[name] = np.asarray(values, dtype=float)
    frame["traded"] = frame["close"].notna()
    if volume is not None:
        frame["traded"] &= frame["volume"] > 0
    return frame


def test_factor_from_preclose_is_the_product_of_the_steps():
    # 10-for-10 split on day 2 (20 -> 10), dividend of 1 on day 4 (12 -> 11)
    bars, _ = stock_bars(
        rows([20, 10.5, 12, 11.55], preclose=[19, 10, 10.5, 11]), plan()
    )
    np.testing.assert_allclose(bars["factor"], [1, 2, 2, 2 * 12 / 11])
    np.testing.assert_allclose(bars["close"], [20, 21, 24, 25.2])
    np.testing.assert_allclose(bars["change"], [np.nan, 0.05, 24 / 21 - 1, 0.05])


def test_volume_and_vwap_keep_the_amount():
    bars, _ = stock_bars(
        rows([20, 10], preclose=[20, 10], volume=[100, 300], amount=[2000, 3150]),
        plan(),
    )
    np.testing.assert_allclose(bars["volume"], [100, 150])
    np.testing.assert_allclose(bars["vwap"], [20, 21])
    np.testing.assert_allclose(bars["vwap"] * bars["volume"], bars["amount"])


def test_factor_column_is_anchored_at_the_first_traded_day():
    bars, state = stock_bars(
        rows([9, 10, 5], factor=[3, 3, 6], volume=[0, 10, 10]),
        plan(factor="column"),
    )
    np.testing.assert_allclose(bars["factor"], [np.nan, 1, 2])
    np.testing.assert_allclose(bars["close"], [np.nan, 10, 10])
    assert state.loc[0, "vendor_factor"] == 6 and state.loc[0, "factor"] == 2


def test_market_cap_is_close_times_volume_over_turnover():
    bars, _ = stock_bars(
        rows([10, 11, 12, 13], preclose=[10, 10, 11, 12], volume=[100, 200, 100, 50],
             turnover=[0.01, 0.02, 0.0, 0.01]),
        plan(),
    )  # fmt: skip
    # turnover rounded to 0 on day 3: the shares of day 2 hold on
    np.testing.assert_allclose(bars["market_cap"], [1e5, 1.1e5, 1.2e5, 6.5e4])


def test_market_cap_never_uses_a_later_turnover():
    bars, _ = stock_bars(
        rows([10, 11], preclose=[10, 10], volume=[100, 200], turnover=[0.0, 0.02]),
        plan(),
    )
    np.testing.assert_allclose(bars["market_cap"], [np.nan, 1.1e5])


def test_change_skips_suspended_days():
    bars, _ = stock_bars(
        rows([10, 10, 11], preclose=[10, 10, 10], volume=[5, 0, 5]), plan()
    )
    np.testing.assert_allclose(bars["change"], [np.nan, np.nan, 0.1])
    assert bars.iloc[1, 2:].isna().all()


def test_history_does_not_depend_on_what_comes_after():
    rng = np.random.default_rng(0)
    close = 10 * np.exp(np.cumsum(0.01 * rng.standard_normal(50)))
    pre = np.r_[10, close[:-1]] / np.where(rng.random(50) < 0.1, 1.2, 1.0)
    more = dict(volume=rng.integers(1, 9, 50) * 100.0, turnover=rng.random(50) / 10)
    whole, _ = stock_bars(rows(close, preclose=pre, **more), plan())
    for t in (1, 7, 30):
        part, _ = stock_bars(
            rows(close[:t], preclose=pre[:t], **{k: v[:t] for k, v in more.items()}),
            plan(),
        )
        pd.testing.assert_frame_equal(part, whole.iloc[:t])


def test_adjusted_prices_keep_factor_one_and_have_no_vwap():
    bars, _ = stock_bars(
        rows([5, 6], volume=[100, 100], amount=[1000, 1200], turnover=[0.1, 0.1]),
        plan("adjusted", "one"),
    )
    assert (bars["factor"] == 1).all()
    assert not {"vwap", "market_cap"} & set(bars)


def test_state_of_one_stock_does_not_leak_into_another():
    frame = pd.concat(
        [rows([10, 5], preclose=[10, 5]), rows([7], preclose=[1], code="SZ000001")],
        ignore_index=True,
    )
    bars, _ = stock_bars(frame, plan())
    np.testing.assert_allclose(bars["factor"], [1, 2, 1])
    assert np.isnan(bars["change"].iloc[2])


def test_a_missing_factor_names_stock_and_day():
    with pytest.raises(ValueError, match="SH600000 2020-01-02"):
        stock_bars(rows([1, 2], factor=[1, np.nan]), plan(factor="column"))


HISTORY = pd.DataFrame(
    {
        "instrument": ["A", "A", "B"],
        "start": pd.to_datetime(["2020-01-05", "2020-03-01", "2019-01-01"]),
        "end": pd.to_datetime([None, None, "2020-01-31"]),
        "code": [11.0, 12.0, 20.0],
    }
)


@pytest.mark.parametrize(
    "code, day, want",
    [
        ("A", "2020-01-04", np.nan),  # before the first row: unknown, not 11
        ("A", "2020-01-05", 11),
        ("A", "2020-02-29", 11),
        ("A", "2020-03-01", 12),
        ("A", "2030-01-01", 12),
        ("B", "2020-01-31", 20),
        ("B", "2020-02-01", np.nan),  # after its end
        ("C", "2020-01-05", np.nan),
    ],
)
def test_industry_holds_from_its_start_until_the_next_row(code, day, want):
    got = industry_of(HISTORY, pd.Series([pd.Timestamp(day)]), pd.Series([code]))
    np.testing.assert_equal(got, [want])


def test_industry_before_a_change_does_not_depend_on_the_change():
    days = pd.Series(pd.date_range("2020-01-01", "2020-02-29"))
    code = pd.Series("A", index=days.index)
    early = HISTORY[HISTORY["start"] <= "2020-02-29"]
    np.testing.assert_equal(
        industry_of(HISTORY, days, code), industry_of(early, days, code)
    )


def test_member_lists_hold_from_their_date_to_the_day_before_the_next():
    calendar = pd.bdate_range("2020-01-30", "2020-03-31")
    lists = pd.DataFrame(
        [("2020-02-01", "A"), ("2020-02-01", "B"), ("2020-02-29", "B"),
         ("2020-02-29", "C")],
        columns=["date", "instrument"],
    )  # fmt: skip
    lists["date"] = pd.to_datetime(lists["date"])  # a Saturday, and another
    lists["weight"] = np.nan
    spans, periods = member_spans(lists, calendar)
    got = {r.instrument: (f"{r.start:%m-%d}", f"{r.end:%m-%d}")
           for r in spans.itertuples()}  # fmt: skip
    assert got == {
        "A": ("02-03", "02-28"),
        "B": ("02-03", "03-31"),
        "C": ("03-02", "03-31"),
    }
    assert (periods["weight"] == 1).all() and len(periods) == 4


def test_member_lists_after_the_calendar_change_nothing():
    calendar = pd.bdate_range("2020-02-03", "2020-02-28")
    lists = pd.DataFrame(
        {
            "date": pd.to_datetime(["2020-01-10", "2020-01-31", "2020-03-31"]),
            "instrument": ["OLD", "A", "B"],
            "weight": 1.0,
        }
    )
    spans, _ = member_spans(lists, calendar)
    assert spans["instrument"].tolist() == ["A"]
    assert (spans["start"].item(), spans["end"].item()) == (calendar[0], calendar[-1])


@pytest.mark.parametrize("overlap", [0, 1, 3])
@pytest.mark.parametrize("factor", ["preclose", "column"])
def test_an_update_is_bit_for_bit_one_run_over_all_days(factor, overlap):
    rng = np.random.default_rng(7)
    close = np.round(np.exp(rng.normal(2.5, 0.3, size=40)), 2)
    preclose = np.append(20.0, close[:-1])
    preclose[::3] = np.round(preclose[::3] / 1.013, 2)  # ex-dates
    steps = np.append(1.0, close[:-1]) / preclose
    whole = rows(close, preclose=preclose, factor=np.round(2.7 * np.cumprod(steps), 6))
    parts = {"preclose": ["factor"], "column": ["preclose"]}[factor]
    whole = whole.drop(columns=parts)
    mapping = plan(factor=factor)
    bars, at_once = stock_bars(whole, mapping)
    _, state = stock_bars(whole[:17], mapping)
    for first in range(17, 40, 5):
        part = whole[first - overlap : first + 5].reset_index(drop=True)
        new, state = stock_bars(part, mapping, state)
        new = new[overlap:].reset_index(drop=True)
        pd.testing.assert_frame_equal(
            new, bars[first : first + 5].reset_index(drop=True), rtol=0, atol=0
        )
    pd.testing.assert_frame_equal(state, at_once, rtol=0, atol=0)


def test_the_change_of_an_index_is_of_the_stored_closes():
    days = pd.bdate_range("2020-01-01", periods=3)
    raw = pd.DataFrame(
        {"instrument": "SH000300", "date": days, "close": [4152.24, 4144.96, 4129.3]}
    )
    whole = index_bars(raw, days)
    stored = whole.assign(close=whole["close"].astype(np.float32))[:2]
    later = index_bars(raw[2:], days, stored[1:])
    assert later["change"].item() == whole["change"].iloc[2]
    assert later["change"].item() == pytest.approx(4129.3 / 4144.96 - 1, abs=1e-7)
