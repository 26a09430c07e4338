"""MarketState: what the market as a whole did, as columns that are equal for all stocks.

Group `market`, known at the close of t:

| columns | for each of | what |
|---|---|---|
| `I_return` | index I | close of t over the close before, minus 1 |
| `I_return_mean_d`, `I_return_std_d` | and window d of 5, 10, 20, 30, 60 days | of that return over the d days up to t |
| `I_amount_mean_d`, `I_amount_std_d` | likewise | of the amount over the d days up to t, over the amount of t |
| `winners_S_d_P` | style S, window d of 5, 10, 20, 60 days, pool P | mean exposure, at the close of t-1, of the best tenth of the pool by return from the close of t-d to that of t |

Three indices make 63 numbers; ten styles and three pools 120 more. Source of the 63: Li
et al. (2024), "MASTER: Market-Guided Stock Transformer for Stock Price Forecasting",
AAAI, section "Market Guidance"; https://arxiv.org/abs/2312.15235. Of the 120: Minsheng
Securities, August 2025, whose definition is not public (docs/systems/adaptive.md).
"""  # noqa: E501

from __future__ import annotations

import numpy as np
import pandas as pd
from qlib.log import get_module_logger

from data_handlers.arguments import Day, Names, Positive, Text
from data_handlers.expression.loading import load_panel
from data_handlers.fields import known_fields
from data_handlers.panel import scatter
from data_handlers.processor import FrameProcessor
from data_handlers.processors import RobustClipZScore
from data_handlers.risk import STYLES
from data_handlers.universe import instrument_spans, membership_mask

__all__ = ["MarketState", "winners_state"]

INDICES = ("SH000300", "SH000905", "SH000852")
POOLS = ("csi300", "csi500", "csi1000")
WINDOWS = (5, 10, 20, 30, 60)
WINNER_WINDOWS = (5, 10, 20, 60)
_BEST = 10  # one in ten


class MarketState(FrameProcessor):
    """Add the group `market`: state of indices, and styles of recent winners.

    Values are clipped and standardised over the days of the fit window, each day once;
    what is not known is 0. They come from the store, whatever rows the frame has, but
    for the styles, which are the frame's. Place it behind `CSStyleExposure`.

    Parameters
    ----------
    indices : list of str, default SH000300, SH000905, SH000852
        Codes of the store.
    winners : bool, default False
        Whether the styles of recent winners belong to it; needs the styles in the
        frame's group `risk`.
    pools : list of str, default csi300, csi500, csi1000
        Markets of the store in which winners are sought.
    fit_start_time, fit_end_time : str or date
        Window of the statistics; handlers pass it in.
    n_mad : float, default 7
        Clip distance, see `RobustClipZScore`.
    freq : str, default "day"
        Qlib frequency.

    Raises
    ------
    ValueError
        On an index without bars, naming it, or winners without styles.
    """

    #: The group that it reads: what handles exposures knows it by this name.
    risk_group = "risk"

    def __init__(
        self,
        indices: Names = INDICES,
        winners: bool = False,
        pools: Names = POOLS,
        fit_start_time: Day | None = None,
        fit_end_time: Day | None = None,
        n_mad: Positive = 7,
        freq: Text = "day",
    ):
        for name, value in (("indices", indices), ("pools", pools)):
            if isinstance(value, str) or not value:
                raise ValueError(f"`{name}` must be a list of names, got {value!r}.")
        self.indices, self.pools = list(indices), list(pools)
        self.scale_ = RobustClipZScore(
            fit_start_time, fit_end_time, "market", n_mad, allow_empty=True
        )

    def fit(self, df: pd.DataFrame | None = None) -> None:
        """Learn the statistics on the fit window."""
        if df is None:
            raise ValueError("`df` is None; pass the frame to fit on.")
        self.scale_.fit(self._days(df))

    def __call__(self, df: pd.DataFrame) -> pd.DataFrame:
        """Return a new frame with the group `market` behind the others."""
        days = self.scale_(self._days(df))
        at = days.index.get_level_values("datetime").get_indexer(
            df.index.get_level_values("datetime")
        )
        values = days.to_numpy(np.float32)[at]
        state = pd.DataFrame(values, index=df.index, columns=days.columns)
        state.columns.names = df.columns.names
        return pd.concat([df, state], axis=1)

    def _days(self, df: pd.DataFrame) -> pd.DataFrame:
        """State of each day, one row a day, as a frame that a processor takes."""
        dates = pd.DatetimeIndex(df.index.unique("datetime")).sort_values()
        parts = [index_state(self.indices, dates, self.freq)]
        if self.winners:
            parts.append(winners_state(df, dates, self.pools, self.freq))
        state = pd.concat(parts, axis=1)
        state.columns = pd.MultiIndex.from_product([["market"], state.columns])
        state.index = pd.MultiIndex.from_product(
            [dates, ["~"]], names=["datetime", "instrument"]
        )
        return state


