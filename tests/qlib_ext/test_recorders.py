import io
import os
import pickle

import numpy as np
import pandas as pd
import pytest

from qlib_ext import recorders


class _Attack:
    def __reduce__(self):
        return os.system, ("echo attacked > /tmp/should-not-exist",)


def _frame():
    days = pd.date_range("2020-01-01", periods=2, freq="B", name="datetime")
    index = pd.MultiIndex.from_product(
        [days, ["SH600000", "SZ000001"]], names=["datetime", "instrument"]
    )
    return pd.DataFrame({"score": np.arange(4, dtype="f4")}, index)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_frames_and_series_load_as_they_were(protocol):
    frame = _frame()
    for value in (frame, frame["score"], frame.reset_index(), frame["score"].unstack()):
        file = io.BytesIO(pickle.dumps(value, protocol))
        got = recorders.FrameUnpickler(file).load()
        assert type(got) is type(value)
        assert got.equals(value)


def test_a_pickle_that_runs_code_is_refused():
    file = io.BytesIO(pickle.dumps(_Attack()))
    with pytest.raises(pickle.UnpicklingError, match=r"refused to load (posix|nt)"):
        recorders.FrameUnpickler(file).load()


def test_a_frame_that_hides_code_is_refused():
    frame = pd.DataFrame({"score": [_Attack()]})
    with pytest.raises(pickle.UnpicklingError, match="refused to load"):
        recorders.FrameUnpickler(io.BytesIO(pickle.dumps(frame))).load()


def test_absent_database_is_named_and_not_created(tmp_path):
    uri = f"sqlite:///{tmp_path}/none.db"
    with pytest.raises(ValueError, match=r"none\.db does not exist"):
        recorders.list_recorders(uri, "any")
    assert not (tmp_path / "none.db").exists()


class TestRealRecorder:
    @pytest.fixture(scope="class")
    def recorder(self, qlib_market):
        from qlib.workflow import R

        with R.start(experiment_name="reading"):
            recorder = R.get_recorder()
            recorder.save_objects(
                **{"pred.pkl": _frame(), "label.pkl": None, "bad.pkl": _Attack()}
            )
            recorder.save_objects(**{"dict.pkl": {"a": 1}})
        return recorder

    def test_recorder_is_found_and_its_frame_read(self, recorder):
        found = recorders.list_recorders(recorder.uri, "reading")
        assert [r.id for r in found] == [recorder.id]
        assert recorders.load_frame(found[0], "pred.pkl").equals(_frame())
        assert recorders.load_frame(found[0], "label.pkl").empty

    def test_bad_artifacts_are_named(self, recorder):
        with pytest.raises(ValueError, match=r"bad\.pkl of recorder .*refused"):
            recorders.load_frame(recorder, "bad.pkl")
        with pytest.raises(ValueError, match="must be a DataFrame, got dict"):
            recorders.load_frame(recorder, "dict.pkl")
        with pytest.raises(ValueError, match=r"has no artifact none\.pkl"):
            recorders.load_frame(recorder, "none.pkl")

    def test_unknown_experiment_lists_the_known(self, recorder):
        with pytest.raises(ValueError, match=r"'nothing' is not in .*reading"):
            recorders.list_recorders(recorder.uri, "nothing")

    def test_absent_report_names_the_remedy(self, recorder):
        with pytest.raises(ValueError, match="FactorRecord"):
            recorders.find_recorder(recorder.uri, "reading")


def test_passwords_are_masked_wherever_they_stand():
    from qlib_ext.recorders import redact

    assert redact("at http://me:s3:cr@t@host:5000/x, b@c") == (
        "at http://me:***@host:5000/x, b@c"
    )
    assert redact("postgresql://h/db?user=me&password=s3c&x=1") == (
        "postgresql://h/db?user=me&password=***&x=1"
    )
    assert (
        redact("sqlite:////a/b.db http://h:5000") == "sqlite:////a/b.db http://h:5000"
    )
