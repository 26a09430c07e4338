"""Find Qlib recorders and read what they hold; works without a Qlib store.

Frames are unpickled with a list of allowed classes, because a pickle from somebody
else's recorder could run any code.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import posixpath
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pandas as pd
from mlflow.entities import FileInfo, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.tracking import MlflowClient
from qlib.config import C
from qlib.data import D
from qlib.log import get_module_logger
from qlib.utils import fill_placeholder
from qlib.utils.paral import AsyncCaller
from qlib.workflow import R
from qlib.workflow.exp import MLflowExperiment
from qlib.workflow.expm import MLflowExpManager
from qlib.workflow.recorder import MLflowRecorder, Recorder
from sqlalchemy.exc import OperationalError

from data_handlers.expression import ExpressionError, Unsupported
from data_handlers.expression.loading import node_of
from data_handlers.fields import check_store, known_fields
from data_handlers.files import (
    locked,
    replacing,
    write_bytes,
    write_parquet,
    write_text,
)
from data_handlers.labels import holding_days, named_horizon
from qlib_ext.foreign import check_classes, check_model
from qlib_ext.masking import masked, redact

__all__ = [
    "DamagedError",
    "FrameUnpickler",
    "RunManager",
    "active_recorder",
    "check_task",
    "close_dead",
    "copy_artifact",
    "failed_if_interrupted",
    "fetched",
    "find_recorder",
    "has_artifact",
    "has_experiment",
    "list_recorders",
    "load_frame",
    "load_json",
    "load_object",
    "metric_name",
    "newest_first",
    "own_name",
    "prepare_store",
    "redact",
    "save_files",
    "tag_process",
    "tagged_runs",
    "this_process",
]

logger = get_module_logger("qlib_ext.recorders")

#: Tag of a run: host, number and start of the process that writes it.
PROCESS = "qlib_ext.process"

_PLAIN = {"bytearray", "slice", "list", "tuple", "dict", "set", "frozenset", "object"}
_ALLOWED = {
    "builtins": _PLAIN,
    "__builtin__": _PLAIN,  # its name in pickles of protocol 2
    "_codecs": {"encode"},
    "datetime": {"date", "datetime", "timedelta", "timezone"},
    "collections": {"OrderedDict"},
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    "pandas": {
        "DataFrame",
        "Series",
        "Index",
        "MultiIndex",
        "DatetimeIndex",
        "RangeIndex",
        "CategoricalIndex",
        "StringDtype",
        "Categorical",
        "CategoricalDtype",
        "DatetimeTZDtype",
        "NaT",
    },
    "pandas.arrays": {
        "ArrowStringArray",
        "StringArray",
        "DatetimeArray",
        "Categorical",
        "NumpyExtensionArray",
    },  # their names since pandas 3
    "pandas.core.dtypes.base": {"StringDtype"},
    "pyarrow.lib": {
        "chunked_array",
        "array",
        "_restore_array",
        "type_for_alias",
        "py_buffer",
        "large_string",
        "string",
    },
    "pandas.core.frame": {"DataFrame"},
    "pandas.core.series": {"Series"},
    "pandas.core.internals.managers": {"BlockManager", "SingleBlockManager"},
    "pandas._libs.internals": {"_unpickle_block"},
    "pandas._libs.arrays": {"__pyx_unpickle_NDArrayBacked"},
    "pandas.core.indexes.base": {"_new_Index", "Index"},
    "pandas.core.indexes.multi": {"MultiIndex"},
    "pandas.core.indexes.range": {"RangeIndex"},
    "pandas.core.indexes.category": {"CategoricalIndex"},
    "pandas.core.indexes.datetimes": {"_new_DatetimeIndex", "DatetimeIndex"},
    "pandas.core.indexes.frozen": {"FrozenList"},
    "pandas.core.arrays.datetimes": {"DatetimeArray"},
    "pandas.core.arrays.categorical": {"Categorical"},
    "pandas.core.arrays.string_": {"StringArray"},
    "pandas.core.arrays.string_arrow": {"ArrowStringArray"},
    "pandas.core.arrays.numpy_": {"NumpyExtensionArray"},
    "pandas.core.dtypes.dtypes": {"CategoricalDtype", "DatetimeTZDtype"},
    "pandas.core.flags": {"Flags"},
    "pandas._libs.tslibs.timestamps": {"_unpickle_timestamp"},
    "pandas._libs.tslibs.offsets": {"BusinessDay", "Day", "CustomBusinessDay"},
}


class DamagedError(ValueError):
    """An artifact is empty, cut short or holds something else than it should."""


class FrameUnpickler(pickle.Unpickler):
    """Unpickle pandas frames and nothing else.

    Raises
    ------
    pickle.UnpicklingError
        If the file asks for a class or function beyond numpy and pandas data.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Look a class up, if it is one that frames are made of."""
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(
                f"refused to load {module}.{name}: only pandas and numpy data are "
                "read from a recorder."
            )
        return super().find_class(module, name)


def list_recorders(
    uri: str, experiment: str, *, finished: bool = True
) -> list[MLflowRecorder]:
    """List the recorders of an experiment, newest first.

    Parameters
    ----------
    uri : str
        MLflow store, such as ``sqlite:///mlruns.db``.
    experiment : str
    finished : bool, default True
        Leave out recorders that failed or still run.

    Raises
    ------
    ValueError
        If the store or the experiment does not exist.
    """
    client = _client(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        known = sorted(x.name for x in client.search_experiments())
        raise ValueError(
            f"`experiment` {experiment!r} is not in {redact(uri)}; it has {known}."
            + _beside(uri)
        )
    return newest_first(
        MLflowExperiment(found.experiment_id, found.name, uri),
        status=Recorder.STATUS_FI if finished else None,
    )


def has_experiment(uri: str, experiment: str) -> bool:
    """Whether a store, which must exist, holds an experiment of that name."""
    return _client(uri).get_experiment_by_name(experiment) is not None


def newest_first(experiment: MLflowExperiment, **query: Any) -> list[MLflowRecorder]:
    """List an experiment's recorders, which read files of this disk where they lie.

    Parameters
    ----------
    experiment : MLflowExperiment
    **query
        As Qlib's `list_recorders` takes it: ``status``, ``filter_string``.
    """
    recorders = experiment.list_recorders(rtype=MLflowExperiment.RT_L, **query)
    for recorder in recorders:
        recorder.client = RunClient(recorder.uri)
    return sorted(recorders, key=lambda r: str(r.start_time), reverse=True)


def find_recorder(
    uri: str,
    experiment: str | None = None,
    recorder: str | None = None,
    artifact: str | None = None,
    *,
    finished: bool = True,
    figures: bool = False,
) -> tuple[str, MLflowRecorder]:
    """Newest finished recorder that holds an artifact, and its experiment's name.

    Parameters
    ----------
    uri : str
        MLflow store.
    experiment : str, optional
        Default: all experiments.
    recorder : str, optional
        Id, or the beginning of one.
    artifact : str, optional
        File the recorder must hold. Default: the page of any record.
    finished : bool, default True
        Leave out recorders that failed or still run, unless one is named.
    figures : bool, default False
        Where none holds the artifact, take the newest that has logged figures.

    Raises
    ------
    ValueError
        If there is none, or the beginning of an id fits several.
    """
    names = (
        [experiment]
        if experiment is not None
        else [x.name for x in _client(uri).search_experiments()]
    )
    found = [
        (name, rec)
        for name in names
        for rec in list_recorders(uri, name, finished=finished and recorder is None)
        if recorder is None or str(rec.id).startswith(recorder)
    ]
    if recorder is not None and len(found) > 1:
        raise ValueError(
            f"`recorder` {recorder!r} fits {len(found)} recorders; give more of the id."
        )
    found.sort(
        key=lambda pair: str(pair[1].end_time or pair[1].start_time), reverse=True
    )
    for name, rec in found:
        if has_artifact(rec, artifact) if artifact else pages_of(rec):
            return name, rec
    if figures:
        for name, rec in found:
            if rec.list_metrics():
                return name, rec
    where = f"experiment {experiment!r}" if experiment else "any experiment"
    there = ""
    if found:
        name, newest = found[0]
        holds = sorted(newest.list_artifacts())
        there = (
            f" The newest there, {newest.id} of {name!r}, is {newest.status.lower()} "
            f"and holds {', '.join(holds) or 'nothing'}."
        )
        if figures and {"pred.pkl", "label.pkl"} <= set(holds):
            there += f" `qlib-ext compare '{name}'` measures its scores."
    raise ValueError(
        f"no {'finished ' if finished else ''}recorder with "
        f"{artifact or 'a page (FOLDER/report.html)'} in {where} of "
        f"{redact(uri)}"
        + (f" whose id begins with {recorder!r}" if recorder else "")
        + "; run its workflow with qrun, with the record that writes the file in its "
        "`record` list"
        + ("." if artifact else " (FactorRecord, qlib_ext.record_temp).")
        + there
        + _beside(uri)
    )


def own_name(recorder: Any) -> str:
    """Name of a recorder; of its experiment where Qlib gave it none of its own."""
    name = str(getattr(recorder, "name", None) or "")
    if name != "mlflow_recorder":
        return name
    return str(recorder.client.get_experiment(recorder.experiment_id).name)


def has_artifact(recorder: MLflowRecorder, name: str) -> bool:
    """Whether the recorder holds a file of that path."""
    folder = name.rpartition("/")[0]
    return name in recorder.list_artifacts(folder or None)


def pages_of(recorder: MLflowRecorder) -> list[str]:
    """Folders of a recorder that hold a page, FactorRecord's `factor` first."""
    found = [
        str(folder)
        for folder in recorder.list_artifacts()
        if has_artifact(recorder, f"{folder}/report.html")
    ]
    return sorted(found, key=lambda folder: (folder != "factor", folder))


