"""The 101 alphas beside the paper's own words, written with pandas."""

import numpy as np
import pandas as pd
import pytest

from data_handlers.catalogue import alpha101
from data_handlers.expression import Evaluator, parse

DAYS, STOCKS = 120, 30


@pytest.fixture(scope="module")
def fields():
    rng = np.random.default_rng(7)
    close = 20 * np.exp(np.cumsum(rng.normal(size=(DAYS, STOCKS)) * 0.02, 0))
    found = {"close": close, "open": close * np.exp(rng.normal(size=close.shape) / 90)}
    both = np.maximum(close, found["open"]), np.minimum(close, found["open"])
    found["high"] = both[0] * (1 + rng.random(close.shape) / 50)
    found["low"] = both[1] * (1 - rng.random(close.shape) / 50)
    found["vwap"] = (found["high"] + found["low"] + close) / 3
    found["volume"] = np.exp(rng.normal(size=close.shape)) * 1e6
    found["amount"] = found["vwap"] * found["volume"]
    found["market_cap"] = close * 1e7 * (1 + np.arange(STOCKS))
    found["industry"] = np.tile([1.0, 2.0, 3.0], 10) * np.ones((DAYS, 1))
    return {k: v.astype(np.float32) for k, v in found.items()}


class Paper:
    """Functions of the paper's appendix, on frames of days by stocks."""

    def __init__(self, fields):
        self.__dict__.update(
            {k: pd.DataFrame(v, dtype=float) for k, v in fields.items()}
        )
        self.returns = self.close / self.close.shift(1) - 1
        self.groups = fields["industry"][0]

    def adv(self, n):
        return self.amount.rolling(n, 1).mean()

    def rank(self, x):
        return x.rank(axis=1, pct=True)

    def neutral(self, x):
        return x - x.T.groupby(self.groups).transform("mean").T

    def scale(self, x):
        return x.div(x.abs().sum(axis=1), axis=0)

    def corr(self, x, y, n):
        return x.rolling(n, 1).corr(y)

    def ts_rank(self, x, n):
        return x.rolling(n, 1).rank(pct=True)

    def decay(self, x, n):
        def one(window):
            weight = np.arange(1.0, len(window) + 1)
            return np.nanmean(weight / weight.sum() * window)

        return x.rolling(n, 1).apply(one, raw=True)

    def place(self, x, n, largest=True):
        best = (lambda w: w.argmax() + 1) if largest else (lambda w: w.argmin() + 1)
        return x.rolling(n, 1).apply(best, raw=True)


