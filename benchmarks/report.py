"""IC and RankIC against Qlib's calc_ic, and a full factor report, in one run.

python benchmarks/report.py [--quick] [--json FILE]

Scores and labels of 3,000 stocks x 2,500 days, 3 % of either missing, labels rounded to
0.01 % so that ties occur as in real returns. `qlib.contrib.eva.alpha.calc_ic` is called
unchanged on the (datetime, instrument) Series that Qlib's records hold; ours is
measured on the panel, and on the same Series with the conversion to a panel included.
Best of three; CPU seconds are the process's own, all threads. The report is
`FactorRecord.generate` on a Qlib store of that size, from reading the predictions and
the store to the saved Parquet and HTML: RankIC, 20 layers, decay, three pools, costs
and limits, classic factors, incremental RankIC, style and industry exposures, 16 units.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from harness import environment, parser, peak_mib, show


def best_of(function: Callable[[], Any], times: int) -> tuple[dict[str, float], Any]:
    """Wall and CPU seconds of the fastest call, and what it returned."""
    best: dict[str, float] = {}
    result = None
    for _ in range(times):
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if not best or wall < best["seconds"]:
            best = {"seconds": wall, "CPU seconds": cpu}
    return best, result


def draw(stocks: int, days: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    score = rng.standard_normal((days, stocks), dtype=np.float32)
    label = 0.02 * score + 0.1 * rng.standard_normal((days, stocks), dtype=np.float32)
    label = label.round(4)
    for values in (score, label):
        values[rng.random(values.shape, dtype=np.float32) < 0.03] = np.nan
    return score, label


def index_of(stocks: int, days: int) -> pd.MultiIndex:
    return pd.MultiIndex.from_product(
        [
            pd.bdate_range("2010-01-04", periods=days),
            [f"SH{600000 + i}" for i in range(stocks)],
        ],
        names=["datetime", "instrument"],
    )


def correlations(stocks: int, days: int, times: int) -> list[dict[str, Any]]:
    from qlib.contrib.eva.alpha import calc_ic

    from qlib_ext import metrics
    from qlib_ext.report.tables import panel_of

    score, label = draw(stocks, days)
    index = index_of(stocks, days)
    a, b = (pd.Series(x.ravel(), index) for x in (score, label))
    panels = torch.from_numpy(score), torch.from_numpy(label)

    def from_series() -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (panel_of(s, index.levels[0], index.levels[1]) for s in (a, b))
        return metrics.ic(x, y), metrics.rank_ic(x, y)

    def qlib_float64() -> tuple[pd.Series, pd.Series]:
        return calc_ic(a.astype(np.float64), b.astype(np.float64))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer, expected = best_of(lambda: calc_ic(a, b), min(times, 2))
        peer64, _ = best_of(qlib_float64, min(times, 2))
    rows = [
        {"what": "Qlib calc_ic, float32", **peer},
        {"what": "Qlib calc_ic, float64", **peer64},
    ]
    fastest = min(peer["seconds"], peer64["seconds"])
    for name, function in (
        ("ours, panels", lambda: (metrics.ic(*panels), metrics.rank_ic(*panels))),
        ("ours, from the Series", from_series),
    ):
        spent, got = best_of(function, times)
        gap = max(
            float(np.nanmax(np.abs(x.numpy() - y.to_numpy(np.float64))))
            for x, y in zip(got, expected, strict=True)
        )
        rows.append(
            {
                "what": name,
                **spent,
                "times faster than Qlib's best": fastest / spent["seconds"],
                "largest difference": gap,
            }
        )
    return rows


def write_market(folder: Path, stocks: int, days: int) -> None:
    from qlib_ext.ingest.store import write_store

    rng = np.random.default_rng(1)
    shape = (days, stocks)
    close = 10 * np.exp(np.cumsum(0.02 * rng.standard_normal(shape), 0))
    close[rng.random(shape) < 0.02] = np.nan
    volume = np.exp(rng.standard_normal(shape) + 12)
    index = index_of(stocks, days)
    bars = pd.DataFrame(
        {
            "datetime": index.get_level_values(0),
            "instrument": index.get_level_values(1),
            "close": close.ravel().astype(np.float32),
            "vwap": (close * 1.001).ravel().astype(np.float32),
            "volume": volume.ravel().astype(np.float32),
            "amount": (volume * close).ravel().astype(np.float32),
            "turnover": (volume / 1e8).ravel().astype(np.float32),
            "limit_up": (close * 1.1).ravel().astype(np.float32),
            "limit_down": (close * 0.9).ravel().astype(np.float32),
        }
    ).dropna()
    start, end = index.levels[0][0], index.levels[0][-1]
    markets = {
        name: pd.DataFrame(
            {"instrument": index.levels[1][i::3], "start": start, "end": end}
        )
        for i, name in enumerate(("first", "second", "third"))
    }
    write_store(folder, bars, markets=markets)


class Units:
    """Stands for a trained model: its units are ready, only the report is timed."""

    def __init__(self, score: pd.Series, count: int) -> None:
        rng = np.random.default_rng(2)
        noise = rng.standard_normal((len(score), count), dtype=np.float32)
        columns = [f"unit_{k:02d}" for k in range(count)]
        noise += score.to_numpy()[:, None]
        self.units = pd.DataFrame(noise, score.index, columns)

    def predict_units(self, dataset: object, segment: str = "test") -> pd.DataFrame:
        """As a model with factor units has it."""
        return self.units


def full_report(stocks: int, days: int, folder: Path) -> list[dict[str, Any]]:
    import qlib
    from qlib.workflow import R

    from qlib_ext.record_temp import FactorRecord

    start = time.perf_counter()
    write_market(folder / "store", stocks, days)
    written = time.perf_counter() - start
    qlib.init(
        provider_uri=str(folder / "store"),
        region="cn",
        kernels=torch.get_num_threads(),
        logging_level=logging.ERROR,
        exp_manager={
            "class": "MLflowExpManager",
            "module_path": "qlib.workflow.expm",
            "kwargs": {
                "uri": f"sqlite:///{folder}/mlflow.db",
                "default_exp_name": "benchmark",
            },
        },
    )
    score, label = draw(stocks, days)
    # The first days are the look-back of the classic factors.
    index = index_of(stocks, days)
    late = index.get_level_values(0) >= index.levels[0][70]
    pred = pd.Series(score.ravel(), index)[late].dropna()
    rng = np.random.default_rng(3)
    risk = pd.DataFrame(
        rng.standard_normal((len(pred), 11), dtype=np.float32),
        pred.index,
        ["log_mcap", *(f"style_{k}" for k in range(10))],
    )
    risk["industry"] = pred.index.codes[1] % 31
    risk.to_parquet(folder / "risk.parquet")
    model = Units(pred, 16)
    with R.start(experiment_name="benchmark"):
        recorder = R.get_recorder()
        recorder.save_objects(
            **{
                "pred.pkl": pred.to_frame("score"),
                "label.pkl": pd.DataFrame({"LABEL0": label.ravel()}, index)[late],
            }
        )
        record = FactorRecord(
            recorder,
            model=model,
            dataset=object(),
            label="random",
            risk_path=str(folder / "risk.parquet"),
        )
        spent, _ = best_of(record.generate, 1)
    record.check(include_self=True)
    return [
        {"what": "full report", **spent, "peak MiB": peak_mib()},
        {"what": "(writing the store, not part of it)", "seconds": written},
    ]


def main() -> None:
    args = parser(__doc__ or "").parse_args()
    env = environment(args.threads)
    stocks, days = (300, 500) if args.quick else (3000, 2500)
    rows = correlations(stocks, days, 1 if args.quick else 3)
    with tempfile.TemporaryDirectory() as folder:
        rows += full_report(stocks, days, Path(folder))
    show(f"IC, RankIC and report, {stocks} stocks x {days} days", rows, env, args.json)


if __name__ == "__main__":
    main()
