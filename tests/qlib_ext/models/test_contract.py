"""What every model of the package must do; runs over `models.__all__`."""

import inspect
import pickle
import subprocess
import sys
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest
import torch

import qlib_ext.models as models
from qlib_ext.models._base import TorchModel

# Small and fast; a model that needs more adds its own entry.
TINY = {
    "hidden_size": 8,
    "num_layers": 1,
    "n_factors": 3,
    "d_model": 8,
    "d_state": 4,
    "step_len": 5,
    "chunk": 8,
    "n_epochs": 1,
    "early_stop": 1,
    "GPU": -1,
    # graphs from the panel itself: these tests have no store
    "graphs": [
        "industry",
        {"class": "FlowGraph", "kwargs": {"fields": ["x1", "x2"], "window": 3, "k": 2}},
    ],
    "weighting": "learned",
    "heads": 2,
    "rnn": "GRU",
    "momentum": 0.0,  # the returns of styles come from a store
    "channels": "day",  # the toy market has no minute bars
    "gate": False,
}
# What learns on in `predict` has tests of its own: labels do move its scores.
NAMES = [
    n
    for n in models.__all__
    if issubclass(getattr(models, n), TorchModel) and n != "IncrementalModel"
]


def make(name, **changes):
    cls = getattr(models, name)
    known = inspect.signature(cls.__init__).parameters
    # A day is a step in windows: a third of them, for what needs no good fit.
    stride = {"day_stride": 3} if changes.get("mode") == "windows" else {}
    given = {**TINY, **stride, **changes}
    return cls(**{k: v for k, v in given.items() if k in known})


@pytest.mark.parametrize("name", [*NAMES, "MambaMoE"])
def test_signature_names_what_is_handed_on(name):
    known = inspect.signature(getattr(models, name)).parameters
    assert {"n_epochs", "early_stop", "lr", "seed", "GPU", "dropout"} <= set(known)
    assert not any(p.kind is p.VAR_KEYWORD for p in known.values())


@pytest.fixture(scope="module")
def data(toy_dataset):
    return toy_dataset()


@pytest.fixture(scope="module")
def fitted(data):
    """Fit each model once a mode: (model, history). Tests must leave it as it is."""

    @lru_cache
    def fit(name, mode):
        model, history = make(name, mode=mode), {}
        model.fit(data, evals_result=history)
        return model, history

    return fit


# Attention over a window shares no pass between days: it has one mode.
CASES = [(n, m) for n in NAMES for m in ("stream", "windows")]
CASES.remove(("MASTER", "stream"))
# Windows are cut for all models alike: one recurrent, one of graphs and one that knows
# nothing else are run by default.
WINDOWS = ("MultiFactorRNN", "GRUGAT", "MASTER")
CASES = [
    pytest.param(n, m, marks=[] if m == "stream" or n in WINDOWS else pytest.mark.slow)
    for n, m in CASES
]


