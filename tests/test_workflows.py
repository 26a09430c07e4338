"""Every file of workflows/: merges as qrun does, builds, and ends with figures."""

import inspect
import os
import re
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from qlib.utils import init_instance_by_config

from qlib_ext import recorders
from qlib_ext.dataset import check_purge
from qlib_ext.workflow import load_workflow

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "workflows").glob("*.yaml"))
REAL = sorted((ROOT / "workflows" / "real").glob("*.yaml"))
WEEKDAYS = pd.bdate_range("2012-01-01", "2020-12-31")
# Cheap settings for any of our models; a workflow's own choice of what to run stays.
TINY = {
    "n_epochs": 1,
    "early_stop": 1,
    "hidden_size": 8,
    "num_layers": 1,
    "d_model": 8,
    "d_state": 4,
    "n_seeds": 1,
    "num_boost_round": 5,
    "num_threads": 1,
    "GPU": -1,
}
TINY_RNN = {"n_epochs": 1, "hidden_size": 8, "num_layers": 1, "GPU": -1}
TINY_OTHER = {
    "Mamba": {"n_epochs": 1, "d_model": 8, "d_state": 4, "num_layers": 1, "GPU": -1},
    "LGBModel": {"num_boost_round": 5, "num_threads": 1},
}


@cache
def loaded(path):
    """A file as it stands; whoever changes it loads it anew."""
    return load_workflow(path)


def ids(path):
    return path.stem


@pytest.mark.parametrize("path", FILES, ids=ids)
class TestFile:
    def test_has_a_seed_and_an_experiment_of_its_own_name(self, path):
        config = loaded(path)
        assert config["experiment_name"] == path.stem
        model = config["task"]["model"]
        assert "'seed': " in str(model) or "linear" in model["module_path"]

    def test_segments_are_in_order_and_purged(self, path):
        settings = loaded(path)["task"]["dataset"]["kwargs"]
        segments, handler = settings["segments"], settings["handler"]["kwargs"]
        assert list(segments) == ["train", "valid", "test"]
        assert check_purge(segments, WEEKDAYS, 11) == []
        fit = [pd.Timestamp(handler[f"fit_{k}_time"]) for k in ("start", "end")]
        assert fit[0] >= pd.Timestamp(segments["train"][0])
        assert fit[1] <= pd.Timestamp(segments["train"][1])

    def test_one_variable_points_it_at_another_store(self, path, monkeypatch):
        default = loaded(path)["qlib_init"]["provider_uri"]
        own = {"convertible": "data/market.bonds", "treasury": "data/market.futures"}
        assert default == own.get(path.stem.partition("_")[0], "data/market")
        monkeypatch.setenv("QLIB_EXT_STORE", "/somewhere/else")
        assert load_workflow(path)["qlib_init"]["provider_uri"] == "/somewhere/else"

    def test_a_store_of_another_region_is_told_of_at_the_start(self, path, monkeypatch):
        monkeypatch.setattr(recorders, "check_store", lambda: None)
        monkeypatch.setattr(recorders, "_markets", lambda: {"all", "sp500"})
        monkeypatch.setattr(
            recorders,
            "known_fields",
            lambda fields, codes: fields if codes == "all" else [],
        )
        task = loaded(path)["task"]
        if not re.search(r"csi\d+|SH000300|CBEQUAL", str(task)):
            recorders.check_task(task)
            return
        match = (
            "the store has no (market|close) .*; set it to|set it to one of all, sp500"
        )
        with pytest.raises(ValueError, match=match):
            recorders.check_task(task)


def test_a_store_without_industries_is_told_of_at_the_start(monkeypatch):
    monkeypatch.setattr(recorders, "check_store", lambda: None)
    monkeypatch.setattr(recorders, "_markets", lambda: {"all"})
    monkeypatch.setattr(recorders, "known_fields", lambda fields, codes: [])
    task = load_workflow(ROOT / "workflows/base_alpha158.yaml")["task"]
    match = (
        r"learn_processors\[1\].kwargs`: .* no value of `\$industry`.*industry: null"
    )
    with pytest.raises(ValueError, match=match):
        recorders.check_task(task)
    kwargs = task["dataset"]["kwargs"]["handler"]["kwargs"]
    kwargs["learn_processors"][1]["kwargs"] |= {"industry": None}
    recorders.check_task(task)  # `styles: all` takes what there is


