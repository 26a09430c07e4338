"""Rows of daily_cn_all.parquet, whose columns are whole numbers, as a store's bars."""

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
