"""Timing: three weeks with a roll to the cent, hit rates, regimes, what luck gives."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from data_handlers.vendor.mapping import parse_mapping
from qlib_ext.ingest.run import ingest
from qlib_ext.ingest.store import read_bars
from qlib_ext.portfolio.timing import Timing, permutation_test, regimes, summary, trade

DAYS = pd.bdate_range("2024-02-05", periods=16)
# (open, close) of T2403 and T2406; T2406 counts from day 8 on: its open interest is
# the larger one at the close of day 7.
OLD = "103.005 103.020 103.015 103.000 103.010 103.050 103.045 103.100 103.090 103.095 "
OLD += "103.110 103.080 103.085 103.060 103.055 103.070 103.065 103.020 "
NEW = "102.905 102.925 102.910 102.905 102.905 102.955 102.950 102.995 102.985 103.005 "
NEW += (
    "103.010 102.985 102.990 102.960 102.955 102.965 102.970 102.930 102.925 102.900 "
)
NEW += (
    "102.905 102.950 102.955 102.940 102.945 102.975 102.970 103.010 103.005 103.000 "
)
NEW += "103.005 103.025 "
SCORE = [1, 1, -1, -1, 1, 1, 1, 1, 1, 0, -1, -1, 1, 1, 1, 1]


def pairs(text):
    values = [Decimal(x) for x in text.split()]
    return list(zip(values[::2], values[1::2], strict=True))


@pytest.fixture(scope="module")
def weeks(tmp_path_factory):
    """Store of the two contracts, as `qlib-ext ingest` makes it; its bars."""
    folder = tmp_path_factory.mktemp("weeks")
    rows = []
    for month, prices in (("T2403", pairs(OLD)), ("T2406", pairs(NEW))):
        for k, (opened, closed) in enumerate(prices):
            rows.append(
                {
                    "code": month + ".CFX",
                    "date": DAYS[k],
                    "open": float(opened),
                    "high": float(max(opened, closed)),
                    "low": float(min(opened, closed)),
                    "close": float(closed),
                    "oi": (100 if k < 7 else 40) if month == "T2403" else 60,
                }
            )
    (folder / "raw").mkdir()
    pd.DataFrame(rows).to_csv(folder / "raw" / "d.csv", index=False)
    names = {c: c for c in ("date", "open", "high", "low", "close")}
    columns = {"instrument": "code", "contract": "code", "open_interest": "oi", **names}
    mapping = {
        "prices": "raw",
        "factor": "preclose",
        "codes": "futures",
        "sources": {"d": {"kind": "futures", "files": ["*.csv"], "columns": columns}},
    }
    ingest(folder / "store", parse_mapping(mapping, "t"), data=folder / "raw")
    bars = read_bars(folder / "store", ["CFFEX.T"], ["open", "close", "factor"])
    return bars.set_index("datetime")


def ledger(cost):
    """Profit of each day from a cash ledger of the contracts themselves."""
    old, new = pairs(OLD), pairs(NEW)
    cash, lots, out, before = Decimal(0), 0, [], Decimal(0)
    for k in range(1, 16):
        if k == 8 and lots:  # rolled at the closes of day 7
            cash += lots * (old[7][1] - new[7][1]) * 10000 - 2 * abs(lots) * cost
        contract = old if k < 8 else new
        opened, closed = contract[k]
        want = (SCORE[k - 1] > 0) - (SCORE[k - 1] < 0)
        cash -= (want - lots) * opened * 10000 + abs(want - lots) * cost
        lots = want
        equity = cash + lots * closed * 10000
        out.append(equity - before)
        before = equity
    return out


class TestThreeWeeks:
    def test_each_day_agrees_with_the_ledger_to_the_cent(self, weeks):
        # the store begins a day late: nothing tells which contract counts on the first
        score = pd.Series(SCORE, index=DAYS, dtype=float)
        account = trade(score, weeks, Timing(cost=28), "CFFEX.T")
        expected = ledger(Decimal(28))
        assert [str(d.date()) for d in account.index] == [
            str(d.date()) for d in DAYS[2:]
        ]
        got = account["profit"].round(6).to_numpy()
        # its first account day opens the position that the ledger has held for a day
        want = np.array([float(x) for x in expected[1:]])
        np.testing.assert_allclose(got[1:], want[1:], atol=0.005)
        assert account["rolled"].sum() == 1

    def test_week_of_the_roll_by_hand(self, weeks):
        score = pd.Series(SCORE, index=DAYS, dtype=float)
        account = trade(score, weeks, Timing(cost=28), "CFFEX.T")
        day = account.loc["2024-02-15"]  # day 8, the first of T2406
        # night 102.970 - 102.965 of T2406, day 102.930 - 102.970, a lot of 10,000;
        # two sides of 28 for the roll
        assert day["night"] == pytest.approx(50, abs=0.005)
        assert day["day"] == pytest.approx(-400, abs=0.005)
        assert day["cost"] == 56
        assert day["profit"] == pytest.approx(-406, abs=0.005)
        # taken for a return, the gap would have been (102.970 - 103.070) * 10,000
        assert day["return"] == pytest.approx(-406 / 1029650)

    def test_without_cost_a_short_earns_what_a_long_loses(self, weeks):
        score = pd.Series(1.0, index=DAYS)
        long = trade(score, weeks, Timing(cost=0), "CFFEX.T")["profit"]
        short = trade(-score, weeks, Timing(cost=0), "CFFEX.T")["profit"]
        np.testing.assert_allclose(long, -short)
        flat = trade(-score, weeks, Timing(cost=0, short=False), "CFFEX.T")
        assert not flat["profit"].any() and not flat["position"].any()


class TestRules:
    def test_bands(self):
        score = np.array([0.1, 0.6, 0.2, -0.1, -0.7, -0.3, np.nan, 0.9])
        flat = Timing(band=0.5, lots=2).positions(score)
        assert flat.tolist() == [0, 2, 0, 0, -2, 0, 0, 2]
        held = Timing(band=0.5, inside="hold").positions(score)
        assert held.tolist() == [0, 1, 1, 1, -1, -1, 0, 1]

    @pytest.mark.parametrize(
        ("rules", "words"),
        [
            ({"cost": -1}, "cost"),
            ({"inside": "out"}, "inside"),
            ({"lots": 0}, "lots"),
            ({"band": "wide"}, "band"),
        ],
    )
    def test_bad_rules_are_named(self, rules, words):
        with pytest.raises(ValueError, match=f"`{words}`"):
            Timing(**rules)

    def test_an_unknown_contract_needs_its_multiplier(self):
        with pytest.raises(ValueError, match="`tick` of CFFEX"):
            Timing().contract("CFFEX.IF")
        assert Timing(multiplier=300, tick=0.2).contract("CFFEX.IF") == (300, 0.2)


def walk(n, seed, drift=0.0):
    rng = np.random.default_rng(seed)
    days = pd.bdate_range("2018-01-01", periods=n)
    close = 100 * np.exp(np.cumsum(rng.normal(drift, 0.003, n)))
    opened = np.r_[100, close[:-1]] * np.exp(rng.normal(0, 0.0005, n))
    return pd.DataFrame({"open": opened, "close": close, "factor": 1.0}, index=days)


class TestFigures:
    def test_hit_rate_and_its_interval(self):
        bars = walk(200, 0)
        ahead = np.sign(bars["open"].shift(-2) / bars["open"].shift(-1) - 1).fillna(0)
        ahead.iloc[:50] *= -1  # wrong on 50 of the 198 calls
        account = trade(ahead, bars, Timing(cost=0), "CFFEX.T")
        figures = summary(account)
        assert figures["calls"] == 198
        assert figures["hit_rate"] == pytest.approx(148 / 198)
        # Clopper-Pearson of 148 in 198, by the beta distribution
        from scipy.stats import beta

        assert figures["low"] == pytest.approx(beta.ppf(0.025, 148, 51))
        assert figures["high"] == pytest.approx(beta.ppf(0.975, 149, 50))
        assert figures["p_value"] < 0.02

    def test_permutation_test_of_luck_is_uniform_and_a_trend_is_no_skill(self):
        values = []
        for seed in range(60):
            rng = np.random.default_rng(seed)
            side = np.sign(pd.Series(rng.normal(size=150)).rolling(5).sum())
            values.append(
                permutation_test(side.fillna(1).to_numpy(), rng.normal(0.5, 1, 150))
            )
        assert 0.35 < np.mean(values) < 0.65
        assert np.mean(np.array(values) < 0.1) < 0.25
        always = permutation_test(
            np.ones(150), np.random.default_rng(0).normal(1, 1, 150)
        )
        assert always == 1.0

    def test_regimes_know_the_past_only(self):
        close = walk(400, 1, drift=0.0004)["close"]
        names = regimes(close)
        assert set(names[:60]) == {"unknown"}
        assert {"rising", "sideways"} <= set(names[60:])
        changed = close.copy()
        changed.iloc[300:] *= 0.5
        assert (regimes(changed)[:300] == names[:300]).all()
        assert (regimes(close[:250]) == names[:250]).all()
        falling = regimes(pd.Series(np.exp(-0.001 * np.arange(100.0) ** 1.1)))
        assert (falling[60:] == "falling").all()

    def test_a_later_price_changes_no_earlier_account(self):
        bars = walk(120, 2)
        score = pd.Series(np.random.default_rng(3).normal(size=120), bars.index)
        whole = trade(score, bars, Timing(), "CFFEX.T")
        cut = trade(score[:80], bars[:80], Timing(), "CFFEX.T")
        columns = [c for c in cut if c != "next_return"]
        pd.testing.assert_frame_equal(whole.iloc[:79][columns], cut[columns])
