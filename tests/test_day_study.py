"""The day model end to end on the embedded market: finds what is there, only that."""

import numpy as np
import pandas as pd
import pytest
import torch

from data_handlers.day import DayHandler
from qlib_ext.dataset import PanelDataset
from qlib_ext.market import make_market
from qlib_ext.metrics import non_overlapping, rank_ic
from qlib_ext.models import MultiFactorRNN

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
    hidden_size=32, num_layers=1, step_len=30, n_epochs=4, lr=0.003, GPU=-1, dropout=0.0
)


def daily_rank_ic(series, data):
    panel = data.panel
    days = panel.days(data.segments["test"])
    wide = series.unstack("instrument").reindex(panel.dates[days])
    wide = wide.reindex(columns=panel.instruments)
    value = torch.tensor(wide.to_numpy(dtype=float))
    return rank_ic(value, panel.raw_labels[days][..., 0].double())


def study(signal, folder, use_store, n_factors):
    store = make_market(folder / signal, stocks=160, years=5, seed=11, signal=signal)
    use_store(store)
    data = PanelDataset(DayHandler(**HANDLER), SEGMENTS)
    model = MultiFactorRNN(n_factors=n_factors, **MODEL)
    model.fit(data)
    return store, data, model.predict(data)


# Recovery and its absence on small data are in test_multi_factor_rnn.py.
@pytest.mark.slow
@pytest.mark.parametrize("n_factors", [1, 16])
def test_rnn_gets_half_of_what_day_bars_can_show(tmp_path, use_store, n_factors):
    store, data, score = study("planted", tmp_path, use_store, n_factors)
    oracle = pd.read_parquet(f"{store}.oracle.parquet")
    oracle = oracle.set_index(["datetime", "instrument"])
    ours = float(daily_rank_ic(score, data).nanmean())
    best = float(daily_rank_ic(oracle["day"], data).nanmean())
    assert best > 0.08
    assert ours > 0.5 * best
    # Intraday and tick alphas leave no trace in day bars.
    for level in ("minute", "tick"):
        both = pd.concat([score, oracle[level]], axis=1, join="inner")
        by_day = both.groupby("datetime").corr("spearman").iloc[::2, 1]
        assert abs(by_day.mean()) < 0.06


@pytest.mark.slow
def test_market_without_signal_gives_no_rank_ic(tmp_path, use_store):
    _, data, score = study("none", tmp_path, use_store, 1)
    daily = daily_rank_ic(score, data)
    sample = daily[non_overlapping(daily, 10)]
    sample = sample[torch.isfinite(sample)]
    error = float(sample.std()) / len(sample) ** 0.5
    assert abs(float(sample.mean())) < 3 * error


RELOAD = """
import sys, qlib, pandas as pd
from qlib.workflow import R
if __name__ == "__main__":
    qlib.init(provider_uri=sys.argv[1], region="cn", kernels=1, exp_manager={
        "class": "MLflowExpManager", "module_path": "qlib.workflow.expm",
        "kwargs": {"uri": "sqlite:///mlruns.db", "default_exp_name": "x"}})
    recorder = R.get_recorder(recorder_id=sys.argv[2], experiment_name="reload")
    model = recorder.load_object("params.pkl")
    dataset = recorder.load_object("dataset")
    assert not any(m.startswith("conftest") for m in sys.modules)
    dataset.setup_data(handler_kwargs={"init_type": "load_state"})
    model.predict(dataset).to_frame().to_parquet("again.parquet")
"""


def test_units_and_model_are_loaded_back_in_a_fresh_process(
    market_small, tmp_path, use_store, monkeypatch, run_fresh
):
    from qlib.model.trainer import task_train

    from data_handlers.loaders import ParquetDataLoader

    monkeypatch.chdir(tmp_path)
    import qlib

    qlib.init(
        provider_uri=str(market_small),
        region="cn",
        kernels=1,
        exp_manager={
            "class": "MLflowExpManager",
            "module_path": "qlib.workflow.expm",
            "kwargs": {
                "uri": f"sqlite:///{tmp_path}/mlruns.db",
                "default_exp_name": "x",
            },
        },
    )
    task = {
        "model": {
            "class": "MultiFactorRNN",
            "module_path": "qlib_ext.models",
            "kwargs": dict(
                n_factors=3,
                hidden_size=8,
                num_layers=1,
                step_len=20,
                n_epochs=1,
                GPU=-1,
            ),
        },
        "dataset": {
            "class": "PanelDataset",
            "module_path": "qlib_ext.dataset",
            "kwargs": {
                "handler": {
                    "class": "DayHandler",
                    "module_path": "data_handlers.day",
                    "kwargs": dict(
                        start_time="2018-01-01",
                        end_time="2020-12-31",
                        fit_start_time="2018-01-01",
                        fit_end_time="2019-03-29",
                        styles=[],
                    ),
                },
                "segments": {
                    "train": ["2018-01-01", "2019-03-29"],
                    "valid": ["2019-05-06", "2019-08-30"],
                    "test": ["2019-10-08", "2020-12-31"],
                },
            },
        },
        "record": [
            {"class": "SignalRecord", "module_path": "qlib.workflow.record_temp"},
            {"class": "FactorRecord", "module_path": "qlib_ext.record_temp"},
        ],
    }
    recorder = task_train(task, experiment_name="reload")
    pred = recorder.load_object("pred.pkl")

    loader = ParquetDataLoader(
        {
            "feature": {
                "experiment": "reload",
                "recorder": recorder.id,
                "file": "factor/units.parquet",
            },
            "label": {"expressions": ["$close"], "names": ["close"]},
        }
    )
    frame = loader.load("all", "2020-01-01", "2020-06-30")
    assert list(frame["feature"].columns) == ["unit_00", "unit_01", "unit_02"]
    mean = frame["feature"].mean(axis=1)
    both = pd.concat([mean, pred["score"]], axis=1, join="inner").dropna()
    assert len(both) > 1000
    by_day = both.groupby("datetime").corr("spearman").iloc[::2, 1]
    np.testing.assert_allclose(by_day, 1.0, atol=1e-3)

    run_fresh(RELOAD, tmp_path, market_small, recorder.id)
    again = pd.read_parquet(tmp_path / "again.parquet")
    pd.testing.assert_frame_equal(
        again.sort_index(), pred.sort_index(), rtol=1e-4, atol=1e-5
    )
