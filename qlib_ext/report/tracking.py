"""What a tracking page shows: its plan, what recorders hold, and the figures.

See `track.py` for the page.

Glossary: t trading days, n stocks, h horizon in days.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from qlib.data import D
from qlib.workflow.recorder import MLflowRecorder
from torch import Tensor

from data_handlers.arguments import NamedArguments, Whole, check_whole
from qlib_ext import metrics, recorders
from qlib_ext.report import market_data, tables
from qlib_ext.report.factor_record import forward_return
from qlib_ext.report.record import first_column
from qlib_ext.report.studies import residual, tenths
from qlib_ext.workflow import read_yaml

__all__ = [
    "SHORT",
    "Plan",
    "Tracking",
    "add_factor",
    "add_portfolio",
    "add_styles",
    "read_account",
    "read_plan",
    "read_score",
]


# Where records leave an account, ours first.
ACCOUNTS = (
    "enhance/account.parquet",
    "top/account.parquet",
    "portfolio_analysis/report_normal_1day.pkl",
)

#: Folder of the scores that `qlib-ext score` keeps with a recorder.
DAILY = "score"
_ENTRY = {
    "factors": {"experiment", "recorder", "horizon", "pool"},
    "portfolios": {"experiment", "recorder"},
}
_KINDS = ("long_short", "long_only")
SHORT = {"last week": "week", "last month": "month", "year to date": "year"}


class Plan(NamedArguments):
    """What a tracking file asks for.

    Parameters
    ----------
    factors, portfolios : mapping of str to mapping, optional
        Name on the page to ``experiment`` (its newest finished recorder is taken) or
        ``recorder`` (an id or its beginning); a factor may have a ``horizon`` (days of
        its label, by default as its report says, else 10) and a ``pool`` (a market of
        the store, members point in time).
    title : str, default "Tracking"
        Heading, and part of the files' names.
    store : str, default "data/market"
        Qlib store.
    uri : str, default "sqlite:///mlruns.db"
        MLflow store.
    styles : bool, default True
        Show the returns of the store's style factors.
    rebalance : {"week", "month"}, default "week"
        How often the top and bottom 10 % are chosen anew.
    neutral : bool, default False
        Take scores net of the day's industry means before stocks are chosen.
    max_days : int, default 20
        Most days that are scored to bring a factor up to the store's last day.

    Raises
    ------
    ValueError
        On an unknown or wrong entry, or if there is neither factor nor portfolio.
    """

    def __init__(
        self,
        factors: Mapping[str, Mapping[str, Any]] | None = None,
        portfolios: Mapping[str, Mapping[str, Any]] | None = None,
        title: str = "Tracking",
        store: str = "data/market",
        uri: str = "sqlite:///mlruns.db",
        styles: bool = True,
        rebalance: Literal["week", "month"] = "week",
        neutral: bool = False,
        max_days: Whole = 20,
    ) -> None:
        for name, value in (("title", title), ("store", store), ("uri", uri)):
            if not isinstance(value, str) or not value:
                raise ValueError(f"`{name}` must be text, got {value!r}.")
        self.factors = _entries("factors", factors)
        self.portfolios = _entries("portfolios", portfolios)
        if not self.factors and not self.portfolios:
            raise ValueError(
                "`factors` or `portfolios` must name a recorder: write `factors: {GRU: "
                "{experiment: rnn_day_single}}`."
            )


def _entries(kind: str, given: Any) -> dict[str, dict[str, Any]]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"`{kind}` must map names to recorders, got {given!r}.")
    for name, entry in given.items():
        where = f"`{kind}.{name}`"
        if not isinstance(entry, Mapping) or not {"experiment", "recorder"} & set(
            entry
        ):
            raise ValueError(
                f"{where} must have `experiment` or `recorder`, got {entry!r}."
            )
        unknown = sorted(set(entry) - _ENTRY[kind])
        if unknown:
            raise ValueError(
                f"{where} has {unknown}, which is none of {sorted(_ENTRY[kind])}."
            )
        for key in ("experiment", "recorder", "pool"):
            if not isinstance(entry.get(key, ""), str):
                raise ValueError(
                    f"{where}: `{key}` must be text, got {entry[key]!r}; put it in "
                    "quotes."
                )
        if entry.get("horizon") is not None:
            check_whole(f"{kind}.{name}.horizon", entry["horizon"], 1)
    names = [str(name) for name in given]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"`{kind}` has the name {twice[0]!r} twice, as text and not.")
    return {str(name): dict(entry) for name, entry in given.items()}


def read_plan(path: str | Path) -> Plan:
    """Read a tracking file; no template, no tags. ValueError names what is wrong."""
    if not Path(path).is_file():
        raise ValueError(f"`file`: there is no tracking file {path}.")
    return Plan(**read_yaml(path))


@dataclass
class Tracking:
    """All that a page shows.

    Attributes
    ----------
    day : Timestamp
        Last trading day of the store.
    calendar : DatetimeIndex
        The store's trading days.
    rows : dict of str to dict
        ``factor``, ``portfolio`` and ``style``: name to figures by name.
    curves : dict of str to dict of Series
        Lines of the plots, by figure and name.
    gaps : list of str
        What is not shown, or not up to the day, and why.
    changes : DataFrame or None
        Figures beside those of the last issue.
    before : str
        Day of the last issue.
    """

    day: pd.Timestamp
    calendar: pd.DatetimeIndex
    rows: dict[str, dict[str, dict[str, float]]] = field(
        default_factory=lambda: {"factor": {}, "portfolio": {}, "style": {}}
    )
    curves: dict[str, dict[str, pd.Series]] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)
    changes: pd.DataFrame | None = None
    before: str = ""

    def frame(self) -> pd.DataFrame:
        """Long table for the CSV: ``day, kind, name, figure, value``."""
        rows = [
            (f"{self.day:%Y-%m-%d}", kind, name, figure, value)
            for kind, some in self.rows.items()
            for name, figures in some.items()
            for figure, value in figures.items()
        ]
        return pd.DataFrame(rows, columns=["day", "kind", "name", "figure", "value"])

    def table(self, kind: str) -> pd.DataFrame:
        """One row a name, one column a figure."""
        return pd.DataFrame.from_dict(self.rows[kind], orient="index").rename_axis(kind)

    def draw(self, figure: str, name: str, series: pd.Series) -> None:
        """Keep a line for a plot."""
        self.curves.setdefault(figure, {})[name] = series


def read_score(recorder: MLflowRecorder) -> tuple[pd.Series, pd.Timestamp]:
    """Scores of ``pred.pkl``, followed by the days kept by `qlib-ext score`.

    A day that ``pred.pkl`` holds is left as it is.

    Returns
    -------
    score : Series
        By (datetime, instrument).
    end : Timestamp
        Last day of ``pred.pkl``.

    Raises
    ------
    ValueError
        If there is no finite score, or a file holds more than data.
    """
    score = first_column(recorders.load_frame(recorder, "pred.pkl"), "pred.pkl")
    last = score.index.get_level_values("datetime").max()
    parts = [score]
    for path in sorted(recorder.list_artifacts(DAILY) or []):
        name = Path(path).name
        if name.endswith(".parquet") and name[:10] > f"{last:%Y-%m-%d}":
            frame = recorders.load_frame(recorder, f"{DAILY}/{name}")
            order = list(score.index.names)
            parts.append(frame.iloc[:, 0].reorder_levels(order))  # type: ignore[arg-type]
    return pd.concat(parts).rename("score"), last


def read_account(recorder: MLflowRecorder) -> pd.DataFrame:
    """Daily ``return``, ``cost`` and ``bench`` of a recorder's back-test.

    The first day with a purchase and those before it are left out.

    Raises
    ------
    ValueError
        If the recorder holds no account.
    """
    for name in ACCOUNTS:
        if recorders.has_artifact(recorder, name):
            frame = recorders.load_frame(recorder, name)
            lacking = {"return", "cost", "bench"} - set(frame.columns)
            if lacking:
                raise ValueError(f"{name} lacks {sorted(lacking)}.")
            frame.index = pd.DatetimeIndex(frame.index)
            if "turnover" in frame and (frame["turnover"] > 0).any():
                begun = int((frame["turnover"] > 0).to_numpy().argmax())
                frame = frame.iloc[begun + 1 :]
            return frame
    raise ValueError(
        f"recorder {recorder.id} has none of {', '.join(ACCOUNTS)}; add EnhanceRecord, "
        "TopRecord or Qlib's PortAnaRecord to its workflow."
    )


def add_factor(
    out: Tracking,
    name: str,
    score: pd.Series,
    horizon: int = 10,
    *,
    pool: str | None = None,
    rebalance: str = "week",
    neutral: bool = False,
) -> None:
    """Add a factor's correlations, and returns of its top and bottom 10 %.

    ``ic``, ``rank_ic`` and ``closeness`` (e^(-RankMAE)) are means over every scored day
    whose return over `horizon` days, close of t+1 to close of t+1+h, is known;
    ``…_year`` of those days of the last day's year. Stocks are chosen by the score of
    the week's (month's) last day and bought at the next close, at equal weight, without
    costs. ``long_short_week`` is the top's less the bottom's return compounded over
    the last day's week, ``long_only_week`` the top's less the pool's; so month, year.

    Parameters
    ----------
    out : Tracking
        Gets the row, the curves, and a gap if the scores end before its day.
    name : str
    score : Series
        By (datetime, instrument).
    horizon : int, default 10
    pool : str, optional
        Market of the store whose members alone count, day by day.
    rebalance : {"week", "month"}
    neutral : bool, default False
        Take the score net of industry means.
    """
    bars = market_data.load_bars(score)
    begin, stop = bars.scored.start, bars.scored.stop
    days = bars.calendar[begin:]
    panel = tables.panel_of(score, days, bars.instruments)
    close = bars.fields["close"][begin:]
    if pool is not None:
        inside = market_data.membership(pool, days, bars.instruments)
        panel = torch.where(inside, panel, torch.nan)
    last = bars.calendar[stop - 1]
    if last < out.day:
        out.gaps.append(
            f"{name}: scores end {last:%Y-%m-%d}; what it held then is followed to "
            f"{out.day:%Y-%m-%d}."
        )
    label = forward_return(bars.fields["close"], horizon)[begin:]
    daily = {
        "ic": metrics.ic(panel, label, tables.MIN_PAIRS),
        "rank_ic": metrics.rank_ic(panel, label, tables.MIN_PAIRS),
        "closeness": metrics.rank_mae(panel, label, tables.MIN_PAIRS),
    }
    year = torch.from_numpy(np.asarray(days.year == out.day.year))
    row: dict[str, float] = {}
    for figure, series in daily.items():
        row[figure] = metrics.summarise(series).mean
        row[f"{figure}_year"] = metrics.summarise(series[year]).mean
    returns = _tenths(panel, close, days, rebalance, neutral, bars.instruments)
    periods = tables.period_returns(returns)
    for kind in _KINDS:
        for period, short in SHORT.items():
            row[f"{kind}_{short}"] = float(periods[kind][period])
    out.rows["factor"][name] = row
    sums = pd.Series(daily["rank_ic"].numpy(), days).dropna().cumsum()
    out.draw("rank_ic", name, sums)
    out.draw("long_only", name, tables.net_values(returns[["long_only"]])["long_only"])


def _tenths(
    panel: Tensor,
    close: Tensor,
    days: pd.DatetimeIndex,
    rebalance: str,
    neutral: bool,
    instruments: pd.Index,
) -> pd.DataFrame:
    """Daily returns ``long_short`` and ``long_only`` of the top and bottom tenth."""
    ends = metrics.week_ends(days) if rebalance == "week" else metrics.month_ends(days)
    # Without a score that day nothing is chosen, and what is held stays.
    ends = ends[torch.isfinite(panel[ends]).any(1)]
    picked = panel[ends].double()
    if neutral and len(ends):
        frame = D.features(list(instruments), ["$industry"], days[0], days[-1])
        codes = tables.panel_of(frame.iloc[:, 0], days, instruments)
        picked = residual(picked, [], codes[ends])
    _, top, low, pool = tenths(picked, close, ends)
    return pd.DataFrame(
        {"long_short": (top - low).numpy(), "long_only": (top - pool).numpy()}, days
    )


def add_portfolio(out: Tracking, name: str, account: pd.DataFrame) -> None:
    """Add a portfolio's net excess over its benchmark.

    Excess of a day is return less cost less benchmark; ``excess_week`` is it compounded
    over the last day's week, likewise month and year. ``excess_annual`` is geometric,
    ``tracking_error`` the daily deviation times sqrt(252), ``information_ratio`` mean
    over deviation, ``max_drawdown`` that of the compounded excess, all from the start;
    ``…_year`` those of the last day's year.

    Parameters
    ----------
    out : Tracking
    name : str
    account : DataFrame [t]
        See `read_account`.
    """
    excess = account["return"] - account["cost"] - account["bench"]
    excess = excess[excess.index <= out.day].dropna()
    if excess.empty:
        out.gaps.append(f"{name}: its account has no day up to {out.day:%Y-%m-%d}.")
        return
    # Qlib's back-test itself ends on the day before the store's last.
    if (out.calendar > excess.index[-1]).sum() > 1:
        out.gaps.append(
            f"{name}: its account ends {excess.index[-1]:%Y-%m-%d}; run its workflow "
            "again on the longer store."
        )
    calendar = out.calendar[out.calendar >= excess.index[0]]
    whole = excess.reindex(calendar)
    periods = tables.period_returns(whole.to_frame("excess"))["excess"]
    row = {f"excess_{short}": float(periods[p]) for p, short in SHORT.items()}
    for ending, part in (("", excess), ("_year", excess[_this_year(excess, out.day)])):
        figures = tables.performance_of(part)
        row |= {
            f"excess_annual{ending}": figures.annual_return,
            f"tracking_error{ending}": figures.annual_volatility,
            f"information_ratio{ending}": figures.sharpe,
            f"max_drawdown{ending}": figures.max_drawdown,
        }
    del row["excess_annual_year"]  # the compounded one stands beside it
    out.rows["portfolio"][name] = row
    out.draw("excess", name, (1 + excess).cumprod())


def _this_year(series: pd.Series, day: pd.Timestamp) -> np.ndarray:
    return np.asarray(pd.DatetimeIndex(series.index).year == day.year)


def add_styles(out: Tracking, returns: pd.DataFrame) -> None:
    """Add the returns of one unit of each style.

    Parameters
    ----------
    out : Tracking
    returns : DataFrame [t]
        Daily returns of style factors, one column each; the last row is the page's day.
    """
    periods = tables.period_returns(returns)
    for name in returns:
        row = {
            f"return_{short}": float(periods[name][period])
            for period, short in SHORT.items()
        }
        figures = tables.performance_of(returns[name])
        row |= {"annual_mean": figures.annual_mean, "sharpe": figures.sharpe}
        out.rows["style"][str(name)] = row
        out.draw("style", str(name), tables.net_values(returns[[name]])[name])
