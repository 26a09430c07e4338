"""Board rules, and a back-test of explicit orders worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from data_handlers.boards import CHINEXT_REFORM, board_of
from qlib_ext.portfolio.exchange import BoardExchange, DayQuote

DAYS = pd.bdate_range("2021-03-01", periods=6)
# Raw prices; the day before the range gives the first limits through `change`.
MAIN, STAR, ST, HALTED, LOCKED, SPLIT = (
    "SH600001",
    "SH688001",
    "SZ000002",
    "SH600003",
    "SZ300004",
    "SH600005",
)


def bars():
    """Six stocks; a row is (day, code, open, high, low, close, vwap, previous, factor).

    LOCKED trades only at its upper limit of 20 % on day 1 and at its lower one on day
    3; ST closes at its limit of 5 % on day 1 after trading below it; SPLIT doubles its
    shares on day 3.
    """
    rows = []

    def add(day, code, open_, high, low, close, vwap, previous, factor=1.0, st=0.0):
        rows.append(
            {
                "datetime": DAYS[day],
                "instrument": code,
                "open": open_ * factor,
                "high": high * factor,
                "low": low * factor,
                "close": close * factor,
                "vwap": vwap * factor,
                "volume": 1e7 / factor,
                "amount": 1e7 * vwap,
                "factor": factor,
                "change": close / previous - 1,
                "is_st": st,
            }
        )

    for day in range(6):
        add(day, MAIN, 10.0, 10.5, 9.5, 10.0, 10.0, 10.0)
        add(day, STAR, 50.0, 52.0, 48.0, 50.0, 50.0, 50.0)
        if day not in (2, 3):
            add(day, HALTED, 20.0, 20.5, 19.5, 20.0, 20.0, 20.0)
    add(0, ST, 4.0, 4.1, 3.9, 4.0, 4.0, 4.0, st=1)
    add(1, ST, 4.0, 4.2, 4.0, 4.2, 4.1, 4.0, st=1)  # 5 % of 4.00 is 4.20
    for day in (2, 3, 4, 5):
        add(day, ST, 4.2, 4.3, 4.1, 4.2, 4.2, 4.2, st=1)
    add(0, LOCKED, 30.0, 30.0, 30.0, 30.0, 30.0, 30.0)
    add(1, LOCKED, 36.0, 36.0, 36.0, 36.0, 36.0, 30.0)
    add(2, LOCKED, 36.0, 37.0, 35.0, 36.0, 36.0, 36.0)
    add(3, LOCKED, 28.8, 28.8, 28.8, 28.8, 28.8, 36.0)
    add(4, LOCKED, 28.0, 29.0, 27.0, 28.0, 28.0, 28.8)
    add(5, LOCKED, 28.0, 29.0, 27.0, 28.0, 28.0, 28.0)
    for day in range(3):
        add(day, SPLIT, 8.0, 8.2, 7.8, 8.0, 8.0, 8.0)
    for day in (3, 4, 5):
        add(day, SPLIT, 4.0, 4.1, 3.9, 4.0, 4.0, 4.0, factor=2.0)
    return pd.DataFrame(rows)


@pytest.fixture
def board_store(tmp_path, use_store):
    from qlib_ext.ingest.store import write_store

    store = tmp_path / "store"
    write_store(store, bars())
    use_store(store)
    return store


def run(orders, account=100_000.0, **kwargs):
    """Back-test of a list of (day, code, "buy" or "sell", raw shares)."""
    from qlib.backtest import backtest
    from qlib.backtest.decision import Order, OrderDir, TradeDecisionWO
    from qlib.strategy.base import BaseStrategy

    class Listed(BaseStrategy):
        def generate_trade_decision(self, execute_result=None):
            start, end = self.trade_calendar.get_step_time()
            now = [o for o in orders if DAYS[o[0]] == start.normalize()]
            return TradeDecisionWO(
                [
                    Order(
                        stock_id=code,
                        amount=shares / self.trade_exchange.get_factor(code, start, end)
                        if np.isfinite(self.trade_exchange.get_factor(code, start, end))
                        else shares,
                        direction=OrderDir.BUY if side == "buy" else OrderDir.SELL,
                        start_time=start,
                        end_time=end,
                    )
                    for _, code, side, shares in now
                ],
                self,
            )

    exchange = BoardExchange(start_time=DAYS[0], end_time=DAYS[-1], **kwargs)
    metrics, _ = backtest(
        DAYS[0],
        DAYS[4],
        Listed(),
        {
            "class": "SimulatorExecutor",
            "module_path": "qlib.backtest.executor",
            "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
        },
        benchmark=pd.Series(0.0, DAYS),
        account=account,
        exchange_kwargs={"exchange": exchange},
    )
    report, positions = metrics["1day"]
    return report, positions


class TestBackTestByHand:
    orders = [  # noqa: RUF012
        (0, MAIN, "buy", 1_050),  # 1,000 in lots of 100
        (0, STAR, "buy", 199),  # below STAR's 200
        (0, STAR, "buy", 333),  # above 200 each share counts
        (0, HALTED, "buy", 500),
        (0, SPLIT, "buy", 1_000),
        (1, ST, "buy", 2_000),  # closes at the limit, but the vwap is below it
        (1, LOCKED, "buy", 100),  # all day at the upper limit
        (2, HALTED, "sell", 500),  # suspended
        (2, LOCKED, "buy", 100),
        (3, LOCKED, "sell", 100),  # all day at the lower limit
        (3, MAIN, "sell", 450),  # 400
        (3, SPLIT, "sell", 300),  # 2,000 shares by now
        (4, LOCKED, "sell", 100),
        (4, HALTED, "sell", 500),
        (4, MAIN, "buy", 100_000),  # more than there is cash
    ]

    def test_account_agrees_to_the_cent(self, board_store):
        report, positions = run(self.orders)
        # Day 0: 10,000 + 16,650 + 10,000 + 8,000, each with 0.1 %, at least 5 yuan.
        cash = 100_000 - 44_650 - (10 + 16.65 + 10 + 8)
        assert report["cash"].iloc[0] == pytest.approx(cash, abs=0.005)
        assert report["total_cost"].iloc[0] == pytest.approx(44.65, abs=0.005)
        assert report["account"].iloc[0] == pytest.approx(100_000 - 44.65, abs=0.005)
        # Day 1: 2,000 ST at 4.10 for 8,200 and 8.20; LOCKED cannot be bought.
        cash -= 8_200 + 8.2
        assert report["cash"].iloc[1] == pytest.approx(cash, abs=0.005)
        value = cash + 10_000 + 16_650 + 10_000 + 8_000 + 2_000 * 4.2
        assert report["account"].iloc[1] == pytest.approx(value, abs=0.005)
        # Day 2: HALTED stays; 100 LOCKED at 36 cost the least fee of 5.
        cash -= 3_600 + 5
        value += -5
        assert report["cash"].iloc[2] == pytest.approx(cash, abs=0.005)
        assert report["account"].iloc[2] == pytest.approx(value, abs=0.005)
        # Day 3: LOCKED stays at 28.80; 400 MAIN and 300 of 2,000 SPLIT are sold.
        cash += 4_000 - 8 + 1_200 - 5
        value += 100 * (28.8 - 36) - 8 - 5
        assert report["cash"].iloc[3] == pytest.approx(cash, abs=0.005)
        assert report["account"].iloc[3] == pytest.approx(value, abs=0.005)
        amounts = positions[DAYS[3]].get_stock_amount_dict()
        assert amounts[SPLIT] * 2 == pytest.approx(1_700)
        # Day 4: LOCKED at 28.00 (5.60 fee), HALTED at 20.00 (20.00 fee), then MAIN
        # for all the cash there is, 61,453.55: 6,100 shares cost 61,061.00.
        cash += 2_800 - 5.6 + 10_000 - 20
        value += 100 * (28.0 - 28.8) - 5.6 - 20
        assert cash == pytest.approx(61_453.55)
        cash -= 61_000 + 61
        value -= 61
        assert report["cash"].iloc[4] == pytest.approx(cash, abs=0.005)
        assert report["cash"].iloc[4] == pytest.approx(392.55, abs=0.005)
        assert report["account"].iloc[4] == pytest.approx(value, abs=0.005)
        assert set(positions[DAYS[4]].get_stock_list()) == {MAIN, STAR, ST, SPLIT}

    def test_limits_depend_on_the_deal_price(self, board_store):
        # At the close ST stands at 4.20, its limit of 5 %.
        order = [(1, ST, "buy", 2_000)]
        assert run(order, deal_price="close")[0]["cash"].iloc[1] == 100_000
        assert run(order, deal_price="open")[0]["cash"].iloc[1] < 92_000
        assert run(order, limits=False, deal_price="close")[0]["cash"].iloc[1] < 92_000

    def test_a_stock_that_joins_an_index_keeps_its_limit(self, tmp_path, use_store):
        from qlib_ext.ingest.store import write_store

        store = tmp_path / "store"
        frame = bars()
        new = (frame["instrument"] == SPLIT) & (frame["datetime"] == DAYS[0])
        write_store(store, frame[~new])  # so SPLIT is listed on day 1
        joined = [f"{x}\t{DAYS[1]:%Y-%m-%d}\t2021-12-31\n" for x in (LOCKED, SPLIT)]
        (store / "instruments" / "joined.txt").write_text("".join(joined))
        use_store(store)
        exchange = BoardExchange(
            start_time=DAYS[0], end_time=DAYS[-1], codes="joined", deal_price="close"
        )
        # Day 1 closes at 36.00, 20 % above 30.00: nobody sells.
        assert exchange.quote_df.loc[(LOCKED, DAYS[1]), "limit_buy"]
        up, _ = exchange._prices(exchange.quote_df)
        limits = pd.Series(up, exchange.quote_df.index)
        assert limits[LOCKED, DAYS[1]] == pytest.approx(36.0)
        assert np.isinf(limits[SPLIT, DAYS[1]])
        assert limits[SPLIT, DAYS[2]] == pytest.approx(8.8)

    def test_without_lots_every_share_counts(self, board_store):
        report, _ = run([(0, MAIN, "buy", 1_050)], lots=False)
        assert report["cash"].iloc[0] == pytest.approx(100_000 - 10_510.5, abs=0.005)

    def test_the_future_does_not_decide_about_a_fill(self, board_store, tmp_path):
        """Nothing after the order's day enters: the account up to it is the same."""
        from qlib_ext.ingest.store import write_store

        before, _ = run(self.orders)
        changed = bars()
        later = changed["datetime"] > DAYS[2]
        for name in ("open", "high", "low", "close", "vwap"):
            changed.loc[later, name] *= 1.5
        write_store(board_store, changed)
        from qlib.data.cache import H

        H.clear()
        after, _ = run(self.orders)
        columns = ["account", "cash", "total_cost"]
        pd.testing.assert_frame_equal(
            before[columns].iloc[:3], after[columns].iloc[:3], check_exact=True
        )
        assert before["account"].iloc[3] != after["account"].iloc[3]


