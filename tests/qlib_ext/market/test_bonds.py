"""Bonds of the embedded market: the pricing rule, events, and the oracle."""

import numpy as np
import pandas as pd
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from qlib_ext.ingest.store import read_bars, read_instruments, read_meta, read_table
from qlib_ext.market import make_bonds, make_market, oracle_path
from qlib_ext.market.bonds import CALL_PRICE, bond_value


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    out = tmp_path_factory.mktemp("bonds") / "market"
    make_market(out, stocks=30, years=3, seed=3, trades=20)
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    made = make_bonds(out, bonds=60)
    assert before == {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    return out, made


@pytest.fixture(scope="module")
def bars(stores):
    names = read_instruments(stores[1])["instrument"].tolist()
    bars = read_bars(stores[1], names).dropna(subset=["close"])
    return bars.sort_values(["instrument", "datetime"], ignore_index=True)


def test_the_rule_is_the_value_of_an_exchange():
    """E max(C, F) with C lognormal around its mean, by numerical integration."""
    c, f, sigma, years = 90.0, 95.0, 0.35, 3.0
    v = sigma * np.sqrt(years)

    def payoff(z):
        return max(c * np.exp(v * z - v**2 / 2), f) * norm.pdf(z)

    want = quad(payoff, -8, 8, points=[(np.log(f / c) + v**2 / 2) / v])[0]
    got = bond_value(*(np.array([x]) for x in (c, f, sigma, years)))
    assert got[0] == pytest.approx(want, rel=1e-6)
    flat = bond_value(np.array([120.0, 80]), np.array([95.0, 95]), 0.3, np.zeros(2))
    np.testing.assert_allclose(flat, [120, 95])


def test_bonds_are_a_store_with_pools_and_an_index(stores, bars):
    meta = read_meta(stores[1])
    assert {"equity_biased", "balanced", "debt_biased"} <= set(meta["markets"])
    assert meta["indices"] and meta["market"]["bonds"] == 60
    alive = bars.groupby("datetime").size()
    assert alive.min() >= 10
    # the price is near the rule's floor at least
    floor = np.maximum(bars["conv_value"], bars["bond_floor"])
    quiet = bars["call_state"] == 0
    assert (bars["close"] / floor)[quiet].quantile(0.01) > 0.97
    pool = read_instruments(stores[1], "equity_biased").iloc[0]
    row = bars[(bars["instrument"] == pool["instrument"])].set_index("datetime")
    value = row.loc[pool["start"]]
    assert value["conv_value"] / value["bond_floor"] > 1.2


def test_calls_and_revisions_are_announced_before_they_work(stores, bars):
    events = read_table(stores[1], "bond_events")
    calls = events[events["event"] == "call"]
    assert len(calls) >= 3 and (events["event"] == "revision").any()
    last = bars.groupby("instrument")["datetime"].max()
    days = pd.DatetimeIndex(np.sort(bars["datetime"].unique()))
    for _, row in calls.iterrows():
        own = bars[bars["instrument"] == row["instrument"]].set_index("datetime")
        after = own.loc[row["announced"] :]
        assert (after["call_state"] == 1).all()
        assert (own.loc[: row["announced"]]["call_state"].iloc[:-1] == 0).all()
        want = np.maximum(after["conv_value"], CALL_PRICE)
        np.testing.assert_allclose(after["close"], want, atol=2e-3)
        start, end = days.get_indexer([row["announced"], last[row["instrument"]]])
        assert end - start < 20
    steps = read_table(stores[1], "conversion_prices")
    drop = steps.groupby("instrument")["conv_price"].pct_change() < -0.3
    assert drop.any()


def test_the_mispricing_closes_as_the_oracle_says(stores, bars):
    oracle = pd.read_parquet(oracle_path(stores[1]))
    both = bars.merge(oracle, on=["datetime", "instrument"])
    price = both.groupby("instrument")["close"]
    both["ahead"] = np.log(price.shift(-6) / price.shift(-1))
    both = both.dropna()
    daily = both.groupby("datetime")[["total", "ahead"]]
    ic = daily.apply(lambda d: d["total"].corr(d["ahead"], method="spearman")).mean()
    assert 0.05 < ic < 0.35
    slope = np.polyfit(both["total"], both["ahead"], 1)[0]
    assert slope == pytest.approx(1.0, abs=0.5)


def test_without_signal_there_is_no_mispricing(tmp_path):
    make_market(tmp_path / "m", stocks=20, years=1, seed=3, signal="none", trades=20)
    out = make_bonds(tmp_path / "m", bonds=20)
    assert (pd.read_parquet(oracle_path(out))["total"] == 0).all()
    with pytest.raises(ValueError, match="overwrite"):
        make_bonds(tmp_path / "m", bonds=20)
    first = read_bars(out, ["SH113000"])
    again = read_bars(
        make_bonds(tmp_path / "m", bonds=20, overwrite=True), ["SH113000"]
    )
    pd.testing.assert_frame_equal(first, again)


@pytest.mark.parametrize("bonds", [19, 901])
def test_refuses(stores, bonds):
    with pytest.raises(ValueError, match="bonds"):
        make_bonds(stores[0], bonds=bonds)
    with pytest.raises(ValueError, match="no embedded market"):
        make_bonds(stores[0].parent)
