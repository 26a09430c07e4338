"""Our models on Qlib's own handlers and data sets, by plain YAML."""

from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from qlib.data import D
from qlib.data.dataset import DatasetH
from qlib.data.dataset.loader import QlibDataLoader
from qlib.utils import init_instance_by_config

from qlib_ext import models
from qlib_ext.models import _base

DATASET = """
class: DatasetH
module_path: qlib.data.dataset
kwargs:
  handler:
    class: Alpha158
    module_path: qlib.contrib.data.handler
    kwargs:
      instruments: all
      start_time: 2019-01-01
      end_time: 2019-12-31
      fit_start_time: 2019-01-01
      fit_end_time: 2019-08-31
      infer_processors:
        - class: RobustZScoreNorm
          kwargs: {fields_group: feature, clip_outlier: true}
        - class: Fillna
          kwargs: {fields_group: feature}
  segments:
    train: [2019-01-01, 2019-08-31]
    valid: [2019-09-10, 2019-10-15]
    test: [2019-11-01, 2019-12-31]
"""
WITH_RISK = """
- class: AddRisk
  module_path: data_handlers.processors
- class: CSStyleExposure
  module_path: data_handlers.risk
"""
TINY = dict(n_epochs=1, step_len=3, GPU=-1)
SMALL = {
    "GRUGAT": dict(hidden_size=8, num_layers=1, **TINY),
    "Mamba": dict(d_model=8, d_state=4, **TINY),
    "MambaMoE": dict(d_model=8, d_state=4, n_folds=2, gate_n_epochs=1, **TINY),
}


def alpha158(more=()):
    config = yaml.safe_load(DATASET)
    handler = config["kwargs"]["handler"]["kwargs"]
    every = D.list_instruments(D.instruments("all"), as_list=True)
    handler["instruments"] = sorted(every)[:12]
    handler["infer_processors"] += more
    return init_instance_by_config(config, accept_types=DatasetH)


@pytest.fixture(scope="module", autouse=True)
def evaluated_once():
    """Qlib evaluates the expressions once; what differs here are the processors."""
    load, known = QlibDataLoader.load, {}

    def load_once(self, *which):
        key = str((self.fields, which))
        if key not in known:
            known[key] = load(self, *which)
        return known[key].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QlibDataLoader, "load", load_once)
        yield


@pytest.fixture(scope="module")
def plain(qlib_market):
    return alpha158()


@pytest.fixture(scope="module")
def with_risk(qlib_market):
    return alpha158(yaml.safe_load(WITH_RISK))


@pytest.mark.parametrize("name", SMALL)
class TestAlpha158:
    def test_simplest_case_works_with_less(self, name, plain):
        model = getattr(models, name)(**SMALL[name])
        model.fit(plain)
        assert np.isfinite(model.predict(plain)).all()
        assert model.graphs_ == [] if name == "GRUGAT" else not model.learns_risk

    def test_risk_processors_give_the_whole_model(self, name, with_risk):
        model = getattr(models, name)(**SMALL[name])
        model.fit(with_risk)
        assert np.isfinite(model.predict(with_risk)).all()
        if name == "GRUGAT":
            assert list(model.predict_weights(with_risk)["weight"]) == [
                "industry",
                "financial",
                "flow",
            ]
        else:
            assert model.learns_risk and model.predict_risk(with_risk).std() > 0


def test_default_graphs_are_those_that_the_store_allows(monkeypatch):
    from qlib_ext.models import gru_gat

    panel = SimpleNamespace(risk_names=["beta", "momentum"])  # no industry
    monkeypatch.setattr(gru_gat, "financial_config", lambda: ([], []))
    assert gru_gat._default_graphs(panel) == ["flow"]
    panel.risk_names.append("industry")
    assert gru_gat._default_graphs(panel) == ["industry", "flow"]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("Mamba", {"task": "dual"}),
        ("Mamba", {"task": "alpha_neutral"}),
        ("MambaMoE", {"tasks": ["dual"]}),
        ("GRUGAT", {"graphs": ["flow"]}),
    ],
)
def test_what_needs_risk_names_the_processors(name, kwargs, plain):
    with pytest.raises(ValueError, match=r"class: AddRisk.*class: CSStyleExposure"):
        getattr(models, name)(**SMALL[name], **kwargs).fit(plain)


def test_raw_descriptors_are_no_exposures(qlib_market):
    data = alpha158(yaml.safe_load(WITH_RISK)[:1])
    with pytest.raises(ValueError, match=r"raw descriptors.*daily_return.*AddRisk"):
        models.Mamba(**SMALL["Mamba"]).fit(data)


def test_usual_arguments_of_qlib_are_explained_all_at_once():
    with pytest.raises(ValueError) as error:
        models.GRUGAT(batch_size=800, metric="loss", n_jobs=20, n_epoch=3)
    for words in ("a batch is a day", "RankIC", "OMP_NUM_THREADS", "`n_epochs` meant"):
        assert words in str(error.value)


class TestFitWindow:
    @pytest.mark.parametrize("end", ["2019-10-31", "2019-12-31", None])
    def test_window_over_valid_or_test_is_refused(self, plain, end):
        processor = plain.handler.infer_processors[0]
        kept, processor.fit_end_time = processor.fit_end_time, end
        try:
            with pytest.raises(ValueError, match=r"RobustZScoreNorm learns.*valid"):
                models.GRUGAT(**SMALL["GRUGAT"]).fit(plain)
        finally:
            processor.fit_end_time = kept

    @pytest.mark.parametrize("reach", [None, 2])
    def test_segments_that_share_days_are_refused(self, plain, monkeypatch, reach):
        monkeypatch.setattr(_base, "handler_label_reach", lambda handler: reach)
        monkeypatch.setitem(plain.segments, "test", ("2019-10-01", "2019-12-31"))
        with pytest.raises(ValueError, match=r"they share \d+ trading day"):
            models.GRUGAT(**SMALL["GRUGAT"]).fit(plain)

    def test_a_segment_beyond_the_data_is_refused_before_training(
        self, plain, monkeypatch
    ):
        monkeypatch.setitem(plain.segments, "test", ("2031-01-01", "2031-12-31"))
        with pytest.raises(ValueError, match=r"segments.test.*holds no trading day"):
            models.GRUGAT(**SMALL["GRUGAT"]).fit(plain)
