"""Mamba on embedded markets: what the penalty and the mixture do to known alpha."""

import numpy as np
import pandas as pd
import pytest
import torch

from data_handlers.day import DayHandler
from qlib_ext.dataset import PanelDataset
from qlib_ext.market import make_market
from qlib_ext.metrics import ic, rank_ic
from qlib_ext.models import Mamba, MambaMoE

SEGMENTS = {
    "train": ("2018-01-01", "2019-06-14"),
    "valid": ("2019-07-03", "2019-12-13"),
    "test": ("2020-01-02", "2020-12-31"),
}
MODEL = {"n_epochs": 4, "early_stop": 4, "step_len": 30, "GPU": -1}


def open_market(store, use_store):
    """Dataset of a market and its planted expected return."""
    use_store(store)
    handler = DayHandler(
        start_time="2018-01-01",
        end_time="2020-12-31",
        fit_start_time="2018-01-01",
        fit_end_time="2019-06-14",
        horizon=[10, 5],
    )
    oracle = pd.read_parquet(f"{store}.oracle.parquet")
    oracle = oracle.set_index(["datetime", "instrument"])["day"]
    return PanelDataset(handler, dict(SEGMENTS)), oracle


def correlation(score, other, measure):
    wide = pd.DataFrame({"a": score, "b": other}).dropna().unstack()
    a, b = (torch.from_numpy(wide[k].to_numpy(np.float64)) for k in ("a", "b"))
    return float(measure(a, b).nanmean())


@pytest.mark.slow  # test_mamba.py shows the same on drawn numbers
def test_penalty_uncovers_the_alpha_that_hides_behind_a_style(tmp_path, use_store):
    # Calm stocks earn more, by more than the planted alpha.
    store = make_market(
        tmp_path / "style", stocks=100, years=3, seed=11, style_alpha=0.02
    )
    dataset, oracle = open_market(store, use_store)
    panel = dataset.panel
    days = panel.days(SEGMENTS["test"])
    column = panel.risk_names.index("volatility")
    style = panel.series(panel.risk[days][..., [column]], days, ["v"])["v"]
    found = {}
    for penalty in (0.0, 10.0):
        model = Mamba(penalty=penalty, seed=0, **MODEL)
        model.fit(dataset)
        score = model.predict(dataset)
        found[penalty] = (
            correlation(score, style, ic),
            correlation(score, oracle, rank_ic),
        )
    print("penalty: (exposure to volatility, correlation with the alpha)", found)
    assert found[0.0][0] < -0.15
    assert abs(found[10.0][0]) < 0.75 * abs(found[0.0][0])
    assert found[10.0][1] > found[0.0][1]


@pytest.mark.slow
def test_mixture_is_not_worse_than_equal_weight_beyond_the_seeds(market, use_store):
    dataset, oracle = open_market(market, use_store)
    found = []
    for seed in range(3):
        model = MambaMoE(
            tasks=["dual", "alpha_neutral"],  # four experts, two kept
            n_folds=2,
            gate_n_epochs=20,
            seed=seed,
            **MODEL,
        )
        model.fit(dataset)
        experts = model.predict_experts(dataset)
        assert ((experts.filter(like="weight_") > 0).sum(axis=1) == 2).all()
        equal = experts.filter(like="score_").mean(axis=1)
        found.append(
            [correlation(s, oracle, rank_ic) for s in (model.predict(dataset), equal)]
        )
    mixture, equal = np.array(found).T
    print("correlation with the alpha: mixture", mixture, "equal weight", equal)
    assert equal.min() > 0.2
    assert mixture.mean() > equal.mean() - 2 * equal.std(ddof=1)
