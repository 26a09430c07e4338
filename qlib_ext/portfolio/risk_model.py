"""Factor covariance and specific risk of each day, in the layout that Qlib reads.

The model is r = country + industry + styles · exposure + specific, as
`data_handlers.risk.factor_returns` estimates it every day. The covariance of the factor
returns and the variance of the specific returns are exponentially weighted, corrected
for serial correlation (Newey-West) and annualised. The files of day t use data known at
the close of t, nothing later.

Layout of a model's directory::

    meta.json                   parameters, store, units
    factor_returns.parquet      daily, see `factor_returns`
    20200103/                   one directory a day; it appears whole or not at all
        factor_exp.pkl          DataFrame [n, k], unknown exposures as 0
        factor_cov.pkl          DataFrame [k, k], annualised variance
        specific_risk.pkl       Series [n], annualised standard deviation
        exposure.parquet        the same exposures with NaN, specific risk, industry
        factor_cov.parquet
        inputs.sha256           of all that the day was computed from

The pickles are for Qlib's `EnhancedIndexingStrategy` (which squares `specific_risk`
itself and breaks on a one-column CSV); this package reads the Parquet files only.

`[gap]` Decided here:

- Volatilities react faster than correlations (half-lives of 84 and 252 days), as in
  Menchero, Orr and Wang (2011), The Barra US Equity Model (USE4), Methodology Notes.
- A factor (a new industry, say) known for fewer than 63 days takes the median variance
  of the factors of its kind and no correlation.
- A stock with a short history takes the mean specific risk of its size group; the
  others are shrunk towards it.
- On a day of suspension a stock keeps its last exposures, for up to a year.

Glossary: t days, n instruments, k factors, s styles, g industries.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from annotated_types import Ge
from qlib.config import C
from qlib.data import D
from qlib.log import get_module_logger

from data_handlers.arguments import (
    NamedArguments,
    NonNegative,
    Whole,
    check_whole,
    checked,
)
from data_handlers.cross_section import cap_standardize, clip_days
from data_handlers.expression.loading import ExpressionLoader, read_values
from data_handlers.fields import known_fields
from data_handlers.files import write_parquet, write_text
from data_handlers.loaders import read_factors
from data_handlers.panel import scatter
from data_handlers.processors import DropSuspended
from data_handlers.risk import (
    DAILY_RETURN,
    STYLES,
    CSStyleExposure,
    factor_returns,
    risk_config,
)
from data_handlers.universe import instrument_spans, membership_mask, universe
from qlib_ext import metrics

__all__ = [
    "DayRisk",
    "RiskInputs",
    "RiskModel",
    "bias_statistic",
    "bias_table",
    "build_risk_model",
    "load_risk_inputs",
    "newey_west_covariance",
    "newey_west_variance",
    "read_day",
    "signal_days",
]

logger = get_module_logger("qlib_ext.portfolio")

HalfLife = Annotated[float, Ge(1)]
COUNTRY = "country"
INDUSTRY = "industry_"  # prefix of an industry factor's name
SPECIFIC = "specific_risk"
# Not risk factors, but what the `strict` limits also hold near the benchmark.
CHARACTERISTICS: tuple[tuple[str, str, str], ...] = (
    ("roe", "$roe", "roe"),
    ("earnings_surprise", "$earnings_surprise", "earnings_surprise"),
)
# Days for which a suspended stock's exposures count.
_MAX_AGE = 252
_FILES = ("factor_exp.pkl", "factor_cov.pkl", "specific_risk.pkl")
_CHECKSUM = "inputs.sha256"


# ------------------------------------------------------------------------ estimators
def _weights(t: int, half_life: float) -> np.ndarray:
    return 0.5 ** (np.arange(t - 1, -1, -1) / half_life)


def newey_west_covariance(x: np.ndarray, half_life: float, lags: int) -> np.ndarray:
    """Estimate the exponentially weighted long-run covariance of daily series.

    Each row is multiplied by the root of its weight, then the Bartlett-weighted sum of
    autocovariances is taken, so that the result is positive semi-definite whatever the
    data.

    Parameters
    ----------
    x : ndarray [t, k]
        Daily values, oldest first. NaN: unknown; it counts as the column's mean and the
        column is scaled up for the weight it lacks.
    half_life : float
        Days in which a day's weight halves.
    lags : int
        Autocovariances taken in; 0: none.

    Returns
    -------
    ndarray [k, k]
        Per day. NaN in rows and columns without any known value.

    References
    ----------
    Newey and West (1987), Econometrica 55(3).
    """
    x = np.asarray(x, np.float64)
    known = np.isfinite(x)
    w = _weights(len(x), half_life)[:, None]
    total = (w * known).sum(0)
    some = total > 0
    scale = np.where(some, total, 1.0)
    value = np.where(known, x, 0.0)
    centred = np.where(known, value - (w * value).sum(0) / scale, 0.0)
    y = np.sqrt(w) * centred / np.sqrt(scale)
    out = y.T @ y
    for lag in range(1, min(lags, len(x) - 1) + 1):
        cross = y[lag:].T @ y[:-lag]
        out += (1 - lag / (lags + 1)) * (cross + cross.T)
    out[~some] = np.nan
    out[:, ~some] = np.nan
    return out


def newey_west_variance(
    x: np.ndarray, half_life: float, lags: int
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate each column's exponentially weighted long-run variance about zero.

    Parameters
    ----------
    x : ndarray [t, n]
        Daily values, oldest first, NaN unknown.
    half_life : float
        Days in which a day's weight halves.
    lags : int
        Autocovariances taken in.

    Returns
    -------
    variance : ndarray [n]
        Per day; NaN without any known value.
    days : ndarray [n]
        Known days.
    """
    x = np.asarray(x, np.float64)
    known = np.isfinite(x)
    w = _weights(len(x), half_life)[:, None]
    y = np.sqrt(w) * np.where(known, x, 0.0)
    out = (y * y).sum(0)
    for lag in range(1, min(lags, len(x) - 1) + 1):
        out += 2 * (1 - lag / (lags + 1)) * (y[lag:] * y[:-lag]).sum(0)
    total = (w * known).sum(0)
    out = np.maximum(out, 0.0) / np.where(total > 0, total, 1.0)
    return np.where(total > 0, out, np.nan), known.sum(0)


