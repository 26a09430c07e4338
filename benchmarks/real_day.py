"""Day-bar models on real A-shares: RankIC, IC_IR and top group, with baselines.

python benchmarks/real_day.py [--quick] [--json FILE] [--store DIR] [--models A B ...]

Universe: all stocks of the store (`daily_cn_1000`: 827 names, a random sample of the
market as listed in 2023, so survivorship remains). Train 2012-2016, valid 2017, test
2018-2020, 11 trading days apart. Label: return from the close of t+1 to the close of
t+11, neutralised on industry (and size where the store has a market cap), standardised
over the day. RankIC against the raw return every 10 trading days; IC_IR not annualised.
Top group: best of 20, weekly, next-day close, no costs, hedged against the pool's equal
weight, geometric, x 252.

Every task comes from a file of workflows/ with the overrides below. Each finished run
leaves a file in --runs, so that a stopped study goes on where it was, and several
processes can share the work (--models). Without --store the store is built from
$QLIB_EXT_DATA by `qlib-ext ingest`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from harness import environment, parser, peak_mib, show

ROOT = Path(__file__).resolve().parents[1]
OURS = {"n_epochs": 20, "early_stop": 5, "GPU": 0, "checkpoint_dir": None}
# Windows cost 15 times more a sample: every tenth day, as the label spans ten.
WINDOWS = {**OURS, "mode": "windows", "day_stride": 10}
MODELS = {
    "single stream": ("rnn_day_single", {**OURS, "n_seeds": 1}),
    "multi stream": ("rnn_day_multi", OURS),
    "single windows": ("rnn_day_single", {**WINDOWS, "n_seeds": 1}),
    "multi windows": ("rnn_day_multi", WINDOWS),
    "LightGBM Alpha158": ("lightgbm_alpha158", {}),
    "Linear Alpha158": ("linear_alpha158", {}),
    "Qlib GRU_ts": ("gru_ts_day", {"n_epochs": 1}),
}
SEEDLESS = ("Linear Alpha158",)


def task_of(name: str, seed: int, threads: int, quick: bool) -> dict:
    from qlib_ext.workflow import load_workflow

    file, overrides = MODELS[name]
    task = load_workflow(ROOT / "workflows" / f"{file}.yaml")["task"]
    kwargs = task["model"]["kwargs"]
    kwargs.update(overrides)
    if name not in SEEDLESS:
        kwargs["seed"] = seed
    if "num_threads" in kwargs:
        kwargs["num_threads"] = threads
    if quick and "n_epochs" in kwargs:
        kwargs["n_epochs"] = 1
    return task


def run(name: str, seed: int, target: Path, threads: int, quick: bool) -> None:
    """Train and predict one model; leave its scores and times in `target`."""
    from qlib.utils import auto_filter_kwargs, init_instance_by_config

    task = task_of(name, seed, threads, quick)
    started = time.perf_counter()
    np.random.seed(seed)
    torch.manual_seed(seed)
    model = init_instance_by_config(task["model"])
    dataset = init_instance_by_config(task["dataset"])
    loaded = time.perf_counter()
    auto_filter_kwargs(model.fit)(dataset, evals_result={})
    fitted = time.perf_counter()
    score = model.predict(dataset)
    done = time.perf_counter()
    frame = pd.DataFrame({"score": score.astype(np.float64)})
    frame["label"] = dataset.handler.fetch(col_set="label", data_key="raw").iloc[:, 0]
    frame.attrs = {}
    times = {
        "load_s": loaded - started,
        "fit_s": fitted - loaded,
        "predict_s": done - fitted,
        "peak_mib": peak_mib(),
        "load": os.getloadavg()[0],
        "threads": threads,
        "history": getattr(model, "history_", None),
    }
    temporary = target.with_suffix(".tmp")
    frame.reset_index().to_parquet(temporary)
    target.with_suffix(".json").write_text(json.dumps(times, default=float))
    os.replace(temporary, target)


def figures(score: pd.Series, label: pd.Series, close: pd.DataFrame) -> dict:
    """RankIC every 10 days, its IR, and the top group's hedged annual return."""
    from qlib_ext.metrics import (
        layer_backtest,
        non_overlapping,
        performance,
        rank_ic,
        summarise,
    )
    from qlib_ext.report.tables import week_ends

    wide = score.unstack("instrument")
    raw = label.unstack("instrument").reindex_like(wide)
    x, y = torch.tensor(wide.to_numpy()), torch.tensor(raw.to_numpy(dtype=float))
    daily = rank_ic(x, y)
    ten = summarise(daily[non_overlapping(daily, 10)])
    prices = close.reindex(index=wide.index, columns=wide.columns)
    layers = layer_backtest(
        x, torch.tensor(prices.to_numpy(dtype=float)), week_ends(wide.index), 20
    )
    hedged = performance(layers.returns[:, 19] - layers.returns[:, 20])
    return {
        "RankIC %": 100 * ten.mean,
        "IC_IR": ten.ir,
        "daily RankIC %": 100 * float(daily.nanmean()),
        "top hedged %": 100 * hedged.annual_return,
    }


