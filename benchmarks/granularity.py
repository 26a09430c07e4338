"""Multi-granularity on real 15-minute bars: days, weeks, parts of the day, and a GRU.

python benchmarks/granularity.py [--stocks N] [--epochs N] [--seeds N] [--store DIR]

The only real minute bars here span 2025 and 604 Shanghai stocks priced 5 to 20 CNY at
its end: chosen with hindsight, and one year, so nothing here is a level to expect. Of
them a fixed random sample of `--stocks`. Train 10 February to 11 July 2025, valid 22
July to 12 September, test 23 September to 22 December (60 days); label: return of 5
days from the close of t+1, neutralised on industry, standardised over the day.

Rows: the three sources of workflows/multi_granularity_5.yaml by themselves and their
average, and the plain GRU of workflows/base_recurrent.yaml with the same label. All are
32 wide, see at most `--epochs` epochs of every day, and know day bars since July 2024.
RankIC: daily against the raw return, mean over all starts of every fifth day, and its
standard error from such days. Rows go to benchmarks/results/cn_sh_granularity.csv.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from harness import data_folder, environment, parser, put_row, read_rows, show

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cn_sh_granularity.csv"
SEGMENTS = {
    "train": ("2025-02-10", "2025-07-11"),
    "valid": ("2025-07-22", "2025-09-12"),
    "test": ("2025-09-23", "2025-12-22"),
}
ORDER = ["GRU", "day", "week", "intraday", "average"]


def store_of(where: str | None, stocks: int) -> Path:
    """Build the store of the sample and its bars, once."""
    from data_handlers.aggregate.build import build
    from qlib_ext.ingest.run import ingest

    root = Path(where or f"runs/cn_sh_granularity_{stocks}/store")
    if (root / "bars").exists():
        return root
    data, scratch = data_folder(), root.parent
    scratch.mkdir(parents=True, exist_ok=True)
    bars = pd.read_parquet(data / "daily_cn_sh.parquet")
    bars = bars[pd.to_datetime(bars["date"]) >= "2024-03-01"]
    codes = np.sort(bars["instrument"].unique())
    drawn = np.random.default_rng(0).choice(codes, stocks, replace=False).tolist()
    bars[bars["instrument"].isin(drawn)].to_parquet(scratch / "daily.parquet")
    minute = pd.read_parquet(
        data / "minute15_cn_sh.parquet", filters=[("instrument", "in", drawn)]
    )
    minute["datetime"] = minute["datetime"].astype("datetime64[ns]")
    minute.to_parquet(scratch / "minute.parquet")
    ingest(
        root,
        ROOT / "benchmarks" / "presets" / "daily_cn_sh.yaml",
        data=data,
        files={"daily": [str(scratch / "daily.parquet")]},
        drop_bad_rows=True,
    )
    minutes = {"stamp": "end", "bar_minutes": 15, "progress": False}
    build("bars", scratch / "minute.parquet", root, **minutes)
    return root


def placed(config, epochs: int, seed: int):
    """Set dates, widths and epochs wherever a workflow has them."""
    if isinstance(config, list):
        return [placed(x, epochs, seed) for x in config]
    if not isinstance(config, dict):
        return config
    out = {k: placed(v, epochs, seed) for k, v in config.items()}
    if "fit_start_time" in out:
        parts = "parts" in out
        out["start_time"] = "2025-01-02" if parts else "2024-07-01"
        out["end_time"] = "2025-12-31"
        out["fit_start_time"], out["fit_end_time"] = SEGMENTS["train"]
    if "n_epochs" in out:
        out |= {"n_epochs": epochs, "seed": seed, "GPU": -1, "hidden_size": 32}
        out["checkpoint_dir"] = None
    if "day_stride" in out:
        out["day_stride"] = 1
    return out


def task_of(name: str, epochs: int, seed: int) -> dict:
    from qlib_ext.workflow import load_workflow

    task = load_workflow(ROOT / "workflows" / f"{name}.yaml")["task"]
    task = placed({k: task[k] for k in ("model", "dataset")}, epochs, seed)
    task["dataset"]["kwargs"]["segments"] = SEGMENTS
    task["dataset"]["kwargs"]["handler"]["kwargs"]["horizon"] = 5
    return task


def figures(score: pd.Series, label: pd.Series) -> dict[str, float]:
    from qlib_ext.metrics import rank_ic
    from qlib_ext.report.tables import panel_of

    days = score.index.unique("datetime").sort_values()
    codes = score.index.unique("instrument").sort_values()
    x, y = (panel_of(v, days, codes).double() for v in (score, label))
    daily = rank_ic(x, y)
    starts = [daily[k::5][torch.isfinite(daily[k::5])] for k in range(5)]
    return {
        "RankIC %": 100 * float(daily.nanmean()),
        "± %": 100 * float(np.mean([s.std() / len(s) ** 0.5 for s in starts])),
        "days": int(torch.isfinite(daily).sum()),
    }


def main() -> None:
    p = parser(__doc__ or "", threads=1)
    p.add_argument("--stocks", type=int, default=200)
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--store", help="a store with bars; built if absent")
    args = p.parse_args()
    env = environment(args.threads)
    import qlib
    from qlib.utils import init_instance_by_config

    store = store_of(args.store, args.stocks)
    qlib.init(provider_uri=str(store), region="cn", kernels=1, logging_level=30)
    label = None
    for seed in range(args.seeds):
        for name in ("base_recurrent", "multi_granularity_5"):
            task = task_of(name, args.epochs, seed)
            dataset = init_instance_by_config(task["dataset"])
            if label is None:
                label = dataset.handler.fetch(col_set="label", data_key="raw")
                label = label.iloc[:, 0]
            model = init_instance_by_config(task["model"])
            start = time.process_time()
            model.fit(dataset)
            found = {"GRU": model.predict(dataset)}
            if name != "base_recurrent":
                found = {
                    source: one.predict(model._dataset(source, dataset))
                    for source, one in model.models.items()
                }
                found["average"] = model.predict(dataset)
            seconds = time.process_time() - start
            for one, score in found.items():
                row = {"model": one, "seed": seed, **figures(score, label)}
                row |= {"stocks": args.stocks, "epochs": args.epochs, "cpu_s": seconds}
                put_row(RESULTS, row, ORDER)
                print(row, flush=True)
    rows = read_rows(RESULTS)
    show("Granularities, 2025, 5-day label", rows.to_dict("records"), env, args.json)


if __name__ == "__main__":
    main()
