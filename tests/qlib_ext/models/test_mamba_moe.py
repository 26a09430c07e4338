"""MambaMoE: folds, out-of-fold scores, gate, fusion, resume."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from qlib_ext.metrics import rank_ic
from qlib_ext.models import MambaMoE, mamba_moe
from qlib_ext.models.mamba_moe import fold_days, load_balance, market_state

TINY = {
    "d_model": 8,
    "num_layers": 1,
    "d_state": 4,
    "step_len": 4,
    "chunk": 10,
    "n_epochs": 1,
    "graphs": ["industry"],
    "GPU": -1,
    "lr": 0.01,
    "dropout": 0.0,
    "n_folds": 2,
    "purge": 3,
    "embargo": 2,
    "gate_n_epochs": 2,
    "gate_hidden_size": 4,
}
LABELS = ("RET10", "RET5")


@pytest.fixture(scope="module")
def fitted_moe(toy_dataset):
    data = toy_dataset(labels=LABELS)
    model, history = MambaMoE(**TINY), {}
    model.fit(data, evals_result=history)
    return model, data, history


class TestFolds:
    def test_folds_are_worked_by_hand(self):
        train, held = fold_days(np.arange(100, 120), 1, 4, purge=2, embargo=1)
        assert held.tolist() == [105, 106, 107, 108, 109]
        assert train.tolist() == [100, 101, 102, *range(113, 120)]

    @pytest.mark.parametrize("fold", range(4))
    def test_no_training_label_shares_a_return_with_a_held_out_one(self, fold):
        days, reach = np.arange(200), 11
        train, held = fold_days(days, fold, 4, purge=reach, embargo=5)

        def returns(day):  # days whose returns the label of `day` is made of
            return set(range(day + 2, day + reach + 1))

        seen = set().union(*(returns(d) for d in train))
        assert not seen & set().union(*(returns(d) for d in held))

    def test_every_training_day_is_held_out_once(self):
        days = np.arange(103)
        held = [fold_days(days, i, 4, 5, 5)[1] for i in range(4)]
        assert np.concatenate(held).tolist() == days.tolist()


class TestGate:
    def test_load_balance_is_one_when_even_and_e_when_collapsed(self):
        mask = torch.ones(1, 8, dtype=torch.bool)
        even = torch.zeros(1, 8, 4)
        weights = torch.eye(4).repeat(2, 1)[None]
        assert float(load_balance(even, weights, mask)) == pytest.approx(1.0)
        one = torch.zeros(1, 8, 4)
        one[..., 2] = 50.0
        weights = torch.zeros(1, 8, 4)
        weights[..., 2] = 1.0
        assert float(load_balance(one, weights, mask)) == pytest.approx(4.0)

    def test_market_state_uses_no_later_day(self, toy_dataset):
        data = toy_dataset()
        state = market_state(data.panel)
        data.panel.features[60:] = 7.0
        assert torch.equal(market_state(data.panel)[:60], state[:60])
        mean = data.panel.features[5].mean(0)
        torch.testing.assert_close(state[5, :3], mean, rtol=1e-4, atol=1e-6)

    def test_gate_scores_of_a_training_day_come_from_the_fold_without_it(
        self, toy_dataset, monkeypatch
    ):
        seen = {}
        original = mamba_moe._score

        def spy(sub, dataset, segment):
            out = original(sub, dataset, segment)
            if not isinstance(segment, str):
                seen.setdefault(sub.fold[0], []).append((sub, out[2]))
            return out

        monkeypatch.setattr(mamba_moe, "_score", spy)
        data = toy_dataset(labels=LABELS)
        MambaMoE(**TINY).fit(data)
        train = data.panel.days(data.segments["train"])
        for fold, scored in seen.items():
            for sub, days in scored:
                fitted_on = sub.training_days(data.panel, train)
                assert sub.fold[0] == fold
                assert not set(days) & set(fitted_on)
                gap = np.abs(days[:, None] - fitted_on[None]).min()
                assert gap > TINY["purge"]

    def test_no_expert_is_weighted_on_labels_it_was_fitted_to(self, toy_dataset):
        data = toy_dataset(labels=LABELS)
        train = data.panel.days(data.segments["train"])
        _, held_out = fold_days(train, 0, 2, TINY["purge"], TINY["embargo"])
        dates = data.panel.dates[held_out]

        def change(frame):
            frame = frame.copy()
            rows = frame.index.get_level_values("datetime").isin(dates)
            frame.loc[rows, "label"] = -frame.loc[rows, "label"].to_numpy() + 1.0
            return frame

        other = toy_dataset(labels=LABELS, change=change)
        models = [MambaMoE(**TINY), MambaMoE(**TINY)]
        for model, dataset in zip(models, (data, other), strict=True):
            model.fit(dataset)
        for mine, theirs in zip(*(m.experts_ for m in models), strict=True):
            same = [
                all(torch.equal(a.states_[0][k], b.states_[0][k]) for k in a.states_[0])
                for a, b in zip(mine, theirs, strict=True)
            ]
            assert same == [True, False]  # the other fold learns from these labels
        seen = [m.gate_._experts[held_out] for m in models]
        assert torch.isfinite(seen[0]).all() and torch.equal(*seen)

    @pytest.mark.parametrize("kept", [1, 2])
    def test_gate_finds_the_expert_that_is_right_in_a_state(self, toy_dataset, kept):
        # Two made-up experts; the market state says which of them is right.
        data = toy_dataset(n_days=200, n_stocks=40)
        panel = data.panel
        g = torch.Generator().manual_seed(0)
        experts = torch.randn(200, 40, 2, generator=g)
        regime = (torch.arange(200) // 10) % 2
        panel.features[..., 1] = (regime * 2.0 - 1.0)[:, None]
        truth = experts[torch.arange(200), :, regime]
        label = truth + 0.5 * torch.randn(200, 40, generator=g)
        panel.labels[..., 0] = panel.raw_labels[..., 0] = label
        model = MambaMoE(
            **{**TINY, "gate_n_epochs": 25, "gate_lr": 0.01, "gate_hidden_size": 16},
            num_experts_per_tok=kept,
        )
        gate = mamba_moe._Gate(task="alpha_raw", num_experts_per_tok=kept, **model.gate)
        gate._experts = experts
        gate.fit(data)
        out, _, days = gate.infer(data, "test", ("score", "weights"))
        right = out[0]["weights"][torch.arange(len(days)), :, regime[days]]
        assert float(right.mean()) > 0.7
        mixed = rank_ic(out[0]["score"], label[days]).mean()
        equal = rank_ic(experts[days].mean(-1), label[days]).mean()
        assert float(mixed) > float(equal) + 0.05


class TestFusion:
    def test_experts_are_saved_by_day_and_stock(self, fitted_moe):
        model, data, history = fitted_moe
        table = model.predict_experts(data)
        score = model.predict(data)
        assert table.index.equals(score.index)
        names = ["RET10_dual", "RET5_dual"]
        assert list(table) == [f"{k}_{n}" for k in ("weight", "score") for n in names]
        weights = table.filter(like="weight_")
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
        assert (weights >= 0).all(axis=None)
        assert len(history["experts"]["RET10_dual"]) == TINY["n_folds"]
        assert "train_balance" in history["gate"][0][0]

    @pytest.mark.parametrize(
        "mode", ["stream", pytest.param("windows", marks=pytest.mark.slow)]
    )
    def test_copes_with_one_stock_nan_labels_and_unknown_exposures(
        self, toy_dataset, mode
    ):
        def change(data):
            days = data.index.unique("datetime")
            data = data.copy()
            data.loc[days[10], "label"] = np.nan
            data.loc[days[100], "feature"] = np.nan  # nobody traded
            data.loc[days[102], "risk"] = np.nan
            one = (data.index.get_level_values(0) == days[101]) & (
                data.index.get_level_values(1) != "S003"
            )
            return data[~one]

        data = toy_dataset(labels=LABELS, change=change)
        model = MambaMoE(**TINY, tasks=["dual", "alpha_neutral"], mode=mode)
        model.fit(data)
        table = model.predict_experts(data)
        days = data.handler.fetch().index.unique("datetime")
        assert days[100] not in table.index.unique("datetime")
        assert len(table.loc[days[101]]) == 1
        assert np.isfinite(table).all(axis=None)
        assert np.isfinite(model.predict(data)).all()
        assert ((table.filter(like="weight_") > 0).sum(axis=1) == 2).all()

    def test_equal_weight_is_the_mean_of_the_experts(self, toy_dataset):
        data = toy_dataset(labels=LABELS)
        model = MambaMoE(**{**TINY, "fusion": "equal"})
        model.fit(data)
        table = model.predict_experts(data)
        mean = table.filter(like="score_").mean(axis=1)
        by_day = mean.groupby(level="datetime")
        z = (mean - by_day.transform("mean")) / by_day.transform("std", ddof=0)
        np.testing.assert_allclose(model.predict(data), z, atol=1e-3)
        assert (table.filter(like="weight_") == 0.5).all(axis=None)

    def test_top_one_gives_all_weight_to_one_expert(self, toy_dataset):
        data = toy_dataset(labels=LABELS)
        model = MambaMoE(**{**TINY, "num_experts_per_tok": 1})
        model.fit(data)
        weights = model.predict_experts(data).filter(like="weight_").to_numpy()
        assert set(np.unique(weights)) <= {0.0, 1.0}

    def test_risk_factor_is_the_average_of_the_sub_models(self, fitted_moe):
        model, data, _ = fitted_moe
        each = [m.predict_risk(data) for folds in model.experts_ for m in folds]
        expected = pd.concat(each, axis=1).mean(axis=1)
        np.testing.assert_allclose(model.predict_risk(data), expected, rtol=1e-6)

    def test_scores_do_not_change_when_the_future_changes(
        self, fitted_moe, toy_dataset
    ):
        model, data, _ = fitted_moe
        days = data.panel.dates

        def change(frame):
            frame = frame.copy()
            frame.loc[days[106] :] *= -3.0
            frame.loc[days[90] :, "label"] = np.nan
            return frame

        other = toy_dataset(labels=LABELS, change=change)
        for predict in (model.predict, model.predict_experts):
            before = predict(data).loc[: days[105]]
            after = predict(other).loc[: days[105]]
            assert before.equals(after)

    def test_survives_pickling(self, fitted_moe):
        model, data, _ = fitted_moe
        again = pickle.loads(pickle.dumps(model))
        pd.testing.assert_series_equal(model.predict(data), again.predict(data))

    def test_same_seed_gives_the_same_scores(self, fitted_moe, toy_dataset):
        model, data, _ = fitted_moe
        again = MambaMoE(**TINY)
        again.fit(toy_dataset(labels=LABELS))
        pd.testing.assert_series_equal(
            model.predict(data), again.predict(data), check_exact=True
        )

    def test_killed_fit_goes_on_where_it_was(
        self, fitted_moe, toy_dataset, tmp_path, monkeypatch
    ):
        model, data, _ = fitted_moe
        fitted, original = [], mamba_moe.Mamba.fit

        def fit(self, *args, **kwargs):
            if len(fitted) == 3:
                raise KeyboardInterrupt
            fitted.append(self.fold)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(mamba_moe.Mamba, "fit", fit)
        given = {**TINY, "checkpoint_dir": str(tmp_path)}
        with pytest.raises(KeyboardInterrupt):
            MambaMoE(**given).fit(toy_dataset(labels=LABELS))
        fitted.clear()
        again = MambaMoE(**given)
        again.fit(toy_dataset(labels=LABELS))
        assert len(fitted) == 1  # three of the four were read
        pd.testing.assert_series_equal(
            model.predict(data), again.predict(data), check_exact=True
        )
        assert not list(tmp_path.iterdir())

    def test_a_killed_fit_does_not_go_on_with_other_exposures(
        self, toy_dataset, tmp_path, monkeypatch
    ):
        fitted, original = [], mamba_moe.Mamba.fit

        def fit(self, *args, **kwargs):
            if len(fitted) == 1:
                raise KeyboardInterrupt
            fitted.append(self.fold)
            return original(self, *args, **kwargs)

        given = {**TINY, "checkpoint_dir": str(tmp_path)}
        with monkeypatch.context() as patch:
            patch.setattr(mamba_moe.Mamba, "fit", fit)
            with pytest.raises(KeyboardInterrupt):
                MambaMoE(**given).fit(toy_dataset(labels=LABELS))

        def change(frame):
            frame = frame.copy()
            frame[("risk", "momentum")] = -frame[("risk", "momentum")]
            return frame

        other = toy_dataset(labels=LABELS, change=change)
        resumed, fresh = MambaMoE(**given), MambaMoE(**TINY)
        for model in (resumed, fresh):
            model.fit(other)
        pd.testing.assert_series_equal(
            resumed.predict_risk(other), fresh.predict_risk(other), check_exact=True
        )

    def test_no_signal_gives_none(self, toy_dataset, daily_rank_ic):
        data = toy_dataset(n_days=200, signal=0.0, labels=LABELS)
        model = MambaMoE(**{**TINY, "n_epochs": 2})
        model.fit(data)
        ic = daily_rank_ic(model, data)
        ic = ic[torch.isfinite(ic)]
        assert abs(float(ic.mean())) < 4 * float(ic.std()) / len(ic) ** 0.5


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("fusion", "vote"),
            ("n_folds", 1),
            ("embargo", -1),
            ("tasks", ["beta"]),
            ("labels", "RET10"),
            ("labels", ["RET10", "RET10"]),
            ("tasks", ["dual", "dual"]),
            ("num_experts_per_tok", 0),
            ("penalty", -1.0),
        ],
    )
    def test_bad_argument_is_named(self, name, value):
        with pytest.raises(ValueError, match=f"`{name}`"):
            MambaMoE(**{**TINY, name: value})

    def test_more_kept_than_there_are_is_refused(self, toy_dataset):
        with pytest.raises(ValueError, match="`num_experts_per_tok`"):
            MambaMoE(num_experts_per_tok=2, **TINY).fit(toy_dataset())

    def test_more_folds_than_days_are_refused(self, toy_dataset):
        with pytest.raises(ValueError, match="`n_folds` is 500"):
            MambaMoE(**{**TINY, "n_folds": 500}).fit(toy_dataset(labels=LABELS))

    def test_unknown_label_reach_is_refused(self, toy_dataset):
        with pytest.raises(ValueError, match="`purge`"):
            MambaMoE(**{**TINY, "purge": None}).fit(toy_dataset(labels=LABELS))
