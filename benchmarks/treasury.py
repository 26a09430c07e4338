"""Treasury-bond futures on real data: whether minutes steady what days overfit.

Walk-forward tests of RNN, LSTM and GRU, on daily bars alone and with the last day's
five-minute bars, on the sample data (QLIB_EXT_DATA or --data):

- minutes: T (tests 2024-01..06 and 07..12) and TL (2024-07..09 and 10..12), both
  channels on the same days and splits;
- days: T, TF, TS (tests 2021 to 2024, trained on the four years before the validation
  year) and TL (2024-07..12), day channel.

Settings are the model's defaults but for the learning rate and length of training, and
were not tuned. Label: open of t+1 to open of t+2. Account: one lot, long or short by
the sign, 28 CNY a lot and side. Rows go to benchmarks/results/treasury.csv; the tables
are printed from there (--tables prints them alone).
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import qlib
from harness import environment, has_row, parser, put_row, read_rows, show
from scipy.stats import norm

from data_handlers.futures import FuturesHandler
from qlib_ext.aggregates import build_store
from qlib_ext.dataset import PanelDataset
from qlib_ext.ingest.run import ingest
from qlib_ext.ingest.store import read_bars
from qlib_ext.models import DualChannel
from qlib_ext.portfolio.timing import Timing, by_group, regimes, summary, trade

HERE = Path(__file__).parent
FILE = HERE / "results" / "treasury.csv"
PRESET = HERE / "presets" / "futures_daily_cn.yaml"
_SIGNS = {1: "+", -1: "-", 0: "0"}
CELLS = ("LSTM", "GRU", "RNN")
FIXED: dict[str, Any] = {"lr": 0.003, "n_epochs": 15, "early_stop": 6, "GPU": -1}

Period = tuple[str, str, str, str, str]  # train from, train to, valid to, test from, to
MINUTES: dict[str, list[Period]] = {
    "T": [
        ("2022-12-16", "2023-09-28", "2023-12-27", "2024-01-02", "2024-06-28"),
        ("2022-12-16", "2024-03-29", "2024-06-26", "2024-07-01", "2024-12-31"),
    ],
    "TL": [
        ("2023-12-13", "2024-04-30", "2024-06-26", "2024-07-01", "2024-09-30"),
        ("2023-12-13", "2024-07-31", "2024-09-26", "2024-10-08", "2024-12-31"),
    ],
}
DAYS: dict[str, list[Period]] = {
    **{
        name: [
            (
                f"{y - 5}-01-01",
                f"{y - 2}-12-31",
                f"{y - 1}-12-29",
                f"{y}-01-01",
                f"{y}-12-31",
            )
            for y in range(2021, 2025)
        ]
        for name in ("T", "TF", "TS")
    },
    "TL": [("2023-04-24", "2024-02-29", "2024-06-26", "2024-07-01", "2024-12-31")],
}


def main() -> None:
    """Run what is missing, then print the tables."""
    p = parser(__doc__, threads=1)
    p.add_argument("--data", default=os.environ.get("QLIB_EXT_DATA", "data"))
    p.add_argument("--tables", action="store_true")
    p.add_argument("--seeds", type=int, default=3)
    args = p.parse_args()
    env = environment(args.threads)
    if not args.tables:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder) / "store", Path(args.data), args, env)
    tables(env, args.json)


def run(store: Path, data: Path, args: Any, env: dict[str, Any]) -> None:
    """Make the store, prove its rolls by minutes, and fit what has no row yet."""
    ingest(store, PRESET, data=data)
    minute = data / "tbond_futures_5min_cn.parquet"
    print(build_store("bars", minute, store, mapping=PRESET, progress=False))
    prove_rolls(store, minute)
    qlib.init(provider_uri=str(store), region="cn", kernels=1, logging_level=30)
    for study, plan, channels in (
        ("minutes", MINUTES, ("dual", "day")),
        ("days", DAYS, ("day",)),
    ):
        for name, periods in plan.items():
            todo = [
                (cell, channel)
                for cell in CELLS
                for channel in channels
                if not has_row(FILE, f"{study} {name} {cell} {channel}", args.seeds - 1)
            ]
            if todo:
                of_product(store, study, name, periods, todo, args.seeds, env)


def prove_rolls(store: Path, minute: Path) -> None:
    """Count the rule's rolls, and those that the minutes show.

    One contract's open interest can't move between two bars by more than the later
    bar's volume.
    """
    bars = pd.read_parquet(minute).sort_values(["instrument", "time"])
    for name, own in bars.groupby("instrument"):
        day = own["time"].dt.normalize()
        by = own.groupby(day)
        moved = by["open_interest"].first() - by["open_interest"].last().shift()
        shown = set(moved.index[moved.abs() > by["volume"].first()])
        held = read_bars(store, [f"CFFEX.{name}"], ["factor"]).set_index("datetime")
        step = held["factor"].pct_change().abs() > 1e-7
        ruled = {d for d in step.index[step] if d >= day.min()}
        print(
            f"rolls of {name} since {day.min():%Y-%m-%d}: {len(ruled)} by the rule, "
            f"{len(shown)} shown by minutes, {len(ruled & shown)} both"
        )


def of_product(
    store: Path,
    study: str,
    name: str,
    periods: list[Period],
    todo: list[tuple[str, str]],
    seeds: int,
    env: dict[str, Any],
) -> None:
    """Fit all periods of a product and put a row a model and seed."""
    code = f"CFFEX.{name}"
    bars = read_bars(store, [code], ["open", "close", "factor"]).set_index("datetime")
    names = regimes(bars["close"]).shift()
    found: dict[tuple[str, str, int], dict[str, list]] = {}
    began = time.perf_counter()
    for first, train, valid, start, end in periods:
        early = pd.Timestamp(first) - pd.Timedelta(days=120)
        handler = FuturesHandler(
            instruments=[code],
            start_time=early,
            end_time=end,
            fit_start_time=first,
            fit_end_time=train,
            bars_path="{store}/bars" if study == "minutes" else None,
        )
        after = pd.Timestamp(train) + pd.Timedelta(days=1)
        data = PanelDataset(
            handler,
            {"train": (first, train), "valid": (after, valid), "test": (start, end)},
            purge="trim",
        )
        for cell, channel in todo:
            model = DualChannel(
                rnn=cell,
                channels=channel,
                n_seeds=seeds,
                chunk=40 if study == "minutes" else 80,
                **FIXED,
            )
            model.fit(data)
            for part in ("test", "train"):
                out, panel, days = model.infer(data, part, ("score",))
                for seed, one in enumerate(out):
                    score = panel.series(one["score"].unsqueeze(-1), days, ["score"])
                    kept = found.setdefault(
                        (cell, channel, seed), {"test": [], "train": []}
                    )
                    kept[part].append(score["score"].droplevel("instrument"))
    for (cell, channel, seed), kept in found.items():
        account = trade(pd.concat(kept["test"]), bars, Timing(), code)
        account = account.loc[: periods[-1][4]]
        figures = summary(account)
        groups = by_group(account, names.reindex(account.index).to_numpy())
        met = [_met(score, bars) for score in kept["train"]]
        train_rate = float(np.mean(np.concatenate(met)))
        row = {
            "model": f"{study} {name} {cell} {channel}",
            "seed": seed,
            "train_hit_rate": train_rate,
            **figures,
            **{
                f"{what} {market}": groups.loc[market, what]
                for market in ("rising", "falling", "sideways")
                for what in ("calls", "hit_rate", "annual_return")
                if market in groups.index
            },
            "from": periods[0][3],
            "to": periods[-1][4],
            "fit_s": (time.perf_counter() - began) / len(found),
            **{
                k: env[k] for k in ("threads", "load", "cpu", "torch", "qlib", "python")
            },
        }
        put_row(FILE, row, [])


def _sides(account: pd.DataFrame) -> np.ndarray:
    """1 where a day's call was right, -1 wrong, 0 none or no move."""
    met = np.sign(account["position"] * account["next_return"])
    return met.fillna(0).astype(int).to_numpy()


