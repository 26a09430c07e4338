"""Processors of Qlib frames: suspended rows, clipping, daily neutralisation.

Two kinds live here. Learned ones (`RobustClipZScore`, `FitScale`) estimate their
statistics on a fit window and freeze them. Cross-sectional ones (`CSNeutralize`,
`CSZScore`) pool one day only and keep no state. All of them return a new frame, leave
the caller's frame untouched, keep float32 as float32, treat infinities as missing, and
pickle.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
from qlib.log import get_module_logger

from data_handlers.arguments import Day, Names, Positive, Text
from data_handlers.cross_section import (
    BLOCK_BYTES,
    ROUNDING_RTOL,
    column_values,
    day_blocks,
    day_codes,
    finite_column,
    group_positions,
    neutralize,
    replace_columns,
    standardize_days,
)
from data_handlers.processor import FrameProcessor

__all__ = [
    "CSNeutralize",
    "CSZScore",
    "DropSuspended",
    "FitScale",
    "RobustClipZScore",
    "neutralize",
]


def __getattr__(name: str) -> Any:
    """Give `data_handlers.risk.AddRisk` by the path it had: YAML files name it so."""
    from data_handlers import risk

    if name == "AddRisk":
        return risk.AddRisk
    if name in risk.__all__:
        raise AttributeError(
            f"{__name__} has no {name}: it is in `module_path: {risk.__name__}`.",
            name=name,
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class DropSuspended(FrameProcessor):
    """Drop the rows of stocks that did not trade on the day.

    Qlib keeps a calendar row for a suspended stock; all its features of that day are
    NaN. Such rows are removed, for learning and for inference alike: the choice looks
    at the day's own features and never at a label, so no row vanishes because of what
    happened later. Keeps no state.

    Parameters
    ----------
    fields_group : str, default "feature"
        Group whose columns tell whether a stock traded.
    fields : list of str, optional
        Names within the group to look at; default all. Rolling features stay known
        through a suspension, so for Alpha158 name one of the day's own, e.g. ["KMID"].
    """

    by_day = True

    def __init__(
        self, fields_group: Names | None = "feature", fields: Names | None = None
    ):
        pass

    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        """Return the rows with at least one known value among the fields."""
        positions = group_positions(df, self.fields_group)
        if self.fields is not None:
            names = df.columns.get_level_values(-1)
            wanted = [self.fields] if isinstance(self.fields, str) else self.fields
            absent = [f for f in wanted if f not in names[positions]]
            if absent:
                raise ValueError(
                    f"`fields`: {absent[0]!r} is not in group {self.fields_group!r}, "
                    f"which holds {list(names[positions])[:10]}."
                )
            positions = positions[names[positions].isin(wanted)]
        traded = np.zeros(len(df), bool)
        for at in positions:
            traded |= np.isfinite(column_values(df, at))
            if traded.all():
                return df
        return df[traded]


class RobustClipZScore(FrameProcessor):
    """Clip, standardise and fill each feature with statistics of a fit window.

    Per feature, over all finite values of the fit window pooled over stocks and days:
    median m and median absolute deviation a (unscaled, no 1.4826); values are clipped
    to m ± `n_mad`·a; mean and population standard deviation of the clipped values. The
    four numbers are frozen, then applied to every row: clip, subtract the mean, divide
    by the standard deviation, and set what is missing (or infinite) to 0.

    Parameters
    ----------
    fit_start_time, fit_end_time : str or date
        Fit window, both ends included. Required; handlers that call Qlib's
        `check_transform_proc` pass them in.
    fields_group : str or list of str, default "feature"
        Group(s) to transform; other columns pass through unchanged.
    n_mad : float, default 7
        Clip distance in median absolute deviations.
    fill : bool, default True
        Set missing values to 0 (the mean) after standardising; False keeps NaN.
    allow_empty : bool, default False
        Whether a feature that is all-NaN or constant in the fit window may stand: it
        then becomes 0 (NaN where missing if not `fill`), with one warning. The default
        raises, because such a feature is nearly always a mistake.
    exclude : list of str, optional
        Features left as they are, such as codes of states; `fill` still applies.

    Attributes
    ----------
    columns_ : list
        Column labels the statistics belong to.
    median_, mad_, mean_, std_ : ndarray of float64
        Frozen statistics, in the order of `columns_`.

    Notes
    -----
    `[gap]` Where more than half of a feature's values are equal, its median absolute
    deviation is 0 and the rule would clip it to a constant; such a feature is left
    unclipped, with one warning.

    Memory: one column in flight plus the result frame.

    Raises
    ------
    ValueError
        If the window is missing, reversed or without data, or a feature is empty or
        constant in it (unless `allow_empty`).
    """

    def __init__(
        self,
        fit_start_time: Day | None = None,
        fit_end_time: Day | None = None,
        fields_group: Names | None = "feature",
        n_mad: Positive = 7,
        fill: bool = True,
        allow_empty: bool = False,
        exclude: Names | None = None,
    ):
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude or ())
        self.columns_: list | None = None
        _fit_window(self)

    def fit(self, df: pd.DataFrame | None = None) -> None:
        """Learn the four statistics of every feature on the fit window.

        Parameters
        ----------
        df : DataFrame
            Rows (datetime, instrument); only those inside the window are read.
        """
        inside, start, end = _fit_rows(self, df)
        assert df is not None
        positions = group_positions(df, self.fields_group)
        stats = np.zeros((4, len(positions)))
        empty: list = []
        constant: list = []
        unclipped: list = []
        labels = list(df.columns[positions])
        names = [c[-1] if isinstance(c, tuple) else c for c in labels]
        absent = [c for c in self.exclude if c not in names]
        if absent:
            raise ValueError(f"`exclude`: {absent[0]!r} is not among {names}.")
        for j, at in enumerate(positions):
            if names[j] in self.exclude:
                stats[:, j] = 0.0, np.inf, 0.0, 1.0
                continue
            x = column_values(df, at)[inside].astype(np.float64)
            x = x[np.isfinite(x)]
            if not len(x):
                empty.append(labels[j])
                continue
            low, high = x.min(), x.max()
            median = np.median(x)
            mad = np.median(np.abs(x - median))
            if high - low <= ROUNDING_RTOL * max(abs(low), abs(high)):
                constant.append(labels[j])
                stats[:, j] = median, 0.0, median, 0.0
                continue
            if mad > 0:
                reach = self.n_mad * mad
                np.clip(x, median - reach, median + reach, out=x)
            else:
                unclipped.append(labels[j])
                mad = np.inf
            stats[:, j] = median, mad, x.mean(), x.std()
        log = get_module_logger(type(self).__name__)
        for found, what in ((empty, "no value"), (constant, "one constant value")):
            if not found:
                continue
            message = (
                f"feature(s) {found} have {what} in the fit window {start.date()} to "
                f"{end.date()}"
            )
            if not self.allow_empty:
                raise ValueError(
                    f"{message}; remove them, move the window, or set "
                    "`allow_empty: true` to turn them into 0."
                )
            log.warning(f"{message}: set to 0.")
        if unclipped:
            log.warning(
                f"feature(s) {unclipped} have a median absolute deviation of 0 (more "
                "than half of their values are equal); left unclipped."
            )
        self.columns_ = labels
        self.median_, self.mad_, self.mean_, self.std_ = stats

    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        """Apply the frozen statistics and return a new frame."""
        if self.columns_ is None:
            raise ValueError("RobustClipZScore is not fitted; call `fit` first.")
        positions = group_positions(df, self.fields_group)
        labels = list(df.columns[positions])
        absent = [c for c in self.columns_ if c not in labels]
        extra = [c for c in labels if c not in self.columns_]
        if absent or extra:
            raise ValueError(
                f"columns differ from the fitted ones: missing {absent}, new {extra}."
            )
        which = {c: j for j, c in enumerate(self.columns_)}

        def columns():
            for at, label in zip(positions, labels, strict=True):
                yield at, self._apply(finite_column(df, at), which[label])

        return replace_columns(df, columns())

    def _apply(self, x: np.ndarray, j: int) -> np.ndarray:
        if self.std_[j] > 0:
            reach = self.n_mad * self.mad_[j]
            np.clip(x, self.median_[j] - reach, self.median_[j] + reach, out=x)
            x -= x.dtype.type(self.mean_[j])
            x /= x.dtype.type(self.std_[j])
        else:
            x[np.isfinite(x)] = 0.0
        if self.fill:
            x[np.isnan(x)] = 0.0
        return x


class FitScale(FrameProcessor):
    """Divide columns by their root mean square over a fit window, zero staying zero.

    Nothing is subtracted, so the sign of a return survives: for labels of one or a few
    instruments, which have no cross-section to be standardised over. Each column pools
    all finite values of the window, over instruments and days. NaN stays NaN.

    Parameters
    ----------
    fit_start_time, fit_end_time : str or date
        Fit window, both ends included. Required; handlers that call Qlib's
        `check_transform_proc` pass them in.
    fields_group : str or list of str, default "label"
        Group(s) to transform; other columns pass through unchanged.

    Attributes
    ----------
    scale_ : dict
        Column label to its root mean square.

    Raises
    ------
    ValueError
        If the window is missing, reversed or without data, or a column has no value
        but 0 in it.
    """

    def __init__(
        self,
        fit_start_time: Day | None = None,
        fit_end_time: Day | None = None,
        fields_group: Names | None = "label",
    ):
        self.scale_: dict[Any, float] = {}
        _fit_window(self)

    def fit(self, df: pd.DataFrame | None = None) -> None:
        """Learn the scale of every column on the fit window."""
        inside, start, end = _fit_rows(self, df)
        assert df is not None
        for at in group_positions(df, self.fields_group):
            x = column_values(df, at)[inside].astype(np.float64)
            scale = np.sqrt(np.mean(np.square(x[np.isfinite(x)]))) if len(x) else 0.0
            if not scale > 0:
                raise ValueError(
                    f"column {df.columns[at]} has no value other than 0 in the fit "
                    f"window {start.date()} to {end.date()}; move the window."
                )
            self.scale_[df.columns[at]] = float(scale)

    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        """Return a new frame with the group's columns divided."""

        def columns():
            for at in group_positions(df, self.fields_group):
                x = finite_column(df, at)
                yield at, x / x.dtype.type(self.scale_[df.columns[at]])

        return replace_columns(df, columns())