def metric_name(text: str) -> str:
    """Name of a figure as MLflow takes it: of letters, digits and ``_-. :/``.

    A label without a name of its own is called by its expression.
    """
    name = re.sub(r"[^\w\-. :/]", "_", text)
    plain = posixpath.normpath(name) == name and not name.startswith((".", "/"))
    return name if plain else "_" + name.replace("/", "_")


def stated_horizon(recorder: MLflowRecorder, label_col: int = 0) -> int | None:
    """Label horizon that a recorder states; None if nothing tells it.

    Its factor report does, or the label's column in label.pkl: our handlers' names do,
    and Qlib takes a given expression for the name. Alpha158 and Alpha360 have their
    own, of a day. No expression is evaluated.
    """
    if has_artifact(recorder, "factor/context.json"):
        return load_json(recorder, "factor/context.json", "horizon")["horizon"]
    if not has_artifact(recorder, "label.pkl"):
        return None
    columns = load_frame(recorder, "label.pkl").columns
    if label_col >= len(columns):
        return None
    name = columns[label_col]
    text = str(name[-1] if isinstance(name, tuple) else name)
    if (own_label := named_horizon(text)) is not None:
        return own_label
    params, of = recorder.list_params(), "dataset.kwargs.handler"
    if text == "LABEL0" and f"{of}.kwargs.label" not in params:
        own = params.get(f"{of}.module_path") == "qlib.contrib.data.handler"
        return 1 if own else None
    with contextlib.suppress(Unsupported, ExpressionError):
        if node_of(text).look_ahead > 0:
            return holding_days(text)
    return None


