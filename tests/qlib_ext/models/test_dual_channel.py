"""DualChannel on one instrument: finds what is planted and looks back only."""

import numpy as np
import pandas as pd
import pytest
import torch

from qlib_ext.models import DualChannel

BARS, DAYS = 4, 300
SMALL = {"step_len": 5, "hidden_size": 8, "n_epochs": 14, "early_stop": 6, "GPU": -1}


def with_bars(strength):
    """Add a day's bars; the last two bars' returns tell the label."""

    def change(data):
        rng = np.random.default_rng(1)
        bars = rng.normal(size=(len(data), BARS, 2)).astype(np.float32)
        for k in range(BARS):
            data["feature", f"bar_{k}_return"] = bars[:, k, 0]
            data["feature", f"bar_{k}_volume"] = bars[:, k, 1]
        known = data["label", "RET10"].notna()
        told = strength * bars[:, -2:, 0].sum(1) / 2**0.5
        noise = rng.normal(size=len(data))
        data["label", "RET10"] = np.where(known, told + noise, np.nan)
        return data

    return change


def hits(score, data):
    known = data.panel.raw_labels[data.panel.days(data.segments["test"]), 0, 0].numpy()
    told = np.isfinite(known)
    return (np.sign(score.to_numpy()[told]) == np.sign(known[told])).mean()


class TestSingleInstrument:
    @pytest.mark.parametrize(
        "target", ["sign", pytest.param("return", marks=pytest.mark.slow)]
    )
    def test_planted_bars_are_found(self, toy_dataset, target):
        data = toy_dataset(n_days=DAYS, n_stocks=1, change=with_bars(1.0))
        model = DualChannel(target=target, rnn="GRU", lr=0.01, dropout=0, **SMALL)
        model.fit(data)
        # Knowing the signal itself gives 75 %: P(sign(s + e) = sign(s)), equal sizes.
        assert hits(model.predict(data), data) > 0.62

    def test_scores_of_one_instrument_are_not_wiped_out(self, toy_dataset):
        data = toy_dataset(n_days=120, n_stocks=1, change=with_bars(1.0))
        small = {**SMALL, "n_epochs": 1}
        over_time = DualChannel(**small)
        over_time.fit(data)
        assert over_time.predict(data).std() > 0
        with pytest.raises(ValueError, match="not defined on any day"):
            DualChannel(compares="day", **small).fit(data)

    def test_day_channel_does_not_read_the_bars(self, toy_dataset):
        data = toy_dataset(n_days=120, n_stocks=1, change=with_bars(1.0))
        model = DualChannel(channels="day", **{**SMALL, "n_epochs": 1})
        model.fit(data)
        before = model.predict(data)
        bars = [n.startswith("bar_") for n in data.panel.feature_names]
        data.panel.features[..., bars] = 9.0
        pd.testing.assert_series_equal(before, model.predict(data))


class TestTime:
    def test_stream_and_windows_score_alike(self, toy_dataset):
        data = toy_dataset(n_days=120, n_stocks=2, change=with_bars(1.0))
        model = DualChannel(chunk=7, **{**SMALL, "n_epochs": 1, "n_seeds": 2})
        model.fit(data)
        stream = model.predict(data)
        model.mode = "windows"
        pd.testing.assert_series_equal(stream, model.predict(data), atol=1e-6)

    @pytest.mark.parametrize("mode", ["stream", "windows"])
    def test_the_future_changes_no_score(self, toy_dataset, mode):
        data = toy_dataset(n_days=120, n_stocks=1, change=with_bars(1.0))
        model = DualChannel(mode=mode, **{**SMALL, "n_epochs": 1})
        model.fit(data)
        before = model.predict(data)
        at = len(data.panel.dates) - 10
        data.panel.features[at:] = torch.randn(
            data.panel.features[at:].shape, generator=torch.Generator().manual_seed(0)
        )
        after = model.predict(data)
        early = before.index.get_level_values(0) < data.panel.dates[at]
        pd.testing.assert_series_equal(before[early], after[early], check_exact=True)
        assert not np.allclose(before[~early], after[~early])

    def test_what_is_older_than_the_window_is_forgotten(self, toy_dataset):
        data = toy_dataset(n_days=120, n_stocks=1, change=with_bars(1.0))
        model = DualChannel(**{**SMALL, "n_epochs": 1})
        model.fit(data)
        last = model.predict(data).iloc[-1]
        data.panel.features[: -model.step_len] = 5.0
        assert model.predict(data).iloc[-1] == pytest.approx(last, abs=1e-6)


class TestBadInput:
    def test_bars_that_are_missing_or_unlike_are_named(self, toy_dataset):
        with pytest.raises(ValueError, match="channels: day"):
            DualChannel(**SMALL).fit(toy_dataset(n_days=120, n_stocks=1))

        def unlike(data):
            return with_bars(1.0)(data).drop(columns=[("feature", "bar_2_volume")])

        with pytest.raises(ValueError, match="same features"):
            DualChannel(**SMALL).fit(toy_dataset(n_days=120, n_stocks=1, change=unlike))

        def gap(data):
            data = with_bars(1.0)(data)
            both = [("feature", f"bar_2_{w}") for w in ("return", "volume")]
            return data.drop(columns=both)

        with pytest.raises(ValueError, match="numbered from 0"):
            DualChannel(**SMALL).fit(toy_dataset(n_days=120, n_stocks=1, change=gap))

    def test_validation_without_labels_says_so(self, toy_dataset):
        def flat(data):
            data = with_bars(1.0)(data)
            days = data.index.unique("datetime")
            data.loc[days[66:90], ("label", "RET10")] = 0.5
            return data

        data = toy_dataset(n_days=120, n_stocks=1, change=flat)
        with pytest.raises(ValueError, match="for any instrument"):
            DualChannel(**SMALL).fit(data)
