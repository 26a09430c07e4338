import pandas as pd
import pytest

from data_handlers.aggregate.units import check_units


def stock_day(folder, **prices):
    path = folder / "part.parquet"
    row = {"datetime": pd.Timestamp("2024-03-04"), "instrument": "SZ000001"}
    row |= {"volume": 100.0, "amount": 100.0 * prices["close"], **prices}
    pd.DataFrame([row]).to_parquet(path)
    return {"2024-03-04": path}


def test_whole_prices_that_move_are_in_fen(tmp_path):
    # 10 CNY in fen is a price that one stock may have; its ticks are not.
    day = {"open": 998.0, "high": 1005.0, "low": 995.0, "close": 1003.0}
    with pytest.raises(ValueError, match=r"whole number.*units: \{price: fen\}"):
        check_units(stock_day(tmp_path, **day), "a_share")
    check_units(stock_day(tmp_path, **day), "us")
    check_units(stock_day(tmp_path, **{**day, "open": 998.01}), "a_share")
    check_units(stock_day(tmp_path, **dict.fromkeys(day, 1000.0)), "a_share")
    check_units(stock_day(tmp_path, **{k: v / 100 for k, v in day.items()}), "a_share")
    check_units(stock_day(tmp_path, close=1000.0), "a_share")
