"""Six rolling tasks (3 years x 2 seeds), and the scores of one new day.

python benchmarks/rolling.py [--quick] [--json FILE] [--threads 1] [--part tasks|day]

Tasks: Qlib's `qlib.contrib.rolling` with its GRU_ts, and `qlib_ext.rolling` with the
same network (GRU, 2 layers, one linear output) in `stream` and in `windows` mode. The
same store, features, label, look-back, number of epochs and, as far as Qlib's generator
allows, windows. Each contender runs in a process of its own; the clock starts after the
imports and includes loading the data. "outside" is all time but the models' `fit`.
Qlib rolls one seed at a time and cannot take this handler's configuration (it writes a
label of its own into it), so it gets the handler as a pickle, made within its time.

Day: one new day of 3,000 stocks, from the recorder's id to the saved score; a state of
the stream, and a window mode model, on random bars and with random weights. The clock
starts after `qlib.init` and the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from harness import environment, parser, peak_mib, show

TASKS = ("Qlib contrib.rolling", "ours, stream", "ours, windows")
QUICK = {"stocks": 40, "epochs": 1, "step_len": 20, "hidden": 16, "day_stocks": 300}
FULL = {"stocks": 300, "epochs": 2, "step_len": 60, "hidden": 64, "day_stocks": 3000}
YEARS, TRAIN_MONTHS = 6, 24


def handler_config(start: str, end: str, fit_end: str) -> dict:
    return {
        "class": "DayHandler",
        "module_path": "data_handlers.day",
        "kwargs": {
            "start_time": start,
            "end_time": end,
            "fit_start_time": start,
            "fit_end_time": fit_end,
            "styles": [],
        },
    }


def workflow(size: dict, store: str, ours: str | None) -> dict:
    if ours is None:
        model = {
            "class": "GRU",
            "module_path": "qlib.contrib.model.pytorch_gru_ts",
            "kwargs": {
                "d_feat": 6,
                "hidden_size": size["hidden"],
                "num_layers": 2,
                "dropout": 0.1,
                "n_epochs": size["epochs"],
                "early_stop": 20,
                "n_jobs": 0,
                "GPU": -1,
                "seed": 0,
            },
        }
        dataset = {"class": "TSDatasetH", "module_path": "qlib.data.dataset"}
        extra = {"step_len": size["step_len"]}
    else:
        model = {
            "class": "MultiFactorRNN",
            "module_path": "qlib_ext.models",
            "kwargs": {
                "n_factors": 1,
                "hidden_size": size["hidden"],
                "num_layers": 2,
                "dropout": 0.1,
                "n_epochs": size["epochs"],
                "step_len": size["step_len"],
                "mode": ours,
                "GPU": -1,
                "seed": 0,
            },
        }
        dataset = {"class": "PanelDataset", "module_path": "qlib_ext.dataset"}
        extra = {}
    signal = {"class": "SignalRecord", "module_path": "qlib.workflow.record_temp"}
    return {
        "experiment_name": "rolling_benchmark",
        "qlib_init": {
            "provider_uri": store,
            "region": "cn",
            "kernels": 1,
            "logging_level": 40,
            "exp_manager": {
                "class": "MLflowExpManager",
                "module_path": "qlib.workflow.expm",
                "kwargs": {"uri": "sqlite:///mlruns.db", "default_exp_name": "b"},
            },
        },
        "task": {
            "model": model,
            "dataset": {
                **dataset,
                "kwargs": {
                    **extra,
                    "handler": handler_config("2015-01-05", "2020-12-31", "2016-12-14"),
                    "segments": {
                        "train": ["2015-01-05", "2016-12-14"],
                        "valid": ["2017-01-03", "2017-12-14"],
                        "test": ["2018-01-02", "2020-12-31"],
                    },
                },
            },
            "record": [{**signal, "kwargs": {}}],
        },
    }


def qlib_rolling(size: dict, store: str) -> dict:
    """Run Qlib's rolling as its command line does, once a seed."""
    import qlib
    import yaml
    from qlib.contrib.model.pytorch_gru_ts import GRU
    from qlib.contrib.rolling.base import Rolling
    from qlib.utils import init_instance_by_config

    config = workflow(size, store, None)
    qlib.init(**config["qlib_init"])
    spent = timed(GRU)
    began = time.perf_counter()
    kwargs = config["task"]["dataset"]["kwargs"]
    handler = init_instance_by_config(kwargs["handler"])
    handler.to_pickle("handler.pkl", dump_all=True)
    del handler
    tasks = 0
    for seed in range(2):
        config["task"]["model"]["kwargs"]["seed"] = seed
        Path(f"{seed}.yaml").write_text(yaml.safe_dump(config))
        rolling = Rolling(
            f"{seed}.yaml",
            exp_name=f"joined{seed}",
            h_path="handler.pkl",
            step=243,  # trading days of a year
            horizon=10,
            rolling_exp=f"seed{seed}",
        )
        rolling.run()
        from qlib.workflow import R

        tasks += len(R.list_recorders(experiment_name=f"seed{seed}"))
    return figures(time.perf_counter() - began, spent, tasks)


