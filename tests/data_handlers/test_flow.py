"""Capital flow: from ticks to the store, and the features against pandas."""

import numpy as np
import pandas as pd
import pytest

from data_handlers.aggregate.schema import FLOW_CLASSES, FLOW_FIELDS
from data_handlers.aggregate.ticks import aggregate_ticks
from data_handlers.flow import FLOW_FEATURES, FLOW_STATES, FlowHandler
from qlib_ext.aggregates import build_store
from qlib_ext.ingest.store import read_bars, read_instruments, write_store
from qlib_ext.market import make_market, make_ticks

DATES = {"start_time": "2020-02-03", "end_time": "2020-12-31"}
FIT = {
    "fit_start_time": "2020-02-03",
    "fit_end_time": "2020-06-30",
    "styles": [],
    "neutralize": [],
}
NAMES = [f.name for f in FLOW_FEATURES]


@pytest.fixture(scope="module")
def flow_market(tmp_path_factory):
    out = tmp_path_factory.mktemp("flow") / "market"
    return make_market(out, stocks=24, years=1, seed=4, trades=40, order_flow=True)


def bare_store(flow_market, out, change=lambda bars: bars):
    """A copy of the market whose bars went through `change`."""
    every = sorted(f.name.upper() for f in (flow_market / "features").iterdir())
    bars = change(read_bars(flow_market, every))
    indices = set(every) - set(read_instruments(flow_market)["instrument"])
    write_store(out, bars, index_codes=sorted(indices))
    return out


def of_stock(store, code):
    frame = read_bars(store, [code]).set_index("datetime").sort_index()
    return frame.drop(columns="instrument").astype(float)


def expected(bars):
    """Every feature by its definition; `bars` on all trading days since listing."""
    buy = {k: bars[f"flow_buy_{k}"] for k in FLOW_CLASSES}
    sell = {k: bars[f"flow_sell_{k}"] for k in FLOW_CLASSES}
    net = {k: buy[k] - sell[k] for k in FLOW_CLASSES}
    both = {k: buy[k] + sell[k] for k in FLOW_CLASSES}

    def add(x, names=tuple(FLOW_CLASSES)):
        return sum(x[k] for k in names)

    main = ("large", "xlarge")
    total, share = add(both), add(net, main) / add(both)
    out = {"c_net": add(net) / total}
    for k in FLOW_CLASSES:
        out[f"c_net_{k}"] = net[k] / total
    out["c_main"] = share
    for k in ("small", "large", "xlarge"):
        out[f"c_share_{k}"] = both[k] / total
    out["c_buy_main"] = add(buy, main) / add(buy)
    out["c_sell_main"] = add(sell, main) / add(sell)
    small = net["small"] / both["small"]
    out["c_main_small"] = add(net, main) / add(both, main) - small

    def roll(x, n):
        return x.rolling(n, min_periods=1)

    for n in (5, 20):
        out[f"c_net_{n}"] = roll(add(net), n).sum() / roll(total, n).sum()
        out[f"c_main_{n}"] = roll(add(net, main), n).sum() / roll(total, n).sum()
    out["c_main_turn"] = out["c_main_5"] - out["c_main_20"]
    out["c_main_days"] = roll(np.sign(add(net, main)), 20).mean()
    out["c_main_strength"] = roll(share, 20).mean() / (roll(share, 20).std() + 0.001)
    out["c_volume"] = np.log(total / roll(total, 20).mean())
    change = bars["close"] / bars["close"].shift() - 1
    out["c_main_price"] = roll(share, 20).corr(change)
    out["c_known"] = total / bars["amount"]
    out["c_s_net"] = 1.0 + sum((share > b) * 1.0 for b in (-0.1, -0.02, 0.02, 0.1))
    out["c_s_who"] = 1.0 + 2 * (add(net, main) > 0) + (net["small"] > 0)
    five = roll(add(net, main), 5).sum()
    out["c_s_turn"] = 1.0 + 2 * (five > 0) + (add(net, main) > 0)
    active = add(buy) / total
    out["c_s_active"] = 1.0 + (active > 0.45) + (active > 0.55)
    frame = pd.DataFrame(out).where(bars["close"].notna())
    return frame.replace([np.inf, -np.inf], np.nan)


