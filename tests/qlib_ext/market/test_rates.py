"""Simulated treasury-bond futures: the oracle is right, and the minutes are found."""

import numpy as np
import pandas as pd
import pytest

from qlib_ext.ingest.store import read_bars
from qlib_ext.market import make_futures, oracle_path


@pytest.fixture
def store(market_futures):
    return market_futures


def frames(store, code="CFFEX.T"):
    """Open-to-open returns, expected ones, and the minute bars of one product."""
    bars = read_bars(store, [code], ["open", "close", "factor"]).set_index("datetime")
    ahead = bars["open"].shift(-2) / bars["open"].shift(-1) - 1
    oracle = pd.read_parquet(oracle_path(store))
    oracle = oracle[oracle["instrument"] == code].set_index("datetime")["total"]
    years = [pd.read_parquet(f) for f in sorted((store / "bars").glob("*.parquet"))]
    minute = pd.concat(years)
    minute = minute[minute["instrument"] == code].set_index("datetime")
    return bars, ahead, oracle.reindex(bars.index), minute


class TestMarket:
    def test_the_oracle_has_the_strength_that_was_asked_for(self, store):
        _, ahead, oracle, _ = frames(store)
        # 733 days: two standard errors are 0.065
        assert ahead.corr(oracle) == pytest.approx(0.35, abs=0.08)
        hits = (ahead * oracle > 0)[ahead.notna()].mean()
        assert hits == pytest.approx(0.5 + np.arcsin(0.35) / np.pi, abs=0.045)

    def test_only_the_minutes_know_the_signal(self, store):
        bars, _, oracle, minute = frames(store)
        volume = minute[[c for c in minute if c.endswith("_volume")]]
        told = volume.iloc[:, -12:].mean(axis=1) - volume.iloc[:, :12].mean(axis=1)
        assert told.corr(oracle) > 0.9
        returns = bars["close"].pct_change()
        for column in (returns, bars["open"] / bars["close"], minute["bar_00_return"]):
            assert abs(column.corr(oracle)) < 0.11

    def test_rolls_are_exact_and_quarterly(self, store):
        bars, *_ = frames(store)
        step = bars["factor"].pct_change().abs() > 1e-6
        assert step.sum() in (11, 12)
        assert set(bars.index[step].month) == {2, 5, 8, 11}
        # the night of a roll is the product's own, not the distance of two contracts
        night = (bars["open"] / bars["close"].shift() - 1)[step]
        assert night.abs().max() < 0.003

    def test_a_seed_gives_the_same_market_and_no_strength_no_signal(self, tmp_path):
        one = make_futures(tmp_path / "one", years=1, seed=3)
        two = make_futures(tmp_path / "two", years=1, seed=3, strength=0)
        again = make_futures(tmp_path / "again", years=1, seed=3)
        fields = ["open", "close", "factor", "volume"]
        held = [read_bars(s, ["CFFEX.T"], fields) for s in (one, again, two)]
        pd.testing.assert_frame_equal(held[0], held[1])
        assert not held[0]["close"].equals(held[2]["close"])
        assert not pd.read_parquet(oracle_path(two))["total"].any()

    def test_bad_arguments_are_named(self, tmp_path):
        with pytest.raises(ValueError, match="`strength`"):
            make_futures(tmp_path / "x", strength=1.5)
        with pytest.raises(ValueError, match="`years`"):
            make_futures(tmp_path / "x", years=0)


def learnt(store, use_store, last_train, last_valid, **arguments):
    """Score of the days after, expected return, and account of a trained model."""
    from data_handlers.futures import FuturesHandler
    from qlib_ext.dataset import PanelDataset
    from qlib_ext.models import DualChannel
    from qlib_ext.portfolio.timing import Timing, trade

    use_store(store)
    first = "2013-01-01"
    handler = FuturesHandler(
        instruments=["CFFEX.T"],
        start_time=first,
        end_time="2020-12-31",
        fit_start_time=first,
        fit_end_time=last_train,
        missing_years="warn",
    )
    after = [pd.Timestamp(d) + pd.Timedelta(days=1) for d in (last_train, last_valid)]
    segments = {
        "train": (first, last_train),
        "valid": (after[0], last_valid),
        "test": (after[1], "2020-12-31"),
    }
    data = PanelDataset(handler, segments, purge="trim")
    model = DualChannel(rnn="GRU", GPU=-1, **arguments)
    model.fit(data)
    score = model.predict(data).droplevel("instrument")
    bars, _, oracle, _ = frames(store)
    return score, oracle.reindex(score.index), trade(score, bars, Timing(), "CFFEX.T")


class TestRecovery:
    def test_a_short_training_finds_some_of_it(self, store, use_store):
        score, oracle, _ = learnt(
            store,
            use_store,
            "2019-12-31",
            "2020-06-30",
            lr=0.01,
            dropout=0.0,
            hidden_size=8,
            n_epochs=5,
            chunk=60,
        )
        assert score.corr(oracle) > 0.25  # two standard errors of luck are 0.18

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", [0, 1])
    def test_most_of_it_is_found_in_eight_years(self, tmp_path, use_store, seed):
        store = make_futures(tmp_path / "long", seed=seed)
        plan = (store, use_store, "2016-12-14", "2017-12-14")
        settings = {"lr": 0.003, "n_epochs": 20, "early_stop": 10, "chunk": 40}
        score, oracle, _ = learnt(*plan, **settings)
        assert score.corr(oracle) > 0.5
        day, oracle, _ = learnt(*plan, channels="day", **settings)
        assert abs(day.corr(oracle)) < 0.12

    @pytest.mark.slow
    def test_nothing_is_found_where_nothing_is(self, tmp_path, use_store):
        from qlib_ext.portfolio.timing import summary

        store = make_futures(tmp_path / "none", strength=0.0)
        settings = {"lr": 0.003, "n_epochs": 8, "chunk": 40}
        _, _, account = learnt(store, use_store, "2016-12-14", "2017-12-14", **settings)
        figures = summary(account)
        assert figures["low"] < 0.5 < figures["high"] + 0.02
        assert figures["p_value"] > 0.02


@pytest.mark.slow
def test_the_audit_passes_on_the_workflow(tmp_path, monkeypatch):
    from pathlib import Path

    from qlib_ext.audit import Settings, audit
    from qlib_ext.workflow import load_workflow

    path = Path(__file__).parents[3] / "workflows" / "treasury_dual.yaml"
    monkeypatch.chdir(tmp_path)
    settings = Settings(data="embedded", years=3, refit=False, days=0)
    result = audit(load_workflow(path), settings=settings, folder=tmp_path / "audit")
    assert result.exit_code == 0, result.as_dict()
