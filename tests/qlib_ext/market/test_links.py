"""Switches of the embedded market: style premium, lead-lag, statements, order flow."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from qlib_ext.ingest.store import read_meta
from qlib_ext.market import make_market, make_ticks, oracle_path
from qlib_ext.market.calendar import trading_days
from qlib_ext.market.intraday import FLOW_CLASSES, FLOW_FIELDS
from qlib_ext.market.links import (
    GRAPHS,
    REGIME_SIGN,
    REGIME_STYLE,
    Switches,
    flow_traits,
    fundamental_score,
    graph_of_values,
    industry_graph,
    regime_chance,
    regimes,
)
from qlib_ext.market.simulate import STYLES, make_universe, simulate

SEED = 21


def run(switches=None, planted=True, seed=SEED):
    universe = make_universe(seed, trading_days(5), 150)
    return simulate(seed, universe, planted=planted, switches=switches)


def run_small(switches=None, planted=True):
    universe = make_universe(SEED, trading_days(1), 60)
    return simulate(SEED, universe, planted=planted, switches=switches)


@pytest.fixture(scope="module")
def all_on():
    return run(Switches(style_alpha=0.01, lead_lag=0.015, fundamental_alpha=0.012))


@pytest.fixture(scope="module")
def flow_market(tmp_path_factory):
    out = tmp_path_factory.mktemp("flow") / "m"
    make_market(out, stocks=40, years=1, seed=5, trades=60, lead_lag=0.01)
    return out


def log_label(sim):
    close = np.where(sim.traded, np.log(np.maximum(sim.close * sim.factor, 1e-9)), 0)
    close[~sim.traded] = np.nan
    label = np.full_like(close, np.nan)
    label[:-11] = close[11:] - close[1:-10]
    known = np.isfinite(label)
    mean = np.where(known, label, 0).sum(1) / np.maximum(known.sum(1), 1)
    return label - mean[:, None]


def slope(sim, part):
    """Regress what followed on the oracle: 1 if it is the mean of what follows."""
    label = log_label(sim)
    x = np.where(sim.traded, part, np.nan)
    x = x - np.nanmean(x, axis=1, keepdims=True)
    ok = np.isfinite(x) & np.isfinite(label)
    return (x[ok] * label[ok]).sum() / (x[ok] ** 2).sum()


class TestStrength:
    @pytest.mark.parametrize(
        ("name", "size"), [("fundamental", 0.012), ("lead_lag", 0.015)]
    )
    def test_oracle_has_the_size_asked_for(self, all_on, name, size):
        part = np.where(all_on.traded, all_on.oracle[name], np.nan)
        assert np.nanmean(np.nanstd(part, axis=1)) == pytest.approx(size, rel=0.2)

    @pytest.mark.parametrize("name", ["style", "fundamental", "lead_lag", "day"])
    def test_oracle_is_the_mean_of_what_follows(self, all_on, name):
        # over 8 seeds the slopes are 0.97, 1.04, 1.0 and 0.97 with a spread of 0.1
        assert slope(all_on, all_on.oracle[name]) == pytest.approx(1, abs=0.35)

    def test_switches_are_off_by_default_and_leave_the_draws_alone(self):
        plain, off = run_small(), run_small(Switches())
        assert set(plain.oracle) == {"day", "minute", "tick"}
        np.testing.assert_array_equal(plain.close, off.close)
        assert plain.regime is None

    def test_market_without_signal_has_none_of_them(self):
        sim = run_small(Switches(0.01, 0.01, 0.01), planted=False)
        plain = run_small(planted=False)
        assert all((value == 0).all() for value in sim.oracle.values())
        np.testing.assert_array_equal(sim.close, plain.close)


class TestLeadLag:
    def test_past_returns_of_the_follower_do_not_show_it(self):
        sim = run(Switches(lead_lag=0.02))
        label = log_label(sim)
        close = np.where(sim.traded, np.log(np.maximum(sim.close * sim.factor, 1)), 0)
        past = np.full_like(close, np.nan)
        past[10:] = close[10:] - close[:-10]
        part = sim.oracle["lead_lag"]
        ok = np.isfinite(past) & np.isfinite(label) & sim.traded
        assert abs(np.corrcoef(past[ok], part[ok])[0, 1]) < 0.06
        assert np.corrcoef(part[ok], label[ok])[0, 1] > 0.1

    def test_regimes_last_about_sixty_days_and_visit_all_graphs(self):
        now = regimes(0, 60_000)
        changes = (np.diff(now) != 0).sum()
        assert 60_000 / changes == pytest.approx(60, rel=0.1)
        assert np.bincount(now).min() > 15_000
        same = (now[10:] == now[:-10]).mean()
        assert same == pytest.approx(regime_chance(10)[0], abs=0.02)
        assert sum(regime_chance(7)[i > 0] for i in range(3)) == pytest.approx(1)

    def test_style_returns_show_the_regime(self, all_on):
        for k, style in enumerate(REGIME_STYLE):
            returns = REGIME_SIGN[k] * all_on.style_returns[:, STYLES.index(style)]
            inside, outside = all_on.regime == k, all_on.regime != k
            if inside.sum() > 150:
                assert returns[inside].mean() > returns[outside].mean()

    def test_industry_graph_joins_members_only(self):
        code = np.array([0, 0, 1, 1, 1, 2])
        live = np.array([True, True, True, True, False, True])
        w = industry_graph(code, live).toarray()
        expected = np.zeros((6, 6))
        expected[0, 1] = expected[1, 0] = expected[2, 3] = expected[3, 2] = 1
        np.testing.assert_array_equal(w, expected)

    def test_neighbours_are_the_nearest_and_news_keeps_unit_variance(self):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((200, 3))
        w = graph_of_values(x, np.ones(200, dtype=bool))
        np.testing.assert_allclose(w.power(2).sum(axis=1), 1)
        assert ((w > 0) != (w > 0).T).nnz == 0 and w.diagonal().sum() == 0
        z = np.clip((x - x.mean(0)) / x.std(0), -3, 3)
        distance = ((z[:1] - z) ** 2).sum(1)
        nearest = np.argsort(distance)[1:11]
        assert set(nearest) <= set(w[[0]].indices)


class TestStatements:
    def test_score_ranks_growth_and_cash_and_ignores_the_unknown(self):
        known = {
            "earnings_growth": np.array([[0.1, 0.5, np.nan, 0.3]]),
            "cash_ttm": np.array([[1.0, 4.0, np.nan, 2.0]]),
            "equity": np.array([[10.0, 10.0, np.nan, 10.0]]),
        }
        score = fundamental_score(known)
        # both rank 1, 3, 2 of 3: uniforms -1/3, 1/3, 0, times sqrt(12) * sqrt(2)
        expected = np.array([[-1, 1, 0, 0]]) / 3 * np.sqrt(24)
        np.testing.assert_allclose(score, expected, atol=1e-12)

    def test_score_changes_only_with_an_announcement(self, all_on):
        part = all_on.oracle["fundamental"]
        eg = all_on.known["earnings_growth"]
        still = (eg[1:] == eg[:-1]).all(axis=1)  # a day without any statement
        assert still.any()
        np.testing.assert_array_equal(part[1:][still], part[:-1][still])


class TestFlow:
    def test_flow_table_is_the_sum_of_the_ticks(self, flow_market):
        folder = make_ticks(flow_market, end="2020-01-20")
        files = sorted((folder / "trades").glob("*.parquet"))
        frames = [pq.read_table(f).to_pandas() for f in files]
        trades = pd.concat(frames, ignore_index=True)
        trades["instrument"] = trades["instrument"].astype(str)
        trades["datetime"] = trades["time"].dt.normalize()
        trades["amount"] = np.rint(trades["price"] * trades["volume"])
        key = ["datetime", "instrument"]
        expected = {}
        for side, name, ident in ((1, "buy", "buy_id"), (-1, "sell", "sell_id")):
            parent = trades.groupby([*key, ident])["amount"].transform("sum")
            active = trades[trades["side"] == side].assign(parent=parent)
            low = 0.0
            for label, high in FLOW_CLASSES.items():
                inside = active[(active["parent"] >= low) & (active["parent"] < high)]
                expected[f"flow_{name}_{label}"] = inside.groupby(key)["amount"].sum()
                low = high
        expected = pd.DataFrame(expected).fillna(0.0)[list(FLOW_FIELDS)]
        table = pd.read_parquet(flow_market / "tables" / "flow.parquet")
        table = table.set_index(key).loc[: pd.Timestamp("2020-01-20")].sort_index()
        pd.testing.assert_frame_equal(
            table, expected.sort_index(), check_index_type=False
        )

    def test_window_means_of_flow_show_the_traits(self, flow_market):
        table = pd.read_parquet(flow_market / "tables" / "flow.parquet")
        buy = table.filter(like="flow_buy").sum(axis=1)
        sell = table.filter(like="flow_sell").sum(axis=1)
        table["net"] = (buy - sell) / (buy + sell)
        net = table.pivot(index="datetime", columns="instrument", values="net")
        days = trading_days(1)
        codes = make_universe(5, days, 40).codes
        trait = pd.DataFrame(flow_traits(5, len(days), 40)[:, :, 0], days, codes)
        link = net.rolling(20).mean().iloc[40::20].corrwith(trait.iloc[40::20], axis=1)
        assert link.mean() > 0.6

    def test_store_says_what_was_switched_on(self, flow_market):
        meta = read_meta(flow_market)
        assert meta["market"]["lead_lag"] == 0.01 and meta["market"]["order_flow"]
        assert set(FLOW_FIELDS) <= set(meta["fields"]) and "flow" in meta["tables"]
        regime = pd.read_parquet(f"{flow_market}.regime.parquet")
        assert set(regime["graph"]) <= set(GRAPHS)
        oracle = pd.read_parquet(oracle_path(flow_market))
        parts = ["day", "minute", "tick", "lead_lag", "style"]
        assert set(oracle) == {"datetime", "instrument", *parts, "total"}
        np.testing.assert_allclose(oracle[parts].sum(axis=1), oracle["total"])

    def test_plain_market_has_neither_flow_nor_regime(self, tmp_path):
        out = tmp_path / "m"
        make_market(out, stocks=20, years=1, lead_lag=0.01)
        make_market(out, stocks=20, years=1, overwrite=True)
        assert not Path(f"{out}.regime.parquet").exists()
        assert not set(FLOW_FIELDS) & set(read_meta(out)["fields"])


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({"style_alpha": 2}, "style_alpha"),
        ({"style_alpha": float("nan")}, "style_alpha"),
        ({"lead_lag": -0.1}, "lead_lag"),
        ({"fundamental_alpha": "high"}, "fundamental_alpha"),
        ({"fundamental_alpha": True}, "fundamental_alpha"),
        ({"order_flow": "yes"}, "order_flow"),
        ({"trades": 5}, "trades"),
    ],
)
def test_switch_out_of_range_is_named(tmp_path, kwargs, field):
    with pytest.raises(ValueError, match=f"`{field}`"):
        make_market(tmp_path / "m", stocks=20, years=1, **kwargs)
    assert list(tmp_path.iterdir()) == []
