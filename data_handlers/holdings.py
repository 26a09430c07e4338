"""Attributes of stocks in fund managers' eyes, and how much the market likes them now.

Who holds what says what a stock is like: funds of one taste hold the same stocks. The
matrix of fund holdings is factorised, and a stock's factors are its attributes; the
stocks that rise most show which attributes the market prefers. Minsheng Securities,
DL_EM_Dynamic (2025-08); docs/systems/adaptive.md.

    W ~ m + b_fund + c_stock + P Q'        penalty (|P|^2 + |Q|^2), rank 32
    preference of day t = mean over days t-19..t of the mean Q of the day's best 1 %
    similarity of stock i = Q_i . preference

`[gap]` What the report leaves open, decided here:

- Positions that a report does not list count as not held. The matrix is then complete,
  and its factorisation exact: W less its means of rows and columns, by singular values
  shrunk by the penalty (Mazumder, Hastie and Tibshirani 2010, the lemma on their
  operator S). No starting point, no seed.
- A fund's row is its latest report; a fund that is silent for 400 days is left out.
- Factors are refitted on a day on which half-year or year-end reports of a tenth of the
  funds have become known since the last fit: with lawful days once or twice a
  half-year, with announcement days a few times a season.
- Factors are known up to a rotation. Each fit is turned towards the one before
  (orthogonal Procrustes over the stocks of both), so that an attribute means the same
  to a model before and after a refit. The similarity needs no turning: its preference
  takes the best stocks of the past days with the attributes of today.
- The best 1 %, at least 10, are taken among the universe's stocks that traded and have
  attributes, by the day's return.

Everything of day t is made of reports announced, and closes, up to t.

Glossary: t days, n stocks, m funds, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
from annotated_types import Ge, Le
from qlib.log import get_module_logger
from scipy.linalg import orthogonal_procrustes
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import LinearOperator, svds

from data_handlers.arguments import Count, checked
from data_handlers.expression.loading import load_panel
from data_handlers.loaders import expand_store
from data_handlers.traded import DAILY_RETURN
from data_handlers.universe import membership_mask

__all__ = [
    "HOLDINGS",
    "Factors",
    "Fit",
    "factorise",
    "fits_of",
    "fund_attributes",
    "read_holdings",
    "similarity",
]

logger = get_module_logger("data_handlers")

HOLDINGS = "{store}/tables/holdings.parquet"
MAX_AGE = pd.Timedelta(days=400)
REFIT_SHARE = 0.1
#: Sums of a report's weights: short and double rows aside they are at most 1; from the
#: second on they are in percent. Under the third a median report holds hardly a stock.
MOST_HELD, IN_PERCENT, LEAST_HELD = 1.5, 20.0, 0.01
FEW_REPORTS = 0.05
BEST, LEAST_BEST = 0.01, 10
_COLUMNS = ("fund", "period_end", "announced", "instrument", "weight")


@dataclass(frozen=True)
class Factors:
    """A factorised matrix of holdings.

    Attributes
    ----------
    funds : float64 ndarray [m, r]
    stocks : float64 ndarray [n, r]
    fund_bias, stock_bias : float64 ndarray [m], [n]
    mean : float
    """

    funds: np.ndarray
    stocks: np.ndarray
    fund_bias: np.ndarray
    stock_bias: np.ndarray
    mean: float


@checked
def factorise(
    weights: Any, rank: Count = 32, penalty: Annotated[float, Ge(0), Le(1)] = 0.02
) -> Factors:
    """Factorise a matrix of holdings.

    Parameters
    ----------
    weights : ndarray or sparse matrix [m, n]
        Weight of a stock in a fund, 0 not held.
    rank : int, default 32
        Columns beyond what the matrix allows are 0.
    penalty : float, default 0.02
        L2 penalty on both factors, as a share of the largest singular value.

    Returns
    -------
    Factors
        The minimum of the squared error and the penalty. A factor's sign is that of its
        largest entry among the stocks.
    """
    w = csr_matrix(weights, dtype=np.float64)
    m, n = w.shape
    mean = w.sum() / (m * n)
    row = np.asarray(w.mean(axis=1)).ravel() - mean
    column = np.asarray(w.mean(axis=0)).ravel() - mean

    def times(x):  # the matrix less its means, without making it dense
        x = x.ravel()
        return w @ x - (mean + row) * x.sum() - column @ x

    def back(y):
        y = y.ravel()
        return w.T @ y - (mean + column) * y.sum() - row @ y

    k = min(rank, min(m, n) - 1)
    p, q = np.zeros((m, rank)), np.zeros((n, rank))
    if k > 0:
        less = LinearOperator((m, n), times, back, dtype=np.float64)
        # A start of our own: ARPACK's random one would give other last digits each time
        u, s, v = svds(less, k, v0=np.linspace(1.0, 2.0, min(m, n)))
        u, s, v = u[:, ::-1], s[::-1], v[::-1].T
        size = np.sqrt(np.maximum(s - penalty * s[0], 0.0))
        sign = np.sign(v[np.abs(v).argmax(axis=0), np.arange(k)])
        p[:, :k], q[:, :k] = u * (sign * size), v * (sign * size)
    return Factors(p, q, row, column, float(mean))


def read_holdings(path: str = HOLDINGS) -> pd.DataFrame:
    """Read a table of fund holdings, as `qlib-ext ingest` writes it.

    Raises
    ------
    ValueError
        If there is no such table, it lacks a column, a report is said to be known by
        the end of its own period, or weights are no fractions.
    """
    file = expand_store(str(path))
    try:
        table = pd.read_parquet(file)
    except FileNotFoundError:
        raise ValueError(
            f"`path`: there are no fund holdings at {file}; ingest a source of kind "
            "holdings, or make a market with `--funds 200`."
        ) from None
    missing = [name for name in _COLUMNS if name not in table]
    if missing:
        raise ValueError(
            f"`path`: {file} has no column {missing[0]!r}; fund holdings need "
            f"{list(_COLUMNS)}, `announced` being the day on which a report was public."
        )
    for name in ("period_end", "announced"):
        if table[name].dtype.kind != "M" or table[name].isna().any():
            raise ValueError(f"`path`: {file} has no date in `{name}` of every row.")
    early = table["announced"] <= table["period_end"]
    if early.any():
        first = table[early].iloc[0]
        raise ValueError(
            f"`path`: {file} has {int(early.sum())} row(s) announced by the end of "
            f"their period, first fund {first['fund']} on "
            f"{first['announced']:%Y-%m-%d}: a report date is no announcement; take "
            "the day on which the report was public."
        )
    problem = ""
    if table.empty:
        problem = "no row"
    elif not table["instrument"].map(lambda x: isinstance(x, str)).all():
        problem = "codes in `instrument` that are no text such as SH600000"
    elif (again := table.duplicated(list(_COLUMNS[:4]))).any():
        first = table[again].iloc[0]
        problem = (
            f"{int(again.sum())} row(s) of a fund, report and stock given before, "
            f"first fund {first['fund']}, {first['instrument']}"
        )
    problem = problem or _odd_weights(table)
    if problem:
        raise ValueError(f"`path`: {file} has {problem}.")
    return table


def _odd_weights(table: pd.DataFrame) -> str:
    """Say that weights can't be fractions of a fund's net assets, or nothing.

    Parameters
    ----------
    table : DataFrame
        ``fund``, ``period_end``, ``announced``, ``weight``.
    """
    weight = pd.to_numeric(table["weight"], errors="coerce")
    bad = ~((weight > 0) & np.isfinite(weight))
    if bad.any():
        first = table[bad].iloc[0]
        return (
            f"{int(bad.sum())} `weight` that is no number above 0, first of fund "
            f"{first['fund']}: {first['weight']!r}; leave out what is not held"
        )
    keys = [table[name] for name in _COLUMNS[:3]]
    held = weight.groupby(keys).sum()
    over = held > MOST_HELD
    if over.mean() > FEW_REPORTS or (held > IN_PERCENT).any():
        fund, period, _ = held.index.tolist()[int(held.to_numpy().argmax())]
        return (
            f"{int(over.sum())} of {len(held)} reports whose weights sum to more "
            f"than {MOST_HELD:g}, as fund {fund} of {period:%Y-%m-%d} with "
            f"{held.max():.4g}: in percent? Fractions of net assets are needed "
            "(`units: {weight: percent}` in a mapping, or divide by 100)"
        )
    if held.median() < LEAST_HELD:
        return (
            f"weights that sum to {held.median():.2g} in the median report, under "
            f"{LEAST_HELD:.0%} of net assets: fractions taken for percent?"
        )
    return ""


@dataclass(frozen=True)
class Fit:
    """Attributes that hold from a day on.

    Attributes
    ----------
    day : Timestamp
    attributes : DataFrame [n, r]
        Rows the stocks that some fund holds.
    funds : int
    """

    day: pd.Timestamp
    attributes: pd.DataFrame
    funds: int


@checked
def fits_of(
    table: pd.DataFrame,
    dates: pd.DatetimeIndex,
    rank: Count = 32,
    penalty: Annotated[float, Ge(0), Le(1)] = 0.02,
    min_funds: Count = 10,
) -> list[Fit]:
    """Factorise the holdings on every day of a refit.

    Parameters
    ----------
    table : DataFrame
        As `read_holdings` gives it.
    dates : DatetimeIndex
        Trading days, from before the first announcement on.
    rank, penalty
        See `factorise`.
    min_funds : int, default 10
        Fewer known funds give no fit.

    Returns
    -------
    list of Fit
        In order of time. Attributes are turned towards the fit before.
    """
    table = table.sort_values(
        ["period_end", "announced", "fund", "instrument"], kind="stable"
    )
    reports = table[["fund", "period_end", "announced"]].drop_duplicates()
    # A report of a holiday is known on the next trading day.
    slot = dates.searchsorted(pd.DatetimeIndex(reports["announced"]))
    half_year = reports["period_end"].dt.month.isin((6, 12)).to_numpy()
    fits: list[Fit] = []
    fresh: set[Any] = set()
    for day in np.unique(slot[half_year & (slot < len(dates))]):
        known = reports[slot <= day]
        known = known[known["period_end"] >= dates[day] - MAX_AGE]
        latest = known.drop_duplicates("fund", keep="last")
        fresh |= set(reports["fund"][half_year & (slot == day)])
        if len(latest) < min_funds or len(fresh) < REFIT_SHARE * len(latest):
            continue
        fresh = set()
        rows = table.merge(latest, on=["fund", "period_end", "announced"])
        fund, funds = pd.factorize(rows["fund"], sort=True)
        stock, stocks = pd.factorize(rows["instrument"], sort=True)
        matrix = csr_matrix(
            (rows["weight"].to_numpy(np.float64), (fund, stock)),
            shape=(len(funds), len(stocks)),
        )
        found = pd.DataFrame(factorise(matrix, rank, penalty).stocks, index=stocks)
        if fits:
            found = _turned(found, fits[-1].attributes)
        fits.append(Fit(dates[day], found, len(funds)))
    return fits


def _turned(new: pd.DataFrame, old: pd.DataFrame) -> pd.DataFrame:
    """Rotate attributes so that they lie closest to earlier ones of the same stocks."""
    both = new.index.intersection(old.index)
    if both.empty:
        return new
    turn, _ = orthogonal_procrustes(new.loc[both].to_numpy(), old.loc[both].to_numpy())
    return pd.DataFrame(new.to_numpy() @ turn, index=new.index)


def similarity(
    attributes: np.ndarray, returns: np.ndarray, window: int = 20
) -> np.ndarray:
    """Dot product of attributes with the market's preference.

    Parameters
    ----------
    attributes : ndarray [n, r]
        NaN unknown.
    returns : ndarray [window - 1 + t, n]
        Daily returns, NaN where a stock is no member or did not trade.
    window : int, default 20

    Returns
    -------
    float64 ndarray [t, n]
        Row d uses returns up to its own day. NaN for unknown attributes, and on days
        without a single return in the window.
    """
    known: Any = np.isfinite(attributes).all(axis=1)
    ranked = np.where(known, returns, np.nan)
    shares: Any = np.zeros(ranked.shape)
    for day, row in enumerate(ranked):
        can = np.flatnonzero(np.isfinite(row))
        count = min(len(can), max(LEAST_BEST, round(BEST * len(can))))
        if count:
            best = can[np.argsort(-row[can], kind="stable")[:count]]
            shares[day, best] = 1.0 / count
    total = np.cumsum(np.vstack([np.zeros(shares.shape[-1]), shares]), axis=0)
    mean = total[window:] - total[:-window]  # [t, n]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = mean / mean.sum(axis=1, keepdims=True)
    preference = mean[:, known] @ attributes[known]  # [t, r]
    return preference @ attributes.T


@checked
def fund_attributes(
    dates: pd.DatetimeIndex,
    spans: Mapping[str, Sequence[tuple]],
    freq: str = "day",
    path: str = HOLDINGS,
    rank: Count = 32,
    penalty: Annotated[float, Ge(0), Le(1)] = 0.02,
    window: Count = 20,
    min_funds: Count = 10,
    columns: list | None = None,
) -> pd.DataFrame:
    """Load attributes and similarity; a `panel` source of `ParquetDataLoader`.

    Parameters
    ----------
    dates : DatetimeIndex
        Trading days wanted.
    spans : dict
        Members, `{code: [(start, end), ...]}`: the universe of the market's preference.
    freq : str
    path : str
        Table of holdings; ``{store}`` is Qlib's data folder.
    rank, penalty, min_funds
        See `fits_of`.
    window : int, default 20
        Days of the preference.
    columns : list of str, optional
        Which of ``attribute_00`` … and ``similarity`` to give; default all.

    Returns
    -------
    DataFrame
        Rows (datetime, instrument) of all members, float32. NaN before the first fit,
        400 days after the last report's period, and for stocks that no fund held.

    Raises
    ------
    ValueError
        See `read_holdings`; or if there is no fit before the last day.
    """
    from qlib.data import D

    table = read_holdings(path)
    calendar = pd.DatetimeIndex(D.calendar(freq=freq))
    fits = fits_of(table, calendar, rank, penalty, min_funds)
    if not fits or fits[0].day > dates[-1]:
        raise ValueError(
            f"`path`: {path} has no half-year or year-end reports of `min_funds` "
            f"{min_funds} funds that were announced by {dates[-1]:%Y-%m-%d}."
        )
    stocks = pd.Index(sorted(spans))
    returns, h = load_panel([DAILY_RETURN], dates, stocks, window - 1, freq)
    days = pd.DatetimeIndex(calendar[calendar < dates[0]][-h:] if h else []).append(
        dates
    )
    returns = returns[..., 0].astype(np.float64)
    returns[~membership_mask(spans, pd.DatetimeIndex(days), stocks)] = np.nan
    lead = np.full((window - 1 - h, len(stocks)), np.nan)
    returns = np.vstack([lead, returns])
    out = np.full((len(dates), len(stocks), rank + 1), np.nan, np.float32)
    begin = dates.searchsorted(pd.DatetimeIndex([f.day for f in fits]))
    for fit, first, last in zip(fits, begin, [*begin[1:], len(dates)], strict=True):
        last = min(last, dates.searchsorted(fit.day + MAX_AGE))
        if first >= last:
            continue
        q = fit.attributes.reindex(stocks).to_numpy()
        out[first:last, :, :rank] = q
        out[first:last, :, rank] = similarity(
            q, returns[first : last + window - 1], window
        )
    covered = np.isfinite(out[..., 0]).mean()
    logger.info(
        f"fund attributes: {len(fits)} fits, {fits[0].day:%Y-%m-%d} to "
        f"{fits[-1].day:%Y-%m-%d}, the last of {fits[-1].funds} funds and "
        f"{len(fits[-1].attributes)} stocks; {covered:.0%} of stock-days covered"
    )
    names = [*(f"attribute_{k:02d}" for k in range(rank)), "similarity"]
    frame = pd.DataFrame(
        out.reshape(-1, rank + 1),
        index=pd.MultiIndex.from_product(
            [dates, stocks], names=["datetime", "instrument"]
        ),
        columns=names,
    )
    return frame if columns is None else frame[list(columns)]
