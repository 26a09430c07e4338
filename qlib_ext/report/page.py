"""One self-contained HTML file: tables and Plotly figures, no address outside it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from plotly.offline import get_plotlyjs

__all__ = ["Page", "caption", "format_value", "slug", "text_table", "title_of"]

# How a column is headed and printed: p percent, n number, i integer, s text, v text of
# figures (right, unbroken).
COLUMNS: dict[str, tuple[str, str]] = {
    "dates": ("dates", "i"),
    "days": ("days", "i"),
    "stocks": ("stocks a day", "i"),
    "rank_ic": ("RankIC", "p2"),
    "std": ("std", "p2"),
    "ic_ir": ("IC_IR", "n2"),
    "positive": ("RankIC > 0", "p0"),
    "daily_rank_ic": ("daily RankIC", "p2"),
    "hac_error": ("HAC error", "p2"),
    "oracle_rank_ic": ("oracle RankIC", "p2"),
    "annual_return": ("annual return", "p1"),
    "annual_mean": ("mean x 252", "p1"),
    "annual_volatility": ("volatility", "p1"),
    "sharpe": ("Sharpe", "n2"),
    "max_drawdown": ("max drawdown", "p1"),
    "turnover": ("weekly turnover", "p1"),
    "blocked": ("blocked weight", "p2"),
    "hedged_top": ("top hedged", "p1"),
    "hedged_top_sharpe": ("its Sharpe", "n2"),
    "hedged_bottom": ("bottom hedged", "p1"),
    "pool": ("pool", "p1"),
    "hedged_top_drawdown": ("its drawdown", "p1"),
    "groups": ("layers", "i"),
    "own_rank_ic": ("factor's RankIC", "p2"),
    "own_ic_ir": ("factor's IC_IR", "n2"),
    "correlation": ("correlation with score", "n2"),
    "lowest": ("lowest start", "p2"),
    "highest": ("highest start", "p2"),
    "closeness": ("e^(-RankMAE)", "n3"),
    "pool_share": ("share of pool", "p1"),
}


@dataclass
class _Section:
    title: str
    text: str = ""
    items: list[dict[str, Any]] = field(default_factory=list)


class Page:
    """Collects sections and renders them.

    Parameters
    ----------
    title, lead : str
        Heading, and the sentence below it.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self.lead = lead
        self.warnings: list[str] = []
        self.tiles: list[dict[str, str]] = []
        self.tiles_note = ""
        self._sections: list[_Section] = []
        self._figures: dict[str, go.Figure] = {}

    def warn(self, text: str) -> None:
        """Show a remark at the top that the reader must not miss."""
        self.warnings.append(text)

    def tile(self, name: str, value: float, style: str = "p2") -> None:
        """Add a headline figure."""
        self.tiles.append({"name": name, "value": format_value(value, style)})

    def section(self, title: str, text: str = "") -> None:
        """Start a section; what follows belongs to it."""
        self._sections.append(_Section(title, text))

    def table(
        self,
        title: str,
        frame: pd.DataFrame,
        note: str = "",
        *,
        wide: bool = False,
        styles: Mapping[str, tuple[str, str]] | None = None,
        default_style: str = "n2",
    ) -> None:
        """Add a frame, its index as row names.

        Parameters
        ----------
        title, note : str
            Above and below the table.
        frame : DataFrame
        wide : bool
            Take the page's whole width.
        styles : mapping, optional
            Column to (heading, style), beside `COLUMNS`.
        default_style : str
            For columns named nowhere.
        """
        known = {**COLUMNS, **(styles or {})}
        head = [{"value": str(frame.index.name or ""), "text": False}]
        kinds = []
        for column in frame.columns:
            heading, style = known.get(column, (str(column), default_style))
            head.append({"value": heading, "text": style == "s"})
            kinds.append(style)
        rows = [
            [{"value": title_of(name), "text": True}]
            + [
                {"value": format_value(value, style), "text": style == "s"}
                for value, style in zip(values, kinds, strict=True)
            ]
            for name, values in zip(
                frame.index, frame.itertuples(index=False, name=None), strict=True
            )
        ]
        many = len(head) > 5 or kinds.count("s") > 1
        self._add(
            {
                "title": title,
                "head": head,
                "rows": rows,
                "many": many,
                "note": note,
                "wide": wide,
            }
        )

    def plot(
        self, title: str, figure: go.Figure, note: str = "", *, wide: bool = False
    ) -> None:
        """Add a figure with its conditions below it."""
        name = f"plot{len(self._figures) + 1}"
        self._figures[name] = figure
        self._add(
            {
                "title": title,
                "plot": True,
                "id": name,
                "height": int(figure.layout.height or 360),
                "note": note,
                "wide": wide,
            }
        )

    def _add(self, item: dict[str, Any]) -> None:
        if not self._sections:
            raise ValueError("`section` must be called before a table or plot.")
        self._sections[-1].items.append(item)

    def render(self, footer: str = "") -> str:
        """Return the HTML text."""
        figures = ",".join(
            f'"{name}":{figure.to_json()}' for name, figure in self._figures.items()
        )
        return _template().render(
            title=self.title,
            lead=self.lead,
            warnings=self.warnings,
            tiles=self.tiles,
            tiles_note=self.tiles_note,
            sections=self._sections,
            # Within a script element only "</" could end it; "<" as an escape is the
            # same JSON.
            figures="{" + figures.replace("<", "\\u003c") + "}",
            plotly_js=get_plotlyjs(),
            footer=footer,
        )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("qlib_ext.report"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("page.html.j2")


def caption(*parts: str) -> str:
    """One sentence for the foot of a table or plot."""
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def title_of(name: object) -> str:
    """Row name as printed: layer_03 becomes layer 3, hedged_top hedged top."""
    text = str(name)
    head, _, number = text.rpartition("_")
    if head == "layer" and number.isdigit():
        return f"layer {int(number)}"
    # Other names may be a user's own and stay as they are.
    if text in ("hedged_top", "hedged_bottom", "top_minus_bottom"):
        return text.replace("_", " ")
    return text


def format_value(value: object, style: str) -> str:
    """Print a value: p2 percent with two digits, n2 number, i integer, s or v text."""
    if value is None:
        return "–"
    if style in "sv" or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "–"
    if style == "i":
        return f"{value:,.0f}"
    digits = int(style[1:])
    shown = 100 * value if style[0] == "p" else value
    # Adding 0.0 prints what rounds to zero as 0.00, not -0.00.
    text = f"{round(shown, digits) + 0.0:,.{digits}f}"
    return f"{text} %" if style[0] == "p" else text


def text_table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """Lay out rows for a terminal; the first column left, the others right."""
    table = [list(head), *[list(row) for row in rows]]
    width = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width[i]) if i == 0 else cell.rjust(width[i])
            for i, cell in enumerate(row)
        ).rstrip()
        for row in table
    ]
    lines.insert(1, "  ".join("-" * w for w in width))
    return "\n".join(lines)


def slug(name: str) -> str:
    """Part of a file name: what is no letter, digit, dot or dash becomes a dash."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "experiment"
