"""Plotly figures of the frames that `tables` makes; no figure is computed here.

Colours of text, grid and paper are left to the page, which sets them for light and
dark and changes them when the reader's device does.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

__all__ = [
    "bars",
    "drawdown_curves",
    "heatmap",
    "histogram",
    "layer_bars",
    "layer_curves",
    "lines",
    "rank_ic_series",
]

# Readable on white and on near-black, and apart for colour-blind readers.
PALETTE = (
    "#3b82f6",
    "#f97316",
    "#14b8a6",
    "#a855f7",
    "#ef4444",
    "#84a314",
    "#ec4899",
    "#78909c",
)
_SCALE = "RdYlBu_r"


def _figure(y_title: str, *, percent: bool = False, x_title: str = "") -> go.Figure:
    # In one piece: each update of a figure takes plotly several milliseconds.
    return go.Figure(
        layout={
            "template": "none",
            "height": 360,
            "margin": {"l": 56, "r": 16, "t": 16, "b": 40},
            "hovermode": "x unified",
            "legend": {"orientation": "h", "y": -0.18, "x": 0, "yanchor": "top"},
            "colorway": PALETTE,
            "bargap": 0.25,
            "xaxis": {"title": {"text": x_title or None}, "automargin": True},
            "yaxis": {
                "title": {"text": y_title, "standoff": 12},
                "tickformat": ".1%" if percent else None,
                "automargin": True,
            },
        }
    )


def rank_ic_series(rank_ic: pd.DataFrame) -> go.Figure:
    """Bars of RankIC on the sampled days and its running sum."""
    part = rank_ic[rank_ic["sampled"] & rank_ic["rank_ic"].notna()]
    figure = _figure("RankIC", percent=True)
    figure.add_bar(x=part.index, y=part["rank_ic"], name="RankIC")
    figure.add_scatter(
        x=part.index,
        y=part["rank_ic"].cumsum(),
        name="running sum (right axis)",
        yaxis="y2",
    )
    if "oracle_rank_ic" in part:
        figure.add_scatter(
            x=part.index,
            y=part["oracle_rank_ic"].cumsum(),
            name="running sum of the oracle (right axis)",
            yaxis="y2",
            line={"dash": "dot"},
        )
    figure.update_layout(
        yaxis2={
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
            "zeroline": False,
            "tickformat": ".1f",
            "automargin": True,
        },
        margin_r=44,
    )
    return figure


def bars(
    frame: pd.DataFrame,
    y_title: str,
    *,
    percent: bool = True,
    error: pd.Series | None = None,
    x_title: str = "",
) -> go.Figure:
    """Draw grouped bars, one group a row and one colour a column."""
    figure = _figure(y_title, percent=percent, x_title=x_title)
    for name, column in frame.items():
        shown = (
            {"type": "data", "array": error.to_numpy(), "color": "#78909c"}
            if error is not None
            else None
        )
        figure.add_bar(
            x=[str(x) for x in frame.index], y=column, name=str(name), error_y=shown
        )
    figure.update_xaxes(type="category")
    figure.update_layout(showlegend=frame.shape[1] > 1)
    return figure


def lines(frame: pd.DataFrame, y_title: str, *, percent: bool = False) -> go.Figure:
    """One line a column over the frame's index."""
    figure = _figure(y_title, percent=percent)
    for i, (name, column) in enumerate(frame.items()):
        # Colours come again after the last one: dashed then.
        line = {"dash": "dash"} if i >= len(PALETTE) else None
        figure.add_scatter(
            x=frame.index, y=column, name=str(name), mode="lines", line=line
        )
    # On a phone each name has a line of its own below the plot.
    figure.update_layout(height=360 + 18 * max(0, frame.shape[1] - 6))
    return figure


