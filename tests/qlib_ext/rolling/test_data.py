"""Fingerprints of a store: days that come later change nothing, other numbers do."""

import shutil

import numpy as np
import pandas as pd
import pytest

from qlib_ext.ingest.store import read_calendar
from qlib_ext.rolling.data import files_of, fingerprints

ENDS = ["2019-06-28", "2020-06-30", "2020-12-31"]


@pytest.fixture
def store(market, tmp_path, use_store):
    """Twelve stocks, with a yearly Parquet file of 2019 and of 2020."""
    made = tmp_path / "store"
    shutil.copytree(market, made, ignore=lambda folder, names: _some(folder, names))
    days = read_calendar(market)
    for year in (2019, 2020):
        at = days[days.year == year]
        rows = pd.DataFrame({"datetime": at, "instrument": "SH600000", "x": 1.0})
        (made / "ms").mkdir(exist_ok=True)
        rows.to_parquet(made / "ms" / f"{year}.parquet")
    use_store(made)
    return made


def _some(folder, names):
    return sorted(names)[12:] if folder.endswith("features") else []


def edit_bin(store, day, value):
    file = sorted((store / "features").glob("*/close.day.bin"))[3]
    values = np.fromfile(file, "<f4")
    at = read_calendar(store).searchsorted(pd.Timestamp(day))
    values[1 + at - int(values[0])] = value
    values.tofile(file)


def changed(store, before):
    after = fingerprints(str(store), ENDS)
    return [a != b for a, b in zip(before, after, strict=True)]


def test_it_is_the_same_for_the_same_numbers_elsewhere(store, tmp_path):
    shutil.copytree(store, tmp_path / "copy")
    before = fingerprints(str(store), ENDS)
    assert len(set(before)) == 3
    assert changed(tmp_path / "copy", before) == [False, False, False]
    # Nor does it matter which other ends are asked for.
    assert [fingerprints(str(store), [end])[0] for end in ENDS] == before


@pytest.mark.parametrize(
    ("day", "expected"),
    [
        ("2019-03-01", [True, True, True]),
        ("2020-03-02", [False, True, True]),
        ("2020-09-01", [False, False, True]),
    ],
)
def test_a_corrected_value_counts_from_its_day_on(store, day, expected):
    before = fingerprints(str(store), ENDS)
    edit_bin(store, day, 12.34)
    assert changed(store, before) == expected


def test_days_that_are_appended_change_nothing_before(store):
    file = store / "instruments" / "all.txt"
    text = file.read_text()
    before = fingerprints(str(store), ENDS)
    file.write_text(text.replace("2020-12-31", "2021-06-30"))
    assert changed(store, before) == [False, False, False]
    file.write_text(text + "SH699999\t2020-08-03\t2020-12-31\n")
    assert changed(store, before) == [False, False, True]


def test_rows_of_parquet_files_count_by_their_day(store):
    before = fingerprints(str(store), ENDS)
    file = store / "ms" / "2020.parquet"
    rows = pd.read_parquet(file)
    rows.loc[rows["datetime"] > "2020-08-01", "x"] = 2.0
    rows.to_parquet(file)
    assert changed(store, before) == [False, False, True]
    rows = pd.read_parquet(store / "ms" / "2019.parquet")
    rows.loc[rows["datetime"] > "2019-08-01", "x"] = 2.0
    rows.to_parquet(store / "ms" / "2019.parquet")
    assert changed(store, before) == [False, True, True]


def test_files_that_a_workflow_names_are_found(store, tmp_path):
    file = tmp_path / "factors.parquet"
    pd.DataFrame({"x": [1]}).to_parquet(file)
    config = {"kwargs": {"path": str(file), "more": ["{store}/ms", "Ref($close, 1)"]}}
    assert files_of(config) == [file, store / "ms"]
    before = fingerprints(str(store), ENDS, files_of(config))
    pd.DataFrame({"x": [2]}).to_parquet(file)
    after = fingerprints(str(store), ENDS, files_of(config))
    assert all(a != b for a, b in zip(before, after, strict=True))
