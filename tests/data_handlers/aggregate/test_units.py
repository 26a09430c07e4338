import numpy as np
import pandas as pd
import pytest

from data_handlers.aggregate.units import (
    check_units,
    fixed_holidays,
    unexplained_weekdays,
)


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


def days(folder, stocks=6, days=3, **times):
    """A partition of some stocks and days, with columns multiplied."""
    rng = np.random.default_rng(0)
    rows = []
    for k in range(stocks):
        for day in pd.bdate_range("2024-03-04", periods=days):
            price = np.round(10 + rng.normal(0, 0.3, 4), 2)
            row = {"datetime": day, "instrument": f"SZ00000{k}"}
            row |= {"open": price[0], "high": price.max(), "low": price.min()}
            volume = float(rng.integers(1000, 9000) * 100)
            amount = volume * (price.max() + price.min()) / 2
            row |= {"close": price[3], "volume": volume, "amount": amount}
            rows.append(row)
    frame = pd.DataFrame(rows)
    for name, by in times.items():
        frame[name] = frame[name] * by
    return frame


def refused(folder, frame, match):
    frame.to_parquet(folder / "part.parquet")
    with pytest.raises(ValueError, match=match):
        check_units({"2024-03": folder / "part.parquet"}, "a_share")


def test_days_as_traded_are_accepted(tmp_path):
    days(tmp_path).to_parquet(tmp_path / "part.parquet")
    check_units({"2024-03": tmp_path / "part.parquet"}, "a_share")


def test_a_stock_in_another_unit_than_the_others_is_named(tmp_path):
    frame = days(tmp_path)
    frame.loc[frame["instrument"] == "SZ000003", "volume"] /= 100
    refused(tmp_path, frame, "1 of 6 stocks .* SZ000003 is 100 times the price")


def test_a_stock_in_another_unit_is_named_without_amounts_too(tmp_path):
    frame = days(tmp_path, days=10, amount=np.nan)
    prices = ["open", "high", "low", "close"]
    one = frame["instrument"] == "SZ000003"
    fen = frame.copy()
    fen.loc[one, prices] = (fen.loc[one, prices] * 100).round()
    refused(tmp_path, fen, "prices of SZ000003 .* whole numbers")
    lots = frame.copy()
    lots.loc[one, "volume"] /= 100
    refused(tmp_path, lots, "volumes of SZ000003 .* no whole lots")


def test_one_day_in_another_unit_is_named(tmp_path):
    frame = days(tmp_path, stocks=12)
    day = frame["datetime"] == "2024-03-05"
    one = day & (frame["instrument"] == "SZ000003")
    prices = ["open", "high", "low", "close"]
    money = frame.copy()
    money.loc[one, "amount"] /= 1e4
    refused(tmp_path, money, "SZ000003 2024-03-05 .* power of ten off the price")
    fen = frame.copy()
    fen.loc[one, [*prices, "amount"]] *= 100
    refused(tmp_path, fen, "price of SZ000003 is .* on 2024-03-05, as no split is")
    lots = frame.assign(amount=np.nan)
    lots.loc[day, "volume"] /= 100
    refused(tmp_path, lots, "on 2024-03-05 the volume of the median stock is 0.0")
    frame[day].to_parquet(tmp_path / "b.parquet")
    fen[fen["datetime"] == "2024-03-06"].to_parquet(tmp_path / "c.parquet")
    check_units({k: tmp_path / f"{k}.parquet" for k in "bc"}, "a_share")
    fen[day].to_parquet(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="SZ000003"):
        check_units({k: tmp_path / f"{k}.parquet" for k in "bc"}, "a_share")


def test_volumes_of_all_in_lots_are_doubted_without_amounts(tmp_path):
    frame = days(tmp_path, stocks=10, amount=np.nan)
    part = {"2024-03": tmp_path / "part.parquet"}
    frame.to_parquet(part["2024-03"])
    assert check_units(part, "a_share") == {}
    frame.assign(volume=frame["volume"] / 100).to_parquet(part["2024-03"])
    ((what, keys),) = check_units(part, "a_share").items()
    assert "volumes in lots" in what and keys == ["2024-03"]


def test_bars_of_another_code_on_later_days_are_refused(tmp_path):
    frame = days(tmp_path, days=5)
    copy = frame[frame["instrument"] == "SZ000001"].assign(instrument="SZ000002")
    copy["datetime"] += pd.tseries.offsets.BDay()
    kept = frame[frame["instrument"] != "SZ000002"]
    both = pd.concat([kept, copy[copy["datetime"] <= frame["datetime"].max()]])
    refused(tmp_path, both, "SZ000002 has the bars of SZ000001, 1 day.* on 4 days")


def test_adjusted_prices_beside_raw_amounts_are_refused(tmp_path):
    times = dict.fromkeys(["open", "high", "low", "close"], 0.4)
    refused(tmp_path, days(tmp_path, **times), "outside low to high on 100%")


