"""ParquetDataLoader: rows, markets, spans, years, errors, fresh processes."""

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import qlib
from qlib.config import C
from qlib.data import D

from data_handlers.loaders import ParquetDataLoader, read_daily_parquet, read_factors
from data_handlers.universe import membership_mask

DAYS = pd.bdate_range("2019-12-02", "2020-02-28")
CODES = ["SH600000", "SH600001", "SZ000001"]


def _write_bins(root: Path) -> None:
    """Write a three-stock Qlib folder by hand: close = day number + 100 × stock."""
    (root / "calendars").mkdir(parents=True)
    (root / "instruments").mkdir()
    (root / "calendars" / "day.txt").write_text(
        "\n".join(f"{d:%Y-%m-%d}" for d in DAYS) + "\n"
    )
    first, last = f"{DAYS[0]:%Y-%m-%d}", f"{DAYS[-1]:%Y-%m-%d}"
    (root / "instruments" / "all.txt").write_text(
        "".join(f"{c}\t{first}\t{last}\n" for c in CODES)
    )
    (root / "instruments" / "mini.txt").write_text(
        "SH600000\t2019-12-10\t2019-12-20\n"
        "SH600000\t2020-02-03\t2020-02-28\n"
        "SZ000001\t2020-01-06\t2020-01-31\n"
    )
    for k, code in enumerate(CODES):
        folder = root / "features" / code.lower()
        folder.mkdir(parents=True)
        values = np.arange(len(DAYS)) + 100.0 * (k + 1)
        np.hstack([[0], values]).astype("<f4").tofile(folder / "close.day.bin")


def _frame() -> pd.DataFrame:
    index = pd.MultiIndex.from_product([DAYS, CODES], names=["datetime", "instrument"])
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        rng.normal(size=(len(index), 2)), index=index, columns=["a", "b"]
    )
    # SH600001 is absent on one day: a suspended stock has no row.
    return frame.drop(index=(DAYS[3], "SH600001"))


@pytest.fixture(scope="module")
def parquet_store(tmp_path_factory):
    monkeypatch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("loader_store")
    _write_bins(root)
    (root / "ms").mkdir()
    frame = _frame()
    for year, part in frame.groupby(frame.index.get_level_values(0).year):
        shuffled = part.sample(frac=1, random_state=1)
        shuffled.reset_index().to_parquet(root / "ms" / f"{year}.parquet", index=False)
    before = (C["provider_uri"], C["exp_manager"]) if C.registered else None
    qlib.init(
        provider_uri=str(root),
        region="cn",
        kernels=1,
        logging_level=40,
        exp_manager={
            "class": "MLflowExpManager",
            "module_path": "qlib.workflow.expm",
            "kwargs": {
                "uri": f"sqlite:///{root / 'runs.db'}",
                "default_exp_name": "test",
            },
        },
    )
    monkeypatch.chdir(root)  # artifacts of a sqlite store land under the working folder
    yield root
    monkeypatch.undo()
    if before is not None:  # other tests share one store for the whole session
        qlib.init(
            provider_uri=before[0],
            exp_manager=before[1],
            region="cn",
            kernels=1,
            logging_level=40,
        )


def test_loader_returns_sorted_rows_and_groups(parquet_store):
    loader = ParquetDataLoader({"feature": {"path": "{store}/ms"}})
    got = loader.load(None, "2019-12-01", "2020-02-28")
    assert list(got.columns) == [("feature", "a"), ("feature", "b")]
    assert got.index.names == ["datetime", "instrument"]
    pd.testing.assert_frame_equal(got["feature"], _frame(), check_freq=False)


@pytest.mark.parametrize("indexed", [True, False])
def test_loader_reads_one_file_with_keys_as_index_or_columns(tmp_path, indexed):
    path = tmp_path / "one.parquet"
    frame = _frame()
    (frame if indexed else frame.reset_index()).to_parquet(path)
    got = read_daily_parquet(path, columns=["b"])
    pd.testing.assert_frame_equal(got, frame[["b"]], check_freq=False)


def test_loader_honours_membership_spans_like_qlib(parquet_store):
    loader = ParquetDataLoader(
        {
            "feature": {"path": "{store}/ms", "columns": ["b"], "names": ["bee"]},
            "label": {"expressions": ["$close"], "names": ["c"]},
        }
    )
    got = loader.load("mini", "2019-12-02", "2020-02-28")
    expected = D.features(
        D.instruments("mini"), ["$close"], "2019-12-02", "2020-02-28"
    ).swaplevel()
    assert set(got.index) == set(expected.index)
    want = expected.loc[got.index, "$close"].to_numpy()
    assert np.array_equal(got[("label", "c")].to_numpy(), want)
    assert np.array_equal(got[("feature", "bee")], _frame().loc[got.index, "b"])