def test_a_back_test_that_runs_off_the_calendar_is_told_of_at_the_start(qlib_market):
    days = (qlib_market / "calendars/day_future.txt").read_text().split()
    for end, refused in ((days[-1], True), (None, True), (days[-2], False)):
        record = {"class": "PortAnaRecord", "kwargs": {"config": {"backtest": {}}}}
        record["kwargs"]["config"]["backtest"]["end_time"] = end
        if not refused:
            recorders.check_task({"record": [record]})
            continue
        with pytest.raises(ValueError, match=f"set it to {days[-2]} or earlier"):
            recorders.check_task({"record": [record]})


def named_classes(value):
    """Every {class, module_path, kwargs} inside a configuration."""
    inside = list(value.values()) if isinstance(value, dict) else []
    inside = value if isinstance(value, list) else inside
    if isinstance(value, dict) and {"class", "module_path"} <= set(value):
        yield value
    for part in inside:
        yield from named_classes(part)


@pytest.mark.parametrize("path", FILES + REAL, ids=ids)
def test_classes_are_there_and_take_the_arguments(path):
    found = list(named_classes(loaded(path)))
    assert len(found) > 5
    for part in found:
        made = getattr(import_module(part["module_path"]), part["class"])
        inspect.signature(made).bind_partial(**part.get("kwargs", {}))
    model = loaded(path)["task"]["model"]
    if model["module_path"].startswith("qlib_ext"):
        init_instance_by_config(model)  # whose limits are checked too


def shrink(config):
    """The same workflow on the test market's dates, for one epoch."""
    moved = {
        "2012-01-01": "2019-07-01",
        "2016-12-14": "2019-12-13",
        "2017-01-01": "2020-01-02",
        "2017-12-14": "2020-02-26",
        "2018-01-01": "2020-03-16",
        "2020-12-31": "2020-05-29",
    }

    def move(value):
        if isinstance(value, dict):
            return {k: move(v) for k, v in value.items()}
        if isinstance(value, list):
            return [move(v) for v in value]
        return moved.get(str(value), value)

    config["task"] = move(config["task"])
    for record in config["task"].get("record", []):
        if record["class"] == "EnhanceRecord":
            # Few factors: the record's own tests do more.
            record["kwargs"]["risk_model"] = {"styles": ["size"], "window": 130}
        if record["class"] == "GroupRecord":  # thirty stocks are of three industries
            for group in record["kwargs"]["sets"].values():
                group["k"] = 1
    model = config["task"]["model"]
    if model["class"] == "IncrementalModel":
        model = model["kwargs"]["model"]  # whose arguments decide the training
    kwargs = model["kwargs"]
    kwargs.update({k: v for k, v in TINY.items() if k in kwargs})
    for source in kwargs.get("sources", {}).values():
        tiny = TINY_OTHER.get(source["model"]["class"], TINY_RNN)
        source["model"]["kwargs"].update(tiny)
        if source["model"]["class"] == "GRUGAT":  # the families' files run the rest
            source["model"]["kwargs"].update(graphs=["industry"], weighting="equal")
    if model["class"] in ("ScoreAverage", "FamilyComposite"):
        return config
    if model["module_path"].startswith("qlib_ext"):
        widths = {
            "Mamba": {"d_model": 8, "d_state": 4, "num_layers": 1},
            "MASTER": {"d_model": 8},
        }
        own = {"hidden_size": 8, "num_layers": 1}
        for name, width in widths.items():
            own = width if model["class"].startswith(name) else own
        kwargs.update({**own, "GPU": -1})
        if "n_folds" in kwargs:
            kwargs.update({"n_folds": 2, "gate_n_epochs": 1})
    kwargs.pop("checkpoint_dir", None)
    if "n_factors" in kwargs:
        kwargs["n_factors"] = min(kwargs["n_factors"], 4)
    return config


