"""Files of convertible bonds to a store: fields by hand, refusals by name."""

import numpy as np
import pandas as pd
import pytest
import yaml

from data_handlers.vendor.mapping import parse_mapping
from qlib_ext.ingest.report import IngestError
from qlib_ext.ingest.run import ingest
from qlib_ext.ingest.store import read_bars, read_instruments, read_table

DAYS = pd.bdate_range("2020-03-02", periods=6)
MAPPING = {
    "prices": "raw",
    "factor": "one",
    "sources": {
        "daily": {
            "kind": "bonds",
            "files": "daily.csv",
            "columns": {
                "instrument": "code",
                "date": "day",
                "close": "close",
                "stock_close": "share",
                "volume": "lots",
                "amount": "money",
                "remain_size": "left",
                "rating": "rating",
            },
            "units": {
                "volume": "bond_lots",
                "amount": "ten_thousand_cny",
                "remain_size": "hundred_million_cny",
            },
        },
        "floor": {
            "kind": "bond_fields",
            "files": "floor.csv",
            "columns": {"instrument": "code", "date": "day", "bond_floor": "floor"},
            "max_age": 3,
        },
        "steps": {
            "kind": "bond_conversion",
            "files": "steps.csv",
            "columns": {"instrument": "code", "date": "from", "conv_price": "price"},
        },
        "terms": {
            "kind": "bond_terms",
            "files": "terms.csv",
            "columns": {
                "instrument": "code",
                "stock": "stock",
                "listed": "listed",
                "conversion_ends": "ends",
                "matures": "matures",
                "coupons": "coupons",
                "redemption": "pays",
            },
        },
        "events": {
            "kind": "bond_events",
            "files": "events.csv",
            "columns": {"instrument": "code", "announced": "on", "event": "what"},
            "events": {"call": "call", "lower": "revision"},
        },
    },
}


def tables():
    """Two bonds; the first is revised and called, the second pays a bonus share."""
    share = [8.0, 8.4, 8.4, 9.0, 9.0, 9.9, 20.0, 20.0, 10.0, 10.5, 10.5, 10.5]
    close = [105, 106, 125, 126, 130, 131, 101, 102, 103, 103, 103, 104]
    daily = pd.DataFrame(
        {
            "code": ["110001"] * 6 + ["123001"] * 6,
            "day": [f"{d:%Y%m%d}" for d in [*DAYS, *DAYS]],
            "close": close,
            "share": share,
            "lots": 100,
            "money": 10.6,
            "left": 5.0,
            "rating": ["AA"] * 6 + ["AAA"] * 6,
        }
    )
    day = [f"{d:%Y-%m-%d}" for d in DAYS]
    return {
        "daily": daily,
        "floor": pd.DataFrame(
            {"code": ["110001", "123001"], "day": day[0], "floor": [90.0, 95.0]}
        ),
        "steps": pd.DataFrame(
            {
                "code": ["110001", "110001", "123001", "123001"],
                "from": ["2019-01-02", day[2], "2019-06-03", day[2]],
                "price": [10.0, 7.0, 20.0, 10.0],
            }
        ),
        "terms": pd.DataFrame(
            {
                "code": ["110001", "123001"],
                "stock": ["600001.SH", "300001"],
                "listed": ["2019-03-04", ""],
                "ends": ["", day[5]],
                "matures": ["2021-03-02", "2024-03-02"],
                "coupons": ["20190302-20200302,票面利率:1%;20200303-20210302:2%"] * 2,
                "pays": [110.0, 110.0],
            }
        ),
        "events": pd.DataFrame(
            {
                "code": ["110001", "110001"],
                "on": ["2020-02-10", day[4]],
                "what": ["lower", "call"],
            }
        ),
    }


def made(folder, change=None, mapping=MAPPING, **kwargs):
    found = tables()
    if change is not None:
        change(found)
    folder.mkdir(exist_ok=True)
    for name, frame in found.items():
        frame.to_csv(folder / f"{name}.csv", index=False)
    (folder / "mine.yaml").write_text(yaml.safe_dump(mapping, allow_unicode=True))
    return ingest(
        folder / "store", folder / "mine.yaml", data=folder, overwrite=True, **kwargs
    )


def bars_of(result, code):
    bars = read_bars(result.root, [code])
    return bars.set_index("datetime").drop(columns="instrument")


