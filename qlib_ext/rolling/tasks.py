"""One unit of work: train one model on one window with one seed, in any process.

A task is finished when its recorder says so: it carries the task's hash as a tag, and
gets its status after everything else was saved. So the tracking database alone tells
what a killed run has left to do, from any machine.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import inspect
import io
import json
import logging
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param
from qlib.config import C
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandlerLP
from qlib.log import get_module_logger
from qlib.model.base import Model
from qlib.utils import (
    auto_filter_kwargs,
    fill_placeholder,
    flatten_dict,
    init_instance_by_config,
)
from qlib.utils.mod import get_callable_kwargs
from qlib.workflow import R
from qlib.workflow.recorder import MLflowRecorder, Recorder

from data_handlers.sharing import FrameShare, shared_class, shared_frames
from qlib_ext.dataset import PanelDataset
from qlib_ext.masking import mask_logs, redact
from qlib_ext.models._base import TorchModel
from qlib_ext.recorders import (
    PROCESS,
    DamagedError,
    failed_if_interrupted,
    load_frame,
    newest_first,
    this_process,
)
from qlib_ext.rolling.windows import Window

__all__ = [
    "Context",
    "Outcome",
    "Task",
    "find_finished",
    "find_kept",
    "forget",
    "init_qlib",
    "run_records",
    "run_task",
    "seeded",
    "set_aside",
    "task_key",
]

logger = get_module_logger("qlib_ext.rolling")

#: Changes when the same task would give another result than before.
_VERSION = 2
TASK, RUN, ROLE = "rolling_task", "rolling_run", "rolling"
SESSION, SETTING = "rolling_session", "rolling_setting"
_ARTIFACTS = {"params.pkl", "pred.pkl", "label.pkl", "dataset"}


@dataclass(frozen=True)
class Task:
    """A model to train.

    Attributes
    ----------
    key : str
        Hash of all that decides the result.
    setting : str
        The same without the numbers in the store.
    window : Window
    seed : int
    config : dict
        Qlib task: `model`, `dataset`, and the records that run on this task.
    variant : str
        Which setting of a study; empty in plain rolling.
    """

    key: str
    window: Window
    seed: int
    config: dict
    variant: str = ""
    setting: str = ""

    @property
    def name(self) -> str:
        """Words for people: variant, window and seed."""
        words = [self.variant] if self.variant else []
        if self.window.name != "own":
            words.append(self.window.name)
        return " ".join([*words, f"seed {self.seed}"])


@dataclass(frozen=True)
class Context:
    """What all tasks of a run share.

    Attributes
    ----------
    run : str
        Hash of the run, for the tag that joins its tasks.
    qlib_init : dict
        Arguments of `qlib.init`, with absolute paths.
    experiment : str
        Experiment of the tasks' recorders.
    span : (str, str)
        Days that cover all windows: what a worker loads once.
    work : str
        Folder for checkpoints.
    threads : int
        Torch threads of a task; 0 leaves them alone. Results are equal for equal
        thread counts only.
    retries : int
        Further attempts after a failure.
    session : str
        Tells the tasks of this call from those of an earlier, killed one.
    """

    run: str
    qlib_init: dict
    experiment: str
    span: tuple[str, str]
    work: str
    threads: int = 0
    retries: int = 1
    session: str = ""


@dataclass
class Outcome:
    """How a task ended."""

    key: str
    status: str  # "finished", "kept" from an earlier run, or "failed"
    recorder: str = ""
    seconds: float = 0.0
    attempts: int = 0
    error: str = ""
    why: str = ""  # it was kept, or trained again
    figures: dict[str, float] = field(default_factory=dict)


def task_key(
    config: Mapping[str, Any], window: Window, provider: str, data: str = ""
) -> str:
    """Hash of what decides a task's result.

    Parameters
    ----------
    config : dict
        Qlib task.
    window : Window
    provider : str
        The store: its path and its trading days within the window count.
    data : str
        Fingerprint of its numbers, see `rolling.data`; without one they don't count.
    """
    from qlib.data import D

    days = D.calendar(start_time=window.handler[0], end_time=window.handler[1])
    text = json.dumps(
        {
            "version": _VERSION,
            "config": _without(config, "checkpoint_dir"),
            "window": window.days(),
            "store": [provider, len(days), *(str(d) for d in days[[0, -1]]), data],
        },
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def seeded(model: Mapping[str, Any], number: int, count: int) -> tuple[dict, int]:
    """Copy a model's configuration for its `number`-th seed; also return the seed.

    Models inside its arguments get the seed too. A model that trains several seeds
    itself (`n_seeds`) trains one.

    Raises
    ------
    ValueError
        If several seeds are asked of a model that takes none.
    """
    made = copy.deepcopy(dict(model))
    first, found = None, False
    for config in _models(made):
        kwargs = config.setdefault("kwargs", {})
        takes, rest = _parameters(config)
        if "seed" in kwargs or "seed" in takes or rest:
            found = True
            own = kwargs.get("seed", 0)
            if first is None:
                first = 0 if own is None else int(own)
            kwargs["seed"] = first + number
        if "n_seeds" in takes:
            kwargs["n_seeds"] = 1
    if not found:
        if count > 1:
            raise ValueError(
                f"{model['class']} takes no `seed`, so {count} seeds would be the same "
                "model; use one seed."
            )
        return made, 0
    return made, int(first or 0) + number


def init_qlib(qlib_init: Mapping[str, Any]) -> None:
    """Initialise Qlib in this process, unless it runs on just these settings.

    Warnings and errors are logged, unless `logging_level` says otherwise.
    """
    import qlib
    import qlib.workflow.record_temp  # it sets its logger to INFO on import

    uri = qlib_init["exp_manager"]["kwargs"]["uri"]
    if C.registered:
        same = (
            str(C.dpm.get_data_uri("day")) == str(qlib_init["provider_uri"])
            and R.exp_manager.default_uri == uri
        )
        if same:
            return
    qlib.init(**{"logging_level": logging.WARNING, **copy.deepcopy(dict(qlib_init))})
    # Qlib gives the level to loggers made from now on only.
    get_module_logger.setLevel(C.logging_level)


def find_finished(experiment: str, key: str, tag: str = TASK) -> MLflowRecorder | None:
    """Finished recorder of a task, the newest if there are several."""
    for recorder in recorders_of(experiment, f"tags.{tag} = '{key}'"):
        if recorder.status == Recorder.STATUS_FI and set(
            recorder.list_artifacts()
        ).issuperset(_ARTIFACTS):
            return recorder
    return None


def find_kept(experiment: str, key: str) -> MLflowRecorder | None:
    """Finished recorder of a task whose scores and labels can be read."""
    while (found := find_finished(experiment, key)) is not None:
        try:
            for name in ("pred.pkl", "label.pkl"):
                load_frame(found, name)
        except DamagedError as error:
            set_aside(found, error)
            continue
        return found
    return None


def set_aside(recorder: MLflowRecorder, error: DamagedError) -> None:
    """Mark a recorder whose files are damaged as FAILED, so that it is made again."""
    logger.warning(f"{error} It is marked FAILED, and made again now.")
    recorder.client.set_terminated(recorder.id, Recorder.STATUS_FA)


def close_orphans(experiment: str, run: str) -> int:
    """Mark recorders of this run which still "run" as failed: their process is dead.

    The run's lock must be held.
    """
    closed = 0
    for recorder in recorders_of(experiment, f"tags.{RUN} = '{run}'"):
        if recorder.status == "RUNNING":
            recorder.client.set_terminated(recorder.id, "KILLED")
            closed += 1
    return closed


@contextmanager
def start_recorder(
    experiment: str, name: str, tags: Mapping[str, Any]
) -> Iterator[MLflowRecorder]:
    """Run a block in a new recorder, which has its tags from the first moment on.

    `R.start` makes the recorder first and lets one tag it later: a process killed in
    between leaves a recorder that runs for ever, and nobody can tell whose it was. Here
    the database gets both in one transaction.
    """
    found = R.get_exp(experiment_name=experiment, create=True)
    run = R.exp_manager.client.create_run(
        found.id,
        tags={PROCESS: this_process(), **{k: str(v) for k, v in tags.items()}},
        run_name=name,
    )
    with (
        failed_if_interrupted(),
        R.start(experiment_name=experiment, recorder_id=run.info.run_id, resume=True),
    ):
        yield R.get_recorder()


def run_task(task: Task, context: Context) -> Outcome:
    """Train, predict and save one task, unless a finished recorder has it already.

    A failure is tried again `retries` times and then reported in the outcome.
    """
    began = time.perf_counter()
    mask_logs()  # this may be a worker
    init_qlib(context.qlib_init)
    kept = find_kept(context.experiment, task.key)
    if kept is not None:
        return kept_outcome(task, kept)
    outcome = Outcome(task.key, "failed", why=_why_again(task, context))
    for attempt in range(context.retries + 1):
        outcome.attempts = attempt + 1
        try:
            recorder, figures = _train(task, context)
        except Exception as error:
            # Reported to the caller, who ends with an error; the other tasks go on.
            outcome.error = redact(f"{type(error).__name__}: {error}")
            logger.error(
                f"{task.name}: attempt {attempt + 1} of {context.retries + 1} failed\n"
                + redact(traceback.format_exc())
            )
            forget()
            if isinstance(error, (ValueError, TypeError)):
                break  # it would fail again in the same way
            continue
        outcome.status, outcome.recorder = "finished", recorder
        outcome.error, outcome.figures = "", figures
        break
    outcome.seconds = time.perf_counter() - began
    return outcome


def kept_outcome(task: Task, recorder: MLflowRecorder) -> Outcome:
    """Outcome of a task that an earlier run has finished."""
    return Outcome(
        task.key,
        "kept",
        recorder.id,
        why="settings, days and data are those of its training",
        figures=recorder.list_metrics(),
    )


def _why_again(task: Task, context: Context) -> str:
    older = find_finished(context.experiment, task.setting, SETTING)
    if not task.setting or older is None:
        return ""
    return (
        f"trained again: the data up to {task.window.handler[1]} have changed since "
        f"recorder {older.id[:8]}"
    )


def _train(task: Task, context: Context) -> tuple[str, dict[str, float]]:
    before = _threads(context.threads)
    figures: dict[str, float] = {}
    try:
        tags = {
            TASK: task.key,
            RUN: context.run,
            SESSION: context.session,
            SETTING: task.setting,
            ROLE: "task",
            "year": task.window.name,
            "seed": task.seed,
            "variant": task.variant,
            "test_start": task.window.test[0],
            "test_end": task.window.test[1],
        }
        with start_recorder(context.experiment, task.name, tags) as recorder:
            config = _with_checkpoints(task, context)
            _log_params(recorder, flatten_dict(config["model"]))
            R.save_objects(task=task.config, **{"window.pkl": task.window.record()})
            clock = _Clock(figures)
            dataset = make_dataset(config["dataset"], context, _reads_panel(config))
            clock.lap("data")
            share = _share(context)
            with shared_frames(share):  # models with data sets of their own
                model = init_instance_by_config(config["model"], accept_types=Model)
                auto_filter_kwargs(model.fit)(dataset, reweighter=None)
            clock.lap("fit")
            R.save_objects(**{"params.pkl": model})
            dataset.config(dump_all=False, recursive=True)
            R.save_objects(dataset=dataset)
            with shared_frames(share):
                run_records(config.get("record"), recorder, model, dataset)
            clock.lap("score")
            figures["peak_mib"] = _peak_mib()
            figures["store_loads"] = float(share.loads)
            now = int(time.time() * 1000)
            recorder.client.log_batch(
                recorder.id, [Metric(k, v, now, 0) for k, v in figures.items()]
            )
            found = set(recorder.list_artifacts())
            if not found.issuperset(_ARTIFACTS):
                raise ValueError(
                    f"the task left no {sorted(_ARTIFACTS - found)}: its records must "
                    "include SignalRecord, and the handler must keep the raw label "
                    "(`drop_raw: false`)."
                )
        shutil.rmtree(_checkpoints(task, context), ignore_errors=True)
        return recorder.id, {**recorder.list_metrics(), **figures}
    finally:
        _threads(before)


def run_records(records: Any, recorder: Any, model: Any, dataset: Any) -> None:
    """Make the records of a workflow and let each write its files.

    Qlib's print the head of what they write.
    """
    filled = fill_placeholder(
        {"record": list(records or [])}, {"<MODEL>": model, "<DATASET>": dataset}
    )
    with redirect_stdout(io.StringIO()):
        for record in filled["record"]:
            init_instance_by_config(
                record,
                recorder=recorder,
                default_module="qlib.workflow.record_temp",
                try_kwargs={"model": model, "dataset": dataset},
            ).generate()


# ---- what a process keeps between tasks ------------------------------------------

_SHARES: dict[tuple, FrameShare] = {}
_DATASETS: dict[str, DatasetH] = {}


def _share(context: Context) -> FrameShare:
    key = (context.qlib_init["provider_uri"], *context.span)
    if key not in _SHARES:
        forget()
        _SHARES[key] = FrameShare(*context.span)
    return _SHARES[key]


def make_dataset(
    config: Mapping[str, Any], context: Context, panel_only: bool = False
) -> DatasetH:
    """Make a data set, or take the last one if only the seed has changed.

    With `panel_only` its processed frames are freed once the panel is made of them.
    """
    key = json.dumps(
        [config, context.qlib_init["provider_uri"], panel_only],
        sort_keys=True,
        default=str,
    )
    if key not in _DATASETS:
        if _DATASETS:
            _DATASETS.clear()
            gc.collect()
        config = copy.deepcopy(dict(config))
        with shared_frames(_share(context)):
            handler = config.get("kwargs", {}).get("handler")
            if isinstance(handler, Mapping):
                config["kwargs"]["handler"] = _handler(handler)
            dataset = init_instance_by_config(config, accept_types=DatasetH)
        if panel_only:
            dataset.free_frames()
        _DATASETS[key] = dataset
    return _DATASETS[key]


def _reads_panel(config: Mapping[str, Any]) -> bool:
    """Whether a task's model and records read the panel and the raw label alone."""
    model, _ = get_callable_kwargs(config["model"])
    dataset, _ = get_callable_kwargs(config["dataset"])
    return (
        issubclass(model, TorchModel)
        and issubclass(dataset, PanelDataset)
        and all(r.get("class") == "SignalRecord" for r in config.get("record") or ())
    )


