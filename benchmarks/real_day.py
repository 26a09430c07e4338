"""Models on real A-shares: RankIC, IC_IR, exposures and top group, with baselines.

python benchmarks/real_day.py [--quick] [--json FILE] [--universe NAME] [--group NAME]
                              [--models A B ...] [--seeds N] [--stocks N]
                              [--epochs N] [--table]

Universes, each built by `qlib-ext ingest` from $QLIB_EXT_DATA where --store is absent:

cn_1000       827 stocks, a random sample of the market as listed in 2023; no market
              cap, turnover, vwap or statements. Train 2012-2016, valid 2017, test
              2018-2020.
cn_sh         604 Shanghai stocks priced 5 to 20 CNY at the end of 2025: chosen with
              hindsight, so compare methods only. Train 2020-2022, valid 2023, test
              2024-2025. Statements end in 2019 and are not used.
cn_csi300_sh  191 Shanghai members of the CSI 300 as of 2025, with valuation; chosen
              with hindsight too. The same years, test to April 2025.

cn_all        all A-shares of daily_cn_all, delisted ones included, or with --stocks N a
              fixed random sample of N, in runs and results of that name. Market cap,
              turnover, vwap, industries with their dates; styles of prices and size.
              Train 2007-2014, valid 2015, test 2016-2019. The group `recurrent` is run
              there: six day features for all, label of 10 days but for the label family
              (its own, in the name); attention in windows of every tenth day. --epochs
              bounds the epochs of all alike, in runs and results of that name.

Segments lie 11 trading days apart. Label: return from the close of t+1 to the close of
t+11, neutralised on industry (and size where the store has a market cap), standardised
over the day. RankIC against the raw return every 10 trading days; IC_IR not annualised;
daily RankIC is the mean over the ten starts. The raw return carries the last price
through a suspension at t+11; "not carried" drops it.
Neutral RankIC: of the score's residual on industries and the styles that the store
allows; explained: the share of the score's variance that these explain. Exposure: root
of the mean squared daily correlation with a style, mean over styles. Top group: best of
20 (10 where there are fewer than 300 stocks), weekly, next-day close, no costs, hedged
against the pool's equal weight, geometric, x 252; "limits": the same without purchases
at the upper and sales at the lower limit (rules of the boards, ST stocks unknown).

Every task comes from a file of workflows/ with the overrides below. Scores are kept in
--runs, figures in --results, one row a run: a stopped study goes on where it was, and
several processes can share the work (--models, --first-seed). --table only shows what
--results holds; each row says where it was computed.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from all_shares import bars_of, with_industry
from harness import (
    data_folder,
    environment,
    has_row,
    mean_and_spread,
    parser,
    peak_mib,
    put_row,
    read_rows,
    show,
)

from data_handlers.files import replacing, write_json

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ROOT / "benchmarks" / "presets"
STARTED = ("2012-01-01", "2016-12-14"), ("2017-01-01", "2017-12-14")
LATE = ("2020-01-02", "2022-12-14"), ("2023-01-01", "2023-12-14")
ALL = ("2007-01-04", "2014-12-15"), ("2015-01-05", "2015-12-15")
UNIVERSES = {
    "cn_all": ("daily_cn_all", *ALL, ("2016-01-04", "2019-12-31")),
    "cn_1000": ("daily_cn_1000", *STARTED, ("2018-01-01", "2020-12-31")),
    "cn_sh": ("daily_cn_sh", *LATE, ("2024-01-01", "2025-12-31")),
    "cn_csi300_sh": (
        "daily_cn_csi300_sh_valuation",
        *LATE,
        ("2024-01-01", "2025-04-07"),
    ),
}
OURS = {"n_epochs": 20, "early_stop": 5, "GPU": 0, "checkpoint_dir": None}
ONE = {**OURS, "n_seeds": 1}
# Settings of the loop when the rows of the day RNNs were taken.
LOOP = {"chunk": 20, "stock_parts": 1, "lr": 0.001, "ema": 0.0, "dropout": 0.1}
# Windows cost 15 times more a sample: every tenth day, as the label spans ten.
WINDOWS = {"mode": "windows", "day_stride": 10}
MODELS: dict[str, tuple[str, dict]] = {
    "single stream": ("rnn_day_single", {**ONE, **LOOP}),
    "multi stream": ("rnn_day_multi", {**OURS, **LOOP}),
    "single windows": ("rnn_day_single", {**ONE, **LOOP, **WINDOWS}),
    "multi windows": ("rnn_day_multi", {**OURS, **LOOP, **WINDOWS}),
    "LightGBM Alpha158": ("lightgbm_alpha158", {}),
    "Linear Alpha158": ("linear_alpha158", {}),
    "Qlib GRU_ts": ("gru_ts_day", {"n_epochs": 1}),
    "single stream, Alpha158": ("rnn_alpha158", ONE),
    "Mamba raw label": ("mamba_single_raw", ONE),
    "Mamba neutral label": ("mamba_single_neutral", ONE),
    "Mamba-10": ("mamba_10", ONE),
    "Mamba-5": ("mamba_5", ONE),
    "Mamba dual, penalty 10": ("mamba_dual", ONE),
    "Mamba-MoE": ("mamba_moe", {**OURS, "n_folds": 2}),
    # The same experts as the mixture's: written by its run.
    "Mamba equal weight": ("mamba_moe", {}),
    "GRU": ("gru", ONE),
    "GRU + industry": ("gat_industry", ONE),
    "GRU + financial": ("gat_financial", ONE),
    "GRU + flow": ("gat_flow", ONE),
    "GRU+GAT equal": ("gru_gat_equal", ONE),
    "GRU+GAT_SA": ("gru_gat_sa", ONE),
    "GRU+GAT_SA+FIN": ("gru_gat_sa_fin", ONE),
    "GRU, plain": ("base_recurrent", ONE),
    "DecompGRU": ("decomp_gru", {**ONE, "step_len": 60}),
    "DecompGRU, 150 days": ("decomp_gru", ONE),
    "linear recurrence": ("decomp_gru", {**ONE, "step_len": 60, "size_groups": 0}),
    "AGRU": ("base_recurrent", {**ONE, **WINDOWS, "rnn": "AGRU"}),
    "AGRU, both directions": (
        "base_recurrent",
        {**ONE, **WINDOWS, "rnn": "AGRU", "bidirectional": True},
    ),
    "ALSTM": ("base_recurrent", {**ONE, **WINDOWS, "rnn": "ALSTM"}),
    "residual-attention LSTM": (
        "base_recurrent",
        {
            **ONE,
            **WINDOWS,
            "rnn": "ResidualAttentionLSTM",
            "hidden_size": 48,
            "head_size": 10,
        },
    ),
    "GRU, windows": ("base_recurrent", {**ONE, **WINDOWS}),
    "GRU(50,2)+NN(10)": ("base_recurrent", {**ONE, "hidden_size": 50, "head_size": 10}),
    "GRU, barra 1d": ("gru_barra1d", ONE),
    "GRU, barra 5d": ("gru_barra5d", ONE),
    "GRU, open 1d": ("gru_open1d", ONE),
    "GRU, close 1d": ("gru_close1d", ONE),
    # As "multi stream", whose rows are older than the last traded close in features
    # and the carried label.
    "multi stream, last traded close": ("rnn_day_multi", {**OURS, **LOOP}),
    # The workflows' own settings.
    "single as shipped": ("rnn_day_single", ONE),
    "multi as shipped": ("rnn_day_multi", ONE),
}
NAMES = list(MODELS)
GROUPS = {
    "day": [*NAMES[:8], *NAMES[-3:]],
    "mamba": ["single stream", "LightGBM Alpha158", *NAMES[8:15]],
    "graph": NAMES[15:22],
    "recurrent": NAMES[22:-3],
}
SEEDLESS = ("Linear Alpha158",)
# What needs statements or valuation, and the relations that are left without them.
NEEDS_FINANCIALS = ("GRU + financial", "GRU+GAT_SA+FIN")
HAS_FINANCIALS = ("cn_csi300_sh",)


def task_of(name: str, seed: int, universe: str, threads: int, epochs: int) -> dict:
    from qlib_ext.workflow import load_workflow

    file, overrides = MODELS[name]
    task = copy.deepcopy(load_workflow(ROOT / "workflows" / f"{file}.yaml")["task"])
    kwargs = task["model"]["kwargs"]
    kwargs.update(overrides)
    if name not in SEEDLESS:
        kwargs["seed"] = seed
    if "num_threads" in kwargs:
        kwargs["num_threads"] = threads
    if epochs and "n_epochs" in kwargs:
        kwargs["n_epochs"] = epochs
    if len(kwargs.get("graphs") or []) > 1 and universe not in HAS_FINANCIALS:
        kwargs["graphs"] = [g for g in kwargs["graphs"] if g != "financial"]
    _, train, valid, test = UNIVERSES[universe]
    dataset = task["dataset"]["kwargs"]
    dataset["segments"] = {"train": train, "valid": valid, "test": test}
    dataset["handler"]["kwargs"].update(
        start_time=train[0],
        end_time=test[1],
        fit_start_time=train[0],
        fit_end_time=train[1],
    )
    return task


def run(name, seed, universe, scores: Path, threads: int, epochs: int) -> None:
    """Train and predict one model; leave its scores and its times in `scores`."""
    from qlib.utils import auto_filter_kwargs, init_instance_by_config

    task = task_of(name, seed, universe, threads, epochs)
    started = time.perf_counter()
    np.random.seed(seed)
    torch.manual_seed(seed)
    model = init_instance_by_config(task["model"])
    dataset = dataset_of(json.dumps(task["dataset"], sort_keys=True))
    loaded = time.perf_counter()
    auto_filter_kwargs(model.fit)(dataset, evals_result={})
    fitted = time.perf_counter()
    score = model.predict(dataset)
    done = time.perf_counter()
    frame = pd.DataFrame({"score": score.astype(np.float64)})
    frame["label"] = dataset.handler.fetch(col_set="label", data_key="raw").iloc[:, 0]
    states = getattr(model, "states_", None) or [{}]
    frame.attrs = {}
    times = {
        "load_s": loaded - started,
        "fit_s": fitted - loaded,
        "predict_s": done - fitted,
        "peak_mib": peak_mib(),
        "load": os.getloadavg()[0],
        "threads": threads,
        "history": getattr(model, "history_", None),
        "weights": sum(v.numel() for v in states[0].values()),
        "epochs": sum(map(len, getattr(model, "history_", None) or [])),
    }
    if hasattr(model, "predict_experts"):
        experts = model.predict_experts(dataset).filter(like="score_")
        equal = scores.with_name(file_name("Mamba equal weight", seed, ".parquet"))
        write_json(equal.with_suffix(".json"), times, default=float)
        save(frame.assign(score=experts.mean(axis=1).astype(np.float64)), equal)
    write_json(scores.with_suffix(".json"), times, default=float)
    save(frame, scores)


@lru_cache(maxsize=1)
def dataset_of(config: str):
    """Build a dataset, or take the last model's if it is configured alike."""
    from qlib.utils import init_instance_by_config

    return init_instance_by_config(json.loads(config))


