"""Fixtures for every test: small embedded markets, made once a session."""

import functools
import gc
import importlib
import itertools
import logging
import multiprocessing
import os
import runpy
import shutil
import sqlite3
import sys
import tempfile
import threading
from pathlib import Path

import pytest

gc.disable()  # imports and collection make a million objects, and leave no circle


_MEMORY, _ROOM = Path("/dev/shm"), 8 << 30  # of which a run takes two


def pytest_configure(config):
    """Keep temporary files in memory where there is room: a store is many small ones.

    `--basetemp` and the variable say otherwise.
    """
    chosen = config.option.basetemp or "PYTEST_DEBUG_TEMPROOT" in os.environ
    if not chosen and os.access(_MEMORY, os.W_OK) and _free_memory() > _ROOM:
        for left in _MEMORY.glob("qlib-ext-*-*"):  # by a run that failed or was killed
            if not Path("/proc", left.name.split("-")[2]).exists():
                shutil.rmtree(left, ignore_errors=True)
        prefix = f"qlib-ext-{os.getpid()}-"
        config.files_in_memory = tempfile.mkdtemp(prefix=prefix, dir=_MEMORY)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = config.files_in_memory


def _free_memory() -> int:
    """Bytes that files in memory may take; its size alone says nothing of others."""
    fields = dict(x.split(":") for x in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) << 10
    return min(available, shutil.disk_usage(_MEMORY).free)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    folder = getattr(session.config, "files_in_memory", None)
    if folder and exitstatus == 0:  # else someone may want to look before the next
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_finish():
    gc.set_threshold(20_000, 10, 10)
    gc.enable()
    keep_what_is_left()


_COLLECT = gc.collect


def keep_what_is_left() -> None:
    """What was imported or is shared stays: no later collection looks at it again."""
    _COLLECT()
    gc.freeze()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Function that returns a path, made by ``make(path)`` once for all test processes.

    No test may write below it.
    """
    from data_handlers.files import locked

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root = root / "made_once"

    def get(name, make):
        with locked(root / f"{name}.lock", f"{name} is being made", wait=True):
            if not (root / f"{name}.done").exists():
                make(root / name)
                (root / f"{name}.done").touch()
        return root / name

    return get


@pytest.fixture(scope="session")
def market(made_once):
    """Path of a planted market: 100 stocks, 2018-2020 (oracle beside the store)."""
    from qlib_ext.market import make_market

    options = dict(stocks=100, years=3, seed=7, trades=120)
    return made_once("planted", lambda out: make_market(out, **options))


@pytest.fixture(scope="session")
def market_small(made_once):
    """Path of a planted market of 30 stocks, 2018-2020, for what any market shows."""
    from qlib_ext.market import make_market

    options = dict(stocks=30, years=3, seed=5, trades=40)
    return made_once("small", lambda out: make_market(out, **options))


@pytest.fixture(scope="session")
def market_none(made_once):
    """Path of the market of 100 stocks without alpha."""
    from qlib_ext.market import make_market

    options = dict(stocks=100, years=3, seed=7, signal="none", trades=120)
    return made_once("none", lambda out: make_market(out, **options))


@pytest.fixture(scope="session")
def market_futures(made_once):
    """Store of three years of simulated treasury-bond futures."""
    from qlib_ext.market import make_futures

    return made_once("futures", lambda out: make_futures(out, years=3, seed=1))


@pytest.fixture(scope="session")
def market_minute(market, made_once):
    """Directory of 15-minute bars of the first 40 stocks of `market`, on every day."""
    from qlib_ext.market import make_minute

    options = dict(stocks=40, bar_minutes=15)
    return made_once("minute", lambda out: make_minute(market, out, **options))


@pytest.fixture(scope="session")
def market_ticks(market, made_once):
    """Directory of ticks of 25 stocks of `market`, November and December 2020."""
    from qlib_ext.market import make_ticks

    options = dict(stocks=25, start="2020-11-01")
    return made_once("ticks", lambda out: make_ticks(market, out, **options))


@pytest.fixture(scope="session")
def real_data():
    """Directory of the real market data, or a skip that says where it is looked for."""
    folder = os.environ.get("QLIB_EXT_DATA")
    if not folder:
        pytest.skip("QLIB_EXT_DATA names no folder of real market data")
    if not Path(folder).is_dir():
        pytest.skip(f"no real market data: QLIB_EXT_DATA is {folder}, no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def real_file(real_data):
    """Function that gives the path of a file of real data, or skips."""

    def find(name):
        path = real_data / name
        if not path.is_file():
            pytest.skip(f"no real market data: {path}, below QLIB_EXT_DATA")
        return path

    return find


@pytest.fixture(scope="session")
def qlib_market(market, tmp_path_factory):
    """Qlib initialised on `market`; yields the store's path.

    A test that calls ``qlib.init`` on another store must put this one back, with
    ``init_qlib`` below.
    """
    init_qlib(market, tmp_path_factory.mktemp("mlflow"))
    _SESSION_STORE.append(market)
    return market


_SESSION_STORE: list = []


@pytest.fixture(scope="session")
def fork():
    """Function that starts ``target(*args, **kwargs)`` in a copy of this process.

    Nothing is imported again, and the process may be killed. What wants a process that
    knows nothing of ours takes `run_fresh`.
    """
    context = multiprocessing.get_context("fork")

    def start(target, *args, **kwargs):
        process = context.Process(target=_alone, args=(target, args, kwargs))
        process.start()
        return process

    return start


def _alone(target, args, kwargs):
    """Run in a fork: no thread was copied, and locks are shared with the tests."""
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    target(*args, **kwargs)


def _written(code, folder, number, args):
    """A script of that code with `args` in ``sys.argv``, and its output's file."""
    script = Path(folder) / f"process{number}.py"
    log = script.with_suffix(".log")
    head = (
        "import os, sys",
        f"os.chdir({str(folder)!r})",
        f"sys.argv = {[str(script), *map(str, args)]!r}",
        f"sys.stdout = sys.stderr = open({str(log)!r}, 'w', buffering=1)",
    )
    script.write_text("\n".join(head) + "\n" + code)
    return str(script), log


