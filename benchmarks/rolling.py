"""Six rolling tasks (3 years x 2 seeds), and the scores of one new day.

python benchmarks/rolling.py [--quick] [--json FILE] [--threads 1]
    [--part tasks|day|size] [--epochs N] [--only CONTENDER ...]

Tasks: Qlib's `qlib.contrib.rolling` with its GRU_ts, and `qlib_ext.rolling` with the
same network (GRU, 2 layers, one linear output) in `stream` and in `windows` mode. The
same store, features, label, look-back, number of epochs and windows: the training
segment grows with the years, as Qlib's generator has it. Each contender runs in a
process of its own; the clock starts after the imports, with an empty MLflow database in
place, and includes loading the data. "outside" is all time but the models' `fit`; with
the 20 and more epochs of a user's run its share is smaller (`--epochs`). "cpu s" is
processor time, which a busy machine changes less.
Qlib rolls one seed at a time and cannot take this handler's configuration (it writes a
label of its own into it), so it gets the handler as a pickle, made within its time.

Day: one new day of 3,000 stocks, from the recorder's id to the saved score; a state of
the stream, and a window mode model, on random bars and with random weights. The clock
starts after `qlib.init` and the imports.

Size: one task on 48 features (6 of bins, 42 of a Parquet file) at four sizes; seconds
are of the processor. Loading grows with the stock-days of the window and with the
files, so the stocks; an epoch with the stock-days it trains on; training also needs
memory for a batch, which grows with the stocks alone. "off" is how far the fitted lines
lie from the worst of the sizes. From them, the whole study: all A-shares, 17 years, 3
data sets x 12 years x 3 seeds x 2 models, every data set and model taken to cost what
this RNN on 48 features does. A GPU's hours are the counted operations over an assumed
speed: no GPU was at hand.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
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
YEARS = 6  # 2015 to 2020; three to test, one to validate
# Assumed of a GPU: small recurrent steps reach a tenth or less of a card's peak.
GPU_FLOPS = 5e12


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
    from qlib.data import D
    from qlib.utils import init_instance_by_config

    config = workflow(size, store, None)
    qlib.init(**config["qlib_init"])
    spent = timed(GRU)
    began = clocks()
    kwargs = config["task"]["dataset"]["kwargs"]
    handler = init_instance_by_config(kwargs["handler"])
    handler.to_pickle("handler.pkl", dump_all=True)
    del handler
    tasks = 0
    step = -(-len(D.calendar("2018-01-01", "2020-12-31")) // 3)  # a third, rounded up
    for seed in range(2):
        config["task"]["model"]["kwargs"]["seed"] = seed
        Path(f"{seed}.yaml").write_text(yaml.safe_dump(config))
        rolling = Rolling(
            f"{seed}.yaml",
            exp_name=f"joined{seed}",
            h_path="handler.pkl",
            step=step,
            horizon=10,
            rolling_exp=f"seed{seed}",
        )
        rolling.run()
        from qlib.workflow import R

        tasks += len(R.list_recorders(experiment_name=f"seed{seed}"))
    return figures(clocks() - began, spent, tasks)


def ours(size: dict, store: str, mode: str) -> dict:
    from qlib_ext.models import MultiFactorRNN
    from qlib_ext.rolling import plan, roll

    spent = timed(MultiFactorRNN)
    began = clocks()
    made = plan(workflow(size, store, mode), "2018:2020", seeds=2)
    result = roll(made, threads=torch.get_num_threads(), work=Path("work"))
    assert result.recorder, [out.error for out in result.outcomes]
    return figures(clocks() - began, spent, len(made.tasks))


def clocks() -> np.ndarray:
    """Wall and processor seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def timed(cls) -> list[np.ndarray]:
    """Collect the seconds that every call of a model's `fit` takes."""
    spent: list[np.ndarray] = []
    inner = cls.fit

    def fit(self, *args, **kwargs):
        began = clocks()
        try:
            return inner(self, *args, **kwargs)
        finally:
            spent.append(clocks() - began)

    fit.__signature__ = __import__("inspect").signature(inner)
    cls.fit = fit
    return spent


