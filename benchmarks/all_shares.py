"""Rows of daily_cn_all.parquet, whose columns are whole numbers, as a store's bars."""

from pathlib import Path

import pandas as pd


def bars_of(raw: pd.DataFrame) -> pd.DataFrame:
    """Make adjusted bars of the rows that traded; volume in adjusted shares, CNY."""
    raw = raw[raw["volume"] > 0]
    bars = pd.DataFrame(
        {"datetime": pd.to_datetime(raw["date"]), "instrument": raw["instrument"]}
    )
    for name in ("open", "high", "low", "close"):
        bars[name] = raw[f"{name}_fen"] / 100 * raw["adj_factor"]
    bars["vwap"] = raw["vwap_e4"] / 1e4 * raw["adj_factor"]
    bars["factor"] = raw["adj_factor"]
    bars["volume"] = raw["volume"] / raw["adj_factor"]
    bars["turnover"] = raw["volume"] / raw["float_shares"]
    bars["market_cap"] = raw["close_fen"] / 100 * raw["total_shares"]
    return bars


def with_industry(bars: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Add the Shenwan industry of level 1 that was in force on each day."""
    history = pd.read_parquet(folder / "industry_sw_history_all.parquet")
    history["industry"] = history["sw_code"].str[:2].astype(float)
    history["datetime"] = history["start_date"].astype("datetime64[ns]")
    bars["datetime"] = bars["datetime"].astype("datetime64[ns]")
    bars["instrument"] = bars["instrument"].astype(object)
    return pd.merge_asof(
        bars.sort_values("datetime"),
        history[["datetime", "instrument", "industry"]].sort_values("datetime"),
        on="datetime",
        by="instrument",
    )
