"""Speed and memory of the minute and tick aggregates, beside other ways to do it.

    python benchmarks/aggregate.py [--quick] [--full] [--json FILE]

Minute bars: 22 features of simulated 1-minute A-share bars, from a Parquet file to a
Parquet file, by this package, polars, pandas and numpy; the four results are compared
before any time is taken. Ticks: 20 features of simulated trades, orders and quotes,
file to file, and the peak memory of a process by the size of the day; `--full` adds a
whole market's day of 150 million rows (6 GB of disk). Both with 1 and 2 workers, and on
local Ray and Dask clusters of 2 that run already: their start is timed apart, but Ray's
joblib back-end starts its processes anew for each build. Last, time and disk of a
stock's year. Times are medians of several runs after a first one that is
not counted; they depend on the machine, so compare within one run.
"""

import contextlib
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from harness import environment, parser
from harness import show as print_table

from data_handlers.aggregate.build import build
from data_handlers.aggregate.minute import MINUTE_NAMES, reduce_minutes
from data_handlers.aggregate.ticks import aggregate_ticks

SLOTS = np.r_[np.arange(570, 690), np.arange(780, 900)]
FULL_DAY = 150e6  # ticks of all A-shares on one day
TICKS_A_STOCK = 30_000  # of one of its 5,000 stocks
YEAR = 243  # trading days
AT_ONCE = 8e6  # ticks made at once


def write_bars(path, stocks, days, month="2024-03-01", seed=0):
    """Write a month of 1-minute bars; every minute has a trade."""
    rng = np.random.default_rng(seed)
    first = np.datetime64(month, "us")
    dates = first + np.arange(days) * np.timedelta64(1, "D")
    stamp = (dates[:, None] + SLOTS * np.timedelta64(60, "s")).ravel()
    n = len(stamp)
    move = rng.normal(0, 1e-3, (stocks, n)).cumsum(1)
    close = np.round(20 * np.exp(move), 2).ravel().clip(0.5)
    opened = np.r_[close[:1], close[:-1]]
    volume = rng.integers(1, 2000, stocks * n) * 100.0
    names = pa.array([f"SH{600000 + s}" for s in range(stocks)])
    code = pa.array(np.repeat(np.arange(stocks, dtype=np.int32), n))
    table = pa.table(
        {
            "instrument": pa.DictionaryArray.from_arrays(code, names),
            "datetime": np.tile(stamp, stocks),
            "open": opened,
            "high": np.maximum(opened, close) + 0.01,
            "low": np.minimum(opened, close) - 0.01,
            "close": close,
            "volume": volume,
            "amount": volume * close,
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")
    return table.num_rows


def with_numpy(source, out):
    """Reduce by reshaping to [stock-days, 240]; needs every minute to be there."""
    t = pq.read_table(source)
    shape = (-1, 240)
    p, v, a, o, h, lo = (
        t.column(c).to_numpy().reshape(shape)
        for c in ("close", "volume", "amount", "open", "high", "low")
    )
    first = o[:, :1]
    r = np.log(p / np.concatenate([first, p[:, :-1]], axis=1))
    r2 = r * r
    s2 = r2.sum(1)
    med = np.median(r, axis=1, keepdims=True)
    mad = np.median(np.abs(r - med), axis=1, keepdims=True)
    jump = np.where(np.abs(r) > 3 * 1.4826 * mad, r, 0).sum(1)
    sv = v.sum(1)
    absr = np.abs(r)

    def corr(x, y):
        x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
        return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))

    high, low = h.max(1), lo.min(1)
    columns = [
        np.sqrt(s2),
        np.sqrt(240) * (r2 * r).sum(1) / s2**1.5,
        240 * (r2 * r2).sum(1) / s2**2,
        np.where(r < 0, r2, 0).sum(1) / s2,
        jump,
        r.sum(1) - jump,
        np.full(len(r), np.nan),
        r[:, :30].sum(1),
        r[:, 30:-30].sum(1),
        r[:, -30:].sum(1),
        v[:, :30].sum(1) / sv,
        v[:, -30:].sum(1) / sv,
        (v * v).sum(1) / sv**2,
        v.std(1) / v.mean(1),
        np.log(p.mean(1) / (a.sum(1) / sv)),
        (p.mean(1) - low) / (high - low),
        corr(p, v),
        corr(absr, v),
        corr(r[:, 1:], v[:, :-1]),
        (absr / a).mean(1),
        np.abs(np.log(p[:, -1] / o[:, 0])) / absr.sum(1),
        (1 - p / np.maximum.accumulate(p, axis=1)).max(1),
    ]
    table = pa.table(
        {
            "instrument": t.column("instrument").take(np.arange(0, t.num_rows, 240)),
            "datetime": t.column("datetime").to_numpy()[::240].astype("datetime64[D]"),
            **dict(zip(MINUTE_NAMES, columns, strict=True)),
        }
    )
    pq.write_table(table, out)


