"""The file of mined expressions, and its report on the terminal and as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from data_handlers.expression import Evaluator
from data_handlers.files import write_text
from qlib_ext.mining.evolve import Mined, Try
from qlib_ext.mining.expression import parse
from qlib_ext.mining.fitness import (
    Score,
    deflated_ratio,
    expected_best,
    p_value,
    score_values,
    sidak,
)
from qlib_ext.mining.panel import MiningPanel

__all__ = ["LEVEL", "build_result", "page_of", "text_of", "write_result"]

#: Level of significance on the holdout.
LEVEL = 0.05


def build_result(
    mined: Mined,
    provenance: Mapping[str, Any],
    holdout: MiningPanel | None = None,
    block: int = 64,
) -> dict[str, Any]:
    """Name the expressions, test the kept ones on the holdout, and add it all up.

    Parameters
    ----------
    mined : Mined
    provenance : mapping
        What the search was run on and with; becomes part of the result.
    holdout : MiningPanel, optional
        Days after the training years, seen here for the first time.
    block : int
        Stocks evaluated at once.

    Returns
    -------
    dict
        What `write_result` writes: ``expressions`` (kept, best first), ``others``
        (mined, not kept), ``search`` and ``provenance``. Plain numbers and text.
    """
    kept = [_row(f"dp_{k:03d}", t, mined) for k, t in enumerate(mined.kept, start=1)]
    names = {t.text for t in mined.kept}
    rest = [t for t in mined.pool if t.text not in names]
    others = [
        _row(f"dp_{k:03d}", t, mined) for k, t in enumerate(rest, start=len(kept) + 1)
    ]
    search: dict[str, Any] = {
        "tries": mined.tries,
        "generations": mined.generations,
        "finished": mined.finished,
        "verdicts": dict(mined.verdicts),
        "mined": len(mined.pool),
        "kept": len(kept),
        "ic_ir_variance_of_random_expressions": _plain(mined.variance),
        "ic_ir_expected_by_luck": _plain(expected_best(mined.tries, mined.variance)),
        "beat_luck_in_training": sum(
            (row["probability_beyond_luck"] or 0.0) > 1 - LEVEL for row in kept
        ),
    }
    if holdout is not None and kept:
        values = Evaluator(holdout, 0.0, block).evaluate(
            [parse(t.text) for t in mined.kept], holdout.dates
        )
        scores, _ = score_values(values, holdout.label, holdout.expected)
        for row, one, score in zip(kept, mined.kept, scores, strict=True):
            row["holdout"] = _holdout(one.score, score, len(kept))
        tested = [row["holdout"] for row in kept]
        along = [
            math.copysign(1.0, row["rank_ic"]) * row["holdout"]["rank_ic"]
            for row in kept
            if row["holdout"]["rank_ic"] is not None
        ]
        search["holdout"] = {
            "tests": len(tested),
            "level": LEVEL,
            "significant": sum(bool(t["significant"]) for t in tested),
            "same_sign": sum(a > 0 for a in along),
            "mean_rank_ic_in_direction": _plain(float(np.mean(along)))
            if along
            else None,
        }
    return {
        "expressions": kept,
        "others": others,
        "search": search,
        "provenance": dict(provenance),
    }


def _row(name: str, one: Try, mined: Mined) -> dict[str, Any]:
    return {
        "name": name,
        "expression": one.text,
        "rank_ic": _plain(one.score.rank_ic),
        "ic_ir": _plain(one.score.ic_ir),
        "dates": one.score.dates,
        "coverage": _plain(one.score.coverage),
        "probability_beyond_luck": _plain(
            deflated_ratio(one.score, mined.tries, mined.variance)
        ),
    }


def _holdout(training: Score, score: Score, tests: int) -> dict[str, Any]:
    std = score.rank_ic / score.ic_ir if score.ic_ir else math.nan
    p = p_value(score.rank_ic, std, score.dates, training.rank_ic)
    adjusted = sidak(p, tests) if math.isfinite(p) else math.nan
    return {
        "rank_ic": _plain(score.rank_ic),
        "ic_ir": _plain(score.ic_ir),
        "dates": score.dates,
        "coverage": _plain(score.coverage),
        "p": _plain(p),
        "p_sidak": _plain(adjusted),
        "significant": bool(adjusted < LEVEL),
    }


def _plain(value: float) -> float | None:
    """Six digits, or None: YAML reads its own NaN, other readers may not."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


# ------------------------------------------------------------------------- the file


def write_result(result: Mapping[str, Any], file: Path) -> None:
    """Write the YAML in one step."""
    head = (
        "# Mined by `qlib-ext mine`. `expressions` are the kept ones, best first:\n"
        "# Qlib expressions for any handler; data_handlers.families.MinedHandler\n"
        "# takes this file as its `path`.\n"
    )
    text = yaml.safe_dump(dict(result), sort_keys=False, width=100, allow_unicode=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, head + text)


# ------------------------------------------------------------------------- the report


def text_of(result: Mapping[str, Any], top: int = 12) -> str:
    """Terminal report: the best expressions and how much of it is luck."""
    from qlib_ext.report.page import format_value, text_table

    rows = []
    for row in result["expressions"][:top]:
        held = row.get("holdout") or {}
        rows.append(
            [
                row["name"],
                format_value(row["rank_ic"], "p2"),
                format_value(row["ic_ir"], "n2"),
                format_value(row["probability_beyond_luck"], "n2"),
                format_value(row["coverage"], "p0"),
                format_value(held.get("rank_ic"), "p2"),
                format_value(held.get("p_sidak"), "n3"),
                _short(row["expression"]),
            ]
        )
    head = ["name", "RankIC", "IC_IR", "P(not luck)", "coverage", "holdout", "p Šidák"]
    lines = [text_table(rows, [*head, "expression"])] if rows else []
    more = len(result["expressions"]) - len(rows)
    if more > 0:
        lines.append(f"… and {more} more in the file")
    return "\n".join([*lines, "", *_sentences(result)])


