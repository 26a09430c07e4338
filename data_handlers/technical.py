"""Technical indicators and encoded K-line states: the `G` feature family.

The report names the family, the list is `[gap]`: 33 indicators in scale-free form and
10 states. Indicators and candlestick patterns come from TA-Lib (BSD licence), whose
code is their common reference; what it has not, or returns as 0 where nothing is
defined, is computed here. `TECHNICAL_FEATURES` defines each column.

Bars
----
Adjusted prices and volume of the stock's *traded* days: a suspension is passed over,
the bar before it is the previous bar of the one after it, and the suspended day has no
row. A day that lacks one of the five fields, or has no volume, is no traded day. All
columns of t are known at the close of t.

Where a series begins
---------------------
An indicator over n bars is NaN for the first n - 1 (and one more where it needs a
return). Indicators with a recursive average (`RECURSIVE`) remember their first bar;
they are NaN for the first `WARM_UP` bars, after which the weight of what lay before is
below 1 %. They always start at the store's first bar of the stock, so no value depends
on `start_time` or on a segment.

States
------
Codes 1, 2, … of a category, NaN (0 in a model) where unknown; `TECHNICAL_STATES` says
how many. A model takes their names in `categories` and embeds them. Where two
candlestick patterns of one length are there at once the code is the first one's in
`PATTERNS`.

Notation: o, h, l, c, v of the bar, p the close of the bar before; m_n the mean of the
last n closes; x[k] is x of k bars ago.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import talib

from data_handlers.aggregate.schema import FeatureDef
from data_handlers.arguments import Names, Universe
from data_handlers.handler import FeatureHandler

__all__ = [
    "PATTERNS",
    "RECURSIVE",
    "TECHNICAL_FEATURES",
    "TECHNICAL_NAMES",
    "TECHNICAL_STATES",
    "WARM_UP",
    "TechnicalHandler",
    "technical_features",
]

#: Bars before a recursive indicator has its first value.
WARM_UP = 120
FIELDS = ("open", "high", "low", "close", "volume")
#: Candlestick patterns by length: TA-Lib's function and the signs it can give. Each
#: pair of function and sign is a code of its own, from 2 on; 1 is no pattern.
PATTERNS: dict[int, tuple[tuple[str, tuple[int, ...]], ...]] = {
    1: (
        ("CDLDRAGONFLYDOJI", (1,)),
        ("CDLGRAVESTONEDOJI", (1,)),
        ("CDLLONGLEGGEDDOJI", (1,)),
        ("CDLDOJI", (1,)),
        ("CDLHAMMER", (1,)),
        ("CDLHANGINGMAN", (-1,)),
        ("CDLINVERTEDHAMMER", (1,)),
        ("CDLSHOOTINGSTAR", (-1,)),
        ("CDLMARUBOZU", (1, -1)),
        ("CDLBELTHOLD", (1, -1)),
        ("CDLSPINNINGTOP", (1, -1)),
        ("CDLLONGLINE", (1, -1)),
        ("CDLSHORTLINE", (1, -1)),
    ),
    2: (
        ("CDLKICKING", (1, -1)),
        ("CDLPIERCING", (1,)),
        ("CDLDARKCLOUDCOVER", (-1,)),
        ("CDLHARAMICROSS", (1, -1)),
        ("CDLENGULFING", (1, -1)),
        ("CDLCOUNTERATTACK", (1, -1)),
        ("CDLSEPARATINGLINES", (1, -1)),
        ("CDLDOJISTAR", (1, -1)),
        ("CDLINNECK", (-1,)),
        ("CDLONNECK", (-1,)),
        ("CDLTHRUSTING", (-1,)),
        ("CDLMATCHINGLOW", (1,)),
        ("CDLHOMINGPIGEON", (1,)),
        ("CDLHARAMI", (1, -1)),
    ),
    3: (
        ("CDLABANDONEDBABY", (1, -1)),
        ("CDLMORNINGDOJISTAR", (1,)),
        ("CDLEVENINGDOJISTAR", (-1,)),
        ("CDLMORNINGSTAR", (1,)),
        ("CDLEVENINGSTAR", (-1,)),
        ("CDLTRISTAR", (1, -1)),
        ("CDLUNIQUE3RIVER", (1,)),
        ("CDLUPSIDEGAP2CROWS", (-1,)),
        ("CDL2CROWS", (-1,)),
        ("CDLIDENTICAL3CROWS", (-1,)),
        ("CDL3BLACKCROWS", (-1,)),
        ("CDL3WHITESOLDIERS", (1,)),
        ("CDLADVANCEBLOCK", (-1,)),
        ("CDLSTALLEDPATTERN", (-1,)),
        ("CDLTASUKIGAP", (1, -1)),
        ("CDLGAPSIDESIDEWHITE", (1, -1)),
        ("CDL3INSIDE", (1, -1)),
        ("CDL3OUTSIDE", (1, -1)),
    ),
}
_INF = float("inf")
_FLAT = "no price moved in the window"


def _bars(count: int) -> str:
    return f"first {count} bar{'s' if count > 1 else ''}"


def _patterns(days: int) -> int:
    return 1 + sum(len(signs) for _, signs in PATTERNS[days])


_WARM = _bars(WARM_UP)
#: The features in the order of their columns.
TECHNICAL_FEATURES: tuple[FeatureDef, ...] = (
    # -- the bar
    FeatureDef("g_body", "(c − o)/p", "return", -_INF, _INF, _bars(1)),
    FeatureDef("g_upper", "(h − max(o, c))/p", "return", 0, _INF, _bars(1)),
    FeatureDef("g_lower", "(min(o, c) − l)/p", "return", 0, 1, _bars(1)),
    FeatureDef("g_gap", "o/p − 1", "return", -1, _INF, _bars(1)),
    FeatureDef("g_place", "(c − l)/(h − l)", "share", 0, 1, "h = l"),
    # -- trend
    *(
        FeatureDef(f"g_bias_{n}", f"c/m_{n} − 1", "return", -1, _INF, _bars(n - 1))
        for n in (5, 10, 20, 60)
    ),
    FeatureDef("g_macd", "DIF/c, MACD(12, 26)", "return", -_INF, _INF, _WARM),
    FeatureDef(
        "g_macd_hist", "(DIF − DEA)/c, DEA over 9", "return", -_INF, _INF, _WARM
    ),
    FeatureDef(
        "g_slope_20",
        "least-squares slope of 20 closes/c",
        "return/bar",
        -_INF,
        _INF,
        _bars(19),
    ),
    FeatureDef("g_trix_12", "x/x[1] − 1, x triple EMA(12)", "return", -1, _INF, _WARM),
    FeatureDef("g_adx_14", "ADX/100", "1", 0, 1, _WARM),
    FeatureDef("g_di_14", "(+DI − −DI)/100", "1", -1, 1, f"{_WARM}; {_FLAT}"),
    FeatureDef(
        "g_aroon_25",
        "(bars since low − bars since high)/25, 26 bars, the latest of equals",
        "1",
        -1,
        1,
        _bars(25),
    ),
    FeatureDef("g_psy_12", "share of 12 bars with c > p", "share", 0, 1, _bars(12)),
    # -- oscillators
    FeatureDef("g_rsi_6", "RSI/100, Wilder", "share", 0, 1, f"{_WARM}; {_FLAT}"),
    FeatureDef("g_rsi_14", "RSI/100, Wilder", "share", 0, 1, f"{_WARM}; {_FLAT}"),
    FeatureDef(
        "g_stoch_k",
        "mean of 3 of (c − min l)/(max h − min l) over 9",
        "share",
        0,
        1,
        f"{_bars(12)}; {_FLAT}",
    ),
    FeatureDef(
        "g_stoch_d", "mean of 3 of g_stoch_k", "share", 0, 1, f"{_bars(12)}; {_FLAT}"
    ),
    FeatureDef(
        "g_willr_14",
        "(c − max h)/(max h − min l) over 14",
        "share",
        -1,
        0,
        f"{_bars(13)}; {_FLAT}",
    ),
    FeatureDef(
        "g_cci_14",
        "(x − mean x)/(1.5 · mean|x − mean x|), x = (h + l + c)/3, over 14",
        "1",
        -_INF,
        _INF,
        f"{_bars(13)}; {_FLAT}",
    ),
    FeatureDef(
        "g_ultosc",
        "(4 a_7 + 2 a_14 + a_28)/7, a_n = Σ(c − min(l, p))/ΣTR",
        "share",
        0,
        1,
        f"{_bars(28)}; {_FLAT}",
    ),
    FeatureDef("g_roc_10", "c/c[10] − 1", "return", -1, _INF, _bars(10)),
    FeatureDef("g_roc_20", "c/c[20] − 1", "return", -1, _INF, _bars(20)),
    # -- volatility
    FeatureDef("g_natr_14", "ATR/c, Wilder", "return", 0, _INF, _WARM),
    FeatureDef(
        "g_boll_place",
        "(c − m_20)/(2 std), population std of 20 closes",
        "1",
        -_INF,
        _INF,
        f"{_bars(19)}; {_FLAT}",
    ),
    FeatureDef("g_boll_width", "4 std/m_20", "return", 0, _INF, _bars(19)),
    # -- volume
    FeatureDef(
        "g_volume", "log(mean of 5 v/mean of 20 v)", "log", -_INF, 1.39, _bars(19)
    ),
    FeatureDef("g_obv_20", "Σ sign(c − p) v/Σv over 20", "share", -1, 1, _bars(20)),
    FeatureDef(
        "g_cmf_20",
        "Σ v (2c − h − l)/(h − l)/Σv over 20, a bar with h = l counts 0",
        "share",
        -1,
        1,
        _bars(20),
    ),
    FeatureDef(
        "g_mfi_14",
        "share of the rising x in Σ x v over 14, x = (h + l + c)/3",
        "share",
        0,
        1,
        f"{_bars(14)}; {_FLAT}",
    ),
    # -- states
    FeatureDef(
        "g_s_body",
        "|c − o| > mean of 10 before: 1 long down, 5 long up; else 2 down, 4 up; "
        "3 doji: |c − o| ≤ mean(h − l of 10 before)/10",
        "code",
        1,
        5,
        _bars(10),
    ),
    FeatureDef(
        "g_s_shadow",
        "shadow > body: 1 none, 2 upper, 3 lower, 4 both",
        "code",
        1,
        4,
        "never",
    ),
    FeatureDef("g_s_gap", "1 none, 2 l > h[1], 3 h < l[1]", "code", 1, 3, _bars(1)),
    *(
        FeatureDef(
            f"g_s_pattern_{n}",
            f"candlestick pattern of {n} bar{'s' if n > 1 else ''}, see PATTERNS",
            "code",
            1,
            _patterns(n),
            _bars(15),
        )
        for n in PATTERNS
    ),
    FeatureDef(
        "g_s_trend",
        "1 + 4·(m_5 > m_20) + 2·(m_20 > m_60) + (c > m_5)",
        "code",
        1,
        8,
        _bars(59),
    ),
    FeatureDef("g_s_macd", "1 + 2·(DIF > 0) + (DIF > DEA)", "code", 1, 4, _WARM),
    FeatureDef(
        "g_s_volume", "1 + 2·(c > p) + (v > mean v of 5 before)", "code", 1, 4, _bars(5)
    ),
    FeatureDef(
        "g_s_break",
        "1 within, 2 c above all 20 closes before, 3 below all",
        "code",
        1,
        3,
        _bars(20),
    ),
)
TECHNICAL_NAMES = [f.name for f in TECHNICAL_FEATURES]
#: Columns that are codes of states, and the number of states.
TECHNICAL_STATES = {f.name: int(f.high) for f in TECHNICAL_FEATURES if f.unit == "code"}
#: Columns that remember the stock's first bar.
RECURSIVE = tuple(f.name for f in TECHNICAL_FEATURES if f.nan.startswith(_WARM))
# TA-Lib's candlesticks look at averages over ten bars; these are the bars before any of
# them can answer.
_PATTERN_BARS = 15
# Running sums carry rounding; a state must not depend on it where two sides are equal.
_TIE = 1e-9


def technical_features(bars: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute all columns from one stock's traded bars.

    Parameters
    ----------
    bars : mapping of str to ndarray [t]
        `open`, `high`, `low`, `close`, `volume`, float64, positive, in order of time.

    Returns
    -------
    ndarray [t, f]
        Columns `TECHNICAL_NAMES`; row t uses rows up to t only.
    """
    o, h, low, c, v = (np.ascontiguousarray(bars[k], np.float64) for k in FIELDS)
    t = len(c)
    if t == 0:
        return np.empty((0, len(TECHNICAL_NAMES)))
    with np.errstate(divide="ignore", invalid="ignore"):
        out = {**_numbers(o, h, low, c, v), **_states(o, h, low, c, v)}
    for name in RECURSIVE:
        out[name][:WARM_UP] = np.nan
    made = np.stack([out[name] for name in TECHNICAL_NAMES], axis=1)
    made[~np.isfinite(made)] = np.nan
    return made


