"""What Mamba's penalty and mixture do, on embedded markets whose truth is known.

python benchmarks/mamba_study.py [--quick] [--json FILE] [--threads 2] [--work DIR]
                                 [--markets style planted none]

style    A market in which calm stocks earn more (`style_alpha`), besides the planted
         alpha: the dual task with the penalty off and on. Exposure: correlation of the
         score with the volatility style; alpha: rank correlation with the planted
         expected return; risk: correlation of the learnt risk factor with the
         style-neutral return, and its t-value over days 10 apart, lowest of the seeds.
planted  Mixture of four experts (two labels, dual and neutral), two kept a stock, and
         the equal weight of the same experts. Entropy of the gate: 1 is equal weights
         of all four, 0.5 of two.
none     The same without alpha: the mixture must find nothing.

RankIC is against the raw 10-day return, mean over all test days; ± is the standard
deviation over seeds. Markets are kept in --work and made once.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from harness import environment, parser, show

MARKETS: dict[str, dict] = {
    "style": {"style_alpha": 0.02},
    "planted": {},
    "none": {"signal": "none"},
}
QUICK = {
    "stocks": 100,
    "years": 3,
    "seeds": 1,
    "segments": {
        "train": ("2018-01-01", "2019-06-14"),
        "valid": ("2019-07-03", "2019-12-13"),
        "test": ("2020-01-02", "2020-12-31"),
    },
    "model": {"n_epochs": 4, "early_stop": 4, "step_len": 30},
    "folds": {"n_folds": 2, "gate_n_epochs": 10},
}
FULL = {
    "stocks": 200,
    "years": 6,
    "seeds": 3,
    "segments": {
        "train": ("2015-01-01", "2017-12-14"),
        "valid": ("2018-01-01", "2018-12-14"),
        "test": ("2019-01-02", "2020-12-31"),
    },
    "model": {"n_epochs": 15, "early_stop": 5},
    "folds": {"n_folds": 2, "gate_n_epochs": 30},
}


def open_market(work: Path, size: dict, name: str, **switches):
    """Make the market if need be, and return its dataset and oracle."""
    import logging

    import qlib

    from data_handlers.day import DayHandler
    from qlib_ext.dataset import PanelDataset
    from qlib_ext.market import make_market

    store = work / f"{name}-{size['stocks']}-{size['years']}"
    if not store.exists():
        make_market(
            store, stocks=size["stocks"], years=size["years"], seed=11, **switches
        )
    qlib.init(provider_uri=str(store), region="cn", logging_level=logging.WARNING)
    train = size["segments"]["train"]
    handler = DayHandler(
        start_time=train[0],
        end_time="2020-12-31",
        fit_start_time=train[0],
        fit_end_time=train[1],
        horizon=[10, 5],
    )
    oracle = pd.read_parquet(f"{store}.oracle.parquet")
    oracle["datetime"] = pd.to_datetime(oracle["datetime"])
    return (
        PanelDataset(handler, dict(size["segments"])),
        oracle.set_index(["datetime", "instrument"]),
    )


def daily(a: pd.Series, b: pd.Series, ranked: bool) -> torch.Tensor:
    """Correlation of two series on each day."""
    from qlib_ext.metrics import ic, rank_ic

    wide = pd.DataFrame({"a": a, "b": b}).dropna().unstack()
    x, y = (torch.from_numpy(wide[k].to_numpy(np.float64)) for k in ("a", "b"))
    return (rank_ic if ranked else ic)(x, y)


def daily_mean(a: pd.Series, b: pd.Series, ranked: bool) -> float:
    return float(daily(a, b, ranked).nanmean())


def judge(score: pd.Series, dataset, oracle: pd.DataFrame) -> dict[str, float]:
    panel = dataset.panel
    days = panel.days(dataset.segments["test"])
    column = panel.risk_names.index("volatility")
    style = panel.series(panel.risk[days][..., column : column + 1], days, ["v"])["v"]
    raw = panel.series(panel.raw_labels[days], days, panel.label_names)["RET10"]
    return {
        "RankIC %": 100 * daily_mean(score, raw, True),
        "alpha %": 100 * daily_mean(score, oracle["day"], True),
        "exposure %": 100 * daily_mean(score, style, False),
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--work", help="folder for the markets; default a temporary one")
    p.add_argument("--markets", nargs="+", choices=MARKETS, default=list(MARKETS))
    args = p.parse_args()
    env = environment(args.threads)
    size = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory() as temporary:
        rows = study(Path(args.work or temporary), size, args.markets)
    title = "Mamba on embedded markets: {stocks} stocks, {years} years, {seeds} seed(s)"
    show(title.format(**size), rows, env, args.json)


def study(work: Path, size: dict, markets: list[str]) -> list[dict]:
    from qlib_ext.models import Mamba, MambaMoE

    mixture = {"tasks": ["dual", "alpha_neutral"], "fusion": "moe", **size["folds"]}
    plan = [
        ("style", "dual, penalty 0", Mamba, {"penalty": 0.0}),
        ("style", "dual, penalty 10", Mamba, {"penalty": 10.0}),
        ("planted", "mixture", MambaMoE, mixture),
        ("none", "mixture", MambaMoE, mixture),
    ]
    rows, data = [], {}
    for market, name, cls, kwargs in plan:
        if market not in markets:
            continue
        if market not in data:
            data = {market: open_market(work, size, market, **MARKETS[market])}
        dataset, oracle = data[market]
        found, equal, start = [], [], time.perf_counter()
        for seed in range(size["seeds"]):
            model = cls(**size["model"], **kwargs, seed=seed)
            model.fit(dataset)
            row = judge(model.predict(dataset), dataset, oracle)
            if cls is Mamba:
                row |= risk_figures(model, dataset)
            else:
                table = model.predict_experts(dataset)
                weights = table.filter(like="weight_")
                terms = weights * np.log(weights.clip(lower=1e-12))
                row["gate entropy"] = -terms.sum(axis=1).mean() / np.log(len(terms.T))
                experts = table.filter(like="score_")
                equal.append(judge(experts.mean(axis=1), dataset, oracle))
            found.append(row)
        minutes = (time.perf_counter() - start) / 60
        rows.append(over_seeds(market, name, found, minutes))
        if equal:
            rows.append(over_seeds(market, "equal weight", equal, minutes))
    return rows


def risk_figures(model, dataset) -> dict[str, float]:
    """How much of the style-neutral return the learnt risk factor tells."""
    from qlib_ext.metrics import non_overlapping, summarise

    panel = dataset.panel
    days = panel.days(dataset.segments["test"])
    residual = model._targets[1][days].unsqueeze(-1)
    residual = panel.series(residual, days, ["y"])["y"]
    each = daily(model.predict_risk(dataset), residual, False)
    apart = summarise(each[non_overlapping(each, 10)])
    t = apart.ir * apart.count**0.5
    return {"risk on residual %": 100 * float(each.nanmean()), "t of risk": t}


def over_seeds(market: str, name: str, found: list[dict], minutes: float) -> dict:
    table = pd.DataFrame(found)
    row: dict = {"market": market, "model": name}
    for column in table:
        if column == "t of risk":
            row[column] = float(table[column].min())
            continue
        row[column] = float(table[column].mean())
        row[f"± {column}"] = float(table[column].std())
    row["minutes"] = minutes
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
