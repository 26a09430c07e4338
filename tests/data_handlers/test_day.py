import inspect

import numpy as np
import pandas as pd
import pytest
from qlib.data import D

from data_handlers.day import DayHandler, day_features
from data_handlers.flow import FlowHandler
from data_handlers.handler import FeatureHandler
from data_handlers.ms import MsHandler

TIMES = dict(
    start_time="2018-01-01",
    end_time="2019-12-31",
    fit_start_time="2018-01-01",
    fit_end_time="2019-03-29",
)


@pytest.fixture(scope="module")
def handler(qlib_market):
    return DayHandler(**TIMES)


def test_features_equal_a_pandas_computation(handler):
    raw = handler.fetch(col_set="feature", data_key="raw")
    bars = D.features(
        D.instruments("all"),
        ["$open", "$high", "$low", "$close", "$vwap", "$turnover"],
        "2017-12-01",
        TIMES["end_time"],
    )
    bars.columns = ["open", "high", "low", "close", "vwap", "volume"]
    close = bars["close"].groupby("instrument")
    before = close.transform(lambda x: x.ffill().shift(1))
    resumed = before.notna() & close.shift(1).isna() & bars["close"].notna()
    assert resumed.sum() > 20
    expected = bars.copy()
    for name in ("open", "high", "low", "close", "vwap"):
        expected[name] = bars[name] / before - 1
    expected = expected.swaplevel().reindex(raw.index)
    # The first rows of a stock see no close before them in this computation.
    first = raw.groupby("instrument").cumcount() == 0
    np.testing.assert_allclose(raw[~first], expected[~first], atol=2e-6)


def test_learnt_label_has_no_industry_or_size_left(handler):
    label = handler.fetch(col_set="label", data_key="learn")["RET10"]
    risk = handler.fetch(col_set="risk", data_key="learn")
    rows = label.notna()
    label, risk = label[rows], risk[rows]
    day = label.index.get_level_values("datetime")
    by_industry = label.groupby([day, risk["industry"]]).mean().abs().max()
    assert by_industry < 1e-4
    size = risk["log_mcap"]
    demeaned = size - size.groupby([day, risk["industry"]]).transform("mean")
    assert (label * demeaned).groupby(day).sum().abs().max() < 1e-2
    spread = label.groupby(day).std(ddof=0)
    np.testing.assert_allclose(spread, 1.0, atol=1e-4)


def test_a_label_that_the_store_cannot_give_is_named(qlib_market, monkeypatch):
    def lack(name):
        monkeypatch.setattr(
            "data_handlers.handler.known_fields",
            lambda fields, *args: [f for f in fields if f != name],
        )

    lack("vwap")
    with pytest.raises(ValueError, match=r"`price` is 'vwap', .*no values of `\$vwap`"):
        DayHandler(**TIMES, price="vwap")
    lack("open")  # which the day features want too
    with pytest.raises(ValueError, match=r"the store has no values of `\$open`"):
        DayHandler(**TIMES, price=["close", "open"])


def test_two_labels_net_of_industries_and_styles(qlib_market):
    handler = DayHandler(
        **{**TIMES, "start_time": "2019-01-02", "fit_start_time": "2019-01-02"},
        horizon=[1, 5],
        price=["open", "close"],
        styles=["size", "momentum"],
        neutralize="styles",
    )
    assert handler.label_reach == 6  # of the longest, which the purge follows
    label = handler.fetch(col_set="label", data_key="learn")
    risk = handler.fetch(col_set="risk", data_key="learn")
    assert list(label) == ["RET1_open", "RET5"]
    for name in label:
        rows = label[name].notna()
        y, x = label.loc[rows, name], risk[rows]
        day = y.index.get_level_values("datetime")
        assert y.groupby([day, x["industry"]]).mean().abs().max() < 1e-4
        for style in ("size", "momentum"):
            assert (y * x[style]).groupby(day).sum().abs().max() < 1e-2
    raw = handler.fetch(col_set="label", data_key="raw")["RET1_open"]
    price = D.features(D.instruments("all"), ["$open"], "2019-01-02", "2020-01-31")
    wide = price["$open"].unstack("datetime").astype(float)
    expected = wide.shift(-2, axis=1) / wide.shift(-1, axis=1) - 1
    both = pd.concat([raw.swaplevel(), expected.stack()], axis=1, join="inner").dropna()
    assert len(both) > 10_000
    np.testing.assert_allclose(both.iloc[:, 0], both.iloc[:, 1], atol=1e-5)


