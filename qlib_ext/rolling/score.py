"""Scores of a new day from a trained recorder: no refit, only the day's own work.

The features of the day are computed as the batch computes them, with the processors'
frozen statistics, and the model is advanced by the day. A model in `stream` mode reads
every day since the panel's first; its encoder's state after a day is kept with the
recorder, so that the next day costs one step. Models that read more than features
(graphs, exposures), and features made of exposures, take the whole history instead.
So does a model that learns on, whose weights after a day are kept in the same way: the
next day learns only what has become known since.

A day whose data are incomplete is refused, with what is missing.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from qlib.data import D
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandlerLP
from qlib.log import get_module_logger
from qlib.model.base import Model
from qlib.workflow.recorder import MLflowRecorder

from data_handlers.arguments import Day, Share, checked
from data_handlers.expression import ExpressionError, Unsupported, read_panel
from data_handlers.expression.loading import node_of
from data_handlers.expression.parse import Node
from data_handlers.files import fingerprint, torch_bytes
from data_handlers.loaders import (
    ParquetDataLoader,
    expand_store,
    load_days,
    read_daily_parquet,
)
from data_handlers.universe import instrument_spans, membership_mask
from qlib_ext.dataset import Panel
from qlib_ext.models import description
from qlib_ext.models._base import TorchModel
from qlib_ext.models.incremental import IncrementalModel
from qlib_ext.recorders import fetched, load_json, load_object, save_files
from qlib_ext.rolling.retrain import PARTS, join_scores

__all__ = ["DayScore", "IncompleteDayError", "check_day", "load_model", "score_day"]

logger = get_module_logger("qlib_ext.rolling.score")

FOLDER = "score"
#: Name of an instrument that never trades: the state that a new listing begins with.
_BLANK = "~"
_STATE_VERSION = 2
# How far a sum of standardised features moves when its numbers are rounded anew.
_ROUNDING = 0.01


class IncompleteDayError(ValueError):
    """The store does not hold a whole day."""


@dataclass
class DayScore:
    """Scores of one day.

    Attributes
    ----------
    date : Timestamp
    score : Series
        By (datetime, instrument).
    seconds : dict
        Wall time of the parts.
    notes : list of str
        What a person should know: how the state was come by, stocks that lack bars.
    """

    date: pd.Timestamp
    score: pd.Series
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@checked
def score_day(
    recorder: MLflowRecorder,
    date: Day | None = None,
    *,
    max_missing: Share = 0.02,
    save: bool = True,
    trust: bool = False,
) -> DayScore:
    """Score one day with the model of a recorder.

    Parameters
    ----------
    recorder : MLflowRecorder
        Of `qrun` or of a rolling task; or a joined one of `qlib-ext roll`, of which
        the window that holds the day, else the last before it, is used.
    date : date, optional
        Trading day; by default the store's last.
    max_missing : float, default 0.02
        Share of the stocks of the day before that may lack data (suspended ones do).
    save : bool, default True
        Keep the score as ``score/<date>.parquet`` and the stream's state, both with
        the recorder.
    trust : bool, default False
        Load Qlib's pickles of a recorder that holds no description. They can run any
        code: only for recorders that you wrote yourself.

    Returns
    -------
    DayScore
        Equal to what `predict` gives over the whole history, up to float32 rounding.

    Raises
    ------
    IncompleteDayError
        If the store lacks the day or too much of it, naming what.
    ValueError
        If the recorder has no model, or none that may be read, or the day lies before
        its data.
    """
    clock = time.perf_counter()
    calendar = pd.DatetimeIndex(D.calendar(freq="day"))
    day = calendar[-1] if date is None else pd.Timestamp(date).normalize()
    _check_calendar(day, calendar)
    parts = _parts(recorder, day)
    seconds = {"recorder": time.perf_counter() - clock}
    scores, notes = [], []
    frames: dict[str, pd.DataFrame | None] = {}
    checked: set[str] = set()
    for part in parts:
        clock = time.perf_counter()
        model, dataset = load_model(part, trust)
        seconds["load"] = seconds.get("load", 0.0) + time.perf_counter() - clock
        clock = time.perf_counter()
        key = _loading(dataset.handler)
        if key not in checked:
            notes += check_day(dataset.handler, day, calendar, max_missing)
            checked.add(key)
        seconds["check"] = seconds.get("check", 0.0) + time.perf_counter() - clock
        clock = time.perf_counter()
        one = _Scorer(part, model, dataset, day, calendar, frames)
        with contextlib.nullcontext() if trust else description.only_expressions():
            scores.append(one.score(save))
        notes += one.notes
        seconds["score"] = seconds.get("score", 0.0) + time.perf_counter() - clock
    joined = join_scores([scores])
    clock = time.perf_counter()
    if save:
        files = {f"{day:%Y-%m-%d}.parquet": joined.to_frame("score")}
        save_files(recorder, files, FOLDER)
    seconds["save"] = time.perf_counter() - clock
    return DayScore(day, joined, seconds, list(dict.fromkeys(notes)))


# ---- is the day whole? -------------------------------------------------------------


def _check_calendar(day: pd.Timestamp, calendar: pd.DatetimeIndex) -> None:
    if day in calendar:
        return
    if day > calendar[-1]:
        raise IncompleteDayError(
            f"the store ends {calendar[-1]:%Y-%m-%d} and has nothing of "
            f"{day:%Y-%m-%d}: append the day with `qlib-ext ingest STORE --update`."
        )
    raise IncompleteDayError(f"{day:%Y-%m-%d} is no trading day of the store.")


@checked
def check_day(
    handler: Any, day: pd.Timestamp, calendar: pd.DatetimeIndex, max_missing: Share
) -> list[str]:
    """Compare a day's raw data with those of the day before.

    Parameters
    ----------
    handler : DataHandlerLP
    day : Timestamp
    calendar : DatetimeIndex
    max_missing : float
        Share of the stocks that may lack data.

    Returns
    -------
    list of str
        What lacks but may lack.

    Raises
    ------
    IncompleteDayError
        Naming the stocks that lack bars, the fields without values, and the feature
        files without rows.
    """
    at = int(calendar.searchsorted(day))
    if at == 0:
        return []
    before = calendar[at - 1]
    # Members of either day: a stock without a row on the day is no member any more.
    spans = instrument_spans(handler.instruments, before, day) or {}
    codes = sorted(spans)
    fields = sorted(_fields(handler.data_loader)) or ["close"]
    raw = read_panel(fields, codes, at - 1, at)
    known = {name: np.isfinite(raw.fields["$" + name]) for name in fields}
    if not any(values.any() for values in known.values()):
        return []  # no bins here: the data come from elsewhere
    gone, notes = [], []
    had = np.logical_or.reduce([values[0] for values in known.values()])
    has = np.logical_or.reduce([values[1] for values in known.values()])
    allowed = max(1, int(max_missing * had.sum()))
    lost = np.array(codes)[had & ~has]
    if len(lost) > allowed:
        gone.append(
            f"{len(lost)} of {int(had.sum())} stocks with a bar on {before:%Y-%m-%d} "
            f"have none: {_some(lost)}"
        )
    elif len(lost):
        notes.append(f"{len(lost)} stock(s) without a bar: {_some(lost)}")
    for name, values in known.items():
        lacking = values[0] & ~values[1] & has
        if values[0].any() and not values[1].any():
            gone.append(
                f"field ${name} has no value ({int(values[0].sum())} the day before)"
            )
        elif lacking.sum() > allowed:
            gone.append(
                f"field ${name} lacks for {int(lacking.sum())} of {int(has.sum())} "
                f"stocks that have a bar: {_some(np.array(codes)[lacking])}"
            )
    traded = np.array(codes)[has]
    for source in _files(handler.data_loader):
        gone += _check_file(source, traded, before, day, allowed)
    if gone:
        raise IncompleteDayError(
            f"{day:%Y-%m-%d} is incomplete: "
            + "; ".join(gone)
            + ". Complete the store and score again, or accept it with a larger "
            f"`max_missing` (now {max_missing:g})."
        )
    return notes


def _check_file(
    source: Mapping[str, Any],
    traded: np.ndarray,
    before: pd.Timestamp,
    day: pd.Timestamp,
    allowed: int,
) -> list[str]:
    """Compare a feature file's rows with the stocks that traded."""
    path = str(source["path"])
    name = Path(path).name
    try:
        frame = read_daily_parquet(
            expand_store(path),
            columns=source.get("columns"),
            start_time=before,
            end_time=day,
            missing_years="raise",
        )
    except ValueError as error:
        return [f"{name} features cannot be read ({error})"]
    days = frame.index.get_level_values("datetime")
    frame = frame.reset_index("datetime", drop=True)
    old, new = frame[days == before], frame[days == day]
    hint = f"run `qlib-ext build {name}`"
    if new.empty:
        return [f"no {name} features ({len(old)} rows the day before); {hint}"]
    found = []
    # A stock whose features were missing the day before as well is no news.
    expected = set(traded) & set(old.index)
    lost = np.array(sorted(expected - set(new.index)))
    if len(lost) > allowed:
        found.append(
            f"{name} features lack for {len(lost)} of {len(expected)} stocks that "
            f"traded: {_some(lost)}; {hint}"
        )
    for column in frame.columns:
        had, has = old[column].notna().sum(), new[column].notna().sum()
        if had > allowed and not has:
            found.append(f"{name} feature {column} has no value ({had} the day before)")
    return found


