"""Months in which styles turn round, worked by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from qlib_ext.report.risk import style_reversals


def made():
    """Three months; the style runs up until the second, from which on it falls."""
    rng = np.random.default_rng(0)
    days = pd.bdate_range("2020-01-01", "2020-03-31")
    before = pd.bdate_range("2019-06-03", "2019-12-31")
    every = before.append(days)
    month = every.month.to_numpy()
    falls = (every.year == 2020) & (month >= 2)
    returns = np.where(falls, -0.01, 0.01) * rng.uniform(0.9, 1.1, len(every))
    exposure = torch.tensor(rng.normal(size=(len(days), 30)))
    return days, pd.DataFrame({"size": returns}, every), exposure


def test_the_month_that_turns_is_the_sharp_one():
    days, returns, exposure = made()
    excess = torch.full((len(days),), 0.001, dtype=torch.float64)
    excess[25] = -0.05  # in February
    table = style_reversals(exposure, {"size": exposure}, excess, days, returns)
    assert list(table.index) == ["2020-01", "2020-02", "2020-03"]
    assert table["sharp"].tolist() == [False, True, False]
    assert table.loc["2020-02", "reversal"] > 5 > 0 > table.loc["2020-01", "reversal"]
    # the score is the exposure itself, and what ran is up before February
    assert table["exposure"].tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert table.loc["2020-01", "chase"] == pytest.approx(1.0)
    feb = table.loc["2020-02"]
    assert feb["drawdown"] == pytest.approx(0.05)
    assert feb["excess"] == pytest.approx(1.001 ** (feb["days"] - 1) * 0.95 - 1)


def test_a_month_does_not_depend_on_what_comes_after():
    days, returns, exposure = made()
    excess = torch.zeros(len(days))
    args = (exposure, {"size": exposure}, excess, days)
    whole = style_reversals(*args, returns)
    moved = returns.copy()
    moved.loc["2020-03-01":] = 0.5
    part = style_reversals(*args, moved)
    names = ["reversal", "exposure", "chase"]
    pd.testing.assert_frame_equal(whole[names][:2], part[names][:2])