def _handler(config: Mapping[str, Any]) -> Any:
    cls, kwargs = get_callable_kwargs(config)
    if not (isinstance(cls, type) and issubclass(cls, DataHandlerLP)):
        return init_instance_by_config(dict(config))
    handler = shared_class(cls)(**kwargs)
    handler.__class__ = cls
    return handler


def forget() -> None:
    """Free what this process keeps: after a failure nothing of it is trusted."""
    if _SHARES or _DATASETS:
        _SHARES.clear()
        _DATASETS.clear()
        gc.collect()


def _threads(count: int) -> int:
    """Set torch's threads if `count` is positive; return what they were."""
    import torch

    before = torch.get_num_threads()
    if count > 0:
        torch.set_num_threads(count)
    return before


class _Clock:
    """Wall and processor seconds of the parts of a task."""

    def __init__(self, figures: dict[str, float]) -> None:
        self.figures = figures
        self.last = time.perf_counter(), time.process_time()

    def lap(self, part: str) -> None:
        """Enter the time since the last call as that of `part`, and the peak so far."""
        now = time.perf_counter(), time.process_time()
        for name, a, b in zip(("seconds", "cpu"), self.last, now, strict=True):
            self.figures[f"{name}_{part}"] = b - a
        self.figures[f"peak_mib_{part}"] = _peak_mib()
        self.last = now