def _met(score: pd.Series, bars: pd.DataFrame) -> np.ndarray:
    """Tell whether each call was right; days without a move are left out."""
    ahead = bars["open"].shift(-2) / bars["open"].shift(-1) - 1
    met = np.sign(score * ahead.reindex(score.index))
    return (met[met.abs() > 0] > 0).to_numpy()


def tables(env: dict[str, Any], file: str | None) -> None:
    """Print the results: each model, and the two channels against each other."""
    rows = read_rows(FILE)
    rows[["study", "product", "cell", "channel"]] = rows["model"].str.split(expand=True)
    keys = ["study", "product", "channel", "cell"]
    shown = []
    for key, of in rows.groupby(keys, sort=False):
        mean = of.mean(numeric_only=True)
        shown.append(
            {
                **dict(zip(keys, key, strict=True)),
                "seeds": len(of),
                "calls": int(mean["calls"]),
                "hit %": 100 * mean["hit_rate"],
                "± seeds": 100 * of["hit_rate"].std(),
                "low %": 100 * mean["low"],
                "high %": 100 * mean["high"],
                "always long %": 100 * mean["long_hit_rate"],
                "train hit %": 100 * mean["train_hit_rate"],
                "p of shifts": mean["p_value"],
                "falling %": 100 * mean.get("hit_rate falling", np.nan),
                "net return %": 100 * mean["annual_return"],
                "held %": 100 * mean["long_return"],
                "Sharpe": mean["sharpe"],
            }
        )
    show("Timing, mean over seeds", shown, env, file)
    paired = []
    for product in MINUTES:
        for cell in CELLS:
            one = rows[(rows["product"] == product) & (rows["cell"] == cell)]
            one = one[one["study"] == "minutes"].set_index(["channel", "seed"])["hits"]
            if set(one.index.unique("channel")) != {"dual", "day"}:
                continue
            hits = {
                channel: np.array([list(text) for text in one[channel]])
                for channel in ("dual", "day")
            }
            told = (hits["dual"] != "0") & (hits["day"] != "0")
            gaps = (hits["dual"] == "+").astype(float) - (hits["day"] == "+")
            # seeds see the same days: one value a day
            daily = pd.DataFrame(np.where(told, gaps, np.nan)).mean().dropna()
            error = daily.std() / len(daily) ** 0.5
            paired.append(
                {
                    "product": product,
                    "cell": cell,
                    "seeds": len(gaps),
                    "days": len(daily),
                    "dual - day, points": 100 * daily.mean(),
                    "low": 100 * (daily.mean() - norm.isf(0.025) * error),
                    "high": 100 * (daily.mean() + norm.isf(0.025) * error),
                }
            )
    show(
        "Hit rate of both channels minus that of days alone, paired by day",
        paired,
        env,
        None,
    )


if __name__ == "__main__":
    main()
