"""Mamba: the loss by hand, the labels, the penalty's effect, the risk factor."""

import numpy as np
import pandas as pd
import pytest
import torch
from qlib.data.dataset.handler import DataHandlerLP
from qlib.data.dataset.loader import StaticDataLoader

from qlib_ext.dataset import PanelDataset
from qlib_ext.losses import exposure_penalty
from qlib_ext.models import Mamba
from qlib_ext.models._base import Batch
from qlib_ext.models.mamba import linear_factors, neutral_labels

TINY = {
    "d_model": 8,
    "num_layers": 1,
    "d_state": 4,
    "step_len": 4,
    "chunk": 10,
    "n_epochs": 2,
    "early_stop": 2,
    "graphs": ["industry"],
    "GPU": -1,
    "lr": 0.01,
    "dropout": 0.0,
}


def dataset_of(x, y, risk, names, cut=(0.5, 0.65)):
    """PanelDataset of arrays x [t, n, f], y [t, n], risk [t, n, r]."""
    t, n, f = x.shape
    dates = pd.bdate_range("2018-01-01", periods=t)
    columns = [("feature", f"x{k}") for k in range(f)] + [("label", "RET10")]
    columns += [("risk", name) for name in names]
    index = pd.MultiIndex.from_product(
        [dates, [f"S{i:03d}" for i in range(n)]], names=["datetime", "instrument"]
    )
    values = np.concatenate([x, y[..., None], risk], axis=-1).reshape(t * n, -1)
    frame = pd.DataFrame(
        values, index=index, columns=pd.MultiIndex.from_tuples(columns)
    )
    a, b = (int(share * t) for share in cut)
    segments = {
        "train": (dates[0], dates[a - 1]),
        "valid": (dates[a], dates[b - 1]),
        "test": (dates[b], dates[-1]),
    }
    handler = DataHandlerLP(data_loader=StaticDataLoader(frame))
    return PanelDataset(handler, segments, purge="off")


def mean_daily_correlation(a, b):
    frame = pd.DataFrame({"a": np.asarray(a), "b": np.asarray(b)}, index=a.index)
    by_day = frame.groupby(level="datetime")
    return float(by_day.apply(lambda day: day["a"].corr(day["b"])).mean())


