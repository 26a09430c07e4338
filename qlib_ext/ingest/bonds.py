"""Files of convertible bonds to a store whose instruments are the bonds.

Prices are full prices per 100 CNY of face value, as traded: `$factor` is 1. The series
of the share stand in the bond's own rows. Nothing is filled from a later day: a
conversion price holds from its date on, a value of a sparser file for `max_age` days,
an announcement from its day on (docs/systems/convertible.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data_handlers.codes import a_share_code
from data_handlers.convertible import pool_spans, rating_number, yield_to_maturity
from data_handlers.vendor.mapping import VendorMapping
from qlib_ext.ingest import checks
from qlib_ext.ingest.build import IngestResult, report_files, units_of
from qlib_ext.ingest.inputs import read_sources
from qlib_ext.ingest.report import Report
from qlib_ext.ingest.store import write_store

__all__ = [
    "EQUAL_INDEX",
    "bond_frame",
    "equal_index",
    "ingest_bonds",
    "share_returns",
]

#: Code of the equally weighted index that every store of bonds has.
EQUAL_INDEX = "CBEQUAL"

_KEYS = ["instrument", "date"]
_BAR = ("open", "high", "low", "close", "volume", "amount")
#: A conversion price falls less than this when a dividend is paid.
_DIVIDEND = 0.10
#: Calendar days from a proposal to lower the conversion price to the new price.
_REVISION_DAYS = 120
#: A called bond is redeemed within this many calendar days.
_CALL_DAYS = 180
_COUPON = re.compile(r"(\d{8})\s*-\s*(\d{8})[^\d;]*?([\d.]+)\s*%")


def ingest_bonds(
    root: Path,
    plan: VendorMapping,
    data: Path,
    files: Mapping[str, Sequence[str]],
    report: Report,
    *,
    write: bool,
    progress: bool,
) -> IngestResult:
    """Read, check, convert and write (unless not `write`) a store of bonds.

    Raises
    ------
    IngestError
        If the checks find errors.
    ValueError
        If files and mapping do not fit.
    """
    read, used = read_sources(plan, data, files, report, progress=progress)
    bars, tables = bond_frame(plan, read, report)
    report.stop_on_errors()
    markets = pool_spans(bars)
    calendar = pd.DatetimeIndex(np.sort(bars["datetime"].unique()))
    if write:
        write_store(
            root,
            pd.concat([bars, equal_index(bars)], ignore_index=True),
            markets=markets,
            index_codes=[EQUAL_INDEX],
            tables=tables,
            meta={
                "source": {
                    "mapping": plan.name,
                    "vendor": plan.vendor,
                    "files": {k: v[:20] for k, v in used.items()},
                    "units": units_of(plan),
                },
                "instruments_are": "convertible bonds",
                "adjustment": {
                    "mode": "raw/one",
                    "prices": "full prices per 100 CNY of face value, factor 1",
                },
                "notes": list(plan.notes),
            },
            calendar=calendar,
            files=report_files(report),
            progress=progress,
        )
    summary = {
        "days": len(calendar),
        "start": f"{calendar[0]:%Y-%m-%d}",
        "end": f"{calendar[-1]:%Y-%m-%d}",
        "stocks": int(bars["instrument"].nunique()),
        "rows": int(bars["close"].notna().sum()),
        "fields": [c for c in bars.columns if c not in ("datetime", "instrument")],
        "markets": {k: int(v["instrument"].nunique()) for k, v in markets.items()},
        "indices": [EQUAL_INDEX],
    }
    return IngestResult(root, report, summary, write)


def bond_frame(
    plan: VendorMapping, read: Mapping[str, pd.DataFrame], report: Report
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Join the sources of a mapping to bars of a store, and its tables.

    Parameters
    ----------
    plan : VendorMapping
    read : mapping of str to DataFrame
        What `read_sources` gave.
    report : Report
        Receives the findings.

    Returns
    -------
    bars : DataFrame
        ``datetime``, ``instrument`` and fields.
    tables : dict of str to DataFrame
        ``bond_terms``, ``bond_events``, ``conversion_prices``.
    """
    (main,) = plan.of_kind("bonds")
    terms = _terms(plan, read, report)
    events = _events(plan, read, report)
    raw = checks.drop_duplicates(read[main.name], main.name, report)
    if terms is not None:
        raw = _with_terms(raw, terms)
    raw = _rejected(raw, terms, events, main.name, report)
    raw = _fields(_every_day(raw), plan, read, report)
    raw = _conversion(raw, plan, read, report)
    raw = _shares(raw, plan, read, report)
    raw = _unexplained(raw, events, main.name, report)
    by = raw.groupby("instrument", sort=False)
    out = {"datetime": raw["date"], "instrument": raw["instrument"]}
    out |= {name: raw[name] for name in _BAR if name in raw}
    out["factor"] = pd.Series(1.0, raw.index)
    before = by["close"].ffill().groupby(raw["instrument"]).shift()
    out["change"] = raw["close"] / before - 1
    if "stock_close" in raw:
        out["stock_close"] = raw["stock_close"]
        out["stock_return"] = share_returns(raw)
    for name in ("conv_price", "conv_value", "bond_floor", "remain_size"):
        if name in raw and raw[name].notna().any():
            out[name] = raw[name] = raw[name].where(raw[name] > 0)
    for name, base in (("conv_premium", "conv_value"), ("floor_premium", "bond_floor")):
        if base in raw:
            out[name] = raw["close"] / raw[base] - 1
    out |= _of_terms(raw, terms)
    if "rating" in raw:
        numbers = {r: rating_number(r) for r in raw["rating"].unique()}
        out["rating"] = raw["rating"].map(numbers).astype(float)
    out["days_listed"] = _age(raw, terms)
    if events is not None:
        out["call_state"] = _call_state(raw, events)
    bars = pd.DataFrame(out)
    steps = raw.loc[raw["conv_price"].notna(), [*_KEYS, "conv_price"]]
    before = steps.groupby("instrument")["conv_price"].shift()
    tables = {"conversion_prices": steps[~np.isclose(steps["conv_price"], before)]}
    tables["conversion_prices"] = tables["conversion_prices"].reset_index(drop=True)
    if terms is not None:
        known = terms.reset_index()
        tables["bond_terms"] = known.loc[:, known.notna().any()]
    if events is not None:
        tables["bond_events"] = events
    return bars, tables