def load_frame(recorder: MLflowRecorder, name: str) -> pd.DataFrame:
    """Read a pickled or Parquet frame; a Series becomes one column.

    A pickled None, as Qlib saves for an absent label, becomes an empty frame.

    Raises
    ------
    ValueError
        If it is absent, refused by `FrameUnpickler`, or no frame.
    """
    if not has_artifact(recorder, name):
        raise ValueError(f"recorder {recorder.id} has no artifact {name}.")
    with fetched(recorder, name) as path:
        if path.suffix == ".parquet":
            try:
                return pd.read_parquet(path)
            except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
                raise DamagedError(
                    f"{name} of recorder {recorder.id} is empty or cut short; make "
                    "the recorder again."
                ) from error
        with path.open("rb") as file:
            value = _unpickle(file, f"{name} of recorder {recorder.id}")
    if value is None:
        return pd.DataFrame()
    if isinstance(value, pd.Series):
        value = value.to_frame()
    if not isinstance(value, pd.DataFrame):
        raise DamagedError(
            f"{name} of recorder {recorder.id} must be a DataFrame, got "
            f"{type(value).__name__}; make the recorder again."
        )
    return value


def load_json(recorder: MLflowRecorder, name: str, *keys: str) -> dict[str, Any]:
    """Read a JSON artifact that holds a mapping with these keys, at least."""
    with fetched(recorder, name) as path:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DamagedError(
                f"{name} of recorder {recorder.id} is empty or cut short; make the "
                "recorder again."
            ) from error
    if not isinstance(value, dict) or (lost := [k for k in keys if k not in value]):
        what = f"lacks {lost[0]!r}" if isinstance(value, dict) else "is no mapping"
        raise DamagedError(
            f"{name} of recorder {recorder.id} {what}: it is damaged or another file; "
            "make the recorder again."
        )
    return value


