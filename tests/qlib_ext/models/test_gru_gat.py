"""GRUGAT: what graphs, style weights and indicators add, planted and measured."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from qlib.data.dataset.handler import DataHandlerLP
from qlib.data.dataset.loader import StaticDataLoader

from qlib_ext import graphs as graph_module
from qlib_ext.dataset import PanelDataset
from qlib_ext.models import GRUGAT, MultiFactorRNN, styles
from qlib_ext.models import gru_gat as module
from qlib_ext.models.styles import style_state

T, N = 260, 48
SIDE = np.where(np.arange(N) // 12 % 2, 1.0, -1.0)  # exposures, balanced by industry
FLOW = {"class": "FlowGraph", "kwargs": {"fields": ["g0", "g1"], "window": 1, "k": 3}}
SMALL = dict(
    hidden_size=8,
    num_layers=1,
    dropout=0.0,
    step_len=4,
    chunk=8,
    n_epochs=4,
    early_stop=4,
    lr=0.04,
    heads=1,
    GPU=-1,
)


def planted(make_label, seed=0, returns=None):
    """Dataset of two features, places g0 g1 that make the flow graph, and a risk group.

    `make_label(x, industry_mean, flow_mean, rng)` gives the label [t, n].
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(T, N))
    industry = np.arange(N) % 12
    place = rng.normal(size=(N, 2)) * 3
    by_industry = (industry[:, None] == industry) & ~np.eye(N, dtype=bool)
    gap = np.linalg.norm(place[:, None] - place[None], axis=2)
    np.fill_diagonal(gap, np.inf)
    close = np.zeros((N, N), bool)
    close[np.arange(N)[:, None], np.argsort(gap, 1)[:, :3]] = True
    close |= close.T

    def mean(adjacency):
        return x @ (adjacency / adjacency.sum(1, keepdims=True)).T

    label = make_label(x, mean(by_industry), mean(close), rng)
    columns = {
        ("feature", "x"): x,
        ("feature", "g0"): np.tile(place[:, 0], (T, 1)),
        ("feature", "g1"): np.tile(place[:, 1], (T, 1)),
        ("label", "RET10"): label,
        ("risk", "industry"): np.tile(industry, (T, 1)),
        ("risk", "momentum"): np.tile(SIDE, (T, 1)),
    }
    index = pd.MultiIndex.from_product(
        [pd.bdate_range("2020-01-01", periods=T), [f"S{i:02d}" for i in range(N)]],
        names=["datetime", "instrument"],
    )
    data = pd.DataFrame({k: v.ravel() for k, v in columns.items()}, index=index)
    dates = index.levels[0]
    segments = {
        "train": (dates[0], dates[159]),
        "valid": (dates[160], dates[199]),
        "test": (dates[200], dates[-1]),
    }
    handler = DataHandlerLP(data_loader=StaticDataLoader(data))
    return PanelDataset(handler, segments, purge="off")


def fitted(data, **changes):
    model = GRUGAT(**{**SMALL, **changes})
    model.fit(data)
    return model


@pytest.fixture
def style_returns(monkeypatch):
    """Set the daily style return that the model will find in the data."""

    def serve(values):
        def load(expressions, dates, instruments, history=0, freq="day"):
            # exposures are -1 and +1: the momentum return is half the gap
            return (values[:, None] * SIDE)[..., None].astype(np.float32), 0

        monkeypatch.setattr(styles, "load_panel", load)

    return serve