def _fit_window(processor: Any) -> tuple[pd.Timestamp, pd.Timestamp]:
    """Fit window of a learned processor."""
    for name in ("fit_start_time", "fit_end_time"):
        if getattr(processor, name) is None:
            raise ValueError(
                f"`{name}` is None: the statistics would be fitted on the test "
                "period too; give the training window."
            )
    start = pd.Timestamp(processor.fit_start_time)
    end = pd.Timestamp(processor.fit_end_time)
    if start > end:
        raise ValueError(
            f"`fit_start_time` {start.date()} is after `fit_end_time` {end.date()}."
        )
    return start, end


def _fit_rows(
    processor: Any, df: pd.DataFrame | None
) -> tuple[np.ndarray, pd.Timestamp, pd.Timestamp]:
    """Mask of the rows inside the fit window, and the window."""
    if df is None:
        raise ValueError("`df` is None; pass the frame to fit on.")
    start, end = _fit_window(processor)
    dates = df.index.get_level_values("datetime")
    inside = np.asarray((dates >= start) & (dates <= end))
    if not inside.any():
        span = f"{dates.min().date()} to {dates.max().date()}" if len(df) else "empty"
        raise ValueError(
            f"fit window {start.date()} to {end.date()} holds no rows; the data "
            f"are {span}. Move `fit_start_time`/`fit_end_time` into them."
        )
    return inside, start, end


