"""Attributes of stocks from real fund holdings: coverage, and what similarity ranks.

python benchmarks/fund_holdings.py [--json FILE] [--store DIR] [--stocks N] [--models]
                                   [--embedded]

Ten largest positions of funds at the quarter ends of 2020-12 to 2022-12, without
announcement dates: known 15 trading days later. Stocks: --stocks of the 604 of Shanghai
priced 5 to 20 CNY at the end of 2025 (drawn by seed 0), chosen with hindsight, so
nothing here is a level to expect. The store, 2020 to 2023-01, is built from
$QLIB_EXT_DATA where --store is absent; rows of funds with a weight of 0 or above 1 are
left out.

Similarity: dot product of a stock's attributes (rank 32) with the mean attributes of
the day's best ten stocks over the last 20 days; nothing is trained, so it has no seed.
RankIC against the raw return from the close of t+1 to the close of t+11, every 10
trading days; mean over the 10 possible first days, and so its standard error.
Neutral: of the residual on industries and the styles that the store allows; "and 20-day
return": with the stock's return of the last 20 days as one more style, since similarity
is made of returns.

--models also trains an LSTM (16 wide) on the day features without and with attributes,
2021-02 to 2021-11, early stop on 2021-12 to 2022-05, test 2022-06 to 2022-12.

--embedded trains both on two simulated markets instead (100 stocks, 60 funds, 2016 to
2020; train 2016-2018, early stop to June 2019, test July 2019 to 2020): one whose
returns know the attributes that funds hold by (standard deviation .02 of the 10-day log
return), and one where they do not. RankIC as above. Rows of embedded_funds.csv.
"""

from __future__ import annotations

import copy
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from harness import (
    data_folder,
    environment,
    has_row,
    mean_and_spread,
    parser,
    put_row,
    read_rows,
    show,
)

ROOT = Path(__file__).resolve().parents[1]
SPAN = ("2021-02-01", "2022-12-30")
SEGMENTS = {
    "train": ("2021-02-01", "2021-11-15"),
    "valid": ("2021-12-01", "2022-05-13"),
    "test": ("2022-06-01", "2022-12-30"),
}
RESULTS = ROOT / "benchmarks" / "results" / "cn_sh_funds.csv"
EMBEDDED = {
    "train": ("2016-02-01", "2018-12-14"),
    "valid": ("2019-01-02", "2019-06-14"),
    "test": ("2019-07-02", "2020-12-31"),
}
ALPHA = {"planted": 0.02, "not planted": 0.0}
ORDER = ["similarity", "20-day return", "LSTM", "LSTM + attributes"]
FUNDS = {"panel": "data_handlers.holdings.fund_attributes"}


def open_store(store: str | None, stocks: int) -> None:
    """Initialise Qlib on the store with holdings, building it if need be."""
    import qlib

    from qlib_ext.ingest.run import ingest
    from qlib_ext.ingest.store import is_store

    path = Path(store or "runs/cn_sh_funds/store")
    if not is_store(path):
        data = data_folder()
        path.parent.mkdir(parents=True, exist_ok=True)
        bars = pd.read_parquet(data / "daily_cn_sh.parquet")
        bars = bars[bars["date"].astype(str) <= "2023-01-31"]
        codes = np.sort(bars["instrument"].unique())
        drawn = np.random.default_rng(0).choice(codes, stocks, replace=False)
        daily = path.parent / "daily.parquet"
        bars[bars["instrument"].isin(drawn)].to_parquet(daily)
        ingest(
            path,
            ROOT / "benchmarks" / "presets" / "daily_cn_sh.yaml",
            data=data,
            files={
                "daily": [str(daily)],
                "funds": [str(data / "fund_top10_holdings_cn.parquet")],
            },
            drop_bad_rows=True,
        )
    qlib.init(provider_uri=str(path), region="cn", kernels=1)