# ---------------------------------------------------------------------------- inputs
@dataclass(frozen=True)
class RiskInputs:
    """Exposures and returns of all days, as panels.

    Attributes
    ----------
    days : DatetimeIndex [t]
        Consecutive trading days.
    instruments : Index [n]
    styles : tuple of str [s]
        Style factors, then the extra ones.
    exposures : ndarray [t, n, s]
        At the close of t, NaN unknown.
    industry : ndarray [t, n]
        Codes at the close of t, NaN unknown.
    mcap : ndarray [t, n] or None
        Market cap at the close of t.
    returns : ndarray [t, n]
        Arithmetic, from the last close before t to that of t; NaN without a trade.
    listed : ndarray of bool [t, n]
        Within the span of the universe.
    characteristics : dict of str to ndarray [t, n]
        Further standardised values that limits may name.
    """

    days: pd.DatetimeIndex
    instruments: pd.Index
    styles: tuple[str, ...]
    exposures: np.ndarray
    industry: np.ndarray
    mcap: np.ndarray | None
    returns: np.ndarray
    listed: np.ndarray
    characteristics: dict[str, np.ndarray]


def _carried(x: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Last values on days without a row, not older than `_MAX_AGE` days."""
    row = np.where(present, np.arange(len(x))[:, None], -1)
    last = np.maximum.accumulate(row, axis=0)
    fresh = (last >= 0) & (np.arange(len(x))[:, None] - last <= _MAX_AGE)
    out = np.take_along_axis(
        x, np.maximum(last, 0)[(...,) + (None,) * (x.ndim - 2)], axis=0
    )
    out[~fresh] = np.nan
    return out


def read_extra(extra: Mapping[str, str | os.PathLike[str]] | None) -> pd.DataFrame:
    """Read further risk factors, such as the learnt one of `qlib_ext.models.Mamba`.

    Parameters
    ----------
    extra : mapping of str to path, optional
        Name to a Parquet file with `datetime`, `instrument` and one column of numbers;
        the value of t must be known at the close of t. `MambaRecord` saves its learnt
        factor so, as ``mamba/risk_factor.parquet``.

    Returns
    -------
    DataFrame
        Rows (datetime, instrument), one column a factor; empty without any.

    Raises
    ------
    ValueError
        If a file is missing or has not exactly one column of numbers, or a name is that
        of another factor.
    """
    found = []
    for name, path in (extra or {}).items():
        if name in (*STYLES, COUNTRY) or name.startswith(INDUSTRY):
            raise ValueError(f"`extra`: {name!r} is a factor already; rename it.")
        if not Path(path).is_file():
            raise ValueError(
                f"`extra`: {name!r} must be an existing Parquet file, got {path}."
            )
        frame = read_factors(Path(path), "extra")
        if frame.shape[1] != 1:
            raise ValueError(
                f"`extra`: {path} must have one column of numbers, it has "
                f"{list(frame.columns)}."
            )
        found.append(frame.iloc[:, 0].rename(name))
    if not found:
        return pd.DataFrame()
    return pd.concat(found, axis=1)


def load_risk_inputs(
    start_time: Any,
    end_time: Any,
    *,
    instruments: Any = "all",
    styles: str | Sequence[str] = "auto",
    extra: Mapping[str, str | os.PathLike[str]] | None = None,
    history: int = 756,
) -> RiskInputs:
    """Read exposures and returns from the Qlib store that is initialised.

    Parameters
    ----------
    start_time, end_time : date
        Days on which a risk model is wanted.
    instruments : str, list or dict, default "all"
        Universe of the factor regressions.
    styles : "auto" or list of str, default "auto"
        As `data_handlers.risk.risk_config` takes them.
    extra : mapping of str to path, optional
        Further risk factors by name, see `read_extra`. They are clipped and
        standardised over the day like the styles.
    history : int, default 756
        Trading days read before `start_time`.

    Raises
    ------
    ValueError
        If the store has no industry, no style, or no data in the range.
    """
    calendar = pd.DatetimeIndex(D.calendar(end_time=end_time))
    if not len(calendar) or calendar[-1] < pd.Timestamp(start_time):
        raise ValueError(
            f"`start_time`, `end_time`: the store has no day from {start_time} to "
            f"{end_time}."
        )
    first = int(calendar.searchsorted(pd.Timestamp(start_time)))
    days = calendar[max(0, first - history) :]
    instruments = universe(instruments)
    expressions, names = risk_config(styles)
    more = known_fields([f for _, _, f in CHARACTERISTICS], instruments)
    wanted = [(name, e) for name, e, field in CHARACTERISTICS if field in more]
    absent = [name for name, _, field in CHARACTERISTICS if field not in more]
    if absent:
        logger.info(f"not in this store, so no limit on them can hold: {absent}.")
    # A group of its own: the style processor drops what it does not know.
    config = {"feature": (["Traded($close)"], ["close"]), "risk": (expressions, names)}
    if wanted:
        config["other"] = ([e for _, e in wanted], [name for name, _ in wanted])
    frame = ExpressionLoader(config=config).load(instruments, days[0], days[-1])
    if frame is None or frame.empty:
        raise ValueError(
            f"`instruments` {instruments!r} has no data from {days[0]:%Y-%m-%d} to "
            f"{days[-1]:%Y-%m-%d}: check the universe, the dates and `provider_uri`."
        )
    frame = CSStyleExposure(styles)(DropSuspended()(frame))
    risk: pd.DataFrame = frame["risk"]  # type: ignore[assignment]
    columns = [s for s in STYLES if s in risk.columns]
    if "industry" not in risk.columns:
        raise ValueError(
            "the risk model needs `$industry` in the store; ingest an industry "
            "classification."
        )
    if not columns:
        raise ValueError(f"`styles` {styles!r}: the store has the input of none.")
    stocks = pd.Index(sorted(risk.index.unique("instrument")), name="instrument")
    present = np.isfinite(scatter(frame[("feature", "close")], days, stocks))
    industry = scatter(risk["industry"], days, stocks)
    mcap = None
    if "log_mcap" in risk.columns:
        mcap = np.exp(scatter(risk["log_mcap"], days, stocks))
    # Where prices are float32, so are exposures; the regression is float64.
    panels = [scatter(risk[s], days, stocks, np.float32) for s in columns]
    others = read_extra(extra)

    def standard(x: np.ndarray) -> np.ndarray:
        x = np.where(present & np.isfinite(x), x, np.nan)
        return cap_standardize(clip_days(x, 5), mcap)

    for name in others.columns:
        values = standard(scatter(others[name].dropna(), days, stocks))
        if not np.isfinite(values).any():
            raise ValueError(
                f"`extra`: {name!r} has no value for the store's stocks from "
                f"{days[0]:%Y-%m-%d} to {days[-1]:%Y-%m-%d}."
            )
        columns.append(name)
        panels.append(values.astype(np.float32))
    characteristics = {
        name: _carried(standard(scatter(frame[("other", name)], days, stocks)), present)
        for name, _ in wanted
    }
    returns = read_values(stocks, [DAILY_RETURN], days[0], days[-1]).iloc[:, 0]
    spans = instrument_spans(instruments, days[0], days[-1])
    return RiskInputs(
        days=days,
        instruments=stocks,
        styles=tuple(columns),
        exposures=_carried(np.stack(panels, axis=2), present),
        industry=_carried(industry, present),
        mcap=None if mcap is None else _carried(mcap, present),
        returns=scatter(returns, days, stocks),
        listed=membership_mask(spans, days, stocks),
        characteristics=characteristics,
    )


def signal_days(days: pd.DatetimeIndex) -> pd.DatetimeIndex:
    """Last trading day of each week among consecutive trading days.

    The last day given ends a week only if it is a Friday: whether more days follow is
    not known yet.
    """
    ends = days[metrics.week_ends(days).numpy()]
    if len(ends) and ends[-1].dayofweek != 4:
        ends = ends[:-1]
    return ends


# ----------------------------------------------------------------------------- model
@dataclass(frozen=True)
class DayRisk:
    """Risk model of one day.

    Attributes
    ----------
    date : Timestamp
    exposures : DataFrame [n, k]
        Country (1), styles and industries (0 or 1); NaN unknown.
    covariance : DataFrame [k, k]
        Annualised covariance of the factors' daily returns.
    specific : Series [n]
        Annualised standard deviation of the specific return.
    characteristics : DataFrame [n, c]
        Standardised values that are no risk factors, NaN unknown.
    """

    date: pd.Timestamp
    exposures: pd.DataFrame
    covariance: pd.DataFrame
    specific: pd.Series
    characteristics: pd.DataFrame


class RiskModel(NamedArguments):
    """Estimate a risk model for any day of the inputs.

    Parameters
    ----------
    inputs : RiskInputs
    volatility_half_life : float, default 84
        Of factor variances, in days.
    correlation_half_life : float, default 252
        Of factor correlations, in days.
    specific_half_life : float, default 84
        Of specific variances, in days.
    lags : int, default 5
        Newey-West lags of variances; correlations use two at most.
    min_days : int, default 63
        Fewest known days for a factor's or stock's own estimate.
    shrinkage : float, default 0.1
        Pull of a stock's specific risk towards that of its size group; the farther away
        it is, the stronger. 0: none.
    window : int, default 756
        Longest history used, in days.

    Attributes
    ----------
    factors : FactorReturns
        Daily factor and specific returns; row t is known at the close of t.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """

    def __init__(
        self,
        inputs: RiskInputs,
        volatility_half_life: HalfLife = 84,
        correlation_half_life: HalfLife = 252,
        specific_half_life: HalfLife = 84,
        lags: Whole = 5,
        min_days: Annotated[int, Ge(2)] = 63,
        shrinkage: NonNegative = 0.1,
        window: int = 756,
    ) -> None:
        check_whole("window", window, min_days)
        self.factors = factor_returns(
            inputs.returns, inputs.exposures, inputs.industry, inputs.mcap
        )
        self.names = [
            COUNTRY,
            *inputs.styles,
            *(f"{INDUSTRY}{code:g}" for code in self.factors.codes),
        ]
        self._returns = np.column_stack(
            [self.factors.country, self.factors.style, self.factors.industry]
        )

    def factor_return_frame(self) -> pd.DataFrame:
        """Daily factor returns, columns by factor, and `r2`."""
        frame = pd.DataFrame(self._returns, self.inputs.days, self.names)
        frame.index.name = "datetime"
        frame["r2"] = self.factors.r2
        return frame

    def factor_covariance(self, row: int) -> np.ndarray:
        """Annualised covariance [k, k] with returns up to and including day `row`.

        NaN for a factor without any variance of its own or its kind's.
        """
        x = self._returns[max(0, row + 1 - self.window) : row + 1]
        slow = newey_west_covariance(x, self.correlation_half_life, min(self.lags, 2))
        fast = newey_west_covariance(x, self.volatility_half_life, self.lags)
        enough = np.isfinite(x).sum(0) >= self.min_days
        variance = np.where(enough, np.diag(fast), np.nan)
        spread = np.sqrt(np.where(enough, np.diag(slow), np.nan))
        good = enough & (spread > 0)
        both = np.outer(np.where(good, spread, 1.0), np.where(good, spread, 1.0))
        correlation = np.where(np.outer(good, good), slow / both, 0.0)
        np.fill_diagonal(correlation, 1.0)
        # A factor with a short history borrows from its kind.
        s = len(self.inputs.styles)
        for part in (slice(0, 1), slice(1, 1 + s), slice(1 + s, None)):
            own = variance[part]
            if np.isfinite(own).any():
                variance[part] = np.where(np.isfinite(own), own, np.nanmedian(own))
        sigma = np.sqrt(variance)
        return metrics.DAYS_PER_YEAR * correlation * np.outer(sigma, sigma)

    def specific_risk(self, row: int) -> np.ndarray:
        """Annualised specific standard deviation [n] of day `row`, NaN if no group."""
        u = self.factors.specific[max(0, row + 1 - self.window) : row + 1]
        variance, days = newey_west_variance(u, self.specific_half_life, self.lags)
        own = np.sqrt(metrics.DAYS_PER_YEAR * variance)
        own[days < self.min_days] = np.nan
        mcap = self.inputs.mcap
        size = np.ones(len(own)) if mcap is None else mcap[row].copy()
        here = self.inputs.listed[row] & np.isfinite(self.inputs.industry[row])
        out = np.full(len(own), np.nan)
        members = np.flatnonzero(here)
        # Five groups by market cap; unknown caps go with the smallest.
        order = members[np.argsort(np.nan_to_num(size[members]), kind="stable")]
        overall = own[members][np.isfinite(own[members])]
        for group in np.array_split(order, 5):
            known = group[np.isfinite(own[group])]
            if len(known):
                cap = np.nan_to_num(size[known])
                weight = cap / cap.sum() if cap.sum() > 0 else None
                mean = float(np.average(own[known], weights=weight))
                spread = float(np.sqrt(((own[known] - mean) ** 2).mean()))
            elif len(overall):
                mean, spread = float(overall.mean()), 0.0
            else:
                continue
            out[group] = mean
            pull = self.shrinkage * np.abs(own[known] - mean)
            pull = pull / np.where(pull + spread > 0, pull + spread, 1.0)
            out[known] = pull * mean + (1 - pull) * own[known]
        return out

    def estimate(self, date: Any) -> DayRisk:
        """Risk model as of the close of a day.

        Raises
        ------
        ValueError
            If the day is not in the inputs or has too little history.
        """
        date = pd.Timestamp(date)
        row = int(self.inputs.days.get_indexer(pd.DatetimeIndex([date]))[0])
        if row < 0:
            raise ValueError(
                f"`date` {date:%Y-%m-%d} is no trading day of the inputs "
                f"({self.inputs.days[0]:%Y-%m-%d} to {self.inputs.days[-1]:%Y-%m-%d})."
            )
        i = self.inputs
        specific = self.specific_risk(row)
        at = np.flatnonzero(i.listed[row] & np.isfinite(i.industry[row]))
        at = at[np.isfinite(specific[at])]
        x = i.exposures[row, at].astype(np.float64)
        dummies = (i.industry[row, at][:, None] == self.factors.codes).astype(float)
        exposures = np.column_stack([np.ones(len(at)), x, dummies])
        covariance = self.factor_covariance(row)
        known = np.isfinite(exposures).any(0) & np.isfinite(np.diag(covariance))
        s = len(i.styles)
        known[1 + s :] &= dummies.any(0)
        if not len(at) or not known[0] or not known[1 : 1 + s].any():
            raise ValueError(
                f"{date:%Y-%m-%d} has fewer than `min_days` = {self.min_days} days of "
                "factor returns before it; start later, or read more history."
            )
        names = [n for n, k in zip(self.names, known, strict=True) if k]
        stocks = i.instruments[at]
        return DayRisk(
            date=date,
            exposures=pd.DataFrame(exposures[:, known], stocks, names),
            covariance=pd.DataFrame(covariance[np.ix_(known, known)], names, names),
            specific=pd.Series(specific[at], stocks, name=SPECIFIC),
            characteristics=pd.DataFrame(
                {c: x[row, at] for c, x in i.characteristics.items()}, index=stocks
            ),
        )


# ----------------------------------------------------------------------------- files
def _day_folder(root: Path, date: pd.Timestamp) -> Path:
    return root / f"{date:%Y%m%d}"


def write_day(root: Path, day: DayRisk, checksum: str) -> None:
    """Write one day's directory, or replace it; it appears when it is complete."""
    target = _day_folder(root, day.date)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=root))
    build = temporary / "new"
    build.mkdir()
    try:
        frames: list[Any] = [day.exposures.fillna(0.0), day.covariance, day.specific]
        for name, value in zip(_FILES, frames, strict=True):
            value.to_pickle(build / name)
        table = day.exposures.assign(**{SPECIFIC: day.specific})
        extra = day.characteristics.add_prefix("characteristic:")
        pd.concat([table, extra], axis=1).to_parquet(build / "exposure.parquet")
        day.covariance.to_parquet(build / "factor_cov.parquet")
        (build / _CHECKSUM).write_text(checksum, encoding="utf-8")
        with suppress(FileNotFoundError):
            os.rename(target, temporary / "old")
        try:
            os.rename(build, target)
        except OSError:
            if not target.is_dir():  # another process wrote the same day
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_current(root: Path, date: pd.Timestamp, checksum: str) -> bool:
    """Whether a day is there and was computed from the inputs of that checksum."""
    path = _day_folder(root, date) / _CHECKSUM
    return path.is_file() and path.read_text(encoding="utf-8") == checksum