def equal_index(bars: pd.DataFrame) -> pd.DataFrame:
    """Return bars of an index with the mean return of all bonds, 1,000 at its start.

    Parameters
    ----------
    bars : DataFrame
        ``datetime``, ``instrument``, ``change``; a bond counts from its second day.
    """
    change = bars.groupby("datetime")["change"].mean().fillna(0.0)
    level = 1000 * (1 + change).cumprod()
    return pd.DataFrame(
        {
            "datetime": change.index,
            "instrument": EQUAL_INDEX,
            "close": level.to_numpy(),
            "factor": 1.0,
            "change": change.to_numpy(),
        }
    )


# ------------------------------------------------------------------- joining sources


def _fields(raw, plan, read, report) -> pd.DataFrame:
    """Beside the bars, what other files have for the day or a little before it."""
    for source in plan.of_kind("bond_fields"):
        if source.name not in read:
            continue
        extra = checks.fields_beside(raw, read[source.name], source.name, report)
        age = int(source.options.get("max_age", 0))
        raw = _as_of(raw, extra, "instrument", age)
    return raw


def _every_day(raw: pd.DataFrame) -> pd.DataFrame:
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
    raw = every.merge(raw, on=_KEYS, how="left")
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


def _terms(plan, read, report) -> pd.DataFrame | None:
    frames = [
        read[s.name].drop_duplicates("instrument")
        for s in plan.of_kind("bond_terms")
        if s.name in read
    ]
    if not frames:
        return None
    terms = frames[0]
    for frame in frames[1:]:
        new = [c for c in frame if c == "instrument" or c not in terms]
        terms = terms.merge(frame[new], on="instrument", how="outer")
    return terms.set_index("instrument")