def save(frame: pd.DataFrame, target: Path) -> None:
    with replacing(target) as temporary:
        frame.reset_index().to_parquet(temporary)


def risk_group(universe: str, runs: Path) -> pd.DataFrame:
    """Industry and styles of the test years, the same for every model."""
    file = runs / f"{universe}-risk.parquet"
    if not file.exists():
        from data_handlers.day import DayHandler

        test = UNIVERSES[universe][3]
        handler = DayHandler(
            start_time=test[0],
            end_time=test[1],
            fit_start_time=test[0],
            fit_end_time=test[1],
        )
        frame = handler.fetch(col_set="risk", data_key="raw")
        frame.attrs = {}
        save(frame.astype("float32"), file)
    return pd.read_parquet(file).set_index(["datetime", "instrument"])


def label_not_carried(score: pd.Series) -> pd.Series:
    """Give the 10-day return of the days on which the stock also trades at t+11."""
    from qlib.data import D

    from data_handlers.labels import forward_return

    days = score.index.get_level_values("datetime")
    names = sorted(set(score.index.get_level_values("instrument")))
    expression = forward_return(10, carry=False)
    frame = D.features(names, [expression], str(days.min()), str(days.max()))
    return frame.iloc[:, 0].reorder_levels(score.index.names).reindex(score.index)


