"""The workflow under audit: its data on several stores, its model, what the fit saw."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import pandas as pd
import torch
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandler, DataHandlerLP
from qlib.data.dataset.loader import DLWParser
from qlib.model.base import Model
from qlib.utils import fill_placeholder, init_instance_by_config
from qlib.workflow import QlibRecorder

from data_handlers.arguments import Count, Whole, check_arguments
from qlib_ext.audit.batches import BatchTrace
from qlib_ext.audit.config import DateMap, bounded, calendar_of, retarget, store_needs
from qlib_ext.audit.days import Parting, partings, suspensions
from qlib_ext.audit.files import FileTrace
from qlib_ext.audit.stores import StoreCopies, is_simulated
from qlib_ext.dataset import handler_label_reach
from qlib_ext.ingest.store import is_store, read_calendar, read_instruments

__all__ = ["Settings", "Subject", "walk"]

KEYS = ("raw", "infer", "learn")
#: Fewer instruments have no cross-section: they are compared over time.
FEW = 5
# What a simulated market can have.
_NEEDS = {"ms", "bars", "l2", "flow", "funds", "mined.yaml", "bonds", "futures"}
# Arguments of qlib.init that an audit keeps; the others concern where things are.
_INIT = ("region", "custom_ops", "maxtasksperchild", "joblib_backend")


@dataclass(frozen=True)
class Settings:
    """How an audit runs.

    Attributes
    ----------
    data : {"auto", "own", "embedded"}
        The workflow's store, a market simulated for the audit, or the first if there
        is one.
    stocks : int
        Sampled from the store, or simulated.
    years : int
        Of the simulated market.
    epochs : int
        Most passes over the training data.
    seed : int
    refit : bool
        Whether the perturbed store is also trained on.
    days : int
        Days beside the main one at which copies part too.
    overrides : mapping
        Model arguments to set.
    """

    data: Literal["auto", "own", "embedded"] = "auto"
    stocks: Count = 40
    years: Count = 3
    epochs: Count = 1
    seed: Whole = 7
    refit: bool = True
    days: Whole = 9
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))


class Subject:
    """A workflow, ready to be built on the copies of a store.

    Parameters
    ----------
    config : mapping
        A workflow as `load_workflow` returns it.
    folder : Path
        For stores; the caller removes it.
    settings : Settings
    say : callable, optional
        Told what takes time.

    Raises
    ------
    ValueError
        If the workflow lacks `task.model`, `task.dataset` or a segment `test`, or its
        store is wanted and there is none.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        folder: Path,
        settings: Settings,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.settings, self.folder, self.say = settings, Path(folder), say
        task = config.get("task")
        for name in ("model", "dataset"):
            if not isinstance(task, Mapping) or name not in task:
                raise ValueError(f"the workflow has no `task.{name}`.")
        assert isinstance(task, Mapping)
        kwargs = task["dataset"].get("kwargs") or {}
        segments = kwargs.get("segments")
        if not isinstance(segments, Mapping) or "test" not in segments:
            raise ValueError(
                "`task.dataset.kwargs.segments` must name at least `train` and `test`, "
                f"got {segments!r}."
            )
        self.init = dict(config.get("qlib_init") or {})
        own = _own_store(self.init)
        self.embedded = settings.data == "embedded" or (
            settings.data == "auto" and (own is None or not is_store(own))
        )
        if not self.embedded and (own is None or not is_store(own)):
            raise ValueError(
                f"`data` is 'own', but there is no Qlib day store at {own}; set "
                "`qlib_init.provider_uri` (QLIB_EXT_STORE), or audit on a simulated "
                "market: --data embedded."
            )
        self.notes: list[str] = []
        self._old = calendar_of(own)
        self._task = bounded(task, settings.epochs, settings.overrides)
        # What Qlib's trainer does: "<a.b>" stands for the value at task["a"]["b"].
        self._task = fill_placeholder(self._task, {})
        self._needs = store_needs(self._task) & _NEEDS
        self._markets: dict[str, Path] = {}
        if self.embedded:
            self.source = self.market("planted")
            self.task, self.notes = self._moved(self.source)
            where = f"no store at {own}: " if settings.data == "auto" else ""
            self.data_text = (
                f"{where}a market simulated for the audit, {settings.stocks} stocks, "
                f"{settings.years} years; the workflow's dates were moved onto it"
            )
        else:
            assert own is not None
            self.source = own
            self.task = self._task
            self.data_text = f"{own}, {settings.stocks} of its stocks"
        self.simulated = is_simulated(self.source)
        self.calendar = read_calendar(self.source)
        self.segments = self.task["dataset"]["kwargs"]["segments"]
        self.day = self._audit_day()
        self._sampled = None if self.embedded else self._sample()
        self.stores = self._copies_at(self.day)
        self._others: dict[pd.Timestamp, StoreCopies] = {}
        self.files = FileTrace(self.folder)
        self._asked: set[pd.Timestamp] = set()
        self._memory: dict[Any, Any] = {}
        self._raw: dict[str, pd.DataFrame] = {}
        self._current: Path | None = None

    # ---- where ---------------------------------------------------------------------

    def market(self, signal: str) -> Path:
        """Make a simulated market with the feature folders needed, once."""
        if signal not in self._markets:
            s = self.settings
            # What an earlier audit left in the same folder is the same market.
            kinds = "".join(f"_{name}" for name in sorted(self._needs))
            out = (
                self.folder
                / f"market_{signal}_{s.stocks}x{s.years}_{s.seed}{kinds}"
                / "store"
            )
            if not is_store(out):
                self.say(f"simulating a market, signal {signal}")
                make_lab(out, signal, s.stocks, s.years, s.seed, self._needs)
            self._markets[signal] = out
        return self._markets[signal]

    def _moved(self, store: Path) -> tuple[dict[str, Any], list[str]]:
        kwargs = self._task["dataset"]["kwargs"]
        handler = kwargs.get("handler")
        given = handler.get("kwargs") or {} if isinstance(handler, Mapping) else {}
        dates = DateMap(
            {k: tuple(v) for k, v in kwargs["segments"].items()},
            self._old,
            read_calendar(store),
            given.get("start_time"),
            given.get("end_time"),
        )
        markets = {f.stem for f in (store / "instruments").glob("*.txt")}
        codes = {f.name for f in (store / "features").iterdir()}
        return retarget(self._task, dates, markets, codes)

    def _copies_at(self, day: pd.Timestamp) -> StoreCopies:
        """Make copies that part on a day; those of a simulated market are kept."""
        above = self.source.parent if self.embedded else self.folder
        main = getattr(self, "stores", None)
        return StoreCopies(
            self.source,
            above / f"copies_{day:%Y%m%d}",
            day,
            self._sampled,
            self.settings.seed,
            None if main is None else main.bars,
        )

    def partings(self) -> list[Parting]:
        """Days beside the main one at which copies part; see `days.partings`."""

        def choose():
            if not self.settings.days:
                return []
            start, end = map(_stamp, self.segments["test"])
            test = self.calendar[slice(*self.calendar.slice_locs(start, end))]
            first = _stamp(self.segments.get("train", self.segments["test"])[0])
            before = self.calendar[slice(*self.calendar.slice_locs(first, None))]
            before = before[before < test[0]]
            stocks = set(self.stores.stocks)
            bars = self.stores.bars
            bars = bars[bars["instrument"].isin(stocks)]
            return partings(
                self.calendar,
                before,
                test,
                suspensions(bars, self.calendar),
                self.settings.days,
            )

        return self._once("partings", choose)

    def refits(self) -> list[Parting]:
        """Days after the last labels that `predict` asked for, a few of them."""
        if not self.settings.days:
            return []
        self.scores("full")
        start, end = map(_stamp, self.segments["test"])
        found = []
        for day in sorted(self._asked):
            at = int(self.calendar.searchsorted(day, side="right"))
            if at < len(self.calendar):
                after = self.calendar[at]
                if (start is None or after >= start) and (end is None or after < end):
                    found.append(Parting(after, "labels asked for by `predict`", True))
        return found[:: max(1, len(found) // 2)][:3]

    def _audit_day(self) -> pd.Timestamp:
        """Trading day on which the copies part: three fifths into the test segment."""
        start, end = self.segments["test"]
        days = self.calendar[
            slice(*self.calendar.slice_locs(_stamp(start), _stamp(end)))
        ]
        if len(days) < 20:
            raise ValueError(
                f"segment `test` {start} to {end} has {len(days)} trading days in "
                f"{self.source}; the audit needs 20."
            )
        return days[int(0.6 * len(days))]

    def _sample(self) -> list[str]:
        universe = _universe(self.task["dataset"])
        if isinstance(universe, (list, tuple)):
            codes = sorted({str(c).upper() for c in universe})
        else:
            market = universe if isinstance(universe, str) else "all"
            spans = read_instruments(self.source, market)
            first, last = (
                _stamp(x) for x in (self.segments["test"][0], self.segments["test"][1])
            )
            inside = spans["end"] >= (first or self.calendar[0])
            if last is not None:
                inside &= spans["start"] <= last
            # Those who left before the test count too: train has them.
            codes = sorted(set(spans.loc[inside, "instrument"])) or sorted(
                set(spans["instrument"])
            )
            gone = sorted(set(spans["instrument"]) - set(codes))
            count = round(self.settings.stocks * len(gone) / max(1, len(spans)))
            rng = np.random.default_rng(self.settings.seed)
            early = rng.permutation(gone)[:count]
            codes = list(rng.permutation(codes)[: self.settings.stocks - len(early)])
            return sorted({*map(str, codes), *map(str, early)})
        if len(codes) > self.settings.stocks:
            rng = np.random.default_rng(self.settings.seed)
            codes = sorted(rng.permutation(codes)[: self.settings.stocks])
        return [str(c) for c in codes]

    def start(self) -> None:
        """Forget which store Qlib is on: another audit may have run since."""
        self._current = None

    def use(self, store: Path) -> None:
        """Point Qlib at a store; nothing is logged or cached outside the folder."""
        import qlib

        if self._current == store:
            return
        keep = {k: v for k, v in self.init.items() if k in _INIT}
        qlib.init(
            **{"region": "cn", **keep},
            provider_uri=str(store),
            kernels=1,
            logging_level=logging.ERROR,
            expression_cache=None,
            dataset_cache=None,
            exp_manager={
                "class": "MLflowExpManager",
                "module_path": "qlib.workflow.expm",
                "kwargs": {
                    "uri": f"sqlite:///{self.folder}/mlflow.db",
                    "default_exp_name": "audit",
                },
            },
        )
        self._current = store

    def store(self, kind: str) -> Path:
        """Directory of a copy of the store, or of the market without signal."""
        if kind == "none":
            return self.market("none")
        kind, day = self.parted(kind)
        if day == self.day:
            return self.stores.path(kind)
        if day not in self._others:
            self._others[day] = self._copies_at(day)
        return self._others[day].path(kind)

    def parted(self, kind: str) -> tuple[str, pd.Timestamp]:
        """Split a kind such as "noise@2020-01-02" into the kind and its day."""
        kind, _, day = kind.partition("@")
        return kind, pd.Timestamp(day) if day else self.day

    @contextmanager
    def reading(self, kind: str) -> Iterator[None]:
        """Trace what is read; hand out copies of files outside the store."""
        kind, day = self.parted(kind)
        copies = {}
        if kind in ("cut", "noise"):
            for number, (path, file) in enumerate(sorted(self.files.outside.items())):
                if file.problem or file.config:
                    continue
                out = self.folder / f"outside_{number}_{kind}_{day:%Y%m%d}" / path.name
                if not out.exists():
                    file.write(kind, day, out, self.settings.seed + number)
                copies[path] = out
        with self.files.watching(copies):
            yield

    # ---- data ----------------------------------------------------------------------

    def dataset(self, kind: str) -> DatasetH:
        """Build the data set of the workflow on a copy of its store.

        `kind` is one of `KINDS`, "none" (the market without signal), or "shuffle" (the
        whole store, labels exchanged among the stocks of each day before anything
        else sees them). An error is kept and raised again.
        """
        return self._once(("dataset", kind), lambda: self._build(kind))

    def _build(self, kind: str) -> DatasetH:
        self.say(f"loading data: {kind}")
        if kind not in ("full", "none"):
            self.dataset("full")  # which files are read is known from here
        self.use(self.store("full" if kind == "shuffle" else kind))
        config = self.task["dataset"]
        if kind == "none":
            config = self._moved(self.store("none"))[0]["dataset"]
        with self._hooked(kind), self.reading(kind), self._given_state(kind):
            return init_instance_by_config(config, accept_types=DatasetH)

    @contextmanager
    def _given_state(self, kind: str) -> Iterator[None]:
        """Before the end of train, processors are those fitted on the whole store.

        Their fit window reaches beyond the day, as it may: what they learned is looked
        at by the check of windows, and only what they make of rows is compared.
        """
        if "@" not in kind or self.parted(kind)[1] >= self._test_start():
            yield
            return
        main = self.dataset("full").handler
        ours = ("shared_processors", "infer_processors", "learn_processors")

        def fit_process_data(handler):
            for name in ours:
                kept = getattr(main, name, None)
                if kept is not None and len(kept) == len(getattr(handler, name)):
                    setattr(handler, name, kept)
            handler.process_data()

        with mock.patch.object(DataHandlerLP, "fit_process_data", fit_process_data):
            yield

    def _test_start(self) -> pd.Timestamp:
        return _stamp(self.segments["test"][0]) or self.calendar[0]

    @contextmanager
    def _hooked(self, kind: str) -> Iterator[None]:
        """Exchange labels where wanted, whoever makes a handler meanwhile."""
        original = DataHandler.setup_data
        raw = self._raw
        seed = self.settings.seed

        def setup_data(handler, *args, **kwargs):
            key = _loading_of(handler)
            loader = handler.data_loader
            if kind == "few" and isinstance(loader, DLWParser) and loader.is_group:
                loader.fields = {
                    k: (e[:1], n[:1]) for k, (e, n) in loader.fields.items()
                }
            if kind == "shuffle" and key in raw:
                handler._data = raw[key].copy()
            else:
                original(handler, *args, **kwargs)
                if kind == "full":
                    raw[key] = handler._data.copy()
            if kind == "shuffle":
                handler._data = shuffled(handler._data, seed)

        with mock.patch.object(DataHandler, "setup_data", setup_data):
            yield

    def frames(self, kind: str) -> dict[str, pd.DataFrame]:
        """Copy the handler's frames: raw, infer, learn."""

        def copies():
            handler = self.dataset(kind).handler
            found: dict[str, pd.DataFrame] = {}
            for key in KEYS:
                if not isinstance(handler, DataHandlerLP) and key != "raw":
                    continue
                frame = handler.fetch(col_set=DataHandler.CS_RAW, data_key=key)
                found[key] = in_order(frame).copy()
            return found

        return self._once(("frames", kind), copies)

    def rows(self, kind: str) -> pd.Index:
        """Rows that the model predicts, of all dates."""
        frames = self.frames(kind)
        return frames.get("infer", frames["raw"]).index

    def drawn_rows(self) -> dict[str, pd.Index]:
        """Rows that the model predicts, on the stores "full" and "members".

        Only the first column of each group is loaded where that is enough.
        """

        def rows(few: bool) -> dict[str, pd.Index]:
            found = {}
            for kind in ("full", "members"):
                self.use(self.store(kind))
                with self._hooked("few" if few else "none"):
                    dataset = init_instance_by_config(
                        self.task["dataset"], accept_types=DatasetH
                    )
                handler = dataset.handler
                key = "infer" if isinstance(handler, DataHandlerLP) else "raw"
                frame = handler.fetch(col_set=DataHandler.CS_RAW, data_key=key)
                found[kind] = in_order(frame).index
            return found

        def either() -> dict[str, pd.Index]:
            self.say("loading data: rows of other members")
            try:
                return rows(few=True)
            except Exception:  # a processor needs the other columns: load them all
                return rows(few=False)

        return self._once("drawn rows", either)

    def label(self, kind: str) -> pd.DataFrame:
        """Raw label of the whole time range: the loader's, without processors.

        Raises
        ------
        ValueError
            If the loader has no column group `label`.
        """

        def load():
            known, _ = self._memory.get(("frames", kind), (None, None))
            if known is not None and "label" in groups_of(known["raw"]):
                return known["raw"]["label"]
            handler = self.dataset("full").handler
            if kind == "full" and "label" in groups_of(self.frames(kind)["raw"]):
                return self.frames(kind)["raw"]["label"]
            self.use(self.store(kind))
            loader = handler.data_loader
            times = (handler.instruments, handler.start_time, handler.end_time)
            fields = getattr(loader, "fields", None)
            if isinstance(loader, DLWParser) and isinstance(fields, dict):
                if "label" not in fields:
                    raise ValueError(_NO_LABEL)
                return in_order(
                    loader.load_group_df(
                        times[0], *fields["label"], *times[1:], "label"
                    )
                )
            frame = loader.load(*times)
            if "label" not in groups_of(frame):
                raise ValueError(_NO_LABEL)
            return in_order(frame["label"])

        return self._once(("label", kind), load)

    def reach(self) -> tuple[int | None, int]:
        """Trading days after t that labels use: as declared, and as measured."""

        def measure():
            declared = handler_label_reach(self.dataset("full").handler)
            full, noise = self.label("full"), self.label("noise")
            return declared, changed_lag(full, noise, self.calendar, self.day)

        return self._once("reach", measure)

    def label_until(self, day: pd.Timestamp | None = None) -> pd.Timestamp:
        """Last day whose label lies before the day on which the copies part."""
        day = self.day if day is None else day
        back = handler_label_reach(self.dataset("full").handler)
        if back is None:
            back = self.reach()[1]
        at = int(self.calendar.searchsorted(day)) - back
        return self.calendar[max(at, 0)]

    # ---- model ---------------------------------------------------------------------

    def fit(self, kind: str, again: int = 0) -> Model:
        """Train the workflow's model on a copy of the store, from a fixed seed."""
        return self._once(("model", kind, again), lambda: self._fit(kind, again))

    def _fit(self, kind: str, again: int) -> Model:
        dataset = self.dataset(kind)
        self.frames(kind)  # before a model can write to them
        self.say(f"training: {kind}" + (" again" if again else ""))
        store = self.store("full" if kind == "shuffle" else kind)
        self.use(store)
        seed_everything(self.settings.seed)
        task = self.task
        if kind == "none":
            task = self._moved(store)[0]
        trace = BatchTrace()
        with ExitStack() as stack:
            stack.enter_context(quiet_recorder())
            stack.enter_context(self._hooked("none" if kind == "full" else kind))
            model = init_instance_by_config(task["model"], accept_types=Model)
            kwargs: dict[str, Any] = {}
            if task.get("reweighter") is not None:
                kwargs["reweighter"] = init_instance_by_config(task["reweighter"])
            if kind == "full" and not again:
                stack.enter_context(trace.watching(dataset))
            stack.enter_context(self.reading(kind))
            known = inspect.signature(model.fit).parameters
            model.fit(dataset, **{k: v for k, v in kwargs.items() if k in known})
        if kind == "full" and not again:
            self._memory["trace"] = trace
        return model

    def trace(self) -> BatchTrace:
        """Give what the fit on the whole store got."""
        self.fit("full")
        return self._memory["trace"]

    def scores(
        self, kind: str, fitted: str = "full", segment: Any = None, again: int = 0
    ) -> pd.Series:
        """Scores of the test segment on one store by the model trained on another.

        Parameters
        ----------
        kind : str
            Store to predict on.
        fitted : str
            Store that was trained on.
        segment : (start, end), optional
            In place of the test segment's dates.
        """
        key = ("scores", kind, fitted, str(segment), again)
        return self._once(key, lambda: self._scores(kind, fitted, segment, again))

    def _scores(self, kind, fitted, segment, again):
        model = self.fit(fitted, again)
        dataset = self.dataset(kind)
        if kind != fitted:
            # As in a fresh process: what a model keeps of the data it was trained on
            # must not stand in for the data at hand.
            model = fresh(model)
        self.use(self.store("full" if kind == "shuffle" else kind))
        calls: list[tuple[Any, str]] = []
        original = dataset.prepare

        def prepare(segments, *args, **kwargs):
            calls.append((segments, kwargs.get("data_key", DataHandlerLP.DK_I)))
            part = original(segments, *args, **kwargs)
            if kind == fitted == "full" and "label" in str((args, kwargs)):
                self._asked |= _last_days(part)
            return part

        before = dataset.segments
        hooked = self._hooked("none" if kind == "full" else kind)
        with quiet_recorder(), hooked, self.reading(kind):
            try:
                dataset.prepare = prepare
                if segment is not None:
                    dataset.segments = {**before, "test": segment}
                found = model.predict(dataset)
            finally:
                del dataset.prepare
                dataset.segments = before
        self._memory["predict keys"] = {key for _, key in calls}
        if isinstance(found, pd.DataFrame):
            found = found.iloc[:, 0]
        if not isinstance(found, pd.Series) or found.index.nlevels != 2:
            raise ValueError(
                "`predict` must return a Series by (datetime, instrument), got "
                f"{type(found).__name__}."
            )
        score = in_order(found.to_frame("score"))["score"].astype(float)
        if score.notna().sum() == 0:
            raise ValueError("`predict` gave no score.")
        return score

    def predicts_from(self) -> str:
        """Frame that `predict` asked the data set for; infer if it asked for none."""
        self.scores("full")
        keys = self._memory["predict keys"]
        return "learn" if DataHandlerLP.DK_L in keys else "infer"

    def datasets(self) -> dict[str, DatasetH]:
        """Give the workflow's data set, and those its fitted model made itself."""
        main = self.dataset("full")
        found = {"": main}
        if "'handler'" not in str(self.task["model"]):
            return found
        for name, value in walk(self.fit("full"), DatasetH):
            if value is not main:
                found[name] = value
        return found

    def forget(self, *kinds: str) -> None:
        """Let go of the data of some stores."""
        for key in list(self._memory):
            if isinstance(key, tuple) and key[0] in ("dataset", "frames", "model"):
                if key[1] in kinds:
                    del self._memory[key]

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._memory:
            try:
                self._memory[key] = (make(), None)
            except Exception as error:
                self._memory[key] = (None, error)
        value, failure = self._memory[key]
        if failure is not None:
            raise failure
        return value


_NO_LABEL = (
    "the data loader has no column group `label`: what a processor makes of other "
    "columns cannot be told from data that leaked"
)

_MINED = """expressions:
  - {name: turn, expression: "Mean($turnover, 5) / Mean($turnover, 20)"}
"""


# ------------------------------------------------------------------------------ parts
def make_lab(
    out: Path, signal: str, stocks: int, years: int, seed: int, needs: set[str]
) -> Path:
    """Simulate a small market, with minute, tick and flow features as needed.

    A file of mined expressions is a stand-in: what was mined on other data is no part
    of a workflow.
    """
    from qlib_ext.aggregates import build_store
    from qlib_ext.market import (
        make_bonds,
        make_futures,
        make_market,
        make_minute,
        make_ticks,
    )

    # Built aside: a folder with this name is a whole market.
    work = out.with_name(f".{out.name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    if "futures" in needs:
        given = {} if signal == "planted" else {"strength": 0.0}
        make_futures(work, years=years, seed=seed, overwrite=is_store(work), **given)
        work.rename(out)
        return out
    make_market(
        work,
        stocks=stocks,
        years=years,
        seed=seed,
        signal=signal,
        trades=20,
        order_flow="flow" in needs,
        funds=40 if "funds" in needs else 0,
        overwrite=is_store(work),
    )
    if "mined.yaml" in needs:
        (work / "mined.yaml").write_text(_MINED, encoding="utf-8")
    if of_bars := sorted({"ms", "bars"} & needs):
        minute = make_minute(work, bar_minutes=15)
        for kind in of_bars:
            build_store(kind, minute, work, bar_minutes=15, progress=False)
    if "l2" in needs:
        build_store("l2", make_ticks(work), work, progress=False)
    if "bonds" in needs:
        shares = out.with_name("shares")
        work.rename(shares)
        make_bonds(shares, bonds=min(900, max(20, 2 * stocks)), out=work)
    work.rename(out)
    return out


def _own_store(init: Mapping[str, Any]) -> Path | None:
    uri = init.get("provider_uri")
    if isinstance(uri, Mapping):
        uri = uri.get("day") or uri.get("__DEFAULT_FREQ")
    return None if uri is None else Path(os.path.expanduser(str(uri)))


def _universe(dataset: Mapping[str, Any]) -> Any:
    handler = (dataset.get("kwargs") or {}).get("handler")
    kwargs = handler.get("kwargs") or {} if isinstance(handler, Mapping) else {}
    universe = kwargs.get("instruments", "all")
    if isinstance(universe, Mapping):
        universe = universe.get("market", "all")
    return universe


def _stamp(value: Any) -> pd.Timestamp | None:
    return None if value is None else pd.Timestamp(value)


def _last_days(part: Any) -> set[pd.Timestamp]:
    """Last day of each prepared frame."""
    frames = part if isinstance(part, list) else [part]
    return {
        frame.index.get_level_values("datetime").max()
        for frame in frames
        if isinstance(frame, (pd.DataFrame, pd.Series))
        and "datetime" in frame.index.names
        and len(frame)
    }


def _loading_of(handler: DataHandler) -> str:
    loader = handler.data_loader
    state = {k: v for k, v in vars(loader).items() if not k.startswith("_")}
    text = f"{type(loader).__name__}{state}{handler.instruments}{handler.start_time}"
    return hashlib.sha256(f"{text}{handler.end_time}".encode()).hexdigest()


def groups_of(frame: pd.DataFrame) -> list[str]:
    """Column groups of a frame; a frame without groups is all `feature`."""
    if frame.columns.nlevels < 2:
        return ["feature"]
    return list(dict.fromkeys(map(str, frame.columns.get_level_values(0))))


def tensor_of(frame: pd.DataFrame) -> torch.Tensor:
    """Values of a frame in float64, as a copy."""
    return torch.from_numpy(frame.to_numpy(float, copy=True))


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows (datetime, instrument), sorted."""
    names = list(frame.index.names)
    if names == ["instrument", "datetime"]:
        frame = frame.swaplevel()
    return frame if frame.index.is_monotonic_increasing else frame.sort_index()


def changed_lag(
    full: pd.DataFrame, noise: pd.DataFrame, calendar: pd.DatetimeIndex, day
) -> int:
    """Trading days after t that a label uses, from what changed when the future did."""
    both = full.index.intersection(noise.index)
    a, b = full.loc[both], noise.loc[both]
    values, others = a.to_numpy(float), b.to_numpy(float)
    differs = ~((values == others) | (np.isnan(values) & np.isnan(others))).all(1)
    days = both.get_level_values("datetime")
    touched = days[differs & (days <= day)]
    if len(touched) == 0:
        return 0
    at = calendar.searchsorted(day)
    return int(at - calendar.searchsorted(touched.min())) + 1


def are_few(index: pd.Index) -> bool:
    """Whether these are too few instruments to be compared within a day."""
    return index.get_level_values("instrument").nunique() < FEW


def shuffled(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Exchange the labels of each day among its labelled stocks.

    Stocks stand in a circle whose order is drawn anew each day; each takes the label of
    the next, so that none keeps its own. Fewer than `FEW` instruments exchange theirs
    among the days.
    """
    if "label" not in groups_of(frame):
        raise ValueError(_NO_LABEL)
    frame = frame.copy()
    if are_few(frame.index):
        rng = np.random.default_rng(seed)
        of_label = np.flatnonzero(frame.columns.get_level_values(0) == "label")
        for at in map(int, of_label):
            values = np.array(frame.iloc[:, at], float)
            known = np.flatnonzero(np.isfinite(values))
            values[known] = values[rng.permutation(known)]
            frame.isetitem(at, values)
        return frame
    day = pd.DatetimeIndex(frame.index.get_level_values("datetime")).asi8
    names = frame.index.get_level_values("instrument")
    spin = pd.util.hash_array(np.asarray(names.astype(str), dtype=object))
    with np.errstate(over="ignore"):
        key = spin * np.uint64(0x9E3779B97F4A7C15) + day.astype(np.uint64)
        key = pd.util.hash_array(key ^ np.uint64(seed))
    for at in range(frame.shape[1]):
        if frame.columns[at][0] != "label":
            continue
        values = np.array(frame.iloc[:, at], float)
        known = np.flatnonzero(np.isfinite(values))
        order = known[np.lexsort((key[known], day[known]))]
        edge = np.flatnonzero(np.diff(day[order])) + 1
        for part in np.split(order, edge):
            values[part] = values[np.roll(part, -1)]
        frame.isetitem(at, values)
    return frame


def seed_everything(seed: int) -> None:
    """Seed what a model may draw from without a seed of its own."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def quiet_recorder() -> Iterator[None]:
    """Keep models from logging: an audit leaves no run behind."""
    with ExitStack() as stack:
        for name in ("log_metrics", "log_params", "save_objects", "set_tags"):
            stack.enter_context(
                mock.patch.object(QlibRecorder, name, lambda self, *a, **k: None)
            )
        yield


def fresh(model: Model) -> Model:
    """Give a model as a fresh process would read it; itself if it does not pickle."""
    try:
        return pickle.loads(pickle.dumps(model))
    except (pickle.PicklingError, TypeError, AttributeError):
        return model


def walk(value: Any, wanted: type, depth: int = 4) -> Iterator[tuple[str, Any]]:
    """Objects of a type among the attributes, lists and dicts below an object."""
    seen: set[int] = set()

    def go(item: Any, name: str, left: int) -> Iterator[tuple[str, Any]]:
        if id(item) in seen or left < 0:
            return
        seen.add(id(item))
        if isinstance(item, wanted):
            yield name or type(item).__name__, item
        if isinstance(item, Mapping):
            parts: Any = item.items()
        elif isinstance(item, (list, tuple)):
            parts = enumerate(item)
        elif hasattr(item, "__dict__") and not isinstance(
            item, (type, pd.DataFrame, pd.Series, torch.Tensor, DataHandler)
        ):
            parts = vars(item).items()
        else:
            return
        for key, part in parts:
            if isinstance(part, (str, int, float, bytes, np.ndarray, torch.Tensor)):
                continue
            yield from go(part, f"{name}.{key}" if name else str(key), left - 1)

    yield from go(value, "", depth)
