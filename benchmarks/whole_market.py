"""The RNN report's own protocol on every A-share, with baselines and a composite.

python benchmarks/whole_market.py [--stocks N] [--models A B ...] [--seeds N ...]
                                  [--test 2017:2019] [--average] [--units] [--table]
                                  [--parts N ...] [--workers N] [--load] [--quick]

Builds the store of daily_cn_all.parquet from $QLIB_EXT_DATA (all Shanghai and Shenzhen
shares 2007-2019, delisted names included), then retrains year by year with `qlib-ext
roll`: ten years of training (as many as there are since 2007), one of validation, test
2017 to 2019, every border purged, seeds averaged. --stocks takes a fixed random part of
the names (drawn once by seed 11 from all of them, whatever became of them), where time
demands; the table says how many. Figures are those of the joined recorder's factor
report: RankIC of the raw 10-day return every 10 days, mean over the ten first days; the
top of 20 weekly groups against the pool's equal weight, without and with price limits;
and the same for stocks that have traded on 60 days at least ("seasoned"): a new listing
closed at its upper limit day after day, which is easily ranked and cannot be bought.
--average judges the mean of the models' ranks beside them, with equal weights: what the
composite of these very scores gives, without training them again. --units judges the K
units of each window's first seed over its test year ("RNN multi"). --parts splits the
stocks of a chunk into so many batches (the workflows' own choice is 12 for all shares)
and stops after ten epochs.

With several seeds each one's own windows are joined and judged too: the mean and the
deviation of RankIC and IC_IR over seeds stand beside the averaged score's figures. With
six or more the averages of three are judged as well, as the report trains three: their
deviation is that of two averages without a common seed, over all such pairs.
A second table shows RankIC with the score 1 to 20 days old, and the score's rank
correlation with classic factors.

--load only loads the handler and the panel of a whole window, 2007 to 2017, and prints
processor seconds and the growth of the peak beside the panel's size, the handler's
frames not being kept.

A stopped study goes on where it was, task by task. Figures go to
benchmarks/results/cn_all.csv; --table only shows them beside the report's.
"""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from harness import environment, parser, peak_mib, put_row, read_rows, show

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "RNN single": "rnn_day_single",
    "RNN multi": "rnn_day_multi",
    "LightGBM Alpha158": "lightgbm_alpha158",
    "Mamba raw label": "mamba_single_raw",
    "linear recurrence": "composite_day",  # the part of that name
    "composite": "composite_day",
}
SEASONED = 60  # days
# With --parts: as the day RNN's workflows, ten epochs.
RUNS = {"chunk": 80, "lr": 0.002, "ema": 0.995, "n_epochs": 10}
FIGURES = {
    "Rank IC 10d": "RankIC %",
    "Rank ICIR 10d": "IC_IR",
    "Neutral Rank IC 10d": "neutral RankIC %",
    "Top hedged annual return": "top hedged %",
    "Top hedged annual return after costs": "top, limits and costs %",
}
DECAY = "RankIC % lag "
CLASSIC = "correlation with "
# Orient Securities, factor series 91: all A-shares, 2017-01 to 2023-04, 3 seeds.
REPORTED = [
    {"model": "report, single", "RankIC %": 13.42, "IC_IR": 1.41},
    {"model": "report, multi", "RankIC %": 13.28, "IC_IR": 1.42},
]


def store_of(where: str | None) -> str:
    """Path of the store, built if it is not there."""
    path = Path(where or "data/cn_all")
    if not path.exists():
        data = os.environ.get("QLIB_EXT_DATA")
        if not data:
            sys.exit(f"{path} is not there, and QLIB_EXT_DATA says no folder of data.")
        preset = ROOT / "benchmarks" / "presets" / "daily_cn_all.yaml"
        command = ["qlib-ext", "ingest", str(path), "--data", data]
        subprocess.run([*command, "--mapping", str(preset)], check=True)
    return str(path.resolve())


def each(option: str, given: list[int], models: list[str]) -> list[int]:
    """Numbers of each model."""
    if len(given) not in (1, len(models)):
        sys.exit(f"{option}: one number, or one for each of {models}, got {given}.")
    return given if len(given) == len(models) else given * len(models)