def _digests(inputs: RiskInputs) -> list[bytes]:
    """SHA-256 of each day's own inputs.

    Only stocks that can enter the day's regression count, so that later listings in a
    longer range leave a past day's digest as it was.
    """
    here = np.isfinite(inputs.exposures).any(2) | inputs.listed
    here[1:] |= here[:-1].copy()  # today's return goes with yesterday's exposures
    panels = [inputs.industry, inputs.returns, inputs.listed]
    panels += [] if inputs.mcap is None else [inputs.mcap]
    panels += inputs.characteristics.values()
    out = []
    for row, day in enumerate(inputs.days):
        at = here[row]
        values = np.column_stack([inputs.exposures[row], *(x[row] for x in panels)])
        # Sums over stocks may differ in their last bits from one range to another.
        values = values[at].astype(np.float32)
        values[np.isnan(values)] = np.nan  # NaN has many bit patterns
        names = ",".join(inputs.instruments[at])
        text = f"{day:%Y%m%d} {inputs.styles} {names}"
        out.append(hashlib.sha256(text.encode() + values.tobytes()).digest())
    return out


def read_day(root: str | os.PathLike[str], date: Any) -> DayRisk:
    """Read one day that `build_risk_model` wrote.

    Raises
    ------
    ValueError
        If the model has no such day.
    """
    date = pd.Timestamp(date)
    folder = _day_folder(Path(root), date)
    if not folder.is_dir():
        raise ValueError(
            f"`riskmodel_root` {root} has no risk model of {date:%Y-%m-%d}; build it "
            "with `EnhanceRecord` or `qlib-ext riskmodel`."
        )
    table = pd.read_parquet(folder / "exposure.parquet")
    covariance = pd.read_parquet(folder / "factor_cov.parquet")
    more = [c for c in table.columns if c.startswith("characteristic:")]
    return DayRisk(
        date=date,
        exposures=table[list(covariance.columns)],
        covariance=covariance,
        specific=table[SPECIFIC],
        characteristics=table[more].rename(columns=lambda c: c.partition(":")[2]),
    )


