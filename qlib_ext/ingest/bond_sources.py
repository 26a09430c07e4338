"""Sources of convertible bonds joined to one row a bond and day.

Each step takes the rows so far and adds what another file tells; nothing is filled
from a later day.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from data_handlers.codes import a_share_code
from qlib_ext.ingest import checks
from qlib_ext.ingest.report import Report

__all__ = [
    "KEYS",
    "add_conversion",
    "add_fields",
    "add_shares",
    "every_day",
    "explained",
    "judged",
    "last_call",
    "plausible",
    "read_events",
    "read_terms",
    "with_terms",
    "without_void",
]


KEYS = ["instrument", "date"]

#: A conversion price falls less than this when a dividend is paid.
_DIVIDEND = 0.10

#: Calendar days from a proposal to lower the conversion price to the new price.
_REVISION_DAYS = 120

#: No bond moved by this factor in a day, nor traded at this share of the value of its
#: shares (before it may be converted, or after its call, it may be a fifth below), and
#: the median bond has more than this left, CNY.
_JUMP, _BELOW, _SMALL = 4.0, 0.7, 1e6

#: Conversion prices of the median bond, CNY, and how much one moves on most days.
_SHARE, _STEADY = (0.5, 200.0), 0.005

#: A called bond is redeemed within this many calendar days.
_CALL_DAYS = 180


def add_fields(raw, plan, read, report) -> pd.DataFrame:
    """Beside the bars, what other files have for the day or a little before it."""
    for source in plan.of_kind("bond_fields"):
        if source.name not in read:
            continue
        extra = checks.fields_beside(raw, read[source.name], source.name, report)
        age = int(source.options.get("max_age", 0))
        raw = _as_of(raw, extra, "instrument", age)
    return raw


def every_day(raw: pd.DataFrame) -> pd.DataFrame:
    """Add the days without a trade between a bond's first row and its last.

    Without them a store would not know before a bond trades again that it is listed.
    """
    days = np.sort(raw["date"].unique())
    span = raw.groupby("instrument")["date"].agg(["min", "max"])
    first, last = (np.searchsorted(days, span[k].to_numpy()) for k in ("min", "max"))
    length = last - first + 1
    start = np.repeat(first - (np.cumsum(length) - length), length)
    every = pd.DataFrame(
        {
            "instrument": np.repeat(span.index.to_numpy(), length),
            "date": days[start + np.arange(length.sum())],
        }
    )
    raw = every.merge(raw, on=KEYS, how="left")
    known = [c for c in ("stock", "rating", "remain_size") if c in raw]
    raw[known] = raw.groupby("instrument")[known].ffill()
    return raw


def _as_of(raw, extra, by: str, age: int | None) -> pd.DataFrame:
    """Give each row the last row of `extra` up to its date, `age` days old at most."""
    raw = raw.assign(_row=np.arange(len(raw)))
    merged = pd.merge_asof(
        raw.sort_values("date", kind="stable"),
        extra.sort_values("date", kind="stable"),
        on="date",
        by=by,
        tolerance=None if age is None else pd.Timedelta(days=age),
    )
    return merged.sort_values("_row", ignore_index=True).drop(columns="_row")


def read_terms(plan, read, report) -> pd.DataFrame | None:
    """Terms of the bonds by instrument; None without a source of them."""
    frames = []
    for source in plan.of_kind("bond_terms"):
        if source.name not in read:
            continue
        frame = read[source.name].drop_duplicates(ignore_index=True)
        twice = frame.duplicated("instrument", keep=False).to_numpy()
        if twice.any():
            bad = report.bad_rows(
                "two terms of a bond", source.name, "a bond has several rows of terms "
                "that disagree; keep one", frame, twice, list(frame),
            )  # fmt: skip
            frame = frame[~bad].drop_duplicates("instrument")
        frames.append(frame)
    if not frames:
        return None
    terms = frames[0].copy()
    for name, least, most in (("issue_size", _SMALL, 1e12), ("redemption", 90, 200)):
        if name not in terms:
            continue
        value = terms[name] = terms[name].replace(0, np.nan)  # 0 is unknown
        middle = value.median()
        odd = value[~value.between(least, most) & value.notna()]
        if len(odd):
            report.add(
                "error", "unit slip", plan.of_kind("bond_terms")[0].name,
                f"{name} is {middle:.3g} CNY at the median, and {len(odd)} "
                f"value(s) below {least:g} or above {most:g}: another unit?",
                terms.loc[odd.index], columns=["instrument", name],
            )  # fmt: skip
    for frame in frames[1:]:
        new = [c for c in frame if c == "instrument" or c not in terms]
        terms = terms.merge(frame[new], on="instrument", how="outer")
    return terms.set_index("instrument")


def read_events(plan, read, report) -> pd.DataFrame | None:
    """Announcements by our names, in order of their dates."""
    frames = []
    for source in plan.of_kind("bond_events"):
        if source.name not in read:
            continue
        words = {str(k): str(v) for k, v in source.options["events"].items()}
        frame = read[source.name]
        text = frame["event"].astype(str)
        frame = frame.assign(event=text.map(words))
        other = text[frame["event"].isna()].value_counts()
        if len(other):
            said = ", ".join(f"{word} ({n})" for word, n in other.items())
            level = "note" if frame["event"].notna().any() else "warning"
            report.add(
                level, "other announcements", source.name,
                f"not read, since `events` does not name them: {said}",
                count=int(other.sum()),
            )  # fmt: skip
        undated = frame["event"].notna() & frame["announced"].isna()
        if undated.any():
            report.add(
                "warning", "undated events", source.name,
                "announcements without a date are left out", frame[undated],
            )  # fmt: skip
        frames.append(frame[frame["event"].notna() & ~undated])
    if not frames:
        return None
    every = pd.concat(frames, ignore_index=True).drop_duplicates()
    every = every.sort_values(["instrument", "announced"], ignore_index=True)
    return every[["instrument", "announced", "event"]]


def with_terms(raw: pd.DataFrame, terms: pd.DataFrame) -> pd.DataFrame:
    """Give each row the share of its bond."""
    if "stock" in terms:
        of_terms = raw["instrument"].map(terms["stock"])
        stock = raw["stock"].fillna(of_terms) if "stock" in raw else of_terms
        raw = raw.assign(stock=stock)
    if "issue_rating" in terms and "rating" not in raw:
        raw = raw.assign(rating=raw["instrument"].map(terms["issue_rating"]))
    return raw


def add_conversion(raw, plan, read, report) -> pd.DataFrame:
    """Conversion prices by date, where they come as steps."""
    for source in plan.of_kind("bond_conversion"):
        if source.name not in read:
            continue
        if "conv_price" in raw:
            raise ValueError(f"source `{source.name}` gives `conv_price` once more.")
        steps = checks.drop_duplicates(read[source.name], source.name, report)
        raw = _as_of(raw, steps, "instrument", None)
    return raw if "conv_price" in raw else raw.assign(conv_price=np.nan)


def without_void(raw, source: str, report: Report) -> pd.DataFrame:
    """Take values that must be above 0 and are not for unknown."""
    for name in ("conv_price", "conv_value", "bond_floor", "remain_size"):
        void = raw[name] <= 0 if name in raw else pd.Series(False, raw.index)
        if void.any():
            report.add(
                "warning", f"{name} not above 0", source,
                "taken as not known that day", raw[void], columns=[*KEYS, name],
            )  # fmt: skip
            raw[name] = raw[name].where(~void)
    return raw


def judged(raw, terms, events, plan, source: str, report: Report) -> pd.DataFrame:
    """Leave out what cannot be used, by name and number; errors unless asked for."""
    idle = raw["close"].isna()
    if "volume" in raw:  # a suspension written in zeros
        idle |= (raw["close"] == 0) & ~(raw["volume"] > 0)
    if idle.any():
        report.add("note", "rows without price", source,
                   "taken as days without a trade", raw[idle])  # fmt: skip
        raw = raw[~idle].reset_index(drop=True)
    bad = checks.check_bars(_whole_bars(raw), plan, source, report)
    show = ["instrument", "date", "close"]

    def reject(check: str, mask: Any, message: str, *more: str) -> None:
        mask = np.asarray(mask, bool) & ~bad
        if mask.any():
            columns = [*show, *more]
            bad[report.bad_rows(check, source, message, raw, mask, columns)] = True
        else:
            report.ok(check, source)

    stock = raw["stock"] if "stock" in raw else pd.Series(None, raw.index, object)
    names = {s: a_share_code(str(s)) for s in stock.dropna().unique()}
    raw["stock"] = stock.map(names).astype(object)
    reject(
        "bond without share",
        raw["stock"].isna(),
        "the mapping gives no share for these bonds: add a source of kind bond_terms "
        "with `stock`, or leave the bonds out",
    )
    if terms is not None and "listed" in terms:
        reject(
            "quoted before its listing",
            raw["date"] < raw["instrument"].map(terms["listed"]),
            "rows before the day of listing of the terms: nobody could trade at them",
        )
    reject(
        "called bond still quoted",
        _ended(raw, terms, events),
        "prices after the bond was delisted, its conversion ended, or half a year "
        "after its redemption was announced: stale quotes, or wrong dates in the terms",
    )
    report.stop_on_errors()
    return raw[~bad].reset_index(drop=True)


def _whole_bars(raw: pd.DataFrame) -> pd.DataFrame:
    """Bars with the prices that the files leave out, for the checks of all bars."""
    open_ = raw["open"].fillna(raw["close"]) if "open" in raw else raw["close"]
    ends = pd.concat([open_, raw["close"]], axis=1)
    more = {"open": open_, "high": ends.max(axis=1), "low": ends.min(axis=1)}
    for name in ("high", "low"):
        if name in raw:
            more[name] = raw[name].fillna(more[name])
    return raw.assign(traded=True, **more)


def _ended(raw, terms, events) -> np.ndarray:
    """Rows after a bond's last day by its terms, or long after its call."""
    over = np.zeros(len(raw), bool)
    for name in ("delisted", "conversion_ends"):
        if terms is not None and name in terms:
            over |= (raw["date"] > raw["instrument"].map(terms[name])).to_numpy()
    if events is not None:
        last = last_call(raw, events)
        age = (raw["date"] - last["announced"]).dt.days
        over |= (last["event"].eq("call") & (age > _CALL_DAYS)).to_numpy()
    return over


