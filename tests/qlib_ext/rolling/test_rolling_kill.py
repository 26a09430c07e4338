"""Killed at any moment, a rolling run ends like one that was never disturbed.

Also: two runs on one tracking database at once, a store that grows meanwhile, and a
disk that is full.
"""

import copy
import errno
import os
import random
import runpy
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from qlib_ext.cli.roll import roll_text

HERE = runpy.run_path(str(Path(__file__).with_name("test_rolling.py")))
OPTIONS = dict(
    step="quarter", train_months=6, valid_months=3, seeds=1, threads=1, progress=False
)
TEST = "2020-07-01:2020-12-31"


def prepare(fresh_database, folder, market, epochs=2):
    config = copy.deepcopy(HERE["WORKFLOW"])
    config["qlib_init"]["provider_uri"] = str(market)
    config["qlib_init"]["exp_manager"] = {
        "class": "MLflowExpManager",
        "module_path": "qlib.workflow.expm",
        "kwargs": {"uri": f"sqlite:///{folder}/mlruns.db"},
    }
    config["task"]["model"]["kwargs"]["n_epochs"] = epochs
    fresh_database(folder)
    (folder / "w.yaml").write_text(yaml.safe_dump(config))


def roll_in(folder, **options):
    os.chdir(folder)  # MLflow puts artifacts below the working directory
    roll_text(folder / "w.yaml", TEST, **options)


def start(fork, folder, **more):
    return fork(roll_in, folder, **{**OPTIONS, "work": folder / "work", **more})


def joined(folder):
    """Joined scores of a finished run, and how many recorders are not finished."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlruns.db")
    runs = {
        name: client.search_runs([client.get_experiment_by_name(name).experiment_id])
        for name in ("tiny_roll", "tiny_roll_tasks")
    }
    (done,) = [r for r in runs["tiny_roll"] if r.info.status == "FINISHED"]
    path = client.download_artifacts(done.info.run_id, "pred.pkl")
    finished = [r for r in runs["tiny_roll_tasks"] if r.info.status == "FINISHED"]
    open_runs = [r for rs in runs.values() for r in rs if r.info.status == "RUNNING"]
    keys = [r.data.tags["rolling_task"] for r in finished]
    assert len(keys) == len(set(keys)) == 2, "a finished task was trained twice"
    assert not open_runs
    return pd.read_pickle(path)


@pytest.fixture(scope="module")
def undisturbed(fork, market_small, tmp_path_factory, fresh_database):
    """Scores of a run that nobody kills, and the seconds it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    prepare(fresh_database, folder, market_small)
    began = time.monotonic()
    process = start(fork, folder)
    process.join()
    assert process.exitcode == 0
    return joined(folder), {"seconds": time.monotonic() - began}


def kill_often(fork, folder, undisturbed, kills, seed):
    expected, took = undisturbed
    # The first run may have been timed while the machine was busy.
    rng = random.Random(seed)
    died = 0
    for _ in range(kills):
        process = start(fork, folder)
        process.join(rng.uniform(0.02, 0.6) * took["seconds"])
        ended = not process.is_alive()
        if not ended:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if ended:  # on a machine of uneven speed; nothing is left to kill
            took["seconds"] *= 0.7
            break
        died += process.exitcode == -signal.SIGKILL
    process = start(fork, folder)
    process.join()
    assert process.exitcode == 0
    pd.testing.assert_frame_equal(joined(folder), expected)
    return died


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_kills_then_the_same_result(
    fork, market_small, tmp_path, undisturbed, fresh_database, kills
):
    folder = tmp_path / "run"
    prepare(fresh_database, folder, market_small)
    assert kill_often(fork, folder, undisturbed, kills, seed=1) >= 1
    left = list((folder / "work").rglob("*.pt"))
    assert left == []  # checkpoints go when their task is finished


@pytest.mark.slow
def test_twenty_kills_then_the_same_result(
    fork, market_small, tmp_path, undisturbed, fresh_database
):
    died = 0
    for k in range(20):
        folder = tmp_path / f"run{k}"
        prepare(fresh_database, folder, market_small)
        died += kill_often(fork, folder, undisturbed, 4, seed=10 + k)
        print(f"killed {died} times", flush=True)
        if died >= 20:
            break
    assert died >= 20


