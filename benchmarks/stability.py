"""How far a score moves from epoch to epoch and from seed to seed, and what moves.

python benchmarks/stability.py [--stocks N] [--seeds N] [--configs A B ...] [--table]

Store and stocks as in whole_market.py. Train 2008-2013, valid 2014, later 2015-2016:
all years before the test years of any study, so settings may be chosen here. K = 64,
10-day label neutral on industry and size. Every epoch's validation RankIC is split: of
the score, and of its residual net of industries and styles (docs/systems/rnn.md). After
the last epoch the later years are scored: the score as learnt, its residual, and the
residual plus b times the style part that the training years paid. Top: mean 10-day
return of the best twentieth less the day's mean, basis points, of stocks that have
traded on 60 days at least (new listings cannot be bought). "Units alike": mean over
every tenth later day of the mean absolute correlation between two of the K units.
"Seeds alike": mean over every fifth later day of the rank correlation of the score with
those of the seeds that this call trained before it.

Configurations: `chunk 20` is the default of the classes; `ema` averages its weights;
`parts` trains runs of 80 days of a quarter of the stocks at twice the step, these four
with dropout 0.1; `no dropout`, `one unit` and `long side` are `parts, ema` without it,
with K = 1, and with the labels above the day's 80 % quantile weighted three times; `160
days` are longer runs, with half the steps, and `of an eighth` with all of them; `five
epochs` is `no dropout` with the mean weights of its five best epochs; `300 stocks` and
`300 stocks, five epochs` are the same two with parts of that size, for --stocks 0, the
whole market. Those of `Mamba` (named only; label neutral on industry) ask why it falls
behind the GRU: its own defaults, the loop's settings above, three times the step, twice
the width; 30 epochs each.
Figures go to benchmarks/results/stability.csv, one row a run.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from harness import environment, has_row, parser, put_row, read_rows, show
from whole_market import ROOT, store_of, universe

PARTS = {"chunk": 80, "stock_parts": 4, "lr": 0.002}
AVERAGED = {**PARTS, "n_epochs": 10, "ema": 0.995}
NOISY = {"dropout": 0.1}  # as in the report
ONE = {**AVERAGED, "n_factors": 1}
CONFIGS = {
    "chunk 20": {**NOISY, "n_epochs": 15},
    "ema": {**NOISY, "n_epochs": 15, "ema": 0.995},
    "parts": {**NOISY, **PARTS, "n_epochs": 10},
    "parts, ema": {**NOISY, **AVERAGED},
    "no dropout": AVERAGED,
    "five epochs": {**AVERAGED, "best_epochs": 5},
    "300 stocks": {**AVERAGED, "stock_parts": 0},
    "300 stocks, five epochs": {**AVERAGED, "stock_parts": 0, "best_epochs": 5},
    "one unit": ONE,
    "one unit, no dropout": {**ONE, "dropout": 0.0},
    "one unit, 160 days": {**ONE, "chunk": 160},
    "one unit, 160 days of an eighth": {**ONE, "chunk": 160, "stock_parts": 8},
    "long side": {**NOISY, **AVERAGED, "long_weight": 3.0},
}
MAMBA = {"task": "alpha_neutral", "n_epochs": 30}
MAMBAS: dict[str, dict] = {
    "Mamba": MAMBA,
    "Mamba, parts, ema": {**MAMBA, **PARTS, "ema": 0.995},
    "Mamba, triple step": {**MAMBA, "lr": 0.003},
    "Mamba, parts, ema, triple step": {**MAMBA, **PARTS, "ema": 0.995, "lr": 0.006},
    "Mamba, parts, ema, 64 wide": {**MAMBA, **PARTS, "ema": 0.995, "d_model": 64},
}
TRAIN, VALID = ("2008-01-02", "2013-12-13"), ("2014-01-02", "2014-12-15")
LATER = ("2015-01-05", "2016-12-14")
TILTS = (0.0, 0.6, 1.0)


def dataset_of(names: object):
    from data_handlers.day import DayHandler
    from qlib_ext.dataset import PanelDataset

    handler = DayHandler(
        instruments=names,
        start_time="2007-06-01",
        end_time="2016-12-31",
        fit_start_time=TRAIN[0],
        fit_end_time=TRAIN[1],
    )
    segments = {"train": TRAIN, "valid": VALID, "later": LATER}
    return PanelDataset(handler, segments)


def run(name: str, seed: int, data, quick: bool, before: list) -> dict:
    from qlib.contrib.eva.alpha import calc_ic

    from qlib_ext.models import Mamba, MultiFactorRNN

    kwargs = {"seed": seed, "GPU": -1, "tilt": 1.0, "early_stop": 99}
    if quick:
        kwargs |= {"n_epochs": 2}
    if name in MAMBAS:
        model = Mamba(**{**MAMBAS[name], **kwargs})
    else:
        size = {"hidden_size": 16} if quick else {}
        model = MultiFactorRNN(**{**CONFIGS[name], **kwargs, **size})
    cpu = time.process_time()
    model.fit(data)
    cpu = time.process_time() - cpu
    rows = pd.DataFrame(model.history_[0])
    parts = model.predict_parts(data, "later")
    days = parts.index.get_level_values("datetime").unique()[::5]
    score = parts["learnt"].loc[days]
    raw = data.handler.fetch(col_set="label", data_key="raw").iloc[:, 0]
    parts["return"] = raw.reindex(parts.index)
    for b in TILTS:
        parts[f"b={b:g}"] = parts["residual"] + b * parts["style"]
    ranks = parts.dropna().groupby("datetime").rank()
    daily = ranks.groupby("datetime").corr()["return"].unstack()
    found: dict = {"epochs": len(rows), "cpu_s": cpu}
    for words, key in (("raw", ""), ("residual", "_residual")):
        values = 100 * rows[f"valid_rank_ic{key}"].to_numpy()
        last = values[-5:]
        found[f"valid {words} last %"] = values[-1]
        found[f"valid {words} best %"] = values.max()
        found[f"valid {words} epoch of best"] = int(values.argmax())
        found[f"valid {words} step between epochs"] = np.abs(np.diff(last)).mean()
        found[f"valid {words} by epoch"] = " ".join(f"{v:.1f}" for v in values)
    for part in ("learnt", "residual", *(f"b={b:g}" for b in TILTS[1:])):
        found[f"later {part} %"] = 100 * daily[part].mean()
        found[f"later {part} IR"] = daily[part].mean() / daily[part].std()
    if name in CONFIGS and model.n_factors > 1:
        found["units alike"] = alike(model.predict_units(data, "later"))
    # Rows of a name that begins with the years are counted too: 60 days are lost.
    held = parts[parts.groupby("instrument").cumcount() >= 60].dropna()
    beyond = held["return"] - held["return"].groupby("datetime").transform("mean")
    for part in ("learnt", "residual"):
        best = held[part].groupby("datetime").rank(pct=True) > 0.95
        found[f"later {part} top bp"] = 1e4 * beyond[best].mean()
    if before:
        daily = [calc_ic(score, other)[1].mean() for other in before]
        found["seeds alike"] = np.mean(daily)
    before.append(score)
    weights = model.style_weights_
    found["weights"] = " ".join(f"{k} {v:+.3f}" for k, v in weights.items())
    return found


def alike(units: pd.DataFrame) -> float:
    """Mean absolute correlation of two units within a day, over every tenth day."""
    days = units.index.get_level_values("datetime").unique()[::10]
    off = ~np.eye(units.shape[1], dtype=bool)
    return float(
        np.mean(
            [np.abs(np.corrcoef(units.loc[d].to_numpy().T))[off].mean() for d in days]
        )
    )


def main() -> None:
    p = parser(__doc__, threads=1)
    p.add_argument("--store", help="default data/cn_all")
    p.add_argument("--stocks", type=int, default=800)
    p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--configs", nargs="*", choices=[*CONFIGS, *MAMBAS])
    p.add_argument("--table", action="store_true", help="only show what is there")
    args = p.parse_args()
    env = environment(args.threads)
    kept = Path("runs") if args.quick else ROOT / "benchmarks" / "results"
    results = kept / "stability.csv"
    kept.mkdir(parents=True, exist_ok=True)
    if not args.table:
        import qlib

        store = store_of(args.store)
        qlib.init(provider_uri=store, region="cn", kernels=1)
        data = dataset_of(universe(store, args.stocks))
        scores: dict[str, list] = {}
        for seed in range(args.seeds):
            for name in args.configs or CONFIGS:
                model = f"{name}, {args.stocks or 'all'} stocks"
                if not has_row(results, model, seed):
                    before = scores.setdefault(name, [])
                    found = run(name, seed, data, args.quick, before)
                    put_row(results, {"model": model, "seed": seed, **found}, [])
                    print(model, seed, found, file=sys.stderr, flush=True)
    show("epochs and seeds", read_rows(results).to_dict("records"), env, args.json)


if __name__ == "__main__":
    main()
