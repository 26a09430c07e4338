"""Industry and Barra style exposures, and the daily returns of these factors.

`risk_config` gives the Qlib expressions of the raw descriptors that a store allows;
`CSStyleExposure` turns them into standardised exposures; `factor_returns` regresses
the day's returns on them. Definitions follow the China Post Securities weekly
(docs/conventions.md); a descriptor's windows are trailing, equally weighted (no
half-life) and end on the row's own day, so nothing later than the close of t enters.

Styles and their descriptors
----------------------------
beta            slope of the daily return on the market's, 252 days
size            log market cap
nonlinear_size  cube of the standardised size, orthogonalised to size; only then clipped
momentum        mean daily return, 252 days
volatility      0.74 std of the daily return, 252 days; 0.16 cumulative range: log of
                the highest over the lowest adjusted close, 252 days; 0.10 std of the
                residual of the beta regression
valuation       1 / PB
liquidity       0.35 / 0.35 / 0.30 log of the mean daily turnover, 21 / 63 / 252 days
profitability   0.68 forecast earnings / price, 0.21 / PCF, 0.11 / PE (both ttm)
growth          0.18 long-term and 0.11 short-term forecast growth, 0.24 earnings
                growth, 0.47 revenue growth
leverage        0.38 market leverage, 0.35 book leverage (1 + long-term debt over market
                cap, over equity), 0.27 debt to assets

`[gap]` What the reports leave open, decided here:

- "Excess return" is over the risk-free rate. The rate is the same for every stock of
  a day, so it cancels in the cross-section (momentum) or is negligible beside a
  stock's own spread (volatility); it is taken as 0.
- Windows are 252 days, and a window needs half of its days; fewer give NaN. A return
  is over the last close at which the stock traded; the day after a suspension has the
  move over all of it, days without trades have none.
- Turnover is taken in logs, being skewed; a store without `$turnover` uses amount over
  market cap.
- Descriptors of different units are each clipped and standardised before they are
  combined. Clipping is at the day's median ± 5 median absolute deviations.
- The market of a row is the first broad index that begins with the store and is known
  on the row's 252 days, else the equal-weighted mean return of the store's stocks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
from annotated_types import Ge
from qlib.data import D
from qlib.log import get_module_logger
from tqdm import tqdm

from data_handlers.arguments import Names, Positive, Text, Whole, checked
from data_handlers.cross_section import (
    BLOCK_BYTES,
    cap_standardize,
    clip_days,
    column_values,
    day_blocks,
    day_codes,
    group_positions,
    group_regression,
    neutralize,
)
from data_handlers.expression.loading import read_values
from data_handlers.fields import known_fields
from data_handlers.panel import cells, scatter
from data_handlers.processor import FrameProcessor
from data_handlers.traded import DAILY_RETURN
from data_handlers.universe import universe

__all__ = [
    "STYLES",
    "AddRisk",
    "CSStyleExposure",
    "FactorReturns",
    "StyleFeatures",
    "factor_return_frame",
    "factor_returns",
    "financial_config",
    "risk_config",
    "rolling_beta",
    "store_fields",
    "style_coverage",
]

WINDOW, QUARTER, MONTH = 252, 63, 21
# Broad indices first: what beta's market is chosen from.
MARKETS = ("SH000985", "SH000300", "SH000906", "SZ399317", "SH000905", "SH000852")


@dataclass(frozen=True)
class Descriptor:
    """One weighted ingredient of a style.

    Attributes
    ----------
    style : str
        Style it belongs to.
    weight : float
        Weight within the style; rescaled where a sister is missing.
    name : str
        Column of the raw "risk" group.
    forms : tuple of (expression, fields)
        Ways to compute it, best first, with the store fields each needs.
    """

    style: str
    weight: float
    name: str
    forms: tuple[tuple[str, tuple[str, ...]], ...]


def _enough(expression: str, count: str, window: int) -> str:
    # Qlib's rolling operators answer from the first day on; a window that is less than
    # half full is no estimate. inf - inf is how a Qlib expression spells NaN.
    return f"If(Count({count}, {window}) >= {window // 2}, {expression}, 1e999 - 1e999)"


def _turnover(window: int) -> tuple[tuple[str, tuple[str, ...]], ...]:
    forms = (("Traded($turnover)", ("turnover",)),)
    forms += (("Traded($amount) / $market_cap", ("amount", "market_cap")),)  # type: ignore
    return tuple(
        (_enough(f"Log(Mean({x}, {window}))", x, window), fields) for x, fields in forms
    )


def _field(name: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return ((f"${name}", (name,)),)


def _inverse(name: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return ((f"1 / ${name}", (name,)),)


def _close(expression: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return ((_enough(expression, DAILY_RETURN, WINDOW), ("close",)),)


DESCRIPTORS: tuple[Descriptor, ...] = tuple(
    Descriptor(*x)
    for x in (
        ("momentum", 1.0, "momentum_mean", _close(f"Mean({DAILY_RETURN}, {WINDOW})")),
        (
            "volatility",
            0.74,
            "volatility_std",
            _close(f"Std({DAILY_RETURN}, {WINDOW})"),
        ),
        (
            "volatility",
            0.16,
            "volatility_range",
            _close(f"Log(Max($close, {WINDOW}) / Min(Traded($close), {WINDOW}))"),
        ),
        ("valuation", 1.0, "valuation_bp", _inverse("pb")),
        ("liquidity", 0.35, "liquidity_month", _turnover(MONTH)),
        ("liquidity", 0.35, "liquidity_quarter", _turnover(QUARTER)),
        ("liquidity", 0.30, "liquidity_year", _turnover(WINDOW)),
        ("profitability", 0.68, "profitability_forecast", _field("forecast_ep")),
        ("profitability", 0.21, "profitability_cash", _inverse("pcf_ttm")),
        ("profitability", 0.11, "profitability_earnings", _inverse("pe_ttm")),
        ("growth", 0.18, "growth_long", _field("forecast_growth_long")),
        ("growth", 0.11, "growth_short", _field("forecast_growth_short")),
        ("growth", 0.24, "growth_earnings", _field("earnings_growth")),
        ("growth", 0.47, "growth_revenue", _field("revenue_growth")),
        (
            "leverage",
            0.38,
            "leverage_market",
            (
                *_field("market_leverage"),
                # 1 + debt / market cap, from 1 + debt / equity and market cap / equity.
                ("1 + ($book_leverage - 1) / $pb", ("book_leverage", "pb")),
            ),
        ),
        ("leverage", 0.35, "leverage_book", _field("book_leverage")),
        ("leverage", 0.27, "leverage_debt", _field("debt_to_assets")),
    )
)
# Store fields that the "risk" group can be made of.
RISK_FIELDS: tuple[str, ...] = tuple(
    sorted(
        {"industry", "market_cap"}
        | {f for d in DESCRIPTORS for _, need in d.forms for f in need}
    )
)
RESIDUAL_WEIGHT = 0.10  # of the beta regression's residual std in volatility
RETURN = "daily_return"  # raw column that asks `CSStyleExposure` for a beta regression
STYLES = (
    "beta",
    "size",
    "nonlinear_size",
    "momentum",
    "volatility",
    "valuation",
    "liquidity",
    "profitability",
    "growth",
    "leverage",
)


# ------------------------------------------------------------------- what to load
def store_fields() -> set[str]:
    """Return which of the fields that this module can use the Qlib store holds."""
    return set(known_fields(list(FIELDS), "all", freq="day", sample=24))


# Columns of `risk_config` that no model should read as they are.
RAW_RISK: frozenset[str] = frozenset(
    {RETURN, "log_mcap", *(d.name for d in DESCRIPTORS)}
)
RISK_HINT = (
    "A handler without them, such as Alpha158, gets them by `infer_processors` that "
    "end in {class: AddRisk, module_path: data_handlers.processors}, {class: "
    "CSStyleExposure, module_path: data_handlers.risk}."
)


def _check_styles(styles) -> list[str] | None:
    if isinstance(styles, str):
        if styles == "auto":
            return None
        styles = [styles]
    unknown = [s for s in styles or () if s not in STYLES]
    if unknown:
        raise ValueError(
            f"`styles`: {unknown[0]!r} is not a style; choose from {list(STYLES)}."
        )
    return [s for s in STYLES if s in set(styles or ())]


def risk_config(
    styles: str | Sequence[str] = "auto", fields: Collection[str] | None = None
) -> tuple[list[str], list[str]]:
    """Give the expressions and names of the "risk" group, as far as the store allows.

    The columns are `industry`, `log_mcap` (natural log, CNY), then raw descriptors,
    which `CSStyleExposure` turns into the styles. What the store lacks is absent, with
    one log line. Usable as a group of `QlibDataLoader`'s config.

    Parameters
    ----------
    styles : "auto", list of str or empty, default "auto"
        Styles wanted (`STYLES`); "auto" takes every one the store allows; empty: only
        industry and log market cap.
    fields : collection of str, optional
        Fields of the store, without `$`. None looks into the store.

    Returns
    -------
    expressions, names : list of str
        Both empty if the store has neither industry nor market cap and no style is
        wanted.

    Raises
    ------
    ValueError
        If a style is unknown, or one asked for by name has no input in the store.
    """
    wanted = _check_styles(styles)
    have = set(store_fields() if fields is None else fields)
    expressions, names, absent = [], [], []
    for name, field, expression in (
        ("industry", "industry", "$industry"),
        ("log_mcap", "market_cap", "Log($market_cap)"),
    ):
        if field in have:
            expressions.append(expression)
            names.append(name)
        else:
            absent.append(f"{name} (${field})")

    def wants(*some):
        return wanted is None or any(s in wanted for s in some)

    found = set()
    if "market_cap" in have:
        found |= {"size", "nonlinear_size"}
    if "close" in have and wants("beta", "volatility"):
        expressions.append(DAILY_RETURN)
        names.append(RETURN)
        found.add("beta")
    for d in DESCRIPTORS:
        if not wants(d.style):
            continue
        form = next((e for e, need in d.forms if have.issuperset(need)), None)
        if form is None:
            absent.append(f"{d.name} ($" + ", $".join(d.forms[0][1]) + ")")
            continue
        expressions.append(form)
        names.append(d.name)
        found.add(d.style)
    for style in wanted or ():
        if style not in found:
            need = [
                f"${f}"
                for d in DESCRIPTORS
                if d.style == style
                for _, fs in d.forms
                for f in fs
            ] or ["$market_cap" if "size" in style else "$close"]
            raise ValueError(
                f"`styles`: the store has no input of {style!r}, which needs one of "
                f"{need}; ingest them or drop the style."
            )
    if absent:
        get_module_logger("risk_config").info(
            f"not in this store, left out: {', '.join(absent)}; the weights of the "
            "remaining descriptors are rescaled."
        )
    return expressions, names


# Announced indicators by dimension (docs/systems/gru_gat.md), with their store fields;
# a dimension whose fields no vendor has given yet is not listed.
FINANCIALS: tuple[tuple[str, str, str], ...] = (
    ("earnings_growth", "$earnings_growth", "earnings_growth"),
    ("revenue_growth", "$revenue_growth", "revenue_growth"),
    ("debt_to_assets", "$debt_to_assets", "debt_to_assets"),
    ("book_leverage", "$book_leverage", "book_leverage"),
    ("roe", "$roe", "roe"),
    ("gross_margin", "$gross_margin", "gross_margin"),
    ("asset_turnover", "$asset_turnover", "asset_turnover"),
    ("current_ratio", "$current_ratio", "current_ratio"),
    ("accruals", "$accruals", "accruals"),
    ("goodwill_to_assets", "$goodwill_to_assets", "goodwill_to_assets"),
    ("rd_to_revenue", "$rd_to_revenue", "rd_to_revenue"),
    ("bp", "1 / $pb", "pb"),
    ("ep", "1 / $pe_ttm", "pe_ttm"),
    ("sp", "1 / $ps_ttm", "ps_ttm"),
    ("cfp", "1 / $pcf_ttm", "pcf_ttm"),
)

FIELDS: tuple[str, ...] = tuple(
    sorted({*RISK_FIELDS} | {field for _, _, field in FINANCIALS})
)


def financial_config(
    fields: Collection[str] | None = None,
) -> tuple[list[str], list[str]]:
    """Give the expressions and names of the announced indicators the store holds.

    Parameters
    ----------
    fields : collection of str, optional
        Fields of the store, without `$`. None looks into the store.

    Returns
    -------
    expressions, names : list of str
        Both empty if the store has no indicator.
    """
    have = set(store_fields() if fields is None else fields)
    found = [(e, name) for name, e, field in FINANCIALS if field in have]
    return [e for e, _ in found], [name for _, name in found]


# ---------------------------------------------------------------- beta regression
@checked
def rolling_beta(
    returns: np.ndarray,
    market: np.ndarray,
    window: Annotated[int, Ge(3)] = WINDOW,
    min_count: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Regress each stock's trailing returns on the market's.

    Parameters
    ----------
    returns : ndarray [t, n]
        Daily arithmetic returns, NaN unknown.
    market : ndarray [t]
        The market's, NaN unknown.
    window : int, default 252
        Days, the row's own included.
    min_count : int, optional
        Fewest days with both returns known; default half the window.

    Returns
    -------
    beta, residual_std : ndarray [t, n]
        Slope, and standard deviation (per day, ddof 1) of the residual of the
        regression with intercept. NaN where too few days are known or the market did
        not move.

    Raises
    ------
    ValueError
        If shapes disagree or `window` is below 3.
    """
    returns, market = np.asarray(returns), np.asarray(market, np.float64)
    if returns.ndim != 2 or market.shape != returns.shape[:1]:
        raise ValueError(
            "`returns` must be [days, stocks] and `market` [days], got "
            f"{returns.shape} and {market.shape}."
        )
    least = max(3, window // 2 if min_count is None else min_count)
    t, n = returns.shape
    beta = np.full((t, n), np.nan)
    spread = np.full((t, n), np.nan)

    def trailing(x):
        total = np.cumsum(x, axis=0)
        total[window:] -= total[:-window].copy()
        return total

    step = max(1, BLOCK_BYTES // (8 * max(1, t) * 8))
    for first in range(0, n, step):
        r = returns[:, first : first + step].astype(np.float64)
        known = np.isfinite(r) & np.isfinite(market)[:, None]
        r = np.where(known, r, 0.0)
        m = np.where(known, market[:, None], 0.0)
        count = trailing(known.astype(np.float64))
        some = np.maximum(count, 1.0)
        sr, sm = trailing(r), trailing(m)
        rm = trailing(r * m) - sr * sm / some
        mm = trailing(m * m) - sm * sm / some
        rr = trailing(r * r) - sr * sr / some
        # Cumulative sums leave rounding of about 1e-15; so little movement is none.
        good = (count >= least) & (mm > 1e-12)
        slope = rm / np.where(good, mm, 1.0)
        rest = np.maximum(rr - slope * rm, 0.0) / np.maximum(count - 1.0, 1.0)
        beta[:, first : first + step] = np.where(good, slope, np.nan)
        spread[:, first : first + step] = np.where(good, np.sqrt(rest), np.nan)
    return beta, spread


def load_beta(
    index: pd.Index, market: str = "auto", freq: str = "day"
) -> tuple[np.ndarray, np.ndarray]:
    """Load returns and run `rolling_beta` for the rows of a frame.

    Reads 252 days before the frame's first day too, so that its first rows have a
    full window. A row depends on its window only, not on the frame's span.

    Parameters
    ----------
    index : MultiIndex
        Rows (datetime, instrument) in any order.
    market : str, default "auto"
        Index code, "equal" (equal-weighted mean of the store's stocks) or "auto": of
        `MARKETS` the first that begins within the store's first 21 days, for each day
        of which it knows 95 % of the 252 returns, else "equal".
    freq : str, default "day"
        Qlib frequency.

    Returns
    -------
    beta, residual_std : ndarray [rows]
        In the order of `index`.

    Raises
    ------
    ValueError
        If `market` names an index without returns in the store.
    """
    dates, names = index.unique("datetime"), index.unique("instrument")
    last = dates.max()
    calendar = pd.DatetimeIndex(D.calendar(end_time=last, freq=freq))
    early = calendar[:MONTH][[0, -1]]
    begin = calendar[max(0, calendar.searchsorted(dates.min()) - WINDOW)]
    calendar = calendar[calendar >= begin]

    def returns(instruments):
        frame = read_values(instruments, [DAILY_RETURN], begin, last, freq)
        codes = frame.index.unique("instrument").sort_values()
        values = scatter(frame.iloc[:, 0], calendar, codes, np.float32)
        return pd.DataFrame(values, calendar, codes)

    todo = np.asarray(calendar >= dates.min())  # days that have no market yet
    markets: list[tuple[str, pd.Series, np.ndarray]] = []  # name, returns, their days
    if market not in ("auto", "equal"):
        level = returns([market])
        if not level.notna().mean().max() > 0.95 - 1 / len(calendar):
            raise ValueError(
                f"`market`: the store has no (or too few) closes of index {market!r} "
                f"from {begin.date()} to {last.date()}; use 'equal'."
            )
        markets.append((f"index {market}", level.iloc[:, 0], todo))
        todo = np.zeros_like(todo)
    for code in MARKETS if market == "auto" else ():
        if not todo.any():
            break
        # One that begins later would change what beta means in the middle of history.
        if not D.features([code], ["$close"], *early, freq=freq).notna().any(axis=None):
            continue
        level = returns([code])
        if level.shape[1]:
            count = level.notna().iloc[:, 0].rolling(WINDOW, 1)
            # The first day of a store has no return; allow that and a rare hole.
            known = (count.sum() > 0.95 * count.count() - 1).to_numpy() & todo
            if known.any():
                markets.append((f"index {code}", level.iloc[:, 0], known))
                todo = todo & ~known
    if todo.any():
        panel = returns(universe(D.instruments("all"), freq))
        markets.append(("the equal-weighted market", panel.mean(axis=1), todo))
        rest = names.difference(panel.columns)
        if len(rest):
            panel = pd.concat([panel, returns(list(rest))], axis=1)
    else:
        panel = returns(list(names))
    log = get_module_logger("CSStyleExposure")
    for name, _, days in markets:
        log.info(f"beta against {name} on {days.sum()} days.")
    beta, spread = np.full(len(index), np.nan), np.full(len(index), np.nan)
    # A date off the calendar has the cell -1, so the row -1: no beta.
    row, column = np.divmod(cells(index, calendar, names), len(names))
    # By stocks, so that what is held beside the rows is small.
    for first in range(0, len(names), 256):
        some = names[first : first + 256]
        r = panel.reindex(columns=some).to_numpy()
        inside = (column >= first) & (column < first + len(some))
        rows = np.flatnonzero((row >= 0) & inside)
        place = row[rows], column[rows] - first
        for _, level, days in markets:
            found = rolling_beta(r, level.to_numpy())
            here = days[place[0]]
            for to, values in zip((beta, spread), found, strict=True):
                to[rows[here]] = values[place[0][here], place[1][here]]
    return beta, spread


# --------------------------------------------------------------- day cross-sections
class CSStyleExposure(FrameProcessor):
    """Turn raw descriptors of the "risk" group into standardised style exposures.

    Per day: each descriptor is clipped and standardised, descriptors are combined with
    the weights of the module's table, and the style is standardised again to
    cap-weighted mean 0 and equal-weighted standard deviation 1. A stock (or a store)
    that lacks a descriptor has the remaining weights rescaled; one that lacks them all
    has NaN. Pools one day only (beta: the 252 days up to it) and keeps no state.

    Place it after `DropSuspended`, so that stocks that did not trade do not count.

    Parameters
    ----------
    styles : "auto", list of str or empty, default "auto"
        Styles to compute; the same as given to `risk_config`. "auto": all that the
        columns allow.
    risk_group : str, default "risk"
        Group with the columns of `risk_config`. The result holds `industry` and
        `log_mcap` as they are, then the styles in the order of `STYLES`; raw
        descriptors are dropped. Any other column of the group stays.
    n_mad : float, default 5
        Clip distance in the day's median absolute deviations.
    market : str, default "auto"
        Market of beta: an index code, "equal" or "auto" (see `load_beta`).
    freq : str, default "day"
        Qlib frequency of the returns loaded for beta.

    Raises
    ------
    ValueError
        If an argument is out of range, or a style named in `styles` has no input.
    """

    by_day = costly = True

    def __init__(
        self,
        styles: Names | None = "auto",
        risk_group: Text = "risk",
        n_mad: Positive = 5,
        market: Text = "auto",
        freq: Text = "day",
    ):
        _check_styles(styles)
        self.styles = styles if isinstance(styles, str) else list(styles or ())

    def _plan(self, at: dict[str, int]) -> dict[str, list[tuple[float, str]]]:
        """Return each style's (weight, raw column) pairs that the columns allow."""
        wanted = _check_styles(self.styles)
        plan: dict[str, list[tuple[float, str]]] = {s: [] for s in STYLES}
        if RETURN in at:
            plan["beta"] = [(1.0, "beta")]
            plan["volatility"].append((RESIDUAL_WEIGHT, "volatility_residual"))
        if "log_mcap" in at:
            plan["size"] = plan["nonlinear_size"] = [(1.0, "log_mcap")]
        for d in DESCRIPTORS:
            if d.name in at:
                plan[d.style].append((d.weight, d.name))
        # Residual risk alone is no volatility.
        if plan["volatility"] == [(RESIDUAL_WEIGHT, "volatility_residual")]:
            plan["volatility"] = []
        for style in wanted or ():
            if not plan[style]:
                raise ValueError(
                    f"`styles`: group {self.risk_group!r} has no input of {style!r} "
                    f"(it has {sorted(at)}); load them with `risk_config`."
                )
        return {s: p for s, p in plan.items() if p and (wanted is None or s in wanted)}

    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        """Return a new frame whose risk group holds exposures."""
        positions = group_positions(df, self.risk_group)
        names = df.columns.get_level_values(-1)
        at = {str(names[i]): int(i) for i in positions}
        plan = self._plan(at)
        log = get_module_logger(type(self).__name__)
        if plan and "log_mcap" not in at:
            log.warning("no log_mcap: exposures are centred with equal weights.")
        raw = {name: column_values(df, i) for name, i in at.items()}
        if len(df) and any(
            c == "beta" or "residual" in c for p in plan.values() for _, c in p
        ):
            raw["beta"], raw["volatility_residual"] = load_beta(
                df.index, self.market, self.freq
            )
        drop = {d.name for d in DESCRIPTORS} | {RETURN} | set(STYLES)
        keep = [
            i
            for i, column in enumerate(df.columns)
            if not (column[0] == self.risk_group and column[-1] in drop)
        ]
        # Of one type, the columns kept and the styles are one array from the start.
        ahead = len(keep) if set(df.dtypes.iloc[keep]) == {np.dtype("float32")} else 0
        shape = len(df), ahead + len(plan)
        values = np.full(shape, np.nan, np.float32, order="F")
        out = {style: values[:, ahead + j] for j, style in enumerate(plan)}
        blocks = day_blocks(df.index, BLOCK_BYTES // (8 * 12))
        for rows, place, shape in tqdm(
            blocks, desc="styles", unit="block", delay=3, disable=None, leave=False
        ):
            block = {}
            for column in {c for p in plan.values() for _, c in p} | {"log_mcap"}:
                if column in raw:
                    x = np.full(shape, np.nan)
                    x[place] = raw[column][rows]
                    x[~np.isfinite(x)] = np.nan
                    block[column] = x
            for style, x in self._block(plan, block).items():
                out[style][rows] = x[place]
        if len(df):
            known = {s: f"{np.isfinite(x).mean():.0%}" for s, x in out.items()}
            log.info(f"share of rows with a known exposure: {known}")
        added = pd.MultiIndex.from_tuples(
            [(self.risk_group, style) for style in out], names=df.columns.names
        )
        if not ahead:
            styles = pd.DataFrame(values, df.index, added, copy=False)
            return pd.concat([df.iloc[:, keep], styles], axis=1)
        for to, i in enumerate(keep):
            values[:, to] = column_values(df, i)
        return pd.DataFrame(
            values, df.index, df.columns[keep].append(added), copy=False
        )

    def _block(self, plan, block):
        cap = None
        if "log_mcap" in block:
            top = np.fmax.reduce(block["log_mcap"], axis=1, keepdims=True, initial=-1e3)
            cap = np.exp(block["log_mcap"] - top)

        def standard(x):
            return cap_standardize(clip_days(x, self.n_mad), cap)

        out = {}
        if "log_mcap" in block:
            size = standard(block["log_mcap"])
        for style, parts in plan.items():
            if style == "size":
                out[style] = size
            elif style == "nonlinear_size":
                # Clipped first, the cube would be near size itself.
                rest = neutralize((size**3)[..., None], None, size[..., None])
                out[style] = standard(rest[..., 0])
            elif len(parts) == 1:
                out[style] = standard(block[parts[0][1]])
            else:
                total = np.zeros_like(block[parts[0][1]])
                weight = np.zeros_like(total)
                for w, column in parts:
                    x = standard(block[column])
                    known = np.isfinite(x)
                    total[known] += w * x[known]
                    weight[known] += w
                some = weight > 0
                total = np.where(some, total / np.where(some, weight, 1.0), np.nan)
                out[style] = standard(total)
        return out


class StyleFeatures(FrameProcessor):
    """Let a model read the style exposures: copy them behind the features.

    They are named ``style_<name>``; an unknown exposure is 0, the mean of the day. For
    the infer processors, behind `CSStyleExposure` and what standardises the features.
    Keeps no state.

    Raises
    ------
    ValueError
        If the risk group has no style exposure.
    """

    by_day = True

    def __init__(self) -> None:
        pass

    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        """Return a new frame with the exposures as further features."""
        styles = [s for s in STYLES if ("risk", s) in df.columns]
        if not styles:
            raise ValueError(
                "`style_features` is true, but the risk group has no style exposure. "
                f"{RISK_HINT}"
            )
        names = [("feature", f"style_{s}") for s in styles]
        copies = df[[("risk", s) for s in styles]].fillna(0.0).astype(np.float32)
        copies.columns = pd.MultiIndex.from_tuples(names, names=df.columns.names)
        first = df.columns.get_level_values(0)
        last = int(np.flatnonzero(first == "feature")[-1]) + 1
        parts = [df.iloc[:, :last], copies, df.iloc[:, last:]]
        return pd.concat(parts, axis=1)


class AddRisk(FrameProcessor):
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

    def __init__(self, risk="auto", label=None, freq: Text = "day"):
        if not (risk is None or risk == "auto" or isinstance(risk, (list, Mapping))):
            raise ValueError(
                f"`risk` must be 'auto', a list of styles or a mapping of names to "
                f"expressions, got {risk!r}."
            )
        if label is not None and not isinstance(label, Mapping):
            raise ValueError(
                f"`label` must map names to expressions, got {type(label).__name__}."
            )

    def _groups(self) -> dict[str, Mapping[str, str]]:
        groups: dict[str, Mapping[str, str]] = {}
        if isinstance(self.risk, Mapping):
            groups["risk"] = self.risk
        elif self.risk is not None:
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
        if not len(df):
            return pd.DataFrame(
                np.empty((0, len(expressions)), np.float32), index=df.index
            )
        dates = df.index.get_level_values("datetime")
        names = df.index.get_level_values("instrument").unique().tolist()
        loaded = read_values(names, expressions, dates.min(), dates.max(), self.freq)
        return loaded.reorder_levels([str(n) for n in df.index.names]).reindex(df.index)


def style_coverage(df: pd.DataFrame) -> pd.DataFrame:
    """Return the share of rows with a known value, per year and risk column.

    Parameters
    ----------
    df : DataFrame
        Rows (datetime, instrument), columns (group, name) with a risk group.

    Returns
    -------
    DataFrame
        Rows years, columns the names of the group, values in 0…1.
    """
    group_positions(df, "risk")  # raises if absent
    years = pd.DatetimeIndex(df.index.get_level_values("datetime")).year
    known = pd.DataFrame(df["risk"]).notna()
    return pd.DataFrame(known.groupby(years).mean().rename_axis("year"))


# ------------------------------------------------------------------- factor returns
class FactorReturns(NamedTuple):
    """Daily returns of country, industry and style factors.

    Row t is known at the close of t.

    Attributes
    ----------
    country : ndarray [t]
        Return of the market of all stocks, net of industries and styles.
    industry : ndarray [t, g]
        Industry returns beyond the country's; cap-weighted they sum to 0 each day. NaN
        where an industry had no stock that day.
    style : ndarray [t, k]
        Return of one unit of exposure; NaN where a style was unknown or flat.
    codes : ndarray [g]
        Industry codes.
    specific : ndarray [t, n]
        What the factors leave of each stock's return.
    r2 : ndarray [t]
        Weighted share of the returns' variance that the factors explain, adjusted for
        their number (0 on average if they explain nothing); NaN without more stocks
        than factors.
    """

    country: np.ndarray
    industry: np.ndarray
    style: np.ndarray
    codes: np.ndarray
    specific: np.ndarray
    r2: np.ndarray


@checked
def factor_returns(
    returns: np.ndarray,
    exposures: np.ndarray,
    industry: np.ndarray,
    mcap: np.ndarray | None = None,
    lag: Whole = 1,
) -> FactorReturns:
    """Regress each day's returns on the exposures known before it.

    Weighted least squares with weights sqrt(market cap), one regression a day, batched:
    return = country + industry + styles · exposure + specific, under the constraint
    that the cap-weighted industry returns sum to 0.

    Parameters
    ----------
    returns : ndarray [t, n]
        Arithmetic return over day t, from the close of t-1 to the close of t.
    exposures : ndarray [t, n, k]
        Style exposures at the close of t, NaN unknown.
    industry : ndarray [t, n]
        Industry codes at the close of t, NaN unknown.
    mcap : ndarray [t, n], optional
        Market caps at the close of t. None: equal weights, also in the constraint.
    lag : int, default 1
        Days between exposures and returns: returns of t on exposures of t - lag. 0 is
        for returns that the caller has shifted already.

    Returns
    -------
    FactorReturns
        The first `lag` rows are NaN.

    Notes
    -----
    A style known for less than half of a day's stocks is left out of that day (NaN);
    of the others a stock needs every exposure, industry and market cap to take part.

    Raises
    ------
    ValueError
        If shapes disagree or `lag` is negative.
    """
    returns, exposures = np.asarray(returns), np.asarray(exposures)
    industry = np.asarray(industry)
    t, n = returns.shape
    for name, array, shape in (
        ("exposures", exposures, (t, n)),
        ("industry", industry, (t, n)),
        ("mcap", np.zeros((t, n)) if mcap is None else np.asarray(mcap), (t, n)),
    ):
        if array.shape[:2] != shape:
            raise ValueError(
                f"`{name}` must begin with shape {shape} like `returns`, got "
                f"{array.shape}."
            )
    if exposures.ndim != 3:
        raise ValueError(f"`exposures` must be [t, n, k], got {exposures.shape}.")
    k = exposures.shape[2]
    codes = np.unique(industry[np.isfinite(industry)])
    g = len(codes)
    out = FactorReturns(
        np.full(t, np.nan),
        np.full((t, g), np.nan),
        np.full((t, k), np.nan),
        codes,
        np.full((t, n), np.nan),
        np.full(t, np.nan),
    )
    step = max(1, BLOCK_BYTES // (8 * max(1, n) * (2 * k + 8)))
    for first in range(lag, t, step):
        now = slice(first, min(first + step, t))
        then = slice(now.start - lag, now.stop - lag)
        r = returns[now].astype(np.float64)
        x = np.moveaxis(exposures[then].astype(np.float64), 2, 1)  # [b, k, n]
        b = len(r)
        cap = np.ones((b, n)) if mcap is None else np.asarray(mcap[then], np.float64)
        use = np.isfinite(r) & np.isfinite(industry[then]) & np.isfinite(cap)
        use &= np.where(np.isfinite(cap), cap, 0) > 0
        have = np.isfinite(x)
        enough = (have & use[:, None]).sum(2) * 2 > use.sum(1)[:, None]  # [b, k]
        use &= (have | ~enough[..., None]).all(1)
        x = np.where(have & enough[..., None], x, 0.0)
        code = np.searchsorted(codes, np.where(use, industry[then], np.inf))
        group = code + (g + 1) * np.arange(b)[:, None]
        root = np.sqrt(np.where(use, cap, 1.0))
        rest, beta, kept = group_regression(
            r[..., None], use, group, b * (g + 1), x, root
        )
        beta, rest = beta[..., 0], rest[..., 0]

        def per_group(z, group=group, b=b):
            z = np.bincount(group.ravel(), z.ravel(), minlength=b * (g + 1))
            return z.reshape(b, g + 1)[:, :g]

        w = np.where(use, root, 0.0)
        net = np.where(use, r, 0.0) - np.einsum("bk,bkn->bn", beta, x)
        weight = per_group(w)
        some = weight > 0
        level = per_group(w * net) / np.where(some, weight, 1.0)
        size = per_group(np.where(use, cap, 0.0))
        total = size.sum(1)
        any_ = total > 0
        country = (size * level).sum(1) / np.where(any_, total, 1.0)
        out.country[now] = np.where(any_, country, np.nan)
        out.industry[now] = np.where(some, level - country[:, None], np.nan)
        out.style[now] = np.where(kept & enough, beta, np.nan)
        out.specific[now] = rest
        weight_sum = np.maximum(w.sum(1), 1e-300)
        mean = (w * np.where(use, r, 0.0)).sum(1) / weight_sum
        before = (w * np.where(use, r - mean[:, None], 0.0) ** 2).sum(1)
        after = (w * np.where(use, rest, 0.0) ** 2).sum(1)
        # One factor of each industry (the country is among them) and style.
        spare = use.sum(1) - some.sum(1) - (kept & enough).sum(1)
        good = (before > 0) & (spare > 0)
        left = after / np.where(good, before, 1.0) * (use.sum(1) - 1)
        out.r2[now] = np.where(good, 1 - left / np.where(good, spare, 1), np.nan)
    return out


def factor_return_frame(
    df: pd.DataFrame, returns: pd.Series, styles: Sequence[str] | None = None
) -> pd.DataFrame:
    """Compute `factor_returns` from Qlib frames, as a table fit for Parquet.

    Parameters
    ----------
    df : DataFrame
        Rows (datetime, instrument) with a standardised risk group.
    returns : Series
        Arithmetic return over the row's day, (datetime, instrument).
    styles : list of str, optional
        Style columns; default all of `STYLES` in the group.

    Returns
    -------
    DataFrame
        Rows datetime; columns `country`, `industry_<code>`, the styles and `r2`. Row t
        uses exposures of the frame's previous day and is known at the close of t.

    Raises
    ------
    ValueError
        If the group lacks `industry` or a style.
    """
    positions = group_positions(df, "risk")
    names = df.columns.get_level_values(-1)
    at = {str(names[i]): int(i) for i in positions}
    wanted = [s for s in STYLES if s in at] if styles is None else list(styles)
    for name in ["industry", *wanted]:
        if name not in at:
            raise ValueError(
                f"group 'risk' has no column {name!r} (it has {sorted(at)})."
            )
    days = pd.DatetimeIndex(df.index.unique("datetime").sort_values())
    stocks = df.index.unique("instrument").sort_values()
    used = [at[name] for name in ("industry", *wanted, "log_mcap") if name in at]
    values = scatter(df.iloc[:, used], days, stocks)
    result = factor_returns(
        scatter(returns, days, stocks, what="returns"),
        values[..., 1 : 1 + len(wanted)],
        values[..., 0],
        np.exp(values[..., -1]) if "log_mcap" in at else None,
    )
    out = {"country": result.country}
    out |= {
        f"industry_{code:g}": result.industry[:, j]
        for j, code in enumerate(result.codes)
    }
    out |= {s: result.style[:, j] for j, s in enumerate(wanted)}
    out["r2"] = result.r2
    return pd.DataFrame(out, index=days)
