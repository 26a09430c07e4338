"""The 20 tick features against a plain reference, the Shanghai rule, bad input."""

import itertools
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_handlers.aggregate import ticks
from data_handlers.aggregate.build import build
from data_handlers.aggregate.schema import A_SHARE
from data_handlers.aggregate.ticks import (
    TICK_FEATURES,
    TICK_NAMES,
    aggregate_ticks,
)
from data_handlers.loaders import read_daily_parquet
from data_handlers.vendor.intraday import choose, detect, translate
from data_handlers.vendor.mapping import load_mapping

DAY = pd.Timestamp("2024-03-01")
OPEN, TEN, TAIL = 34_200.0, 36_000.0, 52_200.0
CONTINUOUS = [(34_200.0, 41_400.0), (46_800.0, 53_820.0)]


@pytest.fixture(scope="module")
def real(real_file):
    """Function that reads a file of real ticks in our names, or skips."""

    def read(name, table):
        path = real_file(name)
        raw = pq.read_table(path)
        layout = detect(raw.column_names, table, name)
        return translate(raw, layout, str(path), "Asia/Shanghai")[0].to_pandas()

    return read


def _std(x):
    mean = math.fsum(x) / len(x)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in x) / len(x))


def _strength(x):
    return math.nan if len(set(x)) == 1 else math.fsum(x) / len(x) / _std(x)


