"""`qlib-ext build`: from files to features, bins and reports on the command line."""

import shutil

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from data_handlers.aggregate.build import build
from data_handlers.loaders import read_daily_parquet
from qlib_ext.aggregates import build_store
from qlib_ext.cli import main
from qlib_ext.ingest.store import add_fields, read_bars, store_lock


@pytest.fixture(scope="module")
def minute_store(market_small, tmp_path_factory):
    """A copy of the market's store, and 15-minute bars of some stocks."""
    from qlib_ext.market import make_minute

    root = tmp_path_factory.mktemp("cli")
    shutil.copytree(market_small, root / "store")
    dates = dict(start="2020-01-02", end="2020-03-31")
    make_minute(market_small, root / "minute", stocks=12, **dates)
    return root


def _instruments(minute_store):
    return sorted(
        {
            code
            for file in (minute_store / "minute").glob("*.parquet")
            for code in pd.read_parquet(file, columns=["instrument"])["instrument"]
        }
    )


def _run(*args):
    return CliRunner().invoke(main, ["build", *map(str, args)])


def test_build_command_writes_features_and_bins(minute_store, qlib_market):
    store = minute_store / "store"
    args = ["ms", "--source", minute_store / "minute", "--out", store]
    args += ["--bar-minutes", 15, "--quiet", "--bins", "ms_skew,$ms_rv"]
    result = _run(*args)
    assert result.exit_code == 0, result.output
    assert "stock-days" in result.output and "2 features written" in result.output
    frame = read_daily_parquet(store / "ms")
    # As Qlib reads it, in an expression and beside a price.
    import qlib
    from qlib.config import C
    from qlib.data import D

    before = C["provider_uri"]
    try:
        qlib.init(provider_uri=str(store), region="cn", kernels=1, logging_level=40)
        codes = sorted(frame.index.unique("instrument"))
        fields = ["$ms_skew", "$ms_rv * 2", "$close"]
        got = D.features(codes, fields, "2020-01-02", "2020-03-31")
    finally:
        qlib.init(provider_uri=before, region="cn", kernels=1, logging_level=40)
    got = got.swaplevel().sort_index().loc[frame.index]
    assert np.allclose(got["$ms_skew"], frame["ms_skew"], equal_nan=True)
    assert np.allclose(got["$ms_rv * 2"], 2 * frame["ms_rv"], equal_nan=True)
    assert got["$close"].notna().mean() > 0.99
    again = _run(*args)
    assert "3 of them found finished" in again.output
    # A build of the last month changes neither the other months nor their bins.
    bins = read_bars(store, codes, ["ms_skew", "ms_rv"])
    result = _run(*args, "--start", "2020-03-01")
    assert result.exit_code == 0 and "kept of earlier builds" in result.output
    pd.testing.assert_frame_equal(read_daily_parquet(store / "ms"), frame)
    pd.testing.assert_frame_equal(read_bars(store, codes, ["ms_skew", "ms_rv"]), bins)


def test_build_takes_factors_from_the_store_where_bars_have_none(minute_store):
    bare = minute_store / "bare"
    bare.mkdir()
    for file in (minute_store / "minute").glob("*.parquet"):
        bars = pd.read_parquet(file).drop(columns="factor")
        bars.to_parquet(bare / file.name, index=False)
    with_store = minute_store / "store2"
    shutil.copytree(minute_store / "store", with_store)
    shutil.rmtree(with_store / "ms", ignore_errors=True)
    options = {"bar_minutes": 15, "progress": False}
    text = build_store("ms", bare, with_store, **options)
    assert "has no factors" not in text
    build("ms", minute_store / "minute", minute_store / "own", **options)
    a = read_daily_parquet(with_store / "ms")
    b = read_daily_parquet(minute_store / "own" / "ms")
    pd.testing.assert_frame_equal(a, b, rtol=1e-4, atol=1e-5)
    text = build_store("ms", bare, minute_store / "plain", **options)
    assert "the store has no factors" in text


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (["--bins", "ms_nothing"], "`--bins` names 'ms_nothing'"),
        (["--bins", " "], "`--bins` is empty"),
        (["--start", "2031-01-01"], "No bars between"),
        (["--bar-minutes", "1"], "15 minutes apart"),
    ],
)
def test_build_command_errors_are_one_line_that_helps(minute_store, extra, match):
    result = _run(
        *("ms", "--source", minute_store / "minute", "--out", minute_store / "store"),
        *("--bar-minutes", 15, "--quiet", *extra),
    )
    assert result.exit_code == 1
    assert match in result.output and "Traceback" not in result.output


def test_build_bins_keep_days_that_only_the_bins_have(minute_store):
    store = minute_store / "store3"
    shutil.copytree(minute_store / "store", store)
    shutil.rmtree(store / "ms", ignore_errors=True)
    args = ["ms", "--source", minute_store / "minute", "--out", store]
    args += ["--bar-minutes", 15, "--quiet", "--bins", "ms_rv"]
    code = _instruments(minute_store)[0]
    days = read_bars(store, [code], ["close"])["datetime"]
    vendor = pd.DataFrame({"datetime": days, "instrument": code, "ms_rv": 7.0})
    add_fields(store, vendor)
    assert _run(*args).exit_code == 0
    own = read_daily_parquet(store / "ms")["ms_rv"].xs(code, level="instrument")
    got = read_bars(store, [code], ["ms_rv"]).set_index("datetime")["ms_rv"]
    assert np.allclose(got.loc[own.index], own)
    assert (got.drop(own.index) == 7).all() and len(got) == len(days)


def test_build_bins_say_that_the_store_is_busy(minute_store):
    store = minute_store / "store"
    with store_lock(store):
        result = _run(
            *("ms", "--source", minute_store / "minute", "--out", store),
            *("--bar-minutes", 15, "--quiet", "--bins", "ms_rv"),
        )
    assert result.exit_code == 1 and "another process" in result.output
    assert isinstance(result.exception, SystemExit)


def test_build_bins_need_a_store(minute_store, tmp_path):
    result = _run(
        *("ms", "--source", minute_store / "minute", "--out", tmp_path),
        *("--quiet", "--bins", "all"),
    )
    assert result.exit_code == 1 and "needs a Qlib store" in result.output


def test_build_help_teaches():
    result = CliRunner().invoke(main, ["build", "--help"])
    for word in ("--source", "--workers", "ray", "Examples", "2020-01.parquet"):
        assert word in result.output


@pytest.mark.slow  # a cluster takes half a minute to start on a busy machine
@pytest.mark.parametrize("backend", ["ray", "dask"])
@pytest.mark.parametrize("kind", ["ms", "l2"])
def test_build_on_a_local_cluster_gives_the_same(
    minute_store, market, tmp_path, backend, kind
):
    pytest.importorskip({"ray": "ray", "dask": "distributed"}[backend])
    from qlib_ext.market import make_ticks

    options = {"bar_minutes": 15, "progress": False}
    source = minute_store / "minute"
    if kind == "l2":
        source = make_ticks(market, tmp_path / "ticks", stocks=8, start="2020-12-24")
    build(kind, source, tmp_path / "one", **options)
    build(kind, source, tmp_path / "two", workers=2, backend=backend, **options)
    a, b = (read_daily_parquet(tmp_path / x / kind) for x in ("one", "two"))
    assert len(a) > 30
    pd.testing.assert_frame_equal(a, b)
