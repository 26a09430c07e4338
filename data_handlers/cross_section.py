"""One day's cross-section: groups, standardisation, least squares, neutralisation.

What processors, factor returns, metrics and the report share. Everything pools one day
only, so no later value can enter.

Glossary
--------
t, b : days, of a block
n : instruments of a day (padded)
c : target columns
k : regressors beside the groups
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pandas as pd

from data_handlers.arguments import checked

__all__ = [
    "cap_standardize",
    "clip_days",
    "column_values",
    "day_blocks",
    "day_codes",
    "finite_column",
    "group_positions",
    "group_regression",
    "neutralize",
    "replace_columns",
    "standardize_days",
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
    # `np.asarray` asks a Series for attributes, and pandas for days of such names.
    return df.iloc[:, int(at)].to_numpy()


def finite_column(df: pd.DataFrame, at: int) -> np.ndarray:
    """Return one column as a fresh floating array with infinities turned into NaN."""
    x = column_values(df, at)
    x = x.astype(x.dtype if x.dtype.kind == "f" else np.float32, copy=True)
    x[~np.isfinite(x)] = np.nan
    return x


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


# ------------------------------------------------------------------ standardisation
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


def clip_days(x: np.ndarray, n_mad: float) -> np.ndarray:
    """Clip each row of x [t, n] to its median ± `n_mad` median absolute deviations.

    A row whose median absolute deviation is 0 stays as it is. NaN stays NaN.
    """
    middle = _row_median(x)[:, None]
    reach = n_mad * _row_median(np.abs(x - middle))[:, None]
    reach = np.where(reach > 0, reach, np.inf)
    return np.clip(x, middle - reach, middle + reach)


def _row_median(x: np.ndarray) -> np.ndarray:
    s = np.sort(x, axis=1)  # NaN last
    count = np.isfinite(x).sum(1)
    row = np.arange(len(x))
    low = s[row, np.maximum(count - 1, 0) // 2]
    high = s[row, np.minimum(count // 2, x.shape[1] - 1)]
    return np.where(count > 0, (low + high) / 2, np.nan)


def cap_standardize(x: np.ndarray, cap: np.ndarray | None) -> np.ndarray:
    """Shift each row of x [t, n] to cap-weighted mean 0 and scale it to std 1.

    Parameters
    ----------
    x : ndarray [t, n]
        NaN unknown, kept.
    cap : ndarray [t, n], optional
        Market caps; a stock of unknown cap does not count in the mean. None, or a day
        without any: equal weights.

    Returns
    -------
    ndarray [t, n]
        The standard deviation is equal-weighted, about the plain mean, ddof 0. A day
        with one value or equal ones gives 0.
    """
    known = np.isfinite(x)
    count = np.maximum(known.sum(1, keepdims=True), 1)
    value = np.where(known, x, 0.0)
    plain = value.sum(1, keepdims=True) / count
    deviation = np.where(known, x - plain, 0.0)
    spread = np.sqrt((deviation**2).sum(1, keepdims=True) / count)
    if cap is None:
        weight = known.astype(np.float64)
    else:
        weight = np.where(known & np.isfinite(cap), cap, 0.0)
        weight = np.where(weight.sum(1, keepdims=True) > 0, weight, known)
    total = weight.sum(1, keepdims=True)
    centre = (weight * deviation).sum(1, keepdims=True) / np.where(total > 0, total, 1)
    flat = spread <= ROUNDING_RTOL * np.abs(value).max(1, keepdims=True, initial=0.0)
    out = np.where(flat, 0.0, (deviation - centre) / np.where(flat, 1.0, spread))
    return np.where(known, out, np.nan)


# -------------------------------------------------------------------- least squares
@checked
def neutralize(
    y: np.ndarray,
    industry: np.ndarray | None = None,
    styles: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    missing: Literal["drop", "unknown"] = "drop",
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
