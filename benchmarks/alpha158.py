"""Alpha158: Qlib, this package's engine, KunQuant and polars_ta in one run.

python benchmarks/alpha158.py [--stocks 304] [--days 1500] [--store DIR] [--threads 2]
    [--qlib-stocks 20] [--json FILE] [--large] [--score] [--handler]

Without a store, bins of random walks with holes are written to a temporary folder.
Times of one thread are processor seconds (the machine may be shared); every contender
starts from what it reads:

- *Qlib* and *ours, handler's loader*: from bins to a frame;
- *reading bins*: `read_panel` alone; *ours*: from fields in memory to values;
- *KunQuant* (its predefined Alpha158, float32, TS layout) and *polars_ta* (as many of
  its features as it has, by expression): from arrays or a frame in memory to values;
  both only if installed.

Qlib works stock by stock, so it is timed on some stocks and multiplied. Memory is the
growth of the process' peak over what the result takes, each contender in a process of
its own. With ``--large``: the loader alone on 5,000 stocks and 2,500 days, two threads,
which takes some 9 GB. With ``--score``: seconds of `qlib-ext score` for the store's
last days by a small network on Alpha158 (`PanelDataset`), nothing else. With
``--handler``: `FastAlpha158` beside Qlib's `Alpha158`, both with Qlib's own processors,
from bins to the scores of a LightGBM, all stocks, one thread; peaks are over the bare
features, and the scores of the two are compared.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import qlib
from harness import environment, parser, show

FIELDS = ("open", "high", "low", "close", "vwap", "volume", "amount")


def write_bins(folder: Path, stocks: int, days: int) -> None:
    """Random walks, one stock in ten late or with a suspension."""
    rng = np.random.default_rng(0)
    calendar = pd.bdate_range("2010-01-04", periods=days)
    (folder / "calendars").mkdir(parents=True)
    (folder / "instruments").mkdir()
    (folder / "calendars" / "day.txt").write_text(
        "\n".join(calendar.strftime("%Y-%m-%d")) + "\n"
    )
    lines = []
    for i in range(stocks):
        code = f"SH{600000 + i}"
        begin = int(rng.integers(0, days // 2)) if i % 10 == 0 else 0
        n = days - begin
        close = 10 * np.exp(np.cumsum(rng.normal(size=n) * 0.02))
        spread = np.abs(rng.normal(size=(2, n))) * 0.01
        values = {
            "close": close,
            "open": close * np.exp(rng.normal(size=n) * 0.01),
            "volume": np.exp(rng.normal(size=n)) * 1e6,
        }
        values["high"] = np.maximum(close, values["open"]) * (1 + spread[0])
        values["low"] = np.minimum(close, values["open"]) * (1 - spread[1])
        values["vwap"] = (values["high"] + values["low"] + close) / 3
        values["amount"] = values["vwap"] * values["volume"]
        if i % 10 == 1:
            at = int(rng.integers(0, n - 30))
            for part in values.values():
                part[at : at + 30] = np.nan
        own = folder / "features" / code.lower()
        own.mkdir(parents=True)
        for name, part in values.items():
            np.hstack([[begin], part]).astype("<f4").tofile(own / f"{name}.day.bin")
        lines.append(f"{code}\t{calendar[begin]:%Y-%m-%d}\t{calendar[-1]:%Y-%m-%d}")
    (folder / "instruments" / "all.txt").write_text("\n".join(lines) + "\n")


def _timed(work, times=1):
    """Least processor and wall seconds of some calls, and what the last one gave."""
    spent, made = [], None
    for _ in range(times):
        del made  # two results at once would count in the peak
        cpu, wall = time.process_time(), time.perf_counter()
        made = work()
        spent.append((time.process_time() - cpu, time.perf_counter() - wall))
    return *map(min, zip(*spent, strict=True)), made


def _pair():
    from qlib.contrib.data.handler import Alpha158

    return Alpha158.get_feature_config(None)


def _qlib(store, threads, few):
    from qlib.data import D

    qlib.init(provider_uri=store, region="cn", kernels=1, logging_level=50)
    codes = D.list_instruments(D.instruments("all"), as_list=True)
    part = codes[:: max(1, len(codes) // few)][:few]
    began = time.process_time()
    D.features(part, _pair()[0])
    return {"seconds": (time.process_time() - began) * len(codes) / len(part)}


def _ours(store, threads, few):
    from qlib.data import D

    from data_handlers.expression import Evaluator, parse, read_panel
    from data_handlers.expression.loading import ExpressionLoader

    qlib.init(provider_uri=store, region="cn", kernels=threads, logging_level=50)
    codes = sorted(D.list_instruments(D.instruments("all"), as_list=True))
    loader = ExpressionLoader({"feature": _pair()})
    loader.load(codes[:1])  # compiled code is read
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first, wall, frame = _timed(lambda: loader.load("all"))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    size = frame.shape[0] * frame.shape[1] * 4
    del frame
    if size > 2e9:  # a whole market: the loader alone
        return {
            "loader": first,
            "loader wall": wall,
            "peak over result": peak / size,
            "result, GB": size / 1e9,
        }
    cpu, wall, _ = _timed(lambda: loader.load("all"))
    nodes = [parse(e) for e in _pair()[0]]
    fields = sorted({f for n in nodes for f in n.fields})
    last = len(D.calendar()) - 1
    reading, _, panel = _timed(lambda: read_panel(fields, codes, 0, last))
    inside = panel.inside(fields)
    rows = np.full(inside.shape, -1, np.int64)
    rows[inside] = np.arange(inside.sum())
    out = np.zeros((len(nodes), int(inside.sum())), np.float32)  # pages touched
    made = _timed(
        lambda: Evaluator(panel, threads=threads).fill(nodes, rows, 0, out), 5
    )
    return {
        "seconds": made[0],
        "wall": made[1],
        "reading": reading,
        "loader, first": first,
        "loader": cpu,
        "loader wall": wall,
        "peak over result": peak / size,
        "result, GB": size / 1e9,
    }


def _kunquant(store, threads, few):
    from KunQuant.Driver import KunCompilerConfig
    from KunQuant.jit import cfake
    from KunQuant.Op import Builder, Input, Output
    from KunQuant.predefined import Alpha158
    from KunQuant.runner import KunRunner as kr
    from KunQuant.Stage import Function

    arrays, shape = _arrays(store)
    t, n = shape
    lanes = 8
    n = n // lanes * lanes
    builder = Builder()
    names = ("open", "close", "high", "low", "volume", "vwap", "amount")
    with builder:
        given = {name: Input(name) for name in names}
        data = Alpha158.AllData(
            low=given["low"],
            high=given["high"],
            close=given["close"],
            open=given["open"],
            amount=given["amount"],
            volume=given["volume"],
            vwap=given["vwap"],
        )
        prices = [(k.upper(), given[k]) for k in ("open", "high", "low", "vwap")]
        made, labels = data.build(
            {"kbar": {}, "price": {"windows": [0], "feature": prices}, "rolling": {}}
        )
        for value, label in zip(made, labels, strict=True):
            Output(value, label)
    library = cfake.compileit(
        [
            (
                "alpha158",
                Function(builder.ops),
                KunCompilerConfig(input_layout="TS", output_layout="TS"),
            )
        ],
        "alpha158",
        cfake.CppCompilerConfig(),
    )
    module = library.getModule("alpha158")
    runner = (
        kr.createSingleThreadExecutor()
        if threads == 1
        else kr.createMultiThreadExecutor(threads)
    )
    inputs = {
        k: np.ascontiguousarray(arrays["$" + k][:, :n], np.float32) for k in names
    }
    outputs = {label: np.zeros((t, n), np.float32) for label in labels}
    cpu, wall, _ = _timed(lambda: kr.runGraph(runner, module, inputs, 0, t, outputs), 5)
    scale = shape[1] / n
    return {
        "seconds": cpu * scale,
        "wall": wall * scale,
        "features": len(labels),
    }


def _polars_ta(store, threads, few):
    import polars as pl
    from polars_ta.prefix.wq import (
        ts_corr,
        ts_max,
        ts_mean,
        ts_min,
        ts_rank,
        ts_std_dev,
    )

    arrays, (t, n) = _arrays(store)
    columns = {k.lstrip("$"): v.T.ravel() for k, v in arrays.items()}
    frame = pl.DataFrame({"code": np.repeat(np.arange(n), t), **columns})
    close, volume = pl.col("close"), pl.col("volume")
    made = []
    for w in (5, 10, 20, 30, 60):
        made += [
            close.shift(w) / close,
            ts_mean(close, w) / close,
            ts_std_dev(close, w) / close,
            ts_max(pl.col("high"), w) / close,
            ts_min(pl.col("low"), w) / close,
            ts_rank(close, w),
            ts_corr(close, (volume + 1).log(), w),
            ts_mean(volume, w) / volume,
            ts_std_dev(volume, w) / volume,
        ]
    named = [e.over("code").alias(f"x{k}") for k, e in enumerate(made)]
    cpu, wall, _ = _timed(lambda: frame.with_columns(named), 2)
    return {
        "seconds": cpu,
        "wall": wall,
        "features": len(made),
    }


def _init(store, threads, folder):
    """Start Qlib with runs of its own in a folder; their address."""
    uri = f"sqlite:///{folder}/mlflow.db"
    qlib.init(
        provider_uri=store,
        region="cn",
        kernels=threads,
        logging_level=50,
        exp_manager={
            "class": "MLflowExpManager",
            "module_path": "qlib.workflow.expm",
            "kwargs": {"uri": uri, "default_exp_name": "benchmark"},
        },
    )
    return uri


def _score(store, threads, few):
    import mlflow
    from qlib.data import D
    from qlib.workflow import R

    from data_handlers.alpha import FastAlpha158
    from qlib_ext.dataset import PanelDataset
    from qlib_ext.models import MultiFactorRNN
    from qlib_ext.rolling.score import score_day

    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(_init(store, threads, folder))
        mlflow.create_experiment("score", artifact_location=f"{folder}/runs")
        days = D.calendar()[-320:]
        fit = {"fit_start_time": days[0], "fit_end_time": days[180]}
        handler = FastAlpha158("all", days[0], days[-12], **fit)
        dataset = PanelDataset(
            handler,
            {
                "train": (days[0], days[180]),
                "valid": (days[200], days[240]),
                "test": (days[260], days[-12]),
            },
        )
        model = MultiFactorRNN(n_factors=1, hidden_size=16, n_epochs=1, seed=0, GPU=-1)
        with R.start(experiment_name="score"):
            model.fit(dataset)
            recorder = R.get_recorder()
            R.save_objects(**{"params.pkl": model})
            dataset.config(dump_all=False, recursive=True)
            R.save_objects(dataset=dataset)
        ahead = iter(days[-3:])
        first, *_ = _timed(lambda: score_day(recorder, next(ahead), trust=True))
        cpu, wall, _ = _timed(lambda: score_day(recorder, next(ahead), trust=True), 2)
    return {"first day": first, "later day": cpu, "later day, wall": wall}


def _handler(store, threads, few, name):
    """Make the handler, then fit and predict; scores too, for the comparison."""
    from qlib.contrib.data import handler as qlibs
    from qlib.contrib.model.gbdt import LGBModel
    from qlib.data import D
    from qlib.data.dataset import DatasetH

    from data_handlers import alpha

    folder = tempfile.TemporaryDirectory()
    _init(store, 1, folder.name)
    days = D.calendar()
    cut = [days[int(len(days) * share)] for share in (0, 0.6, 0.7, 0.75, 0.8)]
    make = getattr(alpha, name, None) or getattr(qlibs, name)
    make(D.list_instruments(D.instruments("all"), as_list=True)[:1], *cut[:2])

    def grown():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return (peak - held) / (4 * handler.fetch(col_set="feature").size)

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.process_time()
    handler = make("all")
    loaded = time.process_time() - began
    row = {"handler": loaded, "handler, peak": grown()}
    dataset = DatasetH(
        handler,
        {
            "train": (cut[0], cut[1]),
            "valid": (cut[2], cut[3]),
            "test": (cut[4], days[-1]),
        },
    )
    model = LGBModel(loss="mse", num_threads=1, seed=0, deterministic=True)
    model.fit(dataset, num_boost_round=50, verbose_eval=50)
    scores = model.predict(dataset)
    row |= {"to the scores": time.process_time() - began, "peak": grown()}
    return row | {"scores": scores.sort_index()}


def _arrays(store):
    from qlib.data import D

    from data_handlers.expression import read_panel

    qlib.init(provider_uri=store, region="cn", kernels=1, logging_level=50)
    codes = sorted(D.list_instruments(D.instruments("all"), as_list=True))
    panel = read_panel(FIELDS, codes, 0, len(D.calendar()) - 1)
    return panel.fields, (len(panel.days), len(codes))


def _apart(function, *args):
    """Run a contender in a process of its own; a row that says why if it cannot."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            return pool.apply(function, args)
        except Exception as error:  # a contender that cannot run is a row that says so
            return {"not run": f"{type(error).__name__}: {error}"[:90]}


