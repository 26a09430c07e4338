"""IncrementalModel: nothing is learnt before it is known, and a walk can be resumed."""

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import torch

from qlib_ext.dataset import Panel
from qlib_ext.models import IncrementalModel, MultiFactorRNN

REACH = 6  # of the toy label, as these tests have it
TINY = {
    "hidden_size": 6,
    "num_layers": 1,
    "n_factors": 1,
    "dropout": 0.2,
    "step_len": 4,
    "chunk": 8,
    "n_epochs": 2,
    "early_stop": 2,
    "GPU": -1,
}


def make(adapt, mode="stream", interval=8, seed=0, delay=False, **kwargs):
    model = {"class": "MultiFactorRNN", "kwargs": {**TINY, "mode": mode, "seed": seed}}
    return IncrementalModel(
        model, adapt, interval, reach=REACH, delay=delay, step_lr=0.01, **kwargs
    )


@pytest.fixture(scope="module")
def data(toy_dataset):
    return toy_dataset()


@pytest.fixture(scope="module")
def fitted(data):
    made = {}

    def fit(adapt, mode="stream", interval=8, delay=False):
        key = adapt, mode, interval
        if key not in made:
            made[key] = make(adapt, mode, interval, delay=delay)
            made[key].fit(data)
        return made[key]

    return fit


EVERY = [
    pytest.param("naive", "stream", 8, False, marks=pytest.mark.slow),
    ("naive", "windows", 8, False),
    pytest.param("naive", "stream", 3, True, marks=pytest.mark.slow),
    pytest.param("double_adapt", "stream", 8, False, marks=pytest.mark.slow),
    pytest.param("double_adapt", "windows", 8, False, marks=pytest.mark.slow),
    ("double_adapt", "stream", 3, True),
]


def moved(one, two):
    """Days whose scores differ."""
    differ = (one - two).abs().groupby(level="datetime").max()
    return differ.index[differ > 0]


@pytest.mark.parametrize(("adapt", "mode", "interval", "delay"), EVERY)
class TestWhatIsKnownWhen:
    def test_a_label_moves_no_score_before_it_is_known(
        self, adapt, mode, interval, delay, data, fitted, toy_dataset
    ):
        model, dates = fitted(adapt, mode, interval, delay), data.panel.dates
        before = model.predict(data)
        # Steps begin on days 66 + 8 k and 66 + 3 k, day 90 among both: the label of
        # day 83 is known when it begins, that of day 84 one day too late.
        for at, waits in ((83, REACH + 1), (84, REACH + interval)):

            def change(frame, day=dates[at]):
                frame = frame.copy()
                frame.loc[day, "label"] = -5.0 * frame.loc[day, "label"].to_numpy()
                return frame

            days = moved(before, model.predict(toy_dataset(change=change)))
            assert dates.get_loc(days[0]) - at == waits
        # `valid` ends on day 89 and chose the epoch: known from day 89 + 6 on.
        days = before.index.unique("datetime")[REACH:]
        known = model.last_labels(dates, days)
        assert (known["known"] < known.index).all()

    def test_resumed_walk_equals_the_uninterrupted_one(
        self, adapt, mode, interval, delay, data, fitted, toy_dataset
    ):
        model, dates = fitted(adapt, mode, interval, delay), data.panel.dates
        whole = model.predict(data)
        state = None
        for at in (92, 93, 101, 102, 110):

            def cut(frame, last=dates[at], unknown=dates[at - REACH + 1]):
                # what a store holds that evening: no later day, and no label of it
                frame = frame.loc[:last].copy()
                frame.loc[unknown:, "label"] = np.nan
                return frame

            evening = toy_dataset(change=cut, n_days=120)
            evening.segments["test"] = (dates[at], dates[at])
            if state is not None:
                model.take_up(state)
            score = model.predict(evening)
            state = copy.deepcopy(model.online_state())
            pd.testing.assert_series_equal(
                score, whole.loc[[dates[at]]], rtol=1e-5, atol=1e-5
            )


