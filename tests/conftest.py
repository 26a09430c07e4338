"""Fixtures for every test: small embedded markets, made once a session."""

import logging

import pytest


@pytest.fixture(scope="session")
def market(tmp_path_factory):
    """Path of a planted market: 100 stocks, 2018-2020 (oracle beside the store)."""
    from qlib_ext.market import make_market

    out = tmp_path_factory.mktemp("market") / "planted"
    return make_market(out, stocks=100, years=3, seed=7)


@pytest.fixture(scope="session")
def market_none(tmp_path_factory):
    """Path of the same market without alpha."""
    from qlib_ext.market import make_market

    out = tmp_path_factory.mktemp("market") / "none"
    return make_market(out, stocks=100, years=3, seed=7, signal="none")


@pytest.fixture(scope="session")
def qlib_market(market, tmp_path_factory):
    """Qlib initialised on `market`; yields the store's path.

    A test that calls ``qlib.init`` on another store must put this one back, with
    ``init_qlib`` below.
    """
    init_qlib(market, tmp_path_factory.mktemp("mlflow"))
    return market


def init_qlib(store, folder) -> None:
    """Initialise Qlib on `store` in one process, experiments under `folder`."""
    import qlib

    qlib.init(
        provider_uri=str(store),
        region="cn",
        kernels=1,
        logging_level=logging.WARNING,
        exp_manager={
            "class": "MLflowExpManager",
            "module_path": "qlib.workflow.expm",
            "kwargs": {
                "uri": f"sqlite:///{folder}/mlflow.db",
                "default_exp_name": "tests",
            },
        },
    )
