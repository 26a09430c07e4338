"""Funds of the market: lawful reports, attributes that earn in regimes."""

import numpy as np
import pandas as pd
import pytest

from data_handlers.holdings import factorise
from qlib_ext.ingest.store import read_bars, read_instruments, read_meta
from qlib_ext.market import make_market
from qlib_ext.market.calendar import trading_days
from qlib_ext.market.funds import attribute_returns, holdings, latent_attributes

MAKE = {"stocks": 20, "years": 1, "seed": 3, "trades": 40}


@pytest.fixture(scope="module")
def markets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("funds")
    return {
        "plain": make_market(folder / "plain", **MAKE),
        "funds": make_market(folder / "funds", **MAKE, funds=30),
    }


def test_holdings_leave_the_rest_of_the_market_as_it_is(markets):
    codes = sorted(read_instruments(markets["plain"])["instrument"])
    plain, funds = (read_bars(markets[k], codes) for k in ("plain", "funds"))
    pd.testing.assert_frame_equal(plain, funds)
    made = read_meta(markets["plain"])["market"]
    assert "funds" not in made and "attribute_alpha" not in made
    assert read_meta(markets["funds"])["market"] == {**made, "funds": 30}


def test_reports_come_in_time_and_tell_the_attributes():
    days, n = trading_days(2), 60
    codes = [f"SH{600000 + i}" for i in range(n)]
    alive = np.ones((len(days), n), bool)
    alive[:, :5] = False
    table = holdings(0, days, codes, alive, 40)
    assert not table["instrument"].isin(codes[:5]).any()
    keys = ["fund", "period_end", "announced"]
    reports = table.groupby(keys)["weight"].agg(["size", "sum"]).reset_index()
    lag = (reports["announced"] - reports["period_end"]).dt.days
    top = reports["size"] == 10
    assert 10 <= lag[top].min() and lag[top].max() <= 31  # 15 trading days
    assert set(reports.loc[~top, "period_end"].dt.month) == {6, 12}
    assert 40 <= lag[~top].min() and lag[~top].max() <= 90
    np.testing.assert_allclose(reports.loc[~top, "sum"], 0.85)
    full = table[table["announced"] - table["period_end"] >= pd.Timedelta(days=40)]
    last = full[full["period_end"] == full["period_end"].max()]
    held = last.pivot(index="fund", columns="instrument", values="weight").fillna(0.0)
    found = factorise(held.to_numpy(), rank=3).stocks
    z = latent_attributes(0, n)[[codes.index(c) for c in held.columns]]
    x = np.column_stack([np.ones(len(found)), found])
    rest = z - x @ np.linalg.lstsq(x, z, rcond=None)[0]
    assert 1 - rest.var() / z.var() > 0.6


def test_attributes_earn_in_turn_and_nothing_in_the_long_run():
    gain, oracle = attribute_returns(seed=0, t=20_000, n=50, strength=0.02, horizon=10)
    assert oracle.std(axis=1).mean() == pytest.approx(0.02, rel=0.15)
    assert gain.mean(axis=0).std() < 0.1 * gain.std()
    # the oracle is the mean of what follows
    ahead = np.lib.stride_tricks.sliding_window_view(gain, 10, axis=0).sum(-1)
    past, future = oracle[:-11].ravel(), ahead[2:].ravel()[: oracle[:-11].size]
    assert np.cov(past, future)[0, 1] / past.var() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    "more, message",
    [({"attribute_alpha": 0.02}, "needs `funds`"), ({"funds": 5}, "`funds` must")],
)
def test_bad_options_are_named(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        make_market(tmp_path / "x", **MAKE, **more)