class TestWhatGraphsAdd:
    @pytest.mark.parametrize(
        "relation", ["industry", pytest.param("flow", marks=pytest.mark.slow)]
    )
    def test_graph_finds_a_planted_link_that_the_gru_alone_cannot(
        self, relation, daily_rank_ic
    ):
        def label(x, industry, flow, rng):
            linked = industry if relation == "industry" else flow
            return linked / linked.std() + 0.5 * rng.normal(size=x.shape)

        data = planted(label)
        graph = "industry" if relation == "industry" else FLOW
        with_graph = fitted(data, graphs=[graph], weighting="equal")
        without = fitted(data, graphs=[])
        assert daily_rank_ic(with_graph, data).nanmean() > 0.5
        assert abs(daily_rank_ic(without, data).nanmean()) < 0.1

    def test_learned_weights_move_to_the_relation_that_matters(self):
        data = planted(
            lambda x, i, f, rng: f / f.std() + 0.3 * rng.normal(size=x.shape)
        )
        model = fitted(data, graphs=["industry", FLOW], weighting="learned")
        weights = model.predict_weights(data)["weight"]
        assert (weights["flow"] > 0.6).all()
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)

    def test_style_weights_follow_a_planted_regime(self, style_returns, daily_rank_ic):
        # Style returns swing slowly; their sign decides which graph carries the label.
        style = 0.01 * np.sign(np.sin(np.arange(T) / 12)) + 0.002 * np.cos(np.arange(T))
        style_returns(style)
        calm = style_state(style[:, None])[:, 0] > 0

        def label(x, industry, flow, rng):
            linked = np.where(
                calm[:, None], industry / industry.std(), flow / flow.std()
            )
            return linked + 0.3 * rng.normal(size=x.shape)

        data = planted(label)
        model = fitted(
            data, graphs=["industry", FLOW], weighting="sa", n_epochs=5, early_stop=5
        )
        table = model.predict_weights(data)
        weight = table["weight", "industry"]
        on = calm[200:]
        assert weight[on].mean() > 0.6 and weight[~on].mean() < 0.4
        equal = fitted(
            data, graphs=["industry", FLOW], weighting="equal", n_epochs=5, early_stop=5
        )
        assert (
            daily_rank_ic(model, data).nanmean()
            > daily_rank_ic(equal, data).nanmean() + 0.05
        )
        np.testing.assert_allclose(
            table["style_return", "momentum"], style[200:], atol=1e-6
        )

    def test_financials_add_a_planted_fundamental_alpha(self, daily_rank_ic):
        # g0 plays the indicator; the encoder must not see it, so it is not among the
        # features that vary: its information reaches the score through FIN.
        data = planted(lambda x, i, f, rng: rng.normal(size=x.shape))
        panel = data.panel
        place = panel.features[..., 1].numpy()
        signal = (place - place.mean(1, keepdims=True)) / place.std(1, keepdims=True)
        noise = np.random.default_rng(1).normal(size=signal.shape)
        panel.labels = panel.raw_labels = torch.from_numpy(
            (signal + noise)[..., None]
        ).float()
        indicator = panel.features[..., 1:2].clone()
        panel.features[..., 1:] = 0
        fin = {"calls": 0}

        def columns(p, fields, history, lag):
            fin["calls"] += 1
            values = indicator.numpy().copy()
            values[:, ::7] = np.nan  # statements missing for some
            return values, 0

        module_columns, module.load_columns = module.load_columns, columns
        try:
            model = fitted(data, graphs=[], financials=["$indicator"])
            bare = fitted(data, graphs=[])
            assert daily_rank_ic(model, data).nanmean() > 0.4
            assert abs(daily_rank_ic(bare, data).nanmean()) < 0.1
            assert fin["calls"] == 1
        finally:
            module.load_columns = module_columns

    def test_a_market_without_signal_gives_none(self, daily_rank_ic):
        data = planted(lambda x, i, f, rng: rng.normal(size=x.shape))
        daily = daily_rank_ic(
            fitted(data, graphs=["industry", FLOW], weighting="equal"), data
        )
        assert abs(daily.nanmean()) < 3 * daily.std() / len(daily) ** 0.5


