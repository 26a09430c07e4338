"""Edges against naive computations, changed futures and permuted stocks."""

import numpy as np
import pandas as pd
import pytest
import torch

from data_handlers.risk import DAILY_RETURN
from qlib_ext.dataset import Panel
from qlib_ext.graphs import (
    CorrelationGraph,
    EdgeSeries,
    FinancialGraph,
    FlowGraph,
    IndustryGraph,
    ParquetGraph,
    as_of,
    correlation_edges,
    industry_edges,
    knn_edges,
    relations,
    trailing_mean,
)
from qlib_ext.graphs import edges as edges_module

NAN = np.nan


def sets(result, day):
    """Edges of a day as a set of pairs."""
    edges, state = result
    return {tuple(p) for p in edges[state[day]].T.tolist()}


def correlated_returns(t=60, n=40, seed=0, holes=0.0):
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 6, n)
    r = rng.normal(size=(t, 6))[:, group] + 0.7 * rng.normal(size=(t, n))
    r[rng.random(r.shape) < holes] = NAN
    return r * 0.02


def tiny_panel(t=6, n=5, features=(), risk=None):
    rng = np.random.default_rng(0)
    none = torch.full((t, n, 0), NAN)
    return Panel(
        dates=pd.bdate_range("2020-01-01", periods=t),
        instruments=pd.Index([f"S{i}" for i in range(n)]),
        feature_names=list(features),
        features=torch.from_numpy(rng.normal(size=(t, n, len(features)))).float(),
        present=torch.ones(t, n, dtype=torch.bool),
        label_names=[],
        labels=none,
        raw_labels=none,
        risk_names=[] if risk is None else list(risk),
        risk=None
        if risk is None
        else torch.from_numpy(np.stack(list(risk.values()), 2)).float(),
    )


class TestHelpers:
    def test_as_of_carries_forward_no_longer_than_allowed(self):
        x = np.array([[NAN, 1, NAN, NAN, 2, NAN]]).T
        np.testing.assert_array_equal(as_of(x)[:, 0], [NAN, 1, 1, 1, 2, 2])
        np.testing.assert_array_equal(as_of(x, 1)[:, 0], [NAN, 1, 1, NAN, 2, 2])
        np.testing.assert_array_equal(
            as_of(x[..., None], 1)[:, 0, 0], as_of(x, 1)[:, 0]
        )

    def test_trailing_mean_equals_pandas(self):
        x = np.random.default_rng(0).normal(size=(30, 4))
        x[np.random.default_rng(1).random(x.shape) < 0.3] = NAN
        want = pd.DataFrame(x).rolling(7, min_periods=4).mean()
        np.testing.assert_allclose(trailing_mean(x, 7, 4), want, atol=1e-12)


class TestIndustry:
    def test_industry_edges_by_hand(self):
        code = np.array([[1, 2, 1, NAN, 2], [1, 2, 1, 1, 2], [NAN, 2, 2, 1, 2]])
        found = industry_edges(code)
        assert sets(found, 0) == {(0, 2), (1, 4)}
        assert sets(found, 1) == {(0, 2), (0, 3), (2, 3), (1, 4)}
        # a suspended stock keeps its industry; stock 2 changed
        assert sets(found, 2) == {(0, 3), (1, 2), (1, 4), (2, 4)}

    def test_industry_edges_are_stored_once_while_nothing_changes(self):
        code = np.tile([1.0, 1, 2, 2], (50, 1))
        code[30:, 0] = 2
        edges, state = industry_edges(code)
        assert len(edges) == 2
        assert state.tolist() == [0] * 30 + [1] * 20

    def test_industry_k_joins_the_nearest_in_size(self):
        size = np.array([[1.0, 2, 4, 8, 16]])
        assert sets(industry_edges(np.ones((1, 5)), size, 1), 0) == {
            (0, 1),
            (1, 2),
            (2, 3),
            (3, 4),
        }
        with pytest.raises(ValueError, match="`k` needs `size`"):
            industry_edges(np.ones((1, 5)), None, 1)