_NUMBER = itertools.count()


@pytest.fixture(scope="session")
def start_process(fork):
    """Function that starts Python code in a fork: (process, its output's file).

    It runs in `folder` with `args` in ``sys.argv``.
    """

    def start(code, folder, *args):
        script, log = _written(code, folder, next(_NUMBER), args)
        return fork(runpy.run_path, script, run_name="__main__"), log

    return start


def _ended(process, log):
    process.join()
    text = log.read_text() if log.exists() else ""
    assert process.exitcode == 0, text[-3000:]
    return text


@pytest.fixture(scope="session")
def run_process(start_process):
    """Function like `start_process` that waits and returns what the code printed."""
    return lambda code, folder, *args: _ended(*start_process(code, folder, *args))


@pytest.fixture(scope="session")
def run_fresh():
    """Function like `run_process`, in a process that has seen no module of ours."""

    def run(code, folder, *args):
        script, log = _written(code, folder, next(_NUMBER), args)
        _ASK_FRESH.send(script)
        assert _ASK_FRESH.recv() == 0, log.read_text()[-3000:]
        return log.read_text()

    return run


_ASK_FRESH, _ANSWER = multiprocessing.Pipe()


def pytest_collection(session):
    """Before any test is imported, leave a process that forks for `run_fresh`."""
    shared = session.config.getoption("numprocesses", None)
    if shared and "PYTEST_XDIST_WORKER" not in os.environ:
        return  # this process only hands out the tests
    # PyTorch imports its compiler for the first optimiser: once for all forks.
    known = ("torch._dynamo", "qlib.workflow", "qlib.contrib.data.handler")
    for name in known:
        importlib.import_module(name)
    if os.fork():
        return
    for name in list(sys.modules):  # a folder's conftest was named by the command
        if name.partition(".")[0] in ("qlib_ext", "data_handlers"):
            del sys.modules[name]
    _ASK_FRESH.close()
    context = multiprocessing.get_context("fork")
    while True:
        try:
            script = _ANSWER.recv()
        except EOFError:  # the tests have ended
            os._exit(0)
        process = context.Process(
            target=runpy.run_path, args=(script,), kwargs={"run_name": "__main__"}
        )
        process.start()
        process.join()
        _ANSWER.send(process.exitcode)


@pytest.fixture(scope="session")
def empty_database(pytestconfig):
    """SQLite file that holds MLflow's tables and no experiment, kept between runs."""
    import mlflow
    import sqlalchemy
    from mlflow.store.db import utils

    name = f"mlflow-{mlflow.__version__}.db"
    made = pytestconfig.cache.mkdir("databases") / name
    if not made.exists():
        draft = made.with_suffix(f".{os.getpid()}")
        utils._initialize_tables(sqlalchemy.create_engine(f"sqlite:///{draft}"))
        os.replace(draft, made)
    return made


@pytest.fixture(scope="session")
def fresh_database(empty_database):
    """Function that puts an empty tracking database into a folder, for processes."""

    def copy(folder, name="mlruns.db"):
        folder.mkdir(exist_ok=True)
        shutil.copy(empty_database, folder / name)
        return folder

    return copy