class TestReferenceValues:
    def test_exposure_penalty_is_the_mean_squared_correlation(self):
        g = torch.Generator().manual_seed(0)
        score = torch.randn(2, 12, generator=g)
        factors = torch.randn(2, 12, 3, generator=g)
        factors[0, :4, 1] = float("nan")
        mask = torch.ones(2, 12, dtype=torch.bool)
        mask[1, 5] = False
        ours = exposure_penalty(score, factors, mask)
        for day in range(2):
            squares = []
            for k in range(3):
                known = mask[day] & torch.isfinite(factors[day, :, k])
                rho = np.corrcoef(score[day, known], factors[day, known, k])[0, 1]
                squares.append(rho**2)
            assert float(ours[day]) == pytest.approx(np.mean(squares), rel=1e-4)

    def test_exposure_penalty_of_constant_or_unknown_factor_is_zero(self):
        factors = torch.full((1, 5, 2), float("nan"))
        factors[..., 0] = 3.0
        score = torch.arange(5.0)[None].requires_grad_()
        value = exposure_penalty(score, factors, torch.ones(1, 5, dtype=torch.bool))
        value.sum().backward()
        assert value.item() == 0.0 and torch.isfinite(score.grad).all()

    @pytest.mark.parametrize("through", [False, True])
    def test_loss_is_the_sum_worked_by_hand(self, toy_dataset, through):
        data = toy_dataset(n_days=30, n_stocks=4)
        model = Mamba(penalty=3.0, penalty_through_risk=through, **TINY)
        model.on_panel(data.panel)
        days, n = np.array([6]), 4
        size = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
        style = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
        risk = torch.stack([torch.zeros(1, n), size, style], dim=-1)
        mask = torch.ones(1, n, dtype=torch.bool)
        batch = Batch(days, np.arange(n), None, mask, None, None, risk, data.panel)
        y1 = torch.tensor([1.0, 0.0, -1.0, 0.0])
        y2 = torch.tensor([0.0, 1.0, float("nan"), 0.0])
        model._targets = (
            torch.zeros(30, n).index_copy(0, torch.tensor([6]), y1[None]),
            torch.zeros(30, n).index_copy(0, torch.tensor([6]), y2[None]),
        )
        score = torch.tensor([[1.0, 1.0, -1.0, -1.0]], requires_grad=True)
        factor = torch.tensor([[1.0, -1.0, -1.0, 1.0]], requires_grad=True)
        loss, parts = model.loss({"score": score, "risk": factor}, batch)
        # errors 0, 1, 0, -1 and 1, -2, -, 1; rho with size 0, style 1, risk 0
        assert float(parts["mse_alpha"]) == pytest.approx(0.5)
        assert float(parts["mse_risk"]) == pytest.approx(2.0)
        assert float(parts["penalty"]) == pytest.approx(1 / 3)
        assert loss.item() == pytest.approx(0.5 + 2.0 + 3.0 / 3)
        score2 = torch.tensor([[1.0, 0.5, -1.0, -1.0]], requires_grad=True)
        loss, _ = model.loss({"score": score2, "risk": factor}, batch)
        grad = torch.autograd.grad(loss, factor)[0]
        only_error = 2 * (factor - torch.nan_to_num(y2)) / 3 * torch.isfinite(y2)
        assert torch.allclose(grad, only_error, atol=1e-6) != through

    def test_labels_are_neutral_to_what_they_should_be(self, toy_dataset):
        panel = toy_dataset().panel
        alpha, risk = neutral_labels(panel, 0, "dual")
        industry = panel.risk[0, :, 0]
        day = 40
        for code in industry.unique():
            assert abs(float(alpha[day, industry == code].mean())) < 1e-5
            assert abs(float(risk[day, industry == code].mean())) < 1e-5
        for name in ("log_mcap", "momentum"):
            style = panel.risk[day, :, panel.risk_names.index(name)]
            assert abs(np.corrcoef(risk[day], style)[0, 1]) < 1e-4
            assert abs(np.corrcoef(alpha[day], style)[0, 1]) > 1e-3
        for label in (alpha, risk):
            assert float(label[day].std(unbiased=False)) == pytest.approx(1, abs=1e-4)
        raw, none = neutral_labels(panel, 0, "alpha_raw")
        assert none is None
        assert np.corrcoef(raw[day], panel.raw_labels[day, :, 0])[0, 1] > 0.9999

    def test_size_replaces_raw_log_market_cap(self, toy_dataset):
        panel = toy_dataset().panel
        assert linear_factors(panel) == ["log_mcap", "momentum"]
        panel.risk_names = ["industry", "log_mcap", "size"]
        assert linear_factors(panel) == ["size"]


class TestProperties:
    def test_window_equals_stream_on_the_same_history(self, toy_dataset):
        data = toy_dataset()
        model = Mamba(**{**TINY, "step_len": 120})
        model.fit(data)
        stream = model.predict(data)
        model.mode = "windows"
        pd.testing.assert_series_equal(
            stream, model.predict(data), rtol=1e-5, atol=1e-5
        )

    @pytest.mark.parametrize("task", ["alpha_raw", "alpha_neutral"])
    def test_single_tasks_fit_and_have_no_risk_factor(self, toy_dataset, task):
        data = toy_dataset()
        model = Mamba(task=task, **TINY)
        history = {}
        model.fit(data, evals_result=history)
        assert "train_penalty" not in history["seeds"][0][0]
        assert np.isfinite(model.predict(data)).all()
        with pytest.raises(ValueError, match="`task`"):
            model.predict_risk(data)

    def test_every_term_is_logged(self, toy_dataset):
        history = {}
        Mamba(**TINY).fit(toy_dataset(), evals_result=history)
        row = history["seeds"][0][0]
        assert {"train_mse_alpha", "train_mse_risk", "train_penalty"} <= set(row)
        total = row["train_mse_alpha"] + row["train_mse_risk"] + row["train_penalty"]
        assert row["train_loss"] == pytest.approx(total, rel=1e-4)

    def test_label_is_chosen_by_name(self, toy_dataset):
        data = toy_dataset(labels=("RET10", "RET5"))
        scores = []
        for label in ("RET10", "RET5"):
            model = Mamba(label=label, **TINY)
            model.fit(data)
            scores.append(model.predict(data))
        assert not np.allclose(*scores)

    def test_risk_factor_does_not_change_when_the_future_changes(self, toy_dataset):
        data = toy_dataset()
        model = Mamba(**TINY)
        model.fit(data)
        days = data.panel.dates

        def change(frame):
            frame = frame.copy()
            frame.loc[days[106] :] *= -3.0
            return frame

        before = model.predict_risk(data).loc[: days[105]]
        after = model.predict_risk(toy_dataset(change=change)).loc[: days[105]]
        pd.testing.assert_series_equal(before, after, check_exact=True)