def universe(store: str, stocks: int) -> object:
    """All names of the store, or a fixed random part of them."""
    if not stocks:
        return "all"
    lines = (Path(store) / "instruments" / "all.txt").read_text().split("\n")
    names = sorted({line.split("\t")[0] for line in lines if line})
    drawn = np.random.default_rng(11).choice(names, min(stocks, len(names)), False)
    return sorted(map(str, drawn))


def workflow_of(
    name: str, store: str, names: object, quick: bool, parts: int = 0, threads: int = 1
) -> dict:
    """Read the workflow of a model, for this store."""
    from qlib_ext.workflow import load_workflow

    os.environ["QLIB_EXT_STORE"] = store
    file = ROOT / "workflows" / f"{MODELS[name]}.yaml"
    config = copy.deepcopy(load_workflow(file))
    if name == "linear recurrence":
        sources = config["task"]["model"]["kwargs"]["sources"]
        config["task"]["model"] = sources["linear"]["model"]

    kwargs = config["task"]["model"]["kwargs"]
    if parts and "n_epochs" not in kwargs:
        sys.exit(f"--parts: {name} has no epochs; give it 0.")
    if parts:
        kwargs |= {"stock_parts": parts, **RUNS}

    def change(value: object) -> None:
        if isinstance(value, dict):
            if "instruments" in value:
                value["instruments"] = names
            if "num_threads" in value:
                value["num_threads"] = threads
            if quick and "n_epochs" in value:
                value["n_epochs"] = 1
            if quick and "num_boost_round" in value:
                value["num_boost_round"] = 5
            value = list(value.values())
        if isinstance(value, list):
            for part in value:
                change(part)

    change(config["task"])
    records = config["task"]["record"]
    # Qlib's back-test of 50 names says nothing that the layers do not.
    config["task"]["record"] = [r for r in records if r["class"] != "PortAnaRecord"]
    return config


def frame_of(experiment: str, recorder: str, name: str) -> pd.DataFrame:
    """Read an artifact of a recorder."""
    from qlib.workflow import R

    from qlib_ext.recorders import load_frame

    rec = R.get_recorder(recorder_id=recorder, experiment_name=experiment)
    return load_frame(rec, name)


def score_of(experiment: str, recorder: str) -> pd.Series:
    """Read the score of a recorder."""
    return frame_of(experiment, recorder, "pred.pkl")["score"]


def judged(score: pd.Series, words: str = "", days: int = 0) -> dict[str, float]:
    """Figures of a score, without the first `days` of each stock."""
    import torch

    from qlib_ext.report import market_data, tables
    from qlib_ext.report.factor_record import forward_return

    bars = market_data.load_bars(score)
    traded = torch.isfinite(bars.fields["close"]).cumsum(0)[bars.scored]
    panel = tables.panel_of(score, bars.days, bars.instruments)
    panel = torch.where(traded >= days, panel, torch.nan)
    label = forward_return(bars.fields["close"], 10)[bars.scored]
    context = tables.Context(
        universe="all", label="raw", start="", end="", horizon=10,
        days=len(bars.days), stocks=0.0,
    )  # fmt: skip
    made = tables.evaluate(panel, label, bars.days, context, close=bars.during("close"))
    return {
        f"{words}RankIC %": 100 * made.figures["Rank IC 10d"],
        f"{words}IC_IR": made.figures["Rank ICIR 10d"],
        f"{words}top hedged %": 100 * made.figures["Top hedged annual return"],
    }


def averaged(scores: list[pd.Series]) -> pd.Series:
    """Mean of the day's ranks, of the stocks that all of the scores have."""
    table = pd.concat(scores, axis=1, join="inner").dropna()
    return table.groupby("datetime").rank(pct=True).mean(axis=1).rename("score")