def figures(score: pd.Series, label: pd.Series, risk: pd.DataFrame) -> dict:
    """See the module's docstring."""
    from qlib_ext.metrics import (
        layer_backtest,
        non_overlapping,
        over_starts,
        performance,
        rank_ic,
        summarise,
        week_ends,
    )
    from qlib_ext.report.mamba import exposure_figures
    from qlib_ext.report.market_data import load_bars, price_limits
    from qlib_ext.report.tables import panel_of

    bars = load_bars(score)

    def panel(series: pd.Series) -> torch.Tensor:
        return panel_of(series, bars.days, bars.instruments).double()

    x, y = panel(score), panel(label)
    daily = rank_ic(x, y)
    picked = non_overlapping(daily, 10)
    ten = summarise(daily[picked])
    # The mean over all starts of the mean is the daily one.
    starts = [non_overlapping(daily, 10, k) for k in range(10)]
    every, each = over_starts(daily, starts)
    plain = rank_ic(x, panel(label_not_carried(score)))
    groups = 20 if x.shape[1] >= 300 else 10
    limits = price_limits(bars)
    assert limits is not None
    top = {}
    for name, barred in (
        ("top hedged %", {}),
        ("top, limits %", {"buyable": limits[0], "sellable": limits[1]}),
    ):
        layers = layer_backtest(
            x, bars.during("close"), week_ends(bars.days), groups, **barred
        )
        hedged = layers.returns[:, groups - 1] - layers.returns[:, groups]
        top[name] = 100 * performance(hedged).annual_return
    styles = {k: panel(risk[k]) for k in risk if k not in ("industry", "log_mcap")}
    industry = panel(risk["industry"]).numpy() if "industry" in risk else None
    exposure, parts = exposure_figures(x, y, industry, styles, None)
    neutral = parts["neutral_rank_ic"][picked.numpy()]
    by_year = pd.Series(daily.numpy(), bars.days).groupby(bars.days.year).mean()
    return {
        "RankIC %": 100 * ten.mean,
        "IC_IR": ten.ir,
        "IC_IR, all starts": every.ir,
        "RankIC, lowest start %": 100 * min(s.mean for s in each),
        "RankIC, highest start %": 100 * max(s.mean for s in each),
        "daily RankIC %": 100 * float(daily.nanmean()),
        "RankIC, label not carried %": 100 * summarise(plain[picked]).mean,
        "daily RankIC, label not carried %": 100 * float(plain.nanmean()),
        "IC_IR, all starts, label not carried": over_starts(plain, starts)[0].ir,
        "neutral RankIC %": 100 * float(neutral.mean()),
        "explained %": 100 * float(parts["explained"].mean()),
        "exposure %": 100 * float((exposure**2).mean().pow(0.5).mean()),
        **top,
        **{f"RankIC {k} %": 100 * float(v) for k, v in by_year.items()},
        "styles": " ".join(styles),
        "groups": groups,
    }


