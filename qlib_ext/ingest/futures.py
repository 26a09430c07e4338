"""Contracts to one continuous series: which one counts, and where it rolls.

A roll is adjusted as an ex-date is. The series' previous close on a roll day is that of
the contract which counts from that day on, so returns never mix two contracts:

- **All contracts given** (column `contract`, several rows a product and day): the one
  with the largest open interest at the close before counts, and never again an earlier
  delivery. Its own previous close is known, so the adjustment is exact.
- **One named contract a day**: the roll's day is exact. The new contract's close before
  is not in the file, so its open stands in: the night's move of a roll day is left out.
- **No contract named**: a roll is a day on which the open interest rises by `rise` or
  more over the day before, in the `months` given, at least `apart` of the product's
  trading days after the roll before. Nothing later than the day itself is used. The
  night's move is left out as above. What it cannot see is a roll into a contract that
  is not yet larger; what it may take for one is a flood of new positions. Both are
  listed for a person to look at.

docs/systems/treasury.md says how the rule does on treasury-bond futures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from data_handlers.vendor.mapping import Source
from qlib_ext.ingest import checks
from qlib_ext.ingest.report import Report

__all__ = ["continuous"]

#: Rolls of an unnamed contract: least rise of the open interest, months, days between.
#: Treasury-bond futures deliver in March, June, September and December and are rolled
#: in the month before, at times a few days earlier or later.
_ROLLS: dict[str, Any] = {
    "rise": 0.2,
    "months": [1, 2, 3, 5, 6, 8, 9, 11, 12],
    "apart": 40,
}
_OI = "open_interest"
_LONGEST_CLOSURE = pd.Timedelta(days=20)


def continuous(
    raw: pd.DataFrame, source: Source, report: Report, *, update: bool = False
) -> pd.DataFrame:
    """Choose one contract a product and day and give the same contract's close before.

    Parameters
    ----------
    raw : DataFrame
        Roles of a source of kind futures.
    source : Source
        Its `products`, `multiplier` and `rolls` are used.
    report : Report
        Receives the rolls and what was left out.
    update : bool
        Whether a store is continued: the files must then reach back far enough for a
        roll to be told.

    Returns
    -------
    DataFrame
        Bars as of kind ``bars``, sorted, one row a product and day, with ``preclose``
        (NaN on a product's first day). Volume is lots times the multiplier, so that
        amount / volume is a price.

    Raises
    ------
    ValueError
        If a product has no multiplier though others have, products are missing, or what
        tells the rolls is.
    """
    options = source.options
    if options.get("products"):
        absent = sorted(set(options["products"]) - set(raw["instrument"]))
        if absent:
            raise ValueError(f"source `{source.name}`: {absent} are not in its files.")
        raw = raw[raw["instrument"].isin(options["products"])]
    raw = _scaled(raw, options.get("multiplier"), source)
    rule = _rule(options.get("rolls"), source)
    if _OI in raw and (unknown := ~(raw[_OI] >= 0)).any():
        report.add(
            "warning", "no open interest", source.name,
            "rolls on these days and the next ones cannot be told: their gaps would be "
            "returns",
            raw[unknown], columns=["instrument", "date", _OI],
        )  # fmt: skip
        raw = raw.assign(**{_OI: raw[_OI].where(~unknown)})
    if "contract" in raw:
        bars = _of_contracts(raw, source, report)
    else:
        bars = checks.drop_duplicates(raw, source.name, report)
        if _OI not in bars:
            raise ValueError(
                f"source `{source.name}` has neither `contract` nor `open_interest`: "
                "rolls cannot be told, and their gaps would count as returns."
            )
        short = bars.groupby("instrument").size() <= rule["apart"]
        if update and short.any():
            raise ValueError(
                f"source `{source.name}`: {short.index[short.argmax()]} has too few "
                f"days to tell whether it rolls; an update needs more than "
                f"{rule['apart']} days, those of the store included."
            )
        bars["roll"] = _detected(bars, rule, source, report)
        bars["preclose"] = bars.groupby("instrument")["close"].shift()
    _settle(bars, source, report)
    return bars.drop(columns=["roll", "contract"], errors="ignore")


def _scaled(
    raw: pd.DataFrame, multiplier: Mapping[str, float] | None, source: Source
) -> pd.DataFrame:
    if not multiplier or "volume" not in raw:
        return raw
    lot = raw["instrument"].map(multiplier)
    if lot.isna().any():
        raise ValueError(
            f"source `{source.name}`: `multiplier` lacks "
            f"{sorted(raw['instrument'][lot.isna()].unique())[:5]}; give it, or leave "
            "the products out by `products`."
        )
    return raw.assign(volume=raw["volume"] * lot)


def _rule(given: Mapping[str, Any] | None, source: Source) -> dict[str, Any]:
    rule = {**_ROLLS, **(given or {})}
    right = (
        set(rule) == set(_ROLLS)
        and isinstance(rule["rise"], int | float)
        and rule["rise"] > 0
        and isinstance(rule["apart"], int)
        and rule["apart"] >= 1
        and isinstance(rule["months"], list)
        and set(rule["months"]) <= set(range(1, 13))
    )
    if not right:
        raise ValueError(
            f"source `{source.name}`: `rolls` must be {{rise: share above 0, months: "
            f"[1 to 12], apart: trading days}}, got {dict(given or {})!r}."
        )
    return rule


def _detected(
    bars: pd.DataFrame, rule: Mapping[str, Any], source: Source, report: Report
) -> np.ndarray:
    """Roll days of unnamed contracts, sorted bars."""
    product = bars["instrument"]
    held = bars[_OI].where(bars[_OI] > 0)
    jump = (held / held.groupby(product).shift() - 1).to_numpy()
    rises = jump >= rule["rise"]
    within = bars["date"].dt.month.isin(rule["months"]).to_numpy()
    place = bars.groupby(product).cumcount().to_numpy()
    roll = np.zeros(len(bars), dtype=bool)
    last: dict[str, int] = {}
    for row in map(int, np.flatnonzero(rises & within)):
        name = str(product.iat[row])
        if place[row] - last.get(name, -rule["apart"]) >= rule["apart"]:
            roll[row], last[name] = True, int(place[row])
    left = rises & ~roll
    if left.any():
        report.add(
            "warning", "open interest jumps", source.name,
            f"the open interest rises by {rule['rise']:.0%} or more outside the rule "
            "for rolls: taken for new positions, so a roll's gap would be a return",
            bars[left].assign(rise=jump[left]), columns=["instrument", "date", "rise"],
        )  # fmt: skip
    return roll


def _of_contracts(raw: pd.DataFrame, source: Source, report: Report) -> pd.DataFrame:
    """Rows of the contract that counts, with its own close before, and the rolls."""
    if raw["contract"].isna().any():
        row = raw[raw["contract"].isna()].iloc[0]
        raise ValueError(
            f"source `{source.name}`: no contract on {row['date']:%Y-%m-%d} "
            f"({row['instrument']})."
        )
    raw = raw.assign(delivery=_delivery(raw["contract"], raw["date"], source))
    named = raw["instrument"] + " " + raw["delivery"].astype(str)
    rows = checks.drop_duplicates(
        raw.assign(product=raw["instrument"], instrument=named), source.name, report
    )
    rows["instrument"] = rows.pop("product")
    rows = rows.sort_values(["instrument", "date", "delivery"], ignore_index=True)
    days = rows.groupby("instrument")["date"].rank("dense").astype(int)
    keep = np.concatenate(
        [_main(part, source) for _, part in rows.groupby("instrument", sort=True)]
    )
    bars = rows.loc[keep].assign(_day=days[keep]).reset_index(drop=True)
    every = rows[["instrument", "date"]].drop_duplicates()
    begin = every["instrument"].map(bars.groupby("instrument")["date"].min())
    lost = ~(every["date"] <= begin) & ~pd.MultiIndex.from_frame(every).isin(
        pd.MultiIndex.from_frame(bars[["instrument", "date"]])
    )
    if lost.any():
        report.add(
            "warning", "days without the main contract", source.name,
            "the contract that counts has no row and others have: left out",
            every[lost],
        )  # fmt: skip
    first = ~bars["instrument"].duplicated()
    bars["roll"] = (bars["delivery"] != bars["delivery"].shift()) & ~first
    # The close before is that of the series' last day, or it is not known.
    known = rows.assign(_day=days).set_index(["instrument", "delivery", "_day"])[
        "close"
    ]
    before = bars["_day"].groupby(bars["instrument"]).shift()
    keys = pd.MultiIndex.from_arrays(
        [bars["instrument"], bars["delivery"], before.fillna(-1).astype(int)]
    )
    bars["preclose"] = known.reindex(keys).to_numpy()
    return bars.drop(columns=["_day", "delivery"])


def _main(rows: pd.DataFrame, source: Source) -> np.ndarray:
    """Index of the row that counts on each day of one product."""
    if rows["date"].is_unique:
        back = rows["delivery"].diff() < 0
        if back.any():
            row = rows[back].iloc[0]
            raise ValueError(
                f"source `{source.name}`: {row['instrument']} goes back to an earlier "
                f"contract on {row['date']:%Y-%m-%d} ({row['contract']})."
            )
        return rows.index.to_numpy()
    size = _OI if _OI in rows else "volume"
    if size not in rows:
        raise ValueError(
            f"source `{source.name}` has several contracts a day and neither "
            "`open_interest` nor `volume` to tell which one counts."
        )
    chosen, held = [], -1
    before: dict[int, float] = {}
    ends = rows.groupby("delivery")["date"].max()
    for date, day in rows.groupby("date", sort=True):
        at = dict(zip(day["delivery"], day.index, strict=True))
        if held not in at and held in ends.index and ends[held] > date:
            continue  # a hole in the files is no roll
        later = [c for c in at if c >= held]
        seen = [c for c in later if c in before]
        if seen:
            held = max(seen, key=lambda c: (before[c], -c))
        elif before and later:
            held = min(later)  # what counted has expired
        if held in at:
            chosen.append(at[held])
        before = dict(zip(day["delivery"], day[size].fillna(-1.0), strict=True))
    return np.array(chosen)


def _delivery(contract: pd.Series, date: pd.Series, source: Source) -> pd.Series:
    """Delivery month as year x 100 + month."""
    out = {}
    years = date.dt.year
    pairs = pd.unique(pd.Series(zip(contract, years, strict=True)))
    for text, year in pairs:
        found = re.search(r"(\d{3,4})(?:\.0)?(?:\D*)$", str(text))
        number = found[1] if found else ""
        month = int(number[-2:]) if number else 0
        if not 1 <= month <= 12:
            raise ValueError(
                f"source `{source.name}`: contract {text!r} names no delivery month; "
                "T2403 or 2403 is March 2024."
            )
        if len(number) == 4:
            delivery = 2000 + int(number[:2])
        else:  # Zhengzhou gives the year's last digit
            delivery = next(
                y for y in range(year - 1, year + 9) if y % 10 == int(number[0])
            )
        out[text, year] = 100 * delivery + month
    return pd.Series(
        [out[key] for key in zip(contract, years, strict=True)], index=contract.index
    )


def _settle(bars: pd.DataFrame, source: Source, report: Report) -> None:
    """Fill the close before on rolls that do not know it, in place, and report."""
    before = bars.groupby("instrument")["close"].shift()
    roll = bars["roll"].to_numpy(dtype=bool)
    guessed = roll & bars["preclose"].isna().to_numpy()
    if "contract" not in bars:
        guessed = roll
    bars.loc[guessed, "preclose"] = bars.loc[guessed, "open"]
    wait = bars.groupby("instrument")["date"].diff() > _LONGEST_CLOSURE
    if wait.any():
        report.add(
            "warning", "days are missing", source.name,
            f"no row for more than {_LONGEST_CLOSURE.days} days before these: no "
            "exchange is closed as long, and the move over the gap is one return",
            bars[wait], columns=["instrument", "date"],
        )  # fmt: skip
    gap = bars["preclose"] / before - 1
    if not roll.any():
        report.ok("rolls", source.name)
        return
    exact = int((roll & ~guessed).sum())
    report.add(
        "note", "rolls", source.name,
        f"{exact} roll(s) adjusted by the new contract's own close before, "
        f"{int(guessed.sum())} by its open, which leaves the night's move out",
        bars[roll].assign(gap=gap[roll]), columns=["instrument", "date", "gap"],
    )  # fmt: skip
