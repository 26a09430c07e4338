"""Back-ends: the same result from local processes, Ray and Dask, whoever dies."""

import os
import runpy
import signal
import socket
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

HERE = runpy.run_path(str(Path(__file__).with_name("test_rolling.py")))


def scores(made, result):
    return HERE["joined_of"](made, result).load_object("pred.pkl")


@pytest.fixture(scope="module")
def expected(market, tmp_path_factory, fresh_database):
    """Joined scores of this process."""
    made, result = HERE["run"](
        market, fresh_database(tmp_path_factory.mktemp("alone")), seeds=1
    )
    return scores(made, result)


def kill_first_worker(parent, after):
    """Kill the first child of this process that appears, a while later."""
    import psutil

    known = set(psutil.Process(parent).children())
    while not (new := set(psutil.Process(parent).children()) - known):
        time.sleep(0.05)
    time.sleep(after)
    victim = new.pop()
    os.kill(victim.pid, signal.SIGKILL)


@pytest.mark.slow
def test_local_processes_lose_one_and_nothing_is_lost(market, tmp_path, expected):
    thread = threading.Thread(target=kill_first_worker, args=(os.getpid(), 15.0))
    thread.start()
    made, result = HERE["run"](market, tmp_path, seeds=1, workers=2)
    thread.join()
    assert not result.failed
    pd.testing.assert_frame_equal(scores(made, result), expected)


@pytest.mark.slow
def test_dask_gives_the_same_result(market, tmp_path, expected):
    pytest.importorskip("distributed")
    made, result = HERE["run"](market, tmp_path, seeds=1, workers=2, backend="dask")
    assert not result.failed
    pd.testing.assert_frame_equal(scores(made, result), expected)


def agent_ports():
    """Give ports by hand: a raylet waits only seconds for agents to choose theirs."""
    names = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port")
    sockets = [socket.socket() for _ in range(4)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return dict(zip((*names, "dashboard_agent_listen_port"), ports, strict=True))


@pytest.mark.slow
def test_ray_cluster_of_two_nodes_loses_one_midway(
    market, tmp_path, expected, monkeypatch
):
    """Each node is a raylet with its own core; the second dies with its worker."""
    # For machines with other work: workers at Ray's own nice 15 stand still, and a
    # raylet needs longer than 30 s to start. Read when Ray is imported.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "240")
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, **agent_ports()},
    )
    node = cluster.add_node(num_cpus=1, **agent_ports())
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    assert ray.cluster_resources()["CPU"] == 2
    seen = []

    def kill_node():
        # Both nodes work once a task of each is in the database.
        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
        while True:
            time.sleep(1)
            found = client.get_experiment_by_name("tiny_roll_tasks")
            if found is None:
                continue
            runs = client.search_runs([found.experiment_id])
            if len(runs) >= 2:
                break
        seen.extend(r.info.status for r in runs)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=kill_node, daemon=True)  # if the run fails
    thread.start()
    try:
        made, result = HERE["run"](
            market,
            tmp_path,
            seeds=1,
            workers=2,
            backend="ray",
            address=cluster.address,
        )
        thread.join()
        assert "RUNNING" in seen  # it died at work
        assert ray.cluster_resources()["CPU"] == 1
        assert not result.failed
        pd.testing.assert_frame_equal(scores(made, result), expected)
    finally:
        ray.shutdown()
        cluster.shutdown()
