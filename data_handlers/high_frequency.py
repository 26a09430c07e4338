"""Ten high-frequency factors, and the parts of the day as steps of a sequence.

The factors of the weekly reports: a value of each day's minute bars or ticks, its mean
over the last 20 days on which the stock has one, net of industries and size.

| factor | of the day | from | sign |
|---|---|---|---|
| `hf_skew` | skewness of minute returns about their mean | ms | - |
| `hf_down_vol` | sqrt(Σr²[r<0] / Σr²), a ratio of deviations | ms | - |
| `hf_open_buy_share` | post-open buy intention, share of the amount | l2, orders | + |
| `hf_open_buy_strength` | its mean / deviation by minute | l2, orders | + |
| `hf_open_big_share` | post-open large net buying, share of the amount | l2 | + |
| `hf_open_big_strength` | its mean / deviation by minute | l2 | + |
| `hf_reversal` | see below | l2 | - |
| `hf_tail` | share of the volume in the last 30 minutes | ms | - |
| `hf_outflow` | mean amount of an active sale / of a trade | l2 | + |
| `hf_big_push` | return over the trades with the largest amounts | l2 | - |

Improved reversal: of the window's days the half with the largest mean amount a trade;
the sum of their returns less that of the rest. Moves that large trades make reverse.

Values are multiplied by the sign, so that more is better. `[gap]` The window of 20 days
and the signs; docs/systems/recurrent.md says what they rest on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from qlib.data import D
from qlib.log import get_module_logger

from data_handlers.aggregate.schema import get_session
from data_handlers.aggregate.windows import BAR_FEATURES, bar_features
from data_handlers.arguments import Count, Names, Universe, checked
from data_handlers.expression.loading import load_panel
from data_handlers.handler import FeatureHandler, own_processor
from data_handlers.loaders import (
    aggregate_source,
    built_with,
    expand_store,
    read_daily_parquet,
)
from data_handlers.panel import scatter
from data_handlers.traded import DAILY_RETURN

__all__ = [
    "FACTORS",
    "HFFactorHandler",
    "IntradayHandler",
    "day_parts",
    "high_frequency_factors",
    "improved_reversal",
]

logger = get_module_logger("data_handlers")

_PARTS_OF_DAY = ("ms_ret_open30", "ms_ret_mid", "ms_ret_last30")
#: Name of each factor: its sign, where it comes from, and the columns there.
FACTORS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "hf_skew": (-1, "ms", ("ms_skew", "ms_rv", *_PARTS_OF_DAY)),
    "hf_down_vol": (-1, "ms", ("ms_down_ratio",)),
    "hf_open_buy_share": (1, "l2", ("l2_open_buy_will_ratio",)),
    "hf_open_buy_strength": (1, "l2", ("l2_open_buy_will_strength",)),
    "hf_open_big_share": (1, "l2", ("l2_open_big_net_ratio",)),
    "hf_open_big_strength": (1, "l2", ("l2_open_big_net_strength",)),
    "hf_reversal": (-1, "l2", ("l2_avg_trade",)),
    "hf_tail": (-1, "ms", ("ms_vol_last30",)),
    "hf_outflow": (1, "l2", ("l2_avg_outflow_ratio",)),
    "hf_big_push": (-1, "l2", ("l2_big_push",)),
}


@checked
def high_frequency_factors(
    dates: pd.DatetimeIndex,
    spans: Mapping[str, Sequence[tuple]],
    freq: str = "day",
    ms: str | None = "{store}/ms",
    l2: str | None = "{store}/l2",
    window: Count = 20,
    columns: Names | None = None,
) -> pd.DataFrame:
    """Compute the factors; a `panel` source of `ParquetDataLoader`.

    Parameters
    ----------
    dates : DatetimeIndex
        Trading days wanted.
    spans : dict
        Members, `{code: [(start, end), ...]}`.
    freq : str
    ms, l2 : str or None
        Feature files; None leaves out the factors that need them.
    window : int, default 20
        Trading days of the mean, t included; on half of them at least the stock must
        have a value.
    columns : list of str, optional
        Which of `FACTORS`; by default those whose files are given.

    Returns
    -------
    DataFrame
        Rows (datetime, instrument) of stock-days that have a value of the day itself;
        one column a factor, signed, not yet neutralised. NaN unknown.

    Raises
    ------
    ValueError
        For an unknown factor or one whose files are left out, or missing files.
    """
    paths = {"ms": ms, "l2": l2}
    names = wanted_factors(paths, columns)
    calendar = pd.DatetimeIndex(D.calendar(freq=freq))
    first = max(0, int(calendar.searchsorted(dates[0])) - window + 1)
    days = calendar[first : calendar.searchsorted(dates[-1], side="right")]
    stocks = pd.Index(sorted(spans))
    day: dict[str, np.ndarray] = {}
    bars = 0
    for kind, path in paths.items():
        needed = [c for n in names if FACTORS[n][1] == kind for c in FACTORS[n][2]]
        if not needed:
            continue
        where = expand_store(str(path), freq)
        frame = read_daily_parquet(
            where, list(dict.fromkeys(needed)), days[0], days[-1], missing_years="warn"
        )
        frame = frame[frame.index.get_level_values("instrument").isin(stocks)]
        values = scatter(frame, days, stocks, np.float64)
        day |= {str(c): values[..., k] for k, c in enumerate(frame)}
        if kind == "ms" and "hf_skew" in names:
            bars = _bars_a_day(where)
    here = slice(len(days) - len(dates), None)
    out = np.full((len(dates), len(stocks), len(names)), np.nan, np.float32)
    present = np.zeros(out.shape[:2], dtype=bool)
    for k, name in enumerate(names):
        sign, _, read = FACTORS[name]
        if name == "hf_reversal":
            returns, _ = load_panel([DAILY_RETURN], dates, stocks, window - 1, freq)
            lead = np.full((len(days) - len(returns), len(stocks)), np.nan)
            returns = np.vstack([lead, returns[..., 0]])
            mean = improved_reversal(returns, day[read[0]], window)
            own = np.isfinite(day[read[0]])
        else:
            value = _of_the_day(name, day, bars)
            mean, own = _trailing_mean(value, window), np.isfinite(value)
        out[..., k] = sign * mean[here]
        present |= own[here]
    empty = [n for k, n in enumerate(names) if not np.isfinite(out[..., k]).any()]
    if empty:
        logger.warning(f"high-frequency factors without any value: {empty}")
    at_day, at_stock = np.nonzero(present)
    index = pd.MultiIndex.from_arrays(
        [dates[at_day], stocks[at_stock]], names=["datetime", "instrument"]
    )
    return pd.DataFrame(out[at_day, at_stock], index=index, columns=names)


def wanted_factors(paths: Mapping[str, Any], columns: Sequence[str] | None) -> list:
    """Names of the factors that are asked for, or that the paths allow."""
    allowed = [n for n, (_, kind, _) in FACTORS.items() if paths[kind] is not None]
    if columns is None:
        absent = [n for n in FACTORS if n not in allowed]
        if absent:
            logger.warning(f"high-frequency factors left out, no files: {absent}")
        columns = allowed
    for name in columns:
        if name not in allowed:
            why = f"needs `{FACTORS[name][1]}`" if name in FACTORS else "is no factor"
            raise ValueError(f"`columns` names {name!r}, which {why}; {allowed} are.")
    if not columns:
        raise ValueError("`ms` and `l2` are both left out: there is no factor.")
    return list(columns)


def _bars_a_day(path: str) -> int:
    """Bars of a full session, as the build of the files says; 0 if it does not."""
    options = built_with(path)
    if not options:
        logger.warning(f"{path} does not say its bars a day: `hf_skew` is about zero")
        return 0
    return get_session(options["session"]).slots(options["bar_minutes"])


def _of_the_day(name: str, day: dict[str, np.ndarray], bars: int) -> np.ndarray:
    """Value [t, n] of each day, from the columns of the files."""
    if name == "hf_down_vol":
        return np.sqrt(day["ms_down_ratio"])
    if name != "hf_skew" or not bars:
        return day[FACTORS[name][2][0]]
    total = sum(day[c] for c in _PARTS_OF_DAY)
    second = day["ms_rv"] ** 2 / bars  # moments about zero, a bar
    third = day["ms_skew"] * second**1.5
    mean = total / bars
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt(second - mean**2)
        about = third - 3 * mean * second + 2 * mean**3
        return np.where(spread > 0, about / spread**3, np.nan)


def _trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` rows of what is known; NaN if less than half is."""
    return (
        pd.DataFrame(values)
        .replace([np.inf, -np.inf], np.nan)
        .rolling(window, min_periods=max(1, -(-window // 2)))
        .mean()
        .to_numpy()
    )


def improved_reversal(
    returns: np.ndarray, size: np.ndarray, window: int = 20
) -> np.ndarray:
    """Return of the days with large trades less that of the others.

    Parameters
    ----------
    returns : float64 ndarray [t, n]
        Daily returns.
    size : float64 ndarray [t, n]
        Mean amount a trade, or its logarithm.
    window : int, default 20

    Returns
    -------
    float64 ndarray [t, n]
        Of the window's days that have both, the half with the largest `size` (of an
        odd number the smaller half; of equal sizes the earlier day): sum of their
        returns less the sum of the rest. NaN where less than half of the days do.
    """
    out = np.full(returns.shape, np.nan)
    for t in range(len(returns)):
        rows = slice(max(0, t - window + 1), t + 1)
        r, s = returns[rows], size[rows]
        known = np.isfinite(r) & np.isfinite(s)
        order = np.argsort(np.where(known, -s, np.inf), axis=0, kind="stable")
        r = np.take_along_axis(np.where(known, r, 0.0), order, axis=0)
        count = known.sum(axis=0)
        large = np.arange(len(r))[:, None] < count // 2
        value = np.where(large, r, -r).sum(axis=0)
        out[t] = np.where(2 * count >= window, value, np.nan)
    return out


class HFFactorHandler(FeatureHandler):
    """The ten high-frequency factors as features, net of industries and size.

    `qlib-ext build ms` and `l2` make their files. What the files lack is said: a factor
    whose files are left out by a warning, one without any value too. As factors they
    are judged by `ColumnRecord`, as features any model reads them.

    Parameters
    ----------
    ms_path, l2_path : str or None
        Feature files; None leaves out the factors that need them, as the defaults do
        for one of the two that the store lacks.
    window : int, default 20
        Trading days of the means.
    columns : list of str, optional
        Which of `FACTORS`.
    neutralize_features : list of str, optional
        Risk columns, beside the industry, that the factors are net of; default
        `log_mcap`. What the store lacks is left out, with a warning.
    instruments, start_time, …
        As in `FeatureHandler`, without `features`. The default `infer_processors` are
        the neutralisation and `CSZScore`, which learn nothing.

    Raises
    ------
    ValueError
        For an unknown factor, or files that are not there.
    """

    def __init__(
        self,
        instruments: Universe = "all",
        *,
        ms_path: str | None = "{store}/ms",
        l2_path: str | None = "{store}/l2",
        window: Count = 20,
        columns: Names | None = None,
        neutralize_features: list | None = None,
        infer_processors: list | None = None,
        **kwargs: Any,
    ) -> None:
        paths = {"l2": l2_path, "ms": ms_path}
        # Where one set was not built, its default leaves it out; a path given does not.
        for kind, other in (("l2", "ms"), ("ms", "l2")):
            usual = f"{{store}}/{kind}"
            if paths[kind] == usual and paths[other] is not None:
                paths[kind] = usual if os.path.isdir(expand_store(usual)) else None
        names = wanted_factors(paths, columns)
        for kind, path in paths.items():
            if path is not None and any(FACTORS[n][1] == kind for n in names):
                aggregate_source(kind, path, None, "warn", kwargs)  # raises early
        if infer_processors is None:
            known = self.known(["industry", "market_cap"], instruments, kwargs)
            styles = neutralize_features
            if styles is None:
                styles = ["log_mcap"] if "market_cap" in known else []
            for field in {"industry", "market_cap"} - set(known):
                logger.warning(
                    f"the store has no `${field}`: factors are not net of it"
                )
            infer_processors = [own_processor("CSZScore", fields_group="feature")]
            if known or styles:
                neutral = own_processor(
                    "CSNeutralize",
                    fields_group="feature",
                    industry="industry" if "industry" in known else None,
                    styles=styles,
                )
                infer_processors.insert(0, neutral)
        source = {
            "panel": "data_handlers.high_frequency.high_frequency_factors",
            "kwargs": {
                **paths,
                "window": window,
                "columns": names,
            },
        }
        super().__init__(
            source, instruments, infer_processors=infer_processors, **kwargs
        )


@checked
def day_parts(
    dates: pd.DatetimeIndex,
    spans: Mapping[str, Sequence[tuple]],
    freq: str = "day",
    path: str = "{store}/bars",
    parts: Count = 8,
) -> pd.DataFrame:
    """Merge the day's bars to its parts; a `panel` source of `ParquetDataLoader`.

    Parameters
    ----------
    dates, spans, freq
        See `high_frequency_factors`.
    path : str
        Files of `qlib-ext build bars`.
    parts : int, default 8
        Equal parts of the session; must divide the number of its bars.

    Returns
    -------
    DataFrame
        Rows (datetime, instrument). Columns feature by feature, the first part first:
        ``return_0`` … log return within the part (the first from the day's open);
        ``range_0`` … the largest log(high / low) of its bars; ``volume_0`` … mean
        volume of its bars over the day's mean, minus 1. All known at the close.

    Raises
    ------
    ValueError
        If the files hold no bars, or `parts` does not divide their number.
    """
    where = expand_store(str(path), freq)
    frame = read_daily_parquet(
        where, start_time=dates[0], end_time=dates[-1], missing_years="warn"
    )
    frame = frame[frame.index.get_level_values("instrument").isin(list(spans))]
    slots, left = divmod(frame.shape[1], len(BAR_FEATURES))
    if left or list(frame) != [f.name for f in bar_features(max(slots, 1))]:
        raise ValueError(
            f"`path`: {where} holds no bars side by side; make them with `qlib-ext "
            "build bars`."
        )
    if slots % parts:
        raise ValueError(
            f"`parts` must divide the {slots} bars a day of {where}, got {parts}."
        )
    bars = frame.to_numpy(np.float64).reshape(len(frame), parts, slots // parts, -1)
    merged = {
        "return": bars[..., 0].sum(axis=2),
        "range": bars[..., 1].max(axis=2),
        "volume": bars[..., 2].mean(axis=2),
    }
    names = [f"{name}_{k}" for name in merged for k in range(parts)]
    return pd.DataFrame(
        np.concatenate(list(merged.values()), axis=1).astype(np.float32),
        index=frame.index,
        columns=names,
    )


class IntradayHandler(FeatureHandler):
    """Parts of the day: return, range and volume of each, for `parts` of a model.

    Parameters
    ----------
    path : str, default "{store}/bars"
        Files of `qlib-ext build bars`; ``{store}`` is Qlib's data folder.
    parts : int, default 8
        Equal parts of the session, half hours of four: also the model's `parts`.
    instruments, start_time, …
        As in `FeatureHandler`, without `features`.

    Raises
    ------
    ValueError
        If the files are not there, or `parts` does not divide their bars.
    """

    def __init__(
        self,
        instruments: Universe = "all",
        *,
        path: str = "{store}/bars",
        parts: Count = 8,
        **kwargs: Any,
    ) -> None:
        aggregate_source("bars", path, None, "warn", kwargs)  # raises early
        source = {
            "panel": "data_handlers.high_frequency.day_parts",
            "kwargs": {"path": path, "parts": parts},
        }
        super().__init__(source, instruments, **kwargs)