def figures(total: np.ndarray, spent: list[np.ndarray], tasks: int) -> dict:
    (seconds, cpu), (fit, cpu_fit) = total, sum(spent)
    return {
        "tasks": tasks,
        "seconds": seconds,
        "s a task": seconds / tasks,
        "fit": fit,
        "outside": seconds - fit,
        "outside %": 100 * (1 - fit / seconds),
        "cpu s": cpu,
        "cpu s a task": cpu / tasks,
        "outside cpu %": 100 * (1 - cpu_fit / cpu),
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


def size_data(folder: Path, stocks: int, days: int) -> None:
    """Write a store with 6 features in bins and 42 in a Parquet file."""
    random_store(folder, stocks, days)
    dates = pd.bdate_range("2020-01-01", periods=days)
    codes = [f"SH{600000 + i}" for i in range(stocks)]
    index = pd.MultiIndex.from_product([dates, codes], names=["datetime", "instrument"])
    values = np.random.default_rng(1).standard_normal((len(index), 42), np.float32)
    frame = pd.DataFrame(values, index, [f"x{k:02d}" for k in range(42)])
    frame.reset_index().to_parquet(folder / "extra.parquet", index=False)


def size_task(folder: Path, stocks: int, days: int) -> dict:
    """Time, memory and disk of one task on 48 features."""
    from qlib.workflow import R

    from qlib_ext.rolling import plan, roll

    store, extra = folder / "store", folder / "extra.parquet"
    dates = pd.bdate_range("2020-01-01", periods=days)
    config = workflow({**FULL, "epochs": 1}, str(store), "stream")
    config["task"]["model"]["kwargs"]["n_factors"] = 64
    handler = config["task"]["dataset"]["kwargs"]["handler"]
    handler["class"] = "MultiFrequencyHandler"
    handler["module_path"] = "data_handlers.multi_frequency"
    handler["kwargs"] |= {"ms_path": str(extra), "l2_path": None}
    os.chdir(folder)
    before = peak_mib()
    cut = [dates[int(days * share)] for share in (0.8, 1.0 - 1 / days)]
    made = plan(
        config,
        f"{cut[0]:%Y-%m-%d}:{cut[1]:%Y-%m-%d}",
        seeds=1,
        step="36 months",
        valid_months=3,
    )
    window = made.windows[0]
    began = time.perf_counter()
    result = roll(made, threads=torch.get_num_threads(), work=folder / "work")
    assert result.recorder, [out.error for out in result.outcomes]
    found = result.outcomes[0].figures
    tasks = R.get_exp(experiment_name="rolling_benchmark_roll_tasks", create=False)
    recorder = tasks.get_recorder(recorder_id=result.outcomes[0].recorder, create=False)
    path = Path(recorder.client.download_artifacts(recorder.id, ""))
    train = len(pd.bdate_range(*window.train))
    test = len(pd.bdate_range(*window.test))
    return {
        "stocks": stocks,
        "stock-days": stocks * days,
        "trained": stocks * train,
        "scored": stocks * test,
        "data s": found["cpu_data"],
        "epoch s": found["cpu_fit"],
        "score s": found["cpu_score"],
        "all s": time.perf_counter() - began,
        "load MiB": found["peak_mib_data"] - before,
        "train MiB": found["peak_mib_fit"] - before,
        "start MiB": before,
        "bins MiB": _mib(store / "features"),
        "parquet MiB": _mib(extra),
        "recorder MiB": _mib(path),
    }


def _mib(path: Path) -> float:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files) / 2**20


