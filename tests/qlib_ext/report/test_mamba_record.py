"""MambaRecord on the embedded market, and what others read of it."""

import numpy as np
import pandas as pd
import pytest
from qlib.workflow import R
from qlib.workflow.record_temp import SignalRecord

from data_handlers.day import DayHandler
from data_handlers.loaders import ParquetDataLoader
from qlib_ext.dataset import PanelDataset
from qlib_ext.models import Mamba
from qlib_ext.portfolio import build_risk_model
from qlib_ext.record_temp import MambaRecord
from qlib_ext.recorders import load_frame

TINY = {
    "d_model": 8,
    "d_state": 4,
    "step_len": 5,
    "n_epochs": 1,
    "graphs": ["industry"],
    "GPU": -1,
}


@pytest.fixture(scope="module")
def dataset(qlib_market):
    handler = DayHandler(
        start_time="2019-01-01",
        end_time="2020-12-31",
        fit_start_time="2019-01-01",
        fit_end_time="2019-12-15",
    )
    segments = {
        "train": ("2019-02-01", "2019-12-10"),
        "valid": ("2020-01-02", "2020-03-15"),
        "test": ("2020-04-03", "2020-12-31"),
    }
    return PanelDataset(handler, segments)


@pytest.fixture(scope="module")
def recorders(dataset):
    """Runs without and with the penalty; the second is shown beside the first."""
    found = {}
    for name, penalty in (("penalty_off", 0.0), ("penalty_on", 10.0)):
        model = Mamba(penalty=penalty, **TINY)
        model.fit(dataset)
        with R.start(experiment_name=name):
            recorder = found[name] = R.get_recorder()
            SignalRecord(model=model, dataset=dataset, recorder=recorder).generate()
            record = MambaRecord(
                recorder, model=model, dataset=dataset, beside="penalty_off"
            )
            record.generate()
            record.check()
    return found


def page_of(recorder):
    return open(f"{recorder.get_local_dir()}/artifacts/mamba/report.html").read()


def test_the_page_shows_the_run_without_penalty_beside(recorders):
    text = page_of(recorders["penalty_on"])
    for part in ("mean size, penalty_off", "Industries, penalty_off"):
        assert part in text
    own = page_of(recorders["penalty_off"])  # nothing to show: it is that run
    assert "mean size, penalty_off" not in own and "No exposures beside" not in own


def test_exposures_are_the_correlations_with_the_panels_factors(recorders, dataset):
    recorder, panel = recorders["penalty_on"], dataset.panel
    exposure = load_frame(recorder, "mamba/exposure.parquet")
    score = load_frame(recorder, "pred.pkl")["score"]
    day = exposure.index[7]
    column = panel.risk_names.index("momentum")
    style = panel.risk[panel.dates.get_loc(day), :, column].numpy()
    wide = score.loc[day].reindex(panel.instruments)
    expected = wide.corr(pd.Series(style, panel.instruments))
    assert exposure.at[day, "momentum"] == pytest.approx(expected, abs=1e-5)
    industry = load_frame(recorder, "mamba/industry.parquet")
    assert not any(str(name).isdigit() for name in industry)  # names, not codes


def test_a_missing_run_is_said_on_the_page(recorders, dataset):
    model = Mamba(task="alpha_raw", **TINY)
    model.fit(dataset)
    with R.start(experiment_name="penalty_alone"):
        recorder = R.get_recorder()
        SignalRecord(model=model, dataset=dataset, recorder=recorder).generate()
        MambaRecord(recorder, model=model, dataset=dataset, beside="other").generate()
    text = page_of(recorder)
    assert "No exposures beside these" in text and "other" in text


def test_the_risk_factor_is_a_feature_of_another_model(recorders, dataset):
    recorder = recorders["penalty_on"]
    kept = load_frame(recorder, "mamba/risk_factor.parquet")["risk"]
    source = {
        "experiment": "penalty_on",
        "recorder": recorder.id,
        "file": "mamba/risk_factor.parquet",
    }
    found = ParquetDataLoader({"feature": source}).load(
        "all", "2020-05-04", "2020-06-30"
    )["feature", "risk"]
    assert len(found) > 1000
    pd.testing.assert_series_equal(
        found, kept.reindex(found.index), check_names=False, check_dtype=False
    )
    # A risk model needs a history before the first day of the test.
    assert kept.index.get_level_values("datetime").min() == pd.Timestamp("2020-01-02")


def test_the_risk_factor_is_a_factor_of_the_optimisers_risk_model(recorders, tmp_path):
    folder = recorders["penalty_on"].get_local_dir()
    model = build_risk_model(
        tmp_path,
        "2020-11-02",
        "2020-12-31",
        styles=["size", "momentum"],
        extra={"learnt": f"{folder}/artifacts/mamba/risk_factor.parquet"},
        window=180,
    )
    day = model.estimate(pd.Timestamp("2020-12-31"))
    assert list(day.exposures.columns[:4]) == ["country", "size", "momentum", "learnt"]
    x = day.exposures["learnt"].dropna()
    assert len(x) > 50 and x.std() == pytest.approx(1, abs=0.2)
    assert np.isfinite(day.covariance.at["learnt", "learnt"])
    assert day.covariance.at["learnt", "learnt"] > 0
