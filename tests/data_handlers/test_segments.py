"""Segments are judged whoever trains on them: here Qlib's data set and model."""

import pytest
from qlib.contrib.model.linear import LinearModel
from qlib.data import D
from qlib.data.dataset import DatasetH, TSDatasetH

from data_handlers.alpha import ExpressionHandler

SEGMENTS = {
    "train": ("2019-01-01", "2019-08-31"),
    "valid": ("2019-09-10", "2019-10-15"),
    "test": ("2019-11-01", "2019-12-31"),
}


@pytest.fixture(scope="module")
def handler(qlib_market):
    every = D.list_instruments(D.instruments("all"), as_list=True)
    return ExpressionHandler(
        expressions=["$close/Ref($close, 5) - 1"],
        instruments=sorted(every)[:5],
        start_time="2019-01-01",
        end_time="2019-12-31",
        fit_start_time="2019-01-01",
        fit_end_time="2019-08-31",
        infer_processors=[{"class": "RobustZScoreNorm"}, {"class": "Fillna"}],
    )


def train(handler, **segments):
    dataset = DatasetH(handler, {**SEGMENTS, **segments})
    model = LinearModel()
    model.fit(dataset)
    return model.predict(dataset)


@pytest.mark.parametrize("cls", [DatasetH, TSDatasetH])
@pytest.mark.parametrize("end", ["2019-09-10", "2019-12-31", None])
def test_fit_window_over_valid_or_test_is_refused(handler, monkeypatch, cls, end):
    monkeypatch.setattr(handler.infer_processors[0], "fit_end_time", end)
    with pytest.raises(ValueError, match=r"RobustZScoreNorm learns.*segments.valid"):
        cls(handler=handler, segments=SEGMENTS).prepare("train")


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (("2031-01-01", "2031-12-31"), r"segments.test.*holds no trading day"),
        (("2019-12-31", "2019-11-01"), r"segments.test.*after its end"),
        (("2019-10-01", "2019-12-31"), r"they share \d+ trading day"),
    ],
)
def test_segments_are_refused_before_the_training(handler, segment, message):
    with pytest.raises(ValueError, match=message):
        DatasetH(handler, {**SEGMENTS, "test": segment}).prepare("train")


def test_right_segments_train_and_a_plain_fetch_is_free(handler, monkeypatch):
    assert train(handler).notna().all()
    assert len(train(handler, test=("2019-11-01", None)))
    monkeypatch.setattr(handler.infer_processors[0], "fit_end_time", None)
    assert len(handler.fetch(slice("2019-10-01", "2019-10-31")))
