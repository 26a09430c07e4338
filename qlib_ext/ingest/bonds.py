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

import numpy as np
import pandas as pd

from data_handlers.convertible import pool_spans, rating_number, yield_to_maturity
from data_handlers.vendor.mapping import VendorMapping
from qlib_ext.ingest import checks
from qlib_ext.ingest.bond_sources import (
    KEYS,
    add_conversion,
    add_fields,
    add_shares,
    every_day,
    explained,
    judged,
    last_call,
    plausible,
    read_events,
    read_terms,
    with_terms,
    without_void,
)
from qlib_ext.ingest.build import IngestResult, report_files, units_of
from qlib_ext.ingest.inputs import read_sources
from qlib_ext.ingest.report import Report
from qlib_ext.ingest.store import write_store

__all__ = ["EQUAL_INDEX", "bond_frame", "equal_index", "ingest_bonds", "share_returns"]

#: Code of the equally weighted index that every store of bonds has.
EQUAL_INDEX = "CBEQUAL"

_BAR = ("open", "high", "low", "close", "volume", "amount")
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
    terms = read_terms(plan, read, report)
    events = read_events(plan, read, report)
    raw = checks.drop_duplicates(read[main.name], main.name, report)
    if terms is not None:
        raw = with_terms(raw, terms)
    raw = judged(raw, terms, events, plan, main.name, report)
    raw = add_fields(every_day(raw), plan, read, report)
    raw = add_conversion(raw, plan, read, report)
    raw = without_void(raw, main.name, report)
    raw = add_shares(raw, plan, read, report)
    raw = explained(raw, events, main.name, report)
    plausible(raw, main.name, report)
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
            out[name] = raw[name]
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
    steps = raw.loc[raw["conv_price"].notna(), [*KEYS, "conv_price"]]
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
    return last_call(raw, events)["event"].eq("call").astype(float)