def whole_study(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Slopes, how well they hold, and what the whole study comes to."""
    found = []

    def slopes(name: str, *per: str) -> list[float]:
        x = np.array([[row[p] for p in per] + [1.0] for row in rows])
        y = np.array([row[name] for row in rows])
        # Relative errors count, or the largest size alone would.
        rise = np.linalg.lstsq(x / y[:, None], np.ones(len(y)), rcond=None)[0]
        off = 100 * np.abs(x @ rise / y - 1).max()
        line: dict = {"part": name, "fixed": rise[-1]}
        for p, value in zip(per, rise, strict=False):
            scale, unit = (1e3, "thousand") if p == "stocks" else (1e6, "million")
            line[f"per {unit} {'stocks' if p == 'stocks' else 'stock-days'}"] = (
                scale * value
            )
        found.append({**line, "off %": off})
        return [float(v) for v in rise]

    data = slopes("data s", "stock-days", "stocks")
    epoch = slopes("epoch s", "trained")
    score = slopes("score s", "stock-days")
    load = slopes("load MiB", "stock-days")
    train = slopes("train MiB", "stock-days", "stocks")
    parquet = slopes("parquet MiB", "stock-days")
    bins = slopes("bins MiB", "stock-days")
    recorder = slopes("recorder MiB", "scored")
    stocks, years, days = 5000, 17, 243
    tasks, seeds, epochs = 3 * 12 * 3 * 2, 3, 30
    every = stocks * years * days
    window = 12 * days * stocks  # 10 years to train, 1 to validate, 1 to score
    # Data is prepared once for the seeds of a window.
    seconds = (data[0] * window + data[1] * stocks) / seeds + score[0] * window
    seconds += epoch[0] * 10 * days * stocks * epochs
    one = seconds / 3600
    # The raw frame of the years that other windows need.
    start = max(row["start MiB"] for row in rows) + (every - window) * 50 * 4 / 2**20
    memory = {
        "loading": start + load[0] * window + load[-1],
        "training": start + train[0] * window + train[1] * stocks + train[-1],
    }
    worker = max(memory.values()) / 1024
    plans = [
        {"part": f"memory of a worker, {name}, GiB", "whole study": value / 1024}
        for name, value in memory.items()
    ]
    plans += [
        {"part": "disk of the store, GiB", "whole study":
            (parquet[0] + bins[0]) * every / 1024},
        {"part": "disk of the recorders, GiB", "whole study":
            (recorder[0] * days * stocks + recorder[-1]) * tasks / 1024},
        {"part": f"one task of {epochs} epochs, core hours", "whole study": one},
        {"part": f"{tasks} tasks, core hours", "whole study": tasks * one},
    ]  # fmt: skip
    machines = (("2 cores", 2), ("16 cores", 16), ("cluster, 8 x 16 cores", 128))
    for name, cores in machines:
        hours = -(-tasks // cores) * one
        plans += [
            {"part": f"{name}: hours, a task a core", "whole study": hours},
            {"part": f"{name}: memory, GiB", "whole study": cores * worker},
        ]
    work = training_flop() * 10 * days * stocks * epochs * tasks
    plans += [
        {"part": "arithmetic of training, EFLOP", "whole study": work / 1e18},
        {"part": f"one GPU: hours, if it sustains {GPU_FLOPS / 1e12:g} TFLOP/s (not "
            "measured)", "whole study": work / GPU_FLOPS / 3600},
    ]  # fmt: skip
    return found, plans


def training_flop() -> float:
    """Count the operations, forward and backward, that a trained stock-day takes."""
    from torch.utils.flop_counter import FlopCounterMode

    from qlib_ext.models import MultiFactorRNN

    model = MultiFactorRNN(n_factors=64, hidden_size=FULL["hidden"], num_layers=2)
    network, stocks = model.build_network(48), 8
    x = torch.zeros(model.step_len - 1 + model.chunk, stocks, 48)
    with FlopCounterMode(display=False) as counter:
        network.linear(network.encoder(x)[0][-model.chunk :]).sum().backward()
    return counter.get_total_flops() / (model.chunk * stocks)


def one_day(size: dict, folder: Path) -> list[dict]:
    import qlib
    from qlib.data import D
    from qlib.utils import init_instance_by_config
    from qlib.workflow import R

    from qlib_ext.dataset import PanelDataset
    from qlib_ext.models import MultiFactorRNN
    from qlib_ext.rolling.score import score_day

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
    p.add_argument("--part", choices=["tasks", "day", "size"], default="tasks")
    p.add_argument("--one", help=argparse.SUPPRESS)
    p.add_argument("--store", help=argparse.SUPPRESS)
    p.add_argument("--rounds", type=int, default=1, help="contenders take turns")
    p.add_argument("--epochs", type=int, help="of a task")
    p.add_argument("--only", nargs="+", choices=TASKS, help="these, in this order")
    args = p.parse_args()
    size = dict(QUICK if args.quick else FULL)
    size["epochs"] = args.epochs or size["epochs"]
    env = environment(args.threads)
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    if args.one and args.part == "size":
        stocks, days = map(int, args.one.split(","))
        print("\n" + json.dumps(size_task(Path(args.store), stocks, days)))
        return
    if args.one:
        name = args.one
        for module in (
            "qlib.workflow.record_temp",
            "qlib_ext.rolling",
            "data_handlers.day",
        ):
            importlib.import_module(module)
        row = (
            qlib_rolling(size, args.store)
            if name == TASKS[0]
            else ours(size, args.store, name.rpartition(" ")[2])
        )
        print("\n" + json.dumps(row))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.part == "tasks":
            tasks(args, size, folder, env)
        elif args.part == "size":
            # Stocks and days grow by themselves, or their parts could not be told.
            sizes = [(100, 400), (400, 400), (200, 800), (200, 400)]
            if not args.quick:
                sizes = [(250, 600), (1000, 600), (500, 1200), (500, 600)]
            rows = []
            for a, b in sizes:
                work = folder / f"{a}-{b}"
                work.mkdir()
                # Made here, so that the child's memory is the task's alone.
                size_data(work, a, b)
                more = ["--part", "size", "--store", str(work)]
                rows.append(child(args, f"{a},{b}", folder, more))
            found, plans = whole_study(rows)
            show("one task, one epoch, K=64, L=60", rows, env, args.json)
            show("slopes", found, env, None)
            show("the whole study", plans, env, None)
        else:
            os.chdir(folder)
            show("one new day", one_day(size, folder), env, args.json)


def child(args, name: str, work: Path, more: list[str]) -> dict:
    """Run one contender in a process of its own; its last line is its figures."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", name, *more]
    command += ["--threads", str(args.threads)] + ["--quick"] * args.quick
    command += ["--epochs", str(args.epochs)] if args.epochs else []
    done = subprocess.run(
        command,
        cwd=work,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
    )
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    print(f"{name}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def tasks(args, size: dict, folder: Path, env: dict) -> None:
    from mlflow import MlflowClient

    from qlib_ext.market import make_market

    store = make_market(
        folder / "market", stocks=size["stocks"], years=YEARS, seed=5, trades=60
    )
    database = folder / "mlruns.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    names = args.only or TASKS
    found: dict[str, list[dict]] = {name: [] for name in names}
    for turn in range(args.rounds):
        for i, name in enumerate(names):
            work = folder / f"{turn}-{i}"
            work.mkdir()
            shutil.copy(database, work)
            found[name].append(child(args, name, work, ["--store", str(store)]))
    rows = {
        name: {k: float(np.median([r[k] for r in runs])) for k in runs[0]}
        for name, runs in found.items()
    }
    qlib = rows.get(TASKS[0], {})
    for row in rows.values():
        for what, unit in (("x Qlib", "s a task"), ("x Qlib cpu", "cpu s a task")):
            row[what] = qlib[unit] / row[unit] if qlib else None
    title = (
        f"3 years x 2 seeds, {size['stocks']} stocks, 2, 3 and 4 years of training, "
        f"L={size['step_len']}, hidden {size['hidden']}, "
        f"{size['epochs']} epoch(s)"
    )
    show(title, [{"contender": k, **v} for k, v in rows.items()], env, args.json)


if __name__ == "__main__":
    main()