class TestWhatIsLearnt:
    def test_penalty_lowers_the_style_exposure_and_keeps_the_alpha(self):
        # Features: a = alpha, s = a style that pays by itself. Without the penalty the
        # score takes both; with it, the alpha alone.
        rng = np.random.default_rng(1)
        t, n = 260, 60
        alpha, style = rng.normal(size=(2, t, n))
        y = 0.5 * alpha + 0.5 * style + rng.normal(size=(t, n))
        industry = np.tile(np.arange(n) % 3, (t, 1))
        data = dataset_of(
            np.stack([alpha, style, rng.normal(size=(t, n))], -1),
            y,
            np.stack([industry, style], -1),
            ["industry", "momentum"],
        )
        found = {}
        for penalty in (0.0, 20.0):
            model = Mamba(penalty=penalty, **{**TINY, "n_epochs": 4, "early_stop": 4})
            model.fit(data)
            score = model.predict(data)
            days = data.panel.days(data.segments["test"])
            present = score.index
            a = pd.Series(alpha[days].ravel(), present)
            s = pd.Series(style[days].ravel(), present)
            found[penalty] = (
                mean_daily_correlation(score, s),
                mean_daily_correlation(score, a),
            )
        print("penalty: (exposure to the style, correlation with the alpha)", found)
        assert found[0.0][0] > 0.4
        assert abs(found[20.0][0]) < 0.5 * found[0.0][0]
        assert found[20.0][1] > found[0.0][1]

    def test_risk_factor_explains_residual_risk_on_held_out_days(self):
        # A stock's exposure times its industry's is a risk that no linear factor has,
        # and that own exposures tell only in part: the graph must see the neighbours.
        rng = np.random.default_rng(2)
        t, n = 240, 60
        industry = np.tile(np.arange(n) % 6, (t, 1))
        common = rng.normal(size=(t, 6))[np.arange(t)[:, None], industry]
        style = common + rng.normal(size=(t, n))
        data = dataset_of(
            rng.normal(size=(t, n, 2)),
            style * common + rng.normal(size=(t, n)),
            np.stack([industry, style], -1),
            ["industry", "momentum"],
        )
        found = {}
        for graphs in ([], ["industry"]):
            given = {**TINY, "n_epochs": 5, "early_stop": 5, "graphs": graphs}
            model = Mamba(**given)
            model.fit(data)
            risk = model.predict_risk(data)
            days = data.panel.days(data.segments["test"])
            residual = neutral_labels(data.panel, 0, "dual")[1][days]
            residual = pd.Series(residual.numpy().ravel(), risk.index)
            daily = pd.DataFrame({"r": risk, "y": residual}).groupby(level=0)
            found[len(graphs)] = daily.apply(lambda d: d["r"].corr(d["y"]))
        print("held-out correlation, without and with the graph:", found)
        for daily in found.values():
            assert daily.mean() > 4 * daily.std() / len(daily) ** 0.5
        gain = found[1] - found[0]
        assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("task", "beta"),
            ("penalty", -1.0),
            ("discretisation", "tustin"),
            ("d_state", 0),
            ("graphs", ["friends"]),
            ("penalty_through_risk", 1),
        ],
    )
    def test_bad_argument_is_named(self, name, value):
        with pytest.raises(ValueError, match=f"`{name}`"):
            Mamba(**{**TINY, name: value})

    def test_dual_without_styles_is_refused(self, toy_dataset):
        def change(frame):
            return frame[["feature", "label"]]

        with pytest.raises(ValueError, match="style exposures"):
            Mamba(task="dual", **TINY).fit(toy_dataset(change=change))
        with pytest.raises(ValueError, match="industry"):
            Mamba(task="alpha_neutral", **TINY).fit(toy_dataset(change=change))
        Mamba(task="alpha_raw", **TINY).fit(toy_dataset(change=change))