def ours(size: dict, store: str, mode: str) -> dict:
    from qlib_ext.models import MultiFactorRNN
    from qlib_ext.rolling import plan, roll

    spent = timed(MultiFactorRNN)
    began = time.perf_counter()
    made = plan(
        workflow(size, store, mode), "2018:2020", seeds=2, train_months=TRAIN_MONTHS
    )
    result = roll(made, threads=torch.get_num_threads(), work=Path("work"))
    assert result.recorder, [out.error for out in result.outcomes]
    return figures(time.perf_counter() - began, spent, len(made.tasks))


def timed(cls) -> list[float]:
    """Collect the seconds that every call of a model's `fit` takes."""
    spent: list[float] = []
    inner = cls.fit

    def fit(self, *args, **kwargs):
        clock = time.perf_counter()
        try:
            return inner(self, *args, **kwargs)
        finally:
            spent.append(time.perf_counter() - clock)

    fit.__signature__ = __import__("inspect").signature(inner)
    cls.fit = fit
    return spent


def figures(seconds: float, spent: list[float], tasks: int) -> dict:
    return {
        "tasks": tasks,
        "seconds": seconds,
        "fit": sum(spent),
        "outside": seconds - sum(spent),
        "outside %": 100 * (1 - sum(spent) / seconds),
        "peak MiB": peak_mib(),
    }


def random_store(folder: Path, stocks: int, days: int = 140) -> str:
    """Write a store of random walks with all fields of the day features."""
    from qlib_ext.ingest.store import write_store

    rng = np.random.default_rng(0)
    dates = pd.bdate_range("2020-01-01", periods=days)
    codes = [f"SH{600000 + i}" for i in range(stocks)]
    close = 10 * np.exp(np.cumsum(rng.normal(0, 0.02, (days, stocks)), axis=0))
    low, high = (close * np.exp(s * rng.uniform(0, 0.02, close.shape)) for s in (-1, 1))
    flat = {
        "datetime": np.repeat(dates.to_numpy(), stocks),
        "instrument": np.tile(codes, days),
        "open": ((low + high) / 2).ravel(),
        "high": high.ravel(),
        "low": low.ravel(),
        "close": close.ravel(),
        "vwap": ((low + high + close) / 3).ravel(),
        "volume": rng.lognormal(12, 1, close.size),
        "turnover": rng.lognormal(-4, 0.5, close.size),
    }
    write_store(folder / "store", pd.DataFrame(flat))
    return str(folder / "store")