def page_of(result: Mapping[str, Any]) -> Any:
    """HTML report as a `qlib_ext.report.page.Page`."""
    import plotly.graph_objects as go

    from qlib_ext.report.page import Page

    about, search = result["provenance"], result["search"]
    page = Page(
        "Mined factors",
        f"{search['kept']} kept of {search['mined']} mined in {search['tries']:,} "
        f"tries, training {about.get('train', '?')}.",
    )
    held = search.get("holdout")
    if held is None:
        page.warn("No holdout was given: nothing here says what is luck.")
    elif not held["significant"]:
        page.warn(
            "No expression is significant on the holdout: the training figures may be "
            "luck altogether."
        )
    page.tile("tries", search["tries"], "i")
    page.tile("kept", search["kept"], "i")
    if held:
        page.tile("significant on the holdout", held["significant"], "i")
        page.tile(
            "mean holdout RankIC in training's direction",
            held["mean_rank_ic_in_direction"],
        )
    page.section("How much is luck", " ".join(_sentences(result)))
    rows = result["expressions"]
    if held:
        figure = go.Figure(
            go.Scatter(
                x=[100 * r["rank_ic"] for r in rows],
                y=[100 * (r["holdout"]["rank_ic"] or 0.0) for r in rows],
                text=[f"{r['name']}: {r['expression']}" for r in rows],
                mode="markers",
            )
        )
        figure.update_layout(
            xaxis_title="RankIC in training, %", yaxis_title="RankIC on the holdout, %"
        )
        page.plot(
            "Training against holdout",
            figure,
            "One point an expression. Skill lies along the diagonal, luck along the "
            "horizontal axis.",
        )
    verdicts = pd.DataFrame(
        {"tries": list(search["verdicts"].values())}, index=list(search["verdicts"])
    )
    page.table(
        "Tries by verdict",
        verdicts,
        "weak: |t| of RankIC on a fifth of the stocks too small; coverage: too few "
        "values; constant: no variation; infinite: a value, or what a "
        "regression saw, was infinite.",
        styles={"tries": ("tries", "i")},
    )
    page.section("Expressions")
    page.table(
        "Kept",
        _frame(rows, bool(held)),
        "P(not luck): probability that the information ratio exceeds the best of all "
        "tries without skill (deflated ratio). p: one-sided t-test on the holdout, "
        "Šidák's correction for the number tested. RankIC on dates whose returns do "
        "not overlap.",
        wide=True,
        styles=_STYLES,
    )
    if result["others"]:
        page.table(
            "Mined, not kept",
            _frame(result["others"], False),
            wide=True,
            styles=_STYLES,
        )
    page.section("Provenance")
    page.table(
        "",
        pd.DataFrame({"value": [str(v) for v in about.values()]}, index=list(about)),
        styles={"value": ("value", "s")},
    )
    return page


_STYLES = {
    "rank_ic": ("RankIC", "p2"),
    "ic_ir": ("IC_IR", "n2"),
    "luck": ("P(not luck)", "n2"),
    "coverage": ("coverage", "p0"),
    "h_rank_ic": ("holdout RankIC", "p2"),
    "h_ic_ir": ("holdout IC_IR", "n2"),
    "p": ("p", "n3"),
    "p_sidak": ("p Šidák", "n3"),
    "expression": ("expression", "s"),
}


def _frame(rows: Sequence[Mapping[str, Any]], held: bool) -> pd.DataFrame:
    table = []
    for row in rows:
        line = {
            "rank_ic": row["rank_ic"],
            "ic_ir": row["ic_ir"],
            "luck": row["probability_beyond_luck"],
            "coverage": row["coverage"],
        }
        if held:
            line |= {
                "h_rank_ic": row["holdout"]["rank_ic"],
                "h_ic_ir": row["holdout"]["ic_ir"],
                "p": row["holdout"]["p"],
                "p_sidak": row["holdout"]["p_sidak"],
            }
        table.append(line | {"expression": row["expression"]})
    return pd.DataFrame(table, index=[row["name"] for row in rows])


def _sentences(result: Mapping[str, Any]) -> list[str]:
    search = result["search"]
    kept = result["expressions"]
    out = [
        f"{search['tries']:,} expressions were tried, {search['mined']} mined, "
        f"{search['kept']} kept."
    ]
    luck = search["ic_ir_expected_by_luck"]
    if kept and luck is not None:
        out.append(
            f"The best IC_IR to expect of so many tries without skill is {luck:.2f}; "
            f"{search['beat_luck_in_training']} of {len(kept)} kept exceed it with a "
            f"probability above {1 - LEVEL:.0%}."
        )
    if (held := search.get("holdout")) is not None:
        mean = held["mean_rank_ic_in_direction"]
        shown = "undefined" if mean is None else f"{100 * mean:.2f} %"
        out.append(
            f"Holdout: {held['significant']} of {held['tests']} significant "
            f"(one-sided, Šidák over {held['tests']}, {LEVEL:.0%}); "
            f"{held['same_sign']} keep training's sign; "
            f"mean RankIC in training's direction {shown}."
        )
    else:
        out.append("Without a holdout nothing tells skill from luck.")
    if not search["finished"]:
        out.append("The time ran out before the budget; run again to go on.")
    return out


def _short(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
