"""Fund holdings to one table of positions with the days they became known.

A position counts from the day its report was announced. Where the vendor has no
announcement date, the last day that the law allows is taken: 15 working days after a
quarter for its ten largest positions, 60 days after June and 90 days after December for
full tables. Classes of one fund (A, C, …) hold one portfolio and become one fund.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from data_handlers.holdings import FEW_REPORTS, IN_PERCENT, LEAST_HELD, MOST_HELD
from data_handlers.vendor.mapping import Source
from qlib_ext.ingest.report import Report

__all__ = ["deadline", "holding_table", "merge_holdings", "name_stem"]

KEYS = ["fund", "period_end", "announced", "instrument"]
_REPORT = ["fund", "period_end", "announced"]
_WORKING_DAYS = 15
# Weekdays without trading within 15 working days: the Spring Festival and New Year.
_HOLIDAYS = 7
_FULL_LAG = {6: 60, 12: 90}
_AGREE = 0.005  # classes round their weights, or are a day apart


def deadline(
    period: pd.Series, scope: str, calendar: pd.DatetimeIndex | None = None
) -> pd.Series:
    """Return the last day that the law allows for the tables of a period.

    Parameters
    ----------
    period : Series of Timestamp
        Ends of quarters.
    scope : {"top_ten", "full"}
        March and September have tables of the ten largest only, whatever `scope` says.
    calendar : DatetimeIndex, optional
        Trading days; where they do not reach, weekdays and a week of holidays count.

    Returns
    -------
    Series of Timestamp
    """
    quick = period.map(
        {end: _after_working_days(end, calendar) for end in period.unique()}
    )
    if scope == "top_ten":
        return quick
    lag = period.dt.month.map(_FULL_LAG)
    return (period + pd.to_timedelta(lag, "D")).where(lag.notna(), quick)


def _after_working_days(
    end: pd.Timestamp, calendar: pd.DatetimeIndex | None
) -> pd.Timestamp:
    if calendar is not None and len(calendar) and calendar[0] <= end:
        slot = int(calendar.searchsorted(end, "right")) + _WORKING_DAYS - 1
        if slot < len(calendar):
            return calendar[slot]
    return end + pd.offsets.BDay(_WORKING_DAYS + _HOLIDAYS)


def name_stem(name: pd.Series) -> pd.Series:
    """Cut the letters of a class off fund names: ``… A``, ``…(C)``, ``…A/B类``."""
    one = r"(?<![A-Za-z])[A-IY](?![A-Za-z])"
    tail = rf"[\s\-－/(（]*(?:{one}[\s/]*)+类?[)）\s]*$"
    return name.str.replace(tail, "", regex=True).str.strip()


def holding_table(
    read: Mapping[str, pd.DataFrame],
    sources: tuple[Source, ...],
    calendar: pd.DatetimeIndex,
    report: Report,
) -> pd.DataFrame | None:
    """Join the files of holdings to one row per fund, report and stock.

    Parameters
    ----------
    read : mapping of str to DataFrame
        What `read.read_source` returned for each source.
    sources : tuple of Source
        Sources of kind holdings.
    calendar : DatetimeIndex
        Trading days of the store.
    report : Report
        Receives the findings.

    Returns
    -------
    DataFrame or None
        ``fund``, ``period_end``, ``announced``, ``instrument``, ``weight`` (fraction of
        the fund's net assets); None where no source has a file.
    """
    frames = [
        _one(read[s.name], s, calendar, report) for s in sources if s.name in read
    ]
    if not frames:
        return None
    table = pd.concat(frames, ignore_index=True)
    return table.sort_values(KEYS, ignore_index=True)


def _one(
    frame: pd.DataFrame, source: Source, calendar: pd.DatetimeIndex, report: Report
) -> pd.DataFrame:
    scope, name = source.options["scope"], source.name
    frame = frame.rename(columns={"period": "period_end"})
    undated = frame["period_end"].isna().to_numpy()
    if undated.any():
        report.bad_rows(
            "holdings without dates", name, "no end of a period: fill the column of "
            "`period`, or leave the rows out", frame, undated, [*map(str, frame)],
        )  # fmt: skip
        frame = frame[~undated]
    lawful = deadline(frame["period_end"], scope, calendar)
    if "announced" not in frame:
        frame["announced"] = lawful
        report.add(
            "note", "no announcement dates", name,
            "holdings count from the last day the law allows for them",
            count=len(frame),
        )  # fmt: skip
    frame["announced"] = frame["announced"].fillna(lawful)
    early = frame["announced"] <= frame["period_end"]
    if early.any():
        report.add(
            "error", "announced before the period ends", name,
            "holdings cannot be known before their period is over; is `announced` the "
            "report date? Leave it out, and the lawful day is taken",
            frame[early], columns=[*_REPORT, "instrument"],
        )  # fmt: skip
    bad = ~((frame["weight"] > 0) & (frame["weight"] <= 1)).to_numpy()
    if bad.any():
        bad = report.bad_rows(
            "weights", name, "a weight must be above 0 and at most 1 of net assets; is "
            "`units: {weight: percent}` right?", frame, bad,
            [*_REPORT, "instrument", "weight"],
        )  # fmt: skip
    frame = frame[~bad]
    today = pd.Timestamp.now() + pd.Timedelta(days=1)
    for check, mask, message in (
        ("announced in the future", frame["announced"] > today, "cannot be known yet"),
        ("announced late", frame["announced"] > lawful.reindex(frame.index)
         + pd.Timedelta(days=200), "long after the last lawful day: a wrong year?"),
        ("periods that end within a month",
         ~frame["period_end"].dt.is_month_end,
         "no report of a fund ends there: another column?"),
    ):  # fmt: skip
        if mask.any():
            report.add("warning", check, name, message, frame[mask],
                       columns=[*_REPORT, "instrument"])  # fmt: skip
    frame = _one_class(frame, name, report)
    twice = frame.duplicated(KEYS)
    if twice.any():
        report.add(
            "warning", "duplicate holdings", name,
            "a fund's report lists a stock more than once; the first row is kept",
            frame[twice], columns=KEYS,
        )  # fmt: skip
        frame = frame[~twice]
    held = frame.groupby(_REPORT)["weight"].agg(["sum", "size"])
    over, few = held["sum"] > MOST_HELD, held["sum"] < LEAST_HELD
    listed = held["sum"].sub(1).abs() < 0.005
    listed &= (listed.mean() > 0.5) & (scope == "top_ten")
    percent = over.mean() > FEW_REPORTS or (held["sum"] > IN_PERCENT).any()
    for wrong, check, mask, message in (
        (percent, "more than net assets", over, "the positions of a report are more "
         "than one and a half times its net assets: another unit, or rows twice?"),
        (few.mean() > 0.5, "hardly a stock", few, "the positions of a report are "
         "under 1 % of its net assets: is `units: {weight: percent}` right?"),
        (False, "weights of what is listed", listed, "the ten largest positions of "
         "most reports sum to 100 %: shares of what is listed, not of net assets? They "
         "are taken as they are"),
    ):  # fmt: skip
        if mask.any():
            report.add(
                "error" if wrong else "warning", check, name, message,
                held[mask].reset_index(), columns=[*_REPORT, "sum"],
            )  # fmt: skip
    words = "ten largest positions" if scope == "top_ten" else "full tables"
    report.add(
        "note", "holdings", name,
        f"{frame['fund'].nunique()} funds, {len(held)} reports ({words}), a median of "
        f"{held['size'].median():.0f} positions that are "
        f"{held['sum'].median():.0%} of net assets; the rest counts as not held",
        count=len(frame),
    )  # fmt: skip
    return frame[[*KEYS, "weight"]]


def _one_class(frame: pd.DataFrame, source: str, report: Report) -> pd.DataFrame:
    """Keep one class, that of the smallest code, of each fund's report."""
    if "name" not in frame or frame.empty:
        return frame
    names, known = pd.factorize(frame["name"].astype(str))
    stem = name_stem(pd.Series(known))[names].set_axis(frame.index)
    stem = stem.where(frame["name"].notna() & (stem != ""), frame["fund"])
    same = [stem, frame["period_end"], frame["announced"]]
    kept = frame.groupby(same)["fund"].transform("min")
    own = frame["fund"] == kept
    classes = frame.loc[~own, _REPORT].drop_duplicates()
    if classes.empty:
        return frame
    weights = frame.groupby([*same, frame["instrument"]])["weight"]
    spread = weights.max() - weights.min()
    report.add(
        "note", "share classes", source,
        "reports of further classes of the same fund are merged; they disagree by more "
        f"than {_AGREE:.1%} in {int((spread > _AGREE).sum())} of {len(spread)} "
        "positions",
        classes,
    )  # fmt: skip
    return frame[own]


def merge_holdings(
    given: pd.DataFrame | None,
    old: pd.DataFrame | None,
    end: pd.Timestamp,
    report: Report,
) -> pd.DataFrame | None:
    """Join the store's holdings and new reports.

    Reports that were announced by `end`, the store's last day, and are not in it are an
    error: they would change attributes of days in the past.
    """
    if given is None:
        return old
    fresh = np.ones(len(given), dtype=bool)
    if old is not None:
        # a delivery may repeat reports, under another lawful day where it has no dates
        both = given.merge(
            old.assign(known=1.0),
            on=["fund", "period_end", "instrument"],
            how="left",
            suffixes=("", "_old"),
        )
        equal = both["known"].notna() & np.isclose(both["weight"], both["weight_old"])
        known = equal.groupby([both[c] for c in KEYS]).any()
        same = known.reindex(pd.MultiIndex.from_frame(given[KEYS])).to_numpy(dtype=bool)
        whole = pd.Series(same, given.index).groupby([given[c] for c in _REPORT])
        fresh = ~whole.transform("all").to_numpy(dtype=bool)
    new = given[fresh]
    late = new["announced"] <= end
    if late.any():
        report.add(
            "error", "late holdings", "holdings",
            f"reports announced by the end of the store ({end:%Y-%m-%d}) that it does "
            "not have; rebuild with --overwrite",
            new[late].drop_duplicates(_REPORT), columns=_REPORT,
        )  # fmt: skip
    joined = new if old is None else pd.concat([old, new], ignore_index=True)
    return joined.sort_values(KEYS, ignore_index=True)
