"""Day, minute and Level-2 models on the embedded market: each finds its own alpha."""

import pandas as pd
import pytest
import torch

from data_handlers.day import DayHandler
from data_handlers.level2 import Level2Handler
from data_handlers.ms import MsHandler
from qlib_ext.dataset import PanelDataset
from qlib_ext.metrics import non_overlapping, rank_ic
from qlib_ext.models import MultiFactorRNN, ScoreAverage

HANDLER = dict(
    start_time="2016-01-01",
    fit_start_time="2016-01-01",
    fit_end_time="2018-12-14",
    styles=[],
)
SEGMENTS = {
    "train": ("2016-01-01", "2018-12-14"),
    "valid": ("2019-01-02", "2019-06-14"),
    "test": ("2019-07-02", "2020-12-31"),
}
MODEL = dict(
    n_factors=1,
    hidden_size=32,
    num_layers=1,
    step_len=30,
    n_epochs=8,
    early_stop=4,
    lr=0.003,
    dropout=0.0,
    GPU=-1,
)
HANDLERS = {"day": DayHandler, "ms": MsHandler, "l2": Level2Handler}


def make_levels(folder, **kwargs):
    """A market whose store has minute and Level-2 features."""
    from qlib_ext.aggregates import build_store
    from qlib_ext.market import make_market, make_minute, make_ticks

    store = folder / "market"
    make_market(store, years=5, **kwargs)
    build_store("ms", make_minute(store, bar_minutes=15), store, bar_minutes=15)
    build_store("l2", make_ticks(store), store)
    return store


def returns(data):
    """Raw 10-day return of the test segment by (datetime, instrument)."""
    panel = data.panel
    days = panel.days(data.segments["test"])
    wide = pd.DataFrame(
        panel.raw_labels[days][..., 0].numpy(),
        index=pd.Index(panel.dates[days], name="datetime"),
        columns=pd.Index(panel.instruments, name="instrument"),
    )
    return wide.stack()


def each_day(score, other):
    """RankIC of each day between two series by (datetime, instrument)."""
    pair = {"score": score, "other": other}  # their own names may be the same
    both = pd.concat(pair, axis=1, join="inner").dropna()
    wide = [both[c].unstack("instrument") for c in both]
    a, b = (torch.tensor(w.to_numpy(dtype=float)) for w in wide)
    return rank_ic(a, b)


@pytest.mark.slow  # three minutes of processor time
def test_each_model_finds_the_alpha_of_its_own_data(tmp_path, use_store, capsys):
    store = make_levels(tmp_path, stocks=160, seed=11, trades=60)
    use_store(store)
    data = {k: PanelDataset(h(**HANDLER), SEGMENTS) for k, h in HANDLERS.items()}
    average = ScoreAverage(
        {
            k: {"model": MultiFactorRNN(seed=0, **MODEL), "dataset": d}
            for k, d in data.items()
        }
    )
    average.fit(data["day"])
    scores = average.predict_units(data["day"])
    scores["fused"] = average.predict(data["day"])

    oracle = pd.read_parquet(f"{store}.oracle.parquet")
    oracle = oracle.set_index(["datetime", "instrument"])
    oracle["return"] = returns(data["day"])
    table = pd.DataFrame(
        {
            name: {
                p: float(each_day(scores[name], oracle[p]).nanmean()) for p in oracle
            }
            for name in scores
        }
    ).T
    with capsys.disabled():
        print("\n", table.round(3).to_string())

    # One run: fused 0.150 against 0.097 (day), 0.132 (ms) and 0.124 (l2).
    own = {"day": "day", "ms": "minute", "l2": "tick"}
    for name, alpha in own.items():
        assert table.loc[name, alpha] > 0.3, name
        assert table.loc[name, "return"] > 0.03, name
        assert table.loc["fused", "return"] > table.loc[name, "return"], name
    # Day bars know nothing of the other two.
    assert abs(table.loc["day", ["minute", "tick"]]).max() < 0.06
    # What is nobody's own: the trades of a rising last half-hour are purchases, so
    # ticks show some of the intraday alpha; minute bars show nothing of the tick's.
    assert abs(table.loc["ms", "tick"]) < 0.06


@pytest.mark.slow  # two minutes of processor time
def test_market_without_signal_gives_the_new_features_no_rank_ic(
    tmp_path, use_store, capsys
):
    use_store(make_levels(tmp_path, stocks=80, seed=12, trades=40, signal="none"))
    for name in ("ms", "l2"):
        data = PanelDataset(HANDLERS[name](**HANDLER), SEGMENTS)
        model = MultiFactorRNN(seed=0, **{**MODEL, "n_epochs": 4})
        model.fit(data)
        daily = each_day(model.predict(data), returns(data))
        sample = daily[non_overlapping(daily, 10)]
        sample = sample[torch.isfinite(sample)]
        error = float(sample.std()) / len(sample) ** 0.5
        with capsys.disabled():
            print(f"\n{name}: {float(sample.mean()):.4f}, error {error:.4f}")
        assert abs(float(sample.mean())) < 3 * error
