"""Graphs, style returns and GRUGAT on the embedded market, through its Qlib store."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from qlib.data import D
from qlib.workflow import R

from data_handlers.day import DayHandler
from data_handlers.expression.loading import load_panel
from qlib_ext.dataset import PanelDataset
from qlib_ext.graphs import CorrelationGraph, FinancialGraph, FlowGraph, IndustryGraph
from qlib_ext.models import GRUGAT
from qlib_ext.record_temp import GraphRecord, RiskRecord

GRAPHS = [
    IndustryGraph(),
    CorrelationGraph(threshold=0.4),
    FinancialGraph(k=3),
    FlowGraph(k=3),
]


@pytest.fixture(scope="module")
def graph_dataset(qlib_market):
    handler = DayHandler(
        start_time="2019-01-01",
        end_time="2020-12-31",
        fit_start_time="2019-01-01",
        fit_end_time="2019-12-15",
    )
    segments = {
        "train": ("2019-09-02", "2019-12-10"),
        "valid": ("2020-01-02", "2020-05-15"),
        "test": ("2020-06-03", "2020-12-31"),
    }
    return PanelDataset(handler, segments)


@pytest.fixture(scope="module")
def graph_model(graph_dataset):
    model = GRUGAT(
        graphs=GRAPHS,
        financials=True,
        hidden_size=8,
        num_layers=1,
        step_len=5,
        n_epochs=1,
        heads=2,
        GPU=-1,
    )
    model.fit(graph_dataset)
    return model


def test_load_panel_agrees_with_qlib(graph_dataset):
    panel = graph_dataset.panel
    dates = panel.dates[100:110]
    values, history = load_panel(["$close"], dates, panel.instruments, history=4)
    assert history == 4 and values.shape == (14, len(panel.instruments), 1)
    want = D.features(list(panel.instruments), ["$close"], panel.dates[96], dates[-1])
    wide = want["$close"].unstack("instrument").reindex(columns=panel.instruments)
    np.testing.assert_array_equal(values[..., 0], wide)
    _, history = load_panel(["$close"], panel.dates[:1], panel.instruments, 10**6)
    calendar = D.calendar()
    assert history == list(calendar).index(panel.dates[0])


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: g.name)
def test_edges_of_a_day_need_no_later_day(graph_dataset, graph):
    panel = graph_dataset.panel

    def part(end):
        days = slice(200, end)
        return replace(
            panel,
            dates=panel.dates[days],
            features=panel.features[days],
            present=panel.present[days],
            risk=panel.risk[days],
        )

    one, two = graph.build(part(240)), graph.build(part(300))
    assert any(e.shape[1] for e in one.edges)
    for day in range(40):
        np.testing.assert_array_equal(one.at(day), two.at(day))


def test_estimated_style_returns_follow_the_markets_own(graph_model, qlib_market):
    found = graph_model._relations.style_returns
    true = pd.read_parquet(qlib_market / "tables" / "style_returns.parquet")
    true = true.set_index("datetime").reindex(found.index)
    for style in ("size", "momentum", "volatility", "liquidity"):
        both = pd.concat([found[style], true[style]], axis=1).dropna()
        # 100 stocks: the regression's noise is about as large as the factor itself.
        assert both.corr().iloc[0, 1] > 0.2, style


def test_scores_cover_the_segment_and_units_are_named(graph_model, graph_dataset):
    score = graph_model.predict(graph_dataset)
    assert np.isfinite(score).all()
    assert score.index.get_level_values(0).max() == pd.Timestamp("2020-12-31")
    assert list(graph_model.predict_units(graph_dataset)) == ["unit_00"]


def test_graph_record_keeps_weights_statistics_and_a_page(graph_model, graph_dataset):
    with R.start(experiment_name="graphs"):
        recorder = R.get_recorder()
        record = GraphRecord(recorder, model=graph_model, dataset=graph_dataset)
        record.generate()
        record.check()
        folder = recorder.get_local_dir()
    figures = recorder.list_metrics()
    assert {"industry_isolated", "flow_turnover", "weight_financial"} <= set(figures)
    weights = pd.read_parquet(f"{folder}/artifacts/graph/weights.parquet")
    np.testing.assert_allclose(weights.filter(like="weight/").sum(axis=1), 1, atol=1e-5)
    assert "style_return/size" in weights
    page = open(f"{folder}/artifacts/graph/report.html").read()
    assert "Weights of the relations" in page and "Style returns" in page
    with pytest.raises(ValueError, match="`model`"):
        GraphRecord(recorder, model=object(), dataset=graph_dataset)


def test_risk_record_keeps_factor_returns_and_coverage(graph_dataset, graph_model):
    with R.start(experiment_name="risk"):
        recorder = R.get_recorder()
        record = RiskRecord(recorder, dataset=graph_dataset)
        record.generate()
        record.check()
        folder = recorder.get_local_dir()
    table = pd.read_parquet(f"{folder}/artifacts/risk/factor_returns.parquet")
    same = graph_model._relations.style_returns
    np.testing.assert_allclose(table[list(same)], same, atol=1e-6)
    # Adjusted: of a day that nothing explains it may lie below 0.
    assert {"country", "r2"} <= set(table) and table["r2"].max() < 1
    assert 0 < table["r2"].mean()
    coverage = pd.read_parquet(f"{folder}/artifacts/risk/coverage.parquet")
    assert coverage.loc[2020, "industry"] == 1