def last_call(raw, events) -> pd.DataFrame:
    """Last announcement about an early redemption up to each row's day."""
    calls = events[events["event"].isin(("call", "no_call"))]
    calls = calls.assign(date=calls["announced"])
    return _as_of(raw[KEYS], calls, "instrument", None).set_axis(raw.index)


def add_shares(raw, plan, read, report) -> pd.DataFrame:
    """Add the share's close, and check it against conversion price and value."""
    for source in plan.of_kind("shares"):
        if source.name not in read:
            continue
        if "stock_close" in raw:
            raise ValueError(f"source `{source.name}` gives `stock_close` once more.")
        share = checks.drop_duplicates(read[source.name], source.name, report)
        share = share[share["close"] > 0]
        names = {"instrument": "stock", "close": "stock_close"}
        share = share.rename(columns={**names, "factor": "stock_factor"})
        raw = raw.merge(share, on=["stock", "date"], how="left")
        unknown = raw["stock_close"].isna()
        if unknown.any():
            report.add(
                "warning", "rows without share price", source.name,
                "the share has no price that day (suspended, or not in the file)",
                raw[unknown], columns=["instrument", "date", "stock"],
            )  # fmt: skip
    if "stock_close" not in raw and {"conv_value", "conv_price"} <= set(raw):
        raw["stock_close"] = raw["conv_value"] * raw["conv_price"] / 100
    elif "stock_close" in raw:
        implied = 100 * raw["stock_close"] / raw["conv_price"]
        if "conv_value" not in raw:
            raw["conv_value"] = implied
        off = (implied / raw["conv_value"] - 1).abs() > 0.005
        if off.any():
            report.add(
                "warning", "conversion value off", "conv_value",
                "differs by more than 0.5 % from 100 x share / conversion price",
                raw[off], columns=["instrument", "date", "conv_value", "conv_price"],
            )  # fmt: skip
    return raw


