"""The tracking page: factors, portfolios and styles of a desk, up to the last day.

Every figure is computed from ``pred.pkl``, the daily scores kept beside it, an account
and the store's closes, so any Qlib recorder will do. What cannot be shown is a named
gap.

Glossary: t trading days, n stocks, h horizon in days.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from qlib_ext.report import plots
from qlib_ext.report.page import Page, caption, format_value, slug
from qlib_ext.report.tracking import SHORT, Plan, Tracking

__all__ = ["add_changes", "issue_name", "last_issue", "track_page"]

# Figures of the comparison with the last issue, and how they are printed.
_COMPARED = {
    "factor": {
        "rank_ic": "p2",
        "closeness": "n3",
        "long_short_year": "p2",
        "long_only_year": "p2",
    },
    "portfolio": {"excess_year": "p2", "tracking_error": "p2", "max_drawdown": "p2"},
    "style": {"return_year": "p2"},
}


def add_changes(out: Tracking, before: pd.DataFrame) -> None:
    """Set the figures beside those of an earlier issue.

    Parameters
    ----------
    out : Tracking
    before : DataFrame
        The earlier `Tracking.frame`.
    """
    out.before = str(before["day"].iloc[0])
    old = before.set_index(["kind", "name", "figure"])["value"]
    rows = []
    for kind, figures in _COMPARED.items():
        known = [n for k, n, _ in old.index if k == kind]
        for name in dict.fromkeys([*out.rows[kind], *known]):
            for figure, style in figures.items():
                now = out.rows[kind].get(name, {}).get(figure, np.nan)
                then = float(old.get((kind, name, figure), np.nan))
                if np.isfinite(now) or np.isfinite(then):
                    rows.append(
                        {
                            "what": name,
                            "figure": _STYLES[figure][0],
                            "before": format_value(then, style),
                            "now": format_value(float(now), style),
                            "change": format_value(float(now) - then, style),
                        }
                    )
    columns = ["what", "figure", "before", "now", "change"]
    out.changes = pd.DataFrame(rows, columns=columns).set_index("what")


# ---------------------------------------------------------------- page

_STYLES = {
    "ic": ("IC", "p2"),
    "ic_year": ("IC, this year", "p2"),
    "rank_ic": ("RankIC", "p2"),
    "rank_ic_year": ("RankIC, this year", "p2"),
    "closeness": ("e^(-RankMAE)", "n3"),
    "closeness_year": ("e^(-RankMAE), this year", "n3"),
    **{
        f"{kind}_{short}": (f"{words}, {period}", "p2")
        for kind, words in (
            ("long_short", "long-short"),
            ("long_only", "long-only"),
            ("excess", "excess"),
            ("return", "return"),
        )
        for period, short in SHORT.items()
    },
    "excess_annual": ("excess a year", "p2"),
    "tracking_error": ("tracking error", "p2"),
    "tracking_error_year": ("tracking error, this year", "p2"),
    "information_ratio": ("IR", "n2"),
    "information_ratio_year": ("IR, this year", "n2"),
    "max_drawdown": ("max drawdown", "p2"),
    "max_drawdown_year": ("max drawdown, this year", "p2"),
    "annual_mean": ("mean x 252", "p2"),
    **{name: (name, "v") for name in ("before", "now", "change")},
    "figure": ("figure", "s"),
}


def track_page(out: Tracking, plan: Plan) -> Page:
    """Lay out the page; sections without content are left out."""
    page = Page(
        f"{plan.title}, {out.day:%Y-%m-%d}",
        f"Store {Path(plan.store).name} up to {out.day:%A}, {out.day:%Y-%m-%d}. Week, "
        "month and year are those that this day lies in, up to it; returns are "
        "compounded, not annualised unless said.",
    )
    for text in out.gaps:
        page.warn(f"Gap: {text}")
    if out.rows["factor"]:
        _factor_section(page, out, plan)
    if out.rows["portfolio"]:
        _portfolio_section(page, out)
    if out.rows["style"]:
        _style_section(page, out)
    if out.changes is not None:
        page.section(
            "Since the last issue",
            f"Beside the figures of the issue of {out.before}; a dash: not in it, or "
            "not in this one.",
        )
        page.table("Changes", out.changes, wide=True, styles=_STYLES)
    return page


def _factor_section(page: Page, out: Tracking, plan: Plan) -> None:
    table = out.table("factor")
    page.section(
        "Factors",
        "Correlation of each day's scores with the raw return from the close of t+1 "
        "over the factor's own horizon, mean over all days and over this year's, as "
        "far as the returns are known.",
    )
    known = [c for c in table if str(c).startswith(("ic", "rank_ic", "closeness"))]
    page.table(
        "IC and e^(-RankMAE)",
        table[known],
        "e^(-RankMAE) is 0.315 without information.",
        wide=True,
        styles=_STYLES,
    )
    moved = [c for c in table if c not in known]
    net = ", net of industry means" if plan.neutral else ""
    page.table(
        "Excess return",
        table[moved],
        caption(
            f"top and bottom 10 % by score{net}, chosen on each {plan.rebalance}'s "
            "last day, filled at the next close, equal weight, no costs",
            "long-short: top less bottom",
            "long-only: top less the pool's equal weight",
            "fewer groups than 10 where they would hold under 5 stocks",
        ),
        wide=True,
        styles=_STYLES,
    )
    page.plot(
        "Running sum of the daily RankIC",
        plots.lines(pd.DataFrame(out.curves["rank_ic"]), "sum of RankIC"),
    )
    page.plot(
        "Long-only excess, compounded",
        plots.lines(pd.DataFrame(out.curves["long_only"]), "net value"),
    )


def _portfolio_section(page: Page, out: Tracking) -> None:
    page.section(
        "Portfolios",
        "Return of the back-tested account, after costs and price limits, less its "
        "benchmark's.",
    )
    page.table(
        "Net excess",
        out.table("portfolio"),
        caption(
            "excess a year geometric over 252 days",
            "tracking error = daily deviation x sqrt(252)",
            "IR from daily means",
            "drawdown of the compounded excess",
        ),
        wide=True,
        styles=_STYLES,
    )
    page.plot(
        "Net excess, compounded",
        plots.lines(pd.DataFrame(out.curves["excess"]), "net value"),
    )
    values = pd.DataFrame(out.curves["excess"])
    page.plot("Its drawdown", plots.drawdown_curves(values))


def _style_section(page: Page, out: Tracking) -> None:
    page.section(
        "Styles",
        "Return of one unit of each exposure, from daily regressions of stock returns "
        "on the exposures, industries and country of the day before.",
    )
    page.table("Style returns", out.table("style"), wide=True, styles=_STYLES)
    page.plot(
        "Style returns, compounded",
        plots.lines(pd.DataFrame(out.curves["style"]), "net value"),
        wide=True,
    )


def issue_name(plan: Plan) -> str:
    """Beginning of the names of a plan's files."""
    return f"track-{slug(plan.title)}"


def last_issue(folder: Path, plan: Plan, day: pd.Timestamp) -> pd.DataFrame | None:
    """Table of the newest earlier issue in a folder; None if there is none.

    Raises
    ------
    ValueError
        If it cannot be read.
    """
    head = issue_name(plan) + "-"
    found = sorted(
        p
        for p in folder.glob("*.csv")
        if p.name.startswith(head)
        and len(p.stem) == len(head) + 10
        and p.stem[len(head) :] < f"{day:%Y-%m-%d}"
    )
    if not found:
        return None
    try:
        frame = pd.read_csv(found[-1])
    except (OSError, ValueError) as error:  # ParserError is a ValueError
        raise ValueError(
            f"the last issue {found[-1]} cannot be read: {error}"
        ) from error
    if list(frame.columns) != ["day", "kind", "name", "figure", "value"] or not len(
        frame
    ):
        raise ValueError(f"the last issue {found[-1]} is no table of this command.")
    return frame