class TestCorrelation:
    @pytest.mark.parametrize("holes", [0.0, 0.1])
    def test_correlation_edges_equal_pandas(self, holes):
        r = correlated_returns(holes=holes)
        found = correlation_edges(r, window=30, threshold=0.5, min_count=15)
        some = 0
        for day in (14, 20, 35, 59):
            frame = pd.DataFrame(r[max(0, day - 29) : day + 1])
            rho = frame.corr(min_periods=15).to_numpy()
            assert not np.isclose(rho, 0.5, atol=1e-5).any()
            want = {tuple(p) for p in np.argwhere(np.triu(rho > 0.5, 1)).tolist()}
            assert sets(found, day) == want
            some += len(want)
        assert some > 50
        assert sets(found, 3) == set()  # too short a history

    def test_correlation_edges_blocks_of_rows_do_not_matter(self, monkeypatch):
        r = correlated_returns(holes=0.03)
        whole = correlation_edges(r, threshold=0.5)
        monkeypatch.setattr(edges_module, "_ROWS", 7)
        again = correlation_edges(r, threshold=0.5)
        for day in range(60):
            assert sets(whole, day) == sets(again, day)

    def test_correlation_edges_know_nothing_later(self):
        r = correlated_returns(holes=0.05)
        changed = r.copy()
        changed[40:] = np.random.default_rng(9).normal(size=changed[40:].shape)
        a, b = correlation_edges(r), correlation_edges(changed)
        assert all(sets(a, day) == sets(b, day) for day in range(40))
        assert any(sets(a, day) != sets(b, day) for day in range(40, 60))

    def test_correlation_edges_follow_the_order_of_stocks(self):
        r = correlated_returns(holes=0.05)
        order = np.random.default_rng(1).permutation(40)
        a, b = correlation_edges(r), correlation_edges(r[:, order])
        for day in (30, 59):
            back = {tuple(sorted((order[i], order[j]))) for i, j in sets(b, day)}
            assert back == sets(a, day)

    def test_correlation_first_skips_history_only(self):
        r = correlated_returns()
        a, b = correlation_edges(r), correlation_edges(r, first=25)
        assert len(b[1]) == 35
        assert all(sets(a, 25 + day) == sets(b, day) for day in range(35))

    def test_correlation_cap_keeps_the_strongest_of_each_stock(self):
        r = correlated_returns(n=20)
        rho = np.corrcoef(r[-30:].T)
        np.fill_diagonal(rho, -2)
        found = sets(correlation_edges(r, threshold=-1, max_neighbors=3), 59)
        best = np.argsort(-rho, axis=1)[:, :3]
        want = {tuple(sorted((i, int(j)))) for i in range(20) for j in best[i]}
        assert found == want

    def test_constant_and_empty_stocks_have_no_edges(self):
        r = correlated_returns(n=6)
        r[:, 0] = 0.01
        r[:, 1] = NAN
        ends = {
            i for pair in sets(correlation_edges(r, threshold=-1), 59) for i in pair
        }
        assert ends == {2, 3, 4, 5}
        assert sets(correlation_edges(np.full((40, 3), NAN)), 39) == set()

    def test_correlation_rejects_bad_numbers(self):
        with pytest.raises(ValueError, match="`window`"):
            correlation_edges(np.zeros((5, 2)), 2)
        with pytest.raises(ValueError, match="`threshold`"):
            correlation_edges(np.zeros((5, 2)), threshold=1.0)
        with pytest.raises(ValueError, match="`min_count`"):
            correlation_edges(np.zeros((5, 2)), window=10, min_count=11)


