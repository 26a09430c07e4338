"""Limits and lots of the boards, by date."""

from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pandas as pd
import pytest

from data_handlers.boards import (
    board_of,
    free_days,
    limit_prices,
    limit_ratio,
    lot_rule,
)


@pytest.mark.parametrize(
    ("code", "board"),
    [
        ("SH600000", "main"),
        ("SZ002001", "main"),
        ("SZ300750", "chinext"),
        ("SZ301001", "chinext"),
        ("SH688981", "star"),
        ("SH689009", "star"),
        ("BJ430047", "beijing"),
    ],
)
def test_boards(code, board):
    assert board_of(code) == board


def test_limits_by_board_and_date():
    days = pd.DatetimeIndex(["2020-08-21", "2020-08-24"])
    st = np.array([True, True])
    assert limit_ratio("main", days, ~st).tolist() == [0.1, 0.1]
    assert limit_ratio("main", days, st).tolist() == [0.05, 0.05]
    assert limit_ratio("chinext", days, ~st).tolist() == [0.1, 0.2]
    assert limit_ratio("chinext", days, st).tolist() == [0.05, 0.2]
    assert limit_ratio("star", days, st).tolist() == [0.2, 0.2]
    assert limit_ratio("beijing", days, ~st).tolist() == [0.3, 0.3]


def test_lots():
    assert lot_rule("SH600000") == (100, 100)
    assert lot_rule("SH688001") == (200, 1)
    assert lot_rule("BJ430047") == (100, 1)


def test_first_days_without_limit_by_board_and_date():
    days = pd.DatetimeIndex(["2020-08-21", "2020-08-24", "2023-04-10"])
    assert free_days("star", days).tolist() == [5, 5, 5]
    assert free_days("chinext", days).tolist() == [1, 5, 5]
    assert free_days("main", days).tolist() == [1, 1, 5]
    assert free_days("beijing", days).tolist() == [1, 1, 1]


@pytest.mark.parametrize("ratio", ["0.05", "0.1", "0.2", "0.3"])
def test_limits_are_the_exchanges_rounding_at_every_fen(ratio):
    fen = np.arange(50, 40_000, 7)
    one = Decimal("0.01")
    for sign, found in zip(
        (1, -1), limit_prices(fen * 0.01 * 1.7, float(ratio), 1.7), strict=True
    ):
        share = 1 + sign * Decimal(ratio)
        exact = [(int(x) * one * share).quantize(one, ROUND_HALF_UP) for x in fen]
        np.testing.assert_allclose(found / 1.7, np.array(exact, float), rtol=1e-9)
