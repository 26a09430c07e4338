"""Families PV, HF and DP: the right columns, mined files read with care."""

import numpy as np
import pandas as pd
import pytest
import yaml
from qlib.data import D

from data_handlers.aggregate.build import build
from data_handlers.aggregate.minute import MINUTE_NAMES
from data_handlers.day import DayHandler
from data_handlers.families import (
    TRADE_FEATURES,
    HFHandler,
    MinedHandler,
    PVHandler,
    mined_expressions,
)
from data_handlers.ms import MsHandler
from qlib_ext.ingest.store import read_bars, read_instruments, write_store

DATES = {"start_time": "2019-10-08", "end_time": "2020-03-31"}
FIT = {
    "fit_start_time": "2019-10-08",
    "fit_end_time": "2019-12-31",
    "styles": [],
    "neutralize": [],
}
MINED = {
    "turn": "Mean($turnover, 5) / Mean($turnover, 20)",
    "gap": "$open / Ref($close, 1) - 1",
    "cov": "Corr($close, Log($volume + 1e-12), 10)",
}


def write_mined(path, expressions, **more):
    entries = [{"name": n, "expression": e} for n, e in expressions.items()]
    path.write_text(yaml.safe_dump({**more, "expressions": entries}, sort_keys=False))
    return path


def test_pv_is_the_day_handler(qlib_market):
    few = read_instruments(qlib_market)["instrument"].unique()[:5].tolist()
    pv, day = (
        handler(few, **DATES, **FIT).fetch(data_key="infer", col_set="feature")
        for handler in (PVHandler, DayHandler)
    )
    pd.testing.assert_frame_equal(pv, day)


class TestHF:
    def test_columns_are_ms_and_what_trades_decide(self, qlib_market, tmp_path):
        from qlib_ext.market import make_minute, make_ticks

        names = [f.name for f in TRADE_FEATURES]
        assert len(names) == 14 and "l2_smart" in names
        assert not {"l2_spread", "l2_cancel_ratio", "l2_order_imb"} & set(names)
        days = {"start": "2020-03-02", "end": "2020-03-13"}
        make_minute(qlib_market, tmp_path / "minute", stocks=12, **days)
        ticks = make_ticks(qlib_market, tmp_path / "ticks", stocks=8, **days)
        build("ms", tmp_path / "minute", tmp_path, bar_minutes=15, progress=False)
        build("l2", ticks, tmp_path, progress=False)
        span = {"start_time": "2020-03-02", "end_time": "2020-03-13"}
        fit = {**FIT, "fit_start_time": "2020-03-02", "fit_end_time": "2020-03-13"}
        handler = HFHandler(
            ms_path=str(tmp_path / "ms"), l2_path=str(tmp_path / "l2"), **span, **fit
        )
        raw = handler.fetch(data_key="raw", col_set="feature")
        assert list(raw.columns) == [*MINUTE_NAMES, *names]
        ms = MsHandler(path=str(tmp_path / "ms"), **span, **fit)
        want = ms.fetch(data_key="raw", col_set="feature")
        pd.testing.assert_frame_equal(raw.loc[want.index, MINUTE_NAMES], want)
        assert raw["l2_smart"].notna().any() and raw["l2_smart"].isna().any()
        with pytest.raises(ValueError, match="leave no feature"):
            HFHandler(ms_path=None, l2_path=None, **span, **fit)


class TestDP:
    def test_values_are_those_of_qlib_on_traded_days(self, qlib_market, tmp_path):
        path = write_mined(tmp_path / "mined.yaml", MINED, tries=7)
        handler = MinedHandler(path=str(path), **DATES, **FIT)
        raw = handler.fetch(data_key="raw", col_set="feature")
        assert list(raw.columns) == list(MINED)
        want = D.features(
            D.instruments("all"),
            [*MINED.values(), "$close"],
            DATES["start_time"],
            DATES["end_time"],
        )
        want = want.swaplevel().sort_index().set_axis([*MINED, "close"], axis=1)
        traded = want["close"].notna()
        assert not traded.all()
        pd.testing.assert_frame_equal(
            raw[traded], want.loc[traded, list(MINED)], rtol=1e-5, check_names=False
        )
        assert raw[~traded].isna().all().all()
        seen = handler.fetch(data_key="infer", col_set="feature").index
        assert seen.isin(raw.index[traded]).all()
        best = MinedHandler(path=str(path), top=2, **DATES, **FIT)
        assert best.fetch(col_set="feature").shape[1] == 2

    def test_default_path_is_in_the_store(self, market, tmp_path, use_store):
        for part in market.iterdir():
            (tmp_path / part.name).symlink_to(part)
        use_store(tmp_path)
        path = write_mined(tmp_path / "mined.yaml", MINED)
        handler = MinedHandler(**DATES, **FIT)
        assert handler.fetch(col_set="feature").shape[1] == 3
        path.unlink()
        with pytest.raises(ValueError, match=r"no file .*mined\.yaml"):
            MinedHandler(**DATES, **FIT)

    def test_handler_ignores_the_future(self, market_small, tmp_path, use_store):
        use_store(market_small)
        path = write_mined(tmp_path / "mined.yaml", MINED)
        handler = MinedHandler(path=str(path), **DATES, **FIT)
        every = sorted(f.name.upper() for f in (market_small / "features").iterdir())
        bars = read_bars(market_small, every)
        later = (bars["datetime"] > "2020-02-28").to_numpy()
        for field in ("open", "close", "volume", "turnover"):
            bars.loc[later, field] *= np.float32(1.3)
        indices = set(every) - set(read_instruments(market_small)["instrument"])
        write_store(tmp_path / "store", bars, index_codes=sorted(indices))
        use_store(tmp_path / "store")
        other = MinedHandler(path=str(path), **DATES, **FIT)
        for key in ("raw", "infer"):
            want = handler.fetch(slice(None, "2020-02-28"), "datetime", "feature", key)
            got = other.fetch(slice(None, "2020-02-28"), "datetime", "feature", key)
            pd.testing.assert_frame_equal(got, want, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        "content, message",
        [
            ("expressions: []", "no list"),
            ("factors: [1]", "no list"),
            ("expressions: [{name: a}]", "entry 0"),
            ("expressions: [", "not valid YAML"),
            (
                "expressions: [{name: a, expression: $close}, "
                "{name: a, expression: $open}]",
                "given twice",
            ),
            (
                "expressions: [{name: a, expression: 'Ref($close, -1)'}]",
                "looks 1 days ahead",
            ),
            ("expressions: [{name: a, expression: 'exit()'}]", "'exit' is not known"),
            (
                "expressions: [{name: a, expression: 'Ref.__init__($close)'}]",
                "is not known|not made of",
            ),
            ("expressions: [{name: a, expression: 'Mean($close'}]", "cannot be read"),
        ],
    )
    def test_bad_files_are_refused(self, content, message, tmp_path, qlib_market):
        (tmp_path / "mined.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            mined_expressions(tmp_path / "mined.yaml")
