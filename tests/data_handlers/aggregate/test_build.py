"""Building stores: partitions, resume after kills, workers, reports, damaged input."""

import json
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data_handlers.aggregate.build as build_module
from data_handlers import backends
from data_handlers.aggregate import partition, reading, years
from data_handlers.aggregate.build import build, read_report
from data_handlers.aggregate.minute import LACKING, MINUTE_NAMES
from data_handlers.aggregate.ticks import TICK_NAMES
from data_handlers.loaders import read_daily_parquet

CLOCK = np.r_[np.arange(570, 690), np.arange(780, 900)][::5]


def make_bars(start, days, stocks=6, seed=0):
    """Five-minute bars of some stocks, sorted by stock and time."""
    rng = np.random.default_rng(seed)
    dates = pd.bdate_range(start, periods=days)
    stamp = (dates.to_numpy()[:, None] + CLOCK * np.timedelta64(60, "s")).ravel()
    n = len(stamp)
    parts = []
    for s in range(stocks):
        p = 10 * np.exp(np.cumsum(rng.normal(0, 0.002, n + 1)))
        o, c = p[:-1], p[1:]
        v = rng.integers(0, 40, n) * 100.0
        parts.append(
            pd.DataFrame(
                {
                    "instrument": f"SH60000{s}",
                    "datetime": stamp,
                    "open": o,
                    "high": np.maximum(o, c),
                    "low": np.minimum(o, c),
                    "close": c,
                    "volume": v,
                    "amount": v * c,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def bar_source(tmp_path_factory):
    """Monthly files over a turn of the year, and their bars."""
    root = tmp_path_factory.mktemp("bars")
    bars = make_bars("2019-11-18", 60)
    for month, part in bars.groupby(bars["datetime"].dt.strftime("%Y-%m")):
        part.to_parquet(root / f"{month}.parquet", index=False)
    return root, bars


def make_ticks(root, days, stocks=3, seed=0):
    """Trades, orders and quotes of some days as normalised files."""
    rng = np.random.default_rng(seed)
    out = {}
    for day in days:
        n = 60
        at = np.sort(rng.uniform(34_200, 53_000, (stocks, n)), axis=1)
        at = pd.Timestamp(day) + pd.to_timedelta(np.round(at.ravel(), 3), unit="s")
        code = np.repeat([f"SH60000{s}" for s in range(stocks)], n)
        side = rng.choice([1, -1], stocks * n)
        price = 10 + rng.normal(0, 0.02, stocks * n).round(2)
        base = {"instrument": code, "time": at}
        ids = rng.integers(1, 40, (2, stocks * n))
        tables = {
            "trades": pd.DataFrame(
                {
                    **base,
                    "price": price,
                    "volume": rng.integers(1, 20, stocks * n) * 100,
                    "buy_id": ids[0],
                    "sell_id": ids[1] + 1000,
                    "side": side,
                }
            ),
            "orders": pd.DataFrame(
                {
                    **base,
                    "price": price,
                    "volume": 100,
                    "side": side,
                    "order_id": np.arange(stocks * n) + 1,
                    "action": 1,
                }
            ),
            "quotes": pd.DataFrame(
                {
                    **base,
                    "bid_price_1": price - 0.01,
                    "ask_price_1": price + 0.01,
                    "bid_volume_1": 100.0,
                    "ask_volume_1": 300.0,
                }
            ),
        }
        for name, frame in tables.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            frame.to_parquet(root / name / f"{day}.parquet", index=False)
        out[day] = tables
    return out


TICK_DAYS = ["2020-12-30", "2020-12-31", "2021-01-04"]


@pytest.fixture(scope="module")
def tick_source(tmp_path_factory):
    root = tmp_path_factory.mktemp("ticks")
    return root, make_ticks(root, TICK_DAYS)


def stored(out, kind):
    return read_daily_parquet(Path(out) / kind)


class TestBars:
    def test_build_ms_equals_the_features_in_memory(
        self, bar_source, tmp_path, minute_features
    ):
        root, bars = bar_source
        report = build("ms", root, tmp_path, bar_minutes=5, progress=False)
        want = minute_features(bars, bar_minutes=5).astype(np.float32)
        pd.testing.assert_frame_equal(stored(tmp_path, "ms"), want, check_freq=False)
        assert report.years == [2019, 2020]
        assert report.rows_in == {"bars": len(bars)}
        assert report.rows_out == len(want)
        assert report.coverage["ms_rv"] == 1
        # The overnight return crosses months and the turn of the year.
        assert report.coverage["ms_overnight"] == pytest.approx(1 - 6 / len(want))
        on_disk = read_report(tmp_path, "ms")
        assert on_disk["rows_out"] == report.rows_out
        meta = pq.read_schema(tmp_path / "ms" / "2020.parquet").metadata
        names = [f["name"] for f in json.loads(meta[b"qlib_ext.features"])]
        assert names == MINUTE_NAMES
        assert f"{len(want)} stock-days" in report.text()

    def test_build_again_computes_nothing_and_new_months_only(
        self, bar_source, tmp_path, monkeypatch, minute_features
    ):
        root, bars = bar_source
        source = tmp_path / "source"
        shutil.copytree(root, source)
        (source / "2020-02.parquet").rename(tmp_path / "later.parquet")
        first = build("ms", source, tmp_path, bar_minutes=5, progress=False)
        year = (tmp_path / "ms" / "2019.parquet").stat().st_mtime_ns
        again = build("ms", source, tmp_path, bar_minutes=5, progress=False)
        assert again.reused == again.partitions == first.partitions == 3
        done = []
        real = build_module.compute_part
        monkeypatch.setattr(
            build_module,
            "compute_part",
            lambda part, *a: (done.append(part.key), real(part, *a))[1],
        )
        (tmp_path / "later.parquet").rename(source / "2020-02.parquet")
        build("ms", source, tmp_path, bar_minutes=5, progress=False)
        assert done == ["2020-02"]
        assert (tmp_path / "ms" / "2019.parquet").stat().st_mtime_ns == year
        want = minute_features(bars, bar_minutes=5).astype(np.float32)
        pd.testing.assert_frame_equal(stored(tmp_path, "ms"), want, check_freq=False)
        # Other options are other features: all partitions anew.
        done.clear()
        build("ms", source, tmp_path, bar_minutes=15, progress=False)
        assert len(done) == 4

    def test_build_of_a_cut_source_leaves_earlier_rows_the_same(
        self, bar_source, tmp_path
    ):
        root, bars = bar_source
        build("ms", root, tmp_path / "full", bar_minutes=5, progress=False)
        cut = pd.Timestamp("2020-01-15")
        source = tmp_path / "source"
        source.mkdir()
        early = bars[bars["datetime"] < cut]
        early.to_parquet(source / "all.parquet", index=False)
        build("ms", source, tmp_path / "cut", bar_minutes=5, progress=False)
        a, b = stored(tmp_path / "full", "ms"), stored(tmp_path / "cut", "ms")
        assert b.index.get_level_values(0).max() < cut
        pd.testing.assert_frame_equal(a.loc[b.index], b)

    def test_build_ms_reads_one_file_a_stock_and_any_order_of_rows(
        self, bar_source, tmp_path, minute_features
    ):
        _, bars = bar_source
        source = tmp_path / "source"
        source.mkdir()
        for code, part in bars.groupby("instrument"):
            part = part.sample(frac=1, random_state=0).drop(columns="instrument")
            part.to_parquet(source / f"{code[2:]}.SH.parquet", index=False)
        columns = {c: c for c in bars if c != "instrument"}
        source_of = {"kind": "minute", "bar_minutes": 5}
        columns = {"instrument": "@filename", **columns}
        mapping = {"sources": {"bars": {**source_of, "columns": columns}}}
        build("ms", source, tmp_path, mapping=mapping, progress=False)
        want = minute_features(bars, bar_minutes=5).astype(np.float32)
        pd.testing.assert_frame_equal(stored(tmp_path, "ms"), want, check_freq=False)

    def test_codes_are_those_of_the_day_store_and_what_is_none_is_named(self, tmp_path):
        given = [
            *("920002", "510300", "159915", "430047", "920001.XBSE", "SHSE.600000"),
            *("000002.SZSE", "600036.SSE", "00700", "TRUE"),
        ]
        bars = make_bars("2020-01-02", 2, stocks=len(given))
        bars["instrument"] = np.repeat(given, len(bars) // len(given))
        (tmp_path / "s").mkdir()
        bars.to_parquet(tmp_path / "s" / "2020-01.parquet", index=False)
        report = build("ms", tmp_path / "s", tmp_path, bar_minutes=5, progress=False)
        held = set(stored(tmp_path, "ms").index.get_level_values(1))
        assert held == {
            *("BJ920002", "SH510300", "SZ159915", "BJ430047", "BJ920001", "SH600000"),
            *("SZ000002", "SH600036", "00700", "TRUE"),
        }
        assert "no known A-share style" in report.text()
        assert "00700, TRUE" in report.text()

    def test_build_ms_finds_days_that_end_early(self, tmp_path, minute_features):
        bars = make_bars("2016-01-06", 3)  # a circuit breaker's
        short = pd.Timestamp("2016-01-07 11:00")
        gone = (bars["datetime"] >= short) & (bars["datetime"].dt.day == 7)
        bars = bars[~gone]
        (tmp_path / "s").mkdir()
        bars.to_parquet(tmp_path / "s" / "2016-01.parquet", index=False)
        report = build("ms", tmp_path / "s", tmp_path, bar_minutes=5, progress=False)
        assert report.notes["days that end early"] == ["2016-01-07"]
        want = minute_features(bars, bar_minutes=5).astype(np.float32)
        pd.testing.assert_frame_equal(stored(tmp_path, "ms"), want, check_freq=False)

    def test_build_factors_adjust_the_overnight_return(
        self, bar_source, tmp_path, minute_features
    ):
        root, bars = bar_source
        days = np.unique(bars["datetime"].dt.normalize())
        index = pd.MultiIndex.from_product([days, ["SH600000"]])
        factors = pd.Series(
            np.where(index.get_level_values(0) < days[9], 1.0, 2.0), index
        )
        build("ms", root, tmp_path, bar_minutes=5, factors=factors, progress=False)
        raw = minute_features(bars, bar_minutes=5)["ms_overnight"]
        gap = stored(tmp_path, "ms")["ms_overnight"] - raw
        one = (days[9], "SH600000")
        assert gap[one] == pytest.approx(np.log(2), abs=1e-6)
        assert abs(gap.drop(one).dropna()).max() < 1e-6


class TestGrowth:
    """A build of some days leaves the others as a build of all days has them."""

    @pytest.fixture(scope="class")
    def months(self, bar_source, tmp_path_factory, minute_features):
        """A folder for each month, the third one in two parts; and all features."""
        _, bars = bar_source
        root = tmp_path_factory.mktemp("months")
        day = bars["datetime"].dt.strftime("%Y-%m-%d")
        name = day.str[:7].where(day.str[:7] != "2020-01", "2020-01b")
        name = name.where((day < "2020-01-01") | (day > "2020-01-16"), "2020-01a")
        for key, part in bars.groupby(name):
            (root / key).mkdir()
            part.to_parquet(root / key / f"{key[:7]}.parquet", index=False)
        return root, minute_features(bars, bar_minutes=5).astype(np.float32)

    def grow(self, root, out, *names, bar_minutes=5, **options):
        for name in names:
            report = build(
                *("ms", root / name, out),
                **{"bar_minutes": bar_minutes, "progress": False, **options},
            )
        return report

    @pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 2, 0, 3, 1)])
    def test_build_of_pieces_equals_the_build_of_all(self, months, tmp_path, order):
        root, want = months
        names = sorted(p.name for p in root.iterdir())
        report = self.grow(root, tmp_path, *(names[k] for k in order))
        pd.testing.assert_frame_equal(stored(tmp_path, "ms"), want, check_freq=False)
        n = len(want.loc[str(report.years[0])])
        assert report.rows_out + report.rows_kept == n
        assert f"kept of earlier builds: {report.rows_kept}" in report.text()
        year = tmp_path / "ms" / "2020.parquet"
        before = year.stat().st_mtime_ns
        self.grow(root, tmp_path, names[order[-1]])
        assert year.stat().st_mtime_ns == before

    def test_build_from_a_day_on_keeps_the_days_before(self, bar_source, tmp_path):
        root, _ = bar_source
        options = {"bar_minutes": 5, "progress": False}
        build("ms", root, tmp_path, **options)
        want = stored(tmp_path, "ms")
        build("ms", root, tmp_path, start="2020-02-01", **options)
        build("ms", root, tmp_path, start="2019-12-01", end="2019-12-31", **options)
        pd.testing.assert_frame_equal(stored(tmp_path, "ms"), want)

    def test_build_replaces_days_and_what_follows_from_them(
        self, bar_source, tmp_path, minute_features
    ):
        root, bars = bar_source
        options = {"bar_minutes": 5, "progress": False}
        build("ms", root, tmp_path, **options)
        fresh = bars.copy()
        december = fresh["datetime"].dt.strftime("%Y-%m") == "2019-12"
        prices = ["open", "high", "low", "close", "amount"]
        fresh.loc[december, prices] *= 1.5
        last = fresh["datetime"].dt.strftime("%Y-%m-%d") == "2019-12-31"
        fresh = fresh[~(last & (fresh["instrument"] == "SH600003"))]
        (tmp_path / "fresh").mkdir()
        december = fresh[fresh["datetime"].dt.strftime("%Y-%m") == "2019-12"]
        december.to_parquet(tmp_path / "fresh" / "2019-12.parquet", index=False)
        report = build("ms", tmp_path / "fresh", tmp_path, **options)
        want = minute_features(fresh, bar_minutes=5).astype(np.float32)
        got = stored(tmp_path, "ms")
        gone = (pd.Timestamp("2019-12-31"), "SH600003")
        assert gone in got.index and gone not in want.index
        got = got.drop(index=[gone])
        # The next overnight return of that stock begins at the close that is there.
        after = got.index.get_level_values(1) == "SH600003"
        after &= got.index.get_level_values(0) > gone[0]
        pd.testing.assert_frame_equal(got[~after], want[~after], check_freq=False)
        assert "their day came again without the stock: 1" in report.text()

    def test_build_of_one_more_stock_keeps_the_others(
        self, bar_source, tmp_path, minute_features
    ):
        _, bars = bar_source
        options = {"bar_minutes": 5, "progress": False}
        one = bars["instrument"] == "SH600003"
        for name, rows in (("most", bars[~one]), ("one", bars[one])):
            (tmp_path / name).mkdir()
            for month, part in rows.groupby(rows["datetime"].dt.strftime("%Y-%m")):
                part.to_parquet(tmp_path / name / f"{month}.parquet", index=False)
            build("ms", tmp_path / name, tmp_path, **options)
        want = minute_features(bars, bar_minutes=5).astype(np.float32)
        pd.testing.assert_frame_equal(stored(tmp_path, "ms"), want, check_freq=False)

    def test_build_refuses_to_mix_options_in_a_year(self, months, tmp_path):
        root, _ = months
        self.grow(root, tmp_path, "2019-11")
        before = stored(tmp_path, "ms")
        with pytest.raises(
            ValueError, match=r"2019\.parquet holds 60 .* bar_minutes \(5, now 15\)"
        ):
            self.grow(root, tmp_path, "2019-12", bar_minutes=15)
        pd.testing.assert_frame_equal(stored(tmp_path, "ms"), before)
        # A note on another half day changes no day that is there.
        early = {"kind": "minute", "early_close": {"2019-12-24": "11:30"}}
        mapping = {"sources": {"bars": early}}
        self.grow(root, tmp_path, "2019-12", mapping=mapping)

    def test_build_says_where_the_close_before_is_not_known(self, months, tmp_path):
        root, want = months
        self.grow(root, tmp_path, "2019-11")
        report = self.grow(root, tmp_path, "2020-01b")  # December is not there
        got = stored(tmp_path, "ms")["ms_overnight"]
        assert (
            got.loc["2020-01-17"].isna().all() and got.loc["2020-01-20"].notna().all()
        )
        assert (
            "stock-days without ms_overnight: the close before is not" in report.text()
        )
        self.grow(root, tmp_path, "2019-12", "2020-01a", "2020-02")
        shutil.rmtree(tmp_path / "ms" / ".parts")
        report = self.grow(root, tmp_path, "2020-02")
        first = report.notes[
            "stock-days without ms_overnight: the close before is not known"
        ]
        got = stored(tmp_path, "ms")
        assert first == 6 and got.loc["2020-02-03", "ms_overnight"].isna().all()
        days = want.index.get_level_values(0) != pd.Timestamp("2020-02-03")
        pd.testing.assert_frame_equal(
            got.drop(pd.Timestamp("2020-02-03")), want[days], check_freq=False
        )

    def test_build_stopped_between_its_files_goes_on(
        self, months, tmp_path, monkeypatch
    ):
        root, want = months
        self.grow(root, tmp_path, "2019-11", "2019-12", "2020-01a", "2020-01b")
        real = years.write_parquet

        def stop(path, table, **k):
            if path.name == "2020.parquet":
                raise KeyboardInterrupt
            real(path, table, **k)

        monkeypatch.setattr(years, "write_parquet", stop)
        with pytest.raises(KeyboardInterrupt):
            self.grow(root, tmp_path, "2020-02")
        monkeypatch.undo()
        self.grow(root, tmp_path, "2020-02")
        pd.testing.assert_frame_equal(stored(tmp_path, "ms"), want, check_freq=False)
        assert len(list((tmp_path / "ms" / ".parts").glob("closes-*"))) == 2

    def test_build_l2_of_one_day_keeps_the_others(self, tick_source, tmp_path):
        root, _ = tick_source
        build("l2", root, tmp_path, progress=False)
        want = stored(tmp_path, "l2")
        report = build("l2", root, tmp_path, start=TICK_DAYS[2], progress=False)
        assert report.rows_out == 3 and report.rows_kept == 0
        one = {"start": TICK_DAYS[1], "end": TICK_DAYS[1]}
        report = build("l2", root, tmp_path, progress=False, **one)
        assert report.rows_out == report.rows_kept == 3
        pd.testing.assert_frame_equal(stored(tmp_path, "l2"), want)


class TestTicks:
    def test_build_l2_equals_the_features_in_memory(
        self, tick_source, tmp_path, tick_features
    ):
        root, tables = tick_source
        report = build("l2", root, tmp_path, progress=False)
        want = pd.concat([tick_features(*t.values()) for t in tables.values()])
        got = stored(tmp_path, "l2")
        pd.testing.assert_frame_equal(got, want.astype(np.float32), check_freq=False)
        assert report.years == [2020, 2021] and report.partitions == 3
        assert list(got.columns) == TICK_NAMES

    def test_build_l2_in_small_pieces_gives_the_same(
        self, tick_source, tmp_path, monkeypatch
    ):
        root, _ = tick_source
        build("l2", root, tmp_path / "a", progress=False)
        monkeypatch.setattr(partition, "_TICKS_AT_ONCE", 200)
        build("l2", root, tmp_path / "b", progress=False)
        pd.testing.assert_frame_equal(
            stored(tmp_path / "a", "l2"), stored(tmp_path / "b", "l2")
        )

    def test_build_l2_reports_what_a_source_lacks(self, tick_source, tmp_path):
        root, _ = tick_source
        source = tmp_path / "source"
        shutil.copytree(root, source)
        shutil.rmtree(source / "orders")
        (source / "quotes" / "2020-12-31.parquet").unlink()
        report = build("l2", source, tmp_path, progress=False)
        assert report.missing == {"orders": TICK_DAYS, "quotes": ["2020-12-31"]}
        assert report.coverage["l2_cancel_ratio"] == 0
        assert "source without orders: 3 of 3" in report.text()
        got = stored(tmp_path, "l2")
        assert got["l2_cancel_ratio"].isna().all()
        assert got.loc["2020-12-31", "l2_spread"].isna().all()
        assert got.loc["2021-01-04", "l2_spread"].notna().all()

    def test_build_l2_counts_rows_of_another_day(self, tick_source, tmp_path):
        root, tables = tick_source
        source = tmp_path / "source"
        shutil.copytree(root, source)
        two = pd.concat([tables[d]["trades"] for d in TICK_DAYS[:2]])
        two.to_parquet(source / "trades" / f"{TICK_DAYS[0]}.parquet", index=False)
        report = build("l2", source, tmp_path / "out", progress=False)
        n = len(tables[TICK_DAYS[1]]["trades"])
        assert report.rejected["trades"] == {"another day": n}
        build("l2", root, tmp_path / "clean", progress=False)
        pd.testing.assert_frame_equal(
            stored(tmp_path / "out", "l2"), stored(tmp_path / "clean", "l2")
        )
        # A file whose rows are all of another day is an error that says so.
        tables[TICK_DAYS[1]]["trades"].to_parquet(
            source / "trades" / f"{TICK_DAYS[0]}.parquet", index=False
        )
        with pytest.raises(ValueError, match="no usable trade on 2020-12-30"):
            build("l2", source, tmp_path / "out", progress=False)

    def test_build_l2_of_the_real_shanghai_files(self, tmp_path, real_file):
        names = ["l2_trades_cn_600519_202302", "l2_quotes_cn_600519_202302"]
        names += ["l2_orders_cn_600519_20230201"]
        for name in names:
            table = name.split("_")[1]
            (tmp_path / table).mkdir(exist_ok=True)
            shutil.copy(real_file(f"{name}.parquet"), tmp_path / table)
        report = build("l2", tmp_path, tmp_path / "out", progress=False)
        got = stored(tmp_path / "out", "l2")
        assert len(got) == 3
        # each row of the three days once, none of another day
        assert report.rows_in["trades"] == 78404
        assert report.rejected["trades"] == {}
        assert report.missing["orders"] == ["2023-02-02", "2023-02-03"]
        assert got["l2_order_imb"].notna().tolist() == [True, False, False]


REFUSED = {
    "an afternoon of all": (
        lambda b: b[(b["datetime"].dt.day != 3) | (b["datetime"].dt.hour < 13)],
        "on 2020-01-03 no stock trades in the last half-hour"),
    "open and close swapped": (
        lambda b: b.rename(columns={"open": "close", "close": "open"}),
        "are the columns `open` and `close` swapped"),
    "longer bars of a stock": (
        lambda b: b[(b["instrument"] != "SH600002") | (b.index % 3 == 0)],
        "3 stock-days have bars of 15 minutes, longer than `bar_minutes` = 5"),
    "high and close swapped": (
        lambda b: b.rename(columns={"high": "close", "close": "high"}),
        "stock-days have bars and none, or too few, that can be used"),
    "no volume": (lambda b: b.assign(volume=0), "trades on any day: is `volume`"),
    "a stock without its code": (
        lambda b: b.assign(instrument=b["instrument"].where(
            b["instrument"] != "SH600002", "")), "has rows without a code"),
    "two deliveries that disagree": (
        lambda b: pd.concat([b, b.assign(volume=b["volume"] * 2)]),
        "are given twice with different values"),
    "a Saturday": (
        lambda b: pd.concat([b, b[b["datetime"].dt.day == 3].assign(
            datetime=lambda x: x["datetime"] + pd.Timedelta("1D"),
            volume=lambda x: x["volume"] + 1)]),
        "2020-01-04 lies on a weekend"),
}  # fmt: skip


class TestRobustness:
    @pytest.mark.parametrize("kind", [pytest.param("ms", marks=pytest.mark.slow), "l2"])
    def test_build_workers_give_the_same_as_one_process(
        self, bar_source, tick_source, tmp_path, kind, monkeypatch
    ):
        root = bar_source[0] if kind == "ms" else tick_source[0]
        if kind == "l2":  # forks; the slow twin has processes that import anew
            forks = partial(joblib.parallel_config, "multiprocessing")
            monkeypatch.setattr(
                backends,
                "parallel_config",
                lambda backend, n_jobs: forks(n_jobs=n_jobs),
            )
        options = {"bar_minutes": 5, "progress": False}
        build(kind, root, tmp_path / "one", **options)
        build(kind, root, tmp_path / "two", workers=2, **options)
        pd.testing.assert_frame_equal(
            stored(tmp_path / "one", kind), stored(tmp_path / "two", kind)
        )

    def test_build_killed_at_any_moment_goes_on_without_loss(
        self, tmp_path, minute_features, start_process
    ):
        source = tmp_path / "source"
        source.mkdir()
        bars = make_bars("2019-01-02", 260, stocks=2)
        for month, part in bars.groupby(bars["datetime"].dt.strftime("%Y-%m")):
            part.to_parquet(source / f"{month}.parquet", index=False)
        code = (
            "from data_handlers.aggregate.build import build\n"
            "import pyarrow.parquet as pq, time\n"
            "real = pq.write_table\n"
            "def slow(*a, **k):\n"  # so that kills fall before, in and after a write
            "    time.sleep(0.03); real(*a, **k); time.sleep(0.03)\n"
            "pq.write_table = slow\n"
            f"build('ms', {str(source)!r}, {str(tmp_path / 'out')!r}, bar_minutes=5,"
            " progress=False)\n"
        )
        folder = tmp_path / "out" / "ms"
        parts = folder / ".parts"
        seen: dict[str, int] = {}
        rng = np.random.default_rng(0)
        for _ in range(2):
            process, _ = start_process(code, tmp_path)
            goal = len(seen) + 4
            limit = time.monotonic() + 60
            while time.monotonic() < limit and process.is_alive():
                have = list(parts.glob("2*.parquet")) if parts.exists() else []
                if len(have) >= goal:
                    break
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.08))
            finished = not process.is_alive()
            process.kill()
            process.join()
            for path in parts.glob("2*.parquet"):
                pq.read_table(path)  # whole, at any moment
                stamp = path.stat().st_mtime_ns
                assert seen.setdefault(path.name, stamp) == stamp, "computed twice"
            for path in folder.glob("2*.parquet"):
                pq.read_table(path)
            if finished:
                break
        assert len(seen) >= 4
        report = build("ms", source, tmp_path / "out", bar_minutes=5, progress=False)
        assert report.reused >= len(seen) - 1
        for name, stamp in seen.items():
            assert (parts / name).stat().st_mtime_ns == stamp
        want = minute_features(bars, bar_minutes=5).astype(np.float32)
        got = stored(tmp_path / "out", "ms")
        pd.testing.assert_frame_equal(got, want, check_freq=False)
        assert not list(parts.glob(".*.tmp"))

    def test_build_a_damaged_file_is_named_and_the_others_are_kept(
        self, bar_source, tmp_path
    ):
        root, _ = bar_source
        source = tmp_path / "source"
        shutil.copytree(root, source)
        build("ms", source, tmp_path, bar_minutes=5, progress=False)
        before = stored(tmp_path, "ms")
        bad = source / "2020-01.parquet"
        data = bad.read_bytes()
        bad.write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=r"2020-01\.parquet is not a readable"):
            build("ms", source, tmp_path, bar_minutes=5, progress=False)
        pd.testing.assert_frame_equal(stored(tmp_path, "ms"), before)
        # A damaged page inside a whole file.
        wrong = bytearray(data)
        wrong[200:2000] = np.random.default_rng(0).bytes(1800)
        bad.write_bytes(bytes(wrong))
        with pytest.raises(ValueError, match=r"2020-01"):
            build("ms", source, tmp_path, bar_minutes=5, progress=False)
        bad.write_bytes(data)
        report = build("ms", source, tmp_path, bar_minutes=5, progress=False)
        assert report.reused == 3
        pd.testing.assert_frame_equal(stored(tmp_path, "ms"), before)

    def test_build_leaves_out_a_file_without_rows(self, bar_source, tmp_path):
        root, bars = bar_source
        source = tmp_path / "source"
        shutil.copytree(root, source)
        bars.iloc[:0].to_parquet(source / "2020-03.parquet", index=False)
        report = build("ms", source, tmp_path, bar_minutes=5, progress=False)
        assert report.partitions == 4 and report.rows_in == {"bars": len(bars)}

    def test_build_a_damaged_partition_is_computed_again(self, bar_source, tmp_path):
        root, _ = bar_source
        build("ms", root, tmp_path, bar_minutes=5, progress=False)
        before = stored(tmp_path, "ms")
        part = tmp_path / "ms" / ".parts" / "2019-12.parquet"
        part.write_bytes(part.read_bytes()[:100])
        report = build("ms", root, tmp_path, bar_minutes=5, progress=False)
        assert report.reused == 3
        pd.testing.assert_frame_equal(stored(tmp_path, "ms"), before)

    @pytest.mark.parametrize(
        ("column", "by", "match"),
        [
            ("price", 1e4, r"units: \{price: e4\}"),
            ("price", 1e2, r"units: \{price: fen\}"),
            ("volume", 1e-2, r"units: \{volume: lots\}"),
        ],
    )
    def test_build_tick_units_are_checked_against_the_day_store(
        self, tick_source, tmp_path, column, by, match
    ):
        root, tables = tick_source
        build("flow", root, tmp_path / "o", progress=False)
        parts = sorted((tmp_path / "o" / "flow" / ".parts").glob("*.parquet"))
        daily = pd.concat(pd.read_parquet(p) for p in parts)
        daily = daily.set_index(["datetime", "instrument"])
        daily = daily[["close", "volume", "amount"]]
        for day, have in tables.items():
            trades = have["trades"].assign(**{column: have["trades"][column] * by})
            path = tmp_path / "bad" / "trades" / f"{day}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            trades.to_parquet(path, index=False)
        source = tmp_path / "bad"
        with pytest.raises(ValueError, match=match):
            build("flow", source, tmp_path / "p", daily=daily, progress=False)
        assert not list((tmp_path / "p" / "flow").glob("2*.parquet"))
        if by == 1e4:  # nobody else's word is needed
            with pytest.raises(ValueError, match=match):
                build("flow", source, tmp_path / "q", progress=False)

    def test_build_flow_of_declared_price_units_is_the_same_money(
        self, tick_source, tmp_path
    ):
        root, tables = tick_source
        build("flow", root, tmp_path / "cny", progress=False)
        for day, have in tables.items():
            trades = have["trades"].assign(
                price=(have["trades"]["price"] * 1e4).round()
            )
            path = tmp_path / "e4" / "trades" / f"{day}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            trades.to_parquet(path, index=False)
        columns = {c: c for c in trades if c != "day"}
        mapping = {
            "sources": {
                "trades": {
                    "kind": "trades",
                    "files": ["trades/*.parquet"],
                    "columns": columns,
                    "units": {"price": "e4"},
                }
            }
        }
        build("flow", tmp_path / "e4", tmp_path / "o", mapping, progress=False)
        pd.testing.assert_frame_equal(
            stored(tmp_path / "o", "flow"), stored(tmp_path / "cny", "flow"), rtol=1e-6
        )

    @pytest.mark.parametrize(("column", "by"), [("volume", 0.01), ("amount", 1e-4)])
    def test_build_bars_whose_amount_and_price_disagree_are_refused(
        self, tmp_path, column, by
    ):
        bars = make_bars("2020-01-02", 5)
        bars[column] *= by
        bars.to_parquet(tmp_path / "2020-01.parquet", index=False)
        with pytest.raises(ValueError, match="times the price"):
            build("ms", tmp_path, tmp_path / "o", bar_minutes=5, progress=False)

    def test_build_stock_days_that_lack_bars_have_no_features(self, tmp_path):
        bars = make_bars("2020-01-02", 3)
        hour = bars["datetime"].dt.hour
        on = bars["datetime"].dt.day == 3
        gone = pd.Series(False, bars.index)
        for code, hours in (("0", [13, 14]), ("1", [9, 10, 11]), ("2", [10, 11, 13])):
            gone |= on & hour.isin(hours) & (bars["instrument"] == f"SH60000{code}")
        bars.loc[on & (bars["instrument"] == "SH600003"), "volume"] *= np.where(
            np.arange(48) % 6, 1, np.nan
        )  # a sixth of the bars is rejected
        (tmp_path / "s").mkdir()
        bars[~gone].to_parquet(tmp_path / "s" / "2020-01.parquet", index=False)
        report = build("ms", tmp_path / "s", tmp_path, bar_minutes=5, progress=False)
        want = [f"SH60000{k} 2020-01-03" for k in range(4)]
        assert report.notes[LACKING] == want
        got = stored(tmp_path, "ms")
        day = got.loc["2020-01-03"]
        assert day.iloc[:4].isna().all(axis=None) and day.iloc[4:].notna().all(
            axis=None
        )
        after = got.loc["2020-01-06", "ms_overnight"]
        assert after.isna().tolist() == [True] * 4 + [False] * 2

    @pytest.mark.parametrize("case", REFUSED)
    def test_build_bars_out_of_place_are_refused(self, tmp_path, case):
        change, match = REFUSED[case]
        bars = make_bars("2020-01-02", 3)
        bars["close"] = bars["open"].shift(-1).fillna(bars["close"])
        bars["high"] = bars[["open", "close"]].max(axis=1)
        bars["low"] = bars[["open", "close"]].min(axis=1)
        bars = change(bars.drop(columns="amount"))
        bars.to_parquet(tmp_path / "2020-01.parquet", index=False)
        with pytest.raises(ValueError, match=match):
            build("ms", tmp_path, tmp_path / "o", bar_minutes=5, progress=False)

    def test_build_lost_days_and_indices_are_told(self, tmp_path):
        bars = make_bars("2020-03-02", 4, stocks=2)
        bars = bars[bars["datetime"].dt.day != 4]
        bars["instrument"] = bars["instrument"].replace("SH600001", "SH000300")
        bars.to_parquet(tmp_path / "2020-03.parquet", index=False)
        report = build("ms", tmp_path, tmp_path / "o", bar_minutes=5, progress=False)
        assert report.notes["trading days without any bars or ticks"] == ["2020-03-04"]
        assert report.notes["codes of indices, beside the stocks"] == ["SH000300"]

    def test_build_ticks_of_half_a_day_in_lots_or_of_the_day_so_far(self, tmp_path):
        rng = np.random.default_rng(0)
        when = pd.Timestamp("2024-03-05 09:30") + pd.to_timedelta(
            np.r_[np.arange(0, 7200, 20), np.arange(12600, 19800, 20)], unit="s"
        )
        n = len(when)
        trades = pd.concat(
            pd.DataFrame({
                "instrument": f"SH60000{k}", "time": when, "price": 10.0,
                "volume": rng.integers(1, 30, n) * 100, "side": -1,
                "buy_id": np.arange(n) + 1, "sell_id": np.arange(n) + n + 1,
            }) for k in range(2)
        )  # fmt: skip
        file = tmp_path / "s" / "trades" / "2024-03-05.parquet"
        file.parent.mkdir(parents=True)
        late = (trades["instrument"] == "SH600001") & (trades["time"].dt.hour > 12)
        trades[~late].to_parquet(file, index=False)
        report = build("flow", tmp_path / "s", tmp_path, progress=False)
        (lacking,) = (v for k, v in report.notes.items() if "lack trades" in k)
        assert lacking == ["SH600001 2024-03-05"] and "side" not in str(report.missing)
        assert stored(tmp_path, "flow").isna().all(axis=1).tolist() == [False, True]
        for by, match in ((lambda v: v // 100, "lots"), ("cumsum", "day so far")):
            volume = trades.groupby("instrument")["volume"].transform(by)
            trades.assign(volume=volume).to_parquet(file, index=False)
            with pytest.raises(ValueError, match=match):
                build("flow", tmp_path / "s", tmp_path / "o", progress=False)

    @pytest.mark.parametrize("content", [b"", b"PAR1 cut"])
    def test_build_names_a_file_that_is_cut_off(self, tmp_path, content):
        (tmp_path / "2020-01.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"2020-01\.parquet.*copy it again"):
            build("ms", tmp_path, tmp_path / "o", bar_minutes=5, progress=False)
        (tmp_path / "t" / "trades").mkdir(parents=True)
        (tmp_path / "t" / "trades" / "2020-01-02.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"2020-01-02\.parquet.*copy it again"):
            build("flow", tmp_path / "t", tmp_path / "p", progress=False)

    def test_build_refuses_a_second_builder(self, bar_source, tmp_path):
        import fcntl

        (tmp_path / "ms" / ".parts").mkdir(parents=True)
        with open(tmp_path / "ms" / ".parts" / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(ValueError, match=r"being built .* by another process"):
                build("ms", bar_source[0], tmp_path, bar_minutes=5, progress=False)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"kind": "l3"}, "`kind` must be"),
            ({"backend": "spark"}, "`backend` must be"),
            ({"workers": 0}, "`workers` must be"),
            ({"bar_minutes": 7}, "`bar_minutes` must be"),
            ({"source": "nowhere"}, "does not exist"),
            ({"start": "2031-01-01"}, "No bars between"),
            ({"session": "us_regular", "stamp": "mid"}, "`stamp` must be"),
            ({"bar_minutes": 1}, "5 minutes apart"),
        ],
    )
    def test_build_bad_options_are_named(self, bar_source, tmp_path, options, match):
        use = {"kind": "ms", "source": bar_source[0], "bar_minutes": 5, **options}
        with pytest.raises(ValueError, match=match):
            build(out=tmp_path, progress=False, **use)

    def test_build_wrong_time_zone_and_missing_column_name_the_file(
        self, tmp_path, minute_features
    ):
        bars = make_bars("2020-01-02", 3)
        (tmp_path / "s").mkdir()
        path = tmp_path / "s" / "2020-01.parquet"
        utc = bars.assign(datetime=bars["datetime"] - pd.Timedelta("8h"))
        utc.to_parquet(path, index=False)
        with pytest.raises(ValueError, match=r"2020-01: .* another time zone"):
            build("ms", tmp_path / "s", tmp_path, bar_minutes=5, progress=False)
        columns = {c: c for c in bars}
        utc = {"kind": "minute", "columns": columns, "tz": "UTC", "bar_minutes": 5}
        fixed = {"sources": {"bars": utc}}
        build("ms", tmp_path / "s", tmp_path, mapping=fixed, progress=False)
        want = minute_features(bars, bar_minutes=5).astype(np.float32)
        pd.testing.assert_frame_equal(stored(tmp_path, "ms"), want, check_freq=False)
        bars.drop(columns="low").to_parquet(path, index=False)
        with pytest.raises(ValueError, match=r"2020-01\.parquet.*'low'"):
            build("ms", tmp_path / "s", tmp_path, mapping=fixed, progress=False)
        with pytest.raises(ValueError, match=r"2020-01\.parquet: no known layout"):
            build("ms", tmp_path / "s", tmp_path, progress=False)

    def test_build_shows_progress_with_rate_and_time_left(
        self, bar_source, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # else no bar
        build("ms", bar_source[0], tmp_path, bar_minutes=5)
        err = capsys.readouterr().err
        assert "build ms" in err and "4/4" in err
        assert re.search(r"\d+:\d+<\d+:\d+, .*month", err)


class TestReading:
    def test_iter_stocks_yields_each_stock_once_whatever_the_row_groups(self, tmp_path):
        codes = np.repeat([f"S{k}" for k in range(7)], [3, 40, 1, 1, 90, 5, 20])
        table = pa.table({"c": codes, "x": np.arange(len(codes))})
        for size in (1, 4, 7, 33, 200):
            pq.write_table(table, tmp_path / "f.parquet", row_group_size=size)
            for most in (1, 10, 50, 1000):
                pieces = list(
                    reading.iter_stocks(tmp_path / "f.parquet", ["c", "x"], "c", most)
                )
                seen = [set(p.column("c").to_pylist()) for p in pieces]
                assert sum(map(len, seen)) == 7, (size, most)
                x = np.concatenate([p.column("x").to_numpy() for p in pieces])
                assert sorted(x) == list(range(len(codes)))

    def test_iter_stocks_handles_rows_out_of_order(self, tmp_path):
        rng = np.random.default_rng(0)
        codes = rng.permutation(np.repeat([f"S{k}" for k in range(5)], 30))
        table = pa.table({"c": codes, "x": np.arange(150)})
        pq.write_table(table, tmp_path / "f.parquet", row_group_size=10)
        for most in (5, 40, 1000):
            pieces = list(
                reading.iter_stocks(tmp_path / "f.parquet", ["c", "x"], "c", most)
            )
            seen = [set(p.column("c").to_pylist()) for p in pieces]
            assert sum(map(len, seen)) == 5
            assert sum(p.num_rows for p in pieces) == 150

    def test_csv_sources_are_read_too(self, tmp_path, minute_features):
        bars = make_bars("2020-01-02", 3)
        (tmp_path / "s").mkdir()
        bars.to_csv(tmp_path / "s" / "2020-01.csv", index=False)
        build("ms", tmp_path / "s", tmp_path, bar_minutes=5, progress=False)
        want = minute_features(bars, bar_minutes=5).astype(np.float32)
        got = stored(tmp_path, "ms")
        pd.testing.assert_frame_equal(got, want, check_freq=False, rtol=1e-5)
