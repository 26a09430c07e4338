"""The store writer: Qlib reads back what went in, and a half store never shows."""

import os

import numpy as np
import pandas as pd
import pytest

from data_handlers.files import store_lock
from qlib_ext.ingest import store
from qlib_ext.ingest.store import (
    read_bars,
    read_calendar,
    read_instruments,
    read_meta,
    write_store,
)


def toy_bars():
    """Two stocks and one index over four days; SZ000002 is suspended on day 2."""
    days = pd.to_datetime(["2020-01-02", "2020-01-03", "2020-01-06", "2020-01-07"])
    rows = [(d, "SH600001", 10.0 + i, 0.5) for i, d in enumerate(days)]
    rows += [(days[i], "SZ000002", 20.0 + i, np.nan) for i in (1, 3)]
    rows += [(d, "SH000300", 4000.0 + i, np.nan) for i, d in enumerate(days)]
    return pd.DataFrame(rows, columns=["datetime", "instrument", "close", "turnover"])


def test_write_store_writes_the_bin_layout_of_qlib(tmp_path):
    write_store(tmp_path / "s", toy_bars(), index_codes=["SH000300"])
    features = tmp_path / "s" / "features"
    data = np.fromfile(features / "sz000002" / "close.day.bin", dtype="<f4")
    np.testing.assert_array_equal(data, [1, 21, np.nan, 23])
    assert not (features / "sh000300" / "turnover.day.bin").exists()
    text = (tmp_path / "s" / "instruments" / "all.txt").read_text()
    assert text == (
        "SH600001\t2020-01-02\t2020-01-07\nSZ000002\t2020-01-03\t2020-01-07\n"
    )
    future = (tmp_path / "s" / "calendars" / "day_future.txt").read_text().split()
    assert future[:5] == [
        "2020-01-02", "2020-01-03", "2020-01-06", "2020-01-07", "2020-01-08",
    ]  # fmt: skip
    assert len(future) == 4 + 30
    meta = read_meta(tmp_path / "s")
    assert meta["fields"] == ["close", "turnover"]
    assert (meta["instruments"], meta["days"], meta["rows"]) == (2, 4, 10)
    assert meta["indices"] == {"SH000300": ["close"]}


def test_read_bars_returns_what_was_written(tmp_path):
    bars = toy_bars()
    write_store(tmp_path / "s", bars.sample(frac=1, random_state=0))
    back = read_bars(tmp_path / "s", ["SH600001", "SZ000002", "SH000300", "SH999999"])
    merged = bars.merge(back, on=["datetime", "instrument"], suffixes=("", "_b"))
    assert len(merged) == len(bars) == len(back)
    np.testing.assert_array_equal(merged["close"], merged["close_b"])


def test_write_store_replaces_an_existing_store_and_keeps_it_a_directory(tmp_path):
    root = tmp_path / "s"
    write_store(root, toy_bars(), tables={"old": toy_bars()})
    write_store(root, toy_bars().query("datetime > '2020-01-03'"))
    assert root.is_dir() and not root.is_symlink()
    assert len(read_calendar(root)) == 2
    assert not (root / "tables" / "old.parquet").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_write_store_through_a_link_swaps_its_target(tmp_path):
    root = tmp_path / "link"
    (tmp_path / "real").mkdir()
    root.symlink_to("real")
    write_store(root, toy_bars())
    write_store(root, toy_bars().query("datetime > '2020-01-03'"))
    assert root.is_symlink() and len(read_calendar(tmp_path / "real")) == 2


def test_an_error_while_writing_leaves_the_old_store(tmp_path, monkeypatch):
    root = tmp_path / "s"
    write_store(root, toy_bars())

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write_bin", full)
    with pytest.raises(ValueError, match=r"disk is full.*as it was before"):
        write_store(root, toy_bars().query("datetime > '2020-01-03'"))
    assert len(read_calendar(root)) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_without_an_exchange_call_renames_do_and_recover(tmp_path, monkeypatch):
    root = tmp_path / "s"
    write_store(root, toy_bars())
    monkeypatch.setattr(store, "_exchange", lambda a, b: False)
    write_store(root, toy_bars().query("datetime > '2020-01-03'"))
    assert len(read_calendar(root)) == 2
    os.rename(root, tmp_path / ".s.old")  # the state a kill between renames leaves
    assert read_meta(root)["days"] == 2
    assert root.is_dir()


