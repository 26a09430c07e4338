"""Each planted defect is found, with its count and an example, and stops or warns."""

import re

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from data_handlers.aggregate.schema import FLOW_CLASSES, FLOW_FIELDS
from data_handlers.vendor.mapping import load_mapping
from qlib_ext.cli import main
from qlib_ext.ingest import build, checks, inputs
from qlib_ext.ingest.build import check_index
from qlib_ext.ingest.report import IngestError, Report
from qlib_ext.ingest.run import ingest
from qlib_ext.ingest.store import read_bars, read_instruments, read_meta

MAPPING = """
prices: {prices}
factor: {factor}
pct_change_of: adjusted
sources:
  daily:
    kind: bars
    files: "bars.parquet"
    columns: {{instrument: instrument, date: date, open: open, high: high, low: low,
              close: close, preclose: preclose, volume: volume, amount: amount,
              turnover: turnover, factor: factor, market_cap: market_cap}}
"""


PRICES = ["open", "high", "low", "close", "preclose"]


@pytest.fixture
def run_ingest(vendor_market, tmp_path):
    """Ingest the small market after a change to its frame."""

    def run(change=lambda b: b, prices="raw", factor="column", **options):
        bars = vendor_market.traded.copy()
        bars["market_cap"] = bars["close"] * bars["volume"] / bars["turnover"]
        bars = change(bars)
        (tmp_path / "m.yaml").write_text(MAPPING.format(prices=prices, factor=factor))
        bars.to_parquet(tmp_path / "bars.parquet")
        options = {"data": tmp_path, **options}
        return ingest(tmp_path / "s", tmp_path / "m.yaml", **options)

    return run


def at(bars, code="SZ000001", i=5):
    return bars.index[bars["instrument"] == code][i]


def put(column, value, code="SZ000001", i=5):
    def change(bars):
        bars.loc[at(bars, code, i), column] = value
        return bars

    return change


def scale(column, by, code=None):
    def change(bars):
        rows = slice(None) if code is None else bars["instrument"] == code
        bars.loc[rows, column] = bars.loc[rows, column] * by
        return bars

    return change


