"""Windows of rolling tasks: dates by hand, purge at borders, moved configurations."""

import copy

import pandas as pd
import pytest

from qlib_ext.dataset import check_purge
from qlib_ext.rolling.tasks import seeded
from qlib_ext.rolling.windows import (
    label_horizon_of,
    label_reach_of,
    make_windows,
    move_task,
    parse_step,
)

# Every weekday is a trading day, so that dates can be counted with a calendar.
WEEKDAYS = pd.bdate_range("2005-01-03", "2020-12-31")

TASK = {
    "model": {
        "class": "MultiFactorRNN",
        "module_path": "qlib_ext.models",
        "kwargs": {"seed": 5, "n_seeds": 3},
    },
    "dataset": {
        "class": "PanelDataset",
        "module_path": "qlib_ext.dataset",
        "kwargs": {
            "handler": {
                "class": "DayHandler",
                "module_path": "data_handlers.day",
                "kwargs": {
                    "start_time": "2012-01-01",
                    "end_time": "2020-12-31",
                    "fit_start_time": "2012-01-01",
                    "fit_end_time": "2016-12-14",
                    "horizon": [10, 5],
                    "infer_processors": [
                        {
                            "class": "RobustZScoreNorm",
                            "kwargs": {"fit_start_time": "2012-01-01"},
                        }
                    ],
                },
            },
            "segments": {
                "train": ["2012-01-01", "2016-12-14"],
                "valid": ["2017-01-01", "2017-12-14"],
                "test": ["2018-01-01", "2020-12-31"],
            },
        },
    },
}


class TestReference:
    def test_day_scheme_is_ten_years_then_one_then_the_test_year(self):
        windows = make_windows(WEEKDAYS, ("2017-01-01", "2019-12-31"), reach=11)
        # By hand. 2017-01-02 is a Monday; 11 weekdays lie between 2015-12-16 and
        # 2016-01-01, the first weekday of 2016, and so on.
        expected = {
            "2017": [
                ("2006-01-02", "2015-12-16"),
                ("2016-01-01", "2016-12-15"),
                ("2017-01-02", "2017-12-29"),
            ],
            "2018": [
                ("2007-01-01", "2016-12-15"),
                ("2017-01-02", "2017-12-14"),
                ("2018-01-01", "2018-12-31"),
            ],
            "2019": [
                ("2008-01-01", "2017-12-14"),
                ("2018-01-01", "2018-12-14"),
                ("2019-01-01", "2019-12-31"),
            ],
        }
        assert [w.name for w in windows] == list(expected)
        for window in windows:
            assert [window.train, window.valid, window.test] == expected[window.name]
            assert window.fit == window.train
            assert window.handler == (window.train[0], window.test[1])
            assert window.note == ""

    def test_l2_scheme_expands_and_splits_nine_to_one(self):
        windows = make_windows(
            WEEKDAYS,
            ("2015-01-01", "2016-12-31"),
            scheme="l2",
            start="2013-12-31",
            reach=11,
        )
        # 2013-12-31 to 2014-12-31 are 262 weekdays: validation begins with the 237th,
        # 2014-11-26, and training ends with the 225th, 2014-11-10; validation ends 12
        # weekdays before 2015-01-01. Then 523 weekdays, 0.9 of them 471.
        assert windows[0].train == ("2013-12-31", "2014-11-10")
        assert windows[0].valid == ("2014-11-26", "2014-12-16")
        assert windows[0].test == ("2015-01-01", "2015-12-31")
        assert windows[1].train == ("2013-12-31", "2015-10-05")
        assert windows[1].valid == ("2015-10-21", "2015-12-16")
        assert windows[1].test == ("2016-01-01", "2016-12-30")

    def test_half_year_step_and_a_test_that_ends_within_it(self):
        windows = make_windows(
            WEEKDAYS,
            ("2019-01-01", "2020-03-31"),
            step=6,
            train_months=24,
            valid_months=6,
        )
        assert [(w.name, *w.test) for w in windows] == [
            ("2019-01", "2019-01-01", "2019-06-28"),
            ("2019-07", "2019-07-01", "2019-12-31"),
            ("2020-01", "2020-01-01", "2020-03-31"),
        ]
        assert windows[1].valid[0] == "2019-01-01"
        assert windows[1].train[0] == "2017-01-02"

    def test_store_that_begins_late_is_noted(self):
        (window,) = make_windows(WEEKDAYS, ("2012-01-01", "2012-12-31"))
        assert window.train[0] == "2005-01-03"
        assert window.note == "72 of 120 months of training"

    def test_parse_step(self):
        words = ["year", "quarter", "month", "6 months", "6m"]
        assert [parse_step(w) for w in words] == [12, 3, 1, 6, 6]


