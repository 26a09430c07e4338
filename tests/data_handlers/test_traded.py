"""Moves and labels around suspensions, by hand."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from qlib.data import D

from data_handlers.expression.loading import load_groups
from data_handlers.labels import forward_return
from data_handlers.traded import DAILY_RETURN, PREVIOUS_CLOSE
from data_handlers.universe import instrument_spans

DAYS = pd.bdate_range("2024-01-01", periods=9)
NONE = float("nan")
# A is suspended on days 2 to 4 and 6; B is delisted after day 5; C always trades.
CLOSES = {
    "SH600000": [10, 11, NONE, NONE, NONE, 13.2, NONE, 12, 12.6],
    "SH600001": [20, 22, 21, 21, 10.5, 5.25],
    "SH600002": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8],
}


# Always trades, but the store has a volume of 0 for it, as for many an index.
CLOSES["SH000300"] = CLOSES["SH600002"]
# Price and volume of a day without trades; None: the last price, or no volumes at all.
WRITTEN = {
    "missing": (NONE, None),
    "zero": (0.0, None),
    "zero, no volume": (0.0, 0.0),
    "last price": (None, 0.0),
    "tiny volume": (None, 5.9e-39),
}


@pytest.fixture(params=WRITTEN.values(), ids=WRITTEN)
def store(request, tmp_path, use_store):
    """A store of four instruments, with days without trades written in one way."""
    price, volume = request.param
    (tmp_path / "calendars").mkdir()
    (tmp_path / "instruments").mkdir()
    days = [f"{day:%Y-%m-%d}" for day in DAYS]
    (tmp_path / "calendars" / "day.txt").write_text("\n".join(days) + "\n")
    rows = []
    for code, values in CLOSES.items():
        folder = tmp_path / "features" / code.lower()
        folder.mkdir(parents=True)
        closes = pd.Series(values, dtype=float)
        silent = closes.isna()
        closes = closes.ffill() if price is None else closes.fillna(price)
        np.r_[0, closes].astype("<f4").tofile(folder / "close.day.bin")
        if volume is not None:
            volumes = np.where(silent, volume, 0 if code == "SH000300" else 100)
            np.r_[0, volumes].astype("<f4").tofile(folder / "volume.day.bin")
        rows.append(f"{code}\t{days[0]}\t{days[len(values) - 1]}")
    (tmp_path / "instruments" / "all.txt").write_text("\n".join(rows) + "\n")
    use_store(tmp_path)
    return tmp_path


def _values(expression, code, start=0, end=8):
    frame = D.features([code], [expression], DAYS[start], DAYS[end])
    return frame.iloc[:, 0].to_numpy()


def test_a_resumption_has_the_move_over_the_suspension(store):
    expected = [NONE, 0.1, NONE, NONE, NONE, 0.2, NONE, 12 / 13.2 - 1, 0.05]
    np.testing.assert_allclose(
        _values(DAILY_RETURN, "SH600000"), expected, rtol=1e-5, atol=1e-7
    )


def test_the_last_close_does_not_depend_on_where_a_query_begins(store):
    whole = _values(PREVIOUS_CLOSE, "SH600000")
    for start in range(9):
        found = _values(PREVIOUS_CLOSE, "SH600000", start)
        np.testing.assert_array_equal(found, whole[start:])


def test_a_label_is_carried_over_a_suspension_and_a_delisting(store):
    # Horizon 2: bought at t+1, sold at t+3.
    suspended = [
        0.0,  # bought at 11, suspended on day 3: still worth 11
        NONE,  # days 2 to 4 cannot be bought
        NONE,
        NONE,
        12 / 13.2 - 1,
        NONE,
        NONE,  # day 9 is beyond the calendar
        NONE,
        NONE,
    ]
    delisted = [21 / 22 - 1, 10.5 / 21 - 1, 5.25 / 21 - 1, -0.5, 0.0, NONE]
    label = forward_return(2)
    np.testing.assert_allclose(_values(label, "SH600000"), suspended, rtol=1e-5)
    np.testing.assert_allclose(_values(label, "SH600001"), delisted, rtol=1e-5)
    strict = forward_return(2, carry=False)
    assert np.isnan(_values(strict, "SH600000")[0])
    assert np.isnan(_values(strict, "SH600001")[3:]).all()
    # Beyond the end of the calendar nothing is carried, for stocks that trade either.
    for code in ("SH600002", "SH000300"):
        found = _values(label, code)
        assert np.isfinite(found[:6]).all() and np.isnan(found[6:]).all()


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(k, marks=[] if k in (0, 1, 4, 8) else pytest.mark.slow)
        for k in range(9)
    ],
)
def test_the_engine_equals_qlib_whatever_the_first_day(store, first):
    expressions = [DAILY_RETURN, PREVIOUS_CLOSE, forward_return(2), "Traded($close)"]
    names = list("abcd")
    spans = instrument_spans("all")
    ours = load_groups({"x": (expressions, names)}, spans, DAYS[first], DAYS[-1])["x"]
    theirs = D.features(D.instruments("all"), expressions, DAYS[first], DAYS[-1])
    theirs = theirs.set_axis(names, axis=1).swaplevel().reindex(ours.index)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "store",
    [
        pytest.param(v, id=k, marks=[pytest.mark.slow] if k != "missing" else [])
        for k, v in WRITTEN.items()
    ],
    indirect=True,
)
def test_qlib_knows_the_operators_after_another_init(store):
    import qlib

    qlib.init(provider_uri=str(store), kernels=1, custom_ops=[])
    assert np.isfinite(_values(PREVIOUS_CLOSE, "SH600000")[1:]).all()


@pytest.mark.slow
def test_qlib_knows_the_operators_in_new_processes(store):
    from data_handlers.labels import label_config

    job = pickle.dumps((label_config, str(store)))
    code = (
        "import pickle, qlib; from qlib.data import D;"
        f"label_config, store = pickle.loads({job!r});"
        "qlib.init(provider_uri=store, kernels=2, joblib_backend='loky');"
        "f = D.features(['SH600000', 'SH600001'], label_config(2)[0]);"
        "assert f.notna().sum().item() == 7, f"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