COMPLETE = [f for f in FILES if not f.name.startswith("base_")]
# One file for each model, and each handler in one of them; the others combine the
# same classes or differ in arguments, which are checked above: run by hand (-m slow).
# `rnn_day_multi` is run below, as a user would.
CHOSEN = {
    "rnn_fused",  # the day, minute and Level-2 features together
    "rnn_alpha158",
    "linear_alpha158",
    "mamba_moe",  # its experts are Mamba's
    "ml_c",  # holds GRUGAT on the five families
    "enhance_rnn",
    "dl_em_dynamic",
    "convertible_gru",
    "risk_control",
    "decomp_gru",
    "treasury_dual",
}
RUN = [
    pytest.param(f, id=f.stem, marks=[] if f.stem in CHOSEN else pytest.mark.slow)
    for f in COMPLETE
]


def figures(folder, experiment):
    """Metrics and factor artifacts of the only run of an experiment."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlruns.db")
    found = client.get_experiment_by_name(experiment)
    (run,) = client.search_runs([found.experiment_id])
    assert run.info.status == "FINISHED"
    folders = ("factor", "timing")
    artifacts = [a for f in folders for a in client.list_artifacts(run.info.run_id, f)]
    return run.data.metrics, {a.path for a in artifacts}


@pytest.fixture(scope="module")
def market_levels(made_once):
    """A small market with minute, Level-2 and flow features, and a mined one."""
    from qlib_ext.aggregates import build_store
    from qlib_ext.market import make_market, make_minute, make_ticks

    turn = {"name": "turn", "expression": "Mean($turnover, 5) / Mean($turnover, 20)"}
    options = dict(stocks=30, years=2, seed=5, trades=20, order_flow=True, funds=20)

    def make(store):
        make_market(store, **options)
        (store / "mined.yaml").write_text(yaml.safe_dump({"expressions": [turn]}))
        span = {"start": "2019-04-01", "end": "2020-06-30"}  # `shrink` has its dates
        minute = make_minute(store, bar_minutes=15, **span)
        for kind in ("ms", "bars"):
            build_store(kind, minute, store, bar_minutes=15)
        ticks = make_ticks(store, stocks=12, start="2019-12-02", end="2020-05-29")
        build_store("l2", ticks, store)

    return made_once("levels", make)


@pytest.fixture(scope="module")
def market_bonds(market_small, made_once):
    """Bonds on the shares of `market_small`."""
    from qlib_ext.market import make_bonds

    return made_once("bonds", lambda out: make_bonds(market_small, bonds=40, out=out))


def days_of(path):
    """Days of the first label of a workflow; Qlib's own handlers say none."""
    handler = loaded(path)["task"]["dataset"]["kwargs"]["handler"]
    horizon = handler["kwargs"].get("horizon", 10)
    return horizon[0] if isinstance(horizon, list) else horizon