def handler_of(**changes):
    from data_handlers.day import DayHandler

    return DayHandler(
        **{
            "start_time": SPAN[0],
            "end_time": SPAN[1],
            "fit_start_time": SPAN[0],
            "fit_end_time": SPAN[1],
            "attributes": FUNDS,
            **changes,
        }
    )


def ten_day(daily) -> tuple[float, float]:
    """Mean and standard error, %, over the 10 sets of non-overlapping days."""
    daily = torch.as_tensor(np.asarray(daily))
    means, errors = [], []
    for first in range(10):
        part = daily[first::10]
        part = part[torch.isfinite(part)]
        means.append(float(part.mean()))
        errors.append(float(part.std()) / max(len(part), 1) ** 0.5)
    return 100 * float(np.mean(means)), 100 * float(np.mean(errors))


def figures(score: pd.Series, label: pd.Series, risk: pd.DataFrame, run20) -> dict:
    """See the module's docstring."""
    from qlib_ext.metrics import rank_ic
    from qlib_ext.report.mamba import exposure_figures
    from qlib_ext.report.tables import panel_of

    days = score.index.unique("datetime").sort_values()
    codes = score.index.unique("instrument").sort_values()

    def panel(series: pd.Series) -> torch.Tensor:
        return panel_of(series, days, codes).double()

    x, y = panel(score), panel(label)
    styles = {k: panel(risk[k]) for k in risk if k not in ("industry", "log_mcap")}
    industry = panel(risk["industry"]).numpy()
    found: dict = {}
    found["RankIC %"], found["± %"] = ten_day(rank_ic(x, y))
    _, parts = exposure_figures(x, y, industry, styles, None)
    found["neutral %"], found["neutral ± %"] = ten_day(parts["neutral_rank_ic"])
    found["explained %"] = 100 * float(parts["explained"].mean())
    found["styles"] = " ".join(styles)
    if score is run20:
        return found
    more = {**styles, "run20": panel(run20)}
    _, parts = exposure_figures(x, y, industry, more, None)
    found["and 20-day return %"], found["and 20-day ± %"] = ten_day(
        parts["neutral_rank_ic"]
    )
    return found


def describe(frame: pd.DataFrame) -> None:
    """Say how much of the stock-days has attributes."""
    from data_handlers.holdings import read_holdings

    table = read_holdings()
    top = table.groupby(["fund", "period_end"])["weight"].sum()
    known = frame["attribute", "similarity"].notna()
    by_year = known.groupby(known.index.get_level_values("datetime").year).mean()
    print(
        f"{table['fund'].nunique():,} funds, {table['instrument'].nunique():,} stocks, "
        f"{len(top):,} reports of {top.median():.0%} of net assets (median); coverage "
        f"of stock-days {known.mean():.1%} ("
        + ", ".join(f"{y} {v:.1%}" for y, v in by_year.items())
        + ")"
    )


def learnt(name: str, seed: int, quick: bool, segments: dict, **changes) -> tuple:
    """Train, score the test segment; also give the seconds that it took."""
    from qlib_ext.dataset import PanelDataset
    from qlib_ext.models import MultiFactorRNN

    joined = name.endswith("attributes")
    fit = dict(zip(("fit_start_time", "fit_end_time"), segments["train"], strict=True))
    handler = handler_of(**fit, attributes=FUNDS if joined else None, **changes)
    model = MultiFactorRNN(
        rnn="LSTM", n_factors=1, hidden_size=16, num_layers=1, head_size=32,
        attributes=joined, step_len=20, n_epochs=1 if quick else 10, early_stop=3,
        seed=seed, GPU=-1,
    )  # fmt: skip
    started = time.perf_counter()
    dataset = PanelDataset(handler, copy.deepcopy(segments))
    model.fit(dataset)
    score = model.predict(dataset)
    seconds = time.perf_counter() - started
    label = handler.fetch(col_set="label", data_key="raw").iloc[:, 0]
    return score, label, seconds