def load_object(recorder: MLflowRecorder, name: str, kind: type) -> Any:
    """Unpickle an artifact of any class: for models and datasets one trusts.

    Qlib's method of that name leaves a copy in the temporary folder.
    """
    with fetched(recorder, name) as path, path.open("rb") as file:
        try:
            value = pickle.load(file)
        except Exception as error:  # a damaged file fails in a dozen ways
            raise DamagedError(
                f"{name} of recorder {recorder.id} cannot be unpickled "
                f"({type(error).__name__}: {error}): it is cut short, or a package it "
                "needs is of another version; train again."
            ) from error
    if not isinstance(value, kind):
        raise DamagedError(
            f"{name} of recorder {recorder.id} must hold a {kind.__name__}, got "
            f"{type(value).__name__}; train again."
        )
    return value


def copy_artifact(recorder: MLflowRecorder, name: str, target: Path) -> Path:
    """Copy an artifact to `target`, replacing it in one step."""
    with fetched(recorder, name) as path, replacing(target) as temporary:
        shutil.copyfile(path, temporary)
    return target


def save_files(
    recorder: Any, files: Mapping[str, Any], folder: str | None = None
) -> None:
    """Attach files that anybody may open, by name; nothing is pickled.

    A frame becomes Parquet, bytes and text are written as such, the rest as JSON.
    """
    with tempfile.TemporaryDirectory() as local:
        for name, value in files.items():
            path = Path(local) / name
            if isinstance(value, pd.DataFrame):
                write_parquet(path, value, compression="snappy")
            elif isinstance(value, bytes):
                write_bytes(path, value)
            elif isinstance(value, str):
                write_text(path, value)
            else:
                write_text(path, json.dumps(value, indent=1, default=str))
        recorder.save_objects(local_path=local, artifact_path=folder)


def _unpickle(file: IO[bytes], name: str) -> Any:
    try:
        return FrameUnpickler(file).load()
    except NotImplementedError as error:
        raise ValueError(
            f"{name} was written by another version of pandas than {pd.__version__}; "
            "read it with that one, or make the recorder again."
        ) from error
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError) as error:
        if isinstance(error, EOFError) or "truncated" in str(error):
            raise DamagedError(
                f"{name}: it is empty or cut short; make the recorder again."
            ) from error
        raise ValueError(f"{name}: {error}") from error


def _beside(uri: str) -> str:
    """Words about the file store in this folder, if runs are sought elsewhere."""
    folder = Path("mlruns").absolute()
    if not uri.startswith("sqlite:") or not any(folder.glob("*/meta.yaml")):
        return ""
    return f" There is a file store here: `--uri file:{folder}` reads it."


def prepare_store(uri: str, *experiments: str) -> None:
    """Make a database of runs and its experiments, one process at a time.

    It is made under another name: a process that is killed within MLflow's migrations
    would leave a file that no later run can open. MLflow would put the files of a
    database's runs into ``mlruns``, where they spoil a file store that is there: then
    they go to ``mlartifacts`` instead.
    """
    if not uri.startswith("sqlite:///"):
        return
    path = Path(uri[10:]).absolute()
    words = _beside(uri)
    if words and not path.is_file():
        logger.warning(f"runs are kept in {redact(uri)}.{words}")
    files = str(path.parent / "mlartifacts") if words else None
    busy = f"{path} is being made"
    with locked(path.with_name(f".{path.name}.lock"), busy, wait=True):
        if not path.is_file() or not path.stat().st_size:
            with replacing(path) as temporary:
                _client(f"sqlite:///{temporary}", make=True)
        client = _client(uri)
        for name in experiments:
            if client.get_experiment_by_name(name) is None:
                client.create_experiment(name, artifact_location=files)