@pytest.fixture(scope="session", autouse=True)
def tables_are_copied(empty_database):
    """A new SQLite database is a copy: making its tables takes MLflow 4 s a time.

    And MLflow reads its migrations once, not for each database.
    """
    from mlflow.store.db import utils

    make, newest = utils._initialize_tables, utils._get_latest_schema_revision

    def copy(engine):
        file = engine.url.database
        if engine.dialect.name == "sqlite" and file and not os.stat(file).st_size:
            engine.dispose()
            shutil.copy(empty_database, file)
        else:
            make(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", copy)
        patch.setattr(utils, "_get_latest_schema_revision", functools.cache(newest))
        yield


@pytest.fixture(scope="session", autouse=True)
def runs_cost_little():
    """A run's transactions do not wait for the disk, and no run keeps Git's changes.

    No test cuts the power, and MLflow waits longer than it works. A task that ends
    collects garbage, which modules of tests do as well. Qlib sets a logger's
    level at each message, and the caches of a thousand loggers would be emptied.
    """
    from qlib.workflow.recorder import MLflowRecorder
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def relax(connection, _):
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    set_level = logging.Logger.setLevel

    def set_other_level(logger, level):
        if level != logger.level:
            set_level(logger, level)

    event.listen(Engine, "connect", relax)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(gc, "collect", lambda generation=2: 0)
        patch.setattr(logging.Logger, "setLevel", set_other_level)
        patch.setattr(MLflowRecorder, "_log_uncommitted_code", lambda self: None)
        yield
    event.remove(Engine, "connect", relax)


@pytest.fixture(scope="module", autouse=True)
def qlib_is_put_back(tmp_path_factory):
    """Whatever store a module's tests used, the next module finds the session's."""
    yield
    if _SESSION_STORE:
        init_qlib(_SESSION_STORE[0], tmp_path_factory.mktemp("mlflow"))
    keep_what_is_left()


def init_qlib(store, folder) -> None:
    """Initialise Qlib on `store` in one process, experiments under `folder`."""
    import qlib

    qlib.init(
        provider_uri=str(store),
        region="cn",
        kernels=1,
        logging_level=logging.WARNING,
        exp_manager={
            "class": "RunManager",
            "module_path": "qlib_ext.recorders",
            "kwargs": {
                "uri": f"sqlite:///{folder}/mlflow.db",
                "default_exp_name": "tests",
            },
        },
    )


@pytest.fixture(scope="session")
def init_on():
    """`init_qlib`, for fixtures of a module; a test uses `use_store`."""
    return init_qlib


@pytest.fixture(scope="session")
def toy_dataset():
    """Maker of small PanelDatasets without a store: a known signal in feature `x0`."""
    return make_toy_dataset


def make_toy_dataset(
    n_days=120,
    n_stocks=24,
    n_features=3,
    signal=1.0,
    seed=0,
    labels=("RET10",),
    **kwargs,
):
    """PanelDataset whose label is `signal` times the mean of x0 over three days."""
    import numpy as np
    import pandas as pd
    from qlib.data.dataset.handler import DataHandlerLP
    from qlib.data.dataset.loader import StaticDataLoader

    from qlib_ext.dataset import PanelDataset

    rng = np.random.default_rng(seed)
    dates = pd.bdate_range("2020-01-01", periods=n_days)
    names = [f"S{i:03d}" for i in range(n_stocks)]
    x = rng.normal(size=(n_days, n_stocks, n_features))
    recent = (
        np.stack([np.roll(x[..., 0], k, axis=0) for k in range(3)]).mean(0) * 3**0.5
    )
    noise = rng.normal(size=(n_days, n_stocks, len(labels)))
    y = signal * recent[..., None] + noise
    risk = np.stack(
        [
            np.tile(np.arange(n_stocks) % 4, (n_days, 1)),
            rng.normal(size=(n_days, n_stocks)) * 0.1 + np.arange(n_stocks) / 5 + 20,
            rng.normal(size=(n_days, n_stocks)),
        ],
        axis=-1,
    )
    columns = [("feature", f"x{k}") for k in range(n_features)]
    columns += [("label", name) for name in labels]
    columns += [("risk", name) for name in ("industry", "log_mcap", "momentum")]
    data = pd.DataFrame(
        np.concatenate([x, y, risk], axis=-1).reshape(n_days * n_stocks, -1),
        index=pd.MultiIndex.from_product(
            [dates, names], names=["datetime", "instrument"]
        ),
        columns=pd.MultiIndex.from_tuples(columns),
    )
    data.loc[dates[-11] :, "label"] = np.nan  # no future, no label
    if (change := kwargs.pop("change", None)) is not None:
        data = change(data)
    cut = [int(n_days * share) for share in (0.0, 0.55, 0.75)]
    segments = {
        "train": (dates[cut[0]], dates[cut[1] - 1]),
        "valid": (dates[cut[1]], dates[cut[2] - 1]),
        "test": (dates[cut[2]], dates[-1]),
    }
    handler = DataHandlerLP(data_loader=StaticDataLoader(data))
    return PanelDataset(handler, segments, purge="off", **kwargs)


@pytest.fixture
def use_store(qlib_market, tmp_path):
    """Function that points Qlib at another store; the session's is back afterwards."""
    yield lambda store: init_qlib(store, tmp_path)
    init_qlib(qlib_market, tmp_path)