@pytest.mark.parametrize(("name", "mode"), CASES)
class TestContract:
    def test_fits_and_predicts_with_the_right_index(self, name, mode, data, fitted):
        model, history = fitted(name, mode)
        score = model.predict(data)
        expected = data.prepare("test", col_set="feature").index
        assert score.index.equals(expected)
        assert score.name == "score" and np.isfinite(score).all()
        assert set(history["seeds"][0][0]) >= {"train_loss", "valid_rank_ic"}

    def test_same_seed_gives_the_same_scores(
        self, name, mode, data, fitted, toy_dataset
    ):
        scores, other = [fitted(name, mode)[0].predict(data)], toy_dataset()
        for seed in (0, 1):
            model = make(name, mode=mode, seed=seed)
            model.fit(other)
            scores.append(model.predict(other))
        pd.testing.assert_series_equal(scores[0], scores[1], check_exact=True)
        assert not np.allclose(scores[0], scores[2])

    def test_survives_pickling(self, name, mode, data, fitted):
        model, _ = fitted(name, mode)
        again = pickle.loads(pickle.dumps(model))
        pd.testing.assert_series_equal(
            model.predict(data), again.predict(data), check_exact=True
        )

    def test_features_in_half_precision_rank_alike(
        self, name, mode, data, fitted, monkeypatch
    ):
        model, _ = fitted(name, mode)
        full = model.predict(data)

        def near(self, panel, device):
            return panel.near(device, np.inf, half=True)[0]

        monkeypatch.setattr(TorchModel, "_near", near)
        half = model.predict(data)
        assert not half.equals(full)  # it was used
        assert full.corr(half, method="spearman") > 0.999
        again = make(name, mode=mode)
        again.fit(data)
        assert np.isfinite(again.predict(data)).all()

    def test_copes_with_one_stock_days_nan_labels_and_empty_days(
        self, name, mode, toy_dataset
    ):
        def change(data):
            days = data.index.unique("datetime")
            data = data.copy()
            data.loc[days[10], "label"] = np.nan
            data.loc[days[100], "feature"] = np.nan  # nobody traded
            one = (data.index.get_level_values(0) == days[101]) & (
                data.index.get_level_values(1) != "S003"
            )
            two = data.index.get_level_values(0) == days[20]
            return data[~(one | (two & ~data.index.isin(["S003"], level=1)))]

        data = toy_dataset(change=change)
        model = make(name, mode=mode)
        model.fit(data)
        score = model.predict(data)
        days = data.handler.fetch().index.unique("datetime")
        assert days[100] not in score.index.unique("datetime")
        assert len(score.loc[days[101]]) == 1
        assert np.isfinite(score).all()

    def test_scores_do_not_change_when_the_future_changes(
        self, name, mode, data, fitted, toy_dataset
    ):
        model, _ = fitted(name, mode)
        days = data.panel.dates
        cut = days[105]

        def change(frame):
            frame = frame.copy()
            frame.loc[days[106] :] *= -3.0
            frame.loc[days[90] :, "label"] = np.nan
            return frame

        before = model.predict(data).loc[:cut]
        after = model.predict(toy_dataset(change=change)).loc[:cut]
        pd.testing.assert_series_equal(before, after, check_exact=True)

    def test_scores_do_not_depend_on_the_order_of_instruments(
        self, name, mode, data, fitted, toy_dataset
    ):
        model, _ = fitted(name, mode)
        names = data.panel.instruments
        renamed = dict(zip(names, names[::-1], strict=True))

        def change(frame):
            return frame.rename(index=renamed, level="instrument").sort_index()

        one = model.predict(data)
        two = model.predict(toy_dataset(change=change))
        two = two.rename(index=renamed, level="instrument").sort_index()
        np.testing.assert_allclose(one, two, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_model_rejects_unknown_yaml_keys_by_name(name):
    with pytest.raises(ValueError, match=r"'n_epoch' \(given 3\); is `n_epochs` meant"):
        getattr(models, name)(n_epoch=3)


def test_importing_the_package_is_silent():
    code = "import qlib_ext, sys; print('torch' in sys.modules, 'qlib' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["False", "False"]
    assert out.stderr == ""


def test_features_are_taken_by_name(toy_dataset):
    data = toy_dataset()
    model = make("MultiFactorRNN")
    model.fit(data)
    turned = toy_dataset(change=lambda d: d[[*d.columns[2::-1], *d.columns[3:]]])
    assert turned.panel.feature_names == ["x2", "x1", "x0"]
    pd.testing.assert_series_equal(
        model.predict(turned), model.predict(data), check_exact=True
    )
    other = toy_dataset(change=lambda d: d.rename(columns={"x1": "y"}, level=1))
    with pytest.raises(ValueError, match=r"fitted on .*'x1'.* has .*'y'"):
        model.predict(other)


def test_a_panel_is_copied_to_a_device_once_and_anew_for_what_changed(
    toy_dataset, monkeypatch
):
    free = [10**9]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free[0], 2 * free[0]))
    panel, other = toy_dataset().panel, toy_dataset().panel
    model, device = make("MultiFactorRNN"), torch.device("meta")
    half = model._near(panel, device)
    assert half.features.dtype == torch.bfloat16 and half.features.device == device
    assert model._near(panel, device) is half
    model.amp = False
    full = model._near(panel, device)
    assert full.features.dtype == torch.float32
    assert model._near(other, device) is not full
    assert model._near(other, torch.device("cpu")) is other
    free[0] = other.nbytes
    assert model._near(panel, device) is panel


# Sparse matrices have no meta device.
@pytest.mark.parametrize("name", sorted({*NAMES} - {"GRUGAT", "Mamba"}))
def test_networks_and_losses_stay_on_their_device(name, data):
    model, meta = make(name, mode="windows"), torch.device("meta")
    model.fit(data)
    batch = model._batch(data.panel, np.array([60]), torch.device("cpu"))
    for part in ("x", "mask", "label", "raw_label", "risk"):
        setattr(batch, part, getattr(batch, part).to(meta))
    network = model.build_network(model.d_feat_).to(meta)
    h = network.encoder(batch.x)[0][-1:]
    loss, _ = model.loss(network.head(h, batch), batch)
    loss.backward()
    assert loss.device == meta