@pytest.mark.slow
def test_two_runs_on_one_database_and_a_store_that_grows(
    fork, market_small, tmp_path, undisturbed, fresh_database
):
    """Both end as if alone, while days are appended to the store they read."""
    import shutil

    from qlib_ext.ingest.store import (
        extend_store,
        read_bars,
        read_calendar,
        read_meta,
        write_store,
    )

    codes = [path.name.upper() for path in (market_small / "features").iterdir()]
    bars = read_bars(market_small, codes)
    more = bars[bars["datetime"] >= "2020-12-21"].copy()
    days = read_calendar(market_small)[-9:]
    more = more[more["datetime"].isin(days)]
    ahead = pd.bdate_range("2021-01-04", periods=len(days))
    more["datetime"] = more["datetime"].map(dict(zip(days, ahead, strict=True)))
    store = tmp_path / "store"
    write_store(store, bars, index_codes=list(read_meta(market_small)["indices"]))
    shutil.copytree(
        market_small / "instruments", store / "instruments", dirs_exist_ok=True
    )
    folder = tmp_path / "run"
    prepare(fresh_database, folder, store)
    first = start(fork, folder, experiment="one")
    second = start(fork, folder, experiment="two", seeds=2)
    for day in ahead:
        extend_store(
            store,
            more[more["datetime"] == day],
            expected_end=read_calendar(store)[-1],
        )
        time.sleep(1)
    first.join()
    second.join()
    assert (first.exitcode, second.exitcode) == (0, 0)
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlruns.db")
    for name, seeds in (("one", 1), ("two", 2)):
        (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
        score = pd.read_pickle(client.download_artifacts(run.info.run_id, "pred.pkl"))
        tasks = client.get_experiment_by_name(f"{name}_tasks").experiment_id
        assert len(client.search_runs([tasks])) == 2 * seeds
        if seeds == 1:
            pd.testing.assert_frame_equal(score, undisturbed[0])


class TestFullDisk:
    def test_roll_names_the_reason_and_goes_on_later(
        self, market_small, tmp_path, monkeypatch, fresh_database
    ):
        import torch

        monkeypatch.chdir(tmp_path)
        prepare(fresh_database, tmp_path, market_small, epochs=1)
        options = {**OPTIONS, "seeds": 1, "work": tmp_path / "work", "retries": 0}
        test = "2020-07-01:2020-09-30"

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", full)
            text, code = roll_text(tmp_path / "w.yaml", test, **options)
        assert code == 1
        assert "No space left on device" in text
        text, code = roll_text(tmp_path / "w.yaml", test, **options)
        assert code == 0
        assert "joined score" in text

    def test_store_is_intact_after_an_update_that_did_not_fit(
        self, market_small, tmp_path, monkeypatch
    ):
        """A write fails half-way, as on a full disk."""
        import shutil

        from qlib_ext.ingest import store as stores

        store = tmp_path / "store"
        shutil.copytree(market_small, store)
        before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
        calendar = stores.read_calendar(store)
        codes = [path.name.upper() for path in (store / "features").iterdir()]
        bars = stores.read_bars(store, codes)
        new = bars[bars["datetime"] == calendar[-1]].copy()
        new["datetime"] = pd.Timestamp("2021-01-04")
        written = [0]
        real = stores._write_bin

        def limited(file, start, values):
            written[0] += 1
            if written[0] > 100:
                file.write_bytes(b"\0" * 12)  # the half that still went in
                raise OSError(errno.ENOSPC, "No space left on device", str(file))
            real(file, start, values)

        monkeypatch.setattr(stores, "_write_bin", limited)
        with pytest.raises(ValueError, match=r"the disk is full.*as it was"):
            stores.extend_store(store, new, expected_end=calendar[-1])
        after = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
        assert after == before
        assert [p.name for p in tmp_path.iterdir()] == ["store"]
        monkeypatch.setattr(stores, "_write_bin", real)
        stores.extend_store(store, new, expected_end=calendar[-1])
        assert stores.read_calendar(store)[-1] == pd.Timestamp("2021-01-04")
