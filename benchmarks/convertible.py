"""Convertible bonds: the GRU with attributes of the day beside simple rules.

python benchmarks/convertible.py [--data DIR] [--store DIR] [--seeds N] [--models A …]
                                 [--results FILE] [--quick] [--json FILE]

Without --store the files of --data (or QLIB_EXT_DATA) are ingested by the preset
cb_daily_cn: 573 bonds, train 2017-2019, valid 2020, test 2021-01 to 2022-03, labels of
segments trimmed not to touch. With --store, a store of bonds of your own; one of the
embedded market has an oracle, which is judged too.

Universe: listed, quoted, not called, remaining size of 30 million CNY or more.
Label: return from the close of t+1 to that of t+6, standardised over the day.

double low     minus (close + 100 x conversion premium)
premium        minus conversion premium
linear         ridge regression of the label on the attributes of the day
LightGBM       on the series' features and the attributes of the day
GRU            the series, and the attributes joined before its last layer
GRU, series    the same without attributes

RankIC: mean over all test days against the raw return, in all bonds and in each pool by
parity; IR: its mean over its standard deviation, days. Top: the best of 5 groups at
each week's end, filled at the next close, minus the pool's equal weight without costs,
geometric over 252 days; net: after --cost a side; turnover: one-sided, a week.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pandas as pd
import qlib
import torch
from harness import environment, mean_and_spread, parser, put_row, read_rows, show
from qlib.data import D
from sklearn.linear_model import Ridge

from data_handlers.convertible import POOLS, ConvertibleHandler
from data_handlers.universe import instrument_spans, membership_mask
from qlib_ext.dataset import PanelDataset
from qlib_ext.ingest.run import ingest
from qlib_ext.market import oracle_path
from qlib_ext.metrics import layer_backtest, rank_ic, week_ends
from qlib_ext.models import MultiFactorRNN

HERE = Path(__file__).resolve().parent
SEGMENTS = {
    "train": ("2017-01-03", "2019-12-31"),
    "valid": ("2020-01-02", "2020-12-31"),
    "test": ("2021-01-04", "2022-03-31"),
}
EMBEDDED = {
    "train": ("2013-01-01", "2016-12-31"),
    "valid": ("2017-01-01", "2017-12-31"),
    "test": ("2018-01-01", "2020-12-31"),
}
MODELS = ("double low", "premium", "linear", "LightGBM", "GRU", "GRU, series")
SEEDED = ("LightGBM", "GRU", "GRU, series")
GRU = {
    "n_factors": 1,
    "hidden_size": 32,
    "num_layers": 1,
    "step_len": 20,
    "n_epochs": 12,
    "early_stop": 4,
    "GPU": -1,
}
GROUPS = 5


class Bench:
    """The data of one store, and the figures of a score on its test days."""

    def __init__(self, segments: dict[str, tuple[str, str]], cost: float) -> None:
        first, last = segments["train"][0], segments["test"][1]
        handler = ConvertibleHandler(
            start_time=first,
            end_time=last,
            fit_start_time=first,
            fit_end_time=segments["train"][1],
        )
        self.data = PanelDataset(handler, segments, purge="trim")
        self.cost = cost
        self.panel = panel = self.data.panel
        self.test = panel.days(self.data.segments["test"])
        days, names = panel.dates[self.test], list(panel.instruments)
        frame = D.features(names, ["$close", "$conv_premium"], days[0], days[-1])
        wide = frame.unstack("instrument").reindex(days)
        self.close, self.premium = (
            wide[f].reindex(columns=names).to_numpy(np.float64)
            for f in ("$close", "$conv_premium")
        )
        present = panel.present[self.test].numpy()
        self.pools = {"all": present}
        for pool in POOLS:
            spans = instrument_spans(pool)
            self.pools[pool] = present & membership_mask(spans, days, names)

    def flat(self, segment: str, series: bool) -> tuple[np.ndarray, ...]:
        """Rows of a segment: inputs, labels, and where they stand."""
        panel, days = self.panel, self.panel.days(self.data.segments[segment])
        parts = [panel.attributes[days]]
        if series:
            parts.insert(0, panel.features[days])
        at = panel.present[days].numpy()
        x = torch.cat(parts, -1).numpy()[at]
        return x, panel.labels[days][..., 0].numpy()[at], at

    def score(self, model: str, seed: int) -> np.ndarray:
        """Scores [t, n] of the test days."""
        if model == "double low":
            return -(self.close + 100 * self.premium)
        if model == "premium":
            return -self.premium
        if model == "linear":
            x, y, _ = self.flat("train", False)
            ok = np.isfinite(y)
            fitted = Ridge(alpha=1.0).fit(np.nan_to_num(x[ok]), y[ok])
            x, _, at = self.flat("test", False)
            return self._filled(at, fitted.predict(np.nan_to_num(x)))
        if model == "LightGBM":
            sets = []
            for segment in ("train", "valid"):
                x, y, _ = self.flat(segment, True)
                ok = np.isfinite(y)
                sets.append(lightgbm.Dataset(x[ok], y[ok]))
            options = {
                "objective": "mse", "learning_rate": 0.05, "num_leaves": 31,
                "min_data_in_leaf": 500, "feature_fraction": 0.8, "seed": seed,
                "bagging_fraction": 0.8, "bagging_freq": 1, "verbosity": -1,
                "num_threads": torch.get_num_threads(),
            }  # fmt: skip
            stop = lightgbm.early_stopping(30, verbose=False)
            tree = lightgbm.train(
                options, sets[0], 500, valid_sets=[sets[1]], callbacks=[stop]
            )
            x, _, at = self.flat("test", True)
            return self._filled(at, tree.predict(x))
        net = MultiFactorRNN(attributes=model == "GRU", seed=seed, **GRU)
        net.fit(self.data)
        score = net.predict(self.data).unstack("instrument")
        days = self.panel.dates[self.test]
        return score.reindex(index=days, columns=self.panel.instruments).to_numpy()

    def _filled(self, at: np.ndarray, values: np.ndarray) -> np.ndarray:
        out = np.full(at.shape, np.nan)
        out[at] = values
        return out

    def figures(self, score: np.ndarray) -> dict[str, Any]:
        """See the module's docstring."""
        label = self.panel.raw_labels[self.test][..., 0]
        close = torch.from_numpy(self.close)
        weeks = week_ends(self.panel.dates[self.test])
        out: dict[str, Any] = {}
        for pool, member in self.pools.items():
            inside = torch.from_numpy(np.where(member, score, np.nan))
            ic = rank_ic(inside.float(), label, min_count=5)
            ic = ic[torch.isfinite(ic)]
            if not len(ic):
                continue
            out[f"bonds {pool}"] = float(member.sum(1).mean())
            out[f"RankIC % {pool}"] = 100 * float(ic.mean())
            out[f"IR {pool}"] = float(ic.mean() / ic.std())
            free, net = (
                layer_backtest(inside, close, weeks, GROUPS, buy_cost=c, sell_cost=c)
                for c in (0.0, self.cost)
            )
            for name, test in (("top", free), ("net", net)):
                both = torch.stack([test.returns[:, GROUPS - 1], free.returns[:, -1]])
                both = both[:, torch.isfinite(both).all(0)]
                growth = (1 + both).log().mean(1) * 252
                out[f"{name} % {pool}"] = 100 * float(growth[0].exp() - growth[1].exp())
            turn = free.turnover[1:, GROUPS - 1]
            out[f"turnover % {pool}"] = 100 * float(turn.nanmean())
        return out


