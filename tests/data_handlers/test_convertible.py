"""Pools, yields, ratings and the universe of convertible bonds."""

import numpy as np
import pandas as pd
import pytest

from data_handlers.convertible import (
    POOLS,
    TradableBonds,
    pool_numbers,
    pool_spans,
    rating_number,
    yield_to_maturity,
)

DAYS = pd.bdate_range("2020-03-02", periods=4)


def test_pools_part_at_a_fifth_of_the_pure_bond_value():
    value = np.array([120.1, 120.0, 100, 80.0, 79.9, np.nan, 100])
    floor = np.array([100.0] * 6 + [np.nan])
    assert pool_numbers(value, floor).tolist() == [0, 1, 1, 1, 2, -1, -1]


def test_a_pool_is_a_market_that_changes_by_day():
    bars = pd.DataFrame(
        {
            "datetime": [*DAYS, *DAYS],
            "instrument": ["SH110001"] * 4 + ["SZ123001"] * 4,
            "conv_value": [130, 130, 100, 130, 70, 100, 100, 100],
            "bond_floor": 100.0,
        }
    )
    spans = pool_spans(bars)
    assert list(spans) == list(POOLS)
    rows = spans["equity_biased"].to_numpy().tolist()
    assert rows == [
        ["SH110001", DAYS[0], DAYS[1]],
        ["SH110001", DAYS[3], DAYS[3]],
    ]
    assert spans["balanced"]["instrument"].tolist() == ["SH110001", "SZ123001"]
    # What comes later changes nothing before it.
    early = pool_spans(bars[bars["datetime"] <= DAYS[1]])
    assert early["equity_biased"].to_numpy().tolist() == rows[:1]


def test_yield_by_hand():
    years = np.array([[0.5, 1.5, np.nan], [-0.2, 0.8, 1.8], [np.nan] * 3])
    flows = np.array([[1.0, 111.0, np.nan], [1.0, 1.5, 112.0], [1.0] * 3])
    got = yield_to_maturity(np.array([105.0, 113.5, 100.0]), years, flows)
    for row in (0, 1):
        due = years[row] > 0
        value = (flows[row][due] / (1 + got[row]) ** years[row][due]).sum()
        assert value == pytest.approx([105.0, 113.5][row], abs=1e-8)
    assert got[1] == pytest.approx(0.0, abs=1e-9) and np.isnan(got[2])


def test_ratings_are_ordered():
    order = ["AAA", "AA+", "AA", "AA-", "A+", "BBB", "BB", "B", "CCC"]
    numbers = [rating_number(r) for r in order]
    assert numbers == sorted(numbers, reverse=True)


def test_called_and_small_bonds_leave_on_the_day_itself():
    index = pd.MultiIndex.from_product(
        [DAYS[:2], ["A", "B", "C"]], names=["datetime", "instrument"]
    )
    frame = pd.DataFrame(
        {
            ("feature", "x"): range(6),
            ("attribute", "log_size"): np.log([1e9, 2e7, 1e9, 1e9, np.nan, 1e9]),
            ("attribute", "called"): [0, 0, 0, 1, 0, 0],
        },
        index=index,
    )
    out = TradableBonds(min_size=3e7)(frame)
    assert out[("feature", "x")].tolist() == [0, 2, 4, 5]
    assert ("attribute", "called") not in out
    kept = TradableBonds(called=True)(frame)
    assert kept.equals(frame)