def _top(scores, k):
    """Positions of the k largest; of equal ones the earlier."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def plain_stock(trades, orders, quotes, shanghai):
    """Features of one stock-day from the definitions, one event at a time."""
    out = dict.fromkeys(TICK_NAMES, math.nan)
    rows = list(trades.itertuples(index=False))
    second = [(r.time - r.time.normalize()).total_seconds() for r in rows]
    amount = [r.price * r.volume for r in rows]
    total, volume = math.fsum(amount), sum(r.volume for r in rows)
    # -- parents
    buys, sells = {}, {}
    for r, a in zip(rows, amount, strict=True):
        buys[r.buy_id] = buys.get(r.buy_id, 0) + a
        sells[r.sell_id] = sells.get(r.sell_id, 0) + a
    logs = [math.log(a) for a in [*buys.values(), *sells.values()]]
    bound = math.fsum(logs) / len(logs) + _std(logs)
    big_buys = {k for k, a in buys.items() if math.log(a) > bound}
    big_sells = {k for k, a in sells.items() if math.log(a) > bound}
    if len(set([*buys.values(), *sells.values()])) == 1:
        big_buys, big_sells = set(), set()
    bought = math.fsum(buys[k] for k in big_buys)
    sold = math.fsum(sells[k] for k in big_sells)
    out["l2_big_net"] = (bought - sold) / total
    out["l2_big_buy"], out["l2_big_sell"] = bought / total, sold / total
    out["l2_buy_hhi"] = math.fsum((a / total) ** 2 for a in buys.values())
    out["l2_sell_hhi"] = math.fsum((a / total) ** 2 for a in sells.values())
    # -- post-open minutes
    first = [i for i, s in enumerate(second) if OPEN <= s < TEN]
    open_amount = math.fsum(amount[i] for i in first)
    big, active = [0.0] * 30, [0.0] * 30
    for i in first:
        m = int((second[i] - OPEN) // 60)
        active[m] += rows[i].side * amount[i]
        big[m] += amount[i] * (
            (rows[i].buy_id in big_buys) - (rows[i].sell_id in big_sells)
        )
    if open_amount:
        out["l2_open_big_net_ratio"] = math.fsum(big) / open_amount
        out["l2_act_net_open30"] = math.fsum(active) / open_amount
    out["l2_open_big_net_strength"] = _strength(big)
    # -- aggressors
    out["l2_act_buy"] = (
        math.fsum(a for r, a in zip(rows, amount, strict=True) if r.side == 1) / total
    )
    late = [i for i, s in enumerate(second) if s >= TAIL]
    if late:
        out["l2_act_net_last30"] = math.fsum(
            rows[i].side * amount[i] for i in late
        ) / math.fsum(amount[i] for i in late)
    out["l2_avg_trade"] = math.log(total / len(rows))
    sales = [a for r, a in zip(rows, amount, strict=True) if r.side == -1]
    if sales:
        out["l2_avg_outflow_ratio"] = (
            math.fsum(sales) / len(sales) / (total / len(rows))
        )
    # -- returns
    ret = [0.0] + [b.price / a.price - 1 for a, b in itertools.pairwise(rows)]
    chosen = _top(amount, math.ceil(3 * len(rows) / 10))
    out["l2_big_push"] = math.prod(1 + ret[i] for i in chosen) - 1
    smart = [abs(x) / math.sqrt(r.volume) for x, r in zip(ret, rows, strict=True)]
    chosen = _top(smart, math.ceil(len(rows) / 5))
    vwap = math.fsum(amount[i] for i in chosen) / sum(rows[i].volume for i in chosen)
    out["l2_smart"] = vwap / (total / volume) - 1
    if orders is not None and len(orders):
        _plain_orders(out, orders, rows, second, amount, active, open_amount, shanghai)
    if quotes is not None and len(quotes):
        _plain_quotes(out, quotes)
    return out


def _plain_orders(out, orders, rows, second, amount, active, open_amount, shanghai):
    """The book of each side, order by order.

    What was placed: for each order its resting part at its limit and the part filled
    at once at trade prices. An exchange that publishes everything says volume × limit
    for the whole; Shanghai says the rest only.
    """
    at_once = {}  # order id: [shares, CNY, minutes]
    for r, s, a in zip(rows, second, amount, strict=True):
        if r.side:
            own = r.buy_id if r.side == 1 else r.sell_id
            one = at_once.setdefault((own, r.side), [0, 0.0, {}])
            one[0] += r.volume
            one[1] += a
            if OPEN <= s < TEN:
                m = int((s - OPEN) // 60)
                one[2][m] = one[2].get(m, 0) + r.volume
    placed_v = cancel_v = 0
    placed = {1: 0.0, -1: 0.0}
    rest = {1: [0.0] * 30, -1: [0.0] * 30}
    limit = {}
    for o in orders.itertuples(index=False):
        s = (o.time - o.time.normalize()).total_seconds()
        m = int((s - OPEN) // 60) if OPEN <= s < TEN else None
        price = o.price
        if o.action == 1:
            if not price > 0:
                before = [r.price for r, t in zip(rows, second, strict=True) if t < s]
                price = before[-1] if before else rows[0].price
            limit[o.order_id] = price
            placed_v += o.volume
            placed[o.side] += price * o.volume
            if m is not None:
                rest[o.side][m] += price * o.volume
        else:
            cancel_v += o.volume
            price = price if price > 0 else limit.get(o.order_id, 0.0)
            if m is not None:
                rest[o.side][m] -= price * o.volume
    for (own, side), (shares, cny, minutes) in at_once.items():
        if shanghai:
            placed_v += shares
            placed[side] += cny
        elif own in limit:
            placed[side] += cny - shares * limit[own]
            for m, v in minutes.items():
                rest[side][m] -= v * limit[own]
    for r, s, a in zip(rows, second, amount, strict=True):
        if r.side and OPEN <= s < TEN:
            rest[-r.side][int((s - OPEN) // 60)] -= a
    will = [x + b - s for x, b, s in zip(active, rest[1], rest[-1], strict=True)]
    if open_amount:
        out["l2_open_buy_will_ratio"] = math.fsum(will) / open_amount
    out["l2_open_buy_will_strength"] = _strength(will)
    if placed_v:
        out["l2_cancel_ratio"] = cancel_v / placed_v
    if placed[1] + placed[-1]:
        out["l2_order_imb"] = (placed[1] - placed[-1]) / (placed[1] + placed[-1])


def _plain_quotes(out, quotes):
    quotes = quotes.drop_duplicates("time", keep="last")
    bids = [c for c in quotes if c.startswith("bid_volume")]
    asks = [c for c in quotes if c.startswith("ask_volume")]
    depth_b = quotes[bids].fillna(0).sum(axis=1).tolist()
    depth_a = quotes[asks].fillna(0).sum(axis=1).tolist()
    bid, ask = quotes["bid_price_1"].tolist(), quotes["ask_price_1"].tolist()
    t = [(x - x.normalize()).total_seconds() for x in quotes["time"]]
    spread, spread_w, depth, depth_w = [], 0.0, [], 0.0
    for i in range(len(t) - 1):
        w = sum(max(0.0, min(t[i + 1], e) - max(t[i], s)) for s, e in CONTINUOUS)
        if bid[i] > 0 and ask[i] > bid[i]:
            spread.append(w * (ask[i] - bid[i]) / ((ask[i] + bid[i]) / 2))
            spread_w += w
        both = depth_b[i] + depth_a[i]
        if both > 0:
            depth.append(w * (depth_b[i] - depth_a[i]) / both)
            depth_w += w
    if spread_w:
        out["l2_spread"] = math.fsum(spread) / spread_w
    if depth_w:
        out["l2_depth_imb"] = math.fsum(depth) / depth_w


def plain(trades, orders=None, quotes=None, shanghai=None):
    out = {}
    for code, t in trades.groupby("instrument", observed=True):
        own = [
            None if x is None else x[x["instrument"] == code] for x in (orders, quotes)
        ]
        is_sh = code.startswith("SH") if shanghai is None else shanghai
        out[(t["time"].iloc[0].normalize(), code)] = plain_stock(t, *own, is_sh)
    frame = pd.DataFrame.from_dict(out, orient="index")
    frame.index = pd.MultiIndex.from_tuples(out, names=["datetime", "instrument"])
    return frame[TICK_NAMES]


def assert_same(got, want, tol=1e-6):
    assert list(got.index) == list(want.index)
    for name in TICK_NAMES:
        a, b = got[name].to_numpy(), want[name].to_numpy(dtype=float)
        assert np.array_equal(np.isnan(a), np.isnan(b)), name
        off = np.nanmax(np.abs(a - b) / np.maximum(np.abs(b), 1e-3), initial=0)
        assert off < tol, f"{name}: {off}"


def _at(second):
    return DAY + pd.Timedelta(seconds=second)


def make_book(seed, code="SH600000", n=400, market_orders=True):
    """Order flow through a small matching engine; everything is published.

    Returns trades, orders (all of them, with their full volume) and quotes.
    """
    rng = np.random.default_rng(seed)
    book = {1: [], -1: []}  # side: [price, time, id, volume]
    trades, orders, quotes = [], [], []
    seconds = np.sort(rng.uniform(OPEN, 53_800, n))
    seconds = seconds[(seconds < 41_400) | (seconds > 46_800)]
    seconds[: n // 3] = np.sort(rng.uniform(OPEN, TEN, min(n // 3, len(seconds))))
    mid, oid = 10.0, 0
    for s in np.sort(np.round(seconds, 2)):
        live = [o for side in book.values() for o in side]
        if live and rng.random() < 0.2:
            gone = live[rng.integers(len(live))]
            side = 1 if gone in book[1] else -1
            book[side].remove(gone)
            orders.append((code, _at(s), gone[0], gone[3], side, gone[2], -1))
        else:
            oid += 1
            side = int(rng.choice([1, -1]))
            price = round(mid - side * rng.normal(0.02, 0.05), 2)
            left = volume = int(rng.integers(1, 30) * 100)
            market = market_orders and bool(trades) and rng.random() < 0.1
            shown = 0.0 if market else price
            other = book[-side]
            other.sort(key=lambda o: (side * o[0], o[1]))
            fills = []
            while left and other and (market or side * (price - other[0][0]) >= 0):
                o = other[0]
                take = min(left, o[3])
                ids = (oid, o[2]) if side == 1 else (o[2], oid)
                fills.append((code, _at(s), o[0], take, *ids, side))
                left -= take
                o[3] -= take
                if not o[3]:
                    other.pop(0)
            if market and left:  # the rest of a market order is not entered
                volume -= left
                left = 0
            if volume:
                orders.append((code, _at(s), shown, volume, side, oid, 1))
            trades += fills
            if left:
                book[side].append([price, s, oid, left])
        mid += rng.normal(0, 0.002)
        best = [max((o[0] for o in book[1]), default=0.0)]
        best += [min((o[0] for o in book[-1]), default=0.0)]
        depth = [float(sum(o[3] for o in book[x])) for x in (1, -1)]
        quotes.append((code, _at(s), *best, *depth))
    t_cols = ["instrument", "time", "price", "volume", "buy_id", "sell_id", "side"]
    o_cols = ["instrument", "time", "price", "volume", "side", "order_id", "action"]
    q_cols = ["instrument", "time", "bid_price_1", "ask_price_1"]
    return (
        pd.DataFrame(trades, columns=t_cols),
        pd.DataFrame(orders, columns=o_cols),
        pd.DataFrame(quotes, columns=[*q_cols, "bid_volume_1", "ask_volume_1"]),
    )


def as_shanghai(trades, orders):
    """The same market as Shanghai publishes it: resting parts only, when they rest."""
    at_once = {}
    for r in trades.itertuples(index=False):
        own = r.buy_id if r.side == 1 else r.sell_id
        if r.side:
            at_once[own] = at_once.get(own, 0) + r.volume
    rest = orders["volume"] - orders["order_id"].map(at_once).fillna(0).astype(int)
    new = orders["action"] == 1
    shown = orders.assign(volume=orders["volume"].where(~new, rest))
    return shown[shown["volume"] > 0]


class TestReference:
    def test_ticks_hand_worked_day(self, tick_features):
        # Three trades: buyer 1 takes 200 @ 10 from sellers 11 and 12, at 09:31 and
        # 09:31:30; seller 13 hits buyer 2 for 1000 @ 9.9 at 14:40.
        trades = pd.DataFrame(
            [
                ("SH600000", _at(34_260), 10.0, 100, 1, 11, 1),
                ("SH600000", _at(34_290), 10.0, 100, 1, 12, 1),
                ("SH600000", _at(52_800), 9.9, 1000, 2, 13, -1),
            ],
            columns=[
                *("instrument", "time", "price", "volume", "buy_id", "sell_id", "side")
            ],
        )
        row = tick_features(trades).iloc[0]
        total = 1000 + 1000 + 9900
        assert row["l2_act_buy"] == pytest.approx(2000 / total)
        assert row["l2_act_net_open30"] == 1
        assert row["l2_act_net_last30"] == -1
        assert row["l2_avg_trade"] == pytest.approx(math.log(total / 3))
        assert row["l2_avg_outflow_ratio"] == pytest.approx(9900 / (total / 3))
        # Parents: buy 2000, 9900; sell 1000, 1000, 9900: the two of 9900 are large.
        assert row["l2_big_buy"] == pytest.approx(9900 / total)
        assert row["l2_big_net"] == 0
        assert row["l2_open_big_net_ratio"] == 0
        assert np.isnan(row["l2_open_big_net_strength"])
        assert row["l2_buy_hhi"] == pytest.approx((2000**2 + 9900**2) / total**2)
        # The largest of ⌈0.9⌉ = 1 trades moved the price by −1 %.
        assert row["l2_big_push"] == pytest.approx(-0.01)
        assert row["l2_smart"] == pytest.approx(9.9 / (total / 1200) - 1)
        need = [f.name for f in TICK_FEATURES if set(f.needs) & {"orders", "quotes"}]
        assert row[need].isna().all() and len(need) == 6

    def test_ticks_orders_and_quotes_hand_worked(self, tick_features):
        trades = pd.DataFrame(
            [("SH600000", _at(34_260), 10.0, 100, 1, 11, 1)],
            columns=[
                *("instrument", "time", "price", "volume", "buy_id", "sell_id", "side")
            ],
        )
        # Sell 11 rests with 300 @ 10; buy 1 takes 100 at once (Shanghai: no row); buy 3
        # rests 200 @ 9.9 and takes half of it back.
        orders = pd.DataFrame(
            [
                ("SH600000", _at(34_230), 10.0, 300, -1, 11, 1),
                ("SH600000", _at(34_320), 9.9, 200, 1, 3, 1),
                ("SH600000", _at(34_380), 9.9, 100, 1, 3, -1),
            ],
            columns=[
                *("instrument", "time", "price", "volume", "side", "order_id", "action")
            ],
        )
        quotes = pd.DataFrame(
            [
                ("SH600000", _at(34_200), 9.9, 10.1, 100.0, 300.0),
                ("SH600000", _at(34_260), 10.0, 10.1, 300.0, 100.0),
                ("SH600000", _at(34_380), 9.0, 11.0, 1.0, 1.0),
            ],
            columns=[
                *("instrument", "time", "bid_price_1", "ask_price_1"),
                *("bid_volume_1", "ask_volume_1"),
            ],
        )
        row = tick_features(trades, orders, quotes).iloc[0]
        assert row["l2_cancel_ratio"] == pytest.approx(100 / (300 + 200 + 100))
        buy, sell = 200 * 9.9 + 100 * 10, 300 * 10
        assert row["l2_order_imb"] == pytest.approx((buy - sell) / (buy + sell))
        # net 1000; resting buy +1980 − 990; resting sell +3000 − 1000
        will = 1000 + (1980 - 990) - (3000 - 1000)
        assert row["l2_open_buy_will_ratio"] == pytest.approx(will / 1000)
        # 60 s at 0.2/10 and 120 s at 0.1/10.05; the last snapshot counts for nothing.
        spread = (60 * 0.2 / 10 + 120 * 0.1 / 10.05) / 180
        assert row["l2_spread"] == pytest.approx(spread)
        assert row["l2_depth_imb"] == pytest.approx((60 * -0.5 + 120 * 0.5) / 180)

    @pytest.mark.parametrize("code", ["SH600000", "SZ000001"])
    def test_ticks_equal_the_plain_reference_on_random_order_flow(
        self, code, tick_features
    ):
        for seed in range(4):
            trades, orders, quotes = make_book(seed, code)
            if code.startswith("SH"):
                orders = as_shanghai(trades, orders)
            got = tick_features(trades, orders, quotes)
            assert_same(got, plain(trades, orders, quotes))
            assert got.notna().to_numpy().all()

    @pytest.mark.parametrize(
        "code",
        [
            pytest.param("SH600536", marks=pytest.mark.slow),
            pytest.param("SH600961", marks=pytest.mark.slow),
            "SH605580",
        ],
    )
    def test_ticks_equal_the_plain_reference_on_real_ticks_of_2023_07(
        self, code, tick_features, real
    ):
        trades = real("l2_trades_cn_20230711.parquet", "trades")
        orders = real("l2_orders_cn_20230711.parquet", "orders")
        trades = trades[trades["instrument"] == code]
        orders = orders[orders["instrument"] == code]
        assert_same(tick_features(trades, orders), plain(trades, orders))

    def test_ticks_equal_the_plain_reference_on_real_ticks_of_2023_02(self, real):
        trades = real("l2_trades_cn_600519_202302.parquet", "trades")
        orders = real("l2_orders_cn_600519_20230201.parquet", "orders")
        quotes = real("l2_quotes_cn_600519_202302.parquet", "quotes")
        for day in ("2023-02-01", "2023-02-02", "2023-02-03"):
            rows = aggregate_ticks(trades, orders, quotes, day=day)
            got = rows.frame.set_index(["datetime", "instrument"])[TICK_NAMES]
            own = [
                x[x["time"].dt.strftime("%Y-%m-%d") == day]
                for x in (trades, orders, quotes)
            ]
            assert_same(got, plain(*own))

    def test_ticks_daily_facts_agree_with_the_snapshots(self, real, real_file):
        trades = real("l2_trades_cn_600519_202302.parquet", "trades")
        raw = pd.read_parquet(real_file("l2_quotes_cn_600519_202302.parquet"))
        for day in ("2023-02-01", "2023-02-02", "2023-02-03"):
            row = aggregate_ticks(trades, day=day).frame.iloc[0]
            last = raw[raw["time"].dt.strftime("%Y-%m-%d") == day].iloc[-1]
            assert row["volume"] == last["TradVolume"]
            assert row["amount"] == pytest.approx(last["Turnover"], rel=1e-9)
            assert row["trades"] == last["TradNumber"]
            assert row["open"] == last["OpenPrice"]
            assert row["high"] == last["HighPrice"]
            assert row["low"] == last["LowPrice"]
            assert row["close"] == last["ClosePrice"]

    def test_ticks_both_snapshot_forms_are_read(self, tick_features, real):
        quotes = real("l2_quotes_cn_20211201.parquet", "quotes")
        assert {"bid_price_1", "ask_price_1"} <= set(quotes)
        levels = [c for c in quotes if "volume" in c]
        assert len(levels) == 20
        of = quotes[quotes["bid_price_1"] > 0].groupby("instrument", observed=True)
        times = of["time"].min().dt.normalize()
        trades = pd.DataFrame(
            {
                "instrument": times.index,
                "time": times.to_numpy() + pd.Timedelta("10h"),
                "price": of["bid_price_1"].median().to_numpy(),
                "volume": 100,
            }
        )
        got = tick_features(trades, None, quotes)
        assert_same(
            got[["l2_spread", "l2_depth_imb"]].reindex(columns=TICK_NAMES),
            plain(trades.assign(buy_id=1, sell_id=1, side=0), None, _usable(quotes))[
                ["l2_spread", "l2_depth_imb"]
            ].reindex(columns=TICK_NAMES),
        )
        assert got["l2_spread"].between(1e-5, 0.02).all()


def _usable(quotes):
    """Without crossed snapshots in continuous trading, as the kernel rejects them."""
    s = (quotes["time"] - quotes["time"].dt.normalize()).dt.total_seconds()
    inside = sum(((s >= a) & (s < b)).astype(int) for a, b in CONTINUOUS) > 0
    bid, ask = quotes["bid_price_1"], quotes["ask_price_1"]
    return quotes[~(inside & (bid > 0) & (ask > 0) & (bid >= ask))]


class TestShanghaiRule:
    def test_both_ways_of_publishing_give_the_same_features(self, tick_features):
        for seed in range(5):
            trades, orders, quotes = make_book(seed, market_orders=seed % 2 == 0)
            shown = as_shanghai(trades, orders)
            assert len(shown) < len(orders)
            full = tick_features(trades, orders, quotes, publishes_all=True)
            part = tick_features(trades, shown, quotes, publishes_all=False)
            assert_same(part, full, tol=1e-9)

    def test_published_orders_alone_overstate_the_cancel_ratio(
        self, tick_features, real
    ):
        trades = real("l2_trades_cn_20230711.parquet", "trades")
        orders = real("l2_orders_cn_20230711.parquet", "orders")
        rebuilt = tick_features(trades, orders)
        new = orders[orders["action"] == 1]
        gone = orders[orders["action"] == -1]
        for code, row in rebuilt.droplevel(0).iterrows():
            volume = [x[x["instrument"] == code]["volume"].sum() for x in (gone, new)]
            naive = volume[0] / volume[1]
            own = trades[(trades["instrument"] == code) & (trades["side"] != 0)]
            fixed = volume[0] / (volume[1] + own["volume"].sum())
            assert row["l2_cancel_ratio"] == pytest.approx(fixed)
            assert naive > 1.2 * fixed

    def test_auto_knows_the_exchange_by_the_code(self, tick_features):
        trades, orders, _ = make_book(1, "SZ000001")
        auto = tick_features(trades, orders)
        pd.testing.assert_frame_equal(
            auto, tick_features(trades, orders, publishes_all=["SZ000001"])
        )
        other = tick_features(trades, orders, publishes_all=False)
        assert auto["l2_cancel_ratio"].item() > other["l2_cancel_ratio"].item()
        # The resting book, and so buy intention, is the same for a resting part.
        with pytest.raises(ValueError, match="`publishes_all`"):
            tick_features(trades, orders, publishes_all="sometimes")


class TestProperties:
    def test_ticks_of_one_day_ignore_every_other_day(self, tick_features):
        trades, orders, quotes = make_book(3)
        want = tick_features(trades, orders, quotes)
        later = [
            pd.concat([x, x.assign(time=x["time"] + pd.Timedelta("1D"))])
            for x in (trades, orders, quotes)
        ]
        later[0].loc[later[0]["time"] > DAY + pd.Timedelta("1D"), "price"] *= 2
        rows = aggregate_ticks(*later, day=DAY)
        got = rows.frame.set_index(["datetime", "instrument"])[TICK_NAMES]
        pd.testing.assert_frame_equal(got, want)
        assert rows.rejected["trades"] == {"another day": len(trades)}

    def test_ticks_values_lie_in_their_documented_range(self, tick_features):
        for seed in range(5):
            trades, orders, quotes = make_book(seed + 20)
            row = tick_features(trades, as_shanghai(trades, orders), quotes).iloc[0]
            for f in TICK_FEATURES:
                assert f.low - 1e-9 <= row[f.name] <= f.high + 1e-9, f.name

    def test_ticks_many_stocks_in_threads_equal_each_alone(self, tick_features):
        books = [make_book(k, f"SH60000{k}", n=120) for k in range(6)]
        all_of = [pd.concat(x) for x in zip(*books, strict=True)]
        got = tick_features(*all_of, threads=3)
        alone = pd.concat([tick_features(*b) for b in books])
        pd.testing.assert_frame_equal(got, alone)

    def test_ticks_sources_without_orders_quotes_sides_or_ids_give_nan_there(
        self, tick_features
    ):
        trades, orders, quotes = make_book(4)
        full = tick_features(trades, orders, quotes)
        cases = {
            "orders": tick_features(trades, None, quotes),
            "quotes": tick_features(trades, orders),
            "trades' side": tick_features(trades.drop(columns="side"), orders, quotes),
            "trades' order ids": tick_features(
                trades.drop(columns=["buy_id", "sell_id"]), orders, quotes
            ),
        }
        for what, got in cases.items():
            for f in TICK_FEATURES:
                if what in f.needs:
                    assert np.isnan(got[f.name].item()), (what, f.name)
                elif "orders" not in f.needs:
                    assert got[f.name].item() == full[f.name].item(), (what, f.name)


class TestBadInput:
    def test_ticks_bad_rows_are_rejected_and_counted(self):
        trades, orders, quotes = make_book(5)
        t, o, q = trades.copy(), orders.copy(), quotes.copy()
        t["side"] = t["side"].astype(int)
        extra = [t.iloc[[3]]]  # a duplicate
        extra.append(t.iloc[[4]].assign(price=-1.0))
        extra.append(t.iloc[[4]].assign(price=np.nan))
        extra.append(t.iloc[[5]].assign(volume=0))
        extra.append(t.iloc[[6]].assign(side=7, buy_id=10**6))
        extra.append(t.iloc[[7]].assign(time=pd.NaT))
        extra.append(t.iloc[[8]].assign(time=_at(80_000)))
        bad_o = [o.iloc[[2]], o.iloc[[3]].assign(action=9, order_id=10**6)]
        bad_o.append(o.iloc[[4]].assign(price=-2.0, order_id=10**6))
        bad_q = [q.iloc[[50]].assign(bid_price_1=11.0, ask_price_1=10.0)]
        bad_q.append(q.iloc[[51]].assign(bid_volume_1=-1.0))
        rows = aggregate_ticks(
            pd.concat([t, *extra]), pd.concat([o, *bad_o]), pd.concat([q, *bad_q])
        )
        assert rows.rejected["trades"] == {
            **{"outside the session": 1, "price not positive": 2},
            **{"volume not positive": 1, "duplicate": 1},
            **{"unknown side or action code": 1, "no time": 1},
        }
        assert rows.rejected["orders"] == {
            **{"duplicate": 1, "unknown side or action code": 1},
            **{"price not positive": 1},
        }
        assert rows.rejected["quotes"] == {
            **{"crossed quote": 1, "volume not positive": 1}
        }
        want = aggregate_ticks(trades, orders, quotes)
        pd.testing.assert_frame_equal(rows.frame, want.frame)

    def test_ticks_all_delivered_twice_count_once(self):
        # Neighbouring ids at one moment: an aggressor that fills many resting orders.
        trades, orders, quotes = make_book(5)
        sweep = trades.iloc[[10] * 64].reset_index(drop=True)
        sweep["sell_id"] = np.arange(10**6, 10**6 + 64)
        sweep = sweep.assign(side=1, buy_id=10**7)
        trades = pd.concat([trades, sweep]).sort_values("time", kind="stable")
        want = aggregate_ticks(trades, orders, quotes)
        for copies in ([trades, trades], [trades.iloc[:300], trades]):
            twice = aggregate_ticks(
                pd.concat(copies), pd.concat([orders] * 2), pd.concat([quotes] * 2)
            )
            extra = sum(map(len, copies)) - len(trades)
            assert twice.rejected["trades"] == {"duplicate": extra}
            assert twice.rejected["orders"] == {"duplicate": len(orders)}
            assert twice.rejected["quotes"]["duplicate"] >= len(quotes)
            pd.testing.assert_frame_equal(twice.frame, want.frame)

    def test_ticks_in_another_unit_are_rejected_or_refused(self):
        books = [make_book(k, f"SZ00000{k}") for k in range(4)]
        trades, orders = (pd.concat([b[i] for b in books]) for i in (0, 1))
        one = (trades["instrument"] == "SZ000002").to_numpy()
        why = "price of another level than the stock's trades"
        first = one & (np.cumsum(one) == 5)
        odd = trades.assign(
            price=np.where(first, trades["price"] * 100, trades["price"])
        )
        got = aggregate_ticks(odd, orders)
        assert got.rejected["trades"].get(why) == 1 and not got.lacking.any()
        half = one & (np.cumsum(one) < 90)
        odd = trades.assign(
            price=np.where(half, trades["price"] * 100, trades["price"])
        )
        assert aggregate_ticks(odd).lacking.sum() == 1
        for columns, match in (
            ({"price": (trades["price"] * 100).round()}, "whole numbers.*SZ000002"),
            ({"volume": trades["volume"] // 100}, "no multiples of 100.*SZ000002"),
        ):
            odd = trades.assign(**columns).where(pd.Series(one, trades.index), trades)
            with pytest.raises(ValueError, match=match):
                aggregate_ticks(odd)
        with pytest.raises(ValueError, match="orders are priced at more than eight"):
            aggregate_ticks(trades, orders.assign(price=orders["price"] * 100))
        with pytest.raises(
            ValueError, match=r"orders are of multiples.*units: \{volume"
        ):
            aggregate_ticks(trades, orders.assign(volume=orders["volume"] // 100))

    def test_ticks_out_of_order_are_sorted_and_counted(self):
        trades, orders, quotes = make_book(6)
        want = aggregate_ticks(trades, orders, quotes)
        # Swap two blocks of different moments; rows of one moment keep their order.
        k = int(np.flatnonzero(np.diff(trades["time"]) > np.timedelta64(0))[50]) + 1
        moved = pd.concat([trades.iloc[k:], trades.iloc[:k]])
        rows = aggregate_ticks(moved, orders, quotes)
        assert rows.notes["trades out of time order (sorted)"] == 1
        pd.testing.assert_frame_equal(rows.frame, want.frame)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda t: t.drop(columns="price"), "no column 'price'"),
            (
                lambda t: t.assign(time=t["time"].dt.tz_localize("Asia/Shanghai")),
                "time zone Asia/Shanghai",
            ),
            (
                lambda t: t.assign(time=t["time"] - pd.Timedelta("8h")),
                "another time zone",
            ),
            (lambda t: t.assign(side="B"), "'side' must hold numbers"),
            (lambda t: t.assign(time=t["time"].astype(str)), "must be a timestamp"),
        ],
    )
    def test_ticks_bad_tables_name_the_column(self, change, match):
        with pytest.raises(ValueError, match=match):
            aggregate_ticks(change(make_book(7)[0]))


class TestAdapters:
    def test_mapping_file_translates_any_layout(self, tmp_path, tick_features):
        trades, orders, _ = make_book(8, "SZ000001")
        stamp = trades["time"]
        clock = stamp.dt.strftime("%H%M%S%f").str[:-3].astype(int)
        vendor = pd.DataFrame(
            {
                "sym": "000001.SZ",
                "d": stamp.dt.strftime("%Y%m%d").astype(int),
                "t": clock,
                "px": trades["price"],
                "lots": trades["volume"] // 100,
                "b": trades["buy_id"],
                "s": trades["sell_id"],
                "ex": "F",
                "n": np.arange(len(trades)),
            }
        )
        gone = orders[orders["action"] == -1]
        cancels = pd.DataFrame(
            {
                "sym": "000001.SZ",
                "d": gone["time"].dt.strftime("%Y%m%d").astype(int),
                "t": gone["time"].dt.strftime("%H%M%S%f").str[:-3].astype(int),
                "px": 0.0,
                "lots": gone["volume"] // 100,
                "b": gone["order_id"].where(gone["side"] == 1, 0),
                "s": gone["order_id"].where(gone["side"] == -1, 0),
                "ex": "4",
                "n": 10**6,
            }
        )
        (tmp_path / "map.yaml").write_text(
            "session: a_share\n"
            "sources:\n"
            "  ticks:\n"
            "    kind: trades\n"
            "    columns: {instrument: sym, time: {date: d, time: t}, price: px,\n"
            "              volume: lots, buy_id: b, sell_id: s}\n"
            "    units: {volume: lots}\n"
            "    sequence: n\n"
            "    side_from_ids: true\n"
            "    cancels: {column: ex, values: ['4']}\n"
        )
        spec = load_mapping(tmp_path / "map.yaml")
        shuffled = pd.concat([vendor, cancels]).sample(frac=1, random_state=0)
        shuffled.to_parquet(tmp_path / "x.parquet")
        plain_t, plain_o = translate(
            pa.Table.from_pandas(shuffled, preserve_index=False),
            choose(spec.tables["trades"], "trades", str(tmp_path / "x.parquet")),
            "x.parquet",
            "Asia/Shanghai",
        )
        new = orders[orders["action"] == 1]
        own = pd.concat([new, plain_o.to_pandas().sort_values("time")])
        own["instrument"] = own["instrument"].astype(str)
        got = tick_features(plain_t, own.sort_values("time", kind="stable"))
        assert_same(got, plain(trades, orders), tol=1e-9)

    def test_shenzhen_files_beside_shanghai_ones_need_no_mapping(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(ticks, "_SEEN", 10**6)  # silent from ten to noon
        # Shenzhen: no flag, cancellations among the trades, times as one number; two
        # exchanges in one folder, each file known by its columns.
        ours, books = tmp_path / "out", {}
        for code in ("SZ000001", "SH600000"):
            books[code] = list(make_book(11, code, market_orders=False)[:2])
        trades, orders = books["SZ000001"]
        books["SH600000"][1] = as_shanghai(*books["SH600000"])

        def number(time):
            return time.dt.strftime("%Y%m%d%H%M%S%f").str[:-3].astype(np.int64)

        gone = orders[orders["action"] == -1]
        new = orders[orders["action"] == 1]
        vendor = {
            "SecurityID": 1,
            "TransactTime": number(trades["time"]),
            "LastPx": trades["price"],
            "LastQty": trades["volume"],
            "BidApplSeqNum": trades["buy_id"],
            "OfferApplSeqNum": trades["sell_id"],
            "ExecType": "F",
            "ApplSeqNum": np.arange(len(trades)),
        }
        cancels = {
            "SecurityID": 1,
            "TransactTime": number(gone["time"]),
            "LastPx": 0.0,
            "LastQty": gone["volume"],
            "BidApplSeqNum": gone["order_id"].where(gone["side"] == 1, 0),
            "OfferApplSeqNum": gone["order_id"].where(gone["side"] == -1, 0),
            "ExecType": "4",
            "ApplSeqNum": 10**6,
        }
        both = pd.concat([pd.DataFrame(vendor), pd.DataFrame(cancels)])
        placed = pd.DataFrame(
            {
                "SecurityID": 1,
                "TransactTime": number(new["time"]),
                "Price": new["price"],
                "OrderQty": new["volume"],
                "Side": new["side"].map({1: "1", -1: "2"}),
                "OrdType": "2",
                "ApplSeqNum": new["order_id"],
            }
        )
        day = f"{trades['time'].iloc[0]:%Y%m%d}"
        for table, frame in (("trades", both), ("orders", placed)):
            folder = tmp_path / "in" / table
            folder.mkdir(parents=True)
            frame.to_parquet(folder / f"sz_{day}.parquet", index=False)
            sh = books["SH600000"][0 if table == "trades" else 1]
            sh.to_parquet(folder / f"sh_{day}.parquet", index=False)
        report = build("l2", tmp_path / "in", ours, progress=False)
        assert not any(report.rejected.values())
        assert report.rows_in["orders"] == sum(len(b[1]) for b in books.values())
        assert "orders out of time order (sorted)" not in report.notes
        got = read_daily_parquet(ours / "l2")
        want = pd.concat([plain(*book) for book in books.values()]).sort_index()
        assert_same(got.astype(float), want, tol=2e-6)  # float32 on disk

    def test_trades_of_an_auction_have_no_aggressor(self):
        at = ["09:25:00", "09:30:00", "14:56:59", "15:00:00"]
        raw = pa.table(
            {
                "SecurityID": ["000001"] * 4,
                "TransactTime": pa.array(
                    pd.to_datetime([f"2024-03-01 {t}" for t in at]),
                    pa.timestamp("us"),
                ),
                "LastPx": [1.0] * 4,
                "LastQty": [100] * 4,
                "BidApplSeqNum": [2, 1, 8, 9],
                "OfferApplSeqNum": [1, 2, 7, 3],
                "ExecType": ["F"] * 4,
                "ApplSeqNum": [1, 2, 3, 4],
            }
        )
        layout = detect(raw.column_names, "trades", "f")
        own, cancels = translate(raw, layout, "f", A_SHARE.tz, A_SHARE)
        assert own.column("side").to_pylist() == [0, -1, 1, 0]
        assert cancels.num_rows == 0

    def test_unknown_codes_are_rejected_rows_not_errors(self):
        raw = pa.table(
            {
                "instrument": ["SH600519"] * 3,
                "time": pa.array([_at(36_000)] * 3, pa.timestamp("us")),
                "price": [1.0] * 3,
                "qty": [100] * 3,
                "buy_no": [1, 2, 3],
                "sell_no": [4, 5, 6],
                "bs_flag": ["B", "?", None],
                "biz_index": [1, 2, 3],
            }
        )
        layout = detect(raw.column_names, "trades", "f")
        rows = aggregate_ticks(translate(raw, layout, "f", "Asia/Shanghai")[0])
        assert rows.rejected["trades"] == {"unknown side or action code": 2}

    def test_time_zones_of_a_source_are_translated(self, tick_features):
        trades = make_book(9)[0]
        utc = trades.assign(time=trades["time"].dt.tz_localize("Asia/Shanghai"))
        utc["time"] = utc["time"].dt.tz_convert("UTC")
        layout = detect(list(utc.columns), "trades", "f")
        table = pa.Table.from_pandas(utc, preserve_index=False)
        got = tick_features(translate(table, layout, "f", "Asia/Shanghai")[0])
        pd.testing.assert_frame_equal(got, tick_features(trades))

    def test_unknown_layout_names_file_and_columns(self):
        with pytest.raises(ValueError, match=r"f\.parquet: no known layout of orders"):
            detect(["a", "b"], "orders", "f.parquet")