def plausible(raw, source: str, report: Report) -> None:
    """Look for prices and sizes of another bond, share or unit."""
    close = raw["close"]
    step = (
        close
        / close.groupby(raw["instrument"]).ffill().groupby(raw["instrument"]).shift()
    )
    conv = raw.get("conv_value", pd.Series(np.nan, raw.index))
    for check, mask, message in (
        ("price jumps", (step > _JUMP) | (step < 1 / _JUMP),
         f"the price moves by a factor above {_JUMP:g}: another unit or bond?"),
        ("price below conversion value", close < _BELOW * conv,
         "the price is far below what the shares are worth: the price of another bond, "
         "or a wrong share or conversion price?"),
    ):  # fmt: skip
        if mask.any():
            report.add(
                "warning", check, source, message, raw[mask],
                columns=[*KEYS, "close", "conv_value"],
            )  # fmt: skip
        else:
            report.ok(check, source)
    _levels(raw, source, report)
    if "remain_size" in raw and (size := raw["remain_size"].median()) < _SMALL:
        report.add(
            "error", "unit slip", source,
            f"remaining sizes have a median of {size:.3g} CNY: set "
            "`units: {remain_size: hundred_million_cny}` or the vendor's other unit",
        )  # fmt: skip


def _levels(raw, source: str, report: Report) -> None:
    """Refuse values in another unit: of a row, a bond, or all of them."""
    check = "unit slip"
    of = raw["instrument"]
    for name in ("close", "conv_value", "bond_floor", "stock_close", "remain_size"):
        if name not in raw:
            continue
        # Conversion takes any part of what remains, and exact powers seldom.
        near = 1e-3 if name == "remain_size" else checks.NEAR
        if (odd := checks.off_by_powers(raw[name], of, near)).any():
            report.add(
                "error", check, source, f"{name} is a power of ten off that of the "
                "bond's other days: mend these rows", raw[odd], columns=[*KEYS, name],
            )  # fmt: skip
    for name in ("conv_value", "bond_floor"):
        if name not in raw:
            continue
        middle = (raw[name] / raw["close"]).groupby(of).median()
        odd = middle[checks.powers(middle, 2) != 0]
        if len(odd):
            report.add(
                "error", check, source, f"{name} of {len(odd)} bond(s) is a hundredth "
                "or a hundred times the price, and both are CNY per 100 of face value: "
                "set its unit, or mend it", odd.rename("ratio").reset_index(),
            )  # fmt: skip
    if {"stock_close", "conv_value"} <= set(raw):
        price = 100 * raw["stock_close"] / raw["conv_value"]
        middle = float(price.median())
        if not np.isnan(middle) and not _SHARE[0] < middle < _SHARE[1]:
            report.add(
                "error", check, source,
                f"share and conversion value give a conversion price of {middle:.3g} "
                "CNY at the median: shares in another unit?", count=len(raw),
            )  # fmt: skip
        step = np.log(price.where(price > 0)).groupby(of).diff().abs()
        moves = step.groupby(of).median()
        other = moves[moves > _STEADY]
        if len(other):
            report.add(
                "warning", "share of another bond", source,
                "100 x share / conversion value, the conversion price, moves each day: "
                "is the share that of the bond?", other.rename("move").reset_index(),
            )  # fmt: skip