class TestRules:
    def test_limits_agree_with_those_that_the_embedded_market_traded_under(
        self, market, use_store, monkeypatch
    ):
        """Rules from code, date and change give the market's own limit prices."""
        use_store(market)
        span = {"start_time": "2020-06-01", "end_time": "2020-12-31"}
        given = BoardExchange(**span)
        assert given._given
        frame = given.quote_df
        names = frame.index.get_level_values("instrument")
        days = frame.index.get_level_values("datetime")
        # The market has had 20 % on ChiNext all along.
        same = np.array([board_of(str(n)) != "chinext" for n in names])
        same |= np.asarray(days >= CHINEXT_REFORM)
        same &= frame["$close"].notna().to_numpy()
        up, down = given._prices(frame)
        given._given = False
        own_up, own_down = given._prices(frame)
        # The market itself has no limit on the first day only, on every board.
        same &= np.isfinite(up) & np.isfinite(own_up)
        assert same.sum() > 8_000
        np.testing.assert_allclose(own_up[same], up[same], rtol=2e-6)
        np.testing.assert_allclose(own_down[same], down[same], rtol=2e-6)
        hit = np.asarray(frame["$close"]) >= up * (1 - 1e-5)
        assert hit[same].any()


class TestDealPrice:
    def test_falls_back_to_amount_over_volume_then_to_the_mean(
        self, tmp_path, use_store
    ):
        from qlib_ext.ingest.store import write_store

        frame = bars()
        for drop, price in (
            (["vwap"], "$amount/$volume"),
            (["vwap", "amount"], "$open/4+$high/4+$low/4+$close/4"),
        ):
            store = tmp_path / f"store{len(drop)}"
            write_store(store, frame.drop(columns=drop))
            use_store(store)
            exchange = BoardExchange(start_time=DAYS[0], end_time=DAYS[-1])
            assert exchange.deal_price_ == price
            paid = exchange.get_deal_price(SPLIT, DAYS[4], DAYS[4], 1)
            assert paid == pytest.approx(8.0)
        with pytest.raises(ValueError, match="deal_price"):
            BoardExchange(start_time=DAYS[0], end_time=DAYS[-1], deal_price="twap")

    @pytest.mark.parametrize(
        ("kwargs", "word"),
        [
            ({"open_cost": -0.1}, "open_cost"),
            ({"min_cost": "5"}, "min_cost"),
            ({"deal_price": ("open", "close")}, "deal_price"),
            ({"freq": "1min"}, "freq"),
        ],
    )
    def test_bad_arguments(self, kwargs, word):
        with pytest.raises(ValueError, match=word):
            BoardExchange(**kwargs)