def test_fields_by_hand(tmp_path):
    result = made(tmp_path / "a")
    one = bars_of(result, "SH110001")
    assert one["conv_price"].tolist() == [10, 10, 7, 7, 7, 7]
    np.testing.assert_allclose(
        one["conv_value"], [80, 84, 120, 9 / 0.07, 9 / 0.07, 9.9 / 0.07], rtol=1e-6
    )
    assert one["conv_premium"].iloc[0] == pytest.approx(105 / 80 - 1, rel=1e-5)
    # three days old at most
    assert one["bond_floor"].notna().tolist() == [True] * 4 + [False] * 2
    assert one["floor_premium"].iloc[0] == pytest.approx(105 / 90 - 1, rel=1e-5)
    # the revision is no return of the share
    want = [np.nan, 0.05, 0.0, 9 / 8.4 - 1, 0.0, 0.1]
    np.testing.assert_allclose(one["stock_return"], want, atol=1e-6)
    assert one["call_state"].tolist() == [0, 0, 0, 0, 1, 1]
    assert one["days_listed"].iloc[0] == 364
    assert one["years_to_maturity"].iloc[0] == pytest.approx(1.0)
    # the first coupon is paid on the first day: only 110 is to come
    assert one["ytm"].iloc[0] == pytest.approx(110 / 105 - 1, abs=1e-5)
    assert one[["volume", "amount", "remain_size", "factor"]].iloc[0].tolist() == (
        pytest.approx([1000, 106_000, 5e8, 1])
    )
    assert one["rating"].iloc[0] == 19
    two = bars_of(result, "SZ123001")
    # the bonus share halves both: no return
    np.testing.assert_allclose(
        two["stock_return"], [np.nan, 0, 0, 0.05, 0, 0], atol=1e-6
    )
    assert two["days_listed"].iloc[0] == 0
    pool = read_instruments(result.root, "equity_biased")
    assert pool["instrument"].unique().tolist() == ["SH110001"]
    steps = read_table(result.root, "conversion_prices")
    assert steps["conv_price"].tolist() == [10, 7, 20, 10]


def test_a_later_call_changes_nothing_before_it(tmp_path):
    def earlier(found):
        found["events"].loc[1, "on"] = f"{DAYS[3]:%Y-%m-%d}"

    base = bars_of(made(tmp_path / "a"), "SH110001")
    other = bars_of(made(tmp_path / "b", earlier), "SH110001")
    pd.testing.assert_frame_equal(base[: DAYS[2]], other[: DAYS[2]])
    assert other["call_state"].tolist() == [0, 0, 0, 1, 1, 1]


def lose_share(found):
    found["terms"].loc[1, "stock"] = None


def still_quoted(found):
    found["terms"].loc[1, "ends"] = f"{DAYS[3]:%Y-%m-%d}"


def called_long_ago(found):
    found["events"].loc[1, "on"] = "2019-03-04"


def no_revision(found):
    found["events"] = found["events"].assign(
        what=["lower", "call"], code=["123001", "110001"]
    )


def not_yet_listed(found):
    found["terms"].loc[1, "listed"] = f"{DAYS[2]:%Y-%m-%d}"


def lots_for_bonds(found):
    found["daily"].loc[:1, "lots"] = 10


def a_price_of_nothing(found):
    found["daily"].loc[7, "close"] = 0


@pytest.mark.parametrize(
    ("change", "check", "count"),
    [
        (lose_share, "bond without share", 6),
        (not_yet_listed, "quoted before its listing", 2),
        (lots_for_bonds, "unit slip", 2),
        (a_price_of_nothing, "non-positive prices", 1),
        (still_quoted, "called bond still quoted", 2),
        (called_long_ago, "called bond still quoted", 6),
        (no_revision, "conversion price without event", 1),
    ],
)
def test_bad_input_is_refused_or_counted(tmp_path, change, check, count):
    with pytest.raises(IngestError, match=check):
        made(tmp_path / "a", change)
    assert not (tmp_path / "a" / "store").exists()
    result = made(tmp_path / "a", change, drop_bad_rows=True)
    (finding,) = [f for f in result.report.findings if f.check == check]
    assert (finding.level, finding.count) == ("warning", count)
    assert result.summary["rows"] == 12 - count
    if check == "conversion price without event":
        assert made(tmp_path / "a", change, accept=[check]).summary["rows"] == 12