def main() -> None:
    p = parser(__doc__, threads=1)
    p.add_argument("--store", help="Qlib day store (default: random walks)")
    p.add_argument("--stocks", type=int, default=304)
    p.add_argument("--days", type=int, default=1500)
    p.add_argument("--qlib-stocks", type=int, default=20)
    p.add_argument("--only", nargs="*", default=[], help="contenders to run")
    p.add_argument("--large", action="store_true", help="the loader on a whole market")
    p.add_argument("--score", action="store_true", help="scores of a day alone")
    p.add_argument("--handler", action="store_true", help="the two handlers alone")
    args = p.parse_args()
    if args.large:
        args.stocks, args.days, args.only = 5000, 2500, ["ours, 2 threads"]
    with tempfile.TemporaryDirectory() as folder:
        store = args.store
        if store is None:
            store = str(Path(folder) / "store")
            write_bins(Path(store), args.stocks, args.days)
        contenders = {
            "Qlib": (_qlib, 1),
            "ours": (_ours, 1),
            "ours, 2 threads": (_ours, 2),
            "KunQuant": (_kunquant, 1),
            "KunQuant, 2 threads": (_kunquant, 2),
            "polars_ta": (_polars_ta, 1),
        }
        if args.score:
            contenders = {"score of a day": (_score, 1)}
        if args.handler:
            contenders = {
                name: (_handler, 1, name) for name in ("Alpha158", "FastAlpha158")
            }
        rows = []
        for name, (function, threads, *more) in contenders.items():
            if args.only and name not in args.only:
                continue
            found = _apart(function, store, threads, args.qlib_stocks, *more)
            rows.append({"contender": name, **found})
        scores = [row.pop("scores") for row in rows if "scores" in row]
        if len(scores) == 2:
            rows[-1]["scores differ by"] = (scores[0] - scores[1]).abs().max()
        show("Alpha158, values from fields in memory", rows, environment(1), args.json)


if __name__ == "__main__":
    main()