def layer_bars(layers: pd.DataFrame) -> go.Figure:
    """Annual return of each layer over the pool's, lowest scores at the left."""
    names = [x for x in layers.index if str(x).startswith("layer_")]
    excess = layers.loc[names, "annual_return"] - layers.at["pool", "annual_return"]
    figure = _figure("annual return over the pool", percent=True, x_title="layer")
    figure.add_bar(
        x=[str(i + 1) for i in range(len(names))],
        y=excess,
        marker_color=_shades(len(names)),
        name="over the pool",
    )
    figure.update_xaxes(type="category")
    figure.update_layout(showlegend=False)
    return figure


def layer_curves(values: pd.DataFrame) -> go.Figure:
    """Net value of the pool and of every layer, on a log axis."""
    names = [str(x) for x in values if str(x).startswith("layer_")]
    figure = _figure("net value, log scale")
    ends = {names[0]: " (lowest)", names[-1]: " (highest)"}
    for name, colour in zip(names, _shades(len(names)), strict=True):
        # The middle groups make the picture; the legend names the ends only, so that
        # it stays short on a phone.
        figure.add_scatter(
            x=values.index,
            y=values[name],
            name=f"layer {int(name[6:])}{ends.get(name, '')}",
            mode="lines",
            line={"color": colour, "width": 2.2 if name in ends else 1},
            showlegend=name in ends or len(names) <= 5,
            hoverinfo=None if name in ends or len(names) <= 5 else "skip",
        )
    figure.add_scatter(
        x=values.index,
        y=values["pool"],
        name="pool, equal weight",
        mode="lines",
        line={"color": "#78909c", "dash": "dash", "width": 2},
    )
    figure.update_yaxes(type="log", dtick="D1" if _narrow(values) else None)
    return figure


def drawdown_curves(values: pd.DataFrame) -> go.Figure:
    """Fall of each compounded curve from its own peak."""
    figure = _figure("drawdown", percent=True)
    for name, column in values.items():
        figure.add_scatter(
            x=values.index,
            y=column / column.cummax() - 1,
            name=str(name),
            mode="lines",
            fill="tozeroy",
            line={"width": 1},
        )
    return figure


def histogram(series: pd.Series, x_title: str, *, percent: bool = False) -> go.Figure:
    """Distribution of one figure over the units."""
    figure = _figure("units", x_title=x_title)
    figure.add_histogram(x=series.dropna(), nbinsx=24, name=x_title)
    figure.update_xaxes(tickformat=".1%" if percent else None)
    figure.update_layout(showlegend=False, bargap=0.05)
    return figure


def heatmap(frame: pd.DataFrame, *, show_values: bool = True) -> go.Figure:
    """Table of correlations or exposures, coloured from -1 to 1."""
    figure = _figure("")
    labels = [str(x) for x in frame.columns]
    rows = [str(x) for x in frame.index]
    values = frame.to_numpy(float)
    figure.add_heatmap(
        x=labels,
        y=rows,
        z=values,
        zmin=-1,
        zmax=1,
        colorscale="RdBu_r",
        text=np.where(np.isfinite(values), np.char.mod("%.2f", values), "")
        if show_values
        else None,
        texttemplate="%{text}" if show_values else None,
        hovertemplate="%{y}, %{x}: %{z:.3f}<extra></extra>",
        colorbar={"thickness": 10, "len": 0.9},
    )
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(type="category", tickangle=-45)
    figure.update_layout(
        hovermode="closest", height=max(360, min(720, 120 + 24 * len(rows)))
    )
    return figure


def _shades(count: int) -> list[str]:
    """Blue for the lowest layer to red for the highest, as house prices are drawn."""
    return sample_colorscale(_SCALE, [i / max(count - 1, 1) for i in range(count)])


def _narrow(values: pd.DataFrame) -> bool:
    """Whether a log axis needs ticks between the powers of ten."""
    known = values.to_numpy(float)
    known = known[np.isfinite(known) & (known > 0)]
    return bool(known.size) and known.max() / known.min() < 10
