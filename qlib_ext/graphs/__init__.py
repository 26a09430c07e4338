"""Relations between stocks as point-in-time edges, one set a day."""

from qlib_ext.graphs.edges import (
    EdgeSeries,
    as_of,
    correlation_edges,
    industry_edges,
    knn_edges,
    standard_profile,
    trailing_mean,
)
from qlib_ext.graphs.relations import (
    CorrelationGraph,
    FinancialGraph,
    FlowGraph,
    Graph,
    IndustryGraph,
    ParquetGraph,
    load_columns,
    make_graphs,
)

__all__ = [
    "CorrelationGraph",
    "EdgeSeries",
    "FinancialGraph",
    "FlowGraph",
    "Graph",
    "IndustryGraph",
    "ParquetGraph",
    "as_of",
    "correlation_edges",
    "industry_edges",
    "knn_edges",
    "load_columns",
    "make_graphs",
    "standard_profile",
    "trailing_mean",
]