def _some(codes: np.ndarray, most: int = 8) -> str:
    more = f" and {len(codes) - most} more" if len(codes) > most else ""
    return ", ".join(codes[:most]) + more


def _fields(loader: Any) -> set[str]:
    """Fields of the store that the feature group reads."""
    return {f[1:] for node in _nodes(loader) for f in node.fields}


def _nodes(loader: Any) -> list[Node]:
    """Expressions of the feature group."""
    sources: list = []
    if isinstance(loader, ParquetDataLoader):
        sources = [
            source["expressions"]
            for source in loader.config.get("feature", [])
            if "expressions" in source
        ]
    elif isinstance(getattr(loader, "fields", None), dict):
        sources = [loader.fields.get("feature", ([], []))[0]]
    found = []
    for expressions in sources:
        for expression in expressions:
            # Point-in-time fields change on few days; no day is judged by them.
            with contextlib.suppress(Unsupported, ExpressionError):
                found.append(node_of(expression))
    return found


def _look_back(loader: Any) -> int:
    """Days before a day that its features read."""
    return max((n.look_back for n in _nodes(loader)), default=0)


def _files(loader: Any) -> list[dict]:
    if not isinstance(loader, ParquetDataLoader):
        return []
    return [s for s in loader.config.get("feature", []) if "path" in s]


