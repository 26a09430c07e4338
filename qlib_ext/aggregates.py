"""`qlib-ext build`: feature stores beside, and their columns inside, a Qlib store.

`data_handlers.aggregate.build` does the work and knows no Qlib store; here its result
meets one: adjustment factors come out of it, chosen columns go into it as bins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from qlib.log import get_module_logger

from data_handlers.aggregate.build import build
from data_handlers.aggregate.minute import MINUTE_NAMES
from data_handlers.aggregate.schema import FLOW_FIELDS
from data_handlers.aggregate.ticks import TICK_NAMES
from data_handlers.loaders import read_daily_parquet
from qlib_ext.ingest.store import (
    add_fields,
    is_store,
    read_bars,
    read_instruments,
    read_meta,
)

__all__ = ["build_store"]

logger = get_module_logger("qlib_ext.build")


def build_store(
    kind: str, source: Path, out: Path, bins: str | None = None, **options: Any
) -> str:
    """Build the features of a store, and write some as bins if asked.

    Parameters
    ----------
    kind, source, out, options
        As in `data_handlers.aggregate.build.build`.
    bins : str, optional
        Comma-separated names, or "all".

    Returns
    -------
    str
        The account of the build, for a terminal.

    Raises
    ------
    ValueError
        For bad input, or `bins` without a Qlib store in `out`.
    """
    names = None if bins is None else _names(kind, bins)
    store = is_store(out)
    if names is not None and not store:
        raise ValueError(
            f"`--bins` needs a Qlib store in {out}; make one with `qlib-ext ingest`, "
            "or leave the option out."
        )
    daily = _daily(out) if store else None
    factors = None
    if kind == "ms" and daily is not None:
        factors = daily.pop("factor")
    report = build(kind, source, out, factors=factors, daily=daily, **options)
    text = report.text()
    if kind == "ms" and factors is None:
        text += (
            "\nnote: the store has no factors: ms_overnight is adjusted only as far as "
            "the bars carry a factor column"
        )
    if names is not None:
        export_bins(kind, out, names, progress=bool(options.get("progress", True)))
        text += f"\n{len(names)} features written as bins: ${names[0]} and so on"
    return text


def export_bins(
    kind: str, store: Path, names: list[str], progress: bool = False
) -> list[str]:
    """Write columns of the yearly files as bins of the same store.

    Bins of these names keep the days that the yearly files do not have, such as those
    of a vendor's table of the flow.

    Returns
    -------
    list of str
        Field names, to be used with `$` in Qlib expressions.
    """
    frame = read_daily_parquet(Path(store) / kind, columns=names).reset_index()
    held = read_bars(store, sorted(set(frame["instrument"])), names)
    if not held.empty:
        others = ~held["datetime"].isin(frame["datetime"].unique())
        frame = pd.concat([held[others], frame], ignore_index=True)
    return add_fields(store, frame, progress=progress)


def _names(kind: str, bins: str) -> list[str]:
    if kind == "bars":
        raise ValueError(
            "`--bins`: the columns of `bars` stay in their yearly files, where "
            "FuturesHandler reads them."
        )
    known = {"ms": MINUTE_NAMES, "l2": TICK_NAMES, "flow": list(FLOW_FIELDS)}[kind]
    if bins.strip() == "all":
        return list(known)
    names = [name.strip().lstrip("$") for name in bins.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"`--bins` names {name!r}; {kind} has {', '.join(known)}.")
    if not names:
        raise ValueError("`--bins` is empty; give names, or all.")
    return names


def _daily(store: Path) -> pd.DataFrame | None:
    """Read factor, unadjusted close, volume and amount by (datetime, instrument).

    None without factors. No close where the vendor adjusted the prices and tells no
    factor: what was traded is not known.
    """
    codes = sorted(set(read_instruments(store)["instrument"]))
    bars = read_bars(store, codes, ["factor", "close", "volume", "amount"])
    if bars.empty or "factor" not in bars or bars["factor"].isna().all():
        return None
    bars = bars.set_index(["datetime", "instrument"]).astype(float)
    # a store of Qlib's own has no such file
    meta = read_meta(store) if (store / "meta.json").is_file() else {}
    if meta.get("adjustment", {}).get("mode") == "adjusted/one":
        bars = bars.drop(columns="close", errors="ignore")
    elif "close" in bars:
        bars["close"] /= bars["factor"]
    if "volume" in bars:
        bars["volume"] *= bars["factor"]
    return bars