def by_seed(made: object, done: object) -> dict[str, float]:
    """How far the seeds lie apart, each judged by itself over all windows."""
    from qlib_ext.rolling.retrain import join_scores

    parts: dict[int, list[pd.Series]] = {}  # windows in order
    for task, out in zip(done.tasks, done.outcomes, strict=True):
        score = score_of(f"{made.experiment}_tasks", out.recorder)
        parts.setdefault(task.seed, []).append(score)
    seeds = list(parts)
    if len(seeds) < 2:
        return {}

    def of(chosen: tuple[int, ...]) -> dict[str, float]:
        windows = zip(*(parts[seed] for seed in chosen), strict=True)
        return judged(join_scores(list(windows)))

    rows = pd.DataFrame([of((seed,)) for seed in seeds])
    found = {}
    for name in ("RankIC %", "IC_IR"):
        found[f"a seed's {name}"] = rows[name].mean()
        found[f"deviation of {name}"] = rows[name].std()
    if len(seeds) >= 6:
        threes = {three: of(three) for three in itertools.combinations(seeds, 3)}
        for name in ("RankIC %", "IC_IR"):
            squares = [
                (threes[a][name] - threes[b][name]) ** 2 / 2
                for a, b in itertools.combinations(threes, 2)
                if not set(a) & set(b)
            ]
            found[f"three averaged, {name}"] = np.mean(
                [figures[name] for figures in threes.values()]
            )
            found[f"deviation of three averaged, {name}"] = np.mean(squares) ** 0.5
    return found


def beside(experiment: str, recorder: str, metrics: dict) -> dict[str, float]:
    """RankIC of an older score, and its rank correlation with classic factors."""
    lags = {
        f"{DECAY}{key.rpartition(' ')[2]}": 100 * value
        for key, value in metrics.items()
        if key.startswith("Rank IC 10d lag ")
    }
    table = frame_of(experiment, recorder, "factor/factor_correlation.parquet")
    with_score = table["score"].drop("score")
    return {
        **dict(sorted(lags.items(), key=lambda x: int(x[0].split()[-1]))),
        **{f"{CLASSIC}{name}": value for name, value in with_score.items()},
    }


def judge_units(made: object, done: object) -> dict[str, float]:
    """Judge the units of each window's first seed over its test year: the mean."""
    import torch
    from qlib.utils import init_instance_by_config
    from qlib.workflow import R

    from qlib_ext.report import market_data, tables
    from qlib_ext.report.factor_record import forward_return

    rows, seen = [], set()
    for task, out in zip(done.tasks, done.outcomes, strict=True):
        if task.window.name in seen:
            continue
        seen.add(task.window.name)
        rec = R.get_recorder(
            recorder_id=out.recorder, experiment_name=f"{made.experiment}_tasks"
        )
        model = rec.load_object("params.pkl")  # made by this very study
        units = model.predict_units(init_instance_by_config(task.config["dataset"]))
        bars = market_data.load_bars(units.iloc[:, 0])
        label = forward_return(bars.fields["close"], 10)[bars.scored]
        starts = [torch.arange(first, len(bars.days), 10) for first in range(10)]
        panels = (
            (str(name), tables.panel_of(column, bars.days, bars.instruments))
            for name, column in units.items()
        )
        rows.append(tables.unit_table(panels, label, starts=starts)[2])
    return pd.DataFrame(rows).mean().to_dict()