def index_state(
    indices: list[str], dates: pd.DatetimeIndex, freq: str = "day"
) -> pd.DataFrame:
    """State of indices on each day; see the module.

    Parameters
    ----------
    indices : list of str
    dates : DatetimeIndex
    freq : str, default "day"

    Returns
    -------
    DataFrame
        By datetime; NaN where a window lacks days.

    Raises
    ------
    ValueError
        If an index has no bars on these days.
    """
    has = known_fields(["amount", "volume"], indices, dates[0], dates[-1], freq)
    flow = "amount" if "amount" in has else "volume"
    values, past = load_panel(
        ["$close", f"${flow}"], dates, pd.Index(indices), max(WINDOWS), freq
    )
    found: dict[str, pd.Series] = {}
    for i, code in enumerate(indices):
        close, amount = (pd.Series(values[:, i, j].astype(float)) for j in (0, 1))
        if not close[past:].notna().any():
            raise ValueError(
                f"`indices` names {code!r}, which has no bars in the store between "
                f"{dates[0]:%Y-%m-%d} and {dates[-1]:%Y-%m-%d}: the market state needs "
                "it. Add its bars to the store, or name indices that it has."
            )
        moved = close / close.ffill().shift() - 1
        today = amount.where(amount > 0)
        found[f"{code}_return"] = moved
        for d in WINDOWS:
            found[f"{code}_return_mean_{d}"] = moved.rolling(d).mean()
            found[f"{code}_return_std_{d}"] = moved.rolling(d).std()
            found[f"{code}_amount_mean_{d}"] = amount.rolling(d).mean() / today
            found[f"{code}_amount_std_{d}"] = amount.rolling(d).std() / today
    return pd.DataFrame(found)[past:].set_axis(dates)


def winners_state(
    df: pd.DataFrame, dates: pd.DatetimeIndex, pools: list[str], freq: str = "day"
) -> pd.DataFrame:
    """Styles of the recent winners of each pool; see the module.

    Parameters
    ----------
    df : DataFrame
        With style exposures in its group `risk`.
    dates : DatetimeIndex
        The frame's days, ascending.
    pools : list of str
        Markets of the store.
    freq : str, default "day"

    Returns
    -------
    DataFrame
        By datetime; NaN where nobody of the pool is known.
    """
    risk = df["risk"] if "risk" in df.columns.get_level_values(0) else pd.DataFrame()
    styles = [name for name in STYLES if name in risk.columns]
    if not styles:
        raise ValueError(
            "`winners` needs style exposures in the group `risk`: let the handler have "
            "`styles`, or put CSStyleExposure before MarketState."
        )
    if len(styles) < len(STYLES):
        get_module_logger("MarketState").info(
            f"winners' styles: {styles}; the store lacks the others"
        )
    names = pd.Index(df.index.unique("instrument")).sort_values()
    exposure = scatter(pd.DataFrame(risk[styles]), dates, names, np.float32)
    before = np.full_like(exposure, np.nan)
    before[1:] = exposure[:-1]
    close, past = load_panel(["$close"], dates, names, max(WINNER_WINDOWS), freq)
    # The last price of a suspended stock stays.
    price = pd.DataFrame(close[..., 0]).where(lambda x: x > 0).ffill().to_numpy()
    there = np.isfinite(exposure).any(2)
    found: dict[str, np.ndarray] = {}
    for pool in pools:
        member = there & membership_mask(
            instrument_spans(pool, freq=freq), dates, names
        )
        for d in WINNER_WINDOWS:
            gain = np.full(member.shape, np.nan)
            first = max(0, d - past)  # without a price d days earlier
            gain[first:] = price[past + first :] / price[past + first - d : -d] - 1
            mean = _of_the_best(np.where(member, gain, np.nan), before)
            found |= {
                f"winners_{s}_{d}_{pool}": mean[:, k] for k, s in enumerate(styles)
            }
    return pd.DataFrame(found, index=dates)


def _of_the_best(gain: np.ndarray, exposure: np.ndarray) -> np.ndarray:
    """Mean exposure [t, k] of the best tenth by gain [t, n], at least one stock."""
    known = np.isfinite(gain)
    count = known.sum(1)
    best = np.where(count > 0, np.maximum(1, count // _BEST), 0)
    most = max(1, int(best.max()))
    order = np.argsort(np.where(known, -gain, np.inf), axis=1, kind="stable")[:, :most]
    chosen = np.take_along_axis(exposure, order[..., None], axis=1)  # [t, most, k]
    counts = (np.arange(most) < best[:, None])[..., None] & np.isfinite(chosen)
    total = np.where(counts, chosen, 0.0).sum(1)
    number = counts.sum(1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
