"""What a store of others does differently: spelling, indices, faults, labels."""

import logging

import numpy as np
import pandas as pd
import pytest

from data_handlers.alpha import ExpressionHandler
from data_handlers.day import DayHandler
from data_handlers.fields import require_fields
from data_handlers.handler import FeatureHandler
from data_handlers.labels import given_labels
from data_handlers.universe import instrument_spans, universe
from qlib_ext.report.market_data import load_bars

TIMES = dict(
    start_time="2019-01-01",
    end_time="2019-06-28",
    fit_start_time="2019-01-01",
    fit_end_time="2019-04-30",
)


@pytest.fixture
def foreign(qlib_market, use_store, tmp_path, monkeypatch):
    """Initialise Qlib on a copy of the market whose files a function changes."""

    def make(change):
        store = tmp_path / "store"
        for name in ("calendars", "instruments"):
            (store / name).mkdir(parents=True)
            for file in (qlib_market / name).iterdir():
                text = file.read_text(encoding="utf-8")
                (store / name / file.name).write_text(text, encoding="utf-8")
        (store / "features").mkdir()
        for folder in (qlib_market / "features").iterdir():
            (store / "features" / folder.name).symlink_to(folder)
        change(store)
        use_store(store)
        # `qlib.init` has just told its loggers to stop at the console.
        monkeypatch.setattr(logging.getLogger("qlib"), "propagate", True)
        return store

    return make


def edit(file, change):
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")


def test_lower_case_codes_give_the_same_handler(qlib_market, foreign, caplog):
    expected = DayHandler(**TIMES).fetch(data_key="raw")
    foreign(lambda s: edit(s / "instruments" / "all.txt", str.lower))
    handler = DayHandler(**TIMES)
    assert "in lower case, read in upper case: s" in caplog.text  # sh… or sz…
    pd.testing.assert_frame_equal(handler.fetch(data_key="raw"), expected)
    names = handler.fetch().index.unique("instrument")
    pool = instrument_spans("csi300", "2019-01-01", "2019-06-28")
    assert set(names) & set(pool)  # the pool is found, whose file is in upper case


def test_indices_of_a_market_are_left_out_by_name(foreign, caplog):
    lines = "".join(f"{c}\t2018-01-02\t2020-12-31\n" for c in ("SH000300", "SH000905"))
    foreign(lambda s: edit(s / "instruments" / "all.txt", lambda text: text + lines))
    names = set(DayHandler(**TIMES).fetch().index.unique("instrument"))
    assert not {"SH000300", "SH000905"} & names
    assert "2 of 102 members" in caplog.text
    assert "SH000300, SH000905" in caplog.text
    # A list says what is meant.
    assert universe(["SH000300"]) == ["SH000300"]


def test_universe_without_faults_is_handed_on_as_it_is(qlib_market):
    assert universe("all") == "all"
    assert universe("csi300") == "csi300"
    assert universe(None) is None


def test_a_day_twice_in_the_calendar_is_named(foreign):
    def change(store):
        def twice(text):
            days = text.split("\n")
            return "\n".join([*days[:3], days[2], *days[3:]])

        edit(store / "calendars" / "day.txt", twice)

    store = foreign(change)
    day = (store / "calendars" / "day.txt").read_text().split("\n")[2]
    with pytest.raises(ValueError, match=f"day.txt has {day} twice"):
        DayHandler(**TIMES)


def test_days_out_of_order_are_named_by_other_handlers_too(foreign):
    def change(store):
        def swapped(text):
            days = text.split("\n")
            return "\n".join([*days[:3], days[4], days[3], *days[5:]])

        edit(store / "calendars" / "day.txt", swapped)

    store = foreign(change)
    days = (store / "calendars" / "day.txt").read_text().split("\n")
    with pytest.raises(ValueError, match=f"day.txt has {days[4]} behind {days[3]}"):
        ExpressionHandler({"r": "$close/Ref($close, 1)"}, instruments="all")


def test_a_line_of_instruments_without_tabs_is_named(foreign):
    def change(store):
        edit(
            store / "instruments" / "all.txt",
            lambda text: text.rstrip("\n") + "\nSZ000009 2018-01-02 2020-12-31\n",
        )

    foreign(change)
    with pytest.raises(ValueError, match=r"all.txt, line \d+, is no .*SZ000009 2018"):
        DayHandler(**TIMES)


def test_feature_folders_in_upper_case_are_named(foreign):
    def change(store):
        for folder in (store / "features").iterdir():
            folder.rename(folder.with_name(folder.name.upper()))

    foreign(change)
    with pytest.raises(ValueError, match=r"upper case, first S.*Rename them"):
        DayHandler(**TIMES)