class TestNearest:
    def test_knn_edges_equal_a_naive_search(self):
        x = np.random.default_rng(0).normal(size=(3, 30, 4))
        x[0, 5] = NAN  # isolated
        x[1, 6, 0] = NAN  # counts as the mean
        found = knn_edges(x, k=3)
        for day in range(3):
            z = (x[day] - np.nanmean(x[day], 0)) / np.nanstd(x[day], 0)
            z = np.clip(np.where(np.isnan(z).all(1, keepdims=True), NAN, z), -3, 3)
            alive = ~np.isnan(z).all(1)
            z = np.where(alive[:, None], np.nan_to_num(z), NAN)
            gap = np.linalg.norm(z[:, None] - z[None], axis=2)
            np.fill_diagonal(gap, np.inf)
            gap[np.isnan(gap)] = np.inf
            want = {
                tuple(sorted((i, int(j))))
                for i in np.flatnonzero(alive)
                for j in np.argsort(gap[i])[:3]
            }
            assert sets(found, day) == want

    def test_knn_cosine_ignores_size(self):
        x = np.array([[[1.0, 1], [3, 3], [-1, -1], [-4, -4]]])
        assert sets(knn_edges(x, 1, "cosine"), 0) == {(0, 1), (2, 3)}

    def test_knn_edges_change_only_when_data_changes(self):
        x = np.repeat(np.random.default_rng(0).normal(size=(1, 30, 4)), 20, axis=0)
        x[12:, 3] += 5
        edges, state = knn_edges(x, 3)
        assert len(edges) == 2 and state.tolist() == [0] * 12 + [1] * 8

    def test_knn_of_few_or_equal_stocks(self):
        assert sets(knn_edges(np.ones((1, 1, 2))), 0) == set()
        assert sets(knn_edges(np.full((1, 4, 2), NAN)), 0) == set()
        assert sets(knn_edges(np.array([[[0.0], [1.0]]]), 10), 0) == {(0, 1)}
        ends = {i for p in sets(knn_edges(np.ones((1, 9, 2)), 2), 0) for i in p}
        assert ends == set(range(9))
        assert all(i != j for i, j in sets(knn_edges(np.ones((1, 9, 2)), 2), 0))

    def test_knn_survives_flushed_subnormals(self, tmp_path, run_process):
        # A tree over many equal zeros recursed without end in a training process.
        code = (
            "import numpy as np, torch; torch.set_flush_denormal(True)\n"
            "from qlib_ext.graphs import knn_edges\n"
            "x = np.abs(np.random.default_rng(0).normal(size=(1, 300, 3)))\n"
            "x[np.random.default_rng(1).random(x.shape) < 0.7] = 0\n"
            "x[0, 0] = -1e-9 + x[0].mean(0)\n"
            "x[0, 20:] = np.where(x[0, 20:] == 0, np.nan, x[0, 20:])\n"
            "assert knn_edges(x, 3, min_known=0.0)[0][0].shape[1] > 100"
        )
        run_process(code, tmp_path)

    def test_knn_follows_the_order_of_stocks(self):
        x = np.random.default_rng(0).normal(size=(2, 30, 4))
        order = np.random.default_rng(1).permutation(30)
        a, b = knn_edges(x, 3), knn_edges(x[:, order], 3)
        back = {tuple(sorted((order[i], order[j]))) for i, j in sets(b, 1)}
        assert back == sets(a, 1)


