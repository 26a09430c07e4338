"""Speed and memory of the minute and tick aggregates, beside other ways to do it.

    python benchmarks/aggregate.py [--quick] [--json FILE]

Minute bars: 22 features of simulated 1-minute A-share bars, from a Parquet file to a
Parquet file, by this package, polars, pandas and numpy; the four results are compared
before any time is printed. Ticks: 20 features of simulated trades, orders and quotes,
file to file, with 1 and 2 workers, and the peak memory of a process by the size of the
day. Every time is the median of several runs after a first one that is not counted;
numbers depend on the machine, so compare within one run.
"""

import argparse
import functools
import json
import os
import resource
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

from data_handlers.aggregate.build import build
from data_handlers.aggregate.minute import MINUTE_NAMES, aggregate_minutes
from data_handlers.aggregate.ticks import aggregate_ticks

SLOTS = np.r_[np.arange(570, 690), np.arange(780, 900)]
FULL_DAY = 150e6  # ticks of all A-shares on one day


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


def rates(show, name, rows, seconds, own=True):
    """Print millions of rows a second, and of processor time where it is known.

    The second says what an idle machine would do: other programs take wall time away,
    but hardly any of the work's own processor time.
    """
    unit = "Mbars" if name.startswith("minute") else "Mrows"
    show(f"{name}.{unit}_s", rows / 1e6 / seconds[0])
    if own:
        show(f"{name}.{unit}_per_cpu_s", rows / 1e6 / seconds[1])