def test_terms_that_disagree_are_refused_or_lose_the_bond(tmp_path):
    def twice(found):
        terms = found["terms"]
        found["terms"] = pd.concat([terms, terms.iloc[[1]].assign(stock="300002")])
        # a third bond, so that they are not most of the table
        other = terms.iloc[[0, 0, 0]].assign(code=["110003", "110004", "110005"])
        found["terms"] = pd.concat([found["terms"], other])

    with pytest.raises(IngestError, match="two terms of a bond"):
        made(tmp_path / "a", twice)
    result = made(tmp_path / "a", twice, drop_bad_rows=True)
    left = {f.check: f.count for f in result.report.findings}
    assert (left["two terms of a bond"], left["bond without share"]) == (2, 6)
    assert read_instruments(result.root)["instrument"].unique().tolist() == ["SH110001"]


@pytest.mark.parametrize(("word", "level"), [("lower", "note"), ("x", "warning")])
def test_announcements_of_unknown_words_are_counted(tmp_path, word, level):
    def change(found):
        found["events"]["what"] = [word, "redeemed"]

    accept = [] if word == "lower" else ["conversion price without event"]
    result = made(tmp_path / "a", change, accept=accept)
    (note,) = [f for f in result.report.findings if f.check == "other announcements"]
    assert note.level == level and "redeemed (1)" in note.message
    assert bars_of(result, "SH110001").get("call_state", pd.Series([0])).max() == 0


def test_a_conversion_price_of_nothing_is_not_known(tmp_path):
    def change(found):
        found["steps"].loc[1, "price"] = 0

    result = made(tmp_path / "a", change)
    (found,) = [f for f in result.report.findings if f.check.startswith("conv_price")]
    assert found.count == 4
    one = bars_of(result, "SH110001")
    assert one["conv_value"].notna().tolist() == [True] * 2 + [False] * 4


def test_values_of_another_unit_or_bond_are_told(tmp_path):
    def of_others(found):
        found["daily"].loc[4, "close"] = 530
        found["daily"].loc[7, "close"] = 65

    result = made(tmp_path / "a", of_others)
    told = {f.check: f.count for f in result.report.findings if f.level == "warning"}
    assert told["price jumps"] == 2 and told["price below conversion value"] == 1

    def in_units(found):
        found["daily"]["left"] = 5e-8

    with pytest.raises(IngestError, match="remaining sizes have a median of 5 CNY"):
        made(tmp_path / "b", in_units)


@pytest.mark.parametrize(
    ("table", "rows", "column", "by", "match"),
    [
        ("daily", slice(2, 2), "close", 100, "close is a power of ten off"),
        (
            "floor",
            slice(0, 0),
            "floor",
            100,
            r"bond_floor of 1 bond\(s\)",
        ),
        ("daily", slice(None), "share", 100, "give a conversion price of"),
        ("terms", slice(1, 1), "pays", 0.01, "redemption is .* below 90"),
    ],
)
def test_bonds_in_another_unit_are_refused(tmp_path, table, rows, column, by, match):
    def change(found):
        if column == "share":  # told by a conversion value of the vendor's own
            found["daily"]["worth"] = 100.0
        values = found[table][column].astype(float)
        values.loc[rows] *= by
        found[table][column] = values
        if column == "close":
            found["daily"]["money"] = found["daily"]["close"] / 10

    mapping = yaml.safe_load(yaml.safe_dump(MAPPING))
    if column == "share":
        mapping["sources"]["daily"]["columns"]["conv_value"] = "worth"
    with pytest.raises(IngestError, match=match):
        made(tmp_path / "a", change, mapping)


def test_what_conversion_leaves_and_terms_of_zero_are_no_other_unit(tmp_path):
    def change(found):
        # nearly all is converted in a day, to about a hundredth of what was left
        found["daily"].loc[4:5, "left"] = [0.0521, 0.0498]
        found["terms"]["size"] = [0, 500_000_000]
        found["terms"].loc[1, "pays"] = 0

    mapping = yaml.safe_load(yaml.safe_dump(MAPPING))
    mapping["sources"]["terms"]["columns"]["issue_size"] = "size"
    result = made(tmp_path / "a", change, mapping)
    assert not [f for f in result.report.findings if f.check == "unit slip" and f.count]
    left = bars_of(result, "SH110001")["remain_size"]
    assert left.iloc[-1] == pytest.approx(4.98e6, rel=1e-6)

    def in_other_rows(found):
        found["daily"].loc[4:5, "left"] = 0.05

    with pytest.raises(IngestError, match="remain_size is a power of ten off"):
        made(tmp_path / "b", in_other_rows)


def test_zeros_of_a_bond_are_a_day_without_trade(tmp_path):
    def change(found):
        found["daily"].loc[2, ["close", "lots", "money"]] = 0

    one = bars_of(made(tmp_path / "a", change), "SH110001")
    assert one["close"].notna().tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("role", ["conv_price", "remain_size", "rating"])