def with_polars(source, out):
    """Reduce by polars' lazy group-by."""
    import polars as pl

    c = pl.col
    key = ["instrument", "date"]
    frame = pl.scan_parquet(source).with_columns(date=c("datetime").dt.date())
    frame = frame.with_columns(
        r=(c("close") / c("close").shift(1).over(key).fill_null(c("open"))).log(),
        k=pl.int_range(pl.len()).over(key),
    )
    r, v, p, a = c("r"), c("volume"), c("close"), c("amount")
    s2 = (r**2).sum()
    mad = (r - r.median()).abs().median()
    jump = r.filter(r.abs() > 3 * 1.4826 * mad).sum()
    high, low = c("high").max(), c("low").min()
    result = frame.group_by(key, maintain_order=True).agg(
        ms_rv=s2.sqrt(),
        ms_skew=pl.len().sqrt() * (r**3).sum() / s2**1.5,
        ms_kurt=pl.len() * (r**4).sum() / s2**2,
        ms_down_ratio=(r**2).filter(r < 0).sum() / s2,
        ms_jump=jump,
        ms_mom=r.sum() - jump,
        ms_overnight=pl.lit(None, pl.Float64).first(),
        ms_ret_open30=r.filter(c("k") < 30).sum(),
        ms_ret_mid=r.filter((c("k") >= 30) & (c("k") < 210)).sum(),
        ms_ret_last30=r.filter(c("k") >= 210).sum(),
        ms_vol_open30=v.filter(c("k") < 30).sum() / v.sum(),
        ms_vol_last30=v.filter(c("k") >= 210).sum() / v.sum(),
        ms_vhhi=(v**2).sum() / v.sum() ** 2,
        ms_vvol=v.std(ddof=0) / v.mean(),
        ms_apb=(p.mean() / (a.sum() / v.sum())).log(),
        ms_arpp=(p.mean() - low) / (high - low),
        ms_corr_pv=pl.corr(p, v),
        ms_corr_rv=pl.corr(r.abs(), v),
        ms_corr_lag=pl.corr(r.slice(1), v.slice(0, pl.len() - 1)),
        ms_illiq=(r.abs() / a).mean(),
        ms_trend=(p.last() / c("open").first()).log().abs() / r.abs().sum(),
        ms_mdd=(1 - p / p.cum_max()).max(),
    )
    result.rename({"date": "datetime"}).collect().write_parquet(out)