def on_embedded(args, env: dict) -> None:
    """Train on markets whose returns know the funds' attributes, or not."""
    import qlib

    from qlib_ext.market import make_market
    from qlib_ext.metrics import rank_ic
    from qlib_ext.report.tables import panel_of

    file = Path("embedded_funds.csv")
    file = file if args.quick else RESULTS.with_name(file.name)
    n, funds = (30, 20) if args.quick else (100, 60)
    size = {"stocks": n, "years": 5, "seed": 0, "funds": funds}
    names = [f"{market}, {name}" for market in ALPHA for name in ORDER[2:]]
    for market, alpha in ALPHA.items():
        with tempfile.TemporaryDirectory() as folder:
            store = make_market(Path(folder) / "store", **size, attribute_alpha=alpha)
            qlib.init(provider_uri=str(store), region="cn", kernels=1)
            for seed, name in product(range(args.seeds), ORDER[2:]):
                if has_row(file, f"{market}, {name}", seed):
                    continue
                score, label, seconds = learnt(
                    name, seed, args.quick, EMBEDDED,
                    start_time=EMBEDDED["train"][0], end_time=EMBEDDED["test"][1],
                )  # fmt: skip
                days = score.index.unique("datetime").sort_values()
                codes = score.index.unique("instrument").sort_values()
                x, y = (panel_of(v, days, codes).double() for v in (score, label))
                row: dict = {"model": f"{market}, {name}", "seed": seed}
                row["RankIC %"], row["± %"] = ten_day(rank_ic(x, y))
                row |= {"fit_s": seconds, "load": env["load"]}
                put_row(file, row, names)
                print(row, flush=True)
    rows = read_rows(file)
    show(
        "Markets with funds, test July 2019 to 2020",
        rows.to_dict("records"),
        env,
        args.json,
    )


def main() -> None:
    p = parser(__doc__, threads=1)
    p.add_argument("--store", help="a Qlib store with holdings; built if absent")
    p.add_argument("--models", action="store_true", help="train the LSTM too")
    p.add_argument("--stocks", type=int, default=604, help="of a new store")
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--embedded", action="store_true", help="on simulated markets")
    args = p.parse_args()
    env = environment(args.threads)
    if args.embedded:
        on_embedded(args, env)
        return
    results = Path("fund_holdings-quick.csv") if args.quick else RESULTS
    open_store(args.store, args.stocks)
    handler = handler_of()
    frame = handler.fetch(col_set="__raw", data_key="infer")
    describe(frame)
    label = handler.fetch(col_set="label", data_key="raw").iloc[:, 0]
    risk = frame["risk"]
    from qlib.data import D

    codes = list(frame.index.unique("instrument"))
    run20 = D.features(codes, ["$close/Ref($close,20)-1"], *SPAN).iloc[:, 0]
    run20 = run20.swaplevel().sort_index().reindex(frame.index)
    same = {k: env[k] for k in ("cpu", "torch", "qlib", "python", "threads", "load")}
    inputs = label, risk, run20
    for name, score in (
        ("similarity", frame["attribute", "similarity"]),
        ("20-day return", run20),
    ):
        row = {"model": name, "seed": 0, **figures(score, *inputs), **same}
        put_row(results, row, ORDER)
    if args.models:
        for seed in range(args.seeds):
            for name in ORDER[2:]:
                score, _, seconds = learnt(name, seed, args.quick, SEGMENTS)
                row = {"model": name, "seed": seed, **figures(score, *inputs)}
                put_row(results, {**row, "fit_s": seconds, **same}, ORDER)
    rows = read_rows(results).drop(columns=["styles", *same])
    table = []
    for name, part in rows.groupby("model", sort=False):
        line = {"model": name, "seeds": len(part)}
        for column in part.columns.drop(["model", "seed"]):
            # Over seeds, of which one has no spread but its own error over days.
            line[column] = mean_and_spread(part[column])
        table.append(line)
    show("Fund holdings on Shanghai stocks", table, env, args.json)


if __name__ == "__main__":
    main()