def judge(name, seed, universe, runs: Path, results: Path, env: dict) -> None:
    """Turn the scores of one run into its row of figures."""
    scores = runs / file_name(name, seed, ".parquet")
    frame = pd.read_parquet(scores).set_index(["datetime", "instrument"])
    found = figures(frame["score"], frame["label"], risk_group(universe, runs))
    times = json.loads(scores.with_suffix(".json").read_text())
    found.update({k: times[k] for k in ("fit_s", "threads", "load")})
    if times.get("epochs"):
        found["weights"] = times["weights"]
        found["epochs"] = times["epochs"]
        found["epoch_s"] = times["fit_s"] / times["epochs"]
    found.update({k: env[k] for k in ("cpu", "torch", "qlib", "python")})
    put_row(results, {"model": name, "seed": seed, **found}, NAMES)


def file_name(name: str, seed: int, suffix: str) -> str:
    return f"{name.replace(' ', '_')}-{seed}{suffix}"


def table(results: Path, names: list[str], seeds: int) -> list[dict]:
    found = read_rows(results)
    found = found[found["seed"] < seeds]
    rows = []
    for name in names:
        values = found[found["model"] == name]
        if values.empty:
            continue
        row: dict = {"model": name, "seeds": len(values)}
        values = values.dropna(axis=1, how="all")
        for key in (k for k in values if k.endswith("%") and k not in by_year(values)):
            row[key] = mean_and_spread(values[key])
            if key == "RankIC %":
                for ratio in (k for k in values if k.startswith("IC_IR")):
                    row[ratio] = mean_and_spread(values[ratio])
        row["fit s"] = f"{values['fit_s'].mean():,.0f}"
        if "epoch_s" in values:
            row["weights"] = f"{values['weights'].mean():,.0f}"
            row["epoch s"] = f"{values['epoch_s'].mean():.1f}"
        row["threads"] = int(values["threads"].iloc[0])
        row["load"] = f"{values['load'].mean():.1f}"
        row["cpu"] = ", ".join(sorted(set(values["cpu"])))
        rows.append(row)
    return rows


