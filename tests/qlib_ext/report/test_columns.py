import numpy as np
import pandas as pd
import pytest
import torch
from qlib.workflow import R

from data_handlers.day import DayHandler
from qlib_ext import metrics
from qlib_ext.dataset import PanelDataset
from qlib_ext.record_temp import ColumnRecord


@pytest.fixture(scope="module")
def data(qlib_market):
    handler = DayHandler(
        start_time="2019-10-08",
        end_time="2020-09-30",
        fit_start_time="2019-10-08",
        fit_end_time="2019-12-31",
        horizon=5,
        styles=[],
    )
    segments = {"test": ("2020-02-03", "2020-08-31")}
    return PanelDataset(handler, segments, purge="off")


def test_each_column_is_judged_by_itself(data):
    with R.start(experiment_name="columns"):
        recorder = R.get_recorder()
        ColumnRecord(recorder, dataset=data, columns=["close", "volume"]).generate()
        logged = recorder.list_metrics()
        table = _read(recorder, "columns/columns.parquet")
        daily = _read(recorder, "columns/daily.parquet")
    assert list(table.index) == ["close", "volume"]
    assert logged["close_rank_ic"] == pytest.approx(table.at["close", "rank_ic"])
    panel = data.panel
    at = panel.days(data.segments["test"])
    factor = panel.features[at][..., panel.feature_names.index("close")]
    factor = torch.where(panel.present[at], factor, torch.nan)
    label = panel.raw_labels[at][..., 0]
    want = metrics.rank_ic(factor, label, 10)
    np.testing.assert_allclose(daily["close"], want, atol=1e-6)
    each = [want[k::5].nanmean() for k in range(5)]
    assert table.at["close", "rank_ic"] == pytest.approx(np.mean(each), abs=1e-6)
    near = metrics.rank_mae(factor, label, 10)
    each = [near[k::5].nanmean() for k in range(5)]
    assert table.at["close", "closeness"] == pytest.approx(np.mean(each), abs=1e-6)
    assert np.isfinite(table.to_numpy(float)).all()


def _read(recorder, name):
    return pd.read_parquet(recorder.client.download_artifacts(recorder.id, name))


def test_bad_input_is_named(data):
    with pytest.raises(ValueError, match="`dataset` is not given"):
        ColumnRecord(None)
    with (
        R.start(experiment_name="columns"),
        pytest.raises(ValueError, match="`columns` names 'x'; the data has"),
    ):
        ColumnRecord(R.get_recorder(), dataset=data, columns=["x"]).generate()
