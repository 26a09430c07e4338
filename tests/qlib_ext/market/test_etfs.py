"""ETFs of the embedded market: own stream, known baskets, bars that follow them."""

import hashlib

import numpy as np
import pandas as pd
import pytest

from data_handlers.holdings import read_holdings
from qlib_ext.ingest.store import read_bars, read_instruments
from qlib_ext.market import make_market

SIZE = dict(stocks=40, years=1, seed=3, trades=20)


@pytest.fixture(scope="module")
def markets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("etfs")
    return make_market(folder / "with", etfs=3, **SIZE), make_market(
        folder / "without", **SIZE
    )


def prints(store):
    """Every file of a store but its own account and the funds'."""
    return {
        str(p.relative_to(store)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in store.rglob("*")
        if p.is_file() and "etf_" not in p.name and "sh5100" not in str(p)
    }


def test_the_rest_of_the_market_is_bit_for_bit_what_it_was(markets):
    with_, without = (prints(x) for x in markets)
    differ = {k for k in with_ if with_[k] != without.get(k)}
    assert with_.keys() == without.keys() and differ <= {"meta.json"}
    assert "etfs" not in (markets[1] / "meta.json").read_text()
    assert "SH510001" not in set(read_instruments(markets[0])["instrument"])


def test_a_fund_returns_what_its_basket_does(markets):
    store = markets[0]
    holdings = read_holdings(str(store / "tables" / "etf_holdings.parquet"))
    fund = holdings[holdings["fund"] == "SH510001"]
    assert (fund.groupby("period_end")["weight"].sum() - 1).abs().max() < 1e-9
    assert ((fund["announced"] - fund["period_end"]).dt.days >= 15).all()
    # The basket of the end of June, followed back through the second quarter by the
    # stocks' own prices: bought and held since the end of March.
    basket = fund[fund["period_end"] == "2020-06-30"].set_index("instrument")["weight"]
    bars = read_bars(store, [*basket.index, "SH510001"], ["close"])
    close = bars.pivot(index="datetime", columns="instrument", values="close").ffill()
    part = close.loc["2020-03-31":"2020-06-30"]
    units = basket / part[basket.index].iloc[-1]
    value = (part[basket.index] * units).sum(axis=1)
    own = part["SH510001"]
    gap = (own / own.iloc[0]) / (value / value.iloc[0]) - 1
    # A quarter's fee, and noise of two basis points a day.
    assert gap.iloc[-1] == pytest.approx(-0.005 / 4, abs=0.005)
    assert gap.diff().std() < 5e-4
    assert np.corrcoef(own.pct_change()[1:], value.pct_change()[1:])[0, 1] > 0.999


def test_same_seed_same_funds(markets, tmp_path):
    again = make_market(tmp_path / "again", etfs=3, **SIZE)
    tables = [
        pd.read_parquet(x / "tables" / "etf_holdings.parquet")
        for x in (again, markets[0])
    ]
    pd.testing.assert_frame_equal(*tables)