def _fingerprint(parameters: Mapping[str, Any]) -> dict[str, Any]:
    extra = {
        name: hashlib.sha256(Path(path).read_bytes()).hexdigest()
        for name, path in (parameters.get("extra") or {}).items()
    }
    store = Path(C.dpm.get_data_uri("day"))
    meta = store / "meta.json"
    told = json.loads(meta.read_text(encoding="utf-8")) if meta.is_file() else {}
    # A longer store of the same source gives the same past.
    kept = {k: told[k] for k in ("source", "market", "start") if k in told}
    return {
        **parameters,
        "extra": extra,
        "store": str(store.resolve()),
        "made": kept,
        "units": "annualised x252: covariance in variance, specific risk in std",
    }


@checked
def build_risk_model(
    root: str | os.PathLike[str],
    start_time: Any,
    end_time: Any,
    *,
    frequency: Literal["week", "day"] = "week",
    instruments: Any = "all",
    styles: str | Sequence[str] = "auto",
    extra: Mapping[str, str | os.PathLike[str]] | None = None,
    overwrite: Literal[True, False, "changed"] = False,
    **parameters: Any,
) -> RiskModel:
    """Write the risk models of a range of days; days up to date are left.

    Beside each day stands a checksum of the inputs that it depends on: exposures,
    returns, industries, market caps and membership of `window` days. A day whose
    inputs have changed, in a store with corrected data say, is written again.

    Parameters
    ----------
    root : path
        Directory of the model.
    start_time, end_time : date
        Range of days, both included; days with less history than `min_days` are left
        out, and said.
    frequency : {"week", "day"}, default "week"
        Last trading day of each week, or every day (what Qlib's strategy, which trades
        daily, needs).
    instruments, styles, extra
        As `load_risk_inputs` takes them.
    overwrite : bool or "changed", default False
        What happens to a model that other parameters, extra factors or another store
        made: False refuses, "changed" rebuilds it. True rebuilds it too, and computes
        every day of the range again whatever is there.
    **parameters
        Of `RiskModel`.

    Returns
    -------
    RiskModel
        The estimator, with the inputs of every day.

    Raises
    ------
    ValueError
        If an argument is unknown, or `root` holds another model and `overwrite` is
        False.
    """
    allowed = set(RiskModel.__init__.__annotations__) - {"inputs", "return"}
    unknown = sorted(set(parameters) - allowed)
    if unknown:
        raise ValueError(
            f"`{unknown[0]}` is no parameter of the risk model; choose from "
            f"{sorted(allowed)}."
        )
    window = parameters.get("window", 756)
    check_whole("window", window, 1)
    root = Path(root)
    wanted = _fingerprint(
        {
            **parameters,
            "instruments": str(instruments),
            "styles": styles if isinstance(styles, str) else list(styles),
            "extra": dict(extra or {}),
        }
    )
    _prepare(root, wanted, bool(overwrite))
    inputs = load_risk_inputs(
        start_time,
        end_time,
        instruments=instruments,
        styles=styles,
        extra=extra,
        history=window,
    )
    model = RiskModel(inputs, **parameters)
    days = inputs.days if frequency == "day" else signal_days(inputs.days)
    days = days[days >= pd.Timestamp(start_time)]
    digests = _digests(inputs)
    short, replaced = [], 0
    enough = np.isfinite(model.factors.country).cumsum() >= model.min_days
    for date in days:
        row = int(inputs.days.searchsorted(date))
        # The first of `window` returns is explained by exposures of the day before.
        past = digests[max(0, row - model.window) : row + 1]
        checksum = hashlib.sha256(b"".join(past)).hexdigest()
        if overwrite is not True and _is_current(root, date, checksum):
            continue
        if not enough[row]:
            short.append(date)
            continue
        replaced += _day_folder(root, date).is_dir()
        write_day(root, model.estimate(date), checksum)
    if replaced:
        logger.info(f"risk model {root}: {replaced} days were there and are replaced.")
    if short:
        logger.warning(
            f"{len(short)} days up to {short[-1]:%Y-%m-%d} have fewer than "
            f"{model.min_days} days of factor returns before them: no risk model."
        )
    write_parquet(root / "factor_returns.parquet", model.factor_return_frame())
    return model


