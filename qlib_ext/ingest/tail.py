"""Compare an update with the end of its store, because appended days stay for good.

Each new day must look like the days before it: other bars than theirs, about their
levels, their order of volumes, their fields, and no trading day missing between.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from data_handlers.vendor.mapping import FIELD_ROLES, VendorMapping
from qlib_ext.ingest.checks import LEVELS, off_by_powers
from qlib_ext.ingest.report import Report
from qlib_ext.ingest.store import read_bars

__all__ = ["check_factor", "check_tail"]

DAYS = 10  # of the store that count as its end
STOCKS = 600  # at most so many are compared, evenly spread
_AT_LIMIT = 0.005  # a limit is of the fen
_BAR = ["open", "high", "low", "close"]


def check_tail(
    root: Path,
    new: pd.DataFrame,
    stocks: pd.Index,
    end: pd.Timestamp,
    calendar: pd.DatetimeIndex,
    plan: VendorMapping,
    source: str,
    report: Report,
) -> None:
    """Refuse new days that are copies, or of another unit, order or set of fields.

    Parameters
    ----------
    root : Path
        The store.
    new : DataFrame
        Bars of new days in the store's units, with its stocks and perhaps others.
    stocks : Index
        Stocks of the store that traded lately.
    end : Timestamp
        Last day of the store.
    calendar : DatetimeIndex
        Days of the store.
    plan : VendorMapping
        Which fields the files can give.
    source : str
        Name for the findings.
    report : Report
        Receives the findings.
    """
    names = sorted(set(stocks) & set(new["instrument"]))
    names = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, STOCKS, dtype=int))] if names else []  # fmt: skip # noqa: E501
    new = new[(new["datetime"] > end) & new["instrument"].isin(names)]
    if new.empty:
        return
    roles = {role for s in plan.sources for role in s.columns}
    given = [f for f in FIELD_ROLES if f in roles or f in ("vwap", "market_cap")]
    # limits of those days the vendor may publish late; all others come with the bar
    fields = list(
        dict.fromkeys([*_BAR, "volume", "amount", "turnover", "factor", *given])
    )
    old = read_bars(root, names, fields)
    old = old[old["datetime"] >= calendar[-min(DAYS, len(calendar))]]
    _lost_fields(old, new, source, report)
    new = new[new["close"].notna()]
    old = old[old["close"].notna()] if "close" in old else old.iloc[:0]
    if new.empty or old.empty:
        return
    _repeated(old, new, source, report)
    _levels(old, new, source, report)
    _steps(old, new, source, report)
    _moves(old, new, source, report)
    _opens(old, new, source, report)
    _ranks(old, new, source, report)


def _lost_fields(
    old: pd.DataFrame, new: pd.DataFrame, source: str, report: Report
) -> None:
    check = "lost fields"
    rows = []
    traded = new["close"].notna()
    for name in old.columns.drop(["datetime", "instrument"]):
        before = float(old[name].notna().mean())
        after = float(new.loc[traded, name].notna().mean()) if name in new else 0.0
        if before > 0.2 and after < 0.5 * before:
            rows.append((name, before, after))
    if not rows:
        report.ok(check, source)
        return
    report.add(
        "error", check, source,
        "fields that the store has are missing in the new files, and would be unknown "
        f"on these days for good: {', '.join(r[0] for r in rows)}",
        pd.DataFrame(rows, columns=["field", "known_in_store", "known_in_update"]),
    )  # fmt: skip


def _repeated(
    old: pd.DataFrame, new: pd.DataFrame, source: str, report: Report
) -> None:
    check = "repeated bars"
    keys = [c for c in (*_BAR, "volume") if c in old and c in new]
    both = pd.concat([old, new])[["datetime", "instrument", *keys]]
    both = both.sort_values("datetime", kind="stable")
    rounded = both[keys].apply(lambda c: np.round(np.log(c.where(c > 0)), 5))
    rounded["instrument"] = both["instrument"]
    again = rounded.duplicated() & (both["datetime"] > old["datetime"].max())
    share = again.groupby(both["datetime"]).mean()
    count = again.groupby(both["datetime"]).sum()
    least = 0.2 if "volume" in keys else 0.5
    bad = (share > least) & (count >= min(3, new["instrument"].nunique()))
    if bad.any():
        report.add(
            "error", check, source,
            "bars are those of an earlier day under a new date",
            pd.DataFrame({"date": share.index, "equal": share, "stocks": count})[bad],
        )  # fmt: skip
    else:
        report.ok(check, source)


def _levels(old: pd.DataFrame, new: pd.DataFrame, source: str, report: Report) -> None:
    check = "levels"
    rows = []
    for name, most in LEVELS.items():
        if name not in old or name not in new:
            continue
        price = most < 2
        was = old[["instrument", "datetime", name]]
        now = new[["instrument", "datetime", name]]
        with np.errstate(divide="ignore", invalid="ignore"):
            group = was.groupby("instrument")[name]
            usual = np.log(group.last() if price else group.median())
            # from day to day, or a slow rise over a long update would count
            log = np.log(now[name]) - now["instrument"].map(usual)
        table = pd.DataFrame({"date": now["datetime"], "log": log})
        table = table[np.isfinite(table["log"])]
        if price:
            wide = table.assign(instrument=now["instrument"]).pivot(
                index="date", columns="instrument", values="log"
            )
            step = wide.ffill().diff()
            step.iloc[0] = wide.iloc[0]
            middle, count = step.median(axis=1), step.notna().sum(axis=1)
            far = (step.abs() > np.log(5.0)).mean(axis=1)
        else:
            by = table.groupby("date")["log"]
            middle, count = by.median(), by.size()
            # a bar of one price is locked at its limit, with next to no volume
            moves = (new["high"] > new["low"])[table.index]
            far = (moves & (table["log"].abs() > np.log(20.0))).groupby(table["date"])
            far = far.mean()
        bad = (count >= (3 if price else 5)) & (
            (middle.abs() > np.log(most)) | (far > 0.2)
        )
        rows += [
            (day, name, float(np.exp(middle[day])), int(count[day]))
            for day in bad.index[bad]
        ]
    if not rows:
        report.ok(check, source)
        return
    frame = pd.DataFrame(rows, columns=["date", "field", "times_the_store", "stocks"])
    worst = frame.drop_duplicates("field")
    text = ", ".join(
        f"{r.field} x {r.times_the_store:.3g}" for r in worst.itertuples(index=False)
    )
    report.add(
        "error", check, source,
        f"the median stock is far off its own last {DAYS} days: {text}. Another unit, "
        "or changed `units` in the mapping?",
        frame.sort_values(["date", "field"]),
    )  # fmt: skip


def _steps(old: pd.DataFrame, new: pd.DataFrame, source: str, report: Report) -> None:
    """Refuse single stocks whose prices or sizes change by a power of ten."""
    check = "levels"
    both = pd.concat([old, new]).sort_values(["instrument", "datetime"], kind="stable")
    both = both.reset_index(drop=True)
    found = []
    for what, over in (
        ("close", "factor"), ("volume", "turnover"), ("market_cap", "close")
    ):  # fmt: skip
        if not {what, over, "factor"} <= set(both) or both[over].isna().all():
            continue
        # as traded: what the factor takes back is another unit too
        value = both[what] / both[over].where(both[over] > 0)
        if over != "factor":
            value = value * both["factor"]
        odd = off_by_powers(value, both["instrument"], leaps=True)
        odd &= (both["datetime"] > old["datetime"].max()).to_numpy()
        rows = both.loc[odd, ["datetime", "instrument", *{what, over}]]
        found.append(rows.rename(columns={"datetime": "date"}))
    rows = pd.concat(found) if found else pd.DataFrame()
    if rows.empty:
        return
    report.add(
        "error", check, source,
        f"{rows['instrument'].nunique()} stock(s) are a power of ten off their own "
        "last days: another unit, such as fen or lots? Mend these rows", rows,
    )  # fmt: skip


def _moves(old: pd.DataFrame, new: pd.DataFrame, source: str, report: Report) -> None:
    """Refuse returns that spread far wider than before: permuted codes."""
    check = "moves"
    both = pd.concat([old, new])[["datetime", "instrument", "close"]]
    wide = both.pivot(index="datetime", columns="instrument", values="close")
    log = wide.where(wide > 0).ffill().transform(np.log).diff()
    log = log.where(wide.notna())
    spread = log.sub(log.median(axis=1), axis=0).abs().median(axis=1)
    count = log.notna().sum(axis=1)
    late = spread.index > old["datetime"].max()
    usual = float(spread[~late].median())
    # half locked at one limit and half at the other are 0.1 apart
    bad = late & (count >= 5).to_numpy() & (spread > max(0.12, 8 * usual)).to_numpy()
    if not np.isfinite(usual) or not bad.any():
        report.ok(check, source)
        return
    report.add(
        "error", check, source,
        f"returns spread {spread[bad].max() / max(usual, 1e-9):.3g} times as wide as "
        "on the days before: are prices under the right codes?",
        pd.DataFrame({"date": spread.index, "spread": spread, "usual": usual})[bad],
    )  # fmt: skip


def _opens(old: pd.DataFrame, new: pd.DataFrame, source: str, report: Report) -> None:
    """Refuse new days whose opens are closes, by the closes before them."""
    check = "open and close"
    if not {"open", "close"} <= set(old):
        return
    last = old.sort_values("datetime").groupby("instrument")["close"].last()
    first = new.sort_values("datetime").groupby("instrument")[["open", "close"]].first()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = first.div(last.reindex(first.index), axis=0)
        moves = pd.DataFrame(np.log(ratio)).abs().dropna()
    gap, move = moves["open"].median(), moves["close"].median()
    if len(moves) < 20 or not gap > 2.5 * move:
        report.ok(check, source)
        return
    report.add(
        "error", check, source, "opens of the first new day lie farther from the last "
        f"closes ({gap:.2%} at the median) than its closes ({move:.2%}): are the two "
        "columns swapped?", count=len(moves),
    )  # fmt: skip


def _ranks(old: pd.DataFrame, new: pd.DataFrame, source: str, report: Report) -> None:
    """Refuse another order of stocks by volume than on the days before."""
    check = "ranks"
    name = next((c for c in ("amount", "volume") if c in old and c in new), None)
    if name is None or new["instrument"].nunique() < 10:
        return
    both = pd.concat([old, new]).sort_values("datetime", kind="stable")
    wide = both[~_locked(both)].pivot(
        index="datetime", columns="instrument", values=name
    )
    # against the days just before, since orders drift over a long update
    usual = wide.shift().rolling(DAYS, min_periods=1).median()
    enough = (wide.notna() & usual.notna()).sum(axis=1) >= 10
    corr = wide[enough].rank(axis=1).corrwith(usual[enough].rank(axis=1), axis=1)
    late = corr.index > old["datetime"].max()
    # each day of the store against a median that holds it would look too good
    had = wide[wide.index <= old["datetime"].max()]
    own = [
        had.loc[day].rank().corr(had.drop(index=day).median().rank(), min_periods=10)
        for day in had.index
    ] if len(had) > 2 else []  # fmt: skip
    typical = float(pd.Series(own, dtype=float).median())
    bad = late & (corr < typical - 0.6).to_numpy()
    if not typical > 0.5 or not bad.any():
        report.ok(check, source)
        return
    report.add(
        "error", check, source,
        f"the order of the stocks by {name} has a correlation of "
        f"{float(corr[bad].min()):.2f} with that of the store's last days, where days "
        f"have {typical:.2f} among themselves: are the rows under the right codes?",
        pd.DataFrame({"date": corr.index, "correlation": corr, "usual": typical})[bad],
    )  # fmt: skip


def _locked(bars: pd.DataFrame) -> pd.Series:
    """Rows that end at a limit, where volumes say what was left to trade."""
    move = (bars["close"] / bars.groupby("instrument")["close"].shift() - 1).abs()
    near = sum((move - limit).abs() < _AT_LIMIT for limit in (0.05, 0.1, 0.2)) > 0
    edge = (bars["close"] <= bars["low"]) | (bars["close"] >= bars["high"])
    return near & edge


def check_factor(
    bars: pd.DataFrame,
    raw: pd.DataFrame,
    known: np.ndarray,
    plan: VendorMapping,
    source: str,
    report: Report,
) -> np.ndarray:
    """Refuse new rows whose return the same files contradict; return rows to leave out.

    Our return comes from the published factor; the previous close that goes with the
    day (ex-right) and the percent change of adjusted prices say what it was.

    Parameters
    ----------
    bars, raw : DataFrame
        Output and input of `convert.stock_bars`.
    known : ndarray of bool
        New rows of stocks that the store has.
    plan : VendorMapping
        What the percent change is of.
    source : str
        Name for the findings.
    report : Report
        Receives the findings.
    """
    check = "factor revised"
    none = np.zeros(len(raw), dtype=bool)
    ours, close = bars["change"].to_numpy(), raw["close"].to_numpy()
    said = np.full(len(raw), np.nan)
    if "pct_change" in raw and plan.pct_change_of == "adjusted":
        said = raw["pct_change"].to_numpy(np.float64)
    if "preclose" in raw:
        with np.errstate(divide="ignore", invalid="ignore"):
            said = np.where(
                np.isnan(said), close / raw["preclose"].to_numpy() - 1, said
            )
    with np.errstate(invalid="ignore"):
        off = known & (np.abs(ours - said) > 0.003 + 0.012 / np.maximum(close, 0.01))
    if not off.any():
        report.ok(check, source)
        return none
    stocks = raw["instrument"].isin(raw.loc[off, "instrument"]).to_numpy() & known
    rows = raw.loc[off, ["instrument", "date"]].assign(
        change_by_factor=ours[off], change_by_vendor=said[off]
    )
    message = (
        f"{rows['instrument'].nunique()} stock(s): the return by the factor is not "
        "that of the previous close or percent change in the same files. The factor "
        "was revised since the last update; rebuild with --overwrite"
    )
    if check in report.accept:
        report.add("error", check, source, message, rows)
        return none
    return report.bad_rows(
        check, source, message, raw, stocks, list(rows), examples=rows
    )
