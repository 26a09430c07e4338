"""Run tasks on a back-end and keep what is finished, whatever dies.

A worker or machine that dies breaks joblib's call; the tasks whose recorders are not
finished are then handed out again. When a round ends without one more finished task,
each of the rest is run in a pool of its own, so that a task that kills its process
cannot take the others with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from joblib import Parallel, delayed
from qlib.log import get_module_logger
from qlib.workflow import R
from tqdm import tqdm

from data_handlers.backends import check_backend, following, processes
from data_handlers.files import locked
from qlib_ext.recorders import close_dead, prepare_store
from qlib_ext.rolling.tasks import (
    SESSION,
    Context,
    Outcome,
    Task,
    close_orphans,
    find_finished,
    find_kept,
    forget,
    init_qlib,
    kept_outcome,
    run_task,
)
from qlib_ext.rolling.windows import Window

__all__ = ["run_key", "run_locked"]

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


def run_key(tasks: Sequence[Task]) -> str:
    """Hash of a run: that of its tasks."""
    text = "\n".join(task.key for task in tasks)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def span_of(windows: Sequence[Window]) -> tuple[str, str]:
    """Days that cover every window's handler."""
    return (
        min(window.handler[0] for window in windows),
        max(window.handler[1] for window in windows),
    )


@contextmanager
def run_locked(
    tasks: Sequence[Task],
    windows: Sequence[Window],
    qlib_init: dict,
    experiments: Sequence[str],
    what: str,
    *,
    workers: int = 1,
    backend: str = "local",
    address: str | None = None,
    threads: int | None = None,
    retries: int = 1,
    work: str | os.PathLike[str] = ".rolling",
    progress: bool = False,
) -> Iterator[tuple[Context, list[Outcome]]]:
    """Run tasks, the lock of their run held until the block that uses them ends.

    Parameters
    ----------
    tasks, windows
    qlib_init : dict
        See `Context`.
    experiments : sequence of str
        That of the tasks' recorders first, then others with recorders of this run.
    what : str
        What is run, for the message of the lock.
    workers, backend, address
        See `run_tasks`.
    threads : int, optional
        Torch threads of a task; by default this machine's cores over `workers`.
    retries : int
        Further attempts of a task that fails.
    work : path
        Folder for checkpoints and the run's lock; shared by a cluster's machines.
    progress : bool

    Raises
    ------
    ValueError
        If another process works on the same run, or an option is wrong.
    """
    check_backend(backend, workers)
    init_qlib(qlib_init)
    run = run_key(tasks)
    folder = Path(work).resolve() / run
    context = Context(
        run=run,
        qlib_init=qlib_init,
        experiment=experiments[0],
        span=span_of(windows),
        work=str(folder),
        threads=threads_each(workers) if threads is None else threads,
        retries=retries,
        session=uuid.uuid4().hex,
    )
    with locked(folder / "lock", f"{what} is being worked on"):
        # Before workers start: they would race to create them.
        uri = qlib_init["exp_manager"]["kwargs"]["uri"]
        prepare_store(uri, *experiments)
        close_dead(uri)
        for name in experiments:
            R.get_exp(experiment_name=name, create=True)
        if closed := sum(close_orphans(name, run) for name in experiments):
            logger.info(f"{closed} recorder(s) of a killed run are closed")
        try:
            yield (
                context,
                run_tasks(
                    tasks,
                    context,
                    workers=workers,
                    backend=backend,
                    address=address,
                    progress=progress,
                ),
            )
        finally:
            forget()  # frames of this process, if the tasks ran in it


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
        found = find_kept(context.experiment, task.key)
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
    before = bar.n

    def look() -> None:
        there = (find_finished(context.experiment, task.key) for task in tasks)
        bar.n = before + sum(found is not None for found in there)
        bar.refresh()

    with contextlib.nullcontext() if bar.disable else following(look, 5.0):
        yield