def with_pandas(source, out):
    """Reduce by pandas' group-by, on helper columns rather than row by row."""
    t = pd.read_parquet(source)
    code = t["instrument"].cat.codes if t["instrument"].dtype == "category" else None
    code = pd.factorize(t["instrument"])[0] if code is None else code.to_numpy()
    day = t["datetime"].to_numpy().astype("datetime64[D]")
    g = pd.Series(code * np.int64(100_000) + day.astype(np.int64))
    by = t.groupby(g.to_numpy(), sort=False)
    before = by["close"].shift(1).fillna(t["open"])
    r = np.log(t["close"] / before)
    k = by.cumcount()
    v, p, a = t["volume"], t["close"], t["amount"]
    group = g.to_numpy()

    def total(x):
        return x.groupby(group, sort=False).sum()

    def each(x):
        return x.groupby(group, sort=False)

    n = by.size()

    def corr(x, y, mask=None):
        if mask is not None:
            x, y = x.where(mask), y.where(mask)
        m = each(x).count()
        dx, dy = x - each(x).transform("mean"), y - each(y).transform("mean")
        assert len(m)
        return total(dx * dy) / np.sqrt(total(dx * dx) * total(dy * dy))

    s2 = total(r * r)
    mad = each((r - each(r).transform("median")).abs()).transform("median")
    jump = total(r.where(r.abs() > 3 * 1.4826 * mad, 0.0))
    high, low, mean_p = by["high"].max(), by["low"].min(), by["close"].mean()
    lagged = by["volume"].shift(1)
    result = pd.DataFrame(
        {
            "instrument": by["instrument"].first(),
            "datetime": by["datetime"].first().dt.normalize(),
            "ms_rv": np.sqrt(s2),
            "ms_skew": np.sqrt(n) * total(r**3) / s2**1.5,
            "ms_kurt": n * total(r**4) / s2**2,
            "ms_down_ratio": total((r * r).where(r < 0, 0.0)) / s2,
            "ms_jump": jump,
            "ms_mom": total(r) - jump,
            "ms_overnight": np.nan,
            "ms_ret_open30": total(r.where(k < 30, 0.0)),
            "ms_ret_mid": total(r.where((k >= 30) & (k < 210), 0.0)),
            "ms_ret_last30": total(r.where(k >= 210, 0.0)),
            "ms_vol_open30": total(v.where(k < 30, 0.0)) / total(v),
            "ms_vol_last30": total(v.where(k >= 210, 0.0)) / total(v),
            "ms_vhhi": total(v * v) / total(v) ** 2,
            "ms_vvol": by["volume"].std(ddof=0) / by["volume"].mean(),
            "ms_apb": np.log(mean_p / (total(a) / total(v))),
            "ms_arpp": (mean_p - low) / (high - low),
            "ms_corr_pv": corr(p, v),
            "ms_corr_rv": corr(r.abs(), v),
            "ms_corr_lag": corr(r, lagged, k > 0),
            "ms_illiq": each(r.abs() / a).mean(),
            "ms_trend": np.log(by["close"].last() / by["open"].first()).abs()
            / total(r.abs()),
            "ms_mdd": each(1 - p / by["close"].cummax()).max(),
        }
    )
    result.to_parquet(out)


def with_ours(source, out):
    """Reduce by this package, in one process on all cores, file to file."""
    store = out.with_suffix(f".{time.monotonic_ns()}")  # a new one: nothing to reuse
    build("ms", source, store, progress=False)
    shutil.move(store / "ms" / "2024.parquet", out)
    shutil.rmtree(store)


def compare(a, b):
    """Greatest difference of two result files, relative, floor 1e-3 (illiq none)."""
    x, y = (pd.read_parquet(f).astype({"instrument": str}) for f in (a, b))
    for frame in (x, y):
        frame["datetime"] = pd.to_datetime(frame["datetime"])
    x, y = (
        f.sort_values(["datetime", "instrument"], ignore_index=True) for f in (x, y)
    )
    worst = 0.0
    for name in MINUTE_NAMES:
        u, w = x[name].to_numpy(float), y[name].to_numpy(float)
        if name in ("ms_overnight", "ms_mom"):
            continue  # a matter of the day before; only ours knows it
        if not np.array_equal(np.isnan(u), np.isnan(w)):
            raise SystemExit(f"{name}: NaN in different places")
        floor = 1e-15 if name == "ms_illiq" else 1e-3
        off = np.abs(u - w) / np.maximum(np.abs(u), floor)
        worst = max(worst, float(np.nanmax(off, initial=0)))
    return worst


def timed(call, runs):
    """Median (wall, processor) seconds of `runs` calls after one not counted."""
    call()
    seconds = []
    for _ in range(runs):
        start, used = time.perf_counter(), time.process_time()
        call()
        seconds.append((time.perf_counter() - start, time.process_time() - used))
    wall, cpu = np.median(seconds, axis=0)
    return float(wall), float(cpu)


def speed(what, rows, seconds, own=True):
    """Row of a table: millions of rows a second, of wall and of processor time.

    The second says what an idle machine would do on one core: other programs take wall
    time away, but hardly any of the work's own processor time. Work in other processes
    has none that is known here.
    """
    row = {"what": what, "M rows/s": rows / 1e6 / seconds[0]}
    if own:
        row["M rows a CPU second"] = rows / 1e6 / seconds[1]
    return row


