"""Run tasks on a back-end and keep what is finished, whatever dies.

A worker or machine that dies breaks joblib's call; the tasks whose recorders are not
finished are then handed out again. When a round ends without one more finished task,
each of the rest is run in a pool of its own, so that a task that kills its process
cannot take the others with it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from joblib import Parallel, delayed
from qlib.log import get_module_logger
from tqdm import tqdm

from data_handlers.backends import processes
from qlib_ext.rolling.tasks import (
    SESSION,
    Context,
    Outcome,
    Task,
    find_finished,
    kept_outcome,
    run_task,
)

__all__ = ["run_tasks", "threads_each"]

logger = get_module_logger("qlib_ext.rolling")


def threads_each(workers: int) -> int:
    """Torch threads of a task when `workers` share this machine's cores.

    `OMP_NUM_THREADS` is a limit: on a busy machine more threads wait for each other.
    """
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores // workers, int(limit) if limit.isdigit() else cores))


def run_tasks(
    tasks: Sequence[Task],
    context: Context,
    *,
    workers: int = 1,
    backend: str = "local",
    address: str | None = None,
    progress: bool = False,
) -> list[Outcome]:
    """Run tasks; the order of the result is that of `tasks`.

    Parameters
    ----------
    tasks : sequence of Task
    context : Context
    workers : int
        Processes. One, on the local back-end, is this process.
    backend, address
        See `data_handlers.backends.processes`.
    progress : bool

    Returns
    -------
    list of Outcome
        One each; a failed one says why.
    """
    done: dict[str, Outcome] = {}
    with tqdm(
        total=len(tasks), desc="tasks", unit="task", disable=None if progress else True
    ) as bar:
        if workers == 1 and backend == "local":
            for task in tasks:
                done[task.key] = run_task(task, context)
                bar.update()
        else:
            _run_in_rounds(tasks, context, workers, backend, address, done, bar)
    return [done[task.key] for task in tasks]


def _run_in_rounds(tasks, context, workers, backend, address, done, bar) -> None:
    broken = ""
    while rest := _unfinished(tasks, context, done):
        before = len(done)
        broken = _round(rest, context, workers, backend, address, done, bar)
        if not broken:
            return
        logger.warning(
            f"workers were lost ({broken}); going on with the tasks that are left"
        )
        if len(_unfinished(tasks, context, done)) == len(rest) and len(done) == before:
            break
    for task in _unfinished(tasks, context, done):
        for attempt in range(context.retries + 1):
            # Two processes, since joblib would run a pool of one in this process.
            broken = _round([task], context, 2, backend, address, done, bar)
            if not broken:
                break
            done_now = _unfinished([task], context, done)
            if not done_now:
                break
            logger.error(
                f"{task.name}: its process died, attempt {attempt + 1} of "
                f"{context.retries + 1} ({broken})"
            )
        if task.key not in done:
            done[task.key] = Outcome(
                task.key,
                "failed",
                attempts=context.retries + 1,
                error=f"its process died: {broken}",
            )
            bar.update()


def _round(rest, context, workers, backend, address, done, bar) -> str:
    """Hand out tasks once; return how the pool broke, or nothing."""
    try:
        with processes(backend, address, workers) as there:
            with _watch(rest, context, bar):
                outcomes = Parallel(n_jobs=there, batch_size=1, pre_dispatch="all")(
                    delayed(run_task)(task, context) for task in rest
                )
    except ValueError:
        raise  # a wrong option, or a package that is not installed
    except Exception as error:
        # What a lost worker raises differs between back-ends; the tasks themselves
        # never raise. Nothing is lost: finished recorders are found again.
        first = str(error).strip().splitlines()[:1]
        return ": ".join([type(error).__name__, *first])
    for outcome in outcomes:
        done[outcome.key] = outcome
    bar.n = len(done)
    bar.refresh()
    return ""


def _unfinished(tasks, context: Context, done: dict[str, Outcome]) -> list[Task]:
    """Tasks without an outcome; those that a lost pool had finished get theirs."""
    rest = []
    for task in tasks:
        if task.key in done:
            continue
        found = find_finished(context.experiment, task.key)
        if found is None:
            rest.append(task)
            continue
        done[task.key] = kept_outcome(task, found)
        if found.list_tags().get(SESSION) == context.session:
            done[task.key].status, done[task.key].why = "finished", ""
    return rest


@contextmanager
def _watch(tasks: Sequence[Task], context: Context, bar: tqdm) -> Iterator[None]:
    """Follow the finished recorders: works the same on every back-end."""
    if bar.disable:
        yield
        return
    stop = threading.Event()
    before = bar.n

    def loop() -> None:
        while not stop.wait(5.0):
            there = sum(
                find_finished(context.experiment, task.key) is not None
                for task in tasks
            )
            bar.n = before + there
            bar.refresh()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
