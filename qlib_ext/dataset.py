"""PanelDataset and Panel: a market as tensors, days first.

Glossary: t days of the panel, n instruments, f features, q labels, r risk columns,
l look-back days, c scored days of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from qlib.data.dataset import DatasetH, TSDatasetH
from qlib.data.dataset.handler import DataHandler, DataHandlerLP
from qlib.data.dataset.storage import BaseHandlerStorage
from qlib.data.dataset.utils import fetch_df_by_index
from qlib.log import get_module_logger

from data_handlers.arguments import NamedArguments
from data_handlers.labels import days_ahead, holding_days
from data_handlers.panel import cells, scatter
from data_handlers.segments import (
    check_fit_windows,
    check_overlap,
    check_purge,
    check_spans,
    overlap_words,
    segment_ends,
)
from data_handlers.sharing import labels_alone

__all__ = [
    "Panel",
    "PanelDataset",
    "check_purge",
    "handler_label_horizon",
    "handler_label_reach",
    "segment_dates",
    "segment_ends",
    "step_len_of",
]

logger = get_module_logger("qlib_ext.dataset")


@dataclass
class Panel:
    """A market as arrays, days first: the form in which models see data.

    Attributes
    ----------
    dates : DatetimeIndex [t]
        Trading days, ascending.
    instruments : Index [n]
        Instrument codes, sorted.
    feature_names : list of str [f]
    features : float32 Tensor [t, n, f]
        What is known at the close of the day; missing values are 0, the mean of a
        standardised feature.
    present : bool Tensor [t, n]
        The instrument belongs to the universe and traded that day.
    label_names : list of str [q]
    labels : float32 Tensor [t, n, q]
        Processed label to learn from; NaN where there is none.
    raw_labels : float32 Tensor [t, n, q]
        Arithmetic forward return as loaded; NaN where there is none.
    risk_names : list of str [r]
    risk : float32 Tensor [t, n, r]
        Risk columns (industry code, log market cap, style exposures); NaN unknown.
    attribute_names : list of str [a]
    attributes : float32 Tensor [t, n, a]
        Attributes of the day that join behind a recurrent encoder; NaN unknown.
    market_names : list of str [m]
    market : float32 Tensor [t, m]
        State of the whole market at the close of the day; 0 unknown.
    """

    dates: pd.DatetimeIndex
    instruments: pd.Index
    feature_names: list[str]
    features: torch.Tensor
    present: torch.Tensor
    label_names: list[str]
    labels: torch.Tensor
    raw_labels: torch.Tensor
    risk_names: list[str] = field(default_factory=list)
    risk: torch.Tensor | None = None
    attribute_names: list[str] = field(default_factory=list)
    attributes: torch.Tensor | None = None
    market_names: list[str] = field(default_factory=list)
    market: torch.Tensor | None = None

    @classmethod
    def from_frames(
        cls,
        feature: pd.DataFrame,
        label: pd.DataFrame | None = None,
        raw_label: pd.DataFrame | None = None,
        risk: pd.DataFrame | None = None,
        attribute: pd.DataFrame | None = None,
        market: pd.DataFrame | None = None,
    ) -> Panel:
        """Scatter Qlib frames (rows: datetime, instrument) into arrays.

        Parameters
        ----------
        feature : DataFrame
            One row for each instrument and day of the universe; its rows alone decide
            presence. A row whose every feature is NaN counts as absent.
        label, raw_label, risk, attribute : DataFrame, optional
            Rows that `feature` lacks are ignored; rows they lack are NaN. In particular
            rows that a label processor dropped stay in the panel, without label.
        market : DataFrame, optional
            Equal for all rows of a day; the first one counts.

        Raises
        ------
        ValueError
            If `feature` is empty, its index is not (datetime, instrument), holds a
            pair twice, or a column is not numeric.
        """
        if feature.empty:
            raise ValueError(
                "`feature` frame is empty: no instrument of the universe has data in "
                "the handler's time range. Check `instruments`, `start_time`, "
                "`end_time` and the store at `provider_uri`."
            )
        dates, instruments = _axes(feature.index)

        def tensor(frame: pd.DataFrame, what: str) -> torch.Tensor:
            return torch.from_numpy(
                scatter(frame, dates, instruments, np.float32, f"{what} frame")
            )

        features = tensor(feature, "feature")
        present = _presence(cells(feature.index, dates, instruments), features)
        # In place: the panel must not need a second array of its own size.
        torch.nan_to_num_(features, nan=0.0, posinf=0.0, neginf=0.0)

        names = [] if label is None else _names(label)
        empty = torch.full((*present.shape, 0), float("nan"))
        labels = empty if label is None else tensor(label, "label")
        if raw_label is None:
            raw = labels
        else:
            raw = tensor(raw_label, "label")
            if label is None:
                names = _names(raw_label)
        return cls(
            dates=dates,
            instruments=instruments,
            feature_names=_names(feature),
            features=features,
            present=present,
            label_names=names,
            labels=labels,
            raw_labels=raw,
            risk_names=[] if risk is None else _names(risk),
            risk=None if risk is None else tensor(risk, "risk"),
            attribute_names=[] if attribute is None else _names(attribute),
            attributes=None if attribute is None else tensor(attribute, "attribute"),
            market_names=[] if market is None else _names(market),
            market=None if market is None else _of_days(market, dates),
        )

    @classmethod
    def from_dataset(cls, dataset: DatasetH) -> Panel:
        """Panel of the whole time range of a Qlib dataset's handler."""
        if isinstance(dataset, PanelDataset):
            return dataset.panel
        return cls.from_handler(getattr(dataset, "handler", None))

    @classmethod
    def from_handler(cls, handler: Any) -> Panel:
        """Panel of all that a handler has loaded.

        Features come from the inference frame and labels from the learning frame, so
        rows which a learning processor dropped keep their features.

        Raises
        ------
        ValueError
            If `handler` is no `DataHandlerLP` or has no column group `feature`.
        """
        if not isinstance(handler, DataHandlerLP):
            raise ValueError(
                f"`handler` must be a DataHandlerLP, got {type(handler).__name__}."
            )
        infer_groups = _groups(handler, handler.DK_I)
        learn_groups = _groups(handler, handler.DK_L)
        if "feature" not in infer_groups:
            raise ValueError(
                "the handler's frame has no column group `feature`; give its data "
                "loader a config with the groups `feature` and `label`."
            )
        fetch = handler.fetch
        label = raw = risk = None
        if "label" in learn_groups:
            label = fetch(col_set="label", data_key=handler.DK_L)
            if handler.drop_raw:
                logger.warning(
                    "`drop_raw=True`: the raw label is gone, so validation RankIC is "
                    "measured against the processed label."
                )
            else:
                raw = fetch(col_set="label", data_key=handler.DK_R)
        if "risk" in infer_groups:
            risk = fetch(col_set="risk", data_key=handler.DK_I)
        elif "risk" in learn_groups:
            risk = fetch(col_set="risk", data_key=handler.DK_L)
        attribute = None
        if "attribute" in infer_groups:
            attribute = fetch(col_set="attribute", data_key=handler.DK_I)
        market = None
        if "market" in infer_groups:
            market = fetch(col_set="market", data_key=handler.DK_I)
        panel = cls.from_frames(
            fetch(col_set="feature", data_key=handler.DK_I),
            label,
            raw,
            risk,
            attribute,
            market,
        )
        logger.info(f"{panel}")
        return panel

    def __repr__(self) -> str:
        t, n, f = self.features.shape
        first, last = self.dates[0], self.dates[-1]
        return (
            f"Panel({t} days {first:%Y-%m-%d}..{last:%Y-%m-%d}, {n} instruments, "
            f"{f} features, labels {self.label_names}, "
            f"{self.features.nbytes / 2**20:.0f} MiB)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays().values())

    def near(
        self, device: torch.device, free: float, half: bool = False
    ) -> tuple[Panel, str]:
        """Copy the arrays to a device, if they fit.

        Parameters
        ----------
        device : torch.device
        free : float
            Bytes that they may take.
        half : bool, default False
            Features in bfloat16: of what a network sees under bfloat16 autocast
            nothing is lost. Labels stay in float32.

        Returns
        -------
        Panel
            This very one if it does not fit.
        str
            What was done, for the log.
        """
        size = self.nbytes - (self.features.nbytes // 2 if half else 0)
        takes = f"the panel takes {size / 2**30:.2f} GiB"
        if half:
            takes += ", its features in bfloat16"
        if size > free:
            share = free / size
            return self, (
                f"{takes}, of which {share:.0%} fit: batches are copied one by one. "
                f"{int(share * len(self.instruments))} stocks, "
                f"{int(share * len(self.dates))} days or fewer features would fit"
            )
        arrays = self._arrays()
        if half:
            arrays["features"] = self.features.to(torch.bfloat16)
        arrays = {k: a.to(device) for k, a in arrays.items()}
        return replace(self, **arrays), f"{takes} and is kept there"

    def _arrays(self) -> dict[str, Any]:
        names = (
            *("features", "present", "labels", "raw_labels"),
            *("risk", "attributes", "market"),
        )
        return {k: getattr(self, k) for k in names if getattr(self, k) is not None}

    def label_index(self, name: str | None = None) -> int:
        """Position of a label; None is the first.

        Raises
        ------
        ValueError
            If the panel has no such label.
        """
        if not self.label_names:
            raise ValueError(
                "the panel has no label; give the handler a `label` column group."
            )
        if name is None:
            return 0
        if name not in self.label_names:
            raise ValueError(
                f"`label` must be one of {self.label_names}, got {name!r}."
            )
        return self.label_names.index(name)

    def risk_column(self, name: str) -> np.ndarray | None:
        """Return a column [t, n] of the risk group; None if there is none."""
        if self.risk is None or name not in self.risk_names:
            return None
        return self.risk[..., self.risk_names.index(name)].numpy()

    def days(self, segment: Any) -> np.ndarray:
        """Positions of the days of a segment, a (start, end) pair or slice."""
        return np.arange(*self.dates.slice_locs(*segment_ends(segment)))

    def series(self, values: torch.Tensor, days: np.ndarray, names: list[str]):
        """Frame (datetime, instrument) of values [c, n, k] where present."""
        mask = self.present[days].numpy()
        where_day, where_stock = np.nonzero(mask)
        index = pd.MultiIndex(
            levels=[self.dates, self.instruments],  # type: ignore[list-item]
            codes=[days[where_day], where_stock],  # type: ignore[list-item]
            names=["datetime", "instrument"],
        )
        rows = values.numpy()[where_day, where_stock]
        return pd.DataFrame(rows, index=index, columns=names, copy=False)

    def fingerprint(self) -> dict[str, Any]:
        """Return names, dates and a hash of all values, to know a checkpoint's data."""
        digest = hashlib.blake2b(digest_size=16)
        for array in self._arrays().values():
            for days in array.split(64):
                digest.update(np.ascontiguousarray(days.numpy()).data)
        return {
            "dates": [str(self.dates[0]), str(self.dates[-1]), len(self.dates)],
            "instruments": [*self.instruments[[0, -1]], len(self.instruments)],
            "features": self.feature_names,
            "labels": self.label_names,
            "risk": self.risk_names,
            **({"attributes": self.attribute_names} if self.attribute_names else {}),
            **({"market": self.market_names} if self.market_names else {}),
            "values": digest.hexdigest(),
        }


def _axes(index: pd.Index) -> tuple[pd.DatetimeIndex, pd.Index]:
    if not {"datetime", "instrument"} <= set(index.names):
        raise ValueError(
            "`feature frame` must be indexed by (datetime, instrument), got "
            f"{list(index.names)}."
        )
    days = pd.DatetimeIndex(index.unique("datetime")).sort_values()
    return days, index.unique("instrument").sort_values()


def _names(frame: pd.DataFrame) -> list[str]:
    return [str(c[-1] if isinstance(c, tuple) else c) for c in frame.columns]


def _groups(handler: DataHandlerLP, data_key: str) -> set[str]:
    columns = handler.get_cols(DataHandler.CS_RAW, data_key)
    return {c[0] for c in columns if isinstance(c, tuple)}


def _of_days(frame: pd.DataFrame, dates: pd.DatetimeIndex) -> torch.Tensor:
    """Values [t, m] of a frame whose rows of a day are all equal; 0 unknown."""
    days = frame.index.get_level_values("datetime")
    first = frame[~days.duplicated()].droplevel("instrument").reindex(dates)
    return torch.from_numpy(np.nan_to_num(first.to_numpy(np.float32), copy=True))


def _presence(cell: np.ndarray, features: torch.Tensor) -> torch.Tensor:
    present = torch.zeros(features.shape[:2], dtype=torch.bool)
    present.view(-1)[torch.from_numpy(cell)] = True
    for day in range(len(present)):  # a day at a time keeps the temporary small
        present[day] &= torch.isfinite(features[day]).any(-1)
    return present


def handler_label_reach(handler: Any) -> int | None:
    """Trading days after t that the handler's labels use; None if it can't be told.

    The handler's own `label_reach`, else read from the Qlib expressions of its loader's
    `label` group.
    """
    if (reach := getattr(handler, "label_reach", None)) is not None:
        return reach
    loader = getattr(handler, "data_loader", None)
    fields = getattr(loader, "fields", None)
    if not isinstance(fields, dict) or "label" not in fields:
        return None
    return days_ahead(fields["label"][0])


def handler_label_horizon(handler: Any, column: int = 0) -> int | None:
    """Trading days between the prices of a label column; None if it can't be told."""
    horizons = getattr(handler, "horizons", None)
    if horizons is None:
        fields = getattr(getattr(handler, "data_loader", None), "fields", None)
        if not isinstance(fields, dict) or "label" not in fields:
            reach = getattr(handler, "label_reach", None)
            return None if reach is None else max(1, reach - 1)
        horizons = [holding_days(x) for x in fields["label"][0]]
    return horizons[min(column, len(horizons) - 1)]


def segment_dates(
    dataset: DatasetH, segment: str | slice | tuple
) -> tuple[pd.Timestamp | None, pd.Timestamp | None]:
    """First and last day of a segment, by name or as (start, end); None is open."""
    if isinstance(segment, str):
        if segment not in dataset.segments:
            raise ValueError(
                f"`segment` must be one of {sorted(dataset.segments)}, got {segment!r}."
            )
        segment = dataset.segments[segment]
    return segment_ends(segment)


class _PanelStorage(BaseHandlerStorage):
    """Stands in a handler where a frame was freed, and rebuilds it from the panel.

    The handler has to know it: Qlib's records make a `PanelDataset` a plain `DatasetH`
    for as long as they read labels.
    """

    def __init__(self, panel: Panel, raw: bool) -> None:
        self.panel = panel
        self.groups = {
            "feature": (panel.features, panel.feature_names),
            "label": (panel.raw_labels if raw else panel.labels, panel.label_names),
        }
        if panel.risk is not None:
            self.groups["risk"] = (panel.risk, panel.risk_names)
        if panel.attributes is not None:
            self.groups["attribute"] = (panel.attributes, panel.attribute_names)
        if panel.market is not None:
            n = len(panel.instruments)
            each = panel.market.unsqueeze(1).expand(-1, n, -1)
            self.groups["market"] = (each, panel.market_names)

    def head(self) -> pd.DataFrame:
        """Columns without rows; Qlib's `get_cols` asks frames for it."""
        return self._frame(self.groups, np.arange(0))

    def fetch(
        self,
        selector: Any = slice(None),
        level: Any = "datetime",
        col_set: Any = DataHandler.CS_ALL,
        fetch_orig: bool = True,
    ) -> pd.DataFrame:
        """See Qlib's `BaseHandlerStorage`; only what is selected is built."""
        by_day = isinstance(selector, slice) and level == "datetime"
        days = self.panel.days(selector if by_day else slice(None))
        if isinstance(col_set, str) and col_set in self.groups:
            frame = self._group(col_set, days)
        else:
            every = col_set in (DataHandler.CS_ALL, DataHandler.CS_RAW)
            frame = self._frame(self.groups if every else col_set, days)
            if col_set == DataHandler.CS_ALL:  # as in Qlib: without the groups
                frame = frame.droplevel(0, axis=1)
        return frame if by_day else fetch_df_by_index(frame, selector, level)

    def _frame(self, wanted: Iterable[str], days: np.ndarray) -> pd.DataFrame:
        return pd.concat({name: self._group(name, days) for name in wanted}, axis=1)

    def _group(self, name: str, days: np.ndarray) -> pd.DataFrame:
        values, columns = self.groups[name]
        return self.panel.series(values[days], days, columns)


class PanelDataset(NamedArguments, DatasetH):
    """A `DatasetH` that also offers its data as one `Panel`.

    Qlib's records and models use `prepare` as with any `DatasetH`; models of this
    package take `panel`, built at first use from the handler's frames.

    Parameters
    ----------
    handler : dict or DataHandlerLP
        With column groups `feature` and `label`, and `risk` if the model needs it.
    segments : dict
        `train`, `valid`, `test`: (start, end), both inclusive.
    purge : {"error", "trim", "off"}, default "error"
        What to do when fewer trading days lie between two segments than the label
        reaches into the future (11 for a 10-day label): raise, end the earlier segment
        earlier, or accept that its last labels are made of the later segment's returns.
    keep_frames : bool, default True
        False frees the handler's frames once the panel exists (of the raw one only the
        labels are kept from the start); what is asked for later, of the data set or its
        handler, is rebuilt from the panel: with missing features as 0, processed
        features in the raw frame too, and without the rows of stocks that have no
        feature at all.
    fetch_kwargs : dict, optional
        As in Qlib's `DatasetH`: further arguments of the handler's `fetch`.

    Raises
    ------
    ValueError
        On a segment that is reversed, empty in the data, or too close to the next, each
        naming the dates.
    """

    #: Its handler need not look at the segments: `purge` says what becomes of them.
    checks_segments = True
    # A class attribute, since names with an underscore do not survive Qlib's pickling.
    _panel: Panel | None = None

    def __init__(
        self,
        handler: dict | DataHandler,
        segments: dict[str, Any],
        purge: Literal["error", "trim", "off"] = "error",
        keep_frames: bool = True,
        fetch_kwargs: dict | None = None,
    ) -> None:
        if not isinstance(segments, dict) or not segments:
            raise ValueError(
                f"`segments` must map names to (start, end) dates, got {segments!r}."
            )
        with nullcontext() if keep_frames else labels_alone():
            super().__init__(
                handler=handler, segments=segments, fetch_kwargs=fetch_kwargs or {}
            )
        self._check_segments()

    def _check_segments(self) -> None:
        dates = self._dates()
        check_spans(self.segments, dates)
        reach = handler_label_reach(self.handler)
        check_fit_windows(self.handler, self.segments, dates)
        if self.purge == "off":
            return
        if reach is None:
            check_overlap(self.segments, dates)
            return
        for earlier, later, gap, last in check_purge(self.segments, dates, reach):
            if self.purge == "error" or last is None:
                raise ValueError(
                    overlap_words(self.segments, reach, earlier, later, gap, last)
                    + ("" if last is None else ', set purge="trim" to have that done')
                    + ', or set purge="off" to accept the overlap.'
                )
            logger.info(
                f"segment {earlier} now ends at {last:%Y-%m-%d}: the label reaches "
                f"{reach} trading days ahead of it, to the day before {later}"
            )
            self.segments[earlier] = (segment_ends(self.segments[earlier])[0], last)

    def _dates(self) -> pd.DatetimeIndex:
        if self._panel is not None:
            return self._panel.dates
        index = self.handler._get_df_by_key(DataHandlerLP.DK_I).index
        if len(index) == 0:
            raise ValueError(
                "the handler's frame is empty: no instrument of the universe has data "
                "in its time range. Check `instruments`, `start_time`, `end_time` and "
                "the store at `provider_uri`."
            )
        return pd.DatetimeIndex(index.unique("datetime")).sort_values()

    @property
    def panel(self) -> Panel:
        """The data as arrays, built at first use."""
        if self._panel is None:
            self._panel = Panel.from_handler(self.handler)
            if not self.keep_frames:
                self._free(DataHandlerLP.DK_R)
                self.free_frames()
        return self._panel

    def free_frames(self) -> None:
        """Free the handler's processed frames; the panel and the raw frame stay.

        What is asked for later is rebuilt from the panel, see `keep_frames`.
        """
        _ = self.panel
        self._free(DataHandlerLP.DK_I)
        self._free(DataHandlerLP.DK_L)

    def _free(self, data_key: Any) -> None:
        name = self.handler.ATTR_MAP[data_key]
        if hasattr(self.handler, name):  # else `drop_raw`, and Qlib says so when asked
            raw = data_key == DataHandlerLP.DK_R
            setattr(self.handler, name, _PanelStorage(self.panel, raw))

    def config(self, handler_kwargs: dict | None = None, **kwargs) -> None:
        """Configure for new days, as Qlib's online updaters do.

        A later `start_time` than the handler has is not taken over: Qlib knows only of
        its own `TSDatasetH` that a score needs days before its own, and would cut them
        off. The segments decide which days are scored.
        """
        own = getattr(self.handler, "start_time", None)
        if handler_kwargs and own is not None:
            asked = handler_kwargs.get("start_time")
            if asked is not None and pd.Timestamp(asked) > pd.Timestamp(own):
                handler_kwargs = {**handler_kwargs, "start_time": own}
        super().config(handler_kwargs=handler_kwargs, **kwargs)

    def setup_data(self, handler_kwargs: dict | None = None, **kwargs) -> None:
        """Load or reload the handler's data; the panel is rebuilt at next use."""
        self._panel = None
        super().setup_data(handler_kwargs=handler_kwargs, **kwargs)


def step_len_of(dataset: Any) -> int | None:
    """Look-back that the dataset itself prescribes (`TSDatasetH`), else None."""
    return dataset.step_len if isinstance(dataset, TSDatasetH) else None