def measure_loading(store: str, names: object) -> dict:
    """Load the first window's data as a fit would."""
    import qlib
    from qlib.utils import init_instance_by_config

    from qlib_ext.dataset import Panel

    task = workflow_of("RNN single", store, names, True)["task"]["dataset"]
    task["kwargs"]["keep_frames"] = False
    handler = task["kwargs"]["handler"]["kwargs"]
    handler |= {"start_time": "2007-01-01", "end_time": "2017-12-31"}
    handler |= {"fit_start_time": "2007-01-01", "fit_end_time": "2015-12-14"}
    task["kwargs"]["segments"] = {
        "train": ("2007-01-01", "2015-12-14"),
        "valid": ("2016-01-01", "2016-12-14"),
        "test": ("2017-01-01", "2017-12-31"),
    }
    qlib.init(provider_uri=store, region="cn", kernels=1, logging_level=30)
    few = copy.deepcopy(task)
    few["kwargs"]["handler"]["kwargs"]["instruments"] = ["SH600000", "SZ000001"]
    Panel.from_dataset(init_instance_by_config(few))  # libraries, compiled code
    before, began = peak_mib(), time.process_time()
    panel = Panel.from_dataset(init_instance_by_config(task))
    seconds, size = time.process_time() - began, sum(
        a.numel() * a.element_size() for a in panel._arrays().values()
    ) / 2**20  # fmt: skip
    return {
        "stock-days": int(panel.present.sum()),
        "processor s": seconds,
        "panel MiB": size,
        "peak MiB": peak_mib() - before,
        "peak over panel": (peak_mib() - before) / size,
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--store", help="default data/cn_all")
    p.add_argument("--stocks", type=int, default=0, help="0 is all of them")
    p.add_argument("--models", nargs="*", choices=list(MODELS))
    p.add_argument("--test", default="2017:2019")
    p.add_argument(
        "--seeds", nargs="*", type=int, default=[3], help="of all, or of each model"
    )
    p.add_argument(
        "--average", action="store_true", help="judge the mean of the models' ranks too"
    )
    p.add_argument(
        "--parts", nargs="*", type=int, default=[0],
        help="batches of a run of 80 days, ten epochs; of all, or of each model; "
        "0 as the workflow says",
    )  # fmt: skip
    p.add_argument("--workers", type=int, default=1, help="processes that train")
    p.add_argument("--units", action="store_true", help="judge the K units too")
    p.add_argument("--load", action="store_true", help="only measure loading")
    p.add_argument("--table", action="store_true", help="only show what is there")
    args = p.parse_args()
    env = environment(args.threads)
    if args.load:
        store = store_of(args.store)
        row = measure_loading(store, universe(store, args.stocks))
        show("loading a window of the whole market", [row], env, args.json)
        return
    kept = Path("runs") if args.quick else ROOT / "benchmarks" / "results"
    results = kept / "cn_all.csv"
    kept.mkdir(parents=True, exist_ok=True)
    if not args.table:
        from qlib_ext.rolling.retrain import plan, roll

        store = store_of(args.store)
        names = universe(store, args.stocks)
        scores: dict[str, pd.Series] = {}
        models = args.models or list(MODELS)
        many = each("--seeds", args.seeds, models), each("--parts", args.parts, models)
        for name, seeds, parts in zip(models, *many, strict=True):
            config = workflow_of(name, store, names, args.quick, parts, args.threads)
            if parts:
                name = f"{name} in {parts} parts"
            pool = f"{len(names)} random" if isinstance(names, list) else "all"
            made = plan(
                config, args.test, seeds=seeds,
                experiment=f"{name} {pool} {args.test} x{seeds}",
            )  # fmt: skip
            done = roll(made, workers=args.workers, threads=args.threads, progress=True)
            if done.failed or not done.metrics:
                sys.exit(f"{name}: {len(done.failed)} tasks failed; run it again.")
            found = {
                words: done.metrics[key] * (100 if words.endswith("%") else 1)
                for key, words in FIGURES.items()
                if key in done.metrics
            }
            years = {
                f"RankIC {key.split()[-1]} %": 100 * value
                for key, value in done.metrics.items()
                if key.startswith("Rank IC 10d 20")
            }
            row = {"model": f"{name}, {pool}", "seed": seeds, "test": args.test}
            scores[name] = score_of(made.experiment, done.recorder)
            row |= judged(scores[name], "seasoned ", SEASONED)
            row |= {**found, **years, **by_seed(made, done)}
            row |= beside(made.experiment, done.recorder, done.metrics)
            row |= {"cpu": env["cpu"], "torch": env["torch"]}
            put_row(results, row, [])
            if args.units and name.startswith("RNN multi"):
                units = judge_units(made, done)
                show(f"units of {row['model']}", [units], env, None)
        if args.average:
            score = averaged(list(scores.values()))
            row = {"model": f"average of {', '.join(scores)}, {pool}"}
            row |= {"seed": max(args.seeds), "test": args.test}
            row |= {**judged(score, "seasoned ", SEASONED), **judged(score)}
            row |= {"cpu": env["cpu"], "torch": env["torch"]}
            put_row(results, row, [])
    rows = read_rows(results).rename(columns={"seed": "seeds"})
    second = [c for c in rows if c.startswith((DECAY, CLASSIC))]
    first = rows.drop(columns=second).to_dict("records")
    show("whole market, yearly retraining", [*first, *REPORTED], env, args.json)
    if second:
        known = rows.dropna(subset=second, how="all")[["model", "seeds", *second]]
        show("decay, and classic factors", known.to_dict("records"), env, None)


if __name__ == "__main__":
    main()
