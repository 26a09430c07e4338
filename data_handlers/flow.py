"""Capital flow by order size: the `C` feature family.

Inputs are eight daily amounts in the store, `$flow_buy_small` …
`$flow_sell_xlarge` (`data_handlers.aggregate.schema.FLOW_FIELDS`, CNY): what aggressive
orders of each size class bought and sold. They come from ticks (`qlib-ext build flow
--bins all`), from a vendor's flow table (`qlib-ext ingest` with the columns mapped, see
the preset `tushare`), or from the embedded market. Where a class ends is the source's
convention; the features compare a stock with itself and others of the same source only.

Notation: B, S amounts bought and sold, N = B − S, T = B + S, over all classes or those
named; main = large and extra-large; `x[5]` is the sum over the five trading days up to
t. All features are known at the close of t and are Qlib expressions. A day without
trades has no row; in a trailing window unknown days are passed over, as Qlib's rolling
operators do, so a new listing has its features from the first day, over fewer days.
"""

from __future__ import annotations

from typing import Any

from data_handlers.aggregate.schema import FLOW_CLASSES, FLOW_FIELDS, FeatureDef
from data_handlers.arguments import Names, Universe
from data_handlers.handler import FeatureHandler, on_traded_days
from data_handlers.traded import DAILY_RETURN

__all__ = [
    "FLOW_FEATURES",
    "FLOW_STATES",
    "FlowHandler",
    "flow_expressions",
    "flow_net",
    "flow_total",
]

_MAIN = ("large", "xlarge")
_INF = float("inf")


def _sum(side: str, classes: tuple[str, ...]) -> str:
    return "(" + " + ".join(f"$flow_{side}_{name}" for name in classes) + ")"


def flow_net(*classes: str) -> str:
    """Qlib expression of what the classes bought minus what they sold, CNY."""
    return f"({_sum('buy', classes)} - {_sum('sell', classes)})"


def flow_total(*classes: str) -> str:
    """Qlib expression of what the classes bought plus what they sold, CNY."""
    return f"({_sum('buy', classes)} + {_sum('sell', classes)})"


def _feature(name, expression, formula, low, high, nan, unit="share", needs=()):
    return FeatureDef(name, formula, unit, low, high, nan, needs=needs), expression


def _steps(x: str, *bounds: float) -> str:
    """Code 1, 2, … by how many bounds x exceeds; NaN where x is."""
    parts = " + ".join(f"If({x} > {bound}, 1, 0)" for bound in bounds)
    return f"1 + {parts} + 0 * {x}"


def _features() -> list[tuple[FeatureDef, str]]:
    """Definition and expression of each feature, in order."""
    net, total = flow_net(*FLOW_CLASSES), flow_total(*FLOW_CLASSES)
    main, main_total = flow_net(*_MAIN), flow_total(*_MAIN)
    small, small_total = flow_net("small"), flow_total("small")
    share, none = f"({main} / {total})", "no flow"
    out = [_feature("c_net", f"{net} / {total}", "N/T", -1, 1, none)]
    out += [
        _feature(f"c_net_{x}", f"{flow_net(x)} / {total}", f"N({x})/T", -1, 1, none)
        for x in FLOW_CLASSES
    ]
    out.append(_feature("c_main", share, "N(main)/T", -1, 1, none))
    out += [
        _feature(f"c_share_{x}", f"{flow_total(x)} / {total}", f"T({x})/T", 0, 1, none)
        for x in ("small", "large", "xlarge")
    ]
    for side in ("buy", "sell"):
        every = _sum(side, tuple(FLOW_CLASSES))
        ratio, letter = f"{_sum(side, _MAIN)} / {every}", side[0].upper()
        formula = f"{letter}(main)/{letter}"
        why = f"nothing was {'bought' if side == 'buy' else 'sold'} aggressively"
        out.append(_feature(f"c_{side}_main", ratio, formula, 0, 1, why))
    out.append(
        _feature(
            "c_main_small",
            f"{main} / {main_total} - {small} / {small_total}",
            "N(main)/T(main) − N(small)/T(small)",
            -2,
            2,
            "no flow of either",
        )
    )
    for days in (5, 20):
        sums, why = f"Sum({total}, {days})", f"no flow on {days} days"
        for name, part, letter in (("net", net, "N"), ("main", main, "N(main)")):
            ratio = f"Sum({part}, {days}) / {sums}"
            formula = f"{letter}[{days}]/T[{days}]"
            out.append(_feature(f"c_{name}_{days}", ratio, formula, -1, 1, why))
    out += [
        _feature(
            "c_main_turn",
            f"Sum({main}, 5) / Sum({total}, 5) - Sum({main}, 20) / Sum({total}, 20)",
            "c_main_5 − c_main_20",
            -2,
            2,
            "no flow on 5 days",
        ),
        _feature(
            "c_main_days",
            f"Mean(Sign({main}), 20)",
            "mean sign of N(main), 20 days",
            -1,
            1,
            "no flow on 20 days",
        ),
        _feature(
            "c_main_strength",
            f"Mean({share}, 20) / (Std({share}, 20) + 0.001)",
            "mean/(std + 0.001) of c_main, 20 days",
            -_INF,
            _INF,
            "fewer than 2 days of flow among 20",
            "1",
        ),
        _feature(
            "c_volume",
            f"Log({total} / Mean({total}, 20))",
            "log(T/mean of T over 20 days)",
            -_INF,
            _INF,
            none,
            "log",
        ),
        _feature(
            "c_main_price",
            f"Corr({share}, {DAILY_RETURN}, 20)",
            "corr(c_main, day's return), 20 days",
            -1,
            1,
            "fewer than 2 common days among 20, or one of them constant",
            "1",
        ),
        _feature(
            "c_known",
            f"{total} / $amount",
            "T/amount of the day: share of it that has an aggressor",
            0,
            _INF,
            "no amount",
            needs=("amount",),
        ),
        _feature(
            "c_s_net",
            _steps(share, -0.1, -0.02, 0.02, 0.1),
            "c_main above −10 %, −2 %, 2 %, 10 %",
            1,
            5,
            none,
            "code",
        ),
        _feature(
            "c_s_who",
            f"1 + If({main} > 0, 2, 0) + If({small} > 0, 1, 0) + 0 * {share}",
            "1 all sell, 2 small buy from main, 3 main buy from small, 4 all buy",
            1,
            4,
            none,
            "code",
        ),
        _feature(
            "c_s_turn",
            f"1 + If(Sum({main}, 5) > 0, 2, 0) + If({main} > 0, 1, 0) + 0 * {share}",
            "signs of N(main)[5] and N(main): 1 − −, 2 − +, 3 + −, 4 + +",
            1,
            4,
            none,
            "code",
        ),
        _feature(
            "c_s_active",
            _steps(f"({net} / {total})", -0.1, 0.1),
            "active purchases below 45 %, between, above 55 % of T",
            1,
            3,
            none,
            "code",
        ),
    ]
    return out


