"""The frames of a handler: Qlib's own, with fewer copies."""

import numpy as np
import pandas as pd
import pytest
from qlib.data.dataset.handler import DataHandlerLP
from qlib.data.dataset.loader import StaticDataLoader

from data_handlers.sharing import (
    FrameShare,
    SharedLoading,
    _addresses,
    labels_alone,
    shared_frames,
)

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


class Counting(StaticDataLoader):
    loaded: list = []  # noqa: RUF012

    def load(self, instruments=None, start_time=None, end_time=None):
        self.loaded.append((start_time, end_time))
        return super().load(instruments, start_time, end_time)


@pytest.mark.parametrize("drop_raw", [False, True])
def test_frames_too_large_to_be_kept_are_the_handlers_own(monkeypatch, drop_raw):
    windows = [("2020-01-01", "2020-01-06"), ("2020-01-02", "2020-01-08")]

    def make(start, end):
        return SharedLoading(
            instruments=None,
            start_time=pd.Timestamp(start),
            end_time=pd.Timestamp(end),
            data_loader=Counting(frame()),
            shared_processors=[SUSPENDED],
            learn_processors=[DROP, NORM],
            drop_raw=drop_raw,
        )

    plain = [make(*window) for window in windows]
    monkeypatch.setattr("data_handlers.sharing._LARGEST", 100)
    monkeypatch.setattr("data_handlers.sharing._key", lambda *_: "")  # no store
    Counting.loaded.clear()
    share = FrameShare("2020-01-01", "2020-01-08")
    with shared_frames(share):
        lean = [make(*window) for window in windows]
    for ours, theirs in zip(lean, plain, strict=True):
        for key in ("_infer", "_learn"):
            pd.testing.assert_frame_equal(getattr(ours, key), getattr(theirs, key))
        assert hasattr(ours, "_data") != drop_raw
        if not drop_raw:
            pd.testing.assert_frame_equal(ours._data, theirs._data[["label"]])
            assert not _addresses(ours._infer) & _addresses(ours._data)
    assert not share._frames and share.loads == 1
    days = [tuple(map(pd.Timestamp, span)) for span in Counting.loaded]
    assert days == [(share.start, share.end), tuple(map(pd.Timestamp, windows[1]))]


def test_another_process_type_is_refused():
    with pytest.raises(ValueError, match="`process_type` must be 'append'"):
        SharedLoading(data_loader=StaticDataLoader(frame()), process_type="x")