class TestFromTicks:
    def test_build_gives_the_flow_that_the_market_published(
        self, flow_market, tmp_path
    ):
        out = bare_store(
            flow_market,
            tmp_path / "store",
            lambda bars: bars.drop(columns=list(FLOW_FIELDS)),
        )
        ticks = make_ticks(
            flow_market, tmp_path / "ticks", start="2020-12-01", end="2020-12-11"
        )
        text = build_store("flow", ticks, out, bins="all", progress=False)
        assert "8 features written as bins" in text and "orders" not in text
        code = read_instruments(flow_market)["instrument"].iloc[-1]
        fields = list(FLOW_FIELDS)
        got = of_stock(out, code)[fields].loc["2020-12-01":"2020-12-11"]
        want = of_stock(flow_market, code)[fields].loc["2020-12-01":"2020-12-11"]
        assert want.notna().any().any() and (want.sum() > 0).sum() >= 4
        np.testing.assert_allclose(got, want, rtol=1e-6)
        with pytest.raises(ValueError, match="flow has flow_buy_small"):
            build_store("flow", ticks, out, bins="ms_rv", progress=False)

    def test_trades_counted_by_hand(self):
        start = pd.Timestamp("2020-01-02 09:40:00")
        rows = [
            # price, volume, buy id, sell id, side: order 1 buys 60,000 in two trades
            (10.0, 3000, 1, 11, 1),
            (10.0, 3000, 1, 12, 1),
            (10.0, 1000, 2, 13, -1),  # order 13 sells 10,000
            (20.0, 100_000, 3, 14, -1),  # order 14 sells 2,000,000
            (20.0, 1000, 4, 0, -1),  # seller unknown: an order of its own, 20,000
            (10.0, 500, 5, 15, 0),  # auction: on neither side
        ]
        trades = pd.DataFrame(
            rows, columns=["price", "volume", "buy_id", "sell_id", "side"]
        )
        trades.insert(0, "instrument", "SH600000")
        trades["time"] = start + pd.to_timedelta(np.arange(len(rows)), "s")
        row = aggregate_ticks(trades).frame.iloc[0]
        want = dict.fromkeys(FLOW_FIELDS, 0.0) | {
            "flow_buy_medium": 60_000.0,
            "flow_sell_small": 30_000.0,
            "flow_sell_xlarge": 2_000_000.0,
        }
        assert row[list(FLOW_FIELDS)].to_dict() == want
        no_side = aggregate_ticks(trades.drop(columns="side")).frame.iloc[0]
        assert no_side[list(FLOW_FIELDS)].isna().all()


class TestHandler:
    @pytest.fixture
    def handler(self, flow_market, use_store):
        use_store(flow_market)
        return FlowHandler(**DATES, **FIT)

    def test_every_feature_equals_its_definition(self, handler, flow_market):
        raw = handler.fetch(data_key="raw", col_set="feature")
        assert list(raw.columns) == NAMES
        listed = read_instruments(flow_market).sort_values("start")["instrument"]
        days = raw.index.get_level_values("datetime").unique()
        for code in (listed.iloc[0], listed.iloc[-1]):
            got = raw.xs(code, level="instrument")
            bars = of_stock(flow_market, code)
            calendar = pd.DatetimeIndex(
                sorted({*days, *bars.index})
            )  # suspended days are there
            bars = bars.reindex(calendar[calendar >= bars.index[0]])
            want = expected(bars).reindex(got.index)
            for f in FLOW_FEATURES:
                x, y = got[f.name].astype(float), want[f.name].astype(float)
                x = x.where(np.isfinite(x))
                if f.name == "c_main_price":  # Qlib: NaN where one hardly varies
                    y = y.where(x.notna())
                np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4, err_msg=f.name)
                known = x.dropna()
                assert known.between(f.low - 1e-5, f.high + 1e-5).all(), f.name
        # Suspended days have no row, and codes are left alone.
        seen = handler.fetch(data_key="infer", col_set="feature")
        gone = raw.index.difference(seen.index)
        assert len(gone) and raw.loc[gone].isna().all().all()
        for name, count in FLOW_STATES.items():
            assert set(seen[name]) <= set(range(count + 1))
            assert np.array_equal(seen[name], raw.loc[seen.index, name].fillna(0.0))

    def test_handler_ignores_the_future(
        self, handler, flow_market, tmp_path, use_store
    ):
        def perturb(bars):
            later = (bars["datetime"] > "2020-08-31").to_numpy()
            rng = np.random.default_rng(0)
            for field in (*FLOW_FIELDS, "close", "amount"):
                factor = np.exp(rng.normal(size=later.sum())).astype(np.float32)
                bars.loc[later, field] *= factor
            return bars

        use_store(bare_store(flow_market, tmp_path / "store", perturb))
        other = FlowHandler(**DATES, **FIT)
        for key in ("raw", "infer"):
            want = handler.fetch(slice(None, "2020-08-31"), "datetime", "feature", key)
            got = other.fetch(slice(None, "2020-08-31"), "datetime", "feature", key)
            pd.testing.assert_frame_equal(got, want, rtol=1e-4, atol=1e-5)

    def test_columns_and_a_store_without_flow(
        self, flow_market, qlib_market, use_store
    ):
        use_store(flow_market)
        few = FlowHandler(columns=["c_main", "c_s_who"], **DATES, **FIT)
        raw = few.fetch(data_key="raw", col_set="feature")
        assert list(raw.columns) == ["c_main", "c_s_who"]
        with pytest.raises(ValueError, match="must name some of"):
            FlowHandler(columns=["c_nothing"], **DATES, **FIT)
        use_store(qlib_market)
        with pytest.raises(ValueError, match="qlib-ext build flow"):
            FlowHandler(**DATES, **FIT)