def _before(x: np.ndarray, k: int = 1) -> np.ndarray:
    """X of k bars ago."""
    out = np.full(len(x), np.nan)
    out[k:] = x[:-k] if k < len(x) else x[:0]
    return out


def _sum(x: np.ndarray, n: int) -> np.ndarray:
    """Sum of the last n, which must all be known."""
    out = np.full(len(x), np.nan)
    if len(x) >= n:
        out[n - 1 :] = np.lib.stride_tricks.sliding_window_view(x, n).sum(axis=1)
    return out


def _extreme(x: np.ndarray, n: int, high: bool) -> np.ndarray:
    out = np.full(len(x), np.nan)
    if len(x) >= n:
        seen = np.lib.stride_tricks.sliding_window_view(x, n)
        out[n - 1 :] = seen.max(axis=1) if high else seen.min(axis=1)
    return out


def _numbers(o, h, low, c, v) -> dict[str, np.ndarray]:
    p = _before(c)
    out = {
        "g_body": (c - o) / p,
        "g_upper": (h - np.maximum(o, c)) / p,
        "g_lower": (np.minimum(o, c) - low) / p,
        "g_gap": o / p - 1,
        "g_place": (c - low) / (h - low),
    }
    for n in (5, 10, 20, 60):
        out[f"g_bias_{n}"] = c / talib.SMA(c, n) - 1
    dif, _, hist = talib.MACD(c, 12, 26, 9)
    out["g_macd"], out["g_macd_hist"] = dif / c, hist / c
    out["g_slope_20"] = talib.LINEARREG_SLOPE(c, 20) / c
    out["g_trix_12"] = talib.TRIX(c, 12) / 100
    out["g_adx_14"] = talib.ADX(h, low, c, 14) / 100
    plus, minus = talib.PLUS_DI(h, low, c, 14), talib.MINUS_DI(h, low, c, 14)
    out["g_di_14"] = (plus - minus) / 100
    out["g_aroon_25"] = talib.AROONOSC(h, low, 25) / 100
    rose = np.where(np.isnan(p), np.nan, c > p)
    out["g_psy_12"] = _sum(rose, 12) / 12
    for n in (6, 14):
        out[f"g_rsi_{n}"] = talib.RSI(c, n) / 100
    mean = talib.MA_Type.SMA
    k, d = talib.STOCH(h, low, c, 9, 3, mean, 3, mean)
    flat = _extreme(h, 9, True) == _extreme(low, 9, False)
    out["g_stoch_k"] = np.where(_sum(flat * 1.0, 3) > 0, np.nan, k / 100)
    out["g_stoch_d"] = np.where(_sum(flat * 1.0, 5) > 0, np.nan, d / 100)
    flat = _extreme(h, 14, True) == _extreme(low, 14, False)
    out["g_willr_14"] = np.where(flat, np.nan, talib.WILLR(h, low, c, 14) / 100)
    typical = (h + low + c) / 3
    flat = _extreme(typical, 14, True) == _extreme(typical, 14, False)
    out["g_cci_14"] = np.where(flat, np.nan, talib.CCI(h, low, c, 14) / 100)
    span = np.fmax(h, p) - np.fmin(low, p)  # true range
    out["g_ultosc"] = np.where(
        _sum(span, 7) == 0, np.nan, talib.ULTOSC(h, low, c, 7, 14, 28) / 100
    )
    out["g_roc_10"], out["g_roc_20"] = c / _before(c, 10) - 1, c / _before(c, 20) - 1
    out["g_natr_14"] = talib.NATR(h, low, c, 14) / 100
    middle = talib.SMA(c, 20)
    std = _std(c, 20)
    out["g_boll_place"] = (c - middle) / (2 * std)
    out["g_boll_width"] = 4 * std / middle
    total = _sum(v, 20)
    out["g_volume"] = np.log((_sum(v, 5) / 5) / (total / 20))
    sign = np.sign(c - p)
    out["g_obv_20"] = _sum(sign * v, 20) / total
    place = np.where(h > low, (2 * c - h - low) / (h - low), 0.0)
    # As for the others a bar's own fields do, but over the same bars as g_obv_20.
    out["g_cmf_20"] = np.where(np.isnan(out["g_obv_20"]), np.nan, _sum(place * v, 20))
    out["g_cmf_20"] /= total
    flat = _extreme(typical, 15, True) == _extreme(typical, 15, False)
    out["g_mfi_14"] = np.where(flat, np.nan, talib.MFI(h, low, c, v, 14) / 100)
    # A stock that has not moved since its first bar has no direction.
    moved = np.logical_or.accumulate(np.nan_to_num(np.abs(c - p)) > 0)
    for name in ("g_rsi_6", "g_rsi_14", "g_di_14"):
        out[name] = np.where(moved, out[name], np.nan)
    return out