def _events(plan, read, report) -> pd.DataFrame | None:
    """Announcements by our names, in order of their dates."""
    frames = []
    for source in plan.of_kind("bond_events"):
        if source.name not in read:
            continue
        words = {str(k): str(v) for k, v in source.options["events"].items()}
        frame = read[source.name]
        frame = frame.assign(event=frame["event"].astype(str).map(words))
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


def _with_terms(raw: pd.DataFrame, terms: pd.DataFrame) -> pd.DataFrame:
    if "stock" in terms:
        of_terms = raw["instrument"].map(terms["stock"])
        stock = raw["stock"].fillna(of_terms) if "stock" in raw else of_terms
        raw = raw.assign(stock=stock)
    if "issue_rating" in terms and "rating" not in raw:
        raw = raw.assign(rating=raw["instrument"].map(terms["issue_rating"]))
    return raw


def _conversion(raw, plan, read, report) -> pd.DataFrame:
    """Conversion prices by date, where they come as steps."""
    for source in plan.of_kind("bond_conversion"):
        if source.name not in read:
            continue
        if "conv_price" in raw:
            raise ValueError(f"source `{source.name}` gives `conv_price` once more.")
        steps = checks.drop_duplicates(read[source.name], source.name, report)
        raw = _as_of(raw, steps, "instrument", None)
    return raw if "conv_price" in raw else raw.assign(conv_price=np.nan)


def _rejected(raw, terms, events, source: str, report: Report) -> pd.DataFrame:
    """Leave out what cannot be used, by name and number; errors unless asked for."""
    idle = raw["close"].isna()
    if idle.any():
        report.add("note", "rows without price", source,
                   "taken as days without a trade", raw[idle])  # fmt: skip
        raw = raw[~idle].reset_index(drop=True)
    bad = np.zeros(len(raw), bool)
    show = ["instrument", "date", "close"]

    def reject(check: str, mask: Any, message: str, *more: str) -> None:
        mask = np.asarray(mask, bool) & ~bad
        if mask.any():
            columns = [*show, *more]
            bad[report.bad_rows(check, source, message, raw, mask, columns)] = True
        else:
            report.ok(check, source)

    reject("non-positive prices", raw["close"] <= 0, "prices must be above 0")
    reject("infinite prices", np.isinf(raw["close"]), "a price is infinite")
    stock = raw["stock"] if "stock" in raw else pd.Series(None, raw.index, object)
    names = {s: a_share_code(str(s)) for s in stock.dropna().unique()}
    raw["stock"] = stock.map(names)
    reject(
        "bond without share",
        raw["stock"].isna(),
        "the mapping gives no share for these bonds: add a source of kind bond_terms "
        "with `stock`, or leave the bonds out",
    )
    reject(
        "called bond still quoted",
        _ended(raw, terms, events),
        "prices after the bond was delisted, its conversion ended, or half a year "
        "after its redemption was announced: stale quotes, or wrong dates in the terms",
    )
    return raw[~bad].reset_index(drop=True)


def _ended(raw, terms, events) -> np.ndarray:
    """Rows after a bond's last day by its terms, or long after its call."""
    over = np.zeros(len(raw), bool)
    for name in ("delisted", "conversion_ends"):
        if terms is not None and name in terms:
            over |= (raw["date"] > raw["instrument"].map(terms[name])).to_numpy()
    if events is not None:
        last = _last_call(raw, events)
        age = (raw["date"] - last["announced"]).dt.days
        over |= (last["event"].eq("call") & (age > _CALL_DAYS)).to_numpy()
    return over


def _last_call(raw, events) -> pd.DataFrame:
    """Last announcement about an early redemption up to each row's day."""
    calls = events[events["event"].isin(("call", "no_call"))]
    calls = calls.assign(date=calls["announced"])
    return _as_of(raw[_KEYS], calls, "instrument", None).set_axis(raw.index)


def _shares(raw, plan, read, report) -> pd.DataFrame:
    """Add the share's close, and check it against conversion price and value."""
    for source in plan.of_kind("shares"):
        if source.name not in read:
            continue
        if "stock_close" in raw:
            raise ValueError(f"source `{source.name}` gives `stock_close` once more.")
        share = checks.drop_duplicates(read[source.name], source.name, report)
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


