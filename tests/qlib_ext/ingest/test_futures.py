"""Continuous futures: rolls by hand, by contract and by open interest."""

import numpy as np
import pandas as pd
import pytest

from data_handlers.vendor.mapping import parse_mapping
from qlib_ext.ingest.run import ingest
from qlib_ext.ingest.store import read_bars

DAYS = pd.bdate_range("2024-02-05", periods=60)


def mapping(contract=False, **options):
    columns = {c: c for c in ("date", "open", "high", "low", "close", "volume")}
    columns |= {"instrument": "code", "open_interest": "oi", "amount": "amount"}
    if contract:
        columns["contract"] = "month"
    source = {"kind": "futures", "files": ["*.parquet"], "columns": columns, **options}
    source.setdefault("multiplier", {"CFFEX.T": 10000})
    return {
        "prices": "raw",
        "factor": "preclose",
        "codes": "futures",
        "sources": {"daily": source},
    }


def bars(close, oi, days=DAYS, code="T", **more):
    close = np.asarray(close, float)
    frame = pd.DataFrame(
        {
            "code": code,
            "date": days[: len(close)],
            "open": close - 0.1,
            "high": close + 0.2,
            "low": close - 0.3,
            "close": close,
            "volume": 50.0,
            "oi": np.asarray(oi, float),
            **more,
        }
    )
    return frame.assign(amount=frame["volume"] * frame["close"] * 10000)


def store(tmp_path, frame, plan, name="s", **options):
    folder = tmp_path / f"{name}_raw"
    folder.mkdir(exist_ok=True)
    frame.to_parquet(folder / "d.parquet")
    result = ingest(
        tmp_path / name, parse_mapping(plan, "test"), data=folder, **options
    )
    fields = ["open", "close", "factor", "volume", "amount", "open_interest"]
    held = read_bars(tmp_path / name, ["CFFEX.T"], fields).set_index("datetime")
    return held, result


def findings(result, check):
    return [f for f in result.report.findings if f.check == check]


class TestContracts:
    def test_the_larger_at_the_close_before_counts_and_the_roll_is_exact(
        self, tmp_path
    ):
        """T2403 at 100, 101, 102, 101; T2406 one below, then 100.5, 101.5.

        T2406's open interest is larger at the close of day 1, so it counts from day 2.
        """
        old = bars([100, 101, 102, 101], [90, 40, 30, 20], month="T2403")
        new = bars([99, 100.5, 101, 101.5], [10, 60, 70, 90], month="T2406")
        held, result = store(tmp_path, pd.concat([old, new]), mapping(True))
        raw = held["close"] / held["factor"]
        assert raw.tolist() == pytest.approx([101, 101, 101.5], abs=1e-4)
        step = held["close"].pct_change().tolist()[1:]
        assert step == pytest.approx([101 / 100.5 - 1, 101.5 / 101 - 1], abs=1e-6)
        assert held["factor"].tolist() == pytest.approx([1, *[101 / 100.5] * 2])
        (note,) = findings(result, "rolls")
        assert note.level == "note" and "1 roll(s) adjusted by the new contract's" in (
            note.message
        )
        # volume times multiplier: amount / volume is a price
        mean = (held["amount"] / (held["volume"] * held["factor"])).to_numpy()
        assert mean == pytest.approx(raw.to_numpy(), rel=1e-6)

    def test_it_never_goes_back(self, tmp_path):
        old = bars([100] * 5, [90, 40, 95, 95, 95], month="2403")
        new = bars([99] * 5, [10, 60, 60, 60, 60], month="2406")
        held, _ = store(tmp_path, pd.concat([old, new]), mapping(True))
        raw = held["close"] / held["factor"]
        assert raw.tolist() == pytest.approx([100, 99, 99, 99], abs=1e-4)
        assert held["close"].tolist() == pytest.approx([100] * 4, abs=1e-4)

    def test_a_day_without_the_contract_that_counts_is_named(self, tmp_path):
        old = bars([100, 101, 102, 103], [90, 90, 90, 90], month="T2403").drop(2)
        new = bars([99, 99, 99, 99], [10, 10, 10, 10], month="T2406")
        held, result = store(tmp_path, pd.concat([old, new]), mapping(True))
        (warning,) = findings(result, "days without the main contract")
        assert warning.count == 1
        assert warning.examples[0]["date"] == f"{DAYS[2]:%Y-%m-%d}"
        assert held["close"].dropna().tolist() == pytest.approx([101, 103])

    def test_one_named_contract_a_day_leaves_the_night_out(self, tmp_path):
        frame = bars([100, 101, 99, 99.5], [50, 40, 60, 70])
        frame["month"] = ["T2403", "T2403", "T2406", "T2406"]
        held, result = store(tmp_path, frame, mapping(True))
        # the roll's day earns its own open to close: 99 / 98.9 - 1
        step = held["close"].pct_change().tolist()[1:]
        assert step == pytest.approx([0.01, 99 / 98.9 - 1, 99.5 / 99 - 1], abs=1e-6)
        assert "1 by its open" in findings(result, "rolls")[0].message

    def test_bad_contracts_are_named(self, tmp_path):
        frame = bars([100, 101, 99], [50, 40, 60])
        back = frame.assign(month=["T2406", "T2403", "T2406"])
        with pytest.raises(ValueError, match="goes back to an earlier contract"):
            store(tmp_path, back, mapping(True))
        with pytest.raises(ValueError, match="names no delivery month"):
            store(tmp_path, frame.assign(month="main"), mapping(True))
        with pytest.raises(ValueError, match="no contract on"):
            store(tmp_path, frame.assign(month=["T2403", None, None]), mapping(True))


