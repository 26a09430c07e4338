"""Fund holdings: lawful days, share classes, errors, and an update."""

import pandas as pd
import pytest
import yaml

from data_handlers.vendor.mapping import parse_mapping
from qlib_ext.ingest.holdings import (
    deadline,
    holding_table,
    merge_holdings,
    name_stem,
)
from qlib_ext.ingest.report import Report
from qlib_ext.ingest.run import ingest
from qlib_ext.ingest.store import read_table

CALENDAR = pd.bdate_range("2020-01-02", "2022-12-30")
COLUMNS = {"fund": "f", "name": "n", "instrument": "i", "period": "p", "weight": "w"}


def plan(**more):
    columns = {k: k for k in ("instrument", "date", "open", "high", "low", "close")}
    funds = {"kind": "holdings", "columns": COLUMNS, "scope": "top_ten",
             "units": {"weight": "percent"}} | more  # fmt: skip
    return {
        "prices": "raw",
        "factor": "one",
        "sources": {
            "daily": {"kind": "bars", "files": "d.parquet", "columns": columns},
            "funds": funds,
        },
    }


def frame(**more):
    rows = {
        "fund": ["1", "1", "2", "2"],
        "name": ["Growth A", "Growth A", "Growth C", "Growth C"],
        "instrument": ["SH600000", "SH600004"] * 2,
        "period": pd.Timestamp("2021-06-30"),
        "weight": [0.06, 0.05, 0.06, 0.05],
    }
    return pd.DataFrame(rows | more)


def table(rows, **more):
    report = Report()
    source = parse_mapping(plan(**more), "toy").of_kind("holdings")
    return holding_table({"funds": rows}, source, CALENDAR, report), report


@pytest.mark.parametrize(
    "period, scope, day",
    [
        ("2021-06-30", "full", "2021-08-29"),  # 60 days
        ("2021-12-31", "full", "2022-03-31"),  # 90 days
        ("2021-06-30", "top_ten", "2021-07-21"),  # 15 trading days
        ("2021-09-30", "full", "2021-10-21"),  # no full table then
        ("2022-12-31", "top_ten", "2023-01-31"),  # beyond the calendar: 22 weekdays
    ],
)
def test_a_report_is_known_on_its_lawful_day(period, scope, day):
    got = deadline(pd.Series([pd.Timestamp(period)]), scope, CALENDAR)
    assert got.item() == pd.Timestamp(day)


def test_names_of_classes_have_one_stem():
    names = [
        "华夏聚利债券A",
        "华夏聚利债券 - C",
        "华夏聚利债券(A/B)",
        "华夏聚利债券C类",
    ]
    assert set(name_stem(pd.Series(names))) == {"华夏聚利债券"}
    kept = pd.Series(["沪深300ETF", "添富创业板LOF", "Growth"])
    assert list(name_stem(kept)) == list(kept)


def test_classes_are_one_fund_that_counts_from_the_lawful_day():
    got, report = table(frame())
    assert got["fund"].tolist() == ["1", "1"]
    assert (got["announced"] == "2021-07-21").all()
    assert {f.check for f in report.findings} == {
        "no announcement dates", "share classes", "holdings",
    }  # fmt: skip
    assert "11% of net assets" in report.findings[-1].message  # partial, and said


def test_funds_without_a_name_are_not_one():
    got, _ = table(frame(name=[None] * 4))
    assert got["fund"].unique().tolist() == ["1", "2"]


def test_a_report_date_taken_for_an_announcement_is_an_error():
    _, report = table(
        frame(announced=pd.Timestamp("2021-06-30")),
        columns={**COLUMNS, "announced": "p"},
    )
    assert report.errors[0].check == "announced before the period ends"


@pytest.mark.parametrize(
    "more, message",
    [
        ({"columns": {k: v for k, v in COLUMNS.items() if k != "period"}}, "period"),
        ({"scope": None}, "`scope` must say"),
        ({"scope": "half"}, "`scope` must say"),
    ],
)
def test_mappings_without_dates_or_scope_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        parse_mapping(plan(**more), "toy")


def test_positions_without_a_period_are_an_error():
    _, report = table(frame(period=[pd.NaT, *[pd.Timestamp("2021-06-30")] * 3]))
    (error,) = report.errors
    assert (error.check, error.count) == ("holdings without dates", 1)


def test_percent_read_as_fractions_is_an_error():
    _, report = table(frame(weight=[6.0, 5.0, 6.0, 5.0]))
    assert "percent" in report.errors[0].message


def test_fractions_given_as_percent_are_refused():
    _, report = table(frame(weight=[0.0006, 0.0005] * 2))
    assert "under 1 % of its net assets" in report.errors[0].message


def test_reports_of_odd_days_and_sizes_are_told():
    day = pd.Timestamp("2199-01-01")
    odd = frame(weight=[0.9, 0.9, 0.06, 0.05], announced=day)
    odd["period"] = [pd.Timestamp("2021-06-30")] * 2 + [pd.Timestamp("2021-06-15")] * 2
    _, report = table(odd, columns=COLUMNS | {"announced": "announced"}, units={})
    checks = [f.check for f in report.findings if f.level != "note"]
    assert checks == [
        *("announced in the future", "announced late"),
        *("periods that end within a month", "more than net assets"),
    ]
    assert report.errors[0].examples[0]["sum"] == 1.8


def test_an_update_adds_reports_and_refuses_late_ones():
    old, _ = table(frame())
    repeated = old.assign(announced=old["announced"] + pd.Timedelta("9D"))
    new = old.assign(period_end=pd.Timestamp("2021-12-31"),
                     announced=pd.Timestamp("2022-01-24"))  # fmt: skip
    report, end = Report(), pd.Timestamp("2021-12-01")
    both = merge_holdings(pd.concat([repeated, new]), old, end, report)
    assert len(both) == 4 and not report.errors
    pd.testing.assert_frame_equal(both[:2], old)
    merge_holdings(new, old, pd.Timestamp("2022-02-01"), report)
    assert report.errors[0].check == "late holdings"


def test_holdings_go_into_the_store(tmp_path):
    days = pd.bdate_range("2021-06-01", "2021-08-31")
    prices = dict.fromkeys(("open", "high", "low", "close"), 10.0)
    bars = pd.DataFrame({"instrument": "600000.SH", "date": days, **prices})
    bars.to_parquet(tmp_path / "d.parquet")
    funds = pd.DataFrame({"f": ["000001"], "n": ["x"], "i": ["600000.SH"],
                          "p": ["2021-06-30"], "w": [6.0]})  # fmt: skip
    funds.to_csv(tmp_path / "funds.csv", index=False)
    mapping = tmp_path / "toy.yaml"
    mapping.write_text(yaml.safe_dump(plan(files="funds.csv")))
    ingest(tmp_path / "s", mapping, data=tmp_path)
    (row,) = read_table(tmp_path / "s", "holdings").to_dict("records")
    assert row["fund"] == "000001" and row["instrument"] == "SH600000"
    assert row["weight"] == pytest.approx(0.06)
    assert row["announced"] == pd.Timestamp("2021-07-21")