def one_day(size: dict, folder: Path) -> list[dict]:
    import qlib
    from qlib.data import D
    from qlib.utils import init_instance_by_config
    from qlib.workflow import R

    from qlib_ext.dataset import PanelDataset
    from qlib_ext.models import MultiFactorRNN
    from qlib_ext.score import score_day

    store = random_store(folder, size["day_stocks"])
    qlib.init(**workflow(size, store, "stream")["qlib_init"])
    days = D.calendar()
    config = handler_config(
        f"{days[0]:%Y-%m-%d}", f"{days[60]:%Y-%m-%d}", f"{days[60]:%Y-%m-%d}"
    )
    # Fitted on a few stocks, which takes no time; what is measured scores them all.
    config["kwargs"]["instruments"] = [f"SH{600000 + i}" for i in range(20)]
    rows = []
    for mode in ("stream", "windows"):
        handler = init_instance_by_config(config)
        segments = {"train": (days[0], days[30]), "test": (days[50], days[60])}
        dataset = PanelDataset(handler, segments, purge="off")
        handler.instruments = "all"
        torch.manual_seed(0)
        model = MultiFactorRNN(
            n_factors=64, hidden_size=64, num_layers=2, mode=mode, GPU=-1
        )
        model.d_feat_, model.step_len_ = 6, 60
        model.states_ = [model.build_network(6).state_dict()]
        with R.start(experiment_name=f"day_{mode}"):
            recorder = R.get_recorder()
            dataset.config(dump_all=False, recursive=True)
            R.save_objects(**{"params.pkl": model}, dataset=dataset)
        score_day(recorder, days[-3])  # the first day builds the stream's state
        for day in days[-2:]:
            clock = time.perf_counter()
            cpu = time.process_time()
            result = score_day(recorder, day)
            rows.append(
                {
                    "mode": mode,
                    "stocks": len(result.score),
                    "seconds": time.perf_counter() - clock,
                    "cpu s": time.process_time() - cpu,
                    **{f"{k} s": v for k, v in result.seconds.items()},
                }
            )
    return rows


def main() -> None:
    p = parser(__doc__, threads=1)
    p.add_argument("--part", choices=["tasks", "day", "both"], default="both")
    p.add_argument("--one", help=argparse.SUPPRESS)
    p.add_argument("--store", help=argparse.SUPPRESS)
    p.add_argument("--rounds", type=int, default=1, help="contenders take turns")
    args = p.parse_args()
    size = QUICK if args.quick else FULL
    env = environment(args.threads)
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    if args.one:
        name = args.one
        row = (
            qlib_rolling(size, args.store)
            if name == TASKS[0]
            else ours(size, args.store, name.rpartition(" ")[2])
        )
        print("\n" + json.dumps(row))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.part in ("tasks", "both"):
            tasks(args, size, folder, env)
        if args.part in ("day", "both"):
            os.chdir(folder)
            rows = one_day(size, folder)
            show("one new day", rows, env, None if args.part == "both" else args.json)


def tasks(args, size: dict, folder: Path, env: dict) -> None:
    from qlib_ext.market import make_market

    store = make_market(
        folder / "market", stocks=size["stocks"], years=YEARS, seed=5, trades=60
    )
    found: dict[str, list[dict]] = {name: [] for name in TASKS}
    for turn in range(args.rounds):
        for i, name in enumerate(TASKS):
            work = folder / f"{turn}-{i}"
            work.mkdir()
            command = [sys.executable, str(Path(__file__).resolve()), "--one", name]
            command += ["--store", str(store), "--threads", str(args.threads)]
            command += ["--quick"] if args.quick else []
            done = subprocess.run(
                command,
                cwd=work,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
            )
            if done.returncode:
                sys.exit(done.stderr[-4000:])
            row = json.loads(done.stdout.strip().splitlines()[-1])
            found[name].append(row)
            print(f"{name}: {row['seconds']:.1f} s", flush=True)
    rows = []
    base = np.median([r["seconds"] for r in found[TASKS[0]]])
    for name, runs in found.items():
        row = {k: float(np.median([r[k] for r in runs])) for k in runs[0]}
        rows.append({"contender": name, **row, "x Qlib": base / row["seconds"]})
    title = (
        f"3 years x 2 seeds, {size['stocks']} stocks, {TRAIN_MONTHS // 12} years of "
        f"training, L={size['step_len']}, hidden {size['hidden']}, "
        f"{size['epochs']} epoch(s)"
    )
    show(title, rows, env, args.json)


if __name__ == "__main__":
    main()