# ---- which model -------------------------------------------------------------------


def _parts(recorder: MLflowRecorder, day: pd.Timestamp) -> list[MLflowRecorder]:
    """Find the recorders whose models score the day: one, or a window's seeds."""
    from qlib.workflow.exp import MLflowExperiment

    artifacts = recorder.list_artifacts()
    if PARTS not in artifacts:
        return [recorder]
    known = load_json(recorder, PARTS, "parts", "experiment")
    started = [p for p in known["parts"] if pd.Timestamp(p["test_start"]) <= day]
    if not started:
        first = min(p["test_start"] for p in known["parts"])
        raise ValueError(f"the joined score begins {first}, after {day:%Y-%m-%d}.")
    newest = max(p["test_start"] for p in started)
    found = recorder.client.get_experiment_by_name(known["experiment"])
    if found is None:
        raise ValueError(f"experiment {known['experiment']!r} of the tasks is gone.")
    tasks = MLflowExperiment(found.experiment_id, found.name, recorder.uri)
    return [
        tasks.get_recorder(recorder_id=p["recorder"], create=False)
        for p in started
        if p["test_start"] == newest
    ]


def load_model(recorder: MLflowRecorder, trust: bool = False) -> tuple[Any, Any]:
    """Model and data set of a recorder: as described, or with `trust` as pickled.

    Raises
    ------
    ValueError
        If the recorder holds no model, or only a pickled one that is not trusted.
    """
    artifacts = set(recorder.list_artifacts())
    if artifacts.issuperset(description.FILES):
        return description.read(recorder)
    pickles = {"params.pkl": Model, "dataset": DatasetH}
    for name in pickles:
        if name not in artifacts:
            raise ValueError(
                f"recorder {recorder.id} has no artifact {name!r}: it holds no model; "
                f"it has {sorted(artifacts)}."
            )
    if not trust:
        raise ValueError(
            f"recorder {recorder.id} holds its model as a pickle only, which can run "
            "any code: score with `--trust` if you wrote it yourself, or train again "
            "with a model of qlib_ext.models, which leaves a description."
        )
    model, dataset = (load_object(recorder, *item) for item in pickles.items())
    return model, dataset


