"""Where joblib runs work: local processes, or a Ray or Dask cluster.

The one place that knows the back-ends. A cluster's machines must see the same files
under the same paths.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from joblib import parallel_config

from data_handlers.arguments import Count, checked

__all__ = ["check_backend", "following", "processes"]

Backend = Literal["local", "ray", "dask"]


@checked
def check_backend(backend: Backend, workers: Count) -> None:
    """Raise ValueError unless the back-end is known and `workers` a positive number."""


@contextmanager
def following(look: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call `look` every so often from a thread, while workers anywhere do the work."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(seconds):
            look()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def processes(name: str, address: str | None, workers: int) -> Iterator[int]:
    """Have joblib's `Parallel` use a back-end.

    Parameters
    ----------
    name : {"local", "ray", "dask"}
    address : str, optional
        Of a running cluster; None starts a local one (or uses the Ray that this
        process is connected to).
    workers : int
        Processes wanted.

    Yields
    ------
    int
        Processes there are: a Ray cluster may have fewer cores left.

    Raises
    ------
    ValueError
        If the package of the back-end is not installed.
    """
    if name == "local":
        with parallel_config(backend="loky", n_jobs=workers):
            yield workers
        return
    try:
        if name == "ray":
            import ray
            from ray.util.joblib import register_ray
        else:
            from dask.distributed import Client
    except ImportError as error:
        raise ValueError(
            f"`backend` {name!r} needs a package that is not installed ({error}): "
            "pip install 'qlib_ext[cluster]'."
        ) from error
    if name == "ray":
        started = not ray.is_initialized()
        if started:
            ray.init(
                address=address,
                num_cpus=None if address else workers,
                include_dashboard=False if not address else None,
                log_to_driver=False,
            )
        register_ray()
        try:
            # Ray refuses a pool that is larger than the cluster, which a lost machine
            # makes smaller.
            there = max(1, min(workers, int(ray.cluster_resources().get("CPU", 1))))
            with parallel_config(backend="ray", n_jobs=there):
                yield there
        finally:
            if started:
                ray.shutdown()
        return
    client = (
        Client(address)
        if address
        else Client(n_workers=workers, threads_per_worker=1, dashboard_address=None)
    )
    with client, parallel_config(backend="dask", n_jobs=workers):
        yield workers