def _peak_mib() -> float:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


# ---- small parts -------------------------------------------------------------------


def recorders_of(experiment: str, filter_string: str) -> list[MLflowRecorder]:
    """List the recorders of an experiment that a filter finds, newest first."""
    try:
        found = R.get_exp(experiment_name=experiment, create=False)
    except ValueError:
        return []
    return newest_first(found, filter_string=filter_string)


def _with_checkpoints(task: Task, context: Context) -> dict:
    """Let every model that can save its epochs do so in the run's folder."""
    config = copy.deepcopy(task.config)
    folder = str(_checkpoints(task, context))
    for model in _models(config["model"]):
        takes, _ = _parameters(model)
        if "checkpoint_dir" in takes:
            model.setdefault("kwargs", {})["checkpoint_dir"] = folder
    return config


def _checkpoints(task: Task, context: Context) -> Path:
    return Path(context.work) / "checkpoints" / task.key


def _models(node: Any) -> Iterator[dict]:
    """Model configurations below a node, the outer ones first; no data sets."""
    if isinstance(node, dict):
        if "class" in node and "module_path" in node:
            yield node
        for name, value in node.items():
            if name != "dataset":
                yield from _models(value)
    elif isinstance(node, list):
        for value in node:
            yield from _models(value)


def _parameters(config: Mapping[str, Any]) -> tuple[set[str], bool]:
    """Names that a class takes, and whether it takes any other as well."""
    cls, _ = get_callable_kwargs(config)
    parameters = inspect.signature(cls.__init__).parameters.values()
    named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _without(node: Any, name: str) -> Any:
    if isinstance(node, Mapping):
        return {k: _without(v, name) for k, v in node.items() if k != name}
    if isinstance(node, (list, tuple)):
        return [_without(v, name) for v in node]
    return node


def _log_params(recorder: MLflowRecorder, values: Mapping[str, Any]) -> None:
    """Log many parameters at once; MLflow refuses long ones, and over 100 a time."""
    params = [Param(k, str(v)[:500]) for k, v in values.items()]
    for first in range(0, len(params), 100):
        recorder.client.log_batch(recorder.id, params=params[first : first + 100])