class CSZScore(FrameProcessor):
    """Standardise columns over each day's cross-section.

    Subtracts the day's mean and divides by its population standard deviation (the
    day's stocks are the whole population, ddof 0). Pools one day only, keeps no state.
    NaN and infinite values take no part and stay NaN. A day with one known value, or
    with equal ones, has no spread: its known values become 0.

    Parameters
    ----------
    fields_group : str or list of str, default "label"
        Group(s) to transform; other columns pass through unchanged.
    """

    def __init__(self, fields_group: Names | None = "label"):
        pass

    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        """Return a new frame with the group's columns standardised per day."""
        positions = group_positions(df, self.fields_group)
        code, size = day_codes(df.index)

        def columns():
            for at in positions:
                x = finite_column(df, at).astype(np.float64, copy=False)
                yield at, standardize_days(x, code, size)

        return replace_columns(df, columns(), share=2 * len(positions) < df.shape[1])


class CSNeutralize(FrameProcessor):
    """Replace columns by their daily residual on industries and styles.

    One least squares per day of each column on industry dummies and style exposures
    (see `neutralize`). Pools one day only and keeps no state. Meant as a learn
    processor on the label group: the raw label stays in the handler's raw frame, so
    records still score against raw returns.

    Parameters
    ----------
    fields_group : str or list of str, default "label"
        Group(s) to neutralise; other columns pass through unchanged.
    risk_group : str, default "risk"
        Group that holds the regressors.
    industry : str or None, default "industry"
        Column of industry codes within `risk_group`; None: only an intercept.
    styles : list of str or "all", default ("log_mcap",)
        Columns within `risk_group`; "all" means all but the industry, and without
        `log_mcap` where the standardised `size` is present. An empty list: industries
        only.
    weights : {None, "sqrt_mcap", "mcap"}, default None
        Regression weights from the group's `log_mcap`. None: ordinary least squares.
    missing : {"drop", "unknown"}, default "drop"
        What becomes of a stock with unknown industry, style or weight: "drop" leaves it
        out and gives NaN, "unknown" gives it a group (or indicator) of its own. Never a
        silent zero; more than 5 % dropped is warned about.

    Raises
    ------
    ValueError
        If a group or column is absent, or a choice is not known.
    """

    def __init__(
        self,
        fields_group: Names | None = "label",
        risk_group: Text = "risk",
        industry: Text | None = "industry",
        styles: Names | None = ("log_mcap",),
        weights: Literal["sqrt_mcap", "mcap"] | None = None,
        missing: Literal["drop", "unknown"] = "drop",
    ):
        if isinstance(styles, str) and styles != "all":
            styles = [styles]
        self.styles = styles if isinstance(styles, str) else list(styles or ())

    def _risk_positions(self, df: pd.DataFrame) -> dict[str, int]:
        names = df.columns.get_level_values(-1)
        at = {str(names[i]): int(i) for i in group_positions(df, self.risk_group)}
        wanted = [self.industry] if self.industry is not None else []
        wanted += self.styles if self.styles != "all" else []
        wanted += ["log_mcap"] if self.weights else []
        for name in wanted:
            if name not in at:
                raise ValueError(
                    f"group {self.risk_group!r} has no column {name!r} (it has "
                    f"{sorted(at)}): the store lacks its fields. Change `styles`, "
                    "`industry` or `weights`, or add the data."
                )
        return at

    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        """Return a new frame with the group's columns neutralised per day."""
        at = self._risk_positions(df)
        if self.styles == "all":
            skip = {self.industry} | ({"log_mcap"} if "size" in at else set())
            styles = [name for name in at if name not in skip]
        else:
            styles = list(self.styles)
        positions = group_positions(df, self.fields_group)

        def column(i):
            return column_values(df, i)

        targets = [column(i) for i in positions]
        exposures = [column(at[name]) for name in styles]
        codes = None if self.industry is None else column(at[self.industry])
        mcap = column(at["log_mcap"]) if self.weights else None
        out = np.full((len(df), len(positions)), np.nan, order="F")
        width = len(targets) + 2 * len(exposures) + 4
        for rows, place, shape in day_blocks(df.index, BLOCK_BYTES // (8 * width)):

            def pad(x, rows=rows, place=place, shape=shape):
                block = np.full(shape, np.nan)
                block[place] = x[rows]
                return block

            weight = None
            if mcap is not None:
                weight = pad(mcap) * (0.5 if self.weights == "sqrt_mcap" else 1.0)
                # Only ratios within a day matter; relative to the largest, no overflow.
                top = np.fmax.reduce(weight, axis=1, initial=-np.inf, keepdims=True)
                weight = np.exp(weight - np.where(np.isfinite(top), top, 0.0))
            residual = neutralize(
                np.stack([pad(x) for x in targets], axis=2),
                None if codes is None else pad(codes),
                np.stack([pad(x) for x in exposures], axis=2) if exposures else None,
                weight,
                self.missing,
            )
            out[rows] = residual[place]
        known = sum(int(np.isfinite(x).sum()) for x in targets)
        lost = known - int(np.isfinite(out).sum())
        if lost > 0.05 * known:
            get_module_logger(type(self).__name__).warning(
                f"{lost} of {known} values ({lost / known:.1%}) of "
                f"{self.fields_group!r} have no industry, style or weight (styles "
                f"{styles}) and become NaN; "
                "`missing: unknown` would keep them."
            )
        columns = ((i, out[:, j]) for j, i in enumerate(positions))
        return replace_columns(df, columns, share=2 * len(positions) < df.shape[1])
