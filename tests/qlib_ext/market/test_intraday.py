"""Minute bars and ticks of the embedded market: agreement, signals, bad input."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from data_handlers.aggregate.columns import midnights
from data_handlers.aggregate.minute import MINUTE_NAMES, reduce_minutes
from data_handlers.aggregate.schema import BARS, ORDERS, TRADES
from data_handlers.aggregate.ticks import TICK_NAMES, aggregate_ticks
from qlib_ext.cli import main
from qlib_ext.market import build_market, make_market, make_minute, make_ticks
from qlib_ext.market.calendar import trading_days
from qlib_ext.market.simulate import ALPHAS, alpha_states, make_universe
from qlib_ext.market.tape import TRADE_TIMES, clock_us, draw_trades, most_trades

BAR = ["open", "high", "low", "close", "volume", "amount"]


def day_rows(store):
    raw = pd.read_parquet(Path(store) / "tables" / "daily_raw.parquet")
    return raw.set_index(["datetime", "instrument"]).sort_index()


def read_all(folder, table=""):
    files = sorted((Path(folder) / table).glob("*.parquet"))
    return pd.concat([pq.read_table(f).to_pandas() for f in files], ignore_index=True)


def to_days(frame, when, first, high, low, last, amount):
    """Day bars as plain group-by sums, independent of the aggregate package."""
    frame = frame.assign(
        day=frame[when].dt.normalize(), instrument=frame["instrument"].astype(str)
    )
    groups = frame.groupby(["day", "instrument"], sort=True)
    out = groups.agg(
        open=(first, "first"),
        high=(high, "max"),
        low=(low, "min"),
        close=(last, "last"),
        volume=("volume", "sum"),
        amount=(amount, "sum"),
    )
    return out.rename_axis(["datetime", "instrument"])


def linear_reading(frame, names, state):
    """Correlation, on the last 30 % of days, of a linear fit to `state`."""
    x = frame[names]
    x = x.clip(x.quantile(0.01), x.quantile(0.99), axis=1)
    x = ((x - x.mean()) / x.std()).fillna(0.0)
    smooth = x.groupby(level=1).transform(lambda c: c.ewm(halflife=4).mean())
    both = np.column_stack([np.ones(len(x)), x, smooth])
    y = state.reindex(frame.index).to_numpy()
    days = frame.index.get_level_values(0)
    late = days > days.unique().sort_values()[int(0.7 * days.nunique())]
    ridge = 30 * np.eye(both.shape[1])
    a, b = both[~late], y[~late]
    coef = np.linalg.solve(a.T @ a + ridge, a.T @ b)
    return np.corrcoef(both[late] @ coef, y[late])[0, 1]


def true_states(seed, years, stocks):
    days = trading_days(years)
    codes = make_universe(seed, days, stocks).codes
    return {
        a.name: pd.DataFrame(
            alpha_states(seed, a, len(days), stocks)[0], days, codes
        ).stack()
        for a in ALPHAS
    }


LAST = "2020-08-31"


@pytest.fixture(scope="module")
def tick_market(made_once):
    """A one-year market of 30 stocks with few trades, and its ticks until `LAST`."""
    options = dict(stocks=30, years=1, seed=5, trades=60)
    store = made_once("tick_market", lambda out: make_market(out, **options))
    return store, made_once("ticks_of", lambda out: make_ticks(store, out, end=LAST))


@pytest.fixture(scope="module")
def tick_features(tick_market):
    _, folder = tick_market
    rows = []
    for file in sorted((folder / "trades").glob("*.parquet")):
        tables = [
            pq.read_table(folder / kind / file.name)
            for kind in ("trades", "orders", "quotes")
        ]
        result = aggregate_ticks(*tables)
        assert not any(result.rejected.values()), result.rejected
        assert not result.notes
        rows.append(result.frame)
    return pd.concat(rows).set_index(["datetime", "instrument"]).sort_index()


class TestTape:
    def draw(self, o, h, low, c, lots, amount, mean=120.0, key=1, state=0.0):
        size = most_trades(mean)
        ms, price, volume = (np.empty(size, dtype=np.int64) for _ in range(3))
        out = (ms, price, volume, np.empty(size), np.empty(size, dtype=np.bool_))
        n = draw_trades(
            np.uint32(key), o, h, low, c, lots, amount, mean, state, TRADE_TIMES, out
        )
        return ms[:n], price[:n], volume[:n]

    def check(self, o, h, low, c, lots, amount, **kwargs):
        ms, price, volume = self.draw(o, h, low, c, lots, amount, **kwargs)
        assert (price[0], price.max(), price.min(), price[-1]) == (o, h, low, c)
        assert volume.min() >= 1 and volume.sum() == lots
        assert (price * volume).sum() == amount
        assert (np.diff(ms) >= 0).all() and ms[0] == -300_000 and ms[-1] == 14_400_000
        return price

    def test_trades_add_up_to_any_bar(self):
        rng = np.random.default_rng(0)
        for key in range(300):
            low = int(rng.integers(80, 20_000))
            width = int(rng.integers(1, max(2, low // 5)))
            o, c = (low + int(rng.integers(0, width + 1)) for _ in range(2))
            lots = int(np.exp(rng.uniform(np.log(200), np.log(1e6))))
            place = rng.uniform(0.08, 0.92)
            amount = round((low + place * width) * lots)
            self.check(o, low + width, low, c, lots, amount, key=key)

    def test_one_price_day_and_one_cent_day(self):
        self.check(1000, 1000, 1000, 1000, 200, 200_000)
        self.check(101, 102, 101, 102, 200, 101 * 200 + 20)
        self.check(101, 102, 101, 101, 987, 101 * 987 + 900, mean=500.0)

    def test_extreme_amounts_keep_to_the_unit(self):
        # 8 % from the edges is what day bars allow
        for place in (0.08, 0.92):
            lots, low, high = 200, 1000, 1100
            amount = round((low + place * (high - low)) * lots)
            self.check(1050, high, low, 1020, lots, amount, key=3)

    def test_high_state_lifts_the_end_of_the_day(self):
        def last_half_hour(state):
            moves = []
            for key in range(400):
                ms, price, _ = self.draw(
                    1000, 1040, 970, 1000, 5000, 5_025_000, key=key, state=state
                )
                moves.append(price[-1] - price[ms < 12_600_000][-1])
            return np.mean(moves)

        assert last_half_hour(1.0) > last_half_hour(-1.0) + 8

    def test_clock_skips_the_lunch_break(self):
        minutes = [clock_us(m * 60_000) // 60_000_000 for m in (-5, 0, 119, 120, 240)]
        assert minutes == [565, 570, 689, 780, 900]  # 9:25 9:30 11:29 13:00 15:00


class TestMinute:
    def test_bars_add_up_to_the_day_to_the_unit(self, market, market_minute):
        bars = read_all(market_minute)
        traded = bars[bars["volume"] > 0]
        got = to_days(traded, "datetime", "open", "high", "low", "close", "amount")
        expected = day_rows(market)[BAR]
        stocks = expected.index.get_level_values("instrument")
        expected = expected[stocks.isin(sorted(set(stocks))[:40])]
        assert list(got.index) == list(expected.index)
        np.testing.assert_array_equal(got[BAR], expected)

    def test_layout_is_the_normalised_one(self, market_minute):
        file = sorted(market_minute.glob("*.parquet"))[3]
        table = pq.read_table(file)
        assert table.schema.equals(BARS.arrow())
        frame = table.to_pandas()
        frame["instrument"] = frame["instrument"].astype(str)
        order = frame.sort_values(["instrument", "datetime"], kind="stable")
        assert (order.index == frame.index).all()
        clock = frame["datetime"].dt.strftime("%H:%M")
        assert sorted(clock.unique())[0] == "09:30"
        assert sorted(clock.unique())[-1] == "14:45"
        assert clock.nunique() == 16
        assert (frame["datetime"].dt.strftime("%Y-%m") == file.stem).all()

    def test_bars_without_trade_repeat_the_price(self, tick_market):
        store, _ = tick_market
        out = make_minute(store, bar_minutes=1, end="2020-01-31")
        bars = read_all(out)
        idle = bars["volume"] == 0
        assert 0.2 < idle.mean() < 0.95
        same = bars[idle]
        assert (same["open"] == same["close"]).all()
        assert (same["high"] == same["low"]).all() and (same["amount"] == 0).all()

    def test_longer_bars_are_sums_of_shorter_ones(self, market):
        kwargs = {"stocks": 3, "end": "2018-02-28"}
        one, five, fifteen = (
            read_all(
                make_minute(
                    market, market.with_name(f"nest{m}"), bar_minutes=m, **kwargs
                )
            )
            for m in (1, 5, 15)
        )
        for frame, minutes in ((five, 5), (fifteen, 15)):
            group = np.arange(len(one)) // minutes
            assert (
                one.groupby(group)["volume"].sum().to_numpy() == frame["volume"]
            ).all()
            assert (one.groupby(group)["close"].last() == frame["close"]).all()
            assert (one.groupby(group)["high"].max() >= frame["high"]).all()

    def test_a_selection_equals_the_same_rows_of_the_whole(self, market, market_minute):
        whole = read_all(market_minute)
        whole["instrument"] = whole["instrument"].astype(str)
        codes = sorted(whole["instrument"].unique())[5:8]
        part = read_all(
            make_minute(
                market,
                market.with_name("part"),
                stocks=codes,
                start="2019-03-05",
                end="2019-04-04",
            )
        )
        part["instrument"] = part["instrument"].astype(str)
        day = whole["datetime"].dt.normalize()
        same = whole[
            whole["instrument"].isin(codes)
            & (day >= "2019-03-05")
            & (day <= "2019-04-04")
        ]
        pd.testing.assert_frame_equal(
            part.reset_index(drop=True), same.reset_index(drop=True)
        )

    def test_minute_features_show_the_minute_alpha_and_not_the_tick_alpha(
        self, market_minute
    ):
        frames = []
        for file in sorted(market_minute.glob("*.parquet")):
            days = reduce_minutes(pq.read_table(file), bar_minutes=15)
            assert not any(days.rejected.values())
            keys = {"datetime": midnights(days.day)}
            keys["instrument"] = days.labels[days.code]
            frames.append(pd.DataFrame(keys | days.columns()))
        rows = pd.concat(frames).set_index(["datetime", "instrument"]).sort_index()
        names = [n for n in MINUTE_NAMES if n not in ("ms_overnight", "ms_mom")]
        state = true_states(7, 3, 100)
        assert linear_reading(rows, names, state["minute"]) > 0.65
        assert abs(linear_reading(rows, names, state["tick"])) < 0.1


class TestTicks:
    def test_trades_add_up_to_the_day_to_the_unit(self, tick_market):
        store, folder = tick_market
        trades = read_all(folder, "trades")
        trades["amount"] = np.rint(trades["price"] * trades["volume"])
        got = to_days(trades, "time", "price", "price", "price", "price", "amount")
        expected = day_rows(store).loc[:LAST, BAR]
        assert list(got.index) == list(expected.index)
        np.testing.assert_array_equal(got[BAR], expected)

    def test_trades_add_up_to_the_minute_bars(self, tick_market):
        store, folder = tick_market
        bars = read_all(make_minute(store, bar_minutes=15, end="2020-01-15"))
        bars["instrument"] = bars["instrument"].astype(str)
        trades = read_all(folder, "trades")
        trades = trades[trades["time"] < "2020-01-16"]
        time = trades["time"]
        # auctions join the first and the last bar
        slot = time.dt.floor("15min")
        early = time.dt.strftime("%H:%M") < "09:30"
        slot = slot.where(~early, time.dt.normalize() + pd.Timedelta("9h30min"))
        close = time.dt.strftime("%H:%M") >= "15:00"
        slot = slot.where(~close, time.dt.normalize() + pd.Timedelta("14h45min"))
        groups = trades.assign(slot=slot, instrument=trades["instrument"].astype(str))
        got = groups.groupby(["slot", "instrument"]).agg(
            open=("price", "first"),
            high=("price", "max"),
            low=("price", "min"),
            close=("price", "last"),
            volume=("volume", "sum"),
        )
        busy = bars[bars["volume"] > 0].set_index(["datetime", "instrument"])
        expected = busy.sort_index()[["open", "high", "low", "close", "volume"]]
        assert len(got) == len(expected)
        np.testing.assert_array_equal(got.to_numpy(), expected.to_numpy())

    def test_layout_is_the_normalised_one(self, tick_market):
        _, folder = tick_market
        name = sorted((folder / "trades").glob("*.parquet"))[10].name
        assert pq.read_schema(folder / "trades" / name).equals(TRADES.arrow())
        assert pq.read_schema(folder / "orders" / name).equals(ORDERS.arrow())
        for kind in ("trades", "orders", "quotes"):
            frame = pq.read_table(folder / kind / name).to_pandas()
            assert (frame["time"].dt.strftime("%Y-%m-%d") == name[:10]).all()
            code = frame["instrument"].astype(str)
            for _, group in frame.groupby(code):
                assert group["time"].is_monotonic_increasing

    def test_orders_explain_the_trades(self, tick_market):
        _, folder = tick_market
        for file in sorted((folder / "trades").glob("*.parquet"))[20:23]:
            trades = pq.read_table(file).to_pandas()
            orders = pq.read_table(folder / "orders" / file.name).to_pandas()
            for frame in (trades, orders):
                frame["instrument"] = frame["instrument"].astype(str)
            new = orders[orders["action"] == 1].set_index(["instrument", "order_id"])
            assert new.index.is_unique
            gone = (
                orders[orders["action"] == -1]
                .groupby(["instrument", "order_id"])["volume"]
                .sum()
            )
            assert gone.index.isin(new.index).all()
            for side, ident in ((1, "buy_id"), (-1, "sell_id")):
                key = ["instrument", ident]
                fills = trades.groupby(key).agg(
                    volume=("volume", "sum"),
                    time=("time", "min"),
                    top=("price", "max"),
                    bottom=("price", "min"),
                )
                fills.index.names = new.index.names
                known = fills.join(new, rsuffix="_order", how="left")
                # Shanghai does not publish what is filled at once
                hidden = known["side"].isna()
                code = known.index.get_level_values(0)
                assert code[hidden].str.startswith("SH").all()
                assert hidden[code.str.startswith("SH")].any()
                known = known[~hidden]
                assert (known["side"] == side).all()
                assert (known["time_order"] <= known["time"]).all()
                worst = known["top"] if side > 0 else known["bottom"]
                assert (side * (known["price"] - worst) >= 0).all()
                rest = known["volume_order"] - known["volume"]
                assert (rest >= gone.reindex(known.index).fillna(0)).all()

    def test_quotes_never_cross_and_respect_limits(self, tick_market):
        store, folder = tick_market
        raw = day_rows(store)
        for file in sorted((folder / "quotes").glob("*.parquet"))[::40]:
            frame = pq.read_table(file).to_pandas()
            bid, ask = frame["bid_price_1"], frame["ask_price_1"]
            both = (bid > 0) & (ask > 0)
            assert both.mean() > 0.9 and (bid < ask)[both].all()
            for k in range(1, 5):
                deeper = frame[f"bid_price_{k + 1}"]
                assert (deeper < frame[f"bid_price_{k}"])[deeper > 0].all()
            rows = raw.loc[pd.Timestamp(file.stem)]
            up = rows["limit_up"].reindex(frame["instrument"].astype(str)).to_numpy()
            assert (ask <= np.where(up > 0, up, np.inf) + 1e-9).all()

    def test_aggregate_takes_the_ticks_without_a_rejection(
        self, tick_market, tick_features
    ):
        store, _ = tick_market
        assert len(tick_features) == len(day_rows(store).loc[:LAST])
        assert tick_features[TICK_NAMES].notna().mean().min() > 0.6

    def test_tick_features_show_the_tick_alpha(self, tick_features):
        state = true_states(5, 1, 30)
        assert linear_reading(tick_features, TICK_NAMES, state["tick"]) > 0.75

    def test_exchanges_agree_in_the_mean(self, tick_features):
        # one market, two publication rules: the features must not tell them apart
        names = ["l2_cancel_ratio", "l2_order_imb", "l2_act_buy", "l2_depth_imb"]
        shanghai = tick_features.index.get_level_values(1).str.startswith("SH")
        x = tick_features[names]
        gap = x[shanghai].mean() - x[~shanghai].mean()
        assert (gap.abs() < 0.1 * x.std()).all()

    def test_the_market_without_alpha_has_the_same_traces(self, tmp_path):
        folders = []
        for signal in ("planted", "none"):
            out = tmp_path / signal
            make_market(out, stocks=20, years=1, signal=signal, trades=40)
            folders.append(make_ticks(out, stocks=5, end="2020-01-10"))
        planted, none = (read_all(f, "trades") for f in folders)
        # alpha moves prices by a hair; who traded, and when, hardly changes
        n = min(len(planted), len(none))
        assert n > 0.8 * max(len(planted), len(none))


class TestFiles:
    def test_interrupted_run_goes_on_where_it_stopped(self, tick_market, tmp_path):
        store, _ = tick_market
        out = tmp_path / "t"
        kwargs = {"stocks": 4, "end": "2020-01-15"}
        make_ticks(store, out, **kwargs)
        files = sorted(p for p in out.rglob("*.parquet"))
        before = {p: p.read_bytes() for p in files}
        stamp = files[0].stat().st_mtime_ns
        # as after a kill during the last day: no mark, one table missing
        last = sorted((out / ".done").iterdir())[-1]
        last.unlink()
        (out / "orders" / f"{last.name}.parquet").unlink()
        make_ticks(store, out, **kwargs)
        assert {p: p.read_bytes() for p in files} == before
        assert files[0].stat().st_mtime_ns == stamp

    def test_other_selection_needs_overwrite(self, tick_market, tmp_path):
        store, _ = tick_market
        out = tmp_path / "t"
        make_ticks(store, out, stocks=2, end="2020-01-10")
        with pytest.raises(ValueError, match="--overwrite"):
            make_ticks(store, out, stocks=3, end="2020-01-10")
        make_ticks(store, out, stocks=3, end="2020-01-06", overwrite=True)
        assert len(list((out / "trades").iterdir())) < 5

    def test_foreign_directory_is_left_alone(self, tick_market, tmp_path):
        store, _ = tick_market
        (tmp_path / "thesis.txt").write_text("do not lose")
        with pytest.raises(ValueError, match="not written by this command"):
            make_minute(store, tmp_path, overwrite=True)
        assert (tmp_path / "thesis.txt").exists()

    @pytest.mark.parametrize(
        ("kwargs", "field"),
        [
            ({"stocks": ["SH999999"]}, "stocks"),
            ({"stocks": 0}, "stocks"),
            ({"stocks": 4000}, "stocks"),
            ({"stocks": 1.5}, "stocks"),
            ({"stocks": "csi9"}, "market"),
            ({"start": "soon"}, "start"),
            ({"start": "2031-01-01"}, "start"),
            ({"quote_seconds": 0}, "quote_seconds"),
            ({"quote_seconds": True}, "quote_seconds"),
            ({"quote_seconds": "7"}, "quote_seconds"),
        ],
    )
    def test_bad_selection_is_named(self, tick_market, tmp_path, kwargs, field):
        store, _ = tick_market
        with pytest.raises(ValueError, match=f"`{field}`"):
            make_ticks(store, tmp_path / "t", **kwargs)
        assert not (tmp_path / "t").exists()

    def test_bar_length_and_foreign_store_are_refused(self, tick_market, tmp_path):
        store, _ = tick_market
        with pytest.raises(ValueError, match="`bar_minutes`"):
            make_minute(store, bar_minutes=30)
        foreign = tmp_path / "real"
        shutil.copytree(store, foreign)
        meta = (foreign / "meta.json").read_text()
        (foreign / "meta.json").write_text(meta.replace("qlib_ext.market", "tushare"))
        with pytest.raises(ValueError, match="not written by `qlib-ext market make`"):
            make_ticks(foreign)

    def test_command_adds_intraday_data_to_a_market_it_made(self, tmp_path):
        out = str(tmp_path / "m")
        args = ["market", "make", "--out", out, "--stocks", "20", "--years", "1"]
        args += ["--trades", "30"]
        ticks = ["--ticks", "--tick-stocks", "csi300", "--tick-days", ":2020-01-10"]
        result = CliRunner().invoke(main, [*args, "--minute", "15", *ticks])
        assert result.exit_code == 0, result.output
        assert "minute bars, 12 files" in result.output
        again = CliRunner().invoke(main, [*args, "--minute", "5"])
        assert again.exit_code == 0, again.output
        other = CliRunner().invoke(main, [*args, "--seed", "9", "--minute", "5"])
        assert other.exit_code != 0 and "--overwrite" in other.output

    def test_command_reports_bad_tick_options(self, tmp_path):
        args = ["market", "make", "--out", str(tmp_path / "m"), "--stocks", "20"]
        args += ["--years", "1"]
        for extra in (
            ["--tick-stocks", "csi300"],
            ["--ticks", "--tick-days", "2020"],
            ["--minute", "7"],
            ["--trades", "0"],
        ):
            result = CliRunner().invoke(main, args + extra)
            assert result.exit_code != 0 and "Traceback" not in result.output
            assert "tick" in result.output or extra[-2][2:] in result.output

    def test_unknown_market_argument_is_named(self, tmp_path):
        with pytest.raises(ValueError, match="stokcs"):
            build_market(tmp_path / "m", {"stokcs": 20})
