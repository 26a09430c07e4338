"""What the tests of the aggregates share: rows of the kernels as frames."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from data_handlers.aggregate.columns import midnights
from data_handlers.aggregate.minute import (
    MINUTE_NAMES,
    overnight_returns,
    reduce_minutes,
)
from data_handlers.aggregate.ticks import TICK_NAMES, aggregate_ticks

KEYS = ["datetime", "instrument"]


def _day_frame(days):
    days = days.by_day()
    keys = {"datetime": midnights(days.day), "instrument": days.labels[days.code]}
    return pd.DataFrame(keys | days.columns())


def _minute_features(bars, factors=None, **options):
    days = reduce_minutes(bars, **options).by_day()
    frame = _day_frame(days).set_index(KEYS)
    factor = frame["factor"]
    if factors is not None:
        factor = factors.reindex(frame.index).fillna(factor)
    factor = factor.to_numpy()
    overnight = overnight_returns(
        days.code,
        days.day,
        frame["open"].to_numpy() * factor,
        frame["close"].to_numpy() * factor,
    )
    frame["ms_overnight"] = overnight
    frame["ms_mom"] += overnight
    return frame[MINUTE_NAMES].astype(np.float64)


def _tick_features(trades, orders=None, quotes=None, **options):
    rows = aggregate_ticks(trades, orders, quotes, **options)
    return rows.frame.set_index(KEYS)[TICK_NAMES]


@pytest.fixture(scope="session")
def day_frame():
    """``day_frame(stock_days)``: keys, facts and features, sorted by day."""
    return _day_frame


@pytest.fixture(scope="session")
def minute_features():
    """``minute_features(bars, factors=None, **options of reduce_minutes)``."""
    return _minute_features


@pytest.fixture(scope="session")
def tick_features():
    """``tick_features(trades, orders, quotes, **options of aggregate_ticks)``."""
    return _tick_features
