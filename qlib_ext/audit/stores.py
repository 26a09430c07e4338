"""Copies of a Qlib day store with another future, or none.

A copy holds a sample of the stocks. All copies are written by the same writer from the
same numbers, so whatever differs between two of them lies after the day they part.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from qlib_ext.ingest.store import (
    read_bars,
    read_calendar,
    read_industry_names,
    read_instruments,
    write_store,
)

__all__ = ["KINDS", "SPIKE", "StoreCopies", "is_simulated"]

KINDS = {
    "full": "the store as it is",
    "cut": "nothing after the day",
    "noise": "every number after the day changed, the same rows",
    "members": "other index members after the day, and stocks that leave on it",
    "spike": "prices of the day raised by a tenth",
    "rescaled": "every stock's prices times a power of two of its own",
}
SPIKE = 1.1
_PRICE = re.compile(r"^(adj_?)?(open|high|low|close|vwap)$")
_LEVEL = re.compile(r"^(adj_?)?(open|high|low|close|vwap|pre_?close|.*limit.*)$")
_OURS = {"calendars", "instruments", "features", "tables", "meta.json"}
# When a row of a table became known: the first of these columns that it has, else the
# latest of its dates.
_KNOWN = ("announced", "ann_date", "publish_date", "datetime", "date", "start")


class StoreCopies:
    """Copies of one store, made at first use.

    Parameters
    ----------
    source : Path
        Qlib day store.
    folder : Path
        Where the copies go; copies of the same source that lie there are used.
    day : Timestamp
        Trading day on which the copies part; see `KINDS`.
    stocks : sequence of str, optional
        Codes to keep; None keeps all. Indices (bins, but not in market `all`) stay.
    seed : int, default 0
        Of the noise.
    bars : DataFrame, optional
        `bars` of other copies of the same sample, read once for both.

    Attributes
    ----------
    left_alone : list of str
        What of the source could not be cut and was copied as it is.
    """

    def __init__(
        self,
        source: Path,
        folder: Path,
        day: pd.Timestamp,
        stocks: Sequence[str] | None = None,
        seed: int = 0,
        bars: pd.DataFrame | None = None,
    ) -> None:
        self.source = Path(source)
        self.folder = Path(folder)
        self.day = pd.Timestamp(day)
        self.seed = seed
        self.calendar = read_calendar(self.source)
        every = sorted(f.name.upper() for f in (self.source / "features").iterdir())
        listed = read_instruments(self.source)
        self.indices = sorted(set(every) - set(listed["instrument"]))
        keep = set(listed["instrument"]) if stocks is None else set(stocks)
        self.stocks = sorted(keep & set(every))
        self.markets = {
            file.stem: spans[spans["instrument"].isin(keep)].reset_index(drop=True)
            for file in sorted((self.source / "instruments").glob("*.txt"))
            for spans in [read_instruments(self.source, file.stem)]
        }
        last = self.calendar[-1]
        for spans in self.markets.values():
            # Vendors write ends far in the future; a day beyond the data is the last.
            spans["end"] = spans["end"].where(spans["end"] <= last, last)
        self.left_alone: list[str] = []
        self._bars = bars
        self._made: dict[str, Path] = {}

    @property
    def bars(self) -> pd.DataFrame:
        """Bars of the kept stocks and the indices, as `write_store` takes them."""
        if self._bars is None:
            self._bars = read_bars(self.source, [*self.stocks, *self.indices])
        return self._bars

    def path(self, kind: str) -> Path:
        """Directory of a copy; see `KINDS`."""
        if kind not in self._made:
            out = self.folder / kind
            done = self.folder / f".{kind}"
            if not done.exists():
                self._write(kind, out)
                done.touch()
            self._made[kind] = out
        return self._made[kind]

    def alive(self, day: pd.Timestamp) -> list[str]:
        """Kept stocks with a bar on or after `day`."""
        bars = self.bars
        late = bars.loc[bars["datetime"] >= day, "instrument"]
        return sorted(set(late) & set(self.stocks))

    # ---- the kinds -----------------------------------------------------------------

    def _write(self, kind: str, out: Path) -> None:
        rng = np.random.default_rng([self.seed, list(KINDS).index(kind)])
        bars, markets, calendar = self.bars, dict(self.markets), self.calendar
        later = (bars["datetime"] > self.day).to_numpy()
        if kind == "cut":
            bars = bars[~later]
            calendar = calendar[calendar <= self.day]
            markets = {k: _until(v, self.day) for k, v in markets.items()}
        elif kind == "noise":
            bars = _noisy(bars, later, rng)
        elif kind == "members":
            gone = self._leavers(rng)
            bars = bars[~(later & bars["instrument"].isin(gone).to_numpy())]
            markets = {k: self._reshuffled(k, v, gone, rng) for k, v in markets.items()}
        elif kind == "spike":
            bars = bars.copy()
            today = (bars["datetime"] == self.day).to_numpy()
            today &= bars["instrument"].isin(self.stocks).to_numpy()
            for field in bars.columns:
                if _PRICE.match(field):
                    bars.loc[today, field] = bars.loc[today, field] * SPIKE
        elif kind == "rescaled":
            bars = _rescaled(bars, rng)
        present = set(bars["instrument"])
        markets = {
            k: v[v["instrument"].isin(present)] for k, v in markets.items() if len(v)
        }
        write_store(
            out,
            bars,
            markets=markets,
            index_codes=[code for code in self.indices if code in present],
            industry_names=read_industry_names(self.source),
            calendar=calendar,
        )
        self._write_files(kind, out, rng)

    def _leavers(self, rng: np.random.Generator) -> list[str]:
        """Draw a fifth of the stocks that live on after the day."""
        living = self.alive(self.day + pd.Timedelta(days=1))
        count = max(1, len(living) // 5) if len(living) > 2 else 0
        return sorted(rng.choice(living, size=count, replace=False)) if count else []

    def _reshuffled(self, market, spans, gone, rng) -> pd.DataFrame:
        past = _until(spans, self.day)
        after = self.calendar[self.calendar > self.day]
        if market == "all":
            later = spans[~spans["instrument"].isin(gone)]
            return pd.concat(
                [later, past[past["instrument"].isin(gone)]], ignore_index=True
            )
        count = int((spans["end"] > self.day).sum())
        living = (
            [c for c in self.alive(after[0]) if c not in gone] if len(after) else []
        )
        if not count or not living:
            return past
        drawn = rng.choice(living, size=min(count, len(living)), replace=False)
        new = pd.DataFrame(
            {"instrument": sorted(drawn), "start": after[0], "end": after[-1]}
        )
        return pd.concat([past, new], ignore_index=True)

    # ---- tables beside the bins ----------------------------------------------------

    def _write_files(self, kind: str, out: Path, rng: np.random.Generator) -> None:
        for path in sorted(self.source.iterdir()):
            name = path.name
            if name.startswith(".") or name.startswith("ingest_report"):
                continue
            if name == "tables" or (name not in _OURS and _is_parquet_folder(path)):
                for file in sorted(path.glob("*")):
                    target = out / name / file.name
                    target.parent.mkdir(exist_ok=True)
                    if file.suffix == ".parquet":
                        self._write_table(kind, file, target, rng)
                    elif not target.exists():
                        _copy(file, target)
            elif name not in _OURS:
                _copy(path, out / name)
                if name not in self.left_alone:
                    self.left_alone.append(name)

    def _write_table(self, kind, file: Path, target: Path, rng) -> None:
        table = pq.read_table(file)
        frame = table.to_pandas()
        frame = frame.reset_index() if frame.index.names != [None] else frame
        keep = np.ones(len(frame), bool)
        if "instrument" in frame:
            keep &= frame["instrument"].isin(self.stocks).to_numpy()
        known = known_date(frame)
        if known is None:
            note = f"{file.parent.name}/{file.name}"
            if note not in self.left_alone:
                self.left_alone.append(note)
        elif kind == "cut":
            keep &= (known <= self.day).to_numpy()
        elif kind == "noise":
            later = (known > self.day).to_numpy()
            for name in frame.columns:
                if frame[name].dtype.kind == "f":
                    values = frame[name].to_numpy(copy=True)
                    values[later] *= np.exp(0.3 * rng.normal(size=later.sum()))
                    values = values.astype(frame[name].to_numpy().dtype)
                    at = table.schema.get_field_index(name)
                    field = table.schema.field(at)
                    column = pa.array(values, type=field.type, from_pandas=True)
                    table = table.set_column(at, field, column)
        # Filtered by Arrow, so that a table without rows keeps its types.
        pq.write_table(table.filter(pa.array(keep)), target)


def known_date(frame: pd.DataFrame) -> pd.Series | None:
    """Day on which each row of a table became known; None if it has no dates."""
    dates = [c for c in frame.columns if frame[c].dtype.kind == "M"]
    for name in _KNOWN:
        if name in dates:
            return frame[name]
    return frame[dates].max(axis=1) if dates else None


def _until(spans: pd.DataFrame, day: pd.Timestamp) -> pd.DataFrame:
    spans = spans[spans["start"] <= day].copy()
    spans["end"] = spans["end"].where(spans["end"] <= day, day)
    return spans


def _noisy(bars: pd.DataFrame, later: np.ndarray, rng) -> pd.DataFrame:
    """Other numbers where `later`; codes are exchanged, and NaN stays NaN."""
    bars = bars.copy()
    for field in bars.columns.difference(["datetime", "instrument"]):
        values = bars[field].to_numpy(copy=True)
        old = values[later]
        known = np.isfinite(old)
        if _is_code(old[known]):
            old[known] = rng.permutation(old[known])
        else:
            old[known] *= np.exp(0.3 * rng.normal(size=known.sum()))
        values[later] = old
        bars[field] = values
    _order_prices(bars, later)
    return bars


def adjusted_forward(bars: pd.DataFrame) -> str:
    """Say how it is known that a store's prices are adjusted backwards from its end.

    Empty if the factor begins at 1 and grows, as it was known at the time; or if the
    prices are as traded: whole fens, with the falls of ex-dates in them.
    """
    if "conv_price" in bars:
        return ""  # bonds: full prices of 100 CNY of face value, never adjusted
    if "factor" in bars:
        factor = bars.dropna(subset=["factor"]).groupby("instrument")["factor"]
        first, last = factor.first(), factor.last()
        moves = (factor.max() / factor.min() - 1).abs() > 1e-6
        if moves.any():
            ends = ((last[moves] - 1).abs() < 1e-6).mean()
            starts = ((first[moves] - 1).abs() < 1e-6).mean()
            return (
                f"the factor of {ends:.0%} of the stocks ends at 1"
                if ends > 0.9 and ends > starts
                else ""
            )
        if len(first) and ((first - 1).abs() > 1e-6).mean() > 0.5:
            return ""
    close = bars["close"].dropna()
    fen = (close * 100 - (close * 100).round()).abs() < np.fmax(1e-3, close * 3e-5)
    move = (
        bars.sort_values("datetime")
        .groupby("instrument")["close"]
        .pct_change(fill_method=None)  # type: ignore[call-arg]
    )
    if fen.mean() > 0.99 and (move < -0.25).sum() >= 1:
        return ""
    return "the factor is 1 throughout, or absent, and the prices are not as traded"


def _rescaled(bars: pd.DataFrame, rng) -> pd.DataFrame:
    """Other levels of adjusted prices, the same returns; exact in single precision."""
    bars = bars.copy()
    names = pd.Index(sorted(set(bars["instrument"])))
    power = rng.permutation(np.arange(len(names)) % 5 - 2)
    scale = np.exp2(power)[names.get_indexer(bars["instrument"])]
    moves = "factor" in bars and bars.groupby("instrument")["factor"].nunique().gt(1)
    for name in bars.columns:
        if _LEVEL.match(name) or (name == "factor" and np.any(moves)):
            bars[name] = bars[name] * scale
    return bars


def _order_prices(bars: pd.DataFrame, rows: np.ndarray) -> None:
    """Keep the high above and the low below a bar's other prices."""
    names = [name for name in bars.columns if _PRICE.match(name)]
    if not {"open", "high", "low", "close"} <= set(names):
        return
    prices = np.stack([bars[name].to_numpy()[rows] for name in names])
    for name, bound in (("high", np.fmax.reduce), ("low", np.fmin.reduce)):
        values = bars[name].to_numpy(copy=True)
        known = np.isfinite(values[rows])
        values[rows] = np.where(known, bound(prices), values[rows])
        bars[name] = values


def _is_code(values: np.ndarray) -> bool:
    """Whether numbers look like categories: few different ones, all whole."""
    if not len(values):
        return False
    distinct = np.unique(values)
    return len(distinct) <= 200 and bool((distinct == np.round(distinct)).all())


def _is_parquet_folder(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.parquet"))


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def is_simulated(store: Path) -> bool:
    """Whether `qlib-ext market` made a store."""
    meta = store / "meta.json"
    if not meta.is_file():
        return False
    found = json.loads(meta.read_text(encoding="utf-8"))
    source = found.get("source")
    vendor = source.get("vendor") if isinstance(source, dict) else source
    return vendor == "qlib_ext.market"


def describe(store: Path) -> str:
    """Say what a store holds, from its own description or its calendar."""
    calendar = read_calendar(store)
    span = f"{calendar[0]:%Y-%m-%d} to {calendar[-1]:%Y-%m-%d}"
    meta = store / "meta.json"
    if meta.is_file():
        found = json.loads(meta.read_text(encoding="utf-8"))
        return f"{found.get('instruments', '?')} stocks, {span}"
    return f"{len(set(read_instruments(store)['instrument']))} stocks, {span}"