def test_day_quote_answers_as_qlibs_own(board_store):
    from qlib.backtest.high_performance_ds import NumpyQuote

    frame = BoardExchange(start_time=DAYS[0], end_time=DAYS[-1]).quote_df
    ours, theirs = DayQuote(frame), NumpyQuote(frame, "day")
    assert set(ours.get_all_stock()) == set(theirs.get_all_stock())
    end = pd.Timedelta("23:59:59")
    for code in (MAIN, HALTED, LOCKED):
        for day in DAYS:
            for field in ("$close", "limit_buy", "$factor"):
                one = ours.get_data(code, day, day + end, field, "ts_data_last")
                two = theirs.get_data(code, day, day + end, field, "ts_data_last")
                assert np.array_equal(float(one), float(two), equal_nan=True)
        span = (code, DAYS[0], DAYS[4] + end)
        for field, method in (
            ("limit_sell", "all"),
            ("$volume", "sum"),
            ("$close", "ts_data_last"),
        ):
            one, two = (q.get_data(*span, field, method) for q in (ours, theirs))
            assert one == pytest.approx(two)
    assert ours.get_data("SH999999", DAYS[0], DAYS[0], "$close") is None
    assert ours.get_data(MAIN, DAYS[0] - 9 * end, DAYS[0] - 9 * end, "$close") is None
