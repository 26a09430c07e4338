"""Bars of a day side by side: values worked by hand, and every day that is refused."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from data_handlers.aggregate.build import build
from data_handlers.aggregate.schema import CFFEX_BONDS
from data_handlers.aggregate.windows import bar_features, day_windows

CLOCK = [
    *pd.date_range("2024-03-04 09:45", "2024-03-04 11:30", freq="15min"),
    *pd.date_range("2024-03-04 13:15", "2024-03-04 15:15", freq="15min"),
]


def bars(instrument="CFFEX.T", days=1, price=100.0):
    """17 bars of 15 minutes a day; bar k closes at price + (k + 1) hundredths."""
    rows = []
    for day in range(days):
        for k, time in enumerate(CLOCK):
            close = price + 0.01 * (k + 1)
            rows.append(
                {
                    "instrument": instrument,
                    "datetime": time + pd.Timedelta(days=day),
                    "open": close - 0.01,
                    "high": close + 0.02,
                    "low": close - 0.03,
                    "close": close,
                    "volume": 10.0 * (k + 1),
                    "open_interest": 1000.0 + k,
                }
            )
    return pd.DataFrame(rows)


def windows(frame, minutes=15):
    table = pa.Table.from_pandas(frame, preserve_index=False)
    return day_windows(table, CFFEX_BONDS, minutes, "end")


class TestValues:
    def test_a_day_by_hand(self):
        found = windows(bars())
        names = [f.name for f in bar_features(17)]
        row = dict(zip(names, found.values[0], strict=True))
        assert len(row) == 51 and names[0] == "bar_00_return"
        assert row["bar_00_return"] == pytest.approx(np.log(100.01 / 100.00))
        assert row["bar_16_return"] == pytest.approx(np.log(100.17 / 100.16))
        assert row["bar_08_range"] == pytest.approx(np.log(100.11 / 100.06))
        assert row["bar_00_volume"] == pytest.approx(10 / 90 - 1)  # mean of 10..170
        assert found.close[0] == pytest.approx(100.17)
        assert found.volume[0] == 1530

    @pytest.mark.parametrize("length", [5, 1])
    def test_shorter_bars_merge(self, length):
        long, n = bars(), 15 // length
        short = long.iloc[np.repeat(np.arange(17), n)].reset_index(drop=True)
        minutes = np.tile(np.arange(length - 15, 1, length), 17)
        short["datetime"] += pd.to_timedelta(minutes, unit="min")
        short["open_interest"] = 1000.0
        short.loc[minutes < 0, "close"] = short["open"]
        short["volume"] /= n
        one, merged = windows(long), windows(short)
        np.testing.assert_allclose(merged.values, one.values, atol=1e-12)

    def test_order_of_rows_does_not_matter_and_an_empty_bar_is_no_move(self):
        frame = bars()
        frame.loc[5, "volume"], frame["open_interest"] = 0.0, 1000.0
        shuffled = frame.sample(frac=1, random_state=0)
        found = windows(shuffled)
        np.testing.assert_array_equal(found.values, windows(frame).values)
        row = found.values[0].reshape(17, 3)
        assert row[5].tolist() == [0.0, 0.0, -1.0]
        assert row[6, 0] == pytest.approx(np.log(100.07 / 100.05))


class TestRefused:
    def test_no_day_at_all_is_an_empty_result(self):
        assert windows(bars().iloc[:5]).values.shape == (0, 51)

    @pytest.mark.parametrize(
        ("reason", "spoil"),
        [
            ("bars are missing", lambda f: f.drop(index=[3, 4])),
            (
                "two rows of one bar disagree",
                lambda f: pd.concat([f, f.iloc[[7]].assign(close=100.07)]),
            ),
            (
                "two contracts in one day",
                lambda f: f.assign(contract=["T2403"] * 9 + ["T2406"] * 25),
            ),
            (
                "two contracts in one day: open interest moves beyond the volume",
                lambda f: f.assign(
                    open_interest=f["open_interest"] + 5000 * (f.index == 9)
                ),
            ),
        ],
    )
    def test_a_day_is_left_out_by_name(self, reason, spoil):
        found = windows(spoil(bars(days=2)))
        assert found.left_out == {reason: ["CFFEX.T 2024-03-04"]}
        assert len(found.day) == 1
        assert found.rejected["of days that are left out"] > 0
        np.testing.assert_allclose(found.values, windows(bars()).values)

    def test_bad_rows_are_counted_by_reason(self):
        frame = bars(days=2)
        night = frame.iloc[[0]].assign(datetime=pd.Timestamp("2024-03-04 20:00"))
        frame = pd.concat([frame, frame.iloc[[2]], night], ignore_index=True)
        frame.loc[4, "high"] = 1.0
        found = windows(frame)
        assert found.rejected == {
            "outside the session": 1,
            "open, close, high and low disagree": 1,
            "the same row again (one kept)": 1,
        }
        assert len(found.day) == 2  # one bar of seventeen may be missing

    def test_start_stamps_are_not_end_stamps(self):
        table = pa.Table.from_pandas(bars(days=3), preserve_index=False)
        with pytest.raises(ValueError, match="contradicts the bars"):
            day_windows(table, CFFEX_BONDS, 15, "start")

    def test_a_day_does_not_change_when_later_ones_are_cut_off_or_altered(self):
        long = bars(days=3)
        late = long["datetime"] >= "2024-03-05"
        long.loc[late, ["open", "high", "low", "close"]] *= 1.1
        np.testing.assert_array_equal(
            windows(long).values[0], windows(bars(days=1)).values[0]
        )


def test_build_writes_years_and_its_account(tmp_path):
    frame = bars(days=4)
    frame["instrument"] = "T"
    frame = frame.drop(index=[20, 21, 22])
    (tmp_path / "raw").mkdir()
    frame.to_parquet(tmp_path / "raw" / "t.parquet")
    names = [c for c in frame if c not in ("instrument", "datetime")]
    mapping = {
        "codes": "futures",
        "session": "cffex_bonds",
        "sources": {
            "minute": {
                "kind": "minute",
                "columns": {
                    "instrument": "instrument",
                    "datetime": "datetime",
                    **{name: name for name in names},
                },
                "stamp": "end",
                "bar_minutes": 15,
                "multiplier": {"CFFEX.T": 10000},
            }
        },
    }
    report = build("bars", tmp_path / "raw", tmp_path, mapping, progress=False)
    assert report.notes == {"days left out: bars are missing": ["CFFEX.T 2024-03-05"]}
    stored = pd.read_parquet(tmp_path / "bars" / "2024.parquet")
    assert stored["instrument"].unique().tolist() == ["CFFEX.T"]
    assert stored.shape == (3, 2 + 51)
    assert stored["bar_00_return"].iloc[0] == pytest.approx(
        np.log(100.01 / 100), rel=1e-5
    )
    again = build("bars", tmp_path / "raw", tmp_path, mapping, progress=False)
    assert again.reused == again.partitions == 1
