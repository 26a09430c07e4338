"""Processors of Qlib frames: suspended rows, clipping, daily neutralisation.

Two kinds live here. Learned ones (`RobustClipZScore`) estimate their statistics on a
fit window and freeze them. Cross-sectional ones (`CSNeutralize`, `CSZScore`) pool one
day only and keep no state. All of them return a new frame, leave the caller's frame
untouched, keep float32 as float32, treat infinities as missing, and pickle.

Glossary
--------
t : days
n : instruments of a day (padded)
c : target columns
k : style regressors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from qlib.data.dataset.processor import Processor
from qlib.log import get_module_logger

from data_handlers.arguments import check_number

__all__ = [
    "AddRisk",
    "CSNeutralize",
    "CSZScore",
    "DropSuspended",
    "RobustClipZScore",
    "neutralize",
]

# Relative norm below which a regressor carries nothing beyond the industry means, and
# relative eigenvalue below which a direction counts as collinear (the square of a
# singular value ratio of 1e-6: finer structure than that is float32 rounding).
NORM_RTOL = 1e-8
EIGEN_RTOL = 1e-12
# A residual or spread this small beside the day's largest value is rounding, not data.
ROUNDING_RTOL = 1e-12
# Bytes of float64 work per block of days.
BLOCK_BYTES = 48 * 2**20


# --------------------------------------------------------------------- frame helpers
def group_positions(df: pd.DataFrame, fields_group: str | list[str] | None):
    """Return integer positions of the columns of one or more groups.

    Parameters
    ----------
    df : DataFrame
        Frame with (group, name) columns, or flat columns if `fields_group` is None.
    fields_group : str, list of str or None
        Group(s) to look up; None means every column.

    Returns
    -------
    ndarray of int
        Positions in frame order.

    Raises
    ------
    ValueError
        If a group is absent.
    """
    if fields_group is None:
        return np.arange(df.shape[1])
    groups = [fields_group] if isinstance(fields_group, str) else list(fields_group)
    if not isinstance(df.columns, pd.MultiIndex):
        raise ValueError(
            f"`fields_group` is {fields_group!r} but the frame's columns have no group "
            "level; load them as a dict of groups or pass `fields_group=None`."
        )
    level = df.columns.get_level_values(0)
    absent = [g for g in groups if g not in level]
    if absent:
        raise ValueError(
            f"`fields_group`: no column group {absent[0]!r}; the frame has "
            f"{sorted(map(str, set(level)))}."
        )
    return np.flatnonzero(level.isin(groups))


def day_codes(index: pd.Index) -> tuple[np.ndarray, int]:
    """Return each row's integer day (chronological) and the number of codes."""
    if not isinstance(index, pd.MultiIndex) or "datetime" not in index.names:
        raise ValueError(
            "the frame's index needs a 'datetime' level, got levels "
            f"{list(index.names)}."
        )
    number = index.names.index("datetime")
    codes: np.ndarray = np.asarray(index.codes[number])
    levels = index.levels[number]
    if len(codes) and codes.min() < 0:
        raise ValueError("the frame's 'datetime' level holds NaT; drop those rows.")
    if not levels.is_monotonic_increasing:
        codes, levels = pd.factorize(index.get_level_values(number), sort=True)
    return codes, len(levels)


def replace_columns(
    df: pd.DataFrame,
    columns: Iterator[tuple[int, np.ndarray]],
    dtype=None,
    share: bool = False,
) -> pd.DataFrame:
    """Return a new frame in which some columns are replaced, at one copy's cost.

    Parameters
    ----------
    df : DataFrame
        Source; not written to.
    columns : iterator of (position, array)
        New values, consumed one at a time so that only one column is in flight.
    dtype : dtype, optional
        Type of the replaced columns; default: their own type.
    share : bool, default False
        The other columns are those of `df`, not copies; for when few are replaced.
    """
    kinds = set(df.dtypes)
    if not share and len(kinds) == 1 and (dtype is None or np.dtype(dtype) in kinds):
        # Column-major, so that pandas takes it as one block without another copy.
        values = np.empty(df.shape, dtype=kinds.pop(), order="F")
        done = np.zeros(df.shape[1], bool)
        for at, column in columns:
            values[:, at] = column
            done[at] = True
        for rest in np.flatnonzero(~done):
            values[:, rest] = column_values(df, int(rest))
        return pd.DataFrame(values, index=df.index, columns=df.columns, copy=False)
    out = df.copy(deep=False)
    for place, column in columns:
        out.isetitem(place, column.astype(dtype or df.dtypes.iloc[place], copy=False))
    return out


