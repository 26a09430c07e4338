"""Figures of the Mamba report by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from qlib_ext.report.mamba import (
    Beside,
    expert_figures,
    expert_warnings,
    exposure_figures,
    industry_exposure,
    mamba_page,
    market_regime,
    part_of,
)


def test_exposure_and_explained_share_are_worked_by_hand():
    score = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    label = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    styles = {"beta": torch.tensor([[1.0, -1.0, 1.0, -1.0]]), "size": score * 2}
    exposure, daily = exposure_figures(score, label, None, styles, score * -1)
    assert exposure.loc[0].tolist() == pytest.approx([0.0, 1.0, -1.0], abs=1e-9)
    assert daily.loc[0, "explained"] == pytest.approx(1.0)
    assert daily.loc[0, "rank_ic"] == pytest.approx(0.894427, abs=1e-5)
    _, daily = exposure_figures(score, label, None, {"beta": styles["beta"]}, None)
    # R2 is 0; four stocks and two coefficients: 1 - 1 * 3 / 2.
    assert daily.loc[0, "explained"] == pytest.approx(-0.5, abs=1e-9)
    assert daily.loc[0, "neutral_rank_ic"] == pytest.approx(daily.loc[0, "rank_ic"])
    assert "risk_rank_ic" not in daily


def test_noise_is_explained_by_nothing_on_average():
    g = torch.Generator().manual_seed(0)
    score, label = torch.randn(2, 400, 60, generator=g)
    industry = np.tile(np.arange(60) % 10, (400, 1)).astype(float)
    styles = {k: torch.randn(400, 60, generator=g) for k in "abcdef"}
    _, daily = exposure_figures(score, label, industry, styles, None)
    # Unadjusted: (10 + 6 - 1) / 59 = 25 %.
    assert abs(daily["explained"].mean()) < 0.02


def test_absent_stocks_do_not_count_as_explained():
    g = torch.Generator().manual_seed(0)
    score = torch.randn(3, 40, generator=g)
    score[:, ::3] = float("nan")
    industry = np.tile(np.arange(40) % 4, (3, 1)).astype(float)
    style = torch.randn(3, 40, generator=g)
    style[1, 5:9] = float("nan")
    _, daily = exposure_figures(score, style, industry, {"beta": style}, None)
    assert ((daily["explained"] >= -0.3) & (daily["explained"] < 0.6)).all()


def test_industry_exposure_is_the_mean_standardised_score():
    score = torch.tensor([[2.0, 2.0, 0.0, 0.0, float("nan")]])
    industry = np.array([[1.0, 1.0, 2.0, np.nan, 3.0]])
    found = industry_exposure(score, industry, {"1": "banks"})
    assert found.loc[0, "banks"] == pytest.approx(1.0)
    assert found.loc[0, "2"] == pytest.approx(-1.0)
    assert np.isnan(found.loc[0, "3"])


def test_market_regime_uses_no_later_day():
    rng = np.random.default_rng(0)
    returns = rng.normal(size=120)
    state = market_regime(returns)
    returns[60:] = 9.0
    assert (market_regime(returns)[:60] == state[:60]).all()
    assert set(state) <= {
        "unknown",
        *(f"{a}, {b}" for a in ("rising", "falling") for b in ("calm", "turbulent")),
    }


def test_expert_figures_are_worked_by_hand():
    nan = float("nan")
    weights = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [nan, nan], [0.0, 1.0]]])
    label = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    scores = torch.stack([label, -label], dim=-1)
    daily, by_regime = expert_figures(
        weights, scores, label, label, ["up", "down"], np.array(["calm"])
    )
    assert part_of(daily, "load").loc[0].tolist() == pytest.approx([0.5, 0.5])
    assert daily.loc[0, "entropy"] == pytest.approx(1 / 3, abs=1e-6)
    assert by_regime.loc["calm"].tolist() == pytest.approx([1, 1.0, -1.0, 1.0])
    assert by_regime.loc["all", "days"] == 1


def test_collapse_is_warned_about_and_balance_is_not():
    assert expert_warnings(pd.Series({"a": 0.6, "b": 0.4})) == []
    assert expert_warnings(pd.Series({"a": 1.0})) == []
    texts = expert_warnings(pd.Series({"a": 0.99, "b": 0.01}))
    assert "collapsed" in texts[0] and "hardly used" in texts[1]


def test_page_renders_with_another_run_beside():
    dates = pd.bdate_range("2020-01-01", periods=30)
    exposure = pd.DataFrame({"beta": np.linspace(0, 1, 30)}, index=dates)
    daily = pd.DataFrame(
        0.1, index=dates, columns=["rank_ic", "neutral_rank_ic", "explained"]
    )
    industries = pd.DataFrame({"banks": 0.5}, index=dates)
    beside = Beside("off", exposure, industries)
    page = mamba_page("Mamba", exposure, daily, industries, beside=beside)
    text = page.render()
    for part in ("mean size, off", "Over time, off", "Industries, off", "banks"):
        assert part in text


def test_record_refuses_another_model():
    from qlib_ext.record_temp import MambaRecord

    with pytest.raises(ValueError, match="`model`"):
        MambaRecord(None, model=object())