class TestGRUGAT:
    def test_without_graphs_it_is_the_multi_factor_rnn(self, daily_rank_ic):
        data = planted(lambda x, i, f, rng: x + rng.normal(size=x.shape))
        small = {k: v for k, v in SMALL.items() if k != "heads"} | {"n_epochs": 2}
        one = MultiFactorRNN(**small, n_factors=3)
        two = GRUGAT(**small, heads=1, n_factors=3, graphs=[])
        for model in (one, two):
            model.fit(data)
        assert daily_rank_ic(one, data).nanmean() == pytest.approx(
            float(daily_rank_ic(two, data).nanmean()), abs=0.1
        )
        assert list(two.predict_units(data)) == list(one.predict_units(data))

    def test_weights_and_statistics_come_as_tables(self):
        data = planted(lambda x, i, f, rng: rng.normal(size=x.shape))
        model = fitted(data, graphs=["industry", FLOW], weighting="equal", n_epochs=1)
        weights = model.predict_weights(data)
        assert weights.shape == (60, 2) and (weights == 0.5).all().all()
        table = model.graph_statistics(data)
        assert set(table.columns.get_level_values(0)) == {"industry", "flow"}
        assert (table["industry", "mean_degree"] == 3).all()
        assert "train_weight_flow" in model.history_[0][0]

    def test_relations_are_rebuilt_after_pickling_and_not_stored(self):
        data = planted(lambda x, i, f, rng: x)
        model = fitted(data, graphs=["industry"], weighting="equal", n_epochs=1)
        blob = pickle.dumps(model)
        assert len(blob) < 100_000
        again = pickle.loads(blob)
        pd.testing.assert_series_equal(model.predict(data), again.predict(data))

    def test_graphs_are_built_once_a_panel(self, monkeypatch):
        data = planted(lambda x, i, f, rng: x)
        built = []
        build = graph_module.IndustryGraph.build
        monkeypatch.setattr(
            graph_module.IndustryGraph,
            "build",
            lambda self, panel: built.append(1) or build(self, panel),
        )
        model = fitted(data, graphs=["industry"], weighting="equal", n_epochs=1)
        model.predict(data)
        model.predict_weights(data)
        assert len(built) == 1

    def test_sa_without_styles_says_what_to_do(self):
        data = planted(lambda x, i, f, rng: x)
        data.panel.risk_names = ["industry", "other"]
        with pytest.raises(ValueError, match=r"needs style exposures.*'equal'"):
            fitted(data, graphs=["industry"])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"graphs": ["suppliers"]}, "'suppliers' is not known"),
            ({"graphs": "industry"}, "`graphs` must be a list"),
            ({"graphs": [{"kwargs": {}}]}, "a config with `class`"),
            ({"graphs": ["flow", "flow"]}, "different names"),
            ({"weighting": "attention"}, "`weighting`"),
            ({"heads": 3, "hidden_size": 8}, "multiple of `heads`"),
            ({"heads": 0}, "`heads`"),
            ({"financials": "yes"}, "`financials`"),
            ({"graphs": [{"class": "EdgeSeries", "kwargs": {}}]}, "EdgeSeries|Graph"),
        ],
    )
    def test_arguments_are_checked(self, changes, message):
        with pytest.raises((ValueError, TypeError), match=message):
            GRUGAT(**changes)


class TestStyleState:
    def test_style_state_by_hand(self):
        f = np.full((100, 1), 0.01)
        state = style_state(f)
        # every day is one unit: sums of w units over sqrt(w)
        np.testing.assert_allclose(
            state[99], np.minimum(np.sqrt([5, 20, 60]), 4), rtol=1e-6
        )
        assert (state[:19] == 0).all()  # too short a history for a scale

    def test_style_state_knows_nothing_later(self):
        f = np.random.default_rng(0).normal(size=(120, 3))
        changed = f.copy()
        changed[70:] *= -9
        np.testing.assert_array_equal(style_state(f)[:70], style_state(changed)[:70])

    def test_style_state_takes_unknown_as_no_news(self):
        f = np.random.default_rng(0).normal(size=(120, 2))
        f[:, 1] = np.nan
        state = style_state(f)
        assert np.isfinite(state).all() and (state[:, [1, 3, 5]] == 0).all()
