"""MsHandler, Level2Handler and the combined handler on the embedded market."""

import pickle
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from qlib.data import D

from data_handlers.aggregate.build import build
from data_handlers.aggregate.minute import MINUTE_NAMES
from data_handlers.aggregate.ticks import TICK_NAMES
from data_handlers.day import DayHandler
from data_handlers.level2 import Level2Handler
from data_handlers.loaders import aggregate_source, read_daily_parquet
from data_handlers.ms import MsHandler
from data_handlers.multi_frequency import MultiFrequencyHandler

DATES = {"start_time": "2019-10-08", "end_time": "2020-03-31"}
FIT = {"fit_start_time": "2019-10-08", "fit_end_time": "2019-12-31"}


@pytest.fixture(scope="module")
def frequency_sets(qlib_market, tmp_path_factory):
    """Folders of ms and l2 features of 30 stocks over half a year."""
    from qlib_ext.market import make_minute, make_ticks

    root = tmp_path_factory.mktemp("frequency")
    make_minute(
        qlib_market, root / "minute", stocks=30, start="2019-10-08", end="2020-03-31"
    )
    make_ticks(
        qlib_market, root / "ticks", stocks=10, start="2020-03-02", end="2020-03-31"
    )
    build("ms", root / "minute", root, bar_minutes=15, progress=False)
    build("l2", root / "ticks", root, progress=False)
    return {"ms": str(root / "ms"), "l2": str(root / "l2")}


@pytest.fixture(scope="module")
def ms_handler(frequency_sets):
    return MsHandler(path=frequency_sets["ms"], **DATES, **FIT)


def test_ms_handler_has_the_day_handlers_labels_and_risk(ms_handler, qlib_market):
    raw = ms_handler.fetch(data_key="raw", col_set=["feature", "label", "risk"])
    day = DayHandler(**DATES, **FIT)
    other = day.fetch(data_key="raw", col_set=["label", "risk"]).reindex(raw.index)
    assert list(raw["feature"].columns) == MINUTE_NAMES
    assert list(raw["label"].columns) == list(other["label"].columns)
    assert list(raw["risk"].columns) == list(other["risk"].columns)
    for group in ("label",):
        pd.testing.assert_frame_equal(raw[group], other[group])
    learn = ms_handler.fetch(data_key="learn", col_set=["feature", "label"])
    assert np.isfinite(learn["feature"].to_numpy()).all()
    assert abs(learn["feature"].to_numpy()).max() < 100
    label = learn["label"].iloc[:, 0].dropna()
    assert abs(label.groupby(level=0).mean()).max() < 1e-4


def test_ms_handler_statistics_use_the_fit_window_only(frequency_sets, ms_handler):
    short = MsHandler(
        path=frequency_sets["ms"], **{**DATES, "end_time": "2019-12-31"}, **FIT
    )
    a = ms_handler.fetch(selector=slice("2019-10-08", "2019-12-31"), col_set="feature")
    b = short.fetch(col_set="feature")
    pd.testing.assert_frame_equal(a, b)


