"""FamilyComposite: weights by hand, learnt on the past, rules for absent families."""

import pickle

import numpy as np
import pandas as pd
import pytest

import qlib_ext.models.score_average as score_average
from qlib_ext.models import FamilyComposite
from qlib_ext.models.composite import long_only_weights
from qlib_ext.models.score_average import NoScore

REACH = 11


class TestLongOnlyWeights:
    def test_weights_worked_by_hand(self):
        days = pd.bdate_range("2020-01-01", periods=6)
        returns = pd.DataFrame(
            {"a": [3.0, 1, 2, 9, 9, 9], "b": [1.0, -3, -4, 9, 9, 9]}, index=days
        )
        got = long_only_weights(returns, reach=2, window=2, min_days=1)
        np.testing.assert_allclose(got.iloc[:2], 0.5)  # nothing is known yet
        np.testing.assert_allclose(got.iloc[2], [0.75, 0.25])  # 3 and 1
        np.testing.assert_allclose(got.iloc[3], [1.0, 0.0])  # 2 and -1
        np.testing.assert_allclose(got.iloc[4], [1.0, 0.0])  # 1.5 and -3.5
        np.testing.assert_allclose(got.sum(axis=1), 1.0)

    def test_short_history_gets_the_mean_weight_and_losers_share_equally(self):
        days = pd.bdate_range("2020-01-01", periods=5)
        returns = pd.DataFrame(
            {"a": [4.0] * 5, "b": [2.0] * 5, "c": [np.nan] * 4 + [9]}, index=days
        )
        got = long_only_weights(returns, reach=1, window=5, min_days=2)
        np.testing.assert_allclose(got.iloc[1], 1 / 3)  # one day is too few
        np.testing.assert_allclose(got.iloc[4], [4 / 9, 2 / 9, 3 / 9])
        got = long_only_weights(-returns, reach=1, window=5, min_days=2)
        np.testing.assert_allclose(got.iloc[4], 1 / 3)

    def test_return_of_a_day_counts_from_the_day_it_is_known(self):
        rng = np.random.default_rng(0)
        days = pd.bdate_range("2020-01-01", periods=120)
        returns = pd.DataFrame(rng.normal(size=(120, 3)), index=days)
        want = long_only_weights(returns, REACH, 60, 20)
        other = returns.copy()
        other.iloc[70] += 5.0
        got = long_only_weights(other, REACH, 60, 20)
        changed = (got != want).any(axis=1).to_numpy()
        assert not changed[: 70 + REACH].any() and changed[70 + REACH]


