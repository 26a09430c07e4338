"""Checks of what data are made of: files outside the store, codes, price levels.

Copies that part at a day show what is computed with the future. What was computed
before it came into the store or a file cannot show there; these look at its traces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from qlib_ext.audit.files import period_dated
from qlib_ext.audit.stores import adjusted_forward
from qlib_ext.audit.subject import Subject, are_few, groups_of, in_order, tensor_of
from qlib_ext.audit.verdict import Verdict
from qlib_ext.ingest.store import read_bars, read_instruments
from qlib_ext.metrics import newey_west_se, rank_ic

__all__ = ["check_reaction", "foresight", "history", "over_time", "sources"]

# Mean RankIC of one column above which it is no factor; known ones have up to .1. The
# same for one instrument over time, where 5 standard errors of .15 besides ask for
# 1,100 periods. Simulated markets have signals planted on purpose: one of strength .35
# is spread over the columns of a day, of which the best one ranks .21.
FORESIGHT, SIMULATED = 0.15, 0.25
FORESIGHT_T = 5.0
STOCK_YEARS = 150.0  # within which one of the stocks has changed its industry
_INDUSTRY = ("industry", "ind", "sector", "sw_l1", "industry_code")


def sources(subject: Subject) -> Verdict:
    """Everything read outside the store can be cut at a day, or is named."""
    subject.scores("full")  # data, training and prediction have been traced
    rows, wrong, notes = [], [], []
    every = subject.frames("full").values()
    begin = min(x.index.get_level_values("datetime").min() for x in every)
    for path, file in sorted(subject.files.outside.items()):
        problem = "" if file.config else file.problem
        if not problem and not file.config and subject.embedded:
            if not file.codes() & set(subject.stores.stocks):
                problem = (
                    "it knows no stock of the simulated market: audit on your own "
                    "store (--data own)"
                )
        rows.append(
            {
                "file": str(path),
                "cut": problem or ("settings, not data" if file.config else "by date"),
            }
        )
        known = None if problem or file.config else file.known()
        if known is not None and known.max() < begin:
            problem = (
                "all its rows are dated before the data, so it holds one state for all "
                "days, perhaps of today; when it was known cannot be told"
            )
            rows[-1]["cut"] = problem
        if problem:
            wrong.append(f"{path}: {problem}")
        elif file.config:
            notes.append(f"{path.name} is taken for settings")
        else:
            notes.append(
                f"{path.name} was cut by its dates; how its earlier rows were made "
                "cannot be seen"
            )
    for path in sorted(subject.files.store):
        if path.suffix == ".parquet" and path.parent.name == "tables":
            problem = _undated(subject, path)
            if problem:
                wrong.append(f"{path.name}: {problem}")
    # Copies are handed out to readers that look a file up by name.
    for kind in ("cut", "noise"):
        if subject.files.outside:
            subject.scores(kind)
    wrong += [
        f"{path}: a reader could not be given the copy that was cut"
        for path in sorted(subject.files.escaped)
    ]
    wrong += [f"data came from {host}" for host in sorted(subject.files.hosts)]
    wrong += [
        f"the record {name}, which is not run and may change the scores (if it only "
        "reports, audit a copy of the workflow without it)"
        for name in _foreign_records(subject.task)
    ]
    table = pd.DataFrame(rows).set_index("file") if rows else None
    styles = {"cut": ("cut", "s")}
    if wrong:
        verdict = Verdict.error(
            RuntimeError("the audit cannot vouch for " + "; ".join(wrong))
        )
        verdict.table, verdict.styles, verdict.notes = table, styles, notes
        return verdict
    if not rows:
        return Verdict.passed("nothing is read but the store")
    text = f"{len(rows)} file(s) outside the store, all cut by date or settings"
    return Verdict.passed(text, table, notes, styles)


def _foreign_records(task: Mapping[str, Any]) -> list[str]:
    """Name the records that are neither Qlib's nor ours."""
    records = task.get("record") or []
    found = []
    for record in records if isinstance(records, list) else [records]:
        module = str(record.get("module_path") or "qlib")
        if module.split(".")[0] not in ("qlib", "qlib_ext"):
            found.append(f"{module}.{record.get('class')}")
    return found


