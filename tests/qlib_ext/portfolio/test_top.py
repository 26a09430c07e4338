"""The best k at equal weight: against a hand-worked market, and the planted one."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qlib_ext.ingest.store import write_store
from qlib_ext.portfolio import TopRecord, TopStrategy

DAYS = pd.bdate_range("2020-11-30", "2020-12-31")
CODES = [f"SH60000{i}" for i in range(6)]


def config(k, **exchange):
    return {
        "strategy": {
            "class": "TopStrategy",
            "module_path": "qlib_ext.portfolio",
            "kwargs": {"signal": "<PRED>", "k": k, "cash": 0.1},
        },
        "backtest": {
            "account": 1e8,
            "exchange_kwargs": {
                "exchange": {
                    "class": "BoardExchange",
                    "module_path": "qlib_ext.portfolio",
                    "kwargs": {"deal_price": "close", "min_cost": 0, **exchange},
                }
            },
        },
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Six stocks at 10 CNY; the last two gain 5 % on 9 December, one is halted then."""
    moves = pd.DataFrame(0.0, DAYS, CODES)
    moves.loc["2020-12-09", CODES[4:]] = 0.05
    close = 10 * (1 + moves).cumprod()
    close.loc["2020-12-11":"2020-12-14", CODES[3]] = np.nan
    bars = close.rename_axis("datetime").reset_index()
    bars = bars.melt("datetime", var_name="instrument", value_name="close").dropna()
    for name in ("open", "high", "low"):
        bars[name] = bars["close"]
    path = tmp_path_factory.mktemp("top") / "store"
    write_store(path, bars.assign(volume=1e6, amount=1e7, factor=1.0))
    return path


def run(score, settings, **kwargs):
    from qlib.workflow import R

    with R.start(experiment_name="top"):
        recorder = R.get_recorder()
        frame = score.to_frame("score")
        recorder.save_objects(**{"pred.pkl": frame, "label.pkl": frame})
        record = TopRecord(recorder, settings, **kwargs)
        record.generate()
        record.check(include_self=True)
    return recorder


def parquet(recorder, name):
    path = recorder.client.download_artifacts(recorder.id, f"top/{name}.parquet")
    return pd.read_parquet(path)


def test_two_best_of_six_by_hand(store, use_store):
    use_store(store)
    index = pd.MultiIndex.from_product([DAYS, CODES], names=["datetime", "instrument"])
    score = pd.Series(np.tile(np.arange(6.0), len(DAYS)), index)
    # On Friday the 11th the halted stock has the best score, and is passed over.
    score.loc[pd.Timestamp("2020-12-11"), CODES[3]] = 9.0
    recorder = run(score, config(2, open_cost=0.001, close_cost=0.002))
    holdings, account = parquet(recorder, "holdings"), parquet(recorder, "account")
    # Bought on Monday the 7th, nine tenths of the account in the last two stocks.
    first = account[account["turnover"] > 0].index[0]
    assert first == pd.Timestamp("2020-12-07")
    assert account.loc[first, "cost"] == pytest.approx(0.9 * 0.001, rel=1e-2)
    assert holdings.loc[first, CODES[4:]].tolist() == pytest.approx(
        [0.45, 0.45], abs=1e-3
    )
    # On the 9th they gain 5 % on .9 of the account; two of six stocks gain it.
    day = account.loc["2020-12-09"]
    assert day["return"] == pytest.approx(0.9 * 0.05, abs=1e-4)
    assert day["bench"] == pytest.approx(0.05 * 2 / 6, abs=1e-6)
    assert CODES[3] not in holdings or not holdings[CODES[3]].fillna(0).any()
    figures = recorder.list_metrics()
    assert figures["top holdings"] == 2 and figures["top rebalancings"] == 4
    week = parquet(recorder, "periods").loc["last week"]
    assert week["excess"] == pytest.approx(0.0, abs=1e-4)


def test_equal_scores_are_no_choice(store, use_store):
    use_store(store)
    index = pd.MultiIndex.from_product([DAYS, CODES], names=["datetime", "instrument"])
    score = pd.Series(np.tile(np.arange(6.0), len(DAYS)), index)
    score.loc[pd.Timestamp("2020-12-11")] = 1.0
    recorder = run(score, config(2))
    assert parquet(recorder, "history")["status"].tolist() == [
        *("optimal", "equal scores", "optimal", "optimal")
    ]
    page = recorder.client.download_artifacts(recorder.id, "top/report.html")
    assert "1 weeks had the same score for all stocks" in Path(page).read_text()
    with pytest.raises(ValueError, match="no scores, or equal ones"):
        run(score * 0, config(2))


def test_planted_scores_earn_more_than_the_pool(qlib_market):
    oracle = pd.read_parquet(f"{qlib_market}.oracle.parquet")
    score = oracle.set_index(["datetime", "instrument"])["total"]
    score = score[score.index.get_level_values(0) >= "2020-07-01"]
    recorder = run(score, config(10, deal_price="vwap"))
    figures = recorder.list_metrics()
    assert figures["top excess annual return"] > 0.1
    assert figures["top holdings"] == 10
    account = parquet(recorder, "account")
    assert (account["cost"] >= 0).all() and account["cost"].sum() > 0


def test_bad_arguments_are_named(store, use_store):
    with pytest.raises(ValueError, match="`k` must be"):
        TopStrategy(signal=pd.Series(dtype=float), k=0)
    with pytest.raises(ValueError, match="`signal` must hold scores"):
        TopStrategy()
    use_store(store)
    index = pd.MultiIndex.from_product([DAYS, CODES], names=["datetime", "instrument"])
    other = config(2)
    other["strategy"] = {
        "class": "TopkDropoutStrategy",
        "module_path": "qlib.contrib.strategy",
        "kwargs": {"signal": "<PRED>", "topk": 2, "n_drop": 1},
    }
    with pytest.raises(ValueError, match="`strategy` must be a TopStrategy"):
        run(pd.Series(1.0, index), other)