def test_loader_list_of_codes_and_dates_select_rows(parquet_store):
    loader = ParquetDataLoader({"feature": {"path": "{store}/ms"}})
    got = loader.load(["SZ000001"], "2020-01-06", "2020-01-10")
    assert set(got.index.get_level_values(1)) == {"SZ000001"}
    assert len(got) == 5


def test_loader_joins_several_sources_and_keeps_feature_rows(parquet_store):
    config = {
        "feature": [
            {"path": "{store}/ms", "columns": ["a"]},
            {"expressions": ["$close"], "names": ["close"]},
        ],
        "label": [{"expressions": ["Ref($close, -1)"], "names": ["y"]}],
    }
    got = ParquetDataLoader(config).load("all", "2019-12-02", "2020-02-28")
    # Union of the feature sources: the day without a Parquet row is there, with NaN.
    assert len(got) == len(DAYS) * len(CODES)
    row = got.loc[(DAYS[3], "SH600001")]
    assert np.isnan(row[("feature", "a")])
    assert row[("feature", "close")] == 203
    assert row[("label", "y")] == 204
    only = ParquetDataLoader(
        {"feature": config["feature"][:1], "label": config["label"]}
    )
    assert len(only.load("all", "2019-12-02", "2020-02-28")) == len(got) - 1
    inner = ParquetDataLoader(config, join="inner")
    assert len(inner.load("all", "2019-12-02", "2020-02-28")) == len(got) - 1


def test_loader_unpickles_in_a_fresh_process_with_its_config(
    parquet_store, tmp_path, run_fresh
):
    config = {
        "feature": {"path": "{store}/ms"},
        "label": {"expressions": ["$close"], "names": ["c"]},
    }
    loader = ParquetDataLoader(config)
    (tmp_path / "loader.pkl").write_bytes(pickle.dumps(loader))
    code = (
        "import pickle, qlib, sys\n"
        f"qlib.init(provider_uri={str(parquet_store)!r}, kernels=1, logging_level=40)\n"
        f"loader = pickle.load(open({str(tmp_path / 'loader.pkl')!r}, 'rb'))\n"
        "frame = loader.load('mini', '2019-12-02', '2020-02-28')\n"
        f"frame.to_pickle({str(tmp_path / 'out.pkl')!r})\n"
    )
    run_fresh(code, tmp_path)
    there = pd.read_pickle(tmp_path / "out.pkl")
    here = loader.load("mini", "2019-12-02", "2020-02-28")
    pd.testing.assert_frame_equal(there, here)


def test_loader_reads_a_recorder_artifact(parquet_store, tmp_path):
    from qlib.workflow import R

    frame = _frame()
    path = tmp_path / "units.parquet"
    frame.to_parquet(path)
    with R.start(experiment_name="units"):
        R.get_recorder().save_objects(local_path=str(path))
        rid = R.get_recorder().id
    with R.start(experiment_name="units"):
        pass  # finished, without the file
    with pytest.raises(KeyError), R.start(experiment_name="units"):
        (frame * 2).to_parquet(path)
        R.get_recorder().save_objects(local_path=str(path))
        raise KeyError("stopped early")
    for recorder in (rid, "latest"):
        source = {"experiment": "units", "recorder": recorder}
        got = ParquetDataLoader({"feature": source}).load(None)
        pd.testing.assert_frame_equal(got["feature"], frame, check_freq=False)
    source = {"experiment": "units", "recorder": rid, "file": "other.parquet"}
    with pytest.raises(ValueError, match=r"no artifact 'other\.parquet'"):
        ParquetDataLoader({"feature": source}).load(None)
    source["recorder"] = "latest"
    with pytest.raises(ValueError, match=r"no finished recorder with 'other\.parquet'"):
        ParquetDataLoader({"feature": source}).load(None)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({}, "`config` must be a dict"),
        ({"feature": []}, "is empty"),
        ({"feature": {"path": "x", "colums": ["a"]}}, "unknown key 'colums'"),
        ({"feature": {"path": "x", "expressions": ["$close"]}}, "exactly one of"),
        ({"feature": {"experiment": "x"}}, "`recorder`"),
        ({"feature": {"path": "x", "columns": "a"}}, "`columns` must be a list"),
        ({"feature": {"expressions": ["$a"], "names": ["b", "c"]}}, "as many names"),
        ({"feature": 3}, "must be a dict with"),
    ],
)
def test_loader_bad_config_names_the_field(config, match):
    with pytest.raises(ValueError, match=match):
        ParquetDataLoader(config)