def _undated(subject: Subject, path) -> str:
    """Say why a table of the store cannot be cut by when it was known."""
    from qlib_ext.audit.stores import known_date

    frame = pd.read_parquet(path)
    frame = frame.reset_index() if frame.index.names != [None] else frame
    known = known_date(frame)
    if known is None:
        return "its rows have no dates, so when they were known cannot be told"
    if period_dated(known):
        return (
            "its rows are dated by period ends only, so when they were announced "
            "cannot be told"
        )
    return ""


def history(subject: Subject) -> Verdict:
    """Industries change and price levels are those of their day."""
    subject.scores("full")
    wrong, notes = [], []
    read = {path.name.split(".")[0] for path in subject.files.store}
    spans = read_instruments(subject.source)
    stocks = sorted(set(spans["instrument"]))
    bars = read_bars(subject.source, stocks)
    years = bars["close"].notna().sum() / 245.0
    for name in _INDUSTRY:
        if name not in bars:
            continue
        codes = bars.dropna(subset=[name]).groupby("instrument")[name].nunique()
        changed = int((codes > 1).sum())
        text = f"{changed} of {len(codes)} stocks change their `${name}`"
        if changed or not len(codes):
            notes.append(text)
        elif name not in read:
            notes.append(f"{text}, but it is not read")
        elif years >= STOCK_YEARS:
            wrong.append(
                f"no stock ever changes its `${name}`, in {years:,.0f} stock-years: "
                "one day's industries stand for all days"
            )
        else:
            notes.append(f"{text}, in only {years:,.0f} stock-years")
    how = adjusted_forward(bars)
    if how:
        full, other = (subject.frames(k)["raw"] for k in ("full", "rescaled"))
        moved = _moved(full, other)
        if moved:
            wrong.append(
                f"{', '.join(moved[:4])}: made of the level of adjusted prices, and "
                f"{how}: the level knows later splits and dividends. Use ratios, or a "
                "factor that begins at 1"
            )
        else:
            notes.append(f"{how}, but features are made of ratios only")
    if wrong:
        return Verdict.fail("; ".join(wrong), None, notes)
    return Verdict.passed(
        "industries change, and no feature is made of a price level that knows later "
        "splits" if not how else "features do not depend on the level of prices",
        None,
        notes,
    )  # fmt: skip


def _moved(one: pd.DataFrame, two: pd.DataFrame) -> list[str]:
    """Features that differ anywhere by more than rounding."""
    found = []
    for name, x, y in _pairs(one, two, one.index.intersection(two.index)):
        spread = np.nanstd(x) if np.isfinite(x).any() else 0.0
        with np.errstate(invalid="ignore"):
            far = np.abs(x - y) > 1e-3 * (spread or 1.0)
        if (far | (np.isnan(x) != np.isnan(y))).mean() > 1e-3:
            found.append(name)
    return found


def _pairs(one, two, rows):
    """Columns of features on the same rows of two frames."""
    groups = [g for g in groups_of(one) if g not in ("label", "risk")]
    for group in groups:
        a, b = (f[group] if f.columns.nlevels > 1 else f for f in (one, two))
        a, b = a.loc[rows], b.loc[rows]
        for at in range(a.shape[1]):
            if a.iloc[:, at].dtype.kind in "fiub" and b.shape[1] > at:
                yield (
                    str(a.columns[at]),
                    a.iloc[:, at].to_numpy(float),
                    b.iloc[:, at].to_numpy(float),
                )


def check_reaction(subject: Subject) -> None:
    """Make sure that features are made of the numbers that were changed.

    Raises
    ------
    RuntimeError
        If a feature with values of its own for each stock and day stays as it was
        after the day: then it comes from somewhere that was not changed. Clocks, flags
        and patterns of missing rows may stay.
    """
    full, noise = (subject.frames(k)["raw"] for k in ("full", "noise"))
    rows = full.index.intersection(noise.index)
    rows = rows[rows.get_level_values("datetime") > subject.day]
    still, reacts = [], False
    for name, x, y in _pairs(full, noise, rows):
        if ((x != y) & ~(np.isnan(x) & np.isnan(y))).any():
            reacts = True
        elif _alive(pd.Series(x, index=rows)):
            still.append(name)
    if still or not reacts:
        what = f"{', '.join(still[:4])}: " if reacts else ""
        raise RuntimeError(
            f"{what}features after the day did not react to other bars: they come from "
            "somewhere else than the store, and nothing can be shown about them"
        )