CASES = {
    3: lambda p: -p.corr(p.rank(p.open), p.rank(p.volume), 10),
    4: lambda p: -p.ts_rank(p.rank(p.low), 9),
    5: lambda p: (
        p.rank(p.open - p.vwap.rolling(10, 1).mean()) * -p.rank(p.close - p.vwap).abs()
    ),
    12: lambda p: np.sign(p.volume.diff()) * -p.close.diff(),
    21: lambda p: pd.DataFrame(
        np.select(
            [
                p.close.rolling(8, 1).mean() + p.close.rolling(8, 1).std()
                < p.close.rolling(2, 1).mean(),
                p.close.rolling(2, 1).mean()
                < p.close.rolling(8, 1).mean() - p.close.rolling(8, 1).std(),
                p.amount / p.adv(20) >= 1,
            ],
            [-1.0, 1.0, 1.0],
            -1.0,
        )
    ),
    25: lambda p: p.rank(-p.returns * p.adv(20) * p.vwap * (p.high - p.close)),
    31: lambda p: (
        p.rank(p.rank(p.rank(p.decay(-p.rank(p.rank(p.close.diff(10))), 10))))
        + p.rank(-p.close.diff(3))
        + np.sign(p.scale(p.corr(p.adv(20), p.low, 12)))
    ),
    33: lambda p: p.rank(-(1 - p.open / p.close)),
    38: lambda p: -p.rank(p.ts_rank(p.close, 10)) * p.rank(p.close / p.open),
    42: lambda p: p.rank(p.vwap - p.close) / p.rank(p.vwap + p.close),
    53: lambda p: (
        -(((p.close - p.low) - (p.high - p.close)) / (p.close - p.low)).diff(9)
    ),
    56: lambda p: (
        -p.rank(
            p.returns.rolling(10, 1).sum()
            / p.returns.rolling(2, 1).sum().rolling(3, 1).sum()
        )
        * p.rank(p.returns * p.market_cap)
    ),
    66: lambda p: (
        -(
            p.rank(p.decay(p.vwap.diff(3), 7))
            + p.ts_rank(
                p.decay((p.low - p.vwap) / (p.open - (p.high + p.low) / 2), 11), 6
            )
        )
    ),
    67: lambda p: (
        -(
            p.rank(p.high - p.low_of_high)
            ** p.rank(p.corr(p.neutral(p.vwap), p.neutral(p.adv(20)), 6))
        )
    ),
    69: lambda p: (
        -(
            p.rank(p.neutral(p.vwap).diff(2).rolling(4, 1).max())
            ** p.ts_rank(
                p.corr(p.close * 0.490655 + p.vwap * 0.509345, p.adv(20), 4), 9
            )
        )
    ),
    77: lambda p: np.minimum(
        p.rank(p.decay((p.high + p.low) / 2 + p.high - (p.vwap + p.high), 20)),
        p.rank(p.decay(p.corr((p.high + p.low) / 2, p.adv(40), 3), 5)),
    ),
    80: lambda p: (
        -(
            p.rank(np.sign(p.neutral(p.open * 0.868128 + p.high * 0.131872).diff(4)))
            ** p.ts_rank(p.corr(p.high, p.adv(10), 5), 5)
        )
    ),
    82: lambda p: (
        -np.minimum(
            p.rank(p.decay(p.open.diff(1), 14)),
            p.ts_rank(p.decay(p.corr(p.neutral(p.volume), p.open, 17), 6), 13),
        )
    ),
    91: lambda p: (
        -(
            p.ts_rank(
                p.decay(p.decay(p.corr(p.neutral(p.close), p.volume, 9), 16), 3), 4
            )
            - p.rank(p.decay(p.corr(p.vwap, p.adv(30), 4), 2))
        )
    ),
    96: lambda p: (
        -np.maximum(
            p.ts_rank(p.decay(p.corr(p.rank(p.vwap), p.rank(p.volume), 3), 4), 8),
            p.ts_rank(
                p.decay(
                    p.place(
                        p.corr(p.ts_rank(p.close, 7), p.ts_rank(p.adv(60), 4), 3), 12
                    ),
                    14,
                ),
                13,
            ),
        )
    ),
    98: lambda p: (
        p.rank(p.decay(p.corr(p.vwap, p.adv(5).rolling(26, 1).sum(), 4), 7))
        - p.rank(
            p.decay(
                p.ts_rank(
                    p.place(
                        p.corr(p.rank(p.open), p.rank(p.adv(15)), 20), 8, largest=False
                    ),
                    6,
                ),
                8,
            )
        )
    ),
    101: lambda p: (p.close - p.open) / (p.high - p.low + 0.001),
}

# Ranks and places of ranks and of their correlations, which tie: a last digit decides.
TIES = (31, 96, 98)


def test_there_are_all_101():
    names = alpha101()[1]
    assert names == [f"ALPHA{k:03d}" for k in range(1, 102)]
    assert all(parse(t).look_ahead == 0 for t in alpha101()[0])


@pytest.mark.parametrize("number", CASES)
def test_alpha_is_the_papers(fields, number):
    paper = Paper(fields)
    paper.low_of_high = paper.high.rolling(2, 1).min()
    theirs = CASES[number](paper).to_numpy()
    panel = {"$" + k: v for k, v in fields.items()}
    ours = Evaluator(panel).evaluate([parse(alpha101()[0][number - 1])])[0]
    # Windows that begin before the data, or hardly move, are Qlib's matter.
    ours, theirs = ours[70:], theirs[70:]
    known = np.isfinite(ours) & np.isfinite(theirs)
    assert known.mean() > 0.9 and known.sum() == np.isfinite(theirs).sum()
    near = np.isclose(ours, theirs, rtol=1e-4, atol=1e-5)[known]
    assert near.mean() > (0.9 if number in TIES else 0.999)
