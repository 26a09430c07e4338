"""Daily bars in scale-free form: the `day` feature set, 6 features.

One set of statistics must fit all stocks, so each price is taken relative to the
previous adjusted close and volume as turnover (docs/systems/rnn.md).

| feature | formula | unit | known at the close of |
|---|---|---|---|
| open, high, low, close, vwap | price of t / last close before, minus 1 | return | t |
| volume | turnover of t, or log(amount / its mean over 60 days) | ratio | t |

The last close is that of the last day on which the stock traded, so the day after a
suspension has the move over all of it. NaN where a price of t is missing or 0 (the
stock did not trade: the row is dropped), or no close came before (first day of listing:
the value becomes 0, the mean, after standardising).

Of a bar of several days (`bar_days`, weeks of the multi-granularity model) each price
is taken relative to the last close before its first day: the open of that day, the
highest high, the lowest low, the last close and the vwap weighed by volume; `volume` is
its mean over the days. The bar ends at t and has that many trading days or, at a
listing, is missing: it is never filled.

Volume in shares jumps where a split is in the prices but not in it, as in stores of
vendors' adjusted prices; it stands in only where neither turnover nor amount is known.
"""

from __future__ import annotations

from typing import Any

from qlib.log import get_module_logger

from data_handlers.arguments import Count, Universe
from data_handlers.handler import FeatureHandler, on_traded_days
from data_handlers.traded import PREVIOUS_CLOSE

__all__ = ["DayHandler", "day_features", "day_source"]

_PRICES = ("open", "high", "low", "close", "vwap")
# What the feature `volume` is made of, best first.
_VOLUMES = ("turnover", "amount", "volume")


def day_features(known: list[str], bar_days: int = 1) -> tuple[list[str], list[str]]:
    """Expressions and names of the six features.

    Parameters
    ----------
    known : list of str
        Fields that the store has. Without `vwap` the typical price
        (high + low + close) / 3 takes its place; without `turnover` the amount relative
        to its mean over the 60 trading days up to t, and without that the volume so.

    bar_days : int, default 1
        Trading days of a bar, t the last.

    Raises
    ------
    ValueError
        If open, high, low or close is missing, or turnover, amount and volume are.
    """
    for name in ("open", "high", "low", "close"):
        if name not in known:
            raise ValueError(
                f"the store has no values of `${name}` for this universe and time "
                f"range; the day features need it. Fields found: {sorted(known)}."
            )
    prices = {name: f"${name}" for name in _PRICES}
    if "vwap" not in known:
        prices["vwap"] = "($high + $low + $close) / 3"
    scale = next((name for name in _VOLUMES if name in known), None)
    if scale is None:
        raise ValueError(
            "the store has neither `$turnover` nor `$amount` nor `$volume` for this "
            "universe and time range; the day features need one of them."
        )
    volume = f"Traded(${scale})"
    mean = volume if bar_days == 1 else f"Mean({volume}, {bar_days})"
    if scale != "turnover":
        mean = f"Log({mean} / Mean({volume}, 60))"
    if bar_days == 1:
        bars = [f"Traded({p}) / {PREVIOUS_CLOSE} - 1" for p in prices.values()]
        return [*bars, mean], [*prices, "volume"]
    traded = {name: f"Traded({p})" for name, p in prices.items()}
    weight = next((w for w in ("turnover", "volume") if w in known), None)
    vwap = f"Mean({traded['vwap']}, {bar_days})"
    if weight is not None:
        weights = f"Traded(${weight})"
        vwap = f"Sum({traded['vwap']} * {weights}, {bar_days}) / "
        vwap += f"Sum({weights}, {bar_days})"
    bar = {
        "open": f"Ref({traded['open']}, {bar_days - 1})",
        "high": f"Max({traded['high']}, {bar_days})",
        "low": f"Min({traded['low']}, {bar_days})",
        "close": traded["close"],
        "vwap": vwap,
    }
    base = f"LastTraded($close, {bar_days})"
    bars = [f"({p}) / {base} - 1" for p in bar.values()]
    return [on_traded_days(x) for x in (*bars, mean)], [*bar, "volume"]


def day_source(
    handler: FeatureHandler, instruments: Any, kwargs: dict, bar_days: int = 1
) -> dict:
    """Describe the day features that the store allows, as a handler's source."""
    known = handler.known([*_PRICES, *_VOLUMES], instruments, kwargs)
    expressions, names = day_features(known, bar_days)
    if "vwap" not in known:
        get_module_logger("data_handlers").warning(
            "the store has no `$vwap`: the typical price (high + low + close) / 3 "
            "takes its place in the feature `vwap`"
        )
    if not {"turnover", "amount"} & set(known):
        get_module_logger("data_handlers").warning(
            "the store has neither `$turnover` nor `$amount`: the feature `volume` is "
            "made of `$volume`, which jumps at a split that only the prices know"
        )
    return {"expressions": expressions, "names": names}


class DayHandler(FeatureHandler):
    """Six features of the daily bar, neutralised forward-return labels, risk exposures.

    Works on any Qlib day store with adjusted prices. Parameters are `bar_days`, default
    1, trading days of a bar that ends at t (5 for weeks, with `every: 5` of the model),
    and those of `FeatureHandler`, without `features`; `attributes` may be a source such
    as ``{"panel": "data_handlers.holdings.fund_attributes"}``.

    Examples
    --------
    In a workflow::

        handler:
          class: DayHandler
          module_path: data_handlers.day
          kwargs:
            instruments: all
            start_time: 2013-01-01
            end_time: 2020-12-31
            fit_start_time: 2013-01-01
            fit_end_time: 2017-12-31
            horizon: 10
    """

    def __init__(
        self,
        instruments: Universe = "all",
        attributes: dict | None = None,
        bar_days: Count = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            features=day_source(self, instruments, kwargs, bar_days),
            instruments=instruments,
            attributes=attributes,
            **kwargs,
        )