def test_loader_missing_file_year_or_column_is_named(parquet_store):
    def load(start="2019-12-02", end="2020-02-28", **source):
        return ParquetDataLoader({"feature": source}).load(None, start, end)

    with pytest.raises(ValueError, match=r"No Parquet file at .*nowhere"):
        load(path="{store}/nowhere")
    with pytest.raises(ValueError, match="no file for the year 2018"):
        load(path="{store}/ms", start="2018-06-01")
    with pytest.raises(ValueError, match=r"2019\.parquet has no column 'c'"):
        load(path="{store}/ms", columns=["c"])
    with pytest.raises(ValueError, match="Market 'moon'"):
        ParquetDataLoader({"feature": {"path": "{store}/ms"}}).load("moon")
    with pytest.raises(ValueError, match="lies after"):
        load(path="{store}/ms", start="2020-02-01", end="2020-01-01")
    got = load(path="{store}/ms", start="2018-06-01", missing_years="warn")
    assert len(got) == len(_frame())


def test_loader_rejects_bad_files(tmp_path):
    good = _frame().reset_index()

    def load(frame):
        frame.to_parquet(tmp_path / "f.parquet")
        return read_daily_parquet(tmp_path / "f.parquet")

    with pytest.raises(ValueError, match="appears twice"):
        load(pd.concat([good, good.iloc[:2]]))
    with pytest.raises(ValueError, match="midnight"):
        load(good.assign(datetime=good["datetime"] + pd.Timedelta("9h")))
    with pytest.raises(ValueError, match="without a time zone"):
        load(good.assign(datetime=good["datetime"].dt.tz_localize("UTC")))
    with pytest.raises(ValueError, match="no column 'instrument'"):
        load(good.drop(columns="instrument"))
    data = (tmp_path / "f.parquet").read_bytes()
    (tmp_path / "f.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not a readable Parquet"):
        read_daily_parquet(tmp_path / "f.parquet")


class TestGivenFactors:
    def test_columns_or_index_are_read(self, tmp_path):
        frame = pd.DataFrame(
            {
                "datetime": pd.to_datetime(["2020-01-01"]),
                "instrument": ["a"],
                "skew": [1.0],
                "text": ["x"],
            }
        )
        frame.to_parquet(tmp_path / "f.parquet")
        got = read_factors(tmp_path / "f.parquet", "factors_path")
        assert list(got.columns) == ["skew"]
        assert list(got.index.names) == ["datetime", "instrument"]

    def test_codes_and_days_of_other_spellings_are_qlibs(self, tmp_path):
        codes = ["600000.XSHG", "sz000001", "SH600001", "AAPL", "000002"]
        days = ["2020-01-02", "20200103", "2020/01/06", "2020-01-07", "2020-01-08"]
        frame = pd.DataFrame({"datetime": days, "instrument": codes, "f": 1.0})
        frame.to_parquet(tmp_path / "f.parquet")
        got = read_factors(tmp_path / "f.parquet", "factors_path")
        assert got.index.get_level_values("instrument").tolist() == [
            *("SH600000", "SZ000001", "SH600001", "AAPL", "000002")
        ]
        assert got.index[1][0] == pd.Timestamp("2020-01-03")
        frame.assign(datetime="soon").to_parquet(tmp_path / "f.parquet")
        with pytest.raises(ValueError, match="no dates, first 'soon'"):
            read_factors(tmp_path / "f.parquet", "factors_path")

    def test_missing_keys_are_named(self, tmp_path):
        pd.DataFrame({"instrument": ["a"]}).to_parquet(tmp_path / "f.parquet")
        with pytest.raises(ValueError, match=r"`factors_path` .*lacks \['datetime'\]"):
            read_factors(tmp_path / "f.parquet", "factors_path")


def test_membership_follows_spans_and_an_empty_list_is_always():
    days = pd.DatetimeIndex(["2020-01-02", "2020-01-03", "2020-01-06", "2020-01-07"])
    spans = {
        # Both ends count; a span may begin and end on days without trade.
        "A": [("2019-01-01", "2020-01-02"), ("2020-01-04", "2020-01-06")],
        "ALWAYS": [],
    }
    found = membership_mask(spans, days, ["A", "ALWAYS", "ABSENT"])
    assert found[:, 0].tolist() == [True, False, True, False]
    assert found[:, 1].all() and not found[:, 2].any()
    assert membership_mask(None, days, ["A"]).all()