def test_the_latest_value_is_no_history(role):
    mapping = yaml.safe_load(yaml.safe_dump(MAPPING))
    mapping["sources"]["terms"]["columns"][role] = "latest"
    with pytest.raises(ValueError, match=rf"`columns.{role}`.*look ahead.*dated rows"):
        parse_mapping(mapping, "mine")


def test_updates_are_refused(tmp_path):
    result = made(tmp_path / "a")
    with pytest.raises(ValueError, match="--overwrite"):
        ingest(result.root, tmp_path / "a" / "mine.yaml", update=True)


@pytest.mark.parametrize("words", [None, {"call": "redeemed"}])
def test_events_need_known_words(words):
    mapping = yaml.safe_load(yaml.safe_dump(MAPPING))
    mapping["sources"]["events"]["events"] = words
    with pytest.raises(ValueError, match="`events` must map"):
        parse_mapping(mapping, "mine")


def test_preset_of_tushare_reads_its_layout(tmp_path):
    day = [f"{d:%Y%m%d}" for d in DAYS]
    files = {
        "cb_daily": {
            "ts_code": "113527.SH", "trade_date": day, "open": 104.0, "high": 106.0,
            "low": 103.0, "close": 105.0, "vol": 200.0, "amount": 21.0,
            "bond_value": 90.0, "cb_value": [99, 100, 101, 102, 103, 104],
        },
        "cb_basic": {
            "ts_code": ["113527.SH"], "stk_code": "603098.SH", "list_date": "20190222",
            "maturity_date": "20250124", "conv_price": 5.0, "remain_size": 1e6,
            "rate_clause": "20190124-20200123:0.5%;20200124-20250123:2%",
            "issue_rating": "AA-", "maturity_put_price": 110.0,
        },
        "cb_call": {
            "ts_code": ["113527.SH"] * 3, "ann_date": [day[1], day[2], day[3]],
            "is_call": ["公告不强赎", "已满足强赎条件", "公告实施强赎"],
        },
        "daily": {
            "ts_code": "603098.SH", "trade_date": day,
            "close": [9.9, 10.0, 10.1, 10.2, 10.3, 10.4],
        },
        "cb_price_chg": {
            "ts_code": ["113527.SH"], "change_date": "20190222",
            "convertprice_aft": 10.0,
        },
    }  # fmt: skip
    for name, columns in files.items():
        pd.DataFrame(columns).to_csv(tmp_path / f"{name}.csv", index=False)
    result = ingest(tmp_path / "store", "tushare_cb", data=tmp_path)
    bars = bars_of(result, "SH113527")
    assert bars["call_state"].tolist() == [0, 0, 0, 1, 1, 1]
    assert bars["volume"].iloc[0] == 2000 and bars["amount"].iloc[0] == 210_000
    np.testing.assert_allclose(bars["stock_return"].iloc[1], 10 / 9.9 - 1, rtol=1e-5)
    assert bars["rating"].iloc[0] == 18 and "remain_size" not in bars
    assert 0.0 < bars["ytm"].iloc[0] < 0.03


def test_preset_of_akshare_reads_its_layout(tmp_path):
    folder = tmp_path / "bond_zh_hs_cov_daily"
    folder.mkdir()
    day = [f"{d:%Y-%m-%d}" for d in DAYS]
    bar = dict.fromkeys(("open", "high", "low", "close"), 105.0)
    pd.DataFrame({"date": day, **bar, "volume": 500}).to_csv(
        folder / "sz128039.csv", index=False
    )
    folder = tmp_path / "bond_zh_cov_value_analysis"
    folder.mkdir()
    pd.DataFrame({"日期": day, "纯债价值": 90.0, "转股价值": 80.0}).to_csv(
        folder / "128039.csv", index=False
    )
    pd.DataFrame(
        {"债券代码": ["128039"], "正股代码": "002923", "转股价": 1.0, "信用评级": "AA"}
    ).to_csv(tmp_path / "bond_zh_cov.csv", index=False)
    result = ingest(tmp_path / "store", "akshare_cb", data=tmp_path)
    bars = bars_of(result, "SZ128039")
    assert bars["conv_premium"].iloc[0] == pytest.approx(105 / 80 - 1, rel=1e-5)
    assert "conv_price" not in bars or bars["conv_price"].isna().all()
    assert list(result.summary["markets"]) == ["balanced"]