def _std(x: np.ndarray, n: int) -> np.ndarray:
    """Take the population std of the last n; exactly 0 where all are equal."""
    out = np.full(len(x), np.nan)
    if len(x) >= n:
        out[n - 1 :] = np.lib.stride_tricks.sliding_window_view(x, n).std(axis=1)
    return out


def _above(x: np.ndarray, y: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
    """1.0 where x > y beyond rounding, else 0.0; NaN where one is unknown."""
    size = np.abs(y) if scale is None else scale
    return np.where(
        np.isfinite(x) & np.isfinite(y), (x - y > _TIE * size) * 1.0, np.nan
    )


def _states(o, h, low, c, v) -> dict[str, np.ndarray]:
    p = _before(c)
    out: dict[str, np.ndarray] = {}
    body = np.abs(c - o)
    usual = _before(_sum(body, 10)) / 10
    small = body <= _before(_sum(h - low, 10)) / 100
    code = np.where(c > o, 4.0, 2.0) + np.where(body > usual, np.sign(c - o), 0.0)
    code = np.where(small, 3.0, code)
    out["g_s_body"] = np.where(np.isnan(usual), np.nan, code)
    upper = (h - np.maximum(o, c) > body) * 1.0
    lower = (np.minimum(o, c) - low > body) * 1.0
    out["g_s_shadow"] = 1 + upper + 2 * lower
    up, down = low > _before(h), h < _before(low)
    out["g_s_gap"] = np.where(np.isnan(p), np.nan, 1.0 + up + 2 * down)
    for days, patterns in PATTERNS.items():
        out[f"g_s_pattern_{days}"] = _pattern(patterns, o, h, low, c)
    m5, m20, m60 = (talib.SMA(c, n) for n in (5, 20, 60))
    out["g_s_trend"] = 1 + 4 * _above(m5, m20) + 2 * _above(m20, m60) + _above(c, m5)
    dif, dea, _ = talib.MACD(c, 12, 26, 9)
    zero = np.where(np.isnan(dif), np.nan, 0.0)
    out["g_s_macd"] = 1 + 2 * _above(dif, zero, c) + _above(dif, dea, c)
    usual = _before(_sum(v, 5)) / 5
    out["g_s_volume"] = 1 + 2 * _above(c, p) + _above(v, usual)
    top, bottom = _before(_extreme(c, 20, True)), _before(_extreme(c, 20, False))
    out["g_s_break"] = 1 + _above(c, top) + 2 * _above(bottom, c)
    return out


def _pattern(patterns, o, h, low, c) -> np.ndarray:
    code = np.ones(len(c))
    value = 1 + sum(len(signs) for _, signs in patterns)
    for name, signs in reversed(patterns):
        found = getattr(talib, name)(o, h, low, c)
        for sign in reversed(signs):
            code[found * sign > 0] = value
            value -= 1
    code[:_PATTERN_BARS] = np.nan
    return code


class TechnicalHandler(FeatureHandler):
    """Technical indicators and K-line states, with DayHandler's labels and exposures.

    The state columns (`TECHNICAL_STATES`) keep their codes; name them in the model's
    `categories`.

    Parameters
    ----------
    columns : list of str, optional
        Features to use, default all.
    instruments, start_time, …
        As in `FeatureHandler`, without `features` and `categories`; a workflow names
        it as it does `DayHandler`.

    Raises
    ------
    ValueError
        If the store lacks a price or the volume, or `columns` names something else.
    """

    def __init__(
        self,
        instruments: Universe = "all",
        *,
        columns: Names | None = None,
        **kwargs: Any,
    ) -> None:
        known = self.known(list(FIELDS), instruments, kwargs)
        absent = [name for name in FIELDS if name not in known]
        if absent:
            raise ValueError(
                f"the store has no values of `${absent[0]}` for this universe and time "
                f"range; the technical features need {', '.join(FIELDS)}."
            )
        columns = TECHNICAL_NAMES if columns is None else list(columns)
        unknown = [c for c in columns if c not in TECHNICAL_NAMES]
        if unknown or not columns:
            raise ValueError(
                f"`columns` must name some of {TECHNICAL_NAMES}, got {columns}."
            )
        super().__init__(
            features={
                "bars": list(FIELDS),
                "function": "data_handlers.technical.technical_features",
                "names": TECHNICAL_NAMES,
                "columns": columns,
            },
            categories=[c for c in columns if c in TECHNICAL_STATES],
            instruments=instruments,
            **kwargs,
        )
