"""Trades, orders and quotes of a day that contradict each other are refused."""

import numpy as np
import pandas as pd
import pytest

from data_handlers.aggregate.ticks import aggregate_ticks

N = 500


def day(locked=False):
    """Trades, orders and quotes of one stock that agree with each other."""
    rng = np.random.default_rng(0)
    time = pd.Timestamp("2024-03-05 09:30") + pd.to_timedelta(np.arange(N) * 12, "s")
    side = rng.choice([1, -1], N)
    price = np.round(10 + 0.01 * np.cumsum(side), 2) if not locked else 11.0
    later, earlier = 2 * np.arange(N) + 2, 2 * np.arange(N) + 1
    buy = np.where(side == 1, later, earlier)
    trades = pd.DataFrame({
        "instrument": "SZ000001", "time": time, "price": price,
        "volume": rng.integers(1, 30, N) * 100, "buy_id": buy,
        "sell_id": later + earlier - buy, "side": side,
    })  # fmt: skip
    both = [
        trades.assign(order_id=trades[f"{name}_id"], side=way, action=1)
        for name, way in (("buy", 1), ("sell", -1))
    ]
    placed = pd.concat(both).sort_values(["time", "order_id"])
    gone = placed.iloc[:N].assign(action=-1, time=time[-1])
    columns = ["instrument", "time", "price", "volume", "side", "order_id", "action"]
    orders = pd.concat([placed, gone], ignore_index=True)[columns]
    quotes = pd.DataFrame({
        "instrument": "SZ000001", "time": time, "bid_price_1": price - 0.01,
        "bid_volume_1": 100.0, "ask_price_1": price + 0.01, "ask_volume_1": 200.0,
    })  # fmt: skip
    return {"trades": trades, "orders": orders, "quotes": quotes}


WRONG = {
    "sides": ("trades", lambda t: t.assign(side=-t["side"]), "contradicts the order"),
    "ids of buyers and sellers": (
        "trades", lambda t: t.assign(buy_id=t["sell_id"], sell_id=t["buy_id"]),
        "contradicts the order ids in 100% of the trades of SZ000001"),
    "sides without ids": (
        "trades", lambda t: t.assign(side=-t["side"], buy_id=0, sell_id=0),
        "are the sides swapped"),
    "prices between the ticks": (
        "trades", lambda t: t.assign(price=t["price"] / 100),
        "no multiples of 0.01 CNY"),
    "shares taken for lots": (
        "trades", lambda t: t.assign(volume=t["volume"] * 100),
        "shares taken for lots"),
    "sides of orders": (
        "orders", lambda o: o.assign(side=-o["side"]), "are on the other side"),
    "actions": (
        "orders", lambda o: o.assign(action=-o["action"]),
        "1,000 cancellations of 500 new orders"),
    "bids and asks": (
        "quotes", lambda q: q.rename(columns=lambda c: c.replace("bid", "?").replace(
            "ask", "bid").replace("?", "ask")), "are bid and ask swapped"),
    "quotes in fen": (
        "quotes", lambda q: q.assign(bid_price_1=q["bid_price_1"] * 100,
                                     ask_price_1=q["ask_price_1"] * 100),
        "500 of 500 quotes bid above the highest"),
    "quotes in UTC": (
        "quotes", lambda q: q.assign(time=q["time"] - pd.Timedelta("8h")),
        "500 of 500 quotes lie outside the session"),
}  # fmt: skip


def test_a_day_that_agrees_is_taken():
    rows = aggregate_ticks(**day())
    assert rows.notes == {} and rows.frame["trades"].tolist() == [N]


@pytest.mark.parametrize("what", WRONG)
def test_what_contradicts_is_refused(what):
    tables = day()
    table, wrong, match = WRONG[what]
    if table == "trades":  # alone
        tables = {"trades": tables["trades"]}
    with pytest.raises(ValueError, match=match):
        aggregate_ticks(**tables | {table: wrong(tables[table])})


TOLD = {
    "ids against sides that have nothing to do with prices": (
        "trades", lambda t: t.assign(
            side=1, buy_id=np.minimum(t["buy_id"], t["sell_id"]),
            sell_id=np.maximum(t["buy_id"], t["sell_id"])),
        "sides that contradict the order ids"),
    "ids that are row numbers": (
        "trades", lambda t: t.assign(buy_id=range(1, N + 1), sell_id=range(N, 2 * N)),
        "sides that contradict the order ids"),
    "codes 0 and 1 as sides": (
        "trades", lambda t: t.assign(side=(t["side"] == 1).astype(int)),
        "trades all of one side, though prices moved"),
    "ids of orders": (
        "orders", lambda o: o.assign(order_id=o["order_id"] + 10**6),
        "order ids of trades that no order has"),
    "cancellations as orders": (
        "orders", lambda o: o.assign(action=1), "new orders with the id of an earlier"),
}  # fmt: skip


@pytest.mark.parametrize("what", TOLD)
def test_what_is_doubtful_is_told(what):
    tables = day()
    table, wrong, match = TOLD[what]
    notes = aggregate_ticks(**tables | {table: wrong(tables[table])}).notes
    assert any(note.startswith(match) for note in notes)


def test_one_side_alone_is_right_on_a_day_at_the_limit():
    trades = day(locked=True)["trades"]
    trades = trades[trades["side"] == -1]
    assert aggregate_ticks(pd.concat([trades] * 2)).frame["trades"].tolist() == [
        len(trades)
    ]


def test_orders_of_which_none_is_cancelled_are_told():
    tables = day()
    orders = tables["orders"].query("action == 1")
    more = orders.assign(order_id=orders["order_id"] + 10**6)
    rows = aggregate_ticks(tables["trades"], pd.concat([orders, more]))
    told = [n for note, n in rows.notes.items() if "none of them cancelled" in note]
    assert told == [4 * N]
