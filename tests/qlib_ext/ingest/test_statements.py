"""Statements: deadlines, growth by hand, and nothing before it is announced."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_handlers.vendor.mapping import Source, parse_mapping
from qlib_ext.ingest.report import Report
from qlib_ext.ingest.run import ingest
from qlib_ext.ingest.statements import as_announced, statement_table, statutory_day
from qlib_ext.ingest.store import read_bars, read_table


def table(rows):
    columns = ["instrument", "period_end", "announced", "net_profit", "total_assets",
               "total_liabilities", "equity", "long_term_debt"]  # fmt: skip
    frame = pd.DataFrame(rows, columns=columns)
    for name in ("period_end", "announced"):
        frame[name] = pd.to_datetime(frame[name])
    return frame


TABLE = table(
    [
        ("A", "2018-12-31", "2019-04-10", 50.0, 900.0, 300.0, 500.0, 50.0),
        ("A", "2019-12-31", "2020-03-20", 60.0, 1000.0, 400.0, 500.0, 100.0),
        # a correction of 2018 after 2019 was out, and a restated 2019
        ("A", "2018-12-31", "2020-04-15", 40.0, 900.0, 300.0, 500.0, 50.0),
        ("A", "2019-12-31", "2020-06-01", 60.0, 1000.0, 500.0, 500.0, 100.0),
        ("B", "2019-12-31", "2020-03-20", -5.0, 10.0, 20.0, -10.0, 1.0),
    ]
)


def on(day, code="A", rows=TABLE):
    days = pd.Series([pd.Timestamp(day)])
    values = as_announced(rows, days, pd.Series([code]))
    return {k: v.item() for k, v in values.items()}


def test_an_indicator_is_known_from_its_announcement_on():
    assert np.isnan(on("2019-04-09")["debt_to_assets"])
    assert on("2019-04-10")["debt_to_assets"] == pytest.approx(300 / 900)
    assert on("2020-03-19")["debt_to_assets"] == pytest.approx(300 / 900)
    assert on("2020-03-20")["debt_to_assets"] == pytest.approx(0.4)


def test_growth_uses_the_base_as_it_was_known():
    assert np.isnan(on("2019-12-31")["earnings_growth"])  # no 2017
    assert on("2020-03-20")["earnings_growth"] == pytest.approx(0.2)  # 60 on 50
    assert on("2020-04-15")["earnings_growth"] == pytest.approx(0.2)  # old news
    assert on("2020-06-01")["earnings_growth"] == pytest.approx(0.5)  # 60 on 40


def test_book_leverage_is_debt_and_equity_over_equity():
    assert on("2020-05-01")["book_leverage"] == pytest.approx(1.2)
    assert np.isnan(on("2020-05-01", "B")["book_leverage"])  # equity below 0


def test_a_company_that_stopped_reporting_becomes_unknown():
    assert on("2021-12-31")["debt_to_assets"] == pytest.approx(0.5)
    assert np.isnan(on("2022-01-03")["debt_to_assets"])


def test_the_past_does_not_depend_on_later_announcements():
    days = pd.Series(pd.date_range("2019-01-01", "2020-12-31"))
    code = pd.Series("A", index=days.index)
    whole = as_announced(TABLE, days, code)
    for cut in ("2019-04-10", "2020-03-20", "2020-04-15"):
        known = TABLE[TABLE["announced"] <= cut]
        past = days <= cut
        part = as_announced(known, days[past], code[past])
        for name, values in part.items():
            np.testing.assert_equal(values, whole[name][past.to_numpy()])


@pytest.mark.parametrize(
    "period, day",
    [
        ("2019-12-31", "2020-04-30"),
        ("2020-03-31", "2020-04-30"),
        ("2020-06-30", "2020-08-31"),
        ("2020-09-30", "2020-10-31"),
        ("2020-05-31", "2020-09-30"),
    ],
)
def test_deadlines_are_those_of_the_exchanges(period, day):
    got = statutory_day(pd.Series([pd.Timestamp(period)], index=[7]))
    assert got.loc[7] == pd.Timestamp(day)


LONG = {
    "kind": "statements",
    "columns": {"instrument": "i", "period": "p", "item": "k", "value": "v"},
    "items": {"profit(10k)": "net_profit"},
    "item_unit": "ten_thousand_cny",
}


def plan(**more):
    columns = {k: k for k in ("instrument", "date", "open", "high", "low", "close")}
    return {
        "prices": "raw",
        "factor": "one",
        "sources": {
            "daily": {"kind": "bars", "files": "d.parquet", "columns": columns},
            "statements": {**LONG, **more},
        },
    }


def test_long_statements_are_scaled_and_dated_by_the_deadline():
    frame = pd.DataFrame(
        {
            "instrument": "A",
            "period": pd.to_datetime(["2019-12-31", "2019-12-31"]),
            "item": ["profit(10k)", "other"],
            "value": [3.0, 9.0],
        }
    )
    source = parse_mapping(plan(), "toy").of_kind("statements")
    report = Report()
    got = statement_table({"statements": frame}, source, report)
    assert got.to_dict("records") == [
        {
            "instrument": "A",
            "period_end": pd.Timestamp("2019-12-31"),
            "announced": pd.Timestamp("2020-04-30"),
            "net_profit": 30000.0,
        }
    ]
    assert report.findings[0].check == "no announcement dates"


def test_swapped_dates_are_an_error():
    frame = TABLE.rename(columns={"period_end": "announced", "announced": "period"})
    raw = plan(columns={"instrument": "i", "period": "p", "announced": "a",
                        "net_profit": "n"})  # fmt: skip
    for key in ("items", "item_unit"):
        del raw["sources"]["statements"][key]
    report = Report()
    source = parse_mapping(raw, "toy").of_kind("statements")
    statement_table({"statements": frame}, source, report)
    assert "swapped" in report.errors[0].message


@pytest.mark.parametrize(
    "more, message",
    [
        ({"items": {"x": "profit"}}, r"unknown \['profit'\]"),
        ({"item_unit": "yuan"}, "`item_unit`='yuan'"),
        ({"columns": {"instrument": "i", "period": "p", "item": "k"}}, "together"),
        ({"columns": {"instrument": "i", "period": "p"}}, "one column per item"),
    ],
)
def test_bad_statement_mappings_are_named(more, message):
    with pytest.raises(ValueError, match=message):
        parse_mapping(plan(**more), "toy")


def test_statements_go_through_a_build_and_an_update(
    vendor_market, fake_vendors, tmp_path
):
    days = sorted(vendor_market.bars["date"].unique())
    for name, part in (("old", vendor_market.until(days[25])),
                       ("new", vendor_market.since(days[26]))):  # fmt: skip
        fake_vendors.write["tushare"](part, tmp_path / name)
    rows = pd.DataFrame(
        {
            "ts_code": "600519.SH",
            "end_date": ["20180930", "20190930", "20191231"],
            "f_ann_date": ["20181020", f"{days[10]:%Y%m%d}", f"{days[30]:%Y%m%d}"],
            "report_type": 1,
            "revenue": [100.0, 110.0, 200.0],
            "n_income_attr_p": [10.0, 13.0, 20.0],
        }
    )
    (tmp_path / "old" / "income").mkdir()
    rows.iloc[:2].to_csv(tmp_path / "old" / "income" / "a.csv", index=False)
    (tmp_path / "new" / "income").mkdir()
    rows.iloc[2:].to_csv(tmp_path / "new" / "income" / "a.csv", index=False)
    ingest(tmp_path / "s", "tushare", data=tmp_path / "old")
    ingest(tmp_path / "s", "tushare", data=tmp_path / "new", update=True)
    bars = read_bars(tmp_path / "s", ["SH600519"]).set_index("datetime")
    growth = bars["earnings_growth"]
    assert growth[: days[9]].isna().all()
    np.testing.assert_allclose(growth[days[10] : days[29]], 0.3, rtol=1e-6)
    assert growth[days[30] :].isna().all()  # the year before is not known
    assert len(read_table(tmp_path / "s", "statements")) == 3


def test_real_annual_statements_count_from_30_april(real_data, tmp_path):
    bars = pd.read_parquet(real_data / "daily_cn_sh.parquet")
    bars = bars[bars["instrument"].isin(["SH600004", "SH600006"])]
    bars.to_parquet(tmp_path / "d.parquet")
    file = real_data / "fundamentals_annual_cn_sh.parquet"
    ingest(
        tmp_path / "s",
        Path(__file__).parents[3] / "benchmarks" / "presets" / "daily_cn_sh.yaml",
        data=real_data,
        files={"daily": [str(tmp_path / "d.parquet")], "statements": [str(file)]},
    )
    got = read_bars(tmp_path / "s", ["SH600006"]).set_index("datetime")
    raw = pd.read_parquet(file).query("instrument == 'SH600006'")
    raw = raw.assign(year=pd.to_datetime(raw["report_date"]).dt.year)
    item = raw.pivot(index="year", columns="item", values="value")
    profit, debt = item["净利润(万元)"], item["总负债(万元)"] / item["总资产(万元)"]
    for day, year in (("2020-04-29", 2018), ("2020-04-30", 2019)):
        row = got.loc[day]
        growth = (profit[year] - profit[year - 1]) / abs(profit[year - 1])
        assert row["earnings_growth"] == pytest.approx(growth, rel=1e-6)
        assert row["debt_to_assets"] == pytest.approx(debt[year], rel=1e-6)
    assert got.loc["2022-01-04":, "debt_to_assets"].isna().all()


def test_statements_of_another_unit_year_or_period_are_told():
    rows = pd.DataFrame(
        {
            "instrument": "SH600000",
            "period": pd.to_datetime(["2018-12-31", "2019-12-30", "2019-12-31"]),
            "announced": pd.to_datetime(["2019-04-01", "2020-03-30", "2108-04-01"]),
            "equity": [5e8, 5.2e4, 6e8],
        }
    )
    columns = {"instrument": ("c",), "period": ("p",), "equity": ("e",)}
    source = Source("st", "statements", (), columns)
    report = Report(drop_bad_rows=True)
    table = statement_table({"st": rows}, (source,), report)
    assert [f.check for f in report.findings] == [
        *("periods that end within a month", "announced in the future", "unit slip")
    ]
    assert table["equity"].tolist() == [5e8, 5.2e4]


def test_items_of_two_units_are_refused():
    frame = pd.DataFrame(
        {
            "instrument": [f"SH60000{k}" for k in range(10)],
            "period": pd.Timestamp("2023-12-31"),
            "total_assets": 1e6,
            "equity": 5e9,
        }
    )
    columns = {"instrument": ("c",), "period": ("p",), "equity": ("e",)}
    report = Report()
    source = Source("st", "statements", (), columns)
    statement_table({"st": frame}, (source,), report)
    assert "equity is 5e+03 times total_assets" in report.errors[0].message


@pytest.mark.parametrize("drop", [False, True])
def test_infinite_items_are_refused_or_left_out(drop):
    source = Source("st", "statements", (), {"revenue": ("revenue",)})
    frame = pd.DataFrame({
        "instrument": "SH600000",
        "period": pd.to_datetime(["2020-03-31", "2020-06-30"]),
        "announced": pd.to_datetime(["2020-04-20", "2020-08-20"]),
        "revenue": [np.inf, 5.0],
    })  # fmt: skip
    report = Report(drop_bad_rows=drop)
    found = statement_table({"st": frame}, (source,), report)
    assert [(f.level, f.check, f.count) for f in report.findings] == [
        ("warning" if drop else "error", "infinite revenue", 1)
    ]
    if drop:
        assert np.isnan(found["revenue"][0]) and found["revenue"][1] == 5.0