def test_a_day_once_more_is_refused_within_and_between_partitions(tmp_path):
    frame = days(tmp_path)
    first, second, _ = sorted(frame["datetime"].unique())
    copy = frame[frame["datetime"] == first].assign(datetime=second)
    kept = frame[frame["datetime"] != second]
    refused(tmp_path, pd.concat([kept, copy]), "2024-03-05 are those .* in 6 of 6")
    files = {}
    for day, part in (("a", kept[kept["datetime"] == first]), ("b", copy)):
        files[day] = tmp_path / f"{day}.parquet"
        part.to_parquet(files[day])
    with pytest.raises(ValueError, match="2024-03-05 are those"):
        check_units(files, "a_share")


@pytest.mark.parametrize("times, unit", [(100, "fen"), (1000, "li"), (10_000, "e4")])
def test_the_unit_of_prices_is_told_by_their_tick(tmp_path, times, unit):
    frame = days(tmp_path, stocks=30).drop(columns=["volume", "amount"])
    for name in ("open", "high", "low", "close"):
        frame[name] = (frame[name] * times).round()
    frame = frame.assign(volume=np.nan, amount=np.nan)
    refused(tmp_path, frame, rf"units: \{{price: {unit}\}}")


def test_single_days_around_the_spring_festival_are_no_holiday():
    festival = pd.bdate_range("2019-02-04", "2019-02-08")
    days = pd.DatetimeIndex(["2019-01-22", "2019-01-23", *festival, "2019-02-19"])
    found = unexplained_weekdays(days)
    assert found.tolist() == [True, True, *[False] * 5, True]
    of_2008 = pd.to_datetime(["2008-02-06", "2008-02-07", "2008-02-08", "2008-02-11"])
    assert not unexplained_weekdays(of_2008).any()  # a weekend between
    assert not len(unexplained_weekdays(pd.DatetimeIndex([])))


def like_real(folder):
    """Nine stocks of unlike prices over eight days, and the store's day bars."""
    frame = days(folder, stocks=9, days=8)
    level = frame["instrument"].map({f"SZ00000{k}": 1.5**k for k in range(9)})
    for name in ("open", "high", "low", "close", "amount"):
        frame[name] = frame[name] * level
    return frame, frame.set_index(["datetime", "instrument"])[["close", "volume"]]


def swap(frame, rows):
    codes = {"SZ000003": "SZ000006", "SZ000006": "SZ000003"}
    return frame.assign(
        instrument=frame["instrument"].where(~rows, frame["instrument"].replace(codes))
    )


def test_codes_and_days_that_change_places_are_refused(tmp_path):
    frame, daily = like_real(tmp_path)
    when = sorted(frame["datetime"].unique())
    file = {"2024-03": tmp_path / "part.parquet"}
    frame.to_parquet(file["2024-03"])
    assert check_units(file, "a_share", daily) == {}
    late = swap(frame, frame["datetime"] >= when[5])
    refused(tmp_path, late, "SZ000003 and SZ000006 change places on 2024-03-11")
    whole = swap(frame, frame["datetime"] >= when[0])
    whole.to_parquet(file["2024-03"])
    (told,) = check_units(file, "a_share", daily).values()
    assert len(told) == 16 and told[0] == "SZ000006 2024-03-04"
    again = frame[frame["datetime"] == when[2]].assign(datetime=when[6])
    again = pd.concat([frame[frame["datetime"] != when[6]], again])
    refused(tmp_path, again, "bars of 2024-03-12 are those of an earlier day again")
    off = frame["datetime"] == when[4]
    one = off & (frame["instrument"] == "SZ000002")
    wrong = frame.assign(close=frame["close"].where(~one, frame["close"] * 1.06))
    wrong.to_parquet(file["2024-03"])
    assert list(check_units(file, "a_share", daily).values()) == [
        ["SZ000002 2024-03-08"]
    ]


def test_a_stock_in_another_unit_than_the_store_is_named(tmp_path):
    frame, daily = like_real(tmp_path)
    one = frame["instrument"] == "SZ000004"
    for name in ("volume", "amount"):
        frame[name] = frame[name].where(~one, frame[name] / 100)
    frame.to_parquet(tmp_path / "part.parquet")
    with pytest.raises(ValueError, match=r"every volume of SZ000004 .* is 0.01 times"):
        check_units({"2024-03": tmp_path / "part.parquet"}, "a_share", daily)


def test_a_stock_whose_prices_stand_still_is_named_by_its_amounts(tmp_path):
    frame = days(tmp_path)
    still = frame["instrument"] == "SZ000004"
    for name in ("open", "high", "low", "close"):
        frame[name] = frame[name].where(~still, 17.0)
    refused(tmp_path, frame, "amount / volume of SZ000004 lies outside low to high")


def test_days_on_which_a_shares_never_trade():
    days = pd.DatetimeIndex(["2020-01-01", "2020-05-01", "2019-10-03", "2019-10-08"])
    assert fixed_holidays(days).tolist() == [True, True, True, False]