def test_raw_label_stays_the_raw_return(handler):
    raw = handler.fetch(col_set="label", data_key="raw")["RET10"]
    close = D.features(D.instruments("all"), ["$close"], "2018-01-01", "2020-12-31")
    wide = close["$close"].unstack("datetime").astype(float)
    held = wide.ffill(axis=1)
    expected = (held.shift(-11, axis=1) / wide.shift(-1, axis=1) - 1).stack()
    both = pd.concat([raw.swaplevel(), expected], axis=1, join="inner").dropna()
    assert len(both) > 10_000
    np.testing.assert_allclose(both.iloc[:, 0], both.iloc[:, 1], atol=1e-5)


def test_suspended_days_are_no_rows(handler):
    raw = handler.fetch(col_set="feature", data_key="raw")
    processed = handler.fetch(col_set="feature")
    suspended = raw.isna().all(axis=1)
    assert suspended.any()
    assert len(processed) == len(raw) - suspended.sum()
    assert processed.notna().all().all()


def test_zeros_on_suspended_days_are_suspensions(handler, market, tmp_path, use_store):
    import shutil

    store = tmp_path / "zeros"
    shutil.copytree(market, store)
    fields = ("open", "high", "low", "close", "vwap", "volume", "amount", "turnover")
    count = 0
    for folder in (store / "features").iterdir():
        gone = np.isnan(np.fromfile(folder / "close.day.bin", "<f4")[1:])
        count += gone.sum()
        for name in fields:
            path = folder / f"{name}.day.bin"
            if path.is_file():
                values = np.fromfile(path, "<f4")
                values[1:][gone] = 0
                values.tofile(path)
    assert count > 100
    use_store(store)
    again = DayHandler(**TIMES)
    for group in ("feature", "label", "risk"):
        pd.testing.assert_frame_equal(
            again.fetch(col_set=group), handler.fetch(col_set=group)
        )
    label = again.fetch(col_set="label", data_key="raw").dropna()
    assert np.isfinite(label).all().all() and (label > -1).all().all()


def test_statistics_come_from_the_fit_window(handler):
    values = handler.fetch(slice("2018-01-01", "2019-03-29"), col_set="feature")
    raw = handler.fetch(col_set="feature", data_key="raw").reindex(values.index)
    known = values.where(raw.notna())
    np.testing.assert_allclose(known.mean(), 0.0, atol=1e-3)
    np.testing.assert_allclose(known.std(ddof=0), 1.0, atol=1e-3)
    later = handler.fetch(slice("2019-04-01", None), col_set="feature")
    assert (later.std() - 1).abs().max() > 1e-3


def test_membership_is_resolved_by_name(qlib_market):
    handler = DayHandler(instruments="csi300", **TIMES)
    spans = D.list_instruments(D.instruments("csi300"), *list(TIMES.values())[:2])
    rows = handler.fetch().index
    assert set(rows.unique("instrument")) <= set(spans)
    for code, ranges in list(spans.items())[:5]:
        days = rows[rows.get_level_values("instrument") == code].get_level_values(0)
        assert all(any(a <= d <= b for a, b in ranges) for d in days)


def test_handler_survives_pickling(handler):
    import pickle

    again = pickle.loads(pickle.dumps(handler))
    assert again.label_reach == 11
    again.setup_data(init_type="load_state")
    pd.testing.assert_frame_equal(again.fetch(), handler.fetch())


