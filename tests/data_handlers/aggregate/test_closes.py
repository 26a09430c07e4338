import numpy as np
import pandas as pd
import pytest

from data_handlers.aggregate.closes import Closes

DAYS = pd.bdate_range("2020-01-01", periods=60)
NAMES = [f"SH60000{i}" for i in range(8)]


def store(days=DAYS, seed=0):
    moves = np.random.default_rng(seed).normal(0, 0.02, (len(days), len(NAMES)))
    price = np.round(np.exp(np.linspace(1.0, 4.0, len(NAMES)) + moves.cumsum(0)), 2)
    wide = pd.DataFrame(price, days, pd.Index(NAMES, name="instrument"))
    return wide.rename_axis("datetime").stack().to_frame("close")


def rows(daily):
    return daily.reset_index().astype({"instrument": object})


def checked(daily, *parts):
    closes = Closes(daily)
    for part in parts:
        closes.add(part)
    return closes.check()


def late(part, by=1):
    """The bars of each day under the date of another."""
    place = DAYS.get_indexer(part["datetime"]) + by
    keep = (place >= 0) & (place < len(DAYS))
    return part[keep].assign(datetime=DAYS[place[keep]])


def test_the_stores_own_closes_pass_in_any_parts():
    daily = store()
    own = rows(daily)
    assert checked(daily, own[own["datetime"] < "2020-02-01"], own[::3]) == []
    # what the store does not have, and official closes that are means
    assert checked(daily, own.assign(instrument="SZ000001")) == []
    near = own.assign(close=own["close"] * np.tile([1.002, 0.998], len(own) // 2))
    assert checked(daily, near) == []


def test_single_days_of_another_close_are_told():
    daily = store()
    odd = rows(daily)
    odd.loc[[5, 77], "close"] *= 1.2
    assert checked(daily, odd) == [
        f"{odd.instrument[i]} {odd.datetime[i]:%Y-%m-%d}" for i in (5, 77)
    ]


@pytest.mark.parametrize(("by", "away"), [(1, "before"), (-1, "after")])
def test_a_day_late_or_early_is_refused(by, away):
    daily = store()
    match = rf"the stock-days end at the store's closes of the day {away} \(\d+ of"
    with pytest.raises(ValueError, match=match):
        checked(daily, late(rows(daily), by))


def test_a_single_stock_a_day_late_is_refused():
    daily = store()
    own = rows(daily)
    one = own["instrument"] == NAMES[2]
    match = f"the days of {NAMES[2]} end at the store's closes of the day before"
    with pytest.raises(ValueError, match=match):
        checked(daily, own[~one], late(own[one]))


def test_two_stocks_under_each_others_codes_are_refused():
    daily = store()
    own = rows(daily)
    other = {NAMES[0]: NAMES[5], NAMES[5]: NAMES[0]}
    swapped = own.assign(instrument=own["instrument"].replace(other))
    with pytest.raises(ValueError, match=f"{NAMES[0]} ends at .* of {NAMES[5]} on"):
        checked(daily, swapped)


def test_days_of_another_year_are_refused():
    daily, other = store(), store(seed=1)
    with pytest.raises(ValueError, match=r"more than 3% off the store's closes"):
        checked(daily, rows(other))


def test_a_price_that_stands_still_is_not_late():
    daily = store()
    daily["close"] = 10.0
    assert checked(daily, rows(daily)) == []