class TestEdgeSeries:
    def series(self, directed=False):
        dates = pd.bdate_range("2020-01-01", periods=3)
        edges = [np.array([[0, 1], [1, 3]], np.int32), np.array([[0], [2]], np.int32)]
        return EdgeSeries(
            "x", dates, pd.Index(list("abcd")), edges, np.array([0, 0, 1]), directed
        )

    def test_edges_go_both_ways_unless_directed(self):
        assert self.series().at(0).T.tolist() == [[0, 1], [1, 3], [1, 0], [3, 1]]
        assert self.series(True).at(0).T.tolist() == [[0, 1], [1, 3]]

    def test_batch_maps_stocks_and_leaves_absent_ones_out(self):
        mask = np.array([[True, True, True], [True, False, True]])
        got = self.series().batch(np.array([1, 2]), np.array([3, 1, 0]), mask)
        # day 1: 0-1 and 1-3 -> local 2-1 and 1-0; day 2: stock 2 is not in the batch
        assert sorted(got.T.tolist()) == [[0, 1], [1, 0], [1, 2], [2, 1]]
        mask[0, 0] = False
        got = self.series().batch(np.array([1, 2]), np.array([3, 1, 0]), mask)
        assert sorted(got.T.tolist()) == [[1, 2], [2, 1]]
        got = self.series().batch(np.array([0, 2]), np.arange(4), np.ones((2, 4), bool))
        assert sorted(got.T.tolist()) == [
            [0, 1],
            [1, 0],
            [1, 3],
            [3, 1],
            [4, 6],
            [6, 4],
        ]

    def test_statistics_by_hand(self):
        table = self.series().statistics()
        assert table["edges"].tolist() == [2, 2, 1]
        assert table["mean_degree"].tolist() == [1, 1, 0.5]
        assert table["max_degree"].tolist() == [2, 2, 1]
        assert table["isolated"].tolist() == [0.25, 0.25, 0.5]
        assert table["turnover"].tolist()[1:] == [0, 1]
        present = np.ones((3, 4), bool)
        present[0, 1] = False
        table = self.series().statistics(present)
        assert table["edges"].iloc[0] == 0 and table["isolated"].iloc[0] == 1