def explained(raw, events, source: str, report: Report) -> pd.DataFrame:
    """Look for conversion prices that change without an event.

    Dividends lower them a little, bonus shares with the share's own price, and a
    proposal of the board to lower them must have been announced before.
    """
    check = "conversion price without event"
    known = raw[raw["conv_price"].notna() & raw["close"].notna()]
    by = known.groupby("instrument", sort=False)
    step = known["conv_price"] / by["conv_price"].shift() - 1
    moved = step.abs() > _DIVIDEND
    if "stock_close" in raw:
        share = known["stock_close"] / by["stock_close"].shift() - 1
        moved &= ~((share < -_DIVIDEND / 2) & ((1 + share) / (1 + step) > 0.8)
                   & ((1 + share) / (1 + step) < 1.25))  # fmt: skip
    rows = known[moved]
    if events is not None and len(rows):
        lowered = events[events["event"] == "revision"].rename(
            columns={"announced": "date"}
        )
        asked = rows[KEYS].assign(_at=rows.index).sort_values("date")
        found = pd.merge_asof(
            asked,
            lowered[[*KEYS, "event"]].sort_values("date"),
            on="date",
            by="instrument",
            tolerance=pd.Timedelta(days=_REVISION_DAYS),
        )
        rows = raw.loc[np.sort(found.loc[found["event"].isna(), "_at"].to_numpy())]
    if not len(rows):
        report.ok(check, source)
        return raw
    shown = rows.assign(step=step.reindex(rows.index))
    columns = ["instrument", "date", "conv_price", "step"]
    message = (
        f"the conversion price moves by more than {_DIVIDEND:.0%} and no event was "
        "announced: a wrong price, or a list of events with holes"
    )
    if events is None or not events["event"].eq("revision").any():
        report.add("warning", check, source, message, shown, columns=columns)
        return raw
    mask = raw.index.isin(rows.index)
    bad = report.bad_rows(check, source, message, raw, mask, columns, examples=shown)
    return raw[~bad].reset_index(drop=True)