def table(runs: Path, seeds: int) -> list[dict]:
    from qlib.data import D

    close = D.features(D.instruments("all"), ["$close"], "2018-01-01", "2020-12-31")
    close = close["$close"].unstack("instrument")
    rows = []
    for name in MODELS:
        found, times, scores, label = [], [], [], None
        for seed in range(seeds):
            file = runs / f"{name.replace(' ', '_')}-{seed}.parquet"
            if not file.exists():
                continue
            frame = pd.read_parquet(file).set_index(["datetime", "instrument"])
            label = frame["label"]
            scores.append(frame["score"])
            found.append(figures(frame["score"], label, close))
            times.append(json.loads(file.with_suffix(".json").read_text()))
        if not found:
            continue
        mean = pd.DataFrame(found).mean()
        spread = pd.DataFrame(found).std()
        row: dict = {"model": name, "seeds": len(found)}
        for key in mean.index:
            row[key] = f"{mean[key]:.2f}"
            row[key] += f" ± {spread[key]:.2f}" if len(found) > 1 else ""
        if len(scores) > 1:
            ranks = [s.groupby("datetime").rank(pct=True) for s in scores]
            together = figures(sum(ranks) / len(ranks), label, close)
            row["RankIC % of averaged seeds"] = f"{together['RankIC %']:.2f}"
        row["fit s"] = f"{np.mean([t['fit_s'] for t in times]):,.0f}"
        row["threads"] = times[0]["threads"]
        row["load"] = f"{np.mean([t['load'] for t in times]):.1f}"
        rows.append(row)
    return rows


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--store", help="a Qlib store; built from $QLIB_EXT_DATA if absent")
    p.add_argument("--runs", default="real_day_runs", help="where runs are kept")
    p.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--first-seed", type=int, default=0)
    p.add_argument("--table", action="store_true", help="only show what is there")
    args = p.parse_args()
    env = environment(args.threads)
    store = args.store
    if store is None:
        store = "data/cn_1000"
        if not Path(store).exists():
            data = Path(
                os.environ.get("QLIB_EXT_DATA", ROOT.parent / "shared" / "data")
            )
            subprocess.run(
                [sys.executable, "-m", "qlib_ext.cli", "ingest", store,
                 "--preset", "daily_cn_1000", "--data", str(data)],
                check=True,
            )  # fmt: skip
    import qlib

    qlib.init(provider_uri=store, region="cn", kernels=1)
    runs = Path(args.runs)
    runs.mkdir(parents=True, exist_ok=True)
    for seed in range(args.first_seed, 1 if args.quick else args.seeds):
        for name in args.models:
            target = runs / f"{name.replace(' ', '_')}-{seed}.parquet"
            if args.table or target.exists() or (seed and name in SEEDLESS):
                continue
            print(f"--- {name}, seed {seed}", flush=True)
            run(name, seed, target, args.threads, args.quick)
    show(
        f"{store}: test 2018-2020, 10-day label, {args.seeds} seeds, mean ± std",
        table(runs, args.seeds),
        env,
        args.json,
    )


if __name__ == "__main__":
    main()