class TestGraphClasses:
    @pytest.fixture
    def store(self, monkeypatch):
        """Serve Qlib expressions from arrays {expression: [days, stocks]}."""
        served: dict = {}

        def load(expressions, dates, instruments, history=0, freq="day"):
            x = np.stack([served[e] for e in expressions], axis=2).astype(np.float32)
            h = min(history, len(x) - len(dates))
            return x[len(x) - len(dates) - h :], h

        monkeypatch.setattr(relations, "load_panel", load)
        monkeypatch.setattr(
            relations,
            "known_fields",
            lambda fields: [
                f for f in fields if f in ("close", "high", "low", "amount")
            ],
        )
        monkeypatch.setattr(
            relations, "financial_config", lambda: (["$a", "$b"], ["a", "b"])
        )
        return served

    def test_industry_graph_reads_the_risk_group(self):
        code = np.tile([1.0, 1, 2, 2, NAN], (6, 1))
        series = IndustryGraph().build(tiny_panel(risk={"industry": code}))
        assert series.at(0).T.tolist() == [[0, 1], [2, 3], [1, 0], [3, 2]]

    def test_industry_graph_without_industry_is_an_error(self, store):
        with pytest.raises(ValueError, match="nor the store has 'industry'"):
            IndustryGraph().build(tiny_panel())

    def test_correlation_graph_uses_history_before_the_panel(self, store):
        r = correlated_returns(t=40, n=5)
        store[DAILY_RETURN] = r
        series = CorrelationGraph(threshold=0.3).build(tiny_panel())
        want = correlation_edges(r, threshold=0.3)
        for day in range(6):
            got = {tuple(p) for p in series.at(day).T.tolist() if p[0] < p[1]}
            assert got == sets(want, 34 + day)

    def test_financial_graph_waits_for_the_announcement_and_the_lag(self, store):
        x = np.tile(np.random.default_rng(0).normal(size=(1, 5, 2)), (30, 1, 1))
        x[27:, 0] += 9  # announced on the panel's day 3
        store["$a"], store["$b"] = x[..., 0], x[..., 1]
        assert FinancialGraph(k=1).build(tiny_panel()).state.tolist() == [
            0,
            0,
            0,
            1,
            1,
            1,
        ]
        lagged = FinancialGraph(k=1, lag=2).build(tiny_panel())
        assert lagged.state.tolist() == [0, 0, 0, 0, 0, 1]

    def test_flow_graph_takes_panel_features_by_name(self):
        panel = tiny_panel(t=30, n=12, features=["l2_big_net", "other"])
        series = FlowGraph(["l2_big_net"], window=5, k=2).build(panel)
        x = panel.features[..., :1].numpy()
        want = knn_edges(trailing_mean(x, 5, 3).astype(np.float32), 2)
        got = {tuple(p) for p in series.at(20).T.tolist() if p[0] < p[1]}
        assert got == sets(want, 20)

    def test_flow_graph_default_stands_on_day_bars(self, store):
        for e, _ in relations.BAR_FLOW:
            store[e] = np.random.default_rng(0).normal(size=(30, 5))
        assert FlowGraph(k=1).build(tiny_panel()).edges[0].shape[1] > 0

    def test_flow_graph_takes_flow_by_order_size_where_there_is_one(
        self, store, monkeypatch
    ):
        monkeypatch.setattr(relations, "known_fields", list)
        rng = np.random.default_rng(0)
        for e in relations.ORDER_FLOW:
            store[e] = rng.normal(size=(30, 5))
        inputs = FlowGraph(window=4).inputs(tiny_panel())
        want = np.stack([store[e] for e in relations.ORDER_FLOW], 2)[-4:].mean(0)
        np.testing.assert_allclose(inputs["x"][-1], want, rtol=1e-5)

    def test_parquet_graph_holds_between_its_dates(self, tmp_path):
        days = pd.bdate_range("2020-01-01", periods=6)
        table = pd.DataFrame(
            {
                "source": ["S0", "S1", "S2", "XX", "S3"],
                "target": ["S1", "S2", "S0", "S1", "S3"],
                "start": [days[1], days[0], days[4], days[0], days[0]],
                "end": [
                    days[2],
                    pd.NaT,
                    days[5] + pd.Timedelta(days=99),
                    pd.NaT,
                    pd.NaT,
                ],
            }
        )
        table.to_parquet(tmp_path / "edges.parquet")
        series = ParquetGraph(str(tmp_path / "edges.parquet")).build(tiny_panel())
        got = [series.edges[s].T.tolist() for s in series.state]
        one, both = [[1, 2]], [[0, 1], [1, 2]]
        assert got == [one, both, both, one, [[0, 2], [1, 2]], [[0, 2], [1, 2]]]
        directed = ParquetGraph(str(tmp_path / "edges.parquet"), directed=True)
        assert directed.build(tiny_panel()).at(5).T.tolist() == [[1, 2], [2, 0]]

    def test_parquet_graph_names_what_is_wrong(self, tmp_path):
        path = tmp_path / "e.parquet"
        with pytest.raises(ValueError, match="no file"):
            ParquetGraph(str(path)).build(tiny_panel())
        pd.DataFrame({"source": ["S0"], "start": ["2020-01-01"]}).to_parquet(path)
        with pytest.raises(ValueError, match="'target'"):
            ParquetGraph(str(path)).build(tiny_panel())
        table = pd.DataFrame(
            {
                "source": "S0",
                "target": "S1",
                "start": "2020-02-01",
                "end": "2020-01-01",
            },
            index=[0],
        )
        table.to_parquet(path)
        with pytest.raises(ValueError, match="ends 2020-01-01 before"):
            ParquetGraph(str(path)).build(tiny_panel())

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: IndustryGraph(k=0), "`k`"),
            (lambda: CorrelationGraph(window=1), "`window`"),
            (lambda: CorrelationGraph(window="7"), "`window`"),
            (lambda: CorrelationGraph(threshold="0.7"), "`threshold`"),
            (lambda: CorrelationGraph(window=10, min_count=20), "`min_count`"),
            (lambda: FinancialGraph(lag=-1), "`lag`"),
            (lambda: FinancialGraph(metric="manhattan"), "`metric`"),
            (lambda: FlowGraph(min_known=2), "`min_known`"),
            (lambda: ParquetGraph(None), "`path`"),
            (lambda: FlowGraph(name=""), "`name`"),
        ],
    )
    def test_graph_arguments_are_checked(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()
