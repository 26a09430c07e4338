"""RiskControl: the loss by hand, what penalties do, and what they may know."""

import numpy as np
import pandas as pd
import pytest
import torch

from data_handlers.processors import CSZScore
from data_handlers.risk import StyleFeatures
from qlib_ext.losses import day_ic
from qlib_ext.models import RiskControl, risk_control

TINY = {
    "rnn": "GRU",
    "mode": "stream",
    "hidden_size": 8,
    "num_layers": 1,
    "dropout": 0.0,
    "step_len": 5,
    "chunk": 8,
    "n_epochs": 3,
    "GPU": -1,
}


@pytest.fixture
def running(monkeypatch):
    """Function that sets the daily returns of the styles."""

    def of(panel, user, returns=None):
        days = np.arange(len(panel.dates))
        values = np.sin(days / 9.0) * 0.01 + 0.001
        return pd.DataFrame({"momentum": values}, index=panel.dates)

    monkeypatch.setattr(risk_control, "style_returns", of)


def batch_of(model, data, days):
    model.step_len_ = model.step_len
    return model._batch(data.panel, np.asarray(days), torch.device("cpu"))


def corr(a, b):
    keep = np.isfinite(a) & np.isfinite(b)
    return np.corrcoef(a[keep], b[keep])[0, 1]


class TestReferenceValues:
    def test_ic_is_pearsons_over_the_labelled(self):
        rng = np.random.default_rng(0)
        score, label = rng.normal(size=(2, 3, 9))
        label[0, 2] = np.nan
        mask = np.ones((3, 9), bool)
        mask[1, :3] = False
        mask[2, 1:] = False  # one stock
        got, counted = day_ic(*map(torch.tensor, (score, label, mask)))
        assert counted.tolist() == [True, True, False]
        assert got[0].item() == pytest.approx(corr(score[0], label[0]))
        assert got[1].item() == pytest.approx(corr(score[1, 3:], label[1, 3:]))
        assert got[2].item() == 0.0

    def test_loss_is_the_sum_worked_by_hand(self, toy_dataset, running):
        data = toy_dataset()
        panel = data.panel
        model = RiskControl(**TINY, deviation=2.0, momentum=3.0)
        batch = batch_of(model, data, [60, 61])
        score = torch.randn(2, len(batch.stocks), dtype=torch.float64)
        loss, parts = model.loss({"score": score}, batch)
        style = panel.risk_names.index("momentum")
        returns = risk_control.style_returns(panel, "")["momentum"].to_numpy()
        ic, lean = [], []
        for row, day in enumerate((60, 61)):
            s = score[row].numpy()
            ic.append(corr(s, panel.labels[day, :, 0].numpy()))
            lean.append(corr(s, panel.risk[day, :, style].numpy()) ** 2)
        # one style: what ran is that style, whatever its return
        assert np.abs(returns[41:62]).min() > 0
        want = -np.mean(ic) + (2.0 + 3.0) * np.mean(lean)
        assert loss.item() == pytest.approx(want, rel=1e-5)
        assert parts["ic"].item() == pytest.approx(np.mean(ic), rel=1e-5)
        assert set(parts) == {"ic", "deviation", "momentum"}

    def test_what_ran_is_the_sum_of_20_days_in_own_deviations(
        self, toy_dataset, running
    ):
        panel = toy_dataset().panel
        ran = RiskControl(**TINY)._styles_that_ran(panel)[:, 0].numpy()
        r = risk_control.style_returns(panel, "")["momentum"].to_numpy()
        unit = [r[d] / np.sqrt(np.mean(r[: d + 1] ** 2)) for d in range(31, 51)]
        assert ran[50] == pytest.approx(
            np.clip(np.sum(unit) / 20**0.5, -4, 4), rel=1e-4
        )


def test_penalties_keep_the_score_off_the_styles(toy_dataset, running):
    def change(frame):
        # the label leans on the style as much as on the signal, and the model sees it
        lean = frame[("risk", "momentum")]
        frame[("label", "RET10")] += 2.0 * lean
        frame[("feature", "x2")] = lean
        return frame

    data = toy_dataset(change=change)
    leans = {}
    for weight in (0.0, 5.0):
        model = RiskControl(**TINY, deviation=weight, momentum=weight, lr=0.05)
        model.n_epochs = 6
        model.fit(data)
        score = model.predict(data)
        style = data.handler.fetch(col_set="risk")["momentum"].reindex(score.index)
        both = pd.concat([score, style], axis=1).groupby("datetime")
        leans[weight] = both.corr().iloc[::2, 1].abs().mean()
    assert leans[0.0] > 0.6
    assert leans[5.0] < 0.5 * leans[0.0]


def test_style_features_stand_behind_the_features():
    index = pd.MultiIndex.from_product(
        [pd.to_datetime(["2020-01-02"]), ["A", "B"]], names=["datetime", "instrument"]
    )
    columns = pd.MultiIndex.from_tuples(
        [("feature", "x"), ("label", "y"), ("risk", "log_mcap"), ("risk", "size")]
    )
    frame = pd.DataFrame([[1.0, 2, 3, 4], [5, 6, 7, np.nan]], index, columns)
    got = StyleFeatures()(frame)
    assert list(got["feature"]) == ["x", "style_size"]
    assert got[("feature", "style_size")].tolist() == [4.0, 0.0]
    pd.testing.assert_frame_equal(got[columns], frame)
    with pytest.raises(ValueError, match="`style_features` is true"):
        StyleFeatures()(frame[[("feature", "x"), ("label", "y")]])
    assert CSZScore("label")(got).shape == got.shape


def test_data_without_styles_is_refused(toy_dataset):
    def change(frame):
        return frame.drop(columns=[("risk", "momentum")])

    data = toy_dataset(change=change)
    with pytest.raises(ValueError, match="need style exposures"):
        RiskControl(**TINY).fit(data)
    RiskControl(**TINY, deviation=0.0, momentum=0.0).fit(data)


@pytest.mark.parametrize("name", ["deviation", "momentum"])
def test_negative_weights_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        RiskControl(**{name: -1.0})