ERRORS = {
    "conflicting duplicate": (
        lambda b: pd.concat([b, b.iloc[[3]].assign(close=9.99)]),
        "duplicate rows",
        2,
    ),
    "high below close": (put("high", 0.5), "OHLC order", 1),
    "low above open": (put("low", 1e3), "OHLC order", 1),
    "zero price": (put("close", 0.0), "non-positive prices", 1),
    "negative price": (put("low", -1.0), "non-positive prices", 1),
    "missing price": (put("open", np.nan), "missing prices", 1),
    "negative volume": (put("volume", -5.0), "negative volume", 1),
    "weekend": (put("date", pd.Timestamp("2020-01-04")), "weekend dates", 1),
    "future": (put("date", pd.Timestamp("2199-01-01")), "future dates", 1),
    "lots as shares": (scale("volume", 0.01), "unit slip", None),
    "thousands as CNY": (scale("amount", 1e-3), "unit slip", None),
    "one stock in lots": (scale("volume", 0.01, "SZ002415"), "unit slip", None),
    "one row in lots": (put("volume", 3.0), "unit slip", 1),
    "percent as fraction": (scale("turnover", 100), "unit slip", None),
    "fraction as percent": (scale("turnover", 1e-4), "unit slip", None),
    "market cap in 10,000": (scale("market_cap", 1e-4), "unit slip", None),
    "zero market cap": (put("market_cap", 0.0), "market cap", 1),
    "market cap of a row in 10,000": (
        lambda b: b.assign(market_cap=b.market_cap * np.where(b.index == 40, 1e-4, 1)),
        "unit slip",
        1,
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_stops_before_anything_is_written(run_ingest, tmp_path, case):
    change, check, count = ERRORS[case]
    with pytest.raises(IngestError) as caught:
        run_ingest(change)
    found = [f for f in caught.value.report.errors if f.check == check]
    assert found, caught.value.report.to_text()
    if count is not None:
        assert found[0].count == count and found[0].examples
    assert not (tmp_path / "s").exists()


def many_stocks(folder, change=lambda b: b, columns="", factor="one", **options):
    """Ingest 12 stocks on 60 days without amounts, after a change."""
    rng = np.random.default_rng(0)
    days = pd.bdate_range("2020-01-02", periods=60)
    rows = []
    for k in range(12):
        close = (10 * np.exp(np.cumsum(0.01 * rng.standard_normal(60)))).round(2)
        part = {"instrument": f"SZ0000{k:02d}", "date": days, "open": close}
        part |= {"high": close + 0.05, "low": close - 0.05, "close": close}
        part |= {"volume": rng.integers(1000, 3000, 60) * 100.0, "flag": 1}
        rows.append(pd.DataFrame(part))
    bars = change(pd.concat(rows, ignore_index=True))
    folder.mkdir(exist_ok=True)
    bars.to_csv(folder / "bars.csv", index=False)
    names = "instrument date open high low close volume".split()
    text = ", ".join([*(f"{c}: {c}" for c in names), *([columns] if columns else [])])
    (folder / "m.yaml").write_text(
        f"prices: raw\nfactor: {factor}\nsources:\n  daily: {{kind: bars, files: "
        f"bars.csv, columns: {{{text}}}}}\n"
    )
    return ingest(folder / "s", folder / "m.yaml", data=folder, **options).report


def on(day, columns, by, later=False):
    def change(bars):
        rows = bars["date"] >= day if later else bars["date"] == day
        bars.loc[rows, columns] = bars.loc[rows, columns] * by
        return bars

    return change


def repeated(bars):
    days = sorted(bars["date"].unique())
    copy = bars[bars["date"] == days[30]].assign(date=days[31])
    return pd.concat([bars[bars["date"] != days[31]], copy])


def thin(bars):
    last = bars["date"] == bars["date"].max()
    return bars[~(last & (bars["instrument"] < "SZ000005"))]


MARKET_WIDE = {
    "volume in lots from a day on": (
        on("2020-02-20", ["volume"], 0.01, later=True), "levels", 1),
    "prices of a day times ten": (on("2020-02-20", PRICES[:4], 10), "levels", 8),
    "the day before once more": (repeated, "repeated bars", 1),
    "a last day without five of twelve": (thin, "incomplete days", 1),
}  # fmt: skip


@pytest.mark.parametrize("case", MARKET_WIDE)
def test_what_moves_a_whole_market_is_an_error_that_can_be_accepted(tmp_path, case):
    change, check, count = MARKET_WIDE[case]
    with pytest.raises(IngestError) as caught:
        many_stocks(tmp_path, change)
    (found,) = caught.value.report.errors
    assert (found.check, found.count) == (check, count)
    assert f"--accept {check!r}" in found.message
    assert not many_stocks(tmp_path, change, accept=[check]).errors


def locked(bars):
    """Fewer buyers day by day, and twenty times their volume on the next."""
    bars = on("2020-02-19", ["volume"], 0.25)(bars)
    return on("2020-02-20", ["volume"], 0.05)(bars)


def one_long_suspended(bars):
    """One stock alone, listed for a month before the others, and then suspended."""
    first = bars["instrument"] == "SZ000003"
    days = pd.to_datetime(bars["date"]) - first * pd.to_timedelta(150, "D")
    own = first & (bars.groupby("instrument").cumcount() < 30)
    bars = bars.assign(date=days.dt.strftime("%Y-%m-%d"))
    return bars[(own | ~first) & (days.dt.dayofweek < 5)]


@pytest.mark.parametrize("change", [locked, one_long_suspended])
def test_what_a_market_does_on_its_worst_days_is_no_error(tmp_path, change):
    assert not many_stocks(tmp_path, change).errors


def shift(column, by):
    def change(bars):
        opens = bars["open"].sample(frac=1, random_state=0).to_numpy() * 0 + 1.0
        before = bars.groupby("instrument")["close"].shift(by).fillna(bars["close"])
        return bars.assign(**{column: before * opens})

    return change


def exchanged(bars):
    late = bars.groupby("instrument")["close"].shift().fillna(bars["close"])
    opens = (0.8 * late + 0.2 * bars["close"]).round(2)  # most of the day is after it
    high = np.maximum(opens, bars["close"]) + 0.05
    low = np.minimum(opens, bars["close"]) - 0.05
    return bars.assign(open=bars["close"], close=opens, high=high, low=low)


def of_one(**times):
    """Multiply columns of one stock."""

    def change(bars):
        rows = bars["instrument"] == "SZ000003"
        for name, by in times.items():
            bars.loc[rows, name] = (bars.loc[rows, name] * by).round(2)
        return bars

    return change


def a_day_late(bars):
    """Give a stock the history of the one before it, a day late."""
    values = bars.columns.drop(["instrument", "date"])
    late, of = (bars["instrument"] == f"SZ00000{k}" for k in (3, 2))
    bars.loc[late, values] = bars.loc[of, values].shift().to_numpy()
    return bars.dropna()


def at_midday(bars):
    """Take one day's closes before its end; the next day's previous closes tell."""
    bars = shift("before", 1)(bars)
    rows = bars["date"] == "2020-02-20"
    bars.loc[rows, "close"] = (bars.loc[rows, "close"] * 0.997).round(2)
    return bars


def under_each_others_code(bars):
    """Exchange two stocks of like prices for a day; previous closes tell."""
    a, b = (bars["instrument"] == f"SZ00000{k}" for k in (3, 4))
    names = bars.columns.drop(["instrument", "date", "volume"])
    bars.loc[b, names] = (bars.loc[a, names] * 1.002).round(2).to_numpy()
    bars = shift("before", 1)(bars)
    day = bars["date"] == "2020-02-20"
    bars.loc[day & a, "instrument"] = "SZ000004"
    bars.loc[day & b, "instrument"] = "SZ000003"
    return bars


def flows(**times):
    """Give flows by size, each trade bought and sold once, some multiplied."""

    def change(bars):
        rng = np.random.default_rng(1)
        amount = bars["close"] * bars["volume"]
        for side in ("buy", "sell"):
            share = rng.dirichlet([3, 3, 2, 2], len(bars)).T * amount.to_numpy()
            for size, value in zip(FLOW_CLASSES, share, strict=True):
                by = times.get(f"{side}_{size}", times.get("all", 1.0))
                bars[f"flow_{side}_{size}"] = value * by
        return bars

    return change


FLOWS = ", ".join(f"{name}: {name}" for name in FLOW_FIELDS)

MISPLACED = {
    "flows in ten thousands": (flows(all=1e-4), FLOWS, r"sum to 0.0002 times the"),
    "flows of one class in CNY": (
        flows(buy_large=1e4), FLOWS, r"flow_buy_large is 1\.\d+e\+04 times flow_sell"),
    "flows of a stock": (
        lambda b: flows()(b).pipe(lambda b: b.assign(**{c: b[c] * np.where(
            b["instrument"] == "SZ000003", 1e-4, 1) for c in FLOW_FIELDS})), FLOWS,
        "mend these rows"),
    "net flows": (flows(buy_small=-1), FLOWS, "a flow is below 0"),
    "shares of a day with digits too many": (
        lambda b: b.assign(free=3e8 * np.where(
            (b["instrument"] == "SZ000003") & (b["date"] == "2020-02-20"), 1234, 1)),
        "float_shares: free", "the float_shares is a power of ten off"),
    "shares below 0": (
        lambda b: b.assign(free=3e8 * np.where(b.index == 9, -1, 1)),
        "float_shares: free", "float_shares is not above 0"),
    "a previous close of nothing": (
        lambda b: shift("before", 1)(b).assign(before=lambda b: b["before"] * np.where(
            (b["instrument"] == "SZ000003") & (b["date"] == "2020-02-20"), 3600, 1)),
        "preclose: before", "as by no dividend or split"),
    "a day on which nothing trades": (
        lambda b: b.assign(volume=b["volume"].where(b["date"] != "2020-02-20", 0)), "",
        "many stocks have a row and none has a volume"),
    "half a last day without volume": (
        lambda b: b.assign(volume=b["volume"].where(
            (b["date"] < b["date"].max()) | (b["instrument"] < "SZ000006"))), "",
        "far fewer stocks trade"),
    "one stock in fen": (
        of_one(**dict.fromkeys(PRICES[:4], 100)), "", r"SZ000003 \(1 stock"),
    "one stock in lots": (of_one(volume=0.01), "", "1 stock.* no whole lots"),
    "one stock in lots from a day on": (
        lambda b: b.assign(volume=b["volume"] * np.where(
            (b["instrument"] == "SZ000003") & (b["date"] > "2020-02-20"), 0.01, 1)),
        "", "1 stock.* no whole lots"),
    "one stock in fen on a day": (
        lambda b: b.assign(**{c: b[c] * np.where(
            (b["instrument"] == "SZ000003") & (b["date"] == "2020-02-20"), 100, 1)
            for c in PRICES[:4]}), "", "the close is a power of ten off"),
    "a previous close in fen": (
        lambda b: shift("before", 1)(b).assign(before=lambda b: b["before"] * np.where(
            (b["instrument"] == "SZ000003") & (b["date"] == "2020-02-20"), 100, 1)),
        "preclose: before", "previous close is a power of ten off"),
    "percent changes as fractions": (
        lambda b: b.assign(pct=b.groupby("instrument")["close"].pct_change() * 100),
        "pct_change: pct", r"set `units.pct_change`"),
    "another's history a day late": (a_day_late, "", "bars of another, days later"),
    "a snapshot at midday": (
        at_midday, "preclose: before", "before their close"),
    "two stocks of like prices exchanged": (
        under_each_others_code, "preclose: before", "under each other's codes"),
    "prices in fen": (
        lambda b: b.assign(**{c: (b[c] * 100).round() for c in PRICES[:4]}), "",
        r"units: \{price: fen\}"),
    "bars of weeks": (
        lambda b: b[b["date"].dt.dayofweek == 2], "", "7 apart at the median"),
    "a year without a row": (
        lambda b: b.assign(date=b["date"] + pd.to_timedelta(
            (b["date"] > "2020-02-03") * 364, "D")), "", "longer than any holiday"),
    "a lost week": (
        lambda b: b[(b["date"] < "2020-03-09") | (b["date"] > "2020-03-13")], "",
        "no holiday falls there"),
    "before the exchanges": (
        lambda b: b.assign(date=b["date"] - pd.to_timedelta(364 * 30, "D")), "",
        "had not opened"),
    "open and close": (exchanged, "", "two columns swapped"),
    "previous close of two rows above": (
        shift("before", 2), "preclose: before", "a row off"),
    "limits": (
        lambda b: b.assign(up=b["close"] * 1.1, down=b["close"] * 0.9),
        "limit_up: down, limit_down: up", "no close lies beyond limit_up"),
    "limits of the day before": (
        lambda b: shift("before", 2)(b).assign(
            up=lambda b: (b["before"] * 1.1).round(2)),
        "limit_up: up", "of another day"),
    "limits of one stock in fen": (
        lambda b: shift("before", 1)(b).assign(up=lambda b: (b["before"] * np.where(
            b["instrument"] == "SZ000003", 110, 1.1)).round(2)),
        "limit_up: up", "limit prices are a power of ten"),
    "float shares in ten thousands": (
        lambda b: b.assign(free=3e4), "float_shares: free",
        "volume / float_shares has a median"),
    "a previous close of no value in half the stocks": (
        lambda b: shift("before", 1)(b).assign(before=lambda x: x["before"].where(
            x["instrument"] > "SZ000005")), "preclose: before",
        "ex-dates on them would be taken for returns"),
    "mean price in fen": (
        lambda b: b.assign(mean=b["close"] * 100), "vwap: mean", "set `units.vwap`"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISPLACED)
def test_columns_and_days_out_of_place_are_refused(tmp_path, case):
    change, columns, match = MISPLACED[case]
    with pytest.raises(IngestError) as caught:
        factor = "preclose" if "previous close of no" in case else "one"
        many_stocks(tmp_path, change, columns, factor)
    assert re.search(match, caught.value.report.to_text())
    assert not (tmp_path / "s").exists()


def test_days_count_once_the_exchange_has_closed():
    at = pd.Timestamp("2024-03-05 14:59", tz="Asia/Shanghai")
    plan = load_mapping("baostock")
    assert checks._last_day(plan, at) == pd.Timestamp("2024-03-04")
    assert checks._last_day(plan, at + pd.Timedelta("1min")) == pd.Timestamp(
        "2024-03-05"
    )


def test_a_few_expensive_stocks_are_no_slip(tmp_path):
    def few(bars):
        bars = bars[bars["instrument"] < "SZ000003"]
        return bars.assign(**{c: (bars[c] * 170).round(2) for c in PRICES[:4]})

    assert not many_stocks(tmp_path, few).errors


def test_indices_of_another_day_or_level_are_refused():
    rng = np.random.default_rng(0)
    days = pd.bdate_range("2020-01-02", periods=40)
    market = 0.01 * rng.standard_normal(40)
    rows = [
        pd.DataFrame({"datetime": days, "instrument": f"SZ00000{k}",
                      "change": market + 0.01 * rng.standard_normal(40)})
        for k in range(6)
    ]  # fmt: skip
    index = pd.DataFrame({"datetime": days, "instrument": "SH000300", "close": 1.0})
    for change, found in (
        (market, []),
        (np.roll(market, 1), ["index and stocks apart"]),
        (np.where(days == days[7], 9.0, market), ["index jumps"]),
    ):
        report = Report()
        check_index(index.assign(change=change), pd.concat(rows), report)
        assert [f.check for f in report.errors] == found


def test_flows_of_aggressors_or_of_both_sides_are_right(tmp_path):
    for by in (0.3, 0.5, 1.0):  # an auction's trades have no aggressor
        assert not many_stocks(tmp_path / str(by), flows(all=by), FLOWS).findings


def test_turnover_beside_other_shares_is_told(tmp_path):
    def change(bars):
        bars = bars.assign(free=3e8, turn=bars["volume"] / 3e8)
        bars.loc[9, "turn"] *= 3
        return bars

    report = many_stocks(tmp_path, change, "float_shares: free, turnover: turn")
    assert [(f.check, f.count) for f in report.findings] == [
        ("turnover and float_shares", 1)
    ]


def test_indices_that_lack_days_or_order_are_told():
    days = pd.bdate_range("2020-01-02", periods=20)
    index = pd.concat(
        pd.DataFrame({"date": days[:n], "instrument": name})
        for name, n in (("SH000300", 20), ("SH000905", 18))
    )
    report = Report()
    build._index_days_without_stocks(index[index.index != 4], days, report)
    (found,) = report.findings
    assert found.check == "days without index"
    assert [x["lacks"] for x in found.examples] == [1, 1]
    bars = pd.DataFrame({"datetime": days, "instrument": "SZ000001", "change": 0.01})
    level = bars.assign(open=3.0, high=3.1, low=2.9, close=[3.0] * 19 + [3.2])
    check_index(level, bars, report := Report())
    assert [(f.check, f.count) for f in report.findings] == [("OHLC order", 1)]


def test_a_stuck_feed_and_a_wrong_flag_are_told(tmp_path):
    def change(bars):
        rows = bars.index[bars["instrument"] == "SZ000003"][20:23]
        bars.loc[rows, [*PRICES[:4], "volume"]] = bars.loc[
            rows[0], [*PRICES[:4], "volume"]
        ].to_numpy()
        return bars

    report = many_stocks(tmp_path, change, "is_st: flag")
    assert [(f.check, f.count) for f in report.of_level("warning")] == [
        *(("repeated bars", 1), ("flag of special treatment", 720))
    ]


def test_lost_rows_before_an_ex_date_are_told(tmp_path):
    def change(bars):
        bars = shift("before", 1)(bars)
        hole = bars["date"].between("2020-02-03", "2020-02-06")
        return bars[~(hole & (bars["instrument"] == "SZ000003"))]

    report = many_stocks(tmp_path, change, "preclose: before", factor="preclose")
    (found,) = report.of_level("warning")
    assert found.check == "ex-dates behind days without rows" and found.count == 1
    assert found.examples[0]["instrument"] == "SZ000003"


def test_an_older_delivery_adds_nothing_and_is_told(tmp_path):
    many_stocks(tmp_path)
    older = many_stocks(tmp_path, lambda b: b[b["date"] < "2020-02-20"], update=True)
    assert [f.check for f in older.findings] == ["older files"]


def test_other_tables_with_wrong_rows_are_told(tmp_path):
    plan = load_mapping("baostock")
    report = Report()
    codes = [f"SH6000{k:02d}" for k in range(20)]
    days = pd.to_datetime(["2020-01-02", "2020-02-03", "2020-03-02"])
    lists = pd.DataFrame([("csi9", d, c) for d in days for c in codes])
    lists.columns = ["market", "date", "instrument"]
    half = (lists["date"] != days[1]) | (lists["instrument"] < codes[9])
    inputs._check_sizes(lists[half], plan.of_kind("members")[0], report)
    frame = pd.DataFrame({"instrument": codes[:3], "code": ["48", "bank", "49"]})
    frame = frame.assign(start=days[0], end=[pd.NaT, days[1], pd.Timestamp(0)])
    with pytest.raises(IngestError, match="ends before it starts"):
        inputs._read_industry(plan, {"industry": frame}, report, {})
        report.stop_on_errors()
    assert [f.check for f in report.findings] == [
        *("size of member lists", "ends before it starts", "industries of two kinds")
    ]
    assert report.findings[0].examples[0]["members"] == 9


def test_a_flag_of_suspensions_is_no_flag_of_trading(tmp_path):
    columns = "trading: flag"
    assert not many_stocks(tmp_path / "a", columns=columns).findings
    with pytest.raises(IngestError, match="suspended with a trade"):
        many_stocks(tmp_path / "b", lambda b: b.assign(flag=0), columns)


def test_a_mapping_in_the_wrong_units_for_half_the_files_is_an_error(run_ingest):
    def two_vendors(bars):
        late = bars["date"] > bars["date"].median()
        bars.loc[late, "volume"] /= 100
        return bars

    with pytest.raises(IngestError, match="unit slip"):
        run_ingest(two_vendors)
    with pytest.raises(IngestError, match="unit slip"):
        run_ingest(two_vendors, prices="adjusted", factor="one")


def test_adjusted_prices_far_from_the_traded_mean_are_no_slip(run_ingest):
    def forward(bars):
        for name in ("open", "high", "low", "close"):
            bars[name] = bars[name] / 6  # much paid out since
        return bars

    result = run_ingest(forward, prices="adjusted", factor="one")
    assert not result.report.errors


def test_prices_of_a_stock_adjusted_backward_by_169_are_no_slip(run_ingest, tmp_path):
    def backward(bars):
        for name in ("open", "high", "low", "close", "preclose"):
            bars[name] = scale(name, 169.0, "SZ000001")(bars)[name]
        return bars

    result = run_ingest(backward, prices="adjusted", factor="one")
    assert not result.report.errors

    def old_stocks(bars):
        many = {c: 20.0 * (k + 1) for k, c in enumerate(bars["instrument"].unique())}
        for name in ("open", "high", "low", "close", "preclose"):
            bars[name] = bars[name] * bars["instrument"].map(many)
        return bars

    run_ingest(old_stocks, prices="adjusted", factor="one", overwrite=True)
    with pytest.raises(IngestError, match="unit slip"):
        run_ingest(
            scale("amount", 0.1), prices="adjusted", factor="one", overwrite=True
        )
    # A published factor that began long before the store does not change its values.
    same = run_ingest(overwrite=True)
    want = read_bars(tmp_path / "s", ["SZ000001"])
    old = run_ingest(scale("factor", 169.0, "SZ000001"), overwrite=True)
    assert same.report.findings == old.report.findings
    pd.testing.assert_frame_equal(read_bars(tmp_path / "s", ["SZ000001"]), want)


def test_a_stock_without_factor_is_named_and_can_be_left_out(run_ingest, tmp_path):
    def change(bars):
        return bars.assign(
            factor=bars["factor"].where(bars["instrument"] != "SZ002415")
        )

    with pytest.raises(IngestError, match=r"1 stock\(s\) have traded days") as caught:
        run_ingest(change)
    (error,) = caught.value.report.errors
    assert (error.check, error.examples[0]["instrument"]) == ("no factor", "SZ002415")
    run_ingest(change, drop_bad_rows=True)
    codes = read_instruments(tmp_path / "s")["instrument"]
    assert sorted(codes) == ["SH600000", "SH600519", "SH688001", "SZ000001", "SZ300750"]


@pytest.mark.parametrize("adjusted", [False, True])
def test_a_volume_of_another_base_than_the_prices_is_warned_of(tmp_path, adjusted):
    # Each of 12 stocks is split 2 for 1 on day 20: half the price, twice the volume.
    rng = np.random.default_rng(0)
    days = pd.bdate_range("2020-01-02", periods=40)
    late = np.arange(40) >= 20
    rows = []
    for k in range(12):
        close = (10 + k) * np.exp(np.cumsum(0.005 * rng.standard_normal(40)))
        close = np.where(late, close / 2, close).round(2)
        volume = np.round(1e6 * rng.uniform(0.8, 1.2, 40)) * (1 + late)
        rows.append(pd.DataFrame({
            "instrument": f"SZ0000{k:02d}", "date": days, "open": close, "high": close,
            "low": close, "close": close, "volume": volume, "factor": 1.0 + late,
            # Adjusted: the vendor has brought the volume to one base already.
            "amount": (volume * close).round(),
        }))  # fmt: skip
    bars = pd.concat(rows)
    if adjusted:
        bars["volume"] /= bars["factor"]
        bars = bars.drop(columns="amount")
    bars.to_csv(tmp_path / "bars.csv", index=False)
    columns = ", ".join(f"{c}: {c}" for c in bars)
    (tmp_path / "m.yaml").write_text(
        "prices: raw\nfactor: column\nsources:\n  daily: {kind: bars, files: bars.csv, "
        f"columns: {{{columns}}}}}\n"
    )
    report = ingest(tmp_path / "s", tmp_path / "m.yaml", data=tmp_path).report
    assert [f.check for f in report.findings] == adjusted * ["volume at splits"]
    if adjusted:
        assert report.findings[0].count == 12
        assert "by -96% of the split" in report.findings[0].message


WARNINGS = {
    "same row twice": (lambda b: pd.concat([b, b.iloc[[3]]]), "duplicate rows", 1),
    "no volume": (put("volume", 0.0), "no volume", 1),
    "missing ex-date": (
        lambda b: b.assign(factor=1.0), "jumps without factor change", None),
    "wrong ex-date": (
        put("factor", 9.0, i=20), "jumps despite factor change", None),
    "factor falls": (put("factor", 0.4, i=20), "factor falls", None),
    "previous close off": (put("preclose", 5.0, i=20), "vendor's own return", 1),
    "adjusted prices": (
        lambda b: b.assign(**{c: b[c] * 0.8131 for c in PRICES}),
        "prices between ticks", None),
    "an index": (
        lambda b: b.assign(instrument=b["instrument"].replace("SZ300750", "SZ399006")),
        "indices among stocks", 1),
    "a fund": (
        lambda b: b.assign(instrument=b["instrument"].replace("SZ300750", "SZ159915")),
        "funds among stocks", 1),
    "no amount": (put("amount", 0.0), "amount of 0", 1),
    "mean price off": (scale("amount", 1.05, "SZ000001"),
                       "amount/volume off the bar", None),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNINGS)
def test_a_warning_is_listed_and_the_store_is_written(run_ingest, tmp_path, case):
    change, check, count = WARNINGS[case]
    report = run_ingest(change).report
    found = [f for f in report.of_level("warning") if f.check == check]
    assert len(found) == 1 and found[0].count >= 1 and found[0].examples
    if count is not None:
        assert found[0].count == count
    assert read_meta(tmp_path / "s")["days"] == 40
    assert check in (tmp_path / "s" / "ingest_report.md").read_text()
    assert check in (tmp_path / "s" / "ingest_report.json").read_text()


def test_clean_bars_give_no_warning(run_ingest):
    report = run_ingest().report
    assert not report.errors and not report.of_level("warning")
    assert len(report.passed) > 12


def test_a_holiday_with_a_few_rows_is_a_warning(fake_vendors, tmp_path):
    stocks = [f"SH6000{i:02d}" for i in range(30)]
    market = fake_vendors.build_market(days=30, stocks=stocks)
    day = sorted(market.bars["date"].unique())[20]
    keep = (market.bars["date"] != day) | (market.bars["instrument"] == "SH600003")
    market.bars = market.bars[keep]
    fake_vendors.write["baostock"](market, tmp_path / "f")
    report = ingest(tmp_path / "s", "baostock", data=tmp_path / "f").report
    found = [f for f in report.findings if f.check == "incomplete days"]
    assert found[0].level == "warning"
    assert found[0].examples[0]["date"] == f"{day:%Y-%m-%d}"
    assert (found[0].level, found[0].examples[0]["rows"]) == ("warning", 1)


def test_a_stock_day_without_index_bar_is_off_the_calendar(
    vendor_market, fake_vendors, tmp_path
):
    day = sorted(vendor_market.bars["date"].unique())[20]
    index = vendor_market.index[vendor_market.index["date"] != day]
    market = type(vendor_market)(
        vendor_market.bars, index, vendor_market.members, vendor_market.industry
    )
    fake_vendors.write["tushare"](market, tmp_path / "f")
    with pytest.raises(IngestError, match="no bar that day"):
        ingest(tmp_path / "s", "tushare", data=tmp_path / "f")


def test_bad_rows_can_be_left_out_by_choice(run_ingest, tmp_path):
    result = run_ingest(put("high", 0.5), drop_bad_rows=True)
    found = [f for f in result.report.of_level("warning") if f.check == "OHLC order"]
    assert found[0].message.startswith("rows left out")
    bars = read_bars(tmp_path / "s", ["SZ000001"])
    assert len(bars) == 39


def test_dry_run_writes_nothing_and_reports_all(run_ingest, tmp_path):
    result = run_ingest(dry_run=True)
    assert not result.written and result.summary["stocks"] == 6
    assert not (tmp_path / "s").exists()


def test_an_existing_store_is_not_replaced_without_being_told(run_ingest):
    run_ingest()
    with pytest.raises(ValueError, match="--update to append to it or --overwrite"):
        run_ingest()
    assert run_ingest(overwrite=True).written
    with pytest.raises(ValueError, match="exclude each other"):
        run_ingest(overwrite=True, update=True)


def test_unknown_source_and_missing_directory_are_named(run_ingest, tmp_path):
    with pytest.raises(ValueError, match=r"unknown source\(s\) \['dialy'\]"):
        run_ingest(files={"dialy": ["x"]})
    with pytest.raises(ValueError, match="is not a directory"):
        run_ingest(data=tmp_path / "nowhere")


def test_update_without_a_store_says_so(run_ingest):
    with pytest.raises(ValueError, match="is no store yet"):
        run_ingest(update=True)


def test_a_read_only_parent_is_named(run_ingest, tmp_path, monkeypatch):
    # root may write anywhere, so the answer of the system is played
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="is not writable"):
        run_ingest()
    assert not (tmp_path / "s").exists()


@pytest.fixture
def cli(vendor_market, fake_vendors, tmp_path):
    """Run the command on a folder of Tushare files."""
    fake_vendors.write["tushare"](vendor_market, tmp_path / "f")

    def run(*args):
        base = [str(tmp_path / "s"), "--data", str(tmp_path / "f"), "--quiet"]
        return CliRunner().invoke(main, ["ingest", *base, *args])

    return run


def test_the_command_builds_and_says_what_next(cli):
    done = cli("--preset", "tushare")
    assert done.exit_code == 0, done.output
    assert "6 stocks and 1 indices" in done.output and "qlib.init" in done.output
    done = cli("--preset", "tushare", "--update")
    assert done.exit_code == 0 and "is up to date" in done.output


def test_the_command_fails_with_the_report_on_errors(cli, tmp_path):
    file = next((tmp_path / "f" / "daily").glob("*.csv"))
    frame = pd.read_csv(file, dtype={"trade_date": str})
    frame["high"] = 0.01
    frame.to_csv(file, index=False)
    (tmp_path / "r.json").write_text("earlier")
    (tmp_path / "reader").hardlink_to(tmp_path / "r.json")
    done = cli("--preset", "tushare", "--report", str(tmp_path / "r.json"))
    assert done.exit_code == 1 and "OHLC order" in done.output
    assert (tmp_path / "reader").read_text() == "earlier"  # replaced, not overwritten
    assert "Nothing was written" in done.output
    assert "OHLC order" in (tmp_path / "r.json").read_text()


def test_the_command_says_that_the_store_is_intact_when_the_disk_is_full(
    cli, tmp_path, monkeypatch
):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlib_ext.ingest.store._write_bin", full)
    done = cli("--preset", "tushare")
    assert done.exit_code == 1 and "the disk is full" in done.output
    assert "as it was before" in done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"]


@pytest.mark.parametrize(
    "args, message",
    [
        ((), "--preset NAME and --mapping FILE"),
        (("--preset", "tushare", "--file", "daily"), "must be SOURCE=PATH"),
        (("--preset", "nope"), "neither a preset nor a file"),
        (("--show-preset", "nope"), "presets are"),
    ],
)
def test_the_command_explains_wrong_usage(cli, args, message):
    done = cli(*args)
    assert done.exit_code != 0 and message in done.output


def test_presets_can_be_listed_and_shown():
    shown = CliRunner().invoke(main, ["ingest", "--list-presets"]).output
    assert "tushare" in shown and "baostock" in shown
    text = CliRunner().invoke(main, ["ingest", "--show-preset", "baostock"]).output
    assert "tradestatus" in text


def test_shares_set_free_are_no_slip_of_their_unit():
    held = pd.Series([7.0, 67.0, 7.0, 70.0, 7.0]) * 1e7
    assert checks.off_by_powers(held, pd.Series("SZ002563", held.index)).any()
    found = checks.off_by_powers(held, pd.Series("SZ002563", held.index), 1e-3)
    assert found.tolist() == [False, False, False, True, False]
