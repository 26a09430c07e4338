"""The market's state by hand, and that it knows nothing of tomorrow."""

import numpy as np
import pandas as pd
import pytest
from qlib.data import D

from data_handlers.alpha import FastAlpha158
from data_handlers.day import DayHandler
from data_handlers.market_state import MarketState, _of_the_best, winners_state
from qlib_ext.dataset import Panel, PanelDataset

WINDOW = {"fit_start_time": "2019-06-03", "fit_end_time": "2019-12-31"}
DATES = {"start_time": "2019-06-03", "end_time": "2020-03-31", **WINDOW}
BARE = {**DATES, "styles": [], "neutralize": [], "instruments": "csi300"}


@pytest.fixture(scope="module")
def handler(qlib_market):
    return DayHandler(market={"winners": True}, styles=["size", "momentum"], **DATES)


class TestReferenceValues:
    def test_an_indexs_numbers_are_those_of_its_bars(self, handler):
        processor = next(p for p in handler.infer_processors if hasattr(p, "scale_"))
        raw = processor._days(handler.fetch(col_set="__raw"))["market"]
        day = pd.Timestamp("2020-03-20")
        bars = D.features(["SH000905"], ["$close", "$amount"], end_time=day)
        close, amount = bars.to_numpy().astype(float).T
        got = raw.xs(day, level="datetime").iloc[0]
        moves = close[1:] / close[:-1] - 1
        assert got["SH000905_return"] == pytest.approx(moves[-1], rel=1e-4)
        for d in (5, 60):
            last, mean = moves[-d:], amount[-d:].mean()
            assert got[f"SH000905_return_mean_{d}"] == pytest.approx(last.mean(), 1e-3)
            assert got[f"SH000905_return_std_{d}"] == pytest.approx(
                last.std(ddof=1), 1e-3
            )
            assert got[f"SH000905_amount_mean_{d}"] == pytest.approx(
                mean / amount[-1], 1e-4
            )
        # 3 indices x (1 + 5 windows x 4); 3 pools x 4 windows of each style
        assert raw.shape[1] == 63 + 2 * 12

    def test_the_best_tenth_of_a_pool(self):
        gain = np.arange(25.0)[None, :].repeat(2, 0)
        gain[0, 24] = np.nan  # unknown: the best are 23 and 22
        exposure = np.arange(50.0).reshape(1, 25, 2).repeat(2, 0)
        exposure[1, 24, 0] = np.nan  # of 24 and 23 only one has this style
        got = _of_the_best(gain, exposure)
        np.testing.assert_allclose(got, [[45.0, 46.0], [46.0, 48.0]])
        assert np.isnan(
            _of_the_best(np.full((1, 3), np.nan), np.zeros((1, 3, 1)))
        ).all()

    def test_winners_by_a_plain_loop(self, handler):
        frame = handler.fetch(col_set="__raw")
        dates = pd.DatetimeIndex(frame.index.unique("datetime"))
        got = winners_state(frame, dates, ["csi500"])
        at = 150
        risk = frame["risk"]["size"]
        member = D.list_instruments(
            D.instruments("csi500"), dates[at], dates[at], as_list=True
        )
        calendar = pd.DatetimeIndex(D.calendar())
        begin = calendar[calendar.get_loc(dates[at]) - 10]
        close = D.features(member, ["$close"], end_time=dates[at])["$close"]
        close = close.unstack("instrument").ffill()
        gain = (close.loc[dates[at]] / close.loc[begin] - 1).dropna()
        gain = gain[gain.index.isin(risk.loc[dates[at]].index)]
        best = gain.nlargest(max(1, len(gain) // 10)).index
        wanted = risk.loc[dates[at - 1]].reindex(best).mean()
        assert got["winners_size_10_csi500"].iloc[at] == pytest.approx(wanted, 1e-5)


class TestProperties:
    def test_every_stock_of_a_day_has_the_same_and_the_panel_has_it_once(self, handler):
        frame = handler.fetch(col_set="market")
        assert (frame.groupby(level="datetime").nunique() == 1).all().all()
        panel = Panel.from_handler(handler)
        assert panel.market.shape == (len(panel.dates), frame.shape[1])
        day = panel.dates[100]
        np.testing.assert_allclose(
            panel.market[100].numpy(), frame.loc[day].iloc[0].to_numpy(), rtol=1e-6
        )
        fitted = panel.market[panel.dates <= "2019-12-31"]
        known = fitted.std(0) > 0
        assert float(fitted.mean(0).abs().max()) < 1e-3
        assert torch_close(fitted.std(0, unbiased=False)[known], 1.0)

    def test_nothing_later_enters(self, handler):
        frame, end = handler.fetch(col_set="__raw"), "2020-02-28"
        processor = next(p for p in handler.infer_processors if hasattr(p, "scale_"))
        one, two = (processor._days(f) for f in (frame, frame.loc[:end]))
        pd.testing.assert_frame_equal(one.loc[:end], two, rtol=1e-5)
        assert len(two) < len(one) and two.notna().any(axis=None)

    def test_frames_that_were_freed_give_it_again(self, qlib_market):
        handler = DayHandler(market={"indices": ["SH000300"]}, **BARE)
        before = handler.fetch(col_set="market")
        data = PanelDataset(handler, {"train": ("2019-06-03", "2019-12-01")})
        data.free_frames()
        pd.testing.assert_frame_equal(
            handler.fetch(col_set="market"), before.reindex(handler.fetch().index)
        )

    @pytest.mark.slow
    def test_any_handler_takes_it_as_a_processor(self, qlib_market):
        handler = FastAlpha158(
            instruments="csi300",
            **DATES,
            infer_processors=[
                {
                    "class": "MarketState",
                    "module_path": "data_handlers.market_state",
                    "kwargs": {"indices": ["SH000300"], **WINDOW},
                }
            ],
        )
        assert handler.fetch(col_set="market").shape[1] == 21


class TestBadInput:
    def test_a_missing_index_is_named(self, qlib_market):
        with pytest.raises(ValueError, match="'SH000016', which has no bars"):
            DayHandler(market={"indices": ["SH000300", "SH000016"]}, **BARE)

    def test_winners_need_styles(self, qlib_market):
        with pytest.raises(ValueError, match="`winners` needs style exposures"):
            DayHandler(market={"winners": True}, **BARE)

    def test_what_is_no_list_of_arguments(self, qlib_market):
        with pytest.raises(ValueError, match="`market` must be a mapping"):
            DayHandler(market="SH000300", **BARE)
        with pytest.raises(ValueError, match="`indices` must be a list"):
            MarketState("SH000300", **WINDOW)
        with pytest.raises(ValueError, match="`fit_start_time` is None"):
            MarketState()


def torch_close(values, wanted):
    return bool(((values - wanted).abs() < 1e-2).all())