#: The features in the order of their columns.
FLOW_FEATURES: tuple[FeatureDef, ...] = tuple(f for f, _ in _features())
#: Columns that are codes of states (0 is unknown), and the number of states.
FLOW_STATES = {f.name: int(f.high) for f in FLOW_FEATURES if f.unit == "code"}


def flow_expressions(known: list[str]) -> tuple[list[str], list[str]]:
    """Expressions and names of the features.

    Parameters
    ----------
    known : list of str
        Fields that the store has. Without `amount` the feature `c_known` is left out.

    Raises
    ------
    ValueError
        If a flow field is missing.
    """
    absent = [name for name in FLOW_FIELDS if name not in known]
    if absent:
        raise ValueError(
            f"the store has no values of `${absent[0]}` for this universe and time "
            "range; the capital-flow features need all of "
            f"{', '.join('$' + n for n in FLOW_FIELDS)}. Build them from ticks "
            "(`qlib-ext build flow --source TICKS --out STORE --bins all`), or map a "
            "vendor's flow table in `qlib-ext ingest`."
        )
    chosen = [(f, e) for f, e in _features() if set(f.needs) <= set(known)]
    return [on_traded_days(e) for _, e in chosen], [f.name for f, _ in chosen]


class FlowHandler(FeatureHandler):
    """Capital flow by order size, with DayHandler's labels and risk exposures.

    The state columns (`FLOW_STATES`) keep their codes; name them in the model's
    `categories`.

    Parameters
    ----------
    columns : list of str, optional
        Features to use, default all that the store allows.
    instruments, start_time, …
        As in `FeatureHandler`, without `features` and `categories`; a workflow names
        it as it does `DayHandler`.

    Raises
    ------
    ValueError
        If the store lacks a flow field, or `columns` names something else.
    """

    def __init__(
        self,
        instruments: Universe = "all",
        *,
        columns: Names | None = None,
        **kwargs: Any,
    ) -> None:
        known = self.known([*FLOW_FIELDS, "amount"], instruments, kwargs)
        expressions, names = flow_expressions(known)
        if columns is not None:
            chosen = dict(zip(names, expressions, strict=True))
            absent = [c for c in columns if c not in chosen]
            if absent or not columns:
                raise ValueError(
                    f"`columns` must name some of {names}, got {list(columns)}."
                )
            names = list(columns)
            expressions = [chosen[c] for c in names]
        super().__init__(
            features={"expressions": expressions, "names": names},
            categories=[c for c in names if c in FLOW_STATES],
            instruments=instruments,
            **kwargs,
        )
