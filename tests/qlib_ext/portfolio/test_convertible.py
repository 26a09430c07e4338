"""Bonds in the back-test: limits, lots, and a week with a redemption, to the cent."""

import numpy as np
import pandas as pd
import pytest

from qlib_ext.ingest.store import write_store
from qlib_ext.portfolio.convertible import ConvertibleExchange, PoolTopStrategy
from qlib_ext.portfolio.exchange import BoardExchange

WEEKS = pd.bdate_range("2021-03-04", "2021-03-17")  # Thursday to Wednesday
A, B, C = "SH110001", "SZ123002", "SZ123003"
CLOSE = {
    A: [100.0, 100.0, 105.0, 106.0, 110.0],  # redeemed after Wednesday
    B: [102.0] * 10,
    C: [118.0, 119.0, 119.0, 119.0, 120.0, 120.0, 120.0, 121.0, 122.0, 122.0],
}


def bars(closes, days):
    parts = []
    for code, close in closes.items():
        close = pd.Series(close, days[: len(close)], dtype=float)
        frame = pd.DataFrame({"datetime": close.index, "instrument": code})
        frame["close"] = close.to_numpy()
        frame["factor"], frame["volume"] = 1.0, 1e6
        frame["change"] = close.pct_change().to_numpy()
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def store(tmp_path, use_store):
    path = tmp_path / "store"
    spans = pd.DataFrame(
        {
            "instrument": [A, B, C],
            "start": WEEKS[0],
            "end": [WEEKS[4], *WEEKS[[-1, -1]]],
        }
    )
    write_store(path, bars(CLOSE, WEEKS), markets={"balanced": spans})
    use_store(path)
    return path


def account(payout):
    """Account by day: the best of three bonds, then the best of the two left."""
    from qlib.backtest import backtest

    score = pd.Series(
        {
            (WEEKS[1], A): 2.0,
            (WEEKS[1], B): 1.0,
            (WEEKS[1], C): 0.0,
            (WEEKS[6], B): 1.0,
            (WEEKS[6], C): 2.0,
        }
    ).rename_axis(["datetime", "instrument"])
    start, end = WEEKS[1], WEEKS[8]
    exchange = ConvertibleExchange(start_time=start, end_time=end, payout=payout)
    strategy = PoolTopStrategy(
        signal=score.to_frame("score"), pools=["balanced"], top=0.34
    )
    metrics, _ = backtest(
        start,
        end,
        strategy=strategy,
        executor={
            "class": "SimulatorExecutor",
            "module_path": "qlib.backtest.executor",
            "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
        },
        benchmark=B,
        account=100_000.0,
        exchange_kwargs={"exchange": exchange},
    )
    report, positions = metrics["1day"]
    return report["account"], positions


@pytest.mark.parametrize("payout", [100.5, "last", {A: 100.5}, {B: 100.5}])
def test_a_week_with_a_redemption_by_hand(store, payout):
    value, positions = account(payout)
    # Monday: 99 % of 100,000 at Friday's 100 is 990 bonds; at Monday's 105 the cash is
    # enough for 951 with costs, so 950 are bought.
    cash = 100_000 - 950 * 105 - 950 * 105 * 0.0005
    assert cash == pytest.approx(200.125)
    held = [cash + 950 * price for price in (105.0, 106.0, 110.0)]
    assert value[WEEKS[2:5]].round(6).tolist() == pytest.approx(held, abs=0.005)
    # Redeemed: worth what it paid until it can be sold on Monday, without costs.
    paid = 100.5 if payout in (100.5, {A: 100.5}) else 110.0
    assert value[WEEKS[5:7]].tolist() == pytest.approx([cash + 950 * paid] * 2)
    cash += 950 * paid
    # 99 % of it at Friday's 120, whole tens, bought at Monday's 121.
    count = int(0.99 * cash / 120 / 10) * 10
    cash -= count * 121 * 1.0005
    assert value[WEEKS[7]] == pytest.approx(cash + count * 121, abs=0.005)
    assert value[WEEKS[8]] == pytest.approx(cash + count * 122, abs=0.005)
    last = positions[WEEKS[8]]
    assert last.get_stock_list() == [C]
    assert last.get_cash() == pytest.approx(cash, abs=0.005)


def limits(exchange, code, day):
    return [
        bool(exchange.quote.get_data(code, day, day, field)) for field in
        ("limit_buy", "limit_sell")
    ]  # fmt: skip


def test_limits_begin_in_august_2022_with_a_first_day_of_their_own(tmp_path, use_store):
    days = pd.bdate_range("2022-07-27", "2022-08-05")
    closes = {
        A: [100, 130, 91, 91, 109.2, 131, 104.8, 104.8],  # +30, -30, 0, +20, …, -20 %
        B: [100.0] * 8,
    }
    new = bars({C: [157.3, 160, 160]}, days[5:])
    late = bars({"SH113009": [56.7, 60, 60]}, days[5:])
    write_store(
        tmp_path / "store", pd.concat([bars(closes, days), new, late]), calendar=days
    )
    use_store(tmp_path / "store")
    exchange = ConvertibleExchange(start_time=days[0], end_time=days[-1])
    free, up, down = [False, False], [True, False], [False, True]
    assert [limits(exchange, A, day) for day in days] == [
        *(free, free, free, free),
        *(up, free, down, free),
    ]
    assert limits(exchange, C, days[5]) == up
    assert limits(exchange, "SH113009", days[5]) == down
    assert limits(exchange, C, days[6]) == free
    # A share of the same moves would be barred.
    assert exchange.round_order(A, 1239.0, 1.0) == 1230.0
    assert exchange.round_order(A, 9.0, 1.0) == 0.0


def test_stocks_keep_their_boards(store):
    assert BoardExchange(
        start_time=WEEKS[1], end_time=WEEKS[8], deal_price="close"
    ).round_order("SH600001", 199.0, 1.0) == 100.0  # fmt: skip


def test_pools_share_the_account(store):
    strategy = PoolTopStrategy(
        signal=pd.DataFrame(), pools=["balanced", "all"], top=0.5
    )
    score = pd.Series({A: 1.0, B: 3.0, C: 2.0, "SH600001": 9.0, "SZ123009": np.nan})
    got = strategy.wanted(WEEKS[1], score).groupby(level=0).sum()
    assert got.to_dict() == {B: 1.0}
    # A's pool ends with it
    assert strategy.wanted(WEEKS[6], score[[A]]).empty


@pytest.mark.parametrize("kwargs", [{"top": 0}, {"top": 1.5}, {"cash": 1}, {"tops": 1}])
def test_strategy_refuses(store, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        PoolTopStrategy(signal=pd.DataFrame(), pools=["all"], **kwargs)


@pytest.mark.parametrize("payout", [-1, "first", {A: "last"}, True])
def test_exchange_refuses(store, payout):
    with pytest.raises(ValueError, match="`payout` must be"):
        ConvertibleExchange(payout=payout)