def test_ms_handler_takes_a_market_by_name_with_its_spans(frequency_sets, qlib_market):
    handler = MsHandler(path=frequency_sets["ms"], instruments="csi300", **DATES, **FIT)
    spans = D.list_instruments(
        D.instruments("csi300"), DATES["start_time"], DATES["end_time"]
    )
    index = handler.fetch(data_key="raw").index
    assert len(index)
    for day, code in index[:: max(len(index) // 300, 1)]:
        assert any(a <= day <= b for a, b in spans[code]), (day, code)


def test_handler_unpickles_in_a_fresh_process(
    frequency_sets, qlib_market, tmp_path, run_fresh
):
    # Qlib pickles the handler without its data, then sets the data up again there.
    handler = MsHandler(path=frequency_sets["ms"], instruments="csi300", **DATES, **FIT)
    (tmp_path / "h.pkl").write_bytes(pickle.dumps(handler))
    code = (
        "import pickle, qlib\n"
        f"qlib.init(provider_uri={str(qlib_market)!r}, kernels=1, logging_level=40)\n"
        f"h = pickle.load(open({str(tmp_path / 'h.pkl')!r}, 'rb'))\n"
        "h.setup_data()\n"
        f"h.fetch().to_pickle({str(tmp_path / 'out.pkl')!r})\n"
    )
    run_fresh(code, tmp_path)
    pd.testing.assert_frame_equal(pd.read_pickle(tmp_path / "out.pkl"), handler.fetch())


def test_level2_handler_has_20_features_of_the_stocks_with_ticks(frequency_sets):
    handler = Level2Handler(
        path=frequency_sets["l2"],
        start_time="2020-03-02",
        end_time="2020-03-31",
        fit_start_time="2020-03-02",
        fit_end_time="2020-03-13",
    )
    raw = handler.fetch(data_key="raw", col_set="feature")
    assert list(raw.columns) == TICK_NAMES
    assert raw.index.get_level_values("instrument").nunique() <= 10
    assert raw.notna().mean().min() > 0.8


def test_multi_frequency_handler_has_48_features_aligned_by_row(
    frequency_sets, ms_handler
):
    dates = {"start_time": "2020-02-03", "end_time": "2020-03-31"}
    fit = {"fit_start_time": "2020-02-03", "fit_end_time": "2020-03-31"}
    handler = MultiFrequencyHandler(
        ms_path=frequency_sets["ms"], l2_path=frequency_sets["l2"], **dates, **fit
    )
    raw = handler.fetch(data_key="raw", col_set=["feature", "label"])
    assert raw["feature"].shape[1] == 48
    ms = ms_handler.fetch(data_key="raw", col_set="feature")
    both = raw["feature"].index.intersection(ms.index)
    pd.testing.assert_frame_equal(raw["feature"].loc[both, MINUTE_NAMES], ms.loc[both])
    # All listed stocks are there, those without minute bars with NaN.
    assert raw["feature"]["ms_rv"].isna().any()
    with pytest.raises(ValueError, match="leave no feature"):
        MultiFrequencyHandler(ms_path=None, l2_path=None, day=False, **dates, **fit)


def test_handler_refuses_files_of_other_definitions(frequency_sets, tmp_path):
    source = sorted((tmp_path.parent).glob("nothing"))
    assert not source
    table = pq.read_table(f"{frequency_sets['ms']}/2020.parquet")
    meta = {**table.schema.metadata, b"qlib_ext.schema_version": b"0"}
    pq.write_table(table.replace_schema_metadata(meta), tmp_path / "2020.parquet")
    with pytest.raises(ValueError, match="holds ms features, version 0"):
        aggregate_source("ms", str(tmp_path))
    # Whichever of the years that will be read it is.
    (tmp_path / "2020.parquet").rename(tmp_path / "2019.parquet")
    shutil.copy(f"{frequency_sets['ms']}/2020.parquet", tmp_path)
    with pytest.raises(ValueError, match=r"2019\.parquet holds ms features, version 0"):
        MsHandler(path=str(tmp_path), **DATES, **FIT)
    aggregate_source("ms", str(tmp_path), days={"start_time": "2020-01-02"})
    with pytest.raises(ValueError, match="needed is l2"):
        Level2Handler(path=frequency_sets["ms"], **DATES, **FIT)


def test_features_see_the_alpha_of_their_own_frequency(frequency_sets, qlib_market):
    oracle = pd.read_parquet(f"{qlib_market}.oracle.parquet")
    oracle = oracle.set_index(["datetime", "instrument"])

    def rank_ic(kind, feature, alpha):
        frame = read_daily_parquet(frequency_sets[kind], [feature]).join(oracle[alpha])
        ranks = frame.groupby(level="datetime").rank()
        return ranks.groupby(level="datetime").corr().iloc[::2, 1].mean()

    # The last half-hour carries the intraday alpha, the aggressors the tick alpha.
    assert rank_ic("ms", "ms_ret_last30", "minute") > 0.4
    assert rank_ic("l2", "l2_act_buy", "tick") > 0.4
    assert abs(rank_ic("ms", "ms_ret_last30", "tick")) < 0.15
    assert abs(rank_ic("l2", "l2_act_buy", "minute")) < 0.25