def _alive(values: pd.Series) -> bool:
    """Whether stocks have values and moves of their own."""
    values = values[np.isfinite(values)]
    if values.nunique() <= 2:
        return False
    table = values.unstack()
    moves = table.diff().iloc[1:]
    own = (moves.max(axis=1) - moves.min(axis=1)) > 1e-9
    return bool(own.mean() > 0.5)


def foresight(subject: Subject) -> Verdict:
    """No column of the data ranks returns better than any factor does."""
    raw = subject.frames("full")["raw"]
    targets = {"the next day's return": (_next_return(subject), 1)}
    if "label" in groups_of(raw):
        try:
            reach = max(r or 0 for r in subject.reach())
        except ValueError:
            reach = 20
        label = raw.xs("label", axis=1).iloc[:, 0]  # type: ignore[call-overload]
        targets["the label"] = (label.astype(float), reach)
    few = are_few(raw.index)
    limit = SIMULATED if subject.simulated else FORESIGHT
    rows = []
    for name, x, _ in _pairs(raw, raw, raw.index):
        column = pd.Series(x, index=raw.index).unstack()
        for what, (target, reach) in targets.items():
            y = target.unstack().reindex(index=column.index, columns=column.columns)
            if few:
                mean, error, _ = over_time(tensor_of(column), tensor_of(y), reach)
                if not np.isfinite(mean):
                    continue
            else:
                daily = rank_ic(tensor_of(column), tensor_of(y), 5)
                known = daily[torch.isfinite(daily)]
                if len(known) < 20:
                    continue
                mean = float(known.mean())
                error = max(
                    newey_west_se(daily, 2 * reach),
                    float(known.std()) / len(known) ** 0.5,
                )
            t = mean / error if error > 0 else np.inf * np.sign(mean)
            rows.append({"column": name, "ranks": what, "RankIC": mean, "t": t})
    if not rows:
        raise RuntimeError("no column has enough values beside returns")
    table = pd.DataFrame(rows).set_index("column")
    table = table.sort_values("RankIC", key=abs, ascending=False).head(10)
    bad = table[(table["RankIC"].abs() > limit) & (table["t"].abs() > FORESIGHT_T)]
    styles = {
        "ranks": ("ranks", "s"),
        "RankIC": ("mean RankIC", "p2"),
        "t": ("errors from 0", "n1"),
    }
    if len(bad):
        return Verdict.fail(
            "; ".join(
                f"{name} ranks {row['ranks']} with a mean RankIC of {row['RankIC']:.2f}"
                for name, row in bad.head(3).iterrows()
            )
            + f": beyond {limit:.2f} nothing that was known at the time does",
            table,
            styles=styles,
        )
    best = table.iloc[0]
    return Verdict.passed(
        f"no column ranks returns beyond {limit:.2f}; best {table.index[0]}, "
        f"{best['RankIC']:.2f} with {best['ranks']}",
        table,
        ["a weaker leak that came with the data is not seen"],
        styles,
    )


def over_time(
    x: torch.Tensor, y: torch.Tensor, reach: int
) -> tuple[float, float, float]:
    """Rank correlation over the days [t, n] of a few instruments, their mean.

    Returns
    -------
    mean, error : float
        The error is that of no relation, for one instrument: several may move together.
    periods : float
        Days with both, as many as do not overlap.
    """
    values = rank_ic(x.T, y.T, 20)
    days = float((torch.isfinite(x) & torch.isfinite(y)).sum(0).max())
    periods = days / max(reach - 1, 1)
    return float(values.nanmean()), 1 / max(periods - 1, 1) ** 0.5, periods


def _next_return(subject: Subject) -> pd.Series:
    """Return from a day's last close to the next, (datetime, instrument)."""
    bars = subject.stores.bars
    close = bars.pivot(index="datetime", columns="instrument", values="close").ffill()
    after = (close.shift(-1) / close - 1)[list(subject.stores.stocks)]
    return in_order(after.stack().to_frame("next"))["next"]  # type: ignore[operator]
