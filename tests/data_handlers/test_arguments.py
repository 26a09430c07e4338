import numpy as np
import pytest

from data_handlers.arguments import check_number, check_whole


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
