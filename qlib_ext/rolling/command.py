"""What the commands `roll` and `score` do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd

from qlib_ext.report.page import text_table
from qlib_ext.rolling.retrain import Plan, RollResult, absolute_init, plan, roll
from qlib_ext.rolling.tasks import init_qlib

__all__ = ["roll_text", "score_text"]


def roll_text(
    workflow: Path, test: str, *, dry_run: bool = False, **options: Any
) -> tuple[str, int]:
    """Plan and run; return the account for a terminal and the exit code.

    Parameters
    ----------
    workflow, test
        See `plan`.
    dry_run : bool
        Print the windows and train nothing.
    options
        Of `plan` and `roll`.

    Raises
    ------
    ValueError
        See `plan` and `roll`.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    names = (
        "workers", "backend", "address", "threads", "retries", "partial", "work",
        "progress",
    )  # fmt: skip
    running = {k: options.pop(k) for k in names if k in options}
    made = plan(workflow, test, **options)
    if dry_run:
        return f"{_windows(made)}\n\n{len(made.tasks)} tasks; nothing was trained.", 0
    result = roll(made, **running)
    lines = [_windows(made), "", _tasks(made, result), ""]
    for task, out in result.failed:
        lines.append(f"FAILED {task.name} ({out.attempts} attempts): {out.error}")
    if result.recorder:
        lines.append(
            f"joined score: experiment {result.experiment}, recorder {result.recorder}"
        )
        metrics = result.metrics or {}
        shown = [k for k in ("Rank IC 10d", "IC_IR", "Rank IC", "IC") if k in metrics]
        lines += [f"  {name} {metrics[name]:.4f}" for name in shown]
    else:
        lines.append(
            "no joined score was made: run the same command again to try the failed "
            "tasks once more, or with --partial to join the others."
        )
    return "\n".join(lines), 1 if result.failed else 0


def score_text(
    recorder: str,
    *,
    date: str | None = None,
    store: Path,
    uri: str,
    experiment: str | None = None,
    max_missing: float = 0.02,
    out: Path | None = None,
    threads: int = 1,
    preset: str | None = None,
    mapping: Path | None = None,
    data: Path | None = None,
) -> str:
    """Score a day; return the account for a terminal.

    Parameters
    ----------
    recorder : str
        Id, or the beginning of one.
    date, max_missing
        See `score_day`.
    store : Path
        Qlib store.
    uri, experiment : str
        Where the recorder is.
    out : Path, optional
        CSV file for all scores.
    threads : int
        Of torch.
    preset, mapping, data : optional
        Append the new days of vendor files to the store first; see `ingest`.

    Raises
    ------
    ValueError
        See `score_day`, and `find_recorder`.
    """
    import torch

    from data_handlers.files import write_text
    from qlib_ext.recorders import find_recorder
    from qlib_ext.score import score_day, summary

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    torch.set_num_threads(threads)
    if preset or mapping:
        from qlib_ext.ingest.run import ingest

        ingest(store, preset or mapping or "", data=data or Path(), update=True)
    init_qlib(absolute_init({"qlib_init": {"provider_uri": str(store)}}, Path.cwd()))
    _, found = find_recorder(uri, experiment, recorder, artifact="pred.pkl")
    result = score_day(found, date, max_missing=max_missing)
    text = summary(result)
    if out is not None:
        write_text(out, result.score.to_csv())
        text += f"\n{out}: {len(result.score):,} scores"
    return text


def _windows(made: Plan) -> str:
    rows = [
        [
            w.name,
            *(f"{first} to {last}" for first, last in (w.train, w.valid, w.test)),
            w.note,
        ]
        for w in made.windows
    ]
    head = ["window", "train and fit", "valid", "test", ""]
    return text_table(rows, head)


def _tasks(made: Plan, result: RollResult) -> str:
    table = pd.DataFrame(
        [
            {
                "window": task.window.name,
                "seed": str(task.seed),
                "status": out.status,
                "minutes": f"{out.seconds / 60:.1f}" if out.seconds else "",
                "training": _share(out.figures),
                "peak MiB": f"{out.figures.get('peak_mib', float('nan')):,.0f}",
                "recorder": out.recorder[:8],
            }
            for task, out in zip(result.tasks, result.outcomes, strict=True)
        ]
    )
    return text_table(table.to_numpy().tolist(), list(table.columns))


def _share(figures: dict[str, float]) -> str:
    parts = [figures.get(f"seconds_{k}") for k in ("data", "fit", "score")]
    if None in parts or not (total := sum(p for p in parts if p is not None)):
        return ""
    return f"{(parts[1] or 0.0) / total:.0%}"