def _prepare(root: Path, wanted: dict[str, Any], overwrite: bool) -> None:
    meta = root / "meta.json"
    if root.is_dir() and any(root.iterdir()) and not meta.is_file():
        raise ValueError(f"`root` {root} is not empty and no risk model; name another.")
    if meta.is_file():
        found = json.loads(meta.read_text(encoding="utf-8"))
        asked = json.loads(_json(wanted))
        changed = sorted(k for k in {*found, *asked} if found.get(k) != asked.get(k))
        if not changed:
            return
        if not overwrite:
            raise ValueError(
                f"`root` {root} holds a risk model with other {changed}; pass "
                "`overwrite` to rebuild it, or name another directory."
            )
        logger.info(f"risk model {root} is rebuilt: {changed} changed.")
        for folder in root.iterdir():
            if folder.is_dir() and folder.name.lstrip(".")[:8].isdigit():
                shutil.rmtree(folder)
    root.mkdir(parents=True, exist_ok=True)
    write_text(meta, _json(wanted))


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, default=str, sort_keys=True)


# ------------------------------------------------------------------- bias statistics
@dataclass(frozen=True)
class Bias:
    """Bias statistic of one portfolio.

    Attributes
    ----------
    value : float
        Standard deviation of realised return / predicted standard deviation; 1 if the
        forecast is right, above 1 if risk was underestimated.
    low, high : float
        Where 95 % of the values of a right forecast lie.
    count : int
        Periods.
    """

    value: float
    low: float
    high: float
    count: int