def table(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Mean and spread over seeds, one row a model."""
    out = []
    for model, part in rows.groupby("model", sort=False):
        line: dict[str, Any] = {"model": model, "seeds": len(part)}
        for pool in ("all", *POOLS):
            for name in ("RankIC %", "IR", "top %", "net %", "turnover %"):
                column = f"{name} {pool}"
                if column not in part or part[column].isna().all():
                    continue
                digits = 2 if name in ("RankIC %", "IR") else 1
                line[column] = mean_and_spread(part[column], digits)
        out.append(line)
    return out


def main() -> None:
    """Run what is asked for and print the table."""
    p = parser(__doc__ or "", threads=1)
    p.add_argument("--data", default=os.environ.get("QLIB_EXT_DATA"))
    p.add_argument("--store")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    p.add_argument("--cost", type=float, default=0.0005, help="share of the amount")
    p.add_argument("--results", default=HERE / "results" / "cn_cb.csv", type=Path)
    args = p.parse_args()
    env = environment(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(args.store or Path(folder) / "bonds")
        if args.store is None:
            if args.data is None:
                p.error("give --data, QLIB_EXT_DATA or --store")
            done = ingest(
                store,
                HERE / "presets" / "cb_daily_cn.yaml",
                data=args.data,
                drop_bad_rows=True,
            )
            print(done.report.to_text())
        qlib.init(provider_uri=str(store), region="cn", kernels=1, logging_level=30)
        oracle = oracle_path(store)
        bench = Bench(EMBEDDED if oracle.is_file() else SEGMENTS, args.cost)
        wanted = [
            (model, seed)
            for model in args.models
            for seed in range(
                (1 if args.quick else args.seeds) if model in SEEDED else 1
            )
        ]
        rows: list[dict[str, Any]] = []
        if oracle.is_file():
            frame = pd.read_parquet(oracle).set_index(["datetime", "instrument"])
            wide = frame["total"].unstack("instrument")
            days, names = bench.panel.dates[bench.test], bench.panel.instruments
            true = wide.reindex(index=days, columns=names).to_numpy()
            rows.append({"model": "oracle", "seed": 0, **bench.figures(true)})
        for model, seed in wanted:
            start = time.process_time()
            score = bench.score(model, seed)
            took = time.process_time() - start
            figures = bench.figures(score)
            row = {"model": model, "seed": seed, **figures, "cpu_s": took}
            row |= {k: env[k] for k in ("threads", "cpu", "torch", "qlib", "python")}
            rows.append(row)
            print(f"{model} {seed}: RankIC {figures['RankIC % all']:.2f} %, {took:.0f}")
            if args.store is None:
                put_row(args.results, row, list(MODELS))
        every = pd.DataFrame(rows)
        if args.store is None:
            every = read_rows(args.results)
        show("Convertible bonds", table(every), env, args.json)


if __name__ == "__main__":
    main()
