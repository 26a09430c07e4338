from __future__ import annotations

import datetime
import inspect
import pickle
from inspect import getfullargspec
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pytest
from annotated_types import Gt, Lt

from data_handlers.arguments import (
    Count,
    Day,
    NamedArguments,
    Names,
    Text,
    Universe,
    Whole,
    check_number,
    check_whole,
    checked,
    parse_range,
)


@pytest.mark.parametrize("value", [1, 3, np.int64(2)])
def test_whole_numbers_in_range_pass(value):
    check_whole("k", value, 1, 3)


@pytest.mark.parametrize("value", [0, 4, 2.0, True, "2", None, np.nan])
def test_all_else_is_refused_by_name(value):
    with pytest.raises(ValueError, match="`k` must be a whole number from 1 to 3"):
        check_whole("k", value, 1, 3)


@pytest.mark.parametrize("value", [0.1, 1, np.float32(0.5)])
def test_numbers_in_range_pass(value):
    check_number("x", value, 0, 1, exclusive=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "above 0 and at most 1, got 0"),
        (1.1, "above 0 and at most 1"),
        ("7", "a number, got '7'"),
        (True, "a number"),
        (np.nan, "a number"),
        (-np.inf, "a number"),
        (None, "a number"),
    ],
)
def test_all_else_than_a_number_is_refused_by_name(value, message):
    with pytest.raises(ValueError, match=f"`x` must be {message}"):
        check_number("x", value, 0, 1, exclusive=True)


class Base(NamedArguments):
    def __init__(self, *, chunk: Count = 20, lr: Annotated[float, Gt(0)] = 0.1):
        self.doubled = 2 * self.chunk


class Child(Base):
    def __init__(
        self,
        fit_start_time: Any = None,
        fit_end_time: Any = None,
        mode: Literal["stream", "windows"] = "stream",
        amp: bool = True,
        purge: Whole | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)


class Renamed(Child):
    """Without a constructor of its own."""


class TestNamedArguments:
    def test_arguments_become_attributes_before_the_body_runs(self):
        made = Renamed("2020", mode="windows", chunk=3)
        assert (made.fit_start_time, made.mode, made.amp) == ("2020", "windows", True)
        assert (made.purge, made.chunk, made.lr, made.doubled) == (None, 3, 0.1, 6)
        assert vars(pickle.loads(pickle.dumps(made))) == vars(made)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"mode": "day"}, "`mode` must be one of 'stream', 'windows', got 'day'"),
            ({"mode": ["stream"]}, "`mode` must be one of"),
            ({"amp": "yes"}, "`amp` must be true or false, got 'yes'"),
            ({"amp": 1}, "`amp` must be true or false"),
            ({"purge": -1}, "`purge` must be a whole number of at least 0, got -1"),
            ({"chunk": 2.5}, "`chunk` must be a whole number of at least 1, got 2.5"),
            ({"chunk": None}, "`chunk` must be a whole number"),
            ({"lr": 0}, "`lr` must be above 0, got 0"),
            ({"lr": "1e-3"}, "YAML reads 1e-3 as text"),
        ],
    )
    def test_each_level_checks_its_own(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            Renamed(**kwargs)

    def test_all_unknown_names_are_told_at_once_and_qlibs_explained(self):
        with pytest.raises(ValueError) as error:
            Child(chunks=3, batch_size=800, metric="loss", zzz=1)
        text = str(error.value)
        assert text.startswith("Child has no parameter 'chunks' (given 3); is `chunk`")
        assert "'batch_size' (given 800); a batch is a day here" in text
        assert "'metric' (given 'loss'); training stops by" in text
        assert "'zzz' (given 1). It takes fit_start_time" in text

    def test_what_qlib_offers_on_trial_is_refused_by_a_type_error(self):
        with pytest.raises(TypeError, match="model"):
            Base(model=None)

    def test_signature_is_whole_and_the_fit_window_stays_ordinary(self):
        known = inspect.signature(Renamed).parameters
        assert list(known)[-2:] == ["chunk", "lr"] and known["lr"].default == 0.1
        assert {"fit_start_time", "fit_end_time"} <= set(getfullargspec(Renamed).args)


class Source(NamedArguments):
    def __init__(
        self,
        sources: dict,
        folder: Text | None = None,
        columns: Names | None = ("a",),
        end: Day | None = None,
        instruments: Universe = "all",
        parts: list | None = None,
    ):
        pass


class Reader(Source):
    def __init__(self, days: Count = 1, **kwargs: Any):
        len(kwargs["columns"])  # uses what the base class takes, before it
        super().__init__(**kwargs)


class TestKinds:
    @pytest.mark.parametrize(
        ("name", "good", "bad", "words"),
        [
            ("folder", ["runs", None], [5, "", ["x"]], "text"),
            ("columns", [["a", "b"], "a", [], None], [5, [1], {}], "list of texts"),
            (
                "end",
                ["2015-12-31", datetime.date(2015, 1, 1), pd.Timestamp("2015"), None],
                [2015, np.nan, "31 Feb 2015", [], pd.NaT],
                "a date such as",
            ),
            (
                "instruments",
                ["all", ["SH600000"], {"market": "all"}, None],
                [1, np.nan],
                "market",
            ),
            ("parts", [[{}], (), None], ["x", {}, 1], "a list"),
            ("sources", [{}, {"a": 1}], [[], "a", None], "a mapping"),
        ],
    )
    def test_each_takes_its_own_and_names_the_rest(self, name, good, bad, words):
        for value in good:
            assert getattr(Source(**{"sources": {}, name: value}), name) == value
        for value in bad:
            with pytest.raises(ValueError, match=f"`{name}` must be .*{words}"):
                Source(**{"sources": {}, name: value})

    def test_what_is_handed_on_is_checked_before_the_body(self):
        with pytest.raises(ValueError, match="`columns` must be text or a list"):
            Reader(sources={}, columns=5)

    def test_what_is_missing_is_told_by_name(self):
        with pytest.raises(ValueError, match="Source needs `sources`: add"):
            Source(folder="x")


def test_checked_function_checks_what_is_given():
    @checked
    def share(x: Annotated[float, Gt(0), Lt(1)] = 0.5) -> float:
        return x

    assert share() == 0.5 and share.__name__ == "share"
    assert getfullargspec(share).args == ["x"]
    assert inspect.signature(share).parameters["x"].default == 0.5
    with pytest.raises(ValueError, match="`x` must be above 0 and below 1, got 1"):
        share(1)


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("2018", "2018-01-01", "2018-12-31"),
        (2017, "2017-01-01", "2017-12-31"),
        ("2018:2020", "2018-01-01", "2020-12-31"),
        ("2018-03-01:2019-02-28", "2018-03-01", "2019-02-28"),
        ("2018-02-01:2018-03", "2018-02-01", "2018-03-31"),
    ],
)
def test_parse_range(text, first, last):
    assert parse_range(text, "test") == (pd.Timestamp(first), pd.Timestamp(last))


@pytest.mark.parametrize("text", ["soon", "2020:2018", "2018:x", "2018:2019:2020", ""])
def test_parse_range_refuses(text):
    with pytest.raises(ValueError, match="`train` must be a year"):
        parse_range(text, "train")


def test_a_name_given_twice_is_told():
    from data_handlers.market_state import MarketState

    with pytest.raises(ValueError, match="`indices` has a name twice"):
        MarketState(indices=["SH000300", "SH000300"])