def test_a_second_writer_is_told_that_the_store_is_busy(tmp_path):
    with store_lock(tmp_path / "s"):
        with pytest.raises(store.StoreBusyError, match="another process"):
            write_store(tmp_path / "s", toy_bars())
    write_store(tmp_path / "s", toy_bars())


def test_markets_may_have_several_spans(tmp_path):
    spans = pd.DataFrame(
        {
            "instrument": ["SH600001", "SH600001"],
            "start": ["2020-01-06", "2020-01-02"],
            "end": ["2020-01-07", "2020-01-02"],
        }
    )
    write_store(tmp_path / "s", toy_bars(), markets={"large": spans})
    back = read_instruments(tmp_path / "s", "large")
    assert list(back["start"].dt.day) == [2, 6]
    assert read_meta(tmp_path / "s")["markets"] == ["all", "large"]
    with pytest.raises(ValueError, match="'small' is not in"):
        read_instruments(tmp_path / "s", "small")


BAD_BARS = {
    "no rows": (lambda b: b.iloc[:0], "no rows"),
    "no instrument": (lambda b: b.drop(columns="instrument"), "lacks column"),
    "no field": (lambda b: b[["datetime", "instrument"]], "no field"),
    "text dates": (lambda b: b.assign(datetime=b.datetime.astype(str)), "dtype object"),
    "intraday": (
        lambda b: b.assign(datetime=b.datetime + pd.Timedelta("9h")),
        "time of day",
    ),
    "text field": (lambda b: b.assign(close="x"), "'close' has dtype object"),
    "infinite": (lambda b: b.assign(close=np.inf), "'close' has infinite"),
    "duplicate": (lambda b: pd.concat([b, b.iloc[:1]]), "SH600001 2020-01-02"),
    "field name": (lambda b: b.rename(columns={"close": "$close"}), r"\$close"),
    "path in code": (lambda b: b.assign(instrument="../x"), "directory name"),
    "missing code": (lambda b: b.assign(instrument=None), "without an instrument"),
}


@pytest.mark.parametrize("case", BAD_BARS)
def test_write_store_names_the_unusable_input(tmp_path, case):
    change, message = BAD_BARS[case]
    with pytest.raises(ValueError, match=message):
        write_store(tmp_path / "s", change(toy_bars()))
    assert not any(tmp_path.iterdir())


def test_write_store_names_the_unusable_option(tmp_path):
    root, bars = tmp_path / "s", toy_bars()
    with pytest.raises(ValueError, match="not in `calendar`"):
        write_store(root, bars, calendar=["2020-01-02"])
    with pytest.raises(ValueError, match="no rows in `bars`"):
        write_store(root, bars, index_codes=["SH000905"])
    with pytest.raises(ValueError, match="written by the store"):
        write_store(root, bars, meta={"fields": []})
    span = pd.DataFrame(
        {"instrument": ["SH600001"], "start": ["2020-02-01"], "end": ["2020-01-01"]}
    )
    with pytest.raises(ValueError, match="start is after the end"):
        write_store(root, bars, markets={"large": span})
    assert not root.exists()


def test_write_store_leaves_a_foreign_directory_alone(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    (root / "cat.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="left alone"):
        write_store(root, toy_bars())
    assert (root / "cat.jpg").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 6, np.float32([np.nan, 1]).tobytes(), b"\0" * 400]
)
def test_a_damaged_bin_is_named(tmp_path, content):
    root = tmp_path / "s"
    write_store(root, toy_bars())
    (root / "features" / "sh600001" / "close.day.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"close\.day\.bin is damaged"):
        read_bars(root, ["SH600001"])


def test_qlib_reads_the_store(tmp_path, eval_in_qlib):
    write_store(tmp_path / "s", toy_bars(), index_codes=["SH000300"])
    text = "D.features(D.instruments('all'), ['$close', '$turnover'])"
    frame = eval_in_qlib(tmp_path, {"it": (tmp_path / "s", text)})["it"]
    assert frame.loc[("SZ000002", pd.Timestamp("2020-01-07")), "$close"] == 23
    assert np.isnan(frame.loc[("SZ000002", pd.Timestamp("2020-01-06")), "$close"])
    assert frame.index.get_level_values(0).nunique() == 2