def column_values(df: pd.DataFrame, at: int) -> np.ndarray:
    """Return one column as an array, without a copy where pandas allows it."""
    return np.asarray(df.iloc[:, int(at)])


def finite_column(df: pd.DataFrame, at: int) -> np.ndarray:
    """Return one column as a fresh floating array with infinities turned into NaN."""
    x = column_values(df, at)
    x = x.astype(x.dtype if x.dtype.kind == "f" else np.float32, copy=True)
    x[~np.isfinite(x)] = np.nan
    return x


# ------------------------------------------------------------------------ the kernel
def neutralize(
    y: np.ndarray,
    industry: np.ndarray | None = None,
    styles: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    missing: str = "drop",
) -> np.ndarray:
    """Take the residual of daily regressions on industry dummies and styles.

    One weighted least squares per day, batched over days: industries are projected out
    by weighted group means (Frisch-Waugh-Lovell), the styles by k x k normal equations
    whose pseudo-inverse drops collinear directions. Pools one day only.

    Parameters
    ----------
    y : ndarray [t, n, c]
        Targets. NaN or infinite: not in the regression, NaN in the result.
    industry : ndarray [t, n], optional
        Numeric code of each instrument's industry, NaN unknown. None: one intercept.
    styles : ndarray [t, n, k], optional
        Regressors beside the industries, NaN unknown.
    weights : ndarray [t, n], optional
        Non-negative regression weights; zero or NaN counts as missing. None: OLS.
    missing : {"drop", "unknown"}, default "drop"
        "drop": an instrument with an unknown industry, style or weight takes no part
        and gets NaN. "unknown": unknown industries form a group of their own, each
        style's unknown values get an indicator regressor, unknown weights take the
        day's median weight; nothing is dropped.

    Returns
    -------
    ndarray [t, n, c]
        Residuals in the type of `y` (float64 inside). They are unweighted residuals at
        the weighted coefficients. An instrument alone in its industry has residual 0,
        as has every instrument of a day with no more instruments than regressors;
        values that are mere rounding beside the day's targets are set to exactly 0.

    Raises
    ------
    ValueError
        If shapes disagree, a weight is negative or `missing` is not known.

    References
    ----------
    Frisch and Waugh (1933), Econometrica 1(4); Lovell (1963), JASA 58(304).
    """
    y = np.asarray(y)
    if y.ndim != 3:
        raise ValueError(f"`y` must be [days, instruments, columns], got {y.shape}.")
    if y.dtype.kind != "f":
        y = y.astype(np.float64)
    t, n, c = y.shape
    for name, array, rank in (
        ("industry", industry, 2),
        ("styles", styles, 3),
        ("weights", weights, 2),
    ):
        if array is None:
            continue
        shape = np.shape(array)
        if len(shape) != rank or shape[:2] != (t, n):
            raise ValueError(
                f"`{name}` must begin with shape {(t, n)} and have {rank} dimensions "
                f"like `y`, got {shape}."
            )
    if missing not in ("drop", "unknown"):
        raise ValueError(f"`missing` must be 'drop' or 'unknown', got {missing!r}.")
    k = 0 if styles is None else np.shape(styles)[2]
    out = np.empty(y.shape, y.dtype)
    step = max(1, BLOCK_BYTES // (8 * max(1, n) * (2 * k + c + 4)))
    for start in range(0, t, step):
        days = slice(start, min(start + step, t))
        out[days] = _neutralize_block(
            np.asarray(y[days], np.float64),
            None if industry is None else np.asarray(industry[days], np.float64),
            None if styles is None else np.asarray(styles[days]),
            None if weights is None else np.asarray(weights[days], np.float64),
            missing,
        )
    return out


def _neutralize_block(y, industry, styles, weights, missing):
    """Neutralise one block of days; arguments as in `neutralize`."""
    b, n, c = y.shape
    row = np.ones((b, n), bool)
    code = np.zeros((b, n), np.int64)
    groups = 1
    if industry is not None:
        known = np.isfinite(industry)
        names, inverse = np.unique(industry[known], return_inverse=True)
        code[known] = inverse
        code[~known] = len(names)
        groups = len(names) + 1
        if missing == "drop":
            row &= known
    group = code + groups * np.arange(b)[:, None]

    x = np.empty((b, 0, n))
    if styles is not None:
        x = np.moveaxis(styles, 2, 1).astype(np.float64)  # [b, k, n]
        unknown = ~np.isfinite(x)
        if missing == "drop":
            row &= ~unknown.any(1)
        elif (some := unknown.any((0, 2))).any():
            # Beside its indicator any constant fits the unknown values; 0 will do.
            x = np.concatenate([x, unknown[:, some].astype(np.float64)], axis=1)
        x[:, : unknown.shape[1]][unknown] = 0.0

    if weights is not None:
        if (weights < 0).any():
            raise ValueError(
                f"`weights` must not be negative, got {float(np.nanmin(weights))}."
            )
        known = np.isfinite(weights) & (weights > 0)
        if missing == "drop":
            row &= known
        weights = np.where(known, weights, np.nan)
        none = ~known.any(1)
        weights[none] = 1.0
        if missing == "unknown" and not known.all():
            median = np.nanmedian(weights, axis=1, keepdims=True)
            weights = np.where(np.isfinite(weights), weights, median)
        # Any positive factor of a day's weights cancels; this one avoids overflow.
        weights = weights / np.nanmax(weights, axis=1, keepdims=True)

    use = np.isfinite(y) & row[..., None]
    if c == 1 or (use == use[..., :1]).all():
        return group_regression(y, use[..., 0], group, b * groups, x, weights)[0]
    return np.concatenate(
        [
            group_regression(y[..., [j]], use[..., j], group, b * groups, x, weights)[0]
            for j in range(c)
        ],
        axis=2,
    )


def group_regression(
    y: np.ndarray,
    use: np.ndarray,
    group: np.ndarray,
    size: int,
    x: np.ndarray,
    weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Regress on group dummies and x, one day at a time, batched.

    The one least squares of the project: `neutralize` takes its residual, factor
    returns its coefficients.

    Parameters
    ----------
    y : ndarray [b, n, c]
        Targets.
    use : ndarray of bool [b, n]
        Rows of the regression; y, x and weights must be finite there.
    group : ndarray of int [b, n]
        Group of each row, in ``range(size)``; a group lies within one day.
    size : int
        Number of groups over all days.
    x : ndarray [b, k, n]
        Regressors beside the groups.
    weights : ndarray [b, n], optional
        Positive weights; None is OLS.

    Returns
    -------
    residual : ndarray [b, n, c]
        NaN outside `use`.
    beta : ndarray [b, k, c]
        Coefficients of x; of least norm (in standardised units) where collinear.
    kept : ndarray of bool [b, k]
        Whether a regressor varies within the groups; if not, its coefficient is 0.
    """
    w = use.astype(np.float64) if weights is None else np.where(use, weights, 0.0)
    flat, flat_w = group.ravel(), w.ravel()
    total = np.bincount(flat, flat_w, minlength=size)
    total[total == 0] = 1.0

    def centre(z):
        mean = np.bincount(flat, flat_w * z.ravel(), minlength=size) / total
        return np.where(use, z - mean[group], 0.0)

    b, k, _ = x.shape
    target = np.moveaxis(np.where(use[..., None], y, 0.0), 2, 1)  # [b, c, n]
    largest = np.abs(target).max(2, keepdims=True, initial=0.0)
    target = np.stack([centre(target[:, j]) for j in range(target.shape[1])], axis=1)
    beta = np.zeros((b, k, target.shape[1]))
    kept = np.zeros((b, k), bool)
    if k:
        scaled = np.empty(x.shape)
        scale = np.empty((b, k))
        for j in range(k):
            z = np.where(use, x[:, j], 0.0)
            before = np.einsum("bn,bn,bn->b", w, z, z)
            z = centre(z)
            after = np.einsum("bn,bn,bn->b", w, z, z)
            kept[:, j] = after > NORM_RTOL**2 * before
            after[~kept[:, j]] = np.inf
            scale[:, j] = 1.0 / np.sqrt(after)
            scaled[:, j] = z * scale[:, j, None]
        # Rows outside `use` are zero already, so OLS needs no second array.
        weighted = scaled if weights is None else scaled * w[:, None]
        value, vector = np.linalg.eigh(weighted @ np.swapaxes(scaled, 1, 2))
        solid = value > EIGEN_RTOL * k
        inverse = np.where(solid, 1.0 / np.where(solid, value, 1.0), 0.0)
        for _ in range(2):  # the second pass removes the rounding of the first
            moment = weighted @ np.swapaxes(target, 1, 2)  # [b, k, c]
            step = np.swapaxes(vector, 1, 2) @ moment
            step = vector @ (inverse[..., None] * step)
            target = target - np.swapaxes(step, 1, 2) @ scaled
            beta += step * scale[..., None]
    target[np.abs(target) <= ROUNDING_RTOL * largest] = 0.0
    residual = np.where(use[..., None], np.moveaxis(target, 1, 2), np.nan)
    return residual, beta, kept


# ------------------------------------------------------------------------ processors
class DropSuspended(Processor):
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

    by_day = True  # see data_handlers.sharing

    def __init__(self, fields_group="feature", fields=None):
        self.fields_group = fields_group
        self.fields = fields

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

    def readonly(self) -> bool:
        """Return True: the input frame is not written to."""
        return True


class RobustClipZScore(Processor):
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
        fit_start_time=None,
        fit_end_time=None,
        fields_group="feature",
        n_mad=7,
        fill=True,
        allow_empty=False,
        exclude=None,
    ):
        check_number("n_mad", n_mad, 0, exclusive=True)
        self.fit_start_time = fit_start_time
        self.fit_end_time = fit_end_time
        self.fields_group = fields_group
        self.n_mad = n_mad
        self.fill = fill
        self.allow_empty = allow_empty
        self.exclude = list(exclude or ())
        self.columns_ = None
        self._window()

    def _window(self) -> tuple[pd.Timestamp, pd.Timestamp]:
        for name in ("fit_start_time", "fit_end_time"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"`{name}` is None: the statistics would be fitted on the test "
                    "period too; give the training window."
                )
        start, end = pd.Timestamp(self.fit_start_time), pd.Timestamp(self.fit_end_time)
        if start > end:
            raise ValueError(
                f"`fit_start_time` {start.date()} is after `fit_end_time` {end.date()}."
            )
        return start, end

    def fit(self, df: pd.DataFrame | None = None) -> None:
        """Learn the four statistics of every feature on the fit window.

        Parameters
        ----------
        df : DataFrame
            Rows (datetime, instrument); only those inside the window are read.
        """
        if df is None:
            raise ValueError("`df` is None; pass the frame to fit on.")
        start, end = self._window()
        positions = group_positions(df, self.fields_group)
        dates = df.index.get_level_values("datetime")
        inside = np.asarray((dates >= start) & (dates <= end))
        if not inside.any():
            span = (
                f"{dates.min().date()} to {dates.max().date()}" if len(df) else "empty"
            )
            raise ValueError(
                f"fit window {start.date()} to {end.date()} holds no rows; the data "
                f"are {span}. Move `fit_start_time`/`fit_end_time` into them."
            )
        stats = np.zeros((4, len(positions)))
        empty, constant, unclipped = [], [], []
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

    def readonly(self) -> bool:
        """Return True: the input frame is not written to."""
        return True


class CSZScore(Processor):
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

    def __init__(self, fields_group="label"):
        self.fields_group = fields_group

    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        """Return a new frame with the group's columns standardised per day."""
        positions = group_positions(df, self.fields_group)
        code, size = day_codes(df.index)

        def columns():
            for at in positions:
                x = finite_column(df, at).astype(np.float64, copy=False)
                yield at, standardize_days(x, code, size)

        return replace_columns(df, columns(), share=2 * len(positions) < df.shape[1])

    def readonly(self) -> bool:
        """Return True: the input frame is not written to."""
        return True


def standardize_days(x: np.ndarray, code: np.ndarray, size: int) -> np.ndarray:
    """Return x [rows] minus its day's mean, over its day's population std.

    Parameters
    ----------
    x : ndarray of float64
        Values, NaN unknown (kept).
    code : ndarray of int
        Day of each row, in ``range(size)``.
    size : int
        Number of day codes.
    """
    known = np.isfinite(x)
    at, value = code[known], x[known]
    count = np.maximum(np.bincount(at, minlength=size), 1)
    value = value - (np.bincount(at, value, minlength=size) / count)[at]
    # A second subtraction removes the rounding of a mean far from zero.
    value -= (np.bincount(at, value, minlength=size) / count)[at]
    spread = np.sqrt(np.bincount(at, value * value, minlength=size) / count)
    largest = np.zeros(size)
    np.maximum.at(largest, at, np.abs(x[known]))
    flat = spread <= ROUNDING_RTOL * largest
    spread[flat] = 1.0
    out = np.full(len(x), np.nan)
    out[known] = np.where(flat[at], 0.0, value / spread[at])
    return out


class CSNeutralize(Processor):
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
        fields_group="label",
        risk_group="risk",
        industry="industry",
        styles=("log_mcap",),
        weights=None,
        missing="drop",
    ):
        if missing not in ("drop", "unknown"):
            raise ValueError(f"`missing` must be 'drop' or 'unknown', got {missing!r}.")
        if weights not in (None, "sqrt_mcap", "mcap"):
            raise ValueError(
                f"`weights` must be None, 'sqrt_mcap' or 'mcap', got {weights!r}."
            )
        if isinstance(styles, str) and styles != "all":
            styles = [styles]
        self.fields_group = fields_group
        self.risk_group = risk_group
        self.industry = industry
        self.styles = styles if isinstance(styles, str) else list(styles or ())
        self.weights = weights
        self.missing = missing

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

    def readonly(self) -> bool:
        """Return True: the input frame is not written to."""
        return True


def day_blocks(index: pd.Index, cells: int):
    """Yield blocks of whole days as padded panels.

    Position within a padded day is arbitrary; callers must not depend on it.

    Parameters
    ----------
    index : MultiIndex
        Rows with a "datetime" level, in any order.
    cells : int
        Aim for this many padded cells a block (at least one day).

    Yields
    ------
    rows : ndarray of int or slice
        Row numbers of the block.
    place : tuple of ndarray
        Their (day, slot) in the padded panel.
    shape : tuple of int
        Shape of the padded panel.
    """
    code, size = day_codes(index)
    in_order = bool((np.diff(code) >= 0).all())
    order = None if in_order else np.argsort(code, kind="stable")
    counts = np.bincount(code, minlength=size)
    counts = counts[counts > 0]
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        last, widest = first, 0
        while last < len(counts):
            widest = max(widest, int(counts[last]))
            if last > first and widest * (last - first + 1) > cells:
                break
            last += 1
        inside = counts[first:last]
        start, stop = int(ends[first] - counts[first]), int(ends[last - 1])
        day = np.repeat(np.arange(len(inside)), inside)
        slot = np.arange(stop - start) - np.repeat(np.cumsum(inside) - inside, inside)
        rows = slice(start, stop) if order is None else order[start:stop]
        yield rows, (day, slot), (len(inside), int(inside.max()))
        first = last


class AddRisk(Processor):
    """Append a "risk" group (and optionally a label) to frames that lack one.

    Qlib's own handlers (Alpha158, Alpha360) load features and a label only. This
    processor loads Qlib expressions for exactly the instruments and dates in the
    frame, so that `CSNeutralize` can work on them. The frame's index and columns stay;
    expressions look at the past only (label expressions apart). Keeps no state.

    Parameters
    ----------
    risk : mapping of str to str, list of str or "auto", default "auto"
        Name to expression; a list names styles of `data_handlers.risk.risk_config`;
        "auto" takes all that the store allows. None adds no risk group.
    label : mapping of str to str, optional
        Name to expression of a "label" group to append. It must not exist yet.
    freq : str, default "day"
        Qlib frequency of the expressions.

    Raises
    ------
    ValueError
        If a group exists already, or none of its expressions gives a value (single
        empty columns are warned about and stay NaN).
    """

    def __init__(self, risk="auto", label=None, freq="day"):
        if isinstance(risk, str) and risk != "auto":
            raise ValueError(
                f"`risk` must be 'auto', a list of styles or a mapping of names to "
                f"expressions, got {risk!r}."
            )
        if label is not None and not isinstance(label, Mapping):
            raise ValueError(
                f"`label` must map names to expressions, got {type(label).__name__}."
            )
        self.risk = risk
        self.label = label
        self.freq = freq

    def _groups(self) -> dict[str, Mapping[str, str]]:
        groups: dict[str, Mapping[str, str]] = {}
        if isinstance(self.risk, Mapping):
            groups["risk"] = self.risk
        elif self.risk is not None:
            from data_handlers.risk import risk_config

            expressions, names = risk_config(styles=self.risk)
            groups["risk"] = dict(zip(names, expressions, strict=True))
        if self.label:
            groups["label"] = self.label
        return groups

    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        """Return a new frame with the groups appended."""
        if not isinstance(df.columns, pd.MultiIndex):
            raise ValueError("AddRisk needs columns of (group, name).")
        groups = self._groups()
        have = set(df.columns.get_level_values(0))
        for group in groups:
            if group in have:
                raise ValueError(f"the frame has a group {group!r} already.")
        day_codes(df.index)  # raises if there is no datetime level
        frames = [df]
        for group, fields in groups.items():
            loaded = self._load(df, list(fields.values()))
            loaded.columns = pd.MultiIndex.from_tuples(
                [(group, name) for name in fields], names=df.columns.names
            )
            blank = loaded.isna().all().to_numpy()
            empty = {
                name: fields[name] for name, b in zip(fields, blank, strict=True) if b
            }
            if len(df) and empty:
                message = (
                    f"group {group!r}: no value for the frame's instruments and dates "
                    f"from {empty}; does the store hold these fields?"
                )
                if len(empty) == len(fields):
                    raise ValueError(message)
                get_module_logger(type(self).__name__).warning(message)
            frames.append(loaded)
        return pd.concat(frames, axis=1)

    def _load(self, df: pd.DataFrame, expressions: Sequence[str]) -> pd.DataFrame:
        from qlib.data import D

        if not len(df):
            return pd.DataFrame(
                np.empty((0, len(expressions)), np.float32), index=df.index
            )
        dates = df.index.get_level_values("datetime")
        names = df.index.get_level_values("instrument").unique().tolist()
        loaded = D.features(
            names, list(expressions), dates.min(), dates.max(), freq=self.freq
        )
        return loaded.reorder_levels(df.index.names).reindex(df.index)

    def readonly(self) -> bool:
        """Return True: the input frame is not written to."""
        return True