def write_ticks(root, stocks, rows, day="2024-03-01", seed=0):
    """Write trades, orders and quotes with about `rows` rows together.

    Two orders a trade and a fifth as many snapshots as trades, ten levels, in the mix
    of a real Shanghai day; the stocks differ in activity as stocks do.
    """
    rng = np.random.default_rng(seed)
    share = rng.lognormal(0, 1, stocks)
    n_trades = np.maximum((rows / 3.2 * share / share.sum()).astype(int), 20)
    names = pa.array([f"SH{600000 + s}" for s in range(stocks)])
    start = np.datetime64(day, "us")

    def base(counts):
        n = int(counts.sum())
        code = np.repeat(np.arange(stocks, dtype=np.int32), counts)
        span = rng.random(n) * 14_220
        # sorted within each stock
        order = np.lexsort((span, code))
        span = span[order]
        second = np.where(span < 7200, 34_200 + span, 39_600 + span)
        stamp = start + (second * 1e6).astype(np.int64)
        column = pa.DictionaryArray.from_arrays(pa.array(code), names)
        return n, code, {"instrument": column, "time": stamp}

    total = 0
    n, code, cols = base(n_trades)
    price = np.round(10 + rng.normal(0, 0.05, n), 2)
    half = np.maximum(n_trades // 2, 1)[code]
    cols |= {
        "price": price,
        "volume": rng.integers(1, 50, n) * 100,
        "buy_id": (rng.random(n) * half).astype(np.int64) * 2 + 1,
        "sell_id": (rng.random(n) * half).astype(np.int64) * 2 + 2,
        "side": rng.choice(np.array([1, -1], dtype=np.int8), n),
    }
    save(root, "trades", day, cols)
    total += n
    n, code, cols = base(2 * n_trades)
    cols |= {
        "price": np.round(10 + rng.normal(0, 0.05, n), 2),
        "volume": rng.integers(1, 50, n) * 100,
        "side": rng.choice(np.array([1, -1], dtype=np.int8), n),
        "order_id": np.arange(n) + 1,
        "action": rng.choice(np.array([1, 1, 1, -1], dtype=np.int8), n),
    }
    save(root, "orders", day, cols)
    total += n
    n, code, cols = base(np.maximum(n_trades // 5, 5))
    for k in range(1, 11):
        for side, sign in (("bid", -1), ("ask", 1)):
            cols[f"{side}_price_{k}"] = np.full(n, 10 + sign * 0.01 * k)
            cols[f"{side}_volume_{k}"] = rng.integers(1, 500, n) * 100.0
    save(root, "quotes", day, cols)
    return total + n


def save(root, table, day, cols):
    """Write one tick table."""
    folder = Path(root) / table
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{day}.parquet"
    pq.write_table(pa.table(cols), path, compression="zstd", row_group_size=1 << 18)


def one_day_memory(source, out):
    """Build one day in a fresh process. Returns (seconds, peak MiB, base MiB)."""
    code = (
        "import resource, sys, time\n"
        "from data_handlers.aggregate.build import build\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "t = time.perf_counter()\n"
        "build('l2', sys.argv[1], sys.argv[2], progress=False)\n"
        "s = time.perf_counter() - t\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(s, peak / 1024, base / 1024)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(source), str(out)],
        check=True,
        capture_output=True,
        text=True,
    )
    return tuple(float(x) for x in run.stdout.split())


def minute_part(root, quick, cluster, show):
    """Compare the ways to reduce minute bars."""
    stocks, runs = (200, 2) if quick else (1500, 3)
    file = root / "bars" / "2024-03.parquet"
    n = write_bars(file, stocks, 21)
    size = file.stat().st_size / n
    show(f"1-minute bars: {n / 1e6:.2f} million, {size:.1f} bytes each on disk", None)
    out = {k: root / f"{k}.parquet" for k in ("ours", "numpy", "polars", "pandas")}
    ways = {"ours": with_ours, "numpy": with_numpy, "pandas": with_pandas}
    try:
        import polars  # noqa: F401

        ways["polars"] = with_polars
    except ImportError:
        show("polars is not installed: left out", None)
    for name, way in ways.items():
        way(file, out[name])
        if name != "ours":
            show(
                f"  {name} differs from ours (float32) by at most",
                compare(out["ours"], out[name]),
            )
    rates(show, "minute.read_only", n, timed(lambda: pq.read_table(file), runs))
    for name, way in ways.items():
        count = 1 if name == "pandas" else runs
        seconds = timed(lambda way=way, name=name: way(file, out[name]), count)
        rates(show, f"minute.{name}", n, seconds)
    table = pq.read_table(file)
    for threads in (1, 2):
        call = functools.partial(aggregate_minutes, table, threads=threads)
        rates(show, f"minute.kernel.{threads}_threads", n, timed(call, runs))
    workers_part(root, stocks, runs, cluster, show)


def workers_part(root, stocks, runs, cluster, show):
    """Time whole builds, several months, with 1 and 2 workers and on clusters."""
    months = ["2024-03", "2024-04", "2024-05", "2024-06"]
    source = root / "months"
    n = sum(
        write_bars(source / f"{m}.parquet", stocks // 2, 21, f"{m}-01") for m in months
    )
    cases = [("local", 1), ("local", 2)]
    backends = (("ray", "ray"), ("dask", "distributed")) if cluster else ()
    cases += [(b, 2) for b, m in backends if _has(m)]
    for backend, workers in cases:
        count = iter(range(1000))

        def run(backend=backend, workers=workers, count=count):
            out = root / f"store-{backend}-{workers}-{next(count)}"
            build("ms", source, out, workers=workers, backend=backend, progress=False)
            return out

        # A cluster's start is part of its first run only where it stays up; ours is
        # started and stopped by each build, so it is in every figure.
        seconds = timed(run, 1 if backend != "local" else runs)
        name = f"minute.build.{backend}_{workers}_workers"
        rates(show, name, n, seconds, own=workers == 1)
    out = root / "store-local-1-0" / "ms" / "2024.parquet"
    days = pq.read_metadata(out).num_rows
    show("minute.build.bytes_per_stock_day", out.stat().st_size / days)


def tick_part(root, quick, cluster, show):
    """Time tick features and follow their memory."""
    sizes = (0.5e6, 1e6, 2e6) if quick else (2e6, 4e6, 8e6, 16e6, 32e6)
    points = []
    for size in sizes:
        source = root / f"ticks-{int(size)}"
        n = write_ticks(source, int(max(20, size / 30_000)), size)
        warm = root / f"warm-{int(size)}"
        if not points:
            one_day_memory(source, warm)  # compiles the kernels where they are not
        seconds, peak, base = one_day_memory(source, root / f"l2-{int(size)}")
        points.append((n, peak, base))
        show(f"ticks.one_day.{n / 1e6:.1f}M_rows.Mrows_s", n / 1e6 / seconds)
        show(f"ticks.one_day.{n / 1e6:.1f}M_rows.peak_MiB", peak)
    show("ticks.process_without_data.peak_MiB", points[0][2])
    x = np.array([p[0] for p in points])
    y = np.array([p[1] for p in points])
    # Rows beyond 16 million are read stock range by stock range, so growth flattens;
    # the line through the smaller days is the cautious forecast.
    small = x <= 17e6
    slope, at_zero = np.polyfit(x[small], y[small], 1)
    show("ticks.memory.bytes_per_row_below_16M", slope * 2**20)
    line = at_zero + slope * FULL_DAY
    show("ticks.memory.full_market_day_if_linear_GiB", line / 1024)
    if (~small).any():
        growth = (y[-1] - y[-2]) / (x[-1] - x[-2])
        end = (y[-1] + growth * (FULL_DAY - x[-1])) / 1024
        show("ticks.memory.full_market_day_from_last_two_GiB", end)
    days = ["2024-03-01", "2024-03-04", "2024-03-05", "2024-03-06"]
    source = root / "ticks-days"
    per_day = sizes[1] / 2
    n = sum(write_ticks(source, 60, per_day, d, k) for k, d in enumerate(days))
    cases = [("local", 1), ("local", 2)] + (
        [("ray", 2)] if cluster and _has("ray") else []
    )
    for backend, workers in cases:
        count = iter(range(1000))

        def run(backend=backend, workers=workers, count=count):
            out = root / f"l2-{backend}-{workers}-{next(count)}"
            build("l2", source, out, workers=workers, backend=backend, progress=False)

        seconds = timed(run, 1 if backend != "local" else 2)
        name = f"ticks.build.{backend}_{workers}_workers"
        rates(show, name, n, seconds, own=workers == 1)
    tables = [
        pq.read_table(root / f"ticks-{int(sizes[0])}" / t)
        for t in ("trades", "orders", "quotes")
    ]
    rows = sum(t.num_rows for t in tables)
    for threads in (1, 2):
        call = functools.partial(aggregate_ticks, *tables, threads=threads)
        rates(show, f"ticks.kernel.{threads}_threads", rows, timed(call, 2))


def _has(module):
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, one minute")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--part", choices=["minute", "ticks"], help="only this part")
    parser.add_argument("--no-cluster", action="store_true", help="no Ray, no Dask")
    options = parser.parse_args()
    cluster = not options.no_cluster
    numbers = {"cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}

    def show(name, value):
        if value is None:
            print(name, flush=True)
            return
        numbers[name] = value
        print(f"{name:52s} {value:12.4g}", flush=True)

    print(f"{numbers['cores']} cores, load average {numbers['load']:.1f} at the start")
    with tempfile.TemporaryDirectory() as folder:
        if options.part != "ticks":
            minute_part(Path(folder), options.quick, cluster, show)
        if options.part != "minute":
            tick_part(Path(folder), options.quick, cluster, show)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    show("peak_MiB_of_this_process", peak)
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