# --------------------------------------------------------- a market with a regime
def regime_of(days):
    """Which source is right on each day: the first, then the second, by turns."""
    return (np.arange(days) // 40) % 2


def toy(toy_dataset, days=300, change=None):
    """Data whose label follows x0 in one regime, x1 in the other; styles tell which."""

    def plant(data):
        rng = np.random.default_rng(3)
        regime = regime_of(days)
        stocks = len(data) // days
        x = data["feature"].to_numpy().reshape(days, stocks, -1)
        signal = np.take_along_axis(x, regime[:, None, None], axis=2)[..., 0]
        label = 0.02 * (signal + 0.5 * rng.standard_normal(signal.shape))
        data["label", "RET10"] = label.ravel()
        data.loc[data.index.get_level_values(0).unique()[-REACH:], "label"] = np.nan
        return data if change is None else change(data)

    return toy_dataset(n_days=days, n_stocks=30, change=plant)


def recorded(data, noise=0.3, names=("a", "b")):
    """Scores of sources: a sees x0, b sees x1, both with noise, on all days."""
    panel = data.panel
    rng = np.random.default_rng(5)
    frame = panel.series(
        panel.features, np.arange(len(panel.dates)), ["x0", "x1", "x2"]
    )
    frame = frame + noise * rng.standard_normal(frame.shape)
    return {n: frame[f"x{k}"] for k, n in enumerate(names)}


@pytest.fixture
def styles(monkeypatch):
    """Style returns that show the regime; toy data has no store to get them from."""
    import qlib_ext.models.composite as module

    def returns(panel):
        rng = np.random.default_rng(7)
        up = np.where(regime_of(len(panel.dates)) == 0, 1.0, -1.0)
        value = 0.01 * (up + 0.3 * rng.standard_normal(len(up)))
        return pd.DataFrame({"momentum": value}, index=panel.dates)

    monkeypatch.setattr(module, "style_returns", returns)


def composite(parts, monkeypatch, **kwargs):
    def load(name, source):
        if parts[name] is None:
            raise NoScore(f"{name} has no run")
        return parts[name]

    monkeypatch.setattr(score_average, "_recorded", load)
    sources = {k: {"experiment": "e", "recorder": k} for k in parts}
    settings = dict(label_reach=REACH, min_days=20, window=60, lr=0.02)
    return FamilyComposite(sources, **{**settings, **kwargs})


class TestComposite:
    def test_sa_weights_follow_the_planted_regime(
        self, toy_dataset, styles, monkeypatch
    ):
        data = toy(toy_dataset, days=420)
        model = composite(recorded(data), monkeypatch, weighting="sa", segment="train")
        history: dict = {}
        model.fit(data, history)
        assert history["weights"][-1]["train_mse"] < history["weights"][0]["train_mse"]
        table = model.predict_weights(data)["sa"]
        np.testing.assert_allclose(table.sum(axis=1), 1.0, rtol=1e-6)
        panel = data.panel
        regime = regime_of(len(panel.dates))[panel.days(data.segments["test"])]
        in_regime = table["a"][regime == 0].mean(), table["a"][regime == 1].mean()
        assert in_regime[0] > in_regime[1] + 0.2

    def test_long_only_finds_the_source_that_earns(
        self, toy_dataset, styles, monkeypatch
    ):
        data = toy(toy_dataset)
        parts = recorded(data)
        rng = np.random.default_rng(0)
        parts = {
            "a": parts["a"],
            "noise": parts["b"] * 0 + rng.normal(size=len(parts["b"])),
        }
        model = composite(parts, monkeypatch, weighting="long_only", segment="train")
        model.fit(data)
        table = model.predict_weights(data)["long_only"]
        assert table["a"].mean() > 0.7

    def test_both_is_the_mean_of_the_two(self, toy_dataset, styles, monkeypatch):
        data = toy(toy_dataset)
        scores = {}
        for weighting in ("sa", "long_only", "both"):
            model = composite(recorded(data), monkeypatch, weighting=weighting)
            model.fit(data)
            scores[weighting] = model.predict(data)
        want = (scores["sa"] + scores["long_only"]) / 2
        pd.testing.assert_series_equal(scores["both"], want, check_names=False)
        assert scores["both"].name == "score"
        assert set(model.predict_weights(data).columns.get_level_values(0)) == {
            "sa",
            "long_only",
        }
        by_day = scores["sa"].groupby(level=0)
        np.testing.assert_allclose(by_day.std(ddof=0), 1.0, rtol=1e-6)

    def test_scores_and_weights_ignore_the_future(
        self, toy_dataset, styles, monkeypatch
    ):
        data = toy(toy_dataset)
        model = composite(recorded(data), monkeypatch)
        model.fit(data)
        panel = data.panel
        days = panel.days(data.segments["test"])
        cut = panel.dates[days[40]]

        def perturb(frame):
            later = frame.index.get_level_values(0) > cut
            rng = np.random.default_rng(9)
            # A label is known REACH days after its day.
            known = panel.dates[days[40] - REACH]
            unknown = frame.index.get_level_values(0) > known
            frame.loc[later, "feature"] = rng.normal(size=(later.sum(), 3))
            frame.loc[unknown, "label"] = rng.normal(size=(unknown.sum(), 1))
            return frame

        other = toy(toy_dataset, change=perturb)
        want = {
            "scores": model.predict(data).loc[:cut],
            "weights": model.predict_weights(data).loc[:cut],
        }
        parts = recorded(other)
        # Past scores of the sources are what they were.
        for name, old in recorded(data).items():
            parts[name].loc[:cut] = old.loc[:cut]
        monkeypatch.setattr(score_average, "_recorded", lambda name, _: parts[name])
        pd.testing.assert_series_equal(model.predict(other).loc[:cut], want["scores"])
        got = model.predict_weights(other)
        pd.testing.assert_frame_equal(got.loc[:cut], want["weights"])
        tail = model.predict_weights(data).loc[cut:, "long_only"]
        assert not np.allclose(got.loc[cut:, "long_only"], tail)  # it does see the past

    def test_weights_of_a_day_do_not_depend_on_the_segment_asked_for(
        self, toy_dataset, styles, monkeypatch
    ):
        data = toy(toy_dataset)
        model = composite(recorded(data), monkeypatch)
        model.fit(data)
        test = model.predict_weights(data)
        late = model.predict_weights(data, (test.index[30], test.index[50]))
        pd.testing.assert_frame_equal(late, test.iloc[30:51])
        longer = model.predict_weights(data, (data.panel.dates[5], test.index[-1]))
        pd.testing.assert_frame_equal(longer.loc[test.index], test)

    def test_absent_family_by_the_named_rule(self, toy_dataset, styles, monkeypatch):
        data = toy(toy_dataset)
        parts = {**recorded(data), "gone": None}
        with pytest.raises(ValueError, match="gone has no run"):
            composite(parts, monkeypatch).fit(data)
        model = composite(parts, monkeypatch, absent="skip")
        model.fit(data)
        want = composite(recorded(data), monkeypatch)
        want.fit(data)
        got = composite(parts, monkeypatch, absent="skip")
        got.fit(data)
        pd.testing.assert_series_equal(got.predict(data), want.predict(data))
        # A family that goes away after learning leaves its weight to the others.
        three = {**recorded(data), "c": recorded(data)["a"] * -1}
        model = composite(three, monkeypatch, absent="skip")
        model.fit(data)
        del three["c"]
        three["c"] = None
        table = model.predict_weights(data)
        assert list(table["sa"]) == ["a", "b"]
        np.testing.assert_allclose(table["sa"].sum(axis=1), 1.0, rtol=1e-6)
        with pytest.raises(ValueError, match="nothing to combine"):
            composite(
                {"a": None, "b": recorded(data)["b"]}, monkeypatch, absent="skip"
            ).fit(data)

    def test_too_few_days_keep_equal_weights_and_say_so(
        self, toy_dataset, styles, monkeypatch, caplog
    ):
        data = toy(toy_dataset, days=200)
        model = composite(
            recorded(data), monkeypatch, weighting="sa", min_days=60, segment="valid"
        )
        history: dict = {}
        model.fit(data, history)
        assert history["weights"] == []
        np.testing.assert_allclose(model.predict_weights(data), 0.5)

    def test_pickled_model_gives_the_same_and_same_seed_repeats(
        self, toy_dataset, styles, monkeypatch
    ):
        data = toy(toy_dataset)
        scores = []
        for _ in range(2):
            model = composite(recorded(data), monkeypatch)
            model.fit(data)
            scores.append(model.predict(data))
        pd.testing.assert_series_equal(*scores)
        again = pickle.loads(pickle.dumps(model))
        pd.testing.assert_series_equal(again.predict(data), scores[0])

    def test_one_stock_and_stock_days_without_a_source(
        self, toy_dataset, styles, monkeypatch
    ):
        data = toy(toy_dataset)
        parts = recorded(data)
        test = data.panel.dates[data.panel.days(data.segments["test"])]
        lonely = (test[3], data.panel.instruments[0])
        keep = parts["b"].index.get_level_values(0) != test[3]
        b = parts["b"][keep]
        model = composite({"a": parts["a"], "b": b}, monkeypatch)
        model.fit(data)
        assert np.isfinite(model.predict(data)[lonely])
        strict = composite({"a": parts["a"], "b": b}, monkeypatch, missing="drop")
        strict.fit(data)
        assert lonely not in strict.predict(data).index

    def test_needs_styles_or_says_so(self, toy_dataset, monkeypatch):
        def no_risk(data):
            return data.drop(columns="risk", level=0)

        data = toy(toy_dataset, days=200, change=no_risk)
        with pytest.raises(ValueError, match="style exposures"):
            composite(recorded(data), monkeypatch, weighting="sa").fit(data)
        model = composite(recorded(data), monkeypatch, weighting="long_only")
        model.fit(data)
        assert np.isfinite(model.predict(data)).all()

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"weighting": "best"}, "`weighting`"),
            ({"absent": "maybe"}, "`absent`"),
            ({"top": 0.0}, "`top`"),
            ({"window": 10, "min_days": 20}, "`min_days` must be at most"),
            ({"lr": "1e-3"}, "`lr` must be a number"),
            ({"label_reach": 0}, "`label_reach`"),
        ],
    )
    def test_bad_arguments_are_named(self, kwargs, message):
        sources = {"a": {"experiment": "e", "recorder": "r"}}
        with pytest.raises(ValueError, match=message):
            FamilyComposite(sources, **kwargs)
        with pytest.raises(ValueError, match="ScoreAverage for fixed"):
            FamilyComposite({"a": {**sources["a"], "weight": 2.0}})

    def test_segment_and_reach_must_be_known(self, toy_dataset, styles, monkeypatch):
        data = toy(toy_dataset, days=200)
        with pytest.raises(ValueError, match="`segment` must be one of"):
            composite(recorded(data), monkeypatch, segment="other").fit(data)
        with pytest.raises(ValueError, match="give `label_reach`"):
            composite(recorded(data), monkeypatch, label_reach=None).fit(data)
        with pytest.raises(ValueError, match="call `fit` first"):
            composite(recorded(data), monkeypatch).predict(data)
