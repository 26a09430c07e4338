"""Risk model against statsmodels, on simulated markets and in Qlib's hands."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from qlib_ext.portfolio import risk_model as module
from qlib_ext.portfolio.risk_model import (
    RiskInputs,
    RiskModel,
    bias_statistic,
    bias_table,
    build_risk_model,
    newey_west_covariance,
    newey_west_variance,
    read_day,
    read_extra,
    signal_days,
)


class TestEstimators:
    x = np.random.default_rng(0).standard_normal((300, 4)).cumsum(0) * 0.1
    x = x[1:] - 0.7 * x[:-1]  # serially correlated

    @pytest.mark.parametrize("lags", [0, 1, 5])
    def test_covariance_equals_statsmodels_on_the_weighted_series(self, lags):
        from statsmodels.stats.sandwich_covariance import S_hac_simple

        w = 0.5 ** (np.arange(len(self.x))[::-1] / 60)
        w = w / w.sum()
        mean = (w[:, None] * self.x).sum(0)
        weighted = np.sqrt(w)[:, None] * (self.x - mean)
        expected = S_hac_simple(weighted, nlags=lags)
        found = newey_west_covariance(self.x, 60, lags)
        np.testing.assert_allclose(found, expected, rtol=1e-10)

    def test_long_half_life_without_lags_is_the_sample_covariance(self):
        found = newey_west_covariance(self.x, 1e9, 0)
        np.testing.assert_allclose(found, np.cov(self.x.T, ddof=0), rtol=1e-6)
        half = pd.DataFrame(self.x).ewm(halflife=40).cov(bias=True).loc[len(self.x) - 1]
        np.testing.assert_allclose(
            newey_west_covariance(self.x, 40, 0), half, rtol=1e-8
        )

    def test_gaps_keep_it_positive_and_unbiased(self):
        rng = np.random.default_rng(1)
        x = rng.standard_normal((4000, 3)) @ np.diag([1, 2, 3])
        x[rng.random(x.shape) < 0.3] = np.nan
        x[:, 2] = np.where(np.arange(4000) < 2000, np.nan, x[:, 2])
        found = newey_west_covariance(x, 1e6, 3)
        assert np.linalg.eigvalsh(found).min() > 0
        np.testing.assert_allclose(np.diag(found), [1, 4, 9], rtol=0.12)
        x[:, 1] = np.nan
        found = newey_west_covariance(x, 1e6, 3)
        assert np.isnan(found[1]).all() and np.isfinite(found[0, 2])

    def test_variance_is_the_covariance_about_zero(self):
        x = self.x - self.x.mean(0)
        found, days = newey_west_variance(x, 1e9, 4)
        np.testing.assert_allclose(
            found, np.diag(newey_west_covariance(x, 1e9, 4)), rtol=1e-5
        )
        assert days.tolist() == [len(x)] * 4


def simulate(t=700, n=120, seed=0, industries=4):
    """Inputs whose factor covariance and specific risk are known."""
    rng = np.random.default_rng(seed)
    style = rng.standard_normal((n, 2))
    style -= style.mean(0)
    style /= style.std(0)
    industry = np.arange(n) % industries
    sigma_s = np.array([0.006, 0.004])
    f_country = 0.01 * rng.standard_normal(t)
    f_style = sigma_s * rng.standard_normal((t, 2))
    f_industry = 0.005 * rng.standard_normal((t, industries))
    specific = np.exp(rng.normal(np.log(0.015), 0.25, n))
    r = f_country[:, None] + f_style @ style.T + f_industry[:, industry]
    r += specific * rng.standard_normal((t, n))
    days = pd.bdate_range("2017-01-02", periods=t)
    inputs = RiskInputs(
        days=days,
        instruments=pd.Index([f"S{i:03d}" for i in range(n)], name="instrument"),
        styles=("size", "momentum"),
        exposures=np.broadcast_to(style, (t, n, 2)).astype(np.float32),
        industry=np.broadcast_to(industry, (t, n)).astype(float),
        mcap=None,
        returns=r,
        listed=np.ones((t, n), bool),
        characteristics={},
    )
    return inputs, sigma_s, specific


class TestSimulated:
    @pytest.fixture(scope="class")
    def made(self):
        inputs, sigma, specific = simulate()
        long = {"volatility_half_life": 400, "specific_half_life": 400, "lags": 0}
        return RiskModel(inputs, **long), sigma, specific

    def test_finds_the_true_risks(self, made):
        model, sigma, specific = made
        day = model.estimate(model.inputs.days[-1])
        assert list(day.exposures.columns[:3]) == ["country", "size", "momentum"]
        found = np.sqrt(np.diag(day.covariance))
        np.testing.assert_allclose(found[1:3], sigma * np.sqrt(252), rtol=0.12)
        truth = specific * np.sqrt(252)
        assert np.corrcoef(day.specific, truth)[0, 1] > 0.95
        assert float((day.specific / truth).mean()) == pytest.approx(1, abs=0.06)
        assert np.linalg.eigvalsh(day.covariance).min() >= -1e-12

    def test_bias_statistics_are_near_one(self, made):
        model, _, _ = made
        table = bias_table(model, model.inputs.days[200::5])
        assert set(table.index) == {"market", "random", "active", "stock"}
        for kind in ("market", "random", "active", "stock"):
            assert table.at[kind, "bias"] == pytest.approx(1, abs=0.15), kind
        assert table.at["active", "inside"] > 0.85

    def test_bias_statistic_tells_halved_risk(self):
        rng = np.random.default_rng(0)
        r = 0.02 * rng.standard_normal(400)
        assert bias_statistic(r, np.full(400, 0.02)).value == pytest.approx(1, abs=0.1)
        wrong = bias_statistic(r, np.full(400, 0.01))
        assert wrong.value == pytest.approx(2, abs=0.2) and wrong.value > wrong.high
        assert bias_statistic(r[:1], np.ones(1)).count == 1

    def test_the_future_does_not_move_a_day(self, made):
        model, _, _ = made
        i = model.inputs
        row = 500
        before = model.estimate(i.days[row])
        cut = replace(
            i,
            **{
                k: getattr(i, k)[: row + 1]
                for k in ("days", "exposures", "industry", "returns", "listed")
            },
        )
        returns = i.returns.copy()
        returns[row + 1 :] = 9.0
        exposures = i.exposures.copy()
        exposures[row + 1 :] *= -3
        changed = replace(i, returns=returns, exposures=exposures)
        kwargs = {"volatility_half_life": 400, "specific_half_life": 400, "lags": 0}
        for other in (cut, changed):
            after = RiskModel(other, **kwargs).estimate(i.days[row])
            for name in ("exposures", "covariance", "specific"):
                one, two = getattr(before, name), getattr(after, name)
                np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-15)

    def test_a_new_industry_borrows_and_a_new_stock_takes_its_group(self):
        inputs, _, _ = simulate(t=300)
        industry = inputs.industry.copy()
        industry[-20:, :6] = 9.0
        returns = inputs.returns.copy()
        returns[:-30, 40] = np.nan
        model = RiskModel(replace(inputs, industry=industry, returns=returns))
        day = model.estimate(inputs.days[-1])
        own = day.covariance.loc["industry_9"]
        rest = [f"industry_{k}" for k in range(4)]
        assert own["industry_9"] == pytest.approx(
            np.median(np.diag(day.covariance.loc[rest, rest])), rel=1e-9
        )
        assert (own.drop("industry_9") == 0).all()
        assert day.specific["S040"] == pytest.approx(day.specific.mean(), rel=0.2)
        with pytest.raises(ValueError, match="min_days"):
            model.estimate(inputs.days[20])

    @pytest.mark.parametrize("name", ["lags", "min_days", "window", "shrinkage"])
    def test_bad_parameters(self, name):
        with pytest.raises(ValueError, match=name):
            RiskModel(simulate(t=80, n=30)[0], **{name: -1})
        with pytest.raises(ValueError, match=name):
            RiskModel(simulate(t=80, n=30)[0], **{name: "7"})


def test_signal_days_end_weeks_that_are_over():
    days = pd.bdate_range("2021-03-01", "2021-03-17").delete(4)  # no Friday the 5th
    found = [f"{d:%m-%d}" for d in signal_days(days)]
    assert found == ["03-04", "03-12"]  # the week of the 17th may go on


@pytest.fixture(scope="module")
def store_model(qlib_market, tmp_path_factory):
    """Weekly model of the embedded market, autumn 2020, with a further factor."""
    folder = tmp_path_factory.mktemp("risk")
    oracle = pd.read_parquet(f"{qlib_market}.oracle.parquet")
    extra = oracle.set_index(["datetime", "instrument"])[["tick"]]
    extra.rename(columns={"tick": "risk"}).to_parquet(folder / "risk_factor.parquet")
    options = {
        "extra": {"learnt": folder / "risk_factor.parquet"},
        "styles": ["beta", "size", "momentum", "liquidity"],
        "window": 260,
    }
    root = folder / "model"
    model = build_risk_model(root, "2020-09-01", "2020-11-30", **options)
    return root, model, options


class TestFiles:
    def test_every_week_of_the_range_is_there(self, store_model):
        root, model, _ = store_model
        found = sorted(p.name for p in root.iterdir() if p.is_dir())
        ends = signal_days(model.inputs.days)
        assert found == [f"{d:%Y%m%d}" for d in ends if d >= pd.Timestamp("2020-09-01")]
        meta = json.loads((root / "meta.json").read_text())
        assert "annualised" in meta["units"]

    def test_qlibs_own_strategy_reads_them(self, store_model):
        from qlib.contrib.strategy import EnhancedIndexingStrategy

        root, _, _ = store_model
        name = sorted(p.name for p in root.iterdir() if p.is_dir())[-1]
        score = pd.Series(
            [0.0],
            pd.MultiIndex.from_tuples(
                [("SH600000", pd.Timestamp(name))], names=["instrument", "datetime"]
            ),
        )
        strategy = EnhancedIndexingStrategy(riskmodel_root=str(root), signal=score)
        f, cov, specific, universe, black = strategy.get_risk_data(pd.Timestamp(name))
        assert f.shape == (len(universe), len(cov)) and specific.shape == (len(f),)
        assert np.isfinite(f).all() and np.isfinite(cov).all() and not black
        ours = read_day(root, name)
        np.testing.assert_allclose(f, ours.exposures.fillna(0))
        np.testing.assert_allclose(specific, ours.specific)
        assert list(ours.exposures.columns) == list(ours.covariance.columns)

    def test_the_learnt_factor_is_a_factor(self, store_model):
        root, model, _ = store_model
        assert model.inputs.styles[-1] == "learnt"
        day = read_day(root, "2020-11-27")
        x = day.exposures["learnt"].dropna()
        assert len(x) > 60 and x.std(ddof=0) == pytest.approx(1, abs=0.15)
        assert day.covariance.at["learnt", "learnt"] > 0
        # It is the market's true alpha, so it earns.
        earned = pd.read_parquet(root / "factor_returns.parquet")["learnt"].dropna()
        assert earned.mean() / earned.std() * len(earned) ** 0.5 > 2

    def test_a_shorter_store_gives_the_same_days_and_work_resumes(
        self, store_model, tmp_path, monkeypatch
    ):
        root, _, options = store_model
        other = tmp_path / "model"
        real, done = module.write_day, []

        def killed(folder, day, checksum):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(day.date)
            real(folder, day, checksum)

        monkeypatch.setattr(module, "write_day", killed)
        # Cut at the end of September: what follows is not read at all.
        span = ("2020-09-01", "2020-09-30")
        with pytest.raises(KeyboardInterrupt):
            build_risk_model(other, *span, **options)
        first = {p.name: p.stat().st_mtime_ns for p in other.iterdir() if p.is_dir()}
        assert len(first) == 2
        monkeypatch.undo()
        build_risk_model(other, *span, **options)
        days = [p for p in other.iterdir() if p.is_dir()]
        assert len(days) == 4  # the 30th is a Wednesday
        assert not [p for p in other.iterdir() if p.name.startswith(".")]
        for p in days:
            if p.name in first:
                assert p.stat().st_mtime_ns == first[p.name]
            one, two = read_day(other, p.name), read_day(root, p.name)
            for name in ("exposures", "covariance", "specific", "characteristics"):
                pd.testing.assert_frame_equal(
                    pd.DataFrame(getattr(one, name)),
                    pd.DataFrame(getattr(two, name)),
                    rtol=1e-9,
                )

    def test_days_whose_inputs_changed_are_written_again(
        self, market_small, use_store, tmp_path
    ):
        store, root = tmp_path / "store", tmp_path / "model"
        shutil.copytree(market_small, store)
        asked = ("2020-09-01", "2020-09-25")
        options = {"styles": ["size", "momentum"], "window": 100}

        def build(**more):
            use_store(store)
            build_risk_model(root, *asked, **options, **more)
            folders = sorted(p for p in root.iterdir() if p.is_dir())
            return {p.name: p.stat().st_mtime_ns for p in folders}, read_day(
                root, asked[1]
            )

        first, before = build()
        assert len(first) == 4
        assert build()[0] == build(overwrite="changed")[0] == first
        # Corrected market caps from the 14th on.
        days = (store / "calendars" / "day.txt").read_text().split()
        slot = days.index("2020-09-14")
        for path in (store / "features").glob("*/market_cap.day.bin"):
            bars = np.fromfile(path, "<f4")
            factor = 1 + sum(path.parent.name.encode()) % 7
            bars[1 + max(0, slot - int(bars[0])) :] *= factor
            bars.tofile(path)
        second, after = build()
        same = [name for name in first if second[name] == first[name]]
        assert same == ["20200904", "20200911"]
        assert not np.allclose(before.exposures["size"], after.exposures["size"])
        fresh = build_risk_model(tmp_path / "fresh", *asked, **options)
        pd.testing.assert_frame_equal(
            after.exposures, fresh.estimate(asked[1]).exposures
        )
        third, _ = build(overwrite=True)
        assert not set(third.values()) & set(second.values())
        assert not [p for p in root.iterdir() if p.name.startswith(".")]

    def test_other_parameters_are_refused_or_rebuild(self, store_model, tmp_path):
        root, _, options = store_model
        with pytest.raises(ValueError, match="lags"):
            build_risk_model(root, "2020-09-01", "2020-09-10", **options, lags=1)
        with pytest.raises(ValueError, match="half_live"):
            build_risk_model(root, "2020-09-01", "2020-09-10", half_live=1)
        with pytest.raises(ValueError, match="window"):
            build_risk_model(root, "2020-09-01", "2020-09-10", window="long")
        with pytest.raises(ValueError, match="frequency"):
            build_risk_model(root, "2020-09-01", "2020-09-10", frequency="month")
        with pytest.raises(ValueError, match="overwrite"):
            build_risk_model(root, "2020-09-01", "2020-09-10", overwrite="all")
        (tmp_path / "mine.txt").write_text("x")
        with pytest.raises(ValueError, match="no risk model"):
            build_risk_model(tmp_path, "2020-09-01", "2020-09-10")
        with pytest.raises(ValueError, match="2019"):
            read_day(root, "2019-01-04")

    def test_bad_extra_factors(self, tmp_path):
        index = pd.MultiIndex.from_product(
            [pd.to_datetime(["2020-01-02"]), ["SH600000"]],
            names=["datetime", "instrument"],
        )
        two = tmp_path / "two.parquet"
        pd.DataFrame({"a": 1.0, "b": 2.0}, index).to_parquet(two)
        for extra, word in (
            ({"size": two}, "size"),
            ({"x": tmp_path / "none.parquet"}, "none.parquet"),
            ({"x": two}, "one column"),
        ):
            with pytest.raises(ValueError, match=word):
                read_extra(extra)
        assert read_extra(None).empty