class RunManager(MLflowExpManager):
    """Qlib's manager of experiments, for ``qlib_init.exp_manager`` of a workflow.

    Under plain `qrun` it does what `qlib-ext run` does: two first runs make one
    database, runs whose process is gone are marked KILLED, this run is tagged with its
    process from its start, and a benchmark that the store lacks is refused before the
    training.

    Parameters
    ----------
    uri : str
        MLflow store.
    default_exp_name : str
        Experiment of runs that name none.
    """

    def _start_exp(
        self,
        *,
        experiment_id: str | None = None,
        experiment_name: str | None = None,
        **kwargs: Any,
    ) -> Any:
        name = experiment_name or self._default_exp_name
        prepare_store(self.uri, *([name] if experiment_id is None and name else []))
        close_dead(self.uri)
        with tagged_runs():
            return super()._start_exp(
                experiment_id=experiment_id, experiment_name=name, **kwargs
            )

    def _get_or_create_exp(self, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        found, new = super()._get_or_create_exp(*args, **kwargs)
        return _Experiment(found.id, found.name, self.uri), new


class _Experiment(MLflowExperiment):
    def create_recorder(self, recorder_name: str | None = None) -> MLflowRecorder:
        name = recorder_name or self._default_rec_name
        return _Recorder(self.id, self._uri, name)


class RunClient(MlflowClient):
    """MLflow's client, which reads a file on this machine's disk where it lies.

    MLflow makes three queries for each, to find the run and the models logged with it,
    and leaves a copy in the temporary folder.
    """

    def list_artifacts(self, run_id: str, path: str | None = None) -> list[FileInfo]:
        found = self._folder(run_id)
        return (
            found.list_artifacts(path)
            if found
            else super().list_artifacts(run_id, path)
        )

    def download_artifacts(
        self, run_id: str, path: str, dst_path: str | None = None
    ) -> str:
        if found := self._folder(run_id):
            with contextlib.suppress(MlflowException):  # no such file: of a model?
                return found.download_artifacts(path, dst_path)
        return super().download_artifacts(run_id, path, dst_path)

    def file_of(self, run_id: str, path: str) -> Path | None:
        """Return the file of an artifact that lies on this machine's disk."""
        if found := self._folder(run_id):
            file = Path(found.artifact_dir, path)
            return file if file.is_file() else None
        return None

    def _folder(self, run_id: str) -> LocalArtifactRepository | None:
        found = self._tracking_client._get_artifact_repo(run_id)
        return found if isinstance(found, LocalArtifactRepository) else None


class _Recorder(MLflowRecorder):
    """Checks a task before its training, and logs what comes together at once.

    Qlib writes each parameter and figure in a transaction of its own, and each waits
    for the disk: seconds for a factor report.
    """

    def __init__(self, experiment_id: str, uri: str, name: str | None = None) -> None:
        super().__init__(experiment_id, uri, name)
        self.client = RunClient(uri)

    @AsyncCaller.async_dec(ac_attr="async_log")
    def log_params(self, **kwargs: Any) -> None:
        params = [Param(name, str(value)) for name, value in kwargs.items()]
        for first in range(0, len(params), 100):  # the most that MLflow takes
            self.client.log_batch(self.id, params=params[first : first + 100])

    @AsyncCaller.async_dec(ac_attr="async_log")
    def log_metrics(self, step: int | None = None, **kwargs: Any) -> None:
        now = int(time.time() * 1000)
        figures = [Metric(k, float(v), now, step or 0) for k, v in kwargs.items()]
        for first in range(0, len(figures), 1000):
            self.client.log_batch(self.id, metrics=figures[first : first + 1000])

    def save_objects(
        self, local_path: Any = None, artifact_path: Any = None, **kwargs: Any
    ) -> None:
        # Qlib's trainer saves the task before it builds anything of it.
        if isinstance(kwargs.get("task"), Mapping):
            check_task(kwargs["task"])
        # At its end `qrun` saves the whole workflow, the address of its runs too.
        if "config" in kwargs:
            kwargs["config"] = masked(kwargs["config"])
        super().save_objects(local_path, artifact_path, **kwargs)


def check_task(task: Mapping[str, Any]) -> None:
    """Refuse what must fail before the training, not behind it.

    Parameters
    ----------
    task : dict
        ``task`` of a workflow.

    Raises
    ------
    ValueError
        If a back-test among its records names a benchmark without a close, or the task
        a market that the store does not list, or its processors need an industry or a
        size that it has not, or Qlib would misread the store or run off its calendar,
        or a class cannot be imported, or one of Qlib's models not read its dataset.
    """
    check_classes(task)
    check_model(task)
    check_store()
    later = dict.fromkeys(("<MODEL>", "<DATASET>", "<PRED>"))
    task = fill_placeholder(_settings(task), later)
    known = _markets()
    for where, market in _named_markets(task, "task"):
        if known and market.lower() not in known:
            raise ValueError(
                f"`{where}` is {market!r}, and the store has no market of that name: "
                f"set it to one of {', '.join(sorted(known))}, or add "
                f"instruments/{market.lower()}.txt to the store."
            )
    for where, key, field in _needed_fields(task, "task"):
        if not known_fields([field], "all"):
            raise ValueError(
                f"`{where}`: the store has no value of `${field}`, which CSNeutralize "
                f"needs there; add it to the store, or set `{key}`."
            )
    records = task.get("record") or []
    for record in [records] if isinstance(records, Mapping) else records:
        config = (record.get("kwargs") or {}).get("config") or {}
        back_test = config.get("backtest") or {}
        code = back_test.get("benchmark")
        if isinstance(code, str) and not known_fields(["close"], [code]):
            raise ValueError(
                f"`backtest.benchmark` of {record.get('class')}: the store has no "
                f"close of {code}; set it to a code of the store, or to a list of "
                "codes, whose mean return Qlib takes."
            )
        if back_test and record.get("class") == "PortAnaRecord":
            _check_last_day(back_test.get("end_time"))


def _check_last_day(end: Any) -> None:
    """Refuse a back-test at whose end Qlib asks for a day that there is not."""
    days = pd.DatetimeIndex(D.calendar(future=True))
    if end is None or pd.Timestamp(end) >= days[-1]:
        raise ValueError(
            f"`backtest.end_time` of PortAnaRecord is {end}, and the store's calendar "
            f"ends on {days[-1]:%Y-%m-%d}: Qlib needs a day after the last one; set it "
            f"to {days[-2]:%Y-%m-%d} or earlier."
        )


def _needed_fields(value: Any, where: str) -> Iterator[tuple[str, str, str]]:
    """Fields that `CSNeutralize` behind `AddRisk` needs: where, what to set, which."""
    if isinstance(value, (list, tuple)):
        for at, item in enumerate(value):
            yield from _needed_fields(item, f"{where}[{at}]")
    if not isinstance(value, Mapping):
        return
    found = {
        f"{where}.{key}[{at}]": step
        for key, steps in value.items()
        if str(key).endswith("_processors") and isinstance(steps, (list, tuple))
        for at, step in enumerate(steps)
        if isinstance(step, Mapping)
    }
    adds = [
        x.get("kwargs") or {} for x in found.values() if x.get("class") == "AddRisk"
    ]
    if adds and not any(isinstance(x.get("risk"), Mapping) for x in adds):
        for here, step in found.items():
            kwargs = step.get("kwargs") or {}
            if step.get("class") == "CSNeutralize":
                if kwargs.get("industry", "industry") == "industry":
                    yield f"{here}.kwargs", "industry: null", "industry"
                if "log_mcap" in (kwargs.get("styles", "log_mcap") or ()):
                    yield f"{here}.kwargs", "styles: []", "market_cap"
    for key, item in value.items():
        yield from _needed_fields(item, f"{where}.{key}")


def _settings(value: Any) -> Any:
    """Copy of mappings and lists, with the same objects in them."""
    if isinstance(value, Mapping):
        return {key: _settings(item) for key, item in value.items()}
    return [_settings(x) for x in value] if isinstance(value, (list, tuple)) else value


def _markets() -> set[str]:
    """Markets of a local store; empty where it is none."""
    folder = Path(C.dpm.get_data_uri("day")) / "instruments"
    return {file.stem for file in folder.glob("*.txt")}


def _named_markets(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Markets that a part of a task names, and the key that does."""
    if isinstance(value, (list, tuple)):
        for at, item in enumerate(value):
            yield from _named_markets(item, f"{where}[{at}]")
    if not isinstance(value, Mapping):
        return
    if value.get("class") == "IndexEnhancementStrategy":
        value = {**value, "kwargs": {"market": "csi300", **(value.get("kwargs") or {})}}
    for key, item in value.items():
        here = f"{where}.{key}"
        if key in ("instruments", "market") and isinstance(item, str):
            yield here, item
        elif (key == "pools" or (key == "groups" and value.get("of") == "market")) and (
            isinstance(item, (list, tuple))
        ):
            yield from ((here, str(name)) for name in item)
        else:
            yield from _named_markets(item, here)


@contextlib.contextmanager
def tagged_runs() -> Iterator[None]:
    """Tag the runs that are started meanwhile with this process."""
    name = "MLFLOW_RUN_CONTEXT"
    before = os.environ.get(name)
    tags = {**json.loads(before or "{}"), PROCESS: this_process()}
    os.environ[name] = json.dumps(tags)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def failed_if_interrupted() -> Iterator[None]:
    """End the active run as FAILED where ctrl-C, or an exit, ends the block.

    `R.start` does so on errors alone: an interrupted run would be FINISHED once its
    process ends.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if active_recorder() is not None:
            R.end_exp(recorder_status=Recorder.STATUS_FA)
        raise


def active_recorder() -> Recorder | None:
    """Return the recorder that `qrun` or the user has started, if any."""
    if not C.registered or R.exp_manager.active_experiment is None:
        return None
    return R.get_recorder()


def tag_process(recorder: Recorder) -> None:
    """Note which process writes a recorder, for `close_dead`."""
    recorder.set_tags(**{PROCESS: this_process()})


def this_process() -> str:
    """Host, number and start of this process."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def _started(pid: int) -> str:
    """When a process began, which tells it from a later one of its number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):  # gone, or no Linux
        return ""


def close_dead(uri: str) -> list[str]:
    """Mark as KILLED what still "runs" although its process on this host is gone.

    Another host's runs are left alone, and so are those without a `PROCESS` tag, which
    other managers than `RunManager` make: a warning says that these may be dead.

    Parameters
    ----------
    uri : str
        MLflow store; nothing is done if there is none.

    Returns
    -------
    list of str
        Ids of the runs that were marked.
    """
    if _absent(uri):
        return []
    client = _client(uri)
    host = socket.gethostname()
    experiments = [x.experiment_id for x in client.search_experiments()]
    running = client.search_runs(experiments, "attributes.status = 'RUNNING'")
    dead, unknown = [], []
    for run in running if experiments else ():
        if PROCESS not in run.data.tags:
            unknown.append(run.info.run_id)
            continue
        of, number, started = run.data.tags[PROCESS].rsplit(":", 2)
        if of == host and not _alive(int(number), started):
            client.set_terminated(run.info.run_id, "KILLED")
            dead.append(run.info.run_id)
    if dead:
        logger.warning(
            f"{len(dead)} run(s) whose process is gone are marked KILLED: "
            + ", ".join(run[:8] for run in dead)
        )
    if unknown:
        logger.warning(
            f"{len(unknown)} run(s) count as running and do not say which process "
            "writes them (`exp_manager` is not RunManager of qlib_ext.recorders): they "
            "may be dead: " + ", ".join(run[:8] for run in unknown[:8])
        )
    return dead


def _alive(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return _started(pid) == started


@contextlib.contextmanager
def fetched(recorder: MLflowRecorder, name: str) -> Iterator[Path]:
    """Yield an artifact's file, to be read: itself, or a copy of one elsewhere."""
    client = RunClient(recorder.uri)
    if found := client.file_of(recorder.id, name):
        yield found
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(client.download_artifacts(recorder.id, name, folder))


def _absent(uri: str) -> bool:
    """Whether a database or folder is not there, which MLflow would create, empty."""
    if uri.startswith("sqlite:///"):
        return not Path(uri[10:]).is_file()
    path = uri.removeprefix("file:").removeprefix("//")
    return "://" not in path and not Path(path).is_dir()


def _client(uri: str, make: bool = False) -> MlflowClient:
    if not make and _absent(uri):
        raise ValueError(
            f"`uri` {uri} does not exist; run this beside the database that qrun "
            "wrote, or give its path as sqlite:////absolute/path/mlruns.db."
            + _beside(uri)
        )
    try:
        return MlflowClient(tracking_uri=uri)
    except MlflowException as error:
        raise ValueError(
            f"`uri` {redact(uri)} cannot be opened: {redact(error.message)}"
        ) from None
    except ModuleNotFoundError as error:  # SQLAlchemy's driver of the database
        raise ValueError(
            f"`uri` {redact(uri)} needs the Python package {error.name}, which is not "
            f"installed: pip install {error.name}, or name another store."
        ) from None
    except OperationalError as error:
        if "already exists" not in str(error):
            raise
        raise ValueError(
            f"{redact(uri)} was left half made by a process that was killed while it "
            "made or upgraded the file: move the file away and run again."
        ) from None