class TestUnnamed:
    def frame(self):
        close = 100 + np.arange(60) * 0.01
        close[30:] -= 2.0  # another contract trades two below
        oi = np.full(60, 1000.0)
        oi[30:] = 1500.0
        return bars(close, oi)

    def test_a_roll_is_found_and_its_gap_is_no_return(self, tmp_path):
        held, result = store(tmp_path, self.frame(), mapping())
        assert findings(result, "rolls")[0].count == 1
        change = held["close"].pct_change().to_numpy()[1:]
        assert np.abs(change).max() < 0.002  # 2 % without the adjustment
        assert held["factor"].round(4).nunique() == 2

    def test_days_without_open_interest_are_named(self, tmp_path):
        frame = self.frame()
        frame.loc[29, "oi"], frame.loc[50, "oi"] = np.nan, 0  # the roll is day 30
        held, result = store(tmp_path, frame, mapping())
        (warning,) = findings(result, "no open interest")
        assert warning.count == 1 and not findings(result, "rolls")
        assert held["factor"].nunique() == 1  # a rise from 0 is none

    def test_a_month_without_rows_is_told(self, tmp_path):
        frame = self.frame().drop(index=range(10, 28))
        _, result = store(tmp_path, frame, mapping())
        (warning,) = findings(result, "days are missing")
        assert warning.count == 1
        assert warning.examples[0]["date"] == f"{DAYS[28]:%Y-%m-%d}"

    def test_cutting_the_end_off_changes_nothing_before(self, tmp_path):
        whole, _ = store(tmp_path, self.frame(), mapping())
        for cut in (31, 45):
            part, _ = store(tmp_path, self.frame().iloc[:cut], mapping(), f"s{cut}")
            pd.testing.assert_frame_equal(whole.iloc[:cut], part)

    def test_a_jump_outside_the_rule_is_warned_of(self, tmp_path):
        rules = {"rolls": {"months": [9], "rise": 0.3, "apart": 40}}
        held, result = store(tmp_path, self.frame(), mapping(**rules))
        (warning,) = findings(result, "open interest jumps")
        assert warning.level == "warning" and warning.count == 1
        assert held["factor"].nunique() == 1

    def test_one_contract_given_twice_a_day_is_an_error(self, tmp_path):
        from qlib_ext.ingest.report import IngestError

        frame = pd.concat([self.frame(), self.frame().iloc[[5]].assign(close=100.2)])
        with pytest.raises(IngestError):
            store(tmp_path, frame, mapping())

    def test_an_update_goes_on_and_a_short_one_is_refused(self, tmp_path):
        whole, _ = store(tmp_path, self.frame(), mapping())
        store(tmp_path, self.frame().iloc[:45], mapping(), "u")
        with pytest.raises(ValueError, match="too few"):
            store(tmp_path, self.frame().iloc[40:], mapping(), "u", update=True)
        held, _ = store(tmp_path, self.frame(), mapping(), "u", update=True)
        pd.testing.assert_frame_equal(whole, held)


def test_days_without_minutes_are_counted(tmp_path):
    from qlib_ext.aggregates import build_store

    store(tmp_path, bars(100 + np.arange(6) * 0.01, [1000] * 6), mapping())
    clock = [*range(585, 691, 15), *range(795, 916, 15)]  # ends of 15 minutes
    whole = [d for k, d in enumerate(DAYS[:5]) if k != 2]
    when = [d + pd.Timedelta(minutes=m) for d in whole for m in clock]
    minute = bars([100.0] * len(when), [1000.0] * len(when), pd.DatetimeIndex(when))
    minute.drop(columns="amount").to_parquet(tmp_path / "m.parquet")
    names = ("open", "high", "low", "close", "volume")
    plan = mapping(multiplier={"CFFEX.T": 10000})
    plan |= {"session": "cffex_bonds"}
    plan["sources"]["minute"] = {
        "kind": "minute",
        "columns": {"instrument": "code", "datetime": "date", **{c: c for c in names}},
        "stamp": "end",
        "bar_minutes": 15,
    }
    made = tmp_path / "m.parquet", tmp_path / "s"
    text = build_store("bars", *made, mapping=plan, progress=False)
    day = f"{DAYS[2]:%Y-%m-%d}"
    assert "traded days of the store without bars" in text
    assert f"count as the mean): CFFEX.T {day}" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": "asis"}, "codes: futures"),
        ({"factor": "one"}, "factor: preclose"),
    ],
)
def test_mapping_of_futures_is_checked(change, words):
    with pytest.raises(ValueError, match=words):
        parse_mapping({**mapping(), **change}, "test")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"multiplier": {"T": 10000}}, "multiplier"),
        ({"multiplier": {"CFFEX.TS": 20000}}, "`multiplier` lacks"),
        ({"products": ["CFFEX.TL"]}, "not in its files"),
        ({"rolls": {"rise": -1}}, "`rolls` must be"),
    ],
)
def test_options_of_futures_are_checked(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        store(tmp_path, bars([100, 101], [5, 5]), mapping(**options))