class TestProperties:
    def test_none_is_the_model_trained_once(self, data, fitted):
        model = fitted("none", "windows")
        alone = MultiFactorRNN(**TINY, mode="windows")
        alone.fit(data)
        pd.testing.assert_series_equal(
            model.predict(data), alone.predict(data), check_exact=True
        )

    @pytest.mark.parametrize("adapt", ["naive", "double_adapt"])
    def test_same_seed_gives_the_same_scores_and_survives_pickling(
        self, adapt, data, fitted
    ):
        first = fitted(adapt).predict(data)
        again = make(adapt)
        again.fit(data)
        pd.testing.assert_series_equal(first, again.predict(data), check_exact=True)
        kept = pickle.loads(pickle.dumps(again))
        pd.testing.assert_series_equal(first, kept.predict(data), check_exact=True)
        expected = data.prepare("test", col_set="feature").index
        assert first.index.equals(expected) and np.isfinite(first).all()

    def test_adapting_changes_scores_once_labels_are_known(self, data, fitted):
        model = fitted("naive")
        frozen = copy.deepcopy(model)
        frozen.adapt = "none"
        days = moved(model.predict(data, "valid"), frozen.predict(data, "valid"))
        # `train` ends on day 65: the first step with a label beyond it begins on 74.
        assert days[0] == data.panel.dates[74]
        before = model.predict(data, "train"), frozen.predict(data, "train")
        assert not len(moved(*before))

    def test_gradients_of_other_weights_are_those_of_a_network_that_has_them(
        self, data, fitted
    ):
        model = fitted("double_adapt")
        panel = Panel.from_dataset(data)
        network = model.rebuild_network(model.states_[0])
        days = np.arange(40, 48)
        weights = model._step(network, panel, days, torch.device("cpu"))
        network.eval()
        batch = model._batch(panel, days + 14, torch.device("cpu"))
        weights = {k: v.requires_grad_() for k, v in weights.items()}
        loss, _ = model.loss(model._outputs(network, batch, weights), batch)
        loss.backward()
        other = copy.deepcopy(network)
        other.load_state_dict({**other.state_dict(), **weights})
        loss, _ = model.loss(model._outputs(other, batch), batch)
        loss.backward()
        for name, parameter in other.network.named_parameters():
            torch.testing.assert_close(parameter.grad, weights[f"network.{name}"].grad)
        adapter = other.adapters.feature.weight.grad
        assert adapter is not None and adapter.abs().max() > 0


class TestBadInput:
    def test_interval_within_the_horizon_needs_delay(self, data):
        with pytest.raises(
            ValueError, match=r"`interval` must be above.*`delay: true`"
        ):
            make("naive", interval=REACH - 1).fit(data)

    def test_two_tasks_at_least(self, data):
        with pytest.raises(ValueError, match=r"`train` of 66 days holds 1 task"):
            make("double_adapt", interval=25).fit(data)

    def test_reach_must_be_known_and_not_shortened(self, data):
        model = make("naive")
        model.reach = None
        with pytest.raises(ValueError, match="`reach` must be given"):
            model.fit(data)
        with pytest.raises(ValueError, match="`reach` must be at least the 11"):
            model = make("naive")
            handler = type("Handler", (), {"label_reach": 11})()
            model._known_reach(handler)

    def test_models_with_a_training_of_their_own_are_refused(self):
        with pytest.raises(ValueError, match="trained as all are"):
            IncrementalModel({"class": "MambaMoE"})
        with pytest.raises(ValueError, match="`model` must be a dict"):
            IncrementalModel({"kwargs": {}})

    def test_adapters_and_blocks_do_not_mix(self):
        model = {"class": "MultiFactorRNN", "kwargs": {"block_size": 10}}
        with pytest.raises(ValueError, match="`block_size` must be 0"):
            IncrementalModel(model, "double_adapt")

    def test_walk_cannot_begin_before_the_state(self, data, fitted):
        model = copy.deepcopy(fitted("naive"))
        model.predict(data)
        model.take_up(model.online_state())
        with pytest.raises(ValueError, match="the walk goes on from"):
            model.predict(data, "valid")