def write_ticks(root, stocks, rows, day="2024-03-01", seed=0):
    """Write trades, orders and quotes with about `rows` rows together.

    Two orders a trade and a fifth as many snapshots as trades, ten levels, in the mix
    of a real Shanghai day; the stocks differ in activity as stocks do.
    """
    rng = np.random.default_rng(seed)
    share = rng.lognormal(0, 1, stocks)
    n_trades = np.maximum((rows / 3.2 * share / share.sum()).astype(int), 20)
    block = (n_trades.cumsum() // (AT_ONCE / 3.2)).astype(int)
    names = pa.array([f"SH{600000 + s}" for s in range(stocks)])
    writers = {}
    total = 0
    for k in np.unique(block):
        own = np.flatnonzero(block == k)
        for table, cols in tick_tables(rng, own, n_trades[own], names, day).items():
            data = pa.table(cols)
            if table not in writers:
                path = Path(root) / table / f"{day}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                writers[table] = pq.ParquetWriter(path, data.schema, compression="zstd")
            writers[table].write_table(data, row_group_size=1 << 18)
            total += data.num_rows
    for writer in writers.values():
        writer.close()
    return total


def tick_tables(rng, stocks, n_trades, names, day):
    """Columns of the three tables for some stocks."""
    start = np.datetime64(day, "us")

    def base(counts):
        n = int(counts.sum())
        code = np.repeat(np.arange(len(stocks), dtype=np.int32), counts)
        span = rng.random(n) * 14_220
        span = span[np.lexsort((span, code))]  # sorted within each stock
        second = np.where(span < 7200, 34_200 + span, 39_600 + span)
        stamp = start + (second * 1e6).astype(np.int64)
        label = pa.array(stocks[code].astype(np.int32))
        column = pa.DictionaryArray.from_arrays(label, names)
        return n, code, {"instrument": column, "time": stamp}

    n, code, trades = base(n_trades)
    half = np.maximum(n_trades // 2, 1)[code]
    trades |= {
        "price": np.round(10 + rng.normal(0, 0.05, n), 2),
        "volume": rng.integers(1, 50, n) * 100,
        "buy_id": (rng.random(n) * half).astype(np.int64) * 2 + 1,
        "sell_id": (rng.random(n) * half).astype(np.int64) * 2 + 2,
        "side": rng.choice(np.array([1, -1], dtype=np.int8), n),
    }
    n, _, orders = base(2 * n_trades)
    orders |= {
        "price": np.round(10 + rng.normal(0, 0.05, n), 2),
        "volume": rng.integers(1, 50, n) * 100,
        "side": rng.choice(np.array([1, -1], dtype=np.int8), n),
        "order_id": np.arange(n) + 1,
        "action": rng.choice(np.array([1, 1, 1, -1], dtype=np.int8), n),
    }
    n, _, quotes = base(np.maximum(n_trades // 5, 5))
    for k in range(1, 11):
        for side, sign in (("bid", -1), ("ask", 1)):
            quotes[f"{side}_price_{k}"] = np.full(n, 10 + sign * 0.01 * k)
            quotes[f"{side}_volume_{k}"] = rng.integers(1, 500, n) * 100.0
    return {"trades": trades, "orders": orders, "quotes": quotes}


def one_day_memory(source, out):
    """Build one day in a fresh process. Returns (seconds, peak MiB, base MiB)."""
    # Not ru_maxrss: a new process inherits its parent's.
    code = (
        "import re, sys, time\n"
        "from pathlib import Path\n"
        "from data_handlers.aggregate.build import build\n"
        "def peak():\n"
        "    text = Path('/proc/self/status').read_text()\n"
        "    return int(re.search(r'VmHWM:\\s*(\\d+)', text)[1]) / 1024\n"
        "base = peak()\n"
        "t = time.perf_counter()\n"
        "build('l2', sys.argv[1], sys.argv[2], progress=False)\n"
        "print(time.perf_counter() - t, peak(), base)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(source), str(out)],
        check=True,
        capture_output=True,
        text=True,
    )
    return tuple(float(x) for x in run.stdout.split())


def minute_part(root, quick, cluster, tables):
    """Compare the ways to reduce minute bars. Returns what a stock's year takes."""
    stocks, runs = (200, 2) if quick else (1500, 5)
    file = root / "bars" / "2024-03.parquet"
    n = write_bars(file, stocks, 21)
    size = file.stat().st_size / n
    ways = {"ours": with_ours, "numpy": with_numpy, "pandas": with_pandas}
    if _has("polars"):
        ways["polars"] = with_polars
    else:
        print("polars is not installed: left out", flush=True)
    out = {k: root / f"{k}.parquet" for k in ways}
    rows = []
    for name, way in ways.items():
        print(f"minute bars: {name}", flush=True)
        way(file, out[name])
        count = 1 if name == "pandas" else runs
        taken = timed(lambda way=way, name=name: way(file, out[name]), count)
        row = speed(f"{name}, 22 features, file to file", n, taken)
        if name != "ours":
            row["differs from ours at most"] = compare(out["ours"], out[name])
        rows.append(row)
    rows.append(
        speed("reading the file alone", n, timed(lambda: pq.read_table(file), runs))
    )
    table = pq.read_table(file).combine_chunks()
    for threads in (1, 2):
        call = functools.partial(reduce_minutes, table, threads=threads)
        rows.append(speed(f"ours, in memory, {threads} threads", n, timed(call, runs)))
    title = f"{n / 1e6:.2f} million 1-minute bars, {size:.1f} bytes each on disk"
    tables.append((title, rows))
    del table
    rate, out_size = workers_part(root, stocks, runs, cluster, tables)
    bars = 240 * YEAR
    return {
        "features": "ms",
        "source rows": bars,
        "source MiB": size * bars / 2**20,
        "seconds": bars / rate,
        "result KiB": out_size * YEAR / 1024,
    }


def workers_part(root, stocks, runs, cluster, tables):
    """Time whole builds of several months. Returns (rows/s, bytes a stock-day)."""
    months = ["2024-03", "2024-04", "2024-05", "2024-06"]
    source = root / "months"
    n = sum(
        write_bars(source / f"{m}.parquet", stocks // 2, 21, f"{m}-01") for m in months
    )
    rows, rate = by_workers("ms", source, n, root, runs, cluster)
    tables.append((f"Build of {len(months)} months, {n / 1e6:.2f} million bars", rows))
    out = root / "ms-local-1-0" / "ms" / "2024.parquet"
    return rate, out.stat().st_size / pq.read_metadata(out).num_rows


def by_workers(kind, source, n, root, runs, cluster):
    """Rows of a table: builds with 1 and 2 workers, and on clusters; first's rate."""
    cases = [("local", 1), ("local", 2)]
    backends = (("ray", "ray"), ("dask", "distributed")) if cluster else ()
    cases += [(b, 2) for b, m in backends if _has(m)]
    rows, rate = [], 0.0
    for backend, workers in cases:
        print(f"build {kind}: {backend}, {workers} workers", flush=True)
        count = itertools.count()
        begin = time.perf_counter()
        with cluster_of(backend, workers) as address:
            ready = time.perf_counter() - begin

            def run(backend=backend, workers=workers, address=address, count=count):
                out = root / f"{kind}-{backend}-{workers}-{next(count)}"
                options = {"workers": workers, "backend": backend, "address": address}
                build(kind, source, out, progress=False, **options)

            taken = timed(run, runs if backend == "local" else 2)
        what = f"{backend}, {workers} workers" if workers > 1 else "1 worker, threads"
        row = speed(what, n, taken, own=workers == 1)
        if backend != "local":
            row["s to start the cluster"] = ready
        rows.append(row)
        rate = rate or n / taken[0]
    return rows, rate


@contextlib.contextmanager
def cluster_of(backend, workers):
    """Local cluster, kept up over several builds; yields its address if it has one."""
    if backend == "ray":
        import ray

        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
        try:
            yield None  # the builds use the Ray of this process
        finally:
            ray.shutdown()
    elif backend == "dask":
        from dask.distributed import LocalCluster

        options = {"n_workers": workers, "threads_per_worker": 1}
        with LocalCluster(dashboard_address=None, **options) as cluster:
            yield cluster.scheduler_address
    else:
        yield None


def tick_part(root, quick, full, cluster, tables):
    """Time tick features and follow their memory. Returns what a year takes."""
    sizes = [0.5e6, 1e6, 2e6] if quick else [2e6, 4e6, 8e6, 16e6, 32e6, 64e6]
    if full:
        sizes.append(FULL_DAY)
    rows, points = [], []
    for size in sizes:
        print(f"ticks: a day of {size / 1e6:g} million rows", flush=True)
        source = root / f"ticks-{int(size)}"
        n = write_ticks(source, int(max(20, size / TICKS_A_STOCK)), size)
        if not points:
            # Compiles the kernels where they are not, and reads the libraries.
            one_day_memory(source, root / "warm")
        seconds, peak, base = one_day_memory(source, root / f"l2-{int(size)}")
        points.append((n, peak, base))
        rows.append(
            {
                "M rows": n / 1e6,
                "M rows/s": n / 1e6 / seconds,
                "peak MiB": peak,
                "of it without data": base,
                "bytes a row": (peak - base) / n * 2**20,
            }
        )
        if size != sizes[0]:
            shutil.rmtree(source)
    tables.append(("One day of ticks, one process, both cores, file to file", rows))
    if not full:
        tables.append(forecast(points))
    days = ["2024-03-01", "2024-03-04", "2024-03-05", "2024-03-06"]
    source = root / "ticks-days"
    n = sum(write_ticks(source, 60, sizes[1] / 2, d, k) for k, d in enumerate(days))
    size = sum(f.stat().st_size for f in source.glob("*/*.parquet")) / n
    rows, rate = by_workers("l2", source, n, root, 3, cluster)
    tables.append((f"Build of {len(days)} days, {n / 1e6:.2f} million ticks", rows))
    out = root / "l2-local-1-0" / "l2" / "2024.parquet"
    out_size = out.stat().st_size / pq.read_metadata(out).num_rows
    ticks = [
        pq.read_table(root / f"ticks-{int(sizes[0])}" / t)
        for t in ("trades", "orders", "quotes")
    ]
    total = sum(t.num_rows for t in ticks)
    rows = []
    for threads in (1, 2):
        call = functools.partial(aggregate_ticks, *ticks, threads=threads)
        rows.append(speed(f"in memory, {threads} threads", total, timed(call, 3)))
    tables.append((f"Tick features of {total / 1e6:.2f} million rows in memory", rows))
    ticks_a_year = TICKS_A_STOCK * YEAR
    return {
        "features": "l2",
        "source rows": ticks_a_year,
        "source MiB": size * ticks_a_year / 2**20,
        "seconds": ticks_a_year / rate,
        "result KiB": out_size * YEAR / 1024,
    }


def forecast(points):
    """Peak memory of a whole market's day by lines through measured days.

    Days of more than 16 million rows are read stock range by stock range, so growth
    flattens there: the line through the smaller days is too high.
    """
    x, y = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    rows = []
    for name, use in (("up to 17 M rows", x <= 17e6), ("above 17 M rows", x > 17e6)):
        if use.sum() < 2:
            continue
        slope, zero = np.polyfit(x[use], y[use], 1)
        rows.append(
            {
                "line through days": name,
                "days": int(use.sum()),
                "bytes a row": slope * 2**20,
                "GiB at 150 M rows": (zero + slope * FULL_DAY) / 1024,
            }
        )
    return "Forecast of a whole market's day, 150 million rows", rows


def _has(module):
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def main():
    options = parser(__doc__)
    options.add_argument("--full", action="store_true", help="add 150 million ticks")
    options.add_argument("--part", choices=["minute", "ticks"], help="only this part")
    options.add_argument("--no-cluster", action="store_true", help="no Ray, no Dask")
    options = options.parse_args()
    cluster = not options.no_cluster
    env = environment(options.threads)
    env["cores"] = len(os.sched_getaffinity(0))
    tables, years = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if options.part != "ticks":
            years.append(minute_part(root, options.quick, cluster, tables))
        if options.part != "minute":
            years.append(tick_part(root, options.quick, options.full, cluster, tables))
    title = f"One stock's year: {YEAR} days, {TICKS_A_STOCK:,} ticks a day, both cores"
    tables.append((title, years))
    for title, rows in tables:
        print_table(title, rows, env, None)
    if options.json:
        data = [{"title": t, "rows": r} for t, r in tables]
        text = json.dumps({"environment": env, "tables": data}, indent=1)
        Path(options.json).write_text(text)


if __name__ == "__main__":
    main()
