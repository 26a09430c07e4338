"""Columns and days of loaders, read by the engine."""

import pandas as pd
from qlib.data import D

from data_handlers.expression.loading import read_values
from data_handlers.loaders import load_days


class TestLoadDays:
    def test_equals_the_loader_of_qlib(self, market_small, use_store):
        from qlib.data.dataset.loader import QlibDataLoader

        use_store(market_small)
        expressions = [
            "$open / Ref($close, 1) - 1",
            "Log($volume / Mean($volume, 60))",
            "Std($close, 20) / $close",
            "If($close > $open, Abs($close - $open), 0 - Sum($volume > 0, 5))",
            "Max($high, 5) - Min($low, 5)",
        ]
        names = list("abcde")
        loader = QlibDataLoader({"feature": (expressions, names)})
        for market, first, last in (
            ("all", "2020-11-02", "2020-11-30"),
            ("csi300", "2018-01-02", "2018-03-30"),
        ):
            first, last = pd.Timestamp(first), pd.Timestamp(last)
            ours = load_days(loader, market, first, last)
            theirs = loader.load(market, first, last)
            pd.testing.assert_frame_equal(
                ours,
                theirs,
                rtol=1e-5,
                atol=1e-7,
                check_index_type=False,
                check_column_type=False,
                check_names=False,
            )

    def test_leaves_what_it_does_not_know_to_qlib(self, qlib_market):
        from qlib.data.dataset.loader import QlibDataLoader

        day = D.calendar()[-1]
        for expression in (
            "EMA($close, 5)",
            "Ref($close, 0)",
        ):
            loader = QlibDataLoader({"feature": ([expression], ["x"])})
            assert load_days(loader, "all", day, day) is None


class TestReadValues:
    def test_equals_qlib(self, qlib_market):
        """Whole history and a part, a field that the store has not, no such code."""
        codes = D.list_instruments(D.instruments("all"), as_list=True)[::7]
        names = ["$close / Ref($close, 1) - 1", "Traded($close)", "$nothing"]
        for span in ((None, None), ("2018-01-02", "2018-03-30")):
            theirs = D.features(codes, names, *span).swaplevel().sort_index()
            ours = read_values(codes, names, *span)
            pd.testing.assert_frame_equal(
                ours, theirs, check_exact=True, check_index_type=False
            )
        assert not len(read_values(["SH000000"], ["$close"]))
        config = D.instruments("csi300")
        theirs = D.features(config, names[:2], "2018-01-02", "2018-03-30")
        ours = read_values(config, names[:2], "2018-01-02", "2018-03-30")
        assert ours.index.equals(theirs.swaplevel().sort_index().index)
