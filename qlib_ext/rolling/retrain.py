"""Retrain a workflow window by window and seed by seed, and join the scores."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from qlib.data.dataset import DatasetH
from qlib.log import get_module_logger
from qlib.workflow import R
from qlib.workflow.recorder import MLflowRecorder, Recorder

from data_handlers.arguments import Count, Whole, checked, parse_range
from qlib_ext.models.score_average import standardize_scores
from qlib_ext.recorders import DamagedError, load_frame, load_json, save_files
from qlib_ext.rolling.data import files_of, fingerprints
from qlib_ext.rolling.run import run_key, run_locked
from qlib_ext.rolling.tasks import (
    ROLE,
    RUN,
    Context,
    Outcome,
    Task,
    init_qlib,
    make_dataset,
    recorders_of,
    run_records,
    seeded,
    set_aside,
    start_recorder,
    task_key,
)
from qlib_ext.rolling.windows import (
    Window,
    calendar_gap,
    label_reach_of,
    make_windows,
    move_task,
    parse_step,
)
from qlib_ext.workflow import load_workflow

__all__ = ["PARTS", "RollResult", "absolute_init", "join_scores", "plan", "roll"]

logger = get_module_logger("qlib_ext.rolling")

#: Artifact of the joined recorder: what it was joined from.
PARTS = "parts.json"
_SIGNAL = {"class": "SignalRecord", "module_path": "qlib.workflow.record_temp"}


@dataclass
class RollResult:
    """What a rolling run left.

    Attributes
    ----------
    tasks : list of Task
    outcomes : list of Outcome
        In the order of `tasks`.
    experiment : str
        Of the joined recorder; the tasks' is this and ``_tasks``.
    recorder : str
        Id of the joined recorder; empty if it was not made.
    metrics : dict
        Of the joined recorder.
    """

    tasks: list[Task]
    outcomes: list[Outcome]
    experiment: str
    recorder: str = ""
    metrics: dict[str, float] | None = None

    @property
    def failed(self) -> list[tuple[Task, Outcome]]:
        """Tasks that failed, and how."""
        pairs = zip(self.tasks, self.outcomes, strict=True)
        return [(task, out) for task, out in pairs if out.status == "failed"]


@dataclass
class Plan:
    """Everything a rolling run needs to know before it starts."""

    windows: list[Window]
    tasks: list[Task]
    qlib_init: dict
    experiment: str
    run: str
    joined_records: list
    dataset: dict
    facts: dict[str, Any]

    def table(self) -> pd.DataFrame:
        """One row a window."""
        return pd.DataFrame([window.record() for window in self.windows])


def absolute_init(
    config: Mapping[str, Any], folder: Path, uri: str | None = None
) -> dict[str, Any]:
    """Arguments of `qlib.init` that mean the same in any process and folder.

    Parameters
    ----------
    config : dict
        A workflow.
    folder : Path
        Where its relative paths start.
    uri : str, optional
        MLflow store instead of the workflow's; without either ``sqlite:///mlruns.db``.

    Raises
    ------
    ValueError
        If the workflow has no `provider_uri`.
    """
    given = copy.deepcopy(dict(config.get("qlib_init") or {}))
    provider = given.get("provider_uri")
    if not isinstance(provider, str):
        raise ValueError(
            f"`qlib_init.provider_uri` must be one path, got {provider!r}."
        )
    given["provider_uri"] = str((folder / Path(provider).expanduser()).resolve())
    manager = given.setdefault(
        "exp_manager",
        {
            "class": "MLflowExpManager",
            "module_path": "qlib.workflow.expm",
            "kwargs": {},
        },
    )
    kwargs = manager.setdefault("kwargs", {})
    kwargs.setdefault("default_exp_name", "Experiment")
    if uri is not None:
        kwargs["uri"] = uri
    uri = kwargs.setdefault("uri", "sqlite:///mlruns.db")
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        kwargs["uri"] = f"sqlite:///{(folder / uri[10:]).resolve()}"
    # Tasks are the unit of work: no further processes below them.
    given["kernels"] = 1
    return given


@checked
def plan(
    workflow: str | os.PathLike[str] | Mapping[str, Any],
    test: str,
    *,
    seeds: Count = 3,
    scheme: str = "day",
    step: str = "year",
    start: str | None = None,
    train_months: int = 120,
    valid_months: int = 12,
    purge: Whole | None = None,
    experiment: str | None = None,
    uri: str | None = None,
    numbers: bool = True,
) -> Plan:
    """Lay out windows and tasks; trains nothing, but initialises Qlib.

    Parameters
    ----------
    workflow : path or dict
        As `qrun` takes it.
    test : str
        Years or dates to score; see `arguments.parse_range`.
    seeds : int
        Models a window, with the workflow's seed, the next one, and so on.
    scheme, train_months, valid_months
        See `windows.make_windows`.
    step : str
        Length of a test window; see `windows.parse_step`.
    start : str, optional
        First day to learn from. By default scheme `day` takes all that the store has,
        `l2` the handler's `start_time`.
    purge : int, optional
        Trading days between segments; by default as far as the label reaches.
    experiment : str, optional
        Of the joined recorder; by default the workflow's and ``_roll``.
    uri : str, optional
        MLflow store instead of the workflow's.
    numbers : bool, default True
        Whether tasks know the numbers of their days in the store, all of which are
        read for it: without, what is kept of earlier runs cannot be told.

    Raises
    ------
    ValueError
        On any argument or configuration that cannot be rolled.
    """
    from qlib.data import D

    config = (
        copy.deepcopy(dict(workflow))
        if isinstance(workflow, Mapping)
        else load_workflow(workflow)
    )
    if "task" not in config:
        raise ValueError("the workflow has no `task`.")
    qlib_init = absolute_init(config, Path.cwd(), uri)
    init_qlib(qlib_init)
    task = config["task"]
    reach = label_reach_of(task) if purge is None else purge
    calendar = pd.DatetimeIndex(D.calendar(freq="day"))
    if start is None and scheme == "l2":
        handler = task["dataset"]["kwargs"]["handler"].get("kwargs", {})
        start = handler.get("start_time")
    windows = make_windows(
        calendar,
        parse_range(test, "test"),
        scheme=scheme,
        step=parse_step(step),
        reach=reach,
        start=start,
        train_months=train_months,
        valid_months=valid_months,
        gap=calendar_gap(task, calendar),
    )
    for window in windows:
        if window.note:
            logger.warning(f"window {window.name}: {window.note}")
    each, joined = split_records(task.get("record") or [])
    name = experiment or f"{config.get('experiment_name', 'workflow')}_roll"
    provider = qlib_init["provider_uri"]
    tasks = make_tasks(task, windows, seeds, each, provider, numbers=numbers)
    facts = {
        "scheme": scheme,
        "step": step,
        "test": test,
        "seeds": seeds,
        "purge": reach,
    }
    return Plan(
        windows=windows,
        tasks=tasks,
        qlib_init=qlib_init,
        experiment=name,
        run=run_key(tasks),
        joined_records=joined,
        dataset=move_task(task, windows[0])["dataset"],
        facts=facts,
    )


def make_tasks(
    task: Mapping[str, Any],
    windows: Sequence[Window],
    seeds: int,
    records: Sequence[Mapping],
    provider: str,
    variant: str = "",
    numbers: bool = True,
) -> list[Task]:
    """One task for each window and seed, the seeds of a window in a row."""
    tasks = []
    files = files_of([task["model"], task["dataset"]])
    data = [""] * len(windows)
    if numbers:
        data = fingerprints(provider, [window.handler[1] for window in windows], files)
    for window, mark in zip(windows, data, strict=True):
        moved = task if window.name == "own" else move_task(task, window)
        for number in range(seeds):
            model, seed = seeded(moved["model"], number, seeds)
            config = {
                "model": model,
                "dataset": copy.deepcopy(moved["dataset"]),
                "record": [copy.deepcopy(dict(r)) for r in records],
            }
            setting = task_key(config, window, provider)
            key = task_key(config, window, provider, mark)
            tasks.append(Task(key, window, seed, config, variant, setting))
    return tasks


def split_records(records: Any) -> tuple[list[dict], list[dict]]:
    """Split records into those of each task and those of the joined score.

    Records that read the model (``<MODEL>`` among their arguments) run on every task,
    since the joined score has many models; all others, and FactorRecord, which does
    without one, run once on the joined score.
    """
    each: list[dict] = [{**_SIGNAL, "kwargs": {}}]
    joined = []
    for record in [records] if isinstance(records, Mapping) else list(records):
        record = copy.deepcopy(dict(record))
        name = str(record.get("class", "")).rpartition(".")[2]
        kwargs = record.setdefault("kwargs", {}) or {}
        if name == "SignalRecord":
            continue
        if "<MODEL>" in json.dumps(kwargs, default=str) and name != "FactorRecord":
            each.append(record)
        else:
            joined.append(record)
    return each, joined


def roll(
    made: Plan,
    *,
    workers: int = 1,
    backend: str = "local",
    address: str | None = None,
    threads: int | None = None,
    retries: int = 1,
    partial: bool = False,
    work: str | os.PathLike[str] = ".rolling",
    progress: bool = False,
) -> RollResult:
    """Train what is not finished, then join the scores and run the records on them.

    Parameters
    ----------
    made : Plan
    workers, backend, address, threads, retries, work, progress
        See `run.run_locked`.
    partial : bool
        Join even if tasks failed: their windows have fewer seeds, or are left out.

    Raises
    ------
    ValueError
        If another process works on the same run, or an option is wrong.
    """
    experiments = f"{made.experiment}_tasks", made.experiment
    with run_locked(
        made.tasks,
        made.windows,
        made.qlib_init,
        experiments,
        f"run {made.run}",
        workers=workers,
        backend=backend,
        address=address,
        threads=threads,
        retries=retries,
        work=work,
        progress=progress,
    ) as (context, outcomes):
        result = RollResult(made.tasks, outcomes, made.experiment)
        if result.failed and not partial:
            return result
        if all(out.status == "failed" for out in outcomes):
            return result
        joined = _joined_before(made, outcomes)
        if joined is None:
            joined = _join(made, result, context)
        result.recorder, result.metrics = joined.id, joined.list_metrics()
    return result


def join_scores(parts: Sequence[Sequence[pd.Series]]) -> pd.Series:
    """Join scores: average over seeds within a window, then windows in time.

    Parameters
    ----------
    parts : list of list of Series
        Windows, then seeds; each by (datetime, instrument). Windows share no day.

    Returns
    -------
    Series
        `score`. One seed is taken as it is; several are standardised over each day
        first, as the models average their own seeds.

    Raises
    ------
    ValueError
        If two windows score the same day, or the seeds of one differ in their rows.
    """
    means = []
    for seeds in parts:
        if len(seeds) == 1:
            means.append(seeds[0].sort_index().rename("score"))
            continue
        ordered = [standardize_scores(s.sort_index()) for s in seeds]
        for other in ordered[1:]:
            if not other.index.equals(ordered[0].index):
                raise ValueError(
                    "the seeds of a window score different stocks or days: the store "
                    "changed between them. Remove their recorders and roll again."
                )
        means.append(pd.concat(ordered, axis=1).mean(axis=1).rename("score"))
    joined = pd.concat(means).sort_index()
    if joined.index.has_duplicates:
        day = joined.index[joined.index.duplicated()][0][0]
        raise ValueError(f"two windows score {day:%Y-%m-%d}.")
    return joined


def _joined_before(made: Plan, outcomes: Sequence[Outcome]) -> MLflowRecorder | None:
    """Finished joined recorder of exactly these tasks."""
    parts = sorted(out.recorder for out in outcomes if out.recorder)
    for recorder in recorders_of(made.experiment, f"tags.{RUN} = '{made.run}'"):
        if recorder.status != Recorder.STATUS_FI:
            continue
        if PARTS not in recorder.list_artifacts():
            continue
        try:
            known = load_json(recorder, PARTS, "records", "parts")
            load_frame(recorder, "pred.pkl")
        except DamagedError as error:
            set_aside(recorder, error)
            continue
        same = known["records"] == json.loads(json.dumps(made.joined_records))
        if same and sorted(p["recorder"] for p in known["parts"]) == parts:
            return recorder
    return None


def _join(made: Plan, result: RollResult, context: Context) -> MLflowRecorder:
    tasks = R.get_exp(experiment_name=context.experiment, create=False)
    by_window: dict[str, list[tuple[Task, Any]]] = {}
    for task, out in zip(result.tasks, result.outcomes, strict=True):
        if out.status != "failed":
            found = tasks.get_recorder(recorder_id=out.recorder, create=False)
            by_window.setdefault(task.window.name, []).append((task, found))
    scores, labels, parts = [], [], []
    for pairs in by_window.values():
        of_seeds = []
        for task, recorder in pairs:
            of_seeds.append(load_frame(recorder, "pred.pkl").iloc[:, 0])
            parts.append(
                {
                    "recorder": recorder.id,
                    "seed": task.seed,
                    **task.window.record(),
                }
            )
        scores.append(of_seeds)
        labels.append(load_frame(pairs[0][1], "label.pkl"))
    joined = join_scores(scores)
    label = pd.concat(labels).sort_index()
    name = f"{made.facts['test']} {made.facts['scheme']}"
    tags = {
        RUN: made.run,
        ROLE: "joined",
        "tasks": context.experiment,
        "failed_tasks": len(result.failed),
        **made.facts,
    }
    with start_recorder(made.experiment, name, tags) as recorder:
        R.log_params(**{k: str(v) for k, v in made.facts.items()})
        R.save_objects(**{"pred.pkl": joined.to_frame("score"), "label.pkl": label})
        of_run = {
            "experiment": context.experiment,
            "run": made.run,
            "facts": made.facts,
            "records": made.joined_records,
            "parts": parts,
        }
        table = made.table().to_csv(index=False)
        save_files(recorder, {PARTS: of_run, "windows.csv": table})
        _joined_records(made, recorder, joined, context)
    return recorder


def _joined_records(
    made: Plan, recorder: Any, joined: pd.Series, context: Context
) -> None:
    """Run the workflow's records on the joined score."""
    if not made.joined_records:
        return
    days = joined.index.get_level_values("datetime")
    first, last = f"{days.min():%Y-%m-%d}", f"{days.max():%Y-%m-%d}"
    records = copy.deepcopy(made.joined_records)
    dataset = None
    if "<DATASET>" in json.dumps(records, default=str):
        dataset = _joined_dataset(made, first, last, context)
    for record in records:
        backtest = record["kwargs"].get("config", {}).get("backtest", {})
        for key, value in (("start_time", first), ("end_time", last)):
            if backtest.get(key) is not None:
                backtest[key] = value
    run_records(records, recorder, None, dataset)


def _joined_dataset(made: Plan, first: str, last: str, context: Context) -> DatasetH:
    """Make a data set of the joined days, for records that read risk or labels.

    Its features are standardised as the first window's model saw them: a later fit
    would know days of the test.
    """
    config = copy.deepcopy(made.dataset)
    kwargs = config["kwargs"]
    kwargs["segments"] = {"test": [first, last]}
    # From the first window's first day on, or its processors could not be fitted.
    handler = kwargs["handler"]["kwargs"]
    handler["start_time"] = min(first, made.windows[0].handler[0])
    handler["end_time"] = last
    return make_dataset(config, context)