def _loading(handler: Any) -> str:
    loader = handler.data_loader
    return json.dumps(
        [type(loader).__qualname__, vars(loader), handler.instruments],
        sort_keys=True,
        default=repr,
    )


# ---- one model, one day ------------------------------------------------------------


@dataclass
class _Scorer:
    recorder: MLflowRecorder
    model: Any
    dataset: Any
    day: pd.Timestamp
    calendar: pd.DatetimeIndex
    frames: dict[str, pd.DataFrame | None]
    notes: list[str] = field(default_factory=list)

    def score(self, save: bool) -> pd.Series:
        handler = self.dataset.handler
        start = handler.start_time
        self.first = (
            0 if start is None else int(self.calendar.searchsorted(pd.Timestamp(start)))
        )
        self.at = int(self.calendar.searchsorted(self.day))
        if self.at < self.first:
            raise ValueError(
                f"{self.day:%Y-%m-%d} lies before the model's data, which begin "
                f"{self.calendar[self.first]:%Y-%m-%d}."
            )
        plain = (
            isinstance(self.model, TorchModel)
            and isinstance(self.dataset, DatasetH)
            and self.model.reads_features_only
        )
        if isinstance(self.model, IncrementalModel):
            return self._walked(save)
        if not plain and self._reads_rows():
            return self._predicted(self.day)
        if not plain:
            return self._whole("the model reads more than features")
        if self.model.mode == "windows":
            first = max(self.first, self.at - self.model.step_len_ + 1)
            panel = self._panel(first, self.at)
            if panel is None:
                return self._whole("the loader or a processor needs the whole frame")
            return self.model.advance(panel)[0]
        return self._stream(save)

    def _stream(self, save: bool) -> pd.Series:
        saved = self._newest_state()
        panel = None
        if saved is not None and saved.source != self._source(saved.at):
            # Some number that the state was made of is another one now; it matters
            # only if it changed a feature, by more than a new rounding does.
            panel = self._panel(self.first, self.at)
            if panel is None:
                return self._whole("the loader or a processor needs the whole frame")
            same = _close(self._prints(panel)[: len(saved.prints)], saved.prints)
            if not same.all():
                self._say_changed("features", same, saved.day, "state is built again")
                saved = None
            else:
                panel = _from(panel, int((panel.dates <= saved.day).sum()))
        if panel is None:
            begin = self.first if saved is None else saved.at + 1
            panel = self._panel(begin, self.at)
        if panel is None:
            return self._whole("the loader or a processor needs the whole frame")
        prints = self._prints(panel)
        if saved is None:
            self.notes.append("the stream's state was built from the first day on")
            names = pd.Index([*panel.instruments, _BLANK])
            carried, panel = None, _aligned(panel, names)
        else:
            names = pd.Index(
                [*sorted({*saved.instruments[:-1], *panel.instruments}), _BLANK]
            )
            carried = _placed(saved, names, self.model)
            prints[: len(saved.prints)] = saved.prints
            panel = _aligned(panel, names)
        score, after = self.model.advance(panel, carried)
        score.index = score.index.remove_unused_levels()
        if save:
            day, source = self.calendar[self.at], self._source(self.at)
            kept = _State(self.at, day, names, after, prints, source)
            files = {f"state-{day:%Y-%m-%d}.npz": _write_state(kept)}
            save_files(self.recorder, files, FOLDER)
        return score

    def _say_changed(
        self, what: str, same: np.ndarray, day: pd.Timestamp, then: str
    ) -> None:
        """Note that days have other prints than when a state was kept."""
        changed = self.calendar[self.first + int(np.flatnonzero(~same.all(1))[0])]
        self.notes.append(
            f"the {what} of {int((~same.all(1)).sum())} day(s), the first "
            f"{changed:%Y-%m-%d}, have changed since the state of {day:%Y-%m-%d} was "
            f"kept: the {then}"
        )

    def _prints(self, panel: Panel, values: torch.Tensor | None = None) -> np.ndarray:
        """Fingerprints of the days from the first to this one, 0 without data.

        Stocks, and for each feature (or column of `values` [t, n, k]) a sum in which
        every stock has its own weight: a new rounding hardly moves them, a changed,
        added or exchanged value does.
        """
        values = panel.features if values is None else values.nan_to_num()
        weight = np.array([zlib.crc32(str(i).encode()) for i in panel.instruments])
        here = panel.present.numpy()
        sums = np.einsum(
            "tnf,tn->tf",
            values.numpy(),
            here * (0.5 + weight / 2**32),
            dtype=np.float64,
        )
        out = np.zeros((self.at - self.first + 1, 1 + sums.shape[1]))
        out[self.calendar.searchsorted(panel.dates) - self.first] = np.column_stack(
            [here.sum(axis=1), sums]
        )
        return out

    def _source(self, at: int) -> str:
        """Fingerprint of all that the features up to a day are computed from.

        Values of the store and members day by day; of yearly files that are closed
        their size and time only.
        """
        handler, loader = self.dataset.handler, self.dataset.handler.data_loader
        fields = sorted(_fields(loader))
        first = max(0, self.first - _look_back(loader))
        days = self.calendar[first : at + 1]
        pipe = getattr(loader, "filter_pipe", None)
        spans = instrument_spans(
            handler.instruments, self.calendar[self.first], days[-1], filter_pipe=pipe
        )
        codes = sorted(spans or ())
        parts: list[Any] = [codes, np.packbits(membership_mask(spans, days, codes))]
        if fields:
            # The volume tells whether a stock traded.
            panel = read_panel([*fields, "volume"], codes, first, at)
            parts += panel.fields.values()
        year = days[-1].year
        for source in _files(loader):
            path = Path(expand_store(str(source["path"])))
            start = days[0]
            if path.is_dir():
                closed = [p for p in path.glob("*.parquet") if p.stem[-4:].isdigit()]
                for file in sorted(p for p in closed if int(p.stem[-4:]) < year):
                    stat = file.stat()
                    parts.append([file.name, stat.st_size, stat.st_mtime_ns])
                start = pd.Timestamp(year, 1, 1)
            parts.append(
                read_daily_parquet(
                    str(path),
                    columns=source.get("columns"),
                    start_time=start,
                    end_time=days[-1],
                    missing_years=source.get("missing_years", "raise"),
                )
            )
        return fingerprint(*parts)

    def _whole(self, why: str) -> pd.Series:
        """Predict from the whole history, as Qlib's own updater would."""
        self.notes.append(f"{why}: predicted from the whole history")
        return self._predicted(self.dataset.handler.start_time)

    def _walked(self, save: bool) -> pd.Series:
        """Go on with the walk of a model that learns on, from its newest state.

        A state that learnt from numbers which have been corrected since is not used.
        """
        self._load(self.dataset.handler.start_time)
        panel, reach = Panel.from_dataset(self.dataset), self.model.reach_
        arrays = [panel.features, panel.risk, panel.attributes, panel.labels]
        if panel.market is not None:
            arrays.insert(
                0, panel.market[:, None].expand(-1, panel.features.shape[1], -1)
            )
        prints = np.hstack([self._prints(panel, a) for a in arrays if a is not None])
        for name in self._kept("online-", ".pt"):
            try:
                # weights_only refuses anything but tensors and plain containers.
                state = torch.load(io.BytesIO(self._artifact(name)), weights_only=True)
                kept = state["prints"].numpy()
                same = _close(prints[: len(kept)], kept)
                # Labels (the last columns) that were not known then are new, not other.
                same[max(0, len(kept) - reach) :, -panel.labels.shape[2] :] = True
                if same.all():
                    self.model.take_up(state)
            except Exception as error:  # a damaged file fails in a dozen ways
                self.notes.append(
                    f"{name} is damaged or of another model "
                    f"({type(error).__name__}); not used"
                )
                continue
            day = pd.Timestamp(name[7:17])
            if same.all():
                self.notes.append(f"the walk goes on from {day:%Y-%m-%d}")
                break
            self._say_changed("data", same, day, "walk does not go on from it")
        self.notes.append("the model learns on from known labels: the history was read")
        score = self.model.predict(self.dataset)
        state = self.model.online_state()
        if save and state is not None:
            state["prints"] = torch.from_numpy(prints)
            files = {f"online-{self.day:%Y-%m-%d}.pt": torch_bytes(state)}
            save_files(self.recorder, files, FOLDER)
        return score

    def _reads_rows(self) -> bool:
        """Tell whether the day's rows are all that is needed.

        The model is one of Qlib's, on rows, and each processor looks at one day.
        """
        handler = self.dataset.handler
        return (
            type(self.dataset) is DatasetH
            and not isinstance(self.model, TorchModel)
            and not type(self.model).__module__.startswith("qlib_ext")
            and all(
                getattr(p, "by_day", False)
                or type(p).__module__ == "qlib.data.dataset.processor"
                for p in [*handler.shared_processors, *handler.infer_processors]
            )
        )

    def _predicted(self, start: Any) -> pd.Series:
        """Predict from the days since `start`, as Qlib's own updater would."""
        self._load(start)
        score = self.model.predict(self.dataset)
        return score.iloc[:, 0] if isinstance(score, pd.DataFrame) else score

    def _load(self, start: Any) -> None:
        """Let the data set hold the days since `start`, the day as its segment."""
        self.dataset.config(
            handler_kwargs={"start_time": start, "end_time": self.day},
            segments={"test": (self.day, self.day)},
        )
        self.dataset.setup_data(handler_kwargs={"init_type": DataHandlerLP.IT_LS})

    def _panel(self, first: int, last: int) -> Panel | None:
        """Panel of the processed features of some days; None if it needs more."""
        handler = self.dataset.handler
        days = self.calendar[first], self.calendar[last]
        key = f"{_loading(handler)} {days}"
        if key not in self.frames:
            self.frames[key] = load_days(
                handler.data_loader, handler.instruments, *days
            )
        frame = self.frames[key]
        if frame is None:
            return None
        for processor in [*handler.shared_processors, *handler.infer_processors]:
            groups = getattr(processor, "fields_group", None)
            if groups is None and hasattr(processor, "risk_group"):
                continue  # exposures, which this model does not read
            wanted = [groups] if isinstance(groups, str) else groups
            if wanted is not None and "feature" not in wanted:
                continue
            if hasattr(processor, "risk_group"):
                return None  # features made of exposures, which are not loaded here
            if wanted is None and not _own(processor):
                return None  # who knows what it looks at
            frame = processor(frame if processor.readonly() else frame.copy())
        if frame.empty:
            raise IncompleteDayError(
                f"no stock of the universe has features between {days[0]:%Y-%m-%d} "
                f"and {days[1]:%Y-%m-%d}."
            )
        panel = Panel.from_frames(pd.DataFrame(frame["feature"]))
        if panel.dates[-1] != days[1]:
            raise IncompleteDayError(
                f"no stock of the universe has features on {days[1]:%Y-%m-%d}."
            )
        return panel

    # ---- the state of a stream

    def _kept(self, prefix: str, ending: str) -> list[str]:
        """Names of the states kept before the day, newest first."""
        names = [Path(p).name for p in self.recorder.list_artifacts(FOLDER)]
        today = f"{prefix}{self.day:%Y-%m-%d}{ending}"
        return sorted(
            (n for n in names if n.startswith(prefix) and n < today), reverse=True
        )

    def _artifact(self, name: str) -> bytes:
        with fetched(self.recorder, f"{FOLDER}/{name}") as path:
            return path.read_bytes()

    def _newest_state(self) -> _State | None:
        """Newest state before the day that was kept with the recorder."""
        for name in self._kept("state-", ".npz"):
            state = _read_state(self._artifact(name), self.model, self.calendar)
            if state is not None and state.prints.shape == (
                state.at - self.first + 1,
                1 + self.model.d_feat_,
            ):
                return state
            self.notes.append(f"{name} is damaged or of another model; not used")
        return None