def bias_statistic(realised: np.ndarray, predicted: np.ndarray) -> Bias:
    """Compare realised returns with their predicted standard deviations.

    Parameters
    ----------
    realised : ndarray [m]
        Returns of non-overlapping periods; NaN leaves a period out.
    predicted : ndarray [m]
        Standard deviation predicted before each period, in the same unit.

    Returns
    -------
    Bias
        NaN with fewer than two periods. The band 1 ± sqrt(2 / m) is for normal returns;
        fat tails widen it.

    References
    ----------
    Menchero, Orr and Wang (2011), The Barra US Equity Model (USE4), Methodology Notes,
    appendix A.
    """
    realised = np.asarray(realised, np.float64)
    predicted = np.asarray(predicted, np.float64)
    use = np.isfinite(realised) & np.isfinite(predicted) & (predicted > 0)
    z = realised[use] / predicted[use]
    count = len(z)
    half = np.sqrt(2 / count) if count else np.nan
    value = float(z.std(ddof=1)) if count > 1 else np.nan
    return Bias(value, 1 - half, 1 + half, count)


def bias_table(
    model: RiskModel,
    days: Sequence[Any] | pd.DatetimeIndex,
    horizon: int = 5,
    portfolios: int = 50,
    seed: int = 0,
) -> pd.DataFrame:
    """Test the model's forecasts on portfolios that were not used to make it.

    Parameters
    ----------
    model : RiskModel
    days : dates
        Forecast days, at least `horizon` trading days apart.
    horizon : int, default 5
        Trading days of each realised return (sum of daily returns; an unknown one
        counts as 0).
    portfolios : int, default 50
        Random ones of 50 stocks (a quarter of a small market), equally weighted.
    seed : int, default 0

    Returns
    -------
    DataFrame
        One row each for the cap-weighted `market`, the mean of random portfolios
        (`random`), of these minus the market (`active`) and of all stocks (`stock`):
        `bias`, `low` and `high` (95 % band of one portfolio), `inside` (share of the
        portfolios in the band), `portfolios` and `periods`.
    """
    i = model.inputs
    rows = i.days.get_indexer(pd.DatetimeIndex(list(days)))
    rows = rows[(rows >= 0) & (rows + horizon < len(i.days))]
    rng = np.random.default_rng(seed)
    n = len(i.instruments)
    pick = rng.random((portfolios, n))
    realised: dict[str, list] = {k: [] for k in ("market", "random", "active", "stock")}
    predicted: dict[str, list] = {k: [] for k in realised}
    scale = np.sqrt(horizon / metrics.DAYS_PER_YEAR)
    for row in rows.tolist():
        day = model.estimate(i.days[row])
        at = i.instruments.get_indexer(day.exposures.index)
        x = day.exposures.fillna(0.0).to_numpy()
        covariance = day.covariance.to_numpy()
        specific = day.specific.to_numpy()
        ahead = i.returns[row + 1 : row + 1 + horizon, at]
        ret = np.nansum(ahead, axis=0)
        cap = np.ones(len(at)) if i.mcap is None else np.nan_to_num(i.mcap[row, at])
        market = cap / cap.sum()
        # A portfolio keeps its stocks over the days, as far as they are listed.
        count = min(50, max(5, len(at) // 4))
        chosen = np.argsort(pick[:, at], axis=1)[:, :count]
        weight = np.zeros((portfolios, len(at)))
        np.put_along_axis(weight, chosen, 1 / count, axis=1)
        for name, w in (
            ("market", market[None]),
            ("random", weight),
            ("active", weight - market),
        ):
            factor = w @ x
            variance = np.einsum("pk,kl,pl->p", factor, covariance, factor)
            variance += (w * w) @ (specific**2)
            realised[name].append(w @ ret)
            predicted[name].append(np.sqrt(variance) * scale)
        own = np.einsum("nk,kl,nl->n", x, covariance, x) + specific**2
        lines = np.full((2, n), np.nan)
        lines[0, at] = np.where(np.isfinite(ahead).all(0), ret, np.nan)
        lines[1, at] = np.sqrt(own) * scale
        realised["stock"].append(lines[0])
        predicted["stock"].append(lines[1])
    table = {}
    for name in realised:
        if not realised[name]:
            continue
        r, p = np.stack(realised[name]), np.stack(predicted[name])
        each = [bias_statistic(r[:, j], p[:, j]) for j in range(r.shape[1])]
        each = [b for b in each if b.count >= 0.5 * len(r) and b.count > 1]
        if not each:
            continue
        values = np.array([b.value for b in each])
        typical = asdict(each[int(np.argmax([b.count for b in each]))])
        inside = [b.low <= b.value <= b.high for b in each]
        table[name] = {
            "bias": float(values.mean()),
            "low": typical["low"],
            "high": typical["high"],
            "inside": float(np.mean(inside)),
            "portfolios": len(each),
            "periods": typical["count"],
        }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("kind")
