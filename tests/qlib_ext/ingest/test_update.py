"""Updates: equal to a rebuild, refuse revisions, survive kills and full disks."""

import errno
import hashlib
import os
import shutil
import textwrap
import threading

import numpy as np
import pandas as pd
import pytest

from data_handlers.aggregate.build import build
from data_handlers.files import BusyError
from qlib_ext.ingest import store as store_module
from qlib_ext.ingest.report import IngestError
from qlib_ext.ingest.run import ingest
from qlib_ext.ingest.store import (
    read_bars,
    read_calendar,
    read_instruments,
    read_meta,
    write_store,
)

NOT_COMPARED = ("ingest_report.json", "ingest_report.md", "meta.json")


def tree(root, skip=NOT_COMPARED):
    """Digest of every file below a store."""
    return {
        str(p.relative_to(root)): hashlib.sha1(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.name not in skip
    }


def same_bins(a, b, rtol, atol=1e-7):
    """Compare all bins of two stores."""
    files = {p.relative_to(a) for p in a.rglob("*.bin")}
    assert files == {p.relative_to(b) for p in b.rglob("*.bin")}
    for file in sorted(files):
        one, two = np.fromfile(a / file, "<f4"), np.fromfile(b / file, "<f4")
        np.testing.assert_allclose(one, two, rtol=rtol, atol=atol, err_msg=str(file))


def made_until(fake_vendors, market, day, folder):
    """A store of the vendor's days up to one."""
    fake_vendors.write["baostock"](market.until(day), folder / "old")
    ingest(folder / "s", "baostock", data=folder / "old")
    return folder / "s"


def day_of(market, i):
    return pd.Timestamp(sorted(market.bars["date"].unique())[i])


def test_an_index_may_begin_after_the_store(fake_vendors, vendor_market, tmp_path):
    whole, day = vendor_market, day_of(vendor_market, 30)
    index = whole.index[whole.index["date"] > day_of(whole, 35)]
    for folder, update in (("f", False), ("g", True)):
        bars = whole.bars if update else whole.until(day).bars
        market = type(whole)(bars, index, whole.members, whole.industry)
        fake_vendors.write["tushare"](market, tmp_path / folder)
        ingest(tmp_path / "s", "tushare", data=tmp_path / folder, update=update)
    assert read_bars(tmp_path / "s", ["SH000300"])["datetime"].min() > day


@pytest.fixture(scope="module")
def deliveries(tmp_path_factory):
    """What was written or ingested once, by a key."""
    known = {}

    def get(key, make):
        if key not in known:
            known[key] = tmp_path_factory.mktemp("deliveries")
            make(known[key])
        return known[key]

    return get


@pytest.fixture
def split(vendor_market, fake_vendors, deliveries, tmp_path):
    """Write a vendor's files before and from a day; return the folders."""

    def make(preset, cut=25, start=None):
        start = cut + 1 if start is None else start

        def write(folder):
            market, to = vendor_market, fake_vendors.write[preset]
            to(market, folder / "all")
            to(market.until(day_of(market, cut)), folder / "old")
            to(market.since(day_of(market, start)), folder / "new")

        folder = deliveries((preset, cut, start), write)
        for name in ("all", "old", "new"):
            (tmp_path / name).symlink_to(folder / name)
        return tmp_path / "all", tmp_path / "old", tmp_path / "new"

    return make


@pytest.fixture
def ingested(deliveries, tmp_path):
    """Function that gives the store of a vendor's files, for this test alone."""

    def copy(data, preset="baostock"):
        def make(folder):
            ingest(folder / "s", preset, data=data)

        made = deliveries(os.path.realpath(data), make)
        shutil.copytree(made / "s", tmp_path / "s")

    return copy


# Every vendor, and every way in which a delivery meets the store.
ONCE = [("tushare", 0), ("baostock", 20), ("akshare", 26)]


@pytest.mark.parametrize(
    ("preset", "start"),
    [
        pytest.param(p, s, marks=[] if (p, s) in ONCE else pytest.mark.slow)
        for p in ("tushare", "baostock", "akshare")
        for s in (26, 20, 0)
    ],
)
def test_update_equals_a_rebuild(split, tmp_path, preset, start):
    everything, old, new = split(preset, start=start)
    ingest(tmp_path / "whole", preset, data=everything)
    ingest(tmp_path / "s", preset, data=old)
    if preset == "akshare":  # factor steps are one whole file per stock
        files = {"factor": [str(everything / "factor")]}
        result = ingest(tmp_path / "s", preset, data=new, files=files, update=True)
    else:
        result = ingest(tmp_path / "s", preset, data=new, update=True)
    assert result.summary["new_days"] == 14 and result.written
    same_bins(tmp_path / "whole", tmp_path / "s", rtol=2e-7)
    for name in (
        "calendars/day.txt",
        "calendars/day_future.txt",
        "instruments/all.txt",
    ):
        assert (tmp_path / "whole" / name).read_text() == (
            tmp_path / "s" / name
        ).read_text()
    meta, whole = read_meta(tmp_path / "s"), read_meta(tmp_path / "whole")
    assert {
        k: meta[k] for k in ("end", "days", "instruments", "fields", "markets")
    } == {k: whole[k] for k in ("end", "days", "instruments", "fields", "markets")}


def test_update_adds_new_listings(fake_vendors, tmp_path):
    market = fake_vendors.build_market()
    old = market.until(day_of(market, 9))
    assert "SH600000" not in set(old.bars["instrument"])  # listed on day 10
    fake_vendors.write["tushare"](old, tmp_path / "old")
    fake_vendors.write["tushare"](market.since(day_of(market, 10)), tmp_path / "new")
    ingest(tmp_path / "s", "tushare", data=tmp_path / "old")
    result = ingest(tmp_path / "s", "tushare", data=tmp_path / "new", update=True)
    assert result.summary["new_stocks"] == 1 and result.summary["stocks"] == 6
    spans = read_instruments(tmp_path / "s").set_index("instrument")
    assert spans.loc["SH600000", "start"] == day_of(market, 10)
    assert (spans["end"] == day_of(market, 39)).all()


def test_update_writes_no_old_day_anew(split, ingested, tmp_path):
    _, old, new = split("baostock")
    ingested(old)
    before = read_bars(tmp_path / "s", ["SH600519", "SZ000001"])
    ingest(tmp_path / "s", "baostock", data=new, update=True)
    after = read_bars(tmp_path / "s", ["SH600519", "SZ000001"])
    kept = after[after["datetime"] <= before["datetime"].max()].reset_index(drop=True)
    pd.testing.assert_frame_equal(before, kept)


def test_update_twice_finds_nothing_new(split, ingested, tmp_path):
    _, old, new = split("baostock")
    ingested(old)
    ingest(tmp_path / "s", "baostock", data=new, update=True)
    before = tree(tmp_path / "s", ())
    result = ingest(tmp_path / "s", "baostock", data=new, update=True)
    assert not result.written and result.summary["new_days"] == 0
    assert tree(tmp_path / "s", ()) == before


def test_update_is_refused_while_a_build_runs_in_the_store(
    split, ingested, tmp_path, monkeypatch
):
    """The update swaps the store, so what the build writes meanwhile would be lost."""
    _, old, new = split("baostock")
    store = tmp_path / "s"
    ingested(old)
    before = read_calendar(store)
    refused = []

    def update_meanwhile(*args, **kwargs):
        with pytest.raises(BusyError, match="being written"):
            ingest(store, "baostock", data=new, update=True)
        refused.append(True)
        raise ValueError("stopped here")

    monkeypatch.setattr("data_handlers.aggregate.build.plan", update_meanwhile)
    with pytest.raises(ValueError, match="stopped here"):
        build("ms", tmp_path, store, progress=False)
    assert refused and read_calendar(store).equals(before)
    assert ingest(store, "baostock", data=new, update=True).written


def test_update_dry_run_changes_nothing(split, ingested, tmp_path):
    _, old, new = split("baostock")
    ingested(old)
    before = tree(tmp_path / "s", ())
    result = ingest(tmp_path / "s", "baostock", data=new, update=True, dry_run=True)
    assert result.summary["new_days"] == 14 and not result.written
    assert tree(tmp_path / "s", ()) == before


def revised(market, column, factor):
    """The market with one value of SZ000001 on day 22 revised."""
    bars = market.bars.copy()
    row = (bars["instrument"] == "SZ000001") & (bars["date"] == day_of(market, 22))
    bars.loc[row, column] *= factor
    return type(market)(bars, market.index, market.members, market.industry)


@pytest.mark.parametrize(
    "column, field", [("volume", "volume"), ("amount", "amount"), ("high", "high")]
)
def test_update_refuses_an_overlap_that_disagrees(
    vendor_market, fake_vendors, tmp_path, column, field
):
    write = fake_vendors.write["baostock"]
    write(vendor_market.until(day_of(vendor_market, 25)), tmp_path / "old")
    write(
        revised(vendor_market, column, 1.001).since(day_of(vendor_market, 20)),
        tmp_path / "new",
    )
    ingest(tmp_path / "s", "baostock", data=tmp_path / "old")
    before = tree(tmp_path / "s", ())
    with pytest.raises(IngestError) as caught:
        ingest(tmp_path / "s", "baostock", data=tmp_path / "new", update=True)
    found = [f for f in caught.value.report.errors if "overlap" in f.check]
    example = next(e for e in found[0].examples if e["field"] == field)
    assert example["instrument"] == "SZ000001"
    assert example["date"] == f"{day_of(vendor_market, 22):%Y-%m-%d}"
    assert example["new"] / example["store"] == pytest.approx(1.001, rel=1e-4)
    assert tree(tmp_path / "s", ()) == before


def test_update_refuses_days_inside_the_past_that_the_store_lacks(
    vendor_market, fake_vendors, tmp_path
):
    hole = vendor_market.bars["date"] != day_of(vendor_market, 22)
    old = vendor_market.until(day_of(vendor_market, 25))
    old.bars = old.bars[hole.reindex(old.bars.index)]
    fake_vendors.write["baostock"](old, tmp_path / "old")
    fake_vendors.write["baostock"](
        vendor_market.since(day_of(vendor_market, 20)), tmp_path / "new"
    )
    ingest(tmp_path / "s", "baostock", data=tmp_path / "old")
    with pytest.raises(IngestError, match="off the calendar"):
        ingest(tmp_path / "s", "baostock", data=tmp_path / "new", update=True)


@pytest.mark.parametrize("preset", ["tushare", "baostock"])
def test_update_refuses_a_forgotten_week(split, tmp_path, preset):
    # Tushare shows it by index days without stocks or by its previous closes
    _, old, new = split(preset, cut=25, start=31)
    ingest(tmp_path / "s", preset, data=old)
    before = tree(tmp_path / "s", ())
    with pytest.raises(IngestError, match="days are missing between"):
        ingest(tmp_path / "s", preset, data=new, update=True)
    assert tree(tmp_path / "s", ()) == before


def test_update_takes_a_day_with_many_ex_dates(fake_vendors, tmp_path):
    market = fake_vendors.build_market(days=20)
    bars = market.bars.copy()
    last = bars["date"] == day_of(market, 19)
    ex = last & bars["instrument"].isin(["SH600519", "SZ000001"])
    bars.loc[ex, "preclose"] = (bars.loc[ex, "preclose"] / 1.2).round(2)
    for column in ("open", "high", "low", "close", "amount"):
        bars.loc[ex, column] = (bars.loc[ex, column] / 1.2).round(2)
    market = type(market)(bars, market.index, market.members, market.industry)
    fake_vendors.write["baostock"](market.until(day_of(market, 18)), tmp_path / "old")
    fake_vendors.write["baostock"](market.since(day_of(market, 19)), tmp_path / "new")
    ingest(tmp_path / "s", "baostock", data=tmp_path / "old")
    ingest(tmp_path / "s", "baostock", data=tmp_path / "new", update=True)
    bars = read_bars(tmp_path / "s", ["SZ000001"])
    assert bars["factor"].iloc[-1] / bars["factor"].iloc[-2] == pytest.approx(
        1.2, rel=1e-3
    )


def test_update_refuses_a_revised_factor(fake_vendors, tmp_path):
    market = fake_vendors.build_market(days=30)
    bars = market.bars.copy()
    cut = day_of(market, 25)
    late = (bars["date"] > cut) & (bars["instrument"] == "SZ000001")
    bars.loc[late, "factor"] *= 18.83
    revised = type(market)(bars, market.index, market.members, market.industry)
    fake_vendors.write["tushare"](market.until(cut), tmp_path / "old")
    fake_vendors.write["tushare"](revised.since(day_of(market, 26)), tmp_path / "new")
    ingest(tmp_path / "s", "tushare", data=tmp_path / "old")
    before = tree(tmp_path / "s", ())
    with pytest.raises(IngestError, match="revised since the last update") as caught:
        ingest(tmp_path / "s", "tushare", data=tmp_path / "new", update=True)
    (error,) = caught.value.report.errors
    assert error.check == "factor revised"
    assert error.examples[0]["instrument"] == "SZ000001"
    assert error.examples[0]["change_by_factor"] > 17
    assert tree(tmp_path / "s", ()) == before
    ingest(tmp_path / "s", "tushare", data=tmp_path / "new", update=True,
           drop_bad_rows=True)  # fmt: skip
    held = read_bars(tmp_path / "s", ["SZ000001", "SZ002415"], ["close"]).dropna()
    last = held.groupby("instrument")["datetime"].max()
    assert last["SZ000001"] == cut < last["SZ002415"] == day_of(market, 29)


def test_update_refuses_a_delivery_of_part_of_the_market(fake_vendors, tmp_path):
    stocks = [f"SH6000{i:02d}" for i in range(12)]
    market = fake_vendors.build_market(days=30, stocks=stocks)
    fake_vendors.write["baostock"](market.until(day_of(market, 15)), tmp_path / "old")
    new = market.since(day_of(market, 16))
    new.bars = new.bars[new.bars["instrument"] < "SH600004"]
    fake_vendors.write["baostock"](new, tmp_path / "new")
    ingest(tmp_path / "s", "baostock", data=tmp_path / "old")
    with pytest.raises(IngestError, match="complete the download"):
        ingest(tmp_path / "s", "baostock", data=tmp_path / "new", update=True)


def test_update_refuses_days_that_end_at_a_code(fake_vendors, tmp_path):
    stocks = [f"SH6000{i:02d}" for i in range(60)]
    market = fake_vendors.build_market(days=20, stocks=stocks)
    store = made_until(fake_vendors, market, day_of(market, 15), tmp_path)
    for name, gone, refused in (
        ("tail", stocks[-6:], True),
        ("head", stocks[:6], True),
        ("spread", stocks[4:60:10], False),
    ):
        new = market.since(day_of(market, 16))
        last = new.bars["date"] == new.bars["date"].max()
        new.bars = new.bars[~(last & new.bars["instrument"].isin(gone))]
        fake_vendors.write["baostock"](new, tmp_path / name)
        update = dict(data=tmp_path / name, update=True, dry_run=True)
        if not refused:
            assert ingest(store, "baostock", **update)
            continue
        with pytest.raises(IngestError, match="none from one code on"):
            ingest(store, "baostock", **update)


def test_update_refuses_two_stocks_that_change_places(fake_vendors, tmp_path):
    stocks = [f"SH6000{i:02d}" for i in range(12)]
    market = fake_vendors.build_market(days=20, stocks=stocks)
    write = fake_vendors.write["akshare"]  # which has no previous closes
    write(market, tmp_path / "all")
    write(market.until(day_of(market, 15)), tmp_path / "old")
    store, factor = tmp_path / "s", {"factor": [str(tmp_path / "all/factor")]}
    ingest(store, "akshare", data=tmp_path / "old")
    new = market.since(day_of(market, 16))
    first = new.bars[new.bars["date"] == new.bars["date"].min()]
    by = first.set_index("instrument")["close"].sort_values()
    swap = {by.index[0]: by.index[-1], by.index[-1]: by.index[0]}
    new.bars = new.bars.assign(instrument=new.bars["instrument"].replace(swap))
    write(new, tmp_path / "new")
    with pytest.raises(IngestError) as refused:
        ingest(store, "akshare", data=tmp_path / "new", files=factor, update=True)
    told = [f.message for f in refused.value.report.findings if f.level == "error"]
    assert any("change places" in message for message in told)


def test_update_with_another_mapping_is_refused(split, ingested, tmp_path):
    _, old, new = split("baostock")
    ingested(old)
    with pytest.raises(ValueError, match="made with the mapping 'baostock'"):
        ingest(tmp_path / "s", "akshare_adjusted", data=new, update=True,
               files={"daily": [str(new / "daily")]})  # fmt: skip


def test_a_rebased_vendor_needs_a_shared_day_and_is_brought_to_our_anchor(
    vendor_market, tmp_path
):
    mapping = tmp_path / "mine.yaml"
    mapping.write_text(
        textwrap.dedent("""
        prices: raw
        factor: column
        factor_history: rebased
        sources:
          daily:
            kind: bars
            files: "*.parquet"
            columns: {instrument: instrument, date: date, open: open, high: high,
                      low: low, close: close, volume: volume, factor: factor}
        """)
    )

    def deliver(name, part):
        # a forward-adjusting vendor: the factor is 1 on the last day of a delivery
        bars = part.traded
        last = bars.groupby("instrument")["factor"].transform("last")
        (tmp_path / name).mkdir()
        bars.assign(factor=(bars["factor"] / last).round(6)).to_parquet(
            tmp_path / name / "x.parquet"
        )
        return tmp_path / name

    cut = day_of(vendor_market, 25)
    whole = ingest(tmp_path / "whole", mapping, data=deliver("all", vendor_market))
    ingest(tmp_path / "s", mapping, data=deliver("old", vendor_market.until(cut)))
    with pytest.raises(ValueError, match="must repeat that day"):
        late = deliver("late", vendor_market.since(cut + pd.Timedelta("1d")))
        ingest(tmp_path / "s", mapping, data=late, update=True)
    ingest(tmp_path / "s", mapping, data=tmp_path / "all", update=True)
    assert whole.summary["days"] == read_meta(tmp_path / "s")["days"]
    same_bins(tmp_path / "whole", tmp_path / "s", rtol=1e-5, atol=2e-6)


def test_re_anchored_adjusted_prices_are_brought_to_the_store_base(
    vendor_market, tmp_path
):
    def deliver(name, part, base):
        bars = part.traded
        bars = bars[bars["instrument"] == "SZ000001"].copy()
        for column in ("open", "high", "low", "close"):
            bars[column] = (bars[column] * bars["factor"] / base).round(4)
        bars["date"] = bars["date"].dt.strftime("%Y-%m-%d")
        bars = bars.rename(columns={"instrument": "代码"})
        (tmp_path / name).mkdir()
        bars.to_csv(tmp_path / name / "daily.csv", index=False)
        return bars

    cut = day_of(vendor_market, 25)
    deliver("old", vendor_market.until(cut), 1.0)
    new = deliver("new", vendor_market.since(day_of(vendor_market, 20)), 1.25)
    mapping = tmp_path / "mine.yaml"
    mapping.write_text(
        textwrap.dedent("""
        prices: adjusted
        factor: one
        factor_history: rebased
        sources:
          daily:
            kind: bars
            files: "daily.csv"
            columns: {instrument: 代码, date: date, open: open, high: high, low: low,
                      close: close, volume: volume, amount: amount}
        """),
        encoding="utf-8",
    )
    ingest(tmp_path / "s", mapping, data=tmp_path / "old")
    ingest(tmp_path / "s", mapping, data=tmp_path / "new", update=True)
    bars = read_bars(tmp_path / "s", ["SZ000001"])
    true = vendor_market.traded.query("instrument == 'SZ000001'")
    np.testing.assert_allclose(bars["close"], true["close"] * true["factor"], rtol=1e-4)
    assert len(new) == 20 and (bars["factor"] == 1).all()
    # a real revision is still refused
    late = pd.read_csv(tmp_path / "new" / "daily.csv")
    late.loc[2, "high"] *= 1.01
    late.to_csv(tmp_path / "new" / "daily.csv", index=False)
    with pytest.raises(IngestError, match="overlap with the store"):
        ingest(tmp_path / "s", mapping, data=tmp_path / "new", update=True)


def test_update_of_a_store_with_a_truncated_bin_names_it(split, ingested, tmp_path):
    _, old, new = split("baostock")
    ingested(old)
    file = tmp_path / "s" / "features" / "sz000001" / "close.day.bin"
    os.truncate(file, file.stat().st_size - 3)
    before = tree(tmp_path / "s", ())
    with pytest.raises(ValueError, match=r"close\.day\.bin is damaged"):
        ingest(tmp_path / "s", "baostock", data=new, update=True)
    assert tree(tmp_path / "s", ()) == before


def test_a_full_disk_ends_with_an_error_and_an_intact_store(
    split, ingested, tmp_path, monkeypatch
):
    _, old, new = split("baostock")
    ingested(old)
    before = tree(tmp_path / "s", ())
    write, count = store_module._write_bin, []

    def fills_up(*args):
        count.append(1)
        if len(count) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    monkeypatch.setattr(store_module, "_write_bin", fills_up)
    with pytest.raises(ValueError, match=r"disk is full.*as it was before"):
        ingest(tmp_path / "s", "baostock", data=new, update=True)
    assert tree(tmp_path / "s", ()) == before
    assert not list(tmp_path.glob(".s.*"))
    monkeypatch.setattr(store_module, "_write_bin", write)
    assert ingest(tmp_path / "s", "baostock", data=new, update=True).written


def test_two_updates_at_once_do_not_both_append(split, ingested, tmp_path, monkeypatch):
    _, old, new = split("baostock")
    ingested(old)
    from qlib_ext.ingest import update as update_module

    real = update_module.extend_store

    def slow(*args, **kwargs):
        # another process finishes first, between our reading and our writing
        monkeypatch.setattr(update_module, "extend_store", real)
        ingest(tmp_path / "s", "baostock", data=new, update=True)
        real(*args, **kwargs)

    monkeypatch.setattr(update_module, "extend_store", slow)
    with pytest.raises(ValueError, match="another process has updated it"):
        ingest(tmp_path / "s", "baostock", data=new, update=True)
    assert len(read_calendar(tmp_path / "s")) == 40


def test_readers_see_the_old_or_the_new_store_and_never_a_gap(tmp_path):
    root, errors, stop = tmp_path / "s", [], threading.Event()
    versions = []
    for days in (5, 9):
        when = pd.bdate_range("2020-01-01", periods=days)
        frame = pd.DataFrame(
            {"datetime": when, "instrument": "SH600000", "close": float(days)}
        )
        versions.append(frame)
    write_store(root, versions[0])

    def read():
        while not stop.is_set():
            try:
                data = np.fromfile(root / "features/sh600000/close.day.bin", "<f4")
                assert len(data) - 1 == data[1] and (data[1:] == data[1]).all()
                assert len(read_calendar(root)) in (5, 9)
            except Exception as error:
                errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(30):
        write_store(root, versions[i % 2])
    stop.set()
    reader.join()
    assert not errors


KILLER = """
import hashlib, os, random, shutil, signal, sys, threading, time
from pathlib import Path
import pandas as pd
from tqdm import tqdm
from qlib_ext.ingest.run import ingest
from qlib_ext.ingest.store import extend_store, write_store

# tqdm's lock is shared by forked processes: a child killed while it holds it would
# leave it locked for all later ones. A lock of its own dies with the child.
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())
work, kind, points, timed = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5])
WRITES = {"os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate",
          "ctypes.call_function", "shutil.rmtree"}
days = pd.bdate_range("2020-01-01", periods=9)
bars = pd.DataFrame([(d, c, 1.0, 2.0) for d in days for c in ("SH600000", "SZ000001")],
                    columns=["datetime", "instrument", "close", "volume"])

def tree(root):
    return {str(p.relative_to(root)): hashlib.sha1(p.read_bytes()).hexdigest()
            for p in sorted(root.rglob("*")) if p.is_file()}

def change(root):
    if kind in ("baostock", "tushare"):
        ingest(root, kind, data=work / "new", update=True)
    elif kind == "extend":
        extend_store(root, bars[bars["datetime"] > days[5]], expected_end=days[5])
    else:
        write_store(root, bars)

def child(root, kill_at=None, count_file=None):
    # fork: the imports are paid once; returns the child's process id
    pid = os.fork()
    if pid:
        return pid
    seen = [0]
    def hook(event, args):
        writing = event == "open" and isinstance(args[1], str) and "w" in args[1]
        if event in WRITES or writing:
            seen[0] += 1
            if seen[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    try:
        change(root)
    except ValueError as error:  # extended already
        assert "has updated it" in str(error), error
    if count_file:
        Path(count_file).write_text(str(seen[0]))
    os._exit(0)

def fresh():
    shutil.rmtree(work / "t", ignore_errors=True)
    (work / "t").mkdir()
    shutil.copytree(work / "s", work / "t" / "s")
    return work / "t" / "s"

if kind in ("extend", "write"):
    write_store(work / "s", bars[bars["datetime"] <= days[5]])
root = fresh()
old = tree(root)
begin = time.monotonic()
assert os.waitpid(child(root, None, work / "count"), 0)[1] == 0
took = time.monotonic() - begin
new, total = tree(root), int((work / "count").read_text())
assert old != new
rng = random.Random(0)
points = min(points, total)
every = [total // 4, *rng.sample(range(1, total - 2), points - 4)]
every += range(total - 2, total + 1)
outcome = {"old": 0, "new": 0}

def check(root):
    state = tree(root)
    assert state in (old, new), "a half store"
    outcome["old" if state == old else "new"] += 1
    assert os.waitpid(child(root), 0)[1] == 0, "the rerun failed"
    assert tree(root) == new, "the rerun did not complete"
    assert os.listdir(root.parent) == ["s"], os.listdir(root.parent)

for point in every:
    root = fresh()
    status = os.waitpid(child(root, point), 0)[1]
    assert os.WIFSIGNALED(status), (point, status)
    check(root)
for _ in range(timed):
    root = fresh()
    pid = child(root)
    time.sleep(rng.uniform(0.2, 1.1) * took)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    check(root)
print(total, outcome["old"], outcome["new"])
"""


@pytest.mark.parametrize(
    "kind, points, timed",
    [
        ("baostock", 4, 0),
        ("write", 6, 1),
        pytest.param("extend", 9, 2, marks=pytest.mark.slow),  # an update extends too
        pytest.param("tushare", 12, 4, marks=pytest.mark.slow),
        pytest.param("extend", 30, 8, marks=pytest.mark.slow),
        pytest.param("write", 24, 6, marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_store(
    split, ingested, tmp_path, kind, points, timed, run_process
):
    if kind in ("baostock", "tushare"):
        _, old, _new = split(kind)
        ingested(old, kind)
    text = run_process(KILLER, tmp_path, tmp_path, kind, points, timed)
    total, old, new = map(int, text.split()[-3:])
    assert total > 20 and old > 0 and new > 0