def by_year(values: pd.DataFrame) -> list[str]:
    return [k for k in values if k.startswith("RankIC ") and k[7:11].isdigit()]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--universe", default="cn_1000", choices=list(UNIVERSES))
    p.add_argument("--group", default="day", choices=list(GROUPS))
    p.add_argument("--models", nargs="*", choices=NAMES, help="default: the group's")
    p.add_argument(
        "--stocks", type=int, help="cn_all: only a fixed random sample of so many"
    )
    p.add_argument("--epochs", type=int, default=0, help="at most so many, for all")
    p.add_argument("--store", help="a Qlib store; built from $QLIB_EXT_DATA if absent")
    p.add_argument("--runs", help="where scores are kept; default runs/UNIVERSE")
    p.add_argument(
        "--results", help="table of figures; default benchmarks/results/UNIVERSE.csv"
    )
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--first-seed", type=int, default=0)
    p.add_argument("--table", action="store_true", help="only show what is there")
    args = p.parse_args()
    env = environment(args.threads)
    names = args.models or GROUPS[args.group]
    universe = args.universe
    if args.stocks is not None and universe != "cn_all":
        p.error("--stocks is for --universe cn_all")
    pool = f"{universe}_{args.stocks}" if args.stocks else universe
    store = args.store or f"data/{pool}"
    epochs = 1 if args.quick else args.epochs
    if args.epochs:
        pool += f"_{args.epochs}_epochs"
    # One epoch of --quick must not pass for a result.
    runs = Path(args.runs or f"runs/{pool}{'-quick' * args.quick}")
    kept = runs if args.quick else ROOT / "benchmarks" / "results"
    results = Path(args.results or kept / f"{pool}.csv")
    runs.mkdir(parents=True, exist_ok=True)
    if not args.table:
        open_store(universe, store, args.stocks)
        for seed in range(args.first_seed, 1 if args.quick else args.seeds):
            for name in names:
                if has_row(results, name, seed):
                    continue
                if seed and name in SEEDLESS:
                    continue
                if name in NEEDS_FINANCIALS and universe not in HAS_FINANCIALS:
                    continue
                print(f"--- {universe}: {name}, seed {seed}", flush=True)
                scores = runs / file_name(name, seed, ".parquet")
                if not scores.exists():
                    run(name, seed, universe, scores, args.threads, epochs)
                judge(name, seed, universe, runs, results, env)
    show(
        f"{pool}: test {' to '.join(UNIVERSES[universe][3])}, 10-day label, "
        "mean ± std over seeds",
        table(results, names, args.seeds),
        env,
        args.json,
    )


def open_store(universe: str, store: str, stocks: int | None = None) -> None:
    import qlib

    if not Path(store).exists():
        data = data_folder()
        if universe == "cn_all":
            write_all(Path(store), data, stocks)
        else:
            subprocess.run(
                [sys.executable, "-m", "qlib_ext.cli", "ingest", store,
                 "--mapping", str(PRESETS / f"{UNIVERSES[universe][0]}.yaml"),
                 "--data", str(data)],
                check=True,
            )  # fmt: skip
    qlib.init(provider_uri=store, region="cn", kernels=1)


def write_all(store: Path, data: Path, stocks: int | None) -> None:
    """Unpack daily_cn_all, whose columns are whole numbers, to a store."""
    from qlib_ext.ingest.store import write_store

    file = data / "daily_cn_all.parquet"
    names = np.sort(
        pd.read_parquet(file, columns=["instrument"])["instrument"].unique()
    )
    if stocks is not None:
        names = np.sort(np.random.default_rng(0).permutation(names)[:stocks])
    raw = pd.read_parquet(file, filters=[("instrument", "in", names.tolist())])
    bars = bars_of(raw)
    bars["amount"] = raw["vwap_e4"] / 1e4 * raw["volume"]
    write_store(store, with_industry(bars, data))


if __name__ == "__main__":
    main()