@dataclass
class _State:
    """State of a model's encoders after a day.

    Attributes
    ----------
    at : int
        Slot of the day in the calendar.
    day : Timestamp
    instruments : Index
        The last is `_BLANK`.
    carried : list
        One state a seed: tensors, or nested lists of them.
    prints : float array [days, 1 + features]
        See `_Scorer._prints`.
    source : str
        See `_Scorer._source`.
    """

    at: int
    day: pd.Timestamp
    instruments: pd.Index
    carried: list[Any]
    prints: np.ndarray
    source: str


def _close(now: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return np.isclose(now, kept, rtol=0, atol=_ROUNDING)


def _own(processor: Any) -> bool:
    return type(processor).__module__.startswith("data_handlers")


def _from(panel: Panel, first: int) -> Panel:
    """Panel without its first days."""
    return Panel(
        dates=panel.dates[first:],
        instruments=panel.instruments,
        feature_names=panel.feature_names,
        features=panel.features[first:],
        present=panel.present[first:],
        label_names=[],
        labels=panel.labels[first:],
        raw_labels=panel.raw_labels[first:],
    )


def _aligned(panel: Panel, names: pd.Index) -> Panel:
    """Panel with other instruments: absent ones never trade and have features 0."""
    at = names.get_indexer(panel.instruments)
    t, _, f = panel.features.shape
    features = torch.zeros(t, len(names), f)
    present = torch.zeros(t, len(names), dtype=torch.bool)
    features[:, at] = panel.features
    present[:, at] = panel.present
    empty = torch.full((t, len(names), 0), float("nan"))
    return Panel(
        dates=panel.dates,
        instruments=names,
        feature_names=panel.feature_names,
        features=features,
        present=present,
        label_names=[],
        labels=empty,
        raw_labels=empty,
    )


def _placed(saved: _State, names: pd.Index, model: TorchModel) -> list[Any]:
    """States for other instruments; those unknown get the blank one's."""
    source = saved.instruments.get_indexer(names)
    source[source < 0] = len(saved.instruments) - 1
    index = torch.from_numpy(source)
    axes = _axes(model)
    placed = []
    for state in saved.carried:
        leaves = [
            leaf.index_select(axis, index)
            for leaf, axis in zip(_leaves(state), axes, strict=True)
        ]
        placed.append(_rebuilt(_shape(state), leaves))
    return placed


def _axes(model: TorchModel) -> list[int]:
    """Dimension of the instruments in each tensor of an encoder's state."""
    two, three = (_sizes(_blank_states(model, n))[0] for n in (2, 3))
    return [
        next(i for i, (p, q) in enumerate(zip(a, b, strict=True)) if p != q)
        for a, b in zip(two, three, strict=True)
    ]


def _leaves(part: Any) -> list[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        return [part]
    return [leaf for p in part for leaf in _leaves(p)]


def _shape(part: Any) -> Any:
    """Nesting of a state as JSON: "t" is a tensor."""
    if isinstance(part, torch.Tensor):
        return "t"
    return [type(part).__name__, [_shape(p) for p in part]]


def _rebuilt(shape: Any, leaves: list[torch.Tensor]) -> Any:
    if shape == "t":
        return leaves.pop(0)
    parts = [_rebuilt(s, leaves) for s in shape[1]]
    return tuple(parts) if shape[0] == "tuple" else parts


def _write_state(state: _State) -> bytes:
    arrays = {
        f"t{i}": leaf.cpu().numpy() for i, leaf in enumerate(_leaves(state.carried))
    }
    facts = {
        "version": _STATE_VERSION,
        "date": f"{state.day:%Y-%m-%d}",
        "source": state.source,
        "shape": _shape(state.carried),
        "instruments": [str(name) for name in state.instruments],
    }
    arrays["prints"] = state.prints
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def _read_state(
    data: bytes, model: TorchModel, calendar: pd.DatetimeIndex
) -> _State | None:
    """Read a state; None if it is damaged, or cannot be this model's."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        facts = json.loads(arrays.pop("facts").tobytes())
        prints = arrays.pop("prints")
        leaves = [torch.from_numpy(arrays[f"t{i}"].copy()) for i in range(len(arrays))]
        carried = list(_rebuilt(facts["shape"], leaves))
        day, names = pd.Timestamp(facts["date"]), pd.Index(facts["instruments"])
        if facts["version"] != _STATE_VERSION or day not in calendar:
            return None
        if _sizes(carried) != _sizes(_blank_states(model, len(names))):
            return None
        source = str(facts["source"])
    except Exception:  # a damaged file fails in a dozen ways; the caller says so
        return None
    return _State(
        at=int(calendar.searchsorted(day)),
        day=day,
        instruments=names,
        carried=carried,
        prints=prints,
        source=source,
    )


@torch.no_grad()
def _blank_states(model: TorchModel, n: int) -> list[Any]:
    """Make states of all seeds after a day on which n instruments have features 0."""
    x = torch.zeros(1, n, model.d_feat_)
    return [model.rebuild_network(s).encoder(x)[1] for s in model.states_]


def _sizes(states: list[Any]) -> list[list[torch.Size]]:
    return [[leaf.shape for leaf in _leaves(state)] for state in states]


def summary(result: DayScore, top: int = 10) -> str:
    """Account of a scored day for a terminal."""
    from qlib_ext.report.page import text_table

    ranked = result.score.droplevel("datetime").sort_values(ascending=False)
    rows: Sequence[Sequence[str]] = [
        (str(code), f"{value:.4f}") for code, value in ranked.head(top).items()
    ]
    seconds = ", ".join(f"{k} {v:.2f}" for k, v in result.seconds.items())
    lines = [
        f"{result.date:%Y-%m-%d}: {len(ranked):,} stocks; the {len(rows)} highest:",
        text_table(rows, ("stock", "score")),
        *(f"note: {note}" for note in result.notes),
        f"seconds: {seconds}",
    ]
    return "\n".join(lines)
