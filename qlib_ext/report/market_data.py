"""What a report reads from the Qlib store: prices, limits, pools, risk.

Glossary: t calendar days, n instruments, m sampled days.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from qlib.config import C
from qlib.data import D
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandlerLP
from qlib.log import get_module_logger
from qlib.utils import class_casting
from torch import Tensor

import data_handlers.traded  # noqa: F401 - registers the operators with Qlib
from data_handlers.boards import (
    AT_LIMIT,
    NEAR_LIMIT,
    board_of,
    limit_prices,
    limit_ratio,
)
from data_handlers.codes import CODE
from data_handlers.expression.loading import read_values
from data_handlers.fields import known_fields
from data_handlers.loaders import read_daily_parquet
from data_handlers.panel import scatter
from data_handlers.universe import instrument_spans, membership_mask
from qlib_ext import metrics
from qlib_ext.report.tables import panel_of

__all__ = [
    "CLASSIC_WINDOW",
    "Bars",
    "classic_factors",
    "intraday_factors",
    "load_bars",
    "market_names",
    "membership",
    "price_limits",
    "risk_frame",
]

logger = get_module_logger("qlib_ext.report")

CLASSIC_WINDOW = 60
# Values of some days' windows: what stays in a core's cache.
_CELLS = 50_000
_INTRADAY_WINDOW = 20
_INTRADAY_MEANS = ("skew", "kurt", "jump", "mom", "apb", "arpp")
_INTRADAY_SPREADS = ("vhhi", "vvol")
_FIELDS = (
    "close",
    "vwap",
    "volume",
    "amount",
    "turnover",
    "limit_up",
    "limit_down",
    "factor",
)
# Fewest known days in a window, as a share of it.
_KNOWN_SHARE = 2 / 3


@dataclass(frozen=True)
class Bars:
    """Fields of the store as panels that reach before and beyond the scored days.

    Attributes
    ----------
    calendar : DatetimeIndex [t]
        Trading days, from the look-back of the classic factors to the store's end.
    scored : slice
        Rows of the scored days.
    instruments : Index [n]
    fields : dict of str to Tensor [t, n]
        Known fields by name, float32; NaN on days without trades, by `Traded`.
    """

    calendar: pd.DatetimeIndex
    scored: slice
    instruments: pd.Index
    fields: dict[str, Tensor]

    @property
    def days(self) -> pd.DatetimeIndex:
        """Scored days."""
        return self.calendar[self.scored]

    def during(self, field: str) -> Tensor:
        """Panel of a field on the scored days."""
        return self.fields[field][self.scored]


def load_bars(score: pd.Series) -> Bars:
    """Read what the report needs about the instruments and days of a score.

    Raises
    ------
    ValueError
        If the score has days outside the store's calendar, or there are no closes.
    """
    dates = pd.DatetimeIndex(score.index.unique("datetime"))
    instruments = score.index.unique("instrument").sort_values()
    calendar = pd.DatetimeIndex(D.calendar())
    strange = dates.difference(calendar)
    if len(strange):
        raise ValueError(
            f"pred.pkl has {len(strange)} days that are not in the store's calendar, "
            f"first {strange[0]:%Y-%m-%d}; point `provider_uri` at the store the "
            "predictions were made on."
        )
    first = int(calendar.searchsorted(dates.min()))
    last = int(calendar.searchsorted(dates.max()))
    start = max(0, first - CLASSIC_WINDOW - 1)
    calendar = calendar[start:]
    known = known_fields(list(_FIELDS), list(instruments), calendar[0], calendar[-1])
    if "close" not in known:
        raise ValueError(
            "the store has no `$close` for the instruments of pred.pkl; point "
            "`provider_uri` at the store the predictions were made on."
        )
    traded = [f"Traded(${x})" for x in known]
    frame = read_values(instruments, traded, calendar[0])
    frame.columns = list(known)
    fields = {x: panel_of(frame[x], calendar, instruments) for x in known}
    return Bars(
        calendar=calendar,
        scored=slice(first - start, last - start + 1),
        instruments=instruments,
        fields=fields,
    )


def market_names() -> list[str]:
    """Markets of the store other than ``all``, in alphabetical order."""
    folder = Path(C.dpm.get_data_uri("day")) / "instruments"
    return sorted(p.stem for p in folder.glob("*.txt") if p.stem != "all")


def industry_names() -> dict[str, str]:
    """Names of the industry codes, if the store keeps them."""
    path = Path(C.dpm.get_data_uri("day")) / "tables" / "industry.json"
    if not path.is_file():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def membership(market: str, days: pd.DatetimeIndex, instruments: pd.Index) -> Tensor:
    """Whether each instrument belongs to a market on each day, ``[t, n]`` bool."""
    spans = instrument_spans(market, days[0], days[-1])
    return torch.from_numpy(membership_mask(spans, days, instruments))


def price_limits(bars: Bars) -> tuple[Tensor, Tensor] | None:
    """Whether each stock can be bought, and sold, at the close of each scored day.

    A close at the upper limit has no sellers, one at the lower limit no buyers. Without
    limit prices the rules of the mainland Chinese boards stand in, rounded to the fen
    where the store's `$factor` tells it; stocks of special treatment are then unknown.
    None if there are codes of other markets too.
    """
    close = bars.during("close")
    if not {"limit_up", "limit_down"} <= set(bars.fields):
        return _limits_by_board(bars)
    # A comparison with an unknown limit is false, and a day without limits is free.
    buyable = ~(close >= bars.during("limit_up") * (1 - AT_LIMIT))
    sellable = ~(close <= bars.during("limit_down") * (1 + AT_LIMIT))
    return buyable, sellable


def _limits_by_board(bars: Bars) -> tuple[Tensor, Tensor] | None:
    if not all(CODE.fullmatch(str(x)) for x in bars.instruments):
        return None
    close = bars.fields["close"].double()
    held = np.full(close.shape, np.nan)
    held[1:] = metrics.forward_fill(close)[:-1].numpy()
    now = close.numpy()
    boards = [board_of(str(x)) for x in bars.instruments]
    of_board = {b: limit_ratio(b, bars.calendar) for b in set(boards)}
    ratio = np.stack([of_board[b] for b in boards], axis=1)
    factor = np.full(close.shape, np.nan)
    if "factor" in bars.fields:
        factor = bars.fields["factor"].double().numpy()
        # A factor that does not give whole fen is none: prices were adjusted before.
        fen = 100 * now / factor
        whole = np.abs(fen - np.round(fen)) <= 1e-4 + 3e-7 * fen
        factor = np.where(whole, factor, np.nan)
    up, down = limit_prices(held, ratio, factor)
    # Beyond the limit there was none that day: a new listing, or a correction.
    room = np.where(np.isfinite(factor), AT_LIMIT, 2 * NEAR_LIMIT)
    at_up = (now >= up * (1 - AT_LIMIT)) & (now <= up * (1 + room))
    at_down = (now <= down * (1 + AT_LIMIT)) & (now >= down * (1 - room))
    free = [torch.from_numpy(~x)[bars.scored] for x in (at_up, at_down)]
    return free[0], free[1]


def classic_factors(bars: Bars, at: Tensor) -> dict[str, Tensor]:
    """Price and volume factors that every desk has, at the close of some days.

    ``ret`` return, ``vol`` standard deviation of daily returns, ``lnto`` log mean
    turnover, ``ivol`` residual standard deviation and ``ivr`` 1 - R2 of daily returns
    regressed on the pool's equal-weight return, ``lnamihud`` log mean of |return| /
    amount, each over 60 days; ``apb_5d`` log of the mean vwap over the
    volume-weighted vwap of 5 days.

    The reports name them without formulas `[gap]`: ivol and ivr use one market
    factor, for the reports' size and value factors need data that few stores have.

    Parameters
    ----------
    bars : Bars
    at : Tensor [m]
        Rows of the calendar.

    Returns
    -------
    dict of str to Tensor [m, n]
        float64. NaN with fewer than two thirds of the days known. Factors whose fields
        the store lacks are left out.
    """
    fields = bars.fields
    close = fields["close"].double()
    held = metrics.forward_fill(close)
    returns = torch.full_like(close, torch.nan)
    returns[1:] = close[1:] / held[:-1] - 1
    market = returns.nanmean(1, keepdim=True)
    amount = fields.get("amount")
    if amount is None and "volume" in fields:
        price = fields.get("vwap", fields["close"])
        amount = fields["volume"].double() * price
    names = ["ret", "vol", "ivol", "ivr"]
    names += ["lnto"] if "turnover" in fields else []
    names += ["lnamihud"] if amount is not None else []
    with_vwap = amount is not None and {"vwap", "volume"} <= set(fields)
    names += ["apb_5d"] if with_vwap else []
    out = {name: close.new_full((len(at), close.shape[1]), torch.nan) for name in names}
    window = CLASSIC_WINDOW
    back = torch.arange(1 - window, 1)
    days_at_once = max(1, _CELLS // (window * close.shape[1]))
    for rows in torch.nonzero(at >= window)[:, 0].split(days_at_once):
        day = at[rows]
        span = day[:, None] + back
        r = returns[span]  # [d, window, n]
        enough = torch.isfinite(r).sum(1) >= _KNOWN_SHARE * window
        enough &= torch.isfinite(close[day])
        values = {"ret": close[day] / held[day - window] - 1}
        values["vol"], values["ivol"], values["ivr"] = _market_model(r, market[span])
        if "turnover" in fields:
            values["lnto"] = fields["turnover"][span].double().nanmean(1).log()
        if amount is not None:
            # A day without trades has no price of liquidity.
            traded = torch.where(amount[span] > 0, amount[span].double(), torch.nan)
            values["lnamihud"] = (r.abs() / traded).nanmean(1).log()
        if with_vwap:
            few = span[:, -5:]
            vwap, volume = (fields[x][few].double() for x in ("vwap", "volume"))
            volume = torch.where(torch.isfinite(vwap), volume, 0.0).nan_to_num(0.0)
            weighted = (vwap.nan_to_num(0.0) * volume).sum(1) / volume.sum(1)
            values["apb_5d"] = (vwap.nanmean(1) / weighted).log()
        for name in names:
            kept = enough & torch.isfinite(values[name])
            out[name][rows] = torch.where(kept, values[name], torch.nan)
    return out


def intraday_factors(bars: Bars) -> dict[str, Tensor]:
    """Classic intraday factors, where the store has minute features.

    Over 20 days: mean of `ms_skew`, `ms_kurt`, `ms_jump`, `ms_mom`, `ms_apb` and
    `ms_arpp`, named without the prefix, and standard deviation of `ms_vhhi` and
    `ms_vvol`, ``sdvhhi`` and ``sdvvol``.

    Returns
    -------
    dict of str to Tensor [t, n]
        On the scored days. NaN with fewer than two thirds of the 20 days known. Empty
        without minute features, or if their files cannot be read, which is logged.
    """
    folder = Path(C.dpm.get_data_uri("day")) / "ms"
    if not folder.is_dir():
        return {}
    columns = [f"ms_{x}" for x in (*_INTRADAY_MEANS, *_INTRADAY_SPREADS)]
    first = max(0, bars.scored.start - _INTRADAY_WINDOW)
    days = bars.calendar[first : bars.scored.stop]
    try:
        frame = read_daily_parquet(
            folder, columns, days[0], days[-1], missing_years="warn"
        )
    except ValueError as error:
        logger.warning(f"no intraday factors in the report: {error}")
        return {}
    least = int(np.ceil(_KNOWN_SHARE * _INTRADAY_WINDOW))
    out = {}
    for column in columns:
        values = scatter(frame[column], days, bars.instruments)
        window = pd.DataFrame(values).rolling(_INTRADAY_WINDOW, min_periods=least)
        name = column.removeprefix("ms_")
        spread = name in _INTRADAY_SPREADS
        result = (window.std() if spread else window.mean()).to_numpy()
        kept = torch.from_numpy(result[bars.scored.start - first :].copy())
        out[f"sd{name}" if spread else name] = kept
    return out


def _market_model(r: Tensor, market: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Regress on the market: std, residual std and 1 - R2, ``[d, n]`` each."""
    known = torch.isfinite(r) & torch.isfinite(market)
    count = known.sum(1, keepdim=True)
    y = torch.where(known, r, 0.0)
    x = torch.where(known, market.expand_as(r), 0.0)
    y = torch.where(known, y - y.sum(1, keepdim=True) / count, 0.0)
    x = torch.where(known, x - x.sum(1, keepdim=True) / count, 0.0)
    total = (y * y).sum(1)
    explained = (x * y).sum(1) ** 2 / (x * x).sum(1)
    left = (total - explained).clamp(min=0)
    count = count[:, 0]
    return ((total / (count - 1)).sqrt(), (left / (count - 2)).sqrt(), left / total)


def risk_frame(dataset: Any, segment: str | slice) -> pd.DataFrame | None:
    """Columns of the handler's ``risk`` group on a segment; None without one."""
    handler = getattr(dataset, "handler", None)
    if not isinstance(handler, DataHandlerLP):
        return None
    columns = handler.get_cols(DataHandlerLP.CS_RAW)
    if "risk" not in {c[0] for c in columns if isinstance(c, tuple)}:
        return None
    # As Qlib's SignalRecord does: a TSDatasetH would prepare windows, not a frame.
    with class_casting(dataset, DatasetH):
        frame = dataset.prepare(segment, col_set="risk", data_key=DataHandlerLP.DK_I)
    if frame.columns.nlevels > 1:
        frame = frame.droplevel(0, axis=1)
    return frame