class TestDayFeatures:
    def test_without_vwap_the_typical_price_takes_its_place(self):
        fields = ["open", "high", "low", "close", "volume"]
        expressions, names = day_features(fields)
        assert names == ["open", "high", "low", "close", "vwap", "volume"]
        assert expressions[4] == (
            "Traded(($high + $low + $close) / 3) / LastTraded($close, 1) - 1"
        )
        assert expressions[5] == "Log(Traded($volume) / Mean(Traded($volume), 60))"

    @pytest.mark.parametrize(
        ("fields", "volume"),
        [
            (["volume", "amount", "turnover"], "Traded($turnover)"),
            (["volume", "amount"], "Log(Traded($amount) / Mean(Traded($amount), 60))"),
        ],
    )
    def test_volume_is_what_a_split_leaves_alone(self, fields, volume):
        prices = ["open", "high", "low", "close"]
        assert day_features([*prices, *fields])[0][-1] == volume

    @pytest.mark.parametrize(
        ("lacks", "message"),
        [("close", r"no values of `\$close`"), ("volume", r"neither `\$turnover`")],
    )
    def test_missing_fields_are_named(self, lacks, message):
        fields = {"open", "high", "low", "close", "volume"} - {lacks}
        with pytest.raises(ValueError, match=message):
            day_features(sorted(fields))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"instruments": "csi9999"}, "csi9999|has no member"),
        ({"fit_end_time": None}, "fit_end_time"),
        ({"fit_start_time": "2030-01-01", "fit_end_time": "2030-06-01"}, "fit"),
        ({"fit_start_time": "2019-01-01", "fit_end_time": "2018-01-01"}, "fit"),
        ({"price": "high"}, "`price` must be one of"),
        ({"price": ["close", "high"]}, "`price` must be one of"),
        ({"neutralize": "styles", "styles": []}, "`neutralize` is 'styles', but the"),
        ({"horizon": -1}, "`horizon` must be a whole number"),
        ({"styles": ["quality"]}, "'quality' is not a style"),
        ({"neutralize": ["book"]}, "`neutralize` names 'book'"),
        ({"neutralize_weights": "cap"}, "`neutralize_weights` must be"),
        ({"missing_risk": "zero"}, "`missing_risk` must be one of 'drop', 'unknown'"),
        ({"start_time": "2040-01-01", "end_time": "2040-12-31"}, "no member|no data"),
    ],
)
def test_handler_refuses(qlib_market, kwargs, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        DayHandler(**{**TIMES, **kwargs})


def test_handler_misspelt_key_is_named(qlib_market):
    with pytest.raises(ValueError, match=r"'horizn' \(given 5\); is `horizon` meant"):
        DayHandler(horizn=5, **TIMES)
    with pytest.raises(ValueError, match=r"'qq' .*It takes .*fit_start_time"):
        DayHandler(qq=5, **TIMES)


def test_signature_shows_what_is_handed_on():
    for cls in (DayHandler, MsHandler, FlowHandler):
        known = inspect.signature(cls).parameters
        assert known["horizon"].default == 10 and "fit_start_time" in known
        assert not {"features", "kwargs"} & set(known)
    assert inspect.signature(MsHandler).parameters["path"].default == "{store}/ms"


def test_inst_processors_need_expressions(qlib_market):
    with pytest.raises(ValueError, match="`inst_processors` need features"):
        FeatureHandler({"path": "nowhere"}, inst_processors=[], **TIMES)


def test_store_without_vwap_turnover_and_cap_works_and_warns(
    market, tmp_path, use_store, caplog
):
    import logging

    from qlib_ext.ingest.store import read_bars, read_instruments, write_store

    codes = sorted(read_instruments(market)["instrument"])[:30]
    fields = ["open", "high", "low", "close", "volume", "factor", "industry"]
    write_store(tmp_path / "bare", read_bars(market, codes, fields))
    use_store(tmp_path / "bare")
    logging.getLogger("qlib").propagate = True
    with caplog.at_level(logging.WARNING):
        handler = DayHandler(**TIMES)
    warned = [r.getMessage() for r in caplog.records]
    assert sum("no `$vwap`: the typical price" in text for text in warned) == 1
    assert any("not neutralised on size" in text for text in warned)
    assert sum("jumps at a split" in text for text in warned) == 1
    with pytest.raises(ValueError, match=r"`price` is .*no values of `\$vwap`"):
        DayHandler(**TIMES, price=["close", "vwap"])
    raw = handler.fetch(col_set="feature", data_key="raw")
    typical = (1 + raw["high"] + 1 + raw["low"] + 1 + raw["close"]) / 3 - 1
    np.testing.assert_allclose(raw["vwap"], typical, atol=1e-5)
    assert handler.fetch(col_set="label", data_key="learn").notna().mean().item() > 0.8
