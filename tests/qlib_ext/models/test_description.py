"""Models as JSON and tensors: the same scores, and nothing but known classes."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from qlib_ext.models import GRUGAT, Mamba, MambaMoE, MultiFactorRNN, description

SMALL = dict(step_len=8, n_epochs=1, GPU=-1)
MODELS = {
    "rnn": lambda: MultiFactorRNN(hidden_size=4, n_factors=2, n_seeds=2, **SMALL),
    "gat": lambda: GRUGAT(
        hidden_size=4, graphs=["industry"], weighting="learned", **SMALL
    ),
    "mamba": lambda: Mamba(d_model=8, d_state=4, task="dual", graphs=[], **SMALL),
    "moe": lambda: MambaMoE(
        n_folds=2,
        purge=11,
        tasks=["alpha_raw", "alpha_neutral"],
        num_experts_per_tok=1,
        gate_n_epochs=1,
        d_model=8,
        d_state=4,
        **SMALL,
    ),
}


def through_json(value):
    tensors = {}
    text = json.dumps(description._encode(value, tensors, ()))
    return description._decode(json.loads(text), tensors)


@pytest.mark.parametrize("kind", MODELS)
def test_a_described_model_gives_the_same_scores(kind, toy_dataset):
    data = toy_dataset()
    model = MODELS[kind]()
    model.fit(data)
    pd.testing.assert_series_equal(
        through_json(model).predict(data), model.predict(data), check_exact=True
    )


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1, 2.5, "a", True, float("inf")],
        (1, (2, 3)),
        {"a": {("b", 1): 2}, 3: None},
        {1, 2},
        slice("2020-01-01", pd.Timestamp("2020-02-01")),
    ],
)
def test_values_come_back(value):
    assert through_json(value) == value


def test_arrays_come_back_to_the_bit():
    array = np.array([0.1, np.nan, np.inf, 1e-300])
    np.testing.assert_array_equal(through_json(array), array)
    assert through_json(array.astype("f4")).dtype == np.float32
    tensor = torch.tensor([0.1, float("nan")])
    assert through_json(tensor).equal(tensor) is False  # NaN
    assert torch.allclose(through_json(tensor), tensor, equal_nan=True)


@pytest.mark.parametrize("value", [print, object(), {"a": open}, pd.DataFrame()])
def test_what_is_no_value_is_refused(value):
    with pytest.raises(ValueError, match="not one that is read here"):
        through_json(value)


@pytest.mark.parametrize(
    "config",
    [
        {"class": "os.system"},
        {"class": "system", "module_path": "os"},
        {"class": "StaticDataLoader", "kwargs": {"config": "evil.pkl"}},
        {"class": "main", "module_path": "qlib_ext.models.__main__"},
        {"class": "X", "module_path": "evil.py"},
        {"function": "os.system", "bars": ["close"]},
    ],
)
def test_configurations_of_other_classes_are_refused(config):
    with pytest.raises(ValueError, match="not one that is read here"):
        through_json({"sources": [config]})


def test_configurations_of_known_classes_pass():
    for config in (
        {"class": "MultiFactorRNN", "module_path": "qlib_ext.models", "kwargs": {}},
        {"class": "DayHandler", "module_path": "data_handlers.day"},
        {"class": "AddRisk", "module_path": "data_handlers.processors"},
        {"class": "Fillna", "kwargs": {}},
        {"class": "CorrelationGraph"},
    ):
        assert through_json(config) == config


def test_qlib_evaluates_expressions_only(qlib_market, tmp_path, monkeypatch):
    from qlib.data import D

    monkeypatch.chdir(tmp_path)
    days = dict(start_time="2020-12-30", end_time="2020-12-31")
    code = D.list_instruments(D.instruments("all"), as_list=True)[0]
    with description.only_expressions():
        assert len(D.features([code], ["Ref($close, 1) / $close"], **days)) == 2
        with pytest.raises(ValueError, match="only operators"):
            D.features([code], ["__import__('os').mkdir('attacked')"], **days)
    assert not (tmp_path / "attacked").exists()
