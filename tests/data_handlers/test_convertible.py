"""Pools, yields, ratings and the universe of convertible bonds."""

import numpy as np
import pandas as pd
import pytest

from data_handlers.convertible import (
    POOLS,
    ConvertibleHandler,
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
    assert rows == [["SH110001", DAYS[0], DAYS[1]], ["SH110001", DAYS[3], DAYS[3]]]
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


HANDLER = dict(
    start_time="2020-01-01",
    end_time="2020-12-31",
    fit_start_time="2020-01-01",
    fit_end_time="2020-04-30",
)


@pytest.fixture(scope="module")
def bonds(tmp_path_factory):
    """Store of 40 bonds over a year."""
    from qlib_ext.market import make_bonds, make_market

    out = tmp_path_factory.mktemp("bonds") / "market"
    return make_bonds(make_market(out, stocks=20, years=1, seed=1, trades=20), bonds=40)


def test_features_by_hand(bonds, use_store):
    from data_handlers.convertible import ATTRIBUTES, SERIES
    from qlib_ext.dataset import PanelDataset
    from qlib_ext.ingest.store import read_bars

    use_store(bonds)
    handler = ConvertibleHandler(**HANDLER, min_size=0, called=True)
    raw = handler.fetch(col_set="__raw", data_key="raw")
    bars = read_bars(bonds, ["SH113000"]).set_index("datetime")
    got = raw.xs("SH113000", level="instrument")
    assert set(raw["feature"]) == set(SERIES)
    assert set(raw["attribute"]) == set(ATTRIBUTES)
    bars = bars[bars["close"].notna()].reindex(got.index)
    day = bars.index[40]
    row = bars.loc[day]
    want = {
        "price": np.log(row["close"] / 100),
        "return": row["change"],
        "turnover": np.log(row["amount"] / row["remain_size"] / row["close"] * 100),
        "premium": np.log(row["close"] / row["conv_value"]),
        "floor_premium": np.log(row["close"] / row["bond_floor"]),
        "stock_return": row["stock_return"],
        "stock_vol": bars["stock_return"].loc[:day].tail(20).std() * 252**0.5,
    }
    for name, value in want.items():
        assert got.loc[day, ("feature", name)] == pytest.approx(value, rel=1e-3), name
    infer = handler.fetch(col_set="attribute", data_key="infer")
    mean = infer.groupby(level="datetime").mean().abs().max().max()
    assert mean < 1e-4
    data = PanelDataset(handler, {"train": ("2020-01-01", "2020-04-30")})
    assert data.panel.attribute_names == [str(c) for c in infer.columns]
    kept = ConvertibleHandler(**HANDLER, min_size=5e8)
    size = kept.fetch(col_set="attribute", data_key="raw")["log_size"]
    inside = kept.fetch(col_set="attribute", data_key="infer").index
    assert size.loc[inside].min() >= np.log(5e8) - 1e-5


@pytest.mark.parametrize(
    "kind", [pytest.param("cut", marks=pytest.mark.slow), "noise", "call"]
)
def test_what_comes_later_changes_nothing_before(kind, bonds, use_store, tmp_path):
    from qlib_ext.ingest.store import (
        read_bars,
        read_calendar,
        read_instruments,
        write_store,
    )

    names = read_instruments(bonds)["instrument"].tolist()
    bars = read_bars(bonds, names).reset_index(drop=True)
    days = read_calendar(bonds)
    day = days[days <= "2020-06-30"][-1]
    later = (bars["datetime"] > day).to_numpy()
    if kind == "cut":
        bars = bars[~later]
    elif kind == "noise":
        rng = np.random.default_rng(0)
        for field in bars.columns.difference(["datetime", "instrument"]):
            noise = np.exp(rng.normal(size=len(bars)))
            bars[field] = bars[field] * np.where(later, noise, 1.0)
    else:  # every call is announced a day earlier than it was
        state = bars.sort_values("datetime").groupby("instrument")["call_state"]
        moved = state.shift(-1).fillna(bars["call_state"])
        called = bars["call_state"].eq(0) & moved.eq(1)
        day = bars.loc[called & later, "datetime"].min() - pd.Timedelta(days=1)
        bars["call_state"] = moved.where(later, bars["call_state"])
        assert (called & later).any()
    write_store(tmp_path / "other", bars, calendar=days[days <= bars["datetime"].max()])
    found = []
    for store in (bonds, tmp_path / "other"):
        use_store(store)
        handler = ConvertibleHandler(**HANDLER)
        found.append(
            [
                handler.fetch(slice(None, day), col_set=group, data_key="infer")
                for group in ("feature", "attribute")
            ]
        )
    for ours, other in zip(*found, strict=True):
        assert len(ours) > 1000
        pd.testing.assert_frame_equal(ours, other, rtol=1e-4, atol=1e-5)


def test_a_store_of_shares_is_refused(market, use_store):
    use_store(market)
    with pytest.raises(ValueError, match=r"no `\$conv_value`.*store of bonds"):
        ConvertibleHandler(**HANDLER)