def _unexplained(raw, events, source: str, report: Report) -> pd.DataFrame:
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
        asked = rows[_KEYS].assign(_at=rows.index).sort_values("date")
        found = pd.merge_asof(
            asked,
            lowered[[*_KEYS, "event"]].sort_values("date"),
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


# ------------------------------------------------------------------------ the fields


def share_returns(raw: pd.DataFrame) -> pd.Series:
    """Daily return of each row's share, NaN on a bond's first row.

    With the share's factor, of adjusted closes. Without it, of the closes as traded; on
    a day on which the conversion price changes, that of the conversion value if it is
    nearer to 0: bonus shares and dividends lower the conversion price with the share,
    a revision lowers it alone.

    Parameters
    ----------
    raw : DataFrame
        ``instrument``, ``conv_price``, ``stock_close``, perhaps ``stock_factor``;
        sorted by bond and day.
    """
    close = raw["stock_close"]
    if "stock_factor" in raw:
        close = close * raw["stock_factor"]
    of = raw["instrument"]
    before = close.groupby(of).ffill().groupby(of).shift()
    plain = close / before - 1
    if "stock_factor" in raw:
        return plain
    price = raw["conv_price"].groupby(of).ffill()
    step = price / price.groupby(of).shift()
    other = (1 + plain) / step - 1
    return plain.where(~(other.abs() < plain.abs()), other)


def _of_terms(raw: pd.DataFrame, terms: pd.DataFrame | None) -> dict[str, pd.Series]:
    """Years to maturity and yield, from the files or from the terms."""
    out = {k: raw[k] for k in ("years_to_maturity", "ytm") if k in raw}
    if terms is None or "matures" not in terms:
        return out
    if "years_to_maturity" not in out:
        left = raw["instrument"].map(terms["matures"]) - raw["date"]
        out["years_to_maturity"] = left.dt.days / 365.0
    if "ytm" not in out and "coupons" in terms:
        days, flows = _flows(terms)
        at = terms.index.get_indexer(pd.Index(raw["instrument"]))
        today = raw["date"].to_numpy().astype("datetime64[D]")[:, None]
        years = (days[at] - today).astype(float) / 365.0
        years[np.isnat(days[at])] = np.nan
        value = yield_to_maturity(raw["close"].to_numpy(), years, flows[at])
        out["ytm"] = pd.Series(value, raw.index)
    return out


def _flows(terms: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Days and amounts [n, k] of all payments, by the text of the coupons.

    A coupon is paid at the end of its year. The last one is part of the redemption
    price; where that is unknown, of 100 and itself.
    """
    table = []
    for bond, text in terms["coupons"].items():
        found = _COUPON.findall(str(text)) if isinstance(text, str) else []
        pays = [(pd.Timestamp(end), float(rate)) for _, end, rate in found]
        if pays:
            last = terms["redemption"].get(bond, np.nan) if "redemption" in terms else 0
            end, rate = pays[-1]
            pays[-1] = (end, last if last and np.isfinite(last) else 100 + rate)
        table.append(pays)
    wide = max(map(len, table), default=0) or 1
    days = np.full((len(table), wide), np.datetime64("NaT", "D"), "datetime64[D]")
    flows = np.full((len(table), wide), np.nan)
    for row, pays in enumerate(table):
        for k, (day, amount) in enumerate(pays):
            days[row, k], flows[row, k] = np.datetime64(day, "D"), amount
    return days, flows


def _age(raw: pd.DataFrame, terms: pd.DataFrame | None) -> pd.Series:
    """Calendar days since listing; by the first row where the terms do not say."""
    first = raw.groupby("instrument")["date"].transform("min")
    if terms is not None and "listed" in terms:
        listed = raw["instrument"].map(terms["listed"])
        first = listed.where(listed.notna(), first)
    return (raw["date"] - first).dt.days.clip(lower=0).astype(float)


def _call_state(raw: pd.DataFrame, events: pd.DataFrame) -> pd.Series:
    """1 from the day on which an early redemption is announced, else 0."""
    return _last_call(raw, events)["event"].eq("call").astype(float)