PRICES = ("open", "high", "low", "close", "vwap")
SIZES = ("volume", "amount", "turnover")


def rewritten(price, size):
    """Write suspensions as a price (None: the last close) and a size."""

    def change(store):
        for folder in sorted((store / "features").iterdir()):
            close = np.fromfile(folder / "close.day.bin", "<f4")
            idle = np.isnan(close)
            if not idle.any() or folder.name[-1] not in "03":
                continue
            files = {p.name: p for p in folder.resolve().iterdir()}
            folder.unlink()  # a link to the market's own
            folder.mkdir()
            for name, file in files.items():
                values, field = np.fromfile(file, "<f4"), name.split(".")[0]
                if field in PRICES:
                    held = pd.Series(close).ffill().to_numpy()
                    values[idle] = held[idle] if price is None else price
                elif field in SIZES:
                    values[idle] = size
                values.tofile(folder / name)

    return change


@pytest.mark.parametrize(
    ("price", "size"),
    [
        (0, 0),
        pytest.param(None, 0, marks=pytest.mark.slow),
        pytest.param(None, 5.9e-39, marks=pytest.mark.slow),  # also in test_traded.py
    ],
)
def test_suspensions_are_the_same_however_a_store_writes_them(
    qlib_market, foreign, price, size
):
    spans = instrument_spans("all", "2019-01-01", "2019-06-28")
    codes = [c for c in sorted(spans) if c[-1] in "03"]
    options = dict(TIMES, instruments=codes, styles=None)
    expected = DayHandler(**options).fetch(col_set="__raw", data_key="raw")
    foreign(rewritten(price, size))
    found = DayHandler(**options).fetch(col_set="__raw", data_key="raw")
    label = found["label"].to_numpy()
    assert np.isfinite(label[~np.isnan(label)]).all() and (label > -0.9).sum() > 500
    known = expected["feature"].notna().any(axis=1)
    pd.testing.assert_frame_equal(
        found.loc[known.index[known]], expected[known], check_exact=True
    )
    assert found.loc[known.index[~known], "feature"].isna().all(axis=None)
    bars = load_bars(pd.Series(0.0, expected.index))
    assert np.isnan(bars.during("close").numpy()).any()
    if price == 0:
        options = {k: v for k, v in TIMES.items() if not k.startswith("fit")}
        given = ["Ref($close, -6) / Ref($close, -1) - 1"]
        with pytest.raises(
            ValueError, match=r"'LABEL0' is infinite.*Traded\(\$close\)"
        ):
            ExpressionHandler({"x": "$open"}, codes, **options, label=given)
        given = ["Ref(Traded($close), -6) / Ref(Traded($close), -1) - 1"]
        ExpressionHandler({"x": "$open"}, codes, **options, label=given)


def test_a_missing_field_names_what_needs_it(qlib_market):
    features = {"expressions": ["$close / $nothing", "$open"], "names": ["x", "y"]}
    with pytest.raises(ValueError, match=r"`\$nothing`, which feature `x` needs"):
        FeatureHandler(features=features, **TIMES)
    require_fields({"y": "Ref($open, 1) - $$open"}, "all", "2019-01-02", "2019-02-01")


class TestLabel:
    FIVE = "Ref($close, -6) / Ref($close, -1) - 1"

    def test_expression_stands_for_horizon(self, qlib_market):
        ours = DayHandler(**TIMES, horizon=5, carry_label=False)  # as Qlib's Ref
        theirs = DayHandler(**TIMES, label=[self.FIVE])
        assert theirs.label_reach == ours.label_reach == 6
        label = theirs.fetch(col_set="label")["LABEL0"]
        expected = ours.fetch(col_set="label")["RET5"].rename("LABEL0")
        pd.testing.assert_series_equal(label, expected)

    def test_names_and_the_farthest_reach(self):
        found = given_labels(([self.FIVE, "Ref($close, -2) / $close - 1"], ["a", "b"]))
        assert found[1:] == (["a", "b"], 6)

    @pytest.mark.parametrize(
        ("label", "message"),
        [
            (10, "must be Qlib expressions"),
            ([], "must be Qlib expressions"),
            (([FIVE], ["a", "b"]), "one of as many names"),
            ("$close / Ref($close, 1) - 1", "looks no day ahead"),
        ],
    )
    def test_what_is_no_label_is_refused(self, label, message):
        with pytest.raises(ValueError, match=message):
            given_labels(label)