def write_small(path, store, folder):
    config = shrink(load_workflow(path))
    config["qlib_init"].update(provider_uri=str(store), kernels=1)
    # Absolute: within one process mlflow keeps one connection for each uri it is told.
    config["qlib_init"]["exp_manager"]["kwargs"]["uri"] = (
        f"sqlite:///{folder}/mlruns.db"
    )
    (folder / "workflow.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("path", RUN)
def test_workflow_ends_with_figures_in_the_recorder(
    path, request, tmp_path, monkeypatch, use_store
):
    from qlib.cli.run import workflow

    levels = any(part in path.stem for part in ("_ms_", "_l2_", "fused", "ml_c"))
    levels |= path.stem.split("_")[0] in ("pv", "g", "c", "hf", "dp", "dl", "multi")
    levels |= path.stem in ("gru_nn", "residual_attention_lstm", "enhance_dl_em")
    bonds = path.stem.startswith("convertible")
    timing = path.stem.startswith("treasury")
    kind = "market_levels" if levels else "market_bonds" if bonds else "market_small"
    kind = "market_futures" if timing else kind
    store = request.getfixturevalue(kind)
    write_small(path, store, tmp_path)
    monkeypatch.chdir(tmp_path)
    workflow("workflow.yaml")  # what the command qrun calls
    metrics, artifacts = figures(tmp_path, path.stem)
    if timing:
        assert {"timing hit rate", "timing p value"} <= set(metrics), sorted(metrics)
        assert "timing/report.html" in artifacts
        return
    of_pool = {f"Rank IC {days_of(path)}d"}
    of_pool |= {"Rank IC 5d balanced"} if bonds else set()
    assert {"IC", "Rank IC", *of_pool} <= set(metrics), sorted(metrics)
    assert "factor/report.html" in artifacts
    if "mamba" in path.stem:
        assert {"mamba_explained", "mamba_neutral_rank_ic"} <= set(metrics)
        assert ("gate_entropy" in metrics) == path.stem.endswith(("moe", "equal"))
    if "ReversalRecord" in path.read_text():
        assert {"sharp exposure", "other excess"} <= set(metrics)
    if path.stem == "ml_c":
        means = {k: v for k, v in metrics.items() if k.startswith("weight_")}
        for weighting in ("sa", "long_only"):
            own = [v for k, v in means.items() if f"_{weighting}_" in k]
            assert len(own) == 5 and sum(own) == pytest.approx(1.0)


def test_records_work_without_the_frames(
    market_small, tmp_path, monkeypatch, use_store
):
    from qlib.cli.run import workflow

    write_small(ROOT / "workflows" / "rnn_day_multi.yaml", market_small, tmp_path)
    config = yaml.safe_load((tmp_path / "workflow.yaml").read_text())
    config["task"]["dataset"]["kwargs"]["keep_frames"] = False
    records = [r for r in config["task"]["record"] if r["class"] != "PortAnaRecord"]
    risk = {"class": "RiskRecord", "module_path": "qlib_ext.record_temp"}
    config["task"]["record"] = [*records, {**risk, "kwargs": {"dataset": "<DATASET>"}}]
    classes = {r["class"] for r in config["task"]["record"]}
    assert {"SignalRecord", "SigAnaRecord", "FactorRecord", "RiskRecord"} <= classes
    (tmp_path / "workflow.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    workflow("workflow.yaml")
    metrics, artifacts = figures(tmp_path, "rnn_day_multi")
    # Of SigAnaRecord; of FactorRecord's label and risk group; of RiskRecord.
    assert {"Rank IC", "Rank IC 10d", "Neutral Rank IC 10d", "size return"} <= set(
        metrics
    )
    assert "factor/report.html" in artifacts


@pytest.mark.parametrize("command", ["", pytest.param("qrun", marks=pytest.mark.slow)])
def test_a_run_as_a_user_starts_it_then_the_report_command(
    command, market_small, tmp_path, fresh_database, monkeypatch, use_store
):
    from qlib.cli.run import workflow

    from qlib_ext.cli import main

    path = ROOT / "workflows" / "rnn_day_multi.yaml"
    write_small(path, market_small, fresh_database(tmp_path))
    monkeypatch.chdir(tmp_path)
    if command:
        done = subprocess.run(
            [str(Path(sys.executable).with_name(command)), "workflow.yaml"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        workflow("workflow.yaml")  # what that command calls
    # Absolute: MLflow keeps one connection for each uri that the process has named.
    asked = ["--experiment", path.stem, "--uri", f"sqlite:///{tmp_path}/mlruns.db"]
    shown = CliRunner().invoke(main, ["report", *asked])
    assert shown.exit_code == 0, shown.output
    (page,) = (tmp_path / "reports").glob("*.html")
    assert str(page.name) in shown.output
    assert "Rank IC" in shown.output
    metrics, artifacts = figures(tmp_path, path.stem)
    # Every epoch is in the recorder, and the named units.
    assert {"seed0_train_mse", "seed0_train_penalty", "seed0_valid_rank_ic"} <= set(
        metrics
    )
    assert "factor/units.parquet" in artifacts