class TestProperties:
    @pytest.mark.parametrize("scheme", ["day", "l2"])
    @pytest.mark.parametrize("step", [1, 5, 12])
    @pytest.mark.parametrize("reach", [2, 11])
    def test_no_label_reaches_into_a_later_segment(self, scheme, step, reach):
        windows = make_windows(
            WEEKDAYS,
            ("2016-02-15", "2020-11-30"),
            scheme=scheme,
            step=step,
            reach=reach,
            train_months=30,
        )
        tests = []
        for window in windows:
            segments = {k: getattr(window, k) for k in ("train", "valid", "test")}
            assert check_purge(segments, WEEKDAYS, reach) == []
            # The last label of a segment, spelt out.
            for earlier, later in (("train", "valid"), ("valid", "test")):
                last = WEEKDAYS.get_loc(pd.Timestamp(segments[earlier][1]))
                first = pd.Timestamp(segments[later][0])
                assert WEEKDAYS[last + reach] < first
                assert WEEKDAYS[last + 1 + reach] == first  # and no day is wasted
            assert window.fit[1] == window.train[1] < window.valid[0]
            tests.append(pd.bdate_range(*window.test))
        joined = tests[0].append(tests[1:])
        assert joined.equals(pd.bdate_range("2016-02-15", "2020-11-30"))

    def test_everything_moves_together_and_the_original_stays(self):
        before = copy.deepcopy(TASK)
        (window,) = make_windows(WEEKDAYS, ("2019-01-01", "2019-12-31"), gap=60)
        moved = move_task(TASK, window)
        assert before == TASK
        kwargs = moved["dataset"]["kwargs"]
        handler = kwargs["handler"]["kwargs"]
        assert kwargs["segments"] == {
            "train": ["2008-01-01", "2017-12-14"],
            "valid": ["2018-01-01", "2018-12-14"],
            "test": ["2019-01-01", "2019-12-31"],
        }
        # 60 weekdays are 12 weeks before 2008-01-01.
        assert handler["start_time"] == "2007-10-09"
        assert handler["end_time"] == "2019-12-31"
        assert handler["fit_start_time"] == "2008-01-01"
        assert handler["fit_end_time"] == "2017-12-14"
        own = handler["infer_processors"][0]["kwargs"]
        assert own == {"fit_start_time": "2008-01-01"}

    def test_data_sets_inside_a_model_move_too(self):
        task = copy.deepcopy(TASK)
        inner = {"model": TASK["model"], "dataset": copy.deepcopy(TASK["dataset"])}
        del inner["dataset"]["kwargs"]["segments"]
        task["model"] = {
            "class": "ScoreAverage",
            "module_path": "qlib_ext.models",
            "kwargs": {"sources": {"day": inner}},
        }
        (window,) = make_windows(WEEKDAYS, ("2019-01-01", "2019-12-31"))
        moved = move_task(task, window)
        source = moved["model"]["kwargs"]["sources"]["day"]
        handler = source["dataset"]["kwargs"]["handler"]["kwargs"]
        assert handler["start_time"] == "2008-01-01"
        assert handler["fit_end_time"] == "2017-12-14"
        model, seed = seeded(moved["model"], 2, 3)
        assert seed == 7
        kwargs = model["kwargs"]["sources"]["day"]["model"]["kwargs"]
        assert kwargs == {"seed": 7, "n_seeds": 1}

    def test_label_reach_is_read_from_the_handler(self):
        assert label_reach_of(TASK) == 11

    def test_a_given_label_comes_before_the_handlers_horizon(self):
        label = ["Ref($close, -21)/Ref($close, -1) - 1"]
        of_ours = copy.deepcopy(TASK)
        of_ours["dataset"]["kwargs"]["handler"]["kwargs"]["label"] = label
        loader = {"kwargs": {"config": {"feature": ["$open"], "label": (label, ["x"])}}}
        of_qlib = {
            "class": "DataHandlerLP",
            "module_path": "qlib.data.dataset.handler",
            "kwargs": {"data_loader": loader},
        }
        both = {"dataset": {"kwargs": {"handler": of_qlib}}}
        assert label_reach_of(of_ours) == label_reach_of(both) == 21
        assert label_horizon_of(of_ours) == label_horizon_of(both) == 20
        assert label_horizon_of(TASK) == 10


class TestBadInput:
    def test_words(self):
        with pytest.raises(ValueError, match="`step` must be"):
            parse_step("fortnight")

    @pytest.mark.parametrize("name", ["step", "train_months", "valid_months"])
    @pytest.mark.parametrize("value", ["7", 0, 1.5])
    def test_months(self, name, value):
        with pytest.raises(ValueError, match=f"`{name}` must be a whole number"):
            make_windows(WEEKDAYS, ("2006-01-01", "2006-12-31"), **{name: value})

    def test_no_day_to_train_on_names_the_window(self):
        with pytest.raises(ValueError, match="2006 leaves no day for `train`"):
            make_windows(WEEKDAYS, ("2006-01-01", "2006-12-31"))
        with pytest.raises(ValueError, match=r"2021 .* holds no trading day"):
            make_windows(WEEKDAYS, ("2021-01-01", "2021-12-31"))

    def test_seeds_of_a_model_without_seed(self):
        with pytest.raises(ValueError, match="takes no `seed`"):
            seeded(
                {"class": "LinearModel", "module_path": "qlib.contrib.model.linear"},
                0,
                2,
            )
