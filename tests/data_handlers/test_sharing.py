"""The frames of a handler: Qlib's own, with fewer copies."""

import numpy as np
import pandas as pd
import pytest
from qlib.data.dataset.handler import DataHandlerLP
from qlib.data.dataset.loader import StaticDataLoader

from data_handlers.sharing import SharedLoading, _addresses, labels_alone

OURS = "data_handlers.processors"


def frame() -> pd.DataFrame:
    rng = np.random.default_rng(5)
    days = pd.bdate_range("2020-01-01", periods=6)
    index = pd.MultiIndex.from_product(
        [days, [f"SH60000{i}" for i in range(5)]], names=["datetime", "instrument"]
    )
    columns = pd.MultiIndex.from_tuples(
        [("feature", "a"), ("feature", "b"), ("feature", "c"), ("label", "y")]
    )
    values = rng.normal(size=(len(index), 4)).astype(np.float32)
    values[rng.random(values.shape) < 0.2] = np.nan
    return pd.DataFrame(values, index, columns)


FILL = {"class": "Fillna", "kwargs": {"fields_group": "feature"}}
FILL_LABEL = {"class": "Fillna", "kwargs": {"fields_group": "label"}}
NORM = {"class": "CSZScoreNorm", "kwargs": {"fields_group": "label"}}
DROP = {"class": "DropnaLabel"}
SUSPENDED = {"class": "DropSuspended", "module_path": OURS}
SHARED = {"class": "CSZScore", "module_path": OURS}  # the features stay the input's


@pytest.mark.parametrize("kind", ["append", "independent"])
@pytest.mark.parametrize(
    ("shared", "infer", "learn"),
    [
        ([], [], [DROP, NORM]),
        ([], [FILL], [DROP, NORM]),
        ([SUSPENDED], [SHARED, FILL], [FILL_LABEL]),
        ([FILL], [], [SHARED, FILL_LABEL]),
        ([], [], []),
    ],
)
def test_the_frames_are_those_of_qlib(shared, infer, learn, kind):
    made = []
    for handler in (DataHandlerLP, SharedLoading):
        given = frame()
        made.append(
            handler(
                data_loader=StaticDataLoader(given),
                shared_processors=shared,
                infer_processors=infer,
                learn_processors=learn,
                process_type=kind,
            )
        )
        pd.testing.assert_frame_equal(given, frame())
    theirs, ours = made
    for key in ("_data", "_infer", "_learn"):
        pd.testing.assert_frame_equal(getattr(ours, key), getattr(theirs, key))


def test_a_frame_that_shares_a_column_is_known_as_such():
    given = frame()
    half = given.copy(deep=False)
    half.isetitem(3, np.zeros(len(half), np.float32))
    dropped = given.dropna(subset=[("label", "y")])
    for other, shared in ((half, True), (given.iloc[5:], True), (dropped, False)):
        assert bool(_addresses(other) & _addresses(given)) == shared
    masked = given.astype("Float32")  # its values are copies: it can't be told
    assert _addresses(masked) & _addresses(masked.copy())


def test_of_the_raw_frame_only_labels_stay_for_who_asks_for_them_alone():
    def make():
        return SharedLoading(data_loader=StaticDataLoader(frame()))

    with labels_alone():
        lean = make()
    plain = make()
    pd.testing.assert_frame_equal(lean._data, plain._data[["label"]])
    pd.testing.assert_frame_equal(lean._infer, plain._infer)


def test_another_process_type_is_refused():
    with pytest.raises(ValueError, match="`process_type` must be 'append'"):
        SharedLoading(data_loader=StaticDataLoader(frame()), process_type="x")
