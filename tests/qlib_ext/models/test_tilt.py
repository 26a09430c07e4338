"""The style part of a score: taken out, learnt from the training days, put back."""

import numpy as np
import pandas as pd
import pytest
import torch

from qlib_ext.dataset import Panel
from qlib_ext.models import MultiFactorRNN
from qlib_ext.models.tilt import StyleTilt

DAYS, STOCKS = 60, 40


@pytest.fixture
def panel():
    """Two styles that pay 0.5 and -0.3 a standard deviation, four industries."""
    rng = np.random.default_rng(0)
    risk = np.concatenate(
        [
            np.broadcast_to((np.arange(STOCKS) % 4)[None, :, None], (DAYS, STOCKS, 1)),
            rng.normal(size=(DAYS, STOCKS, 2)),
        ],
        axis=2,
    )
    industry = rng.normal(size=(DAYS, 4))[:, np.arange(STOCKS) % 4]
    returns = 0.5 * risk[..., 1] - 0.3 * risk[..., 2] + industry
    returns += 0.5 * rng.normal(size=(DAYS, STOCKS))
    return Panel(
        dates=pd.bdate_range("2020-01-01", periods=DAYS),
        instruments=pd.Index([f"S{i:02d}" for i in range(STOCKS)]),
        feature_names=["x"],
        features=torch.zeros(DAYS, STOCKS, 1),
        present=torch.from_numpy(rng.random((DAYS, STOCKS)) < 0.9),
        label_names=["RET10"],
        labels=torch.from_numpy(returns).float().unsqueeze(-1),
        raw_labels=torch.from_numpy(returns).float().unsqueeze(-1),
        risk_names=["industry", "momentum", "beta"],
        risk=torch.from_numpy(risk).float(),
    )


def test_a_residual_has_no_style_and_no_industry_in_it(panel):
    styles = StyleTilt.of(panel)
    score = torch.randn(DAYS, STOCKS, 1) + 2 * panel.risk[..., [1]]
    days = np.arange(DAYS)
    left = styles.residual(score, days)[..., 0]
    for day in days:
        here = panel.present[day]
        x = panel.risk[day, here].double()
        dummies = torch.eye(4, dtype=torch.float64)[x[:, 0].long()]
        regressors = torch.cat([dummies, x[:, 1:]], 1)
        np.testing.assert_allclose(
            regressors.T @ left[day, here].double(), 0, atol=1e-3
        )
        # The residual of ordinary least squares, written out.
        y = score[day, here, 0].double()
        beta = torch.linalg.lstsq(regressors, y.unsqueeze(-1)).solution[:, 0]
        expected = y - regressors @ beta
        expected = expected / expected.square().mean().sqrt()
        np.testing.assert_allclose(left[day, here], expected, atol=1e-3)
        assert (left[day, ~here] == 0).all()


def test_weights_are_the_mean_coefficients_of_the_rank(panel):
    weights = StyleTilt.of(panel).learn(np.arange(DAYS), panel.raw_labels[..., 0])
    total = np.zeros(2)
    for day in range(DAYS):
        here = panel.present[day]
        x = panel.risk[day, here].double()
        regressors = torch.cat(
            [torch.eye(4, dtype=torch.float64)[x[:, 0].long()], x[:, 1:]], 1
        )
        rank = panel.raw_labels[day, here, 0].argsort().argsort().double()
        rank = (rank - rank.mean()) / rank.std(unbiased=False)
        total += (
            torch.linalg.lstsq(regressors, rank.unsqueeze(-1)).solution[4:, 0].numpy()
        )
    np.testing.assert_allclose(list(weights.values()), total / DAYS, rtol=1e-5)
    assert list(weights) == ["momentum", "beta"]
    assert weights["momentum"] > 0.2 and weights["beta"] < -0.1


def test_weights_know_the_training_days_only(panel):
    styles, train = StyleTilt.of(panel), np.arange(30)
    before = styles.learn(train, panel.raw_labels[..., 0])
    panel.raw_labels[30:] = 7.0
    panel.risk[30:] = 3.0
    assert styles.learn(train, panel.raw_labels[..., 0]) == before


def test_a_day_s_parts_know_their_own_day_only(panel):
    styles, days = StyleTilt.of(panel), np.arange(20)
    score = torch.randn(DAYS, STOCKS, 1)
    weights = {"momentum": 0.5, "beta": -0.3}
    before = styles.residual(score[:20], days), styles.paid(weights, days)
    panel.risk[20:] = 3.0
    after = styles.residual(score[:20], days), styles.paid(weights, days)
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_unknown_exposures_count_as_average(panel):
    panel.risk[5, :7, 1:] = torch.nan
    panel.risk[5, 3, 0] = torch.nan
    styles = StyleTilt.of(panel)
    assert torch.isfinite(
        styles.residual(torch.randn(1, STOCKS, 1), np.array([5]))
    ).all()
    assert np.isfinite(
        list(styles.learn(np.arange(9), panel.raw_labels[..., 0]).values())
    ).all()


SMALL = dict(
    hidden_size=8, num_layers=1, step_len=6, n_epochs=2, chunk=8, GPU=-1, n_factors=1
)


class TestInAModel:
    @pytest.mark.parametrize("tilt", [0, 0.7])
    def test_the_score_is_residual_plus_tilt_times_style(self, toy_dataset, tilt):
        data = toy_dataset()
        model = MultiFactorRNN(**SMALL, tilt=tilt)
        model.fit(data)
        parts = model.predict_parts(data)
        assert list(parts) == ["score", "learnt", "residual", "style"]
        assert set(model.style_weights_) == {"momentum"}
        mixed = parts["residual"] + tilt * parts["style"]
        by_day = mixed.groupby("datetime")
        expected = (mixed - by_day.transform("mean")) / by_day.transform("std", ddof=0)
        np.testing.assert_allclose(parts["score"], expected, atol=1e-3)
        pd.testing.assert_series_equal(model.predict(data), parts["score"])
        units, same = model.predict_units_and_parts(data)
        pd.testing.assert_frame_equal(same, parts)
        pd.testing.assert_frame_equal(units, model.predict_units(data))
        momentum = data.handler.fetch(col_set="risk")["momentum"].reindex(parts.index)
        both = pd.DataFrame({"residual": parts["residual"], "momentum": momentum})
        daily = both.groupby("datetime").corr().iloc[::2, 1]
        assert daily.abs().max() < 1e-3

    def test_stopping_on_the_residual_is_its_rank_ic(self, toy_dataset):
        model = MultiFactorRNN(**SMALL, stop_on="residual")
        model.fit(toy_dataset())
        rows = model.history_[0]
        assert {"valid_rank_ic", "valid_rank_ic_residual"} <= set(rows[0])
        assert not model.style_weights_

    def test_without_styles_it_says_what_to_do(self, toy_dataset):
        def bare(frame):
            return frame.drop(columns=[("risk", "momentum")])

        model = MultiFactorRNN(**SMALL, tilt=1.0)
        with pytest.raises(ValueError, match="AddRisk and CSStyleExposure"):
            model.fit(toy_dataset(change=bare))
        model = MultiFactorRNN(**SMALL, tilt=1.0, tilt_styles=["value"])
        with pytest.raises(ValueError, match="`tilt_styles` names 'value'"):
            model.fit(toy_dataset())
        with pytest.raises(ValueError, match="there is no `tilt`"):
            MultiFactorRNN(tilt_styles=["momentum"])
